//! walrus-rust 0.2: topics in blocks of 10 MB. Where it files things is a setting of the process.

use std::path::Path;

use walrus_rust::{FsyncSchedule, ReadConsistency, Walrus};

use super::Peer;
use crate::{Result, load};

const TOPIC: &str = "t";
/// Bytes asked for at a time when a log is read back.
const READ: usize = 4 << 20;

pub(super) const PEER: Peer = Peer {
    name: "walrus-rust",
    append: Some(|directory, record, count| {
        let log = open(directory, FsyncSchedule::NoFsync)?;
        load::rate(count, || (0..count).try_for_each(|_| Ok(log.append_for_topic(TOPIC, record)?)))
    }),
    sync: Some(|directory, record, count| {
        let log = open(directory, FsyncSchedule::SyncEach)?;
        load::latencies(count, || Ok(log.append_for_topic(TOPIC, record)?))
    }),
    group: Some(|directory, record, threads, each| {
        let log = open(directory, FsyncSchedule::SyncEach)?;
        load::threads(threads, each, |_| Ok(log.append_for_topic(TOPIC, record)?))
    }),
    recover: Some((
        |directory, record, count| {
            let log = open(directory, FsyncSchedule::NoFsync)?;
            (0..count).try_for_each(|_| Ok(log.append_for_topic(TOPIC, record)?))
        },
        |directory, _| {
            let log = open(directory, FsyncSchedule::NoFsync)?;
            let mut found = 0;
            // Reading it consumes it: how far is remembered in memory, and on disk only after so many records.
            loop {
                match log.batch_read_for_topic(TOPIC, READ, true)?.len() as u64 {
                    0 => return Ok(found),
                    more => found += more,
                }
            }
        },
    )),
};

/// Has every log put below `directory`, and nothing printed.
pub(crate) fn keep_quiet_in(directory: &Path) {
    // SAFETY: called at the beginning of `main`, before there is another thread that could read the environment.
    unsafe {
        std::env::set_var("WALRUS_DATA_DIR", directory.join("walrus"));
        std::env::set_var("WALRUS_QUIET", "1");
    }
}

/// The log that belongs to a directory, in which it is not.
fn open(directory: &Path, schedule: FsyncSchedule) -> Result<Walrus> {
    let key = directory.file_name().and_then(|name| name.to_str()).ok_or("a directory without a name")?;
    let consistency = ReadConsistency::AtLeastOnce { persist_every: u32::MAX };
    Ok(Walrus::with_consistency_and_schedule_for_key(key, consistency, schedule)?)
}
