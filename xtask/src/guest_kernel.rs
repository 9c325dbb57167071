//! Kernels and ramdisks of guests: from a path, or from a distribution's packages.
//!
//! `kernel = "debian"` is the cloud kernel of the Debian that apt knows here, `"debian-full"` the one
//! with all drivers. Both come by apt's own download command into a cache, and with a ramdisk made
//! from busybox-static and the kernel's Xen frontends.

use crate::project;
use kernel_image::Archive;
use miette::{Context, IntoDiagnostic, miette};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Packages that always name the newest kernel, by what a system file calls them.
const KERNELS: [(&str, &str); 2] =
    [("debian", "linux-image-cloud-amd64"), ("debian-full", "linux-image-amd64")];

/// What of a kernel's modules goes into the ramdisk, in the order in which they are loaded; those
/// that are built in are not there.
const MODULES: [&str; 9] = [
    "crc16",
    "crc32c_generic",
    "libcrc32c",
    "mbcache",
    "jbd2",
    "ext4",
    "xen-blkfront",
    "xen-netfront",
    "failover",
];

/// Programs of busybox that scripts and people expect by name.
const APPLETS: &str = "sh mount umount cat echo ls ps dmesg reboot halt sync uname nproc sleep free ip \
    ping wget nc dd mkdir rm cp mv head tail grep sed awk date udhcpc ifconfig route insmod lsmod vi \
    top kill md5sum sha256sum hexdump stty cttyhack setsid df mknod seq wc tr cut tee touch time find";

/// The first program. Shutdown requests of the toolstack run `/sbin/poweroff` or `/sbin/reboot`.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /mnt && mount -t devpts pts /dev/pts
for module in /lib/modules/*.ko; do insmod "$module" 2>/dev/null; done
echo "init: $(uname -r), $(nproc) processors"
if [ -e /sys/class/net/eth0 ]; then
    ip link set lo up
    ip link set eth0 up
    udhcpc -i eth0 -n -q -s /etc/udhcpc.sh >/dev/null 2>&1 && echo "init: $(ip -o -4 addr show eth0)"
fi
for wait in 1 2 3 4 5; do [ -e /dev/xvda ] && break; [ -e /sys/bus/xen/devices/vbd-51712 ] || break; sleep 1; done
[ -e /dev/xvda ] && mount /dev/xvda /mnt 2>/dev/null && echo "init: xvda is at /mnt"
for word in $(cat /proc/cmdline); do case "$word" in init.run=*) sh -c "$(echo "${word#init.run=}" | tr , ' ')";; esac; done
echo "init: ready"
while :; do setsid cttyhack sh </dev/hvc0 >/dev/hvc0 2>&1; done
"#;

const DHCP: &str = r#"#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr flush dev "$interface"
ip addr add "$ip/${mask:-24}" dev "$interface"
for to in $router; do ip route add default via "$to" dev "$interface"; done
: > /etc/resolv.conf
for server in $dns; do echo "nameserver $server" >> /etc/resolv.conf; done
"#;

/// The flat image of the kernel that a system file names.
///
/// # Errors
/// There is no such file, or it is no kernel that can run.
pub fn kernel(system: &Path, named: &str) -> miette::Result<Vec<u8>> {
    let path = match package(named) {
        Some(package) => find(&unpacked(package)?.join("boot"), "vmlinuz-")?,
        None => resolve(system, named)?,
    };
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
    let bytes = match package(named) {
        Some(package) => small_system(package)?,
        None => read(&resolve(system, named)?)?,
    };
    Ok(kernel_image::ramdisk(&bytes))
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

/// The only entry of a directory that begins so.
fn find(dir: &Path, start: &str) -> miette::Result<PathBuf> {
    let entries = std::fs::read_dir(dir).into_diagnostic()?;
    let names = entries.filter_map(Result::ok).map(|entry| entry.path());
    let mut found = names
        .filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(start)));
    found.next().ok_or_else(|| miette!("nothing in {} begins with {start}", dir.display()))
}

/// The content of a package, downloaded and unpacked once.
fn unpacked(package: &str) -> miette::Result<PathBuf> {
    let cache = project::root().join("target/guest-packages");
    let dir = cache.join(package);
    if dir.join("done").exists() {
        return Ok(dir);
    }
    std::fs::create_dir_all(&dir).into_diagnostic()?;
    let real = newest(package)?;
    eprintln!("downloading {real} by apt");
    run(Command::new("apt-get").current_dir(&dir).args(["download", &real]))?;
    let archive = find(&dir, &format!("{real}_"))?;
    run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&dir))?;
    std::fs::write(dir.join("done"), real).into_diagnostic()?;
    Ok(dir)
}

/// The package that a kernel's metapackage stands for; others stand for themselves.
fn newest(package: &str) -> miette::Result<String> {
    let output = Command::new("apt-cache").args(["depends", package]).output();
    let output = output.into_diagnostic().wrap_err("cannot start apt-cache")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let real = names.find(|name| name.starts_with("linux-image-"));
    Ok(real.unwrap_or(package).to_owned())
}

fn run(command: &mut Command) -> miette::Result<()> {
    let shown = format!("{command:?}");
    let status = command.status().into_diagnostic().wrap_err_with(|| shown.clone())?;
    if status.success() {
        return Ok(());
    }
    let help = "kernels of Debian come by apt; on other systems name a file";
    Err(miette!(help = help, "{shown} failed: {status}"))
}

/// A ramdisk with a shell, the frontends' modules, and an init that connects both.
fn small_system(package: &str) -> miette::Result<Vec<u8>> {
    let kernel = unpacked(package)?;
    let busybox = read(&unpacked("busybox-static")?.join("bin/busybox"))?;
    let mut archive = Archive::default();
    for dir in ["bin", "sbin", "dev", "proc", "sys", "etc", "tmp", "lib", "lib/modules"] {
        archive.directory(dir);
    }
    archive.characters("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &busybox);
    for applet in APPLETS.split_whitespace() {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    let off = |how: &str| format!("#!/bin/sh\nsync\nexec busybox {how} -f\n");
    for how in ["poweroff", "reboot"] {
        archive.file(&format!("sbin/{how}"), 0o755, off(how).as_bytes());
    }
    archive.file("etc/udhcpc.sh", 0o755, DHCP.as_bytes());
    archive.file("init", 0o755, INIT.as_bytes());
    let mut modules = Vec::new();
    collect(&kernel.join("lib/modules"), &mut modules)?;
    for (order, name) in MODULES.iter().enumerate() {
        let wanted = format!("{name}.ko");
        if let Some(path) = modules.iter().find(|path| path.ends_with(&wanted)) {
            archive.file(&format!("lib/modules/{order}-{wanted}"), 0o644, &read(path)?);
        }
    }
    Ok(archive.finish())
}

/// All files below a directory.
fn collect(dir: &Path, found: &mut Vec<PathBuf>) -> miette::Result<()> {
    for entry in std::fs::read_dir(dir).into_diagnostic()? {
        let path = entry.into_diagnostic()?.path();
        if path.is_dir() && !path.is_symlink() {
            collect(&path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
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
