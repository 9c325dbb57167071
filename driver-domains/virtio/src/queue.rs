//! A split virtqueue (§2.6), the driver's end.
//!
//! | page       | bytes         | content, of 256 entries                          | writer |
//! |------------|---------------|--------------------------------------------------|--------|
//! | descriptors| 16 each       | address, length, flags, next                     | driver |
//! | available  | 0..2          | flags: 1: no interrupts                          | driver |
//! |            | 2..4          | index of the next entry                          | driver |
//! |            | 4..           | first descriptors of chains, 2 bytes each        | driver |
//! |            | after them    | used index at which to interrupt                 | driver |
//! | used       | 0..2          | flags: 1: no notifications                       | device |
//! |            | 2..4          | index of the next entry                          | device |
//! |            | 4..           | first descriptor and length, 8 bytes each        | device |
//! |            | after them    | available index at which to notify               | device |
//!
//! Ordering: descriptors and entries are stored before the available index, with `Release`; the
//! used index is loaded with `Acquire` before an entry is. Between the store of one's own index
//! and the look at the other's wish, or the other way round, stands a full fence.
//!
//! What the device writes is never trusted: chains are ended by our own table.

use crate::{StartError, Transport};
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::fence;
use domain_api::{Dma, DmaPage};

/// Most entries of a queue: a page of descriptors.
const MAX_SIZE: u16 = 256;

const DESCRIPTOR_BYTES: usize = 16;
const FLAG_NEXT: u64 = 1;
const FLAG_WRITE: u64 = 1 << 1;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// A piece of memory that the device gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Where the device finds it.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes there, or reads.
    pub writable: bool,
}

/// Who has a descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Holder {
    /// We; or it is inside of a chain.
    Free,
    /// The device: first descriptor of a chain of so many, with its owner's number.
    Chain { descriptors: u16, cookie: u16 },
}

/// A queue.
#[derive(Debug)]
pub struct Queue {
    descriptors: DmaPage,
    available: DmaPage,
    used: DmaPage,
    size: u16,
    event_idx: bool,
    holders: Vec<Holder>,
    /// The list of free descriptors, and the rest of each chain.
    next: Vec<u16>,
    first_free: u16,
    free: u16,
    /// The available index, with what is not published yet, and without it.
    added: u16,
    published: u16,
    taken: u16,
    broken: bool,
}

impl Queue {
    /// Sets up queue `index` of a device, with as many entries as both sides can have.
    ///
    /// # Errors
    /// No memory, or the device does not have a queue of at least `min_size`.
    pub fn new<T: Transport>(
        transport: &mut T,
        dma: &mut impl Dma,
        index: u16,
        min_size: u16,
        event_idx: bool,
    ) -> Result<Self, StartError> {
        let most = transport.max_queue_size(index).min(u32::from(MAX_SIZE));
        let size = match u16::try_from(most) {
            Ok(most) if most >= min_size.max(1) => 1 << most.ilog2(),
            _ => return Err(StartError::Queue(index)),
        };
        let mut page = || dma.alloc().map_err(StartError::Memory);
        let (descriptors, available, used) = (page()?, page()?, page()?);
        transport.queue_set(
            index,
            size.into(),
            descriptors.bus_address,
            available.bus_address,
            used.bus_address,
        );
        Ok(Self {
            descriptors,
            available,
            used,
            size,
            event_idx,
            holders: vec![Holder::Free; usize::from(size)],
            next: (1..=size).collect(),
            first_free: 0,
            free: size,
            added: 0,
            published: 0,
            taken: 0,
            broken: false,
        })
    }

    /// Its entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Descriptors that are free.
    #[must_use]
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Whether the device returned what it did not have. Nothing more is taken then.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// Adds a chain of at least one part, named `cookie`; those that the device reads come first. The
    /// device sees it when it is published. `false`: there are not enough free descriptors.
    pub fn add(&mut self, cookie: u16, parts: impl ExactSizeIterator<Item = Part>) -> bool {
        let count = match u16::try_from(parts.len()) {
            Ok(count) if count != 0 && count <= self.free => count,
            _ => return false,
        };
        let head = self.first_free;
        let mut at = head;
        for (left, part) in (0..count).rev().zip(parts) {
            let next = self.next[usize::from(at)];
            let chained = if left == 0 { 0 } else { FLAG_NEXT };
            let flags = chained | if part.writable { FLAG_WRITE } else { 0 };
            let rest = u64::from(part.len) | flags << 32 | u64::from(next) << 48;
            let descriptor = usize::from(at) * DESCRIPTOR_BYTES;
            self.descriptors.page.u64(descriptor).store(part.address.to_le(), Relaxed);
            self.descriptors.page.u64(descriptor + 8).store(rest.to_le(), Relaxed);
            at = next;
        }
        self.first_free = at;
        self.free -= count;
        self.holders[usize::from(head)] = Holder::Chain { descriptors: count, cookie };
        let entry = 4 + 2 * self.slot(self.added);
        self.available.page.u16(entry).store(head.to_le(), Relaxed);
        self.added = self.added.wrapping_add(1);
        true
    }

    /// Lets the device see what was added. Returns whether it wants to be notified.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.added);
        if old == new {
            return false;
        }
        self.available.page.u16(2).store(new.to_le(), Release);
        self.published = new;
        fence(SeqCst);
        if !self.event_idx {
            return u16::from_le(self.used.page.u16(0).load(Relaxed)) & NO_NOTIFY == 0;
        }
        let event = 4 + 8 * usize::from(self.size);
        let event = u16::from_le(self.used.page.u16(event).load(Relaxed));
        is_passed(event, old, new)
    }

    fn used_index(&self) -> u16 {
        u16::from_le(self.used.page.u16(2).load(Acquire))
    }

    /// Whether the device has returned something.
    #[must_use]
    pub fn has_used(&self) -> bool {
        !self.broken && self.used_index() != self.taken
    }

    /// The next chain that the device has finished with: its number, and how many bytes were
    /// written to it, as the device says.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let entry = 4 + 8 * self.slot(self.taken);
        let head = u32::from_le(self.used.page.u32(entry).load(Relaxed));
        let len = u32::from_le(self.used.page.u32(entry + 4).load(Relaxed));
        let held = usize::try_from(head).ok().and_then(|head| self.holders.get(head).copied());
        let (Some(Holder::Chain { descriptors, cookie }), Ok(head)) = (held, u16::try_from(head))
        else {
            self.broken = true;
            return None;
        };
        self.release(head, descriptors);
        self.taken = self.taken.wrapping_add(1);
        Some((cookie, len))
    }

    fn release(&mut self, head: u16, descriptors: u16) {
        self.holders[usize::from(head)] = Holder::Free;
        let mut last = head;
        for _ in 1..descriptors {
            last = self.next[usize::from(last)];
        }
        self.next[usize::from(last)] = self.first_free;
        self.first_free = head;
        self.free += descriptors;
    }

    /// Asks for an interrupt when the device returns something more. Returns whether it has
    /// something already, of which no interrupt may tell.
    #[must_use]
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            let event = 4 + 2 * usize::from(self.size);
            self.available.page.u16(event).store(self.taken.to_le(), Relaxed);
        } else {
            self.available.page.u16(0).store(0, Relaxed);
        }
        fence(SeqCst);
        self.has_used()
    }

    /// Asks for no interrupts, until [`Self::arm`].
    pub fn disarm(&mut self) {
        if self.event_idx {
            // The index that was passed last is the farthest from being passed.
            let event = 4 + 2 * usize::from(self.size);
            let behind = self.taken.wrapping_sub(1);
            self.available.page.u16(event).store(behind.to_le(), Relaxed);
        } else {
            self.available.page.u16(0).store(NO_INTERRUPT.to_le(), Relaxed);
        }
    }
}

/// Whether an index that moves from `old` to `new` passes `event` (§2.6.7.2).
pub(crate) fn is_passed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
