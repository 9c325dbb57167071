//! What a boot loader tells, whichever it is.

#![expect(unsafe_code, reason = "firmware's tables are read through the boot page tables")]

use crate::paging::{DIRECT_MAP, Ranges, subtract};
use core::ops::Range;
use zerocopy::FromBytes;

/// Most ranges of memory that are looked at.
pub const MAX_RANGES: usize = 64;

/// Facts from the boot loader, copied out of its memory.
#[derive(Debug, Default)]
pub struct BootInfo {
    /// Ranges of ordinary memory, physical addresses.
    pub memory: Ranges,
    /// Ranges of the map that are anything else.
    pub reserved: Ranges,
    /// The first module: the bundle.
    pub module: Option<Range<u64>>,
    /// Physical address of the ACPI root pointer, if the loader told it.
    pub rsdp: Option<u64>,
    /// Or of the tables that a copy of the pointer names.
    pub root_table: Option<RootTable>,
}

/// Where the list of ACPI tables is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RootTable {
    /// 32-bit addresses.
    Rsdt(u64),
    /// 64-bit addresses.
    Xsdt(u64),
}

impl BootInfo {
    /// Adds a range of the loader's memory map. Ranges beyond [`MAX_RANGES`] stay unused.
    pub fn add_range(&mut self, start: u64, bytes: u64, is_memory: bool) {
        let ranges = if is_memory { &mut self.memory } else { &mut self.reserved };
        if let Some(end) = start.checked_add(bytes).filter(|&end| end > start) {
            // Memory that is not noted is safe; what is reserved must not be forgotten.
            let noted = ranges.push(start..end).is_ok();
            assert!(noted || is_memory, "the memory map is short enough");
        }
    }

    /// Memory that the map gives once and calls nothing else: firmware's maps may overlap.
    pub fn clean_memory(&self) -> Ranges {
        let mut clean = Ranges::new();
        for range in &self.memory {
            let mut parts = Ranges::new();
            let _ = parts.push(range.clone());
            for hole in self.reserved.iter().chain(&clean) {
                subtract(&mut parts, hole);
            }
            let room = clean.capacity() - clean.len();
            clean.extend(parts.into_iter().take(room));
        }
        clean
    }
}

/// Access to the first 4 GiB of physical memory while the page tables of `boot.s` are loaded.
/// Given up for good when they are replaced.
pub struct BootMap(());

impl BootMap {
    /// # Safety
    /// 1. The tables of `boot.s` are loaded and stay so while the value lives.
    /// 2. Nothing writes to firmware's and the loader's memory meanwhile.
    pub unsafe fn new() -> Self {
        Self(())
    }

    /// Bytes that firmware or the loader left, or nothing where they are out of reach.
    pub fn bytes(&self, address: u64, len: u64) -> Option<&[u8]> {
        let end = address.checked_add(len)?;
        if address == 0 || end > 1 << 32 {
            return None;
        }
        let start = (DIRECT_MAP + address) as *const u8;
        // SAFETY: mapped, and not written, by the duties of `new`; any byte is a valid `u8`.
        Some(unsafe { core::slice::from_raw_parts(start, usize::try_from(len).ok()?) })
    }

    /// A copy of a structure.
    pub fn read<T: FromBytes>(&self, address: u64) -> Option<T> {
        T::read_from_bytes(self.bytes(address, size_of::<T>() as u64)?).ok()
    }
}
