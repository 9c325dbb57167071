//! The control hypercall group: building and supervising domains.
//!
//! `rdi` is the operation, `rsi` a pointer to its argument structure, which is copied in once
//! and copied out when it has results. All operations need a right that the caller was created
//! with ([`Rights`]); without it the answer is `EPERM`, whatever the arguments. The interface is
//! versioned by [`VERSION`], which [`PHYSINFO`] returns.
//!
//! Life of a domain:
//!
//! ```text
//!  CREATE ──▶ Building ──UNPAUSE──▶ Running ◀──PAUSE/UNPAUSE──▶ Paused
//!                ▲                    │ fault, shutdown, watchdog, CRASH
//!                └──────RESTART────── Dead ──DESTROY──▶ (gone)
//! ```
//!
//! A domain that dies keeps its memory; at the instant of death the core stops its vCPU, clears
//! bus mastering and masks the interrupts of its devices, returns its peers' ports to *unbound*,
//! and records why. [`RESTART`] then gives up its grant mappings, empties its address space of
//! everything but memory, zeroes memory that is not preserved, and leaves it `Building` in its
//! next incarnation.

use bitflags::bitflags;
use core::mem::size_of;
use xen_abi::{DomainId, GrantRef};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version of this interface.
pub const VERSION: u32 = 1;

/// [`Create`]: `build`.
pub const CREATE: u64 = 0;
/// [`Populate`]: `build`; domain `Building`. May return `EAGAIN` with `done` advanced: call again.
pub const POPULATE: u64 = 1;
/// [`Load`]: `build`; domain `Building`.
pub const LOAD: u64 = 2;
/// [`SetStart`]: `build`; domain `Building`.
pub const SET_START: u64 = 3;
/// [`DomainOp`]: `build`. Starts a `Building` domain or continues a `Paused` one.
pub const UNPAUSE: u64 = 4;
/// [`DomainOp`]: `build`. `EAGAIN`: still running elsewhere, call again.
pub const PAUSE: u64 = 5;
/// [`DomainOp`]: `build`. Any state. `EAGAIN`: not finished, call again.
pub const DESTROY: u64 = 6;
/// [`DomainOp`]: `build`. Any state but `Building`; `EAGAIN`: not finished, call again.
pub const RESTART: u64 = 7;
/// [`DomainInfo`]: `build`. In: `domid`; out: the domain with the lowest id that is not below it.
pub const GET_INFO: u64 = 8;
/// [`GetDeath`]: `build`.
pub const GET_DEATH: u64 = 9;
/// [`AssignDevice`]: `build` and `devices`; domain `Building`.
pub const ASSIGN_DEVICE: u64 = 10;
/// [`PciFunction`]: `devices`. In: `index`; out: that function, `ENOENT` behind the last.
pub const GET_PCI_FUNCTION: u64 = 12;
/// [`ConsoleRead`]: `console`.
pub const CONSOLE_READ: u64 = 13;
/// [`PhysInfo`]: `build`.
pub const PHYSINFO: u64 = 14;
/// [`SetGrant`]: `build`; domain `Building`. Fills a reserved grant entry.
pub const SET_GRANT: u64 = 16;
/// [`DomainOp`]: `build`. Makes the domain's next instruction fault, as if it had called an
/// unmapped address.
pub const CRASH: u64 = 17;
/// [`SetHvmParam`]: `build`; PVH domain `Building`.
pub const SET_HVM_PARAM: u64 = 18;
/// [`ExitCounts`]: `build`.
pub const GET_EXITS: u64 = 19;

bitflags! {
    /// What a domain may do to others; fixed when it is created.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Rights: u32 {
        /// Create domains, and control those that it created.
        const BUILD = 1;
        /// Give PCI functions to domains.
        const DEVICES = 2;
        /// Read the consoles of all domains and of the core, write to the machine's console, and
        /// drive the second serial port (I/O ports 0x2f8..0x300, `VIRQ_CONSOLE`).
        const CONSOLE = 4;
    }
}

/// `Create::class`: control plane; above all else.
pub const CLASS_CONTROL: u8 = 0;
/// `Create::class`: driver domains; above guests while their budget lasts.
pub const CLASS_DRIVER: u8 = 1;
/// `Create::class`: guests.
pub const CLASS_GUEST: u8 = 2;

/// `Create::kind`: runs in ring 3 on its p2m.
pub const KIND_UNIKERNEL: u8 = 0;

/// `Create::kind`: brings a kernel of its own and runs under hardware virtualization, with its p2m
/// as nested page table. `CREATE` answers `ENODEV` where the machine has none.
pub const KIND_PVH: u8 = 1;

/// `Create::domid`: the core chooses.
pub const ANY_DOMAIN: DomainId = DomainId(0xffff);

/// Makes an empty domain.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Create {
    /// NUL-padded, for the core's messages.
    pub name: [u8; 32],
    /// In: wanted id or [`ANY_DOMAIN`]; out: the id.
    pub domid: DomainId,
    /// `KIND_*`.
    pub kind: u8,
    /// `CLASS_*`.
    pub class: u8,
    /// [`Rights`]; must be among the caller's own.
    pub rights: u32,
    /// Frames that may be charged to it: memory, page tables, tables of its own.
    pub max_pages: u32,
    /// CPU time that it may use at its class's priority in each period, in µs; 0: no limit.
    /// A vCPU that has used it up runs at the lowest priority until the period ends.
    pub budget_us: u32,
    /// The period in µs.
    pub period_us: u32,
    /// vCPUs; 0 means 1. A unikernel has one.
    pub vcpus: u32,
}
const _: () = assert!(size_of::<Create>() == 56);

/// `Populate::flags`: content outlives an incarnation.
pub const POPULATE_PRESERVED: u32 = 1;
/// `Populate::flags`: pages that are there already are done: for a PVH domain's next incarnation,
/// whose last one may have given memory back.
pub const POPULATE_MISSING: u32 = 2;

/// Puts fresh, zeroed memory into an address range.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Populate {
    /// Which domain.
    pub domid: DomainId,
    /// Padding.
    pub pad: u16,
    /// `ACCESS_*` of [`crate::image`].
    pub access: u32,
    /// `POPULATE_*`.
    pub flags: u32,
    /// Pages wanted.
    pub count: u32,
    /// First page; all must be empty.
    pub gfn: u64,
    /// In: pages done by earlier calls, 0 at first; out: pages done.
    pub done: u64,
}
const _: () = assert!(size_of::<Populate>() == 32);

/// Copies bytes into a domain's memory, whatever access the domain has to it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Load {
    /// Which domain.
    pub domid: DomainId,
    /// Padding.
    pub pad: u16,
    /// Bytes, at most 65,536.
    pub len: u32,
    /// Guest-physical address in that domain.
    pub gpa: u64,
    /// Pointer in the caller.
    pub source: u64,
}
const _: () = assert!(size_of::<Load>() == 24);

/// Sets the registers of a unikernel's first instruction, see [`crate::start`]. A PVH domain
/// begins at `entry`, below 4 GiB, in 32-bit protected mode with `argument`, the address of its
/// start info, in EBX; `stack` is 0.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetStart {
    /// Which domain.
    pub domid: DomainId,
    /// Padding.
    pub pad: [u16; 3],
    /// `rip`.
    pub entry: u64,
    /// `rsp`.
    pub stack: u64,
    /// `rdi`.
    pub argument: u64,
}
const _: () = assert!(size_of::<SetStart>() == 32);

/// Sets a parameter that a PVH domain reads by `HVMOP_get_param`: where its rings are.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetHvmParam {
    /// Which domain.
    pub domid: DomainId,
    /// Padding.
    pub pad: u16,
    /// Which of `xen_abi::hvm::params`.
    pub index: u32,
    /// Its value.
    pub value: u64,
}
const _: () = assert!(size_of::<SetHvmParam>() == 16);

/// `ExitCounts::exits`: CPUID.
pub const EXIT_CPUID: usize = 0;
/// `ExitCounts::exits`: RDMSR and WRMSR.
pub const EXIT_MSR: usize = 1;
/// `ExitCounts::exits`: HLT.
pub const EXIT_HALT: usize = 2;
/// `ExitCounts::exits`: hypercalls.
pub const EXIT_HYPERCALL: usize = 3;
/// `ExitCounts::exits`: I/O ports.
pub const EXIT_PORT: usize = 4;
/// `ExitCounts::exits`: memory that is not there.
pub const EXIT_MEMORY: usize = 5;
/// `ExitCounts::exits`: interrupts became possible.
pub const EXIT_WINDOW: usize = 6;
/// `ExitCounts::exits`: everything else that the guest did.
pub const EXIT_OTHER: usize = 7;
/// Reasons that are counted.
pub const EXIT_REASONS: usize = 8;

/// How often, and why, the vCPUs of a PVH domain needed the core; of all incarnations.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ExitCounts {
    /// Which domain.
    pub domid: DomainId,
    /// Padding.
    pub pad: [u16; 3],
    /// Out: by `EXIT_*`.
    pub exits: [u64; EXIT_REASONS],
    /// Out: accesses to MSRs, ports, memory and hypercalls that no specification lists.
    pub unlisted: u64,
    /// Out: the last of them. 32..64: 1 MSR read, 2 MSR written, 3 port, 4 memory, 5 hypercall;
    /// 0..32: the number, page, or number << 16 | command.
    pub last_unlisted: u64,
}
const _: () = assert!(size_of::<ExitCounts>() == 88);

/// An operation that needs nothing but a domain.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DomainOp {
    /// Which domain.
    pub domid: DomainId,
}
const _: () = assert!(size_of::<DomainOp>() == 2);

/// `DomainInfo::state`: being filled; has not started.
pub const STATE_BUILDING: u8 = 0;
/// `DomainInfo::state`: running or ready to.
pub const STATE_RUNNING: u8 = 1;
/// `DomainInfo::state`: waits for an event.
pub const STATE_BLOCKED: u8 = 2;
/// `DomainInfo::state`: stopped by its builder.
pub const STATE_PAUSED: u8 = 3;
/// `DomainInfo::state`: ended, see `GetDeath`.
pub const STATE_DEAD: u8 = 4;
/// `DomainInfo::state`: being destroyed.
pub const STATE_DYING: u8 = 5;

/// `DomainInfo::flags`: owns a device whose DMA nothing confines.
pub const INFO_DMA_TRUSTED: u8 = 1;

/// What the core knows of a domain.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DomainInfo {
    /// In: least id; out: the id.
    pub domid: DomainId,
    /// `STATE_*`.
    pub state: u8,
    /// `CLASS_*`.
    pub class: u8,
    /// From 1.
    pub incarnation: u32,
    /// Frames charged to it now.
    pub pages: u32,
    /// Most frames.
    pub max_pages: u32,
    /// CPU time of all incarnations.
    pub cpu_ns: u64,
    /// System time at which this incarnation started; 0 before.
    pub started_ns: u64,
    /// Hypercalls of all incarnations.
    pub hypercalls: u64,
    /// `INFO_*`.
    pub flags: u8,
    /// `KIND_*`.
    pub kind: u8,
    /// vCPUs.
    pub vcpus: u8,
    /// Padding.
    pub pad: u8,
    /// Grants of others that it has mapped.
    pub mapped_grants: u32,
    /// Event ports in use.
    pub ports: u32,
    /// Times that its budget ran out.
    pub budget_overruns: u32,
    /// NUL-padded.
    pub name: [u8; 32],
}
const _: () = assert!(size_of::<DomainInfo>() == 88);

/// `DeathRecord::cause`: a processor exception; `vector`, `error` and `address` say which.
pub const DEATH_FAULT: u32 = 1;
/// `DeathRecord::cause`: `SCHEDOP_shutdown`; `detail` is its reason.
pub const DEATH_SHUTDOWN: u32 = 2;
/// `DeathRecord::cause`: a watchdog ran out.
pub const DEATH_WATCHDOG: u32 = 3;
/// `DeathRecord::cause`: [`CRASH`], and the fault that it made.
pub const DEATH_CRASHED: u32 = 4;
/// `DeathRecord::cause`: broke a rule of the ABI that no correct domain breaks; `detail` says
/// which.
pub const DEATH_RULE: u32 = 5;
/// `DeathRecord::cause`: [`RESTART`] while it was alive.
pub const DEATH_RESTARTED: u32 = 6;

/// Why an incarnation ended.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeathRecord {
    /// Which life ended; 0 when none has.
    pub incarnation: u32,
    /// `DEATH_*`.
    pub cause: u32,
    /// Meaning set by `cause`.
    pub detail: u32,
    /// Exception number.
    pub vector: u32,
    /// Exception error code.
    pub error: u64,
    /// CR2 of a page fault.
    pub address: u64,
    /// System time of death.
    pub time_ns: u64,
    /// How long the incarnation had run.
    pub lived_ns: u64,
    /// System time at which this record's domain was first able to run again; 0 before. Kept so
    /// that an outage can be measured.
    pub restarted_ns: u64,
    /// Registers: rax rbx rcx rdx rsi rdi rbp rsp r8..r15.
    pub registers: [u64; 16],
    /// `rip`.
    pub rip: u64,
    /// `rflags`.
    pub rflags: u64,
    /// Return addresses, innermost first, 0 behind the last.
    pub backtrace: [u64; 16],
}
const _: () = assert!(size_of::<DeathRecord>() == 328);

/// Reads the record of the last death.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GetDeath {
    /// Which domain.
    pub domid: DomainId,
    /// Padding.
    pub pad: [u16; 3],
    /// Out.
    pub record: DeathRecord,
}
const _: () = assert!(size_of::<GetDeath>() == 336);

/// `AssignDevice::flags`: start without an IOMMU; the device can reach all memory.
pub const ASSIGN_DMA_TRUSTED: u32 = 1;

/// Gives a PCI function to a domain and maps its memory BARs, uncached, one behind the other
/// from `gpa` on, each aligned to its size. Stays over restarts: the core maps the BARs again at
/// the same places on [`RESTART`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AssignDevice {
    /// Which domain.
    pub domid: DomainId,
    /// Padding.
    pub pad: u16,
    /// Which function.
    pub bdf: u32,
    /// `ASSIGN_*`.
    pub flags: u32,
    /// Padding.
    pub pad2: u32,
    /// In: first address for BARs; out: first address behind them.
    pub gpa: u64,
}
const _: () = assert!(size_of::<AssignDevice>() == 24);

/// A PCI function as the core enumerated it. `bdf` is segment << 16 | bus << 8 | device << 3 |
/// function.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PciFunction {
    /// In: which, from 0.
    pub index: u32,
    /// Where.
    pub bdf: u32,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class << 16 | subclass << 8 | programming interface.
    pub class: u32,
    /// Owner, or `INVALID`.
    pub owner: DomainId,
    /// MSI-X vectors.
    pub msix_vectors: u16,
    /// MSI vectors.
    pub msi_vectors: u16,
    /// Padding.
    pub pad: u16,
}
const _: () = assert!(size_of::<PciFunction>() == 24);

/// `ConsoleRead::domid`: the core's own log.
pub const CONSOLE_OF_CORE: DomainId = DomainId(0x7ff2);

/// Reads from the ring that holds a domain's last console bytes; nothing is consumed.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConsoleRead {
    /// Whose, or [`CONSOLE_OF_CORE`].
    pub domid: DomainId,
    /// Padding.
    pub pad: u16,
    /// In: room at `buffer`, at most 4096; out: bytes copied.
    pub len: u32,
    /// Pointer in the caller.
    pub buffer: u64,
    /// In: bytes ever written before the first one wanted; out: moved forward to the oldest one
    /// still there, then past what was copied.
    pub position: u64,
}
const _: () = assert!(size_of::<ConsoleRead>() == 24);

/// The machine.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PhysInfo {
    /// [`VERSION`].
    pub version: u32,
    /// Processors that run domains.
    pub cpus: u32,
    /// Frames that the core manages.
    pub total_pages: u64,
    /// Of these, free.
    pub free_pages: u64,
    /// Frames that the core itself uses.
    pub core_pages: u64,
    /// TSC frequency.
    pub tsc_khz: u64,
    /// System time at which the core was entered, and now. The first is 0 by definition.
    pub now_ns: u64,
    /// System time at which the control domain started.
    pub control_started_ns: u64,
    /// Unix time at system time 0, seconds; 0 when unknown.
    pub boot_unix_s: u64,
}
const _: () = assert!(size_of::<PhysInfo>() == 64);

/// Fills one of the reserved grant entries of a domain.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetGrant {
    /// Whose table.
    pub domid: DomainId,
    /// Who may map the page.
    pub grantee: DomainId,
    /// Which entry, below 8.
    pub gref: GrantRef,
    /// The page.
    pub gfn: u64,
}
const _: () = assert!(size_of::<SetGrant>() == 16);

/// The name of a processor exception. Source: AMD64 manual, volume 2, 8.2.
#[must_use]
pub const fn vector_name(vector: u32) -> &'static str {
    match vector {
        0 => "divide error",
        1 => "debug exception",
        2 => "non-maskable interrupt",
        3 => "breakpoint",
        4 => "overflow",
        5 => "bound range exceeded",
        6 => "invalid opcode",
        7 => "device not available",
        8 => "double fault",
        10 => "invalid TSS",
        11 => "segment not present",
        12 => "stack fault",
        13 => "general protection fault",
        14 => "page fault",
        16 => "x87 floating-point exception",
        17 => "alignment check",
        18 => "machine check",
        19 => "SIMD floating-point exception",
        _ => "unknown exception",
    }
}
