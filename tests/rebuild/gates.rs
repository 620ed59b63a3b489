//! Targets that stop where a test wants to look: a follower's at a gate, a leader's base run by run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};
use towline::target::{
    BaseInfo, BaseSink, BaseSource, BlockId, BlockRun, FixedStore, KeptBase, ReplicationTarget, TargetTopology,
};
use towline::wal::Record;
use towline::{Error, Follower, Lsn, Result, ShardId, WaitStrategy, Watermark, wait_any};

use crate::scene::{Scene, reach};

/// A target that stops at a gate after so many calls of one kind, so that a rebuild can be met in the middle.
pub struct Gated {
    pub inner: Arc<FixedStore>,
    pub gate: Arc<Gate>,
    /// What it says to have applied; none to leave it to the checkpoint.
    pub tells: bool,
}

#[derive(Default)]
pub struct Gate {
    /// Blocks, records or completions that pass; `u64::MAX` for all.
    pub left: AtomicU64,
    pub at: Mutex<Point>,
    pub reached: Watermark,
    pub opened: Mutex<bool>,
    pub changed: Condvar,
    /// Whether who comes to it panics, instead of waiting.
    pub falls: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Point {
    #[default]
    Begun,
    Resumed,
    Block,
    Record,
    Sync,
    Complete,
}

impl Gate {
    pub fn at(point: Point, after: u64) -> Arc<Gate> {
        Arc::new(Gate { left: AtomicU64::new(after), at: Mutex::new(point), ..Gate::default() })
    }

    pub fn falling(point: Point, after: u64) -> Arc<Gate> {
        Arc::new(Gate { left: AtomicU64::new(after), at: Mutex::new(point), falls: true, ..Gate::default() })
    }

    /// Blocks at the gate once enough have passed, until it is opened.
    pub fn pass(&self, point: Point) -> Result<()> {
        if *self.at.lock() != point
            || self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
        {
            return Ok(());
        }
        self.reached.advance(Lsn(1));
        assert!(!self.falls, "the gate fell");
        let mut opened = self.opened.lock();
        while !*opened {
            self.changed.wait(&mut opened);
        }
        Err(Error::Io {
            action: "go on behind",
            path: "the gate".into(),
            source: Arc::new(std::io::ErrorKind::Other.into()),
        })
    }

    /// Lets everything pass from now on. Who waits is sent back.
    pub fn open_for_good(&self) {
        self.left.store(u64::MAX, Ordering::SeqCst);
        self.open();
    }

    pub fn open(&self) {
        *self.opened.lock() = true;
        self.changed.notify_all();
    }
}

pub struct GatedSink(Box<dyn BaseSink>, Arc<Gate>);

impl BaseSink for GatedSink {
    fn put_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<()> {
        self.1.pass(Point::Block)?;
        self.0.put_block(block, bytes)
    }
    fn pass(&mut self, next: BlockId) -> Result<()> {
        self.0.pass(next)
    }
    fn consistent_from(&self) -> Lsn {
        self.0.consistent_from()
    }
    fn complete(&mut self, achieved: Lsn) -> Result<()> {
        self.1.pass(Point::Complete)?;
        self.0.complete(achieved)
    }
    fn check_kept(&mut self) -> Result<()> {
        self.0.check_kept()
    }
    fn cancel(&mut self) {
        self.0.cancel();
    }
}

impl ReplicationTarget for Gated {
    fn durable_applied(&self, shard: ShardId) -> Result<Option<Lsn>> {
        if self.tells { self.inner.durable_applied(shard) } else { Ok(None) }
    }
    fn apply(&self, shard: ShardId, record: Record<'_>) -> Result<()> {
        self.gate.pass(Point::Record)?;
        self.inner.apply(shard, record)
    }
    fn sync(&self, shard: ShardId) -> Result<()> {
        self.gate.pass(Point::Sync)?;
        self.inner.sync(shard)
    }
    fn topology(&self) -> TargetTopology {
        self.inner.topology()
    }
    fn needs_durable_log(&self) -> bool {
        true
    }
    fn is_rebuilding(&self, shard: ShardId) -> Result<bool> {
        self.inner.is_rebuilding(shard)
    }
    fn resumes_bases(&self) -> bool {
        self.inner.resumes_bases()
    }
    fn resume_base(&self, shard: ShardId, info: BaseInfo, kept: KeptBase) -> Result<Box<dyn BaseSink>> {
        let sink = self.inner.resume_base(shard, info, kept)?;
        self.gate.pass(Point::Resumed)?;
        Ok(Box::new(GatedSink(sink, Arc::clone(&self.gate))))
    }
    fn begin_base(&self, shard: ShardId, info: BaseInfo) -> Result<Box<dyn BaseSink>> {
        let sink = self.inner.begin_base(shard, info)?;
        self.gate.pass(Point::Begun)?;
        Ok(Box::new(GatedSink(sink, Arc::clone(&self.gate))))
    }
    fn blocks_of(&self, shard: ShardId, record: Record<'_>, blocks: &mut Vec<BlockId>) -> Result<bool> {
        self.inner.blocks_of(shard, record, blocks)
    }
}

/// Starts a follower that stops at the gate.
pub fn start_gated(scene: &Scene, gate: &Arc<Gate>) -> Follower {
    let target = Gated { inner: scene.open_store("follower"), gate: Arc::clone(gate), tells: true };
    let follower = scene.follow("follower", Arc::new(target));
    reach(&gate.reached, Lsn(1));
    follower
}

/// A leader's target whose base is given run by run, as many as the test allows; [`Lsn::MAX`] for all.
pub struct Doled {
    pub inner: Arc<FixedStore>,
    pub allowed: Arc<Watermark>,
}

/// Allows no more runs: the base ends with an error.
pub const BROKEN: Lsn = Lsn(u64::MAX - 1);

/// Whoever asks for the next run panics, once; behind that, all are allowed.
pub const FALLS: Lsn = Lsn(u64::MAX - 2);

struct DoledSource {
    inner: Box<dyn BaseSource>,
    allowed: Arc<Watermark>,
    given: Lsn,
}

impl BaseSource for DoledSource {
    fn info(&self) -> BaseInfo {
        self.inner.info()
    }
    fn next_run(&mut self, buffer: &mut [u8]) -> Result<Option<BlockRun>> {
        self.given = self.given.next();
        wait_any(&[self.allowed.until(self.given)], WaitStrategy::Park, None);
        if self.allowed.load() == FALLS {
            self.allowed.advance(Lsn::MAX);
            panic!("over a base");
        }
        if self.allowed.load() == BROKEN {
            return Err(Error::Io {
                action: "read",
                path: "the base".into(),
                source: Arc::new(std::io::ErrorKind::Other.into()),
            });
        }
        self.inner.next_run(buffer)
    }
    fn skip_to(&mut self, first: BlockId) {
        self.inner.skip_to(first);
    }
}

impl ReplicationTarget for Doled {
    fn durable_applied(&self, shard: ShardId) -> Result<Option<Lsn>> {
        self.inner.durable_applied(shard)
    }
    fn apply(&self, shard: ShardId, record: Record<'_>) -> Result<()> {
        self.inner.apply(shard, record)
    }
    fn sync(&self, shard: ShardId) -> Result<()> {
        self.inner.sync(shard)
    }
    fn topology(&self) -> TargetTopology {
        self.inner.topology()
    }
    fn needs_durable_log(&self) -> bool {
        true
    }
    fn open_base(&self, shard: ShardId) -> Result<Box<dyn BaseSource>> {
        let (inner, allowed) = (self.inner.open_base(shard)?, Arc::clone(&self.allowed));
        Ok(Box::new(DoledSource { inner, allowed, given: Lsn::ZERO }))
    }
}
