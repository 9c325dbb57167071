//! Private memory for packets that wait.
//!
//! A packet waits when its vif has too few posted buffers, and it passes through here when the
//! card cannot lend buffers because its link is down. Two buffers make a page. Pages are
//! allocated when they are first needed and kept; how many there can be is fixed at the start.

use alloc::vec::Vec;
use domain_api::nic::Buffer;
use shmem::Page;
use xen_abi::PAGE_SIZE;

/// Bytes of a buffer; room for any frame.
pub const ROOM: u16 = 2048;
const _: () = assert!(ROOM as usize >= domain_api::nic::MAX_FRAME);
const _: () = assert!(ROOM as usize * 2 == PAGE_SIZE);

/// A bounded supply of buffers.
#[derive(Debug)]
pub struct Pool {
    free: Vec<Buffer>,
    /// Buffers that may still be allocated.
    left: usize,
}

impl Pool {
    /// A pool of at most so many buffers.
    #[must_use]
    pub const fn new(buffers: usize) -> Self {
        Self { free: Vec::new(), left: buffers }
    }

    /// A buffer with [`ROOM`], or `None` when all are in use.
    pub fn take(&mut self) -> Option<Buffer> {
        if self.free.is_empty() && self.left > 0 {
            let page = Page::new_zeroed();
            let count = self.left.min(2);
            self.left -= count;
            for offset in [0, ROOM].into_iter().take(count) {
                self.free.push(Buffer { page: page.clone(), offset, len: ROOM, token: 0 });
            }
        }
        let mut buffer = self.free.pop()?;
        buffer.len = ROOM;
        Some(buffer)
    }

    /// Buffers that can be taken.
    #[must_use]
    pub fn available(&self) -> usize {
        self.free.len() + self.left
    }

    /// Takes a buffer back.
    pub fn give(&mut self, buffer: Buffer) {
        self.free.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_bounded_distinct_and_come_back() {
        let mut pool = Pool::new(5);
        let taken: Vec<Buffer> = core::iter::from_fn(|| pool.take()).collect();
        assert_eq!(taken.len(), 5);
        for (index, buffer) in taken.iter().enumerate() {
            assert!(usize::from(buffer.offset) + usize::from(buffer.len) <= PAGE_SIZE);
            for other in &taken[..index] {
                assert!(!buffer.page.is_same(&other.page) || buffer.offset != other.offset);
            }
        }
        for mut buffer in taken {
            buffer.len = 60;
            pool.give(buffer);
        }
        let again: Vec<Buffer> = core::iter::from_fn(|| pool.take()).collect();
        assert!(again.len() == 5 && again.iter().all(|buffer| buffer.len == ROOM));
    }
}
