//! The domain itself: everything that the core gave it, behind one handle.
#![expect(unsafe_code, reason = "memory that the builder laid out at fixed addresses")]

use crate::grants::{GrantTable, Window};
use crate::hypercall;
use crate::{Device, SerialPort, XenstoreRing, clock};
use alloc::rc::Rc;
use alloc::vec::Vec;
use axolotl_abi::start::{BUNDLE_GPA, PRESERVED_GPA, SHARED_INFO_GPA, StartInfo};
use core::cell::RefCell;
use core::ptr::NonNull;
use domain_api::{Clock, Events};
use shmem::Page;
use shmem::events::{Calls, Ports, Receiver};
use xen_abi::event::{
    ALLOC_UNBOUND, AllocUnbound, BIND_INTERDOMAIN, BIND_VIRQ, BindInterdomain, BindVirq, CLOSE,
    PortOp, SEND, UNMASK, VIRQ_TIMER,
};
use xen_abi::hypercall::{SCHED_OP, SET_TIMER_OP};
use xen_abi::memory::SPACE_SHARED_INFO;
use xen_abi::sched::{BLOCK, POLL, Poll};
use xen_abi::{DomainId, Errno, EventPort, Gfn, PAGE_SIZE};

/// This domain: its identity, memory, events, grants and devices.
///
/// A handle; clones are the same domain. It implements the traits of `domain_api`, so a crate
/// that wants several of them can get a clone for each.
#[derive(Clone)]
pub struct Domain(Rc<Inner>);

struct Inner {
    info: StartInfo,
    config: &'static [u8],
    core: Hypercalls,
    events: Receiver,
    table: RefCell<GrantTable>,
    window: RefCell<Window>,
}

/// A page that the builder or the core put at a fixed address.
pub(crate) fn page_at(gpa: u64) -> Page {
    let base = NonNull::new(gpa as *mut u8).expect("nothing is at address 0");
    // SAFETY: 1. the callers name pages of the domain's layout, which are mapped for its life.
    // 2. No reference is ever made into them: they are reached through `Page` alone.
    unsafe { Page::from_raw(base) }
}

/// The core, as one who waits for events needs it.
struct Hypercalls {
    /// Where the clock is.
    shared: Page,
}

impl Calls for Hypercalls {
    fn now_ns(&self) -> u64 {
        clock::now_ns(&self.shared)
    }

    fn set_timer(&self, deadline_ns: u64) {
        // SAFETY: no pointers.
        let _ = unsafe { hypercall::plain(SET_TIMER_OP, [deadline_ns, 0]) };
    }

    fn block(&self) {
        // SAFETY: no pointers.
        let _ = unsafe { hypercall::plain(SCHED_OP, [BLOCK, 0]) };
    }

    fn block_for(&self, port: EventPort, deadline_ns: u64) {
        let ports = [port.0];
        let mut poll =
            Poll { ports: ports.as_ptr() as u64, nr_ports: 1, pad: 0, timeout: deadline_ns };
        // SAFETY: 1. the structure is that of the operation. 2. The core only reads `ports`.
        let _ = unsafe { hypercall::sched(POLL, &mut poll) };
    }
}

impl Domain {
    pub(crate) fn new(info: StartInfo, config: &'static [u8]) -> Self {
        // SAFETY: the address is set apart for this page.
        unsafe {
            hypercall::add_to_physmap(SPACE_SHARED_INFO, 0, Gfn::containing(SHARED_INFO_GPA))
        }
        .expect("every domain has a shared-info page");
        let mut bind = BindVirq { virq: VIRQ_TIMER, vcpu: 0, port: EventPort(0) };
        hypercall::event(BIND_VIRQ, &mut bind).expect("every vCPU has a timer");
        let shared = page_at(SHARED_INFO_GPA);
        Self(Rc::new(Inner {
            info,
            config,
            core: Hypercalls { shared: shared.clone() },
            events: Receiver::new(shared, bind.port),
            table: RefCell::new(GrantTable::new()),
            window: RefCell::new(Window::new()),
        }))
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> DomainId {
        self.0.info.domid
    }

    /// Everything that the builder told it at start.
    #[must_use]
    pub fn start_info(&self) -> &StartInfo {
        &self.0.info
    }

    /// Which life this is, from 1.
    #[must_use]
    pub fn incarnation(&self) -> u32 {
        self.0.info.incarnation
    }

    /// Its name in the system file.
    #[must_use]
    pub fn name(&self) -> &str {
        let name = &self.0.info.name;
        let len = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        core::str::from_utf8(&name[..len]).unwrap_or("?")
    }

    /// Its configuration; meaning set by the domain's role.
    #[must_use]
    pub fn config(&self) -> &'static [u8] {
        self.0.config
    }

    /// Its configuration as text: the `extra` of the system file. Empty when it is no text.
    #[must_use]
    pub fn config_text(&self) -> &'static str {
        core::str::from_utf8(self.0.config).unwrap_or("")
    }

    /// The value behind `key=` among the words of the configuration text.
    #[must_use]
    pub fn config_value(&self, key: &str) -> Option<&'static str> {
        self.config_text()
            .split_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    /// The bundle that the machine was started with; empty but in the control domain.
    #[must_use]
    pub fn bundle(&self) -> &'static [u8] {
        let bytes = usize::try_from(self.0.info.bundle_bytes).unwrap_or(0);
        if bytes == 0 {
            return &[];
        }
        // SAFETY: the core mapped so many bytes there, read-only, and nobody writes to them.
        unsafe { core::slice::from_raw_parts(BUNDLE_GPA as *const u8, bytes) }
    }

    /// The pages whose content outlives the incarnation, first to last.
    #[must_use]
    pub fn preserved(&self) -> Vec<Page> {
        let pages = u64::from(self.0.info.preserved_pages);
        (0..pages).map(|n| page_at(PRESERVED_GPA + n * PAGE_SIZE as u64)).collect()
    }

    /// One of its devices, from 0.
    ///
    /// # Errors
    /// `ENODEV` when it has not so many.
    pub fn device(&self, index: u32) -> Result<Device, Errno> {
        Device::open(index)
    }

    /// The second serial port. Only the holder of the console right may touch it; anybody else
    /// dies trying.
    #[must_use]
    pub fn serial_port(&self) -> SerialPort {
        SerialPort::new()
    }

    /// Its end of the xenstore ring, to be given to `xenbus::Client`. To be called once: each
    /// value keeps its own place in the streams.
    ///
    /// # Errors
    /// `ENODEV` when the builder gave it no connection.
    pub fn xenstore(&self) -> Result<XenstoreRing, Errno> {
        XenstoreRing::open(self)
    }

    /// System time in ns.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.0.core.now_ns()
    }

    /// The processor's time-stamp counter, for measurements.
    #[must_use]
    pub fn tsc(&self) -> u64 {
        clock::tsc()
    }

    /// Unix time in ns, if the core knows it.
    #[must_use]
    pub fn unix_time_ns(&self) -> Option<u64> {
        clock::unix_at_zero_ns(&self.0.core.shared)?.checked_add(self.now_ns())
    }

    /// The ports that have events now, without waiting.
    pub fn poll(&self) -> Ports {
        self.0.events.poll()
    }

    /// Sleeps until some port has an event, or until system time `deadline_ns`, and returns the
    /// ports; none when it was the time.
    pub fn wait(&self, deadline_ns: Option<u64>) -> Ports {
        self.0.events.wait(&self.0.core, deadline_ns)
    }

    /// Sleeps until this one port has an event, or until `deadline_ns`. The events of all other
    /// ports stay pending. `false`: it was the time.
    pub fn wait_for(&self, port: EventPort, deadline_ns: Option<u64>) -> bool {
        self.0.events.wait_for(&self.0.core, port, deadline_ns)
    }

    /// Takes the event of one port, if it has one.
    pub fn take_event(&self, port: EventPort) -> bool {
        self.0.events.take(port)
    }

    /// Keeps the events of a port back, until [`Self::unmask`].
    pub fn mask(&self, port: EventPort) {
        self.0.events.mask(port);
    }

    /// Lets the events of a port through again; one that came meanwhile is pending then.
    pub fn unmask(&self, port: EventPort) {
        // An error says that the port was closed: nothing to unmask.
        let _ = hypercall::event(UNMASK, &mut PortOp { port });
    }

    /// Binds a virtual interrupt to a new port.
    ///
    /// # Errors
    /// `EEXIST` when it is bound, `EPERM` when it is not for us, `EINVAL` when there is none.
    pub fn bind_virq(&self, virq: u32) -> Result<EventPort, Errno> {
        let mut bind = BindVirq { virq, vcpu: 0, port: EventPort(0) };
        hypercall::event(BIND_VIRQ, &mut bind)?;
        Ok(bind.port)
    }

    pub(crate) fn table(&self) -> &RefCell<GrantTable> {
        &self.0.table
    }

    pub(crate) fn window(&self) -> &RefCell<Window> {
        &self.0.window
    }
}

impl Events for Domain {
    fn alloc_unbound(&mut self, remote: DomainId) -> Result<EventPort, Errno> {
        let mut alloc =
            AllocUnbound { dom: DomainId::SELF, remote_dom: remote, port: EventPort(0) };
        hypercall::event(ALLOC_UNBOUND, &mut alloc)?;
        Ok(alloc.port)
    }

    fn bind_interdomain(&mut self, remote: DomainId, port: EventPort) -> Result<EventPort, Errno> {
        let mut bind = BindInterdomain {
            remote_dom: remote,
            pad: 0,
            remote_port: port,
            local_port: EventPort(0),
        };
        hypercall::event(BIND_INTERDOMAIN, &mut bind)?;
        Ok(bind.local_port)
    }

    fn close(&mut self, port: EventPort) {
        // An error says that it is closed already.
        let _ = hypercall::event(CLOSE, &mut PortOp { port });
    }

    fn notify(&mut self, port: EventPort) {
        // An error says that the port is not open: there is no other end.
        let _ = hypercall::event(SEND, &mut PortOp { port });
    }
}

impl Clock for Domain {
    fn now_ns(&self) -> u64 {
        Self::now_ns(self)
    }
}

impl core::fmt::Debug for Domain {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Domain({} {:?}, incarnation {})", self.id(), self.name(), self.incarnation())
    }
}
