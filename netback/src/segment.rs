//! Cutting a long TCP packet into frames, where neither card nor guest does it.
//!
//! Every frame gets a copy of the headers. What differs between them: the lengths in the IP
//! header; over IPv4 the identification, which counts up, and with it the header's checksum; the
//! sequence number; FIN and PSH, which only the last frame has, for they say something about the
//! end of the data; CWR, which only the first one has, for it is said once (RFC 3168 §6.1.2); and
//! TCP's checksum.

use crate::frame::{Layers, Sum, pseudo_header};
use crate::parts;
use core::ops::Range;
use domain_api::nic::{Buffer, Headers, MAX_FRAME, MAX_HEADERS};

/// How a guest wants a packet to be cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cutting {
    /// The packet is TCP over IPv6, else over IPv4.
    pub ipv6: bool,
    /// Bytes of payload of all frames but the last.
    pub mss: u16,
}

/// Least payload of a frame. It bounds the frames that one packet makes. TCP over the least IPv4
/// packet that everybody takes (576 bytes, RFC 791 §3.1) has 536 bytes less options; Linux takes
/// no less than 88 from its peer (`TCP_MIN_MSS`), options included.
pub const LEAST_MSS: u16 = 48;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;
/// Where TCP's flags are in its header.
const FLAGS: usize = 13;

/// Whether a packet of `len` bytes with these layers can be cut so.
#[must_use]
pub fn fits(layers: &Layers, len: usize, cutting: Cutting) -> bool {
    let Headers { ipv6, tcp, end, .. } = layers.headers;
    let frame = usize::from(end) + usize::from(cutting.mss);
    tcp && ipv6 == cutting.ipv6 && layers.end == len && !layers.routed && frame <= MAX_FRAME
}

/// A packet that is being cut.
#[derive(Clone, Debug)]
pub struct Cut {
    head: [u8; MAX_HEADERS],
    headers: Headers,
    mss: usize,
    /// Bytes of payload.
    payload: usize,
    /// Frames that were made.
    made: usize,
    /// Of the packet.
    sequence: u32,
    identification: u16,
    flags: u8,
}

impl Cut {
    /// Starts to cut the packet in `parts`, of which [`fits`] was found to hold.
    #[must_use]
    pub fn new(packet: &[Buffer], layers: &Layers, cutting: Cutting) -> Self {
        let headers = layers.headers;
        let mut head = [0; MAX_HEADERS];
        parts::read(packet, 0, &mut head[..usize::from(headers.end)]);
        let (l3, l4) = (usize::from(headers.l3), usize::from(headers.l4));
        let word = |at: usize| [0, 1, 2, 3].map(|n| head[at + n]);
        let [high, low, ..] = word(l3 + 4);
        Self {
            headers,
            mss: usize::from(cutting.mss),
            payload: layers.payload(),
            made: 0,
            sequence: u32::from_be_bytes(word(l4 + 4)),
            identification: u16::from_be_bytes([high, low]),
            flags: head[l4 + FLAGS],
            head,
        }
    }

    /// Frames that the whole packet makes.
    #[must_use]
    pub fn frames(&self) -> usize {
        self.payload.div_ceil(self.mss).max(1)
    }

    /// Bytes of the next frame; `None` when all were made.
    #[must_use]
    pub fn next_len(&self) -> Option<usize> {
        let len = usize::from(self.headers.end) + self.next_payload().len();
        (self.made < self.frames()).then_some(len)
    }

    /// The part of the payload that is the next frame's.
    fn next_payload(&self) -> Range<usize> {
        let start = self.made * self.mss;
        start..self.payload.min(start + self.mss)
    }

    /// Makes the next frame of the packet in `packet`, in `to`, and sets its length.
    pub fn next(&mut self, packet: &[Buffer], to: &mut Buffer) {
        let end = usize::from(self.headers.end);
        let payload = self.next_payload();
        let sum = parts::copy(packet, end + payload.start, payload.len(), to, end);
        self.adapt(&payload, sum);
        to.page.write(usize::from(to.offset), &self.head[..end]);
        to.len = short(end + payload.len());
        self.made += 1;
    }

    /// Adapts the headers to a frame with this part of the payload, which has this sum.
    fn adapt(&mut self, payload: &Range<usize>, sum: Sum) {
        let (l4, end) = (usize::from(self.headers.l4), usize::from(self.headers.end));
        let len = end - l4 + payload.len();
        self.adapt_network(len);
        let tcp = &mut self.head[l4..end];
        #[expect(clippy::cast_possible_truncation, reason = "below 64 KiB")]
        let sequence = self.sequence.wrapping_add(payload.start as u32);
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        let mut flags = self.flags;
        if payload.start > 0 {
            flags &= !CWR;
        }
        if payload.end < self.payload {
            flags &= !(FIN | PSH);
        }
        tcp[FLAGS] = flags;
        tcp[16..18].fill(0);
        let mut header = pseudo_header(&self.head, &self.headers, len);
        header.add(&self.head[l4..end]);
        let checksum = !header.plus(sum).folded();
        self.head[l4 + 16..l4 + 18].copy_from_slice(&checksum.to_be_bytes());
    }

    /// Adapts the IP header to `len` bytes of TCP.
    fn adapt_network(&mut self, len: usize) {
        let (l3, l4) = (usize::from(self.headers.l3), usize::from(self.headers.l4));
        let ip = &mut self.head[l3..l4];
        if self.headers.ipv6 {
            let bytes = short(ip.len() - 40 + len);
            ip[4..6].copy_from_slice(&bytes.to_be_bytes());
            return;
        }
        let bytes = short(ip.len() + len);
        let identification = self.identification.wrapping_add(short(self.made));
        ip[2..4].copy_from_slice(&bytes.to_be_bytes());
        ip[4..6].copy_from_slice(&identification.to_be_bytes());
        ip[10..12].fill(0);
        let mut sum = Sum::default();
        sum.add(ip);
        ip[10..12].copy_from_slice(&(!sum.folded()).to_be_bytes());
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a packet has less than 64 KiB")]
fn short(len: usize) -> u16 {
    len as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::HEAD;
    use crate::parts::tests::{bytes_of, packet};
    use alloc::vec::Vec;
    use proptest::prelude::*;
    use shmem::Page;

    const ALL_FLAGS: u8 = 0x99; // CWR, ACK, PSH, FIN

    fn l4_of(ipv6: bool) -> usize {
        14 + if ipv6 { 48 } else { 24 }
    }

    /// A TCP packet with IP options or an extension header, and TCP options.
    fn tcp(ipv6: bool, payload: &[u8], flags: u8) -> Vec<u8> {
        let mut bytes = Vec::from([2; 12]);
        let len = 24 + payload.len();
        if ipv6 {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend(short(8 + len).to_be_bytes());
            bytes.extend([60, 64]);
            bytes.extend((0..32).map(|n| n * 7 + 3));
            bytes.extend([6, 0, 1, 4, 0, 0, 0, 0]);
        } else {
            bytes.extend([0x08, 0, 0x46, 0]);
            bytes.extend(short(24 + len).to_be_bytes());
            bytes.extend([0xff, 0xfe, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 1]);
        }
        bytes.extend([0x12, 0x34, 0x56, 0x78, 0xff, 0xff, 0xff, 0xf0, 1, 2, 3, 4, 0x60, flags]);
        bytes.extend([7, 7, 0, 0, 0, 0, 1, 1, 1, 1]);
        bytes.extend(payload);
        bytes
    }

    fn layers(bytes: &[u8]) -> Layers {
        Layers::of(&bytes[..bytes.len().min(HEAD)], bytes.len()).unwrap()
    }

    fn cut(bytes: &[u8], lens: &[usize], cutting: Cutting) -> Vec<Vec<u8>> {
        let layers = layers(bytes);
        assert!(fits(&layers, bytes.len(), cutting));
        let packet = packet(bytes, lens);
        let mut cut = Cut::new(&packet, &layers, cutting);
        let mut frames = Vec::new();
        while let Some(len) = cut.next_len() {
            let mut room = Buffer { page: Page::new_zeroed(), offset: 24, len: 1518, token: 0 };
            cut.next(&packet, &mut room);
            assert_eq!(usize::from(room.len), len);
            frames.push(bytes_of(&[room], len));
        }
        assert_eq!(frames.len(), cut.frames());
        frames
    }

    /// Both checksums are right, and the lengths.
    fn verify(frame: &[u8], ipv6: bool) {
        let layers = layers(frame);
        assert_eq!(layers.end, frame.len());
        let l4 = l4_of(ipv6);
        let mut sum = pseudo_header(frame, &layers.headers, frame.len() - l4);
        sum.add(&frame[l4..]);
        assert_eq!(sum.folded(), 0xffff, "TCP's checksum");
        if !ipv6 {
            let mut sum = Sum::default();
            sum.add(&frame[14..l4]);
            assert_eq!(sum.folded(), 0xffff, "IP's checksum");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 128 }))]

        /// What a receiver puts together is what the sender sent.
        #[test]
        fn frames_make_the_packet_again(
            ipv6 in any::<bool>(),
            payload in proptest::collection::vec(any::<u8>(), 0..9000),
            mss in LEAST_MSS..1400,
            lens in proptest::collection::vec(1_usize..1000, 0..5),
        ) {
            let bytes = tcp(ipv6, &payload, ALL_FLAGS);
            let frames = cut(&bytes, &[&[MAX_HEADERS], lens.as_slice()].concat(), Cutting { ipv6, mss });
            let (l4, end) = (l4_of(ipv6), l4_of(ipv6) + 24);
            let mut again: Vec<u8> = Vec::new();
            for (index, frame) in frames.iter().enumerate() {
                verify(frame, ipv6);
                let sequence = u32::from_be_bytes(frame[l4 + 4..l4 + 8].try_into().unwrap());
                prop_assert_eq!(sequence, 0xffff_fff0_u32.wrapping_add(u32::try_from(again.len()).unwrap()));
                prop_assert_eq!(&frame[..16], &bytes[..16]);
                prop_assert_eq!(&frame[l4 + 18..end], &bytes[l4 + 18..end]);
                if !ipv6 {
                    let number = u16::from_be_bytes([frame[18], frame[19]]);
                    prop_assert_eq!(number, 0xfffe_u16.wrapping_add(u16::try_from(index).unwrap()));
                }
                let (first, last) = (index == 0, index + 1 == frames.len());
                let cwr = if first { CWR } else { 0 };
                let end_flags = if last { FIN | PSH } else { 0 };
                prop_assert_eq!(frame[l4 + FLAGS], 0x10 | cwr | end_flags);
                prop_assert!(last || frame.len() == end + usize::from(mss));
                again.extend(&frame[end..]);
            }
            prop_assert_eq!(again, payload);
        }
    }

    #[test]
    fn only_whole_tcp_packets_of_the_right_kind_are_cut() {
        let bytes = tcp(true, &[0; 100], 0);
        let fit =
            |bytes: &[u8], ipv6, mss| fits(&layers(bytes), bytes.len(), Cutting { ipv6, mss });
        assert!(fit(&bytes, true, 1400));
        assert!(!fit(&bytes, false, 1400), "over the other IP");
        assert!(!fit(&bytes, true, 1450), "frames too long");
        let mut padded = bytes.clone();
        padded.push(0);
        assert!(!fit(&padded, true, 1400));
        let mut routed = bytes.clone();
        routed[20] = 43;
        assert!(!fit(&routed, true, 1400));
        let (udp, _) = crate::frame::tests::blank_udp_v4(&[0; 100]);
        assert!(!fit(&udp, false, 1400));
    }
}
