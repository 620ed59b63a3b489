//! Recovery: what of a shard's log is valid, and whether the rest was lost in a crash or damaged later.
//!
//! # What may be on the disk
//!
//! Everything up to the last sync is on stable storage. Of what was written after it, a crash keeps any subset: a
//! mapped page may reach the disk at any time or never, in any order, and in pieces of 512 bytes. So the records after
//! the last sync can be missing, half there, or there as a whole behind others that are not. Where a segment's file was
//! one of this log before, what it held then may stand there instead, its header page included: records with lower LSNs
//! than any that could be due. They are cut like any others, and counted in what is told of a cut, even where nothing
//! that was written is missing. None of that is damage: nobody was told that those records were safe. Damage is when
//! something is missing that *was* synced.
//!
//! # The rule
//!
//! The log is walked from its oldest segment, batch by batch, and segment by segment: every segment but the last ends
//! with a sealing batch, and the next begins with the LSN and the chain that follow. The walk stops where that does
//! not hold. Let *d* be the LSN that is due there, and *S* the highest LSN known to have been synced: by the caller,
//! or by the `synced_lsn` of any batch, before or behind the stop, that is consistent in itself and was written by this
//! node: what a follower's batches say was synced was synced by its leader ([`KnownSynced`]).
//!
//! | behind the last valid batch | S < d | S >= d |
//! |---|---|---|
//! | only zeros, and no other segment | open | refuse: synced records are missing |
//! | other bytes in the segment | cut | refuse: synced records are damaged |
//! | other segments | cut | refuse: synced records are damaged or missing |
//! | unknown, because the log's first segment has no readable beginning, and began past LSN 1 | refuse | refuse |
//!
//! A valid batch behind the stop does not by itself make it corruption, since a crash may keep a later batch and lose
//! an earlier one. It does if it says that the LSN at the stop was synced before it was written. As the first batch in
//! each page and the first after each sync state what was synced, and one of them is read as long as its own page is,
//! that covers all of a leader's log but what was written since the last sync but one; of a follower's, all but what
//! was synced since its last checkpoint. Compact batches state nothing, and are not looked for.
//!
//! The last line: where the oldest segment begins past LSN 1, its name says that there were records before, all of
//! them synced. To drop it would be to begin again from nothing. So a log that begins past LSN 1 must have its header
//! synced before its name, and a log that gives up its oldest segments sees to it that there is one: see
//! [`given_up`].
//!
//! Bytes behind a sealing batch belong to no record; they are looked at by [`scan`](super::scan), not here.
//!
//! How the cut is made is told in [`carry_out`](super::carry_out).

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::limits::{BATCH_HEADER_LEN, SEGMENT_HEADER_LEN};
use crate::types::{Chain, Epoch, HybridTimestamp, Lsn, WalSegmentId};
use crate::wal::batch::Expected;
use crate::wal::carry_out::Verdict;
use crate::wal::given_up;
use crate::wal::identity::LogIdentity;
use crate::wal::known_synced::KnownSynced;
use crate::wal::segment::SegmentHeader;
use crate::wal::walk::{self, Plausible, SegmentFile};
use crate::wal::walk_ahead::{self, WalkedAhead};

/// What recovery has cut off a log: records that were written and not known to be synced when the node went down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornTail {
    /// The segment in which the cut begins. It is gone if nothing of it was kept.
    pub path: PathBuf,
    /// Where in it: the first byte cut.
    pub offset: u64,
    /// The last LSN that was kept.
    pub after: Lsn,
    /// Bytes cut, over all segments, without headers and trailing zeros.
    pub bytes: u64,
    /// Why the first batch that was cut is not valid.
    pub reason: String,
}

/// One segment of a recovered log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RecoveredSegment {
    pub(crate) header: SegmentHeader,
    pub(crate) path: PathBuf,
    /// The end of its last valid batch, in bytes from the beginning of the file.
    pub(crate) published: u64,
    pub(crate) sealed: bool,
    /// The LSN of its last record; one before its first LSN where it has none.
    pub(crate) last_lsn: Lsn,
}

impl RecoveredSegment {
    /// The bytes of which it is not known that they are on stable storage, where records up to `synced` are. All of
    /// them where a record is not. The batch that seals holds no record: only a later one that is synced tells that it
    /// is.
    pub(super) fn unsynced(&self, synced: Lsn) -> Range<u64> {
        let from = if self.last_lsn > synced {
            0
        } else if self.sealed && self.last_lsn == synced {
            self.published - BATCH_HEADER_LEN
        } else {
            self.published
        };
        from..self.published
    }
}

/// A log that can be appended to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Oldest first, without gaps. All but the last are sealed; the last may be.
    pub(crate) segments: Vec<RecoveredSegment>,
    pub(crate) head: Lsn,
    /// The chain at the head.
    pub(crate) chain: Chain,
    /// Of the last segment; zero where there is none.
    pub(crate) epoch: Epoch,
    /// The newest in the log.
    pub(crate) timestamp: HybridTimestamp,
    /// The highest LSN known to have been synced.
    pub(crate) synced: Lsn,
    /// `None` if nothing was cut.
    pub(crate) torn: Option<TornTail>,
    /// Files of the right size that no longer belong to the log, whatever is in them: they can become spares.
    pub(crate) leftovers: Vec<PathBuf>,
}

/// Reads a shard's directory, decides, and, only if the decision is to open the log, carries out the cut and tidies up.
/// `known` is what the caller knows to have been synced.
///
/// What is kept is not synced by this: the caller must, before it counts any of it as such. Running it again, also
/// after a crash in the middle of it, gives the same log.
///
/// # Errors
///
/// [`Error::Corrupt`] where the [rule](self) says to refuse, [`Error::Mismatch`] for a segment of another log, and
/// [`Error::Io`]. Nothing has been changed then, unless carrying out the decision failed.
pub(crate) fn recover(directory: &Path, identity: &LogIdentity, known: KnownSynced) -> Result<Recovered> {
    let (mut listed, others) = given_up::list(directory, Some(identity))?;
    given_up::restore(&mut listed)?;
    let ahead = walk_ahead::walk_all(&listed, identity);
    let segments = listed.into_iter().zip(ahead).map(|((id, path), ahead)| {
        let mut file = SegmentFile::open(&path)?;
        file.ahead = ahead;
        Ok((id, file))
    });
    survey(directory, identity, known, segments)?.carry_out(directory, &others, identity)
}

/// Recovery without the deeds: looks at the segments, oldest first, and decides.
///
/// # Errors
///
/// As [`recover`].
pub(crate) fn survey(
    directory: &Path,
    identity: &LogIdentity,
    known: KnownSynced,
    segments: impl ExactSizeIterator<Item = Result<(WalSegmentId, SegmentFile)>>,
) -> Result<Verdict> {
    let mut survey = Survey::new(identity, known);
    let count = segments.len();
    for (index, segment) in segments.enumerate() {
        let (id, file) = segment?;
        survey.add(id, file, index + 1 == count)?;
    }
    match survey.decide() {
        Decision::Refuse => Err(survey.refusal(directory)),
        Decision::Open | Decision::Cut => Ok(survey.verdict()),
    }
}

/// What stands behind the last valid batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Beyond {
    /// Only zeros, and no other segment.
    Nothing,
    /// Something in the same segment, and no other segment.
    Bytes,
    /// Other segments.
    Segments,
    /// Not known, because where the log begins is not.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    Open,
    Cut,
    Refuse,
}

/// The table of the [module](self).
fn decide(beyond: Beyond, synced_is_lost: bool) -> Decision {
    match (beyond, synced_is_lost) {
        (Beyond::Nothing, false) => Decision::Open,
        (Beyond::Bytes | Beyond::Segments, false) => Decision::Cut,
        (Beyond::Unknown, false) | (_, true) => Decision::Refuse,
    }
}

/// Where the walk stopped, and why.
pub(super) struct Stop {
    pub(super) path: PathBuf,
    pub(super) offset: u64,
    pub(super) reason: String,
    pub(super) beyond: Beyond,
    /// The end of the last byte that is not zero in the last segment kept, if the stop is in that one.
    pub(super) extent: Option<u64>,
    /// Bytes behind it that are not zero, without headers.
    pub(super) bytes: u64,
}

/// What has been seen of a log, from the oldest segment on.
pub(super) struct Survey<'a> {
    pub(super) identity: &'a LogIdentity,
    pub(super) segments: Vec<RecoveredSegment>,
    /// What the next batch must continue.
    pub(super) next: Expected,
    pub(super) timestamp: HybridTimestamp,
    /// What is known to have been synced so far.
    pub(super) known: KnownSynced,
    pub(super) stop: Option<Stop>,
    /// Segments behind the stop: path, and whether the file can become a spare, which takes the right size.
    pub(super) dropped: Vec<(PathBuf, bool)>,
    /// Files cut short whose batches are all there up to the sealing one or the stop: to be filled up with zeros.
    pub(super) short: Vec<(PathBuf, u64)>,
}

impl<'a> Survey<'a> {
    fn new(identity: &'a LogIdentity, known: KnownSynced) -> Survey<'a> {
        Survey {
            identity,
            segments: Vec::new(),
            next: Expected { first_lsn: Lsn::FIRST, chain: identity.genesis(), epoch: Epoch::ZERO },
            timestamp: HybridTimestamp::default(),
            known,
            stop: None,
            dropped: Vec::new(),
            short: Vec::new(),
        }
    }

    /// Looks at the next segment.
    fn add(&mut self, id: WalSegmentId, mut file: SegmentFile, is_last: bool) -> Result<()> {
        let header = file.header()?;
        self.identity
            .check_name(id)
            .and_then(|()| header.as_ref().map_or(Ok(()), |header| self.identity.check(header)))
            .map_err(|reason| Error::Mismatch { path: file.path.clone(), reason: reason.into() })?;
        if self.stop.is_some() {
            return self.add_behind_stop(id, header.ok(), file);
        }
        match header.and_then(|header| self.continues(id, &header, file.len).map(|()| header)) {
            Ok(header) => self.add_segment(header, file, is_last),
            Err(reason) => {
                let begins_unknown = self.segments.is_empty() && id.first_lsn > Lsn::FIRST;
                if begins_unknown {
                    self.next.first_lsn = id.first_lsn;
                }
                self.stop = Some(Stop {
                    path: file.path.clone(),
                    offset: 0,
                    reason,
                    beyond: if begins_unknown { Beyond::Unknown } else { Beyond::Segments },
                    extent: None,
                    bytes: 0,
                });
                self.add_behind_stop(id, file.header()?.ok(), file)
            }
        }
    }

    /// Whether a segment continues the log so far, and if not, why.
    fn continues(&self, id: WalSegmentId, header: &SegmentHeader, file_len: u64) -> Result<(), String> {
        if header.id != id {
            return Err(format!("its header calls it {}", header.id));
        }
        if file_len > header.segment_size {
            return Err(format!("it has {file_len} bytes where {} are due", header.segment_size));
        }
        let begins_log = self.segments.is_empty() && id.first_lsn > Lsn::FIRST;
        if begins_log {
            return Ok(());
        }
        let Expected { first_lsn, chain, epoch } = self.next;
        if id.first_lsn != first_lsn {
            return Err(format!("it begins with LSN {} where LSN {first_lsn} is due", id.first_lsn));
        }
        if header.chain_before != chain {
            return Err(format!(
                "it continues chain {:08x}, but the log so far has chain {:08x}",
                header.chain_before.0, chain.0
            ));
        }
        if header.epoch < epoch {
            return Err(format!("its epoch is {}, behind a segment of epoch {epoch}", header.epoch));
        }
        Ok(())
    }

    /// A segment that continues the log: walks its batches.
    fn add_segment(&mut self, header: SegmentHeader, mut file: SegmentFile, is_last: bool) -> Result<()> {
        let size = header.segment_size;
        let first = Expected { first_lsn: header.id.first_lsn, chain: header.chain_before, epoch: header.epoch };
        let WalkedAhead { walked, extent, .. } = match file.ahead.take().filter(|ahead| ahead.first == first) {
            Some(ahead) => ahead,
            None => WalkedAhead::of(&mut file, &header)?,
        };
        self.next = walked.next;
        self.timestamp = self.timestamp.max(walked.timestamp);
        self.known.note(header.epoch, walked.synced);
        self.segments.push(RecoveredSegment {
            header,
            path: file.path.clone(),
            published: walked.end,
            sealed: walked.sealed,
            last_lsn: walked.last_lsn(),
        });
        if file.len < size {
            self.short.push((file.path.clone(), file.len));
        }
        if walked.sealed {
            return Ok(());
        }
        if is_last && extent == walked.end && file.len == size {
            return Ok(());
        }
        let mut reason = walked.stopped.map_or_else(|| "it is not sealed".to_owned(), |error| error.to_string());
        if file.len < size {
            reason = format!("the file has {} bytes where {size} are due: {reason}", file.len);
        } else if !is_last && extent == walked.end {
            reason = "nothing is written from here on, though another segment follows".to_owned();
        }
        let plausible = Plausible {
            lowest: walked.next.first_lsn,
            highest: walked.next.first_lsn,
            base: walked.end,
            epoch: header.epoch.0..=header.epoch.0,
        };
        self.look_for_synced(&mut file, walked.end, &plausible)?;
        self.stop = Some(Stop {
            path: file.path,
            offset: walked.end,
            reason,
            beyond: if is_last { Beyond::Bytes } else { Beyond::Segments },
            extent: Some(extent),
            bytes: extent - walked.end,
        });
        Ok(())
    }

    /// A segment that cannot be part of the log any more; it may still say what was synced.
    fn add_behind_stop(
        &mut self,
        id: WalSegmentId,
        header: Option<SegmentHeader>,
        mut file: SegmentFile,
    ) -> Result<()> {
        let highest = header.map_or(id.first_lsn, |header| header.id.first_lsn.max(id.first_lsn));
        // The header of another segment says nothing about the epoch of what stands here.
        let own = header.filter(|header| header.id == id);
        let epoch = own.map_or(self.next.epoch.0..=u64::MAX, |header| header.epoch.0..=header.epoch.0);
        let plausible = Plausible { lowest: self.next.first_lsn, highest, base: SEGMENT_HEADER_LEN, epoch };
        self.look_for_synced(&mut file, SEGMENT_HEADER_LEN, &plausible)?;
        if let Some(stop) = &mut self.stop {
            stop.bytes += file.extent(SEGMENT_HEADER_LEN)? - SEGMENT_HEADER_LEN;
        }
        self.dropped.push((file.path, file.len == self.identity.segment_size));
        Ok(())
    }

    /// Takes note of what the batches behind a stop say was synced.
    fn look_for_synced(&mut self, file: &mut SegmentFile, from: u64, plausible: &Plausible) -> Result<()> {
        let mut at = from;
        while let Some((found, header)) = walk::next_consistent(file, at, self.identity.segment_size, plausible)? {
            self.known.note(header.epoch, header.synced_lsn);
            at = found + header.total_len();
        }
        Ok(())
    }

    fn decide(&self) -> Decision {
        let beyond = self.stop.as_ref().map_or(Beyond::Nothing, |stop| stop.beyond);
        decide(beyond, self.known.lsn >= self.next.first_lsn)
    }

    /// The error for [`Decision::Refuse`].
    fn refusal(self, directory: &Path) -> Error {
        let due = self.next.first_lsn;
        let known = if self.known.lsn >= due {
            format!("records up to LSN {} were synced, so this is no torn tail", self.known.lsn)
        } else {
            "records before it were synced, and where the log stands cannot be told without it".to_owned()
        };
        // A shard's directory lies in its node's.
        let (node, shard) = (directory.parent().unwrap_or(directory).display(), self.identity.shard);
        let advice = format!(
            "nothing was changed; `towline verify {node}` shows the extent, and `towline repair {node} --from ADDR \
             --shard {shard}` fetches what is damaged from a node that holds it"
        );
        let (path, offset, reason) = match (self.stop, self.segments.last()) {
            (Some(stop), _) => (stop.path, stop.offset, stop.reason),
            (None, Some(last)) => (last.path.clone(), last.published, format!("the log ends before LSN {due}")),
            (None, None) => (directory.to_owned(), 0, "there are no segments".to_owned()),
        };
        Error::corrupt(path, offset, Some(due), format!("{reason}; {known}; {advice}"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;
    use crate::types::{ClusterId, RegionId, ShardId};
    use crate::wal::log_fixture::{IDENTITY, LogFixture, SIZE, flip, image, write};

    /// Recovers twice: the second time must find the same log and nothing to do.
    fn recover_twice(log: &LogFixture, known_synced: Lsn) -> Result<Recovered> {
        let before = image(log.path());
        let first = recover(log.path(), &IDENTITY, known_synced.into());
        let after = image(log.path());
        match &first {
            Err(_) => assert_eq!(before, after, "a refusal changes nothing"),
            Ok(first) => {
                let second = recover(log.path(), &IDENTITY, known_synced.into()).unwrap();
                assert_eq!(second.torn, None);
                assert_eq!(image(log.path()), after);
                assert_eq!((&second.segments, second.head, second.chain), (&first.segments, first.head, first.chain));
                let mut leftovers = [first.leftovers.clone(), second.leftovers.clone()];
                leftovers.iter_mut().for_each(|paths| paths.sort());
                assert_eq!(leftovers[0], leftovers[1]);
                check_is_prefix(log, first);
            }
        }
        first
    }

    /// What was kept must be what was written, up to some batch, with nothing but zeros behind.
    fn check_is_prefix(log: &LogFixture, recovered: &Recovered) {
        let mut begin = log.places[..].first().map_or(log.next, |place| {
            let header = recovered.segments.first().map(|segment| segment.header.chain_before);
            Expected { first_lsn: place.first_lsn, chain: header.unwrap_or(IDENTITY.genesis()), epoch: Epoch::ZERO }
        });
        begin.epoch = Epoch::ZERO;
        let here = (recovered.head, recovered.chain);
        let at_a_batch = log.places.iter().any(|place| (place.last_lsn, place.chain) == here);
        assert!(at_a_batch || (begin.first_lsn.previous(), begin.chain) == here, "{here:?}");
        for (index, segment) in recovered.segments.iter().enumerate() {
            let bytes = fs::read(&segment.path).unwrap();
            assert_eq!(bytes.len() as u64, SIZE);
            assert!(segment.sealed || index + 1 == recovered.segments.len());
            if !segment.sealed {
                let end = usize::try_from(segment.published).unwrap();
                assert!(bytes[end..].iter().all(|&byte| byte == 0), "zeros behind the end");
            }
        }
    }

    #[test]
    fn the_decision_is_the_table() {
        use Beyond::*;
        for (beyond, not_lost, lost) in [
            (Nothing, Decision::Open, Decision::Refuse),
            (Bytes, Decision::Cut, Decision::Refuse),
            (Segments, Decision::Cut, Decision::Refuse),
            (Unknown, Decision::Refuse, Decision::Refuse),
        ] {
            assert_eq!((decide(beyond, false), decide(beyond, true)), (not_lost, lost), "{beyond:?}");
        }
    }

    /// The same table on files: what follows LSN 4, what the caller and what the log say was synced.
    #[test]
    fn the_table_holds_on_files() {
        #[derive(Clone, Copy, Debug, PartialEq)]
        enum Follows {
            Zeros,
            Garbage,
            TornBatch,
            BatchBehindGap,
            SegmentBehindGap,
            SegmentAfterMissingOne,
            SegmentWithBlankHeader,
        }
        use Follows::*;
        let all = [
            Zeros,
            Garbage,
            TornBatch,
            BatchBehindGap,
            SegmentBehindGap,
            SegmentAfterMissingOne,
            SegmentWithBlankHeader,
        ];
        for follows in all {
            for (known, said) in [(0, 0), (4, 0), (5, 0), (0, 4), (0, 5), (4, 4), (9, 9)] {
                let mut log = LogFixture::new();
                log.append(&[b"one", b"two"]);
                log.append(&[b"three", b"four"]);
                if matches!(follows, SegmentAfterMissingOne | SegmentWithBlankHeader) {
                    log.roll(Epoch(4));
                }
                let (path, gap) = (log.segment_path(), log.end());
                if follows == Garbage {
                    write(&path, &[0xab; 1000], gap);
                } else if follows != Zeros {
                    log.append(&[&[5; 700]]);
                }
                match follows {
                    Zeros | Garbage => {}
                    TornBatch => write(&path, &[0; 512], gap + 200),
                    BatchBehindGap => {
                        log.synced = Lsn(said);
                        log.append(&[b"six"]);
                        write(&path, &[0; 512], gap);
                    }
                    SegmentBehindGap | SegmentAfterMissingOne => {
                        log.roll(Epoch(5));
                        log.synced = Lsn(said);
                        log.append(&[b"six"]);
                        if follows == SegmentAfterMissingOne {
                            fs::remove_file(&path).unwrap();
                        } else {
                            write(&path, &[0; 512], gap);
                        }
                    }
                    SegmentWithBlankHeader => {
                        log.synced = Lsn(said);
                        log.append(&[b"six"]);
                        write(&path, &[0; 4096], 0);
                    }
                }
                let tells = !matches!(follows, Zeros | Garbage | TornBatch);
                let synced_is_lost = known >= 5 || (tells && said >= 5);
                match recover_twice(&log, Lsn(known)) {
                    Ok(recovered) => {
                        assert!(!synced_is_lost, "{follows:?} {known} {said}");
                        assert_eq!(recovered.head, Lsn(4));
                        assert_eq!(recovered.torn.is_none(), follows == Zeros, "{:?}", recovered.torn);
                        assert!(recovered.torn.is_none_or(|torn| torn.after == Lsn(4)));
                    }
                    Err(error) => {
                        assert!(synced_is_lost, "{follows:?} {known} {said}: {error}");
                        assert!(matches!(error, Error::Corrupt { lsn: Some(Lsn(5)), .. }), "{error}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_sound_log_opens_as_it_is() {
        let log = LogFixture::synced_all_along();
        let recovered = recover_twice(&log, log.head()).unwrap();
        assert_eq!((recovered.head, recovered.chain), (log.head(), log.next.chain));
        assert_eq!((recovered.epoch, recovered.torn, recovered.leftovers.len()), (Epoch(4), None, 0));
        let lasts: Vec<_> = recovered.segments.iter().map(|segment| (segment.sealed, segment.last_lsn.0)).collect();
        assert_eq!(lasts, [(true, 12), (true, 24), (false, 36)]);
        assert!(recovered.timestamp > HybridTimestamp::default().tick(1_000));
    }

    #[test]
    fn an_empty_directory_is_an_empty_log_unless_there_was_one() {
        let directory = tempfile::tempdir().unwrap();
        let recovered = recover(directory.path(), &IDENTITY, Lsn::ZERO.into()).unwrap();
        assert_eq!((recovered.head, recovered.chain, recovered.epoch), (Lsn::ZERO, IDENTITY.genesis(), Epoch::ZERO));
        let error = recover(directory.path(), &IDENTITY, Lsn(1).into()).unwrap_err();
        assert!(error.is_corruption(), "{error}");
    }

    #[test]
    fn a_log_may_begin_anywhere_but_not_without_a_header() {
        let mut log = LogFixture::beginning_at(Lsn(100), Chain(77));
        let recovered = recover_twice(&log, Lsn(99)).unwrap();
        assert_eq!((recovered.head, recovered.chain, recovered.segments.len()), (Lsn(99), Chain(77), 1));
        log.append(&[b"hundred"]);
        assert_eq!(recover_twice(&log, Lsn::ZERO).unwrap().head, Lsn(100));
        flip(&log.segment_path(), 20, 0);
        let error = recover_twice(&log, Lsn::ZERO).unwrap_err();
        assert!(matches!(error, Error::Corrupt { offset: 0, lsn: Some(Lsn(100)), .. }), "{error}");
    }

    #[test]
    fn spares_are_left_over_and_an_empty_last_segment_goes() {
        let mut log = LogFixture::new();
        log.append(&[b"x"]);
        log.roll(Epoch(4));
        fs::write(log.path().join("spare-7.wal.tmp"), vec![1; usize::try_from(SIZE).unwrap()]).unwrap();
        fs::write(log.path().join("spare-8.wal.tmp"), b"unfinished").unwrap();
        fs::write(log.path().join("notes.txt"), b"foreign").unwrap();
        let recovered = recover_twice(&log, Lsn(1)).unwrap();
        assert_eq!((recovered.segments.len(), recovered.head, recovered.torn), (1, Lsn(1), None));
        assert_eq!(recovered.chain, log.next.chain, "the sealing batch stays");
        let names: Vec<_> = image(log.path()).into_iter().map(|(name, _)| name).collect();
        let kept = log.places[0].path.file_name().unwrap().to_str().unwrap();
        assert_eq!(names, ["notes.txt", kept, "spare-7.wal.tmp"]);
    }

    #[test]
    fn a_segment_of_another_log_is_never_cut() {
        let log = LogFixture::synced_all_along();
        let before = image(log.path());
        for other in [
            LogIdentity { cluster: ClusterId(8), ..IDENTITY },
            LogIdentity { region: RegionId(0), ..IDENTITY },
            LogIdentity { shard: ShardId(0), ..IDENTITY },
            LogIdentity { segment_size: 2 * SIZE, ..IDENTITY },
        ] {
            let error = recover(log.path(), &other, Lsn::ZERO.into()).unwrap_err();
            assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        }
        assert_eq!(before, image(log.path()));
    }

    #[test]
    fn a_segment_of_a_later_version_is_not_taken_for_damage() {
        for place in [0, 5, 10] {
            let log = LogFixture::synced_all_along();
            let path = &log.places[place].path;
            let mut page = fs::read(path).unwrap()[..60].to_vec();
            page[8] = 4;
            page.extend(crc32fast::hash(&page).to_le_bytes());
            write(path, &page, 0);
            let before = image(log.path());
            for known in [0, 36] {
                let error = recover(log.path(), &IDENTITY, Lsn(known).into()).unwrap_err();
                assert!(
                    matches!(error, Error::Mismatch { .. }) && error.to_string().contains("newer towline"),
                    "{error}"
                );
            }
            let verified = crate::wal::scan::verify_log(log.path(), Some(&IDENTITY), Lsn(0).into(), &mut ());
            assert!(matches!(verified, Err(Error::Mismatch { .. })));
            assert_eq!(before, image(log.path()));
        }
    }

    #[test]
    fn a_record_that_looks_like_the_log_does_not_make_it_corrupt() {
        let mut log = LogFixture::new();
        log.synced = Lsn(1);
        log.append(&[b"one"]);
        let own = fs::read(log.segment_path()).unwrap();
        let far = Expected { first_lsn: Lsn(1_000_000), chain: Chain(1), epoch: Epoch(3) };
        let other = crate::wal::batch::build(far, HybridTimestamp(1), Lsn(999_999), &[b"y"]);
        let gap = log.end();
        // The empty records bring the copies to multiples of eight, where batches are looked for.
        log.append(&[b"", &own[4096..4096 + 64], b"", &other]);
        write(&log.segment_path(), &[0; 50], gap);
        assert_eq!(recover_twice(&log, Lsn(1)).unwrap().head, Lsn(1));
    }

    #[test]
    fn files_of_a_wrong_length() {
        // A sealed segment whose zeros are gone has lost nothing: it is filled up.
        let log = LogFixture::synced_all_along();
        let last_of_first = log.places[4].clone();
        let file = fs::File::options().write(true).open(&last_of_first.path).unwrap();
        file.set_len(last_of_first.offset + last_of_first.len).unwrap();
        assert_eq!(recover_twice(&log, log.head()).err().map(|error| error.to_string()), None);
        // One that has lost records is refused, and so is one that is too long.
        for len in [last_of_first.offset, 100, 0, SIZE + 4096] {
            let log = LogFixture::synced_all_along();
            let file = fs::File::options().write(true).open(&log.places[0].path).unwrap();
            file.set_len(len).unwrap();
            assert!(recover_twice(&log, Lsn::ZERO).unwrap_err().is_corruption(), "{len}");
        }
        // The open one is cut and filled up, if that loses nothing synced.
        let log = LogFixture::synced_all_along();
        let last = log.places.last().unwrap();
        fs::File::options().write(true).open(&last.path).unwrap().set_len(last.offset + 60).unwrap();
        let recovered = recover_twice(&log, Lsn(33)).unwrap();
        assert_eq!((recovered.head, recovered.torn.unwrap().offset), (Lsn(33), last.offset));
    }

    /// What breaks: power fails between the steps of a cut. What prevents harm: later segments go first, and each step
    /// only takes away what was to be cut.
    #[test]
    fn a_cut_that_is_interrupted_comes_to_the_same() {
        let tear = || {
            let mut log = LogFixture::new();
            log.append(&[b"kept"]);
            let gap = log.end();
            log.append(&[&[1; 5000]]);
            let torn = log.segment_path();
            log.roll(Epoch(4));
            log.append(&[b"later"]);
            let later = log.segment_path();
            log.roll(Epoch(5));
            log.append(&[b"latest"]);
            write(&torn, &[0; 512], gap + 1000);
            (log, torn, gap, later)
        };
        for step in 0..5 {
            let (log, torn, gap, later) = tear();
            let spare = log.path().join("spare-1.wal.tmp");
            match step {
                0 => {}
                1 => fs::rename(log.segment_path(), spare).unwrap(),
                2 => fs::rename(&later, spare).unwrap(),
                3 => write(&torn, &[0; 2000], gap),
                _ => write(&torn, &[0; 2000], gap + 3000),
            }
            let recovered = recover_twice(&log, Lsn(1)).unwrap();
            assert_eq!((recovered.head, recovered.segments.len(), recovered.leftovers.len()), (Lsn(1), 1, 2));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Any flipped bit: either the log is refused, or all that is known to be synced is kept.
        #[test]
        fn any_flipped_bit(place in any::<prop::sample::Index>(), within in any::<prop::sample::Index>(),
                           bit in 0u32..8, in_header in prop::bool::weighted(0.2)) {
            let log = LogFixture::synced_all_along();
            let place = place.get(&log.places).clone();
            let len = usize::try_from(if in_header { 4096 } else { place.len }).unwrap();
            let offset = if in_header { 0 } else { place.offset } + within.index(len) as u64;
            flip(&place.path, offset, bit);
            // The last batch says that everything up to LSN 33 was synced.
            match recover_twice(&log, Lsn::ZERO) {
                Ok(recovered) => {
                    prop_assert!(recovered.head >= Lsn(33));
                    prop_assert!(place.last_lsn > Lsn(33) && recovered.torn.is_some());
                }
                Err(error) => prop_assert!(error.is_corruption() && (in_header || place.last_lsn <= Lsn(33)), "{error}"),
            }
            prop_assert!(recover(log.path(), &IDENTITY, Lsn(36).into()).is_err() || place.last_lsn <= Lsn(33));
        }

        /// Any length that the last segment can be cut to.
        #[test]
        fn any_cut(len in 0..SIZE) {
            let log = LogFixture::synced_all_along();
            fs::File::options().write(true).open(log.segment_path()).unwrap().set_len(len).unwrap();
            let whole = log.places.iter().filter(|place| place.path != log.segment_path() || place.offset + place.len <= len);
            let expected = if len < 4096 { Lsn(24) } else { whole.map(|place| place.last_lsn).max().unwrap() };
            let recovered = recover_twice(&log, Lsn(24)).unwrap();
            prop_assert_eq!(recovered.head, expected);
        }

        /// What breaks: power fails, and of what was written after the last sync any subset of 512-byte pieces is on
        /// disk. It must open, with all that was synced, and with a prefix of what was written.
        #[test]
        fn any_subset_of_unsynced_pieces(
            sizes in prop::collection::vec((1usize..3000, prop::bool::weighted(0.15)), 2..24),
            synced_batches in any::<prop::sample::Index>(),
            lost in prop::collection::vec(any::<bool>(), 1..97),
        ) {
            let mut log = LogFixture::new();
            let synced_batches = synced_batches.index(sizes.len());
            let mut synced_at = (log.segment_path(), log.end(), Lsn::ZERO);
            for (index, (size, roll)) in sizes.iter().enumerate() {
                if index < synced_batches {
                    synced_at = (log.segment_path(), log.end(), log.head());
                    log.synced = log.head();
                }
                // One record makes a compact batch, where nothing is to be said.
                log.append(&[&vec![7; *size], &b"second"[..]][..2 - size % 2]);
                if *roll || log.end() + 4000 > SIZE {
                    log.roll(Epoch(3));
                }
            }
            let (path, from, synced) = synced_at;
            let mut lost = lost.iter().cycle();
            for (segment_path, start) in unsynced(&log, &path, from) {
                let mut bytes = fs::read(&segment_path).unwrap();
                let start = usize::try_from(start).unwrap();
                for piece in (start / 512)..(bytes.len() / 512) {
                    if *lost.next().unwrap() {
                        bytes[(piece * 512).max(start)..(piece + 1) * 512].fill(0);
                    }
                }
                fs::write(&segment_path, bytes).unwrap();
            }
            let recovered = recover_twice(&log, synced);
            prop_assert!(recovered.is_ok(), "{:?}", recovered.err());
            prop_assert!(recovered.unwrap().head >= synced);
        }

        /// Whatever stands behind the synced part, it neither panics nor loses that part.
        #[test]
        fn arbitrary_bytes_behind_the_end(bytes in prop::collection::vec(any::<u8>(), 0..2000), spread in any::<bool>()) {
            let mut log = LogFixture::new();
            log.append(&[b"one"]);
            let template = fs::read(log.segment_path()).unwrap()[4096..4096 + 56].to_vec();
            let bytes: Vec<u8> = if spread {
                bytes.chunks(8).flat_map(|chunk| [chunk, &template[8..]].concat()).collect()
            } else {
                bytes
            };
            write(&log.segment_path(), &bytes[..bytes.len().min(50_000)], log.end());
            prop_assert_eq!(recover_twice(&log, Lsn(1)).unwrap().head, Lsn(1));
        }
    }

    /// Segments that hold unsynced bytes, with where those begin: all of a segment that was made after the sync.
    fn unsynced(log: &LogFixture, path: &Path, from: u64) -> Vec<(PathBuf, u64)> {
        let segments = walk::list(log.path()).unwrap().0.into_iter().map(|(_, segment)| segment);
        segments
            .filter(|segment| segment.as_path() >= path)
            .map(|segment| if segment == path { (segment, from) } else { (segment, 0) })
            .collect()
    }
}
