//! Mapped segments: the only unsafe code of the log.
//!
//! # Invariants
//!
//! 1. **Length.** A mapping is as long as its file, and the file keeps its length and its allocated blocks for as long
//!    as the mapping lives: before anything is stored to a mapping its file is filled, with real zeros or by having
//!    every page touched in a call that fails where there is no room ([`Mapping::populate`]); nobody truncates it, and
//!    the lock of the log's directory keeps others out. So no access can fault for want of room, except where the file
//!    system must find new blocks for every overwrite; a device that cannot read a page back is the other way to lose
//!    the process. A file that is still to be filled through the file itself ([`SegmentWriter::use_file_only`]) has its
//!    length and may lack blocks: reading it gives zeros, and nothing is stored to its mapping.
//! 2. **Below `published`, bytes never change** while the [`Segment`] lives. A file is recycled only by whoever holds
//!    the last reference to its segment and has made it: one that was there when the log was opened may have another
//!    [`Segment`], of whoever had the log open before. Such files are removed, or written again as they are.
//! 3. **Above `published`, bytes belong to the one [`SegmentWriter`]** of the segment. It cannot be cloned, is made
//!    together with its segment, and hands its bytes out through `&mut self` only.
//!
//! `published` is written by the segment writer alone (Release) and read by everyone else (Acquire): whoever sees a
//! value of it sees all bytes below.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use memmap2::MmapRaw;

use crate::error::{Error, Result};
use crate::limits::{self, PAGE_LEN, SEGMENT_HEADER_LEN};
use crate::types::{Lsn, WalSegmentId};
use crate::wal::batch::{BatchIter, Record};
use crate::wal::segment::{SegmentHeader, write_all_at, zero_in_pages};

/// Bytes of a cache line; being wrong only costs or wastes a prefetch.
const CACHE_LINE: usize = 64;
/// So many bytes more are fetched than two batches of a length take. Where the next one is longer than the last, as
/// with compact ones among others, its end would not be there when the mark moves: appends of 1 KiB took 140 ns with
/// lines missing and take 75.
const FETCH_BEYOND: u64 = 1024;

/// Bytes from which on a range is unmapped before it is synced: a group of commits, or one long record. Measured here
/// for 32 threads and records of 1 KiB, with 16 pages instead of 4: a tenth fewer commits a second.
#[cfg(target_os = "linux")]
const UNMAP_FROM: u64 = 4 * PAGE_LEN;

/// A whole file in memory.
#[derive(Debug)]
pub(crate) struct Mapping {
    raw: MmapRaw,
    len: u64,
    /// The device may still hold other bytes where the mapping has zeros. Written by who prepares the file and by the
    /// segment's writer, before it seals the segment: whoever sees it sealed (Acquire) sees this too.
    holds_old_bytes: AtomicBool,
}

impl Mapping {
    /// Maps the first `len` bytes of `file`, which must have them (invariant 1: the caller filled them).
    pub(crate) fn new(file: &File, len: u64) -> io::Result<Mapping> {
        let too_short = || io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than its mapping");
        if file.metadata()?.len() < len {
            return Err(too_short());
        }
        let map_len = usize::try_from(len).map_err(|_| too_short())?;
        let raw = memmap2::MmapOptions::new().len(map_len).map_raw(file)?;
        // Read-ahead would bring the pages of a segment in as large folios, and then one dirtied page costs a whole
        // folio at the next sync.
        #[cfg(unix)]
        let _ = raw.advise(memmap2::Advice::Random);
        Ok(Mapping { raw, len, holds_old_bytes: AtomicBool::new(false) })
    }

    /// Whether the device may still hold what the file held before it got its zeros, or what arrived and counts for
    /// nothing.
    pub(crate) fn set_holds_old_bytes(&self, may_hold: bool) {
        self.holds_old_bytes.store(may_hold, Ordering::Relaxed);
    }

    /// Writes the pages of a range back and waits until the device has them, as `fdatasync` does for a file.
    pub(crate) fn sync_range(&self, range: Range<u64>) -> io::Result<()> {
        self.unmap_pages(&range);
        let (start, len) = self.locate(&range);
        self.raw.flush_range(start, len)
    }

    /// Takes the pages of a long range out of the page table, all at once. To write a page back the kernel must make
    /// it read-only where it is mapped, and tells the other processors so page by page: measured here, half of a
    /// processor for 200 MB/s, and 1.7 us for a page. Pages that are not mapped need none of that; who reads them again
    /// takes a cheap fault.
    pub(crate) fn unmap_pages(&self, range: &Range<u64>) {
        #[cfg(target_os = "linux")]
        if range.end - range.start >= UNMAP_FROM {
            let whole = range.start.next_multiple_of(PAGE_LEN)..range.end - range.end % PAGE_LEN;
            let (start, len) = self.locate(&whole);
            // SAFETY: a shared mapping of a file (it is made nowhere else than in `new`): its bytes stay in the page
            // cache, dirty ones included, so nothing changes for any slice (invariants 1 and 2).
            let _ = unsafe { self.raw.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// Takes the faults of a range now, so that the writer need not; of a hole in the file, this fills it with zeros
    /// one page at a time, as stores would. Says whether it could: not everywhere, and not without room on the disk.
    /// Then nothing has changed that a store would notice.
    pub(crate) fn populate(&self, range: Range<u64>) -> bool {
        #[cfg(target_os = "linux")]
        {
            let (start, len) = self.locate(&range);
            self.raw.advise_range(memmap2::Advice::PopulateWrite, start, len).is_ok()
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = range;
            false
        }
    }

    /// Start and length of a range, checked against the mapping.
    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "below `len`, which fitted in a usize when it was mapped")]
    fn locate(&self, range: &Range<u64>) -> (usize, usize) {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a mapping of {} bytes", self.len);
        (range.start as usize, (range.end - range.start) as usize)
    }

    /// Asks for the cache lines of a range, to be written soon. Only advice.
    #[inline]
    fn prefetch_for_writing(&self, range: Range<u64>) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
            let (start, len) = self.locate(&(range.start.min(self.len)..range.end.min(self.len)));
            for offset in (start..start + len).step_by(CACHE_LINE) {
                // SAFETY: inside the mapping (just checked); a prefetch reads nothing and cannot fault.
                unsafe { _mm_prefetch::<_MM_HINT_ET0>(self.raw.as_ptr().add(offset).cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = range;
    }

    /// # Safety
    ///
    /// Nobody may write to the range while the slice lives.
    #[inline]
    unsafe fn slice(&self, range: Range<u64>) -> &[u8] {
        let (start, len) = self.locate(&range);
        // SAFETY: inside the mapping (just checked), which lives as long as `self` and cannot fault (invariant 1);
        // unchanging by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.raw.as_ptr().add(start), len) }
    }

    /// # Safety
    ///
    /// Nobody else may read or write the range while the slice lives.
    #[inline]
    #[allow(clippy::mut_from_ref, reason = "exclusive by the caller's promise")]
    unsafe fn slice_mut(&self, range: Range<u64>) -> &mut [u8] {
        let (start, len) = self.locate(&range);
        // SAFETY: inside the mapping (just checked), which lives as long as `self` and cannot fault (invariant 1);
        // exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.raw.as_mut_ptr().add(start), len) }
    }
}

/// A count that the processor keeps at a steady rate of one to five a nanosecond, asleep or not; none where it does
/// not, or is not known to. Other processors may be ahead or behind. Here for its unsafe calls only.
#[inline]
pub(crate) fn processor_ticks() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__cpuid, _rdtsc};
        const POWER_MANAGEMENT: u32 = 0x8000_0007;
        const INVARIANT: u32 = 1 << 8;
        static IS_STEADY: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        // SAFETY: every processor of this architecture has the instruction.
        #[allow(unused_unsafe, reason = "newer compilers know that it is safe")]
        let cpuid = |leaf| unsafe { __cpuid(leaf) };
        let is_steady = *IS_STEADY
            .get_or_init(|| cpuid(0x8000_0000).eax >= POWER_MANAGEMENT && cpuid(POWER_MANAGEMENT).edx & INVARIANT != 0);
        // SAFETY: reads a counter and nothing else; every processor of this architecture has it.
        is_steady.then(|| unsafe { _rdtsc() })
    }
    #[cfg(not(target_arch = "x86_64"))]
    None
}

/// One mapped segment, shared by its writer and its readers.
pub struct Segment {
    header: SegmentHeader,
    path: PathBuf,
    mapping: Mapping,
    /// Bytes that readers may read. Written by the one [`SegmentWriter`] (Release), read by anyone (Acquire).
    published: AtomicU64,
    /// 0 while open; then one more than the last LSN. Set (Release) by the segment writer after it published the
    /// sealing batch: whoever sees it sees the final `published`.
    sealed: AtomicU64,
}

impl Segment {
    /// Takes a filled file into use as the segment that `header` describes, with `published` bytes that are valid
    /// already and, if it is sealed, its last LSN; and gives its one writer along.
    pub(crate) fn new(
        header: SegmentHeader,
        path: PathBuf,
        file: File,
        mapping: Mapping,
        published: u64,
        sealed: Option<Lsn>,
    ) -> (Arc<Segment>, SegmentWriter) {
        let segment = Arc::new(Segment {
            header,
            path,
            mapping,
            published: AtomicU64::new(published),
            sealed: AtomicU64::new(sealed.map_or(0, |last_lsn| last_lsn.next().0)),
        });
        (Arc::clone(&segment), SegmentWriter { segment, file, end: published, fetched: 0, stores: true })
    }

    /// What its header page says.
    #[must_use]
    pub fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> WalSegmentId {
        self.header.id
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that may be read, header page included.
    #[must_use]
    #[inline]
    pub fn published(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }

    /// Whether it will never grow again. If so, [`published`](Self::published) read afterwards is final.
    #[must_use]
    #[inline]
    pub fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::Acquire) != 0
    }

    /// The last LSN in it, known once it is sealed.
    #[must_use]
    #[inline]
    pub fn sealed_last_lsn(&self) -> Option<Lsn> {
        self.sealed.load(Ordering::Acquire).checked_sub(1).map(Lsn)
    }

    /// Published bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the range is not published.
    #[inline]
    pub fn bytes(&self, range: Range<u64>) -> Result<&[u8]> {
        if range.start > range.end || range.end > self.published() {
            return Err(Error::invalid(format!(
                "bytes {}..{} of {} are not published",
                range.start, range.end, self.header.id
            )));
        }
        // SAFETY: below `published`, where bytes never change (invariant 2).
        Ok(unsafe { self.mapping.slice(range) })
    }

    /// Where to sync to so that the published bytes are as they should be after a power cut: where the device may hold
    /// something else behind the last of them, and nothing more comes, to the end.
    pub(crate) fn sync_end(&self, is_sealed: bool) -> u64 {
        if is_sealed && self.mapping.holds_old_bytes.load(Ordering::Relaxed) {
            self.mapping.len
        } else {
            self.published()
        }
    }

    /// Puts a range on stable storage.
    pub(crate) fn sync_range(&self, range: Range<u64>) -> Result<()> {
        self.mapping.sync_range(range).map_err(Error::io("sync", &self.path))
    }

    /// Takes page faults ahead of the writer.
    pub(crate) fn populate(&self, range: Range<u64>) {
        let _ = self.mapping.populate(range);
    }
}

impl std::fmt::Debug for Segment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Segment")
            .field("id", &self.header.id.to_string())
            .field("published", &self.published())
            .field("sealed", &self.is_sealed())
            .finish_non_exhaustive()
    }
}

/// The only way to put bytes into a segment.
#[derive(Debug)]
pub(crate) struct SegmentWriter {
    segment: Arc<Segment>,
    /// The file below the mapping. Sealed segments have none open, so that a long log does not use up descriptors.
    file: File,
    /// Equal to `segment.published`, without the atomic load.
    end: u64,
    /// Up to where cache lines have been fetched ahead.
    fetched: u64,
    /// Whether bytes may go in through the mapping: the file has all its blocks.
    stores: bool,
}

impl SegmentWriter {
    /// The segment written to.
    pub(crate) fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// Bytes published so far.
    #[inline]
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Bytes that are left.
    #[inline]
    pub(crate) fn room(&self) -> u64 {
        self.segment.mapping.len - self.end
    }

    /// The file lacks blocks: from now on bytes go in with [`write_unpublished`](Self::write_unpublished) only, until
    /// [`fill`](Self::fill) has been called.
    pub(crate) fn use_file_only(&mut self) {
        self.stores = false;
    }

    /// Whether bytes may go in through the mapping.
    #[inline]
    pub(crate) fn takes_stores(&self) -> bool {
        self.stores
    }

    /// Gives the rest of the file its blocks, so that bytes may go in through the mapping.
    pub(crate) fn fill(&mut self) -> io::Result<()> {
        zero_in_pages(&self.file, self.end..self.segment.mapping.len)?;
        self.stores = true;
        Ok(())
    }

    /// From now on nothing can be written to the file, as where there is no room.
    #[cfg(test)]
    pub(crate) fn refuse_writes(&mut self) -> io::Result<()> {
        self.file = File::open(self.segment.path())?;
        Ok(())
    }

    /// The unpublished bytes `from..to`, counted from the published end.
    #[inline]
    pub(crate) fn unpublished(&mut self, range: Range<u64>) -> &mut [u8] {
        assert!(self.stores, "storing to a mapping whose file lacks blocks");
        // Checked here, so that no sum can wrap to below `published`.
        assert!(range.start <= range.end && range.end <= self.room(), "{range:?} of {} bytes left", self.room());
        let range = self.end + range.start..self.end + range.end;
        // SAFETY: above `published`, which only this writer touches, and `&mut self` makes the slice the only one
        // (invariant 3).
        unsafe { self.segment.mapping.slice_mut(range) }
    }

    /// Fills unpublished bytes, `from` being counted from the published end, through the file instead of the mapping:
    /// one system call, and no page fault for each page. Readers of the mapping see them once they are published,
    /// because both are views of the same page cache; that holds on Linux, so it is used there only.
    pub(crate) fn write_unpublished(&mut self, from: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(self.room().checked_sub(from) >= Some(bytes.len() as u64), "writing past the end of a segment");
        write_all_at(&self.file, bytes, self.end + from)
    }

    /// After a write that failed, or is to count for nothing: leaves zeros where a part of it may be, as well as may
    /// be. What is left all the same are batches that nobody was told of, or the beginning of one, and the next one
    /// begins in the same place.
    pub(crate) fn clear_unpublished(&mut self, len: u64) {
        if len > 0 {
            // The system may have written them to the device already.
            self.segment.mapping.set_holds_old_bytes(true);
        }
        if self.stores {
            return self.unpublished(0..len.min(self.room())).fill(0);
        }
        let to = (self.end + len).min(self.segment.mapping.len);
        for page in (self.end..to).step_by(limits::index(PAGE_LEN)) {
            let _ = zero_in_pages(&self.file, page..(page + PAGE_LEN).min(to));
        }
    }

    /// Lets readers see `len` more bytes, which the caller has filled and checked.
    #[inline]
    pub(crate) fn publish(&mut self, len: u64) {
        assert!(len <= self.room(), "publishing past the end of a segment");
        self.end += len;
        self.segment.published.store(self.end, Ordering::Release);
    }

    /// Has the cache lines fetched that the batch after the next will be written to, if batches stay as long as `len`.
    /// The mark that moves after each batch waits for every store before it: measured here, fetching ahead takes a
    /// third off appends of 1 KiB. Each line once, and none is left out where lengths differ.
    #[inline]
    pub(crate) fn prefetch(&mut self, len: u64) {
        let (from, to) = (self.fetched.max(self.end + len), self.end + 2 * len + FETCH_BEYOND);
        if from < to {
            self.segment.mapping.prefetch_for_writing(from - from % CACHE_LINE as u64..to);
            self.fetched = to.next_multiple_of(CACHE_LINE as u64);
        }
    }

    /// Says that the segment never grows again; the sealing batch has been published.
    pub(crate) fn seal(self, last_lsn: Lsn) {
        self.segment.sealed.store(last_lsn.next().0, Ordering::Release);
    }
}

/// A range of published log bytes that keeps its segment mapped: what shippers send and in-process streams carry.
#[derive(Clone, Debug)]
pub struct LogRange {
    segment: Arc<Segment>,
    start: u64,
    end: u64,
}

impl LogRange {
    /// A range of published bytes of a segment, which may begin and end within batches: see [`batches`](Self::batches).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the range is not published.
    pub fn new(segment: Arc<Segment>, range: Range<u64>) -> Result<LogRange> {
        segment.bytes(range.clone())?;
        Ok(LogRange { segment, start: range.start, end: range.end })
    }

    /// The segment it is a part of.
    #[must_use]
    pub fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// Where it begins in its segment, in bytes.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Where it ends in its segment, in bytes.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.end
    }

    /// How many bytes it has.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The batches in it, header page left out: all of them, of a range that
    /// [`LogReader::next`](super::LogReader::next) or [`Log::ranges_from`](super::Log::ranges_from) gave.
    ///
    /// Other ranges, whether made by [`new`](Self::new) or given to a [transport](crate::transport) to be sent, may
    /// begin and end anywhere. Of one that begins at a batch or within the header page, these are the batches up to the
    /// end, without one that the end cuts: whoever wants that one too goes on where it begins, not where the range
    /// ends. Of one that begins anywhere else there may be none, or what only looks like batches: nothing is checked
    /// here but that they lie within the range.
    #[must_use]
    pub fn batches(&self) -> BatchIter<'_> {
        let bytes = self.bytes();
        let skip = usize::try_from(SEGMENT_HEADER_LEN.saturating_sub(self.start)).unwrap_or(usize::MAX);
        BatchIter::within(self.segment.header(), bytes.get(skip..).unwrap_or_default())
    }

    /// The records of all its [batches](Self::batches), in order.
    pub fn records(&self) -> impl Iterator<Item = Record<'_>> + Clone {
        self.batches().flat_map(|batch| batch.records())
    }

    /// The bytes.
    #[must_use]
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: was below `published` when the range was made, and stays so; bytes there never change (invariant 2).
        unsafe { self.segment.mapping.slice(self.start..self.end) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Chain, ClusterId, Epoch, RegionId, ShardId};
    use crate::wal::segment::SEGMENT_VERSION;

    fn segment(published: u64) -> (Arc<Segment>, SegmentWriter, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("segment");
        std::fs::write(&path, vec![0; 65536]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mapping = Mapping::new(&file, 65536).unwrap();
        let header = SegmentHeader {
            id: WalSegmentId { region: RegionId(0), shard: ShardId(0), first_lsn: Lsn(1) },
            cluster: ClusterId(1),
            epoch: Epoch(1),
            chain_before: Chain(0),
            segment_size: 65536,
            version: SEGMENT_VERSION,
        };
        let (segment, writer) = Segment::new(header, path, file, mapping, published, None);
        (segment, writer, dir)
    }

    #[test]
    fn readers_see_what_is_published_and_nothing_else() {
        let (segment, mut writer, _dir) = segment(0);
        writer.unpublished(0..5).copy_from_slice(b"hello");
        assert!(segment.bytes(0..5).is_err());
        writer.publish(5);
        assert_eq!(segment.bytes(0..5).unwrap(), b"hello");
        assert!(segment.bytes(0..6).is_err());
        let range = LogRange::new(segment, 1..3).unwrap();
        assert_eq!(range.bytes(), b"el");
        writer.seal(Lsn(9));
        assert_eq!(range.segment().sealed_last_lsn(), Some(Lsn(9)));
    }

    #[test]
    fn only_a_sealed_segment_that_may_hold_old_bytes_is_synced_to_its_end() {
        let (segment, _writer, dir) = segment(4096);
        assert_eq!([false, true].map(|is_sealed| segment.sync_end(is_sealed)), [4096; 2]);
        let file = File::options().read(true).write(true).open(segment.path()).unwrap();
        let mapping = Mapping::new(&file, 65536).unwrap();
        mapping.set_holds_old_bytes(true);
        let path = dir.path().join("segment");
        let (segment, writer) = Segment::new(*segment.header(), path, file, mapping, 4096, None);
        assert_eq!([false, true].map(|is_sealed| segment.sync_end(is_sealed)), [4096, 65536]);
        segment.sync_range(0..65536).unwrap();
        drop(writer);
        // Or where the beginning of a batch stood that did not come whole.
        let (segment, mut writer, _dir) = self::segment(4096);
        writer.clear_unpublished(0);
        assert_eq!(segment.sync_end(true), 4096);
        writer.clear_unpublished(1);
        assert_eq!([false, true].map(|is_sealed| segment.sync_end(is_sealed)), [4096, 65536]);
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("short");
        std::fs::write(&path, [0; 100]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        assert!(Mapping::new(&file, 65536).is_err());
    }

    #[test]
    fn concurrent_readers_only_ever_see_finished_bytes() {
        let (segment, mut writer, _dir) = segment(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut seen = 0;
                while seen < 65536 {
                    let published = segment.published();
                    assert!(published >= seen);
                    assert!(segment.bytes(seen..published).unwrap().iter().all(|&byte| byte == 7));
                    seen = published;
                }
            });
            for _ in 0..65536 / 64 {
                writer.unpublished(0..64).fill(7);
                writer.publish(64);
            }
        });
    }
}
