//! A page for loom: the first 256 bytes as 32-bit atomics that loom watches, and those words of
//! the shared-info page that events of the first two words of ports touch.
//!
//! Rings are tested with so few slots in use that nothing behind these bytes is touched. Byte
//! copies go by words, so that loom sees slots being read too early. Loom knows no accesses of
//! different sizes to one place: a page is either a ring's or shared info.

use crate::sync::Ordering;
use alloc::vec::Vec;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};
use xen_abi::shared_info::{EVTCHN_MASK, EVTCHN_PENDING, VCPU_PENDING_SEL, VCPU_UPCALL_PENDING};

const WORDS: usize = 64;
/// Offsets of the 64-bit words.
const LONGS: [usize; 5] =
    [VCPU_PENDING_SEL, EVTCHN_PENDING, EVTCHN_PENDING + 8, EVTCHN_MASK, EVTCHN_MASK + 8];

/// The loom double of the real `Page`.
#[derive(Clone, Debug)]
pub struct Page(Arc<Memory>);

#[derive(Debug)]
struct Memory {
    words: Vec<AtomicU32>,
    longs: [AtomicU64; LONGS.len()],
    upcall_pending: AtomicU8,
}

impl Page {
    /// A page of zeros.
    #[must_use]
    pub fn new_zeroed() -> Self {
        Self(Arc::new(Memory {
            words: (0..WORDS).map(|_| AtomicU32::new(0)).collect(),
            longs: LONGS.map(|_| AtomicU64::new(0)),
            upcall_pending: AtomicU8::new(0),
        }))
    }

    /// The 8-bit atomic at `offset`, which must be that of `upcall_pending`.
    #[must_use]
    pub fn u8(&self, offset: usize) -> &AtomicU8 {
        assert_eq!(offset, VCPU_UPCALL_PENDING);
        &self.0.upcall_pending
    }

    /// The 32-bit atomic at `offset`, a multiple of 4.
    #[must_use]
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        assert_eq!(offset % 4, 0);
        &self.0.words[offset / 4]
    }

    /// The 64-bit atomic at `offset`, one of those that events touch.
    #[must_use]
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        let index = LONGS.iter().position(|known| *known == offset);
        &self.0.longs[index.expect("only ports 0 to 127 are modelled")]
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
