//! Keys and values: the fixed store of a node, and the way of changes into it.
//!
//! A node's store is in `store` within its data directory. What it was made for stands in its files, so whoever finds
//! one there opens it as it is.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use towline::data_dir::{DataDir, STORE};
use towline::target::{FixedStore, FixedStoreOptions, FixedStoreReader, ReplicationTarget};
use towline::wal::LogWriter;
use towline::{Error, Lsn, ShardId, ShutdownSignal, Until, WaitStrategy, Watermark, wait_any};

use super::input::{Appender, append_in_batches};
pub(super) use super::lines::Shape;
use super::lines::split;

/// Where a node's store is.
pub(super) fn store_path(directory: &Path) -> PathBuf {
    directory.join(STORE)
}

/// Opens a node's store for looking at it; `None` if it has none.
pub(super) fn look_at_store(directory: &Path) -> towline::Result<Option<FixedStoreReader>> {
    match FixedStore::open_read_only(store_path(directory)) {
        Ok(reader) => Ok(Some(reader)),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What is wrong with a directory that has no store to look at.
pub(super) fn no_store(directory: &Path) -> String {
    format!("{} holds no store; a node has one if its leader was started with --kv", directory.display())
}

/// Opens the store that a node has already; `None` if it has none.
pub(super) fn open_existing(directory: &Path) -> towline::Result<Option<Arc<FixedStore>>> {
    let Some(reader) = look_at_store(directory)? else { return Ok(None) };
    let topology = reader.topology();
    let options = FixedStoreOptions {
        key_len: topology.key_len,
        value_len: topology.value_len,
        shard_count: reader.router().shard_count(),
        prefix_bits: topology.prefix_bits,
    };
    Ok(Some(Arc::new(FixedStore::open(store_path(directory), &options)?)))
}

/// Opens a leader's store: makes it for `shape` if it is not there; if it is, it must have been made for that.
pub(super) fn open_as_leader(
    directory: &Path,
    shape: Option<Shape>,
    prefix_bits: u8,
    shards: Option<u16>,
) -> towline::Result<Option<Arc<FixedStore>>> {
    let Some(Shape { key_len, value_len }) = shape else { return open_existing(directory) };
    let shard_count = match DataDir::read_manifest(directory) {
        Ok(manifest) => manifest.shard_count,
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            shards.unwrap_or(1_u16.checked_shl(prefix_bits.into()).unwrap_or(0))
        }
        Err(error) => return Err(error),
    };
    let options = FixedStoreOptions { key_len, value_len, shard_count, prefix_bits };
    Ok(Some(Arc::new(FixedStore::open(store_path(directory), &options)?)))
}

/// The store, for a line that says what a node does.
pub(super) fn describe(store: Option<&FixedStore>) -> String {
    let Some(store) = store else { return String::new() };
    let shape = store.topology();
    format!(", keys of up to {} and values of up to {} bytes", shape.key_len, shape.value_len)
}

/// Closes a store in order, now that its node has stopped.
pub(super) fn close(store: Option<Arc<FixedStore>>) -> towline::Result<()> {
    store.and_then(Arc::into_inner).map_or(Ok(()), FixedStore::close)
}

/// Records that a shard's applier may lag behind before more are appended: what is proposed and not applied is kept in
/// memory.
const MOST_PROPOSED: u64 = 64 * 1024;

/// Puts and deletes through the log of a leader whose own target is the store. Changes are proposed one by one and
/// appended together, so that a batch carries many.
pub(super) struct KvWriter<'a> {
    store: Arc<FixedStore>,
    shards: Vec<KvShard<'a>>,
    /// Deletes of keys that were not there: they need no record.
    pub(super) idle_deletes: u64,
    /// The longest that appending what was proposed for one shard has taken.
    pub(super) longest_append: Duration,
    /// The longest that was waited for the store, which is applied no further behind than is kept in memory.
    pub(super) longest_wait: Duration,
}

struct KvShard<'a> {
    writer: LogWriter,
    applied: &'a Watermark,
    /// Proposed and not appended yet.
    staged: Vec<Vec<u8>>,
}

impl<'a> KvWriter<'a> {
    /// Takes the leader's writers, and waits until its store has applied all of the log.
    ///
    /// # Errors
    ///
    /// What ended applying; [`Error::ShutDown`] if `stop` is given meanwhile.
    pub(super) fn new(
        leader: &'a towline::Leader,
        store: Arc<FixedStore>,
        stop: &ShutdownSignal,
    ) -> towline::Result<KvWriter<'a>> {
        let mut shards = Vec::new();
        for shard in (0..leader.shard_count()).map(ShardId) {
            let missing = || Error::Invalid { reason: "the leader has no target".into() };
            let applied = leader.applied(shard)?.ok_or_else(missing)?;
            let log = leader.log(shard)?;
            let replayed = Until { mark: applied, at_least: log.head() };
            wait_any(&[replayed, log.until_ended(), stop.until()], WaitStrategy::Park, None);
            if stop.is_shutdown() {
                return Err(Error::ShutDown);
            }
            if !replayed.holds() {
                return Err(log.end_reason());
            }
            shards.push(KvShard { writer: leader.writer(shard)?, applied, staged: Vec::new() });
        }
        // Nothing of an earlier leadership counts: what it proposed is in the log and applied, or it is nowhere.
        store.abandon_proposals()?;
        let (longest_append, longest_wait) = (Duration::ZERO, Duration::ZERO);
        Ok(KvWriter { store, shards, idle_deletes: 0, longest_append, longest_wait })
    }

    fn shape(&self) -> Shape {
        let topology = self.store.topology();
        Shape { key_len: topology.key_len, value_len: topology.value_len }
    }

    /// Proposes to set a key's value, or to delete the key.
    pub(super) fn propose(&mut self, key: &[u8], value: Option<&[u8]>) -> towline::Result<()> {
        let shards = &mut self.shards;
        let stage = |shard: ShardId, record: &[u8]| {
            let shard = &mut shards[usize::from(shard.get())];
            shard.staged.push(record.to_vec());
            Ok(Lsn(shard.writer.end().head.get() + shard.staged.len() as u64))
        };
        match value {
            Some(value) => self.store.propose_put(key, value, stage).map(drop),
            None => {
                let idle = self.store.propose_delete(key, stage)?.is_none();
                self.idle_deletes += u64::from(idle);
                Ok(())
            }
        }
    }

    /// Appends what was proposed. After an error this writer is of no use any more.
    pub(super) fn flush(&mut self) -> towline::Result<()> {
        for shard in &mut self.shards {
            let log = Arc::clone(shard.writer.log());
            let lagging = Lsn(log.head().get().saturating_sub(MOST_PROPOSED));
            let near = Until { mark: shard.applied, at_least: lagging };
            let began = Instant::now();
            wait_any(&[near, log.until_ended()], WaitStrategy::Park, None);
            let waited = Instant::now();
            self.longest_wait = self.longest_wait.max(waited - began);
            let appended = append_in_batches(&mut shard.writer, &shard.staged);
            self.longest_append = self.longest_append.max(waited.elapsed());
            if let Err(error) = appended {
                // The LSNs that the rest was promised will never be, or will be others'.
                self.store.abandon_proposals()?;
                return Err(error);
            }
            shard.staged.clear();
        }
        Ok(())
    }
}

/// Each line is a key, a tab and the value; a key alone deletes it.
impl Appender for KvWriter<'_> {
    fn longest(&self) -> usize {
        self.shape().longest()
    }

    fn check(&self, line: &[u8]) -> Result<(), String> {
        self.shape().check(line)
    }

    fn append(&mut self, lines: &[&[u8]]) -> towline::Result<()> {
        let proposed = lines.iter().map(|line| split(line)).try_for_each(|(key, value)| self.propose(key, value));
        // What was proposed before a failure has its LSNs: it is appended all the same.
        self.flush().and(proposed)
    }
}
