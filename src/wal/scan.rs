//! Looking at logs without touching them: what tools that inspect, verify and compare are made of, and what a node
//! uses to read its own disk again.
//!
//! Only reads, never mappings or writes, so all of it is safe beside a process that writes the log. What that process
//! appends in the meantime may look like a torn tail; whoever knows how far the log is published says so to
//! [`scan_published`].

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::limits::{BATCH_ALIGNMENT, BATCH_HEADER_LEN, SEGMENT_HEADER_LEN};
use crate::types::{Chain, Epoch, HybridTimestamp, Lsn, WalSegmentId};
use crate::wal::batch::{Batch, BatchError, BatchHeader, Expected};
use crate::wal::given_up;
use crate::wal::health::Finding;
use crate::wal::identity::LogIdentity;
use crate::wal::known_synced::KnownSynced;
use crate::wal::mapping::Segment;
use crate::wal::segment::SegmentHeader;
use crate::wal::walk::{self, Plausible, SegmentFile, Walked};

pub use crate::wal::compare::{Comparison, Difference, LogExtent, Relation, Side, compare_logs};

/// Receives what a scan comes across. `()` ignores everything.
pub trait Visit {
    /// A valid batch, at `offset` of the segment file `path`. Batches come in the order of the log.
    fn batch(&mut self, path: &Path, offset: u64, batch: Batch<'_>) {
        let _ = (path, offset, batch);
    }

    /// `done` of `total` bytes have been read. Called at least once a segment.
    fn progress(&mut self, done_bytes: u64, total_bytes: u64) {
        let _ = (done_bytes, total_bytes);
    }
}

impl Visit for () {}

/// What one segment file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentReport {
    /// The file.
    pub path: PathBuf,
    /// What its header page says, or what is wrong with that.
    pub header: Result<SegmentHeader, String>,
    /// Bytes of the file.
    pub file_len: u64,
    /// Valid batches.
    pub batches: u64,
    /// Records in them.
    pub records: u64,
    /// The end of the last valid batch before anything that is not valid, in bytes from the beginning of the file.
    pub end: u64,
    /// The LSN of the last record up to there; one before the first LSN of the segment where there is none.
    pub last_lsn: Lsn,
    /// The chain there.
    pub chain: Chain,
    /// The newest timestamp of a valid batch.
    pub timestamp: HybridTimestamp,
    /// The highest LSN that a valid batch says was synced, by whoever wrote it.
    pub synced: Lsn,
    /// Whether the last valid batch is a sealing one.
    pub sealed: bool,
    /// Why the batch at `end` is not valid; `None` if nothing has been written there, or nothing should be.
    pub stopped: Option<String>,
    /// Bytes from `end` to the last byte that is not zero.
    pub trailing_bytes: u64,
}

/// The segments in a shard's directory, by first LSN. Files with other names are left out.
///
/// # Errors
///
/// [`Error::Io`] if the directory cannot be read.
pub fn list_segments(directory: &Path) -> Result<Vec<(WalSegmentId, PathBuf)>> {
    Ok(walk::list(directory)?.0)
}

/// Reads a segment file from its beginning and verifies every batch, up to the first that is not valid.
///
/// # Errors
///
/// [`Error::Io`]; [`Error::Mismatch`] for a segment of a later version. Damage is not an error here; it stands in the
/// report.
///
/// ```
/// use towline::wal::scan;
/// # use towline::wal::{batch, Expected, SegmentHeader};
/// # use towline::{Chain, ClusterId, Epoch, HybridTimestamp, Lsn, RegionId, ShardId, WalSegmentId};
/// # let id = WalSegmentId { region: RegionId(0), shard: ShardId(0), first_lsn: Lsn(1) };
/// # let (cluster, epoch, chain_before) = (ClusterId(7), Epoch(1), Chain(5));
/// # let header = SegmentHeader { id, cluster, epoch, chain_before, segment_size: 65536, version: 3 };
/// # let at = Expected { first_lsn: Lsn(1), chain: Chain(5), epoch: Epoch(1) };
/// # let mut bytes = header.encode().to_vec();
/// # bytes.extend(batch::build(at, HybridTimestamp::default(), Lsn::ZERO, &[b"one", b"two"]));
/// # bytes.resize(65536, 0);
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join(id.to_string());
/// # std::fs::write(&path, bytes)?;
/// struct Print;
/// impl scan::Visit for Print {
///     fn batch(&mut self, _: &std::path::Path, offset: u64, batch: towline::wal::Batch<'_>) {
///         for record in batch.records() {
///             println!("{offset}: LSN {}, {} bytes", record.lsn, record.bytes.len());
///         }
///     }
/// }
/// let report = scan::scan_segment(&path, &mut Print)?;
/// assert_eq!((report.records, report.last_lsn, report.stopped), (2, Lsn(2), None));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn scan_segment(path: &Path, visit: &mut dyn Visit) -> Result<SegmentReport> {
    let mut file = SegmentFile::open(path)?;
    let report = scan_file(&mut file, u64::MAX, visit)?;
    visit.progress(file.len, file.len);
    Ok(report)
}

/// As [`scan_segment`], for a segment that is being written: reads no further than `published` bytes, which must be the
/// end of a batch, and takes whatever is behind for nothing. A report whose `end` is below `published` means damage.
///
/// # Errors
///
/// As [`scan_segment`].
pub fn scan_published(path: &Path, published: u64, visit: &mut dyn Visit) -> Result<SegmentReport> {
    let report = scan_file(&mut SegmentFile::open(path)?, published, visit)?;
    visit.progress(published, published);
    Ok(report)
}

fn scan_file(file: &mut SegmentFile, limit: u64, visit: &mut dyn Visit) -> Result<SegmentReport> {
    scan_behind(file.header()?, file, limit, visit)
}

/// What stands behind a header page, which says this.
fn scan_behind(
    header: Result<SegmentHeader, String>,
    file: &mut SegmentFile,
    limit: u64,
    visit: &mut dyn Visit,
) -> Result<SegmentReport> {
    let (path, file_len) = (file.path.clone(), file.len);
    let first_lsn = header.as_ref().map_or(Lsn::ZERO, |header| header.id.first_lsn);
    let mut report = SegmentReport {
        path: path.clone(),
        file_len,
        batches: 0,
        records: 0,
        end: SEGMENT_HEADER_LEN,
        last_lsn: first_lsn.previous(),
        chain: header.as_ref().map_or(Chain::default(), |header| header.chain_before),
        timestamp: HybridTimestamp::default(),
        synced: Lsn::ZERO,
        sealed: false,
        stopped: None,
        trailing_bytes: 0,
        header,
    };
    if let Ok(header) = &report.header {
        let (size, first) = (header.segment_size, first_of(header));
        let of = Some(header);
        let range = (SEGMENT_HEADER_LEN, limit.min(size), size);
        let walked = walk::walk(file, of, range, first, |offset, batch| visit.batch(&path, offset, batch))?;
        report.count(&walked);
        (report.end, report.sealed) = (walked.end, walked.sealed);
        (report.last_lsn, report.chain) = (walked.last_lsn(), walked.next.chain);
        report.stopped = walked.stopped.filter(|error| *error != BatchError::Blank).map(|error| error.to_string());
    }
    if limit >= file_len {
        report.trailing_bytes = file.extent(report.end)? - report.end;
        if report.trailing_bytes == 0 && report.end + crate::limits::BATCH_HEADER_LEN > file_len {
            // Too little room for another batch, and nothing in it.
            report.stopped = report.stopped.filter(|_| report.header.as_ref().is_ok_and(|h| h.segment_size > file_len));
        }
    }
    Ok(report)
}

/// Whether to go on with something that takes a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Continue {
    Yes,
    No,
}

/// Bytes scrubbed between two looks at whether to go on.
const SCRUB_STEP: u64 = 256 * 1024;

/// Reads a sealed segment of an open log again, and `before`, its predecessor in the log, only for what it should
/// continue. `read` is told of each further piece that was read. `None` if that said to stop.
///
/// The bytes are read from the file, whose synced pages the system may have in memory or not. What of them cannot be
/// read is damage too, and so is what follows it in the segment: how far that is sound is not known.
pub(crate) fn scrub_segment(
    segment: &Segment,
    before: Option<&Segment>,
    read: &mut dyn FnMut(u64) -> Continue,
) -> Result<Option<Vec<Finding>>> {
    let mut file = SegmentFile::open(segment.path())?;
    let (header, published) = (segment.header(), segment.published());
    let mut findings = Vec::new();
    let mut note = |offset: u64, end: u64, lsn: Lsn, reason: String| {
        let (path, segment) = (segment.path().to_owned(), segment.id().first_lsn);
        findings.push(Finding { path, segment, offset, end, lsn, reason });
    };
    // One of a later version is not the one either.
    let found = file.header().or_else(|error| match error {
        Error::Mismatch { reason, .. } => Ok(Err(reason.into_owned())),
        other => unreadable(other).map(Err),
    })?;
    let wrong_header = match found {
        Ok(found) if found != *header => Some("its header is not the one that it was opened with".to_owned()),
        Ok(_) => before.and_then(|before| does_not_continue(header, before)),
        Err(reason) => Some(reason),
    };
    if let Some(reason) = wrong_header {
        note(0, SEGMENT_HEADER_LEN, header.id.first_lsn, reason);
    }
    let (mut at, mut due) = (SEGMENT_HEADER_LEN, first_of(header));
    loop {
        let limit = published.min(at + SCRUB_STEP);
        let walked = walk::walk(&mut file, Some(header), (at, limit, header.segment_size), due, |_, _| {});
        let walked = match walked {
            Ok(walked) => walked,
            Err(error) => {
                note(at, published, due.first_lsn, unreadable(error)?);
                break;
            }
        };
        if read(walked.end - at) == Continue::No {
            return Ok(None);
        }
        (at, due) = (walked.end, walked.next);
        if walked.sealed || at >= published {
            break;
        }
        let Some(stopped) = walked.stopped else { continue };
        let plausible =
            Plausible { lowest: due.first_lsn, highest: due.first_lsn, base: at, epoch: due.epoch.0..=due.epoch.0 };
        // Whatever stands here is not valid, even if it has its checksum.
        let next = walk::next_consistent(&mut file, at + BATCH_ALIGNMENT, published, &plausible);
        let next = next.or_else(|error| unreadable(error).map(|_| None))?;
        let end = next.map_or(published, |(offset, _)| offset);
        note(at, end, due.first_lsn, stopped.to_string());
        let Some((offset, next)) = next else { break };
        (at, due) = (offset, Expected { first_lsn: next.first_lsn, chain: next.prev_crc, epoch: next.epoch });
    }
    Ok(Some(findings))
}

/// Why bytes of a file that is open could not be read.
///
/// # Errors
///
/// Any other error, which says nothing of the bytes.
fn unreadable(error: Error) -> Result<String> {
    match error {
        Error::Io { action: "read", source, .. } => Ok(format!("it cannot be read: {source}")),
        other => Err(other),
    }
}

/// Why a segment does not continue the one before, if that is so.
fn does_not_continue(header: &SegmentHeader, before: &Segment) -> Option<String> {
    let sealing = before.published().checked_sub(BATCH_HEADER_LEN)?..before.published();
    let sealing = BatchHeader::decode(before.bytes(sealing).ok()?.first_chunk()?);
    (sealing.is_sealing() && sealing.crc != header.chain_before).then(|| {
        format!(
            "it continues chain {:08x}, but the segment before it ends with chain {:08x}",
            header.chain_before.0, sealing.crc.0
        )
    })
}

/// What the first batch of a segment continues.
fn first_of(header: &SegmentHeader) -> Expected {
    Expected { first_lsn: header.id.first_lsn, chain: header.chain_before, epoch: header.epoch }
}

impl SegmentReport {
    fn count(&mut self, walked: &Walked) {
        self.batches += walked.batches;
        self.records += walked.records;
        self.timestamp = self.timestamp.max(walked.timestamp);
        self.synced = self.synced.max(walked.synced);
    }
}

/// What kind of thing is wrong with a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProblemKind {
    /// Not known to have been synced: recovery will cut it, and nothing that was promised is lost.
    TornTail,
    /// Damage to what was synced. Recovery refuses; a peer can repair it.
    Corrupt,
    /// Synced records whose segment is not there. Recovery refuses; a peer can repair it.
    Missing,
    /// Bytes where there should be zeros, which belong to no record. Harmless, but the file is no longer its peers'.
    Stray,
    /// A segment of another log.
    Mismatch,
}

/// One thing that is wrong with a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file.
    pub path: PathBuf,
    /// Where in it, in bytes.
    pub offset: u64,
    /// The first LSN that it concerns, where it concerns any.
    pub lsn: Option<Lsn>,
    /// What is wrong.
    pub reason: String,
    /// How bad that is.
    pub kind: ProblemKind,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ProblemKind::TornTail => "torn tail",
            ProblemKind::Corrupt => "corrupt",
            ProblemKind::Missing => "missing",
            ProblemKind::Stray => "stray bytes",
            ProblemKind::Mismatch => "of another log",
        };
        write!(f, "{kind}: {} at offset {}", self.path.display(), self.offset)?;
        if let Some(lsn) = self.lsn {
            write!(f, " (LSN {lsn})")?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// What a shard's directory holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogReport {
    /// The first LSN that the log holds or will hold; [`Lsn::ZERO`] where there is no segment.
    pub tail: Lsn,
    /// The last LSN before anything is missing.
    pub head: Lsn,
    /// The chain there.
    pub chain: Chain,
    /// The epoch there.
    pub epoch: Epoch,
    /// The last LSN that could be read at all: the head, unless something is missing before it.
    pub last_readable: Lsn,
    /// The highest LSN known to have been synced here.
    pub synced: Lsn,
    /// The newest timestamp.
    pub timestamp: HybridTimestamp,
    /// Batches that could be read, behind damage too.
    pub batches: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Every segment, oldest first.
    pub segments: Vec<SegmentReport>,
    /// Everything that is wrong, in the order of the log.
    pub problems: Vec<Problem>,
}

impl LogReport {
    /// Whether recovery would open the log without losing anything that was synced.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.problems.iter().all(|problem| matches!(problem.kind, ProblemKind::TornTail | ProblemKind::Stray))
    }
}

/// Verifies a shard's whole log: every batch, and that each segment continues the one before. Behind damage it goes on
/// at the next batch that is consistent in itself, so the report says all that is wrong and all that is still readable.
/// Without `identity` the log's first readable segment says what log it is. `known` is what else is known to have been
/// synced, and whose batches tell more: what is wrong up to there is damage and no torn tail. Where recovery would
/// begin the log with a segment that was set aside when it was given up, that is its first segment here too.
///
/// # Errors
///
/// [`Error::Io`]; [`Error::Mismatch`] for a segment of a later version. Damage is not an error here; it stands in the
/// report.
pub fn verify_log(
    directory: &Path,
    identity: Option<&LogIdentity>,
    known: KnownSynced,
    visit: &mut dyn Visit,
) -> Result<LogReport> {
    let (segments, _) = given_up::list(directory, identity)?;
    let mut total = 0;
    for (_, path) in &segments {
        total += path.metadata().map_err(Error::io("look at", path))?.len();
    }
    let mut verification = Verification {
        identity: identity.copied(),
        report: LogReport { tail: segments.first().map_or(Lsn::ZERO, |(id, _)| id.first_lsn), ..LogReport::default() },
        known,
        next: None,
        is_whole: true,
        visit,
    };
    let count = segments.len();
    for (index, (id, path)) in segments.into_iter().enumerate() {
        verification.add(id, SegmentFile::open(&path)?, index + 1 == count)?;
        let done = verification.report.bytes;
        verification.visit.progress(done, total.max(done));
    }
    Ok(verification.finish(directory))
}

struct Verification<'a> {
    identity: Option<LogIdentity>,
    report: LogReport,
    /// What is known to have been synced so far.
    known: KnownSynced,
    /// What the next segment must continue; `None` before the first.
    next: Option<Expected>,
    /// Whether nothing has been missing so far.
    is_whole: bool,
    visit: &'a mut dyn Visit,
}

impl Verification<'_> {
    /// Notes damage at a place where `lsn` is due.
    fn damage(&mut self, path: &Path, offset: u64, lsn: Lsn, kind: ProblemKind, reason: String) {
        self.is_whole = false;
        self.report.problems.push(Problem { path: path.to_owned(), offset, lsn: Some(lsn), reason, kind });
    }

    fn add(&mut self, id: WalSegmentId, mut file: SegmentFile, is_last: bool) -> Result<()> {
        let header = file.header()?;
        if let Some(reason) = self.mismatch(id, header.as_ref().ok()) {
            self.report.problems.push(Problem {
                path: file.path.clone(),
                offset: 0,
                lsn: None,
                reason,
                kind: ProblemKind::Mismatch,
            });
        }
        // What stands behind another segment's header, in a file that was filled again say, is none of this log any
        // more.
        let header = header.and_then(|header| {
            if header.id == id { Ok(header) } else { Err(format!("its header calls it {}", header.id)) }
        });
        if let Ok(header) = &header {
            self.check_continuity(id, header, &file.path);
        }
        let mut segment = scan_behind(header.clone(), &mut file, u64::MAX, self.visit)?;
        let due = match &header {
            Ok(header) => {
                self.known.note(header.epoch, segment.synced);
                let next = Expected { first_lsn: segment.last_lsn.next(), chain: segment.chain, epoch: header.epoch };
                self.reach(next);
                next
            }
            Err(reason) => {
                self.damage(&file.path, 0, id.first_lsn, ProblemKind::Corrupt, reason.clone());
                let epoch = self.next.map_or(Epoch::ZERO, |next| next.epoch);
                Expected { first_lsn: id.first_lsn, chain: Chain::default(), epoch }
            }
        };
        self.check_end(&mut segment, &mut file, due, is_last)?;
        let report = &mut self.report;
        report.batches += segment.batches;
        report.records += segment.records;
        report.bytes += segment.file_len;
        report.timestamp = report.timestamp.max(segment.timestamp);
        report.segments.push(segment);
        Ok(())
    }

    /// Whether a segment is of another log, and why.
    fn mismatch(&mut self, id: WalSegmentId, header: Option<&SegmentHeader>) -> Option<String> {
        if self.identity.is_none() {
            self.identity = header.map(|header| LogIdentity {
                cluster: header.cluster,
                region: header.id.region,
                shard: header.id.shard,
                segment_size: header.segment_size,
            });
        }
        let identity = self.identity?;
        identity.check_name(id).and_then(|()| header.map_or(Ok(()), |header| identity.check(header))).err()
    }

    /// Whether a segment continues the one before.
    fn check_continuity(&mut self, id: WalSegmentId, header: &SegmentHeader, path: &Path) {
        let begins_log = self.next.is_none() && id.first_lsn > Lsn::FIRST;
        let genesis = self.identity.map_or(Chain::default(), |identity| identity.genesis());
        let next = self.next.unwrap_or(Expected { first_lsn: Lsn::FIRST, chain: genesis, epoch: Epoch::ZERO });
        if begins_log {
            // Nothing is known of what came before.
        } else if id.first_lsn > next.first_lsn {
            let reason = format!("LSN {} to {} are not there", next.first_lsn, id.first_lsn.previous());
            self.damage(path, 0, next.first_lsn, ProblemKind::Missing, reason);
        } else if id.first_lsn < next.first_lsn {
            let reason = format!("it begins with LSN {} where LSN {} is due", id.first_lsn, next.first_lsn);
            self.damage(path, 0, next.first_lsn, ProblemKind::Corrupt, reason);
        } else if header.chain_before != next.chain {
            let reason = format!(
                "it continues chain {:08x}, but the log so far has chain {:08x}",
                header.chain_before.0, next.chain.0
            );
            self.damage(path, 0, next.first_lsn, ProblemKind::Corrupt, reason);
        } else if header.epoch < next.epoch {
            let reason = format!("its epoch is {}, behind a segment of epoch {}", header.epoch, next.epoch);
            self.damage(path, 0, next.first_lsn, ProblemKind::Corrupt, reason);
        }
    }

    /// Notes a position that the log can be read to.
    fn reach(&mut self, next: Expected) {
        self.next = Some(next);
        self.report.last_readable = self.report.last_readable.max(next.first_lsn.previous());
        if self.is_whole {
            (self.report.head, self.report.chain, self.report.epoch) =
                (next.first_lsn.previous(), next.chain, next.epoch);
        }
    }

    /// Looks at what follows the last valid batch of a segment, and reads on behind damage.
    fn check_end(
        &mut self,
        segment: &mut SegmentReport,
        file: &mut SegmentFile,
        due: Expected,
        is_last: bool,
    ) -> Result<()> {
        let path = file.path.clone();
        let size = segment.header.as_ref().map_or(file.len, |header| header.segment_size);
        if file.len != size {
            let reason = format!("the file has {} bytes where {size} are due", file.len);
            // Recovery fills a short one up behind its batches, and has none of one that is too long.
            let first_lsn = segment.header.as_ref().map_or(due.first_lsn, |header| header.id.first_lsn);
            let lsn = if file.len > size { first_lsn } else { due.first_lsn };
            self.damage(&path, file.len.min(size), lsn, ProblemKind::Corrupt, reason);
        }
        if segment.sealed {
            if segment.trailing_bytes > 0 {
                let reason = format!("{} bytes behind the sealing batch are not all zeros", segment.trailing_bytes);
                let kind = ProblemKind::Stray;
                self.report.problems.push(Problem { path, offset: segment.end, lsn: None, reason, kind });
            }
            return Ok(());
        }
        if is_last && segment.trailing_bytes == 0 {
            return Ok(());
        }
        if segment.header.is_ok() {
            let reason = segment.stopped.clone().unwrap_or_else(|| {
                if segment.trailing_bytes > 0 {
                    "zeros stand where a batch is due, with other bytes behind them".to_owned()
                } else {
                    "nothing is written from here on, though another segment follows".to_owned()
                }
            });
            self.damage(&path, segment.end, due.first_lsn, ProblemKind::Corrupt, reason);
        }
        self.read_on(segment, file, due, size)
    }

    /// Behind damage: goes on at each next batch that is consistent in itself.
    fn read_on(&mut self, segment: &mut SegmentReport, file: &mut SegmentFile, due: Expected, size: u64) -> Result<()> {
        let (path, mut at, mut lowest) = (file.path.clone(), segment.end, due.first_lsn);
        loop {
            let highest_epoch = if segment.header.is_ok() { due.epoch.0 } else { u64::MAX };
            let plausible = Plausible { lowest, highest: lowest, base: at, epoch: due.epoch.0..=highest_epoch };
            let Some((found, header)) = walk::next_consistent(file, at, size, &plausible)? else {
                return Ok(());
            };
            if at > segment.end {
                let reason = format!("the next {} bytes are no batch that continues the log", found - at);
                self.damage(&path, at, lowest, ProblemKind::Corrupt, reason);
            }
            let expected = Expected { first_lsn: header.first_lsn, chain: header.prev_crc, epoch: header.epoch };
            let visit = &mut *self.visit;
            let of = segment.header.as_ref().ok().copied();
            let walked = walk::walk(file, of.as_ref(), (found, size, size), expected, |offset, batch| {
                visit.batch(&path, offset, batch)
            })?;
            segment.count(&walked);
            self.known.note(header.epoch, walked.synced);
            if walked.end == found {
                // The batch has its CRC and yet breaks a rule, as a sealing one without records does.
                at = found + header.total_len();
                continue;
            }
            self.reach(walked.next);
            (at, lowest) = (walked.end, walked.next.first_lsn);
            if walked.sealed {
                return Ok(());
            }
        }
    }

    /// Now that it is known what was synced, tells torn tails from damage.
    fn finish(mut self, directory: &Path) -> LogReport {
        let synced = self.known.lsn;
        self.report.synced = synced;
        if self.report.problems.is_empty() && self.report.head < synced {
            let last = self.report.segments.last();
            self.report.problems.push(Problem {
                path: last.map_or_else(|| directory.to_owned(), |segment| segment.path.clone()),
                offset: last.map_or(0, |segment| segment.end),
                lsn: Some(self.report.head.next()),
                reason: format!("records up to LSN {synced} were synced, and the log ends before them"),
                kind: ProblemKind::Missing,
            });
        }
        let begins_unknown = self.report.tail > Lsn::FIRST
            && self.report.segments.first().is_some_and(|segment| segment.header.is_err());
        for problem in &mut self.report.problems {
            let was_synced = begins_unknown || problem.lsn.is_some_and(|lsn| lsn <= synced);
            if !was_synced && matches!(problem.kind, ProblemKind::Corrupt | ProblemKind::Missing) {
                problem.kind = ProblemKind::TornTail;
            }
        }
        self.report
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::limits;
    use crate::types::ClusterId;
    use crate::wal::known_synced::WrittenHere;
    use crate::wal::log_fixture::{IDENTITY, LogFixture, SIZE, flip, image, write};
    use crate::wal::recovery::recover;

    #[derive(Default)]
    struct Collect {
        lsns: Vec<u64>,
        bytes: u64,
        done: Vec<(u64, u64)>,
    }

    impl Visit for Collect {
        fn batch(&mut self, _: &Path, _: u64, batch: Batch<'_>) {
            self.lsns.extend(batch.records().map(|record| record.lsn.0));
            self.bytes += batch.records().map(|record| record.bytes.len() as u64).sum::<u64>();
        }

        fn progress(&mut self, done: u64, total: u64) {
            self.done.push((done, total));
        }
    }

    fn verify(log: &LogFixture) -> (LogReport, Collect) {
        let mut seen = Collect::default();
        let before = image(log.path());
        let report = verify_log(log.path(), Some(&IDENTITY), KnownSynced::default(), &mut seen).unwrap();
        assert_eq!(before, image(log.path()), "nothing is touched");
        (report, seen)
    }

    fn kinds(report: &LogReport) -> Vec<(ProblemKind, Option<u64>)> {
        report.problems.iter().map(|problem| (problem.kind, problem.lsn.map(Lsn::get))).collect()
    }

    #[test]
    fn a_sound_log_is_reported_as_it_is() {
        let log = LogFixture::synced_all_along();
        let (report, seen) = verify(&log);
        assert_eq!(report.problems, []);
        assert!(report.is_sound());
        assert_eq!((report.tail, report.head, report.last_readable), (Lsn(1), Lsn(36), Lsn(36)));
        assert_eq!((report.chain, report.epoch, report.synced), (log.next.chain, Epoch(4), Lsn(33)));
        assert_eq!((report.batches, report.records, report.bytes), (14, 36, 3 * SIZE));
        assert_eq!(seen.lsns, (1..=36).collect::<Vec<_>>());
        assert_eq!(seen.bytes, 12 * 133);
        assert_eq!(seen.done, [(SIZE, 3 * SIZE), (2 * SIZE, 3 * SIZE), (3 * SIZE, 3 * SIZE)]);
        assert_eq!(report, verify_log(log.path(), None, KnownSynced::default(), &mut ()).unwrap());
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(verify_log(empty.path(), None, KnownSynced::default(), &mut ()).unwrap(), LogReport::default());
    }

    #[test]
    fn what_a_used_file_brings_back_after_a_power_cut_is_a_torn_tail_and_recovery_cuts_it() {
        let first = LogFixture::synced_all_along().places[0].path.clone();
        for zeroed in [0..0, 4096 + 200..8192, 4096..4096 + 64, 8192..SIZE] {
            let mut log = LogFixture::synced_all_along();
            log.roll(Epoch(4));
            let mut old = fs::read(log.path().join(first.file_name().unwrap())).unwrap();
            old[limits::index(zeroed.start)..limits::index(zeroed.end)].fill(0);
            fs::write(log.segment_path(), &old).unwrap();
            let (report, seen) = verify(&log);
            assert!(report.is_sound() && !report.problems.is_empty(), "{zeroed:?}: {:?}", report.problems);
            assert_eq!(seen.lsns, (1..=36).collect::<Vec<_>>(), "{zeroed:?}");
            // The same behind a header of its own.
            let mut log = LogFixture::synced_all_along();
            log.roll(Epoch(4));
            write(&log.segment_path(), &old[4096..], 4096);
            let (report, seen) = verify(&log);
            assert!(report.is_sound(), "{zeroed:?}: {:?}", report.problems);
            assert_eq!(seen.lsns, (1..=36).collect::<Vec<_>>(), "{zeroed:?}");
            let recovered = recover(log.path(), &IDENTITY, KnownSynced::default()).unwrap();
            assert_eq!((recovered.head, recovered.torn.is_some()), (Lsn(36), true), "{zeroed:?}");
        }
    }

    #[test]
    fn one_segment_is_reported_up_to_what_is_published() {
        let log = LogFixture::synced_all_along();
        let report = scan_segment(&log.segment_path(), &mut ()).unwrap();
        assert_eq!((report.end, report.last_lsn, report.sealed), (log.end(), Lsn(36), false));
        assert_eq!((report.stopped, report.trailing_bytes), (None, 0));
        // Another process is in the middle of writing the next batch.
        write(&log.segment_path(), &[0xee; 40], log.end());
        let report = scan_segment(&log.segment_path(), &mut ()).unwrap();
        assert!(report.stopped.is_some() && report.trailing_bytes == 40);
        let report = scan_published(&log.segment_path(), log.end(), &mut ()).unwrap();
        assert_eq!((report.end, report.stopped, report.trailing_bytes), (log.end(), None, 0));
        flip(&log.segment_path(), log.end() - 20, 3);
        let report = scan_published(&log.segment_path(), log.end(), &mut ()).unwrap();
        assert!(report.end < log.end() && report.stopped.is_some());
    }

    #[test]
    fn behind_damage_it_reads_on() {
        let log = LogFixture::synced_all_along();
        // LSN 4 to 6 in the first segment and LSN 16 to 18 in the second.
        for place in [&log.places[1], &log.places[6]] {
            flip(&place.path, place.offset + 70, 1);
        }
        let (report, seen) = verify(&log);
        assert_eq!(kinds(&report), [(ProblemKind::Corrupt, Some(4)), (ProblemKind::Corrupt, Some(16))]);
        assert_eq!((report.head, report.chain, report.last_readable), (Lsn(3), log.places[0].chain, Lsn(36)));
        let readable: Vec<u64> = (1..=36).filter(|lsn| !(4..=6).contains(lsn) && !(16..=18).contains(lsn)).collect();
        assert_eq!(seen.lsns, readable);
        assert!(!report.is_sound());
        assert!(report.problems[0].to_string().contains("(LSN 4)"), "{}", report.problems[0]);
    }

    #[test]
    fn torn_missing_stray_and_foreign_are_told_apart() {
        let log = LogFixture::synced_all_along();
        let last = log.places.last().unwrap();
        flip(&last.path, last.offset + 3, 0);
        let (report, _) = verify(&log);
        assert_eq!((kinds(&report), report.head), (vec![(ProblemKind::TornTail, Some(34))], Lsn(33)));
        assert!(report.is_sound());

        let log = LogFixture::synced_all_along();
        fs::remove_file(&log.places[5].path).unwrap();
        let (report, _) = verify(&log);
        assert_eq!((kinds(&report), report.head), (vec![(ProblemKind::Missing, Some(13))], Lsn(12)));

        let log = LogFixture::synced_all_along();
        write(&log.places[0].path, b"x", SIZE - 1);
        let (report, _) = verify(&log);
        assert_eq!((kinds(&report), report.head), (vec![(ProblemKind::Stray, None)], Lsn(36)));

        let log = LogFixture::synced_all_along();
        flip(&log.places[5].path, 33, 0);
        let (report, seen) = verify(&log);
        assert_eq!((report.problems[0].kind, report.head), (ProblemKind::Corrupt, Lsn(12)));
        assert_eq!(seen.lsns.len(), 36, "a lost header loses no record");

        let other = LogIdentity { cluster: ClusterId(8), ..IDENTITY };
        let report = verify_log(log.path(), Some(&other), KnownSynced::default(), &mut ()).unwrap();
        assert_eq!(report.problems[0].kind, ProblemKind::Mismatch);
    }

    #[test]
    fn what_verify_calls_sound_recovery_opens() {
        // Of the segments, the first has epoch 3 and the last epoch 4.
        let everything = WrittenHere::Everything;
        for written_here in
            [everything, WrittenHere::Epoch(Epoch(4)), WrittenHere::Epoch(Epoch(9)), WrittenHere::Nothing]
        {
            for (place, lsn) in (0..14).flat_map(|place| [(place, 0), (place, 9)]) {
                for offset in [0, 5, 20, 45, 50] {
                    let log = LogFixture::synced_all_along();
                    let place = &log.places[place];
                    flip(&place.path, place.offset + offset, 2);
                    let known = KnownSynced { lsn: Lsn(lsn), written_here };
                    let report = verify_log(log.path(), Some(&IDENTITY), known, &mut ()).unwrap();
                    let recovered = crate::wal::recovery::recover(log.path(), &IDENTITY, known);
                    assert_eq!(report.is_sound(), recovered.is_ok(), "{known:?}: {:?}", report.problems);
                    assert!(recovered.as_ref().is_ok_and(|log| log.head == report.head) || recovered.is_err());
                    // Where nothing in the log was written here, only the checkpoint tells what was synced.
                    let only_checkpoint = matches!(written_here, WrittenHere::Nothing | WrittenHere::Epoch(Epoch(9)));
                    assert!(!only_checkpoint || recovered.is_err() == (place.first_lsn <= Lsn(lsn)), "{known:?}");
                }
            }
        }
    }
}
