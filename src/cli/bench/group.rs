//! Many threads that append to one log and wait for stable storage: what one sync is shared by.

use std::fs::File;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};

use towline::wal::WalOptions;

use super::limits;
use super::machine;
use super::report::{Contest, Sample, Unit};
use super::{Bench, Result};

pub(super) fn run(bench: &Bench) -> Result<()> {
    for size in bench.record_sizes(&[128, 1024, 16 * 1024]) {
        for threads in [4, 32] {
            let (ours_name, bare_name) = names(threads);
            let count = if bench.quick { 100 } else { 1000 };
            let record = super::record(size);
            let bytes = (count * threads + 1) * (size + 128);
            let segment_size = (bytes + (1 << 20)).next_multiple_of(4096);
            Contest::new("group", size, Unit::RecordsPerSecond)
                .bare(bare_name, || {
                    let scratch = bench.scratch("group")?;
                    let log = GroupLog::new(&scratch.path().join("log"), usize::try_from(bytes)?)?;
                    from_threads(scratch.path(), threads, count, || Ok(log.commit(&record)?))
                })
                .ours(ours_name, &[bare_name], || {
                    let scratch = bench.scratch("group-ours")?;
                    let (wal, mut writer) = super::append::open(scratch.path(), segment_size, WalOptions::default())?;
                    wal.log().wait_synced(writer.append(&record)?, None)?;
                    wal.log().wait_for_spares(None)?;
                    let writer = Mutex::new(writer);
                    from_threads(scratch.path(), threads, count, || {
                        let lsn = writer.lock().unwrap_or_else(PoisonError::into_inner).append(&record)?;
                        Ok(wal.log().wait_synced(lsn, None)?)
                    })
                })
                .run(bench)?;
        }
    }
    Ok(())
}

fn names(threads: u64) -> (&'static str, &'static str) {
    if threads == 4 {
        ("4 threads, append and wait_synced", "4 threads, shared pwrite and fdatasync")
    } else {
        ("32 threads, append and wait_synced", "32 threads, shared pwrite and fdatasync")
    }
}

/// `count` operations on each of so many threads, and what of it reached the device.
fn from_threads(
    directory: &Path,
    threads: u64,
    count: u64,
    operation: impl Fn() -> Result<()> + Sync,
) -> Result<Sample> {
    let before = machine::device_bytes_written(directory);
    let sample = super::append::timed(threads * count, || {
        std::thread::scope(|scope| {
            let workers: Vec<_> =
                (0..threads).map(|_| scope.spawn(|| (0..count).try_for_each(|_| operation()))).collect();
            workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a writer panicked")?)
        })
    })?;
    let written = machine::device_bytes_written(directory).zip(before);
    let per_record = written.map(|(after, before)| (after - before) as f64 / (threads * count) as f64);
    Ok(sample.with("device_bytes_per_record", per_record))
}

/// Group commit with as little as it takes: records gather in a buffer, and whoever finds nobody syncing writes and
/// syncs all of them.
struct GroupLog {
    file: File,
    state: Mutex<GroupState>,
    done: Condvar,
}

#[derive(Default)]
struct GroupState {
    gathered: Vec<u8>,
    /// Records gathered so far, and those of them on stable storage.
    count: u64,
    synced: u64,
    end: u64,
    is_syncing: bool,
}

impl GroupLog {
    fn new(path: &Path, len: usize) -> std::io::Result<GroupLog> {
        Ok(GroupLog { file: limits::zeroed_file(path, len)?, state: Mutex::default(), done: Condvar::new() })
    }

    fn commit(&self, record: &[u8]) -> std::io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let start = state.gathered.len();
        state.gathered.resize(start + limits::slot_len(record.len()), 0);
        limits::append(&mut state.gathered[start..], record, 1);
        state.count += 1;
        let mine = state.count;
        while state.synced < mine {
            if state.is_syncing {
                state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let (bytes, end, count) = (std::mem::take(&mut state.gathered), state.end, state.count);
            state.end += bytes.len() as u64;
            state.is_syncing = true;
            drop(state);
            limits::write_at(&self.file, &bytes, end)?;
            self.file.sync_data()?;
            state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.is_syncing = false;
            state.synced = count;
            self.done.notify_all();
        }
        Ok(())
    }
}
