//! What all parts of a life use: the domain, its store, chance, and the judgement of an attack.

use alloc::format;
use alloc::string::{String, ToString};
use unikernel::{Domain, XenstoreRing};
use xenbus::device::{self, Device};
use xenbus::{Client, Errno, Nodes, Store, XenbusState};

/// How long a backend may take for anything: others keep the machine busy, and backends die.
const PATIENCE_NS: u64 = 40_000_000_000;
/// How often is looked whether it has.
const LOOK_NS: u64 = 5_000_000;
/// How long a backend is left alone with what it need not answer.
const LEAVE_NS: u64 = 60_000_000;

/// What a backend did wrong.
pub type Failure = String;

/// xorshift64*: small, seeded, and good enough to be everywhere.
pub struct Random(u64);

impl Random {
    /// Any number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u32) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "it is below a number of 32 bits")]
        let below = ((self.next() >> 11) % u64::from(limit)) as u32;
        below
    }

    /// Any 32 bits.
    pub fn word(&mut self) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "that is what is wanted")]
        let word = (self.next() >> 24) as u32;
        word
    }

    /// Any 16 bits.
    pub fn short(&mut self) -> u16 {
        #[expect(clippy::cast_possible_truncation, reason = "that is what is wanted")]
        let short = (self.next() >> 24) as u16;
        short
    }

    /// A number below `limit` that fits into a byte.
    pub fn byte(&mut self, limit: u8) -> u8 {
        u8::try_from(self.below(limit.into())).unwrap_or(0)
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            #[expect(clippy::cast_possible_truncation, reason = "that is what is wanted")]
            let any = (self.next() >> 24) as u8;
            *byte = any;
        }
    }
}

/// One life of the domain.
pub struct Life {
    /// The domain.
    pub domain: Domain,
    /// Its connection to the store.
    pub store: Client<XenstoreRing>,
    /// Chance, another one in every life.
    pub random: Random,
    seed: u64,
}

impl Life {
    /// Begins.
    pub fn new(domain: Domain) -> Self {
        let store = Client::new(domain.xenstore().expect("a connection to the store"));
        let seed = domain.config_value("seed").and_then(|n| n.parse().ok()).unwrap_or(1_u64);
        let mixed =
            (seed << 32 | u64::from(domain.incarnation())).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self { domain, store, random: Random(mixed | 1), seed }
    }

    /// Counts lives; another beginning for each seed.
    pub fn turn(&self) -> usize {
        let turn = self.seed.wrapping_add(u64::from(self.domain.incarnation()));
        usize::try_from(turn).unwrap_or(0)
    }

    /// Looks until `probe` finds something; `None` when it takes too long.
    pub fn until<T>(&mut self, mut probe: impl FnMut(&mut Self) -> Option<T>) -> Option<T> {
        let deadline_ns = self.domain.now_ns() + PATIENCE_NS;
        loop {
            if let Some(found) = probe(self) {
                return Some(found);
            }
            let now_ns = self.domain.now_ns();
            if now_ns >= deadline_ns {
                return None;
            }
            // Whatever happens is found by looking.
            let _ = self.domain.wait(Some(now_ns + LOOK_NS));
            while self.store.next_event().is_some() {}
        }
    }

    /// Leaves the others alone for a moment.
    pub fn pause(&mut self) {
        let end_ns = self.domain.now_ns() + LEAVE_NS;
        while self.domain.now_ns() < end_ns {
            let _ = self.domain.wait(Some(end_ns));
        }
    }

    /// The backend's state, once it is one of `wanted`.
    pub fn await_backend(
        &mut self,
        device: &Device,
        wanted: &[XenbusState],
    ) -> Result<XenbusState, Failure> {
        let path = device.backend_path();
        let found = self.until(|life| {
            let state = device::state(&mut life.store, &path).ok()?;
            wanted.contains(&state).then_some(state)
        });
        found.ok_or_else(|| {
            let state = device::state(&mut self.store, &path);
            format!("{path} does not come to a state of {wanted:?}, it is {state:?}")
        })
    }

    /// Writes a key of our end.
    pub fn tell(
        &mut self,
        device: &Device,
        key: &str,
        value: impl ToString,
    ) -> Result<(), Failure> {
        let path = format!("{}/{key}", device.frontend_path());
        let written = self.store.write(&path, value.to_string().as_bytes());
        written.map_err(|errno| format!("writing {path}: {errno:?}"))
    }

    /// The value of a key of our end.
    pub fn told(&mut self, device: &Device, key: &str) -> Result<String, Failure> {
        let path = format!("{}/{key}", device.frontend_path());
        self.store.read_string(&path).map_err(|errno: Errno| format!("reading {path}: {errno:?}"))
    }
}

/// What a backend owes after an attack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// It goes on serving: what was bad were single requests, or nothing that concerns it.
    Serves,
    /// It closes the connection, and makes another one.
    Closes,
    /// It closes the connection. There is no way to another one.
    Leaves,
    /// Either.
    Any,
}

/// One thing that no correct guest does.
pub struct Attack<D> {
    /// What.
    pub name: &'static str,
    /// What the backend owes then.
    pub after: After,
    /// Does it.
    pub run: fn(&mut Life, &mut D) -> Result<(), Failure>,
}

/// A device that can be attacked.
pub trait Split {
    /// Which.
    fn device(&self) -> Device;
    /// Takes part in the handshake, from state 1 of both ends to state 4 of both.
    fn connect(&mut self, life: &mut Life) -> Result<(), Failure>;
    /// Does what the device is for, and compares what comes of it.
    fn work(&mut self, life: &mut Life) -> Result<(), Failure>;
}

const CLOSING: [XenbusState; 2] = [XenbusState::CLOSING, XenbusState::CLOSED];

/// Attacks, and sees what comes of it: the backend does what it owes, and serves us afterwards.
pub fn judge<D: Split>(life: &mut Life, split: &mut D, attack: &Attack<D>) -> Result<(), Failure> {
    let device = split.device();
    let outcome = (attack.run)(life, split).and_then(|()| match attack.after {
        After::Serves => split.work(life),
        After::Closes => life.await_backend(&device, &CLOSING).and_then(|_| reopen(life, split)),
        After::Leaves => life.await_backend(&device, &CLOSING).map(drop),
        After::Any => {
            life.pause();
            reopen(life, split)
        }
    });
    outcome.map_err(|failure| format!("{}, {}: {failure}", device.kind.name(), attack.name))
}

/// Closes what is left of the connection, makes a new one, and works with it.
fn reopen<D: Split>(life: &mut Life, split: &mut D) -> Result<(), Failure> {
    let device = split.device();
    life.tell(&device, "state", XenbusState::CLOSING.0)?;
    life.await_backend(&device, &CLOSING)?;
    life.tell(&device, "state", XenbusState::CLOSED.0)?;
    life.await_backend(&device, &[XenbusState::CLOSED])?;
    life.tell(&device, "state", XenbusState::INITIALISING.0)?;
    split.connect(life)?;
    split.work(life)
}
