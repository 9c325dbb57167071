//! Copy-on-write sparse disks in the qcow2 format, version 3, as state machines without I/O.
//!
//! [`Qcow2`] is an image on one volume, perhaps with another volume behind it. It is given the
//! guest's requests and asks its [`Lower`] for requests to the volumes; what a volume is, and
//! which disk it is on, is left to the block backend. Nothing is cached but tables, and those are
//! written through: a request is completed when the medium has it, so that nothing is
//! acknowledged that would die with the driver domain.
//!
//! # What is promised
//!
//! *The driver domain dies, at any instant:* the next incarnation opens the image with the
//! journal page of the last one, and by then the image is in order: `qemu-img check` finds no
//! error and no lost cluster. What was acknowledged is there. What was not acknowledged is there
//! in whole sectors, or not; the backend submits it again.
//!
//! *The power fails:* what was completed before the last completed flush is there. The image has
//! no error, only clusters may be lost that were just being taken or given back; `qemu-img check
//! -r leaks` finds them. This holds because a table never refers to something that is not durable
//! before it, in this order: refcount and data, flush, the entry that refers to them; and the
//! other way round, entry, flush, refcount.
//!
//! *The image lies:* every offset is checked before it is used. A damaged image gives errors,
//! never a panic, and never an access outside of its volume, nor a write of the guest to its
//! header, L1 table, L2 tables, refcount table or refcount blocks.
//!
//! # What is supported
//!
//! Clusters of 4 KiB to 2 MiB; zero clusters of both kinds; internal snapshots made elsewhere
//! (shared clusters are copied before they are written); discard and writes of zeros, which free
//! whole clusters; refcount tables that have to grow; a volume behind the image with plain data
//! or with an image that has nothing behind it. An image grows inside of its volume until that is
//! full ([`DiskError::NoSpace`]).
//!
//! Refused with a message: version 2, encryption, external data files, subclusters, zstd, unknown
//! incompatible features, images with the dirty bit (to be repaired first), and for writing also
//! bitmaps and refcounts of other widths than 16 bits. An image that is marked as corrupt is
//! opened read-only. Compressed clusters are not read: only requests that meet one fail.
//!
//! [`format`] makes new images, and [`check`] looks whether one is in order; the host's tools use
//! both.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod api;
mod cache;
mod change;
pub mod check;
mod engine;
pub mod format;
mod guest;
mod journal;
mod opening;
mod ops;
mod space;

pub use crate::api::{File, Lower, LowerRequest, LowerTag, MIN_PAGES, Setup, State, USUAL_PAGES};

use crate::engine::Engine;
use crate::opening::Opening;
use domain_api::disk::{Busy, Completion, DiskError, Request};

/// An image.
#[derive(Debug)]
pub struct Qcow2 {
    state: State,
    opening: Option<Opening>,
    engine: Engine,
}

impl Qcow2 {
    /// Begins to open an image; [`Self::resume`] goes on with it.
    ///
    /// # Panics
    /// When there are fewer than [`MIN_PAGES`] pages.
    #[must_use]
    pub fn open(setup: Setup) -> Self {
        let (engine, opening) = opening::begin(setup);
        Self { state: State::Opening, opening: Some(opening), engine }
    }

    /// How far it is.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Bytes of a cluster: what a discard frees at once. Known when it is ready.
    #[must_use]
    pub fn cluster_bytes(&self) -> u32 {
        1 << self.engine.image.bits
    }

    /// Queues a request of the guest. Its buffers must be such as the geometry of
    /// [`State::Ready`] takes, and their pages must stay until the request is completed.
    ///
    /// A request that cannot be done is completed with an error like any other. Requests that
    /// were in flight when the last incarnation died are just submitted again, in any order that
    /// the guest would accept.
    ///
    /// # Errors
    /// [`Busy`]: nothing was queued; the next completion makes room. Also while it is not ready.
    pub fn submit(&mut self, lower: &mut impl Lower, request: Request<'_>) -> Result<(), Busy> {
        match self.state {
            State::Ready(_) => self.engine.submit(lower, &request),
            _ => Err(Busy),
        }
    }

    /// Goes on with what had to wait for room below. Call it once after [`Self::open`], and
    /// after [`Lower::submit`] had said [`Busy`] when there may be room again.
    pub fn resume(&mut self, lower: &mut impl Lower) {
        self.engine.ops.was_busy = false;
        match &mut self.opening {
            Some(opening) => match opening.drive(&mut self.engine, lower) {
                Ok(false) => {}
                Ok(true) => {
                    self.opening = None;
                    self.state = State::Ready(self.engine.offered);
                }
                Err(message) => {
                    self.opening = None;
                    self.state = State::Failed(message);
                }
            },
            None => self.engine.run(lower),
        }
    }

    /// Takes the end of a request below.
    pub fn completed(
        &mut self,
        lower: &mut impl Lower,
        tag: LowerTag,
        result: Result<(), DiskError>,
    ) {
        let Some(owner) = self.engine.ops.take(tag) else { return };
        self.engine.completed(owner, result);
        if self.opening.is_some() || self.engine.has_work() {
            self.resume(lower);
        }
    }

    /// The next request of the guest that ended, if any. Ask after every other call.
    #[must_use]
    pub fn next_done(&mut self) -> Option<Completion> {
        self.engine.done.pop_front()
    }

    /// Whether nothing is in flight below, and nothing of the guest's requests is left to do or
    /// to be told.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.engine.ops.in_flight() == 0 && !self.engine.has_work() && self.engine.done.is_empty()
    }
}
