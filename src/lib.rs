//! Towline.

mod atomic_file;
pub mod data_dir;
pub mod error;
pub mod limits;
pub mod replication;
pub mod shutdown;
mod sync;
pub mod transport;
pub mod types;
pub mod wal;
pub mod watermark;
pub mod wire;

pub use error::{Error, RefusalCode, Result};
pub use replication::{Checkpoint, CheckpointEntry, CheckpointError, ReplicationState};
pub use shutdown::{ShutdownGuard, ShutdownSignal};
pub use types::{
    Chain, ClusterId, Epoch, HybridTimestamp, Lsn, NodeId, ParseSegmentIdError, RegionId, ShardId, WalSegmentId,
};
pub use watermark::{Until, WaitStrategy, Waited, Watermark, wait_any};
