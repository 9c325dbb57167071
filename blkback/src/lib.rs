//! Backend half of Xen's split block driver: serves any number of vbds from the disks of one
//! controller.
//!
//! [`Blkback`] finds its vbds in xenstore, opens the volume of each ([`volume`]), connects to
//! their frontends, and turns their requests into requests for a [`Disk`]. Data go straight
//! between the disk and the pages that the frontends granted. It trusts no frontend: every slot
//! is copied once and then checked, a bad request is answered with an error, and a frontend that
//! breaks the protocol is disconnected with a message in its `error` node while all others go on.
//!
//! It can be killed at any instant and go on in its next incarnation without the frontends
//! noticing. For this it publishes responses strictly in ring order, whatever the order in which
//! the disk is done, keeps its private copies of requests in preserved pages ([`preserved`]), and
//! has no cache of its own: what is answered is done. What the next incarnation does with each
//! vbd follows from the states that are in the store ([`xenbus::takeover()`]); a vbd that works
//! is attached to without a write to the store.
//!
//! The event loop, the controller's driver and the core's interfaces are left to the domain that
//! uses this crate: everything is passed in, as traits of `domain-api` and `xenbus`.
//!
//! What is offered to frontends: several queues, rings of several pages, indirect segments,
//! persistent grants, flush, and discard where the disk can. A write barrier is not offered, and
//! answered with "not supported".

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod gpt;
mod grants;
mod image;
mod link;
mod open;
mod plane;
pub mod preserved;
mod queue;
mod request;
mod split;
mod tags;
mod transfer;
mod vbd;
pub mod volume;

use crate::open::VolumeState;
use crate::plane::Plane;
use crate::preserved::{Preserved, VbdId};
use crate::tags::Pool;
use crate::vbd::Vbd;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use domain_api::disk::Disk;
use domain_api::{Clock, DeviceGrants, DmaPage, DomainId, Errno, EventPort, Events};
use shmem::Page;
use xenbus::device::{self, DeviceKind};
use xenbus::{Event, Store};

/// What blkback needs of the core.
pub trait Env: Events + DeviceGrants + Clock {}
impl<T: Events + DeviceGrants + Clock> Env for T {}

const BACKEND_ROOT: &str = "backend/vbd";
const BACKEND_TOKEN: &str = "blkback";
const FRONTEND_TOKEN: &str = "blkback-front/";

/// Counters of one vbd.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VbdStats {
    /// Reads that were answered.
    pub reads: u64,
    /// Writes that were answered.
    pub writes: u64,
    /// Flushes that were answered.
    pub flushes: u64,
    /// Discards that were answered.
    pub discards: u64,
    /// Sectors of 512 bytes that were read.
    pub sectors_read: u64,
    /// Sectors of 512 bytes that were written.
    pub sectors_written: u64,
    /// Requests that were answered with an error: malformed, bad grants, refused by the disk.
    pub errors: u64,
    /// Requests that a dead incarnation had taken, and this one took up again.
    pub replayed: u64,
    /// Granted pages that were mapped.
    pub mapped: u64,
    /// Granted pages that were mapped already, because the frontend's grants are persistent.
    pub persistent_hits: u64,
    /// Sectors of the disk that went through a page of our own.
    pub bounced: u64,
    /// Requests that the disk got.
    pub disk_requests: u64,
}

/// What a round of [`Blkback::poll`] left to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "work may be left that no event will tell of"]
pub struct Progress {
    /// There is more to do: poll again before sleeping.
    pub more_work: bool,
    /// Something is to be done in the store: call [`Blkback::settle`].
    pub store_work: bool,
}

impl Progress {
    /// Nothing.
    pub const IDLE: Self = Self { more_work: false, store_work: false };
}

/// A vbd, for those who ask.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VbdInfo {
    /// Which.
    pub id: VbdId,
    /// Its volume, as the system file names it.
    pub volume: String,
    /// Whether it can only be read.
    pub read_only: bool,
    /// Its size in sectors of 512 bytes; 0 while its volume is not open.
    pub sectors: u64,
    /// Rings that are attached; 0: it is not connected.
    pub queues: usize,
    /// Whether the frontend's grants stay mapped.
    pub persistent: bool,
    /// Why it is not served, if something is wrong.
    pub fault: Option<String>,
    /// Counters since this incarnation connected to it.
    pub stats: VbdStats,
}

/// The backend of all vbds of a driver domain.
pub struct Blkback {
    own: DomainId,
    preserved: Preserved,
    plane: Plane,
    vbds: BTreeMap<VbdId, Vbd>,
    ports: BTreeMap<EventPort, (usize, usize)>,
}

impl Blkback {
    /// A backend in the domain `own`, with the preserved pages as the last incarnation left them,
    /// divided by [`preserved::split`]. No disk may still do what that one wanted.
    #[must_use]
    pub fn new(own: DomainId, preserved: Vec<Page>, bounce: Vec<DmaPage>) -> Self {
        let mut pool = Pool::new(bounce);
        Self {
            own,
            preserved: Preserved::new(preserved.into_iter().next(), &mut pool),
            plane: Plane::new(pool),
            vbds: BTreeMap::new(),
            ports: BTreeMap::new(),
        }
    }

    /// Finds the vbds, begins to open their volumes, takes over those that were connected, and
    /// watches them all.
    ///
    /// # Errors
    /// The store's, when it cannot be used at all. What is wrong with a single vbd is that vbd's
    /// own matter, told in its `error` node.
    pub fn start<E: Env, S: Store, D: Disk>(
        &mut self,
        env: &mut E,
        store: &mut S,
        disks: &mut [D],
    ) -> Result<(), Errno> {
        self.rescan(env, store)?;
        // What needs no reading is open at once.
        self.plane.open_volumes(&mut self.preserved, disks);
        self.settle(env, store, disks)?;
        store.watch(BACKEND_ROOT, BACKEND_TOKEN)
    }

    /// Takes an event of the store. False: it belongs to somebody else.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn store_event<E: Env, S: Store, D: Disk>(
        &mut self,
        env: &mut E,
        store: &mut S,
        disks: &mut [D],
        event: &Event,
    ) -> Result<bool, Errno> {
        if let Some(vbd) = event.token.strip_prefix(FRONTEND_TOKEN) {
            if let Some(id) = parse_vbd(vbd.split('/')) {
                self.refresh(env, store, id)?;
            }
        } else if event.token == BACKEND_TOKEN {
            let below = event.path.strip_prefix(BACKEND_ROOT).unwrap_or_default();
            let mut names = below.split('/').filter(|name| !name.is_empty());
            match parse_vbd(names.by_ref()) {
                Some(id) if vbd::matters(names.next()) => self.refresh(env, store, id)?,
                Some(_) => {}
                None => self.rescan(env, store)?,
            }
        } else {
            return Ok(false);
        }
        self.plane.open_volumes(&mut self.preserved, disks);
        self.settle(env, store, disks)?;
        Ok(true)
    }

    /// Takes an event channel's event. False: the port is not one of a vbd's.
    pub fn event(&mut self, port: EventPort) -> bool {
        let Some(&(place, number)) = self.ports.get(&port) else { return false };
        if let Some(Some(station)) = self.plane.stations.get_mut(place)
            && let Some(queue) = station.link.as_mut().and_then(|it| it.queues.get_mut(number))
        {
            queue.ready = true;
        }
        true
    }

    /// Takes what the disks have completed, takes a batch of requests of each queue, has the
    /// disks start what was queued, and answers the guests.
    ///
    /// Call it after events of vbds, after interrupts of the disks, after [`Self::start`],
    /// [`Self::store_event`] and [`Self::settle`], and again while it has more work.
    pub fn poll<E: Env, D: Disk>(&mut self, env: &mut E, disks: &mut [D]) -> Progress {
        self.plane.poll(env, &mut self.preserved, disks)
    }

    /// Does in the store what the last rounds left to do: connects vbds whose volumes have been
    /// opened, closes those whose frontends broke the protocol.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn settle<E: Env, S: Store, D: Disk>(
        &mut self,
        env: &mut E,
        store: &mut S,
        disks: &mut [D],
    ) -> Result<(), Errno> {
        for place in 0..self.plane.stations.len() {
            let Some(station) = &mut self.plane.stations[place] else { continue };
            let id = station.id;
            if station.removed {
                continue;
            }
            if core::mem::take(&mut station.news) {
                if let VolumeState::Failed(message) = &station.volume
                    && let Some(vbd) = self.vbds.get_mut(&id)
                {
                    vbd.end.report(store, env.now_ns(), message)?;
                }
                self.refresh(env, store, id)?;
            }
            if let Some(message) = self.fault(place) {
                self.give_up(env, store, id, &message)?;
            }
        }
        // A vbd that gave way may have begun to open its volume again.
        self.plane.open_volumes(&mut self.preserved, disks);
        Ok(())
    }

    /// The vbds.
    pub fn vbds(&self) -> impl Iterator<Item = VbdInfo> + '_ {
        self.vbds.iter().map(|(&id, vbd)| {
            let station = self.plane.stations[vbd.place].as_ref();
            let link = station.and_then(|it| it.link.as_ref()).filter(|link| !link.closed);
            let limits = station.and_then(|it| match &it.volume {
                VolumeState::Open(volume) => Some(&volume.limits),
                _ => None,
            });
            VbdInfo {
                id,
                volume: vbd.params.clone(),
                read_only: limits.map_or(vbd.read_only, |limits| limits.read_only),
                sectors: limits.map_or(0, |limits| limits.sectors),
                queues: link.map_or(0, |link| link.queues.len()),
                persistent: link.is_some_and(|link| link.persistent),
                fault: vbd.end.fault().map(Into::into),
                stats: link.map(|link| link.stats).unwrap_or_default(),
            }
        })
    }

    /// Granted pages that are mapped for requests, and requests that disks have.
    #[must_use]
    pub fn in_use(&self) -> (usize, usize) {
        (self.plane.desk.mapped, self.plane.desk.tags.len())
    }

    /// What a frontend did wrong, while it is still connected.
    fn fault(&self, place: usize) -> Option<String> {
        let link = self.plane.stations[place].as_ref()?.link.as_ref()?;
        if link.closed { None } else { link.fault.clone() }
    }

    /// Compares the store's list of vbds with ours.
    fn rescan<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S) -> Result<(), Errno> {
        let listed = device::served(store, self.own, DeviceKind::Vbd)?;
        let ids: Vec<VbdId> = listed
            .iter()
            .map(|device| VbdId { domain: device.frontend, device: device.index })
            .collect();
        let gone: Vec<VbdId> = self.vbds.keys().copied().filter(|id| !ids.contains(id)).collect();
        for id in gone {
            self.remove(env, store, id);
        }
        self.preserved.retain(|id| ids.contains(&id), &mut self.plane.desk.pool);
        for id in ids {
            self.refresh(env, store, id)?;
        }
        Ok(())
    }
}

/// The vbd that the first two names stand for.
fn parse_vbd<'a>(mut names: impl Iterator<Item = &'a str>) -> Option<VbdId> {
    let domain = xenbus::wire::parse_domid(names.next()?)?;
    let device = xenbus::wire::parse_decimal(names.next()?)?;
    Some(VbdId { domain, device })
}

fn frontend_token(id: VbdId) -> String {
    format!("{FRONTEND_TOKEN}{}/{}", id.domain.0, id.device)
}
