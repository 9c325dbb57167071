//! What `qemu-img` and `qemu-io` say.

use crate::disk::{Disks, Sparse};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Whether the tools are there; says so aloud when they are not.
pub fn is_here() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: qemu-img is not installed (Debian: qemu-utils)");
    }
    found
}

/// A folder of its own for a test.
pub fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("qcow2-test-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// Runs a tool and returns what it says.
pub fn run(folder: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).current_dir(folder).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

/// Has `qemu-img` check the image, and compare it with what it should read as.
pub fn judge(disks: &Disks, raw: &[u8], name: &str) {
    if !is_here() {
        return;
    }
    let folder = folder(name);
    disks.backing.save(&folder.join("backing.raw"));
    disks.image.save(&folder.join("image.qcow2"));
    std::fs::write(folder.join("model.raw"), raw).unwrap();
    run(&folder, "qemu-img", &["check", "-f", "qcow2", "image.qcow2"]);
    let compare = ["compare", "-f", "raw", "-F", "qcow2", "model.raw", "image.qcow2"];
    run(&folder, "qemu-img", &compare);
    std::fs::remove_dir_all(folder).unwrap();
}

/// An image that the tools made, on a volume of `extent` bytes.
pub fn load(path: &Path, extent: u64) -> Sparse {
    Sparse::from_bytes(&std::fs::read(path).unwrap(), extent)
}
