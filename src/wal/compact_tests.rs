//! Damage to logs of compact batches, which lean on those before them: what is known of such a log must be as much, and
//! as little be lost, as if each batch said everything.

#![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::limits::{PAGE_LEN, SEGMENT_HEADER_LEN};
use crate::types::{Epoch, Lsn};
use crate::wal::log_fixture::{IDENTITY, LogFixture, Place, flip, image, write};
use crate::wal::recovery::recover;
use crate::wal::scan::{ProblemKind, verify_log};

fn log() -> LogFixture {
    LogFixture::of_small_records(Lsn::MAX)
}

/// Damages bytes of a segment, and checks what recovery and verification say of it.
fn check_damage(log: &LogFixture, path: &Path, range: std::ops::Range<u64>, damage: impl Fn(&Path)) {
    let is_hit =
        |place: &&Place| place.path == path && place.range().start < range.end && range.start < place.range().end;
    let Some(first_hit) = log.places.iter().find(is_hit) else { return };
    damage(path);
    // What is still said to have been synced.
    let stated = log.places.iter().filter(|place| !is_hit(place)).filter_map(|place| place.stated).max().unwrap();
    let report = verify_log(log.path(), Some(&IDENTITY), KnownSynced::default(), &mut ()).unwrap();
    let before = image(log.path());
    let due = first_hit.first_lsn;
    match recover(log.path(), &IDENTITY, KnownSynced::default()) {
        Ok(recovered) => {
            assert!(stated < due, "LSN {due} was synced, as LSN {stated} was");
            assert_eq!((recovered.head, recovered.torn.is_some()), (due.previous(), true));
            assert!(report.is_sound() && report.head == recovered.head);
        }
        Err(error) => {
            assert!(error.is_corruption() && stated >= due, "{error}");
            assert_eq!(before, image(log.path()));
            // Everything but the rest of the page can still be read.
            let damaged = report.problems.iter().find(|problem| problem.kind == ProblemKind::Corrupt).unwrap();
            assert_eq!((&damaged.path, damaged.lsn), (&first_hit.path, Some(due)));
            let unreadable = |place: &&Place| {
                is_hit(place)
                    || place.path == path
                        && place.offset >= first_hit.offset
                        && place.stated.is_none()
                        && place.offset / PAGE_LEN == first_hit.offset.max(range.end - 1) / PAGE_LEN
            };
            let at_most = log.places.iter().filter(unreadable).count() as u64;
            assert!(report.batches + at_most >= log.places.len() as u64, "{} of {at_most}", report.batches);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_flipped_bit_is_torn_or_refused(place in any::<prop::sample::Index>(), within in any::<prop::sample::Index>(), bit in 0u32..8) {
        let log = log();
        let place = place.get(&log.places).clone();
        let at = place.offset + within.index(usize::try_from(place.len).unwrap()) as u64;
        check_damage(&log, &place.path, at..at + 1, |path| flip(path, at, bit));
    }

    #[test]
    fn any_lost_piece_is_torn_or_refused(segment in 0..3usize, at in 0..14_400u64, len in prop::sample::select(vec![1u64, 512, 4096])) {
        let log = log();
        let mut paths: Vec<_> = log.places.iter().map(|place| place.path.clone()).collect();
        paths.dedup();
        let from = (SEGMENT_HEADER_LEN + at) / len * len;
        check_damage(&log, &paths[segment], from..from + len, |path| write(path, &vec![0xee; usize::try_from(len).unwrap()], from));
    }
}

/// The case that one statement in a run of batches would not cover: the page that says so is lost, and the next batches
/// are compact ones of the same run.
#[test]
fn the_page_in_which_a_sync_ended_may_be_lost_and_the_next_still_says_so() {
    for records in [40, 60, 100] {
        let directory = tempfile::tempdir().unwrap();
        let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
        let (wal, mut writer) = Wal::open(directory.path(), IDENTITY, options).unwrap();
        writer.set_epoch(Epoch(1)).unwrap();
        for _ in 0..10 {
            writer.append(&[7; 100]).unwrap();
        }
        wal.log().wait_synced(Lsn(10), None).unwrap();
        for _ in 10..records {
            writer.append(&[7; 100]).unwrap();
        }
        let segment = wal.log().segments()[0].path().to_owned();
        assert!(writer.end().offset > 2 * PAGE_LEN);
        drop(writer);
        drop(wal);
        write(&segment, &[0; 4096], SEGMENT_HEADER_LEN);
        let error = recover(directory.path(), &IDENTITY, KnownSynced::default()).unwrap_err();
        assert!(error.is_corruption() && error.to_string().contains("up to LSN 10 were synced"), "{error}");
    }
}

#[test]
fn a_log_of_them_is_cut_anywhere() {
    for len in (SEGMENT_HEADER_LEN..SEGMENT_HEADER_LEN + 14_000).step_by(977) {
        let log = log();
        fs::File::options().write(true).open(log.segment_path()).unwrap().set_len(len).unwrap();
        let whole = log.places.iter().filter(|place| place.path != log.segment_path() || place.range().end <= len);
        let last = whole.map(|place| place.last_lsn).max().unwrap();
        assert_eq!(recover(log.path(), &IDENTITY, KnownSynced::default()).unwrap().head, last);
    }
}

#[test]
fn a_copy_with_another_history_is_refused_within_a_run_too() {
    let log = log();
    let begins = log.places.iter().position(|place| place.first_lsn == Lsn(60)).unwrap();
    assert!(log.places[begins].stated.is_none());
    drop(log);
    for damaged in begins - 3..begins + 40 {
        let (log, other) = (self::log(), LogFixture::of_small_records(Lsn(60)));
        let place = &log.places[damaged];
        flip(&place.path, place.offset + 1, 3);
        let before = image(log.path());
        let error = super::mend::tests::mend_from(&log, &other).unwrap_err();
        assert!(error.is_corruption() && error.to_string().contains("another history"), "{damaged}: {error}");
        assert_eq!(before, image(log.path()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_flipped_byte_of_a_run_is_repaired(at in 0..14_000u64, segment in 0..2usize, mask in 1u8..) {
        let (log, twin) = (log(), log());
        let mut paths: Vec<_> = log.places.iter().map(|place| place.path.clone()).collect();
        paths.dedup();
        let at = SEGMENT_HEADER_LEN + at;
        let mut bytes = fs::read(&paths[segment]).unwrap();
        bytes[usize::try_from(at).unwrap()] ^= mask;
        fs::write(&paths[segment], bytes).unwrap();
        let ranges = super::mend::tests::mend_from(&log, &twin).unwrap();
        prop_assert!(image(log.path()) == image(twin.path()), "byte for byte: {:?}", ranges);
        prop_assert_eq!(ranges.len(), 1);
        // From the batch to the next page's first.
        let place = log.places.iter().find(|place| place.path == paths[segment] && place.range().contains(&at)).unwrap();
        prop_assert_eq!(ranges[0].offset, place.offset);
        prop_assert!(ranges[0].len <= 2 * PAGE_LEN, "{:?}", ranges);
    }
}
