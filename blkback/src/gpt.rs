//! Finds a partition in a GUID partition table.
//!
//! The primary table is at the disk's second block, the backup in its last one. A table counts
//! only when everything in it agrees: signature, both checksums, its own address, sizes, and
//! partitions inside of the disk. Where the primary one does not, the backup is asked. Entries
//! are read and checked a page at a time, and nothing is believed before the checksum of all
//! of them was right.
//!
//! | bytes of the header | field                | bytes of an entry | field            |
//! |---------------------|----------------------|-------------------|------------------|
//! | 0..8                | "EFI PART"           | 0..16             | type, 0: unused  |
//! | 8..12, 12..16       | revision, size       | 16..32            | unique GUID      |
//! | 16..20              | CRC-32 of the header | 32..40            | first block      |
//! | 24..32              | its own block        | 40..48            | last block       |
//! | 72..80              | first block of the entries | 48..56      | attributes       |
//! | 80..84, 84..88      | entries, bytes of one | 56..128          | name, UTF-16     |
//! | 88..92              | CRC-32 of the entries |                  |                  |
//!
//! Source: UEFI specification 2.10, §5.3.

use alloc::format;
use alloc::string::{String, ToString};
use crc::{CRC_32_ISO_HDLC, Crc};
use domain_api::disk::{DiskError, Geometry, SECTOR};
use xen_abi::PAGE_SIZE;

/// The checksum of headers and entries.
static TABLE: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);
const SIGNATURE: [u8; 8] = *b"EFI PART";
/// Bytes of a header that are always there.
const HEADER: usize = 92;
/// Bytes of an entry that are always there.
const ENTRY: usize = 128;
/// Most bytes of entries that are read: far more than any tool writes.
const MOST_BYTES: u64 = 1 << 20;

/// Which partition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// The one of that name.
    Name(String),
    /// The one with that unique GUID, written in lower case.
    Guid(String),
}

/// What a [`Search`] does next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// These sectors (of 512 bytes) have to be read, at most a page of them.
    Read {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
    /// Here is the partition, in sectors of 512 bytes.
    Found {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
    /// There is none.
    Failed(String),
}

/// Looks for a partition.
pub struct Search {
    wanted: Wanted,
    /// Sectors of 512 bytes in a block of the disk.
    unit: u64,
    /// Blocks of the disk.
    blocks: u64,
    /// What is wrong with the primary table, once that is known.
    primary: Option<&'static str>,
    state: State,
}

enum State {
    /// The header is to be read.
    Header,
    Entries(Scan),
    End(Result<(u64, u64), String>),
}

/// Entries being read.
struct Scan {
    /// First block of the entries.
    block: u64,
    entry_bytes: usize,
    bytes: u64,
    done: u64,
    digest: crc::Digest<'static, u32>,
    crc: u32,
    found: Found,
}

/// Matching entries so far.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Found {
    None,
    One(u64, u64),
    Several,
    /// An entry cannot be right.
    Bad,
}

impl Search {
    /// Begins with the primary table.
    #[must_use]
    pub fn new(wanted: Wanted, geometry: &Geometry) -> Self {
        let unit = (u64::from(geometry.sector_size) / SECTOR).max(1);
        let blocks = geometry.sectors / unit;
        Self { wanted, unit, blocks, primary: None, state: State::Header }
    }

    /// The block of the header that is being read.
    fn header_block(&self) -> u64 {
        if self.primary.is_none() { 1 } else { self.blocks.saturating_sub(1) }
    }

    /// What is to be done.
    #[must_use]
    pub fn step(&self) -> Step {
        match &self.state {
            State::Header => {
                Step::Read { sector: self.header_block() * self.unit, sectors: self.unit }
            }
            State::Entries(scan) => {
                let bytes = (scan.bytes - scan.done).min(PAGE_SIZE as u64);
                // Whole blocks, also where the entries end inside of one.
                let sectors = bytes.div_ceil(SECTOR * self.unit) * self.unit;
                Step::Read { sector: scan.block * self.unit + scan.done / SECTOR, sectors }
            }
            State::End(Ok((first, last))) => {
                Step::Found { sector: first * self.unit, sectors: (last - first + 1) * self.unit }
            }
            State::End(Err(message)) => Step::Failed(message.clone()),
        }
    }

    /// Takes what was read.
    pub fn take(&mut self, data: Result<&[u8], DiskError>) {
        let state = core::mem::replace(&mut self.state, State::Header);
        let next = match (state, data) {
            (State::End(end), _) => Ok(State::End(end)),
            (_, Err(_)) => Err("it cannot be read"),
            (State::Header, Ok(block)) => self.header(block).map(State::Entries),
            (State::Entries(scan), Ok(page)) => self.entries(scan, page),
        };
        self.state = match (next, self.primary) {
            (Ok(state), _) => state,
            (Err(reason), None) => {
                self.primary = Some(reason);
                State::Header
            }
            (Err(reason), Some(primary)) => State::End(Err(format!(
                "the disk has no partition table: primary: {primary}; backup: {reason}"
            ))),
        };
    }

    fn header(&self, block: &[u8]) -> Result<Scan, &'static str> {
        let size = u32_at(block, 12) as usize;
        if block.len() < HEADER || block[..8] != SIGNATURE {
            return Err("no signature");
        }
        if u32_at(block, 8) >> 16 == 0 || size < HEADER || size > block.len() {
            return Err("unknown revision or size");
        }
        let mut digest = TABLE.digest();
        digest.update(&block[..16]);
        digest.update(&[0; 4]);
        digest.update(&block[20..size]);
        if digest.finalize() != u32_at(block, 16) {
            return Err("wrong checksum of the header");
        }
        if u64_at(block, 24) != self.header_block() {
            return Err("the header is of another block");
        }
        let (count, entry_bytes) = (u32_at(block, 80), u32_at(block, 84) as usize);
        let bytes = u64::from(count) * entry_bytes as u64;
        if !(ENTRY..=PAGE_SIZE).contains(&entry_bytes)
            || !entry_bytes.is_power_of_two()
            || bytes == 0
            || bytes > MOST_BYTES
        {
            return Err("impossible entries");
        }
        let first = u64_at(block, 72);
        let length = bytes.div_ceil(SECTOR * self.unit);
        if first < 2 || first.checked_add(length).is_none_or(|end| end > self.blocks) {
            return Err("entries outside of the disk");
        }
        let (digest, crc) = (TABLE.digest(), u32_at(block, 88));
        Ok(Scan { block: first, entry_bytes, bytes, done: 0, digest, crc, found: Found::None })
    }

    fn entries(&self, mut scan: Scan, page: &[u8]) -> Result<State, &'static str> {
        let rest = usize::try_from(scan.bytes - scan.done).unwrap_or(PAGE_SIZE);
        let page = &page[..page.len().min(rest)];
        scan.digest.update(page);
        for entry in page.chunks_exact(scan.entry_bytes) {
            self.look_at(entry, &mut scan.found);
        }
        scan.done += page.len() as u64;
        if scan.done < scan.bytes {
            return Ok(State::Entries(scan));
        }
        if scan.digest.finalize() != scan.crc {
            return Err("wrong checksum of the entries");
        }
        Ok(State::End(match scan.found {
            Found::None => Err("there is no such partition".to_string()),
            Found::One(first, last) => Ok((first, last)),
            Found::Several => Err("several partitions are called so".to_string()),
            Found::Bad => return Err("partitions outside of the disk"),
        }))
    }

    fn look_at(&self, entry: &[u8], found: &mut Found) {
        if entry[..16] == [0; 16] || *found == Found::Bad {
            return;
        }
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        if first < 2 || first > last || last >= self.blocks {
            *found = Found::Bad;
            return;
        }
        let matches = match &self.wanted {
            Wanted::Name(name) => is_name(&entry[56..ENTRY], name),
            Wanted::Guid(guid) => guid_text(&entry[16..32]) == *guid,
        };
        if matches {
            *found = match found {
                Found::None => Found::One(first, last),
                _ => Found::Several,
            };
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |it| u32::from_le_bytes(it.try_into().unwrap_or_default()))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |it| u64::from_le_bytes(it.try_into().unwrap_or_default()))
}

/// Whether UTF-16 that ends at a zero or at the end is this text.
fn is_name(field: &[u8], name: &str) -> bool {
    let units = field.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    units.take_while(|&unit| unit != 0).eq(name.encode_utf16())
}

/// A GUID as it is written: the first three fields are little-endian numbers.
fn guid_text(guid: &[u8]) -> String {
    let [a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, e @ ..] = guid else { return String::new() };
    let mut text = format!(
        "{a3:02x}{a2:02x}{a1:02x}{a0:02x}-{b1:02x}{b0:02x}-{c1:02x}{c0:02x}-{d0:02x}{d1:02x}-"
    );
    for byte in e {
        text += &format!("{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests;
