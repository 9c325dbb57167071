//! Disk requests: what they cost with and without a split, who pays, and how long an outage is.
//!
//! The processor time that the core charges to a domain is, under `-icount shift=0`, the number
//! of instructions that were executed for it, its hypercalls included. What the emulated
//! controller and the medium take costs none, and idle time does not count.

use super::{CPUS, Figures, Row, STEP, await_figure, boot, outages};
use crate::machine::Machine;
use crate::qemu::Accel;
use crate::{build, platform};
use miette::miette;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::channel;

/// The loads of `tests/blockbench`, each with the KiB of one request.
const LOADS: [(&str, u64); 6] = [
    ("read_4k_depth_1", 4),
    ("read_4k_depth_32", 4),
    ("write_4k_depth_1", 4),
    ("write_4k_depth_32", 4),
    ("read_128k", 128),
    ("write_128k", 128),
];
const _: () = assert!(CPUS == 1, "with more processors idle time is not told from work");

/// Instructions of one load.
struct Cost {
    requests: u64,
    /// By domain.
    instructions: BTreeMap<String, u64>,
}

impl Cost {
    fn total(&self) -> u64 {
        self.instructions.values().sum()
    }

    fn per_request(&self, instructions: u64) -> Option<u64> {
        instructions.checked_div(self.requests)
    }

    fn of(&self, name: &str) -> u64 {
        self.instructions.get(name).copied().unwrap_or(0)
    }
}

/// Measures all loads through a driver domain, and with the driver in the guest.
pub(super) fn figures() -> miette::Result<Vec<Row>> {
    let split = costs("blockbench")?;
    let direct = costs("blockbench-direct")?;
    let mut rows = Vec::new();
    for (load, kib) in LOADS {
        let name = load.replace('_', " ");
        let (split, direct) = (split.get(load), direct.get(load));
        rows.push(rate(format!("{name}, through a driver domain"), split, kib));
        rows.push(rate(format!("{name}, driver in the guest"), direct, kib));
        let part = |what: &str, cost: Option<&Cost>, domain: &str| {
            let value = cost.and_then(|cost| cost.per_request(cost.of(domain)));
            Row::new(format!("{name}: {what}"), value, "instructions")
        };
        rows.push(part("guest and its hypercalls", split, "bench"));
        rows.push(part("driver domain and its hypercalls", split, "disk0"));
        rows.push(part("guest with the driver", direct, "bench"));
    }
    rows.extend(outage()?);
    Ok(rows)
}

/// How long disks stand still when their driver dies under a verified load.
fn outage() -> miette::Result<Vec<Row>> {
    let built = build::build_named(Path::new("disktest-nvme"))?;
    let (sender, receiver) = channel();
    let mut machine = boot(&built, Accel::IcountIdle, sender)?;
    let mut figures = Figures::new();
    await_figure(&receiver, &mut figures, "first_request", STEP);
    let outages = outages(&machine, "disk0", "first_request", &receiver)
        .map_err(|error| machine.explain(error))?;
    Ok(outages.rows("first disk request served", "disk driver"))
}

/// Requests in a million instructions, of all domains; of long ones the KiB.
fn rate(what: String, cost: Option<&Cost>, kib: u64) -> Row {
    let value = cost.and_then(|cost| {
        let done = if kib > 4 { cost.requests * kib } else { cost.requests };
        (done * 1_000_000).checked_div(cost.total())
    });
    Row::new(what, value, if kib > 4 { "KiB/Minst" } else { "req/Minst" })
}

fn costs(system: &str) -> miette::Result<BTreeMap<String, Cost>> {
    let built = build::build_named(Path::new(system))?;
    let (sender, receiver) = channel();
    let mut machine = boot(&built, Accel::IcountIdle, sender)?;
    let mut costs = BTreeMap::new();
    let mut figures = Figures::new();
    await_figure(&receiver, &mut figures, "blk_ready", STEP);
    let mut before = processor_time(&machine)?;
    for (load, _) in LOADS {
        let figure = format!("blk_{load}");
        await_figure(&receiver, &mut figures, &figure, STEP);
        let requests = figures.get(&figure).and_then(|values| values.first()).copied();
        let requests = requests.ok_or_else(|| {
            machine.explain(miette!("`{system}` did not end its load `{load}` within {STEP:?}"))
        })?;
        // The guest rests now for longer than this takes.
        let after = processor_time(&machine)?;
        let spent = |(name, now): (&String, &u64)| {
            (name.clone(), now.saturating_sub(before.get(name).copied().unwrap_or(0)))
        };
        let instructions = after.iter().map(spent).collect();
        costs.insert(load.to_owned(), Cost { requests, instructions });
        before = after;
    }
    Ok(costs)
}

/// What each domain but the control domain, which answers, has used so far: ns, or instructions.
fn processor_time(machine: &Machine) -> miette::Result<BTreeMap<String, u64>> {
    let domains = platform::list(&machine.mux)?;
    let others = domains.into_iter().filter(|domain| domain.name != "control");
    Ok(others.map(|domain| (domain.name, domain.cpu_us * 1000)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_count_the_instructions_of_all_domains() {
        let instructions = [("bench".into(), 3_000_000), ("disk0".into(), 5_000_000)].into();
        let cost = Cost { requests: 400, instructions };
        assert_eq!(rate("short".into(), Some(&cost), 4).value, Some(50));
        assert_eq!(rate("long".into(), Some(&cost), 128).value, Some(6400));
        assert_eq!(cost.per_request(cost.of("disk0")), Some(12_500));
        assert_eq!(rate("none".into(), None, 4).value, None);
        let nothing = Cost { requests: 0, instructions: BTreeMap::new() };
        assert_eq!(rate("nothing".into(), Some(&nothing), 4).value, None);
    }
}
