//! Hypercall numbers and registers, and `xen_version`.
//!
//! | register | at entry           | at exit            |
//! |----------|--------------------|--------------------|
//! | `rax`    | number             | result or `-errno` |
//! | `rdi`, `rsi`, `rdx`, `r10`, `r8` | arguments 1..5 | preserved |
//!
//! A PVH domain issues them by `vmmcall`, a unikernel domain by `syscall` (which also destroys
//! `rcx` and `r11`). Source: `xen/include/public/xen.h`; App. A of the PVH notes for x86-64.

use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `memory_op`, see [`crate::memory`].
pub const MEMORY_OP: u64 = 12;
/// `multicall`.
pub const MULTICALL: u64 = 13;
/// `set_timer_op`: argument 1 is an absolute time in ns of system time, 0 cancels.
pub const SET_TIMER_OP: u64 = 15;
/// `xen_version`.
pub const XEN_VERSION: u64 = 17;
/// `console_io`: argument 1 is [`CONSOLEIO_WRITE`] or [`CONSOLEIO_READ`], 2 a count, 3 a buffer.
pub const CONSOLE_IO: u64 = 18;
/// `grant_table_op`, see [`crate::grant`].
pub const GRANT_TABLE_OP: u64 = 20;
/// `vm_assist`.
pub const VM_ASSIST: u64 = 21;
/// `vcpu_op`.
pub const VCPU_OP: u64 = 24;
/// `sched_op`, see [`crate::sched`].
pub const SCHED_OP: u64 = 29;
/// `event_channel_op`, see [`crate::event`].
pub const EVENT_CHANNEL_OP: u64 = 32;
/// `hvm_op`.
pub const HVM_OP: u64 = 34;

/// `console_io` command: write.
pub const CONSOLEIO_WRITE: u64 = 0;
/// `console_io` command: read.
pub const CONSOLEIO_READ: u64 = 1;

/// `xen_version` commands.
pub mod version {
    /// Returns `major << 16 | minor`.
    pub const VERSION: u64 = 0;
    /// Fills 16 bytes.
    pub const EXTRAVERSION: u64 = 1;
    /// Fills 144 bytes: 64 compiler, 16 by, 32 domain, 32 date.
    pub const COMPILE_INFO: u64 = 2;
    /// Fills 1024 bytes.
    pub const CAPABILITIES: u64 = 3;
    /// Fills 64 bytes.
    pub const CHANGESET: u64 = 4;
    /// Fills 8 bytes.
    pub const PLATFORM_PARAMETERS: u64 = 5;
    /// Fills a [`super::FeatureInfo`].
    pub const GET_FEATURES: u64 = 6;
    /// Returns 4096.
    pub const PAGESIZE: u64 = 7;
    /// Fills 16 bytes of UUID.
    pub const GUEST_HANDLE: u64 = 8;
    /// Fills 1024 bytes.
    pub const COMMANDLINE: u64 = 9;
    /// The version that we answer: 4.17, whose guest ABI we follow.
    pub const ANSWER: u64 = 4 << 16 | 17;
    /// Feature bits of submap 0 that a PVH domain of Xen 4.17 sees.
    pub const FEATURES: u32 = 0x0001_2305;
}

/// Argument of `xen_version` [`version::GET_FEATURES`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FeatureInfo {
    /// In: which group of 32 features; only 0 exists.
    pub submap_idx: u32,
    /// Out: the bits.
    pub submap: u32,
}
const _: () = assert!(size_of::<FeatureInfo>() == 8 && offset_of!(FeatureInfo, submap) == 4);
