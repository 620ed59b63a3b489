//! Crash images of real files: what a power cut could leave of a log, a store and the small files beside them is opened
//! by the code that would open it, and checked.
//!
//! **What breaks.** Until a sync, the device holds any mixture of what a file has held since the sync before, in pieces
//! of 512 bytes or of 4 KiB; and of the names made, changed and removed in a directory since it was synced, any subset.
//! A log with a bound on its size gives up what is not synced, and relies on names changing in order: for such a run, a
//! beginning of the changes instead.
//!
//! A sync can fail, too: the kernel tells of that once, and takes the pages for written. Whoever is started again on
//! the same machine finds them in the page cache, and no later sync puts them on the device unless they are written
//! again. And a write can find no room in the middle.
//!
//! **How an image is made.** `calls.rs` sees every sync, rename and removal of this process; `disk.rs` keeps what was
//! durable after each, and makes images of it and of what the files hold in the page cache. A run is a workload, cut
//! off at random moments, also in the middle of a call; several images of each moment are opened, some of them while a
//! trap waits for the recovery itself, and some live on and are cut off again.
//!
//! **What must hold.** Nothing said to be synced is missing, byte for byte. Nothing is taken for damaged. Nothing is
//! found that was not written, stale bytes of recycled segments and of cut tails least of all. What is cut is zero
//! afterwards, and was told exactly if there was something. The log then takes new records, which are there after the
//! next crash. A store is never ahead of its log, serves only the state that its applied mark says, is the model again
//! after a replay, and has the marks of closing in order and of rebuilding exactly while they are true.
//!
//! **Faults that were planted, and what noticed.** By the test of the log: a sealed segment, or the page that a sync
//! begins in, left out of the sync; the directory not synced with a segment's first sync; a recycled segment not filled
//! with zeros; a cut not carried out, with the chain compared or not; removals of several segments not made durable one
//! by one; a recycled file renamed without a sync of the directory; a log's first segment named and not made durable
//! before the second; a segment released before its successor was durable; a torn tail not told. By the tests of syncs
//! that fail: what was found of a log not written again, or all of it but the batch that seals a segment; slots newer
//! than the applied mark, or a store's header, not written again. By the test of the store: the clean mark written
//! before the slots were synced, or left in place by the next change; the applied mark written before the slots were
//! synced; a header that tells of new slots written before the file's growth was synced. By the others: the mark of a
//! rebuild set after the slots were emptied, or taken away before they were synced; how far a base has come noted
//! before that was synced; a small file renamed before it was synced, or its name not synced; a manifest made before
//! its shards' directories were durable; a directory's name that an earlier run had made, or a new manifest's, left
//! unsynced. Not noticed: the chain of a batch not compared, as long as cut bytes are zeroed and what a recycled file
//! brings back has lower LSNs. Found in the code by these tests when they were new: the removals, the first segment's
//! name, and a store whose directory had no durable name.
//!
//! A failing run prints a seed, which gives the same choices again (threads in the background may still come at other
//! moments), and leaves the directory that it had opened. `TOWLINE_CRASH_IMAGES` says how many images there are to be.
// Where a word has fewer bits, the kernel takes the offset of a write in two, which is another way on each processor.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

#[path = "crash_images/calls.rs"]
mod calls;
#[path = "crash_images/disk.rs"]
mod disk;
#[path = "crash_images/files.rs"]
mod files;
#[path = "crash_images/log.rs"]
mod log;
#[path = "common/random.rs"]
mod random;
#[path = "crash_images/resume.rs"]
mod resume;
#[path = "crash_images/store.rs"]
mod store;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use towline::Lsn;
use towline::wal::Log;

use random::Random;

/// How many images there are to be in all.
const IMAGES: &str = "TOWLINE_CRASH_IMAGES";
/// A seed that a failing test has printed.
const SEED: &str = "TOWLINE_CRASH_SEED";

/// Images so far, and when there are enough.
pub struct Count {
    images: AtomicU64,
    /// Those at moments when something was written and not synced.
    unsynced: AtomicU64,
    due: u64,
}

impl Count {
    /// So many in a hundred of all.
    fn share(percent: u64) -> Count {
        let due = std::env::var(IMAGES).map_or(3000, |images| images.parse().expect("a number of images"));
        Count { images: AtomicU64::new(0), unsynced: AtomicU64::new(0), due: due * percent / 100 }
    }

    fn one(&self, unsynced: bool) {
        self.images.fetch_add(1, Ordering::Relaxed);
        self.unsynced.fetch_add(u64::from(unsynced), Ordering::Relaxed);
    }

    fn is_reached(&self) -> bool {
        self.images.load(Ordering::Relaxed) >= self.due
    }
}

/// Says which run it was that failed.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{SEED}={} repeats this run", self.0);
        }
    }
}

/// Runs until there are enough images; or one run, by its seed.
fn runs(what: &str, percent: u64, mut run: impl FnMut(u64, &Count)) {
    let mut count = Count::share(percent);
    if let Ok(seed) = std::env::var(SEED) {
        count.due = u64::MAX;
        run(seed.parse().expect("a seed"), &count);
        return;
    }
    let mut seeds = Random::new();
    let mut runs = 0;
    while !count.is_reached() {
        let named = Named(seeds.next());
        run(named.0, &count);
        runs += 1;
    }
    let (images, unsynced) = (count.images.load(Ordering::Relaxed), count.unsynced.load(Ordering::Relaxed));
    println!("{what}: {images} images of {runs} runs, {unsynced} with something unsynced");
    assert!(unsynced * 4 > images, "{unsynced} of {images} images had anything to lose");
}

/// The records of a log from `lsn` on.
fn records_of(log: &Arc<Log>, lsn: Lsn) -> Vec<(u64, Vec<u8>)> {
    let mut records = Vec::new();
    for range in log.ranges_from(lsn).unwrap() {
        records.extend(range.records().map(|record| (record.lsn.get(), record.bytes.to_vec())));
    }
    records
}

#[test]
fn a_log_keeps_what_is_synced_and_cuts_the_rest() {
    runs("log", 36, log::run);
}

#[test]
fn a_log_whose_sync_failed_loses_nothing_that_is_synced_later() {
    runs("failing log", 8, log::fail);
}

#[test]
fn a_log_being_replaced_is_a_beginning_of_the_old_one_or_the_new_one() {
    runs("replaced log", 8, log::replace);
}

#[test]
fn a_store_and_its_log_agree_after_a_replay() {
    runs("store", 12, store::run);
}

#[test]
fn a_store_whose_sync_failed_is_whole_after_a_replay() {
    runs("failing store", 6, store::fail);
}

#[test]
fn a_store_being_rebuilt_keeps_its_mark() {
    runs("rebuild", 8, store::rebuild);
}

#[test]
fn an_interrupted_rebuild_goes_on_with_what_was_saved() {
    runs("resumed rebuild", 8, resume::run);
}

#[test]
fn a_rebuild_whose_syncs_fail_goes_on_with_what_was_saved() {
    runs("failing rebuild", 2, resume::fail);
}

#[test]
fn small_files_are_the_old_ones_or_the_new_ones() {
    runs("small files", 12, files::run);
}

#[test]
fn a_directory_whose_name_an_earlier_run_has_made_keeps_it() {
    files::make_again();
}

#[test]
fn an_epoch_that_an_earlier_run_has_put_into_the_manifest_stays_accepted() {
    files::accept_again();
}
