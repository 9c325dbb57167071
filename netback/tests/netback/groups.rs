//! Multicast filters.

use crate::offloads::linux;
use crate::rig::{BROADCAST, OUTSIDE_MAC, Rig, check, frame, guest_mac};
use frontends::netfront::Config;
use xenbus::Nodes;

const fn group(n: u8) -> [u8; 6] {
    [0x33, 0x33, 0, 0, 0, n]
}

fn heard(rig: &mut Rig) -> Vec<u32> {
    for (seq, to) in (0..).zip([group(0), group(1), group(2), BROADCAST, guest_mac(3)]) {
        rig.arrive(frame(to, OUTSIDE_MAC, seq, 60));
    }
    rig.run();
    std::mem::take(&mut rig.guests[0].inbox).iter().map(|it| check(it)).collect()
}

fn change(rig: &mut Rig, group: [u8; 6], add: bool) {
    let guest = &mut rig.guests[0];
    guest.front.change_group(&mut guest.env, group, add).unwrap();
    guest.wake();
    rig.run();
    let guest = &mut rig.guests[0];
    guest.front.flush(&mut guest.env).unwrap();
}

fn filtering() -> (Rig, usize) {
    let mut rig = Rig::new(1);
    rig.add_guest(3, Config { filter: true, ..linux() });
    let free = rig.guests[0].front.in_flight().0 as usize;
    (rig, free)
}

#[test]
fn named_groups_are_heard_and_no_others() {
    let (mut rig, in_flight) = filtering();
    assert_eq!(heard(&mut rig), [3, 4]);
    change(&mut rig, group(1), true);
    assert_eq!(heard(&mut rig), [1, 3, 4]);
    change(&mut rig, group(2), true);
    change(&mut rig, group(1), false);
    assert_eq!(heard(&mut rig), [2, 3, 4]);
    assert_eq!(rig.guests[0].front.stats().tx_errors, 0);
    assert_eq!(rig.guests[0].front.in_flight().0 as usize, in_flight, "the messages are answered");
    assert!(rig.sent().is_empty(), "they are no packets");
    rig.close_all();
}

#[test]
fn who_does_not_ask_for_a_filter_hears_all() {
    let mut rig = Rig::new(1);
    rig.add_guest(3, linux());
    change(&mut rig, group(1), true);
    assert_eq!(heard(&mut rig), [0, 1, 2, 3, 4]);
}

#[test]
fn the_wish_for_a_filter_may_change() {
    let (mut rig, _) = filtering();
    change(&mut rig, group(1), true);
    for (value, expected) in [("0", vec![0, 1, 2, 3, 4]), ("1", vec![1, 3, 4])] {
        let path = "device/vif/0/request-multicast-control";
        rig.guests[0].client.write(path, value.as_bytes()).unwrap();
        rig.run();
        assert_eq!(heard(&mut rig), expected);
    }
}

#[test]
fn groups_are_bounded_and_have_to_be_groups() {
    let (mut rig, _) = filtering();
    for n in 0..70 {
        change(&mut rig, group(n), true);
    }
    assert_eq!(rig.guests[0].front.stats().tx_errors, 6);
    change(&mut rig, [2, 0, 0, 0, 0, 1], true);
    assert_eq!(rig.guests[0].front.stats().tx_errors, 7);
    rig.close_all();
}

/// What was named is lost with the one to whom it was named; then too much is heard, not too
/// little. A new connection starts anew.
#[test]
fn a_successor_delivers_all_groups() {
    let (mut rig, _) = filtering();
    change(&mut rig, group(1), true);
    rig.kill_back();
    rig.start_back();
    rig.run();
    assert_eq!(heard(&mut rig), [0, 1, 2, 3, 4]);
    let guest = &mut rig.guests[0];
    guest.front.close(&mut guest.env, &mut guest.client).unwrap();
    rig.run();
    let guest = &mut rig.guests[0];
    guest.front.reopen(&mut guest.env, &mut guest.client).unwrap();
    rig.run();
    assert_eq!(heard(&mut rig), [3, 4]);
}
