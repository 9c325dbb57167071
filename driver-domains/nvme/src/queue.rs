//! A pair of queues: commands to the controller, completions from it.
//!
//! | bytes  | field of a completion                              |
//! |--------|----------------------------------------------------|
//! | 0..4   | result of the command                              |
//! | 4..8   | reserved                                           |
//! | 8..10  | head of the submission queue                       |
//! | 10..12 | submission queue                                   |
//! | 12..14 | command identifier                                 |
//! | 14..16 | phase (bit 0), status                              |
//!
//! The phase of an entry flips each time the controller passes it, from 1, so what is new is
//! known without a register. Ordering: a completion's last dword is loaded with `Acquire` before
//! the rest of it, and before any data of its command, are looked at; commands are stored before
//! the doorbell that passes them on.
//!
//! Never more commands are under way than the submission queue has entries less one, so it is
//! never full, whatever its head is.
//!
//! Source: NVM Express Base Specification 1.4, sections 4.1 and 4.6.

use crate::command::{Command, ENTRY_BYTES};
use crate::registers::{Capabilities, Side};
use crate::status::Status;
use core::sync::atomic::Ordering::{Acquire, Relaxed};
use core::sync::atomic::{Ordering, fence};
use domain_api::{Dma, DmaPage, Errno, Registers};

/// Entries of a submission queue, at most: a page of them.
pub const SUBMISSIONS: u16 = 64;
/// Entries of a completion queue, at most: a page of them.
pub const COMPLETIONS: u16 = 256;
/// Bytes of a completion.
pub const COMPLETION_BYTES: usize = 16;

/// What the controller says about a command. Any value is possible.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Whose commands it is about.
    pub queue: u16,
    /// Which command.
    pub id: u16,
    /// How it ended.
    pub status: Status,
    /// Its result; see the command.
    pub result: u32,
}

/// A submission queue and its completion queue.
#[derive(Debug)]
pub struct Rings {
    id: u16,
    commands: DmaPage,
    completions: DmaPage,
    submissions: u16,
    tail: u16,
    published: u16,
    entries: u16,
    head: u16,
    /// The phase of new completions.
    phase: bool,
    /// Completions taken that the controller has not been told of.
    unreleased: u16,
    tail_doorbell: u32,
    head_doorbell: u32,
}

impl Rings {
    /// Queues in fresh memory, as large as the controller takes.
    ///
    /// # Errors
    /// No memory.
    pub fn new(id: u16, capabilities: Capabilities, dma: &mut impl Dma) -> Result<Self, Errno> {
        let limit = u16::try_from(capabilities.queue_entries()).unwrap_or(u16::MAX);
        Ok(Self {
            id,
            commands: dma.alloc()?,
            completions: dma.alloc()?,
            submissions: SUBMISSIONS.min(limit),
            tail: 0,
            published: 0,
            entries: COMPLETIONS.min(limit),
            head: 0,
            phase: true,
            unreleased: 0,
            tail_doorbell: capabilities.doorbell(id, Side::Submission),
            head_doorbell: capabilities.doorbell(id, Side::Completion),
        })
    }

    /// The queues' number; 0 for the admin queues.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Bus addresses of submission and completion queue.
    pub fn addresses(&self) -> [u64; 2] {
        [self.commands.bus_address, self.completions.bus_address]
    }

    /// Entries of submission and completion queue.
    pub fn sizes(&self) -> [u16; 2] {
        [self.submissions, self.entries]
    }

    /// Commands that may be under way at a time.
    pub fn depth(&self) -> u16 {
        self.submissions - 1
    }

    /// Queues a command. The caller sees to it that at most [`Self::depth`] are under way.
    #[inline]
    pub fn push(&mut self, command: &Command, id: u16) {
        let at = usize::from(self.tail) * ENTRY_BYTES;
        let words = command.words(id);
        // The others are zero since the page was.
        for word in [0, 3, 4, 5, 6] {
            self.commands.page.u64(at + word * 8).store(words[word].to_le(), Relaxed);
        }
        self.tail = if self.tail + 1 == self.submissions { 0 } else { self.tail + 1 };
    }

    /// Tells the controller of queued commands.
    #[inline]
    pub fn publish(&mut self, registers: &mut impl Registers) {
        if self.published != self.tail {
            self.published = self.tail;
            fence(Ordering::SeqCst); // Commands before the register that passes them on.
            registers.write(self.tail_doorbell, u32::from(self.tail));
        }
    }

    /// The last dword of the next completion, if it has arrived.
    #[inline]
    fn arrived(&self) -> Option<u32> {
        let at = usize::from(self.head) * COMPLETION_BYTES + 12;
        let last = u32::from_le(self.completions.page.u32(at).load(Acquire));
        ((last & 1 << 16 != 0) == self.phase).then_some(last)
    }

    /// Whether [`Self::take`] has something.
    pub fn has_entry(&self) -> bool {
        self.arrived().is_some()
    }

    /// The next completion.
    #[inline]
    pub fn take(&mut self, registers: &mut impl Registers) -> Option<Entry> {
        let last = self.arrived()?;
        let at = usize::from(self.head) * COMPLETION_BYTES;
        let dword = |at| u32::from_le(self.completions.page.u32(at).load(Relaxed));
        let (result, queue) = (dword(at), dword(at + 8));
        self.head += 1;
        if self.head == self.entries {
            self.head = 0;
            self.phase = !self.phase;
        }
        self.unreleased += 1;
        // Until then the commands that may be under way still find room in the queue.
        if self.unreleased > (self.entries - self.submissions) / 2 {
            self.release(registers);
        }
        #[expect(clippy::cast_possible_truncation, reason = "halves of dwords")]
        let entry = Entry {
            queue: (queue >> 16) as u16,
            id: last as u16,
            status: Status((last >> 17) as u16),
            result,
        };
        Some(entry)
    }

    /// Tells the controller of completions taken.
    pub fn release(&mut self, registers: &mut impl Registers) {
        if self.unreleased != 0 {
            self.unreleased = 0;
            registers.write(self.head_doorbell, u32::from(self.head));
        }
    }
}
