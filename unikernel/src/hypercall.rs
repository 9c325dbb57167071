//! Hypercalls, from the bare instruction to one that takes a typed argument structure.
#![expect(unsafe_code, reason = "`syscall` has no safe form")]

use core::arch::asm;
use xen_abi::hypercall::version::VERSION;
use xen_abi::hypercall::{EVENT_CHANNEL_OP, GRANT_TABLE_OP, MEMORY_OP, SCHED_OP, XEN_VERSION};
use xen_abi::memory::{ADD_TO_PHYSMAP, AddToPhysmap};
use xen_abi::{DomainId, Errno, Gfn};
use zerocopy::{FromBytes, IntoBytes};

/// Issues a hypercall and returns the result register.
///
/// # Safety
/// Whatever the hypercall makes the core write, it writes into memory that the caller may change,
/// and takes no page away that anything refers to.
#[inline]
pub unsafe fn raw(number: u64, arguments: [u64; 5]) -> i64 {
    let result: i64;
    // SAFETY: registers are as in `xen_abi::hypercall`; `syscall` destroys rcx and r11, and the
    // core changes nothing else. The caller answers for memory.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// A hypercall that takes and changes nothing but registers.
///
/// # Safety
/// As for [`raw`]: no argument is used as a pointer.
#[inline]
pub(crate) unsafe fn plain(number: u64, arguments: [u64; 2]) -> Result<u64, Errno> {
    // SAFETY: the caller's duty is the same.
    let result = unsafe { raw(number, [arguments[0], arguments[1], 0, 0, 0]) };
    Errno::from_result(result)
}

/// A hypercall whose second argument points to a structure that the core copies in and out.
///
/// # Safety
/// 1. `T` is the structure of this operation, or is at least as large.
/// 2. As for [`raw`], for pointers and pages that the structure names.
#[inline]
pub(crate) unsafe fn typed<T: FromBytes + IntoBytes>(
    number: u64,
    operation: u64,
    argument: &mut T,
) -> Result<u64, Errno> {
    let pointer = core::ptr::from_mut(argument) as u64;
    // SAFETY: the core writes only into `argument`, where every value is valid; the caller
    // answers for what else it names.
    let result = unsafe { raw(number, [operation, pointer, 0, 0, 0]) };
    Errno::from_result(result)
}

/// `event_channel_op`. None of its structures names memory.
pub(crate) fn event<T: FromBytes + IntoBytes>(op: u64, argument: &mut T) -> Result<u64, Errno> {
    // SAFETY: the callers, all in this crate, pair operation and structure as `xen_abi::event`
    // does, and no such structure has pointers.
    unsafe { typed(EVENT_CHANNEL_OP, op, argument) }
}

/// `sched_op` with a structure.
///
/// # Safety
/// As for [`typed`].
pub(crate) unsafe fn sched<T: FromBytes + IntoBytes>(
    op: u64,
    argument: &mut T,
) -> Result<u64, Errno> {
    // SAFETY: the caller's duty is the same.
    unsafe { typed(SCHED_OP, op, argument) }
}

/// `grant_table_op` with a batch of structures.
///
/// # Safety
/// As for [`typed`], for each of the batch.
pub(crate) unsafe fn grant<T: FromBytes + IntoBytes>(
    op: u64,
    batch: &mut [T],
) -> Result<u64, Errno> {
    let (pointer, count) = (batch.as_mut_ptr() as u64, batch.len() as u64);
    // SAFETY: the core writes only into the batch, where every value is valid; the caller answers
    // for what else it names.
    let result = unsafe { raw(GRANT_TABLE_OP, [op, pointer, count, 0, 0]) };
    Errno::from_result(result)
}

/// Puts a page that the core owns at an address of ours where nothing is.
///
/// # Safety
/// Nothing refers to the page at `gfn`.
pub(crate) unsafe fn add_to_physmap(space: u32, idx: u64, gfn: Gfn) -> Result<(), Errno> {
    let mut argument = AddToPhysmap { domid: DomainId::SELF, size: 0, space, idx, gpfn: gfn.0 };
    // SAFETY: 1. the structure is that of the operation. 2. The caller vouches for the page.
    unsafe { typed(MEMORY_OP, ADD_TO_PHYSMAP, &mut argument) }.map(drop)
}

/// `xen_version`: the least that a hypercall can do.
///
/// # Errors
/// None that a core of ours gives.
pub fn version() -> Result<u64, Errno> {
    // SAFETY: no pointers.
    unsafe { plain(XEN_VERSION, [VERSION, 0]) }
}
