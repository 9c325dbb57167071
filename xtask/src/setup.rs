//! What a task needs on this machine, set up when it is missing.

use crate::project::{self, TARGET};
use miette::{IntoDiagnostic, WrapErr, miette};
use std::process::{Command, Stdio};

/// Makes sure that the target of the freestanding programs is installed.
///
/// # Errors
/// It is not, and `rustup` cannot install it.
pub fn rust_target() -> miette::Result<()> {
    if rust_target_installed() {
        return Ok(());
    }
    if !project::has_program("rustup") {
        return Err(miette!(
            help = "install Rust with rustup (https://rustup.rs), then try again",
            "the Rust target {TARGET} is missing, and there is no rustup to add it"
        ));
    }
    eprintln!("setting up: the Rust target {TARGET}");
    project::run(
        Command::new("rustup").current_dir(project::root()).args(["target", "add", TARGET]),
    )
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

/// Makes sure that these parts of the toolchain are installed.
///
/// # Errors
/// One is not, and `rustup` cannot install it.
pub fn components(names: &[&str]) -> miette::Result<()> {
    let installed = |name: &&&str| {
        let program = if **name == "clippy" { "cargo-clippy" } else { **name };
        let probe = Command::new(program)
            .current_dir(project::root())
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        !probe.is_ok_and(|status| status.success())
    };
    let missing: Vec<_> = names.iter().filter(installed).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut command = Command::new("rustup");
    command.current_dir(project::root()).args(["component", "add"]).args(missing);
    project::run(&mut command).wrap_err("a part of the Rust toolchain is missing")
}

/// QEMU's program.
pub const QEMU: &str = "qemu-system-x86_64";

/// Makes sure that QEMU is installed: as root on Debian we install it, otherwise we say how.
///
/// # Errors
/// It is not there and was not installed.
pub fn qemu() -> miette::Result<()> {
    if project::has_program(QEMU) {
        return Ok(());
    }
    let debian = project::has_program("apt-get");
    if !debian {
        return Err(miette!(
            help = "install your system's package for QEMU's x86 system emulator, version 7.2 or later",
            "{QEMU} is missing"
        ));
    }
    if !is_root()? {
        return Err(miette!("{QEMU} is missing; run: sudo apt-get install -y qemu-system-x86"));
    }
    eprintln!("setting up: {QEMU} is missing; installing the Debian package qemu-system-x86");
    apt(&["update", "-q"])?;
    apt(&["install", "-y", "-q", "--no-install-recommends", "qemu-system-x86"])?;
    if project::has_program(QEMU) { Ok(()) } else { Err(miette!("{QEMU} is still missing")) }
}

fn apt(arguments: &[&str]) -> miette::Result<()> {
    let mut command = Command::new("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    project::run(&mut command)
}

fn is_root() -> miette::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    // The owner of our entry in /proc is our effective user.
    Ok(std::fs::metadata("/proc/self").into_diagnostic()?.uid() == 0)
}
