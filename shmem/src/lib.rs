//! Memory that is shared with a domain that is not trusted.
//!
//! A [`Page`] is 4 KiB that somebody else may read and write at any moment. There is no way to
//! get a Rust reference into it: bytes are copied in and out, and counters are loaded and stored
//! as atomics. Rings, in-flight tables and byte streams are built on it in safe code.

#![cfg_attr(not(test), no_std)]

extern crate alloc;

mod page;

pub use page::Page;
