//! What the toolstack writes to xenstore.
//!
//! Nodes belong to domain 0 and can be read by the domain that they are about, unless said
//! otherwise. A node that is created takes its parent's permissions, so these are set first.
//!
//! Source: `docs/misc/xenstore-paths.pandoc`, `xen/include/public/io/{xenbus,netif,blkif}.h`.

use crate::store::Op;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use axolotl_abi::system::{Disk, Domain};
use xen_abi::{DomainId, blkif};
use xenbus::Permission;
use xenbus::device::{Device, DeviceKind, home};

/// The domain that owns what the toolstack writes.
const TOOLSTACK: DomainId = DomainId(0);

/// Where in a domain's home the domain itself writes.
const OWN: [&str; 10] = [
    "control/shutdown",
    "control/sysrq",
    "control/feature-poweroff",
    "control/feature-reboot",
    "backend",
    "data",
    "drivers",
    "feature",
    "attr",
    "error",
];

/// A split device that a guest uses, and what its nodes say about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Split {
    pub(crate) device: Device,
    pub(crate) config: Config,
}

/// What the nodes of a split device say about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Config {
    /// A network interface.
    Vif {
        /// Its address.
        mac: [u8; 6],
    },
    /// A disk.
    Vbd(Disk),
}

/// The split devices of a guest. A disk whose name is none is left out: no bundle that was
/// accepted has one.
pub(crate) fn splits(
    domain: &Domain,
    frontend: DomainId,
    id_of: impl Fn(&str) -> DomainId,
) -> Vec<Split> {
    let device = |kind, backend: &str, index| {
        let backend = id_of(backend);
        Device { kind, backend, frontend, index }
    };
    let vifs = (0..).zip(&domain.vifs).map(|(index, vif)| Split {
        device: device(DeviceKind::Vif, &vif.backend, index),
        config: Config::Vif { mac: vif.mac },
    });
    let vbds = domain.disks.iter().filter_map(|disk| {
        let device = device(DeviceKind::Vbd, &disk.backend, blkif::device_number(&disk.dev)?);
        Some(Split { device, config: Config::Vbd(disk.clone()) })
    });
    vifs.chain(vbds).collect()
}

/// Builds a list of operations.
#[derive(Default)]
struct Ops(Vec<Op>);

impl Ops {
    fn write(&mut self, path: &str, key: &str, value: impl ToString) {
        self.0.push(Op::Write(format!("{path}/{key}"), value.to_string().into_bytes()));
    }

    /// A directory that `owner` owns and `reader` may read.
    fn directory(&mut self, path: String, owner: DomainId, reader: DomainId) {
        self.0.push(Op::Mkdir(path.clone()));
        let mut permissions = Vec::from([Permission::owner(owner)]);
        if reader != owner {
            permissions.push(Permission::reader(reader));
        }
        self.0.push(Op::Permissions(path, permissions));
    }
}

/// The home of a domain, without its devices.
pub(crate) fn home_of(domain: &Domain, domid: DomainId) -> Vec<Op> {
    let mut ops = Ops::default();
    let path = home(domid);
    let uuid = format!("00000000-0000-0000-0000-{:012x}", domid.0);
    let memory_kib = u64::from(domain.memory_pages) * 4;
    ops.directory(path.clone(), TOOLSTACK, domid);
    ops.write(&path, "name", &domain.name);
    ops.write(&path, "domid", domid.0);
    ops.write(&path, "vm", format!("/vm/{uuid}"));
    ops.write(&path, "memory/static-max", memory_kib);
    ops.write(&path, "memory/target", memory_kib);
    for vcpu in 0..domain.vcpus.max(1) {
        ops.write(&path, &format!("cpu/{vcpu}/availability"), "online");
    }
    ops.write(&path, "control/platform-feature-xs_reset_watches", 1);
    ops.write(&path, "control/platform-feature-multiprocessor-suspend", 1);
    for node in OWN {
        ops.directory(format!("{path}/{node}"), domid, domid);
    }
    let devices = [("device/vif", domain.vifs.is_empty()), ("device/vbd", domain.disks.is_empty())];
    for (node, _) in devices.iter().filter(|(_, is_empty)| !is_empty) {
        ops.directory(format!("{path}/{node}"), TOOLSTACK, domid);
    }
    ops.directory(format!("/vm/{uuid}"), TOOLSTACK, domid);
    ops.write(&format!("/vm/{uuid}"), "uuid", &uuid);
    ops.write(&format!("/vm/{uuid}"), "name", &domain.name);
    ops.0
}

/// What a guest's last incarnation left in its home goes: the next one would find words that were
/// not for it, and less room than it may have.
pub(crate) fn clean_home(domid: DomainId) -> Vec<Op> {
    let mut ops = Ops::default();
    for node in OWN {
        let path = format!("{}/{node}", home(domid));
        ops.0.push(Op::Rm(path.clone()));
        ops.directory(path, domid, domid);
    }
    ops.0
}

fn mac_text(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// A split device of a guest, as its backend finds it.
pub(crate) fn backend_of(split: &Split) -> Vec<Op> {
    let mut ops = Ops::default();
    let device = &split.device;
    let path = device.backend_path();
    ops.directory(path.clone(), device.backend, device.frontend);
    ops.write(&path, "frontend", device.frontend_path());
    ops.write(&path, "frontend-id", device.frontend.0);
    ops.write(&path, "online", 1);
    match &split.config {
        Config::Vif { mac } => {
            ops.write(&path, "handle", device.index);
            ops.write(&path, "mac", mac_text(*mac));
        }
        Config::Vbd(disk) => {
            ops.write(&path, "removable", 0);
            ops.write(&path, "bootable", 1);
            ops.write(&path, "dev", &disk.dev);
            ops.write(&path, "device-type", "disk");
            ops.write(&path, "params", &disk.volume);
            ops.write(&path, "mode", if disk.writable { "w" } else { "r" });
            ops.write(&path, "format", if disk.cow { "qcow2" } else { "raw" });
            if let Some(backing) = &disk.backing {
                ops.write(&path, "backing", backing);
            }
        }
    }
    ops.write(&path, "state", 1);
    ops.0
}

/// A split device of a guest, as the guest finds it. Written anew for each incarnation of the
/// guest: what the last one left there (its rings and ports) must go, and a backend that is
/// connected to it takes the state 1 as word that there is a new one.
pub(crate) fn frontend_of(split: &Split) -> Vec<Op> {
    let mut ops = Ops::default();
    let device = &split.device;
    let path = device.frontend_path();
    ops.0.push(Op::Rm(path.clone()));
    ops.directory(path.clone(), device.frontend, device.backend);
    ops.write(&path, "backend", device.backend_path());
    ops.write(&path, "backend-id", device.backend.0);
    match &split.config {
        Config::Vif { mac } => {
            ops.write(&path, "handle", device.index);
            ops.write(&path, "mac", mac_text(*mac));
        }
        Config::Vbd(_) => {
            ops.write(&path, "virtual-device", device.index);
            ops.write(&path, "device-type", "disk");
        }
    }
    ops.write(&path, "trusted", 1);
    ops.write(&path, "state", 1);
    ops.0
}

/// Takes a domain and its devices out of the tree.
pub(crate) fn remove(domid: DomainId, splits: &[Split]) -> Vec<Op> {
    let mut ops = Vec::new();
    ops.extend(splits.iter().map(|split| Op::Rm(split.device.backend_path())));
    ops.push(Op::Rm(home(domid)));
    ops.push(Op::Rm(format!("/vm/00000000-0000-0000-0000-{:012x}", domid.0)));
    ops
}
