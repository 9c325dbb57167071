//! Runs seeds, and says which of them show a fault.

#![forbid(unsafe_code)]

use clap::Parser;
use sim::{Outcome, Plan};
use std::process::ExitCode;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

/// Runs simulations of the whole system.
#[derive(Parser)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// Only this one, with its trace.
    #[arg(long)]
    seed: Option<u64>,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// How many at a time.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

/// What came of some seeds.
#[derive(Default)]
struct Sum {
    seeds: u64,
    deaths: u64,
    acknowledged: u64,
    failed: Vec<(u64, String)>,
}

/// Takes seeds until there are none left.
fn work(next: &AtomicU64, end: u64) -> Sum {
    let mut sum = Sum::default();
    loop {
        let seed = next.fetch_add(1, Relaxed);
        if seed >= end {
            return sum;
        }
        let outcome = sim::run(&Plan::of_seed(seed));
        sum.seeds += 1;
        sum.deaths += u64::from(outcome.deaths);
        sum.acknowledged += outcome.acknowledged;
        if let Some(failure) = outcome.failure {
            println!("seed {seed}: {failure}\n  again: cargo xtask sim --seed {seed}");
            sum.failed.push((seed, failure));
        }
    }
}

/// One seed, with its trace.
fn replay(seed: u64) -> ExitCode {
    let mut plan = Plan::of_seed(seed);
    plan.traced = true;
    let outcome = sim::run(&plan);
    for line in &outcome.trace {
        println!("{line}");
    }
    println!("{plan:?}");
    let Outcome { hash, deaths, steps, turns, ns, acknowledged, .. } = outcome;
    println!(
        "trace {hash:016x}, {turns} turns, {ns} ns, {deaths} deaths, steps of drivers {steps:?}, {acknowledged} requests"
    );
    match outcome.failure {
        Some(failure) => {
            println!("seed {seed}: {failure}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}

fn main() -> ExitCode {
    let Arguments { seeds, seed, first, threads } = Arguments::parse();
    if let Some(seed) = seed {
        return replay(seed);
    }
    let begin = Instant::now();
    let (next, end) = (AtomicU64::new(first), first + seeds);
    let sums: Vec<Sum> = std::thread::scope(|scope| {
        let workers: Vec<_> =
            (0..threads.max(1)).map(|_| scope.spawn(|| work(&next, end))).collect();
        workers.into_iter().map(|it| it.join().expect("a worker ends")).collect()
    });
    let total = |what: fn(&Sum) -> u64| sums.iter().map(what).sum::<u64>();
    let failed = total(|sum| sum.failed.len() as u64);
    println!(
        "{} seeds from {first} on, {failed} failed; {} deaths of drivers, {} disk requests, {:.1} s",
        total(|sum| sum.seeds),
        total(|sum| sum.deaths),
        total(|sum| sum.acknowledged),
        begin.elapsed().as_secs_f64()
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
