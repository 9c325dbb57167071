//! Grant tables, version 1.
//!
//! Granting: write `domid` and `frame`, then `flags` with release order. Revoking: compare and
//! swap `flags` to 0, which succeeds only while [`GTF_READING`] and [`GTF_WRITING`] are clear.
//!
//! Source: `xen/include/public/grant_table.h`.

use crate::{DomainId, GrantRef};
use core::mem::{offset_of, size_of};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// One slot of a version-1 grant table, shared between the domain and the core.
///
/// | bytes | field   | written by | meaning                                  |
/// |-------|---------|------------|------------------------------------------|
/// | 0..2  | `flags` | both       | `GTF_*`; the domain writes it last       |
/// | 2..4  | `domid` | domain     | who may map the frame                    |
/// | 4..8  | `frame` | domain     | the granted gfn, 32 bits                 |
///
/// Source: `struct grant_entry_v1`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GrantEntryV1 {
    /// `GTF_*`.
    pub flags: u16,
    /// The grantee.
    pub domid: DomainId,
    /// The granted gfn.
    pub frame: u32,
}
const _: () = assert!(size_of::<GrantEntryV1>() == 8 && offset_of!(GrantEntryV1, frame) == 4);

/// Entries in one frame of the table.
pub const ENTRIES_PER_FRAME: u32 = 512;
/// Most frames that a table may have.
pub const MAX_FRAMES: u32 = 32;
/// Entries 0..8 are filled by the domain's builder, never by the domain.
pub const RESERVED_ENTRIES: u32 = 8;
/// Reserved entry: the console ring.
pub const RESERVED_CONSOLE: GrantRef = GrantRef(0);
/// Reserved entry: the xenstore ring.
pub const RESERVED_XENSTORE: GrantRef = GrantRef(1);

/// Mask of the type in `flags`.
pub const GTF_TYPE_MASK: u16 = 3;
/// Type: not in use.
pub const GTF_INVALID: u16 = 0;
/// Type: the grantee may map or copy the frame.
pub const GTF_PERMIT_ACCESS: u16 = 1;
/// For reading only.
pub const GTF_READONLY: u16 = 1 << 2;
/// Set by the core while the grant is in use.
pub const GTF_READING: u16 = 1 << 3;
/// Set by the core while the grant is in use for writing.
pub const GTF_WRITING: u16 = 1 << 4;

/// [`MapGrantRef`].
pub const MAP_GRANT_REF: u64 = 0;
/// [`UnmapGrantRef`].
pub const UNMAP_GRANT_REF: u64 = 1;
/// [`SetupTable`].
pub const SETUP_TABLE: u64 = 2;
/// [`GrantCopy`].
pub const COPY: u64 = 5;
/// [`QuerySize`].
pub const QUERY_SIZE: u64 = 6;
/// [`SetVersion`].
pub const SET_VERSION: u64 = 8;
/// [`GetVersion`].
pub const GET_VERSION: u64 = 10;

/// `GNTMAP_device_map`: also for DMA by the caller's devices.
pub const GNTMAP_DEVICE_MAP: u32 = 1;
/// `GNTMAP_host_map`: at the guest-physical address `host_addr`.
pub const GNTMAP_HOST_MAP: u32 = 2;
/// `GNTMAP_readonly`.
pub const GNTMAP_READONLY: u32 = 4;

/// Status of one grant operation (`GNTST_*`): 0 or a negative number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct GrantStatus(pub i16);

#[expect(missing_docs, reason = "names and meanings are those of GNTST_* in grant_table.h")]
impl GrantStatus {
    pub const OKAY: Self = Self(0);
    pub const GENERAL_ERROR: Self = Self(-1);
    pub const BAD_DOMAIN: Self = Self(-2);
    pub const BAD_GNTREF: Self = Self(-3);
    pub const BAD_HANDLE: Self = Self(-4);
    pub const BAD_VIRT_ADDR: Self = Self(-5);
    pub const BAD_DEV_ADDR: Self = Self(-6);
    pub const NO_DEVICE_SPACE: Self = Self(-7);
    pub const PERMISSION_DENIED: Self = Self(-8);
    pub const BAD_PAGE: Self = Self(-9);
    pub const BAD_COPY_ARG: Self = Self(-10);
    pub const ADDRESS_TOO_BIG: Self = Self(-11);
    pub const EAGAIN: Self = Self(-12);
    pub const NO_SPACE: Self = Self(-13);
}

/// `struct gnttab_map_grant_ref`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MapGrantRef {
    /// Guest-physical address of an empty page of the caller.
    pub host_addr: u64,
    /// `GNTMAP_*`.
    pub flags: u32,
    /// The grant, in the granter's table.
    pub gref: GrantRef,
    /// The granter.
    pub dom: DomainId,
    /// Out.
    pub status: GrantStatus,
    /// Out: names the mapping for [`UnmapGrantRef`].
    pub handle: u32,
    /// Out: bus address, for `GNTMAP_DEVICE_MAP`.
    pub dev_bus_addr: u64,
}
const _: () = assert!(size_of::<MapGrantRef>() == 32 && offset_of!(MapGrantRef, handle) == 20);

/// `struct gnttab_unmap_grant_ref`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UnmapGrantRef {
    /// As given to the map operation.
    pub host_addr: u64,
    /// As returned by the map operation; 0 leaves a device mapping alone.
    pub dev_bus_addr: u64,
    /// As returned by the map operation.
    pub handle: u32,
    /// Out.
    pub status: GrantStatus,
    /// Padding.
    pub pad: u16,
}
const _: () = assert!(size_of::<UnmapGrantRef>() == 24 && offset_of!(UnmapGrantRef, status) == 20);

/// `struct gnttab_setup_table`. For an auto-translated domain it grows the table and fills
/// `frame_list` with zeros; the frames are mapped by `XENMEM_add_to_physmap`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetupTable {
    /// `SELF`.
    pub dom: DomainId,
    /// Padding.
    pub pad0: u16,
    /// Frames wanted.
    pub nr_frames: u32,
    /// Out.
    pub status: GrantStatus,
    /// Padding.
    pub pad1: [u16; 3],
    /// Guest pointer to `nr_frames` numbers of 64 bits.
    pub frame_list: u64,
}
const _: () = assert!(size_of::<SetupTable>() == 24 && offset_of!(SetupTable, frame_list) == 16);

/// `struct gnttab_query_size`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct QuerySize {
    /// `SELF`.
    pub dom: DomainId,
    /// Padding.
    pub pad0: u16,
    /// Out: frames now.
    pub nr_frames: u32,
    /// Out: most frames.
    pub max_nr_frames: u32,
    /// Out.
    pub status: GrantStatus,
    /// Padding.
    pub pad1: u16,
}
const _: () = assert!(size_of::<QuerySize>() == 16 && offset_of!(QuerySize, status) == 12);

/// `struct gnttab_set_version`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetVersion {
    /// In: wanted; out: in force.
    pub version: u32,
}
const _: () = assert!(size_of::<SetVersion>() == 4);

/// `struct gnttab_get_version`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GetVersion {
    /// `SELF`.
    pub dom: DomainId,
    /// Padding.
    pub pad: u16,
    /// Out.
    pub version: u32,
}
const _: () = assert!(size_of::<GetVersion>() == 8 && offset_of!(GetVersion, version) == 4);

/// One side of a [`GrantCopy`].
///
/// | bytes  | field    | meaning                                                     |
/// |--------|----------|-------------------------------------------------------------|
/// | 0..8   | `frame`  | a gfn of the caller, or a grant reference in the low 32 bits |
/// | 8..10  | `domid`  | the granter, or `SELF` with a gfn                           |
/// | 10..12 | `offset` | in the page                                                 |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CopyPtr {
    /// gfn, or grant reference in the low half.
    pub frame: u64,
    /// Whose.
    pub domid: DomainId,
    /// Bytes into the page.
    pub offset: u16,
    /// Padding.
    pub pad: u32,
}
const _: () = assert!(size_of::<CopyPtr>() == 16);

/// `GrantCopy::flags`: the source is a grant reference.
pub const GNTCOPY_SOURCE_GREF: u16 = 1;
/// `GrantCopy::flags`: the destination is a grant reference.
pub const GNTCOPY_DEST_GREF: u16 = 2;

/// `struct gnttab_copy`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GrantCopy {
    /// From here.
    pub source: CopyPtr,
    /// To here.
    pub dest: CopyPtr,
    /// Bytes; must stay inside both pages.
    pub len: u16,
    /// `GNTCOPY_*`.
    pub flags: u16,
    /// Out.
    pub status: GrantStatus,
    /// Padding.
    pub pad: u16,
}
const _: () = assert!(size_of::<GrantCopy>() == 40 && offset_of!(GrantCopy, len) == 32);
