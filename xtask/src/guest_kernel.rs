//! Kernels and ramdisks of guests: from a path, or from a distribution's package.

use miette::{Context, IntoDiagnostic, miette};
use std::path::{Path, PathBuf};

/// The flat image of the kernel that a system file names.
///
/// # Errors
/// There is no such file, or it is no kernel that can run.
pub fn kernel(system: &Path, named: &str) -> miette::Result<Vec<u8>> {
    let path = resolve(system, named)?;
    let file = read(&path)?;
    kernel_image::kernel(&file)
        .into_diagnostic()
        .wrap_err_with(|| format!("{} cannot be a guest's kernel", path.display()))
}

/// The flat image of the ramdisk that a system file names.
///
/// # Errors
/// There is no such file.
pub fn ramdisk(system: &Path, named: &str) -> miette::Result<Vec<u8>> {
    Ok(kernel_image::ramdisk(&read(&resolve(system, named)?)?))
}

fn read(path: &Path) -> miette::Result<Vec<u8>> {
    std::fs::read(path)
        .into_diagnostic()
        .wrap_err_with(|| format!("cannot read {}", path.display()))
}

/// A path as the system file means it: from its own directory.
fn resolve(system: &Path, named: &str) -> miette::Result<PathBuf> {
    let path = Path::new(named);
    if !named.contains(['/', '.']) {
        let help = "write a path, such as `kernel = \"./vmlinuz\"`";
        return Err(miette!(help = help, "no kernel is known as `{named}`"));
    }
    Ok(system.parent().map_or_else(|| path.into(), |dir| dir.join(path)))
}

/// A name that a bundle can hold: at most 31 bytes, the last part of a path.
#[must_use]
pub fn short_name(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or(image);
    last.chars().filter(char::is_ascii).take(31).collect()
}
