//! A target that cannot number its blocks: one snapshot, and the log after it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use towline::rebuild::RebuildPhase;
use towline::target::{BaseInfo, BaseSink, BaseSource, BlockId, BlockRun, ReplicationTarget};
use towline::wal::Record;
use towline::{Lsn, Result, ShardId};

use crate::scene::{SHARD, deadline, over_both, reach};

/// A target that cannot number its blocks: a map in memory, given as one snapshot in chunks. It outlives its follower,
/// as a state on disk would.
#[derive(Default)]
struct Snapshot(Arc<Mutex<State>>);

#[derive(Clone, Default)]
struct State {
    applied: Lsn,
    rebuilding: bool,
    sums: BTreeMap<u8, u64>,
    chunks: Vec<u8>,
}

impl State {
    fn apply(&mut self, record: Record<'_>) {
        assert_eq!(record.lsn, self.applied.next(), "in order, and nothing before the base is complete");
        *self.sums.entry(record.bytes[0]).or_default() += record.lsn.get();
        self.applied = record.lsn;
    }
}

struct SnapshotSource(BaseInfo, Vec<Vec<u8>>, u64);

impl BaseSource for SnapshotSource {
    fn info(&self) -> BaseInfo {
        self.0
    }
    fn next_run(&mut self, buffer: &mut [u8]) -> Result<Option<BlockRun>> {
        let Some(chunk) = self.1.pop() else { return Ok(None) };
        buffer[..chunk.len()].copy_from_slice(&chunk);
        self.2 += 1;
        Ok(Some(BlockRun { first: BlockId(self.2 - 1), count: 1, len: chunk.len() }))
    }
}

struct SnapshotSink(Arc<Mutex<State>>, Lsn);

impl BaseSink for SnapshotSink {
    fn put_block(&mut self, _: BlockId, bytes: &[u8]) -> Result<()> {
        self.0.lock().chunks.extend_from_slice(bytes);
        let mut state = self.0.lock();
        let chunks = state.chunks.clone();
        state.sums = chunks
            .chunks_exact(9)
            .map(|entry| (entry[0], u64::from_le_bytes(entry[1..].try_into().unwrap())))
            .collect();
        Ok(())
    }
    fn consistent_from(&self) -> Lsn {
        self.1
    }
    fn complete(&mut self, achieved: Lsn) -> Result<()> {
        let mut state = self.0.lock();
        assert!(state.applied >= achieved);
        state.rebuilding = false;
        Ok(())
    }
    fn cancel(&mut self) {}
}

impl ReplicationTarget for Snapshot {
    fn durable_applied(&self, _: ShardId) -> Result<Option<Lsn>> {
        let state = self.0.lock();
        Ok(Some(if state.rebuilding { Lsn::ZERO } else { state.applied }))
    }
    fn apply(&self, _: ShardId, record: Record<'_>) -> Result<()> {
        let mut state = self.0.lock();
        if record.lsn > state.applied {
            state.apply(record);
        }
        Ok(())
    }
    fn sync(&self, _: ShardId) -> Result<()> {
        Ok(())
    }
    fn needs_durable_log(&self) -> bool {
        true
    }
    fn is_rebuilding(&self, _: ShardId) -> Result<bool> {
        Ok(self.0.lock().rebuilding)
    }
    fn open_base(&self, _: ShardId) -> Result<Box<dyn BaseSource>> {
        let state = self.0.lock().clone();
        let chunks = state.sums.iter().map(|(key, sum)| [&[*key][..], &sum.to_le_bytes()].concat()).collect();
        let info = BaseInfo { base_lsn: state.applied, block_len: 0, block_count: 0 };
        Ok(Box::new(SnapshotSource(info, chunks, 0)))
    }
    fn begin_base(&self, _: ShardId, info: BaseInfo) -> Result<Box<dyn BaseSink>> {
        *self.0.lock() = State { applied: info.base_lsn, rebuilding: true, ..State::default() };
        Ok(Box::new(SnapshotSink(Arc::clone(&self.0), info.base_lsn)))
    }
}

#[test]
fn a_target_without_numbered_blocks_gets_the_base_first_and_the_log_after_it() {
    over_both(|wire| {
        let directory = tempfile::tempdir().unwrap();
        let (leaders, followers) = (Arc::new(Snapshot::default()), Arc::new(Snapshot::default()));
        let leader = wire.node(&directory.path().join("leader")).target(leaders.clone()).lead(wire.address).unwrap();
        let writer = Mutex::new(leader.writer(SHARD).unwrap());
        let append = || {
            let mut writer = writer.lock();
            let key = u8::try_from(writer.end().head.get() * 31 % 251).unwrap();
            writer.append(&[key; 500]).unwrap()
        };
        for _ in 0..600 {
            append();
        }
        let head = leader.log(SHARD).unwrap().head();
        reach(leader.applied(SHARD).unwrap().unwrap(), head);
        leader.log(SHARD).unwrap().wait_synced(head, deadline()).unwrap();
        assert!(leader.log(SHARD).unwrap().release_through(head, "the test says so").unwrap() > 0);
        let stop = AtomicBool::new(false);
        let follower = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    append();
                }
            });
            let follower = wire
                .node(&directory.path().join("follower"))
                .follow(leader.local_address(), followers.clone())
                .unwrap();
            reach(follower.applied(SHARD).unwrap(), Lsn(1));
            stop.store(true, Ordering::Relaxed);
            follower
        });
        assert_eq!(follower.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Completed);
        let head = leader.log(SHARD).unwrap().head();
        reach(follower.applied(SHARD).unwrap(), head);
        reach(leader.applied(SHARD).unwrap().unwrap(), head);
        assert_eq!(leaders.0.lock().sums, followers.0.lock().sums);
        follower.shutdown().unwrap();
        let again =
            wire.node(&directory.path().join("follower")).follow(leader.local_address(), followers.clone()).unwrap();
        let last = append();
        reach(again.applied(SHARD).unwrap(), last);
        assert_eq!(again.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Idle);
    });
}
