//! Hardware-virtualized vCPUs by AMD's SVM.
//!
//! | what a guest reaches | how it is switched, or refused |
//! |---|---|
//! | registers that instructions can name | `Registers`, moved by `svm.s`; rax, rsp, rip, rflags in the VMCB |
//! | CR0, CR2, CR3, CR4, EFER, PAT, DR6, DR7, descriptor tables, CS to SS | in the VMCB, by VMRUN; EFER and PAT through the core, which checks them |
//! | FS, GS, TR, LDTR; STAR, LSTAR, CSTAR, SFMASK, kernel GS base, SYSENTER's | in the VMCB, by VMLOAD and VMSAVE |
//! | CR8 | virtual, in the VMCB |
//! | x87, SSE, DR0 to DR3 | loaded when another vCPU ran here before, saved when it leaves |
//! | TSC_AUX (where there is RDTSCP) | through the core; loaded when it differs, 0 for ring 3 |
//! | TSC | 0 at the start of each life, by an offset that `vcpu_time_info` speaks of; writes change that of one vCPU. No scaling: a domain does not leave the machine |
//! | AVX, AVX-512 (where there is XSAVE) | as x87 and SSE, all that [`extended_state`] names, whatever the guest has in XCR0 |
//! | XCR0 | through the core, by the architecture's rules; loaded when it differs, 1 for ring 3 |
//! | protection keys | not offered; the register is emptied when another guest's vCPU ran here before |
//! | DEBUGCTL, branch records | read as 0, take 0 |
//! | SPEC_CTRL, PRED_CMD, XSS, CET, performance counters, VM_CR and all others | stop, and fault if `hv-core` does not know them |
//! | memory | the domain's own page table as nested page table |
//!
//! A TLB entry belongs to an address space identifier. A vCPU gets a new one when it comes from
//! another processor, when its domain's address space was narrowed (ADR 4), and when all were used
//! up and flushed; within one it never meets what it must not see.
//!
//! Source: AMD64 APM volume 2, chapter 15 and appendix B. Nothing is assumed that CPUID does not
//! show: without NRIP save, `hv-core` finds the length of an instruction itself.

#![expect(unsafe_code, reason = "VMRUN, control blocks by raw address")]

use crate::cpu::PerCpu;
use crate::paging::{BootMemory, direct};
use core::arch::{asm, global_asm};
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, Ordering};
use hv_core::frame::Mfn;
use hv_core::platform::{
    Event, GuestExit, GuestMsr, Mode, NoGuests, PortAccess, Readiness, Registers, Space, Start,
};
use raw_cpuid::Hypervisor;
use spin::Once;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};
use x86_64::registers::model_specific::Msr;

global_asm!(
    include_str!("svm.s"),
    waited = const offset_of!(PerCpu, waited),
    rbx = const offset_of!(Registers, rbx),
    rcx = const offset_of!(Registers, rcx),
    rdx = const offset_of!(Registers, rdx),
    rsi = const offset_of!(Registers, rsi),
    rdi = const offset_of!(Registers, rdi),
    rbp = const offset_of!(Registers, rbp),
    r8 = const offset_of!(Registers, r8),
    r9 = const offset_of!(Registers, r9),
    r10 = const offset_of!(Registers, r10),
    r11 = const offset_of!(Registers, r11),
    r12 = const offset_of!(Registers, r12),
    r13 = const offset_of!(Registers, r13),
    r14 = const offset_of!(Registers, r14),
    r15 = const offset_of!(Registers, r15),
);

unsafe extern "C" {
    fn enter_guest(registers: *mut Registers, vmcb: u64, host: u64);
    fn take_interrupt();
}

const EFER: u32 = 0xc000_0080;
const VM_CR: u32 = 0xc001_0114;
const VM_HSAVE: u32 = 0xc001_0117;
const TSC_AUX: u32 = 0xc000_0103;
const EFER_SVME: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const VM_CR_DISABLED: u64 = 1 << 4;

/// Places in the control block, all of 64 bits unless said otherwise.
mod at {
    /// 32 bits, by vector.
    pub const INTERCEPT_EXCEPTIONS: usize = 0x008;
    /// 32 bits.
    pub const INTERCEPT_1: usize = 0x00c;
    /// 32 bits.
    pub const INTERCEPT_2: usize = 0x010;
    /// 32 bits.
    pub const INTERCEPT_3: usize = 0x014;
    pub const IO_MAP: usize = 0x040;
    pub const MSR_MAP: usize = 0x048;
    pub const TSC_OFFSET: usize = 0x050;
    /// ASID, and from bit 32 what to flush.
    pub const ASID: usize = 0x058;
    pub const INTERRUPTS: usize = 0x060;
    pub const SHADOW: usize = 0x068;
    pub const EXIT_CODE: usize = 0x070;
    pub const EXIT_INFO_1: usize = 0x078;
    pub const EXIT_INFO_2: usize = 0x080;
    pub const EXIT_EVENT: usize = 0x088;
    pub const NESTED: usize = 0x090;
    pub const EVENT: usize = 0x0a8;
    pub const NESTED_ROOT: usize = 0x0b0;
    pub const CLEAN: usize = 0x0c0;
    pub const NEXT_RIP: usize = 0x0c8;

    pub const ES: usize = 0x400;
    pub const CS: usize = 0x410;
    pub const SS: usize = 0x420;
    pub const DS: usize = 0x430;
    pub const FS: usize = 0x440;
    pub const GS: usize = 0x450;
    pub const GDTR: usize = 0x460;
    pub const LDTR: usize = 0x470;
    pub const IDTR: usize = 0x480;
    pub const TR: usize = 0x490;
    /// Privilege level in bits 24..32.
    pub const CPL: usize = 0x4c8;
    pub const EFER: usize = 0x4d0;
    pub const CR4: usize = 0x548;
    pub const CR3: usize = 0x550;
    pub const CR0: usize = 0x558;
    pub const DR7: usize = 0x560;
    pub const DR6: usize = 0x568;
    pub const RFLAGS: usize = 0x570;
    pub const RIP: usize = 0x578;
    pub const RSP: usize = 0x5d8;
    pub const RAX: usize = 0x5f8;
    /// STAR, LSTAR, CSTAR, SFMASK, kernel GS base, SYSENTER's three, CR2.
    pub const SYSTEM_CALLS: core::ops::Range<usize> = 0x600..0x648;
    pub const PAT: usize = 0x668;
}

/// #DB and #AC, whose delivery can cause the next one without end and without an interrupt between
/// (CVE-2015-8104, CVE-2015-5307), and #MC, which is ours.
const STOPS_EXCEPTIONS: u32 = 1 << 1 | 1 << 17 | 1 << 18;
/// INTR, NMI, INIT, VINTR, CPUID, INVD, HLT, INVLPGA, I/O, MSR, shutdown.
const STOPS_1: u32 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 18
    | 1 << 22
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 28
    | 1 << 31;
const STOP_IRET: u32 = 1 << 20;
/// All of SVM's own instructions, WBINVD, MONITOR, MWAIT, XSETBV, RDPRU.
const STOPS_2: u32 = 0x7f | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14;
/// INVLPGB, both ways, MCOMMIT, TLBSYNC.
const STOPS_3: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4;

const VIRTUAL_REQUEST: u64 = 1 << 8;
const VIRTUAL_PRIORITY: u64 = 15 << 16;
const VIRTUAL_IGNORE_TPR: u64 = 1 << 20;
const VIRTUAL_MASKING: u64 = 1 << 24;

const EVENT_VALID: u64 = 1 << 31;
const EVENT_HAS_ERROR: u64 = 1 << 11;
const EVENT_NMI: u64 = 2 << 8;
const EVENT_EXCEPTION: u64 = 3 << 8;
const EVENT_SOFTWARE: u64 = 4 << 8;
const EVENT_TYPE: u64 = 7 << 8;

const FLUSH_ALL: u64 = 1 << 32;
const INTERRUPTS_ON: u64 = 1 << 9;
const VIRTUAL_8086: u64 = 1 << 17;

/// Clean bits: what the processor may still have of the control block.
mod clean {
    pub const INTERCEPTS: u64 = 1 << 0;
    pub const ASID: u64 = 1 << 2;
    pub const INTERRUPTS: u64 = 1 << 3;
    pub const NESTED: u64 = 1 << 4;
    pub const CONTROL: u64 = 1 << 5;
    pub const ALL: u64 = 0x3ff;
}

/// What of the machine's own is shared by all processors.
struct Svm {
    io_map: u64,
    msr_map: u64,
    asids: u32,
    next_rip: bool,
    keys: bool,
    rdtscp: bool,
    /// What guests may have in XCR0; 0: no XSAVE.
    xcr0: u64,
}

static SVM: Once<Result<Svm, NoGuests>> = Once::new();
/// Some processor cannot do what the first one can.
static PARTIAL: AtomicBool = AtomicBool::new(false);

/// Whether this processor has it, and how many address space identifiers.
fn detect() -> Result<(u32, bool), NoGuests> {
    let cpuid = raw_cpuid::CpuId::new();
    let has = cpuid.get_extended_processor_and_feature_identifiers().is_some_and(|i| i.has_svm());
    let info = cpuid.get_svm_info().filter(|_| has).ok_or(NoGuests::Absent)?;
    // SAFETY: exists where SVM does.
    if unsafe { Msr::new(VM_CR).read() } & VM_CR_DISABLED != 0 {
        return Err(NoGuests::Disabled);
    }
    if !info.has_nested_paging() || info.supported_asids() < 2 {
        return Err(NoGuests::NoNestedPaging);
    }
    Ok((info.supported_asids(), info.has_nrip()))
}

/// Finds out whether there can be guests, and makes the maps of what they may do by themselves.
pub fn prepare(boot: &mut BootMemory) {
    let found = detect().map(|(asids, next_rip)| {
        let (io_map, msr_map) = (boot.take(3), boot.take(2));
        let fill = |start: u64, pages: usize| {
            // SAFETY: pages that were just taken, mapped by the direct map.
            unsafe { direct::<u8>(start).write_bytes(0xff, pages * 4096) };
        };
        fill(io_map, 3);
        fill(msr_map, 2);
        for (msr, bits) in OPEN_MSRS {
            open_msr(msr_map, msr, bits);
        }
        let cpuid = raw_cpuid::CpuId::new();
        let keys = cpuid.get_extended_feature_info().is_some_and(|info| info.has_pku());
        let extended = cpuid.get_extended_processor_and_feature_identifiers();
        let rdtscp = extended.is_some_and(|info| info.has_rdtscp());
        let xcr0 = known_state();
        Svm { io_map, msr_map, asids, next_rip, keys, rdtscp, xcr0 }
    });
    SVM.call_once(|| found);
}

const READ: u8 = 1;
const BOTH: u8 = 3;

/// MSRs that a guest reaches by itself, because VMLOAD and VMSAVE switch them; of the TSC, reading.
const OPEN_MSRS: [(u32, u8); 11] = [
    (0x10, READ),
    (0x174, BOTH),
    (0x175, BOTH),
    (0x176, BOTH),
    (0xc000_0081, BOTH),
    (0xc000_0082, BOTH),
    (0xc000_0083, BOTH),
    (0xc000_0084, BOTH),
    (0xc000_0100, BOTH),
    (0xc000_0101, BOTH),
    (0xc000_0102, BOTH),
];

/// Two bits for each MSR, set where access stops: APM volume 2, section 15.11.
fn open_msr(map: u64, msr: u32, bits: u8) {
    let (vector, base) = if msr < 0x2000 { (0, 0) } else { (0x800, 0xc000_0000) };
    let index = u64::from(msr - base);
    let byte = direct::<u8>(map + vector + index / 4);
    // SAFETY: in the map, which nobody else uses yet.
    let old = unsafe { byte.read() };
    // SAFETY: as above.
    unsafe { byte.write(old & !(bits << (index % 4 * 2))) };
}

/// Whether there can be guests.
pub fn availability() -> Result<(), NoGuests> {
    match SVM.get() {
        Some(Ok(_)) if PARTIAL.load(Ordering::Relaxed) => Err(NoGuests::Partial),
        Some(Ok(_)) => Ok(()),
        Some(Err(why)) => Err(*why),
        None => Err(NoGuests::Absent),
    }
}

/// Which processors run guests, of so many; a bit for each.
///
/// Not the first one of several that QEMU emulates: its FXRSTOR and XRSTOR on any processor change
/// the word where the first one has its global interrupt flag and the state of nested paging,
/// without a lock (`cpu_clear_ignne`), and may so undo a VMRUN or the end of one.
pub fn processors(count: usize) -> u64 {
    let hypervisor = raw_cpuid::CpuId::new().get_hypervisor_info();
    let is_emulated = hypervisor.is_some_and(|info| info.identify() == Hypervisor::QEMU);
    if is_emulated && count > 1 { !1 } else { !0 }
}

fn shared() -> &'static Svm {
    match SVM.get() {
        Some(Ok(svm)) => svm,
        _ => panic!("guests exist only where SVM does"),
    }
}

/// What one processor needs to run guests.
pub struct Processor {
    /// Where the core's own part of what VMLOAD and VMSAVE move is.
    host: u64,
    /// Last identifier given out, and in which round.
    asid: u32,
    round: u64,
    /// Which vCPU's x87, SSE and debug address registers are in the processor.
    owner: u64,
    /// What TSC_AUX and XCR0 have.
    aux: u64,
    xcr0: u64,
}

impl Processor {
    /// Turns virtualization on for this processor, which has two pages for it.
    pub fn new(pages: [u64; 2]) -> Self {
        let mut this = Self { host: pages[0], asid: 0, round: 1, owner: 0, aux: 0, xcr0: 1 };
        if SVM.get().is_some_and(Result::is_ok) {
            match detect() {
                Ok(_) => this.enable(pages[1]),
                Err(_) => PARTIAL.store(true, Ordering::Relaxed),
            }
        }
        this
    }

    fn enable(&mut self, save_area: u64) {
        let mut efer = Msr::new(EFER);
        // SAFETY: exists on every processor with long mode.
        let value = unsafe { efer.read() };
        // SAFETY: only SVME changes.
        unsafe { efer.write(value | EFER_SVME) };
        // SAFETY: exists where SVM does; the page is the processor's from now on.
        unsafe { Msr::new(VM_HSAVE).write(save_area) };
        if shared().xcr0 != 0 {
            // Whatever the firmware left.
            with_xsave(|| set_xcr0(1));
        }
        // SAFETY: SVM is on; a page of our own. Segments, TR and system call registers of this
        // processor never change again.
        unsafe { asm!("vmsave rax", in("rax") self.host, options(nostack, preserves_flags)) };
    }

    /// Makes sure that what this vCPU has cached is what it may see.
    fn tag(&mut self, guest: &mut Guest, cpu: u8, space: Space) {
        let asids = shared().asids;
        let moved = guest.cpu != Some(cpu) || guest.round != self.round;
        if !moved && guest.space == Some(space) {
            return guest.vmcb.set(at::ASID, guest.asid.into());
        }
        let mut flush = 0;
        self.asid += 1;
        if self.asid >= asids {
            self.asid = 1;
            self.round += 1;
            flush = FLUSH_ALL;
        }
        guest.asid = self.asid;
        guest.round = self.round;
        guest.space = Some(space);
        guest.vmcb.set(at::NESTED_ROOT, space.root.address());
        guest.vmcb.set(at::ASID, u64::from(guest.asid) | flush);
        guest.dirty |= clean::ASID | clean::NESTED;
        if guest.cpu != Some(cpu) {
            guest.dirty = clean::ALL;
        }
    }

    /// Runs a vCPU until something stops it; the interrupt's vector if one did.
    #[inline]
    pub fn run(
        &mut self,
        registers: &mut Registers,
        guest: &mut Guest,
        serial: u64,
        cpu: u8,
        space: Space,
        window: bool,
    ) -> Stop {
        self.tag(guest, cpu, space);
        // What it left here is old if it was elsewhere since.
        if self.owner != serial || guest.cpu != Some(cpu) {
            guest.load_extended();
            self.owner = serial;
            self.xcr0 = shared().xcr0.max(1);
        }
        guest.cpu = Some(cpu);
        if self.aux != guest.aux || self.xcr0 != guest.xcr0 {
            self.set_own(guest.aux, guest.xcr0);
        }
        guest.set_window(window);
        guest.write_back(registers);
        // SAFETY: SVM is on, the control block is complete and this vCPU's alone, its nested root
        // has the domain's memory only; the maps stop everything else.
        unsafe { enter_guest(registers, guest.vmcb.0, self.host) };
        guest.read_back(registers);
        guest.why()
    }

    /// Saves what a vCPU left in this processor.
    pub fn leave(&mut self, guest: &mut Guest, serial: u64) {
        // Not after a reset: then what is left here is of before.
        if self.owner == serial && guest.cpu.is_some() {
            guest.save_extended();
            self.xcr0 = shared().xcr0.max(1);
        }
        if self.aux != 0 || self.xcr0 != 1 {
            self.set_own(0, 1);
        }
    }

    /// Sets what ring 3 could read too, and then finds as after a reset.
    #[cold]
    fn set_own(&mut self, aux: u64, xcr0: u64) {
        if self.aux != aux && shared().rdtscp {
            // SAFETY: exists by CPUID; the core itself does not use it.
            unsafe { Msr::new(TSC_AUX).write(aux) };
            self.aux = aux;
        }
        if self.xcr0 != xcr0 {
            with_xsave(|| set_xcr0(xcr0));
            self.xcr0 = xcr0;
        }
    }
}

/// Why a guest stopped.
pub enum Stop {
    /// An interrupt came, with this vector; 0: it went away.
    Interrupt(u64),
    /// Something for `hv-core`.
    Exit(GuestExit),
}

/// The control block of a vCPU, by its physical address.
struct Vmcb(u64);

impl Vmcb {
    fn get(&self, at: usize) -> u64 {
        // SAFETY: in the frame that the vCPU was made in, aligned.
        unsafe { direct::<u64>(self.0 + at as u64).read_volatile() }
    }

    fn set(&self, at: usize, value: u64) {
        // SAFETY: as above.
        unsafe { direct::<u64>(self.0 + at as u64).write_volatile(value) };
    }

    fn set32(&self, at: usize, value: u32) {
        // SAFETY: as above.
        unsafe { direct::<u32>(self.0 + at as u64).write_volatile(value) };
    }

    /// Selector, attributes, limit and base.
    fn set_segment(&self, at: usize, selector: u16, attributes: u16, limit: u32, base: u64) {
        let first = u64::from(selector) | u64::from(attributes) << 16 | u64::from(limit) << 32;
        self.set(at, first);
        self.set(at + 8, base);
    }
}

/// A hardware-virtualized vCPU, beside its general registers.
pub struct Guest {
    /// The frame that XSAVE or FXSAVE writes to, by its physical address.
    extended: u64,
    debug: [u64; 4],
    aux: u64,
    xcr0: u64,
    vmcb: Vmcb,
    asid: u32,
    round: u64,
    cpu: Option<u8>,
    space: Option<Space>,
    /// Clean bits of what changed since it ran.
    dirty: u64,
    /// It is in a handler of a non-maskable interrupt.
    in_nmi: bool,
}

impl Guest {
    /// As after INIT, with its control block in a frame, and its registers of x87, SSE and AVX in
    /// another.
    pub fn new(frame: Mfn, extended: Mfn) -> Self {
        let vmcb = Vmcb(frame.address());
        // SAFETY: a frame that serves nothing else, by the caller's contract.
        unsafe { direct::<u8>(vmcb.0).write_bytes(0, 4096) };
        let svm = shared();
        vmcb.set32(at::INTERCEPT_EXCEPTIONS, STOPS_EXCEPTIONS);
        vmcb.set32(at::INTERCEPT_1, STOPS_1);
        vmcb.set32(at::INTERCEPT_2, STOPS_2);
        vmcb.set32(at::INTERCEPT_3, STOPS_3);
        vmcb.set(at::IO_MAP, svm.io_map);
        vmcb.set(at::MSR_MAP, svm.msr_map);
        vmcb.set(at::NESTED, 1);
        Self {
            extended: extended.address(),
            debug: [0; 4],
            aux: 0,
            xcr0: 1,
            vmcb,
            asid: 0,
            round: 0,
            cpu: None,
            space: None,
            dirty: clean::ALL,
            in_nmi: false,
        }
    }

    /// Sets all registers: APM volume 2, section 14.1.3; `xen-abi.md` §1.2.
    pub fn start(&mut self, registers: &mut Registers, start: Start) {
        const REAL: u16 = 0x93;
        *registers = Registers { rflags: 2, ..Registers::default() };
        let vmcb = &self.vmcb;
        let (flat, limit) =
            if matches!(start, Start::Pvh { .. }) { (0xc93, u32::MAX) } else { (REAL, 0xffff) };
        for segment in [at::ES, at::SS, at::DS, at::FS, at::GS] {
            vmcb.set_segment(segment, 0, flat, limit, 0);
        }
        vmcb.set_segment(at::GDTR, 0, 0, 0xffff, 0);
        vmcb.set_segment(at::IDTR, 0, 0, 0xffff, 0);
        vmcb.set_segment(at::LDTR, 0, 0x82, 0xffff, 0);
        vmcb.set_segment(at::TR, 0, 0x8b, 0xffff, 0);
        vmcb.set(at::CPL, 0);
        vmcb.set(at::EFER, EFER_SVME);
        vmcb.set(at::CR0, 0x6000_0010);
        vmcb.set(at::CR3, 0);
        vmcb.set(at::CR4, 0);
        vmcb.set(at::DR6, 0xffff_0ff0);
        vmcb.set(at::DR7, 0x400);
        vmcb.set(at::PAT, 0x0007_0406_0007_0406);
        vmcb.set(at::SHADOW, 0);
        vmcb.set(at::EVENT, 0);
        at::SYSTEM_CALLS.step_by(8).for_each(|place| vmcb.set(place, 0));
        match start {
            Start::Reset => {
                vmcb.set_segment(at::CS, 0xf000, 0x9b, 0xffff, 0xffff_0000);
                registers.rip = 0xfff0;
            }
            Start::Page(page) => {
                vmcb.set_segment(at::CS, u16::from(page) << 8, 0x9b, 0xffff, u64::from(page) << 12);
            }
            Start::Pvh { entry, start_info } => {
                vmcb.set_segment(at::CS, 0, 0xc9b, u32::MAX, 0);
                vmcb.set_segment(at::TR, 0, 0x8b, 0x67, 0);
                vmcb.set(at::CR0, 0x11);
                registers.rip = entry.into();
                registers.rbx = start_info.into();
            }
        }
        registers.rdx = match start {
            Start::Pvh { .. } => 0,
            _ => raw_cpuid::cpuid!(1).eax.into(),
        };
        self.forget_extended();
        self.dirty = clean::ALL;
        self.in_nmi = false;
        self.set_iret_stop(false);
    }

    /// FCW and MXCSR as after FNINIT; everything else 0.
    fn forget_extended(&mut self) {
        // SAFETY: a frame of this vCPU's alone.
        unsafe { direct::<u8>(self.extended).write_bytes(0, 4096) };
        // SAFETY: as above, aligned.
        unsafe { direct::<u16>(self.extended).write(0x37f) };
        // SAFETY: as above.
        unsafe { direct::<u32>(self.extended + 24).write(0x1f80) };
        self.debug = [0; 4];
        self.aux = 0;
        self.xcr0 = 1;
        // What is in a processor under its name is not its any more.
        self.cpu = None;
    }

    fn load_extended(&self) {
        let (cr0, cr4, _) = with_fpu();
        let area = direct::<u8>(self.extended);
        // Some processors leave the pointers of the last x87 instruction to whom comes next, unless
        // one of ours is the last (Xen's XSA-52).
        // SAFETY: no exception is on; the area has more than 4 bytes.
        unsafe { asm!("fnclex", "emms", "fild dword ptr [{}]", in(reg) area, options(nostack)) };
        match shared().xcr0 {
            // SAFETY: aligned, as FXSAVE wrote it or as after a reset; we use none of these.
            0 => unsafe { asm!("fxrstor64 [{}]", in(reg) area, options(nostack)) },
            // SAFETY: the same of XSAVE, which is on.
            all => unsafe {
                asm!("xrstor64 [{}]", in(reg) area, in("rax") all, in("edx") 0, options(nostack));
            },
        }
        without_fpu(cr0, cr4);
        clear_protection_keys();
        let [a, b, c, d] = self.debug;
        // SAFETY: no breakpoint is on outside of a guest.
        unsafe {
            asm!(
                "mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}",
                in(reg) a, in(reg) b, in(reg) c, in(reg) d, options(nostack, preserves_flags)
            );
        };
    }

    fn save_extended(&mut self) {
        let (cr0, cr4, xcr0) = with_fpu();
        // QEMU 7.2 lets a guest execute XSETBV by itself.
        self.xcr0 = xcr0;
        let area = direct::<u8>(self.extended);
        match shared().xcr0 {
            // SAFETY: a page of this vCPU's alone.
            0 => unsafe { asm!("fxsave64 [{}]", in(reg) area, options(nostack)) },
            // SAFETY: the same; `known_state` saw that it is large enough, and XSAVE is on.
            all => unsafe {
                asm!("xsave64 [{}]", in(reg) area, in("rax") all, in("edx") 0, options(nostack));
            },
        }
        without_fpu(cr0, cr4);
        let [a, b, c, d]: [u64; 4];
        // SAFETY: reading them changes nothing.
        unsafe {
            asm!(
                "mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3",
                out(reg) a, out(reg) b, out(reg) c, out(reg) d,
                options(nostack, preserves_flags)
            );
        };
        self.debug = [a, b, c, d];
    }

    fn set_window(&mut self, window: bool) {
        let request = VIRTUAL_REQUEST | VIRTUAL_PRIORITY | VIRTUAL_IGNORE_TPR;
        // The guest's CR8 stays as it is: nothing depends on it.
        let priority = self.vmcb.get(at::INTERRUPTS) & 0xff;
        let wanted = priority | VIRTUAL_MASKING | if window { request } else { 0 };
        self.vmcb.set(at::INTERRUPTS, wanted);
        self.dirty |= clean::INTERRUPTS;
    }

    fn set_iret_stop(&mut self, on: bool) {
        self.vmcb.set32(at::INTERCEPT_1, STOPS_1 | if on { STOP_IRET } else { 0 });
        self.dirty |= clean::INTERCEPTS;
    }

    fn write_back(&mut self, registers: &Registers) {
        let vmcb = &self.vmcb;
        vmcb.set(at::RAX, registers.rax);
        vmcb.set(at::RSP, registers.rsp);
        vmcb.set(at::RIP, registers.rip);
        vmcb.set(at::RFLAGS, registers.rflags);
        vmcb.set(at::CLEAN, clean::ALL & !self.dirty);
        self.dirty = 0;
    }

    fn read_back(&mut self, registers: &mut Registers) {
        let vmcb = &self.vmcb;
        registers.rax = vmcb.get(at::RAX);
        registers.rsp = vmcb.get(at::RSP);
        registers.rip = vmcb.get(at::RIP);
        registers.rflags = vmcb.get(at::RFLAGS);
        // An event that was being delivered is delivered again, but for those that their
        // instruction makes anew.
        let event = vmcb.get(at::EXIT_EVENT);
        let by_instruction = event & EVENT_TYPE == EVENT_SOFTWARE
            || event & EVENT_TYPE == EVENT_EXCEPTION && matches!(event & 0xff, 3 | 4);
        let again = event & EVENT_VALID != 0 && !by_instruction;
        vmcb.set(at::EVENT, if again { event } else { 0 });
    }

    fn why(&mut self) -> Stop {
        let code = self.vmcb.get(at::EXIT_CODE);
        let info = self.vmcb.get(at::EXIT_INFO_1);
        Stop::Exit(match code {
            0x41 => GuestExit::Exception { vector: 1, error: None },
            0x51 => GuestExit::Exception { vector: 17, error: Some(0) },
            0x52 => panic!("machine check while a guest ran"),
            0x60 => return Stop::Interrupt(pending_interrupt()),
            // Taken by its handler, now that the global interrupt flag is set.
            0x61 | 0x63 => return Stop::Interrupt(0),
            0x64 => GuestExit::Window,
            0x72 => GuestExit::Cpuid,
            0x74 => {
                self.in_nmi = false;
                self.set_iret_stop(false);
                // Nothing before the IRET is done.
                self.vmcb.set(at::SHADOW, 1);
                GuestExit::NmiDone
            }
            0x76 | 0x89 => GuestExit::Nothing,
            0x78 => GuestExit::Halt,
            0x7b => GuestExit::Port(self.port_access(info)),
            0x7c if info & 1 == 0 => GuestExit::ReadMsr,
            0x7c => GuestExit::WriteMsr,
            0x7f => GuestExit::Shutdown,
            0x81 => GuestExit::Hypercall,
            0x8d => GuestExit::SetXcr,
            0x7a | 0x80..=0x8e | 0xa0..=0xa4 => GuestExit::Undefined,
            0x400 => GuestExit::Memory {
                gpa: self.vmcb.get(at::EXIT_INFO_2),
                write: info & 2 != 0,
                implicit: info & (1 << 4 | 1 << 33) != 0,
            },
            code => GuestExit::Failed { code },
        })
    }

    fn port_access(&self, info: u64) -> PortAccess {
        let address_bytes = match info >> 7 & 7 {
            1 => 2,
            2 => 4,
            4 => 8,
            // Some emulators do not say.
            _ => self.mode().code_bits / 8,
        };
        #[expect(clippy::cast_possible_truncation, reason = "16 bits of it")]
        let port = (info >> 16) as u16;
        PortAccess {
            port,
            bytes: match info >> 4 & 7 {
                1 => 1,
                2 => 2,
                _ => 4,
            },
            write: info & 1 == 0,
            string: info & 1 << 2 != 0,
            repeat: info & 1 << 3 != 0,
            address_bytes,
            next_rip: self.vmcb.get(at::EXIT_INFO_2),
        }
    }

    /// How it runs.
    pub fn mode(&self) -> Mode {
        let vmcb = &self.vmcb;
        let (cr0, efer) = (vmcb.get(at::CR0), vmcb.get(at::EFER));
        let attributes = vmcb.get(at::CS) >> 16;
        let is_real = cr0 & 1 == 0 || vmcb.get(at::RFLAGS) & VIRTUAL_8086 != 0;
        let code_bits = match (efer & EFER_LMA != 0 && attributes & 1 << 9 != 0, is_real) {
            (true, _) => 64,
            (_, false) if attributes & 1 << 10 != 0 => 32,
            _ => 16,
        };
        Mode {
            cr0,
            cr3: vmcb.get(at::CR3),
            cr4: vmcb.get(at::CR4),
            efer: efer & !EFER_SVME,
            cs_base: vmcb.get(at::CS + 8),
            ds_base: vmcb.get(at::DS + 8),
            es_base: vmcb.get(at::ES + 8),
            code_bits,
            cpl: (vmcb.get(at::CPL) >> 24 & 3) as u8,
        }
    }

    /// Reads a register.
    pub fn msr(&self, register: GuestMsr) -> u64 {
        match register {
            GuestMsr::Efer => self.vmcb.get(at::EFER) & !EFER_SVME,
            GuestMsr::Pat => self.vmcb.get(at::PAT),
            GuestMsr::TscAux => self.aux,
            // Its own, since it has just stopped here: see `save_extended`.
            GuestMsr::Xcr0 if shared().xcr0 != 0 => with_xsave(get_xcr0),
            GuestMsr::Xcr0 => self.xcr0,
            GuestMsr::TscOffset => self.vmcb.get(at::TSC_OFFSET),
        }
    }

    /// Writes a register.
    pub fn set_msr(&mut self, register: GuestMsr, value: u64) {
        match register {
            GuestMsr::Efer => {
                self.vmcb.set(at::EFER, value | EFER_SVME);
                self.dirty |= clean::CONTROL;
            }
            GuestMsr::Pat => {
                self.vmcb.set(at::PAT, value);
                self.dirty |= clean::NESTED;
            }
            GuestMsr::TscAux => self.aux = value,
            GuestMsr::Xcr0 => self.xcr0 = value,
            GuestMsr::TscOffset => {
                self.vmcb.set(at::TSC_OFFSET, value);
                self.dirty |= clean::INTERCEPTS;
            }
        }
    }

    /// What it can be told now.
    pub fn readiness(&self, registers: &Registers) -> Readiness {
        let free =
            self.vmcb.get(at::EVENT) & EVENT_VALID == 0 && self.vmcb.get(at::SHADOW) & 1 == 0;
        let interrupt = free && registers.rflags & INTERRUPTS_ON != 0;
        Readiness { interrupt, nmi: free && !self.in_nmi }
    }

    /// Tells it something at its next instruction.
    pub fn inject(&mut self, event: Event) {
        let raw = match event {
            Event::Interrupt(vector) => u64::from(vector),
            Event::Nmi => {
                self.in_nmi = true;
                self.set_iret_stop(true);
                EVENT_NMI | 2
            }
            Event::Exception(vector, None) => EVENT_EXCEPTION | u64::from(vector),
            Event::Exception(vector, Some(error)) => {
                EVENT_EXCEPTION | EVENT_HAS_ERROR | u64::from(vector) | u64::from(error) << 32
            }
        };
        self.vmcb.set(at::EVENT, raw | EVENT_VALID);
    }

    /// Behind the instruction that made it stop, where the processor says so.
    pub fn next_rip(&self) -> Option<u64> {
        shared().next_rip.then(|| self.vmcb.get(at::NEXT_RIP)).filter(|&rip| rip != 0)
    }

    /// Ends the shadow of an instruction that was carried out for it.
    pub fn end_shadow(&mut self) {
        self.vmcb.set(at::SHADOW, 0);
    }
}

/// What guests may have in XCR0; 0: there is no XSAVE.
pub fn extended_state() -> u64 {
    shared().xcr0
}

/// The most of x87, SSE, AVX and AVX-512 that this processor has and that fits in a page.
fn known_state() -> u64 {
    let cpuid = raw_cpuid::CpuId::new();
    if !cpuid.get_feature_info().is_some_and(|info| info.has_xsave()) {
        return 0;
    }
    let supported = raw_cpuid::cpuid!(0xd, 0).eax;
    let fits = |n| {
        let part = raw_cpuid::cpuid!(0xd, n);
        part.eax + part.ebx <= 4096
    };
    let has = |mask: u32| supported & mask == mask && (2..8).all(|n| mask >> n & 1 == 0 || fits(n));
    [0xe7, 7, 3].into_iter().find(|&mask| has(mask)).map_or(0, u64::from)
}

/// Reaches XCR0, which ring 3 shall not: XSAVE is on in CR4 only while we need it.
fn with_xsave<T>(work: impl FnOnce() -> T) -> T {
    let cr4 = Cr4::read();
    // SAFETY: exists by CPUID, by the callers.
    unsafe { Cr4::write(cr4 | Cr4Flags::OSXSAVE) };
    let result = work();
    // SAFETY: back to what it was.
    unsafe { Cr4::write(cr4) };
    result
}

fn get_xcr0() -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: XSAVE is on, by the callers.
    unsafe {
        asm!(
            "xgetbv", in("ecx") 0, out("rax") low, out("rdx") high,
            options(nostack, nomem, preserves_flags)
        );
    };
    high << 32 | low
}

fn set_xcr0(value: u64) {
    // SAFETY: XSAVE is on, by the callers; the value is one that the architecture takes.
    unsafe {
        asm!(
            "xsetbv", in("ecx") 0, in("rax") value, in("edx") 0,
            options(nostack, nomem, preserves_flags)
        );
    };
}

/// Empties the protection-key register, which a guest can turn on in CR4 though it is not shown.
fn clear_protection_keys() {
    if !shared().keys {
        return;
    }
    let cr4 = Cr4::read();
    // SAFETY: exists by CPUID; with a register of zeros every access is as without.
    unsafe { Cr4::write(cr4 | Cr4Flags::PROTECTION_KEY_USER) };
    // SAFETY: CR4.PKE is on.
    unsafe {
        asm!(
            "wrpkru", in("ecx") 0, in("eax") 0, in("edx") 0,
            options(nostack, nomem, preserves_flags)
        );
    };
    // SAFETY: back to what it was.
    unsafe { Cr4::write(cr4) };
}

/// Lets us use x87, SSE and what XSAVE has; answers CR0, CR4 and XCR0 as they were.
fn with_fpu() -> (Cr0Flags, Cr4Flags, u64) {
    let (cr0, cr4, mut xcr0) = (Cr0::read(), Cr4::read(), 1);
    // SAFETY: only what keeps ring 3 from these registers changes, until it is set again.
    unsafe { Cr0::write(cr0 - Cr0Flags::EMULATE_COPROCESSOR - Cr0Flags::TASK_SWITCHED) };
    if shared().xcr0 != 0 {
        // SAFETY: exists by CPUID; until it is set again.
        unsafe { Cr4::write(cr4 | Cr4Flags::OSXSAVE) };
        xcr0 = get_xcr0();
        set_xcr0(shared().xcr0);
    }
    (cr0, cr4, xcr0)
}

/// Ends what [`with_fpu`] began; XCR0 stays as that set it.
fn without_fpu(cr0: Cr0Flags, cr4: Cr4Flags) {
    // SAFETY: back to what it was.
    unsafe { Cr0::write(cr0) };
    // SAFETY: back to what it was.
    unsafe { Cr4::write(cr4) };
}

/// The interrupt that ended a guest's run.
fn pending_interrupt() -> u64 {
    // SAFETY: this processor's tables are loaded; the handler only notes the vector.
    unsafe { take_interrupt() };
    crate::vcpu::waited()
}
