//! What is known to be damaged in a log that is open, and when it was last read through.
//!
//! An open log was sound when it was opened, and its sealed segments do not change after that; but disks forget. A
//! [scrub](crate::wal::scan) reads them again and writes down here what it finds. From then on no reader of the log is
//! given those bytes: they are not shipped, not applied and not served to who repairs another log.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::limits::MAX_FINDINGS;
use crate::types::Lsn;
use crate::wal::mapping::Segment;
use crate::wal::unix_ms;

/// Damage in a sealed segment of an open log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The file.
    pub path: PathBuf,
    /// The first LSN of the segment.
    pub segment: Lsn,
    /// Where in the file the damage begins, in bytes.
    pub offset: u64,
    /// Where it ends at the latest: with the next batch that is consistent in itself, or the segment's last.
    pub end: u64,
    /// The LSN that was due there.
    pub lsn: Lsn,
    /// What was found.
    pub reason: String,
}

/// What scrubbing has come to since the log was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    /// How often the sealed segments have been read through.
    pub passes: u64,
    /// When the last pass was completed, in milliseconds since 1970; 0 for never.
    pub completed_at_ms: u64,
    /// Bytes that it read.
    pub bytes: u64,
    /// Damage found, in the order in which it was found; at most [`MAX_FINDINGS`].
    pub findings: Vec<Finding>,
}

/// Of one log. Written by whoever scrubs it, read by its readers.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// Whether there is any finding: all that a reader of a sound log looks at.
    damaged: AtomicBool,
    status: Mutex<ScrubStatus>,
    /// What did not fit among the findings: of each segment, one range with all of it.
    beyond: Mutex<Vec<Finding>>,
}

impl Health {
    pub(crate) fn status(&self) -> ScrubStatus {
        self.status.lock().clone()
    }

    /// Writes damage down. Returns whether it was not known.
    pub(crate) fn found(&self, finding: Finding) -> bool {
        let mut status = self.status.lock();
        let place = |finding: &Finding| (finding.segment, finding.offset);
        if status.findings.iter().any(|known| place(known) == place(&finding)) {
            return false;
        }
        let is_new = if status.findings.len() < MAX_FINDINGS {
            status.findings.push(finding);
            true
        } else {
            self.widen(finding)
        };
        self.damaged.store(true, Ordering::Release);
        is_new
    }

    /// Writes down damage beyond the findings that are told. Returns whether its segment had none.
    fn widen(&self, finding: Finding) -> bool {
        let mut beyond = self.beyond.lock();
        match beyond.iter_mut().find(|known| known.segment == finding.segment) {
            Some(known) => {
                known.offset = known.offset.min(finding.offset);
                known.end = known.end.max(finding.end);
                false
            }
            None => {
                beyond.push(finding);
                true
            }
        }
    }

    /// Writes down that every sealed segment was read.
    pub(crate) fn passed(&self, bytes: u64) {
        let mut status = self.status.lock();
        status.passes += 1;
        (status.completed_at_ms, status.bytes) = (unix_ms(), bytes);
    }

    /// How much of a range of a segment may be read: up to where damage begins.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] if the range begins with damage.
    #[inline]
    pub(crate) fn readable(&self, segment: &Segment, range: Range<u64>) -> Result<u64> {
        if self.damaged.load(Ordering::Acquire) { self.readable_of_damaged(segment, range) } else { Ok(range.end) }
    }

    #[cold]
    fn readable_of_damaged(&self, segment: &Segment, range: Range<u64>) -> Result<u64> {
        let status = self.status.lock();
        let beyond = self.beyond.lock();
        let of_segment =
            status.findings.iter().chain(beyond.iter()).filter(|finding| finding.segment == segment.id().first_lsn);
        let damage = of_segment.filter(|finding| finding.offset < range.end && finding.end > range.start);
        let Some(first) = damage.min_by_key(|finding| finding.offset) else { return Ok(range.end) };
        if first.offset > range.start {
            return Ok(first.offset);
        }
        let reason =
            format!("{}; found since the log was opened, and not to be read before it is repaired", first.reason);
        Err(Error::corrupt(&first.path, first.offset, Some(first.lsn), reason))
    }
}
