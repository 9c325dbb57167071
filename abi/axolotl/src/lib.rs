//! What is Axolotl's own in the interfaces between core, domains and tools.
//!
//! Guests see Xen's ABI (`xen-abi`) and nothing of this, but for what a unikernel domain finds
//! at its start ([`start`]). The rest is between the core and the holders of rights
//! ([`control`], [`device`]), between the host tool and whoever loads an image ([`image`]), and
//! between the host tool and the control domain ([`system`], [`drivers`], [`volume`], [`protocol`]).

#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "alloc")]
extern crate alloc;

pub mod control;
pub mod device;
pub mod drivers;
pub mod image;
#[cfg(feature = "alloc")]
pub mod protocol;
pub mod start;
#[cfg(feature = "alloc")]
pub mod system;
#[cfg(feature = "alloc")]
pub mod volume;

/// Hypercall number of the control group, see [`control`]. Xen leaves 48..56 to the
/// architecture and uses none of the last two on x86.
pub const CONTROL_OP: u64 = 54;
/// Hypercall number of the device group, see [`device`].
pub const DEVICE_OP: u64 = 55;
