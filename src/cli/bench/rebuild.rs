//! A follower that has lost its place: it gets the leader's base, and the log beside it, into an empty directory.
//!
//! The leader keeps a store whose blocks are of the record size, and has given up the log that the follower would need.
//! Under load, another thread changes blocks all the time, as fast as the leader takes it.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use towline::rebuild::RebuildPhase;
use towline::target::{FixedStore, FixedStoreOptions, ReplicationTarget};
use towline::{Leader, Lsn, Node, NodeId, ShardId, Until, WaitStrategy, Waited, wait_any};

use super::limits::{self, MappedFile};
use super::recover::rate;
use super::report::{Contest, Sample, Unit};
use super::{Bench, Result, Scratch, streams};
use crate::cli::kv::KvWriter;

const SHARD: ShardId = ShardId(0);
const KEY_LEN: u32 = 16;
/// Bytes of a block beside its value: header and key.
const BLOCK_OVERHEAD: u64 = 24 + KEY_LEN as u64;
/// Changes proposed before they are appended.
const TOGETHER: u64 = 64;
const PATIENCE: Duration = Duration::from_secs(300);

const COPY: &str = "mapped file to socket to file";
const SYNCED: &str = "mapped file to socket to file, synced";
const WITHOUT: &str = "puts without a rebuild";
const LOADED: &str = "mapped file to socket to file, synced, beside an append";

pub(super) fn run(bench: &Bench) -> Result<()> {
    for size in bench.record_sizes(&[4096]) {
        let block_len = size.max(2 * BLOCK_OVERHEAD).next_multiple_of(8);
        let blocks = bench.volume(1 << 30, 32 << 20) / block_len;
        let bytes = blocks * block_len;
        let scratch = bench.scratch("rebuild")?;
        let stage = Stage::new(bench, &scratch, block_len, blocks)?;
        let mut writer = stage.fill()?;
        let len = usize::try_from(bytes)?;
        let mut from = MappedFile::zeroed_in_pages(&scratch.path().join("from"), len)?;
        from.make_writable();
        let mut beside = MappedFile::zeroed_in_pages(&scratch.path().join("beside"), 16 << 20)?;
        let value = super::record(block_len - BLOCK_OVERHEAD);
        let copy = |synced: bool| -> Result<Sample> {
            let path = scratch.path().join("to");
            let mut file = File::create(&path)?;
            let began = Instant::now();
            streams::stream_to_file(&[from.bytes()], &mut file)?;
            if synced {
                file.sync_data()?;
            }
            let sample = rate(bytes, began);
            std::fs::remove_file(path)?;
            Ok(sample)
        };
        Contest::new("rebuild", block_len, Unit::MegabytesPerSecond)
            .bare(COPY, || copy(false))
            .bare(SYNCED, || copy(true))
            .ours("idle leader", &[COPY, SYNCED], || stage.rebuild(bytes, &AtomicBool::new(false)))
            .bare(LOADED, || {
                beside.make_writable();
                let append = |over: &AtomicBool| {
                    while !over.load(Ordering::Relaxed) {
                        limits::append(beside.bytes_mut(), &value, TOGETHER);
                    }
                    Ok(())
                };
                Ok(while_running(append, |_| copy(true))?.0)
            })
            .ours("leader under load", &[LOADED], || {
                stage.settle()?;
                let load = |over: &AtomicBool| stage.put_until(&mut writer, over);
                let (sample, puts) = while_running(load, |over| stage.rebuild(bytes, over))?;
                Ok(sample.with("puts_per_second", Some(puts)))
            })
            .run(bench)?;
        let alone_for = Duration::from_millis(if bench.quick { 150 } else { 2000 });
        let mut puts_beside = |work: &dyn Fn(&AtomicBool) -> Result<()>| -> Result<Sample> {
            stage.settle()?;
            let load = |over: &AtomicBool| stage.put_until(&mut writer, over);
            let ((), puts) = while_running(load, work)?;
            Ok(Sample::new(puts))
        };
        // Both entrants need the one writer.
        let puts_beside = std::cell::RefCell::new(&mut puts_beside);
        Contest::new("rebuild", block_len, Unit::RecordsPerSecond)
            .among_ours()
            .bare(WITHOUT, || {
                puts_beside.borrow_mut()(&|_| {
                    std::thread::sleep(alone_for);
                    Ok(())
                })
            })
            .ours("puts during a rebuild", &[WITHOUT], || {
                puts_beside.borrow_mut()(&|over| stage.rebuild(bytes, over).map(drop))
            })
            .run(bench)?;
    }
    Ok(())
}

/// Runs `load` on another thread until `work` says that it is over, or is done. Gives what came of both.
fn while_running<T, L: Send>(
    load: impl FnOnce(&AtomicBool) -> Result<L> + Send,
    work: impl FnOnce(&AtomicBool) -> Result<T>,
) -> Result<(T, L)> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loading = scope.spawn(|| load(&over));
        let done = work(&over);
        over.store(true, Ordering::Relaxed);
        let loaded = loading.join().map_err(|_| "the load panicked")?;
        Ok((done?, loaded?))
    })
}

/// A leader with a store.
struct Stage<'a> {
    bench: &'a Bench,
    leader: Leader,
    store: Arc<FixedStore>,
    options: FixedStoreOptions,
    blocks: u64,
    value: Vec<u8>,
    next_node: std::sync::atomic::AtomicU64,
}

impl<'a> Stage<'a> {
    fn new(bench: &'a Bench, scratch: &Scratch, block_len: u64, blocks: u64) -> Result<Stage<'a>> {
        let value_len = u32::try_from(block_len - BLOCK_OVERHEAD)?;
        let options = FixedStoreOptions { key_len: KEY_LEN, value_len, shard_count: 1, prefix_bits: 0 };
        let directory = scratch.path().join("leader");
        let store = Arc::new(FixedStore::open(directory.join("store"), &options)?);
        let leader = Node::builder(directory)
            // More than one, so that there is log to give up.
            .segment_size((blocks * block_len / 8).next_power_of_two().clamp(1 << 20, 16 << 20))
            .max_wal_bytes(None)
            .target(Arc::clone(&store) as Arc<dyn ReplicationTarget>)
            .lead("127.0.0.1:0")?;
        let value = super::record(u64::from(value_len));
        Ok(Stage { bench, leader, store, options, blocks, value, next_node: 1.into() })
    }

    /// Puts every block once. Gives the writer that did it.
    fn fill(&self) -> Result<KvWriter<'_>> {
        let stop = self.bench.stop.clone().unwrap_or_default();
        let mut writer = KvWriter::new(&self.leader, Arc::clone(&self.store), &stop)?;
        for block in 0..self.blocks {
            writer.propose(&key(block), Some(&self.value))?;
            if block % TOGETHER == 0 {
                writer.flush()?;
            }
        }
        writer.flush()?;
        self.settle()?;
        Ok(writer)
    }

    /// Changes blocks all over the store until told to end. Gives how many a second.
    fn put_until(&self, writer: &mut KvWriter<'_>, over: &AtomicBool) -> Result<f64> {
        let began = Instant::now();
        let mut puts = 0_u64;
        while !over.load(Ordering::Relaxed) {
            for _ in 0..TOGETHER {
                writer.propose(&key(puts * 7_368_787 % self.blocks), Some(&self.value))?;
                puts += 1;
            }
            writer.flush()?;
        }
        Ok(puts as f64 / began.elapsed().as_secs_f64())
    }

    /// Waits until the leader's own store has everything, syncs, and gives up all log that may go: whoever comes now has
    /// to be rebuilt.
    fn settle(&self) -> Result<()> {
        let log = self.leader.log(SHARD)?;
        let head = log.head();
        let applied = self.leader.applied(SHARD)?.ok_or("the leader has no target")?;
        wait_until(Until { mark: applied, at_least: head }, "the leader's store")?;
        log.wait_synced(head, None)?;
        self.store.sync(SHARD)?;
        log.release_through(head, "the benchmark gives it up")?;
        Ok(())
    }

    /// A new follower, from nothing until it serves what the leader had when it came: then it is `over`.
    fn rebuild(&self, bytes: u64, over: &AtomicBool) -> Result<Sample> {
        let scratch = self.bench.scratch("rebuilt")?;
        let node = NodeId(self.next_node.fetch_add(1, Ordering::Relaxed));
        let head = self.leader.log(SHARD)?.head();
        let began = Instant::now();
        let store = Arc::new(FixedStore::open(scratch.path().join("store"), &self.options)?);
        let follower = Node::builder(scratch.path())
            .node_id(node)
            .max_wal_bytes(None)
            .follow(self.leader.local_address(), Arc::clone(&store) as Arc<dyn ReplicationTarget>)?;
        wait_until(Until { mark: follower.applied(SHARD)?, at_least: head.max(Lsn::FIRST) }, "the follower's store")?;
        let sample = rate(bytes, began);
        over.store(true, Ordering::Relaxed);
        let progress = follower.rebuild_progress(SHARD)?;
        if progress.phase != RebuildPhase::Completed {
            return Err(format!("the follower was not rebuilt: {progress:?}").into());
        }
        follower.shutdown()?;
        self.leader.forget_follower(node)?;
        Ok(sample)
    }
}

fn key(block: u64) -> [u8; KEY_LEN as usize] {
    let mut key = [0; KEY_LEN as usize];
    key[..8].copy_from_slice(&block.to_be_bytes());
    key
}

fn wait_until(reached: Until<'_>, what: &str) -> Result<()> {
    if wait_any(&[reached], WaitStrategy::Park, Some(Instant::now() + PATIENCE)) == Waited::TimedOut {
        return Err(format!("{what} did not apply LSN {} in time", reached.at_least).into());
    }
    Ok(())
}
