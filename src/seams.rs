//! Ways into what is private, for the fuzzing and the simulation of this repository. Not part of the interface:
//! anything here may change or go at any time.
//!
//! Each function is what the crate itself calls, with other bytes under it. Everything else that the simulation runs is
//! public: the [engine](crate::protocol), [rebuild sessions](crate::rebuild), [batches](crate::wal::batch),
//! [segments](crate::wal::segment) and the [wire](crate::wire).

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::commit::{AckLevel, Acknowledged, FollowerMarks};
use crate::error::Result;
use crate::parting::{self, OwnHistory};
use crate::retention::{RetentionFacts, RetentionOptions};
use crate::shutdown::ShutdownSignal;
use crate::types::{Chain, Epoch, HybridTimestamp, Lsn, NodeId, WalSegmentId};
use crate::wal::{KnownSynced, Log, LogIdentity, SegmentHeader, TornTail, recovery, walk};
use crate::wire::{CommonPoint, EpochHistory, PROTOCOL_VERSIONS, SyncRequest};

/// One segment of a log that may be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenedSegment {
    /// Its header.
    pub header: SegmentHeader,
    /// The end of its last valid batch, in bytes from the beginning of the file.
    pub published: u64,
    /// Whether it is sealed.
    pub sealed: bool,
}

/// A log that may be opened, and what is to be done to its files first, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenVerdict {
    /// Files to be renamed or removed, one after the other; then the directory is synced.
    pub dropped: Vec<PathBuf>,
    /// Ranges to be filled with zeros; then each file is synced.
    pub zeroed: Vec<(PathBuf, Range<u64>)>,
    /// Oldest first.
    pub segments: Vec<OpenedSegment>,
    /// The newest LSN.
    pub head: Lsn,
    /// The chain at the head.
    pub chain: Chain,
    /// Of the last segment.
    pub epoch: Epoch,
    /// The newest.
    pub timestamp: HybridTimestamp,
    /// The highest LSN known to have been synced.
    pub synced: Lsn,
    /// What was cut.
    pub torn: Option<TornTail>,
}

/// What recovery decides about a log whose segment files, oldest first, hold these bytes.
///
/// # Errors
///
/// Where the log must not be opened.
pub fn survey_log(
    identity: &LogIdentity,
    known: KnownSynced,
    files: Vec<(WalSegmentId, Vec<u8>)>,
) -> Result<OpenVerdict> {
    let segments = files.into_iter().map(|(id, bytes)| {
        let path = PathBuf::from(id.to_string());
        Ok((id, walk::SegmentFile::over(&path, bytes.len() as u64, Box::new(bytes))))
    });
    let verdict = recovery::survey(Path::new("."), identity, known, segments)?;
    let recovered = verdict.recovered;
    let opened = |segment: recovery::RecoveredSegment| OpenedSegment {
        header: segment.header,
        published: segment.published,
        sealed: segment.sealed,
    };
    Ok(OpenVerdict {
        dropped: verdict.dropped.into_iter().map(|(path, _)| path).collect(),
        zeroed: verdict.zeroed,
        segments: recovered.segments.into_iter().map(opened).collect(),
        head: recovered.head,
        chain: recovered.chain,
        epoch: recovered.epoch,
        timestamp: recovered.timestamp,
        synced: recovered.synced,
        torn: recovered.torn,
    })
}

pub use crate::parting::{History, Parting, Told};

/// Whether what a follower has is a beginning of a leader's log, or can no longer be compared with it.
#[must_use]
pub fn is_beginning_of(log: &impl History, request: &SyncRequest) -> bool {
    parting::is_beginning_of(log, request)
}

/// What a leader tells a follower whose log is no beginning of its own.
///
/// # Errors
///
/// If the log cannot be read.
pub fn ask_where_logs_part(log: &impl History) -> Result<EpochHistory> {
    parting::question(log, PROTOCOL_VERSIONS.max)
}

/// What the follower answers, whose target may hold something up to `touched`, and what it keeps in mind.
///
/// # Errors
///
/// If the log cannot be read.
pub fn tell_where_logs_part(log: &impl History, touched: Lsn, history: &EpochHistory) -> Result<(CommonPoint, Told)> {
    OwnHistory { log, touched }.answer(history)
}

/// What the leader makes of the answer.
#[must_use]
pub fn check_where_logs_part(log: &impl History, request: &SyncRequest, answer: &CommonPoint) -> Parting {
    parting::check_answer(log, request, answer)
}

/// What retention looks at.
#[derive(Clone, Copy, Debug)]
pub struct KeptLog<'a> {
    /// The last LSN of each sealed segment, oldest first.
    pub sealed: &'a [Lsn],
    /// Up to here nobody needs anything.
    pub unneeded: Lsn,
    /// Up to here the log is on stable storage.
    pub synced: Lsn,
    /// Up to here the node's own target has applied it durably.
    pub applied: Option<Lsn>,
    /// Bytes of all segments.
    pub retained_bytes: u64,
    /// Bytes of one.
    pub segment_size: u64,
    /// The bound on all.
    pub max_wal_bytes: Option<u64>,
    /// Bytes kept although nobody needs them.
    pub min_wal_bytes: u64,
}

/// Up to which LSN retention gives a log up, if it gives up anything.
#[must_use]
pub fn give_up_through(log: &KeptLog<'_>) -> Option<Lsn> {
    let &KeptLog { sealed, unneeded, synced, applied, retained_bytes, segment_size, max_wal_bytes, min_wal_bytes } =
        log;
    let options = RetentionOptions { max_wal_bytes, min_wal_bytes };
    let file_bytes = retained_bytes;
    let facts = RetentionFacts { sealed, unneeded, synced, applied, retained_bytes, file_bytes, segment_size };
    options.plan(&facts).through
}

/// What the followers of one shard have acknowledged, and up to where enough of them have.
#[derive(Default)]
pub struct CommitRule(Acknowledged);

impl CommitRule {
    /// A stream to a follower begins. Of the numbers of streams to one follower, newer ones are higher.
    ///
    /// # Errors
    ///
    /// If there are too many followers; the others as well.
    pub fn stream_begins(&self, node: NodeId, stream: u64, is_rebuild: bool, marks: [Lsn; 3]) -> Result<()> {
        let follower = self.follower(node)?;
        self.0.stream_begins(&follower, stream, is_rebuild, marks, 0);
        Ok(())
    }

    /// A follower acknowledges received, durable and applied, on a stream.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn acknowledge(&self, node: NodeId, stream: u64, marks: [Lsn; 3]) -> Result<()> {
        let follower = self.follower(node)?;
        self.0.acknowledge(&follower, stream, marks, 0);
        Ok(())
    }

    /// A follower has completed its rebuild, and its log was found to be the leader's up to `agreed`.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn rebuilt(&self, node: NodeId, stream: u64, agreed: Lsn) -> Result<()> {
        let follower = self.follower(node)?;
        self.0.rebuilt(&follower, stream, agreed, 0);
        Ok(())
    }

    fn follower(&self, node: NodeId) -> Result<Arc<FollowerMarks>> {
        self.0.follower(node, &ShutdownSignal::new())
    }

    /// Up to where so many followers have acknowledged at this level.
    #[must_use]
    pub fn reached(&self, level: AckLevel, count: usize) -> Lsn {
        self.0.reached(level, count).load()
    }
}

/// Gives up segments whose records are all at or below `lsn`, synced or not, as a log that has outgrown its bound does.
///
/// # Errors
///
/// If a file cannot be removed.
pub fn give_up_unsynced(log: &Log, lsn: Lsn) -> Result<usize> {
    log.drop_through(lsn, "the log has outgrown its bound")
}

/// Reads the content of a node's list of followers, and gives it as it would be written again.
///
/// # Errors
///
/// As when a node opens it.
pub fn decode_registry(bytes: &[u8], shards: u16) -> Result<Vec<u8>> {
    crate::registry::decode_and_encode(bytes, Path::new("followers"), shards)
}

/// Reads the header page of a fixed store's shard, and gives the valid copy as it would be written again.
///
/// # Errors
///
/// What is wrong with it, as half a sentence.
pub fn decode_store_header(page: &[u8]) -> Result<Vec<u8>, String> {
    crate::target::fixed_store::decode_header(page)
}

/// Reads a slot of a fixed store for keys and values of up to these lengths, and gives it as it would be written again.
///
/// # Errors
///
/// What is wrong with it, as half a sentence.
pub fn decode_store_slot((key_len, value_len): (u32, u32), slot: u64, bytes: &[u8]) -> Result<Vec<u8>, String> {
    crate::target::fixed_store::decode_slot((key_len, value_len), slot, bytes)
}

/// Reads a record of a fixed store for keys and values of up to these lengths, and gives it as it would be written
/// again.
///
/// # Errors
///
/// What is wrong with it, as half a sentence.
pub fn decode_store_record((key_len, value_len): (u32, u32), bytes: &[u8]) -> Result<Vec<u8>, String> {
    crate::target::fixed_store::decode_record((key_len, value_len), bytes)
}
