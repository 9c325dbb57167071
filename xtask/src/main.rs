//! The command line of the project's tasks.

#![forbid(unsafe_code)]

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use xtask::checks::{self, Job};
use xtask::doses::Controller;
use xtask::qemu::{Accel, Options, Ports};
use xtask::suite::{self, Which};
use xtask::{bench, doses, iso, run, sim};

/// Builds, boots, tests and measures Axolotl. Whatever a task needs and does not find, it sets up.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Xtask {
    /// Builds the core and all images that a system needs.
    Build {
        /// A system file, or the name of one in `systems/`.
        #[arg(default_value = "default")]
        system: PathBuf,
    },
    /// Builds a directory, or a CD image, that a real machine can boot by GRUB.
    Image {
        /// A system file, or the name of one in `systems/`.
        system: PathBuf,
        /// Where to write the directory.
        #[arg(short, long)]
        output: Option<PathBuf>,
        /// Makes a CD image of it too.
        #[arg(long)]
        iso: bool,
    },
    /// Boots a system in QEMU and shows the consoles of all its domains.
    Run {
        /// A system file, or the name of one in `systems/`.
        #[arg(default_value = "default")]
        system: PathBuf,
        /// For scripts: no colours.
        #[arg(long)]
        headless: bool,
        /// Ends after this time, with success if nothing broke.
        #[arg(long = "for", value_name = "TIME", value_parser = run::parse_duration)]
        limit: Option<Duration>,
        /// Processors, instead of the system file's number.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
        smp: Option<u32>,
        /// How instructions are executed.
        #[arg(long, value_enum, default_value_t)]
        accel: Accel,
        /// Uses free host ports instead of those of the system file.
        #[arg(long)]
        any_port: bool,
        /// Further arguments for QEMU.
        #[arg(long, value_name = "ARG", num_args = 1.., allow_hyphen_values = true)]
        qemu_args: Vec<String>,
    },
    /// Runs all tests: on the host, and in QEMU.
    Test {
        /// Only tests whose names contain this.
        filter: Option<String>,
        /// Only tests that need no machine.
        #[arg(long, conflicts_with = "qemu")]
        host: bool,
        /// Only tests that boot a machine.
        #[arg(long)]
        qemu: bool,
    },
    /// Crashes the network driver again and again under a running download.
    CrashSoak {
        /// How often.
        #[arg(long, default_value_t = 1000)]
        kills: u32,
        /// Kills the network driver and the disk driver by turns, every 50 ms, while a file is
        /// downloaded from the disk.
        #[arg(long)]
        alternate: bool,
    },
    /// Kills a disk driver at random instants while a guest verifies every sector of its disk.
    DiskSoak {
        /// Which driver.
        #[arg(long, value_enum, default_value_t = Controller::Nvme)]
        controller: Controller,
        /// How often.
        #[arg(long, default_value_t = 2000)]
        kills: u32,
    },
    /// Kills the drivers of network card and disk at random while an unmodified Debian runs fio
    /// with checksums, streams and transfers.
    LinuxSoak {
        /// How often, both together.
        #[arg(long, default_value_t = 500)]
        kills: u32,
        /// Restarts them by the toolstack instead.
        #[arg(long)]
        restart: bool,
    },
    /// Lets a guest break its rings in every way while two Debians and the demo guest, behind the same
    /// network card and disk, work and are checked; then ends neighbours and drivers too.
    NeighbourSoak {
        /// In so many lives of that guest.
        #[arg(long, default_value_t = 100)]
        lives: u32,
    },
    /// Boots Debian again and again, with other kernels and processors, and ends it in all ways.
    BootSoak {
        /// How often.
        #[arg(long, default_value_t = 20)]
        boots: u32,
    },
    /// Attacks the core with hostile calls while the demo guest keeps answering.
    Selftest {
        /// How many.
        #[arg(long, default_value_t = 1_000_000)]
        calls: u64,
    },
    /// Simulates the whole system on the host, with deaths of drivers, one run for each seed.
    Sim {
        #[command(flatten)]
        seeds: sim::Seeds,
    },
    /// Measures the budgets of the design, counted in instructions so that figures repeat.
    Bench {
        /// For programs.
        #[arg(long)]
        json: bool,
        /// Compares Debian on the platform with the same Debian on the bare machine instead.
        #[arg(long)]
        linux: bool,
    },
    /// Explores all interleavings of the shared-memory code within loom's bounds.
    Loom,
    /// Runs the tests of the core and of shared memory under Miri, on nightly.
    Miri,
    /// Runs what continuous integration runs; with a name, only that job.
    Ci {
        /// Which job.
        #[arg(value_enum)]
        job: Option<Job>,
    },
}

fn main() -> ExitCode {
    // Wide enough that a message meant as one line is one.
    let _ = miette::set_hook(Box::new(|_| {
        Box::new(miette::MietteHandlerOpts::new().wrap_lines(false).build())
    }));
    match work(Xtask::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(report) => {
            eprintln!("{report:?}");
            ExitCode::FAILURE
        }
    }
}

fn work(task: Xtask) -> miette::Result<()> {
    match task {
        Xtask::Build { system } => run::build_only(&system),
        Xtask::Image { system, output, iso } => iso::image(&system, output, iso),
        Xtask::Run { system, headless, limit, smp, accel, any_port, qemu_args } => {
            let ports = if any_port { Ports::Free } else { Ports::AsWritten };
            let options =
                Options { accel, cpus: smp, ports, extra: qemu_args, ..Options::default() };
            run::run(&system, &run::Wanted { headless, limit, options })
        }
        Xtask::Test { filter, host, qemu } => {
            let which = match (host, qemu) {
                (true, _) => Which::Host,
                (_, true) => Which::Qemu,
                _ => Which::All,
            };
            suite::test(filter.as_deref(), which)
        }
        Xtask::CrashSoak { kills, alternate } => doses::crash_soak(kills, alternate),
        Xtask::DiskSoak { controller, kills } => doses::disk_soak(controller, kills),
        Xtask::LinuxSoak { kills, restart } => doses::linux_soak(kills, restart),
        Xtask::NeighbourSoak { lives } => doses::neighbour_soak(lives),
        Xtask::BootSoak { boots } => doses::boot_soak(boots),
        Xtask::Selftest { calls } => doses::selftest(calls),
        Xtask::Sim { seeds } => sim::sim(seeds),
        Xtask::Bench { json, linux: false } => bench::bench(json),
        Xtask::Bench { json, linux: true } => bench::linux::bench(json),
        Xtask::Loom => checks::loom(),
        Xtask::Miri => checks::miri(),
        Xtask::Ci { job } => checks::ci(job),
    }
}
