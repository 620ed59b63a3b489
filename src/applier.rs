//! Log to target: one applier for each shard of a follower, on a thread of its own.
//!
//! The applier reads the mapped log behind the receiver and hands each batch to the target, in order. Its mark,
//! `applied`, is moved by nobody else. It reads published bytes only, so it needs no lock and nothing is copied. A
//! target that overwrites in place is given only what a crash cannot take out of the log any more.
//!
//! During a rebuild records go through its session, which notes the blocks that they touch.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::follower_shard::AppliedMark;
use crate::rebuild::RebuildSession;
use crate::shutdown::ShutdownSignal;
use crate::target::ReplicationTarget;
use crate::types::ShardId;
use crate::wal::{Batch, Log, LogReader};
use crate::watermark::{Until, WaitStrategy, wait_any};

/// Applies one shard's log to a target.
pub(crate) struct Applier {
    pub(crate) shard: ShardId,
    pub(crate) log: Arc<Log>,
    pub(crate) target: Arc<dyn ReplicationTarget>,
    /// Moved by this applier only.
    pub(crate) applied: Arc<AppliedMark>,
    /// The rebuild that the target is in, or was in when this applier began.
    pub(crate) rebuild: Option<Arc<Mutex<RebuildSession>>>,
    pub(crate) stop: ShutdownSignal,
}

impl Applier {
    /// Applies what is in the log and what comes, until the node stops.
    ///
    /// # Errors
    ///
    /// The target's refusal; nothing behind the refused batch is applied.
    pub(crate) fn run(&self) -> Result<()> {
        if self.rebuild.is_none() && !self.target.takes_records() && !self.target.needs_durable_log() {
            return self.follow_written();
        }
        // A base can be ahead of the log: what comes first has been applied with it, and is not read, as retention
        // keeps none of it for this target.
        let applied = self.applied.load();
        wait_any(&[self.log.written().until(applied), self.stop.until()], WaitStrategy::Park, None);
        if self.log.head() < applied {
            return self.applied.sync(self.target.as_ref(), self.shard);
        }
        let mut reader = self.log.reader_from(applied.next())?;
        loop {
            if !self.apply_published(&mut reader)? {
                return Ok(());
            }
            if self.stop.is_shutdown() {
                return self.applied.sync(self.target.as_ref(), self.shard);
            }
            let more = Until { mark: self.log.written(), at_least: self.applied.load().next() };
            wait_any(&[more, self.stop.until()], WaitStrategy::Park, None);
        }
    }

    /// For a target that takes no records: what is written is applied.
    fn follow_written(&self) -> Result<()> {
        loop {
            let applied = self.applied.load().max(self.log.written().load());
            self.applied.publish(applied);
            if self.stop.is_shutdown() {
                return self.applied.sync(self.target.as_ref(), self.shard);
            }
            wait_any(&[self.log.written().until(applied.next()), self.stop.until()], WaitStrategy::Park, None);
        }
    }

    /// Returns false if the rebuild that this applier works for is over without having completed.
    fn apply_published(&self, reader: &mut LogReader) -> Result<bool> {
        let durable_first = self.target.needs_durable_log();
        while let Some(range) = reader.next(u64::MAX)? {
            for batch in range.batches() {
                if self.stop.is_shutdown() {
                    // However long the log is; the next start goes on here.
                    return Ok(true);
                }
                let last = batch.header.last_lsn();
                if last <= self.applied.load() {
                    continue;
                }
                // A segment publishes bytes just before the log's mark says so. What is applied is never ahead of it.
                wait_any(&[self.log.written().until(last)], self.log.options().wait, None);
                if durable_first && last > self.log.synced().load() {
                    // Everything written so far in one sync, which this thread does. It is no writer that waits for
                    // each record, so segments to come need not be settled on the device beforehand.
                    self.log.sync_up_to(last)?;
                }
                if !self.apply(&batch)? {
                    return Ok(false);
                }
                self.applied.publish(last);
            }
        }
        Ok(true)
    }

    fn apply(&self, batch: &Batch<'_>) -> Result<bool> {
        if let Some(rebuild) = &self.rebuild {
            let mut rebuild = rebuild.lock();
            if !rebuild.is_completed() {
                return if rebuild.active() { rebuild.apply_log_entry(batch).map(|()| true) } else { Ok(false) };
            }
        }
        self.target.apply_batch(self.shard, batch).map(|()| true).map_err(Error::of_target(self.shard))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;
    use crate::limits::MIN_SEGMENT_SIZE;
    use crate::types::{ClusterId, Epoch, Lsn, RegionId};
    use crate::wal::{LogIdentity, Record, Wal, WalOptions};

    const SHARD: ShardId = ShardId(0);

    /// Says when an applier begins to work for it, and what it is given.
    struct Told(Mutex<(Sender<()>, Vec<Lsn>)>);

    impl ReplicationTarget for Told {
        fn takes_records(&self) -> bool {
            let _ = self.0.lock().0.send(());
            true
        }
        fn durable_applied(&self, _: ShardId) -> Result<Option<Lsn>> {
            Ok(None)
        }
        fn apply(&self, _: ShardId, record: Record<'_>) -> Result<()> {
            self.0.lock().1.push(record.lsn);
            Ok(())
        }
        fn sync(&self, _: ShardId) -> Result<()> {
            Ok(())
        }
    }

    /// What breaks: a small bound on the log, which gives up what a base has brought already.
    #[test]
    fn what_a_base_has_brought_need_not_stay_in_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let identity =
            LogIdentity { cluster: ClusterId(1), region: RegionId(0), shard: SHARD, segment_size: MIN_SEGMENT_SIZE };
        let (wal, mut writer) = Wal::open(directory.path(), identity, WalOptions::default()).unwrap();
        writer.set_epoch(Epoch(1)).unwrap();
        let base = Lsn(40);
        let (begins, has_begun) = channel();
        let target = Arc::new(Told(Mutex::new((begins, Vec::new()))));
        let (applied, stop) = (AppliedMark::new(base, Arc::default(), true), ShutdownSignal::new());
        let applier = Applier {
            shard: SHARD,
            log: Arc::clone(wal.log()),
            target: Arc::clone(&target) as _,
            applied: Arc::clone(&applied),
            rebuild: None,
            stop: stop.clone(),
        };
        std::thread::scope(|scope| {
            let runs = scope.spawn(move || applier.run());
            has_begun.recv().unwrap();
            while writer.append(&[7; 4096]).unwrap() < base {}
            assert!(wal.log().drop_through(base, "the log is larger than it may be").unwrap() > 0);
            let next = writer.append(b"next").unwrap();
            while applied.load() < next && !runs.is_finished() {
                std::thread::yield_now();
            }
            stop.shutdown();
            runs.join().unwrap().unwrap();
            assert_eq!((applied.load(), target.0.lock().1.as_slice()), (next, &[next][..]));
        });
    }
}
