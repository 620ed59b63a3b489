//! A target small enough to compare after every record: a few blocks, each a version and a digest of what was written.
//!
//! It overwrites in place, so it is fed only what is durable in the log. It leaves deciding between log and base to the
//! rebuild session: a block that is put is put.

use std::sync::{Arc, Mutex, MutexGuard};

use towline::target::{BaseInfo, BaseSink, BaseSource, BlockId, BlockRun, ReplicationTarget};
use towline::wal::Record;
use towline::{Error, Lsn, Result, ShardId};

use super::clock::{Chance, mix};

pub const BLOCKS: usize = 12;
const BLOCK_LEN: usize = 16;

/// Version and digest of each block. A blank block has version 0.
pub type State = [(Lsn, u64); BLOCKS];

/// A record as clients write them: a number of its own, a block, then bytes that mean nothing.
pub fn record_of(number: u64, block: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0x5a; len.max(16)];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..16].copy_from_slice(&block.to_le_bytes());
    bytes
}

fn block_of(record: &[u8]) -> usize {
    let number = record.get(8..16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
    usize::try_from(number % BLOCKS as u64).unwrap()
}

/// What a record makes of a state in which it is the next.
pub fn apply_to(state: &mut State, record: Record<'_>) {
    let (version, digest) = &mut state[block_of(record.bytes)];
    if record.lsn > *version {
        let number = record.bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        // A record writes its block as a whole: that is what lets the log win over a base.
        (*version, *digest) = (record.lsn, mix(number ^ record.lsn.0));
    }
}

#[derive(Default)]
struct Inner {
    state: State,
    applied: Lsn,
    durable: State,
    durable_applied: Lsn,
    rebuilding: bool,
    /// Which sink may put blocks.
    sinks: u64,
    /// The LSN of every record offered since somebody last asked.
    offered: Vec<Lsn>,
    /// Planted: no record touches a block.
    hides_blocks: bool,
    /// It cannot say what it holds of records that it does not know to have applied.
    is_plain: bool,
}

#[derive(Clone, Default)]
pub struct Blocks(Arc<Mutex<Inner>>);

impl Blocks {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    pub fn new(hides_blocks: bool, is_plain: bool) -> Blocks {
        let blocks = Blocks::default();
        (blocks.lock().hides_blocks, blocks.lock().is_plain) = (hides_blocks, is_plain);
        blocks
    }

    pub fn applied(&self) -> Lsn {
        self.lock().applied
    }

    pub fn saved(&self) -> Lsn {
        self.lock().durable_applied
    }

    pub fn state(&self) -> State {
        self.lock().state
    }

    pub fn is_incomplete(&self) -> bool {
        self.lock().rebuilding
    }

    pub fn take_offered(&self) -> Vec<Lsn> {
        std::mem::take(&mut self.lock().offered)
    }

    /// Of each block written since the last sync the old content or the new is there.
    pub fn lose_power(&self, chance: &mut Chance) {
        let inner = &mut *self.lock();
        for (durable, written) in inner.durable.iter_mut().zip(inner.state) {
            if chance.per_mille(500) {
                *durable = written;
            }
        }
        (inner.state, inner.applied) = (inner.durable, inner.durable_applied);
        inner.sinks += 1;
        inner.offered.clear();
    }
}

impl ReplicationTarget for Blocks {
    fn durable_applied(&self, _: ShardId) -> Result<Option<Lsn>> {
        let inner = self.lock();
        Ok(Some(if inner.rebuilding { Lsn::ZERO } else { inner.durable_applied }))
    }

    fn apply(&self, _: ShardId, record: Record<'_>) -> Result<()> {
        let mut inner = self.lock();
        inner.offered.push(record.lsn);
        if record.lsn > inner.applied {
            apply_to(&mut inner.state, record);
            inner.applied = record.lsn;
        }
        Ok(())
    }

    fn sync(&self, _: ShardId) -> Result<()> {
        let mut inner = self.lock();
        inner.durable = inner.state;
        if !inner.rebuilding {
            inner.durable_applied = inner.applied;
        }
        Ok(())
    }

    fn needs_durable_log(&self) -> bool {
        true
    }

    fn touched(&self, _: ShardId) -> Result<Option<Lsn>> {
        let inner = self.lock();
        let newest = inner.state.iter().map(|(version, _)| *version).max();
        Ok(newest.filter(|_| !inner.is_plain))
    }

    fn is_rebuilding(&self, _: ShardId) -> Result<bool> {
        Ok(self.is_incomplete())
    }

    fn open_base(&self, shard: ShardId) -> Result<Box<dyn BaseSource>> {
        self.sync(shard)?;
        if self.is_incomplete() {
            return Err(invalid("the target is being rebuilt itself"));
        }
        let info = BaseInfo {
            base_lsn: self.applied(),
            block_len: u32::try_from(BLOCK_LEN).unwrap(),
            block_count: BLOCKS as u64,
        };
        Ok(Box::new(Source { blocks: self.clone(), info, next: 0 }))
    }

    fn begin_base(&self, _: ShardId, info: BaseInfo) -> Result<Box<dyn BaseSink>> {
        let mut inner = self.lock();
        inner.rebuilding = true;
        (inner.state, inner.applied) = (State::default(), info.base_lsn);
        (inner.durable, inner.durable_applied) = (State::default(), Lsn::ZERO);
        inner.sinks += 1;
        Ok(Box::new(Sink { blocks: self.clone(), id: inner.sinks, newest: info.base_lsn }))
    }

    fn blocks_of(&self, _: ShardId, record: Record<'_>, blocks: &mut Vec<BlockId>) -> Result<bool> {
        if !self.lock().hides_blocks {
            blocks.push(BlockId(block_of(record.bytes) as u64));
        }
        Ok(true)
    }
}

fn invalid(reason: &'static str) -> Error {
    Error::Invalid { reason: reason.into() }
}

struct Source {
    blocks: Blocks,
    info: BaseInfo,
    next: usize,
}

impl BaseSource for Source {
    fn info(&self) -> BaseInfo {
        self.info
    }

    /// One block a run: they are read as they are by then, and may be newer than the base.
    fn next_run(&mut self, buffer: &mut [u8]) -> Result<Option<BlockRun>> {
        let state = self.blocks.state();
        let Some(at) = (self.next..BLOCKS).find(|&at| state[at].0 > Lsn::ZERO) else { return Ok(None) };
        buffer[..8].copy_from_slice(&state[at].0.0.to_le_bytes());
        buffer[8..16].copy_from_slice(&state[at].1.to_le_bytes());
        self.next = at + 1;
        Ok(Some(BlockRun { first: BlockId(at as u64), count: 1, len: BLOCK_LEN }))
    }
}

struct Sink {
    blocks: Blocks,
    id: u64,
    newest: Lsn,
}

impl BaseSink for Sink {
    fn put_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<()> {
        let mut inner = self.blocks.lock();
        if inner.sinks == self.id {
            let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            inner.state[usize::try_from(block.0).unwrap()] = (Lsn(word(0)), word(8));
            self.newest = self.newest.max(Lsn(word(0)));
        }
        Ok(())
    }

    fn consistent_from(&self) -> Lsn {
        self.newest
    }

    fn complete(&mut self, achieved: Lsn) -> Result<()> {
        let mut inner = self.blocks.lock();
        if inner.sinks != self.id || achieved != inner.applied || achieved < self.newest {
            return Err(invalid("the sink is superseded, or the log has not come as far"));
        }
        inner.rebuilding = false;
        (inner.durable, inner.durable_applied) = (inner.state, inner.applied);
        Ok(())
    }

    fn cancel(&mut self) {}
}
