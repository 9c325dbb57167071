//! What users of the store are written against.

use crate::wire::Permission;
use alloc::string::String;
use alloc::vec::Vec;
use xen_abi::{DomainId, Errno, EventPort, Gfn};

/// How often [`Store::transaction`] tries before it gives up.
pub const TRANSACTION_ATTEMPTS: u32 = 64;

/// Something changed at or below a watched node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// The node that changed: the watched path or one below it, in the form (absolute or
    /// relative) in which the watch was set.
    pub path: String,
    /// The watch's token.
    pub token: String,
}

/// Operations on nodes; inside and outside of a transaction.
///
/// A path is absolute, or relative to the caller's home `/local/domain/<own id>`. Every method
/// answers with the store's error: `ENOENT` no such node, `EACCES` no permission, `EINVAL` bad
/// path or argument, `ENOSPC` or `E2BIG` over a quota, `EIO` connection lost.
pub trait Nodes {
    /// The value of a node.
    ///
    /// # Errors
    /// See [`Nodes`].
    fn read(&mut self, path: &str) -> Result<Vec<u8>, Errno>;

    /// Sets a node's value. Creates the node and its parents.
    ///
    /// # Errors
    /// See [`Nodes`].
    fn write(&mut self, path: &str, value: &[u8]) -> Result<(), Errno>;

    /// Creates a node, and its parents, if it does not exist.
    ///
    /// # Errors
    /// See [`Nodes`].
    fn mkdir(&mut self, path: &str) -> Result<(), Errno>;

    /// Removes a node and everything below it. Succeeds when it does not exist but its parent
    /// does.
    ///
    /// # Errors
    /// See [`Nodes`].
    fn rm(&mut self, path: &str) -> Result<(), Errno>;

    /// The names of a node's children.
    ///
    /// # Errors
    /// See [`Nodes`].
    fn directory(&mut self, path: &str) -> Result<Vec<String>, Errno>;

    /// A node's permissions, owner first.
    ///
    /// # Errors
    /// See [`Nodes`].
    fn get_perms(&mut self, path: &str) -> Result<Vec<Permission>, Errno>;

    /// Sets a node's permissions, owner first.
    ///
    /// # Errors
    /// See [`Nodes`].
    fn set_perms(&mut self, path: &str, perms: &[Permission]) -> Result<(), Errno>;

    /// The value of a node that holds text.
    ///
    /// # Errors
    /// `EINVAL` when it is not UTF-8, and see [`Nodes`].
    fn read_string(&mut self, path: &str) -> Result<String, Errno> {
        String::from_utf8(self.read(path)?).map_err(|_| Errno::EINVAL)
    }

    /// The value of a node that holds text, or `None` when there is no such node.
    ///
    /// # Errors
    /// `EINVAL` when it is not UTF-8, and see [`Nodes`].
    fn read_optional(&mut self, path: &str) -> Result<Option<String>, Errno> {
        match self.read_string(path) {
            Ok(value) => Ok(Some(value)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}

/// A connection to the store.
pub trait Store: Nodes {
    /// Asks for an [`Event`] at every change of `path` or anything below it, and one at once.
    ///
    /// # Errors
    /// `EEXIST` when the same path is watched with the same token, and see [`Nodes`].
    fn watch(&mut self, path: &str, token: &str) -> Result<(), Errno>;

    /// Ends a watch. Its events that were received already are dropped.
    ///
    /// # Errors
    /// `ENOENT` when there is no such watch, and see [`Nodes`].
    fn unwatch(&mut self, path: &str, token: &str) -> Result<(), Errno>;

    /// Ends all watches and transactions of this connection.
    ///
    /// # Errors
    /// See [`Nodes`].
    fn reset_watches(&mut self) -> Result<(), Errno>;

    /// The next event, if one is there. Never waits.
    fn next_event(&mut self) -> Option<Event>;

    /// Runs `body` in a transaction: others see all of its changes or none. When somebody else
    /// changed what it read, the changes are dropped and `body` runs again, at most
    /// [`TRANSACTION_ATTEMPTS`] times. When `body` fails, nothing is changed.
    ///
    /// # Errors
    /// The error of `body`; `EAGAIN` when all attempts met a conflict; and see [`Nodes`].
    fn transaction<R>(
        &mut self,
        body: impl FnMut(&mut dyn Nodes) -> Result<R, Errno>,
    ) -> Result<R, Errno>
    where
        Self: Sized;

    /// Tells the store of a domain, or of its next incarnation: its ring page is at `gfn` (and
    /// granted by the reserved entry 1), its end of the event channel is `port`.
    ///
    /// # Errors
    /// `EACCES` for all but the control domain, and see [`Nodes`].
    fn introduce(&mut self, domid: DomainId, gfn: Gfn, port: EventPort) -> Result<(), Errno>;

    /// Ends the store's connection to a domain.
    ///
    /// # Errors
    /// `EACCES` for all but the control domain, `ENOENT` when it is not connected.
    fn release(&mut self, domid: DomainId) -> Result<(), Errno>;

    /// Whether the store serves a domain.
    ///
    /// # Errors
    /// `EACCES` for all but the control domain.
    fn is_introduced(&mut self, domid: DomainId) -> Result<bool, Errno>;

    /// The home of a domain, to which its relative paths are relative.
    ///
    /// # Errors
    /// See [`Nodes`].
    fn get_domain_path(&mut self, domid: DomainId) -> Result<String, Errno>;
}
