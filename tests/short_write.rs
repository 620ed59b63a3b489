//! A write to a store's file that fails half way: nothing more is written or called durable, and opening it again finds
//! what was torn.
//!
//! The limit on the size of files is a process's, so that each case runs in a process of its own.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

use std::path::Path;
use std::process::Command;

use towline::target::{BlockId, FixedStore, FixedStoreOptions, ReplicationTarget};
use towline::wal::Record;
use towline::{Error, Lsn, ShardId};

const SHARD: ShardId = ShardId(0);
const CASE: &str = "TOWLINE_SHORT_WRITE";
/// One page of a slot's two, behind the header's page and one whole slot.
const IN_SLOT_1: u64 = 4096 + 8192 + 4096;

/// Limits the size of files of this process, where there is a tool for it.
fn limit(bytes: Option<u64>) {
    let value = bytes.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
    let arguments = ["--pid", &std::process::id().to_string(), &format!("--fsize={value}:")];
    assert!(Command::new("prlimit").args(arguments).status().unwrap().success());
}

/// Runs a test of this file again, in a process that outlives the signal of the limit.
fn alone(case: &str) {
    if Command::new("prlimit").arg("--version").output().is_err() {
        eprintln!("prlimit is missing: not tried");
        return;
    }
    let test = std::env::current_exe().unwrap();
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' XFSZ; exec \"$0\" --exact \"$1\" --nocapture"]).arg(test).arg(case);
    assert!(shell.env(CASE, case).status().unwrap().success(), "{case}");
}

fn is_alone(case: &str) -> bool {
    std::env::var(CASE).is_ok_and(|asked| asked == case)
}

fn options() -> FixedStoreOptions {
    FixedStoreOptions { key_len: 8, value_len: 8_000, shard_count: 1, prefix_bits: 0 }
}

/// Puts a key, as the next record of a log.
fn put(store: &FixedStore, log: &mut Vec<Vec<u8>>, key: u64, value: u8) -> Result<Lsn, Error> {
    let append = |_: ShardId, record: &[u8]| {
        log.push(record.to_vec());
        Ok(Lsn(log.len() as u64))
    };
    store.put(&key.to_be_bytes(), &[value; 8_000], append)
}

fn apply(store: &FixedStore, log: &[Vec<u8>], lsn: u64) -> Result<(), Error> {
    store.apply(SHARD, Record { lsn: Lsn(lsn), bytes: &log[usize::try_from(lsn - 1).unwrap()] }).map(drop)
}

fn is_poisoned<T>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Poisoned { shard: SHARD, .. }))
}

#[test]
fn a_record_that_is_half_written_is_not_applied() {
    if !is_alone("a_record_that_is_half_written_is_not_applied") {
        return alone("a_record_that_is_half_written_is_not_applied");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = FixedStore::open(&path, &options()).unwrap();
    let mut log = Vec::new();
    for key in 0..3 {
        put(&store, &mut log, key, 1).unwrap();
    }
    store.sync(SHARD).unwrap();
    limit(Some(IN_SLOT_1));
    assert!(matches!(put(&store, &mut log, 1, 2), Err(Error::Io { .. })));
    limit(None);
    assert!(is_poisoned(apply(&store, &log, 4)), "the same record is not taken for one that is there");
    assert!(is_poisoned(store.sync(SHARD)));
    assert_eq!(store.touched(SHARD).unwrap(), None, "nobody knows what is in the slot");
    assert!(store.get(&1_u64.to_be_bytes()).is_err());
    assert_eq!(store.durable_applied(SHARD).unwrap(), Some(Lsn(3)));
    assert!(is_poisoned(store.close()));

    let store = FixedStore::open(&path, &options()).unwrap();
    assert_eq!(store.torn_slots(SHARD).unwrap(), 1);
    apply(&store, &log, 4).unwrap();
    assert_eq!(store.get(&1_u64.to_be_bytes()).unwrap(), Some(vec![2; 8_000]));
    store.close().unwrap();
}

/// A store with five slots in use, and the log of that.
fn leader(directory: &Path) -> (FixedStore, Vec<Vec<u8>>) {
    let leader = FixedStore::open(directory.join("leader"), &options()).unwrap();
    let mut log = Vec::new();
    for key in 0..5 {
        put(&leader, &mut log, key, 1).unwrap();
    }
    (leader, log)
}

#[test]
fn a_block_that_is_half_written_completes_no_base() {
    if !is_alone("a_block_that_is_half_written_completes_no_base") {
        return alone("a_block_that_is_half_written_completes_no_base");
    }
    let dir = tempfile::tempdir().unwrap();
    let (leader, log) = leader(dir.path());
    let store = FixedStore::open(dir.path().join("follower"), &options()).unwrap();
    // With it, the slots are mapped.
    apply(&store, &log, 1).unwrap();
    let mut base = leader.open_base(SHARD).unwrap();
    let info = base.info();
    let mut sink = store.begin_base(SHARD, info).unwrap();
    let mut blocks = vec![0; 5 * 8192];
    let run = base.next_run(&mut blocks).unwrap().unwrap();
    limit(Some(IN_SLOT_1));
    let first = BlockId(run.first.0);
    assert!(matches!(sink.put_blocks(first, 8192, &blocks[..run.len]), Err(Error::Io { .. })));
    limit(None);
    assert!(is_poisoned(sink.put_blocks(first, 8192, &blocks[..run.len])));
    assert!(is_poisoned(sink.complete(info.base_lsn)));
}

#[test]
fn a_block_that_is_half_written_where_there_was_nothing_ends_its_base_alone() {
    if !is_alone("a_block_that_is_half_written_where_there_was_nothing_ends_its_base_alone") {
        return alone("a_block_that_is_half_written_where_there_was_nothing_ends_its_base_alone");
    }
    let dir = tempfile::tempdir().unwrap();
    let (leader, _) = leader(dir.path());
    let store = FixedStore::open(dir.path().join("follower"), &options()).unwrap();
    let mut base = leader.open_base(SHARD).unwrap();
    let info = base.info();
    let mut sink = store.begin_base(SHARD, info).unwrap();
    let mut blocks = vec![0; 5 * 8192];
    let run = base.next_run(&mut blocks).unwrap().unwrap();
    let first = BlockId(run.first.0);
    limit(Some(IN_SLOT_1));
    assert!(matches!(sink.put_blocks(first, 8192, &blocks[..run.len]), Err(Error::Io { .. })));
    limit(None);
    assert!(matches!(sink.put_blocks(first, 8192, &blocks[..run.len]), Err(Error::Invalid { .. })));
    assert!(matches!(sink.complete(info.base_lsn), Err(Error::Invalid { .. })));

    let mut sink = store.begin_base(SHARD, info).unwrap();
    sink.put_blocks(first, 8192, &blocks[..run.len]).unwrap();
    sink.complete(info.base_lsn).unwrap();
    assert_eq!(store.get(&4_u64.to_be_bytes()).unwrap(), leader.get(&4_u64.to_be_bytes()).unwrap());
}
