//! A log that may not grow: it stays within its bound although nothing of it is ever synced.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use common::{PATIENCE, SEGMENT, until};
use towline::target::LogOnly;
use towline::wal::{LogWriter, SyncPolicy, WalOptions};
use towline::{Commit, Error, Follower, Leader, Lsn, Node, NodeId, Outcome, ShardId};

const BOUND: u64 = 16 * SEGMENT;
const SHARD: ShardId = ShardId(0);

/// A leader that syncs only when somebody waits for it.
fn lead(directory: &Path) -> Leader {
    let wal = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
    Node::builder(directory)
        .segment_size(SEGMENT)
        .max_wal_bytes(BOUND)
        .min_wal_bytes(0)
        .wal(wal)
        .lead("127.0.0.1:0")
        .unwrap()
}

fn follow(leader: &Leader, directory: &Path) -> Follower {
    let builder = Node::builder(directory).node_id(NodeId(2)).max_wal_bytes(BOUND);
    builder.follow(leader.local_address(), Arc::new(LogOnly)).unwrap()
}

fn append_segments(writer: &mut LogWriter, segments: u64) -> Lsn {
    (0..segments * SEGMENT / 4096).map(|_| writer.append(&[7; 4096]).unwrap()).last().unwrap()
}

/// Bytes of everything in the shard's directory.
fn bytes_in(directory: &Path) -> u64 {
    let files = directory.join("shard-0000").read_dir().unwrap();
    // A file may be renamed or removed between listing and looking.
    files.filter_map(|file| file.ok()?.metadata().ok()).map(|metadata| metadata.len()).sum()
}

#[test]
fn a_log_that_nobody_syncs_stays_within_its_bound() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("leader");
    let leader = lead(&path);
    let mut writer = leader.writer(SHARD).unwrap();
    let follower = follow(&leader, &directory.path().join("follower"));
    let first = append_segments(&mut writer, 1);
    let received =
        leader.wait(SHARD, first, "received:1".parse::<Commit>().unwrap(), Instant::now().checked_add(PATIENCE));
    assert_eq!(received.unwrap(), Outcome::Committed);
    follower.shutdown().unwrap();
    let log = Arc::clone(leader.log(SHARD).unwrap());
    let synced = log.synced().load();
    for _ in 0..30 {
        append_segments(&mut writer, 4);
        // Open segment, spares and what is set aside are within the bound.
        until("keeping within the bound", || bytes_in(&path) <= BOUND);
    }
    assert!(log.tail() > first, "what the follower needs is gone");
    assert_eq!(log.synced().load(), synced, "nothing was synced for that");
    until("losing its place", || leader.status().shards[0].followers[0].place_lost);

    // Whoever waits for what is gone unsynced learns that it is; and what is left opens again.
    assert!(matches!(log.wait_synced(first, None), Err(Error::NotRetained { .. })));
    assert_eq!(leader.wait(SHARD, first, Commit::SYNCED, None).unwrap(), Outcome::GivenUp);
    let head = append_segments(&mut writer, 1);
    let tail = log.tail();
    drop(writer);
    drop(log);
    leader.shutdown().unwrap();
    let leader = lead(&path);
    let log = leader.log(SHARD).unwrap();
    assert_eq!(log.head(), head);
    assert!(log.tail() >= tail);
}
