//! Tests of mending: damaged copies of a log, and copies that do not fit.

use std::fs;

use proptest::prelude::*;

use super::*;
use crate::types::Chain;
use crate::wal::known_synced::WrittenHere;
use crate::wal::log_fixture::{IDENTITY, LogFixture, SIZE, flip, image, write};
use crate::wal::recovery::recover;
use crate::wal::scan::{ProblemKind, verify_log};

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
    fn fetch(&mut self, segment: Lsn, range: Range<u64>, put: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<u64> {
        self.asked.push(range.clone());
        let id = WalSegmentId { region: IDENTITY.region, shard: IDENTITY.shard, first_lsn: segment };
        let path = self.directory.join(id.to_string());
        if !path.exists() {
            return Err(Error::invalid(format!("no segment begins with LSN {segment}")));
        }
        let mut file = SegmentFile::open(&path)?;
        let header = file.header()?.unwrap();
        let due = Expected { first_lsn: segment, chain: header.chain_before, epoch: header.epoch };
        let walked = walk::walk(&mut file, Some(&header), (SEGMENT_HEADER_LEN, SIZE, SIZE), due, |_, _| {})?;
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
    let synced = verify_log(log.path(), Some(&IDENTITY), KnownSynced::default(), &mut ()).unwrap().synced;
    Mending { directory: log.path(), identity: &IDENTITY, known: synced.max(Lsn(30)).into(), staging }.run(source)
}

fn mend(log: &LogFixture, source: &mut dyn Source) -> Result<Vec<MendedRange>> {
    mend_to(log, log.path(), source)
}

/// Mends a log from another one.
pub(in crate::wal) fn mend_from(log: &LogFixture, other: &LogFixture) -> Result<Vec<MendedRange>> {
    mend(log, &mut Copy::of(other))
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
    #![proptest_config(ProptestConfig::with_cases(32))]
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
        let of_batch = batch.map(|batch| batch.offset..batch.offset + batch.len);
        let due: Vec<_> = of_batch.or((at < 4096).then_some(0..4096)).into_iter().collect();
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

/// A log that had outgrown its bound when the power went: recovery begins it with the file set aside.
#[test]
fn a_segment_that_was_set_aside_is_repaired_where_the_log_begins_with_it() {
    let (log, _twin, mut copy) = twins();
    let (first, second, third) = (&log.places[0], &log.places[5].path, &log.places[10].path);
    let aside = log.path().join(format!("aside-{}", first.path.file_name().unwrap().to_str().unwrap()));
    fs::rename(&first.path, &aside).unwrap();
    write(second, &vec![0; usize::try_from(SIZE).unwrap()], 0);
    fs::remove_file(third).unwrap();
    let known = first.last_lsn.into();
    let problems = || verify_log(log.path(), Some(&IDENTITY), known, &mut ()).unwrap().problems;
    let kinds = || problems().iter().map(|problem| (problem.path.clone(), problem.kind)).collect::<Vec<_>>();
    let torn = (second.clone(), ProblemKind::TornTail);
    assert_eq!(kinds(), std::slice::from_ref(&torn));
    flip(&aside, first.offset + 60, 3);
    assert_eq!(kinds().first(), Some(&(aside.clone(), ProblemKind::Corrupt)));
    let mending = Mending { directory: log.path(), identity: &IDENTITY, known, staging: log.path() };
    assert_eq!(mending.run(&mut copy).unwrap().len(), 1);
    assert_eq!(kinds(), [torn]);
    assert_eq!(recover(log.path(), &IDENTITY, known).unwrap().head, log.places[4].last_lsn);
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
fn an_open_segment_whose_file_is_too_long_is_cut_to_its_size() {
    let (log, twin, mut copy) = twins();
    let path = log.segment_path();
    for (from, synced_in_it) in [(Lsn(30), true), (Lsn(20), false)] {
        fs::File::options().write(true).open(&path).unwrap().set_len(SIZE + 5000).unwrap();
        write(&path, b"appended by mistake", SIZE);
        // What says so in the log counts only if it was written here.
        let known = KnownSynced { lsn: from, written_here: WrittenHere::Nothing };
        let report = verify_log(log.path(), Some(&IDENTITY), known, &mut ()).unwrap();
        assert_eq!(report.is_sound(), !synced_in_it, "{:?}", report.problems);
        let mending = Mending { directory: log.path(), identity: &IDENTITY, known, staging: log.path() };
        let ranges = mending.run(&mut copy).unwrap();
        if synced_in_it {
            assert!(recover(twin.path(), &IDENTITY, known).is_ok());
            assert!(image(log.path()) == image(twin.path()), "{ranges:?}");
            assert_eq!((ranges[0].offset, ranges[0].len, ranges[0].fetched), (SIZE, 5000, false));
        } else {
            assert_eq!(ranges, [], "recovery takes such a segment for a torn tail, as a whole");
            assert_eq!(recover(log.path(), &IDENTITY, known).unwrap().head, Lsn(24));
        }
    }
    assert!(copy.asked.is_empty());
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
    write(&log.segment_path(), &vec![0; usize::try_from(SIZE).unwrap()], 0);
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
    // A copy that ends within the damage has not enough, and says nothing of another history.
    let (log, twin, mut copy) = twins();
    for place in &log.places[6..8] {
        flip(&place.path, place.offset + 60, 0);
    }
    flip(&twin.places[7].path, twin.places[7].offset + 60, 0);
    let text = assert_refused(&log, &mut copy).to_string();
    let last = format!("the copy has it only up to LSN {},", twin.places[6].last_lsn);
    assert!(text.contains(&last) && !text.contains("another history"), "{text}");
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
