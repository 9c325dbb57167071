//! Attacks the core from ring 3, and says on its console how the core stood it.
//!
//! Four kinds of attack, in this order:
//!
//! 1. [`directed`]: hypercalls that must fail, or must at least be survived, one by one;
//! 2. [`random`]: any hypercall with any arguments; in `extra`, `calls=N` (20,000) and `seed=N`
//!    (the domain's id);
//! 3. [`directed::take_everything`]: more ports, mappings and memory than there are;
//! 4. [`deadly`]: instructions and accesses that must end the domain, one per incarnation.
//!
//! How far it got is kept in a preserved page ([`state`]), so the domain needs one, and
//! `on_crash = "restart"`. Where the death comes too early, or not at all, a line `selftest:
//! FAILED: …` says so. The last line is `selftest: PASSED (n calls, m deaths)` or `selftest:
//! FAILED (k failures)`.

#![no_std]
#![no_main]

extern crate alloc;

mod deadly;
mod directed;
mod random;
mod state;

use state::{Phase, State};
use unikernel::{Domain, println};

unikernel::main!(run);

fn run(domain: Domain) {
    let Some(page) = domain.preserved().into_iter().next() else {
        println!("selftest: FAILED: needs a preserved page");
        return;
    };
    let mut state = State::open(page);
    state.judge_last_death();
    if state.phase() == Phase::Directed {
        directed::run(&mut state, domain.id());
        state.enter(Phase::Random);
    }
    if state.phase() == Phase::Random {
        let value = |key| domain.config_value(key);
        let calls = value("calls").and_then(|n| n.parse().ok()).unwrap_or(20_000);
        let seed = value("seed").and_then(|n| n.parse().ok()).unwrap_or(domain.id().0.into());
        random::run(&mut state, calls, seed);
        state.enter(Phase::Greedy);
    }
    if state.phase() == Phase::Greedy {
        directed::take_everything(&mut state, domain.id());
        state.enter(Phase::Deadly);
    }
    if state.phase() == Phase::Deadly {
        deadly::run(&mut state);
        state.enter(Phase::Done);
    }
    match state.failures() {
        0 => println!("selftest: PASSED ({} calls, {} deaths)", state.calls(), state.deaths()),
        failures => println!("selftest: FAILED ({failures} failures)"),
    }
}
