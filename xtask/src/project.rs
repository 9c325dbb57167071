//! Where things are in the checkout, and how programs of it are started.

use miette::{IntoDiagnostic, WrapErr, miette};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The target of everything that runs inside the machine.
pub const TARGET: &str = "x86_64-unknown-none";
/// The packages that are built for [`TARGET`].
pub const FREESTANDING: [&str; 16] = [
    "hv-x86",
    "unikernel",
    "control-domain",
    "store-domain",
    "net-domain",
    "nvme-domain",
    "ahci-domain",
    "virtio-blk-domain",
    "virtio-net-domain",
    "disktest",
    "demo-guest",
    "selftest",
    "pingpong",
    "pvh",
    "blockbench",
    "ringbreaker",
];

/// The top directory of the checkout.
#[must_use]
pub fn root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.ancestors()
        .find(|dir| dir.join("xtask/Cargo.toml").is_file())
        .map_or_else(|| here.clone(), Path::to_path_buf)
}

/// Cargo's target directory.
#[must_use]
pub fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// Where the parts of the bootable image of a system go.
#[must_use]
pub fn image_dir(system: &Path) -> PathBuf {
    let stem = system.file_stem().unwrap_or_default();
    target_dir().join("axolotl").join(stem)
}

/// The system file that `wanted` names: a path, or the name of a file in `systems/`.
///
/// # Errors
/// When there is no such file; the message lists those that there are.
pub fn system_file(wanted: &Path) -> miette::Result<PathBuf> {
    let shipped = root().join("systems");
    let candidates = [
        wanted.to_path_buf(),
        root().join(wanted),
        shipped.join(wanted),
        shipped.join(wanted).with_extension("toml"),
    ];
    if let Some(found) = candidates.into_iter().find(|path| path.is_file()) {
        return Ok(found);
    }
    let mut names: Vec<String> = std::fs::read_dir(&shipped)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".toml"))
        .collect();
    names.sort();
    Err(miette!(
        help = format!("systems/ has {}", names.join(", ")),
        "there is no system file `{}`",
        wanted.display()
    ))
}

/// Cargo, in the checkout, with the toolchain that started us.
#[must_use]
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // What `cargo run` set for us is not meant for what we start.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME"] {
        command.env_remove(name);
    }
    command
}

/// Shows a command before it runs, as a shell would take it.
pub fn announce(command: &Command) {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    if let Some(name) = Path::new(command.get_program()).file_name() {
        words[0] = name.to_string_lossy().into_owned();
    }
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    eprintln!("$ {}", words.join(" "));
}

/// Runs a command with our own terminal and waits for it.
///
/// # Errors
/// When it cannot be started or does not succeed.
pub fn run(command: &mut Command) -> miette::Result<()> {
    announce(command);
    let program = command.get_program().to_string_lossy().into_owned();
    let status =
        command.status().into_diagnostic().wrap_err_with(|| format!("cannot start `{program}`"))?;
    if status.success() { Ok(()) } else { Err(miette!("`{program}` failed: {status}")) }
}

/// Whether a program of this name is found by the shell's rules.
#[must_use]
pub fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}
