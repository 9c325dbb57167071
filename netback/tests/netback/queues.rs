//! Several queues of one vif.

use crate::offloads::linux;
use crate::rig::{OFFLOADS, OUTSIDE_MAC, Rig, check, frame, guest_mac};
use crate::wire::Shape;
use domain_api::nic::Offloads;
use frontends::netfront::{Checksum, Config};
use netback::preserved::{MAX_QUEUES, pages_for};
use std::collections::BTreeMap;
use xenbus::{Nodes, XenbusState};

pub fn with_queues(queues: u16) -> Config {
    Config { queues, tx_buffers: 64, ..linux() }
}

#[test]
fn a_guest_gets_as_many_queues_as_there_are_pages_for() {
    for (pages, vifs, expected) in
        [(pages_for(2).1, 2_u16, 4), (pages_for(2).0, 2, 1), (pages_for(3).0, 2, 1), (12, 2, 2)]
    {
        let mut rig = Rig::with(pages, Offloads::default());
        for number in 3..3 + vifs {
            rig.add_device(domain_api::DomainId(number), guest_mac(number));
        }
        rig.run();
        for number in 3..3 + vifs {
            let guest = rig.boot(domain_api::DomainId(number), guest_mac(number), with_queues(8));
            rig.guests.push(guest);
        }
        rig.run();
        for number in 3..3 + vifs {
            assert_eq!(rig.vif(number).queues, expected);
        }
        rig.close_all();
    }
}

#[test]
fn frames_pass_by_all_queues() {
    for split_events in [true, false] {
        let mut rig = Rig::with(pages_for(1).1, OFFLOADS);
        rig.add_guest(3, Config { split_events, ..with_queues(4) });
        assert_eq!(rig.vif(3).queues, 4);
        for seq in 0..400 {
            let bytes = frame(OUTSIDE_MAC, guest_mac(3), seq, 60 + seq as usize);
            rig.guests[0].push(bytes, Checksum::Complete, None, seq as usize);
        }
        rig.run();
        let mut seqs: Vec<u32> = rig.sent().iter().map(|it| check(it)).collect();
        seqs.sort_unstable();
        assert_eq!(seqs, (0..400).collect::<Vec<_>>());
        rig.close_all();
    }
}

#[test]
fn a_flow_stays_in_its_queue_and_flows_use_all_queues() {
    let mut rig = Rig::with(pages_for(1).1, OFFLOADS);
    rig.add_guest(3, with_queues(4));
    for round in 0..5 {
        for flow in 0..64 {
            let shape = Shape { stream: flow, ..Shape::tcp(flow % 2 == 0, round, 40) };
            rig.arrive(shape.whole(guest_mac(3), OUTSIDE_MAC));
        }
        rig.run();
    }
    let mut queues: BTreeMap<usize, usize> = BTreeMap::new();
    let mut of_flow: BTreeMap<u8, usize> = BTreeMap::new();
    let guest = &rig.guests[0];
    for (packet, known) in guest.inbox.iter().zip(&guest.known) {
        let flow = crate::wire::look(packet).unwrap().shape.stream;
        assert_eq!(*of_flow.entry(flow).or_insert(known.queue), known.queue);
        *queues.entry(known.queue).or_default() += 1;
    }
    assert_eq!((of_flow.len(), queues.len()), (64, 4));
    assert!(queues.values().all(|&count| count >= 20), "{queues:?}");
    rig.close_all();
}

/// Each vif has one batch in a round, however many queues.
#[test]
fn several_queues_are_no_advantage_over_one() {
    let mut rig = Rig::with(pages_for(2).1, Offloads::default());
    rig.add_guest(3, with_queues(4));
    rig.add_guest(4, with_queues(1));
    rig.outside.borrow_mut().stuck = true;
    for seq in 0..400 {
        for guest in 0..2 {
            let bytes = frame(OUTSIDE_MAC, rig.guests[guest].mac, seq, 100);
            rig.guests[guest].push(bytes, Checksum::Complete, None, seq as usize);
        }
    }
    rig.run();
    rig.outside.borrow_mut().stuck = false;
    rig.run();
    let sent = rig.sent();
    let half = sent[..400].iter().filter(|frame| frame[11] == 3).count();
    assert!((120..280).contains(&half), "{half} of 400");
    rig.close_all();
}

#[test]
fn more_queues_than_there_can_be_end_the_connection() {
    for count in [0, MAX_QUEUES + 1] {
        let mut rig = Rig::with(pages_for(1).1, Offloads::default());
        rig.add_device(domain_api::DomainId(3), guest_mac(3));
        let mut client = rig.store.client(domain_api::DomainId(3));
        rig.run();
        for (key, value) in
            [("request-rx-copy", 1), ("multi-queue-num-queues", count), ("state", 4)]
        {
            client.write(&format!("device/vif/0/{key}"), value.to_string().as_bytes()).unwrap();
        }
        rig.run();
        assert_eq!(rig.states(3).0, XenbusState::CLOSING);
        assert!(rig.error_of(3).unwrap().contains("queues"));
    }
}
