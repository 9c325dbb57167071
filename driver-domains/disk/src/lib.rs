//! The event loop that all block driver domains share: a storage controller below, the backend
//! of any number of vbds above.
//!
//! A driver domain's program is a [`Controller`] and a call of [`serve`]. What guests ask for is
//! `blkback`'s matter, and how the controller does it its driver's. Whatever goes wrong beyond
//! repair ends in a panic: the control domain restarts the domain, which is the repair.
//!
//! # Order of a start
//!
//! The controller is reset before anything else is done, and above all before a preserved page
//! is used: the last incarnation's requests may be under way until then, and would still write.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::vec::Vec;
use blkback::{Blkback, VbdStats, preserved};
use domain_api::disk::{Disk, Geometry};
use domain_api::{DmaPage, Errno, EventPort};
use unikernel::{Device, Domain, Watchdog, println};
use xenbus::Store;

/// How often the controller is looked after, and the watchdog told so.
const TICK_NS: u64 = 250_000_000;
/// The core ends the domain when its loop stands still for so long.
const WATCHDOG_S: u32 = 2;
/// The same while the controller is started: an NVMe controller may ask for 127.5 s.
const START_S: u32 = 150;
/// Command register of PCI configuration space, and its bits: memory space, bus master.
const PCI_COMMAND: u16 = 4;
const PCI_COMMAND_ON: u32 = 1 << 1 | 1 << 2;

/// What differs from driver to driver.
pub trait Controller {
    /// Its disks.
    type Disk: Disk;

    /// All its disks; a volume's disk number counts them from 1.
    fn disks(&mut self) -> &mut [Self::Disk];

    /// Takes an interrupt. Where the disks need no more than to be asked for completions, which
    /// the loop does after each wake-up, there is nothing to do.
    fn interrupt(&mut self, port: EventPort) {
        let _ = port;
    }

    /// Prepares for sleep. Returns whether there is work already, whose interrupt may never come.
    fn arm(&mut self) -> bool;

    /// Looks after the controller, four times a second.
    ///
    /// # Panics
    /// When it does not work any more: a restart resets it.
    fn check(&mut self, now_ns: u64);
}

/// Starts the domain's first device by `start`, and serves its disks for good.
///
/// # Panics
/// When the domain cannot do its work; also whenever the controller says so.
pub fn serve<C: Controller>(domain: &Domain, start: impl FnOnce(&Domain, &Device) -> C) -> ! {
    let patience = Watchdog::arm(START_S).expect("a watchdog");
    let device = domain.device(0).expect("the first device is the controller");
    let begin_ns = domain.now_ns();
    let mut controller = start(domain, &device);
    log::info!("started in {} us", (domain.now_ns() - begin_ns) / 1000);
    for (number, disk) in (1..).zip(controller.disks()) {
        describe(number, disk.geometry());
    }
    let watchdog = Watchdog::arm(WATCHDOG_S).expect("a watchdog");
    drop(patience);
    let (tables, bounce) = preserved::split(domain.preserved());
    let bounce = for_device(&device, bounce);
    let blkback = Blkback::new(domain.id(), tables, bounce);
    run(domain, controller, blkback, watchdog)
}

fn run<C: Controller>(
    domain: &Domain,
    mut controller: C,
    mut blkback: Blkback,
    mut watchdog: Watchdog,
) -> ! {
    let mut env = domain.clone();
    let mut store = xenbus::Client::new(domain.xenstore().expect("a connection to the store"));
    let started = blkback.start(&mut env, &mut store, controller.disks());
    started.expect("the store answers");
    let mut tick_ns = 0;
    let mut told = domain.incarnation() == 1;
    loop {
        while let Some(event) = store.next_event() {
            let taken = blkback.store_event(&mut env, &mut store, controller.disks(), &event);
            taken.expect("the store answers");
        }
        let progress = blkback.poll(&mut env, controller.disks());
        told = told || tell_first(domain, &blkback);
        if progress.store_work {
            let settled = blkback.settle(&mut env, &mut store, controller.disks());
            settled.expect("the store answers");
        }
        let now_ns = domain.now_ns();
        if now_ns >= tick_ns {
            controller.check(now_ns);
            watchdog.poke();
            tick_ns = now_ns + TICK_NS;
        }
        let busy = progress.more_work || progress.store_work || controller.arm();
        let ports = if busy { domain.poll() } else { domain.wait(Some(tick_ns)) };
        for port in ports {
            if !blkback.event(port) {
                controller.interrupt(port);
            }
        }
    }
}

/// Reports the end of the outage: the first request of a guest that was answered. True when told.
fn tell_first(domain: &Domain, blkback: &Blkback) -> bool {
    let answered = blkback.vbds().any(|vbd| {
        let VbdStats { reads, writes, flushes, discards, .. } = vbd.stats;
        reads + writes + flushes + discards != 0
    });
    if answered {
        println!("bench: first_request {} ns", domain.now_ns());
    }
    answered
}

fn describe(number: u32, geometry: &Geometry) {
    let Geometry { sectors, sector_size, read_only, queue_depth, .. } = *geometry;
    let access = if read_only { ", read-only" } else { "" };
    log::info!(
        "disk {number}: {} MiB, sectors of {sector_size} bytes{access}, {queue_depth} requests at a time",
        sectors / 2048
    );
}

/// Pages of the domain with the addresses at which its device finds them.
fn for_device(device: &Device, pages: Vec<unikernel::domain_api::Page>) -> Vec<DmaPage> {
    let dma = device.dma();
    pages
        .into_iter()
        .map(|page| {
            let bus_address = dma.bus_address(&page).expect("preserved pages are our memory");
            DmaPage { page, bus_address }
        })
        .collect()
}

/// Lets a device reach memory.
///
/// # Errors
/// What the core answered.
pub fn turn_on_bus_master(device: &Device) -> Result<(), Errno> {
    let command = device.config_read(PCI_COMMAND, 2)?;
    device.config_write(PCI_COMMAND, 2, command | PCI_COMMAND_ON)
}

/// Routes the first interrupt vectors of a device, at most `most`, to ports whose events wake the
/// loop. Returns the ports; vector n is the n-th.
///
/// # Panics
/// When a vector cannot be routed.
#[must_use]
pub fn interrupts(device: &Device, most: u16) -> Vec<EventPort> {
    let vectors = device.info().msix_vectors.max(device.info().msi_vectors).min(most);
    let bind = |vector: u16| device.bind_interrupt(vector.into()).expect("a vector of the device");
    (0..vectors).map(bind).collect()
}
