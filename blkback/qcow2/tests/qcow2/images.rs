//! Images that others made, and images that lie.

use crate::disk::{Dice, Disks, GEOMETRY, Sparse};
use crate::host::{Action, Host, SMALL_SIZE, Shape, load, new_image};
use crate::model::Model;
use crate::qemu;
use domain_api::disk::{DiskError, Operation};
use qcow2::State;
use std::path::Path;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

fn shape(size: u64, cluster_bits: u32, extent: u64) -> Shape {
    Shape { size, cluster_bits, extent, backing: None, geometry: GEOMETRY, pages: 32 }
}

/// Serves an image that holds what `raw` has, which the model takes for granted.
fn serve(image: Sparse, backing: Sparse, shape: Shape) -> Host {
    let disks = Disks::new(image, Arc::new(backing), shape.geometry);
    let mut host = Host::with(disks, Model::new(shape.size / 512, 0), shape, 1);
    host.trusting = true;
    host.start_well();
    host
}

/// Overwrites sectors with others, through the image, in the copy of its content as well.
fn write_both(host: &mut Host, raw: &mut [u8], dice: &mut Dice, count: usize) {
    let size = raw.len() as u64 / 512;
    for _ in 0..count {
        let sectors = 1 + dice.below(40);
        let sector = dice.below(size - sectors);
        let operation = [Operation::Write, Operation::WriteZeroes][dice.below(4) as usize / 3];
        let id = host.peek_id();
        host.run(vec![Action { operation, sector, sectors }], 1);
        for sector in sector..sector + sectors {
            let bytes = match operation {
                Operation::Write => crate::model::content(id, sector),
                _ => [0; 512],
            };
            raw[sector as usize * 512..][..512].copy_from_slice(&bytes);
        }
    }
}

fn make(folder: &Path, arguments: &[&str]) {
    qemu::run(folder, "qemu-img", &[&["create", "-q", "-f", "qcow2"], arguments].concat());
}

fn write(folder: &Path, file: &str, commands: &[&str]) {
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    let arguments: Vec<&str> = ["-f", "qcow2"].into_iter().chain(commands).chain([file]).collect();
    qemu::run(folder, "qemu-io", &arguments);
}

fn raw_of(folder: &Path, file: &str) -> Vec<u8> {
    qemu::run(folder, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", file, "all.raw"]);
    std::fs::read(folder.join("all.raw")).unwrap()
}

/// Writes to an image that QEMU made, and has QEMU judge what became of it.
fn adopted(folder: &Path, file: &str, backing: Sparse, mut shape: Shape) {
    let mut raw = raw_of(folder, file);
    shape.size = raw.len() as u64;
    let mut host = serve(qemu::load(&folder.join(file), shape.extent), backing, shape);
    assert!(host.read_all() == raw, "{file} reads otherwise");
    let mut dice = Dice::new(7);
    write_both(&mut host, &mut raw, &mut dice, 40);
    assert_eq!(host.errors, []);
    assert!(host.read_all() == raw, "{file} reads otherwise after writes");
    assert!(host.disks.image.check().is_clean(), "{:?}", host.disks.image.check());
    host.disks.image.save(&folder.join(file));
    qemu::run(folder, "qemu-img", &["check", "-f", "qcow2", file]);
    std::fs::write(folder.join("model.raw"), &raw).unwrap();
    let compare = ["compare", "-f", "raw", "-F", "qcow2", "model.raw", file];
    qemu::run(folder, "qemu-img", &compare);
}

#[test]
fn images_that_qemu_made_are_served() {
    if !qemu::is_here() {
        return;
    }
    let folder = qemu::folder("made");
    for (bits, cluster) in [(12, "4k"), (16, "64k"), (21, "2M")] {
        make(&folder, &["-o", &format!("cluster_size={cluster}"), "a.qcow2", "6M"]);
        write(
            &folder,
            "a.qcow2",
            &["write -P 7 100k 300k", "write -z 64k 128k", "write -P 9 5M 20k", "discard 256k 64k"],
        );
        adopted(&folder, "a.qcow2", Sparse::new(0), shape(0, bits, 24 * MIB));
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn internal_snapshots_keep_what_they_have() {
    if !qemu::is_here() {
        return;
    }
    let folder = qemu::folder("snapshots");
    make(&folder, &["-o", "cluster_size=4k", "a.qcow2", "6M"]);
    write(&folder, "a.qcow2", &["write -P 7 0 3M", "write -z 1M 64k"]);
    qemu::run(&folder, "qemu-img", &["snapshot", "-c", "first", "a.qcow2"]);
    write(&folder, "a.qcow2", &["write -P 8 1M 1M"]);
    adopted(&folder, "a.qcow2", Sparse::new(0), shape(0, 12, 24 * MIB));
    qemu::run(&folder, "qemu-img", &["snapshot", "-a", "first", "a.qcow2"]);
    let raw = raw_of(&folder, "a.qcow2");
    let expected =
        |at: usize| if at >= 3 << 20 || (1 << 20..(1 << 20) + 65536).contains(&at) { 0 } else { 7 };
    assert!(raw.iter().enumerate().all(|(at, &byte)| byte == expected(at)));
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn an_image_behind_an_image_shines_through() {
    if !qemu::is_here() {
        return;
    }
    let folder = qemu::folder("chain");
    make(&folder, &["-o", "cluster_size=4k", "base.qcow2", "3M"]);
    write(&folder, "base.qcow2", &["write -P 5 10k 1M", "write -z 200k 64k"]);
    make(&folder, &["-b", "base.qcow2", "-F", "qcow2", "-o", "cluster_size=64k", "a.qcow2", "6M"]);
    write(&folder, "a.qcow2", &["write -P 7 100k 30k", "write -z 640k 64k"]);
    let backing = qemu::load(&folder.join("base.qcow2"), 8 * MIB);
    let shape = Shape { backing: Some(8 * MIB), ..shape(0, 16, 24 * MIB) };
    adopted(&folder, "a.qcow2", backing, shape);
    std::fs::remove_dir_all(folder).unwrap();
}

/// What must be refused, and why.
#[test]
fn what_is_not_understood_is_refused() {
    let shape = shape(SMALL_SIZE, 12, 8 * MIB);
    let put = |at: u64, bytes: &[u8]| {
        let mut image = new_image(&shape);
        image.write(at, bytes);
        let disks = Disks::new(image, Arc::new(Sparse::new(0)), shape.geometry);
        let mut host = Host::with(disks, Model::new(shape.size / 512, 0), shape, 1);
        host.start();
        match host.image.state() {
            State::Failed(message) => message.clone(),
            State::Ready(geometry) if geometry.read_only => "read-only".into(),
            state => format!("{state:?}"),
        }
    };
    for (at, bytes, message) in [
        (0, &[0_u8][..], "no qcow2 image there"),
        (7, &[2], "qcow2 version 2; version 3 is needed (compat=1.1)"),
        (35, &[1], "encrypted images are not supported"),
        (79, &[4], "images with an external data file are not supported"),
        (79, &[16], "images with subclusters are not supported"),
        (79, &[8], "only the default compression type is supported"),
        (79, &[32], "unknown incompatible features 0x20"),
        (79, &[1], "the image was not closed in good order: run `qemu-img check -r all` on it"),
        (79, &[2], "read-only"),
        (99, &[3], "refcounts of 8 bits: only 16 can be written (refcount_bits=16)"),
        (23, &[11], "clusters of 2^11 bytes; 4 KiB to 2 MiB are supported"),
        (40, &[1], "the image is damaged: the L1 table is not in it"),
        (48, &[1], "the image is damaged: the refcount table is not in it"),
        (39, &[1], "the L1 table is too short for the virtual size"),
        (16, &[0, 0, 0, 9], "Ready"),
    ] {
        let said = put(at, bytes);
        assert!(said.starts_with(message), "{at}: {said}");
    }
}

/// Whatever an image says, nobody panics, and nothing outside of it is touched (the disks of the
/// tests see to that).
#[test]
fn images_that_lie_do_no_harm() {
    lies(0..150);
}

/// The same for as long as one likes: `QCOW2_SEEDS=1000000 cargo test -p qcow2 -- --ignored lie`
#[test]
#[ignore = "takes minutes"]
fn many_images_that_lie_do_no_harm() {
    let most = std::env::var("QCOW2_SEEDS").ok().and_then(|text| text.parse().ok());
    lies(1000..most.unwrap_or(20_000));
}

fn lies(seeds: core::ops::Range<u64>) {
    let shape = shape(SMALL_SIZE, 12, 8 * MIB);
    let mut good = Host::new(shape, 3);
    good.start_well();
    let mut dice = Dice::new(3);
    let actions = load(&mut dice, &shape, 40, 60);
    good.run(actions, 4);
    let mut opened = 0;
    for seed in seeds {
        let mut dice = Dice::new(seed);
        let mut image = good.disks.image.clone();
        for _ in 0..1 + dice.below(4) {
            let at = match dice.below(4) {
                0 => dice.below(112),
                // Tables are at the start.
                _ => dice.below(64 * 4096),
            };
            let word = match dice.below(4) {
                0 => dice.next(),
                1 => (1 << 63) | (dice.below(2048) * 4096),
                2 => dice.below(1 << 24),
                _ => 0,
            };
            image.write(at & !7, &word.to_be_bytes());
        }
        let disks = Disks::new(image, Arc::new(Sparse::new(0)), shape.geometry);
        let mut host = Host::with(disks, Model::new(shape.size / 512, 0), shape, seed);
        host.trusting = true;
        host.start();
        let State::Ready(geometry) = host.image.state() else { continue };
        if geometry.sectors != shape.size / 512 {
            continue;
        }
        opened += 1;
        let actions = load(&mut dice, &shape, 30, 60);
        host.run(actions, 4);
        let is_known = |error: &DiskError| {
            matches!(
                error,
                DiskError::Medium
                    | DiskError::NoSpace
                    | DiskError::Unsupported
                    | DiskError::ReadOnly
            )
        };
        assert!(host.errors.iter().all(is_known), "{:?}", host.errors);
    }
    assert!(opened > 20, "only {opened} were opened");
}

/// A refcount table that becomes too short is replaced by a longer one.
#[test]
fn refcount_tables_grow() {
    // A table of one cluster of 4 KiB stands for 4 GiB. All of that is in use, as far as the
    // refcounts say, but for one cluster.
    let extent = (4096 + 16) * MIB;
    let shape = shape(SMALL_SIZE, 12, extent);
    let small = Shape { extent: 4096 * MIB, ..shape };
    let mut image = new_image(&small);
    image.len = extent;
    let blocks = 16 * MIB;
    for index in 1..512_u64 {
        let offset = blocks + index * 4096;
        image.write(4096 + 8 * index, &offset.to_be_bytes());
        image.write(offset, &[0, 1].repeat(2048));
    }
    let mut head = [0; 4096];
    image.read(2 * 4096, &mut head);
    let used = head.chunks_exact(2).take_while(|count| count[1] == 1).count();
    head[2 * (used + 3)..].copy_from_slice(&[0, 1].repeat(2048 - used - 3));
    image.write(2 * 4096, &head);
    let before = image.check();
    assert_eq!(before.errors, 0, "{before:?}");
    for at in (0..90).step_by(3).chain([1000]) {
        let disks = Disks::new(image.clone(), Arc::new(Sparse::new(0)), shape.geometry);
        let mut host = Host::with(disks, Model::new(shape.size / 512, 0), shape, at);
        host.start_well();
        let writes = [0, 5000, 9000, 100, 7000].map(|sector| Action {
            operation: Operation::Write,
            sector,
            sectors: 3,
        });
        let mut actions = writes.to_vec();
        while host.disks.steps < at && !(actions.is_empty() && host.in_flight() == 0) {
            host.step(&mut actions, 3);
        }
        host.driver_dies();
        host.start_well();
        host.replay();
        host.run(actions, 3);
        assert_eq!(host.errors, []);
        host.read_touched();
        let report = host.disks.image.check();
        assert_eq!((report.errors, report.leaks <= before.leaks), (0, true), "{at}: {report:?}");
    }
}

/// Requests that fail below fail above, nothing else happens.
#[test]
fn errors_of_the_medium_are_told() {
    let mut errors = 0;
    for (seed, operation) in
        (0..24).zip([Operation::Read, Operation::Write, Operation::Flush].into_iter().cycle())
    {
        let shape = Shape { backing: Some(MIB), ..shape(SMALL_SIZE, 12, 8 * MIB) };
        let mut host = Host::new(shape, seed);
        host.start_well();
        let mut dice = Dice::new(seed);
        host.disks.fail = Some((5 + dice.below(20), operation));
        let actions = load(&mut dice, &shape, 60, 60);
        host.run(actions, 6);
        errors += host.errors.len();
        host.disks.fail = None;
        host.driver_dies();
        host.start_well();
        let report = host.disks.image.check();
        assert!(report.is_clean(), "seed {seed}: {report:?}");
        host.read_touched();
    }
    assert!(errors > 10, "only {errors} errors");
}
