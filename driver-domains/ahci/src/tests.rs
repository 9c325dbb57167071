//! The driver against the model.

mod errors;
mod start;
mod transfers;

use crate::model::{BYTES, Model};
use crate::{Ahci, StartError};
use domain_api::disk::{Buffer, Completion, Disk, DiskError, Operation, Request, Tag};
use domain_api::{Clock, Dma, DmaPage, Registers};
use std::collections::BTreeMap;

type Driver = Ahci<Model, Model>;

/// Starts an adapter whose last owner's bus mastering was taken away.
fn start(model: &Model) -> Result<Driver, StartError> {
    model.set_bus_master(false);
    let result = Ahci::start(model.clone(), BYTES, &mut model.clone(), model, || {
        assert!(model.pending(0).is_empty(), "the reset ended what ran");
        model.set_bus_master(true);
        Ok(())
    });
    let _ = model.messages();
    result
}

fn started(model: &Model) -> Driver {
    start(model).expect("a good adapter")
}

fn page(model: &Model) -> DmaPage {
    model.clone().alloc().expect("memory")
}

/// Sectors of 512 bytes whose content tells where they belong.
fn pattern(sector: u64, generation: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..16].copy_from_slice(&(generation + 1).to_le_bytes());
    bytes
}

/// A disk of the driver with what its submitter has to remember.
struct Bench {
    model: Model,
    driver: Driver,
    next: u32,
    pages: BTreeMap<u32, (Vec<DmaPage>, u64)>,
}

impl Bench {
    fn new(model: Model) -> Self {
        let driver = started(&model);
        Self { model, driver, next: 0, pages: BTreeMap::new() }
    }

    fn submit(&mut self, operation: Operation, sector: u64, sectors: u64) -> Option<Tag> {
        let tag = Tag(self.next);
        let request = Request { tag, operation, sector, sectors, buffers: &[] };
        self.driver.disks()[0].submit(request).ok()?;
        self.next += 1;
        Some(tag)
    }

    /// Submits a read or write with a buffer for each 8 sectors.
    fn transfer(
        &mut self,
        operation: Operation,
        sector: u64,
        sectors: u64,
        generation: u64,
    ) -> Option<Tag> {
        let pages: Vec<_> = (0..sectors.div_ceil(8)).map(|_| page(&self.model)).collect();
        if operation == Operation::Write {
            for at in 0..sectors {
                let page = &pages[usize::try_from(at / 8).expect("small")].page;
                let offset = usize::try_from(at % 8 * 512).expect("small");
                page.write(offset, &pattern(sector + at, generation));
            }
        }
        let buffers: Vec<_> = (0..)
            .zip(&pages)
            .map(|(at, page)| {
                let len = u16::try_from((sectors - at * 8).min(8) * 512).expect("a page");
                Buffer { page, offset: 0, len }
            })
            .collect();
        let tag = Tag(self.next);
        let request = Request { tag, operation, sector, sectors, buffers: &buffers };
        self.driver.disks()[0].submit(request).ok()?;
        self.next += 1;
        self.pages.insert(tag.0, (pages, sector));
        Some(tag)
    }

    fn kick(&mut self) {
        self.driver.disks()[0].kick();
    }

    fn complete(&mut self) -> Option<Completion> {
        self.driver.disks()[0].complete()
    }

    /// Waits as the domain does: messages, then the clock.
    fn turn(&mut self) {
        if self.model.messages() != 0 {
            self.driver.interrupt();
        }
        self.driver.arm();
    }

    /// Runs until everything is complete, and returns how each request ended.
    fn finish(&mut self) -> BTreeMap<u32, Result<(), DiskError>> {
        let mut results = BTreeMap::new();
        self.kick();
        for _ in 0..2000 {
            self.model.run();
            if self.model.messages() != 0 {
                self.driver.interrupt();
            }
            while let Some(completion) = self.complete() {
                assert!(results.insert(completion.tag.0, completion.result).is_none(), "twice");
            }
            self.driver.arm();
            if self.model.pending(0).is_empty()
                && self.driver.disks()[0].disk().expect("a disk").is_idle()
            {
                break;
            }
            self.model.advance(250_000_000);
            self.driver.check(self.model.now_ns()).expect("the adapter works");
        }
        results
    }

    /// The sectors that a completed read has brought.
    fn content(&self, tag: Tag) -> Vec<[u8; 512]> {
        let (pages, _) = &self.pages[&tag.0];
        let sectors = pages.iter().flat_map(|page| (0..8).map(move |at| (page, at * 512)));
        sectors
            .map(|(page, at)| {
                let mut bytes = [0; 512];
                page.page.read(at, &mut bytes);
                bytes
            })
            .collect()
    }

    fn assert_no_violations(&self) {
        assert_eq!(self.model.violations(), Vec::<String>::new());
    }
}
