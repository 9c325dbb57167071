//! A guest's load on an image, with a crash wherever a test wants one.

use crate::disk::{Dice, Disks, SECTOR, Sparse, pages};
use crate::model::{BACKING, Model, content, id_of};
use domain_api::disk::{Buffer, DiskError, Geometry, Operation, Request, Tag};
use domain_api::{DmaPage, Page};
use qcow2::format::{BackingFormat, Create, create};
use qcow2::{Qcow2, Setup, State};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the guest does.
#[derive(Clone, Copy, Debug)]
pub struct Action {
    pub operation: Operation,
    pub sector: u64,
    pub sectors: u64,
}

#[derive(Clone, Debug)]
struct Flight {
    action: Action,
    id: u64,
    begun: u64,
    buffers: Vec<(DmaPage, u16, u16)>,
}

/// A disk that needs three L2 tables of 4 KiB clusters.
pub const SMALL_SIZE: u64 = 5 << 20;

/// What shall be served.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub size: u64,
    pub cluster_bits: u32,
    pub extent: u64,
    /// Bytes of a raw backing volume.
    pub backing: Option<u64>,
    pub geometry: Geometry,
    pub pages: usize,
}

/// Guest, image and disks.
#[derive(Debug)]
pub struct Host {
    pub disks: Disks,
    pub image: Qcow2,
    pub model: Model,
    pub dice: Dice,
    pub errors: Vec<DiskError>,
    /// Buffers are whole pages.
    pub aligned: bool,
    /// Whatever is read is believed.
    pub trusting: bool,
    journal: Page,
    shape: Shape,
    flights: BTreeMap<u32, Flight>,
    next_tag: u32,
    next_id: u64,
}

/// A sparse disk from the parts of a new image.
pub fn new_image(shape: &Shape) -> Sparse {
    let backing = shape.backing.map(|_| ("backing.raw", BackingFormat::Raw));
    let Shape { size, cluster_bits, extent, .. } = *shape;
    let parts = create(&Create { size, cluster_bits, extent, backing }).unwrap();
    let mut image = Sparse::new(extent);
    for part in parts {
        image.write(part.offset, &part.bytes);
    }
    image
}

/// A raw backing volume whose sectors say where they are.
pub fn new_backing(bytes: u64) -> Sparse {
    let mut backing = Sparse::new(bytes);
    for sector in 0..bytes / SECTOR as u64 {
        backing.write(sector * SECTOR as u64, &content(BACKING, sector));
    }
    backing
}

impl Host {
    pub fn new(shape: Shape, seed: u64) -> Self {
        let backing = Arc::new(new_backing(shape.backing.unwrap_or(0)));
        Self::over(backing, shape, seed)
    }

    /// Serves a new image over a backing volume that is there already.
    pub fn over(backing: Arc<Sparse>, shape: Shape, seed: u64) -> Self {
        let backed = shape.backing.unwrap_or(0) / SECTOR as u64;
        let disks = Disks::new(new_image(&shape), backing, shape.geometry);
        Self::with(disks, Model::new(shape.size / 512, backed), shape, seed)
    }

    /// Serves an image that is there already.
    pub fn with(disks: Disks, model: Model, shape: Shape, seed: u64) -> Self {
        let journal = Page::new_zeroed();
        let image = open(&shape, &journal);
        Self {
            disks,
            image,
            model,
            dice: Dice::new(seed),
            errors: Vec::new(),
            aligned: false,
            trusting: false,
            journal,
            shape,
            flights: BTreeMap::new(),
            next_tag: 0,
            next_id: 1,
        }
    }

    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// The number of the next write.
    pub fn peek_id(&self) -> u64 {
        self.next_id
    }

    /// Goes on until the image is ready or has failed.
    pub fn start(&mut self) {
        self.image.resume(&mut self.disks);
        while *self.image.state() == State::Opening {
            assert!(!self.disks.pending.is_empty(), "nothing happens any more");
            self.execute();
        }
    }

    pub fn start_well(&mut self) {
        self.start();
        assert!(matches!(self.image.state(), State::Ready(_)), "{:?}", self.image.state());
    }

    /// Does one request below.
    pub fn execute(&mut self) {
        let index = self.dice.below(self.disks.pending.len() as u64) as usize;
        let (tag, result) = self.disks.execute(index);
        self.image.completed(&mut self.disks, tag, result);
        self.collect();
    }

    /// The guest does something. False: there is no room.
    pub fn begin(&mut self, action: Action) -> bool {
        let id = match action.operation {
            Operation::Write => self.next_id,
            _ => 0,
        };
        let sectors = if has_data(action.operation) { action.sectors } else { 0 };
        let begun = self.model.now();
        let buffers = self.buffers(sectors);
        let flight = Flight { action, id, begun, buffers };
        for (index, (page, offset)) in flight.places().enumerate() {
            let sector = action.sector + index as u64;
            page.write(offset, &content(if id == 0 { 0xbad } else { id }, sector));
        }
        let tag = self.next_tag;
        if !self.submit(tag, &flight) {
            return false;
        }
        self.next_id += 1;
        self.next_tag += 1;
        for sectors in self.affected(&action) {
            self.model.begin(sectors, id);
        }
        self.flights.insert(tag, flight);
        self.collect();
        true
    }

    fn submit(&mut self, tag: u32, flight: &Flight) -> bool {
        let buffers: Vec<Buffer<'_>> = flight
            .buffers
            .iter()
            .map(|(page, offset, len)| Buffer { page, offset: *offset, len: *len })
            .collect();
        let request = Request {
            tag: Tag(tag),
            operation: flight.action.operation,
            sector: flight.action.sector,
            sectors: flight.action.sectors,
            buffers: &buffers,
        };
        self.image.submit(&mut self.disks, request).is_ok()
    }

    /// Buffers that start anywhere in a page.
    fn buffers(&mut self, mut sectors: u64) -> Vec<(DmaPage, u16, u16)> {
        let mut offset = if self.aligned { 0 } else { self.dice.below(8) * 512 };
        let mut buffers = Vec::new();
        while sectors > 0 {
            let len = (sectors * 512).min(4096 - offset);
            let page = DmaPage { page: Page::new_zeroed(), bus_address: 0x9000_0000 };
            buffers.push((page, offset as u16, len as u16));
            sectors -= len / 512;
            offset = 0;
        }
        buffers
    }

    /// Which sectors a request gives a new content.
    fn affected(&self, action: &Action) -> Vec<core::ops::Range<u64>> {
        let (first, end) = (action.sector, action.sector + action.sectors);
        let cluster = (1 << self.shape.cluster_bits) / 512;
        let size = self.shape.size / 512;
        match action.operation {
            Operation::Write | Operation::WriteZeroes => core::iter::once(first..end).collect(),
            Operation::Discard => {
                let whole = first.div_ceil(cluster)..size.div_ceil(cluster);
                whole
                    .map(|index| index * cluster..((index + 1) * cluster).min(size))
                    .filter(|range| range.end <= end)
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    /// Takes what is done.
    pub fn collect(&mut self) {
        while let Some(completion) = self.image.next_done() {
            let flight = self.flights.remove(&completion.tag.0).expect("in flight");
            let action = flight.action;
            if let Err(error) = completion.result {
                self.errors.push(error);
                continue;
            }
            for sectors in self.affected(&action) {
                self.model.acknowledge(sectors, flight.id);
            }
            match action.operation {
                Operation::Flush => self.model.flushed(flight.begun),
                Operation::Read if !self.trusting => self.verify(&flight),
                _ => {}
            }
        }
    }

    fn verify(&self, flight: &Flight) {
        for (index, (page, offset)) in flight.places().enumerate() {
            let sector = flight.action.sector + index as u64;
            let mut bytes = [0; SECTOR];
            page.read(offset, &mut bytes);
            let id = id_of(&bytes, sector);
            assert!(
                id.is_some_and(|id| self.model.may_read(sector, id, flight.begun)),
                "sector {sector} reads as {id:?} ({:?})",
                &bytes[..24]
            );
        }
    }

    /// Does a request below, or one of the guest.
    pub fn step(&mut self, actions: &mut Vec<Action>, depth: usize) {
        let may_begin = self.in_flight() < depth && !actions.is_empty();
        if may_begin && (self.disks.pending.is_empty() || self.dice.one_in(2)) {
            let action = *actions.last().expect("checked");
            if self.begin(action) {
                actions.pop();
                return;
            }
        }
        if self.disks.pending.is_empty() {
            self.image.resume(&mut self.disks);
            self.collect();
            assert!(
                self.in_flight() == 0 || !self.disks.pending.is_empty(),
                "nothing happens any more: {:?}\n{:#?}",
                self.flights.values().map(|flight| flight.action).collect::<Vec<_>>(),
                self.image
            );
        } else {
            self.execute();
        }
    }

    /// Does a request below while the image is being opened. False: it is open.
    pub fn opening_step(&mut self) -> bool {
        let is_opening = *self.image.state() == State::Opening;
        if is_opening {
            assert!(!self.disks.pending.is_empty(), "nothing happens any more");
            self.execute();
        }
        is_opening
    }

    /// Runs until all is done.
    pub fn run(&mut self, mut actions: Vec<Action>, depth: usize) {
        actions.reverse();
        while !actions.is_empty() || self.in_flight() > 0 || !self.disks.pending.is_empty() {
            self.step(&mut actions, depth);
        }
        assert!(self.image.is_idle(), "{:#?}", self.image);
    }

    /// The driver domain dies and begins anew. What was not answered is asked again.
    pub fn driver_dies(&mut self) {
        let mut fate = Dice::new(self.dice.next());
        self.disks.driver_dies(|| fate.next());
        self.image = open(&self.shape, &self.journal);
    }

    /// Submits again what was in flight when the last incarnation died.
    pub fn replay(&mut self) {
        for (tag, flight) in self.flights.clone() {
            while !self.submit(tag, &flight) {
                assert!(!self.disks.pending.is_empty(), "no room");
                self.execute();
            }
            self.collect();
        }
    }

    /// Power fails: driver domain, guest and disk caches are gone.
    pub fn power_fails(&mut self) {
        let mut dice = Dice::new(self.dice.next());
        self.disks.power_fails(&mut dice);
        self.model.power_failed();
        self.flights.clear();
        self.journal = Page::new_zeroed();
        self.image = open(&self.shape, &self.journal);
    }

    /// Reads the whole virtual disk, in order.
    pub fn read_all(&mut self) -> Vec<u8> {
        let most = u64::from(self.shape.geometry.max_sectors).min(64);
        let sectors = self.model.len();
        (0..sectors.div_ceil(most))
            .flat_map(|index| self.read(index * most, most.min(sectors - index * most)))
            .collect()
    }

    /// Reads everything that was ever written.
    pub fn read_touched(&mut self) {
        let sectors = self.model.len();
        for page in self.model.touched(8) {
            self.read(page * 8, 8.min(sectors - page * 8));
        }
    }

    fn read(&mut self, sector: u64, sectors: u64) -> Vec<u8> {
        let action = Action { operation: Operation::Read, sector, sectors };
        let buffers = self.buffers(sectors);
        let flight = Flight { action, id: 0, begun: self.model.now(), buffers };
        let tag = self.next_tag;
        self.next_tag += 1;
        assert!(self.submit(tag, &flight));
        self.flights.insert(tag, flight.clone());
        self.collect();
        while self.in_flight() > 0 {
            self.execute();
        }
        let mut bytes = vec![0; sectors as usize * SECTOR];
        for ((page, offset), part) in flight.places().zip(bytes.chunks_exact_mut(SECTOR)) {
            page.read(offset, part);
        }
        bytes
    }

    /// Reads everything that was written and takes it for granted from now on.
    pub fn settle(&mut self) {
        let len = self.model.len();
        for page in self.model.touched(8) {
            let bytes = self.read(page * 8, 8.min(len - page * 8));
            for (sector, bytes) in (page * 8..).zip(bytes.chunks_exact(512)) {
                let id = id_of(bytes, sector).expect("verified");
                self.model.settle(sector, id);
            }
        }
    }
}

fn has_data(operation: Operation) -> bool {
    matches!(operation, Operation::Read | Operation::Write)
}

fn open(shape: &Shape, journal: &Page) -> Qcow2 {
    Qcow2::open(Setup {
        image_sectors: shape.extent / 512,
        backing_sectors: shape.backing.map(|bytes| bytes / 512),
        writable: true,
        pages: pages(shape.pages),
        journal: journal.clone(),
    })
}

impl Flight {
    /// The place of each sector.
    fn places(&self) -> impl Iterator<Item = (&Page, usize)> {
        self.buffers.iter().flat_map(|(page, offset, len)| {
            let inside = (*offset..*offset + *len).step_by(512);
            inside.map(|offset| (&page.page, usize::from(offset)))
        })
    }
}

/// A random load. Most of it hits few clusters, so that requests meet.
pub fn load(dice: &mut Dice, shape: &Shape, count: usize, most: u64) -> Vec<Action> {
    let size = shape.size / 512;
    let unit = u64::from(shape.geometry.sector_size / 512);
    let action = |dice: &mut Dice| {
        let operation = match dice.below(16) {
            0..=8 => Operation::Write,
            9..=11 => Operation::Read,
            12 => Operation::Flush,
            13..=14 => Operation::Discard,
            _ => Operation::WriteZeroes,
        };
        let most = match operation {
            Operation::Discard | Operation::WriteZeroes => 4 * most,
            Operation::Flush => return Action { operation, sector: 0, sectors: 0 },
            _ => most,
        };
        let sectors = (1 + dice.below(most)).next_multiple_of(unit).min(size);
        let sector = dice.below((size - sectors + 1) / unit) * unit;
        Action { operation, sector, sectors }
    };
    (0..count).map(|_| action(dice)).collect()
}
