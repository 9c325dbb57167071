//! The project's tasks as a library: making bootable images, running them in QEMU, measuring.
//!
//! `main.rs` is the command line over it, and the tests in `tests/qemu` are its other user. What a
//! system file means is the `system` crate's business, and what `axl` says to a running platform
//! the `axl` crate's. Nothing here runs inside the machine.

#![forbid(unsafe_code)]

pub mod bench;
pub mod build;
pub mod bundle;
pub mod checks;
pub mod console;
pub mod disks;
pub mod doses;
pub mod elf;
pub mod guest_kernel;
pub mod guest_shell;
pub mod http;
pub mod image_files;
pub mod interrupt;
pub mod iso;
pub mod lines_of_code;
pub mod machine;
pub mod platform;
pub mod project;
pub mod qemu;
pub mod run;
pub mod setup;
pub mod sim;
pub mod suite;
