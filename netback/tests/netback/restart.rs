//! The driver domain dies and goes on (architecture §6, xen-abi §10).

use crate::rig::{OFFLOADS, OUTSIDE_MAC, Random, Rig, check, frame, guest_mac};
use crate::wire::{Coverage, Shape, look};
use domain_api::nic::Offloads;
use frontends::netfront::{Checksum, Config, Cutting, GrantPolicy};
use netback::preserved::pages_for;
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

/// As Linux's: with several queues, and it takes everything.
fn capable(fragment: u16) -> Config {
    Config { queues: 2, takes_blank: true, takes_long: true, ..strict(fragment) }
}

/// Two guests, all eyes open: `store_events` counts what their frontends see of xenbus.
fn two_guests() -> Rig {
    guests_of([strict(85), strict(4096)], Offloads::default())
}

fn guests_of(configs: [Config; 2], card: Offloads) -> Rig {
    let mut rig = Rig::with(pages_for(2).1, card);
    rig.add_guest(3, configs[0]);
    rig.add_guest(4, configs[1]);
    rig
}

/// Guests and cards that do much or little for each other.
fn variants() -> [([Config; 2], Offloads); 3] {
    [
        ([strict(400), strict(4096)], Offloads::default()),
        ([capable(1000), capable(4096)], OFFLOADS),
        ([capable(4096), strict(4096)], Offloads::default()),
    ]
}

/// Frames in all directions: outside, in, and between neighbours.
fn load(rig: &mut Rig, first: u32, count: u32) {
    for seq in first..first + count {
        let len = 18 + (seq as usize * 131) % 1497;
        let queue = seq as usize;
        for (guest, to) in [(0, OUTSIDE_MAC), (0, guest_mac(4)), (1, guest_mac(3))] {
            let bytes = frame(to, rig.guests[guest].mac, seq, len);
            rig.guests[guest].push(bytes, Checksum::Complete, None, queue);
        }
        rig.arrive(frame(guest_mac(3), OUTSIDE_MAC, seq, len));
        rig.arrive(frame(guest_mac(4), OUTSIDE_MAC, seq, len));
    }
}

/// Bytes of a stream for each long packet.
const STRIDE: u32 = 0x1_0000;

fn long_shape(number: u32, ipv6: bool) -> Shape {
    Shape::tcp(ipv6, number * STRIDE, 3000 + number as usize % 7 * 900)
}

/// Long packets outside and between neighbours, in all queues.
fn load_long(rig: &mut Rig, first: u32, count: u32) {
    for number in first..first + count {
        for (guest, to) in [(0, OUTSIDE_MAC), (0, guest_mac(4)), (1, guest_mac(3))] {
            let shape = long_shape(number, guest == 0);
            let bytes = shape.blank(to, rig.guests[guest].mac);
            let cutting = Some(Cutting { ipv6: shape.ipv6, mss: 1400 });
            rig.guests[guest].push(bytes, Checksum::Blank, cutting, 1 + number as usize);
        }
    }
}

fn is_long(bytes: &[u8]) -> bool {
    look(bytes).is_some()
}

/// How often each frame came: by source, then number. Every one is checked byte by byte.
fn count(frames: &[Vec<u8>]) -> BTreeMap<([u8; 6], u32), u32> {
    let mut counts = BTreeMap::new();
    for frame in frames.iter().filter(|it| !is_long(it)) {
        *counts.entry((frame[6..12].try_into().unwrap(), check(frame))).or_default() += 1;
    }
    counts
}

/// What came of long packets, byte by byte, and at most so often.
fn cover(packets: &[Vec<u8>], times: u32) -> Coverage {
    let mut coverage = Coverage::default();
    packets.iter().filter_map(|it| look(it)).for_each(|found| coverage.add(found.shape));
    assert!(coverage.most() <= times);
    coverage
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
    let out = count(&rig.outside.borrow().sent);
    let from_guest = |seq| out.get(&(guest_mac(3), seq)).copied().unwrap_or(0);
    let kills = u32::try_from(rig.kills).unwrap();
    for seq in 0..sent_by_guests {
        assert!(from_guest(seq) <= 1 + kills);
    }
    // What the card had queued dies with the driver; what had not got so far is replayed.
    let lost = (0..sent_by_guests).filter(|&seq| from_guest(seq) == 0).count();
    assert!(lost <= rig.kills * 48, "{lost} frames lost in {kills} deaths");
    for frame in rig.outside.borrow().sent.iter().filter_map(|it| look(it)) {
        assert!(frame.summed, "a frame left with a wrong checksum");
    }
    for (index, &seen) in store_events.iter().enumerate() {
        let inbox = count(&rig.guests[index].inbox);
        cover(&rig.guests[index].inbox, 1 + kills);
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
    load(rig, 1_000_000, 4);
    rig.run();
    let fresh: Vec<u32> = (1_000_000..1_000_004).collect();
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
    rig.guests.iter_mut().for_each(|guest| guest.inbox.clear());
    for number in 9000..9003 {
        load_long(rig, number, 1);
        rig.run();
    }
    let out = cover(&rig.sent(), 1);
    let arrived = [0, 1].map(|guest| cover(&rig.guests[guest].inbox, 1));
    for number in 9000..9003 {
        let shape = long_shape(number, true);
        for coverage in [&out, &arrived[0], &arrived[1]] {
            assert!(coverage.covers(shape.at, shape.payload));
        }
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
    for (configs, card) in variants() {
        let mut step = 0;
        loop {
            let mut rig = guests_of(configs, card);
            let events = rig.guests.iter().map(|guest| guest.store_events).collect::<Vec<_>>();
            load(&mut rig, 0, 1);
            load_long(&mut rig, 1, 1);
            rig.fuse.light(step);
            rig.run();
            let died = revive(&mut rig);
            rig.fuse.put_out();
            rig.run();
            // A neighbour's packet is not answered before it was delivered.
            for guest in &rig.guests {
                let shape = long_shape(1, true);
                assert!(cover(&guest.inbox, 2).covers(shape.at, shape.payload));
            }
            judge(&mut rig, 1, &events);
            if !died {
                break;
            }
            step += 1;
        }
        assert!(step > 40, "only {step} steps");
    }
}

/// Death while the next incarnation takes over, and again.
#[test]
fn death_at_every_step_of_the_takeover() {
    for (configs, card) in variants().into_iter().skip(1) {
        death_in_takeover(configs, card);
    }
}

fn death_in_takeover(configs: [Config; 2], card: Offloads) {
    let mut step = 0;
    loop {
        let mut rig = guests_of(configs, card);
        let events = rig.guests.iter().map(|guest| guest.store_events).collect::<Vec<_>>();
        load(&mut rig, 0, 1);
        load_long(&mut rig, 0, 1);
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
        judge(&mut rig, 1, &events);
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
        let mut rig = Rig::with(pages_for(2).1, OFFLOADS);
        for number in [3, 4] {
            rig.add_device(domain_api::DomainId(number), guest_mac(number));
            let config = capable(4096);
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
    for seed in 1..=12_u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (configs, card) = variants()[usize::try_from(seed).unwrap() % 3];
        let mut rig = guests_of(configs, card);
        let events = rig.guests.iter().map(|guest| guest.store_events).collect::<Vec<_>>();
        for round in 0..12 {
            load(&mut rig, round * 8, 8);
            load_long(&mut rig, round * 4, 4);
            rig.fuse.light(random.below(350));
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
        judge(&mut rig, 96, &events);
    }
    assert!(kills > 60, "only {kills} kills");
}

/// The card of the next life need not be able to do what the last one's was.
#[test]
fn a_successor_above_another_card_sends_what_is_left() {
    for (first, second) in [(OFFLOADS, Offloads::default()), (Offloads::default(), OFFLOADS)] {
        let mut rig = guests_of([capable(4096), capable(4096)], first);
        let events = rig.guests.iter().map(|guest| guest.store_events).collect::<Vec<_>>();
        rig.outside.borrow_mut().stuck = true;
        load_long(&mut rig, 0, 8);
        rig.run();
        rig.kill_back();
        {
            let mut outside = rig.outside.borrow_mut();
            (outside.stuck, outside.offloads) = (false, second);
        }
        assert!(revive(&mut rig));
        rig.run();
        judge(&mut rig, 0, &events);
    }
}

/// A frontend that was connected to a backend that offered less has what it had.
#[test]
fn a_connection_from_before_an_update_goes_on_as_it_is() {
    use xenbus::Nodes;
    let mut rig = two_guests();
    let events = rig.guests.iter().map(|guest| guest.store_events).collect::<Vec<_>>();
    rig.kill_back();
    for number in [3, 4] {
        for key in [
            "feature-sg",
            "feature-gso-tcpv4",
            "feature-gso-tcpv6",
            "feature-ipv6-csum-offload",
            "multi-queue-max-queues",
        ] {
            rig.toolstack.rm(&format!("/local/domain/2/backend/vif/{number}/0/{key}")).unwrap();
        }
        rig.toolstack
            .rm(&format!("/local/domain/{number}/device/vif/0/multi-queue-num-queues"))
            .unwrap();
    }
    assert!(revive(&mut rig));
    load(&mut rig, 0, 4);
    rig.run();
    judge(&mut rig, 4, &events);
}
