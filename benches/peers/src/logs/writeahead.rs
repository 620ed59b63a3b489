//! writeahead 0.4: a thread that writes and syncs for all who wait; they wait for futures, run to their end here by
//! whoever made them. Every write is synced, so there is no append without.

use std::path::Path;

use futures::StreamExt;
use futures::executor::block_on;
use writeahead::{SimpleFile, WriteAhead, WriteAheadOptions};

use super::Peer;
use crate::{Result, load};

pub(super) const PEER: Peer = Peer {
    name: "writeahead",
    append: None,
    sync: Some(|directory, record, count| {
        let writer = open(directory)?.writer()?;
        load::latencies(count, || {
            block_on(writer.write(record.to_vec()))?;
            Ok(())
        })
    }),
    group: Some(|directory, record, threads, each| {
        let writer = open(directory)?.writer()?;
        load::threads(threads, each, |_| {
            block_on(writer.write(record.to_vec()))?;
            Ok(())
        })
    }),
    recover: Some((
        |directory, record, count| {
            let writer = open(directory)?.writer()?;
            let mut left = count;
            while left > 0 {
                let together = left.min((1 << 20) / record.len() as u64).max(1);
                block_on(writer.write_batch(vec![record.to_vec(); usize::try_from(together)?]))?;
                left -= together;
            }
            Ok(())
        },
        |directory, _| {
            let log = open(directory)?;
            let mut records = log.create_stream()?;
            block_on(async {
                let mut found = 0;
                while let Some(record) = records.next().await {
                    record?;
                    found += 1;
                }
                Ok(found)
            })
        },
    )),
};

fn open(directory: &Path) -> Result<WriteAhead<SimpleFile>> {
    let log_dir = directory.join("log");
    std::fs::create_dir_all(&log_dir)?;
    let mut log = WriteAhead::<SimpleFile>::with_options(WriteAheadOptions { log_dir, ..Default::default() });
    log.start()?;
    Ok(log)
}
