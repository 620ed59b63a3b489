//! Towline.

pub mod error;
pub mod limits;
pub mod protocol;
pub mod types;
pub mod wal;

pub use error::{Error, RefusalCode, Result};
pub use types::{
    Chain, ClusterId, Epoch, HybridTimestamp, Lsn, NodeId, ParseSegmentIdError, RegionId, ShardId, WalSegmentId,
};
