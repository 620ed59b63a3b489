//! Segment files: their header page and how they are filled before use.
//!
//! # Format, versions 2 and 3
//!
//! A segment file has a fixed size, a multiple of 4096 bytes, all of it allocated. Its first page is the header; the
//! batches follow without gaps; behind the last batch there are zeros, but for what is arriving, and for what a crash
//! leaves of that until recovery cuts it. All numbers are little-endian.
//!
//! | offset | size | field | meaning |
//! |---:|---:|---|---|
//! | 0 | 8 | `magic` | the bytes `TOWLINE` and a zero |
//! | 8 | 2 | `version` | 3; 2 in segments made before there were [compact batches](super::batch), which have none |
//! | 10 | 2 | `region` | where the log originates |
//! | 12 | 2 | `shard` | which of its shards |
//! | 14 | 2 | `reserved` | 0 |
//! | 16 | 8 | `first_lsn` | the LSN of the first record in the segment |
//! | 24 | 8 | `epoch` | the leadership term of every batch in it |
//! | 32 | 8 | `segment_size` | bytes of the file |
//! | 40 | 16 | `cluster` | the cluster's id |
//! | 56 | 4 | `chain_before` | the chain before its first batch |
//! | 60 | 4 | `crc` | CRC-32 (IEEE) of bytes 0 to 60 |
//! | 64 | 4032 | | 0 |
//!
//! A program that finds a later version than it knows, with the right CRC, does nothing to the log: it says so.
//!
//! A header is valid exactly if magic, version, zeros and CRC are right and the size is one that a segment can have.
//! Region, shard and first LSN also stand in the [file's name](crate::WalSegmentId).

use std::fs::File;
use std::io;

use crate::limits::{self, COMPACT_LSNS, MAX_SEGMENT_SIZE, MIN_SEGMENT_SIZE, PAGE_LEN, SEGMENT_HEADER_LEN};
use crate::types::{Chain, ClusterId, Epoch, Lsn, RegionId, ShardId, WalSegmentId};
use crate::wal::batch::BatchHeader;

const MAGIC: [u8; 8] = *b"TOWLINE\0";
/// Version of the segment format.
pub const SEGMENT_VERSION: u16 = 3;
/// Oldest version that is read, and written on with.
pub const OLDEST_SEGMENT_VERSION: u16 = 2;
/// Bytes of the header page.
pub const HEADER_PAGE: usize = limits::index(SEGMENT_HEADER_LEN);
/// Bytes of its fields; the rest is zero.
pub(crate) const HEADER_FIELDS: usize = 64;

/// What the header page of a segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Region, shard and first LSN.
    pub id: WalSegmentId,
    /// The cluster whose log this is.
    pub cluster: ClusterId,
    /// The leadership term of every batch in it.
    pub epoch: Epoch,
    /// The chain before its first batch.
    pub chain_before: Chain,
    /// Bytes of the file.
    pub segment_size: u64,
    /// Format version: [`SEGMENT_VERSION`], or [`OLDEST_SEGMENT_VERSION`] of one that has no compact batches.
    pub version: u16,
}

impl SegmentHeader {
    /// The header page.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_PAGE] {
        let mut page = [0; HEADER_PAGE];
        page[..HEADER_FIELDS].copy_from_slice(&self.encode_fields());
        page
    }

    /// The fields at the beginning of the header page, behind which everything is zero: what a thread that stays for
    /// long encodes, as it keeps the pages of its stack that a whole header page would take.
    #[must_use]
    pub(crate) fn encode_fields(&self) -> [u8; HEADER_FIELDS] {
        let mut page = [0; HEADER_FIELDS];
        page[0..8].copy_from_slice(&MAGIC);
        page[8..10].copy_from_slice(&self.version.to_le_bytes());
        page[10..12].copy_from_slice(&self.id.region.0.to_le_bytes());
        page[12..14].copy_from_slice(&self.id.shard.0.to_le_bytes());
        page[16..24].copy_from_slice(&self.id.first_lsn.0.to_le_bytes());
        page[24..32].copy_from_slice(&self.epoch.0.to_le_bytes());
        page[32..40].copy_from_slice(&self.segment_size.to_le_bytes());
        page[40..56].copy_from_slice(&self.cluster.0.to_le_bytes());
        page[56..60].copy_from_slice(&self.chain_before.0.to_le_bytes());
        let crc = crc32fast::hash(&page[..60]);
        page[60..64].copy_from_slice(&crc.to_le_bytes());
        page
    }

    /// Reads and checks a header page.
    ///
    /// # Errors
    ///
    /// What is wrong with it, as half a sentence.
    pub fn decode(page: &[u8; HEADER_PAGE]) -> Result<SegmentHeader, String> {
        let u16_at = |at: usize| u16::from_le_bytes([page[at], page[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if page[0..8] != MAGIC {
            return Err("it does not begin like a segment".to_owned());
        }
        let crc = crc32fast::hash(&page[..60]);
        if crc != u32_at(60) {
            return Err(format!("the header's checksum is {:08x}, but its bytes give {crc:08x}", u32_at(60)));
        }
        let version = u16_at(8);
        if !(OLDEST_SEGMENT_VERSION..=SEGMENT_VERSION).contains(&version) {
            return Err(format!("segment version {version} is not {OLDEST_SEGMENT_VERSION} to {SEGMENT_VERSION}"));
        }
        if u16_at(14) != 0 || page[64..].iter().any(|&byte| byte != 0) {
            return Err("reserved bytes of the header are in use".to_owned());
        }
        let header = SegmentHeader {
            id: WalSegmentId { region: RegionId(u16_at(10)), shard: ShardId(u16_at(12)), first_lsn: Lsn(u64_at(16)) },
            cluster: ClusterId(u128::from(u64_at(40)) | u128::from(u64_at(48)) << 64),
            epoch: Epoch(u64_at(24)),
            chain_before: Chain(u32_at(56)),
            segment_size: u64_at(32),
            version,
        };
        if !is_valid_size(header.segment_size) {
            return Err(format!("{} bytes is not a size that a segment can have", header.segment_size));
        }
        if header.id.first_lsn == Lsn::ZERO {
            return Err("the first LSN of a segment cannot be 0".to_owned());
        }
        Ok(header)
    }

    /// Why a batch cannot stand at this offset of the segment, although it [verifies](super::batch::verify); if that is
    /// so.
    #[inline]
    pub(crate) fn find_misplaced(&self, offset: u64, batch: &BatchHeader) -> Option<&'static str> {
        seals_nothing(offset, batch).or_else(|| self.find_misplaced_compact(offset, batch))
    }

    /// The same of compact batches alone, where a segment may be sealed without records.
    #[inline]
    pub(crate) fn find_misplaced_compact(&self, offset: u64, batch: &BatchHeader) -> Option<&'static str> {
        if !batch.is_compact() {
            None
        } else if offset == SEGMENT_HEADER_LEN || self.version < SEGMENT_VERSION {
            Some("a compact batch is the first of its segment, or in one of a version that has none")
        } else if batch.first_lsn.records_since(self.id.first_lsn) >= COMPACT_LSNS {
            Some("a compact batch is too far from the beginning of its segment to know its LSN")
        } else {
            None
        }
    }

    /// The version of a whole header page that is of a later version than this program knows.
    pub(crate) fn newer_version(page: &[u8; HEADER_PAGE]) -> Option<u16> {
        let version = u16::from_le_bytes([page[8], page[9]]);
        let crc = u32::from_le_bytes([page[60], page[61], page[62], page[63]]);
        let is_whole = page[0..8] == MAGIC && crc32fast::hash(&page[..60]) == crc;
        (is_whole && version > SEGMENT_VERSION).then_some(version)
    }
}

/// What is wrong with a batch that seals a segment before any record, if that is one: its successor would have the same
/// name. Whatever the segment's header says.
#[inline]
pub(crate) fn seals_nothing(offset: u64, batch: &BatchHeader) -> Option<&'static str> {
    (offset == SEGMENT_HEADER_LEN && batch.is_sealing()).then_some("it seals a segment that has no records")
}

/// Whether segments can have this size: whole pages, within [`MIN_SEGMENT_SIZE`] and [`MAX_SEGMENT_SIZE`].
#[must_use]
pub const fn is_valid_size(bytes: u64) -> bool {
    MIN_SEGMENT_SIZE <= bytes && bytes <= MAX_SEGMENT_SIZE && bytes.is_multiple_of(PAGE_LEN)
}

/// Fills a range of a file with real zeros, one page at a time.
///
/// One page at a time, because the page cache keeps a large write as a large folio, and a folio is the unit of
/// dirtiness for a mapping: after zeroing in large pieces, syncing one record of 1 KiB writes 1 MiB to the device;
/// after zeroing in pages, about 5 KiB.
pub(crate) fn zero_in_pages(file: &File, range: std::ops::Range<u64>) -> io::Result<()> {
    zero_in_pieces(file, range, PAGE_LEN)
}

/// The longest piece of zeros that is written at once.
pub(crate) const MAX_ZERO_PIECE: u64 = 64 << 10;

/// The same in larger pieces, of at most [`MAX_ZERO_PIECE`], for where nobody waits for syncs of single records: such
/// pieces cost a third of pages.
pub(crate) fn zero_in_pieces(file: &File, range: std::ops::Range<u64>, piece_len: u64) -> io::Result<()> {
    // Not from the heap, which would keep them for each thread.
    static ZEROS: [u8; limits::index(MAX_ZERO_PIECE)] = [0; limits::index(MAX_ZERO_PIECE)];
    let piece_len = piece_len.clamp(1, MAX_ZERO_PIECE);
    let mut at = range.start;
    while at < range.end {
        let len = (piece_len - at % piece_len).min(range.end - at);
        write_all_at(file, &ZEROS[..limits::index(len)], at)?;
        at += len;
    }
    Ok(())
}

/// Writes bytes at an offset, one page at a time, for the reason that [`zero_in_pages`] has.
pub(crate) fn write_in_pages(file: &File, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let len = limits::index(PAGE_LEN - at % PAGE_LEN).min(bytes.len());
        let (page, rest) = bytes.split_at(len);
        write_all_at(file, page, at)?;
        at += page.len() as u64;
        bytes = rest;
    }
    Ok(())
}

/// Writes a range of a file again as it is, one page at a time, so that the next sync puts it on stable storage even if
/// an earlier one failed: the page cache then takes those pages for written although they are not.
pub(crate) fn rewrite_in_pages(file: &File, range: std::ops::Range<u64>) -> io::Result<()> {
    let mut page = [0; limits::index(PAGE_LEN)];
    let mut at = range.start;
    while at < range.end {
        let want = limits::index(PAGE_LEN.min(range.end - at));
        let read = read_at(file, &mut page[..want], at)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        write_all_at(file, &page[..read], at)?;
        at += read as u64;
    }
    Ok(())
}

/// Writes all bytes at an offset without moving the file's position.
#[cfg(unix)]
pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

/// Writes all bytes at an offset.
#[cfg(windows)]
pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}

/// Reads at an offset without moving the file's position.
#[cfg(unix)]
pub(crate) fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, bytes, offset)
}

/// Reads at an offset.
#[cfg(windows)]
pub(crate) fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, bytes, offset)
}

/// A directory that is kept open, so that its names can be made durable also while no file can be opened, as where
/// descriptors run out.
#[derive(Debug)]
pub(crate) struct OpenDirectory {
    #[cfg(unix)]
    file: File,
}

impl OpenDirectory {
    pub(crate) fn open(directory: &std::path::Path) -> io::Result<OpenDirectory> {
        #[cfg(unix)]
        return Ok(OpenDirectory { file: File::open(directory)? });
        #[cfg(not(unix))]
        {
            let _ = directory;
            Ok(OpenDirectory {})
        }
    }

    /// As [`sync_directory`].
    pub(crate) fn sync(&self) -> io::Result<()> {
        #[cfg(unix)]
        self.file.sync_all()?;
        Ok(())
    }
}

/// Makes the names in a directory durable. Systems that cannot sync a directory keep names durable by themselves.
pub(crate) fn sync_directory(directory: &std::path::Path) -> io::Result<()> {
    #[cfg(unix)]
    return File::open(directory)?.sync_all();
    #[cfg(not(unix))]
    {
        let _ = directory;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> SegmentHeader {
        SegmentHeader {
            id: WalSegmentId { region: RegionId(1), shard: ShardId(2), first_lsn: Lsn(3) },
            cluster: ClusterId(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
            epoch: Epoch(4),
            chain_before: Chain(5),
            segment_size: MIN_SEGMENT_SIZE,
            version: SEGMENT_VERSION,
        }
    }

    #[test]
    fn a_header_survives_its_page() {
        assert_eq!(SegmentHeader::decode(&sample().encode()), Ok(sample()));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let page = sample().encode();
        for bit in 0..page.len() * 8 {
            let mut damaged = page;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn writing_in_pages_writes_the_same_bytes() {
        let file = tempfile::tempfile().unwrap();
        let written: Vec<u8> = (0..9_001_u32).map(|at| at.to_le_bytes()[0] | 1).collect();
        write_in_pages(&file, &written, 4_000).unwrap();
        let mut bytes = vec![9; 14_000];
        assert_eq!(read_at(&file, &mut bytes, 0).unwrap(), 13_001);
        assert!(bytes[4_000..13_001] == written && bytes[..4_000].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn zeroing_starts_and_ends_where_it_is_told() {
        let file = tempfile::tempfile().unwrap();
        write_all_at(&file, &[1; 10_000], 0).unwrap();
        zero_in_pages(&file, 100..9_000).unwrap();
        let mut bytes = vec![9; 10_000];
        assert_eq!(read_at(&file, &mut bytes, 0).unwrap(), 10_000);
        assert!(bytes[100..9_000].iter().all(|&byte| byte == 0));
        assert!(bytes[..100].iter().chain(&bytes[9_000..]).all(|&byte| byte == 1));
    }
}
