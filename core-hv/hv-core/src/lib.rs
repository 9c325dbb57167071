//! The hypervisor's decisions, without a processor.
//!
//! Everything here is safe Rust, compiles for the host, and reaches hardware only through
//! [`platform::Platform`]. A processor calls [`cpu_loop`]; what it decides is in one [`Core`]
//! behind one lock (`docs/locks.md`). There is no heap: objects are in fixed tables, or in frames
//! that are charged to the domain that needs them.
//!
//! | module | decides |
//! |---|---|
//! | [`frame`] | whose a machine frame is, and who still uses it |
//! | [`p2m`] | what a domain sees at a guest frame |
//! | [`access`] | how the core reads and writes memory of domains |
//! | [`domain`], `control` | what a domain is; its life |
//! | `sched`, [`cpu`] | who runs where, and what happens at a set time |
//! | [`vcpu`] | what a vCPU is |
//! | [`pvh`] | what a domain with a kernel of its own finds in place of a machine |
//! | [`event`], `grant` | event channels and grants, as Xen has them |
//! | [`pci`], `device` | whose a PCI function is, and its interrupts |
//! | `console` | the last words of each domain |
//! | `hypercall` | which of them is meant |

#![cfg_attr(not(any(test, feature = "fake")), no_std)]
#![forbid(unsafe_code)]

pub mod access;
pub mod boot;
mod console;
mod control;
pub mod cpu;
mod device;
pub mod domain;
pub mod event;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod fault;
pub mod frame;
mod grant;
mod hypercall;
#[cfg(any(test, feature = "fake"))]
mod invariants;
pub mod p2m;
pub mod pci;
pub mod platform;
pub mod pvh;
mod sched;
mod state;
pub mod vcpu;

pub use boot::{Boot, EcamRange, StartError};
pub use cpu::{CpuLoop, cpu_loop};
pub use frame::FrameInfo;
pub use state::Core;
