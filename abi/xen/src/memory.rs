//! `memory_op`. Source: `xen/include/public/memory.h`.

use crate::DomainId;
use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Gives pages back: a [`Reservation`] whose extents are gfns. Returns the number done.
pub const DECREASE_RESERVATION: u64 = 1;
/// Current number of pages of a domain; the argument is a `u16` domid.
pub const CURRENT_RESERVATION: u64 = 3;
/// Largest number of pages of a domain; the argument is a `u16` domid.
pub const MAXIMUM_RESERVATION: u64 = 4;
/// Backs gfns with memory: a [`Reservation`]. Returns the number done.
pub const POPULATE_PHYSMAP: u64 = 6;
/// Puts a hypervisor-owned page at a gfn: an [`AddToPhysmap`].
pub const ADD_TO_PHYSMAP: u64 = 7;
/// Takes a page away: a [`RemoveFromPhysmap`].
pub const REMOVE_FROM_PHYSMAP: u64 = 15;

/// `AddToPhysmap::space`: the shared-info page; `idx` is 0.
pub const SPACE_SHARED_INFO: u32 = 0;
/// `AddToPhysmap::space`: grant table frame number `idx`.
pub const SPACE_GRANT_TABLE: u32 = 1;

/// `struct xen_add_to_physmap`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AddToPhysmap {
    /// Whose address space; `SELF`, or a domain that the caller built.
    pub domid: DomainId,
    /// Only used for ranges, which we do not offer.
    pub size: u16,
    /// `SPACE_*`.
    pub space: u32,
    /// Which page of that space.
    pub idx: u64,
    /// Where it goes.
    pub gpfn: u64,
}
const _: () = assert!(size_of::<AddToPhysmap>() == 24 && offset_of!(AddToPhysmap, gpfn) == 16);

/// `struct xen_remove_from_physmap`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RemoveFromPhysmap {
    /// Whose address space.
    pub domid: DomainId,
    /// Padding.
    pub pad: [u16; 3],
    /// The page to unmap.
    pub gpfn: u64,
}
const _: () =
    assert!(size_of::<RemoveFromPhysmap>() == 16 && offset_of!(RemoveFromPhysmap, gpfn) == 8);

/// `struct xen_memory_reservation`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Reservation {
    /// Guest pointer to `nr_extents` gfns of 64 bits.
    pub extent_start: u64,
    /// Number of extents.
    pub nr_extents: u64,
    /// Log2 of the pages in an extent.
    pub extent_order: u32,
    /// Ignored.
    pub mem_flags: u32,
    /// Whose memory.
    pub domid: DomainId,
    /// Padding.
    pub pad: [u16; 3],
}
const _: () = assert!(size_of::<Reservation>() == 32 && offset_of!(Reservation, domid) == 24);
