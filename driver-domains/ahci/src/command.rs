//! What the controller reads from memory: the command list, and a table for each command.
//!
//! One page per port holds what is small, and each slot has half a page for its table.
//!
//! | page        | bytes       | content                                             |
//! |-------------|-------------|-----------------------------------------------------|
//! | port        | 0..1024     | command list: 32 headers of 32 bytes (§4.2.2)       |
//! |             | 1024..1280  | received FISes (§4.2.1)                             |
//! |             | 1536..1680  | table of the driver's own commands                  |
//! |             | 2048..2560  | their data                                          |
//! | half a page | 0..64       | command FIS (§4.2.3)                                |
//! |             | 128..1536   | up to 88 entries of 16 bytes, one for each buffer   |
//! |             | 1536..2048  | ranges of a trim                                    |
//!
//! | header bytes | content                                                          |
//! |--------------|------------------------------------------------------------------|
//! | 0..2         | FIS length in dwords, 5; bit 6: the command writes               |
//! | 2..4         | entries                                                          |
//! | 4..8         | bytes transferred, by the controller                             |
//! | 8..16        | address of the table                                             |
//!
//! | entry bytes | content                                                           |
//! |-------------|-------------------------------------------------------------------|
//! | 0..8        | address, even                                                     |
//! | 12..16      | length in bytes minus one, at most 4 MiB, even                    |
//!
//! Ordering: all of it is stored before the slot's bit is written to `PxCI`, by the `Release`
//! fence in `Port::issue`.
//!
//! Sources: AHCI 1.3.1, §4; Serial ATA 3.x, register FIS; ATA Command Set 3 (ACS-3), §7.

use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use domain_api::disk::Buffer;
use domain_api::{Dma, DmaPage, Errno};

/// Most buffers of a command.
pub const MAX_BUFFERS: u16 = 88;
/// Most ranges of a trim: a block of 512 bytes of them.
pub const MAX_RANGES: u64 = 64;
/// Most sectors of a range.
pub const RANGE_SECTORS: u64 = 0xffff;

const HEADER_BYTES: usize = 32;
const FIS_AREA: usize = 1024;
const OWN_TABLE: usize = 1536;
const OWN_DATA: usize = 2048;
/// Bytes of the data of an own command, and of a trim's ranges.
pub const BLOCK: usize = 512;

const TABLE_BYTES: usize = 2048;
const ENTRIES: usize = 128;
const RANGES: usize = 1536;
const ENTRY_BYTES: usize = 16;

/// ATA commands.
pub mod ata {
    /// DATA SET MANAGEMENT.
    pub const DATA_SET_MANAGEMENT: u8 = 0x06;
    /// Its feature: TRIM.
    pub const TRIM: u16 = 1;
    /// READ DMA EXT.
    pub const READ_DMA_EXT: u8 = 0x25;
    /// READ LOG EXT.
    pub const READ_LOG_EXT: u8 = 0x2f;
    /// WRITE DMA EXT.
    pub const WRITE_DMA_EXT: u8 = 0x35;
    /// READ FPDMA QUEUED.
    pub const READ_FPDMA: u8 = 0x60;
    /// WRITE FPDMA QUEUED.
    pub const WRITE_FPDMA: u8 = 0x61;
    /// FLUSH CACHE.
    pub const FLUSH_CACHE: u8 = 0xe7;
    /// FLUSH CACHE EXT.
    pub const FLUSH_CACHE_EXT: u8 = 0xea;
    /// IDENTIFY DEVICE.
    pub const IDENTIFY: u8 = 0xec;
    /// Log of the last error of a queued command.
    pub const LOG_QUEUED_ERROR: u64 = 0x10;
}

/// A command as the device gets it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Command {
    /// One of [`ata`].
    pub code: u8,
    /// Feature; of queued commands the number of sectors.
    pub feature: u16,
    /// First sector, 48 bits.
    pub lba: u64,
    /// Number of sectors; of queued commands the tag, in bits 3 and up.
    pub count: u16,
    /// The data goes to the device.
    pub writes: bool,
}

impl Command {
    /// The first 16 bytes of its register FIS; the last 4 are zero.
    fn fis(&self) -> [u8; 16] {
        const FROM_HOST: u8 = 0x27;
        const IS_COMMAND: u8 = 1 << 7;
        const LBA_MODE: u8 = 1 << 6;
        let l = self.lba.to_le_bytes();
        let (f, c) = (self.feature.to_le_bytes(), self.count.to_le_bytes());
        let device = if self.code == ata::IDENTIFY { 0 } else { LBA_MODE };
        let low = [FROM_HOST, IS_COMMAND, self.code, f[0], l[0], l[1], l[2], device];
        let high = [l[3], l[4], l[5], f[1], c[0], c[1], 0, 0];
        let mut fis = [0; 16];
        fis[..8].copy_from_slice(&low);
        fis[8..].copy_from_slice(&high);
        fis
    }
}

/// The memory of one port.
#[derive(Debug)]
pub struct Memory {
    port: DmaPage,
    tables: Vec<DmaPage>,
}

impl Memory {
    /// Memory for `slots` commands.
    ///
    /// # Errors
    /// None is left.
    pub fn new(dma: &mut impl Dma, slots: u32) -> Result<Self, Errno> {
        let port = dma.alloc()?;
        let tables = (0..slots.div_ceil(2)).map(|_| dma.alloc()).collect::<Result<Vec<_>, _>>()?;
        let memory = Self { port, tables };
        for slot in 0..slots {
            let (table, at) = memory.table(slot);
            let address = table.bus_address + at as u64;
            memory.port.page.u64(header(slot) + 8).store(address.to_le(), Relaxed);
        }
        Ok(memory)
    }

    /// Where the controller finds the command list.
    pub fn list_address(&self) -> u64 {
        self.port.bus_address
    }

    /// Where the controller leaves FISes.
    pub fn fis_address(&self) -> u64 {
        self.port.bus_address + FIS_AREA as u64
    }

    /// The highest address that the controller is told of.
    pub fn last_address(&self) -> u64 {
        self.tables.iter().chain([&self.port]).map(|page| page.bus_address).max().unwrap_or(0)
    }

    fn table(&self, slot: u32) -> (&DmaPage, usize) {
        (&self.tables[slot as usize / 2], slot as usize % 2 * TABLE_BYTES)
    }

    /// Writes the command into its slot, without data.
    pub fn put(&self, slot: u32, command: &Command) {
        let (table, at) = self.table(slot);
        table.page.write(at, &command.fis());
        self.put_header(slot, command.writes, 0);
    }

    fn put_header(&self, slot: u32, writes: bool, entries: usize) {
        const FIS_DWORDS: u64 = 5;
        let first = FIS_DWORDS | u64::from(writes) << 6 | (entries as u64) << 16;
        self.port.page.u64(header(slot)).store(first.to_le(), Relaxed);
    }

    /// Makes a command ready to be issued once more.
    pub fn renew(&self, slot: u32) {
        let first = u64::from_le(self.port.page.u64(header(slot)).load(Relaxed));
        let transferred_none = first & 0xffff_ffff;
        self.port.page.u64(header(slot)).store(transferred_none.to_le(), Relaxed);
    }

    fn put_entry(page: &DmaPage, at: usize, address: u64, len: usize) {
        page.page.u64(at).store(address.to_le(), Relaxed);
        let count = (len as u64 - 1) << 32;
        page.page.u64(at + 8).store(count.to_le(), Relaxed);
    }

    /// Writes a command with the submitter's data.
    pub fn put_with_buffers(&self, slot: u32, command: &Command, buffers: &[Buffer<'_>]) {
        let (table, at) = self.table(slot);
        table.page.write(at, &command.fis());
        let entries = (at + ENTRIES..).step_by(ENTRY_BYTES);
        for (entry, buffer) in entries.zip(buffers) {
            Self::put_entry(table, entry, buffer.bus_address(), usize::from(buffer.len));
        }
        self.put_header(slot, command.writes, buffers.len());
    }

    /// Puts a command of the driver's own, which reads a block, into slot 0. What that slot holds
    /// otherwise is to be put back by [`Self::take_own`].
    pub fn put_own(&self, command: &Command) -> OwnCommand {
        let [first, table] = [header(0), header(0) + 8].map(|at| self.port.page.u64(at));
        let saved = OwnCommand { first: first.load(Relaxed), table: table.load(Relaxed) };
        let page = &self.port.page;
        page.write(OWN_DATA, &[0; BLOCK]);
        page.write(OWN_TABLE, &command.fis());
        let data = self.port.bus_address + OWN_DATA as u64;
        Self::put_entry(&self.port, OWN_TABLE + ENTRIES, data, BLOCK);
        table.store((self.port.bus_address + OWN_TABLE as u64).to_le(), Relaxed);
        self.put_header(0, false, 1);
        saved
    }

    /// The data that the own command read; slot 0 is again what it was.
    pub fn take_own(&self, saved: &OwnCommand) -> [u8; BLOCK] {
        self.port.page.u64(header(0)).store(saved.first, Relaxed);
        self.port.page.u64(header(0) + 8).store(saved.table, Relaxed);
        let mut data = [0; BLOCK];
        self.port.page.read(OWN_DATA, &mut data);
        data
    }

    /// Writes a trim of `count` sectors from `lba` on, at most [`MAX_RANGES`] full ranges.
    pub fn put_trim(&self, slot: u32, command: &Command, lba: u64, count: u64) {
        self.put(slot, command);
        let (table, at) = self.table(slot);
        let (mut lba, mut left) = (lba, count);
        for index in 0..BLOCK / 8 {
            let sectors = left.min(RANGE_SECTORS);
            let entry = if sectors == 0 { 0 } else { lba | sectors << 48 };
            table.page.u64(at + RANGES + index * 8).store(entry.to_le(), Relaxed);
            lba += sectors;
            left -= sectors;
        }
        let ranges = table.bus_address + (at + RANGES) as u64;
        Self::put_entry(table, at + ENTRIES, ranges, BLOCK);
        self.put_header(slot, command.writes, 1);
    }
}

/// What slot 0 held before the driver's own command.
#[derive(Debug)]
#[must_use = "slot 0 is to be put back"]
pub struct OwnCommand {
    first: u64,
    table: u64,
}

fn header(slot: u32) -> usize {
    slot as usize * HEADER_BYTES
}
