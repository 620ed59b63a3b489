//! Compact batches: where they are written, and that nothing is missing where they are read. And what the writer keeps
//! account of that its log does not show.

#![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

use super::*;
use crate::limits::MIN_SEGMENT_SIZE;
use crate::types::{ClusterId, RegionId, ShardId};
use crate::wal::batch::COMPACT_BATCH_VERSION;
use crate::wal::segment::{OLDEST_SEGMENT_VERSION, write_all_at};
use crate::wal::{LogIdentity, Wal, WalOptions, scan};
use crate::zeros::is_zero;

const IDENTITY: LogIdentity =
    LogIdentity { cluster: ClusterId(9), region: RegionId(0), shard: ShardId(3), segment_size: MIN_SEGMENT_SIZE };

/// A log that nobody syncs in the background.
fn open(directory: &std::path::Path) -> (Wal, LogWriter) {
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(directory, IDENTITY, options).unwrap();
    writer.set_epoch(Epoch(1).max(writer.end().epoch)).unwrap();
    (wal, writer)
}

/// The headers of all batches, with the first LSN of their segment and where they stand in it.
fn headers(log: &Arc<Log>) -> Vec<(Lsn, u64, BatchHeader)> {
    let mut headers = Vec::new();
    for range in log.ranges_from(log.tail()).unwrap() {
        let mut at = range.start().max(SEGMENT_HEADER_LEN);
        for batch in range.batches() {
            headers.push((range.segment().id().first_lsn, at, batch.header));
            at += batch.header.total_len();
        }
    }
    headers
}

fn is_last_compact(log: &Arc<Log>) -> bool {
    headers(log).last().unwrap().2.is_compact()
}

#[test]
fn small_records_are_compact_but_for_the_first_in_each_page() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    let lens = [0, 1, 7, 8, 100, 128, 500, 1000];
    for index in 0..3_000 {
        writer.append(&vec![7; lens[index % lens.len()]]).unwrap();
    }
    let headers = headers(wal.log());
    let mut plain = (Lsn::ZERO, 0);
    for (segment, at, header) in &headers {
        if header.is_compact() {
            assert_eq!(
                (segment, header.version),
                (&plain.0, COMPACT_BATCH_VERSION),
                "each segment begins with a plain one"
            );
            assert_eq!(at / PAGE_LEN, plain.1 / PAGE_LEN, "at {at}, behind {}", plain.1);
        } else {
            let is_due = *segment != plain.0 || header.is_sealing() || at / PAGE_LEN > plain.1 / PAGE_LEN;
            assert!(is_due, "a plain batch at {at}, behind {}", plain.1);
            plain = (*segment, *at);
        }
    }
    assert!(headers.iter().filter(|(_, _, header)| header.is_compact()).count() > 2_500);
    // All that the format says of batches, as if each said it itself.
    for pair in headers.windows(2) {
        let (before, after) = (pair[0].2, pair[1].2);
        assert_eq!(after.first_lsn, before.last_lsn().next());
        assert!(after.timestamp > before.timestamp);
        assert_eq!(after.epoch, Epoch(1));
        assert!(pair[0].0 != pair[1].0 || after.prev_crc == before.crc);
    }
    drop(writer);
    drop(wal);
    let report = scan::verify_log(directory.path(), Some(&IDENTITY), Lsn::ZERO.into(), &mut ()).unwrap();
    assert_eq!((report.head, report.batches, report.problems.len()), (Lsn(3_000), headers.len() as u64, 0));
}

#[test]
fn what_others_would_say_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    let log = Arc::clone(wal.log());
    writer.append(b"the first of a segment").unwrap();
    assert!(!is_last_compact(&log));
    let lsn = writer.append(b"nothing to say").unwrap();
    assert!(is_last_compact(&log));
    log.wait_synced(lsn, None).unwrap();
    writer.append(b"more was synced").unwrap();
    let header = headers(&log).last().unwrap().2;
    assert_eq!((header.is_compact(), header.synced_lsn), (false, lsn));
    writer.append(b"nothing to say").unwrap();
    assert!(is_last_compact(&log));
    writer.append_batch(&[b"two", b"of "]).unwrap();
    assert!(!is_last_compact(&log));
    writer.append(&[7; 4095]).unwrap();
    assert!(is_last_compact(&log));
    writer.append_batch(&[b"one"]).unwrap();
    writer.append(&[7; 4096]).unwrap();
    assert!(!is_last_compact(&log), "too long");
    writer.append_batch(&[b"one"]).unwrap();
    writer.set_epoch(Epoch(2)).unwrap();
    writer.append(b"the first of an epoch").unwrap();
    let header = headers(&log).last().unwrap().2;
    assert_eq!((header.is_compact(), header.epoch), (false, Epoch(2)));
    drop(writer);
    drop(wal);
    let (wal, mut writer) = open(directory.path());
    let head = wal.log().head();
    assert_eq!(writer.append(b"the first since it was opened").unwrap(), head.next());
    assert!(!is_last_compact(wal.log()));
    writer.append(b"nothing to say").unwrap();
    assert!(is_last_compact(wal.log()));
}

#[test]
fn timestamps_go_on_where_a_compact_batch_cannot_count_further() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    writer.append(b"the first of a segment").unwrap();
    // A clock that has been ahead, at the 32,766th batch of a millisecond.
    let ahead = HybridTimestamp::default().tick(4_000_000_000_000);
    writer.timestamp = HybridTimestamp(ahead.0 + 0x7ffe);
    let compact: Vec<bool> = (0..3)
        .map(|_| {
            writer.append(b"record").unwrap();
            is_last_compact(wal.log())
        })
        .collect();
    assert_eq!(compact, [true; 3]);
    assert!(headers(wal.log()).windows(2).all(|pair| pair[1].2.timestamp > pair[0].2.timestamp));
    writer.timestamp = HybridTimestamp(1 << 58);
    writer.append(b"record").unwrap();
    assert!(!is_last_compact(wal.log()), "the year 2109");
}

#[test]
fn a_segment_of_the_version_before_goes_on_without_compact_batches() {
    let directory = tempfile::tempdir().unwrap();
    let header = SegmentHeader {
        id: WalSegmentId { region: IDENTITY.region, shard: IDENTITY.shard, first_lsn: Lsn(1) },
        cluster: IDENTITY.cluster,
        epoch: Epoch(1),
        chain_before: IDENTITY.genesis(),
        segment_size: IDENTITY.segment_size,
        version: OLDEST_SEGMENT_VERSION,
    };
    let at = Expected { first_lsn: Lsn(1), chain: header.chain_before, epoch: Epoch(1) };
    let mut bytes = header.encode().to_vec();
    bytes.extend(batch::build(at, HybridTimestamp::default().tick(1), Lsn::ZERO, &[b"one"]));
    bytes.resize(limits::index(IDENTITY.segment_size), 0);
    std::fs::write(directory.path().join(header.id.to_string()), bytes).unwrap();
    let (wal, mut writer) = open(directory.path());
    let mut lsn = Lsn(1);
    while wal.log().segments().len() < 2 {
        lsn = writer.append(&[7; 100]).unwrap();
    }
    assert!(!is_last_compact(wal.log()), "the first of a segment");
    assert_eq!(writer.append(&[7; 100]).unwrap(), lsn.next());
    let versions: Vec<u16> = wal.log().segments().iter().map(|segment| segment.header().version).collect();
    assert_eq!(versions, [OLDEST_SEGMENT_VERSION, SEGMENT_VERSION]);
    for (segment, at, header) in headers(wal.log()) {
        assert_eq!(header.is_compact(), segment == lsn && at > SEGMENT_HEADER_LEN);
    }
    // And so does a copy of it.
    let copy = tempfile::tempdir().unwrap();
    let (copy, mut sink) = open(copy.path());
    for range in wal.log().ranges_from(Lsn(1)).unwrap() {
        for piece in range.bytes().chunks(5_000) {
            let (segment, offset) = sink.ingest_position();
            let mut rest = piece;
            let mut at = offset;
            while !rest.is_empty() {
                let window = sink.ingest_window(segment, at, rest.len() as u64).unwrap();
                let len = window.len().min(rest.len());
                window[..len].copy_from_slice(&rest[..len]);
                sink.ingest_filled(len as u64).unwrap();
                rest = &rest[len..];
                at += len as u64;
            }
        }
    }
    assert_eq!(headers(copy.log()), headers(wal.log()));
}

#[test]
fn reading_begins_anywhere_in_a_run_of_compact_batches() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    for lsn in 1..=400_u64 {
        writer.append(&lsn.to_le_bytes().repeat(30)).unwrap();
    }
    let log = wal.log();
    assert!(log.segments().len() > 1);
    let headers = headers(log);
    let is_plain = |place: LogPosition| {
        let header = headers.iter().find(|(segment, at, _)| (*segment, *at) == (place.segment, place.offset));
        place.offset == 0 || header.is_some_and(|(_, _, header)| !header.is_compact())
    };
    let mut compact_places = 0;
    for from in 1..=400 {
        let mut reader = log.reader_from(Lsn(from)).unwrap();
        let range = reader.next(u64::MAX).unwrap().unwrap();
        let record = range.records().next().unwrap();
        assert_eq!((record.lsn, record.bytes), (Lsn(from), from.to_le_bytes().repeat(30).as_slice()));
        let (place, plain) = (log.position_before(Lsn(from)).unwrap(), log.plain_position_before(Lsn(from)).unwrap());
        assert!(is_plain(plain), "LSN {from}: {plain:?}");
        assert!((plain.segment, plain.offset) <= (place.segment, place.offset) && plain.lsn <= place.lsn);
        assert!(place.segment != plain.segment || place.offset - plain.offset <= PAGE_LEN + 256);
        compact_places += usize::from(plain != place);
    }
    assert!(compact_places > 300, "{compact_places}");
    let end = log.plain_position_before(Lsn(401)).unwrap();
    assert!(is_plain(end) && end.lsn < Lsn(400), "{end:?}");
}

#[test]
fn no_batch_is_compact_whose_lsn_the_segment_could_not_tell() {
    let segment = SegmentHeader {
        id: WalSegmentId { region: IDENTITY.region, shard: IDENTITY.shard, first_lsn: Lsn(10) },
        cluster: IDENTITY.cluster,
        epoch: Epoch(1),
        chain_before: Chain(5),
        segment_size: limits::MAX_SEGMENT_SIZE,
        version: SEGMENT_VERSION,
    };
    assert_eq!(compact_until(&segment, 4096, Lsn(10)), 8192);
    assert_eq!(compact_until(&segment, 8191, Lsn(10)), 8192);
    let far = Lsn(10 + COMPACT_LSNS - PAGE_LEN);
    assert_eq!((compact_until(&segment, 5000, far.previous()), compact_until(&segment, 5000, far)), (8192, 0));
    assert_eq!(compact_until(&SegmentHeader { version: OLDEST_SEGMENT_VERSION, ..segment }, 5000, Lsn(10)), 0);
    // And where one is read, it is refused.
    let misplaced = |first_lsn, offset, segment: &SegmentHeader| {
        let at = Expected { first_lsn: Lsn(first_lsn), chain: Chain(1), epoch: Epoch(1) };
        let bytes = batch::build_compact(at, HybridTimestamp(1), b"record").unwrap();
        let header = batch::verify(&bytes, 100, at).unwrap();
        segment.find_misplaced(offset, &header).is_some()
    };
    assert!(!misplaced(9 + COMPACT_LSNS, 5000, &segment) && misplaced(10 + COMPACT_LSNS, 5000, &segment));
    assert!(misplaced(11, SEGMENT_HEADER_LEN, &segment));
    assert!(misplaced(11, 5000, &SegmentHeader { version: OLDEST_SEGMENT_VERSION, ..segment }));
}

#[test]
fn a_segment_that_arrives_has_its_file_before_its_header_page_has() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    let files = |ending: &str| {
        let names = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().ends_with(ending)).count()
    };
    writer.ingest_window(Lsn::FIRST, 0, 100).unwrap();
    assert!(writer.reserved.is_some() && files("1.wal") == 0, "nothing is waited for once the page is there");
    let reserved = writer.reserved.as_ref().map(|spare| spare.path.clone());
    writer.ingest_window(Lsn::FIRST, 0, 100).unwrap();
    assert_eq!(writer.reserved.as_ref().map(|spare| spare.path.clone()), reserved, "one is enough");
    writer.discard_partial();
    // Should this node write on by itself, it takes that one.
    writer.append(b"record").unwrap();
    assert!(writer.reserved.is_none() && files("1.wal") == 1);
    drop(writer);
    wal.close().unwrap();
}

/// What breaks: the disk is full when a log that was received in bulk is written on. What would be lost: the file of a
/// spare at each attempt, which keeps its room and is nobody's.
#[test]
fn an_open_segment_that_cannot_be_filled_costs_no_spare() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    writer.append(b"record").unwrap();
    let segment = writer.open.as_mut().unwrap();
    segment.use_file_only();
    segment.refuse_writes().unwrap();
    writer.set_epoch(Epoch(2)).unwrap();
    let files = || {
        wal.log().wait_for_spares(None).unwrap();
        std::fs::read_dir(directory.path()).unwrap().count()
    };
    let before = files();
    for _ in 0..4 {
        let error = writer.append(b"record").unwrap_err();
        assert!(matches!(error, Error::Io { action: "fill", .. }), "{error}");
        assert_eq!(files(), before);
    }
    assert_eq!(writer.end().head, Lsn(1));
}

/// What breaks: the disk is full within what arrives in bulk. What would be lost: a log that ends where it says, if
/// what got there stayed behind its end.
#[test]
#[cfg(target_os = "linux")]
fn of_what_could_not_be_written_whole_nothing_stays() {
    let (leader_dir, follower_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let identity = LogIdentity { segment_size: 1 << 20, ..IDENTITY };
    let options = WalOptions { populate_ahead: 0, sync: SyncPolicy::Never, ..WalOptions::default() };
    let (leader, mut source) = Wal::open(leader_dir.path(), identity, options).unwrap();
    source.set_epoch(Epoch(1)).unwrap();
    while source.end().offset < 600_000 {
        source.append(&[7; 3000]).unwrap();
    }
    let (_follower, mut sink) = Wal::open(follower_dir.path(), identity, options).unwrap();
    let bytes = leader.log().ranges_from(Lsn::FIRST).unwrap().remove(0).bytes().to_vec();
    let take_in = |sink: &mut LogWriter, to: usize| {
        let from = sink.ingest_position().1;
        let rest = &bytes[limits::index(from)..to];
        let window = sink.ingest_window(Lsn::FIRST, from, rest.len() as u64).unwrap();
        let len = window.len();
        window.copy_from_slice(&rest[..len]);
        sink.ingest_filled(len as u64)
    };
    take_in(&mut sink, 4096).unwrap();
    sink.open.as_mut().unwrap().fill().unwrap();
    take_in(&mut sink, 200_000).unwrap();
    let (end, in_file) = (sink.end(), sink.in_file);
    assert!(in_file > 0 && in_file == sink.arrived, "the beginning of a batch is in the file");
    let open = sink.open.as_mut().unwrap();
    let path = open.segment().path().to_owned();
    // As much of the next window gets there as the disk has room for.
    let file = File::options().write(true).open(&path).unwrap();
    write_all_at(&file, &bytes[200_000..300_000], 200_000).unwrap();
    open.refuse_writes().unwrap();
    let error = take_in(&mut sink, 400_000).unwrap_err();
    assert!(matches!(error, Error::Io { action: "write", .. }), "{error}");
    assert_eq!(sink.end(), end);
    let behind = &std::fs::read(path).unwrap()[limits::index(end.offset)..];
    assert!(is_zero(behind), "{} bytes of it stay", behind.iter().filter(|&&byte| byte != 0).count());
}
