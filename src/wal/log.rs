//! What the threads of a shard share: its segments, its marks, and who may put them on stable storage.
//!
//! # The ladder of marks
//!
//! `synced <= written`. Each only moves forward.
//!
//! | mark | its only writer | says |
//! |---|---|---|
//! | `written` | the [`LogWriter`](super::LogWriter), after the segment published the bytes | readers may read it |
//! | `synced` | whoever holds `sync`, after the device has the bytes | it survives a power cut, with all that is left before it |
//! | `sync_wanted` | anyone | somebody will want it synced without waiting here |
//! | `opened` | the [`LogWriter`](super::LogWriter), after the segment is in the list | the first LSN of the newest segment |
//! | `ended` | the first of close and poison | 1: waiting is over |
//!
//! # Who syncs
//!
//! Whoever waits for a sync and finds nobody syncing does it, for everything written so far in the segment that it
//! waits for; the others wait for that one. A commit by one thread therefore crosses no other thread. Of those who came
//! too late for a sync, the first does the next one (see [`sync_line`](super::sync_line)), once those who were released
//! together have come back (see [`sync_group`](super::sync_group)). They and those whom the sync has covered are woken
//! after the lock has been let go, unless a segment ends there: while many are woken, one by one, the device has work
//! again. The shard's sync thread does what nobody waits for: see [`SyncPolicy`]. It is there while anything is.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};

use crate::error::{Error, Result};
use crate::limits::{PAGE_LEN, SEGMENT_HEADER_LEN, max_record_len};
use crate::types::{Epoch, Lsn, ShardId};
use crate::wal::given_up::GivenUp;
use crate::wal::health::{Health, ScrubStatus};
use crate::wal::landmarks::Landmarks;
use crate::wal::mapping::{LogRange, Segment, SegmentWriter};
use crate::wal::reader::{LogPosition, LogReader};
use crate::wal::segment::{HEADER_FIELDS, OpenDirectory, SegmentHeader, write_all_at};
use crate::wal::spares::{Prepared, Spares};
use crate::wal::sync_group::{SyncGroup, SyncWaits};
use crate::wal::sync_line::SyncLine;
use crate::wal::syncer::{Syncer, start_when_due};
use crate::wal::{LogIdentity, SyncPolicy, WalOptions};
use crate::watermark::{Until, Waited, Watermark, wait_any};

/// The log of one shard, as its readers and waiters see it. Shared by reference count; the one
/// [`LogWriter`](super::LogWriter) and any number of readers hold it.
pub struct Log {
    identity: LogIdentity,
    pub(super) directory: PathBuf,
    /// For whoever syncs: what can be tried again must not end as a sync that failed.
    names: OpenDirectory,
    options: WalOptions,
    /// The first LSN of the newest segment that was there when the log was opened; zero if there was none.
    found_through: Lsn,
    /// Oldest first. Written by the log writer (a new segment) and by retention (an old one goes); readers hold the
    /// lock for a look-up only.
    pub(super) segments: RwLock<Vec<Arc<Segment>>>,
    written: Watermark,
    synced: Watermark,
    sync_wanted: Watermark,
    opened: Watermark,
    ended: Watermark,
    sync: Mutex<SyncPosition>,
    /// Those who found `sync` locked.
    sync_line: SyncLine,
    sync_waits: SyncWaits,
    /// What became of released segments whose files are still there. Locked after `sync` and before `segments`; never
    /// held while anybody waits for the device. Whoever gives a segment up holds it from the decision until the segment
    /// is out of the list, and whoever takes back what such a decision rests on, `named` or the newest segment, too.
    pub(super) given_up: Mutex<GivenUp>,
    /// Held by whoever gives up segments. Nobody else waits for it.
    pub(super) releasing: Mutex<()>,
    /// The first LSN of the newest segment whose name and header are durable. Moved by whoever holds `sync`.
    pub(super) named: AtomicU64,
    /// Up to where anything was given up before it was synced. Moved under the lock of `given_up`, which has what it
    /// was.
    pub(super) unsynced_through: AtomicU64,
    end_reason: OnceLock<EndReason>,
    spares: Arc<Spares>,
    syncer: Arc<Syncer>,
    health: Health,
    landmarks: Landmarks,
}

/// Why nothing more is appended.
#[derive(Debug)]
enum EndReason {
    /// A sync failed.
    Poisoned(String),
    /// A newer epoch was seen than the one it was written under.
    Deposed { offered: Epoch, accepted: Epoch },
    /// It was closed.
    Closed,
}

/// Up to where the log is on stable storage. Only whoever syncs has it.
#[derive(Debug)]
struct SyncPosition {
    /// First LSN of the segment in which the next sync begins.
    segment: Lsn,
    /// Bytes of that segment that are synced; 0 if its name is not durable yet.
    offset: u64,
    group: SyncGroup,
}

impl Log {
    pub(super) fn new(
        directory: &Path,
        identity: LogIdentity,
        options: WalOptions,
        segments: Vec<Arc<Segment>>,
        head: Lsn,
        spares: Arc<Spares>,
    ) -> Result<Log> {
        let opened = segments.last().map_or(Lsn::ZERO, |segment| segment.id().first_lsn);
        let next_sync = segments.first().map_or(head.next(), |segment| segment.id().first_lsn);
        Ok(Log {
            identity,
            names: OpenDirectory::open(directory).map_err(Error::io("open", directory))?,
            directory: directory.to_owned(),
            options,
            found_through: opened,
            segments: RwLock::new(segments),
            written: Watermark::new(head),
            synced: Watermark::new(Lsn::ZERO),
            sync_wanted: Watermark::new(Lsn::ZERO),
            opened: Watermark::new(opened),
            ended: Watermark::new(Lsn::ZERO),
            sync_waits: SyncWaits::default(),
            sync: Mutex::new(SyncPosition { segment: next_sync, offset: 0, group: SyncGroup::new() }),
            sync_line: SyncLine::default(),
            given_up: Mutex::default(),
            releasing: Mutex::default(),
            named: AtomicU64::new(0),
            unsynced_through: AtomicU64::new(0),
            end_reason: OnceLock::new(),
            spares,
            syncer: Arc::default(),
            health: Health::default(),
            landmarks: Landmarks::default(),
        })
    }

    /// What makes this log this log.
    #[must_use]
    pub fn identity(&self) -> &LogIdentity {
        &self.identity
    }

    /// The shard.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.identity.shard
    }

    /// Where its segments are.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// What is known to be damaged.
    pub(crate) fn health(&self) -> &Health {
        &self.health
    }

    /// What scrubbing has found since the log was opened, in segments that it still has.
    #[must_use]
    pub fn scrub_status(&self) -> ScrubStatus {
        let (tail, mut status) = (self.tail(), self.health.status());
        status.findings.retain(|finding| finding.segment >= tail);
        status
    }

    /// Its settings.
    #[must_use]
    pub fn options(&self) -> &WalOptions {
        &self.options
    }

    /// The newest LSN in the mapped log.
    #[must_use]
    pub fn written(&self) -> &Watermark {
        &self.written
    }

    /// The newest LSN on stable storage; so is everything before it that the log has not given up.
    #[must_use]
    pub fn synced(&self) -> &Watermark {
        &self.synced
    }

    /// The first LSN of the newest segment: moves when the one before it is sealed. [`Lsn::ZERO`] before the first.
    pub(crate) fn opened(&self) -> &Watermark {
        &self.opened
    }

    /// The newest LSN; [`Lsn::ZERO`] if the log is empty.
    #[must_use]
    pub fn head(&self) -> Lsn {
        self.written.load()
    }

    /// The oldest LSN that is still retained; the one after the head if none is.
    #[must_use]
    pub fn tail(&self) -> Lsn {
        self.segments.read().first().map_or(self.head().next(), |segment| segment.id().first_lsn)
    }

    /// Bytes of the files of the log's segments, without spares and what is being given up.
    #[must_use]
    pub fn retained_bytes(&self) -> u64 {
        self.segments.read().len() as u64 * self.identity.segment_size
    }

    /// Bytes of log that a reader at `lsn` has not read yet, or somewhat more: of the segment that holds `lsn`, all
    /// of it counts, unless `lsn` is the head.
    #[must_use]
    pub fn bytes_after(&self, lsn: Lsn) -> u64 {
        if lsn >= self.head() {
            return 0;
        }
        let segments = self.segments.read();
        let first = segments.partition_point(|segment| segment.id().first_lsn <= lsn.next()).saturating_sub(1);
        segments.iter().skip(first).map(|segment| segment.published()).sum()
    }

    /// The largest record that fits.
    #[must_use]
    pub fn max_record_len(&self) -> u64 {
        max_record_len(self.identity.segment_size)
    }

    /// The segments, oldest first.
    #[must_use]
    pub fn segments(&self) -> Vec<Arc<Segment>> {
        self.segments.read().clone()
    }

    /// The sealed segments that hold anything after `lsn`, oldest first.
    #[must_use]
    pub fn sealed_segments_since(&self, lsn: Lsn) -> Vec<Arc<Segment>> {
        let segments = self.segments.read();
        segments.iter().filter(|segment| segment.sealed_last_lsn().is_some_and(|last| last > lsn)).cloned().collect()
    }

    /// The segment that holds `lsn`, or would hold it as its next record.
    pub(super) fn segment_holding(&self, lsn: Lsn) -> Option<Arc<Segment>> {
        let segments = self.segments.read();
        let after = segments.partition_point(|segment| segment.id().first_lsn <= lsn);
        segments.get(after.checked_sub(1)?).cloned()
    }

    /// The epoch of the newest record, or, where none is retained, of the segment that takes the next; 0 if there is
    /// none. Of two logs, the one with the newer epoch here has all that counted in the other's; under the same, the
    /// longer one has.
    #[must_use]
    pub fn head_epoch(&self) -> Epoch {
        let head = self.head();
        let holding = self.segment_holding(head).or_else(|| self.segment_holding(head.next()));
        holding.map_or(Epoch::ZERO, |segment| segment.header().epoch)
    }

    /// The segment that begins with `lsn`.
    pub(crate) fn segment_beginning(&self, lsn: Lsn) -> Option<Arc<Segment>> {
        self.segment_holding(lsn).filter(|segment| segment.id().first_lsn == lsn)
    }

    /// A reader that begins with the batch that holds `lsn`, or with its segment's header page where it is the first of
    /// a segment. Records before `lsn` in that batch are given too.
    ///
    /// # Errors
    ///
    /// [`Error::NotRetained`] if `lsn` is before the tail or more than one past the head.
    pub fn reader_from(self: &Arc<Self>, lsn: Lsn) -> Result<LogReader> {
        let position = self.position_before(lsn.max(Lsn::FIRST))?;
        Ok(LogReader::new(Arc::clone(self), position))
    }

    /// A reader that begins at a position of this log. The headers of its segment are read up to there.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if no batch of this log ends or begins at that position; [`Error::NotRetained`] if its
    /// segment has been given up, or there is none yet.
    pub fn reader_at(self: &Arc<Self>, position: LogPosition) -> Result<LogReader> {
        self.check_place(&position)?;
        Ok(self.reader_at_known(position))
    }

    /// A reader that begins at a position that this log has told.
    pub(crate) fn reader_at_known(self: &Arc<Self>, position: LogPosition) -> LogReader {
        LogReader::new(Arc::clone(self), position)
    }

    pub(super) fn not_retained(&self, lsn: Lsn) -> Error {
        Error::NotRetained { shard: self.shard(), lsn, tail: self.tail(), head: self.head() }
    }

    /// The whole retained log from `lsn` on as ranges of sealed and open segments, as it is now.
    ///
    /// # Errors
    ///
    /// As [`reader_from`](Self::reader_from).
    pub fn ranges_from(self: &Arc<Self>, lsn: Lsn) -> Result<Vec<LogRange>> {
        let mut reader = self.reader_from(lsn)?;
        let mut ranges = Vec::new();
        while let Some(range) = reader.next(u64::MAX)? {
            ranges.push(range);
        }
        Ok(ranges)
    }

    pub(super) fn sync_policy(&self) -> SyncPolicy {
        self.options.sync
    }

    pub(super) fn spares(&self) -> &Spares {
        &self.spares
    }

    pub(super) fn sync_wanted(&self) -> &Watermark {
        &self.sync_wanted
    }

    pub(super) fn syncer(&self) -> &Arc<Syncer> {
        &self.syncer
    }

    pub(super) fn landmarks(&self) -> &Landmarks {
        &self.landmarks
    }

    #[inline]
    pub(super) fn publish_written(&self, lsn: Lsn) {
        self.written.publish(lsn);
    }

    #[inline]
    pub(super) fn publish_written_quietly(&self, lsn: Lsn) {
        self.written.publish_quietly(lsn);
    }

    /// Wakes those who wait for what has been published quietly.
    pub(crate) fn wake_readers(&self) {
        self.written.wake();
    }

    /// Refuses once the log is closed or poisoned.
    #[inline]
    pub(super) fn check_writable(&self) -> Result<()> {
        if self.ended.load() == Lsn::ZERO { Ok(()) } else { Err(self.end_reason()) }
    }

    /// Condition that holds once waiting on this log is over.
    #[must_use]
    pub fn until_ended(&self) -> Until<'_> {
        Until { mark: &self.ended, at_least: Lsn(1) }
    }

    /// Why waiting is over: [`Error::Poisoned`], [`Error::StaleEpoch`] for a deposed leader, or [`Error::ShutDown`].
    #[must_use]
    pub fn end_reason(&self) -> Error {
        match self.end_reason.get() {
            Some(EndReason::Poisoned(reason)) => Error::Poisoned { shard: self.shard(), reason: reason.clone() },
            Some(&EndReason::Deposed { offered, accepted }) => Error::StaleEpoch { offered, accepted },
            Some(EndReason::Closed) | None => Error::ShutDown,
        }
    }

    /// Whether it was closed: nothing is ever written to it again, and a newer log may have taken its place.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self.end_reason.get(), Some(EndReason::Closed))
    }

    /// Whether a newer epoch was seen than the one it was written under.
    pub(crate) fn is_deposed(&self) -> bool {
        matches!(self.end_reason.get(), Some(EndReason::Deposed { .. }))
    }

    /// The failure that made the shard read-only, if there was one.
    #[must_use]
    pub fn poison(&self) -> Option<&str> {
        match self.end_reason.get() {
            Some(EndReason::Poisoned(reason)) => Some(reason),
            _ => None,
        }
    }

    /// Why nothing is appended any more although the log is open: a failure, or that its leader was deposed.
    pub(crate) fn read_only_reason(&self) -> Option<String> {
        match self.end_reason.get()? {
            EndReason::Poisoned(reason) => Some(reason.clone()),
            EndReason::Deposed { .. } => Some(self.end_reason().to_string()),
            EndReason::Closed => None,
        }
    }

    fn end_for(&self, reason: EndReason) {
        let _ = self.end_reason.set(reason);
        self.ended.advance(Lsn(1));
    }

    fn set_poison(&self, error: &Error) {
        log::error!("shard {}: {error}; the shard is read-only from now on", self.shard());
        self.end_for(EndReason::Poisoned(error.to_string()));
    }

    /// Stops appends and waits because what must go with the log failed.
    pub(crate) fn stop_for(&self, error: &Error) {
        self.set_poison(error);
    }

    /// Stops appends and waits because another node leads under a newer epoch.
    pub(crate) fn depose(&self, epoch: Epoch, newer: Epoch) {
        self.end_for(EndReason::Deposed { offered: epoch, accepted: newer });
    }

    /// Stops appends and waits because the log is being closed.
    pub(super) fn end(&self) {
        self.end_for(EndReason::Closed);
        self.spares.stop();
    }

    /// Takes a prepared file into use: it gets its name, its header page and its place in the list. The name is made
    /// durable by the first sync of the segment.
    ///
    /// Recovery refuses a log that begins past LSN 1 without a readable header: there the header is durable before the
    /// name is. And the name of a log's first segment is durable before there is another: a power cut that kept only
    /// the second one would leave what looks like such a log.
    ///
    /// `open` is none, or the newest segment with nothing written in it: then the new one begins with the same LSN and
    /// takes its name and its place.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]: nothing has changed, but that the prepared file is gone; or, where only the directory could not
    /// be synced, the new file has the name already, as it would after a crash, and no segment is open. Either way a
    /// segment of that name stays on the disk if there was one: it may be all that says where the log begins.
    pub(super) fn activate(
        &self,
        prepared: Prepared,
        header: SegmentHeader,
        open: &mut Option<SegmentWriter>,
    ) -> Result<()> {
        if let Some(empty) = open.as_ref() {
            self.discard_empty(empty);
        }
        let is_first = self.segments.read().is_empty();
        let path = self.directory.join(header.id.to_string());
        if let Err(error) = give_name(&prepared, &path, &header, is_first) {
            let _ = std::fs::remove_file(&prepared.path);
            // It still has its name, and is synced from its beginning once more.
            self.segments.write().extend(open.as_ref().map(|empty| Arc::clone(empty.segment())));
            return Err(error);
        }
        *open = None;
        if is_first {
            self.sync_names()?;
        }
        let filled = prepared.filled;
        let (segment, mut writer) = Segment::new(header, path, prepared.file, prepared.mapping, 0, None);
        if filled {
            let (fields, rest) = writer.unpublished(0..SEGMENT_HEADER_LEN).split_at_mut(HEADER_FIELDS);
            fields.copy_from_slice(&header.encode_fields());
            rest.fill(0);
        } else {
            writer.use_file_only();
        }
        writer.publish(SEGMENT_HEADER_LEN);
        log::debug!("shard {}: opened {}", self.shard(), header.id);
        self.segments.write().push(segment);
        self.opened.advance(header.id.first_lsn);
        *open = Some(writer);
        Ok(())
    }

    /// Makes the names of its files durable.
    fn sync_names(&self) -> Result<()> {
        self.names.sync().map_err(Error::io("sync directory", &self.directory))
    }

    /// Takes the newest segment, in which nothing was written, out of the list. Its file is replaced by its
    /// successor's, which begins with the same LSN and is to be synced from its beginning.
    ///
    /// The segment before it may be on its way out because this one is durable, which its successor is not yet. Either
    /// that one is out of the list on return, and the successor begins the log; or it is the newest, and stays.
    fn discard_empty(&self, open: &SegmentWriter) {
        let mut position = self.sync.lock();
        let given_up = self.given_up.lock();
        self.segments.write().pop_if(|last| Arc::ptr_eq(last, open.segment()));
        if position.segment == open.segment().id().first_lsn {
            position.offset = 0;
        }
        self.named.fetch_min(open.segment().id().first_lsn.previous().0, Ordering::AcqRel);
        drop(given_up);
        self.give_turn(position);
    }

    /// Whether a segment was made since the log was opened. Others may be mapped by whoever read the log when it was
    /// open before, in this process or another one.
    pub(super) fn has_made(&self, segment: &Segment) -> bool {
        segment.id().first_lsn > self.found_through
    }

    /// Whether a segment is (still) part of the log.
    pub(crate) fn holds(&self, segment: &Arc<Segment>) -> bool {
        self.segments.read().iter().rev().any(|held| Arc::ptr_eq(held, segment))
    }

    /// The published end of a new segment at which to ask for more pages: its first ones were made ready with it,
    /// unless none are to be.
    pub(super) fn populate_at_start(&self, through_file: bool) -> u64 {
        if through_file || self.options.populate_ahead >= self.identity.segment_size {
            u64::MAX
        } else {
            self.options.populate_ahead / 2
        }
    }

    /// Has pages ahead of the writer made ready; returns the published end at which to ask again.
    #[cold]
    pub(super) fn populate_behind(&self, segment: &Arc<Segment>, end: u64) -> u64 {
        if self.options.populate_ahead == 0 {
            return u64::MAX;
        }
        self.spares.populate(segment, end, self.options.populate_ahead)
    }

    /// Says that `lsn` should be synced soon although nobody here waits for it.
    pub(crate) fn want_synced(&self, lsn: Lsn) {
        self.sync_wanted.advance(lsn);
    }

    /// Whoever is about to wake the log's readers waits for the sync up to `lsn` after that: no thread starts for it.
    pub(crate) fn sync_will_be_waited_for(&self, lsn: Lsn) {
        self.syncer.will_be_waited_for(lsn);
    }

    /// It waits no more, and what is not synced yet is left to the thread.
    pub(crate) fn leave_sync(self: &Arc<Self>) {
        self.syncer.will_be_waited_for(Lsn::ZERO);
        start_when_due(self);
    }

    /// Waits until `lsn` is on stable storage, and does the sync if nobody else is doing it.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] at the deadline, [`Error::Poisoned`] if this or an earlier sync failed, [`Error::ShutDown`]
    /// if the log is closed first. [`Error::NotRetained`] for an LSN that is not written, and for one that was given up
    /// before it was on stable storage, as a log does that outgrows its bound faster than it is synced.
    pub fn wait_synced(&self, lsn: Lsn, deadline: Option<Instant>) -> Result<()> {
        self.wait_synced_or_given_up(lsn, deadline)?;
        if self.went_unsynced(lsn) { Err(self.not_retained(lsn)) } else { Ok(()) }
    }

    /// Waits until everything up to `lsn` that has not been given up is on stable storage, as
    /// [`wait_synced`](Self::wait_synced) does.
    pub(crate) fn wait_synced_or_given_up(&self, lsn: Lsn, deadline: Option<Instant>) -> Result<()> {
        if lsn > self.written.load() {
            return Err(self.not_retained(lsn));
        }
        if self.synced.load() < lsn {
            self.spares.syncs_are_waited_for();
            self.sync_waits.arrive();
        }
        self.sync_through(lsn, deadline)
    }

    /// Waits until the spare segments are ready that [`WalOptions::spare_segments`] asks for: what is appended next
    /// finds them, and as long as nobody appends, nothing is prepared beside what else runs. Spares that are made
    /// during the wait are on stable storage afterwards. No append needs this; measurements do, and whoever expects a
    /// burst.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] at the deadline, [`Error::Io`] if a spare cannot be made, for want of room say,
    /// [`Error::ShutDown`] if the log is closed first.
    pub fn wait_for_spares(&self, deadline: Option<Instant>) -> Result<()> {
        self.spares.wait_ready(deadline)
    }

    /// Has the first spares prepared, if none have been yet: records are about to come one by one.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if there can be no thread for it.
    pub(crate) fn prepare_spares(&self) -> Result<()> {
        self.spares.begin()
    }

    /// [`wait_synced`](Self::wait_synced) for whoever has the time.
    fn sync_through(&self, lsn: Lsn, deadline: Option<Instant>) -> Result<()> {
        while self.synced.load() < lsn {
            self.check_writable()?;
            if let Some(position) = self.sync.try_lock() {
                self.sync_locked(position, lsn)?;
            } else if self.gave_way(lsn, deadline) {
                // Synced, or perhaps this thread's turn, or the end of the log.
            } else if self.wait_in_line(lsn, deadline) == Waited::TimedOut {
                return Err(Error::TimedOut {
                    what: format!("LSN {lsn} of shard {} to be synced", self.shard()).into(),
                });
            }
        }
        Ok(())
    }

    /// Gives way to others while somebody syncs, where that is better than to sleep. Returns whether there is something
    /// to do, or nothing to wait for any more.
    fn gave_way(&self, lsn: Lsn, deadline: Option<Instant>) -> bool {
        let is_over = || self.synced.load() >= lsn || !self.sync.is_locked() || self.check_writable().is_err();
        self.sync_waits.give_way(deadline, is_over)
    }

    /// Waits until `lsn` is synced, or the log ends, or it may be this thread's turn to sync.
    fn wait_in_line(&self, lsn: Lsn, deadline: Option<Instant>) -> Waited {
        let place = self.sync_line.enter(lsn);
        // Looked at again: only whoever holds the lock from now on finds this place.
        let waited = if self.sync.is_locked() {
            let conditions = [self.synced.until(lsn), place.until_called(), self.until_ended()];
            wait_any(&conditions, self.options.wait, deadline)
        } else {
            Waited::Reached(1)
        };
        if self.sync_line.leave(place) && waited == Waited::TimedOut {
            self.sync_line.call_next(self.synced.load());
        }
        waited
    }

    /// Puts everything up to `lsn` on stable storage, or up to the head if that is less.
    pub(crate) fn sync_up_to(&self, lsn: Lsn) -> Result<()> {
        self.sync_through(lsn.min(self.written.load()), None)
    }

    /// Puts everything written on stable storage.
    pub(crate) fn sync_all(&self) -> Result<()> {
        self.sync_through(self.written.load(), None)
    }

    /// One sync up to `lsn` and of what else its segment holds, then a turn for those it did not cover. Segments after
    /// that would each take another sync: whoever wants them does those, and `lsn` does not wait for what came after
    /// it.
    fn sync_locked(&self, mut position: parking_lot::MutexGuard<'_, SyncPosition>, lsn: Lsn) -> Result<()> {
        // Once a sync has failed, another one may succeed although the pages are lost: it must not be tried.
        self.check_writable()?;
        position.group.gather(&self.sync_waits);
        let began = Instant::now();
        let result = self.sync_segments(&mut position, lsn);
        position.group.has_synced(began.elapsed(), &self.sync_waits);
        if let Err(error) = &result {
            self.set_poison(error);
        }
        self.give_turn(position);
        result
    }

    /// Lets go of the sync lock, calls whoever syncs next, and then wakes those that the sync has covered. Whoever
    /// found the lock taken waits for that, whatever it was taken for.
    fn give_turn(&self, position: parking_lot::MutexGuard<'_, SyncPosition>) {
        drop(position);
        self.sync_line.call_next(self.synced.load());
        self.synced.wake();
    }

    /// Those who wait for their turn to sync.
    #[cfg(test)]
    pub(super) fn sync_line(&self) -> &SyncLine {
        &self.sync_line
    }

    /// Up to where the log is on stable storage: a segment, and bytes of it.
    #[cfg(test)]
    pub(super) fn synced_position(&self) -> (Lsn, u64) {
        let position = self.sync.lock();
        (position.segment, position.offset)
    }

    /// Syncs up to `lsn`, and whatever more the segments up to there hold, and says so: quietly, as whoever waits for
    /// that is to be woken once the lock has been let go.
    fn sync_segments(&self, position: &mut SyncPosition, lsn: Lsn) -> Result<()> {
        // Of the newest segment at least that much is published when it is looked at.
        let written = self.written.load();
        loop {
            let Some(segment) = self.segment_to_sync(position.segment)? else {
                if position.segment > written {
                    self.synced.advance_quietly(written);
                    return Ok(());
                }
                let path = self.directory.join(format!("(the segment of LSN {})", position.segment));
                return Err(Error::corrupt(path, 0, Some(position.segment), "it is gone and was never synced"));
            };
            let first_lsn = segment.id().first_lsn;
            if first_lsn != position.segment {
                (position.segment, position.offset) = (first_lsn, 0);
            }
            let sealed = segment.sealed_last_lsn();
            let end = segment.sync_end(sealed.is_some());
            if end > position.offset {
                // Only the pages written: those made ready ahead of the writer stay out of it.
                let start = position.offset - position.offset % PAGE_LEN;
                segment.sync_range(start..end)?;
                // A segment's last sync ends where the segment does: nothing of it is written again.
                if sealed.is_none() {
                    self.spares.has_synced();
                }
                if position.offset == 0 {
                    self.sync_names()?;
                    self.named.fetch_max(first_lsn.0, Ordering::AcqRel);
                }
                position.offset = end;
            }
            let Some(last_lsn) = sealed else {
                self.synced.advance_quietly(written);
                return Ok(());
            };
            (position.segment, position.offset) = (last_lsn.next(), 0);
            // At once, and no further than asked: a writer that keeps ahead must not keep what is done from counting.
            self.synced.advance(last_lsn);
            if last_lsn >= lsn {
                return Ok(());
            }
        }
    }
}

/// Renames a prepared file to the segment that it becomes. The header is written through the file where the file takes
/// no stores yet, and made durable where the log begins with it, past LSN 1.
fn give_name(prepared: &Prepared, path: &Path, header: &SegmentHeader, is_first: bool) -> Result<()> {
    let begins_log = is_first && header.id.first_lsn > Lsn::FIRST;
    if begins_log || !prepared.filled {
        // Behind the fields the file is zero already.
        let written = write_all_at(&prepared.file, &header.encode_fields(), 0);
        let durable = written.and_then(|()| if begins_log { prepared.file.sync_data() } else { Ok(()) });
        durable.map_err(Error::io("write the header of", &prepared.path))?;
    }
    std::fs::rename(&prepared.path, path).map_err(Error::io("rename a prepared segment to", path))
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log")
            .field("identity", &self.identity)
            .field("written", &self.written.load())
            .field("synced", &self.synced.load())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
