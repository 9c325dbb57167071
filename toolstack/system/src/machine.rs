//! The machine that the host emulates.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};

/// What QEMU is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Machine {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// QEMU's name of the processor model; `None` leaves the choice to the one who starts it.
    pub cpu_model: Option<String>,
    /// Network cards.
    pub nics: Vec<MachineNic>,
    /// Disks. Those at the same address hang on one controller, which counts them in this order
    /// from 1.
    pub disks: Vec<MachineDisk>,
}

impl Machine {
    /// QEMU's name of the device at `bdf`, if the machine emulates one there.
    #[must_use]
    pub fn model_at(&self, bdf: u32) -> Option<&str> {
        let nics = self.nics.iter().map(|nic| (nic.bdf, nic.model.as_str()));
        let disks = self.disks.iter().map(|disk| (disk.bdf, disk.model.as_str()));
        nics.chain(disks).find(|(at, _)| *at == bdf).map(|(_, model)| model)
    }

    /// The disks of the controller at `bdf`, in its order.
    pub fn disks_at(&self, bdf: u32) -> impl Iterator<Item = &MachineDisk> {
        self.disks.iter().filter(move |disk| disk.bdf == bdf)
    }
}

/// An emulated network card.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MachineNic {
    /// QEMU's name of the device.
    pub model: String,
    /// PCI address, as in [`axolotl_abi::control::PciFunction`].
    pub bdf: u32,
    /// Its own Ethernet address; `None`: QEMU's choice.
    pub mac: Option<[u8; 6]>,
    /// What it is plugged into.
    pub net: NicNet,
}

/// What an emulated network card is plugged into.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NicNet {
    /// QEMU's user-mode network.
    User {
        /// Ports of the host that lead to a guest.
        host_forward: Vec<HostForward>,
    },
    /// A socket that carries the frames, for instance to another QEMU.
    Socket {
        /// Waits for a peer at this `HOST:PORT`.
        listen: Option<String>,
        /// Connects to this `HOST:PORT`.
        connect: Option<String>,
    },
}

/// An emulated disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MachineDisk {
    /// QEMU's name of the controller.
    pub model: String,
    /// The controller's PCI address, as in [`axolotl_abi::control::PciFunction`].
    pub bdf: u32,
    /// The host's file as written; [`Self::path`] says where that is.
    pub file: String,
    /// How the host's file stores the disk.
    pub format: FileFormat,
    /// Whether the disk refuses writes.
    pub readonly: bool,
    /// What a file that does not exist yet is made of.
    pub content: DiskContent,
    /// The disk's serial number.
    pub serial: String,
    /// Bytes of its sectors.
    pub sector_size: u32,
}

impl MachineDisk {
    /// Where its file is: a path that starts with `./` or `../` is relative to the system file,
    /// any other that is not absolute to `made`, the directory of what is made for the system.
    #[must_use]
    pub fn path(&self, system_file: &Path, made: &Path) -> PathBuf {
        let beside = self.file.starts_with("./") || self.file.starts_with("../");
        let base = if beside { system_file.parent().unwrap_or(Path::new("")) } else { made };
        base.join(&self.file)
    }

    /// Its size, if the system file decides it.
    #[must_use]
    pub const fn bytes(&self) -> Option<u64> {
        match self.content {
            DiskContent::Empty { bytes } | DiskContent::Partitions { bytes, .. } => Some(bytes),
            DiskContent::Existing | DiskContent::DemoFiles => None,
        }
    }
}

/// How the host's file stores an emulated disk. The guests see the same disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileFormat {
    /// Byte for byte.
    Raw,
    /// As qcow2, by QEMU.
    Qcow2,
}

/// What is on an emulated disk at first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DiskContent {
    /// The file must be there.
    Existing,
    /// Nothing.
    Empty {
        /// Size in bytes.
        bytes: u64,
    },
    /// A GPT.
    Partitions {
        /// Size in bytes.
        bytes: u64,
        /// In order of their places.
        partitions: Vec<Partition>,
    },
    /// The files that the demo guest serves. Made anew when they change.
    DemoFiles,
}

/// A partition of an emulated disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Partition {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// It holds an empty qcow2 image of a disk of this size.
    pub cow_bytes: Option<u64>,
}

/// A port of the host that leads to a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostForward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where the host listens.
    pub host: SocketAddrV4,
    /// The guest's address; `None`: the first one that the user network gives out.
    pub guest: Option<Ipv4Addr>,
    /// The guest's port.
    pub guest_port: u16,
}

/// What a port forward carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// QEMU's `hostfwd=` form.
impl fmt::Display for HostForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let guest = self.guest.map_or(String::new(), |address| address.to_string());
        write!(f, "{}:{}-{guest}:{}", self.protocol, self.host, self.guest_port)
    }
}

impl HostForward {
    /// Parses `[tcp:|udp:]HOST:PORT-[GUEST]:PORT`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (protocol, rest) = match text.split_once(':') {
            Some(("tcp", rest)) => (Protocol::Tcp, rest),
            Some(("udp", rest)) => (Protocol::Udp, rest),
            _ => (Protocol::Tcp, text),
        };
        let (host, guest) = rest.split_once('-')?;
        let (address, port) = guest.rsplit_once(':')?;
        let guest = if address.is_empty() { None } else { Some(address.parse().ok()?) };
        let host: SocketAddrV4 = host.parse().ok()?;
        let guest_port: u16 = port.parse().ok()?;
        (host.port() != 0 && guest_port != 0).then_some(Self { protocol, host, guest, guest_port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dot_means_beside_the_system_file() {
        let disk = |file: &str| MachineDisk {
            model: "nvme".into(),
            bdf: 0x20,
            file: file.into(),
            format: FileFormat::Raw,
            readonly: false,
            content: DiskContent::Existing,
            serial: "x".into(),
            sector_size: 512,
        };
        for (file, path) in [
            ("disk.raw", "/made/disk.raw"),
            ("a/b.raw", "/made/a/b.raw"),
            ("./disk.raw", "/sys/disk.raw"),
            ("../disk.raw", "/sys/../disk.raw"),
            ("/dev/sdx", "/dev/sdx"),
        ] {
            let found = disk(file).path(Path::new("/sys/x.toml"), Path::new("/made"));
            assert!(found.components().eq(Path::new(path).components()), "{}", found.display());
        }
    }

    #[test]
    fn forwards_are_printed_as_qemu_wants_them() {
        for (text, shown) in [
            ("127.0.0.1:8080-:80", Some("tcp:127.0.0.1:8080-:80")),
            ("udp:0.0.0.0:53-10.0.2.15:53", Some("udp:0.0.0.0:53-10.0.2.15:53")),
            ("127.0.0.1:8080", None),
            ("127.0.0.1:8080-80", None),
            ("127.0.0.1:0-:80", None),
            ("sctp:127.0.0.1:1-:1", None),
        ] {
            let parsed = HostForward::parse(text).map(|forward| forward.to_string());
            assert_eq!(parsed.as_deref(), shown, "{text}");
        }
    }
}
