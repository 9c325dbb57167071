//! When a domain that died is started again.
//!
//! As in Hubris, a crash loop must neither take the machine's time nor fill its logs. A life
//! shorter than `min_runtime_ms` counts as quick, and more than `max_quick_deaths` of them in a
//! row mean that the domain is held until somebody asks for a restart. Above `max_per_minute`
//! restarts in the last minute, the next one waits until the rate is kept again. Deaths that an
//! administrator asked for (`axl crash`, `axl restart`) count in neither: they are no sign of a
//! loop.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use axolotl_abi::control::{DEATH_CRASHED, DEATH_RESTARTED, DEATH_SHUTDOWN, DeathRecord};
use axolotl_abi::system::{Domain, OnEnd, RestartLimits};
use xen_abi::sched::{SHUTDOWN_CRASH, SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT, SHUTDOWN_SUSPEND};

const MINUTE_NS: u64 = 60_000_000_000;
/// Restarts that are remembered: no cap above this has a meaning.
const REMEMBERED: usize = 4096;

/// What becomes of a domain that died.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Decision {
    /// Its next incarnation, at once.
    Restart,
    /// Its next incarnation, at this system time.
    RestartAt(u64),
    /// Nothing before somebody asks, for this reason.
    Hold(String),
    /// Nothing: it stays for inspection.
    Preserve,
    /// It goes.
    Destroy,
}

/// What is remembered of a domain's earlier lives.
#[derive(Clone, Default, Debug)]
pub(crate) struct History {
    quick_deaths: u32,
    restarts: VecDeque<u64>,
}

impl History {
    /// An administrator gives the domain a new start.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }

    /// What becomes of `domain`, whose last life ended as `death` says, at `now`.
    pub(crate) fn decide(&mut self, domain: &Domain, death: &DeathRecord, now: u64) -> Decision {
        match action(domain, death) {
            OnEnd::Preserve => Decision::Preserve,
            OnEnd::Destroy => Decision::Destroy,
            OnEnd::Restart if matches!(death.cause, DEATH_CRASHED | DEATH_RESTARTED) => {
                Decision::Restart
            }
            OnEnd::Restart => self.restart(domain.restart, death.lived_ns, now),
        }
    }

    fn restart(&mut self, limits: RestartLimits, lived_ns: u64, now: u64) -> Decision {
        if lived_ns < u64::from(limits.min_runtime_ms) * 1_000_000 {
            self.quick_deaths = self.quick_deaths.saturating_add(1);
        } else {
            self.quick_deaths = 0;
        }
        if self.quick_deaths > limits.max_quick_deaths {
            return Decision::Hold(format!(
                "it died {} times in a row within {} ms of its start",
                self.quick_deaths, limits.min_runtime_ms
            ));
        }
        let at = self.earliest(limits.max_per_minute, now);
        if self.restarts.len() == REMEMBERED {
            self.restarts.pop_front();
        }
        self.restarts.push_back(at);
        if at > now { Decision::RestartAt(at) } else { Decision::Restart }
    }

    /// The first time from `now` on at which a restart keeps the cap.
    fn earliest(&self, max_per_minute: u32, now: u64) -> u64 {
        let cap = max_per_minute as usize;
        if cap == 0 || self.restarts.len() < cap {
            return now;
        }
        // With the cap's number of restarts behind it, the oldest of these must be a minute ago.
        let oldest = self.restarts.get(self.restarts.len() - cap).copied().unwrap_or(0);
        now.max(oldest.saturating_add(MINUTE_NS))
    }
}

/// Which of the domain's policies a death falls under.
fn action(domain: &Domain, death: &DeathRecord) -> OnEnd {
    match (death.cause, death.detail) {
        (DEATH_RESTARTED, _) => OnEnd::Restart,
        (DEATH_SHUTDOWN, SHUTDOWN_POWEROFF | SHUTDOWN_SUSPEND) => domain.on_poweroff,
        (DEATH_SHUTDOWN, SHUTDOWN_REBOOT) => domain.on_reboot,
        _ => domain.on_crash,
    }
}

/// What a death was, for people.
pub(crate) fn describe(death: &DeathRecord) -> String {
    use axolotl_abi::control::{DEATH_FAULT, DEATH_RULE, DEATH_WATCHDOG};
    let name = axolotl_abi::control::vector_name(death.vector);
    match death.cause {
        DEATH_FAULT if death.vector == 14 => {
            format!("page fault at {:#x}, rip {:#x}", death.address, death.rip)
        }
        DEATH_FAULT => format!("{name} (vector {}), rip {:#x}", death.vector, death.rip),
        DEATH_SHUTDOWN => match death.detail {
            SHUTDOWN_POWEROFF => "it powered off".into(),
            SHUTDOWN_REBOOT => "it asked for a reboot".into(),
            SHUTDOWN_CRASH => "it panicked".into(),
            other => format!("it shut down, reason {other}"),
        },
        DEATH_WATCHDOG => "its watchdog ran out".into(),
        DEATH_CRASHED => "crashed on request".into(),
        DEATH_RULE => format!("it broke rule {} of the ABI", death.detail),
        DEATH_RESTARTED => "restarted on request".into(),
        other => format!("cause {other}"),
    }
}
