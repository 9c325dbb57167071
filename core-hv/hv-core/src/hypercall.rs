//! Which hypercall is meant, and the small ones.

use crate::domain::Stage;
use crate::fault::Answer;
use crate::p2m::{Kind, Page};
use crate::platform::{Platform, Registers};
use crate::state::Core;
use axolotl_abi::{CONTROL_OP, DEVICE_OP};
use xen_abi::grant::MAX_FRAMES;
use xen_abi::hypercall::{
    CONSOLE_IO, EVENT_CHANNEL_OP, FeatureInfo, GRANT_TABLE_OP, MEMORY_OP, SCHED_OP, SET_TIMER_OP,
    XEN_VERSION, version,
};
use xen_abi::memory::{
    self, AddToPhysmap, RemoveFromPhysmap, SPACE_GRANT_TABLE, SPACE_SHARED_INFO,
};
use xen_abi::{DomainId, Errno, Gfn, PAGE_SIZE};

/// What domains there can be, for who asks.
const CAPABILITIES: &[u8] = b"hvm-3.0-x86_64 ";
/// Bits of a `memory_op` command that name the command.
const MEMORY_COMMAND: u64 = 0x3f;

/// The answer to a hypercall that needs nothing of the core's state.
#[must_use]
pub(crate) fn without_core(registers: &Registers) -> Option<u64> {
    (registers.rax == XEN_VERSION && registers.rdi == version::VERSION).then_some(version::ANSWER)
}

impl<P: Platform> Core<P> {
    /// Carries out a hypercall.
    pub(crate) fn dispatch(
        &mut self,
        p: &mut P,
        id: DomainId,
        number: u64,
        args: [u64; 5],
    ) -> Answer {
        match number {
            EVENT_CHANNEL_OP => self.event_op(p, id, args),
            GRANT_TABLE_OP => self.grant_op(p, id, args),
            SCHED_OP => self.sched_op(p, id, args),
            SET_TIMER_OP => self.set_timer_op(p, id, args[0]),
            CONSOLE_IO => self.console_io(p, id, args),
            MEMORY_OP => self.memory_op(p, id, args),
            XEN_VERSION => self.version_op(p, id, args),
            DEVICE_OP => self.device_op(p, id, args),
            CONTROL_OP => self.control_op(p, id, args),
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    pub(crate) fn version_op(
        &mut self,
        p: &mut P,
        id: DomainId,
        [command, gpa, ..]: [u64; 5],
    ) -> Answer {
        match command {
            version::VERSION => Ok(version::ANSWER),
            version::EXTRAVERSION => self.put_text::<16>(p, id, gpa, &[(0, b".axolotl")]),
            version::COMPILE_INFO => {
                let parts: [(usize, &[u8]); 2] = [(0, b"rustc"), (64, b"axolotl")];
                self.put_text::<144>(p, id, gpa, &parts)
            }
            version::CAPABILITIES => self.put_text::<1024>(p, id, gpa, &[(0, CAPABILITIES)]),
            version::CHANGESET => self.put_text::<64>(p, id, gpa, &[]),
            version::PLATFORM_PARAMETERS => self.put_text::<8>(p, id, gpa, &[]),
            version::COMMANDLINE => self.put_text::<1024>(p, id, gpa, &[]),
            // The number at the end of what the toolstack calls its UUID.
            version::GUEST_HANDLE => self.put_text::<16>(p, id, gpa, &[(14, &id.0.to_be_bytes())]),
            version::GET_FEATURES => {
                let mut info: FeatureInfo = self.get(p, id, gpa)?;
                if info.submap_idx != 0 {
                    return Err(Errno::EINVAL.into());
                }
                info.submap = version::FEATURES;
                self.put(p, id, gpa, &info)?;
                Ok(0)
            }
            version::PAGESIZE if gpa == 0 => Ok(PAGE_SIZE as u64),
            version::PAGESIZE => Err(Errno::EINVAL.into()),
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    /// Fills `N` bytes with parts, each at its offset, and zeros.
    fn put_text<const N: usize>(
        &self,
        p: &mut P,
        id: DomainId,
        gpa: u64,
        parts: &[(usize, &[u8])],
    ) -> Answer {
        let mut text = [0_u8; N];
        for (at, part) in parts {
            text[*at..at + part.len()].copy_from_slice(part);
        }
        self.put(p, id, gpa, &text)?;
        Ok(0)
    }

    /// `memory_op`. A unikernel's memory is its builder's choice: it cannot give any back, or
    /// get more, since its next incarnation needs just that.
    pub(crate) fn memory_op(
        &mut self,
        p: &mut P,
        id: DomainId,
        [command, gpa, ..]: [u64; 5],
    ) -> Answer {
        match command & MEMORY_COMMAND {
            memory::ADD_TO_PHYSMAP => {
                let op: AddToPhysmap = self.get(p, id, gpa)?;
                let owner = self.self_or_building(id, op.domid)?;
                self.add_to_physmap(p, owner, &op)
            }
            memory::REMOVE_FROM_PHYSMAP => {
                let op: RemoveFromPhysmap = self.get(p, id, gpa)?;
                let owner = self.self_or_building(id, op.domid)?;
                self.remove_from_physmap(p, owner, Gfn(op.gpfn))
            }
            memory::CURRENT_RESERVATION => {
                let whose: DomainId = self.get(p, id, gpa)?;
                let owner = self.self_or_built(id, whose)?;
                Ok(self.me(owner).account.pages.into())
            }
            memory::MAXIMUM_RESERVATION => {
                let whose: DomainId = self.get(p, id, gpa)?;
                let owner = self.self_or_built(id, whose)?;
                Ok(self.me(owner).account.max.into())
            }
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    /// The caller itself, or a domain that it is building: the address space of a domain that
    /// runs is narrowed by itself only (ADR 4).
    fn self_or_building(&self, id: DomainId, which: DomainId) -> Result<DomainId, Errno> {
        let which = self.self_or_built(id, which)?;
        if which == id || self.me(which).stage == Stage::Building {
            Ok(which)
        } else {
            Err(Errno::EBUSY)
        }
    }

    /// Shows a domain one of the pages that it shares with the core.
    pub(crate) fn add_to_physmap(&mut self, p: &mut P, id: DomainId, op: &AddToPhysmap) -> Answer {
        let gfn = Gfn(op.gpfn);
        // Memory stays: what a page held must not vanish under its builder's plan.
        if self.me(id).p2m.page(p, gfn).is_some_and(|page| page.kind != Kind::Special) {
            return Err(Errno::EINVAL.into());
        }
        let (mfn, index) = match Self::check_place(op)? {
            None => (self.me(id).shared, None),
            Some(index) => {
                self.grow_grants(p, id, index + 1)?;
                let frame = self.me(id).grants.shared.frame(index as usize);
                (frame.ok_or(Errno::EINVAL)?, Some(index as usize))
            }
        };
        self.forget_special(p, id, gfn);
        let (domain, frames) = self.with_frames(id);
        let place = match index {
            None => &mut domain.shared_place,
            Some(index) => &mut domain.grants.places[index],
        };
        if let Some(old) = place.take() {
            domain.p2m.remove(p, frames, old);
        }
        let page = Page { write: true, ..Page::new(mfn, Kind::Special) };
        domain.p2m.insert(p, frames, &mut domain.account, gfn, page)?;
        *place = Some(gfn);
        Ok(0)
    }

    /// Which page is meant: that of the grant table with this number, or the shared-info page.
    pub(crate) fn check_place(op: &AddToPhysmap) -> Result<Option<u32>, Errno> {
        match op.space {
            SPACE_SHARED_INFO if op.idx == 0 => Ok(None),
            SPACE_GRANT_TABLE => {
                let index = u32::try_from(op.idx).ok().filter(|&index| index < MAX_FRAMES);
                index.map(Some).ok_or(Errno::EINVAL)
            }
            SPACE_SHARED_INFO => Err(Errno::EINVAL),
            _ => Err(Errno::ENOSYS),
        }
    }

    fn remove_from_physmap(&mut self, p: &mut P, id: DomainId, gfn: Gfn) -> Answer {
        if self.forget_special(p, id, gfn) { Ok(0) } else { Err(Errno::EINVAL.into()) }
    }

    /// Takes away whichever shared page is at `gfn`. Answers whether there was one.
    fn forget_special(&mut self, p: &mut P, id: DomainId, gfn: Gfn) -> bool {
        let (domain, frames) = self.with_frames(id);
        let places = domain.grants.places.iter_mut().chain([&mut domain.shared_place]);
        let Some(place) = places.into_iter().find(|place| **place == Some(gfn)) else {
            return false;
        };
        *place = None;
        domain.p2m.remove(p, frames, gfn);
        true
    }
}
