//! A driver for virtio network devices, as a safe library.
//!
//! It owns the device's two queues and its buffers, and lends frames out through [`Nic`]. It
//! leaves to others: the registers ([`Transport`]), PCI configuration, the routing of messages to
//! events, and what frames mean. More queues are not asked for; without the control queue the device
//! passes on every frame, which is what a switch needs.
//!
//! # Offloads
//!
//! Blank checksums and TCP packets to be cut are passed to the device as they are, with a header that
//! says so, if it takes them. In QEMU that depends on the other end of its network: a tap device
//! takes them, user networking does not, and the device offers nothing then. We take frames
//! with blank checksums in turn, as senders in the same machine leave them, but none that are to be
//! cut: frames are for guests whatever their frontends take.
//!
//! # Interrupts
//!
//! The owner works until both queues are empty and then calls [`VirtioNet::arm`], which asks for
//! an interrupt at the next frame and looks once more. Sent frames interrupt only while somebody
//! waits for a transmit buffer: they are otherwise collected when buffers run short.
//!
//! # Trust
//!
//! A length that is no frame's means that the frame is dropped and counted; buffers are found by our
//! own tables; a device that returns what it does not have is a [`Hang`].
//!
//! Source: Virtual I/O Device (VIRTIO) 1.1, §5.1.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod header;
#[cfg(test)]
mod tests;
mod transmit;

use alloc::vec::{Drain, Vec};
use card_buffers::{Buffers, Holder, Shape};
use domain_api::nic::{Buffer, Checksum, Nic, Offload, Offloads, Received, is_frame};
use domain_api::{Clock, Dma, Errno};
use header::{HEADER, PLAIN};
use transmit::Transmitter;
use virtio::{DeviceStatus, DeviceType, EVENT_IDX, Hang, Queue, StartError, Transport};

pub use virtio::Cause;

/// A frame that the device has not taken after this time is stuck.
pub const TRANSMIT_TIMEOUT_NS: u64 = 2_000_000_000;

/// The device finishes blank checksums (§5.1.3).
const FEATURE_CSUM: u64 = 1 << 0;
/// We take frames with blank checksums.
const FEATURE_GUEST_CSUM: u64 = 1 << 1;
/// The device cuts TCP over IPv4, over IPv6.
const FEATURE_HOST_TSO4: u64 = 1 << 11;
const FEATURE_HOST_TSO6: u64 = 1 << 12;
/// The device has an address (§5.1.3).
const FEATURE_MAC: u64 = 1 << 5;
/// It says whether its link is up.
const FEATURE_STATUS: u64 = 1 << 16;
/// Configuration (§5.1.4): address, and status with its link bit.
const CONFIG_MAC: usize = 0;
const CONFIG_STATUS: usize = 6;
const STATUS_LINK_UP: u16 = 1;

/// The queues.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Most receive buffers.
const MOST_BUFFERS: u16 = 256;
const SHAPE: Shape = Shape::half_page(HEADER);

/// What the driver counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Frames passed up.
    pub received: u64,
    /// Frames queued for sending.
    pub queued: u64,
    /// Frames dropped because of an impossible length.
    pub bad_lengths: u64,
    /// Frames dropped because their header named a place outside of them.
    pub bad_headers: u64,
    /// Packets to send that were too short or too long, or that the device cannot do.
    pub refused: u64,
    /// Buffers that came back without having been lent.
    pub bad_buffers: u64,
}

/// A running device.
#[derive(Debug)]
pub struct VirtioNet<T> {
    transport: T,
    mac: [u8; 6],
    features: u64,
    offers: Offloads,
    link: bool,
    receive: Queue,
    receive_buffers: Buffers,
    transmitter: Transmitter,
    counters: Counters,
    /// How many sent packets [`Self::check`] saw come back, and when.
    seen: u64,
    since_ns: u64,
}

impl<T: Transport> VirtioNet<T> {
    /// Resets the device behind `transport` and starts it.
    ///
    /// Bus mastering should be off: the device may still have the queues of an earlier owner.
    /// `master` turns it on; it is called once, when the device has been reset. `route` gives a
    /// message to a cause, and says whether the device took it.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(
        mut transport: T,
        dma: &mut impl Dma,
        clock: &impl Clock,
        master: impl FnOnce() -> Result<(), Errno>,
        mut route: impl FnMut(Cause) -> bool,
    ) -> Result<Self, StartError> {
        virtio::reset(&mut transport, DeviceType::Network, clock)?;
        master().map_err(StartError::BusMaster)?;
        let features = virtio::negotiate_by(&mut transport, wanted)?;
        let mac = station_address(&transport, features)?;
        let event_idx = features & EVENT_IDX != 0;
        let receive = Queue::new(&mut transport, dma, RECEIVE, 2, event_idx)?;
        let transmit = Queue::new(&mut transport, dma, TRANSMIT, 2, event_idx)?;
        if ![Cause::Config, Cause::Queue(RECEIVE), Cause::Queue(TRANSMIT)]
            .into_iter()
            .all(&mut route)
        {
            return Err(StartError::Interrupt);
        }
        let count = receive.size().min(MOST_BUFFERS);
        let receive_buffers = Buffers::new(dma, 0, count, SHAPE).map_err(StartError::Memory)?;
        let transmitter = Transmitter::new(transmit, dma).map_err(StartError::Memory)?;
        let ready = transport.get_status() | DeviceStatus::DRIVER_OK;
        transport.set_status(ready);
        let mut device = Self {
            transport,
            mac,
            features,
            offers: offers(features, transmitter.can_hold_packets()),
            link: false,
            receive,
            receive_buffers,
            transmitter,
            counters: Counters::default(),
            seen: 0,
            since_ns: clock.now_ns(),
        };
        device.offer_all();
        device.refresh_link();
        Ok(device)
    }

    fn offer_all(&mut self) {
        for index in 0..self.receive_buffers.count() {
            self.offer(index);
        }
        self.publish_receive();
        // An interrupt for the first frame.
        let _ = self.receive.arm();
    }

    /// Gives the device an empty buffer.
    fn offer(&mut self, index: u16) {
        let address = self.receive_buffers.headroom_address(index);
        let len = u32::from(HEADER) + u32::from(SHAPE.room());
        let part = virtio::Part { address, len, writable: true };
        if self.receive.add(index, [part].into_iter()) {
            self.receive_buffers.set(index, Holder::Device);
        }
    }

    fn publish_receive(&mut self) {
        if self.receive.publish() {
            self.transport.notify(RECEIVE);
        }
    }

    /// Reads the link's state; returns it when it changed.
    pub fn refresh_link(&mut self) -> Option<bool> {
        let up = self.features & FEATURE_STATUS == 0
            || self
                .transport
                .read_config_space::<u16>(CONFIG_STATUS)
                .is_ok_and(|status| status & STATUS_LINK_UP != 0);
        if up == self.link {
            return None;
        }
        self.link = up;
        Some(up)
    }

    /// Asks for interrupts. Returns whether there is work already, in which case the caller does
    /// it rather than wait.
    pub fn arm(&mut self) -> bool {
        let received = self.receive.arm();
        self.transmitter.arm() || received
    }

    /// Looks after the device now and then, say four times a second: the link's state in case
    /// its interrupt was lost, and whether frames still leave. `now_ns` is the system time.
    ///
    /// # Errors
    /// The device hangs.
    pub fn check(&mut self, now_ns: u64) -> Result<Option<bool>, Hang> {
        if self.receive.is_broken() || self.transmitter.is_broken() {
            return Err(Hang::Broken);
        }
        if virtio::needs_reset(&self.transport) {
            return Err(Hang::NeedsReset);
        }
        self.transmitter.collect();
        let sent = self.transmitter.sent();
        if self.transmitter.is_idle() || sent != self.seen || !self.link {
            self.seen = sent;
            self.since_ns = now_ns;
        } else if now_ns.saturating_sub(self.since_ns) > TRANSMIT_TIMEOUT_NS {
            return Err(Hang::Stuck(TRANSMIT_TIMEOUT_NS / 1_000_000_000));
        }
        Ok(self.refresh_link())
    }

    /// Counts since the start.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What is known of a frame that arrived in buffer `index`. `None`: nothing can be made of it.
    fn judge(&self, index: u16, len: u16) -> Option<Checksum> {
        // Without the feature the device may leave anything there.
        if self.features & FEATURE_GUEST_CSUM == 0 {
            return Some(Checksum::Unknown);
        }
        let mut header = PLAIN;
        self.receive_buffers.read_headroom(index, &mut header);
        let (page, at) = self.receive_buffers.content(index);
        header::incoming(&header, page, at, len.into())
    }
}

impl<T: Transport> Nic for VirtioNet<T> {
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
        self.transmitter.send(packet, offload, self.offers, &mut self.counters);
    }

    fn cancel(&mut self, buffer: Buffer) {
        self.transmitter.cancel(&buffer, &mut self.counters);
    }

    fn flush(&mut self) {
        if self.transmitter.publish() {
            self.transport.notify(TRANSMIT);
        }
        self.publish_receive();
    }

    fn receive(&mut self) -> Option<Received> {
        loop {
            let (index, written) = self.receive.take()?;
            let len =
                written.checked_sub(u32::from(HEADER)).and_then(|len| u16::try_from(len).ok());
            let Some(len) = len.filter(|len| is_frame(usize::from(*len))) else {
                self.counters.bad_lengths += 1;
                self.offer(index);
                continue;
            };
            let Some(checksum) = self.judge(index, len) else {
                self.counters.bad_headers += 1;
                self.offer(index);
                continue;
            };
            self.counters.received += 1;
            return Some(Received { buffer: self.receive_buffers.lend(index, len), checksum });
        }
    }

    fn recycle(&mut self, buffer: Buffer) {
        match self.receive_buffers.returned(&buffer) {
            Some(index) => self.offer(index),
            None => self.counters.bad_buffers += 1,
        }
    }
}

/// What we want of a device: cutting is worth nothing without checksums (§5.1.3.1).
fn wanted(offered: u64) -> u64 {
    let always = FEATURE_MAC | FEATURE_STATUS | EVENT_IDX | FEATURE_CSUM | FEATURE_GUEST_CSUM;
    let cutting = FEATURE_HOST_TSO4 | FEATURE_HOST_TSO6;
    if offered & FEATURE_CSUM != 0 { always | cutting } else { always }
}

/// What a device does with which `features` were agreed on, and whose transmit buffers hold the longest
/// packets or not.
fn offers(features: u64, holds_packets: bool) -> Offloads {
    let has = |feature| features & feature != 0;
    Offloads {
        checksum_v4: has(FEATURE_CSUM),
        checksum_v6: has(FEATURE_CSUM),
        segment_v4: has(FEATURE_HOST_TSO4) && holds_packets,
        segment_v6: has(FEATURE_HOST_TSO6) && holds_packets,
    }
}

/// The device's address, or one that the driver makes up (§5.1.5): locally administered, and the
/// same after each restart, as guests and switches know it.
fn station_address(transport: &impl Transport, features: u64) -> Result<[u8; 6], StartError> {
    const MADE_UP: [u8; 6] = [0x02, 0x61, 0x78, 0x6f, 0x6c, 0x01];
    if features & FEATURE_MAC == 0 {
        return Ok(MADE_UP);
    }
    let read = |at| transport.read_config_space::<u8>(CONFIG_MAC + at);
    let mut mac = [0; 6];
    for (at, byte) in mac.iter_mut().enumerate() {
        *byte = read(at).map_err(|_| StartError::Config("it is too short"))?;
    }
    match mac {
        [first, ..] if first & 1 == 0 && mac != [0; 6] => Ok(mac),
        _ => Err(StartError::Config("its address is not a station's")),
    }
}
