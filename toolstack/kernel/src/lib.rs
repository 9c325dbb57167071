//! Kernels of PVH guests, from the file that a distribution ships to the flat image that the
//! control domain loads: nothing inside the machine knows bzImage, ELF, or a compression.
//!
//! [`kernel`] takes a bzImage or an ELF file, [`ramdisk`] any bytes. Source: `xen-abi.md` §1.1;
//! Linux's `Documentation/x86/boot.rst`; the ELF specification.

#![forbid(unsafe_code)]

mod bzimage;
mod cpio;
mod elf;
mod flat;

pub use cpio::Archive;

use std::fmt;

/// Why a file is no kernel that can run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KernelError {
    /// Neither a bzImage nor an ELF file.
    Unknown,
    /// A header says more than the file has.
    Truncated(&'static str),
    /// The boot protocol is older than 2.08, which first said where the payload is.
    Old(u16),
    /// The payload is compressed in a way that is not read here.
    Compression([u8; 4]),
    /// The payload is damaged.
    Payload(String),
    /// There is no entry for PVH in the ELF notes.
    NoEntry,
    /// Segments share a page, leave the first 4 GiB, or are more than a flat image has.
    Layout(&'static str),
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("neither a bzImage nor an ELF file"),
            Self::Truncated(what) => write!(f, "the file ends before its {what}"),
            Self::Old(version) => write!(f, "boot protocol {version:#06x}, older than 2.08"),
            Self::Compression(magic) => write!(f, "unknown compression, magic {magic:02x?}"),
            Self::Payload(why) => write!(f, "the payload is damaged: {why}"),
            Self::NoEntry => f.write_str("no PVH entry: the kernel was built without CONFIG_PVH"),
            Self::Layout(what) => write!(f, "its segments {what}"),
        }
    }
}

impl std::error::Error for KernelError {}

/// The flat image of a kernel.
///
/// # Errors
/// What is wrong with the file.
pub fn kernel(file: &[u8]) -> Result<Vec<u8>, KernelError> {
    if bzimage::is_bzimage(file) {
        elf::flatten(&bzimage::payload(file)?)
    } else {
        elf::flatten(file)
    }
}

/// A ramdisk as a flat image of one segment, whose place its loader chooses.
#[must_use]
pub fn ramdisk(bytes: &[u8]) -> Vec<u8> {
    flat::write(0, &[flat::Piece { gfn: 0, pages: flat::pages(bytes.len()), lead: 0, bytes }])
}
