//! Mending a damaged log with bytes that another copy of it still has.
//!
//! The log is walked as [recovery](super::recovery) walks it. Where the walk stops although something behind that place
//! was synced, the bytes up to the next batch that is consistent in itself, or to the end of the segment where there is
//! none, are fetched and put in their place.
//!
//! # What is believed
//!
//! Nothing. What came must be batches that continue the chain before the damage, and where anything of the log
//! follows, it must end exactly where that begins, with the LSN and the chain that it continues. A header page must
//! continue the segment before. If that does not hold, the other copy has another history, and all is left as it is.
//! A log that begins past LSN 1 and has lost its first header needs at least one batch of its own for that.
//!
//! # What a crash leaves
//!
//! Each segment to be changed is made anew in a file beside it, with whatever was sound of the old one. Only when the
//! whole log has been walked to its end, over those files, are they synced and renamed over the old ones, oldest first.
//! So a crash leaves old segments or mended ones, and never a part of one; the next repair goes on from there.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::limits::{PAGE_LEN, SEGMENT_HEADER_LEN};
use crate::types::{Epoch, Lsn, WalSegmentId};
use crate::wal::batch::{BatchHeader, Expected};
use crate::wal::cut::{is_staged_name, staged_name};
use crate::wal::recovery::LogIdentity;
use crate::wal::segment::{SegmentHeader, sync_directory, write_all_at, zero_in_pages};
use crate::wal::walk::{self, Plausible, SegmentFile};

/// Another copy of the log.
pub(crate) trait Source {
    /// Gives `put` the bytes of a segment from `range.start` on, in order, up to `range.end` or where its batches end,
    /// and says where that is. Offsets handed to `put` lie within the range.
    fn fetch(&mut self, segment: Lsn, range: Range<u64>, put: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<u64>;

    /// What it is called, for messages.
    fn name(&self) -> &str;
}

/// One range of a log that was, or would be, put in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MendedRange {
    /// The segment file.
    pub path: PathBuf,
    /// Where in it the range begins, in bytes.
    pub offset: u64,
    /// Bytes of it.
    pub len: u64,
    /// The LSN that was due there; of the first record in the segment where its header was damaged.
    pub lsn: Lsn,
    /// What was wrong.
    pub reason: String,
    /// Whether the bytes came from the other copy. Otherwise they are zeros, where nothing else belongs.
    pub fetched: bool,
}

/// How mending is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mending<'a> {
    pub(crate) directory: &'a Path,
    pub(crate) identity: &'a LogIdentity,
    /// Highest LSN known to have been synced: from a checkpoint, and from the batches of the log.
    pub(crate) synced: Lsn,
    /// Where segments are made anew: the log's directory, or another one if nothing is to be put in place.
    pub(crate) staging: &'a Path,
}

impl Mending<'_> {
    /// Mends the log, and says what was changed; or only what would be, where the staging directory is another one. The
    /// caller keeps everybody else out of the directory.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] where the other copy does not fit, [`Error::Mismatch`] for a segment of another log, what the
    /// source gives, and [`Error::Io`]. Nothing has been changed then, unless putting files in place failed.
    pub(crate) fn run(self, source: &mut dyn Source) -> Result<Vec<MendedRange>> {
        let (listed, others) = walk::list(self.directory)?;
        let in_place = self.staging == self.directory;
        for path in others.iter().filter(|_| in_place) {
            if path.file_name().and_then(|name| name.to_str()).is_some_and(is_staged_name) {
                std::fs::remove_file(path).map_err(Error::io("remove", path))?;
            }
        }
        let mut mender = Mender { mending: self, source, next: None, ranges: Vec::new(), staged: Vec::new() };
        mender.walk(&listed)?;
        if in_place {
            mender.put_in_place()?;
        }
        Ok(std::mem::take(&mut mender.ranges))
    }
}

/// A segment made anew.
struct Staged {
    path: PathBuf,
    file: File,
    /// The file that it replaces.
    takes_place_of: PathBuf,
}

struct Mender<'a> {
    mending: Mending<'a>,
    source: &'a mut dyn Source,
    /// What the next segment must continue; `None` before the first of a log that begins past LSN 1.
    next: Option<Expected>,
    ranges: Vec<MendedRange>,
    /// Oldest first.
    staged: Vec<Staged>,
}

/// The segment at hand.
struct Work {
    id: WalSegmentId,
    /// Its name in the log's directory.
    path: PathBuf,
    /// Whether a file of that name is there.
    exists: bool,
    /// Which of the staged files it has become.
    staged: Option<usize>,
}

/// How far a segment could be read, and mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Sealed,
    /// Nothing behind it was synced.
    Open,
}

impl Mender<'_> {
    /// Walks the log from its oldest segment, and mends on the way.
    fn walk(&mut self, listed: &[(WalSegmentId, PathBuf)]) -> Result<()> {
        let Mending { directory, identity, synced, .. } = self.mending;
        let Some((first, _)) = listed.first() else {
            if synced == Lsn::ZERO {
                return Ok(());
            }
            let reason = format!(
                "LSN {synced} was synced, and not one segment is left to check another copy against; \
                 remove the node's directory and let the node follow anew"
            );
            return Err(Error::corrupt(directory, 0, None, reason));
        };
        if first.first_lsn == Lsn::FIRST {
            self.next = Some(Expected { first_lsn: Lsn::FIRST, chain: identity.genesis(), epoch: Epoch::ZERO });
        }
        for (id, path) in listed {
            identity.check_name(*id).map_err(|reason| mismatch(path, reason))?;
            while let Some(next) = self.next.filter(|next| next.first_lsn < id.first_lsn) {
                if next.first_lsn > self.mending.synced {
                    // A torn tail: recovery cuts what stands behind it.
                    return Ok(());
                }
                self.mend_missing(next.first_lsn)?;
            }
            if let Some(next) = self.next.filter(|next| next.first_lsn > id.first_lsn) {
                let reason = format!("it begins with LSN {} where LSN {} is due", id.first_lsn, next.first_lsn);
                return Err(mismatch(
                    path,
                    format!("{reason}; which of the two belongs here is not for a repair to say"),
                ));
            }
            let work = Work { id: *id, path: path.clone(), exists: true, staged: None };
            if self.mend(work)? == End::Open {
                return Ok(());
            }
        }
        while let Some(next) = self.next.filter(|next| next.first_lsn <= self.mending.synced) {
            if self.mend_missing(next.first_lsn)? == End::Open {
                break;
            }
        }
        Ok(())
    }

    /// Mends a segment of which there is no file.
    fn mend_missing(&mut self, first_lsn: Lsn) -> Result<End> {
        let LogIdentity { region, shard, .. } = *self.mending.identity;
        let id = WalSegmentId { region, shard, first_lsn };
        let path = self.mending.directory.join(id.to_string());
        self.mend(Work { id, path, exists: false, staged: None })
    }

    /// Mends one segment, from its header to its end.
    fn mend(&mut self, mut work: Work) -> Result<End> {
        let size = self.mending.identity.segment_size;
        let Some((header, header_fetched)) = self.mend_header(&mut work)? else { return Ok(End::Open) };
        let begins_log = self.next.is_none();
        let mut due = Expected { first_lsn: work.id.first_lsn, chain: header.chain_before, epoch: header.epoch };
        let (mut at, mut own_batches) = (SEGMENT_HEADER_LEN, 0);
        let end = loop {
            let mut file = self.open(&work)?;
            let walked = walk::walk(&mut file, (at, size, size), due, |_, _| {})?;
            (at, due) = (walked.end, walked.next);
            own_batches += walked.batches;
            self.mending.synced = self.mending.synced.max(walked.synced);
            if walked.sealed {
                break End::Sealed;
            }
            let candidate = Self::next_batch(&mut file, at, size, due)?;
            if self.mending.synced < due.first_lsn {
                break End::Open;
            }
            let reason = if !work.exists {
                "the file is not there".to_owned()
            } else {
                walked.stopped.map_or_else(|| "it is not sealed".to_owned(), |error| error.to_string())
            };
            let sealed;
            (at, due, sealed) = self.mend_range(&mut work, (at, due), candidate, reason)?;
            if sealed {
                break End::Sealed;
            }
            if candidate.is_none() {
                if due.first_lsn > self.mending.synced {
                    break End::Open;
                }
                let reason = format!("{} has it only up to LSN {}", self.source.name(), due.first_lsn.previous());
                return Err(self.refusal(&work, at, due.first_lsn, &reason));
            }
        };
        if begins_log && header_fetched && own_batches == 0 {
            let reason = "neither its header nor a batch of it is left to check another copy against";
            return Err(self.refusal(&work, 0, work.id.first_lsn, reason));
        }
        if end == End::Sealed {
            self.clear_behind(&mut work, at, due)?;
        }
        self.next = Some(due);
        Ok(end)
    }

    /// The segment's header, fetched if it cannot be read or is not the one due here; and whether it was. None where
    /// nothing from there on was synced.
    fn mend_header(&mut self, work: &mut Work) -> Result<Option<(SegmentHeader, bool)>> {
        let reason = if work.exists {
            match self.open(work)?.header()? {
                Ok(header) => {
                    self.mending.identity.check(&header).map_err(|reason| mismatch(&work.path, reason))?;
                    match self.continues(work.id, &header) {
                        Ok(()) => return Ok(Some((header, false))),
                        Err(reason) => reason,
                    }
                }
                Err(reason) => reason,
            }
        } else {
            "the file is not there".to_owned()
        };
        if self.next.is_some_and(|next| self.mending.synced < next.first_lsn) {
            return Ok(None);
        }
        let end = self.fetch(work, 0..SEGMENT_HEADER_LEN)?;
        let header = self.open(work)?.header()?;
        let checked = header.and_then(|header| self.mending.identity.check(&header).map(|()| header));
        let header = match checked {
            Ok(header) if end == SEGMENT_HEADER_LEN => header,
            Ok(_) => return Err(Error::protocol(self.source.name(), "it sent less than a header page")),
            Err(reason) => {
                let reason = format!("the header page that it sent for {} is none: {reason}", work.id);
                return Err(Error::protocol(self.source.name(), reason));
            }
        };
        if let Err(other) = self.continues(work.id, &header) {
            let reason = format!("{reason}; and of the header that {} has: {other}", self.source.name());
            return Err(self.refusal(work, 0, work.id.first_lsn, &reason));
        }
        self.note(work, 0..SEGMENT_HEADER_LEN, work.id.first_lsn, reason, true);
        Ok(Some((header, true)))
    }

    /// Whether a header is the one due next, and if not, why.
    fn continues(&self, id: WalSegmentId, header: &SegmentHeader) -> Result<(), String> {
        if header.id != id {
            return Err(format!("its header calls it {}", header.id));
        }
        let Some(due) = self.next else { return Ok(()) };
        if header.chain_before != due.chain {
            return Err(format!(
                "it continues chain {:08x}, but the log so far has chain {:08x}",
                header.chain_before.0, due.chain.0
            ));
        }
        if header.epoch < due.epoch {
            return Err(format!("its epoch is {}, behind a segment of epoch {}", header.epoch, due.epoch));
        }
        Ok(())
    }

    /// The next batch of the segment itself behind a place where it cannot be read.
    fn next_batch(file: &mut SegmentFile, at: u64, size: u64, due: Expected) -> Result<Option<(u64, BatchHeader)>> {
        // Of any epoch: one that does not fit is to be seen, not to be written over.
        let plausible = Plausible { lowest: due.first_lsn, highest: due.first_lsn, base: at, epoch: 0..=u64::MAX };
        walk::next_consistent(file, at, size, &plausible)
    }

    /// Fetches what is due at `at`, up to the segment's own `next` batch or the end of its batches, and checks that it
    /// fits. Gives the place behind it, and whether a sealing batch stands before that.
    fn mend_range(
        &mut self,
        work: &mut Work,
        (at, due): (u64, Expected),
        next: Option<(u64, BatchHeader)>,
        reason: String,
    ) -> Result<(u64, Expected, bool)> {
        let size = self.mending.identity.segment_size;
        let asked = at..next.map_or(size, |(offset, _)| offset);
        let end = self.fetch(work, asked)?;
        if end == at {
            let reason = format!("{reason}; and {} has no more of this segment", self.source.name());
            return Err(self.refusal(work, at, due.first_lsn, &reason));
        }
        let mut file = self.open(work)?;
        let came = walk::walk(&mut file, (at, end, size), due, |_, _| {})?;
        if came.end == at {
            let of_other_history = Self::next_batch(&mut file, at, size, due)?.filter(|(offset, _)| *offset == at);
            return Err(match of_other_history {
                Some((_, other)) if other.prev_crc != due.chain || other.epoch != due.epoch => {
                    let reason = format!(
                        "the log has chain {:08x} and epoch {} before it, but {} continues chain {:08x} in epoch {}: \
                         another history",
                        due.chain.0,
                        due.epoch,
                        self.source.name(),
                        other.prev_crc.0,
                        other.epoch
                    );
                    self.refusal(work, at, due.first_lsn, &reason)
                }
                _ => {
                    let stopped = came.stopped.map_or_else(String::new, |error| error.to_string());
                    let reason = format!("what it sent for {} at offset {at} is no batch: {stopped}", work.id);
                    Error::protocol(self.source.name(), reason)
                }
            });
        }
        if came.end != end {
            let reason = format!("what it sent for {} ends within a batch, at offset {end}", work.id);
            if next.is_none() {
                return Err(Error::protocol(self.source.name(), reason));
            }
        }
        if let Some((offset, own)) = next {
            let fits = (came.end, came.next.chain, came.next.first_lsn, due.epoch)
                == (offset, own.prev_crc, own.first_lsn, own.epoch)
                && !came.sealed;
            if !fits {
                let reason = format!(
                    "the log goes on at offset {offset} with LSN {} after chain {:08x}, but {} reaches LSN {} at offset \
                     {} with chain {:08x}: another history",
                    own.first_lsn,
                    own.prev_crc.0,
                    self.source.name(),
                    came.next.first_lsn,
                    came.end,
                    came.next.chain.0
                );
                return Err(self.refusal(work, at, due.first_lsn, &reason));
            }
        }
        self.note(work, at..came.end, due.first_lsn, reason, true);
        Ok((came.end, came.next, came.sealed))
    }

    /// Behind the sealing batch there are zeros, up to the size of a segment.
    fn clear_behind(&mut self, work: &mut Work, end: u64, due: Expected) -> Result<()> {
        let size = self.mending.identity.segment_size;
        let mut file = self.open(work)?;
        let (extent, len) = (file.extent(end)?, file.len);
        if extent > end {
            let staged = self.stage(work)?;
            zero_in_pages(&staged.file, end..size).map_err(Error::io("write", &staged.path))?;
            let reason = "bytes behind the sealing batch are not all zeros".to_owned();
            self.note(work, end..extent.min(size), due.first_lsn, reason, false);
        } else if len != size {
            self.stage(work)?;
            let reason = format!("the file has {len} bytes where {size} are due");
            self.note(work, len.min(size)..size, due.first_lsn, reason, false);
        }
        Ok(())
    }

    fn note(&mut self, work: &Work, range: Range<u64>, lsn: Lsn, reason: String, fetched: bool) {
        let (offset, len) = (range.start, range.end - range.start);
        self.ranges.push(MendedRange { path: work.path.clone(), offset, len, lsn, reason, fetched });
    }

    fn open(&self, work: &Work) -> Result<SegmentFile> {
        let staged = work.staged.and_then(|index| self.staged.get(index));
        SegmentFile::open(staged.map_or(&work.path, |staged| &staged.path))
    }

    /// Fetches a range into the segment's new file.
    fn fetch(&mut self, work: &mut Work, range: Range<u64>) -> Result<u64> {
        self.stage(work)?;
        let Mender { source, staged, .. } = self;
        let staged = work.staged.and_then(|index| staged.get(index));
        source.fetch(work.id.first_lsn, range, &mut |offset, bytes| match staged {
            Some(staged) => write_in_pages(&staged.file, bytes, offset).map_err(Error::io("write", &staged.path)),
            None => Ok(()),
        })
    }

    /// Makes the segment's new file, if that has not been done: what the old one has, and zeros up to the size that is
    /// due.
    fn stage(&mut self, work: &mut Work) -> Result<&Staged> {
        let index = match work.staged {
            Some(index) => index,
            None => {
                let path = self.mending.staging.join(staged_name(work.id));
                let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
                let file = file.map_err(Error::io("create", &path))?;
                // From here on it is removed whatever happens.
                self.staged.push(Staged { path, file, takes_place_of: work.path.clone() });
                self.staged.len() - 1
            }
        };
        let is_new = work.staged.replace(index).is_none();
        let staged = &self.staged[index];
        if is_new {
            let size = self.mending.identity.segment_size;
            let mut at = 0;
            if work.exists {
                let mut old = SegmentFile::open(&work.path)?;
                while at < old.len.min(size) {
                    let bytes = old.bytes(at, PAGE_LEN)?;
                    let len = bytes.len().min(usize::try_from(size - at).unwrap_or(usize::MAX));
                    if len == 0 {
                        break;
                    }
                    write_in_pages(&staged.file, &bytes[..len], at).map_err(Error::io("write", &staged.path))?;
                    at += len as u64;
                }
            }
            zero_in_pages(&staged.file, at..size).map_err(Error::io("write", &staged.path))?;
        }
        Ok(staged)
    }

    /// The error for damage that cannot be mended.
    fn refusal(&self, work: &Work, offset: u64, lsn: Lsn, reason: &str) -> Error {
        Error::corrupt(&work.path, offset, Some(lsn), format!("{reason}; nothing was changed"))
    }

    /// Syncs what was made and puts it in place.
    fn put_in_place(&mut self) -> Result<()> {
        for staged in &self.staged {
            staged.file.sync_all().map_err(Error::io("sync", &staged.path))?;
        }
        let directory = self.mending.directory;
        while !self.staged.is_empty() {
            let Staged { path, takes_place_of, .. } = &self.staged[0];
            std::fs::rename(path, takes_place_of)
                .map_err(Error::io("put a repaired segment in place of", takes_place_of))?;
            sync_directory(directory).map_err(Error::io("sync", directory))?;
            log::info!("{} is repaired", takes_place_of.display());
            self.staged.remove(0);
        }
        Ok(())
    }
}

impl Drop for Mender<'_> {
    /// Removes what was not put in place.
    fn drop(&mut self) {
        for Staged { path, .. } in &self.staged {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn mismatch(path: &Path, reason: String) -> Error {
    Error::Mismatch { path: path.to_owned(), reason: reason.into() }
}

/// Writes one page at a time, for the sake of what [`zero_in_pages`] says about large folios.
fn write_in_pages(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    let (mut rest, mut at) = (bytes, offset);
    while !rest.is_empty() {
        let room = usize::try_from(PAGE_LEN - at % PAGE_LEN).unwrap_or(rest.len());
        let (page, later) = rest.split_at(room.min(rest.len()));
        write_all_at(file, page, at)?;
        at += page.len() as u64;
        rest = later;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;
    use crate::types::Chain;
    use crate::wal::log_fixture::{IDENTITY, LogFixture, SIZE, flip, image, write};
    use crate::wal::scan::verify_log;

    /// A copy of the log in a directory, as a node serves it: no bytes but those of valid batches.
    struct Copy {
        directory: PathBuf,
        asked: Vec<Range<u64>>,
        /// What it does to the bytes that it gives.
        spoil: fn(&mut Vec<u8>),
    }

    impl Copy {
        fn of(log: &LogFixture) -> Copy {
            Copy { directory: log.path().to_owned(), asked: Vec::new(), spoil: |_| {} }
        }
    }

    impl Source for Copy {
        fn fetch(
            &mut self,
            segment: Lsn,
            range: Range<u64>,
            put: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
        ) -> Result<u64> {
            self.asked.push(range.clone());
            let id = WalSegmentId { region: IDENTITY.region, shard: IDENTITY.shard, first_lsn: segment };
            let path = self.directory.join(id.to_string());
            if !path.exists() {
                return Err(Error::invalid(format!("no segment begins with LSN {segment}")));
            }
            let mut file = SegmentFile::open(&path)?;
            let header = file.header()?.unwrap();
            let due = Expected { first_lsn: segment, chain: header.chain_before, epoch: header.epoch };
            let walked = walk::walk(&mut file, (SEGMENT_HEADER_LEN, SIZE, SIZE), due, |_, _| {})?;
            let end = range.end.min(walked.end).max(range.start);
            let range = usize::try_from(range.start).unwrap()..usize::try_from(end).unwrap();
            let mut bytes = fs::read(&path).unwrap()[range.clone()].to_vec();
            (self.spoil)(&mut bytes);
            for (index, piece) in bytes.chunks(1000).enumerate() {
                put((range.start + index * 1000) as u64, piece)?;
            }
            Ok(end)
        }

        fn name(&self) -> &str {
            "the copy"
        }
    }

    fn mend_to(log: &LogFixture, staging: &Path, source: &mut dyn Source) -> Result<Vec<MendedRange>> {
        let synced = verify_log(log.path(), Some(&IDENTITY), Lsn::ZERO, &mut ()).unwrap().synced;
        Mending { directory: log.path(), identity: &IDENTITY, synced: synced.max(Lsn(30)), staging }.run(source)
    }

    fn mend(log: &LogFixture, source: &mut dyn Source) -> Result<Vec<MendedRange>> {
        mend_to(log, log.path(), source)
    }

    /// A log, and a copy of it.
    fn twins() -> (LogFixture, LogFixture, Copy) {
        let (log, twin) = (LogFixture::synced_all_along(), LogFixture::synced_all_along());
        assert_eq!(image(log.path()), image(twin.path()));
        let copy = Copy::of(&twin);
        (log, twin, copy)
    }

    fn assert_mended(log: &LogFixture, twin: &LogFixture, source: &mut dyn Source) -> Vec<MendedRange> {
        let ranges = mend(log, source).unwrap();
        assert!(image(log.path()) == image(twin.path()), "byte for byte: {ranges:?}");
        ranges
    }

    /// Fails unless mending is refused and leaves everything as it was.
    fn assert_refused(log: &LogFixture, source: &mut dyn Source) -> Error {
        let before = image(log.path());
        let error = mend(log, source).unwrap_err();
        assert!(image(log.path()) == before, "a refusal changes nothing: {error}");
        error
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn any_flipped_byte_of_a_sealed_segment_is_repaired(segment in 0..2usize, at in 0..12_000u64, mask in 1u8..) {
            let (log, twin, mut copy) = twins();
            // Mostly where the batches are, and sometimes in the zeros behind them.
            let at = if at > 6_000 { at * 7919 % SIZE } else { at };
            let path = &log.places[segment * 5].path;
            let mut bytes = fs::read(path).unwrap();
            bytes[usize::try_from(at).unwrap()] ^= mask;
            fs::write(path, bytes).unwrap();
            let ranges = assert_mended(&log, &twin, &mut copy);
            prop_assert_eq!(ranges.len(), 1);
            prop_assert!(ranges[0].offset <= at && at < ranges[0].offset + ranges[0].len, "{:?}", ranges);
            // Not a byte more than the batch, or the header page.
            let batch = log.places.iter().find(|place| place.path == *path && (place.offset..place.offset + place.len).contains(&at));
            let due = batch.map_or(if at < 4096 { vec![0..4096] } else { vec![] }, |batch| vec![batch.offset..batch.offset + batch.len]);
            let is_last_batch = batch.is_some_and(|batch| batch.len == 56);
            prop_assert!(copy.asked == due || is_last_batch, "{:?}, due {:?}", copy.asked, due);
        }

        #[test]
        fn many_places_at_once_are_repaired(hits in prop::collection::vec((0..2usize, 0..6_000u64, 1u8..), 1..40),
                                            cut in prop::option::of((0..2usize, 0..SIZE)), gone in prop::option::of(0..2usize)) {
            let (log, twin, mut copy) = twins();
            for (segment, at, mask) in hits {
                let path = &log.places[segment * 5].path;
                let mut bytes = fs::read(path).unwrap();
                bytes[usize::try_from(at).unwrap()] ^= mask;
                fs::write(path, bytes).unwrap();
            }
            if let Some((segment, len)) = cut {
                fs::File::options().write(true).open(&log.places[segment * 5].path).unwrap().set_len(len).unwrap();
            }
            // The oldest segment's absence would make it another log, which begins later.
            if gone == Some(1) {
                fs::remove_file(&log.places[5].path).unwrap();
            }
            assert_mended(&log, &twin, &mut copy);
        }
    }

    #[test]
    fn a_sound_log_asks_for_nothing() {
        let (log, twin, mut copy) = twins();
        assert_eq!(assert_mended(&log, &twin, &mut copy), []);
        assert!(copy.asked.is_empty());
    }

    #[test]
    fn missing_segments_come_back_in_the_middle_and_at_the_end() {
        for gone in [vec![5], vec![10], vec![5, 10]] {
            let (log, twin, mut copy) = twins();
            for place in &gone {
                fs::remove_file(&log.places[*place].path).unwrap();
            }
            let ranges = assert_mended(&log, &twin, &mut copy);
            assert_eq!(ranges.len(), 2 * gone.len(), "header and batches of each: {ranges:?}");
        }
    }

    #[test]
    fn synced_batches_of_the_open_segment_are_repaired_and_a_torn_tail_is_left() {
        let (log, twin, mut copy) = twins();
        let (first, last) = (&log.places[10], log.places.last().unwrap());
        flip(&first.path, first.offset + 60, 1);
        assert_eq!(assert_mended(&log, &twin, &mut copy).len(), 1);
        flip(&last.path, last.offset + 60, 1);
        let before = image(log.path());
        assert_eq!(mend(&log, &mut copy).unwrap(), []);
        assert!(image(log.path()) == before);
    }

    #[test]
    fn a_log_that_begins_later_gets_its_first_header_back_if_a_batch_of_it_vouches() {
        let make = || {
            let mut log = LogFixture::beginning_at(Lsn(20), Chain(77));
            for _ in 0..4 {
                log.synced = log.head();
                log.append(&[b"a", b"b", b"c"]);
            }
            log
        };
        let (log, twin) = (make(), make());
        write(&log.segment_path(), &[0xee; 4096], 0);
        assert_mended(&log, &twin, &mut Copy::of(&twin));
        // The first batch is damaged too: the header continues nothing, but the second batch vouches for both.
        write(&log.segment_path(), &[0xee; 4200], 0);
        assert_mended(&log, &twin, &mut Copy::of(&twin));
        let other = {
            let mut log = LogFixture::beginning_at(Lsn(20), Chain(78));
            (0..4).for_each(|_| log.append(&[b"a", b"b", b"c"]));
            log
        };
        write(&log.segment_path(), &[0xee; 4096], 0);
        assert!(assert_refused(&log, &mut Copy::of(&other)).is_corruption());
        // Nothing of the log is left: the other one could be anybody's.
        write(&log.segment_path(), &[0; SIZE as usize], 0);
        let error = assert_refused(&log, &mut Copy::of(&twin));
        assert!(error.to_string().contains("neither its header nor a batch"), "{error}");
    }

    #[test]
    fn a_copy_with_another_history_is_refused_and_both_chains_are_named() {
        // The same up to LSN 3, and as many records of the same length in each batch after that.
        let mut other = LogFixture::new();
        for segment in 0..3 {
            for batch in 0..4 {
                let filler = if other.head() < Lsn(3) { segment } else { segment + 9 };
                other.synced = other.head();
                other.append(&[&[filler; 100], &[batch; 33], b""]);
            }
            other.synced = other.head();
            if segment < 2 {
                other.roll(Epoch(3 + u64::from(segment)));
            }
        }
        // LSN 4 to 6: what comes fits what precedes, and not what follows. LSN 7 to 9: it does not fit what precedes.
        for place in 1..10 {
            for offset in [0, 8, 30, 50] {
                let log = LogFixture::synced_all_along();
                let place = &log.places[place];
                flip(&place.path, place.offset + offset, 2);
                let error = assert_refused(&log, &mut Copy::of(&other));
                let text = error.to_string();
                assert!(error.is_corruption() && text.contains("another history"), "{text}");
                assert!(text.contains("the copy") && text.matches("chain ").count() == 2, "{text}");
            }
        }
        let log = LogFixture::synced_all_along();
        flip(&log.places[5].path, 33, 0);
        let text = assert_refused(&log, &mut Copy::of(&other)).to_string();
        assert!(text.contains("the log so far has chain") && text.contains("the copy"), "{text}");
        // A whole segment that is missing is no different.
        fs::remove_file(&log.places[5].path).unwrap();
        assert!(assert_refused(&log, &mut Copy::of(&other)).is_corruption());
    }

    #[test]
    fn garbage_and_lack_leave_everything_as_it_was() {
        let (log, twin, mut copy) = twins();
        let place = &log.places[1];
        flip(&place.path, place.offset + 60, 0);
        flip(&log.places[5].path, 20, 0);
        let spoilers: [fn(&mut Vec<u8>); 3] =
            [|bytes| bytes.fill(0), |bytes| bytes.reverse(), |bytes| *bytes.last_mut().unwrap() ^= 4];
        for spoil in spoilers {
            copy.spoil = spoil;
            let error = assert_refused(&log, &mut copy);
            assert!(matches!(error, Error::Protocol { .. }), "{error}");
        }
        copy.spoil = |_| {};
        // The first place would be repaired, but the second cannot be: nothing is changed at all.
        fs::remove_file(&twin.places[5].path).unwrap();
        assert_refused(&log, &mut copy);
        let (log, twin, mut copy) = twins();
        let (place, before) = (&log.places[8], &twin.places[7]);
        flip(&place.path, place.offset + 60, 0);
        flip(&before.path, before.offset + 60, 0);
        let text = assert_refused(&log, &mut copy).to_string();
        assert!(text.contains("has no more of this segment"), "{text}");
    }

    #[test]
    fn a_repair_that_was_interrupted_is_taken_up_again() {
        for renamed in 0..=2 {
            let (log, twin, mut copy) = twins();
            for place in [&log.places[1], &log.places[6], &log.places[10]] {
                flip(&place.path, place.offset + 60, 0);
            }
            // What a crash leaves behind `renamed` of the renames: repaired segments, and files that were being made.
            for (index, place) in [1, 6, 10].into_iter().enumerate() {
                let path = &log.places[place].path;
                let name = path.file_name().unwrap().to_str().unwrap();
                if index < renamed {
                    fs::copy(twin.path().join(name), path).unwrap();
                } else {
                    fs::write(log.path().join(staged_name(name.parse().unwrap())), b"half a segment").unwrap();
                }
            }
            assert_eq!(assert_mended(&log, &twin, &mut copy).len(), 3 - renamed);
        }
    }

    #[test]
    fn elsewhere_it_tells_what_it_would_do_and_leaves_nothing() {
        let (log, _twin, mut copy) = twins();
        flip(&log.places[1].path, log.places[1].offset + 60, 0);
        let (before, elsewhere) = (image(log.path()), tempfile::tempdir().unwrap());
        let ranges = mend_to(&log, elsewhere.path(), &mut copy).unwrap();
        assert_eq!((ranges.len(), ranges[0].lsn), (1, Lsn(4)));
        assert!(image(log.path()) == before && image(elsewhere.path()).is_empty());
    }
}
