//! The log of one shard.

pub mod batch;
mod mapping;
pub mod segment;

pub use batch::{Batch, BatchError, BatchHeader, BatchIter, Expected, Record, RecordIter};
#[cfg(test)]
pub(crate) use mapping::Mapping;
pub use mapping::{LogRange, Segment};
pub use segment::SegmentHeader;
