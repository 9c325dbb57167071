//! The demo guest: a web server behind split drivers.
//!
//! The server is the library `demo_guest`; here it meets the machine.

#![cfg_attr(target_os = "none", no_std, no_main)]
#![forbid(unsafe_code)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod disk;
#[cfg(target_os = "none")]
mod domain;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("demo-guest runs inside Axolotl; build it for x86_64-unknown-none");
    std::process::exit(1);
}
