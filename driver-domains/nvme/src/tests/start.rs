//! From any state to a running controller.

use super::*;
use crate::model::{Faults, Status};
use crate::{Unusable, registers as reg};
use domain_api::{Clock, Errno, Registers};

#[test]
fn a_start_finds_the_controller_and_its_namespaces() {
    let mut large = RamDisk::new(7, 12, 100);
    large.preferred = Some(3);
    let mut fixed = RamDisk::new(9, 9, 50);
    fixed.read_only = true;
    let rig = Rig::new(Setup::default(), vec![fixed, RamDisk::new(1, 9, 1000), large]);
    let (_domain, mut nvme) = rig.start();
    assert_eq!(nvme.info().model, "Model controller");
    assert_eq!(nvme.info().serial, "AX-1");
    assert_eq!(nvme.queues(), 4);
    let [one, seven, nine] = nvme.namespaces() else { panic!("three namespaces") };
    assert_eq!((one.id(), seven.id(), nine.id()), (1, 7, 9));
    let geometry = *one.geometry();
    assert_eq!((geometry.sectors, geometry.sector_size), (1000, 512));
    assert_eq!(geometry.physical_sector_size, 512);
    assert!(geometry.volatile_cache && geometry.whole_pages && !geometry.read_only);
    assert_eq!((geometry.max_sectors, geometry.max_buffers), (512, 65));
    assert_eq!(geometry.max_write_zeroes_sectors, 65536);
    assert_eq!(geometry.queue_depth, 4 * 63);
    let geometry = *seven.geometry();
    assert_eq!((geometry.sectors, geometry.sector_size), (800, 4096));
    assert_eq!(geometry.physical_sector_size, 16384);
    assert_eq!(geometry.max_write_zeroes_sectors, 8 * 65536);
    let geometry = *nine.geometry();
    assert!(geometry.read_only);
    assert_eq!((geometry.max_discard_sectors, geometry.max_write_zeroes_sectors), (0, 0));
}

#[test]
fn the_controllers_limits_become_the_geometrys() {
    let setup = Setup { mdts: 2, discard: false, write_zeroes: false, ..Setup::default() };
    let setup = Setup { volatile_cache: false, ..setup };
    let rig = Rig::new(setup, vec![RamDisk::new(1, 9, 1000)]);
    let (_domain, mut nvme) = rig.start();
    let geometry = *nvme.namespaces()[0].geometry();
    assert_eq!((geometry.max_sectors, geometry.max_buffers), (32, 5));
    assert_eq!((geometry.max_discard_sectors, geometry.max_write_zeroes_sectors), (0, 0));
    assert!(!geometry.volatile_cache);
    for mdts in [0, 31] {
        let rig = Rig::new(Setup { mdts, ..Setup::default() }, vec![RamDisk::new(1, 9, 1000)]);
        assert_eq!(rig.start().1.namespaces()[0].geometry().max_sectors, 512);
    }
}

/// Version 1.0 has no list of active namespaces.
#[test]
fn an_old_controller_is_asked_for_each_namespace() {
    let setup = Setup { version: 0x0001_0000, ..Setup::default() };
    let rig = Rig::new(setup, vec![RamDisk::new(1, 9, 10), RamDisk::new(3, 9, 30)]);
    let (_domain, mut nvme) = rig.start();
    let sizes: Vec<u64> = nvme.namespaces().iter().map(|it| it.geometry().sectors).collect();
    assert_eq!(sizes, [10, 0, 30]);
    assert!(matches!(nvme.namespaces()[1].unusable(), Some(Unusable::Refused(_))));
}

#[test]
fn a_small_controller_serves_too() {
    let setup = Setup { queue_entries: 2, queue_pairs: 1, doorbell_stride: 3, ..Setup::default() };
    let rig = Rig::new(setup, vec![RamDisk::new(1, 9, 1000)]);
    let (mut domain, mut nvme) = rig.start();
    let pages = pages(&mut domain, 1);
    let disk = &mut nvme.namespaces()[0];
    assert_eq!(disk.geometry().queue_depth, 1);
    for n in 0..5 {
        let buffers = buffers(&pages, 0, 8);
        let request = request(Operation::Read, n, 8, 8, &buffers);
        assert_eq!(one(&rig, disk, request), Ok(()));
    }
}

#[test]
fn queues_share_vectors_where_there_are_few() {
    for vectors in 1..=VECTORS {
        let rig = Rig::new(Setup { vectors, ..Setup::default() }, vec![RamDisk::new(1, 9, 1000)]);
        let mut domain = rig.world.domain(DRIVER);
        let master = || {
            rig.model.set_bus_master(true);
            Ok(())
        };
        let started = Nvme::start(rig.model.clone(), &mut domain, &rig.model, vectors, master);
        let mut nvme = started.expect("start");
        let _ = rig.model.messages();
        let pages = pages(&mut domain, 1);
        let buffers = buffers(&pages, 0, 1);
        let request = request(Operation::Read, 0, 0, 1, &buffers);
        assert_eq!(one(&rig, &mut nvme.namespaces()[0], request), Ok(()));
        assert_eq!(rig.model.messages(), [u16::from(vectors > 1)]);
    }
    let rig = Rig::small();
    let mut domain = rig.world.domain(DRIVER);
    let error = Nvme::start(rig.model.clone(), &mut domain, &rig.model, 0, || Ok(()));
    assert_eq!(error.err(), Some(StartError::NoVector));
}

#[test]
fn formats_that_are_not_supported_are_refused_with_the_reason() {
    let rig = |change: fn(&mut RamDisk)| {
        let mut disk = RamDisk::new(1, 9, 1000);
        change(&mut disk);
        Rig::new(Setup::default(), vec![disk])
    };
    let cases = [
        (rig(|disk| disk.block_shift = 11), Unusable::BlockSize(11), "2^11 bytes"),
        (rig(|disk| disk.metadata = 8), Unusable::Metadata(8), "8 bytes of metadata"),
        (rig(|disk| disk.protection = 1), Unusable::Protection, "protection"),
        (rig(|disk| disk.blocks = 0), Unusable::Empty, "empty"),
    ];
    for (rig, reason, text) in cases {
        let error = rig.start_in(&mut rig.world.domain(DRIVER)).expect_err("no disk");
        assert_eq!(error, StartError::NoNamespace(Some(reason)));
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(rig.model.read(reg::CC) & reg::CC_EN, 0, "it was stopped");
    }
    let rig = Rig::new(Setup::default(), vec![]);
    let error = rig.start_in(&mut rig.world.domain(DRIVER)).expect_err("no disk");
    assert_eq!(error, StartError::NoNamespace(None));
}

#[test]
fn an_unusable_namespace_keeps_its_place() {
    let mut odd = RamDisk::new(1, 9, 1000);
    odd.metadata = 8;
    let rig = Rig::new(Setup::default(), vec![odd, RamDisk::new(2, 9, 1000)]);
    let (mut domain, mut nvme) = rig.start();
    let pages = pages(&mut domain, 1);
    let buffers = buffers(&pages, 0, 1);
    let read = request(Operation::Read, 1, 0, 1, &buffers);
    let [odd, good] = nvme.namespaces() else { panic!("two namespaces") };
    assert_eq!(odd.geometry().sectors, 0);
    assert_eq!(one(&rig, odd, read), Err(domain_api::disk::DiskError::Unsupported));
    assert_eq!(one(&rig, good, read), Ok(()));
}

#[test]
fn a_controller_that_does_not_start_is_an_error_and_not_a_hang() {
    let refuse =
        |opcode| Faults { refuse: Some((opcode, Status::INVALID_FIELD)), ..Faults::default() };
    let cases: [(Faults, StartError); 7] = [
        (Faults { gone: true, ..Faults::default() }, StartError::Gone),
        (Faults { never_ready: true, ..Faults::default() }, StartError::NotReady),
        (Faults { fatal_at_enable: true, ..Faults::default() }, StartError::Fatal),
        (Faults { silent_admin: true, ..Faults::default() }, StartError::Timeout),
        (refuse(0x09), StartError::Refused(0x09, Status::INVALID_FIELD)),
        (refuse(0x05), StartError::Refused(0x05, Status::INVALID_FIELD)),
        (refuse(0x01), StartError::Refused(0x01, Status::INVALID_FIELD)),
    ];
    for (faults, expected) in cases {
        let rig = Rig::new(
            Setup { ready_ns: 100_000, tick_ns: 100_000, ..Setup::default() },
            vec![RamDisk::new(1, 9, 1000)],
        );
        rig.model.set_faults(faults);
        let error = rig.start_in(&mut rig.world.domain(DRIVER)).expect_err("broken");
        assert_eq!(error, expected);
        if !faults.gone {
            assert_eq!(rig.model.read(reg::CC) & reg::CC_EN, 0, "it was stopped");
        }
    }
}

#[test]
fn a_controller_that_dies_while_it_is_asked_is_fatal_at_once() {
    let rig = Rig::small();
    rig.model.set_faults(Faults { silent_admin: true, ..Faults::default() });
    let mut domain = rig.world.domain(DRIVER);
    let begin = rig.model.now_ns();
    // Bus mastering stays off, so the first doorbell is fatal.
    let started = Nvme::start(rig.model.clone(), &mut domain, &rig.model, 1, || Ok(()));
    assert_eq!(started.err(), Some(StartError::Fatal));
    assert!(rig.model.now_ns() - begin < 100_000_000);
}

#[test]
fn what_a_driver_cannot_do_without_is_an_error() {
    let rig = Rig::small();
    let mut domain = rig.world.domain(DRIVER);
    let master = || Err(Errno::EPERM);
    let started = Nvme::start(rig.model.clone(), &mut domain, &rig.model, 1, master);
    assert_eq!(started.err(), Some(StartError::BusMaster(Errno::EPERM)));
    rig.kill();
    let started = Nvme::start(rig.model.clone(), &mut domain, &rig.model, 1, || Ok(()));
    assert_eq!(started.err(), Some(StartError::Memory(Errno::ESRCH)));
    let rig =
        Rig::new(Setup { page_shift_min: 1, ..Setup::default() }, vec![RamDisk::new(1, 9, 1)]);
    let error = rig.start_in(&mut rig.world.domain(DRIVER)).expect_err("large pages");
    assert_eq!(error, StartError::PageSize(1));
}

/// A dead driver leaves commands in every state; its successor gets a clean controller, fast.
#[test]
fn a_restart_leaves_nothing_of_the_old_life() {
    for sticky_fatal in [false, true] {
        for fatal in [false, true] {
            let setup = Setup { sticky_fatal, late_dma: true, ..Setup::default() };
            let rig = Rig::new(setup, vec![RamDisk::new(1, 9, 1000)]);
            let (mut domain, mut nvme) = rig.start();
            let memory = pages(&mut domain, 1);
            let lent = buffers(&memory, 0, 8);
            let disk = &mut nvme.namespaces()[0];
            for tag in 0..10 {
                disk.submit(request(Operation::Read, tag, 0, 8, &lent)).expect("room");
            }
            disk.kick();
            rig.model.run(3);
            rig.kill();
            if fatal {
                rig.model.run(0);
                assert_ne!(rig.model.read(reg::CSTS) & reg::CSTS_CFS, 0, "as in QEMU");
            }
            drop(nvme);
            let begin = rig.model.now_ns();
            let (mut domain, mut nvme) = rig.start();
            assert!(rig.model.now_ns() - begin < 1_000_000);
            let memory = pages(&mut domain, 1);
            let lent = buffers(&memory, 0, 8);
            let disk = &mut nvme.namespaces()[0];
            assert!(disk.complete().is_none(), "nothing of the old life");
            let read = request(Operation::Read, 5, 0, 8, &lent);
            assert_eq!(one(&rig, disk, read), Ok(()));
            assert_eq!(nvme.check(1), Ok(None));
        }
    }
}

/// Section 3.1.5: a controller that is just being enabled may not be disabled before it is ready.
#[test]
fn a_driver_that_died_while_it_enabled_the_controller_is_followed() {
    let rig =
        Rig::new(Setup { ready_ns: 50_000_000, ..Setup::default() }, vec![RamDisk::new(1, 9, 1)]);
    let mut registers = rig.model.clone();
    rig.model.advance(100_000_000);
    reg::write64(&mut registers, reg::ASQ, 0x1000);
    reg::write64(&mut registers, reg::ACQ, 0x2000);
    registers.write(reg::AQA, 1 << 16 | 1);
    registers.write(reg::CC, reg::CC_EN | reg::CC_IOSQES | reg::CC_IOCQES);
    rig.model.advance(1_000_000);
    let (_domain, mut nvme) = rig.start();
    assert_eq!(nvme.namespaces().len(), 1);
}

#[test]
fn a_controller_that_never_stops_is_not_used() {
    let setup = Setup { tick_ns: 10_000, ..Setup::default() };
    let rig = Rig::new(setup, vec![RamDisk::new(1, 9, 1000)]);
    let _ = rig.start();
    rig.kill();
    rig.model.set_faults(Faults { never_stops: true, ..Faults::default() });
    let error = rig.start_in(&mut rig.world.domain(DRIVER)).expect_err("stuck");
    assert_eq!(error, StartError::ResetStuck);
}
