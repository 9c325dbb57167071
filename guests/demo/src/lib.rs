//! A small web server for a guest, without the guest.
//!
//! It shows what a guest sees of the platform ([`page`]), and moves bytes in both directions so
//! that a test can check every one of them ([`generator`]). All of it is portable: [`stack`] runs
//! over any `smoltcp` device, and [`connection`] over any byte stream. The domain itself, in
//! `main.rs`, adds the device, the clock and the facts.
//!
//! | request             | answer                                                       |
//! |---------------------|--------------------------------------------------------------|
//! | `GET /`             | what the guest sees, for people                              |
//! | `GET /status.json`  | the same, for programs                                       |
//! | `GET /bytes/N`      | `N` bytes of [`generator`]                                   |
//! | `POST`/`PUT /echo`  | the body, as it arrives; needs `Content-Length`              |
//! | `GET /healthz`      | `ok`                                                         |
//! | `GET /disk/`        | the files on its disk, if it has one                         |
//! | `GET /disk/NAME`    | one of them, as it is read ([`shelf`], [`tar`])              |

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod config;
pub mod connection;
pub mod generator;
pub mod page;
pub mod pauses;
pub mod repeats;
pub mod request;
pub mod server;
pub mod shelf;
pub mod stack;
pub mod tar;
