//! Reading a log while it is written: ranges of published batches, segment after segment.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::limits::{LOG_PIECE_LEN, SEGMENT_HEADER_LEN};
use crate::types::{Chain, Epoch, Lsn};
use crate::wal::batch::{BatchHeader, BatchIter};
use crate::wal::log::Log;
use crate::wal::mapping::{LogRange, Segment};
use crate::watermark::{Waited, wait_any};

/// Reads one log from a position on, including what is appended later. Holds its segment mapped, never a lock.
///
/// [`next`](Self::next) gives nothing when it has given everything published; then [`wait`](Self::wait) for more:
///
/// ```
/// use towline::wal::{LogIdentity, LogWaited, Wal, WalOptions};
/// use towline::{ClusterId, Lsn, RegionId, ShardId};
///
/// # let directory = tempfile::tempdir()?;
/// # let (cluster, region, shard) = (ClusterId(1), RegionId(0), ShardId(0));
/// # let identity = LogIdentity { cluster, region, shard, segment_size: 1 << 20 };
/// # let path = directory.path();
/// let (wal, mut writer) = Wal::open(path, identity, WalOptions::default())?;
/// let mut reader = wal.log().reader_from(Lsn::FIRST)?;
/// let tail = std::thread::spawn(move || -> towline::Result<usize> {
///     let mut bytes = 0;
///     while reader.wait(None) == LogWaited::More {
///         while let Some(range) = reader.next(64 * 1024)? {
///             bytes += range.records().map(|record| record.bytes.len()).sum::<usize>();
///         }
///     }
///     Ok(bytes)
/// });
/// for _ in 0..1000 {
///     writer.append(b"a record")?;
/// }
/// wal.close()?;
/// assert_eq!(tail.join().unwrap()?, 8000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LogReader {
    log: Arc<Log>,
    /// The segment being read; none until the log has the one that begins with `next_segment`.
    segment: Option<Arc<Segment>>,
    offset: u64,
    next_segment: Lsn,
}

/// What a [reader](LogReader::wait) that waited has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "it says whether there is anything to read"]
pub enum LogWaited {
    /// There is more to read: [`next`](LogReader::next) gives it, or the error that keeps it from being read.
    More,
    /// Everything is read, and nothing more is appended: [`Log::end_reason`] says why.
    Ended,
    /// Everything is read, and the deadline passed.
    TimedOut,
}

/// A place between two batches of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPosition {
    /// The last LSN before it.
    pub lsn: Lsn,
    /// The chain there.
    pub chain: Chain,
    /// The epoch of the segment.
    pub epoch: Epoch,
    /// The first LSN of the segment in which the next byte stands.
    pub segment: Lsn,
    /// Where in that segment.
    pub offset: u64,
}

impl LogReader {
    pub(super) fn new(log: Arc<Log>, position: LogPosition) -> LogReader {
        let segment = log.segment_beginning(position.segment);
        LogReader { log, segment, offset: position.offset, next_segment: position.segment }
    }

    /// The log read.
    #[must_use]
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// The segment (by its first LSN) and the offset in it of the next byte.
    #[must_use]
    pub fn position(&self) -> (Lsn, u64) {
        (self.next_segment, self.offset)
    }

    /// The next published batches, whole ones only, all of one segment: as many as `most_bytes` have room for, but at
    /// least one, however long it is. `None` if there are none now.
    ///
    /// At the beginning of a segment its header page comes first and counts. A range may have no records: there may be
    /// nothing but that page yet, and the batch that seals a segment has none. Bytes are published a moment before the
    /// log's [`written`](Log::written) mark says so.
    ///
    /// With a `most_bytes` that is less than what is published, this looks at the header of each batch up to there;
    /// with [`u64::MAX`], at none.
    ///
    /// # Errors
    ///
    /// [`Error::NotRetained`] if the next segment has been given up meanwhile; [`Error::Corrupt`] if the next bytes
    /// have been found damaged since the log was opened, or are no batch.
    pub fn next(&mut self, most_bytes: u64) -> Result<Option<LogRange>> {
        self.next_up_to(|log, segment, unread| end_of_batches(log, segment, unread, most_bytes))
    }

    /// Waits until there is more to read, the log has [ended](Log::until_ended) or the deadline passes, in the
    /// [way](crate::wal::WalOptions::wait) that the log is set to. Returns at once if there is something to read.
    ///
    /// What was appended before the log ended is read before this says so. A record whose append had begun when the log
    /// ended, and not returned, may still come after it.
    pub fn wait(&self, deadline: Option<Instant>) -> LogWaited {
        loop {
            // Looked at before the log is: what was written by now, and before it ended, is then found. And if all of
            // it has been read, the next record to wake up for is one behind it.
            let has_ended = self.log.until_ended().holds();
            let written = self.log.written().load();
            if self.has_next() {
                return LogWaited::More;
            }
            if has_ended {
                return LogWaited::Ended;
            }
            let conditions = [self.log.written().until(written.next()), self.log.until_ended()];
            if wait_any(&conditions, self.log.options().wait, deadline) == Waited::TimedOut {
                return LogWaited::TimedOut;
            }
        }
    }

    /// Whether [`next`](Self::next) would not give `None`.
    fn has_next(&self) -> bool {
        let mut next_segment = self.next_segment;
        if let Some(segment) = &self.segment {
            let sealed = segment.sealed_last_lsn();
            if self.offset < segment.published() {
                return true;
            }
            match sealed {
                Some(last_lsn) => next_segment = last_lsn.next(),
                None if self.offset > SEGMENT_HEADER_LEN || self.log.holds(segment) => return false,
                None => {}
            }
        }
        self.log.segment_beginning(next_segment).is_some() || next_segment < self.log.tail()
    }

    /// The next published bytes, up to where `end` says that they are to end: in the segment that they are of, of the
    /// range that is published and not read.
    #[inline]
    fn next_up_to(&mut self, end: impl FnOnce(&Log, &Segment, Range<u64>) -> Result<u64>) -> Result<Option<LogRange>> {
        loop {
            let Some(segment) = &self.segment else {
                match self.log.segment_beginning(self.next_segment) {
                    Some(segment) => {
                        self.segment = Some(segment);
                        continue;
                    }
                    None if self.next_segment < self.log.tail() => {
                        return Err(self.log.not_retained(self.next_segment));
                    }
                    None => return Ok(None),
                }
            };
            // Sealed first: if it is, what is published is final.
            let sealed = segment.sealed_last_lsn();
            let published = segment.published();
            if self.offset < published {
                let end = end(&self.log, segment, self.offset..published)?;
                let range = LogRange::new(Arc::clone(segment), self.offset..end)?;
                self.offset = end;
                return Ok(Some(range));
            }
            let Some(last_lsn) = sealed else {
                // A segment without batches can be replaced by one of a newer epoch that begins with the same LSN.
                if self.offset <= SEGMENT_HEADER_LEN && !self.log.holds(segment) {
                    (self.segment, self.offset) = (None, 0);
                    continue;
                }
                return Ok(None);
            };
            self.segment = None;
            self.offset = 0;
            self.next_segment = last_lsn.next();
        }
    }
}

impl LogReader {
    /// The next published bytes, at most `most_bytes` of them, all of one segment, for whoever passes bytes on and
    /// looks at no batch: unlike [`next`](Self::next), this cuts batches anywhere, and goes on inside of them. Where
    /// there are more, and `most_bytes` is more than a [piece](LOG_PIECE_LEN), it cuts where one ends. `None` if there
    /// are none now.
    ///
    /// A reader is read in the one way or in the other.
    ///
    /// # Errors
    ///
    /// As [`next`](Self::next).
    #[inline]
    pub(crate) fn next_cut_anywhere(&mut self, most_bytes: u64) -> Result<Option<LogRange>> {
        self.next_up_to(|log, segment, unread| {
            let most = unread.start.saturating_add(most_bytes);
            let is_cut_short = unread.end > most && most_bytes > LOG_PIECE_LEN;
            let end = if is_cut_short { most - most % LOG_PIECE_LEN } else { unread.end.min(most) };
            log.health().readable(segment, unread.start..end)
        })
    }

    /// Published bytes that have not been read.
    pub(crate) fn backlog(&self) -> u64 {
        let segments = self.log.segments.read();
        let first = segments.partition_point(|segment| segment.id().first_lsn < self.next_segment);
        let published = segments.iter().skip(first).map(|segment| segment.published()).sum::<u64>();
        published.saturating_sub(self.offset)
    }

    /// Takes back the range that was given last: it will be given again.
    pub(crate) fn put_back(&mut self, range: &LogRange) {
        self.offset = range.start();
    }
}

/// Where whole batches end that begin with `unread` and take at most `most_bytes`; the first one may take more.
///
/// `unread` begins between two batches, or with the header page, and ends behind a batch or behind that page, as
/// nothing else is ever published: by an append each batch as a whole, from a leader those that have been checked,
/// after recovery all up to the end of the last valid one.
fn end_of_batches(log: &Log, segment: &Segment, unread: Range<u64>, most_bytes: u64) -> Result<u64> {
    let sound = log.health().readable(segment, unread.clone())?;
    let most = unread.start.saturating_add(most_bytes);
    if sound == unread.end && sound <= most {
        return Ok(sound);
    }
    let first = unread.start.max(SEGMENT_HEADER_LEN).min(sound);
    let mut end = first;
    for batch in BatchIter::within(segment.header(), segment.bytes(first..sound)?) {
        let behind = end + batch.header.total_len();
        if behind > most && end > first {
            break;
        }
        end = behind;
    }
    if end > unread.start {
        return Ok(end);
    }
    // Damage that was found within a batch, and not at its beginning.
    log.health().readable(segment, sound..unread.end)?;
    Err(Error::corrupt(
        segment.path(),
        unread.start,
        None,
        "there is no whole batch in the published bytes from here on",
    ))
}

impl Log {
    /// The place before the batch that holds `lsn`, where a stream that must deliver `lsn` begins. For the LSN after
    /// the head that is the end of the log.
    ///
    /// # Errors
    ///
    /// [`Error::NotRetained`] if `lsn` is before the tail or more than one past the head.
    pub fn position_before(&self, lsn: Lsn) -> Result<LogPosition> {
        self.positions_before(lsn).map(|(place, _)| place)
    }

    /// The last place at or before [`position_before`](Self::position_before) at which no [compact batch](super::batch)
    /// stands: where whoever knows nothing of the log can begin.
    ///
    /// # Errors
    ///
    /// As [`position_before`](Self::position_before).
    pub(crate) fn plain_position_before(&self, lsn: Lsn) -> Result<LogPosition> {
        self.positions_before(lsn).map(|(_, plain)| plain)
    }

    /// Both of these.
    fn positions_before(&self, lsn: Lsn) -> Result<(LogPosition, LogPosition)> {
        let both = |place| Ok((place, place));
        let head = self.head();
        if lsn > head.next() || lsn < self.tail() {
            return Err(self.not_retained(lsn));
        }
        let Some(segment) = self.segment_holding(lsn) else {
            if head != Lsn::ZERO && !self.segments().is_empty() {
                return Err(self.not_retained(lsn));
            }
            // Nothing has been written yet. Where the log does not begin with LSN 1, its first header will say the
            // chain.
            let chain = Chain::genesis(self.identity().cluster, self.identity().region, self.shard());
            return both(LogPosition { lsn: lsn.previous(), chain, epoch: Epoch::ZERO, segment: lsn, offset: 0 });
        };
        let start = start_of(&segment);
        if lsn == start.segment {
            return both(start);
        }
        let published = segment.published();
        let mut place = LogPosition { offset: SEGMENT_HEADER_LEN, ..start };
        let mut plain = place;
        for batch in BatchIter::within(segment.header(), segment.bytes(SEGMENT_HEADER_LEN..published)?) {
            if !batch.header.is_compact() {
                plain = place;
            }
            if batch.header.last_lsn() >= lsn {
                return Ok((place, plain));
            }
            place = after(place, &batch.header);
            if batch.header.is_sealing() {
                // `lsn` is the one after the head, and its segment does not exist yet.
                return both(LogPosition { segment: lsn, offset: 0, ..place });
            }
        }
        if place.lsn.next() == lsn { Ok((place, plain)) } else { Err(self.not_retained(lsn)) }
    }

    /// Refuses what is no place between two batches of this log.
    pub(super) fn check_place(&self, position: &LogPosition) -> Result<()> {
        let LogPosition { lsn, segment: first_lsn, offset, .. } = *position;
        let nowhere = || {
            Error::invalid(format!(
                "shard {} has no place between two batches at offset {offset} of the segment that begins with LSN \
                 {first_lsn}, behind LSN {lsn}",
                self.shard()
            ))
        };
        // Before the segment is looked for: the one that holds the head is there.
        let head = self.head();
        let Some(segment) = self.segment_beginning(first_lsn) else {
            if first_lsn > head.next() || first_lsn < self.tail() {
                return Err(self.not_retained(first_lsn));
            }
            let is_end = first_lsn == head.next() && lsn == head && offset == 0;
            return if is_end { Ok(()) } else { Err(nowhere()) };
        };
        let mut place = start_of(&segment);
        if offset > 0 {
            place.offset = SEGMENT_HEADER_LEN;
        }
        if offset > SEGMENT_HEADER_LEN {
            let batches = BatchIter::within(segment.header(), segment.bytes(SEGMENT_HEADER_LEN..segment.published())?);
            for batch in batches {
                place = after(place, &batch.header);
                if place.offset >= offset {
                    break;
                }
            }
        }
        // Where a segment begins, its header may say a chain that was not known when the place was.
        let is_chain = place.chain == position.chain || offset <= SEGMENT_HEADER_LEN;
        if (place.lsn, place.offset) == (lsn, offset) && is_chain { Ok(()) } else { Err(nowhere()) }
    }

    /// The beginning of the segment that holds `lsn`; where `lsn` is the one after the head, of the newest segment,
    /// even if that is sealed. So a stream that begins here carries a whole segment, header page first, and with it
    /// where the log stands. Of a log in which nothing was ever written it is the beginning.
    ///
    /// # Errors
    ///
    /// [`Error::NotRetained`] if `lsn` is before the tail or more than one past the head.
    pub fn segment_start_for(&self, lsn: Lsn) -> Result<LogPosition> {
        if lsn > self.head().next() {
            return Err(self.not_retained(lsn));
        }
        match self.segment_holding(lsn) {
            Some(segment) => Ok(start_of(&segment)),
            None if lsn == Lsn::FIRST && self.head() == Lsn::ZERO => self.position_before(lsn),
            None => Err(self.not_retained(lsn)),
        }
    }

    /// The place at which a log with the same history goes on whose head is `lsn` with `chain`; `None` if no log with
    /// this history can end there.
    ///
    /// The head's LSN alone does not tell: a log may end before or after the batch that seals a segment.
    ///
    /// # Errors
    ///
    /// [`Error::NotRetained`] if the record after `lsn` is not retained, or `lsn` is past the head.
    pub fn position_after(&self, lsn: Lsn, chain: Chain) -> Result<Option<LogPosition>> {
        let place = self.position_before(lsn.next())?;
        if place.lsn == lsn && place.chain == chain {
            return Ok(Some(place));
        }
        if place.lsn != lsn || place.offset != 0 {
            return Ok(None);
        }
        // By what is in it: a segment says that it is sealed a moment after the batch that seals it is there.
        let Some(segment) = self.segment_holding(lsn) else { return Ok(None) };
        Ok(Some(place_before_seal(&segment)?).filter(|place| place.lsn == lsn && place.chain == chain))
    }
}

/// The place before the sealing batch of a segment; while it is open, its end.
pub(super) fn place_before_seal(segment: &Segment) -> Result<LogPosition> {
    let mut place = start_of(segment);
    place.offset = SEGMENT_HEADER_LEN;
    for batch in BatchIter::within(segment.header(), segment.bytes(SEGMENT_HEADER_LEN..segment.published())?) {
        if batch.header.is_sealing() {
            break;
        }
        place = after(place, &batch.header);
    }
    Ok(place)
}

/// The place before a segment.
pub(super) fn start_of(segment: &Segment) -> LogPosition {
    let header = segment.header();
    LogPosition {
        lsn: header.id.first_lsn.previous(),
        chain: header.chain_before,
        epoch: header.epoch,
        segment: header.id.first_lsn,
        offset: 0,
    }
}

/// The place after a batch that begins at `place`.
fn after(place: LogPosition, header: &BatchHeader) -> LogPosition {
    LogPosition { lsn: header.last_lsn(), chain: header.crc, offset: place.offset + header.total_len(), ..place }
}

#[cfg(test)]
mod tests;
