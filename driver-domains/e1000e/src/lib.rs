//! A driver for the Intel 82574L gigabit Ethernet controller, as a safe library.
//!
//! It owns the device's registers, its descriptor rings and its buffers, and lends frames out
//! through [`Nic`]. It leaves to others: PCI configuration, the routing of MSI-X messages to
//! events, and what frames mean.
//!
//! Facts about the device are from its public datasheet (Intel 82574 GbE Controller Family,
//! revision 3.4). `model` (for tests) is the same facts from the other side.
//!
//! # Restarting costs next to nothing
//!
//! The driver is restarted in place when its domain dies, so [`E1000e::start`] meets a device in any
//! state, and must be fast. It resets the controller but never the PHY: the link, and what it
//! negotiated, stay. Negotiating anew would take seconds on a wire and half a second in QEMU.
//! Nothing relies on what a reset leaves in a register: every register that matters is written
//! (QEMU 7.2 leaves most of them alone in a reset). All waits are bounded and end as soon as
//! the device is ready.
//!
//! # Interrupts
//!
//! Vector [`VECTOR_QUEUES`] for both rings, [`VECTOR_OTHER`] for the link. A queue's message
//! masks its cause (`EIAC`, and `IAM` with `CTRL_EXT.EIAME`); the owner works until both rings are
//! empty and then calls [`E1000e::arm`], which unmasks and looks once more. So a busy device
//! interrupts once per burst, however long the burst is, and a frame that arrives between the
//! last look and the unmasking is not forgotten. The transmit cause is unmasked only while
//! somebody waits for a transmit buffer: completed descriptors are otherwise collected when
//! buffers run short.
//!
//! Because of this masking, moderation only has to bound the rate of *isolated* frames: `EITR` is
//! 20 µs, at most 50,000 interrupts in a second, and no delay for a frame that comes alone.
//!
//! # Offloads
//!
//! The device finishes blank checksums of TCP and UDP, cuts TCP packets into frames, and looks at the
//! checksums of received frames. `offload` says how, and what QEMU makes of it. It cuts packets
//! at 1 Gb/s only: other drivers avoid trouble of the hardware at lower speeds, where there is
//! little to gain. A received frame with a wrong checksum is passed on as one of which nothing is known.
//!
//! # Trust
//!
//! The device is below this driver, yet nothing it says is used unchecked: a length outside of
//! [`MIN_FRAME`](domain_api::nic::MIN_FRAME)`..=`[`MAX_FRAME`](domain_api::nic::MAX_FRAME), a frame in several pieces or an error bit means that the
//! frame is dropped and counted. Descriptors are looked at only where they are owned by the
//! device, and buffers are found by our own tables, never by an address read back. Buffers that come back
//! from the layer above are checked against those tables in the same way.

#![cfg_attr(not(any(test, feature = "model")), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod descriptor;
#[cfg(any(test, feature = "model"))]
pub mod model;
mod offload;
mod receive;
pub mod registers;
mod start;
mod statistics;
mod transmit;

#[cfg(test)]
mod tests;

use alloc::vec::{Drain, Vec};
use core::fmt;
use domain_api::Registers;
use domain_api::nic::{Buffer, Nic, Offload, Offloads, Received};
use receive::Receiver;
use registers as reg;
use transmit::Transmitter;

pub use start::StartError;
pub use statistics::{Counters, Statistics};

/// MSI-X vector of both rings.
pub const VECTOR_QUEUES: u32 = 0;
/// MSI-X vector of everything else, that is, of the link.
pub const VECTOR_OTHER: u32 = 1;
/// A frame that the device has not sent after this time, with the link up, is stuck.
pub const TRANSMIT_TIMEOUT_NS: u64 = 2_000_000_000;

/// What device this is, from its configuration space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PciId {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Of the board: vendor in the lower half, number in the upper one.
    pub subsystem: u32,
}

impl PciId {
    /// Where in configuration space [`Self::subsystem`] is.
    pub const SUBSYSTEM: u16 = 0x2c;

    fn is_82574l(self) -> bool {
        (self.vendor, self.device) == (0x8086, 0x10d3)
    }

    /// Whether it is QEMU's, which has the chip's vendor and no number; boards have one.
    fn is_qemu(self) -> bool {
        self.subsystem == 0x8086
    }
}

/// What [`E1000e::service_other`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OtherCauses {
    /// The link's new state, when it changed.
    pub link: Option<bool>,
    /// Frames found no free descriptor.
    pub overrun: bool,
}

/// The device does not work any more. The remedy is a restart of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hang {
    /// All registers read as ones: it left the bus.
    Gone,
    /// It did not send a frame for [`TRANSMIT_TIMEOUT_NS`].
    Transmitter,
}

impl fmt::Display for Hang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gone => "the controller does not answer on the bus",
            Self::Transmitter => "the controller stopped sending",
        })
    }
}

impl core::error::Error for Hang {}

/// A running controller.
#[derive(Debug)]
pub struct E1000e<R> {
    registers: R,
    mac: [u8; 6],
    link: bool,
    /// The device can be asked to cut packets over IPv6.
    cuts_v6: bool,
    /// What it does at the link's speed.
    offers: Offloads,
    receiver: Receiver,
    transmitter: Transmitter,
    statistics: Statistics,
}

impl<R: Registers> E1000e<R> {
    /// Handles a message on [`VECTOR_OTHER`].
    pub fn service_other(&mut self) -> OtherCauses {
        let causes = self.registers.read(reg::ICR);
        if causes == u32::MAX {
            return OtherCauses { link: None, overrun: false };
        }
        // Reading may have cleared queue causes as well; raise those again, unless they are
        // masked anyway, when `arm` looks at the rings itself.
        let queues = causes & (reg::INT_RXQ0 | reg::INT_TXQ0);
        self.registers.write(reg::ICR, causes & (reg::OTHER_CAUSES | reg::INT_OTHER));
        if queues != 0 {
            self.registers.write(reg::ICS, queues);
        }
        let overrun = causes & reg::INT_RXO != 0;
        self.statistics.counters.overruns += u64::from(overrun);
        OtherCauses { link: self.refresh_link(), overrun }
    }

    /// Reads the link's state; returns it when it changed.
    fn refresh_link(&mut self) -> Option<bool> {
        let status = self.registers.read(reg::STATUS);
        let link = status != u32::MAX && status & reg::STATUS_LU != 0;
        let cuts = link && status & reg::STATUS_SPEED_1000 != 0;
        self.offers = Offloads {
            checksum_v4: true,
            checksum_v6: true,
            segment_v4: cuts,
            segment_v6: cuts && self.cuts_v6,
        };
        if link == self.link {
            return None;
        }
        self.link = link;
        self.statistics.counters.link_changes += 1;
        Some(link)
    }

    /// Unmasks the interrupts of the rings. Returns whether there is work already, in which case
    /// the caller does it rather than wait: its interrupt may have been lost to the mask.
    pub fn arm(&mut self) -> bool {
        let mut causes = reg::INT_RXQ0;
        if self.transmitter.is_short() {
            causes |= reg::INT_TXQ0;
        }
        // Causes that piled up behind the mask are of frames already seen; without this each
        // burst would end in an interrupt for nothing.
        self.registers.write(reg::ICR, reg::INT_RXQ0 | reg::INT_TXQ0);
        self.registers.write(reg::IMS, causes);
        let freed = self.transmitter.relieve();
        self.receiver.has_frame() || freed
    }

    /// Looks after the device now and then, say four times a second: the link's state in case
    /// its interrupt was lost, and whether frames still leave. `now_ns` is the system time.
    ///
    /// # Errors
    /// The device hangs.
    pub fn check(&mut self, now_ns: u64) -> Result<Option<bool>, Hang> {
        if self.registers.read(reg::STATUS) == u32::MAX {
            return Err(Hang::Gone);
        }
        let changed = self.refresh_link();
        if self.transmitter.is_stuck(now_ns, self.link) {
            return Err(Hang::Transmitter);
        }
        Ok(changed)
    }

    /// Counts since the start.
    pub fn statistics(&mut self) -> &Statistics {
        self.statistics.collect(&self.registers);
        &self.statistics
    }
}

impl<R: Registers> Nic for E1000e<R> {
    fn mac(&self) -> [u8; 6] {
        self.mac
    }

    fn link_up(&self) -> bool {
        self.link
    }

    fn offloads(&self) -> Offloads {
        self.offers
    }

    fn tx_buffers(&mut self, bytes: usize, buffers: &mut Vec<Buffer>) -> bool {
        self.transmitter.lend(bytes, buffers)
    }

    fn transmit(&mut self, packet: Drain<'_, Buffer>, offload: Offload) {
        let counters = &mut self.statistics.counters;
        self.transmitter.send(packet, offload, self.offers, counters);
    }

    fn cancel(&mut self, buffer: Buffer) {
        self.transmitter.cancel(&buffer, &mut self.statistics.counters);
    }

    fn flush(&mut self) {
        self.transmitter.publish(&mut self.registers);
        self.receiver.publish(&mut self.registers);
    }

    fn receive(&mut self) -> Option<Received> {
        self.receiver.take(&mut self.statistics.counters)
    }

    fn recycle(&mut self, buffer: Buffer) {
        self.receiver.recycle(&buffer, &mut self.statistics.counters);
    }
}
