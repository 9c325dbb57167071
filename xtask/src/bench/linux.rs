//! `cargo xtask bench --linux`: Debian on Axolotl against the same Debian on the bare machine.
//!
//! Both boot the same kernel and ramdisk on the same emulated machine; bare, the kernel has the
//! card's and the controller's drivers itself. The loads run one after the other in each, and are
//! given by the host through a shell in the guest, so that what the core and the domains did
//! meanwhile can be read at their ends. Times are the host's, and noisy under emulation: only the
//! ratios of one run mean something, and those only on a host with nothing else to do.

use crate::build::{self, Built};
use crate::guest_shell::{self, Shell};
use crate::machine::Machine;
use crate::qemu::{BareKernel, Options, Ports};
use crate::{guest_kernel, platform, project, setup};
use axl::show::EXIT_NAMES;
use miette::{IntoDiagnostic, miette};
use serde_json::json;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// The system whose guest and machine are compared.
const SYSTEM: &str = "linux-bench";
/// How long a boot may take.
const BOOT: Duration = Duration::from_secs(180);
/// How long one load may take beyond its own time.
const SLACK: Duration = Duration::from_secs(60);
/// Time of one load, each of [`ROUNDS`] times.
const SECONDS: u64 = 4;
/// The median of so many is printed.
const ROUNDS: usize = 3;
/// Answers of one ping.
const PINGS: u32 = 100;
/// Where QEMU's network has the host.
const HOST: &str = "10.0.2.2";

/// Something for the guest to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Load {
    /// fio on the whole disk: pattern, KiB of a request, requests at a time.
    Disk(&'static str, u64, u32),
    /// A TCP stream to the host, or from it.
    Stream { to_host: bool },
    /// Echoes, one after the other.
    Ping,
}

const LOADS: [Load; 9] = [
    Load::Disk("randread", 4, 1),
    Load::Disk("randread", 4, 32),
    Load::Disk("randwrite", 4, 1),
    Load::Disk("randwrite", 4, 32),
    Load::Disk("read", 128, 8),
    Load::Disk("write", 128, 8),
    Load::Stream { to_host: true },
    Load::Stream { to_host: false },
    Load::Ping,
];

impl Load {
    fn name(self) -> String {
        match self {
            Self::Disk(pattern, kib, depth) => format!("fio {pattern} {kib} KiB, depth {depth}"),
            Self::Stream { to_host: true } => "iperf3 to the host".into(),
            Self::Stream { to_host: false } => "iperf3 from the host".into(),
            Self::Ping => "ping of the host, median".into(),
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Disk(_, 4, _) => "requests/s",
            Self::Disk(..) => "KiB/s",
            Self::Stream { .. } => "Mbit/s",
            Self::Ping => "µs",
        }
    }

    /// What the core's work is divided by: requests, megabits, echoes.
    fn per(self) -> &'static str {
        match self {
            Self::Disk(..) => "request",
            Self::Stream { .. } => "Mbit",
            Self::Ping => "echo",
        }
    }

    /// The shell's command.
    fn command(self, disk: &str, port: u16) -> String {
        match self {
            Self::Disk(pattern, kib, depth) => format!(
                "fio --minimal --name=bench --filename={disk} --direct=1 --ioengine=libaio --thread \
                 --norandommap --time_based --runtime={SECONDS} --rw={pattern} --bs={kib}k \
                 --iodepth={depth}"
            ),
            Self::Stream { to_host } => {
                let direction = if to_host { "" } else { "-R" };
                format!("iperf3 -c {HOST} -p {port} -t {SECONDS} -J {direction}")
            }
            Self::Ping => format!("ping -A -c {PINGS} {HOST}"),
        }
    }

    /// The figure in [`Self::unit`], and how many [`Self::per`] it took.
    fn figure(self, said: &str) -> Option<(f64, f64)> {
        match self {
            Self::Disk(_, kib, _) => {
                let rate = fio_rate(said)?;
                let value = if kib == 4 { rate } else { rate * kib as f64 };
                Some((value, rate * SECONDS as f64))
            }
            Self::Stream { .. } => {
                let report: serde_json::Value = serde_json::from_str(said).ok()?;
                let sum = &report["end"]["sum_received"];
                let bits = sum["bits_per_second"].as_f64()?;
                Some((bits / 1e6, sum["bytes"].as_f64()? * 8e-6))
            }
            Self::Ping => {
                let times = said.lines().filter_map(|line| {
                    line.split("time=").nth(1)?.split(' ').next()?.parse::<f64>().ok()
                });
                let mut times: Vec<f64> = times.collect();
                times.sort_by(f64::total_cmp);
                let median = times.get(times.len() / 2)?;
                Some((median * 1000.0, times.len() as f64))
            }
        }
    }
}

/// Requests in a second, by fio's report for programs (version 3): reads or writes, one is zero.
fn fio_rate(report: &str) -> Option<f64> {
    let line = report.lines().find(|line| line.starts_with("3;"))?;
    let field = |index: usize| line.split(';').nth(index)?.parse::<f64>().ok();
    Some(field(7)? + field(48)?)
}

/// What a load came to.
#[derive(Clone, Debug, Default)]
struct Outcome {
    value: f64,
    /// What the work below is divided by.
    count: f64,
    elapsed: Duration,
    /// Exits of the guest, by reason.
    exits: Vec<u64>,
    /// Processor time of each domain in µs.
    cpu_us: BTreeMap<String, u64>,
}

/// All outcomes on one machine.
struct Results {
    /// Seconds from the kernel's first line to the first program.
    boot_s: f64,
    outcomes: Vec<Outcome>,
}

/// Measures both, and prints the comparison.
///
/// # Errors
/// A machine does not boot, or a load fails.
pub fn bench(as_json: bool) -> miette::Result<()> {
    setup::qemu()?;
    let file = project::system_file(Path::new(SYSTEM))?;
    let built = build::build(&file)?;
    let load_before = host_load();
    let bare = measure(&built, Some(bare_kernel(&built)?))?;
    let ours = measure(&built, None)?;
    if as_json {
        println!("{:#}", to_json(&bare, &ours, load_before));
    } else {
        print!("{}", to_tables(&bare, &ours, load_before));
    }
    Ok(())
}

/// The guest's own kernel and ramdisk, for the machine without us.
fn bare_kernel(built: &Built) -> miette::Result<BareKernel> {
    let guest = built.compiled.system.domains.iter().find(|domain| domain.kernel.is_some());
    let guest = guest.ok_or_else(|| miette!("{SYSTEM} has no guest with a kernel"))?;
    let mib = guest.memory_pages >> 8;
    let named = |prefix: &str| {
        let mut images = built.compiled.images.iter();
        let name = images.find_map(|image| image.strip_prefix(prefix));
        name.ok_or_else(|| miette!("{SYSTEM} names no {prefix}"))
    };
    let kernel = guest_kernel::kernel_file(&built.file, named("kernel:")?)?;
    let ramdisk = project::image_dir(&built.file).join("ramdisk.cpio");
    let bytes = guest_kernel::ramdisk_file(&built.file, named("ramdisk:")?)?;
    std::fs::write(&ramdisk, bytes).into_diagnostic()?;
    let serve = guest_shell::SERVE;
    let cmdline = format!("console=ttyS0 mem={mib}M {serve}");
    Ok(BareKernel { kernel, ramdisk, cmdline })
}

fn measure(built: &Built, bare: Option<BareKernel>) -> miette::Result<Results> {
    let is_bare = bare.is_some();
    let options = Options { bare, ports: Ports::Free, ..Options::default() };
    let mut machine = Machine::start(built, &options, |_| ())?;
    let said = machine.wait_line(BOOT, |line| line.text.contains("kernel booted in"));
    let said = said.map_err(|error| machine.explain(error))?;
    let boot_s = said.text.split("booted in ").nth(1).and_then(|rest| rest.split(' ').next());
    let boot_s = boot_s.and_then(|text| text.parse().ok());
    let boot_s = boot_s.ok_or_else(|| miette!("no time in: {}", said.text))?;
    let forward = machine.forwards.iter().find(|forward| forward.guest_port == guest_shell::PORT);
    let forward = forward.ok_or_else(|| miette!("{SYSTEM} forwards no port to a shell"))?.host;
    let mut shell = Shell::connect(SocketAddr::V4(forward), BOOT).into_diagnostic()?;
    let server = StreamServer::start()?;
    let disk = if is_bare { "/dev/nvme0n1" } else { "/dev/xvda" };
    let mut outcomes = Vec::new();
    for load in LOADS {
        let command = load.command(disk, server.port);
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let before = if is_bare { Counters::default() } else { Counters::read(&machine)? };
            let start = Instant::now();
            let said = shell.must(&command, SLACK).into_diagnostic();
            let said = said.map_err(|error| machine.explain(error))?;
            let elapsed = start.elapsed();
            let after = if is_bare { Counters::default() } else { Counters::read(&machine)? };
            let (value, count) = load
                .figure(&said)
                .ok_or_else(|| miette!("{} said nothing to be understood: {said}", load.name()))?;
            let (exits, cpu_us) = after.since(&before);
            rounds.push(Outcome { value, count, elapsed, exits, cpu_us });
        }
        rounds.sort_by(|a, b| a.value.total_cmp(&b.value));
        outcomes.push(rounds.swap_remove(ROUNDS / 2));
    }
    Ok(Results { boot_s, outcomes })
}

/// What the platform counts.
#[derive(Default)]
struct Counters {
    exits: Vec<u64>,
    cpu_us: BTreeMap<String, u64>,
}

impl Counters {
    fn read(machine: &Machine) -> miette::Result<Self> {
        let info = platform::info(&machine.mux)?;
        let guest = info.guests.into_iter().next().ok_or_else(|| miette!("there is no guest"))?;
        let domains = platform::list(&machine.mux)?.into_iter();
        let cpu_us = domains.map(|domain| (domain.name, domain.cpu_us)).collect();
        Ok(Self { exits: guest.exits, cpu_us })
    }

    fn since(&self, before: &Self) -> (Vec<u64>, BTreeMap<String, u64>) {
        let exits = self.exits.iter().zip(&before.exits);
        let exits = exits.map(|(now, then)| now.saturating_sub(*then)).collect();
        let spent = |(name, now): (&String, &u64)| {
            (name.clone(), now.saturating_sub(before.cpu_us.get(name).copied().unwrap_or(0)))
        };
        (exits, self.cpu_us.iter().map(spent).collect())
    }
}

/// The other end of streams, on the host.
struct StreamServer {
    child: Child,
    port: u16,
}

impl StreamServer {
    fn start() -> miette::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).into_diagnostic()?;
        let port = listener.local_addr().into_diagnostic()?.port();
        drop(listener);
        let mut command = guest_kernel::host_program("usr/bin/iperf3")?;
        command.args(["-s", "--bind", "127.0.0.1", "-p", &port.to_string()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self { child: child.spawn().into_diagnostic()?, port })
    }
}

impl Drop for StreamServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How many others wanted the host's processors in the last minute, if it says.
fn host_load() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

fn to_tables(bare: &Results, ours: &Results, load: Option<f64>) -> String {
    let mut text = format!(
        "{:34} {:>12} {:>12} {:11} {:>7}\n{:34} {:>12.2} {:>12.2} {:11} {:>6.2}x\n",
        "what",
        "bare",
        "Axolotl",
        "unit",
        "ratio",
        "kernel to its first program",
        bare.boot_s,
        ours.boot_s,
        "s",
        ours.boot_s / bare.boot_s,
    );
    for ((load, bare), ours) in LOADS.iter().zip(&bare.outcomes).zip(&ours.outcomes) {
        text += &format!(
            "{:34} {:>12.0} {:>12.0} {:11} {:>6.2}x\n",
            load.name(),
            bare.value,
            ours.value,
            load.unit(),
            ours.value / bare.value,
        );
    }
    text += &format!("\n{:34} {:>10}", "exits of the guest", "per second");
    for name in EXIT_NAMES {
        text += &format!(" {name:>9}");
    }
    for (load, outcome) in LOADS.iter().zip(&ours.outcomes) {
        let all: u64 = outcome.exits.iter().sum();
        let rate = all as f64 / outcome.elapsed.as_secs_f64();
        text += &format!("\n{:34} {rate:>10.0}", format!("{}, per {}", load.name(), load.per()));
        for count in &outcome.exits {
            text += &format!(" {:>9.2}", *count as f64 / outcome.count);
        }
    }
    text += "\n\nprocessor time in µs\n";
    for (load, outcome) in LOADS.iter().zip(&ours.outcomes) {
        text += &format!("{:34} per {:8}", load.name(), load.per());
        for (name, spent) in outcome.cpu_us.iter().filter(|(_, spent)| **spent > 0) {
            text += &format!(" {name} {:.0}", *spent as f64 / outcome.count);
        }
        text.push('\n');
    }
    if let Some(load) = load {
        text += &format!("\nload of the host before: {load:.2}; ratios are noise on a busy one\n");
    }
    text
}

fn to_json(bare: &Results, ours: &Results, load: Option<f64>) -> serde_json::Value {
    let rows = LOADS.iter().zip(&bare.outcomes).zip(&ours.outcomes).map(|((load, bare), ours)| {
        let exits: serde_json::Map<_, _> = EXIT_NAMES
            .iter()
            .zip(&ours.exits)
            .map(|(name, count)| ((*name).to_owned(), json!(*count as f64 / ours.count)))
            .collect();
        json!({
            "what": load.name(), "unit": load.unit(), "bare": bare.value, "axolotl": ours.value,
            "ratio": ours.value / bare.value, "per": load.per(), "exits": exits,
            "elapsed_s": ours.elapsed.as_secs_f64(), "count": ours.count, "cpu_us": ours.cpu_us,
        })
    });
    let rows: Vec<_> = rows.collect();
    json!({
        "host_load_before": load,
        "boot_s": { "bare": bare.boot_s, "axolotl": ours.boot_s },
        "rows": rows,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_programs_are_understood() {
        let mut fields = vec!["0"; 130];
        (fields[0], fields[7]) = ("3", "257");
        let report = format!("fio: some warning\n{}\n", fields.join(";"));
        assert_eq!(
            Load::Disk("randread", 4, 1).figure(&report),
            Some((257.0, 257.0 * SECONDS as f64))
        );
        assert_eq!(
            Load::Disk("read", 128, 8).figure(&report).map(|(value, _)| value),
            Some(257.0 * 128.0)
        );
        assert_eq!(Load::Disk("read", 128, 8).figure("fio: no such file"), None);
        let report = r#"{"end":{"sum_received":{"bits_per_second":2.5e8,"bytes":1e8}}}"#;
        assert_eq!(Load::Stream { to_host: true }.figure(report), Some((250.0, 800.0)));
        let report =
            "64 bytes from 10.0.2.2: seq=0 ttl=255 time=1.500 ms\nx time=4.5 ms\n y time=0.5 ms";
        assert_eq!(Load::Ping.figure(report), Some((1500.0, 3.0)));
        assert_eq!(Load::Ping.figure("nothing"), None);
    }

    #[test]
    fn counters_are_differences() {
        let before = Counters { exits: vec![1, 2], cpu_us: [("a".into(), 5)].into() };
        let after =
            Counters { exits: vec![4, 2], cpu_us: [("a".into(), 9), ("b".into(), 3)].into() };
        let (exits, cpu_us) = after.since(&before);
        assert_eq!(exits, [3, 0]);
        assert_eq!(cpu_us, [("a".into(), 4), ("b".into(), 3)].into());
    }
}
