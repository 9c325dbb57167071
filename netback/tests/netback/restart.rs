//! The driver domain dies and goes on (architecture §6, xen-abi §10).

use crate::rig::{OUTSIDE_MAC, Random, Rig, check, frame, guest_mac};
use frontends::netfront::{Config, GrantPolicy};
use std::collections::BTreeMap;
use xenbus::XenbusState;

fn strict(fragment: u16) -> Config {
    Config {
        grants: GrantPolicy::PerRequest,
        fragment,
        tx_buffers: 40,
        rx_buffers: 24,
        ..Config::default()
    }
}

/// Two guests, all eyes open: `store_events` counts what their frontends see of xenbus.
fn two_guests() -> Rig {
    let mut rig = Rig::new(2);
    rig.add_guest(3, strict(85));
    rig.add_guest(4, strict(4096));
    rig
}

/// Frames in all directions: outside, in, and between neighbours.
fn load(rig: &mut Rig, first: u32, count: u32) {
    for seq in first..first + count {
        let len = 18 + (seq as usize * 131) % 1497;
        rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), seq, len));
        rig.guests[0].send(frame(guest_mac(4), guest_mac(3), seq, len));
        rig.guests[1].send(frame(guest_mac(3), guest_mac(4), seq, len));
        rig.arrive(frame(guest_mac(3), OUTSIDE_MAC, seq, len));
        rig.arrive(frame(guest_mac(4), OUTSIDE_MAC, seq, len));
    }
}

/// How often each frame came: by source, then number. Every one is checked byte by byte.
fn count(frames: &[Vec<u8>]) -> BTreeMap<([u8; 6], u32), u32> {
    let mut counts = BTreeMap::new();
    for frame in frames {
        *counts.entry((frame[6..12].try_into().unwrap(), check(frame))).or_default() += 1;
    }
    counts
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
fn judge(rig: &mut Rig, sent_by_guests: u32, store_events: &[usize]) {
    let out = count(&rig.sent());
    let from_guest = |seq| out.get(&(guest_mac(3), seq)).copied().unwrap_or(0);
    let kills = u32::try_from(rig.kills).unwrap();
    for seq in 0..sent_by_guests {
        assert!(from_guest(seq) <= 1 + kills);
    }
    // What the card had queued dies with the driver; what had not got so far is replayed.
    let lost = (0..sent_by_guests).filter(|&seq| from_guest(seq) == 0).count();
    assert!(lost <= rig.kills * 24, "{lost} frames lost in {kills} deaths");
    for (index, &seen) in store_events.iter().enumerate() {
        let inbox = count(&rig.guests[index].inbox);
        for (&(source, seq), &times) in &inbox {
            if source == OUTSIDE_MAC {
                assert_eq!(times, 1, "frame {seq} from outside came twice");
            }
            assert!(times <= 1 + kills);
        }
        see_that_nobody_sleeps_over_work(&mut rig.guests[index]);
        let number = rig.guests[index].id.0;
        assert_eq!(rig.guests[index].store_events, seen, "xenbus was disturbed");
        assert_eq!(rig.guests[index].front.fault(), None);
        assert_eq!(rig.states(number), (XenbusState::CONNECTED, XenbusState::CONNECTED));
        assert_eq!(rig.error_of(number), None);
    }
    prove_alive(rig);
}

/// A lost wake-up: a published frame that the guest does not know of, or a request that the
/// backend does not know of.
fn see_that_nobody_sleeps_over_work(guest: &mut crate::rig::Guest) {
    assert!(guest.outbox.is_empty());
    assert_eq!(guest.front.receive(&mut guest.env, |_| ()), Ok(None));
    guest.front.flush(&mut guest.env).unwrap();
    assert_eq!(guest.front.in_flight().0, 0, "requests are unanswered");
}

/// Fresh frames pass in all directions, each exactly once, and nothing is left over at the end.
fn prove_alive(rig: &mut Rig) {
    rig.sent();
    rig.guests.iter_mut().for_each(|guest| guest.inbox.clear());
    load(rig, 1_000_000, 10);
    rig.run();
    let fresh: Vec<u32> = (1_000_000..1_000_010).collect();
    let of = |counts: &BTreeMap<([u8; 6], u32), u32>, source: [u8; 6]| -> Vec<u32> {
        counts
            .iter()
            .filter(|(key, times)| key.0 == source && **times == 1)
            .map(|(k, _)| k.1)
            .collect()
    };
    assert_eq!(of(&count(&rig.sent()), guest_mac(3)), fresh);
    let (one, two) = (count(&rig.guests[0].inbox), count(&rig.guests[1].inbox));
    for (counts, source) in
        [(&one, guest_mac(4)), (&one, OUTSIDE_MAC), (&two, guest_mac(3)), (&two, OUTSIDE_MAC)]
    {
        assert_eq!(of(counts, source), fresh);
    }
    rig.close_all();
}

#[test]
fn a_restart_while_nothing_happens_is_not_noticed() {
    let mut rig = two_guests();
    let events = rig.guests.iter().map(|guest| guest.store_events).collect::<Vec<_>>();
    for _ in 0..3 {
        rig.kill_back();
        rig.run();
        assert!(revive(&mut rig));
        rig.run();
    }
    judge(&mut rig, 0, &events);
}

#[test]
fn frames_sent_while_the_backend_is_away_are_sent_afterwards_exactly_once() {
    let mut rig = two_guests();
    rig.kill_back();
    for seq in 0..2 {
        rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), seq, 500));
        rig.guests[1].send(frame(OUTSIDE_MAC, guest_mac(4), seq, 500));
    }
    rig.run();
    assert!(revive(&mut rig));
    rig.run();
    let sent = count(&rig.sent());
    assert_eq!(sent.len(), 4);
    assert!(sent.values().all(|&times| times == 1));
    prove_alive(&mut rig);
}

/// R9: what was published right before the death is told of by the successor, also to a frontend
/// that sleeps and has nothing to do itself.
#[test]
fn no_notification_dies_with_the_one_who_owed_it() {
    let few = Config { tx_buffers: 2, grants: GrantPolicy::PerRequest, ..Config::default() };
    for incoming in [true, false] {
        let mut step = 0;
        loop {
            let mut rig = Rig::new(1);
            rig.add_guest(3, few);
            if incoming {
                rig.arrive(frame(guest_mac(3), OUTSIDE_MAC, 0, 60));
            } else {
                // More than it has buffers for: it sleeps until an answer comes.
                for seq in 0..5 {
                    rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), seq, 60));
                }
            }
            rig.fuse.light(step);
            rig.run();
            let died = revive(&mut rig);
            rig.fuse.put_out();
            rig.run();
            see_that_nobody_sleeps_over_work(&mut rig.guests[0]);
            if !died {
                break;
            }
            step += 1;
        }
        assert!(step > 5, "only {step} steps");
    }
}

/// The workload is so small that it can be killed at each of its steps.
#[test]
fn death_at_every_step_of_a_small_workload() {
    let mut step = 0;
    loop {
        let mut rig = two_guests();
        let events = rig.guests.iter().map(|guest| guest.store_events).collect::<Vec<_>>();
        load(&mut rig, 0, 2);
        rig.fuse.light(step);
        rig.run();
        let died = revive(&mut rig);
        rig.fuse.put_out();
        rig.run();
        judge(&mut rig, 2, &events);
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
        let events = rig.guests.iter().map(|guest| guest.store_events).collect::<Vec<_>>();
        load(&mut rig, 0, 3);
        rig.fuse.light(9);
        rig.run();
        assert!(rig.back.is_none());
        rig.tear_rings();
        rig.fuse.light(step);
        rig.start_back();
        rig.run();
        let died = revive(&mut rig);
        rig.fuse.put_out();
        rig.run();
        judge(&mut rig, 3, &events);
        if !died {
            break;
        }
        step += 1;
    }
    assert!(step > 30, "only {step} steps");
}

/// Death during the handshake: the frontend gets its connection from the successor.
#[test]
fn death_at_every_step_of_the_handshake() {
    let mut step = 0;
    loop {
        let mut rig = Rig::new(2);
        for number in [3, 4] {
            rig.add_device(domain_api::DomainId(number), guest_mac(number));
            let config = strict(4096);
            let guest = rig.boot(domain_api::DomainId(number), guest_mac(number), config);
            rig.guests.push(guest);
        }
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
    assert!(step > 6, "only {step} steps");
}

#[test]
fn deaths_at_random_steps_of_large_workloads() {
    let mut kills = 0;
    for seed in 1..=16_u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut rig = two_guests();
        let events = rig.guests.iter().map(|guest| guest.store_events).collect::<Vec<_>>();
        for round in 0..12 {
            load(&mut rig, round * 12, 12);
            rig.fuse.light(random.below(250));
            rig.outside.borrow_mut().stuck = random.below(4) == 0;
            rig.guests[0].deaf = random.below(4) == 0;
            // Sometimes not even to the end of the work.
            for _ in 0..2 + random.below(20) {
                rig.step();
            }
            revive(&mut rig);
        }
        rig.fuse.put_out();
        rig.outside.borrow_mut().stuck = false;
        rig.guests[0].deaf = false;
        rig.guests[0].wake();
        rig.run();
        kills += rig.kills;
        judge(&mut rig, 144, &events);
    }
    assert!(kills > 80, "only {kills} kills");
}
