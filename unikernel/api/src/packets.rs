//! Packets of TCP and UDP for tests of network code: made as a guest makes them, judged as a
//! receiver does.
//!
//! Sums are taken word by word, as RFC 1071 defines them, and share no code with what is tested.

use crate::nic::Headers;
use alloc::vec;
use alloc::vec::Vec;

const TCP: u8 = 6;
const UDP: u8 = 17;
const DESTINATION_OPTIONS: u8 = 60;
/// TCP's flags that belong to the last frame of a packet alone: FIN and PSH.
pub const LAST_FLAGS: u8 = 1 << 0 | 1 << 3;

/// What a packet looks like.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shape {
    /// IPv6, else IPv4.
    pub ipv6: bool,
    /// TCP, else UDP.
    pub tcp: bool,
    /// With a VLAN tag.
    pub vlan: bool,
    /// Units of options: 4 bytes of IPv4, at most 10; 8 bytes of an extension header of IPv6.
    pub ip_options: u8,
    /// Words of TCP's options, at most 10.
    pub tcp_options: u8,
    /// TCP's flags.
    pub flags: u8,
    /// The payload.
    pub payload: Vec<u8>,
}

impl Shape {
    /// Plain TCP over IPv4, with `payload` bytes.
    #[must_use]
    pub fn tcp(payload: usize) -> Self {
        let payload = (0..payload).map(|at| (at % 251).to_le_bytes()[0]).collect();
        Self {
            ipv6: false,
            tcp: true,
            vlan: false,
            ip_options: 0,
            tcp_options: 3,
            flags: 0x18,
            payload,
        }
    }

    /// Where its headers are.
    #[must_use]
    pub fn headers(&self) -> Headers {
        let options = u16::from(self.ip_options);
        let l3 = if self.vlan { 18 } else { 14 };
        let l4 = l3 + if self.ipv6 { 40 + options * 8 } else { 20 + options * 4 };
        let end = l4 + if self.tcp { 20 + u16::from(self.tcp_options) * 4 } else { 8 };
        Headers { ipv6: self.ipv6, tcp: self.tcp, l3, l4, end }
    }

    /// The packet, with its checksum blank.
    #[must_use]
    pub fn blank(&self) -> Vec<u8> {
        let mut l4 = self.l4();
        let pseudo = self.pseudo(l4.len());
        let field = if self.tcp { 16 } else { 6 };
        l4[field..field + 2].copy_from_slice(&sum(&pseudo).to_be_bytes());
        [self.ethernet(), self.ip(l4.len()), l4].concat()
    }

    /// The packet, finished.
    #[must_use]
    pub fn finished(&self) -> Vec<u8> {
        let mut bytes = self.blank();
        let l4 = usize::from(self.headers().l4);
        let value = match !sum(&bytes[l4..]) {
            0 if !self.tcp => 0xffff,
            value => value,
        };
        let field = l4 + if self.tcp { 16 } else { 6 };
        bytes[field..field + 2].copy_from_slice(&value.to_be_bytes());
        bytes
    }

    fn ethernet(&self) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if self.vlan {
            bytes.extend([0x81, 0x00, 0x00, 0x07]);
        }
        bytes.extend(if self.ipv6 { [0x86, 0xdd] } else { [0x08, 0x00] });
        bytes
    }

    fn protocol(&self) -> u8 {
        if self.tcp { TCP } else { UDP }
    }

    fn ip(&self, payload: usize) -> Vec<u8> {
        let options = usize::from(self.ip_options);
        if self.ipv6 {
            return self.ipv6(options * 8, payload);
        }
        let mut bytes = vec![0x45 + self.ip_options, 0, 0, 0, 0xff, 0xfd, 0x40, 0, 64];
        bytes.extend([self.protocol(), 0, 0, 10, 1, 2, 3, 198, 51, 100, 254]);
        bytes.resize(20 + options * 4, 1); // No operation.
        let len = u16::try_from(bytes.len() + payload).expect("up to 64 KiB");
        bytes[2..4].copy_from_slice(&len.to_be_bytes());
        let checksum = !sum(&bytes);
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    fn ipv6(&self, extension: usize, payload: usize) -> Vec<u8> {
        let len = u16::try_from(extension + payload).expect("up to 64 KiB").to_be_bytes();
        let next = if extension == 0 { self.protocol() } else { DESTINATION_OPTIONS };
        let mut bytes = vec![0x60, 0, 0, 0, len[0], len[1], next, 64];
        bytes.extend((0..32).map(|at| 0xf0_u8.wrapping_add(at * 5)));
        if extension != 0 {
            // One option that pads.
            let filler = u8::try_from(extension - 4).expect("short");
            bytes.extend([self.protocol(), self.ip_options - 1, 1, filler]);
            bytes.resize(40 + extension, 0);
        }
        bytes
    }

    fn l4(&self) -> Vec<u8> {
        let mut bytes = vec![0xc0, 0x01, 0x00, 0x50];
        if self.tcp {
            bytes.extend(0xffff_fa00_u32.to_be_bytes()); // The sequence number wraps soon.
            bytes.extend([
                1,
                2,
                3,
                4,
                (5 + self.tcp_options) << 4,
                self.flags,
                0xff,
                0xf0,
                0,
                0,
                0,
                0,
            ]);
            bytes.resize(20 + usize::from(self.tcp_options) * 4, 1);
        } else {
            let len = u16::try_from(8 + self.payload.len()).expect("up to 64 KiB");
            bytes.extend(len.to_be_bytes());
            bytes.extend([0, 0]);
        }
        bytes.extend(&self.payload);
        bytes
    }

    fn pseudo(&self, len: usize) -> Vec<u8> {
        let ip = self.ip(0);
        let mut bytes = if self.ipv6 { ip[8..40].to_vec() } else { ip[12..20].to_vec() };
        bytes.extend(u32::try_from(len).expect("up to 64 KiB").to_be_bytes());
        bytes.extend([0, self.protocol()]);
        bytes
    }
}

/// What a receiver reads in a right frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    /// All headers, with zeros for what differs from frame to frame of a packet: lengths,
    /// checksums, and what follows here.
    pub headers: Vec<u8>,
    /// IPv4's identification.
    pub identification: u16,
    /// TCP's sequence number.
    pub sequence: u32,
    /// TCP's flags.
    pub flags: u8,
    /// The payload.
    pub payload: Vec<u8>,
}

/// Judges a frame whose headers are at `headers`.
///
/// # Errors
/// What is wrong: a length, or a checksum.
pub fn judge(frame: &[u8], headers: &Headers) -> Result<Segment, &'static str> {
    let (l3, l4) = (usize::from(headers.l3), usize::from(headers.l4));
    let mut head =
        frame.get(..usize::from(headers.end)).ok_or("shorter than its headers")?.to_vec();
    let payload = frame[head.len()..].to_vec();
    let [l3_len, from, to] = if headers.ipv6 { [4, 8, 40] } else { [2, 12, 20] };
    let counted = frame.len() - l3 - if headers.ipv6 { 40 } else { 0 };
    if usize::from(half(&head, l3 + l3_len)) != counted {
        return Err("wrong length of IP");
    }
    if !headers.ipv6 && sum(&head[l3..l4]) != 0xffff {
        return Err("wrong checksum of IPv4");
    }
    let mut summed = frame[l3 + from..l3 + to].to_vec();
    summed.extend(u32::try_from(frame.len() - l4).expect("a frame").to_be_bytes());
    summed.extend([0, if headers.tcp { TCP } else { UDP }]);
    summed.extend(&frame[l4..]);
    if sum(&summed) != 0xffff {
        return Err("wrong checksum of TCP or UDP");
    }
    let mut take = |at: usize, bytes: usize| {
        let field = &mut head[at..at + bytes];
        let value = field.iter().fold(0_u32, |value, byte| value << 8 | u32::from(*byte));
        field.fill(0);
        value
    };
    let low = |value: u32| value.to_be_bytes()[3];
    take(l3 + l3_len, 2);
    let identification = if headers.ipv6 { 0 } else { take(l3 + 4, 2) };
    if !headers.ipv6 {
        take(l3 + 10, 2);
    }
    let (sequence, flags) = if headers.tcp { (take(l4 + 4, 4), take(l4 + 13, 1)) } else { (0, 0) };
    take(l4 + if headers.tcp { 16 } else { 6 }, 2);
    let identification = u16::try_from(identification).expect("two bytes");
    Ok(Segment { headers: head, identification, sequence, flags: low(flags), payload })
}

/// Judges the frames that `packet` was cut into.
///
/// # Errors
/// What is wrong with which frame.
pub fn judge_cut(
    packet: &Shape,
    mss: u16,
    frames: &[Vec<u8>],
) -> Result<(), (usize, &'static str)> {
    let headers = packet.headers();
    let whole = judge(&packet.finished(), &headers).map_err(|what| (0, what))?;
    let pieces: Vec<_> = packet.payload.chunks(mss.into()).collect();
    if pieces.len() != frames.len() {
        return Err((frames.len(), "wrong number of frames"));
    }
    let mut sequence = whole.sequence;
    for (number, (frame, piece)) in frames.iter().zip(&pieces).enumerate() {
        let found = judge(frame, &headers).map_err(|what| (number, what))?;
        let step = u16::try_from(number).expect("few frames");
        let last = number + 1 == pieces.len();
        let expected = Segment {
            identification: if packet.ipv6 { 0 } else { whole.identification.wrapping_add(step) },
            sequence,
            flags: if last { whole.flags } else { whole.flags & !LAST_FLAGS },
            payload: piece.to_vec(),
            headers: whole.headers.clone(),
        };
        if found != expected {
            return Err((number, "wrong fields or payload"));
        }
        sequence = sequence.wrapping_add(u32::try_from(piece.len()).expect("a frame's"));
    }
    Ok(())
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// One's-complement sum of words.
fn sum(bytes: &[u8]) -> u16 {
    bytes.chunks(2).fold(0_u16, |sum, pair| {
        let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_packet_is_right_and_a_blank_one_is_not() {
        for bits in 0..8_u8 {
            let [ipv6, tcp, vlan] = [0, 1, 2].map(|bit| bits >> bit & 1 != 0);
            for ip_options in 0..3 {
                let packet = Shape { ipv6, tcp, vlan, ip_options, ..Shape::tcp(333) };
                let headers = packet.headers();
                assert!(headers.are_sound(headers.end) && !headers.are_sound(headers.end - 1));
                assert_eq!(
                    judge(&packet.finished(), &headers).map(|it| it.payload),
                    Ok(packet.payload.clone())
                );
                assert_eq!(judge(&packet.blank(), &headers), Err("wrong checksum of TCP or UDP"));
            }
        }
    }

    /// RFC 1071, §3.
    #[test]
    fn the_sum_is_that_of_the_rfc() {
        assert_eq!(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2);
    }
}
