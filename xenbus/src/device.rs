//! Where split devices keep their keys, and the usual ways to read and write them.
//!
//! A device has two directories: the frontend's in the home of the domain that uses it, and the
//! backend's in the home of the domain that serves it. Each names the other.
//!
//! | directory | path                                              | keys of the toolstack                    |
//! |-----------|---------------------------------------------------|------------------------------------------|
//! | frontend  | `/local/domain/<F>/device/<kind>/<index>`         | `backend` `backend-id` `state`           |
//! | backend   | `/local/domain/<B>/backend/<kind>/<F>/<index>`    | `frontend` `frontend-id` `online` `state`|
//!
//! Source: `xen/include/public/io/{xenbus,netif,blkif}.h`, `docs/misc/xenstore-paths.pandoc`.

use crate::store::Nodes;
use crate::wire;
use alloc::format;
use alloc::string::{String, ToString};
use core::fmt::{Display, Formatter};
use core::str::FromStr;
use xen_abi::xenstore::XenbusState;
use xen_abi::{DomainId, Errno, EventPort, GrantRef};

/// What a split device is; the name of its directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum DeviceKind {
    /// Network interface.
    Vif,
    /// Block device.
    Vbd,
}

impl DeviceKind {
    /// Name of its directories.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vif => "vif",
            Self::Vbd => "vbd",
        }
    }
}

/// One split device, seen from either side.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Device {
    /// What it is.
    pub kind: DeviceKind,
    /// Who serves it.
    pub backend: DomainId,
    /// Who uses it.
    pub frontend: DomainId,
    /// Its number among the frontend's devices of its kind.
    pub index: u32,
}

impl Device {
    /// The frontend's directory.
    #[must_use]
    pub fn frontend_path(&self) -> String {
        frontend_path(self.frontend, self.kind, self.index)
    }

    /// The backend's directory.
    #[must_use]
    pub fn backend_path(&self) -> String {
        backend_path(self.backend, self.kind, self.frontend, self.index)
    }

    /// Where its backend writes why it does not serve it, as Linux does (`xenbus_dev_error`).
    #[must_use]
    pub fn error_path(&self) -> String {
        format!("error/backend/{}/{}/{}/error", self.kind.name(), self.frontend.0, self.index)
    }
}

impl Display for Device {
    fn fmt(&self, f: &mut Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}{}.{}", self.kind.name(), self.frontend.0, self.index)
    }
}

/// A domain's home, to which its relative paths are relative.
#[must_use]
pub fn home(domid: DomainId) -> String {
    format!("/local/domain/{}", domid.0)
}

/// The frontend's directory of a device.
#[must_use]
pub fn frontend_path(frontend: DomainId, kind: DeviceKind, index: u32) -> String {
    format!("/local/domain/{}/device/{}/{index}", frontend.0, kind.name())
}

/// The backend's directory of a device.
#[must_use]
pub fn backend_path(backend: DomainId, kind: DeviceKind, frontend: DomainId, index: u32) -> String {
    format!("/local/domain/{}/backend/{}/{}/{index}", backend.0, kind.name(), frontend.0)
}

/// The device, as its frontend's directory names its backend: by the keys `backend-id` and
/// `backend`, which must agree.
///
/// # Errors
/// `EINVAL` when they do not, and see [`Nodes`].
pub fn find_backend<S: Nodes + ?Sized>(
    store: &mut S,
    own: DomainId,
    kind: DeviceKind,
    index: u32,
) -> Result<Device, Errno> {
    let directory = frontend_path(own, kind, index);
    let backend = DomainId(read(store, &directory, "backend-id")?);
    let device = Device { kind, backend, frontend: own, index };
    let named = store.read_string(&format!("{directory}/backend"))?;
    if named == device.backend_path() { Ok(device) } else { Err(Errno::EINVAL) }
}

/// Lists the devices of `kind` that the domain `own` serves. Names that are not numbers are
/// passed over.
///
/// # Errors
/// See [`Nodes`]. No directory is no devices, not an error.
pub fn served<S: Nodes + ?Sized>(
    store: &mut S,
    own: DomainId,
    kind: DeviceKind,
) -> Result<alloc::vec::Vec<Device>, Errno> {
    let root = format!("{}/backend/{}", home(own), kind.name());
    let mut devices = alloc::vec::Vec::new();
    for domain in children(store, &root)? {
        let Some(frontend) = wire::parse_domid(&domain) else { continue };
        for index in children(store, &format!("{root}/{domain}"))? {
            let Some(index) = wire::parse_decimal(&index) else { continue };
            devices.push(Device { kind, backend: own, frontend, index });
        }
    }
    Ok(devices)
}

/// The names below `path`; none when there is no such node.
fn children<S: Nodes + ?Sized>(
    store: &mut S,
    path: &str,
) -> Result<alloc::vec::Vec<String>, Errno> {
    match store.directory(path) {
        Err(Errno::ENOENT) => Ok(alloc::vec::Vec::new()),
        other => other,
    }
}

/// Reads a key of a device and parses it.
///
/// # Errors
/// `EINVAL` when the value does not parse, and see [`Nodes`].
pub fn read<V: FromStr, S: Nodes + ?Sized>(
    store: &mut S,
    directory: &str,
    key: &str,
) -> Result<V, Errno> {
    store.read_string(&format!("{directory}/{key}"))?.parse().map_err(|_| Errno::EINVAL)
}

/// Like [`read`], with a value for a key that does not exist.
///
/// # Errors
/// `EINVAL` when the value does not parse, and see [`Nodes`].
pub fn read_or<V: FromStr, S: Nodes + ?Sized>(
    store: &mut S,
    directory: &str,
    key: &str,
    default: V,
) -> Result<V, Errno> {
    match read(store, directory, key) {
        Err(Errno::ENOENT) => Ok(default),
        other => other,
    }
}

/// Whether a feature key is there and not 0. A value that is not a number counts as 0, as for
/// Linux.
///
/// # Errors
/// See [`Nodes`].
pub fn has_feature<S: Nodes + ?Sized>(
    store: &mut S,
    directory: &str,
    key: &str,
) -> Result<bool, Errno> {
    match read_or(store, directory, key, 0_u32) {
        Err(Errno::EINVAL) => Ok(false),
        other => other.map(|value| value != 0),
    }
}

/// Reads a key that holds a grant reference.
///
/// # Errors
/// `EINVAL` when it is not a number, and see [`Nodes`].
pub fn read_grant<S: Nodes + ?Sized>(
    store: &mut S,
    directory: &str,
    key: &str,
) -> Result<GrantRef, Errno> {
    read(store, directory, key).map(GrantRef)
}

/// Reads a key that holds an event channel port.
///
/// # Errors
/// `EINVAL` when it is not a number, and see [`Nodes`].
pub fn read_port<S: Nodes + ?Sized>(
    store: &mut S,
    directory: &str,
    key: &str,
) -> Result<EventPort, Errno> {
    read(store, directory, key).map(EventPort)
}

/// Writes a key of a device.
///
/// # Errors
/// See [`Nodes`].
pub fn write<S: Nodes + ?Sized>(
    store: &mut S,
    directory: &str,
    key: &str,
    value: impl Display,
) -> Result<(), Errno> {
    store.write(&format!("{directory}/{key}"), value.to_string().as_bytes())
}

/// The state of a device's end. [`XenbusState::UNKNOWN`] when there is none, it may not be read,
/// or it is not a number: to the other end these are all the same.
///
/// # Errors
/// `EIO`: the connection to the store is lost.
pub fn state<S: Nodes + ?Sized>(store: &mut S, directory: &str) -> Result<XenbusState, Errno> {
    match read(store, directory, "state") {
        Ok(value) => Ok(XenbusState(value)),
        Err(Errno::EIO) => Err(Errno::EIO),
        Err(_) => Ok(XenbusState::UNKNOWN),
    }
}

/// Sets the state of a device's own end, unless it has that state: a state that is written again
/// is an event to the other end, and some frontends act on it.
///
/// # Errors
/// See [`Nodes`].
pub fn switch_state<S: Nodes + ?Sized>(
    store: &mut S,
    directory: &str,
    new: XenbusState,
) -> Result<(), Errno> {
    if state(store, directory)? == new {
        return Ok(());
    }
    write(store, directory, "state", new.0)
}
