//! Carries out what [recovery](super::recovery) has decided: a log's directory becomes what the survey says it is.
//! First the [`Verdict`] says what is to be done, and touches nothing; then it is carried out.
//!
//! Later segments go first: they get names of spare files, the newest first and each durably. Then the segment with the
//! stop is zeroed from there to its last byte that is not zero, and synced. A crash in between leaves less of what was
//! to be cut, and the same decision. A segment that is left without any record goes with them, as does one that a crash
//! left empty, and its file is removed; except that a log that begins past LSN 1 keeps its first one: that is where its
//! position stands.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::directory_lock::LOCK_FILE;
use crate::error::{Error, Result};
use crate::limits::SEGMENT_HEADER_LEN;
use crate::types::{Epoch, Lsn, WalSegmentId};
use crate::wal::given_up;
use crate::wal::identity::LogIdentity;
use crate::wal::recovery::{Recovered, RecoveredSegment, Stop, Survey, TornTail};
use crate::wal::segment::{sync_directory, zero_in_pages};

const SPARE_PREFIX: &str = "spare-";
const SPARE_SUFFIX: &str = ".wal.tmp";
const STAGED_PREFIX: &str = "repair-";
const STAGED_SUFFIX: &str = ".tmp";

/// Whether a file of this name is a segment prepared ahead of need, or one on its way there.
pub(super) fn is_spare_name(name: &str) -> bool {
    name.strip_prefix(SPARE_PREFIX).is_some_and(|rest| rest.ends_with(SPARE_SUFFIX) || rest.ends_with(".wal.old"))
}

/// What a segment is called while a repair makes it, next to the one whose place it will take.
pub(crate) fn staged_name(id: WalSegmentId) -> String {
    format!("{STAGED_PREFIX}{id}{STAGED_SUFFIX}")
}

/// Whether a file of this name was made by a repair that did not come to its end.
pub(crate) fn is_staged_name(name: &str) -> bool {
    name.starts_with(STAGED_PREFIX) && name.ends_with(STAGED_SUFFIX)
}

/// The decision to open a log: what is kept of it, and what is to be done to its files first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// What is kept; its leftovers come of the deeds.
    pub(crate) recovered: Recovered,
    /// Files that hold nothing of the log any more, in the order in which they go, and whether they can become spares.
    /// The directory is synced behind them.
    pub(crate) dropped: Vec<(PathBuf, bool)>,
    /// Ranges that become zeros, after that; each file is synced.
    pub(crate) zeroed: Vec<(PathBuf, Range<u64>)>,
}

impl Survey<'_> {
    /// What is to be done for a log that may be opened.
    pub(super) fn verdict(mut self) -> Verdict {
        let stop = self.stop.take();
        let extent = stop.as_ref().and_then(|stop| stop.extent);
        let torn = stop.map(|stop| self.torn_tail(stop));
        self.drop_empty_segment();
        let zeroed = self.zeroed(extent);
        Verdict {
            recovered: Recovered {
                head: self.next.first_lsn.previous(),
                chain: self.next.chain,
                epoch: self.segments.last().map_or(Epoch::ZERO, |last| last.header.epoch),
                timestamp: self.timestamp,
                synced: self.known.lsn,
                torn,
                segments: self.segments,
                leftovers: Vec::new(),
            },
            dropped: self.dropped.into_iter().rev().collect(),
            zeroed,
        }
    }

    /// What is to be reported of a stop.
    fn torn_tail(&self, stop: Stop) -> TornTail {
        TornTail {
            path: stop.path,
            // Where the stop is at a segment's header, the first byte that counts is that of its first batch.
            offset: stop.offset.max(SEGMENT_HEADER_LEN),
            after: self.next.first_lsn.previous(),
            bytes: stop.bytes,
            reason: stop.reason,
        }
    }

    /// Moves the last segment to the dropped ones if it has no record and is not where the log's position stands.
    fn drop_empty_segment(&mut self) {
        let holds_position = self.segments.len() == 1 && self.next.first_lsn > Lsn::FIRST;
        let is_empty = |last: &mut RecoveredSegment| last.published == SEGMENT_HEADER_LEN && !holds_position;
        if let Some(empty) = self.segments.pop_if(is_empty) {
            self.short.retain(|(path, _)| *path != empty.path);
            // Whoever had the log open before may still read its header page.
            self.dropped.insert(0, (empty.path, false));
        }
    }

    /// The last segment from the end of its last batch to `extent`, and what is missing of files that were cut short.
    fn zeroed(&self, extent: Option<u64>) -> Vec<(PathBuf, Range<u64>)> {
        let mut ranges = Vec::new();
        if let (Some(extent), Some(last)) = (extent, self.segments.last()) {
            // A segment that was dropped takes its extent along.
            if last.published < extent && !last.sealed {
                ranges.push((last.path.clone(), last.published..extent));
            }
        }
        ranges.extend(self.short.iter().map(|(path, len)| (path.clone(), *len..self.identity.segment_size)));
        ranges
    }
}

impl Verdict {
    /// Makes the directory what the survey says it is.
    pub(super) fn carry_out(self, directory: &Path, others: &[PathBuf], identity: &LogIdentity) -> Result<Recovered> {
        let (mut leftovers, mut spares) = tidy(others, identity.segment_size)?;
        let Verdict { mut recovered, dropped, zeroed } = self;
        if let Some(torn) = &recovered.torn {
            log::warn!(
                "{}: cutting {} bytes behind LSN {} at offset {}, not known to be synced: {}",
                torn.path.display(),
                torn.bytes,
                torn.after,
                torn.offset,
                torn.reason
            );
        }
        for (path, can_be_spare) in dropped {
            if can_be_spare {
                spares += 1;
                let spare = directory.join(format!("{SPARE_PREFIX}{spares}{SPARE_SUFFIX}"));
                log::info!("{} holds nothing of the log any more; keeping the file as a spare", path.display());
                std::fs::rename(&path, &spare).map_err(Error::io("rename", &path))?;
                leftovers.push(spare);
            } else {
                log::info!("removing {}, which holds nothing of the log any more", path.display());
                std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
            // One by one: a crash that took only an older one along would leave a log that begins in its middle.
            sync_directory(directory).map_err(Error::io("sync", directory))?;
        }
        // Names that a process which died had not made durable become so.
        sync_directory(directory).map_err(Error::io("sync", directory))?;
        for (path, range) in zeroed {
            log::info!("zeroing {} from offset {} to {}", path.display(), range.start, range.end);
            let file = std::fs::File::options().write(true).open(&path).map_err(Error::io("open", &path))?;
            zero_in_pages(&file, range).map_err(Error::io("zero", &path))?;
            file.sync_all().map_err(Error::io("sync", &path))?;
        }
        recovered.torn = recovered.torn.filter(|torn| torn.bytes > 0);
        recovered.leftovers = leftovers;
        Ok(recovered)
    }
}

/// Sorts the names that are not segments: existing spare files, with the highest number among them.
fn tidy(others: &[PathBuf], segment_size: u64) -> Result<(Vec<PathBuf>, u64)> {
    let (mut spares, mut highest) = (Vec::new(), 0);
    for path in others {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // What was set aside goes when the log is durable.
        if name == LOCK_FILE || given_up::is_set_aside(path) {
            continue;
        }
        if is_staged_name(name) {
            log::info!("removing {}, left by a repair that was interrupted", path.display());
            std::fs::remove_file(path).map_err(Error::io("remove", path))?;
            continue;
        }
        let Some(number) = name.strip_prefix(SPARE_PREFIX).and_then(|rest| rest.strip_suffix(SPARE_SUFFIX)) else {
            log::warn!("{} is no part of a log; leaving it alone", path.display());
            continue;
        };
        highest = highest.max(number.parse::<u32>().map_or(0, u64::from));
        if path.metadata().map_err(Error::io("look at", path))?.len() == segment_size {
            spares.push(path.clone());
        } else {
            log::info!("removing {}, a spare file that was not finished", path.display());
            std::fs::remove_file(path).map_err(Error::io("remove", path))?;
        }
    }
    Ok((spares, highest))
}
