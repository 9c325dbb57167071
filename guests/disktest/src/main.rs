//! The disk test: a guest that verifies every sector of its disks under load.
//!
//! The test is the library `disktest`; here it meets the machine. On a host the program verifies
//! images.

#![cfg_attr(target_os = "none", no_std, no_main)]
#![forbid(unsafe_code)]

#[cfg(target_os = "none")]
mod domain;

#[cfg(not(target_os = "none"))]
mod host;

#[cfg(not(target_os = "none"))]
fn main() -> std::process::ExitCode {
    host::main()
}
