//! The control group of hypercalls, one function per operation (see [`axolotl_abi::control`]).
//!
//! Which of them work is decided by the rights that the caller was created with. Operations that
//! the core does in steps (`EAGAIN`) are called again here until they are done.
#![expect(unsafe_code, reason = "hypercalls with pointers in their structures")]

use crate::hypercall;
use crate::start::yield_now;
use axolotl_abi::CONTROL_OP;
use axolotl_abi::control::{
    ASSIGN_DEVICE, AssignDevice, CONSOLE_READ, CRASH, CREATE, ConsoleRead, Create, DESTROY,
    DeathRecord, DomainInfo, DomainOp, ExitCounts, GET_DEATH, GET_EXITS, GET_INFO,
    GET_PCI_FUNCTION, GetDeath, LOAD, Load, PAUSE, PHYSINFO, POPULATE, PciFunction, PhysInfo,
    Populate, RESTART, SET_GRANT, SET_HVM_PARAM, SET_START, SetGrant, SetHvmParam, SetStart,
    UNPAUSE,
};
use xen_abi::event::{ALLOC_UNBOUND, AllocUnbound};
use xen_abi::{DomainId, Errno, EventPort, Gfn, GrantRef};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Most bytes of one [`LOAD`].
const LOAD_BYTES: usize = 65_536;
/// Most bytes of one [`CONSOLE_READ`].
const CONSOLE_BYTES: usize = 4096;

/// An operation whose structure has no pointers.
fn call<T: FromBytes + IntoBytes>(operation: u64, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: 1. each caller below pairs operation and structure as `axolotl_abi::control` does.
    // 2. None of these has pointers, and what they do to memory they do to other domains.
    unsafe { hypercall::typed(CONTROL_OP, operation, argument) }.map(drop)
}

/// Calls until the answer is no longer `EAGAIN`.
fn until_done<T: FromBytes + IntoBytes>(operation: u64, argument: &mut T) -> Result<(), Errno> {
    loop {
        match call(operation, argument) {
            Err(Errno::EAGAIN) => yield_now(),
            result => return result,
        }
    }
}

/// Makes an empty domain and returns its id.
///
/// # Errors
/// `EEXIST`, `ENOMEM`, `EINVAL`, `EPERM`.
pub fn create(mut create: Create) -> Result<DomainId, Errno> {
    call(CREATE, &mut create)?;
    Ok(create.domid)
}

/// Puts `count` fresh pages from `gfn` on into a domain that is being built. `access` is of
/// `axolotl_abi::image`, `flags` of `axolotl_abi::control`.
///
/// # Errors
/// `ENOMEM` when the domain or the machine has no more, `EEXIST` when there is a page already.
pub fn populate(
    domid: DomainId,
    gfn: Gfn,
    count: u32,
    access: u32,
    flags: u32,
) -> Result<(), Errno> {
    let mut populate = Populate { domid, pad: 0, access, flags, count, gfn: gfn.0, done: 0 };
    until_done(POPULATE, &mut populate)
}

/// Copies bytes into the memory of a domain that is being built.
///
/// # Errors
/// `EFAULT` when there is no memory at `gpa`.
pub fn load(domid: DomainId, gpa: u64, bytes: &[u8]) -> Result<(), Errno> {
    for (i, part) in bytes.chunks(LOAD_BYTES).enumerate() {
        #[expect(clippy::cast_possible_truncation, reason = "at most LOAD_BYTES")]
        let len = part.len() as u32;
        let gpa = gpa + (i * LOAD_BYTES) as u64;
        let mut load = Load { domid, pad: 0, len, gpa, source: part.as_ptr() as u64 };
        // SAFETY: 1. the structure is that of the operation. 2. The core only reads `part`.
        unsafe { hypercall::typed(CONTROL_OP, LOAD, &mut load)? };
    }
    Ok(())
}

/// Sets the registers of a domain's first instruction.
///
/// # Errors
/// `EINVAL` when it has started.
pub fn set_start(domid: DomainId, entry: u64, stack: u64, argument: u64) -> Result<(), Errno> {
    call(SET_START, &mut SetStart { domid, pad: [0; 3], entry, stack, argument })
}

/// Fills a reserved grant entry of a domain that is being built.
///
/// # Errors
/// `EINVAL` when the entry is not a reserved one.
pub fn set_grant(
    domid: DomainId,
    gref: GrantRef,
    grantee: DomainId,
    gfn: Gfn,
) -> Result<(), Errno> {
    call(SET_GRANT, &mut SetGrant { domid, grantee, gref, gfn: gfn.0 })
}

/// Sets a parameter of a PVH domain that is being built.
///
/// # Errors
/// `EINVAL` or `EPERM` when there is no such parameter, or it is no PVH domain.
pub fn set_hvm_param(domid: DomainId, index: u32, value: u64) -> Result<(), Errno> {
    call(SET_HVM_PARAM, &mut SetHvmParam { domid, pad: 0, index, value })
}

/// How often, and why, the vCPUs of a PVH domain needed the core.
///
/// # Errors
/// `EINVAL` when it is none, `ESRCH` when there is no such domain.
pub fn exits(domid: DomainId) -> Result<ExitCounts, Errno> {
    let mut counts = ExitCounts::new_zeroed();
    counts.domid = domid;
    call(GET_EXITS, &mut counts)?;
    Ok(counts)
}

/// Makes a port in a domain that we built, for `remote` to bind to.
///
/// # Errors
/// `EPERM` when we did not build it, `ENOSPC` when it has no free port.
pub fn alloc_unbound(domid: DomainId, remote: DomainId) -> Result<EventPort, Errno> {
    let mut alloc = AllocUnbound { dom: domid, remote_dom: remote, port: EventPort(0) };
    hypercall::event(ALLOC_UNBOUND, &mut alloc)?;
    Ok(alloc.port)
}

/// Gives a PCI function to a domain that is being built, with its BARs mapped from `gpa` on.
/// Returns the first address behind them. `flags` are of `axolotl_abi::control`.
///
/// # Errors
/// `ENODEV` when there is no such function, `EBUSY` when somebody has it.
pub fn assign_device(domid: DomainId, bdf: u32, flags: u32, gpa: u64) -> Result<u64, Errno> {
    let mut assign = AssignDevice { domid, pad: 0, bdf, flags, pad2: 0, gpa };
    until_done(ASSIGN_DEVICE, &mut assign)?;
    Ok(assign.gpa)
}

/// Starts a domain, or continues a paused one.
///
/// # Errors
/// `ESRCH`, or `EINVAL` in another state.
pub fn unpause(domid: DomainId) -> Result<(), Errno> {
    call(UNPAUSE, &mut DomainOp { domid })
}

/// Stops a domain.
///
/// # Errors
/// `ESRCH`, or `EINVAL` in another state.
pub fn pause(domid: DomainId) -> Result<(), Errno> {
    until_done(PAUSE, &mut DomainOp { domid })
}

/// Takes a domain away. It may be large: this is one step.
///
/// # Errors
/// `EAGAIN` when there are more steps, `EBUSY` while others use its pages, `ESRCH`.
pub fn destroy(domid: DomainId) -> Result<(), Errno> {
    call(DESTROY, &mut DomainOp { domid })
}

/// Empties a domain for its next incarnation. It may be large: this is one step.
///
/// # Errors
/// `EAGAIN` when there are more steps, `ESRCH`, or `EINVAL` while it is being built.
pub fn restart(domid: DomainId) -> Result<(), Errno> {
    call(RESTART, &mut DomainOp { domid })
}

/// Makes a domain's next instruction fault.
///
/// # Errors
/// `ESRCH`, or `EINVAL` when it does not run.
pub fn crash(domid: DomainId) -> Result<(), Errno> {
    until_done(CRASH, &mut DomainOp { domid })
}

/// What the core knows of the domain with the lowest id that is not below `from`.
///
/// # Errors
/// `ESRCH` when there is none.
pub fn info_from(from: DomainId) -> Result<DomainInfo, Errno> {
    let mut info = DomainInfo::new_zeroed();
    info.domid = from;
    call(GET_INFO, &mut info)?;
    Ok(info)
}

/// What the core knows of this domain.
///
/// # Errors
/// `ESRCH` when there is no such domain.
pub fn info(domid: DomainId) -> Result<DomainInfo, Errno> {
    let info = info_from(domid)?;
    if info.domid == domid { Ok(info) } else { Err(Errno::ESRCH) }
}

/// The record of a domain's last death; its incarnation is 0 when it has not died.
///
/// # Errors
/// `ESRCH`.
pub fn death(domid: DomainId) -> Result<DeathRecord, Errno> {
    let mut get = GetDeath::new_zeroed();
    get.domid = domid;
    call(GET_DEATH, &mut get)?;
    Ok(get.record)
}

/// All PCI functions of the machine.
pub fn pci_functions() -> impl Iterator<Item = PciFunction> {
    (0..).map_while(|index| {
        let mut function = PciFunction::new_zeroed();
        function.index = index;
        call(GET_PCI_FUNCTION, &mut function).ok().map(|()| function)
    })
}

/// The machine.
///
/// # Errors
/// `EPERM`.
pub fn physinfo() -> Result<PhysInfo, Errno> {
    let mut info = PhysInfo::new_zeroed();
    call(PHYSINFO, &mut info)?;
    Ok(info)
}

/// Reads what a domain wrote to its console from byte `position` on, counted since its creation;
/// what was overwritten meanwhile is skipped. Returns the number of bytes in `buffer`, and the
/// position behind them.
///
/// # Errors
/// `ESRCH`, `EPERM`.
pub fn console_read(
    domid: DomainId,
    position: u64,
    buffer: &mut [u8],
) -> Result<(usize, u64), Errno> {
    #[expect(clippy::cast_possible_truncation, reason = "at most CONSOLE_BYTES")]
    let len = buffer.len().min(CONSOLE_BYTES) as u32;
    let pointer = buffer.as_mut_ptr() as u64;
    let mut read = ConsoleRead { domid, pad: 0, len, buffer: pointer, position };
    // SAFETY: 1. the structure is that of the operation. 2. The core writes at most `len` bytes
    // into `buffer`, which we hold exclusively.
    unsafe { hypercall::typed(CONTROL_OP, CONSOLE_READ, &mut read)? };
    Ok(((read.len as usize).min(buffer.len()), read.position))
}
