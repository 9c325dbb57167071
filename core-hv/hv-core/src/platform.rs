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
}

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
