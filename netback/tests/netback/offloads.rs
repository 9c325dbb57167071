//! Long packets and blank checksums, with cards and guests that take them and such that do not.

use crate::rig::{BROADCAST, OFFLOADS, OUTSIDE_MAC, Rig, frame, guest_mac};
use crate::wire::{Coverage, Shape, look};
use domain_api::nic::{Checksum, Offloads};
use frontends::netfront::{self, Config, Cutting, GrantPolicy};
use netback::preserved::pages_for;

/// A guest as strict as Linux's, which takes everything.
pub fn linux() -> Config {
    Config {
        grants: GrantPolicy::PerRequest,
        tx_buffers: 128,
        rx_buffers: 64,
        takes_blank: true,
        takes_long: true,
        ..Config::default()
    }
}

/// One that takes finished frames only.
fn plain() -> Config {
    Config { takes_blank: false, takes_long: false, ..linux() }
}

fn rig(offloads: Offloads, configs: &[Config]) -> Rig {
    let mut rig = Rig::with(pages_for(configs.len()).1, offloads);
    for (number, &config) in (3..).zip(configs) {
        rig.add_guest(number, config);
    }
    rig
}

fn cards() -> [Offloads; 4] {
    let checksums = Offloads { segment_v4: false, segment_v6: false, ..OFFLOADS };
    let v4 = Offloads { checksum_v6: false, segment_v6: false, ..OFFLOADS };
    [Offloads::default(), checksums, v4, OFFLOADS]
}

/// All kinds of long packets, the longest among them.
fn long_shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    let mut at = 0xffff_0000; // The stream's positions wrap.
    for ipv6 in [false, true] {
        for payload in [1449, 2896, 9000, 40_001, 65_300, 65_535 - 14 - 40 - 32] {
            shapes.push(Shape::tcp(ipv6, at, payload));
            at = at.wrapping_add(0x2_0000);
        }
    }
    shapes.push(Shape { extended: true, ..Shape::tcp(true, at, 20_000) });
    shapes
}

/// The frames make the packets, in order, each with the right checksum.
fn see_cut(frames: &[Vec<u8>], shapes: &[Shape], mss: usize) {
    let mut frames = frames.iter();
    for shape in shapes {
        let mut done = 0;
        while done < shape.payload {
            let found = look(frames.next().expect("a frame is missing")).unwrap();
            let payload = mss.min(shape.payload - done);
            let at = shape.at.wrapping_add(u32::try_from(done).unwrap());
            assert_eq!(found.shape, Shape { at, payload, ..*shape });
            assert!(found.summed);
            done += payload;
        }
    }
    assert_eq!(frames.next(), None);
}

#[test]
fn long_packets_leave_as_frames_whatever_the_card_can() {
    for offloads in cards() {
        for fragment in [4096, 3641] {
            let mut rig = rig(offloads, &[Config { fragment, ..linux() }]);
            let shapes = long_shapes();
            for &shape in &shapes {
                rig.guests[0].send_long(OUTSIDE_MAC, shape, 1400);
            }
            rig.run();
            see_cut(&rig.sent(), &shapes, 1400);
            let stats = rig.vif(3).stats;
            assert_eq!((stats.tx_errors, stats.tx_long), (0, shapes.len() as u64));
            let by_card = match (offloads.segment_v4, offloads.segment_v6) {
                (true, true) => 12, // Not the one with the extension header.
                (true, false) => 6,
                _ => 0,
            };
            assert_eq!(rig.outside.borrow().offloaded, by_card);
            rig.close_all();
        }
    }
}

/// A card of 24 buffers gets a packet of 46 frames as it can, and nothing is lost or sent twice.
#[test]
fn a_packet_that_is_cut_waits_for_the_card() {
    let mut rig = rig(Offloads::default(), &[linux(), linux()]);
    rig.outside.borrow_mut().stuck = true;
    let shapes = [Shape::tcp(false, 0, 65_000), Shape::tcp(false, 65_000, 65_000)];
    for shape in shapes {
        rig.guests[0].send_long(OUTSIDE_MAC, shape, 1400);
    }
    rig.guests[1].send(frame(OUTSIDE_MAC, guest_mac(4), 7, 100));
    rig.run();
    assert!(rig.sent().is_empty());
    assert_eq!(rig.guests[0].front.stats().tx_errors, 0);
    rig.outside.borrow_mut().stuck = false;
    rig.run();
    let (own, others): (Vec<_>, Vec<_>) =
        rig.sent().into_iter().partition(|it| it[6..12] == guest_mac(3));
    see_cut(&own, &shapes, 1400);
    assert_eq!(others, [frame(OUTSIDE_MAC, guest_mac(4), 7, 100)]);
    rig.close_all();
}

/// The link goes down while a packet is being cut: nobody waits for the card any more.
#[test]
fn a_packet_that_is_cut_does_not_wait_for_the_link() {
    let mut rig = rig(Offloads::default(), &[linux(), linux(), linux()]);
    rig.outside.borrow_mut().stuck = true;
    rig.guests[0].send_long(OUTSIDE_MAC, Shape::tcp(false, 0, 65_000), 1400);
    rig.run();
    rig.outside.borrow_mut().link_down = true;
    rig.guests[0].send(frame(guest_mac(4), guest_mac(3), 1, 100));
    rig.guests[1].send(frame(guest_mac(5), guest_mac(4), 2, 100));
    rig.run();
    assert_eq!(rig.guests[1].inbox, [frame(guest_mac(4), guest_mac(3), 1, 100)]);
    assert_eq!(rig.guests[2].inbox, [frame(guest_mac(5), guest_mac(4), 2, 100)]);
    assert_eq!(rig.vif(3).stats.tx_dropped, 1);
    rig.outside.borrow_mut().stuck = false;
    rig.close_all();
}

/// The guest goes while its packet is being cut; its successor's ring is not answered for it.
#[test]
fn a_guest_that_goes_takes_its_unfinished_packets_along() {
    let mut rig = rig(Offloads::default(), &[linux(), linux()]);
    rig.outside.borrow_mut().stuck = true;
    rig.guests[0].send_long(OUTSIDE_MAC, Shape::tcp(false, 0, 65_000), 1400);
    rig.run();
    let guest = &mut rig.guests[0];
    guest.front.close(&mut guest.env, &mut guest.client).unwrap();
    guest.outbox.clear();
    rig.run();
    let guest = &mut rig.guests[0];
    guest.front.reopen(&mut guest.env, &mut guest.client).unwrap();
    rig.run();
    rig.outside.borrow_mut().stuck = false;
    rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(3), 1, 100));
    rig.run();
    assert_eq!(rig.sent().last(), Some(&frame(OUTSIDE_MAC, guest_mac(3), 1, 100)));
    rig.close_all();
}

#[test]
fn blank_checksums_are_finished_by_whoever_can() {
    for offloads in cards() {
        let mut rig = rig(offloads, &[linux()]);
        let mut shapes = Vec::new();
        for ipv6 in [false, true] {
            shapes.extend([0, 1, 700, 1400].map(|payload| Shape::tcp(ipv6, 9, payload)));
            shapes.extend([0, 1, 700, 1400].map(|payload| Shape::udp(ipv6, payload)));
        }
        shapes.push(Shape { extended: true, ..Shape::udp(true, 300) });
        for shape in &shapes {
            rig.guests[0].send_blank(shape.blank(OUTSIDE_MAC, guest_mac(3)));
        }
        rig.run();
        let expected: Vec<Vec<u8>> =
            shapes.iter().map(|shape| shape.whole(OUTSIDE_MAC, guest_mac(3))).collect();
        assert_eq!(rig.sent(), expected);
        let by_card = 8 * usize::from(offloads.checksum_v4) + 8 * usize::from(offloads.checksum_v6);
        assert_eq!(rig.outside.borrow().offloaded, by_card);
        rig.close_all();
    }
}

/// Padding behind the packet has no part in the checksum, and no card is trusted with that.
#[test]
fn padding_is_not_summed_up() {
    for offloads in cards() {
        let mut rig = rig(offloads, &[linux()]);
        let shape = Shape::udp(false, 1);
        let pad = |mut bytes: Vec<u8>| {
            bytes.resize(60, 0x77);
            bytes
        };
        rig.guests[0].send_blank(pad(shape.blank(OUTSIDE_MAC, guest_mac(3))));
        rig.run();
        assert_eq!(rig.sent(), [pad(shape.whole(OUTSIDE_MAC, guest_mac(3)))]);
    }
}

#[test]
fn neighbours_get_what_they_take() {
    for offloads in cards() {
        for link_down in [false, true] {
            let mut rig = rig(offloads, &[linux(), linux(), plain()]);
            rig.outside.borrow_mut().link_down = link_down;
            let shapes = long_shapes();
            for &shape in &shapes {
                rig.guests[0].send_long(guest_mac(4), shape, 1400);
                rig.guests[0].send_blank(Shape::udp(true, 99).blank(guest_mac(4), guest_mac(3)));
                rig.run();
            }
            // As it was sent, in one piece.
            for (index, &shape) in shapes.iter().enumerate() {
                let (packet, known) =
                    (&rig.guests[1].inbox[2 * index], rig.guests[1].known[2 * index]);
                assert_eq!(*packet, shape.blank(guest_mac(4), guest_mac(3)));
                assert!(known.blank && known.validated);
                assert_eq!(known.cutting, Some(Cutting { ipv6: shape.ipv6, mss: 1400 }));
                let (udp, known) =
                    (&rig.guests[1].inbox[2 * index + 1], rig.guests[1].known[2 * index + 1]);
                assert_eq!(*udp, Shape::udp(true, 99).blank(guest_mac(4), guest_mac(3)));
                assert!(known.blank && known.cutting.is_none());
            }
            assert_eq!(rig.guests[1].inbox.len(), 2 * shapes.len());
            for &shape in &shapes {
                rig.guests[0].send_long(guest_mac(5), shape, 1400);
                rig.run();
            }
            see_cut(&rig.guests[2].inbox, &shapes, 1400);
            assert!(rig.guests[2].known.iter().all(|known| known.validated && !known.blank));
            assert!(rig.sent().is_empty());
            let stats = rig.vif(4).stats;
            assert_eq!((stats.rx_long, stats.rx_dropped), (shapes.len() as u64, 0));
            rig.close_all();
        }
    }
}

/// Over which IP a guest takes what is told by different keys.
#[test]
fn what_a_guest_takes_over_ipv4_it_need_not_take_over_ipv6() {
    let mut rig = rig(OFFLOADS, &[linux()]);
    let mut odd = {
        rig.add_device(domain_api::DomainId(4), guest_mac(4));
        rig.boot(domain_api::DomainId(4), guest_mac(4), linux())
    };
    // Its keys are changed behind its back, between writing and the backend's reading.
    while !odd.front.is_connected() {
        rig.step();
        let _ = odd.front.refresh(&mut odd.env, &mut odd.client);
        if odd.front.is_connected() {
            use xenbus::Nodes;
            for key in ["feature-ipv6-csum-offload", "feature-gso-tcpv6"] {
                odd.client.write(&format!("device/vif/0/{key}"), b"0").unwrap();
            }
        }
    }
    rig.guests.push(odd);
    rig.run();
    for ipv6 in [false, true] {
        rig.guests[0].send_long(guest_mac(4), Shape::tcp(ipv6, 0, 5000), 1400);
        rig.guests[0].send_blank(Shape::udp(ipv6, 99).blank(guest_mac(4), guest_mac(3)));
        rig.run();
    }
    let kinds: Vec<(bool, bool)> =
        rig.guests[1].known.iter().map(|it| (it.blank, it.cutting.is_some())).collect();
    let v6 = [(false, false); 5];
    assert_eq!(kinds, [&[(true, true), (true, false)], v6.as_slice()].concat());
}

/// A packet for several is finished as soon as one of them needs it finished.
#[test]
fn a_broadcast_is_finished_for_all_if_for_one() {
    for (others, finished) in [([linux(), linux()], false), ([linux(), plain()], true)] {
        let mut rig = rig(OFFLOADS, &[linux(), others[0], others[1]]);
        rig.guests[0].send_blank(Shape::udp(false, 99).blank(BROADCAST, guest_mac(3)));
        rig.run();
        for guest in [1, 2] {
            let found = look(&rig.guests[guest].inbox[0]).unwrap();
            assert_eq!((found.summed, rig.guests[guest].known[0].blank), (finished, !finished));
        }
        assert!(look(&rig.sent()[0]).unwrap().summed);
    }
}

#[test]
fn what_the_card_found_out_is_passed_on() {
    let mut rig = rig(OFFLOADS, &[linux(), plain()]);
    for number in [3, 4] {
        let shape = Shape::tcp(false, 0, 500);
        let whole = shape.whole(guest_mac(number), OUTSIDE_MAC);
        rig.arrive_with(whole.clone(), Checksum::Good);
        rig.arrive_with(whole, Checksum::Unknown);
        rig.arrive_with(shape.blank(guest_mac(number), OUTSIDE_MAC), Checksum::Blank);
        // A card that is wrong about what it has.
        rig.arrive_with(frame(guest_mac(number), OUTSIDE_MAC, 1, 60), Checksum::Blank);
    }
    rig.run();
    let known = |rig: &Rig, guest: usize| -> Vec<(bool, bool)> {
        rig.guests[guest].known.iter().map(|it| (it.validated, it.blank)).collect()
    };
    assert_eq!(known(&rig, 0), [(true, false), (false, false), (true, true), (false, false)]);
    assert_eq!(known(&rig, 1), [(true, false), (false, false), (true, false), (false, false)]);
    assert!(look(&rig.guests[1].inbox[2]).unwrap().summed);
}

/// The frontend says that it is to be cut, but it is one frame's.
#[test]
fn a_long_packet_that_is_short_is_a_frame() {
    for offloads in cards() {
        let mut rig = rig(offloads, &[linux(), linux(), plain()]);
        for payload in [0, 1, 1400] {
            for to in [OUTSIDE_MAC, guest_mac(4), guest_mac(5)] {
                rig.guests[0].send_long(to, Shape::tcp(true, 5, payload), 1400);
            }
        }
        rig.run();
        let sent = rig.sent();
        let expected = |to: [u8; 6]| {
            [0, 1, 1400].map(|payload| Shape::tcp(true, 5, payload).whole(to, guest_mac(3)))
        };
        assert_eq!(sent, expected(OUTSIDE_MAC));
        assert_eq!(rig.guests[2].inbox, expected(guest_mac(5)));
        assert!(rig.guests[1].known.iter().all(|it| it.cutting.is_none()));
        assert_eq!(rig.guests[1].inbox.len(), 3);
        rig.close_all();
    }
}

/// Without the flag for a blank checksum its content does not count.
#[test]
fn a_long_packet_without_a_word_on_its_checksum_is_cut_all_the_same() {
    for offloads in cards() {
        let mut rig = rig(offloads, &[linux(), linux()]);
        let shape = Shape::tcp(false, 77, 9000);
        let cutting = Some(Cutting { ipv6: false, mss: 1400 });
        for to in [OUTSIDE_MAC, guest_mac(4)] {
            let mut bytes = shape.blank(to, guest_mac(3));
            bytes[50..52].fill(0xee);
            rig.guests[0].push(bytes, netfront::Checksum::Complete, cutting, 0);
        }
        rig.run();
        see_cut(&rig.sent(), &[shape], 1400);
        assert_eq!(rig.guests[1].inbox, [shape.blank(guest_mac(4), guest_mac(3))]);
    }
}

/// Nonsense costs the packet, not the connection.
#[test]
fn what_cannot_be_cut_or_finished_is_refused() {
    for offloads in cards() {
        let mut rig = rig(offloads, &[linux()]);
        let own = guest_mac(3);
        let v4 = |ipv6, mss| Some(Cutting { ipv6, mss });
        let tcp = Shape::tcp(false, 0, 5000);
        let change = |at: usize, value: u8| {
            let mut bytes = tcp.blank(OUTSIDE_MAC, own);
            bytes[at] = value;
            bytes
        };
        let mut padded = tcp.blank(OUTSIDE_MAC, own);
        padded.push(0);
        let cases = [
            (tcp.blank(OUTSIDE_MAC, own), v4(true, 1400)),
            (tcp.blank(OUTSIDE_MAC, own), v4(false, 1460)),
            (tcp.blank(OUTSIDE_MAC, own), v4(false, 40)),
            (tcp.blank(BROADCAST, own), v4(false, 1400)),
            (Shape::udp(false, 5000).blank(OUTSIDE_MAC, own), v4(false, 1400)),
            (change(20, 0x20), v4(false, 1400)), // a fragment
            (change(21, 1), v4(false, 1400)),    // another one
            (change(14, 0x44), v4(false, 1400)), // an IP header that is too short
            (change(16, 0xff), v4(false, 1400)), // longer than the packet
            (change(46, 0x40), v4(false, 1400)), // a TCP header that is too short
            (padded, v4(false, 1400)),
            (frame(OUTSIDE_MAC, own, 0, 5000), v4(false, 1400)),
            (frame(OUTSIDE_MAC, own, 0, 100), None),
        ];
        let count = cases.len();
        for (bytes, cutting) in cases {
            rig.guests[0].push(bytes, netfront::Checksum::Blank, cutting, 0);
        }
        rig.guests[0].send_long(OUTSIDE_MAC, tcp, 1400);
        rig.run();
        see_cut(&rig.sent(), &[tcp], 1400);
        assert_eq!(rig.vif(3).stats.tx_errors, count as u64);
        rig.close_all();
    }
}

/// A guest's own address is looked for in long packets, too.
#[test]
fn long_packets_are_sent_under_the_own_address_only() {
    let mut rig = rig(OFFLOADS, &[linux()]);
    let bytes = Shape::tcp(false, 0, 5000).blank(OUTSIDE_MAC, guest_mac(4));
    let cutting = Some(Cutting { ipv6: false, mss: 1400 });
    rig.guests[0].push(bytes, netfront::Checksum::Blank, cutting, 0);
    rig.run();
    assert!(rig.sent().is_empty());
    assert_eq!(rig.vif(3).stats.tx_spoofed, 1);
}

/// Long packets find all the buffers that they need, or wait for them, or are lost, whole.
#[test]
fn long_packets_wait_for_posted_buffers() {
    let mut rig = rig(OFFLOADS, &[linux(), linux()]);
    rig.guests[1].deaf = true;
    let shape = |n: u32| Shape::tcp(false, n * 0x1_0000, 65_000);
    for n in 0..8 {
        rig.guests[0].send_long(guest_mac(4), shape(n), 1400);
    }
    rig.run();
    let sender = &mut rig.guests[0];
    sender.front.flush(&mut sender.env).unwrap();
    assert_eq!(sender.front.in_flight().0, 0, "nobody else waits for the deaf one");
    rig.guests[1].deaf = false;
    rig.guests[1].wake();
    rig.run();
    // 64 posted buffers hold three packets of 16 + 1; two more were kept.
    let expected: Vec<_> = (0..5).map(|n| shape(n).blank(guest_mac(4), guest_mac(3))).collect();
    assert_eq!(rig.guests[1].inbox, expected);
    assert_eq!(rig.vif(4).stats.rx_dropped, 3);
    rig.guests[0].send_long(guest_mac(4), shape(9), 1400);
    rig.run();
    assert_eq!(rig.guests[1].inbox.len(), 6);
    rig.close_all();
}

/// The extra info has a buffer, too: two are left where three are needed.
#[test]
fn a_long_packet_waits_for_the_last_buffer() {
    let mut rig = rig(OFFLOADS, &[linux(), Config { rx_buffers: 5, ..linux() }]);
    rig.guests[1].deaf = true;
    let shapes = [Shape::tcp(false, 0, 5000), Shape::tcp(false, 5000, 5000)];
    for shape in shapes {
        rig.guests[0].send_long(guest_mac(4), shape, 1400);
    }
    rig.run();
    assert_eq!(rig.guests[1].front.in_flight().1, 5, "nothing was taken");
    rig.guests[1].deaf = false;
    rig.guests[1].wake();
    rig.run();
    let expected = shapes.map(|shape| shape.blank(guest_mac(4), guest_mac(3)));
    assert_eq!(rig.guests[1].inbox, expected);
    assert!(rig.guests[1].known.iter().all(|it| it.cutting.is_some()));
    rig.close_all();
}

/// One that posts fewer buffers than it promised loses long packets, and nothing else for good.
#[test]
fn a_packet_for_which_there_is_never_room_does_not_block_others() {
    let mut rig = rig(OFFLOADS, &[linux(), Config { rx_buffers: 8, ..linux() }]);
    rig.guests[0].send_long(guest_mac(4), Shape::tcp(false, 0, 65_000), 1400);
    rig.run();
    rig.arrive(frame(guest_mac(4), OUTSIDE_MAC, 1, 100));
    rig.run();
    assert!(rig.guests[1].inbox.is_empty(), "it waits behind the long one");
    rig.world.advance(netback_stale());
    for seq in 2..40 {
        rig.arrive(frame(guest_mac(4), OUTSIDE_MAC, seq, 1500));
    }
    rig.run();
    let seqs: Vec<u32> = rig.guests[1].inbox.iter().map(|it| crate::rig::check(it)).collect();
    assert_eq!(seqs, (1..40).collect::<Vec<_>>());
    assert_eq!(rig.vif(4).stats.rx_dropped, 1);
    rig.close_all();
}

const fn netback_stale() -> u64 {
    1_000_000_001
}

/// Of 65,535 bytes in 18 slots.
#[test]
fn the_longest_packet_in_most_slots_passes() {
    let mut rig = rig(OFFLOADS, &[Config { fragment: 3641, ..linux() }, linux()]);
    let longest = Shape::tcp(false, 0, 65_535 - 14 - 20 - 32);
    rig.guests[0].send_long(guest_mac(4), longest, 1400);
    rig.guests[0].send_long(OUTSIDE_MAC, longest, 1400);
    rig.run();
    assert_eq!(rig.guests[1].inbox, [longest.blank(guest_mac(4), guest_mac(3))]);
    see_cut(&rig.sent(), &[longest], 1400);
}

/// A stream in packets of all lengths, from neighbour to neighbour.
#[test]
fn a_stream_arrives_as_it_was_sent() {
    for (offloads, config) in [(OFFLOADS, linux()), (Offloads::default(), plain())] {
        let mut rig = rig(offloads, &[linux(), config]);
        let mut random = crate::rig::Random(0x5eed_5eed);
        let (mut at, mut coverage) = (0, Coverage::default());
        for _ in 0..60 {
            let payload = 1 + random.below(30_000);
            let mss = u16::try_from(500 + random.below(900)).unwrap();
            rig.guests[0].send_long(guest_mac(4), Shape::tcp(true, at, payload as usize), mss);
            at += payload;
            rig.run();
        }
        for packet in &rig.guests[1].inbox {
            coverage.add(look(packet).unwrap().shape);
        }
        assert!(coverage.covers(0, at as usize) && coverage.most() == 1);
        assert!(coverage.pieces() >= 60);
    }
}
