//! `cargo xtask ci`: what continuous integration runs, one job after the other.

use crate::suite::{self, Which};
use crate::{build, project, setup};
use std::time::Instant;

/// A job of continuous integration.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Job {
    /// Formatting.
    Fmt,
    /// Lints, on the host's crates and on those that run inside the machine.
    Clippy,
    /// Documentation.
    Docs,
    /// All tests, as `cargo xtask test`.
    Test,
    /// The models of shared memory, as `cargo xtask loom`.
    Loom,
}

/// All jobs, in the order in which they are run: those first that find most mistakes per second.
const JOBS: [Job; 5] = [Job::Fmt, Job::Clippy, Job::Docs, Job::Loom, Job::Test];

/// Runs one job, or all, and says how long each took.
///
/// # Errors
/// The first job that fails.
pub fn ci(job: Option<Job>) -> miette::Result<()> {
    for job in job.map_or(JOBS.to_vec(), |job| vec![job]) {
        let start = Instant::now();
        match job {
            Job::Fmt => fmt()?,
            Job::Clippy => clippy()?,
            Job::Docs => docs()?,
            Job::Test => suite::test(None, Which::All)?,
            Job::Loom => loom()?,
        }
        eprintln!("ci: {job:?} passed in {:.0} s", start.elapsed().as_secs_f32());
    }
    Ok(())
}

fn fmt() -> miette::Result<()> {
    setup::component("rustfmt", "rustfmt")?;
    project::run(project::cargo().args(["fmt", "--all", "--check"]))
}

fn clippy() -> miette::Result<()> {
    setup::rust_target()?;
    setup::component("clippy", "cargo-clippy")?;
    let deny = ["--", "-D", "warnings"];
    project::run(project::cargo().args(["clippy", "--all-targets"]).args(deny))?;
    build::freestanding("clippy").try_for_each(|mut command| project::run(command.args(deny)))
}

fn docs() -> miette::Result<()> {
    setup::rust_target()?;
    let deny = |command: &mut std::process::Command| {
        project::run(command.arg("--no-deps").env("RUSTDOCFLAGS", "-D warnings"))
    };
    deny(project::cargo().arg("doc"))?;
    build::freestanding("doc").try_for_each(|mut command| deny(&mut command))
}

/// Model-checks the orders of memory accesses in `shmem`.
///
/// # Errors
/// A model fails.
pub fn loom() -> miette::Result<()> {
    let mut command = project::cargo();
    command
        .args(["test", "--release", "--package", "shmem", "--test", "loom"])
        .env("RUSTFLAGS", "--cfg loom")
        // Another set of flags would throw away what the other tasks have built.
        .env("CARGO_TARGET_DIR", project::target_dir().join("loom"));
    project::run(&mut command)
}

/// The crates whose tests Miri runs, each with further flags. Peers read and write shared memory
/// by bytes and by words; Miri's store buffers, which emulate weak memory, know accesses of one
/// size only, and loom has models for what they would find. The core has no unsafe code: its
/// tests run without the rules of borrows, which saves about a quarter of the time.
const MIRI: [(&str, &str); 2] = [
    ("shmem", "-Zmiri-disable-weak-memory-emulation"),
    ("hv-core", "-Zmiri-disable-stacked-borrows"),
];

/// Runs the tests of shared memory and of the core's decisions under Miri.
///
/// # Errors
/// Miri cannot be installed, or a test fails.
pub fn miri() -> miette::Result<()> {
    setup::miri()?;
    for (package, flags) in MIRI {
        let mut command = setup::nightly();
        command
            .args(["cargo", "miri", "test", "--package", package])
            // Proptest asks for the working directory.
            .env("MIRIFLAGS", format!("-Zmiri-disable-isolation {flags}"))
            .env("PROPTEST_CASES", "4")
            .env("CARGO_TARGET_DIR", project::target_dir().join("miri"));
        project::run(&mut command)?;
    }
    Ok(())
}
