//! Landmarks of a log: places that its writer noted on the way, so that whoever looks for one of them later, such as
//! where a follower stands, need not walk there from the beginning of a segment.
//!
//! They are a help and no record: kept in memory, for the newest part of the log, and left out where noting one would
//! have meant to wait.

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::limits::MAX_LANDMARKS;
use crate::types::Lsn;
use crate::wal::reader::LogPosition;

/// Log bytes from one landmark to the next: some hundred small batches, walked in microseconds.
pub(super) const LANDMARK_EVERY: u64 = 128 * 1024;

/// The landmarks of one log.
#[derive(Debug, Default)]
pub(super) struct Landmarks {
    /// Each behind a batch with records that is published, oldest first; no LSN twice. Locked for a look-up, and tried by
    /// the log writer.
    noted: Mutex<VecDeque<LogPosition>>,
}

impl Landmarks {
    /// Notes a place; the oldest one is forgotten where there are too many. Called by the log writer only.
    pub(super) fn note(&self, place: LogPosition) {
        // Appends wait for no reader.
        let Some(mut noted) = self.noted.try_lock() else { return };
        if noted.len() >= MAX_LANDMARKS {
            noted.pop_front();
        }
        noted.push_back(place);
    }

    /// The last one at or before `lsn`.
    pub(super) fn last_before(&self, lsn: Lsn) -> Option<LogPosition> {
        let noted = self.noted.lock();
        let after = noted.partition_point(|place| place.lsn <= lsn);
        noted.get(after.checked_sub(1)?).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Chain, Epoch};

    #[test]
    fn the_newest_landmarks_are_kept_and_found() {
        let landmarks = Landmarks::default();
        assert_eq!(landmarks.last_before(Lsn(5)), None);
        let most = MAX_LANDMARKS as u64;
        for number in 1..=most + 10 {
            let (lsn, offset) = (Lsn(number * 10), number * LANDMARK_EVERY);
            landmarks.note(LogPosition { lsn, chain: Chain(7), epoch: Epoch(1), segment: Lsn(1), offset });
        }
        let found = |lsn| landmarks.last_before(Lsn(lsn)).map(|place| place.lsn.0);
        assert_eq!((found(109), found(110), found(119), found(120)), (None, Some(110), Some(110), Some(120)));
        assert_eq!(found(u64::MAX), Some((most + 10) * 10));
    }
}
