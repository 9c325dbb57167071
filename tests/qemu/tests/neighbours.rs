//! Guests that share one network card and one disk, and what becomes of the others when one of them misbehaves or
//! dies. `cargo xtask test` gives a short dose; `cargo xtask neighbour-soak` the full one.

use qemu_tests::load::{self, HOST, Job, Servers, has_apt};
use qemu_tests::{Listed, Platform, Random, dose};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use xtask::guest_shell::Shell;
use xtask::platform::End;
use xtask::{doses, http, image_files, project};

const MINUTE: Duration = Duration::from_secs(60);
const BOOT: Duration = Duration::from_secs(180);
/// The two Debians.
const A: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 21);
const B: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 22);
/// What QEMU's network gives to the demo guest, the only one that asks.
const DEMO: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// A port of the Debians that answers with a sum.
const SUMS: u16 = 7;
/// A file on the demo guest's disk.
const PAGE: &str = "axolotl.svg";
/// Bytes of one download.
const FILE_BYTES: usize = 2 << 20;
/// The drivers.
const DRIVERS: [&str; 2] = ["net0", "disk0"];
/// Longest time between two deaths of drivers.
const PAUSE_MS: u64 = 1500;

/// The design's promise about neighbours: whatever a guest does to its rings, and however it ends, nobody but
/// itself has a failure, a wrong byte or a line in the log.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn a_guest_that_breaks_its_rings_hurts_nobody() {
    if !has_apt() {
        return;
    }
    let lives = dose(doses::KILLS, 12);
    let mut random = Random::new();
    let platform = boot(random.below(1000));
    let mut street = Street::move_in(&platform);
    let (start, before, memory) = (Instant::now(), platform.domains(), platform.all_bytes());

    live(&platform, lives);
    assert_eq!(others(&before, &[]), others(&platform.domains(), &[]), "nobody else died");
    unchanged(&platform, memory);
    let alone = start.elapsed().as_secs();

    let deaths = lives.div_ceil(3);
    // The first death of each may leave what stays for life, such as its record.
    DRIVERS.iter().for_each(|driver| platform.end(driver, End::Crash));
    let memory = platform.all_bytes();
    for _ in 0..deaths {
        std::thread::sleep(Duration::from_millis(random.below(PAUSE_MS)));
        platform.end(DRIVERS[usize::from(random.below(2) == 1)], End::Crash);
    }
    live(&platform, lives.div_ceil(4));
    assert_eq!(others(&before, &DRIVERS), others(&platform.domains(), &DRIVERS));

    let between = street.stop_visits();
    for verb in ["crash", "destroy"] {
        let output = platform.axl(&[verb, "b"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        live(&platform, lives.div_ceil(8));
    }
    let rounds = street.move_out();
    let gone = [DRIVERS[0], DRIVERS[1], "b"];
    assert_eq!(others(&before, &gone), others(&platform.domains(), &gone));
    unchanged(&platform, memory);
    println!(
        "{lives} lives in {alone} s, then {deaths} deaths of drivers, a crash and an end of a neighbour"
    );
    println!("rounds: {between}, {rounds}");
}

/// Boots them all. `seed` decides about the breaker's ways.
fn boot(seed: u64) -> Platform {
    let file = project::root().join("systems/neighbours.toml");
    let text = std::fs::read_to_string(file).expect("the system file");
    let image = "image = \"ringbreaker\"\n";
    assert_eq!(text.matches(image).count(), 1, "breakers in the system file");
    let text = text.replace(image, &format!("{image}extra = \"seed={seed}\"\n"));
    Platform::boot_text("neighbours-dose", &text)
}

/// Waits until the breaker has done its worst in so many more lives.
fn live(platform: &Platform, lives: u64) {
    let done = || {
        let lines = platform.lines();
        let own = lines.iter().filter(|line| line.from == "breaker");
        let said = own.filter_map(|line| line.text.strip_prefix("ringbreaker: "));
        let (mut done, mut failed) = (0, None);
        for verdict in said {
            done += u64::from(verdict.starts_with("did "));
            failed = failed.or_else(|| verdict.strip_prefix("FAILED: ").map(str::to_owned));
        }
        assert_eq!(failed, None, "a backend failed the breaker");
        done
    };
    let end = done() + lives;
    let limit = MINUTE * u32::try_from(lives).expect("not so many");
    platform
        .wait_for(&format!("life {end} of the breaker"), limit, || (done() >= end).then_some(()));
}

/// Everybody's lives but those of the breaker and of `but`.
fn others(domains: &[Listed], but: &[&str]) -> Vec<(String, u64)> {
    let others =
        domains.iter().filter(|it| it.name != "breaker" && !but.contains(&it.name.as_str()));
    others.map(|domain| (domain.name.clone(), domain.incarnation)).collect()
}

/// No frame is lost. Looked at more than once: the breaker's may change hands in between.
fn unchanged(platform: &Platform, memory: u64) {
    platform.wait_for("all memory as before", MINUTE, || {
        (platform.all_bytes() == memory).then_some(())
    });
}

/// The neighbours at work.
struct Street {
    a: Shell,
    b: Shell,
    /// Between A and B, at A and at B.
    visits: [Vec<Job>; 2],
    /// What A does alone.
    work: Vec<Job>,
    downloads: Downloads,
    _servers: Servers,
}

impl Street {
    fn move_in(platform: &Platform) -> Self {
        let (mut a, mut b) = (platform.shell_at(A, BOOT), platform.shell_at(B, BOOT));
        for shell in [&mut a, &mut b] {
            load::must(
                shell,
                &format!("nc -ll -p {SUMS} -e sha256sum & iperf3 -s >/dev/null 2>&1 &"),
            );
        }
        let servers = Servers::start(2, FILE_BYTES);
        let visits = [visits_to(B), visits_to(A)];
        let (work, other) = (work(&servers, 0), work(&servers, 1));
        load::start_jobs(&mut a, &visits[0]);
        load::start_jobs(&mut b, &visits[1]);
        load::start_jobs(&mut a, &work);
        load::start_jobs(&mut b, &other);
        let downloads = Downloads::start(platform.web(0));
        Self { a, b, visits, work, downloads, _servers: servers }
    }

    /// Ends what is between A and B; each goes on alone.
    fn stop_visits(&mut self) -> String {
        let a = load::end_jobs(&mut self.a, &self.visits[0]);
        let b = load::end_jobs(&mut self.b, &self.visits[1]);
        load::check_kernel(&mut self.b);
        format!("{a}, {b}")
    }

    /// Ends the rest, after B is gone.
    fn move_out(mut self) -> String {
        let rounds = load::end_jobs(&mut self.a, &self.work);
        load::check_kernel(&mut self.a);
        format!("{rounds}, demo {}", self.downloads.end())
    }
}

/// Streams and checked bytes from one Debian to the other, both ways.
fn visits_to(other: Ipv4Addr) -> Vec<Job> {
    vec![
        ("visit", format!("iperf3 -c {other} -t 3 && iperf3 -c {other} -t 3 -R")),
        ("give", load::send(&other.to_string(), SUMS, 2, "given")),
    ]
}

/// What a Debian does on its disk, with the demo guest and with the world outside.
fn work(servers: &Servers, own: usize) -> Vec<Job> {
    let bytes = image_files::sha256(&image_files::pattern(FILE_BYTES));
    let file = project::root().join("guests/demo/files").join(PAGE);
    let page = image_files::sha256(&std::fs::read(file).expect("a file of the demo guest"));
    let page = load::fetch(&format!("http://{DEMO}/disk/{PAGE}"), &page);
    let bytes = load::fetch(&format!("http://{DEMO}/bytes/{FILE_BYTES}"), &bytes);
    vec![
        load::direct("/dev/xvda", "8M"),
        ("demo", format!("{page} && {bytes}")),
        servers.download(),
        servers.upload(2),
        ("stream", format!("iperf3 -c {HOST} -p {} -t 5", servers.streams[own])),
    ]
}

/// Downloads from the demo guest to the host, one after the other.
struct Downloads {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u32>,
}

impl Downloads {
    fn start(server: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut rounds = 0;
            while !stopped.load(Ordering::Relaxed) {
                http::download(server, FILE_BYTES as u64, 5 * MINUTE, |_| ()).expect("right bytes");
                rounds += 1;
            }
            rounds
        });
        Self { stop, thread }
    }

    /// Their number.
    fn end(self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("right bytes")
    }
}
