//! Instructions and accesses from ring 3 that must end the domain, and some that must not even
//! do that.
#![expect(unsafe_code, reason = "this module does what nobody may")]

use crate::state::State;
use alloc::boxed::Box;
use alloc::vec::Vec;
use axolotl_abi::start::{IMAGE_GPA, STACK_PAGES, STACK_TOP_GPA, START_INFO_GPA};
use core::arch::asm;
use core::hint::black_box;
use unikernel::println;
use xen_abi::hypercall::{XEN_VERSION, version};

type Attack = (&'static str, fn());

/// One or more instructions, as an attack.
macro_rules! instructions {
    ($name:literal, $($line:literal),+ $(,)?) => {{
        fn attack() {
            // SAFETY: none. The processor or the core ends the domain here; should it come back,
            // the test has failed and says so.
            unsafe {
                asm!($($line,)+ out("rax") _, out("rcx") _, out("rdx") _, out("rdi") _, out("rsi") _);
            }
        }
        ($name, attack as fn())
    }};
}

fn read(address: u64) {
    // SAFETY: none, see above.
    black_box(unsafe { (address as *const u64).read_volatile() });
}

fn write(address: u64) {
    // SAFETY: none, see above.
    unsafe { (address as *mut u64).write_volatile(0) };
}

fn jump(address: u64) {
    // SAFETY: none, see above.
    unsafe { asm!("call {}", in(reg) address, clobber_abi("C")) };
}

/// Words of our own memory, read whatever it is.
pub fn read_words(address: u64, count: usize) -> Vec<u64> {
    let words = address as *const u64;
    (0..count)
        .map(|n| words.wrapping_add(n))
        // SAFETY: the callers name text of this image, which is mapped for reading.
        .map(|word| unsafe { word.read_volatile() })
        .collect()
}

#[expect(unconditional_recursion, reason = "until the stack ends")]
fn recurse() {
    let frame = black_box([0_u8; 512]);
    recurse();
    black_box(frame);
}

fn divide() {
    // SAFETY: none, see above.
    unsafe {
        asm!("xor edx, edx", "mov eax, 1", "xor ecx, ecx", "div ecx",
            out("rax") _, out("rcx") _, out("rdx") _);
    }
}

fn execute_heap() {
    let code = Box::new([0xc3_u8; 16]);
    jump(Box::into_raw(code) as u64);
}

fn execute_stack() {
    let code = black_box([0xc3_u8; 16]);
    jump(&raw const code as u64);
}

/// Everything that must end the domain.
const DEADLY: &[Attack] = &[
    instructions!("cli", "cli"),
    instructions!("sti", "sti"),
    instructions!("hlt", "hlt"),
    instructions!("in from the PIC", "in al, 0x20"),
    instructions!("in from COM1", "mov dx, 0x3f8", "in al, dx"),
    instructions!("in from COM2", "mov dx, 0x2f8", "in al, dx"),
    instructions!("out to the PCI address port", "mov dx, 0xcf8", "out dx, eax"),
    instructions!("out to the reset port", "mov al, 0xfe", "out 0x64, al"),
    instructions!("rep insb", "mov dx, 0x3f8", "mov rdi, rsp", "mov ecx, 1", "rep insb"),
    instructions!("rdmsr", "mov ecx, 0xc0000080", "rdmsr"),
    instructions!("wrmsr of EFER", "mov ecx, 0xc0000080", "xor eax, eax", "xor edx, edx", "wrmsr"),
    instructions!("wrmsr of LSTAR", "mov ecx, 0xc0000082", "wrmsr"),
    instructions!("mov to cr0", "xor eax, eax", "mov cr0, rax"),
    instructions!("mov from cr3", "mov rax, cr3"),
    instructions!("mov to cr3", "xor eax, eax", "mov cr3, rax"),
    instructions!("mov to cr4", "xor eax, eax", "mov cr4, rax"),
    instructions!("mov to cr8", "xor eax, eax", "mov cr8, rax"),
    instructions!("mov to dr7", "xor eax, eax", "mov dr7, rax"),
    instructions!("mov from dr6", "mov rax, dr6"),
    instructions!("lgdt", "lgdt [rsp]"),
    instructions!("lidt", "lidt [rsp]"),
    instructions!("lldt", "xor eax, eax", "lldt ax"),
    instructions!("ltr", "mov eax, 8", "ltr ax"),
    instructions!("clts", "clts"),
    instructions!("lmsw", "xor eax, eax", "lmsw ax"),
    instructions!("invlpg", "invlpg [rsp]"),
    instructions!("wbinvd", "wbinvd"),
    instructions!("swapgs", "swapgs"),
    instructions!("sysret", "xor ecx, ecx", "sysretq"),
    instructions!(
        "iret to ring 0",
        "xor eax, eax",
        "push rax",
        "push rsp",
        "pushfq",
        "push 8",
        "push rax",
        "iretq"
    ),
    instructions!("sysenter", "sysenter"),
    instructions!("vmcall", "vmcall"),
    instructions!("vmmcall", "vmmcall"),
    instructions!("vmrun", "vmrun"),
    instructions!("xsetbv", "xor ecx, ecx", "xor eax, eax", "xor edx, edx", "xsetbv"),
    instructions!("int 2", "int 2"),
    instructions!("int 8", "int 8"),
    instructions!("int 14", "int 14"),
    instructions!("int 0x20", "int 0x20"),
    instructions!("int 0x30", "int 0x30"),
    instructions!("int 0x80", "int 0x80"),
    instructions!("int 0xff", "int 0xff"),
    instructions!("int3", "int3"),
    instructions!("ud2", "ud2"),
    instructions!("single step", "pushfq", "or qword ptr [rsp], 0x100", "popfq", "nop", "nop"),
    instructions!("data segment of ring 0", "mov eax, 0x10", "mov ds, eax"),
    instructions!("far return to ring 0", "push 8", "push rax", "retfq"),
    instructions!(
        "push to a stack that is not canonical",
        "mov rax, 0x800000000000",
        "mov rsp, rax",
        "push rax"
    ),
    instructions!("jump to an address that is not canonical", "mov rax, 0x800000000000", "jmp rax"),
    instructions!("SSE", "xorps xmm0, xmm0", "movaps xmm0, xmm0"),
    instructions!("x87", "fld1", "fwait"),
    ("division by zero", divide),
    ("read of null", || read(0)),
    ("write to null", || write(0)),
    ("jump to null", || jump(0)),
    ("read of the core", || read(0xffff_ffff_8000_0000)),
    ("read of the upper half", || read(0xffff_8000_0000_0000)),
    ("write to the upper half", || write(0xffff_8000_0000_0000)),
    ("jump to the upper half", || jump(0xffff_ffff_8010_0000)),
    ("read of an address that is not canonical", || read(0x8000_0000_0000)),
    ("write to text", || write(IMAGE_GPA)),
    ("write to rodata", || write(black_box("read-only data").as_ptr() as u64 & !7)),
    ("write to the start info", || write(START_INFO_GPA)),
    ("jump to the start info", || jump(START_INFO_GPA)),
    ("jump to the heap", execute_heap),
    ("jump to the stack", execute_stack),
    ("stack overflow", recurse),
    ("read below the stack", || read(STACK_TOP_GPA - STACK_PAGES * 4096 - 8)),
    ("read above the stack", || read(STACK_TOP_GPA)),
    ("read of the video memory", || read(0xb_8000)),
    ("read of the local APIC", || read(0xfee0_0030)),
    ("write to the local APIC", || write(0xfee0_0300)),
    ("read of the IOAPIC", || read(0xfec0_0000)),
    ("read of configuration space at 0xb0000000", || read(0xb000_0000)),
    ("read of configuration space at 0xe0000000", || read(0xe000_0000)),
    ("write to a device's registers", || write(0xfebc_0000)),
    ("read of the device window", || read(axolotl_abi::start::MMIO_GPA)),
    ("read of the bundle", || read(axolotl_abi::start::BUNDLE_GPA)),
    ("read of an empty grant window", || read(axolotl_abi::start::GRANT_WINDOW_GPA)),
];

/// Goes on with the first one that is left. Comes back when none is.
pub fn run(state: &mut State) {
    while let Some((name, attack)) = DEADLY.get(state.steps() as usize) {
        println!("selftest: attack {}: {name}", state.steps());
        state.die(*attack);
        println!("selftest: FAILED: survived: {name}");
        state.fail();
    }
}

/// A hypercall with `rsp` set to `stack` and `flags` set in rflags.
fn call_with(stack: Option<u64>, flags: u64) {
    // SAFETY: rflags and rsp are as before at the end; the hypercall takes no pointers. The core
    // must use neither our stack nor our flags.
    unsafe {
        asm!(
            "mov {kept}, rsp",
            "pushfq",
            "or [rsp], {flags}",
            "popfq",
            "test {stack}, {stack}",
            "cmovnz rsp, {stack}",
            "syscall",
            "mov rsp, {kept}",
            "push 0x202",
            "popfq",
            kept = out(reg) _,
            flags = in(reg) flags,
            stack = in(reg) stack.unwrap_or(0),
            inout("rax") XEN_VERSION => _,
            inout("rdi") version::VERSION => _,
            in("rsi") 0,
            out("rcx") _,
            out("r11") _,
        );
    }
}

/// Computes for some timer ticks with a stack that cannot be written: interrupts must not need it.
fn spin_without_stack(stack: u64) {
    // SAFETY: rsp is as before at the end, and unused in between.
    unsafe {
        asm!(
            "mov {kept}, rsp",
            "mov rsp, {stack}",
            "2: dec {count}",
            "jnz 2b",
            "mov rsp, {kept}",
            kept = out(reg) _,
            stack = in(reg) stack,
            count = inout(reg) 40_000_000_u64 => _,
        );
    }
}

/// Odd processor state that a correct core takes no notice of.
pub fn survivable(mut each: impl FnMut(&'static str, fn())) {
    each("hypercall with a stack that is not canonical", || call_with(Some(1 << 47), 0));
    each("hypercall with a stack in the core", || call_with(Some(0xffff_ffff_8000_1000), 0));
    each("hypercall with a stack at -1", || call_with(Some(u64::MAX), 0));
    each("hypercall with direction flag", || call_with(None, 0x400));
    each("hypercall with alignment check flag", || call_with(None, 0x4_0000));
    each("hypercall with nested task flag", || call_with(None, 0x4000));
    each("hypercall with I/O privilege flags", || call_with(None, 0x3000));
    each("computing with a stack that is not canonical", || spin_without_stack(1 << 47));
    each("computing with a stack in the core", || spin_without_stack(0xffff_ffff_8000_1000));
}
