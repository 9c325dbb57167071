//! What becomes of each reason for which a PVH vCPU stops, and what it is told when it goes on.

use super::cpuid::{self, Asker};
use super::decode::{MAX_BYTES, length};
use super::lapic::{Command, Lapic};
use super::msr::low;
use super::walk::translate;
use super::{Unlisted, lapic};
use crate::domain::Cause;
use crate::frame::Mfn;
use crate::platform::{CpuId, Event, GuestExit, GuestMsr, Platform, Start};
use crate::state::Core;
use crate::vcpu::{VcpuId, Wait};
use axolotl_abi::control::{
    DEATH_FAULT, DEATH_RULE, DEATH_SHUTDOWN, EXIT_CPUID, EXIT_HALT, EXIT_HYPERCALL, EXIT_MEMORY,
    EXIT_MSR, EXIT_OTHER, EXIT_PORT, EXIT_WINDOW,
};
use xen_abi::sched::SHUTDOWN_POWEROFF;
use xen_abi::{DomainId, Gfn};

const INTERRUPTS_ON: u64 = 1 << 9;
const DOUBLE_FAULT: u8 = 8;
const CR4_OSXSAVE: u64 = 1 << 18;

const DELIVERY_FIXED: u32 = 0;
const DELIVERY_LOWEST: u32 = 1;
const DELIVERY_NMI: u32 = 4;
const DELIVERY_INIT: u32 = 5;
const DELIVERY_START: u32 = 6;
const LEVEL: u32 = 1 << 15;
const ASSERT: u32 = 1 << 14;

/// Which counter of `ExitCounts` an exit belongs to.
const fn reason(exit: GuestExit) -> usize {
    match exit {
        GuestExit::Cpuid => EXIT_CPUID,
        GuestExit::ReadMsr | GuestExit::WriteMsr => EXIT_MSR,
        GuestExit::Halt => EXIT_HALT,
        GuestExit::Hypercall => EXIT_HYPERCALL,
        GuestExit::Port(_) => EXIT_PORT,
        GuestExit::Memory { .. } => EXIT_MEMORY,
        GuestExit::Window => EXIT_WINDOW,
        _ => EXIT_OTHER,
    }
}

impl<P: Platform> Core<P> {
    /// Deals with the reason why a PVH vCPU stopped.
    pub(crate) fn guest_exit(
        &mut self,
        p: &mut P,
        v: VcpuId,
        state: &mut P::Vcpu,
        exit: GuestExit,
    ) {
        let domain = self.me_mut(v.domain);
        domain.acting = v.index;
        // Whoever narrows the address space says so again, until that is done.
        let was_alone = domain.alone.take_if(|only| *only == v.index).is_some();
        if let Some(pvh) = &mut domain.pvh {
            pvh.exits[reason(exit)] += 1;
        }
        let virt = &mut self.vcpu_mut(v).virt;
        virt.mode = P::mode(state);
        virt.interrupts = P::registers(state).rflags & INTERRUPTS_ON != 0;
        match exit {
            GuestExit::Cpuid => self.guest_cpuid(p, v, state),
            GuestExit::ReadMsr => self.guest_rdmsr(p, v, state),
            GuestExit::WriteMsr => self.guest_wrmsr(p, v, state),
            GuestExit::Halt => self.guest_halt(p, v, state),
            GuestExit::Hypercall => self.guest_hypercall(p, v, state),
            GuestExit::Port(access) => self.guest_port(p, v, state, access),
            GuestExit::Memory { gpa, implicit, .. } => {
                self.guest_memory(p, v, state, gpa, implicit);
            }
            GuestExit::SetXcr => self.guest_xsetbv(p, v, state),
            GuestExit::Undefined => {
                P::inject(state, Event::Exception(6, None));
            }
            GuestExit::Exception { vector, error } => {
                P::inject(state, Event::Exception(vector, error));
            }
            GuestExit::Nothing => self.skip(p, v, state, 2),
            GuestExit::Window | GuestExit::NmiDone => {}
            GuestExit::Shutdown => self.guest_fails(v, DEATH_FAULT, 0, DOUBLE_FAULT),
            GuestExit::Failed { code } => self.guest_fails(v, DEATH_RULE, low(code), 0),
        }
        if was_alone && self.me(v.domain).alone.is_none() {
            self.make_all_ready(p, v.domain);
        }
    }

    fn guest_fails(&mut self, v: VcpuId, cause: u32, detail: u32, vector: u8) {
        let cause = Cause { vector, ..Cause::new(cause, detail) };
        self.me_mut(v.domain).doomed.get_or_insert((cause, v.index));
    }

    pub(super) fn note_unlisted(&mut self, v: VcpuId, kind: Unlisted, number: u32) {
        if let Some(pvh) = &mut self.me_mut(v.domain).pvh {
            pvh.note_unlisted(kind, number);
        }
    }

    fn guest_cpuid(&mut self, p: &mut P, v: VcpuId, state: &mut P::Vcpu) {
        let leaf = low(P::registers(state).rax);
        let asker = Asker {
            vcpu: v.index,
            apic_id: Lapic::id(v.index),
            domain: v.domain,
            incarnation: self.me(v.domain).incarnation,
            tsc_khz: u32::try_from(p.clock().tsc_khz).unwrap_or(u32::MAX),
            extended: p.extended_state(),
            xcr0: if leaf == 0xd { P::guest_msr(state, GuestMsr::Xcr0) } else { 1 },
            os_xsave: self.vcpu(v).virt.mode.cr4 & CR4_OSXSAVE != 0,
        };
        let r = P::registers_mut(state);
        let host = |leaf, subleaf| p.cpuid(leaf, subleaf);
        let answer = cpuid::answer(leaf, low(r.rcx), &asker, host);
        [r.rax, r.rbx, r.rcx, r.rdx] = answer.map(u64::from);
        self.skip(p, v, state, 2);
    }

    /// XSETBV: APM volume 4, and volume 2, section 11.5.2, for what XCR0 can be.
    fn guest_xsetbv(&self, p: &P, v: VcpuId, state: &mut P::Vcpu) {
        let mode = &self.vcpu(v).virt.mode;
        let known = p.extended_state();
        if known == 0 || mode.cr4 & CR4_OSXSAVE == 0 {
            return P::inject(state, Event::Exception(6, None));
        }
        let r = P::registers(state);
        let value = r.rax & 0xffff_ffff | r.rdx << 32;
        if mode.cpl != 0 || low(r.rcx) != 0 || !cpuid::is_xcr0(value, known) {
            return P::inject(state, Event::Exception(13, Some(0)));
        }
        P::set_guest_msr(state, GuestMsr::Xcr0, value);
        self.skip(p, v, state, 3);
    }

    /// The bytes of the instruction that a vCPU stopped at, as far as they can be read.
    pub(super) fn instruction(
        &self,
        p: &P,
        v: VcpuId,
        state: &P::Vcpu,
    ) -> ([u8; MAX_BYTES], usize) {
        let mut code = [0; MAX_BYTES];
        let mut done = 0;
        while done < MAX_BYTES {
            let Some((mfn, offset)) = self.code_at(p, v, state, done as u64) else { break };
            let len = (MAX_BYTES - done).min(4096 - offset);
            p.read(mfn, offset, &mut code[done..done + len]);
            done += len;
        }
        (code, done)
    }

    /// Where the byte is that comes so far behind the first one of the instruction.
    fn code_at(&self, p: &P, v: VcpuId, state: &P::Vcpu, behind: u64) -> Option<(Mfn, usize)> {
        let domain = self.me(v.domain);
        let mode = &self.vcpu(v).virt.mode;
        let at = P::registers(state).rip.wrapping_add(behind);
        let linear =
            if mode.code_bits == 64 { at } else { mode.cs_base.wrapping_add(at) & 0xffff_ffff };
        let gpa = translate(p, &domain.p2m, mode, linear, false)?;
        let mfn = domain.p2m.memory(p, Gfn::containing(gpa), false)?;
        Some((mfn, (gpa & 0xfff) as usize))
    }

    /// Lets a vCPU go on behind an instruction with `opcode` bytes and nothing behind them.
    pub(super) fn skip(&self, p: &P, v: VcpuId, state: &mut P::Vcpu, opcode: usize) {
        let next = P::next_rip(state).unwrap_or_else(|| {
            let bits = self.vcpu(v).virt.mode.code_bits;
            // Compilers put nothing before these instructions, and one byte is enough to see it.
            let first = self.code_at(p, v, state, 0).map(|(mfn, offset)| p.load8(mfn, offset));
            let length = if first.is_some_and(|byte| length(&[byte], bits, 0) == 0) {
                opcode as u64
            } else {
                let (code, len) = self.instruction(p, v, state);
                length(&code[..len], bits, opcode)
            };
            self.truncated(v, P::registers(state).rip.wrapping_add(length))
        });
        P::skip_to(state, next);
    }

    pub(super) fn truncated(&self, v: VcpuId, rip: u64) -> u64 {
        if self.vcpu(v).virt.mode.code_bits == 64 { rip } else { rip & 0xffff_ffff }
    }

    /// HLT. With interrupts off only a non-maskable one ends it; when all vCPUs have come to that,
    /// the domain has powered itself off (§0, 5).
    fn guest_halt(&mut self, p: &mut P, v: VcpuId, state: &mut P::Vcpu) {
        self.skip(p, v, state, 1);
        let is_on = P::registers(state).rflags & INTERRUPTS_ON != 0;
        let told = self.has_event(p, v).is_some();
        let vcpu = self.vcpu_mut(v);
        if vcpu.virt.nmi || is_on && told {
            return;
        }
        vcpu.wait = if is_on { Wait::Event } else { Wait::Nmi };
        self.look_for_poweroff(v);
    }

    /// Ends a domain whose vCPUs all wait for each other to start them.
    pub(super) fn look_for_poweroff(&mut self, v: VcpuId) {
        let sleeps = |each: VcpuId| matches!(self.vcpu(each).wait, Wait::Nmi | Wait::Start);
        if self.vcpus_of(v.domain).all(sleeps) {
            self.guest_fails(v, DEATH_SHUTDOWN, SHUTDOWN_POWEROFF, 0);
        }
    }

    /// The vector that a vCPU with interrupts on would be interrupted by, and whether its local
    /// APIC wants that (§9.4).
    fn has_event(&self, p: &P, v: VcpuId) -> Option<(u8, bool)> {
        let callback = self.me(v.domain).pvh.as_ref().and_then(|pvh| pvh.callback);
        match callback.filter(|_| self.has_upcall(p, v)) {
            Some(vector) => Some((vector, false)),
            None => self.vcpu(v).virt.lapic.pending().map(|vector| (vector, true)),
        }
    }

    /// Tells a vCPU that is about to run what it is to be told first. Answers whether it shall stop
    /// as soon as it can be told more.
    pub(crate) fn prepare(&mut self, p: &mut P, v: VcpuId, state: &mut P::Vcpu) -> bool {
        if self.me(v.domain).alone.is_some() || self.vcpu(v).progress != 0 {
            // Between two parts of a hypercall: its handlers might wait for who cannot run, and their
            // own hypercalls know nothing of the parts that are done.
            return false;
        }
        let ready = P::readiness(state);
        if self.vcpu(v).virt.nmi {
            if ready.nmi {
                self.vcpu_mut(v).virt.nmi = false;
                P::inject(state, Event::Nmi);
                return self.has_event(p, v).is_some();
            }
            return true;
        }
        let Some((vector, of_apic)) = self.has_event(p, v) else { return false };
        if !ready.interrupt {
            return true;
        }
        P::inject(state, Event::Interrupt(vector));
        let lapic = &mut self.vcpu_mut(v).virt.lapic;
        if of_apic {
            lapic.accept(vector);
        }
        lapic.pending().is_some()
    }

    /// Carries out what was ordered for a vCPU while a processor ran it.
    pub(crate) fn obey(&mut self, v: VcpuId, state: &mut P::Vcpu) {
        if core::mem::take(&mut self.vcpu_mut(v).virt.reset) {
            self.reset_vcpu(v, state);
        }
    }

    fn reset_vcpu(&mut self, v: VcpuId, state: &mut P::Vcpu) {
        P::start_guest(state, Start::Reset);
        let vcpu = self.vcpu_mut(v);
        vcpu.virt.lapic = Lapic::new();
        vcpu.virt.nmi = false;
        vcpu.progress = 0;
        vcpu.wait = Wait::Start;
        if let Some(page) = vcpu.virt.start_page.take() {
            P::start_guest(state, Start::Page(page));
            vcpu.wait = Wait::Nothing;
        }
        self.look_for_poweroff(v);
    }

    /// Sends an interrupt from vCPU `from` to whom it is meant for (§5.1).
    pub(super) fn send_interrupt(&mut self, p: &mut P, from: VcpuId, command: Command) {
        for to in self.vcpus_of(from.domain) {
            if self.vcpu(to).virt.lapic.is_meant(command, to.index, from.index) {
                self.interrupt_vcpu(p, to, command.low);
            }
        }
    }

    fn interrupt_vcpu(&mut self, p: &mut P, to: VcpuId, command: u32) {
        match command >> 8 & 7 {
            DELIVERY_FIXED | DELIVERY_LOWEST => {
                let [vector, ..] = command.to_le_bytes();
                self.vcpu_mut(to).virt.lapic.request(vector);
                self.notify(p, to);
            }
            DELIVERY_NMI => self.send_nmi(p, to),
            // What ends an INIT of old has no meaning any more.
            DELIVERY_INIT if command & (LEVEL | ASSERT) == LEVEL => {}
            DELIVERY_INIT => {
                self.vcpu_mut(to).virt.start_page = None;
                self.order_reset(p, to);
            }
            DELIVERY_START => self.start_vcpu(p, to, command.to_le_bytes()[0]),
            _ => {}
        }
    }

    /// Raises a non-maskable interrupt.
    pub(super) fn send_nmi(&mut self, p: &mut P, to: VcpuId) {
        if self.vcpu(to).wait == Wait::Start {
            return;
        }
        self.vcpu_mut(to).virt.nmi = true;
        match self.vcpu(to).wait {
            Wait::Nothing => self.notify(p, to),
            _ => self.wake(p, to),
        }
    }

    fn order_reset(&mut self, p: &mut P, to: VcpuId) {
        match self.vcpu_mut(to).state.take() {
            Some(mut state) => {
                self.reset_vcpu(to, &mut state);
                self.vcpu_mut(to).state = Some(state);
            }
            None => {
                self.vcpu_mut(to).virt.reset = true;
                if let Some(cpu) = self.vcpu(to).on_cpu {
                    self.interrupt(p, CpuId(cpu));
                }
            }
        }
    }

    /// Starts a vCPU that waits for it, at a page below 1 MiB.
    fn start_vcpu(&mut self, p: &mut P, to: VcpuId, page: u8) {
        let vcpu = self.vcpu_mut(to);
        if vcpu.virt.reset {
            vcpu.virt.start_page.get_or_insert(page);
        } else if vcpu.wait == Wait::Start
            && let Some(state) = &mut vcpu.state
        {
            P::start_guest(state, Start::Page(page));
            self.wake(p, to);
        }
    }

    /// Gets a PVH domain ready for its first instruction.
    pub(crate) fn start_pvh(&mut self, id: DomainId, entry: u32, start_info: u32) {
        for v in self.vcpus_of(id) {
            let vcpu = self.vcpu_mut(v);
            let start = if v.index == 0 { Start::Pvh { entry, start_info } } else { Start::Reset };
            vcpu.wait = if v.index == 0 { Wait::Nothing } else { Wait::Start };
            if let Some(state) = &mut vcpu.state {
                P::start_guest(state, start);
            }
        }
    }
}

const _: () = assert!(lapic::PAGE.is_multiple_of(4096));
