//! Copy-on-write sparse disks in the qcow2 format, version 3, as state machines without I/O.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod api;

pub use crate::api::{File, Lower, LowerRequest, LowerTag, MIN_PAGES, Setup, State, USUAL_PAGES};

use alloc::collections::VecDeque;
use alloc::string::ToString;
use domain_api::disk::{Busy, Completion, DiskError, Request};

/// An image.
#[derive(Debug)]
pub struct Qcow2 {
    state: State,
    done: VecDeque<Completion>,
}

impl Qcow2 {
    /// Begins to open an image; [`Self::resume`] goes on with it.
    #[must_use]
    pub fn open(setup: Setup) -> Self {
        drop(setup);
        Self { state: State::Failed("not yet".to_string()), done: VecDeque::new() }
    }

    /// How far it is.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
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
        let _ = (lower, request);
        Err(Busy)
    }

    /// Goes on with what had to wait for room below. Call it once after [`Self::open`], and
    /// after [`Lower::submit`] had said [`Busy`] when there may be room again.
    pub fn resume(&mut self, lower: &mut impl Lower) {
        let _ = lower;
    }

    /// Takes the end of a request below.
    pub fn completed(
        &mut self,
        lower: &mut impl Lower,
        tag: LowerTag,
        result: Result<(), DiskError>,
    ) {
        let _ = (lower, tag, result);
    }

    /// The next request of the guest that ended, if any. Ask after every other call.
    #[must_use]
    pub fn next_done(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    /// Whether it has nothing in flight and nothing to do.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.done.is_empty()
    }
}
