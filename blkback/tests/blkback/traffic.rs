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
        for segments in [32, 256] {
            let config = Config { persistent, segments, ..Config::default() };
            exercise(geometry(16384, 512), config, 200).close_all();
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
