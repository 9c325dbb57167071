//! One processor's loop.

use crate::domain::Cause;
use crate::fault::Fault;
use crate::hypercall;
use crate::platform::{Exit, HYPERCALL_BYTES, Platform, Space};
use crate::sched::Next;
use crate::state::Core;
use crate::vcpu::VcpuId;
use axolotl_abi::control::{DEATH_FAULT, Rights};
use xen_abi::{DomainId, event};

/// Where a domain that is made to crash goes on. No unikernel has a page there; if one maps a
/// grant there, that is not executable.
const NOWHERE: u64 = 0x7ead_dead_d000;

/// A vCPU on a processor.
struct Running<V> {
    v: VcpuId,
    state: V,
    space: Space,
    how: How,
}

/// How a vCPU runs.
#[derive(Clone, Copy)]
enum How {
    /// In ring 3; whether with the second serial port.
    Ring3 { ports: bool },
    /// Hardware-virtualized; whether it shall stop as soon as it can take an interrupt.
    Guest { window: bool },
}

/// What one processor keeps between two steps.
pub struct CpuLoop<P: Platform> {
    running: Option<Running<P::Vcpu>>,
    /// It found nothing to run: the next step waits.
    waits: bool,
}

impl<P: Platform> Default for CpuLoop<P> {
    fn default() -> Self {
        Self::new()
    }
}

impl<P: Platform> CpuLoop<P> {
    /// A processor that runs nothing yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { running: None, waits: false }
    }

    /// Registers of a domain, if this is the processor that runs it.
    #[cfg(any(test, feature = "fake"))]
    pub(crate) fn running_registers(&self, id: DomainId) -> Option<&crate::platform::Registers> {
        let running = self.running.as_ref().filter(|running| running.v.domain == id)?;
        Some(P::registers(&running.state))
    }

    /// Runs a vCPU until it stops, or waits, and deals with the reason.
    pub fn step(&mut self, p: &mut P, core: &spin::Mutex<Core<P>>) {
        let Some(running) = &mut self.running else {
            return self.idle(p, core);
        };
        let exit = match running.how {
            How::Ring3 { ports } => p.run(&mut running.state, running.space, ports),
            How::Guest { window } => p.run_guest(&mut running.state, running.space, window),
        };
        if exit == Exit::Hypercall {
            let registers = P::registers_mut(&mut running.state);
            if let Some(answer) = hypercall::without_core(registers) {
                registers.rax = answer;
                return;
            }
        }
        let mut core = core.lock();
        core.entered_space(p);
        core.exited(p, running.v, &mut running.state, exit);
        if matches!(running.how, How::Guest { .. }) {
            core.obey(running.v, &mut running.state);
        }
        if core.decide(p, running.v) == Next::Stay {
            running.space = core.me(running.v.domain).p2m.space();
            if let How::Guest { window } = &mut running.how {
                *window = core.prepare(p, running.v, &mut running.state);
            }
        } else if let Some(Running { v, mut state, how, .. }) = self.running.take() {
            if matches!(how, How::Guest { .. }) {
                core.leave(p, v, &mut state);
            }
            core.put_away(p, v, state);
            core.apply_orders(p, v);
            self.running = Self::pick(p, &mut core);
        }
        core.arm_timer(p);
    }

    fn idle(&mut self, p: &mut P, core: &spin::Mutex<Core<P>>) {
        if core::mem::take(&mut self.waits) {
            let exit = p.wait();
            let mut core = core.lock();
            core.left_space(p);
            core.interrupted(p, exit);
            return;
        }
        let mut core = core.lock();
        core.tick(p);
        self.running = Self::pick(p, &mut core);
        if self.running.is_none() {
            core.go_idle(p);
            self.waits = true;
        }
        core.arm_timer(p);
    }

    fn pick(p: &mut P, core: &mut Core<P>) -> Option<Running<P::Vcpu>> {
        let (v, mut state) = core.pick(p)?;
        let domain = core.me(v.domain);
        let space = domain.p2m.space();
        let ports = domain.rights.contains(Rights::CONSOLE);
        let how = if domain.pvh.is_some() {
            core.enter(p, v);
            How::Guest { window: core.prepare(p, v, &mut state) }
        } else {
            How::Ring3 { ports }
        };
        Some(Running { v, state, space, how })
    }
}

/// Runs domains on this processor, forever. The machine layer calls it on each processor once
/// [`Core::start_control`] is done.
pub fn cpu_loop<P: Platform>(p: &mut P, core: &spin::Mutex<Core<P>>) -> ! {
    let mut cpu = CpuLoop::new();
    loop {
        cpu.step(p, core);
    }
}

impl<P: Platform> Core<P> {
    /// Deals with the reason why a vCPU stopped.
    fn exited(&mut self, p: &mut P, v: VcpuId, state: &mut P::Vcpu, exit: Exit) {
        match exit {
            Exit::Hypercall => self.hypercall(p, v.domain, state),
            Exit::Guest(exit) => self.guest_exit(p, v, state, exit),
            Exit::Fault { vector, error, address } => {
                let cause = Cause { cause: DEATH_FAULT, detail: 0, vector, error, address };
                self.me_mut(v.domain).doomed = Some((cause, v.index));
            }
            other => self.interrupted(p, other),
        }
        // With its registers at hand: nobody else may be ordered to wait for that.
        if self.me(v.domain).doomed.is_some() {
            let registers = *P::registers(state);
            self.settle(p, v.domain, Some((v.index, &registers)));
        } else if core::mem::take(&mut self.vcpu_mut(v).crash) {
            self.derail(p, v, state);
        }
    }

    fn hypercall(&mut self, p: &mut P, id: DomainId, state: &mut P::Vcpu) {
        let registers = P::registers_mut(state);
        let r = *registers;
        self.me_mut(id).vcpu_mut().hypercalls += 1;
        let answer = self.dispatch(p, id, r.rax, [r.rdi, r.rsi, r.rdx, r.r10, r.r8]);
        match answer {
            Err(Fault::Again) => registers.rip = r.rip.wrapping_sub(HYPERCALL_BYTES),
            Ok(value) => registers.rax = value,
            Err(Fault::Refused(errno)) => registers.rax = errno.to_result().cast_unsigned(),
        }
        if answer == Err(Fault::Again) {
            // Whoever deserves the processor more gets it between two parts.
            self.tick(p);
        } else {
            self.me_mut(id).vcpu_mut().progress = 0;
        }
    }

    pub(crate) fn interrupted(&mut self, p: &mut P, exit: Exit) {
        match exit {
            Exit::Device { vector } => {
                if let Some((owner, port)) = self.pci.route(vector) {
                    self.raise(p, owner, port);
                }
            }
            Exit::Serial => self.raise_global(p, event::VIRQ_CONSOLE),
            Exit::Interrupted => self.timer_is_spent(p),
            _ => {}
        }
        self.tick(p);
    }

    /// Carries out what was ordered for a vCPU while a processor ran it.
    fn apply_orders(&mut self, p: &mut P, v: VcpuId) {
        if self.me(v.domain).doomed.is_some() {
            self.settle(p, v.domain, None);
        } else if core::mem::take(&mut self.vcpu_mut(v).crash)
            && let Some(mut state) = self.vcpu_mut(v).state.take()
        {
            self.derail(p, v, &mut state);
            self.vcpu_mut(v).state = Some(state);
        }
    }

    /// Makes a vCPU go on at an address where nothing is, as if it had been called.
    pub(crate) fn derail(&mut self, p: &mut P, v: VcpuId, state: &mut P::Vcpu) {
        let registers = P::registers_mut(state);
        // Ordered twice, it is still the first address that tells something.
        self.vcpu_mut(v).crashed_at.get_or_insert(registers.rip);
        registers.rip = NOWHERE;
        self.wake(p, v);
    }
}
