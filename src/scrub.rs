//! Scrubbing: reading an open node's sealed segments again, slowly, to find what a disk has forgotten.
//!
//! One thread a node, `tl-scrub`, goes through the shards one after the other, at a bounded rate, and then sleeps until
//! the next pass is due. Each pass checks every sealed and synced segment: its header, every batch, and that each
//! segment continues the one before. A node reads its whole log when it opens it, so the first pass comes a whole
//! interval later.
//!
//! What is found stands in the log output and in the status, and those bytes are given to nobody any more. The node
//! goes on otherwise: what it has in its target does not depend on an old segment. Stop it when that suits, and repair
//! the log with [`Repair`](crate::repair::Repair).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::server::Server;
use crate::shutdown::ShutdownSignal;
use crate::types::Lsn;
use crate::wal::scan::{Continue, scrub_segment};
use crate::wal::{Log, Segment};

/// How a node scrubs its logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubOptions {
    /// Bytes read a second at most, over all shards; 0 for no scrubbing. Default: 8 MiB.
    pub bytes_per_second: u64,
    /// From the beginning of a pass to that of the next, and from the start of the node to the first. A pass that takes
    /// longer is followed by the next at once. Default: one day.
    pub every: Duration,
}

impl Default for ScrubOptions {
    fn default() -> Self {
        ScrubOptions { bytes_per_second: 8 << 20, every: Duration::from_secs(24 * 60 * 60) }
    }
}

/// The thread's work.
pub(crate) struct Scrubber {
    pub(crate) server: Arc<Server>,
    pub(crate) options: ScrubOptions,
    pub(crate) stop: ShutdownSignal,
}

impl Scrubber {
    /// Scrubs until the node stops.
    pub(crate) fn run(&self) {
        let mut due = self.options.every;
        while !self.stop.wait_timeout(due) {
            let began = Instant::now();
            let mut pace = Pace { options: self.options, stop: &self.stop, began, bytes: 0 };
            for shard in self.server.all_shards() {
                if let Err(error) = scrub(&shard.log, &mut pace) {
                    log::error!("shard {}: scrubbing: {error}", shard.log.shard());
                }
            }
            due = self.options.every.saturating_sub(began.elapsed());
        }
    }
}

/// Bounds the rate.
struct Pace<'a> {
    options: ScrubOptions,
    stop: &'a ShutdownSignal,
    began: Instant,
    bytes: u64,
}

impl Pace<'_> {
    /// Waits until as much time has passed as so many bytes may take. Says whether to go on.
    fn read(&mut self, bytes: u64) -> Continue {
        self.bytes += bytes;
        let micros = u128::from(self.bytes) * 1_000_000 / u128::from(self.options.bytes_per_second.max(1));
        let due = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
        let stopped = match due.checked_sub(self.began.elapsed()) {
            Some(wait) => self.stop.wait_timeout(wait),
            None => self.stop.is_shutdown(),
        };
        if stopped { Continue::No } else { Continue::Yes }
    }
}

/// One pass over one log.
fn scrub(log: &Log, pace: &mut Pace<'_>) -> Result<()> {
    let synced = log.synced().load();
    let (mut before, mut bytes): (Option<Arc<Segment>>, u64) = (None, 0);
    let (mut last, mut missed) = (Lsn::ZERO, None);
    // One at a time: a segment that is held here while retention gives it up keeps its room on the disk.
    while let Some(segment) = log.sealed_segments_since(last).into_iter().next() {
        let Some(end) = segment.sealed_last_lsn().filter(|&end| end <= synced) else { break };
        last = end;
        // Between the two some may have been given up.
        before = before.filter(|before| before.sealed_last_lsn().map(Lsn::next) == Some(segment.id().first_lsn));
        let scrubbed = scrub_segment(&segment, before.as_deref(), &mut |bytes| pace.read(bytes));
        // Another log may have taken its place, for a rebuild or a cut: files are gone, or are that one's by now.
        if log.is_closed() {
            return Ok(());
        }
        let findings = match scrubbed {
            Ok(Some(findings)) => findings,
            Ok(None) => return Ok(()),
            Err(error) if !log.holds(&segment) => {
                log::debug!("shard {}: {} was given up meanwhile: {error}", log.shard(), segment.id());
                continue;
            }
            // The others may be damaged as well.
            Err(error) => {
                missed.get_or_insert(error);
                continue;
            }
        };
        for finding in findings {
            let error =
                Error::corrupt(&finding.path, finding.offset, Some(finding.lsn), finding.reason.clone()).to_string();
            if log.health().found(finding) {
                let node = log.directory().parent().map_or_else(PathBuf::new, std::path::Path::to_owned);
                log::error!(
                    "shard {}: found by scrubbing: {error}; stop the node when that suits, and run `towline repair {} \
                     --from ADDR --shard {}`",
                    log.shard(),
                    node.display(),
                    log.shard()
                );
            }
        }
        bytes += segment.published();
        before = Some(segment);
    }
    if let Some(error) = missed {
        return Err(error);
    }
    log.health().passed(bytes);
    log::debug!("shard {}: scrubbed {bytes} bytes", log.shard());
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

    use super::*;
    use crate::limits::MIN_SEGMENT_SIZE;
    use crate::types::{ClusterId, Epoch, RegionId, ShardId};
    use crate::wal::{LogIdentity, LogWriter, Wal, WalOptions};

    const IDENTITY: LogIdentity =
        LogIdentity { cluster: ClusterId(7), region: RegionId(1), shard: ShardId(2), segment_size: MIN_SEGMENT_SIZE };

    fn fill(writer: &mut LogWriter, byte: u8) {
        for _ in 0..10 {
            writer.append(&[byte; 20_000]).unwrap();
        }
        writer.log().sync_all().unwrap();
    }

    /// What breaks: the disk, which does not give back one segment, and has lost another. What would be lost:
    /// whatever is damaged behind those, if nobody looked at it any more.
    #[test]
    #[cfg(target_os = "linux")]
    fn what_cannot_be_read_is_found_and_the_segments_behind_it_are_looked_at() {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = Wal::open(directory.path(), IDENTITY, WalOptions::default()).unwrap();
        (0..2).for_each(|_| fill(&mut writer, b'a'));
        let log = Arc::clone(wal.log());
        let sealed = log.sealed_segments_since(Lsn::ZERO);
        assert!(sealed.len() > 5);
        let path = |index: usize| sealed[index].path();
        // A directory can be opened, and not read.
        std::fs::remove_file(path(1)).unwrap();
        std::fs::create_dir(path(1)).unwrap();
        std::fs::remove_file(path(3)).unwrap();
        let mut bytes = std::fs::read(path(4)).unwrap();
        bytes[5000] ^= 1;
        std::fs::write(path(4), bytes).unwrap();
        let stop = ShutdownSignal::new();
        let options = ScrubOptions { bytes_per_second: u64::MAX, ..ScrubOptions::default() };
        let scrub = || scrub(&log, &mut Pace { options, stop: &stop, began: Instant::now(), bytes: 0 });
        let error = scrub().unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if path == sealed[3].path()), "{error}");
        let status = log.scrub_status();
        assert_eq!(status.passes, 0, "one was not looked at");
        let found: Vec<_> = status.findings.iter().map(|finding| (finding.path.as_path(), finding.end)).collect();
        let all_of_it = (path(1), sealed[1].published());
        assert_eq!(found[..2], [(path(1), 4096), all_of_it]);
        assert_eq!((found.len(), found[2].0), (3, path(4)));
    }

    /// What breaks: a rebuild replaces a follower's log while it is being scrubbed, and retention has nothing to do
    /// with it. How: files of the old log are gone, or their names have become those of the new log's. What prevents
    /// harm: a log that is closed is not judged by what now stands in its place.
    #[test]
    fn a_log_that_another_has_replaced_is_not_found_to_be_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = Wal::open(directory.path(), IDENTITY, WalOptions::default()).unwrap();
        fill(&mut writer, b'a');
        let old = Arc::clone(wal.log());
        assert!(old.sealed_segments_since(Lsn::ZERO).len() > 2);
        drop(writer);
        wal.close().unwrap();
        let stop = ShutdownSignal::new();
        let options = ScrubOptions { bytes_per_second: u64::MAX, ..ScrubOptions::default() };
        let scrub_old = || scrub(&old, &mut Pace { options, stop: &stop, began: Instant::now(), bytes: 0 }).unwrap();

        let replace = |first| Wal::open_at(directory.path(), IDENTITY, WalOptions::default(), first, Epoch(2)).unwrap();
        let (wal, mut writer) = replace(Lsn::FIRST);
        fill(&mut writer, b'b');
        scrub_old();
        drop(writer);
        wal.close().unwrap();
        let _new = replace(Lsn(1000));
        scrub_old();
        let status = old.scrub_status();
        assert_eq!((status.passes, status.findings), (0, Vec::new()));
    }
}
