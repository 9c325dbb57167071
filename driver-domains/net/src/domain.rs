//! The event loop.

use domain_api::nic::Nic;
use domain_api::{Errno, EventPort};
use e1000e::{E1000e, PciId, VECTOR_OTHER, VECTOR_QUEUES};
use netback::Netback;
use unikernel::{Device, Domain, Mmio, Watchdog, log, println};
use xenbus::Store;

/// How often the device is looked after, and the watchdog told so.
const TICK_NS: u64 = 250_000_000;
/// The core ends the domain when its loop stands still for so long.
const WATCHDOG_S: u32 = 2;
/// Command register of PCI configuration space, and its bits: memory space, bus master.
const PCI_COMMAND: u16 = 4;
const PCI_COMMAND_ON: u32 = 1 << 1 | 1 << 2;

unikernel::main!(run);

fn run(domain: Domain) {
    let mut watchdog = Watchdog::arm(WATCHDOG_S).expect("a watchdog");
    let device = domain.device(0).expect("the first device is the network card");
    let other_port = device.bind_interrupt(VECTOR_OTHER).expect("MSI-X vector of the link");
    let _queues = device.bind_interrupt(VECTOR_QUEUES).expect("MSI-X vector of the rings");
    let mut nic = start(&domain, &device);

    let mut env = domain.clone();
    let mut store = xenbus::Client::new(domain.xenstore().expect("a connection to the store"));
    let mut netback = Netback::new(domain.id(), domain.preserved());
    netback.start(&mut env, &mut store).expect("the store answers");

    let mut tick_ns = 0;
    let mut told = domain.incarnation() == 1;
    loop {
        while let Some(event) = store.next_event() {
            netback.store_event(&mut env, &mut store, &event).expect("the store answers");
        }
        let progress = netback.poll(&mut env, &mut nic);
        told = told || tell_first(&domain, &netback);
        if progress.store_work {
            netback.settle(&mut env, &mut store).expect("the store answers");
        }
        let now_ns = domain.now_ns();
        if now_ns >= tick_ns {
            look_after(&mut nic, now_ns);
            watchdog.poke();
            tick_ns = now_ns + TICK_NS;
        }
        let busy = progress.more_work || progress.store_work || nic.arm();
        let ports = if busy { domain.poll() } else { domain.wait(Some(tick_ns)) };
        for port in ports {
            if !netback.event(port) {
                interrupt(&mut nic, port, other_port);
            }
        }
    }
}

fn start(domain: &Domain, device: &Device) -> E1000e<Mmio> {
    let begin_ns = domain.now_ns();
    let id = PciId { vendor: device.info().vendor, device: device.info().device };
    let registers = device.bar(0).expect("registers behind BAR 0");
    let master = || -> Result<(), Errno> {
        let command = device.config_read(PCI_COMMAND, 2)?;
        device.config_write(PCI_COMMAND, 2, command | PCI_COMMAND_ON)
    };
    let nic = E1000e::start(id, registers, &mut device.dma(), domain, master)
        .unwrap_or_else(|error| panic!("{error}"));
    let [a, b, c, d, e, f] = nic.mac();
    let link = if nic.link_up() { "up" } else { "down" };
    let took_us = (domain.now_ns() - begin_ns) / 1000;
    log::info!(
        "82574L {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}, link {link}, in {took_us} us"
    );
    nic
}

/// Reports the end of the outage: the first frame of a guest that went through. True when told.
fn tell_first(domain: &Domain, netback: &Netback) -> bool {
    let forwarded = netback.vifs().any(|vif| {
        let stats = vif.stats;
        stats.tx_packets > stats.tx_dropped || stats.rx_packets > 0
    });
    if forwarded {
        println!("bench: first_packet {} ns", domain.now_ns());
    }
    forwarded
}

/// Events of the rings need no more than the wake-up.
fn interrupt(nic: &mut E1000e<Mmio>, port: EventPort, other: EventPort) {
    if port == other {
        tell(nic.service_other().link);
    }
}

fn look_after(nic: &mut E1000e<Mmio>, now_ns: u64) {
    match nic.check(now_ns) {
        Ok(link) => tell(link),
        Err(hang) => panic!("{hang}"),
    }
}

fn tell(link: Option<bool>) {
    if let Some(up) = link {
        log::warn!("link is {}", if up { "up" } else { "down" });
    }
}
