//! Where the epochs of a log end, and cutting a log at a place of it: for a follower whose newest records are not the
//! leader's.
//!
//! # The cut
//!
//! A log is cut while it is closed, at the end of a batch. Nobody else's bytes change: readers that still map what was
//! cut keep it, because files are removed or replaced and never written.
//!
//! | step | a crash after it leaves |
//! |---|---|
//! | the segments behind the place are removed, the newest first, each durably | a beginning of the old log |
//! | what is kept of the segment at the place is copied to a spare file, and synced | the same |
//! | the copy takes the segment's name, durably | the log, cut |
//!
//! Each of these is a log that recovery opens: a batch says of no record behind it that it was synced. What the
//! checkpoint says of the log must have been lowered before.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::directory_lock::lock_directory;
use crate::error::{Error, Result};
use crate::limits::{self, PAGE_LEN, SEGMENT_HEADER_LEN};
use crate::types::{Chain, Epoch, Lsn};
use crate::wal::log::Log;
use crate::wal::reader::{LogPosition, place_before_seal, start_of};
use crate::wal::segment::{sync_directory, write_all_at, zero_in_pages};
use crate::wal::walk;

impl Log {
    /// Where the records of each epoch end, the newest first, and behind them where the log begins. The end of an epoch
    /// is before the batch that seals its last segment: that one is written by whoever leads next.
    ///
    /// # Errors
    ///
    /// If a segment cannot be read.
    pub(crate) fn epoch_ends(&self) -> Result<Vec<LogPosition>> {
        let segments = self.segments();
        let mut ends: Vec<LogPosition> = Vec::new();
        for segment in segments.iter().rev() {
            let epoch = segment.header().epoch;
            if ends.last().is_some_and(|end| end.epoch == epoch) {
                continue;
            }
            let end = place_before_seal(segment)?;
            if end.lsn >= segment.id().first_lsn {
                ends.push(end);
            }
        }
        let (cluster, region) = (self.identity().cluster, self.identity().region);
        match segments.first() {
            Some(first) => ends.push(start_of(first)),
            // Of a log that waits for its beginning nothing is known.
            None if self.head() == Lsn::ZERO => ends.push(LogPosition {
                lsn: self.head(),
                chain: Chain::genesis(cluster, region, self.shard()),
                epoch: Epoch::ZERO,
                segment: self.head().next(),
                offset: 0,
            }),
            None => {}
        }
        Ok(ends)
    }
}

/// Cuts a closed log of segments of `segment_size` bytes at a place of it: what lies before the place is kept.
///
/// # Errors
///
/// [`Error::InUse`] if the log is open; [`Error::Invalid`] if it has no such place, and then nothing has changed;
/// [`Error::Io`], after which a beginning of the old log is there.
pub(crate) fn cut(directory: &Path, segment_size: u64, place: &LogPosition) -> Result<()> {
    let _lock = lock_directory(directory)?;
    let (segments, _) = walk::list(directory)?;
    let keeps_part = place.offset > SEGMENT_HEADER_LEN;
    let kept = |first_lsn| first_lsn < place.segment || first_lsn == place.segment && keeps_part;
    let reaches = segments.last().map_or(place.lsn.next(), |(id, _)| id.first_lsn);
    let is_there = segments.iter().any(|(id, _)| id.first_lsn == place.segment);
    if reaches < place.segment || keeps_part && (!is_there || place.offset > segment_size) {
        return Err(Error::invalid(format!(
            "{} has no offset {} in a segment that begins with LSN {}",
            directory.display(),
            place.offset,
            place.segment
        )));
    }
    for (_, path) in segments.iter().rev().take_while(|(id, _)| !kept(id.first_lsn)) {
        std::fs::remove_file(path).map_err(Error::io("remove", path))?;
        // One by one: with a newer segment left behind a gap, recovery would have to believe that records are missing.
        sync_directory(directory).map_err(Error::io("sync directory", directory))?;
    }
    if keeps_part && let Some((_, path)) = segments.iter().find(|(id, _)| id.first_lsn == place.segment) {
        // A spare file of this name holds nothing.
        let copy = directory.join("spare-0.wal.tmp");
        copy_beginning(path, &copy, place.offset, segment_size)?;
        std::fs::rename(&copy, path).map_err(Error::io("rename the kept part to", path))?;
        sync_directory(directory).map_err(Error::io("sync directory", directory))?;
    }
    Ok(())
}

/// Makes `to` a segment's file with the first `len` bytes of `from` and zeros behind them, and syncs it.
fn copy_beginning(from: &Path, to: &Path, len: u64, segment_size: u64) -> Result<()> {
    let mut source = File::open(from).map_err(Error::io("open", from))?.take(len);
    let file = File::options().create(true).truncate(true).read(true).write(true).open(to);
    let file = file.map_err(Error::io("create", to))?;
    let mut buffer = [0; limits::index(PAGE_LEN)];
    let mut at = 0;
    while at < len {
        let read = source.read(&mut buffer).map_err(Error::io("read", from))?;
        if read == 0 {
            return Err(Error::corrupt(from, at, None, format!("it ends before offset {len}, which was read before")));
        }
        write_all_at(&file, &buffer[..read], at).map_err(Error::io("write", to))?;
        at += read as u64;
    }
    zero_in_pages(&file, len..segment_size).map_err(Error::io("fill", to))?;
    file.sync_all().map_err(Error::io("sync", to))
}
