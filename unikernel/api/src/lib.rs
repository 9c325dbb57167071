//! What a domain may ask of the core, as traits.
//!
//! Backends, frontends and drivers are written against these traits. In the machine `unikernel`
//! implements them by hypercalls; on a host `fake` implements them for several domains in one
//! process, so that both ends of a split driver meet in a test.

#![cfg_attr(not(any(test, feature = "fake")), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod disk;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod nic;
#[cfg(any(test, feature = "fake"))]
pub mod packets;

use alloc::vec::Vec;
pub use shmem::Page;
pub use xen_abi::{DomainId, Errno, EventPort, Gfn, GrantRef, grant::GrantStatus};

/// What a grantee may do with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read.
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

/// Event channels.
pub trait Events {
    /// Makes a port that only `remote` can bind to.
    ///
    /// # Errors
    /// `ENOSPC` when the domain has no free port.
    fn alloc_unbound(&mut self, remote: DomainId) -> Result<EventPort, Errno>;

    /// Connects a new port to `port` of `remote`. The new port starts out pending.
    ///
    /// # Errors
    /// `EINVAL` when that port is not unbound for us, `ESRCH` when there is no such domain.
    fn bind_interdomain(&mut self, remote: DomainId, port: EventPort) -> Result<EventPort, Errno>;

    /// Closes a port. A port that is not open is left alone.
    fn close(&mut self, port: EventPort);

    /// Raises the event at the other end. Silently does nothing while there is no other end.
    fn notify(&mut self, port: EventPort);
}

/// Pages that others granted to us.
pub trait Grants {
    /// Maps a page. It stays until [`Self::unmap`], or until this domain's incarnation ends.
    ///
    /// # Errors
    /// What the core found wrong with the grant.
    fn map(
        &mut self,
        granter: DomainId,
        gref: GrantRef,
        access: Access,
    ) -> Result<MappedGrant, GrantStatus>;

    /// Gives a mapping back. All other handles to its page must be gone.
    fn unmap(&mut self, mapping: MappedGrant);

    /// Copies between own pages and granted ones, in order, in as few hypercalls as possible.
    /// Each operation has its own result in `status`.
    fn copy(&mut self, operations: &mut [GrantCopy]);
}

/// Pages that others granted to us, for devices that we own.
pub trait DeviceGrants: Grants {
    /// Maps several pages so that the domain's devices reach them too, in as few hypercalls as
    /// possible. Each has its own result, in order, added to `results`.
    fn map_for_devices(
        &mut self,
        requests: &[MapRequest],
        results: &mut Vec<Result<MappedDmaGrant, GrantStatus>>,
    );

    /// Gives all `mappings` back, in as few hypercalls as possible, and leaves none. All other
    /// handles to their pages must be gone, and no device uses them any more.
    fn unmap_from_devices(&mut self, mappings: &mut Vec<MappedDmaGrant>);
}

/// A page of another domain, mapped here.
#[derive(Debug)]
#[must_use = "a mapping pins the other domain's page until it is given to `Grants::unmap`"]
pub struct MappedGrant {
    /// The page.
    pub page: Page,
    /// What the core calls the mapping.
    pub handle: u32,
}

/// One page wanted from another domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapRequest {
    /// Whose page.
    pub granter: DomainId,
    /// Its grant.
    pub gref: GrantRef,
    /// How.
    pub access: Access,
}

/// A page of another domain, mapped here and for this domain's devices.
#[derive(Debug)]
#[must_use = "a mapping pins the other domain's page until it is given back"]
pub struct MappedDmaGrant {
    /// The page, for us and for the devices.
    pub page: DmaPage,
    /// What the core calls the mapping.
    pub handle: u32,
}

/// One part of a [`Grants::copy`].
#[derive(Clone, Debug)]
pub struct GrantCopy {
    /// Our side.
    pub local: Page,
    /// Where in our page.
    pub local_offset: u16,
    /// The other domain.
    pub remote: DomainId,
    /// Its grant.
    pub gref: GrantRef,
    /// Where in its page.
    pub remote_offset: u16,
    /// Bytes.
    pub len: u16,
    /// Which way.
    pub direction: Direction,
    /// Out.
    pub status: GrantStatus,
}

/// Which way a grant copy goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the other domain's page into ours.
    FromRemote,
    /// From our page into the other domain's.
    ToRemote,
}

/// Our own grant table.
pub trait Granter {
    /// Lets `to` use `page`, until [`Self::revoke`].
    ///
    /// # Errors
    /// `ENOSPC` when the table is full.
    fn grant(&mut self, to: DomainId, page: &Page, access: Access) -> Result<GrantRef, Errno>;

    /// Takes a grant back.
    ///
    /// # Errors
    /// `EBUSY` while the other domain uses it; the grant is then still in force.
    fn revoke(&mut self, gref: GrantRef) -> Result<(), Errno>;
}

/// Time.
pub trait Clock {
    /// System time: nanoseconds since the core was entered, the same in every domain.
    fn now_ns(&self) -> u64;
}

/// Registers of a device.
pub trait Registers {
    /// Reads the 32-bit register at byte `offset`.
    fn read(&self, offset: u32) -> u32;
    /// Writes it.
    fn write(&mut self, offset: u32, value: u32);
}

/// Memory that a device may reach.
pub trait Dma {
    /// Allocates a page of zeros.
    ///
    /// # Errors
    /// `ENOMEM`, or what the core answered.
    fn alloc(&mut self) -> Result<DmaPage, Errno>;
}

/// A page that a device may reach.
#[derive(Clone, Debug)]
pub struct DmaPage {
    /// For us.
    pub page: Page,
    /// For the device.
    pub bus_address: u64,
}
