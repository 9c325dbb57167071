//! The data path: requests between rings and disks.
//!
//! In a round, what the disks have completed is counted; each queue that may have requests is
//! served, a batch at most, beginning with the vbd whose turn it is; then what is done is
//! answered. Serving a queue has three steps ([`crate::queue`]): requests are taken and checked,
//! their pages are mapped with as few hypercalls as possible, and the disk gets them. A disk that
//! is busy ends the third step; the next round goes on there, beginning with another vbd.
//!
//! A frontend whose pages stay mapped costs no hypercall but the notifications.

use crate::link::Link;
use crate::open::VolumeState;
use crate::preserved::{Preserved, VbdId};
use crate::queue::{Phase, Queue, Slot};
use crate::request::{self, Limits, Wish};
use crate::tags::{Bounce, Owner, Pool, Tags};
use crate::transfer::Desk;
use crate::{Env, Progress, VbdStats};
use alloc::vec::Vec;
use domain_api::disk::{Completion, Disk, DiskError};
use shmem::PeerError;
use xen_abi::blkif::{RSP_EOPNOTSUPP, RSP_ERROR, RSP_OKAY};

/// Requests taken from one queue in one round.
const BATCH: u32 = 32;
/// Mapped pages of each queue that go at a time when the core has no more handles for us.
const PURGE: usize = 64;

/// What the data path knows of a vbd.
pub struct Station {
    /// Which.
    pub id: VbdId,
    /// Where its data are.
    pub volume: VolumeState,
    /// The rings, while it is connected.
    pub link: Option<Link>,
    /// It is gone from the store; its place comes free when the disk has nothing of it.
    pub removed: bool,
    /// Its volume is to be closed as soon as no disk works for it.
    pub closes: bool,
    /// There is something to do for it in the store.
    pub news: bool,
}

impl Station {
    /// Nothing is known of it yet.
    pub fn new(id: VbdId) -> Self {
        Self {
            id,
            volume: VolumeState::Closed,
            link: None,
            removed: false,
            closes: false,
            news: false,
        }
    }

    /// Whether its rings are attached.
    pub fn is_attached(&self) -> bool {
        self.link.as_ref().is_some_and(|link| !link.closed)
    }

    /// Whether a disk still works for a connection that has ended.
    pub fn is_draining(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.closed)
    }
}

/// The data path of all vbds.
pub struct Plane {
    /// Vbds, each in a place of its own; `None` is a free place.
    pub stations: Vec<Option<Station>>,
    /// What the steps of serving share.
    pub desk: Desk,
    /// Which vbd is served first in the next round.
    first: usize,
    /// Searches for volumes that were begun.
    searches: u32,
}

/// How serving a vbd ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Turn {
    /// Nothing is left.
    Done,
    /// There may be more requests in a ring.
    More,
    /// Requests wait for something that only a completion brings.
    Stalled {
        /// Whether the disk got anything.
        served: bool,
    },
}

impl Plane {
    pub fn new(pool: Pool) -> Self {
        let desk = Desk::new(Tags::default(), pool);
        Self { stations: Vec::new(), desk, first: 0, searches: 0 }
    }

    /// A number for a search.
    pub fn next_search(&mut self) -> u32 {
        self.searches = self.searches.wrapping_add(1);
        self.searches
    }

    /// One round. See [`crate::Blkback::poll`].
    pub fn poll<E: Env, D: Disk>(
        &mut self,
        env: &mut E,
        preserved: &mut Preserved,
        disks: &mut [D],
    ) -> Progress {
        let mut progress = Progress::IDLE;
        self.complete(disks);
        self.open_volumes(preserved, disks);
        let stalled = self.serve(env, disks, &mut progress);
        if self.desk.kick(disks) | core::mem::take(&mut self.desk.image_work) {
            // What a disk refuses at once is completed without an interrupt.
            let completed = self.complete(disks);
            self.desk.kick(disks);
            progress.more_work |= completed && stalled;
        }
        self.answer(env);
        progress.more_work |= self.make_room(env);
        self.drain(env, preserved);
        let asks = |it: &Station| {
            it.news || it.link.as_ref().is_some_and(|link| !link.closed && link.fault.is_some())
        };
        progress.store_work = self.stations.iter().flatten().any(asks);
        progress.more_work |= self.stations.iter().flatten().any(|it| it.volume.wants_turn());
        progress
    }

    /// Takes what the disks have completed. True when there was anything.
    fn complete<D: Disk>(&mut self, disks: &mut [D]) -> bool {
        let mut any = false;
        for number in 0..disks.len() {
            while let Some(completion) = disks[number].complete() {
                any = true;
                self.completed(disks, completion);
            }
        }
        self.resume_images(disks) | any
    }

    pub fn completed<D: Disk>(&mut self, disks: &mut [D], completion: Completion) {
        let Completion { tag, result } = completion;
        match self.desk.tags.close(tag) {
            Owner::Request { station, queue, index, bounce } => {
                let Some(Some(station)) = self.stations.get_mut(usize::from(station)) else {
                    return;
                };
                let Some(link) = &mut station.link else { return };
                link.outstanding -= 1;
                let queue = &mut link.queues[usize::from(queue)];
                if let Some(bounce) = bounce {
                    self.desk.bouncing -= 1;
                    bounced(&mut self.desk.pool, queue, index, bounce, result);
                }
                queue.slot(index).completed(status_of(result));
            }
            Owner::Image { station, tag } => {
                self.completed_below(disks, usize::from(station), tag, result);
            }
            Owner::Search { station, search, page } => {
                self.found(usize::from(station), search, page, result);
            }
            Owner::Free => log::error!("a disk completed a request that it did not have"),
        }
    }

    /// One batch from each queue, beginning with the vbd whose turn it is. True when requests
    /// wait for a disk.
    fn serve<E: Env, D: Disk>(
        &mut self,
        env: &mut E,
        disks: &mut [D],
        progress: &mut Progress,
    ) -> bool {
        let count = self.stations.len();
        let begin = self.first;
        self.first = if count == 0 { 0 } else { (begin + 1) % count };
        let mut stalled = false;
        for place in (0..count).map(|step| (begin + step) % count) {
            match self.serve_vbd(env, disks, place) {
                Turn::Done => {}
                Turn::More => progress.more_work = true,
                Turn::Stalled { served } => {
                    if !stalled {
                        self.first = if served { (place + 1) % count } else { place };
                    }
                    stalled = true;
                }
            }
        }
        stalled
    }

    fn serve_vbd<E: Env, D: Disk>(&mut self, env: &mut E, disks: &mut [D], place: usize) -> Turn {
        let Self { stations, desk, .. } = self;
        let Some(Some(Station { id, volume: VolumeState::Open(volume), link: Some(link), .. })) =
            stations.get_mut(place)
        else {
            return Turn::Done;
        };
        if !link.is_served() {
            return Turn::Done;
        }
        let before = desk.accepted;
        let (mut more, mut stalled) = (false, false);
        let count = link.queues.len();
        let begin = link.first;
        link.first = (begin + 1) % count;
        for number in (0..count).map(|step| (begin + step) % count) {
            let queue = &mut link.queues[number];
            if queue.ready
                && !queue.has_backlog()
                && let Err(error) = take_batch(queue, &volume.limits)
            {
                link.fail(format_args!("queue {number}: {error}"));
                return Turn::Done;
            }
            if queue.prepared != queue.taken {
                desk.prepare(env, id.domain, link.persistent, volume, queue, &mut link.stats);
            }
            if queue.has_backlog() {
                stalled |= !desk.submit(
                    disks,
                    volume,
                    (place, number),
                    queue,
                    &mut link.outstanding,
                    &mut link.stats,
                );
            }
            more |= queue.ready && !queue.has_backlog();
        }
        let served = desk.accepted != before;
        if stalled {
            Turn::Stalled { served }
        } else if more {
            Turn::More
        } else {
            Turn::Done
        }
    }

    /// Answers what is done, after having unmapped what does not stay mapped.
    fn answer<E: Env>(&mut self, env: &mut E) {
        for link in self.stations.iter_mut().flatten().filter_map(|it| it.link.as_mut()) {
            if link.is_served() {
                link.queues.iter_mut().for_each(|queue| queue.finish(&mut self.desk.unmap));
            }
        }
        self.desk.flush(env);
        for link in self.stations.iter_mut().flatten().filter_map(|it| it.link.as_mut()) {
            if link.is_served() {
                let Link { queues, stats, .. } = link;
                queues.iter_mut().for_each(|queue| queue.answer(env, |slot| count(stats, slot)));
            }
        }
    }

    /// Unmaps pages that nobody uses, when there were no handles for those that somebody needs.
    /// True when there are some now.
    fn make_room<E: Env>(&mut self, env: &mut E) -> bool {
        let Some(before) = self.desk.short.take() else { return false };
        for link in self.stations.iter_mut().flatten().filter_map(|it| it.link.as_mut()) {
            for queue in &mut link.queues {
                queue.mappings.purge(PURGE, &mut self.desk.unmap);
            }
        }
        self.desk.flush(env);
        self.desk.mapped < before
    }

    /// Finishes connections that have ended, when the disk has nothing of them any more.
    fn drain<E: Env>(&mut self, env: &mut E, preserved: &mut Preserved) {
        for place in 0..self.stations.len() {
            let Some(station) = &mut self.stations[place] else { continue };
            if let Some(link) = &mut station.link
                && link.closed
                && link.outstanding == 0
            {
                self.desk.mapped -= link.clear(env);
                station.link = None;
                station.news = true;
            }
            if station.closes && station.link.is_none() && station.volume.is_idle() {
                (station.closes, station.news) = (false, true);
            }
            if station.removed {
                self.leave(place, preserved);
            }
        }
    }

    /// Forgets a vbd, as soon as no disk works for it.
    pub fn leave(&mut self, place: usize, preserved: &mut Preserved) {
        if let Some(station) = &mut self.stations[place] {
            station.removed = true;
        }
        if self.close_volume(place, preserved) {
            self.stations[place] = None;
        }
    }

    /// Ends a connection, if there is one, and returns its counters. What the disk still has is
    /// waited for in later rounds; see [`Station::is_draining`].
    pub fn disconnect<E: Env>(&mut self, env: &mut E, place: usize) -> Option<VbdStats> {
        let station = self.stations[place].as_mut()?;
        let link = station.link.as_mut().filter(|link| !link.closed)?;
        link.close(env);
        let stats = link.stats;
        if link.outstanding == 0 {
            self.desk.mapped -= link.clear(env);
            station.link = None;
        }
        Some(stats)
    }
}

/// Takes requests out of a ring, checks them, and puts them into the window.
fn take_batch(queue: &mut Queue, limits: &Limits) -> Result<(), PeerError> {
    for _ in 0..BATCH {
        let Some((ring, slot)) = queue.ring_and_next() else { return Ok(()) };
        let Some(taken) = ring.take()? else {
            queue.ready = ring.arm();
            return Ok(());
        };
        let decoded = request::decode(&taken, limits, &mut slot.parts);
        slot.start(decoded);
        queue.taken = queue.taken.wrapping_add(1);
    }
    Ok(())
}

/// What came through a page of our own goes where it belongs.
fn bounced(
    pool: &mut Pool,
    queue: &mut Queue,
    index: u32,
    bounce: Bounce,
    result: Result<(), DiskError>,
) {
    let (slot, mappings) = queue.slot_and_mappings(index);
    if let (Wish::Transfer { write: false, .. }, Ok(())) = (slot.wish, result) {
        let source = &pool.page(bounce.page).page;
        let mut at = 0;
        for (mapping, offset, len) in bounce.from.walk(&slot.parts, usize::from(bounce.bytes)) {
            crate::transfer::copy(source, at, &mappings.page(mapping).page, offset, len);
            at += len;
        }
    }
    pool.give(bounce.page);
}

fn status_of(result: Result<(), DiskError>) -> i16 {
    match result {
        Ok(()) => RSP_OKAY,
        Err(DiskError::Unsupported) => RSP_EOPNOTSUPP,
        Err(_) => RSP_ERROR,
    }
}

/// Counts a request that is answered.
fn count(stats: &mut VbdStats, slot: &Slot) {
    debug_assert_eq!(slot.phase, Phase::Done);
    if slot.status != RSP_OKAY {
        stats.errors += 1;
        return;
    }
    match slot.wish {
        Wish::Transfer { write: true, .. } => {
            stats.writes += 1;
            stats.sectors_written += slot.submitted;
        }
        Wish::Transfer { .. } => {
            stats.reads += 1;
            stats.sectors_read += slot.submitted;
        }
        Wish::Flush => stats.flushes += 1,
        Wish::Discard { .. } => stats.discards += 1,
        Wish::Indirect { .. } | Wish::Refused(_) => {}
    }
}
