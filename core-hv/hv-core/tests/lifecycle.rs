//! Domains from creation to destruction: no frame is lost, nothing of one life is in the next.

use axolotl_abi::CONTROL_OP;
use axolotl_abi::control::{
    self, ASSIGN_DMA_TRUSTED, AssignDevice, CLASS_GUEST, Create, DEATH_CRASHED, DEATH_FAULT,
    DEATH_RESTARTED, DEATH_SHUTDOWN, DomainOp, Load, POPULATE_PRESERVED, Rights, STATE_BLOCKED,
    STATE_BUILDING, STATE_DEAD, STATE_PAUSED, SetGrant, SetStart,
};
use axolotl_abi::image::{ACCESS_EXECUTE, ACCESS_READ, ACCESS_WRITE};
use axolotl_abi::start::{HEAP_GPA, IMAGE_GPA, PRESERVED_GPA, XENSTORE_RING_GPA};
use hv_core::fake::{Config, D0, DATA, HEAP_PAGES, SCRATCH, System};
use hv_core::platform::Exit;
use xen_abi::event::{STATUS_INTERDOMAIN, STATUS_UNBOUND};
use xen_abi::hypercall::SCHED_OP;
use xen_abi::sched::{SHUTDOWN, Shutdown};
use xen_abi::{DomainId, Errno, Gfn, GrantRef, event};
use zerocopy::FromZeros;

const PRESERVED: Gfn = Gfn::containing(PRESERVED_GPA);
const WINDOW: Gfn = Gfn(0x4_0000);

fn free(system: &System) -> u64 {
    system.core.lock().frames().counts().1
}

fn error(errno: Errno) -> i64 {
    errno.to_result()
}

#[test]
fn a_destroyed_domain_gives_back_every_frame() {
    let mut system = System::new();
    let before = free(&system);
    for _ in 0..3 {
        let guest = system.guest("guest");
        system.check();
        assert!(free(&system) < before);
        system.destroy(guest);
        system.check();
        assert_eq!(free(&system), before);
    }
    assert_eq!(system.p.machine().vcpus, 1, "the control domain's");
}

#[test]
fn destruction_takes_bounded_steps_and_any_of_them_leaves_the_core_in_order() {
    let mut system = System::new();
    let before = free(&system);
    let mut plan = System::plan("large");
    plan.max_pages = 300;
    let guest = system.create(plan);
    assert_eq!(system.control_domain(control::RESTART, guest), 0);
    // Far apart: tables of every level.
    for gfn in [0x5000, 0x5_0000, 0x50_0000, 0x5_0000_0000] {
        system.populate(guest, Gfn(gfn), 20, ACCESS_READ | ACCESS_WRITE, 0);
    }
    let mut calls = 0;
    let op = DomainOp { domid: guest };
    while system.call_with(D0, CONTROL_OP, control::DESTROY, op).0 == error(Errno::EAGAIN) {
        system.check();
        calls += 1;
        assert!(calls < 40);
    }
    assert!(calls > 5);
    assert_eq!(free(&system), before);
}

#[test]
fn creation_without_memory_leaves_nothing_behind() {
    let mut system = System::new();
    let before = free(&system);
    for max_pages in 0..4 {
        let plan = Create { max_pages, ..System::plan("tiny") };
        assert_eq!(system.control(control::CREATE, plan).0, error(Errno::ENOMEM));
        system.check();
        assert_eq!(free(&system), before);
    }
    // Enough for itself, not for a page.
    let plan = Create { max_pages: 5, ..System::plan("small") };
    let (result, plan) = system.control(control::CREATE, plan);
    assert_eq!(result, 0);
    let op = control::Populate {
        domid: plan.domid,
        pad: 0,
        access: ACCESS_READ,
        flags: 0,
        count: 1,
        gfn: 1,
        done: 0,
    };
    assert_eq!(system.control(control::POPULATE, op).0, error(Errno::ENOMEM));
    system.check();
    system.destroy(plan.domid);
    assert_eq!(free(&system), before);
}

#[test]
fn an_answer_that_cannot_be_written_leaves_no_domain_behind() {
    let mut system = System::new();
    let before = free(&system);
    // The start info is read-only for the control domain.
    let gpa = axolotl_abi::start::START_INFO_GPA + 1024;
    let plan = System::plan("ghost");
    system.write(D0, gpa, zerocopy::IntoBytes::as_bytes(&plan));
    let result = system.call(D0, CONTROL_OP, [control::CREATE, gpa, 0, 0, 0]);
    assert_eq!(result, error(Errno::EFAULT));
    assert_eq!(free(&system), before);
}

#[test]
fn memory_of_a_dead_domain_comes_to_the_next_one_as_zeros() {
    let mut system = System::new();
    let first = system.guest("first");
    for page in 0..u64::from(HEAP_PAGES) {
        system.write(first, HEAP_GPA + page * 4096, &[0xa5; 4096]);
    }
    system.destroy(first);
    let second = system.guest("second");
    for page in 1..u64::from(HEAP_PAGES) {
        let bytes: [u8; 4096] = system.get(second, HEAP_GPA + page * 4096);
        assert_eq!(bytes, [0; 4096]);
    }
}

#[test]
fn a_restart_zeroes_what_is_not_preserved_and_keeps_what_is() {
    let mut system = System::new();
    let guest = system.guest("guest");
    assert_eq!(system.control_domain(control::RESTART, guest), 0);
    let data = ACCESS_READ | ACCESS_WRITE;
    system.populate(guest, PRESERVED, 1, data, POPULATE_PRESERVED);
    system.start(guest);
    system.write(guest, PRESERVED_GPA, b"journal");
    system.write(guest, DATA.address(), &[0xa5; 4096]);
    system.write(guest, IMAGE_GPA, b"code");
    let pages = system.info(guest).pages;
    system.restart(guest);
    assert_eq!(system.get::<[u8; 7]>(guest, PRESERVED_GPA), *b"journal");
    assert_eq!(system.get::<[u8; 4096]>(guest, DATA.address()), [0; 4096]);
    assert_eq!(system.get::<[u8; 4]>(guest, IMAGE_GPA), *b"code", "loaded again, not zeroed");
    let info = system.info(guest);
    assert_eq!((info.incarnation, info.pages), (3, pages));
    system.check();
}

#[test]
fn a_restart_drops_mappings_and_closes_ports_to_unbound_at_the_peer() {
    let mut system = System::new();
    let front = system.guest("front");
    let back = system.guest("back");
    system.grant(front, GrantRef(8), back, DATA, false);
    system.map(back, front, GrantRef(8), WINDOW, false).unwrap();
    let port = system.alloc_unbound(front, back).unwrap();
    system.bind(back, front, port).unwrap();
    assert_eq!(system.core.lock().port(&system.p, front, port).status, STATUS_INTERDOMAIN);
    assert!(!system.revoke(front, GrantRef(8)), "in use");

    assert_eq!(system.control_domain(control::CRASH, back), 0);
    system.run(0, 4);
    assert!(!system.is_live(back));
    let entry = system.core.lock().port(&system.p, front, port);
    assert_eq!((entry.status, entry.remote), (STATUS_UNBOUND, back), "at the instant of death");
    assert_eq!(system.send(front, port), 0, "nobody hears it, nothing breaks");

    system.restart(back);
    assert_eq!(system.page(back, WINDOW), None);
    assert!(system.revoke(front, GrantRef(8)), "no longer in use");
    system.grant(front, GrantRef(8), back, DATA, false);
    system.map(back, front, GrantRef(8), WINDOW, false).unwrap();
    let local = system.bind(back, front, port).unwrap();
    assert!(system.is_pending(back, local), "it looks once");
    assert!(!system.is_pending(front, port), "never on the frontend's port");
    system.check();
}

#[test]
fn a_restart_replaces_frames_that_a_peer_still_reaches() {
    let mut system = System::new();
    // At its limit: the exchange needs no page more than it has.
    let plan = Create { max_pages: u32::MAX, ..System::plan("granter") };
    let granter = system.create(plan);
    let peer = system.guest("peer");
    assert_eq!(system.control_domain(control::RESTART, granter), 0);
    let data = ACCESS_READ | ACCESS_WRITE;
    system.populate(granter, PRESERVED, 1, data, POPULATE_PRESERVED);
    system.start(granter);
    system.write(granter, PRESERVED_GPA, b"journal");
    system.write(granter, DATA.address(), b"secret");
    let code = Gfn::containing(IMAGE_GPA);
    system.write(granter, IMAGE_GPA, b"code");
    for (gref, gfn) in (8..).zip([DATA, PRESERVED, code]) {
        system.grant(granter, GrantRef(gref), peer, gfn, true);
        system.map(peer, granter, GrantRef(gref), Gfn(WINDOW.0 + gref as u64), true).unwrap();
    }
    let old: Vec<_> = [DATA, PRESERVED, code].map(|gfn| system.page(granter, gfn).unwrap()).into();
    system.restart(granter);
    system.check();
    let new = [DATA, PRESERVED, code].map(|gfn| system.page(granter, gfn).unwrap());
    for (old, new) in old.iter().zip(new) {
        assert_ne!(old.mfn, new.mfn, "another frame");
        assert_eq!(
            (old.write, old.execute, old.preserved),
            (new.write, new.execute, new.preserved)
        );
    }
    assert_eq!(system.core.lock().frames().orphans(), 3);
    system.write(granter, PRESERVED_GPA + 7, b"!");
    assert_eq!(system.get::<[u8; 8]>(granter, PRESERVED_GPA), *b"journal!");
    assert_eq!(system.get::<[u8; 4]>(granter, IMAGE_GPA), *b"code");
    assert_eq!(system.get::<[u8; 6]>(granter, DATA.address()), [0; 6]);
    assert_eq!(system.get::<[u8; 6]>(peer, Gfn(WINDOW.0 + 8).address()), *b"secret");
    system.restart(peer);
    assert_eq!(system.core.lock().frames().orphans(), 0);
    system.check();
}

#[test]
fn a_restart_goes_on_when_its_builder_is_interrupted_between_any_two_steps() {
    let mut system = System::new();
    let guest = system.guest("guest");
    let op = DomainOp { domid: guest };
    while system.call_with(D0, CONTROL_OP, control::RESTART, op).0 == error(Errno::EAGAIN) {
        system.check();
        assert_eq!(system.info(guest).state, STATE_DEAD);
        let start = SetStart { domid: guest, pad: [0; 3], entry: 0, stack: 0, argument: 0 };
        assert_eq!(system.control(control::SET_START, start).0, error(Errno::EBUSY));
        assert_eq!(system.control_domain(control::UNPAUSE, guest), error(Errno::EINVAL));
    }
    assert_eq!(system.info(guest).state, STATE_BUILDING);
    system.start(guest);
    // Given up in the middle, it can still be destroyed.
    assert_eq!(system.call_with(D0, CONTROL_OP, control::RESTART, op).0, error(Errno::EAGAIN));
    system.destroy(guest);
    system.check();
}

#[test]
fn crash_makes_a_real_fault_with_the_backtrace_of_where_it_was() {
    let mut system = System::new();
    let guest = system.guest("guest");
    let frames = [(SCRATCH, SCRATCH + 64, 0x20_0111_u64), (SCRATCH + 64, 0, 0x20_0222)];
    for (at, next, address) in frames {
        system.write(guest, at, &next.to_le_bytes());
        system.write(guest, at + 8, &address.to_le_bytes());
    }
    system.act(guest, |registers| {
        registers.rbp = SCRATCH;
        registers.rip = IMAGE_GPA + 0x123;
        Exit::Interrupted
    });
    system.spin(guest);
    // Ordered twice before it runs again: the first address counts.
    let paused = system.control_domain(control::PAUSE, guest);
    assert_eq!(paused, 0);
    for _ in 0..2 {
        assert_eq!(system.control_domain(control::CRASH, guest), 0);
    }
    assert!(system.is_live(guest));
    let at = system.registers(guest).unwrap();
    system.control_domain(control::UNPAUSE, guest);
    system.run(0, 4);
    let death = system.death(guest);
    assert_eq!((death.cause, death.vector, death.incarnation), (DEATH_CRASHED, 14, 1));
    assert_eq!(death.address, at.rip, "it faulted where nothing is");
    assert_eq!(death.rip, at.rip);
    assert_eq!(death.backtrace[..4], [IMAGE_GPA + 0x123, 0x20_0111, 0x20_0222, 0]);
    assert_eq!(death.registers[6], SCRATCH, "rbp");
    assert!(system.p.machine().console.windows(5).any(|bytes| bytes == b"guest"));
}

#[test]
fn a_backtrace_through_hostile_frame_pointers_ends() {
    for rbp in [0, 1, 7, SCRATCH, HEAP_GPA + 8 * 4096 - 8, !0, !7, 1 << 47, (1 << 47) - 8] {
        let mut system = System::new();
        let guest = system.guest("guest");
        // A chain that points at itself.
        system.write(guest, SCRATCH, &SCRATCH.to_le_bytes());
        system.write(guest, SCRATCH + 8, &1_u64.to_le_bytes());
        system.act(guest, move |registers| {
            registers.rbp = rbp;
            Exit::Fault { vector: 13, error: 8, address: 0 }
        });
        let death = system.death(guest);
        assert_eq!((death.cause, death.vector, death.error), (DEATH_FAULT, 13, 8));
        assert_eq!(death.backtrace[1], 0);
    }
}

#[test]
fn each_way_to_die_is_told_apart_and_told_to_the_control_domain() {
    let mut system = System::new();
    let virq = system.bind_virq(D0, event::VIRQ_DOM_EXC).unwrap();
    let guest = system.guest("guest");
    system.clear_pending(D0, virq);
    system.advance(5_000);
    system.call_with(guest, SCHED_OP, SHUTDOWN, Shutdown { reason: 3 });
    assert!(system.is_pending(D0, virq));
    let death = system.death(guest);
    assert_eq!((death.cause, death.detail), (DEATH_SHUTDOWN, 3));
    assert!(death.lived_ns >= 5_000 && death.restarted_ns == 0);
    system.advance(5_000);
    system.restart(guest);
    assert!(system.death(guest).restarted_ns >= death.time_ns + 5_000);
    assert_eq!(system.control_domain(control::RESTART, guest), 0);
    assert_eq!(system.death(guest).cause, DEATH_RESTARTED);
}

#[test]
fn a_paused_domain_does_not_run_and_goes_on_where_it_was() {
    let mut system = System::new();
    let guest = system.guest("guest");
    system.spin(guest);
    system.run(0, 10);
    assert_eq!(system.control_domain(control::PAUSE, guest), 0);
    let used = system.info(guest).cpu_ns;
    assert_eq!(system.info(guest).state, STATE_PAUSED);
    system.advance(50_000_000);
    system.run(0, 10);
    assert_eq!(system.info(guest).cpu_ns, used);
    assert_eq!(system.control_domain(control::UNPAUSE, guest), 0);
    system.run(0, 10);
    assert!(system.info(guest).cpu_ns > used);
    system.check();
}

#[test]
fn only_a_building_domain_is_filled_and_only_by_its_builder() {
    let mut system = System::new();
    let guest = system.guest("guest");
    let op = SetGrant { domid: guest, grantee: D0, gref: GrantRef(1), gfn: DATA.0 };
    assert_eq!(system.control(control::SET_GRANT, op).0, error(Errno::EBUSY));
    let load = Load { domid: guest, pad: 0, len: 1, gpa: DATA.address(), source: SCRATCH };
    assert_eq!(system.control(control::LOAD, load).0, error(Errno::EBUSY));
    // Without rights nothing, not even a hint.
    for command in 0..20 {
        let op = DomainOp { domid: D0 };
        let (result, _) = system.call_with(guest, CONTROL_OP, command, op);
        assert_eq!(result, error(Errno::EPERM), "{command}");
    }
    // With the right to build, only what it built; and no right that it lacks.
    let plan = Create { rights: Rights::BUILD.bits(), ..System::plan("builder") };
    let builder = system.create(plan);
    let op = DomainOp { domid: guest };
    for command in [control::PAUSE, control::DESTROY, control::RESTART, control::CRASH] {
        let (result, _) = system.call_with(builder, CONTROL_OP, command, op);
        assert_eq!(result, error(Errno::EPERM), "{command}");
    }
    let plan = Create { rights: Rights::all().bits(), ..System::plan("more") };
    let (result, _) = system.call_with(builder, CONTROL_OP, control::CREATE, plan);
    assert_eq!(result, error(Errno::EPERM));
    assert_eq!(system.info(guest).class, CLASS_GUEST);
}

#[test]
fn what_a_destroyed_builder_built_belongs_to_its_builder_not_to_who_gets_its_id() {
    let mut system = System::new();
    let plan = Create { rights: Rights::BUILD.bits(), ..System::plan("builder") };
    let builder = system.create(plan);
    let (result, child) =
        system.call_with(builder, CONTROL_OP, control::CREATE, System::plan("child"));
    assert_eq!(result, 0);
    system.destroy(builder);
    let again = system.create(Create { domid: builder, ..plan });
    let op = DomainOp { domid: child.domid };
    assert_eq!(system.call_with(again, CONTROL_OP, control::DESTROY, op).0, error(Errno::EPERM));
    system.destroy(child.domid);
    system.check();
}

#[test]
fn an_id_given_up_is_not_the_next_one_given_out_and_no_port_waits_for_it() {
    let mut system = System::new();
    let (old, peer) = (system.guest("old"), system.guest("peer"));
    let port = system.alloc_unbound(peer, old).unwrap();
    system.destroy(old);
    assert_ne!(system.guest("other"), old);
    let new = system.create(Create { domid: old, ..System::plan("new") });
    assert_eq!(system.bind(new, peer, port), Err(error(Errno::EINVAL)));
    system.check();
}

#[test]
fn load_reaches_read_only_pages_of_a_building_domain_and_nothing_else() {
    let mut system = System::new();
    let guest = system.guest("guest");
    assert_eq!(system.control_domain(control::RESTART, guest), 0);
    let source = DATA.address() + 4000;
    let text: Vec<u8> = (0..200).collect();
    system.write(D0, source, &text);
    let load = Load { domid: guest, pad: 0, len: 200, gpa: IMAGE_GPA + 10, source };
    assert_eq!(system.control(control::LOAD, load).0, 0);
    let mut read = [0; 200];
    system.read(guest, IMAGE_GPA + 10, &mut read);
    assert_eq!(read[..], text);
    for (gpa, source) in [(0, source), (IMAGE_GPA, 0), (IMAGE_GPA + 4000, source), (!0, source)] {
        let load = Load { domid: guest, pad: 0, len: 200, gpa, source };
        assert_eq!(system.control(control::LOAD, load).0, error(Errno::EFAULT));
    }
    let load = Load { len: 65_537, ..load };
    assert_eq!(system.control(control::LOAD, load).0, error(Errno::E2BIG));
}

#[test]
fn no_page_is_writable_and_executable_and_no_start_is_outside_the_lower_half() {
    let mut system = System::new();
    let (_, plan) = system.control(control::CREATE, System::plan("guest"));
    let all = ACCESS_READ | ACCESS_WRITE | ACCESS_EXECUTE;
    let cases =
        [(all, 1), (ACCESS_WRITE, 1), (8, 1), (ACCESS_READ, (1 << 35) - 1), (ACCESS_READ, !0)];
    for (access, gfn) in cases {
        let op = control::Populate {
            domid: plan.domid,
            pad: 0,
            access,
            flags: 0,
            count: 1,
            gfn,
            done: 0,
        };
        assert_eq!(system.control(control::POPULATE, op).0, error(Errno::EINVAL), "{gfn:#x}");
    }
    for entry in [1 << 47, (1 << 47) - 2, !0] {
        let op = SetStart { domid: plan.domid, pad: [0; 3], entry, stack: 0, argument: 0 };
        assert_eq!(system.control(control::SET_START, op).0, error(Errno::EINVAL));
    }
    system.check();
}

#[test]
fn a_reserved_grant_reaches_memory_of_the_domain_that_is_built_and_its_builders_nothing() {
    let mut system = System::new();
    let guest = system.guest("guest");
    let store = system.guest("store");
    assert_eq!(system.control_domain(control::RESTART, guest), 0);
    let ring = Gfn::containing(XENSTORE_RING_GPA);
    system.populate(guest, ring, 1, ACCESS_READ | ACCESS_WRITE, 0);
    let op = SetGrant { domid: guest, grantee: store, gref: GrantRef(1), gfn: ring.0 };
    assert_eq!(system.control(control::SET_GRANT, op).0, 0);
    for bad in [SetGrant { gref: GrantRef(8), ..op }, SetGrant { gfn: 0, ..op }] {
        assert_eq!(system.control(control::SET_GRANT, bad).0, error(Errno::EINVAL));
    }
    // The store maps it before the domain runs.
    system.map(store, guest, GrantRef(1), WINDOW, false).unwrap();
    system.start(guest);
    system.write(guest, XENSTORE_RING_GPA, b"hello");
    assert_eq!(system.get::<[u8; 5]>(store, WINDOW.address()), *b"hello");
    system.check();
}

#[test]
fn blocking_shows_and_ids_that_are_no_domain_are_not_found() {
    let mut system = System::new();
    let guest = system.guest("guest");
    system.run(0, 10);
    assert_eq!(system.info(guest).state, STATE_BLOCKED);
    for domid in [DomainId(63), DomainId(64), DomainId(0x7ff0), DomainId(0xffff)] {
        assert_eq!(system.control_domain(control::PAUSE, domid), error(Errno::ESRCH));
    }
    for (domid, expected) in [(D0, Errno::EEXIST), (DomainId(64), Errno::EINVAL)] {
        let plan = Create { domid, ..System::plan("x") };
        assert_eq!(system.control(control::CREATE, plan).0, error(expected));
    }
}

#[test]
fn a_device_needs_trust_without_an_iommu() {
    let mut system = System::with(Config::default());
    let guest = system.guest("guest");
    assert_eq!(system.control_domain(control::RESTART, guest), 0);
    let mut op = AssignDevice::new_zeroed();
    op.domid = guest;
    assert_eq!(system.control(control::ASSIGN_DEVICE, op).0, error(Errno::EOPNOTSUPP));
    op.flags = ASSIGN_DMA_TRUSTED;
    op.bdf = 0x18;
    assert_eq!(system.control(control::ASSIGN_DEVICE, op).0, error(Errno::ENODEV));
}
