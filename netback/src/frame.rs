//! What is inside a packet: addresses, layers, checksums, flows.
//!
//! Everything here looks at a private copy of the packet's first bytes, its *head*. Where the
//! rest is, in which pages, is the data path's matter.
//!
//! A *blank* checksum is one that its sender left to us: the field holds the sum of the pseudo
//! header only (`NETTXF_csum_blank`). Sources: RFC 1071 (the sum), RFC 768 (a UDP sum of 0 is sent
//! as all ones), RFC 9293 §3.1, RFC 8200 §4 and §8.1.

use crate::switch::Mac;
use domain_api::nic::{Headers, MAX_HEADERS};

/// Bytes of an Ethernet header.
pub const HEADER: usize = 14;
/// First bytes of a packet that are looked at. Whatever has its headers behind them has no
/// layers that we know.
pub const HEAD: usize = MAX_HEADERS;

/// Destination and source of a frame.
#[must_use]
pub fn addresses(header: &[u8; HEADER]) -> (Mac, Mac) {
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, ..] = *header;
    ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5])
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
/// IPv6 extension headers: hop-by-hop options, routing, destination options.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;
/// Extension headers that are walked over; more than any sender uses.
const MAX_EXTENSIONS: usize = 8;

/// Where the checksum is in a header of TCP, and the least bytes of the header.
const TCP: (usize, usize) = (16, 20);
/// The same of UDP.
const UDP: (usize, usize) = (6, 8);

/// The layers of a whole TCP or UDP packet: no fragment, nothing cut off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layers {
    /// Where the headers are.
    pub headers: Headers,
    /// Where the IP packet ends; padding may follow.
    pub end: usize,
    /// There are IPv6 extension headers.
    pub extended: bool,
    /// One of them is a routing header: the address that counts is in it.
    pub routed: bool,
}

impl Layers {
    /// Finds the layers of a packet of `len` bytes that starts with `head`. `None`: it is not TCP or
    /// UDP over IP, a fragment, cut short, or its headers do not end in `head`.
    #[must_use]
    pub fn of(head: &[u8], len: usize) -> Option<Self> {
        let (ethertype, l3) = network_layer(head)?;
        let packet = head.get(l3..)?;
        let found = match ethertype {
            ETHERTYPE_IPV4 => ipv4(packet)?,
            ETHERTYPE_IPV6 => ipv6(packet)?,
            _ => return None,
        };
        let (l4, end) = (l3 + found.start, l3 + found.end);
        let tcp = match found.protocol {
            PROTOCOL_TCP => true,
            PROTOCOL_UDP => false,
            _ => return None,
        };
        let bytes = if tcp { usize::from(*head.get(l4 + 12)? >> 4) * 4 } else { UDP.1 };
        let payload = l4 + bytes;
        let whole = (!tcp || bytes >= TCP.1) && payload <= end && end <= len;
        if !whole || payload > head.len() {
            return None;
        }
        let headers = Headers {
            ipv6: ethertype == ETHERTYPE_IPV6,
            tcp,
            l3: u16::try_from(l3).ok()?,
            l4: u16::try_from(l4).ok()?,
            end: u16::try_from(payload).ok()?,
        };
        Some(Self { headers, end, extended: found.extended, routed: found.routed })
    }

    /// Where the TCP or UDP header starts.
    #[must_use]
    pub fn l4(&self) -> usize {
        usize::from(self.headers.l4)
    }

    /// Where the checksum is.
    #[must_use]
    pub fn checksum(&self) -> usize {
        self.l4() + if self.headers.tcp { TCP.0 } else { UDP.0 }
    }

    /// Bytes of payload.
    #[must_use]
    pub fn payload(&self) -> usize {
        self.end - usize::from(self.headers.end)
    }

    /// The checksum of a packet whose bytes from [`Self::l4`] on have this sum, a blank checksum
    /// included.
    #[must_use]
    pub fn finished(&self, sum: Sum) -> [u8; 2] {
        match (self.headers.tcp, !sum.folded()) {
            (false, 0) => [0xff, 0xff],
            (_, value) => value.to_be_bytes(),
        }
    }
}

/// The sum over the pseudo header of a packet with `len` bytes from the TCP or UDP header on.
/// Not for one with a routing header.
#[must_use]
pub fn pseudo_header(head: &[u8], headers: &Headers, len: usize) -> Sum {
    let l3 = usize::from(headers.l3);
    let addresses = if headers.ipv6 { l3 + 8..l3 + 40 } else { l3 + 12..l3 + 20 };
    let mut sum = Sum::default();
    sum.add(&head[addresses]);
    sum.total += u64::from(if headers.tcp { PROTOCOL_TCP } else { PROTOCOL_UDP });
    sum.total += len as u64;
    sum
}

/// A number that is the same for all packets of a flow: of the addresses, and the ports where
/// every packet of the flow has them.
#[must_use]
pub fn flow(head: &[u8]) -> u32 {
    flow_words(head).unwrap_or(0)
}

fn flow_words(head: &[u8]) -> Option<u32> {
    let (ethertype, l3) = network_layer(head)?;
    let packet = head.get(l3..)?;
    let (addresses, ports) = match ethertype {
        ETHERTYPE_IPV4 => {
            let start = usize::from(packet.first()? & 0xf) * 4;
            let ports = *packet.get(9)? == PROTOCOL_TCP || *packet.get(9)? == PROTOCOL_UDP;
            let whole = half(packet, 6)? & 0x3fff == 0;
            (packet.get(12..20)?, (ports && whole).then_some(start))
        }
        ETHERTYPE_IPV6 => {
            let next = *packet.get(6)?;
            let ports = next == PROTOCOL_TCP || next == PROTOCOL_UDP;
            (packet.get(8..40)?, ports.then_some(40))
        }
        _ => return None,
    };
    let ports = ports.and_then(|start| packet.get(start..start + 4)).unwrap_or(&[0; 4]);
    let mut hash = 0_u32;
    for word in addresses.chunks_exact(4).chain([ports]) {
        hash ^= u32::from_be_bytes([word[0], word[1], word[2], word[3]]);
        hash = hash.wrapping_mul(0x9e37_79b1).rotate_left(15);
    }
    Some(hash ^ hash >> 16)
}

/// Ethertype and start of the network layer, behind a VLAN tag if there is one.
fn network_layer(head: &[u8]) -> Option<(u16, usize)> {
    match half(head, 12)? {
        ETHERTYPE_VLAN => Some((half(head, 16)?, 18)),
        ethertype => Some((ethertype, HEADER)),
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// What an IP packet carries.
struct Carried {
    protocol: u8,
    start: usize,
    end: usize,
    extended: bool,
    routed: bool,
}

fn ipv4(packet: &[u8]) -> Option<Carried> {
    let first = *packet.first()?;
    let start = usize::from(first & 0xf) * 4;
    let end = usize::from(half(packet, 2)?);
    let fragment = half(packet, 6)? & 0x3fff;
    let whole = first >> 4 == 4 && start >= 20 && fragment == 0 && end >= start;
    let protocol = *packet.get(9)?;
    whole.then_some(Carried { protocol, start, end, extended: false, routed: false })
}

fn ipv6(packet: &[u8]) -> Option<Carried> {
    if *packet.first()? >> 4 != 6 {
        return None;
    }
    let end = 40 + usize::from(half(packet, 4)?);
    let mut protocol = *packet.get(6)?;
    let (mut start, mut routed) = (40, false);
    for _ in 0..MAX_EXTENSIONS {
        if !matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION) {
            let extended = start > 40;
            return (start <= end).then_some(Carried { protocol, start, end, extended, routed });
        }
        routed |= protocol == ROUTING;
        protocol = *packet.get(start)?;
        start += 8 + usize::from(*packet.get(start + 1)?) * 8;
    }
    None
}

/// One's-complement sum of big-endian 16-bit words.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sum {
    total: u64,
    /// The next byte is a word's second one.
    odd: bool,
}

impl Sum {
    /// Adds what follows the bytes that were added before.
    pub fn add(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        if self.odd {
            let Some((&first, rest)) = bytes.split_first() else { return };
            self.total += u64::from(first);
            bytes = rest;
        }
        let (words, rest) = bytes.as_chunks();
        let mut tail = [0; 8];
        tail[..rest.len()].copy_from_slice(rest);
        for word in words.iter().chain([&tail]) {
            // Half words: their carries gather in the upper half, for 2^32 words.
            let word = u64::from_be_bytes(*word);
            self.total += (word >> 32) + (word & 0xffff_ffff);
        }
        self.odd = rest.len() % 2 == 1;
    }

    /// Adds a sum whose first byte comes at an even place.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self { total: self.total + u64::from(other.folded()), odd: false }
    }

    /// The sum, in 16 bits. Not complemented.
    #[must_use]
    pub fn folded(self) -> u16 {
        let mut total = self.total;
        while total > 0xffff {
            total = (total & 0xffff) + (total >> 16);
        }
        #[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits above")]
        {
            total as u16
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    /// Word by word, as RFC 1071 defines it.
    fn plain_sum(bytes: &[u8]) -> u16 {
        let mut total = 0_u32;
        for pair in bytes.chunks(2) {
            let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            total += u32::from(word);
            total = (total & 0xffff) + (total >> 16);
        }
        u16::try_from(total).unwrap()
    }

    fn pseudo_v4(source: [u8; 4], destination: [u8; 4], protocol: u8, len: usize) -> Vec<u8> {
        let mut header = Vec::new();
        header.extend(source);
        header.extend(destination);
        header.extend([0, protocol]);
        header.extend(u16::try_from(len).unwrap().to_be_bytes());
        header
    }

    /// A frame as a frontend sends it with `csum_blank`, and what makes its sum whole.
    pub(crate) fn blank_udp_v4(payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let len = 8 + payload.len();
        let pseudo = pseudo_v4([10, 0, 0, 1], [10, 0, 0, 2], 17, len);
        let mut frame = Vec::from([0_u8; 12]);
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(u16::try_from(20 + len).unwrap().to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x12, 0x34, 0x56, 0x78]);
        frame.extend(u16::try_from(len).unwrap().to_be_bytes());
        frame.extend(plain_sum(&pseudo).to_be_bytes());
        frame.extend(payload);
        (frame, pseudo)
    }

    fn blank_tcp_v6(payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let len = 20 + payload.len();
        let mut pseudo = Vec::from([0x20_u8; 32]);
        pseudo.extend(u32::try_from(len).unwrap().to_be_bytes());
        pseudo.extend([0, 0, 0, 6]);
        let mut frame = Vec::from([0_u8; 12]);
        frame.extend([0x81, 0x00, 0, 7, 0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(u16::try_from(8 + len).unwrap().to_be_bytes());
        frame.extend([60, 64]);
        frame.extend([0x20; 32]);
        frame.extend([6, 0, 1, 4, 0, 0, 0, 0]);
        frame.extend([7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0x50, 7, 7, 7]);
        frame.extend(plain_sum(&pseudo).to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(payload);
        (frame, pseudo)
    }

    fn layers(frame: &[u8]) -> Option<Layers> {
        Layers::of(&frame[..frame.len().min(HEAD)], frame.len())
    }

    fn finish(frame: &mut [u8]) {
        let layers = layers(frame).unwrap();
        let mut sum = Sum::default();
        sum.add(&frame[layers.l4()..layers.end]);
        let at = layers.checksum();
        frame[at..at + 2].copy_from_slice(&layers.finished(sum));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 256 }))]

        /// A receiver that sums pseudo-header and payload gets all ones (RFC 1071 §1).
        #[test]
        fn finished_frames_verify(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (mut frame, pseudo) = blank_udp_v4(&payload);
            finish(&mut frame);
            let all: Vec<u8> = pseudo.iter().chain(&frame[34..]).copied().collect();
            prop_assert_eq!(plain_sum(&all), 0xffff);
            let (mut frame, pseudo) = blank_tcp_v6(&payload);
            finish(&mut frame);
            let all: Vec<u8> = pseudo.iter().chain(&frame[66..]).copied().collect();
            prop_assert_eq!(plain_sum(&all), 0xffff);
        }

        /// No bytes make it panic or point outside the frame.
        #[test]
        fn any_bytes_are_survived(
            mut frame in proptest::collection::vec(any::<u8>(), 0..120), kind in 0_u8..3
        ) {
            if frame.len() > 14 {
                match kind {
                    0 => { frame[12..14].copy_from_slice(&[0x08, 0]); frame[14] = 0x45; }
                    1 => { frame[12..14].copy_from_slice(&[0x86, 0xdd]); frame[14] = 0x60; }
                    _ => {}
                }
            }
            if let Some(layers) = layers(&frame) {
                let Headers { l3, l4, end, .. } = layers.headers;
                prop_assert!(l3 < l4 && l4 < end && usize::from(end) <= frame.len().min(HEAD));
                prop_assert!(layers.checksum() + 2 <= usize::from(end));
                prop_assert!(usize::from(end) <= layers.end && layers.end <= frame.len());
                let _ = pseudo_header(&frame, &layers.headers, 7);
            }
            let _ = flow(&frame);
        }
    }

    #[test]
    fn fragments_and_other_protocols_are_left_alone() {
        let (mut frame, _) = blank_udp_v4(b"x");
        frame[20] = 0x20; // more fragments
        assert_eq!(layers(&frame), None);
        let (mut frame, _) = blank_udp_v4(b"x");
        frame[23] = 1; // ICMP
        assert_eq!(layers(&frame), None);
        let (frame, _) = blank_udp_v4(b"x");
        assert_eq!(layers(&frame[..frame.len() - 1]), None, "cut short");
    }

    #[test]
    fn a_udp_sum_of_zero_is_sent_as_all_ones() {
        // The second word makes the sum all ones, so its complement is zero.
        let (mut frame, pseudo) = blank_udp_v4(&[0, 0]);
        let all: Vec<u8> = pseudo.iter().chain(&frame[34..40]).copied().collect();
        let rest = !plain_sum(&all);
        frame[42..44].copy_from_slice(&rest.to_be_bytes());
        finish(&mut frame);
        assert_eq!(frame[40..42], [0xff, 0xff]);
    }

    #[test]
    fn layers_are_found_behind_tags_and_extension_headers() {
        let (frame, _) = blank_udp_v4(b"abc");
        let headers = Headers { ipv6: false, tcp: false, l3: 14, l4: 34, end: 42 };
        let plain = Layers { headers, end: 45, extended: false, routed: false };
        assert_eq!(layers(&frame), Some(plain));
        assert_eq!((plain.checksum(), plain.payload()), (40, 3));
        let (mut frame, _) = blank_tcp_v6(b"abc");
        let headers = Headers { ipv6: true, tcp: true, l3: 18, l4: 66, end: 86 };
        let extended = Layers { headers, end: 89, extended: true, routed: false };
        assert_eq!(layers(&frame), Some(extended));
        frame[24] = ROUTING;
        assert_eq!(layers(&frame), Some(Layers { routed: true, ..extended }));
        frame.push(0); // padding
        assert_eq!(layers(&frame).map(|it| it.end), Some(89));
        frame[66 + 12] = 0x60; // options that are not there
        assert_eq!(layers(&frame), None);
    }

    #[test]
    fn a_flow_has_one_number_and_different_flows_different_ones() {
        let (frame, _) = blank_udp_v4(b"x");
        let (longer, _) = blank_udp_v4(b"yy");
        assert_eq!(flow(&frame), flow(&longer));
        let mut spread = [0; 4];
        for port in 0..64 {
            let mut other = frame.clone();
            other[35] = port;
            spread[flow(&other) as usize % 4] += 1;
        }
        assert!(spread.iter().all(|&count| count > 4), "{spread:?}");
        let mut fragment = frame.clone();
        fragment[20] = 0x20;
        let mut rest = fragment.clone();
        rest[34..38].copy_from_slice(b"data");
        assert_eq!(flow(&fragment), flow(&rest), "only the first fragment has ports");
    }

    #[test]
    fn nothing_added_in_the_middle_of_a_word_changes_nothing() {
        let mut sum = Sum::default();
        for part in [[1].as_slice(), &[], &[2, 3], &[], &[4]] {
            sum.add(part);
        }
        assert_eq!(sum.folded(), 0x0102 + 0x0304);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 256 }))]

        /// In however many parts bytes are added, and whatever was before them.
        #[test]
        fn sums_do_not_depend_on_cuts(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            cuts in proptest::collection::vec(0_usize..200, 0..4),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|&cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut sum = Sum::default();
            for cut in cuts.windows(2) {
                sum.add(&bytes[cut[0]..cut[1]]);
            }
            prop_assert_eq!(sum.folded(), plain_sum(&bytes));
            let even = bytes.len() / 4 * 2;
            let (mut one, mut other) = (Sum::default(), Sum::default());
            one.add(&bytes[..even]);
            other.add(&bytes[even..]);
            prop_assert_eq!(one.plus(other).folded(), plain_sum(&bytes));
        }
    }
}
