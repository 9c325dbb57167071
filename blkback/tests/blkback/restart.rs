//! The backend dies at any step, and its successor goes on without the frontends noticing.

use crate::disk::{geometry, medium};
use crate::front::Config;
use crate::rig::{Random, Rig};
use xenbus::XenbusState;

const ONE: u16 = 3;
const TWO: u16 = 4;

/// Two guests on two ranges of one disk; one of them with everything that is on offer.
fn two_guests() -> Rig {
    let mut rig = Rig::new(vec![medium(geometry(512, 512))], 2);
    rig.add_guest(ONE, "range:0+64K", "w", Config::default());
    let full = Config {
        persistent: true,
        queues: 2,
        order: 1,
        segments: 32,
        narrow: true,
        ..Config::default()
    };
    rig.add_guest(TWO, "range:128K+128K", "w", full);
    rig
}

/// Restarts the driver domain if it is dead, with torn rings in between. True if it was.
fn revive(rig: &mut Rig) -> bool {
    let dead = rig.back.is_none();
    while rig.back.is_none() {
        rig.tear_rings();
        rig.start_back();
    }
    dead
}

/// What must hold after any number of deaths.
fn judge(rig: &mut Rig, store_events: &[usize]) {
    for (index, &seen) in store_events.iter().enumerate() {
        assert_eq!(rig.fronts[index].store_events, seen, "xenbus was disturbed");
        assert_eq!(rig.fronts[index].errors, 0);
        let number = rig.fronts[index].id.0;
        assert_eq!(rig.states(number), (XenbusState::CONNECTED, XenbusState::CONNECTED));
        assert_eq!(rig.error_of(number), None);
    }
    prove_alive(rig);
}

/// Everything is answered, the disk is what the guests believe, more requests are served, and
/// nothing is left over at the end.
fn prove_alive(rig: &mut Rig) {
    rig.load(6);
    rig.compare(0, 0, 0);
    rig.compare(1, 0, 256);
    rig.close_all();
}

fn give_work(rig: &mut Rig, requests: u32) {
    for front in &mut rig.fronts {
        front.work += requests;
        front.wake();
    }
}

fn store_events(rig: &Rig) -> Vec<usize> {
    rig.fronts.iter().map(|front| front.store_events).collect()
}

#[test]
fn a_restart_while_nothing_happens_is_not_noticed() {
    let mut rig = two_guests();
    let events = store_events(&rig);
    for _ in 0..3 {
        rig.kill_back();
        rig.run();
        assert!(revive(&mut rig));
        rig.run();
    }
    judge(&mut rig, &events);
}

#[test]
fn requests_made_while_the_backend_is_away_are_served_afterwards() {
    let mut rig = two_guests();
    let events = store_events(&rig);
    rig.kill_back();
    give_work(&mut rig, 20);
    rig.run();
    assert!(revive(&mut rig));
    rig.run();
    judge(&mut rig, &events);
}

/// The workload is so small that it can be killed at each of its steps.
#[test]
fn death_at_every_step_of_a_small_workload() {
    let mut step = 0;
    loop {
        let mut rig = two_guests();
        let events = store_events(&rig);
        give_work(&mut rig, 4);
        rig.fuse.light(step);
        rig.run();
        let died = revive(&mut rig);
        rig.fuse.put_out();
        rig.run();
        judge(&mut rig, &events);
        if !died {
            break;
        }
        step += 1;
    }
    assert!(step > 30, "only {step} steps");
}

/// Death while the next incarnation takes over, and again.
#[test]
fn death_at_every_step_of_the_takeover() {
    let mut step = 0;
    loop {
        let mut rig = two_guests();
        let events = store_events(&rig);
        give_work(&mut rig, 6);
        rig.fuse.light(12);
        rig.run();
        assert!(rig.back.is_none());
        rig.tear_rings();
        rig.fuse.light(step);
        rig.start_back();
        rig.run();
        let died = revive(&mut rig);
        rig.fuse.put_out();
        rig.run();
        judge(&mut rig, &events);
        if !died {
            break;
        }
        step += 1;
    }
    assert!(step > 40, "only {step} steps");
}

/// Death during the handshake: the frontend gets its connection from the successor.
#[test]
fn death_at_every_step_of_the_handshake() {
    let mut step = 0;
    loop {
        let mut rig = Rig::new(vec![medium(geometry(512, 512))], 2);
        rig.add_unconnected(ONE, "range:0+64K", "w", Config::default());
        let wide = Config { queues: 3, order: 2, ..Config::default() };
        rig.add_unconnected(TWO, "range:128K+128K", "w", wide);
        rig.fuse.light(step);
        rig.run();
        let died = revive(&mut rig);
        rig.fuse.put_out();
        rig.run();
        prove_alive(&mut rig);
        if !died {
            break;
        }
        step += 1;
    }
    assert!(step > 20, "only {step} steps");
}

#[test]
fn deaths_at_random_steps_of_large_workloads() {
    let mut kills = 0;
    for seed in 1..=6_u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut rig = two_guests();
        let events = store_events(&rig);
        for _ in 0..15 {
            give_work(&mut rig, 12);
            rig.fuse.light(random.below(120));
            rig.media[0].borrow_mut().stuck = random.below(4) == 0;
            // Sometimes not even to the end of the work.
            for _ in 0..2 + random.below(20) {
                rig.step();
            }
            rig.media[0].borrow_mut().stuck = false;
            revive(&mut rig);
        }
        rig.fuse.put_out();
        rig.run();
        kills += rig.kills;
        judge(&mut rig, &events);
    }
    assert!(kills > 40, "only {kills} kills");
}

/// A guest that closes its disk while the disk works is let go only when nothing is under way:
/// the device would write to pages that are no longer the guest's to give.
#[test]
fn a_connection_that_ends_waits_for_the_disk() {
    let mut rig = two_guests();
    rig.media[0].borrow_mut().stuck = true;
    rig.fronts[0].work = 6;
    rig.fronts[0].wake();
    rig.run();
    rig.fronts[0].begin_closing();
    rig.run();
    assert_eq!(rig.states(ONE), (XenbusState::CLOSING, XenbusState::CLOSED));
    let mapped = rig.back().env.domain.mappings();
    assert!(mapped > 0);
    rig.media[0].borrow_mut().stuck = false;
    rig.fronts[1].wake();
    rig.fronts[1].work += 1;
    rig.run();
    assert_eq!(rig.states(ONE), (XenbusState::CLOSED, XenbusState::CLOSED));
    rig.fronts[0].free_everything();
}

/// xen-abi §10.3, last row: a guest that reboots gets a new connection, and nothing of the old
/// one is taken up again.
#[test]
fn a_guest_that_reboots_connects_anew() {
    for alive in [true, false] {
        let mut rig = two_guests();
        rig.media[0].borrow_mut().stuck = true;
        rig.fronts[0].work = 6;
        rig.fronts[0].wake();
        rig.run();
        if !alive {
            rig.kill_back();
        }
        let old = rig.fronts.remove(0);
        rig.world.kill(old.id);
        drop(old);
        let id = domain_api::DomainId(ONE);
        rig.store.restart(id);
        rig.add_directories_anew(id);
        if !alive {
            rig.media[0].borrow_mut().stuck = false;
            revive(&mut rig);
        }
        let front = crate::front::Front::new(
            rig.world.domain(id),
            rig.store.client(id),
            Config { order: 1, ..Config::default() },
        );
        rig.fronts.insert(0, front);
        rig.run();
        // While the disk still has requests of the old life there is no new connection.
        assert_eq!(rig.fronts[0].is_connected(), !alive);
        assert!(!alive || rig.fronts[0].queues.is_empty());
        rig.media[0].borrow_mut().stuck = false;
        rig.fronts[1].work += 1;
        rig.fronts[1].wake();
        rig.run();
        assert!(rig.fronts[0].is_connected(), "{alive}");
        assert_eq!(rig.vbd(ONE).stats.replayed, 0);
        // What the old life wrote is anything.
        rig.fronts[0].generations.fill(crate::front::UNKNOWN);
        rig.load(30);
        rig.compare(0, 0, 0);
        rig.close_all();
    }
}
