//! A follower that has lost its place: it gets the leader's base, and the log beside it, into an empty directory.
//!
//! The leader keeps a store whose blocks are of the record size, and has given up the log that the follower would need.
//! Under load, another thread changes blocks all the time, as fast as the leader takes it: then rebuild, log and load
//! share the processors of both nodes, and the bare programs say how much of the rest is ours. Under a steady load the
//! leader has something to spare.

use std::cell::RefCell;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use towline::rebuild::RebuildPhase;
use towline::target::{FixedStore, FixedStoreOptions, ReplicationTarget};
use towline::{Follower, Leader, Lsn, Node, NodeId, ShardId, Until, WaitStrategy, Waited, wait_any};

use super::limits::{self, MappedFile};
use super::log_lane::{Load, LogLane, Pace, Stores};
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
const LOADED: &str = "mapped file to socket to file, synced, beside an append";
const STREAMED: &str = "mapped file to socket to file, synced, beside a streamed append";
const APPLIED: &str = "mapped file to socket to file, synced, beside an append streamed, synced and applied";
const KEPT: &str =
    "mapped file to socket to file, synced, beside an append into kept logs, streamed, synced and applied";
const STEADY_STREAMED: &str = "mapped file to socket to file, synced, beside a steady streamed append";
const STEADY_APPLIED: &str =
    "mapped file to socket to file, synced, beside a steady append streamed, synced and applied";
const UNDER_LOAD: &str = "leader under load";
const UNDER_STEADY_LOAD: &str = "leader under a steady load";
const WITHOUT: &str = "puts without a rebuild";
const FOLLOWED: &str = "puts that a follower receives";
const STEADY_FOLLOWED: &str = "steady puts that a follower receives";

/// Bytes of the steady load in a second: what the leader can do several times over.
const STEADY_BYTES: u64 = 20_000 * 4096;

pub(super) fn run(bench: &Bench) -> Result<()> {
    for size in bench.record_sizes(&[4096]) {
        let block_len = size.max(2 * BLOCK_OVERHEAD).next_multiple_of(8);
        let blocks = bench.volume(1 << 30, 32 << 20) / block_len;
        let scratch = bench.scratch("rebuild")?;
        let stage = Stage::new(bench, &scratch, block_len, blocks)?;
        let writer = RefCell::new(stage.fill()?);
        let mut bare = Bare::new(&scratch, block_len, blocks)?;
        compare_rebuilds(bench, &stage, &writer, &mut bare)?;
        compare_puts(bench, &stage, &writer)?;
    }
    Ok(())
}

fn compare_rebuilds(bench: &Bench, stage: &Stage<'_>, writer: &RefCell<KvWriter<'_>>, bare: &mut Bare) -> Result<()> {
    let Bare { from, from_file, beside, lane, scratch, bytes, record } = bare;
    let (bytes, steady) = (*bytes, Some(stage.steady_rate()));
    let copy = |synced: bool| -> Result<Sample> {
        let path = scratch.join("to");
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
    let beside_lane = |per_second: Option<u64>, is_applied: bool, is_kept: bool| -> Result<Sample> {
        let path = scratch.join("to");
        let mut file = File::create(&path)?;
        // Of its own position: elsewhere than on Unix, writing somewhere moves it.
        let far = File::options().write(true).open(&path)?;
        let stores = is_applied.then_some(Stores { near: from_file, far: &far });
        let beside = lane.beside(Load { per_second, stores, is_kept }, || {
            streams::stream_to_file(&[from.bytes()], &mut file)?;
            file.sync_data()
        })?;
        std::fs::remove_file(path)?;
        let seconds = beside.took.as_secs_f64();
        Ok(Sample::new(bytes as f64 / 1e6 / seconds)
            .with("puts_per_second", Some(beside.appended as f64 / seconds))
            .with("records_behind", Some(beside.behind as f64)))
    };
    let under_load = |per_second: Option<u64>| -> Result<Sample> {
        stage.settle()?;
        let mut writer = writer.borrow_mut();
        let writer = &mut *writer;
        let load = |over: &AtomicBool| stage.put_until(writer, per_second, over);
        let (sample, puts) = while_running(load, |over| stage.rebuild(bytes, over))?;
        Ok(sample.with("puts_per_second", Some(puts)))
    };
    let contest = Contest::new("rebuild", stage.block_len(), Unit::MegabytesPerSecond)
        // The base, and the beginning of what the load appends at both ends.
        .with_memory_in_use(2 * bytes)
        .bare(COPY, || copy(false))
        .bare(SYNCED, || copy(true))
        .ours("idle leader", &[COPY, SYNCED], || stage.rebuild(bytes, &AtomicBool::new(false)))
        .bare(APPLIED, || beside_lane(None, true, false))
        .bare(KEPT, || beside_lane(None, true, true))
        .ours(UNDER_LOAD, &[APPLIED, KEPT], || under_load(None))
        .bare(STEADY_APPLIED, || beside_lane(steady, true, false))
        .ours(UNDER_STEADY_LOAD, &[STEADY_APPLIED], || under_load(steady));
    if bench.quick {
        return contest.run(bench);
    }
    // What does less than that beside the base.
    contest
        .bare(LOADED, || {
            beside.make_writable();
            let append = |over: &AtomicBool| {
                while !over.load(Ordering::Relaxed) {
                    limits::append(beside.bytes_mut(), record, TOGETHER);
                }
                Ok(())
            };
            Ok(while_running(append, |_| copy(true))?.0)
        })
        .bare(STREAMED, || beside_lane(None, false, false))
        .bare(STEADY_STREAMED, || beside_lane(steady, false, false))
        .also(UNDER_LOAD, &[LOADED, STREAMED])
        .also(UNDER_STEADY_LOAD, &[STEADY_STREAMED])
        .run(bench)
}

fn compare_puts(bench: &Bench, stage: &Stage<'_>, writer: &RefCell<KvWriter<'_>>) -> Result<()> {
    // Long enough for the load to meet what bounds it: behind a store that lags, the first seconds cost nothing.
    let alone_for = Duration::from_millis(if bench.quick { 300 } else { 4000 });
    let wait = |_: &AtomicBool| -> Result<()> {
        std::thread::sleep(alone_for);
        Ok(())
    };
    let puts_beside = |per_second: Option<u64>, work: &dyn Fn(&AtomicBool) -> Result<()>| -> Result<Sample> {
        let mut writer = writer.borrow_mut();
        let writer = &mut *writer;
        let load = |over: &AtomicBool| stage.put_until(writer, per_second, over);
        let ((), puts) = while_running(load, work)?;
        Ok(Sample::new(puts))
    };
    let followed = |per_second: Option<u64>| -> Result<Sample> {
        stage.settle()?;
        let rebuilt = stage.start_rebuild()?;
        let sample = puts_beside(per_second, &wait)?;
        rebuilt.end()?;
        Ok(sample)
    };
    let during = |per_second: Option<u64>| -> Result<Sample> {
        stage.settle()?;
        puts_beside(per_second, &|over| stage.rebuild(0, over).map(drop))
    };
    let contest = Contest::new("rebuild", stage.block_len(), Unit::RecordsPerSecond)
        .with_memory_in_use(2 * stage.blocks * stage.block_len())
        .among_ours()
        .bare(WITHOUT, || {
            stage.settle()?;
            puts_beside(None, &wait)
        })
        .bare(FOLLOWED, || followed(None))
        .ours("puts during a rebuild", &[WITHOUT, FOLLOWED], || during(None));
    if bench.quick {
        return contest.run(bench);
    }
    contest
        .bare(STEADY_FOLLOWED, || followed(Some(stage.steady_rate())))
        .ours("steady puts during a rebuild", &[STEADY_FOLLOWED], || during(Some(stage.steady_rate())))
        .run(bench)
}

/// What the bare programs work on.
struct Bare {
    /// What stands for the base, and its file.
    from: MappedFile,
    from_file: File,
    /// What is appended to and goes nowhere.
    beside: MappedFile,
    lane: LogLane,
    scratch: PathBuf,
    bytes: u64,
    record: Vec<u8>,
}

impl Bare {
    fn new(scratch: &Scratch, block_len: u64, blocks: u64) -> Result<Bare> {
        let (scratch, bytes) = (scratch.path().to_owned(), blocks * block_len);
        let path = scratch.join("from");
        let mut from = MappedFile::zeroed_in_pages(&path, usize::try_from(bytes)?)?;
        from.make_writable();
        let from_file = File::options().write(true).open(path)?;
        let beside = MappedFile::zeroed_in_pages(&scratch.join("beside"), 16 << 20)?;
        let lane = LogLane::new(&scratch, super::record(block_len), TOGETHER, blocks)?;
        let record = super::record(block_len - BLOCK_OVERHEAD);
        Ok(Bare { from, from_file, beside, lane, scratch, bytes, record })
    }
}

/// The block that a load changes next, of so many: all over the store.
pub(super) fn scattered(count: u64, blocks: u64) -> u64 {
    count.wrapping_mul(7_368_787) % blocks
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
    fn put_until(&self, writer: &mut KvWriter<'_>, per_second: Option<u64>, over: &AtomicBool) -> Result<f64> {
        let mut pace = Pace::new(TOGETHER, per_second);
        let began = Instant::now();
        let mut puts = 0_u64;
        while !over.load(Ordering::Relaxed) {
            for _ in 0..TOGETHER {
                writer.propose(&key(scattered(puts, self.blocks)), Some(&self.value))?;
                puts += 1;
            }
            writer.flush()?;
            pace.wait();
        }
        Ok(puts as f64 / began.elapsed().as_secs_f64())
    }

    /// Waits until the leader's own store has everything, syncs, and gives up all log that may go: whoever comes now
    /// has to be rebuilt.
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

    /// Puts a second of the steady load.
    fn steady_rate(&self) -> u64 {
        STEADY_BYTES / self.block_len()
    }

    fn block_len(&self) -> u64 {
        u64::from(self.options.value_len) + BLOCK_OVERHEAD
    }

    /// A new follower, from nothing until it serves what the leader had when it came: then it is `over`.
    fn rebuild(&self, bytes: u64, over: &AtomicBool) -> Result<Sample> {
        let rebuilt = self.start_rebuild()?;
        over.store(true, Ordering::Relaxed);
        let sample = Sample::new(bytes as f64 / 1e6 / rebuilt.took.as_secs_f64())
            .with("records_behind", Some(rebuilt.behind as f64));
        rebuilt.end()?;
        Ok(sample)
    }

    fn start_rebuild(&self) -> Result<Rebuilt<'_>> {
        let scratch = self.bench.scratch("rebuilt")?;
        let node = NodeId(self.next_node.fetch_add(1, Ordering::Relaxed));
        let head = self.leader.log(SHARD)?.head();
        let began = Instant::now();
        let store = Arc::new(FixedStore::open(scratch.path().join("store"), &self.options)?);
        let follower = Node::builder(scratch.path())
            .node_id(node)
            .max_wal_bytes(None)
            .follow(self.leader.local_address(), store as Arc<dyn ReplicationTarget>)?;
        wait_until(Until { mark: follower.applied(SHARD)?, at_least: head.max(Lsn::FIRST) }, "the follower's store")?;
        let took = began.elapsed();
        let applied = follower.applied(SHARD)?.load();
        let behind = self.leader.log(SHARD)?.head().get().saturating_sub(applied.get());
        Ok(Rebuilt { leader: &self.leader, node, follower, took, behind, _scratch: scratch })
    }
}

/// A follower that was rebuilt and follows.
struct Rebuilt<'a> {
    leader: &'a Leader,
    node: NodeId,
    follower: Follower,
    /// From nothing to serving.
    took: Duration,
    /// Records that the leader had then, and this store had not.
    behind: u64,
    _scratch: Scratch,
}

impl Rebuilt<'_> {
    fn end(self) -> Result<()> {
        let progress = self.follower.rebuild_progress(SHARD)?;
        if progress.phase != RebuildPhase::Completed {
            return Err(format!("the follower was not rebuilt: {progress:?}").into());
        }
        self.follower.shutdown()?;
        Ok(self.leader.forget_follower(self.node)?)
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
