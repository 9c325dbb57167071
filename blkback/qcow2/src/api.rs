//! What users of this crate meet: what lies below an image, and what an image needs to be opened.

use alloc::string::String;
use alloc::vec::Vec;
use domain_api::disk::{Buffer, Busy, Geometry, Operation};
use domain_api::{DmaPage, Page};

/// Pages that [`Setup::pages`] must have at least.
pub const MIN_PAGES: usize = 16;
/// Pages with which a disk of some GiB works well: most of them cache tables.
pub const USUAL_PAGES: usize = 64;

/// A volume below an image.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum File {
    /// The one that holds the image.
    Image,
    /// The one that shines through where the image holds nothing. It is only ever read.
    Backing,
}

/// Names a request of an image to the volumes below it; comes back to
/// [`Qcow2::completed`](crate::Qcow2::completed).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LowerTag(pub u32);

/// A request to a volume below an image.
#[derive(Clone, Copy, Debug)]
pub struct LowerRequest<'a> {
    /// Which volume.
    pub file: File,
    /// Its name; in use until it is completed.
    pub tag: LowerTag,
    /// What to do: a read, a write or a flush, nothing else.
    pub operation: Operation,
    /// First sector (of 512 bytes), counted from the start of that volume.
    pub sector: u64,
    /// How many: as many as the buffers hold. Always inside the volume.
    pub sectors: u64,
    /// The data; the disk's [`Geometry`] takes it in one request.
    pub buffers: &'a [Buffer<'a>],
}

/// The volumes below an image.
pub trait Lower {
    /// The disk that a volume is on: its sector size, what it takes in one request, and whether
    /// it has a volatile cache. Its size is of no interest here.
    fn geometry(&self, file: File) -> Geometry;

    /// Queues a request. Its completion is told by [`Qcow2::completed`](crate::Qcow2::completed),
    /// not before this call has returned, in any order among others.
    ///
    /// # Errors
    /// [`Busy`]: nothing was queued. [`Qcow2::resume`](crate::Qcow2::resume) is called when there
    /// is room again.
    fn submit(&mut self, request: LowerRequest<'_>) -> Result<(), Busy>;
}

/// What opening an image needs.
#[derive(Debug)]
pub struct Setup {
    /// Size of the volume that holds the image, in sectors of 512 bytes.
    pub image_sectors: u64,
    /// Size of the backing volume, in sectors of 512 bytes, if there is one. The image says
    /// whether it holds raw data or an image that has no backing itself.
    pub backing_sectors: Option<u64>,
    /// Whether anything may be written.
    pub writable: bool,
    /// Pages for tables and copies that stay the domain's over incarnations ("preserved"), as a
    /// device may still write to them after this incarnation has died; at least [`MIN_PAGES`].
    /// What they hold does not matter.
    pub pages: Vec<DmaPage>,
    /// The journal: a preserved page as the last incarnation left it *for the same volume*, or a
    /// page of zeros.
    pub journal: Page,
}

/// How far an image is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum State {
    /// Its header and tables are being read, and what the last incarnation left is put in order.
    Opening,
    /// It works. The geometry is that of the virtual disk.
    Ready(Geometry),
    /// It cannot be used; the reason, for people. Nothing is in flight below it.
    Failed(String),
}
