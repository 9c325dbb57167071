//! Frontends that break the protocol harm themselves and nobody else.

use crate::disk::{SharedMedium, geometry, medium};
use crate::front::{Config, Front};
use crate::rig::{DRIVER, Rig};
use domain_api::disk::Geometry;
use domain_api::{Access, Events, GrantRef, Granter, Page};
use proptest::prelude::*;
use std::sync::atomic::Ordering::Relaxed;
use xen_abi::blkif::{
    DISCARD, DISCARD_SECURE, DiscardRequest, FLUSH_DISKCACHE, INDIRECT, IndirectRequest, READ,
    RSP_EOPNOTSUPP, RSP_ERROR, RSP_OKAY, Request, Segment, WRITE, WRITE_BARRIER,
};
use xen_abi::ring::REQ_PROD;
use xenbus::XenbusState;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const LIAR: u16 = 3;
const HONEST: u16 = 4;
/// Sectors of the liar's disk.
const SECTORS: u64 = 1024;

/// A frontend that is connected, and writes what it wants into its ring.
struct Liar {
    page: Page,
    gref: GrantRef,
    read_only: GrantRef,
}

fn stage_on(disk: SharedMedium, mode: &str) -> (Rig, Liar) {
    let mut rig = Rig::new(vec![disk], 2);
    let own = format!("range:0+{}", SECTORS * 512);
    rig.add_guest(LIAR, &own, mode, Config::default());
    rig.add_guest(HONEST, "range:1M+1M", "w", Config::default());
    let env = &mut rig.fronts[0].env;
    let page = Page::new_zeroed();
    let gref = env.grant(DRIVER, &page, Access::ReadWrite).unwrap();
    let read_only = env.grant(DRIVER, &page, Access::ReadOnly).unwrap();
    (rig, Liar { page, gref, read_only })
}

fn stage() -> (Rig, Liar) {
    stage_on(medium(geometry(8192, 512)), "w")
}

impl Liar {
    fn segment(&self, first_sect: u8, last_sect: u8) -> Segment {
        Segment { gref: self.gref, first_sect, last_sect, pad: 0 }
    }

    fn transfer(&self, operation: u8, sector: u64, segments: &[Segment]) -> Request {
        let mut request = Request::new_zeroed();
        (request.operation, request.sector) = (operation, sector);
        // The device number is not looked at.
        request.handle = 0xbeef;
        request.nr_segments = u8::try_from(segments.len()).unwrap();
        for (slot, segment) in request.segments.iter_mut().zip(segments) {
            *slot = *segment;
        }
        request
    }

    fn indirect(&self, inner: u8, sector: u64, segments: u16) -> IndirectRequest {
        let mut request = IndirectRequest::new_zeroed();
        (request.operation, request.indirect_op) = (INDIRECT, inner);
        (request.sector, request.nr_segments) = (sector, segments);
        request.grefs[0] = self.gref;
        request
    }
}

/// Sends requests by hand, and returns the answers' operations and states.
fn send(rig: &mut Rig, requests: &[Request]) -> Vec<(u8, i16)> {
    for (id, request) in (77_u64..).zip(requests) {
        rig.fronts[0].queues[0].ring.push(&Request { id, ..*request });
    }
    publish(&mut rig.fronts[0]);
    // The frontend's own loop must not see the answers.
    let front = rig.fronts.remove(0);
    rig.run();
    rig.fronts.insert(0, front);
    let ring = &mut rig.fronts[0].queues[0].ring;
    (77_u64..)
        .map_while(|id| {
            let (echoed, operation, status) = ring.take()?;
            assert_eq!(echoed, id);
            Some((operation, status))
        })
        .collect()
}

fn publish(front: &mut Front) {
    let _ = front.queues[0].ring.publish();
    let port = front.queues[0].port;
    front.env.notify(port);
}

/// The neighbour notices nothing.
fn neighbour_is_well(rig: &mut Rig) {
    let liar = rig.fronts.remove(0);
    rig.load(60);
    rig.compare(0, 0, 2048);
    rig.fronts.insert(0, liar);
    assert_eq!(rig.states(HONEST), (XenbusState::CONNECTED, XenbusState::CONNECTED));
}

/// Each bad request is answered with an error, and the connection goes on.
#[test]
fn bad_requests_are_answered_with_errors() {
    let (mut rig, liar) = stage();
    let good = liar.segment(0, 7);
    let nowhere = Segment { gref: GrantRef(1999), ..good };
    let discard = |sector, nr_sectors, flag| {
        let mut request = DiscardRequest::new_zeroed();
        (request.operation, request.flag) = (DISCARD, flag);
        (request.sector, request.nr_sectors) = (sector, nr_sectors);
        zerocopy::transmute!(request)
    };
    let read_only = Segment { gref: liar.read_only, ..good };
    let many = Request { nr_segments: 12, ..liar.transfer(READ, 0, &[good; 11]) };
    let cases: Vec<(Request, i16)> = vec![
        (liar.transfer(READ, 0, &[good]), RSP_OKAY),
        (liar.transfer(WRITE, SECTORS - 8, &[good]), RSP_OKAY),
        (liar.transfer(READ, 0, &[]), RSP_ERROR),
        (liar.transfer(WRITE, 0, &[]), RSP_ERROR),
        (many, RSP_ERROR),
        (Request { nr_segments: 255, ..many }, RSP_ERROR),
        (liar.transfer(READ, 0, &[liar.segment(5, 4)]), RSP_ERROR),
        (liar.transfer(READ, 0, &[liar.segment(0, 8)]), RSP_ERROR),
        (liar.transfer(READ, 0, &[good, liar.segment(255, 255)]), RSP_ERROR),
        (liar.transfer(READ, SECTORS - 7, &[good]), RSP_ERROR),
        (liar.transfer(WRITE, SECTORS, &[good]), RSP_ERROR),
        (liar.transfer(WRITE, u64::MAX - 7, &[good]), RSP_ERROR),
        (liar.transfer(READ, u64::MAX, &[good]), RSP_ERROR),
        (liar.transfer(READ, 0, &[nowhere]), RSP_ERROR),
        (liar.transfer(WRITE, 0, &[good, nowhere, good]), RSP_ERROR),
        (liar.transfer(READ, 0, &[read_only]), RSP_ERROR),
        (liar.transfer(WRITE, 0, &[read_only]), RSP_OKAY),
        (liar.transfer(WRITE_BARRIER, 0, &[good]), RSP_EOPNOTSUPP),
        (liar.transfer(4, 0, &[good]), RSP_EOPNOTSUPP),
        (liar.transfer(255, 0, &[good]), RSP_EOPNOTSUPP),
        (liar.transfer(FLUSH_DISKCACHE, 12345, &[]), RSP_OKAY),
        (discard(0, 8, 0), RSP_OKAY),
        (discard(0, 0, 0), RSP_ERROR),
        (discard(SECTORS - 1, 2, 0), RSP_ERROR),
        (discard(2, u64::MAX, 0), RSP_ERROR),
        (discard(0, 8, DISCARD_SECURE), RSP_EOPNOTSUPP),
        (liar.transfer(READ, 8, &[good]), RSP_OKAY),
    ];
    let requests: Vec<Request> = cases.iter().map(|case| case.0).collect();
    let answers = send(&mut rig, &requests);
    let wanted: Vec<(u8, i16)> = cases.iter().map(|case| (case.0.operation, case.1)).collect();
    assert_eq!(answers, wanted);
    let errors = wanted.iter().filter(|it| it.1 != RSP_OKAY).count();
    assert_eq!(rig.vbd(LIAR).stats.errors, errors as u64);
    neighbour_is_well(&mut rig);
    assert_eq!(rig.states(LIAR), (XenbusState::CONNECTED, XenbusState::CONNECTED));
    // Nothing of it stays mapped.
    rig.fronts[0].env.revoke(liar.gref).unwrap();
    rig.fronts[0].env.revoke(liar.read_only).unwrap();
    rig.close_all();
}

/// No disk is asked for them, so nothing but the backend itself remembers that there are more.
#[test]
fn a_ring_full_of_bad_requests_is_answered() {
    let mut rig = Rig::new(vec![medium(geometry(8192, 512))], 2);
    let config = Config { order: 2, ..Config::default() };
    rig.add_guest(LIAR, "whole", "w", config);
    let bad = Request { operation: 99, ..Request::new_zeroed() };
    assert_eq!(send(&mut rig, &[bad; 128]), [(99, RSP_EOPNOTSUPP); 128]);
}

#[test]
fn bad_indirect_requests_are_answered_with_errors() {
    let (mut rig, liar) = stage();
    let data = Page::new_zeroed();
    let gref = rig.fronts[0].env.grant(DRIVER, &data, Access::ReadWrite).unwrap();
    let good = Segment { gref, first_sect: 0, last_sect: 7, pad: 0 };
    let bad = Segment { gref, first_sect: 3, last_sect: 2, pad: 0 };
    for at in 0..512 {
        liar.page.write(8 * at, if at == 100 { bad } else { good }.as_bytes());
    }
    let cases: Vec<(IndirectRequest, (u8, i16))> = vec![
        (liar.indirect(WRITE, 0, 100), (WRITE, RSP_OKAY)),
        (liar.indirect(READ, 0, 1), (READ, RSP_OKAY)),
        (liar.indirect(READ, 0, 0), (READ, RSP_ERROR)),
        (liar.indirect(READ, 0, 101), (READ, RSP_ERROR)),
        (liar.indirect(READ, 0, 257), (READ, RSP_ERROR)),
        (liar.indirect(WRITE, 0, u16::MAX), (WRITE, RSP_ERROR)),
        (liar.indirect(READ, SECTORS - 8, 2), (READ, RSP_ERROR)),
        (liar.indirect(READ, u64::MAX - 15, 2), (READ, RSP_ERROR)),
        (liar.indirect(FLUSH_DISKCACHE, 0, 1), (FLUSH_DISKCACHE, RSP_EOPNOTSUPP)),
        (liar.indirect(INDIRECT, 0, 1), (INDIRECT, RSP_EOPNOTSUPP)),
        (
            IndirectRequest { grefs: [GrantRef(1999); 8], ..liar.indirect(READ, 0, 2) },
            (READ, RSP_ERROR),
        ),
    ];
    let requests: Vec<Request> = cases.iter().map(|case| zerocopy::transmute!(case.0)).collect();
    let wanted: Vec<(u8, i16)> = cases.iter().map(|case| case.1).collect();
    assert_eq!(send(&mut rig, &requests), wanted);
    neighbour_is_well(&mut rig);
    rig.fronts[0].env.revoke(liar.gref).unwrap();
    rig.fronts[0].env.revoke(liar.read_only).unwrap();
    rig.fronts[0].env.revoke(gref).unwrap();
    rig.close_all();
}

#[test]
fn a_disk_with_large_sectors_takes_whole_ones_only() {
    let (mut rig, liar) = stage_on(medium(geometry(8192, 4096)), "w");
    let (half, good) = (liar.segment(0, 3), liar.segment(0, 7));
    let requests = [
        liar.transfer(READ, 0, &[half]),
        liar.transfer(WRITE, 4, &[good]),
        liar.transfer(READ, 8, &[half, half]),
        liar.transfer(READ, 8, &[good]),
    ];
    let answers: Vec<i16> = send(&mut rig, &requests).iter().map(|it| it.1).collect();
    assert_eq!(answers, [RSP_ERROR, RSP_ERROR, RSP_OKAY, RSP_OKAY]);
}

#[test]
fn a_disk_that_may_only_be_read_is_only_read() {
    let locked = Geometry { read_only: true, ..geometry(8192, 512) };
    for (disk, mode) in [(geometry(8192, 512), "r"), (locked, "w")] {
        let mut rig = Rig::new(vec![medium(disk)], 1);
        let front = |rig: &mut Rig| {
            rig.add_guest(LIAR, "range:0+512K", mode, Config::default());
            let page = Page::new_zeroed();
            let gref = rig.fronts[0].env.grant(DRIVER, &page, Access::ReadWrite).unwrap();
            Liar { page, gref, read_only: gref }
        };
        let liar = front(&mut rig);
        assert_eq!(rig.fronts[0].key("info"), Some(4));
        let good = liar.segment(0, 7);
        let mut discard = DiscardRequest::new_zeroed();
        (discard.operation, discard.nr_sectors) = (DISCARD, 8);
        let requests = [
            liar.transfer(WRITE, 0, &[good]),
            zerocopy::transmute!(discard),
            zerocopy::transmute!(liar.indirect(WRITE, 0, 1)),
            liar.transfer(READ, 0, &[good]),
            liar.transfer(FLUSH_DISKCACHE, 0, &[]),
        ];
        let answers: Vec<i16> = send(&mut rig, &requests).iter().map(|it| it.1).collect();
        assert_eq!(answers, [RSP_ERROR, RSP_ERROR, RSP_ERROR, RSP_OKAY, RSP_OKAY]);
        assert!(rig.vbd(LIAR).read_only);
    }
}

/// xen-abi §7.1: counters that cannot be end the connection, with a message.
#[test]
fn impossible_counters_end_the_connection() {
    let (mut rig, _liar) = stage();
    rig.fronts[0].queues[0].pages[0].u32(REQ_PROD).store(33, Relaxed);
    let port = rig.fronts[0].queues[0].port;
    rig.fronts[0].env.notify(port);
    let liar = rig.fronts.remove(0);
    rig.run();
    rig.fronts.insert(0, liar);
    assert_eq!(rig.states(LIAR).0, XenbusState::CLOSING);
    assert!(rig.error_of(LIAR).unwrap().contains("ring counter"));
    assert!(rig.vbd(LIAR).fault.unwrap().contains("queue 0"));
    neighbour_is_well(&mut rig);
    rig.run();
    assert_eq!(rig.states(LIAR), (XenbusState::CLOSED, XenbusState::CLOSED));
}

/// What a frontend publishes is checked as well.
#[test]
fn impossible_keys_end_the_connection() {
    for (key, value, message) in [
        ("ring-ref", "4000", "mapping ring page 4000"),
        ("ring-ref", "x", "key `ring-ref`"),
        ("event-channel", "1022", "binding port 1022"),
        ("event-channel", "", "key `event-channel`"),
        ("multi-queue-num-queues", "5", "5 queues"),
        ("multi-queue-num-queues", "0", "0 queues"),
        ("ring-page-order", "3", "larger than order 2"),
        ("ring-page-order", "1", "key `ring-ref0`"),
        ("protocol", "sparc", "`protocol` is unknown: sparc"),
    ] {
        let mut rig = Rig::new(vec![medium(geometry(8192, 512))], 1);
        rig.add_unconnected(LIAR, "whole", "w", Config::default());
        rig.fuse.light(0);
        rig.kill_back();
        rig.fronts[0].turn();
        rig.start_back();
        let mut front = rig.fronts.remove(0);
        rig.run();
        front.turn();
        front.write_key(key, value);
        rig.run();
        let error = rig.error_of(LIAR).unwrap();
        assert!(error.contains(message), "{key}: {error}");
        assert_eq!(rig.states(LIAR).0, XenbusState::CLOSING, "{key}");
        assert_eq!(rig.back().env.domain.mappings(), 0);
        assert_eq!(rig.back().env.domain.open_ports(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Whatever stands in the slots, each request gets its answer, nothing but the liar's range
    /// is touched, and nothing stays mapped.
    #[test]
    fn garbage_is_answered(slots in proptest::collection::vec(
        (proptest::array::uniform32(any::<u8>()), 0_u8..8, 0_u8..4, any::<bool>()), 1..32
    )) {
        let (mut rig, liar) = stage();
        rig.load(20);
        let requests: Vec<Request> = slots.iter().map(|(bytes, operation, segments, near)| {
            let mut slot = [0; 112];
            for part in slot.chunks_mut(32) {
                part.copy_from_slice(&bytes[..part.len()]);
            }
            let mut request = Request::read_from_bytes(&slot).unwrap();
            request.operation = *operation;
            if *near {
                request.nr_segments = *segments;
                request.sector %= SECTORS + 8;
                for segment in &mut request.segments {
                    *segment = Segment { gref: liar.gref, first_sect: segment.first_sect % 9, last_sect: segment.last_sect % 9, pad: 0 };
                }
            }
            request
        }).collect();
        let answers = send(&mut rig, &requests);
        prop_assert_eq!(answers.len(), requests.len());
        rig.fronts[0].env.revoke(liar.gref).unwrap();
        rig.fronts[0].env.revoke(liar.read_only).unwrap();
        neighbour_is_well(&mut rig);
    }
}
