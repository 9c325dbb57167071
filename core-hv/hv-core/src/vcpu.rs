//! One virtual CPU, and its share of the processors.

use crate::domain::{NEVER, WATCHDOGS};
use crate::frame::Mfn;
use crate::platform::{GUEST_FRAMES, Platform, Registers};
use crate::pvh::Virtual;
use heapless::Vec;
use xen_abi::DomainId;

/// Most vCPUs of a domain.
pub const MAX_VCPUS: usize = 8;

/// A vCPU of a domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VcpuId {
    /// The domain.
    pub domain: DomainId,
    /// Which of its vCPUs, from 0.
    pub index: u8,
}

impl VcpuId {
    /// The first vCPU of a domain; a unikernel has no other.
    #[must_use]
    pub const fn first(domain: DomainId) -> Self {
        Self { domain, index: 0 }
    }
}

/// What a vCPU waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    /// Nothing: it runs or could.
    Nothing,
    /// Any event: `SCHEDOP_block`, or HLT with interrupts on.
    Event,
    /// Port, or 0 for several: `SCHEDOP_poll`.
    Port(u32),
    /// HLT with interrupts off: a non-maskable interrupt, or to be started anew.
    Nmi,
    /// To be started by another vCPU.
    Start,
}

/// A virtual CPU.
pub struct Vcpu<P: Platform> {
    /// Its registers; absent while a processor runs it.
    pub state: Option<P::Vcpu>,
    /// Where the machine layer keeps them: the first of its frames.
    pub frame: Mfn,
    /// All of them; of a unikernel's, one.
    pub frames: Vec<Mfn, GUEST_FRAMES>,
    /// Where its `vcpu_info` is: frame and offset.
    pub info: (Mfn, usize),
    /// Ports of the virtual interrupts that each vCPU has its own of, by number; 0: none.
    pub virqs: [u16; 2],
    /// What it waits for.
    pub wait: Wait,
    /// Which processor runs it.
    pub on_cpu: Option<u8>,
    /// It is in a run queue.
    pub queued: bool,
    /// Elements of a batch that are done, when a hypercall is to be continued.
    pub progress: u32,
    /// When `VIRQ_TIMER` is due.
    pub timer: u64,
    /// When a poll times out.
    pub poll_until: u64,
    /// When the domain dies unless it pokes.
    pub watchdogs: [u64; WATCHDOGS],
    /// CPU time that it may use per period at its class's priority, ns; 0: no limit.
    pub budget: u64,
    /// The period, ns.
    pub period: u64,
    /// Used in this period, ns.
    pub used: u64,
    /// When the period started.
    pub period_start: u64,
    /// It has used up its budget.
    pub exhausted: bool,
    /// How often that happened.
    pub overruns: u32,
    /// It shall fault as soon as no processor runs it.
    pub crash: bool,
    /// It was made to fault here.
    pub crashed_at: Option<u64>,
    /// CPU time of all incarnations, ns.
    pub cpu_ns: u64,
    /// Hypercalls of all incarnations.
    pub hypercalls: u64,
    /// What only a hardware-virtualized one has.
    pub virt: Virtual,
}

impl<P: Platform> Vcpu<P> {
    /// Stopped, with all registers 0.
    pub(crate) fn new(state: P::Vcpu, frames: &[Mfn], info: (Mfn, usize)) -> Self {
        Self {
            state: Some(state),
            frame: frames[0],
            frames: frames.iter().copied().collect(),
            info,
            virqs: [0; 2],
            wait: Wait::Nothing,
            on_cpu: None,
            queued: false,
            progress: 0,
            timer: NEVER,
            poll_until: NEVER,
            watchdogs: [NEVER; WATCHDOGS],
            budget: 0,
            period: 0,
            used: 0,
            period_start: 0,
            exhausted: false,
            overruns: 0,
            crash: false,
            crashed_at: None,
            cpu_ns: 0,
            hypercalls: 0,
            virt: Virtual::new(),
        }
    }

    /// The next time at which something happens to it without its doing.
    #[must_use]
    pub fn deadline(&self) -> u64 {
        let refill = if self.exhausted { self.period_start + self.period } else { NEVER };
        let dogs = self.watchdogs.iter().copied().min().unwrap_or(NEVER);
        self.timer.min(self.poll_until).min(dogs).min(refill)
    }

    /// Forgets everything that would happen at a set time.
    pub(crate) fn stop_timers(&mut self) {
        self.timer = NEVER;
        self.poll_until = NEVER;
        self.watchdogs = [NEVER; WATCHDOGS];
        self.exhausted = false;
    }

    /// Forgets what belongs to an incarnation.
    pub(crate) fn reset(&mut self) {
        if let Some(state) = &mut self.state {
            *P::registers_mut(state) = Registers { rflags: 0x202, ..Registers::default() };
        }
        self.stop_timers();
        self.wait = Wait::Nothing;
        self.progress = 0;
        self.used = 0;
        self.crash = false;
        self.crashed_at = None;
        self.virqs = [0; 2];
        self.virt = Virtual::new();
    }
}
