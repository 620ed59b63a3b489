//! Whole sealed segments on a stream: how a segment is archived, or fed to a follower by hand.
//!
//! A segment travels as `Segment` frames, each a [`SegmentPieceHeader`] and the next bytes of the segment, at most
//! [`MAX_SEGMENT_PIECE_LEN`](crate::limits::MAX_SEGMENT_PIECE_LEN) of them. Every piece says the same about the whole;
//! the pieces come in order, without gaps, and end where `total_len` says. The receiver's memory grows with the bytes
//! that have arrived, never with the number that announces them.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::limits::{BATCH_HEADER_LEN, MAX_SEGMENT_SIZE, SEGMENT_HEADER_LEN};
use crate::types::{Chain, Lsn, WalSegmentId};
use crate::wal::segment::HEADER_PAGE;
use crate::wal::{BatchIter, Expected, LogRange, Segment, SegmentHeader, batch};
use crate::wire::WireError;
use crate::wire::codec::message;

message! {
    /// The prefix of a `Segment` body; bytes of the segment from `offset` on follow, at least one.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 2 | `id.region` |
    /// | 2 | 2 | `id.shard` |
    /// | 4 | 8 | `id.first_lsn` |
    /// | 12 | 8 | `event_count` |
    /// | 20 | 8 | `total_len` |
    /// | 28 | 8 | `offset` |
    pub struct SegmentPieceHeader in Segment {
        /// The segment.
        pub id: WalSegmentId,
        /// Records in it.
        pub event_count: u64,
        /// Bytes of it, header page to sealing batch.
        pub total_len: u64,
        /// Where the bytes of this piece belong.
        pub offset: u64,
    }
}

/// One whole sealed segment: its name, its bytes from the header page to the end of the sealing batch, and how many
/// records it holds. Made from a mapped segment it keeps that mapped and copies nothing.
///
/// ```
/// use towline::wal::{Expected, SegmentHeader, batch};
/// use towline::wire::WalSegmentPayload;
/// use towline::{Chain, ClusterId, Epoch, HybridTimestamp, Lsn, RegionId, ShardId, WalSegmentId};
///
/// # fn main() -> Result<(), towline::wire::WireError> {
/// let id = WalSegmentId { region: RegionId(0), shard: ShardId(0), first_lsn: Lsn(1) };
/// let (epoch, chain_before) = (Epoch(1), Chain(0));
/// let header = SegmentHeader { id, cluster: ClusterId(7), epoch, chain_before, segment_size: 65536, version: 3 };
/// let sealing = Expected { first_lsn: Lsn(1), chain: chain_before, epoch };
/// let mut archived = header.encode().to_vec();
/// archived.extend(batch::build(sealing, HybridTimestamp::default(), Lsn::ZERO, &[]));
///
/// let payload = WalSegmentPayload::from_bytes(archived)?;
/// assert_eq!((payload.id(), payload.event_count()), (id, 0));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct WalSegmentPayload {
    id: WalSegmentId,
    bytes: Bytes,
    event_count: u64,
}

#[derive(Clone)]
enum Bytes {
    Log(LogRange),
    Owned(Arc<Vec<u8>>),
}

/// What a verified segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentSummary {
    /// What its header page says.
    pub header: SegmentHeader,
    /// Records in it.
    pub event_count: u64,
    /// The LSN of the last record; one before the segment's first where there is none.
    pub last_lsn: Lsn,
    /// The chain after the sealing batch.
    pub chain_after: Chain,
}

impl WalSegmentPayload {
    /// A mapped segment, which must be sealed.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the segment is still open.
    pub fn from_segment(segment: &Arc<Segment>) -> Result<WalSegmentPayload> {
        if !segment.is_sealed() {
            return Err(Error::invalid(format!("{} is still open; only a sealed segment is whole", segment.id())));
        }
        let range = LogRange::new(Arc::clone(segment), 0..segment.published())?;
        let batches = range.bytes().get(HEADER_PAGE..).unwrap_or_default();
        let event_count = BatchIter::new(batches).map(|batch| u64::from(batch.header.record_count)).sum();
        Ok(WalSegmentPayload { id: segment.id(), bytes: Bytes::Log(range), event_count })
    }

    /// Bytes of a sealed segment, as from an archived file. They are verified.
    ///
    /// # Errors
    ///
    /// [`WireError::Segment`] if they are not a whole sealed segment.
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Result<WalSegmentPayload, WireError> {
        let bytes = bytes.into();
        let summary = summarise(&bytes)?;
        Ok(WalSegmentPayload {
            id: summary.header.id,
            bytes: Bytes::Owned(Arc::new(bytes)),
            event_count: summary.event_count,
        })
    }

    /// Bytes from elsewhere, with what is said about them. Nothing is known to be true before
    /// [`verify`](Self::verify).
    #[must_use]
    pub fn unverified(id: WalSegmentId, event_count: u64, bytes: impl Into<Vec<u8>>) -> WalSegmentPayload {
        WalSegmentPayload { id, bytes: Bytes::Owned(Arc::new(bytes.into())), event_count }
    }

    /// The segment's name.
    #[must_use]
    pub fn id(&self) -> WalSegmentId {
        self.id
    }

    /// Records in it.
    #[must_use]
    pub fn event_count(&self) -> u64 {
        self.event_count
    }

    /// Its bytes: header page, batches, sealing batch.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Log(range) => range.bytes(),
            Bytes::Owned(bytes) => bytes,
        }
    }

    /// The mapped range behind it, where there is one.
    #[must_use]
    pub fn log_range(&self) -> Option<&LogRange> {
        match &self.bytes {
            Bytes::Log(range) => Some(range),
            Bytes::Owned(_) => None,
        }
    }

    /// Checks that the bytes are a whole sealed segment, every batch valid where it stands, and that name and record
    /// count are theirs.
    ///
    /// Whether the segment continues a particular log is for its receiver to see, by the cluster, epoch, first LSN
    /// and chain in the answer.
    ///
    /// # Errors
    ///
    /// [`WireError::Segment`] with the place of the first thing that is wrong.
    pub fn verify(&self) -> Result<SegmentSummary, WireError> {
        let summary = summarise(self.bytes())?;
        if summary.header.id != self.id {
            return wrong(0, format!("it is {}, and was announced as {}", summary.header.id, self.id));
        }
        if summary.event_count != self.event_count {
            let counted = summary.event_count;
            return wrong(0, format!("it holds {counted} records, and was announced with {}", self.event_count));
        }
        Ok(summary)
    }
}

impl fmt::Debug for WalSegmentPayload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WalSegmentPayload")
            .field("id", &self.id.to_string())
            .field("len", &self.bytes().len())
            .field("event_count", &self.event_count)
            .finish()
    }
}

impl SegmentPieceHeader {
    /// The smallest and the largest number of bytes that a whole segment has: a header page and a sealing batch at
    /// least.
    pub const TOTAL_LEN: std::ops::RangeInclusive<u64> = SEGMENT_HEADER_LEN + BATCH_HEADER_LEN..=MAX_SEGMENT_SIZE;
}

fn wrong<T>(offset: u64, reason: impl Into<std::borrow::Cow<'static, str>>) -> Result<T, WireError> {
    Err(WireError::Segment { offset, reason: reason.into() })
}

/// Walks a whole segment, checking everything.
fn summarise(bytes: &[u8]) -> Result<SegmentSummary, WireError> {
    let Some((page, mut rest)) = bytes.split_first_chunk::<HEADER_PAGE>() else {
        return wrong(0, "it is shorter than a header page");
    };
    let header = match SegmentHeader::decode(page) {
        Ok(header) => header,
        Err(reason) => return wrong(0, reason),
    };
    if bytes.len() as u64 > header.segment_size {
        return wrong(header.segment_size, "it is longer than its header says");
    }
    let mut at = Expected { first_lsn: header.id.first_lsn, chain: header.chain_before, epoch: header.epoch };
    let mut event_count = 0;
    loop {
        let offset = (bytes.len() - rest.len()) as u64;
        let found = match batch::verify(rest, header.segment_size - offset, at) {
            Ok(found) => found,
            Err(error) => return wrong(offset, error.to_string()),
        };
        if let Some(reason) = header.find_misplaced_compact(offset, &found) {
            return wrong(offset, reason);
        }
        event_count += u64::from(found.record_count);
        at = Expected { first_lsn: found.last_lsn().next(), chain: found.crc, ..at };
        // Verified, so the batch is within the bytes.
        rest = usize::try_from(found.total_len()).ok().and_then(|len| rest.get(len..)).unwrap_or_default();
        if found.is_sealing() {
            break;
        }
    }
    if !rest.is_empty() {
        return wrong((bytes.len() - rest.len()) as u64, "there are bytes behind the sealing batch");
    }
    Ok(SegmentSummary { header, event_count, last_lsn: at.first_lsn.previous(), chain_after: at.chain })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::{RegionId, ShardId};
    use crate::wire::sample::{self, SEGMENT_ID, bytes_of_hex};

    #[test]
    fn the_bytes_of_a_piece_header() {
        let header = SegmentPieceHeader {
            id: WalSegmentId { region: RegionId(1), shard: ShardId(2), first_lsn: Lsn(0x0807_0605_0403_0201) },
            event_count: 3,
            total_len: 4,
            offset: 5,
        };
        let bytes = bytes_of_hex("0100 0200 0102030405060708 0300000000000000 0400000000000000 0500000000000000");
        assert_eq!(header.to_vec(), bytes);
        assert_eq!(SegmentPieceHeader::decode(&bytes), Ok(header));
    }

    #[test]
    fn a_sealed_segment_is_counted_and_verified_without_a_copy() {
        let bytes = sample::small_segment();
        let (segment, _dir) = sample::mapped(&bytes, true);
        let payload = WalSegmentPayload::from_segment(&segment).unwrap();
        assert_eq!((payload.id(), payload.event_count(), payload.bytes()), (SEGMENT_ID, 3, &bytes[..]));
        assert_eq!(payload.bytes().as_ptr(), segment.bytes(0..1).unwrap().as_ptr());
        let summary = payload.verify().unwrap();
        assert_eq!((summary.event_count, summary.last_lsn), (3, Lsn(102)));
        assert_eq!(WalSegmentPayload::from_bytes(bytes).unwrap().verify(), Ok(summary));
    }

    #[test]
    fn an_open_segment_is_refused() {
        let (segment, _dir) = sample::mapped(&sample::small_segment(), false);
        assert!(matches!(WalSegmentPayload::from_segment(&segment), Err(Error::Invalid { .. })));
    }

    #[test]
    fn a_wrong_name_or_count_is_found() {
        let bytes = sample::small_segment();
        let other = WalSegmentId { first_lsn: Lsn(101), ..SEGMENT_ID };
        assert!(WalSegmentPayload::unverified(SEGMENT_ID, 3, bytes.clone()).verify().is_ok());
        assert!(WalSegmentPayload::unverified(other, 3, bytes.clone()).verify().is_err());
        assert!(WalSegmentPayload::unverified(SEGMENT_ID, 4, bytes.clone()).verify().is_err());
        let mut longer = bytes;
        longer.extend_from_slice(&[0; 8]);
        assert!(WalSegmentPayload::unverified(SEGMENT_ID, 3, longer).verify().is_err());
    }

    proptest! {
        #[test]
        fn any_flipped_byte_and_any_cut_is_found(at in any::<prop::sample::Index>(), mask in 1u8..) {
            let bytes = sample::small_segment();
            let at = at.index(bytes.len());
            prop_assert!(WalSegmentPayload::unverified(SEGMENT_ID, 3, &bytes[..at]).verify().is_err());
            let mut damaged = bytes;
            damaged[at] ^= mask;
            prop_assert!(WalSegmentPayload::unverified(SEGMENT_ID, 3, damaged).verify().is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut behind_a_header = sample::small_segment();
            behind_a_header.truncate(HEADER_PAGE);
            behind_a_header.extend_from_slice(&bytes);
            let _ = WalSegmentPayload::from_bytes(bytes.clone());
            let _ = WalSegmentPayload::from_bytes(behind_a_header);
            let _ = SegmentPieceHeader::decode(&bytes);
        }
    }
}
