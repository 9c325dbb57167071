//! `cargo xtask bench`: the budgets of `architecture.md` §9, measured.
//!
//! Under `-icount shift=0` QEMU advances its clock by one nanosecond per instruction: a time in
//! nanoseconds is a number of instructions. With `sleep=off` idle time is skipped, so that figures
//! repeat on any host; what waits for the host's network is measured with `sleep=on`, where idle
//! time is the host's. `docs/benchmarks.md` says what that does and does not show.

mod blocks;
pub mod linux;

use crate::build::{self, Built};
use crate::machine::{Machine, wait_web};
use crate::qemu::{Accel, Options, Ports};
use crate::{lines_of_code, platform, project, setup};
use axolotl_abi::protocol::Why;
use miette::miette;
use serde_json::json;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use system::{HostForward, NicNet, Protocol};

/// Crashes of the driver domain that are measured.
const CRASHES: usize = 100;
/// How long any one step may take on the host.
const STEP: Duration = Duration::from_secs(120);
/// Life between two measured crashes, on the host's clock.
const BETWEEN: Duration = Duration::from_millis(300);
/// Downloads at the same time.
const CLIENTS: usize = 4;
/// Time between two datagrams on the host's clock. A crash may lose what every one of the
/// downloads waits for, and then nothing but these is left to forward.
const DRIZZLE: Duration = Duration::from_millis(1);
/// The guest's port for them: "discard".
const DISCARD_PORT: u16 = 9;
/// How long a download may stand still before its client begins another.
const PATIENCE: Duration = Duration::from_secs(1);
/// Processors: with one, `-icount` gives the same figures in every run.
const CPUS: u32 = 1;

/// A figure, its budget and where it comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Row {
    what: String,
    /// `None` when it could not be measured.
    value: Option<u64>,
    unit: &'static str,
    budget: Option<u64>,
}

impl Row {
    fn new(what: impl Into<String>, value: Option<u64>, unit: &'static str) -> Self {
        Self { what: what.into(), value, unit, budget: None }
    }

    fn budget(mut self, budget: u64) -> Self {
        self.budget = Some(budget);
        self
    }

    fn verdict(&self) -> &'static str {
        match (self.value, self.budget) {
            (None, _) => "not measured",
            (Some(_), None) => "",
            (Some(value), Some(budget)) if value <= budget => "pass",
            (Some(_), Some(_)) => "miss",
        }
    }
}

/// Measures all and prints a table, or JSON. A missed budget is reported, not an error.
///
/// # Errors
/// A system cannot be built or booted.
pub fn bench(as_json: bool) -> miette::Result<()> {
    setup::qemu()?;
    let mut rows = Vec::new();
    rows.extend(core_figures()?);
    rows.extend(path_figures()?);
    rows.extend(blocks::figures()?);
    rows.push(core_lines()?);
    if as_json {
        println!("{}", to_json(&rows));
    } else {
        print!("{}", to_table(&rows));
    }
    Ok(())
}

/// Times that a measuring domain reports about itself.
type Figures = BTreeMap<String, Vec<u64>>;

/// Boots `built`, and passes every measurement of its console on.
fn boot(built: &Built, accel: Accel, figures: Sender<(String, u64)>) -> miette::Result<Machine> {
    let options = Options { accel, cpus: Some(CPUS), ports: Ports::Free, ..Options::default() };
    Machine::start(built, &options, move |line| {
        if let Some((name, value, _)) = line.measurement() {
            let _ = figures.send((name.into(), value));
        }
    })
}

/// What the measuring domains say: hypercall, event, grant copy.
fn core_figures() -> miette::Result<Vec<Row>> {
    let names = ["null_hypercall", "event_round_trip", "grant_copy_1500"];
    let built = build::build_named(Path::new("pingpong"))?;
    let (sender, receiver) = channel();
    let machine = boot(&built, Accel::Icount, sender)?;
    let mut figures = Figures::new();
    let deadline = Instant::now() + STEP;
    while names.iter().any(|name| !figures.contains_key(*name)) {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok((name, value)) = receiver.recv_timeout(left) else { break };
        figures.entry(name).or_default().push(value);
    }
    drop(machine);
    let value = |name: &str| figures.get(name).and_then(|values| median(values));
    Ok(vec![
        Row::new("null hypercall", value(names[0]), "instructions").budget(150),
        Row::new("event round trip between two domains", value(names[1]), "instructions"),
        Row::new("grant copy of 1500 bytes", value(names[2]), "instructions"),
    ])
}

/// Boot to first answer, restarts, sizes: on the default system.
fn path_figures() -> miette::Result<Vec<Row>> {
    let mut built = build::build_named(Path::new("default"))?;
    forward_datagrams(&mut built);
    let (sender, receiver) = channel();
    let mut machine = boot(&built, Accel::IcountIdle, sender)?;
    let server =
        machine.web(0).ok_or_else(|| miette!("the default system forwards no web port"))?;
    // A client that comes earlier waits for its next attempt, which is seconds later.
    machine.wait_line(STEP, |line| line.from == "demo" && line.text.starts_with("address"))?;
    wait_web(server, STEP, || false)?;
    let mut figures = Figures::new();
    await_figure(&receiver, &mut figures, "first_http_answer", Duration::from_secs(5));
    let first = |name: &str| figures.get(name)?.first().map(|ns| ns / 1000);
    let mut rows = vec![
        Row::new("hypervisor entry to first packet answered", first("first_packet_answered"), "µs")
            .budget(100_000),
        Row::new("hypervisor entry to first HTTP answer", first("first_http_answer"), "µs"),
    ];
    let before = platform::info(&machine.mux)?;
    let drizzle = machine.forwards.iter().find(|forward| forward.guest_port == DISCARD_PORT);
    let drizzle = drizzle.ok_or_else(|| miette!("no port for datagrams"))?.host;
    let traffic = Traffic::start(server, drizzle);
    let outages = outages(&machine, "net0", "first_packet", &receiver);
    drop(traffic);
    let outages = outages.map_err(|error| machine.explain(error))?;
    let after = platform::info(&machine.mux)?;
    rows.extend(outages.rows("first packet forwarded", "network driver"));
    let leaked = before.free_bytes.saturating_sub(after.free_bytes);
    rows.push(Row::new("memory lost over these crashes", Some(leaked), "bytes").budget(0));
    rows.extend(sizes(&built, &machine)?);
    Ok(rows)
}

/// Outages in nanoseconds.
#[derive(Default)]
struct Outages {
    served: Vec<u64>,
    runnable: Vec<u64>,
}

impl Outages {
    fn rows(&self, served: &str, driver: &str) -> Vec<Row> {
        let mut rows = Vec::new();
        let us = |values: &[u64], percent| percentile(values, percent).map(|ns| ns / 1000);
        for (percent, budget, name) in [(50, 5_000, "median"), (99, 10_000, "p99")] {
            let what = format!("crash to {served}, {name} of {}", self.served.len());
            rows.push(Row::new(what, us(&self.served, percent), "µs").budget(budget));
        }
        for (percent, name) in [(50, "median"), (99, "p99")] {
            let what = format!("crash to {driver} runnable, {name} of {}", self.runnable.len());
            rows.push(Row::new(what, us(&self.runnable, percent), "µs"));
        }
        rows
    }
}

/// Crashes a driver domain under load, again and again. `figure` is what its next incarnation
/// says when it has served somebody.
fn outages(
    machine: &Machine,
    victim: &str,
    figure: &str,
    receiver: &Receiver<(String, u64)>,
) -> miette::Result<Outages> {
    let mut outages = Outages::default();
    for _ in 0..CRASHES {
        std::thread::sleep(BETWEEN);
        while receiver.try_recv().is_ok() {}
        let life = incarnation(machine, victim)?;
        platform::crash(&machine.mux, victim)?;
        let mut figures = Figures::new();
        await_figure(receiver, &mut figures, figure, Duration::from_secs(10));
        let died = death_of(machine, victim, life)?;
        outages.runnable.push(died.restarted_ns.saturating_sub(died.time_ns));
        let first = figures.get(figure).and_then(|values| values.first());
        outages.served.extend(first.map(|ns| ns.saturating_sub(died.time_ns)));
    }
    Ok(outages)
}

fn incarnation(machine: &Machine, name: &str) -> miette::Result<u32> {
    let domains = platform::list(&machine.mux)?;
    let found = domains.iter().find(|domain| domain.name == name);
    found.map(|domain| domain.incarnation).ok_or_else(|| miette!("there is no {name}"))
}

/// The record of the death that ended incarnation `life`, once the next one could run.
fn death_of(machine: &Machine, name: &str, life: u32) -> miette::Result<Why> {
    let deadline = Instant::now() + STEP;
    while Instant::now() < deadline {
        if incarnation(machine, name)? > life {
            let why = platform::why(&machine.mux, name)?;
            if why.incarnation == life && why.restarted_ns != 0 {
                return Ok(why);
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(miette!("{name} did not come back within {STEP:?}"))
}

/// Adds a port of the host that leads to [`DISCARD_PORT`] of the guest.
fn forward_datagrams(built: &mut Built) {
    let forward = HostForward {
        protocol: Protocol::Udp,
        host: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0),
        guest: None,
        guest_port: DISCARD_PORT,
    };
    for nic in &mut built.compiled.machine.nics {
        if let NicNet::User { host_forward } = &mut nic.net {
            host_forward.push(forward);
        }
    }
}

/// Clients that always download, and one that sends datagrams, until they are dropped.
struct Traffic {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
}

impl Traffic {
    fn start(server: SocketAddr, drizzle: SocketAddrV4) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // What became of it does not matter here; the tests look at that.
                    let _ = crate::http::download(server, 1_000_000, PATIENCE, |_| ());
                }
            })
        };
        let mut clients: Vec<_> = (0..CLIENTS).map(client).collect();
        let stopped = Arc::clone(&stop);
        clients.push(std::thread::spawn(move || {
            let Ok(socket) = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)) else { return };
            while !stopped.load(Ordering::Relaxed) {
                let _ = socket.send_to(&[0; 64], drizzle);
                std::thread::sleep(DRIZZLE);
            }
        }));
        Self { stop, clients }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            let _ = client.join();
        }
    }
}

/// Takes what was measured until the awaited figure has come, or the time is over.
fn await_figure(
    receiver: &Receiver<(String, u64)>,
    figures: &mut Figures,
    awaited: &str,
    limit: Duration,
) {
    let deadline = Instant::now() + limit;
    while !figures.contains_key(awaited)
        && let Ok((name, value)) =
            receiver.recv_timeout(deadline.saturating_duration_since(Instant::now()))
    {
        figures.entry(name).or_default().push(value);
    }
}

/// Image and memory of each domain.
fn sizes(built: &Built, machine: &Machine) -> miette::Result<Vec<Row>> {
    let domains = platform::list(&machine.mux)?;
    let info = platform::info(&machine.mux)?;
    let mut rows = Vec::new();
    for (name, bytes) in &built.images {
        let row = Row::new(format!("image of {name}"), Some(*bytes), "bytes");
        rows.push(if name == "net-domain" { row.budget(512 << 10) } else { row });
    }
    let mut platform_bytes = info.core_bytes;
    for domain in &domains {
        let row =
            Row::new(format!("memory of {}", domain.name), Some(domain.memory_bytes), "bytes");
        let role = domain.role;
        if role != axolotl_abi::system::Role::Guest {
            platform_bytes += domain.memory_bytes;
        }
        let driver = role == axolotl_abi::system::Role::Driver;
        rows.push(if driver { row.budget(4 << 20) } else { row });
    }
    rows.push(Row::new("memory of the core", Some(info.core_bytes), "bytes"));
    let whole = Row::new("memory of the platform without guests", Some(platform_bytes), "bytes");
    rows.push(whole.budget(24 << 20));
    Ok(rows)
}

fn core_lines() -> miette::Result<Row> {
    let root = project::root().join("core-hv");
    let lines = lines_of_code::count_directory(&root.join("hv-core/src"))?
        + lines_of_code::count_directory(&root.join("hv-x86/src"))?;
    Ok(Row::new("lines of code of the core", Some(lines as u64), "lines").budget(10_000))
}

fn median(values: &[u64]) -> Option<u64> {
    percentile(values, 50)
}

/// The smallest value that at least `percent` of all do not exceed.
fn percentile(values: &[u64], percent: usize) -> Option<u64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

fn to_json(rows: &[Row]) -> String {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({
                "what": row.what, "value": row.value, "unit": row.unit,
                "budget": row.budget, "verdict": row.verdict(),
            })
        })
        .collect();
    format!("{:#}", json!({ "accel": "tcg, icount shift=0", "cpus": CPUS, "rows": rows }))
}

fn to_table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.what.chars().count()).max().unwrap_or(0);
    let mut table = format!("{:width$}  {:>12} {:12} {:>10}\n", "what", "value", "unit", "budget");
    for row in rows {
        let text = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
        let (value, budget) = (text(row.value), text(row.budget));
        let line = format!(
            "{:width$}  {value:>12} {:12} {budget:>10}  {}",
            row.what,
            row.unit,
            row.verdict()
        );
        table += line.trim_end();
        table.push('\n');
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let values: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(percentile(&values, 50), Some(50));
        assert_eq!(percentile(&values, 99), Some(99));
        assert_eq!(percentile(&[7], 99), Some(7));
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn nothing_passes_without_having_been_measured() {
        assert_eq!(Row::new("x", None, "ns").budget(5).verdict(), "not measured");
        assert_eq!(Row::new("x", Some(5), "ns").budget(5).verdict(), "pass");
        assert_eq!(Row::new("x", Some(6), "ns").budget(5).verdict(), "miss");
        assert_eq!(Row::new("x", Some(6), "ns").verdict(), "");
    }

    #[test]
    fn the_table_and_json_hold_every_row() {
        let rows = [Row::new("a", Some(1), "ns").budget(2), Row::new("b", None, "µs")];
        assert_eq!(to_table(&rows).lines().count(), 3);
        let json: serde_json::Value = serde_json::from_str(&to_json(&rows)).expect("JSON");
        assert_eq!(json["rows"][0]["verdict"], "pass");
        assert!(json["rows"][1]["value"].is_null());
    }
}
