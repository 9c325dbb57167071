//! Requests of the guest.
//!
//! A request goes over its clusters in order. Clusters that are read, or written where they are,
//! become requests below at once, neighbours together; a cluster whose mapping has to change is
//! handed to a [`Change`](crate::change::Change), and the request goes on with the next one. It is
//! done when all of that is.
//!
//! While requests of a guest are in flight on clusters, their mapping stays: a change waits for
//! them, and what comes later waits for the change. A request that waits holds nothing but what
//! it has in flight, so there are no circles.

use crate::api::{File, Lower};
use crate::change::{Change, Job, Target};
use crate::engine::{DATA_CHANGES, Engine, Source, compressed, damaged};
use crate::format::Entry;
use crate::ops::{Ask, FlushTicket, Owner, Stop};
use alloc::vec::Vec;
use core::ops::RangeInclusive;
use domain_api::DmaPage;
use domain_api::disk::{Buffer, Busy, Completion, DiskError, Operation, Request, SECTOR, Tag};

/// Requests at a time.
pub(crate) const MOST_GUESTS: usize = 128;

/// A buffer of a request that could not be passed on at once.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    page: DmaPage,
    offset: u16,
    len: u16,
}

/// A request.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) active: bool,
    tag: Tag,
    operation: Operation,
    /// Its first byte.
    start: u64,
    /// Its bytes, and how many of them are under way.
    len: u64,
    cursor: u64,
    /// For writes and reads that are not under way entirely.
    kept: Vec<Kept>,
    /// Requests below and changes that it waits for.
    outstanding: u32,
    /// Requests below among them, and which clusters they are on.
    in_place: u32,
    clusters: RangeInclusive<u64>,
    flush: Option<FlushTicket>,
    error: Option<DiskError>,
}

impl Guest {
    fn idle() -> Self {
        Self {
            active: false,
            tag: Tag(0),
            operation: Operation::Flush,
            start: 0,
            len: 0,
            cursor: 0,
            kept: Vec::new(),
            outstanding: 0,
            in_place: 0,
            clusters: 0..=0,
            flush: None,
            error: None,
        }
    }

    /// Whether a request below is in flight on a cluster.
    pub(crate) fn touches(&self, cluster: u64) -> bool {
        self.in_place > 0 && self.clusters.contains(&cluster)
    }

    fn touch(&mut self, first: u64, last: u64) {
        self.clusters = match self.in_place {
            0 => first..=last,
            _ => (*self.clusters.start()).min(first)..=(*self.clusters.end()).max(last),
        };
        self.in_place += 1;
        self.outstanding += 1;
    }

    /// Whether its data are zeros.
    pub(crate) fn is_zeros(&self) -> bool {
        self.operation == Operation::WriteZeroes
    }

    /// How far byte `at` of the virtual disk is behind its first.
    pub(crate) fn skip_to(&self, at: u64) -> u64 {
        at.saturating_sub(self.start)
    }

    /// The buffers of `len` bytes, `skip` bytes behind the request's first.
    pub(crate) fn buffers(&self, skip: u64, len: u64) -> Vec<Buffer<'_>> {
        let whole = self.kept.iter().map(|kept| Buffer {
            page: &kept.page,
            offset: kept.offset,
            len: kept.len,
        });
        cut(whole, skip, len)
    }
}

/// The part of some buffers that has `len` bytes from `skip` on.
fn cut<'a>(
    buffers: impl Iterator<Item = Buffer<'a>>,
    mut skip: u64,
    mut len: u64,
) -> Vec<Buffer<'a>> {
    let mut part = Vec::new();
    for mut buffer in buffers {
        let before = skip.min(u64::from(buffer.len));
        skip -= before;
        let take = (u64::from(buffer.len) - before).min(len);
        if take > 0 {
            buffer.offset += u16::try_from(before).unwrap_or_default();
            buffer.len = u16::try_from(take).unwrap_or_default();
            part.push(buffer);
            len -= take;
        }
    }
    part
}

/// What a cluster, or several, need for a request.
enum Plan {
    /// Nothing, for that many bytes.
    Skip(u64),
    /// This is read, for that many bytes.
    Read(Source, u64),
    /// This is written where it is, for that many bytes.
    Write(u64, u64),
    /// Its mapping has to change, for that many bytes.
    Change(Job, u64),
}

impl Engine {
    /// Takes a request.
    pub(crate) fn submit(
        &mut self,
        lower: &mut impl Lower,
        request: &Request<'_>,
    ) -> Result<(), Busy> {
        if let Err(error) = self.check(request) {
            self.done.push_back(Completion { tag: request.tag, result: Err(error) });
            return Ok(());
        }
        let slot = self.guest_slot().ok_or(Busy)?;
        let guest = &mut self.guests[slot];
        guest.active = true;
        guest.tag = request.tag;
        guest.operation = request.operation;
        guest.start = request.sector * SECTOR;
        guest.len =
            if request.operation == Operation::Flush { 0 } else { request.sectors * SECTOR };
        guest.cursor = 0;
        guest.flush = None;
        guest.error = None;
        match self.pass_on(lower, slot, request.buffers) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(busy) => {
                self.guests[slot].active = false;
                self.free_guests.push(slot);
                return Err(busy);
            }
        }
        let kept = request.buffers.iter().map(|buffer| Kept {
            page: buffer.page.clone(),
            offset: buffer.offset,
            len: buffer.len,
        });
        self.guests[slot].kept.extend(kept);
        self.waiting.push_back(slot);
        self.run(lower);
        Ok(())
    }

    fn guest_slot(&mut self) -> Option<usize> {
        if self.free_guests.is_empty() && self.guests.len() < MOST_GUESTS {
            self.guests.push(Guest::idle());
            self.free_guests.push(self.guests.len() - 1);
        }
        self.free_guests.pop()
    }

    fn check(&self, request: &Request<'_>) -> Result<(), DiskError> {
        let unit = u64::from(self.offered.sector_size) / SECTOR;
        let bytes: u64 = request.buffers.iter().map(|buffer| u64::from(buffer.len)).sum();
        match request.operation {
            Operation::Flush => return Ok(()),
            Operation::Read => {}
            _ if self.offered.read_only => return Err(DiskError::ReadOnly),
            _ => {}
        }
        let has_data = matches!(request.operation, Operation::Read | Operation::Write);
        let is_unit = request.sector.is_multiple_of(unit) && request.sectors.is_multiple_of(unit);
        let fits =
            !has_data || (bytes == request.sectors * SECTOR && self.offered.takes(request.buffers));
        if request.sector > self.offered.sectors
            || request.sectors > self.offered.sectors - request.sector
        {
            return Err(DiskError::OutOfRange);
        }
        if is_unit && fits { Ok(()) } else { Err(DiskError::Unsupported) }
    }

    /// Passes a read or write on that is one request below, as most are. False: it is not.
    fn pass_on(
        &mut self,
        lower: &mut impl Lower,
        slot: usize,
        buffers: &[Buffer<'_>],
    ) -> Result<bool, Busy> {
        let (start, len) = (self.guests[slot].start, self.guests[slot].len);
        let (at, operation) = match self.plan(lower, slot) {
            Ok(Plan::Read(Source::At(file, at), bytes)) if bytes == len => {
                ((file, at), Operation::Read)
            }
            Ok(Plan::Read(Source::Zero, bytes)) if bytes == len => {
                buffers.iter().for_each(clear);
                self.guests[slot].cursor = len;
                self.finish_guest(slot);
                return Ok(true);
            }
            Ok(Plan::Write(at, bytes)) if bytes == len && !self.guests[slot].is_zeros() => {
                ((File::Image, at), Operation::Write)
            }
            _ => return Ok(false),
        };
        let ask = Ask { file: at.0, operation, at: at.1, len, buffers };
        self.ops.submit(lower, Owner::Guest(slot), &ask).map_err(|_| Busy)?;
        let bits = self.image.bits;
        let guest = &mut self.guests[slot];
        guest.cursor = len;
        guest.touch(start >> bits, (start + len - 1) >> bits);
        Ok(true)
    }

    /// Goes on with a request. True: all of it is under way, or done.
    pub(crate) fn drive_guest(&mut self, lower: &mut impl Lower, slot: usize) -> bool {
        loop {
            let guest = &self.guests[slot];
            let result = match guest.operation {
                Operation::Flush => self.drive_flush(slot),
                _ if guest.error.is_some() || guest.cursor >= guest.len => break,
                _ => self.advance(lower, slot),
            };
            match result {
                Ok(()) if self.guests[slot].operation == Operation::Flush => break,
                Ok(()) => {}
                Err(Stop::Wait) => return false,
                Err(Stop::Error(error)) => {
                    self.guests[slot].error = Some(error);
                    break;
                }
            }
        }
        self.finish_guest(slot);
        true
    }

    fn drive_flush(&mut self, slot: usize) -> Result<(), Stop> {
        match self.guests[slot].flush {
            Some(ticket) => self.flushes.check(ticket),
            None => {
                self.guests[slot].flush = Some(self.flushes.want());
                Err(Stop::Wait)
            }
        }
    }

    /// Has the next clusters of a request go their way.
    fn advance(&mut self, lower: &mut impl Lower, slot: usize) -> Result<(), Stop> {
        let bits = self.image.bits;
        let (cursor, at) =
            (self.guests[slot].cursor, self.guests[slot].start + self.guests[slot].cursor);
        let len = match self.plan(lower, slot)? {
            Plan::Skip(len) => len,
            Plan::Read(Source::Zero, len) => {
                for buffer in self.guests[slot].buffers(cursor, len) {
                    clear(&buffer);
                }
                len
            }
            Plan::Read(Source::At(file, from), len) => {
                let buffers = self.guests[slot].buffers(cursor, len);
                let ask =
                    Ask { file, operation: Operation::Read, at: from, len, buffers: &buffers };
                self.ops.submit(lower, Owner::Guest(slot), &ask)?;
                self.guests[slot].touch(at >> bits, (at + len - 1) >> bits);
                len
            }
            Plan::Write(to, len) if self.guests[slot].is_zeros() => {
                let len = self.zero_once(lower, Owner::Guest(slot), to, len)?;
                self.guests[slot].touch(at >> bits, (at + len - 1) >> bits);
                len
            }
            Plan::Write(to, len) => {
                let buffers = self.guests[slot].buffers(cursor, len);
                let ask = Ask {
                    file: File::Image,
                    operation: Operation::Write,
                    at: to,
                    len,
                    buffers: &buffers,
                };
                self.ops.submit(lower, Owner::Guest(slot), &ask)?;
                self.guests[slot].touch(at >> bits, (at + len - 1) >> bits);
                len
            }
            Plan::Change(job, len) => {
                if self.active_changes >= DATA_CHANGES {
                    return Err(Stop::Wait);
                }
                self.add_change(Change::new(Target::Cluster(at >> bits), job, Some(slot)));
                self.guests[slot].outstanding += 1;
                len
            }
        };
        self.guests[slot].cursor += len;
        Ok(())
    }

    /// What the next clusters of a request need.
    fn plan(&mut self, lower: &mut impl Lower, slot: usize) -> Result<Plan, Stop> {
        let guest = &self.guests[slot];
        let (operation, at, rest) =
            (guest.operation, guest.start + guest.cursor, guest.len - guest.cursor);
        if rest == 0 {
            return Ok(Plan::Skip(0));
        }
        let inside = at % self.image.cluster();
        let here = (self.image.cluster() - inside).min(rest);
        let is_whole = here == self.image.cluster()
            || (inside == 0 && at + here == self.image.size && operation != Operation::Write);
        match operation {
            Operation::Read => self.plan_read(lower, at, rest),
            Operation::Discard if !is_whole => Ok(Plan::Skip(here)),
            Operation::Discard | Operation::WriteZeroes if is_whole => {
                self.plan_unlink(lower, at, here, rest)
            }
            _ => self.plan_write(lower, at, inside, here, rest),
        }
    }

    fn unchanged(&self, cluster: u64) -> Result<(), Stop> {
        let changes = |change: &Change| change.target() == Target::Cluster(cluster);
        match self.active_changes > 0 && self.changes.iter().flatten().any(changes) {
            true => Err(Stop::Wait),
            false => Ok(()),
        }
    }

    fn plan_read(&mut self, lower: &mut impl Lower, at: u64, rest: u64) -> Result<Plan, Stop> {
        let bits = self.image.bits;
        self.unchanged(at >> bits)?;
        let (source, len) = self.source(lower, at)?;
        let mut len = len.min(rest);
        while len < rest {
            let next = at + len;
            if next.is_multiple_of(self.image.cluster()) && self.unchanged(next >> bits).is_err() {
                break;
            }
            match self.source(lower, next) {
                Ok((more, bytes)) if more == source.skip(len) => len += bytes.min(rest - len),
                _ => break,
            }
        }
        Ok(Plan::Read(source, len))
    }

    fn plan_write(
        &mut self,
        lower: &mut impl Lower,
        at: u64,
        inside: u64,
        here: u64,
        rest: u64,
    ) -> Result<Plan, Stop> {
        let bits = self.image.bits;
        self.unchanged(at >> bits)?;
        let offset = match self.entry(lower, File::Image, at >> bits)? {
            Entry::Data { offset, copied: true } if self.is_own_table(at >> bits)? => offset,
            Entry::Compressed => return Err(compressed()),
            Entry::Bad => return Err(damaged("an entry of an L2 table").into()),
            _ => return Ok(Plan::Change(Job::Write { from: inside, to: inside + here }, here)),
        };
        self.check_place(offset)?;
        let mut len = here;
        while len < rest {
            let cluster = (at + len) >> bits;
            let wanted = offset + inside + len;
            let next =
                self.unchanged(cluster).and_then(|()| self.entry(lower, File::Image, cluster));
            match next {
                Ok(Entry::Data { offset, copied: true })
                    if offset == wanted
                        && self.check_place(offset).is_ok()
                        && self.is_own_table(cluster)? =>
                {
                    len += self.image.cluster().min(rest - len);
                }
                _ => break,
            }
        }
        Ok(Plan::Write(offset + inside, len))
    }

    /// Whether the L2 table of a cluster has no other user, so that its entries count.
    fn is_own_table(&self, cluster: u64) -> Result<bool, Stop> {
        Ok(self.image.l2_place(cluster)?.is_some_and(|place| place.copied))
    }

    /// A whole cluster becomes nothing, or zeros. Where there is no table and nothing behind the
    /// image, all that the table would stand for is that already.
    fn plan_unlink(
        &mut self,
        lower: &mut impl Lower,
        at: u64,
        here: u64,
        rest: u64,
    ) -> Result<Plan, Stop> {
        let cluster = at >> self.image.bits;
        self.unchanged(cluster)?;
        let entry = self.entry(lower, File::Image, cluster)?;
        let is_bare = self.image.l2_place(cluster)?.is_none() && at >= self.backing.size();
        if is_bare {
            let per_table = 1_u64 << (2 * self.image.bits - 3);
            return Ok(Plan::Skip((per_table - at % per_table).min(rest.max(here))));
        }
        Ok(match entry {
            Entry::Zero { kept: None } => Plan::Skip(here),
            Entry::Unallocated if at >= self.backing.size() => Plan::Skip(here),
            _ => Plan::Change(Job::Unlink, here),
        })
    }

    pub(crate) fn guest_completed(&mut self, slot: usize, result: Result<(), DiskError>) {
        let guest = &mut self.guests[slot];
        guest.in_place -= 1;
        guest.outstanding -= 1;
        guest.error = guest.error.or(result.err());
        self.finish_guest(slot);
    }

    /// A change of one of a request's clusters ended.
    pub(crate) fn guest_changed(&mut self, slot: usize, error: Option<DiskError>) {
        let guest = &mut self.guests[slot];
        guest.outstanding -= 1;
        guest.error = guest.error.or(error);
        self.finish_guest(slot);
    }

    /// Completes a request if nothing of it is left.
    fn finish_guest(&mut self, slot: usize) {
        let guest = &mut self.guests[slot];
        let all = guest.cursor >= guest.len || guest.error.is_some();
        if !guest.active || guest.outstanding > 0 || !all || self.waiting.contains(&slot) {
            return;
        }
        guest.active = false;
        guest.kept.clear();
        let result = guest.error.map_or(Ok(()), Err);
        self.done.push_back(Completion { tag: guest.tag, result });
        self.free_guests.push(slot);
    }
}

/// Fills a buffer with zeros.
fn clear(buffer: &Buffer<'_>) {
    const ZEROS: [u8; 512] = [0; 512];
    for at in (0..buffer.len).step_by(ZEROS.len()) {
        let len = ZEROS.len().min(usize::from(buffer.len - at));
        buffer.page.page.write(usize::from(buffer.offset + at), &ZEROS[..len]);
    }
}
