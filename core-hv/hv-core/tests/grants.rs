//! Grants: whoever maps, unmaps, copies, revokes, restarts or dies in any order, every pin is
//! returned, every frame is somebody's, and nobody reaches a page without a grant.

use axolotl_abi::control;
use hv_core::fake::{CopySide, D0, DATA, System};
use proptest::collection::vec;
use proptest::prelude::*;
use xen_abi::event::STATUS_CLOSED;
use xen_abi::grant::{
    COPY, GNTMAP_DEVICE_MAP, GNTMAP_HOST_MAP, GTF_READING, GTF_WRITING, GrantCopy, GrantStatus,
    MAP_GRANT_REF, MapGrantRef,
};
use xen_abi::hypercall::GRANT_TABLE_OP;
use xen_abi::{DomainId, EventPort, Gfn, GrantRef};
use zerocopy::FromZeros;

const WINDOW: Gfn = Gfn(0x4_0000);
const REF: GrantRef = GrantRef(8);

fn pair() -> (System, DomainId, DomainId) {
    let mut system = System::new();
    let granter = system.guest("granter");
    let grantee = system.guest("grantee");
    (system, granter, grantee)
}

#[test]
fn marks_say_who_uses_a_grant_and_end_with_the_last_use() {
    let (mut system, granter, grantee) = pair();
    system.grant(granter, REF, grantee, DATA, false);
    let marks = |system: &System| system.entry(granter, REF).flags & (GTF_READING | GTF_WRITING);
    let reader = system.map(grantee, granter, REF, WINDOW, true).unwrap();
    assert_eq!(marks(&system), GTF_READING);
    let writer = system.map(grantee, granter, REF, Gfn(WINDOW.0 + 1), false).unwrap();
    assert_eq!(marks(&system), GTF_READING | GTF_WRITING);
    system.check();
    assert_eq!(system.unmap(grantee, writer, Gfn(WINDOW.0 + 1)), GrantStatus::OKAY);
    assert_eq!(marks(&system), GTF_READING);
    assert_eq!(system.unmap(grantee, reader, WINDOW), GrantStatus::OKAY);
    assert_eq!(marks(&system), 0);
    assert_eq!(system.core.lock().frames().total_pins(), 0);
}

#[test]
fn the_frame_of_a_grant_in_use_is_the_one_that_was_pinned() {
    let (mut system, granter, grantee) = pair();
    system.grant(granter, REF, grantee, DATA, false);
    system.map(grantee, granter, REF, WINDOW, false).unwrap();
    // The granter points its entry elsewhere while it is in use.
    let entry = system.entry(granter, REF);
    system.write(granter, System::entry_gpa(REF) + 4, &(entry.frame + 1).to_le_bytes());
    system.map(grantee, granter, REF, Gfn(WINDOW.0 + 1), false).unwrap();
    let frames = [WINDOW, Gfn(WINDOW.0 + 1)].map(|gfn| system.page(grantee, gfn).unwrap().mfn);
    assert_eq!(frames[0], frames[1]);
    assert_eq!(frames[0], system.page(granter, DATA).unwrap().mfn);
    system.check();
}

#[test]
fn a_grant_is_for_one_domain_one_access_and_memory_only() {
    let (mut system, granter, grantee) = pair();
    let other = system.guest("other");
    system.grant(granter, REF, grantee, DATA, true);
    let map = |system: &mut System, who, gref, read_only| {
        system.map(who, granter, gref, WINDOW, read_only).unwrap_err()
    };
    assert_eq!(map(&mut system, other, REF, true), GrantStatus::GENERAL_ERROR);
    assert_eq!(map(&mut system, grantee, REF, false), GrantStatus::GENERAL_ERROR);
    assert_eq!(map(&mut system, grantee, GrantRef(9), true), GrantStatus::GENERAL_ERROR);
    assert_eq!(map(&mut system, grantee, GrantRef(512), true), GrantStatus::BAD_GNTREF);
    assert_eq!(map(&mut system, grantee, GrantRef(!0), true), GrantStatus::BAD_GNTREF);
    // Pages that are no memory of the granter's: nothing, its shared info, its code for writing.
    let shared = Gfn::containing(axolotl_abi::start::SHARED_INFO_GPA);
    for gfn in [Gfn(0), shared] {
        system.grant(granter, REF, grantee, gfn, false);
        assert_eq!(map(&mut system, grantee, REF, false), GrantStatus::BAD_PAGE);
        assert_eq!(system.entry(granter, REF).flags & (GTF_READING | GTF_WRITING), 0);
    }
    let code = Gfn::containing(axolotl_abi::start::IMAGE_GPA);
    system.grant(granter, REF, grantee, code, false);
    assert_eq!(map(&mut system, grantee, REF, false), GrantStatus::PERMISSION_DENIED);
    assert_eq!(system.entry(granter, REF).flags & (GTF_READING | GTF_WRITING), 0);
    system.map(grantee, granter, REF, WINDOW, true).unwrap();
    let second = system.map(grantee, granter, REF, Gfn(WINDOW.0 + 1), false);
    assert_eq!(second.unwrap_err(), GrantStatus::PERMISSION_DENIED);
    assert_eq!(system.entry(granter, REF).flags & (GTF_READING | GTF_WRITING), GTF_READING);
    assert!(!system.page(grantee, WINDOW).unwrap().execute);
    system.check();
}

#[test]
fn a_mapped_grant_is_not_granted_on() {
    let (mut system, granter, grantee) = pair();
    let third = system.guest("third");
    system.grant(granter, REF, grantee, DATA, false);
    system.map(grantee, granter, REF, WINDOW, false).unwrap();
    system.grant(grantee, REF, third, WINDOW, false);
    let answer = system.map(third, grantee, REF, WINDOW, false);
    assert_eq!(answer.unwrap_err(), GrantStatus::BAD_PAGE);
    let answer = system.copy(third, CopySide::Grant(grantee, REF, 0), CopySide::Own(DATA, 0), 16);
    assert_eq!(answer, GrantStatus::BAD_PAGE);
    system.check();
}

#[test]
fn a_grant_is_mapped_only_where_nothing_is() {
    let (mut system, granter, grantee) = pair();
    system.grant(granter, REF, grantee, DATA, false);
    for gfn in [DATA, Gfn::containing(axolotl_abi::start::IMAGE_GPA), Gfn((1 << 35) - 1)] {
        let answer = system.map(grantee, granter, REF, gfn, false);
        assert_eq!(answer.unwrap_err(), GrantStatus::BAD_VIRT_ADDR);
        assert!(system.revoke(granter, REF), "nothing is left in use");
        system.grant(granter, REF, grantee, DATA, false);
    }
    let mut op = MapGrantRef::new_zeroed();
    (op.dom, op.gref, op.host_addr) = (granter, REF, WINDOW.address());
    for flags in [0, GNTMAP_DEVICE_MAP, GNTMAP_HOST_MAP | 0x10] {
        op.flags = flags;
        let (_, op) = system.call_with(grantee, GRANT_TABLE_OP, MAP_GRANT_REF, op);
        assert_eq!(op.status, GrantStatus::GENERAL_ERROR);
    }
}

#[test]
fn a_copy_moves_just_its_bytes_and_keeps_no_pin() {
    let (mut system, granter, grantee) = pair();
    system.grant(granter, REF, grantee, DATA, false);
    system.write(granter, DATA.address(), &[7; 4096]);
    let theirs = |offset| CopySide::Grant(granter, REF, offset);
    let mine = |offset| CopySide::Own(DATA, offset);
    assert_eq!(system.copy(grantee, theirs(100), mine(4000), 96), GrantStatus::OKAY);
    let page: [u8; 4096] = system.get(grantee, DATA.address());
    assert!((0..4096).all(|at| (page[at] == 7) == (4000..4096).contains(&at)));
    assert_eq!(system.copy(grantee, mine(0), theirs(0), 4096), GrantStatus::OKAY);
    assert_eq!(system.get::<[u8; 4096]>(granter, DATA.address()), page);
    // Both sides a grant; also one grant to itself, but never over itself.
    assert_eq!(system.copy(grantee, theirs(0), theirs(2048), 2048), GrantStatus::OKAY);
    assert_eq!(system.copy(grantee, theirs(0), theirs(1), 2), GrantStatus::BAD_COPY_ARG);
    for (source, dest, len) in [(theirs(1), mine(0), 4096), (theirs(0), mine(0xffff), 1)] {
        assert_eq!(system.copy(grantee, source, dest, len), GrantStatus::BAD_COPY_ARG);
    }
    // Own pages that it may not write, or that are none of its own.
    let code = Gfn::containing(axolotl_abi::start::IMAGE_GPA);
    let table = Gfn::containing(axolotl_abi::start::GRANT_TABLE_GPA);
    for gfn in [code, table, Gfn(!0), Gfn(0)] {
        let answer = system.copy(grantee, theirs(0), CopySide::Own(gfn, 0), 8);
        assert_eq!(answer, GrantStatus::BAD_PAGE, "{gfn:?}");
    }
    let mut op = GrantCopy::new_zeroed();
    (op.source.domid, op.source.frame, op.dest.domid) = (granter, DATA.0, DomainId::SELF);
    let (_, op) = system.call_with(grantee, GRANT_TABLE_OP, COPY, op);
    assert_eq!(op.status, GrantStatus::PERMISSION_DENIED, "no page of others without a grant");
    assert!(system.revoke(granter, REF));
    system.check();
}

#[test]
fn a_read_only_mapping_is_read_only_for_the_core_too() {
    let (mut system, granter, grantee) = pair();
    system.grant(granter, REF, grantee, DATA, false);
    system.map(grantee, granter, REF, WINDOW, true).unwrap();
    let result =
        system.call(grantee, xen_abi::hypercall::XEN_VERSION, [1, WINDOW.address(), 0, 0, 0]);
    assert_eq!(result, xen_abi::Errno::EFAULT.to_result());
    let answer = system.copy(grantee, CopySide::Own(DATA, 0), CopySide::Own(WINDOW, 0), 8);
    assert_eq!(answer, GrantStatus::BAD_PAGE);
}

#[test]
fn a_batch_of_any_size_is_done_in_parts_with_others_in_between() {
    let (mut system, granter, grantee) = pair();
    system.grant(granter, REF, grantee, DATA, false);
    let mut op = GrantCopy::new_zeroed();
    (op.source.domid, op.source.frame) = (granter, REF.0.into());
    (op.dest.domid, op.dest.frame) = (DomainId::SELF, DATA.0);
    (op.flags, op.status) = (xen_abi::grant::GNTCOPY_SOURCE_GREF, GrantStatus(1));
    let array = DATA.address() + 4096;
    for index in 0..100 {
        system.write(grantee, array + 40 * index, zerocopy::IntoBytes::as_bytes(&op));
    }
    let before = system.info(grantee).hypercalls;
    assert_eq!(system.call(grantee, GRANT_TABLE_OP, [COPY, array, 100, 0, 0]), 0);
    // And once for its idle program.
    assert_eq!(system.info(grantee).hypercalls - before, 5, "entered once per part");
    for index in 0..100 {
        assert_eq!(system.get::<GrantCopy>(grantee, array + 40 * index).status, GrantStatus::OKAY);
    }
    let result = system.call(grantee, GRANT_TABLE_OP, [COPY, array, 1 << 32, 0, 0]);
    assert_eq!(result, xen_abi::Errno::EINVAL.to_result());
}

/// What one of three guests does next; `a`, `b`, `c` are taken modulo what there is.
fn act(system: &mut System, guests: [DomainId; 3], maps: &mut Vec<Held>, op: (u8, u8, u8, u8)) {
    let (kind, a, b, c) = op;
    let me = guests[usize::from(a) % 3];
    let peer = guests[usize::from(b) % 3];
    let gref = GrantRef(8 + u32::from(c) % 4);
    let gfn = Gfn(DATA.0 + u64::from(c) % 3);
    let at = Gfn(WINDOW.0 + u64::from(c) % 8);
    let port = EventPort(1 + u32::from(c) % 6);
    let live = system.is_live(me);
    match kind % 16 {
        0 | 1 if live => system.grant(me, gref, peer, gfn, c & 64 != 0),
        2 if live => drop(system.revoke(me, gref)),
        3 | 4 if live => {
            if let Ok(handle) = system.map(me, peer, gref, at, c & 32 != 0) {
                maps.push(Held { me, handle, at });
            }
        }
        5 if live && !maps.is_empty() => {
            let held = maps.swap_remove(usize::from(c) % maps.len());
            if system.is_live(held.me) {
                system.unmap(held.me, held.handle, held.at);
            }
        }
        6 if live => {
            let theirs = CopySide::Grant(peer, gref, u16::from(b) * 16);
            let sides = [theirs, CopySide::Own(gfn, u16::from(c))];
            let (from, to) = if b & 1 == 0 { (0, 1) } else { (1, 0) };
            system.copy(me, sides[from], sides[to], u16::from(c) * 8);
        }
        7 if live => drop(system.alloc_unbound(me, peer)),
        8 | 9 if live => drop(system.bind(me, peer, port)),
        10 if live => drop(system.close(me, port)),
        11 if live => {
            let status = system.core.lock().port(&system.p, me, port).status;
            assert_eq!(
                system.send(me, port) == 0,
                (1..=2).contains(&status) && status != STATUS_CLOSED
            );
        }
        12 => {
            // Whatever was in the pages of its last life is not in those of the next.
            for page in 0..3 {
                system.write(me, DATA.address() + page * 4096, &[a | 1; 64]);
            }
            system.restart(me);
            maps.retain(|held| held.me != me);
            for page in 0..3 {
                assert_eq!(system.get::<[u8; 4096]>(me, DATA.address() + page * 4096), [0; 4096]);
            }
        }
        13 if live => {
            system.control_domain(control::CRASH, me);
            system.run(0, 4);
            assert!(!system.is_live(me));
        }
        14 => {
            system.destroy(me);
            maps.retain(|held| held.me != me);
            let mut plan = System::plan("again");
            plan.domid = me;
            system.create(plan);
            for page in 0..3 {
                assert_eq!(system.get::<[u8; 4096]>(me, DATA.address() + page * 4096), [0; 4096]);
            }
        }
        15 => {
            system.advance(u64::from(c) * 1_000_000);
            system.run(0, 3);
        }
        _ => {}
    }
}

struct Held {
    me: DomainId,
    handle: u32,
    at: Gfn,
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 32 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// In any order: no frame and no pin is lost or left over, ports name each other, and a page
    /// is reached by its owner and those that map a grant of it.
    #[test]
    fn nothing_is_lost_whatever_domains_do_to_each_other(
        ops in vec(any::<(u8, u8, u8, u8)>(), 1..if cfg!(miri) { 12 } else { 120 }),
    ) {
        let mut system = System::new();
        let before = system.core.lock().frames().counts().1;
        let guests = ["a", "b", "c"].map(|name| system.guest(name));
        let mut maps = Vec::new();
        for op in ops {
            act(&mut system, guests, &mut maps, op);
            system.check();
        }
        system.check_whole();
        for guest in guests {
            system.destroy(guest);
            system.check();
        }
        prop_assert_eq!(system.core.lock().frames().counts().1, before);
        prop_assert_eq!(system.core.lock().frames().total_pins(), 0);
        prop_assert_eq!(system.info(D0).ports, 1, "its xenstore port");
    }
}
