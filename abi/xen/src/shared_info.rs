//! The shared-info page: event bits, time, wall clock. 64-bit layout.
//!
//! Accessed by offset through shared-memory types, never as a Rust reference: both sides write.
//!
//! Source: `xen/include/public/xen.h`, `struct shared_info`, `struct vcpu_info`,
//! `struct pvclock_vcpu_time_info`.

/// vCPUs that have their `vcpu_info` in this page.
pub const LEGACY_MAX_VCPUS: usize = 32;
/// Bytes of one `vcpu_info`; that of vCPU n starts at `n * VCPU_INFO_SIZE`.
pub const VCPU_INFO_SIZE: usize = 64;
/// In `vcpu_info`: `evtchn_upcall_pending`, u8.
pub const VCPU_UPCALL_PENDING: usize = 0;
/// In `vcpu_info`: `evtchn_upcall_mask`, u8; not used by us.
pub const VCPU_UPCALL_MASK: usize = 1;
/// In `vcpu_info`: `evtchn_pending_sel`, u64; bit w says that word w has a new bit.
pub const VCPU_PENDING_SEL: usize = 8;
/// In `vcpu_info`: `vcpu_time_info`, 32 bytes, see [`time`].
pub const VCPU_TIME: usize = 32;

/// `evtchn_pending`: 64 words of u64, bit n of word w is port `64 * w + n`.
pub const EVTCHN_PENDING: usize = 2048;
/// `evtchn_mask`: same shape.
pub const EVTCHN_MASK: usize = 2560;
/// `wc_version`, u32: odd while the wall clock is being written.
pub const WC_VERSION: usize = 3072;
/// `wc_sec`, u32: Unix time at system time 0.
pub const WC_SEC: usize = 3076;
/// `wc_nsec`, u32.
pub const WC_NSEC: usize = 3080;
/// `wc_sec_hi`, u32.
pub const WC_SEC_HI: usize = 3084;

/// Offsets in `vcpu_time_info`.
///
/// ns = `system_time` + (((tsc - `tsc_timestamp`) shifted left by `tsc_shift`) * `mul`) >> 32.
pub mod time {
    /// u32, odd while being written.
    pub const VERSION: usize = 0;
    /// u64.
    pub const TSC_TIMESTAMP: usize = 8;
    /// u64, ns.
    pub const SYSTEM_TIME: usize = 16;
    /// u32, `tsc_to_system_mul`.
    pub const MUL: usize = 24;
    /// i8; negative shifts right.
    pub const SHIFT: usize = 28;
    /// u8; bit 0: TSCs are synchronous.
    pub const FLAGS: usize = 29;
}
