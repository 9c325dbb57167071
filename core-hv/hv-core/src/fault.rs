//! Whose fault it is.

use xen_abi::Errno;

/// Why a hypercall has no result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The caller gets this code and goes on.
    Refused(Errno),
    /// Not done yet: the caller executes the same instruction again, and the handler goes on
    /// where `Vcpu::progress` says.
    Again,
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Self::Refused(errno)
    }
}

/// What a hypercall handler answers.
pub type Answer = Result<u64, Fault>;
