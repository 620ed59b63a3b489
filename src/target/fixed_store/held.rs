//! What records have written into slots that a base has not reached yet, in memory.
//!
//! Written to the file at once, each such slot would be a block by itself in the middle of nothing, for the file system to find
//! a place for, and the base would then be written around it. Held back until the base gets there, the file grows from one end
//! to the other. A crash takes nothing away that counts: of an interrupted rebuild only what lies before the base's end is kept.
//!
//! There is room for [`MOST`] bytes and no more; who finds none writes to the file.

use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of slots that are held, at most.
const MOST: usize = 32 << 20;

/// Bytes that are got from the allocator at once, as long as a slot is not longer: so much that they go back to the system.
const PART: usize = 1 << 20;

/// The slots and where they are.
pub(super) struct Held {
    slot_len: usize,
    /// Slots in a part.
    in_part: usize,
    most: usize,
    places: BTreeMap<u64, usize>,
    parts: Vec<Box<[u8]>>,
    free: Vec<usize>,
}

impl Held {
    pub(super) fn new(slot_len: usize) -> Held {
        Held::with_room(slot_len, MOST / slot_len)
    }

    fn with_room(slot_len: usize, most: usize) -> Held {
        let in_part = (PART / slot_len).max(1);
        Held { slot_len, in_part, most, places: BTreeMap::new(), parts: Vec::new(), free: Vec::new() }
    }

    /// Holds what is in a slot now, in place of what was held of it. False if there is no room for another one.
    pub(super) fn put(&mut self, slot: u64, bytes: &[u8]) -> bool {
        let place = match self.places.get(&slot) {
            Some(&place) => place,
            None if self.places.len() >= self.most => return false,
            None => {
                let place = self.free.pop().unwrap_or_else(|| self.grow());
                self.places.insert(slot, place);
                place
            }
        };
        let at = self.bytes_of(place);
        self.parts[place / self.in_part][at].copy_from_slice(bytes);
        true
    }

    /// A place in a new part, whose others are free.
    fn grow(&mut self) -> usize {
        let first = self.parts.len() * self.in_part;
        self.parts.push(vec![0; self.in_part * self.slot_len].into());
        self.free.extend((first + 1..first + self.in_part).rev());
        first
    }

    /// What is held of a slot.
    pub(super) fn get(&self, slot: u64) -> Option<&[u8]> {
        self.places.get(&slot).map(|&place| &self.parts[place / self.in_part][self.bytes_of(place)])
    }

    /// The first of these slots that is held.
    pub(super) fn first_of(&self, slots: Range<u64>) -> Option<u64> {
        // The map refuses a range that ends before it begins.
        if slots.is_empty() { None } else { self.places.range(slots).next().map(|(&slot, _)| slot) }
    }

    /// Holds a slot no more.
    pub(super) fn forget(&mut self, slot: u64) {
        self.free.extend(self.places.remove(&slot));
    }

    /// How many slots are held.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Where in its part a place is.
    fn bytes_of(&self, place: usize) -> Range<usize> {
        let at = place % self.in_part * self.slot_len;
        at..at + self.slot_len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_last_is_held_until_it_is_forgotten() {
        let mut held = Held::with_room(8, 3);
        for (slot, byte) in [(7, 1), (5, 2), (9, 3), (5, 4)] {
            assert!(held.put(slot, &[byte; 8]));
        }
        assert!(!held.put(6, &[5; 8]) && held.get(6).is_none(), "there is no room for a fourth");
        assert!(held.put(9, &[6; 8]), "but for what is there in place of what was");
        let all = |held: &Held| [5, 7, 9].map(|slot| held.get(slot).map(|bytes| bytes[0]));
        assert_eq!(all(&held), [Some(4), Some(1), Some(6)]);
        assert_eq!(
            [0..5, 0..6, 6..9, 8..10, 10..90, 9..9].map(|slots| held.first_of(slots)),
            [None, Some(5), Some(7), Some(9), None, None]
        );
        held.forget(7);
        held.forget(8);
        assert_eq!(all(&held), [Some(4), None, Some(6)]);
        assert!(held.put(6, &[7; 8]), "its place is free");
        assert_eq!((held.get(6), held.parts.len()), (Some(&[7; 8][..]), 1));
    }

    #[test]
    fn memory_comes_in_parts_and_never_more_than_may_be_held() {
        for slot_len in [24, 4096, PART, PART + 8, MOST, MOST + 8] {
            let mut held = Held::new(slot_len);
            assert!(held.places.is_empty() && held.parts.is_empty());
            let bytes = vec![9; slot_len];
            let most = u64::try_from(MOST / slot_len).unwrap().min(600);
            assert!((0..most).all(|slot| held.put(slot, &bytes)));
            assert!(held.parts.len() <= MOST / slot_len && (0..most).all(|slot| held.get(slot) == Some(&*bytes)));
            assert_eq!(held.put(most, &bytes), MOST / slot_len > 600);
        }
    }
}
