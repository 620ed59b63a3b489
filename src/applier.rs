//! Log to target: one applier for each shard of a follower, on a thread of its own.
//!
//! The applier reads the mapped log behind the receiver and hands each batch to the target, in order. Its mark,
//! `applied`, is moved by nobody else. It reads published bytes only, so it needs no lock and nothing is copied. A
//! target that overwrites in place is given only what a crash cannot take out of the log any more.

use std::sync::Arc;

use crate::error::Result;
use crate::shutdown::ShutdownSignal;
use crate::target::ReplicationTarget;
use crate::types::ShardId;
use crate::wal::{Log, LogReader};
use crate::watermark::{Until, Watermark, wait_any};

/// Applies one shard's log to a target.
pub(crate) struct Applier {
    pub(crate) shard: ShardId,
    pub(crate) log: Arc<Log>,
    pub(crate) target: Arc<dyn ReplicationTarget>,
    /// Moved by this applier only.
    pub(crate) applied: Arc<Watermark>,
    pub(crate) stop: ShutdownSignal,
}

impl Applier {
    /// Applies what is in the log and what comes, until the node stops. What has been received then is still applied.
    ///
    /// # Errors
    ///
    /// The target's refusal; nothing behind the refused batch is applied.
    pub(crate) fn run(&self) -> Result<()> {
        let mut reader = self.log.reader_from(self.applied.load().next())?;
        loop {
            self.apply_published(&mut reader)?;
            if self.stop.is_shutdown() {
                return self.target.sync(self.shard);
            }
            let more = Until { mark: self.log.written(), at_least: self.applied.load().next() };
            wait_any(&[more, self.stop.until()], self.log.options().wait, None);
        }
    }

    fn apply_published(&self, reader: &mut LogReader) -> Result<()> {
        let durable_first = self.target.needs_durable_log();
        while let Some(range) = reader.next(u64::MAX)? {
            for batch in range.batches() {
                let last = batch.header.last_lsn();
                if last <= self.applied.load() {
                    continue;
                }
                // A segment publishes bytes just before the log's mark says so. What is applied is never ahead of it.
                wait_any(&[self.log.written().until(last)], self.log.options().wait, None);
                if durable_first && last > self.log.synced().load() {
                    // Everything received so far in one sync, and this thread does it: nobody else waits for it here.
                    self.log.wait_synced(last, None)?;
                }
                self.target.apply_batch(self.shard, &batch)?;
                self.applied.publish(last);
            }
        }
        Ok(())
    }
}
