//! What a domain with a kernel of its own finds in place of a machine (`xen-abi.md` §1–§5).
//!
//! A PVH domain runs under hardware virtualization; its memory is the same kind of address space
//! as a unikernel's, as nested page table. What it does beyond computing ends
//! `Platform::run_guest` with a reason, and is decided here, without a processor:
//!
//! | module | decides |
//! |---|---|
//! | `exits` | what becomes of each reason |
//! | [`cpuid`] | what the processor says of itself |
//! | `msr`, `ports`, `memory` | what there is behind MSRs, I/O ports, and where no memory is |
//! | [`lapic`] | interrupts between vCPUs |
//! | `hypercalls` | the hypercalls that only such a domain has |
//! | `areas` | what the core writes into the domain's own memory |
//! | [`decode`], [`walk`] | an instruction, a linear address |
//!
//! Everything that a kernel asks for and that is not listed in the specification is answered as
//! it says there, and counted.

mod areas;
pub mod cpuid;
pub mod decode;
mod exits;
mod hypercalls;
pub mod lapic;
mod memory;
mod msr;
mod ports;
pub mod walk;

use crate::platform::Mode;
use areas::Runstate;
pub(crate) use areas::first_info;
use axolotl_abi::control::EXIT_REASONS;
use lapic::Lapic;
use msr::MemoryTypes;

/// What only a hardware-virtualized vCPU has.
#[derive(Debug)]
pub struct Virtual {
    /// How it ran when it last stopped.
    pub mode: Mode,
    /// Whether it had interrupts on then.
    pub interrupts: bool,
    /// Its local APIC.
    pub lapic: Lapic,
    /// A non-maskable interrupt waits for it.
    pub nmi: bool,
    /// It shall be as after INIT as soon as no processor runs it.
    pub reset: bool,
    /// And begin at this page then.
    pub start_page: Option<u8>,
    /// By how much its TSC is ahead of the machine's, modulo 2^64.
    pub tsc_offset: u64,
    pub(crate) runstate: Runstate,
}

impl Virtual {
    /// As after power-on.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            mode: Mode {
                cr0: 0,
                cr3: 0,
                cr4: 0,
                efer: 0,
                cs_base: 0,
                ds_base: 0,
                es_base: 0,
                code_bits: 32,
                cpl: 0,
            },
            interrupts: false,
            lapic: Lapic::new(),
            nmi: false,
            reset: false,
            start_page: None,
            tsc_offset: 0,
            runstate: Runstate::new(),
        }
    }
}

impl Default for Virtual {
    fn default() -> Self {
        Self::new()
    }
}

/// What only a hardware-virtualized domain has.
#[derive(Debug)]
pub struct Pvh {
    /// The vector that events come by.
    pub callback: Option<u8>,
    /// Parameters that its builder sets, by `params::index`.
    pub(crate) params: [u64; 4],
    pub(crate) memory_types: MemoryTypes,
    /// How often its vCPUs stopped, by reason.
    pub exits: [u64; EXIT_REASONS],
    /// Accesses that the specification does not list.
    pub unlisted: u64,
    /// The last of them: kind << 32 | number.
    pub last_unlisted: u64,
}

impl Pvh {
    /// Before its first instruction.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            callback: None,
            params: [0; 4],
            memory_types: MemoryTypes::new(),
            exits: [0; EXIT_REASONS],
            unlisted: 0,
            last_unlisted: 0,
        }
    }

    /// Forgets what belongs to an incarnation.
    pub(crate) fn reset(&mut self) {
        let (exits, unlisted, last_unlisted) = (self.exits, self.unlisted, self.last_unlisted);
        *self = Self { exits, unlisted, last_unlisted, ..Self::new() };
    }

    pub(crate) fn note_unlisted(&mut self, kind: Unlisted, number: u32) {
        self.unlisted += 1;
        self.last_unlisted = (kind as u64) << 32 | u64::from(number);
    }
}

impl Default for Pvh {
    fn default() -> Self {
        Self::new()
    }
}

/// What kind of access was not listed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unlisted {
    /// RDMSR.
    ReadMsr = 1,
    /// WRMSR.
    WriteMsr = 2,
    /// An I/O port.
    Port = 3,
    /// Memory where there is none; the frame.
    Memory = 4,
    /// A hypercall; number << 16 | command.
    Hypercall = 5,
}
