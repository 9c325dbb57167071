//! Linear addresses of a kernel, by its own page tables.
//!
//! Hypercall arguments of a PVH domain are linear addresses (`xen-abi.md` §3.1), of whatever
//! paging mode the caller is in. Source: AMD64 APM volume 2, chapter 5. Accessed and dirty bits
//! are left as they are: kernels set them beforehand in their own mappings.

use crate::p2m::P2m;
use crate::platform::{Mode, Platform};
use xen_abi::Gfn;

const CR0_PAGING: u64 = 1 << 31;
const CR0_WRITE_PROTECT: u64 = 1 << 16;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// The guest-physical address that supervisor code of `mode` reaches by a linear address, if it
/// may access it so.
#[must_use]
pub fn translate<P: Platform>(
    p: &P,
    p2m: &P2m,
    mode: &Mode,
    linear: u64,
    write: bool,
) -> Option<u64> {
    if mode.cr0 & CR0_PAGING == 0 {
        return Some(linear & 0xffff_ffff);
    }
    let write = write && mode.cr0 & CR0_WRITE_PROTECT != 0;
    if mode.efer & EFER_LMA != 0 {
        let levels = if mode.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
        let unused = 64 - (12 + 9 * levels);
        if (linear << unused).cast_signed() >> unused != linear.cast_signed() {
            return None;
        }
        wide(p, p2m, mode.cr3 & FRAME, linear, levels, write)
    } else if mode.cr4 & CR4_PAE != 0 {
        let linear = linear & 0xffff_ffff;
        let entry = load(p, p2m, (mode.cr3 & 0xffff_ffe0) + (linear >> 30) * 8, 8)?;
        if entry & PRESENT == 0 {
            return None;
        }
        wide(p, p2m, entry & FRAME, linear, 2, write)
    } else {
        narrow(p, p2m, mode, linear & 0xffff_ffff, write)
    }
}

/// Tables of 512 entries of 8 bytes.
fn wide<P: Platform>(
    p: &P,
    p2m: &P2m,
    root: u64,
    linear: u64,
    levels: u32,
    write: bool,
) -> Option<u64> {
    let mut table = root;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let entry = load(p, p2m, table + (linear >> shift & 511) * 8, 8)?;
        if entry & PRESENT == 0 || write && entry & WRITABLE == 0 {
            return None;
        }
        if level == 0 || (level <= 2 && entry & LARGE != 0) {
            let within = (1 << shift) - 1;
            return Some(entry & FRAME & !within | linear & within);
        }
        table = entry & FRAME;
    }
    None
}

/// Tables of 1024 entries of 4 bytes, large pages of 4 MiB.
fn narrow<P: Platform>(p: &P, p2m: &P2m, mode: &Mode, linear: u64, write: bool) -> Option<u64> {
    let entry = load(p, p2m, (mode.cr3 & 0xffff_f000) + (linear >> 22) * 4, 4)?;
    if entry & PRESENT == 0 || write && entry & WRITABLE == 0 {
        return None;
    }
    if entry & LARGE != 0 && mode.cr4 & CR4_PSE != 0 {
        let high = (entry >> 13 & 0xff) << 32;
        return Some(high | entry & 0xffc0_0000 | linear & 0x3f_ffff);
    }
    let entry = load(p, p2m, (entry & 0xffff_f000) + (linear >> 12 & 1023) * 4, 4)?;
    if entry & PRESENT == 0 || write && entry & WRITABLE == 0 {
        return None;
    }
    Some(entry & 0xffff_f000 | linear & 0xfff)
}

/// An entry of a table, which must be the domain's own memory.
fn load<P: Platform>(p: &P, p2m: &P2m, gpa: u64, bytes: u64) -> Option<u64> {
    let mfn = p2m.own_memory(p, Gfn::containing(gpa))?;
    let offset = (gpa & 0xfff) as usize;
    Some(match bytes {
        4 => p.load32(mfn, offset).into(),
        _ => p.load64(mfn, offset),
    })
}
