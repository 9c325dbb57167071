//! Which clusters are free: refcounts, and how they grow.
//!
//! A refcount block that does not exist yet is put into the first cluster that it describes, so
//! that it needs no other block, and no journal: until the refcount table names it, nothing on
//! the medium has changed. When the refcount table is too short, a new one is put behind such a
//! block, and the header is changed last.

use crate::api::Lower;
use crate::cache::Ticket;
use crate::engine::{Engine, damaged};
use crate::format;
use crate::journal::{Link, Place, Record};
use crate::ops::{FlushTicket, Owner, Stop};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use domain_api::disk::DiskError;

/// What is known of the clusters.
#[derive(Debug, Default)]
pub(crate) struct Space {
    /// Where each refcount block is; 0: it does not exist.
    pub(crate) reftable: Vec<u64>,
    /// Place of the refcount table.
    pub(crate) reftable_offset: u64,
    /// Whole clusters of the volume.
    pub(crate) clusters: u64,
    /// No cluster below this one is free.
    pub(crate) hint: u64,
    /// Clusters of header, tables and refcount blocks, where no data may be written.
    pub(crate) tables: BTreeSet<u64>,
    /// Why the refcounts could not grow in this round.
    pub(crate) stuck: Option<DiskError>,
}

/// A cluster that was taken: its number, its record, and its refcount's way to the medium.
pub(crate) struct Taken {
    pub(crate) cluster: u64,
    pub(crate) place: Place,
    pub(crate) ticket: Ticket,
}

/// The refcounts are growing.
#[derive(Debug)]
pub(crate) struct Growth {
    step: Step,
    /// The new block's number.
    block: u64,
    /// First byte of what is new.
    start: u64,
    /// Clusters of a new refcount table behind the block; 0: the old one is long enough.
    table_clusters: u64,
    cursor: u64,
    outstanding: u32,
    error: Option<DiskError>,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Zeros are written over all that is new.
    Clear,
    /// The block gets the refcounts of its own and the table's clusters.
    Count(u64),
    /// The table gets what the old one has, and the block.
    Fill(usize),
    /// All of that is written.
    Written(u64),
    Flush(FlushTicket),
    Link,
    Linking(Ticket, Option<Place>),
    FlushLink(FlushTicket, Place, u64),
    /// The old table's clusters are freed, from this one on.
    Free(Place, u64, u64, Option<Ticket>),
    End,
}

impl Engine {
    fn cluster_bytes(&self) -> u64 {
        1 << self.image.bits
    }

    fn block_entries(&self) -> u64 {
        1 << (self.image.bits - 1)
    }

    /// Where the refcount of a cluster is, if its block exists.
    fn count_at(&self, cluster: u64) -> Option<u64> {
        let block = usize::try_from(cluster / self.block_entries()).ok()?;
        let offset = self.space.reftable.get(block).copied().filter(|&offset| offset != 0)?;
        Some(offset + 2 * (cluster % self.block_entries()))
    }

    /// The refcount of a cluster.
    pub(crate) fn count(&mut self, lower: &mut impl Lower, cluster: u64) -> Result<u16, Stop> {
        match self.count_at(cluster) {
            Some(at) => self.cache.short(lower, &mut self.ops, at),
            None => Ok(0),
        }
    }

    /// Stores the refcount of a cluster that had another one.
    pub(crate) fn set_count(
        &mut self,
        lower: &mut impl Lower,
        cluster: u64,
        count: u16,
    ) -> Result<Ticket, Stop> {
        let at = self.count_at(cluster).ok_or_else(|| damaged("a cluster has no refcount"))?;
        let ticket = self.cache.set_short(lower, &mut self.ops, at, count)?;
        if count == 0 {
            self.lower_hint(cluster);
        }
        Ok(ticket)
    }

    /// A cluster is free.
    pub(crate) fn lower_hint(&mut self, cluster: u64) {
        if cluster < self.space.hint {
            self.set_hint(cluster);
        }
    }

    fn set_hint(&mut self, hint: u64) {
        self.space.hint = hint;
        if let Some(journal) = &self.journal {
            journal.set_hint(hint);
        }
    }

    /// Takes a free cluster for the given entry.
    pub(crate) fn take_cluster(
        &mut self,
        lower: &mut impl Lower,
        link: Link,
    ) -> Result<Taken, Stop> {
        let cluster = self.find_free(lower)?;
        let at = self.count_at(cluster).ok_or(Stop::Wait)?;
        self.cache.changeable(lower, &mut self.ops, at)?;
        let journal = self.journal.as_mut().ok_or(DiskError::ReadOnly)?;
        if journal.names(cluster) {
            return Err(Stop::Wait);
        }
        let record = Record { link, cluster, clusters: 1, linked: 1, unlinked: 0 };
        let place = journal.begin(record).ok_or(Stop::Wait)?;
        match self.set_count(lower, cluster, 1) {
            Ok(ticket) => {
                self.set_hint(cluster + 1);
                Ok(Taken { cluster, place, ticket })
            }
            Err(stop) => {
                self.end_record(Some(place));
                Err(stop)
            }
        }
    }

    pub(crate) fn end_record(&mut self, place: Option<Place>) {
        if let (Some(journal), Some(place)) = (&mut self.journal, place) {
            journal.end(place);
        }
    }

    /// The first free cluster, which stays the hint.
    fn find_free(&mut self, lower: &mut impl Lower) -> Result<u64, Stop> {
        while self.space.hint < self.space.clusters {
            let cluster = self.space.hint;
            let Some(at) = self.count_at(cluster) else {
                return Err(self.grow(cluster / self.block_entries()));
            };
            let in_block = self.block_entries() - cluster % self.block_entries();
            let in_page = (4096 - at % 4096) / 2;
            let count = in_block.min(in_page).min(self.space.clusters - cluster);
            match self.cache.zero_short(lower, &mut self.ops, at, count)? {
                Some(index) => {
                    let found = cluster + index;
                    self.set_hint(found);
                    if self.space.tables.contains(&found) {
                        return Err(damaged("a table has the refcount 0").into());
                    }
                    return Ok(found);
                }
                None => self.set_hint(cluster + count),
            }
        }
        Err(DiskError::NoSpace.into())
    }

    /// Begins to add a refcount block, unless that is under way.
    fn grow(&mut self, block: u64) -> Stop {
        if let Some(error) = self.space.stuck {
            return error.into();
        }
        if self.growth.is_some() {
            return Stop::Wait;
        }
        let is_short = block >= self.space.reftable.len() as u64;
        let block = block.min(self.space.reftable.len() as u64);
        let start_cluster = block * self.block_entries();
        let table_clusters = match is_short {
            true => {
                let blocks = self.space.clusters.div_ceil(self.block_entries());
                (blocks * 8).div_ceil(self.cluster_bytes())
            }
            false => 0,
        };
        if table_clusters * (self.cluster_bytes() / 8) > format::MOST_TABLE_ENTRIES
            || start_cluster + 1 + table_clusters > self.space.clusters
        {
            return DiskError::NoSpace.into();
        }
        if self.space.tables.range(start_cluster..=start_cluster + table_clusters).next().is_some()
        {
            return damaged("a table has no refcount").into();
        }
        let start = start_cluster * self.cluster_bytes();
        self.growth = Some(Growth {
            step: Step::Clear,
            block,
            start,
            table_clusters,
            cursor: start,
            outstanding: 0,
            error: None,
        });
        self.wake = true;
        Stop::Wait
    }

    pub(crate) fn growth_completed(&mut self, result: Result<(), DiskError>) {
        if let Some(growth) = &mut self.growth {
            growth.outstanding -= 1;
            growth.error = growth.error.or(result.err());
        }
    }

    /// Goes on with the growth of the refcounts.
    pub(crate) fn drive_growth(&mut self, lower: &mut impl Lower) {
        let Some(mut growth) = self.growth.take() else { return };
        loop {
            match self.growth_step(lower, &mut growth) {
                Ok(Step::End) => {
                    self.wake = true;
                    return;
                }
                Ok(step) => growth.step = step,
                Err(Stop::Wait) => break,
                // Nothing refers to what is new, or the old table is merely not freed yet, which
                // its record says.
                Err(Stop::Error(error)) => {
                    self.space.stuck = Some(error);
                    self.wake = true;
                    return;
                }
            }
        }
        self.growth = Some(growth);
    }

    fn growth_step(&mut self, lower: &mut impl Lower, growth: &mut Growth) -> Result<Step, Stop> {
        let cluster = self.cluster_bytes();
        let len = (1 + growth.table_clusters) * cluster;
        match growth.step {
            Step::Clear => {
                if growth.error.is_none() {
                    let Growth { cursor, outstanding, start, .. } = growth;
                    self.zero_fill(lower, Owner::Growth, cursor, *start + len, outstanding)?;
                }
                match (growth.outstanding, growth.error) {
                    (0, Some(error)) => Err(error.into()),
                    (0, None) => {
                        self.cache.forget(growth.start, len);
                        Ok(Step::Count(0))
                    }
                    _ => Err(Stop::Wait),
                }
            }
            Step::Count(index) if index > growth.table_clusters => Ok(Step::Fill(0)),
            Step::Count(index) => {
                let at = growth.start + 2 * index;
                let _ = self.cache.set_short(lower, &mut self.ops, at, 1)?;
                Ok(Step::Count(index + 1))
            }
            Step::Fill(index) => self.fill_table(lower, growth, index),
            Step::Written(mark) => {
                self.cache.check_mark(mark)?;
                Ok(Step::Flush(self.want_flush()))
            }
            Step::Flush(ticket) => self.flushes.check(ticket).map(|()| Step::Link),
            Step::Link => self.link_growth(lower, growth),
            Step::Linking(ticket, place) => {
                self.cache.check(ticket)?;
                Ok(self.growth_is_linked(growth, place))
            }
            Step::FlushLink(ticket, place, old) => {
                self.flushes.check(ticket)?;
                let clusters = self.old_table_clusters(growth);
                Ok(Step::Free(place, old, old + clusters, None))
            }
            Step::Free(place, from, to, _) if from < to => {
                let ticket = self.set_count(lower, from, 0)?;
                Ok(Step::Free(place, from + 1, to, Some(ticket)))
            }
            Step::Free(place, _, _, last) => {
                if let Some(ticket) = last {
                    self.cache.check(ticket)?;
                }
                self.end_record(Some(place));
                Ok(Step::End)
            }
            Step::End => Ok(Step::End),
        }
    }

    fn old_table_clusters(&self, growth: &Growth) -> u64 {
        // A table was too short only by the blocks from the new one on.
        (growth.block * 8).div_ceil(self.cluster_bytes())
    }

    /// Copies the old refcount table into the new one, where there is a new one, and adds the
    /// block.
    fn fill_table(
        &mut self,
        lower: &mut impl Lower,
        growth: &Growth,
        index: usize,
    ) -> Result<Step, Stop> {
        let entry = match self.space.reftable.get(index) {
            _ if growth.table_clusters == 0 => None,
            Some(&offset) => Some(offset),
            None => (index as u64 == growth.block).then_some(growth.start),
        };
        let Some(entry) = entry else { return Ok(Step::Written(self.cache.mark())) };
        let at = growth.start + self.cluster_bytes() + 8 * index as u64;
        let _ = self.cache.set_word(lower, &mut self.ops, at, entry)?;
        Ok(Step::Fill(index + 1))
    }

    fn link_growth(&mut self, lower: &mut impl Lower, growth: &mut Growth) -> Result<Step, Stop> {
        if growth.table_clusters == 0 {
            let at = self.space.reftable_offset + 8 * growth.block;
            let ticket = self.cache.set_word(lower, &mut self.ops, at, growth.start)?;
            return Ok(Step::Linking(ticket, None));
        }
        self.cache.changeable(lower, &mut self.ops, 0)?;
        let clusters = self.old_table_clusters(growth);
        let record = Record {
            link: Link::Reftable,
            cluster: self.space.reftable_offset / self.cluster_bytes(),
            clusters: u32::try_from(clusters).map_err(|_| Stop::Wait)?,
            linked: 1,
            unlinked: 0,
        };
        let journal = self.journal.as_mut().ok_or(DiskError::ReadOnly)?;
        let place = journal.begin(record).ok_or(Stop::Wait)?;
        let mut fields = [0; 12];
        let table_clusters = u32::try_from(growth.table_clusters).map_err(|_| Stop::Wait)?;
        fields[..8].copy_from_slice(&(growth.start + self.cluster_bytes()).to_be_bytes());
        fields[8..].copy_from_slice(&table_clusters.to_be_bytes());
        let ticket = self.cache.set_bytes(lower, &mut self.ops, 48, &fields)?;
        Ok(Step::Linking(ticket, Some(place)))
    }

    fn growth_is_linked(&mut self, growth: &Growth, place: Option<Place>) -> Step {
        let first = growth.start / self.cluster_bytes();
        self.space.tables.extend(first..=first + growth.table_clusters);
        let Some(place) = place else {
            if let Some(entry) =
                usize::try_from(growth.block).ok().and_then(|it| self.space.reftable.get_mut(it))
            {
                *entry = growth.start;
            }
            return Step::End;
        };
        let old = self.space.reftable_offset / self.cluster_bytes();
        for cluster in old..old + self.old_table_clusters(growth) {
            self.space.tables.remove(&cluster);
        }
        let entries = growth.table_clusters * (self.cluster_bytes() / 8);
        self.space.reftable.push(growth.start);
        self.space.reftable.resize(usize::try_from(entries).unwrap_or(usize::MAX), 0);
        self.space.reftable_offset = growth.start + self.cluster_bytes();
        Step::FlushLink(self.want_flush(), place, old)
    }
}
