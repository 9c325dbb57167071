//! Requests that do not end well, and disks that stop working.

use super::*;
use crate::command::ata;
use crate::model::{Adapter, Faults, ModelDisk};
use crate::notice::Event;
use crate::recovery::{ATTEMPTS, LONG_NS, TRANSFER_NS};
use crate::{Hang, Unusable};

fn bench(faults: Faults) -> Bench {
    bench_of(faults, true)
}

fn bench_of(faults: Faults, ncq: bool) -> Bench {
    let adapter = Adapter { ncq, ..Adapter::default() };
    let mut disk = ModelDisk::new(4096, 512);
    disk.faults = faults;
    let disks = [Some(disk), Some(ModelDisk::new(64, 512)), None, None];
    Bench::new(Model::new(adapter, disks))
}

fn events(bench: &mut Bench) -> Vec<Event> {
    std::iter::from_fn(|| bench.driver.event()).map(|(_, event)| event).collect()
}

/// The bad request of many fails, and no other, whether the disk tells which one it was or not.
#[test]
fn a_medium_error_fails_one_request() {
    for (ncq, no_log, bad_log) in
        [(true, false, false), (true, true, false), (true, false, true), (false, false, false)]
    {
        let bad = [83].into_iter().collect();
        let mut bench = bench_of(Faults { bad, no_log, bad_log, ..Faults::default() }, ncq);
        for at in 0..20 {
            bench.transfer(Operation::Write, at * 8, 8, 0);
        }
        let results = bench.finish();
        for at in 0..20 {
            let expected = if at == 10 { Err(DiskError::Medium) } else { Ok(()) };
            assert_eq!(results[&at], expected, "request {at}, log {no_log} {bad_log}, NCQ {ncq}");
        }
        let log = bench.model.disk(0).count(ata::READ_LOG_EXT);
        let resets = bench.model.resets(0);
        match (ncq, no_log || bad_log) {
            (false, _) => assert_eq!((log, resets), (0, 0)),
            (true, false) => assert_eq!((log, resets), (1, 0)),
            (true, true) => assert!(log >= 1 && resets >= 1),
        }
        assert_eq!(bench.model.disk(0).cache.len(), 19 * 8);
        bench.assert_no_violations();
    }
}

#[test]
fn only_one_command_is_with_a_disk_while_the_guilty_one_is_sought() {
    let bad = [8].into_iter().collect();
    let mut bench = bench(Faults { bad, no_log: true, ..Faults::default() });
    for at in 0..4 {
        bench.transfer(Operation::Write, at * 8, 8, 0);
    }
    bench.kick();
    bench.model.step(0, 1);
    bench.turn();
    assert_eq!(bench.complete(), None);
    for left in (0..4).rev() {
        assert_eq!(bench.model.pending(0).len(), 1);
        bench.model.step(0, 0);
        bench.turn();
        assert!(bench.complete().is_some());
        assert_eq!(bench.model.pending(0).is_empty(), left == 0);
    }
    bench.transfer(Operation::Write, 100, 8, 0);
    bench.transfer(Operation::Write, 200, 8, 0);
    bench.kick();
    assert_eq!(bench.model.pending(0).len(), 2, "together again");
    bench.assert_no_violations();
}

#[test]
fn what_passes_is_tried_again_and_what_does_not_pass_fails_in_the_end() {
    let attempts = u32::from(ATTEMPTS);
    for ncq in [true, false] {
        for (few, many) in [
            (
                Faults { damaged: attempts - 1, ..Faults::default() },
                Faults { damaged: 1000, ..Faults::default() },
            ),
            (
                Faults { device_faults: attempts - 1, ..Faults::default() },
                Faults { device_faults: 1000, ..Faults::default() },
            ),
            (
                Faults { interface: attempts - 1, ..Faults::default() },
                Faults { interface: 1000, ..Faults::default() },
            ),
            (
                Faults { hangs: attempts - 1, ..Faults::default() },
                Faults { hangs: 1000, ..Faults::default() },
            ),
        ] {
            let mut good = bench_of(few, ncq);
            let tag = good.transfer(Operation::Write, 0, 8, 0).expect("room");
            assert_eq!(good.finish()[&tag.0], Ok(()));
            good.assert_no_violations();
            let mut bad = bench_of(many, ncq);
            let tag = bad.transfer(Operation::Write, 0, 8, 0).expect("room");
            assert!(bad.finish()[&tag.0].is_err());
            bad.assert_no_violations();
            let count: u32 = bad.model.disk(0).counts.values().sum();
            assert!(count < 20, "{count} commands");
        }
    }
}

#[test]
fn a_command_without_an_answer_is_given_its_time_and_then_issued_again() {
    let mut bench = bench(Faults { hangs: 1, ..Faults::default() });
    bench.transfer(Operation::Write, 0, 8, 0);
    bench.transfer(Operation::Read, 8, 8, 0);
    bench.kick();
    bench.model.step(0, 0);
    let begin = bench.model.now_ns();
    while bench.model.resets(0) == 0 {
        bench.model.advance(250_000_000);
        bench.driver.check(bench.model.now_ns()).expect("works");
    }
    let waited = bench.model.now_ns() - begin;
    assert!((TRANSFER_NS..TRANSFER_NS + 1_000_000_000).contains(&waited), "{waited} ns");
    assert_eq!(events(&mut bench)[0], Event::TimedOut(2));
    assert_eq!(bench.finish().into_values().collect::<Vec<_>>(), [Ok(()), Ok(())]);
    bench.assert_no_violations();
}

#[test]
fn a_flush_has_more_time() {
    let mut bench = bench(Faults { hangs: 1, ..Faults::default() });
    let tag = bench.submit(Operation::Flush, 0, 0).expect("room");
    bench.kick();
    bench.model.step(0, 0);
    let begin = bench.model.now_ns();
    assert_eq!(bench.finish()[&tag.0], Ok(()));
    assert!(bench.model.now_ns() - begin > LONG_NS);
}

/// The second flush could succeed without the data that the first one lost.
#[test]
fn a_flush_that_failed_is_not_tried_again() {
    let mut bench = bench(Faults { flushes: 1, ..Faults::default() });
    bench.transfer(Operation::Write, 0, 8, 0);
    bench.finish();
    let tag = bench.submit(Operation::Flush, 0, 0).expect("room");
    assert_eq!(bench.finish()[&tag.0], Err(DiskError::Failed));
    assert_eq!(bench.model.disk(0).count(ata::FLUSH_CACHE_EXT), 1);
    let tag = bench.submit(Operation::Flush, 0, 0).expect("room");
    assert_eq!(bench.finish()[&tag.0], Ok(()));
}

/// A disk that was unplugged may have lost its power, and with it what it had in its cache.
#[test]
fn after_the_link_was_lost_one_flush_fails() {
    let mut bench = bench(Faults::default());
    bench.transfer(Operation::Write, 0, 8, 0);
    bench.finish();
    let same = bench.model.disk(0).clone();
    bench.model.plug(0, Some(same));
    bench.transfer(Operation::Write, 8, 8, 0);
    assert_eq!(bench.finish()[&1], Ok(()));
    let tag = bench.submit(Operation::Flush, 0, 0).expect("room");
    assert_eq!(bench.finish()[&tag.0], Err(DiskError::Failed));
    let tag = bench.submit(Operation::Flush, 0, 0).expect("room");
    assert_eq!(bench.finish()[&tag.0], Ok(()));
    assert!(events(&mut bench).contains(&Event::FlushRefused));
    bench.assert_no_violations();
}

#[test]
fn another_disk_in_the_same_place_is_not_written_to() {
    let mut bench = bench(Faults::default());
    bench.transfer(Operation::Write, 0, 8, 0);
    bench.kick();
    let mut other = ModelDisk::new(4096, 512);
    other.identify[20..22].copy_from_slice(b"XX");
    bench.model.plug(0, Some(other));
    assert_eq!(bench.finish()[&0], Err(DiskError::Aborted));
    assert!(events(&mut bench).contains(&Event::GivenUp(Unusable::Exchanged)));
    assert!(bench.model.disk(0).content().is_empty());
    bench.assert_no_violations();
}

#[test]
fn a_disk_that_is_gone_fails_everything_and_the_next_port_works() {
    let mut bench = bench(Faults::default());
    let first = bench.transfer(Operation::Write, 0, 8, 0).expect("room");
    bench.kick();
    bench.model.set_clock_step(1_000_000);
    bench.model.plug(0, None);
    assert_eq!(bench.finish()[&first.0], Err(DiskError::Aborted));
    for _ in 0..100 {
        let tag = bench.transfer(Operation::Write, 0, 8, 0).expect("room");
        assert_eq!(bench.finish()[&tag.0], Err(DiskError::Aborted));
    }
    assert!(events(&mut bench).contains(&Event::GivenUp(Unusable::NotReady)));
    let page = page(&bench.model);
    let buffers = [Buffer { page: &page, offset: 0, len: 4096 }];
    let operation = Operation::Write;
    let request = Request { tag: Tag(7), operation, sector: 0, sectors: 8, buffers: &buffers };
    assert!(bench.driver.disks()[1].submit(request).is_ok());
    bench.driver.disks()[1].kick();
    bench.model.run();
    assert_eq!(bench.model.messages(), 1);
    bench.driver.interrupt();
    let completion = Completion { tag: Tag(7), result: Ok(()) };
    assert_eq!(bench.driver.disks()[1].complete(), Some(completion));
    bench.assert_no_violations();
}

/// A reset may make a disk spin up; others are served meanwhile, and requests wait.
#[test]
fn a_disk_may_take_seconds_to_come_back() {
    let mut bench = bench(Faults { interface: 1, ..Faults::default() });
    bench.model.disk(0).ready_ns = 3_000_000_000;
    bench.transfer(Operation::Write, 0, 8, 0);
    bench.kick();
    bench.model.step(0, 0);
    let begin = bench.model.now_ns();
    bench.turn();
    assert_eq!(bench.complete(), None);
    assert!(bench.model.now_ns() - begin < 100_000_000, "nobody stands still for it");
    bench.transfer(Operation::Read, 8, 8, 0);
    bench.kick();
    assert!(bench.model.pending(0).is_empty());
    assert_eq!(bench.finish().into_values().collect::<Vec<_>>(), [Ok(()), Ok(())]);
    bench.assert_no_violations();
}

#[test]
fn a_disk_that_never_comes_back_is_given_up() {
    let mut bench = bench(Faults { interface: 1, no_link: true, ..Faults::default() });
    bench.model.set_clock_step(100_000);
    let tag = bench.transfer(Operation::Write, 0, 8, 0).expect("room");
    assert_eq!(bench.finish()[&tag.0], Err(DiskError::Aborted));
    assert_eq!(bench.model.resets(0), 3);
    bench.assert_no_violations();
}

#[test]
fn an_adapter_that_does_not_obey_is_a_hang() {
    let mut bench = bench(Faults { interface: 1, ..Faults::default() });
    bench.transfer(Operation::Write, 0, 8, 0);
    bench.kick();
    bench.model.set_adapter(|adapter| adapter.stuck_engine = true);
    bench.model.step(0, 0);
    bench.turn();
    assert_eq!(bench.complete(), None, "a restart will repeat it");
    assert_eq!(bench.driver.check(0), Err(Hang::Port(0)));
    bench.model.set_adapter(|adapter| adapter.gone = true);
    assert_eq!(bench.driver.check(0), Err(Hang::Gone));
}

#[test]
fn a_disk_that_always_fails_does_not_fill_memory_with_events() {
    let bad = (0..4096).collect();
    let mut bench = bench(Faults { bad, ..Faults::default() });
    for _ in 0..100 {
        bench.transfer(Operation::Read, 0, 8, 0);
        bench.finish();
    }
    let events = events(&mut bench);
    assert_eq!(events.len(), 9);
    assert!(matches!(events[8], Event::Dropped(_)));
}
