//! Requests of honest frontends, in every form.

use crate::disk::{geometry, medium};
use crate::front::Config;
use crate::rig::Rig;
use domain_api::disk::{Geometry, Operation};

const GUEST: u16 = 3;

/// A guest with a load on a disk; ends with everything compared and closed.
fn exercise(geometry: Geometry, config: Config, requests: u32) -> Rig {
    let mut rig = Rig::new(vec![medium(geometry)], 2);
    rig.add_guest(GUEST, "whole", "w", config);
    rig.load(requests);
    assert_eq!(rig.fronts[0].answered, requests);
    rig.compare(0, 0, 0);
    let stats = rig.vbd(GUEST).stats;
    let answered = stats.reads + stats.writes + stats.flushes + stats.discards + stats.errors;
    assert_eq!(answered, u64::from(requests));
    rig
}

#[test]
fn requests_of_every_kind_are_served() {
    for persistent in [false, true] {
        for narrow in [false, true] {
            let config = Config { persistent, narrow, ..Config::default() };
            exercise(geometry(4096, 512), config, 700).close_all();
        }
    }
}

#[test]
fn indirect_requests_are_served() {
    for persistent in [false, true] {
        for (segments, requests) in [(32, 150), (256, 40)] {
            let config = Config { persistent, segments, ..Config::default() };
            exercise(geometry(8192, 512), config, requests).close_all();
        }
    }
}

#[test]
fn rings_of_several_pages_and_several_queues_are_served() {
    for (order, queues) in [(1, 1), (2, 1), (0, 4), (2, 4)] {
        let config = Config { order, queues, persistent: queues == 4, ..Config::default() };
        exercise(geometry(16384, 512), config, 700).close_all();
    }
}

/// Segments that begin and end anywhere, on a disk that wants whole sectors of 4096 bytes: what
/// cannot be cut otherwise is gathered.
#[test]
fn disks_with_large_sectors_are_served() {
    for whole_pages in [false, true] {
        let config = Config { segments: 32, ..Config::default() };
        let geometry = Geometry { whole_pages, ..geometry(16384, 4096) };
        let mut rig = exercise(geometry, config, 400);
        assert_eq!(rig.vbd(GUEST).stats.bounced > 0, whole_pages);
        rig.close_all();
    }
}

#[test]
fn a_disk_that_takes_little_at_a_time_gets_little() {
    let geometry = Geometry {
        max_sectors: 8,
        max_buffers: 2,
        queue_depth: 1,
        max_discard_sectors: 3,
        ..geometry(8192, 512)
    };
    let mut rig = exercise(geometry, Config::default(), 300);
    let stats = rig.vbd(GUEST).stats;
    assert!(stats.disk_requests > stats.reads + stats.writes + stats.flushes);
    rig.close_all();
}

/// A guest whose grants are persistent costs no hypercall beside notifications once it is warm.
#[test]
fn pages_that_stay_mapped_cost_no_hypercall() {
    let config = Config { persistent: true, ragged: false, segments: 1, ..Config::default() };
    let mut rig = Rig::new(vec![medium(geometry(4096, 512))], 1);
    rig.add_guest(GUEST, "whole", "w", config);
    rig.load(2000);
    let calls = rig.back().env.calls;
    rig.load(1000);
    assert!(rig.back().env.calls - calls <= 40, "only what the frontend dropped and made anew");
    assert!(rig.vbd(GUEST).stats.persistent_hits > 2000);
    rig.close_all();
}

/// A flush is one of the disk's, after the writes that were answered before.
#[test]
fn flushes_reach_the_disk() {
    let mut rig = exercise(geometry(4096, 512), Config::default(), 1000);
    let flushes = rig.vbd(GUEST).stats.flushes;
    let log = &rig.media[0].borrow().log;
    let at_disk = log.iter().filter(|it| it.0 == Operation::Flush).count();
    assert!(flushes > 20 && at_disk as u64 == flushes);
}

/// xen-abi §7.2: without persistent grants, pages are unmapped before the answer is published.
#[test]
fn pages_are_unmapped_before_the_answer() {
    let mut rig = Rig::new(vec![medium(geometry(4096, 512))], 1);
    rig.add_guest(GUEST, "whole", "w", Config::default());
    rig.back().env.mapped.clear();
    for _ in 0..40 {
        rig.load(1);
    }
    let mapped = &rig.back().env.mapped;
    assert!(mapped.len() == 40 && mapped.iter().all(|&pages| pages == 1), "{mapped:?}");
}

/// Two guests want far more pages mapped than there are handles: everything is served, in turns.
#[test]
fn more_pages_than_handles_are_mapped_in_turns() {
    let mut rig = Rig::new(vec![medium(Geometry { queue_depth: 64, ..geometry(65536, 512) })], 2);
    let config = Config { segments: 256, ragged: false, order: 1, ..Config::default() };
    rig.add_guest(3, "range:0+16M", "w", config);
    rig.add_guest(4, "range:16M+16M", "w", Config { persistent: true, ..config });
    rig.media[0].borrow_mut().stuck = true;
    for front in &mut rig.fronts {
        front.work += 60;
        front.wake();
    }
    rig.run();
    let mapped = rig.back().env.domain.mappings();
    assert!((1500..2048).contains(&mapped), "{mapped}");
    rig.media[0].borrow_mut().stuck = false;
    rig.fronts[0].work += 1;
    rig.fronts[0].wake();
    rig.run();
    assert_eq!((rig.fronts[0].answered, rig.fronts[1].answered), (61, 60));
    rig.close_all();
}

/// What cannot be read or written is an error, and only that.
#[test]
fn errors_of_the_disk_reach_the_guest() {
    let mut rig = Rig::new(vec![medium(geometry(4096, 512))], 1);
    rig.add_guest(GUEST, "range:64K+1M", "w", Config::default());
    rig.media[0].borrow_mut().bad.extend([128 + 100, 128 + 1000]);
    rig.fronts[0].bad = vec![100, 1000];
    rig.load(500);
    let errors = rig.fronts[0].errors;
    assert!(errors > 5);
    assert_eq!(rig.vbd(GUEST).stats.errors, u64::from(errors));
    rig.compare(0, 0, 128);
    rig.close_all();
}
