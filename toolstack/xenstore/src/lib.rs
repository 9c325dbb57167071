//! The xenstore database and server, without a domain around it.
//!
//! A [`Server`] is a pure state machine: bytes of a domain's requests go in, bytes of replies and
//! events come out, and a [`Host`] connects and disconnects domains on its behalf. [`Service`]
//! drives it over rings, grants and event channels, whoever provides these: it is the store domain
//! without its machine. [`LocalStore`] drives the same server inside one process, for the tests of
//! everything that uses the store.
//!
//! What is supported, all limits, and the differences from other implementations:
//! `docs/xenstore.md`. The protocol: `docs/misc/xenstore.txt` and
//! `xen/include/public/io/xs_wire.h` of Xen.
//!
//! # Memory
//!
//! No domain can make the server hold more than its [`Quotas`] say: nodes and their bytes are
//! charged to the node's owner, watches, transactions, replies and events to their connection.
//! A domain that does not take its replies has its requests stopped.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod change;
mod connection;
mod local;
mod path;
mod perms;
mod quota;
mod requests;
mod server;
mod service;
mod transaction;
mod tree;
mod watch;

pub use local::{LocalStore, LocalTransport};
pub use quota::Quotas;
pub use server::{Host, Refused, Server};
pub use service::Service;
