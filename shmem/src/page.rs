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
    keeper: Keeper,
    /// In a simulation, where addresses are not guest-physical.
    #[cfg(feature = "sim")]
    gfn: Option<Gfn>,
}

impl Memory {
    const fn new(base: NonNull<u8>, keeper: Keeper) -> Self {
        Self {
            base,
            keeper,
            #[cfg(feature = "sim")]
            gfn: None,
        }
    }
}

/// Who sees to it that the memory stays.
enum Keeper {
    /// We allocated it, and free it.
    Allocated,
    /// Another group of handles, kept alive by this one.
    Alias(#[expect(dead_code, reason = "held, never looked at")] Page),
    /// Whoever called [`Page::from_raw`].
    Caller,
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
        #[cfg(feature = "sim")]
        if let Some(page) = crate::sim::allocate() {
            return page;
        }
        // SAFETY: the layout's size is not zero.
        let base = unsafe { alloc_zeroed(LAYOUT) };
        let base = NonNull::new(base).unwrap_or_else(|| handle_alloc_error(LAYOUT));
        Self(Arc::new(Memory::new(base, Keeper::Allocated)))
    }

    /// A page that something else keeps mapped.
    ///
    /// # Safety
    /// 1. `base` is page-aligned, and 4096 bytes from it stay readable and writable (or, if
    ///    nothing is ever stored, readable) until the last clone is dropped.
    /// 2. No Rust reference into these bytes exists in that time.
    #[must_use]
    pub unsafe fn from_raw(base: NonNull<u8>) -> Self {
        Self(Arc::new(Memory::new(base, Keeper::Caller)))
    }

    /// Another name for the same memory, whose handles are counted by themselves.
    #[must_use]
    pub fn alias(&self) -> Self {
        #[cfg(feature = "sim")]
        if let Some(gfn) = self.0.gfn {
            return self.alias_at(gfn);
        }
        Self(Arc::new(Memory::new(self.0.base, Keeper::Alias(self.clone()))))
    }

    /// As [`Self::alias`], for a domain of a simulation that has the memory at `gfn`.
    #[cfg(feature = "sim")]
    #[must_use]
    pub fn alias_at(&self, gfn: Gfn) -> Self {
        let mut memory = Memory::new(self.0.base, Keeper::Alias(self.clone()));
        memory.gfn = Some(gfn);
        Self(Arc::new(memory))
    }

    /// The page's frame number in a unikernel domain, where addresses are guest-physical. On a
    /// host it is a number that no other live page has.
    #[must_use]
    pub fn gfn(&self) -> Gfn {
        #[cfg(feature = "sim")]
        if let Some(gfn) = self.0.gfn {
            return gfn;
        }
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
        assert!(offset.is_multiple_of(size_of::<T>()) && offset <= PAGE_SIZE - size_of::<T>());
        // SAFETY: the offset lies inside the page.
        unsafe { self.0.base.as_ptr().add(offset) }.cast()
    }

    fn word8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: in bounds and aligned by `at`; atomics may be shared.
        unsafe { AtomicU8::from_ptr(self.at(offset)) }
    }

    fn word16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: in bounds and aligned by `at`; atomics may be shared.
        unsafe { AtomicU16::from_ptr(self.at(offset)) }
    }

    fn word32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: in bounds and aligned by `at`; atomics may be shared.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }
    }

    fn word64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: in bounds and aligned by `at`; atomics may be shared.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }
    }

    /// The 8-bit atomic at `offset`.
    #[must_use]
    pub fn u8(&self, offset: usize) -> &AtomicU8 {
        announce();
        self.word8(offset)
    }

    /// The 16-bit atomic at `offset`, which must be even.
    #[must_use]
    pub fn u16(&self, offset: usize) -> &AtomicU16 {
        announce();
        self.word16(offset)
    }

    /// The 32-bit atomic at `offset`, a multiple of 4.
    #[must_use]
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        announce();
        self.word32(offset)
    }

    /// The 64-bit atomic at `offset`, a multiple of 8.
    #[must_use]
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        announce();
        self.word64(offset)
    }

    /// Copies `buffer.len()` bytes from `offset` on out of the page.
    ///
    /// Copies whole words where it can. A peer that writes meanwhile can tear the copy, which is
    /// why only the copy is ever looked at.
    #[inline]
    pub fn read(&self, offset: usize, buffer: &mut [u8]) {
        assert!(buffer.len() <= PAGE_SIZE && offset <= PAGE_SIZE - buffer.len());
        let Edges { head, body } = Edges::of(offset, buffer.len());
        let (head, rest) = buffer.split_at_mut(head);
        let (body, tail) = rest.split_at_mut(body);
        self.read_edge(offset, head);
        let at = offset + head.len();
        let (chunks, _) = body.as_chunks_mut();
        let words = self.words(at, chunks.len());
        for (chunk, word) in chunks.iter_mut().zip(words) {
            *chunk = word.load(Ordering::Relaxed).to_ne_bytes();
        }
        self.read_edge(at + body.len(), tail);
    }

    /// Copies a few bytes, on one side of whole words.
    #[inline]
    fn read_edge(&self, offset: usize, buffer: &mut [u8]) {
        if !buffer.is_empty() {
            announce();
        }
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let step = step(at, rest.len());
            let (part, tail) = core::mem::take(&mut rest).split_at_mut(step);
            match step {
                8 => part.copy_from_slice(&self.word64(at).load(Ordering::Relaxed).to_ne_bytes()),
                4 => part.copy_from_slice(&self.word32(at).load(Ordering::Relaxed).to_ne_bytes()),
                _ => part[0] = self.word8(at).load(Ordering::Relaxed),
            }
            at += step;
            rest = tail;
        }
    }

    /// Copies `bytes` into the page from `offset` on, whole words where it can.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(bytes.len() <= PAGE_SIZE && offset <= PAGE_SIZE - bytes.len());
        let Edges { head, body } = Edges::of(offset, bytes.len());
        let (head, rest) = bytes.split_at(head);
        let (body, tail) = rest.split_at(body);
        self.write_edge(offset, head);
        let at = offset + head.len();
        let (chunks, _) = body.as_chunks();
        for (chunk, word) in chunks.iter().zip(self.words(at, chunks.len())) {
            word.store(u64::from_ne_bytes(*chunk), Ordering::Relaxed);
        }
        self.write_edge(at + body.len(), tail);
    }

    /// Copies a few bytes, on one side of whole words.
    #[inline]
    fn write_edge(&self, offset: usize, bytes: &[u8]) {
        if !bytes.is_empty() {
            announce();
        }
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let step = step(at, rest.len());
            let (part, tail) = rest.split_at(step);
            match *part {
                [a, b, c, d, e, f, g, h] => {
                    let word = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
                    self.word64(at).store(word, Ordering::Relaxed);
                }
                [a, b, c, d] => {
                    self.word32(at).store(u32::from_ne_bytes([a, b, c, d]), Ordering::Relaxed);
                }
                _ => self.word8(at).store(part[0], Ordering::Relaxed),
            }
            at += step;
            rest = tail;
        }
    }

    /// So many words from `offset` on.
    #[inline]
    fn words(&self, offset: usize, count: usize) -> &[AtomicU64] {
        if count == 0 {
            return &[];
        }
        assert!(count <= (PAGE_SIZE - offset) / 8);
        // SAFETY: in bounds by the assertion and aligned by `at`; atomics may be shared, and the
        // memory lives as long as this handle.
        unsafe { core::slice::from_raw_parts(self.at::<AtomicU64>(offset), count) }
    }

    /// Fills the page with zeros.
    pub fn clear(&self) {
        announce();
        for offset in (0..PAGE_SIZE).step_by(8) {
            self.word64(offset).store(0, Ordering::Relaxed);
        }
    }
}

/// Tells a simulation that there is an access.
#[inline]
fn announce() {
    #[cfg(feature = "sim")]
    crate::sim::access();
}

/// The bytes of a copy that are its first accesses, and those that follow in whole words. Some
/// more follow those: there is an announced access at both ends of a copy that needs several.
struct Edges {
    head: usize,
    body: usize,
}

impl Edges {
    #[inline]
    const fn of(offset: usize, len: usize) -> Self {
        let to_word = offset.wrapping_neg() % 8;
        // Where the copy starts at a word, that word is the first access.
        let head = if to_word == 0 { 8 } else { to_word };
        if len <= head {
            return Self { head: len, body: 0 };
        }
        Self { head, body: (len - head - 1) / 8 * 8 }
    }
}

/// How many of the next `len` bytes at `offset` one access can copy.
#[inline]
fn step(offset: usize, len: usize) -> usize {
    match (offset % 8, len) {
        (0, 8..) => 8,
        (0 | 4, 4..) => 4,
        _ => 1,
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if matches!(self.keeper, Keeper::Allocated) {
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
