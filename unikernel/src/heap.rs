//! The heap: size classes for what is up to a page, whole pages for the rest.
//!
//! | request          | served from                                                            |
//! |------------------|------------------------------------------------------------------------|
//! | up to 4096 bytes | a list of free blocks of the next power of two, each aligned to its size |
//! | more             | `linked_list_allocator`, in whole, page-aligned pages                  |
//!
//! A list that is empty takes pages from the second kind and cuts them up; they stay with that
//! size. So a page for a ring or a buffer is one pop, and small allocations cannot fragment the
//! space for large ones.
#![expect(unsafe_code, reason = "a global allocator")]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{NonNull, null_mut};

const PAGE: usize = 4096;
const SMALLEST: usize = 16;
/// 16, 32, … 4096.
const CLASSES: usize = 9;
/// Pages taken at once for an empty list of whole pages.
const REFILL_PAGES: usize = 8;

/// A free block, as long as it is free.
struct Block {
    next: *mut Block,
}

struct Heap {
    lists: [*mut Block; CLASSES],
    pages: linked_list_allocator::Heap,
    bytes: usize,
    used: usize,
}

impl Heap {
    const fn empty() -> Self {
        let pages = linked_list_allocator::Heap::empty();
        Self { lists: [null_mut(); CLASSES], pages, bytes: 0, used: 0 }
    }

    /// Which list serves a layout, if any.
    fn class(layout: Layout) -> Option<usize> {
        let size = layout.size().max(layout.align()).max(SMALLEST).next_power_of_two();
        (size <= PAGE).then(|| (size / SMALLEST).trailing_zeros() as usize)
    }

    fn alloc(&mut self, layout: Layout) -> *mut u8 {
        let block = match Self::class(layout) {
            Some(class) => self.alloc_block(class),
            None => self.alloc_pages(layout),
        };
        if !block.is_null() {
            self.used += Self::charged(layout);
        }
        block
    }

    fn charged(layout: Layout) -> usize {
        match Self::class(layout) {
            Some(class) => SMALLEST << class,
            None => Self::whole_pages(layout).map_or(0, |layout| layout.size()),
        }
    }

    fn whole_pages(layout: Layout) -> Option<Layout> {
        let size = layout.size().checked_next_multiple_of(PAGE)?;
        Layout::from_size_align(size, layout.align().max(PAGE)).ok()
    }

    fn alloc_pages(&mut self, layout: Layout) -> *mut u8 {
        let pages = Self::whole_pages(layout);
        let block = pages.and_then(|layout| self.pages.allocate_first_fit(layout).ok());
        block.map_or(null_mut(), NonNull::as_ptr)
    }

    fn alloc_block(&mut self, class: usize) -> *mut u8 {
        if self.lists[class].is_null() {
            self.refill(class);
        }
        let block = self.lists[class];
        if !block.is_null() {
            // SAFETY: blocks in a list are free memory of this heap, which `push` has written.
            self.lists[class] = unsafe { (*block).next };
        }
        block.cast()
    }

    fn push(&mut self, class: usize, block: *mut u8) {
        let block: *mut Block = block.cast();
        // SAFETY: the block is ours alone, and has room for a pointer, aligned to 16 bytes.
        unsafe { block.write(Block { next: self.lists[class] }) };
        self.lists[class] = block;
    }

    fn refill(&mut self, class: usize) {
        let size = SMALLEST << class;
        let wanted = if size == PAGE { REFILL_PAGES } else { 1 };
        for pages in [wanted, 1] {
            let Ok(layout) = Layout::from_size_align(pages * PAGE, PAGE) else { return };
            let Ok(start) = self.pages.allocate_first_fit(layout) else { continue };
            for offset in (0..pages * PAGE).step_by(size).rev() {
                // SAFETY: inside the pages just allocated.
                let block = unsafe { start.as_ptr().add(offset) };
                self.push(class, block);
            }
            return;
        }
    }

    /// # Safety
    /// `block` was allocated here with this layout, and nothing refers to it any more.
    unsafe fn dealloc(&mut self, block: *mut u8, layout: Layout) {
        self.used -= Self::charged(layout);
        match (Self::class(layout), Self::whole_pages(layout), NonNull::new(block)) {
            (Some(class), _, _) => self.push(class, block),
            // SAFETY: `alloc_pages` allocated it with the same rounded layout.
            (None, Some(pages), Some(block)) => unsafe { self.pages.deallocate(block, pages) },
            _ => {}
        }
    }
}

/// The heap of the only thread there is.
struct Global(UnsafeCell<Heap>);

// SAFETY: a unikernel has one vCPU, no interrupt handlers and no threads; and neither the
// functions of `Heap` nor what they call allocates. So there is never a second access.
unsafe impl Sync for Global {}

#[cfg_attr(target_os = "none", global_allocator)]
static HEAP: Global = Global(UnsafeCell::new(Heap::empty()));

impl Global {
    fn with<R>(&self, work: impl FnOnce(&mut Heap) -> R) -> R {
        // SAFETY: no other reference exists, as said at `Sync`.
        work(unsafe { &mut *self.0.get() })
    }
}

// SAFETY: blocks are handed out once, are as large and as aligned as asked for, and stay until
// they are given back. On exhaustion the answer is null; nothing unwinds.
unsafe impl GlobalAlloc for Global {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.with(|heap| heap.alloc(layout))
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's duty is the same.
        self.with(|heap| unsafe { heap.dealloc(block, layout) });
    }
}

/// Gives the heap its memory.
///
/// # Safety
/// Called once, before anything is allocated, with memory that serves nothing else.
pub(crate) unsafe fn init(start: *mut u8, bytes: usize) {
    HEAP.with(|heap| {
        // SAFETY: the caller's duty is the same.
        unsafe { heap.pages.init(start, bytes) };
        heap.bytes = bytes;
    });
}

/// Bytes in use, rounded up as they were handed out, and bytes in all.
#[must_use]
pub fn usage() -> (usize, usize) {
    HEAP.with(|heap| (heap.used, heap.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heap(pages: usize) -> Heap {
        let layout = Layout::from_size_align(pages * PAGE, PAGE).unwrap();
        // SAFETY: the size is not zero.
        let memory = unsafe { std::alloc::alloc(layout) };
        let mut heap = Heap::empty();
        // SAFETY: fresh memory, which the test leaks.
        unsafe { heap.pages.init(memory, pages * PAGE) };
        heap
    }

    /// Blocks are aligned, do not overlap, and come back: a heap that was emptied serves the
    /// same again.
    #[test]
    fn blocks_are_distinct_aligned_and_reused() {
        let mut heap = heap(256);
        let mut seed = 1_u64;
        let mut layouts = Vec::new();
        for _ in 0..200 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let align = 1 << (seed >> 60);
            let size = 1 + (seed >> 33) as usize % if seed & 256 == 0 { 64 } else { 700 };
            layouts.push(Layout::from_size_align(size, align.min(4096)).unwrap());
        }
        layouts.push(Layout::from_size_align(20_000, 8).unwrap());
        layouts.push(Layout::from_size_align(4096, 4096).unwrap());
        for _ in 0..3 {
            let mut blocks: Vec<(usize, Layout)> = Vec::new();
            for &layout in &layouts {
                let block = heap.alloc(layout) as usize;
                assert!(block != 0 && block.is_multiple_of(layout.align()));
                for &(other, l) in &blocks {
                    assert!(block + layout.size() <= other || other + l.size() <= block);
                }
                blocks.push((block, layout));
            }
            for (block, layout) in blocks {
                // SAFETY: allocated above with this layout.
                unsafe { heap.dealloc(block as *mut u8, layout) };
            }
            assert_eq!(heap.used, 0);
        }
    }

    #[test]
    fn exhaustion_is_null_and_not_final() {
        let mut heap = heap(4);
        let layout = Layout::from_size_align(4096, 4096).unwrap();
        let mut blocks = Vec::new();
        loop {
            let block = heap.alloc(layout);
            if block.is_null() {
                break;
            }
            blocks.push(block);
        }
        assert_eq!(blocks.len(), 4);
        // SAFETY: allocated above with this layout.
        unsafe { heap.dealloc(blocks[0], layout) };
        assert_eq!(heap.alloc(layout), blocks[0]);
    }
}
