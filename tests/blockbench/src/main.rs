//! Measures a disk from inside a guest.
//!
//! The guest's disk is the first vbd, through blkfront, or, when the guest owns an NVMe controller
//! itself, that controller's first namespace, with the driver linked into the guest: the same
//! requests without a split. Each load makes a fixed number of requests and then says
//! `bench: blk_NAME requests count`. Before the first load and between two of them it rests, so
//! that whoever counts processor time can look at all domains; at last it says `bench: done`.
//!
//! `extra`: `requests=N` sets how many requests a load makes (2000; an eighth of it for the long
//! ones), `load=NAME` leaves all loads out but one.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

mod load;

use alloc::string::{String, ToString};
use domain_api::disk::Disk;
use domain_api::{DmaPage, Errno};
use frontends::blkfront::{self, Blkfront, FrontDisk};
use load::{LOADS, Load, MOST_PAGES};
use nvme::Nvme;
use unikernel::{Domain, Mmio, println};
use xenbus::{Client, Store};

unikernel::main!(run);

/// Rest between two loads.
const REST_NS: u64 = 400_000_000;
/// How long to wait for the backend.
const PATIENCE_NS: u64 = 30_000_000_000;
/// Command register of PCI configuration space, and its bits: memory space, bus master.
const PCI_COMMAND: u16 = 4;
const PCI_COMMAND_ON: u32 = 1 << 1 | 1 << 2;

/// A disk, and how to sleep until it has done something.
trait Target {
    type Disk: Disk;
    fn disk(&mut self) -> &mut Self::Disk;
    fn wait(&mut self, domain: &Domain);
}

fn run(domain: Domain) {
    let requests = domain.config_value("requests").and_then(|n| n.parse().ok()).unwrap_or(2000);
    let result = if domain.device(0).is_ok() {
        direct(&domain).and_then(|(mut target, pages)| all(&domain, &mut target, &pages, requests))
    } else {
        split(&domain).and_then(|(mut target, pages)| all(&domain, &mut target, &pages, requests))
    };
    match result {
        Ok(()) => println!("bench: done"),
        Err(error) => println!("bench: failed: {error}"),
    }
    rest(&domain, u64::MAX);
}

fn all<T: Target>(
    domain: &Domain,
    target: &mut T,
    pages: &[DmaPage],
    requests: u64,
) -> Result<(), String> {
    println!("bench: blk_ready 0 count");
    rest(domain, domain.now_ns() + REST_NS);
    let chosen = domain.config_value("load");
    for load in LOADS.iter().filter(|load| chosen.is_none_or(|name| name == load.name)) {
        let count = requests / load.divisor;
        run_load(domain, target, pages, load, count)?;
        println!("bench: blk_{} {count} count", load.name);
        rest(domain, domain.now_ns() + REST_NS);
    }
    Ok(())
}

fn run_load<T: Target>(
    domain: &Domain,
    target: &mut T,
    pages: &[DmaPage],
    load: &Load,
    count: u64,
) -> Result<(), String> {
    let mut requests = load.requests(target.disk().geometry().sectors, count);
    loop {
        while let Some(completion) = target.disk().complete() {
            completion.result.map_err(|error| error.to_string())?;
            requests.end(completion.tag);
        }
        requests.submit(target.disk(), pages);
        if requests.are_done() {
            return Ok(());
        }
        target.wait(domain);
    }
}

/// Lets time pass; the domain has nothing to do meanwhile.
fn rest(domain: &Domain, until_ns: u64) {
    while domain.now_ns() < until_ns {
        domain.wait(Some(until_ns)).for_each(drop);
    }
}

/// The namespace of a controller of our own.
struct Direct(Nvme<Mmio>);

impl Target for Direct {
    type Disk = nvme::Namespace<Mmio>;

    fn disk(&mut self) -> &mut Self::Disk {
        &mut self.0.namespaces()[0]
    }

    fn wait(&mut self, domain: &Domain) {
        if !self.0.arm() {
            domain.wait(None).for_each(drop);
        }
    }
}

fn direct(domain: &Domain) -> Result<(Direct, alloc::vec::Vec<DmaPage>), String> {
    let failed = |what: &str, errno: Errno| alloc::format!("{what}: {errno}");
    let device = domain.device(0).map_err(|errno| failed("the controller", errno))?;
    let vectors = device.info().msix_vectors.min(nvme::MOST_VECTORS);
    for vector in 0..vectors {
        device.bind_interrupt(vector.into()).map_err(|errno| failed("an interrupt", errno))?;
    }
    let registers = device.bar(0).ok_or("the controller has no registers")?;
    let master = || -> Result<(), Errno> {
        let command = device.config_read(PCI_COMMAND, 2)?;
        device.config_write(PCI_COMMAND, 2, command | PCI_COMMAND_ON)
    };
    let mut dma = device.dma();
    let mut nvme = Nvme::start(registers, &mut dma, domain, vectors, master)
        .map_err(|error| error.to_string())?;
    if nvme.namespaces().is_empty() {
        return Err("the controller has no namespace".to_string());
    }
    let page = |_| domain_api::Dma::alloc(&mut dma);
    let pages: Result<_, _> = (0..MOST_PAGES).map(page).collect();
    Ok((Direct(nvme), pages.map_err(|errno| failed("memory", errno))?))
}

/// A vbd.
struct Split(FrontDisk<Domain>);

impl Target for Split {
    type Disk = FrontDisk<Domain>;

    fn disk(&mut self) -> &mut Self::Disk {
        &mut self.0
    }

    fn wait(&mut self, domain: &Domain) {
        domain.wait(None).for_each(drop);
    }
}

fn split(domain: &Domain) -> Result<(Split, alloc::vec::Vec<DmaPage>), String> {
    connect(domain).map_err(|errno| alloc::format!("the disk: {errno}"))
}

fn connect(domain: &Domain) -> Result<(Split, alloc::vec::Vec<DmaPage>), Errno> {
    let mut env = domain.clone();
    let mut store = Client::new(domain.xenstore()?);
    let buffers = u16::try_from(MOST_PAGES).map_err(|_| Errno::EINVAL)?;
    let config = blkfront::Config { buffers, ..blkfront::Config::default() };
    let patience_ns = domain.now_ns() + PATIENCE_NS;
    let number = blkfront::devices(&mut store, domain.id())?.first().copied();
    let number = number.ok_or(Errno::ENODEV)?;
    let mut front = Blkfront::new(&mut store, domain.id(), number, config)?;
    while !front.is_connected() {
        if domain.now_ns() > patience_ns {
            return Err(Errno::ETIME);
        }
        front.refresh(&mut env, &mut store)?;
        while let Some(event) = store.next_event() {
            front.store_event(&mut env, &mut store, &event)?;
        }
        if !front.is_connected() {
            domain.wait(Some(domain.now_ns() + REST_NS)).for_each(drop);
        }
    }
    let disk = FrontDisk::new(front, env);
    let pages = disk.pages().to_vec();
    Ok((Split(disk), pages))
}
