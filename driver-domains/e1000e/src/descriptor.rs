//! Legacy descriptors, and the page that holds a ring of them.
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
//! The extended formats carry checksum and hash results that nothing here asks for, and their
//! write-back destroys the buffer's address. Ordering: a descriptor's second half is loaded with
//! `Acquire` before anything it describes is read, and stored with `Release` before the tail
//! register passes it.
//!
//! Source: 82574 datasheet, §7.1 and §7.2.

use core::sync::atomic::Ordering::{Acquire, Release};
use domain_api::DmaPage;

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
/// Transmit `command`: end of packet, insert frame check sequence, report status.
pub const COMMAND: u8 = 1 << 0 | 1 << 1 | 1 << 3;

/// What the device wrote into a receive descriptor. Any value is possible.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Received {
    /// Bytes written.
    pub len: u16,
    /// `STATUS_*`.
    pub status: u8,
    /// [`ERRORS`] and others.
    pub errors: u8,
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

    /// Describes a frame to send.
    pub fn send(&self, slot: u16, address: u64, len: u16) {
        let rest = u64::from(len) | u64::from(COMMAND) << 24;
        self.store(slot, address, rest);
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
