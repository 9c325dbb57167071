//! Numbers that look random and are the same for the same seed, on any machine.

/// A generator (xorshift64*, after a splitmix64 of its seed).
#[derive(Clone, Debug)]
pub struct Random(u64);

/// Scrambles a number: neighbours become unrelated.
#[must_use]
pub const fn scramble(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

impl Random {
    /// A generator of its own for each pair.
    #[must_use]
    pub const fn new(seed: u64, stream: u64) -> Self {
        Self(scramble(seed ^ scramble(stream)) | 1)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.number() >> 11) % limit
    }

    /// Below `limit`, which is not 0.
    pub fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap_or(0)
    }

    /// True once in so many times.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// From 1 to `limit`, each order of magnitude as likely as any other.
    pub fn magnitude(&mut self, limit: u64) -> u64 {
        let bits = u64::from(64 - limit.leading_zeros());
        let bound = (1 << self.below(bits + 1)).min(limit);
        1 + self.below(bound)
    }
}
