//! Running ring 3, and where its registers are meanwhile.

#![expect(unsafe_code, reason = "entry to and from ring 3 is assembly")]

use crate::cpu::{PerCpu, Tss, USER_CODE, USER_DATA};
use crate::paging;
use crate::svm::Guest;
use core::arch::{asm, global_asm};
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, Ordering};
use hv_core::frame::Mfn;
use hv_core::platform::Registers;

/// What `enter_ring3` returns for a hypercall: no vector.
pub const HYPERCALL: u64 = 256;

global_asm!(
    include_str!("entry.s"),
    rsp0 = const offset_of!(PerCpu, tss) + offset_of!(Tss, rsp0),
    registers = const offset_of!(PerCpu, registers),
    scratch = const offset_of!(PerCpu, scratch),
    waited = const offset_of!(PerCpu, waited),
    user_data = const USER_DATA,
    user_code = const USER_CODE,
    hypercall = const HYPERCALL,
    rax = const offset_of!(Registers, rax),
    rbx = const offset_of!(Registers, rbx),
    rcx = const offset_of!(Registers, rcx),
    rdx = const offset_of!(Registers, rdx),
    rsi = const offset_of!(Registers, rsi),
    rdi = const offset_of!(Registers, rdi),
    rbp = const offset_of!(Registers, rbp),
    rsp = const offset_of!(Registers, rsp),
    r8 = const offset_of!(Registers, r8),
    r9 = const offset_of!(Registers, r9),
    r10 = const offset_of!(Registers, r10),
    r11 = const offset_of!(Registers, r11),
    r12 = const offset_of!(Registers, r12),
    r13 = const offset_of!(Registers, r13),
    r14 = const offset_of!(Registers, r14),
    r15 = const offset_of!(Registers, r15),
    rip = const offset_of!(Registers, rip),
    rflags = const offset_of!(Registers, rflags),
);

/// Why ring 3 was left: a vector and its error code, or [`HYPERCALL`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Left {
    pub vector: u64,
    pub error: u64,
}

unsafe extern "C" {
    fn enter_ring3(registers: *mut Registers, by_sysret: u64) -> Left;
    fn wait_for_interrupt();
    fn call_on_stack(top: u64, function: extern "C" fn(u64) -> !, argument: u64) -> !;
    static trap_stubs: u8;
    static nmi_entry: u8;
    static syscall_entry: u8;
}

/// Address of a vector's handler.
pub fn trap_stub(vector: u64) -> u64 {
    (&raw const trap_stubs) as u64 + vector * 16
}

/// Address of the NMI handler.
pub fn nmi_handler() -> u64 {
    (&raw const nmi_entry) as u64
}

/// Address of the system call handler.
pub fn syscall_handler() -> u64 {
    (&raw const syscall_entry) as u64
}

/// Goes on at `function` on an empty stack.
///
/// # Safety
/// `top` is the end of a mapped stack that nobody uses.
pub unsafe fn switch_stack(top: u64, function: extern "C" fn(u64) -> !, argument: u64) -> ! {
    // SAFETY: the caller's duty; the old stack is never returned to.
    unsafe { call_on_stack(top, function, argument) }
}

/// Sleeps with interrupts on until one arrives; off again.
pub fn sleep() -> u64 {
    // SAFETY: this processor's tables are loaded; the handler only notes the vector.
    unsafe { wait_for_interrupt() };
    waited()
}

/// Vector of the interrupt that was taken last in ring 0, 0 if there was none.
pub fn waited() -> u64 {
    let vector: u64;
    // SAFETY: GS is this processor's `PerCpu`.
    unsafe {
        asm!(
            "mov {}, gs:[{}]", out(reg) vector, const offset_of!(PerCpu, waited),
            options(nostack, readonly, preserves_flags)
        );
    }
    vector
}

struct State {
    registers: Registers,
    /// A number that no other vCPU has had.
    serial: u64,
    /// It left by SYSCALL, which destroys rcx and r11; so may the way back.
    left_by_syscall: bool,
    /// What a hardware-virtualized one has beside.
    guest: Option<Guest>,
}
const _: () = assert!(size_of::<State>() <= 4096);

/// A vCPU. Its state is in a frame of its own.
pub struct Vcpu(&'static mut State);

static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);

/// What ring 3 may set: CF PF AF ZF SF DF OF.
const FREE_FLAGS: u64 = 0xcd5;
/// Always one: bit 1, and IF.
const FIXED_FLAGS: u64 = 0x202;

impl Vcpu {
    /// Makes a vCPU in a frame.
    ///
    /// # Safety
    /// The frame is mapped and serves nothing else while the value lives.
    pub unsafe fn new(frame: Mfn, guest: Option<Guest>) -> Self {
        let state = paging::direct::<State>(frame.address());
        let serial = NEXT_SERIAL.fetch_add(1, Ordering::Relaxed);
        let registers = Registers::default();
        let fresh = State { registers, serial, left_by_syscall: false, guest };
        // SAFETY: mapped, aligned, and nobody else's.
        unsafe { state.write(fresh) };
        // SAFETY: just initialized; ours alone while the value lives.
        Self(unsafe { &mut *state })
    }

    /// Its registers.
    pub fn registers(&self) -> &Registers {
        &self.0.registers
    }

    /// Its registers.
    pub fn registers_mut(&mut self) -> &mut Registers {
        &mut self.0.registers
    }

    /// Registers and the rest of a hardware-virtualized one.
    ///
    /// # Panics
    /// It is none.
    pub fn guest_mut(&mut self) -> (&mut Registers, &mut Guest) {
        let State { registers, guest, .. } = &mut *self.0;
        (registers, guest.as_mut().expect("hv-core knows which vCPUs are guests'"))
    }

    /// As [`Self::guest_mut`].
    ///
    /// # Panics
    /// It is none.
    pub fn guest(&self) -> &Guest {
        self.0.guest.as_ref().expect("hv-core knows which vCPUs are guests'")
    }

    /// A number that no other vCPU has had.
    pub fn serial(&self) -> u64 {
        self.0.serial
    }

    /// Runs it in the address space that is loaded. `rip` must be in the lower half: an IRET or
    /// SYSRET elsewhere may fault in ring 0.
    #[inline]
    pub fn enter(&mut self) -> Left {
        let registers = &mut self.0.registers;
        assert!(registers.rip < 1 << 47, "rip is in the lower half");
        registers.rflags = registers.rflags & FREE_FLAGS | FIXED_FLAGS;
        // SAFETY: the loaded tables map nothing of the core for ring 3, rip is canonical, flags
        // keep interrupts on; the registers are ours to write to.
        let left = unsafe { enter_ring3(registers, self.0.left_by_syscall.into()) };
        self.0.left_by_syscall = left.vector == HYPERCALL;
        left
    }
}

/// Empties the segment registers that another domain may have filled. Their bases are 0 already:
/// all descriptors for ring 3 have base 0, and it cannot write them.
pub fn clear_segments() {
    // SAFETY: null selectors are never used in ring 0; GS is swapped so that ours survives.
    unsafe {
        asm!(
            "mov ds, {0:x}", "mov es, {0:x}", "mov fs, {0:x}",
            "swapgs", "mov gs, {0:x}", "swapgs",
            in(reg) 0_u64, options(nostack, nomem, preserves_flags)
        );
    }
}
