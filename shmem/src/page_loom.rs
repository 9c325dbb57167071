//! A page for loom: the first 256 bytes only, as 32-bit atomics that loom watches.
//!
//! Rings are tested with so few slots in use that nothing behind these bytes is touched. Byte
//! copies go by words, so that loom sees slots being read too early.

use crate::sync::Ordering;
use alloc::vec::Vec;
use loom::sync::Arc;
use loom::sync::atomic::AtomicU32;

const WORDS: usize = 64;

/// The loom double of the real `Page`.
#[derive(Clone, Debug)]
pub struct Page(Arc<Vec<AtomicU32>>);

impl Page {
    /// A page of zeros.
    #[must_use]
    pub fn new_zeroed() -> Self {
        Self(Arc::new((0..WORDS).map(|_| AtomicU32::new(0)).collect()))
    }

    /// The 32-bit atomic at `offset`, a multiple of 4.
    #[must_use]
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        assert_eq!(offset % 4, 0);
        &self.0[offset / 4]
    }

    /// Copies out of the page, in whole words.
    pub fn read(&self, offset: usize, buffer: &mut [u8]) {
        for (i, bytes) in buffer.chunks_mut(4).enumerate() {
            let word = self.u32(offset + 4 * i).load(Ordering::Relaxed).to_ne_bytes();
            bytes.copy_from_slice(&word[..bytes.len()]);
        }
    }

    /// Copies into the page, in whole words.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        for (i, bytes) in bytes.chunks(4).enumerate() {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            self.u32(offset + 4 * i).store(u32::from_ne_bytes(word), Ordering::Relaxed);
        }
    }
}
