//! What a task needs on this machine, set up when it is missing.

use crate::project::{self, TARGET};
use miette::{WrapErr, miette};
use std::process::{Command, Stdio};

/// Makes sure that the target of the freestanding programs is installed.
///
/// # Errors
/// It is not, and `rustup` cannot install it.
pub fn rust_target() -> miette::Result<()> {
    if rust_target_installed() {
        return Ok(());
    }
    let missing = format!("the Rust target {TARGET}");
    rustup(&missing, &["target", "add", TARGET], project::has_program("rustup"))
}

/// Lets `rustup` add what is missing.
fn rustup(missing: &str, arguments: &[&str], present: bool) -> miette::Result<()> {
    if !present {
        return Err(miette!(
            help = "install Rust with rustup (https://rustup.rs), then try again",
            "{missing} is missing, and there is no rustup to add it"
        ));
    }
    eprintln!("setting up: {missing} is missing");
    // In the checkout: the toolchain that is chosen there needs it.
    let mut command = Command::new("rustup");
    project::run(command.current_dir(project::root()).args(arguments))
        .wrap_err_with(|| format!("{missing} is missing"))
}

/// The compiler's own libraries for the target lie under its system root.
fn rust_target_installed() -> bool {
    let output =
        Command::new("rustc").current_dir(project::root()).args(["--print", "sysroot"]).output();
    output.is_ok_and(|output| {
        let sysroot = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        std::path::Path::new(&sysroot).join("lib/rustlib").join(TARGET).join("lib").is_dir()
    })
}

/// Makes sure that a component of the toolchain is installed, of which `program` is a part.
///
/// # Errors
/// It is not, and `rustup` cannot install it.
pub fn component(name: &str, program: &str) -> miette::Result<()> {
    // Without the component, `rustup` has a program of this name all the same; it fails.
    if succeeds(Command::new(program).current_dir(project::root()).arg("--version")) {
        return Ok(());
    }
    rustup(name, &["component", "add", name], project::has_program("rustup"))
}

fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

/// What Miri needs of the nightly toolchain.
const MIRI: [&str; 2] = ["miri", "rust-src"];

/// Makes sure that there is a nightly toolchain with Miri.
///
/// # Errors
/// There is none, and `rustup` cannot install it.
pub fn miri() -> miette::Result<()> {
    let mut list = Command::new("rustup");
    list.args(["component", "list", "--installed", "--toolchain", "nightly"]);
    let installed = list.output().is_ok_and(|output| {
        output.status.success() && has_components(&String::from_utf8_lossy(&output.stdout), &MIRI)
    });
    if installed {
        return Ok(());
    }
    let mut arguments = vec!["toolchain", "install", "nightly", "--profile", "minimal"];
    arguments.extend(MIRI.iter().flat_map(|name| ["--component", name]));
    rustup("Miri", &arguments, project::has_program("rustup"))
}

/// Whether `rustup`'s list of components, some with a target behind the name, has all of `names`.
fn has_components(list: &str, names: &[&str]) -> bool {
    let has = |line: &str, name: &str| {
        line.trim().strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    names.iter().all(|name| list.lines().any(|line| has(line, name)))
}

/// A command for the nightly toolchain, whichever toolchain started us.
#[must_use]
pub fn nightly() -> Command {
    let mut command = Command::new("rustup");
    command.current_dir(project::root()).args(["run", "nightly"]);
    for name in ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTC", "RUSTDOC", "CARGO_MANIFEST_DIR"] {
        command.env_remove(name);
    }
    command
}

/// QEMU's program.
pub const QEMU: &str = "qemu-system-x86_64";

/// QEMU's program for images of disks.
pub const QEMU_IMG: &str = "qemu-img";

/// What to do about a program of QEMU's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Plan {
    /// Nothing: it is there.
    Nothing,
    /// Install Debian's package.
    Install,
    /// Say which command does it.
    AskForRoot,
    /// Say what is needed: we do not know this system's packages.
    AskForPackage,
}

fn plan(present: bool, debian: bool, root: bool) -> Plan {
    match (present, debian, root) {
        (true, ..) => Plan::Nothing,
        (false, false, _) => Plan::AskForPackage,
        (false, true, false) => Plan::AskForRoot,
        (false, true, true) => Plan::Install,
    }
}

/// Makes sure that QEMU is installed: as root on Debian we install it, otherwise we say how.
///
/// # Errors
/// It is not there and was not installed.
pub fn qemu() -> miette::Result<()> {
    let other = "your system's package for QEMU's x86 system emulator, version 7.2 or later";
    program(QEMU, "qemu-system-x86", other)
}

/// Makes sure that `qemu-img` is installed, in the same way.
///
/// # Errors
/// It is not there and was not installed.
pub fn qemu_img() -> miette::Result<()> {
    program(QEMU_IMG, "qemu-utils", "your system's package that has qemu-img")
}

fn program(name: &str, package: &str, other: &str) -> miette::Result<()> {
    match plan(project::has_program(name), project::has_program("apt-get"), is_root()) {
        Plan::Nothing => Ok(()),
        Plan::Install => install(name, package),
        Plan::AskForRoot => Err(miette!(
            help = format!("run: sudo apt-get install -y --no-install-recommends {package}"),
            "{name} is missing, and only root can install it"
        )),
        Plan::AskForPackage => Err(miette!(help = format!("install {other}"), "{name} is missing")),
    }
}

fn install(name: &str, package: &str) -> miette::Result<()> {
    eprintln!("setting up: {name} is missing; installing the Debian package {package}");
    apt(&["update", "-q"])?;
    apt(&["install", "-y", "-q", "--no-install-recommends", package])?;
    if project::has_program(name) { Ok(()) } else { Err(miette!("{name} is still missing")) }
}

fn apt(arguments: &[&str]) -> miette::Result<()> {
    let mut command = Command::new("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    project::run(&mut command)
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    // The owner of our entry in /proc is our effective user.
    std::fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_is_installed_by_root_on_debian_only() {
        for debian in [false, true] {
            for root in [false, true] {
                assert_eq!(plan(true, debian, root), Plan::Nothing);
            }
        }
        assert_eq!(plan(false, true, true), Plan::Install);
        assert_eq!(plan(false, true, false), Plan::AskForRoot);
        assert_eq!(plan(false, false, true), Plan::AskForPackage);
        assert_eq!(plan(false, false, false), Plan::AskForPackage);
    }

    #[test]
    fn without_rustup_the_error_says_where_to_get_it() {
        let error = rustup("the Rust target x", &["target", "add", "x"], false).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the Rust target x is missing, and there is no rustup to add it"
        );
        assert!(error.help().is_some_and(|help| help.to_string().contains("https://rustup.rs")));
    }

    #[test]
    fn components_are_found_with_and_without_a_target() {
        let list = "cargo-x86_64-unknown-linux-gnu\nmiri-x86_64-unknown-linux-gnu\nrust-src\n";
        assert!(has_components(list, &["miri", "rust-src"]));
        assert!(!has_components(list, &["rust-docs"]));
        assert!(!has_components("miri-preview-is-no-part\n", &["rust-src"]));
        assert!(!has_components("rustfmt-x86_64-unknown-linux-gnu\n", &["rust-src", "miri"]));
        assert!(!has_components("", &["miri"]));
    }

    #[test]
    fn a_probe_that_fails_or_is_missing_does_not_succeed() {
        assert!(succeeds(&mut Command::new("true")));
        assert!(!succeeds(&mut Command::new("false")));
        assert!(!succeeds(&mut Command::new("axolotl-has-no-such-program")));
    }
}
