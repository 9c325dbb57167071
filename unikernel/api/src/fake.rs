//! Several domains in one process, for tests.
//!
//! A [`World`] has the core's tables: who granted which page to whom, which ports are connected,
//! and a clock that only tests move. Each [`Domain`] is one incarnation of a domain, with the
//! traits of this crate. Results and side effects are those of the real core, down to what
//! happens to the peers of a domain that dies ([`World::kill`]); nothing runs by itself, so that
//! a test decides about every interleaving.
//!
//! ```
//! use domain_api::fake::World;
//! use domain_api::{DomainId, Events};
//!
//! let world = World::new();
//! let mut guest = world.domain(DomainId(3));
//! let mut driver = world.domain(DomainId(2));
//! let port = guest.alloc_unbound(driver.id())?;
//! let local = driver.bind_interdomain(guest.id(), port)?;
//! driver.notify(local);
//! assert_eq!(guest.take_pending(), [port]);
//! # Ok::<(), domain_api::Errno>(())
//! ```

use crate::{
    Access, Clock, DeviceGrants, Direction, Dma, DmaPage, DomainId, Errno, EventPort, Events,
    GrantCopy, GrantRef, GrantStatus, Granter, Grants, MapRequest, MappedDmaGrant, MappedGrant,
    Page,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use xen_abi::PAGE_SIZE;
use xen_abi::grant::{ENTRIES_PER_FRAME, RESERVED_ENTRIES};

/// Ports of a domain: 1 up to here.
pub const MAX_PORT: u32 = 1023;
/// Entries of a domain's grant table.
pub const MAX_GRANTS: u32 = 4 * ENTRIES_PER_FRAME;

/// Bus address of the first DMA page; far from any address that a [`Page`] has by itself.
const FIRST_BUS_ADDRESS: u64 = 0xd_0000_0000;

/// What the core would know. Clones are the same world.
#[derive(Clone, Debug, Default)]
pub struct World(Arc<Mutex<State>>);

/// One incarnation of a domain. Once it was killed, everything that is done in its name has no
/// effect, as if it had never come to it.
///
/// Clones are the same incarnation, for code that wants several traits at once.
#[derive(Clone, Debug)]
pub struct Domain {
    world: World,
    id: DomainId,
    incarnation: u32,
}

#[derive(Debug, Default)]
struct State {
    domains: BTreeMap<DomainId, Record>,
    now_ns: u64,
    handles: u32,
    bus_pages: u64,
    notifications: u64,
}

#[derive(Debug, Default)]
struct Record {
    incarnation: u32,
    alive: bool,
    ports: BTreeMap<u32, Port>,
    pending: BTreeSet<u32>,
    grants: BTreeMap<u32, Grant>,
    mappings: BTreeMap<u32, Mapping>,
    /// What devices reach, by bus address.
    dma: BTreeMap<u64, Page>,
    /// Bus addresses of mapped grants, by handle.
    dma_handles: BTreeMap<u32, u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Port {
    Unbound(DomainId),
    Interdomain(DomainId, u32),
}

#[derive(Debug)]
struct Grant {
    grantee: DomainId,
    page: Page,
    access: Access,
    pins: u32,
    /// Of the granter, when the grant was made.
    incarnation: u32,
}

#[derive(Debug)]
struct Mapping {
    granter: DomainId,
    gref: GrantRef,
    incarnation: u32,
}

impl World {
    /// A world without domains, at time 0.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a domain: its first incarnation, or after [`Self::kill`] its next one.
    ///
    /// # Panics
    /// When it is alive.
    #[must_use]
    pub fn domain(&self, id: DomainId) -> Domain {
        let mut state = self.state();
        let record = state.domains.entry(id).or_default();
        assert!(!record.alive, "{id} is alive");
        record.alive = true;
        record.incarnation += 1;
        Domain { world: self.clone(), id, incarnation: record.incarnation }
    }

    /// Ends a domain's incarnation as the core does: releases the grants of others that it has
    /// mapped, closes its ports, which leaves each peer's port unbound for this domain again, and
    /// forgets its own grant table. What others have mapped of its memory stays.
    pub fn kill(&self, id: DomainId) {
        let mut state = self.state();
        let Some(record) = state.domains.get_mut(&id) else { return };
        record.alive = false;
        record.grants.clear();
        record.dma.clear();
        record.dma_handles.clear();
        let ports: Vec<u32> = record.ports.keys().copied().collect();
        let mappings = core::mem::take(&mut record.mappings);
        for port in ports {
            state.close(id, port);
        }
        for mapping in mappings.into_values() {
            state.unpin(&mapping);
        }
    }

    /// Kills a domain, and takes its id away: whoever names it gets `ESRCH`.
    pub fn destroy(&self, id: DomainId) {
        self.kill(id);
        self.state().domains.remove(&id);
    }

    /// Moves the clock.
    pub fn advance(&self, ns: u64) {
        self.state().now_ns += ns;
    }

    /// The clock, as every domain sees it.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.state().now_ns
    }

    /// Makes a port in `owner` in the name of its builder, for one of the services.
    ///
    /// # Errors
    /// `ESRCH`, or `ENOSPC` when there is no free port.
    pub fn alloc_unbound_in(&self, owner: DomainId, remote: DomainId) -> Result<EventPort, Errno> {
        self.state().open(owner, Port::Unbound(remote))
    }

    /// Fills one of the entries that are reserved for a domain's builder: 0 the console ring, 1
    /// the xenstore ring.
    ///
    /// # Panics
    /// When there is no such domain, or the entry is not a reserved one.
    pub fn set_grant(&self, granter: DomainId, gref: GrantRef, to: DomainId, page: &Page) {
        assert!(gref.0 < RESERVED_ENTRIES, "grant {} is not reserved", gref.0);
        let mut state = self.state();
        let record = state.domains.get_mut(&granter).expect("the granter exists");
        let (page, incarnation) = (page.clone(), record.incarnation);
        let access = Access::ReadWrite;
        record.grants.insert(gref.0, Grant { grantee: to, page, access, pins: 0, incarnation });
    }

    /// The memory behind a bus address, for the model of a device: a page that a domain got from
    /// [`Dma::alloc`] or [`Grants::map_for_devices`], and the offset in it.
    #[must_use]
    pub fn at_bus_address(&self, address: u64) -> Option<(Page, usize)> {
        let state = self.state();
        let offset = address % PAGE_SIZE as u64;
        let page = state.domains.values().find_map(|r| r.dma.get(&(address - offset)))?;
        Some((page.clone(), usize::try_from(offset).ok()?))
    }

    /// How often anybody called [`Events::notify`] on an open port.
    #[must_use]
    pub fn notifications(&self) -> u64 {
        self.state().notifications
    }

    /// Whether `gref` of `granter` is mapped by anybody.
    #[must_use]
    pub fn is_mapped(&self, granter: DomainId, gref: GrantRef) -> bool {
        let state = self.state();
        let grant = state.domains.get(&granter).and_then(|r| r.grants.get(&gref.0));
        grant.is_some_and(|g| g.pins > 0)
    }
}

impl State {
    fn open(&mut self, owner: DomainId, port: Port) -> Result<EventPort, Errno> {
        let record = self.domains.get_mut(&owner).ok_or(Errno::ESRCH)?;
        let number = (1..=MAX_PORT).find(|n| !record.ports.contains_key(n)).ok_or(Errno::ENOSPC)?;
        record.ports.insert(number, port);
        Ok(EventPort(number))
    }

    /// Closes a port; a connected peer's goes back to waiting for `owner`.
    fn close(&mut self, owner: DomainId, port: u32) {
        let Some(record) = self.domains.get_mut(&owner) else { return };
        record.pending.remove(&port);
        let Some(Port::Interdomain(peer, peer_port)) = record.ports.remove(&port) else { return };
        if let Some(port) = self.domains.get_mut(&peer).and_then(|r| r.ports.get_mut(&peer_port)) {
            *port = Port::Unbound(owner);
        }
    }

    fn bind(
        &mut self,
        caller: DomainId,
        remote: DomainId,
        remote_port: EventPort,
    ) -> Result<EventPort, Errno> {
        let peer = self.domains.get(&remote).ok_or(Errno::ESRCH)?;
        if peer.ports.get(&remote_port.0) != Some(&Port::Unbound(caller)) {
            return Err(Errno::EINVAL);
        }
        let local = self.open(caller, Port::Interdomain(remote, remote_port.0))?;
        if let Some(peer) = self.domains.get_mut(&remote) {
            peer.ports.insert(remote_port.0, Port::Interdomain(caller, local.0));
        }
        if let Some(record) = self.domains.get_mut(&caller) {
            record.pending.insert(local.0);
        }
        Ok(local)
    }

    /// Finds a grant as the core does when it is mapped or copied.
    fn grant(
        &mut self,
        caller: DomainId,
        granter: DomainId,
        gref: GrantRef,
        access: Access,
    ) -> Result<&mut Grant, GrantStatus> {
        let record = self.domains.get_mut(&granter).ok_or(GrantStatus::BAD_DOMAIN)?;
        if gref.0 >= MAX_GRANTS {
            return Err(GrantStatus::BAD_GNTREF);
        }
        let grant = record.grants.get_mut(&gref.0).ok_or(GrantStatus::GENERAL_ERROR)?;
        let writes_read_only = access == Access::ReadWrite && grant.access == Access::ReadOnly;
        if grant.grantee != caller || writes_read_only {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        Ok(grant)
    }

    fn next_bus_address(&mut self) -> u64 {
        let address = FIRST_BUS_ADDRESS + self.bus_pages * PAGE_SIZE as u64;
        self.bus_pages += 1;
        address
    }

    fn unpin(&mut self, mapping: &Mapping) {
        let granter = self.domains.get_mut(&mapping.granter);
        let grant = granter.and_then(|r| r.grants.get_mut(&mapping.gref.0));
        if let Some(grant) = grant.filter(|g| g.incarnation == mapping.incarnation) {
            grant.pins -= 1;
        }
    }

    fn copy(&mut self, caller: DomainId, operation: &GrantCopy) -> Result<(), GrantStatus> {
        let len = usize::from(operation.len);
        let (local, remote) =
            (usize::from(operation.local_offset), usize::from(operation.remote_offset));
        if local + len > PAGE_SIZE || remote + len > PAGE_SIZE {
            return Err(GrantStatus::BAD_COPY_ARG);
        }
        let access = match operation.direction {
            Direction::FromRemote => Access::ReadOnly,
            Direction::ToRemote => Access::ReadWrite,
        };
        let page = &self.grant(caller, operation.remote, operation.gref, access)?.page;
        let mut bytes = vec![0; len];
        match operation.direction {
            Direction::FromRemote => {
                page.read(remote, &mut bytes);
                operation.local.write(local, &bytes);
            }
            Direction::ToRemote => {
                operation.local.read(local, &mut bytes);
                page.write(remote, &bytes);
            }
        }
        Ok(())
    }
}

impl Domain {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> DomainId {
        self.id
    }

    /// Which life this is, from 1.
    #[must_use]
    pub fn incarnation(&self) -> u32 {
        self.incarnation
    }

    /// The world that it is in.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// The world's state, unless this incarnation is over.
    fn live(&self) -> Option<MutexGuard<'_, State>> {
        let state = self.world.state();
        let record = state.domains.get(&self.id)?;
        (record.alive && record.incarnation == self.incarnation).then_some(state)
    }

    /// Its own record, unless this incarnation is over.
    fn with<R>(&self, work: impl FnOnce(&mut Record) -> R) -> Option<R> {
        let mut state = self.live()?;
        state.domains.get_mut(&self.id).map(work)
    }

    /// Takes all pending ports, lowest first, as one pass of an event loop does.
    #[must_use]
    pub fn take_pending(&mut self) -> Vec<EventPort> {
        let ports = self.with(|record| core::mem::take(&mut record.pending));
        ports.unwrap_or_default().into_iter().map(EventPort).collect()
    }

    /// A page of the domain's own, such as a preserved one, that its devices reach from now on.
    pub fn dma_page(&mut self, page: &Page) -> DmaPage {
        let mut state = self.world.state();
        let bus_address = state.next_bus_address();
        if let Some(record) = state.domains.get_mut(&self.id) {
            record.dma.insert(bus_address, page.clone());
        }
        DmaPage { page: page.clone(), bus_address }
    }

    /// Whether an event is pending; this is what the real domain would be woken by.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        self.with(|record| !record.pending.is_empty()).unwrap_or(false)
    }

    /// Makes a port of this domain pending, as an interrupt or a timer does.
    pub fn raise(&mut self, port: EventPort) {
        self.with(|record| record.pending.insert(port.0));
    }

    /// Ports in use.
    #[must_use]
    pub fn open_ports(&self) -> usize {
        self.with(|record| record.ports.len()).unwrap_or(0)
    }

    /// Grants of others that it has mapped.
    #[must_use]
    pub fn mappings(&self) -> usize {
        self.with(|record| record.mappings.len()).unwrap_or(0)
    }

    /// Entries in use of its grant table, the reserved ones not counted.
    #[must_use]
    pub fn grants(&self) -> usize {
        self.with(|record| record.grants.range(RESERVED_ENTRIES..).count()).unwrap_or(0)
    }
}

impl Events for Domain {
    fn alloc_unbound(&mut self, remote: DomainId) -> Result<EventPort, Errno> {
        self.live().ok_or(Errno::ESRCH)?.open(self.id, Port::Unbound(remote))
    }

    fn bind_interdomain(&mut self, remote: DomainId, port: EventPort) -> Result<EventPort, Errno> {
        self.live().ok_or(Errno::ESRCH)?.bind(self.id, remote, port)
    }

    fn close(&mut self, port: EventPort) {
        if let Some(mut state) = self.live() {
            state.close(self.id, port.0);
        }
    }

    fn notify(&mut self, port: EventPort) {
        let Some(mut state) = self.live() else { return };
        let Some(&target) = state.domains.get(&self.id).and_then(|r| r.ports.get(&port.0)) else {
            return;
        };
        state.notifications += 1;
        let Port::Interdomain(peer, peer_port) = target else { return };
        if let Some(record) = state.domains.get_mut(&peer) {
            record.pending.insert(peer_port);
        }
    }
}

impl DeviceGrants for Domain {
    fn map_for_devices(
        &mut self,
        requests: &[MapRequest],
        results: &mut Vec<Result<MappedDmaGrant, GrantStatus>>,
    ) {
        for request in requests {
            let mapped = self.map(request.granter, request.gref, request.access);
            results.push(mapped.and_then(|MappedGrant { page, handle }| {
                let mut state = self.live().ok_or(GrantStatus::GENERAL_ERROR)?;
                let bus_address = state.next_bus_address();
                if let Some(record) = state.domains.get_mut(&self.id) {
                    // An alias, so that the user's handles are counted by themselves.
                    record.dma.insert(bus_address, page.alias());
                    record.dma_handles.insert(handle, bus_address);
                }
                let page = page.alias();
                Ok(MappedDmaGrant { page: DmaPage { page, bus_address }, handle })
            }));
        }
    }

    /// # Panics
    /// When other handles to the page are left, or there is no such mapping.
    fn unmap_from_devices(&mut self, mappings: &mut Vec<MappedDmaGrant>) {
        for mapping in mappings.drain(..) {
            let handle = mapping.handle;
            self.with(|record| {
                let address = record.dma_handles.remove(&handle).expect("the mapping exists");
                record.dma.remove(&address);
            });
            self.unmap(MappedGrant { page: mapping.page.page, handle });
        }
    }
}

impl Grants for Domain {
    fn map(
        &mut self,
        granter: DomainId,
        gref: GrantRef,
        access: Access,
    ) -> Result<MappedGrant, GrantStatus> {
        let mut state = self.live().ok_or(GrantStatus::GENERAL_ERROR)?;
        let grant = state.grant(self.id, granter, gref, access)?;
        grant.pins += 1;
        // Handles to the mapping are counted apart from the granter's own.
        let (page, incarnation) = (grant.page.alias(), grant.incarnation);
        state.handles += 1;
        let handle = state.handles;
        if let Some(record) = state.domains.get_mut(&self.id) {
            record.mappings.insert(handle, Mapping { granter, gref, incarnation });
        }
        Ok(MappedGrant { page, handle })
    }

    /// # Panics
    /// When other handles to the page are left, or there is no such mapping.
    fn unmap(&mut self, mapping: MappedGrant) {
        assert_eq!(mapping.page.handles(), 1, "a page is unmapped while it is in use");
        let Some(mut state) = self.live() else { return };
        let record = state.domains.get_mut(&self.id);
        let mapping = record.and_then(|r| r.mappings.remove(&mapping.handle));
        state.unpin(&mapping.expect("the mapping exists"));
    }

    fn copy(&mut self, operations: &mut [GrantCopy]) {
        for operation in operations {
            let done = match self.live() {
                Some(mut state) => state.copy(self.id, operation),
                None => Err(GrantStatus::GENERAL_ERROR),
            };
            operation.status = done.err().unwrap_or(GrantStatus::OKAY);
        }
    }
}

impl Granter for Domain {
    fn grant(&mut self, to: DomainId, page: &Page, access: Access) -> Result<GrantRef, Errno> {
        let page = page.clone();
        let incarnation = self.incarnation;
        self.with(|record| {
            let gref = (RESERVED_ENTRIES..MAX_GRANTS)
                .find(|gref| !record.grants.contains_key(gref))
                .ok_or(Errno::ENOSPC)?;
            let grant = Grant { grantee: to, page, access, pins: 0, incarnation };
            record.grants.insert(gref, grant);
            Ok(GrantRef(gref))
        })
        .unwrap_or(Err(Errno::ESRCH))
    }

    fn revoke(&mut self, gref: GrantRef) -> Result<(), Errno> {
        self.with(|record| match record.grants.get(&gref.0) {
            Some(grant) if grant.pins > 0 => Err(Errno::EBUSY),
            _ => {
                record.grants.remove(&gref.0);
                Ok(())
            }
        })
        .unwrap_or(Ok(()))
    }
}

impl Clock for Domain {
    fn now_ns(&self) -> u64 {
        self.world.now_ns()
    }
}

impl Dma for Domain {
    fn alloc(&mut self) -> Result<DmaPage, Errno> {
        drop(self.live().ok_or(Errno::ESRCH)?);
        Ok(self.dma_page(&Page::new_zeroed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: DomainId = DomainId(3);
    const DRIVER: DomainId = DomainId(2);

    fn pair() -> (World, Domain, Domain) {
        let world = World::new();
        let (guest, driver) = (world.domain(GUEST), world.domain(DRIVER));
        (world, guest, driver)
    }

    /// Section 9.2: binding raises the local port and never the remote one.
    #[test]
    fn binding_makes_only_the_callers_port_pending() {
        let (_world, mut guest, mut driver) = pair();
        let port = guest.alloc_unbound(DRIVER).unwrap();
        let local = driver.bind_interdomain(GUEST, port).unwrap();
        assert_eq!(driver.take_pending(), [local]);
        assert_eq!(guest.take_pending(), []);
    }

    /// Section 10.2, R10: the same port number can be bound by the next incarnation.
    #[test]
    fn death_leaves_the_peers_port_unbound_for_the_successor() {
        let (world, mut guest, mut driver) = pair();
        let port = guest.alloc_unbound(DRIVER).unwrap();
        let _ = driver.bind_interdomain(GUEST, port).unwrap();
        world.kill(DRIVER);
        guest.notify(port);
        let mut next = world.domain(DRIVER);
        assert_eq!(next.take_pending(), []);
        let local = next.bind_interdomain(GUEST, port).unwrap();
        guest.notify(port);
        assert_eq!(next.take_pending(), [local]);
        driver.notify(local);
        assert_eq!(guest.take_pending(), [], "the dead incarnation is mute");
        let mut other = world.domain(DomainId(4));
        assert_eq!(other.bind_interdomain(GUEST, port), Err(Errno::EINVAL));
    }

    /// Section 10.2, R5: the granter can revoke what the dead had mapped.
    #[test]
    fn death_releases_mappings() {
        let (world, mut guest, mut driver) = pair();
        let page = Page::new_zeroed();
        let gref = guest.grant(DRIVER, &page, Access::ReadWrite).unwrap();
        let mapping = driver.map(GUEST, gref, Access::ReadWrite).unwrap();
        mapping.page.write(8, b"ring");
        assert_eq!(guest.revoke(gref), Err(Errno::EBUSY));
        world.kill(DRIVER);
        assert_eq!(guest.revoke(gref), Ok(()));
        let mut read = [0; 4];
        page.read(8, &mut read);
        assert_eq!(&read, b"ring");
        driver.unmap(mapping);
    }

    /// The granter's death does not pull the page from under whoever has mapped it.
    #[test]
    fn a_mapping_survives_its_granter() {
        let (world, mut guest, mut driver) = pair();
        let gref = guest.grant(DRIVER, &Page::new_zeroed(), Access::ReadOnly).unwrap();
        let mapping = driver.map(GUEST, gref, Access::ReadOnly).unwrap();
        world.kill(GUEST);
        let mut guest = world.domain(GUEST);
        let again = guest.grant(DRIVER, &Page::new_zeroed(), Access::ReadOnly).unwrap();
        assert_eq!(again, gref);
        driver.unmap(mapping);
        assert_eq!(guest.revoke(again), Ok(()));
    }

    #[test]
    fn a_grant_is_for_one_domain_and_one_access() {
        let (world, mut guest, mut driver) = pair();
        let page = Page::new_zeroed();
        let gref = guest.grant(DRIVER, &page, Access::ReadOnly).unwrap();
        let refused = Some(GrantStatus::GENERAL_ERROR);
        assert_eq!(driver.map(GUEST, gref, Access::ReadWrite).err(), refused);
        let mut other = world.domain(DomainId(4));
        assert_eq!(other.map(GUEST, gref, Access::ReadOnly).err(), refused);
        let missing = driver.map(DomainId(9), gref, Access::ReadOnly).err();
        assert_eq!(missing, Some(GrantStatus::BAD_DOMAIN));
    }

    #[test]
    fn copies_report_each_for_itself() {
        let (_world, mut guest, mut driver) = pair();
        let (theirs, ours) = (Page::new_zeroed(), Page::new_zeroed());
        theirs.write(100, b"payload");
        let gref = guest.grant(DRIVER, &theirs, Access::ReadOnly).unwrap();
        let one = GrantCopy {
            local: ours.clone(),
            local_offset: 1,
            remote: GUEST,
            gref,
            remote_offset: 100,
            len: 7,
            direction: Direction::FromRemote,
            status: GrantStatus::GENERAL_ERROR,
        };
        let write = GrantCopy { direction: Direction::ToRemote, ..one.clone() };
        let long = GrantCopy { remote_offset: 4090, ..one.clone() };
        let mut batch = [one, write, long];
        driver.copy(&mut batch);
        let wanted = [GrantStatus::OKAY, GrantStatus::GENERAL_ERROR, GrantStatus::BAD_COPY_ARG];
        assert_eq!(batch.map(|o| o.status), wanted);
        let mut read = [0; 7];
        ours.read(1, &mut read);
        assert_eq!(&read, b"payload");
    }

    #[test]
    fn devices_find_mapped_grants() {
        let (world, mut guest, mut driver) = pair();
        let page = Page::new_zeroed();
        let gref = guest.grant(DRIVER, &page, Access::ReadWrite).unwrap();
        let wanted = |gref| MapRequest { granter: GUEST, gref, access: Access::ReadWrite };
        let mut results = Vec::new();
        driver.map_for_devices(&[wanted(gref), wanted(GrantRef(99))], &mut results);
        assert_eq!(results.pop().map(|it| it.err()), Some(Some(GrantStatus::GENERAL_ERROR)));
        let mut mapped: Vec<_> = results.into_iter().map(Result::unwrap).collect();
        let address = mapped[0].page.bus_address;
        assert!(world.at_bus_address(address).unwrap().0.is_same(&page));
        assert_eq!(guest.revoke(gref), Err(Errno::EBUSY));
        driver.unmap_from_devices(&mut mapped);
        assert!(world.at_bus_address(address).is_none());
        assert_eq!(guest.revoke(gref), Ok(()));
    }

    #[test]
    #[should_panic(expected = "in use")]
    fn unmapping_a_page_in_use_is_a_bug() {
        let (_world, mut guest, mut driver) = pair();
        let gref = guest.grant(DRIVER, &Page::new_zeroed(), Access::ReadOnly).unwrap();
        let mapping = driver.map(GUEST, gref, Access::ReadOnly).unwrap();
        let _kept = mapping.page.clone();
        driver.unmap(mapping);
    }

    #[test]
    fn devices_find_pages_by_bus_address() {
        let (world, _guest, mut driver) = pair();
        let page = driver.alloc().unwrap();
        let (found, offset) = world.at_bus_address(page.bus_address + 5).unwrap();
        assert!(found.is_same(&page.page) && offset == 5);
        world.kill(DRIVER);
        assert!(world.at_bus_address(page.bus_address).is_none());
    }
}
