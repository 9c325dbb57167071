//! Mapping what requests name, and giving it to the disks.
//!
//! Pages are mapped in batches: all that the requests of a batch need and that is not mapped yet,
//! with one call. An indirect request has its segments in a page of the guest, which is mapped,
//! read once and given back before anything it says is done. That page is not in the in-flight
//! table: an honest frontend leaves it alone until the request is answered, so that the next
//! incarnation reads the same there, and for a dishonest one it reads something that is checked
//! in the same way, and touches nothing but what that frontend may touch anyway.

use crate::grants::Mappings;
use crate::open::OpenVolume;
use crate::preserved::BOUNCE_PAGES_PER_VBD;
use crate::queue::{Phase, Queue, Slot};
use crate::request::{Part, Wish, parse_segments, segment_pages};
use crate::split::{self, Buffers};
use crate::tags::{Bounce, Owner, Pool, Tags};
use crate::{Env, VbdStats};
use alloc::vec::Vec;
use domain_api::disk::{Buffer, Busy, Disk, Operation, Request, SECTOR};
use domain_api::{Access, DomainId, GrantStatus, MapRequest, MappedDmaGrant, Page};
use xen_abi::blkif::RSP_ERROR;

/// Most granted pages that are mapped for requests at a time. The core has 2,048 handles for a
/// domain; the rings need some as well.
pub const MOST_MAPPED: usize = 1792;
/// Stands for "not mapped" in [`Part::mapping`].
const UNMAPPED: u16 = u16::MAX;

/// What serving the queues of all vbds shares. The lists are kept so that they are not allocated
/// for each round.
pub struct Desk {
    /// Requests that the disks have.
    pub tags: Tags,
    /// Pages of our own.
    pub pool: Pool,
    /// Pages of our own that requests go through: a few at most, so that the others are there for
    /// the in-flight tables of vbds that connect.
    pub bouncing: usize,
    /// Granted pages that are mapped for requests.
    pub mapped: usize,
    /// So many pages were mapped when a request had to wait because they are too many.
    pub short: Option<usize>,
    /// Granted pages that are to be unmapped.
    pub unmap: Vec<MappedDmaGrant>,
    /// Requests that volumes took since the start.
    pub accepted: u64,
    /// An image took one; it may be done with it already.
    pub image_work: bool,
    /// Disks that have to be told, by number.
    kicks: u64,
    wanted: Vec<Wanted>,
    requests: Vec<MapRequest>,
    results: Vec<Result<MappedDmaGrant, GrantStatus>>,
}

/// A part whose page is not mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Wanted {
    /// Of which request.
    index: u32,
    /// Which of its parts.
    part: u16,
}

/// A request whose next piece is to be submitted.
struct Job<'a> {
    /// Whose it is.
    from: Owner,
    slot: &'a mut Slot,
    mappings: &'a Mappings,
}

/// Whose pages, and how they are mapped.
#[derive(Clone, Copy)]
struct Terms {
    granter: DomainId,
    persistent: bool,
}

impl Desk {
    pub fn new(tags: Tags, pool: Pool) -> Self {
        Self {
            tags,
            pool,
            bouncing: 0,
            mapped: 0,
            short: None,
            unmap: Vec::new(),
            accepted: 0,
            image_work: false,
            kicks: 0,
            wanted: Vec::new(),
            requests: Vec::new(),
            results: Vec::new(),
        }
    }

    /// Unmaps what is to be unmapped. True when there was anything.
    #[inline]
    pub fn flush<E: Env>(&mut self, env: &mut E) -> bool {
        if self.unmap.is_empty() {
            return false;
        }
        self.mapped -= self.unmap.len();
        env.unmap_from_devices(&mut self.unmap);
        true
    }

    /// Makes the disks aware of what they got. True when there was anything.
    #[inline]
    pub fn kick<D: Disk>(&mut self, disks: &mut [D]) -> bool {
        let kicks = core::mem::take(&mut self.kicks);
        for (number, disk) in disks.iter_mut().enumerate() {
            if kicks & bit(number) != 0 {
                disk.kick();
            }
        }
        kicks != 0
    }

    /// Gives a request to a disk.
    #[inline]
    pub fn issue<D: Disk>(
        &mut self,
        disks: &mut [D],
        disk: usize,
        owner: Owner,
        request: Request<'_>,
    ) -> Result<(), Busy> {
        let tag = self.tags.open(owner);
        let submitted = disks[disk].submit(Request { tag, ..request });
        match submitted {
            Ok(()) => self.kicks |= bit(disk),
            Err(Busy) => drop(self.tags.close(tag)),
        }
        submitted
    }

    /// Maps the pages of the requests that were taken, as far as there are handles.
    pub fn prepare<E: Env>(
        &mut self,
        env: &mut E,
        granter: DomainId,
        persistent: bool,
        volume: &OpenVolume,
        queue: &mut Queue,
        stats: &mut VbdStats,
    ) {
        let terms = Terms { granter, persistent };
        queue.mappings.tick();
        let mut end = queue.prepared;
        let mut indirect = false;
        let mut room = MOST_MAPPED.saturating_sub(self.mapped);
        while end != queue.taken {
            let slot = queue.slot(end);
            let need = match slot.wish {
                Wish::Transfer { .. } => slot.parts.len(),
                Wish::Indirect { segments, .. } => segment_pages(segments) + usize::from(segments),
                _ => 0,
            };
            if need > room {
                self.short = Some(self.mapped);
                break;
            }
            room -= need;
            indirect |= slot.phase == Phase::Taken && matches!(slot.wish, Wish::Indirect { .. });
            end = end.wrapping_add(1);
        }
        if indirect {
            self.fetch_segments(env, terms, volume, queue, end, stats);
        }
        self.map_data(env, terms, queue, end, stats);
        queue.prepared = end;
    }

    /// Fetches the segments of the indirect requests up to `end`.
    fn fetch_segments<E: Env>(
        &mut self,
        env: &mut E,
        terms: Terms,
        volume: &OpenVolume,
        queue: &mut Queue,
        end: u32,
        stats: &mut VbdStats,
    ) {
        let mut index = queue.prepared;
        while index != end {
            let slot = queue.slot(index);
            if let (Phase::Taken, Wish::Indirect { pages, .. }) = (slot.phase, slot.wish) {
                slot.parts.clear();
                slot.parts.push(Part { gref: pages[0], mapping: UNMAPPED, first: 0, last: 7 });
                self.look_up(queue, index, stats);
            }
            index = index.wrapping_add(1);
        }
        self.map_wanted(env, terms, queue, stats);
        let mut index = queue.prepared;
        while index != end {
            let (slot, mappings) = queue.slot_and_mappings(index);
            if let (Phase::Taken, Wish::Indirect { write, sector, segments, .. }) =
                (slot.phase, slot.wish)
            {
                // One that could not be mapped has failed already.
                let name = slot.parts[0].mapping;
                let page = mappings.page(name).page.clone();
                let limits = &volume.limits;
                slot.wish = parse_segments(&page, segments, write, sector, limits, &mut slot.parts);
                drop(page);
                mappings.release(name, &mut self.unmap);
                if let Wish::Refused(status) = slot.wish {
                    slot.refuse(status);
                }
            }
            index = index.wrapping_add(1);
        }
    }

    /// Maps the data of the requests up to `end`.
    fn map_data<E: Env>(
        &mut self,
        env: &mut E,
        terms: Terms,
        queue: &mut Queue,
        end: u32,
        stats: &mut VbdStats,
    ) {
        let mut index = queue.prepared;
        while index != end {
            let slot = queue.slot(index);
            if slot.phase == Phase::Taken {
                slot.phase = Phase::Ready;
                self.look_up(queue, index, stats);
            }
            index = index.wrapping_add(1);
        }
        self.map_wanted(env, terms, queue, stats);
    }

    /// Uses the pages of a request that are mapped, and notes the others.
    #[inline]
    fn look_up(&mut self, queue: &mut Queue, index: u32, stats: &mut VbdStats) {
        let (slot, mappings) = queue.slot_and_mappings(index);
        for (part, at) in slot.parts.iter_mut().zip(0_u16..) {
            if let Some(name) = mappings.reuse(part.gref) {
                part.mapping = name;
                stats.persistent_hits += 1;
            } else {
                part.mapping = UNMAPPED;
                self.wanted.push(Wanted { index, part: at });
            }
        }
    }

    /// Maps what was noted. Requests with a page that cannot be mapped fail.
    fn map_wanted<E: Env>(
        &mut self,
        env: &mut E,
        terms: Terms,
        queue: &mut Queue,
        stats: &mut VbdStats,
    ) {
        if self.wanted.is_empty() {
            return;
        }
        self.map_as(env, terms, queue, stats, |slot| match slot.wish {
            Wish::Transfer { write: false, .. } => Access::ReadWrite,
            _ if terms.persistent => Access::ReadWrite,
            _ => Access::ReadOnly,
        });
        if terms.persistent && !self.wanted.is_empty() {
            // What is only read from may be granted so.
            let once = Terms { persistent: false, ..terms };
            self.map_as(env, once, queue, stats, |slot| match slot.wish {
                Wish::Transfer { write: false, .. } => Access::ReadWrite,
                _ => Access::ReadOnly,
            });
        }
        for Wanted { index, .. } in core::mem::take(&mut self.wanted) {
            let (slot, mappings) = queue.slot_and_mappings(index);
            for part in slot.parts.drain(..).filter(|part| part.mapping != UNMAPPED) {
                mappings.release(part.mapping, &mut self.unmap);
            }
            slot.fail(RSP_ERROR);
        }
    }

    /// Maps what was noted; what cannot be mapped stays noted.
    fn map_as<E: Env>(
        &mut self,
        env: &mut E,
        terms: Terms,
        queue: &mut Queue,
        stats: &mut VbdStats,
        access: impl Fn(&Slot) -> Access,
    ) {
        self.requests.clear();
        for wanted in &self.wanted {
            let slot = queue.slot(wanted.index);
            let gref = slot.parts[usize::from(wanted.part)].gref;
            self.requests.push(MapRequest { granter: terms.granter, gref, access: access(slot) });
        }
        self.results.clear();
        env.map_for_devices(&self.requests, &mut self.results);
        let mut results = self.results.drain(..);
        let (mapped, unmap) = (&mut self.mapped, &mut self.unmap);
        self.wanted.retain(|wanted| {
            let Some(Ok(mapping)) = results.next() else { return true };
            let (slot, mappings) = queue.slot_and_mappings(wanted.index);
            let part = &mut slot.parts[usize::from(wanted.part)];
            part.mapping = mappings.insert(mapping, part.gref, terms.persistent, unmap);
            *mapped += 1;
            stats.mapped += 1;
            false
        });
    }

    /// Gives the disk what is mapped. False: some of it has to wait for a completion.
    pub fn submit<D: Disk>(
        &mut self,
        disks: &mut [D],
        volume: &mut OpenVolume,
        (station, number): (usize, usize),
        queue: &mut Queue,
        outstanding: &mut u32,
        stats: &mut VbdStats,
    ) -> bool {
        while queue.submitted != queue.prepared {
            let index = queue.submitted;
            let from = Owner::Request {
                station: to_u16(station),
                queue: to_u16(number),
                index,
                bounce: None,
            };
            let (slot, mappings) = queue.slot_and_mappings(index);
            while slot.phase == Phase::Ready {
                let before = self.accepted;
                let job = Job { from, slot, mappings };
                let submitted = self.submit_piece(disks, volume, job, stats);
                if self.accepted != before {
                    slot.outstanding += 1;
                    *outstanding += 1;
                    stats.disk_requests += 1;
                }
                if submitted.is_err() {
                    return false;
                }
                if slot.is_submitted() {
                    slot.sent();
                }
            }
            queue.submitted = index.wrapping_add(1);
        }
        queue.prepared == queue.taken
    }

    /// Submits the next piece of a request, if it does not fail at once.
    #[inline]
    fn submit_piece<D: Disk>(
        &mut self,
        disks: &mut [D],
        volume: &mut OpenVolume,
        job: Job<'_>,
        stats: &mut VbdStats,
    ) -> Result<(), Busy> {
        match job.slot.wish {
            Wish::Transfer { write: true, sector } => {
                self.transfer(disks, volume, job, Operation::Write, sector, stats)
            }
            Wish::Transfer { write: false, sector } => {
                self.transfer(disks, volume, job, Operation::Read, sector, stats)
            }
            Wish::Discard { sector, sectors } => {
                let Some((operation, most)) = volume.discard else {
                    job.slot.fail(RSP_ERROR);
                    return Ok(());
                };
                let count = (sectors - job.slot.submitted).min(most);
                let range = (sector + job.slot.submitted, count);
                volume.submit(self, disks, job.from, operation, range, &[])?;
                job.slot.submitted += count;
                Ok(())
            }
            _ => volume.submit(self, disks, job.from, Operation::Flush, (0, 0), &[]),
        }
    }

    /// Submits the next piece of a read or write.
    #[inline]
    fn transfer<D: Disk>(
        &mut self,
        disks: &mut [D],
        volume: &mut OpenVolume,
        job: Job<'_>,
        operation: Operation,
        sector: u64,
        stats: &mut VbdStats,
    ) -> Result<(), Busy> {
        let Job { from, slot, mappings } = job;
        let (begin, first) = (slot.cursor, sector + slot.submitted);
        let page = |name| mappings.page(name);
        let mut buffers = Buffers::new();
        let mut bytes = split::cut(&slot.parts, begin, &volume.geometry, page, &mut buffers);
        if bytes > 0 {
            let range = (first, bytes as u64 / SECTOR);
            volume.submit(self, disks, from, operation, range, &buffers)?;
        } else {
            bytes = volume.geometry.sector_size as usize;
            self.gather(disks, volume, Job { from, slot, mappings }, operation, first)?;
            stats.bounced += 1;
        }
        slot.cursor = begin.skip(&slot.parts, bytes);
        slot.submitted += bytes as u64 / SECTOR;
        Ok(())
    }

    /// Submits one sector of the disk by way of a page of our own.
    fn gather<D: Disk>(
        &mut self,
        disks: &mut [D],
        volume: &mut OpenVolume,
        job: Job<'_>,
        operation: Operation,
        first: u64,
    ) -> Result<(), Busy> {
        let (begin, bytes) = (job.slot.cursor, volume.geometry.sector_size as usize);
        let taken = if self.bouncing < BOUNCE_PAGES_PER_VBD { self.pool.take() } else { None };
        let Some(name) = taken else {
            // Nothing that is under way would bring one.
            if self.bouncing == 0 {
                job.slot.fail(RSP_ERROR);
                return Ok(());
            }
            return Err(Busy);
        };
        let own = self.pool.page(name).clone();
        if operation == Operation::Write {
            let mut at = 0;
            for (mapping, offset, len) in begin.walk(&job.slot.parts, bytes) {
                copy(&job.mappings.page(mapping).page, offset, &own.page, at, len);
                at += len;
            }
        }
        let len = to_u16(bytes);
        let owner = job.from.through(Bounce { page: name, from: begin, bytes: len });
        let buffers = [Buffer { page: &own, offset: 0, len }];
        let range = (first, bytes as u64 / SECTOR);
        let submitted = volume.submit(self, disks, owner, operation, range, &buffers);
        match submitted {
            Ok(()) => self.bouncing += 1,
            Err(Busy) => self.pool.give(name),
        }
        submitted
    }
}

/// Copies whole sectors from one page into another.
pub fn copy(from: &Page, from_offset: usize, to: &Page, to_offset: usize, len: usize) {
    let mut sector = [0; xen_abi::blkif::SECTOR];
    for at in (0..len).step_by(sector.len()) {
        from.read(from_offset + at, &mut sector);
        to.write(to_offset + at, &sector);
    }
}

fn bit(disk: usize) -> u64 {
    1 << (disk % 64)
}

#[expect(clippy::cast_possible_truncation, reason = "small numbers of our own")]
fn to_u16(value: usize) -> u16 {
    value as u16
}
