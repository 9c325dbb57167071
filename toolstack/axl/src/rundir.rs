//! Where the sockets of running systems are.
//!
//! `${XDG_RUNTIME_DIR:-/tmp}/axolotl-<uid>/<system>/axl.sock`

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Name of the socket in a system's directory.
const SOCKET: &str = "axl.sock";

/// The directory of all running systems of this user.
#[must_use]
pub fn base() -> PathBuf {
    let root = std::env::var_os("XDG_RUNTIME_DIR").filter(|root| !root.is_empty());
    let root = root.map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
    root.join(format!("axolotl-{}", user()))
}

/// The socket of the system named `system`. Creates nothing.
#[must_use]
pub fn socket_path(system: &str) -> PathBuf {
    base().join(system).join(SOCKET)
}

/// Names and sockets of all systems that have one, running or not.
#[must_use]
pub fn sockets() -> Vec<(String, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(base()) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .flatten()
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path().join(SOCKET)))
        .filter(|(_, socket)| socket.exists())
        .collect();
    found.sort();
    found
}

/// Creates the directory for `socket`, for this user alone.
///
/// # Errors
/// Also when the directory belongs to somebody else, who could then listen in our place.
pub fn create_for(socket: &Path) -> io::Result<()> {
    let Some(directory) = socket.parent() else { return Ok(()) };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    for checked in [Some(directory), directory.parent()].into_iter().flatten() {
        let ours = checked == Path::new("/tmp") || std::fs::metadata(checked)?.uid() == user();
        if !ours && checked.starts_with(base()) {
            let message = format!("{} belongs to another user", checked.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
    }
    Ok(())
}

/// This process's user.
fn user() -> u32 {
    std::fs::metadata("/proc/self").map_or(0, |own| own.uid())
}
