//! Kernels and ramdisks of guests: from a path, or from a distribution's packages.
//!
//! `kernel = "debian"` is the cloud kernel of the Debian that apt knows here, `"debian-full"` the one
//! with all drivers. Both come by apt's own download command into a cache, and with a ramdisk made
//! from busybox-static and the kernel's Xen frontends. `ramdisk = "debian-tools"` and
//! `"debian-full-tools"` have besides what tests and measurements use: fio, iperf3, mke2fs,
//! ethtool, and the drivers of the emulated machine's own card and disk.

mod packages;
mod small_system;

pub use packages::host_program;

use miette::{Context, IntoDiagnostic, miette};
use packages::find;
use small_system::Kind;
use std::path::{Path, PathBuf};

/// Packages that always name the newest kernel, by what a system file calls them.
const KERNELS: [(&str, &str); 2] =
    [("debian", "linux-image-cloud-amd64"), ("debian-full", "linux-image-amd64")];

/// Behind a kernel's name: its ramdisk with tools.
const TOOLS: &str = "-tools";

/// The flat image of the kernel that a system file names.
///
/// # Errors
/// There is no such file, or it is no kernel that can run.
pub fn kernel(system: &Path, named: &str) -> miette::Result<Vec<u8>> {
    from_file(&kernel_file(system, named)?)
}

/// The package of this workspace that a system file names as a kernel, by its directory.
#[must_use]
pub fn package_of_ours(system: &Path, named: &str) -> Option<String> {
    let dir = resolve(system, named).ok().filter(|path| path.join("Cargo.toml").is_file())?;
    Some(dir.file_name()?.to_str()?.to_owned())
}

/// The flat image of a kernel in a file.
///
/// # Errors
/// As [`kernel`].
pub fn from_file(path: &Path) -> miette::Result<Vec<u8>> {
    kernel_image::kernel(&read(path)?)
        .into_diagnostic()
        .wrap_err_with(|| format!("{} cannot be a guest's kernel", path.display()))
}

/// The file of the kernel that a system file names, as its distribution made it.
///
/// # Errors
/// There is no such file.
pub fn kernel_file(system: &Path, named: &str) -> miette::Result<PathBuf> {
    match package(named) {
        Some(package) => {
            find(&packages::unpacked(&packages::newest(package)?)?.join("boot"), "vmlinuz-")
        }
        None => resolve(system, named),
    }
}

/// The ramdisk that a system file names.
///
/// # Errors
/// There is no such file.
pub fn ramdisk_file(system: &Path, named: &str) -> miette::Result<Vec<u8>> {
    let (kernel, kind) = match named.strip_suffix(TOOLS) {
        Some(kernel) => (kernel, Kind::Tools),
        None => (named, Kind::Plain),
    };
    match package(kernel) {
        Some(package) => {
            small_system::make(&packages::unpacked(&packages::newest(package)?)?, kind)
        }
        None => read(&resolve(system, named)?),
    }
}

/// The flat image of the ramdisk that a system file names.
///
/// # Errors
/// There is no such file.
pub fn ramdisk(system: &Path, named: &str) -> miette::Result<Vec<u8>> {
    Ok(kernel_image::ramdisk(&ramdisk_file(system, named)?))
}

fn package(named: &str) -> Option<&'static str> {
    KERNELS.iter().find(|(name, _)| *name == named).map(|(_, package)| *package)
}

fn read(path: &Path) -> miette::Result<Vec<u8>> {
    std::fs::read(path)
        .into_diagnostic()
        .wrap_err_with(|| format!("cannot read {}", path.display()))
}

/// A path as the system file means it: from its own directory.
fn resolve(system: &Path, named: &str) -> miette::Result<PathBuf> {
    if !named.contains(['/', '.']) {
        let known = KERNELS.map(|(name, _)| name).join(", ");
        let help = format!("known: {known}; or write a path, such as `kernel = \"./vmlinuz\"`");
        return Err(miette!(help = help, "no kernel is known as `{named}`"));
    }
    let path = Path::new(named);
    Ok(system.parent().map_or_else(|| path.into(), |dir| dir.join(path)))
}

/// A name that a bundle can hold: at most 31 bytes, the last part of a path.
#[must_use]
pub fn short_name(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or(image);
    last.chars().filter(char::is_ascii).take(31).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_start_at_the_system_file() {
        let found = resolve(Path::new("/a/systems/x.toml"), "../k/vmlinuz").expect("a path");
        assert_eq!(found, Path::new("/a/systems/../k/vmlinuz"));
        let error = resolve(Path::new("x.toml"), "gentoo").expect_err("no such distribution");
        assert_eq!(error.to_string(), "no kernel is known as `gentoo`");
        assert!(package("debian").is_some());
    }

    #[test]
    fn names_fit_into_a_bundle() {
        assert_eq!(short_name("kernel:/boot/vmlinuz"), "vmlinuz");
        assert_eq!(short_name(&"x".repeat(40)).len(), 31);
        assert_eq!(short_name("kernel:debian"), "kernel:debian");
    }
}
