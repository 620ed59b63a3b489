//! A log that is fed with the bytes of another one, as a follower's is.

use super::*;
use crate::wal::landmarks::LANDMARK_EVERY;

#[test]
fn a_log_that_is_fed_has_landmarks_too() {
    let (directory, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let identity = LogIdentity { segment_size: 8 * LANDMARK_EVERY, ..identity() };
    let (wal, mut writer) = Wal::open(directory.path(), identity, WalOptions::default()).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    let (copy, mut sink) = Wal::open(other.path(), identity, WalOptions::default()).unwrap();
    for _ in 0..3000 {
        writer.append(&[7; 500]).unwrap();
    }
    feed(wal.log(), &mut sink, 50_000);
    for log in [wal.log(), copy.log()] {
        let place = log.landmarks().last_before(Lsn::MAX).unwrap();
        assert!(place.lsn > Lsn(2000));
        assert_eq!(log.position_before(place.lsn.next()).unwrap(), place);
    }
}

/// Feeds everything `from` has, from where `to` is, in pieces of `piece` bytes.
fn feed(from: &Arc<Log>, to: &mut LogWriter, piece: u64) {
    let end = to.end();
    let place = from.position_after(end.head, end.chain).unwrap().unwrap();
    let mut reader = from.reader_at(place).unwrap();
    while let Some(range) = reader.next_cut_anywhere(piece).unwrap() {
        let mut offset = range.start();
        let mut bytes = range.bytes();
        while !bytes.is_empty() {
            let window = to.ingest_window(range.segment().id().first_lsn, offset, bytes.len() as u64).unwrap();
            let (now, later) = bytes.split_at(window.len());
            window.copy_from_slice(now);
            to.ingest_filled(now.len() as u64).unwrap();
            offset += now.len() as u64;
            bytes = later;
        }
    }
}

fn assert_identical(a: &Log, b: &Log) {
    let (a, b) = (a.segments(), b.segments());
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(&b) {
        assert_eq!((a.id(), a.published()), (b.id(), b.published()));
        assert!(std::fs::read(a.path()).unwrap() == std::fs::read(b.path()).unwrap(), "{} differs", a.id());
    }
}

#[test]
fn a_log_fed_in_any_pieces_is_byte_for_byte_the_same() {
    for piece in [1, 7, 56, 4096, 5000, u64::MAX] {
        let (leader_dir, follower_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (leader, mut source) = open(leader_dir.path());
        let (follower, mut sink) = Wal::open(follower_dir.path(), identity(), WalOptions::default()).unwrap();
        for round in 0..3 {
            append(&mut source, round * 200 + 1..=(round + 1) * 200);
            feed(leader.log(), &mut sink, piece);
        }
        source.set_epoch(Epoch(2)).unwrap();
        append(&mut source, 601..=700);
        feed(leader.log(), &mut sink, piece);
        assert_eq!(source.end(), sink.end());
        assert_identical(leader.log(), follower.log());
        drop((source, sink));
        leader.close().unwrap();
        follower.close().unwrap();
    }
}

/// Bytes behind the end of the open segment, in its file, that are not zero.
#[cfg(target_os = "linux")]
fn bytes_behind(wal: &Wal, writer: &LogWriter) -> usize {
    let open = wal.log().segments().pop().unwrap();
    let behind = &std::fs::read(open.path()).unwrap()[usize::try_from(writer.end().offset).unwrap()..];
    behind.iter().filter(|byte| **byte != 0).count()
}

/// What breaks: a batch whose beginning is in the file goes on in the mapping, because it is too long for memory. What
/// would be lost: the first bytes of what then goes in through the file, if they counted as written.
#[test]
fn behind_a_batch_too_long_for_memory_everything_is_written() {
    let options = WalOptions { sync: SyncPolicy::Never, populate_ahead: 0, ..WalOptions::default() };
    let identity = LogIdentity { segment_size: 8 << 20, ..identity() };
    let (leader_dir, follower_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (leader, mut source) = Wal::open(leader_dir.path(), identity, options).unwrap();
    source.set_epoch(Epoch(1)).unwrap();
    let (follower, mut sink) = Wal::open(follower_dir.path(), identity, options).unwrap();
    source.append(&[1; 10_000]).unwrap();
    source.append(&vec![2; 5 << 20]).unwrap();
    for _ in 0..2000 {
        source.append(&[3; 3000]).unwrap();
    }
    feed(leader.log(), &mut sink, 256 * 1024);
    assert_eq!(source.end(), sink.end());
    assert_identical(leader.log(), follower.log());
}

/// Long windows go through memory and the file, short ones through the mapping, and segments taken into use meanwhile
/// may have no blocks yet: whatever the mixture, the logs are the same, the files as long as they should be, and what
/// follows a batch that did not arrive whole is zeros.
#[test]
#[cfg(target_os = "linux")]
fn a_log_fed_in_bulk_and_by_drops_is_byte_for_byte_the_same() {
    let (leader_dir, follower_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let identity = LogIdentity { segment_size: 8 << 20, ..identity() };
    let options = WalOptions { populate_ahead: 1 << 20, sync: SyncPolicy::Never, ..WalOptions::default() };
    let (leader, mut source) = Wal::open(leader_dir.path(), identity, options).unwrap();
    source.set_epoch(Epoch(1)).unwrap();
    let (follower, mut sink) = Wal::open(follower_dir.path(), identity, options).unwrap();
    let (mut without_blocks, mut cut_within) = (0, 0);
    for round in 0..12u64 {
        let lens = [200_000, 70_000, 300, 1 << 20, 5 << 20];
        let sizes = (0..20).map(|number| lens[usize::try_from((round + number) % 5).unwrap()]);
        for (len, number) in sizes.zip(0u64..).take(if round % 4 == 3 { 3 } else { 8 }) {
            source.append(&vec![u8::try_from((round * 20 + number) % 251).unwrap(); len]).unwrap();
        }
        feed(leader.log(), &mut sink, [256 * 1024, u64::MAX, 100_000, 3000][usize::try_from(round % 4).unwrap()]);
        without_blocks += u64::from(!sink.takes_stores());
        // Nothing has arrived behind the last batch: there is nothing to discard, nor to take in.
        sink.discard_partial();
        sink.ingest_filled(0).unwrap();
        // The beginning of a batch that the stream did not bring to its end, in every second round behind a whole one.
        let end = sink.end();
        if round % 2 == 0 {
            source.append(&[8; 30_000]).unwrap();
        }
        source.append(&[9; 150_000]).unwrap();
        let place = leader.log().position_after(end.head, end.chain).unwrap().unwrap();
        let range = leader.log().reader_at(place).unwrap().next_cut_anywhere(100_000).unwrap().unwrap();
        let window = sink.ingest_window(range.segment().id().first_lsn, range.start(), range.len()).unwrap();
        let len = window.len().min(range.bytes().len());
        window[..len].copy_from_slice(&range.bytes()[..len]);
        sink.ingest_filled(len as u64).unwrap();
        let cut = usize::try_from(sink.ingest_position().1 - sink.end().offset).unwrap();
        if sink.end() != end && cut > 100 {
            cut_within += 1;
            assert!(bytes_behind(&follower, &sink) > cut - 100, "the window is in the file to its end");
        }
        sink.discard_partial();
        assert_eq!(bytes_behind(&follower, &sink), 0);
    }
    feed(leader.log(), &mut sink, 256 * 1024);
    assert!(cut_within > 2, "no window ended behind a whole batch and within another");
    assert!(without_blocks > 0, "no segment was taken into use without blocks");
    assert_eq!(source.end(), sink.end());
    assert_identical(leader.log(), follower.log());
    // Who leads next writes behind it, whatever the segment was made for.
    let last = sink.append(b"mine").unwrap();
    follower.log().wait_synced(last, None).unwrap();
    drop((source, sink));
    follower.close().unwrap();
    let (follower, sink) = Wal::open(follower_dir.path(), identity, options).unwrap();
    assert_eq!((sink.end().head, sink.torn_tail()), (last, None));
    follower.close().unwrap();
}

#[test]
fn the_first_bytes_of_a_long_stream_say_that_it_comes_in_bulk() {
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { populate_ahead: 0, ..WalOptions::default() };
    let (wal, mut sink) = Wal::open(directory.path(), identity(), options).unwrap();
    sink.ingest_window(Lsn::FIRST, 0, 5000).unwrap();
    assert!(!wal.log().spares().is_in_bulk());
    sink.discard_partial();
    let window = sink.ingest_window(Lsn::FIRST, 0, 256 * 1024).unwrap();
    assert_eq!(window.len(), 4096, "the header page comes first");
    assert_eq!(wal.log().spares().is_in_bulk(), cfg!(target_os = "linux"));
}

#[test]
fn a_follower_resumes_wherever_its_log_was_cut() {
    let (leader_dir, follower_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (leader, mut source) = open(leader_dir.path());
    append(&mut source, 1..=500);
    let whole = leader.log().ranges_from(Lsn(1)).unwrap();
    let total: u64 = whole.iter().map(LogRange::len).sum();
    // A stream that ends after each of many different numbers of bytes, the follower's process included.
    let mut taken = 0;
    while taken < total {
        let (follower, mut sink) = Wal::open(follower_dir.path(), identity(), WalOptions::default()).unwrap();
        let end = sink.end();
        let place = leader.log().position_after(end.head, end.chain).unwrap().unwrap();
        let mut reader = leader.log().reader_at(place).unwrap();
        let range = reader.next_cut_anywhere(3001).unwrap();
        let Some(range) = range else { break };
        taken += 900;
        let window = sink.ingest_window(range.segment().id().first_lsn, range.start(), range.len()).unwrap();
        let len = window.len();
        window.copy_from_slice(&range.bytes()[..len]);
        sink.ingest_filled(len as u64).unwrap();
        drop(sink);
        follower.close().unwrap();
        let (follower, mut sink) = Wal::open(follower_dir.path(), identity(), WalOptions::default()).unwrap();
        assert!(sink.torn_tail().is_none());
        feed(leader.log(), &mut sink, 100_000);
        assert_identical(leader.log(), follower.log());
    }
}

#[test]
fn bytes_that_do_not_continue_the_log_leave_it_as_it_was() {
    let (leader_dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (leader, mut source) = open(leader_dir.path());
    append(&mut source, 1..=50);
    let (follower, mut sink) = Wal::open(other_dir.path(), identity(), WalOptions::default()).unwrap();
    feed(leader.log(), &mut sink, u64::MAX);
    let end = sink.end();
    assert!(sink.ingest_window(end.segment, end.offset + 8, 100).is_err());
    assert!(sink.ingest_window(end.segment.next(), 0, 100).is_err());
    for garbage in [vec![0xab; 200], vec![0; 200]] {
        let window = sink.ingest_window(end.segment, end.offset, 200).unwrap();
        window.copy_from_slice(&garbage);
        assert!(matches!(sink.ingest_filled(200), Err(Error::Invalid { .. })));
        assert_eq!(sink.end(), end);
    }
    append(&mut source, 51..=60);
    feed(leader.log(), &mut sink, u64::MAX);
    assert_identical(leader.log(), follower.log());
}

#[test]
fn no_more_than_a_window_is_taken_in_and_no_window_reaches_back() {
    let directory = tempfile::tempdir().unwrap();
    let (_wal, mut writer) = Wal::open(directory.path(), identity(), WalOptions::default()).unwrap();
    let window = writer.ingest_window(Lsn(1), 0, 100).unwrap().len() as u64;
    assert!(writer.ingest_filled(window + 1).is_err());
    writer.discard_partial();
    assert!(writer.ingest_filled(1).is_err(), "nothing has been handed out");
    assert!(writer.ingest_filled(u64::MAX - 95).is_err());
    assert_eq!(writer.ingest_position(), (Lsn(1), 0));
}

#[test]
fn a_window_that_was_filled_but_never_said_so_leaves_zeros() {
    let (leader_dir, follower_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (leader, mut source) = open(leader_dir.path());
    append(&mut source, 1..=20);
    let (follower, mut sink) = Wal::open(follower_dir.path(), identity(), WalOptions::default()).unwrap();
    feed(leader.log(), &mut sink, u64::MAX);
    let (segment, offset) = sink.ingest_position();
    sink.ingest_window(segment, offset, 1000).unwrap().fill(0xee);
    drop(sink);
    follower.close().unwrap();
    let (_follower, sink) = Wal::open(follower_dir.path(), identity(), WalOptions::default()).unwrap();
    assert!(sink.torn_tail().is_none());
}

#[test]
fn a_leader_may_replace_a_segment_in_which_it_wrote_nothing() {
    let (leader_dir, follower_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (leader, mut source) = open(leader_dir.path());
    append(&mut source, 1..=300);
    let (follower, mut sink) = Wal::open(follower_dir.path(), identity(), WalOptions::default()).unwrap();
    feed(leader.log(), &mut sink, u64::MAX);
    // The follower has a header page that its leader forgot in a crash.
    let end = sink.end();
    let seal = batch::build(
        Expected { first_lsn: end.head.next(), chain: end.chain, epoch: Epoch(1) },
        crate::types::HybridTimestamp(u64::MAX >> 1),
        Lsn(1),
        &[],
    );
    let window = sink.ingest_window(end.segment, end.offset, seal.len() as u64).unwrap();
    window.copy_from_slice(&seal);
    sink.ingest_filled(seal.len() as u64).unwrap();
    let header = |epoch| SegmentHeader {
        id: crate::types::WalSegmentId { region: RegionId(0), shard: ShardId(3), first_lsn: end.head.next() },
        cluster: ClusterId(9),
        epoch: Epoch(epoch),
        chain_before: sink_chain(&seal),
        segment_size: SEGMENT,
        version: SEGMENT_VERSION,
    };
    // Nor need the next leader have had it, whose own segment there can be older.
    for epoch in [1, 3, 2] {
        let window = sink.ingest_window(end.head.next(), 0, 4096).unwrap();
        window.copy_from_slice(&header(epoch).encode());
        sink.ingest_filled(4096).unwrap();
        assert_eq!(follower.log().segments().last().unwrap().header().epoch, Epoch(epoch));
    }
    // A seal without records would give its successor the same name.
    let (segment, offset) = sink.ingest_position();
    let at = Expected { first_lsn: end.head.next(), chain: sink_chain(&seal), epoch: Epoch(2) };
    let seal = batch::build(at, crate::types::HybridTimestamp(u64::MAX >> 1), Lsn(1), &[]);
    let window = sink.ingest_window(segment, offset, seal.len() as u64).unwrap();
    window.copy_from_slice(&seal);
    assert!(sink.ingest_filled(seal.len() as u64).is_err());
}

#[test]
fn a_reader_of_a_replaced_segment_goes_on_in_its_successor() {
    let directory = tempfile::tempdir().unwrap();
    // So that nobody else takes the sync lock.
    let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(directory.path(), identity(), options).unwrap();
    let empty = SegmentHeader {
        id: crate::types::WalSegmentId { region: RegionId(0), shard: ShardId(3), first_lsn: Lsn(1) },
        cluster: ClusterId(9),
        epoch: Epoch(1),
        chain_before: Chain::genesis(ClusterId(9), RegionId(0), ShardId(3)),
        segment_size: SEGMENT,
        version: SEGMENT_VERSION,
    };
    writer.ingest_window(Lsn(1), 0, 4096).unwrap().copy_from_slice(&empty.encode());
    writer.ingest_filled(4096).unwrap();
    let mut reader = wal.log().reader_from(Lsn(1)).unwrap();
    assert_eq!(reader.next(u64::MAX).unwrap().unwrap().len(), 4096);
    assert_eq!(reader.wait(Some(std::time::Instant::now())), LogWaited::TimedOut);
    let place = wal.log().sync_line().enter(Lsn(1));
    writer.set_epoch(Epoch(2)).unwrap();
    append(&mut writer, 1..=3);
    assert!(place.until_called().holds(), "whoever wanted to sync meanwhile waits for a turn");
    assert!(wal.log().sync_line().leave(place));
    assert_eq!(reader.wait(None), LogWaited::More);
    let range = reader.next(u64::MAX).unwrap().unwrap();
    assert_eq!((range.start(), range.segment().header().epoch), (0, Epoch(2)));
    wal.log().wait_synced(Lsn(3), None).unwrap();
    assert_holds(wal.log(), 1..=3);
}

#[test]
fn a_log_that_begins_in_the_middle_is_the_leaders_from_there_on_and_survives_a_restart() {
    let (leader_dir, follower_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let identity = super::log_fixture::IDENTITY;
    let (leader, mut writer) = Wal::open(leader_dir.path(), identity, WalOptions::default()).unwrap();
    writer.set_epoch(Epoch(3)).unwrap();
    for _ in 0..200 {
        writer.append(&[7; 1000]).unwrap();
    }
    // What is there before goes.
    let (old, mut old_writer) = Wal::open(follower_dir.path(), identity, WalOptions::default()).unwrap();
    old_writer.append(b"old").unwrap();
    drop((old, old_writer));

    let start = leader.log().segment_start_for(Lsn(150)).unwrap();
    assert!(start.offset == 0 && start.segment > Lsn(1) && start.segment <= Lsn(150));
    let open_at = |epoch| Wal::open_at(follower_dir.path(), identity, WalOptions::default(), start.segment, epoch);
    let (follower, mut sink) = open_at(Epoch(3)).unwrap();
    assert_eq!(follower.log().synced().load(), start.segment.previous());
    assert!(sink.append(b"no").unwrap_err().to_string().contains("where its log begins"));
    let mut reader = leader.log().reader_at(start).unwrap();
    while let Some(range) = reader.next_cut_anywhere(10_000).unwrap() {
        let mut at = range.start();
        while at < range.end() {
            let window = sink.ingest_window(range.segment().id().first_lsn, at, range.end() - at).unwrap();
            let len = window.len() as u64;
            window.copy_from_slice(range.segment().bytes(at..at + len).unwrap());
            sink.ingest_filled(len).unwrap();
            at += len;
        }
    }
    assert_eq!((follower.log().tail(), follower.log().head()), (start.segment, Lsn(200)));
    drop(sink);
    follower.close().unwrap();
    let (follower, sink) = Wal::open(follower_dir.path(), identity, WalOptions::default()).unwrap();
    assert_eq!((follower.log().tail(), sink.end()), (start.segment, writer.end()));
    drop((follower, sink));

    // A header that is not believed: an epoch that the session does not have, another segment.
    let refused = |epoch, first_lsn| {
        let (wal, mut sink) =
            Wal::open_at(follower_dir.path(), identity, WalOptions::default(), first_lsn, epoch).unwrap();
        let segment = leader.log().segment_beginning(start.segment).unwrap();
        let window = sink.ingest_window(first_lsn, 0, 4096).unwrap();
        window.copy_from_slice(segment.bytes(0..4096).unwrap());
        let refused = sink.ingest_filled(4096).is_err();
        drop(sink);
        wal.close().unwrap();
        refused
    };
    assert!(refused(Epoch(2), start.segment));
    assert!(refused(Epoch(3), start.segment.next()));
    assert!(!refused(Epoch(3), start.segment));
    // Nothing but a header: it says where the log stands.
    let (follower, sink) = Wal::open(follower_dir.path(), identity, WalOptions::default()).unwrap();
    assert_eq!((follower.log().tail(), sink.end().head), (start.segment, start.lsn));
    assert_eq!(sink.end().chain, start.chain);
}

#[test]
fn a_stream_for_the_next_record_can_begin_with_a_whole_segment() {
    let directory = tempfile::tempdir().unwrap();
    let (wal, mut writer) = Wal::open(directory.path(), super::log_fixture::IDENTITY, WalOptions::default()).unwrap();
    let log = wal.log();
    assert_eq!(log.segment_start_for(Lsn(1)).unwrap().segment, Lsn(1));
    assert!(log.segment_start_for(Lsn(2)).is_err());
    writer.set_epoch(Epoch(1)).unwrap();
    for _ in 0..200 {
        writer.append(&[7; 1000]).unwrap();
    }
    let newest = log.segments().last().unwrap().id().first_lsn;
    assert_eq!(log.segment_start_for(Lsn(201)).unwrap().segment, newest);
    assert!(log.segment_start_for(Lsn(202)).is_err());
    log.wait_synced(Lsn(200), None).unwrap();
    log.release_through(Lsn::MAX, "the test says so").unwrap();
    assert_eq!(log.tail(), newest, "the newest segment stays");
    assert!(log.segment_start_for(newest.previous()).is_err());
}
