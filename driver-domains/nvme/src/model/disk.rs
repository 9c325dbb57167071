//! A namespace in RAM, with a volatile cache that only a flush empties.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

/// A namespace.
#[derive(Clone, Debug)]
pub struct RamDisk {
    /// Its id.
    pub id: u32,
    /// Bytes of a block, as a power of two.
    pub block_shift: u8,
    /// Number of blocks.
    pub blocks: u64,
    /// Bytes of metadata that it says its blocks have.
    pub metadata: u16,
    /// Protection that it says its blocks have.
    pub protection: u8,
    /// Preferred write granularity that it names, in blocks less one.
    pub preferred: Option<u16>,
    /// Whether it refuses writes.
    pub read_only: bool,
    /// What survives a loss of power. Blocks that are not there are zeros.
    medium: BTreeMap<u64, Box<[u8]>>,
    /// What was written since the last flush.
    cache: BTreeMap<u64, Box<[u8]>>,
}

impl RamDisk {
    /// An empty disk with blocks of 2^`block_shift` bytes.
    #[must_use]
    pub fn new(id: u32, block_shift: u8, blocks: u64) -> Self {
        Self {
            id,
            block_shift,
            blocks,
            metadata: 0,
            protection: 0,
            preferred: None,
            read_only: false,
            medium: BTreeMap::new(),
            cache: BTreeMap::new(),
        }
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        1 << self.block_shift
    }

    /// A block as a reader sees it.
    #[must_use]
    pub fn read(&self, block: u64) -> Vec<u8> {
        match self.cache.get(&block) {
            Some(bytes) => bytes.to_vec(),
            None => self.durable(block),
        }
    }

    /// A block as it would be after a loss of power.
    #[must_use]
    pub fn durable(&self, block: u64) -> Vec<u8> {
        let bytes = self.medium.get(&block);
        bytes.map_or_else(|| vec![0; self.block_bytes()], |bytes| bytes.to_vec())
    }

    /// Writes a block.
    ///
    /// # Panics
    /// When `bytes` is not a block, or outside.
    pub fn write(&mut self, block: u64, bytes: &[u8]) {
        assert!(bytes.len() == self.block_bytes() && block < self.blocks);
        self.cache.insert(block, bytes.into());
    }

    /// Makes everything durable.
    pub fn flush(&mut self) {
        self.medium.append(&mut self.cache);
    }

    /// Forgets what is not durable.
    pub fn lose_power(&mut self) {
        self.cache.clear();
    }
}
