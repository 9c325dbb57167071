//! Private memory for frames that wait.
//!
//! A frame waits when its vif has no posted buffer, and it passes through here when the card
//! cannot lend a buffer because its link is down. Two chunks make a page. Pages are allocated
//! when they are first needed and kept; how many there can be is fixed at the start.

use alloc::vec::Vec;
use shmem::Page;
use xen_abi::PAGE_SIZE;

/// Bytes of a chunk; room for any frame.
pub const CHUNK: usize = PAGE_SIZE / 2;
const _: () = assert!(CHUNK >= domain_api::nic::MAX_FRAME);

/// Room for one frame in private memory.
#[derive(Debug)]
#[must_use = "a chunk that is dropped is lost to its pool"]
pub struct Chunk {
    /// The page.
    pub page: Page,
    /// Where in the page.
    pub offset: u16,
}

/// A bounded supply of chunks.
#[derive(Debug)]
pub struct Pool {
    free: Vec<Chunk>,
    /// Chunks that may still be allocated.
    left: usize,
}

impl Pool {
    /// A pool of at most `chunks`.
    #[must_use]
    pub const fn new(chunks: usize) -> Self {
        Self { free: Vec::new(), left: chunks }
    }

    /// A chunk, or `None` when all are in use.
    pub fn take(&mut self) -> Option<Chunk> {
        if self.free.is_empty() && self.left > 0 {
            let page = Page::new_zeroed();
            let chunks = self.left.min(PAGE_SIZE / CHUNK);
            self.left -= chunks;
            for offset in [0, 2048].into_iter().take(chunks) {
                self.free.push(Chunk { page: page.clone(), offset });
            }
        }
        self.free.pop()
    }

    /// Takes a chunk back.
    pub fn give(&mut self, chunk: Chunk) {
        self.free.push(chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_bounded_distinct_and_come_back() {
        let mut pool = Pool::new(5);
        let taken: Vec<Chunk> = core::iter::from_fn(|| pool.take()).collect();
        assert_eq!(taken.len(), 5);
        for (index, chunk) in taken.iter().enumerate() {
            assert!(usize::from(chunk.offset) + CHUNK <= PAGE_SIZE);
            for other in &taken[..index] {
                assert!(!chunk.page.is_same(&other.page) || chunk.offset != other.offset);
            }
        }
        for chunk in taken {
            pool.give(chunk);
        }
        assert_eq!(core::iter::from_fn(|| pool.take()).count(), 5);
    }
}
