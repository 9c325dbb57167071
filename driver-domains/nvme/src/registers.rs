//! Registers of an NVMe controller: offsets in BAR 0, and the bits that this driver uses.
//!
//! Source: NVM Express Base Specification, revision 1.4, section 3.1.

use domain_api::Registers;

/// Controller capabilities, 64 bits.
pub const CAP: u32 = 0x00;
/// Version.
pub const VS: u32 = 0x08;
/// `VS` of 1.1, which brought the list of active namespaces.
pub const VS_1_1: u32 = 0x0001_0100;
/// Controller configuration.
pub const CC: u32 = 0x14;
/// `CC`: enable.
pub const CC_EN: u32 = 1 << 0;
/// `CC`: memory page size, as a power of two above 4 KiB.
pub const CC_MPS_SHIFT: u32 = 7;
/// `CC`: shutdown notification, two bits.
pub const CC_SHN: u32 = 3 << 14;
/// `CC`: submission queue entries are of 2^6 bytes.
pub const CC_IOSQES: u32 = 6 << 16;
/// `CC`: completion queue entries are of 2^4 bytes.
pub const CC_IOCQES: u32 = 4 << 20;
/// Controller status.
pub const CSTS: u32 = 0x1c;
/// `CSTS`: ready.
pub const CSTS_RDY: u32 = 1 << 0;
/// `CSTS`: fatal error.
pub const CSTS_CFS: u32 = 1 << 1;
/// Admin queue attributes: entries less one, of the submission queue below, of the completion
/// queue from bit 16 on.
pub const AQA: u32 = 0x24;
/// Admin submission queue's address, 64 bits.
pub const ASQ: u32 = 0x28;
/// Admin completion queue's address, 64 bits.
pub const ACQ: u32 = 0x30;
/// First doorbell.
pub const DOORBELLS: u32 = 0x1000;

/// Reads a 64-bit register as two of 32 bits, as section 3.1 allows.
pub fn read64(registers: &impl Registers, offset: u32) -> u64 {
    let low = registers.read(offset);
    u64::from(registers.read(offset + 4)) << 32 | u64::from(low)
}

/// Writes one, the lower half first.
#[expect(clippy::cast_possible_truncation, reason = "the halves are what is wanted")]
pub fn write64(registers: &mut impl Registers, offset: u32, value: u64) {
    registers.write(offset, value as u32);
    registers.write(offset + 4, (value >> 32) as u32);
}

/// The controller's capabilities.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Most entries of a queue.
    #[must_use]
    pub fn queue_entries(self) -> u32 {
        (self.0 & 0xffff) as u32 + 1
    }

    /// How long the controller may take to become ready, or not ready, in ns. Some say 0; they
    /// get what the field counts in.
    #[must_use]
    pub fn timeout_ns(self) -> u64 {
        (self.0 >> 24 & 0xff).max(1) * 500_000_000
    }

    /// The doorbell of a queue: the submission queue's tail, or the completion queue's head.
    #[must_use]
    pub fn doorbell(self, queue: u16, side: Side) -> u32 {
        let stride = 4 << (self.0 >> 32 & 0xf);
        DOORBELLS + (2 * u32::from(queue) + side as u32) * stride
    }

    /// Whether it has the NVM command set.
    #[must_use]
    pub fn has_nvm(self) -> bool {
        self.0 >> 37 & 1 != 0
    }

    /// Smallest memory page, as a power of two above 4 KiB.
    #[must_use]
    pub fn page_shift_min(self) -> u32 {
        (self.0 >> 48 & 0xf) as u32
    }
}

/// Which queue of a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Commands.
    Submission = 0,
    /// What became of them.
    Completion = 1,
}
