//! What a simulated domain has of the machine: the traits of `domain-api`, by hypercalls.
//!
//! This is to the simulation what `unikernel` is to the real machine: the same calls with the
//! same structures, its own side of the grant table and of the event bits, on pages that are the
//! frames of the fake machine.

use crate::coroutine::{self, is_dying, step, unwatched};
use axolotl_abi::DEVICE_OP;
use axolotl_abi::device::{
    BIND_INTERRUPT, BindInterrupt, CONFIG_READ, CONFIG_WRITE, Config, DeviceInfo, GET_DEVICE,
    TRANSLATE, Translate,
};
use axolotl_abi::start::{
    GRANT_TABLE_GPA, GRANT_WINDOW_GPA, HEAP_GPA, PRESERVED_GPA, SHARED_INFO_GPA, XENSTORE_RING_GPA,
};
use domain_api::{
    Access, Clock, DeviceGrants, Direction, Dma, DmaPage, DomainId, Errno, EventPort, Events,
    GrantCopy, GrantRef, GrantStatus, Granter, Grants, MapRequest, MappedDmaGrant, MappedGrant,
    Page,
};
use hv_core::fake::View;
use shmem::PeerError;
use shmem::bytes::ByteRing;
use shmem::events::{Calls, Ports, Receiver};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use xen_abi::event::{
    ALLOC_UNBOUND, AllocUnbound, BIND_INTERDOMAIN, BIND_VIRQ, BindInterdomain, BindVirq, CLOSE,
    PortOp, SEND, VIRQ_TIMER,
};
use xen_abi::grant::{
    COPY, CopyPtr, ENTRIES_PER_FRAME, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GNTMAP_DEVICE_MAP,
    GNTMAP_HOST_MAP, GNTMAP_READONLY, GTF_PERMIT_ACCESS, GTF_READING, GTF_READONLY, GTF_WRITING,
    MAP_GRANT_REF, MAX_FRAMES, MapGrantRef, RESERVED_ENTRIES, UNMAP_GRANT_REF, UnmapGrantRef,
};
use xen_abi::hypercall::{EVENT_CHANNEL_OP, GRANT_TABLE_OP, MEMORY_OP, SCHED_OP, SET_TIMER_OP};
use xen_abi::memory::{ADD_TO_PHYSMAP, AddToPhysmap, SPACE_GRANT_TABLE, SPACE_SHARED_INFO};
use xen_abi::sched::{BLOCK, POLL, Poll};
use xen_abi::xenstore::{CONNECTED, CONNECTION};
use xen_abi::{Gfn, PAGE_SIZE};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// Grant operations in one hypercall, as in `unikernel`.
const BATCH: usize = 32;
/// Argument structures are in the first page of heap; what they point to is in its upper half.
const POINTED: usize = 2048;
/// What reading the clock once takes, and at most when nothing else is done between two readings.
const CLOCK_NS: u64 = 100;
const CLOCK_MOST_NS: u64 = 10_000;

/// This domain. Clones are the same one.
#[derive(Clone)]
pub struct Domain(Rc<Inner>);

/// What a domain is told at its start.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Its id.
    pub id: DomainId,
    /// Which life this is, from 1.
    pub incarnation: u32,
    /// Its end of the connection to the store; 0: none.
    pub store_port: EventPort,
    /// Pages of heap.
    pub heap_pages: u64,
    /// Preserved pages.
    pub preserved_pages: u64,
}

struct Inner {
    start: Start,
    calls: Hypercalls,
    events: Receiver,
    table: RefCell<Table>,
    window: RefCell<Window>,
}

/// The memory that [`Page::new_zeroed`] gives out while the domain runs.
pub struct Heap {
    pages: Vec<Page>,
    next: Cell<usize>,
}

impl Heap {
    /// The heap of a domain that starts; its first page is for arguments.
    #[must_use]
    pub fn new(view: &View, start: &Start) -> Self {
        let first = Gfn::containing(HEAP_GPA).0;
        let pages = (first..first + start.heap_pages)
            .map(|gfn| view.memory(start.id, Gfn(gfn)).expect("the heap is populated"))
            .collect();
        Self { pages, next: Cell::new(1) }
    }

    /// A page of zeros that nobody has.
    ///
    /// # Panics
    /// There is none.
    #[must_use]
    pub fn allocate(&self) -> Page {
        let count = self.pages.len();
        let found = (0..count).map(|n| 1 + (self.next.get() - 1 + n) % (count - 1));
        let index = found.into_iter().find(|&index| self.pages[index].handles() == 1);
        let index = index.expect("the heap has a free page");
        self.next.set(1 + index % (count - 1));
        let page = self.pages[index].alias();
        unwatched(|| page.clear());
        page
    }
}

/// How the domain reaches the core.
#[derive(Clone)]
struct Hypercalls {
    id: DomainId,
    view: View,
    scratch: Page,
    /// Readings of the clock without a hypercall between them.
    readings: Rc<Cell<u32>>,
}

impl Hypercalls {
    fn raw(&self, number: u64, args: [u64; 5]) -> Result<u64, Errno> {
        step();
        self.readings.set(0);
        let answer = coroutine::hypercall(number, args).ok_or(Errno::ESRCH)?;
        step();
        Errno::from_result(answer.cast_signed())
    }

    /// A hypercall whose second argument points to structures that the core copies in and out.
    fn batch<T: FromBytes + IntoBytes + Immutable>(
        &self,
        number: u64,
        operation: u64,
        batch: &mut [T],
    ) -> Result<u64, Errno> {
        assert!(size_of_val(batch) <= POINTED, "arguments fit");
        unwatched(|| self.scratch.write(0, batch.as_bytes()));
        let result = self.raw(number, [operation, HEAP_GPA, batch.len() as u64, 0, 0]);
        if result.is_ok() || !is_dying() {
            unwatched(|| self.scratch.read(0, batch.as_mut_bytes()));
        }
        result
    }

    fn typed<T: FromBytes + IntoBytes + Immutable>(
        &self,
        number: u64,
        operation: u64,
        argument: &mut T,
    ) -> Result<u64, Errno> {
        self.batch(number, operation, std::slice::from_mut(argument))
    }

    fn page_at(&self, gpa: u64) -> Page {
        unwatched(|| self.view.memory(self.id, Gfn::containing(gpa))).expect("a page is there")
    }

    fn add_to_physmap(&self, space: u32, idx: u64, gpa: u64) -> Result<(), Errno> {
        let gpfn = gpa / PAGE_SIZE as u64;
        let mut op = AddToPhysmap { domid: DomainId::SELF, size: 0, space, idx, gpfn };
        self.typed(MEMORY_OP, ADD_TO_PHYSMAP, &mut op).map(drop)
    }
}

impl Calls for Hypercalls {
    fn now_ns(&self) -> u64 {
        step();
        let readings = self.readings.get();
        self.readings.set(readings + 1);
        let ns = (CLOCK_NS << readings.min(20)).min(CLOCK_MOST_NS);
        let mut machine = self.view.p.machine();
        machine.now_ns += if is_dying() { 0 } else { ns };
        machine.now_ns
    }

    fn set_timer(&self, deadline_ns: u64) {
        let _ = self.raw(SET_TIMER_OP, [deadline_ns, 0, 0, 0, 0]);
    }

    fn block(&self) {
        let _ = self.raw(SCHED_OP, [BLOCK, 0, 0, 0, 0]);
    }

    fn block_for(&self, port: EventPort, deadline_ns: u64) {
        unwatched(|| self.scratch.write(POINTED, &port.0.to_le_bytes()));
        let ports = HEAP_GPA + POINTED as u64;
        let mut poll = Poll { ports, nr_ports: 1, pad: 0, timeout: deadline_ns };
        let _ = self.typed(SCHED_OP, POLL, &mut poll);
    }
}

impl Domain {
    /// What the runtime does before `main`.
    #[must_use]
    pub fn new(view: &View, start: Start) -> Self {
        let calls = Hypercalls {
            id: start.id,
            view: view.clone(),
            scratch: unwatched(|| view.memory(start.id, Gfn::containing(HEAP_GPA)))
                .expect("every domain has a heap"),
            readings: Rc::default(),
        };
        calls
            .add_to_physmap(SPACE_SHARED_INFO, 0, SHARED_INFO_GPA)
            .expect("every domain has a shared-info page");
        let mut bind = BindVirq { virq: VIRQ_TIMER, vcpu: 0, port: EventPort(0) };
        calls.typed(EVENT_CHANNEL_OP, BIND_VIRQ, &mut bind).expect("every vCPU has a timer");
        let shared = calls.page_at(SHARED_INFO_GPA);
        Self(Rc::new(Inner {
            start,
            calls,
            events: Receiver::new(shared, bind.port),
            table: RefCell::default(),
            window: RefCell::default(),
        }))
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> DomainId {
        self.0.start.id
    }

    /// What it was told at its start.
    #[must_use]
    pub fn start(&self) -> &Start {
        &self.0.start
    }

    /// The pages whose content outlives the incarnation.
    #[must_use]
    pub fn preserved(&self) -> Vec<Page> {
        let pages = self.0.start.preserved_pages;
        (0..pages).map(|n| self.0.calls.page_at(PRESERVED_GPA + n * PAGE_SIZE as u64)).collect()
    }

    /// System time in ns.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.0.calls.now_ns()
    }

    /// The ports that have events now, without waiting.
    pub fn poll(&self) -> Ports {
        self.0.events.poll()
    }

    /// Sleeps until some port has an event, or until `deadline_ns`.
    pub fn wait(&self, deadline_ns: Option<u64>) -> Ports {
        self.0.events.wait(&self.0.calls, deadline_ns)
    }

    /// Binds a virtual interrupt to a new port.
    ///
    /// # Errors
    /// The core's.
    pub fn bind_virq(&self, virq: u32) -> Result<EventPort, Errno> {
        let mut bind = BindVirq { virq, vcpu: 0, port: EventPort(0) };
        self.call(EVENT_CHANNEL_OP, BIND_VIRQ, &mut bind)?;
        Ok(bind.port)
    }

    /// Issues a hypercall with an argument structure.
    ///
    /// # Errors
    /// The core's.
    pub fn call<T: FromBytes + IntoBytes + Immutable>(
        &self,
        number: u64,
        operation: u64,
        argument: &mut T,
    ) -> Result<u64, Errno> {
        self.0.calls.typed(number, operation, argument)
    }

    /// Puts bytes where a hypercall can be pointed to; their address.
    #[must_use]
    pub fn point_at(&self, bytes: &[u8]) -> u64 {
        unwatched(|| self.0.calls.scratch.write(POINTED, bytes));
        HEAP_GPA + POINTED as u64
    }

    /// Its end of the xenstore ring, once the store has taken notice of this incarnation.
    #[must_use]
    pub fn xenstore(&self) -> XenstoreRing {
        let port = self.0.start.store_port;
        let page = self.0.calls.page_at(XENSTORE_RING_GPA);
        while page.u32(CONNECTION).load(Acquire) != CONNECTED {
            self.0.events.wait_for(&self.0.calls, port, None);
        }
        XenstoreRing {
            domain: self.clone(),
            ring: ByteRing::xenstore_client(page),
            port,
            lost: false,
        }
    }

    /// The first of its devices.
    #[must_use]
    pub fn device(&self) -> Device {
        let mut info = DeviceInfo::new_zeroed();
        self.call(DEVICE_OP, GET_DEVICE, &mut info).expect("it owns a device");
        Device { domain: self.clone(), info }
    }
}

/// The xenstore ring as transport of a client, as in `unikernel`.
pub struct XenstoreRing {
    domain: Domain,
    ring: ByteRing,
    port: EventPort,
    lost: bool,
}

impl XenstoreRing {
    fn moved(&mut self, result: Result<usize, PeerError>) -> usize {
        match result {
            Ok(0) => 0,
            Ok(count) => {
                self.domain.notify(self.port);
                count
            }
            Err(_) => {
                self.lost = true;
                0
            }
        }
    }
}

impl xenbus::Transport for XenstoreRing {
    fn send(&mut self, bytes: &[u8]) -> usize {
        let result = self.ring.write(bytes);
        self.moved(result)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> usize {
        let result = self.ring.read(buffer);
        self.moved(result)
    }

    fn wait(&mut self) -> Result<(), Errno> {
        if self.lost {
            return Err(Errno::EIO);
        }
        let Inner { events, calls, .. } = &*self.domain.0;
        events.wait_for(calls, self.port, None);
        Ok(())
    }
}

impl Clock for Domain {
    fn now_ns(&self) -> u64 {
        Self::now_ns(self)
    }
}

impl Events for Domain {
    fn alloc_unbound(&mut self, remote: DomainId) -> Result<EventPort, Errno> {
        let mut op = AllocUnbound { dom: DomainId::SELF, remote_dom: remote, port: EventPort(0) };
        self.call(EVENT_CHANNEL_OP, ALLOC_UNBOUND, &mut op)?;
        Ok(op.port)
    }

    fn bind_interdomain(&mut self, remote: DomainId, port: EventPort) -> Result<EventPort, Errno> {
        let mut op = BindInterdomain {
            remote_dom: remote,
            pad: 0,
            remote_port: port,
            local_port: EventPort(0),
        };
        self.call(EVENT_CHANNEL_OP, BIND_INTERDOMAIN, &mut op)?;
        Ok(op.local_port)
    }

    fn close(&mut self, port: EventPort) {
        let _ = self.call(EVENT_CHANNEL_OP, CLOSE, &mut PortOp { port });
    }

    fn notify(&mut self, port: EventPort) {
        let _ = self.call(EVENT_CHANNEL_OP, SEND, &mut PortOp { port });
    }
}

/// The domain's own grant table.
#[derive(Default)]
struct Table {
    frames: Vec<Page>,
    free: Vec<u32>,
    granted: Vec<Option<Page>>,
}

impl Table {
    fn add_frame(&mut self, frame: Page) {
        let first = ENTRIES_PER_FRAME * u32::try_from(self.frames.len()).unwrap_or(MAX_FRAMES);
        let end = first + ENTRIES_PER_FRAME;
        self.frames.push(frame);
        self.granted.resize(end as usize, None);
        self.free.extend((first.max(RESERVED_ENTRIES)..end).rev());
    }

    fn entry(&self, gref: u32) -> (&Page, usize) {
        let (frame, entry) = (gref / ENTRIES_PER_FRAME, gref % ENTRIES_PER_FRAME);
        (&self.frames[frame as usize], 8 * entry as usize)
    }
}

impl Granter for Domain {
    fn grant(&mut self, to: DomainId, page: &Page, access: Access) -> Result<GrantRef, Errno> {
        let needs_frame = self.0.table.borrow().free.is_empty();
        if needs_frame {
            let index = self.0.table.borrow().frames.len() as u64;
            if index >= u64::from(MAX_FRAMES) {
                return Err(Errno::ENOSPC);
            }
            let gpa = GRANT_TABLE_GPA + index * PAGE_SIZE as u64;
            self.0.calls.add_to_physmap(SPACE_GRANT_TABLE, index, gpa)?;
            let frame = self.0.calls.page_at(gpa);
            self.0.table.borrow_mut().add_frame(frame);
        }
        let mut table = self.0.table.borrow_mut();
        let frame = u32::try_from(page.gfn().0).map_err(|_| Errno::EINVAL)?;
        let gref = table.free.pop().ok_or(Errno::ENOSPC)?;
        let flags = match access {
            Access::ReadOnly => GTF_PERMIT_ACCESS | GTF_READONLY,
            Access::ReadWrite => GTF_PERMIT_ACCESS,
        };
        let (entries, at) = table.entry(gref);
        entries.u16(at + 2).store(to.0, Relaxed);
        entries.u32(at + 4).store(frame, Relaxed);
        entries.u16(at).store(flags, Release);
        table.granted[gref as usize] = Some(page.clone());
        Ok(GrantRef(gref))
    }

    fn revoke(&mut self, gref: GrantRef) -> Result<(), Errno> {
        let mut table = self.0.table.borrow_mut();
        if !table.granted.get(gref.0 as usize).is_some_and(Option::is_some) {
            return Err(Errno::EINVAL);
        }
        let (entries, at) = table.entry(gref.0);
        entries
            .u16(at)
            .fetch_update(Acquire, Relaxed, |now| {
                (now & (GTF_READING | GTF_WRITING) == 0).then_some(0)
            })
            .map_err(|_| Errno::EBUSY)?;
        table.granted[gref.0 as usize] = None;
        table.free.push(gref.0);
        Ok(())
    }
}

/// Where grants of others are mapped.
#[derive(Default)]
struct Window {
    free: Vec<u64>,
    fresh: u64,
}

impl Window {
    fn take(&mut self) -> u64 {
        self.free.pop().unwrap_or_else(|| {
            self.fresh += 1;
            GRANT_WINDOW_GPA + (self.fresh - 1) * PAGE_SIZE as u64
        })
    }
}

impl Domain {
    fn map_batch(
        &self,
        requests: &[MapRequest],
        flags: u32,
        mut done: impl FnMut(Result<MappedDmaGrant, GrantStatus>),
    ) {
        let mut batch: Vec<MapGrantRef> = requests
            .iter()
            .map(|request| {
                let mut op = MapGrantRef::new_zeroed();
                op.host_addr = self.0.window.borrow_mut().take();
                op.flags = GNTMAP_HOST_MAP | flags;
                if request.access == Access::ReadOnly {
                    op.flags |= GNTMAP_READONLY;
                }
                (op.gref, op.dom) = (request.gref, request.granter);
                op.status = GrantStatus::GENERAL_ERROR;
                op
            })
            .collect();
        let answer = self.0.calls.batch(GRANT_TABLE_OP, MAP_GRANT_REF, &mut batch);
        for op in batch {
            let status = answer.map_or(GrantStatus::GENERAL_ERROR, |_| op.status);
            if status == GrantStatus::OKAY {
                let page = self.0.calls.page_at(op.host_addr);
                let page = DmaPage { page, bus_address: op.dev_bus_addr };
                done(Ok(MappedDmaGrant { page, handle: op.handle }));
            } else {
                self.0.window.borrow_mut().free.push(op.host_addr);
                done(Err(status));
            }
        }
    }

    fn unmap_batch(&self, mappings: Vec<(Page, u32)>) {
        let mut batch: Vec<UnmapGrantRef> = mappings
            .iter()
            .map(|(page, handle)| {
                assert_eq!(page.handles(), 1, "a page is unmapped while it is in use");
                let mut op = UnmapGrantRef::new_zeroed();
                (op.host_addr, op.handle) = (page.gfn().address(), *handle);
                op.status = GrantStatus::GENERAL_ERROR;
                op
            })
            .collect();
        drop(mappings);
        let answer = self.0.calls.batch(GRANT_TABLE_OP, UNMAP_GRANT_REF, &mut batch);
        for op in batch {
            if is_dying() {
                return;
            }
            assert!(answer.is_ok() && op.status == GrantStatus::OKAY, "{op:?} fails");
            self.0.window.borrow_mut().free.push(op.host_addr);
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
        let mut result = Err(GrantStatus::GENERAL_ERROR);
        self.map_batch(&[MapRequest { granter, gref, access }], 0, |done| result = done);
        result.map(|it| MappedGrant { page: it.page.page, handle: it.handle })
    }

    fn unmap(&mut self, mapping: MappedGrant) {
        self.unmap_batch(vec![(mapping.page, mapping.handle)]);
    }

    fn copy(&mut self, operations: &mut [GrantCopy]) {
        for part in operations.chunks_mut(BATCH) {
            let mut batch: Vec<_> = part.iter().map(copy_operation).collect();
            let answer = self.0.calls.batch(GRANT_TABLE_OP, COPY, &mut batch);
            for (wanted, op) in part.iter_mut().zip(batch) {
                wanted.status = answer.map_or(GrantStatus::GENERAL_ERROR, |_| op.status);
            }
        }
    }
}

fn copy_operation(operation: &GrantCopy) -> xen_abi::grant::GrantCopy {
    let local = CopyPtr {
        frame: operation.local.gfn().0,
        domid: DomainId::SELF,
        offset: operation.local_offset,
        pad: 0,
    };
    let remote = CopyPtr {
        frame: operation.gref.0.into(),
        domid: operation.remote,
        offset: operation.remote_offset,
        pad: 0,
    };
    let (source, dest, flags) = match operation.direction {
        Direction::FromRemote => (remote, local, GNTCOPY_SOURCE_GREF),
        Direction::ToRemote => (local, remote, GNTCOPY_DEST_GREF),
    };
    let status = GrantStatus::GENERAL_ERROR;
    xen_abi::grant::GrantCopy { source, dest, len: operation.len, flags, status, pad: 0 }
}

impl DeviceGrants for Domain {
    fn map_for_devices(
        &mut self,
        requests: &[MapRequest],
        results: &mut Vec<Result<MappedDmaGrant, GrantStatus>>,
    ) {
        for part in requests.chunks(BATCH) {
            self.map_batch(part, GNTMAP_DEVICE_MAP, |done| results.push(done));
        }
    }

    fn unmap_from_devices(&mut self, mappings: &mut Vec<MappedDmaGrant>) {
        while !mappings.is_empty() {
            let part = mappings.drain(..mappings.len().min(BATCH));
            self.unmap_batch(part.map(|it| (it.page.page, it.handle)).collect());
        }
    }
}

/// A PCI function that the domain owns.
#[derive(Clone)]
pub struct Device {
    domain: Domain,
    info: DeviceInfo,
}

impl Device {
    /// What the core says about it.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Routes one of its vectors to a new port.
    ///
    /// # Errors
    /// The core's.
    pub fn bind_interrupt(&self, vector: u32) -> Result<EventPort, Errno> {
        let mut op = BindInterrupt { index: 0, vector, port: EventPort(0) };
        self.domain.call(DEVICE_OP, BIND_INTERRUPT, &mut op)?;
        Ok(op.port)
    }

    /// Lets it decode addresses and reach memory.
    ///
    /// # Errors
    /// The core's.
    pub fn turn_on(&self) -> Result<(), Errno> {
        let mut op = Config { index: 0, offset: 4, width: 2, value: 0 };
        self.domain.call(DEVICE_OP, CONFIG_READ, &mut op)?;
        op.value |= 6;
        self.domain.call(DEVICE_OP, CONFIG_WRITE, &mut op).map(drop)
    }

    /// Where it finds a page of ours.
    ///
    /// # Errors
    /// The core's.
    pub fn bus_address(&self, page: &Page) -> Result<u64, Errno> {
        let addresses = HEAP_GPA + POINTED as u64;
        let mut op = Translate { index: 0, count: 1, gfn: page.gfn().0, addresses };
        self.domain.call(DEVICE_OP, TRANSLATE, &mut op)?;
        let mut address = [0; 8];
        unwatched(|| self.domain.0.calls.scratch.read(POINTED, &mut address));
        Ok(u64::from_le_bytes(address))
    }
}

impl Dma for Device {
    fn alloc(&mut self) -> Result<DmaPage, Errno> {
        let page = Page::new_zeroed();
        let bus_address = self.bus_address(&page)?;
        Ok(DmaPage { page, bus_address })
    }
}
