//! Commands: entries of a submission queue.
//!
//! | bytes  | field                                        |
//! |--------|----------------------------------------------|
//! | 0      | opcode                                       |
//! | 1      | fused operations, PRPs or SGLs (both 0 here) |
//! | 2..4   | command identifier                           |
//! | 4..8   | namespace                                    |
//! | 8..24  | reserved, metadata pointer (0 here)          |
//! | 24..40 | PRP entries 1 and 2                          |
//! | 40..64 | command dwords 10 to 15 (14, 15: 0 here)     |
//!
//! Source: NVM Express Base Specification 1.4, section 4.2, and for each command its section.

/// Bytes of an entry.
pub const ENTRY_BYTES: usize = 64;

/// Opcodes of admin commands (section 5).
pub mod admin {
    /// Create I/O submission queue.
    pub const CREATE_SQ: u8 = 0x01;
    /// Get log page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Create I/O completion queue.
    pub const CREATE_CQ: u8 = 0x05;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set features.
    pub const SET_FEATURES: u8 = 0x09;
}

/// Opcodes of the NVM command set (section 6).
pub mod nvm {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
}

/// Identify: a namespace.
pub const CNS_NAMESPACE: u32 = 0x00;
/// Identify: the controller.
pub const CNS_CONTROLLER: u32 = 0x01;
/// Identify: up to 1024 ids of active namespaces.
pub const CNS_ACTIVE: u32 = 0x02;
/// Feature: number of queues (section 5.21.1.7).
pub const FEATURE_QUEUES: u32 = 0x07;
/// Log: error information (section 5.14.1.1).
pub const LOG_ERRORS: u32 = 0x01;
/// All namespaces.
pub const EVERY_NAMESPACE: u32 = u32::MAX;
/// Dataset management: deallocate (section 6.7).
const DSM_DEALLOCATE: u32 = 1 << 2;
/// Queue creation: physically contiguous.
const QUEUE_CONTIGUOUS: u32 = 1 << 0;
/// Completion queue: interrupts enabled.
const QUEUE_INTERRUPTS: u32 = 1 << 1;

/// A command without its identifier.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Command {
    /// What to do.
    pub opcode: u8,
    /// Where.
    pub namespace: u32,
    /// PRP entries.
    pub prp: [u64; 2],
    /// Dwords 10 (low) and 11.
    pub cdw10: u64,
    /// Dword 12.
    pub cdw12: u32,
}

fn dwords(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

impl Command {
    /// Its entry, as 64-bit words; words 1, 2 and 7 are zero.
    #[inline]
    pub fn words(&self, id: u16) -> [u64; 8] {
        let first = dwords(u32::from(id) << 16 | u32::from(self.opcode), self.namespace);
        [first, 0, 0, self.prp[0], self.prp[1], self.cdw10, u64::from(self.cdw12), 0]
    }

    /// Read or write of `blocks` (1 to 65536) logical blocks from `first` on.
    #[inline]
    pub fn transfer(opcode: u8, namespace: u32, first: u64, blocks: u32, prp: [u64; 2]) -> Self {
        Self { opcode, namespace, prp, cdw10: first, cdw12: blocks - 1 }
    }

    /// Makes what was written durable.
    pub fn flush(namespace: u32) -> Self {
        Self { opcode: nvm::FLUSH, namespace, ..Self::default() }
    }

    /// Makes `blocks` (1 to 65536) blocks zeros.
    pub fn write_zeroes(namespace: u32, first: u64, blocks: u32) -> Self {
        Self::transfer(nvm::WRITE_ZEROES, namespace, first, blocks, [0; 2])
    }

    /// Deallocates the one range at bus address `range`.
    pub fn deallocate(namespace: u32, range: u64) -> Self {
        Self {
            opcode: nvm::DATASET_MANAGEMENT,
            namespace,
            prp: [range, 0],
            cdw10: dwords(0, DSM_DEALLOCATE),
            cdw12: 0,
        }
    }

    /// Writes what a `CNS_…` names to `page`.
    pub fn identify(what: u32, namespace: u32, page: u64) -> Self {
        let cdw10 = u64::from(what);
        Self { opcode: admin::IDENTIFY, namespace, prp: [page, 0], cdw10, cdw12: 0 }
    }

    /// Asks for `pairs` queue pairs, at least 1.
    pub fn set_queues(pairs: u16) -> Self {
        let less_one = u32::from(pairs - 1);
        let cdw10 = dwords(FEATURE_QUEUES, less_one << 16 | less_one);
        Self { opcode: admin::SET_FEATURES, cdw10, ..Self::default() }
    }

    /// A completion queue that interrupts.
    pub fn create_cq(queue: u16, entries: u16, vector: u16, page: u64) -> Self {
        let size = u32::from(entries - 1) << 16 | u32::from(queue);
        let flags = u32::from(vector) << 16 | QUEUE_INTERRUPTS | QUEUE_CONTIGUOUS;
        let cdw10 = dwords(size, flags);
        Self { opcode: admin::CREATE_CQ, prp: [page, 0], cdw10, ..Self::default() }
    }

    /// A submission queue whose completion queue has the same id.
    pub fn create_sq(queue: u16, entries: u16, page: u64) -> Self {
        let size = u32::from(entries - 1) << 16 | u32::from(queue);
        let flags = u32::from(queue) << 16 | QUEUE_CONTIGUOUS;
        let cdw10 = dwords(size, flags);
        Self { opcode: admin::CREATE_SQ, prp: [page, 0], cdw10, ..Self::default() }
    }

    /// Aborts command `id` of the submission queue `queue`.
    pub fn abort(queue: u16, id: u16) -> Self {
        let cdw10 = dwords(u32::from(id) << 16 | u32::from(queue), 0);
        Self { opcode: admin::ABORT, cdw10, ..Self::default() }
    }

    /// The newest entry of the error log.
    pub fn error_log(page: u64) -> Self {
        let count = crate::identify::ERROR_ENTRY_BYTES / 4 - 1;
        Self {
            opcode: admin::GET_LOG_PAGE,
            namespace: EVERY_NAMESPACE,
            prp: [page, 0],
            cdw10: u64::from(count << 16 | LOG_ERRORS),
            cdw12: 0,
        }
    }
}
