//! The adapter in its domain.

use ahci::{Ahci, AtaDisk, Port};
use disk_domain::Controller;
use unikernel::domain_api::EventPort;
use unikernel::{Device, Domain, Mmio, log};

/// The BAR with the adapter's registers: ABAR (AHCI 1.3.1, §2.1.11).
const ABAR: usize = 5;

unikernel::main!(run);

fn run(domain: Domain) {
    disk_domain::serve(&domain, start)
}

struct Served(Ahci<Mmio, Domain>);

impl Served {
    fn tell(&mut self) {
        while let Some((port, event)) = self.0.event() {
            log::warn!("port {port}: {event}");
        }
    }
}

impl Controller for Served {
    type Disk = Port<Mmio, Domain>;

    fn disks(&mut self) -> &mut [Self::Disk] {
        self.0.disks()
    }

    fn interrupt(&mut self, _: EventPort) {
        self.0.interrupt();
    }

    fn arm(&mut self) -> bool {
        self.0.arm()
    }

    fn check(&mut self, now_ns: u64) {
        let result = self.0.check(now_ns);
        self.tell();
        if let Err(hang) = result {
            panic!("{hang}");
        }
    }
}

fn start(domain: &Domain, device: &Device) -> Served {
    let registers = device.bar(ABAR).expect("registers behind BAR 5");
    let bytes = registers.bytes();
    // The adapter has one message for all ports.
    let _ports = disk_domain::interrupts(device, 1);
    let master = || disk_domain::turn_on_bus_master(device);
    let ahci = Ahci::start(registers, bytes, &mut device.dma(), domain, master)
        .unwrap_or_else(|error| panic!("{error}"));
    let mut served = Served(ahci);
    for port in served.0.disks() {
        if let Some(disk) = port.disk() {
            describe(port.number(), disk);
        }
    }
    served.tell();
    served
}

fn describe(port: u32, disk: &AtaDisk<Mmio, Domain>) {
    let queueing = if disk.is_queueing() { "queued" } else { "not queued" };
    let identity = disk.identity();
    log::info!("port {port}: {}, serial {}, commands {queueing}", identity.model, identity.serial);
}
