//! Reading segment files from disk, with reads alone: what recovery and the tools that only look have in common.
//!
//! Reads and not mappings, because a file that is damaged, cut short or being written by another process must give an
//! error or a wrong checksum, never a fault; and because large sequential reads are as fast as the checksum needs.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::limits::{BATCH_ALIGNMENT, BATCH_HEADER_LEN, PAGE_LEN, RECORD_HEADER_LEN, SEGMENT_HEADER_LEN};
use crate::types::{HybridTimestamp, Lsn, WalSegmentId};
use crate::wal::batch::{self, BATCH_VERSION, Batch, BatchError, BatchHeader, Expected, FLAG_SEALING};
use crate::wal::segment::{HEADER_PAGE, SEGMENT_VERSION, SegmentHeader, read_at, seals_nothing};
use crate::wal::walk_ahead::WalkedAhead;
use crate::zeros::is_zero;

#[allow(clippy::cast_possible_truncation, reason = "a small constant")]
const HEADER: usize = BATCH_HEADER_LEN as usize;
#[allow(clippy::cast_possible_truncation, reason = "a small constant")]
const PAGE: usize = PAGE_LEN as usize;
#[allow(clippy::cast_possible_truncation, reason = "a small constant")]
const STEP: usize = BATCH_ALIGNMENT as usize;
/// Bytes asked of the operating system at a time: few enough to be checked while they are in the cache.
const READ_LEN: usize = 256 * 1024;

/// Segments by name, oldest first.
pub(super) type Listing = Vec<(WalSegmentId, PathBuf)>;

/// The segments of a shard's directory, oldest first, and every other name in it.
pub(super) fn list(directory: &Path) -> Result<(Listing, Vec<PathBuf>)> {
    let (mut segments, mut others) = (Vec::new(), Vec::new());
    for entry in directory.read_dir().map_err(Error::io("read", directory))? {
        let path = entry.map_err(Error::io("read", directory))?.path();
        match path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<WalSegmentId>().ok()) {
            Some(id) => segments.push((id, path)),
            None => others.push(path),
        }
    }
    segments.sort_by_key(|(id, _)| (id.first_lsn, *id));
    others.sort();
    Ok((segments, others))
}

/// Where the bytes of a segment come from: a file, or whatever stands in for a disk.
pub(crate) trait ReadAt {
    /// Reads from `offset` on as much as fits, or less; 0 only at the end.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> std::io::Result<usize>;
}

impl ReadAt for File {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> std::io::Result<usize> {
        read_at(self, bytes, offset)
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..)).unwrap_or_default();
        let count = rest.len().min(bytes.len());
        bytes[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}

/// A segment file, read through one buffer that grows to the largest batch and no further.
pub(crate) struct SegmentFile {
    pub(super) path: PathBuf,
    /// Bytes in the file when it was opened.
    pub(super) len: u64,
    file: Box<dyn ReadAt>,
    buffer: Vec<u8>,
    /// So many bytes of the buffer are the file's.
    filled: usize,
    /// Where in the file `buffer` begins.
    buffered_from: u64,
    /// No batch of more bytes is taken into memory.
    pub(super) most: usize,
    /// What another thread has found out about its batches, for whoever looks at them next.
    pub(super) ahead: Option<WalkedAhead>,
}

impl SegmentFile {
    pub(super) fn open(path: &Path) -> Result<SegmentFile> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let len = file.metadata().map_err(Error::io("look at", path))?.len();
        Ok(SegmentFile::over(path, len, Box::new(file)))
    }

    /// The first `len` bytes of what need not be a file, under a name for errors.
    pub(crate) fn over(path: &Path, len: u64, file: Box<dyn ReadAt>) -> SegmentFile {
        SegmentFile {
            path: path.to_owned(),
            len,
            file,
            buffer: Vec::new(),
            filled: 0,
            buffered_from: 0,
            most: usize::MAX,
            ahead: None,
        }
    }

    /// The bytes from `at` on: `wanted` of them or more, fewer only where the file ends.
    pub(super) fn bytes(&mut self, at: u64, wanted: u64) -> Result<&[u8]> {
        let wanted = wanted.min(self.len.saturating_sub(at));
        if let Some(start) = self.position_in_buffer(at, wanted) {
            return Ok(&self.buffer[start..self.filled]);
        }
        let Some(wanted) = usize::try_from(wanted).ok().filter(|wanted| *wanted <= self.most) else {
            return Err(Error::corrupt(
                &self.path,
                at,
                None,
                "a batch is too large for this machine's memory".to_owned(),
            ));
        };
        // What is in the buffer already moves to its beginning; the rest is read behind it.
        let kept = self.position_in_buffer(at, 0).unwrap_or(self.filled)..self.filled;
        self.filled = kept.len();
        self.buffer.copy_within(kept, 0);
        self.buffered_from = at;
        let ahead = usize::try_from(self.len.saturating_sub(at)).map_or(READ_LEN, |rest| rest.min(READ_LEN));
        let (needed, wanted) = (wanted, wanted.max(ahead));
        if self.buffer.len() < wanted {
            self.buffer.resize(wanted, 0);
        }
        while self.filled < wanted {
            match self.file.read_at(&mut self.buffer[self.filled..wanted], at + self.filled as u64) {
                Ok(0) => break,
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // What was read ahead is nobody's trouble before it is asked for.
                Err(_) if self.filled >= needed => break,
                Err(error) => return Err(Error::io("read", &self.path)(error)),
            }
        }
        Ok(&self.buffer[..self.filled])
    }

    /// Where `at` is in the buffer, if that and `wanted` bytes from there on are in it.
    fn position_in_buffer(&self, at: u64, wanted: u64) -> Option<usize> {
        let start = usize::try_from(at.checked_sub(self.buffered_from)?).ok()?;
        let rest = self.filled.checked_sub(start)?;
        (rest as u64 >= wanted).then_some(start)
    }

    /// The header page; the inner error is what is wrong with it.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] for one of a later version, which is nothing wrong: whatever would be done about that is
    /// not.
    pub(super) fn header(&mut self) -> Result<Result<SegmentHeader, String>> {
        let len = self.len;
        let Some(page) = self.bytes(0, SEGMENT_HEADER_LEN)?.first_chunk::<HEADER_PAGE>() else {
            return Ok(Err(format!("its {len} bytes are too few for a header page")));
        };
        if is_zero(page) {
            return Ok(Err("its header page is blank".to_owned()));
        }
        if let Some(version) = SegmentHeader::newer_version(page) {
            let reason = format!(
                "written by a newer towline (segment version {version}; this one knows {SEGMENT_VERSION}); upgrade this one"
            );
            return Err(Error::Mismatch { path: self.path.clone(), reason: reason.into() });
        }
        Ok(SegmentHeader::decode(page))
    }

    /// The end of the last byte that is not zero at or after `from`; `from` where there is none.
    pub(super) fn extent(&mut self, from: u64) -> Result<u64> {
        let (mut at, mut extent) = (from, from);
        while at < self.len {
            let bytes = self.bytes(at, 1)?;
            if bytes.is_empty() {
                break;
            }
            if let Some(last) = last_non_zero(bytes) {
                extent = at + last as u64 + 1;
            }
            at += bytes.len() as u64;
        }
        Ok(extent)
    }
}

/// The index of the last byte that is not zero.
fn last_non_zero(bytes: &[u8]) -> Option<usize> {
    let mut end = bytes.len();
    for chunk in bytes.rchunks(PAGE) {
        if !is_zero(chunk) {
            let start = end - chunk.len();
            return chunk.iter().rposition(|&byte| byte != 0).map(|index| start + index);
        }
        end -= chunk.len();
    }
    None
}

/// How far a walk over batches came.
#[derive(Clone, Debug)]
pub(super) struct Walked {
    /// The end of the last valid batch, in bytes from the beginning of the file.
    pub(super) end: u64,
    /// What the batch after it must continue.
    pub(super) next: Expected,
    /// The newest timestamp; the default where there is no batch.
    pub(super) timestamp: HybridTimestamp,
    /// The highest LSN that a batch says was synced.
    pub(super) synced: Lsn,
    pub(super) batches: u64,
    pub(super) records: u64,
    /// Why it ended; `None` at a sealing batch or at the limit.
    pub(super) stopped: Option<BatchError>,
    pub(super) sealed: bool,
}

impl Walked {
    /// The LSN of the last record.
    pub(super) fn last_lsn(&self) -> Lsn {
        self.next.first_lsn.previous()
    }
}

/// Walks the batches of a segment from `at`, where a batch that continues `expected` is due, and verifies each, until
/// one is not valid, one seals, or `limit` is reached. The segment has `size` bytes. Batches must be such as can stand
/// in it, as far as its header can be read.
pub(super) fn walk(
    file: &mut SegmentFile,
    segment: Option<&SegmentHeader>,
    (mut at, limit, size): (u64, u64, u64),
    expected: Expected,
    mut visit: impl FnMut(u64, Batch<'_>),
) -> Result<Walked> {
    let mut walked = Walked {
        end: at,
        next: expected,
        timestamp: HybridTimestamp::default(),
        synced: Lsn::ZERO,
        batches: 0,
        records: 0,
        stopped: None,
        sealed: false,
    };
    while at < limit {
        let header = match verify_at(file, at, size, walked.next)? {
            Ok(header) => {
                let misplaced = match segment {
                    Some(segment) => segment.find_misplaced(at, &header),
                    None => seals_nothing(at, &header),
                };
                if let Some(reason) = misplaced {
                    walked.stopped = Some(BatchError::Invalid(reason.into()));
                    break;
                }
                header
            }
            Err(error) => {
                walked.stopped = Some(error);
                break;
            }
        };
        if let Some((batch, _)) = Batch::split_off(header, file.bytes(at, header.total_len())?) {
            visit(at, batch);
        }
        at += header.total_len();
        walked.end = at;
        walked.next = Expected { first_lsn: header.last_lsn().next(), chain: header.crc, ..walked.next };
        walked.timestamp = walked.timestamp.max(header.timestamp);
        walked.synced = walked.synced.max(header.synced_lsn);
        walked.batches += 1;
        walked.records += u64::from(header.record_count);
        if header.is_sealing() {
            walked.sealed = true;
            break;
        }
    }
    Ok(walked)
}

/// Verifies one batch, reading as much as it needs.
fn verify_at(
    file: &mut SegmentFile,
    at: u64,
    size: u64,
    expected: Expected,
) -> Result<Result<BatchHeader, BatchError>> {
    let room = size.saturating_sub(at);
    match batch::verify(file.bytes(at, BATCH_HEADER_LEN)?, room, expected) {
        // Only asked for after the header has proved to be the one due here, so a stray length reads nothing.
        Err(BatchError::Incomplete { needed }) => Ok(batch::verify(file.bytes(at, needed)?, room, expected)),
        result => Ok(result),
    }
}

/// Which batches can stand somewhere behind damage.
#[derive(Clone, Debug)]
pub(super) struct Plausible {
    /// The lowest first LSN: one behind the last record before the damage.
    pub(super) lowest: Lsn,
    /// The highest first LSN that a batch can have at offset `base`. Each later byte allows for a quarter of a record,
    /// because a record takes four bytes at least.
    pub(super) highest: Lsn,
    pub(super) base: u64,
    /// The epoch of the segment, if its header is readable, otherwise the oldest it can have.
    pub(super) epoch: std::ops::RangeInclusive<u64>,
}

/// Whether somewhere behind damage there is a batch that is consistent in itself: the next one at or after `from`.
///
/// What its predecessors were is not known there, so the chain that it says it continues is taken for granted; all
/// other rules are checked, the cheap ones first, and then the CRC. Bytes of a record can look like a batch; that they
/// also have an LSN and an epoch that fit takes a copy of a log with the same numbers inside a record of the log.
pub(super) fn next_consistent(
    file: &mut SegmentFile,
    from: u64,
    size: u64,
    plausible: &Plausible,
) -> Result<Option<(u64, BatchHeader)>> {
    let mut at = from.next_multiple_of(BATCH_ALIGNMENT);
    loop {
        let bytes = file.bytes(at, BATCH_HEADER_LEN)?;
        if bytes.len() < HEADER {
            return Ok(None);
        }
        match first_plausible(bytes, at, size, plausible) {
            Ok((found, header)) => {
                if has_its_crc(file, found, &header)? {
                    return Ok(Some((found, header)));
                }
                at = found + BATCH_ALIGNMENT;
            }
            Err(next) => at = next,
        }
    }
}

/// The first header in `bytes`, which begin at offset `at`, that can be one; else where to go on looking.
fn first_plausible(bytes: &[u8], at: u64, size: u64, plausible: &Plausible) -> Result<(u64, BatchHeader), u64> {
    let mut index = 0;
    while let Some(first) = bytes.get(index..).and_then(|rest| rest.first_chunk::<HEADER>()) {
        let offset = at + index as u64;
        let has_version = first[48..50] == BATCH_VERSION.to_le_bytes() && first[51..56] == [0; 5];
        if has_version {
            let header = BatchHeader::decode(first);
            if is_plausible(&header, offset, size, plausible) {
                return Ok((offset, header));
            }
        } else if first[8..16] == [0; 8] {
            // A header whose LSN would be in zeros is none: leave out zeros by the page.
            let rest = &bytes[index..];
            if rest.len() >= PAGE && is_zero(&rest[..PAGE]) {
                index += PAGE - STEP;
                continue;
            }
        }
        index += STEP;
    }
    Err(at + index as u64)
}

fn is_plausible(header: &BatchHeader, offset: u64, size: u64, plausible: &Plausible) -> bool {
    let records_behind = offset.saturating_sub(plausible.base) / RECORD_HEADER_LEN;
    header.flags & !FLAG_SEALING == 0
        && header.is_sealing() == (header.record_count == 0)
        && u64::from(header.record_count) * RECORD_HEADER_LEN <= u64::from(header.body_len)
        && (!header.is_sealing() || header.body_len == 0)
        && header.total_len() <= size.saturating_sub(offset)
        && plausible.epoch.contains(&header.epoch.0)
        && header.first_lsn >= plausible.lowest
        && header.first_lsn <= plausible.highest.plus(records_behind)
        && header.synced_lsn < header.first_lsn
}

/// Whether the CRC fits, in pieces, so that a stray length does not become a buffer of that size.
fn has_its_crc(file: &mut SegmentFile, at: u64, header: &BatchHeader) -> Result<bool> {
    let end = at + header.total_len();
    let (mut position, mut chain) = (at + 4, header.prev_crc);
    while position < end {
        let bytes = file.bytes(position, 1)?;
        let len = usize::try_from(end - position).unwrap_or(usize::MAX).min(bytes.len());
        if len == 0 {
            return Ok(false);
        }
        chain = batch::chain_after(chain, &bytes[..len]);
        position += len as u64;
    }
    Ok(chain == header.crc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Chain, Epoch};

    /// A file that is larger than the buffer: page of header, then batches with bodies of these sizes, then zeros.
    fn file_of(sizes: &[usize], len: usize) -> (tempfile::TempDir, SegmentFile, Vec<u64>) {
        let mut next = Expected { first_lsn: Lsn(1), chain: Chain(9), epoch: Epoch(1) };
        let (mut bytes, mut ends) = (vec![0; HEADER_PAGE], Vec::new());
        for (index, size) in sizes.iter().enumerate() {
            let record: Vec<u8> = (0..*size).map(|at| u8::try_from((at * 31 + index) % 251).unwrap()).collect();
            let batch = batch::build(next, HybridTimestamp(index as u64), Lsn::ZERO, &[&record]);
            let header = BatchHeader::decode(batch.first_chunk().unwrap());
            next = Expected { first_lsn: header.last_lsn().next(), chain: header.crc, ..next };
            bytes.extend(batch);
            ends.push(bytes.len() as u64);
        }
        bytes.resize(len, 0);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("segment");
        std::fs::write(&path, bytes).unwrap();
        let file = SegmentFile::open(&path).unwrap();
        (directory, file, ends)
    }

    const FIRST: Expected = Expected { first_lsn: Lsn(1), chain: Chain(9), epoch: Epoch(1) };
    const SIZES: [usize; 9] = [10, 700_000, 700_000, 2_500_000, 0, 1_048_576, 999, 1_040_000, 5];
    const LEN: usize = 8 * 1024 * 1024;

    #[test]
    fn a_walk_is_the_same_however_batches_lie_across_the_buffer() {
        let (_directory, mut file, ends) = file_of(&SIZES, LEN);
        let mut seen = Vec::new();
        let walked = walk(&mut file, None, (4096, LEN as u64, LEN as u64), FIRST, |at, batch| {
            seen.push(at + batch.header.total_len());
            assert_eq!(batch.records().next().unwrap().bytes.len(), SIZES[seen.len() - 1]);
        });
        let walked = walked.unwrap();
        assert_eq!(seen, ends);
        assert_eq!((walked.end, walked.records, walked.stopped), (*ends.last().unwrap(), 9, Some(BatchError::Blank)));
        assert_eq!(file.extent(walked.end).unwrap(), walked.end);
        assert!(ends[8] - file.extent(4096).unwrap() < 8, "but for padding");
    }

    #[test]
    fn behind_damage_each_batch_is_found_from_wherever_the_search_begins() {
        let (_directory, mut file, ends) = file_of(&SIZES, LEN);
        let plausible = Plausible { lowest: Lsn(1), highest: Lsn(1), base: 0, epoch: 1..=1 };
        let mut from = 0;
        for (index, end) in ends.iter().enumerate() {
            let (found, header) = next_consistent(&mut file, from, LEN as u64, &plausible).unwrap().unwrap();
            assert_eq!((found + header.total_len(), header.first_lsn), (*end, Lsn(index as u64 + 1)));
            from = found + 1;
        }
        assert_eq!(next_consistent(&mut file, from, LEN as u64, &plausible).unwrap(), None);
        let other_epoch = Plausible { epoch: 2..=9, ..plausible };
        assert_eq!(next_consistent(&mut file, 0, LEN as u64, &other_epoch).unwrap(), None);
    }

    #[test]
    fn the_extent_ends_with_the_last_byte_that_is_not_zero() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for last in [None, Some(0), Some(4095), Some(4096), Some(READ_LEN - 1), Some(READ_LEN), Some(READ_LEN + 300)] {
            let mut bytes = vec![0; READ_LEN + 301];
            if let Some(last) = last {
                bytes[last] = 1;
            }
            std::fs::write(&path, bytes).unwrap();
            let extent = SegmentFile::open(&path).unwrap().extent(0).unwrap();
            assert_eq!(extent, last.map_or(0, |last| last as u64 + 1));
        }
    }
}
