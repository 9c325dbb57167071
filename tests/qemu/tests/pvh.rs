//! What a guest with a kernel of its own finds in place of a machine, checked from inside.

use qemu_tests::Platform;
use std::time::Duration;
use xtask::{build, project};

const BOOT: Duration = Duration::from_secs(60);

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
