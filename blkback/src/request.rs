//! What a request says, after everything in it was checked.
//!
//! Everything here works on the private copy of a slot, and of the segments that an indirect
//! request has elsewhere. A request is good or it is answered with an error: nothing in it can
//! end the connection.
//!
//! | request                                             | answer                 |
//! |-----------------------------------------------------|------------------------|
//! | unknown operation, write barrier, secure discard    | `RSP_EOPNOTSUPP`       |
//! | no segments or too many, sectors of a page that are not 0 ≤ first ≤ last ≤ 7 | `RSP_ERROR` |
//! | sectors behind the end, or not whole sectors of the disk | `RSP_ERROR`       |
//! | write or discard on a read-only disk                | `RSP_ERROR`            |
//!
//! The device number in a request is not looked at: the ring says which device is meant. A write
//! barrier is refused rather than split into flush, write and flush, since it is not offered; a
//! frontend that tries one anyway falls back to flushes.
//!
//! Source: `xen/include/public/io/blkif.h`; 32-bit x86 guests pack the same fields without the
//! padding in front of `id`.

use alloc::vec::Vec;
use domain_api::GrantRef;
use shmem::Page;
use xen_abi::blkif::{
    DISCARD, DISCARD_SECURE, DiscardRequest, FLUSH_DISKCACHE, INDIRECT, IndirectRequest,
    MAX_INDIRECT_PAGES, MAX_SEGMENTS, READ, RSP_EOPNOTSUPP, RSP_ERROR, Request, SECTOR,
    SEGMENTS_PER_PAGE, SLOT, Segment, WRITE,
};
use zerocopy::FromBytes;

/// Most segments of an indirect request that we take.
pub const MAX_INDIRECT_SEGMENTS: u16 = 256;
/// Most segments of an indirect request that we offer to take; more than Linux wants.
pub const OFFERED_INDIRECT_SEGMENTS: u16 = 32;
/// Bytes of a slot of a 32-bit guest.
pub const SLOT_32: usize = 108;
/// Bytes of a segment.
const SEGMENT: usize = size_of::<Segment>();

/// What a request wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// Data from the disk, or to it.
    Transfer {
        /// To it.
        write: bool,
        /// First sector.
        sector: u64,
    },
    /// The same; the segments have to be fetched first, see [`parse_segments`].
    Indirect {
        /// To the disk.
        write: bool,
        /// First sector.
        sector: u64,
        /// How many segments.
        segments: u16,
        /// Where they are.
        pages: [GrantRef; MAX_INDIRECT_PAGES],
    },
    /// All that was written and answered becomes durable.
    Flush,
    /// A range is no longer wanted.
    Discard {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
    /// Nothing that can be done; the status says why.
    Refused(i16),
}

/// A request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decoded {
    /// Echoed in the response.
    pub id: u64,
    /// What the response calls the operation.
    pub operation: u8,
    /// What is wanted.
    pub wish: Wish,
}

/// Some sectors of a granted page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// The page.
    pub gref: GrantRef,
    /// Where the page is mapped; means nothing before it is.
    pub mapping: u16,
    /// First sector of the page.
    pub first: u8,
    /// Last sector of the page.
    pub last: u8,
}

impl Part {
    /// Where it begins in the page.
    #[must_use]
    pub fn offset(&self) -> usize {
        usize::from(self.first) * SECTOR
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        usize::from(self.last - self.first + 1) * SECTOR
    }

    fn checked(segment: &Segment) -> Option<Self> {
        let Segment { gref, first_sect: first, last_sect: last, .. } = *segment;
        (first <= last && last <= 7).then_some(Self { gref, mapping: 0, first, last })
    }
}

/// What requests may ask of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// The disk's own sector, in sectors of 512 bytes.
    pub unit: u64,
    /// Whether it may only be read.
    pub read_only: bool,
    /// Whether ranges can be discarded.
    pub discard: bool,
}

impl Limits {
    /// Whether these sectors exist and are whole sectors of the disk; none is too few.
    #[must_use]
    pub fn has(&self, sector: u64, sectors: u64) -> bool {
        sectors > 0
            && sector.checked_add(sectors).is_some_and(|end| end <= self.sectors)
            && sector.is_multiple_of(self.unit)
            && sectors.is_multiple_of(self.unit)
    }
}

/// The slot of a 32-bit guest in the layout of the 64-bit ones.
#[must_use]
pub fn widen(slot: &[u8; SLOT_32]) -> Request {
    let mut wide = [0; SLOT];
    wide[..4].copy_from_slice(&slot[..4]);
    wide[8..].copy_from_slice(&slot[4..]);
    zerocopy::transmute!(wide)
}

/// Reads a request. Its segments, if it has them with it, replace what is in `parts`.
#[must_use]
pub fn decode(request: &Request, limits: &Limits, parts: &mut Vec<Part>) -> Decoded {
    parts.clear();
    let (id, operation) = (request.id, request.operation);
    let wish = match operation {
        READ | WRITE => direct(request, limits, parts),
        FLUSH_DISKCACHE => Wish::Flush,
        DISCARD => discard(&zerocopy::transmute!(*request), limits),
        INDIRECT => {
            let indirect: IndirectRequest = zerocopy::transmute!(*request);
            let wish = indirect_head(&indirect, limits);
            return Decoded { id, operation: indirect.indirect_op, wish };
        }
        _ => Wish::Refused(RSP_EOPNOTSUPP),
    };
    Decoded { id, operation, wish }
}

fn direct(request: &Request, limits: &Limits, parts: &mut Vec<Part>) -> Wish {
    let (write, count) = (request.operation == WRITE, usize::from(request.nr_segments));
    if count == 0 || count > MAX_SEGMENTS {
        return Wish::Refused(RSP_ERROR);
    }
    for segment in &request.segments[..count] {
        let Some(part) = Part::checked(segment) else { return Wish::Refused(RSP_ERROR) };
        parts.push(part);
    }
    transfer(write, request.sector, limits, parts)
}

/// A transfer whose parts are known.
fn transfer(write: bool, sector: u64, limits: &Limits, parts: &[Part]) -> Wish {
    if write && limits.read_only || !limits.has(sector, sectors_of(parts)) {
        return Wish::Refused(RSP_ERROR);
    }
    Wish::Transfer { write, sector }
}

/// Sectors of all parts together.
#[must_use]
pub fn sectors_of(parts: &[Part]) -> u64 {
    parts.iter().map(|part| u64::from(part.last - part.first) + 1).sum()
}

fn indirect_head(request: &IndirectRequest, limits: &Limits) -> Wish {
    let write = match request.indirect_op {
        READ => false,
        WRITE => true,
        _ => return Wish::Refused(RSP_EOPNOTSUPP),
    };
    let segments = request.nr_segments;
    if segments == 0 || segments > MAX_INDIRECT_SEGMENTS || write && limits.read_only {
        return Wish::Refused(RSP_ERROR);
    }
    Wish::Indirect { write, sector: request.sector, segments, pages: request.grefs }
}

fn discard(request: &DiscardRequest, limits: &Limits) -> Wish {
    if !limits.discard || request.flag & DISCARD_SECURE != 0 {
        return Wish::Refused(RSP_EOPNOTSUPP);
    }
    let (sector, sectors) = (request.sector, request.nr_sectors);
    if limits.read_only || !limits.has(sector, sectors) {
        return Wish::Refused(RSP_ERROR);
    }
    Wish::Discard { sector, sectors }
}

/// Pages that hold so many segments of an indirect request.
#[must_use]
pub fn segment_pages(segments: u16) -> usize {
    usize::from(segments).div_ceil(SEGMENTS_PER_PAGE)
}
const _: () = assert!(MAX_INDIRECT_SEGMENTS as usize <= SEGMENTS_PER_PAGE);

/// Reads the segments of an indirect request out of the page that has them, once, and says what
/// is wanted then. What is in `parts` is replaced.
#[must_use]
pub fn parse_segments(
    page: &Page,
    segments: u16,
    write: bool,
    sector: u64,
    limits: &Limits,
    parts: &mut Vec<Part>,
) -> Wish {
    parts.clear();
    for at in 0..usize::from(segments) {
        let mut bytes = [0; SEGMENT];
        page.read(at * SEGMENT, &mut bytes);
        let segment = Segment::read_from_bytes(&bytes).ok();
        let Some(part) = segment.and_then(|segment| Part::checked(&segment)) else {
            parts.clear();
            return Wish::Refused(RSP_ERROR);
        };
        parts.push(part);
    }
    transfer(write, sector, limits, parts)
}
