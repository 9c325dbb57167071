//! Machine frames.

/// A machine frame number. Only the frame table and the page-table code make one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct Mfn(pub u64);
