//! A ramdisk with a shell, modules, and an init that brings network and disk up.

use super::packages::{self, files};
use super::read;
use kernel_image::Archive;
use miette::{Context, IntoDiagnostic, miette};
use object::read::elf::{Dyn, FileHeader};
use object::{Endianness, elf};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What is in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// A shell.
    Plain,
    /// Besides, what tests and measurements use.
    Tools,
}

const INIT: &str = include_str!("../../../guests/debian/init");
const DHCP: &str = include_str!("../../../guests/debian/udhcpc.sh");

/// Modules of the kernel that are loaded in this order, each behind those that it needs. A kernel
/// may have some built in.
const MODULES: [&str; 4] = ["crc32c_generic", "ext4", "xen-blkfront", "xen-netfront"];
/// Drivers of the emulated machine's devices, for the same kernel without a hypervisor.
const MACHINE_MODULES: [&str; 2] = ["nvme", "e1000e"];

/// Programs of busybox that scripts and people expect by name.
const APPLETS: &str = "sh mount umount cat echo ls ps dmesg sync uname nproc sleep free ip \
    ping ping6 wget nc dd mkdir rm cp mv head tail grep sed awk date udhcpc ifconfig route insmod \
    lsmod vi top kill md5sum sha256sum hexdump stty cttyhack setsid df mknod seq wc tr cut tee touch \
    time timeout find true false test cmp diff blockdev expr";

/// Programs of the tools, and where the ramdisk has them.
const PROGRAMS: [(&str, &str); 5] = [
    ("usr/bin/fio", "bin/fio"),
    ("usr/bin/iperf3", "bin/iperf3"),
    ("sbin/mke2fs", "sbin/mkfs.ext4"),
    ("sbin/e2fsck", "sbin/e2fsck"),
    ("sbin/ethtool", "sbin/ethtool"),
];
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Makes the ramdisk for the unpacked package of a kernel.
pub(super) fn make(kernel: &Path, kind: Kind) -> miette::Result<Vec<u8>> {
    let busybox = read(&packages::unpacked("busybox-static")?.join("bin/busybox"))?;
    let mut archive = Archive::default();
    for dir in ["bin", "sbin", "dev", "proc", "sys", "etc", "tmp", "lib", "lib64", "lib/modules"] {
        archive.directory(dir);
    }
    archive.characters("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &busybox);
    for applet in APPLETS.split_whitespace() {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    for applet in ["poweroff", "reboot", "halt"] {
        archive.link(&format!("sbin/{applet}"), "/bin/busybox");
    }
    archive.file("etc/udhcpc.sh", 0o755, DHCP.as_bytes());
    archive.file("init", 0o755, INIT.as_bytes());
    let mut modules = Modules::find(&kernel.join("lib/modules"))?;
    for name in MODULES {
        modules.add(name)?;
    }
    if kind == Kind::Tools {
        for name in MACHINE_MODULES {
            modules.add(name)?;
        }
        add_tools(&mut archive)?;
    }
    for (order, (name, bytes)) in modules.loaded.iter().enumerate() {
        archive.file(&format!("lib/modules/{order:02}-{name}.ko"), 0o644, bytes);
    }
    Ok(archive.finish())
}

/// The modules of a kernel, and those that are to be loaded.
struct Modules {
    files: BTreeMap<String, PathBuf>,
    /// Names and contents, in order.
    loaded: Vec<(String, Vec<u8>)>,
}

impl Modules {
    fn find(dir: &Path) -> miette::Result<Self> {
        let files = files(dir)?.into_iter().filter_map(|path| {
            let name = path.file_name()?.to_str()?.strip_suffix(".ko")?.replace('-', "_");
            Some((name, path))
        });
        Ok(Self { files: files.collect(), loaded: Vec::new() })
    }

    /// Adds a module behind those that it says it needs.
    fn add(&mut self, name: &str) -> miette::Result<()> {
        let name = name.replace('-', "_");
        let Some(path) = self.files.get(&name) else { return Ok(()) };
        if self.loaded.iter().any(|(loaded, _)| *loaded == name) {
            return Ok(());
        }
        let bytes = read(path)?;
        for needed in needed_modules(&bytes) {
            self.add(&needed)?;
        }
        self.loaded.push((name, bytes));
        Ok(())
    }
}

/// What a module's `depends` says.
fn needed_modules(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let start = module.windows(KEY.len()).position(|bytes| bytes == KEY);
    let value = start.map_or(&[][..], |at| &module[at + KEY.len()..]);
    let value = value.split(|byte| *byte == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// Adds the tools and the libraries that they are linked with, all in `/lib`.
fn add_tools(archive: &mut Archive) -> miette::Result<()> {
    let tools = packages::tools()?;
    let mut libraries = BTreeMap::new();
    for path in files(&tools)? {
        if let Some(name) = path.file_name().and_then(|name| name.to_str())
            && name.contains(".so")
        {
            libraries.entry(name.to_owned()).or_insert(path);
        }
    }
    let mut wanted = BTreeSet::from([LOADER.to_owned()]);
    let mut queue = Vec::new();
    for (from, to) in PROGRAMS {
        let bytes = read(&tools.join(from))?;
        queue.extend(needed_libraries(&bytes).wrap_err(from)?);
        archive.file(to, 0o755, &bytes);
    }
    while let Some(name) = queue.pop() {
        if wanted.contains(&name) {
            continue;
        }
        let path = libraries.get(&name).ok_or_else(|| miette!("no package has {name}"))?;
        queue.extend(needed_libraries(&read(path)?).wrap_err_with(|| name.clone())?);
        wanted.insert(name);
    }
    for name in wanted {
        let path = libraries.get(&name).ok_or_else(|| miette!("no package has {name}"))?;
        archive.file(&format!("lib/{name}"), 0o755, &read(path)?);
    }
    archive.link(&format!("lib64/{LOADER}"), &format!("/lib/{LOADER}"));
    archive.file("etc/mke2fs.conf", 0o644, &read(&tools.join("etc/mke2fs.conf"))?);
    archive.link("etc/mtab", "/proc/mounts");
    Ok(())
}

/// The libraries that a program or library is linked with.
fn needed_libraries(file: &[u8]) -> miette::Result<Vec<String>> {
    let header = elf::FileHeader64::<Endianness>::parse(file).into_diagnostic()?;
    let endian = header.endian().into_diagnostic()?;
    let sections = header.sections(endian, file).into_diagnostic()?;
    let dynamic = sections.dynamic(endian, file).into_diagnostic()?;
    let Some((entries, strings)) = dynamic else { return Ok(Vec::new()) };
    let strings = sections.strings(endian, file, strings).into_diagnostic()?;
    let needed = entries.iter().filter(|entry| entry.tag(endian) == elf::DT_NEEDED);
    needed
        .map(|entry| {
            let name = entry.string(endian, strings).into_diagnostic()?;
            Ok(String::from_utf8_lossy(name).into_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_says_what_it_needs() {
        let module = b"\x7fELF\0license=GPL\0depends=jbd2,mbcache\0retpoline=Y\0";
        assert_eq!(needed_modules(module), ["jbd2", "mbcache"]);
        assert!(needed_modules(b"\0depends=\0x").is_empty());
        assert!(needed_modules(b"nothing").is_empty());
    }

    #[test]
    fn our_own_program_is_linked_with_the_c_library() {
        let own = std::fs::read(std::env::current_exe().expect("a test")).expect("readable");
        let needed = needed_libraries(&own).expect("an ELF file");
        assert!(needed.iter().any(|name| name.starts_with("libc.so")), "{needed:?}");
    }
}
