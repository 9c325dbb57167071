//! The event loop that all network driver domains share: a network card below, the backend of any
//! number of vifs above.
//!
//! A driver domain's program is a [`Card`] and a call of [`serve`]. What guests send is `netback`'s
//! matter, and how the card does it its driver's. Whatever goes wrong beyond repair ends in a panic:
//! the control domain restarts the domain, which is the repair.

#![no_std]
#![forbid(unsafe_code)]

use domain_api::nic::Nic;
use domain_api::{Errno, EventPort};
use netback::Netback;
use unikernel::{Device, Domain, Watchdog, log, println};
use xenbus::Store;

/// How often the card is looked after, and the watchdog told so.
const TICK_NS: u64 = 250_000_000;
/// The core ends the domain when its loop stands still for so long.
const WATCHDOG_S: u32 = 2;
/// Command register of PCI configuration space, and its bits: memory space, bus master.
const PCI_COMMAND: u16 = 4;
const PCI_COMMAND_ON: u32 = 1 << 1 | 1 << 2;

/// What differs from driver to driver.
pub trait Card {
    /// Its frames.
    type Nic: Nic;

    /// What sends and receives frames.
    fn nic(&mut self) -> &mut Self::Nic;

    /// Takes an interrupt. Returns the link's new state, when it changed. Events of the rings
    /// need no more than the wake-up.
    fn interrupt(&mut self, port: EventPort) -> Option<bool>;

    /// Prepares for sleep. Returns whether there is work already, whose interrupt may never come.
    fn arm(&mut self) -> bool;

    /// Looks after the card, four times a second. Returns the link's new state, when it changed.
    ///
    /// # Panics
    /// When it does not work any more: a restart resets it.
    fn check(&mut self, now_ns: u64) -> Option<bool>;
}

/// Starts the domain's first device by `start`, and serves its vifs for good.
///
/// # Panics
/// When the domain cannot do its work; also whenever the card says so.
pub fn serve<C: Card>(domain: &Domain, start: impl FnOnce(&Domain, &Device) -> C) -> ! {
    let mut watchdog = Watchdog::arm(WATCHDOG_S).expect("a watchdog");
    let device = domain.device(0).expect("the first device is the network card");
    let mut card = start(domain, &device);

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
        let progress = netback.poll(&mut env, card.nic());
        told = told || tell_first(domain, &netback);
        if progress.store_work {
            netback.settle(&mut env, &mut store).expect("the store answers");
        }
        let now_ns = domain.now_ns();
        if now_ns >= tick_ns {
            tell(card.check(now_ns));
            watchdog.poke();
            tick_ns = now_ns + TICK_NS;
        }
        let busy = progress.more_work || progress.store_work || card.arm();
        let ports = if busy { domain.poll() } else { domain.wait(Some(tick_ns)) };
        for port in ports {
            if !netback.event(port) {
                tell(card.interrupt(port));
            }
        }
    }
}

/// Says what card `name` was found, in a start that began at `begin_ns`.
pub fn announce(domain: &Domain, name: &str, nic: &impl Nic, begin_ns: u64) {
    let [a, b, c, d, e, f] = nic.mac();
    let link = if nic.link_up() { "up" } else { "down" };
    let took_us = (domain.now_ns() - begin_ns) / 1000;
    log::info!(
        "{name} {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}, link {link}, in {took_us} us"
    );
}

/// Lets a device reach memory.
///
/// # Errors
/// What the core answered.
pub fn turn_on_bus_master(device: &Device) -> Result<(), Errno> {
    let command = device.config_read(PCI_COMMAND, 2)?;
    device.config_write(PCI_COMMAND, 2, command | PCI_COMMAND_ON)
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

fn tell(link: Option<bool>) {
    if let Some(up) = link {
        log::warn!("link is {}", if up { "up" } else { "down" });
    }
}
