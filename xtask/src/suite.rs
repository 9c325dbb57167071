//! `cargo xtask test`: the host's tests, and those that boot a machine.

use crate::qemu::{Accel, resolve};
use crate::{build, project, setup};
use miette::{IntoDiagnostic, WrapErr, miette};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

/// Systems that the tests boot.
const SYSTEMS: [&str; 8] = [
    "default",
    "two-nics",
    "virtio-net",
    "selftest",
    "pingpong",
    "disktest-nvme",
    "disktest-ahci",
    "disktest-virtio",
];

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
    let which = match filter {
        Some(filter) => narrowed(filter, which)?,
        None => which,
    };
    if which != Which::Qemu {
        let mut command = project::cargo();
        command.arg("test").args(filter);
        project::run(&mut command)?;
    }
    if which != Which::Host {
        let mut arguments: Vec<&str> = filter.into_iter().collect();
        arguments.push("--ignored");
        qemu_tests(&SYSTEMS, &arguments, &[])?;
    }
    eprintln!("all tests passed in {:.0} s", start.elapsed().as_secs_f32());
    Ok(())
}

/// Those of `which` that have tests with `filter` in their names: what has none need not be built.
fn narrowed(filter: &str, which: Which) -> miette::Result<Which> {
    let ignored = listed(&[filter, "--ignored"])?;
    let host = if which == Which::Qemu { 0 } else { listed(&[filter])?.saturating_sub(ignored) };
    let qemu = if which == Which::Host { 0 } else { ignored };
    match (host, qemu) {
        (0, 0) => {
            let kind = match which {
                Which::All => "test",
                Which::Host => "test that needs no machine",
                Which::Qemu => "test that boots a machine",
            };
            let help = "`cargo test -- --list` shows the names of all tests";
            Err(miette!(help = help, "there is no {kind} with `{filter}` in its name"))
        }
        (0, _) => Ok(Which::Qemu),
        (_, 0) => Ok(Which::Host),
        _ => Ok(Which::All),
    }
}

/// How many tests these arguments choose; those that boot a machine are the ignored ones.
fn listed(arguments: &[&str]) -> miette::Result<usize> {
    let mut command = project::cargo();
    command.args(["test", "--quiet", "--"]).args(arguments).args(["--list", "--format", "terse"]);
    command.stderr(Stdio::inherit());
    let output = command.output().into_diagnostic().wrap_err("cannot start cargo")?;
    if !output.status.success() {
        return Err(miette!("the tests do not build"));
    }
    Ok(count(&String::from_utf8_lossy(&output.stdout)))
}

/// The tests in a list as the test harness prints it.
fn count(list: &str) -> usize {
    list.lines().filter(|line| line.ends_with(": test")).count()
}

/// Builds `systems` and runs the tests that boot them, one after the other: each one
/// wants the whole machine. They are `#[ignore]`d, so that a plain `cargo test` says what it leaves
/// out. `environment` reaches the tests, to choose a dose.
///
/// # Errors
/// One fails, or something does not build.
pub fn qemu_tests(
    systems: &[&str],
    arguments: &[&str],
    environment: &[(&str, String)],
) -> miette::Result<()> {
    setup::qemu()?;
    setup::qemu_img()?;
    for name in systems {
        build::build_named(Path::new(name))?;
    }
    let tests = test_targets()?;
    let axl = host_program("axl", &tests)?;
    let runtime = Runtime::new()?;
    let accel = if resolve(Accel::Auto) == Accel::Kvm { "kvm" } else { "tcg" };
    let mut command = project::cargo();
    command
        .args(["test", "--no-fail-fast"])
        .args(&tests)
        .arg("--")
        .args(arguments)
        .args(["--test-threads", "1"])
        .env("AXOLOTL_ACCEL", accel)
        .env("AXOLOTL_AXL", axl)
        .env("AXOLOTL_XTASK", std::env::current_exe().into_diagnostic()?)
        .env("XDG_RUNTIME_DIR", &runtime.0)
        .envs(environment.iter().map(|(name, value)| (*name, value)));
    project::run(&mut command)
}

/// Chooses the tests that boot a machine, for Cargo. By target, not by package: Cargo then unites
/// the features of all host packages, as in `cargo test`, and compiles nothing a second time.
fn test_targets() -> miette::Result<Vec<String>> {
    let dir = project::root().join("tests/qemu/tests");
    let mut names: Vec<String> = std::fs::read_dir(&dir)
        .into_diagnostic()
        .wrap_err_with(|| format!("cannot list {}", dir.display()))?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.strip_suffix(".rs")?.to_owned()))
        .collect();
    names.sort();
    Ok(names.into_iter().flat_map(|name| ["--test".to_owned(), name]).collect())
}

/// Builds a program of the host, with the features that it has next to `tests`, and returns
/// where it is.
fn host_program(name: &str, tests: &[String]) -> miette::Result<PathBuf> {
    project::run(project::cargo().args(["build", "--quiet", "--bin", name]).args(tests))?;
    let program = project::target_dir().join("debug").join(name);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_counted_and_nothing_else() {
        let list = "a::b: test\nc: test\n\nx: benchmark\nsrc/lib.rs - f (line 3): test\n";
        assert_eq!(count(list), 3);
        assert_eq!(count("\n0 tests, 0 benchmarks\n"), 0);
    }
}
