//! armdb 0.15: a store of keys and values over an append-only log; each record is the value of a key of its own. One
//! shard, as one log has. What nobody waits for is in the process's buffers until they are flushed to the file, which
//! counts. Its setting `enable_fsync` does nothing to this kind of store: a write waits for the disk only where its
//! batches are synced and have one record.

use std::path::Path;

use armdb::{Config, VarTree};

use super::{Numbers, Peer};
use crate::{Result, load};

pub(super) const PEER: Peer = Peer {
    name: "armdb",
    append: Some(|directory, record, count| {
        let (log, numbers) = (open(directory, false)?, Numbers::default());
        load::rate(count, || {
            (0..count).try_for_each(|_| put(&log, &numbers, record))?;
            Ok(log.flush_buffers()?)
        })
    }),
    sync: Some(|directory, record, count| {
        let (log, numbers) = (open(directory, true)?, Numbers::default());
        load::latencies(count, || put(&log, &numbers, record))
    }),
    group: Some(|directory, record, threads, each| {
        let (log, numbers) = (open(directory, true)?, Numbers::default());
        load::threads(threads, each, |_| put(&log, &numbers, record))
    }),
    recover: Some((
        |directory, record, count| {
            let (log, numbers) = (open(directory, false)?, Numbers::default());
            (0..count).try_for_each(|_| put(&log, &numbers, record))?;
            Ok(log.close()?)
        },
        |directory, _| Ok(open(directory, false)?.len() as u64),
    )),
};

fn open(directory: &Path, sync_each: bool) -> Result<VarTree<[u8; 8]>> {
    let config = Config::balanced().shard_count(1).sync_batch_size(u32::from(sync_each)).build();
    Ok(VarTree::open(directory.join("log"), config)?)
}

fn put(log: &VarTree<[u8; 8]>, numbers: &Numbers, record: &[u8]) -> Result<()> {
    log.put(&numbers.next().to_be_bytes(), record)?;
    Ok(())
}
