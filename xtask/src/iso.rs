//! `cargo xtask image`: what a real machine's boot loader takes.

use crate::build::{self, Built};
use crate::project;
use miette::{IntoDiagnostic, WrapErr, miette};
use std::path::{Path, PathBuf};
use std::process::Command;

/// GRUB's configuration. The core has a Multiboot2 header; the bundle is its only module.
const GRUB_CONFIG: &str = "set timeout=1
menuentry 'Axolotl' {
    multiboot2 /boot/axolotl/core.elf
    module2 /boot/axolotl/bundle.bin bundle
}
";

/// What `grub-mkrescue` needs for a CD that a BIOS boots, and the Debian package that has it. It
/// makes a CD without the directory too, which no BIOS boots.
const CD_TOOLS: [(&str, &str); 4] = [
    ("grub-mkrescue", "grub-common"),
    ("/usr/lib/grub/i386-pc", "grub-pc-bin"),
    ("xorriso", "xorriso"),
    ("mformat", "mtools"),
];

/// Builds `system` and writes a directory that GRUB can boot from, and a CD image of it if `iso`.
///
/// # Errors
/// The system cannot be built, or a file cannot be written, or GRUB's tool is missing.
pub fn image(system: &Path, output: Option<PathBuf>, iso: bool) -> miette::Result<()> {
    if iso && let Some(missing) = missing_cd_tools() {
        return Err(miette!("{missing}"));
    }
    let built = build::build_named(system)?;
    let tree = output.unwrap_or_else(|| project::image_dir(&built.file).join("boot-tree"));
    write_tree(&tree, &built)?;
    println!("{}", build::sizes(&built).trim_end());
    println!("{}: a directory for a disk with GRUB", tree.display());
    if iso {
        let image = write_iso(&tree)?;
        println!("{}: a CD image for machines with a BIOS", image.display());
    }
    Ok(())
}

/// Makes a CD image of what was built, and returns where it is.
///
/// # Errors
/// A file cannot be written, or GRUB's tool fails.
pub fn cd(built: &Built) -> miette::Result<PathBuf> {
    let tree = project::image_dir(&built.file).join("boot-tree");
    write_tree(&tree, built)?;
    write_iso(&tree)
}

/// Which tools for CD images are not installed, and how to get them, in one line. `None`: all are
/// there.
#[must_use]
pub fn missing_cd_tools() -> Option<String> {
    let is_missing = |name: &str| !Path::new(name).exists() && !project::has_program(name);
    let (tools, packages): (Vec<_>, Vec<_>) =
        CD_TOOLS.iter().copied().filter(|(name, _)| is_missing(name)).unzip();
    (!tools.is_empty()).then(|| {
        format!(
            "a CD image needs {}; on Debian run: sudo apt-get install -y {}",
            tools.join(", "),
            packages.join(" ")
        )
    })
}

fn write_tree(tree: &Path, built: &Built) -> miette::Result<()> {
    let (grub, parts) = (tree.join("boot/grub"), tree.join("boot/axolotl"));
    std::fs::create_dir_all(&grub).into_diagnostic()?;
    std::fs::create_dir_all(&parts).into_diagnostic()?;
    std::fs::write(grub.join("grub.cfg"), GRUB_CONFIG).into_diagnostic()?;
    std::fs::copy(&built.core, parts.join("core.elf")).into_diagnostic()?;
    std::fs::copy(&built.bundle, parts.join("bundle.bin")).into_diagnostic()?;
    Ok(())
}

fn write_iso(tree: &Path) -> miette::Result<PathBuf> {
    let iso = tree.with_extension("iso");
    let mut command = Command::new("grub-mkrescue");
    command.arg("-o").arg(&iso).arg(tree);
    project::announce(&command);
    // It has much to say, of interest only when it fails.
    let output = command.output().into_diagnostic().wrap_err("cannot start `grub-mkrescue`")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(miette!("`grub-mkrescue` failed: {}\n{}", output.status, said.trim_end()));
    }
    Ok(iso)
}
