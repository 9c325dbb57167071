//! What a guest may find on its disk, whatever happened in between.

use crate::disk::SECTOR;
use std::collections::{BTreeMap, BTreeSet};

/// Content of a sector that was never written: what is behind the image.
pub const BACKING: u64 = 1 << 40;

/// A write of a sector, or whatever has the same effect.
#[derive(Clone, Copy, Debug)]
struct Write {
    /// What it left; 0 for zeros.
    id: u64,
    begun: u64,
    acknowledged: Option<u64>,
    durable: bool,
}

/// All writes of all sectors.
#[derive(Clone, Debug)]
pub struct Model {
    /// Those that were ever written.
    sectors: BTreeMap<u64, Vec<Write>>,
    len: u64,
    /// What the sectors hold that were never written: that of the backing volume, or zeros.
    backed: u64,
    now: u64,
}

/// The content that write `id` leaves in a sector.
pub fn content(id: u64, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if id != 0 {
        for word in bytes.chunks_exact_mut(16) {
            word[..8].copy_from_slice(&id.to_le_bytes());
            word[8..].copy_from_slice(&sector.to_le_bytes());
        }
    }
    bytes
}

/// Which write left this content in a sector.
pub fn id_of(bytes: &[u8], sector: u64) -> Option<u64> {
    let id = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    (bytes == content(id, sector)).then_some(id)
}

impl Model {
    /// A disk of `len` sectors, the first `backed` of which have something behind them.
    pub fn new(len: u64, backed: u64) -> Self {
        Self { sectors: BTreeMap::new(), len, backed, now: 1 }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    fn start(&self, sector: u64) -> Write {
        let id = if sector < self.backed { BACKING } else { 0 };
        Write { id, begun: 0, acknowledged: Some(0), durable: true }
    }

    /// The sectors that were written, by the numbers of their pages of `unit` sectors.
    pub fn touched(&self, unit: u64) -> BTreeSet<u64> {
        self.sectors.keys().map(|sector| sector / unit).collect()
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// An instant, for [`Self::may_read`].
    pub fn now(&mut self) -> u64 {
        self.tick()
    }

    pub fn begin(&mut self, sectors: core::ops::Range<u64>, id: u64) {
        let begun = self.tick();
        for sector in sectors {
            let write = Write { id, begun, acknowledged: None, durable: false };
            let first = self.start(sector);
            self.sectors.entry(sector).or_insert_with(|| vec![first]).push(write);
        }
    }

    pub fn acknowledge(&mut self, sectors: core::ops::Range<u64>, id: u64) {
        let now = self.tick();
        for sector in sectors {
            let list = self.sectors.get_mut(&sector).expect("was begun");
            let write =
                list.iter_mut().rfind(|write| write.id == id && write.acknowledged.is_none());
            write.expect("was begun").acknowledged = Some(now);
        }
    }

    /// A flush that began at `begun` was acknowledged.
    pub fn flushed(&mut self, begun: u64) {
        for write in self.sectors.values_mut().flatten() {
            write.durable |= write.acknowledged.is_some_and(|at| at < begun);
        }
    }

    /// The power failed: what was not flushed counts as never acknowledged.
    pub fn power_failed(&mut self) {
        for write in self.sectors.values_mut().flatten() {
            if !write.durable {
                write.acknowledged = None;
            }
        }
    }

    /// Whether a read that began at `begun` may have found this in a sector.
    pub fn may_read(&self, sector: u64, id: u64, begun: u64) -> bool {
        let Some(list) = self.sectors.get(&sector) else { return id == self.start(sector).id };
        let is_hidden = |write: &Write| {
            list.iter().any(|other| {
                write.acknowledged.is_some_and(|at| other.begun > at)
                    && other.acknowledged.is_some_and(|at| at < begun)
            })
        };
        list.iter().any(|write| write.id == id && !is_hidden(write))
    }
}

impl Model {
    /// From now on a sector holds just this.
    pub fn settle(&mut self, sector: u64, id: u64) {
        let now = self.tick();
        let write = Write { id, begun: now, acknowledged: Some(now), durable: true };
        self.sectors.insert(sector, vec![write]);
    }
}
