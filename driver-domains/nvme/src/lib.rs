//! A driver for NVMe controllers, as a safe library.
//!
//! It owns the controller's registers and queues, and offers each namespace as a [`Disk`]. It
//! leaves to others: PCI configuration, the routing of MSI-X messages to events, the memory that
//! data are read to and written from, and what is on the disks.
//!
//! Facts are from the NVM Express Base Specification, revision 1.4. `model` (for tests) is the
//! same facts from the other side.
//!
//! # Restarting
//!
//! The driver is restarted in place when its domain dies, so [`Nvme::start`] meets a controller in
//! any state, with commands under way whose data would go to memory that is in use for something
//! else now. Bus mastering was taken away with the last life; it comes back only when the
//! controller was reset (`CC.EN` cleared and `CSTS.RDY` seen to be 0, which ends all commands) and
//! has new queues. Admin commands are given in three batches, so that a start takes three
//! round trips plus the reset.
//!
//! # Costs
//!
//! A request takes no allocation and, by itself, no access to a register: doorbells are rung once
//! for all requests between two calls of [`Disk::kick`], completions are found by their phase
//! in memory, and the controller is told of them when many have come or when the owner is going
//! to sleep ([`Nvme::arm`]).
//!
//! Requests are never cached, merged or delayed here.
//!
//! # Interrupts
//!
//! Vector 0 for the admin queues, which nobody waits for while the controller runs; vectors from
//! 1 on for the I/O queues as far as there are enough, shared otherwise. The owner need not
//! know which one came: it looks at all queues, a load from memory each.
//!
//! # Trust
//!
//! The controller is below this driver, yet a completion is believed only when its queue,
//! identifier and generation are those of a command under way; others are counted, and too many
//! of them are a [`Hang`].
//!
//! # When it fails
//!
//! A command that fails with a status that allows it is tried again, up to three times, a tick
//! apart. A command without an answer is aborted after [`COMMAND_TIMEOUT_NS`]; when even that
//! brings nothing, or the controller says that it is broken, [`Nvme::check`] returns a [`Hang`]:
//! the remedy is a restart, which resets the controller, and whose owner repeats the requests.

#![cfg_attr(not(any(test, feature = "model")), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod admin;
mod command;
mod controller;
mod identify;
mod io;
#[cfg(any(test, feature = "model"))]
pub mod model;
mod namespace;
mod queue;
pub mod registers;
mod start;
mod status;

#[cfg(test)]
mod tests;

#[cfg(doc)]
use domain_api::disk::Disk;

use alloc::rc::Rc;
use alloc::vec::Vec;
use controller::Controller;
use core::cell::RefCell;
use core::fmt;
use domain_api::Registers;

pub use command::Command;
pub use controller::Report;
pub use identify::{ControllerInfo, ErrorEntry, MOST_BUFFERS, Unusable};
pub use io::Failure;
pub use namespace::Namespace;
pub use start::StartError;
pub use status::Status;

/// I/O queues, at most.
pub const MOST_QUEUES: u16 = 4;
/// MSI-X vectors that are of use: one for the admin queues, one for each I/O queue.
pub const MOST_VECTORS: u16 = MOST_QUEUES + 1;
/// Namespaces, at most; further ones are left alone.
pub const MOST_NAMESPACES: u8 = 16;
/// A command that takes longer is aborted.
pub const COMMAND_TIMEOUT_NS: u64 = 10_000_000_000;
/// A controller that has not answered so long after that hangs.
pub const ABORT_TIMEOUT_NS: u64 = 3_000_000_000;

/// The controller does not work any more. The remedy is a restart of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hang {
    /// All registers read as ones: it left the bus.
    Gone,
    /// It reports a fatal error (`CSTS.CFS`).
    Fatal,
    /// It was reset behind our back.
    NotReady,
    /// A command was neither completed nor aborted.
    Timeout,
    /// It does not answer admin commands.
    Admin,
    /// It completes commands that are not under way.
    Strays,
}

impl fmt::Display for Hang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gone => "the controller does not answer on the bus",
            Self::Fatal => "the controller reports a fatal error",
            Self::NotReady => "the controller is not ready any more",
            Self::Timeout => "the controller neither completed nor aborted a command",
            Self::Admin => "the controller does not answer admin commands",
            Self::Strays => "the controller completes commands that are not under way",
        })
    }
}

impl core::error::Error for Hang {}

/// Counts since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Statistics {
    /// Commands that failed and were given again.
    pub retries: u64,
    /// Completions of no command that is under way.
    pub strays: u64,
    /// Commands that the controller was asked to abort.
    pub aborts: u64,
}

/// A running controller.
#[derive(Debug)]
pub struct Nvme<R> {
    controller: Rc<RefCell<Controller<R>>>,
    info: ControllerInfo,
    namespaces: Vec<Namespace<R>>,
}

impl<R: Registers> Nvme<R> {
    /// What the controller says about itself.
    #[must_use]
    pub fn info(&self) -> &ControllerInfo {
        &self.info
    }

    /// Its active namespaces, in the order of their ids.
    pub fn namespaces(&mut self) -> &mut [Namespace<R>] {
        &mut self.namespaces
    }

    /// Number of I/O queues.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.controller.borrow().queues.len()
    }

    /// To be called before the owner waits for interrupts. Returns whether requests have ended
    /// already, in which case it asks for them rather than wait.
    pub fn arm(&mut self) -> bool {
        self.controller.borrow_mut().arm()
    }

    /// Looks after the controller now and then, say four times a second: whether it is well,
    /// whether commands take too long, and what its error log says after one failed. `now_ns` is
    /// the system time. A report comes at most once in a minute.
    ///
    /// # Errors
    /// The controller hangs.
    pub fn check(&mut self, now_ns: u64) -> Result<Option<Report>, Hang> {
        self.controller.borrow_mut().check(now_ns)
    }

    /// Counts since the start.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.controller.borrow().statistics
    }
}
