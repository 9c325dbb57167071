//! Xen's public guest ABI, as far as Axolotl speaks it: hypercall numbers, argument
//! structures, shared pages and ring entries.
//!
//! Nothing here acts. Every structure is plain data whose layout is proved at compile time
//! against Xen's public headers (`xen/include/public/`), for the 64-bit ABI. Numbers that a
//! peer chooses are newtypes or plain integers with constants, never Rust enums, so that an
//! unknown value survives a copy. What is Axolotl's own lives in `axolotl-abi`.

#![no_std]
#![forbid(unsafe_code)]

pub mod blkif;
pub mod errno;
pub mod event;
pub mod grant;
pub mod hvm;
pub mod hypercall;
pub mod memory;
pub mod netif;
pub mod ring;
pub mod sched;
pub mod shared_info;
pub mod vcpu;
pub mod xenstore;

pub use errno::Errno;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes in a page, a frame and a grant.
pub const PAGE_SIZE: usize = 4096;

/// Identifies a domain. Stays the same over restarts of the domain.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct DomainId(pub u16);

impl DomainId {
    /// First number that is not the id of a real domain (`DOMID_FIRST_RESERVED`).
    pub const FIRST_RESERVED: u16 = 0x7ff0;
    /// The caller itself (`DOMID_SELF`).
    pub const SELF: Self = Self(0x7ff0);
    /// No domain at all (`DOMID_INVALID`).
    pub const INVALID: Self = Self(0x7ff4);
}

impl core::fmt::Display for DomainId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "d{}", self.0)
    }
}

/// A guest frame number: a page of a domain's guest-physical address space.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct Gfn(pub u64);

impl Gfn {
    /// Guest-physical address of the frame's first byte.
    #[must_use]
    pub const fn address(self) -> u64 {
        self.0 << 12
    }

    /// The frame that contains `address`.
    #[must_use]
    pub const fn containing(address: u64) -> Self {
        Self(address >> 12)
    }
}

/// An event channel port of one domain. Port 0 is never used.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct EventPort(pub u32);

/// An index into the *granter's* grant table, as a peer names it: any value is possible.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct GrantRef(pub u32);
