//! Scheduling: classes are strict, budgets protect who is below, nobody is forgotten, and
//! everything that has a time happens at it.

use axolotl_abi::CONTROL_OP;
use axolotl_abi::control::{
    self, CLASS_CONTROL, CLASS_DRIVER, CLASS_GUEST, Create, DEATH_WATCHDOG, STATE_BLOCKED,
    STATE_RUNNING,
};
use hv_core::fake::{Config, D0, Fake, SCRATCH, System};
use hv_core::platform::{CpuId, Exit};
use xen_abi::hypercall::{SCHED_OP, SET_TIMER_OP};
use xen_abi::sched::{self, Poll, Watchdog};
use xen_abi::{DomainId, Errno, event};

const MS: u64 = 1_000_000;

fn with_cpus(cpus: usize) -> System {
    System::with(Config { cpus, ..Config::default() })
}

fn create(system: &mut System, class: u8, budget_us: u32, period_us: u32) -> DomainId {
    system.create(Create { class, budget_us, period_us, ..System::plan("domain") })
}

/// Lets everybody go idle, and every processor wait.
fn settle(system: &mut System) {
    for _ in 0..6 {
        let cpus = system.p.machine().timers.len();
        (0..cpus).for_each(|cpu| system.run(cpu, 8));
    }
    // From a wait that is over to the next one.
    let cpus = system.p.machine().timers.len();
    for cpu in 0..cpus {
        let count = system.p.machine().waits[cpu];
        while system.p.machine().waits[cpu] == count {
            system.step(cpu);
        }
        system.step(cpu);
    }
}

/// A guest that computes on processor 1.
fn elsewhere(system: &mut System) -> DomainId {
    let guest = create(system, CLASS_GUEST, 0, 0);
    settle(system);
    system.program(guest, |p, _, _| p.spin(MS));
    system.wake(guest);
    system.step(1);
    system.step(1);
    assert_eq!(system.core.lock().domain(guest).unwrap().vcpu().on_cpu, Some(1));
    system.p.machine().kicks.clear();
    guest
}

/// CPU time of each, without disturbing anybody.
fn used(system: &System, domains: &[DomainId]) -> Vec<u64> {
    let core = system.core.lock();
    domains.iter().map(|&id| core.domain(id).unwrap().vcpu().cpu_ns).collect()
}

fn gained(system: &mut System, domains: &[DomainId], ns: u64) -> Vec<u64> {
    let before = used(system, domains);
    let end = system.p.machine().now_ns + ns;
    let mut steps = 0;
    while system.p.machine().now_ns < end {
        let now = system.p.machine().now_ns;
        let cpus = system.p.machine().timers.len();
        for cpu in 0..cpus {
            system.step(cpu);
        }
        steps += 1;
        if steps % 8 == 0 {
            system.check();
        }
        let is_busy = {
            let core = system.core.lock();
            (0..64).filter_map(|id| core.domain(DomainId(id))).any(|d| d.vcpu().on_cpu.is_some())
        };
        let mut machine = system.p.machine();
        if machine.now_ns == now && !is_busy {
            // All wait: time goes on to the next timer.
            let next = machine.timers.iter().flatten().min().copied().unwrap_or(end);
            machine.now_ns = next.clamp(now + 1, end);
        }
    }
    used(system, domains).iter().zip(before).map(|(now, before)| now - before).collect()
}

#[test]
fn classes_are_strict() {
    let mut system = System::new();
    let guest = create(&mut system, CLASS_GUEST, 0, 0);
    let driver = create(&mut system, CLASS_DRIVER, 0, 0);
    system.spin(guest);
    let time = gained(&mut system, &[guest, driver], 100 * MS);
    assert!(time[0] >= 85 * MS && time[1] < MS, "{time:?}");
    system.spin(driver);
    assert_eq!(system.control_domain(control::PAUSE, driver), 0);
    assert_eq!(system.control_domain(control::UNPAUSE, driver), 0);
    let time = gained(&mut system, &[guest, driver], 100 * MS);
    assert!(time[0] == 0 && time[1] >= 99 * MS, "{time:?}");
    let control = create(&mut system, CLASS_CONTROL, 0, 0);
    system.spin(control);
    assert_eq!(system.control_domain(control::CRASH, guest), 0);
    let time = gained(&mut system, &[driver, guest], 30 * MS);
    assert!(time[1] == 0 && system.is_live(guest), "not even to die: {time:?}");
}

#[test]
fn a_spinning_driver_with_a_budget_does_not_starve_guests() {
    let mut system = System::new();
    let guest = create(&mut system, CLASS_GUEST, 0, 0);
    let driver = create(&mut system, CLASS_DRIVER, 2_000, 10_000);
    system.spin(guest);
    system.spin(driver);
    let time = gained(&mut system, &[guest, driver], 1000 * MS);
    // 2 of 10 ms are the driver's.
    assert!((180 * MS..230 * MS).contains(&time[1]), "{time:?}");
    assert!(time[0] > 750 * MS, "{time:?}");
    assert!((80..110).contains(&system.info(driver).budget_overruns));
}

#[test]
fn an_exhausted_driver_uses_what_nobody_wants_and_gets_its_priority_back() {
    let mut system = System::new();
    let guest = create(&mut system, CLASS_GUEST, 0, 0);
    let driver = create(&mut system, CLASS_DRIVER, 2_000, 10_000);
    system.spin(driver);
    let time = gained(&mut system, &[guest, driver], 100 * MS);
    assert!(time[1] > 98 * MS, "alone it has all: {time:?}");
    // It ran, exhausted, at the end of each period; it must have been renewed nevertheless.
    system.spin(guest);
    system.wake(guest);
    let time = gained(&mut system, &[guest, driver], 100 * MS);
    assert!((15 * MS..30 * MS).contains(&time[1]), "{time:?}");
}

#[test]
fn a_domain_that_dies_with_its_budget_used_up_leaves_no_deadline() {
    let mut system = System::new();
    let driver = create(&mut system, CLASS_DRIVER, 1_000, 100_000);
    // It faults within its budget; the core needs long to write that down.
    system.program(driver, |p: &mut Fake, _, _| {
        p.machine().now_ns += 3 * MS;
        Exit::Fault { vector: 6, error: 0, address: 0 }
    });
    system.run(0, 6);
    assert!(!system.is_live(driver));
    system.check();
    system.destroy(driver);
    system.advance(200 * MS);
    system.run(0, 6);
    system.check();
}

#[test]
fn equals_take_turns() {
    let mut system = System::new();
    let guests: Vec<_> = (0..3).map(|_| create(&mut system, CLASS_GUEST, 0, 0)).collect();
    for &guest in &guests {
        system.spin(guest);
    }
    let time = gained(&mut system, &guests, 900 * MS);
    assert!(time.iter().all(|time| (280 * MS..320 * MS).contains(time)), "{time:?}");
}

#[test]
fn yield_lets_an_equal_run_and_alone_changes_nothing() {
    let mut system = System::new();
    let polite = create(&mut system, CLASS_GUEST, 0, 0);
    let other = create(&mut system, CLASS_GUEST, 0, 0);
    // Miri takes its time for each step.
    let work_ns = if cfg!(miri) { 250_000 } else { 50_000 };
    system.program(polite, move |p, registers, _| {
        p.machine().now_ns += work_ns;
        hv_core::fake::issue(registers, SCHED_OP, [sched::YIELD, 0, 0, 0, 0])
    });
    system.wake(polite);
    let alone = gained(&mut system, &[polite], 50 * MS);
    assert!(alone[0] > 25 * MS, "{alone:?}");
    system.spin(other);
    system.wake(other);
    let time = gained(&mut system, &[polite, other], 200 * MS);
    assert!(time[1] > 190 * MS && time[0] > 0, "{time:?}");
}

#[test]
fn a_wakeup_kicks_an_idle_processor_and_else_displaces_the_least() {
    let mut system = with_cpus(3);
    let guests: Vec<_> = (0..3).map(|_| create(&mut system, CLASS_GUEST, 0, 0)).collect();
    let driver = create(&mut system, CLASS_DRIVER, 0, 0);
    settle(&mut system);
    system.p.machine().kicks.clear();
    // The first one is for the processor that is about to look for work itself.
    system.step(0);
    for (index, &guest) in guests.iter().enumerate() {
        system.program(guest, |p, _, _| p.spin(MS));
        system.wake(guest);
        assert_eq!(system.p.machine().kicks.len(), index, "an idle processor each");
        system.check();
    }
    let kicks = system.p.machine().kicks.clone();
    assert!(kicks == [CpuId(1), CpuId(2)], "{kicks:?}");
    for cpu in [0, 1, 1, 2, 2] {
        system.step(cpu);
    }
    let on_cpu = |system: &System, id| system.core.lock().domain(id).unwrap().vcpu().on_cpu;
    assert!(guests.iter().all(|&guest| on_cpu(&system, guest).is_some()));
    // All run guests; a driver displaces one of them at once.
    system.p.machine().kicks.clear();
    system.program(driver, |p, _, _| p.spin(MS));
    system.wake(driver);
    let displaced = system.p.machine().kicks.first().map_or(0, |cpu| cpu.0);
    system.step(displaced.into());
    system.check();
    assert_eq!(on_cpu(&system, driver), Some(displaced));
    assert_eq!(guests.iter().filter(|&&guest| on_cpu(&system, guest).is_none()).count(), 1);
    // Another guest displaces nobody.
    system.p.machine().kicks.clear();
    let waiting = guests.iter().copied().find(|&guest| on_cpu(&system, guest).is_none()).unwrap();
    system.wake(waiting);
    assert_eq!(system.p.machine().kicks, []);
}

#[test]
fn many_processors_share_work_and_none_idles_while_somebody_waits() {
    let mut system = with_cpus(2);
    let guests: Vec<_> = (0..4).map(|_| create(&mut system, CLASS_GUEST, 0, 0)).collect();
    for &guest in &guests {
        // Both processors share one clock, so that each computes in small parts.
        system.program(guest, |p: &mut Fake, _, _| p.spin(MS / 2));
        system.wake(guest);
    }
    let time = gained(&mut system, &guests, 400 * MS);
    let sum: u64 = time.iter().sum();
    assert!(sum > 780 * MS, "{time:?}");
    assert!(time.iter().all(|time| (150 * MS..250 * MS).contains(time)), "{time:?}");
}

#[test]
fn a_domain_on_another_processor_is_paused_killed_and_buried_in_time() {
    let mut system = with_cpus(2);
    let guest = elsewhere(&mut system);
    let op = control::DomainOp { domid: guest };
    let again = Errno::EAGAIN.to_result();
    assert_eq!(system.call_with(D0, CONTROL_OP, control::PAUSE, op).0, again);
    assert!(system.p.machine().kicks.contains(&CpuId(1)));
    assert_eq!(system.control_domain(control::PAUSE, guest), 0);
    assert_eq!(system.info(guest).state, control::STATE_PAUSED);
    system.destroy(guest);
    system.check();
    let guest = elsewhere(&mut system);
    assert_eq!(system.control_domain(control::RESTART, guest), 0, "alive, and elsewhere");
    system.destroy(guest);
    let guest = elsewhere(&mut system);
    assert_eq!(system.control_domain(control::CRASH, guest), 0);
    assert!(system.is_live(guest));
    system.step(1);
    system.step(1);
    assert_eq!(system.death(guest).cause, control::DEATH_CRASHED);
    system.check();
}

#[test]
fn a_root_table_is_not_freed_while_an_idle_processor_has_it_loaded() {
    let mut system = with_cpus(2);
    let guest = elsewhere(&mut system);
    system.program(guest, |_, _, _| Exit::Fault { vector: 13, error: 0, address: 0 });
    // It dies there; the processor finds nothing to run, and waits with its root still loaded.
    system.step(1);
    system.step(1);
    assert!(!system.is_live(guest));
    let op = control::DomainOp { domid: guest };
    system.p.machine().kicks.clear();
    for _ in 0..30 {
        let (result, _) = system.call_with(D0, CONTROL_OP, control::DESTROY, op);
        assert_eq!(result, Errno::EAGAIN.to_result());
    }
    assert!(system.core.lock().domain(guest).is_some());
    assert!(system.p.machine().kicks.contains(&CpuId(1)));
    // It leaves its wait.
    system.step(1);
    system.destroy(guest);
    system.check();
}

#[test]
fn a_timer_fires_once_at_its_time_and_not_when_it_was_taken_back() {
    let mut system = System::new();
    let guest = system.guest("guest");
    let port = system.bind_virq(guest, event::VIRQ_TIMER).unwrap();
    let at = system.p.machine().now_ns + 5 * MS;
    assert_eq!(system.call(guest, SET_TIMER_OP, [at, 0, 0, 0, 0]), 0);
    system.run(0, 4);
    assert_eq!(system.p.machine().timers[0], Some(at));
    system.p.machine().now_ns = at - 1;
    system.run(0, 2);
    assert!(!system.is_pending(guest, port));
    system.p.machine().now_ns = at;
    system.run(0, 2);
    assert!(system.is_pending(guest, port));
    system.clear_pending(guest, port);
    system.advance(5 * MS);
    system.run(0, 2);
    assert!(!system.is_pending(guest, port));
    // In the past: at once. Taken back: never.
    system.call(guest, SET_TIMER_OP, [1, 0, 0, 0, 0]);
    assert!(system.is_pending(guest, port));
    system.clear_pending(guest, port);
    let at = system.p.machine().now_ns + MS;
    system.call(guest, SET_TIMER_OP, [at, 0, 0, 0, 0]);
    system.call(guest, SET_TIMER_OP, [0, 0, 0, 0, 0]);
    system.advance(5 * MS);
    system.run(0, 2);
    assert!(!system.is_pending(guest, port));
}

#[test]
fn a_timer_that_expires_early_is_set_again() {
    let mut system = System::new();
    system.p.machine().timer_range_ns = 4_000 * MS;
    let guest = system.guest("guest");
    let port = system.bind_virq(guest, event::VIRQ_TIMER).unwrap();
    let at = system.p.machine().now_ns + 10_000 * MS;
    system.call(guest, SET_TIMER_OP, [at, 0, 0, 0, 0]);
    system.run(0, 4);
    for _ in 0..4 {
        assert!(!system.is_pending(guest, port));
        let timer = system.p.machine().timers[0].take().expect("a timer is always set");
        system.p.machine().now_ns = timer;
        system.run(0, 2);
        if timer == at {
            break;
        }
    }
    assert!(system.is_pending(guest, port));
}

fn poll(system: &mut System, guest: DomainId, ports: &[u32], timeout: u64) -> i64 {
    for (index, port) in ports.iter().enumerate() {
        system.write(guest, SCRATCH + 512 + 4 * index as u64, &port.to_le_bytes());
    }
    let nr_ports = u32::try_from(ports.len()).unwrap();
    let op = Poll { ports: SCRATCH + 512, nr_ports, pad: 0, timeout };
    system.call_with(guest, SCHED_OP, sched::POLL, op).0
}

#[test]
fn poll_ends_by_event_by_timeout_and_at_once_when_pending() {
    let mut system = System::new();
    let guest = system.guest("guest");
    let other = system.guest("other");
    let port = system.alloc_unbound(guest, other).unwrap();
    let theirs = system.bind(other, guest, port).unwrap();
    let blocked = |system: &System| {
        let core = system.core.lock();
        core.domain(guest).unwrap().state() == STATE_BLOCKED
    };
    system.spin(guest);
    system.clear_pending(guest, port);
    let idle = |system: &mut System| {
        let shared = system.core.lock().domain(guest).unwrap().shared;
        hv_core::platform::Platform::store64(&mut system.p, shared, 0, 0);
    };
    idle(&mut system);
    assert_eq!(poll(&mut system, guest, &[port.0], 0), 0);
    assert!(blocked(&system));
    system.send(other, theirs);
    assert!(!blocked(&system));
    assert_eq!(poll(&mut system, guest, &[port.0], 0), 0);
    assert!(!blocked(&system), "pending already");
    system.clear_pending(guest, port);
    idle(&mut system);
    let until = system.p.machine().now_ns + MS;
    assert_eq!(poll(&mut system, guest, &[port.0, 7], until), 0);
    assert!(blocked(&system));
    system.advance(2 * MS);
    system.run(0, 3);
    assert!(!blocked(&system));
    assert_eq!(poll(&mut system, guest, &[port.0], 1), 0);
    assert!(!blocked(&system), "a time in the past");
    assert_eq!(poll(&mut system, guest, &[], 0), 0);
    assert!(blocked(&system));
    system.send(other, theirs);
    assert!(!blocked(&system), "any event ends a poll of none");
}

#[test]
fn a_watchdog_that_is_not_poked_ends_its_domain() {
    let mut system = System::new();
    let guest = system.guest("guest");
    let dog = |system: &mut System, id, timeout| {
        system.call_with(guest, SCHED_OP, sched::WATCHDOG, Watchdog { id, timeout }).0
    };
    assert_eq!(dog(&mut system, 0, 0), Errno::EINVAL.to_result());
    assert_eq!(dog(&mut system, 0, 1), 1);
    assert_eq!(dog(&mut system, 0, u32::MAX), 2);
    assert_eq!(dog(&mut system, 0, 1), Errno::ENOSPC.to_result());
    assert_eq!(dog(&mut system, 3, 1), Errno::EINVAL.to_result());
    assert_eq!(dog(&mut system, u32::MAX, 1), Errno::EINVAL.to_result());
    for _ in 0..3 {
        system.advance(900 * MS);
        system.run(0, 3);
        assert_eq!(dog(&mut system, 1, 1), 1, "poked");
    }
    assert_eq!(dog(&mut system, 1, 0), 1, "off");
    system.advance(5_000 * MS);
    system.run(0, 3);
    assert!(system.is_live(guest));
    dog(&mut system, 1, 1);
    system.spin(guest);
    system.advance(1_001 * MS);
    system.run(0, 3);
    assert!(!system.is_live(guest));
    assert_eq!(system.death(guest).cause, DEATH_WATCHDOG);
    system.restart(guest);
    system.advance(5_000 * MS);
    system.run(0, 3);
    assert!(system.is_live(guest), "a watchdog is of one life");
    assert_eq!(system.info(guest).state, STATE_RUNNING);
}
