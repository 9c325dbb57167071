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
                asm!(
                    $($line,)+
                    out("rax") _, out("rcx") _, out("rdx") _, out("rdi") _, out("rsi") _,
                    out("r11") _,
                );
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

/// Writes a word of our own memory that Rust has no name for.
pub fn write_word(address: u64, value: u64) {
    // SAFETY: the callers name the grant table, where the runtime has put it for writing.
    unsafe { (address as *mut u64).write_volatile(value) };
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
    instructions!("in from the PCI data port", "mov dx, 0xcfc", "in eax, dx"),
    instructions!("out to the POST port", "out 0x80, al"),
    instructions!("out to the power management port", "mov dx, 0x604", "out dx, ax"),
    instructions!("rep outsb", "mov dx, 0x3f8", "mov rsi, rsp", "mov ecx, 1", "rep outsb"),
    instructions!("rdmsr", "mov ecx, 0xc0000080", "rdmsr"),
    instructions!("wrmsr of EFER", "mov ecx, 0xc0000080", "xor eax, eax", "xor edx, edx", "wrmsr"),
    instructions!("wrmsr of LSTAR", "mov ecx, 0xc0000082", "wrmsr"),
    instructions!("mov to cr0", "xor eax, eax", "mov cr0, rax"),
    instructions!("mov from cr3", "mov rax, cr3"),
    instructions!("mov from cr2", "mov rax, cr2"),
    instructions!("mov from cr4", "mov rax, cr4"),
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
    instructions!("invd", "invd"),
    instructions!("invpcid", "xor eax, eax", "invpcid rax, [rsp]"),
    instructions!("rdpmc", "xor ecx, ecx", "rdpmc"),
    instructions!("rdfsbase", "rdfsbase rax"),
    instructions!("wrgsbase", "mov rax, rsp", "wrgsbase rax"),
    instructions!("monitor", "mov rax, rsp", "xor ecx, ecx", "xor edx, edx", "monitor"),
    instructions!("mwait", "xor eax, eax", "xor ecx, ecx", "mwait"),
    instructions!("rsm", "rsm"),
    instructions!("stac", "stac"),
    instructions!("wrpkru", "xor eax, eax", "xor ecx, ecx", "xor edx, edx", "wrpkru"),
    instructions!("vmxon", "vmxon [rsp]"),
    instructions!("vmlaunch", "vmlaunch"),
    instructions!("stgi", "stgi"),
    instructions!("clgi", "clgi"),
    instructions!("xgetbv", "xor ecx, ecx", "xgetbv"),
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

/// What ends the domain or does not, depending on the processor. The core must stand it.
const ODD: &[Attack] = &[
    instructions!("sgdt", "sub rsp, 16", "sgdt [rsp]", "add rsp, 16"),
    instructions!("sidt", "sub rsp, 16", "sidt [rsp]", "add rsp, 16"),
    instructions!("sldt", "sldt eax"),
    instructions!("str", "str eax"),
    instructions!("smsw", "smsw rax"),
    instructions!("rdtscp", "rdtscp"),
    // XEN_VERSION, VERSION.
    instructions!(
        "single step into a hypercall",
        "mov eax, 17",
        "xor edi, edi",
        "pushfq",
        "or qword ptr [rsp], 0x100",
        "popfq",
        "syscall",
        "nop",
    ),
    // CVE-2018-8897: a trap that the next instruction brings with it into the core.
    instructions!(
        "single step over a stack segment into a hypercall",
        "mov eax, 17",
        "xor edi, edi",
        "mov ecx, ss",
        "pushfq",
        "or qword ptr [rsp], 0x100",
        "popfq",
        "mov ss, ecx",
        "syscall",
        "nop",
    ),
    instructions!(
        "single step over a stack segment into an interrupt",
        "mov ecx, ss",
        "pushfq",
        "or qword ptr [rsp], 0x100",
        "popfq",
        "mov ss, ecx",
        "int3",
    ),
    instructions!("interrupts off by popf", "pushfq", "and qword ptr [rsp], -0x201", "popfq"),
    instructions!("I/O privilege by popf", "pushfq", "or qword ptr [rsp], 0x3000", "popfq", "cli"),
];

/// Goes on with the first one that is left. Comes back when none is.
pub fn run(state: &mut State) {
    while let Some((name, attack)) = DEADLY.get(state.steps() as usize) {
        println!("selftest: attack {}: {name}", state.steps());
        state.die(*attack);
        println!("selftest: FAILED: survived: {name}");
        state.fail();
    }
    while let Some((name, attack)) = ODD.get(state.steps() as usize - DEADLY.len()) {
        println!("selftest: attack {}: {name}", state.steps());
        state.may_die(*attack);
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

/// A hypercall with our data segment in all segment registers.
fn load_segments() {
    // SAFETY: the segment is flat, as the one that it replaces is treated; without pointers.
    unsafe {
        asm!(
            "mov ds, {0:x}",
            "mov es, {0:x}",
            "mov fs, {0:x}",
            "mov gs, {0:x}",
            "syscall",
            in(reg) 0x1b_u64,
            inout("rax") XEN_VERSION => _,
            inout("rdi") version::VERSION => _,
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
    each("hypercall with segments of its own", load_segments);
    each("computing with a stack that is not canonical", || spin_without_stack(1 << 47));
    each("computing with a stack in the core", || spin_without_stack(0xffff_ffff_8000_1000));
}
