//! Code of a domain that runs until it is interrupted, and goes on there later.
//!
//! A domain's own code runs on a stack of its own, on the thread of its simulation. Each access
//! to memory that others can see and each request to the core or to a device is a *step*
//! ([`step`]); before a step the code may be made to wait ([`Yielded::Preempted`]), or be ended
//! for good: its stack is then unwound, while every step is a no-op and every request to the core
//! is refused.

use generator::{Generator, Gn};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Words of a stack. Even: then the generator does not measure how much of it is used.
const STACK_WORDS: usize = 0x2_0000;

/// Why a coroutine goes on.
#[derive(Clone, Copy, Debug)]
pub enum Resume {
    /// It was preempted, or has not begun.
    Go,
    /// The answer to its hypercall.
    Answer(u64),
    /// It is to end.
    Die,
}

/// Why a coroutine stopped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Yielded {
    /// Its turn is over.
    Preempted,
    /// It issues a hypercall.
    Hypercall {
        /// Which.
        number: u64,
        /// Its arguments.
        args: [u64; 5],
    },
    /// It has come to the step at which its life ends.
    Fuse,
    /// It returned, or panicked with this message.
    Ended(Option<String>),
}

/// What a coroutine's stack is unwound with.
struct Killed;

/// How far a coroutine may go.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// Steps until it is preempted.
    pub quantum: u64,
    /// Steps until its life ends.
    pub fuse: u64,
}

thread_local! {
    static BODY: Cell<Option<Box<dyn FnOnce()>>> = const { Cell::new(None) };
    static TURN: Cell<Turn> = const { Cell::new(Turn { quantum: u64::MAX, fuse: u64::MAX }) };
    static USED: Cell<u64> = const { Cell::new(0) };
    static DYING: Cell<bool> = const { Cell::new(false) };
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// A domain's code.
pub struct Coroutine {
    generator: Generator<'static, Resume, Yielded>,
    body: Option<Box<dyn FnOnce()>>,
}

impl Coroutine {
    /// Code that has not begun.
    #[must_use]
    pub fn new(body: Box<dyn FnOnce()>) -> Self {
        let generator = Gn::new_opt(STACK_WORDS, || {
            let body = BODY.take().expect("a coroutine begins with its body");
            Yielded::Ended(run(body))
        });
        Self { generator, body: Some(body) }
    }

    /// Lets it go on for a turn; also returns how many steps it made.
    pub fn resume(&mut self, why: Resume, turn: Turn) -> (Yielded, u64) {
        if let Some(body) = self.body.take() {
            BODY.set(Some(body));
        }
        TURN.set(turn);
        USED.set(0);
        let yielded = self.generator.raw_send(Some(why));
        (yielded.expect("who ended is not resumed"), USED.get())
    }

    /// Ends it where it is.
    pub fn kill(&mut self) {
        if self.body.is_none() && !self.generator.is_done() {
            DYING.set(true);
            let _ = self.generator.raw_send(Some(Resume::Die));
            DYING.set(false);
        }
    }
}

impl Drop for Coroutine {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a body to its end; the message, if it panicked.
fn run(body: Box<dyn FnOnce()>) -> Option<String> {
    let payload = catch_unwind(AssertUnwindSafe(body)).err()?;
    if payload.is::<Killed>() {
        return Some("killed".into());
    }
    Some(panic_text(payload.as_ref()))
}

/// What the last panic said, whose payload this is.
#[must_use]
pub fn panic_text(payload: &(dyn Any + Send)) -> String {
    PANIC.take().unwrap_or_else(|| text(payload))
}

fn text(payload: &(dyn Any + Send)) -> String {
    let message = payload.downcast_ref::<String>().map(String::as_str);
    message.or_else(|| payload.downcast_ref().copied()).unwrap_or("a panic").into()
}

/// Lets [`noting_panics`] work.
pub fn install_panic_hook() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if NOTING.get() {
                let at = info.location().map(ToString::to_string).unwrap_or_default();
                PANIC.set(Some(format!("{at}: {}", text(info.payload()))));
            } else {
                usual(info);
            }
        }));
    });
}

thread_local! {
    static NOTING: Cell<bool> = const { Cell::new(false) };
}

/// Runs what is not a domain's own doing: without steps.
pub fn unwatched<R>(work: impl FnOnce() -> R) -> R {
    shmem::sim::unwatched(work)
}

/// Has panics noted ([`panic_text`]) instead of printed.
pub fn noting_panics<R>(work: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            NOTING.set(self.0);
        }
    }
    let _restore = Restore(NOTING.replace(true));
    work()
}

#[expect(deprecated, reason = "the alternative hands out a scope, which hooks cannot reach")]
fn suspend(why: Yielded) -> Resume {
    match generator::yield_::<Resume, Yielded>(why) {
        Some(Resume::Die) | None => resume_unwind(Box::new(Killed)),
        Some(other) => other,
    }
}

/// Whether the code that runs is being ended.
#[must_use]
pub fn is_dying() -> bool {
    DYING.get()
}

/// A step of the code that runs: it may have to wait here, or to die.
pub fn step() {
    if is_dying() {
        return;
    }
    let turn = TURN.get();
    let used = USED.get() + 1;
    USED.set(used);
    if used >= turn.fuse {
        suspend(Yielded::Fuse);
    } else if used >= turn.quantum {
        suspend(Yielded::Preempted);
    }
}

/// Issues a hypercall. `None`: the caller is being ended.
#[must_use]
pub fn hypercall(number: u64, args: [u64; 5]) -> Option<u64> {
    if is_dying() {
        return None;
    }
    match suspend(Yielded::Hypercall { number, args }) {
        Resume::Answer(answer) => Some(answer),
        other => panic!("a hypercall is answered, not {other:?}"),
    }
}
