//! The controller in its domain.

use disk_domain::Controller;
use nvme::{MOST_VECTORS, Namespace, Nvme};
use unikernel::{Device, Domain, Mmio, log};

unikernel::main!(run);

fn run(domain: Domain) {
    disk_domain::serve(&domain, start)
}

struct Served(Nvme<Mmio>);

impl Controller for Served {
    type Disk = Namespace<Mmio>;

    fn disks(&mut self) -> &mut [Namespace<Mmio>] {
        self.0.namespaces()
    }

    fn arm(&mut self) -> bool {
        self.0.arm()
    }

    fn check(&mut self, now_ns: u64) {
        match self.0.check(now_ns) {
            Ok(None) => {}
            Ok(Some(report)) => log::warn!("{report}"),
            Err(hang) => panic!("{hang}"),
        }
    }
}

fn start(domain: &Domain, device: &Device) -> Served {
    let registers = device.bar(0).expect("registers behind BAR 0");
    let ports = disk_domain::interrupts(device, MOST_VECTORS);
    let vectors = u16::try_from(ports.len()).expect("few vectors");
    let master = || disk_domain::turn_on_bus_master(device);
    let mut nvme = Nvme::start(registers, &mut device.dma(), domain, vectors, master)
        .unwrap_or_else(|error| panic!("{error}"));
    let (info, queues) = (nvme.info(), nvme.queues());
    let (model, serial, firmware) = (&info.model, &info.serial, &info.firmware);
    log::info!("{model}, serial {serial}, firmware {firmware}, {queues} queues");
    for namespace in nvme.namespaces() {
        if let Some(reason) = namespace.unusable() {
            log::warn!("namespace {} cannot be used: {reason}", namespace.id());
        }
    }
    Served(nvme)
}
