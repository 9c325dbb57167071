//! Answers as text for people, and as JSON for programs.

use axolotl_abi::control::{
    DEATH_CRASHED, DEATH_FAULT, DEATH_RESTARTED, DEATH_RULE, DEATH_SHUTDOWN, DEATH_WATCHDOG,
    EXIT_REASONS, vector_name,
};
use axolotl_abi::protocol::{DomainLine, DomainState, GuestExits, Info, Why};
use axolotl_abi::system::Role;
use serde_json::{Value, json};
use std::fmt::Write as _;
use system::bdf_text;

const REGISTERS: [&str; 16] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// The word for a state.
#[must_use]
pub const fn state(state: DomainState) -> &'static str {
    match state {
        DomainState::Building => "building",
        DomainState::Running => "running",
        DomainState::Blocked => "blocked",
        DomainState::Paused => "paused",
        DomainState::Restarting => "restarting",
        DomainState::Held => "held",
        DomainState::Dead => "dead",
        DomainState::Dying => "dying",
    }
}

/// The letters of `xl list`: running, blocked, paused, shut down, crashed, dying.
const fn letters(state: DomainState) -> &'static str {
    match state {
        DomainState::Running => "r-----",
        DomainState::Blocked => "-b----",
        DomainState::Paused => "--p---",
        DomainState::Dead => "---s--",
        DomainState::Held | DomainState::Restarting => "----c-",
        DomainState::Dying => "-----d",
        DomainState::Building => "------",
    }
}

const fn role(role: Role) -> &'static str {
    match role {
        Role::Control => "control",
        Role::Store => "store",
        Role::Driver => "driver",
        Role::Guest => "guest",
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{}", ms / 1000, ms % 1000 / 100)
}

/// `axl list`.
#[must_use]
pub fn list(domains: &[DomainLine]) -> String {
    let mut text = format!(
        "{:<20} {:>3} {:>4} {:<7} {:<17} {:>7} {:>8} {:>8}\n",
        "Name", "ID", "Inc", "Role", "State", "Mem/KiB", "Time(s)", "Up(s)"
    );
    for domain in domains {
        let _ = writeln!(
            text,
            "{:<20} {:>3} {:>4} {:<7} {:>6} {:<10} {:>7} {:>8} {:>8}",
            domain.name,
            domain.domid,
            domain.incarnation,
            role(domain.role),
            letters(domain.state),
            state(domain.state),
            domain.memory_bytes / 1024,
            seconds(domain.cpu_us / 1000),
            seconds(domain.uptime_ms),
        );
    }
    for domain in domains {
        if let Some(why) = &domain.held {
            let _ = writeln!(text, "{} is held: {why}", domain.name);
        }
    }
    text
}

/// `axl list --json`.
#[must_use]
pub fn list_json(domains: &[DomainLine]) -> Value {
    let line = |domain: &DomainLine| {
        json!({
            "name": domain.name,
            "domid": domain.domid,
            "incarnation": domain.incarnation,
            "state": state(domain.state),
            "role": role(domain.role),
            "memory_bytes": domain.memory_bytes,
            "uptime_ms": domain.uptime_ms,
            "cpu_us": domain.cpu_us,
            "restarts": domain.restarts,
            "held": domain.held,
        })
    };
    domains.iter().map(line).collect()
}

/// `axl info`.
#[must_use]
pub fn info(info: &Info) -> String {
    let mib = |bytes: u64| format!("{} MiB", bytes / (1 << 20));
    let mut text = String::new();
    let mut line = |key: &str, value: String| {
        let _ = writeln!(text, "{key:<22} : {value}");
    };
    line("system", info.system.clone());
    line("version", info.version.clone());
    line("control interface", info.control_interface.to_string());
    line("cpus", info.cpus.to_string());
    line("tsc", format!("{} MHz", info.tsc_khz / 1000));
    line("memory", mib(info.memory_bytes));
    line("free memory", mib(info.free_bytes));
    line("core's memory", format!("{} KiB", info.core_bytes / 1024));
    line("uptime", format!("{} s", seconds(info.uptime_ms)));
    line("started in", format!("{} ms", info.started_after_us / 1000));
    if info.dma_trusted.is_empty() {
        line("dma trusted", "none".into());
    }
    for (bdf, owner) in &info.dma_trusted {
        line("dma trusted", format!("{} of {owner} can reach all memory", bdf_text(*bdf)));
    }
    for guest in &info.guests {
        line("exits", format!("{}: {}", guest.name, exits(guest)));
        line("unlisted accesses", format!("{}: {}", guest.name, unlisted(guest)));
    }
    text
}

/// What the counters of a guest's exits are called, in the order of `EXIT_*`.
pub const EXIT_NAMES: [&str; EXIT_REASONS] =
    ["cpuid", "msr", "hlt", "hypercall", "port", "memory", "window", "other"];

fn exits(guest: &GuestExits) -> String {
    let named = EXIT_NAMES.iter().zip(&guest.exits).filter(|(_, count)| **count > 0);
    named.map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

/// How many, and what the last one was.
fn unlisted(guest: &GuestExits) -> String {
    let number = guest.last_unlisted & 0xffff_ffff;
    let last = match guest.last_unlisted >> 32 {
        1 => format!("MSR {number:#x} read"),
        2 => format!("MSR {number:#x} written"),
        3 => format!("port {number:#x}"),
        4 => format!("page {number:#x}"),
        5 => format!("hypercall {}, command {}", number >> 16, number & 0xffff),
        _ => return "none".into(),
    };
    format!("{}, last {last}", guest.unlisted)
}

/// `axl info --json`.
#[must_use]
pub fn info_json(info: &Info) -> Value {
    let trusted = info.dma_trusted.iter();
    let trusted: Vec<Value> =
        trusted.map(|(bdf, owner)| json!({"bdf": bdf_text(*bdf), "owner": owner})).collect();
    let named = |guest: &GuestExits| {
        let exits = EXIT_NAMES.iter().zip(&guest.exits);
        let exits: serde_json::Map<_, _> =
            exits.map(|(name, count)| ((*name).to_owned(), json!(count))).collect();
        json!({"name": guest.name, "exits": exits, "unlisted": guest.unlisted,
            "last_unlisted": guest.last_unlisted})
    };
    let guests: Vec<Value> = info.guests.iter().map(named).collect();
    json!({
        "system": info.system,
        "version": info.version,
        "control_interface": info.control_interface,
        "cpus": info.cpus,
        "tsc_khz": info.tsc_khz,
        "memory_bytes": info.memory_bytes,
        "free_bytes": info.free_bytes,
        "core_bytes": info.core_bytes,
        "uptime_ms": info.uptime_ms,
        "started_after_us": info.started_after_us,
        "dma_trusted": trusted,
        "guests": guests,
    })
}

/// The word for a cause of death.
const fn cause(why: &Why) -> &'static str {
    match why.cause {
        DEATH_FAULT => "fault",
        DEATH_SHUTDOWN => "shutdown",
        DEATH_WATCHDOG => "watchdog",
        DEATH_CRASHED => "crashed on request",
        DEATH_RULE => "rule broken",
        DEATH_RESTARTED => "restarted on request",
        _ => "unknown",
    }
}

const fn shutdown_reason(reason: u32) -> &'static str {
    match reason {
        0 => "power off",
        1 => "reboot",
        2 => "suspend",
        3 => "panic",
        4 => "watchdog",
        _ => "unknown reason",
    }
}

/// Whether a processor exception ended it.
const fn is_fault(why: &Why) -> bool {
    matches!(why.cause, DEATH_FAULT | DEATH_CRASHED)
}

/// `axl why`.
#[must_use]
pub fn why(why: &Why) -> String {
    let mut text = format!(
        "{}, incarnation {}: {}\n",
        why.name,
        why.incarnation,
        match why.cause {
            DEATH_SHUTDOWN => format!("shutdown ({})", shutdown_reason(why.detail)),
            DEATH_RULE => format!("broke rule {} of the ABI", why.detail),
            _ => cause(why).to_owned(),
        }
    );
    if is_fault(why) {
        let _ = writeln!(
            text,
            "  {} (vector {}, error code {:#x}), address {:#x}",
            vector_name(why.vector),
            why.vector,
            why.error,
            why.address
        );
    }
    let at = seconds(why.time_ns / 1_000_000);
    let _ = writeln!(text, "  at {at} s, after {} s of life", seconds(why.lived_ns / 1_000_000));
    match why.restarted_ns.checked_sub(why.time_ns) {
        Some(outage) if why.restarted_ns != 0 => {
            let _ = writeln!(text, "  next incarnation ran {} us later", outage / 1000);
        }
        _ => text.push_str("  not restarted\n"),
    }
    if let Some(held) = &why.held {
        let _ = writeln!(text, "  held: {held}");
    }
    let _ = writeln!(text, "registers\n  rip {:016x}  rflags {:08x}", why.rip, why.rflags);
    for (names, values) in REGISTERS.chunks(4).zip(why.registers.chunks(4)) {
        let row: Vec<String> = names
            .iter()
            .zip(values)
            .map(|(name, value)| format!("{name:<3} {value:016x}"))
            .collect();
        let _ = writeln!(text, "  {}", row.join("  "));
    }
    // Whoever faults in its first function has none.
    if !why.backtrace.is_empty() {
        text.push_str("backtrace\n");
    }
    for address in &why.backtrace {
        let _ = writeln!(text, "  {address:#x}");
    }
    let end = if why.console_tail.is_empty() { "console tail: none" } else { "console tail" };
    let _ = writeln!(text, "{end}");
    for line in String::from_utf8_lossy(&why.console_tail).lines() {
        let _ = writeln!(text, "  {}", printable(line));
    }
    text
}

/// `axl why --json`.
#[must_use]
pub fn why_json(why: &Why) -> Value {
    let registers = REGISTERS.iter().zip(why.registers);
    let registers: serde_json::Map<String, Value> =
        registers.map(|(name, value)| ((*name).to_owned(), hex(value))).collect();
    json!({
        "name": why.name,
        "incarnation": why.incarnation,
        "cause": cause(why),
        "detail": why.detail,
        "vector": why.vector,
        "vector_name": is_fault(why).then(|| vector_name(why.vector)),
        "error": hex(why.error),
        "address": hex(why.address),
        "rip": hex(why.rip),
        "rflags": hex(why.rflags),
        "registers": registers,
        "backtrace": why.backtrace.iter().map(|address| hex(*address)).collect::<Vec<_>>(),
        "time_ns": why.time_ns,
        "lived_ns": why.lived_ns,
        "restarted_ns": why.restarted_ns,
        "restarts": why.restarts,
        "held": why.held,
        "console_tail": String::from_utf8_lossy(&why.console_tail),
    })
}

fn hex(value: u64) -> Value {
    Value::String(format!("{value:#x}"))
}

/// Text of a domain without what would steer a terminal.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| *c != '\r')
        .map(|c| if c.is_control() && c != '\n' && c != '\t' { '?' } else { c })
        .collect()
}
