//! The user's five steps, as far as a machine is needed for them.

use qemu_tests::{Platform, Running, axl, others, run_limited, xtask_command};
use std::io::Write;
use std::path::Path;
use std::time::Duration;
use xtask::qemu::Options;
use xtask::{build, http, iso};

const LIMIT: Duration = Duration::from_secs(60);

fn page(server: std::net::SocketAddr) -> String {
    let answer = http::get(server, "/", LIMIT).expect("an answer");
    assert_eq!(answer.status, 200);
    String::from_utf8(answer.body().expect("a whole page")).expect("text")
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn the_guest_answers_and_axl_lists_all_domains() {
    let platform = Platform::boot("default");
    let server = platform.web(0);
    assert!(page(server).to_lowercase().contains("<html"));
    http::download(server, 1_000_000, LIMIT, |_| ()).expect("right bytes");
    let body: Vec<u8> = (0..100_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    let echo = http::post(server, "/echo", &body, LIMIT).expect("an answer");
    assert!(echo.body().expect("a whole body") == body, "the echo differs");

    let domains = platform.domains();
    let names: Vec<_> = domains.iter().map(|domain| domain.name.as_str()).collect();
    for name in ["store", "net0", "disk0", "demo"] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
    assert!(domains.iter().all(|domain| domain.incarnation == 1 && domain.is_alive()));
    assert!(domains.iter().all(|domain| domain.memory_bytes > 0));
    assert!(platform.lines().iter().any(|line| line.from == "core"));
    assert!(platform.lines().iter().any(|line| line.from == "demo"));
}

/// Crashes the driver of the network card in the middle of a download, of which no byte is wrong, and
/// finds all others as they were.
fn crash_net0_under_a_download(platform: &Platform) {
    let server = platform.web(0);
    let before = platform.domains();
    let download = Running::start(server, 20_000_000, 2 * LIMIT);
    platform.wait_for("the start of the download", LIMIT, || {
        (download.bytes() > 200_000).then_some(())
    });
    assert!(download.is_running(), "the download is too short for this test");
    platform.crash("net0");
    assert_eq!(download.finish(2 * LIMIT).bytes, 20_000_000);
    page(server);

    let after = platform.domains();
    assert_eq!(others(&before, "net0"), others(&after, "net0"));
    assert_eq!(platform.incarnation("net0"), 2);
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn a_download_survives_a_crash_of_its_driver() {
    let platform = Platform::boot("default");
    crash_net0_under_a_download(&platform);
    let why = platform.axl_json(&["why", "net0"]);
    assert_eq!(why["incarnation"], 1, "{why}");
    assert!(why["vector"].as_u64().is_some_and(|vector| vector == 14), "{why}");
    for key in ["address", "rip", "registers", "console_tail", "time_ns"] {
        assert!(!why[key].is_null(), "no {key} in {why}");
    }
    let text = platform.axl(&["why", "net0"]);
    let text = String::from_utf8_lossy(&text.stdout).to_lowercase();
    assert!(text.contains("rip") && text.contains("page fault"), "{text}");
}

/// The same with the other driver of a network card.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn a_download_through_a_virtio_card_survives_a_crash_of_its_driver() {
    let platform = Platform::boot("virtio-net");
    crash_net0_under_a_download(&platform);
    let lines = platform.lines();
    let starts =
        lines.iter().filter(|line| line.from == "net0" && line.text.contains("virtio-net "));
    assert_eq!(starts.count(), 2, "both lives are the virtio driver's");
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn a_crash_of_one_driver_does_not_disturb_the_other() {
    let platform = Platform::boot("two-nics");
    let (first, second) = (platform.web(0), platform.web(1));
    let before = platform.domains();
    let download = Running::start(second, 20_000_000, 2 * LIMIT);
    platform.wait_for("the start of the download", LIMIT, || {
        (download.bytes() > 200_000).then_some(())
    });
    platform.crash("net0");
    assert_eq!(download.finish(2 * LIMIT).bytes, 20_000_000);
    page(first);
    page(second);
    assert_eq!(others(&before, "net0"), others(&platform.domains(), "net0"));
    assert_eq!(platform.incarnation("net0"), 2);
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn one_and_four_processors_do() {
    for cpus in [1, 4] {
        let platform =
            Platform::boot_with("default", |options| Options { cpus: Some(cpus), ..options });
        let server = platform.web(0);
        http::download(server, 300_000, LIMIT, |_| ()).expect("right bytes");
        assert_eq!(platform.axl_json(&["info"])["cpus"], cpus);
    }
}

/// The other way in: firmware, GRUB, and the Multiboot2 header of the core.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn boots_from_a_cd_by_grub() {
    if let Some(missing) = iso::missing_cd_tools() {
        // Not by `eprintln!`, whose text the harness keeps to itself when a test passes.
        let _ = writeln!(std::io::stderr(), "boots_from_a_cd_by_grub: skipped: {missing}");
        return;
    }
    let built = build::build_named(Path::new("default")).expect("a valid system");
    let cd = iso::cd(&built).expect("a CD image");
    let platform = Platform::boot_built(&built, |options| Options { cd: Some(cd), ..options });
    let server = platform.web(0);
    http::download(server, 300_000, LIMIT, |_| ()).expect("right bytes");
    assert!(platform.domains().iter().all(|domain| domain.incarnation == 1 && domain.is_alive()));
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn a_bounded_run_works_and_leaves_nothing_behind() {
    let mut run = xtask_command();
    run.args(["run", "default", "--for", "12s", "--headless", "--any-port"]);
    let output = run_limited(&mut run, 4 * LIMIT);
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert!(out.lines().any(|line| line.trim_start().starts_with("core ")), "{out}");
    assert!(err.contains("curl http://127.0.0.1:"), "{err}");
    assert!(!out.contains('\x1b'), "colours in a file");
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").expect("set by xtask");
    assert!(!holds_a_socket(Path::new(&runtime)), "a socket is left");
}

fn holds_a_socket(directory: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::read_dir(directory).into_iter().flatten().flatten().any(|entry| {
        let kind = entry.file_type().expect("readable");
        kind.is_socket() || (kind.is_dir() && holds_a_socket(&entry.path()))
    })
}

#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn axl_says_in_one_line_what_is_wrong() {
    let one_line = |output: &std::process::Output| {
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        assert!(!text.is_empty() && !text.contains("panicked"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    };
    one_line(&axl(&["list"]));
    let platform = Platform::boot("default");
    let _ = platform.web(0);
    one_line(&platform.axl(&["crash", "net9"]));
    drop(platform);
    one_line(&axl(&["list"]));
}
