//! The control domain's decisions, without a machine.
//!
//! [`Control`] reads the bundle, builds the domains that it describes in dependency order, fills
//! xenstore for them, supervises them (a death leads to a restart in place, within limits),
//! assembles their consoles into lines, and answers `axl`. It reaches the core only through
//! [`Hypervisor`], the store through [`xenbus::Transport`], and the serial port through
//! [`uart::Ports`], so that tests run it whole on a host. Connecting these to the machine is left to
//! the `control-domain` binary.
//!
//! Nothing here waits: a store that hangs delays what needs the store, and nothing else. The
//! restart of a driver needs it for one message, whose answer nobody waits for.

#![cfg_attr(not(any(test, feature = "fake")), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod bundle;
mod console;
mod control;
mod domain;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod hypervisor;
pub mod names;
pub mod plan;
mod pvh;
mod requests;
mod store;
mod supervision;
mod tree;
pub mod uart;

pub use control::{Control, Setup, StartError, Wake};
pub use hypervisor::Hypervisor;

#[cfg(test)]
mod tests;
