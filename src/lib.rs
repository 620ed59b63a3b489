//! Towline.

pub mod error;
pub mod limits;
pub mod rebuild;
pub mod target;
pub mod types;
pub mod wal;

pub use error::{Error, RefusalCode, Result};
pub use types::{
    Chain, ClusterId, Epoch, HybridTimestamp, Lsn, NodeId, ParseSegmentIdError, RegionId, ShardId, WalSegmentId,
};
