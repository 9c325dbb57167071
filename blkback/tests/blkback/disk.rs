//! A disk behind a controller, as a model.
//!
//! What was submitted is done at any later time in any order. When the domain dies, some of what
//! the disk has been given is still done, and nobody hears of it.

use crate::rig::{Fuse, Random};
use domain_api::disk::{
    Busy, Completion, Disk, DiskError, Geometry, Operation, Request, SECTOR, Tag,
};
use domain_api::fake::World;
use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;

/// What outlives the driver domain.
pub struct Medium {
    pub bytes: Vec<u8>,
    pub geometry: Geometry,
    /// Sectors that cannot be read or written.
    pub bad: BTreeSet<u64>,
    /// Requests that were carried out.
    pub log: Vec<(Operation, u64, u64)>,
    /// Nothing is done for now.
    pub stuck: bool,
    pub random: Random,
}

pub type SharedMedium = Rc<RefCell<Medium>>;

pub fn geometry(sectors: u64, sector_size: u32) -> Geometry {
    Geometry {
        sectors,
        sector_size,
        physical_sector_size: sector_size.max(4096),
        read_only: false,
        volatile_cache: true,
        max_discard_sectors: 64,
        max_write_zeroes_sectors: 0,
        max_sectors: 256,
        max_buffers: 33,
        whole_pages: true,
        queue_depth: 8,
    }
}

pub fn medium(geometry: Geometry) -> SharedMedium {
    Rc::new(RefCell::new(Medium {
        bytes: vec![0; usize::try_from(geometry.sectors * SECTOR).unwrap()],
        geometry,
        bad: BTreeSet::new(),
        log: Vec::new(),
        stuck: false,
        random: Random(0x1234_5678_9abc_def1),
    }))
}

struct Queued {
    tag: Tag,
    operation: Operation,
    sector: u64,
    sectors: u64,
    buffers: Vec<(u64, usize)>,
}

/// The disk, as one incarnation of the driver drives it.
pub struct ModelDisk {
    world: World,
    medium: SharedMedium,
    geometry: Geometry,
    fuse: Fuse,
    fresh: Vec<Queued>,
    started: Vec<Queued>,
    done: VecDeque<Completion>,
}

impl ModelDisk {
    pub fn new(world: &World, medium: &SharedMedium, fuse: &Fuse) -> Self {
        let geometry = medium.borrow().geometry;
        Self {
            world: world.clone(),
            medium: medium.clone(),
            geometry,
            fuse: fuse.clone(),
            fresh: Vec::new(),
            started: Vec::new(),
            done: VecDeque::new(),
        }
    }

    /// The disk works a while. True: there is an interrupt.
    pub fn work(&mut self) -> bool {
        if self.medium.borrow().stuck {
            return false;
        }
        let mut interrupt = false;
        while !self.started.is_empty() {
            let choice = self.random_below(self.started.len() + 1);
            if choice == self.started.len() {
                // Often it leaves some for later, but not for ever.
                if interrupt {
                    break;
                }
                continue;
            }
            let queued = self.started.swap_remove(choice);
            let result = self.carry_out(&queued);
            self.done.push_back(Completion { tag: queued.tag, result });
            interrupt = true;
        }
        interrupt
    }

    /// The domain dies: some of what was given to the disk it does, some it does not.
    pub fn die(mut self) {
        let given: Vec<Queued> = self.started.drain(..).collect();
        for queued in given {
            if self.random_below(2) == 0 {
                let _ = self.carry_out(&queued);
            }
        }
    }

    fn random_below(&self, bound: usize) -> usize {
        let below = u32::try_from(bound).unwrap();
        self.medium.borrow_mut().random.below(below) as usize
    }

    fn carry_out(&self, queued: &Queued) -> Result<(), DiskError> {
        let mut medium = self.medium.borrow_mut();
        let Queued { operation, sector, sectors, .. } = *queued;
        medium.log.push((operation, sector, sectors));
        if (sector..sector + sectors).any(|it| medium.bad.contains(&it)) {
            return Err(DiskError::Medium);
        }
        let at = usize::try_from(sector * SECTOR).unwrap();
        let len = usize::try_from(sectors * SECTOR).unwrap();
        match operation {
            Operation::Flush => {}
            Operation::Discard | Operation::WriteZeroes => medium.bytes[at..at + len].fill(0),
            Operation::Read | Operation::Write => {
                let mut at = at;
                for &(address, len) in &queued.buffers {
                    let (page, offset) = self.world.at_bus_address(address).expect("mapped memory");
                    let part = &mut medium.bytes[at..at + len];
                    if operation == Operation::Read {
                        page.write(offset, part);
                    } else {
                        page.read(offset, part);
                    }
                    at += len;
                }
            }
        }
        Ok(())
    }
}

impl Disk for ModelDisk {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn submit(&mut self, request: Request<'_>) -> Result<(), Busy> {
        self.fuse.step();
        if self.fresh.len() + self.started.len() >= usize::from(self.geometry.queue_depth) {
            return Err(Busy);
        }
        let unit = u64::from(self.geometry.sector_size) / SECTOR;
        let Request { tag, operation, sector, sectors, buffers } = request;
        let mut names = self.fresh.iter().chain(&self.started).map(|it| it.tag);
        let done = self.done.iter().any(|it| it.tag == tag);
        assert!(!done && names.all(|it| it != tag), "a tag is used twice");
        assert!(sector + sectors <= self.geometry.sectors, "sectors behind the end");
        assert!(sector.is_multiple_of(unit) && sectors.is_multiple_of(unit), "parts of sectors");
        match operation {
            Operation::Read | Operation::Write => {
                let bytes: u64 = buffers.iter().map(|it| u64::from(it.len)).sum();
                assert_eq!(bytes, sectors * SECTOR);
                assert!(sectors > 0 && self.geometry.takes(buffers), "more than the disk takes");
            }
            Operation::Flush => assert_eq!(sectors, 0),
            Operation::Discard => {
                assert!((1..=u64::from(self.geometry.max_discard_sectors)).contains(&sectors));
            }
            Operation::WriteZeroes => {
                assert!((1..=u64::from(self.geometry.max_write_zeroes_sectors)).contains(&sectors));
            }
        }
        let buffers = buffers.iter().map(|it| (it.bus_address(), usize::from(it.len))).collect();
        self.fresh.push(Queued { tag, operation, sector, sectors, buffers });
        Ok(())
    }

    fn kick(&mut self) {
        self.fuse.step();
        self.started.append(&mut self.fresh);
        self.fuse.step();
    }

    fn complete(&mut self) -> Option<Completion> {
        let completion = self.done.pop_front();
        if completion.is_some() {
            self.fuse.step();
        }
        completion
    }
}
