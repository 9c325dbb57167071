//! Checks from inside what a kernel of its own finds in place of a machine (`xen-abi.md` §1–§5,
//! §9), and counts what each way to the core and back costs.
//!
//! Prints a line for each check that fails, and at the end how many held; then the time-stamp
//! counter's ticks for each kind of exit, which are instructions where the emulator counts them.
//! It needs two processors. It ends by powering itself off.

#![no_std]
#![no_main]

mod cpu;

use core::fmt::{self, Write};
use core::sync::atomic::Ordering;
use cpu::{SCRATCH, SHARED, call, cpuid, load, load32, load64, rdmsr, wrmsr};
use xen_abi::event::{BIND_IPI, BIND_VIRQ, SEND, VIRQ_TIMER};
use xen_abi::hvm::{GET_PARAM, SET_PARAM, params};
use xen_abi::hypercall::{
    CONSOLE_IO, EVENT_CHANNEL_OP, HVM_OP, MEMORY_OP, VCPU_OP, XEN_VERSION, version,
};
use xen_abi::memory::{ADD_TO_PHYSMAP, DECREASE_RESERVATION, POPULATE_PHYSMAP};
use xen_abi::shared_info::{EVTCHN_PENDING, VCPU_INFO_SIZE, VCPU_TIME, time};
use xen_abi::vcpu::{SET_SINGLESHOT_TIMER, STOP_PERIODIC_TIMER};

const SELF: u64 = 0x7ff0;
const EVENT_VECTOR: u64 = 0xf3;
const IPI_VECTOR: u64 = 0x40;
const GS_BASE: u32 = 0xc000_0101;
const APIC_BASE: u32 = 0x1b;
const TSC_AUX: u32 = 0xc000_0103;
const X2APIC_ON: u64 = 0xfee0_0c00;
const ENOSYS: u32 = 38_u32.wrapping_neg();
const MS: u64 = 1_000_000;

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        cpu::print(text);
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "pvh-test: {info}");
    cpu::stop()
}

/// How many checks there were, and how many held.
struct Checks {
    all: u32,
    held: u32,
}

impl Checks {
    fn that(&mut self, holds: bool, what: &str) {
        self.all += 1;
        self.held += u32::from(holds);
        if !holds {
            let _ = writeln!(Console, "pvh-test: FAILED: {what}");
        }
    }

    fn same<T: PartialEq + fmt::LowerHex>(&mut self, found: T, expected: T, what: &str) {
        if found != expected {
            let _ = writeln!(Console, "pvh-test: {found:#x} instead of {expected:#x}:");
        }
        self.that(found == expected, what);
    }
}

/// What `entry.s` noted.
type Entry = [u32; 19];

#[expect(unsafe_code, reason = "called by `entry.s`")]
#[unsafe(no_mangle)]
extern "C" fn main(entry: &Entry) -> ! {
    cpu::fill_idt();
    let mut checks = Checks { all: 0, held: 0 };
    let c = &mut checks;
    entry_state(c, entry);
    start_info(c, u64::from(entry[3]));
    processor(c);
    registers(c);
    hypercalls(c);
    events(c);
    clock(c);
    memory(c);
    second_processor(c);
    let _ = writeln!(Console, "pvh-test: {} of {} checks held", checks.held, checks.all);
    costs();
    let _ = writeln!(Console, "pvh-test: done");
    cpu::second_word().store(5, Ordering::SeqCst);
    cpu::stop()
}

/// §1.2; and hypercalls from 32-bit code, without paging (§3.1).
fn entry_state(c: &mut Checks, entry: &Entry) {
    for (register, at) in [("eax", 0), ("ecx", 1), ("edx", 2), ("esi", 4), ("edi", 5), ("ebp", 6)] {
        c.same(entry[at], 0, register);
    }
    let expected = [2, 0x11, 0, 0, 0, 0xfee0_0900, 0xffff_0ff0, 0x400];
    let names = ["eflags", "cr0", "cr3", "cr4", "efer", "apic base", "dr6", "dr7"];
    for ((found, expected), name) in entry[7..15].iter().zip(expected).zip(names) {
        c.same(*found, expected, name);
    }
    c.same(entry[15], 4 << 16 | 17, "version from 32-bit code");
    c.same(entry[16], version::FEATURES, "features from 32-bit code");
    c.same(entry[17], ENOSYS, "poll from 32-bit code is refused");
    c.same(entry[18], ENOSYS, "an unknown hypercall");
}

/// §1.3, §1.4.
fn start_info(c: &mut Checks, at: u64) {
    c.same(load32(at), 0x336e_c578, "start info");
    c.same(load32(at + 4), 1, "its version");
    c.same(load32(at + 8), 0, "no privileges");
    let (map, entries) = (load64(at + 40), load32(at + 48));
    let mut end = 0;
    for entry in (0..u64::from(entries)).map(|n| map + 24 * n) {
        let (start, len, kind) = (load64(entry), load64(entry + 8), load32(entry + 16));
        c.that(start >= end && len > 0 && (1..=7).contains(&kind), "the memory map is in order");
        c.that(start != 0 || kind == 1 && len >= 32 << 20, "memory begins at 0");
        end = start + len;
    }
    let word = load::<8>(load64(at + 24));
    c.that(&word == b"pvh-test", "the command line");
    let rsdp = load64(at + 32);
    c.that(&load::<8>(rsdp) == b"RSD PTR ", "RSDP");
    c.same(sum(rsdp, 36), 0, "its checksum");
    let xsdt = load64(rsdp + 24);
    c.that(&load::<4>(xsdt) == b"XSDT", "XSDT");
    for table in [xsdt, load64(xsdt + 36), load64(xsdt + 44)] {
        c.same(sum(table, load32(table + 4).into()), 0, "a table's checksum");
    }
    let madt = load64(xsdt + 44);
    c.that(&load::<4>(madt) == b"APIC", "MADT");
    c.same(load32(madt + 40), 0, "no 8259");
    c.same(load64(madt + 52), 0x1_0201_0800, "the second processor");
}

fn has_rdtscp() -> bool {
    cpuid(0x8000_0001, 0)[3] & 1 << 27 != 0
}

fn sum(at: u64, len: u64) -> u8 {
    (0..len).fold(0, |sum, n| sum.wrapping_add(load::<1>(at + n)[0]))
}

/// §2.
fn processor(c: &mut Checks) {
    let [last, b, x, d] = cpuid(0x4000_0000, 0);
    c.that([b, x, d] == [0x566e_6558, 0x6558_4d4d, 0x4d4d_566e], "XenVMMXenVMM");
    c.that(last >= 0x4000_0004, "leaves of the hypervisor");
    c.same(cpuid(0x4000_0001, 0)[0], 4 << 16 | 17, "its version");
    c.same(cpuid(0x4000_0002, 0)[1], 0x4000_0000, "its MSR");
    c.same(cpuid(0x4000_0004, 0)[0], 0x18, "ids are given");
    c.same(cpuid(0x4000_0004, 0)[1], 0, "vCPU id");
    let [_, b, x, d] = cpuid(1, 0);
    c.same(b >> 24, 0, "APIC id");
    c.same(x & (1 << 31 | 1 << 21), 1 << 31 | 1 << 21, "hypervisor and x2APIC");
    c.same(x & (1 << 3 | 1 << 5 | 1 << 24 | 1 << 27), 0, "what is hidden");
    c.same(d & 1 << 9, 1 << 9, "APIC");
    c.same(cpuid(0x8000_0001, 0)[2] & 1 << 2, 0, "no SVM");
    c.same(cpuid(0x8000_000a, 0)[0], 0, "nothing of SVM");
    c.same(cpuid(0x4fff_ffff, 0)[0], 0, "a leaf that there is not");
}

/// §5.3, and registers that only this processor's guest may have.
fn registers(c: &mut Checks) {
    for (msr, value) in [(0xfe, 0x508), (0x2ff, 0x806), (0x277, 0x0007_0406_0007_0406)] {
        c.that(rdmsr(msr) == Some(value), "MTRR and PAT as after a reset");
    }
    c.that(wrmsr(0x200, 6) && rdmsr(0x200) == Some(6), "a MTRR is remembered");
    for msr in [0x3a, 0x48, 0x122, 0x480, 0xda0, 0xc001_0114, 0xc001_0117, 0x1234_5678] {
        c.that(rdmsr(msr).is_none(), "reading an unlisted MSR faults");
        c.that(!wrmsr(msr, 0), "writing one does");
    }
    c.that(!wrmsr(0x1d9, 1) && wrmsr(0x1d9, 0), "no branch tracing");
    c.that(!wrmsr(0x277, 2), "PAT has rules");
    c.that(!wrmsr(0xc000_0080, 1 << 12 | 0x500), "no SVM in EFER");
    c.that(rdmsr(0xc000_0080) == Some(0x500), "long mode is on, and nothing else");
    for msr in [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0102, 0x175, 0x176] {
        c.that(wrmsr(msr, 0x1234_5678) && rdmsr(msr) == Some(0x1234_5678), "switched MSRs");
    }
    let rdtscp = if has_rdtscp() { Some(0) } else { None };
    c.that(cpu::rdtscp() == rdtscp && rdmsr(TSC_AUX) == rdtscp.map(u64::from), "RDTSCP");
    c.that(wrmsr(TSC_AUX, 0x5555) == has_rdtscp() && !wrmsr(TSC_AUX, 1 << 32), "TSC_AUX");
    c.that(!cpu::xsetbv(1), "XSETBV without OSXSAVE");
    c.that(cpu::swap_breakpoints(0x1111) == [0; 4], "DR0 to DR3 begin empty");
    c.same(cpu::swap_sse(0x2222), 0, "so does SSE");
    if extended_state(c) {
        c.same(cpu::swap_avx(0x6666), 0, "so does AVX");
    }
    c.same(cpu::inb(0x42), 0, "a counter that stands");
    c.same(cpu::inb(0x3f8), 0xff, "no serial port");
}

/// XCR0 by the architecture's rules, and what CPUID says of it; whether AVX can be used now.
fn extended_state(c: &mut Checks) -> bool {
    let ecx = || cpuid(1, 0)[2];
    let [known, size, most, _] = cpuid(0xd, 0);
    if ecx() & 1 << 26 == 0 {
        c.that(ecx() & 7 << 27 == 0 && known == 0, "no XSAVE, and nothing of it");
        return false;
    }
    c.that(size == 576 && most >= size && known & 3 == 3, "x87 alone is on at first");
    cpu::allow_xsave();
    c.that(ecx() & 1 << 27 != 0, "OSXSAVE follows CR4");
    for wrong in [0, 2, 5, 6, 0x27, 1 << 9 | 3] {
        c.that(!cpu::xsetbv(wrong), "XCR0 has rules");
    }
    c.that(cpu::xsetbv(3) && cpu::xsetbv(known) && cpuid(0xd, 0)[1] == most, "all of it");
    known & 4 != 0
}

/// §3.
fn hypercalls(c: &mut Checks) {
    c.same(call(XEN_VERSION, [0; 3], &[]), 4 << 16 | 17, "version");
    c.same(call(99, [0; 3], &[]), -38, "an unknown hypercall");
    c.same(call(XEN_VERSION, [version::GET_FEATURES, 1 << 40, 0], &[]), -14, "a bad pointer");
    c.that(!wrmsr(0x4000_0000, cpu::HYPERCALL_PAGE | 1), "a second hypercall page");
    c.that(wrmsr(0x4000_0000, cpu::HYPERCALL_PAGE), "the hypercall page");
    c.same(cpu::call_by_page(XEN_VERSION, 0), 4 << 16 | 17, "version by the page");
    c.same(call(CONSOLE_IO, [0, 0, SCRATCH], &[]), 0, "writing nothing");
    let map = [SELF, 0, SHARED >> 12];
    c.same(call(MEMORY_OP, [ADD_TO_PHYSMAP, SCRATCH, 0], &map), 0, "the shared-info page");
    let param = |index: u32| [SELF | u64::from(index) << 32, 0];
    c.same(call(HVM_OP, [GET_PARAM, SCRATCH, 0], &param(params::STORE_PFN)), 0, "a parameter");
    c.same(load64(SCRATCH + 8), 0xfeffc, "where xenstore is");
    let callback = [SELF, params::CALLBACK_VECTOR << 56 | EVENT_VECTOR];
    c.same(call(HVM_OP, [SET_PARAM, SCRATCH, 0], &callback), 0, "how events come");
    c.same(call(HVM_OP, [9, SCRATCH, 0], &[0; 2]), -38, "no pagetable_dying");
}

/// Forgets all events, so that the next one interrupts.
fn clear_events() {
    cpu::store(SHARED, &[0, 0]);
    cpu::store(SHARED + EVTCHN_PENDING as u64, &[0]);
}

/// §9.
fn events(c: &mut Checks) {
    c.that(wrmsr(GS_BASE, SHARED), "GS is switched");
    let bind = [u64::from(VIRQ_TIMER), 0];
    c.same(call(EVENT_CHANNEL_OP, [BIND_VIRQ, SCRATCH, 0], &bind), 0, "the timer's port");
    let timer = u64::from(load32(SCRATCH + 8));
    c.same(call(VCPU_OP, [STOP_PERIODIC_TIMER, 0, 0], &[]), 0, "no periodic timer");
    for _ in 0..3 {
        clear_events();
        let (before, due) = (cpu::events(), now() + MS);
        c.same(call(VCPU_OP, [SET_SINGLESHOT_TIMER, 0, SCRATCH], &[due, 0]), 0, "the timer");
        while cpu::events() == before {
            cpu::wait();
        }
        c.that(now() >= due, "the timer does not come early");
        c.same(load64(SHARED + EVTCHN_PENDING as u64), 1 << timer, "its port is pending");
    }
}

/// System time by this vCPU's `vcpu_time_info` (§4.3).
fn now() -> u64 {
    let at = SHARED + VCPU_TIME as u64;
    let (begin, base) =
        (load64(at + time::TSC_TIMESTAMP as u64), load64(at + time::SYSTEM_TIME as u64));
    let (factor, shift) =
        (load32(at + time::MUL as u64), load::<1>(at + time::SHIFT as u64)[0] as i8);
    let ticks = cpu::tsc().wrapping_sub(begin);
    let ticks = if shift < 0 { ticks >> -shift } else { ticks << shift };
    base + u64::try_from((u128::from(ticks) * u128::from(factor)) >> 32).unwrap_or(u64::MAX)
}

fn clock(c: &mut Checks) {
    /// Ticks of ten minutes or more.
    const FAR: u64 = 1 << 42;
    let version = load32(SHARED + VCPU_TIME as u64);
    c.that(version > 0 && version.is_multiple_of(2), "the clock is whole");
    let mut last = now();
    for _ in 0..10_000 {
        let next = now();
        if next < last {
            return c.that(false, "time does not go back");
        }
        last = next;
    }
    let begin = load64(SHARED + (VCPU_TIME + time::TSC_TIMESTAMP) as u64);
    c.that(begin.cast_signed() < 0, "the counter began at 0, and the machine's before");
    c.that(cpu::tsc() < FAR, "which is not long ago");
    c.that(wrmsr(0x10, FAR), "the counter can be written");
    c.that(cpu::tsc() >= FAR, "and goes on from there");
    c.that((last..last + 1_000_000_000).contains(&now()), "time goes on as it was");
}

/// §3.4: memory goes back and comes again, empty.
fn memory(c: &mut Checks) {
    const GPA: u64 = 0x4_0000;
    cpu::store(GPA, &[0x5555]);
    let extents = [SCRATCH + 32, 1, 0, SELF, GPA >> 12];
    c.same(call(MEMORY_OP, [DECREASE_RESERVATION, SCRATCH, 0], &extents), 1, "a page goes back");
    c.same(load64(GPA), u64::MAX, "nothing is there");
    c.same(call(MEMORY_OP, [DECREASE_RESERVATION, SCRATCH, 0], &extents), 0, "only once");
    c.same(call(MEMORY_OP, [POPULATE_PHYSMAP, SCRATCH, 0], &extents), 1, "a page comes");
    c.same(load64(GPA), 0, "it is empty");
}

/// §5.1, and events between two vCPUs.
fn second_processor(c: &mut Checks) {
    c.that(wrmsr(APIC_BASE, X2APIC_ON | 1 << 8) && wrmsr(0x80f, 0x1ff), "x2APIC mode");
    c.that(rdmsr(0x802) == Some(0) && rdmsr(0x803) == Some(0x5_0014), "the APIC's id and version");
    let page = cpu::prepare_second();
    let command = |low: u64| wrmsr(0x830, 2 << 32 | low);
    c.that(command(0xc500) && command(0x8500) && command(0x600 | page), "INIT and start-up");
    let word = cpu::second_word();
    let until = |value: u64| {
        let end = now() + 1000 * MS;
        while word.load(Ordering::SeqCst) < value && now() < end {}
        word.load(Ordering::SeqCst) >= value
    };
    c.that(until(1), "the second processor runs");
    let before = cpu::interrupts();
    c.that(command(IPI_VECTOR), "an interrupt to it");
    c.that(until(2) && cpu::interrupts() == before + 1, "it comes");
    c.same(call(EVENT_CHANNEL_OP, [BIND_IPI, SCRATCH, 0], &[1]), 0, "a port to it");
    let (port, before) = (load32(SCRATCH + 4), cpu::events());
    c.same(call(EVENT_CHANNEL_OP, [SEND, SCRATCH, 0], &[port.into()]), 0, "an event to it");
    c.that(until(3) && cpu::events() == before + 1, "it comes");
    c.that(until(4), "its registers are its own");
    c.that(cpu::swap_breakpoints(0) == [0x1111; 4], "DR0 to DR3 are this processor's");
    c.same(cpu::swap_sse(0), 0x2222, "so is SSE");
    c.that(cpu::rdtscp() == has_rdtscp().then_some(0x5555), "so is TSC_AUX");
    if cpuid(0xd, 0)[0] & 4 != 0 {
        c.same(cpu::swap_avx(0), 0x6666, "so is AVX");
    }
}

/// The second processor: notes how far it is.
#[expect(unsafe_code, reason = "called by `entry.s`")]
#[unsafe(no_mangle)]
extern "C" fn second() -> ! {
    let word = cpu::second_word();
    let is_sound = wrmsr(GS_BASE, SHARED + VCPU_INFO_SIZE as u64)
        && wrmsr(APIC_BASE, X2APIC_ON)
        && wrmsr(0x80f, 0x1ff)
        && rdmsr(0x802) == Some(2)
        && cpuid(1, 0)[1] >> 24 == 2
        && cpuid(0x4000_0004, 0)[1] == 1
        && cpu::rdtscp().unwrap_or(0) == 0
        && cpu::swap_breakpoints(0x3333) == [0; 4]
        && cpu::swap_sse(0x4444) == 0
        && second_avx(0x7777) == 0;
    word.store(u64::from(is_sound), Ordering::SeqCst);
    cpu::wait();
    word.store(2, Ordering::SeqCst);
    cpu::wait();
    word.store(3, Ordering::SeqCst);
    let is_kept = cpu::swap_breakpoints(0) == [0x3333; 4]
        && cpu::swap_sse(0) == 0x4444
        && [0, 0x7777].contains(&second_avx(0));
    word.fetch_add(u64::from(is_kept), Ordering::SeqCst);
    cpu::stop()
}

/// The same for AVX, where there is any: XCR0 is each processor's own.
fn second_avx(new: u64) -> u64 {
    let [known, size, most, _] = cpuid(0xd, 0);
    if known & 4 == 0 {
        return 0;
    }
    cpu::allow_xsave();
    let is_fresh = new == 0 && size == most || new != 0 && size == 576;
    if is_fresh && cpu::xsetbv(known) { cpu::swap_avx(new) } else { u64::MAX }
}

/// Ticks of each way to the core and back.
fn costs() {
    measure("rdtsc", || _ = cpu::tsc());
    measure("cpuid", || _ = cpuid(0x4000_0001, 0));
    measure("rdmsr_apic_id", || _ = rdmsr(0x802));
    measure("wrmsr_task_priority", || _ = wrmsr(0x808, 0));
    measure("in", || _ = cpu::inb(0x42));
    measure("hypercall_version", || _ = call(XEN_VERSION, [0; 3], &[]));
    let far = [now() + 3_600_000 * MS, 0];
    measure("hypercall_timer", || _ = call(VCPU_OP, [SET_SINGLESHOT_TIMER, 0, SCRATCH], &far));
    call(EVENT_CHANNEL_OP, [BIND_IPI, SCRATCH, 0], &[0]);
    let port = u64::from(load32(SCRATCH + 4));
    measure("event_to_self", || {
        clear_events();
        call(EVENT_CHANNEL_OP, [SEND, SCRATCH, 0], &[port]);
        cpu::look();
    });
    measure("interrupt_to_self", || {
        wrmsr(0x83f, IPI_VECTOR);
        cpu::look();
    });
    measure("halt_and_timer", || {
        clear_events();
        let due = now() + 20_000;
        call(VCPU_OP, [SET_SINGLESHOT_TIMER, 0, SCRATCH], &[due, 0]);
        cpu::wait();
    });
}

fn measure(name: &str, mut work: impl FnMut()) {
    const ROUNDS: u64 = 200;
    work();
    let start = cpu::tsc();
    (0..ROUNDS).for_each(|_| work());
    let _ = writeln!(Console, "bench: {name} {} ticks", (cpu::tsc() - start) / ROUNDS);
}
