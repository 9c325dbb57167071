//! TCP and UDP packets whose every byte is known, and what a card or a receiver does with them;
//! written from the RFCs, apart from the code under test.

use domain_api::nic::{Headers, MAX_FRAME, Offload};
use std::collections::BTreeMap;

/// Byte `at` of stream `stream`.
fn byte(stream: u8, at: u32) -> u8 {
    let mut x = at.wrapping_mul(0x9e37_79b1) ^ u32::from(stream) << 24;
    x ^= x >> 15;
    x = x.wrapping_mul(0x85eb_ca6b);
    x.to_be_bytes()[0]
}

/// RFC 1071, word by word.
fn plain_sum(bytes: &[u8], start: u32) -> u16 {
    let mut total = start;
    for pair in bytes.chunks(2) {
        total += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap()
}

/// What a TCP or UDP packet is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    pub ipv6: bool,
    pub tcp: bool,
    /// An IPv6 extension header.
    pub extended: bool,
    /// The stream: also the source port.
    pub stream: u8,
    /// Where in the stream the payload starts.
    pub at: u32,
    pub payload: usize,
}

impl Shape {
    pub const fn tcp(ipv6: bool, at: u32, payload: usize) -> Self {
        Self { ipv6, tcp: true, extended: false, stream: 1, at, payload }
    }

    pub const fn udp(ipv6: bool, payload: usize) -> Self {
        Self { ipv6, tcp: false, extended: false, stream: 2, at: 0, payload }
    }

    fn network(self) -> usize {
        match (self.ipv6, self.extended) {
            (false, _) => 20,
            (true, false) => 40,
            (true, true) => 48,
        }
    }

    const fn transport(self) -> usize {
        if self.tcp { 32 } else { 8 }
    }

    pub fn len(self) -> usize {
        14 + self.network() + self.transport() + self.payload
    }

    /// The packet with a blank checksum.
    pub fn blank(self, destination: [u8; 6], source: [u8; 6]) -> Vec<u8> {
        let mut bytes: Vec<u8> = destination.into_iter().chain(source).collect();
        let protocol = if self.tcp { 6 } else { 17 };
        let carried = self.transport() + self.payload;
        let short = |len: usize| u16::try_from(len).unwrap().to_be_bytes();
        if self.ipv6 {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend(short(carried + self.network() - 40));
            bytes.extend([if self.extended { 60 } else { protocol }, 64]);
            bytes.extend((0..32).map(|n| n * 5 + 1));
            if self.extended {
                bytes.extend([protocol, 0, 1, 4, 0, 0, 0, 0]);
            }
        } else {
            bytes.extend([8, 0, 0x45, 0]);
            bytes.extend(short(20 + carried));
            bytes.extend([0xff, 0xf0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            let sum = !plain_sum(&bytes[14..34], 0);
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        bytes.extend([0x30, self.stream, 0, 80]);
        let pseudo = pseudo_sum(&bytes, self.ipv6, protocol, carried);
        if self.tcp {
            bytes.extend(self.at.to_be_bytes());
            bytes.extend([0, 0, 0, 1, 0x80, 0x19, 0x20, 0]); // ACK, PSH, FIN
            bytes.extend(pseudo.to_be_bytes());
            bytes.extend([0, 0, 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        } else {
            bytes.extend(short(carried));
            bytes.extend(pseudo.to_be_bytes());
        }
        let payload = u32::try_from(self.payload).unwrap();
        bytes.extend((0..payload).map(|n| byte(self.stream, self.at.wrapping_add(n))));
        assert_eq!(bytes.len(), self.len());
        bytes
    }

    /// The packet with its checksum.
    pub fn whole(self, destination: [u8; 6], source: [u8; 6]) -> Vec<u8> {
        let mut bytes = self.blank(destination, source);
        finish(&mut bytes, 14 + self.network(), self.tcp);
        bytes
    }
}

fn pseudo_sum(bytes: &[u8], ipv6: bool, protocol: u8, len: usize) -> u16 {
    let addresses = if ipv6 { &bytes[22..54] } else { &bytes[26..34] };
    plain_sum(addresses, u32::from(protocol) + u32::try_from(len).unwrap())
}

fn finish(bytes: &mut [u8], l4: usize, tcp: bool) {
    let sum = match !plain_sum(&bytes[l4..], 0) {
        0 if !tcp => 0xffff,
        sum => sum,
    };
    let at = l4 + if tcp { 16 } else { 6 };
    bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// What a card does that has such offloads.
pub fn card(packet: &[u8], offload: Offload) -> Vec<Vec<u8>> {
    match offload {
        Offload::Nothing => vec![packet.to_vec()],
        Offload::Checksum(headers) => {
            see_headers(packet, headers);
            let mut frame = packet.to_vec();
            finish(&mut frame, headers.l4.into(), headers.tcp);
            vec![frame]
        }
        Offload::Segment { headers, mss } => {
            see_headers(packet, headers);
            assert!(headers.tcp && usize::from(headers.end + mss) <= MAX_FRAME);
            cut(packet, headers, mss.into())
        }
    }
}

/// The promises of `Headers`.
fn see_headers(packet: &[u8], headers: Headers) {
    let Headers { ipv6, tcp, l3, l4, end } = headers;
    let (l3, l4) = (usize::from(l3), usize::from(l4));
    assert!(l3 < l4 && l4 < end.into());
    let (protocol, len) = if ipv6 {
        (packet[l3 + 6], 40 + u16::from_be_bytes([packet[l3 + 4], packet[l3 + 5]]))
    } else {
        (packet[l3 + 9], u16::from_be_bytes([packet[l3 + 2], packet[l3 + 3]]))
    };
    assert_eq!((protocol, l3 + usize::from(len)), (if tcp { 6 } else { 17 }, packet.len()));
    let field = l4 + if tcp { 16 } else { 6 };
    let pseudo = pseudo_sum(packet, ipv6, protocol, packet.len() - l4);
    assert_eq!(packet[field..field + 2], pseudo.to_be_bytes(), "the pseudo header's sum");
}

fn cut(packet: &[u8], headers: Headers, mss: usize) -> Vec<Vec<u8>> {
    let (l3, l4, end) = (headers.l3.into(), usize::from(headers.l4), usize::from(headers.end));
    let count = packet[end..].chunks(mss).len();
    let one = |(index, part): (usize, &[u8])| {
        let mut frame = packet[..end].to_vec();
        frame.extend(part);
        let at = u32::from_be_bytes(packet[l4 + 4..l4 + 8].try_into().unwrap());
        let at = at.wrapping_add(u32::try_from(index * mss).unwrap());
        frame[l4 + 4..l4 + 8].copy_from_slice(&at.to_be_bytes());
        if index + 1 < count {
            frame[l4 + 13] &= !0x09;
        }
        let len = u16::try_from(frame.len() - l3).unwrap();
        if headers.ipv6 {
            frame[l3 + 4..l3 + 6].copy_from_slice(&(len - 40).to_be_bytes());
        } else {
            frame[l3 + 2..l3 + 4].copy_from_slice(&len.to_be_bytes());
            let id = u16::from_be_bytes([packet[l3 + 4], packet[l3 + 5]]);
            let id = id.wrapping_add(u16::try_from(index).unwrap());
            frame[l3 + 4..l3 + 6].copy_from_slice(&id.to_be_bytes());
            frame[l3 + 10..l3 + 12].fill(0);
            let sum = !plain_sum(&frame[l3..l4], 0);
            frame[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
        }
        let pseudo = pseudo_sum(&frame, headers.ipv6, 6, frame.len() - l4);
        frame[l4 + 16..l4 + 18].copy_from_slice(&pseudo.to_be_bytes());
        finish(&mut frame, l4, true);
        frame
    };
    packet[end..].chunks(mss).enumerate().map(one).collect()
}

/// What a receiver finds in a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    pub shape: Shape,
    /// Whether the checksum is right.
    pub summed: bool,
}

/// Judges a TCP or UDP packet byte by byte; `None` for another.
pub fn look(bytes: &[u8]) -> Option<Found> {
    let ipv6 = match bytes[12..14] {
        [0x86, 0xdd] => true,
        [0x08, 0x00] => false,
        _ => return None,
    };
    let extended = ipv6 && bytes[20] == 60;
    let mut shape = Shape { ipv6, extended, tcp: true, stream: 0, at: 0, payload: 0 };
    let l4 = 14 + shape.network();
    let protocol = match (ipv6, extended) {
        (false, _) => bytes[23],
        (true, false) => bytes[20],
        (true, true) => bytes[54],
    };
    shape.tcp = protocol == 6;
    shape.stream = bytes[l4 + 1];
    let end = l4 + shape.transport();
    shape.payload = bytes.len() - end;
    if shape.tcp {
        shape.at = u32::from_be_bytes(bytes[l4 + 4..l4 + 8].try_into().unwrap());
    }
    for (n, &found) in (0..).zip(&bytes[end..]) {
        assert_eq!(found, byte(shape.stream, shape.at.wrapping_add(n)), "payload byte {n}");
    }
    if !ipv6 {
        assert_eq!(plain_sum(&bytes[14..34], 0), 0xffff, "IP's checksum");
        assert_eq!(usize::from(u16::from_be_bytes([bytes[16], bytes[17]])), bytes.len() - 14);
    }
    let pseudo = pseudo_sum(bytes, ipv6, protocol, bytes.len() - l4);
    let summed = plain_sum(&bytes[l4..], pseudo.into()) == 0xffff;
    let field = l4 + if shape.tcp { 16 } else { 6 };
    let blank = bytes[field..field + 2] == pseudo.to_be_bytes();
    assert!(summed || blank, "neither finished nor blank");
    Some(Found { shape, summed })
}

/// How often each byte of a stream was seen, by where each piece starts and how long it is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Coverage(BTreeMap<(u32, usize), u32>);

impl Coverage {
    pub fn add(&mut self, shape: Shape) {
        *self.0.entry((shape.at, shape.payload)).or_default() += 1;
    }

    /// Whether all bytes of `range` were seen.
    pub fn covers(&self, start: u32, len: usize) -> bool {
        let end = start + u32::try_from(len).unwrap();
        let mut next = start;
        for &(at, len) in self.0.keys() {
            if at <= next {
                next = next.max(at + u32::try_from(len).unwrap());
            }
        }
        next >= end
    }

    pub fn pieces(&self) -> usize {
        self.0.len()
    }

    /// The most times that the same piece was seen.
    pub fn most(&self) -> u32 {
        self.0.values().copied().max().unwrap_or(0)
    }
}
