//! The log of one shard.

pub mod batch;
mod compare;
#[cfg(test)]
mod log_fixture;
mod mapping;
mod recovery;
pub mod scan;
pub mod segment;
mod walk;

pub use batch::{Batch, BatchError, BatchHeader, BatchIter, Expected, Record, RecordIter};
#[cfg(test)]
pub(crate) use mapping::Mapping;
pub use mapping::{LogRange, Segment};
pub use recovery::{LogIdentity, TornTail};
pub use segment::SegmentHeader;
