//! Memory that only the runtime should write: our grant table, and the ring to the store.
#![expect(unsafe_code, reason = "pages of the domain's layout that no wrapper hands out")]

use crate::life::Life;
use axolotl_abi::start::{GRANT_TABLE_GPA, XENSTORE_RING_GPA};
use core::ptr::NonNull;
use core::sync::atomic::Ordering::SeqCst;
use shmem::Page;
use unikernel::domain_api::Events;
use xen_abi::grant::ENTRIES_PER_FRAME;
use xen_abi::xenstore::{REQ_PROD, RSP_CONS};
use xen_abi::{GrantRef, PAGE_SIZE};

fn page_at(gpa: u64) -> Page {
    let base = NonNull::new(gpa as *mut u8).expect("nothing is at address 0");
    // SAFETY: 1. the callers name pages of the domain's layout, which the runtime has mapped.
    // 2. The runtime, too, reaches them through `Page` alone.
    unsafe { Page::from_raw(base) }
}

/// Overwrites an entry of our grant table, as if it were not in use. The grant must have been made.
pub fn overwrite_grant(gref: GrantRef, flags: u16, domid: u16, frame: u32) {
    let frame_of_table = u64::from(gref.0 / ENTRIES_PER_FRAME);
    let table = page_at(GRANT_TABLE_GPA + frame_of_table * PAGE_SIZE as u64);
    let at = 8 * (gref.0 % ENTRIES_PER_FRAME) as usize;
    table.u32(at + 4).store(frame, SeqCst);
    table.u16(at + 2).store(domid, SeqCst);
    table.u16(at).store(flags, SeqCst);
}

/// Makes the ring to the store unusable. What follows must not need it.
pub fn break_store_ring(life: &mut Life) {
    let ring = page_at(XENSTORE_RING_GPA);
    for offset in [REQ_PROD, RSP_CONS] {
        ring.u32(offset).store(life.random.word(), SeqCst);
    }
    let mut garbage = [0; 512];
    life.random.fill(&mut garbage);
    ring.write(0, &garbage);
    let port = life.domain.start_info().xenstore_port;
    life.domain.notify(port);
}
