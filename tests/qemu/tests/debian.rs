//! Guests with kernels of their own, unmodified from their distribution.

use qemu_tests::Platform;
use std::time::Duration;
use xtask::{build, project};

const BOOT: Duration = Duration::from_secs(180);

/// Debian's cloud kernel finds its processors, its network card behind `net0`, and a shell.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn debian_boots_and_gets_an_address() {
    if !project::has_program("apt-get") || !project::has_program("dpkg-deb") {
        eprintln!("SKIPPED: the kernel comes by apt, which is not here");
        return;
    }
    let file = project::root().join("systems/debian.toml");
    let built = build::build(&file).expect("a valid system");
    let platform = Platform::boot_built(&built, |options| options);
    for said in ["init: 6.", "inet 10.0.2.", "init: ready"] {
        platform.wait_for(said, BOOT, || {
            let lines = platform.lines();
            lines.iter().any(|l| l.from == "debian" && l.text.contains(said)).then_some(())
        });
    }
    let lines = platform.lines();
    let of = |text: &str| lines.iter().any(|line| line.text.contains(text));
    assert!(of("2 processors"), "both vCPUs are up");
    assert!(!of("Call Trace"), "nothing went wrong in the kernel");
}
