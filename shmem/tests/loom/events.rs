//! Delivery of events: the real receiving side against the core's steps.
//!
//! The core's side is a model, step by step as `raise`, `select`, `unmask`, `SCHEDOP_block`,
//! `SCHEDOP_poll` and `SET_TIMER_OP` are in `hv-core` (`event.rs`, `sched.rs`): all under one lock, with the
//! bits in the page, which the receiver changes at any moment without that lock. One who sleeps
//! while there is something for it is found by loom as a deadlock. Bounds: ports in two words,
//! two or three threads, up to three preemptions.

use crate::model;
use loom::sync::atomic::{AtomicU64, Ordering::SeqCst};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use shmem::Page;
use shmem::events::{Calls, Receiver};
use std::sync::atomic::AtomicBool;
use xen_abi::EventPort;
use xen_abi::shared_info::{EVTCHN_MASK, EVTCHN_PENDING, VCPU_PENDING_SEL, VCPU_UPCALL_PENDING};

const TIMER: EventPort = EventPort(1);
const A: EventPort = EventPort(2);
/// In the word of `A`, and of the timer.
const B: EventPort = EventPort(3);
/// In another word.
const C: EventPort = EventPort(64);

/// What the vCPU waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wait {
    Nothing,
    Event,
    Port(EventPort),
}

/// What the core's lock guards.
struct Vcpu {
    wait: Wait,
    /// 0: off.
    timer: u64,
}

/// The core.
#[derive(Clone)]
struct Core(Arc<Inner>);

struct Inner {
    shared: Page,
    vcpu: Mutex<Vcpu>,
    woken: Condvar,
    /// Everybody reads the time without a lock.
    now: AtomicU64,
}

fn place(port: EventPort) -> (usize, u64) {
    (port.0 as usize / 64 * 8, 1 << (port.0 % 64))
}

impl Core {
    fn new() -> Self {
        Self(Arc::new(Inner {
            shared: Page::new_zeroed(),
            vcpu: Mutex::new(Vcpu { wait: Wait::Nothing, timer: 0 }),
            woken: Condvar::new(),
            now: AtomicU64::new(0),
        }))
    }

    fn receiver(&self) -> Receiver {
        Receiver::new(self.0.shared.clone(), TIMER)
    }

    /// The hypercall of a sender.
    fn send(&self, port: EventPort) {
        self.raise(&mut self.0.vcpu.lock().unwrap(), port);
    }

    fn raise(&self, vcpu: &mut Vcpu, port: EventPort) {
        let (word, bit) = place(port);
        if self.0.shared.u64(EVTCHN_PENDING + word).fetch_or(bit, SeqCst) & bit != 0 {
            return;
        }
        if self.0.shared.u64(EVTCHN_MASK + word).load(SeqCst) & bit == 0 {
            self.select(vcpu, port);
        }
        if vcpu.wait == Wait::Port(port) {
            self.wake(vcpu);
        }
    }

    fn select(&self, vcpu: &mut Vcpu, port: EventPort) {
        let bit = 1 << (port.0 / 64);
        if self.0.shared.u64(VCPU_PENDING_SEL).fetch_or(bit, SeqCst) & bit == 0 {
            self.0.shared.u8(VCPU_UPCALL_PENDING).store(1, SeqCst);
            if vcpu.wait != Wait::Nothing {
                self.wake(vcpu);
            }
        }
    }

    fn wake(&self, vcpu: &mut Vcpu) {
        vcpu.wait = Wait::Nothing;
        self.0.woken.notify_one();
    }

    /// The hypercall of the receiver.
    fn unmask(&self, port: EventPort) {
        let mut vcpu = self.0.vcpu.lock().unwrap();
        let (word, bit) = place(port);
        let was_masked = self.0.shared.u64(EVTCHN_MASK + word).fetch_and(!bit, SeqCst) & bit != 0;
        if was_masked && self.0.shared.u64(EVTCHN_PENDING + word).load(SeqCst) & bit != 0 {
            self.select(&mut vcpu, port);
        }
    }

    /// Lets time pass: the timer's interrupt.
    fn tick(&self, now: u64) {
        let mut vcpu = self.0.vcpu.lock().unwrap();
        self.0.now.store(now, SeqCst);
        if vcpu.timer != 0 && vcpu.timer <= now {
            vcpu.timer = 0;
            self.raise(&mut vcpu, TIMER);
        }
    }

    fn sleep(&self, wait: Wait) {
        let mut vcpu = self.0.vcpu.lock().unwrap();
        if let Wait::Port(port) = wait {
            let (word, bit) = place(port);
            if self.0.shared.u64(EVTCHN_PENDING + word).load(SeqCst) & bit != 0 {
                return;
            }
        }
        if self.0.shared.u8(VCPU_UPCALL_PENDING).load(SeqCst) != 0 {
            return;
        }
        vcpu.wait = wait;
        while vcpu.wait != Wait::Nothing {
            vcpu = self.0.woken.wait(vcpu).unwrap();
        }
    }
}

impl Calls for Core {
    fn now_ns(&self) -> u64 {
        self.0.now.load(SeqCst)
    }

    fn set_timer(&self, deadline_ns: u64) {
        let mut vcpu = self.0.vcpu.lock().unwrap();
        vcpu.timer = 0;
        if deadline_ns != 0 && deadline_ns <= self.0.now.load(SeqCst) {
            self.raise(&mut vcpu, TIMER);
        } else {
            vcpu.timer = deadline_ns;
        }
    }

    fn block(&self) {
        self.sleep(Wait::Event);
    }

    fn block_for(&self, port: EventPort, deadline_ns: u64) {
        assert_eq!(deadline_ns, 0, "not modelled");
        self.sleep(Wait::Port(port));
    }
}

/// Waits until each of `ports` has come, in any order; none of them comes twice.
fn wait_all(receiver: &Receiver, core: &Core, ports: &[EventPort]) {
    let mut missing = ports.to_vec();
    while !missing.is_empty() {
        for port in receiver.wait(core, None) {
            let index = missing.iter().position(|other| *other == port);
            missing.remove(index.expect("an event that nobody sent, or twice the same"));
        }
    }
}

/// Senders on two processors, ports in one word and in two.
#[test]
fn no_event_is_slept_over() {
    for (first, second) in [(A, B), (A, C)] {
        model(move || {
            let core = Core::new();
            let senders = [first, second].map(|port| {
                let core = core.clone();
                thread::spawn(move || core.send(port))
            });
            let receiver = core.receiver();
            wait_all(&receiver, &core, &[first, second]);
            senders.into_iter().for_each(|sender| sender.join().unwrap());
            assert_eq!(receiver.poll().next(), None);
        });
    }
}

/// Two events may melt into one, but after the last one the receiver looks once more.
#[test]
fn what_was_written_before_an_event_is_seen_after_it() {
    model(|| {
        let core = Core::new();
        let data = Arc::new(AtomicU64::new(0));
        let (to, written) = (core.clone(), Arc::clone(&data));
        let sender = thread::spawn(move || {
            for value in 1..=2 {
                written.store(value, SeqCst);
                to.send(A);
            }
        });
        let receiver = core.receiver();
        let mut seen = 0;
        while seen < 2 {
            for port in receiver.wait(&core, None) {
                assert_eq!(port, A);
                seen = data.load(SeqCst);
            }
        }
        sender.join().unwrap();
    });
}

/// Whether it comes before the port is masked, while it is, or while it is being unmasked.
#[test]
fn a_masked_port_keeps_its_event() {
    model(|| {
        let core = Core::new();
        let to = core.clone();
        let sender = thread::spawn(move || to.send(A));
        let receiver = core.receiver();
        receiver.mask(A);
        assert_eq!(receiver.poll().next(), None);
        core.unmask(A);
        wait_all(&receiver, &core, &[A]);
        sender.join().unwrap();
    });
}

/// One who looks at the first event only finds the others later.
#[test]
fn what_is_left_over_stays_pending() {
    model(|| {
        let core = Core::new();
        core.send(A);
        core.send(C);
        let to = core.clone();
        let sender = thread::spawn(move || to.send(B));
        let receiver = core.receiver();
        assert_eq!(receiver.wait(&core, None).next(), Some(A));
        wait_all(&receiver, &core, &[B, C]);
        sender.join().unwrap();
    });
}

/// One who waits for one port neither misses it nor loses another's event.
#[test]
fn who_waits_for_one_port_keeps_the_others() {
    for other in [B, C] {
        model(move || {
            let core = Core::new();
            let senders = [A, other].map(|port| {
                let core = core.clone();
                thread::spawn(move || core.send(port))
            });
            let receiver = core.receiver();
            assert!(receiver.wait_for(&core, A, None));
            wait_all(&receiver, &core, &[other]);
            senders.into_iter().for_each(|sender| sender.join().unwrap());
        });
    }
}

/// The core, for a sleep that an event of `A` ends at once.
struct Interrupted(Core);

impl Calls for Interrupted {
    fn now_ns(&self) -> u64 {
        self.0.now_ns()
    }

    fn set_timer(&self, deadline_ns: u64) {
        self.0.set_timer(deadline_ns);
    }

    fn block(&self) {
        self.0.send(A);
    }

    fn block_for(&self, _: EventPort, _: u64) {
        self.0.send(A);
    }
}

/// The timer that an earlier sleep left behind fires at any moment, and does not hide the deadline
/// of this sleep.
#[test]
fn no_deadline_is_slept_over() {
    model(|| {
        let core = Core::new();
        let receiver = core.receiver();
        assert_eq!(receiver.wait(&Interrupted(core.clone()), Some(1)).next(), Some(A));
        let clock = core.clone();
        let ticks = thread::spawn(move || {
            for now in 1..=2 {
                clock.tick(now);
            }
        });
        assert_eq!(receiver.wait(&core, Some(2)).next(), None);
        assert_eq!(core.now_ns(), 2);
        ticks.join().unwrap();
    });
}

/// The model can fail: when `upcall_pending` is cleared after the selector, it finds the event
/// between them that would be slept over.
#[test]
fn the_wrong_order_is_noticed() {
    static SLEPT_OVER: AtomicBool = AtomicBool::new(false);
    model(|| {
        let core = Core::new();
        let to = core.clone();
        let sender = thread::spawn(move || to.send(A));
        let shared = &core.0.shared;
        let words = shared.u64(VCPU_PENDING_SEL).swap(0, SeqCst);
        shared.u8(VCPU_UPCALL_PENDING).store(0, SeqCst);
        sender.join().unwrap();
        if words == 0 && shared.u8(VCPU_UPCALL_PENDING).load(SeqCst) == 0 {
            SLEPT_OVER.store(true, SeqCst);
        }
    });
    assert!(SLEPT_OVER.load(SeqCst));
}
