//! The long tests in full: the same tests as in `cargo xtask test`, with a larger dose.

use crate::suite::qemu_tests;

/// Name of the environment variable with the number of crashes.
pub const KILLS: &str = "AXOLOTL_KILLS";
/// Name of the environment variable with the number of boots.
pub const BOOTS: &str = "AXOLOTL_BOOTS";
/// Name of the environment variable with the number of hostile calls.
pub const CALLS: &str = "AXOLOTL_CALLS";

/// Crashes `net0` `kills` times under a running download; with `alternate`, `net0` and `disk0` by
/// turns, every 50 ms, under a download from the disk.
///
/// # Errors
/// The test fails; it says which promise was broken.
pub fn crash_soak(kills: u32, alternate: bool) -> miette::Result<()> {
    let name = if alternate {
        "files_are_right_while_both_drivers_are_killed_by_turns"
    } else {
        "crashes_under_a_download_leak_nothing"
    };
    dose("default", name, KILLS, kills.into())
}

/// A storage controller that has a driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Controller {
    /// NVMe, with a copy-on-write disk besides.
    Nvme,
    /// AHCI.
    Ahci,
    /// virtio.
    VirtioBlk,
}

/// Kills the domain of a storage controller `kills` times while a guest verifies its disks.
///
/// # Errors
/// The test fails; it says which promise was broken.
pub fn disk_soak(controller: Controller, kills: u32) -> miette::Result<()> {
    let (system, name) = match controller {
        Controller::Nvme => ("disktest-nvme", "no_write_is_lost_on_nvme"),
        Controller::Ahci => ("disktest-ahci", "no_write_is_lost_on_ahci"),
        Controller::VirtioBlk => ("disktest-virtio", "no_write_is_lost_on_virtio_blk"),
    };
    dose(system, name, KILLS, kills.into())
}

/// Kills the domains of network card and disk at random, `kills` times in all, under Debian's own
/// load: fio with checksums, streams, transfers.
///
/// # Errors
/// The test fails; it says which promise was broken.
pub fn linux_soak(kills: u32, restart: bool) -> miette::Result<()> {
    let name = if restart {
        "debian_does_not_notice_restarts_of_its_drivers"
    } else {
        "debian_does_not_notice_deaths_of_its_drivers"
    };
    dose("linux-bench", name, KILLS, kills.into())
}

/// Lets a guest break its rings in `lives` lives while its neighbours work, and kills their drivers
/// besides.
///
/// # Errors
/// The test fails; it says which promise was broken.
pub fn neighbour_soak(lives: u32) -> miette::Result<()> {
    dose("neighbours", "a_guest_that_breaks_its_rings_hurts_nobody", KILLS, lives.into())
}

/// Boots Debian `boots` times, in all ways that it can be started and ended.
///
/// # Errors
/// The test fails; it says which promise was broken.
pub fn boot_soak(boots: u32) -> miette::Result<()> {
    dose("linux-bench", "debian_boots_and_ends_in_every_way", BOOTS, boots.into())
}

/// Lets the self-test domain make `calls` hostile calls while the demo guest keeps answering.
///
/// # Errors
/// The test fails; it says which promise was broken.
pub fn selftest(calls: u64) -> miette::Result<()> {
    dose("selftest", "hostile_calls_hurt_nobody", CALLS, calls)
}

fn dose(system: &str, test: &str, variable: &str, value: u64) -> miette::Result<()> {
    qemu_tests(
        &[system],
        &[test, "--exact", "--ignored", "--nocapture"],
        &[(variable, value.to_string())],
    )
}
