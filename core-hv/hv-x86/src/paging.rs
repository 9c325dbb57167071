//! The core's half of every address space.
//!
//! | from                  | what                                                 | access   |
//! |-----------------------|------------------------------------------------------|----------|
//! | `ffff8000_00000000`   | all memory but the core's image ("direct map")       | RW-      |
//! | `fffffe00_00000000`   | device registers, uncached                           | RW-      |
//! | `ffffff00_00000000`   | stacks of each processor, with guard pages           | RW-      |
//! | `ffffffff_80000000`   | the image: text, rodata, data                        | by group |
//!
//! All of it is mapped before the first domain exists, supervisor-only and global, and never
//! changes after that but for the device window of each processor. So the top-level entries of
//! all domains' tables can be plain copies of ours.

#![expect(unsafe_code, reason = "page tables are written through raw addresses")]

use core::ops::Range;
use heapless::Vec;
use hv_core::platform::MAX_CPUS;

/// Where physical address 0 is mapped.
pub const DIRECT_MAP: u64 = 0xffff_8000_0000_0000;
const MMIO: u64 = 0xffff_fe00_0000_0000;
const STACKS: u64 = 0xffff_ff00_0000_0000;
const IMAGE_BASE: u64 = 0xffff_ffff_8000_0000;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const UNCACHED: u64 = 1 << 3 | 1 << 4;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NX: u64 = 1 << 63;
const DATA: u64 = PRESENT | WRITE | GLOBAL | NX;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Ranges of physical memory.
pub type Ranges = Vec<Range<u64>, { crate::boot_info::MAX_RANGES }>;

/// A pointer to physical memory through the direct map.
pub const fn direct<T>(address: u64) -> *mut T {
    (DIRECT_MAP + address) as *mut T
}

unsafe extern "C" {
    static image_start: u8;
    static text_end: u8;
    static rodata_end: u8;
    static image_end: u8;
}

/// Physical addresses of the image: start, ends of text, of rodata and of all.
fn image_marks() -> [u64; 4] {
    let marks =
        [&raw const image_start, &raw const text_end, &raw const rodata_end, &raw const image_end];
    marks.map(|mark| mark as u64 - IMAGE_BASE)
}

/// Physical addresses that the core's image occupies.
pub fn image() -> Range<u64> {
    let [start, .., end] = image_marks();
    start..end
}

/// Takes `hole` out of all ranges.
pub fn subtract(ranges: &mut Ranges, hole: &Range<u64>) {
    let before = core::mem::take(ranges);
    for range in before {
        let parts = [range.start..range.end.min(hole.start), range.start.max(hole.end)..range.end];
        for part in parts.into_iter().filter(|part| part.start < part.end) {
            let _ = ranges.push(part);
        }
    }
}

/// Memory for what the core itself needs, from the end of one range. Nothing is given back.
pub struct BootMemory {
    range: Range<u64>,
    taken: u64,
}

impl BootMemory {
    /// Takes the largest range that boot tables reach out of `usable`.
    pub fn new(usable: &mut Ranges) -> Self {
        let largest = usable
            .iter_mut()
            .filter(|range| range.end <= 1 << 32)
            .max_by_key(|range| range.end - range.start)
            .expect("there is memory below 4 GiB");
        let range = largest.start.next_multiple_of(4096)..largest.end & !4095;
        *largest = 0..0;
        Self { range, taken: 0 }
    }

    /// Zeroed pages, one behind the other.
    pub fn take(&mut self, pages: u64) -> u64 {
        assert!(
            self.range.end - self.range.start >= pages * 4096,
            "memory below 4 GiB holds the core's tables"
        );
        self.range.end -= pages * 4096;
        self.taken += pages;
        let bytes = usize::try_from(pages * 4096).expect("usize has 64 bits");
        // SAFETY: free memory, given out once, mapped by the boot tables and by our own.
        unsafe { direct::<u8>(self.range.end).write_bytes(0, bytes) };
        self.range.end
    }

    /// What is left, and the number of pages taken.
    pub fn finish(self) -> (Range<u64>, u64) {
        (self.range, self.taken)
    }
}

/// The core's own page tables.
pub struct Tables {
    root: u64,
    gigabyte_pages: bool,
    next_mmio: u64,
}

impl Tables {
    /// Tables with the image and all of `memory` (whose parts in the image are left out).
    pub fn new(boot: &mut BootMemory, memory: &Ranges) -> Self {
        let gigabyte_pages = raw_cpuid::CpuId::new()
            .get_extended_processor_and_feature_identifiers()
            .is_some_and(|info| info.has_1gib_pages());
        let mut tables = Self { root: boot.take(1), gigabyte_pages, next_mmio: MMIO };
        let [start, text, rodata, end] = image_marks();
        for (from, to, flags) in [
            (start, text, PRESENT | GLOBAL),
            (text, rodata, PRESENT | GLOBAL | NX),
            (rodata, end, DATA),
        ] {
            tables.map(boot, IMAGE_BASE + from, from, to - from, flags);
        }
        let mut memory = memory.clone();
        subtract(&mut memory, &image());
        for range in &memory {
            let from = range.start.next_multiple_of(4096);
            let to = range.end & !4095;
            if from < to {
                tables.map(boot, DIRECT_MAP + from, from, to - from, DATA);
            }
        }
        tables
    }

    /// Physical address of the top-level table.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Maps pages, of the largest sizes that fit.
    fn map(&mut self, boot: &mut BootMemory, virt: u64, phys: u64, bytes: u64, flags: u64) {
        let mut done = 0;
        while done < bytes {
            let both = (virt + done) | (phys + done);
            let fits = |size: u64| both.is_multiple_of(size) && bytes - done >= size;
            let level = match () {
                () if fits(1 << 30) && self.gigabyte_pages => 2,
                () if fits(1 << 21) => 1,
                () => 0,
            };
            let large = if level == 0 { 0 } else { LARGE };
            let entry = self.entry(boot, virt + done, level);
            write_entry(entry, (phys + done) | flags | large);
            done += 1 << (12 + 9 * level);
        }
    }

    /// Physical address of the entry for `virt` at a level; makes the tables above it.
    fn entry(&mut self, boot: &mut BootMemory, virt: u64, level: u32) -> u64 {
        let mut table = self.root;
        let mut at = 3;
        loop {
            let entry = table + (virt >> (12 + 9 * at) & 511) * 8;
            if at == level {
                return entry;
            }
            if read_entry(entry) & PRESENT == 0 {
                write_entry(entry, boot.take(1) | PRESENT | WRITE);
            }
            assert!(read_entry(entry) & LARGE == 0 || at == 3, "no range is mapped twice");
            table = read_entry(entry) & ADDRESS;
            at -= 1;
        }
    }

    /// Maps device registers, uncached, and returns their address.
    pub fn map_mmio(&mut self, boot: &mut BootMemory, phys: u64, bytes: u64) -> u64 {
        let first = phys & !4095;
        let len = (phys + bytes).next_multiple_of(4096) - first;
        // So that large pages fit.
        let align = 1 << 21;
        let virt = self.next_mmio + first % align;
        self.next_mmio = (virt + len).next_multiple_of(align);
        self.map(boot, virt, first, len, DATA | UNCACHED);
        virt + phys % 4096
    }

    /// Maps the stacks of a processor.
    pub fn map_stacks(&mut self, boot: &mut BootMemory, cpu: usize) -> CpuArea {
        for stack in [MAIN, DOUBLE_FAULT, NMI, MACHINE_CHECK, DEBUG] {
            let pages = (stack.end - stack.start) / 4096;
            let phys = boot.take(pages);
            self.map(boot, area(cpu) + stack.start, phys, pages * 4096, DATA);
        }
        let window = area(cpu) + WINDOW;
        let guest_pages = [boot.take(1), boot.take(1)];
        CpuArea { slot: cpu, window, window_entry: self.entry(boot, window, 0), guest_pages }
    }

    /// Maps one page at its physical address, executable, while secondary processors start.
    pub fn map_trampoline(&mut self, boot: &mut BootMemory, page: u64) {
        self.map(boot, page, page, 4096, PRESENT);
    }

    /// Takes the lower half away again.
    pub fn unmap_lower_half(&mut self) {
        write_entry(self.root, 0);
        x86_64::instructions::tlb::flush_all();
    }
}

fn read_entry(entry: u64) -> u64 {
    // SAFETY: an aligned entry of a table that the direct map reaches.
    unsafe { direct::<u64>(entry).read_volatile() }
}

fn write_entry(entry: u64, value: u64) {
    // SAFETY: an aligned entry of one of our tables. Entries in use are not changed, but for the
    // window's and the lower half's, whose users flush.
    unsafe { direct::<u64>(entry).write_volatile(value) };
}

/// Copies the core's half of the top-level table at `from` to the one at `to`.
pub fn share_core(from: u64, to: u64) {
    for index in 256..512 {
        write_entry(to + index * 8, read_entry(from + index * 8));
    }
}

// Where things are in the area of a processor. What lies between is never mapped.
const AREA: u64 = 0x40000;
const MAIN: Range<u64> = 0x1000..0xd000;
const DOUBLE_FAULT: Range<u64> = 0xe000..0x10000;
const NMI: Range<u64> = 0x11000..0x12000;
const MACHINE_CHECK: Range<u64> = 0x13000..0x15000;
const DEBUG: Range<u64> = 0x16000..0x18000;
const WINDOW: u64 = 0x19000;

const fn area(cpu: usize) -> u64 {
    STACKS + cpu as u64 * AREA
}

/// End of a processor's ordinary stack.
pub const fn main_stack(cpu: usize) -> u64 {
    area(cpu) + MAIN.end
}

/// Ends of the stacks for #DF, NMI, #MC and #DB.
pub const fn interrupt_stacks(cpu: usize) -> [u64; 4] {
    let at = area(cpu);
    [at + DOUBLE_FAULT.end, at + NMI.end, at + MACHINE_CHECK.end, at + DEBUG.end]
}

/// The stack, of any processor, that an address lies in.
pub fn stack_around(address: u64) -> Option<Range<u64>> {
    let offset = address.checked_sub(STACKS)?;
    let (cpu, offset) = (offset / AREA, offset % AREA);
    let stack = [MAIN, DOUBLE_FAULT, NMI, MACHINE_CHECK, DEBUG]
        .into_iter()
        .find(|stack| stack.contains(&offset) && cpu < MAX_CPUS as u64)?;
    let base = STACKS + cpu * AREA;
    Some(base + stack.start..base + stack.end)
}

/// Whether an address lies in the core's instructions.
pub fn is_text(address: u64) -> bool {
    let [start, text, ..] = image_marks();
    (IMAGE_BASE + start..IMAGE_BASE + text).contains(&address)
}

/// The stacks of a processor, and a page of address space that only it uses, for device registers
/// anywhere.
#[derive(Clone, Copy)]
pub struct CpuArea {
    slot: usize,
    window: u64,
    window_entry: u64,
    guest_pages: [u64; 2],
}

impl CpuArea {
    /// Number of the area; at most as many as there are processors.
    pub fn slot(&self) -> usize {
        self.slot
    }

    /// Address of the window.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// Physical addresses of two pages that only it uses, to run guests.
    pub fn guest_pages(&self) -> [u64; 2] {
        self.guest_pages
    }

    /// Moves the window to a physical page.
    pub fn move_window(&self, page: u64) {
        write_entry(self.window_entry, (page & ADDRESS) | PRESENT | WRITE | UNCACHED | NX);
        x86_64::instructions::tlb::flush(x86_64::VirtAddr::new(self.window));
    }
}
