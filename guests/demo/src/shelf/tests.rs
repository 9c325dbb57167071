//! The shelf on a disk in memory.

use super::*;
use crate::generator;
use crate::tar::tests::archive;
use domain_api::disk::{Busy, Geometry};
use proptest::prelude::*;
use std::string::ToString;
use std::vec;

type Parts = Vec<(Page, usize)>;

/// A disk that answers in any order, and never more than eight requests at a time.
pub(crate) struct Memory {
    geometry: Geometry,
    bytes: Vec<u8>,
    pending: Vec<(Tag, u64, Parts)>,
    random: u64,
    /// Sectors from here on cannot be read.
    pub(crate) bad: u64,
}

impl Memory {
    pub(crate) fn new(files: &[(&str, Vec<u8>)], sector_size: u32) -> Self {
        let mut bytes = archive(files);
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        let geometry = Geometry {
            sectors: bytes.len() as u64 / 512,
            sector_size,
            physical_sector_size: 4096,
            read_only: true,
            volatile_cache: false,
            max_discard_sectors: 0,
            max_write_zeroes_sectors: 0,
            max_sectors: 256,
            max_buffers: 11,
            whole_pages: true,
            queue_depth: 8,
        };
        Self { geometry, bytes, pending: Vec::new(), random: 1, bad: u64::MAX }
    }
}

impl Disk for Memory {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn submit(&mut self, request: Request<'_>) -> Result<(), Busy> {
        let unit = u64::from(self.geometry.sector_size) / 512;
        assert!(request.sector.is_multiple_of(unit) && request.sectors.is_multiple_of(unit));
        assert!(request.sector + request.sectors <= self.geometry.sectors);
        assert!(self.geometry.takes(request.buffers));
        if self.pending.len() == 8 {
            return Err(Busy);
        }
        let part = |it: &Buffer<'_>| (it.page.page.clone(), usize::from(it.len));
        let buffers = request.buffers.iter().map(part).collect();
        self.pending.push((request.tag, request.sector, buffers));
        Ok(())
    }

    fn kick(&mut self) {}

    fn complete(&mut self) -> Option<Completion> {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let roll = usize::try_from(self.random >> 40).unwrap();
        if self.pending.is_empty() || roll.is_multiple_of(3) {
            return None;
        }
        let (tag, sector, buffers) = self.pending.swap_remove(roll % self.pending.len());
        if sector >= self.bad {
            return Some(Completion { tag, result: Err(DiskError::Medium) });
        }
        let mut at = usize::try_from(sector).unwrap() * 512;
        for (page, len) in buffers {
            page.write(0, &self.bytes[at..at + len]);
            at += len;
        }
        Some(Completion { tag, result: Ok(()) })
    }
}

pub(crate) fn pages(count: u64) -> Vec<DmaPage> {
    (0..count).map(|n| DmaPage { page: Page::new_zeroed(), bus_address: n << 12 }).collect()
}

pub(crate) fn content(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    generator::fill(len as u64, &mut bytes);
    bytes
}

fn opened(disk: &mut Memory, pages_count: u64) -> Shelf {
    let mut shelf = Shelf::new(pages(pages_count));
    for _ in 0..1000 {
        shelf.poll(disk);
    }
    shelf
}

fn free(shelf: &Shelf) -> usize {
    shelf.pool.borrow().free.len()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// However the disk orders its answers and whoever reads how fast, everybody gets their file,
    /// and all pages come back.
    #[test]
    fn every_reader_gets_its_file(
        lens in prop::collection::vec(0_usize..300_000, 1..5),
        sector_size in prop::sample::select(vec![512_u32, 4096]),
        steps in prop::collection::vec(1_usize..70_000, 1..6),
    ) {
        let names: Vec<String> = (0..lens.len()).map(|n| n.to_string()).collect();
        let files: Vec<_> =
            names.iter().zip(&lens).map(|(name, len)| (name.as_str(), content(*len))).collect();
        let mut disk = Memory::new(&files, sector_size);
        let mut shelf = opened(&mut disk, 48);
        prop_assert_eq!(shelf.state(), State::Ready);
        prop_assert!(shelf.open("none").is_none());
        let mut readers: Vec<_> =
            names.iter().map(|name| (shelf.open(name).expect("it is there"), Vec::new())).collect();
        for round in 0..100_000 {
            shelf.poll(&mut disk);
            let at = round % readers.len();
            let (reader, out) = &mut readers[at];
            let mut buffer = vec![0; steps[round % steps.len()]];
            let len = reader.read(&mut buffer);
            out.extend_from_slice(&buffer[..len]);
            if readers.iter().all(|(reader, _)| reader.left() == 0) {
                break;
            }
        }
        for ((_, out), (_, content)) in readers.iter().zip(&files) {
            prop_assert!(out == content);
        }
        drop(readers);
        prop_assert_eq!(free(&shelf), 48);
        let (requests, answered, _) = shelf.counts();
        prop_assert_eq!(requests, answered);
    }
}

/// Readers that do not move keep one piece each, and nobody starves.
#[test]
fn readers_that_stand_still_do_not_starve_others() {
    let mut disk = Memory::new(&[("a", content(1 << 20))], 512);
    let mut shelf = opened(&mut disk, 32);
    let still: Vec<_> = (0..3).map(|_| shelf.open("a").unwrap()).collect();
    for _ in 0..1000 {
        shelf.poll(&mut disk);
    }
    assert_eq!(free(&shelf), 0);
    let (mut reader, mut out) = (shelf.open("a").unwrap(), Vec::new());
    let mut buffer = vec![0; 10_000];
    for _ in 0..10_000 {
        shelf.poll(&mut disk);
        let len = reader.read(&mut buffer);
        out.extend_from_slice(&buffer[..len]);
    }
    assert!(out == content(1 << 20));
    // What was given up is read again.
    for mut reader in still {
        let mut out = Vec::new();
        while reader.left() > 0 {
            shelf.poll(&mut disk);
            let len = reader.read(&mut buffer);
            out.extend_from_slice(&buffer[..len]);
        }
        assert!(out == content(1 << 20));
    }
}

#[test]
fn a_reader_that_leaves_gives_all_pages_back() {
    let mut disk = Memory::new(&[("a", content(1 << 20))], 512);
    let mut shelf = opened(&mut disk, 48);
    for turns in 0..40 {
        let reader = shelf.open("a").unwrap();
        for _ in 0..turns {
            shelf.poll(&mut disk);
        }
        drop(reader);
    }
    for _ in 0..100 {
        shelf.poll(&mut disk);
    }
    assert_eq!(free(&shelf), 48);
    assert_eq!(shelf.streams.len(), 0);
}

#[test]
fn what_cannot_be_read_is_said() {
    let mut disk = Memory::new(&[("a", content(1 << 20))], 512);
    disk.bad = 1000;
    let mut shelf = opened(&mut disk, 48);
    let disk_error = State::Failed(ShelfError::Disk(DiskError::Medium));
    assert_eq!(shelf.state(), disk_error, "the next header is behind");
    disk.bad = u64::MAX;
    let mut shelf2 = opened(&mut disk, 48);
    disk.bad = 1000;
    let mut reader = shelf2.open("a").unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut got = 0;
    while !reader.has_failed() {
        shelf2.poll(&mut disk);
        got += reader.read(&mut buffer);
    }
    drop(shelf2);
    assert!((400 * 512..1000 * 512).contains(&got), "{got}");
    assert!(shelf.open("a").is_some());
    disk.bytes[300] ^= 1;
    assert_eq!(opened(&mut disk, 48).state(), State::Failed(ShelfError::NoArchive));
    disk.bytes.truncate(512);
    let mut short = Memory::new(&[("a", content(1 << 20))], 512);
    short.geometry.sectors = 100;
    assert_eq!(opened(&mut short, 48).state(), State::Failed(ShelfError::TooLong));
}

#[test]
fn readers_learn_of_the_shelfs_end() {
    let mut disk = Memory::new(&[("a", content(1 << 20))], 512);
    let mut shelf = opened(&mut disk, 48);
    let reader = shelf.open("a").unwrap();
    assert!(!reader.has_failed());
    drop(shelf);
    assert!(reader.has_failed());
}
