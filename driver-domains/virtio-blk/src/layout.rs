//! The device's configuration, and a request in memory.
//!
//! | bytes of a slot | content                                       | written by |
//! |-----------------|-----------------------------------------------|------------|
//! | 0..4            | what to do                                    | driver     |
//! | 8..16           | first sector, of reads and writes             | driver     |
//! | 16..24          | first sector, of discards and write zeroes    | driver     |
//! | 24..28          | sectors of those                              | driver     |
//! | 28..32          | flags of those, 0                             | driver     |
//! | 32              | how it ended                                  | device     |
//!
//! Source: VIRTIO 1.1, §5.2.3 (features), §5.2.4 (configuration), §5.2.6 (requests).

use crate::{EXTRA, MAX_BUFFERS, SLOTS};
use domain_api::disk::Geometry;
use virtio::{ConfigError, StartError, Transport};

/// Bytes of a slot.
pub const SLOT_BYTES: usize = 64;
/// Bytes of a request's header.
pub const HEADER: u32 = 16;
/// Bytes of a range of sectors.
pub const RANGE: u32 = 16;
/// Where in a slot the device says how the request ended.
pub const STATUS: usize = 32;

/// What to do.
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// How it ended.
pub mod status {
    /// Well.
    pub const OK: u8 = 0;
    /// An error.
    pub const IO_ERROR: u8 = 1;
    /// The device cannot do it.
    pub const UNSUPPORTED: u8 = 2;
    /// Not yet; none of the device's.
    pub const NONE: u8 = 0xff;
}

/// Features.
pub mod feature {
    /// The largest buffer is in the configuration.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// The number of buffers is in the configuration.
    pub const SEG_MAX: u64 = 1 << 2;
    /// Writes are refused.
    pub const READ_ONLY: u64 = 1 << 5;
    /// The size of sectors is in the configuration.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// There is a cache, and a flush.
    pub const FLUSH: u64 = 1 << 9;
    /// The size of physical sectors is in the configuration.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// There is a discard.
    pub const DISCARD: u64 = 1 << 13;
    /// Zeros can be written without data.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// All that the driver knows.
    pub const WANTED: u64 =
        SIZE_MAX | SEG_MAX | READ_ONLY | BLK_SIZE | FLUSH | TOPOLOGY | DISCARD | WRITE_ZEROES;
}

/// Sectors of a page.
const PAGE_SECTORS: u32 = 8;

/// The configuration, checked.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    features: u64,
    sectors: u64,
    buffers: u32,
    sector_size: u32,
    physical_sector_size: u32,
    discard_sectors: u32,
    write_zeroes_sectors: u32,
}

impl Config {
    /// Reads what the agreed `features` say is there.
    ///
    /// # Errors
    /// It is too short, or says what cannot be.
    pub fn read(transport: &impl Transport, features: u64) -> Result<Self, StartError> {
        let read = || transport.read_consistent(|| Self::fetch(transport, features));
        let config = read().map_err(|_| StartError::Config("it is too short"))?;
        let Self { sectors, sector_size, .. } = config;
        if !matches!(sector_size, 512 | 4096) {
            return Err(StartError::Config("sectors of neither 512 nor 4096 bytes"));
        }
        if sectors > 1 << 54 || sectors % u64::from(sector_size / 512) != 0 {
            return Err(StartError::Config("an impossible size"));
        }
        if config.buffers == 0 {
            return Err(StartError::Config("no buffers, or none of a page"));
        }
        Ok(config)
    }

    fn fetch(transport: &impl Transport, features: u64) -> Result<Self, ConfigError> {
        let has = |feature| features & feature != 0;
        let word = |offset| transport.read_config_space::<u32>(offset);
        let when = |on: bool, offset, other| if on { word(offset) } else { Ok(other) };
        let sectors = u64::from(word(0)?) | u64::from(word(4)?) << 32;
        let largest = when(has(feature::SIZE_MAX), 8, u32::MAX)?;
        let buffers = when(has(feature::SEG_MAX), 12, 1)?;
        let sector_size = when(has(feature::BLK_SIZE), 20, 512)?;
        let exponent = match has(feature::TOPOLOGY) {
            true => transport.read_config_space::<u8>(24)?,
            false => 0,
        };
        let ranges = |on: bool, sectors, ranges| -> Result<u32, ConfigError> {
            Ok(if on && word(ranges)? != 0 { word(sectors)? } else { 0 })
        };
        Ok(Self {
            features,
            sectors,
            buffers: if largest < 4096 { 0 } else { buffers },
            sector_size,
            physical_sector_size: sector_size.wrapping_shl(u32::from(exponent.min(8))),
            discard_sectors: ranges(has(feature::DISCARD), 36, 40)?,
            write_zeroes_sectors: ranges(has(feature::WRITE_ZEROES), 48, 52)?,
        })
    }

    /// The same for whoever submits requests, with a queue of `size`.
    pub fn geometry(&self, size: u16) -> Geometry {
        let buffers = self.buffers.min(MAX_BUFFERS).min(u32::from(size - EXTRA));
        let whole = |sectors: u32| sectors - sectors % (self.sector_size / 512);
        Geometry {
            sectors: self.sectors,
            sector_size: self.sector_size,
            physical_sector_size: self.physical_sector_size,
            read_only: self.features & feature::READ_ONLY != 0,
            volatile_cache: self.features & feature::FLUSH != 0,
            max_discard_sectors: whole(self.discard_sectors),
            max_write_zeroes_sectors: whole(self.write_zeroes_sectors),
            max_sectors: buffers * PAGE_SECTORS,
            max_buffers: u16::try_from(buffers).unwrap_or(1),
            whole_pages: false,
            queue_depth: SLOTS.min(size / (1 + EXTRA)),
        }
    }
}
