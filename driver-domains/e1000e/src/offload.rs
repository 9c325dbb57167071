//! What the device does for a packet, and what it wants to find in it.
//!
//! For a blank checksum the device adds up what is there and stores the complement: the pseudo
//! header's sum is where it belongs already. To cut a packet it takes the first bytes as the
//! prototype of each frame's headers, and adds the length of each frame, so it wants neither
//! lengths nor checksums in the prototype, and in the field of TCP's checksum the pseudo header's sum
//! without a length (82574 datasheet, chapter 7, "TCP segmentation"). That sum is taken anew from
//! the addresses.
//!
//! The headers are edited in the buffer, which is private by now. They are checked as far as the
//! device depends on them: a packet that is not what it is said to be could make it stop.
//!
//! # QEMU
//!
//! Its model of the device parses the packet by itself and takes of the context only the size of
//! frames, so positions and prepared sums do not matter to it. Where the other end of its network takes
//! packets whole (a tap device), it passes them on so. Where not (user networking), it fills in
//! the checksum of the whole and then, before QEMU 8.0, sends it as *fragments of IP* rather than as
//! segments of TCP. Over IPv4 their receiver, QEMU's user networking too, puts them together to the one
//! segment that the sender built. Over IPv6 the pieces are no fragments either: all after the
//! first begin with payload where the TCP header should be. The data arrive at last, as TCP sends
//! again in single frames, but many times slower. So QEMU's device, which is known by its subsystem,
//! is not asked to cut packets over IPv6.

use domain_api::Page;
use domain_api::nic::{Headers, MAX_HEADERS};

/// Prepares the headers at `at` in `page` as a prototype. False when they are not what `headers`
/// says.
pub fn prepare(page: &Page, at: usize, headers: &Headers) -> bool {
    let mut bytes = [0; MAX_HEADERS];
    let bytes = &mut bytes[..usize::from(headers.end)];
    page.read(at, bytes);
    let (l3, l4) = (usize::from(headers.l3), usize::from(headers.l4));
    let (ip, tcp) = bytes[l3..].split_at_mut(l4 - l3);
    let addresses = match ip[0] >> 4 {
        4 if !headers.ipv6 && usize::from(ip[0] & 0xf) * 4 == ip.len() => {
            ip[2..4].fill(0); // Length.
            ip[10..12].fill(0); // Checksum.
            &ip[12..20]
        }
        6 if headers.ipv6 => {
            ip[4..6].fill(0); // Length.
            &ip[8..40]
        }
        _ => return false,
    };
    let has_l4_bytes = usize::from(tcp[12] >> 4) * 4 == tcp.len();
    tcp[16..18].copy_from_slice(&sum(addresses).to_be_bytes());
    if has_l4_bytes {
        page.write(at, bytes);
    }
    has_l4_bytes
}

/// The sum over `addresses` and TCP's number, folded and not complemented.
fn sum(addresses: &[u8]) -> u16 {
    const TCP: u32 = 6;
    let words =
        addresses.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum = words.sum::<u32>() + TCP;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits above")]
    {
        sum as u16
    }
}
