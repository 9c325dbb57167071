//! Disks: a guest verifies every sector of its disks under load, and the domain of their
//! controller is killed again and again meanwhile. `cargo xtask test` gives a short dose; `cargo
//! xtask disk-soak` the full one.

use disktest::image;
use qemu_tests::{Listed, Platform, Random, Running, dose, others};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use xtask::{doses, http, image_files, setup};

const MINUTE: Duration = Duration::from_secs(60);
/// Longest time between two kills. The shortest is none at all.
const PAUSE_MS: u64 = 200;

/// Time between two kills of different drivers.
const TURN: Duration = Duration::from_millis(50);

/// What a disk of the guest is, for whoever judges it from outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// All of a raw file.
    Raw,
    /// A qcow2 image in the first partition of a raw file.
    Cow,
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn no_write_is_lost_on_nvme() {
    survives("disktest-nvme", &[("xvda", Kind::Raw), ("xvdb", Kind::Cow)]);
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn no_write_is_lost_on_ahci() {
    survives("disktest-ahci", &[("xvda", Kind::Raw)]);
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn no_write_is_lost_on_virtio_blk() {
    survives("disktest-virtio", &[("xvda", Kind::Raw)]);
}

/// The design's promise: no request lost, answered wrongly or with an error, whenever the driver
/// domain dies; nobody else notices, and nothing is leaked.
fn survives(system: &str, disks: &[(&str, Kind)]) {
    let kills = dose(doses::KILLS, 10);
    let mut random = Random::new();
    let platform = Platform::boot(system);
    for (disk, _) in disks {
        said(&platform, &format!("{disk}: Running at request"));
    }
    // The first crash may leave what stays for life, such as a death record.
    platform.kill("disk0");
    let (free, before) = (platform.free_bytes(), platform.domains());
    let start = Instant::now();
    for _ in 0..kills {
        std::thread::sleep(Duration::from_millis(random.below(PAUSE_MS)));
        platform.kill("disk0");
        refuse_violations(&platform);
    }
    let took = start.elapsed();

    let output = platform.axl(&["shutdown", "disktest"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let verdicts: Vec<String> = disks
        .iter()
        .map(|(disk, _)| said(&platform, &format!("DONE disktest: {disk}: ")))
        .collect();
    assert_eq!(platform.incarnation("disk0"), 2 + kills);
    assert_eq!(others(&before, "disk0"), others(&platform.domains(), "disk0"));
    let files = platform.into_disks();
    println!("{kills} kills in {} s; {free} bytes free; {verdicts:?}", took.as_secs());
    for ((disk, kind), file) in disks.iter().zip(files) {
        let report = judge(*kind, &file);
        assert_eq!(report.mismatches, [], "{disk}");
        assert_eq!(report.record.ended, 1, "{disk}: {report:?}");
        println!("{disk}: {} sectors verified from outside", report.verified);
    }
}

/// Whatever `SHA256SUMS` on the disk lists arrives with that sum.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn files_on_the_disk_have_their_checksums() {
    let platform = Platform::boot("default");
    let server = platform.web(0);
    let file = |name: &str| {
        let answer = http::get(server, &format!("/disk/{name}"), 5 * MINUTE).expect("an answer");
        assert_eq!(answer.status, 200, "{name}");
        answer.body().expect("a whole file")
    };
    let list = platform.wait_for("the disk", MINUTE, || {
        let path = format!("/disk/{}", image_files::CHECKSUMS);
        let answer = http::get(server, &path, MINUTE).ok().filter(|answer| answer.status == 200)?;
        String::from_utf8(answer.body().ok()?).ok()
    });
    let mut sums = 0;
    for (sum, name) in list.lines().filter_map(|line| line.split_once("  ")) {
        assert_eq!(image_files::sha256(&file(name)), sum, "{name}");
        sums += 1;
    }
    assert!(sums >= 3, "{list}");
    assert!(list.contains(image_files::PATTERN_SHA256), "{list}");
    let disks = platform.axl_json(&["vbd-list", "demo"]);
    assert_eq!((&disks[0]["state"], &disks[0]["mode"]), (&4.into(), &"r".into()), "{disks}");
}

/// The card's driver and the disk's driver die by turns; the file that comes through both is
/// right, byte for byte.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn files_are_right_while_both_drivers_are_killed_by_turns() {
    let kills = dose(doses::KILLS, 20);
    let platform = Platform::boot("default");
    let server = platform.web(0);
    let path = format!("/disk/{}", image_files::PATTERN);
    let count = image_files::PATTERN_BYTES as u64;
    let start = || {
        let download = Running::start_from(server, &path, count, 30 * MINUTE);
        // Not before it runs: QEMU's NAT forgets a request that the guest did not acknowledge.
        platform
            .wait_for("the start of a download", MINUTE, || (download.bytes() > 0).then_some(()));
        download
    };
    assert_eq!(start().finish(10 * MINUTE).bytes, count);
    // The first crash may leave what stays for life, such as a death record.
    platform.kill("net0");
    platform.kill("disk0");
    let mut download = start();
    let (free, before) = (platform.free_bytes(), platform.domains());
    let (begin, mut bytes) = (Instant::now(), 0);
    for turn in 0..kills {
        let next = Instant::now() + TURN;
        platform.kill(if turn % 2 == 0 { "net0" } else { "disk0" });
        if !download.is_running() {
            bytes += download.finish(MINUTE).bytes;
            download = start();
        }
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let (took, in_time) = (begin.elapsed(), bytes + download.bytes());
    bytes += download.finish(10 * MINUTE).bytes;
    assert_eq!(platform.incarnation("net0"), 2 + kills.div_ceil(2));
    assert_eq!(platform.incarnation("disk0"), 2 + kills / 2);
    let unharmed = |domains: &[Listed]| {
        others(domains, "net0").into_iter().filter(|(name, _)| name != "disk0").collect::<Vec<_>>()
    };
    assert_eq!(unharmed(&before), unharmed(&platform.domains()));
    assert_eq!(platform.free_bytes(), free, "frames were leaked");
    let took = took.as_secs_f32();
    println!("{kills} kills in {took:.1} s, {in_time} bytes meanwhile; {bytes} right bytes in all");
}

/// Waits for a line of the guest's that begins so, and returns it.
fn said(platform: &Platform, start: &str) -> String {
    platform.wait_for(start, 5 * MINUTE, || {
        refuse_violations(platform);
        let mut lines = platform.lines().into_iter().filter(|line| line.from == "disktest");
        lines.find(|line| line.text.starts_with(start)).map(|line| line.text)
    })
}

fn refuse_violations(platform: &Platform) {
    let lines = platform.lines();
    let mut own = lines.iter().filter(|line| line.from == "disktest");
    let bad = own.find(|line| line.text.contains("VIOLATION") || line.text.contains("panicked"));
    assert!(bad.is_none(), "{bad:?}");
}

/// Verifies what the guest has left in the file behind its disk.
fn judge(kind: Kind, file: &Path) -> image::Report {
    let raw = match kind {
        Kind::Raw => file.to_owned(),
        Kind::Cow => from_qcow2(&first_partition(file)),
    };
    let raw = File::open(raw).expect("the disk's file");
    let read = |sector: u64, bytes: &mut [u8]| raw.read_exact_at(bytes, sector * 512);
    image::verify(0, read).expect("the log of a run")
}

/// Copies what is behind the first MiB, where `xtask` puts the first partition.
fn first_partition(file: &Path) -> PathBuf {
    let bytes = std::fs::read(file).expect("the disk's file");
    let path = file.with_extension("qcow2");
    std::fs::write(&path, &bytes[1 << 20..]).expect("room");
    path
}

/// Lets QEMU judge an image, and returns what QEMU sees in it.
fn from_qcow2(image: &Path) -> PathBuf {
    let qemu_img = |arguments: &[&str], files: &[&Path]| {
        let output = Command::new(setup::QEMU_IMG).args(arguments).args(files).output();
        let output = output.expect("qemu-img runs");
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&said));
    };
    let raw = image.with_extension("content");
    qemu_img(&["check", "-q", "-f", "qcow2"], &[image]);
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw"], &[image, &raw]);
    qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw"], &[image, &raw]);
    raw
}
