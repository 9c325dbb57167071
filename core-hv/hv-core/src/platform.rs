//! What the decisions need of a processor and a machine.
//!
//! `hv-x86` implements [`Platform`] for the real machine, the tests implement it in memory. One
//! value of the implementing type exists per processor; all of them see the same memory.

use crate::frame::Mfn;
use core::ops::Range;

/// General registers of a vCPU between two runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
#[expect(missing_docs, reason = "the names are the processor's")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// Why a vCPU stopped running.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// It issued a hypercall: number in `rax`, arguments in `rdi rsi rdx r10 r8`. `rip` is behind
    /// the instruction, which is 2 bytes long ([`HYPERCALL_BYTES`]).
    Hypercall,
    /// It raised an exception that is not ours to mend.
    Fault {
        /// Exception number.
        vector: u8,
        /// Error code, 0 where the exception has none.
        error: u64,
        /// CR2, for a page fault.
        address: u64,
    },
    /// This processor's timer expired, or another processor kicked this one.
    Interrupted,
    /// A device interrupt with a vector from [`DEVICE_VECTORS`] arrived; already acknowledged at
    /// the local APIC.
    Device {
        /// The vector.
        vector: u8,
    },
    /// The interrupt of the second serial port arrived.
    Serial,
    /// A hardware-virtualized vCPU needs us.
    Guest(GuestExit),
}

/// Why a hardware-virtualized vCPU stopped. `rip` is at the instruction, unless said otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestExit {
    /// CPUID.
    Cpuid,
    /// RDMSR.
    ReadMsr,
    /// WRMSR.
    WriteMsr,
    /// HLT.
    Halt,
    /// VMMCALL or VMCALL, which are 3 bytes long.
    Hypercall,
    /// IN, OUT, INS or OUTS.
    Port(PortAccess),
    /// An access to guest-physical memory that the address space does not allow.
    Memory {
        /// Where.
        gpa: u64,
        /// It was a write.
        write: bool,
        /// It was for an instruction, or for an entry of the guest's own page tables.
        implicit: bool,
    },
    /// Triple fault.
    Shutdown,
    /// XSETBV.
    SetXcr,
    /// An instruction that does nothing here, with an opcode of two bytes: WBINVD, INVD.
    Nothing,
    /// An instruction that this processor does not have as far as the guest knows.
    Undefined,
    /// An exception that the machine layer must see, for the guest to have.
    Exception {
        /// Its number.
        vector: u8,
        /// Its error code, if it has one.
        error: Option<u32>,
    },
    /// It can take an interrupt now.
    Window,
    /// An NMI handler ends: `rip` is at its IRET, which the guest executes next.
    NmiDone,
    /// The processor refused to run it, or says what no guest can cause.
    Failed {
        /// The processor's code.
        code: u64,
    },
}

/// An access to I/O ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortAccess {
    /// First port.
    pub port: u16,
    /// Bytes: 1, 2 or 4.
    pub bytes: u8,
    /// OUT or OUTS.
    pub write: bool,
    /// INS or OUTS.
    pub string: bool,
    /// With REP.
    pub repeat: bool,
    /// Bytes of an address: 2, 4 or 8.
    pub address_bytes: u8,
    /// Behind the instruction.
    pub next_rip: u64,
}

/// What a hardware-virtualized vCPU is told at its next instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// An interrupt.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// An exception, with its error code if it has one.
    Exception(u8, Option<u32>),
}

/// Whether a hardware-virtualized vCPU can be told of something at its next instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Readiness {
    /// Interrupts.
    pub interrupt: bool,
    /// Non-maskable interrupts.
    pub nmi: bool,
}

/// How a hardware-virtualized vCPU runs, as far as it decides what its registers mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "the names are the processor's")]
pub struct Mode {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub cs_base: u64,
    pub ds_base: u64,
    pub es_base: u64,
    /// Bits of an address and an operand by default: 16, 32 or 64.
    pub code_bits: u8,
    /// Privilege level.
    pub cpl: u8,
}

/// Where a hardware-virtualized vCPU begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// As after INIT; it is not run before it is told another start.
    Reset,
    /// In 32-bit protected mode without paging (`xen-abi.md` §1.2).
    Pvh {
        /// First instruction.
        entry: u32,
        /// What EBX has: where the start info is.
        start_info: u32,
    },
    /// In real mode, at the start of this page: what a start-up interrupt says.
    Page(u8),
}

/// Registers of a hardware-virtualized vCPU that it reaches by MSR instructions that exit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestMsr {
    /// Extended features. What the machine layer itself needs in it is neither seen nor changed.
    Efer,
    /// Page attribute table.
    Pat,
    /// What RDTSCP and RDPID read beside the time; exists where CPUID shows RDTSCP.
    TscAux,
    /// Which state XSAVE saves, and instructions may use.
    Xcr0,
    /// What is added to the machine's TSC, modulo 2^64, wherever the vCPU reads it.
    TscOffset,
}

/// Why the machine cannot run hardware-virtualized domains.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoGuests {
    /// The processor has no virtualization that we know.
    Absent,
    /// The firmware has turned it off.
    Disabled,
    /// There are no nested page tables.
    NoNestedPaging,
    /// There are more processors than it works on.
    Partial,
}

impl NoGuests {
    /// In words.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Absent => "the processor has no SVM",
            Self::Disabled => "the firmware has turned SVM off",
            Self::NoNestedPaging => "the processor's SVM has no nested paging",
            Self::Partial => "not all processors have SVM",
        }
    }
}

/// Frames that a hardware-virtualized vCPU needs.
pub const GUEST_FRAMES: usize = 3;

/// Length of the hypercall instruction; a continuation sets `rip` back by it.
pub const HYPERCALL_BYTES: u64 = 2;

/// Interrupt vectors that [`Platform::msi_message`] may be asked for.
pub const DEVICE_VECTORS: Range<u8> = 0x30..0xe0;

/// Most processors.
pub const MAX_CPUS: usize = 16;

/// A processor, from 0 without gaps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuId(pub u8);

/// The address space that a vCPU runs in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    /// Frame of its top-level table; entries 256..512 are the core's.
    pub root: Mfn,
    /// Changes whenever a translation was taken away or narrowed, anywhere: a processor that
    /// last loaded another generation must not use what it cached.
    pub generation: u64,
}

/// A PCI function: segment << 16 | bus << 8 | device << 3 | function.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Bdf(pub u32);

/// A message that makes the local APIC of a processor raise a vector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsiMessage {
    /// Bus address to write to.
    pub address: u64,
    /// What to write.
    pub data: u32,
}

/// Memory, one processor, and the machine around it.
///
/// Frame accesses panic when the range leaves the frame; `Mfn`s are only made by the frame
/// table, so they exist. Memory of domains changes under the core's eyes: nothing here returns a
/// reference into it.
pub trait Platform {
    /// Saved state of one vCPU, by value: whoever holds it runs it.
    type Vcpu;

    // Memory.

    /// Copies out of a frame.
    fn read(&self, mfn: Mfn, offset: usize, buffer: &mut [u8]);
    /// Copies into a frame.
    fn write(&mut self, mfn: Mfn, offset: usize, bytes: &[u8]);
    /// Copies between frames (which may be the same one, without overlap of the ranges).
    fn copy(&mut self, source: (Mfn, usize), dest: (Mfn, usize), len: usize);
    /// Fills a frame with zeros.
    fn zero(&mut self, mfn: Mfn);
    /// Loads the aligned 64-bit word at `offset`.
    fn load64(&self, mfn: Mfn, offset: usize) -> u64;
    /// Stores it.
    fn store64(&mut self, mfn: Mfn, offset: usize, value: u64);
    /// Loads the aligned 32-bit word at `offset`.
    fn load32(&self, mfn: Mfn, offset: usize) -> u32;
    /// Stores it.
    fn store32(&mut self, mfn: Mfn, offset: usize, value: u32);
    /// Replaces the aligned 32-bit word if it is `current`. `Err` has what it was instead.
    ///
    /// # Errors
    /// The word found.
    fn compare_exchange32(
        &mut self,
        mfn: Mfn,
        offset: usize,
        current: u32,
        new: u32,
    ) -> Result<(), u32>;
    /// Atomically ands the aligned 32-bit word with `mask`.
    fn and32(&mut self, mfn: Mfn, offset: usize, mask: u32);
    /// Atomically ors the aligned 64-bit word with `bits`, and returns what it was.
    fn or64(&mut self, mfn: Mfn, offset: usize, bits: u64) -> u64;
    /// Atomically ands the aligned 64-bit word with `mask`, and returns what it was.
    fn and64(&mut self, mfn: Mfn, offset: usize, mask: u64) -> u64;
    /// Stores a byte.
    fn store8(&mut self, mfn: Mfn, offset: usize, value: u8);
    /// Loads a byte.
    fn load8(&self, mfn: Mfn, offset: usize) -> u8;

    // vCPUs.

    /// Makes the state of a vCPU in `frame`, which serves nothing else until
    /// [`Self::drop_vcpu`]. All registers are 0.
    fn new_vcpu(&mut self, frame: Mfn) -> Self::Vcpu;
    /// Ends a vCPU; its frame is free for other use.
    fn drop_vcpu(&mut self, vcpu: Self::Vcpu);
    /// Its registers.
    fn registers(vcpu: &Self::Vcpu) -> &Registers;
    /// Its registers, to change. `rflags` is sanitized by [`Self::run`].
    fn registers_mut(vcpu: &mut Self::Vcpu) -> &mut Registers;
    /// Runs the vCPU on this processor until it needs us, and says why it stopped. The caller
    /// holds no lock. `ports` gives ring 3 the I/O ports of the second serial port.
    fn run(&mut self, vcpu: &mut Self::Vcpu, space: Space, ports: bool) -> Exit;
    /// Waits with interrupts on until one arrives, in the core's own address space. The caller
    /// holds no lock.
    fn wait(&mut self) -> Exit;
    // Hardware-virtualized vCPUs. Their general registers are those of `Platform::registers`.

    /// Whether there can be any.
    ///
    /// # Errors
    /// Why not.
    fn virtualization(&self) -> Result<(), NoGuests>;
    /// Makes the state of one in frames of its own, as [`Self::new_vcpu`], in [`Start::Reset`].
    fn new_guest(&mut self, frames: [Mfn; GUEST_FRAMES]) -> Self::Vcpu;
    /// Sets all its registers.
    fn start_guest(vcpu: &mut Self::Vcpu, start: Start);
    /// How it runs.
    fn mode(vcpu: &Self::Vcpu) -> Mode;
    /// Reads a register of one that has just stopped on this processor.
    fn guest_msr(vcpu: &Self::Vcpu, register: GuestMsr) -> u64;
    /// Writes a register; the caller has checked the value.
    fn set_guest_msr(vcpu: &mut Self::Vcpu, register: GuestMsr, value: u64);
    /// What it can be told now.
    fn readiness(vcpu: &Self::Vcpu) -> Readiness;
    /// Tells it something at its next instruction, for which it is ready.
    fn inject(vcpu: &mut Self::Vcpu, event: Event);
    /// Behind the instruction that made it stop, where the processor says so.
    fn next_rip(vcpu: &Self::Vcpu) -> Option<u64>;
    /// Lets it go on at `rip`, behind an instruction that was carried out for it.
    fn skip_to(vcpu: &mut Self::Vcpu, rip: u64);
    /// Runs it on this processor until it needs us. `window`: it shall stop as soon as it can take
    /// an interrupt. The caller holds no lock.
    fn run_guest(&mut self, vcpu: &mut Self::Vcpu, space: Space, window: bool) -> Exit;
    /// Takes what it left in this processor's registers off them: it may go on elsewhere.
    fn leave_guest(&mut self, vcpu: &mut Self::Vcpu);
    /// What a guest may have in XCR0; 0: there is no XSAVE.
    fn extended_state(&self) -> u64;
    /// What this processor's CPUID says.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];

    /// Prepares the upper half of a new top-level table: entries 256..512.
    fn share_core(&mut self, root: Mfn);

    // Processors and time.

    /// This processor.
    fn cpu(&self) -> CpuId;
    /// Makes another processor leave [`Self::run`] or [`Self::wait`] soon, with
    /// [`Exit::Interrupted`].
    fn kick(&mut self, cpu: CpuId);
    /// System time in ns since the core was entered, the same on every processor.
    fn now_ns(&self) -> u64;
    /// Sets this processor's one timer to an absolute system time, or turns it off.
    fn set_timer(&mut self, deadline_ns: Option<u64>);
    /// The processors' TSC now.
    fn tsc(&self) -> u64;
    /// The values that a domain needs to compute system time from its TSC.
    fn clock(&self) -> Clock;

    // Devices.

    /// Reads 1, 2 or 4 bytes of configuration space; all ones where there is no function.
    fn config_read(&self, bdf: Bdf, offset: u16, width: u16) -> u32;
    /// Writes 1, 2 or 4 bytes of configuration space.
    fn config_write(&mut self, bdf: Bdf, offset: u16, width: u16, value: u32);
    /// Reads a device register at a physical address.
    fn mmio_read32(&self, address: u64) -> u32;
    /// Writes a device register at a physical address.
    fn mmio_write32(&mut self, address: u64, value: u32);
    /// The message that raises `vector` on `cpu`.
    fn msi_message(&self, cpu: CpuId, vector: u8) -> MsiMessage;
    /// Waits at least so long, busily: for waits that the PCI specification demands of a reset.
    fn delay_us(&mut self, us: u32);

    // The machine's console.

    /// Writes to the first serial port.
    fn console_write(&mut self, bytes: &[u8]);
    /// Masks or unmasks the second serial port's interrupt at the IOAPIC.
    fn serial_interrupt(&mut self, on: bool);
}

/// Parameters of the paravirtual clock: see `xen_abi::shared_info::time`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clock {
    /// TSC at system time 0.
    pub tsc_at_zero: u64,
    /// `tsc_to_system_mul`.
    pub mul: u32,
    /// `tsc_shift`.
    pub shift: i8,
    /// TSC frequency.
    pub tsc_khz: u64,
    /// Unix time at system time 0 in seconds, 0 when unknown.
    pub unix_at_zero_s: u64,
}
