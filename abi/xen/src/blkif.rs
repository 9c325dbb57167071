//! Block ring entries.
//!
//! Sector numbers and counts are in units of 512 bytes, whatever the disk's own sector size is.
//!
//! Source: `xen/include/public/io/blkif.h`; the layout is that of 64-bit guests (`protocol`
//! "x86_64-abi").

use crate::GrantRef;
use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a slot.
pub const SLOT: usize = 112;
/// Bytes of a sector as the ring counts.
pub const SECTOR: usize = 512;
/// Most segments of a request that carries them in its slot.
pub const MAX_SEGMENTS: usize = 11;
/// Most pages of segments of an indirect request.
pub const MAX_INDIRECT_PAGES: usize = 8;
/// Segments in a page of an indirect request.
pub const SEGMENTS_PER_PAGE: usize = 512;
/// The value of `protocol` for this layout.
pub const PROTOCOL: &str = "x86_64-abi";

/// Operation: read.
pub const READ: u8 = 0;
/// Operation: write.
pub const WRITE: u8 = 1;
/// Operation: write, in order with all before and behind it.
pub const WRITE_BARRIER: u8 = 2;
/// Operation: make all writes that were completed before durable.
pub const FLUSH_DISKCACHE: u8 = 3;
/// Operation: the content of a range is no longer wanted.
pub const DISCARD: u8 = 5;
/// Operation: a read or write whose segments are in pages of their own.
pub const INDIRECT: u8 = 6;

/// `DiscardRequest::flag`: so that nobody can read it again.
pub const DISCARD_SECURE: u8 = 1;

/// Response status: done.
pub const RSP_OKAY: i16 = 0;
/// Response status: failed.
pub const RSP_ERROR: i16 = -1;
/// Response status: not supported.
pub const RSP_EOPNOTSUPP: i16 = -2;

/// Bit of the key `info`: a CD-ROM drive.
pub const INFO_CDROM: u32 = 1;
/// Bit of the key `info`: removable.
pub const INFO_REMOVABLE: u32 = 2;
/// Bit of the key `info`: read-only.
pub const INFO_READ_ONLY: u32 = 4;

/// The number of the disk named `name`, whole disks only: `xvda` is 51712, the next ones follow in
/// steps of 16, from the seventeenth on in the extended form.
///
/// Source: `docs/man/xen-vbd-interface.7.pandoc`.
#[must_use]
pub fn device_number(name: &str) -> Option<u32> {
    let letter = name.strip_prefix("xvd")?.as_bytes();
    match letter {
        [letter @ b'a'..=b'p'] => Some(202 << 8 | u32::from(letter - b'a') << 4),
        [letter @ b'q'..=b'z'] => Some(1 << 28 | u32::from(letter - b'a') << 8),
        _ => None,
    }
}

/// `struct blkif_request_segment`: sectors `first_sect..=last_sect` of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Segment {
    /// The page.
    pub gref: GrantRef,
    /// First sector of it, 0 to 7.
    pub first_sect: u8,
    /// Last sector of it, 0 to 7.
    pub last_sect: u8,
    /// Padding.
    pub pad: u16,
}
const _: () = assert!(size_of::<Segment>() == 8);

/// `struct blkif_request`: a slot. `operation` says what the bytes behind the common ones are;
/// for [`DISCARD`] and [`INDIRECT`] use [`DiscardRequest`] and [`IndirectRequest`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Request {
    /// [`READ`] …
    pub operation: u8,
    /// Segments in use; 0 for a flush.
    pub nr_segments: u8,
    /// The device's number.
    pub handle: u16,
    /// Padding.
    pub pad: u32,
    /// Echoed in the response.
    pub id: u64,
    /// First sector on the disk.
    pub sector: u64,
    /// Where the data are.
    pub segments: [Segment; MAX_SEGMENTS],
}
const _: () = assert!(size_of::<Request>() == SLOT && offset_of!(Request, segments) == 24);

/// `struct blkif_request_discard`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DiscardRequest {
    /// [`DISCARD`].
    pub operation: u8,
    /// 0 or [`DISCARD_SECURE`].
    pub flag: u8,
    /// The device's number.
    pub handle: u16,
    /// Padding.
    pub pad: u32,
    /// Echoed in the response.
    pub id: u64,
    /// First sector on the disk.
    pub sector: u64,
    /// How many.
    pub nr_sectors: u64,
    /// Rest of the slot.
    pub rest: [u64; 10],
}
const _: () = assert!(size_of::<DiscardRequest>() == SLOT);
const _: () = assert!(offset_of!(DiscardRequest, nr_sectors) == 24);

/// `struct blkif_request_indirect`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IndirectRequest {
    /// [`INDIRECT`].
    pub operation: u8,
    /// [`READ`] or [`WRITE`]; what the response names.
    pub indirect_op: u8,
    /// Segments in use.
    pub nr_segments: u16,
    /// Padding.
    pub pad: u32,
    /// Echoed in the response.
    pub id: u64,
    /// First sector on the disk.
    pub sector: u64,
    /// The device's number.
    pub handle: u16,
    /// Padding.
    pub pad2: u16,
    /// Pages of [`SEGMENTS_PER_PAGE`] segments each.
    pub grefs: [GrantRef; MAX_INDIRECT_PAGES],
    /// Rest of the slot.
    pub rest: [u32; 13],
}
const _: () = assert!(size_of::<IndirectRequest>() == SLOT);
const _: () = assert!(offset_of!(IndirectRequest, grefs) == 28);

/// `struct blkif_response`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Response {
    /// From the request.
    pub id: u64,
    /// Of the request; of an indirect one its `indirect_op`.
    pub operation: u8,
    /// Padding.
    pub pad: u8,
    /// `RSP_*`.
    pub status: i16,
    /// Padding.
    pub pad2: u32,
}
const _: () = assert!(size_of::<Response>() == 16 && offset_of!(Response, status) == 10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_have_the_numbers_of_the_interface() {
        assert_eq!(device_number("xvda"), Some(51712));
        assert_eq!(device_number("xvdb"), Some(51728));
        assert_eq!(device_number("xvdp"), Some(51952));
        assert_eq!(device_number("xvdq"), Some(0x1000_1000));
        for name in ["", "xvd", "xvdA", "xvdaa", "xvda1", "sda"] {
            assert_eq!(device_number(name), None, "{name}");
        }
    }
}
