//! What the core writes into memory of a PVH domain without being asked each time: `vcpu_info`
//! and the times of its states (`xen-abi.md` §4).
//!
//! The frame of a `vcpu_info` is pinned while it is one, since events are noted in it at any time:
//! the domain may give the page away, but nobody else gets it. The state area is written only
//! when the vCPU itself starts or stops to run, through the address space as it is then.

use super::walk::translate;
use crate::access;
use crate::domain::NEVER;
use crate::fault::Answer;
use crate::frame::Mfn;
use crate::p2m::Kind;
use crate::platform::{GuestMsr, Platform};
use crate::state::Core;
use crate::vcpu::{VcpuId, Wait};
use xen_abi::shared_info::{
    VCPU_INFO_SIZE, VCPU_PENDING_SEL, VCPU_TIME, VCPU_UPCALL_PENDING, time,
};
use xen_abi::vcpu::{RUNSTATE_BLOCKED, RUNSTATE_RUNNABLE, RUNSTATE_RUNNING, RegisterVcpuInfo};
use xen_abi::{DomainId, Errno, Gfn};

const RUNSTATE_BYTES: usize = 48;
/// In `state_entry_time`: the rest is being written.
const UPDATE: u64 = 1 << 63;

/// Times that a vCPU has spent in each state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Runstate {
    /// Where its two parts are, of which the second may be empty, and the length of the first.
    area: Option<([u64; 2], usize)>,
    state: u32,
    since: u64,
    times: [u64; 4],
}

impl Runstate {
    pub(crate) const fn new() -> Self {
        Self { area: None, state: RUNSTATE_BLOCKED, since: 0, times: [0; 4] }
    }

    fn enter(&mut self, state: u32, now: u64) {
        self.times[self.state as usize & 3] += now.saturating_sub(self.since);
        self.state = state;
        self.since = now;
    }

    fn bytes(&self, since: u64) -> [u8; RUNSTATE_BYTES] {
        let mut bytes = [0; RUNSTATE_BYTES];
        bytes[..4].copy_from_slice(&self.state.to_le_bytes());
        for (word, value) in bytes[8..].chunks_mut(8).zip([since].iter().chain(&self.times)) {
            word.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }
}

impl<P: Platform> Core<P> {
    /// Writes the parameters of system time to a `vcpu_info`. They change when the vCPU's TSC does.
    pub(crate) fn write_time(p: &mut P, (info, at): (Mfn, usize), tsc_offset: u64) {
        let clock = p.clock();
        let at = at + VCPU_TIME;
        let changing = p.load32(info, at + time::VERSION) | 1;
        p.store32(info, at + time::VERSION, changing);
        p.store64(info, at + time::TSC_TIMESTAMP, clock.tsc_at_zero.wrapping_add(tsc_offset));
        p.store64(info, at + time::SYSTEM_TIME, 0);
        p.store32(info, at + time::MUL, clock.mul);
        p.store8(info, at + time::SHIFT, clock.shift.cast_unsigned());
        p.store8(info, at + time::FLAGS, 1);
        p.store32(info, at + time::VERSION, changing.wrapping_add(1));
    }

    /// Sets by how much a vCPU's TSC is ahead of the machine's.
    pub(super) fn set_tsc_offset(
        &mut self,
        p: &mut P,
        v: VcpuId,
        state: &mut P::Vcpu,
        offset: u64,
    ) {
        P::set_guest_msr(state, GuestMsr::TscOffset, offset);
        let vcpu = self.vcpu_mut(v);
        vcpu.virt.tsc_offset = offset;
        Self::write_time(p, vcpu.info, offset);
    }

    /// Lets all TSCs of a domain begin at 0.
    pub(crate) fn begin_time(&mut self, p: &mut P, id: DomainId) {
        let offset = p.tsc().wrapping_neg();
        for v in self.vcpus_of(id) {
            if let Some(mut state) = self.vcpu_mut(v).state.take() {
                self.set_tsc_offset(p, v, &mut state, offset);
                self.vcpu_mut(v).state = Some(state);
            }
        }
    }

    /// `VCPUOP_register_vcpu_info` (§4.2).
    pub(super) fn register_vcpu_info(
        &mut self,
        p: &mut P,
        v: VcpuId,
        op: &RegisterVcpuInfo,
    ) -> Answer {
        let offset = op.offset as usize;
        if offset > 4096 - VCPU_INFO_SIZE {
            return Err(Errno::ENXIO.into());
        }
        let page = self.me(v.domain).p2m.page(p, Gfn(op.mfn));
        let page = page.filter(|page| page.kind == Kind::Ram && page.write);
        let new = (page.ok_or(Errno::EINVAL)?.mfn, offset);
        if !offset.is_multiple_of(8) {
            return Err(Errno::EINVAL.into());
        }
        let old = self.vcpu(v).info;
        if old.0 != self.me(v.domain).shared {
            return Err(Errno::EBUSY.into());
        }
        p.copy(old, new, VCPU_INFO_SIZE);
        self.frames.pin(new.0);
        self.vcpu_mut(v).info = new;
        Self::write_time(p, new, self.vcpu(v).virt.tsc_offset);
        // What was noted in the old place meanwhile is not lost.
        p.store64(new.0, new.1 + VCPU_PENDING_SEL, u64::MAX);
        p.store8(new.0, new.1 + VCPU_UPCALL_PENDING, 1);
        self.notify(p, v);
        Ok(0)
    }

    /// Lets go of the memory of a domain that the core writes to.
    pub(crate) fn forget_areas(&mut self, id: DomainId) {
        let shared = self.me(id).shared;
        for v in self.vcpus_of(id) {
            let vcpu = self.vcpu_mut(v);
            let (info, _) = core::mem::replace(&mut vcpu.info, first_info(shared, v.index));
            vcpu.virt.runstate = Runstate::new();
            if info != shared {
                self.frames.unpin(info);
            }
        }
    }

    /// `VCPUOP_register_runstate_memory_area`: `address` is linear, of the caller.
    pub(super) fn register_runstate(&mut self, p: &mut P, v: VcpuId, address: u64) -> Answer {
        if address == 0 {
            self.vcpu_mut(v).virt.runstate.area = None;
            return Ok(0);
        }
        let domain = self.me(v.domain);
        let mode = domain.vcpu().virt.mode;
        let first = RUNSTATE_BYTES.min(4096 - (address & 0xfff) as usize);
        let place = |at| translate(p, &domain.p2m, &mode, at, true).ok_or(Errno::EFAULT);
        let second =
            if first < RUNSTATE_BYTES { place(address.wrapping_add(first as u64))? } else { 0 };
        let area = ([place(address)?, second], first);
        self.vcpu_mut(v).virt.runstate.area = Some(area);
        let now = p.now_ns();
        let runs = self.vcpu(v).on_cpu.is_some();
        let runstate = &mut self.vcpu_mut(v).virt.runstate;
        if runs {
            runstate.enter(RUNSTATE_RUNNING, now);
        }
        self.write_runstate(p, v);
        Ok(0)
    }

    fn write_runstate(&self, p: &mut P, v: VcpuId) {
        let runstate = &self.vcpu(v).virt.runstate;
        let Some(([first, second], len)) = runstate.area else { return };
        let p2m = &self.me(v.domain).p2m;
        // Readers on other vCPUs try again while the mark is there, and when the time differs.
        for since in [runstate.since | UPDATE, runstate.since] {
            let bytes = runstate.bytes(since);
            // An area that its owner took away is its owner's loss.
            let _ = access::write(p, p2m, first, &bytes[..len]);
            if len < RUNSTATE_BYTES {
                let _ = access::write(p, p2m, second, &bytes[len..]);
            }
        }
    }

    /// Notes that a processor takes up a vCPU.
    pub(crate) fn enter(&mut self, p: &mut P, v: VcpuId) {
        let now = p.now_ns();
        self.vcpu_mut(v).virt.runstate.enter(RUNSTATE_RUNNING, now);
        self.write_runstate(p, v);
    }

    /// Notes that a processor puts a vCPU away.
    pub(crate) fn leave(&mut self, p: &mut P, v: VcpuId, state: &mut P::Vcpu) {
        p.leave_guest(state);
        let now = p.now_ns();
        let vcpu = self.vcpu_mut(v);
        let is_blocked = vcpu.wait != Wait::Nothing;
        let next = if is_blocked { RUNSTATE_BLOCKED } else { RUNSTATE_RUNNABLE };
        vcpu.virt.runstate.enter(next, now);
        self.write_runstate(p, v);
    }

    /// The time at which a vCPU's one-shot timer is due, for tests.
    #[must_use]
    pub fn timer_of(&self, v: VcpuId) -> Option<u64> {
        Some(self.vcpu(v).timer).filter(|&at| at != NEVER)
    }
}

/// Where the `vcpu_info` of a vCPU is before it is registered elsewhere.
pub(crate) fn first_info(shared: Mfn, index: u8) -> (Mfn, usize) {
    (shared, usize::from(index) * VCPU_INFO_SIZE)
}
