//! The log as a whole, on real files.

use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::types::{Chain, ClusterId, Epoch, RegionId, ShardId};
use crate::wal::segment::SEGMENT_VERSION;

mod fed;

const SEGMENT: u64 = 64 * 1024;

fn identity() -> LogIdentity {
    LogIdentity { cluster: ClusterId(9), region: RegionId(0), shard: ShardId(3), segment_size: SEGMENT }
}

fn open(directory: &Path) -> (Wal, LogWriter) {
    let (wal, mut writer) = Wal::open(directory, identity(), WalOptions::default()).unwrap();
    writer.set_epoch(Epoch(1).max(writer.end().epoch)).unwrap();
    (wal, writer)
}

/// Record `lsn` of a test log: its length and bytes follow from its number.
fn record(lsn: u64) -> Vec<u8> {
    (0..lsn * 7919 % 900).map(|at| (lsn * 31 + at).to_le_bytes()[0]).collect()
}

fn append(writer: &mut LogWriter, lsns: std::ops::RangeInclusive<u64>) {
    for lsn in lsns {
        assert_eq!(writer.append(&record(lsn)).unwrap(), Lsn(lsn));
    }
}

fn records(log: &Arc<Log>, from: u64) -> Vec<(Lsn, Vec<u8>)> {
    let ranges = log.ranges_from(Lsn(from)).unwrap();
    ranges.iter().flat_map(LogRange::records).map(|record| (record.lsn, record.bytes.to_vec())).collect()
}

fn assert_holds(log: &Arc<Log>, lsns: std::ops::RangeInclusive<u64>) {
    let found = records(log, *lsns.start());
    let due: Vec<_> = lsns.map(|lsn| (Lsn(lsn), record(lsn))).collect();
    assert_eq!(found.len(), due.len());
    for (found, due) in found.iter().zip(&due) {
        assert_eq!(found, due);
    }
}

#[test]
fn records_are_read_back_over_many_segments_and_after_reopening() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    append(&mut writer, 1..=1000);
    assert!(wal.log().segments().len() > 5);
    assert_holds(wal.log(), 1..=1000);
    let end = writer.end();
    drop(writer);
    wal.close().unwrap();

    let (wal, mut writer) = open(directory.path());
    assert_eq!((writer.end(), wal.log().synced().load()), (end, Lsn(1000)));
    assert!(writer.torn_tail().is_none());
    append(&mut writer, 1001..=1500);
    assert_holds(wal.log(), 1..=1500);
}

#[test]
fn a_batch_is_read_back_as_its_records() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    let batch: Vec<_> = (1..=100).map(record).collect();
    assert_eq!(writer.append_batch(&batch).unwrap(), Lsn(100));
    assert_eq!(writer.append(&record(101)).unwrap(), Lsn(101));
    assert_holds(wal.log(), 1..=101);
    assert!(matches!(writer.append_batch::<Vec<u8>>(&[]), Err(Error::Invalid { .. })));
}

#[test]
fn batches_say_when_they_were_written() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    for pause_ms in [0, 0, 3, 0, 20, 0] {
        std::thread::sleep(Duration::from_millis(pause_ms));
        let before = unix_ms();
        let lsn = writer.append(b"now").unwrap();
        let after = unix_ms();
        let range = wal.log().ranges_from(lsn).unwrap().pop().unwrap();
        let written = range.batches().last().unwrap().header.timestamp.unix_ms();
        // The clock may have been read a fraction of a millisecond before.
        assert!((before - 1..=after).contains(&written), "{written} is not between {before} and {after}");
    }
}

#[test]
fn the_largest_record_fits_and_one_byte_more_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    let max = usize::try_from(wal.log().max_record_len()).unwrap();
    writer.append(b"small").unwrap();
    assert_eq!(writer.append(&vec![7; max]).unwrap(), Lsn(2));
    let refused = writer.append(&vec![7; max + 1]);
    assert!(matches!(refused, Err(Error::RecordTooLarge { len, .. }) if len == max as u64 + 1));
    assert_eq!(writer.append(b"after").unwrap(), Lsn(3));
    assert_eq!(records(wal.log(), 2)[0].1.len(), max);
}

#[test]
fn a_reader_tails_what_is_appended_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    let log = Arc::clone(wal.log());
    let tail = std::thread::spawn(move || {
        let mut reader = log.reader_from(Lsn(1)).unwrap();
        let mut next = 1;
        while next <= 2000 {
            assert_eq!(reader.wait(None), LogWaited::More);
            while let Some(range) = reader.next(u64::MAX).unwrap() {
                for found in range.records() {
                    assert_eq!((found.lsn, found.bytes), (Lsn(next), record(next).as_slice()));
                    next += 1;
                }
            }
        }
    });
    append(&mut writer, 1..=2000);
    tail.join().unwrap();
}

#[test]
fn what_follows_a_sync_goes_in_through_the_file_and_is_read_like_the_rest() {
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(directory.path(), identity(), options).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    let mut framed = 0;
    for lsn in 1..=1000 {
        let (before, framed_before) = (writer.end(), writer.framed_len());
        append(&mut writer, lsn..=lsn);
        let after = writer.end();
        // Syncs after single records, and after runs of some: by turns stores and writes share a page, and a segment.
        let is_synced = lsn == 1 || (lsn - 1) % 7 == 0 || (lsn - 1) % 11 < 3;
        if cfg!(target_os = "linux") && is_synced && after.segment == before.segment && before.offset > 0 {
            assert_eq!(writer.framed_len() as u64, after.offset - before.offset, "LSN {lsn}");
            framed += 1;
        } else if !is_synced {
            assert_eq!(writer.framed_len(), framed_before, "LSN {lsn} follows one that is not synced");
        }
        assert_eq!(records(wal.log(), lsn), [(Lsn(lsn), record(lsn))], "readers see it at once");
        if lsn % 7 == 0 || lsn % 11 < 3 {
            wal.log().wait_synced(Lsn(lsn), None).unwrap();
        }
    }
    assert!(framed > 300 || !cfg!(target_os = "linux"), "{framed}");
    drop(writer);
    wal.close().unwrap();
    let (wal, writer) = open(directory.path());
    assert!(writer.torn_tail().is_none());
    assert_holds(wal.log(), 1..=1000);
}

#[test]
fn many_who_wait_for_syncs_are_all_woken_and_some_give_up() {
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(directory.path(), identity(), options).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    let writer = parking_lot::Mutex::new(writer);
    std::thread::scope(|scope| {
        for thread in 0..12 {
            let (log, writer) = (wal.log(), &writer);
            scope.spawn(move || {
                for round in 0..100 {
                    let lsn = writer.lock().append(&[thread; 300]).unwrap();
                    // Some have no time, also while it is their turn: then somebody else must get it.
                    let deadline = (round % 3 == 0)
                        .then(|| std::time::Instant::now() + Duration::from_micros(20 * u64::from(thread)));
                    match log.wait_synced(lsn, deadline) {
                        Err(Error::TimedOut { .. }) if deadline.is_some() => {}
                        result => {
                            result.unwrap();
                            assert!(log.synced().load() >= lsn);
                        }
                    }
                }
            });
        }
    });
    wal.log().wait_synced(Lsn(1200), None).unwrap();
    assert_eq!(wal.log().sync_line().len(), 0, "nobody is left in the line");
}

#[test]
fn positions_after_tell_histories_apart() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    let genesis = Chain::genesis(ClusterId(9), RegionId(0), ShardId(3));
    assert_eq!(wal.log().position_after(Lsn(0), genesis).unwrap().unwrap().offset, 0);
    writer.append_batch(&["a", "b", "c"]).unwrap();
    let end = writer.end();
    append(&mut writer, 4..=400);
    let place = wal.log().position_after(Lsn(3), end.chain).unwrap().unwrap();
    assert_eq!((place.segment, place.offset), (end.segment, end.offset));
    assert_eq!(wal.log().position_after(Lsn(3), Chain(1)).unwrap(), None);
    assert_eq!(wal.log().position_after(Lsn(2), end.chain).unwrap(), None);
    assert!(matches!(wal.log().position_after(Lsn(401), end.chain), Err(Error::NotRetained { .. })));
}

#[test]
fn segments_are_released_only_below_what_is_asked_and_are_used_again() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    append(&mut writer, 1..=800);
    wal.log().wait_synced(Lsn(800), None).unwrap();
    let second = wal.log().segments()[1].id().first_lsn;
    assert_eq!(wal.log().release_through(second.previous().previous(), "test").unwrap(), 0);
    let before = wal.log().segments().len();
    let released = wal.log().release_through(Lsn(400), "test").unwrap();
    assert!(released > 1 && wal.log().segments().len() == before - released);
    assert!(wal.log().tail() <= Lsn(401) && wal.log().tail() >= second);
    assert!(wal.log().reader_from(Lsn(1)).is_err());
    append(&mut writer, 801..=1600);
    let tail = wal.log().tail().0;
    assert_holds(wal.log(), tail..=1600);
    drop(writer);
    wal.close().unwrap();
    let (wal, _writer) = open(directory.path());
    assert_eq!(wal.log().tail(), Lsn(tail));
    assert_holds(wal.log(), tail..=1600);
}

fn sink_chain(seal: &[u8]) -> Chain {
    BatchHeader::decode(seal.first_chunk().unwrap()).crc
}

/// Nothing keeps a log from being opened again while ranges of it are read: they outlive the lock of its directory.
#[test]
fn what_is_read_of_a_closed_log_stays_when_the_log_is_opened_again_and_gives_it_up() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    append(&mut writer, 1..=300);
    // Behind them a segment in which nothing is written.
    let at = Expected { first_lsn: Lsn(301), chain: writer.end().chain, epoch: Epoch(1) };
    let seal = batch::build(at, crate::types::HybridTimestamp::default(), Lsn(1), &[]);
    let header = SegmentHeader {
        id: crate::types::WalSegmentId { region: RegionId(0), shard: ShardId(3), first_lsn: Lsn(301) },
        cluster: ClusterId(9),
        epoch: Epoch(1),
        chain_before: sink_chain(&seal),
        segment_size: SEGMENT,
        version: SEGMENT_VERSION,
    };
    for bytes in [seal, header.encode().to_vec()] {
        let (segment, offset) = writer.ingest_position();
        writer.ingest_window(segment, offset, bytes.len() as u64).unwrap().copy_from_slice(&bytes);
        writer.ingest_filled(bytes.len() as u64).unwrap();
    }
    let ranges = wal.log().ranges_from(Lsn(1)).unwrap();
    let before: Vec<_> = ranges.iter().map(|range| range.bytes().to_vec()).collect();
    assert!(ranges.len() > 3 && ranges.last().unwrap().len() == SEGMENT_HEADER_LEN);
    drop(writer);
    wal.close().unwrap();

    let (wal, mut writer) = open(directory.path());
    wal.log().keep_used_files(1 << 30);
    wal.log().release_through(Lsn(300), "test").unwrap();
    for lsn in 301..=1000 {
        append(&mut writer, lsn..=lsn);
        wal.log().wait_synced(Lsn(lsn), None).unwrap();
        wal.log().release_through(Lsn(lsn), "test").unwrap();
    }
    wal.log().wait_for_spares(None).unwrap();
    assert!(ranges.iter().map(LogRange::bytes).eq(before.iter().map(Vec::as_slice)));
}

#[test]
fn many_threads_wait_for_syncs_of_one_writer() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, writer) = open(directory.path());
    let writer = parking_lot::Mutex::new(writer);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let lsn = writer.lock().append(b"record").unwrap();
                    wal.log().wait_synced(lsn, None).unwrap();
                    assert!(wal.log().synced().load() >= lsn);
                }
            });
        }
    });
    assert_eq!(wal.log().synced().load(), Lsn(400));
}

#[test]
fn a_closed_log_ends_appends_and_waits() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    append(&mut writer, 1..=10);
    assert!(matches!(wal.log().wait_synced(Lsn(11), None), Err(Error::NotRetained { .. })));
    drop(wal);
    assert!(matches!(writer.append(b"late"), Err(Error::ShutDown)));
}

#[test]
fn an_older_epoch_is_refused_and_a_newer_one_starts_a_segment() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    append(&mut writer, 1..=3);
    writer.set_epoch(Epoch(5)).unwrap();
    append(&mut writer, 4..=6);
    assert!(matches!(writer.set_epoch(Epoch(4)), Err(Error::StaleEpoch { .. })));
    let epochs: Vec<_> = wal.log().segments().iter().map(|segment| segment.header().epoch).collect();
    assert_eq!(epochs, [Epoch(1), Epoch(5)]);
    assert_holds(wal.log(), 1..=6);
}

/// Who applies a log record by record, each durable before, is not kept waiting by however much has come behind it.
#[test]
fn a_sync_that_is_waited_for_goes_no_further_than_its_segment() {
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(directory.path(), identity(), options).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    while wal.log().segments().len() < 4 {
        writer.append(&[7; 4000]).unwrap();
    }
    let log = wal.log();
    for segment in &log.segments()[..3] {
        log.wait_synced(segment.id().first_lsn, None).unwrap();
        assert_eq!(Some(log.synced().load()), segment.sealed_last_lsn());
    }
    log.sync_up_to(Lsn::MAX).unwrap();
    assert_eq!(log.synced().load(), log.head());
}

#[test]
fn after_a_release_syncs_still_reach_everything_written() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    append(&mut writer, 1..=300);
    wal.log().wait_synced(Lsn(300), None).unwrap();
    let oldest = wal.log().segments()[0].sealed_last_lsn().unwrap();
    // The newest but one is sealed, its successor has not been synced: it must stay.
    let (mut last, mut segments) = (300, wal.log().segments().len());
    while wal.log().segments().len() == segments {
        last += 1;
        append(&mut writer, last..=last);
    }
    segments = wal.log().segments().len();
    let released = wal.log().release_through(Lsn(last), "test").unwrap();
    assert_eq!(released, segments - 2, "what is left begins with a segment that opens after a power cut");
    assert!(wal.log().tail() > oldest);
    append(&mut writer, last + 1..=last + 200);
    wal.log().wait_synced(Lsn(last + 200), None).unwrap();
    assert_eq!(wal.log().synced_position().0, wal.log().segments().last().unwrap().id().first_lsn);
    wal.log().release_through(Lsn::MAX, "test").unwrap();
    assert_eq!(wal.log().segments().len(), 1);
    drop(writer);
    wal.close().unwrap();
    let (wal, _writer) = open(directory.path());
    assert_eq!(wal.log().head(), Lsn(last + 200));
}

#[test]
fn a_log_is_open_once_until_wal_and_writer_are_gone() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, writer) = open(directory.path());
    let again = || Wal::open(directory.path(), identity(), WalOptions::default());
    assert!(matches!(again(), Err(Error::InUse { .. })));
    drop(wal);
    assert!(matches!(again(), Err(Error::InUse { .. })), "the writer could still write");
    drop(writer);
    assert!(again().is_ok());
}

#[test]
fn spares_can_be_waited_for_after_some_were_taken() {
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { spare_segments: 4, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(directory.path(), identity(), options).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    append(&mut writer, 1..=200);
    wal.log().wait_for_spares(None).unwrap();
    let names = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
    let spares: Vec<_> = names.filter(|path| path.to_string_lossy().ends_with(".wal.tmp")).collect();
    assert!(spares.len() >= 4 && spares.iter().all(|path| std::fs::metadata(path).unwrap().len() == SEGMENT));
}

#[test]
fn the_preparing_thread_is_there_while_something_is_wanted() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    wal.log().wait_for_spares(None).unwrap();
    // By itself: nobody stops the log.
    wal.log().spares().wait_ended();
    let spares = || std::fs::read_dir(directory.path()).unwrap().filter(is_spare).count();
    let ready = spares();
    append(&mut writer, 1..=500);
    assert!(wal.log().segments().len() > ready, "more segments were opened than spares were ready");
    wal.log().wait_for_spares(None).unwrap();
    assert_eq!(spares(), ready);
    wal.log().spares().wait_ended();
    drop(writer);
    wal.close().unwrap();
    assert_eq!(spares(), ready);
}

fn is_spare(entry: &std::io::Result<std::fs::DirEntry>) -> bool {
    entry.as_ref().unwrap().file_name().to_str().unwrap().starts_with("spare-")
}

#[test]
fn whoever_waits_for_spares_learns_why_none_come() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    let log = Arc::clone(wal.log());
    log.wait_for_spares(None).unwrap();
    std::fs::remove_dir_all(directory.path()).unwrap();
    // Takes a spare, whose file is gone.
    assert!(matches!(writer.append(b"lost"), Err(Error::Io { .. })));
    let error = log.wait_for_spares(None).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    drop((writer, wal));
    assert!(log.wait_for_spares(None).unwrap_err().is_shutdown());
}

#[test]
fn waiting_for_spares_ends_at_its_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let large = LogIdentity { segment_size: 64 << 20, ..identity() };
    let options = WalOptions { spare_segments: 1000, ..WalOptions::default() };
    let (wal, _writer) = Wal::open(directory.path(), large, options).unwrap();
    let error = wal.log().wait_for_spares(Some(std::time::Instant::now())).unwrap_err();
    assert!(error.is_timeout(), "{error}");
    assert!(error.to_string().contains("1000 spare segments of shard 3"), "{error}");
}

#[test]
fn large_batches_read_back_the_same_whichever_way_they_went_in() {
    for populate_ahead in [0, 4096, 1 << 30] {
        let directory = tempfile::tempdir().unwrap();
        let options = WalOptions { populate_ahead, ..WalOptions::default() };
        let (wal, mut writer) = Wal::open(directory.path(), identity(), options).unwrap();
        writer.set_epoch(Epoch(1)).unwrap();
        let large = |lsn: u8| vec![lsn; 9000 + usize::from(lsn) * 100];
        for lsn in 1..=40u8 {
            writer.append(&large(lsn)).unwrap();
        }
        wal.log().wait_synced(Lsn(40), None).unwrap();
        let found = records(wal.log(), 1);
        assert!(found.iter().zip(1..=40u8).all(|(found, lsn)| found.1 == large(lsn)) && found.len() == 40);
        drop(writer);
        wal.close().unwrap();
        let (wal, _writer) = open(directory.path());
        assert_eq!(records(wal.log(), 1), found);
    }
}

/// A sync that fails leaves pages that the kernel takes for written, and a process that is started again reads them:
/// what is not known to be synced is written again, so that the sync which opening the log ends with covers it.
#[cfg(target_os = "linux")]
#[test]
fn the_batch_that_seals_is_written_again_unless_something_behind_it_is_synced() {
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(directory.path(), identity(), options).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    while wal.log().segments().len() < 2 {
        wal.log().wait_synced(wal.log().head(), None).unwrap();
        writer.append(&[7; 900]).unwrap();
    }
    let [first, second] = [0, 1].map(|at| Arc::clone(&wal.log().segments()[at]));
    let (last, head) = (first.sealed_last_lsn().unwrap(), wal.log().head());
    assert_eq!((wal.log().synced().load(), head), (last, last.next()), "of the first one all but the seal is synced");
    let behind = second.published();
    drop((wal, writer));

    // As the kernel counts what this thread writes to files.
    let written = || {
        let account = std::fs::read_to_string("/proc/thread-self/io").unwrap();
        account.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().parse::<u64>().unwrap()
    };
    let written_again = |synced| {
        let known_synced = KnownSynced { lsn: synced, written_here: WrittenHere::Nothing };
        let before = written();
        let (wal, _writer) =
            Wal::open_unprepared(directory.path(), identity(), WalOptions { known_synced, ..options }).unwrap();
        assert_eq!(wal.log().head(), head);
        written() - before
    };
    assert_eq!(written_again(last.previous()), first.published() + behind);
    assert_eq!(written_again(last), crate::limits::BATCH_HEADER_LEN + behind);
    assert_eq!(written_again(head), 0);
}

#[cfg(target_os = "linux")]
#[test]
fn an_open_segment_with_holes_is_filled_before_it_is_written_to() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = open(directory.path());
    append(&mut writer, 1..=3);
    let path = wal.log().segments()[0].path().to_owned();
    drop(writer);
    wal.close().unwrap();
    // What a power cut leaves of a segment whose blocks were reserved and not allocated.
    let bytes = std::fs::read(&path).unwrap();
    let used = bytes.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    std::fs::write(&path, &bytes[..used]).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(SEGMENT).unwrap();
    assert!(path.metadata().unwrap().blocks() * 512 < SEGMENT);
    let (wal, mut writer) = open(directory.path());
    File::open(&path).unwrap().sync_all().unwrap();
    assert!(path.metadata().unwrap().blocks() * 512 >= SEGMENT, "every block is there");
    append(&mut writer, 4..=50);
    assert_holds(wal.log(), 1..=50);
}
