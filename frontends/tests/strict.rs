//! The network frontend against a backend by hand: what is right passes, what is wrong is named.

use domain_api::fake::{Domain, World};
use domain_api::{
    Access, DomainId, EventPort, Events, GrantRef, Granter, Grants, MappedGrant, Page,
};
use frontends::netfront::{Checksum, Config, Error, Fault, GrantPolicy, Netfront};
use shmem::inflight::{Identity, InflightTable};
use shmem::ring::BackRing;
use std::sync::atomic::Ordering::Relaxed;
use xen_abi::netif::{
    RXF_EXTRA_INFO, RXF_MORE_DATA, RxRequest, RxResponse, TXF_CSUM_BLANK, TXF_MORE_DATA, TxRequest,
    TxResponse,
};
use xen_abi::ring::RSP_PROD;
use xenbus::device::{self, Device, DeviceKind};
use xenbus::{Client, Nodes, XenbusState};
use xenstore::{LocalStore, LocalTransport};

const GUEST: DomainId = DomainId(3);
const DRIVER: DomainId = DomainId(2);
const DEVICE: Device = Device { kind: DeviceKind::Vif, backend: DRIVER, frontend: GUEST, index: 0 };

struct Rig {
    guest: Domain,
    client: Client<LocalTransport>,
    front: Netfront,
    driver: Domain,
    toolstack: Client<LocalTransport>,
    tx: BackRing<TxRequest, TxResponse>,
    rx: BackRing<RxRequest, RxResponse>,
    rings: [MappedGrant; 2],
    port: EventPort,
}

fn config() -> Config {
    Config {
        tx_buffers: 20,
        rx_buffers: 8,
        fragment: 600,
        grants: GrantPolicy::PerRequest,
        split_events: false,
        ..Config::default()
    }
}

fn rig(config: Config) -> Rig {
    let world = World::new();
    let (mut guest, mut driver) = (world.domain(GUEST), world.domain(DRIVER));
    let store = LocalStore::new();
    let mut toolstack = store.client(DomainId(0));
    let (front, back) = (DEVICE.frontend_path(), DEVICE.backend_path());
    for (path, value) in [
        (format!("{front}/backend"), back.as_str()),
        (format!("{front}/backend-id"), "2"),
        (format!("{front}/mac"), "00:16:3e:00:00:03"),
        (format!("{front}/state"), "1"),
        (format!("{back}/feature-rx-copy"), "1"),
        (format!("{back}/state"), "2"),
    ] {
        toolstack.write(&path, value.as_bytes()).unwrap();
        let perms = [xenbus::Permission::owner(GUEST), xenbus::Permission::reader(GUEST)];
        toolstack.set_perms(&path, &perms).unwrap();
    }
    toolstack.set_perms(&front, &[xenbus::Permission::owner(GUEST)]).unwrap();
    let mut client = store.client(GUEST);
    let mut front = Netfront::new(&mut client, GUEST, 0, config).unwrap();
    assert_eq!(front.transmit(&mut guest, &[0; 60], Checksum::Complete), Err(Error::NotConnected));
    front.refresh(&mut guest, &mut client).unwrap();
    assert_eq!((front.state(), front.is_connected()), (XenbusState::CONNECTED, true));

    let directory = DEVICE.frontend_path();
    let port = device::read_port(&mut toolstack, &directory, "event-channel").unwrap();
    let port = driver.bind_interdomain(GUEST, port).unwrap();
    let mut map = |key: &str| {
        let gref = device::read_grant(&mut toolstack, &directory, key).unwrap();
        driver.map(GUEST, gref, Access::ReadWrite).unwrap()
    };
    let rings = [map("tx-ring-ref"), map("rx-ring-ref")];
    let table = || InflightTable::new(Page::new_zeroed());
    let identity =
        Identity { frontend: GUEST, incarnation: 0, ring: GrantRef(0), port: EventPort(0) };
    let tx = BackRing::attach(vec![rings[0].page.clone()], table(), identity).unwrap();
    let rx = BackRing::attach(vec![rings[1].page.clone()], table(), identity).unwrap();
    Rig { guest, client, front, driver, toolstack, tx, rx, rings, port }
}

impl Rig {
    fn transmit(&mut self, len: usize) -> Result<(), Error> {
        let frame: Vec<u8> = (0..len).map(|at| at.to_le_bytes()[0]).collect();
        self.front.transmit(&mut self.guest, &frame, Checksum::Complete)
    }

    fn answer(&mut self, id: u16) {
        self.tx.respond(&TxResponse { id, status: 0 });
        let _ = self.tx.publish();
    }

    fn deliver(&mut self, responses: &[RxResponse]) {
        for response in responses {
            self.rx.respond(response);
        }
        let _ = self.rx.publish();
        self.driver.notify(self.port);
    }

    fn receive(&mut self) -> Result<Option<usize>, Error> {
        self.front.receive(&mut self.guest, <[u8]>::len)
    }
}

fn ok(id: u16, status: i16) -> RxResponse {
    RxResponse { id, offset: 0, flags: 0, status }
}

#[test]
fn a_frame_is_sent_in_parts_whose_first_has_the_whole_size() {
    let mut rig = rig(config());
    rig.transmit(1514).unwrap();
    let frame = [7_u8; 14];
    rig.front.transmit(&mut rig.guest, &frame, Checksum::Blank).unwrap();
    rig.front.flush(&mut rig.guest).unwrap();
    let mut requests = Vec::new();
    while let Some(request) = rig.tx.take().unwrap() {
        requests.push((request.size, request.flags));
    }
    let expected = [(1514, TXF_MORE_DATA), (600, TXF_MORE_DATA), (314, 0), (14, TXF_CSUM_BLANK)];
    assert_eq!(requests, expected);
}

#[test]
fn when_all_buffers_are_out_the_answer_is_an_event_away() {
    let mut rig = rig(config());
    let mut sent = 0;
    while rig.transmit(1514) == Ok(()) {
        sent += 1;
    }
    assert_eq!(sent, 6);
    let _ = rig.guest.take_pending();
    let mut ids = Vec::new();
    while let Some(request) = rig.tx.take().unwrap() {
        ids.push(request.id);
    }
    for id in ids {
        rig.tx.respond(&TxResponse { id, status: 0 });
    }
    assert!(rig.tx.publish(), "the frontend asked to be told");
    assert_eq!(rig.transmit(1514), Ok(()));
}

#[test]
fn double_and_unknown_transmit_answers_are_faults() {
    for bad in [19_u16, 20, u16::MAX] {
        let mut rig = rig(config());
        rig.transmit(60).unwrap();
        rig.transmit(60).unwrap();
        rig.front.flush(&mut rig.guest).unwrap();
        let first = rig.tx.take().unwrap().unwrap().id;
        let _ = rig.tx.take().unwrap().unwrap();
        rig.answer(first);
        assert_eq!(rig.front.flush(&mut rig.guest), Ok(()));
        // 19 is in use only by the first, which was answered.
        let bad = if bad == 19 { first } else { bad };
        rig.answer(bad);
        let fault = Err(Error::Broken(Fault::TxId(bad)));
        assert_eq!(rig.front.flush(&mut rig.guest), fault);
        assert_eq!(rig.transmit(60), fault, "it stays broken");
        assert!(!rig.front.is_connected());
    }
}

#[test]
fn a_page_that_is_still_held_when_it_is_answered_is_a_fault() {
    let mut rig = rig(config());
    rig.transmit(60).unwrap();
    rig.front.flush(&mut rig.guest).unwrap();
    let request = rig.tx.take().unwrap().unwrap();
    let held = rig.driver.map(GUEST, request.gref, Access::ReadOnly).unwrap();
    rig.answer(request.id);
    let fault = Err(Error::Broken(Fault::StillGranted(request.gref)));
    assert_eq!(rig.front.flush(&mut rig.guest), fault);
    rig.driver.unmap(held);
}

#[test]
fn impossible_ring_counters_are_faults() {
    for ring in [0, 1] {
        let mut rig = rig(config());
        rig.rings[ring].page.u32(RSP_PROD).store(9, Relaxed);
        let results = (rig.front.flush(&mut rig.guest), rig.receive());
        assert!(matches!(rig.front.fault(), Some(Fault::Ring(_))), "{results:?}");
    }
}

#[test]
fn received_frames_are_checked_by_place_and_extent() {
    let cases: [(&[RxResponse], Fault); 5] = [
        (&[ok(1, 60)], Fault::RxId { expected: 0, found: 1 }),
        (
            &[RxResponse { id: 0, offset: 4090, flags: 0, status: 60 }],
            Fault::RxExtent { offset: 4090, len: 60 },
        ),
        (&[RxResponse { id: 0, offset: 0, flags: RXF_MORE_DATA, status: 60 }], Fault::RxChain),
        (
            &[RxResponse { id: 0, offset: 0, flags: RXF_EXTRA_INFO, status: 60 }],
            Fault::RxFlags(RXF_EXTRA_INFO),
        ),
        (&[ok(0, 60), ok(0, 60)], Fault::RxId { expected: 1, found: 0 }),
    ];
    for (responses, fault) in cases {
        let mut rig = rig(config());
        for _ in responses {
            rig.rx.take().unwrap().unwrap();
        }
        rig.deliver(responses);
        let result = (0..2).map(|_| rig.receive()).find(Result::is_err);
        assert_eq!(result, Some(Err(Error::Broken(fault))));
    }
}

#[test]
fn good_frames_chains_and_errors_pass_for_ever() {
    let mut rig = rig(config());
    for round in 0..200_u16 {
        let ids: Vec<u16> = (0..4).map(|_| rig.rx.take().unwrap().unwrap().id).collect();
        let more = |id| RxResponse { id, offset: 8, flags: RXF_MORE_DATA, status: 4000 };
        rig.deliver(&[ok(ids[0], -1), more(ids[1]), ok(ids[2], 100), ok(ids[3], 60)]);
        assert_eq!(rig.guest.take_pending().len(), 1);
        assert_eq!(rig.receive(), Ok(Some(4100)));
        assert_eq!(rig.receive(), Ok(Some(60)));
        assert_eq!(rig.receive(), Ok(None));
        let stats = rig.front.stats();
        assert_eq!(stats.rx_errors, u64::from(round) + 1);
        assert_eq!(rig.front.in_flight(), (0, 8), "every buffer is posted again");
    }
}

#[test]
fn a_backend_that_closes_gets_everything_back_or_is_waited_for() {
    let Rig { mut guest, mut client, mut front, mut driver, mut toolstack, tx, rx, rings, .. } =
        rig(Config { grants: GrantPolicy::Keep, ..config() });
    assert_eq!(guest.grants(), 2 + 20 + 8);
    toolstack.write(&format!("{}/state", DEVICE.backend_path()), b"5").unwrap();
    front.refresh(&mut guest, &mut client).unwrap();
    assert_eq!((front.state(), front.is_connected()), (XenbusState::CLOSED, false));
    assert_eq!(guest.grants(), 2, "the rings are still mapped");
    drop((tx, rx));
    rings.into_iter().for_each(|ring| driver.unmap(ring));
    toolstack.write(&format!("{}/state", DEVICE.backend_path()), b"2").unwrap();
    front.reopen(&mut guest, &mut client).unwrap();
    assert!(front.is_connected());
    assert_eq!(guest.grants(), 2 + 20 + 8);
}

#[test]
fn want_of_grants_leaves_nothing_behind() {
    let world = World::new();
    let mut guest = world.domain(GUEST);
    let filler = Page::new_zeroed();
    let Rig { mut front, client: mut store, mut toolstack, guest: mut used, .. } =
        rig(Config { grants: GrantPolicy::Keep, ..config() });
    front.close(&mut used, &mut store).unwrap();
    let mut grefs = Vec::new();
    while let Ok(gref) = guest.grant(DRIVER, &filler, Access::ReadOnly) {
        grefs.push(gref);
    }
    for gref in grefs.drain(..10) {
        guest.revoke(gref).unwrap();
    }
    let before = (guest.grants(), guest.open_ports());
    toolstack.write(&format!("{}/state", DEVICE.backend_path()), b"2").unwrap();
    assert_eq!(front.reopen(&mut guest, &mut store), Err(domain_api::Errno::ENOSPC));
    assert_eq!((guest.grants(), guest.open_ports()), before);
}

#[cfg(feature = "smoltcp")]
#[test]
fn smoltcp_sends_and_receives_through_it() {
    use frontends::netfront::Phy;
    use smoltcp::phy::{Device as _, RxToken, TxToken};
    use smoltcp::time::Instant;
    let mut rig = rig(config());
    let mut phy = Phy { front: &mut rig.front, env: &mut rig.guest };
    assert!(phy.receive(Instant::ZERO).is_none());
    phy.transmit(Instant::ZERO).unwrap().consume(60, |frame| frame.fill(9));
    rig.front.flush(&mut rig.guest).unwrap();
    assert_eq!(rig.tx.take().unwrap().unwrap().size, 60);
    let id = rig.rx.take().unwrap().unwrap().id;
    rig.deliver(&[ok(id, 99)]);
    let mut phy = Phy { front: &mut rig.front, env: &mut rig.guest };
    let (rx, tx) = phy.receive(Instant::ZERO).unwrap();
    assert_eq!(rx.consume(<[u8]>::len), 99);
    tx.consume(1514, |frame| assert_eq!(frame.len(), 1514));
    assert_eq!(rig.front.stats().tx_packets, 2);
}
