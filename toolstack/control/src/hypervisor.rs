//! What the control domain asks of the core.

use axolotl_abi::control::{
    Create, DeathRecord, DomainInfo, ExitCounts, PciFunction, PhysInfo, Populate, SetStart,
};
use xen_abi::{DomainId, Errno, EventPort, GrantRef};

/// The core, as the control domain sees it: the operations of [`axolotl_abi::control`], and what
/// else the holder of its rights may do. Errors are the core's.
#[expect(
    clippy::missing_errors_doc,
    reason = "each operation's errors stand in axolotl_abi::control"
)]
pub trait Hypervisor {
    /// `CREATE`; the id.
    fn create(&mut self, domain: &Create) -> Result<DomainId, Errno>;
    /// `POPULATE`, once; `EAGAIN` with `done` advanced: call again.
    fn populate(&mut self, range: &mut Populate) -> Result<(), Errno>;
    /// `LOAD` of at most 65,536 bytes.
    fn load(&mut self, domid: DomainId, gpa: u64, bytes: &[u8]) -> Result<(), Errno>;
    /// `SET_START`.
    fn set_start(&mut self, start: &SetStart) -> Result<(), Errno>;
    /// `SET_GRANT`: lets `grantee` map page `gfn` of `domid` by the reserved entry `gref`.
    fn set_grant(
        &mut self,
        domid: DomainId,
        grantee: DomainId,
        gref: GrantRef,
        gfn: u64,
    ) -> Result<(), Errno>;
    /// `SET_HVM_PARAM`.
    fn set_hvm_param(&mut self, domid: DomainId, index: u32, value: u64) -> Result<(), Errno>;
    /// Bytes that a PVH guest wrote to its console ring since the last time: how many. Where the
    /// ring is not reached yet, it is by the reserved grant and this port of the guest's.
    fn console_ring(
        &mut self,
        domid: DomainId,
        port: EventPort,
        buffer: &mut [u8],
    ) -> Result<usize, Errno>;
    /// Writes to a PVH guest's console ring, all or nothing: whether there was room.
    fn console_type(
        &mut self,
        domid: DomainId,
        port: EventPort,
        bytes: &[u8],
    ) -> Result<bool, Errno>;
    /// Lets go of a console ring, because its domain ended.
    fn leave_console(&mut self, domid: DomainId);
    /// `UNPAUSE`.
    fn unpause(&mut self, domid: DomainId) -> Result<(), Errno>;
    /// `PAUSE`, once.
    fn pause(&mut self, domid: DomainId) -> Result<(), Errno>;
    /// `DESTROY`, once.
    fn destroy(&mut self, domid: DomainId) -> Result<(), Errno>;
    /// `RESTART`, once.
    fn restart(&mut self, domid: DomainId) -> Result<(), Errno>;
    /// `CRASH`.
    fn crash(&mut self, domid: DomainId) -> Result<(), Errno>;
    /// `GET_INFO`: the domain with the lowest id that is not below `from`.
    fn info(&mut self, from: DomainId) -> Result<DomainInfo, Errno>;
    /// `GET_EXITS`.
    fn exits(&mut self, domid: DomainId) -> Result<ExitCounts, Errno>;
    /// `GET_DEATH`.
    fn death(&mut self, domid: DomainId) -> Result<DeathRecord, Errno>;
    /// `GET_PCI_FUNCTION`, for the function at `bdf`; `ENODEV` when there is none.
    fn pci_function(&mut self, bdf: u32) -> Result<PciFunction, Errno>;
    /// `ASSIGN_DEVICE`; the first address behind its BARs, which start at or behind `gpa`.
    fn assign_device(
        &mut self,
        domid: DomainId,
        bdf: u32,
        trusted: bool,
        gpa: u64,
    ) -> Result<u64, Errno>;
    /// `CONSOLE_READ` into `buffer`, at most 4096 bytes: how many. Moves `position`.
    fn console_read(
        &mut self,
        domid: DomainId,
        position: &mut u64,
        buffer: &mut [u8],
    ) -> Result<usize, Errno>;
    /// `PHYSINFO`.
    fn physical(&mut self) -> Result<PhysInfo, Errno>;
    /// `EVTCHNOP_alloc_unbound` in `domid`, for `remote`.
    fn alloc_unbound(&mut self, domid: DomainId, remote: DomainId) -> Result<EventPort, Errno>;
    /// Writes to the machine's console.
    fn console_write(&mut self, text: &[u8]);
    /// System time.
    fn now_ns(&self) -> u64;
}

/// How often an operation that answers `EAGAIN` is called again before it counts as stuck. Each
/// call does a bounded piece of work, so that no domain of any size needs as many.
const PATIENCE: u32 = 1 << 20;

/// Calls `operation` until it answers something other than `EAGAIN`.
pub(crate) fn until_done(mut operation: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    for _ in 0..PATIENCE {
        match operation() {
            Err(Errno::EAGAIN) => {}
            other => return other,
        }
    }
    Err(Errno::EBUSY)
}
