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
use crate::limits::{BATCH_HEADER_LEN, PAGE_LEN, SEGMENT_HEADER_LEN};
use crate::types::{Epoch, Lsn, WalSegmentId};
use crate::wal::batch::{BATCH_VERSION, BatchHeader, Expected};
use crate::wal::carry_out::{is_staged_name, staged_name};
use crate::wal::given_up;
use crate::wal::identity::LogIdentity;
use crate::wal::known_synced::KnownSynced;
use crate::wal::segment::{SegmentHeader, sync_directory, write_in_pages, zero_in_pages};
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
    /// What is known to have been synced: from a checkpoint, and from the batches of the log.
    pub(crate) known: KnownSynced,
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
        let (listed, others) = given_up::list(self.directory, Some(self.identity))?;
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
        let Mending { directory, identity, known: KnownSynced { lsn: synced, .. }, .. } = self.mending;
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
                if next.first_lsn > self.mending.known.lsn {
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
        while let Some(next) = self.next.filter(|next| next.first_lsn <= self.mending.known.lsn) {
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
            let walked = walk::walk(&mut file, Some(&header), (at, size, size), due, |_, _| {})?;
            (at, due) = (walked.end, walked.next);
            own_batches += walked.batches;
            self.mending.known.note(header.epoch, walked.synced);
            if walked.sealed {
                break End::Sealed;
            }
            let candidate = Self::next_batch(&mut file, at, size, due)?;
            if self.mending.known.lsn < due.first_lsn {
                break End::Open;
            }
            let reason = if !work.exists {
                "the file is not there".to_owned()
            } else {
                walked.stopped.map_or_else(|| "it is not sealed".to_owned(), |error| error.to_string())
            };
            let sealed;
            (at, due, sealed) = self.mend_range((&mut work, &header), (at, due), candidate, reason)?;
            if sealed {
                break End::Sealed;
            }
            if candidate.is_none() {
                if due.first_lsn > self.mending.known.lsn {
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
        match end {
            End::Sealed => self.clear_behind(&mut work, at, due)?,
            End::Open => self.cut_to_size(&mut work)?,
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
        if self.next.is_some_and(|next| self.mending.known.lsn < next.first_lsn) {
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
        (work, header): (&mut Work, &SegmentHeader),
        (at, due): (u64, Expected),
        next: Option<(u64, BatchHeader)>,
        reason: String,
    ) -> Result<(u64, Expected, bool)> {
        let size = self.mending.identity.segment_size;
        if let Some((offset, own)) = next.filter(|(offset, _)| *offset == at) {
            let reason = format!(
                "the batch at offset {offset} continues chain {:08x}, but what precedes it has chain {:08x}; \
                 another copy cannot tell which of the two is right",
                own.prev_crc.0, due.chain.0
            );
            return Err(self.refusal(work, at, due.first_lsn, &reason));
        }
        let asked = at..next.map_or(size, |(offset, _)| offset);
        let end = self.fetch(work, asked)?;
        if end == at {
            let reason = format!("{reason}; and {} has no more of this segment", self.source.name());
            return Err(self.refusal(work, at, due.first_lsn, &reason));
        }
        let mut file = self.open(work)?;
        let came = walk::walk(&mut file, Some(header), (at, end, size), due, |_, _| {})?;
        if came.end == at {
            let stopped = came.stopped.map_or_else(String::new, |error| error.to_string());
            return Err(self.judge(work, (at, end), due, next, &stopped)?);
        }
        if came.end != end {
            let reason = format!("what it sent for {} ends within a batch, at offset {end}", work.id);
            if next.is_none() {
                return Err(Error::protocol(self.source.name(), reason));
            }
        }
        if let Some((offset, _)) = next.filter(|(offset, _)| came.end == end && end < *offset && !came.sealed) {
            let reason = format!(
                "{reason}; and {} has it only up to LSN {}, where the log needs it up to offset {offset}",
                self.source.name(),
                came.next.first_lsn.previous()
            );
            return Err(self.refusal(work, at, due.first_lsn, &reason));
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

    /// Why not one batch of what came at `at` fits: it is of another history, or it is nothing at all.
    fn judge(
        &self,
        work: &Work,
        (at, end): (u64, u64),
        due: Expected,
        own: Option<(u64, BatchHeader)>,
        stopped: &str,
    ) -> Result<Error> {
        let mut file = self.open(work)?;
        let whole = Self::next_batch(&mut file, at, end, due)?.filter(|(offset, _)| *offset == at);
        if let Some((_, other)) = whole.filter(|(_, other)| (other.prev_crc, other.epoch) != (due.chain, due.epoch)) {
            let reason = format!(
                "the log has chain {:08x} and epoch {} before it, but {} continues chain {:08x} in epoch {}: another \
                 history",
                due.chain.0,
                due.epoch,
                self.source.name(),
                other.prev_crc.0,
                other.epoch
            );
            return Ok(self.refusal(work, at, due.first_lsn, &reason));
        }
        // A compact batch has nothing to tell another chain by but its checksum.
        let header = BatchHeader::read(file.bytes(at, BATCH_HEADER_LEN)?, due);
        let is_due = |header: &BatchHeader| header.first_lsn == due.first_lsn && at + header.total_len() <= end;
        if header.is_some_and(|header| header.is_compact() && is_due(&header)) {
            let reason = format!(
                "the log has chain {:08x} before it, and what {} has there does not continue that: it is of another history, \
                 or damaged ({stopped})",
                due.chain.0,
                self.source.name()
            );
            return Ok(self.refusal(work, at, due.first_lsn, &reason));
        }
        // One that ends elsewhere than the log's own batch did came only in part.
        let longer = header.filter(|header| {
            let is_batch = header.is_compact() || header.version == BATCH_VERSION;
            is_batch && header.first_lsn == due.first_lsn && at + header.total_len() > end
        });
        if let (Some(longer), Some((offset, own))) = (longer, own) {
            let reason = format!(
                "the log goes on at offset {offset} after chain {:08x}, but {} has a batch there that ends at offset {} \
                 with chain {:08x}: another history",
                own.prev_crc.0,
                self.source.name(),
                at + longer.total_len(),
                longer.crc.0
            );
            return Ok(self.refusal(work, at, due.first_lsn, &reason));
        }
        let reason = format!("what it sent for {} at offset {at} is no batch: {stopped}", work.id);
        Ok(Error::protocol(self.source.name(), reason))
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

    /// What stands behind the size of a segment goes, where something of the segment was synced: recovery has nothing
    /// to do with a file that is too long. Within that size a torn tail is left to it.
    fn cut_to_size(&mut self, work: &mut Work) -> Result<()> {
        let (size, len, first_lsn) = (self.mending.identity.segment_size, self.open(work)?.len, work.id.first_lsn);
        if len > size && self.mending.known.lsn >= first_lsn {
            self.stage(work)?;
            let reason = format!("the file has {len} bytes where {size} are due");
            self.note(work, size..len, first_lsn, reason, false);
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

#[cfg(test)]
pub(super) mod tests;
