//! The driver against the model.

mod faults;
mod requests;
mod start;

use crate::model::{Model, RamDisk, Setup};
use crate::{Nvme, StartError};
use domain_api::disk::{Buffer, Completion, Disk, Operation, Request, Tag};
use domain_api::fake::{Domain, World};
use domain_api::{Dma, DmaPage, DomainId};

const DRIVER: DomainId = DomainId(2);
const VECTORS: u16 = 5;

/// A machine with a controller; the domain of its driver can be killed.
struct Rig {
    world: World,
    model: Model,
}

impl Rig {
    fn new(setup: Setup, disks: Vec<RamDisk>) -> Self {
        let world = World::new();
        let memory = world.clone();
        let model = Model::new(setup, disks, move |address| memory.at_bus_address(address));
        Self { world, model }
    }

    /// One disk of a thousand blocks of 512 bytes.
    fn small() -> Self {
        Self::new(Setup::default(), vec![RamDisk::new(1, 9, 1000)])
    }

    fn start_in(&self, domain: &mut Domain) -> Result<Nvme<Model>, StartError> {
        let model = &self.model;
        Nvme::start(model.clone(), domain, model, VECTORS, || {
            assert_eq!(model.pending_count(), 0, "old commands are gone");
            model.set_bus_master(true);
            Ok(())
        })
    }

    fn start(&self) -> (Domain, Nvme<Model>) {
        let mut domain = self.world.domain(DRIVER);
        let nvme = self.start_in(&mut domain).expect("a good controller");
        (domain, nvme)
    }

    fn kill(&self) {
        self.model.set_bus_master(false);
        self.world.kill(DRIVER);
    }
}

fn pages(domain: &mut Domain, count: usize) -> Vec<DmaPage> {
    (0..count).map(|_| domain.alloc().expect("memory")).collect()
}

/// Whole buffers in `pages`, the first from `offset` on, so that they hold `sectors`.
fn buffers(pages: &[DmaPage], offset: usize, sectors: usize) -> Vec<Buffer<'_>> {
    let (mut at, mut left) = (offset, sectors * 512);
    let mut buffers = Vec::new();
    for page in pages {
        let len = left.min(4096 - at);
        if len == 0 {
            break;
        }
        let short = |n| u16::try_from(n).expect("below a page");
        buffers.push(Buffer { page, offset: short(at), len: short(len) });
        left -= len;
        at = 0;
    }
    assert_eq!(left, 0, "too few pages");
    buffers
}

fn fill(buffers: &[Buffer<'_>], seed: u32) -> Vec<u8> {
    let mut all = Vec::new();
    for (n, buffer) in (0_u32..).zip(buffers) {
        let byte = |i: u32| (seed.wrapping_mul(31) + n * 7 + i / 3).to_le_bytes()[0];
        let bytes: Vec<u8> = (0..u32::from(buffer.len)).map(byte).collect();
        buffer.page.page.write(usize::from(buffer.offset), &bytes);
        all.extend(bytes);
    }
    all
}

fn content(buffers: &[Buffer<'_>]) -> Vec<u8> {
    let mut all = Vec::new();
    for buffer in buffers {
        let mut bytes = vec![0; usize::from(buffer.len)];
        buffer.page.page.read(usize::from(buffer.offset), &mut bytes);
        all.extend(bytes);
    }
    all
}

fn request<'a>(
    operation: Operation,
    tag: u32,
    sector: u64,
    sectors: u64,
    buffers: &'a [Buffer<'a>],
) -> Request<'a> {
    Request { tag: Tag(tag), operation, sector, sectors, buffers }
}

fn done(tag: u32) -> Option<Completion> {
    Some(Completion { tag: Tag(tag), result: Ok(()) })
}

/// Submits one request, lets the controller do it, and returns how it ended.
fn one(
    rig: &Rig,
    disk: &mut impl Disk,
    request: Request<'_>,
) -> Result<(), domain_api::disk::DiskError> {
    let tag = request.tag;
    disk.submit(request).expect("room");
    disk.kick();
    rig.model.run_all();
    let completion = disk.complete().expect("it ended");
    assert_eq!(completion.tag, tag);
    completion.result
}
