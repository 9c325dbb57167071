//! The nodes.
//!
//! Versions of the tree share what they have in common: a copy of a [`Tree`] costs one reference
//! count, and a change copies the nodes on the way to the changed one, if somebody else still
//! holds them. Transactions are built on that; while none is open, changes happen in place.
//!
//! Each node has two generations, numbers that never come back: one for its value and
//! permissions, one for the names of its children. While a copy of the tree is held, two versions
//! of a subtree are the same exactly when they are the same allocation.

use crate::path::Path;
use alloc::collections::BTreeMap;
use alloc::rc::Rc;
use core::mem::take;
use xen_abi::DomainId;
use xenbus::Permission;

/// What a node is charged with besides the bytes that it holds.
const NODE_COST: usize = 160;
/// What a name in a node's list of children costs when the list is copied.
const CHILD_COST: usize = 48;

/// One node.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    /// Its value.
    pub(crate) value: Rc<[u8]>,
    /// Its permissions, owner first; never empty.
    pub(crate) perms: Rc<[Permission]>,
    /// Its children by name.
    pub(crate) children: BTreeMap<Rc<str>, Rc<Node>>,
    /// Last change of value or permissions.
    pub(crate) generation: u64,
    /// Last change of the set of children.
    pub(crate) children_generation: u64,
}

impl Node {
    pub(crate) fn owner(&self) -> DomainId {
        self.perms[0].domid
    }

    /// The descendant that `names` lead to.
    pub(crate) fn descendant<'a>(&self, names: impl Iterator<Item = &'a str>) -> Option<&Self> {
        let mut node = self;
        for name in names {
            node = node.children.get(name)?;
        }
        Some(node)
    }

    /// What the node itself is charged to its owner.
    fn cost(&self, name: &str) -> usize {
        NODE_COST + name.len() + self.value.len() + size_of_val(&*self.perms)
    }

    /// What a copy of the node takes. Values and permissions are shared, but the old ones live
    /// on if this is copied to change them.
    fn copy_cost(&self) -> usize {
        NODE_COST + self.value.len() + CHILD_COST * self.children.len()
    }
}

/// What one domain owns.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Usage {
    pub(crate) nodes: usize,
    pub(crate) bytes: usize,
}

/// One version of all nodes.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    root: Rc<Node>,
    usage: BTreeMap<DomainId, Usage>,
    generation: u64,
    copied: usize,
}

impl Tree {
    /// A tree with nothing but the root, which belongs to `owner`.
    pub(crate) fn new(owner: DomainId) -> Self {
        let root = Node {
            value: Rc::from([]),
            perms: Rc::from([Permission::owner(owner)]),
            children: BTreeMap::new(),
            generation: 1,
            children_generation: 1,
        };
        let usage = Usage { nodes: 1, bytes: root.cost("") };
        let usage = BTreeMap::from([(owner, usage)]);
        Self { root: Rc::new(root), usage, generation: 1, copied: 0 }
    }

    /// The generation of the last change.
    pub(crate) const fn generation(&self) -> u64 {
        self.generation
    }

    /// What `owner` owns.
    pub(crate) fn usage(&self, owner: DomainId) -> Usage {
        self.usage.get(&owner).copied().unwrap_or_default()
    }

    /// Bytes that were copied because another version of the tree is held, since the last call.
    pub(crate) fn take_copied(&mut self) -> usize {
        take(&mut self.copied)
    }

    /// The node at `path`.
    pub(crate) fn get(&self, path: &Path) -> Option<&Node> {
        self.root.descendant(path.names())
    }

    /// The node at `path`, shared.
    pub(crate) fn get_shared(&self, path: &Path) -> Option<&Rc<Node>> {
        let mut node = &self.root;
        for name in path.names() {
            node = node.children.get(name)?;
        }
        Some(node)
    }

    /// The deepest node that exists on the way to `path`, and its depth.
    pub(crate) fn nearest(&self, path: &Path) -> (&Node, usize) {
        let mut node = &*self.root;
        let mut depth = 0;
        for name in path.names() {
            let Some(child) = node.children.get(name) else { break };
            node = child;
            depth += 1;
        }
        (node, depth)
    }

    /// Whether the subtrees at `path` are the same in both versions.
    pub(crate) fn same_subtree(&self, other: &Self, path: &Path) -> bool {
        match (self.get_shared(path), other.get_shared(path)) {
            (Some(one), Some(two)) => Rc::ptr_eq(one, two),
            (None, None) => true,
            _ => false,
        }
    }

    /// Sets the value of the node at `path`, if there is one.
    pub(crate) fn set_value(&mut self, path: &Path, value: &[u8]) {
        let generation = self.next_generation();
        let Some(node) = self.node_mut(path) else { return };
        let (owner, old) = (node.owner(), node.value.len());
        node.value = value.into();
        node.generation = generation;
        let usage = self.usage.entry(owner).or_default();
        usage.bytes = usage.bytes - old + value.len();
    }

    /// Sets the permissions of the node at `path`, if there is one. `perms` must not be empty.
    pub(crate) fn set_perms(&mut self, path: &Path, perms: &[Permission]) {
        let generation = self.next_generation();
        let name = path.split_last().map_or("", |(_, name)| name);
        let Some(node) = self.node_mut(path) else { return };
        let before = (node.owner(), node.cost(name));
        node.perms = perms.into();
        node.generation = generation;
        let after = (node.owner(), node.cost(name));
        self.discharge(before.0, before.1);
        self.charge(after.0, after.1);
    }

    /// Creates the node at `path`, which does not exist, and the parents that it lacks. They get
    /// the permissions of the nearest one that exists, with `owner` as owner if one is given.
    pub(crate) fn create(&mut self, path: &Path, value: &[u8], owner: Option<DomainId>) {
        let generation = self.next_generation();
        let depth = self.nearest(path).1;
        let Some(nearest) = self.node_mut(&path.ancestor(depth)) else { return };
        let perms = inherited(&nearest.perms, owner);
        nearest.children_generation = generation;
        // From the new leaf up to the first missing name.
        let mut below: Option<(Rc<str>, Rc<Node>)> = None;
        let mut charged = Usage::default();
        for name in path.names().skip(depth).collect::<alloc::vec::Vec<_>>().into_iter().rev() {
            let node = Node {
                value: if below.is_none() { value.into() } else { Rc::from([]) },
                perms: perms.clone(),
                children: below.take().into_iter().collect(),
                generation,
                children_generation: generation,
            };
            charged.nodes += 1;
            charged.bytes += node.cost(name);
            below = Some((name.into(), Rc::new(node)));
        }
        nearest.children.extend(below);
        let usage = self.usage.entry(perms[0].domid).or_default();
        usage.nodes += charged.nodes;
        usage.bytes += charged.bytes;
    }

    /// Removes the node at `path` and everything below it. The root stays.
    pub(crate) fn remove(&mut self, path: &Path) -> Option<Rc<Node>> {
        let (parent, name) = path.split_last()?;
        self.get(path)?;
        let generation = self.next_generation();
        let parent = self.node_mut(&parent)?;
        let removed = parent.children.remove(name)?;
        parent.children_generation = generation;
        self.discharge_subtree(name, &removed);
        Some(removed)
    }

    fn discharge_subtree(&mut self, name: &str, node: &Node) {
        self.discharge(node.owner(), node.cost(name));
        for (name, child) in &node.children {
            self.discharge_subtree(name, child);
        }
    }

    fn charge(&mut self, owner: DomainId, bytes: usize) {
        let usage = self.usage.entry(owner).or_default();
        usage.nodes += 1;
        usage.bytes += bytes;
    }

    fn discharge(&mut self, owner: DomainId, bytes: usize) {
        let usage = self.usage.entry(owner).or_default();
        usage.nodes -= 1;
        usage.bytes -= bytes;
        if usage.nodes == 0 {
            self.usage.remove(&owner);
        }
    }

    fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    /// The node at `path`, to be changed: copied, with the way to it, where it is shared.
    fn node_mut(&mut self, path: &Path) -> Option<&mut Node> {
        self.get(path)?;
        let mut node = own(&mut self.root, &mut self.copied);
        for name in path.names() {
            node = own(node.children.get_mut(name)?, &mut self.copied);
        }
        Some(node)
    }
}

#[cfg(test)]
impl Tree {
    /// Whether the usage of every owner is what a walk over the tree finds.
    pub(crate) fn usage_is_right(&self) -> bool {
        fn walk(name: &str, node: &Node, found: &mut BTreeMap<DomainId, Usage>) {
            let usage = found.entry(node.owner()).or_default();
            usage.nodes += 1;
            usage.bytes += node.cost(name);
            for (name, child) in &node.children {
                walk(name, child, found);
            }
        }
        let mut found = BTreeMap::new();
        walk("", &self.root, &mut found);
        found == self.usage
    }
}

/// The bytes that creating the missing nodes of `path` below a depth would be charged.
pub(crate) fn creation_cost(path: &Path, depth: usize, value: &[u8], perms: usize) -> Usage {
    let mut cost = Usage { nodes: 0, bytes: value.len() };
    for name in path.names().skip(depth) {
        cost.nodes += 1;
        cost.bytes += NODE_COST + name.len() + perms * size_of::<Permission>();
    }
    cost
}

fn own<'a>(node: &'a mut Rc<Node>, copied: &mut usize) -> &'a mut Node {
    if Rc::strong_count(node) > 1 {
        *copied += node.copy_cost();
    }
    Rc::make_mut(node)
}

fn inherited(parent: &Rc<[Permission]>, owner: Option<DomainId>) -> Rc<[Permission]> {
    let Some(owner) = owner.filter(|&owner| owner != parent[0].domid) else {
        return parent.clone();
    };
    let mut perms = parent.to_vec();
    perms[0].domid = owner;
    perms.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Path {
        Path::parse(text, DomainId(0)).unwrap()
    }

    #[test]
    fn usage_follows_every_change() {
        let mut tree = Tree::new(DomainId(0));
        tree.create(&path("/a/b/c"), b"xyz", Some(DomainId(3)));
        assert_eq!(tree.usage(DomainId(3)).nodes, 3);
        assert_eq!(tree.usage(DomainId(3)), creation_cost(&path("/a/b/c"), 0, b"xyz", 1));
        tree.set_value(&path("/a/b"), b"longer");
        tree.set_perms(
            &path("/a/b"),
            &[Permission::owner(DomainId(4)), Permission::reader(DomainId(3))],
        );
        tree.create(&path("/a/b/d"), b"", None);
        assert!(tree.usage_is_right());
        assert_eq!(tree.usage(DomainId(4)).nodes, 2);
        tree.remove(&path("/a/b")).unwrap();
        assert!(tree.usage_is_right());
        tree.remove(&path("/a")).unwrap();
        assert_eq!(tree.usage(DomainId(3)), Usage::default());
        assert!(tree.remove(&path("/")).is_none());
    }

    /// A held version does not change, and only what differs is copied.
    #[test]
    fn versions_share_what_is_equal() {
        let mut tree = Tree::new(DomainId(0));
        tree.create(&path("/a/b"), b"1", None);
        tree.create(&path("/c/d"), b"2", None);
        assert_eq!(tree.take_copied(), 0);
        let held = tree.clone();
        tree.set_value(&path("/a/b"), b"3");
        assert!(tree.take_copied() > 0);
        assert_eq!(&*held.get(&path("/a/b")).unwrap().value, b"1");
        assert!(tree.same_subtree(&held, &path("/c")));
        assert!(!tree.same_subtree(&held, &path("/a")));
        assert!(tree.same_subtree(&held, &path("/none")));
        tree.set_value(&path("/a/b"), b"4");
        assert_eq!(tree.take_copied(), 0, "copied once, not twice");
    }
}
