//! What the controller says about itself and its namespaces.
//!
//! Source: NVM Express Base Specification 1.4, section 5.15.2 (identify), 5.14.1.1 (errors).

use crate::registers::Capabilities;
use crate::status::Status;
use alloc::string::String;
use core::fmt;
use domain_api::Page;
use domain_api::disk::{Geometry, SECTOR};

/// Buffers of a read or write, at most: one that need not start at its page's start, and a list
/// of so many pages.
pub const MOST_BUFFERS: u16 = LIST_ENTRIES + 1;
/// Entries of a command's PRP list.
pub const LIST_ENTRIES: u16 = 64;
/// Sectors in a page.
const PAGE_SECTORS: u32 = 8;
/// Sectors of a discard, at most: 2 GiB, so that one command does not keep the device for long.
const MOST_DISCARD: u32 = 1 << 22;
/// Blocks of one write of zeros, at most.
const MOST_ZERO_BLOCKS: u32 = 1 << 16;
/// Bytes of an entry of the error log.
pub const ERROR_ENTRY_BYTES: u32 = 64;

fn bytes<const N: usize>(page: &Page, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    page.read(at, &mut bytes);
    bytes
}

fn byte(page: &Page, at: usize) -> u8 {
    bytes::<1>(page, at)[0]
}

/// Printable ASCII without the spaces it is padded with.
fn text<const N: usize>(page: &Page, at: usize) -> String {
    let text: String = bytes::<N>(page, at)
        .into_iter()
        .map(|byte| if (b' '..=b'~').contains(&byte) { char::from(byte) } else { ' ' })
        .collect();
    text.trim().into()
}

/// A controller.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ControllerInfo {
    /// Model.
    pub model: String,
    /// Serial number.
    pub serial: String,
    /// Firmware revision.
    pub firmware: String,
    /// Most sectors of a transfer; `None`: any.
    pub max_sectors: Option<u32>,
    /// Number of namespaces, the last of which has this id.
    pub namespaces: u32,
    /// Whether it knows dataset management.
    pub discard: bool,
    /// Whether it knows write zeroes.
    pub write_zeroes: bool,
    /// Whether it has a volatile write cache.
    pub volatile_cache: bool,
    /// Whether its queue entries may be of 64 and 16 bytes.
    pub ordinary_entries: bool,
}

impl ControllerInfo {
    pub(crate) fn parse(page: &Page, capabilities: Capabilities) -> Self {
        let mdts = u32::from(byte(page, 77));
        let unit_shift = capabilities.page_shift_min() + PAGE_SECTORS.trailing_zeros();
        let max_sectors =
            (mdts != 0).then(|| 1_u32.checked_shl(mdts + unit_shift).unwrap_or(u32::MAX));
        let oncs = u16::from_le_bytes(bytes(page, 520));
        Self {
            serial: text::<20>(page, 4),
            model: text::<40>(page, 24),
            firmware: text::<8>(page, 64),
            max_sectors,
            namespaces: u32::from_le_bytes(bytes(page, 516)),
            discard: oncs & 1 << 2 != 0,
            write_zeroes: oncs & 1 << 3 != 0,
            volatile_cache: byte(page, 525) & 1 != 0,
            ordinary_entries: byte(page, 512) & 0xf <= 6 && byte(page, 513) & 0xf <= 4,
        }
    }
}

/// Why a namespace cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unusable {
    /// The size of its blocks, as a power of two.
    BlockSize(u8),
    /// Its blocks carry so many bytes of metadata.
    Metadata(u16),
    /// Its blocks carry protection information.
    Protection,
    /// It is empty.
    Empty,
    /// The controller refused to describe it.
    Refused(Status),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::BlockSize(shift) => write!(
                f,
                "its blocks are of 2^{shift} bytes; this driver is for 512 and 4096 (nvme format)"
            ),
            Self::Metadata(bytes) => {
                write!(f, "its blocks carry {bytes} bytes of metadata; format it without")
            }
            Self::Protection => {
                f.write_str("its blocks carry protection information; format it without")
            }
            Self::Empty => f.write_str("it is empty"),
            Self::Refused(status) => write!(f, "the controller does not describe it: {status}"),
        }
    }
}

/// The geometry of a namespace from its description.
pub(crate) fn geometry(page: &Page, controller: &ControllerInfo) -> Result<Geometry, Unusable> {
    let format = 128 + 4 * usize::from(byte(page, 26) & 0xf);
    let metadata = u16::from_le_bytes(bytes(page, format));
    let shift = byte(page, format + 2);
    let blocks = u64::from_le_bytes(bytes(page, 0));
    if blocks == 0 {
        return Err(Unusable::Empty);
    }
    if !matches!(shift, 9 | 12) {
        return Err(Unusable::BlockSize(shift));
    }
    if metadata != 0 {
        return Err(Unusable::Metadata(metadata));
    }
    if byte(page, 29) & 7 != 0 {
        return Err(Unusable::Protection);
    }
    let sector_size = 1_u32 << shift;
    let sectors_per_block = sector_size / 512;
    let read_only = byte(page, 99) & 1 != 0;
    let limit = u32::from(LIST_ENTRIES) * PAGE_SECTORS;
    let max_sectors = controller.max_sectors.map_or(limit, |most| most.min(limit));
    let max_buffers = u16::try_from(max_sectors / PAGE_SECTORS + 1).unwrap_or(MOST_BUFFERS);
    let unless = |supported: bool, most: u32| if supported && !read_only { most } else { 0 };
    Ok(Geometry {
        sectors: blocks.saturating_mul(u64::from(sector_size) / SECTOR),
        sector_size,
        physical_sector_size: physical(page, sector_size),
        read_only,
        volatile_cache: controller.volatile_cache,
        max_discard_sectors: unless(controller.discard, MOST_DISCARD),
        max_write_zeroes_sectors: unless(
            controller.write_zeroes,
            MOST_ZERO_BLOCKS * sectors_per_block,
        ),
        max_sectors,
        max_buffers,
        whole_pages: true,
        queue_depth: 0,
    })
}

/// The preferred granularity of writes, where the namespace names one that makes sense.
fn physical(page: &Page, sector_size: u32) -> u32 {
    let named = byte(page, 24) & 1 << 4 != 0;
    let blocks = u32::from(u16::from_le_bytes(bytes(page, 64))) + 1;
    let size = blocks * sector_size;
    if named && size.is_power_of_two() && size <= 1 << 16 { size } else { sector_size }
}

/// A geometry for what is there but cannot be used.
pub(crate) const NOTHING: Geometry = Geometry {
    sectors: 0,
    sector_size: 512,
    physical_sector_size: 512,
    read_only: true,
    volatile_cache: false,
    max_discard_sectors: 0,
    max_write_zeroes_sectors: 0,
    max_sectors: PAGE_SECTORS,
    max_buffers: 1,
    whole_pages: true,
    queue_depth: 0,
};

/// An entry of the controller's error log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ErrorEntry {
    /// How many errors there were in the life of the controller.
    pub count: u64,
    /// The submission queue of the command.
    pub queue: u16,
    /// The command.
    pub command: u16,
    /// Its status.
    pub status: Status,
    /// The first block concerned.
    pub block: u64,
    /// The namespace.
    pub namespace: u32,
}

impl ErrorEntry {
    /// `None` when the log is empty.
    pub(crate) fn parse(page: &Page) -> Option<Self> {
        let count = u64::from_le_bytes(bytes(page, 0));
        (count != 0).then(|| Self {
            count,
            queue: u16::from_le_bytes(bytes(page, 8)),
            command: u16::from_le_bytes(bytes(page, 10)),
            status: Status(u16::from_le_bytes(bytes(page, 12)) >> 1),
            block: u64::from_le_bytes(bytes(page, 16)),
            namespace: u32::from_le_bytes(bytes(page, 24)),
        })
    }
}

impl fmt::Display for ErrorEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "error {} of the controller's log: queue {}, command {:#06x}, namespace {}, block {}: {}",
            self.count, self.queue, self.command, self.namespace, self.block, self.status
        )
    }
}
