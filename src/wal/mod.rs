//! The log of one shard: mapped segments of batches, one writer, any number of readers.
//!
//! A [`Wal`] is a directory of [segment] files, each a header page and [batches](batch). Opening one
//! recovers it and gives its one [`LogWriter`]; everything else goes through the shared [`Log`]:
//! [`LogReader`]s that tail it, waiting for syncs, retention.
//!
//! # Durability
//!
//! - A record is *written* when [`LogWriter::append`] returns: in the mapped file, seen by readers, and safe from a
//!   crash of the process.
//! - It is *synced* when [`Log::wait_synced`] says so, or the [`synced`](Log::synced) mark has passed it: safe from a
//!   power cut.
//! - A sync that fails poisons the shard: nothing is appended or reported synced any more until it is opened again.
//! - After a crash, what was synced is there. What was only written may be there up to some record; it is then
//!   *written*, and synced again while opening.
//!
//! # Threads
//!
//! An open log has at most three: one prepares segments ahead of need, one syncs what nobody waits for (see
//! [`SyncPolicy`]), one lets go of segments that were given up, and makes durable which of their files are to be filled
//! again. Each is there while there is something to do, the first two stay a while after it, each is started again by
//! whoever then has something, and ends at the latest when the [`Wal`] is closed or dropped. A thread begins with the
//! processors, the scheduling and the priority of the thread that starts it, which for the first two is most often one
//! that appends: who binds that thread to a processor, or gives it a priority in real time, does so to these, and may
//! want a thread of its own for it, or not to leave syncs to the log ([`SyncPolicy::Never`], [`Log::wait_synced`]).
//! While a log is being opened, its segments are checked by as many threads as there are processors, at most eight.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub mod batch;
mod carry_out;
#[cfg(test)]
mod compact_tests;
mod compare;
mod cut;
mod filling;
mod given_up;
pub(crate) mod health;
mod history;
mod identity;
mod known_synced;
mod landmarks;
mod log;
#[cfg(test)]
mod log_fixture;
mod mapping;
pub(crate) mod mend;
mod reader;
pub(crate) mod recovery;
mod removed;
pub mod scan;
pub mod segment;
mod spares;
mod sync_group;
mod sync_line;
mod syncer;
#[cfg(test)]
mod tests;
pub(crate) mod walk;
mod walk_ahead;
mod writer;

pub use batch::{Batch, BatchError, BatchHeader, BatchIter, Expected, Record, RecordIter};
pub(crate) use cut::cut;
pub use health::{Finding, ScrubStatus};
pub(crate) use history::{ChainCursor, Compared};
pub use identity::LogIdentity;
pub use known_synced::{KnownSynced, WrittenHere};
pub use log::Log;
pub use mapping::{LogRange, Segment};
pub use reader::{LogPosition, LogReader, LogWaited};
pub use recovery::TornTail;
pub use segment::SegmentHeader;
pub(crate) use writer::unix_ms;
pub use writer::{LogEnd, LogWriter};

use crate::directory_lock::lock_directory;
use crate::error::{Error, Result};
use crate::limits::SEGMENT_HEADER_LEN;
use crate::types::{Epoch, HybridTimestamp, Lsn};
use crate::watermark::WaitStrategy;
pub(crate) use mapping::Mapping;
use spares::Spares;

/// When a log is synced, beside when somebody waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncPolicy {
    /// Every append returns only once its batch is on stable storage; what a follower takes in, within a second.
    EveryBatch,
    /// When somebody waits, for everything written by then; what nobody waits for, within a second.
    Group,
    /// What nobody waits for, within this time.
    Interval(Duration),
    /// Only when somebody waits.
    Never,
}

impl SyncPolicy {
    /// How long written records may stay unsynced when nobody waits for them; `None` for as long as nobody asks.
    fn background_delay(self) -> Option<Duration> {
        match self {
            SyncPolicy::EveryBatch | SyncPolicy::Group => Some(Duration::from_secs(1)),
            SyncPolicy::Interval(delay) => Some(delay),
            SyncPolicy::Never => None,
        }
    }
}

/// Settings of one log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalOptions {
    /// When it is synced. Default: [`SyncPolicy::Group`].
    pub sync: SyncPolicy,
    /// Segments prepared ahead of need. Default: 2, at least 1.
    pub spare_segments: usize,
    /// How many bytes ahead of the writer the preparing thread takes page faults; 0 for none. Not where long batches go
    /// in through the file: those of a writer that is ahead of that thread, or that waits for them. Default: 4 MiB.
    pub populate_ahead: u64,
    /// How threads wait that somebody waits for in turn: callers for a sync or a commit, [readers](LogReader::wait) and
    /// shippers. Threads in the background park. Where so many wait for a sync that parking and waking them would keep
    /// all processors busy for as long as it takes, they yield to each other and to others first, whatever is said
    /// here: for somewhat more processor time, all of them go on at once. Default: [`WaitStrategy::Park`].
    pub wait: WaitStrategy,
    /// What is known to be on stable storage: damage to that is corruption, never a torn tail. Default: nothing from
    /// elsewhere, and every batch was written here; who opens a follower's log must say otherwise.
    pub known_synced: KnownSynced,
}

impl Default for WalOptions {
    fn default() -> Self {
        WalOptions {
            sync: SyncPolicy::Group,
            spare_segments: 2,
            populate_ahead: 4 << 20,
            wait: WaitStrategy::default(),
            known_synced: KnownSynced::default(),
        }
    }
}

/// An open log. Closing it, or dropping it, ends its threads; readers and the writer then get
/// [`Error::ShutDown`]. The threads run where and as urgently as those that append do: see the [module](self).
#[derive(Debug)]
pub struct Wal {
    log: Arc<Log>,
    /// Held by the writer too: nobody else opens the directory while either could write to it.
    _lock: Arc<File>,
}

impl Wal {
    /// Opens the log in `directory`, which must exist, and makes an empty one if there is none. A log is open once at a
    /// time: until both the `Wal` and its writer are gone.
    ///
    /// What recovery had to cut is told by [`LogWriter::torn_tail`]. Everything recovered is synced before this
    /// returns.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if the log is open already; [`Error::Corrupt`] for damage to what was synced;
    /// [`Error::Mismatch`] if the files belong to another log, or a segment is of a later version; [`Error::Io`].
    pub fn open(directory: &Path, identity: LogIdentity, options: WalOptions) -> Result<(Wal, LogWriter)> {
        let (wal, writer) = Self::open_unprepared(directory, identity, options)?;
        wal.log.spares().begin()?;
        Ok((wal, writer))
    }

    /// [`open`](Self::open), but no spares are prepared before the writer takes one: for a follower whose log may be
    /// replaced, or filled in bulk, as soon as it has found its leader.
    pub(crate) fn open_unprepared(
        directory: &Path,
        identity: LogIdentity,
        options: WalOptions,
    ) -> Result<(Wal, LogWriter)> {
        check_size(&identity)?;
        let lock = Arc::new(lock_directory(directory)?);
        let recovered = recovery::recover(directory, &identity, options.known_synced)?;
        if let Some(torn) = &recovered.torn {
            ::log::warn!(
                "shard {}: cut {} bytes behind LSN {} at {} offset {}: {}",
                identity.shard,
                torn.bytes,
                torn.after,
                torn.path.display(),
                torn.offset,
                torn.reason
            );
        }
        let spares = Spares::new(directory, &identity, &options, recovered.leftovers);
        let mut segments = Vec::with_capacity(recovered.segments.len());
        let mut open = None;
        let mut last = None;
        for found in recovered.segments {
            let file = File::options().read(true).write(true).open(&found.path);
            let file = file.map_err(Error::io("open", &found.path))?;
            let mapping = Mapping::new(&file, identity.segment_size).map_err(Error::io("map", &found.path))?;
            let unsynced = found.unsynced(recovered.synced);
            segment::rewrite_in_pages(&file, unsynced).map_err(Error::io("write", &found.path))?;
            if !found.sealed {
                // A power cut may have left holes where nothing had been written yet, and a store to a hole needs room:
                // here that is a plain error.
                let rest = found.published..identity.segment_size;
                // Touching the pages does it too, without a call for each, and they are ready for stores after it.
                if !mapping.populate(rest.clone()) {
                    segment::zero_in_pages(&file, rest).map_err(Error::io("fill", &found.path))?;
                }
            }
            let sealed = found.sealed.then_some(found.last_lsn);
            let (segment, writer) = Segment::new(found.header, found.path, file, mapping, found.published, sealed);
            last = Some((found.header.id.first_lsn, found.published, sealed.is_some()));
            open = sealed.is_none().then_some(writer);
            segments.push(segment);
        }
        let (segment, offset) = match last {
            Some((first_lsn, published, false)) => (first_lsn, published),
            _ => (recovered.head.next(), 0),
        };
        let end = LogEnd { head: recovered.head, chain: recovered.chain, epoch: recovered.epoch, segment, offset };
        let log = Arc::new(Log::new(directory, identity, options, segments, recovered.head, spares)?);
        log.sync_all()?;
        given_up::remove_set_aside(directory)?;
        let wal = Self::start(&log, &lock);
        let writer = LogWriter::new(log, lock, open, end, recovered.timestamp, recovered.torn);
        Ok((wal, writer))
    }

    /// Replaces whatever log there is in `directory` by an empty one whose next record is `next_lsn`, for a follower
    /// that is being rebuilt: what was in the old log is gone from here on, and a crash leaves a beginning of it.
    ///
    /// Nothing is prepared before the writer takes its first segment: much of the log may come at once, beside a base.
    ///
    /// An empty log knows no history, so the first header page that the writer takes in is believed, within limits: it
    /// must be of this log, begin with `next_lsn` and have an epoch of at most `newest_epoch`. Everything after it is
    /// checked against it. A log that begins with LSN 1 needs no such trust.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if the log is open already; [`Error::Invalid`] for a segment size or an LSN that cannot be;
    /// [`Error::Io`].
    pub fn open_at(
        directory: &Path,
        identity: LogIdentity,
        options: WalOptions,
        next_lsn: Lsn,
        newest_epoch: Epoch,
    ) -> Result<(Wal, LogWriter)> {
        check_size(&identity)?;
        if next_lsn == Lsn::ZERO {
            return Err(Error::invalid("a log begins with LSN 1 or later"));
        }
        let lock = Arc::new(lock_directory(directory)?);
        let (segments, others) = walk::list(directory)?;
        // The newest first, one after the other: what a crash leaves is a beginning of the old log, which is a log.
        for (_, path) in segments.into_iter().rev() {
            given_up::remove_durably(&path, directory)?;
        }
        let is_ours = |path: &Path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            given_up::is_set_aside(path) || carry_out::is_spare_name(name) || carry_out::is_staged_name(name)
        };
        for path in others.into_iter().filter(|path| is_ours(path)) {
            std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        segment::sync_directory(directory).map_err(Error::io("sync directory", directory))?;
        let spares = Spares::new(directory, &identity, &options, Vec::new());
        let head = next_lsn.previous();
        let log = Arc::new(Log::new(directory, identity, options, Vec::new(), head, spares)?);
        log.sync_all()?;
        let wal = Self::start(&log, &lock);
        let end = LogEnd { head, chain: identity.genesis(), epoch: Epoch::ZERO, segment: next_lsn, offset: 0 };
        let mut writer = LogWriter::new(log, lock, None, end, HybridTimestamp::default(), None);
        if next_lsn > Lsn::FIRST {
            writer.trust_first_header(newest_epoch);
        }
        Ok((wal, writer))
    }

    /// Has whatever nobody waits for synced.
    fn start(log: &Arc<Log>, lock: &Arc<File>) -> Wal {
        let wal = Wal { log: Arc::clone(log), _lock: Arc::clone(lock) };
        syncer::start_when_due(log);
        wal
    }

    /// The shared side of it.
    #[must_use]
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// Syncs everything written, then ends the threads.
    ///
    /// # Errors
    ///
    /// [`Error::Poisoned`] if something written is not on stable storage.
    pub fn close(mut self) -> Result<()> {
        let result = self.log.sync_all();
        if result.is_ok() {
            self.log.finish_release();
        }
        self.stop();
        result
    }

    fn stop(&mut self) {
        self.log.end();
        self.log.spares().wait_ended();
        self.log.syncer().wait_ended();
    }
}

impl Drop for Wal {
    fn drop(&mut self) {
        self.stop();
    }
}

fn check_size(identity: &LogIdentity) -> Result<()> {
    if segment::is_valid_size(identity.segment_size) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "segments of {} bytes: a segment has whole pages of 4096 bytes, at least {} and at most {} bytes",
        identity.segment_size,
        crate::limits::MIN_SEGMENT_SIZE,
        crate::limits::MAX_SEGMENT_SIZE
    )))
}

/// Stack of the crate's threads: they call no user code but a target's and keep buffers on the heap.
pub(crate) const THREAD_STACK: usize = 256 * 1024;

const _: () = assert!(SEGMENT_HEADER_LEN == segment::HEADER_PAGE as u64);
