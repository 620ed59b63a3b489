//! What the integration tests share: transports to run a scenario over, records that say where they belong, a target
//! that checks what it is given, and waiting that ends with a message instead of hanging.

#![allow(dead_code, reason = "each test binary uses a part of this")]

pub mod json;
pub mod net;
#[cfg(feature = "cli")]
pub mod process;
pub mod proxy;
pub mod random;
pub mod raw;
#[cfg(all(unix, feature = "cli"))]
pub mod roles;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tempfile::TempDir;
use towline::target::ReplicationTarget;
use towline::types::shard_directory_name;
use towline::wal::scan::{Comparison, Relation, Visit, compare_logs, verify_log};
use towline::wal::{Batch, KnownSynced, LogWriter, Record};
use towline::{Follower, Leader, Lsn, NodeBuilder, ShardId, Until, WaitStrategy, Waited, Watermark, wait_any};

/// How long anything may take before a test fails. Nothing waits this long unless something is wrong.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The smallest segments, so that a few hundred records fill several.
pub const SEGMENT: u64 = 64 * 1024;

/// Fails unless a sentence has every one of the words.
pub fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is missing: {text}");
    }
}

/// A place for two nodes, and where each of them goes.
pub fn directories() -> (TempDir, PathBuf, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let (a, b) = (parent.path().join("a"), parent.path().join("b"));
    (parent, a, b)
}

/// Copies a stopped node's directory, with all that is in it.
pub fn copy_directory(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_directory(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// When patience ends, from now.
pub fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

/// Waits for a mark, or fails.
pub fn reach(mark: &Watermark, at_least: Lsn, what: &str) {
    let waited = wait_any(&[Until { mark, at_least }], WaitStrategy::Park, Some(deadline()));
    assert_eq!(waited, Waited::Reached(0), "{what}: at {} after {PATIENCE:?}, due {at_least}", mark.load());
}

/// Waits for a condition that has no mark, or fails. For states that are only told by asking.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = deadline();
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The record that belongs at an LSN of a shard: it names both, and its length varies.
pub fn record(shard: ShardId, lsn: Lsn) -> Vec<u8> {
    let mut bytes = format!("shard {shard} record {lsn} ").into_bytes();
    let filler = lsn.get() * 37 % 300;
    bytes.extend((0..filler).map(|at| b'a' + u8::try_from((at + lsn.get()) % 26).unwrap()));
    bytes
}

/// Appends `count` records, one by one and in batches by turns, and returns the last LSN.
pub fn append(writer: &mut LogWriter, count: u64) -> Lsn {
    let shard = writer.log().shard();
    let last = Lsn(writer.end().head.get() + count);
    let mut next = writer.end().head.next();
    while next <= last {
        let together = if next.get().is_multiple_of(3) { (last.get() - next.get() + 1).min(5) } else { 1 };
        let records: Vec<_> = (0..together).map(|more| record(shard, Lsn(next.get() + more))).collect();
        let appended = match records.as_slice() {
            [one] => writer.append(one).unwrap(),
            many => writer.append_batch(many).unwrap(),
        };
        assert_eq!(appended, Lsn(next.get() + together - 1));
        next = appended.next();
    }
    last
}

/// All shards of a node.
pub fn shards(count: u16) -> impl Iterator<Item = ShardId> + Clone {
    (0..count).map(ShardId)
}

/// Every writer of a leader.
pub fn writers(leader: &Leader) -> Vec<LogWriter> {
    shards(leader.shard_count()).map(|shard| leader.writer(shard).unwrap()).collect()
}

/// Waits until a follower has everything that its leader has now: received, applied and synced.
pub fn catch_up(leader: &Leader, follower: &Follower) {
    for shard in shards(leader.shard_count()) {
        let head = leader.log(shard).unwrap().head();
        reach(follower.applied(shard).unwrap(), head, &format!("applying shard {shard}"));
        follower.log(shard).unwrap().wait_synced(head, Some(deadline())).unwrap();
    }
}

/// How two nodes' logs of a shard stand to each other.
pub fn compare(a: &Path, b: &Path, shard: ShardId) -> Comparison {
    let of = |node: &Path| node.join(shard_directory_name(shard));
    compare_logs(&of(a), &of(b)).unwrap()
}

/// Fails unless the logs of two stopped nodes are the same bytes, sound, and `records` records long in each shard.
pub fn assert_identical(a: &Path, b: &Path, heads: &[u64]) {
    for (&head, shard) in heads.iter().zip(0..) {
        let comparison = compare(a, b, ShardId(shard));
        assert_eq!(comparison.relation, Relation::Identical, "shard {shard}: {comparison:?}");
        assert_eq!((comparison.a.head, comparison.a.problems), (Lsn(head), 0), "shard {shard}");
        assert_eq!((comparison.b.head, comparison.b.problems), (Lsn(head), 0), "shard {shard}");
    }
}

/// Every record in a stopped node's log of a shard, by LSN; fails if there is damage.
pub fn records_of(node: &Path, shard: ShardId) -> BTreeMap<u64, Vec<u8>> {
    let (records, report) = readable_records_of(node, shard);
    assert!(report.is_sound(), "{:?}", report.problems);
    records
}

/// The same of a log that a process was killed over, which may end in a torn tail.
pub fn readable_records_of(node: &Path, shard: ShardId) -> (BTreeMap<u64, Vec<u8>>, towline::wal::scan::LogReport) {
    struct Gather(BTreeMap<u64, Vec<u8>>);
    impl Visit for Gather {
        fn batch(&mut self, path: &Path, offset: u64, batch: Batch<'_>) {
            for record in batch.records() {
                let before = self.0.insert(record.lsn.get(), record.bytes.to_vec());
                assert!(before.is_none(), "LSN {} stands twice: {} at {offset}", record.lsn, path.display());
            }
        }
    }
    let mut gather = Gather(BTreeMap::new());
    let report =
        verify_log(&node.join(shard_directory_name(shard)), None, KnownSynced::default(), &mut gather).unwrap();
    (gather.0, report)
}

/// Settings that make a scenario quick: small segments and short waits before trying again.
pub fn quick(builder: NodeBuilder) -> NodeBuilder {
    builder.reconnect(Duration::from_millis(5), Duration::from_millis(50))
}

/// A target that keeps nothing but checks everything: each shard's records come in order, without gaps, and with the
/// bytes that [`record`] says. It outlives the followers it is given to, as a state on disk would.
pub struct Checked {
    shards: Vec<Mutex<Seen>>,
    /// Whether it tells the node how far it is, as a target with a position of its own does.
    tells: bool,
    /// Whether it asks for records that are durable in the log, as a target that overwrites in place does.
    durable_first: bool,
}

#[derive(Default)]
struct Seen {
    last: Lsn,
    /// Records given although they had been applied before.
    again: u64,
    wrong: Option<String>,
}

impl Checked {
    /// A target that knows how far it is.
    pub fn new(shards: u16) -> Arc<Checked> {
        Arc::new(Checked::with(shards, true, false))
    }

    fn with(shards: u16, tells: bool, durable_first: bool) -> Checked {
        Checked { shards: (0..shards).map(|_| Mutex::default()).collect(), tells, durable_first }
    }

    /// A target that overwrites in place.
    pub fn in_place(shards: u16) -> Arc<Checked> {
        Arc::new(Checked::with(shards, true, true))
    }

    /// A target that leaves it to the node's checkpoint.
    pub fn forgetful(shards: u16) -> Arc<Checked> {
        Arc::new(Checked::with(shards, false, false))
    }

    pub fn last(&self, shard: ShardId) -> Lsn {
        self.shards[usize::from(shard.0)].lock().last
    }

    /// How many records came although they had been applied.
    pub fn again(&self) -> u64 {
        self.shards.iter().map(|seen| seen.lock().again).sum()
    }

    /// Fails if anything was wrong with what came, or if it was not as many records as `heads` says.
    pub fn assert_saw(&self, heads: &[u64]) {
        for (seen, &head) in self.shards.iter().zip(heads) {
            let seen = seen.lock();
            assert_eq!(seen.wrong, None);
            assert_eq!(seen.last, Lsn(head));
        }
    }
}

impl ReplicationTarget for Checked {
    fn durable_applied(&self, shard: ShardId) -> towline::Result<Option<Lsn>> {
        Ok(self.tells.then(|| self.last(shard)))
    }

    fn apply(&self, shard: ShardId, found: Record<'_>) -> towline::Result<()> {
        let mut seen = self.shards[usize::from(shard.0)].lock();
        if found.bytes != record(shard, found.lsn) {
            seen.wrong.get_or_insert(format!("shard {shard}: LSN {} has the wrong bytes", found.lsn));
        }
        if found.lsn <= seen.last {
            seen.again += 1;
            return Ok(());
        }
        if found.lsn != seen.last.next() {
            let gap = format!("shard {shard}: LSN {} came after {}", found.lsn, seen.last);
            seen.wrong.get_or_insert(gap);
        }
        seen.last = found.lsn;
        Ok(())
    }

    fn sync(&self, _shard: ShardId) -> towline::Result<()> {
        Ok(())
    }

    fn needs_durable_log(&self) -> bool {
        self.durable_first
    }
}
