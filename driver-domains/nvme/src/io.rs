//! An I/O queue: commands under way, each in a slot.
//!
//! A command's identifier is its slot (6 bits) below a generation that changes with each use of
//! the slot, so that a completion that comes twice, or too late, is known for what it is. Each slot
//! has its own place for a PRP list, which is also where a discard's range is written: nothing is
//! allocated while the queue runs.

use crate::command::Command;
use crate::identify::LIST_ENTRIES;
use crate::queue::{Entry, Rings};
use crate::status::Status;
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use domain_api::disk::{Buffer, Completion, DiskError, Tag};
use domain_api::{Dma, DmaPage, Errno};

/// Bits of an identifier that name the slot.
const SLOT_BITS: u32 = 6;
/// Bytes of a slot's PRP list.
const LIST_BYTES: u16 = LIST_ENTRIES * 8;
/// Lists in a page.
const LISTS: u16 = 4096 / LIST_BYTES;
/// How often a command is given to the controller, at most.
const ATTEMPTS: u8 = 4;

/// A command under way.
#[derive(Clone, Copy, Debug)]
struct Slot {
    id: u16,
    disk: u8,
    attempts: u8,
    aborting: bool,
    tag: Tag,
    /// When [`IoQueue::overdue`] first saw it; 0: not yet.
    seen_ns: u64,
    command: Command,
}

/// A command that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What it was.
    pub command: Command,
    /// How it ended.
    pub status: Status,
    /// Whether it will be tried again.
    pub retried: bool,
}

/// What a completion meant.
#[derive(Clone, Copy, Debug)]
pub enum Outcome {
    /// A request of a disk ended, perhaps with an error.
    Ended(u8, Completion),
    /// It will be tried again.
    Retry,
    /// No such command is under way.
    Stray,
}

/// An I/O queue with its slots.
#[derive(Debug)]
pub struct IoQueue {
    pub rings: Rings,
    slots: Vec<Slot>,
    /// Slots that are not in use.
    free: u64,
    /// Slots whose command is to be given again.
    waiting: u64,
    lists: Vec<DmaPage>,
    /// The last failure, until somebody takes it.
    pub failure: Option<Failure>,
}

impl IoQueue {
    /// # Errors
    /// No memory.
    pub fn new(rings: Rings, dma: &mut impl Dma) -> Result<Self, Errno> {
        let depth = rings.depth();
        let lists = (0..depth.div_ceil(LISTS)).map(|_| dma.alloc()).collect::<Result<_, _>>()?;
        let slot = |id| Slot {
            id,
            disk: 0,
            attempts: 0,
            aborting: false,
            tag: Tag(0),
            seen_ns: 0,
            command: Command::default(),
        };
        Ok(Self {
            rings,
            slots: (0..depth).map(slot).collect(),
            free: (1 << depth) - 1,
            waiting: 0,
            lists,
            failure: None,
        })
    }

    /// Whether no command is under way: a completion would be of none.
    #[inline]
    pub fn is_idle(&self) -> bool {
        (self.free | self.waiting) + 1 == 1 << self.slots.len()
    }

    /// A slot that is free.
    #[inline]
    pub fn vacant(&self) -> Option<u16> {
        // At most 63.
        #[expect(clippy::cast_possible_truncation, reason = "below 64")]
        (self.free != 0).then(|| self.free.trailing_zeros() as u16)
    }

    /// The PRP list of a slot: its page, where it is there, and for the device.
    #[inline]
    fn list(&self, slot: u16) -> (&DmaPage, usize, u64) {
        let page = &self.lists[usize::from(slot / LISTS)];
        let at = slot % LISTS * LIST_BYTES;
        (page, usize::from(at), page.bus_address + u64::from(at))
    }

    /// The two PRP entries for buffers that [`domain_api::disk::Geometry::takes`], at least one
    /// (section 4.3): two pages are named directly, more of them in the slot's list.
    #[inline]
    pub fn describe(&self, slot: u16, buffers: &[Buffer<'_>]) -> [u64; 2] {
        match buffers {
            [] => [0, 0],
            [one] => [one.bus_address(), 0],
            [first, second] => [first.bus_address(), second.bus_address()],
            [first, rest @ ..] => {
                let (list, at, address) = self.list(slot);
                for (n, buffer) in rest.iter().enumerate() {
                    list.page.u64(at + 8 * n).store(buffer.bus_address().to_le(), Relaxed);
                }
                [first.bus_address(), address]
            }
        }
    }

    /// Writes the range of a discard (section 6.7.1) and returns where it is.
    pub fn describe_range(&self, slot: u16, first: u64, blocks: u32) -> u64 {
        let (list, at, address) = self.list(slot);
        list.page.u64(at).store((u64::from(blocks) << 32).to_le(), Relaxed);
        list.page.u64(at + 8).store(first.to_le(), Relaxed);
        address
    }

    /// Queues `command` in the vacant `slot`.
    #[inline]
    pub fn send(&mut self, slot: u16, disk: u8, tag: Tag, command: Command) {
        self.free &= !(1 << slot);
        let it = &mut self.slots[usize::from(slot)];
        it.disk = disk;
        it.tag = tag;
        it.attempts = 0;
        it.command = command;
        self.give(slot);
    }

    #[inline]
    fn give(&mut self, slot: u16) {
        let it = &mut self.slots[usize::from(slot)];
        it.id = it.id.wrapping_add(1 << SLOT_BITS);
        it.attempts += 1;
        it.aborting = false;
        it.seen_ns = 0;
        self.rings.push(&it.command, it.id);
    }

    /// Gives the commands that wait for it once more.
    pub fn give_again(&mut self) {
        while self.waiting != 0 {
            #[expect(clippy::cast_possible_truncation, reason = "below 64")]
            let slot = self.waiting.trailing_zeros() as u16;
            self.waiting &= !(1 << slot);
            self.give(slot);
        }
    }

    /// The slot that is under way with this identifier.
    #[inline]
    fn under_way(&self, entry: &Entry) -> Option<u16> {
        let slot = entry.id & ((1 << SLOT_BITS) - 1);
        let known = self.slots.get(usize::from(slot))?.id == entry.id;
        let busy = (self.free | self.waiting) & 1 << slot == 0;
        (known && busy && entry.queue == self.rings.id()).then_some(slot)
    }

    /// Takes a completion.
    #[inline]
    pub fn finish(&mut self, entry: &Entry) -> Outcome {
        let Some(slot) = self.under_way(entry) else { return Outcome::Stray };
        let it = self.slots[usize::from(slot)];
        let result = if entry.status.is_success() {
            Ok(())
        } else {
            match self.fail(slot, entry.status) {
                Some(error) => Err(error),
                None => return Outcome::Retry,
            }
        };
        self.free |= 1 << slot;
        Outcome::Ended(it.disk, Completion { tag: it.tag, result })
    }

    /// The error of a command that is not tried again.
    #[cold]
    fn fail(&mut self, slot: u16, status: Status) -> Option<DiskError> {
        let it = &self.slots[usize::from(slot)];
        let retried = status.may_retry() && it.attempts < ATTEMPTS;
        self.failure = Some(Failure { command: it.command, status, retried });
        if retried {
            self.waiting |= 1 << slot;
            return None;
        }
        Some(status.error())
    }

    /// How long the oldest command is under way, as far as was seen, in ns; and a command that
    /// takes longer than `limit_ns` and was not to be aborted yet.
    pub fn overdue(&mut self, now_ns: u64, limit_ns: u64) -> (u64, Option<u16>) {
        let (mut oldest_ns, mut overdue) = (0, None);
        let mut busy = !(self.free | self.waiting);
        for it in &mut self.slots {
            let under_way = busy & 1 != 0;
            busy >>= 1;
            if !under_way {
                continue;
            }
            if it.seen_ns == 0 {
                it.seen_ns = now_ns.max(1);
            }
            let age_ns = now_ns.saturating_sub(it.seen_ns);
            oldest_ns = age_ns.max(oldest_ns);
            if age_ns > limit_ns && !it.aborting {
                overdue = Some(it.id);
            }
        }
        (oldest_ns, overdue)
    }

    /// Notes that the controller was asked to abort a command.
    pub fn aborting(&mut self, id: u16) {
        if let Some(it) = self.slots.iter_mut().find(|it| it.id == id) {
            it.aborting = true;
        }
    }

    /// Slots in use.
    #[cfg(test)]
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.count_ones() as usize
    }
}
