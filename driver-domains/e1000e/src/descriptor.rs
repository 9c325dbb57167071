//! Descriptors, and the page that holds a ring of them.
//!
//! Those of received frames, and of frames to send of which nothing is left to do, have the legacy
//! format:
//!
//! | bytes  | receive (§7.1)         | transmit (§7.2)                       |
//! |--------|------------------------|---------------------------------------|
//! | 0..8   | address of the buffer  | address of the frame                  |
//! | 8..10  | length, by the device  | length                                |
//! | 10     | checksum, by the device| checksum offset (unused)              |
//! | 11     |                        | command                               |
//! | 12     | status, by the device  | status, by the device                 |
//! | 13     | errors, by the device  | checksum start (unused)               |
//! | 14..16 | VLAN tag               | VLAN tag (unused)                     |
//!
//! The extended receive formats carry results that nothing here asks for, and their write-back
//! destroys the buffer's address. What the device found of a frame's checksums is in the legacy
//! format too.
//!
//! When the device has something to do for a packet, a *context* says where ([`Context`]), and
//! *data* descriptors follow. The device remembers the context. Both are told from the legacy
//! format by bit 29 of the second half, and from each other by bits 20 to 23. The formats may
//! alternate in the ring, but not within a packet (§7.2).
//!
//! | bits of the halves | context                                | data                       |
//! |--------------------|----------------------------------------|----------------------------|
//! | first, 0..8        | start of the IP header                 | address                    |
//! | 8..16              | where its checksum goes                | (64 bits)                  |
//! | 16..32             | its last byte                          |                            |
//! | 32..40             | start of the TCP or UDP header         |                            |
//! | 40..48             | where the checksum goes                |                            |
//! | 48..64             | its last byte, 0: the packet's last    |                            |
//! | second, 0..20      | bytes of payload, of a segmentation    | length                     |
//! | 20..24             | type 0                                 | type 1                     |
//! | 24..32             | command                                | command                    |
//! | 32..40             | status, by the device                  | status, by the device      |
//! | 40..48             | bytes of headers, of a segmentation    | checksums to insert        |
//! | 48..64             | bytes of payload in a frame            | VLAN tag (unused)          |
//!
//! Ordering: a descriptor's second half is loaded with `Acquire` before anything it describes is
//! read, and stored with `Release` before the tail register passes it.
//!
//! Source: 82574 datasheet, §7.1 and §7.2.

use core::sync::atomic::Ordering::{Acquire, Release};
use domain_api::DmaPage;
use domain_api::nic::{Headers, Offload};

/// Descriptors in a ring: one page of them.
pub const RING: u16 = 256;
/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: usize = 16;

/// `status`, both kinds: the device has finished with the descriptor.
pub const STATUS_DD: u8 = 1 << 0;
/// Receive `status`: last descriptor of its frame.
pub const STATUS_EOP: u8 = 1 << 1;
/// Receive `errors` that make a frame worthless: CRC, symbol, sequence, carrier, receive data.
pub const ERRORS: u8 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 4 | 1 << 7;
/// Receive `status`: the device says nothing of checksums.
pub const STATUS_IXSM: u8 = 1 << 2;
/// Receive `status`: it has looked at the checksum of UDP, of TCP.
pub const STATUS_L4CS: u8 = 1 << 4 | 1 << 5;
/// Receive `errors`: the checksum of TCP or UDP is wrong, that of the IPv4 header is.
pub const ERRORS_CHECKSUM: u8 = 1 << 5 | 1 << 6;

/// Transmit command, and type, as bits of the second half: end of packet.
pub const EOP: u64 = 1 << 24;
/// Insert the frame check sequence.
pub const IFCS: u64 = 1 << 25;
/// Cut the packet into frames, as the context says.
pub const TSE: u64 = 1 << 26;
/// Report status.
pub const RS: u64 = 1 << 27;
/// Not the legacy format.
pub const DEXT: u64 = 1 << 29;
/// With [`DEXT`]: data, else a context.
pub const DATA: u64 = 1 << 20;
/// Data: insert the checksum of the IPv4 header.
pub const INSERT_IP: u64 = 1 << 40;
/// Data: insert the checksum of TCP or UDP.
pub const INSERT_L4: u64 = 1 << 41;
/// Context: the packet is TCP, else UDP.
pub const CONTEXT_TCP: u64 = 1 << 24;
/// Context: the packet is IPv4, else IPv6.
pub const CONTEXT_IPV4: u64 = 1 << 25;

/// Where the device finds headers and checksum fields of the packets that follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Context([u64; 2]);

impl Context {
    /// For a blank checksum.
    pub fn checksum(headers: &Headers) -> Self {
        let field = if headers.tcp { 16 } else { 6 };
        let start = u64::from(headers.l4);
        let tcp = if headers.tcp { CONTEXT_TCP } else { 0 };
        Self([start << 32 | (start + field) << 40, DEXT | tcp])
    }

    /// For frames of `mss` bytes of payload each, out of `payload` bytes.
    pub fn segment(headers: &Headers, mss: u16, payload: u32) -> Self {
        let Self([l4, command]) = Self::checksum(headers);
        let (l3, last) = (u64::from(headers.l3), u64::from(headers.l4) - 1);
        // In IPv6 there is no checksum; its place is filled in as if it were IPv4, to no effect.
        let (ip, version) = if headers.ipv6 {
            (l3 | (l3 + 10) << 8, 0)
        } else {
            (l3 | (l3 + 10) << 8 | last << 16, CONTEXT_IPV4)
        };
        let sizes = u64::from(payload) | u64::from(headers.end) << 40 | u64::from(mss) << 48;
        Self([l4 | ip, command | version | TSE | sizes])
    }
}

/// Type and command of all descriptors of a packet, but for its end.
pub fn command(offload: &Offload) -> u64 {
    match offload {
        Offload::Nothing => IFCS,
        Offload::Checksum(_) => IFCS | DEXT | DATA | INSERT_L4,
        Offload::Segment { headers, .. } => {
            let ip = if headers.ipv6 { 0 } else { INSERT_IP };
            IFCS | DEXT | DATA | INSERT_L4 | TSE | ip
        }
    }
}

/// What the device wrote into a receive descriptor. Any value is possible.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Received {
    /// Bytes written.
    pub len: u16,
    /// `STATUS_*`.
    pub status: u8,
    /// [`ERRORS`], [`ERRORS_CHECKSUM`] and others.
    pub errors: u8,
}

impl Received {
    /// Whether the device has found the checksum of TCP or UDP right.
    pub fn is_checksum_good(self) -> bool {
        self.status & STATUS_IXSM == 0
            && self.status & STATUS_L4CS != 0
            && self.errors & ERRORS_CHECKSUM == 0
    }
}

/// A ring of 256 descriptors in a page.
#[derive(Debug)]
pub struct Ring(DmaPage);

impl Ring {
    /// A ring in `page`, which is all zero.
    pub fn new(page: DmaPage) -> Self {
        Self(page)
    }

    /// Where the device finds it.
    pub fn bus_address(&self) -> u64 {
        self.0.bus_address
    }

    fn store(&self, slot: u16, address: u64, rest: u64) {
        let at = usize::from(slot % RING) * DESCRIPTOR_BYTES;
        self.0.page.u64(at).store(address.to_le(), Release);
        self.0.page.u64(at + 8).store(rest.to_le(), Release);
    }

    fn rest(&self, slot: u16) -> [u8; 8] {
        let at = usize::from(slot % RING) * DESCRIPTOR_BYTES + 8;
        u64::from_le(self.0.page.u64(at).load(Acquire)).to_le_bytes()
    }

    /// Offers a buffer for a frame to come.
    pub fn offer(&self, slot: u16, address: u64) {
        self.store(slot, address, 0);
    }

    /// Describes a frame, or a part of a packet, to send.
    pub fn send(&self, slot: u16, address: u64, len: u16, command: u64) {
        self.store(slot, address, u64::from(len) | command);
    }

    /// Tells the device of the packets that follow.
    pub fn set_context(&self, slot: u16, context: Context) {
        let Context([first, second]) = context;
        self.store(slot, first, second);
    }

    /// What arrived in `slot`, if the device is done with it.
    pub fn received(&self, slot: u16) -> Option<Received> {
        let rest = self.rest(slot);
        let received = Received {
            len: u16::from_le_bytes([rest[0], rest[1]]),
            status: rest[4],
            errors: rest[5],
        };
        (received.status & STATUS_DD != 0).then_some(received)
    }

    /// Whether the device has sent what `slot` describes.
    pub fn sent(&self, slot: u16) -> bool {
        self.rest(slot)[4] & STATUS_DD != 0
    }
}
