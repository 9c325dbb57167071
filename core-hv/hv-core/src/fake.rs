//! A machine in memory to run the core on, and a system on it for tests.
//!
//! [`Fake`] implements [`Platform`]: one value per processor, clones of one [`Machine`] with
//! frames, a clock, PCI functions, and everything that the core did to the outside. A vCPU does
//! what its [`Program`] says; without one it acknowledges its events and blocks, as an idle
//! domain does. Nothing runs by itself and time stands still unless a vCPU spins or a test moves
//! it, so that a test decides about every interleaving.
//!
//! [`System`] boots a control domain on such a machine and issues hypercalls as any domain, by
//! the same path as a real processor: argument structures in the domain's memory, registers, one
//! [`CpuLoop::step`]. Frames are shared pages, so that a simulation can let real domains' code
//! work on them ([`View`]).
//!
//! ```
//! use hv_core::fake::{System, D0};
//! use xen_abi::{event, DomainId, EventPort};
//!
//! let mut system = System::new();
//! let guest = system.guest("guest");
//! let port = system.alloc_unbound(guest, D0).unwrap();
//! let local = system.bind(D0, guest, port).unwrap();
//! assert_eq!(system.send(guest, port), 0);
//! assert!(system.is_pending(D0, local));
//! ```

use crate::boot::{Boot, EcamRange, StartError};
use crate::cpu::CpuLoop;
use crate::frame::{FrameInfo, Mfn};
use crate::p2m::{Kind, Page, Walk};
use crate::platform::{
    Bdf, Clock, CpuId, DEVICE_VECTORS, Event, Exit, GUEST_FRAMES, GuestExit, GuestMsr,
    HYPERCALL_BYTES, Mode, MsiMessage, NoGuests, Platform, Readiness, Registers, Space, Start,
};
use crate::state::Core;
use crate::vcpu::{VcpuId, Wait};
use axolotl_abi::CONTROL_OP;
use axolotl_abi::control::{
    self, CLASS_GUEST, Create, DomainInfo, DomainOp, GetDeath, KIND_UNIKERNEL, Populate, SetStart,
};
use axolotl_abi::image::{
    ACCESS_EXECUTE, ACCESS_READ, ACCESS_WRITE, BUNDLE_MAGIC, BundleHeader, BundleImage,
    IMAGE_MAGIC, ImageHeader, Segment,
};
use axolotl_abi::start::{GRANT_TABLE_GPA, HEAP_GPA, IMAGE_GPA, SHARED_INFO_GPA};
use core::sync::atomic::Ordering::SeqCst;
/// A frame of the machine's memory, which simulated domains can share.
pub use shmem::Page as Frame;
use std::boxed::Box;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};
use std::vec;
use std::vec::Vec;
use xen_abi::event::{AllocUnbound, BindInterdomain, BindVirq, PortOp};
use xen_abi::grant::{
    CopyPtr, GNTCOPY_DEST_GREF, GNTCOPY_SOURCE_GREF, GNTMAP_HOST_MAP, GNTMAP_READONLY,
    GTF_PERMIT_ACCESS, GTF_READING, GTF_READONLY, GTF_WRITING, GrantCopy, GrantEntryV1,
    GrantStatus, MapGrantRef, UnmapGrantRef,
};
use xen_abi::hypercall::{EVENT_CHANNEL_OP, GRANT_TABLE_OP, MEMORY_OP, SCHED_OP};
use xen_abi::memory::{ADD_TO_PHYSMAP, AddToPhysmap, SPACE_GRANT_TABLE, SPACE_SHARED_INFO};
use xen_abi::shared_info::{EVTCHN_PENDING, VCPU_PENDING_SEL, VCPU_UPCALL_PENDING};
use xen_abi::{DomainId, Errno, EventPort, Gfn, GrantRef, event, grant, sched};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// The control domain.
pub const D0: DomainId = DomainId(0);
/// Where [`System`] puts argument structures of a domain: its first page of heap.
pub const SCRATCH: u64 = HEAP_GPA;
/// The first page of heap that [`System`] leaves alone.
pub const DATA: Gfn = Gfn::containing(HEAP_GPA + 4096);
/// Pages of heap of a [`System::guest`], scratch page included.
pub const HEAP_PAGES: u32 = 8;
/// Most steps of a processor that one hypercall may take before it counts as unbounded.
const STEPS_MAX: usize = 20_000;
/// Physical address of the bundle.
const BUNDLE_ADDRESS: u64 = 0x1000;

/// A vCPU: registers, and which one it is.
#[derive(Debug)]
pub struct FakeVcpu {
    /// Its registers.
    pub registers: Registers,
    /// Its frame, which names it.
    pub frame: Mfn,
    /// What only a hardware-virtualized one has.
    pub guest: FakeGuest,
}

/// The part of a hardware-virtualized vCPU that the core sets and reads.
#[derive(Clone, Default, Debug)]
pub struct FakeGuest {
    /// How it runs.
    pub mode: Mode,
    /// By [`GuestMsr`].
    pub msrs: [u64; 5],
    /// How it was started last.
    pub started: Option<Start>,
    /// What it was told, and has not taken yet.
    pub told: Option<Event>,
    /// It asked to be left as soon as it can take an interrupt.
    pub window: bool,
}

/// In [`System::visible`]: registers, not a page.
pub const GFN_OF_REGISTERS: Gfn = Gfn(u64::MAX);

/// Leaves `byte` everywhere below on the stack, where what is called next has its variables.
#[inline(never)]
pub fn poison_stack(byte: u8) {
    let below = [byte; 256 << 10];
    core::hint::black_box(&below);
}

/// What a vCPU does while it runs.
pub type Program = Box<dyn FnMut(&mut Fake, &mut Registers, Space) -> Exit>;
/// What a hardware-virtualized vCPU does while it runs. Without one it halts.
pub type GuestProgram = Box<dyn FnMut(&mut Fake, &mut FakeVcpu, Space) -> Exit>;

/// A PCI function, as far as the core looks at it.
pub struct FakeFunction {
    /// Where.
    pub bdf: Bdf,
    /// Its configuration space.
    pub config: Vec<u8>,
    /// Size of each 32-bit memory BAR, 0: none.
    pub bar_bytes: [u32; 6],
    /// Offset of the MSI-X capability, 0: none.
    pub msix: u16,
    /// Offset of the MSI capability, 0: none.
    pub msi: u16,
    /// Offset of the PCI Express capability, 0: none.
    pub express: u16,
    /// Function-level resets so far.
    pub resets: u32,
}

impl FakeFunction {
    /// A network controller with two BARs (128 KiB of registers; 16 KiB with an MSI-X table of 5
    /// vectors in its first page), bus mastering left on by the firmware, and function-level reset.
    #[must_use]
    pub fn nic(device: u8, address: u32) -> Self {
        let mut function = Self {
            bdf: Bdf(u32::from(device) << 3),
            config: vec![0; 4096],
            bar_bytes: [0x2_0000, 0, 0, 0x4000, 0, 0],
            msix: 0xa0,
            msi: 0,
            express: 0xe0,
            resets: 0,
        };
        function.set(0x00, &0x10d3_8086_u32.to_le_bytes());
        function.set(0x04, &6_u16.to_le_bytes());
        function.set(0x06, &0x10_u16.to_le_bytes());
        function.set(0x08, &0x0200_0000_u32.to_le_bytes());
        function.set(0x10, &address.to_le_bytes());
        function.set(0x1c, &(address + 0x2_0000).to_le_bytes());
        function.set(0x34, &[0xa0]);
        // MSI-X: 5 vectors, table at offset 0 of BAR 3.
        function.set(0xa0, &[0x11, 0xe0, 4, 0x80]);
        function.set(0xa4, &3_u32.to_le_bytes());
        function.set(0xe0, &[0x10, 0, 2, 0]);
        function.set(0xe4, &(1_u32 << 28).to_le_bytes());
        function
    }

    /// A function with MSI only, 64 bits wide.
    #[must_use]
    pub fn msi_only(device: u8, address: u32) -> Self {
        let mut function = Self::nic(device, address);
        function.msix = 0;
        function.msi = 0xd0;
        function.set(0x34, &[0xd0]);
        function.set(0xd0, &[0x05, 0, 0x80, 0]);
        function
    }

    fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.config[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// A 16-bit register.
    #[must_use]
    pub fn half(&self, offset: u16) -> u16 {
        let at = usize::from(offset);
        u16::from_le_bytes([self.config[at], self.config[at + 1]])
    }

    fn word(&self, offset: u16) -> u32 {
        u32::from(self.half(offset)) | u32::from(self.half(offset + 2)) << 16
    }

    /// Whether it may read and write memory by itself.
    #[must_use]
    pub fn is_bus_master(&self) -> bool {
        self.half(4) & 4 != 0
    }

    /// Address of its MSI-X table.
    #[must_use]
    pub fn msix_table(&self) -> u64 {
        let place = self.word(self.msix + 4);
        let bar = u16::try_from(place & 7).unwrap_or(0);
        u64::from(self.word(0x10 + 4 * bar) & !0xf) + u64::from(place & !7)
    }

    /// Whether any of its vectors can send a message as far as configuration space says.
    #[must_use]
    pub fn can_interrupt(&self) -> bool {
        let msix = self.msix != 0 && self.half(self.msix + 2) & 0xc000 == 0x8000;
        let msi = self.msi != 0 && self.half(self.msi + 2) & 1 != 0;
        self.is_bus_master() && (msix || msi)
    }

    fn decodes(&self, address: u64) -> bool {
        let bars = (0_u16..6).filter(|&n| self.bar_bytes[usize::from(n)] != 0);
        let within = |n: u16| {
            let start = u64::from(self.word(0x10 + 4 * n) & !0xf);
            (start..start + u64::from(self.bar_bytes[usize::from(n)])).contains(&address)
        };
        self.half(4) & 2 != 0 && bars.into_iter().any(within)
    }

    fn write(&mut self, offset: u16, width: u16, value: u32) {
        if let (0x10..0x28, 4) = (offset, width) {
            let bytes = self.bar_bytes[usize::from((offset - 0x10) / 4)];
            let mask = if bytes == 0 { 0 } else { !(bytes - 1) };
            return self.set(offset.into(), &(value & mask).to_le_bytes());
        }
        // Vendor and device id, status, class, capability heads: read only here.
        if matches!(offset, 0..4 | 6..16) || self.msix != 0 && offset == self.msix {
            return;
        }
        if self.express != 0 && offset == self.express + 8 && value & 0x8000 != 0 {
            self.resets += 1;
            self.set(4, &[0; 2]);
            self.set(0x10, &[0; 24]);
            for register in [self.msix, self.msi] {
                if register != 0 {
                    let kept = self.half(register + 2) & 0x7ff;
                    self.set((register + 2).into(), &kept.to_le_bytes());
                }
            }
            return;
        }
        self.set(offset.into(), &value.to_le_bytes()[..width.into()]);
    }
}

/// Everything outside the core: what all processors see.
pub struct Machine {
    /// Memory, from physical address 0.
    pub frames: Vec<Frame>,
    /// System time.
    pub now_ns: u64,
    /// Each processor's timer.
    pub timers: Vec<Option<u64>>,
    /// Furthest that a timer can count; it expires early then.
    pub timer_range_ns: u64,
    /// Processors kicked, in order.
    pub kicks: Vec<CpuId>,
    /// Written to the first serial port.
    pub console: Vec<u8>,
    /// The second serial port's interrupt is unmasked.
    pub serial_on: bool,
    /// PCI functions.
    pub functions: Vec<FakeFunction>,
    /// Device registers that were written.
    pub registers: BTreeMap<u64, u32>,
    /// Programs of vCPUs, by their frame.
    pub programs: BTreeMap<Mfn, Program>,
    /// The same of hardware-virtualized vCPUs, by their first frame.
    pub guest_programs: BTreeMap<Mfn, GuestProgram>,
    /// Interrupts that end waits, for each processor, before [`Exit::Interrupted`].
    pub interrupts: Vec<VecDeque<Exit>>,
    /// How often each processor waited.
    pub waits: Vec<u64>,
    /// vCPUs that exist.
    pub vcpus: usize,
    /// Whether there can be hardware-virtualized vCPUs.
    pub guests: Result<(), NoGuests>,
    /// What hardware-virtualized vCPUs were told, in order.
    pub told: Vec<(Mfn, Event)>,
    /// How many compare-and-swaps from now on find that a peer was faster.
    pub lost_races: u32,
    /// Compare-and-swaps so far.
    pub swaps: u64,
    /// Shared-info page of each vCPU, for the idle program.
    shared_of: BTreeMap<Mfn, Mfn>,
    /// Lives that the core had counted when those were noted.
    lives: u64,
}

/// One processor of a [`Machine`]. Clones are the same one.
#[derive(Clone)]
pub struct Fake {
    cpu: CpuId,
    machine: Rc<RefCell<Machine>>,
}

impl Fake {
    /// A machine with so many frames and processors; this is the first.
    #[must_use]
    pub fn new(frames: usize, cpus: usize) -> Self {
        let machine = Machine {
            frames: (0..frames).map(|_| Frame::new_zeroed()).collect(),
            now_ns: 1_000,
            timers: vec![None; cpus],
            timer_range_ns: u64::MAX,
            kicks: Vec::new(),
            console: Vec::new(),
            serial_on: false,
            functions: Vec::new(),
            registers: BTreeMap::new(),
            programs: BTreeMap::new(),
            guest_programs: BTreeMap::new(),
            interrupts: vec![VecDeque::new(); cpus],
            waits: vec![0; cpus],
            vcpus: 0,
            guests: Ok(()),
            told: Vec::new(),
            lost_races: 0,
            swaps: 0,
            shared_of: BTreeMap::new(),
            lives: 0,
        };
        Self { cpu: CpuId(0), machine: Rc::new(RefCell::new(machine)) }
    }

    /// Another processor of the same machine.
    #[must_use]
    pub fn processor(&self, cpu: u8) -> Self {
        Self { cpu: CpuId(cpu), machine: self.machine.clone() }
    }

    /// The machine. Not to be held while the core runs.
    #[must_use]
    pub fn machine(&self) -> std::cell::RefMut<'_, Machine> {
        self.machine.borrow_mut()
    }

    /// A frame of memory.
    #[must_use]
    pub fn frame(&self, mfn: Mfn) -> Frame {
        self.machine.borrow().frames[place(mfn)].clone()
    }

    fn with_frame<R>(&self, mfn: Mfn, work: impl FnOnce(&Frame) -> R) -> R {
        work(&self.machine.borrow().frames[place(mfn)])
    }

    /// What the table of an address space says about an address: frame, offset, writable.
    #[must_use]
    pub fn translate(&self, space: Space, gpa: u64) -> Option<(Mfn, usize, bool)> {
        let mut table = space.root;
        for level in [3, 2, 1, 0] {
            let at = (gpa >> (12 + 9 * level) & 511) * 8;
            let raw = self.load64(table, usize::try_from(at).ok()?);
            if raw & 1 == 0 {
                return None;
            }
            table = Mfn(raw >> 12 & 0xff_ffff_ffff);
            if level == 0 {
                return Some((table, usize::try_from(gpa & 0xfff).ok()?, raw & 2 != 0));
            }
        }
        None
    }

    /// Lets time pass for a vCPU that computes: until `ns` are over or the timer expires.
    pub fn spin(&self, ns: u64) -> Exit {
        let mut machine = self.machine();
        let cpu = usize::from(self.cpu.0);
        let end = machine.now_ns.saturating_add(ns);
        let timer = machine.timers[cpu].unwrap_or(u64::MAX);
        if timer <= end {
            machine.timers[cpu] = None;
        }
        machine.now_ns = machine.now_ns.max(end.min(timer));
        Exit::Interrupted
    }

    /// Answers whether this processor's timer has expired, once.
    fn take_timer(&self) -> bool {
        let mut machine = self.machine();
        let now = machine.now_ns;
        machine.timers[usize::from(self.cpu.0)].take_if(|deadline| *deadline <= now).is_some()
    }

    fn idle_program(&self, vcpu: &mut FakeVcpu) -> Exit {
        let shared = self.machine().shared_of.get(&vcpu.frame).copied();
        if let Some(shared) = shared {
            let page = self.frame(shared);
            page.u8(VCPU_UPCALL_PENDING).store(0, SeqCst);
            page.u64(VCPU_PENDING_SEL).store(0, SeqCst);
        }
        issue(&mut vcpu.registers, SCHED_OP, [sched::BLOCK, 0, 0, 0, 0])
    }
}

/// What executing the hypercall instruction does to registers.
pub fn issue(registers: &mut Registers, number: u64, args: [u64; 5]) -> Exit {
    registers.rax = number;
    [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8] = args;
    if registers.rip & 0xfff >= 0x800 {
        // A loop: programs are endless, pages of code are not.
        registers.rip &= !0xfff;
    }
    registers.rip = registers.rip.wrapping_add(HYPERCALL_BYTES);
    Exit::Hypercall
}

fn place(mfn: Mfn) -> usize {
    usize::try_from(mfn.0).expect("frames of the machine")
}

impl Platform for Fake {
    type Vcpu = FakeVcpu;

    fn read(&self, mfn: Mfn, offset: usize, buffer: &mut [u8]) {
        self.with_frame(mfn, |frame| frame.read(offset, buffer));
    }

    fn write(&mut self, mfn: Mfn, offset: usize, bytes: &[u8]) {
        self.with_frame(mfn, |frame| frame.write(offset, bytes));
    }

    fn copy(&mut self, source: (Mfn, usize), dest: (Mfn, usize), len: usize) {
        if source.0 == dest.0 {
            assert!(source.1.abs_diff(dest.1) >= len, "ranges do not overlap");
        }
        let mut bytes = [0; 4096];
        let bytes = &mut bytes[..len];
        self.read(source.0, source.1, bytes);
        self.write(dest.0, dest.1, bytes);
    }

    fn zero(&mut self, mfn: Mfn) {
        self.with_frame(mfn, Frame::clear);
    }

    fn load64(&self, mfn: Mfn, offset: usize) -> u64 {
        self.with_frame(mfn, |frame| frame.u64(offset).load(SeqCst))
    }

    fn store64(&mut self, mfn: Mfn, offset: usize, value: u64) {
        self.with_frame(mfn, |frame| frame.u64(offset).store(value, SeqCst));
    }

    fn load32(&self, mfn: Mfn, offset: usize) -> u32 {
        self.with_frame(mfn, |frame| frame.u32(offset).load(SeqCst))
    }

    fn store32(&mut self, mfn: Mfn, offset: usize, value: u32) {
        self.with_frame(mfn, |frame| frame.u32(offset).store(value, SeqCst));
    }

    fn compare_exchange32(
        &mut self,
        mfn: Mfn,
        offset: usize,
        current: u32,
        new: u32,
    ) -> Result<(), u32> {
        let mut machine = self.machine();
        machine.swaps += 1;
        let word = machine.frames[place(mfn)].clone();
        let word = word.u32(offset);
        if machine.lost_races > 0 {
            machine.lost_races -= 1;
            return Err(word.load(SeqCst) ^ 0x80);
        }
        word.compare_exchange(current, new, SeqCst, SeqCst).map(drop)
    }

    fn and32(&mut self, mfn: Mfn, offset: usize, mask: u32) {
        self.with_frame(mfn, |frame| frame.u32(offset).fetch_and(mask, SeqCst));
    }

    fn or64(&mut self, mfn: Mfn, offset: usize, bits: u64) -> u64 {
        self.with_frame(mfn, |frame| frame.u64(offset).fetch_or(bits, SeqCst))
    }

    fn and64(&mut self, mfn: Mfn, offset: usize, mask: u64) -> u64 {
        self.with_frame(mfn, |frame| frame.u64(offset).fetch_and(mask, SeqCst))
    }

    fn store8(&mut self, mfn: Mfn, offset: usize, value: u8) {
        self.with_frame(mfn, |frame| frame.u8(offset).store(value, SeqCst));
    }

    fn load8(&self, mfn: Mfn, offset: usize) -> u8 {
        self.with_frame(mfn, |frame| frame.u8(offset).load(SeqCst))
    }

    fn new_vcpu(&mut self, frame: Mfn) -> FakeVcpu {
        self.machine().vcpus += 1;
        FakeVcpu { registers: Registers::default(), frame, guest: FakeGuest::default() }
    }

    fn virtualization(&self) -> Result<(), NoGuests> {
        self.machine.borrow().guests
    }

    fn new_guest(&mut self, frames: [Mfn; GUEST_FRAMES]) -> FakeVcpu {
        self.new_vcpu(frames[0])
    }

    fn start_guest(vcpu: &mut FakeVcpu, start: Start) {
        let bits = if matches!(start, Start::Pvh { .. }) { 32 } else { 16 };
        vcpu.registers = Registers { rflags: 2, ..Registers::default() };
        vcpu.guest = FakeGuest { started: Some(start), ..FakeGuest::default() };
        vcpu.guest.mode.code_bits = bits;
        vcpu.guest.msrs[GuestMsr::Xcr0 as usize] = 1;
        match start {
            Start::Reset => {}
            Start::Pvh { entry, start_info } => {
                vcpu.registers.rip = entry.into();
                vcpu.registers.rbx = start_info.into();
            }
            Start::Page(page) => vcpu.guest.mode.cs_base = u64::from(page) << 12,
        }
    }

    fn mode(vcpu: &FakeVcpu) -> Mode {
        vcpu.guest.mode
    }

    fn guest_msr(vcpu: &FakeVcpu, register: GuestMsr) -> u64 {
        vcpu.guest.msrs[register as usize]
    }

    fn set_guest_msr(vcpu: &mut FakeVcpu, register: GuestMsr, value: u64) {
        vcpu.guest.msrs[register as usize] = value;
    }

    fn readiness(vcpu: &FakeVcpu) -> Readiness {
        let free = vcpu.guest.told.is_none();
        Readiness { interrupt: free && vcpu.registers.rflags & 0x200 != 0, nmi: free }
    }

    fn inject(vcpu: &mut FakeVcpu, event: Event) {
        assert_eq!(vcpu.guest.told, None, "one thing at a time");
        vcpu.guest.told = Some(event);
    }

    fn next_rip(_: &FakeVcpu) -> Option<u64> {
        None
    }

    fn skip_to(vcpu: &mut FakeVcpu, rip: u64) {
        vcpu.registers.rip = rip;
    }

    fn run_guest(&mut self, vcpu: &mut FakeVcpu, space: Space, window: bool) -> Exit {
        vcpu.guest.window = window;
        let mut machine = self.machine();
        if let Some(event) = vcpu.guest.told.take() {
            machine.told.push((vcpu.frame, event));
        }
        drop(machine);
        if self.take_timer() {
            return Exit::Interrupted;
        }
        let program = self.machine().guest_programs.remove(&vcpu.frame);
        let Some(mut program) = program else { return Exit::Guest(GuestExit::Halt) };
        let exit = program(self, vcpu, space);
        self.machine().guest_programs.entry(vcpu.frame).or_insert(program);
        exit
    }

    fn leave_guest(&mut self, _: &mut FakeVcpu) {}

    fn extended_state(&self) -> u64 {
        7
    }

    fn cpuid(&self, leaf: u32, _: u32) -> [u32; 4] {
        match leaf {
            0 | 0x8000_0000 => [leaf + 0x1f, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
            0x8000_0008 => [0x3028, 0, 0, 0],
            _ => [u32::MAX; 4],
        }
    }

    fn drop_vcpu(&mut self, vcpu: FakeVcpu) {
        let mut machine = self.machine();
        machine.vcpus -= 1;
        machine.programs.remove(&vcpu.frame);
        machine.guest_programs.remove(&vcpu.frame);
        machine.shared_of.remove(&vcpu.frame);
    }

    fn registers(vcpu: &FakeVcpu) -> &Registers {
        &vcpu.registers
    }

    fn registers_mut(vcpu: &mut FakeVcpu) -> &mut Registers {
        &mut vcpu.registers
    }

    fn run(&mut self, vcpu: &mut FakeVcpu, space: Space, _ports: bool) -> Exit {
        if self.translate(space, vcpu.registers.rip).is_none() {
            let address = vcpu.registers.rip;
            return Exit::Fault { vector: 14, error: 0x14, address };
        }
        if self.take_timer() {
            return Exit::Interrupted;
        }
        let program = self.machine().programs.remove(&vcpu.frame);
        let Some(mut program) = program else { return self.idle_program(vcpu) };
        let exit = program(self, &mut vcpu.registers, space);
        self.machine().programs.entry(vcpu.frame).or_insert(program);
        exit
    }

    fn wait(&mut self) -> Exit {
        let cpu = usize::from(self.cpu.0);
        self.take_timer();
        let mut machine = self.machine();
        machine.waits[cpu] += 1;
        machine.interrupts[cpu].pop_front().unwrap_or(Exit::Interrupted)
    }

    fn share_core(&mut self, root: Mfn) {
        // What the core has there is not a domain's business: a mark is enough.
        self.write(root, 2048, &[0xc0; 2048]);
    }

    fn cpu(&self) -> CpuId {
        self.cpu
    }

    fn kick(&mut self, cpu: CpuId) {
        self.machine().kicks.push(cpu);
    }

    fn now_ns(&self) -> u64 {
        self.machine.borrow().now_ns
    }

    fn set_timer(&mut self, deadline_ns: Option<u64>) {
        let cpu = usize::from(self.cpu.0);
        let mut machine = self.machine();
        let furthest = machine.now_ns.saturating_add(machine.timer_range_ns);
        machine.timers[cpu] = deadline_ns.map(|deadline| deadline.min(furthest));
    }

    fn tsc(&self) -> u64 {
        self.machine.borrow().now_ns + 1
    }

    fn clock(&self) -> Clock {
        Clock { tsc_at_zero: 1, mul: 1 << 31, shift: 1, tsc_khz: 1_000_000, unix_at_zero_s: 0 }
    }

    fn config_read(&self, bdf: Bdf, offset: u16, width: u16) -> u32 {
        let machine = self.machine.borrow();
        let function = machine.functions.iter().find(|function| function.bdf == bdf);
        let mut bytes = [0; 4];
        let Some(function) = function else { return u32::MAX >> (32 - 8 * u32::from(width)) };
        let at = usize::from(offset);
        bytes[..width.into()].copy_from_slice(&function.config[at..at + usize::from(width)]);
        u32::from_le_bytes(bytes)
    }

    fn config_write(&mut self, bdf: Bdf, offset: u16, width: u16, value: u32) {
        let mut machine = self.machine();
        if let Some(function) = machine.functions.iter_mut().find(|f| f.bdf == bdf) {
            function.write(offset, width, value);
        }
    }

    fn mmio_read32(&self, address: u64) -> u32 {
        let machine = self.machine.borrow();
        if !machine.functions.iter().any(|function| function.decodes(address)) {
            return u32::MAX;
        }
        machine.registers.get(&address).copied().unwrap_or(0)
    }

    fn mmio_write32(&mut self, address: u64, value: u32) {
        let mut machine = self.machine();
        if machine.functions.iter().any(|function| function.decodes(address)) {
            machine.registers.insert(address, value);
        }
    }

    fn msi_message(&self, cpu: CpuId, vector: u8) -> MsiMessage {
        assert!(DEVICE_VECTORS.contains(&vector), "vectors of devices");
        MsiMessage { address: 0xfee0_0000 | u64::from(cpu.0) << 12, data: vector.into() }
    }

    fn delay_us(&mut self, us: u32) {
        self.machine().now_ns += u64::from(us) * 1_000;
    }

    fn console_write(&mut self, bytes: &[u8]) {
        self.machine().console.extend_from_slice(bytes);
    }

    fn serial_interrupt(&mut self, on: bool) {
        self.machine().serial_on = on;
    }
}

/// A flat image with one executable page at [`IMAGE_GPA`].
#[must_use]
pub fn image() -> Vec<u8> {
    let mut bytes = vec![0; 8192];
    let header = ImageHeader { magic: IMAGE_MAGIC, entry: IMAGE_GPA, segments: 1, reserved: 0 };
    let segment = Segment {
        gfn: IMAGE_GPA >> 12,
        pages: 1,
        access: ACCESS_READ | ACCESS_EXECUTE,
        file_offset: 4096,
        file_bytes: 4096,
    };
    bytes[..24].copy_from_slice(header.as_bytes());
    bytes[24..56].copy_from_slice(segment.as_bytes());
    bytes[4096..].fill(0x90);
    bytes
}

/// A bundle with one image, the control domain's.
#[must_use]
pub fn bundle(image: &[u8], control_pages: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    let whole = 4096 + image.len() as u64;
    let header = BundleHeader {
        magic: BUNDLE_MAGIC,
        bundle_bytes: whole,
        description_offset: 0,
        description_bytes: 0,
        images: 1,
        control_pages,
        crc32: 0,
    };
    let entry = BundleImage { offset: 4096, bytes: image.len() as u64, name: [0; 32] };
    bytes[..40].copy_from_slice(header.as_bytes());
    bytes[40..88].copy_from_slice(entry.as_bytes());
    bytes.extend_from_slice(image);
    bytes
}

/// Bytes that live as long as the program, and where a leak checker finds them. The same bytes
/// again are the same ones.
#[must_use]
pub fn leak(bytes: &[u8]) -> &'static [u8] {
    static KEPT: Mutex<Vec<&'static [u8]>> = Mutex::new(Vec::new());
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = kept.iter().find(|known| **known == bytes) {
        return known;
    }
    // Words, so that structures in it are aligned as in a module that is loaded at a page.
    let words = vec![0_u64; bytes.len().div_ceil(8)].leak();
    words.as_mut_bytes()[..bytes.len()].copy_from_slice(bytes);
    let leaked = &words.as_bytes()[..bytes.len()];
    kept.push(leaked);
    leaked
}

/// Frame tables of systems that are gone.
static TABLES: Mutex<Vec<&'static mut [FrameInfo]>> = Mutex::new(Vec::new());

fn frame_table(count: usize) -> &'static mut [FrameInfo] {
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(index) = tables.iter().position(|table| table.len() == count) {
        let table = tables.swap_remove(index);
        table.fill_with(FrameInfo::default);
        return table;
    }
    let mut frames = Vec::new();
    frames.resize_with(count, FrameInfo::default);
    frames.leak()
}

/// A core, made on a stack that holds it: without optimization it is moved about there.
fn empty_core() -> Box<spin::Mutex<Core<Fake>>> {
    let builder = std::thread::Builder::new().stack_size(8 << 20);
    let maker = builder.spawn(|| Box::new(spin::Mutex::new(Core::empty())));
    maker.expect("a thread").join().expect("nothing in it fails")
}

/// What a [`System`] is made of.
pub struct Config {
    /// Frames of memory.
    pub frames: usize,
    /// Processors.
    pub cpus: usize,
    /// Those that run hardware-virtualized vCPUs.
    pub guest_cpus: u64,
    /// PCI functions.
    pub functions: Vec<FakeFunction>,
    /// Pages of the control domain.
    pub control_pages: u32,
}

impl Default for Config {
    fn default() -> Self {
        // Miri takes its time for each frame; all tests fit into so many.
        let frames = if cfg!(miri) { 320 } else { 512 };
        Self { frames, cpus: 1, guest_cpus: !0, functions: Vec::new(), control_pages: 110 }
    }
}

/// A booted system: a machine, the core, and one loop per processor.
pub struct System {
    /// The first processor.
    pub p: Fake,
    /// The core.
    pub core: Rc<spin::Mutex<Core<Fake>>>,
    loops: Vec<(Fake, CpuLoop<Fake>)>,
}

impl Default for System {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for System {
    fn drop(&mut self) {
        let table = self.core.lock().frames.take_memory();
        TABLES.lock().unwrap_or_else(PoisonError::into_inner).push(table);
    }
}

/// A system as those see it that run in it: programs of vCPUs, models of devices.
#[derive(Clone)]
pub struct View {
    /// The first processor.
    pub p: Fake,
    core: Rc<spin::Mutex<Core<Fake>>>,
}

impl View {
    /// The page of a domain at a guest frame.
    #[must_use]
    pub fn page(&self, id: DomainId, gfn: Gfn) -> Option<Page> {
        self.core.lock().domain(id)?.p2m.page(&self.p, gfn)
    }

    /// The memory of a domain at a guest frame, which knows where it is there. `None` where there
    /// is none.
    #[cfg(feature = "sim")]
    #[must_use]
    pub fn memory(&self, id: DomainId, gfn: Gfn) -> Option<Frame> {
        let page = self.page(id, gfn).filter(|page| page.kind != Kind::Device)?;
        Some(self.p.frame(page.mfn).alias_at(gfn))
    }

    /// Whether a frame is memory of a domain's own.
    #[must_use]
    pub fn owns(&self, id: DomainId, mfn: Mfn) -> bool {
        self.core.lock().frames().is_owned_by(mfn, id)
    }

    /// Whether a domain has a grant of this frame mapped so that its devices reach it.
    #[must_use]
    pub fn maps_for_devices(&self, id: DomainId, mfn: Mfn) -> bool {
        let core = self.core.lock();
        let Some(domain) = core.domain(id) else { return false };
        let maps = crate::invariants::mappings(&self.p, domain);
        maps.iter().any(|map| {
            map.mfn == mfn && domain.p2m.page(&self.p, map.gfn).is_some_and(|page| page.dma)
        })
    }

    /// Grants of others that a domain has mapped.
    #[must_use]
    pub fn mapped(&self, id: DomainId) -> u32 {
        self.core.lock().domain(id).map_or(0, |domain| domain.grants.mapped)
    }

    /// Event ports that a domain has open.
    #[must_use]
    pub fn ports(&self, id: DomainId) -> u32 {
        self.core.lock().domain(id).map_or(0, |domain| domain.ports.used)
    }

    /// What a domain waits for and what is pending, for messages.
    #[must_use]
    pub fn describe(&self, id: DomainId) -> std::string::String {
        let core = self.core.lock();
        let Some(domain) = core.domain(id) else { return "absent".into() };
        let word = |at| self.p.load64(domain.shared, at);
        let upcall = self.p.load8(domain.shared, VCPU_UPCALL_PENDING);
        let vcpu = domain.vcpu();
        std::format!(
            "{:?} {:?} queued {} on {:?} upcall {upcall} selected {:#x} pending {:#x}",
            domain.stage,
            vcpu.wait,
            vcpu.queued,
            vcpu.on_cpu,
            word(VCPU_PENDING_SEL),
            word(EVTCHN_PENDING),
        )
    }

    /// Whether a port of a domain is open.
    #[must_use]
    pub fn is_open(&self, id: DomainId, port: EventPort) -> bool {
        let core = self.core.lock();
        core.domain(id).is_some_and(crate::domain::Domain::is_alive)
            && core.port(&self.p, id, port).status != event::STATUS_CLOSED
    }

    /// Makes a domain do something whenever it runs, over all its lives.
    ///
    /// # Panics
    /// There is no such domain.
    pub fn program(&self, id: DomainId, program: Program) {
        let frame = self.core.lock().domain(id).expect("it exists").vcpu().frame;
        self.p.machine().programs.insert(frame, program);
    }

    /// Raises an event that nobody sent.
    pub fn raise(&self, id: DomainId, port: EventPort) {
        let mut core = self.core.lock();
        if core.domain(id).is_some_and(crate::domain::Domain::is_alive) {
            core.raise(&mut self.p.clone(), id, port);
        }
    }
}

impl System {
    /// With one processor and no devices.
    #[must_use]
    pub fn new() -> Self {
        Self::with(Config::default())
    }

    /// # Panics
    /// The control domain does not start.
    #[must_use]
    pub fn with(config: Config) -> Self {
        let bundle = bundle(&image(), config.control_pages);
        let (system, started) = Self::boot(config, &bundle);
        started.expect("a good bundle starts");
        system
    }

    /// Boots any bundle.
    pub fn boot(config: Config, bundle: &[u8]) -> (Self, Result<(), StartError>) {
        let mut p = Fake::new(config.frames, config.cpus);
        p.machine().functions = config.functions;
        for (frame, page) in (1..).zip(bundle.chunks(4096)) {
            p.write(Mfn(frame), 0, page);
        }
        let end = u64::try_from(config.frames).expect("frames") * 4096;
        let core: Rc<spin::Mutex<Core<Fake>>> = Rc::from(empty_core());
        core.lock().init(
            &mut p,
            Boot {
                frames: frame_table(config.frames),
                usable: core::slice::from_ref(&(0..end)),
                bundle: leak(bundle),
                bundle_address: BUNDLE_ADDRESS,
                cpus: config.cpus,
                guest_cpus: config.guest_cpus,
                core_pages: 0,
                ecam: &[EcamRange { segment: 0, first_bus: 0, last_bus: 0 }],
                reserved: core::slice::from_ref(&(0..end)),
            },
        );
        let started = core.lock().start_control(&mut p);
        let loops = (0..config.cpus)
            .map(|cpu| (p.processor(u8::try_from(cpu).expect("few")), CpuLoop::new()))
            .collect();
        let mut system = Self { p, core, loops };
        if started.is_ok() {
            system.prepare(D0);
        }
        (system, started)
    }

    /// The system for those who run in it.
    #[must_use]
    pub fn view(&self) -> View {
        View { p: self.p.clone(), core: self.core.clone() }
    }

    // Running.

    /// One step of a processor.
    pub fn step(&mut self, cpu: usize) {
        self.note_shared_pages();
        let (p, cpu) = &mut self.loops[cpu];
        cpu.step(p, &self.core);
    }

    fn note_shared_pages(&mut self) {
        let core = self.core.lock();
        let mut machine = self.p.machine();
        if core::mem::replace(&mut machine.lives, core.lives) == core.lives {
            return;
        }
        for domain in core.domains.iter().flatten() {
            machine.shared_of.insert(domain.vcpu().frame, domain.shared);
        }
    }

    /// Steps of a processor until it waits for an interrupt, or so many.
    pub fn run(&mut self, cpu: usize, steps: usize) {
        for _ in 0..steps {
            self.step(cpu);
        }
    }

    /// Makes a domain do something whenever it runs.
    ///
    /// # Panics
    /// There is no such domain.
    pub fn program(
        &mut self,
        id: DomainId,
        program: impl FnMut(&mut Fake, &mut Registers, Space) -> Exit + 'static,
    ) {
        let frame = self.core.lock().domain(id).expect("it exists").vcpu().frame;
        self.p.machine().programs.insert(frame, Box::new(program));
    }

    /// Makes a domain compute without end, a millisecond or up to a timer in each step.
    pub fn spin(&mut self, id: DomainId) {
        self.program(id, |p, _, _| p.spin(1_000_000));
        self.wake(id);
    }

    /// Moves the clock.
    pub fn advance(&mut self, ns: u64) {
        self.p.machine().now_ns += ns;
    }

    /// Makes a domain do one thing on the first processor, and runs that until it has.
    ///
    /// # Panics
    /// It cannot run, or takes more than a bounded number of steps.
    pub fn act(&mut self, id: DomainId, mut action: impl FnMut(&mut Registers) -> Exit + 'static) {
        let frame = {
            let mut core = self.core.lock();
            let domain = core.domain(id).expect("it exists");
            assert!(domain.stage == crate::domain::Stage::Live, "only live domains act");
            let frame = domain.vcpu().frame;
            if domain.vcpu().wait != Wait::Nothing {
                core.wake(&mut self.p, VcpuId::first(id));
            }
            frame
        };
        let done = Rc::new(RefCell::new(false));
        let told = done.clone();
        let old = self.p.machine().programs.insert(
            frame,
            Box::new(move |_, registers, _| {
                *told.borrow_mut() = true;
                action(registers)
            }),
        );
        let mut steps = 0;
        while !*done.borrow() {
            steps += 1;
            assert!(steps < STEPS_MAX, "{id} never ran");
            self.step(0);
        }
        // A domain that was destroyed meanwhile has taken its program with it.
        let mut machine = self.p.machine();
        machine.programs.remove(&frame);
        if let Some(old) = old {
            machine.programs.insert(frame, old);
        }
    }

    /// Issues a hypercall as a domain; answers its result, `-errno` for an error.
    ///
    /// # Panics
    /// As [`Self::act`], or it is continued too often.
    pub fn call(&mut self, id: DomainId, number: u64, args: [u64; 5]) -> i64 {
        for _ in 0..STEPS_MAX {
            self.act(id, move |registers| issue(registers, number, args));
            let progress = self.core.lock().domain(id).map_or(0, |domain| domain.vcpu().progress);
            if progress == 0 || !self.is_live(id) {
                return self.registers(id).map_or(0, |registers| registers.rax.cast_signed());
            }
        }
        panic!("hypercall {number} {args:?} of {id} is continued without end");
    }

    /// Registers of a domain, wherever they are.
    #[must_use]
    pub fn registers(&self, id: DomainId) -> Option<Registers> {
        let state = self.core.lock().domain(id)?.vcpu().state.as_ref().map(|vcpu| vcpu.registers);
        state.or_else(|| self.loops.iter().find_map(|(_, cpu)| cpu.running_registers(id)).copied())
    }

    /// Issues a hypercall with an argument structure, which is at [`SCRATCH`]; answers the result
    /// and the structure afterwards.
    pub fn call_with<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        id: DomainId,
        number: u64,
        command: u64,
        argument: T,
    ) -> (i64, T) {
        self.write(id, SCRATCH, argument.as_bytes());
        let result = self.call(id, number, [command, SCRATCH, 1, 0, 0]);
        (result, self.get(id, SCRATCH))
    }

    /// As [`Self::call_with`], again and again while the answer is `EAGAIN`. Meanwhile the other
    /// processors make steps, as they would.
    ///
    /// # Panics
    /// It never ends.
    pub fn call_until<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        id: DomainId,
        number: u64,
        command: u64,
        mut argument: T,
    ) -> (i64, T) {
        for _ in 0..STEPS_MAX {
            let (result, after) = self.call_with(id, number, command, argument);
            if result != Errno::EAGAIN.to_result() {
                return (result, after);
            }
            argument = after;
            for cpu in 1..self.loops.len() {
                self.step(cpu);
            }
        }
        panic!("EAGAIN without end");
    }

    // Memory of domains, as the tests see it.

    /// The page of a domain at a guest frame.
    #[must_use]
    pub fn page(&self, id: DomainId, gfn: Gfn) -> Option<Page> {
        self.core.lock().domain(id)?.p2m.page(&self.p, gfn)
    }

    /// Writes memory of a domain, as its own instructions would but whatever its access is.
    ///
    /// # Panics
    /// Nothing is there.
    pub fn write(&mut self, id: DomainId, gpa: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = gpa + done as u64;
            let page = self.page(id, Gfn::containing(at)).expect("a page is there");
            assert!(page.kind != Kind::Device, "memory");
            let offset = usize::try_from(at & 0xfff).expect("small");
            let len = (bytes.len() - done).min(4096 - offset);
            self.p.write(page.mfn, offset, &bytes[done..done + len]);
            done += len;
        }
    }

    /// Reads memory of a domain.
    ///
    /// # Panics
    /// Nothing is there.
    pub fn read(&self, id: DomainId, gpa: u64, buffer: &mut [u8]) {
        let mut done = 0;
        while done < buffer.len() {
            let at = gpa + done as u64;
            let page = self.page(id, Gfn::containing(at)).expect("a page is there");
            let offset = usize::try_from(at & 0xfff).expect("small");
            let len = (buffer.len() - done).min(4096 - offset);
            self.p.read(page.mfn, offset, &mut buffer[done..done + len]);
            done += len;
        }
    }

    /// Everything that domains can see of the core's doing: all their pages, and their registers.
    ///
    /// # Panics
    /// Never: ids are small.
    #[must_use]
    pub fn visible(&self) -> Vec<(DomainId, Gfn, Vec<u8>)> {
        let core = self.core.lock();
        let mut all = Vec::new();
        for domain in core.domains.iter().flatten() {
            let mut gfn = Gfn(0);
            loop {
                gfn = match domain.p2m.walk(&self.p, gfn) {
                    Walk::End => break,
                    Walk::Skipped(next) => next,
                    Walk::Page(at, page) => {
                        if page.kind != Kind::Device && page.kind != Kind::Bundle {
                            let mut bytes = vec![0; 4096];
                            self.p.read(page.mfn, 0, &mut bytes);
                            all.push((domain.id, at, bytes));
                        }
                        Gfn(at.0 + 1)
                    }
                };
            }
            for state in domain.vcpus.iter().filter_map(|vcpu| vcpu.state.as_ref()) {
                let registers = format!("{:?} {:?}", state.registers, state.guest);
                all.push((domain.id, GFN_OF_REGISTERS, registers.into_bytes()));
            }
        }
        all
    }

    /// Reads a structure in memory of a domain.
    #[must_use]
    pub fn get<T: FromBytes + IntoBytes>(&self, id: DomainId, gpa: u64) -> T {
        let mut value = T::new_zeroed();
        self.read(id, gpa, value.as_mut_bytes());
        value
    }

    // The control interface.

    /// Issues a control operation as the control domain.
    pub fn control<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        command: u64,
        argument: T,
    ) -> (i64, T) {
        self.call_until(D0, CONTROL_OP, command, argument)
    }

    /// Issues an operation that needs nothing but a domain.
    pub fn control_domain(&mut self, command: u64, domid: DomainId) -> i64 {
        self.control(command, DomainOp { domid }).0
    }

    /// What [`Self::create`] is told for an ordinary guest.
    #[must_use]
    pub fn plan(name: &str) -> Create {
        let mut plan = Create::new_zeroed();
        plan.name[..name.len()].copy_from_slice(name.as_bytes());
        plan.domid = control::ANY_DOMAIN;
        plan.kind = KIND_UNIKERNEL;
        plan.class = CLASS_GUEST;
        plan.max_pages = 40;
        plan
    }

    /// Creates, populates and starts a domain: one page of code, [`HEAP_PAGES`] of heap.
    ///
    /// # Panics
    /// Something is refused.
    pub fn create(&mut self, plan: Create) -> DomainId {
        let (result, plan) = self.control(control::CREATE, plan);
        assert_eq!(result, 0, "CREATE");
        let id = plan.domid;
        let code = ACCESS_READ | ACCESS_EXECUTE;
        let data = ACCESS_READ | ACCESS_WRITE;
        self.populate(id, Gfn::containing(IMAGE_GPA), 1, code, 0);
        self.populate(id, Gfn::containing(HEAP_GPA), HEAP_PAGES, data, 0);
        self.start(id);
        id
    }

    /// An ordinary guest.
    pub fn guest(&mut self, name: &str) -> DomainId {
        self.create(Self::plan(name))
    }

    /// # Panics
    /// It is refused.
    pub fn populate(&mut self, domid: DomainId, gfn: Gfn, count: u32, access: u32, flags: u32) {
        let op = Populate { domid, pad: 0, access, flags, count, gfn: gfn.0, done: 0 };
        let (result, op) = self.control(control::POPULATE, op);
        assert_eq!((result, op.done), (0, count.into()), "POPULATE");
    }

    /// Sets the first instruction of a domain that is built, starts it, and maps its shared pages.
    ///
    /// # Panics
    /// It is refused.
    pub fn start(&mut self, domid: DomainId) {
        let op = SetStart { domid, pad: [0; 3], entry: IMAGE_GPA, stack: 0, argument: 0 };
        assert_eq!(self.control(control::SET_START, op).0, 0, "SET_START");
        assert_eq!(self.control_domain(control::UNPAUSE, domid), 0, "UNPAUSE");
        self.prepare(domid);
    }

    fn prepare(&mut self, id: DomainId) {
        let shared = Gfn::containing(SHARED_INFO_GPA);
        assert_eq!(self.add_to_physmap(id, SPACE_SHARED_INFO, 0, shared), 0);
        let table = Gfn::containing(GRANT_TABLE_GPA);
        assert_eq!(self.add_to_physmap(id, SPACE_GRANT_TABLE, 0, table), 0);
    }

    /// `XENMEM_add_to_physmap`.
    pub fn add_to_physmap(&mut self, id: DomainId, space: u32, idx: u64, gfn: Gfn) -> i64 {
        let op = AddToPhysmap { domid: DomainId::SELF, size: 0, space, idx, gpfn: gfn.0 };
        self.call_with(id, MEMORY_OP, ADD_TO_PHYSMAP, op).0
    }

    /// Restarts a domain and starts its next incarnation.
    pub fn restart(&mut self, id: DomainId) {
        assert_eq!(self.control_domain(control::RESTART, id), 0, "RESTART");
        self.start(id);
    }

    /// Destroys a domain.
    pub fn destroy(&mut self, id: DomainId) {
        assert_eq!(self.control_domain(control::DESTROY, id), 0, "DESTROY");
    }

    /// What the core says about a domain, or about the next one.
    pub fn info(&mut self, domid: DomainId) -> DomainInfo {
        let mut op = DomainInfo::new_zeroed();
        op.domid = domid;
        let (result, op) = self.control(control::GET_INFO, op);
        assert_eq!(result, 0, "GET_INFO");
        op
    }

    /// Why a domain died last.
    pub fn death(&mut self, domid: DomainId) -> control::DeathRecord {
        let mut op = GetDeath::new_zeroed();
        op.domid = domid;
        let (result, op) = self.control(control::GET_DEATH, op);
        assert_eq!(result, 0, "GET_DEATH");
        op.record
    }

    /// Whether a domain lives.
    #[must_use]
    pub fn is_live(&self, id: DomainId) -> bool {
        let core = self.core.lock();
        core.domain(id).is_some_and(|domain| domain.stage == crate::domain::Stage::Live)
    }

    // Events.

    /// `EVTCHNOP_alloc_unbound` for itself.
    ///
    /// # Errors
    /// What the core answers.
    pub fn alloc_unbound(&mut self, id: DomainId, remote: DomainId) -> Result<EventPort, i64> {
        let op =
            AllocUnbound { dom: DomainId::SELF, remote_dom: remote, port: EventPort(u32::MAX) };
        let (result, op) = self.call_with(id, EVENT_CHANNEL_OP, event::ALLOC_UNBOUND, op);
        if result == 0 { Ok(op.port) } else { Err(result) }
    }

    /// `EVTCHNOP_bind_interdomain`.
    ///
    /// # Errors
    /// What the core answers.
    pub fn bind(
        &mut self,
        id: DomainId,
        remote_dom: DomainId,
        remote_port: EventPort,
    ) -> Result<EventPort, i64> {
        let op = BindInterdomain { remote_dom, pad: 0, remote_port, local_port: EventPort(0) };
        let (result, op) = self.call_with(id, EVENT_CHANNEL_OP, event::BIND_INTERDOMAIN, op);
        if result == 0 { Ok(op.local_port) } else { Err(result) }
    }

    /// `EVTCHNOP_bind_virq`.
    ///
    /// # Errors
    /// What the core answers.
    pub fn bind_virq(&mut self, id: DomainId, virq: u32) -> Result<EventPort, i64> {
        let op = BindVirq { virq, vcpu: 0, port: EventPort(0) };
        let (result, op) = self.call_with(id, EVENT_CHANNEL_OP, event::BIND_VIRQ, op);
        if result == 0 { Ok(op.port) } else { Err(result) }
    }

    /// `EVTCHNOP_send`.
    pub fn send(&mut self, id: DomainId, port: EventPort) -> i64 {
        self.call_with(id, EVENT_CHANNEL_OP, event::SEND, PortOp { port }).0
    }

    /// `EVTCHNOP_close`.
    pub fn close(&mut self, id: DomainId, port: EventPort) -> i64 {
        self.call_with(id, EVENT_CHANNEL_OP, event::CLOSE, PortOp { port }).0
    }

    /// Ends what a domain waits for, as an event would.
    ///
    /// # Panics
    /// There is no such domain.
    pub fn wake(&mut self, id: DomainId) {
        self.core.lock().wake(&mut self.p, VcpuId::first(id));
    }

    /// The same for one vCPU, if it waits for events.
    ///
    /// # Panics
    /// There is no such vCPU.
    pub fn wake_vcpu(&mut self, v: VcpuId) {
        let mut core = self.core.lock();
        if matches!(core.vcpu(v).wait, Wait::Event | Wait::Port(_)) {
            core.wake(&mut self.p, v);
        }
    }

    /// Whether a port of a domain is pending.
    ///
    /// # Panics
    /// There is no such domain.
    #[must_use]
    pub fn is_pending(&self, id: DomainId, port: EventPort) -> bool {
        let shared = self.core.lock().domain(id).expect("it exists").shared;
        let at = EVTCHN_PENDING + port.0 as usize / 8;
        self.p.load8(shared, at) & 1 << (port.0 % 8) != 0
    }

    /// Clears the pending bit of a port, as its owner does.
    ///
    /// # Panics
    /// There is no such domain.
    pub fn clear_pending(&mut self, id: DomainId, port: EventPort) {
        let shared = self.core.lock().domain(id).expect("it exists").shared;
        let at = EVTCHN_PENDING + port.0 as usize / 64 * 8;
        self.p.and64(shared, at, !(1 << (port.0 % 64)));
    }

    // Grants.

    /// Where a domain's own grant entry is.
    #[must_use]
    pub fn entry_gpa(gref: GrantRef) -> u64 {
        GRANT_TABLE_GPA + 8 * u64::from(gref.0)
    }

    /// Grants a page, as a domain does by itself.
    pub fn grant(&mut self, id: DomainId, gref: GrantRef, to: DomainId, gfn: Gfn, read_only: bool) {
        let flags = GTF_PERMIT_ACCESS | if read_only { GTF_READONLY } else { 0 };
        let frame = u32::try_from(gfn.0).expect("32 bits");
        let entry = GrantEntryV1 { flags, domid: to, frame };
        self.write(id, Self::entry_gpa(gref), entry.as_bytes());
    }

    /// A domain's grant entry.
    #[must_use]
    pub fn entry(&self, id: DomainId, gref: GrantRef) -> GrantEntryV1 {
        self.get(id, Self::entry_gpa(gref))
    }

    /// Takes a grant back as a domain does: answers whether nobody used it.
    pub fn revoke(&mut self, id: DomainId, gref: GrantRef) -> bool {
        let entry = self.entry(id, gref);
        let is_free = entry.flags & (GTF_READING | GTF_WRITING) == 0;
        if is_free {
            self.write(id, Self::entry_gpa(gref), &[0; 2]);
        }
        is_free
    }

    /// `GNTTABOP_map_grant_ref`; answers the handle.
    ///
    /// # Errors
    /// The status.
    pub fn map(
        &mut self,
        id: DomainId,
        dom: DomainId,
        gref: GrantRef,
        at: Gfn,
        read_only: bool,
    ) -> Result<u32, GrantStatus> {
        let flags = GNTMAP_HOST_MAP | if read_only { GNTMAP_READONLY } else { 0 };
        let mut op = MapGrantRef::new_zeroed();
        (op.flags, op.gref, op.dom, op.host_addr) = (flags, gref, dom, at.address());
        let (result, op) = self.call_with(id, GRANT_TABLE_OP, grant::MAP_GRANT_REF, op);
        assert_eq!(result, 0, "the status says it all");
        if op.status == GrantStatus::OKAY { Ok(op.handle) } else { Err(op.status) }
    }

    /// `GNTTABOP_unmap_grant_ref`.
    pub fn unmap(&mut self, id: DomainId, handle: u32, at: Gfn) -> GrantStatus {
        let mut op = UnmapGrantRef::new_zeroed();
        (op.handle, op.host_addr) = (handle, at.address());
        let (result, op) = self.call_with(id, GRANT_TABLE_OP, grant::UNMAP_GRANT_REF, op);
        assert_eq!(result, 0, "the status says it all");
        op.status
    }

    /// `GNTTABOP_copy`.
    pub fn copy(
        &mut self,
        id: DomainId,
        source: CopySide,
        dest: CopySide,
        len: u16,
    ) -> GrantStatus {
        let flags = if source.is_grant() { GNTCOPY_SOURCE_GREF } else { 0 }
            | if dest.is_grant() { GNTCOPY_DEST_GREF } else { 0 };
        let op = GrantCopy {
            source: source.pointer(),
            dest: dest.pointer(),
            len,
            flags,
            status: GrantStatus(1),
            pad: 0,
        };
        let (result, op) = self.call_with(id, GRANT_TABLE_OP, grant::COPY, op);
        assert_eq!(result, 0, "the status says it all");
        op.status
    }

    // Invariants.

    /// Checks what must be true between any two steps; under Miri, which takes seconds to walk all
    /// tables, only what the counts say. [`Self::check_whole`] walks them always.
    ///
    /// # Panics
    /// It is not.
    pub fn check(&self) {
        if cfg!(miri) {
            crate::invariants::check_counts(&self.core.lock());
        } else {
            self.check_whole();
        }
    }

    /// Checks what must be true between any two steps, in all tables.
    ///
    /// # Panics
    /// It is not.
    pub fn check_whole(&self) {
        crate::invariants::check(&self.p, &self.core.lock());
    }
}

/// One side of a copy.
#[derive(Clone, Copy, Debug)]
pub enum CopySide {
    /// A page of the caller, and an offset.
    Own(Gfn, u16),
    /// A grant of a domain, and an offset.
    Grant(DomainId, GrantRef, u16),
}

impl CopySide {
    const fn is_grant(self) -> bool {
        matches!(self, Self::Grant(..))
    }

    const fn pointer(self) -> CopyPtr {
        match self {
            Self::Own(gfn, offset) => {
                CopyPtr { frame: gfn.0, domid: DomainId::SELF, offset, pad: 0 }
            }
            Self::Grant(domid, gref, offset) => {
                CopyPtr { frame: gref.0 as u64, domid, offset, pad: 0 }
            }
        }
    }
}
