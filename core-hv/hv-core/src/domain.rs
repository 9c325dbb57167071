//! Domains: what one consists of, and how it ends.

use crate::frame::{Account, Mfn, Table};
use crate::p2m::P2m;
use crate::platform::{Bdf, CpuId, Platform, Registers};
use crate::pvh::Pvh;
use crate::state::Core;
use crate::vcpu::{MAX_VCPUS, Vcpu, Wait};
use axolotl_abi::control::{self, DeathRecord, Rights};
use core::fmt;
use heapless::Vec;
use xen_abi::{DomainId, Gfn, event, shared_info};

/// Most domains; ids are below it.
pub const MAX_DOMAINS: usize = 64;
/// Most PCI functions of one domain.
pub const MAX_DEVICES: usize = 8;
/// Watchdogs of a domain.
pub const WATCHDOGS: usize = 2;
/// Frames of a domain's table of foreign grants, which bound how many it has mapped, and so how
/// many frames of others it can keep from being free.
const MAP_FRAMES: usize = 16;
/// A time that never comes.
pub const NEVER: u64 = u64::MAX;

/// Where a domain is between creation and destruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Its builder fills it.
    Building,
    /// It runs, waits, or is paused.
    Live,
    /// It ended. Its memory is as it was.
    Dead,
    /// It ended and is being emptied for its next incarnation: the step that is next.
    Restarting(Step),
    /// It is being destroyed: the step that is next.
    Dying(Step),
}

/// The steps of emptying a domain, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// No device of it may still reach memory.
    Devices,
    /// Foreign pages that it has mapped go back; from this handle on.
    Grants(u32),
    /// Its own tables are emptied.
    Tables,
    /// Its memory is zeroed or freed; from this page on.
    Memory(Gfn),
    /// No processor may have its root table loaded.
    Processors,
}

/// Why an incarnation ends, see `DeathRecord`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cause {
    /// `DEATH_*`.
    pub cause: u32,
    /// Meaning set by `cause`.
    pub detail: u32,
    /// Exception number.
    pub vector: u8,
    /// Exception error code.
    pub error: u64,
    /// CR2.
    pub address: u64,
}

impl Cause {
    /// A cause with nothing but a detail.
    #[must_use]
    pub const fn new(cause: u32, detail: u32) -> Self {
        Self { cause, detail, vector: 0, error: 0, address: 0 }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause {
            control::DEATH_FAULT => f.write_str(control::vector_name(self.vector.into())),
            control::DEATH_SHUTDOWN => write!(f, "shutdown for reason {}", self.detail),
            control::DEATH_WATCHDOG => f.write_str("watchdog"),
            control::DEATH_RESTARTED => f.write_str("restarted"),
            other => write!(f, "cause {other}"),
        }
    }
}

/// The event ports of a domain, see [`crate::event`].
pub struct Ports {
    /// Entries of 8 bytes.
    pub table: Table<2>,
    /// No port below it is free.
    pub hint: u32,
    /// In use.
    pub used: u32,
    /// Port of each virtual interrupt that a domain has once, 0: none.
    pub virqs: [u16; event::NR_VIRQS as usize],
}

/// The grant table of a domain and its view of others', see `grant`.
pub struct Grants {
    /// Entries that the domain shares with the core.
    pub shared: Table<{ xen_abi::grant::MAX_FRAMES as usize }>,
    /// For each of them, how it is in use: 16 bytes.
    pub active: Table<{ 2 * xen_abi::grant::MAX_FRAMES as usize }>,
    /// Where each shared frame is mapped.
    pub places: [Option<Gfn>; xen_abi::grant::MAX_FRAMES as usize],
    /// Foreign grants that it has mapped: 32 bytes each.
    pub maps: Table<MAP_FRAMES>,
    /// First free entry of `maps` + 1, 0: none.
    pub free_map: u32,
    /// Entries of `maps` in use.
    pub mapped: u32,
}

/// A domain.
pub struct Domain<P: Platform> {
    /// Its id.
    pub id: DomainId,
    /// NUL-padded.
    pub name: [u8; 32],
    /// `CLASS_*`.
    pub class: u8,
    /// What it may do to others.
    pub rights: Rights,
    /// Who created it; nobody, for the control domain.
    pub builder: Option<DomainId>,
    /// Its memory.
    pub account: Account,
    /// Where it is in its life.
    pub stage: Stage,
    /// Its builder stopped it.
    pub paused: bool,
    /// Which life this is, from 1.
    pub incarnation: u32,
    /// The same, but never equal for two lives of any two domains.
    pub life: u64,
    /// System time at which this incarnation started, 0 before.
    pub started_ns: u64,
    /// Its address space.
    pub p2m: P2m,
    /// Its shared-info page.
    pub shared: Mfn,
    /// Where it has it mapped.
    pub shared_place: Option<Gfn>,
    /// Its console: the last 4096 bytes.
    pub console: Mfn,
    /// Bytes ever written to it.
    pub console_written: u64,
    /// Its event ports.
    pub ports: Ports,
    /// Its grants.
    pub grants: Grants,
    /// Its vCPUs, at least one.
    pub vcpus: Vec<Vcpu<P>, MAX_VCPUS>,
    /// Which of them is in the core, when one is.
    pub acting: u8,
    /// It shall die as soon as no processor runs any of its vCPUs: why, and by which vCPU's doing.
    pub doomed: Option<(Cause, u8)>,
    /// The only vCPU that may run, because it narrows the address space.
    pub alone: Option<u8>,
    /// What only a hardware-virtualized domain has.
    pub pvh: Option<Pvh>,
    /// Its PCI functions, in order of assignment.
    pub devices: Vec<Bdf, MAX_DEVICES>,
    /// How its last life ended.
    pub death: DeathRecord,
}

impl<P: Platform> Domain<P> {
    /// `DomainInfo::state`.
    #[must_use]
    pub fn state(&self) -> u8 {
        match self.stage {
            Stage::Building => control::STATE_BUILDING,
            Stage::Dead | Stage::Restarting(_) => control::STATE_DEAD,
            Stage::Dying(_) => control::STATE_DYING,
            Stage::Live if self.paused => control::STATE_PAUSED,
            Stage::Live if self.vcpus.iter().all(|vcpu| vcpu.wait != Wait::Nothing) => {
                control::STATE_BLOCKED
            }
            Stage::Live => control::STATE_RUNNING,
        }
    }

    /// Whether a vCPU of it could use a processor.
    #[must_use]
    #[inline]
    pub fn is_runnable(&self, index: u8) -> bool {
        self.stage == Stage::Live
            && !self.paused
            && self.doomed.is_none()
            && self.alone.is_none_or(|only| only == index)
            && self.vcpus[usize::from(index)].wait == Wait::Nothing
    }

    /// The vCPU that is in the core; of a domain that does not act itself, the first.
    #[must_use]
    pub fn vcpu(&self) -> &Vcpu<P> {
        &self.vcpus[usize::from(self.acting)]
    }

    /// As [`Self::vcpu`].
    pub fn vcpu_mut(&mut self) -> &mut Vcpu<P> {
        &mut self.vcpus[usize::from(self.acting)]
    }

    /// Processors that run vCPUs of it.
    pub fn processors(&self) -> impl Iterator<Item = CpuId> + '_ {
        self.vcpus.iter().filter_map(|vcpu| vcpu.on_cpu.map(CpuId))
    }

    /// Whether processors run vCPUs of it.
    #[must_use]
    pub fn is_on_cpu(&self) -> bool {
        self.processors().next().is_some()
    }

    /// The next time at which something happens to it without its doing.
    #[must_use]
    pub fn deadline(&self) -> u64 {
        self.vcpus.iter().map(Vcpu::deadline).min().unwrap_or(NEVER)
    }

    /// Whether its grants can be used and its events be raised.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        matches!(self.stage, Stage::Building | Stage::Live)
    }

    /// The run queue that a vCPU belongs to.
    #[must_use]
    #[inline]
    pub fn queue(&self, index: u8) -> usize {
        let exhausted = self.vcpus[usize::from(index)].exhausted;
        if exhausted { crate::sched::EXHAUSTED } else { self.class.into() }
    }

    /// Name without its padding.
    #[must_use]
    pub fn name(&self) -> &str {
        text(&self.name)
    }
}

/// The readable part of a NUL-padded name.
#[must_use]
pub fn text(name: &[u8]) -> &str {
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    core::str::from_utf8(&name[..end]).unwrap_or("?")
}

impl<P: Platform> Core<P> {
    /// Fills the wall clock of a shared-info page that nobody reads yet.
    pub(crate) fn write_wall_clock(p: &mut P, shared: Mfn) {
        let seconds = p.clock().unix_at_zero_s.to_le_bytes();
        p.write(shared, shared_info::WC_SEC, &seconds[..4]);
        p.write(shared, shared_info::WC_SEC_HI, &seconds[4..]);
        p.store32(shared, shared_info::WC_VERSION, 2);
    }

    /// Ends the life of a domain whose vCPUs no processor runs, or whose registers the caller has:
    /// stops its devices, closes its ports, records why, and tells the control plane. Its memory
    /// and its mappings of foreign pages stay until it is restarted or destroyed.
    pub(crate) fn die(&mut self, p: &mut P, id: DomainId, cause: Cause, registers: &Registers) {
        let now = p.now_ns();
        for index in 0..self.me(id).devices.len() {
            let bdf = self.me(id).devices[index];
            self.pci.quiesce(p, bdf);
        }
        self.close_all(p, id);
        self.sched.forget(id);
        self.forget_areas(id);
        let record = self.death_record(p, id, cause, registers, now);
        let domain = self.me_mut(id);
        domain.stage = Stage::Dead;
        domain.doomed = None;
        domain.alone = None;
        for vcpu in &mut domain.vcpus {
            vcpu.queued = false;
            vcpu.stop_timers();
            vcpu.crash = false;
        }
        domain.death = record;
        let (name, life) = (domain.name, domain.incarnation);
        self.update_deadline(p, id);
        self.print(
            p,
            format_args!(
                "{} ({id}) incarnation {life} died: {cause} at {:#x}",
                text(&name),
                registers.rip
            ),
        );
        self.raise_global(p, event::VIRQ_DOM_EXC);
    }

    fn death_record(
        &self,
        p: &P,
        id: DomainId,
        cause: Cause,
        r: &Registers,
        now: u64,
    ) -> DeathRecord {
        let domain = self.me(id);
        let crashed_at = domain.vcpus[0].crashed_at;
        let crashed = crashed_at.is_some() && cause.cause == control::DEATH_FAULT;
        // A kernel of its own has addresses of its own.
        let backtrace = match domain.pvh {
            None => backtrace(p, &domain.p2m, crashed_at, r.rbp),
            Some(_) => [0; 16],
        };
        let lived = if domain.started_ns == 0 { 0 } else { now.saturating_sub(domain.started_ns) };
        DeathRecord {
            incarnation: domain.incarnation,
            cause: if crashed { control::DEATH_CRASHED } else { cause.cause },
            detail: cause.detail,
            vector: cause.vector.into(),
            error: cause.error,
            address: cause.address,
            time_ns: now,
            lived_ns: lived,
            restarted_ns: 0,
            registers: [
                r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11,
                r.r12, r.r13, r.r14, r.r15,
            ],
            rip: r.rip,
            rflags: r.rflags,
            backtrace,
        }
    }
}

/// Follows the chain of saved frame pointers, which only ever goes up.
fn backtrace<P: Platform>(p: &P, p2m: &P2m, called_from: Option<u64>, rbp: u64) -> [u64; 16] {
    let mut addresses = [0; 16];
    let first = usize::from(called_from.is_some());
    addresses[0] = called_from.unwrap_or(0);
    let mut frame = rbp;
    for address in &mut addresses[first..] {
        let mut words = [[0; 8]; 2];
        if !frame.is_multiple_of(8)
            || crate::access::read(p, p2m, frame, words.as_flattened_mut()).is_err()
        {
            break;
        }
        *address = u64::from_le_bytes(words[1]);
        let next = u64::from_le_bytes(words[0]);
        if *address == 0 || next <= frame {
            break;
        }
        frame = next;
    }
    addresses
}
