//! What outlives an incarnation, in one preserved page:
//!
//! | bytes  | meaning                                                        |
//! |--------|----------------------------------------------------------------|
//! | 0..4   | magic                                                          |
//! | 4..8   | [`Phase`]                                                      |
//! | 8..12  | steps of this phase that are over                              |
//! | 12..16 | a step is under way: 1 must be survived, 2 must not, 3 either  |
//! | 16..20 | failures                                                       |
//! | 20..24 | deaths as expected                                             |
//! | 24..32 | hypercalls                                                     |
//! | 32..40 | state of the random numbers                                    |
//! | 48..96 | number and arguments of the hypercall under way                |
#![expect(unsafe_code, reason = "hypercalls with arguments that no wrapper would let through")]

use core::sync::atomic::Ordering::SeqCst;
use shmem::Page;
use unikernel::{hypercall, println};

const MAGIC: u32 = u32::from_le_bytes(*b"SELF");

/// What is being done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Hypercalls one by one.
    Directed = 0,
    /// Hypercalls at random.
    Random = 1,
    /// More of everything than there is.
    Greedy = 2,
    /// What must end the domain.
    Deadly = 3,
    /// Nothing.
    Done = 4,
}

const IDLE: u32 = 0;
const SURVIVES: u32 = 1;
const DIES: u32 = 2;
const EITHER: u32 = 3;

/// The preserved page.
pub struct State(Page);

impl State {
    /// Takes over what the last incarnation left, if there was one.
    pub fn open(page: Page) -> Self {
        if page.u32(0).load(SeqCst) != MAGIC {
            page.clear();
            page.u32(0).store(MAGIC, SeqCst);
        }
        Self(page)
    }

    /// What is to be done now.
    pub fn phase(&self) -> Phase {
        match self.0.u32(4).load(SeqCst) {
            0 => Phase::Directed,
            1 => Phase::Random,
            2 => Phase::Greedy,
            3 => Phase::Deadly,
            _ => Phase::Done,
        }
    }

    /// Begins a phase.
    pub fn enter(&mut self, phase: Phase) {
        self.0.u32(12).store(IDLE, SeqCst);
        self.0.u32(8).store(0, SeqCst);
        self.0.u32(4).store(phase as u32, SeqCst);
    }

    /// Steps of this phase that are over, in all incarnations.
    pub fn steps(&self) -> u32 {
        self.0.u32(8).load(SeqCst)
    }

    /// Failures so far.
    pub fn failures(&self) -> u32 {
        self.0.u32(16).load(SeqCst)
    }

    /// Deaths that were expected.
    pub fn deaths(&self) -> u32 {
        self.0.u32(20).load(SeqCst)
    }

    /// Hypercalls so far.
    pub fn calls(&self) -> u64 {
        self.0.u64(24).load(SeqCst)
    }

    /// Where the random numbers are kept; 0 at first.
    pub fn random(&mut self) -> u64 {
        self.0.u64(32).load(SeqCst)
    }

    /// Keeps them.
    pub fn set_random(&mut self, value: u64) {
        self.0.u64(32).store(value, SeqCst);
    }

    /// Counts a failure. The caller has said which.
    pub fn fail(&mut self) {
        self.0.u32(16).fetch_add(1, SeqCst);
    }

    /// At the start of an incarnation: was the end of the last one right?
    pub fn judge_last_death(&mut self) {
        match self.0.u32(12).swap(IDLE, SeqCst) {
            IDLE => return,
            DIES | EITHER => {
                self.0.u32(20).fetch_add(1, SeqCst);
            }
            _ => {
                let word = |n: usize| self.0.u64(48 + 8 * n).load(SeqCst);
                println!(
                    "selftest: FAILED: hypercall {} ({:#x}, {:#x}, {:#x}, {:#x}, {:#x}) was deadly",
                    word(0),
                    word(1),
                    word(2),
                    word(3),
                    word(4),
                    word(5),
                );
                self.fail();
            }
        }
        self.0.u32(8).fetch_add(1, SeqCst);
    }

    /// Does what must end the domain. Returns if it has not.
    pub fn die(&mut self, attack: fn()) {
        self.attempt(DIES, attack);
    }

    /// Does what may end the domain, depending on the processor.
    pub fn may_die(&mut self, attack: fn()) {
        self.attempt(EITHER, attack);
    }

    fn attempt(&mut self, expected: u32, attack: fn()) {
        self.0.u32(12).store(expected, SeqCst);
        attack();
        self.0.u32(12).store(IDLE, SeqCst);
        self.0.u32(8).fetch_add(1, SeqCst);
    }

    /// Issues a hypercall that must be survived, and returns its result. A result that is neither
    /// a value nor an error number is a failure.
    ///
    /// Sound only because of what the callers pass: every pointer of theirs leads to memory that
    /// the test sets apart, or to what the core must not write for us.
    pub fn call(&mut self, number: u64, arguments: [u64; 5]) -> i64 {
        self.0.u64(48).store(number, SeqCst);
        for (n, argument) in arguments.iter().enumerate() {
            self.0.u64(56 + 8 * n).store(*argument, SeqCst);
        }
        self.0.u32(12).store(SURVIVES, SeqCst);
        // SAFETY: see above; if the core does write where it must not, that is the failure that
        // this test looks for.
        let result = unsafe { hypercall::raw(number, arguments) };
        self.0.u32(12).store(IDLE, SeqCst);
        self.0.u32(8).fetch_add(1, SeqCst);
        self.0.u64(24).fetch_add(1, SeqCst);
        if result < -4095 {
            println!("selftest: FAILED: hypercall {number} {arguments:x?} answered {result:#x}");
            self.fail();
        }
        result
    }
}
