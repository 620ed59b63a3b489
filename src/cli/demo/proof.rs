//! The proof of the demo: followers' files against the leader's, and a target that checks what it is given.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use towline::target::{Entry, FixedStore, FixedStoreReader, ReplicationTarget};
use towline::wal::Record;
use towline::wal::scan::{Relation, compare_logs};
use towline::{Lsn, ShardId};

use super::Stopped;
use crate::cli::{kv, verify};

/// What the proof found of one follower.
pub(super) struct Proof {
    pub(super) received: u64,
    pub(super) durable: u64,
    pub(super) applied: u64,
    pub(super) identical: bool,
    pub(super) in_order: bool,
    pub(super) problem: Option<String>,
}

/// Compares a follower's files with the leader's, and asks its target what it saw.
pub(super) fn prove(directory: &Path, stopped: &Stopped, shards: u16) -> Proof {
    let compared = compare_all_logs(directory, stopped.number, shards);
    Proof {
        received: stopped.received,
        durable: stopped.durable,
        applied: stopped.target.applied(),
        identical: compared.is_ok(),
        in_order: stopped.target.problem().is_none(),
        problem: stopped.target.problem().or(compared.err()),
    }
}

/// Compares every log of a follower with the leader's, byte by byte; an error says where they differ.
pub(super) fn compare_all_logs(directory: &Path, follower: usize, shards: u16) -> Result<(), String> {
    for shard in (0..shards).map(ShardId) {
        let of = |node: &str| directory.join(node).join(towline::types::shard_directory_name(shard));
        let compared = compare_logs(&of("leader"), &of(&format!("follower-{follower}")));
        let comparison = compared.map_err(|error| error.to_string())?;
        if comparison.relation != Relation::Identical {
            return Err(verify::describe(&comparison));
        }
    }
    Ok(())
}

/// Compares a follower's store with the leader's, entry by entry: same slots, LSNs, keys and values, and as far
/// applied. Gives the number of keys; an error says where they differ.
pub(super) fn compare_stores(directory: &Path, follower: usize, shards: u16) -> Result<u64, String> {
    let open = |node: &str| {
        let store = FixedStore::open_read_only(kv::store_path(&directory.join(node)));
        store.map_err(|error| error.to_string())
    };
    let (leader, follower) = (open("leader")?, open(&format!("follower-{follower}"))?);
    for shard in (0..shards).map(ShardId) {
        let applied = |store: &FixedStoreReader| store.durable_applied(shard).map_err(|error| error.to_string());
        let (here, there) = (applied(&leader)?, applied(&follower)?);
        if here != there {
            return Err(format!("shard {shard} is applied up to LSN {here} on the leader and {there} on the follower"));
        }
    }
    let (here, there) = (entries(&leader)?, entries(&follower)?);
    for (a, b) in here.iter().zip(&there) {
        if a != b {
            let (shard, slot) = (a.shard.min(b.shard), a.slot.min(b.slot));
            return Err(format!("the stores differ at slot {slot} of shard {shard}, LSN {} and {}", a.lsn, b.lsn));
        }
    }
    if here.len() != there.len() {
        return Err(format!("the leader has {} keys, the follower {}", here.len(), there.len()));
    }
    Ok(here.len() as u64)
}

/// An entry of a store, with the checksum of its value in the place of the value, which may be long.
#[derive(PartialEq)]
struct Seen {
    shard: ShardId,
    slot: u64,
    lsn: Lsn,
    key: Vec<u8>,
    value_crc: u32,
}

fn entries(store: &FixedStoreReader) -> Result<Vec<Seen>, String> {
    let mut entries = Vec::new();
    let scanned = store.scan(|entry| {
        let Entry { shard, slot, lsn, key, value } = entry;
        entries.push(Seen { shard, slot, lsn, key: key.to_vec(), value_crc: crc32fast::hash(value) });
        ControlFlow::Continue(())
    });
    scanned.map_err(|error| error.to_string())?;
    Ok(entries)
}

/// A target that applies by checking: each shard's records must come once, in order, and with the bytes that their
/// number says.
pub(super) struct Checking {
    /// The LSN applied last, by shard. Written by that shard's applier only.
    applied: Vec<AtomicU64>,
    wrong: parking_lot::Mutex<Option<String>>,
}

impl Checking {
    pub(super) fn new(shards: u16) -> Checking {
        Checking { applied: (0..shards).map(|_| AtomicU64::new(0)).collect(), wrong: parking_lot::Mutex::default() }
    }

    /// The record that `lsn` of `shard` must be: both numbers, then bytes that follow from them.
    pub(super) fn fill(record: &mut [u8], shard: ShardId, lsn: Lsn) {
        for (chunk, word) in record.chunks_mut(8).zip(Checking::words(shard, lsn)) {
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    fn is_filled(record: &[u8], shard: ShardId, lsn: Lsn) -> bool {
        record.chunks(8).zip(Checking::words(shard, lsn)).all(|(chunk, word)| *chunk == word[..chunk.len()])
    }

    fn words(shard: ShardId, lsn: Lsn) -> impl Iterator<Item = [u8; 8]> {
        let first = lsn.get() << 16 | u64::from(shard.get());
        std::iter::successors(Some(first), |word| Some(word.rotate_left(9).wrapping_add(0x9e37_79b9)))
            .map(u64::to_le_bytes)
    }

    fn applied(&self) -> u64 {
        self.applied.iter().map(|applied| applied.load(Ordering::Acquire)).sum()
    }

    fn problem(&self) -> Option<String> {
        self.wrong.lock().clone()
    }
}

impl ReplicationTarget for Checking {
    fn durable_applied(&self, _shard: ShardId) -> towline::Result<Option<Lsn>> {
        Ok(None)
    }

    fn apply(&self, shard: ShardId, record: Record<'_>) -> towline::Result<()> {
        let applied = &self.applied[usize::from(shard.get())];
        let last = applied.load(Ordering::Relaxed);
        if record.lsn != Lsn(last).next() || !Checking::is_filled(record.bytes, shard, record.lsn) {
            let found = format!("shard {shard}: LSN {} came after {last}, or with the wrong bytes", record.lsn);
            self.wrong.lock().get_or_insert(found);
        }
        applied.store(record.lsn.get(), Ordering::Release);
        Ok(())
    }

    fn sync(&self, _shard: ShardId) -> towline::Result<()> {
        Ok(())
    }

    /// It is gone with the process.
    fn needs_durable_log(&self) -> bool {
        false
    }
}
