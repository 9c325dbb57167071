//! Hypercalls that must fail: bad pointers, foreign grants and memory, wrong ports, missing rights,
//! more of everything than there is.

use crate::deadly::{read_words, write_word};
use crate::state::State;
use alloc::vec::Vec;
use axolotl_abi::control::{CRASH, CREATE};
use axolotl_abi::device::{GET_DEVICE, TRANSLATE};
use axolotl_abi::start::{
    BUNDLE_GPA, GRANT_TABLE_GPA, HEAP_GPA, IMAGE_GPA, MMIO_GPA, PRESERVED_GPA, SHARED_INFO_GPA,
    STACK_PAGES, STACK_TOP_GPA, START_INFO_GPA, XENSTORE_RING_GPA,
};
use axolotl_abi::{CONTROL_OP, DEVICE_OP};
use core::sync::atomic::Ordering::Relaxed;
use shmem::Page;
use unikernel::println;
use xen_abi::hypercall::{
    CONSOLE_IO, CONSOLEIO_WRITE, EVENT_CHANNEL_OP, GRANT_TABLE_OP, HVM_OP, MEMORY_OP, MULTICALL,
    SCHED_OP, SET_TIMER_OP, VCPU_OP, VM_ASSIST, XEN_VERSION, version,
};
use xen_abi::shared_info::EVTCHN_PENDING;
use xen_abi::{DomainId, Errno, event, grant, memory, sched};

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

/// Frames where the machine has its devices and firmware, were they ours.
const FRAMES_OF_DEVICES: [u64; 8] =
    [0xa0, 0xb8, 0xc8, 0xb_0000, 0xe_0000, 0xf_ebc0, 0xf_ec00, 0xf_ee00];

/// A reference that the runtime does not use here: it grants nothing.
const OWN_REF: u32 = 100;

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

/// Does all of them, but what takes everything there is. `me` is this domain.
pub fn run(state: &mut State, me: DomainId) {
    let done_before = state.steps();
    let mut runner = Runner { state, done_before, step: 0 };
    println!("selftest: bad pointers");
    bad_pointers(&mut runner);
    println!("selftest: missing rights");
    missing_rights(&mut runner, me);
    println!("selftest: foreign grants");
    foreign_grants(&mut runner);
    println!("selftest: foreign memory");
    foreign_domains(&mut runner, me);
    foreign_frames(&mut runner);
    worthless_grants(&mut runner, me);
    bad_places(&mut runner);
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

fn missing_rights(runner: &mut Runner<'_>, me: DomainId) {
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
    for domid in (0..8).chain([63, 64, 0x7ff1, 0xffff]).filter(|domid| *domid != me.0) {
        // `dom` = another domain, remote = us.
        page.u16(0).store(domid, Relaxed);
        page.u16(2).store(0x7ff0, Relaxed);
        let arguments = [event::ALLOC_UNBOUND, address, 0, 0, 0];
        runner.refused("a port in another domain", EVENT_CHANNEL_OP, arguments, None);
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

/// What a domain may ask about itself, asked about others.
fn foreign_domains(runner: &mut Runner<'_>, me: DomainId) {
    let (page, address) = argument_page();
    let others = (0..8).chain([63, 64, 0x7ff1, 0x7ff4, 0xffff]).filter(|domid| *domid != me.0);
    for domid in others {
        page.clear();
        page.u16(0).store(domid, Relaxed);
        for operation in [
            memory::CURRENT_RESERVATION,
            memory::MAXIMUM_RESERVATION,
            memory::ADD_TO_PHYSMAP,
            memory::REMOVE_FROM_PHYSMAP,
        ] {
            let arguments = [operation, address, 0, 0, 0];
            runner.refused("memory of another", MEMORY_OP, arguments, None);
        }
        for operation in [event::STATUS, event::RESET] {
            let arguments = [operation, address, 0, 0, 0];
            runner.refused("ports of another", EVENT_CHANNEL_OP, arguments, None);
        }
        let arguments = [grant::GET_VERSION, address, 1, 0, 0];
        runner.refused("grants of another", GRANT_TABLE_OP, arguments, None);
        for (operation, status) in [(grant::SETUP_TABLE, 8), (grant::QUERY_SIZE, 12)] {
            page.u32(4).store(1, Relaxed);
            page.u16(status).store(0, Relaxed);
            let made = runner.call(GRANT_TABLE_OP, [operation, address, 1, 0, 0]);
            let status = page.u16(status).load(Relaxed);
            runner.check(made.is_none_or(|r| r < 0 || status != 0), "another's grant table");
        }
    }
}

/// Copies that name frames without a grant: others' memory, registers of devices, our own pages
/// that are for reading only.
fn foreign_frames(runner: &mut Runner<'_>) {
    let (page, address) = argument_page();
    let (room, _) = argument_page();
    let others = [0, 1, 2, 3, 0x7ff1, 0x7ff4].into_iter();
    let foreign = others.map(|domid| (domid, HEAP_GPA >> 12));
    let own = FRAMES_OF_DEVICES.into_iter().chain([
        MMIO_GPA >> 12,
        BUNDLE_GPA >> 12,
        (1 << 35) - 1,
        1 << 35,
        1 << 52,
        u64::MAX,
    ]);
    let sources = foreign.chain(own.map(|frame| (0x7ff0, frame)));
    for (domid, frame) in sources {
        copy(runner, (&page, address), (domid, frame), (0x7ff0, room.gfn().0));
        copy(runner, (&page, address), (0x7ff0, room.gfn().0), (domid, frame));
    }
    for gpa in [IMAGE_GPA, START_INFO_GPA] {
        copy(runner, (&page, address), (0x7ff0, room.gfn().0), (0x7ff0, gpa >> 12));
    }
}

/// One copy between frames, which must be refused.
fn copy(
    runner: &mut Runner<'_>,
    (page, address): (&Page, u64),
    source: (u16, u64),
    dest: (u16, u64),
) {
    page.clear();
    for (at, (domid, frame)) in [(0, source), (16, dest)] {
        page.u64(at).store(frame, Relaxed);
        page.u16(at + 8).store(domid, Relaxed);
    }
    page.u16(32).store(64, Relaxed);
    let made = runner.call(GRANT_TABLE_OP, [grant::COPY, address, 1, 0, 0]);
    let status = page.u16(36).load(Relaxed);
    runner.check(made.is_none_or(|r| r < 0 || status != 0), "a copy that nobody allowed");
}

/// Puts the first frame of our grant table where the runtime has it, and an entry for ourselves
/// into it.
fn grant_to_ourselves(runner: &mut Runner<'_>, me: DomainId, frame: u32) {
    let (page, address) = argument_page();
    page.u16(0).store(DomainId::SELF.0, Relaxed);
    page.u32(4).store(memory::SPACE_GRANT_TABLE, Relaxed);
    page.u64(16).store(GRANT_TABLE_GPA >> 12, Relaxed);
    if runner.call(MEMORY_OP, [memory::ADD_TO_PHYSMAP, address, 0, 0, 0]) == Some(0) {
        let entry =
            u64::from(grant::GTF_PERMIT_ACCESS) | u64::from(me.0) << 16 | u64::from(frame) << 32;
        write_word(GRANT_TABLE_GPA + 8 * u64::from(OWN_REF), entry);
    }
}

/// Maps our own grant. Answers its handle, or nothing when the core refused.
fn map_own(runner: &mut Runner<'_>, page: &Page, at: u64, flags: u32) -> Option<u32> {
    page.clear();
    page.u64(0).store(at, Relaxed);
    page.u32(8).store(flags, Relaxed);
    page.u32(12).store(OWN_REF, Relaxed);
    page.u16(16).store(DomainId::SELF.0, Relaxed);
    let arguments = [grant::MAP_GRANT_REF, page.gfn().address(), 1, 0, 0];
    let made = runner.call(GRANT_TABLE_OP, arguments);
    let is_mapped = made == Some(0) && page.u16(18).load(Relaxed) == 0;
    is_mapped.then(|| page.u32(20).load(Relaxed))
}

/// Grants of what is not ours to give, mapped by ourselves.
fn worthless_grants(runner: &mut Runner<'_>, me: DomainId) {
    let (page, _) = argument_page();
    let frames = FRAMES_OF_DEVICES.into_iter().chain([
        0,
        SHARED_INFO_GPA >> 12,
        GRANT_TABLE_GPA >> 12,
        MMIO_GPA >> 12,
        BUNDLE_GPA >> 12,
        0xffff_ffff,
    ]);
    for frame in frames {
        grant_to_ourselves(runner, me, u32::try_from(frame).unwrap_or(u32::MAX));
        for flags in [grant::GNTMAP_HOST_MAP, grant::GNTMAP_HOST_MAP | grant::GNTMAP_READONLY] {
            let handle = map_own(runner, &page, 0x4000_0000, flags);
            runner.check(handle.is_none(), "a grant of what is not ours");
        }
    }
    // Ours, but not for writing.
    for gpa in [START_INFO_GPA, IMAGE_GPA] {
        grant_to_ourselves(runner, me, u32::try_from(gpa >> 12).unwrap_or(u32::MAX));
        let handle = map_own(runner, &page, 0x4000_0000, grant::GNTMAP_HOST_MAP);
        runner.check(handle.is_none(), "a grant makes a page writable");
    }
    // A good one, to places where something is, or nothing may be.
    grant_to_ourselves(runner, me, u32::try_from(page.gfn().0).unwrap_or(u32::MAX));
    let places = [
        START_INFO_GPA,
        XENSTORE_RING_GPA,
        SHARED_INFO_GPA,
        IMAGE_GPA,
        PRESERVED_GPA,
        HEAP_GPA,
        0x4000_0001,
        0x7fff_ffff_f000,
        0x8000_0000_0000,
        0xffff_8000_0000_0000,
        0xffff_ffff_ffff_f000,
    ];
    for place in places {
        let handle = map_own(runner, &page, place, grant::GNTMAP_HOST_MAP);
        runner.check(handle.is_none(), "a mapping over something");
    }
    for flags in [0, grant::GNTMAP_DEVICE_MAP, 1 << 4, 1 << 31, u32::MAX] {
        let handle = map_own(runner, &page, 0x4000_0000, flags);
        runner.check(handle.is_none(), "a mapping with flags that do not exist");
    }
}

/// Pages that the core shares, put where they must not be.
fn bad_places(runner: &mut Runner<'_>) {
    let (page, address) = argument_page();
    let mut attempt = |space: u32, index: u64, gfn: u64| {
        page.clear();
        page.u16(0).store(DomainId::SELF.0, Relaxed);
        page.u32(4).store(space, Relaxed);
        page.u64(8).store(index, Relaxed);
        page.u64(16).store(gfn, Relaxed);
        let arguments = [memory::ADD_TO_PHYSMAP, address, 0, 0, 0];
        runner.refused("a shared page in a bad place", MEMORY_OP, arguments, None);
    };
    for space in [memory::SPACE_SHARED_INFO, memory::SPACE_GRANT_TABLE] {
        for gpa in [START_INFO_GPA, XENSTORE_RING_GPA, IMAGE_GPA, PRESERVED_GPA, HEAP_GPA] {
            attempt(space, 0, gpa >> 12);
        }
        for gfn in [(1 << 35) - 1, 1 << 35, 1 << 52, u64::MAX] {
            attempt(space, 0, gfn);
        }
        for index in [u64::from(grant::MAX_FRAMES), 1 << 31, 1 << 32, u64::MAX] {
            attempt(space, index, 0x4_0000);
        }
    }
    for space in [2, 3, 4, 5, 1 << 16, u32::MAX] {
        attempt(space, 0, 0x4_0000);
    }
    // They may have left their places before they were refused new ones.
    for (space, gpa) in [(0, SHARED_INFO_GPA), (1, GRANT_TABLE_GPA)] {
        page.clear();
        page.u16(0).store(DomainId::SELF.0, Relaxed);
        page.u32(4).store(space, Relaxed);
        page.u64(16).store(gpa >> 12, Relaxed);
        let made = runner.call(MEMORY_OP, [memory::ADD_TO_PHYSMAP, address, 0, 0, 0]);
        runner.check(made.is_none_or(|r| r == 0), "a shared page cannot come back");
    }
}

/// Takes ports, mappings and memory until there are no more, and keeps half of the mappings: the
/// next incarnation must find everything as it was.
pub fn take_everything(state: &mut State, me: DomainId) {
    println!("selftest: more than there is");
    let done_before = state.steps();
    let mut runner = Runner { state, done_before, step: 0 };
    take_ports(&mut runner);
    take_mappings(&mut runner, me);
}

fn take_ports(runner: &mut Runner<'_>) {
    let (page, address) = argument_page();
    let mut ports = Vec::new();
    for _ in 0..=event::MAX_PORTS {
        page.u16(0).store(DomainId::SELF.0, Relaxed);
        page.u16(2).store(0, Relaxed);
        match runner.call(EVENT_CHANNEL_OP, [event::ALLOC_UNBOUND, address, 0, 0, 0]) {
            Some(0) => ports.push(page.u32(4).load(Relaxed)),
            _ => break,
        }
    }
    runner.check(ports.len() < event::MAX_PORTS as usize, "ports without end");
    for port in ports {
        page.u32(0).store(port, Relaxed);
        let closed = runner.call(EVENT_CHANNEL_OP, [event::CLOSE, address, 0, 0, 0]);
        runner.check(closed.is_none_or(|r| r == 0), "a port that cannot be closed");
    }
}

fn take_mappings(runner: &mut Runner<'_>, me: DomainId) {
    /// Each of them needs page tables of its own.
    const APART: u64 = 1 << 30;
    const MOST: usize = 10_000;
    let (page, address) = argument_page();
    let (granted, _) = argument_page();
    grant_to_ourselves(runner, me, u32::try_from(granted.gfn().0).unwrap_or(u32::MAX));
    let mut handles = Vec::new();
    for at in (BUNDLE_GPA..).step_by(usize::try_from(APART).unwrap_or(1)).take(MOST) {
        match map_own(runner, &page, at, grant::GNTMAP_HOST_MAP) {
            Some(handle) => handles.push((at, handle)),
            None => break,
        }
    }
    runner.check(handles.len() < MOST, "memory without end");
    for (at, handle) in handles.iter().skip(1).step_by(2) {
        page.clear();
        page.u64(0).store(*at, Relaxed);
        page.u32(16).store(*handle, Relaxed);
        let made = runner.call(GRANT_TABLE_OP, [grant::UNMAP_GRANT_REF, address, 1, 0, 0]);
        let status = page.u16(20).load(Relaxed);
        runner.check(made.is_none_or(|r| r == 0 && status == 0), "a mapping that stays");
    }
    println!("selftest: {} mappings of its own", handles.len());
    // The granted page stays so until the end of this incarnation.
    core::mem::forget(granted);
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
    for virq in [event::NR_VIRQS, 1 << 16, u32::MAX] {
        page.u32(0).store(virq, Relaxed);
        page.u32(4).store(0, Relaxed);
        let arguments = [event::BIND_VIRQ, address, 0, 0, 0];
        runner.refused("an interrupt that does not exist", EVENT_CHANNEL_OP, arguments, None);
    }
    // Any domain may bind these, as in Xen, but they are never raised here.
    for virq in [event::VIRQ_CONSOLE, event::VIRQ_DOM_EXC, event::VIRQ_CON_RING] {
        page.u32(0).store(virq, Relaxed);
        page.u32(4).store(0, Relaxed);
        let made = runner.call(EVENT_CHANNEL_OP, [event::BIND_VIRQ, address, 0, 0, 0]);
        if made == Some(0) {
            // The writing of this line is an event for the control domain.
            println!("selftest: interrupt {virq} of another");
            let port = u64::from(page.u32(8).load(Relaxed));
            let pending = SHARED_INFO_GPA + EVTCHN_PENDING as u64 + port / 64 * 8;
            let is_raised = read_words(pending, 1).iter().any(|word| word >> (port % 64) & 1 != 0);
            runner.check(!is_raised, "an interrupt of another was raised");
        }
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
