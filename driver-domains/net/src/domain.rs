//! The card in its domain.

use domain_api::EventPort;
use e1000e::{E1000e, PciId, VECTOR_OTHER, VECTOR_QUEUES};
use net_domain::Card;
use unikernel::{Device, Domain, Mmio};

unikernel::main!(run);

fn run(domain: Domain) {
    net_domain::serve(&domain, start)
}

struct Served {
    nic: E1000e<Mmio>,
    /// The port of the link's vector.
    other: EventPort,
}

impl Card for Served {
    type Nic = E1000e<Mmio>;

    fn nic(&mut self) -> &mut Self::Nic {
        &mut self.nic
    }

    fn interrupt(&mut self, port: EventPort) -> Option<bool> {
        (port == self.other).then(|| self.nic.service_other().link).flatten()
    }

    fn arm(&mut self) -> bool {
        self.nic.arm()
    }

    fn check(&mut self, now_ns: u64) -> Option<bool> {
        self.nic.check(now_ns).unwrap_or_else(|hang| panic!("{hang}"))
    }
}

fn start(domain: &Domain, device: &Device) -> Served {
    let other = device.bind_interrupt(VECTOR_OTHER).expect("MSI-X vector of the link");
    let _queues = device.bind_interrupt(VECTOR_QUEUES).expect("MSI-X vector of the rings");
    let begin_ns = domain.now_ns();
    let id = PciId {
        vendor: device.info().vendor,
        device: device.info().device,
        subsystem: device.config_read(PciId::SUBSYSTEM, 4).expect("configuration space"),
    };
    let registers = device.bar(0).expect("registers behind BAR 0");
    let master = || net_domain::turn_on_bus_master(device);
    let nic = E1000e::start(id, registers, &mut device.dma(), domain, master)
        .unwrap_or_else(|error| panic!("{error}"));
    net_domain::announce(domain, "82574L", &nic, begin_ns);
    Served { nic, other }
}
