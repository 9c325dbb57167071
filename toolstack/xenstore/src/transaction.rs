//! Transactions.
//!
//! A transaction works on its own version of the tree, a copy that costs nothing until something
//! changes. It notes what it looked at. At its end, if all of that is in the current tree as it
//! was at the start, its changes are made again on the current tree, all or none: then it is as if
//! the whole transaction had happened at that moment. If not, the answer is `EAGAIN`.
//!
//! Only what a transaction looked at or changed counts: two transactions that create different
//! nodes in the same directory do not disturb each other. Whichever of two conflicting ones ends
//! first succeeds, so there is always progress.
//!
//! What it costs: the own changes and notes of a domain's transactions are limited by
//! [`Quotas::transaction_bytes`]. The versions that it keeps of nodes that others change are
//! limited by [`Quotas::history_bytes`]; since the oldest transaction keeps all that the younger
//! ones keep, that limit holds for all together.

use crate::change::{Change, Notice};
use crate::path::Path;
use crate::perms::Caller;
use crate::quota::Quotas;
use crate::tree::{Node, Tree};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use xen_abi::Errno;

/// What a transaction depends on at one path.
#[derive(Clone, Copy, Default, Debug)]
struct Dependency {
    /// Existence, value and permissions.
    content: bool,
    /// The names of the children.
    children: bool,
    /// All of it, and everything below.
    subtree: bool,
}

/// An open transaction.
#[derive(Debug)]
pub(crate) enum Transaction {
    /// It can still succeed.
    Open(Open),
    /// It will end with `EAGAIN`: what it needs was given up.
    Expired,
}

/// The state of a transaction that can still succeed.
#[derive(Debug)]
pub(crate) struct Open {
    base: Tree,
    fork: Tree,
    changes: Vec<Change>,
    dependencies: BTreeMap<Path, Dependency>,
    own_bytes: usize,
    history_bytes: usize,
}

/// What a request looks at, besides the node at its path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Look {
    /// Value or permissions.
    Content,
    /// The children's names too.
    Children,
    /// Everything below.
    Subtree,
}

impl Transaction {
    pub(crate) fn start(tree: &Tree) -> Self {
        Self::Open(Open {
            base: tree.clone(),
            fork: tree.clone(),
            changes: Vec::new(),
            dependencies: BTreeMap::new(),
            own_bytes: 0,
            history_bytes: 0,
        })
    }

    /// The state, if it can still succeed.
    ///
    /// # Errors
    /// `EAGAIN`: it cannot.
    pub(crate) fn open(&mut self) -> Result<&mut Open, Errno> {
        match self {
            Self::Open(open) => Ok(open),
            Self::Expired => Err(Errno::EAGAIN),
        }
    }

    /// Bytes of its own changes and notes.
    pub(crate) fn held(&self) -> usize {
        match self {
            Self::Open(open) => open.own_bytes,
            Self::Expired => 0,
        }
    }

    /// Others changed the tree, and `bytes` of old nodes stay for transactions like this one.
    pub(crate) fn keep_history(&mut self, bytes: usize, limit: usize) {
        if let Self::Open(open) = self {
            open.history_bytes += bytes;
            if open.history_bytes > limit {
                *self = Self::Expired;
            }
        }
    }

    /// Makes the changes in `tree`, all or none.
    ///
    /// # Errors
    /// `EAGAIN`: others changed what the transaction depends on. `ENOSPC`: over a quota by now.
    pub(crate) fn commit(
        self,
        tree: &mut Tree,
        caller: Caller,
        quotas: &Quotas,
    ) -> Result<Vec<Notice>, Errno> {
        let Self::Open(open) = self else { return Err(Errno::EAGAIN) };
        if !open.dependencies.iter().all(|(path, dependency)| open.holds(tree, path, *dependency)) {
            return Err(Errno::EAGAIN);
        }
        drop(open.fork);
        let mut next = tree.clone();
        let mut notices: Vec<Notice> = Vec::new();
        for change in &open.changes {
            notices.extend(change.apply(&mut next, caller, quotas)?);
        }
        *tree = next;
        Ok(merged(notices))
    }
}

impl Open {
    /// The tree as the transaction sees it, after noting that it looks at `path`.
    pub(crate) fn look(&mut self, path: &Path, look: Look) -> &Tree {
        self.note(path, look);
        &self.fork
    }

    /// Makes a change that only the transaction sees for now.
    ///
    /// # Errors
    /// See [`Change::apply`].
    pub(crate) fn change(
        &mut self,
        caller: Caller,
        quotas: &Quotas,
        change: Change,
    ) -> Result<(), Errno> {
        let whole = matches!(change, Change::Remove { .. });
        self.note(change.path(), if whole { Look::Subtree } else { Look::Content });
        change.apply(&mut self.fork, caller, quotas)?;
        self.own_bytes += change.cost() + self.fork.take_copied();
        self.changes.push(change);
        Ok(())
    }

    /// Notes what the answer to a request at `path` depends on. When the node was not there at
    /// the start, that is the nearest one above, whose permissions count, and that the next one
    /// is missing.
    fn note(&mut self, path: &Path, look: Look) {
        let depth = self.base.nearest(path).1;
        if depth < path.names().count() {
            self.note_at(path.ancestor(depth), |dependency| dependency.content = true);
            self.note_at(path.ancestor(depth + 1), |dependency| dependency.content = true);
            return;
        }
        self.note_at(path.clone(), |dependency| {
            dependency.content = true;
            dependency.children |= look == Look::Children;
            dependency.subtree |= look == Look::Subtree;
        });
    }

    fn note_at(&mut self, path: Path, set: impl FnOnce(&mut Dependency)) {
        let cost = size_of::<(Path, Dependency)>() * 2 + path.as_str().len();
        let own_bytes = &mut self.own_bytes;
        set(self.dependencies.entry(path).or_insert_with(|| {
            *own_bytes += cost;
            Dependency::default()
        }));
    }

    fn holds(&self, tree: &Tree, path: &Path, dependency: Dependency) -> bool {
        let (then, now) = (self.base.get(path), tree.get(path));
        let same = |of: fn(&Node) -> u64| then.map(of) == now.map(of);
        (!dependency.content || same(|node| node.generation))
            && (!dependency.children || same(|node| node.children_generation))
            && (!dependency.subtree || self.base.same_subtree(tree, path))
    }
}

/// Leaves one notice per node that was only changed, however often: they all come now.
fn merged(notices: Vec<Notice>) -> Vec<Notice> {
    let mut at: BTreeMap<Path, usize> = BTreeMap::new();
    let mut kept: Vec<Notice> = Vec::new();
    for notice in notices {
        if notice.removed.is_some() {
            kept.push(notice);
        } else if let Some(&earlier) = at.get(&notice.path) {
            kept[earlier].readable.extend(notice.readable);
        } else {
            at.insert(notice.path.clone(), kept.len());
            kept.push(notice);
        }
    }
    kept
}
