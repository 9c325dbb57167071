//! Ethernet frames: their head, and the checksum that a frontend left to us.

use crate::switch::Mac;

/// Bytes of an Ethernet header.
pub const HEADER: usize = 14;

/// Destination and source of a frame.
#[must_use]
pub fn addresses(header: &[u8; HEADER]) -> (Mac, Mac) {
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, ..] = *header;
    ([d0, d1, d2, d3, d4, d5], [s0, s1, s2, s3, s4, s5])
}

/// Where a finished checksum goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checksum {
    /// Offset in the frame.
    pub offset: usize,
    /// Its two bytes.
    pub value: [u8; 2],
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
/// Extension headers that are walked over; more than any sender uses.
const MAX_EXTENSIONS: usize = 8;

/// Computes the TCP or UDP checksum of a frame whose checksum field holds the sum of the
/// pseudo-header only (`NETTXF_csum_blank`). `None` when the frame is not such a one: another
/// protocol, a fragment, or cut short.
///
/// Sources: RFC 1071 (the sum), RFC 768 (a UDP sum of 0 is sent as all ones), RFC 8200 §4.
#[must_use]
pub fn finish_checksum(frame: &[u8]) -> Option<Checksum> {
    let mut ethertype_at = 12;
    if half(frame, ethertype_at)? == ETHERTYPE_VLAN {
        ethertype_at += 4;
    }
    let packet = frame.get(ethertype_at + 2..)?;
    let (protocol, start, end) = match half(frame, ethertype_at)? {
        ETHERTYPE_IPV4 => ipv4_payload(packet)?,
        ETHERTYPE_IPV6 => ipv6_payload(packet)?,
        _ => return None,
    };
    let payload = packet.get(start..end)?;
    let (field, least) = match protocol {
        PROTOCOL_TCP => (16, 20),
        PROTOCOL_UDP => (6, 8),
        _ => return None,
    };
    if payload.len() < least {
        return None;
    }
    let value = match (protocol, !sum(payload)) {
        (PROTOCOL_UDP, 0) => 0xffff,
        (_, value) => value,
    };
    let offset = ethertype_at + 2 + start + field;
    Some(Checksum { offset, value: value.to_be_bytes() })
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Protocol, start and end of what an IPv4 packet carries.
fn ipv4_payload(packet: &[u8]) -> Option<(u8, usize, usize)> {
    let first = *packet.first()?;
    let start = usize::from(first & 0xf) * 4;
    let end = usize::from(half(packet, 2)?);
    let fragment = half(packet, 6)? & 0x3fff;
    let whole = first >> 4 == 4 && start >= 20 && fragment == 0 && end >= start;
    whole.then_some((*packet.get(9)?, start, end))
}

/// The same for IPv6, behind its extension headers.
fn ipv6_payload(packet: &[u8]) -> Option<(u8, usize, usize)> {
    if *packet.first()? >> 4 != 6 {
        return None;
    }
    let end = 40 + usize::from(half(packet, 4)?);
    let mut next = *packet.get(6)?;
    let mut at = 40;
    for _ in 0..MAX_EXTENSIONS {
        match next {
            // Hop-by-hop options, routing, destination options.
            0 | 43 | 60 => {
                next = *packet.get(at)?;
                at += 8 + usize::from(*packet.get(at + 1)?) * 8;
            }
            _ => return (at <= end).then_some((next, at, end)),
        }
    }
    None
}

/// One's-complement sum of big-endian 16-bit words, odd end padded with zero.
fn sum(bytes: &[u8]) -> u16 {
    let mut total = 0_u64;
    let mut words = bytes.chunks_exact(4);
    for word in &mut words {
        total += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
    }
    let mut tail = [0_u8; 4];
    let rest = words.remainder();
    tail[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_be_bytes(tail));
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits above")]
    {
        total as u16
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
        frame.extend([7; 16]);
        frame.extend(plain_sum(&pseudo).to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(payload);
        (frame, pseudo)
    }

    fn apply(frame: &mut [u8]) {
        let sum = finish_checksum(frame).unwrap();
        frame[sum.offset..sum.offset + 2].copy_from_slice(&sum.value);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 256 }))]

        /// A receiver that sums pseudo-header and payload gets all ones (RFC 1071 §1).
        #[test]
        fn finished_frames_verify(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (mut frame, pseudo) = blank_udp_v4(&payload);
            apply(&mut frame);
            let all: Vec<u8> = pseudo.iter().chain(&frame[34..]).copied().collect();
            prop_assert_eq!(plain_sum(&all), 0xffff);
            let (mut frame, pseudo) = blank_tcp_v6(&payload);
            apply(&mut frame);
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
            if let Some(sum) = finish_checksum(&frame) {
                prop_assert!(sum.offset + 2 <= frame.len());
            }
        }
    }

    #[test]
    fn fragments_and_other_protocols_are_left_alone() {
        let (mut frame, _) = blank_udp_v4(b"x");
        frame[20] = 0x20; // more fragments
        assert_eq!(finish_checksum(&frame), None);
        let (mut frame, _) = blank_udp_v4(b"x");
        frame[23] = 1; // ICMP
        assert_eq!(finish_checksum(&frame), None);
        let (frame, _) = blank_udp_v4(b"x");
        assert_eq!(finish_checksum(&frame[..frame.len() - 1]), None, "cut short");
    }

    #[test]
    fn a_udp_sum_of_zero_is_sent_as_all_ones() {
        // The second word makes the sum all ones, so its complement is zero.
        let (mut frame, pseudo) = blank_udp_v4(&[0, 0]);
        let all: Vec<u8> = pseudo.iter().chain(&frame[34..40]).copied().collect();
        let rest = !plain_sum(&all);
        frame[42..44].copy_from_slice(&rest.to_be_bytes());
        assert_eq!(finish_checksum(&frame).unwrap().value, [0xff, 0xff]);
    }
}
