//! Requests of all kinds, and what they cost.

use super::*;
use domain_api::disk::{Busy, DiskError};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::BTreeMap;

#[test]
fn transfers_of_every_shape_reach_the_right_memory_and_blocks() {
    let rig = Rig::new(Setup::default(), vec![RamDisk::new(1, 9, 1000)]);
    let (mut domain, mut nvme) = rig.start();
    let (from, to) = (pages(&mut domain, 65), pages(&mut domain, 65));
    let disk = &mut nvme.namespaces()[0];
    for sectors in [1, 2, 7, 8, 9, 15, 16, 17, 24, 40, 63, 64, 65, 504, 511, 512] {
        for (write_at, read_at) in [(0, 0), (512, 3584), (3584, 1024)] {
            let source = buffers(&from, write_at, sectors);
            let sent = fill(&source, u32::try_from(sectors + write_at).expect("small"));
            let count = sectors as u64;
            let write = request(Operation::Write, 1, 100, count, &source);
            assert_eq!(one(&rig, disk, write), Ok(()));
            let target = buffers(&to, read_at, sectors);
            let read = request(Operation::Read, 2, 100, count, &target);
            assert_eq!(one(&rig, disk, read), Ok(()));
            assert_eq!(content(&target), sent, "{sectors} sectors at {write_at}, {read_at}");
        }
    }
}

#[test]
fn blocks_of_4096_bytes_are_counted_in_sectors_of_512() {
    let rig = Rig::new(Setup::default(), vec![RamDisk::new(1, 12, 100)]);
    let (mut domain, mut nvme) = rig.start();
    let pages = pages(&mut domain, 3);
    let disk = &mut nvme.namespaces()[0];
    let lent = buffers(&pages, 512, 16);
    let sent = fill(&lent, 3);
    assert_eq!(one(&rig, disk, request(Operation::Write, 1, 784, 16, &lent)), Ok(()));
    assert_eq!(rig.model.with_disk(0, |disk| disk.read(99)), sent[4096..]);
    let beyond = request(Operation::Write, 1, 792, 16, &lent);
    assert_eq!(one(&rig, disk, beyond), Err(DiskError::OutOfRange));
    let part = buffers(&pages, 0, 4);
    let odd = request(Operation::Write, 1, 0, 4, &part);
    assert_eq!(one(&rig, disk, odd), Err(DiskError::Unsupported));
    let odd = request(Operation::Write, 1, 4, 16, &lent);
    assert_eq!(one(&rig, disk, odd), Err(DiskError::Unsupported));
}

#[test]
fn what_was_flushed_survives_a_loss_of_power() {
    let rig = Rig::small();
    let (mut domain, mut nvme) = rig.start();
    let pages = pages(&mut domain, 1);
    let disk = &mut nvme.namespaces()[0];
    let lent = buffers(&pages, 0, 1);
    let first = fill(&lent, 1);
    assert_eq!(one(&rig, disk, request(Operation::Write, 1, 5, 1, &lent)), Ok(()));
    assert_eq!(one(&rig, disk, request(Operation::Flush, 2, 0, 0, &[])), Ok(()));
    fill(&lent, 2);
    assert_eq!(one(&rig, disk, request(Operation::Write, 3, 5, 1, &lent)), Ok(()));
    rig.model.lose_power();
    assert_eq!(rig.model.with_disk(0, |disk| disk.read(5)), first);
}

#[test]
fn without_a_cache_a_flush_costs_nothing() {
    let setup = Setup { volatile_cache: false, ..Setup::default() };
    let rig = Rig::new(setup, vec![RamDisk::new(1, 9, 1000)]);
    let (_domain, mut nvme) = rig.start();
    let disk = &mut nvme.namespaces()[0];
    let before = rig.model.doorbells();
    assert_eq!(one(&rig, disk, request(Operation::Flush, 2, 0, 0, &[])), Ok(()));
    assert_eq!(rig.model.doorbells(), before);
    let flush = request(Operation::Flush, 2, 0, 0, &[]);
    disk.submit(flush).expect("room");
    assert!(nvme.arm(), "there is a completion already");
}

#[test]
fn discard_and_write_zeroes_reach_exactly_their_blocks() {
    for operation in [Operation::Discard, Operation::WriteZeroes] {
        let rig = Rig::new(Setup::default(), vec![RamDisk::new(1, 12, 100)]);
        for block in 0..100 {
            rig.model.with_disk(0, |disk| disk.write(block, &[7; 4096]));
        }
        let (_domain, mut nvme) = rig.start();
        let disk = &mut nvme.namespaces()[0];
        assert_eq!(one(&rig, disk, request(operation, 2, 80, 160, &[])), Ok(()));
        for block in 0..100 {
            let zero = (10..30).contains(&block);
            let expected = if zero { 0 } else { 7 };
            assert_eq!(rig.model.with_disk(0, |disk| disk.read(block)), [expected; 4096]);
        }
        let beyond = request(operation, 2, 792, 16, &[]);
        assert_eq!(one(&rig, disk, beyond), Err(DiskError::OutOfRange));
        let setup = Setup { discard: false, write_zeroes: false, ..Setup::default() };
        let rig = Rig::new(setup, vec![RamDisk::new(1, 9, 1000)]);
        let (_domain, mut nvme) = rig.start();
        let disk = &mut nvme.namespaces()[0];
        let unknown = request(operation, 2, 0, 8, &[]);
        assert_eq!(one(&rig, disk, unknown), Err(DiskError::Unsupported));
    }
}

#[test]
fn requests_that_no_command_can_carry_are_refused() {
    let rig = Rig::new(Setup { mdts: 1, ..Setup::default() }, vec![RamDisk::new(1, 9, 1000)]);
    let (mut domain, mut nvme) = rig.start();
    let pages = pages(&mut domain, 4);
    let buffer = |n: usize, offset, len| Buffer { page: &pages[n], offset, len };
    let read = |sector, sectors, buffers: &[Buffer<'_>]| {
        let request = request(Operation::Read, 1, sector, sectors, buffers);
        one(&rig, &mut nvme.namespaces()[0], request)
    };
    let mut read = read;
    assert_eq!(read(0, 16, &[buffer(0, 0, 4096), buffer(1, 0, 4096)]), Ok(()));
    let doorbells = rig.model.doorbells();
    let refused = Err(DiskError::Unsupported);
    assert_eq!(read(0, 0, &[]), refused, "nothing");
    assert_eq!(read(0, 8, &[]), refused, "no buffers");
    assert_eq!(read(0, 8, &[buffer(0, 0, 512)]), refused, "too few");
    assert_eq!(read(0, 1, &[buffer(0, 0, 1024)]), refused, "too many");
    assert_eq!(read(0, 2, &[buffer(0, 0, 512), buffer(1, 0, 512)]), refused, "a gap");
    assert_eq!(read(0, 9, &[buffer(0, 0, 4096), buffer(1, 512, 512)]), refused, "a gap");
    assert_eq!(read(0, 2, &[buffer(0, 3584, 1024)]), refused, "over the page's end");
    assert_eq!(read(0, 1, &[buffer(0, 256, 512)]), refused, "half a sector");
    let three = [buffer(0, 0, 4096), buffer(1, 0, 4096), buffer(2, 0, 4096)];
    assert_eq!(read(0, 24, &three), refused, "more than MDTS");
    assert_eq!(read(1000, 1, &[buffer(0, 0, 512)]), Err(DiskError::OutOfRange));
    assert_eq!(read(u64::MAX, 1, &[buffer(0, 0, 512)]), Err(DiskError::OutOfRange));
    assert_eq!(read(u64::MAX, 2, &[buffer(0, 0, 1024)]), Err(DiskError::OutOfRange));
    assert_eq!(rig.model.doorbells(), doorbells, "the controller was not asked");
}

#[test]
fn a_read_only_namespace_is_not_written() {
    let mut fixed = RamDisk::new(1, 9, 1000);
    fixed.read_only = true;
    let rig = Rig::new(Setup::default(), vec![fixed]);
    let (mut domain, mut nvme) = rig.start();
    let pages = pages(&mut domain, 1);
    let lent = buffers(&pages, 0, 1);
    let disk = &mut nvme.namespaces()[0];
    for operation in [Operation::Write, Operation::Discard, Operation::WriteZeroes] {
        let write = request(operation, 1, 0, 1, &lent);
        assert_eq!(one(&rig, disk, write), Err(DiskError::ReadOnly));
    }
    assert_eq!(one(&rig, disk, request(Operation::Read, 1, 0, 1, &lent)), Ok(()));
}

#[test]
fn a_full_controller_is_busy_until_a_completion() {
    let rig = Rig::small();
    let (mut domain, mut nvme) = rig.start();
    let pages = pages(&mut domain, 1);
    let lent = buffers(&pages, 0, 1);
    let disk = &mut nvme.namespaces()[0];
    let depth = u32::from(disk.geometry().queue_depth);
    for tag in 0..depth {
        disk.submit(request(Operation::Read, tag, 0, 1, &lent)).expect("room");
    }
    let more = request(Operation::Read, depth, 0, 1, &lent);
    assert_eq!(disk.submit(more), Err(Busy));
    disk.kick();
    assert_eq!(rig.model.pending_count(), depth as usize);
    assert_eq!(disk.submit(more), Err(Busy));
    rig.model.run(100);
    let freed = disk.complete().expect("the one that was run");
    disk.submit(more).expect("room");
    disk.kick();
    rig.model.run_all();
    let mut tags: Vec<u32> = core::iter::from_fn(|| disk.complete()).map(|it| it.tag.0).collect();
    tags.push(freed.tag.0);
    tags.sort_unstable();
    assert_eq!(tags, (0..=depth).collect::<Vec<_>>());
}

#[test]
fn completions_are_kept_for_the_disk_that_they_belong_to() {
    let rig = Rig::new(Setup::default(), vec![RamDisk::new(1, 9, 1000), RamDisk::new(2, 9, 1000)]);
    let (mut domain, mut nvme) = rig.start();
    let pages = pages(&mut domain, 1);
    let lent = buffers(&pages, 0, 1);
    let [first, second] = nvme.namespaces() else { panic!("two namespaces") };
    first.submit(request(Operation::Read, 7, 0, 1, &lent)).expect("room");
    second.submit(request(Operation::Read, 7, 0, 1, &lent)).expect("room");
    second.submit(request(Operation::Read, 8, 0, 1, &lent)).expect("room");
    first.kick();
    rig.model.run_all();
    assert_eq!(first.complete(), done(7));
    assert_eq!(first.complete(), None);
    assert!(nvme.arm(), "the second disk's are here");
    let [first, second] = nvme.namespaces() else { panic!("two namespaces") };
    assert_eq!(second.complete(), done(7));
    assert_eq!(second.complete(), done(8));
    assert_eq!((second.complete(), first.complete()), (None, None));
    assert!(!nvme.arm());
}

/// A doorbell is an access over the bus.
#[test]
fn doorbells_are_rung_once_for_many() {
    let rig = Rig::small();
    let (mut domain, mut nvme) = rig.start();
    let pages = pages(&mut domain, 1);
    let lent = buffers(&pages, 0, 1);
    let [submissions, completions] = rig.model.doorbells();
    for tag in 0..32 {
        let read = request(Operation::Read, tag, 0, 1, &lent);
        nvme.namespaces()[0].submit(read).expect("room");
    }
    assert_eq!(rig.model.doorbells(), [submissions, completions]);
    nvme.namespaces()[0].kick();
    nvme.namespaces()[0].kick();
    assert_eq!(rig.model.doorbells(), [submissions + 1, completions]);
    rig.model.run_all();
    assert_eq!(core::iter::from_fn(|| nvme.namespaces()[0].complete()).count(), 32);
    assert_eq!(rig.model.doorbells(), [submissions + 1, completions]);
    assert!(!nvme.arm());
    assert!(!nvme.arm());
    assert_eq!(rig.model.doorbells(), [submissions + 1, completions + 1]);
}

#[derive(Clone, Debug)]
enum Step {
    Submit { disk: usize, kind: u8, block: u64, blocks: u64, offset: usize },
    Kick,
    Run(usize),
    Complete(usize),
    Arm,
    Check,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let submit = (0_usize..2, 0_u8..8, 0_u64..90, 1_u64..10, 0_usize..8).prop_map(
        |(disk, kind, block, blocks, offset)| Step::Submit { disk, kind, block, blocks, offset },
    );
    let step = prop_oneof![
        6 => submit,
        2 => Just(Step::Kick),
        6 => any::<usize>().prop_map(Step::Run),
        6 => (0_usize..2).prop_map(Step::Complete),
        1 => Just(Step::Arm),
        1 => Just(Step::Check),
    ];
    vec(step, 0..800)
}

/// A request under way and what it will have done.
struct Flight {
    pages: Vec<DmaPage>,
    offset: usize,
    sectors: usize,
    read: bool,
}

struct Load {
    rig: Rig,
    domain: Domain,
    nvme: Nvme<Model>,
    next: u32,
    flights: BTreeMap<(usize, u32), Flight>,
    spare: Vec<Vec<DmaPage>>,
}

impl Load {
    fn step(&mut self, step: &Step) {
        match *step {
            Step::Submit { disk, kind, block, blocks, offset } => {
                self.submit(disk, kind, block, blocks, offset);
            }
            Step::Kick => self.nvme.namespaces()[0].kick(),
            Step::Run(place) => {
                let count = self.rig.model.pending_count();
                if count != 0 {
                    self.rig.model.run(place % count);
                }
            }
            Step::Complete(disk) => self.complete(disk),
            Step::Arm => {
                self.nvme.arm();
            }
            Step::Check => assert_eq!(self.nvme.check(1), Ok(None)),
        }
    }

    fn submit(&mut self, disk: usize, kind: u8, block: u64, blocks: u64, offset: usize) {
        let place = &mut self.nvme.namespaces()[disk];
        let unit = u64::from(place.geometry().sector_size / 512);
        let (sector, sectors) = (block * unit, blocks * unit);
        let memory = match self.spare.pop() {
            Some(memory) => memory,
            None => pages(&mut self.domain, 11),
        };
        let count = usize::try_from(sectors).expect("small");
        let operation = match kind {
            0 => Operation::Flush,
            1 => Operation::Discard,
            2 => Operation::WriteZeroes,
            3..=4 => Operation::Read,
            _ => Operation::Write,
        };
        let data = matches!(operation, Operation::Read | Operation::Write);
        let lent = if data { buffers(&memory, offset * 512, count) } else { Vec::new() };
        fill(&lent, self.next);
        if place.submit(request(operation, self.next, sector, sectors, &lent)).is_ok() {
            let read = operation == Operation::Read;
            drop(lent);
            let flight = Flight { pages: memory, offset: offset * 512, sectors: count, read };
            assert!(self.flights.insert((disk, self.next), flight).is_none());
        }
        self.next += 1;
    }

    fn complete(&mut self, disk: usize) {
        let Some(completion) = self.nvme.namespaces()[disk].complete() else { return };
        assert_eq!(completion.result, Ok(()));
        let flight = self.flights.remove(&(disk, completion.tag.0)).expect("it was under way");
        if flight.read {
            let lent = buffers(&flight.pages, flight.offset, flight.sectors);
            assert_eq!(content(&lent).len(), flight.sectors * 512);
        }
        self.spare.push(flight.pages);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 32 }))]

    /// Whatever is submitted to two disks and in whatever order the controller is done, every
    /// request ends once, on its disk, and no slot is lost. The model checks every command.
    #[test]
    fn every_request_ends_once(entries in prop_oneof![3_u16..20, Just(1024)], steps in steps()) {
        let setup = Setup { queue_entries: entries, ..Setup::default() };
        let rig = Rig::new(setup, vec![RamDisk::new(1, 9, 100), RamDisk::new(4, 12, 100)]);
        let (domain, nvme) = rig.start();
        let (flights, spare) = (BTreeMap::new(), Vec::new());
        let mut load = Load { rig, domain, nvme, next: 0, flights, spare };
        steps.iter().for_each(|step| load.step(step));
        load.step(&Step::Kick);
        load.rig.model.run_all();
        while !load.flights.is_empty() {
            let left = load.flights.len();
            load.step(&Step::Complete(0));
            load.step(&Step::Complete(1));
            prop_assert!(load.flights.len() < left, "requests are lost");
        }
        prop_assert!(!load.nvme.arm());
        for queue in &load.nvme.controller.borrow().queues {
            prop_assert_eq!(queue.in_use(), 0);
        }
        prop_assert_eq!(load.nvme.statistics(), crate::Statistics::default());
    }

    /// An owner that works only when a message came, or when `arm` says so, sees every
    /// completion.
    #[test]
    fn no_wake_up_is_lost(bursts in vec((0_usize..5, 0_usize..5, 0_usize..5), 1..60)) {
        let rig = Rig::small();
        let (mut domain, mut nvme) = rig.start();
        let memory = pages(&mut domain, 1);
        let lent = buffers(&memory, 0, 1);
        let _ = rig.model.messages();
        let (mut under_way, mut tag) = (0_usize, 0);
        let run = |count: usize| (0..count.min(rig.model.pending_count())).for_each(|_| rig.model.run(0));
        for (asleep, working, arming) in bursts {
            for _ in 0..6 {
                let read = request(Operation::Read, tag, 0, 1, &lent);
                tag += 1;
                under_way += usize::from(nvme.namespaces()[0].submit(read).is_ok());
            }
            nvme.namespaces()[0].kick();
            run(asleep);
            let mut awake = !rig.model.messages().is_empty();
            let mut rounds = 0;
            while awake {
                if rounds == 0 {
                    run(working);
                }
                under_way -= core::iter::from_fn(|| nvme.namespaces()[0].complete()).count();
                awake = nvme.arm();
                if rounds == 0 && !awake {
                    run(arming);
                }
                awake |= !rig.model.messages().is_empty();
                rounds += 1;
                prop_assert!(rounds < 20, "interrupts without end");
            }
            prop_assert_eq!(under_way, rig.model.pending_count(), "asleep beside completions");
        }
    }
}
