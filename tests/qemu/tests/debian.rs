//! Guests with kernels of their own, unmodified from their distribution. `cargo xtask test` gives
//! a short dose; `cargo xtask linux-soak` and `boot-soak` the full one.

use qemu_tests::load::{self, HOST, Job, Servers, has_apt};
use qemu_tests::{Listed, Platform, Random, dose};
use std::time::{Duration, Instant};
use xtask::guest_shell::Shell;
use xtask::platform::End;
use xtask::{build, doses, project};

const BOOT: Duration = Duration::from_secs(180);
const MINUTE: Duration = Duration::from_secs(60);
/// Longest time between two deaths. The shortest is none at all.
const PAUSE_MS: u64 = 400;
/// Bytes of the file that is downloaded.
const FILE_BYTES: usize = 16 << 20;

/// Debian's cloud kernel finds its processors, its network card behind `net0`, and a shell.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn debian_boots_and_gets_an_address() {
    if !has_apt() {
        return;
    }
    let file = project::root().join("systems/debian.toml");
    let built = build::build(&file).expect("a valid system");
    let platform = Platform::boot_built(&built, |options| options);
    for said in ["init: 6.", "inet 10.0.2.", "init: ready"] {
        wait_line(&platform, said);
    }
    let lines = platform.lines();
    let of = |text: &str| lines.iter().any(|line| line.text.contains(text));
    assert!(of("2 processors"), "both vCPUs are up");
    assert!(!of("Call Trace"), "nothing went wrong in the kernel");
}

fn wait_line(platform: &Platform, said: &str) {
    platform.wait_for(said, BOOT, || {
        let lines = platform.lines();
        lines.iter().any(|l| l.from == "debian" && l.text.contains(said)).then_some(())
    });
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn debian_does_not_notice_deaths_of_its_drivers() {
    survives(End::Crash);
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn debian_does_not_notice_restarts_of_its_drivers() {
    survives(End::Restart);
}

/// The design's promise to guests: no error, no wrong byte, no lost connection and no line in
/// the kernel's log, however often and whenever the drivers of network card and disk end.
fn survives(how: End) {
    if !has_apt() {
        return;
    }
    let ends = dose(doses::KILLS, 10);
    let mut random = Random::new();
    let file = project::root().join("systems/linux-bench.toml");
    let built = build::build(&file).expect("a valid system");
    let platform = Platform::boot_built(&built, |options| options);
    let mut shell = platform.shell(0, BOOT);
    let servers = Servers::start(2, FILE_BYTES);
    load::must(&mut shell, "mkfs.ext4 -q /dev/xvda2 && mkdir /data && mount /dev/xvda2 /data");
    let jobs = jobs(&servers);
    load::start_jobs(&mut shell, &jobs);
    // The first death may leave what stays for life, such as its record.
    platform.end("net0", how);
    platform.end("disk0", how);
    let (memory, before) = (platform.all_bytes(), platform.domains());
    let (start, mut counts) = (Instant::now(), [0_u64; 2]);
    for _ in 0..ends {
        std::thread::sleep(Duration::from_millis(random.below(PAUSE_MS)));
        let victim = usize::from(random.below(2) == 1);
        counts[victim] += 1;
        platform.end(["net0", "disk0"][victim], how);
    }
    let took = start.elapsed().as_secs();
    let rounds = load::end_jobs(&mut shell, &jobs);
    check(&mut shell);
    let after = platform.domains();
    assert_eq!(others(&before), others(&after), "only the drivers died");
    assert_eq!(platform.all_bytes(), memory, "frames were leaked");
    let [net, disk] = counts;
    println!("{how:?}: {net} of net0, {disk} of disk0 in {took} s; rounds: {rounds}");
}

/// Everybody's lives but those of the two drivers.
fn others(domains: &[Listed]) -> Vec<(String, u64)> {
    let others = domains.iter().filter(|it| !["net0", "disk0"].contains(&it.name.as_str()));
    others.map(|domain| (domain.name.clone(), domain.incarnation)).collect()
}

/// Kernels and numbers of vCPUs, and the ways in which a guest's life ends; the last one is for good.
const KINDS: [(&str, u32); 6] = [
    ("debian", 4),
    ("debian-full", 1),
    ("debian", 2),
    ("debian-full", 4),
    ("debian", 1),
    ("debian-full", 2),
];
const ENDS: [&str; 4] = ["reboot", "axl shutdown", "poweroff", "axl destroy"];

/// Both kernels with any number of processors: each boot comes to a shell, each way to end it
/// works, and nothing is left behind.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn debian_boots_and_ends_in_every_way() {
    if !has_apt() {
        return;
    }
    let boots = dose(doses::BOOTS, ENDS.len() as u64);
    let start = Instant::now();
    let mut done = 0;
    for (kernel, vcpus) in KINDS.iter().cycle() {
        if done >= boots {
            break;
        }
        done += boots_on_one_machine(kernel, *vcpus);
        println!("{done} boots in {} s; last {kernel} with {vcpus}", start.elapsed().as_secs());
    }
}

/// One boot for each way to end it.
fn boots_on_one_machine(kernel: &str, vcpus: u32) -> u64 {
    let file = project::root().join("systems/linux-bench.toml");
    let text = std::fs::read_to_string(file).expect("the system file");
    let text = text
        .replace("kernel = \"debian-full\"", &format!("kernel = \"{kernel}\""))
        .replace("ramdisk = \"debian-full-tools\"\n", "")
        .replace("vcpus = 2", &format!("vcpus = {vcpus}"));
    let platform = Platform::boot_text("linux-boots", &text);
    let mut before = None;
    for (life, how) in (1..).zip(ENDS) {
        let mut shell = platform.shell(0, BOOT);
        let said = shell.must("nproc; uname -r; ls /dev/xvda2", MINUTE).expect("a shell");
        assert!(said.starts_with(&format!("{vcpus}\n6.")), "{said}");
        let before = before.get_or_insert_with(|| platform.all_bytes());
        end_guest(&platform, &mut shell, how, life);
        if how == "axl destroy" {
            assert_eq!(platform.all_bytes(), *before, "frames were leaked");
        }
    }
    ENDS.len() as u64
}

/// Ends life number `life` of the guest; unless it is the last one, the next one begins.
fn end_guest(platform: &Platform, shell: &mut Shell, how: &str, life: u64) {
    match how.strip_prefix("axl ") {
        Some(verb) => {
            let output = platform.axl(&[verb, "debian"]);
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        // Its answer may not come.
        None => drop(shell.run(&format!("(sleep 0.3; {how}) >/dev/null &"), MINUTE)),
    }
    let guest = || platform.domains().into_iter().find(|it| it.name == "debian");
    platform.wait_for(&format!("the end of life {life} by {how}"), MINUTE, || match guest() {
        None => (how == "axl destroy").then_some(()),
        // It is listed until its last frame is free.
        Some(_) if how == "axl destroy" => None,
        Some(guest) if how == "reboot" => (guest.incarnation > life).then_some(()),
        Some(guest) => (!guest.is_alive()).then_some(()),
    });
    if !["reboot", "axl destroy"].contains(&how) {
        let output = platform.axl(&["restart", "debian"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// What the guest does meanwhile.
fn jobs(servers: &Servers) -> Vec<Job> {
    let verify = "--minimal --verify=crc32c --verify_fatal=1 --thread --randrepeat=0";
    let stream = |server: usize| format!("iperf3 -c {HOST} -p {} -t 15", servers.streams[server]);
    vec![
        load::direct("/dev/xvda1", "32M"),
        (
            // Written through the page cache, and read again without what was in it.
            "buffered",
            format!(
                "files='{verify} --name=files --directory=/data --size=16M --rw=randwrite --bs=16k \
                 --ioengine=psync'; seed=$(date +%s); \
                 fio $files --randseed=$seed --fsync=64 --end_fsync=1 --do_verify=0 && \
                 echo 3 >/proc/sys/vm/drop_caches && fio $files --randseed=$seed --verify_only"
            ),
        ),
        ("to_host", stream(0)),
        ("from_host", stream(1) + " -R"),
        servers.download(),
        servers.upload(8),
    ]
}

/// Looks for anything that went wrong, when the jobs have ended.
fn check(shell: &mut Shell) {
    load::check_kernel(shell);
    let errors =
        "umount /data && e2fsck -f -n /dev/xvda2 2>/dev/null | grep -c -i -e fix -e error || true";
    assert_eq!(load::must(shell, errors), "0");
}
