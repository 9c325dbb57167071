//! The dose of simulation that runs with all tests; `cargo xtask sim` gives larger ones.

use sim::run::{DISK, NET};
use sim::{Deaths, Outcome, Plan, run};
use std::time::{Duration, Instant};

/// How long the random seeds may take.
const TIME: Duration = Duration::from_secs(20);

/// A system that is so small that each step of a driver domain can be its last.
fn small(seed: u64, messages: u32, requests: u32) -> Plan {
    let mut plan = Plan::of_seed(seed);
    plan.schedule.cpus = 2;
    plan.schedule.quantum = 300;
    plan.schedule.spurious_in = 0;
    plan.schedule.lost_interrupt_in = 0;
    (plan.guests, plan.messages, plan.requests) = (1, messages, requests);
    (plan.lies, plan.power_cut, plan.deaths) = (0, None, Deaths::None);
    plan.treatment.fault_in = 0;
    plan
}

fn good(plan: &Plan) -> Outcome {
    let outcome = run(plan);
    if let Some(failure) = &outcome.failure {
        panic!("{failure}\n{plan:?}");
    }
    outcome
}

/// Dies at every `stride`-th step of a workload, and at a later step again.
fn die_everywhere(plan: &Plan, whose: usize, stride: usize) {
    let id = [NET, DISK][whose];
    let steps = good(plan).steps[whose];
    assert!(steps > 300, "{steps} steps are no workload");
    for step in (1..=steps).step_by(stride) {
        let mut plan = plan.clone();
        plan.deaths = Deaths::At(id, vec![step]);
        let outcome = good(&plan);
        assert_eq!(outcome.deaths, 1, "step {step} of {steps}");
        if step % 7 == 1 {
            // The successor dies in its turn, somewhere in the takeover or behind it.
            plan.deaths = Deaths::At(id, vec![step, 1 + step * 31 % 1500]);
            good(&plan);
        }
    }
}

/// Of the steps, so many are left out between two deaths in the dose that always runs.
const STRIDE: usize = 13;

#[test]
fn the_disk_domain_dies_all_over_a_small_workload() {
    die_everywhere(&small(11, 0, 5), 1, STRIDE);
}

#[test]
fn the_network_domain_dies_all_over_a_small_workload() {
    die_everywhere(&small(12, 2, 0), 0, STRIDE);
}

#[test]
#[ignore = "minutes: cargo test --profile sim -p sim -- --include-ignored"]
fn the_disk_domain_dies_at_every_step_of_a_small_workload() {
    die_everywhere(&small(11, 0, 5), 1, 1);
}

#[test]
#[ignore = "minutes: cargo test --profile sim -p sim -- --include-ignored"]
fn the_network_domain_dies_at_every_step_of_a_small_workload() {
    die_everywhere(&small(12, 2, 0), 0, 1);
}

#[test]
fn seeds() {
    let begin = Instant::now();
    let mut seed = 0;
    let mut deaths = 0;
    while begin.elapsed() < TIME {
        let outcome = run(&Plan::of_seed(seed));
        assert_eq!(outcome.failure, None, "seed {seed}; again: cargo xtask sim --seed {seed}");
        deaths += outcome.deaths;
        seed += 1;
    }
    println!("{seed} seeds, {deaths} deaths");
    assert!(deaths > 0, "nobody died in {seed} seeds");
}

/// Otherwise a failing seed could not be looked into.
#[test]
fn the_same_seed_makes_the_same_run() {
    for seed in 0..12 {
        let mut plan = Plan::of_seed(seed);
        let (first, second) = (run(&plan).hash, run(&plan).hash);
        assert_eq!(first, second, "seed {seed}");
        plan.traced = true;
        assert_eq!(run(&plan).hash, first, "seed {seed}, traced");
        plan.seed += 1000;
        assert_ne!(run(&plan).hash, first, "another seed");
    }
}
