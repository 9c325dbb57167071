//! From transmit slots to packets.
//!
//! A packet starts with a data slot whose `size` is that of the whole packet. When its flags say
//! so, the next slots are extra infos, as long as each says that another one follows; then data
//! slots go on while the last one had [`TXF_MORE_DATA`]. The first fragment is what the others
//! leave of the whole size. Source: `xen/include/public/io/netif.h`.
//!
//! [`Assembler`] is fed one private copy of a slot after the other and never looks at shared
//! memory. What it refuses falls in two classes: a packet that a correct frontend might send but
//! that we do not take is answered with an error ([`Refusal`]); a slot that no correct frontend
//! writes ends the connection ([`Lie`]), because what follows it cannot be told apart.
//!
//! A packet that is whole stays in the assembler until somebody has room for it.

use crate::segment::{Cutting, LEAST_MSS};
use crate::switch::{Mac, is_group};
use core::fmt;
use heapless::Vec;
use xen_abi::GrantRef;
use xen_abi::netif::{
    EXTRA_FLAG_MORE, EXTRA_GSO, EXTRA_HASH, EXTRA_MCAST_ADD, EXTRA_MCAST_DEL, ExtraInfo, GSO_TCPV4,
    GSO_TCPV6, McastInfo, TX_SLOT, TXF_CSUM_BLANK, TXF_EXTRA_INFO, TXF_MORE_DATA, TxRequest,
};
use xen_abi::{PAGE_SIZE, netif};
use zerocopy::FromBytes;

/// Data slots of one packet behind which a frontend is taken for a liar. Between
/// [`netif::MAX_TX_SLOTS`] and this a packet is dropped whole, as Linux netback does for frontends
/// that count differently (`fatal_skb_slots`).
pub const FATAL_SLOTS: usize = 20;
/// Extra infos of one packet behind which a frontend is taken for a liar: one of each kind.
pub const MAX_EXTRAS: usize = 5;
const MAX_EXTRA_KIND: u8 = 5;
/// Slots of one packet, at most.
pub const MAX_SLOTS: usize = FATAL_SLOTS + MAX_EXTRAS;

/// Part of a packet in one page of the frontend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fragment {
    /// The page.
    pub gref: GrantRef,
    /// Where in the page.
    pub offset: u16,
    /// Bytes; `offset + len` is inside the page.
    pub len: u16,
}

/// What a slot's response has to carry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The request's id, and the packet's status.
    Data(u16),
    /// [`netif::RSP_NULL`].
    Extra,
}

/// A multicast group that the guest wants to hear, or no longer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupChange {
    /// The group.
    pub group: Mac,
    /// Whether it wants to.
    pub add: bool,
}

/// A packet, complete and checked, but for what is in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Bytes.
    pub len: u16,
    /// Whether the layer-4 checksum is to be finished.
    pub csum_blank: bool,
    /// How it is to be cut into frames, if it is.
    pub cutting: Option<Cutting>,
    /// It is none at all, only this message to us.
    pub message: Option<GroupChange>,
    /// Why it is not to be sent, if so.
    pub refused: Option<Refusal>,
}

/// Why a well-formed packet is not sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Shorter than an Ethernet header.
    TooShort,
    /// Longer than an Ethernet frame, and not to be cut.
    TooLong,
    /// More fragments than a backend has to accept.
    TooManySlots,
    /// The fragments are longer than the packet.
    SizeMismatch,
    /// It is to be cut in a way that we do not know, or into frames of too little payload.
    BadCutting,
    /// A group to hear that is none.
    BadGroup,
    /// It needs what was never offered.
    NotOffered,
}

/// What no correct frontend does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lie {
    /// A packet that does not end.
    EndlessChain,
    /// A fragment that leaves its page.
    CrossesPage {
        /// Where it starts.
        offset: u16,
        /// Its bytes.
        len: u16,
    },
    /// An extra info of a kind that does not exist.
    BadExtra(u8),
}

impl fmt::Display for Lie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EndlessChain => {
                write!(f, "a packet of more than {FATAL_SLOTS} data slots or {MAX_EXTRAS} extras")
            }
            Self::CrossesPage { offset, len } => {
                write!(f, "a fragment of {len} bytes at offset {offset} leaves its page")
            }
            Self::BadExtra(kind) => write!(f, "an extra info of unknown kind {kind}"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expects {
    First,
    Extra {
        then_data: bool,
    },
    Data,
    /// Nothing: the packet is whole.
    Pickup(Packet),
}

/// Puts packets together, slot by slot.
#[derive(Debug)]
pub struct Assembler {
    expects: Expects,
    slots: Vec<TxRequest, FATAL_SLOTS>,
    extras: usize,
    cutting: Option<Result<Cutting, Refusal>>,
    message: Option<GroupChange>,
    /// An extra info that we did not offer to understand.
    strange: bool,
}

impl Default for Assembler {
    fn default() -> Self {
        Self::new()
    }
}

impl Assembler {
    /// Between two packets.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            expects: Expects::First,
            slots: Vec::new(),
            extras: 0,
            cutting: None,
            message: None,
            strange: false,
        }
    }

    /// The packet, when it is whole.
    #[must_use]
    pub const fn whole(&self) -> Option<Packet> {
        match self.expects {
            Expects::Pickup(packet) => Some(packet),
            _ => None,
        }
    }

    /// Parts of the packet that is whole, in order. Together they are as long as it is, unless it
    /// is refused.
    pub fn fragments(&self) -> impl Iterator<Item = Fragment> + '_ {
        let others = self.others();
        self.slots.iter().enumerate().map(move |(index, slot)| {
            let is_first = index == 0;
            let len = if is_first { first_len(slot.size, others).unwrap_or(0) } else { slot.size };
            Fragment { gref: slot.gref, offset: slot.offset, len }
        })
    }

    /// One answer for each slot that the packet took, in ring order.
    pub fn answers(&self) -> impl Iterator<Item = Answer> + '_ {
        let data = |slot: &TxRequest| Answer::Data(slot.id);
        let extras = core::iter::repeat_n(Answer::Extra, self.extras);
        let (first, rest) = self.slots.split_at(self.slots.len().min(1));
        first.iter().map(data).chain(extras).chain(rest.iter().map(data))
    }

    /// Forgets the packet, for the next one.
    pub fn clear(&mut self) {
        self.expects = Expects::First;
        self.slots.clear();
        (self.extras, self.cutting, self.message, self.strange) = (0, None, None, false);
    }

    /// Takes the next slot. True when it completes a packet.
    ///
    /// # Errors
    /// What no correct frontend writes; nothing that follows it can be trusted.
    ///
    /// # Panics
    /// When a packet that is whole was not cleared.
    pub fn push(&mut self, slot: &[u8; TX_SLOT]) -> Result<bool, Lie> {
        let more = match self.expects {
            Expects::Extra { then_data } => self.push_extra(slot, then_data)?,
            Expects::First | Expects::Data => self.push_data(slot)?,
            Expects::Pickup(_) => panic!("a packet is taken before the next one comes"),
        };
        if !more {
            self.expects = Expects::Pickup(self.finish()?);
        }
        Ok(!more)
    }

    fn push_data(&mut self, slot: &[u8; TX_SLOT]) -> Result<bool, Lie> {
        let request = TxRequest::read_from_bytes(slot).expect("a slot has the size of a request");
        let first = self.expects == Expects::First;
        self.slots.push(request).map_err(|_| Lie::EndlessChain)?;
        let more = request.flags & TXF_MORE_DATA != 0;
        // Extra infos follow the first slot only; netback in Linux ignores the flag elsewhere.
        if first && request.flags & TXF_EXTRA_INFO != 0 {
            self.expects = Expects::Extra { then_data: more };
            return Ok(true);
        }
        self.expects = Expects::Data;
        Ok(more)
    }

    fn push_extra(&mut self, slot: &[u8; TX_SLOT], then_data: bool) -> Result<bool, Lie> {
        let (extra, _) = ExtraInfo::read_from_prefix(slot).expect("a slot is larger");
        if extra.kind == 0 || extra.kind > MAX_EXTRA_KIND {
            return Err(Lie::BadExtra(extra.kind));
        }
        self.extras += 1;
        if self.extras > MAX_EXTRAS {
            return Err(Lie::EndlessChain);
        }
        match extra.kind {
            EXTRA_GSO => self.cutting = Some(cutting(&extra)),
            EXTRA_MCAST_ADD | EXTRA_MCAST_DEL => {
                let (change, _) = McastInfo::read_from_prefix(slot).expect("a slot is larger");
                let add = extra.kind == EXTRA_MCAST_ADD;
                self.message = Some(GroupChange { group: change.address, add });
            }
            // What a receiver may do with a packet's hash is no matter of the one who carries it.
            EXTRA_HASH => {}
            _ => self.strange = true,
        }
        if extra.flags & EXTRA_FLAG_MORE != 0 {
            return Ok(true);
        }
        self.expects = Expects::Data;
        Ok(then_data)
    }

    /// Bytes of all fragments but the first.
    fn others(&self) -> u32 {
        self.slots.iter().skip(1).map(|slot| u32::from(slot.size)).sum()
    }

    fn finish(&self) -> Result<Packet, Lie> {
        for Fragment { offset, len, .. } in self.fragments() {
            if usize::from(offset) + usize::from(len) > PAGE_SIZE {
                return Err(Lie::CrossesPage { offset, len });
            }
        }
        let first = self.slots[0];
        let cutting = self.cutting.and_then(Result::ok);
        Ok(Packet {
            len: first.size,
            csum_blank: first.flags & TXF_CSUM_BLANK != 0,
            cutting,
            message: self.message,
            refused: self.refusal(usize::from(first.size)),
        })
    }

    fn refusal(&self, size: usize) -> Option<Refusal> {
        if let Some(change) = self.message {
            return (!is_group(change.group)).then_some(Refusal::BadGroup);
        }
        if first_len(self.slots[0].size, self.others()).is_none() {
            Some(Refusal::SizeMismatch)
        } else if self.slots.len() > netif::MAX_TX_SLOTS {
            Some(Refusal::TooManySlots)
        } else if self.strange {
            Some(Refusal::NotOffered)
        } else if size < crate::frame::HEADER {
            Some(Refusal::TooShort)
        } else {
            match self.cutting {
                Some(Err(refusal)) => Some(refusal),
                None if size > domain_api::nic::MAX_FRAME => Some(Refusal::TooLong),
                _ => None,
            }
        }
    }
}

/// What the other fragments leave of the whole size.
fn first_len(size: u16, others: u32) -> Option<u16> {
    u32::from(size).checked_sub(others).and_then(|len| u16::try_from(len).ok())
}

fn cutting(extra: &ExtraInfo) -> Result<Cutting, Refusal> {
    let ipv6 = match extra.gso_type {
        GSO_TCPV4 => false,
        GSO_TCPV6 => true,
        _ => return Err(Refusal::BadCutting),
    };
    if extra.gso_size < LEAST_MSS {
        return Err(Refusal::BadCutting);
    }
    Ok(Cutting { ipv6, mss: extra.gso_size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    fn take(assembler: &mut Assembler) -> Packet {
        let packet = assembler.whole().unwrap();
        assembler.clear();
        packet
    }

    fn data(id: u16, offset: u16, size: u16, flags: u16) -> [u8; TX_SLOT] {
        let request = TxRequest { gref: GrantRef(u32::from(id) + 100), offset, flags, id, size };
        request.as_bytes().try_into().unwrap()
    }

    fn extra(kind: u8, flags: u8) -> [u8; TX_SLOT] {
        let mut slot = [0; TX_SLOT];
        slot[0] = kind;
        slot[1] = flags;
        slot
    }

    #[test]
    fn the_first_fragment_is_what_the_others_leave() {
        let mut assembler = Assembler::new();
        assert_eq!(assembler.push(&data(1, 10, 1000, TXF_MORE_DATA)), Ok(false));
        assert_eq!(assembler.push(&data(2, 0, 300, TXF_MORE_DATA)), Ok(false));
        assert_eq!(assembler.whole(), None);
        assert_eq!(assembler.push(&data(3, 5, 100, 0)), Ok(true));
        let lens: std::vec::Vec<u16> = assembler.fragments().map(|part| part.len).collect();
        assert_eq!(lens, [600, 300, 100]);
        let answers: std::vec::Vec<Answer> = assembler.answers().collect();
        assert_eq!(answers, [Answer::Data(1), Answer::Data(2), Answer::Data(3)]);
        let packet = take(&mut assembler);
        assert_eq!((packet.len, packet.refused), (1000, None));
        assert_eq!(assembler.push(&data(4, 0, 60, 0)), Ok(true));
    }

    #[test]
    fn an_extra_info_says_how_a_packet_is_cut() {
        let mut assembler = Assembler::new();
        let mut cut = |kind: u8, mss: u16| {
            let mut slot = extra(EXTRA_GSO, 0);
            slot[2..4].copy_from_slice(&mss.to_le_bytes());
            slot[4] = kind;
            assert_eq!(
                assembler.push(&data(7, 0, 9060, TXF_EXTRA_INFO | TXF_MORE_DATA)),
                Ok(false)
            );
            assert_eq!(assembler.push(&slot), Ok(false));
            for (size, flags, last) in [(3000, 4, false), (3000, 4, false), (2900, 0, true)] {
                assert_eq!(assembler.push(&data(8, 0, size, flags)), Ok(last));
            }
            let answers: std::vec::Vec<Answer> = assembler.answers().collect();
            assert_eq!(answers[..3], [Answer::Data(7), Answer::Extra, Answer::Data(8)]);
            assert_eq!(answers.len(), 5);
            let packet = take(&mut assembler);
            assert_eq!(packet.len, 9060);
            packet.refused.ok_or(packet.cutting)
        };
        assert_eq!(cut(GSO_TCPV4, 1448), Err(Some(Cutting { ipv6: false, mss: 1448 })));
        assert_eq!(cut(GSO_TCPV6, 1428), Err(Some(Cutting { ipv6: true, mss: 1428 })));
        assert_eq!(cut(0, 1448), Ok(Refusal::BadCutting));
        assert_eq!(cut(3, 1448), Ok(Refusal::BadCutting));
        assert_eq!(cut(GSO_TCPV4, LEAST_MSS - 1), Ok(Refusal::BadCutting));
    }

    #[test]
    fn extra_infos_of_other_kinds_are_told_apart() {
        let mut assembler = Assembler::new();
        assert_eq!(assembler.push(&data(7, 0, 60, TXF_EXTRA_INFO)), Ok(false));
        assert_eq!(assembler.push(&extra(EXTRA_HASH, EXTRA_FLAG_MORE)), Ok(false));
        assert_eq!(assembler.push(&extra(5, 0)), Ok(true));
        assert_eq!(take(&mut assembler).refused, Some(Refusal::NotOffered));
        let group = [0x33, 0x33, 0, 0, 0, 1];
        for (address, add, refused) in
            [(group, true, None), (group, false, None), ([2; 6], true, Some(Refusal::BadGroup))]
        {
            let mut slot = extra(if add { EXTRA_MCAST_ADD } else { EXTRA_MCAST_DEL }, 0);
            slot[2..8].copy_from_slice(&address);
            assert_eq!(assembler.push(&data(7, 0, 0, TXF_EXTRA_INFO)), Ok(false));
            assert_eq!(assembler.push(&slot), Ok(true));
            let packet = take(&mut assembler);
            assert_eq!(packet.message, Some(GroupChange { group: address, add }));
            assert_eq!(packet.refused, refused);
        }
        assert_eq!(assembler.push(&data(7, 0, 60, TXF_EXTRA_INFO)), Ok(false));
        assert_eq!(assembler.push(&extra(9, 0)), Err(Lie::BadExtra(9)));
    }

    #[test]
    fn eighteen_slots_are_taken_twenty_dropped_more_is_a_lie() {
        for (count, expected) in [(18, None), (20, Some(Refusal::TooManySlots))] {
            let mut assembler = Assembler::new();
            for index in 0..count {
                let flags = if index + 1 == count { 0 } else { TXF_MORE_DATA };
                let size = if index == 0 { 60 * count } else { 60 };
                assert_eq!(assembler.push(&data(index, 0, size, flags)), Ok(flags == 0));
            }
            assert_eq!(take(&mut assembler).refused, expected);
        }
        let mut assembler = Assembler::new();
        let result = (0..21).map(|id| assembler.push(&data(id, 0, 60, TXF_MORE_DATA))).last();
        assert_eq!(result, Some(Err(Lie::EndlessChain)));
    }

    #[test]
    fn sizes_and_pages_are_checked() {
        let refused = |size| {
            let mut assembler = Assembler::new();
            assert_eq!(assembler.push(&data(0, 0, size, 0)), Ok(true));
            take(&mut assembler).refused
        };
        assert_eq!(refused(13), Some(Refusal::TooShort));
        assert_eq!(refused(14), None);
        assert_eq!(refused(1518), None);
        assert_eq!(refused(1519), Some(Refusal::TooLong));
        let crossing = Assembler::new().push(&data(0, 4050, 60, 0));
        assert_eq!(crossing, Err(Lie::CrossesPage { offset: 4050, len: 60 }));
        let mut assembler = Assembler::new();
        assert_eq!(assembler.push(&data(0, 0, 100, TXF_MORE_DATA)), Ok(false));
        assert_eq!(assembler.push(&data(1, 0, 101, 0)), Ok(true));
        assert_eq!(take(&mut assembler).refused, Some(Refusal::SizeMismatch));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 512 }))]

        /// Any bytes: each slot is answered exactly once, and what is accepted stays in pages.
        #[test]
        fn any_slots_give_consistent_packets(
            slots in proptest::collection::vec((any::<[u8; 4]>(), 0_u16..4200, 0_u16..16, any::<u16>(), 0_u16..1600), 1..80)
        ) {
            let mut assembler = Assembler::new();
            let mut pending = 0;
            for (head, offset, flags, id, size) in slots {
                let mut slot = data(id, offset, size, flags);
                slot[..4].copy_from_slice(&head);
                slot[0] %= 8;
                pending += 1;
                match assembler.push(&slot) {
                    Ok(false) => prop_assert_eq!(assembler.whole(), None),
                    Ok(true) => {
                        prop_assert_eq!(assembler.answers().count(), pending);
                        pending = 0;
                        let fragments: std::vec::Vec<Fragment> = assembler.fragments().collect();
                        let packet = take(&mut assembler);
                        if packet.refused.is_none() && packet.message.is_none() {
                            let total: u32 = fragments.iter().map(|part| u32::from(part.len)).sum();
                            prop_assert_eq!(total, u32::from(packet.len));
                            prop_assert!(fragments.len() <= netif::MAX_TX_SLOTS);
                        }
                        for part in fragments {
                            prop_assert!(usize::from(part.offset) + usize::from(part.len) <= PAGE_SIZE);
                        }
                    }
                    Err(_) => break,
                }
                prop_assert!(pending <= MAX_SLOTS);
            }
        }
    }
}
