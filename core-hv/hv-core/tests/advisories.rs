//! One test for each class of Xen's security advisories that could apply here, named after one
//! of them. What the numbers stand for is at <https://xenbits.xen.org/xsa/>.

use axolotl_abi::control;
use hv_core::event::PORT_LIMIT;
use hv_core::fake::{CopySide, D0, DATA, SCRATCH, System, issue};
use xen_abi::event::{self, STATUS_CLOSED, STATUS_UNBOUND};
use xen_abi::grant::{GTF_PERMIT_ACCESS, GrantEntryV1, GrantStatus, SETUP_TABLE, SetupTable};
use xen_abi::hypercall::{
    CONSOLE_IO, EVENT_CHANNEL_OP, GRANT_TABLE_OP, MEMORY_OP, SCHED_OP, XEN_VERSION,
};
use xen_abi::memory::{self, RemoveFromPhysmap, Reservation};
use xen_abi::sched::{self, Poll};
use xen_abi::{DomainId, Errno, EventPort, Gfn, GrantRef};
use zerocopy::{FromZeros, IntoBytes};

const WINDOW: Gfn = Gfn(0x4_0000);
const REF: GrantRef = GrantRef(8);

fn three() -> (System, DomainId, DomainId, DomainId) {
    let mut system = System::new();
    let [a, b, c] = ["a", "b", "c"].map(|name| system.guest(name));
    (system, a, b, c)
}

/// A hypercall that returns to a non-canonical address: such a page cannot exist.
#[test]
fn xsa_7_no_hypercall_returns_to_a_non_canonical_address() {
    let mut system = System::new();
    let (_, plan) = system.control(control::CREATE, System::plan("guest"));
    let op = control::Populate {
        domid: plan.domid,
        pad: 0,
        access: 5,
        flags: 0,
        count: 1,
        gfn: (1 << 35) - 1,
        done: 0,
    };
    assert_eq!(system.control(control::POPULATE, op).0, Errno::EINVAL.to_result());
}

/// Stack bytes behind a short string.
#[test]
fn xsa_122_version_strings_are_padded_with_zeros_and_end_where_they_end() {
    let (mut system, guest, ..) = three();
    system.write(guest, SCRATCH, &[0xa5; 1100]);
    assert_eq!(system.call(guest, XEN_VERSION, [1, SCRATCH, 0, 0, 0]), 0);
    let bytes: [u8; 1100] = system.get(guest, SCRATCH);
    let end = bytes.iter().position(|&byte| byte == 0).unwrap();
    assert!(end < 16 && bytes[end..16].iter().all(|&byte| byte == 0));
    assert!(bytes[16..].iter().all(|&byte| byte == 0xa5));
    for command in 2..32 {
        system.write(guest, SCRATCH, &[0; 8]);
        system.write(guest, SCRATCH + 8, &[0xa5; 1092]);
        system.call(guest, XEN_VERSION, [command, SCRATCH, 0, 0, 0]);
        let len = match command {
            2 => 144,
            3 | 9 => 1024,
            4 => 64,
            5 | 6 => 8,
            8 => 16,
            _ => 8,
        };
        let bytes: [u8; 1100] = system.get(guest, SCRATCH);
        assert!(bytes[len..].iter().all(|&byte| byte == 0xa5), "{command} writes no more");
        assert!(len == 8 || !bytes[..len].contains(&0xa5), "{command} leaves nothing");
    }
}

/// Poll of ports that do not exist, which read beyond a table.
#[test]
fn xsa_221_poll_of_any_port_is_refused_or_ends() {
    let (mut system, guest, ..) = three();
    let ports = (0..40).chain([PORT_LIMIT - 1, PORT_LIMIT, 4095, 4096, 1 << 20, 1 << 31, u32::MAX]);
    for port in ports {
        system.write(guest, SCRATCH + 64, &port.to_le_bytes());
        let op = Poll { ports: SCRATCH + 64, nr_ports: 1, pad: 0, timeout: 1 };
        let (result, _) = system.call_with(guest, SCHED_OP, sched::POLL, op);
        let expected = if port < PORT_LIMIT { 0 } else { Errno::EINVAL.to_result() };
        assert_eq!(result, expected, "{port}");
    }
    for nr_ports in [129, 1 << 16, u32::MAX] {
        let op = Poll { ports: SCRATCH, nr_ports, pad: 0, timeout: 1 };
        let (result, _) = system.call_with(guest, SCHED_OP, sched::POLL, op);
        assert_eq!(result, Errno::EINVAL.to_result());
    }
    let op = Poll { ports: !0, nr_ports: 128, pad: 0, timeout: 1 };
    let (result, _) = system.call_with(guest, SCHED_OP, sched::POLL, op);
    assert_eq!(result, Errno::EFAULT.to_result());
}

/// Counts of pins for reading and for writing that drift apart.
#[test]
fn xsa_224_readers_and_writers_are_counted_apart() {
    let (mut system, granter, grantee, _) = three();
    system.grant(granter, REF, grantee, DATA, false);
    let mut maps = Vec::new();
    for n in 0..6 {
        let at = Gfn(WINDOW.0 + n);
        maps.push((system.map(grantee, granter, REF, at, n % 2 == 0).unwrap(), at));
    }
    for (handle, at) in maps.into_iter().rev() {
        system.check();
        assert!(!system.revoke(granter, REF));
        assert_eq!(system.unmap(grantee, handle, at), GrantStatus::OKAY);
    }
    assert!(system.revoke(granter, REF));
}

/// Version-2 features in a version-1 table: transitive grants, sub-pages.
#[test]
fn xsa_226_transitive_and_sub_page_grants_do_not_exist() {
    let (mut system, granter, grantee, _) = three();
    let frame = u32::try_from(DATA.0).unwrap();
    for flags in [0, 2, 3, GTF_PERMIT_ACCESS | 1 << 8, 3 | 1 << 8] {
        let entry = GrantEntryV1 { flags, domid: grantee, frame };
        system.write(granter, System::entry_gpa(REF), entry.as_bytes());
        let mapped = system.map(grantee, granter, REF, WINDOW, true);
        assert_eq!(mapped, Err(GrantStatus::GENERAL_ERROR), "{flags:#x}");
        let from = CopySide::Grant(granter, REF, 0);
        let copied = system.copy(grantee, from, CopySide::Own(DATA, 0), 8);
        assert_eq!(copied, GrantStatus::GENERAL_ERROR);
        assert_eq!(system.entry(granter, REF).flags, flags);
    }
}

/// Unmapping at an address, or with a handle, that is not the mapping's.
#[test]
fn xsa_227_unmap_believes_neither_handle_nor_address() {
    let (mut system, granter, grantee, other) = three();
    system.grant(granter, REF, grantee, DATA, false);
    let handle = system.map(grantee, granter, REF, WINDOW, false).unwrap();
    let wrong = [Gfn(0), DATA, Gfn(WINDOW.0 + 1), Gfn(!0 >> 12)];
    for at in wrong {
        assert_eq!(system.unmap(grantee, handle, at), GrantStatus::BAD_VIRT_ADDR);
    }
    for bad in [handle + 1, 127, 128, 1 << 20, u32::MAX] {
        assert_eq!(system.unmap(grantee, bad, WINDOW), GrantStatus::BAD_HANDLE);
    }
    assert_eq!(system.unmap(other, handle, WINDOW), GrantStatus::BAD_HANDLE, "not its own");
    system.check();
    assert!(system.page(grantee, WINDOW).is_some() && system.page(grantee, DATA).is_some());
    assert_eq!(system.unmap(grantee, handle, WINDOW), GrantStatus::OKAY);
    assert_eq!(system.unmap(grantee, handle, WINDOW), GrantStatus::BAD_HANDLE, "twice");
    system.check();
}

/// Frames of the grant table that stay reachable or are lost when it shrinks or its owner goes.
#[test]
fn xsa_255_table_frames_are_the_owners_until_it_ends() {
    let (mut system, guest, ..) = three();
    let before = system.info(guest).pages;
    let mut op = SetupTable::new_zeroed();
    (op.dom, op.nr_frames, op.frame_list) = (DomainId::SELF, 4, SCRATCH + 64);
    let (result, op) = system.call_with(guest, GRANT_TABLE_OP, SETUP_TABLE, op);
    assert_eq!((result, op.status), (0, GrantStatus::OKAY));
    assert!(system.info(guest).pages > before);
    assert_eq!(system.add_to_physmap(guest, memory::SPACE_GRANT_TABLE, 3, WINDOW), 0);
    // Mapped elsewhere, it is there and nowhere else.
    let second = Gfn(WINDOW.0 + 1);
    assert_eq!(system.add_to_physmap(guest, memory::SPACE_GRANT_TABLE, 3, second), 0);
    assert_eq!(system.page(guest, WINDOW), None);
    system.check();
    system.restart(guest);
    assert_eq!(system.page(guest, second), None);
    system.check();
    let entry: GrantEntryV1 = system.entry(guest, REF);
    assert_eq!(entry.as_bytes(), [0; 8]);
    for idx in [32, 1 << 31, u64::MAX] {
        let result = system.add_to_physmap(guest, memory::SPACE_GRANT_TABLE, idx, WINDOW);
        assert_eq!(result, Errno::EINVAL.to_result());
    }
}

/// Memory that is given back twice.
#[test]
fn xsa_277_nothing_is_freed_twice() {
    let (mut system, guest, ..) = three();
    let before = system.info(guest).pages;
    for _ in 0..3 {
        let mut op = Reservation::new_zeroed();
        (op.extent_start, op.nr_extents, op.domid) = (SCRATCH + 64, 1, DomainId::SELF);
        let (result, _) = system.call_with(guest, MEMORY_OP, memory::DECREASE_RESERVATION, op);
        assert_eq!(result, Errno::ENOSYS.to_result(), "a unikernel keeps its memory");
    }
    let shared = Gfn::containing(axolotl_abi::start::SHARED_INFO_GPA);
    for (gfn, expected) in [(shared, 0), (shared, -22), (DATA, -22), (Gfn(!0), -22)] {
        let op = RemoveFromPhysmap { domid: DomainId::SELF, pad: [0; 3], gpfn: gfn.0 };
        let (result, _) = system.call_with(guest, MEMORY_OP, memory::REMOVE_FROM_PHYSMAP, op);
        assert_eq!(result, expected);
    }
    assert_eq!(system.info(guest).pages, before);
    system.check();
}

/// A peer that rewrites its entry all the time.
#[test]
fn xsa_295_a_swap_that_always_loses_ends() {
    let (mut system, granter, grantee, _) = three();
    system.grant(granter, REF, grantee, DATA, false);
    let before = {
        let mut machine = system.p.machine();
        machine.lost_races = u32::MAX;
        machine.swaps
    };
    let answer = system.map(grantee, granter, REF, WINDOW, false);
    assert_eq!(answer, Err(GrantStatus::GENERAL_ERROR));
    assert!(system.p.machine().swaps - before <= 5);
    system.p.machine().lost_races = 4;
    assert!(system.map(grantee, granter, REF, WINDOW, false).is_ok(), "a few are borne");
    system.check();
}

/// Ports until there are none.
#[test]
#[cfg_attr(miri, ignore = "a thousand times the same call")]
fn xsa_317_ports_run_out_with_an_error() {
    let (mut system, guest, other, _) = three();
    let mut count = 0;
    let error = loop {
        match system.alloc_unbound(guest, other) {
            Ok(_) => count += 1,
            Err(error) => break error,
        }
    };
    assert_eq!((count, error), (PORT_LIMIT - 1, Errno::ENOSPC.to_result()));
    assert_eq!(system.bind_virq(guest, 0), Err(Errno::ENOSPC.to_result()));
    system.check();
    assert_eq!(system.close(guest, EventPort(500)), 0);
    assert_eq!(system.alloc_unbound(guest, other), Ok(EventPort(500)));
    assert!(system.alloc_unbound(other, guest).is_ok(), "it is its own shortage");
    system.restart(guest);
    assert_eq!(system.info(guest).ports, 0);
}

/// Closing and resetting ports whose peers do the same.
#[test]
fn xsa_343_ports_close_whole_from_either_end() {
    let (mut system, a, b, c) = three();
    for _ in 0..4 {
        let theirs = system.alloc_unbound(a, b).unwrap();
        let mine = system.bind(b, a, theirs).unwrap();
        assert_eq!(system.bind(b, a, theirs), Err(Errno::EINVAL.to_result()), "taken");
        assert_eq!(system.bind(c, a, theirs), Err(Errno::EINVAL.to_result()));
        let (result, _) = system.call_with(a, EVENT_CHANNEL_OP, event::RESET, DomainId::SELF);
        assert_eq!(result, 0);
        system.check();
        let status = system.core.lock().port(&system.p, b, mine).status;
        assert_eq!(status, STATUS_UNBOUND);
        assert_eq!(system.send(b, mine), 0);
        assert_eq!(system.close(b, mine), 0);
    }
    let (result, _) = system.call_with(a, EVENT_CHANNEL_OP, event::RESET, b);
    assert_eq!(result, Errno::EPERM.to_result(), "not other domains'");
}

/// A bound port whose domain dies, and one that is used after it was closed.
#[test]
fn xsa_358_no_event_reaches_a_port_that_is_gone() {
    let (mut system, a, b, _) = three();
    let theirs = system.alloc_unbound(a, b).unwrap();
    let mine = system.bind(b, a, theirs).unwrap();
    system.destroy(a);
    assert_eq!(system.send(b, mine), 0);
    assert_eq!(system.bind(b, a, theirs), Err(Errno::ESRCH.to_result()));
    assert_eq!(system.bind(b, DomainId(0xfff0), theirs), Err(Errno::ESRCH.to_result()));
    for port in [0, theirs.0 + 50, PORT_LIMIT, u32::MAX] {
        assert_eq!(system.send(b, EventPort(port)), Errno::EINVAL.to_result());
        assert_eq!(system.close(b, EventPort(port)), Errno::EINVAL.to_result());
        let core = system.core.lock();
        assert_eq!(core.port(&system.p, b, EventPort(port)).status, STATUS_CLOSED);
    }
    system.check();
}

/// A mapping that outlives the granter, or the frame that it shows.
#[test]
fn xsa_379_a_mapping_keeps_its_frame_from_everybody_until_it_ends() {
    let (mut system, granter, grantee, _) = three();
    system.grant(granter, REF, grantee, DATA, false);
    let handle = system.map(grantee, granter, REF, WINDOW, false).unwrap();
    let frame = system.page(grantee, WINDOW).unwrap().mfn;
    system.destroy(granter);
    system.check();
    assert_eq!(system.core.lock().frames().orphans(), 1);
    // Whoever gets all the memory there is does not get this frame.
    let mut plan = System::plan("glutton");
    plan.max_pages = 100;
    // Not even under the same name, which is not given out at once unless it is asked for.
    plan.domid = granter;
    let glutton = system.create(plan);
    for page in 0..8 {
        let gfn = Gfn(DATA.0 - 1 + page);
        assert_ne!(system.page(glutton, gfn).unwrap().mfn, frame);
    }
    assert_eq!(system.unmap(grantee, handle, WINDOW), GrantStatus::OKAY);
    assert_eq!(system.core.lock().frames().orphans(), 0);
    system.check();
}

/// The same, with a granter that starts another life, and uses the same reference again.
#[test]
fn xsa_387_a_pin_of_an_earlier_life_is_none_of_the_next() {
    let (mut system, granter, grantee, _) = three();
    system.grant(granter, REF, grantee, DATA, false);
    let old = system.map(grantee, granter, REF, WINDOW, false).unwrap();
    system.restart(granter);
    system.grant(granter, REF, grantee, DATA, false);
    let second = Gfn(WINDOW.0 + 1);
    let new = system.map(grantee, granter, REF, second, false).unwrap();
    let frames = [WINDOW, second].map(|gfn| system.page(grantee, gfn).unwrap().mfn);
    assert_ne!(frames[0], frames[1]);
    assert_eq!(system.unmap(grantee, old, WINDOW), GrantStatus::OKAY);
    system.check();
    assert!(!system.revoke(granter, REF), "the new one is still in use");
    assert_eq!(system.unmap(grantee, new, second), GrantStatus::OKAY);
    assert!(system.revoke(granter, REF));
}

/// Console writes with counts that overflow, or that take for ever.
#[test]
fn xsa_consoleio_a_huge_count_is_written_in_bounded_parts() {
    let (mut system, guest, ..) = three();
    // Miri takes its time for each byte, and the control domain has many.
    let domains: &[DomainId] = if cfg!(miri) { &[guest] } else { &[guest, D0] };
    for &id in domains {
        for count in [1 << 31, u64::MAX, 1 << 20] {
            let result = system.call(id, CONSOLE_IO, [0, count, SCRATCH, 0, 0]);
            assert_eq!(result, Errno::EFAULT.to_result(), "its memory ends before");
        }
    }
    // One part moves no more than 2 KiB, and the domain can be stopped between two.
    let args = [0, u64::MAX, SCRATCH, 0, 0];
    let before = system.core.lock().domain(guest).unwrap().console_written;
    system.act(guest, move |registers| issue(registers, CONSOLE_IO, args));
    let after = system.core.lock().domain(guest).unwrap().console_written;
    assert!((1..=2048).contains(&(after - before)));
    assert_eq!(system.control_domain(control::CRASH, guest), 0);
    system.run(0, 4);
    assert!(!system.is_live(guest));
    system.restart(guest);
    assert_eq!(system.call(guest, CONSOLE_IO, [0, 3, SCRATCH, 0, 0]), 0);
    system.check();
}
