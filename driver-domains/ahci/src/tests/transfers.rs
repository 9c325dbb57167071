//! Requests that end well.

use super::*;
use crate::command::ata;
use crate::model::{Adapter, ModelDisk};
use crate::recovery::ATTEMPTS;
use proptest::collection::vec;
use proptest::prelude::*;

const SECTORS: u64 = 256;

#[derive(Clone, Debug)]
enum Step {
    Submit(u8, u64, u64),
    Kick,
    Execute(usize),
    Turn,
    Complete,
    Fault(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_u8..8, 0..SECTORS, 1_u64..24).prop_map(|(kind, at, len)| Step::Submit(kind, at, len)),
        2 => Just(Step::Kick),
        4 => any::<usize>().prop_map(Step::Execute),
        2 => Just(Step::Turn),
        2 => Just(Step::Complete),
        1 => (0_u8..5).prop_map(Step::Fault),
    ]
}

/// The disk as its submitter expects it, and what is in flight.
struct Expected {
    sectors: BTreeMap<u64, [u8; 512]>,
    flying: BTreeMap<u32, (Operation, u64, u64, u64)>,
    /// Sectors written and completed.
    completed: Vec<u64>,
    flushes: BTreeMap<u32, usize>,
    strikes: u32,
}

impl Expected {
    fn overlaps(&self, sector: u64, sectors: u64) -> bool {
        self.flying.values().any(|(_, at, len, _)| sector < at + len && *at < sector + sectors)
    }

    fn get(&self, sector: u64) -> [u8; 512] {
        self.sectors.get(&sector).copied().unwrap_or([0; 512])
    }
}

fn apply(bench: &mut Bench, expected: &mut Expected, unit: u64, step: &Step) {
    match *step {
        Step::Submit(kind, at, len) => {
            let (at, len) = (at / unit * unit, len.div_ceil(unit) * unit);
            let (at, len) = if kind == 7 { (0, 0) } else { (at, len.min(SECTORS - at)) };
            if expected.overlaps(at, len) {
                return;
            }
            let generation = u64::from(bench.next);
            let (operation, tag) = match kind {
                0..3 => (Operation::Write, bench.transfer(Operation::Write, at, len, generation)),
                3..6 => (Operation::Read, bench.transfer(Operation::Read, at, len, 0)),
                6 => (Operation::Discard, bench.submit(Operation::Discard, at, len)),
                _ => (Operation::Flush, bench.submit(Operation::Flush, 0, 0)),
            };
            if let Some(tag) = tag {
                expected.flying.insert(tag.0, (operation, at, len, generation));
                expected.flushes.insert(tag.0, expected.completed.len());
            }
        }
        Step::Kick => bench.kick(),
        Step::Execute(choice) => {
            bench.model.step(0, choice);
        }
        Step::Turn => bench.turn(),
        Step::Complete => {
            if let Some(completion) = bench.complete() {
                judge(bench, expected, completion);
            }
        }
        Step::Fault(kind) => {
            // One more, and a request could meet with as many as it has attempts.
            expected.strikes += u32::from(kind < 3);
            if kind < 3 && expected.strikes >= u32::from(ATTEMPTS) {
                return;
            }
            let mut disk = bench.model.disk(0);
            match kind {
                0 => disk.faults.damaged = 1,
                1 => disk.faults.hangs = 1,
                2 => disk.faults.interface = 1,
                3 => disk.faults.no_log = !disk.faults.no_log,
                _ => disk.faults.bad_log = !disk.faults.bad_log,
            }
        }
    }
}

/// A request ended: once, and with the right content.
fn judge(bench: &Bench, expected: &mut Expected, completion: Completion) {
    let tag = completion.tag.0;
    let (operation, at, len, generation) = expected.flying.remove(&tag).expect("in flight");
    assert_eq!(completion.result, Ok(()), "{operation:?}");
    match operation {
        Operation::Write => {
            for sector in at..at + len {
                expected.sectors.insert(sector, pattern(sector, generation));
                expected.completed.push(sector);
            }
        }
        Operation::Discard => {
            for sector in at..at + len {
                expected.sectors.insert(sector, [0; 512]);
            }
        }
        Operation::Read => {
            let content = bench.content(completion.tag);
            for (sector, bytes) in (at..at + len).zip(content) {
                assert_eq!(bytes, expected.get(sector), "sector {sector}");
            }
        }
        _ => judge_flush(bench, expected, tag),
    }
}

/// Everything that was completed before the flush was submitted is on the medium.
fn judge_flush(bench: &Bench, expected: &Expected, tag: u32) {
    let disk = bench.model.disk(0);
    let shift = if disk.medium.values().next().map_or(512, Vec::len) == 512 { 0 } else { 3 };
    for sector in &expected.completed[..expected.flushes[&tag]] {
        assert!(disk.medium.contains_key(&(sector >> shift)), "sector {sector} is not durable");
    }
}

fn run(model: Model, unit: u64, steps: &[Step]) {
    let mut bench = Bench::new(model);
    let mut expected = Expected {
        sectors: BTreeMap::new(),
        flying: BTreeMap::new(),
        completed: Vec::new(),
        flushes: BTreeMap::new(),
        strikes: 0,
    };
    for step in steps {
        apply(&mut bench, &mut expected, unit, step);
    }
    for (tag, result) in bench.finish() {
        judge(&bench, &mut expected, Completion { tag: Tag(tag), result });
    }
    assert!(expected.flying.is_empty(), "{:?} never ended", expected.flying);
    let content = bench.model.disk(0).content();
    for (lba, bytes) in &content {
        for (sector, bytes) in (lba * unit..).zip(bytes.chunks_exact(512)) {
            assert_eq!(bytes, expected.get(sector), "sector {sector}");
        }
    }
    for (sector, bytes) in &expected.sectors {
        assert!(*bytes == [0; 512] || content.contains_key(&(sector / unit)), "{sector} is lost");
    }
    bench.assert_no_violations();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// In whatever order requests are submitted, executed and completed, and whichever passing
    /// faults strike, each ends once and well, reads bring what was written, and a flush means on
    /// the medium.
    #[test]
    fn every_request_ends_once_and_right(
        ncq in any::<bool>(),
        large in any::<bool>(),
        depth in 1_u32..=32,
        steps in vec(step(), 1..120),
    ) {
        let adapter = Adapter { ncq, slots: depth, ..Adapter::default() };
        let unit = if large { 8 } else { 1 };
        let bytes = if large { 4096 } else { 512 };
        let disk = ModelDisk::new(SECTORS / unit, bytes);
        run(Model::new(adapter, [Some(disk), None, None, None]), unit, &steps);
    }
}

#[test]
fn a_queue_is_as_deep_as_disk_and_adapter_allow() {
    for (slots, word, expected) in [(32, 31, 32), (32, 7, 8), (4, 31, 4), (1, 31, 1)] {
        let adapter = Adapter { slots, ..Adapter::default() };
        let disk = ModelDisk::new(4096, 512).word(75, word);
        let model = Model::new(adapter, [Some(disk), None, None, None]);
        let mut bench = Bench::new(model);
        let mut accepted = 0;
        while bench.transfer(Operation::Write, accepted * 8, 8, 0).is_some() {
            accepted += 1;
        }
        assert_eq!(accepted, expected);
        assert_eq!(u64::from(bench.driver.disks()[0].geometry().queue_depth), expected);
        bench.kick();
        assert_eq!(bench.model.pending(0).len() as u64, expected);
        assert_eq!(bench.finish().len() as u64, expected);
        bench.assert_no_violations();
    }
}

/// Flushes and trims are not mixed with queued commands, and neither kind starves the other.
#[test]
fn a_flush_waits_for_queued_commands_and_holds_back_later_ones() {
    let mut bench = Bench::new(Model::with(ModelDisk::new(4096, 512)));
    bench.transfer(Operation::Write, 0, 8, 0);
    bench.transfer(Operation::Write, 8, 8, 0);
    bench.kick();
    let flush = bench.submit(Operation::Flush, 0, 0).expect("room");
    bench.transfer(Operation::Write, 16, 8, 0);
    bench.kick();
    assert_eq!(bench.model.pending(0), [(0, true), (1, true)]);
    bench.model.step(0, 1);
    bench.turn();
    assert!(bench.complete().is_some());
    assert_eq!(bench.model.pending(0), [(0, true)]);
    bench.model.step(0, 0);
    bench.turn();
    assert!(bench.complete().is_some());
    assert_eq!(bench.model.pending(0), [(2, false)], "the flush, alone");
    let second = bench.submit(Operation::Flush, 0, 0).expect("room");
    bench.kick();
    bench.model.step(0, 0);
    bench.turn();
    assert_eq!(bench.complete(), Some(Completion { tag: flush, result: Ok(()) }));
    assert_eq!(bench.model.pending(0), [(3, true)], "the write has its turn");
    bench.model.step(0, 0);
    bench.turn();
    assert!(bench.complete().is_some());
    let results = bench.finish();
    assert_eq!(results[&second.0], Ok(()));
    assert_eq!(bench.model.disk(0).count(ata::FLUSH_CACHE_EXT), 2);
    bench.assert_no_violations();
}

#[test]
fn a_flush_without_a_cache_is_no_command() {
    let disk = ModelDisk::new(64, 512).word(85, 0).word(83, 1 << 14 | 1 << 10);
    let mut bench = Bench::new(Model::with(disk));
    let tag = bench.submit(Operation::Flush, 0, 0).expect("room");
    assert_eq!(bench.finish()[&tag.0], Ok(()));
    let disk = ModelDisk::new(64, 512).word(83, 1 << 14 | 1 << 10);
    let mut bench = Bench::new(Model::with(disk));
    let tag = bench.submit(Operation::Flush, 0, 0).expect("room");
    assert_eq!(bench.finish()[&tag.0], Err(DiskError::Unsupported), "a cache without a flush");
}

#[test]
fn a_trim_covers_more_than_one_range() {
    let mut bench = Bench::new(Model::with(ModelDisk::new(200_000, 512)));
    let tag = bench.submit(Operation::Discard, 10, 150_000).expect("room");
    assert_eq!(bench.finish()[&tag.0], Ok(()));
    let trimmed: Vec<u64> = bench.model.disk(0).cache.keys().copied().collect();
    assert_eq!((trimmed.len(), trimmed[0], trimmed[149_999]), (150_000, 10, 150_009));
    bench.assert_no_violations();
}

#[test]
fn requests_that_do_not_fit_are_failed_and_not_issued() {
    let mut bench = Bench::new(Model::with(ModelDisk::new(64, 4096)));
    let submit = |bench: &mut Bench, operation, sector, sectors| {
        let tag = bench.submit(operation, sector, sectors).expect("room");
        bench.finish()[&tag.0]
    };
    let out = Err(DiskError::OutOfRange);
    let unsupported = Err(DiskError::Unsupported);
    assert_eq!(submit(&mut bench, Operation::Discard, 512, 8), out);
    assert_eq!(submit(&mut bench, Operation::Discard, 504, 16), out);
    assert_eq!(submit(&mut bench, Operation::Discard, u64::MAX - 7, 8), out);
    assert_eq!(submit(&mut bench, Operation::Discard, 4, 8), unsupported);
    assert_eq!(submit(&mut bench, Operation::Discard, 0, 0), unsupported);
    assert_eq!(submit(&mut bench, Operation::WriteZeroes, 0, 8), unsupported);
    assert_eq!(submit(&mut bench, Operation::Read, 0, 8), unsupported, "no buffers");
    let tag = bench.transfer(Operation::Write, 4, 8, 0).expect("room");
    assert_eq!(bench.finish()[&tag.0], unsupported);
    let page = page(&bench.model);
    for (offset, len) in [(0, 511), (1, 512), (3584, 1024), (0, 0)] {
        let buffers = [Buffer { page: &page, offset, len }];
        let request = Request {
            tag: Tag(99),
            operation: Operation::Write,
            sector: 0,
            sectors: 8,
            buffers: &buffers,
        };
        assert!(bench.driver.disks()[0].submit(request).is_ok());
        assert_eq!(bench.finish()[&99], unsupported);
    }
    assert!(bench.model.disk(0).counts.keys().all(|code| *code == ata::IDENTIFY));
}

/// The largest request that the geometry allows, in the smallest pieces.
#[test]
fn as_many_buffers_as_promised_can_be_used() {
    let mut bench = Bench::new(Model::with(ModelDisk::new(4096, 512)));
    let geometry = *bench.driver.disks()[0].geometry();
    let max = u64::from(geometry.max_sectors);
    let write = bench.transfer(Operation::Write, 8, max, 5).expect("room");
    assert_eq!(bench.finish()[&write.0], Ok(()));
    let read = bench.transfer(Operation::Read, 8, max, 0).expect("room");
    assert_eq!(bench.finish()[&read.0], Ok(()));
    for (sector, bytes) in (8..8 + max).zip(bench.content(read)) {
        assert_eq!(bytes, pattern(sector, 5));
    }
    let more = bench.transfer(Operation::Read, 8, max + 8, 0).expect("room");
    assert_eq!(bench.finish()[&more.0], Err(DiskError::Unsupported));
    bench.assert_no_violations();
}

/// One message per burst; what ends between the last look and the unmasking is not forgotten.
#[test]
fn a_burst_interrupts_once_and_nothing_is_forgotten() {
    let mut bench = Bench::new(Model::with(ModelDisk::new(4096, 512)));
    for at in 0..8 {
        bench.transfer(Operation::Write, at * 8, 8, 0);
    }
    bench.kick();
    bench.model.step(0, 0);
    assert_eq!(bench.model.messages(), 1);
    bench.driver.interrupt();
    bench.model.step(0, 0);
    bench.model.step(0, 0);
    assert_eq!(std::iter::from_fn(|| bench.complete()).count(), 3);
    bench.model.step(0, 0);
    assert_eq!(bench.complete(), None, "nobody looks without a reason");
    assert_eq!(bench.model.messages(), 0, "masked");
    assert!(bench.driver.arm(), "there is work");
    assert_eq!(std::iter::from_fn(|| bench.complete()).count(), 1);
    assert_eq!(bench.model.messages(), 1, "the unmasking told of it too");
    bench.driver.interrupt();
    assert_eq!(bench.complete(), None);
    assert!(!bench.driver.arm());
    bench.model.step(0, 0);
    assert_eq!(bench.model.messages(), 1, "unmasked");
    assert_eq!(bench.finish().len(), 4);
}

#[test]
fn a_lost_message_costs_time_and_nothing_else() {
    let mut bench = Bench::new(Model::with(ModelDisk::new(4096, 512)));
    bench.model.set_adapter(|adapter| adapter.lost_interrupts = true);
    let tag = bench.transfer(Operation::Write, 0, 8, 0).expect("room");
    assert_eq!(bench.finish()[&tag.0], Ok(()));
    bench.transfer(Operation::Write, 0, 8, 0);
    bench.kick();
    bench.model.run();
    assert!(!bench.driver.arm(), "nobody knows");
    bench.driver.check(bench.model.now_ns()).expect("works");
    assert!(bench.driver.arm(), "now somebody looks");
    assert!(bench.complete().is_some());
    assert!(!bench.driver.arm());
}
