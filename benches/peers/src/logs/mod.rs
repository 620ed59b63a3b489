//! The logs: one file each, all with the same table of what they can do.
//!
//! A peer takes part in a workload only where it does what the workload asks for: one that syncs every record has no
//! `append`, one that never syncs has no `sync`.

mod armdb;
mod commitlog;
mod nano_wal;
mod okaywal;
mod open_wal;
mod raft_engine;
mod towline;
pub(crate) mod walrus;
mod writeahead;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::contest::{Contest, OURS, Sample, Unit};
use crate::load;
use crate::{Options, Result, record};

/// Appends `count` times the record to a log in an empty directory, timed; nobody waits for the disk.
type Append = fn(&Path, &[u8], u64) -> Result<Sample>;
/// Appends `count` times, each time until it is on stable storage.
type Sync = fn(&Path, &[u8], u64) -> Result<Sample>;
/// The same by so many threads, `each` times.
type Group = fn(&Path, &[u8], u64, u64) -> Result<Sample>;
/// Makes a log of `count` records, and closes it.
type Fill = fn(&Path, &[u8], u64) -> Result<()>;
/// Opens it, and counts the records that came back.
type Recover = fn(&Path, usize) -> Result<u64>;

/// One log.
pub(crate) struct Peer {
    name: &'static str,
    append: Option<Append>,
    sync: Option<Sync>,
    group: Option<Group>,
    recover: Option<(Fill, Recover)>,
}

const PEERS: [Peer; 9] = [
    towline::PEER,
    raft_engine::PEER,
    okaywal::PEER,
    walrus::PEER,
    nano_wal::PEER,
    armdb::PEER,
    open_wal::PEER,
    writeahead::PEER,
    commitlog::PEER,
];

fn peers(options: &Options) -> impl Iterator<Item = &'static Peer> {
    PEERS.iter().filter(|peer| options.takes_part(peer.name))
}

/// A directory for one run, removed afterwards.
pub(crate) fn scratch(root: &Path) -> Result<tempfile::TempDir> {
    Ok(tempfile::Builder::new().prefix("log-").tempdir_in(root)?)
}

/// Records that nobody waits for.
pub(crate) fn append(options: &Options, root: &Path) -> Result<()> {
    for size in options.record_sizes() {
        let (record, count) = (record(size), options.count(256 << 20, 16 << 20, size));
        let mut contest = Contest::new("append", size, Unit::RecordsPerSecond);
        for (peer, append) in peers(options).filter_map(|peer| Some((peer, peer.append?))) {
            let record = &record;
            contest.add(peer.name, move || append(scratch(root)?.path(), record, count));
        }
        contest.run(options)?;
    }
    Ok(())
}

/// One writer that waits for stable storage.
pub(crate) fn sync(options: &Options, root: &Path) -> Result<()> {
    for size in options.record_sizes() {
        let (record, count) = (record(size), if options.quick { 200 } else { 4000 });
        let mut contest = Contest::new("sync", size, Unit::Microseconds);
        for (peer, sync) in peers(options).filter_map(|peer| Some((peer, peer.sync?))) {
            let record = &record;
            contest.add(peer.name, move || sync(scratch(root)?.path(), record, count));
        }
        contest.run(options)?;
    }
    Ok(())
}

/// 4 and 32 threads that wait for stable storage.
pub(crate) fn group(options: &Options, root: &Path) -> Result<()> {
    for size in options.record_sizes() {
        for (threads, workload) in [(4, "group-4"), (32, "group-32")] {
            let (record, each) = (record(size), if options.quick { 50 } else { 1000 });
            let mut contest = Contest::new(workload, size, Unit::RecordsPerSecond);
            for (peer, group) in peers(options).filter_map(|peer| Some((peer, peer.group?))) {
                let record = &record;
                contest.add(peer.name, move || group(scratch(root)?.path(), record, threads, each));
            }
            contest.run(options)?;
        }
    }
    Ok(())
}

/// Opening a log, and counting what is in it: one file set for all rounds, cached after the first.
pub(crate) fn recover(options: &Options, root: &Path) -> Result<()> {
    for size in options.record_sizes() {
        let (record, count) = (record(size), options.count(1 << 30, 64 << 20, size));
        let mut contest = Contest::new("recover", size, Unit::MegabytesPerSecond);
        for (peer, (fill, recover)) in peers(options).filter_map(|peer| Some((peer, peer.recover?))) {
            let place = scratch(root)?;
            if let Err(error) = fill(place.path(), &record, count) {
                if peer.name == OURS {
                    return Err(error);
                }
                eprintln!("recover {size}: {} left out: {error}", peer.name);
                continue;
            }
            contest.add(peer.name, move || {
                load::megabytes(count * size as u64, || {
                    let found = recover(place.path(), size)?;
                    if found == count { Ok(()) } else { Err(format!("{found} of {count} records came back").into()) }
                })
            });
        }
        contest.run(options)?;
    }
    Ok(())
}

/// Numbers for keys, each once.
#[derive(Default)]
struct Numbers(AtomicU64);

impl Numbers {
    fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}
