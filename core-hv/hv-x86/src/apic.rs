//! The local APIC, by memory (xAPIC) or by MSR (x2APIC).
//!
//! Source: Intel SDM volume 3, chapter 11; AMD64 APM volume 2, chapter 16.

#![expect(unsafe_code, reason = "the local APIC is reached by raw pointer or MSR")]

use crate::cpu::apic_base;
use crate::time;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use x86_64::registers::model_specific::Msr;

/// Vector by which one processor asks another to look at its work.
pub const KICK: u8 = 0xf0;
/// Vector of the timer.
pub const TIMER: u8 = 0xf1;
/// Vector of the second serial port.
pub const SERIAL: u8 = 0xf2;
/// Vector of the first one, the console's.
pub const CONSOLE: u8 = 0xf3;
/// Vector of interrupts that went away; not to be acknowledged.
pub const SPURIOUS: u8 = 0xff;

const ID: u32 = 0x20;
const TASK_PRIORITY: u32 = 0x80;
const EOI: u32 = 0xb0;
const SPURIOUS_VECTOR: u32 = 0xf0;
const COMMAND: u32 = 0x300;
const COMMAND_HIGH: u32 = 0x310;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const LVT_LINT1: u32 = 0x360;
const TIMER_COUNT: u32 = 0x380;
const TIMER_NOW: u32 = 0x390;
const TIMER_DIVIDE: u32 = 0x3e0;

const MASKED: u32 = 1 << 16;
const FROM_8259: u32 = 7 << 8;
const TSC_DEADLINE: u32 = 2 << 17;
const DIVIDE_BY_16: u32 = 3;
const BASE_ENABLED: u64 = 1 << 11;
const BASE_X2APIC: u64 = 1 << 10;
const TSC_DEADLINE_MSR: u32 = 0x6e0;

const INIT: u32 = 0x4500;
const START_UP: u32 = 0x4600;
const NMI_TO_OTHERS: u32 = 0xc_4400;
const PENDING: u32 = 1 << 12;

/// Address of the registers, or one of these.
static REGISTERS: AtomicU64 = AtomicU64::new(UNKNOWN);
/// Nothing is known yet: a panic must not touch what may not be there.
const UNKNOWN: u64 = 0;
/// The registers are MSRs.
const BY_MSR: u64 = 1;
/// Timer ticks per second, where the timer does not take a TSC value.
static TIMER_HZ: AtomicU64 = AtomicU64::new(0);
/// Whether it does so.
static USES_DEADLINE: AtomicBool = AtomicBool::new(false);

/// Finds out how the registers are reached; `map` makes them accessible where that is by memory.
pub fn choose(map: impl FnOnce() -> u64) {
    let info = raw_cpuid::CpuId::new().get_feature_info();
    let x2apic = info.is_some_and(|info| info.has_x2apic());
    REGISTERS.store(if x2apic { BY_MSR } else { map() }, Ordering::Relaxed);
}

fn by_msr() -> bool {
    REGISTERS.load(Ordering::Relaxed) == BY_MSR
}

fn read(register: u32) -> u32 {
    match REGISTERS.load(Ordering::Relaxed) {
        UNKNOWN => 0,
        // SAFETY: the register exists, reads change no memory.
        #[expect(clippy::cast_possible_truncation, reason = "registers have 32 bits")]
        BY_MSR => unsafe { Msr::new(0x800 + (register >> 4)).read() as u32 },
        // SAFETY: mapped by the caller of `choose`.
        base => unsafe { ((base + u64::from(register)) as *const u32).read_volatile() },
    }
}

fn write(register: u32, value: u32) {
    match REGISTERS.load(Ordering::Relaxed) {
        UNKNOWN => {}
        // SAFETY: the register exists; interrupts find handlers.
        BY_MSR => unsafe { Msr::new(0x800 + (register >> 4)).write(value.into()) },
        // SAFETY: as above, and mapped by the caller of `choose`.
        base => unsafe { ((base + u64::from(register)) as *mut u32).write_volatile(value) },
    }
}

/// Sends a command to a processor.
fn command(apic_id: u32, what: u32) {
    if by_msr() {
        let value = u64::from(apic_id) << 32 | u64::from(what);
        // What was written to memory is there before the interrupt is: SDM volume 3, section
        // 11.12.3. A fence of loads keeps the write to the register behind the one of stores.
        core::sync::atomic::fence(Ordering::SeqCst);
        // SAFETY: every processor with long mode has SSE2's LFENCE.
        unsafe { core::arch::x86_64::_mm_lfence() };
        // SAFETY: the interrupt finds a handler.
        unsafe { Msr::new(0x800 + (COMMAND >> 4)).write(value) };
        return;
    }
    while read(COMMAND) & PENDING != 0 {
        core::hint::spin_loop();
    }
    write(COMMAND_HIGH, apic_id << 24);
    write(COMMAND, what);
}

/// Turns this processor's APIC on, with nothing pending and the timer off.
pub fn init() {
    apic_base(BASE_ENABLED);
    if by_msr() {
        apic_base(BASE_ENABLED | BASE_X2APIC);
    }
    write(TASK_PRIORITY, 0);
    write(SPURIOUS_VECTOR, 0x100 | u32::from(SPURIOUS));
    write(LVT_LINT0, MASKED | FROM_8259);
    write(LVT_LINT1, MASKED);
    write(TIMER_DIVIDE, DIVIDE_BY_16);
    let deadline =
        raw_cpuid::CpuId::new().get_feature_info().is_some_and(|info| info.has_tsc_deadline());
    write(LVT_TIMER, u32::from(TIMER) | if deadline { TSC_DEADLINE } else { 0 });
    // Between the mode and the first deadline: SDM volume 3, section 11.5.4.1.
    core::sync::atomic::fence(Ordering::SeqCst);
    USES_DEADLINE.store(deadline, Ordering::Relaxed);
}

/// This processor's APIC id.
pub fn id() -> u32 {
    let id = read(ID);
    if by_msr() { id } else { id >> 24 }
}

/// Acknowledges the interrupt in service.
pub fn end_of_interrupt() {
    write(EOI, 0);
}

/// Starts the timer's counter at its highest value, to be calibrated.
pub fn start_counting() {
    if !USES_DEADLINE.load(Ordering::Relaxed) {
        write(LVT_TIMER, MASKED | u32::from(TIMER));
        write(TIMER_COUNT, u32::MAX);
    }
}

/// Ticks since [`start_counting`].
pub fn counted() -> u64 {
    u64::from(u32::MAX - read(TIMER_NOW))
}

/// Ends what [`start_counting`] began: `ticks` were counted in `ns`.
pub fn stop_counting(ticks: u64, ns: u64) {
    if !USES_DEADLINE.load(Ordering::Relaxed) {
        write(TIMER_COUNT, 0);
        write(LVT_TIMER, u32::from(TIMER));
        TIMER_HZ.store((ticks * 1_000_000_000 / ns).max(1), Ordering::Relaxed);
    }
}

/// Sets the one-shot timer to a system time, or off. A time too far away fires early.
pub fn set_timer(deadline_ns: Option<u64>) {
    if USES_DEADLINE.load(Ordering::Relaxed) {
        let tsc = deadline_ns.map_or(0, time::tsc_at);
        // SAFETY: exists by CPUID; the interrupt finds a handler.
        unsafe { Msr::new(TSC_DEADLINE_MSR).write(tsc) };
        return;
    }
    let count = deadline_ns.map_or(0, |deadline| {
        let ns = u128::from(deadline.saturating_sub(time::now_ns()));
        let ticks = ns * u128::from(TIMER_HZ.load(Ordering::Relaxed)) / 1_000_000_000 + 1;
        u32::try_from(ticks).unwrap_or(u32::MAX)
    });
    write(TIMER_COUNT, count);
}

/// Interrupts another processor.
pub fn kick(apic_id: u32) {
    command(apic_id, 0x4000 | u32::from(KICK));
}

/// Puts another processor into the state that waits for [`start_up`].
pub fn send_init(apic_id: u32) {
    command(apic_id, INIT);
}

/// Starts it in real mode at a page below 1 MiB.
pub fn start_up(apic_id: u32, page: u32) {
    command(apic_id, START_UP | page >> 12);
}

/// Interrupts all others, whatever they do. Nobody is waited for.
pub fn nmi_to_others() {
    write(COMMAND, NMI_TO_OTHERS);
}
