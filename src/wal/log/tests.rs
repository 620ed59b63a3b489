//! Who syncs, and how one segment takes the place of another.

use super::*;
use crate::types::{Chain, WalSegmentId};
use crate::wal::log_fixture::{IDENTITY, LogFixture, image};
use crate::wal::segment::{HEADER_PAGE, SEGMENT_VERSION};
use crate::wal::{Finding, LogWriter, SyncPolicy, Wal};

/// A log whose waiters give way for an hour, and an LSN of it that is not synced.
fn with_waiters_that_give_way(directory: &Path) -> (Wal, Lsn) {
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(directory, IDENTITY, options).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    let lsn = writer.append(b"record").unwrap();
    wal.log().sync_waits.give_way_for(std::time::Duration::from_secs(3600));
    (wal, lsn)
}

#[test]
fn who_gives_way_minds_the_deadline_and_takes_its_turn() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, lsn) = with_waiters_that_give_way(directory.path());
    let log = Arc::clone(wal.log());
    let syncing = log.sync.lock();
    let soon = Instant::now() + std::time::Duration::from_millis(5);
    assert!(matches!(log.wait_synced(lsn, Some(soon)), Err(Error::TimedOut { .. })));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| log.wait_synced(lsn, None));
        drop(syncing);
        waiter.join().unwrap().unwrap();
    });
    assert_eq!(log.synced().load(), lsn);
    wal.close().unwrap();
}

#[test]
fn who_gives_way_notices_the_end_of_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, lsn) = with_waiters_that_give_way(directory.path());
    let log = Arc::clone(wal.log());
    let syncing = log.sync.lock();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| log.wait_synced(lsn, None));
        log.set_poison(&Error::invalid("it failed"));
        assert!(matches!(waiter.join().unwrap(), Err(Error::Poisoned { .. })));
    });
    drop(syncing);
    drop(wal);
}

/// A descriptor for the directory is as little to be had when its name is gone as when there are none left.
#[cfg(unix)]
#[test]
fn a_sync_opens_no_file() {
    let parent = tempfile::tempdir().unwrap();
    let [here, elsewhere] = ["here", "elsewhere"].map(|name| parent.path().join(name));
    std::fs::create_dir(&here).unwrap();
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(&here, IDENTITY, options).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    let lsn = writer.append(b"the first of a segment").unwrap();
    std::fs::rename(&here, &elsewhere).unwrap();
    wal.log().wait_synced(lsn, None).unwrap();
    assert_eq!(wal.log().named.load(Ordering::Acquire), lsn.0);
    std::fs::rename(&elsewhere, &here).unwrap();
}

#[test]
fn damage_is_told_for_as_long_as_the_log_has_its_segment() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = Wal::open(directory.path(), IDENTITY, WalOptions::default()).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    let log = wal.log();
    while log.segments().len() < 3 {
        writer.append(&[7; 1000]).unwrap();
    }
    log.wait_synced(log.head(), None).unwrap();
    let of = |segment: &Arc<Segment>| Finding {
        path: segment.path().to_owned(),
        segment: segment.id().first_lsn,
        offset: SEGMENT_HEADER_LEN,
        end: SEGMENT_HEADER_LEN + 8,
        lsn: segment.id().first_lsn,
        reason: "a test says so".to_owned(),
    };
    let found: Vec<_> = log.segments()[..2].iter().map(of).collect();
    found.iter().for_each(|finding| assert!(log.health().found(finding.clone())));
    assert_eq!(log.scrub_status().findings, found);
    assert_eq!(log.release_through(log.segments()[0].sealed_last_lsn().unwrap(), "a test makes room").unwrap(), 1);
    assert_eq!(log.scrub_status().findings, found[1..]);
}

/// Takes in the header page of the segment that begins with the next LSN.
fn begin_segment(writer: &mut LogWriter, epoch: u64, chain_before: Chain) -> Result<Lsn> {
    let LogIdentity { cluster, region, shard, segment_size } = IDENTITY;
    let first_lsn = writer.end().head.next();
    let id = WalSegmentId { region, shard, first_lsn };
    let version = SEGMENT_VERSION;
    let header = SegmentHeader { id, cluster, epoch: Epoch(epoch), chain_before, segment_size, version };
    writer.ingest_window(first_lsn, 0, SEGMENT_HEADER_LEN)?.copy_from_slice(&header.encode());
    writer.ingest_filled(SEGMENT_HEADER_LEN)
}

/// What breaks: the disk, where the only segment is to be replaced by another that begins with the same LSN. What would
/// be lost: where the log begins. What prevents it: the old one stays until the new one has its name.
#[test]
fn a_segment_whose_successor_cannot_be_opened_stays() {
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open_at(directory.path(), IDENTITY, options, Lsn(50), Epoch(9)).unwrap();
    begin_segment(&mut writer, 1, Chain(7)).unwrap();
    let empty = wal.log().segments();
    wal.log().wait_for_spares(None).unwrap();
    let names = directory.path().read_dir().unwrap().map(|entry| entry.unwrap().path());
    names.filter(|path| path.extension().is_some_and(|end| end == "tmp")).for_each(|path| {
        std::fs::remove_file(path).unwrap();
    });
    assert!(matches!(begin_segment(&mut writer, 2, Chain(7)), Err(Error::Io { .. })));
    let after_a_crash = tempfile::tempdir().unwrap();
    for (name, bytes) in image(directory.path()) {
        std::fs::write(after_a_crash.path().join(name), bytes).unwrap();
    }
    let (again, _writer) = Wal::open(after_a_crash.path(), IDENTITY, options).unwrap();
    assert_eq!((again.log().tail(), again.log().segments()[0].header()), (Lsn(50), empty[0].header()));
    // Here it goes on as if nothing had been tried, until a spare can be had.
    assert!(Arc::ptr_eq(&wal.log().segments()[0], &empty[0]));
    wal.log().sync_all().unwrap();
    assert!((0..9).any(|_| begin_segment(&mut writer, 2, Chain(7)).is_ok()));
    let open: Vec<_> = wal.log().segments().iter().map(|segment| segment.header().epoch).collect();
    assert_eq!(open, [Epoch(2)]);
    drop(writer);
    wal.close().unwrap();
    let (again, writer) = Wal::open(directory.path(), IDENTITY, options).unwrap();
    assert_eq!((again.log().tail(), writer.end().epoch), (Lsn(50), Epoch(2)));
}

/// What breaks: the machine, when a segment was given up because the empty one behind it is durable, while that one is
/// replaced by one that is not. What prevents a log without a beginning: the new one is opened before the decision, or
/// after the deed.
#[test]
fn a_segment_is_not_replaced_while_another_goes_for_its_sake() {
    let mut sealed = LogFixture::beginning_at(Lsn(50), Chain(7));
    sealed.append(&[b"record"]);
    sealed.append(&[]);
    let bytes = std::fs::read(sealed.segment_path()).unwrap();
    let batches = &bytes[HEADER_PAGE..usize::try_from(sealed.end()).unwrap()];
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open_at(directory.path(), IDENTITY, options, Lsn(50), Epoch(9)).unwrap();
    begin_segment(&mut writer, 3, Chain(7)).unwrap();
    let len = batches.len() as u64;
    writer.ingest_window(Lsn(50), SEGMENT_HEADER_LEN, len).unwrap().copy_from_slice(batches);
    writer.ingest_filled(len).unwrap();
    begin_segment(&mut writer, 3, sealed.next.chain).unwrap();
    wal.log().sync_all().unwrap();
    let log = wal.log();
    let before = log.segments();
    assert!(before[0].is_sealed() && before[1].published() == SEGMENT_HEADER_LEN);
    std::thread::scope(|scope| {
        // As if the first of them were given up just now.
        let given_up = log.given_up.lock();
        let replacing = scope.spawn(|| begin_segment(&mut writer, 4, sealed.next.chain));
        while !log.sync.is_locked() && !replacing.is_finished() {
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(log.segments().len(), 2);
        assert!(log.holds(&before[1]), "what the decision rests on");
        log.segments.write().remove(0);
        drop(given_up);
        replacing.join().unwrap().unwrap();
    });
    let left: Vec<_> = log.segments().iter().map(|segment| segment.header().epoch).collect();
    assert_eq!(left, [Epoch(4)]);
}
