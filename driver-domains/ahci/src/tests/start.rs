//! Starting, and what is found.

use super::*;
use crate::identify::{Identity, Unusable};
use crate::model::{Adapter, ModelDisk};
use crate::notice::Event;
use crate::registers as reg;
use domain_api::Errno;
use proptest::collection::vec;
use proptest::prelude::*;

#[test]
fn a_start_finds_disks_at_the_numbers_of_their_ports() {
    let mut cd = ModelDisk::new(100, 512);
    cd.signature = 0xeb14_0101;
    let disks = [None, Some(ModelDisk::new(1000, 512)), Some(cd), Some(ModelDisk::new(50, 4096))];
    let model = Model::new(Adapter::default(), disks);
    let mut driver = started(&model);
    assert_eq!(started(&Model::with(ModelDisk::new(9, 512))).disks().len(), 1);
    let sectors: Vec<u64> = driver.disks().iter().map(|d| d.geometry().sectors).collect();
    assert_eq!(sectors, [0, 1000, 0, 400]);
    let large = *driver.disks()[3].geometry();
    assert_eq!((large.sector_size, large.physical_sector_size), (4096, 4096));
    assert!(large.volatile_cache && large.queue_depth == 32 && !large.read_only);
    assert!(large.max_discard_sectors == 64 * 0xffff * 8 && large.max_write_zeroes_sectors == 0);
    let identity = driver.disks()[1].disk().expect("a disk").identity();
    assert_eq!((identity.model.as_str(), identity.serial.as_str()), ("Model disk", "1SOMED L"));
    let ignored = driver.event();
    assert_eq!(ignored, Some((2, Event::Ignored(Unusable::Signature(0xeb14_0101)))));
    assert_eq!(model.violations(), Vec::<String>::new());
}

#[test]
fn a_disk_that_is_not_there_refuses_all() {
    let disks = [None, Some(ModelDisk::new(64, 512)), None, None];
    let mut bench = Bench::new(Model::new(Adapter::default(), disks));
    let tag = bench.transfer(Operation::Read, 0, 8, 0).expect("room for one");
    assert!(bench.transfer(Operation::Read, 0, 8, 0).is_none());
    assert_eq!(bench.complete(), Some(Completion { tag, result: Err(DiskError::Aborted) }));
    assert_eq!(bench.complete(), None);
}

/// A restart meets a port that writes into memory of the earlier life.
#[test]
fn a_restart_takes_less_than_a_millisecond_and_ends_what_ran() {
    let model = Model::with(ModelDisk::new(1000, 512));
    let mut bench = Bench::new(model.clone());
    for sector in 0..20 {
        bench.transfer(Operation::Write, sector * 8, 8, 0);
    }
    bench.kick();
    assert_eq!(model.pending(0).len(), 20);
    drop(bench);
    let begin = model.now_ns();
    let mut bench = Bench::new(model.clone());
    assert!(model.now_ns() - begin < 1_000_000, "took {} ns", model.now_ns() - begin);
    let tag = bench.transfer(Operation::Write, 0, 8, 1).expect("room");
    assert_eq!(bench.finish()[&tag.0], Ok(()));
    bench.assert_no_violations();
}

#[test]
fn after_power_on_a_late_link_is_waited_for() {
    let adapter = Adapter { staggered: true, ..Adapter::default() };
    let mut slow = ModelDisk::new(64, 512);
    (slow.link_ns, slow.ready_ns) = (4_000_000, 8_000_000_000);
    let model = Model::new(adapter, [None, Some(slow), None, None]);
    model.set_clock_step(100_000);
    let mut driver = started(&model);
    assert_eq!(driver.disks()[1].geometry().sectors, 64);
    assert_eq!(model.violations(), Vec::<String>::new());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a previous owner left in the registers, a start leads to a working disk.
    #[test]
    fn a_start_does_not_depend_on_what_was_there(
        forgets in any::<bool>(),
        firmware in any::<bool>(),
        left in vec((0_u32..0xc0, any::<u32>()), 0..100),
    ) {
        let adapter = Adapter { forgets, firmware, ..Adapter::default() };
        let model = Model::new(adapter, [Some(ModelDisk::new(64, 512)), None, None, None]);
        let kept = [reg::CAP, reg::PI, reg::CAP2];
        for (index, value) in left {
            if !kept.contains(&(index * 4)) {
                model.poke(index * 4, value);
            }
        }
        let mut bench = Bench::new(model);
        let tag = bench.transfer(Operation::Write, 8, 8, 0).expect("room");
        bench.kick();
        bench.model.run();
        prop_assert_eq!(bench.model.messages(), 1);
        bench.driver.interrupt();
        prop_assert_eq!(bench.complete(), Some(Completion { tag, result: Ok(()) }));
        prop_assert_eq!(bench.model.violations(), Vec::<String>::new());
    }
}

#[test]
fn an_adapter_that_does_not_start_is_an_error_and_not_a_hang() {
    let cases: [(Adapter, StartError); 3] = [
        (Adapter { stuck_reset: true, ..Adapter::default() }, StartError::ResetStuck),
        (Adapter { stuck_engine: true, ..Adapter::default() }, StartError::PortStuck(0)),
        (Adapter { gone: true, ..Adapter::default() }, StartError::Gone),
    ];
    for (adapter, expected) in cases {
        let model = Model::new(adapter, [Some(ModelDisk::new(64, 512)), None, None, None]);
        model.set_clock_step(1_000_000);
        assert_eq!(start(&model).expect_err("broken"), expected);
    }
    let model = Model::with(ModelDisk::new(64, 512));
    model.set_memory(10);
    assert_eq!(start(&model).expect_err("no memory"), StartError::Memory(Errno::ENOMEM));
    let error = Ahci::start(model.clone(), BYTES, &mut model.clone(), &model, || Err(Errno::EPERM));
    assert_eq!(error.expect_err("refused"), StartError::BusMaster(Errno::EPERM));
}

#[test]
fn an_adapter_of_32_bits_is_kept_from_memory_above() {
    let model = Model::with(ModelDisk::new(64, 512));
    model.poke(reg::CAP, 0);
    assert_eq!(start(&model).expect_err("memory is above"), StartError::Narrow);

    let adapter = Adapter { wide: false, ..Adapter::default() };
    let model = Model::new(adapter, [Some(ModelDisk::new(64, 512)), None, None, None]);
    let mut bench = Bench::new(model);
    let high = DmaPage { bus_address: 1 << 32, ..page(&bench.model) };
    let buffers = [Buffer { page: &high, offset: 0, len: 512 }];
    let request = Request {
        tag: Tag(9),
        operation: Operation::Write,
        sector: 0,
        sectors: 1,
        buffers: &buffers,
    };
    assert!(bench.driver.disks()[0].submit(request).is_ok());
    assert_eq!(bench.finish()[&9], Err(DiskError::Unsupported));
    bench.assert_no_violations();
}

#[test]
fn a_disk_that_does_not_answer_leaves_its_port_empty_and_silent() {
    for change in [
        |disk: &mut ModelDisk| disk.faults.never_ready = true,
        |disk: &mut ModelDisk| disk.faults.anonymous = true,
    ] {
        let mut disk = ModelDisk::new(64, 512);
        change(&mut disk);
        let disks = [Some(disk), Some(ModelDisk::new(80, 512)), None, None];
        let model = Model::new(Adapter::default(), disks);
        model.set_clock_step(1_000_000);
        let mut driver = started(&model);
        assert_eq!(driver.disks()[0].geometry().sectors, 0);
        assert_eq!(driver.disks()[1].geometry().sectors, 80);
        assert!(matches!(driver.event(), Some((0, Event::Ignored(_)))));
        assert_eq!(Registers::read(&model, reg::PORTS + reg::CMD) & (reg::CMD_FR | reg::CMD_CR), 0);
        assert_eq!(model.violations(), Vec::<String>::new());
    }
}

#[test]
fn only_disks_that_can_be_served_are() {
    let parse = |disk: ModelDisk| Identity::parse(&disk.identify);
    let disk = || ModelDisk::new(64, 512);
    assert_eq!(parse(disk().word(49, 0)), Err(Unusable::Old));
    assert_eq!(parse(disk().word(83, 1 << 14)), Err(Unusable::Old));
    assert_eq!(parse(disk().word(83, 1 << 15 | 1 << 10)), Err(Unusable::Old), "not valid");
    assert_eq!(parse(disk().word(128, 0b101)), Err(Unusable::Locked));
    assert_eq!(parse(disk().word(0, 1 << 15)), Err(Unusable::NotIdentified));
    assert_eq!(parse(disk().word(103, 2)), Err(Unusable::Size));
    assert_eq!(parse(ModelDisk::new(0, 512)), Err(Unusable::Size));
    assert_eq!(parse(ModelDisk::new(64, 520)), Err(Unusable::SectorSize(520)));
    let emulating = disk().word(106, 1 << 14 | 1 << 13 | 3);
    assert_eq!(parse(emulating).map(|i| i.physical_bytes), Ok(4096));
    let cacheless = parse(disk().word(85, 0).word(83, 1 << 14 | 1 << 10)).expect("a disk");
    assert!(!cacheless.cache && cacheless.flush.is_none());
    let short = parse(disk().word(83, 1 << 14 | 1 << 12 | 1 << 10)).expect("a disk");
    assert_eq!(short.flush, Some(crate::command::ata::FLUSH_CACHE));
}
