//! Pages of tables, written through.
//!
//! All tables of the image (header, L1 and L2 tables, refcount table and blocks) are read and
//! written in pages of 4 KiB, which no cluster is smaller than. A change is made in the page, and
//! the page is written at the end of the same round; who made it holds a [`Ticket`] that is good
//! once the medium has it. All changes of a round to one page are one write.
//!
//! A page is not changed while the disk reads it, so that a write has what its tickets say, and a
//! page is not given up before it was written. What may be changed when is up to those who
//! change: an entry is changed only when all that it relies on is on the medium.

use crate::api::{File, Lower};
use crate::ops::{Ask, Ops, Owner, Stop};
use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use domain_api::DmaPage;
use domain_api::disk::{Buffer, DiskError, Operation};
use xen_abi::PAGE_SIZE;

const PAGE_BYTES: u64 = PAGE_SIZE as u64;
/// A page that cannot be written is tried that often.
const TRIES: u32 = 3;
const BUCKETS: usize = 256;

/// Names a page: whose, and its number there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Key {
    file: File,
    number: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Content {
    Nothing,
    Loading,
    Valid,
    Failed(DiskError),
}

#[derive(Debug)]
struct Slot {
    page: DmaPage,
    key: Key,
    content: Content,
    used: u64,
    /// The first change that is not on the medium, if any is not.
    since: u64,
    /// The last change.
    changed: u64,
    /// The last change that the write under way has.
    writing: Option<u64>,
    /// The last change that is on the medium.
    written: u64,
    tries: u32,
}

impl Slot {
    fn is_dirty(&self) -> bool {
        self.changed > self.written
    }
}

/// A change that is on its way to the medium.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "a change counts when it is on the medium"]
pub(crate) struct Ticket {
    slot: usize,
    change: u64,
}

/// The pages.
#[derive(Debug)]
pub(crate) struct Cache {
    slots: Vec<Slot>,
    /// Guesses where a key is.
    guesses: Vec<u16>,
    clock: u64,
    changes: u64,
    /// A page could not be written: what the medium has is not known any more.
    broken: bool,
    unwritten: bool,
    failures: bool,
}

impl Cache {
    pub(crate) fn new(pages: Vec<DmaPage>) -> Self {
        let slot = |page| Slot {
            page,
            key: Key { file: File::Image, number: u64::MAX },
            content: Content::Nothing,
            used: 0,
            since: 0,
            changed: 0,
            writing: None,
            written: 0,
            tries: 0,
        };
        Self {
            slots: pages.into_iter().map(slot).collect(),
            guesses: alloc::vec![0; BUCKETS],
            clock: 0,
            changes: 0,
            broken: false,
            unwritten: false,
            failures: false,
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// The slot of the page that has byte `at` of a file; loads it if need be.
    fn find(
        &mut self,
        lower: &mut impl Lower,
        ops: &mut Ops,
        file: File,
        at: u64,
    ) -> Result<usize, Stop> {
        let key = Key { file, number: at / PAGE_BYTES };
        let bucket = bucket(key);
        let guess = usize::from(self.guesses[bucket]);
        let place = match self.slots.get(guess) {
            Some(slot) if slot.key == key => Some(guess),
            _ => self.slots.iter().position(|slot| slot.key == key),
        };
        let place = match place {
            Some(place) if self.slots[place].content != Content::Nothing => place,
            _ => return self.load(lower, ops, key),
        };
        self.guesses[bucket] = u16::try_from(place).unwrap_or_default();
        self.clock += 1;
        let slot = &mut self.slots[place];
        slot.used = self.clock;
        match slot.content {
            Content::Valid => Ok(place),
            Content::Failed(error) => Err(error.into()),
            Content::Loading | Content::Nothing => Err(Stop::Wait),
        }
    }

    /// Begins to load a page; it is always `Wait`.
    fn load(&mut self, lower: &mut impl Lower, ops: &mut Ops, key: Key) -> Result<usize, Stop> {
        let is_free = |slot: &&mut Slot| match slot.content {
            Content::Nothing => true,
            Content::Valid => !slot.is_dirty() && slot.writing.is_none(),
            Content::Loading | Content::Failed(_) => false,
        };
        let oldest = self.slots.iter_mut().enumerate().filter(|(_, slot)| is_free(slot));
        let (place, slot) = oldest.min_by_key(|(_, slot)| slot.used).ok_or(Stop::Wait)?;
        let buffers = [Buffer { page: &slot.page, offset: 0, len: PAGE_LEN }];
        let ask = Ask {
            file: key.file,
            operation: Operation::Read,
            at: key.number * PAGE_BYTES,
            len: PAGE_BYTES,
            buffers: &buffers,
        };
        ops.submit(lower, Owner::Page(place), &ask)?;
        self.clock += 1;
        slot.key = key;
        slot.content = Content::Loading;
        slot.used = self.clock;
        Err(Stop::Wait)
    }

    /// The big-endian word of 64 bits at byte `at`.
    pub(crate) fn word(
        &mut self,
        lower: &mut impl Lower,
        ops: &mut Ops,
        file: File,
        at: u64,
    ) -> Result<u64, Stop> {
        let place = self.find(lower, ops, file, at)?;
        Ok(u64::from_be(self.slots[place].page.page.u64(inside(at)).load(Relaxed)))
    }

    /// The big-endian word of 16 bits at byte `at` of the image.
    pub(crate) fn short(
        &mut self,
        lower: &mut impl Lower,
        ops: &mut Ops,
        at: u64,
    ) -> Result<u16, Stop> {
        let place = self.find(lower, ops, File::Image, at)?;
        Ok(u16::from_be(self.slots[place].page.page.u16(inside(at)).load(Relaxed)))
    }

    /// The first zero among `count` big-endian words of 16 bits from byte `at` of the image on,
    /// all in one page.
    pub(crate) fn zero_short(
        &mut self,
        lower: &mut impl Lower,
        ops: &mut Ops,
        at: u64,
        count: u64,
    ) -> Result<Option<u64>, Stop> {
        let place = self.find(lower, ops, File::Image, at)?;
        let page = &self.slots[place].page.page;
        Ok((0..count).find(|index| page.u16(inside(at + 2 * index)).load(Relaxed) == 0))
    }

    /// Copies the page that begins at byte `at` of a file.
    pub(crate) fn copy(
        &mut self,
        lower: &mut impl Lower,
        ops: &mut Ops,
        file: File,
        at: u64,
        bytes: &mut [u8],
    ) -> Result<(), Stop> {
        let place = self.find(lower, ops, file, at)?;
        self.slots[place].page.page.read(0, bytes);
        Ok(())
    }

    /// Whether the page with byte `at` of the image is there and may be changed now.
    pub(crate) fn changeable(
        &mut self,
        lower: &mut impl Lower,
        ops: &mut Ops,
        at: u64,
    ) -> Result<(), Stop> {
        let place = self.find(lower, ops, File::Image, at)?;
        match self.slots[place].writing {
            _ if self.broken => Err(DiskError::Medium.into()),
            Some(_) => Err(Stop::Wait),
            None => Ok(()),
        }
    }

    /// Changes a page of the image.
    fn change(
        &mut self,
        lower: &mut impl Lower,
        ops: &mut Ops,
        at: u64,
        change: impl FnOnce(&DmaPage),
    ) -> Result<Ticket, Stop> {
        self.changeable(lower, ops, at)?;
        let place = self.find(lower, ops, File::Image, at)?;
        self.changes += 1;
        self.unwritten = true;
        let slot = &mut self.slots[place];
        change(&slot.page);
        if !slot.is_dirty() {
            slot.since = self.changes;
        }
        slot.changed = self.changes;
        Ok(Ticket { slot: place, change: self.changes })
    }

    /// Stores a big-endian word of 64 bits at byte `at` of the image.
    pub(crate) fn set_word(
        &mut self,
        lower: &mut impl Lower,
        ops: &mut Ops,
        at: u64,
        word: u64,
    ) -> Result<Ticket, Stop> {
        self.change(lower, ops, at, |page| page.page.u64(inside(at)).store(word.to_be(), Relaxed))
    }

    /// Stores a big-endian word of 16 bits at byte `at` of the image.
    pub(crate) fn set_short(
        &mut self,
        lower: &mut impl Lower,
        ops: &mut Ops,
        at: u64,
        word: u16,
    ) -> Result<Ticket, Stop> {
        self.change(lower, ops, at, |page| page.page.u16(inside(at)).store(word.to_be(), Relaxed))
    }

    /// Stores bytes at byte `at` of the image, all in one page.
    pub(crate) fn set_bytes(
        &mut self,
        lower: &mut impl Lower,
        ops: &mut Ops,
        at: u64,
        bytes: &[u8],
    ) -> Result<Ticket, Stop> {
        self.change(lower, ops, at, |page| page.page.write(inside(at), bytes))
    }

    /// Whether a change is on the medium.
    pub(crate) fn check(&self, ticket: Ticket) -> Result<(), Stop> {
        match &self.slots[ticket.slot] {
            slot if slot.written >= ticket.change => Ok(()),
            _ if self.broken => Err(DiskError::Medium.into()),
            _ => Err(Stop::Wait),
        }
    }

    /// A mark between what was changed up to now and what will be.
    pub(crate) fn mark(&self) -> u64 {
        self.changes
    }

    /// Whether everything that was changed before a mark is on the medium.
    pub(crate) fn check_mark(&self, mark: u64) -> Result<(), Stop> {
        match self.slots.iter().any(|slot| slot.is_dirty() && slot.since <= mark) {
            false => Ok(()),
            true if self.broken => Err(DiskError::Medium.into()),
            true => Err(Stop::Wait),
        }
    }

    /// Forgets what is known of a part of the image that is written otherwise. Nobody may be
    /// about to change it.
    pub(crate) fn forget(&mut self, at: u64, len: u64) {
        let numbers = at / PAGE_BYTES..(at + len).div_ceil(PAGE_BYTES);
        for slot in &mut self.slots {
            let is_there = slot.key.file == File::Image && numbers.contains(&slot.key.number);
            if is_there && slot.content == Content::Valid && !slot.is_dirty() {
                slot.content = Content::Nothing;
                slot.key.number = u64::MAX;
            }
        }
    }

    /// Ends a round: writes what was changed, and lets what could not be read be tried anew.
    pub(crate) fn end_round(&mut self, lower: &mut impl Lower, ops: &mut Ops) {
        if self.failures {
            self.failures = false;
            for slot in &mut self.slots {
                if matches!(slot.content, Content::Failed(_)) {
                    slot.content = Content::Nothing;
                    slot.key.number = u64::MAX;
                }
            }
        }
        if !self.unwritten || self.broken {
            return;
        }
        self.unwritten = false;
        for (place, slot) in self.slots.iter_mut().enumerate() {
            if !slot.is_dirty() || slot.writing.is_some() {
                continue;
            }
            let buffers = [Buffer { page: &slot.page, offset: 0, len: PAGE_LEN }];
            let ask = Ask {
                file: File::Image,
                operation: Operation::Write,
                at: slot.key.number * PAGE_BYTES,
                len: PAGE_BYTES,
                buffers: &buffers,
            };
            match ops.submit(lower, Owner::Page(place), &ask) {
                Ok(()) => slot.writing = Some(slot.changed),
                Err(_) => self.unwritten = true,
            }
        }
    }

    pub(crate) fn completed(&mut self, place: usize, result: Result<(), DiskError>) {
        let slot = &mut self.slots[place];
        match (slot.writing.take(), result) {
            (Some(change), Ok(())) => {
                slot.written = change;
                slot.tries = 0;
            }
            (Some(_), Err(error)) => {
                slot.tries += 1;
                self.unwritten = true;
                if slot.tries >= TRIES && !self.broken {
                    log::error!("a table of an image cannot be written: {error}");
                    self.broken = true;
                }
            }
            (None, Ok(())) => slot.content = Content::Valid,
            (None, Err(error)) => {
                slot.content = Content::Failed(error);
                self.failures = true;
            }
        }
    }
}

/// A page, as the length of a [`Buffer`].
const PAGE_LEN: u16 = 4096;
const _: () = assert!(PAGE_LEN as usize == PAGE_SIZE);

const fn inside(at: u64) -> usize {
    (at % PAGE_BYTES) as usize
}

const fn bucket(key: Key) -> usize {
    let mixed = key.number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
    (mixed as usize ^ key.file as usize) % BUCKETS
}
