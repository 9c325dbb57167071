//! An open image: what all of its requests share.
//!
//! Everything is tried from its beginning again until nothing it needs is missing: a lookup that
//! misses a page of a table starts to load it and says [`Stop::Wait`], and whoever asked is asked
//! again when something has ended. So there are no callbacks, and what waits holds nothing that
//! others could need, but what its step says.

use crate::api::{File, Lower};
use crate::cache::Cache;
use crate::change::Change;
use crate::format::{self, Entry};
use crate::guest::Guest;
use crate::journal::Journal;
use crate::ops::{Ask, FlushTicket, Flushes, Ops, Owner, Stop};
use crate::space::{Growth, Space};
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use domain_api::DmaPage;
use domain_api::disk::{Buffer, Completion, DiskError, Geometry, Operation, SECTOR};

/// Changes of clusters at a time, and of tables.
pub(crate) const DATA_CHANGES: usize = 56;
pub(crate) const TABLE_CHANGES: usize = 4;
// Each needs two records of the journal at most, the growth of the refcounts one.
const _: () = assert!(2 * (DATA_CHANGES + TABLE_CHANGES) < crate::journal::MOST_RECORDS);

/// An image and the place where it is.
#[derive(Debug)]
pub(crate) struct Layer {
    /// Cluster bits.
    pub(crate) bits: u32,
    /// Virtual size in bytes.
    pub(crate) size: u64,
    /// Bytes of the volume it is on.
    pub(crate) end: u64,
    /// The L1 table as it is on the medium.
    pub(crate) l1: Vec<u64>,
    /// Its place.
    pub(crate) l1_offset: u64,
}

/// What is behind the image.
#[derive(Debug)]
pub(crate) enum Backing {
    None,
    /// That many bytes of plain data.
    Raw(u64),
    /// An image that has nothing behind it.
    Image(Layer),
}

impl Backing {
    /// Bytes that it has.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Raw(bytes) => *bytes,
            Self::Image(layer) => layer.size,
        }
    }
}

/// Where the content of a part of the virtual disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    Zero,
    /// At this byte.
    At(File, u64),
}

impl Source {
    /// The same, `bytes` later.
    pub(crate) fn skip(self, bytes: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::At(file, at) => Self::At(file, at + bytes),
        }
    }
}

/// Whether a table of an image is there for a cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct L2Place {
    /// Where the cluster's entry is.
    pub(crate) at: u64,
    /// Whether the table has no other user.
    pub(crate) copied: bool,
}

/// An open image.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) ops: Ops,
    pub(crate) cache: Cache,
    pub(crate) flushes: Flushes,
    /// Pages for copies.
    pub(crate) pool: Vec<DmaPage>,
    pub(crate) zeros: DmaPage,
    pub(crate) image: Layer,
    pub(crate) backing: Backing,
    pub(crate) space: Space,
    /// Only while the image may be written.
    pub(crate) journal: Option<Journal>,
    pub(crate) changes: Vec<Option<Change>>,
    pub(crate) active_changes: usize,
    /// The slot of the change that is being driven.
    pub(crate) driven: Option<usize>,
    pub(crate) growth: Option<Growth>,
    pub(crate) guests: Vec<Guest>,
    pub(crate) free_guests: Vec<usize>,
    /// Requests of the guest that are not under way entirely.
    pub(crate) waiting: VecDeque<usize>,
    pub(crate) done: VecDeque<Completion>,
    /// The disk of the image.
    pub(crate) disk: Geometry,
    /// What is offered to the guest.
    pub(crate) offered: Geometry,
    /// Something that others may wait for has happened in this round.
    pub(crate) wake: bool,
}

/// Lines that all images may log about what is wrong with them, in the life of an incarnation: a
/// guest can meet the same damage as often as it likes.
const MOST_LINES: u32 = 32;
static LINES: AtomicU32 = AtomicU32::new(0);

fn complain(what: fmt::Arguments<'_>) {
    if LINES.fetch_add(1, Relaxed) < MOST_LINES {
        log::error!("{what}");
    }
}

/// Says what is wrong with an image.
pub(crate) fn damaged(what: &str) -> DiskError {
    complain(format_args!("an image is damaged: {what}"));
    DiskError::Medium
}

/// Says that an image has compressed clusters.
pub(crate) fn compressed() -> Stop {
    complain(format_args!("an image has compressed clusters, which are not supported"));
    DiskError::Unsupported.into()
}

impl Layer {
    /// Where the L2 entry of a cluster is. `None`: there is no table, and so nothing there.
    pub(crate) fn l2_place(&self, cluster: u64) -> Result<Option<L2Place>, DiskError> {
        let entries = 1_u64 << (self.bits - 3);
        let index = usize::try_from(cluster / entries).unwrap_or(usize::MAX);
        let word = self.l1.get(index).copied().ok_or(DiskError::OutOfRange)?;
        let table = format::l1_entry(word, self.bits, self.end)
            .map_err(|()| damaged("an entry of the L1 table"))?;
        Ok(table.map(|(offset, copied)| L2Place { at: offset + 8 * (cluster % entries), copied }))
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.bits
    }
}

impl Engine {
    /// A ticket for everything that was completed up to now, where the disk has a volatile cache.
    pub(crate) fn want_flush(&mut self) -> FlushTicket {
        if self.disk.volatile_cache { self.flushes.want() } else { FlushTicket::NONE }
    }

    /// The L2 entry of a cluster.
    pub(crate) fn entry(
        &mut self,
        lower: &mut impl Lower,
        file: File,
        cluster: u64,
    ) -> Result<Entry, Stop> {
        let layer = match (file, &self.backing) {
            (File::Image, _) => &self.image,
            (File::Backing, Backing::Image(layer)) => layer,
            (File::Backing, _) => return Ok(Entry::Unallocated),
        };
        let Some(place) = layer.l2_place(cluster)? else { return Ok(Entry::Unallocated) };
        let (bits, end) = (layer.bits, layer.end);
        let word = self.cache.word(lower, &mut self.ops, file, place.at)?;
        Ok(Entry::parse(word, bits, end))
    }

    /// Where the content behind the image is, from a byte on, and for how many.
    pub(crate) fn backing_source(
        &mut self,
        lower: &mut impl Lower,
        at: u64,
    ) -> Result<(Source, u64), Stop> {
        let size = self.backing.size();
        if at >= size {
            return Ok((Source::Zero, u64::MAX));
        }
        let layer = match &self.backing {
            Backing::Image(layer) => layer,
            _ => return Ok((Source::At(File::Backing, at), size - at)),
        };
        let (bits, inside) = (layer.bits, at % layer.cluster());
        let rest = (layer.cluster() - inside).min(size - at);
        match self.entry(lower, File::Backing, at >> bits)? {
            Entry::Unallocated | Entry::Zero { .. } => Ok((Source::Zero, rest)),
            Entry::Data { offset, .. } => Ok((Source::At(File::Backing, offset + inside), rest)),
            Entry::Compressed => Err(compressed()),
            Entry::Bad => Err(damaged("an entry of an L2 table of the backing image").into()),
        }
    }

    /// Where the content of the virtual disk is, from a byte on, and for how many.
    pub(crate) fn source(
        &mut self,
        lower: &mut impl Lower,
        at: u64,
    ) -> Result<(Source, u64), Stop> {
        let (bits, inside) = (self.image.bits, at % self.image.cluster());
        let rest = self.image.cluster() - inside;
        match self.entry(lower, File::Image, at >> bits)? {
            Entry::Zero { .. } => Ok((Source::Zero, rest)),
            Entry::Data { offset, .. } => Ok((Source::At(File::Image, offset + inside), rest)),
            Entry::Unallocated => {
                let (source, len) = self.backing_source(lower, at)?;
                Ok((source, len.min(rest)))
            }
            Entry::Compressed => Err(compressed()),
            Entry::Bad => Err(damaged("an entry of an L2 table").into()),
        }
    }

    /// Whether data may be written to the cluster at this byte.
    pub(crate) fn check_place(&self, offset: u64) -> Result<(), DiskError> {
        match self.space.tables.contains(&(offset >> self.image.bits)) {
            true => Err(damaged("an entry of an L2 table refers to a table")),
            false => Ok(()),
        }
    }

    /// Writes zeros from `cursor` up to `end`, as far as there is room below.
    pub(crate) fn zero_fill(
        &mut self,
        lower: &mut impl Lower,
        owner: Owner,
        cursor: &mut u64,
        end: u64,
        outstanding: &mut u32,
    ) -> Result<(), Stop> {
        while *cursor < end {
            let len = self.zero_once(lower, owner, *cursor, end - *cursor)?;
            *cursor += len;
            *outstanding += 1;
        }
        Ok(())
    }

    /// Writes zeros at a byte of the image's volume, in one request. Returns how many.
    pub(crate) fn zero_once(
        &mut self,
        lower: &mut impl Lower,
        owner: Owner,
        at: u64,
        most: u64,
    ) -> Result<u64, Stop> {
        let file = File::Image;
        let special = u64::from(self.disk.max_write_zeroes_sectors) * SECTOR;
        let special = special - special % u64::from(self.offered.sector_size);
        if special >= most.min(PAGE) {
            let len = most.min(special);
            let ask = Ask { file, operation: Operation::WriteZeroes, at, len, buffers: &[] };
            self.ops.submit(lower, owner, &ask)?;
            return Ok(len);
        }
        let pages = [&self.zeros; MOST_PAGES];
        let (buffers, len) = self.buffers(&pages, most);
        let ask = Ask { file, operation: Operation::Write, at, len, buffers: &buffers };
        self.ops.submit(lower, owner, &ask)?;
        Ok(len)
    }

    /// As many of the pages as make one request of at most `most` bytes, and how many bytes.
    pub(crate) fn buffers<'a>(
        &self,
        pages: &[&'a DmaPage],
        most: u64,
    ) -> (heapless::Vec<Buffer<'a>, MOST_PAGES>, u64) {
        let limit = u64::from(self.offered.max_sectors) * SECTOR;
        let most = most.min(limit - limit % u64::from(self.offered.sector_size));
        let count = usize::from(self.offered.max_buffers.max(1)).min(pages.len());
        let mut buffers = heapless::Vec::new();
        let mut total = 0;
        for page in &pages[..count] {
            let len = PAGE.min(most - total);
            if len == 0 {
                break;
            }
            let short = u16::try_from(len).unwrap_or_default();
            // As many as there are places for.
            let _ = buffers.push(Buffer { page, offset: 0, len: short });
            total += len;
        }
        (buffers, total)
    }

    /// Goes on with everything that can go on.
    pub(crate) fn run(&mut self, lower: &mut impl Lower) {
        loop {
            self.wake = false;
            self.space.stuck = None;
            self.drive_growth(lower);
            for slot in 0..self.changes.len() {
                self.drive_change(lower, slot);
            }
            for _ in 0..self.waiting.len() {
                let Some(slot) = self.waiting.pop_front() else { break };
                if !self.drive_guest(lower, slot) {
                    self.waiting.push_back(slot);
                }
            }
            if !self.wake {
                break;
            }
        }
        self.cache.end_round(lower, &mut self.ops);
        self.flushes.start(lower, &mut self.ops);
    }

    /// Whether anybody waits for anything.
    pub(crate) fn has_work(&self) -> bool {
        self.active_changes > 0
            || !self.waiting.is_empty()
            || self.growth.is_some()
            || self.ops.was_busy
    }

    /// Takes the end of a request below.
    pub(crate) fn completed(&mut self, owner: Owner, result: Result<(), DiskError>) {
        match owner {
            Owner::Page(place) => self.cache.completed(place, result),
            Owner::Flush => self.flushes.completed(result),
            Owner::Guest(slot) => self.guest_completed(slot, result),
            Owner::Change(slot) => self.change_completed(slot, result),
            Owner::Copy(slot) => self.copy_completed(slot, result),
            Owner::Growth => self.growth_completed(result),
        }
    }
}

/// Most pages of a request that is not the guest's.
pub(crate) const MOST_PAGES: usize = 32;
pub(crate) const PAGE: u64 = xen_abi::PAGE_SIZE as u64;
