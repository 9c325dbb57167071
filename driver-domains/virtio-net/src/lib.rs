//! A driver for virtio network devices, as a safe library.
//!
//! It owns the device's two queues and its buffers, and lends frames out through [`Nic`]. It
//! leaves to others: the registers ([`Transport`]), PCI configuration, the routing of messages to
//! events, and what frames mean. Offloads and more queues are not asked for; without the control
//! queue the device passes on every frame, which is what a switch needs.
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

mod buffers;
#[cfg(test)]
mod tests;

use alloc::vec::{Drain, Vec};
use buffers::{Buffers, HEADER, Holder};
use domain_api::nic::{Buffer, Checksum, MAX_FRAME, Nic, Offload, Offloads, Received};
use domain_api::{Clock, Dma, Errno};
use virtio::{DeviceStatus, DeviceType, EVENT_IDX, Hang, Queue, StartError, Transport};

pub use virtio::Cause;

/// Smallest frame: an Ethernet header.
pub const MIN_FRAME: usize = 14;
/// A frame that the device has not taken after this time is stuck.
pub const TRANSMIT_TIMEOUT_NS: u64 = 2_000_000_000;

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
/// Most buffers of each.
const MOST_BUFFERS: u16 = 256;
/// Token of the first transmit buffer.
const FIRST_TRANSMIT: u16 = 0x8000;

/// What the driver counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Frames passed up.
    pub received: u64,
    /// Frames queued for sending.
    pub queued: u64,
    /// Frames dropped because of an impossible length.
    pub bad_lengths: u64,
    /// Frames to send that were too short or too long.
    pub refused: u64,
    /// Buffers that came back without having been lent.
    pub bad_buffers: u64,
}

/// A running device.
#[derive(Debug)]
pub struct VirtioNet<T> {
    transport: T,
    mac: [u8; 6],
    has_status: bool,
    link: bool,
    receive: Queue,
    receive_buffers: Buffers,
    transmit: Queue,
    transmit_buffers: Buffers,
    /// Transmit buffers that are free.
    spare: Vec<u16>,
    /// Somebody was refused a transmit buffer.
    short: bool,
    counters: Counters,
    /// Sent frames that came back, and what [`Self::check`] saw of them, and when.
    sent: u64,
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
        let wanted = FEATURE_MAC | FEATURE_STATUS | EVENT_IDX;
        let features = virtio::negotiate(&mut transport, wanted)?;
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
        let count = |queue: &Queue| queue.size().min(MOST_BUFFERS);
        let receive_buffers = Buffers::new(dma, 0, count(&receive));
        let transmit_buffers = Buffers::new(dma, FIRST_TRANSMIT, count(&transmit));
        let (receive_buffers, transmit_buffers) = (
            receive_buffers.map_err(StartError::Memory)?,
            transmit_buffers.map_err(StartError::Memory)?,
        );
        let ready = transport.get_status() | DeviceStatus::DRIVER_OK;
        transport.set_status(ready);
        let mut device = Self {
            transport,
            mac,
            has_status: features & FEATURE_STATUS != 0,
            link: false,
            receive,
            receive_buffers,
            spare: (0..transmit_buffers.count()).collect(),
            transmit,
            transmit_buffers,
            short: false,
            counters: Counters::default(),
            sent: 0,
            seen: 0,
            since_ns: clock.now_ns(),
        };
        device.transmit.disarm();
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
        let part = self.receive_buffers.part(index, Buffers::room(), true);
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
        let up = !self.has_status
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
        if !self.short {
            return received;
        }
        self.transmit.arm() || received
    }

    /// Looks after the device now and then, say four times a second: the link's state in case
    /// its interrupt was lost, and whether frames still leave. `now_ns` is the system time.
    ///
    /// # Errors
    /// The device hangs.
    pub fn check(&mut self, now_ns: u64) -> Result<Option<bool>, Hang> {
        if self.receive.is_broken() || self.transmit.is_broken() {
            return Err(Hang::Broken);
        }
        if virtio::needs_reset(&self.transport) {
            return Err(Hang::NeedsReset);
        }
        self.collect();
        let idle = self.transmit.free() == self.transmit.size();
        if idle || self.sent != self.seen || !self.link {
            self.seen = self.sent;
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

    /// Takes back the buffers of sent frames.
    fn collect(&mut self) {
        while let Some((index, _)) = self.transmit.take() {
            self.sent += 1;
            self.free_transmit(index);
        }
    }

    /// Queues a frame.
    fn send(&mut self, buffer: &Buffer) {
        let Some(index) = self.transmit_buffers.returned(buffer) else {
            self.counters.bad_buffers += 1;
            return;
        };
        let part = self.transmit_buffers.part(index, buffer.len, false);
        // There is a descriptor for each buffer.
        if is_frame(usize::from(buffer.len)) && self.transmit.add(index, [part].into_iter()) {
            self.transmit_buffers.set(index, Holder::Device);
            self.counters.queued += 1;
        } else {
            self.counters.refused += 1;
            self.free_transmit(index);
        }
    }

    fn free_transmit(&mut self, index: u16) {
        self.transmit_buffers.set(index, Holder::Free);
        self.spare.push(index);
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
        Offloads::default()
    }

    fn tx_buffers(&mut self, bytes: usize, buffers: &mut Vec<Buffer>) -> bool {
        if self.spare.is_empty() {
            self.collect();
        }
        let index = if bytes <= MAX_FRAME { self.spare.pop() } else { None };
        let was_short = core::mem::replace(&mut self.short, index.is_none());
        if was_short && !self.short {
            self.transmit.disarm();
        }
        buffers.extend(index.map(|it| self.transmit_buffers.lend(it, Buffers::room())));
        index.is_some()
    }

    fn transmit(&mut self, packet: Drain<'_, Buffer>, offload: Offload) {
        if packet.len() == 1 && offload == Offload::Nothing {
            packet.for_each(|buffer| self.send(&buffer));
        } else {
            self.counters.refused += 1;
            packet.for_each(|buffer| self.cancel(buffer));
        }
    }

    fn cancel(&mut self, buffer: Buffer) {
        match self.transmit_buffers.returned(&buffer) {
            Some(index) => self.free_transmit(index),
            None => self.counters.bad_buffers += 1,
        }
    }

    fn flush(&mut self) {
        if self.transmit.publish() {
            self.transport.notify(TRANSMIT);
        }
        self.publish_receive();
    }

    fn receive(&mut self) -> Option<Received> {
        loop {
            let (index, written) = self.receive.take()?;
            let len =
                written.checked_sub(u32::from(HEADER)).and_then(|len| u16::try_from(len).ok());
            match len.filter(|len| is_frame(usize::from(*len))) {
                Some(len) => {
                    self.counters.received += 1;
                    let buffer = self.receive_buffers.lend(index, len);
                    return Some(Received { buffer, checksum: Checksum::Unknown });
                }
                None => {
                    self.counters.bad_lengths += 1;
                    self.offer(index);
                }
            }
        }
    }

    fn recycle(&mut self, buffer: Buffer) {
        match self.receive_buffers.returned(&buffer) {
            Some(index) => self.offer(index),
            None => self.counters.bad_buffers += 1,
        }
    }
}

/// Whether `len` is a frame's.
fn is_frame(len: usize) -> bool {
    (MIN_FRAME..=MAX_FRAME).contains(&len)
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
