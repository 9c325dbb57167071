//! How the memory of a unikernel domain is laid out.
//!
//! All of a domain's memory is charged to it, its page tables and its tables in the core
//! included. What the image, the stack and the fixed pages of [`axolotl_abi::start`] leave is its
//! heap, less [`overhead_pages`].

use alloc::vec::Vec;
use axolotl_abi::control::POPULATE_PRESERVED;
use axolotl_abi::image::{ACCESS_READ, ACCESS_WRITE, ImageError, ImageHeader, Segment};
use axolotl_abi::start::{
    GRANT_WINDOW_GPA, HEAP_GPA, IMAGE_GPA, PRESERVED_GPA, STACK_PAGES, STACK_TOP_GPA,
    START_INFO_GPA, START_INFO_PAGES, StartInfo, XENSTORE_RING_GPA,
};
use axolotl_abi::system::Domain;
use core::mem::size_of;
use core::ops::Range;

const PAGE: u64 = 4096;
#[expect(clippy::cast_possible_truncation, reason = "32")]
const STACK: u32 = STACK_PAGES as u32;
/// Most bytes of one `LOAD`.
pub const LOAD_BYTES: usize = 65_536;
/// Least heap of a unikernel.
pub const MIN_HEAP_PAGES: u32 = 64;
/// Most memory of a unikernel: what the heap's address range can hold.
pub const MAX_PAGES: u32 = 0x3_0000;
const _: () = assert!(MAX_PAGES as u64 == (GRANT_WINDOW_GPA - HEAP_GPA) / PAGE);
/// Page tables above the leaves, leaf tables for fixed ranges, mapped grants and device registers,
/// and a domain's tables in the core: shared info, grant table, console, ports.
const FIXED_OVERHEAD_PAGES: u32 = 48;

/// What a domain's page tables and its tables in the core need beside `memory` pages.
#[must_use]
pub const fn overhead_pages(memory: u32) -> u32 {
    FIXED_OVERHEAD_PAGES + memory.div_ceil(512)
}

/// Pages of an image.
#[must_use]
pub fn image_pages(segments: &[Segment]) -> u32 {
    segments.iter().fold(0_u32, |sum, segment| sum.saturating_add(segment.pages))
}

/// Bytes of configuration that a domain finds at its start.
#[must_use]
pub fn config_bytes(domain: &Domain) -> usize {
    domain.extra.len()
}

/// Pages of start info with `config_bytes` bytes behind it.
#[must_use]
pub fn start_pages(config_bytes: usize) -> u32 {
    u32::try_from((size_of::<StartInfo>() + config_bytes).div_ceil(xen_abi::PAGE_SIZE))
        .unwrap_or(u32::MAX)
}

/// Least memory of a domain, all included.
#[must_use]
pub fn needed_pages(image: u32, preserved: u32, config_bytes: usize) -> u32 {
    let fixed = without_heap(image, preserved, config_bytes).saturating_add(MIN_HEAP_PAGES);
    fixed.saturating_add(overhead_pages(fixed))
}

/// Image, stack, start info, xenstore ring and preserved pages.
fn without_heap(image: u32, preserved: u32, config_bytes: usize) -> u32 {
    [STACK, 1, start_pages(config_bytes), preserved].into_iter().fold(image, u32::saturating_add)
}

/// Why a domain cannot be laid out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlanError {
    /// The image is damaged.
    Image(ImageError),
    /// The image's entry or a segment lies outside of the range for images, or two segments overlap.
    Layout,
    /// Its memory does not hold image, stack, fixed pages and a least heap.
    TooSmall {
        /// Pages that it would need.
        needed: u32,
    },
    /// The configuration is longer than its range.
    Config,
}

impl core::fmt::Display for PlanError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Image(error) => write!(f, "its image is damaged ({error:?})"),
            Self::Layout => f.write_str("its image leaves the range for images"),
            Self::TooSmall { needed } => write!(f, "it needs {} KiB of memory", needed * 4),
            Self::Config => f.write_str("its `extra` is too long"),
        }
    }
}

/// A range of memory to populate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// First page.
    pub gfn: u64,
    /// Pages.
    pub pages: u32,
    /// `ACCESS_*`.
    pub access: u32,
    /// `POPULATE_*`.
    pub flags: u32,
}

/// Bytes of the image to load.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LoadStep {
    /// Where to.
    pub gpa: u64,
    /// Which bytes of the image, at most [`LOAD_BYTES`].
    pub bytes: Range<usize>,
}

/// Everything that building and rebuilding a domain needs; made once, kept for its life, so that
/// a restart computes nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// First instruction.
    pub entry: u64,
    /// Memory.
    pub regions: Vec<Region>,
    /// The image's bytes.
    pub loads: Vec<LoadStep>,
    /// Pages of heap.
    pub heap_pages: u32,
}

impl Plan {
    /// Lays out a domain of `memory` pages in all, `preserved` of them preserved, that runs the
    /// flat image `image` and gets `config_bytes` bytes of configuration.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn new(
        image: &[u8],
        memory: u32,
        preserved: u32,
        config_bytes: usize,
    ) -> Result<Self, PlanError> {
        let (header, segments) = ImageHeader::check(image).map_err(PlanError::Image)?;
        check_segments(&header, segments)?;
        if u64::from(start_pages(config_bytes)) > START_INFO_PAGES {
            return Err(PlanError::Config);
        }
        let preserved_range = (HEAP_GPA - PRESERVED_GPA) / PAGE;
        let image_pages = image_pages(segments);
        let needed = needed_pages(image_pages, preserved, config_bytes);
        if memory < needed || memory > MAX_PAGES || u64::from(preserved) > preserved_range {
            return Err(PlanError::TooSmall { needed });
        }
        let fixed = without_heap(image_pages, preserved, config_bytes);
        let heap_pages = memory - fixed - overhead_pages(memory);
        let mut regions = fixed_regions(config_bytes, preserved, heap_pages);
        regions.extend(segments.iter().map(|s| region(s.gfn * PAGE, s.pages, s.access)));
        regions.retain(|region| region.pages > 0);
        let loads = segments.iter().flat_map(load_steps).collect();
        Ok(Self { entry: header.entry, regions, loads, heap_pages })
    }
}

const fn region(gpa: u64, pages: u32, access: u32) -> Region {
    Region { gfn: gpa / PAGE, pages, access, flags: 0 }
}

fn fixed_regions(config_bytes: usize, preserved: u32, heap_pages: u32) -> Vec<Region> {
    let both = ACCESS_READ | ACCESS_WRITE;
    let stack = STACK_TOP_GPA - STACK_PAGES * PAGE;
    Vec::from([
        region(START_INFO_GPA, start_pages(config_bytes), ACCESS_READ),
        region(XENSTORE_RING_GPA, 1, both),
        region(stack, STACK, both),
        Region { flags: POPULATE_PRESERVED, ..region(PRESERVED_GPA, preserved, both) },
        region(HEAP_GPA, heap_pages, both),
    ])
}

fn check_segments(header: &ImageHeader, segments: &[Segment]) -> Result<(), PlanError> {
    let range = |s: &Segment| s.gfn..s.gfn + u64::from(s.pages);
    let images = IMAGE_GPA / PAGE..PRESERVED_GPA / PAGE;
    for (at, segment) in segments.iter().enumerate() {
        let pages = range(segment);
        let others = &segments[at + 1..];
        let overlaps = |other: &Segment| {
            let other = range(other);
            pages.start < other.end && other.start < pages.end
        };
        if pages.start < images.start || pages.end > images.end || others.iter().any(overlaps) {
            return Err(PlanError::Layout);
        }
    }
    let entry = segments.iter().any(|segment| range(segment).contains(&(header.entry / PAGE)));
    if entry { Ok(()) } else { Err(PlanError::Layout) }
}

#[expect(clippy::cast_possible_truncation, reason = "offsets into an image in memory")]
fn load_steps(segment: &Segment) -> impl Iterator<Item = LoadStep> {
    // `ImageHeader::check` saw that these bytes lie within the image, which is in memory.
    let start = segment.file_offset as usize;
    let bytes = segment.file_bytes as usize;
    let gpa = segment.gfn * PAGE;
    (0..bytes).step_by(LOAD_BYTES).map(move |at| LoadStep {
        gpa: gpa + at as u64,
        bytes: start + at..start + bytes.min(at + LOAD_BYTES),
    })
}
