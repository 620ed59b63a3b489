//! The one writer of a log: on a leader it frames the caller's records, on a follower it takes in the leader's bytes.
//!
//! Both end the same way: bytes above the published end are filled and checked, the segment publishes them, and the
//! `written` mark moves. Where nobody waits for syncs and bytes are stored to the mapping, nothing on that path takes a
//! lock, allocates or calls the system; rolling to the next segment, once in a segment's length, does.
//!
//! How bytes get in is told by who waits. A leader's batch is stored to the mapping; on Linux it goes in by one write
//! to the file where it is short and everything before it is synced, which whoever waits for each append finds so, or
//! where the batch is long and no pages are made ready, because nobody is to do that, the writer is ahead of whoever
//! does, or somebody waits for syncs. A follower's bytes are received into the mapping, or, in bulk, into memory and
//! then written to the file. Readers read the mapping, whichever way it was.

use std::fs::File;
use std::sync::Arc;
use std::time::SystemTime;

use crate::error::{Error, Result};
use crate::limits::{
    self, BATCH_ALIGNMENT, BATCH_HEADER_LEN, COMPACT_HEADER_LEN, COMPACT_LSNS, MAX_COMPACT_RECORD_LEN, PAGE_LEN,
    RECORD_HEADER_LEN, SEGMENT_HEADER_LEN,
};
use crate::types::{Chain, Epoch, HybridTimestamp, Lsn, WalSegmentId};
use crate::wal::batch::{self, BatchHeader, Expected};
use crate::wal::landmarks::LANDMARK_EVERY;
use crate::wal::log::Log;
use crate::wal::mapping::{SegmentWriter, processor_ticks};
use crate::wal::reader::LogPosition;
use crate::wal::segment::{SEGMENT_VERSION, SegmentHeader};
use crate::wal::spares::Prepared;
use crate::wal::{SyncPolicy, TornTail};

mod ingest;

const HEADER: usize = limits::index(BATCH_HEADER_LEN);
const COMPACT: usize = limits::index(COMPACT_HEADER_LEN);

/// Where no pages are made ready ahead, batches of at least this many bytes go in through the file rather than the
/// mapping. Measured here for 16 KiB: 7.9 us as stores with a fault for each page, 6.8 us as one write, and 4.3 us as
/// stores to pages made ready; where the writer is ahead and shares in the work, 4.1 us with pages made ready, and 3.6
/// us as one write. Elsewhere than on Linux, mapping and file need not agree.
const WRITE_THROUGH_FILE_FROM: u64 = 8 * 1024;
/// Longer ones are stored to the mapping wherever they can be: they would be framed in as much memory.
const WRITE_THROUGH_FILE_MOST: u64 = 1 << 20;
/// The longest batch that goes in through the file because everything before it is synced: for longer ones a fault is
/// little, and the second copy is not.
const WRITE_SYNCED_MOST: u64 = 64 * 1024;
/// A window of at least this many bytes is filled in memory, checked there, and goes in through the file, unless every
/// page of a segment is made ready ahead: a page's fault costs more than the second copy. Measured: see the table of
/// what was tried in `benches/TRIED.md`.
const STAGE_FROM: u64 = 64 * 1024;
/// The longest beginning of a batch that is kept in memory; a longer one goes on in the mapping.
const STAGE_MOST: u64 = 4 << 20;
/// After so many short windows in a row the follower is no longer receiving in bulk.
const BULK_ENDS: u32 = 16;
/// Memory for framing that is kept from one batch to the next.
const KEEP_FRAME: usize = limits::index(WRITE_THROUGH_FILE_MOST);

/// Puts records into one shard's log. There is one for each [`Log`], and it cannot be cloned; who wants several
/// threads to append puts it behind a lock, or uses one shard for each.
///
/// ```
/// use towline::wal::{LogIdentity, Wal, WalOptions};
/// use towline::{ClusterId, Epoch, Lsn, RegionId, ShardId};
///
/// let directory = tempfile::tempdir()?;
/// let identity =
///     LogIdentity { cluster: ClusterId(1), region: RegionId(0), shard: ShardId(0), segment_size: 1 << 20 };
/// let (wal, mut writer) = Wal::open(directory.path(), identity, WalOptions::default())?;
/// writer.set_epoch(Epoch(1))?;
/// assert_eq!(writer.append(b"first")?, Lsn(1));
/// assert_eq!(writer.append_batch(&["second", "third"])?, Lsn(3));
/// wal.log().wait_synced(Lsn(3), None)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LogWriter {
    log: Arc<Log>,
    /// The lock of the log's directory, which outlives the `Wal` if the writer does.
    _lock: Arc<File>,
    /// The segment that takes the next batch; none before the first batch and after a sealing one.
    open: Option<SegmentWriter>,
    next_lsn: Lsn,
    chain: Chain,
    /// Epoch of the batches to come. The open segment may still be of an older one: then the next batch rolls.
    epoch: Epoch,
    timestamp: HybridTimestamp,
    clock: CoarseClock,
    /// Compact batches may begin in the open segment before this offset; 0 if none may now.
    compact_until: u64,
    /// What the last batch that is not compact says was synced.
    stated_synced: Lsn,
    /// Bytes from which on a batch goes in through the file.
    write_from: u64,
    /// Batches appended to the open segment since it was opened, and how many of them were long.
    batches: u64,
    long_batches: u64,
    /// Whether long windows go in through the file (follower only).
    stages: bool,
    /// Where batches are framed that go in through the file.
    frame: Vec<u8>,
    /// Bytes behind the published end that hold the beginning of a batch still arriving (follower only).
    arrived: u64,
    /// Bytes handed out behind those, to be filled (follower only).
    window: u64,
    /// Where `arrived` and `window` are if `is_staged`; else they are in the mapping (follower only).
    staging: Vec<u8>,
    is_staged: bool,
    /// Of `arrived`, bytes that are in the file as well: a window in which a batch ends is written to its own end
    /// (follower only).
    in_file: u64,
    /// Short windows since the last long one (follower only).
    short_windows: u32,
    /// A header page that is still arriving (follower only).
    header_page: Vec<u8>,
    /// Whether what is arriving is a header page: of the next segment, or once more of an open one without batches.
    header_due: bool,
    /// Nothing is known of the log before its first segment: the header page of that is believed, up to this epoch
    /// (follower only).
    trusted_epoch: Option<Epoch>,
    /// See [`set_led`](Self::set_led).
    is_led: bool,
    /// For the next segment.
    reserved: Option<Prepared>,
    /// Published end of the open segment at which to ask for more pages to be made ready.
    populate_at: u64,
    /// Published end of the open segment at which to note a landmark.
    landmark_at: u64,
    torn_tail: Option<TornTail>,
}

/// Where a log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogEnd {
    /// The newest LSN.
    pub head: Lsn,
    /// The chain at it.
    pub chain: Chain,
    /// The epoch of the newest batch, or the one set for batches to come.
    pub epoch: Epoch,
    /// The first LSN of the segment that takes the next byte.
    pub segment: Lsn,
    /// Where in that segment the next byte goes.
    pub offset: u64,
}

impl LogWriter {
    pub(super) fn new(
        log: Arc<Log>,
        lock: Arc<File>,
        open: Option<SegmentWriter>,
        end: LogEnd,
        timestamp: HybridTimestamp,
        torn_tail: Option<TornTail>,
    ) -> LogWriter {
        LogWriter {
            stages: cfg!(target_os = "linux") && log.options().populate_ahead < log.identity().segment_size,
            write_from: write_from(&log, false),
            compact_until: 0,
            stated_synced: Lsn::ZERO,
            log,
            batches: 0,
            long_batches: 0,
            _lock: lock,
            open,
            next_lsn: end.head.next(),
            chain: end.chain,
            epoch: end.epoch,
            timestamp,
            clock: CoarseClock::new(),
            frame: Vec::new(),
            arrived: 0,
            window: 0,
            staging: Vec::new(),
            is_staged: false,
            in_file: 0,
            short_windows: BULK_ENDS,
            header_page: Vec::new(),
            header_due: false,
            trusted_epoch: None,
            is_led: false,
            reserved: None,
            populate_at: 0,
            landmark_at: end.offset + LANDMARK_EVERY,
            torn_tail,
        }
    }

    /// The log written to.
    #[must_use]
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// The next header page says where the log begins; see [`Wal::open_at`](super::Wal::open_at).
    pub(super) fn trust_first_header(&mut self, newest_epoch: Epoch) {
        self.trusted_epoch = Some(newest_epoch);
    }

    /// The epoch is that of the node that leads: its followers know it by that.
    pub(crate) fn set_led(&mut self) {
        self.is_led = true;
    }

    /// What recovery had to cut off when the log was opened, if anything.
    #[must_use]
    pub fn torn_tail(&self) -> Option<&TornTail> {
        self.torn_tail.as_ref()
    }

    /// Where the log ends.
    #[must_use]
    pub fn end(&self) -> LogEnd {
        let (segment, offset) = match &self.open {
            Some(open) => (open.segment().id().first_lsn, open.end()),
            None => (self.next_lsn, 0),
        };
        LogEnd { head: self.next_lsn.previous(), chain: self.chain, epoch: self.epoch, segment, offset }
    }

    /// The epoch under which the next batches are written. A new one starts a new segment with the next batch, so the
    /// list of segments is the history of epochs.
    ///
    /// # Errors
    ///
    /// [`Error::StaleEpoch`] if the log has a newer one already; [`Error::Invalid`] on a leader, whose epoch is that of
    /// its node: it leads under another one when it is started with that (see
    /// [`NodeBuilder::epoch`](crate::NodeBuilder::epoch)).
    pub fn set_epoch(&mut self, epoch: Epoch) -> Result<()> {
        if epoch < self.epoch {
            return Err(Error::StaleEpoch { offered: epoch, accepted: self.epoch });
        }
        if self.is_led && epoch != self.epoch {
            return Err(Error::invalid(format!(
                "the leader of shard {} leads under epoch {}: start the node again to lead under {epoch}",
                self.log.shard(),
                self.epoch
            )));
        }
        self.epoch = epoch;
        self.compact_until = 0;
        Ok(())
    }

    /// Appends one record and returns its LSN at once: it is in the mapped log, and readers see it. It is on stable
    /// storage, or on followers, only once it has been [waited for](Log::wait_synced). Under
    /// [`SyncPolicy::EveryBatch`] this waits for the sync.
    ///
    /// # Errors
    ///
    /// Nothing was appended: [`Error::RecordTooLarge`]; [`Error::StaleEpoch`] on a leader that was deposed;
    /// [`Error::Poisoned`] after a failed sync; [`Error::Io`] if there is no next segment because the disk is full (try
    /// again once there is room); [`Error::Invalid`] of a log whose leader is still to say where it begins;
    /// [`Error::ShutDown`].
    ///
    /// Under [`SyncPolicy::EveryBatch`] an error can also come from the sync: then the record is in the log, and
    /// readers and followers may have it. [`head`](Log::head) tells: do not append it again.
    #[inline]
    pub fn append(&mut self, record: &[u8]) -> Result<Lsn> {
        let last = match self.place_compact(record)? {
            Some(last) => last,
            None => {
                let body_len = RECORD_HEADER_LEN + record.len() as u64;
                let len = self.check_len(body_len, record.len() as u64)?;
                self.place_body(1, len, |body| put_record(body, record))?
            }
        };
        self.publish(last)
    }

    /// Lets everybody see the log up to `last`.
    #[inline]
    fn publish(&self, last: Lsn) -> Result<Lsn> {
        if self.log.sync_policy() != SyncPolicy::EveryBatch {
            self.log.publish_written(last);
            return Ok(last);
        }
        self.log.sync_will_be_waited_for(last);
        self.log.publish_written(last);
        self.log.wait_synced(last, None)?;
        Ok(last)
    }

    /// Appends several records as one batch, which is kept or lost as a whole, and returns the LSN of the last one.
    ///
    /// # Errors
    ///
    /// As [`append`](Self::append); [`Error::Invalid`] for a batch without records.
    pub fn append_batch<R: AsRef<[u8]>>(&mut self, records: &[R]) -> Result<Lsn> {
        let last = self.place_batch(records)?;
        self.publish(last)
    }

    /// [`append_batch`](Self::append_batch), but those who wait for the log to grow are not woken, and nothing is
    /// synced: the caller does that, with [`Log::wake_readers`].
    pub(crate) fn append_batch_quietly<R: AsRef<[u8]>>(&mut self, records: &[R]) -> Result<Lsn> {
        let last = self.place_batch(records)?;
        self.log.publish_written_quietly(last);
        Ok(last)
    }

    fn place_batch<R: AsRef<[u8]>>(&mut self, records: &[R]) -> Result<Lsn> {
        let count = u32::try_from(records.len()).ok().filter(|&count| count > 0);
        let count = count.ok_or_else(|| Error::invalid("a batch has at least one record and at most 4294967295"))?;
        let body_len: u64 = records.iter().map(|record| RECORD_HEADER_LEN + record.as_ref().len() as u64).sum();
        let len = self.check_len(body_len, body_len - RECORD_HEADER_LEN)?;
        self.place_body(count, len, |mut body| {
            for record in records {
                let (this, rest) = body.split_at_mut(limits::index(RECORD_HEADER_LEN) + record.as_ref().len());
                put_record(this, record.as_ref());
                body = rest;
            }
        })
    }

    /// Refuses a body that fits in no segment.
    #[inline]
    fn check_len(&self, body_len: u64, len: u64) -> Result<u32> {
        let max = self.log.max_record_len();
        match u32::try_from(body_len) {
            Ok(checked) if len <= max => Ok(checked),
            _ => Err(Error::RecordTooLarge { len, max }),
        }
    }

    /// One copy, one checksum, and one store: the published end. The written mark follows.
    #[inline]
    fn place_body(&mut self, record_count: u32, body_len: u32, fill: impl FnOnce(&mut [u8])) -> Result<Lsn> {
        let total = batch::total_len(u64::from(body_len));
        // A sealing batch must always fit behind this one.
        if self.open.as_ref().is_none_or(|open| open.room() < total + BATCH_HEADER_LEN)
            || self.open.as_ref().is_some_and(|open| open.segment().header().epoch != self.epoch)
        {
            self.roll()?;
        }
        self.log.check_writable()?;
        let header = self.next_header(record_count, body_len, self.epoch);
        let Some(open) = &mut self.open else { return Err(Error::ShutDown) };
        if !open.takes_stores() {
            open.fill().map_err(Error::io("fill", open.segment().path()))?;
        }
        self.long_batches += u64::from(total >= WRITE_THROUGH_FILE_FROM);
        let is_long = total >= self.write_from && total <= WRITE_THROUGH_FILE_MOST;
        let is_stored = !(is_long || total <= WRITE_SYNCED_MOST && follows_sync(&header));
        if is_stored {
            self.chain = put_batch(open.unpublished(0..total), header, fill);
            open.prefetch(total);
        } else {
            self.chain = write_batch(open, &mut self.frame, total, header, fill)?;
        }
        self.compact_until = compact_until(open.segment().header(), open.end(), header.last_lsn());
        self.stated_synced = header.synced_lsn;
        self.timestamp = header.timestamp;
        self.placed(total, header.last_lsn(), is_stored)
    }

    /// Appends a record as a compact batch, where that is all that need be said of it; `None` where it is not. It is
    /// then stored to the mapping: what goes in through the file is longer, or the first behind what was synced, which
    /// is to be said.
    #[inline]
    fn place_compact(&mut self, record: &[u8]) -> Result<Option<Lsn>> {
        let Some(open) = self.open.as_mut().filter(|open| open.end() < self.compact_until) else { return Ok(None) };
        let len = record.len() as u64;
        let total = batch::compact_len(len);
        let is_due = len <= MAX_COMPACT_RECORD_LEN
            && open.room() >= total + BATCH_HEADER_LEN
            && self.log.synced().load() == self.stated_synced;
        if !is_due {
            return Ok(None);
        }
        self.log.check_writable()?;
        let timestamp = batch::compact_tick(self.timestamp, self.clock.unix_ms());
        #[allow(clippy::cast_possible_truncation, reason = "at most 4095")]
        let Some((detail, place)) = batch::compact_header(len as u32, self.next_lsn, timestamp) else {
            return Ok(None);
        };
        self.chain = put_compact(open.unpublished(0..total), detail, place, record, self.chain);
        open.prefetch(total);
        self.timestamp = timestamp;
        self.placed(total, self.next_lsn, true).map(Some)
    }

    /// Publishes a batch that is in place, and moves on behind it.
    #[inline]
    fn placed(&mut self, total: u64, last: Lsn, is_stored: bool) -> Result<Lsn> {
        let Some(open) = &mut self.open else { return Err(Error::ShutDown) };
        self.batches += 1;
        open.publish(total);
        self.next_lsn = last.next();
        if is_stored && open.end() >= self.populate_at {
            self.populate_at = self.log.populate_behind(open.segment(), open.end());
        }
        if open.end() >= self.landmark_at {
            self.note_landmark();
        }
        Ok(last)
    }

    /// Notes where the log ends, which is behind a batch with records.
    #[cold]
    fn note_landmark(&mut self) {
        let LogEnd { head, chain, epoch, segment, offset } = self.end();
        self.log.landmarks().note(LogPosition { lsn: head, chain, epoch, segment, offset });
        self.landmark_at = offset + LANDMARK_EVERY;
    }

    #[inline]
    fn next_header(&mut self, record_count: u32, body_len: u32, epoch: Epoch) -> BatchHeader {
        let at = Expected { first_lsn: self.next_lsn, chain: self.chain, epoch };
        let timestamp = self.timestamp.tick(self.clock.unix_ms());
        BatchHeader::new(at, (record_count, body_len), timestamp, self.log.synced().load())
    }

    fn take_spare(&mut self) -> Result<Prepared> {
        self.reserved.take().map_or_else(|| self.log.spares().take(), Ok)
    }

    /// Seals the open segment, if there is one, and opens the next. A spare is taken before, so that a full disk leaves
    /// everything as it was.
    #[cold]
    fn roll(&mut self) -> Result<()> {
        self.log.check_writable()?;
        if self.trusted_epoch.is_some() {
            return Err(Error::invalid(format!(
                "shard {} is waiting for its leader to say where its log begins, and takes no records",
                self.log.shard()
            )));
        }
        if self.open.is_some() {
            // All but a few. Of a segment that was recovered or received as a whole, nothing is known.
            let is_long = self.batches > 0 && self.long_batches >= self.batches - self.batches / 8;
            self.log.spares().set_long(is_long);
        }
        // A segment without batches is not sealed: the next one begins with the same LSN and takes its name.
        let has_batches = |open: &SegmentWriter| open.end() > SEGMENT_HEADER_LEN;
        // Before a spare is taken, which nobody would have if this failed.
        if let Some(open) = self.open.as_mut().filter(|open| has_batches(open) && !open.takes_stores()) {
            open.fill().map_err(Error::io("fill", open.segment().path()))?;
        }
        let prepared = self.take_spare()?;
        if let Some(mut open) = self.open.take_if(|open| has_batches(open)) {
            let header = self.next_header(0, 0, open.segment().header().epoch);
            self.chain = put_batch(open.unpublished(0..BATCH_HEADER_LEN), header, |_| {});
            self.timestamp = header.timestamp;
            open.publish(BATCH_HEADER_LEN);
            open.seal(self.next_lsn.previous());
        }
        let header = SegmentHeader {
            id: WalSegmentId {
                region: self.log.identity().region,
                shard: self.log.identity().shard,
                first_lsn: self.next_lsn,
            },
            cluster: self.log.identity().cluster,
            epoch: self.epoch,
            chain_before: self.chain,
            segment_size: self.log.identity().segment_size,
            version: SEGMENT_VERSION,
        };
        self.begin_segment(prepared, header)
    }

    /// Opens a new segment, in the place of an open one without batches; that one stays if it cannot be.
    fn begin_segment(&mut self, prepared: Prepared, header: SegmentHeader) -> Result<()> {
        let through_file = prepared.through_file;
        self.log.activate(prepared, header, &mut self.open)?;
        self.write_from = write_from(&self.log, through_file);
        (self.batches, self.long_batches) = (0, 0);
        self.compact_until = 0;
        self.populate_at = self.log.populate_at_start(through_file);
        self.landmark_at = LANDMARK_EVERY;
        Ok(())
    }

    /// Whether the open segment has all its blocks.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn takes_stores(&self) -> bool {
        self.open.as_ref().is_none_or(SegmentWriter::takes_stores)
    }

    /// Bytes of the last batch that was framed in memory and went in through the file.
    #[cfg(test)]
    pub(super) fn framed_len(&self) -> usize {
        self.frame.len()
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        self.discard_partial();
    }
}

/// Writes length and bytes of one record.
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "`check_len` has seen that the whole body fits in 32 bits")]
fn put_record(to: &mut [u8], record: &[u8]) {
    let (len, bytes) = to.split_at_mut(limits::index(RECORD_HEADER_LEN));
    len.copy_from_slice(&(record.len() as u32).to_le_bytes());
    bytes.copy_from_slice(record);
}

/// Where compact batches may begin behind one that says everything, which begins at `at` and ends with `lsn`: in the
/// same page. 0 for nowhere.
#[inline]
fn compact_until(segment: &SegmentHeader, at: u64, lsn: Lsn) -> u64 {
    // No page has so many of them.
    let is_near = lsn.records_since(segment.id.first_lsn) < COMPACT_LSNS - PAGE_LEN;
    if segment.version >= SEGMENT_VERSION && is_near { (at + 1).next_multiple_of(PAGE_LEN) } else { 0 }
}

/// Bytes from which on a batch goes in through the file, of a segment whose pages are made ready for stores or not.
fn write_from(log: &Log, through_file: bool) -> u64 {
    let unready = through_file || log.options().populate_ahead == 0;
    if cfg!(target_os = "linux") && unready { WRITE_THROUGH_FILE_FROM } else { u64::MAX }
}

/// Whether everything before a batch is on stable storage, as where each append is waited for: then it goes in through
/// the file. A store would take a fault, as the page that it begins in was made read-only by that sync, and the next
/// sync would have to make it so again: measured here, 6 us of a durable append of 100 to 140. Appends that nobody
/// waits for find it so at most once a sync.
#[inline]
fn follows_sync(header: &BatchHeader) -> bool {
    cfg!(target_os = "linux") && header.synced_lsn.next() == header.first_lsn
}

/// Fills a whole compact batch. Returns the chain after it.
#[inline]
fn put_compact(batch: &mut [u8], detail: u32, place: u64, record: &[u8], before: Chain) -> Chain {
    if let Some(last) = batch.last_chunk_mut::<{ limits::index(BATCH_ALIGNMENT) }>() {
        *last = [0; limits::index(BATCH_ALIGNMENT)];
    }
    if let Some(first) = batch.first_chunk_mut::<COMPACT>() {
        first[..4].fill(0);
        first[4..8].copy_from_slice(&detail.to_le_bytes());
        first[8..].copy_from_slice(&place.to_le_bytes());
    }
    batch[COMPACT..COMPACT + record.len()].copy_from_slice(record);
    put_crc(batch, before)
}

/// Fills a whole batch: records, padding, header, checksum. Returns the chain after it.
#[inline]
fn put_batch(batch: &mut [u8], header: BatchHeader, fill: impl FnOnce(&mut [u8])) -> Chain {
    let body_end = HEADER + header.body_len as usize;
    // The padding and up to 8 bytes before it in one store: a fill of unknown length would be a call.
    if let Some(last) = batch.last_chunk_mut::<{ limits::index(BATCH_ALIGNMENT) }>() {
        *last = [0; limits::index(BATCH_ALIGNMENT)];
    }
    if let Some(first) = batch.first_chunk_mut::<HEADER>() {
        header.encode(first);
    }
    fill(&mut batch[HEADER..body_end]);
    put_crc(batch, header.prev_crc)
}

/// The same through the file, by way of memory that stays in the cache.
fn write_batch(
    open: &mut SegmentWriter,
    frame: &mut Vec<u8>,
    total: u64,
    header: BatchHeader,
    fill: impl FnOnce(&mut [u8]),
) -> Result<Chain> {
    frame.resize(limits::index(total), 0);
    let chain = put_batch(frame, header, fill);
    let written = open.write_unpublished(0, frame);
    if frame.capacity() > KEEP_FRAME {
        *frame = Vec::new();
    }
    if let Err(error) = written {
        open.clear_unpublished(total);
        return Err(Error::io("write", open.segment().path())(error));
    }
    Ok(chain)
}

/// Writes the checksum of a batch that is finished but for that, and returns the chain after it.
#[inline]
fn put_crc(batch: &mut [u8], before: Chain) -> Chain {
    let chain = batch::chain_after_batch(before, batch);
    batch[..4].copy_from_slice(&chain.0.to_le_bytes());
    chain
}

/// The wall clock of one writer, read again only once some time has passed, where the processor counts time in a way
/// that costs less to read. Reading the clock costs 30 ns here, as much as the copy and the checksum of a small record.
#[derive(Debug)]
struct CoarseClock {
    unix_ms: u64,
    read_at: Option<u64>,
}

impl CoarseClock {
    /// Ticks for which a reading is good: from 13 us at 5 GHz to 66 us at 1 GHz, nothing beside a millisecond.
    const GOOD_FOR: u64 = 1 << 16;

    fn new() -> CoarseClock {
        CoarseClock { unix_ms: 0, read_at: None }
    }

    /// Milliseconds since 1970.
    #[inline]
    fn unix_ms(&mut self) -> u64 {
        let now = processor_ticks();
        // A thread that has moved to another processor may find fewer ticks than before: that is a large difference.
        let is_good = matches!((now, self.read_at), (Some(now), Some(at)) if now.wrapping_sub(at) < Self::GOOD_FOR);
        if !is_good {
            (self.unix_ms, self.read_at) = (unix_ms(), now);
        }
        self.unix_ms
    }
}

/// The wall clock; 0 before 1970.
#[inline]
pub(crate) fn unix_ms() -> u64 {
    // Not `as_millis`, which is 128 bits wide: that costs 8 ns of an append.
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_secs() * 1000 + u64::from(since.subsec_millis())
}

#[cfg(test)]
mod tests;
