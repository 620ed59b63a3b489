//! commitlog 0.2: segments and an index. Its `flush` issues no sync, so it takes no part where records must be durable,
//! and it keeps a checksum of each message that it checks when told to.

use std::path::Path;

use commitlog::message::{MessageBuf, MessageSet};
use commitlog::{CommitLog, LogOptions, ReadLimit};

use super::Peer;
use crate::{Result, load};

/// Bytes asked for at a time when a log is read back.
const READ: usize = 1 << 20;

pub(super) const PEER: Peer = Peer {
    name: "commitlog",
    append: Some(|directory, record, count| {
        let mut log = open(directory)?;
        load::rate(count, || (0..count).try_for_each(|_| append(&mut log, record)))
    }),
    sync: None,
    group: None,
    recover: Some((
        |directory, record, count| {
            let mut log = open(directory)?;
            (0..count).try_for_each(|_| append(&mut log, record))?;
            Ok(log.flush()?)
        },
        |directory, _| {
            let log = open(directory)?;
            let mut next = 0;
            loop {
                let messages: MessageBuf = log.read(next, ReadLimit::max_bytes(READ))?;
                if !messages.iter().all(|message| message.verify_hash()) {
                    return Err("a message is damaged".into());
                }
                match messages.iter().last() {
                    Some(last) => next = last.offset() + 1,
                    None => return Ok(next),
                }
            }
        },
    )),
};

fn open(directory: &Path) -> Result<CommitLog> {
    let mut options = LogOptions::new(directory.join("log"));
    options.segment_max_bytes(256 << 20).index_max_items(10_000_000).message_max_bytes(2 << 20);
    Ok(CommitLog::new(options)?)
}

fn append(log: &mut CommitLog, record: &[u8]) -> Result<()> {
    log.append_msg(record)?;
    Ok(())
}
