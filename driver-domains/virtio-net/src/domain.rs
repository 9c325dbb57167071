//! The card in its domain.

use net_domain::Card;
use unikernel::domain_api::EventPort;
use unikernel::virtio::{self, PciTransport};
use unikernel::{Device, Domain};
use virtio_net::{Cause, VirtioNet};

/// MSI-X vectors of the queues, and of the configuration, that is, of the link.
const VECTOR_QUEUES: u16 = 0;
const VECTOR_CONFIG: u16 = 1;

unikernel::main!(run);

fn run(domain: Domain) {
    net_domain::serve(&domain, start)
}

struct Served {
    nic: VirtioNet<PciTransport>,
    /// The port of the configuration's vector.
    config: EventPort,
}

impl Card for Served {
    type Nic = VirtioNet<PciTransport>;

    fn nic(&mut self) -> &mut Self::Nic {
        &mut self.nic
    }

    fn interrupt(&mut self, port: EventPort) -> Option<bool> {
        (port == self.config).then(|| self.nic.refresh_link()).flatten()
    }

    fn arm(&mut self) -> bool {
        self.nic.arm()
    }

    fn check(&mut self, now_ns: u64) -> Option<bool> {
        self.nic.check(now_ns).unwrap_or_else(|hang| panic!("{hang}"))
    }
}

fn start(domain: &Domain, device: &Device) -> Served {
    let bind = |vector: u16| device.bind_interrupt(vector.into()).expect("an MSI-X vector");
    let _queues = bind(VECTOR_QUEUES);
    let config = bind(VECTOR_CONFIG);
    let begin_ns = domain.now_ns();
    let (transport, mut vectors) = virtio::open(device).unwrap_or_else(|error| panic!("{error}"));
    let master = || net_domain::turn_on_bus_master(device);
    let route = |cause| match cause {
        Cause::Queue(queue) => vectors.route_queue(queue, VECTOR_QUEUES),
        Cause::Config => vectors.route_config(VECTOR_CONFIG),
    };
    let nic = VirtioNet::start(transport, &mut device.dma(), domain, master, route)
        .unwrap_or_else(|error| panic!("{error}"));
    net_domain::announce(domain, "virtio-net", &nic, begin_ns);
    Served { nic, config }
}
