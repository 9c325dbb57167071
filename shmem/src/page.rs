//! One shared page.
#![expect(unsafe_code, reason = "raw memory behind a safe, copying interface")]

use alloc::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use alloc::sync::Arc;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use xen_abi::{Gfn, PAGE_SIZE};

/// A page of 4 KiB that others may read and write at any time. Clones name the same page.
///
/// Every access is bounds-checked and panics outside of the page: offsets come from our own
/// layouts, never from a peer.
#[derive(Clone)]
pub struct Page(Arc<Memory>);

struct Memory {
    base: NonNull<u8>,
    ours: bool,
}

// SAFETY: all access to the memory goes through atomics, and the allocation is freed once.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

const LAYOUT: Layout = match Layout::from_size_align(PAGE_SIZE, PAGE_SIZE) {
    Ok(layout) => layout,
    Err(_) => unreachable!(),
};

impl Page {
    /// A fresh page of zeros, from the global allocator; freed with its last clone.
    #[must_use]
    pub fn new_zeroed() -> Self {
        // SAFETY: the layout's size is not zero.
        let base = unsafe { alloc_zeroed(LAYOUT) };
        let base = NonNull::new(base).unwrap_or_else(|| handle_alloc_error(LAYOUT));
        Self(Arc::new(Memory { base, ours: true }))
    }

    /// A page that something else keeps mapped.
    ///
    /// # Safety
    /// 1. `base` is page-aligned, and 4096 bytes from it stay readable and writable (or, if
    ///    nothing is ever stored, readable) until the last clone is dropped.
    /// 2. No Rust reference into these bytes exists in that time.
    #[must_use]
    pub unsafe fn from_raw(base: NonNull<u8>) -> Self {
        Self(Arc::new(Memory { base, ours: false }))
    }

    /// The page's frame number in a unikernel domain, where addresses are guest-physical. On a
    /// host it is a number that no other live page has.
    #[must_use]
    pub fn gfn(&self) -> Gfn {
        Gfn::containing(self.0.base.as_ptr() as u64)
    }

    /// Whether both name the same memory.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.0.base == other.0.base
    }

    /// Number of handles to the page, this one included.
    #[must_use]
    pub fn handles(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset % size_of::<T>() == 0 && offset <= PAGE_SIZE - size_of::<T>());
        // SAFETY: the offset lies inside the page.
        unsafe { self.0.base.as_ptr().add(offset) }.cast()
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: in bounds and aligned by `at`; atomics may be shared.
        unsafe { AtomicU8::from_ptr(self.at(offset)) }
    }

    /// The 16-bit atomic at `offset`, which must be even.
    #[must_use]
    pub fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: in bounds and aligned by `at`; atomics may be shared.
        unsafe { AtomicU16::from_ptr(self.at(offset)) }
    }

    /// The 32-bit atomic at `offset`, a multiple of 4.
    #[must_use]
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: in bounds and aligned by `at`; atomics may be shared.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }
    }

    /// The 64-bit atomic at `offset`, a multiple of 8.
    #[must_use]
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: in bounds and aligned by `at`; atomics may be shared.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }
    }

    /// Copies `buffer.len()` bytes from `offset` on out of the page.
    pub fn read(&self, offset: usize, buffer: &mut [u8]) {
        assert!(buffer.len() <= PAGE_SIZE && offset <= PAGE_SIZE - buffer.len());
        // Whole words where both sides allow it; a peer that writes meanwhile can tear the
        // copy, which is why only the copy is ever looked at.
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            if at % 8 == 0 && rest.len() >= 8 {
                let word = self.u64(at).load(Ordering::Relaxed).to_ne_bytes();
                let (head, tail) = rest.split_at_mut(8);
                head.copy_from_slice(&word);
                rest = tail;
                at += 8;
            } else {
                rest[0] = self.byte(at).load(Ordering::Relaxed);
                rest = &mut rest[1..];
                at += 1;
            }
        }
    }

    /// Copies `bytes` into the page from `offset` on.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(bytes.len() <= PAGE_SIZE && offset <= PAGE_SIZE - bytes.len());
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            if at % 8 == 0 && rest.len() >= 8 {
                let (head, tail) = rest.split_at(8);
                let word = u64::from_ne_bytes(head.try_into().expect("eight bytes"));
                self.u64(at).store(word, Ordering::Relaxed);
                rest = tail;
                at += 8;
            } else {
                self.byte(at).store(rest[0], Ordering::Relaxed);
                rest = &rest[1..];
                at += 1;
            }
        }
    }

    /// Fills the page with zeros.
    pub fn clear(&self) {
        for offset in (0..PAGE_SIZE).step_by(8) {
            self.u64(offset).store(0, Ordering::Relaxed);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.ours {
            // SAFETY: allocated in `new_zeroed` with this layout, and this is the last handle.
            unsafe { dealloc(self.base.as_ptr(), LAYOUT) };
        }
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Page({:#x})", self.gfn().0)
    }
}
