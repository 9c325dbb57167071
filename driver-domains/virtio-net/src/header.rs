//! What stands in front of a packet: what is left to do for it, or was found of it.
//!
//! | bytes  | field         | outwards                        | inwards                      |
//! |--------|---------------|---------------------------------|------------------------------|
//! | 0      | `flags`       | 1: the checksum is blank        | the same; 2: it is right     |
//! | 1      | `gso_type`    | 1: cut TCP over IPv4, 4: IPv6   | 0, as nothing else was agreed|
//! | 2..4   | `hdr_len`     | bytes of headers                |                              |
//! | 4..6   | `gso_size`    | bytes of payload in a frame     |                              |
//! | 6..8   | `csum_start`  | where TCP or UDP starts         | the same, if it is blank     |
//! | 8..10  | `csum_offset` | where its checksum is, in there | the same, if it is blank     |
//! | 10..12 | `num_buffers` | 0                               | 1                            |
//!
//! The header is in the headroom of the packet's first buffer: one descriptor has both. Of a
//! packet with nothing left to do it is all zero.
//!
//! Source: VIRTIO 1.1, §5.1.6.

use domain_api::Page;
use domain_api::nic::{Checksum, MAX_FRAME, Offload};

/// Bytes of the header.
pub const HEADER: u16 = 12;
/// That of a packet with nothing left to do.
pub const PLAIN: Header = [0; HEADER as usize];

/// A header.
pub type Header = [u8; HEADER as usize];

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
/// Where the checksum is in a header of TCP, of UDP.
const IN_TCP: u16 = 16;
const IN_UDP: u16 = 6;

/// The header of a packet to send.
pub fn outgoing(offload: &Offload) -> Header {
    let (headers, kind, mss) = match offload {
        Offload::Nothing => return PLAIN,
        Offload::Checksum(headers) => (headers, 0, 0),
        Offload::Segment { headers, mss } => {
            (headers, if headers.ipv6 { GSO_TCPV6 } else { GSO_TCPV4 }, *mss)
        }
    };
    // The length of headers is for packets to be cut only (§5.1.6.2).
    let hdr_len = if kind == 0 { 0 } else { headers.end };
    let csum_offset = if headers.tcp { IN_TCP } else { IN_UDP };
    let mut header = PLAIN;
    header[0] = NEEDS_CSUM;
    header[1] = kind;
    for (at, field) in [(2, hdr_len), (4, mss), (6, headers.l4), (8, csum_offset)] {
        header[at..at + 2].copy_from_slice(&field.to_le_bytes());
    }
    header
}

/// What is known of a received frame: the content of a page from `at` on. A blank checksum that is not
/// where [`Checksum::Blank`] says is finished here. `None`: the header cannot be right.
pub fn incoming(header: &Header, page: &Page, at: usize, len: usize) -> Option<Checksum> {
    if header[0] & (NEEDS_CSUM | DATA_VALID) == 0 {
        return Some(Checksum::Unknown);
    }
    if header[0] & NEEDS_CSUM == 0 {
        return Some(Checksum::Good);
    }
    let mut bytes = [0; MAX_FRAME];
    let frame = bytes.get_mut(..len)?;
    let (start, offset) =
        (half(header, 6, u16::from_le_bytes)?, half(header, 8, u16::from_le_bytes)?);
    let (head, _) = frame.split_at_mut(len.min(LONGEST_HEAD));
    page.read(at, head);
    if is_usual(head, start, offset).is_some() {
        return Some(Checksum::Blank);
    }
    page.read(at, frame);
    let value = match !sum(frame.get(start.into()..)?) {
        0 => 0xffff_u16, // The same to all, and to UDP not that there is none.
        value => value,
    };
    let field = usize::from(start) + usize::from(offset);
    frame.get(field..field + 2)?;
    page.write(at + field, &value.to_be_bytes());
    Some(Checksum::Unknown)
}

/// Bytes from which a usual packet can be told: Ethernet, a VLAN tag, IPv4 with all options.
const LONGEST_HEAD: usize = 14 + 4 + 60;

/// Whether a blank checksum is TCP's or UDP's, next to an IP header that is next to Ethernet's.
fn is_usual(head: &[u8], start: u16, offset: u16) -> Option<()> {
    let tagged = half(head, 12, u16::from_be_bytes)? == 0x8100;
    let l3 = if tagged { 18 } else { 14 };
    let (protocol, len) = match half(head, l3 - 2, u16::from_be_bytes)? {
        0x0800 if half(head, l3 + 6, u16::from_be_bytes)? & 0x3fff == 0 => {
            (head.get(l3 + 9)?, usize::from(head.get(l3)? & 0xf) * 4)
        }
        0x86dd => (head.get(l3 + 6)?, 40),
        _ => return None,
    };
    let usual = matches!((protocol, offset), (6, IN_TCP) | (17, IN_UDP));
    (usual && usize::from(start) == l3 + len).then_some(())
}

fn half(bytes: &[u8], at: usize, decode: fn([u8; 2]) -> u16) -> Option<u16> {
    Some(decode([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// One's-complement sum of words (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from_be_bytes([0, 0, pair[0], pair.get(1).copied().unwrap_or(0)]);
    // A frame has less than 2^16 words.
    let sum: u32 = bytes.chunks(2).map(word).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    #[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits")]
    {
        ((sum & 0xffff) + (sum >> 16)) as u16
    }
}
