//! How a command ended.
//!
//! Source: NVM Express Base Specification 1.4, section 4.6.1.

use core::fmt;
use domain_api::disk::DiskError;

/// The status field of a completion, without the phase: status code (8 bits), status code type
/// (3), retry delay (2), more (1), do not retry (1).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

/// Do not retry.
const DNR: u16 = 1 << 14;

impl Status {
    /// All was done.
    pub const SUCCESS: Self = Self(0);
    /// Invalid opcode.
    pub const INVALID_OPCODE: Self = Self(0x001);
    /// Invalid field in the command.
    pub const INVALID_FIELD: Self = Self(0x002);
    /// Data transfer error.
    pub const DATA_TRANSFER: Self = Self(0x004);
    /// Internal error.
    pub const INTERNAL: Self = Self(0x006);
    /// Aborted as it was asked to.
    pub const ABORT_REQUESTED: Self = Self(0x007);
    /// Aborted because its submission queue was deleted.
    pub const ABORT_QUEUE_DELETED: Self = Self(0x008);
    /// No such namespace, or not in this format.
    pub const INVALID_NAMESPACE: Self = Self(0x00b);
    /// The namespace is write protected.
    pub const NAMESPACE_WRITE_PROTECTED: Self = Self(0x020);
    /// Blocks behind the end.
    pub const LBA_OUT_OF_RANGE: Self = Self(0x080);
    /// The namespace has no room for that.
    pub const CAPACITY_EXCEEDED: Self = Self(0x081);
    /// Not ready yet.
    pub const NAMESPACE_NOT_READY: Self = Self(0x082);
    /// Written to a range that may only be read.
    pub const READ_ONLY_RANGE: Self = Self(0x182);
    /// Write fault.
    pub const WRITE_FAULT: Self = Self(0x280);
    /// Read error that could not be recovered.
    pub const UNRECOVERED_READ: Self = Self(0x281);

    /// Whether all was done.
    #[must_use]
    pub fn is_success(self) -> bool {
        self.code() == 0
    }

    /// Code and type.
    #[must_use]
    pub fn code(self) -> u16 {
        self.0 & 0x7ff
    }

    /// The same, not to be retried.
    #[must_use]
    pub fn final_one(self) -> Self {
        Self(self.0 | DNR)
    }

    /// Whether the same command may succeed when it is given again.
    #[must_use]
    pub fn may_retry(self) -> bool {
        !self.is_success() && self.0 & DNR == 0
    }

    /// What the submitter is told.
    #[must_use]
    pub fn error(self) -> DiskError {
        match Self(self.code()) {
            Self::INVALID_OPCODE => DiskError::Unsupported,
            Self::ABORT_REQUESTED | Self::ABORT_QUEUE_DELETED => DiskError::Aborted,
            Self::NAMESPACE_WRITE_PROTECTED | Self::READ_ONLY_RANGE => DiskError::ReadOnly,
            Self::LBA_OUT_OF_RANGE => DiskError::OutOfRange,
            Self::CAPACITY_EXCEEDED => DiskError::NoSpace,
            // Type 2 is "media and data integrity errors".
            Self(code) if code >> 8 == 2 => DiskError::Medium,
            _ => DiskError::Failed,
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match Self(self.code()) {
            Self::SUCCESS => "success",
            Self::INVALID_OPCODE => "invalid opcode",
            Self::INVALID_FIELD => "invalid field",
            Self::DATA_TRANSFER => "data transfer error",
            Self::INTERNAL => "internal error",
            Self::ABORT_REQUESTED => "aborted",
            Self::ABORT_QUEUE_DELETED => "aborted with its queue",
            Self::INVALID_NAMESPACE => "invalid namespace",
            Self::NAMESPACE_WRITE_PROTECTED | Self::READ_ONLY_RANGE => "write protected",
            Self::LBA_OUT_OF_RANGE => "block out of range",
            Self::CAPACITY_EXCEEDED => "capacity exceeded",
            Self::NAMESPACE_NOT_READY => "namespace not ready",
            Self::WRITE_FAULT => "write fault",
            Self::UNRECOVERED_READ => "unrecovered read error",
            _ => return write!(f, "status {:#05x}", self.code()),
        };
        f.write_str(name)
    }
}
