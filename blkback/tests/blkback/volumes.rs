//! Which part of a disk a vbd gets, and who is refused.

use crate::disk::{geometry, medium};
use crate::front::Config;
use crate::rig::Rig;
use xenbus::{Nodes, XenbusState};

/// Adds a guest and says what became of it: `None` when it is connected.
fn attempt(rig: &mut Rig, number: u16, volume: &str, mode: &str) -> Option<String> {
    let index = rig.add_unconnected(number, volume, mode, Config::default());
    rig.run();
    let error = rig.error_of(number);
    assert_eq!(rig.fronts[index].is_connected(), error.is_none());
    if error.is_some() {
        assert_eq!(rig.states(number), (XenbusState::CLOSED, XenbusState::CLOSED));
        assert_eq!(rig.vbd(number).fault, error);
    }
    error
}

#[test]
fn a_volume_that_is_none_is_refused_with_its_name() {
    for (volume, sector_size, message) in [
        ("2/whole", 512, "volume `2/whole`: there is no such disk"),
        ("range:4M+1M", 512, "volume `range:4194304+1048576`: it ends behind the disk's 8192"),
        ("range:512+4K", 4096, "whole sectors of 4096 bytes"),
        ("everything", 512, "volume `everything`: write whole, gpt:NAME"),
        ("", 512, "volume ``"),
        ("gpt:root", 512, "volume `gpt:root`: the disk has no partition table"),
    ] {
        let mut rig = Rig::new(vec![medium(geometry(8192, sector_size))], 1);
        let error = attempt(&mut rig, 3, volume, "w").unwrap();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn ranges_are_shared_for_reading_only() {
    let mut rig = Rig::new(vec![medium(geometry(8192, 512)), medium(geometry(8192, 512))], 8);
    assert_eq!(attempt(&mut rig, 3, "range:1M+1M", "w"), None);
    let error = attempt(&mut rig, 4, "range:1536K+1M", "w").unwrap();
    assert_eq!(error, "volume `range:1536K+1M` is in use by vbd3.51712, and not read-only");
    assert!(attempt(&mut rig, 5, "whole", "r").is_some());
    assert_eq!(attempt(&mut rig, 6, "range:2M+1M", "r"), None);
    assert_eq!(attempt(&mut rig, 7, "range:2560K+1M", "r"), None);
    assert!(attempt(&mut rig, 8, "range:3M+512K", "w").is_some());
    // Another disk is another matter.
    assert_eq!(attempt(&mut rig, 9, "2/whole", "w"), None);
    // When the first one closes, there is room.
    rig.fronts[0].begin_closing();
    rig.run();
    assert_eq!(attempt(&mut rig, 10, "range:1M+1M", "w"), None);
}

/// Whoever was connected when the backend died comes before all others, whatever the order in
/// the store and however long it takes to find its volume.
#[test]
fn who_was_connected_keeps_its_volume() {
    let mut rig = Rig::new(vec![partitioned()], 4);
    assert_eq!(attempt(&mut rig, 9, "gpt:data", "w"), None);
    rig.kill_back();
    // It has a smaller number, and its volume needs no reading.
    let newcomer = rig.add_unconnected(3, "whole", "w", Config::default());
    rig.start_back();
    rig.run();
    assert!(rig.fronts[0].is_connected() && !rig.fronts[newcomer].is_connected());
    assert!(rig.error_of(3).unwrap().contains("in use by vbd9"));
    rig.fronts[0].work = 50;
    rig.fronts[0].wake();
    rig.run();
    rig.compare(0, 0, 2048);
}

/// A disk whose partition `data` begins at sector 2048 and has 1024.
fn partitioned() -> crate::disk::SharedMedium {
    let disk = medium(geometry(8192, 512));
    let mut entries = vec![0; 128 * 128];
    entries[..16].fill(0xaf);
    entries[16..32].fill(0x11);
    entries[32..40].copy_from_slice(&2048_u64.to_le_bytes());
    entries[40..48].copy_from_slice(&3071_u64.to_le_bytes());
    for (at, byte) in "data".bytes().enumerate() {
        entries[56 + 2 * at] = byte;
    }
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
    header[24] = 1;
    header[72] = 2;
    (header[80], header[84]) = (128, 128);
    header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
    let crc = crc32(&header[..92]);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    disk.borrow_mut().bytes[512..1024].copy_from_slice(&header);
    disk.borrow_mut().bytes[1024..1024 + entries.len()].copy_from_slice(&entries);
    disk
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
        })
    })
}

#[test]
fn partitions_are_found() {
    for volume in ["gpt:data", "guid:11111111-1111-1111-1111-111111111111"] {
        let mut rig = Rig::new(vec![partitioned()], 1);
        rig.add_guest(3, volume, "w", Config::default());
        assert_eq!(rig.fronts[0].sectors, 1024);
        rig.load(100);
        rig.compare(0, 0, 2048);
        rig.close_all();
    }
}

/// Without a page to spare nothing hangs: what needs one is refused.
#[test]
fn a_domain_without_pages_to_spare_says_so() {
    let mut rig = Rig::new(vec![partitioned(), medium(geometry(8192, 4096))], 1);
    rig.kill_back();
    rig.preserved.truncate(1 + 1);
    rig.start_back();
    assert_eq!(attempt(&mut rig, 3, "2/whole", "w"), None);
    let error = attempt(&mut rig, 4, "gpt:data", "w").unwrap();
    assert!(error.contains("no pages to read a partition table"), "{error}");
    let error = attempt(&mut rig, 5, "range:0+4K", "w").unwrap();
    assert!(error.contains("no preserved pages left"), "{error}");
}

/// Death while partition tables are read.
#[test]
fn death_at_every_step_of_a_search() {
    let mut step = 0;
    loop {
        let mut rig = Rig::new(vec![partitioned()], 1);
        rig.add_unconnected(3, "gpt:data", "w", Config::default());
        rig.fuse.light(step);
        rig.run();
        let died = rig.back.is_none();
        if died {
            rig.start_back();
        }
        rig.fuse.put_out();
        rig.run();
        rig.load(10);
        rig.compare(0, 0, 2048);
        rig.close_all();
        if !died {
            break;
        }
        step += 1;
    }
    assert!(step > 20, "only {step} steps");
}

/// The toolstack takes a vbd away, also without asking, and all that it had is free again.
#[test]
fn a_vbd_that_is_taken_away_leaves_nothing() {
    for stuck in [false, true] {
        let mut rig = Rig::new(vec![medium(geometry(8192, 512))], 1);
        rig.add_guest(3, "whole", "w", Config { persistent: true, ..Config::default() });
        rig.load(20);
        rig.media[0].borrow_mut().stuck = stuck;
        rig.fronts[0].work = 5;
        rig.fronts[0].wake();
        rig.run();
        rig.toolstack.rm("/local/domain/2/backend/vbd/3").unwrap();
        rig.run();
        assert_eq!(rig.back().blkback.vbds().count(), 0);
        assert_eq!(rig.back().env.domain.mappings() > 0, stuck);
        rig.media[0].borrow_mut().stuck = false;
        rig.back().wake();
        rig.run();
        assert_eq!((rig.back().env.domain.mappings(), rig.back().env.domain.open_ports()), (0, 0));
        assert_eq!(rig.back().blkback.in_use(), (0, 0));
    }
}

/// `online` says whether the directory stays when the frontend has closed.
#[test]
fn a_directory_goes_when_its_device_is_offline() {
    let mut rig = Rig::new(vec![medium(geometry(8192, 512))], 1);
    rig.add_guest(3, "whole", "w", Config::default());
    let directory = "/local/domain/2/backend/vbd/3/51712";
    rig.toolstack.write(&format!("{directory}/online"), b"0").unwrap();
    rig.fronts[0].begin_closing();
    rig.run();
    assert_eq!(rig.toolstack.read_optional(&format!("{directory}/state")), Ok(None));
    assert_eq!(rig.back().blkback.vbds().count(), 0);
}
