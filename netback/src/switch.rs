//! The learning switch between a driver domain's vifs and its card.
//!
//! A port is *exact* when every address behind it is known in advance: a vif whose frames must
//! carry its own address (anti-spoof) is. Its address is *pinned*: it never ages, and no frame
//! from elsewhere moves it. What is learned is where the others are, behind the card or behind a
//! vif that may use several addresses. Unknown unicast goes to inexact ports only: nobody behind
//! an exact port can be its destination, so nobody there gets to see it.
//!
//! The table is bounded ([`CAPACITY`]); when it is full, further addresses stay unknown until
//! old ones have aged ([`AGE_NS`]). Looking for aged entries takes a walk over the table, which
//! at most happens once in [`SWEEP_NS`], so that a flood of made-up addresses costs no more per
//! frame than a look-up.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Addresses that are remembered at most, pinned ones included.
pub const CAPACITY: usize = 1024;
/// A learned address that was silent for so long is forgotten (IEEE 802.1Q table 8-6).
pub const AGE_NS: u64 = 300_000_000_000;
/// Least time between two walks over a full table.
pub const SWEEP_NS: u64 = 1_000_000_000;

/// A port of the switch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Port {
    /// The card, and so everything outside.
    Nic,
    /// The vif in this place of the vif table.
    Vif(usize),
}

/// Whether all addresses behind a port are known in advance.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Addresses {
    /// Only the pinned one: anti-spoof holds.
    Exact,
    /// Any: they are learned.
    Learned,
}

/// Where a frame goes. It never goes back to where it came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// To one port.
    One(Port),
    /// To all other ports: broadcast or multicast.
    All,
    /// To all other inexact ports: the destination is unknown.
    Unknown,
    /// Nowhere: its destination is where it came from.
    Local,
    /// Nowhere: no bridge may forward it, or its source is impossible.
    Refused,
}

struct Place {
    port: Port,
    /// `None`: pinned.
    seen_ns: Option<u64>,
}

/// The table and the rules.
#[derive(Default)]
pub struct Switch {
    table: BTreeMap<Mac, Place>,
    ports: Vec<(Port, Addresses)>,
    swept_ns: Option<u64>,
}

/// Broadcast or multicast.
#[must_use]
pub fn is_group(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// Link-local group addresses, 01:80:c2:00:00:00 to :0f (pause, spanning tree, LLDP…), which no
/// bridge forwards: IEEE 802.1Q, table 8-1.
fn is_link_local(mac: Mac) -> bool {
    mac[..5] == [0x01, 0x80, 0xc2, 0x00, 0x00] && mac[5] < 0x10
}

impl Switch {
    /// A switch without ports.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a port, or changes what is known of it.
    pub fn attach(&mut self, port: Port, addresses: Addresses) {
        self.ports.retain(|&(other, _)| other != port);
        self.ports.push((port, addresses));
    }

    /// Removes a port and all that was known to be behind it.
    pub fn detach(&mut self, port: Port) {
        self.ports.retain(|&(other, _)| other != port);
        self.table.retain(|_, place| place.port != port);
    }

    /// Fixes an address to a port. False when the address is pinned elsewhere or the table is
    /// full of pinned ones.
    pub fn pin(&mut self, mac: Mac, port: Port) -> bool {
        match self.table.get(&mac) {
            Some(place) if place.seen_ns.is_none() => return place.port == port,
            Some(_) => {}
            None if self.table.len() >= CAPACITY => {
                let learned = self.table.iter().find(|(_, place)| place.seen_ns.is_some());
                let Some(mac) = learned.map(|(&mac, _)| mac) else { return false };
                self.table.remove(&mac);
            }
            None => {}
        }
        self.table.insert(mac, Place { port, seen_ns: None });
        true
    }

    /// Learns from a frame's source and tells where its destination is. That a frame from an
    /// exact port has the right source is for the caller to see to.
    pub fn forward(&mut self, now_ns: u64, from: Port, source: Mac, destination: Mac) -> Verdict {
        if is_group(source) || source == [0; 6] || is_link_local(destination) {
            return Verdict::Refused;
        }
        if !self.learn(now_ns, from, source) {
            return Verdict::Refused;
        }
        if is_group(destination) {
            return Verdict::All;
        }
        match self.table.get(&destination) {
            Some(place) if place.is_stale(now_ns) => Verdict::Unknown,
            Some(place) if place.port == from => Verdict::Local,
            Some(place) => Verdict::One(place.port),
            None => Verdict::Unknown,
        }
    }

    /// Ports other than `from` that an `All` or `Unknown` frame goes to.
    pub fn flood(&self, from: Port, verdict: Verdict) -> impl Iterator<Item = Port> + '_ {
        self.ports
            .iter()
            .filter(move |&&(port, addresses)| {
                port != from
                    && match verdict {
                        Verdict::All => true,
                        Verdict::Unknown => addresses == Addresses::Learned,
                        Verdict::One(to) => port == to,
                        Verdict::Local | Verdict::Refused => false,
                    }
            })
            .map(|&(port, _)| port)
    }

    /// Addresses in the table.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether no address is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// False when the source is pinned to another port: somebody outside uses a guest's address.
    fn learn(&mut self, now_ns: u64, from: Port, source: Mac) -> bool {
        if let Some(place) = self.table.get_mut(&source) {
            if place.seen_ns.is_none() {
                return place.port == from;
            }
            *place = Place { port: from, seen_ns: Some(now_ns) };
            return true;
        }
        if self.table.len() >= CAPACITY {
            self.sweep(now_ns);
        }
        if self.table.len() < CAPACITY {
            self.table.insert(source, Place { port: from, seen_ns: Some(now_ns) });
        }
        true
    }

    fn sweep(&mut self, now_ns: u64) {
        if self.swept_ns.is_some_and(|at| now_ns.saturating_sub(at) < SWEEP_NS) {
            return;
        }
        self.swept_ns = Some(now_ns);
        self.table.retain(|_, place| !place.is_stale(now_ns));
    }
}

impl Place {
    fn is_stale(&self, now_ns: u64) -> bool {
        self.seen_ns.is_some_and(|seen| now_ns.saturating_sub(seen) >= AGE_NS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Mac = [2, 0, 0, 0, 0, 0xa];
    const B: Mac = [2, 0, 0, 0, 0, 0xb];
    const OUTSIDE: Mac = [2, 0, 0, 0, 0, 0xc];
    const BROADCAST: Mac = [0xff; 6];

    fn two_vifs() -> Switch {
        let mut switch = Switch::new();
        switch.attach(Port::Nic, Addresses::Learned);
        for (place, mac) in [(0, A), (1, B)] {
            switch.attach(Port::Vif(place), Addresses::Exact);
            assert!(switch.pin(mac, Port::Vif(place)));
        }
        switch
    }

    fn targets(switch: &mut Switch, now: u64, from: Port, src: Mac, dst: Mac) -> Vec<Port> {
        let verdict = switch.forward(now, from, src, dst);
        switch.flood(from, verdict).collect()
    }

    #[test]
    fn unicast_goes_to_its_owner_and_unknown_unicast_only_outside() {
        let mut switch = two_vifs();
        assert_eq!(targets(&mut switch, 0, Port::Vif(0), A, B), [Port::Vif(1)]);
        assert_eq!(targets(&mut switch, 0, Port::Nic, OUTSIDE, A), [Port::Vif(0)]);
        assert_eq!(targets(&mut switch, 0, Port::Vif(0), A, [2, 9, 9, 9, 9, 9]), [Port::Nic]);
        assert_eq!(targets(&mut switch, 0, Port::Nic, OUTSIDE, [2, 9, 9, 9, 9, 9]), []);
    }

    #[test]
    fn a_frame_is_never_reflected() {
        let mut switch = two_vifs();
        assert_eq!(switch.forward(0, Port::Vif(0), A, A), Verdict::Local);
        assert_eq!(targets(&mut switch, 0, Port::Nic, OUTSIDE, [2, 0, 0, 0, 0, 0xd]), []);
        assert_eq!(
            targets(&mut switch, 0, Port::Nic, [2, 0, 0, 0, 0, 0xd], OUTSIDE),
            [],
            "both are behind the card"
        );
    }

    #[test]
    fn a_pinned_address_cannot_be_taken_from_outside() {
        let mut switch = two_vifs();
        assert_eq!(switch.forward(0, Port::Nic, A, B), Verdict::Refused);
        assert_eq!(targets(&mut switch, 0, Port::Vif(1), B, A), [Port::Vif(0)]);
        assert!(!switch.pin(A, Port::Vif(1)));
    }

    #[test]
    fn link_local_groups_and_group_sources_are_refused() {
        let mut switch = two_vifs();
        let pause = [0x01, 0x80, 0xc2, 0, 0, 1];
        assert_eq!(switch.forward(0, Port::Vif(0), A, pause), Verdict::Refused);
        assert_eq!(switch.forward(0, Port::Nic, BROADCAST, A), Verdict::Refused);
        assert_eq!(switch.forward(0, Port::Nic, [0; 6], A), Verdict::Refused);
    }

    #[test]
    fn a_learned_address_moves_and_ages() {
        let mut switch = two_vifs();
        switch.attach(Port::Vif(2), Addresses::Learned);
        assert_eq!(targets(&mut switch, 0, Port::Vif(0), A, OUTSIDE), [Port::Nic, Port::Vif(2)]);
        switch.forward(1, Port::Vif(2), OUTSIDE, BROADCAST);
        assert_eq!(targets(&mut switch, 2, Port::Vif(0), A, OUTSIDE), [Port::Vif(2)]);
        switch.forward(3, Port::Nic, OUTSIDE, BROADCAST);
        assert_eq!(targets(&mut switch, 4, Port::Vif(0), A, OUTSIDE), [Port::Nic]);
        let later = 3 + AGE_NS;
        assert_eq!(switch.forward(later, Port::Vif(0), A, OUTSIDE), Verdict::Unknown);
        assert_eq!(targets(&mut switch, later, Port::Vif(1), B, A), [Port::Vif(0)]);
    }

    fn made_up(n: u32) -> Mac {
        let [a, b, c, d] = n.to_be_bytes();
        [6, 1, a, b, c, d]
    }

    #[test]
    fn a_flood_of_addresses_fills_the_table_and_no_more() {
        let mut switch = two_vifs();
        for n in 0..3000 {
            switch.forward(5, Port::Nic, made_up(n), BROADCAST);
            assert!(switch.len() <= CAPACITY);
        }
        assert_eq!(targets(&mut switch, 5, Port::Nic, made_up(2999), B), [Port::Vif(1)]);
        assert!(switch.pin([2, 0, 0, 0, 0, 0xe], Port::Vif(0)), "a vif finds room nevertheless");
        switch.forward(5 + AGE_NS, Port::Nic, OUTSIDE, BROADCAST);
        assert_eq!(switch.len(), 4, "the aged ones made room");
    }

    #[test]
    fn a_removed_port_is_forgotten() {
        let mut switch = two_vifs();
        switch.detach(Port::Vif(1));
        assert_eq!(targets(&mut switch, 0, Port::Vif(0), A, B), [Port::Nic]);
        assert_eq!(targets(&mut switch, 0, Port::Vif(0), A, BROADCAST), [Port::Nic]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 256 }))]

        /// Whatever is sent from anywhere, nothing returns to its source, and what is pinned
        /// stays.
        #[test]
        fn no_reflection_and_pins_hold(
            frames in proptest::collection::vec((0_usize..4, 0_u8..8, 0_u8..8, 0_u64..2 * AGE_NS), 0..60)
        ) {
            let mut switch = two_vifs();
            switch.attach(Port::Vif(2), Addresses::Learned);
            for (from, source, destination, now) in frames {
                // Who is behind an exact port sends under its own address: anti-spoof saw to it.
                let (from, source) = match from {
                    0 => (Port::Vif(0), 2),
                    1 => (Port::Vif(1), 3),
                    2 => (Port::Vif(2), source),
                    _ => (Port::Nic, source),
                };
                let mac = |n: u8| if n == 7 { BROADCAST } else { [2, 0, 0, 0, 0, 8 + n] };
                let to = targets(&mut switch, now, from, mac(source), mac(destination));
                prop_assert!(!to.contains(&from));
                prop_assert!(!to.contains(&Port::Vif(1)) || destination == 3 || destination == 7);
                prop_assert_eq!(switch.forward(now, Port::Vif(0), A, B), Verdict::One(Port::Vif(1)));
            }
        }
    }
}
