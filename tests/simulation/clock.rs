//! Time, order and chance: the three things of a run that are not the code's own. All of them come from the seed.

use std::collections::BTreeMap;

/// Milliseconds since the beginning of the run.
pub type Time = u64;

/// What is to happen, earliest first; what is due at the same time, in the order in which it was put in.
pub struct Queue<E> {
    pub now: Time,
    next: u64,
    events: BTreeMap<(Time, u64), E>,
}

impl<E> Queue<E> {
    pub fn new() -> Queue<E> {
        Queue { now: 0, next: 0, events: BTreeMap::new() }
    }

    /// Has something happen at a time that is not over.
    pub fn at(&mut self, time: Time, event: E) {
        self.next += 1;
        self.events.insert((time.max(self.now), self.next), event);
    }

    pub fn after(&mut self, delay: Time, event: E) {
        self.at(self.now + delay, event);
    }

    /// Goes on to the next event.
    pub fn pop(&mut self) -> Option<E> {
        let ((time, _), event) = self.events.pop_first()?;
        self.now = time;
        Some(event)
    }
}

/// SplitMix64: one number is the whole state.
#[derive(Clone)]
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(seed ^ 0x746f_776c_696e_6521)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Below `bound`, which is above 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// An index of something that has `len` elements.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap()
    }

    pub fn per_mille(&mut self, chance: u64) -> bool {
        self.below(1000) < chance
    }
}

/// The finalizer of SplitMix64, also used as a hash.
pub fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
