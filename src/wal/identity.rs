//! What makes a log this log and no other, so that a file that is copied to the wrong place is noticed.

use crate::types::{Chain, ClusterId, RegionId, ShardId, WalSegmentId};
use crate::wal::segment::SegmentHeader;

/// What makes a log this log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogIdentity {
    /// The cluster.
    pub cluster: ClusterId,
    /// Where the log originates.
    pub region: RegionId,
    /// Which of its shards.
    pub shard: ShardId,
    /// Bytes of each segment file.
    pub segment_size: u64,
}

impl LogIdentity {
    /// The chain before the first record.
    pub(crate) fn genesis(&self) -> Chain {
        Chain::genesis(self.cluster, self.region, self.shard)
    }

    /// What of a segment's name is not of this log, as a sentence.
    pub(crate) fn check_name(&self, id: WalSegmentId) -> Result<(), String> {
        let LogIdentity { region, shard, .. } = self;
        if (id.region, id.shard) == (*region, *shard) {
            return Ok(());
        }
        Err(format!(
            "a segment of region {} shard {} in the log of region {region} shard {shard}; move it to its own directory",
            id.region, id.shard
        ))
    }

    /// What of a segment's header is not of this log, as a sentence.
    pub(crate) fn check(&self, header: &SegmentHeader) -> Result<(), String> {
        self.check_name(header.id)?;
        if header.cluster != self.cluster {
            return Err(format!("a segment of cluster {} in a log of cluster {}", header.cluster, self.cluster));
        }
        if header.segment_size != self.segment_size {
            return Err(format!(
                "a segment of {} bytes in a log with segments of {} bytes; a log keeps the size that it began with",
                header.segment_size, self.segment_size
            ));
        }
        Ok(())
    }
}
