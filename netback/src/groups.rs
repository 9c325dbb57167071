//! Which multicast groups a guest hears.
//!
//! A guest that wants no others than those that it names sets `request-multicast-control`, and
//! names them by extra infos in its transmit ring. Source: `xen/include/public/io/netif.h`,
//! "feature-multicast-control". What was named is lost with the incarnation to which it was named:
//! a successor delivers all groups to a connection that it takes over. That is what every guest
//! gets that does not ask for less, and a card's filter is no promise either; a group that was not
//! delivered would be gone.

use crate::switch::{Mac, is_group};
use alloc::vec::Vec;

/// Groups that are remembered, as by Linux's netback (`XEN_NETBK_MCAST_MAX`).
pub const MOST_GROUPS: usize = 64;

const BROADCAST: Mac = [0xff; 6];

/// The groups of one guest.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Groups {
    named: Vec<Mac>,
    /// Only those are to be delivered.
    only_named: bool,
    /// Some were named to an earlier incarnation.
    lost: bool,
}

impl Groups {
    /// For a new connection.
    #[must_use]
    pub fn new(only_named: bool) -> Self {
        Self { only_named, ..Self::default() }
    }

    /// For a connection that is taken over.
    #[must_use]
    pub fn lost() -> Self {
        Self { lost: true, ..Self::default() }
    }

    /// Whether the guest wants to hear only what it has named.
    pub fn restrict(&mut self, only_named: bool) {
        self.only_named = only_named;
    }

    /// Whether a frame for `destination` is delivered.
    #[must_use]
    pub fn hears(&self, destination: Mac) -> bool {
        !self.only_named
            || self.lost
            || !is_group(destination)
            || destination == BROADCAST
            || self.named.contains(&destination)
    }

    /// Names a group. False when there are too many.
    pub fn add(&mut self, group: Mac) -> bool {
        if self.named.contains(&group) {
            return true;
        }
        let room = self.named.len() < MOST_GROUPS;
        if room {
            self.named.push(group);
        }
        room
    }

    /// Forgets a group.
    pub fn remove(&mut self, group: Mac) {
        self.named.retain(|&named| named != group);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn group(n: u8) -> Mac {
        [0x33, 0x33, 0, 0, 0, n]
    }

    #[test]
    fn only_named_groups_are_heard_when_that_is_wanted() {
        let mut groups = Groups::new(true);
        assert!(groups.add(group(1)) && groups.add(group(2)));
        groups.remove(group(2));
        let heard = |groups: &Groups| {
            [group(1), group(2), BROADCAST, [2, 0, 0, 0, 0, 1]].map(|mac| groups.hears(mac))
        };
        assert_eq!(heard(&groups), [true, false, true, true]);
        groups.restrict(false);
        assert_eq!(heard(&groups), [true; 4]);
        groups.restrict(true);
        assert_eq!(heard(&groups), [true, false, true, true]);
    }

    #[test]
    fn groups_are_bounded() {
        let mut groups = Groups::new(true);
        for n in 0..64 {
            assert!(groups.add(group(n)));
        }
        assert!(!groups.add(group(64)));
        assert!(groups.add(group(63)), "known already");
        groups.remove(group(0));
        assert!(groups.add(group(64)));
    }

    #[test]
    fn a_connection_that_was_taken_over_loses_none() {
        let mut groups = Groups::lost();
        groups.restrict(true);
        assert!(groups.hears(group(9)));
    }
}
