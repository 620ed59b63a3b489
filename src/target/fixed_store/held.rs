//! What records have written into slots that a base has not reached yet, in memory.
//!
//! Written to the file at once, each such slot would be a block by itself in the middle of nothing, for the file system
//! to find a place for, and the base would then be written around it. Held back until the base gets there, the file
//! grows from one end to the other. A crash takes nothing away that counts: of an interrupted rebuild only what lies
//! before the base's end is kept.
//!
//! There is [room](Room) for so much in all shards of a store together; who finds none writes to the file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that the shards of a store hold together, at most.
const MOST: usize = 32 << 20;

/// Bytes that are got from the allocator at once, as long as a slot is not longer: so many that they go back to the
/// system.
const PART: usize = 256 << 10;

/// Bytes for each slot beside it, of which the map takes some more or less.
const BESIDE: usize = 48;

/// Memory that is left, of what all shards share. Each takes and gives back as it goes. Relaxed: nothing else is told
/// by it.
pub(super) struct Room(AtomicUsize);

impl Room {
    pub(super) fn new() -> Arc<Room> {
        Arc::new(Room(AtomicUsize::new(MOST)))
    }

    fn take(&self, bytes: usize) -> bool {
        let take = |left: usize| left.checked_sub(bytes);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn give(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Leaves no more than that.
    #[cfg(test)]
    pub(super) fn shrink(&self, to: usize) {
        self.0.store(to, Ordering::Relaxed);
    }
}

/// The slots of one shard, and where they are.
pub(super) struct Held {
    room: Arc<Room>,
    slot_len: usize,
    /// Slots in a part.
    in_part: usize,
    places: BTreeMap<u64, usize>,
    parts: Vec<Box<[u8]>>,
    free: Vec<usize>,
}

impl Held {
    pub(super) fn new(room: Arc<Room>, slot_len: usize) -> Held {
        let in_part = (PART / slot_len).max(1);
        Held { room, slot_len, in_part, places: BTreeMap::new(), parts: Vec::new(), free: Vec::new() }
    }

    /// Holds what is in a slot now, in place of what was held of it. False if there is no room for another one.
    pub(super) fn put(&mut self, slot: u64, bytes: &[u8]) -> bool {
        let place = match self.places.get(&slot) {
            Some(&place) => place,
            None => {
                let Some(place) = self.free.pop().or_else(|| self.grow()) else { return false };
                self.places.insert(slot, place);
                place
            }
        };
        let at = self.bytes_of(place);
        self.parts[place / self.in_part][at].copy_from_slice(bytes);
        true
    }

    /// A place in a new part, whose others are free.
    fn grow(&mut self) -> Option<usize> {
        if !self.room.take(self.part_cost()) {
            return None;
        }
        let first = self.parts.len() * self.in_part;
        self.parts.push(vec![0; self.in_part * self.slot_len].into());
        self.free.extend((first + 1..first + self.in_part).rev());
        Some(first)
    }

    fn part_cost(&self) -> usize {
        self.in_part * (self.slot_len + BESIDE)
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
        if self.places.is_empty() {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        self.room.give(self.parts.len() * self.part_cost());
        (self.parts, self.free) = (Vec::new(), Vec::new());
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

impl Drop for Held {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_last_is_held_until_it_is_forgotten() {
        let mut held = Held::new(Room::new(), 8);
        for (slot, byte) in [(7, 1), (5, 2), (9, 3), (5, 4)] {
            assert!(held.put(slot, &[byte; 8]));
        }
        let all = |held: &Held| [5, 7, 9].map(|slot| held.get(slot).map(|bytes| bytes[0]));
        assert_eq!(all(&held), [Some(4), Some(1), Some(3)]);
        let first = [0..5, 0..6, 6..9, 8..10, 10..90, 9..9].map(|slots| held.first_of(slots));
        assert_eq!(first, [None, Some(5), Some(7), Some(9), None, None]);
        held.forget(7);
        held.forget(8);
        assert_eq!(all(&held), [Some(4), None, Some(3)]);
        assert!(held.put(6, &[7; 8]), "its place is free");
        assert_eq!((held.get(6), held.parts.len()), (Some(&[7; 8][..]), 1));
    }

    #[test]
    fn all_share_the_room_and_give_it_back() {
        let room = Room::new();
        let left = || room.0.load(Ordering::Relaxed);
        let bytes = vec![9; PART / 2];
        let (mut one, mut other) = (Held::new(Arc::clone(&room), PART / 2), Held::new(Arc::clone(&room), PART / 2));
        let most = (0..).take_while(|&slot| one.put(slot, &bytes)).count();
        assert_eq!(most, MOST / one.part_cost() * 2);
        assert!(!other.put(1, &bytes) && other.get(1).is_none(), "there is no room");
        assert!(one.put(5, &bytes), "but for what is there in place of what was");
        one.forget(0);
        assert!(!other.put(1, &bytes) && one.put(1_000, &bytes), "a part stays where it is");
        drop(one);
        assert!(other.put(1, &bytes));
        other.forget(1);
        assert_eq!(left(), MOST);
        assert!(other.put(1, &bytes));
        drop(other);
        assert_eq!(left(), MOST);
    }

    #[test]
    fn slots_of_every_length_are_held_if_there_is_room() {
        for slot_len in [24, 4096, PART, PART + 8, MOST - BESIDE, MOST] {
            let mut held = Held::new(Room::new(), slot_len);
            assert_eq!(held.put(1, &vec![9; slot_len]), slot_len < MOST, "{slot_len} bytes");
        }
    }
}
