//! Everything the core knows, behind one lock (`docs/locks.md`).

use crate::console::Log;
use crate::domain::{Domain, MAX_DOMAINS};
use crate::frame::{FrameTable, Mfn};
use crate::pci::Pci;
use crate::platform::Platform;
use crate::sched::Sched;
use crate::vcpu::{Vcpu, VcpuId};
use xen_abi::{DomainId, event};

/// Everything the core knows.
pub struct Core<P: Platform> {
    pub(crate) frames: FrameTable,
    pub(crate) domains: [Option<Domain<P>>; MAX_DOMAINS],
    pub(crate) sched: Sched,
    pub(crate) pci: Pci,
    pub(crate) log: Log,
    /// Who gets each global virtual interrupt.
    pub(crate) global_virqs: [Option<DomainId>; event::NR_VIRQS as usize],
    /// The id given out last.
    pub(crate) last_id: usize,
    /// Number of the last life of any domain.
    pub(crate) lives: u64,
    pub(crate) bundle: &'static [u8],
    pub(crate) bundle_mfn: Mfn,
    pub(crate) core_pages: u64,
    pub(crate) control_started_ns: u64,
}

impl<P: Platform> Core<P> {
    /// Before [`Self::init`]: no memory, no domains.
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            frames: FrameTable::empty(),
            domains: [const { None }; MAX_DOMAINS],
            sched: Sched::new(),
            pci: Pci::new(),
            log: Log::new(),
            global_virqs: [None; event::NR_VIRQS as usize],
            last_id: 0,
            lives: 0,
            bundle: &[],
            bundle_mfn: Mfn(0),
            core_pages: 0,
            control_started_ns: 0,
        }
    }

    /// A domain by its id, which may be any number.
    #[must_use]
    pub fn domain(&self, id: DomainId) -> Option<&Domain<P>> {
        self.domains.get(usize::from(id.0))?.as_ref()
    }

    pub(crate) fn domain_mut(&mut self, id: DomainId) -> Option<&mut Domain<P>> {
        self.domains.get_mut(usize::from(id.0))?.as_mut()
    }

    /// A domain that is known to exist.
    ///
    /// # Panics
    /// It does not.
    pub(crate) fn me(&self, id: DomainId) -> &Domain<P> {
        self.domain(id).expect("ids that were looked up stay valid while the lock is held")
    }

    /// As [`Self::me`].
    pub(crate) fn me_mut(&mut self, id: DomainId) -> &mut Domain<P> {
        self.domain_mut(id).expect("ids that were looked up stay valid while the lock is held")
    }

    /// A vCPU that is known to exist.
    pub(crate) fn vcpu(&self, v: VcpuId) -> &Vcpu<P> {
        &self.me(v.domain).vcpus[usize::from(v.index)]
    }

    /// As [`Self::vcpu`].
    pub(crate) fn vcpu_mut(&mut self, v: VcpuId) -> &mut Vcpu<P> {
        &mut self.me_mut(v.domain).vcpus[usize::from(v.index)]
    }

    /// The vCPUs of a domain.
    pub(crate) fn vcpus_of(&self, id: DomainId) -> impl Iterator<Item = VcpuId> + use<P> {
        let count = u8::try_from(self.me(id).vcpus.len()).unwrap_or(0);
        (0..count).map(move |index| VcpuId { domain: id, index })
    }

    /// The vCPU of a domain that is in the core.
    pub(crate) fn acting(&self, id: DomainId) -> VcpuId {
        VcpuId { domain: id, index: self.me(id).acting }
    }

    /// A domain that is known to exist, together with the frame table.
    pub(crate) fn with_frames(&mut self, id: DomainId) -> (&mut Domain<P>, &mut FrameTable) {
        let domain = self.domains[usize::from(id.0)]
            .as_mut()
            .expect("ids that were looked up stay valid while the lock is held");
        (domain, &mut self.frames)
    }

    /// The frame table, for inspection.
    #[must_use]
    pub fn frames(&self) -> &FrameTable {
        &self.frames
    }
}
