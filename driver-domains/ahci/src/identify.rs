//! What a disk says about itself.
//!
//! Source: ACS-3, §7.12.7 (IDENTIFY DEVICE data); words are of 16 bits, little-endian.

use crate::command::{BLOCK, MAX_BUFFERS, MAX_RANGES, RANGE_SECTORS, ata};
use alloc::string::String;
use core::fmt;
use domain_api::disk::{Geometry, SECTOR};

/// Sectors of a page.
const PAGE_SECTORS: u32 = 8;

/// Why a device is not served.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unusable {
    /// Not an ATA disk: the signature.
    Signature(u32),
    /// It did not become ready.
    NotReady,
    /// It did not answer IDENTIFY DEVICE.
    NotIdentified,
    /// It is older than DMA or addresses of 48 bits.
    Old,
    /// It has sectors of so many bytes.
    SectorSize(u64),
    /// It is locked with a password.
    Locked,
    /// It claims more sectors than there can be.
    Size,
    /// It was exchanged for another one.
    Exchanged,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signature(signature) => {
                write!(f, "not an ATA disk (signature {signature:#010x})")
            }
            Self::NotReady => f.write_str("does not become ready"),
            Self::NotIdentified => f.write_str("does not say what it is"),
            Self::Old => f.write_str("has no DMA or no 48-bit addresses"),
            Self::SectorSize(bytes) => write!(f, "has sectors of {bytes} bytes"),
            Self::Locked => f.write_str("is locked with a password"),
            Self::Size => f.write_str("has an impossible size"),
            Self::Exchanged => f.write_str("is not the disk that was there at the start"),
        }
    }
}

/// What a disk said about itself, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Model.
    pub model: String,
    /// Serial number.
    pub serial: String,
    /// Commands that it queues by itself; 0: it does not.
    pub queue_depth: u32,
    /// Sectors of `1 << sector_shift` times 512 bytes.
    pub lbas: u64,
    /// See `lbas`.
    pub sector_shift: u32,
    /// Bytes of a physical sector.
    pub physical_bytes: u32,
    /// It has a cache that is turned on.
    pub cache: bool,
    /// The command that empties the cache.
    pub flush: Option<u8>,
    /// It can trim.
    pub trim: bool,
}

struct Words<'a>(&'a [u8; BLOCK]);

impl Words<'_> {
    fn word(&self, index: usize) -> u16 {
        u16::from_le_bytes([self.0[2 * index], self.0[2 * index + 1]])
    }

    fn has(&self, index: usize, bit: u32) -> bool {
        self.word(index) >> bit & 1 == 1
    }

    /// Words that say by their two upper bits, 01, that they mean something.
    fn valid(&self, index: usize) -> bool {
        self.word(index) >> 14 == 1
    }

    fn number(&self, index: usize, words: usize) -> u64 {
        (0..words).map(|n| u64::from(self.word(index + n)) << (16 * n)).sum()
    }

    /// Text: the first character of each word is in its upper half.
    fn text(&self, index: usize, words: usize) -> String {
        let bytes = (index..index + words).flat_map(|at| self.word(at).to_be_bytes());
        let text: String =
            bytes.map(|b| if b.is_ascii_graphic() { char::from(b) } else { ' ' }).collect();
        text.trim().into()
    }
}

impl Identity {
    /// Reads the answer of IDENTIFY DEVICE.
    ///
    /// # Errors
    /// It is no disk that can be served.
    pub fn parse(data: &[u8; BLOCK]) -> Result<Self, Unusable> {
        let words = Words(data);
        if words.has(0, 15) {
            return Err(Unusable::NotIdentified); // Not ATA.
        }
        let wide = words.valid(83) && words.has(83, 10);
        if !words.has(49, 8) || !wide {
            return Err(Unusable::Old);
        }
        if words.has(128, 0) && words.has(128, 2) {
            return Err(Unusable::Locked);
        }
        let (sector_shift, physical_bytes) = sector_sizes(&words)?;
        let lbas = words.number(100, 4);
        if lbas == 0 || lbas > 1 << 48 {
            return Err(Unusable::Size);
        }
        let flush = match () {
            () if words.has(83, 13) => Some(ata::FLUSH_CACHE_EXT),
            () if words.has(83, 12) => Some(ata::FLUSH_CACHE),
            () => None,
        };
        let queues = words.word(76) != u16::MAX && words.has(76, 8);
        Ok(Self {
            model: words.text(27, 20),
            serial: words.text(10, 10),
            queue_depth: if queues { u32::from(words.word(75) & 0x1f) + 1 } else { 0 },
            lbas,
            sector_shift,
            physical_bytes,
            cache: words.has(82, 5) && words.has(85, 5),
            flush,
            trim: words.has(169, 0),
        })
    }

    /// Whether it is the same disk.
    pub fn is_same(&self, other: &Self) -> bool {
        self.serial == other.serial && self.model == other.model && self.lbas == other.lbas
    }

    /// The same for whoever submits requests.
    pub fn geometry(&self, queue_depth: u16) -> Geometry {
        let most_trim = (MAX_RANGES * RANGE_SECTORS) << self.sector_shift;
        Geometry {
            sectors: self.lbas << self.sector_shift,
            sector_size: 512 << self.sector_shift,
            physical_sector_size: self.physical_bytes,
            read_only: false,
            volatile_cache: self.cache,
            max_discard_sectors: if self.trim { u32::try_from(most_trim).unwrap_or(0) } else { 0 },
            max_write_zeroes_sectors: 0,
            max_sectors: u32::from(MAX_BUFFERS) * PAGE_SECTORS,
            max_buffers: MAX_BUFFERS,
            whole_pages: false,
            queue_depth,
        }
    }
}

/// Shift from 512 bytes to a logical sector, and bytes of a physical one.
fn sector_sizes(words: &Words<'_>) -> Result<(u32, u32), Unusable> {
    let known = words.valid(106);
    let logical = match known && words.has(106, 12) {
        true => words.number(117, 2).saturating_mul(2),
        false => SECTOR,
    };
    let (shift, bytes) = match logical {
        512 => (0, 512_u32),
        4096 => (3, 4096),
        other => return Err(Unusable::SectorSize(other)),
    };
    let ratio = if known && words.has(106, 13) { u32::from(words.word(106) & 0xf) } else { 0 };
    Ok((shift, bytes << ratio))
}
