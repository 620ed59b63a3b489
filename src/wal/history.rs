//! Whether another log has the same history: the chain at an LSN that another node names, without walking the log.
//!
//! A [`ChainCursor`] stands between two batches of a log and moves on behind what the other node says that it has. No
//! batch header is looked at twice, and long ways are shortened: sealed segments in between are skipped, because their
//! successor's header says the chain, and the writer has noted landmarks in the newest part of the log. Following one
//! commit costs one header.

use std::sync::Arc;

use crate::error::Result;
use crate::limits::SEGMENT_HEADER_LEN;
use crate::types::{Chain, Lsn};
use crate::wal::batch::{BatchHeader, Expected};
use crate::wal::log::Log;
use crate::wal::mapping::Segment;
use crate::wal::reader::LogPosition;

/// A place between two batches of a log, and the chain there. Holds its segment mapped.
#[derive(Debug)]
pub(crate) struct ChainCursor {
    log: Arc<Log>,
    /// None before the log has the segment that begins with `next_segment`.
    segment: Option<Arc<Segment>>,
    next_segment: Lsn,
    /// Of the next batch, in that segment.
    offset: u64,
    lsn: Lsn,
    chain: Chain,
    is_placed: bool,
}

/// What the chain that another node names for an LSN is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    /// The same.
    Same,
    /// Another one.
    Differs {
        /// The chain here; `None` if no batch ends there.
        own: Option<Chain>,
    },
    /// Nothing of this log before that LSN is the other node's business: it begins with the segment that comes next.
    NothingYet,
}

impl ChainCursor {
    /// At a place of `log`.
    pub(crate) fn at(log: Arc<Log>, place: LogPosition) -> ChainCursor {
        ChainCursor {
            segment: None,
            next_segment: place.segment,
            offset: place.offset.max(SEGMENT_HEADER_LEN),
            lsn: place.lsn,
            chain: place.chain,
            is_placed: true,
            log,
        }
    }

    /// For a log that will begin with some segment of `log`; which one, its first records will tell.
    pub(crate) fn unplaced(log: Arc<Log>) -> ChainCursor {
        ChainCursor {
            segment: None,
            next_segment: Lsn::ZERO,
            offset: SEGMENT_HEADER_LEN,
            lsn: Lsn::ZERO,
            chain: Chain::default(),
            is_placed: false,
            log,
        }
    }

    /// From now on for a log that will begin with some segment.
    pub(crate) fn unplace(&mut self) {
        *self = ChainCursor::unplaced(Arc::clone(&self.log));
    }

    /// The LSN and the chain that were last found to be the same in both logs; `None` if there is none yet.
    pub(crate) fn agreed(&self) -> Option<(Lsn, Chain)> {
        self.is_placed.then_some((self.lsn, self.chain))
    }

    /// Compares what another node has at `lsn`, which is at most this log's head.
    ///
    /// The head's LSN alone does not tell: a log may end before or after the batch that seals a segment. Both are the
    /// same history.
    ///
    /// # Errors
    ///
    /// [`Error::NotRetained`](crate::Error::NotRetained) if `lsn` has been given up.
    pub(crate) fn compare(&mut self, lsn: Lsn, chain: Chain) -> Result<Compared> {
        let moves_back = lsn < self.lsn;
        if !self.is_placed || moves_back {
            if !self.is_placed && self.begins_with(lsn.next()) {
                return Ok(Compared::NothingYet);
            }
            self.place_before(lsn)?;
        }
        self.go_to_landmark(lsn);
        let mut own = None;
        loop {
            if self.lsn == lsn {
                if self.chain == chain {
                    return Ok(Compared::Same);
                }
                own = Some(self.chain);
            }
            match self.next_header(lsn)? {
                Some(header) if header.last_lsn() <= lsn => {
                    self.offset += header.total_len();
                    self.lsn = header.last_lsn();
                    self.chain = header.crc;
                }
                _ => {
                    // The batch that seals may have been passed on the way, which another comparison could need.
                    self.place_before(lsn)?;
                    return Ok(Compared::Differs { own });
                }
            }
        }
    }

    /// Goes on to the last landmark on the way to `lsn`, if there is one.
    fn go_to_landmark(&mut self, lsn: Lsn) {
        let Some(place) = self.log.landmarks().last_before(lsn).filter(|place| place.lsn > self.lsn) else { return };
        let Some(segment) = self.log.segment_beginning(place.segment) else { return };
        self.enter(segment);
        (self.offset, self.lsn, self.chain) = (place.offset, place.lsn, place.chain);
    }

    /// Whether a segment of the log begins with `lsn`, or the log itself would.
    fn begins_with(&self, lsn: Lsn) -> bool {
        self.log.segment_beginning(lsn).is_some() || (lsn == Lsn::FIRST && self.log.head() == Lsn::ZERO)
    }

    /// Goes to the beginning of the segment that holds `lsn`.
    fn place_before(&mut self, lsn: Lsn) -> Result<()> {
        // Before the first record of a log there is no segment, but its first header says the chain.
        let segment = self.log.segment_holding(lsn).or_else(|| self.log.segment_beginning(lsn.next()));
        let segment = segment.ok_or_else(|| self.log.not_retained(lsn))?;
        self.enter(segment);
        self.is_placed = true;
        Ok(())
    }

    fn enter(&mut self, segment: Arc<Segment>) {
        let header = segment.header();
        self.next_segment = header.id.first_lsn;
        self.lsn = header.id.first_lsn.previous();
        self.chain = header.chain_before;
        self.offset = SEGMENT_HEADER_LEN;
        self.segment = Some(segment);
    }

    /// The header of the next published batch; `None` if there is none. On the way to `lsn` it goes from segment to
    /// segment, past those that end before it.
    fn next_header(&mut self, lsn: Lsn) -> Result<Option<BatchHeader>> {
        loop {
            let Some(segment) = &self.segment else {
                match self.log.segment_beginning(self.next_segment) {
                    Some(segment) => {
                        self.segment = Some(segment);
                        continue;
                    }
                    None => {
                        match self.log.segment_holding(lsn).filter(|held| held.id().first_lsn > self.next_segment) {
                            Some(holding) => {
                                self.enter(holding);
                                continue;
                            }
                            None if self.next_segment < self.log.tail() => return Err(self.log.not_retained(lsn)),
                            None => return Ok(None),
                        }
                    }
                }
            };
            // Sealed first: if it is, what is published is final.
            let sealed = segment.sealed_last_lsn();
            if sealed.is_some_and(|last| last < lsn)
                && let Some(holding) = self.log.segment_holding(lsn)
                && holding.id().first_lsn > self.next_segment
            {
                self.enter(holding);
                continue;
            }
            let published = segment.published();
            if self.offset < published {
                let bytes = segment.bytes(self.offset..published)?;
                let epoch = segment.header().epoch;
                let before = Expected { first_lsn: self.lsn.next(), chain: self.chain, epoch };
                return Ok(BatchHeader::read(bytes, before));
            }
            if let Some(last_lsn) = sealed {
                (self.segment, self.next_segment, self.offset) = (None, last_lsn.next(), SEGMENT_HEADER_LEN);
                continue;
            }
            // A segment without batches can be replaced by one of a newer epoch that begins with the same LSN.
            if self.offset > SEGMENT_HEADER_LEN || self.log.holds(segment) {
                return Ok(None);
            }
            self.segment = None;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

    use super::*;
    use crate::types::{ClusterId, Epoch, RegionId, ShardId};
    use crate::wal::landmarks::LANDMARK_EVERY;
    use crate::wal::{LogIdentity, LogWriter, Wal, WalOptions};

    fn open() -> (tempfile::TempDir, Wal, LogWriter) {
        open_with_segments_of(crate::limits::MIN_SEGMENT_SIZE)
    }

    fn open_with_segments_of(segment_size: u64) -> (tempfile::TempDir, Wal, LogWriter) {
        let directory = tempfile::tempdir().unwrap();
        let identity = LogIdentity { cluster: ClusterId(1), region: RegionId(0), shard: ShardId(0), segment_size };
        let (wal, mut writer) = Wal::open(directory.path(), identity, WalOptions::default()).unwrap();
        writer.set_epoch(Epoch(1)).unwrap();
        (directory, wal, writer)
    }

    /// Appends records of 1000 bytes, in batches of one to three; where each batch ends.
    fn fill(writer: &mut LogWriter, batches: usize) -> Vec<(Lsn, Chain)> {
        (0..batches)
            .map(|at| {
                writer.append_batch(&vec![[7; 1000]; at % 3 + 1]).unwrap();
                (writer.end().head, writer.end().chain)
            })
            .collect()
    }

    #[test]
    fn every_end_of_a_batch_agrees_and_nothing_else_does() {
        let (_directory, wal, mut writer) = open();
        let begin = wal.log().position_before(Lsn::FIRST).unwrap();
        let ends = fill(&mut writer, 200);
        assert!(wal.log().segments().len() > 5);
        for step in [1, 2, 7, 60, 199] {
            let mut cursor = ChainCursor::at(Arc::clone(wal.log()), begin);
            assert_eq!(cursor.compare(Lsn::ZERO, begin.chain).unwrap(), Compared::Same);
            for &(lsn, chain) in ends.iter().skip(step - 1).step_by(step) {
                assert_eq!(cursor.compare(lsn, chain).unwrap(), Compared::Same, "LSN {lsn} in steps of {step}");
                assert_eq!(cursor.agreed(), Some((lsn, chain)));
            }
        }
        let mut cursor = ChainCursor::at(Arc::clone(wal.log()), begin);
        for (&(lsn, chain), before) in ends.iter().zip([Lsn::ZERO].into_iter().chain(ends.iter().map(|end| end.0))) {
            let other = Chain(chain.0 ^ 1);
            assert!(matches!(cursor.compare(lsn, other).unwrap(), Compared::Differs { own: Some(_) }), "LSN {lsn}");
            if lsn.previous() != before {
                assert_eq!(
                    cursor.compare(lsn.previous(), chain).unwrap(),
                    Compared::Differs { own: None },
                    "LSN {lsn}"
                );
            }
            // It goes back where it must.
            assert_eq!(cursor.compare(lsn, chain).unwrap(), Compared::Same, "LSN {lsn}");
        }
    }

    #[test]
    fn landmarks_shorten_the_way_and_change_no_answer() {
        let (_directory, wal, mut writer) = open_with_segments_of(16 * LANDMARK_EVERY);
        let begin = wal.log().position_before(Lsn::FIRST).unwrap();
        let ends = fill(&mut writer, 2_000);
        assert!(wal.log().segments().len() > 1);
        for (index, &(lsn, chain)) in ends.iter().enumerate().step_by(13) {
            let fresh = || ChainCursor::at(Arc::clone(wal.log()), begin);
            assert_eq!(fresh().compare(lsn, chain).unwrap(), Compared::Same, "LSN {lsn}");
            let other = fresh().compare(lsn, Chain(chain.0 ^ 1)).unwrap();
            assert_eq!(other, Compared::Differs { own: Some(chain) }, "LSN {lsn}");
            let mut cursor = fresh();
            cursor.go_to_landmark(lsn);
            let left = ends[..=index].iter().filter(|(end, _)| *end > cursor.lsn).count() as u64;
            assert!(cursor.lsn <= lsn && left * 1000 <= LANDMARK_EVERY + 8192, "{left} batches left to LSN {lsn}");
        }
    }

    #[test]
    fn a_log_may_end_before_or_after_the_batch_that_seals() {
        let (_directory, wal, mut writer) = open();
        let begin = wal.log().position_before(Lsn::FIRST).unwrap();
        let (head, before) = *fill(&mut writer, 3).last().unwrap();
        let mut cursor = ChainCursor::at(Arc::clone(wal.log()), begin);
        assert_eq!(cursor.compare(head, before).unwrap(), Compared::Same);
        writer.set_epoch(Epoch(2)).unwrap();
        let next = fill(&mut writer, 1)[0];
        let after = wal.log().position_before(head.next()).unwrap();
        assert!(after.lsn == head && after.chain != before);
        assert_eq!(cursor.compare(head, before).unwrap(), Compared::Same);
        assert_eq!(cursor.compare(head, after.chain).unwrap(), Compared::Same);
        assert_eq!(cursor.compare(next.0, next.1).unwrap(), Compared::Same);
    }

    #[test]
    fn a_log_that_begins_with_a_segment_is_compared_from_its_first_record_on() {
        let (_directory, wal, mut writer) = open();
        let ends = fill(&mut writer, 200);
        let first = wal.log().segments()[3].id().first_lsn;
        let mut cursor = ChainCursor::unplaced(Arc::clone(wal.log()));
        assert_eq!(cursor.compare(first.previous(), Chain(9)).unwrap(), Compared::NothingYet);
        assert_eq!(cursor.agreed(), None);
        let &(lsn, chain) = ends.iter().find(|(lsn, _)| *lsn >= first).unwrap();
        assert!(matches!(cursor.compare(lsn, Chain(9)).unwrap(), Compared::Differs { own: Some(_) }));
        assert_eq!(cursor.compare(lsn, chain).unwrap(), Compared::Same);
    }
}
