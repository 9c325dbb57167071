//! The real machine, as `hv-core` sees it: one [`Machine`] per processor.

#![expect(unsafe_code, reason = "memory of domains is reached through the direct map")]

use crate::paging::{self, CpuArea, direct};
use crate::svm::{self, Guest, Processor, Stop};
use crate::vcpu::{self, HYPERCALL, Left, Vcpu};
use crate::{apic, cpu, ioapic, pci, serial, time};
use core::arch::asm;
use core::cell::Cell;
use core::ops::Range;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use heapless::Vec;
use hv_core::frame::Mfn;
use hv_core::platform::{
    Bdf, Clock, CpuId, DEVICE_VECTORS, Event, Exit, GUEST_FRAMES, GuestMsr, MAX_CPUS, Mode,
    MsiMessage, NoGuests, Platform, Readiness, Registers, Space, Start,
};
use spin::Once;
use x86_64::registers::control::Cr2;

const PAGE_FAULT: u64 = 14;
const GENERAL_PROTECTION: u8 = 13;
const MACHINE_CHECK: u64 = 18;
const DOUBLE_FAULT: u64 = 8;

/// What all processors share.
pub struct Shared {
    /// Physical address of the core's own top-level table.
    pub root: u64,
    /// Local APIC ids of the processors, by [`CpuId`].
    pub apic_ids: Vec<u32, MAX_CPUS>,
    /// Physical addresses of memory, for the check of frame numbers.
    pub memory_end: u64,
}

/// Set once, before any [`Machine`] exists.
pub static SHARED: Once<Shared> = Once::new();

/// One processor and the machine around it.
pub struct Machine {
    cpu: CpuId,
    shared: &'static Shared,
    /// No frame of memory has this number or a higher one.
    frames_end: u64,
    area: CpuArea,
    /// Physical page that the device window shows.
    window: Cell<u64>,
    /// What CR3 has; `None`: the core's own root.
    loaded: Option<Space>,
    /// Whether ring 3 has the second serial port.
    ports: bool,
    /// Serial number of the vCPU that ran last.
    last: u64,
    /// What runs guests.
    guests: Processor,
}

impl Machine {
    /// The processor that this runs on.
    ///
    /// # Panics
    /// [`SHARED`] is not set.
    pub fn new(cpu: CpuId, area: CpuArea) -> Self {
        let shared = SHARED.get().expect("facts come before processors");
        let guests = Processor::new(area.guest_pages());
        let window = Cell::new(0);
        let frames_end = shared.memory_end >> 12;
        Self { cpu, shared, frames_end, area, window, loaded: None, ports: false, last: 0, guests }
    }

    /// Where `len` bytes of a frame are.
    #[inline]
    fn at(&self, mfn: Mfn, offset: usize, len: usize) -> *mut u8 {
        assert!(offset <= 4096 && len <= 4096 - offset, "an access stays in its frame");
        assert!(mfn.0 < self.frames_end, "the frame exists");
        direct(mfn.address() + offset as u64)
    }

    /// A word of a frame.
    #[inline]
    fn word32(&self, mfn: Mfn, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "words are aligned");
        // SAFETY: mapped and aligned. Only atomics and assembly touch domains' memory.
        unsafe { AtomicU32::from_ptr(self.at(mfn, offset, 4).cast()) }
    }

    /// A word of a frame.
    #[inline]
    fn word64(&self, mfn: Mfn, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "words are aligned");
        // SAFETY: mapped and aligned. Only atomics and assembly touch domains' memory.
        unsafe { AtomicU64::from_ptr(self.at(mfn, offset, 8).cast()) }
    }

    #[inline]
    fn load_space(&mut self, space: Space) {
        if self.loaded != Some(space) {
            load_cr3(space.root.address());
            self.loaded = Some(space);
        }
    }

    /// Goes on in the core's own address space.
    #[inline]
    fn leave_space(&mut self) {
        if self.loaded.take().is_some() {
            load_cr3(self.shared.root);
        }
    }

    fn open_ports(&mut self, open: bool) {
        if self.ports != open {
            cpu::open_serial_ports(self.area.slot(), open);
            self.ports = open;
        }
    }

    /// Says why ring 3 or a wait ended, and acknowledges the interrupt.
    fn exit(vector: u64, error: u64) -> Exit {
        #[expect(clippy::cast_possible_truncation, reason = "vectors have 8 bits")]
        let byte = vector as u8;
        match vector {
            HYPERCALL => return Exit::Hypercall,
            MACHINE_CHECK | DOUBLE_FAULT => panic!("exception {vector} in ring 3"),
            0..32 => {
                let address = if vector == PAGE_FAULT { Cr2::read_raw() } else { 0 };
                return Exit::Fault { vector: byte, error, address };
            }
            // The 8259's, which are masked, and the APIC's spurious one want no answer.
            0x20..0x30 | 0xff => return Exit::Interrupted,
            _ => apic::end_of_interrupt(),
        }
        match byte {
            apic::SERIAL => Exit::Serial,
            apic::CONSOLE => {
                serial::service();
                Exit::Interrupted
            }
            vector if DEVICE_VECTORS.contains(&vector) => Exit::Device { vector },
            _ => Exit::Interrupted,
        }
    }

    /// Moves the device window and returns where a register is in it.
    fn device(&self, address: u64) -> u64 {
        assert!(address.is_multiple_of(4), "registers are aligned");
        let page = address & !4095;
        if self.window.get() != page {
            self.area.move_window(page);
            self.window.set(page);
        }
        self.area.window() + address % 4096
    }
}

fn load_cr3(root: u64) {
    // SAFETY: every root has the core's half; ring 0 uses nothing else.
    unsafe { asm!("mov cr3, {}", in(reg) root, options(nostack, preserves_flags)) };
}

/// Copies bytes of which either side may be changed meanwhile by a domain: assembly, so that it
/// is no data race of Rust's. Words first; ranges do not overlap.
///
/// # Safety
/// Both ranges are mapped, the destination writable.
#[inline]
unsafe fn copy_bytes(source: *const u8, dest: *mut u8, len: usize) {
    // SAFETY: the caller's duty; DF is clear by the ABI.
    unsafe {
        asm!(
            "rep movsq", "mov rcx, {rest}", "rep movsb",
            rest = in(reg) len % 8, inout("rcx") len / 8 => _, inout("rsi") source => _,
            inout("rdi") dest => _, options(nostack, preserves_flags)
        );
    }
}

impl Platform for Machine {
    type Vcpu = Vcpu;

    fn read(&self, mfn: Mfn, offset: usize, buffer: &mut [u8]) {
        let source = self.at(mfn, offset, buffer.len());
        // SAFETY: in a frame; into a buffer of that length.
        unsafe { copy_bytes(source, buffer.as_mut_ptr(), buffer.len()) };
    }

    fn write(&mut self, mfn: Mfn, offset: usize, bytes: &[u8]) {
        let dest = self.at(mfn, offset, bytes.len());
        // SAFETY: from a buffer of that length; in a frame.
        unsafe { copy_bytes(bytes.as_ptr(), dest, bytes.len()) };
    }

    fn copy(&mut self, source: (Mfn, usize), dest: (Mfn, usize), len: usize) {
        let from = self.at(source.0, source.1, len);
        let to = self.at(dest.0, dest.1, len);
        // SAFETY: both in frames.
        unsafe { copy_bytes(from, to, len) };
    }

    fn zero(&mut self, mfn: Mfn) {
        let dest = self.at(mfn, 0, 4096);
        // SAFETY: a whole frame; DF is clear by the ABI.
        unsafe {
            asm!(
                "rep stosq", inout("rcx") 512_u64 => _, inout("rdi") dest => _, in("rax") 0_u64,
                options(nostack, preserves_flags)
            );
        }
    }

    fn load64(&self, mfn: Mfn, offset: usize) -> u64 {
        self.word64(mfn, offset).load(Ordering::SeqCst)
    }

    fn store64(&mut self, mfn: Mfn, offset: usize, value: u64) {
        self.word64(mfn, offset).store(value, Ordering::SeqCst);
    }

    fn load32(&self, mfn: Mfn, offset: usize) -> u32 {
        self.word32(mfn, offset).load(Ordering::SeqCst)
    }

    fn store32(&mut self, mfn: Mfn, offset: usize, value: u32) {
        self.word32(mfn, offset).store(value, Ordering::SeqCst);
    }

    fn compare_exchange32(
        &mut self,
        mfn: Mfn,
        offset: usize,
        current: u32,
        new: u32,
    ) -> Result<(), u32> {
        let word = self.word32(mfn, offset);
        word.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst).map(drop)
    }

    fn and32(&mut self, mfn: Mfn, offset: usize, mask: u32) {
        self.word32(mfn, offset).fetch_and(mask, Ordering::SeqCst);
    }

    fn or64(&mut self, mfn: Mfn, offset: usize, bits: u64) -> u64 {
        self.word64(mfn, offset).fetch_or(bits, Ordering::SeqCst)
    }

    fn and64(&mut self, mfn: Mfn, offset: usize, mask: u64) -> u64 {
        self.word64(mfn, offset).fetch_and(mask, Ordering::SeqCst)
    }

    fn store8(&mut self, mfn: Mfn, offset: usize, value: u8) {
        // SAFETY: in a frame.
        unsafe { self.at(mfn, offset, 1).write_volatile(value) };
    }

    fn load8(&self, mfn: Mfn, offset: usize) -> u8 {
        // SAFETY: in a frame.
        unsafe { self.at(mfn, offset, 1).read_volatile() }
    }

    fn new_vcpu(&mut self, frame: Mfn) -> Vcpu {
        self.at(frame, 0, 4096);
        // SAFETY: it exists, and hv-core keeps it for this alone, by the trait's contract.
        unsafe { Vcpu::new(frame, None) }
    }

    // Its value was all that referred to the frame.
    fn drop_vcpu(&mut self, _: Vcpu) {}

    #[inline]
    fn registers(vcpu: &Vcpu) -> &Registers {
        vcpu.registers()
    }

    #[inline]
    fn registers_mut(vcpu: &mut Vcpu) -> &mut Registers {
        vcpu.registers_mut()
    }

    #[inline]
    fn run(&mut self, vcpu: &mut Vcpu, space: Space, ports: bool) -> Exit {
        // Whatever happens next: hv-core takes it that the last space is left now.
        self.load_space(space);
        if vcpu.registers().rip >= 1 << 47 {
            // Ring 3 would get it behind SYSCALL's or a jump's end; here it would be ours.
            return Exit::Fault { vector: GENERAL_PROTECTION, error: 0, address: 0 };
        }
        if self.ports != ports {
            self.open_ports(ports);
        }
        if self.last != vcpu.serial() {
            self.last = vcpu.serial();
            vcpu::clear_segments();
        }
        let Left { vector, error } = vcpu.enter();
        if vector == HYPERCALL { Exit::Hypercall } else { Self::exit(vector, error) }
    }

    fn virtualization(&self) -> Result<(), NoGuests> {
        svm::availability()
    }

    fn new_guest(&mut self, [first, second, third]: [Mfn; GUEST_FRAMES]) -> Vcpu {
        self.at(first, 0, 4096);
        self.at(second, 0, 4096);
        self.at(third, 0, 4096);
        let guest = Guest::new(second, third);
        // SAFETY: it exists, and hv-core keeps it for this alone, by the trait's contract.
        let mut vcpu = unsafe { Vcpu::new(first, Some(guest)) };
        Self::start_guest(&mut vcpu, Start::Reset);
        vcpu
    }

    fn start_guest(vcpu: &mut Vcpu, start: Start) {
        let (registers, guest) = vcpu.guest_mut();
        guest.start(registers, start);
    }

    fn mode(vcpu: &Vcpu) -> Mode {
        vcpu.guest().mode()
    }

    fn guest_msr(vcpu: &Vcpu, register: GuestMsr) -> u64 {
        vcpu.guest().msr(register)
    }

    fn set_guest_msr(vcpu: &mut Vcpu, register: GuestMsr, value: u64) {
        vcpu.guest_mut().1.set_msr(register, value);
    }

    fn readiness(vcpu: &Vcpu) -> Readiness {
        vcpu.guest().readiness(vcpu.registers())
    }

    fn inject(vcpu: &mut Vcpu, event: Event) {
        vcpu.guest_mut().1.inject(event);
    }

    fn next_rip(vcpu: &Vcpu) -> Option<u64> {
        vcpu.guest().next_rip()
    }

    fn skip_to(vcpu: &mut Vcpu, rip: u64) {
        let (registers, guest) = vcpu.guest_mut();
        registers.rip = rip;
        guest.end_shadow();
    }

    fn run_guest(&mut self, vcpu: &mut Vcpu, space: Space, window: bool) -> Exit {
        self.leave_space();
        let serial = vcpu.serial();
        self.last = serial;
        let (registers, guest) = vcpu.guest_mut();
        match self.guests.run(registers, guest, serial, self.cpu.0, space, window) {
            Stop::Interrupt(0) => Exit::Interrupted,
            Stop::Interrupt(vector) => Self::exit(vector, 0),
            Stop::Exit(exit) => Exit::Guest(exit),
        }
    }

    fn leave_guest(&mut self, vcpu: &mut Vcpu) {
        let serial = vcpu.serial();
        self.guests.leave(vcpu.guest_mut().1, serial);
    }

    fn extended_state(&self) -> u64 {
        svm::extended_state()
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let raw_cpuid::CpuIdResult { eax, ebx, ecx, edx } = raw_cpuid::cpuid!(leaf, subleaf);
        [eax, ebx, ecx, edx]
    }

    fn wait(&mut self) -> Exit {
        self.leave_space();
        match vcpu::sleep() {
            0 => Exit::Interrupted,
            vector => Self::exit(vector, 0),
        }
    }

    fn share_core(&mut self, root: Mfn) {
        self.at(root, 0, 4096);
        paging::share_core(self.shared.root, root.address());
    }

    fn cpu(&self) -> CpuId {
        self.cpu
    }

    fn kick(&mut self, cpu: CpuId) {
        apic::kick(self.shared.apic_ids[usize::from(cpu.0)]);
    }

    fn now_ns(&self) -> u64 {
        time::now_ns()
    }

    fn set_timer(&mut self, deadline_ns: Option<u64>) {
        apic::set_timer(deadline_ns);
    }

    fn tsc(&self) -> u64 {
        time::tsc()
    }

    fn clock(&self) -> Clock {
        *time::clock()
    }

    fn config_read(&self, bdf: Bdf, offset: u16, width: u16) -> u32 {
        pci::read(bdf, offset, width)
    }

    fn config_write(&mut self, bdf: Bdf, offset: u16, width: u16, value: u32) {
        pci::write(bdf, offset, width, value);
    }

    fn mmio_read32(&self, address: u64) -> u32 {
        // SAFETY: this processor's window shows the page; hv-core knows the device.
        unsafe { (self.device(address) as *const u32).read_volatile() }
    }

    fn mmio_write32(&mut self, address: u64, value: u32) {
        // SAFETY: as above.
        unsafe { (self.device(address) as *mut u32).write_volatile(value) };
    }

    /// Physical destination, fixed delivery, edge: Intel SDM volume 3, section 11.11.
    fn msi_message(&self, cpu: CpuId, vector: u8) -> MsiMessage {
        let apic_id = u64::from(self.shared.apic_ids[usize::from(cpu.0)]);
        MsiMessage { address: 0xfee0_0000 | (apic_id & 0xff) << 12, data: vector.into() }
    }

    fn delay_us(&mut self, us: u32) {
        time::delay_us(us.into());
    }

    fn console_write(&mut self, bytes: &[u8]) {
        serial::write(bytes);
    }

    fn serial_interrupt(&mut self, on: bool) {
        ioapic::serial_interrupt(on);
    }
}

/// Nothing more on this processor.
pub fn halt() -> ! {
    loop {
        x86_64::instructions::interrupts::disable();
        x86_64::instructions::hlt();
    }
}

/// The largest physical address among ranges.
pub fn end_of(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end).max().unwrap_or(0)
}
