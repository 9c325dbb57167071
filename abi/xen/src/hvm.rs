//! `hvm_op`: argument 1 is the operation, 2 a pointer.
//!
//! Source: `xen/include/public/hvm/hvm_op.h`, `hvm/params.h`.

use crate::DomainId;
use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// [`HvmParam`].
pub const SET_PARAM: u64 = 0;
/// [`HvmParam`]; `value` is filled in.
pub const GET_PARAM: u64 = 1;
/// No argument.
pub const FLUSH_TLBS: u64 = 5;

/// Parameters.
pub mod params {
    /// How events come: type in bits 56..64, for a vector the vector in bits 0..8.
    pub const CALLBACK_IRQ: u32 = 0;
    /// Page of the xenstore ring.
    pub const STORE_PFN: u32 = 1;
    /// The guest's port of the xenstore ring.
    pub const STORE_EVTCHN: u32 = 2;
    /// Page of the console ring.
    pub const CONSOLE_PFN: u32 = 17;
    /// The guest's port of the console ring.
    pub const CONSOLE_EVTCHN: u32 = 18;
    /// Parameters are below it.
    pub const COUNT: u32 = 39;

    /// Type in [`CALLBACK_IRQ`]: a vector.
    pub const CALLBACK_VECTOR: u64 = 2;
}

/// `struct xen_hvm_param`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HvmParam {
    /// Whose.
    pub domid: DomainId,
    /// Padding.
    pub pad: u16,
    /// Which of [`params`].
    pub index: u32,
    /// Its value.
    pub value: u64,
}
const _: () = assert!(size_of::<HvmParam>() == 16 && offset_of!(HvmParam, index) == 4);
