//! What a guest with a kernel of its own finds in place of a machine, checked from inside.

use qemu_tests::Platform;
use std::time::Duration;
use xtask::{build, project};

const BOOT: Duration = Duration::from_secs(60);
/// How long Debian may take to its shell, or for its balloon.
const DEBIAN: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;

/// Entry state, start info, ACPI tables, CPUID, MSRs, hypercalls, events, clock, a second processor;
/// and in the end the guest powers itself off.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn a_kernel_finds_what_the_abi_says() {
    let file = project::root().join("systems/pvh.toml");
    let built = build::build(&file).expect("a valid system");
    let platform = Platform::boot_built(&built, |options| options);
    let said = |text: &str| {
        let lines = platform.lines();
        lines.into_iter().find(|l| l.text.contains(text)).map(|line| line.text)
    };
    let result = platform.wait_for("the result", BOOT, || said(" checks held"));
    let words: Vec<&str> = result.split(' ').collect();
    assert!(words[1] == words[3], "{result}; {:?}", said("FAILED"));
    platform.wait_for("power-off", BOOT, || said("pvh died, incarnation 1: it powered off"));
}

/// A kernel's balloon gives frames back to the machine and gets them again, and at the end all are
/// free.
#[test]
#[ignore = "boots QEMU: run it by `cargo xtask test`"]
fn a_guest_gives_memory_back_and_gets_it_again() {
    if !project::has_program("apt-get") || !project::has_program("dpkg-deb") {
        eprintln!("SKIPPED: the kernel comes by apt, which is not here");
        return;
    }
    let file = project::root().join("systems/debian.toml");
    let built = build::build(&file).expect("a valid system");
    let platform = Platform::boot_built(&built, |options| options);
    let ready = || platform.lines().iter().any(|l| l.text.contains("init: ready")).then_some(());
    platform.wait_for("a shell", DEBIAN, ready);
    let free = platform.free_bytes();
    let charged = || {
        let domains = platform.domains();
        domains.into_iter().find(|domain| domain.name == "debian").map(|domain| domain.memory_bytes)
    };
    let all = charged().expect("it is there");
    let set = |mib: &str| assert!(platform.axl(&["mem-set", "debian", mib]).status.success());
    assert!(!platform.axl(&["mem-set", "debian", "257"]).status.success(), "more than it has");
    set("160");
    let fewer = || (platform.free_bytes() >= free + 96 * MIB).then_some(());
    platform.wait_for("the balloon", DEBIAN, fewer);
    assert!(charged().is_some_and(|now| now + 96 * MIB <= all), "{:?} of {all}", charged());
    set("256");
    let most = || charged().is_some_and(|now| now >= all).then_some(());
    platform.wait_for("all of it", DEBIAN, most);
    set("200");
    let some = || (platform.free_bytes() >= free + 56 * MIB).then_some(());
    platform.wait_for("the balloon again", DEBIAN, some);
    // Its tables may still grow: what it has, and what is free, at one moment.
    let total = platform.wait_for("a quiet moment", DEBIAN, || {
        let (before, free) = (charged()?, platform.free_bytes());
        (charged()? == before).then_some(before + free)
    });
    assert!(platform.axl(&["destroy", "debian"]).status.success());
    // Services let go of pages that they shared with it when they next look.
    let gone = || (charged().is_none() && platform.free_bytes() == total).then_some(());
    platform.wait_for("everything to be free", DEBIAN, gone);
}
