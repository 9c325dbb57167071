//! `cargo xtask sim`: the whole system on the host, under as many seeds as wanted.

use crate::project;

/// Which runs.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Seeds {
    /// How many seeds.
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Only this seed, with its trace.
    #[arg(long, conflicts_with_all = ["seeds", "first"])]
    seed: Option<u64>,
    /// How many at a time.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

/// Builds the simulation and runs it.
///
/// # Errors
/// A seed shows a fault.
pub fn sim(Seeds { seeds, first, seed, threads }: Seeds) -> miette::Result<()> {
    let mut command = project::cargo();
    command.args(["run", "--quiet", "--profile", "sim", "--package", "sim", "--"]);
    match seed {
        Some(seed) => command.arg("--seed").arg(seed.to_string()),
        None => command
            .arg("--seeds")
            .arg(seeds.to_string())
            .arg("--first")
            .arg(first.to_string())
            .arg("--threads")
            .arg(threads.to_string()),
    };
    project::run(&mut command)
}
