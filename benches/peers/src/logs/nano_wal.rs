//! nano-wal 1.0: segments by time, no checksums. What is in a log is found by positions that the caller kept, so there
//! is nothing to recover but the newest file.

use std::path::Path;
use std::time::Duration;

use nano_wal::{Wal, WalOptions};

use super::Peer;
use crate::{Result, load};

/// One moment for all records: rotation, which loses segments, is left out.
const NOW_MS: i64 = 4_000_000_000_000;

pub(super) const PEER: Peer = Peer {
    name: "nano-wal",
    append: Some(|directory, record, count| {
        let log = open(directory)?;
        load::rate(count, || (0..count).try_for_each(|_| append(&log, record, false)))
    }),
    sync: Some(|directory, record, count| {
        let log = open(directory)?;
        load::latencies(count, || append(&log, record, true))
    }),
    group: Some(|directory, record, threads, each| {
        let log = open(directory)?;
        load::threads(threads, each, |_| append(&log, record, true))
    }),
    recover: None,
};

fn open(directory: &Path) -> Result<Wal> {
    let day = Duration::from_secs(86_400);
    Ok(Wal::new(&directory.join("log"), "log", WalOptions { retention: day, segment_duration: day })?)
}

fn append(log: &Wal, record: &[u8], durable: bool) -> Result<()> {
    log.append(None, record, NOW_MS, durable)?;
    Ok(())
}
