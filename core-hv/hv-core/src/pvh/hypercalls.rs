//! Hypercalls of PVH domains: how they are issued, those that only such domains have, and where
//! the others answer them differently (`xen-abi.md` §3).

use super::Unlisted;
use super::msr::low;
use crate::domain::Stage;
use crate::fault::{Answer, Fault};
use crate::p2m::{Kind, Page};
use crate::platform::Platform;
use crate::state::Core;
use crate::vcpu::{VcpuId, Wait};
use axolotl_abi::control::SetHvmParam;
use xen_abi::event::VIRQ_TIMER;
use xen_abi::grant::{MAP_GRANT_REF, UNMAP_GRANT_REF};
use xen_abi::hvm::{self, HvmParam, params};
use xen_abi::hypercall::{
    CONSOLE_IO, EVENT_CHANNEL_OP, GRANT_TABLE_OP, HVM_OP, MEMORY_OP, SCHED_OP, SET_TIMER_OP,
    VCPU_OP, VM_ASSIST, XEN_VERSION,
};
use xen_abi::memory::{
    ADD_TO_PHYSMAP, AddToPhysmap, DECREASE_RESERVATION, POPULATE_PHYSMAP, Reservation,
};
use xen_abi::sched;
use xen_abi::vcpu::{self, RegisterVcpuInfo, SetSingleshotTimer};
use xen_abi::{DomainId, Errno, Gfn};

/// Length of the hypercall instruction.
const CALL_BYTES: u64 = 3;
/// Extents that one call gives back or gets before others get a chance.
const BATCH: u64 = 64;
/// The largest extent, as a power of two of pages: what one call zeroes at most.
const ORDER_MAX: u32 = 6;
/// Bits of a `memory_op` command that name the command.
const MEMORY_COMMAND: u64 = 0x3f;
/// `vm_assist`: enable; times of states are marked while they are written.
const ASSIST_ENABLE: u64 = 0;
const ASSIST_RUNSTATE: u64 = 5;

impl<P: Platform> Core<P> {
    /// VMMCALL.
    pub(super) fn guest_hypercall(&mut self, p: &mut P, v: VcpuId, state: &mut P::Vcpu) {
        let mode = self.vcpu(v).virt.mode;
        let r = *P::registers(state);
        let next = self.truncated(v, r.rip.wrapping_add(CALL_BYTES));
        let is_wide = mode.code_bits == 64;
        let (number, args) = if is_wide {
            (r.rax, [r.rdi, r.rsi, r.rdx, r.r10, r.r8])
        } else {
            (r.rax & 0xffff_ffff, [r.rbx, r.rcx, r.rdx, r.rsi, r.rdi].map(|a| a & 0xffff_ffff))
        };
        self.vcpu_mut(v).hypercalls += 1;
        let answer = if mode.cpl > 0 {
            Err(Errno::EPERM.into())
        } else if is_wide {
            self.dispatch_pvh(p, v, number, args)
        } else {
            self.dispatch_narrow(p, v, number, args)
        };
        if answer == Err(Fault::Refused(Errno::ENOSYS)) {
            self.note_unlisted(v, Unlisted::Hypercall, low(number << 16 | args[0] & 0xffff));
        }
        let value = match answer {
            // The same instruction again; whoever deserves the processor more gets it before.
            Err(Fault::Again) => return self.tick(p),
            Ok(value) => value,
            Err(Fault::Refused(errno)) => errno.to_result().cast_unsigned(),
        };
        self.vcpu_mut(v).progress = 0;
        P::registers_mut(state).rax = if is_wide { value } else { value & 0xffff_ffff };
        P::skip_to(state, next);
    }

    fn dispatch_pvh(&mut self, p: &mut P, v: VcpuId, number: u64, args: [u64; 5]) -> Answer {
        let id = v.domain;
        match (number, args[0]) {
            // A guest maps no memory of others: that is what driver domains do.
            (GRANT_TABLE_OP, MAP_GRANT_REF | UNMAP_GRANT_REF) => Err(Errno::ENOSYS.into()),
            (GRANT_TABLE_OP, _) => self.grant_op(p, id, args),
            (EVENT_CHANNEL_OP, _) => self.event_op(p, id, args),
            (SET_TIMER_OP, at) => self.set_timer_op(p, id, at),
            (CONSOLE_IO, _) => self.console_io(p, id, args),
            (XEN_VERSION, _) => self.version_op(p, id, args),
            (SCHED_OP, sched::WATCHDOG) => Err(Errno::ENOSYS.into()),
            (SCHED_OP, _) => self.sched_op(p, id, args),
            (MEMORY_OP, _) => self.guest_memory_op(p, v, args),
            (VCPU_OP, _) => self.vcpu_op(p, v, args),
            (HVM_OP, _) => self.hvm_op(p, v, args),
            (VM_ASSIST, ASSIST_ENABLE) if args[1] == ASSIST_RUNSTATE => Ok(0),
            (VM_ASSIST, _) => Err(Errno::EINVAL.into()),
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    /// From 32-bit code: what has the same structures there.
    fn dispatch_narrow(&mut self, p: &mut P, v: VcpuId, number: u64, args: [u64; 5]) -> Answer {
        let id = v.domain;
        match (number, args[0]) {
            (EVENT_CHANNEL_OP, _) => self.event_op(p, id, args),
            (SET_TIMER_OP, at) => self.set_timer_op(p, id, at | args[1] << 32),
            (CONSOLE_IO, _) => self.console_io(p, id, args),
            (XEN_VERSION, _) => self.version_op(p, id, args),
            (SCHED_OP, sched::YIELD | sched::BLOCK | sched::SHUTDOWN) => self.sched_op(p, id, args),
            (HVM_OP, _) => self.hvm_op(p, v, args),
            (VCPU_OP, vcpu::SET_SINGLESHOT_TIMER | vcpu::REGISTER_RUNSTATE) => {
                Err(Errno::ENOSYS.into())
            }
            (VCPU_OP, _) => self.vcpu_op(p, v, args),
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    /// `vcpu_op` (§3.8).
    fn vcpu_op(&mut self, p: &mut P, v: VcpuId, [command, which, pointer, ..]: [u64; 5]) -> Answer {
        let target = self.vcpu_named(v.domain, u32::try_from(which).unwrap_or(u32::MAX))?;
        let is_own = target == v;
        match command {
            vcpu::UP if self.vcpu(target).wait == Wait::Start => Err(Errno::EINVAL.into()),
            vcpu::UP => Ok(0),
            vcpu::DOWN if is_own => {
                self.vcpu_mut(v).wait = Wait::Start;
                self.look_for_poweroff(v);
                Ok(0)
            }
            vcpu::DOWN => Err(Errno::EINVAL.into()),
            vcpu::IS_UP => Ok((self.vcpu(target).wait != Wait::Start).into()),
            vcpu::REGISTER_RUNSTATE => {
                let address: u64 = self.get(p, v.domain, pointer)?;
                self.register_runstate(p, target, address)
            }
            vcpu::STOP_PERIODIC_TIMER => Ok(0),
            vcpu::SET_SINGLESHOT_TIMER if is_own => {
                let op: SetSingleshotTimer = self.get(p, v.domain, pointer)?;
                self.set_singleshot(p, v, &op)
            }
            vcpu::STOP_SINGLESHOT_TIMER if is_own => self.set_timer_op(p, v.domain, 0),
            vcpu::SET_SINGLESHOT_TIMER | vcpu::STOP_SINGLESHOT_TIMER => Err(Errno::EINVAL.into()),
            vcpu::REGISTER_VCPU_INFO => {
                let op: RegisterVcpuInfo = self.get(p, v.domain, pointer)?;
                self.register_vcpu_info(p, target, &op)
            }
            vcpu::SEND_NMI => {
                self.send_nmi(p, target);
                Ok(0)
            }
            vcpu::GET_PHYSID => Err(Errno::EINVAL.into()),
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    fn set_singleshot(&mut self, p: &mut P, v: VcpuId, op: &SetSingleshotTimer) -> Answer {
        let is_past = op.timeout_abs_ns <= p.now_ns();
        if is_past && op.flags & vcpu::SINGLESHOT_FUTURE != 0 {
            return Err(Errno::ETIME.into());
        }
        if is_past {
            self.set_timer_op(p, v.domain, 0)?;
            self.raise_own_virq(p, v, VIRQ_TIMER);
            return Ok(0);
        }
        self.set_timer_op(p, v.domain, op.timeout_abs_ns)
    }

    /// `hvm_op` (§3.5).
    fn hvm_op(&mut self, p: &mut P, v: VcpuId, [command, pointer, ..]: [u64; 5]) -> Answer {
        match command {
            hvm::SET_PARAM => {
                let op: HvmParam = self.get(p, v.domain, pointer)?;
                self.self_only(v, op.domid)?;
                self.set_param(p, v, op.index, op.value)
            }
            hvm::GET_PARAM => {
                let mut op: HvmParam = self.get(p, v.domain, pointer)?;
                self.self_only(v, op.domid)?;
                op.value = self.param(v, op.index)?;
                self.put(p, v.domain, pointer, &op)?;
                Ok(0)
            }
            // Every change of a translation takes effect by itself.
            hvm::FLUSH_TLBS if pointer == 0 => Ok(0),
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    fn self_only(&self, v: VcpuId, domid: DomainId) -> Result<(), Errno> {
        if domid == DomainId::SELF || domid == v.domain { Ok(()) } else { Err(Errno::EPERM) }
    }

    fn param(&self, v: VcpuId, index: u32) -> Result<u64, Errno> {
        let pvh = self.me(v.domain).pvh.as_ref().ok_or(Errno::EINVAL)?;
        match index {
            params::CALLBACK_IRQ => {
                let vector = |vector| params::CALLBACK_VECTOR << 56 | u64::from(vector);
                Ok(pvh.callback.map_or(0, vector))
            }
            _ => Ok(pvh.params[params_index(index)?]),
        }
    }

    fn set_param(&mut self, p: &mut P, v: VcpuId, index: u32, value: u64) -> Answer {
        let pvh = self.me_mut(v.domain).pvh.as_mut().ok_or(Errno::EINVAL)?;
        match index {
            params::CALLBACK_IRQ => {
                let [vector, ..] = value.to_le_bytes();
                // Lines of interrupt controllers that are not there are taken, and mean nothing.
                let is_vector = value >> 56 == params::CALLBACK_VECTOR && vector >= 16;
                pvh.callback = is_vector.then_some(vector);
                for each in self.vcpus_of(v.domain) {
                    if self.has_upcall(p, each) {
                        self.notify(p, each);
                    }
                }
            }
            params::STORE_EVTCHN | params::CONSOLE_EVTCHN => {
                pvh.params[params_index(index)?] = value;
            }
            _ => {
                params_index(index)?;
                return Err(Errno::EPERM.into());
            }
        }
        Ok(0)
    }

    /// [`SetHvmParam`], of the builder.
    pub(crate) fn set_hvm_param(&mut self, p: &mut P, id: DomainId, pointer: u64) -> Answer {
        let op: SetHvmParam = self.get(p, id, pointer)?;
        let target = self.built(id, op.domid)?;
        if self.me(target).stage != Stage::Building {
            return Err(Errno::EBUSY.into());
        }
        let index = params_index(op.index)?;
        let pvh = self.me_mut(target).pvh.as_mut().ok_or(Errno::EINVAL)?;
        pvh.params[index] = op.value;
        Ok(0)
    }

    /// `memory_op` (§3.4). Unlike a unikernel, a guest may give memory back and get it again.
    fn guest_memory_op(&mut self, p: &mut P, v: VcpuId, args: [u64; 5]) -> Answer {
        let pointer = args[1];
        match args[0] & MEMORY_COMMAND {
            ADD_TO_PHYSMAP => {
                let op: AddToPhysmap = self.get(p, v.domain, pointer)?;
                self.self_only(v, op.domid)?;
                // Both places change: where the page was, and where it goes.
                self.alone(p, v)?;
                let gfn = Gfn(op.gpfn);
                let old = self.me(v.domain).p2m.page(p, gfn);
                if let Some(page) = old.filter(|page| page.kind == Kind::Ram) {
                    Self::check_place(&op)?;
                    self.give_back(p, v.domain, gfn, page);
                }
                self.add_to_physmap(p, v.domain, &op)
            }
            DECREASE_RESERVATION => self.reservation(p, v, pointer, Self::decrease),
            POPULATE_PHYSMAP => self.reservation(p, v, pointer, Self::increase),
            _ => self.memory_op(p, v.domain, args),
        }
    }

    /// Deals with some extents of a reservation. The answer is how many are done, of all.
    fn reservation(
        &mut self,
        p: &mut P,
        v: VcpuId,
        pointer: u64,
        one: fn(&mut Self, &mut P, DomainId, Gfn) -> Result<(), Errno>,
    ) -> Answer {
        let op: Reservation = self.get(p, v.domain, pointer)?;
        self.self_only(v, op.domid)?;
        if op.extent_order > ORDER_MAX || op.nr_extents > u64::from(u32::MAX) {
            return Err(Errno::EINVAL.into());
        }
        self.alone(p, v)?;
        let first = u64::from(self.vcpu(v).progress);
        let last = op.nr_extents.min(first + (BATCH >> op.extent_order).max(1));
        for index in first..last {
            let at = op.extent_start.wrapping_add(8 * index);
            let Ok(base) = self.get::<u64>(p, v.domain, at) else { return Ok(index) };
            for page in 0..1 << op.extent_order {
                if one(self, p, v.domain, Gfn(base.wrapping_add(page))).is_err() {
                    return Ok(index);
                }
            }
        }
        if last < op.nr_extents {
            self.vcpu_mut(v).progress = u32::try_from(last).unwrap_or(u32::MAX);
            return Err(Fault::Again);
        }
        Ok(last)
    }

    fn decrease(&mut self, p: &mut P, id: DomainId, gfn: Gfn) -> Result<(), Errno> {
        let page = self.me(id).p2m.page(p, gfn).filter(|page| page.kind == Kind::Ram);
        self.give_back(p, id, gfn, page.ok_or(Errno::EINVAL)?);
        Ok(())
    }

    fn increase(&mut self, p: &mut P, id: DomainId, gfn: Gfn) -> Result<(), Errno> {
        self.populate(p, id, gfn, crate::control::ALL_ACCESS, false).map(drop)
    }

    /// Takes a page of memory from a domain.
    fn give_back(&mut self, p: &mut P, id: DomainId, gfn: Gfn, page: Page) {
        let (domain, frames) = self.with_frames(id);
        domain.p2m.remove(p, frames, gfn);
        frames.release(page.mfn, &mut domain.account);
    }

    /// Makes sure that no other vCPU of the caller's domain runs, because its address space is
    /// about to be narrowed: until the core is left, and they see the new one when they come back.
    fn alone(&mut self, p: &mut P, v: VcpuId) -> Result<(), Fault> {
        let mut is_alone = true;
        for other in self.vcpus_of(v.domain).filter(|&other| other != v) {
            if let Some(cpu) = self.vcpu(other).on_cpu {
                self.interrupt(p, crate::platform::CpuId(cpu));
                is_alone = false;
            }
        }
        self.me_mut(v.domain).alone = (!is_alone).then_some(v.index);
        if !is_alone {
            return Err(Fault::Again);
        }
        self.make_all_ready(p, v.domain);
        Ok(())
    }
}

/// Where a parameter is kept.
///
/// # Errors
/// `EINVAL`: there is none. `EPERM`: not for guests.
fn params_index(index: u32) -> Result<usize, Errno> {
    match index {
        params::STORE_PFN => Ok(0),
        params::STORE_EVTCHN => Ok(1),
        params::CONSOLE_PFN => Ok(2),
        params::CONSOLE_EVTCHN => Ok(3),
        4 | 13 | 20..=26 | 30 | params::COUNT.. => Err(Errno::EINVAL),
        _ => Err(Errno::EPERM),
    }
}
