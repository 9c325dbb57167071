//! Instructions, and memory that Rust does not know: everything below 4 GiB is mapped one to one.

#![expect(unsafe_code, reason = "a kernel without anything below it")]
#![expect(
    clippy::cast_possible_truncation,
    reason = "addresses have 64 bits, and words are taken apart"
)]

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

global_asm!(include_str!("entry.s"));

/// Pages that nothing else uses: arguments of hypercalls, the shared-info page, a hypercall page,
/// and where the second processor begins.
pub const SCRATCH: u64 = 0x2_0000;
pub const SHARED: u64 = 0x1_0000;
pub const HYPERCALL_PAGE: u64 = 0x3_0000;
const TRAMPOLINE: u64 = 0x8000;
/// Where this program begins, and everything else has been given out.
const IMAGE: u64 = 0x10_0000;

unsafe extern "C" {
    static FAULTED: AtomicU64;
    static SKIP: AtomicU64;
    static EVENTS: AtomicU64;
    static INTERRUPTS: AtomicU64;
    static SECOND: AtomicU64;
    static IDT: [AtomicU64; 512];
    static trampoline: u8;
    static trampoline_end: u8;
    fn on_undefined();
    fn on_protection();
    fn on_event();
    fn on_interrupt();
    fn on_other();
}

/// Events so far, on both processors.
pub fn events() -> u64 {
    // SAFETY: defined in `entry.s`, and only accessed atomically.
    unsafe { &EVENTS }.load(Ordering::SeqCst)
}

/// Interrupts of the local APIC so far.
pub fn interrupts() -> u64 {
    // SAFETY: as above.
    unsafe { &INTERRUPTS }.load(Ordering::SeqCst)
}

/// What the second processor says to the first one.
pub fn second_word() -> &'static AtomicU64 {
    // SAFETY: as above.
    unsafe { &SECOND }
}

/// Reads memory below 4 GiB.
pub fn load<const N: usize>(gpa: u64) -> [u8; N] {
    assert!(gpa >= 0x1000 && gpa + N as u64 <= 1 << 32);
    let mut bytes = [0; N];
    for (at, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: mapped; reading changes nothing.
        *byte = unsafe { ((gpa as usize + at) as *const u8).read_volatile() };
    }
    bytes
}

/// Reads 8 bytes of memory.
pub fn load64(gpa: u64) -> u64 {
    u64::from_le_bytes(load(gpa))
}

/// Reads 4 bytes of memory.
pub fn load32(gpa: u64) -> u32 {
    u32::from_le_bytes(load(gpa))
}

/// Writes words to a page of ours.
pub fn store(gpa: u64, words: &[u64]) {
    assert!(gpa >= SHARED && gpa + 8 * words.len() as u64 <= IMAGE && gpa.is_multiple_of(8));
    for (at, word) in words.iter().enumerate() {
        // SAFETY: mapped, and not Rust's.
        unsafe { ((gpa as usize + 8 * at) as *mut u64).write_volatile(*word) };
    }
}

/// Sets what interrupts and exceptions do.
pub fn fill_idt() {
    // SAFETY: defined in `entry.s`, and only accessed atomically.
    let idt = unsafe { &IDT };
    for vector in 0..256 {
        let handler = match vector {
            6 => on_undefined as *const () as u64,
            13 => on_protection as *const () as u64,
            0xf3 => on_event as *const () as u64,
            0x40 => on_interrupt as *const () as u64,
            _ => on_other as *const () as u64,
        };
        // An interrupt gate of ring 0: AMD64 APM volume 2, section 4.8.4.
        let gate = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16) << 48;
        idt[2 * vector].store(gate, Ordering::SeqCst);
    }
}

/// Runs `work`, one instruction of which, `length` bytes long, may fault: whether none did.
fn survives<T>(length: u64, work: impl FnOnce() -> T) -> Option<T> {
    // SAFETY: as above.
    let (faulted, skip) = unsafe { (&FAULTED, &SKIP) };
    let before = faulted.load(Ordering::SeqCst);
    skip.store(length, Ordering::SeqCst);
    let result = work();
    skip.store(0, Ordering::SeqCst);
    (faulted.load(Ordering::SeqCst) == before).then_some(result)
}

/// Reads an MSR, unless that faults.
pub fn rdmsr(msr: u32) -> Option<u64> {
    survives(2, || {
        let (low, high): (u32, u32);
        // SAFETY: reading changes nothing, and a fault is passed over.
        unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack)) };
        u64::from(high) << 32 | u64::from(low)
    })
}

/// Writes an MSR: whether it took the value.
pub fn wrmsr(msr: u32, value: u64) -> bool {
    let (low, high) = (value as u32, (value >> 32) as u32);
    survives(2, || {
        // SAFETY: the tests write none that Rust depends on.
        unsafe { asm!("wrmsr", in("ecx") msr, in("eax") low, in("edx") high, options(nostack)) };
    })
    .is_some()
}

/// XSETBV: whether it takes the value.
pub fn xsetbv(value: u32) -> bool {
    survives(3, || {
        // SAFETY: nothing of ours is in extended registers; a fault is passed over.
        unsafe { asm!("xsetbv", in("ecx") 0, in("eax") value, in("edx") 0, options(nostack)) };
    })
    .is_some()
}

/// What RDTSCP says beside the time, unless it faults.
pub fn rdtscp() -> Option<u32> {
    survives(3, || {
        let aux;
        // SAFETY: reading changes nothing; a fault is passed over.
        unsafe {
            asm!("rdtscp", out("eax") _, lateout("ecx") aux, out("edx") _, options(nostack));
        };
        aux
    })
}

/// CPUID.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let found = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// The time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: reading changes nothing.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A hypercall whose second or third argument points to `words`, which are put there.
pub fn call(number: u64, args: [u64; 3], words: &[u64]) -> i64 {
    store(SCRATCH, words);
    let result: i64;
    // SAFETY: what the tests ask for changes only the pages above.
    unsafe {
        asm!(
            "vmmcall", inout("rax") number => result, in("rdi") args[0], in("rsi") args[1],
            in("rdx") args[2], in("r10") 0, in("r8") 0, options(nostack)
        );
    };
    result
}

/// The same by the hypercall page.
pub fn call_by_page(number: u64, arg: u64) -> i64 {
    let result: i64;
    // SAFETY: the core has filled the page; what is asked for changes nothing.
    unsafe {
        asm!(
            "call {0}", in(reg) HYPERCALL_PAGE + 32 * number, out("rax") result, in("rdi") arg,
            in("rsi") 0, clobber_abi("C")
        );
    };
    result
}

/// Reads and writes DR0 to DR3.
pub fn swap_breakpoints(new: u64) -> [u64; 4] {
    let (a, b, c, d);
    // SAFETY: no breakpoint is on.
    unsafe {
        asm!(
            "mov {0}, dr0", "mov {1}, dr1", "mov {2}, dr2", "mov {3}, dr3",
            "mov dr0, {4}", "mov dr1, {4}", "mov dr2, {4}", "mov dr3, {4}",
            out(reg) a, out(reg) b, out(reg) c, out(reg) d, in(reg) new, options(nostack)
        );
    };
    [a, b, c, d]
}

/// Reads and writes a register of SSE.
pub fn swap_sse(new: u64) -> u64 {
    let old;
    // SAFETY: this program is built without SSE.
    unsafe { asm!("movq {0}, xmm7", "movq xmm7, {1}", out(reg) old, in(reg) new) };
    old
}

/// Turns XSAVE on.
pub fn allow_xsave() {
    // SAFETY: exists by CPUID.
    unsafe { asm!("mov {0}, cr4", "or {0}, 0x40000", "mov cr4, {0}", out(reg) _) };
}

/// Reads and writes the upper half of a register of AVX.
pub fn swap_avx(new: u64) -> u64 {
    let old;
    // SAFETY: this program is built without AVX; it is on.
    unsafe {
        asm!(
            "vextracti128 xmm6, ymm5, 1", "movq {0}, xmm6", "movq xmm6, {1}",
            "vinserti128 ymm5, ymm5, xmm6, 1", out(reg) old, in(reg) new
        );
    };
    old
}

/// Reads a byte from an I/O port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: there are no devices.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nostack)) };
    value
}

/// Prints on the byte console.
pub fn print(text: &str) {
    // SAFETY: reads the text only.
    unsafe {
        asm!(
            "rep outsb", in("dx") 0xe9_u16, inout("rsi") text.as_ptr() => _,
            inout("rcx") text.len() => _, options(nostack, readonly)
        );
    };
}

/// Waits for an interrupt; takes one that is pending.
pub fn wait() {
    // SAFETY: the handlers keep all registers.
    unsafe { asm!("sti", "hlt", "cli") };
}

/// Takes interrupts that are pending.
pub fn look() {
    // SAFETY: as above.
    unsafe { asm!("sti", "nop", "cli") };
}

/// Stops this processor.
pub fn stop() -> ! {
    loop {
        // SAFETY: nothing comes behind it.
        unsafe { asm!("cli", "hlt") };
    }
}

/// Puts the first instructions of the second processor at its page, and returns that.
pub fn prepare_second() -> u64 {
    let (from, to) = (&raw const trampoline, &raw const trampoline_end);
    for at in 0..to as usize - from as usize {
        let dest = (TRAMPOLINE as usize + at) as *mut u8;
        // SAFETY: in the program's text.
        let byte = unsafe { from.wrapping_add(at).read() };
        // SAFETY: in a page that nothing else uses.
        unsafe { dest.write_volatile(byte) };
    }
    TRAMPOLINE >> 12
}
