//! System time from the TSC, and the wall clock at its start.
//!
//! System time is computed as a domain does it from `vcpu_time_info`, with the same parameters:
//! `((tsc - zero) << shift) * mul >> 32`, a negative shift being to the right.

#![expect(unsafe_code, reason = "timers are read by port")]

use crate::apic;
use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};
use hv_core::platform::Clock;
use spin::Once;
use x86_64::instructions::port::Port;

const NS: u64 = 1_000_000_000;
/// Both calibrations take this long.
const WINDOW_NS: u64 = 10_000_000;

static ZERO: AtomicU64 = AtomicU64::new(0);
static CLOCK: Once<Clock> = Once::new();

/// The time stamp counter.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: exists on every processor with long mode.
    unsafe { _rdtsc() }
}

/// Makes now the time 0.
pub fn start() {
    ZERO.store(tsc(), Ordering::Relaxed);
}

/// The three counters at one moment.
#[derive(Clone, Copy)]
struct Sample {
    tsc: u64,
    apic: u64,
    /// Of the reference: the ACPI timer, or a period of the 8254 known to be over.
    reference: u32,
}

/// Measures the TSC and the APIC's timer, and reads the wall clock.
pub fn calibrate(pm_timer: Option<u16>) {
    let unix = rtc_seconds();
    apic::start_counting();
    let (first, last, ns) = pm_timer.map_or_else(pit_window, pm_window);
    apic::stop_counting(last.apic - first.apic, ns);
    let measured = u128::from(last.tsc - first.tsc) * u128::from(NS) / u128::from(ns);
    let measured = u64::try_from(measured).unwrap_or(NS);
    let hz = told_hz().unwrap_or(measured).max(1_000_000);
    let zero = ZERO.load(Ordering::Relaxed);
    let since = (tsc() - zero) / hz;
    let (mul, shift) = scale(hz);
    CLOCK.call_once(|| Clock {
        tsc_at_zero: zero,
        mul,
        shift,
        tsc_khz: hz / 1000,
        unix_at_zero_s: unix.map_or(0, |seconds| seconds - since),
    });
}

/// Reads all counters so that little time passes in between, even where somebody may take the
/// processor away from us: the best of some tries.
fn sample(reference: impl Fn() -> u32) -> Sample {
    let mut best = u64::MAX;
    let mut found = Sample { tsc: 0, apic: 0, reference: 0 };
    for _ in 0..8 {
        let before = tsc();
        let reference = reference();
        let took = tsc() - before;
        let apic = apic::counted();
        if took < best {
            best = took;
            found = Sample { tsc: before + took / 2, apic, reference };
        }
    }
    found
}

/// What the processor or a hypervisor below us says: CPUID leaf 0x15, or 0x40000010 in kHz.
fn told_hz() -> Option<u64> {
    let cpuid = raw_cpuid::CpuId::new();
    let crystal = cpuid.get_tsc_info().and_then(|info| info.tsc_frequency());
    let hypervisor = cpuid.get_hypervisor_info().and_then(|info| info.tsc_frequency());
    crystal.or(hypervisor.map(|khz| u64::from(khz) * 1000)).filter(|&hz| hz > 0)
}

/// `tsc_to_system_mul` and `tsc_shift`.
fn scale(hz: u64) -> (u32, i8) {
    let (mut hz, mut shift) = (hz, 0);
    while hz > 2 * NS {
        hz >>= 1;
        shift -= 1;
    }
    while hz <= NS {
        hz <<= 1;
        shift += 1;
    }
    (u32::try_from((NS << 32) / hz).unwrap_or(u32::MAX), shift)
}

/// Waits for the window by the ACPI timer, 3.579545 MHz and at least 24 bits wide; returns how
/// long it really was.
fn pm_window(port: u16) -> (Sample, Sample, u64) {
    const HZ: u64 = 3_579_545;
    // SAFETY: reading the timer changes nothing.
    let read = || unsafe { Port::<u32>::new(port).read() };
    let passed = |first: Sample, now: u32| u64::from(now.wrapping_sub(first.reference) & 0xff_ffff);
    let first = sample(read);
    while passed(first, read()) < WINDOW_NS * HZ / NS {}
    let last = sample(read);
    (first, last, passed(first, last.reference) * NS / HZ)
}

/// The same by channel 2 of the 8254, 1.193182 MHz, in one-shot mode.
fn pit_window() -> (Sample, Sample, u64) {
    const COUNT: u64 = WINDOW_NS * 1_193_182 / NS;
    let [low, high, ..] = COUNT.to_le_bytes();
    let mut gate = Port::<u8>::new(0x61);
    // SAFETY: speaker and gate of channel 2.
    let old = unsafe { gate.read() } & !3;
    for (port, value) in [(0x61, old), (0x43, 0xb0), (0x42, low), (0x42, high), (0x61, old | 1)] {
        // SAFETY: channel 2 drives nothing but the speaker, which is off.
        unsafe { Port::<u8>::new(port).write(value) };
    }
    let first = sample(|| 0);
    // SAFETY: reading the output's state changes nothing. A missing chip reads as ready.
    while unsafe { gate.read() } & 0x20 == 0 {
        core::hint::spin_loop();
    }
    (first, sample(|| 0), WINDOW_NS)
}

/// The parameters of system time.
///
/// # Panics
/// Before [`calibrate`].
#[inline]
pub fn clock() -> &'static Clock {
    CLOCK.get().expect("time is calibrated")
}

/// System time.
#[inline]
pub fn now_ns() -> u64 {
    let clock = clock();
    let ticks = tsc().wrapping_sub(clock.tsc_at_zero);
    let scaled =
        if clock.shift >= 0 { ticks << clock.shift } else { ticks >> clock.shift.unsigned_abs() };
    let product = (u128::from(scaled) * u128::from(clock.mul)) >> 32;
    #[expect(clippy::cast_possible_truncation, reason = "584 years of ns")]
    return product as u64;
}

/// The first TSC at which [`now_ns`] is not below `ns`.
pub fn tsc_at(ns: u64) -> u64 {
    let clock = clock();
    let scaled = (u128::from(ns) << 32).div_ceil(clock.mul.into());
    let by = clock.shift.unsigned_abs();
    let ticks = if clock.shift >= 0 { scaled.div_ceil(1 << by) } else { scaled << by };
    clock.tsc_at_zero.saturating_add(u64::try_from(ticks).unwrap_or(u64::MAX)).max(1)
}

/// Waits busily; before calibration for an unknown but longer time.
pub fn delay_us(us: u64) {
    let khz = CLOCK.get().map_or(10_000_000, |clock| clock.tsc_khz);
    let end = tsc() + us * khz / 1000;
    while tsc() < end {
        core::hint::spin_loop();
    }
}

fn cmos(register: u8) -> u8 {
    // SAFETY: selects a register, and leaves NMI enabled.
    unsafe { Port::<u8>::new(0x70).write(register) };
    // SAFETY: reading the clock changes nothing.
    unsafe { Port::<u8>::new(0x71).read() }
}

/// Seconds, minutes, hours, day, month, year: while no update is going on, and twice the same.
fn rtc_registers() -> Option<[u8; 6]> {
    let read = || [0, 2, 4, 7, 8, 9].map(cmos);
    for _ in 0..20_000 {
        if cmos(10) & 0x80 == 0 {
            let first = read();
            if first == read() {
                return Some(first);
            }
        }
    }
    None
}

/// The battery clock, taken as UTC, in Unix seconds. Source: Motorola MC146818 data sheet.
fn rtc_seconds() -> Option<u64> {
    let mut registers = rtc_registers()?;
    let format = cmos(11);
    let afternoon = registers[2] & 0x80 != 0;
    registers[2] &= 0x7f;
    if format & 4 == 0 {
        registers = registers.map(|bcd| (bcd >> 4) * 10 + (bcd & 15));
    }
    let [second, minute, mut hour, day, month, year] = registers.map(u64::from);
    if format & 2 == 0 {
        hour = hour % 12 + if afternoon { 12 } else { 0 };
    }
    let valid = (1..=31).contains(&day) && (1..=12).contains(&month) && hour < 24;
    let days = days_since_1970(2000 + year, month, day);
    valid.then(|| ((days * 24 + hour) * 60 + minute) * 60 + second)
}

/// Days of the Gregorian calendar: a year that starts in March has its leap day at the end.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400;
    days + (153 * month + 2) / 5 + day - 1 - 719_468
}
