//! Hypercalls that must fail: bad pointers, foreign grants, wrong ports, missing rights.

use crate::state::State;
use alloc::vec::Vec;
use axolotl_abi::control::{CRASH, CREATE};
use axolotl_abi::device::{GET_DEVICE, TRANSLATE};
use axolotl_abi::start::{SHARED_INFO_GPA, STACK_PAGES, STACK_TOP_GPA};
use axolotl_abi::{CONTROL_OP, DEVICE_OP};
use core::sync::atomic::Ordering::Relaxed;
use shmem::Page;
use unikernel::println;
use xen_abi::hypercall::{
    CONSOLE_IO, CONSOLEIO_WRITE, EVENT_CHANNEL_OP, GRANT_TABLE_OP, HVM_OP, MEMORY_OP, MULTICALL,
    SCHED_OP, SET_TIMER_OP, VCPU_OP, VM_ASSIST, XEN_VERSION, version,
};
use xen_abi::{Errno, event, grant, memory, sched};

/// Addresses that a domain can neither read nor write.
pub const UNREADABLE: [u64; 10] = [
    0,
    STACK_TOP_GPA - STACK_PAGES * 4096 - 8,
    STACK_TOP_GPA - 2,
    SHARED_INFO_GPA + 4096 - 2,
    0x4000_0000,
    0xfee0_0000,
    0x0000_8000_0000_0000,
    0xffff_8000_0000_0000,
    0xffff_ffff_8000_0000,
    0xffff_ffff_ffff_fff8,
];

/// Operations that read their argument before they do anything else.
const WITH_POINTER: [(u64, u64); 24] = [
    (XEN_VERSION, version::EXTRAVERSION),
    (XEN_VERSION, version::GET_FEATURES),
    (MEMORY_OP, memory::DECREASE_RESERVATION),
    (MEMORY_OP, memory::POPULATE_PHYSMAP),
    (MEMORY_OP, memory::ADD_TO_PHYSMAP),
    (MEMORY_OP, memory::REMOVE_FROM_PHYSMAP),
    (MEMORY_OP, memory::CURRENT_RESERVATION),
    (GRANT_TABLE_OP, grant::MAP_GRANT_REF),
    (GRANT_TABLE_OP, grant::UNMAP_GRANT_REF),
    (GRANT_TABLE_OP, grant::COPY),
    (GRANT_TABLE_OP, grant::QUERY_SIZE),
    (GRANT_TABLE_OP, grant::SETUP_TABLE),
    (SCHED_OP, sched::SHUTDOWN),
    (SCHED_OP, sched::POLL),
    (SCHED_OP, sched::WATCHDOG),
    (EVENT_CHANNEL_OP, event::BIND_INTERDOMAIN),
    (EVENT_CHANNEL_OP, event::BIND_VIRQ),
    (EVENT_CHANNEL_OP, event::BIND_PIRQ),
    (EVENT_CHANNEL_OP, event::CLOSE),
    (EVENT_CHANNEL_OP, event::SEND),
    (EVENT_CHANNEL_OP, event::STATUS),
    (EVENT_CHANNEL_OP, event::ALLOC_UNBOUND),
    (EVENT_CHANNEL_OP, event::UNMASK),
    (EVENT_CHANNEL_OP, event::RESET),
];

/// Hypercalls of Xen's that we do not offer at all.
const KNOWN: [u64; 13] = [
    MEMORY_OP,
    MULTICALL,
    SET_TIMER_OP,
    XEN_VERSION,
    CONSOLE_IO,
    GRANT_TABLE_OP,
    VM_ASSIST,
    VCPU_OP,
    SCHED_OP,
    EVENT_CHANNEL_OP,
    HVM_OP,
    CONTROL_OP,
    DEVICE_OP,
];

/// Calls one after the other; those that earlier incarnations did are skipped.
struct Runner<'a> {
    state: &'a mut State,
    done_before: u32,
    step: u32,
}

impl Runner<'_> {
    fn call(&mut self, number: u64, arguments: [u64; 5]) -> Option<i64> {
        self.step += 1;
        (self.step > self.done_before).then(|| self.state.call(number, arguments))
    }

    /// The call must answer an error: this one, or any.
    fn refused(&mut self, what: &str, number: u64, arguments: [u64; 5], wanted: Option<Errno>) {
        let Some(result) = self.call(number, arguments) else { return };
        let right = wanted.map_or(result < 0, |errno| result == errno.to_result());
        if !right {
            println!("selftest: FAILED: {what}: {number} {arguments:x?} answered {result}");
            self.state.fail();
        }
    }

    fn check(&mut self, right: bool, what: &str) {
        if !right {
            println!("selftest: FAILED: {what}");
            self.state.fail();
        }
    }
}

/// A page for arguments, and its address.
fn argument_page() -> (Page, u64) {
    let page = Page::new_zeroed();
    let address = page.gfn().address();
    (page, address)
}

/// Does all of them.
pub fn run(state: &mut State) {
    let done_before = state.steps();
    let mut runner = Runner { state, done_before, step: 0 };
    println!("selftest: bad pointers");
    bad_pointers(&mut runner);
    println!("selftest: missing rights");
    missing_rights(&mut runner);
    println!("selftest: foreign grants");
    foreign_grants(&mut runner);
    println!("selftest: wrong ports");
    wrong_ports(&mut runner);
    println!("selftest: numbers that do not exist");
    unknown_numbers(&mut runner);
    println!("selftest: odd processor state at entry");
    crate::deadly::survivable(|name, attack| {
        // As a call, so that a death is told from a pass.
        if runner.call(XEN_VERSION, [version::VERSION, 0, 0, 0, 0]).is_some() {
            println!("selftest: {name}");
            attack();
        }
    });
}

fn bad_pointers(runner: &mut Runner<'_>) {
    for (number, operation) in WITH_POINTER {
        for pointer in UNREADABLE {
            runner.refused("bad pointer", number, [operation, pointer, 1, 0, 0], None);
        }
    }
    for pointer in UNREADABLE {
        runner.refused("bad buffer", CONSOLE_IO, [CONSOLEIO_WRITE, 4096, pointer, 0, 0], None);
    }
    // A good structure that points to a bad array.
    let (page, address) = argument_page();
    for pointer in UNREADABLE {
        page.clear();
        page.u64(0).store(pointer, Relaxed);
        page.u64(8).store(1, Relaxed);
        page.u16(24).store(0x7ff0, Relaxed);
        for operation in [memory::DECREASE_RESERVATION, memory::POPULATE_PHYSMAP] {
            // These answer how many extents were done: none.
            let result = runner.call(MEMORY_OP, [operation, address, 0, 0, 0]);
            runner.check(result.is_none_or(|r| r <= 0), "extents from a bad pointer");
        }
        page.u32(8).store(128, Relaxed);
        runner.refused("bad ports", SCHED_OP, [sched::POLL, address, 0, 0, 0], None);
        page.u32(8).store(u32::MAX, Relaxed);
        runner.refused("too many ports", SCHED_OP, [sched::POLL, address, 0, 0, 0], None);
    }
    // Batches whose end leaves the address space.
    for count in [2, 1 << 20, 1 << 32, u64::MAX] {
        for operation in [grant::MAP_GRANT_REF, grant::UNMAP_GRANT_REF, grant::COPY] {
            let near_end = STACK_TOP_GPA - 40;
            runner.refused(
                "batch over the end",
                GRANT_TABLE_OP,
                [operation, near_end, count, 0, 0],
                None,
            );
        }
    }
}

fn missing_rights(runner: &mut Runner<'_>) {
    let (_page, address) = argument_page();
    for operation in CREATE..=CRASH {
        for pointer in [address, 0, u64::MAX] {
            let arguments = [operation, pointer, 0, 0, 0];
            runner.refused("no right", CONTROL_OP, arguments, Some(Errno::EPERM));
        }
    }
    for operation in GET_DEVICE..=TRANSLATE {
        runner.refused("no device", DEVICE_OP, [operation, address, 0, 0, 0], None);
    }
    let (page, address) = argument_page();
    for domid in 0..8_u16 {
        // `dom` = another domain, remote = us.
        page.u16(0).store(domid, Relaxed);
        page.u16(2).store(0x7ff0, Relaxed);
        let arguments = [event::ALLOC_UNBOUND, address, 0, 0, 0];
        let result = runner.call(EVENT_CHANNEL_OP, arguments);
        // Its own id is allowed; whichever that is.
        runner.check(
            result.is_none_or(|r| r == 0 || r == Errno::EPERM.to_result()),
            "a port in another domain",
        );
    }
}

/// Nobody has granted us anything: nothing may be mapped, copied or unmapped.
fn foreign_grants(runner: &mut Runner<'_>) {
    let (page, address) = argument_page();
    let refs = [0, 1, 2, 7, 8, 9, 511, 512, 16_384, u32::MAX];
    for domid in (0..8).chain([0x7ff0, 0x7ff1, 0x7ff4, 0xffff]) {
        for gref in refs {
            page.clear();
            page.u64(0).store(0x4000_0000, Relaxed);
            page.u32(8).store(grant::GNTMAP_HOST_MAP, Relaxed);
            page.u32(12).store(gref, Relaxed);
            page.u16(16).store(domid, Relaxed);
            let made = runner.call(GRANT_TABLE_OP, [grant::MAP_GRANT_REF, address, 1, 0, 0]);
            let status = page.u16(18).load(Relaxed);
            runner.check(made.is_none_or(|r| r < 0 || status != 0), "a foreign grant was mapped");
            page.clear();
            page.u64(0).store(gref.into(), Relaxed);
            page.u16(8).store(domid, Relaxed);
            // To a page of ours.
            page.u64(16).store(page.gfn().0, Relaxed);
            page.u16(24).store(0x7ff0, Relaxed);
            page.u16(26).store(2048, Relaxed);
            page.u16(32).store(64, Relaxed);
            page.u16(34).store(grant::GNTCOPY_SOURCE_GREF, Relaxed);
            let made = runner.call(GRANT_TABLE_OP, [grant::COPY, address, 1, 0, 0]);
            let status = page.u16(36).load(Relaxed);
            runner.check(made.is_none_or(|r| r < 0 || status != 0), "a foreign grant was copied");
        }
    }
    for handle in [0, 1, 2, 100, 0xffff, u32::MAX] {
        page.clear();
        page.u64(0).store(0x4000_0000, Relaxed);
        page.u32(16).store(handle, Relaxed);
        let made = runner.call(GRANT_TABLE_OP, [grant::UNMAP_GRANT_REF, address, 1, 0, 0]);
        let status = page.u16(20).load(Relaxed);
        runner.check(made.is_none_or(|r| r < 0 || status != 0), "nothing was unmapped");
    }
}

fn wrong_ports(runner: &mut Runner<'_>) {
    let (page, address) = argument_page();
    for port in [0, 1022, 1023, 1024, 4095, 4096, 65_536, u32::MAX] {
        for operation in [event::CLOSE, event::SEND, event::UNMASK] {
            page.u32(0).store(port, Relaxed);
            let arguments = [operation, address, 0, 0, 0];
            runner.refused("a port that is not open", EVENT_CHANNEL_OP, arguments, None);
        }
    }
    for domid in (0..8).chain([0x7ff1, 0x7ff4, 0xffff]) {
        for port in [0, 5000, u32::MAX] {
            page.u16(0).store(domid, Relaxed);
            page.u32(4).store(port, Relaxed);
            let arguments = [event::BIND_INTERDOMAIN, address, 0, 0, 0];
            runner.refused("a port of another", EVENT_CHANNEL_OP, arguments, None);
        }
    }
    for virq in [event::VIRQ_CONSOLE, event::VIRQ_DOM_EXC, event::VIRQ_CON_RING, 24, u32::MAX] {
        page.u32(0).store(virq, Relaxed);
        page.u32(4).store(0, Relaxed);
        let arguments = [event::BIND_VIRQ, address, 0, 0, 0];
        runner.refused("an interrupt of another", EVENT_CHANNEL_OP, arguments, None);
    }
}

fn unknown_numbers(runner: &mut Runner<'_>) {
    let numbers: Vec<u64> = (0..64)
        .filter(|n| !KNOWN.contains(n))
        .chain([64, 128, 1 << 31, 1 << 32 | XEN_VERSION, u64::MAX])
        .collect();
    for number in numbers {
        runner.refused("no such number", number, [0; 5], Some(Errno::ENOSYS));
    }
    for number in [XEN_VERSION, EVENT_CHANNEL_OP, GRANT_TABLE_OP, SCHED_OP] {
        for operation in [40, 1 << 16, 1 << 32, u64::MAX] {
            let arguments = [operation, 0, 0, 0, 0];
            runner.refused("no such operation", number, arguments, None);
        }
    }
}
