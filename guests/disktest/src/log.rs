//! What a run leaves on the disk, so that somebody who finds only the disk can verify it.
//!
//! The first [`LOG_SECTORS`] of the area are 16 slots of 4 KiB; record *k* goes to slot *k* mod
//! 16, in its first sector. A record says: *the changes of the first `flushed` requests were
//! completed before a flush that has been completed*. It is itself durable after the next flush,
//! and a run is never [`MAX_AHEAD`](crate::stream::MAX_AHEAD) requests ahead of a durable record. So
//! the record with the highest counter that is found bounds from both sides what the sectors may
//! hold.

use crate::sector::{Owner, SECTOR, crc32};
use crate::stream::{LOG_SECTORS, Parameters};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// First word of a record: "AXDISKL1".
pub const MAGIC: u64 = u64::from_le_bytes(*b"AXDISKL1");
/// Sectors from one slot to the next.
pub const SLOT_SECTORS: u64 = 8;
const SLOTS: u64 = LOG_SECTORS / SLOT_SECTORS;
const CRC_AT: usize = SECTOR - 4;

/// A record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Record {
    /// [`MAGIC`].
    pub magic: u64,
    /// As in the sectors.
    pub disk: u64,
    /// As in the sectors.
    pub run: u64,
    /// Counts the records of all runs.
    pub counter: u64,
    /// The changes of so many requests are durable.
    pub flushed: u32,
    /// 1 when the run ended with this record: nothing was made afterwards.
    pub ended: u32,
    /// The stream.
    pub parameters: Parameters,
}

impl Record {
    /// Whose sectors it is about.
    #[must_use]
    pub const fn owner(&self) -> Owner {
        Owner { disk: self.disk, run: self.run }
    }

    /// Where it goes.
    #[must_use]
    pub const fn sector(&self) -> u64 {
        self.parameters.area + self.counter % SLOTS * SLOT_SECTORS
    }

    /// Its sector.
    #[must_use]
    pub fn compose(&self) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        bytes[..size_of::<Self>()].copy_from_slice(self.as_bytes());
        let crc = crc32(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the first sector of a slot; `None` when it holds no sound record.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let (record, _) = Self::read_from_prefix(bytes).ok()?;
        let sum = crc32(bytes.get(..CRC_AT)?).to_le_bytes();
        let sound = record.magic == MAGIC && bytes.get(CRC_AT..SECTOR)? == sum;
        (sound && record.parameters.is_sound()).then_some(record)
    }

    /// The newest record among the log's sectors.
    #[must_use]
    pub fn newest(log: &[u8]) -> Option<Self> {
        let slots = log.chunks(SECTOR * 8).filter_map(Self::read);
        slots.max_by_key(|record| record.counter)
    }
}
