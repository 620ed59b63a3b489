//! Crash images of real files.
#![cfg(target_os = "linux")]
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
        let due = std::env::var(IMAGES).map_or(4000, |images| images.parse().expect("a number of images"));
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
        for batch in range.batches() {
            records.extend(batch.records().map(|record| (record.lsn.get(), record.bytes.to_vec())));
        }
    }
    records
}

#[test]
fn a_log_keeps_what_is_synced_and_cuts_the_rest() {
    runs("log", 60, log::run);
}

#[test]
fn a_log_being_replaced_is_a_beginning_of_the_old_one_or_the_new_one() {
    runs("replaced log", 5, log::replace);
}

#[test]
fn a_store_and_its_log_agree_after_a_replay() {
    runs("store", 20, store::run);
}

#[test]
fn a_store_being_rebuilt_keeps_its_mark() {
    runs("rebuild", 8, store::rebuild);
}

#[test]
fn small_files_are_the_old_ones_or_the_new_ones() {
    runs("small files", 7, files::run);
}
