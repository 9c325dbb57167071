//! What the command line of a running system is made of.
//!
//! [`Client`] asks one running system, which [`rundir`] finds; [`mux`] is the other end on the
//! host, through which whoever owns the machine's serial port lets many clients at it; and
//! [`show`] turns answers into text and JSON, and [`vbd`] reads what xenstore says about disks. [`keyboard`] is the terminal's. [`disk`] makes disks as files, and needs no
//! running system. The other commands themselves are in the binary, the
//! answers come from the control domain (`control`).

#![forbid(unsafe_code)]

mod client;
pub mod disk;
pub mod keyboard;
pub mod mux;
pub mod rundir;
pub mod show;
pub mod vbd;

pub use client::{Client, ClientError};
