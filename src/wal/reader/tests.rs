//! What readers are given is whole, wherever they begin and however little they ask for.

#![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::limits::{PAGE_LEN, index};
use crate::types::{ClusterId, RegionId, ShardId};
use crate::wal::health::Finding;
use crate::wal::{LogIdentity, LogWriter, SyncPolicy, Wal, WalOptions};

const SEGMENT: u64 = 64 * 1024;
const IDENTITY: LogIdentity =
    LogIdentity { cluster: ClusterId(9), region: RegionId(0), shard: ShardId(3), segment_size: SEGMENT };

fn open(directory: &std::path::Path) -> (Wal, LogWriter) {
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(directory, IDENTITY, options).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    (wal, writer)
}

/// Record `lsn` of a test log.
fn record(lsn: Lsn) -> Vec<u8> {
    let len = match lsn.0 % 40 {
        // No room for such a one in what most of the readers below ask for; some are longer than half a segment.
        7 => 9_000 + lsn.0 * 101 % 30_000,
        8..14 => 300,
        0 => 0,
        small => small * 3,
    };
    (0..len).map(|at| (lsn.0 * 31 + at).to_le_bytes()[0]).collect()
}

/// One more batch: most of one small record, which are compact, some of several.
fn append(writer: &mut LogWriter) -> Lsn {
    let next = writer.end().head.next();
    if next.0 % 40 == 8 {
        return writer.append_batch(&(0..6).map(|more| record(next.plus(more))).collect::<Vec<_>>()).unwrap();
    }
    writer.append(&record(next)).unwrap()
}

/// A log of some segments, the last under another epoch.
fn log() -> (tempfile::TempDir, Wal, LogWriter) {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    while append(&mut writer) < Lsn(300) {}
    writer.set_epoch(Epoch(2)).unwrap();
    while append(&mut writer) < Lsn(330) {}
    assert!(wal.log().segments().len() > 3);
    (directory, wal, writer)
}

/// Where batches, header pages and segments end, in one segment: from 0 on.
fn boundaries(segment: &Segment) -> Vec<u64> {
    let mut ends = vec![0, SEGMENT_HEADER_LEN];
    let batches = BatchIter::within(segment.header(), segment.bytes(SEGMENT_HEADER_LEN..segment.published()).unwrap());
    for batch in batches {
        ends.push(ends.last().unwrap() + batch.header.total_len());
    }
    ends
}

/// Reads all there is, and checks that each range begins and ends between batches and is as long as it may be.
fn read(reader: &mut LogReader, most_bytes: &mut dyn FnMut() -> u64) -> Vec<Lsn> {
    let mut lsns = Vec::new();
    loop {
        let most = most_bytes();
        let Some(range) = reader.next(most).unwrap() else { return lsns };
        let ends = boundaries(range.segment());
        assert!(ends.contains(&range.start()) && ends.contains(&range.end()), "{range:?} of {ends:?}");
        let at_least = range.start().max(SEGMENT_HEADER_LEN);
        let first = *ends.iter().find(|&&end| end > at_least).unwrap_or(&at_least);
        let due = ends.iter().rfind(|&&end| end <= range.start().saturating_add(most)).unwrap();
        assert_eq!(range.end(), first.max(*due), "{most} from {}", range.start());
        for found in range.records() {
            assert!(found.bytes == record(found.lsn), "LSN {}", found.lsn);
            lsns.push(found.lsn);
        }
    }
}

fn assert_all(found: &[Lsn], from: Lsn, head: Lsn) {
    assert_eq!(*found, (from.0..=head.0).map(Lsn).collect::<Vec<_>>());
}

#[test]
fn whatever_is_asked_for_no_record_is_lost() {
    let (_directory, wal, _writer) = log();
    let ranges = wal.log().ranges_from(Lsn::FIRST).unwrap();
    let kinds = || ranges.iter().flat_map(LogRange::batches).map(|batch| batch.header);
    assert!(kinds().filter(BatchHeader::is_compact).count() > 100 && kinds().any(|header| header.record_count > 1));
    assert!(kinds().any(|header| header.total_len() > SEGMENT / 2));
    for most in (0..200).chain((200..SEGMENT + 5000).step_by(997)).chain([4095, 4096, 4097, 65_536, u64::MAX]) {
        let mut reader = wal.log().reader_from(Lsn::FIRST).unwrap();
        assert_all(&read(&mut reader, &mut || most), Lsn::FIRST, wal.log().head());
    }
}

#[test]
fn a_reader_from_anywhere_begins_with_a_whole_batch() {
    let (_directory, wal, _writer) = log();
    let head = wal.log().head();
    for lsn in 1..=head.0 + 1 {
        let mut reader = wal.log().reader_from(Lsn(lsn)).unwrap();
        let found = read(&mut reader, &mut || 1000);
        let first = found.first().copied().unwrap_or(head.next());
        assert!(first <= Lsn(lsn) && first.plus(6) > Lsn(lsn), "{first} for {lsn}");
        assert_all(&found, first, head);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// While it is written, and under one epoch after the other.
    #[test]
    fn no_record_is_lost_however_the_reader_and_the_writer_take_turns(
        turns in prop::collection::vec((0usize..60, 0u64..20_000, prop::bool::weighted(0.1)), 1..30),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = open(directory.path());
        let mut reader = wal.log().reader_from(Lsn::FIRST).unwrap();
        let mut found = Vec::new();
        for (batches, most, is_new_epoch) in turns {
            if is_new_epoch {
                writer.set_epoch(writer.end().epoch.next()).unwrap();
            }
            for _ in 0..batches {
                append(&mut writer);
            }
            let mut left = 3;
            while left > 0 && reader.wait(Some(Instant::now())) == LogWaited::More {
                let range = reader.next(most).unwrap().unwrap();
                found.extend(range.records().map(|record| record.lsn));
                left -= 1;
            }
        }
        found.extend(read(&mut reader, &mut || 5000));
        assert_all(&found, Lsn::FIRST, wal.log().head());
        prop_assert_eq!(reader.wait(Some(Instant::now())), LogWaited::TimedOut);
    }
}

#[test]
fn a_reader_begins_between_two_batches_or_not_at_all() {
    let (_directory, wal, _writer) = log();
    let log = wal.log();
    let is_refused = |place| matches!(log.reader_at(place), Err(Error::Invalid { .. }));
    for lsn in [1, 2, 60, 150, log.head().0, log.head().0 + 1] {
        let place = log.position_before(Lsn(lsn)).unwrap();
        let found = read(&mut log.reader_at(place).unwrap(), &mut || 700);
        assert_all(&found, place.lsn.next(), log.head());
        let segment = log.segment_beginning(place.segment).unwrap();
        let ends = boundaries(&segment);
        for offset in (0..segment.published() + 100).step_by(8).chain([1, 4097, u64::MAX]) {
            // Another offset has another LSN before it, but for the header page, which stands before none.
            let is_same = offset == place.offset || offset == SEGMENT_HEADER_LEN && place.offset == 0;
            assert_eq!(is_refused(LogPosition { offset, ..place }), !is_same, "{offset} of {place:?}, {ends:?}");
        }
        assert!(is_refused(LogPosition { lsn: place.lsn.next(), ..place }));
        assert!(is_refused(LogPosition { chain: Chain(place.chain.0 ^ 1), ..place }) || place.offset == 0);
        assert!(is_refused(LogPosition { segment: place.segment.next(), ..place }));
        let after_all = LogPosition { segment: log.head().plus(2), ..place };
        assert!(matches!(log.reader_at(after_all), Err(Error::NotRetained { .. })));
    }
    let first = log.position_before(Lsn::FIRST).unwrap();
    log.wait_synced(log.head(), None).unwrap();
    log.release_through(Lsn::MAX, "the test says so").unwrap();
    assert!(matches!(log.reader_at(first), Err(Error::NotRetained { .. })));
}

/// As a follower's log that ends with a sealed segment.
#[test]
fn a_reader_begins_where_the_next_segment_will() {
    let (_directory, wal, _writer) = log();
    let directory = tempfile::tempdir().unwrap();
    let (copy, mut sink) = Wal::open(directory.path(), IDENTITY, WalOptions::default()).unwrap();
    let empty = copy.log().reader_at(copy.log().position_before(Lsn::FIRST).unwrap()).unwrap();
    assert_eq!(empty.wait(Some(Instant::now())), LogWaited::TimedOut);
    let mut source = wal.log().reader_from(Lsn::FIRST).unwrap();
    let take_in = |sink: &mut LogWriter, range: &LogRange| {
        let mut at = range.start();
        while at < range.end() {
            let window = sink.ingest_window(range.segment().id().first_lsn, at, range.end() - at).unwrap();
            let len = window.len() as u64;
            window.copy_from_slice(range.segment().bytes(at..at + len).unwrap());
            sink.ingest_filled(len).unwrap();
            at += len;
        }
    };
    take_in(&mut sink, &source.next(u64::MAX).unwrap().unwrap());
    let head = copy.log().head();
    assert_eq!(copy.log().segments()[0].sealed_last_lsn(), Some(head));
    let place = copy.log().position_before(head.next()).unwrap();
    assert_eq!((place.segment, place.offset), (head.next(), 0));
    let before_seal = place_before_seal(&copy.log().segments()[0]).unwrap();
    assert!(before_seal.lsn == head && before_seal.chain != place.chain);
    for ends in [before_seal, place] {
        assert_eq!(copy.log().position_after(head, ends.chain).unwrap(), Some(ends), "a log may end at either");
    }
    let mut reader = copy.log().reader_at(place).unwrap();
    assert_eq!(reader.wait(Some(Instant::now())), LogWaited::TimedOut);
    assert!(reader.next(1).unwrap().is_none());
    assert!(copy.log().reader_at(LogPosition { offset: SEGMENT_HEADER_LEN, ..place }).is_err());
    while let Some(range) = source.next(u64::MAX).unwrap() {
        take_in(&mut sink, &range);
    }
    assert_eq!(reader.wait(None), LogWaited::More);
    assert_all(&read(&mut reader, &mut || 1), head.next(), wal.log().head());
    copy.log().reader_at(place).unwrap();
}

#[test]
fn up_to_damage_whole_batches_are_read_and_behind_it_nothing() {
    for within in [0, 1, 9, 20] {
        for number in [1, 2, 3, 40] {
            let (_directory, wal, _writer) = log();
            let segment = Arc::clone(&wal.log().segments()[1]);
            let begins = boundaries(&segment)[number];
            let first_lsn = segment.id().first_lsn;
            wal.log().health().found(Finding {
                path: segment.path().to_owned(),
                segment: first_lsn,
                offset: begins + within,
                end: begins + PAGE_LEN,
                lsn: first_lsn,
                reason: "the test says so".to_owned(),
            });
            for most in [0, 1, 30, 500, 4096, 8192, u64::MAX] {
                let mut reader = wal.log().reader_from(Lsn::FIRST).unwrap();
                let mut end = (Lsn::ZERO, 0);
                let error = loop {
                    match reader.next(most) {
                        Ok(range) => end = range.map(|range| (range.segment().id().first_lsn, range.end())).unwrap(),
                        Err(error) => break error,
                    }
                };
                assert_eq!(end, (first_lsn, begins), "{within} {number} {most}");
                assert!(matches!(error, Error::Corrupt { offset, .. } if offset == begins + within), "{error}");
                assert_eq!(reader.wait(None), LogWaited::More);
                assert!(reader.next(most).unwrap_err().is_corruption(), "it is still there");
            }
        }
    }
}

/// What no log publishes: whoever comes upon it is told, and nothing panics or goes round for ever.
#[test]
fn published_bytes_that_are_no_batch_are_corrupt() {
    let (_directory, wal, _writer) = log();
    for from in [SEGMENT_HEADER_LEN + 8, SEGMENT_HEADER_LEN + 20, SEGMENT_HEADER_LEN + 333] {
        for most in [0, 1, 100, 5000, u64::MAX] {
            let mut reader = wal.log().reader_from(Lsn::FIRST).unwrap();
            reader.offset = from;
            for _ in 0..10_000 {
                match reader.next(most) {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => {
                        assert!(error.is_corruption() && most < u64::MAX, "{error}");
                        break;
                    }
                }
            }
        }
    }
}

#[test]
fn waiting_ends_with_more_or_with_the_log_or_at_the_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    let mut reader = wal.log().reader_from(Lsn::FIRST).unwrap();
    let soon = || Some(Instant::now() + Duration::from_millis(20));
    assert_eq!(reader.wait(soon()), LogWaited::TimedOut, "of an empty log");
    append(&mut writer);
    assert_eq!(reader.wait(Some(Instant::now())), LogWaited::More, "what is there is there after the deadline too");
    assert_eq!(reader.wait(None), LogWaited::More, "until it is read");
    assert_all(&read(&mut reader, &mut || 0), Lsn(1), Lsn(1));
    assert_eq!(reader.wait(soon()), LogWaited::TimedOut);
    append(&mut writer);
    wal.close().unwrap();
    assert_eq!(reader.wait(None), LogWaited::More, "what was appended before the end comes before it");
    assert_all(&read(&mut reader, &mut || 0), Lsn(2), Lsn(2));
    assert_eq!(reader.wait(None), LogWaited::Ended);
    assert!(matches!(reader.log().end_reason(), Error::ShutDown));
    assert_eq!(reader.wait(Some(Instant::now())), LogWaited::Ended);
}

#[test]
fn those_who_wait_are_woken_for_each_record_and_for_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    let log = Arc::clone(wal.log());
    std::thread::scope(|scope| {
        let tails = [0, 100, 4096, u64::MAX].map(|most| {
            let mut reader = log.reader_from(Lsn::FIRST).unwrap();
            scope.spawn(move || {
                let mut found = Vec::new();
                while reader.wait(None) == LogWaited::More {
                    while let Some(range) = reader.next(most).unwrap() {
                        assert!(boundaries(range.segment()).contains(&range.end()));
                        found.extend(range.records().map(|record| record.lsn));
                    }
                }
                found
            })
        });
        for _ in 0..600 {
            let last = append(&mut writer);
            if last.0.is_multiple_of(50) {
                while !log.written().has_waiters() {
                    std::thread::yield_now();
                }
            }
        }
        wal.close().unwrap();
        for tail in tails {
            assert_all(&tail.join().unwrap(), Lsn::FIRST, log.head());
        }
    });
}

#[test]
fn a_reader_whose_place_is_given_up_is_told_and_does_not_wait() {
    let (_directory, wal, mut writer) = log();
    let log = wal.log();
    let mut reader = log.reader_from(Lsn::FIRST).unwrap();
    let range = reader.next(u64::MAX).unwrap().unwrap();
    assert!(range.segment().is_sealed() && range.end() == range.segment().published());
    append(&mut writer);
    log.wait_synced(log.head(), None).unwrap();
    log.release_through(Lsn::MAX, "the test says so").unwrap();
    assert_eq!(reader.wait(None), LogWaited::More);
    assert!(matches!(reader.next(u64::MAX), Err(Error::NotRetained { .. })));
    assert_eq!(reader.wait(None), LogWaited::More);
    let record_bytes: u64 = range.records().map(|record| record.bytes.len() as u64).sum();
    assert!(record_bytes < range.len() && index(range.len()) == range.bytes().len());
}

#[test]
fn ranges_for_streams_end_with_pieces_while_there_is_more() {
    let directory = tempfile::tempdir().unwrap();
    let identity = LogIdentity { segment_size: 4 << 20, ..IDENTITY };
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(directory.path(), identity, options).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    while writer.end().offset < 3 << 20 {
        writer.append(&[7; 1000]).unwrap();
    }
    let published = writer.end().offset;
    // Ends elsewhere than with a piece: the last one, and all those of a reader that takes less than a piece at a time.
    for (most, expected) in
        [(1 << 20, 1), (LOG_PIECE_LEN, 1), (LOG_PIECE_LEN + 1, 1), (100_000, published / 100_000 + 1)]
    {
        let mut reader = wal.log().reader_from(Lsn::FIRST).unwrap();
        let (mut end, mut others) = (0, 0);
        while let Some(range) = reader.next_cut_anywhere(most).unwrap() {
            assert!(range.start() == end && range.len() <= most);
            end = range.end();
            others += u64::from(!end.is_multiple_of(LOG_PIECE_LEN));
        }
        assert_eq!(end, published);
        assert_eq!(others, expected, "{most} at a time");
    }
}
