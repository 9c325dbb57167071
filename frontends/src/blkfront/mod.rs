//! Block frontend.
//!
//! Data are in pages of our own, [`Buffer`]s, which the frontend lends to its user: a request
//! takes them along, and its [`Completion`] brings them back, so nobody touches a page while the
//! backend works on it. Under [`GrantPolicy::Persistent`] each is granted once for the life of
//! the connection, and a request costs no grant table work at either end;
//! [`GrantPolicy::PerRequest`] grants a page for one request only, and a write's page for reading
//! only, as Linux without persistent grants does.
//!
//! Completions may come in any order. What the backend answers is checked as strictly as by
//! Linux 6.1's blkfront and more strictly: ids are never used twice, so that an answer which comes
//! a second time, or for a request of long ago, is found out even when its slot is in use again.
//! The first impossible answer ends the connection with a [`Fault`] that names it.
//!
//! Life of a device, `state` of our end in brackets:
//!
//! ```text
//!  [1] ──backend 2──▶ rings, keys ──▶ [3] ──backend 4──▶ size ──▶ [4] ──backend 5 or 6, or close()──▶ [6]
//!   ▲                                                                                                 │
//!   └──────────────────────────────────────────────reopen()───────────────────────────────────────────┘
//! ```
//!
//! Requests that a connection's end left without an answer are completed with [`IoError::Lost`].
//!
//! Sources: `xen/include/public/io/blkif.h`, xen-abi §6.4, 6.6, 7.2.

mod buffers;
mod channel;
mod disk;
mod front;

pub use buffers::{Buffer, Part, SECTORS_PER_PAGE};
pub use disk::FrontDisk;
pub use front::Blkfront;

use alloc::format;
use alloc::vec::Vec;
use core::fmt;
use domain_api::{DomainId, Errno, Events, GrantRef, Granter};
use shmem::{Page, PeerError};
use xen_abi::blkif::{MAX_INDIRECT_PAGES, SEGMENTS_PER_PAGE};
use xenbus::{Store, device};

/// What blkfront needs of the core.
pub trait Env: Events + Granter {}
impl<T: Events + Granter> Env for T {}

/// Most queues that a device can have here.
pub const MAX_QUEUES: u16 = 16;
/// A ring has at most two to this power pages.
pub const MAX_RING_PAGE_ORDER: u8 = 4;
const TOKEN: &str = "blkfront/";

/// How pages are granted to the backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GrantPolicy {
    /// Once, for as long as the device is connected (`feature-persistent`).
    Persistent,
    /// For one request each; a page that the backend still holds when it answers is a [`Fault`].
    PerRequest,
}

/// Sizes and policies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Most queues to use, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Each ring has at most two to this power pages; 0 to [`MAX_RING_PAGE_ORDER`].
    pub ring_page_order: u8,
    /// Most parts of a request, where the backend takes indirect ones; 0 to 4096. Up to 11 need
    /// no indirect requests.
    pub indirect_segments: u16,
    /// How pages are granted.
    pub grants: GrantPolicy,
    /// Pages for data, 1 to 4096.
    pub buffers: u16,
}

impl Default for Config {
    fn default() -> Self {
        let grants = GrantPolicy::Persistent;
        Self { queues: 1, ring_page_order: 0, indirect_segments: 32, grants, buffers: 128 }
    }
}

impl Config {
    fn is_sound(&self) -> bool {
        (1..=MAX_QUEUES).contains(&self.queues)
            && self.ring_page_order <= MAX_RING_PAGE_ORDER
            && usize::from(self.indirect_segments) <= MAX_INDIRECT_PAGES * SEGMENTS_PER_PAGE
            && (1..=4096).contains(&self.buffers)
    }
}

/// What no correct backend does. The connection is of no use afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// `rsp_prod` of a ring is impossible.
    Ring(PeerError),
    /// An answer to a request that was never made, or was answered already.
    Id(u64),
    /// An answer that names another operation than its request.
    Operation {
        /// Whose answer.
        id: u64,
        /// The request's operation.
        expected: u8,
        /// The answer's.
        found: u8,
    },
    /// An answer with a status that there is not.
    Status {
        /// Whose answer.
        id: u64,
        /// Its status.
        status: i16,
    },
    /// A page that the backend still held when it answered.
    StillGranted(GrantRef),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => write!(f, "{error}"),
            Self::Id(id) => write!(f, "answer for inactive request {id:#x}"),
            Self::Operation { id, expected, found } => {
                write!(f, "answer to operation {found} for request {id:#x} of operation {expected}")
            }
            Self::Status { id, status } => {
                write!(f, "answer with status {status} for request {id:#x}")
            }
            Self::StillGranted(gref) => write!(f, "grant {} still in use", gref.0),
        }
    }
}

/// Why a request was not taken, or none could be completed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    /// There is no connection, or not any more.
    NotConnected,
    /// No slot or grant is free; the next completion makes room.
    Full,
    /// Sectors behind the disk's end, not whole sectors of the disk, or parts that do not fit.
    BadRequest,
    /// The disk may not be written.
    ReadOnly,
    /// The backend cannot do such a thing.
    Unsupported,
    /// The backend broke the protocol.
    Broken(Fault),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConnected => write!(f, "not connected"),
            Self::Full => write!(f, "all slots are in use"),
            Self::BadRequest => write!(f, "no request that the disk can do"),
            Self::ReadOnly => write!(f, "the disk is read-only"),
            Self::Unsupported => write!(f, "the backend cannot do this"),
            Self::Broken(fault) => write!(f, "{fault}"),
        }
    }
}

impl core::error::Error for Error {}

/// A request that was not taken, and its parts.
#[derive(Debug)]
pub struct Refused {
    /// Why.
    pub error: Error,
    /// What it brought.
    pub parts: Vec<Part>,
}

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// From the disk into the parts.
    Read,
    /// From the parts to the disk.
    Write,
    /// Makes every write that was completed before it was submitted durable.
    Flush,
    /// The content is no longer wanted.
    Discard,
}

/// Why a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoError {
    /// The backend says that it failed.
    Failed,
    /// The backend says that it cannot do such a thing.
    Unsupported,
    /// The connection ended before the answer came: it may have been done or not.
    Lost,
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Failed => "failed",
            Self::Unsupported => "not supported",
            Self::Lost => "the connection ended before the answer",
        })
    }
}

impl core::error::Error for IoError {}

/// How a request ended.
#[derive(Debug)]
#[must_use = "it has the request's buffers"]
pub struct Completion {
    /// As its user named it.
    pub tag: u64,
    /// What it did.
    pub operation: Operation,
    /// Whether all of it was done.
    pub result: Result<(), IoError>,
    /// What it brought; empty for flushes and discards.
    pub parts: Vec<Part>,
}

/// What the backend said about the disk. All sectors are of 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Info {
    /// Its size.
    pub sectors: u64,
    /// Its own sector in bytes; requests are made of whole ones.
    pub sector_size: u32,
    /// What it writes at once, in bytes.
    pub physical_sector_size: u32,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Whether it takes flushes. Where not, completed writes are durable.
    pub flush: bool,
    /// Whether it takes discards.
    pub discard: bool,
    /// Discards take effect in units of so many bytes.
    pub discard_granularity: u32,
    /// Whether the backend keeps granted pages mapped.
    pub persistent: bool,
    /// Most parts of a request.
    pub max_parts: u16,
    /// Queues in use.
    pub queues: u16,
    /// Requests that fit all rings.
    pub slots: u32,
}

/// Counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Reads made.
    pub reads: u64,
    /// Their sectors.
    pub read_sectors: u64,
    /// Writes made.
    pub writes: u64,
    /// Their sectors.
    pub written_sectors: u64,
    /// Flushes made.
    pub flushes: u64,
    /// Discards made.
    pub discards: u64,
    /// Requests answered.
    pub answered: u64,
    /// Of them, with an error.
    pub errors: u64,
    /// Requests whose answer never came.
    pub lost: u64,
    /// Events that we sent.
    pub notifications: u64,
}

impl Stats {
    fn count(&mut self, operation: Operation, sectors: u64) {
        match operation {
            Operation::Read => {
                self.reads += 1;
                self.read_sectors += sectors;
            }
            Operation::Write => {
                self.writes += 1;
                self.written_sectors += sectors;
            }
            Operation::Flush => self.flushes += 1,
            Operation::Discard => self.discards += 1,
        }
    }
}

/// A granted page, kept until the grant is revoked: the backend may still use it.
#[derive(Debug)]
struct Held {
    gref: GrantRef,
    #[expect(dead_code, reason = "held, never looked at")]
    page: Page,
}

/// The numbers of a domain's disks, in order; each is one for [`Blkfront::new`].
///
/// # Errors
/// The store's.
pub fn devices<S: Store>(store: &mut S, own: DomainId) -> Result<Vec<u32>, Errno> {
    let directory = format!("{}/device/vbd", device::home(own));
    let names = match store.directory(&directory) {
        Err(Errno::ENOENT) => Vec::new(),
        other => other?,
    };
    let mut numbers: Vec<u32> = names.iter().filter_map(|name| name.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}
