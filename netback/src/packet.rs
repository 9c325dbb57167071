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

use core::fmt;
use heapless::Vec;
use xen_abi::GrantRef;
use xen_abi::netif::{
    EXTRA_FLAG_MORE, ExtraInfo, MAX_TX_SLOTS, TX_SLOT, TXF_CSUM_BLANK, TXF_EXTRA_INFO,
    TXF_MORE_DATA, TxRequest,
};
use xen_abi::{PAGE_SIZE, netif};
use zerocopy::FromBytes;

/// Data slots of one packet behind which a frontend is taken for a liar. Between
/// [`MAX_TX_SLOTS`] and this a packet is dropped whole, as Linux netback does for frontends that
/// count differently (`fatal_skb_slots`).
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

/// A packet, complete and checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Its parts, in order. Together `len` bytes.
    pub fragments: Vec<Fragment, MAX_TX_SLOTS>,
    /// Bytes of the frame.
    pub len: u16,
    /// Whether the layer-4 checksum is to be finished.
    pub csum_blank: bool,
    /// One for each slot that the packet took, in ring order.
    pub answers: Vec<Answer, MAX_SLOTS>,
    /// Why it is not to be sent, if so.
    pub refused: Option<Refusal>,
}

/// Why a well-formed packet is not sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Shorter than an Ethernet header.
    TooShort,
    /// Longer than an Ethernet frame.
    TooLong,
    /// More fragments than a backend has to accept.
    TooManySlots,
    /// The fragments are longer than the packet.
    SizeMismatch,
    /// It needs what was never offered, such as segmentation.
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
    Extra { then_data: bool },
    Data,
}

/// Puts packets together, slot by slot.
#[derive(Debug)]
pub struct Assembler {
    expects: Expects,
    slots: Vec<TxRequest, FATAL_SLOTS>,
    answers: Vec<Answer, MAX_SLOTS>,
    extras: usize,
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
        Self { expects: Expects::First, slots: Vec::new(), answers: Vec::new(), extras: 0 }
    }

    /// Whether the slots so far are not a whole packet.
    #[must_use]
    pub fn in_packet(&self) -> bool {
        self.expects != Expects::First
    }

    /// Takes the next slot. `Ok(Some)` when it completes a packet.
    ///
    /// # Errors
    /// What no correct frontend writes; nothing that follows it can be trusted.
    pub fn push(&mut self, slot: &[u8; TX_SLOT]) -> Result<Option<Packet>, Lie> {
        let more = match self.expects {
            Expects::Extra { then_data } => self.push_extra(slot, then_data)?,
            Expects::First | Expects::Data => self.push_data(slot)?,
        };
        if more {
            return Ok(None);
        }
        let done = core::mem::take(self);
        done.finish().map(Some)
    }

    fn push_data(&mut self, slot: &[u8; TX_SLOT]) -> Result<bool, Lie> {
        let request = TxRequest::read_from_bytes(slot).expect("a slot has the size of a request");
        let first = self.expects == Expects::First;
        self.slots.push(request).map_err(|_| Lie::EndlessChain)?;
        self.answers.push(Answer::Data(request.id)).map_err(|_| Lie::EndlessChain)?;
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
        self.answers.push(Answer::Extra).map_err(|_| Lie::EndlessChain)?;
        if extra.flags & EXTRA_FLAG_MORE != 0 {
            return Ok(true);
        }
        self.expects = Expects::Data;
        Ok(then_data)
    }

    fn finish(self) -> Result<Packet, Lie> {
        let Self { slots, answers, extras, .. } = self;
        let first = slots[0];
        let mut packet = Packet {
            fragments: Vec::new(),
            len: first.size,
            csum_blank: first.flags & TXF_CSUM_BLANK != 0,
            answers,
            refused: None,
        };
        let others: u32 = slots[1..].iter().map(|slot| u32::from(slot.size)).sum();
        // A first fragment that is too long for 16 bits cannot be: `first.size` is not.
        let first_len = u32::from(first.size).checked_sub(others);
        packet.refused = refusal(first.size, slots.len(), extras, first_len.is_some());
        for (index, slot) in slots.iter().enumerate() {
            let len = match (index, first_len) {
                (0, Some(len)) => u16::try_from(len).expect("not above the first slot's size"),
                (0, None) => 0,
                _ => slot.size,
            };
            if usize::from(slot.offset) + usize::from(len) > PAGE_SIZE {
                return Err(Lie::CrossesPage { offset: slot.offset, len });
            }
            // A refused packet may have more than fit; nobody reads its fragments.
            let _ = packet.fragments.push(Fragment { gref: slot.gref, offset: slot.offset, len });
        }
        Ok(packet)
    }
}

fn refusal(size: u16, slots: usize, extras: usize, sizes_agree: bool) -> Option<Refusal> {
    let size = usize::from(size);
    if !sizes_agree {
        Some(Refusal::SizeMismatch)
    } else if slots > netif::MAX_TX_SLOTS {
        Some(Refusal::TooManySlots)
    } else if extras > 0 {
        Some(Refusal::NotOffered)
    } else if size < crate::frame::HEADER {
        Some(Refusal::TooShort)
    } else if size > domain_api::nic::MAX_FRAME {
        Some(Refusal::TooLong)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

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
        assert_eq!(assembler.push(&data(1, 10, 1000, TXF_MORE_DATA)), Ok(None));
        assert_eq!(assembler.push(&data(2, 0, 300, TXF_MORE_DATA)), Ok(None));
        assert!(assembler.in_packet());
        let packet = assembler.push(&data(3, 5, 100, 0)).unwrap().unwrap();
        let lens: std::vec::Vec<u16> = packet.fragments.iter().map(|part| part.len).collect();
        assert_eq!((lens.as_slice(), packet.len), ([600, 300, 100].as_slice(), 1000));
        assert_eq!(packet.answers, [Answer::Data(1), Answer::Data(2), Answer::Data(3)]);
        assert_eq!(packet.refused, None);
        assert!(!assembler.in_packet());
    }

    #[test]
    fn an_extra_info_has_an_answer_of_its_own() {
        let mut assembler = Assembler::new();
        assert_eq!(assembler.push(&data(7, 0, 60, TXF_EXTRA_INFO)), Ok(None));
        let packet = assembler.push(&extra(netif::EXTRA_GSO, 0)).unwrap().unwrap();
        assert_eq!(packet.answers, [Answer::Data(7), Answer::Extra]);
        assert_eq!(packet.refused, Some(Refusal::NotOffered));
        assert_eq!(assembler.push(&data(7, 0, 60, TXF_EXTRA_INFO)), Ok(None));
        assert_eq!(assembler.push(&extra(9, 0)), Err(Lie::BadExtra(9)));
    }

    #[test]
    fn eighteen_slots_are_taken_twenty_dropped_more_is_a_lie() {
        for (count, expected) in [(18, Some(None)), (20, Some(Some(Refusal::TooManySlots)))] {
            let mut assembler = Assembler::new();
            let mut last = None;
            for index in 0..count {
                let flags = if index + 1 == count { 0 } else { TXF_MORE_DATA };
                let size = if index == 0 { 60 * count } else { 60 };
                last = assembler.push(&data(index, 0, size, flags)).unwrap();
            }
            assert_eq!(last.map(|packet| packet.refused), expected);
        }
        let mut assembler = Assembler::new();
        let result = (0..21).map(|id| assembler.push(&data(id, 0, 60, TXF_MORE_DATA))).last();
        assert_eq!(result, Some(Err(Lie::EndlessChain)));
    }

    #[test]
    fn sizes_and_pages_are_checked() {
        let one = |size, offset| Assembler::new().push(&data(0, offset, size, 0));
        let refused = |size| one(size, 0).unwrap().unwrap().refused;
        assert_eq!(refused(13), Some(Refusal::TooShort));
        assert_eq!(refused(14), None);
        assert_eq!(refused(1518), None);
        assert_eq!(refused(1519), Some(Refusal::TooLong));
        assert_eq!(one(60, 4050), Err(Lie::CrossesPage { offset: 4050, len: 60 }));
        let mut assembler = Assembler::new();
        assembler.push(&data(0, 0, 100, TXF_MORE_DATA)).unwrap();
        let packet = assembler.push(&data(1, 0, 101, 0)).unwrap().unwrap();
        assert_eq!(packet.refused, Some(Refusal::SizeMismatch));
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
                    Ok(None) => {}
                    Ok(Some(packet)) => {
                        prop_assert_eq!(packet.answers.len(), pending);
                        pending = 0;
                        if packet.refused.is_none() {
                            let total: u32 = packet.fragments.iter().map(|part| u32::from(part.len)).sum();
                            prop_assert_eq!(total, u32::from(packet.len));
                        }
                        for part in &packet.fragments {
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
