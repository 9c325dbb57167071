//! The end of the core: say why, stop everything.

#![expect(unsafe_code, reason = "a backtrace follows raw frame pointers")]

use crate::{apic, paging, serial};
use core::arch::asm;
use core::fmt::Write as _;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use x86_64::instructions::{hlt, interrupts};
use x86_64::registers::control::{Cr2, Cr3};

/// Tells the NMI handler that all is over.
#[unsafe(no_mangle)]
static STOPPING: AtomicBool = AtomicBool::new(false);
/// NMIs that nobody here sent.
#[unsafe(no_mangle)]
static STRAY_NMIS: AtomicU32 = AtomicU32::new(0);

const MAX_DEPTH: usize = 32;

/// Registers of an exception in ring 0, as `entry.s` pushes them.
#[derive(Debug)]
#[repr(C)]
pub struct CoreFrame {
    rax: u64,
    rbx: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
    rbp: u64,
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Stops the other processors; a second panic, here or there, just stops.
fn stop_others() {
    interrupts::disable();
    if STOPPING.swap(true, Ordering::SeqCst) {
        stop();
    }
    apic::nmi_to_others();
}

fn stop() -> ! {
    loop {
        interrupts::disable();
        hlt();
    }
}

/// Follows the chain of frame pointers as long as it stays in one stack and climbs.
fn backtrace(first: u64) {
    let Some(stack) = paging::stack_around(first) else { return };
    let mut frame = first;
    for _ in 0..MAX_DEPTH {
        if !frame.is_multiple_of(8) || !stack.contains(&frame) || stack.end - frame < 16 {
            return;
        }
        // SAFETY: an aligned word of a mapped stack.
        let next = unsafe { (frame as *const u64).read() };
        // SAFETY: the word behind it.
        let address = unsafe { ((frame + 8) as *const u64).read() };
        if !paging::is_text(address) {
            return;
        }
        let _ = writeln!(serial::Emergency, "core|   {address:#018x}");
        if next <= frame {
            return;
        }
        frame = next;
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    stop_others();
    let rbp: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rbp", out(reg) rbp, options(nomem, nostack, preserves_flags)) };
    let mut out = serial::Emergency;
    let _ = writeln!(out, "\ncore| PANIC on apic {}: {}", apic::id(), info.message());
    if let Some(place) = info.location() {
        let _ = writeln!(out, "core| at {place}");
    }
    let _ = writeln!(out, "core| cr2 {:#x} cr3 {:#x} rbp {rbp:#x}", Cr2::read_raw(), cr3());
    backtrace(rbp);
    stop()
}

fn cr3() -> u64 {
    Cr3::read().0.start_address().as_u64()
}

/// An exception in ring 0: a broken invariant of ours.
#[unsafe(no_mangle)]
extern "C" fn core_exception(frame: &CoreFrame) -> ! {
    stop_others();
    let f = frame;
    let mut out = serial::Emergency;
    let _ = writeln!(
        out,
        "\ncore| PANIC: exception {} in the core, error {:#x}, cr2 {:#x}, cr3 {:#x}",
        f.vector,
        f.error,
        Cr2::read_raw(),
        cr3(),
    );
    for [(a, x), (b, y), (c, z)] in [
        [("rip", f.rip), ("rsp", f.rsp), ("rflags", f.rflags)],
        [("rax", f.rax), ("rbx", f.rbx), ("rcx", f.rcx)],
        [("rdx", f.rdx), ("rsi", f.rsi), ("rdi", f.rdi)],
        [("rbp", f.rbp), ("r8", f.r8), ("r9", f.r9)],
        [("r10", f.r10), ("r11", f.r11), ("r12", f.r12)],
        [("r13", f.r13), ("r14", f.r14), ("r15", f.r15)],
        [("cs", f.cs), ("ss", f.ss), ("nmis", STRAY_NMIS.load(Ordering::Relaxed).into())],
    ] {
        let _ = writeln!(out, "core| {a:>6} {x:016x} {b:>6} {y:016x} {c:>6} {z:016x}");
    }
    let _ = writeln!(out, "core|   {:#018x}", f.rip);
    backtrace(f.rbp);
    stop()
}
