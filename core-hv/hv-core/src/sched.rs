//! Who runs where: strict priority classes, a budget for each vCPU, one run queue for all
//! processors, and everything that happens at a set time.
//!
//! A vCPU that has used up its budget waits in the lowest queue until its period ends, so that a
//! spinning driver cannot starve guests, and uses what nobody else wants. Within a queue each runs
//! for a slice. A vCPU that wakes goes to an idle processor, else displaces the least important
//! one that is less important than itself.
//!
//! Each processor keeps its timer at the earliest time of all, or sooner: whoever makes a time
//! earlier is about to leave the core and sets its own timer on the way out.

use crate::domain::{Cause, MAX_DOMAINS, NEVER, Stage, WATCHDOGS};
use crate::event::PORT_LIMIT;
use crate::fault::{Answer, Fault};
use crate::platform::{CpuId, MAX_CPUS, Platform, Registers};
use crate::state::Core;
use crate::vcpu::{MAX_VCPUS, VcpuId, Wait};
use axolotl_abi::control::{DEATH_SHUTDOWN, DEATH_WATCHDOG};
use heapless::Deque;
use xen_abi::sched::{self, Poll, SHUTDOWN_WATCHDOG, Shutdown, Watchdog};
use xen_abi::shared_info::{EVTCHN_PENDING, VCPU_UPCALL_PENDING};
use xen_abi::{DomainId, Errno, EventPort, event};

/// Queue of those that have used up their budget, behind one for each `CLASS_*`.
pub const EXHAUSTED: usize = 3;
const QUEUES: usize = EXHAUSTED + 1;
/// How long a vCPU runs before others of its queue do.
const SLICE_NS: u64 = 10_000_000;
/// Most ports of a poll.
const POLL_PORTS: u32 = 128;
/// Longest watchdog, in seconds: a year.
const WATCHDOG_MAX_S: u32 = 31_536_000;

/// What the scheduler knows of a processor.
#[derive(Clone, Copy)]
struct Cpu {
    /// What it runs.
    running: Option<VcpuId>,
    /// Whose address space it has loaded, or is about to load.
    loaded: Option<DomainId>,
    /// Whose it has loaded until it enters that of `loaded`, which it does without the lock.
    leaving: Option<DomainId>,
    /// It waits, and nobody has kicked it since.
    idle: bool,
    /// It shall look for something better to run.
    reschedule: bool,
    /// Until when its time is accounted for.
    since: u64,
    /// When the slice of what it runs ends.
    slice_end: u64,
    /// What its timer is set to.
    timer: u64,
}

impl Cpu {
    const fn new() -> Self {
        Self {
            running: None,
            loaded: None,
            leaving: None,
            idle: false,
            reschedule: false,
            since: 0,
            slice_end: NEVER,
            timer: NEVER,
        }
    }
}

/// Run queues, processors, times.
pub struct Sched {
    queues: [Deque<VcpuId, { MAX_DOMAINS * MAX_VCPUS }>; QUEUES],
    cpus: [Cpu; MAX_CPUS],
    /// Processors that run domains.
    pub(crate) count: usize,
    /// Those of them that run hardware-virtualized ones too, a bit for each.
    pub(crate) guests: u64,
    /// The next time at which something happens to each domain.
    deadlines: [u64; MAX_DOMAINS],
    /// The earliest of them.
    next: u64,
}

impl Sched {
    pub(crate) const fn new() -> Self {
        Self {
            queues: [const { Deque::new() }; QUEUES],
            cpus: [const { Cpu::new() }; MAX_CPUS],
            count: 0,
            guests: 0,
            deadlines: [NEVER; MAX_DOMAINS],
            next: NEVER,
        }
    }

    fn cpu(&mut self, cpu: CpuId) -> &mut Cpu {
        &mut self.cpus[usize::from(cpu.0)]
    }

    fn push(&mut self, queue: usize, v: VcpuId) {
        // There is room for every vCPU, and each is queued once.
        let _ = self.queues[queue].push_back(v);
    }

    /// Takes the vCPUs of a domain out of all queues.
    pub(crate) fn forget(&mut self, id: DomainId) {
        for queue in &mut self.queues {
            for _ in 0..queue.len() {
                match queue.pop_front() {
                    Some(other) if other.domain != id => {
                        let _ = queue.push_back(other);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Takes a vCPU out of a queue. The others keep their order.
    #[inline]
    fn take(&mut self, queue: usize, position: usize) -> Option<VcpuId> {
        match position {
            0 => self.queues[queue].pop_front(),
            _ => self.take_from_within(queue, position),
        }
    }

    #[cold]
    fn take_from_within(&mut self, queue: usize, position: usize) -> Option<VcpuId> {
        let queue = &mut self.queues[queue];
        let taken = queue.iter().nth(position).copied()?;
        for _ in 0..queue.len() {
            if let Some(v) = queue.pop_front().filter(|&v| v != taken) {
                let _ = queue.push_back(v);
            }
        }
        Some(taken)
    }

    /// Whether some processor may still have the domain's address space loaded; such processors
    /// that do nothing are to be kicked.
    pub(crate) fn holds_space(&self, id: DomainId) -> Option<CpuId> {
        let holds = |cpu: &Cpu| cpu.loaded == Some(id) || cpu.leaving == Some(id);
        let holder = self.cpus[..self.count].iter().position(holds)?;
        Some(CpuId(u8::try_from(holder).unwrap_or(0)))
    }

    pub(crate) fn set_deadline(&mut self, id: DomainId, deadline: u64) {
        let slot = &mut self.deadlines[usize::from(id.0)];
        let old = core::mem::replace(slot, deadline);
        if deadline <= self.next {
            self.next = deadline;
        } else if old == self.next {
            self.next = self.deadlines.iter().copied().min().unwrap_or(NEVER);
        }
    }
}

/// What a processor does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Next {
    /// Go on with what it runs.
    Stay,
    /// Put that away and pick again.
    Switch,
}

impl<P: Platform> Core<P> {
    /// Keeps the scheduler's copy of a domain's next deadline true.
    pub(crate) fn update_deadline(&mut self, _p: &mut P, id: DomainId) {
        let deadline = self.me(id).deadline();
        self.sched.set_deadline(id, deadline);
    }

    /// Ends what a vCPU waits for, and finds it a processor.
    pub(crate) fn wake(&mut self, p: &mut P, v: VcpuId) {
        let vcpu = self.vcpu_mut(v);
        vcpu.wait = Wait::Nothing;
        if vcpu.poll_until != NEVER {
            vcpu.poll_until = NEVER;
            self.update_deadline(p, v.domain);
        }
        self.make_ready(p, v);
    }

    /// Tells a vCPU that there is an event or an interrupt for it.
    pub(crate) fn notify(&mut self, p: &mut P, v: VcpuId) {
        match self.vcpu(v).wait {
            Wait::Event | Wait::Port(_) => self.wake(p, v),
            Wait::Nmi | Wait::Start => {}
            Wait::Nothing => {
                // A unikernel looks by itself; a kernel that computes wants an interrupt.
                let cpu = self.vcpu(v).on_cpu.map(CpuId).filter(|&cpu| cpu != p.cpu());
                if let Some(cpu) = cpu.filter(|_| self.me(v.domain).pvh.is_some()) {
                    p.kick(cpu);
                }
            }
        }
    }

    /// Queues a vCPU that could run but does not, and finds it a processor.
    pub(crate) fn make_ready(&mut self, p: &mut P, v: VcpuId) {
        let domain = self.me_mut(v.domain);
        let is_runnable = domain.is_runnable(v.index);
        let queue = domain.queue(v.index);
        let vcpu = self.vcpu_mut(v);
        if !is_runnable || vcpu.queued || vcpu.on_cpu.is_some() {
            return;
        }
        vcpu.queued = true;
        self.sched.push(queue, v);
        self.find_cpu(p, v, queue);
    }

    /// The same for all vCPUs of a domain.
    pub(crate) fn make_all_ready(&mut self, p: &mut P, id: DomainId) {
        for v in self.vcpus_of(id) {
            self.make_ready(p, v);
        }
    }

    /// Processors that may run this vCPU, a bit for each.
    fn cpus_for(&self, v: VcpuId) -> u64 {
        let guests = self.sched.guests;
        if guests != !0 && self.me(v.domain).pvh.is_some() { guests } else { !0 }
    }

    /// What a processor would run next: its queue, and its position there.
    #[inline]
    fn best(&self, cpu: CpuId) -> Option<(usize, usize)> {
        if self.sched.guests & 1 << cpu.0 == 0 {
            return self.best_unikernel();
        }
        Some((self.sched.queues.iter().position(|queue| !queue.is_empty())?, 0))
    }

    #[cold]
    fn best_unikernel(&self) -> Option<(usize, usize)> {
        let suits = |v: &VcpuId| self.me(v.domain).pvh.is_none();
        let mut queues = self.sched.queues.iter().enumerate();
        queues.find_map(|(index, queue)| Some((index, queue.iter().position(suits)?)))
    }

    fn find_cpu(&mut self, p: &mut P, v: VcpuId, queue: usize) {
        let (me, cpus) = (p.cpu(), self.cpus_for(v));
        let here = self.sched.cpu(me);
        if cpus & 1 << me.0 != 0 && here.running.is_none() && !here.reschedule {
            // On its way to pick something anyway.
            here.reschedule = true;
            return;
        }
        let mut worst = None;
        for index in 0..self.sched.count {
            let cpu = &mut self.sched.cpus[index];
            if cpus & 1 << index == 0 {
                continue;
            }
            let id = CpuId(u8::try_from(index).unwrap_or(0));
            if core::mem::take(&mut cpu.idle) {
                return p.kick(id);
            }
            let running = cpu.running.filter(|_| !cpu.reschedule);
            let Some(v) = running else { continue };
            let rank = self.me(v.domain).queue(v.index);
            if rank > queue && worst.is_none_or(|(highest, _)| rank >= highest) {
                worst = Some((rank, id));
            }
        }
        if let Some((_, cpu)) = worst {
            self.interrupt(p, cpu);
        }
    }

    /// Makes a processor look at what it runs.
    pub(crate) fn interrupt(&mut self, p: &mut P, cpu: CpuId) {
        let state = self.sched.cpu(cpu);
        state.reschedule = true;
        state.idle = false;
        if cpu != p.cpu() {
            p.kick(cpu);
        }
    }

    /// Charges a processor's vCPU for its time until now.
    fn account(&mut self, p: &mut P, now: u64) {
        let cpu = self.sched.cpu(p.cpu());
        let spent = now.saturating_sub(cpu.since);
        cpu.since = now;
        let Some(v) = cpu.running else { return };
        let is_live = self.me(v.domain).stage == Stage::Live;
        let vcpu = self.vcpu_mut(v);
        vcpu.cpu_ns += spent;
        // What died has no budget any more, and no deadline.
        if vcpu.budget == 0 || !is_live {
            return;
        }
        if self.renew_budget(p, v, now) {
            return;
        }
        let vcpu = self.vcpu_mut(v);
        vcpu.used += spent;
        if vcpu.used >= vcpu.budget && !vcpu.exhausted {
            vcpu.exhausted = true;
            vcpu.overruns = vcpu.overruns.saturating_add(1);
            self.update_deadline(p, v.domain);
            self.sched.cpu(p.cpu()).reschedule = true;
        }
    }

    /// Begins another period for a vCPU that is in no queue, if the last one is over. Answers
    /// whether it was.
    fn renew_budget(&mut self, p: &mut P, v: VcpuId, now: u64) -> bool {
        let vcpu = self.vcpu_mut(v);
        if now < vcpu.period_start + vcpu.period {
            return false;
        }
        vcpu.period_start = now;
        vcpu.used = 0;
        if core::mem::take(&mut vcpu.exhausted) {
            self.update_deadline(p, v.domain);
        }
        true
    }

    /// Decides whether this processor goes on with what it runs. To be called after each exit has
    /// been dealt with.
    pub(crate) fn decide(&mut self, p: &mut P, v: VcpuId) -> Next {
        if !self.me(v.domain).is_runnable(v.index) {
            return Next::Switch;
        }
        let cpu = self.sched.cpu(p.cpu());
        if !core::mem::take(&mut cpu.reschedule) {
            return Next::Stay;
        }
        let now = p.now_ns();
        let is_over = now >= cpu.slice_end;
        let rank = self.me(v.domain).queue(v.index);
        match self.best(p.cpu()) {
            Some((best, _)) if best < rank || best == rank && is_over => Next::Switch,
            _ => {
                if is_over {
                    self.start_slice(p, v, now);
                }
                Next::Stay
            }
        }
    }

    /// Notes that time has passed, at a timer's interrupt or a kick.
    pub(crate) fn tick(&mut self, p: &mut P) {
        let now = p.now_ns();
        self.account(p, now);
        let cpu = self.sched.cpu(p.cpu());
        cpu.idle = false;
        if now >= cpu.slice_end {
            cpu.reschedule = true;
        }
        if now >= self.sched.next {
            self.expire(p, now);
        }
    }

    /// Lets everything happen whose time has come.
    fn expire(&mut self, p: &mut P, now: u64) {
        for index in 0..MAX_DOMAINS {
            if now < self.sched.deadlines[index] {
                continue;
            }
            let id = DomainId(u16::try_from(index).unwrap_or(0));
            for v in self.vcpus_of(id) {
                self.expire_vcpu(p, v, now);
            }
        }
    }

    fn expire_vcpu(&mut self, p: &mut P, v: VcpuId, now: u64) {
        let vcpu = self.vcpu_mut(v);
        let timer = vcpu.timer <= now;
        let poll = vcpu.poll_until <= now;
        let refill = vcpu.exhausted && vcpu.period_start + vcpu.period <= now;
        let dog = vcpu.watchdogs.iter().any(|&until| until <= now);
        if timer {
            vcpu.timer = NEVER;
        }
        if refill {
            vcpu.exhausted = false;
            vcpu.used = 0;
            vcpu.period_start = now;
        }
        if dog {
            vcpu.watchdogs = [NEVER; WATCHDOGS];
        }
        self.update_deadline(p, v.domain);
        if refill && self.vcpu(v).queued {
            // Back at the end of the better queue.
            self.sched.forget(v.domain);
            for each in self.vcpus_of(v.domain) {
                self.vcpu_mut(each).queued = false;
            }
            self.make_all_ready(p, v.domain);
        }
        if timer {
            self.raise_own_virq(p, v, event::VIRQ_TIMER);
        }
        if poll {
            self.wake(p, v);
        }
        if dog {
            self.doom(p, v.domain, Cause::new(DEATH_WATCHDOG, SHUTDOWN_WATCHDOG));
        }
    }

    /// Ends a domain's life as soon as no processor runs it: now, or at those processors' next
    /// exits. Answers whether it is over.
    pub(crate) fn doom(&mut self, p: &mut P, id: DomainId, cause: Cause) -> bool {
        if self.me(id).stage != Stage::Live {
            return true;
        }
        self.me_mut(id).doomed.get_or_insert((cause, 0));
        self.settle(p, id, None)
    }

    /// Ends the life of a domain that is doomed if no processor runs any vCPU of it, but for the
    /// one, if any, whose registers the caller has. Answers whether it is over.
    pub(crate) fn settle(
        &mut self,
        p: &mut P,
        id: DomainId,
        here: Option<(u8, &Registers)>,
    ) -> bool {
        let Some((cause, by)) = self.me(id).doomed else { return false };
        let me = here.map(|(index, _)| index);
        let others = self.vcpus_of(id).filter(|v| Some(v.index) != me);
        let mut is_over = true;
        for v in others {
            if let Some(cpu) = self.vcpu(v).on_cpu {
                self.interrupt(p, CpuId(cpu));
                is_over = false;
            }
        }
        if is_over {
            let own = here.filter(|&(index, _)| index == by).map(|(_, registers)| *registers);
            let kept = || self.me(id).vcpus.get(usize::from(by))?.state.as_ref();
            let registers = own.or_else(|| kept().map(|state| *P::registers(state)));
            self.die(p, id, cause, &registers.unwrap_or_default());
        }
        is_over
    }

    /// Takes the best vCPU out of its queue for this processor.
    pub(crate) fn pick(&mut self, p: &mut P) -> Option<(VcpuId, P::Vcpu)> {
        let me = p.cpu();
        let now = p.now_ns();
        let cpu = self.sched.cpu(me);
        cpu.reschedule = false;
        cpu.idle = false;
        cpu.since = now;
        while let Some((queue, position)) = self.best(me) {
            let Some(v) = self.sched.take(queue, position) else { continue };
            let is_runnable = self.me(v.domain).is_runnable(v.index);
            let vcpu = self.vcpu_mut(v);
            vcpu.queued = false;
            if !is_runnable {
                continue;
            }
            let Some(state) = vcpu.state.take() else { continue };
            vcpu.on_cpu = Some(me.0);
            let cpu = self.sched.cpu(me);
            cpu.running = Some(v);
            if cpu.loaded != Some(v.domain) {
                cpu.leaving = cpu.loaded;
            }
            cpu.loaded = Some(v.domain);
            self.start_slice(p, v, now);
            return Some((v, state));
        }
        None
    }

    fn start_slice(&mut self, p: &mut P, v: VcpuId, now: u64) {
        let mut left = SLICE_NS;
        if self.vcpu(v).budget != 0 {
            self.renew_budget(p, v, now);
            let vcpu = self.vcpu(v);
            if !vcpu.exhausted {
                left = vcpu.budget.saturating_sub(vcpu.used).min(SLICE_NS);
            }
        }
        self.sched.cpu(p.cpu()).slice_end = now + left;
    }

    /// Takes what this processor ran off it.
    pub(crate) fn put_away(&mut self, p: &mut P, v: VcpuId, state: P::Vcpu) {
        let now = p.now_ns();
        self.account(p, now);
        let cpu = self.sched.cpu(p.cpu());
        cpu.running = None;
        cpu.slice_end = NEVER;
        let vcpu = self.vcpu_mut(v);
        vcpu.state = Some(state);
        vcpu.on_cpu = None;
        let domain = self.me(v.domain);
        if domain.is_runnable(v.index) {
            let queue = domain.queue(v.index);
            self.vcpu_mut(v).queued = true;
            self.sched.push(queue, v);
            if self.sched.guests != !0 {
                // Idle processors may be idle because they cannot run what comes next here.
                self.sched.cpu(p.cpu()).reschedule = true;
                self.find_cpu(p, v, EXHAUSTED);
            }
        }
    }

    /// Notes that this processor is about to wait, in the core's own address space.
    pub(crate) fn go_idle(&mut self, p: &mut P) {
        let cpu = self.sched.cpu(p.cpu());
        cpu.idle = true;
        cpu.slice_end = NEVER;
    }

    /// Notes that this processor has left the last domain's address space.
    pub(crate) fn left_space(&mut self, p: &mut P) {
        let cpu = self.sched.cpu(p.cpu());
        cpu.loaded = None;
        cpu.leaving = None;
    }

    /// Notes that this processor has been in the address space of what it runs.
    pub(crate) fn entered_space(&mut self, p: &mut P) {
        self.sched.cpu(p.cpu()).leaving = None;
    }

    /// Sets this processor's timer if it would be too late. One that is too early does no harm.
    pub(crate) fn arm_timer(&mut self, p: &mut P) {
        let next = self.sched.next;
        let cpu = self.sched.cpu(p.cpu());
        let wanted = next.min(cpu.slice_end);
        if wanted < cpu.timer {
            cpu.timer = wanted;
            p.set_timer(Some(wanted));
        }
    }

    /// Notes that this processor's timer may have expired. It may do so before its time: the
    /// counter of a local APIC holds some seconds only.
    pub(crate) fn timer_is_spent(&mut self, p: &mut P) {
        self.sched.cpu(p.cpu()).timer = NEVER;
    }

    /// `sched_op`.
    pub(crate) fn sched_op(&mut self, p: &mut P, id: DomainId, args: [u64; 5]) -> Answer {
        let gpa = args[1];
        match args[0] {
            sched::YIELD => {
                let cpu = self.sched.cpu(p.cpu());
                cpu.reschedule = true;
                cpu.slice_end = 0;
                Ok(0)
            }
            sched::BLOCK => {
                let vcpu = self.me_mut(id).vcpu_mut();
                if p.load8(vcpu.info.0, vcpu.info.1 + VCPU_UPCALL_PENDING) == 0 {
                    vcpu.wait = Wait::Event;
                }
                Ok(0)
            }
            sched::POLL => self.poll(p, id, gpa),
            sched::SHUTDOWN => {
                let op: Shutdown = self.get(p, id, gpa)?;
                let domain = self.me_mut(id);
                let by = domain.acting;
                domain.doomed.get_or_insert((Cause::new(DEATH_SHUTDOWN, op.reason), by));
                Ok(0)
            }
            sched::WATCHDOG => self.watchdog(p, id, gpa),
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    fn poll(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let op: Poll = self.get(p, id, gpa)?;
        if op.nr_ports > POLL_PORTS {
            return Err(Errno::EINVAL.into());
        }
        let shared = self.me(id).shared;
        let mut only = 0;
        for index in 0..u64::from(op.nr_ports) {
            let port: EventPort = self.get(p, id, op.ports.wrapping_add(4 * index))?;
            if port.0 >= PORT_LIMIT {
                return Err(Errno::EINVAL.into());
            }
            let word = p.load64(shared, EVTCHN_PENDING + (port.0 / 64) as usize * 8);
            if word & 1 << (port.0 % 64) != 0 {
                return Ok(0);
            }
            only = port.0;
        }
        let is_late = op.timeout != 0 && op.timeout <= p.now_ns();
        if is_late || self.is_interrupted(p, self.acting(id)) {
            return Ok(0);
        }
        let vcpu = self.me_mut(id).vcpu_mut();
        // Of several ports any event wakes it: a poll may end for no reason.
        vcpu.wait = Wait::Port(if op.nr_ports == 1 { only } else { 0 });
        if op.timeout != 0 {
            vcpu.poll_until = op.timeout;
            self.update_deadline(p, id);
        }
        Ok(0)
    }

    fn watchdog(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let op: Watchdog = self.get(p, id, gpa)?;
        let now = p.now_ns();
        let dogs = &mut self.me_mut(id).vcpus[0].watchdogs;
        let index = match op.id {
            0 if op.timeout == 0 => return Err(Errno::EINVAL.into()),
            0 => dogs.iter().position(|&until| until == NEVER).ok_or(Errno::ENOSPC)?,
            known => {
                let index = known as usize - 1;
                if index >= WATCHDOGS {
                    return Err(Errno::EINVAL.into());
                }
                index
            }
        };
        dogs[index] = match op.timeout {
            0 => NEVER,
            seconds => now + u64::from(seconds.min(WATCHDOG_MAX_S)) * 1_000_000_000,
        };
        self.update_deadline(p, id);
        Ok(index as u64 + 1)
    }

    /// `set_timer_op`.
    pub(crate) fn set_timer_op(&mut self, p: &mut P, id: DomainId, at: u64) -> Answer {
        let v = self.acting(id);
        self.vcpu_mut(v).timer = NEVER;
        if at != 0 && at <= p.now_ns() {
            self.raise_own_virq(p, v, event::VIRQ_TIMER);
        } else if at != 0 {
            self.vcpu_mut(v).timer = at;
        }
        self.update_deadline(p, id);
        Ok(0)
    }

    /// Stops a domain until it is unpaused.
    ///
    /// # Errors
    /// `EAGAIN` while a processor runs it.
    pub(crate) fn pause(&mut self, p: &mut P, id: DomainId) -> Answer {
        self.me_mut(id).paused = true;
        let mut is_running = false;
        for v in self.vcpus_of(id) {
            if let Some(cpu) = self.vcpu(v).on_cpu {
                self.interrupt(p, CpuId(cpu));
                is_running = true;
            }
        }
        if is_running {
            return Err(Fault::Refused(Errno::EAGAIN));
        }
        self.sched.forget(id);
        for vcpu in &mut self.me_mut(id).vcpus {
            vcpu.queued = false;
        }
        Ok(0)
    }
}
