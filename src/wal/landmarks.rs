//! Landmarks of a log: places that its writer noted on the way, so that whoever looks for one of them later, such as
//! where a follower stands, need not walk there from the beginning of a segment.
//!
//! They are a help and no record: kept in memory, for the newest part of the log, and left out where noting one would
//! have meant to wait.

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::limits::MAX_LANDMARKS;
use crate::types::{Chain, Epoch, Lsn};
use crate::wal::reader::LogPosition;

/// Log bytes from one landmark to the next: some hundred small batches, walked in microseconds.
pub(super) const LANDMARK_EVERY: u64 = 128 * 1024;

/// The landmarks of one log.
#[derive(Debug, Default)]
pub(super) struct Landmarks {
    /// Locked for a look-up, and tried by the log writer.
    noted: Mutex<Noted>,
}

/// What is said of many places alike stands in here once: there are thousands of them, for each shard.
#[derive(Debug, Default)]
struct Noted {
    /// Each behind a batch with records that is published, oldest first; no LSN twice.
    places: VecDeque<Place>,
    /// The segments that they are in, by first LSN, oldest first.
    segments: VecDeque<(Lsn, Epoch)>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    lsn: Lsn,
    chain: Chain,
    /// In its segment, whose size fits in 32 bits.
    offset: u32,
}

impl Landmarks {
    /// Notes a place; the oldest one is forgotten where there are too many. Called by the log writer only.
    pub(super) fn note(&self, place: LogPosition) {
        // Appends wait for no reader.
        let Some(mut noted) = self.noted.try_lock() else { return };
        let Ok(offset) = u32::try_from(place.offset) else { return };
        if noted.places.len() >= MAX_LANDMARKS {
            noted.forget_oldest();
        }
        let segment = (place.segment, place.epoch);
        if noted.segments.back() != Some(&segment) {
            noted.segments.push_back(segment);
        }
        noted.places.push_back(Place { lsn: place.lsn, chain: place.chain, offset });
    }

    /// The last one at or before `lsn`.
    pub(super) fn last_before(&self, lsn: Lsn) -> Option<LogPosition> {
        let noted = self.noted.lock();
        let after = noted.places.partition_point(|place| place.lsn <= lsn);
        let Place { lsn, chain, offset } = *noted.places.get(after.checked_sub(1)?)?;
        let behind = noted.segments.partition_point(|(first_lsn, _)| *first_lsn <= lsn);
        let (segment, epoch) = *noted.segments.get(behind.checked_sub(1)?)?;
        Some(LogPosition { lsn, chain, epoch, segment, offset: u64::from(offset) })
    }
}

impl Noted {
    fn forget_oldest(&mut self) {
        self.places.pop_front();
        let Some(oldest) = self.places.front().map(|place| place.lsn) else { return };
        // Places are behind records, so the next segment holds the oldest one as soon as it begins at or before it.
        while self.segments.get(1).is_some_and(|(first_lsn, _)| *first_lsn <= oldest) {
            self.segments.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_landmarks_are_kept_and_found() {
        let landmarks = Landmarks::default();
        assert_eq!(landmarks.last_before(Lsn(5)), None);
        let most = MAX_LANDMARKS as u64;
        // Seven in each segment, and a new epoch with every second one.
        let place = |number: u64| LogPosition {
            lsn: Lsn(number * 10),
            chain: Chain(u32::try_from(number).unwrap()),
            epoch: Epoch(1 + number / 14),
            segment: Lsn(number / 7 * 70 + 1).max(Lsn::FIRST),
            offset: (1 + number % 7) * LANDMARK_EVERY,
        };
        // The first of a segment stands behind its first record at the earliest.
        let place = |number| LogPosition { lsn: Lsn(place(number).lsn.0 + 5), ..place(number) };
        for number in 1..=most + 100 {
            landmarks.note(place(number));
        }
        assert_eq!(landmarks.last_before(Lsn(1009)), None, "forgotten");
        for number in 101..=most + 100 {
            let lsn = place(number).lsn;
            assert_eq!(landmarks.last_before(lsn), Some(place(number)));
            assert_eq!(landmarks.last_before(Lsn(lsn.0 + 9)), Some(place(number)));
        }
        assert_eq!(landmarks.last_before(Lsn::MAX), Some(place(most + 100)));
        let noted = landmarks.noted.lock();
        assert_eq!((noted.places.len(), noted.places.capacity()), (MAX_LANDMARKS, MAX_LANDMARKS));
        assert!(noted.segments.len() <= MAX_LANDMARKS / 7 + 2, "{} segments", noted.segments.len());
        assert_eq!(size_of::<Place>(), 16);
    }
}
