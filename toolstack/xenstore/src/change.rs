//! Changes of the tree, checked against permissions and quotas, and what watchers learn of them.

use crate::path::Path;
use crate::perms::{Caller, PRIVILEGED};
use crate::quota::Quotas;
use crate::tree::{Node, Tree, Usage, creation_cost};
use alloc::rc::Rc;
use alloc::vec;
use alloc::vec::Vec;
use xen_abi::Errno;
use xenbus::{NodeAccess, Permission};

/// A change that a client asked for.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Write { path: Path, value: Vec<u8> },
    Mkdir { path: Path },
    Remove { path: Path },
    SetPerms { path: Path, perms: Vec<Permission> },
}

/// A change that happened.
#[derive(Clone, Debug)]
pub(crate) struct Notice {
    /// The node.
    pub(crate) path: Path,
    /// Whoever may read by one of these learns of it: those of the node, before and after; when
    /// it appeared or vanished also those of its parent, whose list of children shows it.
    pub(crate) readable: Vec<Rc<[Permission]>>,
    /// The node, when it was removed.
    pub(crate) removed: Option<Rc<Node>>,
}

/// The node at `path`, if `caller` has the `needed` access to it.
///
/// # Errors
/// `EACCES`: no access. `ENOENT`: no such node; told only to those with the same access to the
/// nearest node above, others get `EACCES`, so that nobody learns what exists where he may not look.
pub(crate) fn find<'t>(
    tree: &'t Tree,
    caller: Caller,
    path: &Path,
    needed: NodeAccess,
) -> Result<&'t Node, Errno> {
    let (node, depth) = tree.nearest(path);
    let access = caller.access(&node.perms);
    let allowed = match needed {
        NodeAccess::None => true,
        NodeAccess::Read => access.reads(),
        NodeAccess::Write => access.writes(),
        NodeAccess::Both => access == NodeAccess::Both,
    };
    if !allowed {
        Err(Errno::EACCES)
    } else if depth < path.names().count() {
        Err(Errno::ENOENT)
    } else {
        Ok(node)
    }
}

impl Change {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Write { path, .. }
            | Self::Mkdir { path }
            | Self::Remove { path }
            | Self::SetPerms { path, .. } => path,
        }
    }

    /// Bytes that the change takes while it is kept.
    pub(crate) fn cost(&self) -> usize {
        let rest = match self {
            Self::Write { value, .. } => value.len(),
            Self::SetPerms { perms, .. } => size_of_val(&perms[..]),
            Self::Mkdir { .. } | Self::Remove { .. } => 0,
        };
        size_of::<Self>() + self.path().as_str().len() + rest
    }

    /// Makes the change, or does nothing and says why. `Ok(None)`: nothing had to be changed.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`: see [`find`]. `ENOSPC`: over a quota. `EPERM`: a new owner.
    /// `EINVAL`: the root cannot be removed.
    pub(crate) fn apply(
        &self,
        tree: &mut Tree,
        caller: Caller,
        quotas: &Quotas,
    ) -> Result<Option<Notice>, Errno> {
        match self {
            Self::Write { path, value } => write(tree, caller, quotas, path, value).map(Some),
            Self::Mkdir { path } => match find(tree, caller, path, NodeAccess::Write) {
                Ok(_) => Ok(None),
                Err(Errno::ENOENT) => create(tree, caller, quotas, path, b"").map(Some),
                Err(errno) => Err(errno),
            },
            Self::Remove { path } => remove(tree, caller, path),
            Self::SetPerms { path, perms } => {
                set_perms(tree, caller, quotas, path, perms).map(Some)
            }
        }
    }
}

fn write(
    tree: &mut Tree,
    caller: Caller,
    quotas: &Quotas,
    path: &Path,
    value: &[u8],
) -> Result<Notice, Errno> {
    if !caller.is_privileged() && value.len() > quotas.value_bytes {
        return Err(Errno::ENOSPC);
    }
    match find(tree, caller, path, NodeAccess::Write) {
        Ok(node) => {
            let perms = node.perms.clone();
            let more = Usage { nodes: 0, bytes: value.len().saturating_sub(node.value.len()) };
            check_quota(tree, caller, quotas, &perms, more)?;
            tree.set_value(path, value);
            Ok(Notice { path: path.clone(), readable: vec![perms], removed: None })
        }
        Err(Errno::ENOENT) => create(tree, caller, quotas, path, value),
        Err(errno) => Err(errno),
    }
}

/// Creates a node. [`find`] has said `ENOENT` for writing: the caller may write to the parent.
fn create(
    tree: &mut Tree,
    caller: Caller,
    quotas: &Quotas,
    path: &Path,
    value: &[u8],
) -> Result<Notice, Errno> {
    let (nearest, depth) = tree.nearest(path);
    let parent = nearest.perms.clone();
    let more = creation_cost(path, depth, value, parent.len());
    let owner = (!caller.is_privileged()).then_some(caller.domid);
    let owned = Permission::owner(owner.unwrap_or(parent[0].domid));
    check_quota(tree, caller, quotas, &[owned], more)?;
    tree.create(path, value, owner);
    let created = tree.get(path).map(|node| node.perms.clone());
    let readable = created.into_iter().chain([parent]).collect();
    Ok(Notice { path: path.clone(), readable, removed: None })
}

fn remove(tree: &mut Tree, caller: Caller, path: &Path) -> Result<Option<Notice>, Errno> {
    let (parent, _) = path.split_last().ok_or(Errno::EINVAL)?;
    match find(tree, caller, path, NodeAccess::Write) {
        Ok(_) => {}
        // Nothing to remove is fine, if it could have been there.
        Err(Errno::ENOENT) if tree.get(&parent).is_some() => return Ok(None),
        Err(errno) => return Err(errno),
    }
    let parent_perms = tree.get(&parent).map(|node| node.perms.clone());
    let removed = tree.remove(path).ok_or(Errno::ENOENT)?;
    let readable = parent_perms.into_iter().chain([removed.perms.clone()]).collect();
    Ok(Some(Notice { path: path.clone(), readable, removed: Some(removed) }))
}

fn set_perms(
    tree: &mut Tree,
    caller: Caller,
    quotas: &Quotas,
    path: &Path,
    perms: &[Permission],
) -> Result<Notice, Errno> {
    let node = find(tree, caller, path, NodeAccess::Write)?;
    let old = node.perms.clone();
    if !caller.owns(&old) {
        return Err(Errno::EACCES);
    }
    let first = perms.first().ok_or(Errno::EINVAL)?;
    if !caller.is_privileged() {
        if first.domid != old[0].domid {
            return Err(Errno::EPERM);
        }
        if perms.len() > quotas.permissions {
            return Err(Errno::ENOSPC);
        }
        let grown = perms.len().saturating_sub(old.len()) * size_of::<Permission>();
        check_quota(tree, caller, quotas, &old, Usage { nodes: 0, bytes: grown })?;
    }
    tree.set_perms(path, perms);
    Ok(Notice { path: path.clone(), readable: vec![old, perms.into()], removed: None })
}

/// Whether the owner by `perms` may own `more`. What the control domain does or owns is free.
fn check_quota(
    tree: &Tree,
    caller: Caller,
    quotas: &Quotas,
    perms: &[Permission],
    more: Usage,
) -> Result<(), Errno> {
    let owner = perms[0].domid;
    if caller.is_privileged() || owner == PRIVILEGED || more == Usage::default() {
        return Ok(());
    }
    let usage = tree.usage(owner);
    let fits =
        usage.nodes + more.nodes <= quotas.nodes && usage.bytes + more.bytes <= quotas.node_bytes;
    if fits { Ok(()) } else { Err(Errno::ENOSPC) }
}
