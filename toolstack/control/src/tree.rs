//! What the toolstack writes to xenstore.
//!
//! Nodes belong to domain 0 and can be read by the domain that they are about, unless said
//! otherwise. A node that is created takes its parent's permissions, so these are set first.
//!
//! Source: `docs/misc/xenstore-paths.pandoc`, `xen/include/public/io/{xenbus,netif}.h`.

use crate::store::Op;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use axolotl_abi::system::Domain;
use xen_abi::DomainId;
use xenbus::Permission;
use xenbus::device::{Device, DeviceKind, home};

/// The domain that owns what the toolstack writes.
const TOOLSTACK: DomainId = DomainId(0);

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
    ops.write(&path, "cpu/0/availability", "online");
    ops.write(&path, "control/platform-feature-xs_reset_watches", 1);
    ops.write(&path, "control/platform-feature-multiprocessor-suspend", 1);
    for node in ["shutdown", "sysrq", "feature-poweroff", "feature-reboot"] {
        ops.directory(format!("{path}/control/{node}"), domid, domid);
    }
    for node in ["device/vif", "backend", "data", "drivers", "feature", "attr", "error"] {
        if node == "device/vif" && domain.vifs.is_empty() {
            continue;
        }
        let owner = if node.starts_with("device") { TOOLSTACK } else { domid };
        ops.directory(format!("{path}/{node}"), owner, domid);
    }
    ops.directory(format!("/vm/{uuid}"), TOOLSTACK, domid);
    ops.write(&format!("/vm/{uuid}"), "uuid", &uuid);
    ops.write(&format!("/vm/{uuid}"), "name", &domain.name);
    ops.0
}

fn mac_text(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// The interface number `index` of a guest, as its backend finds it.
pub(crate) fn backend_of(vif: Device, mac: [u8; 6]) -> Vec<Op> {
    let mut ops = Ops::default();
    let path = vif.backend_path();
    ops.directory(path.clone(), vif.backend, vif.frontend);
    ops.write(&path, "frontend", vif.frontend_path());
    ops.write(&path, "frontend-id", vif.frontend.0);
    ops.write(&path, "online", 1);
    ops.write(&path, "handle", vif.index);
    ops.write(&path, "mac", mac_text(mac));
    ops.write(&path, "state", 1);
    ops.0
}

/// The interface number `index` of a guest, as the guest finds it. Written anew for each
/// incarnation of the guest: what the last one left there (its rings and ports) must go, and a
/// backend that is connected to it takes the state 1 as word that there is a new one.
pub(crate) fn frontend_of(vif: Device, mac: [u8; 6]) -> Vec<Op> {
    let mut ops = Ops::default();
    let path = vif.frontend_path();
    ops.0.push(Op::Rm(path.clone()));
    ops.directory(path.clone(), vif.frontend, vif.backend);
    ops.write(&path, "backend", vif.backend_path());
    ops.write(&path, "backend-id", vif.backend.0);
    ops.write(&path, "handle", vif.index);
    ops.write(&path, "mac", mac_text(mac));
    ops.write(&path, "trusted", 1);
    ops.write(&path, "state", 1);
    ops.0
}

/// Takes a domain and its devices out of the tree.
pub(crate) fn remove(domid: DomainId, vifs: &[Device]) -> Vec<Op> {
    let mut ops = Vec::new();
    ops.extend(vifs.iter().map(|vif| Op::Rm(vif.backend_path())));
    ops.push(Op::Rm(home(domid)));
    ops.push(Op::Rm(format!("/vm/00000000-0000-0000-0000-{:012x}", domid.0)));
    ops
}

/// The interface number `index` of `frontend`.
pub(crate) const fn vif(backend: DomainId, frontend: DomainId, index: u32) -> Device {
    Device { kind: DeviceKind::Vif, backend, frontend, index }
}
