//! How a restarting backend looks from the guest: as a gap between two answers, and nothing else.

/// A gap with requests waiting counts as a pause from here on.
pub const PAUSE_NS: u64 = 3_000_000;

/// Measures gaps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pauses {
    /// Pauses so far.
    pub count: u64,
    /// Length of the last one.
    pub last_ns: u64,
    /// When it ended.
    pub last_end_ns: u64,
    /// Length of the longest one.
    pub longest_ns: u64,
    answered: u64,
    waiting_since: Option<u64>,
}

impl Pauses {
    /// Notes that at `now_ns` the backend had answered `answered` requests in all and that
    /// `waiting` others were with it. Returns a pause's length when one has just ended.
    pub fn observe(&mut self, now_ns: u64, answered: u64, waiting: bool) -> Option<u64> {
        let progress = answered != self.answered;
        self.answered = answered;
        let since = *self.waiting_since.get_or_insert(now_ns);
        if progress || !waiting {
            self.waiting_since = waiting.then_some(now_ns);
        }
        let gap = now_ns.saturating_sub(since);
        (progress && gap >= PAUSE_NS).then(|| {
            self.count += 1;
            self.last_ns = gap;
            self.last_end_ns = now_ns;
            self.longest_ns = self.longest_ns.max(gap);
            gap
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_gap_with_somebody_waiting_is_a_pause() {
        let mut pauses = Pauses::default();
        assert_eq!(pauses.observe(0, 0, false), None);
        assert_eq!(pauses.observe(10 * PAUSE_NS, 1, false), None, "nobody waited");
        assert_eq!(pauses.observe(11 * PAUSE_NS, 1, true), None);
        assert_eq!(pauses.observe(11 * PAUSE_NS + 5, 2, true), None, "quick");
        assert_eq!(pauses.observe(12 * PAUSE_NS, 2, true), None, "not over");
        assert_eq!(pauses.observe(14 * PAUSE_NS + 5, 3, false), Some(3 * PAUSE_NS));
        assert_eq!(pauses.observe(20 * PAUSE_NS, 3, true), None);
        assert_eq!(pauses.observe(22 * PAUSE_NS, 4, false), Some(2 * PAUSE_NS));
        assert_eq!(
            (pauses.count, pauses.last_ns, pauses.longest_ns),
            (2, 2 * PAUSE_NS, 3 * PAUSE_NS)
        );
        assert_eq!(pauses.last_end_ns, 22 * PAUSE_NS);
    }
}
