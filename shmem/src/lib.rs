//! Memory that is shared with a domain that is not trusted.
//!
//! A [`Page`] is 4 KiB that somebody else may read and write at any moment. There is no way to
//! get a Rust reference into it: bytes are copied in and out, and counters are loaded and stored
//! as atomics. On it stand, in safe code:
//!
//! * [`ring`]: both ends of a split driver's ring of requests and responses;
//! * [`inflight`]: the table in preserved memory that lets a backend's next incarnation go on
//!   where the last one died;
//! * [`bytes`]: the two-way byte streams of xenstore and of the paravirtual console;
//! * [`events`]: a domain's side of the event bits, in the page that it shares with the core.
//!
//! No ring sends an event or waits for one: functions say when the peer must be told.

#![cfg_attr(not(any(test, loom, feature = "sim")), no_std)]

extern crate alloc;

pub mod bytes;
pub mod events;
pub mod inflight;
#[cfg(not(loom))]
mod page;
#[cfg(loom)]
#[path = "page_loom.rs"]
mod page;
pub mod ring;
#[cfg(all(feature = "sim", not(loom)))]
pub mod sim;

pub use page::Page;
use xen_abi::PAGE_SIZE;

/// The atomics that everything here is made of; loom's when loom checks it.
pub(crate) mod sync {
    #[cfg(not(loom))]
    pub use core::sync::atomic::{Ordering, fence};
    #[cfg(loom)]
    pub use loom::sync::atomic::{Ordering, fence};
}

/// The peer wrote a value that no correct peer writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerError {
    /// A counter that claims more than fits, or that went back.
    BadCounter {
        /// The counter as it was read.
        claimed: u32,
        /// The highest value that it could have had.
        limit: u32,
    },
}

impl core::fmt::Display for PeerError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::BadCounter { claimed, limit } => {
                write!(f, "ring counter is {claimed:#x}, but can be {limit:#x} at most")
            }
        }
    }
}

impl core::error::Error for PeerError {}

/// Checks a peer's free-running counter: it must lie in `[from, limit]`, modulo 2^32.
fn check_counter(claimed: u32, from: u32, limit: u32) -> Result<(), PeerError> {
    if claimed.wrapping_sub(from) > limit.wrapping_sub(from) {
        return Err(PeerError::BadCounter { claimed, limit });
    }
    Ok(())
}

/// Copies from `offset` on out of pages that are taken as one piece of memory. What is copied
/// lies in one page or in two.
#[inline]
fn read_across(pages: &[Page], offset: usize, bytes: &mut [u8]) {
    if let [page] = pages {
        return page.read(offset, bytes);
    }
    let (page, at) = (offset / PAGE_SIZE, offset % PAGE_SIZE);
    let (head, tail) = bytes.split_at_mut(bytes.len().min(PAGE_SIZE - at));
    pages[page].read(at, head);
    if !tail.is_empty() {
        pages[page + 1].read(0, tail);
    }
}

/// The same in the other direction.
#[inline]
fn write_across(pages: &[Page], offset: usize, bytes: &[u8]) {
    if let [page] = pages {
        return page.write(offset, bytes);
    }
    let (page, at) = (offset / PAGE_SIZE, offset % PAGE_SIZE);
    let (head, tail) = bytes.split_at(bytes.len().min(PAGE_SIZE - at));
    pages[page].write(at, head);
    if !tail.is_empty() {
        pages[page + 1].write(0, tail);
    }
}
