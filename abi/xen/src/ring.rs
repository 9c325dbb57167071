//! The head of a split-driver ring page.
//!
//! | bytes  | field       | written by |
//! |--------|-------------|------------|
//! | 0..4   | `req_prod`  | front      |
//! | 4..8   | `req_event` | back       |
//! | 8..12  | `rsp_prod`  | back       |
//! | 12..16 | `rsp_event` | front      |
//! | 64..   | slots       | both       |
//!
//! Indices run freely modulo 2^32; slot = index mod the number of slots, which is the largest
//! power of two that fits. Request i and response i share a slot.
//!
//! Source: `xen/include/public/io/ring.h`.

/// Offset of `req_prod`.
pub const REQ_PROD: usize = 0;
/// Offset of `req_event`.
pub const REQ_EVENT: usize = 4;
/// Offset of `rsp_prod`.
pub const RSP_PROD: usize = 8;
/// Offset of `rsp_event`.
pub const RSP_EVENT: usize = 12;
/// Offset of slot 0.
pub const SLOTS: usize = 64;

/// Number of slots of `entry_bytes` in a ring of `ring_bytes`: the largest power of two that fits.
#[must_use]
pub const fn slots(ring_bytes: usize, entry_bytes: usize) -> u32 {
    let fit = (ring_bytes - SLOTS) / entry_bytes;
    #[expect(clippy::cast_possible_truncation, reason = "rings are at most 16 pages")]
    let fit = fit as u32;
    1 << (31 - fit.leading_zeros())
}

const _: () = assert!(slots(4096, 12) == 256 && slots(4096, 8) == 256 && slots(4096, 112) == 32);

/// Whether the peer asked to hear of a counter that moved from `old` to `new`, given the
/// `event` index that it left.
#[must_use]
pub const fn must_notify(old: u32, new: u32, event: u32) -> bool {
    new.wrapping_sub(event) < new.wrapping_sub(old)
}
