//! A driver for virtio block devices, as a safe library.
//!
//! It serves the device as a [`Disk`] through one queue: reads, writes, flush, discard and write
//! zeroes. It leaves to others: the registers ([`Transport`]), PCI configuration, the routing of
//! messages to events, and what requests mean.
//!
//! # Interrupts
//!
//! The owner works until [`Disk::complete`] has no more, and then calls [`VirtioBlk::arm`],
//! which asks for an interrupt at the next completion and looks once more. Completions are found
//! in memory, so that an interrupt needs no more than the wake-up.
//!
//! # Errors
//!
//! The device retries by itself; what it reports is final. A device that says nothing for
//! [`PATIENCE_NS`], or that returns what it does not have, is a [`Hang`]: a restart resets it, and
//! the requests are submitted again.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.1, §5.2.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod layout;
#[cfg(test)]
mod tests;

use core::sync::atomic::Ordering::Relaxed;
use domain_api::disk::{
    Buffer, Busy, Completion, Disk, DiskError, Geometry, Operation, Request, Tag,
};
use domain_api::{Clock, Dma, DmaPage, Errno};
use layout::{Config, SLOT_BYTES, STATUS, feature, kind, status};
use virtio::{DeviceStatus, DeviceType, EVENT_IDX, Hang, Part, Queue, StartError, Transport};

pub use virtio::Cause;

/// How long the device may say nothing while it has requests.
pub const PATIENCE_NS: u64 = 60_000_000_000;
/// Requests at a time: their slots fill a page.
const SLOTS: u16 = 64;
/// Most buffers of a request.
const MAX_BUFFERS: u32 = 64;
/// Descriptors of a request besides its buffers: header and status.
const EXTRA: u16 = 2;
/// The only queue.
const QUEUE: u16 = 0;

/// What is known about the request in a slot.
#[derive(Clone, Copy, Debug)]
struct Slot {
    tag: Tag,
    result: Result<(), DiskError>,
}

/// A running device.
#[derive(Debug)]
pub struct VirtioBlk<T> {
    transport: T,
    queue: Queue,
    requests: DmaPage,
    slots: [Slot; SLOTS as usize],
    free: u64,
    done: u64,
    geometry: Geometry,
    can_flush: bool,
    /// Of all completions, when last looked at by [`Self::check`].
    completed: u64,
    seen: u64,
    since_ns: u64,
}

impl<T: Transport> VirtioBlk<T> {
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
        virtio::reset(&mut transport, DeviceType::Block, clock)?;
        master().map_err(StartError::BusMaster)?;
        let features = virtio::negotiate(&mut transport, feature::WANTED | EVENT_IDX)?;
        let config = Config::read(&transport, features)?;
        let event_idx = features & EVENT_IDX != 0;
        // The smallest queue that takes a request at all, with one buffer.
        let queue = Queue::new(&mut transport, dma, QUEUE, 1 + EXTRA, event_idx)?;
        if !route(Cause::Queue(QUEUE)) {
            return Err(StartError::Interrupt);
        }
        let requests = dma.alloc().map_err(StartError::Memory)?;
        let ready = transport.get_status() | DeviceStatus::DRIVER_OK;
        transport.set_status(ready);
        let geometry = config.geometry(queue.size());
        let slot = Slot { tag: Tag(0), result: Ok(()) };
        Ok(Self {
            transport,
            queue,
            requests,
            slots: [slot; SLOTS as usize],
            free: u64::MAX >> (64 - u32::from(geometry.queue_depth)),
            done: 0,
            geometry,
            can_flush: features & feature::FLUSH != 0,
            completed: 0,
            seen: 0,
            since_ns: clock.now_ns(),
        })
    }

    /// Asks for an interrupt at the next completion. Returns whether there is one already.
    pub fn arm(&mut self) -> bool {
        self.queue.arm() || self.done != 0
    }

    /// Looks after the device now and then, say four times a second.
    ///
    /// # Errors
    /// The device hangs.
    pub fn check(&mut self, now_ns: u64) -> Result<(), Hang> {
        if self.queue.is_broken() {
            return Err(Hang::Broken);
        }
        if virtio::needs_reset(&self.transport) {
            return Err(Hang::NeedsReset);
        }
        let idle = self.queue.free() == self.queue.size();
        if idle || self.completed != self.seen || self.queue.has_used() {
            self.seen = self.completed;
            self.since_ns = now_ns;
        } else if now_ns.saturating_sub(self.since_ns) > PATIENCE_NS {
            return Err(Hang::Stuck(PATIENCE_NS / 1_000_000_000));
        }
        Ok(())
    }

    fn check_request(&self, request: &Request<'_>) -> Result<(), DiskError> {
        let Request { operation, sector, sectors, buffers, .. } = *request;
        let most = match operation {
            Operation::Flush => return Ok(()),
            Operation::Write | Operation::Discard | Operation::WriteZeroes
                if self.geometry.read_only =>
            {
                return Err(DiskError::ReadOnly);
            }
            Operation::Read | Operation::Write => {
                check_buffers(buffers, sectors, usize::from(self.geometry.max_buffers))?;
                self.geometry.max_sectors
            }
            Operation::Discard => self.geometry.max_discard_sectors,
            Operation::WriteZeroes => self.geometry.max_write_zeroes_sectors,
        };
        let unit = u64::from(self.geometry.sector_size / 512);
        let is_whole = (sector | sectors) & (unit - 1) == 0;
        if !is_whole || sectors == 0 || sectors > u64::from(most) {
            return Err(DiskError::Unsupported);
        }
        match sector.checked_add(sectors) {
            Some(end) if end <= self.geometry.sectors => Ok(()),
            _ => Err(DiskError::OutOfRange),
        }
    }

    /// Puts a request into the queue. `false`: there are too few descriptors.
    fn put(&mut self, slot: u16, request: &Request<'_>) -> bool {
        let at = usize::from(slot) * SLOT_BYTES;
        let page = &self.requests.page;
        let address = self.requests.bus_address + at as u64;
        let (code, has_range) = match request.operation {
            Operation::Read => (kind::IN, false),
            Operation::Write => (kind::OUT, false),
            Operation::Flush => (kind::FLUSH, false),
            Operation::Discard => (kind::DISCARD, true),
            Operation::WriteZeroes => (kind::WRITE_ZEROES, true),
        };
        let mut header = Part { address, len: layout::HEADER, writable: false };
        page.u64(at).store(u64::from(code).to_le(), Relaxed);
        if has_range {
            // Header and range follow each other: one descriptor has both.
            header.len += layout::RANGE;
            page.u64(at + 8).store(0, Relaxed);
            page.u64(at + 16).store(request.sector.to_le(), Relaxed);
            page.u64(at + 24).store(request.sectors.to_le(), Relaxed);
        } else {
            page.u64(at + 8).store(request.sector.to_le(), Relaxed);
        }
        page.u8(at + STATUS).store(status::NONE, Relaxed);
        let end = Part { address: address + STATUS as u64, len: 1, writable: true };
        let writable = request.operation == Operation::Read;
        let parts = Parts { header, buffers: request.buffers, writable, end, at: 0 };
        self.queue.add(slot, parts)
    }

    fn end(&mut self, slot: u16, result: Result<(), DiskError>) {
        self.slots[usize::from(slot)].result = result;
        self.done |= 1 << slot;
    }

    /// What the device wrote about the request in `slot`.
    fn result(&self, slot: u16) -> Result<(), DiskError> {
        let at = usize::from(slot) * SLOT_BYTES + STATUS;
        match self.requests.page.u8(at).load(Relaxed) {
            status::OK => Ok(()),
            status::UNSUPPORTED => Err(DiskError::Unsupported),
            status::IO_ERROR => Err(DiskError::Medium),
            _ => Err(DiskError::Failed),
        }
    }

    fn finish(&mut self, slot: u16) -> Completion {
        self.free |= 1 << slot;
        let Slot { tag, result } = self.slots[usize::from(slot)];
        Completion { tag, result }
    }
}

impl<T: Transport> Disk for VirtioBlk<T> {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn submit(&mut self, request: Request<'_>) -> Result<(), Busy> {
        if self.free == 0 {
            return Err(Busy);
        }
        let slot = u16::try_from(self.free.trailing_zeros()).map_err(|_| Busy)?;
        let is_nothing = request.operation == Operation::Flush && !self.can_flush;
        let ended = match self.check_request(&request) {
            Err(error) => Some(Err(error)),
            // Without the feature, what is completed is durable (§5.2.6.2).
            Ok(()) if is_nothing => Some(Ok(())),
            Ok(()) if self.put(slot, &request) => None,
            Ok(()) => return Err(Busy),
        };
        self.free &= self.free - 1;
        self.slots[usize::from(slot)] = Slot { tag: request.tag, result: Ok(()) };
        if let Some(result) = ended {
            self.end(slot, result);
        }
        Ok(())
    }

    fn kick(&mut self) {
        if self.queue.publish() {
            self.transport.notify(QUEUE);
        }
    }

    fn complete(&mut self) -> Option<Completion> {
        if let Some((slot, _)) = self.queue.take() {
            self.completed += 1;
            self.slots[usize::from(slot)].result = self.result(slot);
            return Some(self.finish(slot));
        }
        if self.done == 0 {
            return None;
        }
        let slot = u16::try_from(self.done.trailing_zeros()).ok()?;
        self.done &= self.done - 1;
        Some(self.finish(slot))
    }
}

fn check_buffers(buffers: &[Buffer<'_>], sectors: u64, most: usize) -> Result<(), DiskError> {
    let is_whole = |buffer: &Buffer<'_>| {
        let end = u32::from(buffer.offset) + u32::from(buffer.len);
        let aligned = buffer.offset.is_multiple_of(512) && buffer.len.is_multiple_of(512);
        buffer.len != 0 && aligned && end <= 4096
    };
    let bytes: u64 = buffers.iter().map(|buffer| u64::from(buffer.len)).sum();
    if buffers.len() > most || bytes / 512 != sectors || !buffers.iter().all(is_whole) {
        return Err(DiskError::Unsupported);
    }
    Ok(())
}

/// The descriptors of a request: header, buffers, status.
struct Parts<'a> {
    header: Part,
    buffers: &'a [Buffer<'a>],
    writable: bool,
    end: Part,
    at: usize,
}

impl Iterator for Parts<'_> {
    type Item = Part;

    fn next(&mut self) -> Option<Part> {
        let at = self.at;
        self.at += 1;
        match at.checked_sub(1) {
            None => Some(self.header),
            Some(index) if index < self.buffers.len() => {
                let buffer = &self.buffers[index];
                let len = u32::from(buffer.len);
                Some(Part { address: buffer.bus_address(), len, writable: self.writable })
            }
            Some(index) if index == self.buffers.len() => Some(self.end),
            Some(_) => None,
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = (self.buffers.len() + usize::from(EXTRA)).saturating_sub(self.at);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Parts<'_> {}
