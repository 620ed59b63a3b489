//! The target of followers that want the log and nothing else.

use super::ReplicationTarget;
use crate::error::Result;
use crate::types::{Lsn, ShardId};
use crate::wal::{Batch, Record};

/// A target for followers that keep the log and nothing else: what is received counts as applied.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogOnly;

impl ReplicationTarget for LogOnly {
    fn durable_applied(&self, _: ShardId) -> Result<Option<Lsn>> {
        Ok(None)
    }

    fn apply(&self, _: ShardId, _: Record<'_>) -> Result<()> {
        Ok(())
    }

    fn takes_records(&self) -> bool {
        false
    }

    fn keeps_state(&self) -> bool {
        false
    }

    fn apply_batch(&self, _: ShardId, _: &Batch<'_>) -> Result<()> {
        Ok(())
    }

    fn sync(&self, _: ShardId) -> Result<()> {
        Ok(())
    }
}
