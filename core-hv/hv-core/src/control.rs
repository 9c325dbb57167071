//! The control hypercall group: domains from creation to destruction.
//!
//! Emptying a domain for its next incarnation, or for good, takes many small steps: each call
//! does a bounded number and answers `EAGAIN` until the last one is done. The stage of the domain
//! says which step is next, so nothing is lost when the caller dies in between.

use crate::domain::{Cause, Domain, Grants, MAX_DOMAINS, NEVER, Ports, Stage, Step};
use crate::event::Port;
use crate::fault::{Answer, Fault};
use crate::frame::{Account, FrameTable, Mfn, Table};
use crate::p2m::{GFN_LIMIT, Kind, P2m, Page, Walk};
use crate::platform::{Bdf, GUEST_FRAMES, Platform};
use crate::pvh::{Pvh, first_info};
use crate::state::Core;
use crate::vcpu::{MAX_VCPUS, Vcpu, VcpuId};
use axolotl_abi::control::{
    self, ANY_DOMAIN, ASSIGN_DMA_TRUSTED, AssignDevice, CLASS_GUEST, Create, DEATH_CRASHED,
    DEATH_RESTARTED, DeathRecord, DomainInfo, DomainOp, ExitCounts, GetDeath, INFO_DMA_TRUSTED,
    KIND_PVH, KIND_UNIKERNEL, Load, POPULATE_MISSING, POPULATE_PRESERVED, PciFunction, PhysInfo,
    Populate, Rights, SetGrant, SetStart,
};
use axolotl_abi::image::{ACCESS_EXECUTE, ACCESS_READ, ACCESS_WRITE};
use heapless::Vec;
use xen_abi::event::STATUS_UNBOUND;
use xen_abi::grant::MAX_FRAMES;
use xen_abi::{DomainId, Errno, EventPort, Gfn, event};
use zerocopy::FromZeros;

/// Pages that one call zeroes, frees or maps before others get a chance.
const QUOTA: u32 = 64;
/// Bytes of one [`Load`].
const LOAD_MAX: u32 = 65_536;
/// Everything that memory can be used for.
pub(crate) const ALL_ACCESS: u32 = ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE;
/// Most bytes of register space of one device.
const BARS_MAX: u64 = 16 << 20;

const AGAIN: Answer = Err(Fault::Refused(Errno::EAGAIN));

impl<P: Platform> Core<P> {
    /// `control_op`.
    pub(crate) fn control_op(
        &mut self,
        p: &mut P,
        id: DomainId,
        [command, gpa, ..]: [u64; 5],
    ) -> Answer {
        let right = match command {
            control::GET_PCI_FUNCTION => Rights::DEVICES,
            control::ASSIGN_DEVICE => Rights::DEVICES.union(Rights::BUILD),
            control::CONSOLE_READ => Rights::CONSOLE,
            _ => Rights::BUILD,
        };
        if !self.me(id).rights.contains(right) {
            return Err(Errno::EPERM.into());
        }
        match command {
            control::CREATE => self.create_op(p, id, gpa),
            control::POPULATE => self.populate_op(p, id, gpa),
            control::LOAD => self.load_op(p, id, gpa),
            control::SET_START => self.set_start(p, id, gpa),
            control::UNPAUSE => self.unpause(p, id, gpa),
            control::PAUSE => {
                let target = self.target(p, id, gpa)?;
                if self.me(target).stage != Stage::Live {
                    return Err(Errno::EINVAL.into());
                }
                self.pause(p, target)
            }
            control::DESTROY => self.destroy_op(p, id, gpa),
            control::RESTART => self.restart_op(p, id, gpa),
            control::CRASH => self.crash_op(p, id, gpa),
            control::GET_INFO => self.info_op(p, id, gpa),
            control::GET_DEATH => self.death_op(p, id, gpa),
            control::SET_GRANT => {
                let op: SetGrant = self.get(p, id, gpa)?;
                let target = self.building(id, op.domid)?;
                self.set_grant(p, target, op.grantee, op.gref, Gfn(op.gfn))?;
                Ok(0)
            }
            control::ASSIGN_DEVICE => self.assign_op(p, id, gpa),
            control::GET_PCI_FUNCTION => self.pci_function_op(p, id, gpa),
            control::CONSOLE_READ => self.console_read(p, id, gpa),
            control::PHYSINFO => self.physinfo_op(p, id, gpa),
            control::SET_HVM_PARAM => self.set_hvm_param(p, id, gpa),
            control::GET_EXITS => self.exits_op(p, id, gpa),
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    /// A domain that the caller created.
    pub(crate) fn built(&self, id: DomainId, which: DomainId) -> Result<DomainId, Errno> {
        let domain = self.domain(which).ok_or(Errno::ESRCH)?;
        if domain.builder == Some(id) { Ok(which) } else { Err(Errno::EPERM) }
    }

    /// The same, and it is being built.
    fn building(&self, id: DomainId, which: DomainId) -> Result<DomainId, Errno> {
        let which = self.built(id, which)?;
        if self.me(which).stage == Stage::Building { Ok(which) } else { Err(Errno::EBUSY) }
    }

    fn target(&self, p: &P, id: DomainId, gpa: u64) -> Result<DomainId, Errno> {
        let op: DomainOp = self.get(p, id, gpa)?;
        self.built(id, op.domid)
    }

    fn create_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: Create = self.get(p, id, gpa)?;
        let rights = Rights::from_bits(op.rights).ok_or(Errno::EINVAL)?;
        op.vcpus = op.vcpus.max(1);
        let most = match op.kind {
            KIND_UNIKERNEL => 1,
            KIND_PVH => MAX_VCPUS,
            _ => return Err(Errno::EINVAL.into()),
        };
        // A kernel of its own is nobody's helper.
        let is_strange = op.kind == KIND_PVH && op.rights != 0;
        if op.class > CLASS_GUEST || op.vcpus as usize > most || is_strange {
            return Err(Errno::EINVAL.into());
        }
        if !self.me(id).rights.contains(rights) {
            return Err(Errno::EPERM.into());
        }
        op.domid = self.free_id(op.domid)?;
        if op.kind == KIND_PVH && p.virtualization().is_err() {
            return Err(Errno::ENODEV.into());
        }
        let plan = Plan {
            id: op.domid,
            name: op.name,
            class: op.class,
            rights,
            builder: Some(id),
            kind: op.kind,
            vcpus: u8::try_from(op.vcpus).unwrap_or(1),
            max_pages: op.max_pages,
            budget_ns: u64::from(op.budget_us) * 1000,
            period_ns: u64::from(op.period_us) * 1000,
        };
        // An answer that cannot be written must not leave a domain behind that nobody knows.
        self.put(p, id, gpa, &op)?;
        self.create(p, &plan)?;
        Ok(0)
    }

    fn free_id(&self, wanted: DomainId) -> Result<DomainId, Errno> {
        if wanted == ANY_DOMAIN {
            // In turn, so that an id that was just given up is not somebody else's at once:
            // peers may still grant something to its last holder.
            let free = |id: &usize| self.domains[*id].is_none();
            let next = (1..=MAX_DOMAINS).map(|n| (self.last_id + n) % MAX_DOMAINS).find(free);
            return Ok(DomainId(u16::try_from(next.ok_or(Errno::ENOSPC)?).unwrap_or(0)));
        }
        match self.domains.get(usize::from(wanted.0)) {
            None => Err(Errno::EINVAL),
            Some(Some(_)) => Err(Errno::EEXIST),
            Some(None) => Ok(wanted),
        }
    }

    /// Makes a domain without memory.
    ///
    /// # Errors
    /// `ENOMEM`; nothing is left behind then.
    pub(crate) fn create(&mut self, p: &mut P, plan: &Plan) -> Result<(), Errno> {
        let mut account = Account { owner: plan.id, pages: 0, max: plan.max_pages };
        let frames = &mut self.frames;
        let is_pvh = plan.kind == KIND_PVH;
        let per_vcpu = if is_pvh { GUEST_FRAMES } else { 1 };
        let mut own = Vec::<Mfn, { 2 + MAX_VCPUS * GUEST_FRAMES }>::new();
        for _ in 0..2 + usize::from(plan.vcpus) * per_vcpu {
            match frames.allocate(p, &mut account) {
                Ok(mfn) => _ = own.push(mfn),
                Err(errno) => return Err(give_back(frames, &own, &mut account, errno)),
            }
        }
        let p2m = match P2m::new(p, frames, &mut account, is_pvh) {
            Ok(p2m) => p2m,
            Err(errno) => return Err(give_back(frames, &own, &mut account, errno)),
        };
        let (shared, console) = (own[0], own[1]);
        Self::write_wall_clock(p, shared);
        let mut vcpus = Vec::new();
        for (index, frames) in (0..).zip(own[2..].chunks(per_vcpu)) {
            let _ = vcpus.push(Self::new_vcpu(p, plan, shared, index, frames));
        }
        self.lives += 1;
        self.last_id = plan.id.0.into();
        self.domains[usize::from(plan.id.0)] = Some(Domain {
            id: plan.id,
            name: plan.name,
            class: plan.class,
            rights: plan.rights,
            builder: plan.builder,
            account,
            stage: Stage::Building,
            paused: false,
            incarnation: 1,
            life: self.lives,
            started_ns: 0,
            p2m,
            shared,
            shared_place: None,
            console,
            console_written: 0,
            ports: Ports {
                table: Table::new(),
                hint: 1,
                used: 0,
                virqs: [0; event::NR_VIRQS as usize],
            },
            grants: Grants {
                shared: Table::new(),
                active: Table::new(),
                places: [None; MAX_FRAMES as usize],
                maps: Table::new(),
                free_map: 0,
                mapped: 0,
            },
            vcpus,
            acting: 0,
            doomed: None,
            alone: None,
            pvh: is_pvh.then(Pvh::new),
            devices: Vec::new(),
            death: DeathRecord::new_zeroed(),
        });
        Ok(())
    }

    fn new_vcpu(p: &mut P, plan: &Plan, shared: Mfn, index: u8, frames: &[Mfn]) -> Vcpu<P> {
        let state = match *frames {
            [first, second, third, ..] => p.new_guest([first, second, third]),
            [first, ..] => p.new_vcpu(first),
            [] => unreachable!("a vCPU has frames"),
        };
        let info = first_info(shared, index);
        Self::write_time(p, info, 0);
        let mut vcpu = Vcpu::new(state, frames, info);
        vcpu.reset();
        vcpu.budget = plan.budget_ns;
        vcpu.period = plan.period_ns;
        vcpu
    }

    fn populate_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: Populate = self.get(p, id, gpa)?;
        let target = self.building(id, op.domid)?;
        let (preserved, missing) = match op.flags {
            0 => (false, false),
            POPULATE_PRESERVED => (true, false),
            POPULATE_MISSING => (false, true),
            _ => return Err(Errno::EINVAL.into()),
        };
        let mut left = QUOTA;
        while op.done < u64::from(op.count) && left > 0 {
            let gfn = Gfn(op.gfn.checked_add(op.done).ok_or(Errno::EINVAL)?);
            match self.populate(p, target, gfn, op.access, preserved) {
                Err(Errno::EEXIST) if missing => {}
                done => _ = done?,
            }
            op.done += 1;
            left -= 1;
        }
        self.put(p, id, gpa, &op)?;
        if op.done < u64::from(op.count) { AGAIN } else { Ok(0) }
    }

    /// Puts a page of fresh memory into a domain.
    ///
    /// # Errors
    /// `EINVAL`: bad access bits or beyond the address space. `EEXIST`. `ENOMEM`.
    pub(crate) fn populate(
        &mut self,
        p: &mut P,
        id: DomainId,
        gfn: Gfn,
        access: u32,
        preserved: bool,
    ) -> Result<Mfn, Errno> {
        if access & !ALL_ACCESS != 0 || access & ACCESS_READ == 0 {
            return Err(Errno::EINVAL);
        }
        let (domain, frames) = self.with_frames(id);
        let mfn = frames.allocate(p, &mut domain.account)?;
        let page = Page {
            write: access & ACCESS_WRITE != 0,
            execute: access & ACCESS_EXECUTE != 0,
            preserved,
            ..Page::new(mfn, Kind::Ram)
        };
        let inserted = domain.p2m.insert(p, frames, &mut domain.account, gfn, page);
        if let Err(errno) = inserted {
            frames.release(mfn, &mut domain.account);
            return Err(errno);
        }
        Ok(mfn)
    }

    fn load_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let op: Load = self.get(p, id, gpa)?;
        let target = self.building(id, op.domid)?;
        if op.len > LOAD_MAX {
            return Err(Errno::E2BIG.into());
        }
        let mut done = 0;
        while done < u64::from(op.len) {
            let from = op.source.wrapping_add(done);
            let to = op.gpa.wrapping_add(done);
            let source = self.memory_at(p, id, from)?;
            let dest = self.memory_at(p, target, to)?;
            // What the target shows of others is not its memory.
            if !self.frames.is_owned_by(dest.0, target) {
                return Err(Errno::EFAULT.into());
            }
            let room = 4096 - source.1.max(dest.1) as u64;
            let len = (u64::from(op.len) - done).min(room);
            p.copy(source, dest, usize::try_from(len).unwrap_or(0));
            done += len;
        }
        Ok(0)
    }

    /// Where a byte of a domain is: memory of its own, or the bundle.
    fn memory_at(&self, p: &P, id: DomainId, gpa: u64) -> Result<(Mfn, usize), Errno> {
        let page = self.me(id).p2m.page(p, Gfn::containing(gpa)).ok_or(Errno::EFAULT)?;
        match page.kind {
            Kind::Ram | Kind::Bundle => Ok((page.mfn, (gpa & 0xfff) as usize)),
            _ => Err(Errno::EFAULT),
        }
    }

    fn set_start(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let op: SetStart = self.get(p, id, gpa)?;
        let target = self.building(id, op.domid)?;
        if op.entry >> 12 >= GFN_LIMIT {
            return Err(Errno::EINVAL.into());
        }
        if self.me(target).pvh.is_some() {
            let narrow = |value: u64| u32::try_from(value).map_err(|_| Errno::EINVAL);
            self.start_pvh(target, narrow(op.entry)?, narrow(op.argument)?);
            return Ok(0);
        }
        let state = self.me_mut(target).vcpu_mut().state.as_mut().ok_or(Errno::EBUSY)?;
        let registers = P::registers_mut(state);
        registers.rip = op.entry;
        registers.rsp = op.stack;
        registers.rdi = op.argument;
        Ok(0)
    }

    fn unpause(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let target = self.target(p, id, gpa)?;
        match self.me(target).stage {
            Stage::Building => self.begin(p, target),
            Stage::Live => {}
            _ => return Err(Errno::EINVAL.into()),
        }
        self.me_mut(target).paused = false;
        self.make_all_ready(p, target);
        Ok(0)
    }

    /// Starts the life of a domain that is built.
    pub(crate) fn begin(&mut self, p: &mut P, id: DomainId) {
        let now = p.now_ns();
        let domain = self.me_mut(id);
        domain.stage = Stage::Live;
        domain.started_ns = now;
        for vcpu in &mut domain.vcpus {
            vcpu.period_start = now;
        }
        if domain.pvh.is_some() {
            self.begin_time(p, id);
        }
        let domain = self.me_mut(id);
        if domain.death.incarnation != 0 && domain.death.restarted_ns == 0 {
            domain.death.restarted_ns = now;
        }
    }

    fn crash_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let target = self.target(p, id, gpa)?;
        if self.me(target).stage != Stage::Live {
            return Err(Errno::EINVAL.into());
        }
        if self.me(target).pvh.is_some() {
            self.doom(p, target, Cause::new(DEATH_CRASHED, 0));
            return Ok(0);
        }
        let v = VcpuId::first(target);
        match (self.vcpu(v).on_cpu, self.vcpu_mut(v).state.take()) {
            (None, Some(mut state)) => {
                self.derail(p, v, &mut state);
                self.vcpu_mut(v).state = Some(state);
                self.make_ready(p, v);
            }
            (cpu, _) => {
                self.vcpu_mut(v).crash = true;
                if let Some(cpu) = cpu {
                    self.interrupt(p, crate::platform::CpuId(cpu));
                }
            }
        }
        Ok(0)
    }

    fn restart_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let target = self.target(p, id, gpa)?;
        match self.me(target).stage {
            Stage::Live => {
                if !self.doom(p, target, Cause::new(DEATH_RESTARTED, 0)) {
                    return AGAIN;
                }
                self.me_mut(target).stage = Stage::Restarting(Step::Grants(0));
            }
            Stage::Dead => self.me_mut(target).stage = Stage::Restarting(Step::Grants(0)),
            Stage::Restarting(_) => {}
            Stage::Building | Stage::Dying(_) => return Err(Errno::EINVAL.into()),
        }
        let Stage::Restarting(step) = self.me(target).stage else { return AGAIN };
        match self.restart_step(p, target, step)? {
            Some(next) => {
                self.me_mut(target).stage = Stage::Restarting(next);
                AGAIN
            }
            None => Ok(0),
        }
    }

    /// Does one step, or part of one; the next step is the answer.
    fn restart_step(&mut self, p: &mut P, id: DomainId, step: Step) -> Result<Option<Step>, Errno> {
        match step {
            Step::Devices | Step::Grants(_) => {
                let from = if let Step::Grants(from) = step { from } else { 0 };
                Ok(Some(self.drop_maps(p, id, from).map_or(Step::Tables, Step::Grants)))
            }
            Step::Tables => {
                self.empty_tables(p, id);
                Ok(Some(Step::Memory(Gfn(0))))
            }
            Step::Memory(from) => {
                let next = self.refresh_memory(p, id, from)?;
                Ok(Some(next.map_or(Step::Processors, Step::Memory)))
            }
            Step::Processors => {
                self.lives += 1;
                let life = self.lives;
                let domain = self.me_mut(id);
                domain.life = life;
                domain.incarnation += 1;
                domain.stage = Stage::Building;
                domain.paused = false;
                domain.started_ns = 0;
                domain.vcpus.iter_mut().for_each(Vcpu::reset);
                if let Some(pvh) = &mut domain.pvh {
                    pvh.reset();
                }
                self.update_deadline(p, id);
                Ok(None)
            }
        }
    }

    /// Empties what belongs to one life. Its ports were closed at its death; those that its
    /// builder or a peer made since go too.
    fn empty_tables(&mut self, p: &mut P, id: DomainId) {
        self.close_all(p, id);
        let (domain, frames) = self.with_frames(id);
        let grants = &mut domain.grants;
        for place in grants.places.iter_mut().chain([&mut domain.shared_place]) {
            if let Some(gfn) = place.take() {
                domain.p2m.remove(p, frames, gfn);
            }
        }
        grants.shared.clear(p);
        grants.active.clear(p);
        grants.maps.clear(p);
        grants.free_map = 0;
        domain.ports.table.clear(p);
        domain.ports.hint = 1;
        let shared = domain.shared;
        p.zero(shared);
        Self::write_wall_clock(p, shared);
        for v in self.vcpus_of(id) {
            Self::write_time(p, self.vcpu(v).info, 0);
        }
        // From here on a peer's pin is one on a frame alone.
        self.lives += 1;
        self.me_mut(id).life = self.lives;
    }

    /// Makes memory as fresh as at the first start, some pages at a time; answers where to go on.
    fn refresh_memory(&mut self, p: &mut P, id: DomainId, from: Gfn) -> Result<Option<Gfn>, Errno> {
        let mut gfn = from;
        let mut left = QUOTA;
        while left > 0 {
            left -= 1;
            gfn = match self.me(id).p2m.walk(p, gfn) {
                Walk::End => return Ok(None),
                Walk::Skipped(next) => next,
                Walk::Page(at, page) => {
                    self.refresh_page(p, id, at, page)?;
                    Gfn(at.0 + 1)
                }
            };
        }
        Ok(Some(gfn))
    }

    fn refresh_page(&mut self, p: &mut P, id: DomainId, gfn: Gfn, page: Page) -> Result<(), Errno> {
        if page.kind != Kind::Ram {
            return Ok(());
        }
        // What the domain could not write is as its builder left it, and is loaded again anyway.
        let keeps = page.preserved || !page.write;
        let (domain, frames) = self.with_frames(id);
        if !frames.is_pinned(page.mfn) {
            if !keeps {
                p.zero(page.mfn);
            }
            return Ok(());
        }
        // A peer still reaches the frame, which must not be part of the next life. The frame is
        // replaced: it leaves the account first, so that an account at its limit can do it.
        if frames.counts().1 == 0 {
            return Err(Errno::ENOMEM);
        }
        frames.release(page.mfn, &mut domain.account);
        let fresh = frames.allocate(p, &mut domain.account)?;
        if keeps {
            p.copy((page.mfn, 0), (fresh, 0), 4096);
        }
        domain.p2m.replace(p, frames, gfn, Page { mfn: fresh, ..page });
        Ok(())
    }

    fn destroy_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let target = self.target(p, id, gpa)?;
        if self.me(target).stage == Stage::Live && !self.doom(p, target, Cause::default()) {
            return AGAIN;
        }
        let step = match self.me(target).stage {
            Stage::Dying(step) => step,
            _ => Step::Devices,
        };
        match self.destroy_step(p, target, step) {
            Some(next) => {
                self.me_mut(target).stage = Stage::Dying(next);
                AGAIN
            }
            None => Ok(0),
        }
    }

    fn destroy_step(&mut self, p: &mut P, id: DomainId, step: Step) -> Option<Step> {
        match step {
            Step::Devices => {
                self.close_all(p, id);
                while let Some(bdf) = self.me_mut(id).devices.pop() {
                    self.pci.release(p, bdf);
                }
                Some(Step::Processors)
            }
            // Before any table is freed; who is dying is not picked again.
            Step::Processors => match self.sched.holds_space(id) {
                Some(cpu) => {
                    self.interrupt(p, cpu);
                    Some(Step::Processors)
                }
                None => Some(Step::Grants(0)),
            },
            Step::Grants(from) => {
                Some(self.drop_maps(p, id, from).map_or(Step::Tables, Step::Grants))
            }
            Step::Tables => {
                self.empty_tables(p, id);
                let (domain, frames) = self.with_frames(id);
                let Domain { grants, ports, account, .. } = domain;
                grants.shared.free(frames, account);
                grants.active.free(frames, account);
                grants.maps.free(frames, account);
                ports.table.free(frames, account);
                Some(Step::Memory(Gfn(0)))
            }
            Step::Memory(from) => {
                let (domain, frames) = self.with_frames(id);
                let done = domain.p2m.tear_down(p, frames, &mut domain.account);
                if done {
                    self.bury(p, id);
                    return None;
                }
                Some(Step::Memory(from))
            }
        }
    }

    /// The end: frees the root table and the domain itself. No processor has the table loaded.
    fn bury(&mut self, p: &mut P, id: DomainId) {
        self.sched.forget(id);
        self.sched.set_deadline(id, NEVER);
        self.forget_remote(p, id);
        let Some(domain) = self.domains[usize::from(id.0)].take() else { return };
        let Domain { mut account, p2m, vcpus, shared, console, builder, .. } = domain;
        // The next domain with this id has no rights over those that this one created.
        for child in self.domains.iter_mut().flatten().filter(|child| child.builder == Some(id)) {
            child.builder = builder;
        }
        for vcpu in vcpus {
            if let Some(state) = vcpu.state {
                p.drop_vcpu(state);
            }
            for mfn in vcpu.frames {
                self.frames.release(mfn, &mut account);
            }
        }
        for mfn in [shared, console] {
            self.frames.release(mfn, &mut account);
        }
        p2m.free(&mut self.frames, &mut account);
        assert!(account.pages == 0, "a destroyed domain has given back all its frames");
    }

    fn info_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: DomainInfo = self.get(p, id, gpa)?;
        let least = usize::from(op.domid.0);
        let found = self.domains.iter().skip(least).flatten().next().ok_or(Errno::ESRCH)?;
        op = self.info(found);
        self.put(p, id, gpa, &op)?;
        Ok(0)
    }

    fn info(&self, domain: &Domain<P>) -> DomainInfo {
        let trusted = |&bdf: &Bdf| self.pci.find(bdf).is_some_and(|function| function.trusted);
        DomainInfo {
            domid: domain.id,
            state: domain.state(),
            class: domain.class,
            incarnation: domain.incarnation,
            pages: domain.account.pages,
            max_pages: domain.account.max,
            cpu_ns: domain.vcpus.iter().map(|vcpu| vcpu.cpu_ns).sum(),
            started_ns: domain.started_ns,
            hypercalls: domain.vcpus.iter().map(|vcpu| vcpu.hypercalls).sum(),
            flags: if domain.devices.iter().any(trusted) { INFO_DMA_TRUSTED } else { 0 },
            kind: if domain.pvh.is_some() { KIND_PVH } else { KIND_UNIKERNEL },
            vcpus: u8::try_from(domain.vcpus.len()).unwrap_or(u8::MAX),
            pad: 0,
            mapped_grants: domain.grants.mapped,
            ports: domain.ports.used,
            budget_overruns: domain.vcpus.iter().map(|vcpu| vcpu.overruns).sum(),
            name: domain.name,
        }
    }

    fn exits_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: ExitCounts = self.get(p, id, gpa)?;
        let target = self.built(id, op.domid)?;
        let pvh = self.me(target).pvh.as_ref().ok_or(Errno::EINVAL)?;
        op.exits = pvh.exits;
        op.unlisted = pvh.unlisted;
        op.last_unlisted = pvh.last_unlisted;
        self.put(p, id, gpa, &op)?;
        Ok(0)
    }

    fn death_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: GetDeath = self.get(p, id, gpa)?;
        let target = self.built(id, op.domid)?;
        op.record = self.me(target).death;
        self.put(p, id, gpa, &op)?;
        Ok(0)
    }

    fn assign_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: AssignDevice = self.get(p, id, gpa)?;
        let target = self.building(id, op.domid)?;
        // There is no IOMMU driver yet: nothing but trust confines a device.
        if op.flags != ASSIGN_DMA_TRUSTED {
            return Err(Errno::EOPNOTSUPP.into());
        }
        if self.me(target).devices.is_full() {
            return Err(Errno::ENOSPC.into());
        }
        let bdf = Bdf(op.bdf);
        self.pci.assign(p, bdf, target, true)?;
        match self.map_bars(p, target, bdf, op.gpa) {
            Ok(end) => op.gpa = end,
            Err(errno) => {
                self.unmap_bars(p, target, bdf, op.gpa);
                self.pci.release(p, bdf);
                return Err(errno.into());
            }
        }
        let _ = self.me_mut(target).devices.push(bdf);
        self.put(p, id, gpa, &op)?;
        Ok(0)
    }

    /// Maps the memory BARs of a function one behind the other. Some may be mapped when it fails.
    fn map_bars(&mut self, p: &mut P, id: DomainId, bdf: Bdf, start: u64) -> Result<u64, Errno> {
        let function = self.pci.find(bdf).ok_or(Errno::ENODEV)?.clone();
        let mut next = start;
        let mut total = 0;
        for (index, bar) in function.bars.iter().enumerate() {
            if !self.pci.is_mappable(bdf, index) {
                continue;
            }
            let bytes = bar.bytes.max(4096);
            total += bytes;
            if total > BARS_MAX {
                return Err(Errno::E2BIG);
            }
            next = next.checked_next_multiple_of(bytes).ok_or(Errno::EINVAL)?;
            for offset in (0..bytes).step_by(4096) {
                let mfn = Mfn((bar.address + offset) >> 12);
                let write = !function.is_table_page(mfn.address());
                let page = Page { write, ..Page::new(mfn, Kind::Device) };
                let gfn = Gfn::containing(next.checked_add(offset).ok_or(Errno::EINVAL)?);
                let (domain, frames) = self.with_frames(id);
                if frames.manages(mfn) {
                    // Registers where memory is: the firmware's mistake, nobody's right.
                    return Err(Errno::EIO);
                }
                domain.p2m.insert(p, frames, &mut domain.account, gfn, page)?;
            }
            self.pci.place_bar(bdf, index, next + (bar.address & 0xfff));
            next += bytes;
        }
        Ok(next)
    }

    /// Takes the registers of a function out of a domain's address space, which has them at or
    /// behind `start`.
    fn unmap_bars(&mut self, p: &mut P, id: DomainId, bdf: Bdf, start: u64) {
        let Some(function) = self.pci.find(bdf).cloned() else { return };
        let (domain, frames) = self.with_frames(id);
        let mut gfn = Gfn::containing(start);
        // Holes are left by alignment only, so that twice the space of all BARs is enough.
        for _ in 0..2 * BARS_MAX / 4096 {
            let page = domain.p2m.page(p, gfn);
            if page.is_some_and(|page| {
                page.kind == Kind::Device && function.has_registers_at(page.mfn.address())
            }) {
                domain.p2m.remove(p, frames, gfn);
            }
            gfn = Gfn(gfn.0.wrapping_add(1));
        }
    }

    fn pci_function_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let mut op: PciFunction = self.get(p, id, gpa)?;
        let function = self.pci.functions().get(op.index as usize).ok_or(Errno::ENOENT)?;
        op.bdf = function.bdf.0;
        op.vendor = function.vendor;
        op.device = function.device;
        op.class = function.class;
        op.owner = function.owner.unwrap_or(DomainId::INVALID);
        op.msix_vectors = function.msix_vectors();
        op.msi_vectors = function.msi_vectors();
        op.pad = 0;
        self.put(p, id, gpa, &op)?;
        Ok(0)
    }

    fn physinfo_op(&mut self, p: &mut P, id: DomainId, gpa: u64) -> Answer {
        let (total_pages, free_pages) = self.frames.counts();
        let clock = p.clock();
        let info = PhysInfo {
            version: control::VERSION,
            cpus: u32::try_from(self.sched.count).unwrap_or(0),
            total_pages,
            free_pages,
            core_pages: self.core_pages,
            tsc_khz: clock.tsc_khz,
            now_ns: p.now_ns(),
            control_started_ns: self.control_started_ns,
            boot_unix_s: clock.unix_at_zero_s,
        };
        self.put(p, id, gpa, &info)?;
        Ok(0)
    }

    /// Makes a port of `owner` that `remote` may bind to.
    ///
    /// # Errors
    /// As [`Core::new_port`].
    pub(crate) fn unbound_port(
        &mut self,
        p: &mut P,
        owner: DomainId,
        remote: DomainId,
    ) -> Result<EventPort, Errno> {
        self.new_port(p, owner, Port::new(STATUS_UNBOUND, remote, 0))
    }
}

/// What a domain shall be.
pub(crate) struct Plan {
    pub(crate) id: DomainId,
    pub(crate) name: [u8; 32],
    pub(crate) class: u8,
    pub(crate) rights: Rights,
    pub(crate) builder: Option<DomainId>,
    pub(crate) kind: u8,
    pub(crate) vcpus: u8,
    pub(crate) max_pages: u32,
    pub(crate) budget_ns: u64,
    pub(crate) period_ns: u64,
}

fn give_back(frames: &mut FrameTable, taken: &[Mfn], account: &mut Account, errno: Errno) -> Errno {
    for &mfn in taken {
        frames.release(mfn, account);
    }
    errno
}
