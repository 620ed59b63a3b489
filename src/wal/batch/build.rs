//! Batches in vectors, for whoever does not fill a mapping.

use super::{BatchHeader, Expected, HEADER, chain_after, compact_header, compact_len};
use crate::limits::{self, BATCH_ALIGNMENT, MAX_COMPACT_RECORD_LEN};
use crate::types::{HybridTimestamp, Lsn};

/// Builds a batch in a vector: what tests, tools and small writers use. The log's own writer fills the mapping
/// instead, with the same bytes.
///
/// ```
/// use towline::wal::{batch, Expected};
/// use towline::{Chain, Epoch, HybridTimestamp, Lsn};
///
/// let at = Expected { first_lsn: Lsn(1), chain: Chain(0), epoch: Epoch(1) };
/// let bytes = batch::build(at, HybridTimestamp::default(), Lsn::ZERO, &[b"one", b"two"]);
/// let header = batch::verify(&bytes, bytes.len() as u64, at).unwrap();
/// assert_eq!(header.last_lsn(), Lsn(2));
/// ```
#[must_use]
pub fn build(at: Expected, timestamp: HybridTimestamp, synced_lsn: Lsn, records: &[&[u8]]) -> Vec<u8> {
    let mut body = Vec::new();
    for record in records {
        let len = u32::try_from(record.len()).unwrap_or(u32::MAX);
        body.extend_from_slice(&len.to_le_bytes());
        body.extend_from_slice(record);
    }
    let body_len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let record_count = u32::try_from(records.len()).unwrap_or(u32::MAX);
    let mut header = BatchHeader::new(at, (record_count, body_len), timestamp, synced_lsn);
    let mut bytes = vec![0; HEADER];
    bytes.extend_from_slice(&body);
    bytes.resize(bytes.len().next_multiple_of(limits::index(BATCH_ALIGNMENT)), 0);
    if let Some(first) = bytes.first_chunk_mut() {
        header.encode(first);
    }
    header.crc = chain_after(at.chain, &bytes[4..]);
    bytes[..4].copy_from_slice(&header.crc.0.to_le_bytes());
    bytes
}

/// Builds a compact batch in a vector, as [`build`] does others. `None` if the record is longer than
/// [`MAX_COMPACT_RECORD_LEN`] or the timestamp does not fit.
///
/// ```
/// use towline::wal::{batch, Expected};
/// use towline::{Chain, Epoch, HybridTimestamp, Lsn};
///
/// let at = Expected { first_lsn: Lsn(7), chain: Chain(5), epoch: Epoch(1) };
/// let bytes = batch::build_compact(at, HybridTimestamp::default().tick(1_800_000_000_000), b"record").unwrap();
/// let header = batch::verify(&bytes, bytes.len() as u64, at).unwrap();
/// assert_eq!((bytes.len(), header.first_lsn, header.is_compact()), (24, Lsn(7), true));
/// ```
#[must_use]
pub fn build_compact(at: Expected, timestamp: HybridTimestamp, record: &[u8]) -> Option<Vec<u8>> {
    let len = u32::try_from(record.len()).ok().filter(|&len| u64::from(len) <= MAX_COMPACT_RECORD_LEN)?;
    let (detail, place) = compact_header(len, at.first_lsn, timestamp)?;
    let mut bytes = vec![0; 4];
    bytes.extend_from_slice(&detail.to_le_bytes());
    bytes.extend_from_slice(&place.to_le_bytes());
    bytes.extend_from_slice(record);
    bytes.resize(limits::index(compact_len(u64::from(len))), 0);
    let crc = chain_after(at.chain, &bytes[4..]);
    bytes[..4].copy_from_slice(&crc.0.to_le_bytes());
    Some(bytes)
}
