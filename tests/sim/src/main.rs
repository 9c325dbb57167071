//! Runs seeds, and says which of them show a fault.

#![forbid(unsafe_code)]

use clap::Parser;
use sim::Plan;
use std::process::ExitCode;

/// Runs simulations of the whole system.
#[derive(Parser)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first one; alone, its trace is printed.
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let first = arguments.seed.unwrap_or(0);
    let single = arguments.seed.is_some();
    let count = if single { 1 } else { arguments.seeds };
    let mut failed = 0;
    let mut deaths = 0;
    let mut acknowledged = 0;
    let begin = std::time::Instant::now();
    for seed in first..first + count {
        let mut plan = Plan::of_seed(seed);
        plan.traced = single;
        let outcome = sim::run(&plan);
        deaths += u64::from(outcome.deaths);
        acknowledged += outcome.acknowledged;
        for line in &outcome.trace {
            println!("{line}");
        }
        if single {
            println!(
                "{plan:?}\n{:x} {} deaths {:?} steps {} turns {} ns",
                outcome.hash, outcome.deaths, outcome.steps, outcome.turns, outcome.ns
            );
        }
        if let Some(failure) = outcome.failure {
            failed += 1;
            println!("seed {seed}: {failure}");
        }
    }
    println!("{count} seeds, {failed} failed, {deaths} deaths, {acknowledged} requests, {:?}", begin.elapsed());
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
