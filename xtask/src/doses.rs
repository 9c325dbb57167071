//! The long tests in full: the same tests as in `cargo xtask test`, with a larger dose.

use crate::suite::qemu_tests;

/// Name of the environment variable with the number of crashes.
pub const KILLS: &str = "AXOLOTL_KILLS";
/// Name of the environment variable with the number of hostile calls.
pub const CALLS: &str = "AXOLOTL_CALLS";

/// Crashes `net0` `kills` times under a running download.
///
/// # Errors
/// The test fails; it says which promise was broken.
pub fn crash_soak(kills: u32) -> miette::Result<()> {
    let name = "crashes_under_a_download_leak_nothing";
    dose(name, KILLS, kills.into())
}

/// Lets the self-test domain make `calls` hostile calls while the demo guest keeps answering.
///
/// # Errors
/// The test fails; it says which promise was broken.
pub fn selftest(calls: u64) -> miette::Result<()> {
    dose("hostile_calls_hurt_nobody", CALLS, calls)
}

fn dose(test: &str, variable: &str, value: u64) -> miette::Result<()> {
    qemu_tests(&[test, "--exact", "--ignored", "--nocapture"], &[(variable, value.to_string())])
}
