//! What only shows after many rounds. `cargo xtask test` gives a short dose; `cargo xtask
//! crash-soak` and `cargo xtask selftest` the full one.

use qemu_tests::{Platform, Running, dose, others};
use std::time::{Duration, Instant};
use xtask::{doses, http, project};

const MINUTE: Duration = Duration::from_secs(60);
/// Bytes of one download; when it ends, the next one starts.
const CHUNK: u64 = 50_000_000;

/// The design's promise about restarts: no frame leaked, nobody else noticed, no byte wrong.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn crashes_under_a_download_leak_nothing() {
    let kills = dose(doses::KILLS, 20);
    let platform = Platform::boot("default");
    let server = platform.web(0);
    // The first crash may leave what stays for life, such as a death record.
    platform.crash("net0");
    http::download(server, 100_000, MINUTE, |_| ()).expect("right bytes");
    let (free, before) = (platform.free_bytes(), platform.domains());

    let start = Instant::now();
    let mut download = Running::start(server, CHUNK, 30 * MINUTE);
    let mut bytes = 0;
    for _ in 0..kills {
        let seen = download.bytes();
        platform.wait_for("progress of the download", MINUTE, || {
            (download.bytes() > seen || !download.is_running()).then_some(())
        });
        if !download.is_running() {
            bytes += download.finish(MINUTE).bytes;
            download = Running::start(server, CHUNK, 30 * MINUTE);
            // Not before it runs: QEMU's NAT forgets a request that was sent to the guest, was lost
            // there, and was not acknowledged (seen in its packets: it goes on behind it).
            platform.wait_for("the start of a download", MINUTE, || {
                (download.bytes() > 0).then_some(())
            });
        }
        platform.crash("net0");
    }
    bytes += download.finish(10 * MINUTE).bytes;

    assert_eq!(platform.incarnation("net0"), 2 + kills);
    assert_eq!(others(&before, "net0"), others(&platform.domains(), "net0"));
    assert_eq!(platform.free_bytes(), free, "frames were leaked");
    let took = start.elapsed().as_secs();
    println!("{kills} crashes in {took} s under {bytes} right bytes; {free} bytes free as before");
}

/// Hostile domains may kill themselves; everyone else goes on.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn hostile_calls_hurt_nobody() {
    let calls = dose(doses::CALLS, 200_000);
    let file = project::root().join("systems/selftest.toml");
    let text = std::fs::read_to_string(file).expect("the system file");
    let image = "image = \"selftest\"\n";
    assert_eq!(text.matches(image).count(), HOSTILE.len(), "self-test domains in the system file");
    let text = text.replace(image, &format!("{image}extra = \"calls={calls}\"\n"));
    let platform = Platform::boot_text("selftest-dose", &text);
    let server = platform.web(0);
    let start = Instant::now();

    let limit = Duration::from_secs(120 + calls / 1000);
    let answers = std::cell::Cell::new(0_u32);
    let verdicts = platform.wait_for("the self-tests' verdicts", limit, || {
        http::download(server, 10_000, MINUTE, |_| ()).expect("the demo guest keeps answering");
        answers.set(answers.get() + 1);
        let lines = platform.lines();
        let of = |name: &&str| {
            let mut own = lines.iter().filter(|line| line.from == *name);
            own.find(|line| is_verdict(&line.text)).map(|line| line.text.clone())
        };
        HOSTILE.iter().map(of).collect::<Option<Vec<_>>>()
    });
    for verdict in &verdicts {
        assert!(verdict.starts_with("selftest: PASSED ("), "{verdict}");
        assert!(calls_of(verdict) >= calls, "{verdict}");
    }
    for domain in platform.domains() {
        let is_hostile = HOSTILE.contains(&domain.name.as_str());
        assert_eq!(domain.incarnation > 1, is_hostile, "{domain:?}");
    }
    http::download(server, 10_000, MINUTE, |_| ()).expect("the demo guest still answers");
    let (answers, took) = (answers.get(), start.elapsed().as_secs());
    println!("{verdicts:?}; the demo guest answered {answers} times in the last {took} s of it");
}

/// The self-test domains of `systems/selftest.toml`.
const HOSTILE: [&str; 2] = ["selftest", "selftest2"];

/// The self-test's last line, `selftest: PASSED (…)`, or the first one that says what failed.
fn is_verdict(text: &str) -> bool {
    ["selftest: PASSED", "selftest: FAILED"].iter().any(|verdict| text.starts_with(verdict))
}

/// The `n` of `selftest: PASSED (n calls, …)`.
fn calls_of(verdict: &str) -> u64 {
    let count = verdict.split(['(', ' ']).find_map(|word| word.parse().ok());
    count.unwrap_or_else(|| panic!("no number of calls in: {verdict}"))
}
