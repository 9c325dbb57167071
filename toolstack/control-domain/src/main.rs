//! The control domain: connects `control` to the core, to its xenstore ring and to the second
//! serial port.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use axolotl_abi::control::{
    ASSIGN_DMA_TRUSTED, Create, DeathRecord, DomainInfo, ExitCounts, PciFunction, PhysInfo,
    Populate, SetStart,
};
use control::uart::{Ports, Uart};
use control::{Control, Hypervisor, Setup, Wake};
use shmem::bytes::{ByteRing, CONSOLE_IN, CONSOLE_OUT};
use unikernel::domain_api::{Access, Events, Grants, MappedGrant};
use unikernel::{Domain, SerialPort, XenstoreRing};
use xen_abi::event::{VIRQ_CON_RING, VIRQ_CONSOLE, VIRQ_DOM_EXC};
use xen_abi::{DomainId, Errno, EventPort, Gfn, GrantRef};
use xenbus::Transport;

unikernel::main!(run);

/// The core, by hypercalls, and the console rings of guests.
struct Core {
    domain: Domain,
    consoles: BTreeMap<u16, Console>,
}

/// The console ring of a guest, as far as we have it.
struct Console {
    ring: ByteRing,
    mapping: MappedGrant,
    port: EventPort,
}

/// The reserved grant of a console ring.
const CONSOLE_GRANT: GrantRef = GrantRef(0);

impl Core {
    /// Attaches to a guest's console ring unless that is done.
    fn reach(&mut self, domid: DomainId, port: EventPort) -> Result<(), Errno> {
        if !self.consoles.contains_key(&domid.0) {
            let console = self.attach(domid, port)?;
            self.consoles.insert(domid.0, console);
        }
        Ok(())
    }

    /// Maps a guest's console ring and binds to its port.
    fn attach(&mut self, domid: DomainId, port: EventPort) -> Result<Console, Errno> {
        let mapping = self.domain.map(domid, CONSOLE_GRANT, Access::ReadWrite);
        let mapping = mapping.map_err(|_| Errno::EIO)?;
        match self.domain.bind_interdomain(domid, port) {
            Ok(port) => {
                let ring = ByteRing::attach(mapping.page.clone(), CONSOLE_IN, CONSOLE_OUT);
                Ok(Console { ring, mapping, port })
            }
            Err(errno) => {
                self.domain.unmap(mapping);
                Err(errno)
            }
        }
    }
}

impl Hypervisor for Core {
    fn create(&mut self, domain: &Create) -> Result<DomainId, Errno> {
        unikernel::control::create(*domain)
    }

    fn populate(&mut self, range: &mut Populate) -> Result<(), Errno> {
        let Populate { domid, access, flags, count, gfn, .. } = *range;
        unikernel::control::populate(domid, Gfn(gfn), count, access, flags)
    }

    fn load(&mut self, domid: DomainId, gpa: u64, bytes: &[u8]) -> Result<(), Errno> {
        unikernel::control::load(domid, gpa, bytes)
    }

    fn set_start(&mut self, start: &SetStart) -> Result<(), Errno> {
        unikernel::control::set_start(start.domid, start.entry, start.stack, start.argument)
    }

    fn set_grant(
        &mut self,
        domid: DomainId,
        grantee: DomainId,
        gref: GrantRef,
        gfn: u64,
    ) -> Result<(), Errno> {
        unikernel::control::set_grant(domid, gref, grantee, Gfn(gfn))
    }

    fn set_hvm_param(&mut self, domid: DomainId, index: u32, value: u64) -> Result<(), Errno> {
        unikernel::control::set_hvm_param(domid, index, value)
    }

    fn console_ring(
        &mut self,
        domid: DomainId,
        port: EventPort,
        buffer: &mut [u8],
    ) -> Result<usize, Errno> {
        self.reach(domid, port)?;
        let console = self.consoles.get_mut(&domid.0).ok_or(Errno::EIO)?;
        // Counters that cannot be are the guest's own loss.
        let len = console.ring.read(buffer).map_err(|_| Errno::EIO)?;
        if len > 0 {
            self.domain.notify(console.port);
        }
        Ok(len)
    }

    fn console_type(
        &mut self,
        domid: DomainId,
        port: EventPort,
        bytes: &[u8],
    ) -> Result<bool, Errno> {
        self.reach(domid, port)?;
        let console = self.consoles.get_mut(&domid.0).ok_or(Errno::EIO)?;
        if console.ring.writable().map_err(|_| Errno::EIO)? < bytes.len() {
            return Ok(false);
        }
        console.ring.write(bytes).map_err(|_| Errno::EIO)?;
        self.domain.notify(console.port);
        Ok(true)
    }

    fn leave_console(&mut self, domid: DomainId) {
        if let Some(Console { ring, mapping, port }) = self.consoles.remove(&domid.0) {
            self.domain.close(port);
            drop(ring);
            self.domain.unmap(mapping);
        }
    }

    fn unpause(&mut self, domid: DomainId) -> Result<(), Errno> {
        unikernel::control::unpause(domid)
    }

    fn pause(&mut self, domid: DomainId) -> Result<(), Errno> {
        unikernel::control::pause(domid)
    }

    fn destroy(&mut self, domid: DomainId) -> Result<(), Errno> {
        unikernel::control::destroy(domid)
    }

    fn restart(&mut self, domid: DomainId) -> Result<(), Errno> {
        unikernel::control::restart(domid)
    }

    fn crash(&mut self, domid: DomainId) -> Result<(), Errno> {
        unikernel::control::crash(domid)
    }

    fn info(&mut self, from: DomainId) -> Result<DomainInfo, Errno> {
        unikernel::control::info_from(from)
    }

    fn exits(&mut self, domid: DomainId) -> Result<ExitCounts, Errno> {
        unikernel::control::exits(domid)
    }

    fn death(&mut self, domid: DomainId) -> Result<DeathRecord, Errno> {
        unikernel::control::death(domid)
    }

    fn pci_function(&mut self, bdf: u32) -> Result<PciFunction, Errno> {
        let mut functions = unikernel::control::pci_functions();
        functions.find(|function| function.bdf == bdf).ok_or(Errno::ENODEV)
    }

    fn assign_device(
        &mut self,
        domid: DomainId,
        bdf: u32,
        trusted: bool,
        gpa: u64,
    ) -> Result<u64, Errno> {
        let flags = if trusted { ASSIGN_DMA_TRUSTED } else { 0 };
        unikernel::control::assign_device(domid, bdf, flags, gpa)
    }

    fn console_read(
        &mut self,
        domid: DomainId,
        position: &mut u64,
        buffer: &mut [u8],
    ) -> Result<usize, Errno> {
        let (len, behind) = unikernel::control::console_read(domid, *position, buffer)?;
        *position = behind;
        Ok(len)
    }

    fn physical(&mut self) -> Result<PhysInfo, Errno> {
        unikernel::control::physinfo()
    }

    fn alloc_unbound(&mut self, domid: DomainId, remote: DomainId) -> Result<EventPort, Errno> {
        unikernel::control::alloc_unbound(domid, remote)
    }

    fn console_write(&mut self, text: &[u8]) {
        unikernel::console::write(text);
    }

    fn now_ns(&self) -> u64 {
        self.domain.now_ns()
    }
}

/// COM2, which the core opens to the holder of the console right.
struct Com2(SerialPort);

impl Ports for Com2 {
    fn read(&mut self, offset: u16) -> u8 {
        self.0.read(register(offset))
    }

    fn write(&mut self, offset: u16, value: u8) {
        self.0.write(register(offset), value);
    }
}

fn register(offset: u16) -> u8 {
    u8::try_from(offset & 7).unwrap_or(0)
}

/// The own connection to the store, if the core gave us one.
struct StoreRing(Option<XenstoreRing>);

impl Transport for StoreRing {
    fn send(&mut self, bytes: &[u8]) -> usize {
        self.0.as_mut().map_or(0, |ring| ring.send(bytes))
    }

    fn receive(&mut self, buffer: &mut [u8]) -> usize {
        self.0.as_mut().map_or(0, |ring| ring.receive(buffer))
    }

    fn wait(&mut self) -> Result<(), Errno> {
        self.0.as_mut().map_or(Err(Errno::EIO), Transport::wait)
    }
}

/// Binds a virtual interrupt. Without it the domain would miss what it exists for, and says so.
fn bind(domain: &Domain, virq: u32) -> EventPort {
    domain.bind_virq(virq).unwrap_or_else(|errno| {
        unikernel::log::error!("virtual interrupt {virq} cannot be bound: {errno}");
        EventPort(0)
    })
}

fn run(domain: Domain) {
    let deaths = bind(&domain, VIRQ_DOM_EXC);
    let consoles = bind(&domain, VIRQ_CON_RING);
    let serial = Some(bind(&domain, VIRQ_CONSOLE));
    let ring = domain.xenstore().ok();
    let store_port = ring.as_ref().map_or(EventPort(0), XenstoreRing::port);
    let setup = Setup {
        bundle: domain.bundle(),
        hypervisor: Core { domain: domain.clone(), consoles: BTreeMap::new() },
        store: StoreRing(ring),
        store_port,
    };
    let mut control = match Control::start(setup) {
        Ok(control) => control,
        Err(error) => panic!("nothing to control: {error}"),
    };
    let mut uart = Uart::new(Com2(domain.serial_port()));
    if !uart.present() {
        control.say("there is no second serial port: `axl` cannot reach this system");
    }
    let mut wake = Wake::ALL;
    loop {
        control.work(wake);
        let more = serve(&mut uart, &mut control);
        // Requests may have made work for the store, or started a domain that died at once.
        let deadline = if more { Some(domain.now_ns()) } else { control.deadline() };
        wake = Wake::default();
        for port in domain.wait(deadline) {
            wake.domains |= port == deaths;
            // What is none of these may be a guest's console; a look too many does no harm.
            wake.consoles |= port == consoles || port != deaths && Some(port) != serial;
            // The serial port and the store are looked at in every turn.
        }
    }
}

/// How often one turn goes back to the serial port, before deaths and consoles are looked at.
const SERIAL_ROUNDS: usize = 4;

/// Moves bytes between the serial port and the requests. Returns whether more may be there
/// already, of which no interrupt would tell.
fn serve(uart: &mut Uart<Com2>, control: &mut Control<'_, Core, StoreRing>) -> bool {
    let mut received = Vec::new();
    for _ in 0..SERIAL_ROUNDS {
        let more = uart.service(|byte| received.push(byte), control.serial_output());
        if received.is_empty() {
            return more;
        }
        for byte in received.drain(..) {
            control.serial_input(byte);
        }
    }
    true
}
