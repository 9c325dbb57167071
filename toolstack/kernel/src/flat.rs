//! Writing flat images, see [`axolotl_abi::image`].

use axolotl_abi::image::{ACCESS_READ, ACCESS_WRITE, IMAGE_MAGIC, ImageHeader, Segment};
use std::io::Write;
use zerocopy::IntoBytes;

const PAGE: usize = 4096;

/// Pages of an image, and the bytes in them.
pub(crate) struct Piece<'a> {
    pub(crate) gfn: u64,
    pub(crate) pages: u32,
    /// Zero bytes between the first page's start and the first byte.
    pub(crate) lead: usize,
    pub(crate) bytes: &'a [u8],
}

/// How many pages hold so many bytes; at least one.
pub(crate) fn pages(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(PAGE).max(1)).unwrap_or(u32::MAX)
}

/// Writes an image whose pieces do not overlap. All of a guest's memory is its kernel's to use;
/// what the segments say of access is not enforced.
pub(crate) fn write(entry: u64, pieces: &[Piece<'_>]) -> Vec<u8> {
    let segments = u32::try_from(pieces.len()).unwrap_or(u32::MAX);
    let header = ImageHeader { magic: IMAGE_MAGIC, entry, segments, reserved: 0 };
    let mut table = header.as_bytes().to_vec();
    let mut body = Vec::new();
    let start =
        (size_of::<ImageHeader>() + size_of::<Segment>() * pieces.len()).next_multiple_of(PAGE);
    for piece in pieces {
        let file_bytes = piece.lead + piece.bytes.len();
        let segment = Segment {
            gfn: piece.gfn,
            pages: piece.pages,
            access: ACCESS_READ | ACCESS_WRITE,
            file_offset: (start + body.len()) as u64,
            file_bytes: file_bytes as u64,
        };
        table.extend_from_slice(segment.as_bytes());
        body.resize(body.len() + piece.lead, 0);
        // Writing to memory does not fail.
        let _ = body.write_all(piece.bytes);
        body.resize(body.len().next_multiple_of(PAGE), 0);
    }
    table.resize(start, 0);
    table.append(&mut body);
    table
}
