//! Spares as their writer, retention and shutdown find them.

use super::*;
use crate::limits;
use crate::types::Epoch;
use crate::wal::log_fixture::{IDENTITY, SIZE, given_up};
use crate::wal::{LogRange, SyncPolicy, Wal};

#[test]
fn in_bulk_new_files_are_not_filled_and_used_ones_not_kept() {
    let directory = tempfile::tempdir().unwrap();
    let spares = Spares::new(directory.path(), &IDENTITY, &WalOptions::default(), Vec::new());
    assert!(spares.prepare(&spare_path(directory.path(), 1), Origin::New).unwrap().filled);
    // As if the thread were there, and did nothing.
    spares.state.lock().running = true;
    spares.set_bulk(true);
    let spare = spares.prepare(&spare_path(directory.path(), 2), Origin::New).unwrap();
    assert!(!spare.filled, "it is overwritten as a whole");
    assert_eq!(spare.file.metadata().unwrap().len(), SIZE);
    let (path, segment) = given_up(directory.path(), 1);
    spares.recycle(path.clone(), segment, 0).unwrap();
    assert!(!path.exists());
    assert_eq!(spares.state.lock().old.count(), 0, "to fill it again would hold up what is received");
    spares.set_bulk(false);
    let (path, segment) = given_up(directory.path(), 2);
    spares.recycle(path.clone(), segment, 0).unwrap();
    assert!(!path.exists());
    spares.removed.wait_ended();
    let (used, origin) = spares.file_at_hand().unwrap();
    assert_eq!(origin, Origin::Used);
    assert!(spares.prepare(&used, origin).unwrap().filled);
    assert!(std::fs::read(&used).unwrap().iter().all(|&byte| byte == 0));
}

#[test]
fn a_used_file_whose_zeros_are_on_the_device_holds_nothing_old() {
    let directory = tempfile::tempdir().unwrap();
    let spares = Spares::new(directory.path(), &IDENTITY, &WalOptions::default(), Vec::new());
    spares.state.lock().taken = 2;
    let (path, before) = given_up(directory.path(), 1);
    let mut spare = spares.prepare(&path, Origin::Used).unwrap();
    assert!(!spare.settled);
    spares.settle(&mut spare).unwrap();
    let Prepared { path, file, mapping, .. } = spare;
    let (segment, _writer) = Segment::new(*before.header(), path, file, mapping, 2 * PAGE_LEN, None);
    assert_eq!(segment.sync_end(true), 2 * PAGE_LEN);
}

#[test]
fn files_are_zeros_whether_anybody_waits_for_syncs_or_not() {
    let directory = tempfile::tempdir().unwrap();
    let spares = Spares::new(directory.path(), &IDENTITY, &WalOptions::default(), Vec::new());
    spares.state.lock().taken = 2;
    for (number, waits) in [(1, false), (2, true)] {
        if waits {
            spares.syncs_are_waited_for();
        }
        let new = spares.prepare(&spare_path(directory.path(), number), Origin::New).unwrap();
        assert!(new.filled);
        assert!(std::fs::read(&new.path).unwrap() == vec![0; limits::index(SIZE)]);
        // The writer is not about to run out.
        spares.made(&new.path.clone(), Ok(new));
        for origin in [Origin::LeftOver, Origin::Used] {
            if waits {
                spares.syncs_are_waited_for();
            }
            let (path, _segment) = given_up(directory.path(), number);
            let used = spares.prepare(&path, origin).unwrap();
            let may_come_back = origin == Origin::Used && !waits;
            assert!(used.filled && used.settled != may_come_back, "{origin:?}: nobody knows what it held");
            assert!(std::fs::read(&path).unwrap() == vec![0; limits::index(SIZE)]);
        }
    }
}

#[test]
fn used_files_wait_where_there_is_room_and_go_when_the_burst_is_over() {
    let directory = tempfile::tempdir().unwrap();
    let spares = Spares::new(directory.path(), &IDENTITY, &WalOptions::default(), Vec::new());
    let keep = WalOptions::default().spare_segments;
    let give_up = |numbers: std::ops::RangeInclusive<u64>| {
        for number in numbers {
            let (path, segment) = given_up(directory.path(), number);
            spares.recycle(path.clone(), segment, SIZE).unwrap();
            assert!(!path.exists());
        }
        spares.removed.wait_ended();
        spares.state.lock().old.count()
    };
    // As if the thread were there, and did nothing.
    spares.state.lock().running = true;
    spares.state.lock().taken = 9;
    assert_eq!(give_up(1..=9), keep, "there is no room for more than spares");
    // The other segments, seven that wait, and no room for another.
    spares.set_room(9 * SIZE - 1);
    assert_eq!(give_up(10..=19), 7);
    spares.set_room(9 * SIZE);
    assert_eq!(give_up(20..=29), 8);
    assert_eq!(spares.file_bytes(), 8 * SIZE);
    // The log has grown into it.
    spares.shed_used();
    assert_eq!(spares.state.lock().old.count(), keep, "none of the spares is there");
    assert_eq!(give_up(30..=39), 8);
    spares.state.lock().preparing = true;
    spares.shed_used();
    assert_eq!(spares.state.lock().old.count(), 1);
    spares.state.lock().preparing = false;
    spares.run();
    spares.removed.wait_ended();
    let state = spares.state.lock();
    assert_eq!((state.ready.len(), state.old.count()), (keep, 0), "nothing is left to be filled");
    drop(state);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), keep);
}

#[test]
fn no_more_than_spares_stays_of_what_is_found_or_left() {
    let directory = tempfile::tempdir().unwrap();
    let files = || std::fs::read_dir(directory.path()).unwrap().count();
    let left_over: Vec<PathBuf> = (1..=9).map(|number| given_up(directory.path(), number).0).collect();
    let keep = WalOptions::default().spare_segments;
    let spares = Spares::new(directory.path(), &IDENTITY, &WalOptions::default(), left_over);
    assert_eq!((spares.state.lock().old.count(), files()), (keep, keep));
    let used = (11..=19).map(|number| given_up(directory.path(), number).0).collect();
    come_back(&spares, used);
    spares.stop();
    assert_eq!(files(), 2 * keep);
}

/// As if they had been given up, and their new names were durable.
fn come_back(spares: &Spares, files: Vec<PathBuf>) {
    let mut state = spares.state.lock();
    files.iter().for_each(|_| state.old.returns());
    state.old.have_returned(files);
}

#[test]
fn a_writer_about_to_run_out_gets_no_file_that_must_be_synced_first() {
    let directory = tempfile::tempdir().unwrap();
    let [left_over, used] = ["left-over", "used"].map(|name| directory.path().join(name));
    let origin = |taken, waits| {
        let spares = Spares::new(directory.path(), &IDENTITY, &WalOptions::default(), vec![left_over.clone()]);
        if waits {
            spares.syncs_are_waited_for();
        }
        come_back(&spares, vec![used.clone()]);
        let mut state = spares.state.lock();
        state.taken = taken;
        [spares.next_file(&mut state).1, spares.next_file(&mut state).1]
    };
    assert_eq!(origin(0, true), [Origin::LeftOver, Origin::Used], "it has not begun");
    assert_eq!(origin(1, true), [Origin::New; 2]);
    assert_eq!(origin(1, false), [Origin::Used, Origin::New]);
}

#[test]
fn what_is_found_in_place_of_a_new_file_has_room_already() {
    let directory = tempfile::tempdir().unwrap();
    let [left_over, used] = [1, 2].map(|number| given_up(directory.path(), number).0);
    let spares = Spares::new(directory.path(), &IDENTITY, &WalOptions::default(), vec![left_over.clone()]);
    come_back(&spares, vec![used.clone()]);
    // No file can be made there, which is not for want of room: nothing else is tried.
    let nowhere = directory.path().join("gone").join("spare");
    let (path, result) = spares.prepare_when_there_is_room(nowhere.clone(), Origin::New);
    assert!(path == nowhere && matches!(result, Err(Error::Io { .. })));
    assert_eq!(spares.file_at_hand(), Some((used, Origin::Used)));
    assert_eq!(spares.file_at_hand(), Some((left_over, Origin::LeftOver)));
    assert_eq!(spares.file_at_hand(), None);
}

#[test]
fn large_pieces_are_for_writers_whose_syncs_cover_much() {
    let directory = tempfile::tempdir().unwrap();
    let identity = LogIdentity { segment_size: 4 << 20, ..IDENTITY };
    let spares = Spares::new(directory.path(), &identity, &WalOptions::default(), Vec::new());
    let bound = identity.segment_size / WRITTEN_AGAIN;
    spares.state.lock().taken = 1;
    assert_eq!(spares.manner().piece_len, PAGE_LEN, "nothing is known yet");
    spares.state.lock().taken = 2;
    assert_eq!(spares.manner().piece_len, LONGEST_PIECE);
    spares.syncs_are_waited_for();
    assert_eq!(spares.manner().piece_len, PAGE_LEN);
    spares.sync_waited.store(false, Ordering::Relaxed);
    for syncs in 1..=bound / PAGE_LEN {
        spares.has_synced();
        let piece_len = spares.manner().piece_len;
        assert!(piece_len.is_power_of_two());
        assert!(piece_len == PAGE_LEN || piece_len * syncs <= bound, "{syncs} of {piece_len}");
    }
    assert_eq!(spares.manner().piece_len, PAGE_LEN, "for as many as that");
    // What was true of the segment before is not forgotten at once.
    spares.begin().unwrap();
    spares.take().unwrap();
    assert_eq!(spares.manner().piece_len, PAGE_LEN);
    spares.take().unwrap();
    assert!(spares.manner().piece_len > PAGE_LEN);
}

#[test]
fn pages_are_left_alone_where_a_writer_of_long_batches_is_ahead() {
    let directory = tempfile::tempdir().unwrap();
    let spares = Spares::new(directory.path(), &IDENTITY, &WalOptions::default(), Vec::new());
    spares.begin().unwrap();
    spares.wait_ready(None).unwrap();
    let waits_for = |outrun| {
        spares.state.lock().outrun = outrun;
        spares.manner()
    };
    assert!(waits_for(false).touches && waits_for(true).touches, "batches are short, as far as is known");
    spares.set_long(true);
    assert!(waits_for(false).touches, "there are spares enough");
    assert_eq!(waits_for(true).touches, !cfg!(target_os = "linux"));
    let prepared = spares.prepare(&spare_path(directory.path(), 100), Origin::New).unwrap();
    assert_eq!(prepared.through_file, cfg!(target_os = "linux"));
    assert!(prepared.filled && std::fs::read(&prepared.path).unwrap() == vec![0; limits::index(SIZE)]);
    spares.set_long(false);
    assert!(!spares.prepare(&spare_path(directory.path(), 101), Origin::New).unwrap().through_file);
    spares.stop();
    spares.wait_ended();
}

#[test]
fn long_batches_that_are_waited_for_get_large_pieces_and_no_pages_made_ready() {
    let directory = tempfile::tempdir().unwrap();
    let spares = Spares::new(directory.path(), &IDENTITY, &WalOptions::default(), Vec::new());
    spares.state.lock().taken = 2;
    spares.syncs_are_waited_for();
    let manner = spares.manner();
    assert!(
        manner.touches && manner.piece_len == PAGE_LEN,
        "short ones are stored, and a sync would write whole pieces"
    );
    spares.set_long(true);
    let on_linux = cfg!(target_os = "linux");
    const { assert!(IDENTITY.segment_size <= SYNCED_OFTEN) };
    let manner = spares.manner();
    assert_eq!((manner.touches, manner.piece_len), (!on_linux, PAGE_LEN));
    let large = LogIdentity { segment_size: 4 * SYNCED_OFTEN, ..IDENTITY };
    let often = Spares::new(directory.path(), &large, &WalOptions::default(), Vec::new());
    often.state.lock().taken = 2;
    often.set_long(true);
    often.syncs_are_waited_for();
    assert!(often.manner().touches, "for so much at a time stores are better");
    often.state.lock().syncs = 4;
    assert_eq!(often.manner().touches, !on_linux);
    let prepared = spares.prepare(&spare_path(directory.path(), 100), Origin::New).unwrap();
    assert_eq!(prepared.through_file, on_linux);
    assert!(prepared.filled && std::fs::read(&prepared.path).unwrap() == vec![0; limits::index(SIZE)]);
    // And so do files that held something before.
    spares.syncs_are_waited_for();
    let (path, _segment) = given_up(directory.path(), 7);
    assert_eq!(spares.prepare(&path, Origin::Used).unwrap().through_file, on_linux);
    spares.set_long(false);
    let (path, _segment) = given_up(directory.path(), 8);
    assert!(!spares.prepare(&path, Origin::Used).unwrap().through_file);
}

#[test]
fn nothing_is_prepared_unasked_where_how_a_follower_follows_is_not_known() {
    let directory = tempfile::tempdir().unwrap();
    let spares =
        || std::fs::read_dir(directory.path()).unwrap().filter(|entry| is_spare(entry.as_ref().unwrap())).count();
    let (wal, mut writer) = Wal::open_unprepared(directory.path(), IDENTITY, WalOptions::default()).unwrap();
    assert!(!wal.log().spares().state.lock().running);
    // The first segment comes when it is wanted, and then the others.
    writer.set_epoch(Epoch(1)).unwrap();
    assert_eq!(writer.append(b"record").unwrap(), Lsn(1));
    wal.log().wait_for_spares(None).unwrap();
    assert_eq!(spares(), WalOptions::default().spare_segments);
    drop(writer);
    wal.close().unwrap();
    // And so they do once it is known.
    let (wal, _writer) = Wal::open_at(directory.path(), IDENTITY, WalOptions::default(), Lsn(9), Epoch(1)).unwrap();
    assert_eq!(spares(), 0);
    wal.log().prepare_spares().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while spares() == 0 && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert!(spares() > 0);
}

fn is_spare(entry: &std::fs::DirEntry) -> bool {
    entry.file_name().to_string_lossy().starts_with("spare-")
}

#[test]
fn whoever_waits_for_a_spare_fills_it_too() {
    let directory = tempfile::tempdir().unwrap();
    let spares = Spares::new(directory.path(), &IDENTITY, &WalOptions::default(), Vec::new());
    let path = spare_path(directory.path(), 100);
    let filling = Arc::new(Filling::new(&path, SIZE).unwrap());
    {
        // As if the thread were at it, and did nothing.
        let mut state = spares.state.lock();
        (state.running, state.preparing) = (true, true);
    }
    std::thread::scope(|scope| {
        let taker = scope.spawn(|| spares.take().map(|spare| spare.path));
        spares.offer(&filling);
        let deadline = Instant::now() + Duration::from_secs(60);
        while filling.is_left() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(!filling.is_left(), "nobody helps");
        spares.withdraw();
        let Filled { file, mapping, .. } = filling.finish().unwrap();
        let spare = Prepared { path, file, mapping, filled: true, settled: true, through_file: false };
        spares.made(&spare.path.clone(), Ok(spare));
        let path = taker.join().unwrap().unwrap();
        assert!(std::fs::read(path).unwrap() == vec![0; limits::index(SIZE)]);
    });
    spares.state.lock().running = false;
}

#[test]
fn long_batches_go_in_through_the_file_where_pages_were_left_alone_and_are_read_like_the_rest() {
    let directory = tempfile::tempdir().unwrap();
    let options = WalOptions { sync: SyncPolicy::Never, spare_segments: 1, ..WalOptions::default() };
    let (wal, mut writer) = Wal::open(directory.path(), IDENTITY, options).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    let record =
        |lsn: u64| vec![(lsn % 251) as u8; if lsn.is_multiple_of(3) { 100 } else { 9000 + (lsn % 7) as usize }];
    // As for a writer that is ahead; how far one is depends on the machine.
    let leave_pages_alone = || {
        wal.log().wait_for_spares(None).unwrap();
        wal.log().spares().state.lock().ready.iter_mut().for_each(|spare| spare.through_file = true);
    };
    leave_pages_alone();
    let mut framed = 0;
    for lsn in 1..=200 {
        let (before, framed_before) = (writer.end(), writer.framed_len());
        writer.append(&record(lsn)).unwrap();
        let after = writer.end();
        let is_new = after.segment != before.segment || before.offset == 0;
        if !is_new && !lsn.is_multiple_of(3) && cfg!(target_os = "linux") {
            assert_eq!(writer.framed_len() as u64, after.offset - before.offset, "LSN {lsn}");
            framed += 1;
        } else if !is_new {
            assert_eq!(writer.framed_len(), framed_before, "LSN {lsn} is short");
        }
        let newest = wal.log().ranges_from(Lsn(lsn)).unwrap();
        assert!(newest.iter().flat_map(LogRange::records).any(|seen| seen.bytes == record(lsn)));
        if is_new {
            leave_pages_alone();
        }
    }
    assert!(framed > 50 || !cfg!(target_os = "linux"), "{framed}");
    drop(writer);
    wal.close().unwrap();
    let (wal, _writer) = Wal::open(directory.path(), IDENTITY, options).unwrap();
    let ranges = wal.log().ranges_from(Lsn(1)).unwrap();
    let found = ranges.iter().flat_map(LogRange::records);
    assert!(found.map(|found| (found.lsn.0, found.bytes.to_vec())).eq((1..=200).map(|lsn| (lsn, record(lsn)))));
}
