//! Starting the other processors, one after the other.
//!
//! Source: Intel SDM volume 3, section 9.4.4 (INIT, then up to two start-up interrupts). More than
//! two do no harm: a processor that runs ignores them, and a slow emulator may miss the first.

#![expect(unsafe_code, reason = "the trampoline is copied to and filled in physical memory")]

use crate::paging::{self, BootMemory, CpuArea, Tables};
use crate::{apic, cpu, time};
use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

/// A page below 1 MiB, which neither firmware nor loaders use after they started us.
pub const TRAMPOLINE: u32 = 0x8000;

global_asm!(
    ".set TRAMPOLINE, {}", include_str!("trampoline.s"), const TRAMPOLINE,
    options(att_syntax)
);

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_slots: u8;
    static trampoline_end: u8;
}

/// TSC of the processor that has just arrived, 0 before.
static ARRIVED: AtomicU64 = AtomicU64::new(0);

/// Copies the trampoline to its page and maps it.
pub fn prepare(tables: &mut Tables, boot: &mut BootMemory) {
    let start = &raw const trampoline_start;
    let len = (&raw const trampoline_end) as usize - start as usize;
    assert!(len <= 4096, "the trampoline fits in its page");
    // SAFETY: the page is free memory, and mapped.
    unsafe { paging::direct::<u8>(TRAMPOLINE.into()).copy_from_nonoverlapping(start, len) };
    tables.map_trampoline(boot, TRAMPOLINE.into());
}

fn fill_slots(values: [u64; 4]) {
    let offset = (&raw const trampoline_slots) as u64 - (&raw const trampoline_start) as u64;
    let slots = paging::direct::<[u64; 4]>(u64::from(TRAMPOLINE) + offset);
    // SAFETY: in the trampoline's page; no processor is on its way meanwhile.
    unsafe { slots.write_volatile(values) };
}

/// What a processor finds when it arrives.
pub struct Start {
    /// Its stacks and its device window.
    pub area: CpuArea,
}

/// Starts a processor at `entry` with `start` as its argument. Tells whether it came, with a TSC
/// that agrees with ours.
pub fn start(
    apic_id: u32,
    root: u64,
    start: &'static Start,
    entry: extern "C" fn(&'static Start) -> !,
) -> bool {
    let stack = paging::main_stack(start.area.slot());
    fill_slots([root, stack, entry as usize as u64, core::ptr::from_ref(start) as u64]);
    ARRIVED.store(0, Ordering::SeqCst);
    let before = time::tsc();
    apic::send_init(apic_id);
    time::delay_us(200);
    for _ in 0..50 {
        apic::start_up(apic_id, TRAMPOLINE);
        for _ in 0..1000 {
            let arrived = ARRIVED.load(Ordering::SeqCst);
            if arrived != 0 {
                return (before..=time::tsc()).contains(&arrived);
            }
            time::delay_us(20);
        }
    }
    // It must not come later, when its slots and its stack are another's, or the page is gone.
    apic::send_init(apic_id);
    false
}

/// First thing that a started processor does: loads its tables and says that it is there.
pub fn arrive(start: &Start) {
    cpu::load_tables(start.area.slot());
    apic::init();
    ARRIVED.store(time::tsc(), Ordering::SeqCst);
}
