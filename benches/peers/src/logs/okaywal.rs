//! okaywal 0.3: every commit syncs, and one sync serves many committers. There is no append without it.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use okaywal::{Configuration, Entry, EntryId, LogManager, SegmentReader, WriteAheadLog};

use super::Peer;
use crate::{Result, load};

pub(super) const PEER: Peer = Peer {
    name: "okaywal",
    append: None,
    sync: Some(|directory, record, count| {
        let log = open(directory, Arc::default())?;
        let sample = load::latencies(count, || commit(&log, record, 1));
        log.shutdown()?;
        sample
    }),
    group: Some(|directory, record, threads, each| {
        let log = open(directory, Arc::default())?;
        let sample = load::threads(threads, each, |_| commit(&log, record, 1));
        log.shutdown()?;
        sample
    }),
    recover: Some((
        |directory, record, count| {
            let log = open(directory, Arc::default())?;
            let mut left = count;
            while left > 0 {
                let together = left.min(256);
                commit(&log, record, together)?;
                left -= together;
            }
            Ok(log.shutdown()?)
        },
        |directory, _| {
            let found = Arc::default();
            open(directory, Arc::clone(&found))?.shutdown()?;
            Ok(found.load(Ordering::Relaxed))
        },
    )),
};

/// Counts what is recovered. Never gives anything up: segments are so large that none is full.
#[derive(Debug)]
struct Counting(Arc<AtomicU64>);

impl LogManager for Counting {
    fn recover(&mut self, entry: &mut Entry<'_>) -> io::Result<()> {
        if let Some(chunks) = entry.read_all_chunks()? {
            self.0.fetch_add(chunks.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    fn checkpoint_to(&mut self, _: EntryId, _: &mut SegmentReader, _: &WriteAheadLog) -> io::Result<()> {
        Ok(())
    }
}

fn open(directory: &Path, found: Arc<AtomicU64>) -> Result<WriteAheadLog> {
    let configuration =
        Configuration::default_for(directory.join("log")).preallocate_bytes(64 << 20).checkpoint_after_bytes(8 << 30);
    Ok(configuration.open(Counting(found))?)
}

fn commit(log: &WriteAheadLog, record: &[u8], chunks: u64) -> Result<()> {
    let mut entry = log.begin_entry()?;
    for _ in 0..chunks {
        entry.write_chunk(record)?;
    }
    entry.commit()?;
    Ok(())
}
