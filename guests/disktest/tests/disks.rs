//! The verifier on disks in memory: sound ones pass however odd their timing, and each way to be
//! unsound is found and named.

use disktest::engine::{Engine, Mode, Options, Phase, Violation};
use disktest::image;
use disktest::model::{Model, Problem};
use disktest::sector::{Owner, SECTOR, compose};
use disktest::stream::{Kind, LOG_SECTORS, Parameters};
use domain_api::disk::{Busy, Completion, Disk, DiskError, Geometry, Operation, Request, Tag};
use domain_api::{DmaPage, Page};

use std::collections::BTreeMap;

const GEOMETRY: Geometry = Geometry {
    sectors: 4096,
    sector_size: 512,
    physical_sector_size: 512,
    read_only: false,
    volatile_cache: true,
    max_discard_sectors: u32::MAX,
    max_write_zeroes_sectors: 0,
    max_sectors: 256,
    max_buffers: 32,
    whole_pages: false,
    queue_depth: 24,
};
const PARAMETERS: Parameters = Parameters {
    seed: 1,
    area: 8,
    area_sectors: LOG_SECTORS + 600,
    max_sectors: 20,
    unit: 1,
    reads: 450,
    flushes: 25,
    discards: 25,
    fill: 1,
};
const OWNER: Owner = Owner { disk: 51712, run: 0x77 };

/// What is wrong with a disk, now and then; the number says from which request on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Defect {
    None,
    /// A write is acknowledged and never done.
    LostWrite(u32),
    /// A write is acknowledged, and its first sector done by half.
    Torn(u32),
    /// A write goes one sector too far.
    Misdirected(u32),
    /// A read gets what was there at the start.
    StaleRead(u32),
    /// A read gets nothing.
    EmptyRead(u32),
    /// A write that was completed long ago is done again.
    LateReplay(u32),
    /// A completion comes twice.
    Twice(u32),
    /// A discard hits a sector too many.
    WideDiscard(u32),
    /// A request fails.
    Error(u32),
    /// Flushes do nothing.
    NoFlush,
}

struct Pending {
    tag: Tag,
    operation: Operation,
    sector: usize,
    sectors: usize,
    buffers: Vec<(Page, usize, usize)>,
    data: Vec<u8>,
}

/// A disk with a volatile cache, that does requests in any order, and some of them twice.
struct Memory {
    geometry: Geometry,
    medium: Vec<u8>,
    /// Sectors that were written since the last flush.
    cache: BTreeMap<usize, [u8; SECTOR]>,
    start: Vec<u8>,
    pending: Vec<Pending>,
    old: Vec<Pending>,
    again: Option<Completion>,
    random: u64,
    defect: Defect,
    done: u32,
}

impl Memory {
    fn new(seed: u64, defect: Defect) -> Self {
        let bytes = usize::try_from(GEOMETRY.sectors).unwrap() * SECTOR;
        let mut memory = Self {
            geometry: GEOMETRY,
            medium: vec![0xa5; bytes],
            cache: BTreeMap::new(),
            start: Vec::new(),
            pending: Vec::new(),
            old: Vec::new(),
            again: None,
            random: seed,
            defect,
            done: 0,
        };
        memory.start = memory.medium.clone();
        memory
    }

    fn random(&mut self, below: usize) -> usize {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.random >> 33).unwrap() % below
    }

    fn sector(&self, at: usize) -> [u8; SECTOR] {
        let medium = &self.medium[at * SECTOR..(at + 1) * SECTOR];
        self.cache.get(&at).copied().unwrap_or_else(|| medium.try_into().unwrap())
    }

    /// Whether the defect that `wanted` begins at strikes now.
    fn strikes(&self, from: u32, operation: Operation, wanted: Operation) -> bool {
        operation == wanted && self.done >= from && self.done.is_multiple_of(8)
    }

    /// Does a request, perhaps wrongly.
    fn execute(&mut self, request: &Pending) -> Result<(), DiskError> {
        use Operation::{Discard, Read, Write};
        let Pending { operation, sector, sectors, .. } = *request;
        let defect = self.defect;
        match defect {
            Defect::LostWrite(from) if self.strikes(from, operation, Write) => return Ok(()),
            Defect::Torn(from) if self.strikes(from, operation, Write) => {
                let mut torn = self.sector(sector);
                torn[..256].copy_from_slice(&request.data[..256]);
                self.write(sector, &request.data);
                self.cache.insert(sector, torn);
                return Ok(());
            }
            Defect::Misdirected(from) if self.strikes(from, operation, Write) => {
                self.write(sector + 1, &request.data);
                return Ok(());
            }
            Defect::StaleRead(from) if self.strikes(from, operation, Read) => {
                let bytes = self.start[sector * SECTOR..(sector + sectors) * SECTOR].to_vec();
                deliver(request, &bytes);
                return Ok(());
            }
            Defect::EmptyRead(from) if self.strikes(from, operation, Read) => return Ok(()),
            Defect::WideDiscard(from) if self.strikes(from, operation, Discard) => {
                self.write(sector, &vec![0; (sectors + 1) * SECTOR]);
                return Ok(());
            }
            Defect::Error(from) if self.done >= from => return Err(DiskError::Medium),
            _ => {}
        }
        match operation {
            Read => {
                let bytes: Vec<u8> =
                    (sector..sector + sectors).flat_map(|at| self.sector(at)).collect();
                deliver(request, &bytes);
            }
            Write => self.write(sector, &request.data),
            Discard if self.random(2) == 0 => self.write(sector, &vec![0; sectors * SECTOR]),
            _ => {}
        }
        Ok(())
    }

    fn write(&mut self, sector: usize, data: &[u8]) {
        for (at, bytes) in (sector..).zip(data.chunks(SECTOR)) {
            self.cache.insert(at, bytes.try_into().unwrap());
        }
    }

    fn flush(&mut self) {
        if self.defect != Defect::NoFlush {
            for (at, bytes) in std::mem::take(&mut self.cache) {
                self.medium[at * SECTOR..(at + 1) * SECTOR].copy_from_slice(&bytes);
            }
        }
    }

    /// Any of the sectors in the cache reach the medium, the others do not.
    fn lose_power(&mut self) {
        for (at, bytes) in std::mem::take(&mut self.cache) {
            if self.random(2) == 0 {
                self.medium[at * SECTOR..(at + 1) * SECTOR].copy_from_slice(&bytes);
            }
        }
        self.pending.clear();
    }

    fn replay_old(&mut self) {
        if let Defect::LateReplay(from) = self.defect
            && self.done >= from
            && self.old.len() > 40
        {
            let old = self.old.remove(0);
            self.write(old.sector, &old.data);
        }
    }
}

fn deliver(request: &Pending, mut bytes: &[u8]) {
    for (page, offset, len) in &request.buffers {
        let (part, rest) = bytes.split_at(*len);
        page.write(*offset, part);
        bytes = rest;
    }
}

impl Disk for Memory {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn submit(&mut self, request: Request<'_>) -> Result<(), Busy> {
        if self.pending.len() == usize::from(self.geometry.queue_depth) {
            return Err(Busy);
        }
        assert!(self.geometry.takes(request.buffers));
        let part = |it: &domain_api::disk::Buffer<'_>| {
            (it.page.page.clone(), usize::from(it.offset), usize::from(it.len))
        };
        let buffers: Vec<_> = request.buffers.iter().map(part).collect();
        let mut data = Vec::new();
        if request.operation == Operation::Write {
            for (page, offset, len) in &buffers {
                let mut bytes = vec![0; *len];
                page.read(*offset, &mut bytes);
                data.extend(bytes);
            }
        }
        let sector = usize::try_from(request.sector).unwrap();
        let sectors = usize::try_from(request.sectors).unwrap();
        let (tag, operation) = (request.tag, request.operation);
        self.pending.push(Pending { tag, operation, sector, sectors, buffers, data });
        Ok(())
    }

    fn kick(&mut self) {}

    fn complete(&mut self) -> Option<Completion> {
        if let Some(again) = self.again.take() {
            return Some(again);
        }
        if self.pending.is_empty() || self.random(4) == 0 {
            return None;
        }
        self.replay_old();
        // A driver that dies does some requests, and its next incarnation does them again.
        if self.defect == Defect::None && self.random(3) == 0 {
            let at = self.random(self.pending.len());
            let early = self.pending.swap_remove(at);
            if early.operation != Operation::Flush {
                self.execute(&early).unwrap();
            }
            self.pending.push(early);
        }
        let at = self.random(self.pending.len());
        let request = self.pending.swap_remove(at);
        let result = match request.operation {
            Operation::Flush => {
                self.flush();
                Ok(())
            }
            _ => self.execute(&request),
        };
        self.done += 1;
        let completion = Completion { tag: request.tag, result };
        if let Defect::Twice(from) = self.defect
            && self.done >= from
        {
            self.again = Some(completion);
            self.defect = Defect::None;
        }
        if request.operation == Operation::Write && request.sector > 136 {
            self.old.push(request);
        }
        Some(completion)
    }
}

fn pages() -> Vec<DmaPage> {
    (0..64).map(|n| DmaPage { page: Page::new_zeroed(), bus_address: n << 12 }).collect()
}

fn options(seed: u64, requests: u32) -> Options {
    Options {
        parameters: Parameters { seed, ..PARAMETERS },
        owner: OWNER,
        mode: Mode::Run,
        depth: 16,
        requests: Some(requests),
        scan_every: None,
    }
}

fn drive(engine: &mut Engine, disk: &mut Memory, steps: u64) -> Result<(), Violation> {
    for now in 0..steps {
        engine.step(disk, now * 1000)?;
        if engine.phase() == Phase::Done {
            break;
        }
    }
    Ok(())
}

fn verify(disk: &Memory) -> Result<image::Report, image::Error<()>> {
    image::verify(PARAMETERS.area, |sector, bytes| {
        let from = usize::try_from(sector).unwrap() * SECTOR;
        bytes.copy_from_slice(&disk.medium[from..from + bytes.len()]);
        Ok(())
    })
}

fn rerun(mode: Mode, requests: u32) -> Options {
    let owner = Owner { run: OWNER.run + 1, ..OWNER };
    Options { mode, owner, ..options(99, requests) }
}

#[test]
fn a_sound_disk_passes_in_any_order_with_any_replays() {
    for seed in 0..6 {
        let mut disk = Memory::new(seed, Defect::None);
        let scan_every = (seed % 2 == 0).then_some(500);
        let mut engine = Engine::new(Options { scan_every, ..options(seed, 2000) }, pages());
        drive(&mut engine, &mut disk, 1 << 20).unwrap_or_else(|it| panic!("seed {seed}: {it}"));
        let stats = engine.stats();
        assert_eq!((engine.phase(), engine.made(), engine.in_flight()), (Phase::Done, 2000, 0));
        assert_eq!(stats.passes, if scan_every.is_some() { 4 } else { 1 });
        assert!(stats.verified > 3000 && stats.flushes > 20 && stats.discards > 20, "{stats:?}");
        let report = verify(&disk).unwrap();
        assert_eq!((report.verified, report.mismatches.len()), (600, 0));
        assert_eq!((report.record.ended, report.record.flushed), (1, 2000));
    }
}

/// Each defect is found within the run, and named for what it is.
#[test]
fn every_defect_is_found_and_named() {
    for seed in 0..3 {
        for (defect, allowed) in [
            (Defect::LostWrite(300), &[Problem::Lost, Problem::Zeroed][..]),
            (Defect::Torn(300), &[Problem::Torn]),
            (Defect::Misdirected(300), &[Problem::Misdirected, Problem::Lost]),
            (Defect::StaleRead(300), &[Problem::Overwritten]),
            (Defect::EmptyRead(300), &[Problem::Overwritten]),
            (Defect::LateReplay(300), &[Problem::Lost]),
            (Defect::WideDiscard(300), &[Problem::Zeroed]),
        ] {
            let mut disk = Memory::new(seed, defect);
            let mut engine = Engine::new(options(seed, 3000), pages());
            let found = drive(&mut engine, &mut disk, 1 << 20);
            let Err(Violation::Sector { mismatch, .. }) = found else {
                panic!("{defect:?}, seed {seed}: {found:?}")
            };
            assert!(allowed.contains(&mismatch.problem), "{defect:?}, seed {seed}: {mismatch}");
        }
    }
}

/// An emulated disk mixes what it reads with what is written meanwhile; nothing else may.
#[test]
fn a_torn_sector_is_excused_by_a_write_under_way_alone() {
    let parameters = PARAMETERS;
    let sector = parameters.data();
    let writes = |n: u32| {
        let step = parameters.step(n);
        step.kind == Kind::Write && step.covers(sector)
    };
    let mut generations = (0..20_000).filter(|&n| writes(n)).map(|n| n + 1);
    let (first, second) = (generations.next().unwrap(), generations.next().unwrap());
    let mut torn = compose(OWNER, sector, first);
    torn[256..].copy_from_slice(&compose(OWNER, sector, second)[256..]);
    let mut model = Model::new(parameters, OWNER);
    model.written(sector, 1, first);
    assert_eq!(
        model.judge(sector, first, first, second, &torn),
        Ok(()),
        "the second one is under way"
    );
    let judged = model.judge(sector, first, first, second - 1, &torn);
    assert_eq!(judged.map_err(|mismatch| mismatch.problem), Err(Problem::Torn), "it is not yet");
    let judged = model.judge(sector, second, second, second, &torn);
    assert_eq!(judged.map_err(|mismatch| mismatch.problem), Err(Problem::Torn), "it was before");
}

#[test]
fn failed_and_doubled_requests_are_violations() {
    let mut disk = Memory::new(1, Defect::Error(200));
    let mut engine = Engine::new(options(1, 3000), pages());
    let found = drive(&mut engine, &mut disk, 1 << 20);
    assert!(matches!(found, Err(Violation::Failed { error: DiskError::Medium, .. })), "{found:?}");
    let mut disk = Memory::new(1, Defect::Twice(200));
    let mut engine = Engine::new(options(1, 3000), pages());
    let found = drive(&mut engine, &mut disk, 1 << 20);
    assert!(matches!(found, Err(Violation::Completion(_))), "{found:?}");
}

/// Whenever the power fails, what is left passes, and a later run passes on top of it.
#[test]
fn what_a_power_failure_leaves_is_verified() {
    for seed in 0..10 {
        let mut disk = Memory::new(seed, Defect::None);
        let mut engine = Engine::new(options(seed, 100_000), pages());
        drive(&mut engine, &mut disk, 40 + 60 * seed).unwrap();
        disk.lose_power();
        let report = verify(&disk).unwrap();
        assert_eq!(report.mismatches, [], "seed {seed}: {}", report.mismatches[0]);
        assert_eq!((report.verified, report.record.ended), (600, 0));
        for (mode, requests) in [(Mode::Verify, 0), (Mode::VerifyThenRun, 400)] {
            let mut engine = Engine::new(rerun(mode, requests), pages());
            drive(&mut engine, &mut disk, 1 << 20).unwrap();
            assert_eq!((engine.phase(), engine.made()), (Phase::Done, requests));
        }
        assert_eq!(verify(&disk).unwrap().record.run, OWNER.run + 1);
    }
}

/// A flush that flushes nothing shows after a power failure, on the host and in the machine.
#[test]
fn a_disk_that_does_not_flush_is_found_after_a_power_failure() {
    let mut found = 0;
    for seed in 0..8 {
        let mut disk = Memory::new(seed, Defect::None);
        let mut engine = Engine::new(options(seed, 100_000), pages());
        drive(&mut engine, &mut disk, 200).unwrap();
        disk.defect = Defect::NoFlush;
        drive(&mut engine, &mut disk, 800).unwrap();
        disk.lose_power();
        let report = verify(&disk).unwrap();
        let mut again = Engine::new(rerun(Mode::Verify, 0), pages());
        let outcome = drive(&mut again, &mut disk, 1 << 20);
        assert_eq!(outcome.is_err(), !report.mismatches.is_empty());
        let lost =
            |problem| matches!(problem, Problem::Lost | Problem::Zeroed | Problem::Overwritten);
        assert!(report.mismatches.iter().all(|it| lost(it.problem)));
        found += usize::from(outcome.is_err());
    }
    assert!(found >= 6, "{found} of 8");
}

/// Every single damage to an image that a run left in good order is found, but in the log's spare
/// slots and behind the area.
#[test]
fn every_damaged_sector_of_an_image_is_found() {
    let mut disk = Memory::new(3, Defect::None);
    let mut engine = Engine::new(options(3, 1500), pages());
    drive(&mut engine, &mut disk, 1 << 20).unwrap();
    let sound = disk.medium.clone();
    let data = usize::try_from(PARAMETERS.data()).unwrap();
    for at in (data..data + 600).step_by(7) {
        if disk.sector(at).iter().all(|byte| *byte == 0) {
            continue;
        }
        for offset in [0, 33, 300, 511] {
            disk.medium[at * SECTOR + offset] ^= 4;
            let report = verify(&disk).unwrap();
            assert_eq!(report.mismatches.len(), 1, "sector {at}, byte {offset}");
            assert_eq!(report.mismatches[0].sector, at as u64);
            disk.medium.copy_from_slice(&sound);
        }
    }
    assert_eq!(verify(&disk).unwrap().mismatches, []);
    disk.medium.fill(0);
    assert_eq!(verify(&disk), Err(image::Error::NoLog));
}

#[test]
fn a_run_ends_when_it_is_asked_to() {
    let mut disk = Memory::new(5, Defect::None);
    let mut engine = Engine::new(Options { requests: None, ..options(5, 0) }, pages());
    drive(&mut engine, &mut disk, 500).unwrap();
    assert_eq!(engine.phase(), Phase::Running);
    engine.finish();
    drive(&mut engine, &mut disk, 1 << 20).unwrap();
    assert_eq!((engine.phase(), engine.stats().passes), (Phase::Done, 1));
}

#[test]
fn a_pause_is_a_gap_with_requests_in_flight() {
    struct Stuck(Memory, bool);
    impl Disk for Stuck {
        fn geometry(&self) -> &Geometry {
            self.0.geometry()
        }
        fn submit(&mut self, request: Request<'_>) -> Result<(), Busy> {
            self.0.submit(request)
        }
        fn kick(&mut self) {}
        fn complete(&mut self) -> Option<Completion> {
            if self.1 { None } else { self.0.complete() }
        }
    }
    let mut disk = Stuck(Memory::new(5, Defect::None), false);
    let mut engine = Engine::new(options(5, 100_000), pages());
    for now in 0..300 {
        engine.step(&mut disk, now * 1000).unwrap();
    }
    assert_eq!(engine.stats().pauses, 0);
    disk.1 = true;
    for now in 300..40_300 {
        engine.step(&mut disk, now * 1000).unwrap();
    }
    disk.1 = false;
    for now in 40_300..40_400 {
        engine.step(&mut disk, now * 1000).unwrap();
    }
    let stats = engine.stats();
    assert_eq!((stats.pauses, stats.longest_pause_ns / 1_000_000), (1, 40));
}
