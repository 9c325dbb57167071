//! Pending events: a domain's side of the two-level bits of the shared-info page.
//!
//! The core raises port p by setting bit p of `pending`, then, unless it is masked or was set
//! before, the bit of its word in `pending_sel`, then `upcall_pending` (`xen-abi.md` §9.3). We
//! clear in the opposite order: `upcall_pending`, the selector with one exchange, then the bits
//! found in each selected word. An event that comes in between is either found in the word, or
//! finds the selector clear and raises all again. Since we look at the selector before we sleep,
//! and `SCHEDOP_block` returns at once while `upcall_pending` is set, none is slept over.
//!
//! The timer's event is taken apart from the others, and like them only after the selector is
//! clear. Taken before, one that comes in between would stay pending with nobody looking for it,
//! and the core tells nobody of an event that is pending already: the next sleep would miss its
//! deadline. `tests/loom/events.rs` shows all this against the core's steps.

use crate::Page;
use crate::sync::Ordering::SeqCst;
use core::cell::Cell;
use xen_abi::EventPort;
use xen_abi::shared_info::{EVTCHN_MASK, EVTCHN_PENDING, VCPU_PENDING_SEL, VCPU_UPCALL_PENDING};

/// What one who waits asks the core for.
pub trait Calls {
    /// System time in ns.
    fn now_ns(&self) -> u64;
    /// `SET_TIMER_OP`: an event at the timer's port at this time, at once if it is over; 0: none.
    fn set_timer(&self, deadline_ns: u64);
    /// `SCHEDOP_block`: sleeps until an event, unless `upcall_pending` is set.
    fn block(&self);
    /// `SCHEDOP_poll` of one port: the same, and until this time if it is not 0, unless the port
    /// has an event.
    fn block_for(&self, port: EventPort, deadline_ns: u64);
}

/// The vCPU that events come to.
#[derive(Debug)]
pub struct Receiver {
    shared: Page,
    timer: EventPort,
    /// What the core's timer is set to; 0: off.
    deadline: Cell<u64>,
}

impl Receiver {
    /// `shared` is the shared-info page; `timer` the port of `VIRQ_TIMER`, which is not set.
    #[must_use]
    pub const fn new(shared: Page, timer: EventPort) -> Self {
        Self { shared, timer, deadline: Cell::new(0) }
    }

    /// The ports that have events now, without waiting.
    pub fn poll(&self) -> Ports {
        let ports = Ports::scan(&self.shared, self.timer);
        if self.take(self.timer) {
            // It may have fired a little early by our clock: to be set again then.
            self.deadline.set(0);
        }
        ports
    }

    /// Sleeps until some port has an event, or until system time `deadline_ns`, and returns the
    /// ports; none when it was the time.
    pub fn wait(&self, calls: &impl Calls, deadline_ns: Option<u64>) -> Ports {
        loop {
            let mut ports = self.poll();
            if ports.advance() || deadline_ns.is_some_and(|deadline| deadline <= calls.now_ns()) {
                return ports;
            }
            self.set_timer(calls, deadline_ns);
            calls.block();
        }
    }

    fn set_timer(&self, calls: &impl Calls, deadline_ns: Option<u64>) {
        // 0 would cancel; a deadline in the past fires at once.
        let deadline = deadline_ns.map_or(0, |ns| ns.max(1));
        if self.deadline.replace(deadline) != deadline {
            calls.set_timer(deadline);
        }
    }

    /// Sleeps until this one port has an event, or until `deadline_ns`. The events of all other
    /// ports stay pending. `false`: it was the time.
    pub fn wait_for(&self, calls: &impl Calls, port: EventPort, deadline_ns: Option<u64>) -> bool {
        loop {
            if self.take(port) {
                return true;
            }
            if deadline_ns.is_some_and(|deadline| deadline <= calls.now_ns()) {
                return false;
            }
            // Events of others must not keep the core from putting us to sleep; `wait` looks at
            // the selector, so they are found again.
            self.shared.u8(VCPU_UPCALL_PENDING).store(0, SeqCst);
            calls.block_for(port, deadline_ns.map_or(0, |ns| ns.max(1)));
        }
    }

    /// Takes the event of one port alone. Whether there was one.
    #[must_use]
    pub fn take(&self, port: EventPort) -> bool {
        let bit = 1 << (port.0 % 64);
        let pending = self.shared.u64(EVTCHN_PENDING + 8 * (port.0 as usize / 64));
        pending.fetch_and(!bit, SeqCst) & bit != 0
    }

    /// Keeps the events of a port back, until the core is asked to unmask it.
    pub fn mask(&self, port: EventPort) {
        let mask = self.shared.u64(EVTCHN_MASK + 8 * (port.0 as usize / 64));
        mask.fetch_or(1 << (port.0 % 64), SeqCst);
    }
}

/// Ports with an event, lowest first in each pass. An event is taken when its port is returned;
/// what is left when this is dropped stays pending.
#[derive(Debug)]
#[must_use = "an event that nobody looks at stays pending"]
pub struct Ports {
    shared: Page,
    /// Left alone: the runtime's own.
    timer: EventPort,
    /// Words still to be looked at.
    words: u64,
    /// Which word `bits` are from.
    word: u32,
    /// Events taken from that word and not returned yet.
    bits: u64,
}

impl Ports {
    /// Everything that is pending now.
    fn scan(shared: &Page, timer: EventPort) -> Self {
        shared.u8(VCPU_UPCALL_PENDING).store(0, SeqCst);
        let words = shared.u64(VCPU_PENDING_SEL).swap(0, SeqCst);
        Self { shared: shared.clone(), timer, words, word: 0, bits: 0 }
    }

    /// Finds the next word with events. `false`: there are no more.
    fn advance(&mut self) -> bool {
        while self.bits == 0 {
            if self.words == 0 {
                return false;
            }
            self.word = self.words.trailing_zeros();
            self.words &= self.words - 1;
            let at = 8 * self.word as usize;
            let mask = self.shared.u64(EVTCHN_MASK + at).load(SeqCst);
            let pending = self.shared.u64(EVTCHN_PENDING + at);
            self.bits = pending.load(SeqCst) & !mask;
            if self.timer.0 / 64 == self.word {
                self.bits &= !(1 << (self.timer.0 % 64));
            }
            pending.fetch_and(!self.bits, SeqCst);
        }
        true
    }
}

impl Iterator for Ports {
    type Item = EventPort;

    fn next(&mut self) -> Option<EventPort> {
        self.advance().then(|| {
            let bit = self.bits.trailing_zeros();
            self.bits &= self.bits - 1;
            EventPort(self.word * 64 + bit)
        })
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        if self.bits != 0 {
            let pending = self.shared.u64(EVTCHN_PENDING + 8 * self.word as usize);
            pending.fetch_or(self.bits, SeqCst);
            self.words |= 1 << self.word;
        }
        if self.words != 0 {
            self.shared.u64(VCPU_PENDING_SEL).fetch_or(self.words, SeqCst);
            self.shared.u8(VCPU_UPCALL_PENDING).store(1, SeqCst);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const TIMER: EventPort = EventPort(1);

    /// As the core does it.
    fn raise(shared: &Page, port: u32) {
        let (word, bit) = (port as usize / 64, 1_u64 << (port % 64));
        if shared.u64(EVTCHN_PENDING + 8 * word).fetch_or(bit, SeqCst) & bit != 0 {
            return;
        }
        let masked = shared.u64(EVTCHN_MASK + 8 * word).load(SeqCst) & bit != 0;
        if !masked && shared.u64(VCPU_PENDING_SEL).fetch_or(1 << word, SeqCst) & 1 << word == 0 {
            shared.u8(VCPU_UPCALL_PENDING).store(1, SeqCst);
        }
    }

    fn receiver(shared: &Page) -> Receiver {
        Receiver::new(shared.clone(), TIMER)
    }

    fn all(shared: &Page) -> Vec<u32> {
        receiver(shared).poll().map(|port| port.0).collect()
    }

    #[test]
    fn all_ports_come_once_and_the_timer_never() {
        let shared = Page::new_zeroed();
        for port in [4095, 2, 1, 64, 63, 2] {
            raise(&shared, port);
        }
        assert_eq!(shared.u8(VCPU_UPCALL_PENDING).load(SeqCst), 1);
        assert_eq!(all(&shared), [2, 63, 64, 4095]);
        assert_eq!(all(&shared), []);
        raise(&shared, TIMER.0);
        assert!(!Ports::scan(&shared, TIMER).advance());
    }

    #[test]
    fn an_event_during_the_scan_is_not_lost() {
        let shared = Page::new_zeroed();
        raise(&shared, 70);
        let mut ports = Ports::scan(&shared, TIMER);
        assert_eq!(ports.next(), Some(EventPort(70)));
        raise(&shared, 70);
        raise(&shared, 3);
        assert_eq!(ports.next(), None);
        assert_eq!(shared.u8(VCPU_UPCALL_PENDING).load(SeqCst), 1, "block would return");
        assert_eq!(all(&shared), [3, 70]);
    }

    #[test]
    fn what_is_dropped_stays_pending() {
        let shared = Page::new_zeroed();
        for port in [5, 6, 200] {
            raise(&shared, port);
        }
        let mut ports = Ports::scan(&shared, TIMER);
        assert_eq!(ports.next(), Some(EventPort(5)));
        drop(ports);
        assert_eq!(shared.u8(VCPU_UPCALL_PENDING).load(SeqCst), 1);
        assert_eq!(all(&shared), [6, 200]);
    }

    #[test]
    fn masked_ports_keep_their_event() {
        let shared = Page::new_zeroed();
        raise(&shared, 8);
        let receiver = receiver(&shared);
        receiver.mask(EventPort(8));
        assert_eq!(all(&shared), []);
        assert!(receiver.take(EventPort(8)));
        assert!(!receiver.take(EventPort(8)));
    }
}
