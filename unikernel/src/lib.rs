//! Runtime of unikernel domains: from the first instruction to the traits of `domain-api`.
//!
//! A domain's program is a function that gets its [`Domain`]:
//!
//! ```ignore
//! #![no_std]
//! #![no_main]
//! unikernel::main!(run);
//!
//! fn run(domain: unikernel::Domain) {
//!     loop {
//!         for port in domain.wait(None) { /* … */ }
//!     }
//! }
//! ```
//!
//! A unikernel runs in ring 3 at virtual address = guest-physical address (see
//! [`axolotl_abi::start`]), on one vCPU, without interrupt handlers: nothing here is ever
//! re-entered. It asks the core by hypercalls ([`hypercall`]), hears of events when it looks
//! ([`Domain::wait`]), and dies by a fault or a panic, of which the core and its console keep the
//! record. What a domain does with all this is up to its own crates.
//!
//! The whole crate compiles for a host, for its tests and for documentation; hypercalls,
//! allocator and entry mean something only in a domain.

#![cfg_attr(not(test), no_std)]

extern crate alloc;

mod clock;
pub mod console;
pub mod control;
mod device;
mod domain;
mod grants;
pub mod heap;
pub mod hypercall;
mod ports;
mod start;
#[cfg(feature = "virtio")]
pub mod virtio;
mod watchdog;
mod xenstore;

pub use device::{Device, DeviceDma, Mmio};
pub use domain::Domain;
pub use domain_api;
pub use log;
pub use ports::SerialPort;
pub use shmem::events::Ports;
#[doc(hidden)]
pub use start::enter;
pub use start::{exit, yield_now};
pub use watchdog::Watchdog;
pub use xenstore::XenstoreRing;

/// Makes `$run`, a `fn(Domain)`, the domain's program. When it returns, the domain shuts down in
/// good order.
#[macro_export]
macro_rules! main {
    ($run:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn _start(start_info: u64) -> ! {
            $crate::enter(start_info, $run)
        }
    };
}
