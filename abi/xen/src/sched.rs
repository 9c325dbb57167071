//! `sched_op`. Source: `xen/include/public/sched.h`.

use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Lets others of the same priority run.
pub const YIELD: u64 = 0;
/// Waits until `evtchn_upcall_pending` is set.
pub const BLOCK: u64 = 1;
/// Ends the domain: a [`Shutdown`].
pub const SHUTDOWN: u64 = 2;
/// Waits for one of several ports, or a time: a [`Poll`].
pub const POLL: u64 = 3;
/// Arms, pokes or disarms a watchdog: a [`Watchdog`].
pub const WATCHDOG: u64 = 6;

/// Powered off in good order.
pub const SHUTDOWN_POWEROFF: u32 = 0;
/// Wants to be started anew.
pub const SHUTDOWN_REBOOT: u32 = 1;
/// Suspended.
pub const SHUTDOWN_SUSPEND: u32 = 2;
/// Found itself broken: a panic.
pub const SHUTDOWN_CRASH: u32 = 3;
/// Its watchdog ran out.
pub const SHUTDOWN_WATCHDOG: u32 = 4;

/// `struct sched_shutdown`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Shutdown {
    /// `SHUTDOWN_*`.
    pub reason: u32,
}
const _: () = assert!(size_of::<Shutdown>() == 4);

/// `struct sched_poll`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Poll {
    /// Guest pointer to `nr_ports` numbers of 32 bits.
    pub ports: u64,
    /// At most 128.
    pub nr_ports: u32,
    /// Padding.
    pub pad: u32,
    /// Absolute system time in ns; 0 means none.
    pub timeout: u64,
}
const _: () = assert!(size_of::<Poll>() == 24 && offset_of!(Poll, timeout) == 16);

/// `struct sched_watchdog`. `id` 0 with a timeout arms a new one and returns its id (from 1);
/// a known id with a timeout pokes it; with timeout 0 it is disarmed.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Watchdog {
    /// Which.
    pub id: u32,
    /// Seconds.
    pub timeout: u32,
}
const _: () = assert!(size_of::<Watchdog>() == 8 && offset_of!(Watchdog, timeout) == 4);
