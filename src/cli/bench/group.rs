//! Many threads that append to one log and wait for stable storage, here or at a follower: what one sync is shared by.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};

use towline::wal::WalOptions;
use towline::{Commit, Outcome};

use super::limits;
use super::machine;
use super::nodes::{Nodes, Settings};
use super::report::{Contest, Sample, Unit};
use super::streams::DurableStream;
use super::{Bench, Result};

/// How many threads, and what a comparison of so many is called.
struct Case {
    threads: u64,
    synced: [&'static str; 2],
    durable: [&'static str; 2],
}

const CASES: [Case; 2] = [
    Case {
        threads: 4,
        synced: ["4 threads, append and wait_synced", "4 threads, shared pwrite and fdatasync"],
        durable: ["4 threads, durable:1", "4 threads, shared send, fdatasync at the follower"],
    },
    Case {
        threads: 32,
        synced: ["32 threads, append and wait_synced", "32 threads, shared pwrite and fdatasync"],
        durable: ["32 threads, durable:1", "32 threads, shared send, fdatasync at the follower"],
    },
];

pub(super) fn run(bench: &Bench) -> Result<()> {
    for size in bench.record_sizes(&[128, 1024, 16 * 1024]) {
        for case in &CASES {
            synced(bench, size, case)?;
        }
    }
    for size in bench.record_sizes(&[1024]) {
        // In a hurry, a few threads are enough.
        for case in CASES.iter().take(if bench.quick { 1 } else { CASES.len() }) {
            durable(bench, size, case)?;
        }
    }
    Ok(())
}

/// Records that each of the threads appends.
fn count(bench: &Bench) -> u64 {
    if bench.quick { 100 } else { 1000 }
}

/// What a log of the records of so many threads takes at most.
fn most_bytes(bench: &Bench, size: u64, threads: u64) -> u64 {
    (count(bench) * threads + 1) * (size + 128)
}

fn synced(bench: &Bench, size: u64, case: &Case) -> Result<()> {
    let (count, bytes) = (count(bench), most_bytes(bench, size, case.threads));
    let record = super::record(size);
    let segment_size = (bytes + (1 << 20)).next_multiple_of(4096);
    let [ours, bare] = case.synced;
    Contest::new("group", size, Unit::RecordsPerSecond)
        .bare(bare, || {
            let scratch = bench.scratch("group")?;
            let log = GroupLog::new(&scratch.path().join("log"), usize::try_from(bytes)?)?;
            from_threads(scratch.path(), case.threads, count, || Ok(log.commit(&record)?))
        })
        .ours(ours, &[bare], || {
            let scratch = bench.scratch("group-ours")?;
            let (wal, mut writer) = super::append::open(scratch.path(), segment_size, WalOptions::default())?;
            wal.log().wait_synced(writer.append(&record)?, None)?;
            wal.log().wait_for_spares(None)?;
            let writer = Mutex::new(writer);
            from_threads(scratch.path(), case.threads, count, || {
                let lsn = writer.lock().unwrap_or_else(PoisonError::into_inner).append(&record)?;
                Ok(wal.log().wait_synced(lsn, None)?)
            })
        })
        .run(bench)
}

fn durable(bench: &Bench, size: u64, case: &Case) -> Result<()> {
    let (count, bytes) = (count(bench), most_bytes(bench, size, case.threads));
    let record = super::record(size);
    let segment_size = (bytes + (1 << 20)).next_multiple_of(4096);
    let commit: Commit = "durable:1".parse()?;
    let [ours, bare] = case.durable;
    Contest::new("group", size, Unit::RecordsPerSecond)
        .bare(bare, || {
            let scratch = bench.scratch("group")?;
            let stream = DurableStream::start(&scratch.path().join("there"), usize::try_from(bytes)?)?;
            let log = GroupStream { group: Group::default(), stream };
            from_threads(scratch.path(), case.threads, count, || Ok(log.commit(&record)?))
        })
        .ours(ours, &[bare], || {
            let settings = Settings { commit, ..Settings::with_segments_of(segment_size) };
            let (nodes, writer) = Nodes::start(bench, 1, settings)?;
            let (commits, writer) = (nodes.commits()?, Mutex::new(writer));
            from_threads(nodes.place_for_others().1, case.threads, count, || {
                let lsn = writer.lock().unwrap_or_else(PoisonError::into_inner).append(&record)?;
                match commits.wait(lsn, commit, None) {
                    Outcome::Committed => Ok(()),
                    other => Err(format!("LSN {lsn} was not committed: {other:?}").into()),
                }
            })
        })
        .run(bench)
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

/// Group commit with as little as it takes: records gather in a buffer, and whoever finds nobody making them durable
/// does so with all of them.
#[derive(Default)]
struct Group {
    state: Mutex<GroupState>,
    done: Condvar,
}

#[derive(Default)]
struct GroupState {
    gathered: Vec<u8>,
    /// Records gathered so far, and those of them that are durable.
    count: u64,
    durable: u64,
    end: u64,
    is_busy: bool,
}

impl Group {
    /// `make_durable` is given what has gathered, and where in the log it goes.
    fn commit(&self, record: &[u8], mut make_durable: impl FnMut(&[u8], u64) -> io::Result<()>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let start = state.gathered.len();
        state.gathered.resize(start + limits::slot_len(record.len()), 0);
        limits::append(&mut state.gathered[start..], record, 1);
        state.count += 1;
        let mine = state.count;
        while state.durable < mine {
            if state.is_busy {
                state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let (bytes, end, count) = (std::mem::take(&mut state.gathered), state.end, state.count);
            state.end += bytes.len() as u64;
            state.is_busy = true;
            drop(state);
            make_durable(&bytes, end)?;
            state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.is_busy = false;
            state.durable = count;
            self.done.notify_all();
        }
        Ok(())
    }
}

/// Durable in a file of this side.
struct GroupLog {
    group: Group,
    file: File,
}

impl GroupLog {
    fn new(path: &Path, len: usize) -> io::Result<GroupLog> {
        Ok(GroupLog { group: Group::default(), file: limits::zeroed_file(path, len)? })
    }

    fn commit(&self, record: &[u8]) -> io::Result<()> {
        self.group.commit(record, |bytes, end| {
            limits::write_at(&self.file, bytes, end)?;
            self.file.sync_data()
        })
    }
}

/// Durable in a file of the other end of a stream.
struct GroupStream {
    group: Group,
    stream: DurableStream,
}

impl GroupStream {
    fn commit(&self, record: &[u8]) -> io::Result<()> {
        self.group.commit(record, |bytes, _| self.stream.exchange(bytes))
    }
}
