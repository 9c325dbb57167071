//! What works while nobody dies or lies.

use crate::rig::{BROADCAST, OUTSIDE_MAC, Rig, check, frame, guest_mac, seq_of};
use domain_api::DomainId;
use frontends::netfront::{Config, GrantPolicy};
use xenbus::{Nodes, XenbusState};

const CONNECTED: (XenbusState, XenbusState) = (XenbusState::CONNECTED, XenbusState::CONNECTED);

fn strict() -> Config {
    Config { grants: GrantPolicy::PerRequest, ..Config::default() }
}

/// All configurations that make a difference to the backend.
fn configs() -> Vec<Config> {
    let mut configs = vec![Config::default(), strict()];
    for fragment in [85, 600] {
        configs.push(Config { fragment, ..strict() });
    }
    configs.push(Config { split_events: false, tx_buffers: 4, rx_buffers: 3, ..strict() });
    configs
}

fn seqs(frames: &[Vec<u8>]) -> Vec<u32> {
    frames.iter().map(|frame| check(frame)).collect()
}

#[test]
fn frames_of_all_sizes_pass_both_ways_in_order() {
    for config in configs() {
        let mut rig = Rig::new(2);
        rig.add_guest(3, config);
        assert_eq!(rig.states(3), CONNECTED);
        let sizes: Vec<usize> = (18..1519).step_by(7).chain([1514, 1518]).collect();
        for (seq, &size) in (0..).zip(&sizes) {
            rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), seq, size));
            rig.arrive(frame(guest_mac(3), OUTSIDE_MAC, seq, size));
            if seq % 30 == 0 {
                rig.run();
            }
        }
        rig.run();
        let expected: Vec<u32> = (0..).take(sizes.len()).collect();
        assert_eq!(seqs(&rig.sent()), expected);
        assert_eq!(seqs(&rig.guests[0].inbox), expected);
        let stats = rig.vif(3).stats;
        let bytes: usize = sizes.iter().sum();
        assert_eq!((stats.tx_packets, stats.tx_bytes), (sizes.len() as u64, bytes as u64));
        assert_eq!((stats.rx_packets, stats.rx_bytes), (sizes.len() as u64, bytes as u64));
        rig.close_all();
    }
}

#[test]
fn the_smallest_frame_passes_and_wakes_the_other_side() {
    let mut rig = Rig::new(1);
    rig.add_guest(3, strict());
    for _ in 0..600 {
        let smallest = frame(OUTSIDE_MAC, guest_mac(3), 0, 14);
        rig.guests[0].send(smallest.clone());
        rig.run();
        assert_eq!(rig.sent(), [smallest]);
        let smallest = frame(guest_mac(3), OUTSIDE_MAC, 0, 14);
        rig.arrive(smallest.clone());
        rig.run();
        assert_eq!(std::mem::take(&mut rig.guests[0].inbox), [smallest]);
    }
}

#[test]
fn neighbours_talk_through_the_switch_and_nobody_else_hears() {
    let mut rig = Rig::new(3);
    for number in [3, 4, 5] {
        rig.add_guest(number, Config { fragment: 200, ..strict() });
    }
    for seq in 0..200 {
        let len = 18 + (seq as usize * 37) % 1497;
        rig.guests[0].send(frame(guest_mac(4), guest_mac(3), seq, len));
        rig.guests[1].send(frame(guest_mac(3), guest_mac(4), seq, len));
    }
    rig.run();
    let all: Vec<u32> = (0..200).collect();
    assert_eq!(seqs(&rig.guests[0].inbox), all);
    assert_eq!(seqs(&rig.guests[1].inbox), all);
    assert!(rig.guests[2].inbox.is_empty() && rig.sent().is_empty());
    rig.guests[2].send(frame(BROADCAST, guest_mac(5), 1, 60));
    rig.arrive(frame(BROADCAST, OUTSIDE_MAC, 2, 60));
    rig.arrive(frame([2, 9, 9, 9, 9, 9], OUTSIDE_MAC, 3, 60));
    rig.run();
    assert_eq!(seqs(&rig.sent()), [1], "a broadcast goes out too");
    let mut heard = seqs(&rig.guests[0].inbox[200..]);
    heard.sort_unstable();
    assert_eq!(heard, [1, 2], "unknown unicast is for nobody here");
    assert_eq!(seqs(&rig.guests[2].inbox), [2], "a broadcast does not come back");
    rig.close_all();
}

#[test]
fn a_guest_sends_under_its_own_address_only() {
    let mut rig = Rig::new(2);
    rig.add_guest(3, strict());
    rig.add_guest(4, strict());
    rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(4), 1, 60));
    rig.guests[0].send(frame(guest_mac(4), OUTSIDE_MAC, 2, 60));
    rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), 3, 60));
    rig.arrive(frame(guest_mac(4), guest_mac(3), 4, 60));
    rig.run();
    assert_eq!(seqs(&rig.sent()), [3]);
    assert!(rig.guests[1].inbox.is_empty(), "nobody outside has a guest's address either");
    assert_eq!(rig.vif(3).stats.tx_spoofed, 2);
    assert_eq!(rig.guests[0].front.stats().tx_errors, 2);
    rig.close_all();
}

/// A UDP frame with the checksum field as a frontend leaves it, and with the finished one.
fn udp(blank: bool) -> Vec<u8> {
    let mut bytes: Vec<u8> = OUTSIDE_MAC.into_iter().chain(guest_mac(3)).collect();
    bytes.extend([8, 0, 0x45, 0, 0, 31, 0, 0, 0x40, 0, 64, 17, 0, 0]);
    bytes.extend([10, 0, 0, 1, 10, 0, 0, 2, 0x12, 0x34, 0x56, 0x78, 0, 11]);
    // 10.0.0.1, 10.0.0.2, protocol 17, length 11: 0x0a00+1+0x0a00+2+17+11 = 0x141f.
    // With ports 0x1234+0x5678, length 11 and payload 0x6178+0x7900: 0x1_574e, folded 0x574f.
    bytes.extend(if blank { [0x14, 0x1f] } else { [0xa8, 0xb0] });
    bytes.extend(*b"axy");
    bytes
}

#[test]
fn checksums_left_blank_are_finished() {
    let mut rig = Rig::new(1);
    rig.add_guest(3, Config { fragment: 85, ..strict() });
    rig.guests[0].send_blank(udp(true));
    rig.guests[0].send(udp(true));
    rig.guests[0].send_blank(frame(OUTSIDE_MAC, guest_mac(3), 0, 60));
    rig.run();
    assert_eq!(rig.sent(), [udp(false), udp(true)]);
    assert_eq!(rig.vif(3).stats.tx_errors, 1, "nothing to finish in a frame that is not IP");
}

#[test]
fn requests_wait_in_the_ring_while_the_card_has_no_buffers() {
    let mut rig = Rig::new(2);
    rig.add_guest(3, strict());
    rig.add_guest(4, strict());
    rig.outside.borrow_mut().stuck = true;
    for seq in 0..500 {
        for guest in 0..2 {
            let source = rig.guests[guest].mac;
            rig.guests[guest].send(frame(OUTSIDE_MAC, source, seq, 100));
        }
    }
    rig.run();
    assert!(rig.sent().is_empty() && !rig.guests[0].outbox.is_empty());
    rig.outside.borrow_mut().stuck = false;
    rig.run();
    let sent = rig.sent();
    for guest in 0..2_u16 {
        let of = |frame: &&Vec<u8>| frame[6..12] == guest_mac(3 + guest);
        let seqs: Vec<u32> = sent.iter().filter(of).map(|frame| check(frame)).collect();
        assert_eq!(seqs, (0..500).collect::<Vec<_>>());
    }
    // Fair: neither waits for the other to be done.
    let half = sent[..500].iter().filter(|frame| frame[11] == 3).count();
    assert!((150..350).contains(&half), "{half} of 500");
    rig.close_all();
}

#[test]
fn a_guest_that_posts_nothing_loses_its_own_frames_and_wakes_up_again() {
    let mut rig = Rig::new(2);
    rig.add_guest(3, Config { rx_buffers: 20, ..strict() });
    rig.add_guest(4, strict());
    rig.guests[0].deaf = true;
    for seq in 0..300 {
        rig.arrive(frame(guest_mac(3), OUTSIDE_MAC, seq, 1000));
        rig.arrive(frame(guest_mac(4), OUTSIDE_MAC, seq, 1000));
    }
    rig.run();
    assert_eq!(seqs(&rig.guests[1].inbox), (0..300).collect::<Vec<_>>());
    rig.guests[0].deaf = false;
    rig.guests[0].wake();
    rig.run();
    assert_eq!(seqs(&rig.guests[0].inbox), (0..84).collect::<Vec<_>>(), "20 posted, 64 kept");
    assert_eq!(rig.vif(3).stats.rx_dropped, 216);
    rig.arrive(frame(guest_mac(3), OUTSIDE_MAC, 999, 1000));
    rig.run();
    assert_eq!(rig.guests[0].inbox.last().map(|frame| seq_of(frame)), Some(999));
    rig.close_all();
}

#[test]
fn neighbours_go_on_while_the_link_is_down() {
    let mut rig = Rig::new(2);
    rig.add_guest(3, strict());
    rig.add_guest(4, strict());
    rig.outside.borrow_mut().link_down = true;
    for seq in 0..100 {
        rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), seq, 100));
        rig.guests[0].send(frame(guest_mac(4), guest_mac(3), seq, 100));
    }
    rig.run();
    assert_eq!(seqs(&rig.guests[1].inbox), (0..100).collect::<Vec<_>>());
    assert!(rig.sent().is_empty());
    assert_eq!(rig.vif(3).stats.tx_dropped, 100);
    rig.outside.borrow_mut().link_down = false;
    rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), 7, 100));
    rig.run();
    assert_eq!(seqs(&rig.sent()), [7]);
    rig.close_all();
}

/// A flood costs few notifications: the event indices do their work.
#[test]
fn notifications_are_suppressed_under_load() {
    let mut rig = Rig::new(1);
    rig.add_guest(3, Config::default());
    let before = rig.world.notifications();
    for seq in 0..2000 {
        rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), seq, 100));
    }
    rig.run();
    assert_eq!(rig.sent().len(), 2000);
    let count = rig.world.notifications() - before;
    assert!(count < 400, "{count} notifications for 2000 frames");
}

#[test]
fn a_frontend_may_close_and_come_back() {
    let mut rig = Rig::new(1);
    rig.add_guest(3, strict());
    for round in 0..3 {
        let guest = &mut rig.guests[0];
        guest.front.close(&mut guest.env, &mut guest.client).unwrap();
        rig.run();
        assert_eq!(rig.states(3), (XenbusState::CLOSED, XenbusState::CLOSED));
        assert!(!rig.vif(3).connected);
        let guest = &mut rig.guests[0];
        assert_eq!(guest.env.grants(), 0);
        guest.front.reopen(&mut guest.env, &mut guest.client).unwrap();
        rig.run();
        assert_eq!(rig.states(3), CONNECTED);
        rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), round, 100));
        rig.arrive(frame(guest_mac(3), OUTSIDE_MAC, round, 100));
        rig.run();
        assert_eq!(seqs(&rig.sent()), [round]);
        assert_eq!(rig.guests[0].inbox.len(), round as usize + 1);
    }
}

/// A guest's domain restarts; its toolstack puts the frontend's state back to 1.
#[test]
fn a_guest_that_reboots_is_served_anew() {
    for backend_dies_too in [false, true] {
        let mut rig = Rig::new(1);
        rig.add_guest(3, strict());
        // Unanswered requests of the old life, which must not be replayed in the new one.
        rig.outside.borrow_mut().stuck = true;
        for seq in 0..60 {
            rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), seq, 100));
        }
        rig.run();
        rig.guests.clear();
        rig.world.kill(DomainId(3));
        if backend_dies_too {
            rig.kill_back();
        }
        rig.outside.borrow_mut().sent.clear();
        rig.outside.borrow_mut().stuck = false;
        rig.store.restart(DomainId(3));
        rig.toolstack.write("/local/domain/3/device/vif/0/state", b"1").unwrap();
        if backend_dies_too {
            rig.start_back();
        }
        let mut guest = rig.boot(DomainId(3), guest_mac(3), strict());
        // Its first requests are in the new ring before the backend attaches to it, and its
        // grants and ports have the numbers of the old ones.
        for seq in 1000..1010 {
            guest.send(frame(OUTSIDE_MAC, guest_mac(3), seq, 222));
        }
        rig.guests.push(guest);
        rig.sent();
        rig.run();
        assert_eq!(rig.states(3), CONNECTED);
        // What the card had accepted in the old life leaves it if the driver lives on.
        let accepted = if backend_dies_too { 0..0 } else { 0..24 };
        let sent = rig.sent();
        assert_eq!(seqs(&sent), accepted.chain(1000..1010).collect::<Vec<_>>());
        // A request of the old life would have sent the new page at its old length.
        assert!(sent.iter().all(|it| it.len() == if check(it) < 1000 { 100 } else { 222 }));
        rig.close_all();
    }
}

#[test]
fn vifs_come_and_go_with_their_directories() {
    let mut rig = Rig::new(1);
    rig.add_guest(3, strict());
    rig.add_device(DomainId(4), guest_mac(4));
    let guest = rig.boot(DomainId(4), guest_mac(4), strict());
    rig.guests.push(guest);
    rig.run();
    assert_eq!(rig.states(4), (XenbusState::CLOSED, XenbusState::CLOSED));
    assert!(rig.error_of(4).unwrap().contains("preserved pages"), "there is room for one only");
    rig.guests.remove(0);
    rig.world.destroy(DomainId(3));
    rig.toolstack.rm("/local/domain/3/device/vif").unwrap();
    rig.toolstack.rm("/local/domain/2/backend/vif/3").unwrap();
    rig.run();
    assert_eq!(rig.back().netback.vifs().count(), 1);
    let guest = &mut rig.guests[0];
    guest.front.reopen(&mut guest.env, &mut guest.client).unwrap();
    rig.run();
    assert_eq!(rig.states(4), CONNECTED);
    assert_eq!(rig.error_of(4), None);
    rig.close_all();
}

#[test]
fn a_device_that_is_taken_offline_is_closed_and_removed() {
    let mut rig = Rig::new(1);
    rig.add_guest(3, strict());
    rig.toolstack.write("/local/domain/2/backend/vif/3/0/online", b"0").unwrap();
    rig.toolstack.write("/local/domain/2/backend/vif/3/0/state", b"5").unwrap();
    rig.run();
    assert_eq!(rig.guests[0].env.grants(), 0);
    assert_eq!(rig.states(3), (XenbusState::UNKNOWN, XenbusState::CLOSED));
    assert_eq!(rig.back().netback.vifs().count(), 0);
}
