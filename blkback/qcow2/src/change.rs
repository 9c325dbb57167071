//! Changes of mappings: one cluster gets a place, or loses it; one L2 table gets a place.
//!
//! The order on the medium is what makes a change safe at any instant, and each step waits until
//! the one before it is there (`Flush` only where the disk has a volatile cache):
//!
//! | step      | what it does                                                                    |
//! |-----------|---------------------------------------------------------------------------------|
//! | Exclusive | waits until no request is in flight on the cluster; later ones wait for us      |
//! | Look      | finds out what the entry says now, and what to do                               |
//! | Keep      | a record for the cluster that will lose its reference                           |
//! | Reserve   | a free cluster: a record for it, then its refcount becomes 1                    |
//! | Fill      | the guest's data, and what the cluster held elsewhere; meanwhile the refcount is written |
//! | Settle    | the refcount is there                                                           |
//! | Flush     | all of this is durable                                                          |
//! | Link      | the entry refers to the new cluster, or to none                                 |
//! | FlushLink | so that it never refers to a cluster that is free                               |
//! | Release   | the old cluster's refcount goes down                                            |
//! | End       | the records end, the guest's request goes on                                    |
//!
//! Whatever fails before Link is undone: the refcount becomes 0 again.

use crate::api::{File, Lower};
use crate::cache::Ticket;
use crate::engine::{Engine, PAGE, Source, TABLE_CHANGES, compressed, damaged};
use crate::format::{COPIED, Entry, ZERO};
use crate::journal::{Link, Place, Record};
use crate::ops::{Ask, FlushTicket, Owner, Stop};
use alloc::vec::Vec;
use domain_api::DmaPage;
use domain_api::disk::{DiskError, Operation};

/// Most pages of a copy.
const COPY_PAGES: usize = 8;

/// What is changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Target {
    /// A cluster of the virtual disk.
    Cluster(u64),
    /// An entry of the L1 table.
    Table(u64),
}

/// How.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Job {
    /// The guest writes to these bytes of the cluster.
    Write { from: u64, to: u64 },
    /// It shall hold nothing, or zeros.
    Unlink,
    /// A table of its own: empty, or a copy.
    Table,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Exclusive,
    Look,
    Keep,
    Reserve,
    Fill,
    Settle,
    Flush(FlushTicket),
    Link,
    Linking(Ticket),
    FlushLink(FlushTicket),
    Release,
    Releasing(Ticket),
    Undo,
    Undoing(Ticket),
    End,
}

/// The cluster that loses its reference.
#[derive(Clone, Copy, Debug)]
struct Old {
    cluster: u64,
    /// Its refcount without the reference.
    count: u16,
    place: Option<Place>,
}

/// The cluster that is written.
#[derive(Clone, Copy, Debug)]
struct New {
    offset: u64,
    /// Its record, if it was taken for this.
    place: Option<Place>,
    ticket: Option<Ticket>,
}

/// What the cluster holds where the guest does not write.
#[derive(Clone, Copy, Debug)]
enum Rest {
    /// It stays.
    Same,
    Zero,
    /// What is behind the image.
    Backing,
    /// A cluster of the image, at this byte.
    Image(u64),
}

/// A part of a cluster on its way through pages of ours.
#[derive(Debug)]
struct Copy {
    pages: Vec<DmaPage>,
    /// Where in the cluster, and how many bytes.
    at: u64,
    len: u64,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Reading,
    Read,
    Writing,
}

/// A change under way.
#[derive(Debug)]
pub(crate) struct Change {
    target: Target,
    job: Job,
    /// For which request, by its slot.
    guest: Option<usize>,
    step: Step,
    old: Option<Old>,
    new: Option<New>,
    rest: Rest,
    /// What the entry becomes; `None`: it stays.
    link: Option<u64>,
    cursor: u64,
    copy: Option<Copy>,
    outstanding: u32,
    error: Option<DiskError>,
}

impl Change {
    pub(crate) fn new(target: Target, job: Job, guest: Option<usize>) -> Self {
        Self {
            target,
            job,
            guest,
            step: Step::Exclusive,
            old: None,
            new: None,
            rest: Rest::Same,
            link: None,
            cursor: 0,
            copy: None,
            outstanding: 0,
            error: None,
        }
    }

    pub(crate) fn target(&self) -> Target {
        self.target
    }

    fn record_link(&self) -> Link {
        match self.target {
            Target::Cluster(cluster) => Link::Cluster(cluster),
            Target::Table(index) => Link::Table(index),
        }
    }
}

impl Engine {
    /// Begins a change.
    pub(crate) fn add_change(&mut self, change: Change) {
        // The change that is being driven is not in its slot, which is its own all the same.
        let driven = self.driven;
        let mut slots = self.changes.iter().enumerate();
        let free = slots.find(|(slot, change)| change.is_none() && driven != Some(*slot));
        let slot = match free {
            Some((slot, _)) => slot,
            None => {
                self.changes.push(None);
                self.changes.len() - 1
            }
        };
        self.active_changes += usize::from(matches!(change.target, Target::Cluster(_)));
        self.changes[slot] = Some(change);
        self.wake = true;
    }

    /// Has an L1 entry get a table of its own, if that is not under way.
    fn want_table(&mut self, index: u64) -> Stop {
        let tables = self.changes.iter().flatten().filter_map(|change| match change.target {
            Target::Table(index) => Some(index),
            Target::Cluster(_) => None,
        });
        let (mut count, mut is_there) = (0, false);
        for table in tables {
            count += 1;
            is_there |= table == index;
        }
        if !is_there && count < TABLE_CHANGES {
            self.add_change(Change::new(Target::Table(index), Job::Table, None));
        }
        Stop::Wait
    }

    pub(crate) fn change_completed(&mut self, slot: usize, result: Result<(), DiskError>) {
        if let Some(Some(change)) = self.changes.get_mut(slot) {
            change.outstanding -= 1;
            change.error = change.error.or(result.err());
        }
    }

    pub(crate) fn copy_completed(&mut self, slot: usize, result: Result<(), DiskError>) {
        let Some(Some(change)) = self.changes.get_mut(slot) else { return };
        change.outstanding -= 1;
        change.error = change.error.or(result.err());
        match &mut change.copy {
            Some(copy) if copy.phase == Phase::Reading && result.is_ok() => {
                copy.phase = Phase::Read
            }
            _ => {
                let pages = change.copy.take().map(|copy| copy.pages).unwrap_or_default();
                self.pool.extend(pages);
            }
        }
    }

    /// Goes on with a change.
    pub(crate) fn drive_change(&mut self, lower: &mut impl Lower, slot: usize) {
        let Some(mut change) = self.changes[slot].take() else { return };
        self.driven = Some(slot);
        loop {
            if let Step::End = change.step {
                self.driven = None;
                self.end_change(change);
                return;
            }
            match self.change_step(lower, slot, &mut change) {
                Ok(step) => change.step = step,
                Err(Stop::Wait) => break,
                Err(Stop::Error(error)) => {
                    change.error = Some(change.error.unwrap_or(error));
                    change.step = match change.step {
                        Step::Linking(_)
                        | Step::FlushLink(_)
                        | Step::Release
                        | Step::Releasing(_)
                        | Step::Undo
                        | Step::Undoing(_)
                        | Step::End => Step::End,
                        _ => Step::Undo,
                    };
                }
            }
        }
        self.driven = None;
        self.changes[slot] = Some(change);
    }

    fn end_change(&mut self, change: Change) {
        self.wake = true;
        self.active_changes -= usize::from(matches!(change.target, Target::Cluster(_)));
        if let (Target::Table(index), Some(error)) = (change.target, change.error) {
            self.fail_for_table(index, error);
        }
        if let Some(guest) = change.guest {
            self.guest_changed(guest, change.error);
        }
    }

    /// Lets all changes fail that wait for a table that could not be had.
    fn fail_for_table(&mut self, index: u64, error: DiskError) {
        let per_table = 1_u64 << (self.image.bits - 3);
        for change in self.changes.iter_mut().flatten() {
            let waits = matches!(change.step, Step::Exclusive | Step::Look);
            match change.target {
                Target::Cluster(cluster) if waits && cluster / per_table == index => {
                    change.error = Some(error);
                    change.step = Step::End;
                }
                _ => {}
            }
        }
    }

    fn change_step(
        &mut self,
        lower: &mut impl Lower,
        slot: usize,
        change: &mut Change,
    ) -> Result<Step, Stop> {
        match change.step {
            Step::Exclusive => self.exclusive(change),
            Step::Look => match change.target {
                Target::Cluster(cluster) => self.look_at_cluster(lower, change, cluster),
                Target::Table(index) => self.look_at_table(change, index),
            },
            Step::Keep => self.keep(lower, change),
            Step::Reserve => self.reserve(lower, change),
            Step::Fill => self.fill(lower, slot, change),
            Step::Settle => self.settle(change),
            Step::Flush(ticket) => self.flushes.check(ticket).map(|()| Step::Link),
            Step::Link => self.link(lower, change),
            Step::Linking(ticket) => self.linked(change, ticket),
            Step::FlushLink(ticket) => self.flushes.check(ticket).map(|()| Step::Release),
            Step::Release => match change.old {
                Some(old) => self.set_count(lower, old.cluster, old.count).map(Step::Releasing),
                None => Ok(Step::End),
            },
            Step::Releasing(ticket) => {
                self.cache.check(ticket)?;
                self.end_records(change);
                Ok(Step::End)
            }
            Step::Undo => self.undo(lower, change),
            Step::Undoing(ticket) => {
                self.cache.check(ticket)?;
                self.end_records(change);
                Ok(Step::End)
            }
            Step::End => Ok(Step::End),
        }
    }

    fn end_records(&mut self, change: &mut Change) {
        self.end_record(change.old.as_mut().and_then(|old| old.place.take()));
        self.end_record(change.new.as_mut().and_then(|new| new.place.take()));
    }

    fn exclusive(&self, change: &Change) -> Result<Step, Stop> {
        let Target::Cluster(cluster) = change.target else { return Ok(Step::Look) };
        let others = self.guests.iter().enumerate().filter(|(slot, _)| change.guest != Some(*slot));
        match others.map(|(_, guest)| guest).any(|guest| guest.touches(cluster)) {
            true => Err(Stop::Wait),
            false => Ok(Step::Look),
        }
    }

    /// Decides what becomes of a cluster.
    fn look_at_cluster(
        &mut self,
        lower: &mut impl Lower,
        change: &mut Change,
        cluster: u64,
    ) -> Result<Step, Stop> {
        let bits = self.image.bits;
        let is_backed = cluster << bits < self.backing.size();
        let place = self.image.l2_place(cluster)?;
        if place.is_none() && !is_backed && self.writes_zeros(change) {
            return Ok(Step::End);
        }
        if !place.is_some_and(|place| place.copied) {
            return Err(self.want_table(cluster >> (bits - 3)));
        }
        let entry = self.entry(lower, File::Image, cluster)?;
        if self.cache.is_broken() {
            return Err(DiskError::Medium.into());
        }
        match (entry, change.job) {
            (Entry::Compressed, _) => Err(compressed()),
            (Entry::Bad, _) => Err(damaged("an entry of an L2 table").into()),
            (_, Job::Write { from, to }) => self.look_to_write(change, entry, is_backed, from, to),
            _ => {
                let already = match is_backed {
                    true => entry == (Entry::Zero { kept: None }),
                    false => entry == Entry::Unallocated,
                };
                change.link = Some(if is_backed { ZERO } else { 0 });
                change.old = entry.cluster().map(|(offset, _)| old(offset >> bits));
                Ok(if already { Step::End } else { Step::Keep })
            }
        }
    }

    /// Whether nothing has to be done where zeros are.
    fn writes_zeros(&self, change: &Change) -> bool {
        change.job == Job::Unlink || change.guest.is_some_and(|guest| self.guests[guest].is_zeros())
    }

    fn look_to_write(
        &mut self,
        change: &mut Change,
        entry: Entry,
        is_backed: bool,
        from: u64,
        to: u64,
    ) -> Result<Step, Stop> {
        let mut kept = None;
        (change.rest, kept) = match entry {
            Entry::Data { offset, copied: true } => (Rest::Same, Some(offset)),
            Entry::Data { offset, copied: false } => {
                change.old = Some(old(offset >> self.image.bits));
                (Rest::Image(offset), kept)
            }
            Entry::Zero { kept: Some((offset, true)) } => (Rest::Zero, Some(offset)),
            Entry::Zero { kept: cluster } => {
                change.old = cluster.map(|(offset, _)| old(offset >> self.image.bits));
                (Rest::Zero, kept)
            }
            _ if is_backed => (Rest::Backing, kept),
            _ => (Rest::Zero, kept),
        };
        if matches!(change.rest, Rest::Zero) && self.writes_zeros(change) {
            change.old = None;
            return Ok(Step::End);
        }
        change.cursor = if matches!(change.rest, Rest::Same) { from } else { 0 };
        debug_assert!(from < to && to <= self.image.cluster());
        let Some(offset) = kept else { return Ok(Step::Keep) };
        self.check_place(offset)?;
        change.new = Some(New { offset, place: None, ticket: None });
        if matches!(change.rest, Rest::Zero) {
            change.link = Some(offset | COPIED);
        }
        Ok(Step::Fill)
    }

    fn look_at_table(&mut self, change: &mut Change, index: u64) -> Result<Step, Stop> {
        let place = self.image.l2_place(index << (self.image.bits - 3))?;
        match place {
            Some(place) if place.copied => return Ok(Step::End),
            Some(place) => {
                change.rest = Rest::Image(place.at);
                change.old = Some(old(place.at >> self.image.bits));
            }
            None => change.rest = Rest::Zero,
        }
        Ok(Step::Keep)
    }

    /// Notes what becomes of the cluster that will lose its reference.
    fn keep(&mut self, lower: &mut impl Lower, change: &mut Change) -> Result<Step, Stop> {
        let next = if change.job == Job::Unlink { Step::Link } else { Step::Reserve };
        let Some(cluster) = change.old.as_ref().map(|old| old.cluster) else { return Ok(next) };
        let linked = self.count(lower, cluster)?;
        let count = linked.checked_sub(1).ok_or_else(|| damaged("a cluster in use is free"))?;
        let is_table = matches!(change.target, Target::Table(_));
        if count == 0 && !is_table && self.space.tables.contains(&cluster) {
            return Err(damaged("an entry of an L2 table refers to a table").into());
        }
        let link = change.record_link();
        let journal = self.journal.as_mut().ok_or(DiskError::ReadOnly)?;
        if journal.names(cluster) {
            return Err(Stop::Wait);
        }
        let record = Record { link, cluster, clusters: 1, linked, unlinked: count };
        let place = journal.begin(record).ok_or(Stop::Wait)?;
        change.old = Some(Old { cluster, count, place: Some(place) });
        Ok(next)
    }

    fn reserve(&mut self, lower: &mut impl Lower, change: &mut Change) -> Result<Step, Stop> {
        let taken = self.take_cluster(lower, change.record_link())?;
        let offset = taken.cluster << self.image.bits;
        change.link = Some(offset | COPIED);
        change.new = Some(New { offset, place: Some(taken.place), ticket: Some(taken.ticket) });
        Ok(Step::Fill)
    }

    /// Writes the cluster.
    fn fill(
        &mut self,
        lower: &mut impl Lower,
        slot: usize,
        change: &mut Change,
    ) -> Result<Step, Stop> {
        let cluster = self.image.cluster();
        let Some(new) = change.new else { return Ok(Step::Settle) };
        let (from, to) = match change.job {
            Job::Write { from, to } => (from, to),
            _ => (cluster, cluster),
        };
        let end = if matches!(change.rest, Rest::Same) { to } else { cluster };
        while change.error.is_none() && change.cursor < end {
            let cursor = change.cursor;
            if (from..to).contains(&cursor) {
                self.fill_data(lower, slot, change, new.offset, to)?;
            } else {
                let stretch = if cursor < from { from } else { end };
                self.fill_rest(lower, slot, change, new.offset, stretch)?;
            }
        }
        self.write_copy(lower, slot, change, new.offset)?;
        match (change.outstanding, change.error) {
            (0, Some(error)) => Err(error.into()),
            (0, None) if change.cursor >= end => Ok(Step::Settle),
            _ => Err(Stop::Wait),
        }
    }

    /// The guest's data.
    fn fill_data(
        &mut self,
        lower: &mut impl Lower,
        slot: usize,
        change: &mut Change,
        offset: u64,
        to: u64,
    ) -> Result<(), Stop> {
        let (Some(guest), Job::Write { from, .. }) = (change.guest, change.job) else {
            return Err(Stop::Wait);
        };
        let (at, len) = (offset + change.cursor, to - change.cursor);
        let len = if self.guests[guest].is_zeros() {
            self.zero_once(lower, Owner::Change(slot), at, len)?
        } else {
            let Target::Cluster(cluster) = change.target else { return Err(Stop::Wait) };
            let skip = self.guests[guest].skip_to((cluster << self.image.bits) + from);
            let buffers = self.guests[guest].buffers(skip, len);
            let file = File::Image;
            let ask = Ask { file, operation: Operation::Write, at, len, buffers: &buffers };
            self.ops.submit(lower, Owner::Change(slot), &ask)?;
            len
        };
        change.cursor += len;
        change.outstanding += 1;
        Ok(())
    }

    /// What the guest does not write, up to `end`.
    fn fill_rest(
        &mut self,
        lower: &mut impl Lower,
        slot: usize,
        change: &mut Change,
        offset: u64,
        end: u64,
    ) -> Result<(), Stop> {
        let cursor = change.cursor;
        let (source, len) = match (change.rest, change.target) {
            (Rest::Image(from), _) => (Source::At(File::Image, from + cursor), u64::MAX),
            (Rest::Backing, Target::Cluster(cluster)) => {
                self.backing_source(lower, (cluster << self.image.bits) + cursor)?
            }
            _ => (Source::Zero, u64::MAX),
        };
        let len = len.min(end - cursor);
        match source {
            Source::Zero => {
                let len = self.zero_once(lower, Owner::Change(slot), offset + cursor, len)?;
                change.cursor += len;
                change.outstanding += 1;
            }
            Source::At(file, from) => {
                self.write_copy(lower, slot, change, offset)?;
                if change.copy.is_some() {
                    return Err(Stop::Wait);
                }
                change.copy = Some(self.begin_copy(lower, slot, file, from, cursor, len)?);
                let copied = change.copy.as_ref().map_or(0, |copy| copy.len);
                change.cursor += copied;
                change.outstanding += 1;
            }
        }
        Ok(())
    }

    /// Reads a part of a cluster into pages.
    fn begin_copy(
        &mut self,
        lower: &mut impl Lower,
        slot: usize,
        file: File,
        from: u64,
        at: u64,
        len: u64,
    ) -> Result<Copy, Stop> {
        let count = self.pool.len().min(COPY_PAGES);
        let count = count.min(usize::try_from(len.div_ceil(PAGE)).unwrap_or(count));
        if count == 0 {
            return Err(Stop::Wait);
        }
        let pages = self.pool.split_off(self.pool.len() - count);
        let handles: Vec<&DmaPage> = pages.iter().collect();
        let (buffers, len) = self.buffers(&handles, len);
        let ask = Ask { file, operation: Operation::Read, at: from, len, buffers: &buffers };
        let submitted = self.ops.submit(lower, Owner::Copy(slot), &ask);
        drop(buffers);
        match submitted {
            Ok(()) => Ok(Copy { pages, at, len, phase: Phase::Reading }),
            Err(stop) => {
                self.pool.extend(pages);
                Err(stop)
            }
        }
    }

    /// Writes the pages that were read.
    fn write_copy(
        &mut self,
        lower: &mut impl Lower,
        slot: usize,
        change: &mut Change,
        offset: u64,
    ) -> Result<(), Stop> {
        let Some(copy) = &mut change.copy else { return Ok(()) };
        if copy.phase != Phase::Read {
            return Ok(());
        }
        let handles: Vec<&DmaPage> = copy.pages.iter().collect();
        let (buffers, len) = self.buffers(&handles, copy.len);
        let ask = Ask {
            file: File::Image,
            operation: Operation::Write,
            at: offset + copy.at,
            len,
            buffers: &buffers,
        };
        self.ops.submit(lower, Owner::Copy(slot), &ask)?;
        drop(buffers);
        copy.phase = Phase::Writing;
        change.outstanding += 1;
        Ok(())
    }

    /// Everything that the entry will rely on is written; it has to be durable.
    fn settle(&mut self, change: &mut Change) -> Result<Step, Stop> {
        if let Some(ticket) = change.new.as_ref().and_then(|new| new.ticket) {
            self.cache.check(ticket)?;
        }
        match (change.link, change.new, change.target) {
            (None, ..) => return Ok(Step::End),
            (_, Some(new), Target::Table(_)) => self.cache.forget(new.offset, self.image.cluster()),
            _ => {}
        }
        Ok(Step::Flush(self.want_flush()))
    }

    /// Changes the entry.
    fn link(&mut self, lower: &mut impl Lower, change: &mut Change) -> Result<Step, Stop> {
        let word = change.link.unwrap_or(0);
        let at = match change.target {
            Target::Table(index) => self.image.l1_offset + 8 * index,
            Target::Cluster(cluster) => self.image.l2_place(cluster)?.ok_or(DiskError::Medium)?.at,
        };
        self.cache.set_word(lower, &mut self.ops, at, word).map(Step::Linking)
    }

    /// The entry is on the medium.
    fn linked(&mut self, change: &mut Change, ticket: Ticket) -> Result<Step, Stop> {
        self.cache.check(ticket)?;
        if let Some(new) = &mut change.new {
            let place = new.place.take();
            self.end_record(place);
        }
        if let (Target::Table(index), Some(word)) = (change.target, change.link) {
            let index = usize::try_from(index).unwrap_or(usize::MAX);
            if let Some(entry) = self.image.l1.get_mut(index) {
                *entry = word;
            }
            self.space.tables.insert((word & !COPIED) >> self.image.bits);
            if let Some(old) = change.old {
                self.space.tables.remove(&old.cluster);
            }
            self.wake = true;
        }
        Ok(match change.old {
            Some(_) => Step::FlushLink(self.want_flush()),
            None => Step::End,
        })
    }

    /// Gives back what was taken for a change that failed.
    fn undo(&mut self, lower: &mut impl Lower, change: &mut Change) -> Result<Step, Stop> {
        if change.outstanding > 0 {
            return Err(Stop::Wait);
        }
        if let Some(copy) = change.copy.take() {
            self.pool.extend(copy.pages);
        }
        match change.new {
            Some(New { offset, place: Some(_), .. }) => {
                self.set_count(lower, offset >> self.image.bits, 0).map(Step::Undoing)
            }
            _ => {
                self.end_records(change);
                Ok(Step::End)
            }
        }
    }
}

/// A cluster that will lose its reference, before anything is known of it.
fn old(cluster: u64) -> Old {
    Old { cluster, count: 0, place: None }
}
