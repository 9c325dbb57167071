//! Verifies every sector of a disk under load, without the disk.
//!
//! The load is a [`stream`] of requests that a seed decides: reads, writes, flushes and discards of
//! all sizes, many in flight, reads of what is being written among them. Every [`sector`] says who
//! wrote it where; the [`model`] knows which writes each may hold; the [`engine`] drives any
//! [`Disk`](domain_api::disk::Disk), compares everything that it reads, and stops at the first
//! sector that holds anything else. A [`log`] on the disk lets a later run, or a program on
//! the host ([`image`]), verify what a machine left behind that was stopped at any time.
//!
//! All of it is portable; the domain itself, in `main.rs`, adds the frontends, the clock and the
//! console. On a host, `disktest verify IMAGE` checks a raw image.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod config;
pub mod engine;
pub mod image;
pub mod log;
pub mod model;
pub mod sector;
pub mod stream;
