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

/// A hostile domain may kill itself; everyone else goes on.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn hostile_calls_hurt_nobody() {
    let calls = dose(doses::CALLS, 50_000);
    let file = project::root().join("systems/selftest.toml");
    let text = std::fs::read_to_string(file).expect("the system file");
    let image = "image = \"selftest\"\n";
    assert!(text.contains(image), "systems/selftest.toml has no self-test domain");
    let text = text.replace(image, &format!("{image}extra = \"calls={calls}\"\n"));
    let platform = Platform::boot_text("selftest-dose", &text);
    let server = platform.web(0);
    let before = platform.domains();

    let limit = Duration::from_secs(120 + calls / 1000);
    let answers = std::cell::Cell::new(0_u32);
    let verdict = platform.wait_for("the self-test's verdict", limit, || {
        http::download(server, 10_000, MINUTE, |_| ()).expect("the demo guest keeps answering");
        answers.set(answers.get() + 1);
        let lines = platform.lines();
        let mut own = lines.iter().filter(|line| line.from == "selftest");
        own.find(|line| is_verdict(&line.text)).map(|line| line.text.clone())
    });
    assert!(verdict.contains("selftest: PASSED"), "{verdict}");
    assert_eq!(others(&before, "selftest"), others(&platform.domains(), "selftest"));
    println!("{verdict}; the demo guest answered {} times meanwhile", answers.get());
}

/// The self-test's last line, `selftest: PASSED (…)`, or the first one that says what failed.
fn is_verdict(text: &str) -> bool {
    ["selftest: PASSED", "selftest: FAILED"].iter().any(|verdict| text.contains(verdict))
}
