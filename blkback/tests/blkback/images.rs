//! Vbds on copy-on-write images.

use crate::disk::{SharedMedium, geometry, medium};
use crate::front::{Config, UNKNOWN, content};
use crate::rig::{Random, Rig};
use qcow2::format::{BackingFormat, Create, create};
use std::process::Command;
use xenbus::XenbusState;

const GUEST: u16 = 3;
/// Bytes of the volume that holds the image, from the disk's start.
const EXTENT: usize = 8 << 20;
/// Bytes of the virtual disk, and of the volume that shines through it, which comes next.
const SIZE: usize = 1 << 20;

/// A disk with an image on it, and a backing volume where each sector is of generation 1.
fn formatted() -> SharedMedium {
    let disk = medium(geometry(32768, 512));
    let wish = Create {
        size: SIZE as u64,
        cluster_bits: 12,
        extent: EXTENT as u64,
        backing: Some(("backing.raw", BackingFormat::Raw)),
    };
    let mut medium = disk.borrow_mut();
    for part in create(&wish).unwrap() {
        let at = usize::try_from(part.offset).unwrap();
        medium.bytes[at..at + part.bytes.len()].copy_from_slice(&part.bytes);
    }
    let backing = medium.bytes[EXTENT..EXTENT + SIZE].chunks_exact_mut(512);
    for (sector, bytes) in (0..).zip(backing) {
        bytes.copy_from_slice(&content(sector, 1));
    }
    drop(medium);
    disk
}

fn stage(config: Config) -> Rig {
    let mut rig = Rig::with_images(vec![formatted()], 1, 1);
    let index = rig.add_image(GUEST, "range:0+8M", "range:8M+1M", config);
    rig.run();
    assert!(rig.fronts[index].is_connected());
    assert_eq!(rig.fronts[index].sectors, SIZE as u64 / 512);
    rig.fronts[index].generations.fill(1);
    // An image frees whole clusters; what a discard leaves of others is its own matter.
    rig.fronts[index].vague_discards = true;
    rig
}

/// The image is in order, and holds what the guest believes, by the word of others.
fn judge(rig: &Rig) {
    let medium = rig.media[0].borrow();
    let directory = std::env::temp_dir().join(format!(
        "blkback-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    std::fs::create_dir_all(&directory).unwrap();
    let [image, backing, raw] = ["image", "backing.raw", "raw"].map(|it| directory.join(it));
    std::fs::write(&image, &medium.bytes[..EXTENT]).unwrap();
    std::fs::write(&backing, &medium.bytes[EXTENT..EXTENT + SIZE]).unwrap();
    let mut check = Command::new("qemu-img");
    let Ok(checked) = check.args(["check", "-f", "qcow2"]).arg(&image).output() else {
        eprintln!("qemu-img is not installed: the image is not judged");
        return;
    };
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    let mut convert = Command::new("qemu-img");
    let converted = convert.args(["convert", "-f", "qcow2", "-O", "raw"]).args([&image, &raw]);
    assert!(converted.status().unwrap().success());
    let bytes = std::fs::read(&raw).unwrap();
    for (sector, &generation) in (0..).zip(&rig.fronts[0].generations) {
        let at = usize::try_from(sector * 512).unwrap();
        let right = generation == UNKNOWN || bytes[at..at + 512] == content(sector, generation);
        assert!(right, "sector {sector} is not generation {generation}");
    }
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn a_guest_works_on_an_image() {
    for (segments, persistent) in [(11, false), (32, true)] {
        let mut rig = stage(Config { segments, persistent, ..Config::default() });
        rig.load(400);
        assert_eq!(rig.fronts[0].answered, 400);
        judge(&rig);
        // What shines through is never written.
        let backing = rig.media[0].borrow().bytes[EXTENT..EXTENT + SIZE].to_vec();
        assert!((0..).zip(backing.chunks(512)).all(|(at, bytes)| bytes == content(at, 1)));
        rig.close_all();
        judge(&rig);
    }
}

#[test]
fn an_image_survives_deaths_at_random_steps() {
    for seed in 1..=3_u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut rig = stage(Config { order: 1, ..Config::default() });
        let events = rig.fronts[0].store_events;
        for _ in 0..12 {
            rig.fronts[0].work += 10;
            rig.fronts[0].wake();
            rig.fuse.light(random.below(150));
            for _ in 0..2 + random.below(30) {
                rig.step();
            }
            while rig.back.is_none() {
                rig.tear_rings();
                rig.start_back();
            }
        }
        rig.fuse.put_out();
        rig.run();
        assert!(rig.kills > 4, "{} kills", rig.kills);
        assert_eq!((rig.fronts[0].work, rig.fronts[0].in_flight()), (0, 0));
        assert_eq!(rig.fronts[0].store_events, events);
        judge(&rig);
        rig.load(20);
        rig.close_all();
        judge(&rig);
    }
}

/// Something that is no image is told so in the vbd's error node.
#[test]
fn what_is_no_image_is_refused() {
    let mut rig = Rig::with_images(vec![medium(geometry(32768, 512))], 1, 1);
    rig.add_image(GUEST, "range:0+8M", "range:8M+1M", Config::default());
    rig.run();
    let error = rig.error_of(GUEST).unwrap();
    assert!(error.contains("volume `range:0+8M`"), "{error}");
    assert_eq!(rig.states(GUEST), (XenbusState::CLOSED, XenbusState::CLOSED));
}

/// The volume behind two images may be the same; an image's own may not.
#[test]
fn images_share_what_is_only_read() {
    let mut rig = Rig::with_images(vec![formatted()], 3, 2);
    let (bytes, at) = (rig.media[0].borrow().bytes[..1 << 20].to_vec(), EXTENT + SIZE);
    rig.media[0].borrow_mut().bytes[at..at + (1 << 20)].copy_from_slice(&bytes);
    rig.add_image(3, "range:0+8M", "range:8M+1M", Config::default());
    rig.add_image(4, "range:9M+5M", "range:8M+1M", Config::default());
    rig.add_image(5, "range:8M+1M", "range:14M+1M", Config::default());
    rig.run();
    assert!(rig.fronts[0].is_connected() && rig.fronts[1].is_connected());
    assert!(!rig.fronts[2].is_connected());
    assert!(rig.error_of(5).unwrap().contains("in use by vbd"));
}
