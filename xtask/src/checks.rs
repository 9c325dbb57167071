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
}

/// Runs one job, or all, and says how long each took.
///
/// # Errors
/// The first job that fails.
pub fn ci(job: Option<Job>) -> miette::Result<()> {
    for job in job.map_or(vec![Job::Fmt, Job::Clippy, Job::Docs, Job::Test], |job| vec![job]) {
        let start = Instant::now();
        match job {
            Job::Fmt => fmt()?,
            Job::Clippy => clippy()?,
            Job::Docs => docs()?,
            Job::Test => suite::test(None, Which::All)?,
        }
        eprintln!("ci: {job:?} passed in {:.0} s", start.elapsed().as_secs_f32());
    }
    Ok(())
}

fn fmt() -> miette::Result<()> {
    setup::components(&["rustfmt"])?;
    project::run(project::cargo().args(["fmt", "--all", "--check"]))
}

fn clippy() -> miette::Result<()> {
    setup::rust_target()?;
    setup::components(&["clippy"])?;
    let deny = ["--", "-D", "warnings"];
    project::run(project::cargo().args(["clippy", "--all-targets"]).args(deny))?;
    project::run(build::freestanding("clippy").args(deny))
}

fn docs() -> miette::Result<()> {
    setup::rust_target()?;
    let flags = "-D warnings";
    project::run(project::cargo().args(["doc", "--no-deps"]).env("RUSTDOCFLAGS", flags))?;
    project::run(build::freestanding("doc").arg("--no-deps").env("RUSTDOCFLAGS", flags))
}

/// Model-checks the orders of memory accesses in `shmem` and what else has models.
///
/// # Errors
/// A model fails.
pub fn loom() -> miette::Result<()> {
    let mut command = project::cargo();
    command
        .args(["test", "--release", "--package", "shmem", "--lib", "loom"])
        .env("RUSTFLAGS", "--cfg loom")
        .env("LOOM_MAX_PREEMPTIONS", "3")
        // Another set of flags would throw away what the other tasks have built.
        .env("CARGO_TARGET_DIR", project::target_dir().join("loom"));
    project::run(&mut command)
}

/// Runs the tests of the crates with shared memory and with the core's decisions under Miri.
///
/// # Errors
/// Miri cannot be installed, or a test fails.
pub fn miri() -> miette::Result<()> {
    let mut install = std::process::Command::new("rustup");
    install.args(["toolchain", "install", "nightly", "--profile", "minimal"]);
    let mut probe = std::process::Command::new("rustup");
    probe.args(["run", "nightly", "cargo", "miri", "--version"]);
    let quiet = probe.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    if !quiet.status().is_ok_and(|status| status.success()) {
        project::run(install.args(["--component", "miri", "--component", "rust-src"]))?;
    }
    let mut command = std::process::Command::new("rustup");
    command
        .current_dir(project::root())
        .args([
            "run",
            "nightly",
            "cargo",
            "miri",
            "test",
            "--package",
            "shmem",
            "--package",
            "hv-core",
        ])
        .env("MIRIFLAGS", "-Zmiri-disable-isolation")
        .env("PROPTEST_CASES", "4")
        .env("CARGO_TARGET_DIR", project::target_dir().join("miri"));
    for name in ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTC", "CARGO_MANIFEST_DIR"] {
        command.env_remove(name);
    }
    project::run(&mut command)
}
