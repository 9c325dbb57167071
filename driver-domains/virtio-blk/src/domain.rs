//! The device in its domain.

use disk_domain::Controller;
use unikernel::virtio::{self, PciTransport};
use unikernel::{Device, Domain};
use virtio_blk::VirtioBlk;

/// The MSI-X vector of the queue.
const VECTOR: u16 = 0;

unikernel::main!(run);

fn run(domain: Domain) {
    disk_domain::serve(&domain, start)
}

struct Served(VirtioBlk<PciTransport>);

impl Controller for Served {
    type Disk = VirtioBlk<PciTransport>;

    fn disks(&mut self) -> &mut [Self::Disk] {
        core::slice::from_mut(&mut self.0)
    }

    fn arm(&mut self) -> bool {
        self.0.arm()
    }

    fn check(&mut self, now_ns: u64) {
        if let Err(hang) = self.0.check(now_ns) {
            panic!("{hang}");
        }
    }
}

fn start(domain: &Domain, device: &Device) -> Served {
    let (transport, mut vectors) = virtio::open(device).unwrap_or_else(|error| panic!("{error}"));
    let _port = disk_domain::interrupts(device, 1);
    let master = || disk_domain::turn_on_bus_master(device);
    let route = |cause| match cause {
        ::virtio_blk::Cause::Queue(queue) => vectors.route_queue(queue, VECTOR),
        ::virtio_blk::Cause::Config => true,
    };
    let disk = VirtioBlk::start(transport, &mut device.dma(), domain, master, route)
        .unwrap_or_else(|error| panic!("{error}"));
    Served(disk)
}
