//! Frontend halves of Xen's split drivers, for unikernel domains.
//!
//! A frontend finds its device in xenstore, shares rings and pages with the backend that is named
//! there, and offers its user plain frames or sectors. Events and the store are passed in by the
//! domain's event loop. There are [`netfront`] and [`blkfront`].

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod blkfront;
pub mod netfront;
