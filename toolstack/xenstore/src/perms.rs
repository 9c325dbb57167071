//! Who asks, and what a node lets them do.

use xen_abi::DomainId;
use xenbus::{NodeAccess, Permission};

/// The domain that may do everything: the control domain.
pub(crate) const PRIVILEGED: DomainId = DomainId(0);

/// On whose behalf something is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Caller {
    /// The domain.
    pub(crate) domid: DomainId,
    /// The domain whose rights it has as well (`SET_TARGET`).
    pub(crate) target: Option<DomainId>,
}

impl Caller {
    pub(crate) fn is_privileged(self) -> bool {
        self.domid == PRIVILEGED
    }

    fn is(self, domid: DomainId) -> bool {
        self.domid == domid || self.target == Some(domid)
    }

    /// Whether it may do everything with a node: it is privileged, or the owner.
    pub(crate) fn owns(self, perms: &[Permission]) -> bool {
        self.is_privileged() || perms.first().is_some_and(|owner| self.is(owner.domid))
    }

    /// What it may do with a node.
    pub(crate) fn access(self, perms: &[Permission]) -> NodeAccess {
        if self.owns(perms) {
            return NodeAccess::Both;
        }
        let own = perms.iter().skip(1).find(|entry| self.is(entry.domid));
        own.or(perms.first()).map_or(NodeAccess::None, |entry| entry.access)
    }

    pub(crate) fn may_read(self, perms: &[Permission]) -> bool {
        self.access(perms).reads()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(domid: u16, target: Option<u16>, perms: &[&str]) -> NodeAccess {
        let perms: Vec<Permission> =
            perms.iter().map(|text| Permission::parse(text).unwrap()).collect();
        Caller { domid: DomainId(domid), target: target.map(DomainId) }.access(&perms)
    }

    /// xen-abi §6.2: the first entry is the owner; its letter is for everyone without an entry.
    #[test]
    fn first_entry_is_owner_and_default() {
        assert_eq!(access(3, None, &["n3"]), NodeAccess::Both);
        assert_eq!(access(4, None, &["n3"]), NodeAccess::None);
        assert_eq!(access(4, None, &["r3"]), NodeAccess::Read);
        assert_eq!(access(4, None, &["r3", "n4"]), NodeAccess::None);
        assert_eq!(access(4, None, &["n3", "w4", "b4"]), NodeAccess::Write);
        assert_eq!(access(0, None, &["n3", "n0"]), NodeAccess::Both);
    }

    #[test]
    fn a_target_lends_its_rights() {
        assert_eq!(access(4, Some(3), &["n3"]), NodeAccess::Both);
        assert_eq!(access(4, Some(5), &["n3", "r5"]), NodeAccess::Read);
    }
}
