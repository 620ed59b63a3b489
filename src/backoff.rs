//! How long to wait before trying again.

use std::time::Duration;

/// Exponential backoff with jitter: 1 s, 2 s, 4 s … 30 s, each shortened by a random part of up to a half, so that
/// many followers of one leader do not come back all at once.
///
/// It starts over only after [`succeeded`](Self::succeeded), which is for stable progress, not for a connection that
/// was accepted and lost.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
    random: u64,
}

impl Backoff {
    /// Waits from `base` up to `cap`; `seed` makes the jitter differ from node to node.
    pub(crate) fn new(base: Duration, cap: Duration, seed: u64) -> Backoff {
        // An odd multiplier spreads seeds that differ little; xorshift needs a state that is not 0.
        Backoff { base, cap, failures: 0, random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
    }

    /// How long to wait now.
    pub(crate) fn next(&mut self) -> Duration {
        let doubled = self.base.saturating_mul(1u32.checked_shl(self.failures).unwrap_or(u32::MAX));
        self.failures = self.failures.saturating_add(1);
        let wait = doubled.min(self.cap);
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let thousandth = u32::try_from(self.random % 500).unwrap_or(0);
        wait - wait * thousandth / 1000
    }

    /// There was stable progress: the next failure is the first.
    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_start_over_after_progress() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30), 7);
        for full in [1, 2, 4, 8, 16, 30, 30, 30] {
            let wait = backoff.next();
            assert!(wait <= Duration::from_secs(full) && wait > Duration::from_secs(full) / 2, "{wait:?} of {full} s");
        }
        backoff.succeeded();
        assert!(backoff.next() <= Duration::from_secs(1));
    }

    #[test]
    fn jitter_differs_between_nodes() {
        let waits: std::collections::BTreeSet<_> =
            (0..32).map(|seed| Backoff::new(Duration::from_secs(1), Duration::from_secs(30), seed).next()).collect();
        assert!(waits.len() > 16, "{waits:?}");
    }

    #[test]
    fn a_thousand_failures_still_wait_no_longer_than_the_cap() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30), 1);
        assert!((0..1000).all(|_| backoff.next() <= Duration::from_secs(30)));
    }
}
