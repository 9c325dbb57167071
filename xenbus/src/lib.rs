//! Xenstore's wire protocol, a client for it, and the xenbus conventions of split drivers.
//!
//! [`wire`] turns messages into bytes and back, for both ends. [`Client`] speaks the protocol
//! over a [`Transport`], which is a ring and an event port in a domain, or a server in the same
//! process in a test. [`Nodes`] and [`Store`] are what users of the store are written against.
//! [`device`] knows where split devices keep their keys, [`takeover()`] what a new incarnation
//! of a backend does about each of them, and [`backend`] does it. The database itself is the
//! `xenstore` crate.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod backend;
mod client;
pub mod device;
mod store;
mod takeover;
pub mod wire;

pub use client::{Client, Transport};
pub use store::{Event, Nodes, Store, TRANSACTION_ATTEMPTS};
pub use takeover::{Takeover, takeover};
pub use wire::{NodeAccess, Permission};
pub use xen_abi::xenstore::XenbusState;
pub use xen_abi::{DomainId, Errno};
