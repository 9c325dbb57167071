//! Frontends that break the protocol harm themselves and nobody else.

use crate::offloads::linux;
use crate::rig::{DRIVER, OUTSIDE_MAC, Rig, StoreClient, check, frame, guest_mac};
use crate::wire::{Shape, look};
use domain_api::fake::Domain;
use domain_api::{Access, DomainId, EventPort, Events, GrantRef, Granter, Page};
use frontends::netfront::{Config, GrantPolicy};
use proptest::prelude::*;
use shmem::ring::FrontRing;
use std::sync::atomic::Ordering::Relaxed;
use xen_abi::netif::{
    RSP_ERROR, RSP_NULL, RSP_OKAY, RXF_CSUM_BLANK, RXF_DATA_VALIDATED, RXF_EXTRA_INFO,
    RXF_MORE_DATA, RxRequest, RxResponse, TX_SLOT, TXF_CSUM_BLANK, TXF_EXTRA_INFO, TXF_MORE_DATA,
    TxRequest, TxResponse,
};
use xen_abi::ring::REQ_PROD;
use xenbus::{Nodes, XenbusState};
use zerocopy::IntoBytes;

const LIAR: u16 = 3;
const HONEST: u16 = 4;

/// A frontend by hand, which can write what it wants.
struct Liar {
    env: Domain,
    client: StoreClient,
    tx_page: Page,
    rx_page: Page,
    data: Page,
    tx: FrontRing<[u8; TX_SLOT], TxResponse>,
    rx: FrontRing<RxRequest, RxResponse>,
    data_ref: GrantRef,
    tx_ref: GrantRef,
    rx_ref: GrantRef,
    tx_port: EventPort,
    rx_port: EventPort,
}

impl Liar {
    fn connect(rig: &mut Rig) -> Self {
        let mut env = rig.world.domain(DomainId(LIAR));
        let client = rig.store.client(DomainId(LIAR));
        let (tx_page, rx_page, data) = (Page::new_zeroed(), Page::new_zeroed(), Page::new_zeroed());
        let tx = FrontRing::new(tx_page.clone());
        let rx = FrontRing::new(rx_page.clone());
        let mut grant = |page: &Page| env.grant(DRIVER, page, Access::ReadWrite).unwrap();
        let (tx_ref, rx_ref, data_ref) = (grant(&tx_page), grant(&rx_page), grant(&data));
        let tx_port = env.alloc_unbound(DRIVER).unwrap();
        let rx_port = env.alloc_unbound(DRIVER).unwrap();
        let mut liar = Self {
            env,
            client,
            tx_page,
            rx_page,
            data,
            tx,
            rx,
            data_ref,
            tx_ref,
            rx_ref,
            tx_port,
            rx_port,
        };
        liar.write("state", 1);
        rig.run();
        for (key, value) in [
            ("tx-ring-ref", tx_ref.0),
            ("rx-ring-ref", rx_ref.0),
            ("event-channel-tx", tx_port.0),
            ("event-channel-rx", rx_port.0),
            ("request-rx-copy", 1),
            ("feature-sg", 1),
            ("feature-gso-tcpv4", 1),
            ("feature-gso-tcpv6", 1),
            ("feature-ipv6-csum-offload", 1),
            ("state", 4),
        ] {
            liar.write(key, value);
        }
        liar
    }

    fn write(&mut self, key: &str, value: u32) {
        let path = format!("device/vif/0/{key}");
        self.client.write(&path, value.to_string().as_bytes()).unwrap();
    }

    fn push(&mut self, gref: GrantRef, offset: u16, size: u16, flags: u16) {
        let request = TxRequest { gref, offset, flags, id: 7, size };
        self.tx.push(request.as_bytes().try_into().unwrap());
    }

    /// An extra info that wants the packet cut.
    fn push_cutting(&mut self, kind: u8, flags: u8, mss: u16, gso_type: u8) {
        let [low, high] = mss.to_le_bytes();
        self.tx.push(&[kind, flags, low, high, gso_type, 0, 0, 0, 0, 0, 0, 0]);
    }

    fn publish(&mut self) {
        let _ = self.tx.publish();
        let _ = self.rx.publish();
        self.env.notify(self.tx_port);
        self.env.notify(self.rx_port);
    }
}

/// A liar, connected, and an honest neighbour.
fn stage() -> (Rig, Liar) {
    let mut rig = Rig::new(2);
    rig.add_guest(HONEST, linux());
    rig.add_device(DomainId(LIAR), guest_mac(LIAR));
    let liar = Liar::connect(&mut rig);
    rig.run();
    assert_eq!(rig.states(LIAR).0, XenbusState::CONNECTED);
    (rig, liar)
}

/// The neighbour notices nothing.
fn neighbour_is_well(rig: &mut Rig) {
    rig.sent();
    rig.guests[0].inbox.clear();
    for seq in 0..50 {
        rig.guests[0].send(frame(OUTSIDE_MAC, guest_mac(HONEST), seq, 300));
        rig.arrive(frame(guest_mac(HONEST), OUTSIDE_MAC, seq, 300));
    }
    rig.run();
    let expected: Vec<u32> = (0..50).collect();
    let out = rig.sent();
    let own = |frame: &&Vec<u8>| frame[6..12] == guest_mac(HONEST);
    assert_eq!(out.iter().filter(own).map(|it| check(it)).collect::<Vec<_>>(), expected);
    let inbox = &rig.guests[0].inbox;
    assert_eq!(inbox.iter().map(|it| check(it)).collect::<Vec<_>>(), expected);
    assert_eq!(rig.states(HONEST).0, XenbusState::CONNECTED);
    assert_eq!(rig.error_of(HONEST), None);
    assert_eq!(rig.back().nic.lent(), 0);
}

/// The liar is closed with a message, holds nothing any more, and may come back honestly.
fn liar_is_out(rig: &mut Rig, liar: Liar, message: &str) {
    rig.run();
    assert_eq!(rig.states(LIAR).0, XenbusState::CLOSING);
    let error = rig.error_of(LIAR).expect("the reason is told");
    assert!(error.contains(message), "{error:?} does not tell of {message:?}");
    let Liar { mut env, mut client, tx_page, rx_page, .. } = liar;
    drop((tx_page, rx_page));
    for gref in 8..12 {
        assert_eq!(env.revoke(GrantRef(gref)), Ok(()), "grant {gref} is still mapped");
    }
    neighbour_is_well(rig);
    client.write("device/vif/0/state", b"6").unwrap();
    rig.run();
    assert_eq!(rig.states(LIAR).0, XenbusState::CLOSED);
    rig.world.kill(DomainId(LIAR));
    let back = Liar::connect(rig);
    rig.run();
    assert_eq!(rig.states(LIAR).0, XenbusState::CONNECTED);
    assert_eq!(rig.error_of(LIAR), None);
    drop(back);
}

#[test]
fn impossible_counters_end_the_connection() {
    for (rx, value) in [(false, 257), (false, u32::MAX), (true, 257), (true, u32::MAX)] {
        let (mut rig, liar) = stage();
        let page = if rx { &liar.rx_page } else { &liar.tx_page };
        page.u32(REQ_PROD).store(value, Relaxed);
        liar.env.clone().notify(liar.tx_port);
        rig.arrive(frame(guest_mac(LIAR), OUTSIDE_MAC, 1, 60));
        liar_is_out(&mut rig, liar, if rx { "rx ring" } else { "tx ring" });
    }
}

#[test]
fn a_counter_that_goes_back_ends_the_connection() {
    let (mut rig, mut liar) = stage();
    liar.push(liar.data_ref, 0, 60, 0);
    liar.push(liar.data_ref, 0, 60, 0);
    liar.publish();
    rig.run();
    liar.tx_page.u32(REQ_PROD).store(1, Relaxed);
    liar.env.notify(liar.tx_port);
    liar_is_out(&mut rig, liar, "counter");
}

#[test]
fn a_packet_without_end_ends_the_connection() {
    let (mut rig, mut liar) = stage();
    for _ in 0..40 {
        liar.push(liar.data_ref, 0, 60, TXF_MORE_DATA);
    }
    liar.publish();
    liar_is_out(&mut rig, liar, "data slots");
}

#[test]
fn a_fragment_that_leaves_its_page_ends_the_connection() {
    let (mut rig, mut liar) = stage();
    liar.push(liar.data_ref, 4000, 200, 0);
    liar.publish();
    liar_is_out(&mut rig, liar, "leaves its page");
}

#[test]
fn an_unknown_extra_info_ends_the_connection() {
    let (mut rig, mut liar) = stage();
    liar.push(liar.data_ref, 0, 200, TXF_EXTRA_INFO);
    liar.push(GrantRef(0xffff_ffff), 0, 0, 0);
    liar.publish();
    liar_is_out(&mut rig, liar, "extra info");
}

#[test]
fn bad_keys_end_the_connection() {
    for (key, value, message) in [
        ("tx-ring-ref", 99, "mapping Tx ring"),
        ("rx-ring-ref", 99_999, "mapping Rx ring"),
        ("event-channel-tx", 900, "binding port"),
        ("event-channel-rx", 900, "binding port"),
        ("request-rx-copy", 0, "request-rx-copy"),
    ] {
        let mut rig = Rig::new(2);
        rig.add_guest(HONEST, Config { grants: GrantPolicy::PerRequest, ..Config::default() });
        rig.add_device(DomainId(LIAR), guest_mac(LIAR));
        let mut liar = Liar::connect(&mut rig);
        liar.write(key, value);
        liar_is_out(&mut rig, liar, message);
    }
}

/// What a muddled frontend could send is answered, slot by slot, and the connection goes on.
#[test]
fn bad_grants_and_sizes_are_answered_with_errors() {
    let (mut rig, mut liar) = stage();
    let (data, missing) = (liar.data_ref, GrantRef(4000));
    liar.data.write(0, &frame(OUTSIDE_MAC, guest_mac(LIAR), 5, 100));
    liar.push(missing, 0, 100, 0);
    liar.push(data, 0, 1519, 0);
    liar.push(data, 0, 13, 0);
    liar.push(data, 0, 50, TXF_MORE_DATA);
    liar.push(data, 0, 60, 0);
    liar.push(data, 0, 100, TXF_MORE_DATA);
    liar.push(missing, 0, 40, 0);
    liar.push(data, 0, 100, TXF_EXTRA_INFO);
    liar.push(GrantRef(1), 0, 0, 0);
    liar.push(data, 0, 100, 0);
    liar.publish();
    rig.run();
    let mut status = Vec::new();
    while let Some(response) = liar.tx.take().unwrap() {
        status.push(response.status);
    }
    let error = RSP_ERROR;
    let expected = [error, error, error, error, error, error, error, error, RSP_NULL, RSP_OKAY];
    assert_eq!(status, expected);
    assert_eq!(rig.sent(), [frame(OUTSIDE_MAC, guest_mac(LIAR), 5, 100)]);
    assert_eq!(rig.vif(LIAR).stats.tx_errors, 6);
    assert_eq!(rig.states(LIAR).0, XenbusState::CONNECTED);
    neighbour_is_well(&mut rig);
}

#[test]
fn bad_receive_buffers_cost_the_frame_that_got_them() {
    let (mut rig, mut liar) = stage();
    for gref in [GrantRef(4000), liar.data_ref] {
        liar.rx.push(&RxRequest { id: 9, pad: 0, gref });
    }
    liar.publish();
    rig.arrive(frame(guest_mac(LIAR), OUTSIDE_MAC, 1, 60));
    rig.arrive(frame(guest_mac(LIAR), OUTSIDE_MAC, 2, 60));
    rig.run();
    let mut status = Vec::new();
    while let Some(response) = liar.rx.take().unwrap() {
        status.push(response.status);
    }
    assert_eq!(status, [RSP_ERROR, 60]);
    let mut bytes = [0; 60];
    liar.data.read(0, &mut bytes);
    assert_eq!(check(&bytes), 2);
    neighbour_is_well(&mut rig);
}

/// Rings posted as their own buffers: what is written there is the liar's own loss.
#[test]
fn rings_as_data_are_the_liars_own_loss() {
    let (mut rig, mut liar) = stage();
    for gref in [liar.tx_ref, liar.rx_ref, liar.tx_ref] {
        liar.rx.push(&RxRequest { id: 9, pad: 0, gref });
        liar.push(gref, 0, 1514, 0);
    }
    liar.publish();
    for seq in 0..3 {
        rig.arrive(frame(guest_mac(LIAR), OUTSIDE_MAC, seq, 1514));
    }
    rig.run();
    neighbour_is_well(&mut rig);
    assert_eq!(rig.states(LIAR).0, XenbusState::CLOSING, "its counters are a frame's bytes now");
}

/// A packet that never ends holds nobody up, and is no trap for the next incarnation.
#[test]
fn half_a_packet_waits_for_its_rest_over_a_restart() {
    let (mut rig, mut liar) = stage();
    let bytes = frame(OUTSIDE_MAC, guest_mac(LIAR), 3, 100);
    liar.data.write(0, &bytes);
    liar.push(liar.data_ref, 0, 100, TXF_MORE_DATA);
    liar.publish();
    rig.run();
    neighbour_is_well(&mut rig);
    rig.kill_back();
    rig.tear_rings();
    rig.start_back();
    rig.run();
    liar.push(liar.data_ref, 60, 40, 0);
    liar.publish();
    rig.run();
    assert_eq!(rig.sent(), [bytes]);
    neighbour_is_well(&mut rig);
}

/// A frontend that toggles its state makes work for itself, and finds its place again.
#[test]
fn any_sequence_of_states_is_survived() {
    let (mut rig, mut liar) = stage();
    for state in [5, 4, 1, 4, 6, 1, 4, 0, 7, 4, 99, 1, 1, 4, 5, 6, 4, 1, 2, 3, 4] {
        liar.write("state", state);
        rig.run();
    }
    neighbour_is_well(&mut rig);
    liar.write("state", 6);
    rig.run();
    rig.world.kill(DomainId(LIAR));
    let _back = Liar::connect(&mut rig);
    rig.run();
    assert_eq!(rig.states(LIAR).0, XenbusState::CONNECTED);
}

/// The parts of a packet are all the same page, which is rewritten while the packet is looked at:
/// what was checked is what is sent.
#[test]
fn a_packet_that_changes_meanwhile_is_sent_as_it_was_checked() {
    let (mut rig, mut liar) = stage();
    let shape = Shape::tcp(false, 0, 3000);
    liar.data.write(0, &shape.blank(OUTSIDE_MAC, guest_mac(LIAR)));
    let size = u16::try_from(shape.len()).unwrap();
    liar.push(liar.data_ref, 0, size, TXF_EXTRA_INFO | TXF_CSUM_BLANK);
    liar.push_cutting(1, 0, 1400, 1);
    liar.publish();
    // The copy is made; the page has other headers by the time the packet is cut.
    rig.outside.borrow_mut().stuck = true;
    rig.step();
    liar.data.write(0, &[0xff; 200]);
    rig.outside.borrow_mut().stuck = false;
    rig.run();
    let sent = rig.sent();
    assert!(sent.len() == 3 && sent.iter().all(|frame| look(frame).unwrap().summed));
    neighbour_is_well(&mut rig);
}

/// A frontend that wants a receive ring's buffers to be more than they are.
#[test]
fn a_long_packet_for_which_grants_are_bad_is_lost_alone() {
    let (mut rig, mut liar) = stage();
    for gref in [liar.data_ref, GrantRef(4000), liar.data_ref, liar.data_ref, liar.data_ref] {
        liar.rx.push(&RxRequest { id: 9, pad: 0, gref });
    }
    liar.publish();
    let shape = Shape::tcp(false, 0, 9000);
    rig.guests[0].send_long(guest_mac(LIAR), shape, 1400);
    rig.run();
    rig.arrive(frame(guest_mac(LIAR), OUTSIDE_MAC, 2, 60));
    rig.run();
    let mut answers = Vec::new();
    while let Some(response) = liar.rx.take().unwrap() {
        answers.push((response.flags, response.status));
    }
    // Three parts, of which one has a bad grant where the second is the extra info's; a frame.
    let (first, more) = (answers[0], RXF_MORE_DATA);
    assert_eq!(first.0, RXF_CSUM_BLANK | RXF_DATA_VALIDATED | RXF_EXTRA_INFO | more);
    assert_eq!(answers[2..], [(more, 4096), (0, 9066 - 8192), (0, 60)]);
    neighbour_is_well(&mut rig);
}

/// What a liar puts in a slot of its transmit ring.
#[derive(Clone, Debug)]
enum Put {
    Data { gref: u32, offset: u16, flags: u16, size: u16 },
    Extra { kind: u8, flags: u8, mss: u16, gso_type: u8 },
}

fn put() -> impl Strategy<Value = Put> {
    let size = prop_oneof![2 => 0_u16..1600, 1 => 0_u16..9000, 1 => Just(3066_u16)];
    let data = (0_u32..14, prop_oneof![2 => Just(0_u16), 1 => 0_u16..4200], 0_u16..16, size)
        .prop_map(|(gref, offset, flags, size)| Put::Data { gref, offset, flags, size });
    let extra = (0_u8..7, 0_u8..2, prop_oneof![Just(1400_u16), any::<u16>()], 0_u8..4)
        .prop_map(|(kind, flags, mss, gso_type)| Put::Extra { kind, flags, mss, gso_type });
    prop_oneof![3 => data, 1 => extra]
}

/// A whole packet that makes sense, so that others are met behind the first checks.
fn put_packet() -> impl Strategy<Value = Vec<Put>> {
    (any::<bool>(), 0_u16..2, prop_oneof![Just(1400_u16), 40_u16..1500], 1_u8..3).prop_map(
        |(extra, blank, mss, gso_type)| {
            let flags = blank | if extra { TXF_EXTRA_INFO } else { 0 };
            let size = if extra { 3066 } else { 1066 };
            let mut slots = vec![Put::Data { gref: 10, offset: 0, flags, size }];
            if extra {
                slots.push(Put::Extra { kind: 1, flags: 0, mss, gso_type });
            }
            slots
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any bytes in the rings, any counters, over restarts of the backend.
    #[test]
    fn any_ring_content_is_survived(
        slots in proptest::collection::vec(
            prop_oneof![put().prop_map(|it| vec![it]), put_packet()], 1..90),
        to_neighbour in any::<bool>(),
        rx in proptest::collection::vec(0_u32..14, 0..60),
        tx_prod in prop_oneof![3 => Just(None), 1 => any::<u32>().prop_map(Some)],
        kill in any::<bool>(),
    ) {
        let (mut rig, mut liar) = stage();
        let to = if to_neighbour { guest_mac(HONEST) } else { OUTSIDE_MAC };
        liar.data.write(0, &Shape::tcp(false, 0, 3000).blank(to, guest_mac(LIAR)));
        for slot in slots.into_iter().flatten() {
            match slot {
                Put::Data { gref, offset, flags, size } => {
                    liar.push(GrantRef(gref), offset, size, flags);
                }
                Put::Extra { kind, flags, mss, gso_type } => {
                    liar.push_cutting(kind, flags, mss, gso_type);
                }
            }
        }
        for gref in rx {
            liar.rx.push(&RxRequest { id: 1, pad: 0, gref: GrantRef(gref) });
        }
        liar.publish();
        if let Some(value) = tx_prod {
            liar.tx_page.u32(REQ_PROD).store(value, Relaxed);
        }
        for seq in 0..20 {
            rig.arrive(frame(guest_mac(LIAR), OUTSIDE_MAC, seq, 200));
        }
        if kill {
            rig.step();
            rig.kill_back();
            rig.start_back();
        }
        rig.run();
        neighbour_is_well(&mut rig);
    }
}
