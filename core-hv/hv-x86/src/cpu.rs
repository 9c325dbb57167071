//! One processor's tables and control registers: GDT, TSS, IDT, MSRs, CR0 and CR4.

#![expect(unsafe_code, reason = "descriptor tables and control registers")]

use crate::{paging, vcpu};
use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::offset_of;
use hv_core::platform::{MAX_CPUS, Registers};
use x86_64::instructions::tables::{lgdt, lidt, load_tss};
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};
use x86_64::registers::debug::{Dr7, Dr7Value};
use x86_64::registers::model_specific::Msr;
use x86_64::registers::segmentation::{CS, SS, Segment};
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::SegmentSelector;
use x86_64::{PrivilegeLevel, VirtAddr};

/// Selector of ring 3's data segment; SYSRET wants it 8 behind STAR's base, code 16 behind.
pub const USER_DATA: u64 = 0x1b;
/// Selector of ring 3's code segment.
pub const USER_CODE: u64 = 0x23;
const CORE_CODE: SegmentSelector = SegmentSelector::new(1, PrivilegeLevel::Ring0);
const CORE_DATA: SegmentSelector = SegmentSelector::new(2, PrivilegeLevel::Ring0);
const TSS_SELECTOR: SegmentSelector = SegmentSelector::new(5, PrivilegeLevel::Ring0);

/// First I/O port of the second serial port.
const COM2: usize = 0x2f8;
/// Ports 0 to 0x2ff, and the byte of ones that ends the bitmap.
const BITMAP_BYTES: usize = 0x300 / 8 + 1;

/// Task state segment: AMD64 APM volume 2, section 12.2.5.
#[repr(C, packed(4))]
pub struct Tss {
    reserved: u32,
    /// Stack pointer for exceptions in ring 3, and to return from `enter_ring3` with.
    pub rsp0: u64,
    unused: [u64; 3],
    ist: [u64; 7],
    reserved2: [u16; 5],
    bitmap_offset: u16,
    bitmap: [u8; BITMAP_BYTES],
}
const _: () = assert!(offset_of!(Tss, ist) == 0x24 && offset_of!(Tss, bitmap) == 0x68);

/// What a processor finds through GS. `entry.s` knows the first fields.
#[repr(C, align(64))]
pub struct PerCpu {
    /// Of the system call entry.
    pub scratch: u64,
    /// Where the domain's registers go.
    pub registers: *mut Registers,
    /// Vector of the interrupt that ended a wait, 0 if none did.
    pub waited: u64,
    pad: u32,
    /// Aligned so that `rsp0` is.
    pub tss: Tss,
    gdt: [u64; 7],
}
const _: () = assert!((offset_of!(PerCpu, tss) + offset_of!(Tss, rsp0)) % 8 == 0);

#[repr(transparent)]
struct Cell(UnsafeCell<PerCpu>);
// SAFETY: each processor uses its own element only.
unsafe impl Sync for Cell {}

static PER_CPU: [Cell; MAX_CPUS] = [const {
    Cell(UnsafeCell::new(PerCpu {
        scratch: 0,
        registers: core::ptr::null_mut(),
        waited: 0,
        pad: 0,
        tss: Tss {
            reserved: 0,
            rsp0: 0,
            unused: [0; 3],
            ist: [0; 7],
            reserved2: [0; 5],
            bitmap_offset: 0x68,
            bitmap: [0xff; BITMAP_BYTES],
        },
        gdt: [0; 7],
    }))
}; MAX_CPUS];

#[derive(Clone, Copy)]
#[repr(C)]
struct Gate([u64; 2]);

struct Idt(UnsafeCell<[Gate; 256]>);
// SAFETY: written once, by the first processor, before any other runs.
unsafe impl Sync for Idt {}
static IDT: Idt = Idt(UnsafeCell::new([Gate([0; 2]); 256]));

/// An interrupt gate of ring 0. `ist` 0 stays on the stack that the privilege change chose.
fn gate(handler: u64, ist: u64) -> Gate {
    let low = (handler & 0xffff)
        | u64::from(CORE_CODE.0) << 16
        | ist << 32
        | 0x8e << 40
        | (handler >> 16 & 0xffff) << 48;
    Gate([low, handler >> 32])
}

/// Fills the IDT. Once, on the first processor.
pub fn fill_idt() {
    // SAFETY: nobody else runs yet.
    let idt = unsafe { &mut *IDT.0.get() };
    for (vector, entry) in (0_u64..).zip(idt.iter_mut()) {
        let ist = match vector {
            8 => 1,
            18 => 3,
            1 => 4,
            _ => 0,
        };
        *entry = gate(vcpu::trap_stub(vector), ist);
    }
    idt[2] = gate(vcpu::nmi_handler(), 2);
}

fn descriptors(tss: u64) -> [u64; 7] {
    let limit = (size_of::<Tss>() - 1) as u64;
    let low = limit | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
    [
        0,
        0x00af_9b00_0000_ffff, // core, code
        0x00cf_9300_0000_ffff, // core, data
        0x00cf_f300_0000_ffff, // ring 3, data
        0x00af_fb00_0000_ffff, // ring 3, code
        low,
        tss >> 32,
    ]
}

/// Loads this processor's tables. Its stacks for NMI and the like are mapped, or will be.
pub fn load_tables(cpu: usize) {
    let per_cpu = PER_CPU[cpu].0.get();
    let tss = per_cpu as u64 + offset_of!(PerCpu, tss) as u64;
    // SAFETY: this processor's own element, which nothing refers to yet.
    let this = unsafe { &mut *per_cpu };
    let [double_fault, nmi, machine_check, debug] = paging::interrupt_stacks(cpu);
    this.tss.ist = [double_fault, nmi, machine_check, debug, 0, 0, 0];
    this.gdt = descriptors(tss);
    let gdt = pointer(this.gdt.as_ptr() as u64, size_of_val(&this.gdt));
    // SAFETY: the descriptors are correct and live forever.
    unsafe { lgdt(&gdt) };
    // SAFETY: a 64-bit code segment.
    unsafe { CS::set_reg(CORE_CODE) };
    // SAFETY: a writable data segment.
    unsafe { SS::set_reg(CORE_DATA) };
    // SAFETY: a free TSS.
    unsafe { load_tss(TSS_SELECTOR) };
    // Ring 3 may name any selector: a table that firmware left must not give it descriptors.
    // SAFETY: no local descriptor table is used.
    unsafe { asm!("lldt {0:x}", in(reg) 0_u64, options(nostack, preserves_flags)) };
    // SAFETY: filled by `fill_idt`, and it lives forever.
    unsafe { lidt(&pointer(IDT.0.get() as u64, size_of::<[Gate; 256]>())) };
    load_registers(per_cpu as u64);
}

#[expect(clippy::cast_possible_truncation, reason = "tables have at most 4096 bytes")]
fn pointer(base: u64, bytes: usize) -> DescriptorTablePointer {
    DescriptorTablePointer { base: VirtAddr::new(base), limit: (bytes - 1) as u16 }
}

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const FMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const SYSENTER_CS: u32 = 0x174;
const PAT: u32 = 0x277;
const TSC_AUX: u32 = 0xc000_0103;
const APIC_BASE: u32 = 0x1b;

/// The page attribute table as it is after a reset: PCD and PWT mean uncached.
const RESET_PAT: u64 = 0x0007_0406_0007_0406;

/// Every flag that SYSCALL may clear.
const ALL_FLAGS: u64 = 0x003f_7fd5;

fn load_registers(per_cpu: u64) {
    for (msr, value) in [
        (STAR, 0x13 << 48 | u64::from(CORE_CODE.0) << 32),
        (LSTAR, vcpu::syscall_handler()),
        (FMASK, ALL_FLAGS),
        (FS_BASE, 0),
        (GS_BASE, per_cpu),
        (KERNEL_GS_BASE, 0),
        (SYSENTER_CS, 0),
        (PAT, RESET_PAT),
    ] {
        // SAFETY: these exist on every processor with long mode; nothing uses FS or GS yet.
        unsafe { Msr::new(msr).write(value) };
    }
    let cpuid = raw_cpuid::CpuId::new();
    let extended = cpuid.get_extended_processor_and_feature_identifiers();
    if extended.is_some_and(|info| info.has_rdtscp()) {
        // SAFETY: exists by CPUID; only ring 3 reads it.
        unsafe { Msr::new(TSC_AUX).write(0) };
    }
    Dr7::write(Dr7Value::from_bits_truncate(0));
    // No FPU for anybody: ring 3 gets #NM or #UD, so no register of it can leak.
    let cr0 = Cr0Flags::PROTECTED_MODE_ENABLE
        | Cr0Flags::MONITOR_COPROCESSOR
        | Cr0Flags::EMULATE_COPROCESSOR
        | Cr0Flags::TASK_SWITCHED
        | Cr0Flags::EXTENSION_TYPE
        | Cr0Flags::NUMERIC_ERROR
        | Cr0Flags::WRITE_PROTECT
        | Cr0Flags::PAGING;
    // SAFETY: protection and paging stay on; we are built without floating point.
    unsafe { Cr0::write(cr0) };
    // SAFETY: only what the processor has; no mapping of ours is for ring 3.
    unsafe { Cr4::write_raw(cr4().bits()) };
}

/// Ring 3 may read the TSC; not performance counters, FS and GS bases, or where tables are.
fn cr4() -> Cr4Flags {
    let cpuid = raw_cpuid::CpuId::new();
    let base = cpuid.get_feature_info();
    let extended = cpuid.get_extended_feature_info();
    // OSFXSR: so that FXSAVE saves all of a guest's registers. Ring 3 still has none, by CR0.
    let mut flags = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION | Cr4Flags::PAGE_GLOBAL | Cr4Flags::OSFXSR;
    flags.set(Cr4Flags::MACHINE_CHECK_EXCEPTION, base.is_some_and(|info| info.has_mce()));
    if let Some(info) = extended {
        flags.set(Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION, info.has_smep());
        flags.set(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION, info.has_smap());
        flags.set(Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION, info.has_umip());
    }
    flags
}

/// The local APIC's base register, with `set` set in it.
pub fn apic_base(set: u64) -> u64 {
    let mut msr = Msr::new(APIC_BASE);
    // SAFETY: exists on every processor with long mode.
    let value = unsafe { msr.read() };
    if set & !value != 0 {
        // SAFETY: turns the APIC on; its address stays.
        unsafe { msr.write(value | set) };
    }
    value | set
}

/// Opens or closes the ports of the second serial port to ring 3 on this processor.
pub fn open_serial_ports(cpu: usize, open: bool) {
    let byte = COM2 / 8;
    // SAFETY: this processor's own element; only the bitmap is touched, which Rust code reads
    // nowhere, and the processor only in ring 3.
    unsafe { (*PER_CPU[cpu].0.get()).tss.bitmap[byte] = if open { 0 } else { 0xff } };
}
