//! What a block backend needs of a disk, whatever controller it hangs on.

use crate::DmaPage;
use core::fmt;
use xen_abi::PAGE_SIZE;

/// Bytes of a sector as everything here counts; a disk's own sectors may be larger.
pub const SECTOR: u64 = 512;

/// Names a request of whoever submitted it; comes back in its [`Completion`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Tag(pub u32);

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// From the disk into the buffers.
    Read,
    /// From the buffers to the disk.
    Write,
    /// Makes every write that was completed before durable. Has no sectors.
    Flush,
    /// The content is no longer wanted; it reads as old data or zeros afterwards.
    Discard,
    /// The content becomes zeros. Only where [`Geometry::max_write_zeroes_sectors`] says so.
    WriteZeroes,
}

/// A part of a page that takes part in a request. Buffers follow each other on the disk.
#[derive(Clone, Copy, Debug)]
pub struct Buffer<'a> {
    /// The page; it must stay until the request is completed.
    pub page: &'a DmaPage,
    /// Where in the page; a multiple of 512.
    pub offset: u16,
    /// Bytes; a multiple of 512.
    pub len: u16,
}

impl Buffer<'_> {
    /// Where the device finds it.
    #[must_use]
    pub fn bus_address(&self) -> u64 {
        self.page.bus_address + u64::from(self.offset)
    }
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its name; not in use by another request of the same disk.
    pub tag: Tag,
    /// What to do.
    pub operation: Operation,
    /// First sector (of 512 bytes). A multiple of the disk's own sector size.
    pub sector: u64,
    /// How many; for [`Operation::Read`] and [`Operation::Write`] as many as the buffers hold.
    pub sectors: u64,
    /// The data.
    pub buffers: &'a [Buffer<'a>],
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "its submitter waits for it"]
pub struct Completion {
    /// Which request.
    pub tag: Tag,
    /// Whether all of it was done.
    pub result: Result<(), DiskError>,
}

/// Why a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskError {
    /// The medium could not be read or written.
    Medium,
    /// The disk cannot do such a thing.
    Unsupported,
    /// Sectors behind its end.
    OutOfRange,
    /// It may not be written.
    ReadOnly,
    /// No room is left for the data.
    NoSpace,
    /// It was given up after the controller did not answer.
    Aborted,
    /// The controller reported something else.
    Failed,
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Medium => "medium error",
            Self::Unsupported => "not supported",
            Self::OutOfRange => "beyond the end",
            Self::ReadOnly => "read-only",
            Self::NoSpace => "no space left",
            Self::Aborted => "aborted",
            Self::Failed => "failed",
        })
    }
}

impl core::error::Error for DiskError {}

/// What a disk is, and what its controller takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size, in sectors of 512 bytes.
    pub sectors: u64,
    /// Its own sector: 512 or 4096. Requests are made of whole ones.
    pub sector_size: u32,
    /// What it writes at once without reading first; at least `sector_size`.
    pub physical_sector_size: u32,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// Whether it has a cache that [`Operation::Flush`] empties. Where not, a flush is still
    /// accepted.
    pub volatile_cache: bool,
    /// Most sectors of one discard; 0: it cannot discard.
    pub max_discard_sectors: u32,
    /// Most sectors of one write of zeros; 0: it cannot.
    pub max_write_zeroes_sectors: u32,
    /// Most sectors of one read or write.
    pub max_sectors: u32,
    /// Most buffers of one read or write.
    pub max_buffers: u16,
    /// Whether a buffer that is not the first must start at its page's start, and one that is not
    /// the last must end at its page's end (NVMe's PRP lists).
    pub whole_pages: bool,
    /// Requests that it takes at a time.
    pub queue_depth: u16,
}

impl Geometry {
    /// Whether a read or write with these buffers can be done in one request.
    #[must_use]
    pub fn takes(&self, buffers: &[Buffer<'_>]) -> bool {
        let bytes: u64 = buffers.iter().map(|buffer| u64::from(buffer.len)).sum();
        let last = buffers.len().saturating_sub(1);
        let whole = |(at, buffer): (usize, &Buffer<'_>)| {
            let starts = at == 0 || buffer.offset == 0;
            let ends =
                at == last || usize::from(buffer.offset) + usize::from(buffer.len) == PAGE_SIZE;
            starts && ends
        };
        bytes <= u64::from(self.max_sectors) * SECTOR
            && buffers.len() <= usize::from(self.max_buffers)
            && (!self.whole_pages || buffers.iter().enumerate().all(whole))
    }
}

/// The disk takes no more requests now; the next completion makes room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Busy;

/// A disk behind a controller that the domain owns, or a model of one.
///
/// Requests in flight may be completed in any order. They are idempotent, and whoever submits two
/// that overlap gets either order.
pub trait Disk {
    /// What it is.
    fn geometry(&self) -> &Geometry;

    /// Queues a request. The device is told by [`Self::kick`].
    ///
    /// A request that it cannot do is completed with an error like any other.
    ///
    /// # Errors
    /// [`Busy`]: nothing was queued.
    fn submit(&mut self, request: Request<'_>) -> Result<(), Busy>;

    /// Makes the device aware of what was queued.
    fn kick(&mut self);

    /// The next request that ended, if any.
    fn complete(&mut self) -> Option<Completion>;
}
