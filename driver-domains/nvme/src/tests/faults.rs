//! Controllers that fail.

use super::*;
use crate::model::{Fault, Faults, Status};
use crate::{ABORT_TIMEOUT_NS, COMMAND_TIMEOUT_NS, Hang};
use domain_api::disk::DiskError;

const TICK_NS: u64 = 250_000_000;

/// Looks after the controller every tick from `now_ns` on, for so long.
fn look_after(nvme: &mut Nvme<Model>, now_ns: u64, for_ns: u64) -> Result<(), Hang> {
    for tick in 0..=for_ns / TICK_NS {
        nvme.check(now_ns + tick * TICK_NS)?;
    }
    Ok(())
}

/// A started rig with one read under way.
fn reading(setup: Setup) -> (Rig, Domain, Nvme<Model>, Vec<DmaPage>) {
    let rig = Rig::new(setup, vec![RamDisk::new(1, 9, 1000)]);
    let (mut domain, mut nvme) = rig.start();
    let memory = pages(&mut domain, 1);
    read(&mut nvme, &memory, 1);
    (rig, domain, nvme, memory)
}

fn read(nvme: &mut Nvme<Model>, memory: &[DmaPage], tag: u32) {
    let disk = &mut nvme.namespaces()[0];
    disk.submit(request(Operation::Read, tag, 0, 1, &buffers(memory, 0, 1))).expect("room");
    disk.kick();
}

#[test]
fn each_status_becomes_the_error_that_it_is() {
    let cases = [
        (Status::UNRECOVERED_READ, DiskError::Medium),
        (Status::WRITE_FAULT, DiskError::Medium),
        (Status(0x282), DiskError::Medium),
        (Status::LBA_OUT_OF_RANGE, DiskError::OutOfRange),
        (Status::CAPACITY_EXCEEDED, DiskError::NoSpace),
        (Status::NAMESPACE_WRITE_PROTECTED, DiskError::ReadOnly),
        (Status::READ_ONLY_RANGE, DiskError::ReadOnly),
        (Status::INVALID_OPCODE, DiskError::Unsupported),
        (Status::ABORT_REQUESTED, DiskError::Aborted),
        (Status::ABORT_QUEUE_DELETED, DiskError::Aborted),
        (Status::INTERNAL, DiskError::Failed),
        (Status(0x7ff), DiskError::Failed),
    ];
    for (status, error) in cases {
        let (rig, _domain, mut nvme, _memory) = reading(Setup::default());
        rig.model.run_with(0, Fault::Failed(status.final_one()));
        let completion = nvme.namespaces()[0].complete().expect("it ended");
        assert_eq!(completion.result, Err(error), "{status}");
        assert_eq!(nvme.statistics().retries, 0, "do not retry");
    }
}

#[test]
fn what_may_be_retried_is_retried_three_times_a_tick_apart() {
    for failures in 1..=4 {
        let (rig, _domain, mut nvme, memory) = reading(Setup::default());
        for attempt in 1..=failures {
            rig.model.run_with(0, Fault::Failed(Status::NAMESPACE_NOT_READY));
            assert_eq!(rig.model.pending_count(), 0);
            let ended = nvme.namespaces()[0].complete();
            if attempt == 4 {
                assert_eq!(ended.map(|it| it.result), Some(Err(DiskError::Failed)));
            } else {
                assert_eq!(ended, None);
                assert!(nvme.check(attempt * TICK_NS).is_ok());
                assert_eq!(rig.model.pending_count(), 1, "it was given again");
            }
        }
        if failures < 4 {
            rig.model.run_all();
            assert_eq!(nvme.namespaces()[0].complete(), done(1));
        }
        assert_eq!(nvme.statistics().retries, failures.min(3));
        read(&mut nvme, &memory, 2);
        rig.model.run_all();
        assert_eq!(nvme.namespaces()[0].complete(), done(2));
    }
}

#[test]
fn a_failure_is_reported_once_with_the_controllers_log() {
    let (rig, _domain, mut nvme, memory) = reading(Setup::default());
    rig.model.run_with(0, Fault::Failed(Status::UNRECOVERED_READ.final_one()));
    assert!(nvme.namespaces()[0].complete().is_some());
    assert_eq!(nvme.check(0), Ok(None), "the log is being read");
    let report = nvme.check(TICK_NS).expect("well").expect("a report");
    let text = report.to_string();
    assert!(text.contains("command 0x02 for namespace 1 failed: unrecovered read error"), "{text}");
    assert!(text.contains("error 1 of the controller's log: queue 1"), "{text}");
    let mut reports = Vec::new();
    for tick in 2..300 {
        read(&mut nvme, &memory, 1);
        rig.model.run_with(0, Fault::Failed(Status::UNRECOVERED_READ.final_one()));
        assert!(nvme.namespaces()[0].complete().is_some());
        if nvme.check(tick * TICK_NS).expect("well").is_some() {
            reports.push(tick);
        }
    }
    assert_eq!(reports, [241], "the next one a minute later");
}

#[test]
fn a_slow_command_is_aborted_and_given_again() {
    let (rig, _domain, mut nvme, _memory) = reading(Setup::default());
    assert_eq!(look_after(&mut nvme, 0, COMMAND_TIMEOUT_NS), Ok(()));
    assert_eq!(nvme.statistics().aborts, 0);
    assert_eq!(nvme.check(COMMAND_TIMEOUT_NS + TICK_NS), Ok(None));
    assert_eq!(nvme.statistics().aborts, 1);
    assert_eq!(rig.model.pending_count(), 0, "aborted");
    assert_eq!(nvme.namespaces()[0].complete(), None, "it will be tried again");
    assert_eq!(nvme.check(COMMAND_TIMEOUT_NS + 2 * TICK_NS), Ok(None));
    assert_eq!(rig.model.pending_count(), 1);
    rig.model.run_all();
    assert_eq!(nvme.namespaces()[0].complete(), done(1));
}

#[test]
fn a_lost_completion_ends_in_a_hang() {
    for fault in [Fault::Lost, Fault::WrongPhase] {
        let (rig, _domain, mut nvme, _memory) = reading(Setup::default());
        rig.model.run_with(0, fault);
        assert_eq!(nvme.namespaces()[0].complete(), None);
        let limit = COMMAND_TIMEOUT_NS + ABORT_TIMEOUT_NS;
        assert_eq!(look_after(&mut nvme, 0, limit), Ok(()));
        assert_eq!(nvme.statistics().aborts, 1, "only once");
        assert_eq!(nvme.check(limit + TICK_NS), Err(Hang::Timeout));
    }
}

#[test]
fn a_silent_controller_is_a_hang() {
    let (rig, _domain, mut nvme, _memory) = reading(Setup::default());
    rig.model.set_faults(Faults { silent_admin: true, ..Faults::default() });
    let limit = COMMAND_TIMEOUT_NS + ABORT_TIMEOUT_NS + TICK_NS;
    assert_eq!(look_after(&mut nvme, 0, limit), Err(Hang::Timeout));
    let (rig, _domain, mut nvme, _memory) = reading(Setup::default());
    rig.model.run_with(0, Fault::Failed(Status::INTERNAL.final_one()));
    rig.model.set_faults(Faults { silent_admin: true, ..Faults::default() });
    assert!(nvme.namespaces()[0].complete().is_some());
    let limit = crate::admin::ADMIN_NS + TICK_NS;
    assert_eq!(look_after(&mut nvme, 0, limit), Err(Hang::Admin), "it does not give its log");
}

#[test]
fn a_long_queue_of_served_commands_is_no_hang() {
    let (rig, _domain, mut nvme, memory) = reading(Setup::default());
    for tick in 0..400 {
        read(&mut nvme, &memory, 2);
        rig.model.run(0);
        assert!(nvme.namespaces()[0].complete().is_some());
        assert_eq!(nvme.check(tick * TICK_NS), Ok(None));
    }
    assert_eq!(nvme.statistics().aborts, 0);
}

#[test]
fn completions_of_nothing_are_counted_and_not_believed() {
    let (rig, _domain, mut nvme, memory) = reading(Setup::default());
    let id = rig.model.pending()[0].id;
    rig.model.run_with(0, Fault::Twice);
    assert_eq!(nvme.namespaces()[0].complete(), done(1));
    assert_eq!(nvme.namespaces()[0].complete(), None);
    assert!(!nvme.arm(), "nothing that the owner could wait for");
    assert_eq!(nvme.check(0), Ok(None));
    assert_eq!(nvme.statistics().strays, 1);
    // The next is in the same slot, with the next generation.
    let next = id + 64;
    for (n, wrong) in (2..).zip([id, next + 64, next + 60, next | 63, u16::MAX, 0]) {
        read(&mut nvme, &memory, n);
        rig.model.run_with(0, Fault::WrongId(wrong));
        assert_eq!(nvme.namespaces()[0].complete(), None, "{wrong:#x}");
        assert_eq!(nvme.statistics().strays, u64::from(n));
    }
    assert_eq!(nvme.check(1), Ok(None), "a few are only odd");
    read(&mut nvme, &memory, 50);
    rig.model.run_with(0, Fault::WrongQueue(3));
    assert_eq!(nvme.namespaces()[0].complete(), None);
}

#[test]
fn a_duplicate_after_the_slot_is_in_use_again_is_known_by_its_generation() {
    let (rig, _domain, mut nvme, memory) = reading(Setup::default());
    let id = rig.model.pending()[0].id;
    rig.model.run(0);
    assert_eq!(nvme.namespaces()[0].complete(), done(1));
    read(&mut nvme, &memory, 2); // In the same slot.
    read(&mut nvme, &memory, 3);
    assert_eq!(rig.model.pending()[0].id & 63, id & 63);
    rig.model.run_with(1, Fault::WrongId(id));
    assert_eq!(nvme.namespaces()[0].complete(), None, "that was the command before");
    rig.model.run(0);
    assert_eq!(nvme.namespaces()[0].complete(), done(2));
}

#[test]
fn too_many_completions_of_nothing_are_a_hang() {
    let (rig, _domain, mut nvme, memory) = reading(Setup::default());
    for tag in 2..100 {
        rig.model.run_with(0, Fault::Twice);
        while nvme.namespaces()[0].complete().is_some() {}
        read(&mut nvme, &memory, tag);
    }
    assert_eq!(nvme.check(1), Err(Hang::Strays));
}

#[test]
fn a_broken_controller_is_found_at_the_next_look() {
    let (rig, _domain, mut nvme, _memory) = reading(Setup::default());
    assert_eq!(nvme.check(0), Ok(None));
    rig.model.fail();
    assert_eq!(nvme.check(1), Err(Hang::Fatal));
    let (rig, _domain, mut nvme, _memory) = reading(Setup::default());
    rig.model.set_faults(Faults { gone: true, ..Faults::default() });
    assert_eq!(nvme.check(1), Err(Hang::Gone));
    let (rig, _domain, mut nvme, _memory) = reading(Setup::default());
    rig.model.lose_power();
    assert_eq!(nvme.check(1), Err(Hang::NotReady));
}

#[test]
fn a_lost_interrupt_only_delays_the_news() {
    let (rig, _domain, mut nvme, _memory) = reading(Setup::default());
    rig.model.set_faults(Faults { lost_interrupts: true, ..Faults::default() });
    let _ = rig.model.messages();
    rig.model.run_all();
    assert!(rig.model.messages().is_empty());
    assert!(nvme.arm());
    assert_eq!(nvme.namespaces()[0].complete(), done(1));
}
