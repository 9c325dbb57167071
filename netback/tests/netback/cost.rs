//! What packets cost, for a profiler that counts instructions:
//!
//! ```text
//! cargo test --release -p netback --test netback --no-run
//! valgrind --tool=callgrind --collect-atstart=no --toggle-collect='*Plane*poll*' \
//!     target/release/deps/netback-… --ignored --exact cost::COUNTED
//! ```
//!
//! The world's own part, [`Env`](crate::rig::Env)'s, is to be taken off.

use crate::offloads::linux;
use crate::rig::{OFFLOADS, OUTSIDE_MAC, Rig, frame, guest_mac};
use crate::wire::Shape;
use domain_api::nic::{Checksum, Offloads};
use frontends::netfront::{Config, GrantPolicy};
use netback::preserved::pages_for;

fn rig(card: Offloads) -> Rig {
    let mut rig = Rig::with(pages_for(2).1, card);
    let config = Config { grants: GrantPolicy::Keep, rx_buffers: 200, ..linux() };
    rig.add_guest(3, config);
    rig.add_guest(4, config);
    rig
}

#[test]
#[ignore = "for a profiler"]
fn a_thousand_frames_out() {
    let mut rig = rig(OFFLOADS);
    for seq in 0..1000 {
        rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), seq, 1514));
    }
    rig.run();
    assert_eq!(rig.sent().len(), 1000);
}

#[test]
#[ignore = "for a profiler"]
fn a_thousand_frames_with_blank_checksums_out() {
    let mut rig = rig(OFFLOADS);
    for _ in 0..1000 {
        let shape = Shape::tcp(false, 0, 1448);
        rig.guests[0].send_blank(shape.blank(OUTSIDE_MAC, guest_mac(3)));
    }
    rig.run();
    assert_eq!(rig.sent().len(), 1000);
}

#[test]
#[ignore = "for a profiler"]
fn a_thousand_frames_in() {
    let mut rig = rig(OFFLOADS);
    for seq in 0..1000 {
        rig.arrive_with(frame(guest_mac(3), OUTSIDE_MAC, seq, 1514), Checksum::Good);
        if seq % 20 == 0 {
            rig.run();
        }
    }
    rig.run();
    assert_eq!(rig.guests[0].inbox.len(), 1000);
}

fn long(card: Offloads, to: [u8; 6]) -> Rig {
    let mut rig = rig(card);
    for _ in 0..100 {
        rig.guests[0].send_long(to, Shape::tcp(false, 0, 64_000), 1448);
        rig.run();
    }
    rig
}

#[test]
#[ignore = "for a profiler"]
fn a_hundred_long_packets_out() {
    assert_eq!(long(OFFLOADS, OUTSIDE_MAC).sent().len(), 4500);
}

#[test]
#[ignore = "for a profiler"]
fn a_hundred_long_packets_cut_here() {
    assert_eq!(long(Offloads::default(), OUTSIDE_MAC).sent().len(), 4500);
}

#[test]
#[ignore = "for a profiler"]
fn a_hundred_long_packets_to_a_neighbour() {
    assert_eq!(long(OFFLOADS, guest_mac(4)).guests[1].inbox.len(), 100);
}
