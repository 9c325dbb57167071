//! Any hypercall with any arguments.
//!
//! What would end or stop this domain by right is left out (shutdown, block, poll, watchdog), and
//! so is what would by right change memory that the test itself needs: structures are filled with
//! addresses and frames that are bad, or set apart for this.

use crate::directed::UNREADABLE;
use crate::state::State;
use alloc::vec::Vec;
use axolotl_abi::start::{IMAGE_GPA, START_INFO_GPA};
use axolotl_abi::{CONTROL_OP, DEVICE_OP};
use core::sync::atomic::Ordering::Relaxed;
use shmem::Page;
use unikernel::println;
use xen_abi::DomainId;
use xen_abi::grant::COPY;
use xen_abi::hypercall::{
    CONSOLE_IO, EVENT_CHANNEL_OP, GRANT_TABLE_OP, MEMORY_OP, SCHED_OP, VCPU_OP, XEN_VERSION,
};
use xen_abi::sched::{BLOCK, POLL, SHUTDOWN, WATCHDOG};

const PATTERN: u64 = 0x5e1f_7e57_5e1f_7e57;

/// xorshift64*: small, seeded, and good enough to be everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        let index = self.below(list.len() as u64);
        list[usize::try_from(index).unwrap_or(0)]
    }
}

/// Pages set apart: structures are made in `arguments`; `victims` may be changed, granted, freed.
struct Ground {
    arguments: Page,
    #[expect(dead_code, reason = "held")]
    victims: Vec<Page>,
    victim_addresses: Vec<u64>,
    /// Around the others in the heap, never to change.
    watched: Vec<Page>,
    text: u64,
    words: Vec<u64>,
}

impl Ground {
    fn new() -> Self {
        let watched: Vec<Page> = (0..4).map(|_| Page::new_zeroed()).collect();
        for page in &watched {
            for offset in (0..4096).step_by(8) {
                page.u64(offset).store(PATTERN, Relaxed);
            }
        }
        let victims: Vec<Page> = (0..4).map(|_| Page::new_zeroed()).collect();
        let arguments = Page::new_zeroed();
        let mut words = alloc::vec![
            0,
            1,
            2,
            3,
            4,
            5,
            6,
            7,
            8,
            0x7ff0,
            0x7ff1,
            0x7ff4,
            0xffff,
            0xfee00,
            0xfee0_0000,
            0x4000_0000,
            0x4000_0001,
            0x4000_1000,
            0x40000,
            0x8000_0000,
            u64::MAX,
            1 << 63,
            1 << 52,
            0x8000_0000_0000,
            0xffff_8000_0000_0000,
            0x1_0000_0001,
            0x7ff0_0000_0001,
            0x7_0000_0001,
            0x8_0000_0002,
            0xffff_ffff_0000_0001,
            0x0001_0000_7ff0,
            0x2_7ff0,
        ];
        words.extend(victims.iter().map(|page| page.gfn().0));
        let victim_addresses: Vec<u64> = victims.iter().map(|page| page.gfn().address()).collect();
        words.extend(victim_addresses.iter().flat_map(|address| [*address, address + 4092]));
        let text = text_sum();
        Self { arguments, victims, victim_addresses, watched, text, words }
    }

    /// Fills the argument page with something new: few different words at a time, one of them
    /// this domain, so that structures often make sense.
    fn prepare(&self, random: &mut Random) {
        let own = u64::from(DomainId::SELF.0);
        let few = [own, random.of(&self.words), random.of(&self.words), random.of(&self.words)];
        for offset in (0..128).step_by(8) {
            self.arguments.u64(offset).store(random.of(&few), Relaxed);
        }
    }

    /// A copy between pages that may be changed, which the core mostly carries out.
    fn prepare_copy(&self, random: &mut Random) {
        for at in [0, 16] {
            let address = random.of(&self.victim_addresses);
            self.arguments.u64(at).store(address >> 12, Relaxed);
            let offset = random.below(4200) << 16;
            self.arguments.u64(at + 8).store(u64::from(DomainId::SELF.0) | offset, Relaxed);
        }
        let flags = if random.below(8) == 0 { random.below(4) << 16 } else { 0 };
        self.arguments.u64(32).store(random.below(4200) | flags, Relaxed);
    }

    fn pointer(&self, random: &mut Random) -> u64 {
        match random.below(8) {
            0 => random.of(&UNREADABLE),
            1 => IMAGE_GPA + random.below(4096),
            2 => START_INFO_GPA + random.below(4096),
            3 => random.of(&self.victim_addresses) + random.below(4096),
            _ => self.arguments.gfn().address() + 8 * random.below(3),
        }
    }

    /// Nothing changed that nobody was allowed to change.
    fn is_intact(&self) -> bool {
        let whole = |page: &Page| {
            (0..4096).step_by(8).all(|offset| page.u64(offset).load(Relaxed) == PATTERN)
        };
        self.watched.iter().all(whole) && self.text == text_sum()
    }
}

/// A sum over the first page of text, which no hypercall may write.
fn text_sum() -> u64 {
    let [low, high] =
        crate::deadly::read_words(IMAGE_GPA, 512).iter().fold([0_u64, 0], |[low, high], word| {
            let low = low.wrapping_add(*word);
            [low, high.wrapping_add(low)]
        });
    low ^ high.rotate_left(32)
}

fn number(random: &mut Random) -> u64 {
    const OFTEN: [u64; 9] = [
        MEMORY_OP,
        XEN_VERSION,
        GRANT_TABLE_OP,
        GRANT_TABLE_OP,
        SCHED_OP,
        EVENT_CHANNEL_OP,
        EVENT_CHANNEL_OP,
        CONTROL_OP,
        DEVICE_OP,
    ];
    match random.below(8) {
        0 => random.below(64),
        1 => random.next(),
        _ => random.of(&OFTEN),
    }
}

/// What would end or stop us by right is turned into something else.
fn tame(number: u64, arguments: &mut [u64; 5], random: &mut Random) {
    let operation = arguments[0] & 0xffff_ffff;
    match number {
        SCHED_OP if [SHUTDOWN, BLOCK, POLL, WATCHDOG].contains(&operation) => arguments[0] = 0,
        VCPU_OP => arguments[1] = 1 + random.below(1 << 40),
        // Only bad buffers: the console is for the report.
        CONSOLE_IO => arguments[2] = random.of(&UNREADABLE),
        _ => {}
    }
}

/// Makes `calls` of them.
pub fn run(state: &mut State, calls: u32, seed: u64) {
    println!("selftest: {calls} calls at random, seed {seed}");
    let ground = Ground::new();
    if state.random() == 0 {
        state.set_random(seed.max(1));
    }
    let mut random = Random(state.random());
    while state.steps() < calls {
        ground.prepare(&mut random);
        let mut number = number(&mut random);
        let operation = match random.below(16) {
            0 => random.next(),
            1..8 => random.below(8),
            _ => random.below(36),
        };
        let count = if random.below(16) == 0 { random.next() } else { random.below(4) };
        let pointer = ground.pointer(&mut random);
        let mut arguments = [operation, pointer, count, random.next(), random.next()];
        tame(number, &mut arguments, &mut random);
        if random.below(64) == 0 {
            ground.prepare_copy(&mut random);
            number = GRANT_TABLE_OP;
            arguments = [COPY, ground.arguments.gfn().address(), 1, 0, 0];
        }
        state.set_random(random.0);
        state.call(number, arguments);
        if state.steps().is_multiple_of(100_000) {
            println!("selftest: {} calls", state.steps());
        }
    }
    if !ground.is_intact() {
        println!("selftest: FAILED: memory changed that no call may change");
        state.fail();
    }
    // Calls may have taken the pages away: they must not go back to the heap.
    core::mem::forget(ground);
}
