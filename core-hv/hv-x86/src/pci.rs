//! PCI configuration space by memory (ECAM).
//!
//! Source: PCI Express Base Specification 5.0, section 7.2.2.

#![expect(unsafe_code, reason = "configuration space is reached by raw pointer")]

use crate::acpi::{EcamEntry, MAX_ECAM};
use heapless::Vec;
use hv_core::platform::Bdf;
use spin::Once;

struct Segment {
    entry: EcamEntry,
    /// Where the first bus is mapped.
    mapped: u64,
}

static SEGMENTS: Once<Vec<Segment, MAX_ECAM>> = Once::new();

/// Takes over configuration space; `map` makes physical addresses accessible, uncached.
pub fn init(entries: Vec<EcamEntry, MAX_ECAM>, mut map: impl FnMut(u64, u64) -> u64) {
    SEGMENTS.call_once(|| {
        let place = |entry: EcamEntry| {
            let first = u64::from(entry.first_bus) << 20;
            let buses = u64::from(entry.last_bus - entry.first_bus) + 1;
            Segment { mapped: map(entry.address + first, buses << 20), entry }
        };
        entries.into_iter().map(place).collect()
    });
}

fn address(bdf: Bdf, offset: u16, width: u16) -> Option<u64> {
    let bus = (bdf.0 >> 8 & 0xff) as u8;
    let aligned = matches!(width, 1 | 2 | 4) && offset.is_multiple_of(width) && offset < 4096;
    let segment = SEGMENTS.get()?.iter().find(|segment| {
        u32::from(segment.entry.segment) == bdf.0 >> 16
            && (segment.entry.first_bus..=segment.entry.last_bus).contains(&bus)
    })?;
    let function = u64::from(bus - segment.entry.first_bus) << 20 | u64::from(bdf.0 & 0xff) << 12;
    aligned.then(|| segment.mapped + function + u64::from(offset))
}

/// Reads 1, 2 or 4 bytes; all ones where nothing is.
pub fn read(bdf: Bdf, offset: u16, width: u16) -> u32 {
    let Some(at) = address(bdf, offset, width) else { return u32::MAX };
    match width {
        // SAFETY: mapped; what a read does is the caller's business with the device.
        1 => unsafe { (at as *const u8).read_volatile().into() },
        // SAFETY: as above, and aligned.
        2 => unsafe { (at as *const u16).read_volatile().into() },
        // SAFETY: as above.
        _ => unsafe { (at as *const u32).read_volatile() },
    }
}

/// Writes 1, 2 or 4 bytes; nothing where nothing is.
#[expect(clippy::cast_possible_truncation, reason = "the width says which bytes are meant")]
pub fn write(bdf: Bdf, offset: u16, width: u16, value: u32) {
    let Some(at) = address(bdf, offset, width) else { return };
    match width {
        // SAFETY: mapped; hv-core decides what may be written to a device.
        1 => unsafe { (at as *mut u8).write_volatile(value as u8) },
        // SAFETY: as above, and aligned.
        2 => unsafe { (at as *mut u16).write_volatile(value as u16) },
        // SAFETY: as above.
        _ => unsafe { (at as *mut u32).write_volatile(value) },
    }
}
