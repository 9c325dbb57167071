//! `cargo xtask image`: what a real machine's boot loader takes.

use crate::build::{self, Built};
use crate::project;
use miette::{IntoDiagnostic, miette};
use std::path::{Path, PathBuf};
use std::process::Command;

/// GRUB's configuration. The core has a Multiboot2 header; the bundle is its only module.
const GRUB_CONFIG: &str = "set timeout=1
menuentry 'Axolotl' {
    multiboot2 /boot/axolotl/core.elf
    module2 /boot/axolotl/bundle.bin bundle
}
";

/// Builds `system` and writes a directory that GRUB can boot from, and a CD image of it if `iso`.
///
/// # Errors
/// The system cannot be built, or a file cannot be written, or GRUB's tool is missing.
pub fn image(system: &Path, output: Option<PathBuf>, iso: bool) -> miette::Result<()> {
    let built = build::build_named(system)?;
    let tree = output.unwrap_or_else(|| project::image_dir(&built.file).join("boot-tree"));
    write_tree(&tree, &built)?;
    println!("{}", build::sizes(&built).trim_end());
    println!(
        "{}: copy it to a disk with GRUB, or boot it with QEMU by `cargo xtask run`",
        tree.display()
    );
    if iso { write_iso(&tree) } else { Ok(()) }
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

fn write_iso(tree: &Path) -> miette::Result<()> {
    if !project::has_program("grub-mkrescue") || !project::has_program("xorriso") {
        return Err(miette!(
            help = "on Debian: sudo apt-get install -y grub-pc-bin grub-efi-amd64-bin grub-common xorriso mtools",
            "a CD image needs grub-mkrescue and xorriso"
        ));
    }
    let iso = tree.with_extension("iso");
    project::run(Command::new("grub-mkrescue").arg("-o").arg(&iso).arg(tree))?;
    println!("{}", iso.display());
    Ok(())
}
