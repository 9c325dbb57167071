//! The hypervisor's decisions, without a processor.
//!
//! Everything here is safe Rust, compiles for the host, and reaches hardware only through
//! [`platform::Platform`].

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod frame;
pub mod platform;
