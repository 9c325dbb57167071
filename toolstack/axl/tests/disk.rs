//! `axl disk`, judged by `qemu-img` where that is installed.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("axl-disk-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).unwrap();
    path
}

fn axl(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_axl"));
    command.current_dir(folder).arg("disk").args(arguments).output().unwrap()
}

/// What it says, as JSON.
fn well(folder: &Path, arguments: &[&str]) -> Value {
    let output = axl(folder, &[arguments, &["--json"]].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What it complains about.
fn badly(folder: &Path, arguments: &[&str]) -> String {
    let output = axl(folder, arguments);
    assert!(!output.status.success(), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap().trim().to_owned()
}

/// Runs a tool of QEMU; `None` when it is not installed.
fn qemu(folder: &Path, program: &str, arguments: &[&str]) -> Option<String> {
    let Ok(output) = Command::new(program).current_dir(folder).args(arguments).output() else {
        eprintln!("SKIPPED: {program} is not installed (Debian: qemu-utils)");
        return None;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn a_disk_as_a_file_is_one_that_qemu_takes() {
    let folder = folder("file");
    let made = well(&folder, &["create", "a.qcow2", "--size", "64M", "--cluster-size", "4K"]);
    assert_eq!((made["virtual_bytes"].as_u64(), made["backing"].as_str()), (Some(64 << 20), None));
    let fill = ["-f", "qcow2", "-c", "write -P 7 1M 3M", "a.qcow2"];
    if qemu(&folder, "qemu-io", &fill).is_some() {
        qemu(&folder, "qemu-img", &["check", "a.qcow2"]);
        let info = well(&folder, &["info", "a.qcow2"]);
        assert_eq!(info["allocated_bytes"].as_u64(), Some(3 << 20));
        assert_eq!(info["check"]["errors"].as_u64(), Some(0));
        assert_eq!(info["check"]["leaks"].as_u64(), Some(0));
    }
    assert!(badly(&folder, &["create", "a.qcow2", "--size", "1M"]).contains("exists"));
    assert_eq!(badly(&folder, &["create", "b.qcow2"]), "axl: say how large it is: --size");
    well(&folder, &["create", "a.qcow2", "--size", "1M", "--force"]);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn disks_in_partitions_have_each_other_behind_them() {
    let folder = folder("parts");
    let parts = well(&folder, &["partition", "disk.img", "base=8M,cow=16M,more=16M"]);
    assert_eq!(parts["partitions"][1]["offset"].as_u64(), Some(9 << 20));
    let made =
        well(&folder, &["create", "disk.img", "--partition", "cow", "--backing", "gpt:base"]);
    assert_eq!(made["virtual_bytes"].as_u64(), Some(8 << 20));
    let again = badly(&folder, &["create", "disk.img", "--partition", "cow", "--size", "8M"]);
    assert!(again.contains("holds an image already"), "{again}");
    let name = made["backing"].as_str().unwrap();
    assert!(name.contains("\"offset\":1048576"), "{name}");
    well(&folder, &["create", "disk.img", "--partition", "more", "--size", "4M"]);
    well(&folder, &["snapshot", "disk.img:gpt:more", "top.qcow2"]);
    assert_eq!(well(&folder, &["info", "top.qcow2"])["virtual_bytes"].as_u64(), Some(4 << 20));
    if qemu(&folder, "qemu-img", &["check", "-f", "qcow2", "top.qcow2"]).is_some() {
        // The backing files are found by the names in the images.
        qemu(&folder, "qemu-io", &["-f", "qcow2", "-c", "read -P 0 0 4M", "top.qcow2"]);
        let part = "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"raw\",\"offset\":9437184,\
                    \"size\":16777216,\"file\":{\"driver\":\"file\",\"filename\":\"disk.img\"}}}";
        qemu(&folder, "qemu-img", &["check", part]);
        qemu(&folder, "qemu-io", &["-c", "read -P 0 0 8M", "-c", "write -P 3 1M 5k", part]);
        let info = well(&folder, &["info", "disk.img:gpt:cow"]);
        assert_eq!(info["allocated_bytes"].as_u64(), Some(65536));
        assert_eq!(info["check"]["errors"].as_u64(), Some(0));
    }
    let chained = badly(&folder, &["snapshot", "top.qcow2", "b.qcow2"]);
    assert!(chained.contains("one image behind another"), "{chained}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn mistakes_are_told() {
    let folder = folder("mistakes");
    well(&folder, &["partition", "disk.img", "a=1M"]);
    for (arguments, message) in [
        (&["info", "disk.img"][..], "no qcow2 image there"),
        (&["info", "disk.img:gpt:b"], "has no partition `b`"),
        (&["info", "disk.img:range:1M+64M"], "is not inside of the file"),
        (&["info", "absent"], "No such file"),
        (&["partition", "disk.img", "a=1M"], "exists"),
        (&["partition", "new.img", "a"], "write NAME=SIZE"),
        (&["partition", "new.img", "a=1M,a=2M"], "two partitions `a`"),
        (&["create", "x", "--size", "1M", "--cluster-size", "3K"], "no cluster size"),
        (&["create", "x", "--size", "100"], "is no size"),
        (&["create", "disk.img", "--range", "0+4K", "--size", "1M"], "too small"),
        (
            &["create", "disk.img", "--partition", "a", "--backing", "range:1M+64K"],
            "overlaps its backing volume",
        ),
    ] {
        let said = badly(&folder, arguments);
        assert!(said.contains(message), "{arguments:?}: {said}");
    }
    assert!(!folder.join("x").exists());
    std::fs::remove_dir_all(folder).unwrap();
}
