//! The stream of requests: which one comes n-th is a function of n, the seed and the parameters.
//!
//! So nobody has to remember what was written where. Whoever knows the [`Parameters`] (they are in
//! the [`log`](crate::log) on the disk) can say for every sector which requests wrote it, in which
//! order: the running guest for its own reads, and a verifier that finds only the disk.
//!
//! Requests are submitted in this order; one that would overlap a write or discard in flight
//! waits, and all behind it with it. So the order in which two requests changed the same sector is
//! that of the stream, whatever the timing.

use crate::sector::mix;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Weights add up to this.
pub const WEIGHTS: u32 = 1000;
/// A run is at most so many requests ahead of what the log on the disk says.
pub const MAX_AHEAD: u32 = 8192;
/// Sectors for the log, at the start of the area.
pub const LOG_SECTORS: u64 = 128;
/// Requests after which a read may still go where a request went.
const RECENT: u32 = 48;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Reads, and compares.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
}

/// Request n.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// What it does.
    pub kind: Kind,
    /// First sector.
    pub sector: u64,
    /// How many; 0 for a flush.
    pub sectors: u32,
    /// Sectors that its data are moved away from the start of their first page.
    pub skew: u8,
}

impl Step {
    /// Whether it changes what the disk holds.
    #[must_use]
    pub const fn changes(&self) -> bool {
        matches!(self.kind, Kind::Write | Kind::Discard)
    }

    /// Whether `sector` is one of its sectors.
    #[must_use]
    pub const fn covers(&self, sector: u64) -> bool {
        sector >= self.sector && sector - self.sector < self.sectors as u64
    }
}

/// All that the stream depends on. As stored in the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Parameters {
    /// Seed.
    pub seed: u64,
    /// First sector of the area; the log is there.
    pub area: u64,
    /// Sectors of the area.
    pub area_sectors: u64,
    /// Most sectors of a read or write.
    pub max_sectors: u32,
    /// Requests are made of so many sectors: those of one sector of the disk.
    pub unit: u32,
    /// Of 1000 requests, how many read …
    pub reads: u32,
    /// … flush …
    pub flushes: u32,
    /// … and discard. The rest write.
    pub discards: u32,
    /// Whether the first requests write the whole area: 1 or 0.
    pub fill: u32,
}

impl Parameters {
    /// First sector behind the log.
    #[must_use]
    pub const fn data(&self) -> u64 {
        self.area + LOG_SECTORS
    }

    /// Sectors behind the log.
    #[must_use]
    pub const fn data_sectors(&self) -> u64 {
        self.area_sectors - LOG_SECTORS
    }

    /// Whether there can be such a stream. Bytes from a disk can be anything.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let unit = u64::from(self.unit);
        matches!(self.unit, 1 | 2 | 4 | 8)
            && self.area.checked_add(self.area_sectors).is_some()
            && self.area_sectors >= LOG_SECTORS + u64::from(self.max_sectors)
            && self.area.is_multiple_of(unit)
            && self.area_sectors.is_multiple_of(unit)
            && self.max_sectors >= self.unit
            && self.max_sectors.is_multiple_of(self.unit)
            && self.max_sectors <= 1 << 16
            && [self.reads, self.flushes, self.discards].iter().all(|weight| *weight <= WEIGHTS)
            && self.reads + self.flushes + self.discards <= WEIGHTS
            && self.fill <= 1
    }

    /// Requests that fill the area.
    #[must_use]
    pub fn fill_requests(&self) -> u32 {
        let requests = self.data_sectors().div_ceil(self.max_sectors.into());
        if self.fill == 1 { u32::try_from(requests).unwrap_or(u32::MAX) } else { 0 }
    }

    /// Request `n`.
    #[must_use]
    pub fn step(&self, n: u32) -> Step {
        if n < self.fill_requests() {
            let at = u64::from(n) * u64::from(self.max_sectors);
            let left = self.data_sectors() - at;
            let sectors = u32::try_from(left).unwrap_or(u32::MAX).min(self.max_sectors);
            return Step { kind: Kind::Write, sector: self.data() + at, sectors, skew: 0 };
        }
        let mut dice = Dice(mix(self.seed ^ u64::from(n) << 20));
        let skew = if self.unit == 1 && dice.below(4) == 0 { dice.below(8) } else { 0 };
        let skew = u8::try_from(skew).unwrap_or(0);
        match self.kind(&mut dice) {
            Kind::Flush => Step { kind: Kind::Flush, sector: 0, sectors: 0, skew: 0 },
            Kind::Read if dice.below(2) == 0 && n - self.fill_requests() >= RECENT => {
                let recent = self.range(n - 1 - dice.below(RECENT - 1));
                let (sector, sectors) = recent.unwrap_or_else(|| self.place(&mut dice));
                Step { kind: Kind::Read, sector, sectors, skew }
            }
            kind => {
                let (sector, sectors) = self.place(&mut dice);
                Step { kind, sector, sectors, skew }
            }
        }
    }

    fn kind(&self, dice: &mut Dice) -> Kind {
        let roll = dice.below(WEIGHTS);
        match roll {
            roll if roll < self.reads => Kind::Read,
            roll if roll < self.reads + self.flushes => Kind::Flush,
            roll if roll < self.reads + self.flushes + self.discards => Kind::Discard,
            _ => Kind::Write,
        }
    }

    /// Where request `n` wrote, if it is one that writes and chose its place itself.
    fn range(&self, n: u32) -> Option<(u64, u32)> {
        let mut dice = Dice(mix(self.seed ^ u64::from(n) << 20));
        if self.unit == 1 && dice.below(4) == 0 {
            dice.below(8);
        }
        match self.kind(&mut dice) {
            Kind::Write | Kind::Discard => Some(self.place(&mut dice)),
            Kind::Read | Kind::Flush => None,
        }
    }

    /// Half of the requests go to a sixteenth of the area, so that they meet.
    fn place(&self, dice: &mut Dice) -> (u64, u32) {
        let most = self.max_sectors / self.unit;
        let most = match dice.below(4) {
            0 => 1,
            1 => most.min(8),
            2 => most.min(64),
            _ => most,
        };
        let sectors = (1 + dice.below(most)) * self.unit;
        let room = (self.data_sectors() - u64::from(sectors)) / u64::from(self.unit) + 1;
        let room = if dice.below(2) == 0 { room.div_ceil(16) } else { room };
        let sector = self.data() + dice.next() % room * u64::from(self.unit);
        (sector, sectors)
    }

    /// How many requests may be in flight when request `n` is made: 1 to `most`, another number
    /// every 256 requests.
    #[must_use]
    pub fn depth(&self, n: u32, most: u32) -> u32 {
        let mut dice = Dice(mix(self.seed.rotate_left(7) ^ u64::from(n / 256)));
        match dice.below(4) {
            0 => 1,
            1 => 1 + dice.below(most),
            _ => most.max(1),
        }
    }
}

/// Numbers at random, but always the same ones.
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `end`; 0 when there is none.
    fn below(&mut self, end: u32) -> u32 {
        let high = self.next() >> 32;
        u32::try_from((high * u64::from(end)) >> 32).unwrap_or(0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) const SMALL: Parameters = Parameters {
        seed: 1,
        area: 0,
        area_sectors: LOG_SECTORS + 1000,
        max_sectors: 96,
        unit: 1,
        reads: 500,
        flushes: 20,
        discards: 30,
        fill: 1,
    };

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_request_is_one_that_the_disk_can_do(
            seed in any::<u64>(),
            unit in prop::sample::select(vec![1_u32, 8]),
            max in 1_u32..40,
            extra in 0_u64..4000,
            start in any::<u32>(),
        ) {
            let max_sectors = max * unit;
            let area_sectors = LOG_SECTORS + u64::from(max_sectors) + extra * u64::from(unit);
            let area = 4096;
            let p = Parameters { seed, area, area_sectors, max_sectors, unit, ..SMALL };
            prop_assert!(p.is_sound());
            for n in (0..64).chain(start.saturating_sub(64)..start) {
                let step = p.step(n);
                prop_assert_eq!(step, p.step(n));
                if step.kind == Kind::Flush {
                    continue;
                }
                prop_assert!(step.sectors >= unit && step.sectors <= max_sectors);
                prop_assert!(step.sector.is_multiple_of(u64::from(unit)));
                prop_assert!(step.sectors.is_multiple_of(unit));
                prop_assert!(step.sector >= p.data());
                prop_assert!(step.sector + u64::from(step.sectors) <= area + area_sectors);
                prop_assert!(step.skew < 8 && (unit == 1 || step.skew == 0));
            }
        }
    }

    #[test]
    fn the_first_requests_fill_the_area_and_then_all_kinds_come() {
        let mut filled = 0;
        for n in 0..SMALL.fill_requests() {
            let step = SMALL.step(n);
            assert_eq!((step.kind, step.sector), (Kind::Write, SMALL.data() + filled));
            filled += u64::from(step.sectors);
        }
        assert_eq!(filled, SMALL.data_sectors());
        let from = SMALL.fill_requests();
        let count = |kind| (from..from + 10_000).filter(|&n| SMALL.step(n).kind == kind).count();
        let counts = [Kind::Read, Kind::Write, Kind::Flush, Kind::Discard].map(count);
        for (count, wanted) in counts.into_iter().zip([5000, 4500, 200, 300]) {
            assert!(count.abs_diff(wanted) < wanted / 3, "{counts:?}");
        }
    }

    #[test]
    fn many_reads_go_where_something_was_just_written() {
        let from = SMALL.fill_requests() + RECENT;
        let recent = (from..from + 2000).filter(|&n| {
            let step = SMALL.step(n);
            let same = |other: Step| (other.sector, other.sectors) == (step.sector, step.sectors);
            step.kind == Kind::Read && (1..RECENT).any(|back| same(SMALL.step(n - back)))
        });
        assert!(recent.count() > 150);
    }
}
