//! Segments that a log gives up, and what of them must stay for a while so that the log opens after a power cut.
//!
//! Where the oldest segment that stays is durable by name and header, older files simply go, oldest first. A log that
//! has grown past its bound cannot wait for that: the device may be slower than whoever appends. Then segments go
//! unsynced, and nothing of that waits for the device. After a power cut the oldest segment that is found may have no
//! readable header, and a log that begins so is refused. So one given-up file stays, set aside under another name,
//! until the log begins with a durable segment again:
//!
//! | the oldest segment found | files set aside | recovery |
//! |---|---|---|
//! | has its header | any | the log begins there; what was set aside goes |
//! | has none, or there is no segment | one with a header | the newest of these gets its name back, and the log begins there |
//! | has none | none with a header, one that begins with LSN 1 | that gets its name back: nothing was ever called synced, and recovery cuts the log there unless it finds otherwise |
//! | has none | none | refuse, as ever |
//!
//! What was called synced is safe with that: a record that was is in the log that is opened, or had been given up
//! before a newer one was called synced. Whoever waits for the sync of a record that is given up before it was synced
//! is told so: the [`synced`](Log::synced) mark passes it, but it is on no device.
//!
//! The file set aside holds the newest record called synced, or the one before the oldest of the log. Syncing goes on
//! with the oldest segment that is left, and that one is not removed before it is done, but set aside in its turn: a
//! device that is slower than the writer syncs a segment now and then, and no waiter waits for ever.
//!
//! Of several removals a power cut may leave any subset, and a log without one of its middle segments is refused. What
//! nobody needs therefore goes one file at a time, each removal durable before the next. Where the log has outgrown its
//! bound there is no time for that: removals then rely on the file system keeping them in order, as those with a
//! journal do.
//!
//! At most two files are set aside: the newest that is durable, and the one that is being synced.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{Error, Result};
use crate::types::{Lsn, WalSegmentId};
use crate::wal::LogIdentity;
use crate::wal::log::Log;
use crate::wal::mapping::Segment;
use crate::wal::segment::sync_directory;
use crate::wal::walk::{self, SegmentFile};

/// Stands before the name of a segment that was set aside.
const ASIDE_PREFIX: &str = "aside-";

/// What became of released segments whose files are still there.
#[derive(Debug, Default)]
pub(super) struct GivenUp {
    /// A file that could not be removed: it goes before any newer one, or there would be a gap.
    unremoved: Option<PathBuf>,
    /// Set aside, oldest first.
    aside: Vec<(Arc<Segment>, PathBuf)>,
    /// The first LSN of the segment that is synced now, or was last.
    syncing: Lsn,
    /// What went before it was synced, oldest first: from here to there, with syncs in between.
    unsynced: Vec<(Lsn, Lsn)>,
}

/// So many stretches that went unsynced are told apart; of more, the oldest two count as one with what lies between
/// them.
const MOST_UNSYNCED: usize = 64;

/// What to do with the oldest segment.
enum Fate {
    Stays,
    /// Its successor is durable by name and header.
    Goes,
    /// It is neither needed nor durable.
    GoesUnsynced,
    /// It goes, but its file must stay for now.
    IsSetAside,
}

impl Log {
    /// Gives up the segments whose records are all at or below `lsn`, and says why in the log output. The newest
    /// segment always stays, and so does every one whose successor is not yet durable by name and header: what is left
    /// must open after a power cut. Files that nobody reads any more become spares, if they were made since the log was
    /// opened. Returns how many segments went.
    ///
    /// Waits for no sync of data, and never blocks appends.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if a file cannot be removed. It is out of the log, but the next call tries it again before it
    /// gives up anything newer.
    pub fn release_through(&self, lsn: Lsn, reason: &str) -> Result<usize> {
        self.release(lsn, false, reason)
    }

    /// The same, whether durable or not: for a log that may not grow. A sync that is waited for ends once what is left
    /// up to there is durable.
    pub(crate) fn drop_through(&self, lsn: Lsn, reason: &str) -> Result<usize> {
        self.release(lsn, true, reason)
    }

    /// Bytes of the files of all segments, spares, what waits to be filled again, and what is set aside.
    pub(crate) fn file_bytes(&self) -> u64 {
        let aside = self.given_up.lock().aside.len() as u64 * self.identity().segment_size;
        self.retained_bytes() + aside + self.spares().file_bytes()
    }

    /// Lets files of segments that are given up wait to be filled again, as many as the writer is likely to want, as
    /// long as there are no more than so many bytes of files in all. Where nobody has called this, no more wait than
    /// spares are kept.
    pub(crate) fn keep_used_files(&self, most_bytes: u64) {
        self.spares().set_room(most_bytes);
    }

    /// Gives up files that wait to be filled again, but for one or what spares lack, where there are more bytes of
    /// files than [`keep_used_files`](Self::keep_used_files) was told: no log goes for their sake.
    pub(crate) fn shed_used_files(&self, most_bytes: u64) {
        if self.file_bytes() > most_bytes {
            self.spares().shed_used();
        }
    }

    fn release(&self, lsn: Lsn, unsynced: bool, reason: &str) -> Result<usize> {
        // One at a time: the next file goes when the removal of this one is durable.
        let _alone = self.releasing.lock();
        let mut count = 0;
        loop {
            // Whoever syncs takes it too, and must not wait for the directory.
            let mut given_up = self.given_up.lock();
            given_up.remove_unremoved()?;
            self.tidy_aside(&mut given_up);
            let Some(oldest) = self.segments.read().first().map(Arc::clone) else { return Ok(count) };
            match self.fate(&given_up, lsn, unsynced) {
                Fate::Stays => return Ok(count),
                Fate::IsSetAside => {
                    let path = self.directory.join(format!("{ASIDE_PREFIX}{}", oldest.id()));
                    std::fs::rename(oldest.path(), &path).map_err(Error::io("rename", oldest.path()))?;
                    self.note_unsynced(&mut given_up, &oldest);
                    self.segments.write().remove(0);
                    given_up.aside.push((Arc::clone(&oldest), path));
                    log::info!(
                        "shard {}: released {}, set aside until newer log is synced: {reason}",
                        self.shard(),
                        oldest.id()
                    );
                    self.tidy_aside(&mut given_up);
                }
                fate @ (Fate::Goes | Fate::GoesUnsynced) => {
                    if matches!(fate, Fate::Goes) {
                        self.tidy_aside(&mut given_up);
                    }
                    self.note_unsynced(&mut given_up, &oldest);
                    self.segments.write().remove(0);
                    let (id, path) = (oldest.id(), oldest.path().to_owned());
                    if let Err(error) = self.remove(oldest, path.clone()) {
                        given_up.unremoved = Some(path);
                        return Err(error);
                    }
                    drop(given_up);
                    if !unsynced {
                        sync_directory(&self.directory).map_err(Error::io("sync directory", &self.directory))?;
                    }
                    log::info!("shard {}: released {id}: {reason}", self.shard());
                }
            }
            count += 1;
        }
    }

    fn fate(&self, given_up: &GivenUp, lsn: Lsn, unsynced: bool) -> Fate {
        let segments = self.segments.read();
        let (Some(oldest), Some(next)) = (segments.first(), segments.get(1)) else { return Fate::Stays };
        if oldest.sealed_last_lsn().is_none_or(|last| last > lsn) {
            return Fate::Stays;
        }
        let named = self.named.load(Ordering::Acquire);
        let first = oldest.id().first_lsn;
        if next.id().first_lsn.0 <= named {
            Fate::Goes
        } else if !unsynced {
            Fate::Stays
        } else if first.0 <= named || first == given_up.syncing || given_up.aside.is_empty() {
            Fate::IsSetAside
        } else {
            Fate::GoesUnsynced
        }
    }

    /// Notes what of a segment that goes was not synced yet. Before it is out of the list: whoever moves the synced
    /// mark past it has found it gone.
    fn note_unsynced(&self, given_up: &mut GivenUp, segment: &Segment) {
        let synced = self.synced().load();
        let Some(last) = segment.sealed_last_lsn().filter(|last| *last > synced) else { return };
        match given_up.unsynced.last_mut().filter(|(_, through)| *through >= synced) {
            // Nothing was synced in between.
            Some((_, through)) => *through = last,
            None => given_up.unsynced.push((synced.next(), last)),
        }
        if given_up.unsynced.len() > MOST_UNSYNCED {
            // What lies between them is gone too, though it was synced before it went.
            let (from, _) = given_up.unsynced.remove(0);
            given_up.unsynced[0].0 = from;
        }
        self.unsynced_through.store(last.0, Ordering::Release);
    }

    /// Whether a record was given up before it was on stable storage: one that the synced mark has passed.
    #[inline]
    pub(super) fn went_unsynced(&self, lsn: Lsn) -> bool {
        lsn.0 <= self.unsynced_through.load(Ordering::Acquire)
            && self.given_up.lock().unsynced.iter().any(|(from, through)| (*from..=*through).contains(&lsn))
    }

    /// Removes what was set aside and is not needed any more: all of it if the log begins with a durable segment, else
    /// what is older than the newest durable one.
    fn tidy_aside(&self, given_up: &mut GivenUp) {
        let named = Lsn(self.named.load(Ordering::Acquire));
        let log_is_named = self.segments.read().first().is_some_and(|first| first.id().first_lsn <= named);
        let newest = given_up.aside.iter().rposition(|(segment, _)| segment.id().first_lsn <= named);
        let needless = if log_is_named { given_up.aside.len() } else { newest.unwrap_or(0) };
        for (segment, path) in given_up.aside.drain(..needless) {
            // One that stays behind does no harm: the log does not begin with it.
            if let Err(error) = self.remove(segment, path) {
                log::warn!("shard {}: {error}", self.shard());
            }
        }
    }

    /// Recycles the file of a segment, or removes it if the segment is still read, or may be: readers keep the mapping.
    fn remove(&self, segment: Arc<Segment>, path: PathBuf) -> Result<()> {
        match Arc::try_unwrap(segment) {
            Ok(last) if self.has_made(&last) => self.spares().recycle(path, last, self.retained_bytes()),
            Ok(last) => self.spares().discard(&path, last),
            Err(_held) => remove_file(&path),
        }
    }

    /// The segment to sync next, where syncing has come to `position`, the first LSN of a segment: that segment, or, if
    /// it was given up, the oldest that is left. It is not removed while it is synced.
    pub(super) fn segment_to_sync(&self, position: Lsn) -> Result<Option<Arc<Segment>>> {
        let mut given_up = self.given_up.lock();
        let aside = given_up.aside.iter().map(|(segment, _)| segment).find(|s| s.id().first_lsn == position).cloned();
        let found = aside.or_else(|| self.segment_beginning(position)).or_else(|| {
            let first = self.segments.read().first().cloned();
            first.filter(|first| first.id().first_lsn > position)
        });
        if let Some(segment) = &found {
            given_up.syncing = segment.id().first_lsn;
            if segment.id().first_lsn != position {
                given_up.settle_unremoved()?;
            }
        }
        Ok(found)
    }

    /// Removes what is left of segments given up, now that everything is synced.
    pub(super) fn finish_release(&self) {
        let mut given_up = self.given_up.lock();
        given_up.syncing = Lsn::ZERO;
        self.tidy_aside(&mut given_up);
    }
}

impl GivenUp {
    fn remove_unremoved(&mut self) -> Result<()> {
        if let Some(path) = &self.unremoved {
            remove_file(path)?;
            self.unremoved = None;
        }
        Ok(())
    }

    /// Before records behind an unsynced file count as synced, that file must be gone, or durable as well.
    fn settle_unremoved(&mut self) -> Result<()> {
        let Err(error) = self.remove_unremoved() else { return Ok(()) };
        let Some(path) = &self.unremoved else { return Ok(()) };
        log::warn!("{error}; it is synced instead");
        let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
        file.sync_all().map_err(Error::io("sync", path))
    }
}

/// The segment that was set aside under this name.
fn set_aside(path: &Path) -> Option<WalSegmentId> {
    path.file_name()?.to_str()?.strip_prefix(ASIDE_PREFIX)?.parse().ok()
}

/// Whether this is the name of a segment that was set aside.
pub(super) fn is_set_aside(path: &Path) -> bool {
    set_aside(path).is_some()
}

/// The segment whose file this is, under its own name or set aside.
pub(super) fn segment_of(path: &Path) -> Option<WalSegmentId> {
    set_aside(path).or_else(|| path.file_name()?.to_str()?.parse().ok())
}

/// The segments in a log's directory, oldest first, and the other files: [`walk::list`], but where the log cannot begin
/// without the one set aside last, that is the first segment, and has yet to [get its name back](restore). See the
/// [module](self). Where it is not known what log it is, a header of any counts.
pub(super) fn list(directory: &Path, identity: Option<&LogIdentity>) -> Result<(walk::Listing, Vec<PathBuf>)> {
    let (mut segments, mut others) = walk::list(directory)?;
    let has_header = |id: WalSegmentId, path: &Path| -> Result<bool> {
        let header = SegmentFile::open(path)?.header()?;
        Ok(header
            .is_ok_and(|header| header.id == id && identity.is_none_or(|identity| identity.check(&header).is_ok())))
    };
    if let Some((id, path)) = segments.first()
        && has_header(*id, path)?
    {
        return Ok((segments, others));
    }
    let mut found: Option<(WalSegmentId, usize)> = None;
    for (index, path) in others.iter().enumerate() {
        let Some(id) = set_aside(path) else { continue };
        let is_newer = found.is_none_or(|(newest, _)| newest.first_lsn < id.first_lsn);
        if is_newer
            && segments.first().is_none_or(|(first, _)| id.first_lsn < first.first_lsn)
            && (id.first_lsn == Lsn::FIRST || has_header(id, path)?)
        {
            found = Some((id, index));
        }
    }
    if let Some((id, index)) = found {
        segments.insert(0, (id, others.swap_remove(index)));
    }
    Ok((segments, others))
}

/// Before recovery looks at the segments: gives the first its name back if it was set aside.
pub(super) fn restore(segments: &mut walk::Listing) -> Result<()> {
    if let Some((id, path)) = segments.first_mut().filter(|(_, path)| is_set_aside(path)) {
        let aside = path.clone();
        path.set_file_name(id.to_string());
        log::warn!("the log begins with {id} again, which had been given up before newer log was durable");
        std::fs::rename(&aside, path).map_err(Error::io("rename", &aside))?;
    }
    Ok(())
}

/// Removes what is still set aside, once the log is open and durable.
pub(super) fn remove_set_aside(directory: &Path) -> Result<()> {
    let (_, others) = walk::list(directory)?;
    others.iter().filter(|path| is_set_aside(path)).try_for_each(|path| remove_file(path))
}

/// Removes a segment's file, which may be gone already, and makes sure of that before any other one goes: of several
/// removals a power cut may leave any subset, and a log without one of its middle segments ends there.
pub(super) fn remove_durably(path: &Path, directory: &Path) -> Result<()> {
    remove_file(path)?;
    sync_directory(directory).map_err(Error::io("sync directory", directory))
}

/// Removes a file that may be gone already.
fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use super::*;
    use crate::limits::MIN_SEGMENT_SIZE;
    use crate::types::Epoch;
    use crate::wal::log_fixture::IDENTITY;
    use crate::wal::scan::{Relation, compare_logs, verify_log};
    use crate::wal::{LogWriter, SyncPolicy, Wal, WalOptions};

    /// Nobody syncs but who waits.
    fn open(directory: &Path) -> (Wal, LogWriter) {
        let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
        let (wal, mut writer) = Wal::open(directory, IDENTITY, options).unwrap();
        writer.set_epoch(Epoch(1).max(writer.end().epoch)).unwrap();
        (wal, writer)
    }

    fn append_segments(writer: &mut LogWriter, segments: u64) {
        for _ in 0..segments * (MIN_SEGMENT_SIZE / 4096 - 1) {
            writer.append(&[7; 4000]).unwrap();
        }
    }

    type Image = BTreeMap<String, Vec<u8>>;

    /// The segments and what is set aside, by the names of the segments.
    fn image(directory: &Path) -> Image {
        let files = directory.read_dir().unwrap().map(|entry| entry.unwrap().path());
        let kept = files.filter(|path| path.extension().is_some_and(|extension| extension == "wal"));
        kept.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())).collect()
    }

    fn name_of_segment(name: &str) -> &str {
        name.strip_prefix(ASIDE_PREFIX).unwrap_or(name)
    }

    /// What a power cut leaves at worst: of every file what `durable` holds of it, and else nothing.
    fn after_a_power_cut(now: &Image, durable: &Image) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, bytes) in now {
            let kept = durable.iter().find(|(other, _)| name_of_segment(other) == name_of_segment(name));
            let bytes = kept.map_or_else(|| vec![0; bytes.len()], |(_, bytes)| bytes.clone());
            fs::write(directory.path().join(name), bytes).unwrap();
        }
        directory
    }

    fn copy(image: &Image) -> tempfile::TempDir {
        after_a_power_cut(image, image)
    }

    #[test]
    fn a_log_that_nobody_syncs_goes_without_being_synced() {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = open(directory.path());
        let log = Arc::clone(wal.log());
        append_segments(&mut writer, 10);
        let middle = log.segments()[6].id().first_lsn;
        assert_eq!(log.release_through(middle.previous(), "test").unwrap(), 0, "what is to be kept safe is not yet");
        assert_eq!(log.drop_through(middle.previous(), "test").unwrap(), 6);
        assert_eq!((log.tail(), log.synced().load()), (middle, Lsn::ZERO));
        assert_eq!(log.given_up.lock().aside.len(), 1);
        // What was set aside is still there to be synced; but who waits for what is gone learns that it is.
        let is_told = |lsn| matches!(log.wait_synced(lsn, None), Err(Error::NotRetained { lsn: at, .. }) if at == lsn);
        assert!(is_told(Lsn(1)));
        assert!(log.synced().load() < middle);
        assert!(is_told(middle.previous()));
        assert!(log.synced().load() >= middle);
        log.wait_synced(middle, None).unwrap();
        log.wait_synced_or_given_up(Lsn(1), None).unwrap();
        append_segments(&mut writer, 1);
        let head = log.head();
        drop(writer);
        drop(log);
        wal.close().unwrap();
        assert!(image(directory.path()).keys().all(|name| !name.starts_with(ASIDE_PREFIX)));
        let (wal, _writer) = open(directory.path());
        assert_eq!((wal.log().tail(), wal.log().head()), (middle, head));
    }

    #[test]
    fn only_what_went_unsynced_is_told_to_be_gone() {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = open(directory.path());
        let log = wal.log();
        let mut append_and_drop = |is_synced: bool| {
            append_segments(&mut writer, 3);
            let first = log.synced().load().next();
            if is_synced {
                log.wait_synced(log.head(), None).unwrap();
            }
            // So that all of those go.
            let last = log.head();
            append_segments(&mut writer, 2);
            log.drop_through(last, "test").unwrap();
            let gone = log.tail().previous();
            assert!(first <= gone);
            (first, gone)
        };
        log.wait_synced(Lsn::ZERO, None).unwrap();
        let (_, synced) = append_and_drop(true);
        assert!(!log.went_unsynced(Lsn(1)) && !log.went_unsynced(synced));
        let (first, _) = append_and_drop(false);
        let (same, gone) = append_and_drop(false);
        assert_eq!(first, same, "nothing was synced in between");
        assert!(log.went_unsynced(first) && log.went_unsynced(gone));
        assert!(!log.went_unsynced(first.previous()) && !log.went_unsynced(gone.next()));
        log.wait_synced(log.head(), None).unwrap();
        let (next, newest) = append_and_drop(false);
        assert!(next > first && log.went_unsynced(next) && log.went_unsynced(newest));
        assert!(!log.went_unsynced(next.previous()));
        assert!(log.went_unsynced(first) && log.went_unsynced(gone), "whatever was synced since");
        // The oldest become one.
        for _ in 0..MOST_UNSYNCED {
            log.wait_synced(log.head(), None).unwrap();
            let (next, newest) = append_and_drop(false);
            assert!(log.went_unsynced(next) && log.went_unsynced(newest) && log.went_unsynced(first));
        }
        assert_eq!(log.given_up.lock().unsynced.len(), MOST_UNSYNCED);
    }

    #[test]
    fn a_process_that_is_killed_loses_nothing_that_was_left() {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = open(directory.path());
        append_segments(&mut writer, 3);
        wal.log().wait_synced(wal.log().head(), None).unwrap();
        append_segments(&mut writer, 10);
        wal.log().drop_through(Lsn(150), "test").unwrap();
        let left = copy(&image(directory.path()));
        assert!(image(left.path()).keys().any(|name| name.starts_with(ASIDE_PREFIX)));
        let (again, _writer) = open(left.path());
        assert_eq!((again.log().tail(), again.log().head()), (wal.log().tail(), wal.log().head()));
        assert!(image(left.path()).keys().all(|name| !name.starts_with(ASIDE_PREFIX)), "it is needed no more");
    }

    /// What breaks: the machine, at any moment. How: nothing that was not synced is on the disk, not even headers. What
    /// prevents a loss: the file set aside.
    #[test]
    fn a_power_cut_takes_nothing_that_was_called_synced() {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = open(directory.path());
        let log = Arc::clone(wal.log());
        let mut durable = Image::new();
        let mut kept_aside = 0;
        for round in 0..40_u64 {
            append_segments(&mut writer, round % 5 + 1);
            if round % 3 != 0 {
                let upto = log.segments().len().saturating_sub(2 + usize::try_from(round % 2).unwrap());
                let first = log.segments()[upto].id().first_lsn;
                log.drop_through(first.previous(), "test").unwrap();
            }
            if round % 4 == 3 {
                log.wait_synced(log.head(), None).unwrap();
                durable = image(directory.path());
            }
            let now = image(directory.path());
            kept_aside += usize::from(now.keys().any(|name| name.starts_with(ASIDE_PREFIX)));
            assert!(log.given_up.lock().aside.len() <= 2);
            let left = after_a_power_cut(&now, &durable);
            let synced = log.synced().load();
            let report = verify_log(left.path(), Some(&IDENTITY), synced.into(), &mut ()).unwrap();
            let compared = compare_logs(left.path(), copy(&image(left.path())).path()).unwrap();
            let (again, _writer) = open(left.path());
            let opened = (again.log().tail(), again.log().head());
            assert!(report.is_sound() && (report.tail, report.head) == opened, "round {round}: {report:?}");
            assert_eq!(compared.relation, Relation::Identical);
            assert!(compared.equal_bytes > 0 || synced == Lsn::ZERO, "round {round}: {compared:?}");
            assert!(again.log().head() >= synced, "round {round}: {} of {synced}", again.log().head());
            assert!(again.log().tail() <= synced.next());
        }
        assert!(kept_aside > 10);
    }

    /// The device is slower than the writer: segments go while they are synced.
    #[test]
    fn syncs_get_on_although_their_segments_go_meanwhile() {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = open(directory.path());
        let log = Arc::clone(wal.log());
        append_segments(&mut writer, 8);
        let before = log.head();
        let first = log.segment_to_sync(Lsn(1)).unwrap().unwrap();
        assert_eq!(first.id().first_lsn, Lsn(1));
        let sixth = log.segments()[5].id().first_lsn;
        log.drop_through(sixth.previous(), "test").unwrap();
        // The one that is being synced is still there when its sync ends, and the next is what is left.
        assert!(Arc::ptr_eq(&log.segment_to_sync(Lsn(1)).unwrap().unwrap(), &first));
        let second = first.sealed_last_lsn().unwrap().next();
        assert_eq!(log.segment_to_sync(second).unwrap().unwrap().id().first_lsn, sixth);
        log.drop_through(Lsn(before.0 - 1), "test").unwrap();
        assert_eq!(log.segment_to_sync(sixth).unwrap().unwrap().id().first_lsn, sixth, "set aside in its turn");
        log.wait_synced(before, None).unwrap();
        assert!(log.synced().load() >= before);
        append_segments(&mut writer, 2);
        log.wait_synced(log.head(), None).unwrap();
        log.release_through(Lsn::MAX, "test").unwrap();
        assert_eq!((log.segments().len(), log.given_up.lock().aside.len()), (1, 0));
    }
}
