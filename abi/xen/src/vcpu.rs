//! `vcpu_op`: argument 1 is the operation, 2 a vCPU's number, 3 a pointer.
//!
//! Source: `xen/include/public/vcpu.h`.

use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Brings up a vCPU that was initialised.
pub const UP: u64 = 1;
/// Takes the calling vCPU down.
pub const DOWN: u64 = 2;
/// Returns 1 if it is up.
pub const IS_UP: u64 = 3;
/// The argument is the linear address, as u64, of a 48-byte record of times.
pub const REGISTER_RUNSTATE: u64 = 5;
/// No argument.
pub const STOP_PERIODIC_TIMER: u64 = 7;
/// [`SetSingleshotTimer`].
pub const SET_SINGLESHOT_TIMER: u64 = 8;
/// No argument.
pub const STOP_SINGLESHOT_TIMER: u64 = 9;
/// [`RegisterVcpuInfo`].
pub const REGISTER_VCPU_INFO: u64 = 10;
/// No argument.
pub const SEND_NMI: u64 = 11;
/// For those who know their processors.
pub const GET_PHYSID: u64 = 12;

/// State of a vCPU: a processor runs it.
pub const RUNSTATE_RUNNING: u32 = 0;
/// State of a vCPU: it could run.
pub const RUNSTATE_RUNNABLE: u32 = 1;
/// State of a vCPU: it waits.
pub const RUNSTATE_BLOCKED: u32 = 2;

/// `SetSingleshotTimer::flags`: fail if the time is past.
pub const SINGLESHOT_FUTURE: u32 = 1;

/// `struct vcpu_set_singleshot_timer`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetSingleshotTimer {
    /// Absolute system time, ns.
    pub timeout_abs_ns: u64,
    /// `SINGLESHOT_*`.
    pub flags: u32,
    /// Padding.
    pub pad: u32,
}
const _: () =
    assert!(size_of::<SetSingleshotTimer>() == 16 && offset_of!(SetSingleshotTimer, flags) == 8);

/// `struct vcpu_register_vcpu_info`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegisterVcpuInfo {
    /// The page, of the caller's own memory.
    pub mfn: u64,
    /// Where in it.
    pub offset: u32,
    /// Zero.
    pub rsvd: u32,
}
const _: () =
    assert!(size_of::<RegisterVcpuInfo>() == 16 && offset_of!(RegisterVcpuInfo, offset) == 8);
