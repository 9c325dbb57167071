//! `cargo xtask test`: the host's tests, and those that boot a machine.

use crate::qemu::{Accel, resolve};
use crate::{build, project, setup};
use miette::{IntoDiagnostic, miette};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The package of the tests that boot a machine. They are `#[ignore]`d, so that a plain `cargo
/// test` says what it leaves out; we run them with `--ignored`.
pub const QEMU_TESTS: &str = "qemu-tests";

/// Systems that the tests boot.
const SYSTEMS: [&str; 4] = ["default", "two-nics", "selftest", "pingpong"];

/// Which tests to run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Which {
    /// All.
    #[default]
    All,
    /// Those that need nothing but the host.
    Host,
    /// Those that boot a machine.
    Qemu,
}

/// Runs the tests whose names contain `filter`.
///
/// # Errors
/// One fails, or something does not build.
pub fn test(filter: Option<&str>, which: Which) -> miette::Result<()> {
    let start = Instant::now();
    if which != Which::Qemu {
        let mut command = project::cargo();
        command.arg("test").args(filter);
        project::run(&mut command)?;
    }
    if which != Which::Host {
        let mut arguments: Vec<&str> = filter.into_iter().collect();
        arguments.push("--ignored");
        qemu_tests(&arguments, &[])?;
    }
    eprintln!("all tests passed in {:.0} s", start.elapsed().as_secs_f32());
    Ok(())
}

/// Builds what the QEMU tests use and runs them, one after the other: each one wants the whole
/// machine. `environment` reaches the tests, to choose a dose.
///
/// # Errors
/// One fails, or something does not build.
pub fn qemu_tests(arguments: &[&str], environment: &[(&str, String)]) -> miette::Result<()> {
    setup::qemu()?;
    for name in SYSTEMS {
        build::build_named(Path::new(name))?;
    }
    let axl = host_program("axl")?;
    let runtime = Runtime::new()?;
    let accel = if resolve(Accel::Auto) == Accel::Kvm { "kvm" } else { "tcg" };
    let mut command = project::cargo();
    command
        .args(["test", "--package", QEMU_TESTS, "--tests", "--no-fail-fast", "--"])
        .args(arguments)
        .args(["--test-threads", "1"])
        .env("AXOLOTL_ACCEL", accel)
        .env("AXOLOTL_AXL", axl)
        .env("AXOLOTL_XTASK", std::env::current_exe().into_diagnostic()?)
        .env("XDG_RUNTIME_DIR", &runtime.0)
        .envs(environment.iter().map(|(name, value)| (*name, value)));
    project::run(&mut command)
}

/// Builds a program of the host and returns where it is.
fn host_program(package: &str) -> miette::Result<PathBuf> {
    project::run(project::cargo().args(["build", "--quiet", "--package", package]))?;
    let program = project::target_dir().join("debug").join(package);
    if program.is_file() { Ok(program) } else { Err(miette!("{} is missing", program.display())) }
}

/// A directory for the sockets of tested systems, so that they never meet one that runs
/// besides the tests.
struct Runtime(PathBuf);

impl Runtime {
    fn new() -> miette::Result<Self> {
        let path = std::env::temp_dir().join(format!("axolotl-tests-{}", std::process::id()));
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o700).recursive(true).create(&path).into_diagnostic()?;
        Ok(Self(path))
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
