//! The follower's side of one rebuild: what is applied from which lane, and when it is done.
//!
//! # Phases
//!
//! ```text
//!  idle ──start──▶ accepted ──first entry or block──▶ running ──base complete──▶ base_complete ──try──▶ completed
//!                      │                                 │                           │
//!                      └───────────── cancel, or any error of a lane ────────────────┴────────────────▶ failed
//! ```
//!
//! A completed or failed session can start again; one that is active is superseded by a new start, so it fails first.
//! The legal transitions stand in [`RebuildPhase::may_become`], and nowhere else.
//!
//! # Which lane wins
//!
//! A block's bit is set when a record that touches it has been applied, in the same step: whoever holds the session
//! applies the record and sets the bit, or looks at the bit and puts the block. So an image never covers a record. A
//! target that cannot number its blocks gets the whole base first: until that is complete the log lane waits in the
//! local log.
//!
//! # When it is done
//!
//! 1. The base is complete: every block was put or skipped, and the leader has said how many there were.
//! 2. Applied has reached the target, which was frozen when the session was issued, and the newest effect that came
//!    with a block ([`BaseSink::consistent_from`]): before that the image is no state that ever was.
//! 3. The local log has been synced up to what is applied. Then the target makes the base durable and takes its mark
//!    away, and the session is completed at what is applied, the *achieved* LSN.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::rebuild::BlockBitmap;
use crate::target::{BaseInfo, BaseSink, BlockId, KeptBase, ReplicationTarget};
use crate::types::{Epoch, Lsn, SessionId, ShardId};
use crate::wal::Batch;
use crate::wire::SessionFailure;

/// How far a rebuild has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RebuildPhase {
    /// There is none.
    #[default]
    Idle,
    /// The target carries its mark, and nothing has arrived yet.
    Accepted,
    /// Log entries and blocks are being applied.
    Running,
    /// Every block has arrived; the log has not come far enough yet.
    BaseComplete,
    /// The target serves again.
    Completed,
    /// It was given up. The target serves nothing until another rebuild completes.
    Failed,
}

impl RebuildPhase {
    /// All of them.
    pub const ALL: [RebuildPhase; 6] = [
        RebuildPhase::Idle,
        RebuildPhase::Accepted,
        RebuildPhase::Running,
        RebuildPhase::BaseComplete,
        RebuildPhase::Completed,
        RebuildPhase::Failed,
    ];

    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            RebuildPhase::Idle => "idle",
            RebuildPhase::Accepted => "accepted",
            RebuildPhase::Running => "running",
            RebuildPhase::BaseComplete => "base_complete",
            RebuildPhase::Completed => "completed",
            RebuildPhase::Failed => "failed",
        }
    }

    /// Whether a rebuild is under way.
    #[must_use]
    pub const fn is_active(self) -> bool {
        matches!(self, RebuildPhase::Accepted | RebuildPhase::Running | RebuildPhase::BaseComplete)
    }

    /// Whether this phase can be followed by `next`.
    #[must_use]
    pub const fn may_become(self, next: RebuildPhase) -> bool {
        use RebuildPhase as P;
        match (self, next) {
            (P::Idle | P::Completed | P::Failed, P::Accepted) => true,
            (P::Accepted, P::Running) => true,
            // A base without any block is complete before anything ran.
            (P::Accepted | P::Running, P::BaseComplete) => true,
            (P::BaseComplete, P::Completed) => true,
            (P::Accepted | P::Running | P::BaseComplete, P::Failed) => true,
            _ => false,
        }
    }
}

impl fmt::Display for RebuildPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The terms of a rebuild, fixed when the leader starts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RebuildContract {
    /// Which session.
    pub session: SessionId,
    /// The leader's term.
    pub epoch: Epoch,
    /// The LSN that the log lane must reach: the leader's head when it issued the session.
    pub target: Lsn,
    /// What the base is.
    pub base: BaseInfo,
}

/// How a rebuild goes, for those who ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RebuildProgress {
    /// Which session.
    pub session: SessionId,
    /// Its phase.
    pub phase: RebuildPhase,
    /// Blocks of the base that have arrived.
    pub blocks_done: u64,
    /// Of these, blocks that were left out because the log was ahead of them.
    pub blocks_skipped: u64,
    /// Blocks of the whole image, blank ones included, which are never sent; 0 where blocks have no numbers.
    pub blocks_total: u64,
    /// Blocks at the beginning of the image that stayed from an interrupted rebuild, and are not sent again.
    pub blocks_kept: u64,
    /// Up to where the log lane has been applied.
    pub applied: Lsn,
    /// Up to where it must be at least.
    pub target: Lsn,
}

/// One shard's rebuilds on a follower, one at a time. Whoever applies log entries and whoever puts blocks share it
/// behind a lock.
///
/// ```
/// use std::sync::Arc;
/// use towline::rebuild::{RebuildContract, RebuildPhase, RebuildSession};
/// use towline::target::{BlockId, FixedStore, FixedStoreOptions, ReplicationTarget};
/// use towline::SessionId;
/// use towline::{Epoch, Lsn, ShardId};
///
/// # let dir = tempfile::tempdir()?;
/// let leader = FixedStore::open(dir.path().join("leader"), &FixedStoreOptions::default())?;
/// let follower = Arc::new(FixedStore::open(dir.path().join("follower"), &FixedStoreOptions::default())?);
/// leader.put(b"boat", b"red", |_, _| Ok(Lsn(1)))?;
///
/// let mut base = leader.open_base(ShardId(0))?;
/// let mut session = RebuildSession::new(ShardId(0), follower.clone());
/// let contract = RebuildContract { session: SessionId(1), epoch: Epoch(1), target: Lsn(1), base: base.info() };
/// session.start(contract)?;
/// let mut block = vec![0; usize::try_from(base.info().block_len)?];
/// while let Some(run) = base.next_run(&mut block)? {
///     session.apply_base_block(run.first, &block)?;
/// }
/// session.mark_base_complete(1)?;
/// assert_eq!(session.try_complete()?, Some(Lsn(1)));
/// assert_eq!(session.phase(), RebuildPhase::Completed);
/// assert_eq!(follower.get(b"boat")?.as_deref(), Some(&b"red"[..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RebuildSession {
    shard: ShardId,
    store: Arc<dyn ReplicationTarget>,
    phase: RebuildPhase,
    /// The terms; none before the first start.
    contract: Option<RebuildContract>,
    /// Open while the session is active.
    sink: Option<Box<dyn BaseSink>>,
    covered: BlockBitmap,
    applied: Lsn,
    /// Blocks below this number stayed from an interrupted rebuild.
    kept: u64,
    /// Blocks below this number have come, or are blank.
    next_block: u64,
    done: u64,
    skipped: u64,
    failure: SessionFailure,
    touched: Vec<BlockId>,
}

impl RebuildSession {
    /// No rebuild yet, of one shard of a target.
    #[must_use]
    pub fn new(shard: ShardId, target: Arc<dyn ReplicationTarget>) -> RebuildSession {
        RebuildSession {
            shard,
            store: target,
            phase: RebuildPhase::Idle,
            contract: None,
            sink: None,
            covered: BlockBitmap::new(0),
            applied: Lsn::ZERO,
            kept: 0,
            next_block: 0,
            done: 0,
            skipped: 0,
            failure: SessionFailure::None,
            touched: Vec::new(),
        }
    }

    /// Takes on a rebuild: the target gets its durable mark, and its old state is gone. A session that is active fails
    /// as superseded.
    ///
    /// # Errors
    ///
    /// What the target gives: [`Error::Invalid`] if its state is newer than the base or it takes none, and then nothing
    /// has changed in it; [`Error::Mismatch`]; I/O errors. The session is not started then.
    pub fn start(&mut self, contract: RebuildContract) -> Result<()> {
        self.cancel(SessionFailure::Superseded);
        self.sink = Some(self.store.begin_base(self.shard, contract.base)?);
        self.take_on(contract, KeptBase { blocks: 0, applied: contract.base.base_lsn })
    }

    /// Takes on a rebuild that goes on with an interrupted one: of the target's state, the blocks that `kept` speaks of
    /// stay. The log must be applied again from where [`progress`](Self::progress) then says that it is applied; that
    /// marks the blocks which are ahead of the base, so the local log comes before the first block.
    ///
    /// # Errors
    ///
    /// What the target gives: [`Error::Invalid`] if it cannot go on; [`Error::Mismatch`]. The session is not started
    /// then.
    pub fn resume(&mut self, contract: RebuildContract, kept: KeptBase) -> Result<()> {
        self.cancel(SessionFailure::Superseded);
        self.sink = Some(self.store.resume_base(self.shard, contract.base, kept)?);
        self.take_on(contract, kept)
    }

    fn take_on(&mut self, contract: RebuildContract, kept: KeptBase) -> Result<()> {
        self.enter(RebuildPhase::Accepted)?;
        // Blocks past the end of the image never come with it: they need no bit.
        self.covered = BlockBitmap::new(contract.base.block_count);
        self.applied = contract.base.base_lsn.min(kept.applied);
        self.contract = Some(contract);
        (self.kept, self.next_block) = (kept.blocks, kept.blocks);
        (self.done, self.skipped, self.failure) = (0, 0, SessionFailure::None);
        self.pass(kept.blocks)
    }

    /// Notes that blocks come from `next` on only. Blocks come in ascending order; those passed over are blank, or the
    /// log has written them.
    fn pass(&mut self, next: u64) -> Result<()> {
        let next = self.next_block.max(next);
        let is_numbered = self.base().is_numbered();
        let result = match &mut self.sink {
            Some(sink) if is_numbered => sink.pass(BlockId(next)),
            _ => Ok(()),
        };
        self.fail_on_error(result)?;
        // What an interruption leaves is counted by this, so the target has to know first.
        self.next_block = next;
        Ok(())
    }

    /// Fails if a block that was kept is damaged, now that the local log has been applied.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`]: the session has failed then.
    pub fn check_kept(&mut self) -> Result<()> {
        let result = self.sink.as_mut().map_or(Ok(()), |sink| sink.check_kept());
        self.fail_on_error(result)
    }

    /// What an interruption now would leave, once the target has synced it; none unless the session is active: of one
    /// that has failed nobody knows what is there.
    #[must_use]
    pub fn kept(&self) -> Option<KeptBase> {
        self.active().then_some(KeptBase { blocks: self.next_block, applied: self.applied })
    }

    /// Applies the records of a batch of the local log, and marks the blocks that they touch. Records that the base
    /// holds already are left out; those after it come without gaps.
    ///
    /// # Errors
    ///
    /// A gap, and what the target gives: the session has failed then. [`Error::Invalid`] if no session is active, or if
    /// the target needs the whole base first ([`takes_log`](Self::takes_log)): nothing has changed then.
    pub fn apply_log_entry(&mut self, batch: &Batch<'_>) -> Result<()> {
        if !self.takes_log() {
            return Err(self.out_of_place("a log entry"));
        }
        let result = self.apply_batch(batch);
        self.fail_on_error(result)
    }

    fn apply_batch(&mut self, batch: &Batch<'_>) -> Result<()> {
        let last = batch.header.last_lsn();
        if last <= self.applied {
            return Ok(());
        }
        if batch.header.first_lsn > self.applied.next() {
            return Err(Error::invalid(format!(
                "the log of shard {} goes on with LSN {} where LSN {} is due",
                self.shard,
                batch.header.first_lsn,
                self.applied.next()
            )));
        }
        if self.phase == RebuildPhase::Accepted {
            self.enter(RebuildPhase::Running)?;
        }
        self.store.apply_batch(self.shard, batch).map_err(Error::of_target(self.shard))?;
        if self.base().is_numbered() {
            self.mark_touched(batch)?;
        }
        self.applied = last;
        Ok(())
    }

    fn mark_touched(&mut self, batch: &Batch<'_>) -> Result<()> {
        for record in batch.records().filter(|record| record.lsn > self.applied) {
            self.touched.clear();
            if !self.store.blocks_of(self.shard, record, &mut self.touched)? {
                return Err(Error::invalid(format!(
                    "the target of shard {} numbers the blocks of its base, but not those of its records",
                    self.shard
                )));
            }
            let limit = self.covered.limit_blocks();
            for &block in self.touched.iter().filter(|block| block.0 < limit) {
                self.covered.mark_applied(block)?;
            }
        }
        Ok(())
    }

    /// Puts one block, or one chunk of an image without numbered blocks, unless the log has written it since. Returns
    /// whether it was put.
    ///
    /// # Errors
    ///
    /// What the target gives: the session has failed then. [`Error::Invalid`] if no base is due.
    pub fn apply_base_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<bool> {
        let (RebuildPhase::Accepted | RebuildPhase::Running, Some(sink)) = (self.phase, &mut self.sink) else {
            return Err(self.out_of_place("a base block"));
        };
        let is_wanted = self.covered.should_apply_base(block);
        let result = if is_wanted { sink.put_block(block, bytes) } else { Ok(()) };
        self.fail_on_error(result)?;
        self.done += 1;
        self.pass(block.0.saturating_add(1))?;
        if !is_wanted {
            self.skipped += 1;
            return Ok(false);
        }
        if self.phase == RebuildPhase::Accepted {
            self.enter(RebuildPhase::Running)?;
        }
        Ok(true)
    }

    /// Puts consecutive numbered blocks, except those that the log has written since. Returns how many were put.
    ///
    /// # Errors
    ///
    /// What the target gives: the session has failed then. [`Error::Invalid`] if no base is due, if its blocks have no
    /// numbers, or if the bytes are not whole blocks with numbers below the end of the image.
    pub fn apply_base_blocks(&mut self, first: BlockId, bytes: &[u8]) -> Result<u64> {
        let base = self.base();
        let (RebuildPhase::Accepted | RebuildPhase::Running, Some(sink)) = (self.phase, &mut self.sink) else {
            return Err(self.out_of_place("a run of base blocks"));
        };
        let block_len = usize::try_from(base.block_len).unwrap_or(usize::MAX);
        let count = bytes.len().checked_div(block_len).unwrap_or(0);
        let end = first.0.checked_add(count as u64).filter(|&end| end <= base.block_count);
        let (true, Some(end)) = (count != 0 && count * block_len == bytes.len(), end) else {
            return Err(Error::invalid(format!(
                "{} bytes from block {first} on are not some of {} blocks of {block_len} bytes",
                bytes.len(),
                base.block_count
            )));
        };
        let (mut put, mut left, mut result) = (0, first.0..end, Ok(()));
        while result.is_ok() && !left.is_empty() {
            let wanted = |block: &u64| self.covered.should_apply_base(BlockId(*block));
            let from = left.clone().find(wanted).unwrap_or(end);
            let to = (from..end).find(|block| !wanted(block)).unwrap_or(end);
            self.skipped += from - left.start;
            if from < to {
                let place = |block: u64| usize::try_from(block - first.0).unwrap_or(count) * block_len;
                result = sink.put_blocks(BlockId(from), block_len, &bytes[place(from)..place(to)]);
                put += to - from;
            }
            left.start = to;
        }
        self.fail_on_error(result)?;
        self.done += count as u64;
        self.pass(end)?;
        if put != 0 && self.phase == RebuildPhase::Accepted {
            self.enter(RebuildPhase::Running)?;
        }
        Ok(put)
    }

    /// Notes that the leader has sent the whole base, of `blocks` blocks.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if another number of blocks arrived: the session has failed then. The same if no base is due.
    pub fn mark_base_complete(&mut self, blocks: u64) -> Result<()> {
        if !matches!(self.phase, RebuildPhase::Accepted | RebuildPhase::Running) {
            return Err(self.out_of_place("the end of a base"));
        }
        if blocks != self.done {
            let error = format!("{} blocks of a base arrived, and {blocks} were sent", self.done);
            return self.fail_on_error(Err(Error::invalid(error)));
        }
        self.pass(self.base().block_count)?;
        self.enter(RebuildPhase::BaseComplete)
    }

    /// The LSN that must be applied before the session can complete; final once the base is complete.
    #[must_use]
    pub fn needed(&self) -> Lsn {
        let target = self.contract.map_or(Lsn::ZERO, |contract| contract.target);
        self.sink.as_ref().map_or(target, |sink| sink.consistent_from().max(target))
    }

    /// Completes the session if the base is complete and the log has come far enough. The local log must have been
    /// synced up to what is applied. Returns the achieved LSN, or `None` while something is missing.
    ///
    /// # Errors
    ///
    /// What the target gives: the session has failed then.
    pub fn try_complete(&mut self) -> Result<Option<Lsn>> {
        if self.phase != RebuildPhase::BaseComplete || self.applied < self.needed() {
            return Ok(None);
        }
        let achieved = self.applied;
        let result = self.sink.as_mut().map_or(Ok(()), |sink| sink.complete(achieved));
        self.fail_on_error(result)?;
        self.sink = None;
        self.enter(RebuildPhase::Completed)?;
        Ok(Some(achieved))
    }

    /// Gives up, for a reason. The target serves nothing until another rebuild completes. Changes nothing unless a
    /// session is active.
    pub fn cancel(&mut self, reason: SessionFailure) {
        if !self.active() {
            return;
        }
        if let Some(mut sink) = self.sink.take() {
            sink.cancel();
        }
        self.failure = reason;
        self.phase = RebuildPhase::Failed;
    }

    /// Whether a rebuild is under way.
    #[must_use]
    pub fn active(&self) -> bool {
        self.phase.is_active()
    }

    /// Whether the newest rebuild has completed.
    #[must_use]
    pub fn is_completed(&self) -> bool {
        self.phase == RebuildPhase::Completed
    }

    /// Whether log entries can be applied now: a target without numbered blocks needs the whole base first.
    #[must_use]
    pub fn takes_log(&self) -> bool {
        self.active() && (self.base().is_numbered() || self.phase == RebuildPhase::BaseComplete)
    }

    /// Whether an event is about this session. One that is not is stale, and must change nothing.
    #[must_use]
    pub fn is(&self, session: SessionId, epoch: Epoch) -> bool {
        self.contract.is_some_and(|own| (own.session, own.epoch) == (session, epoch))
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> RebuildPhase {
        self.phase
    }

    /// Why it failed; [`SessionFailure::None`] if it has not.
    #[must_use]
    pub fn failure(&self) -> SessionFailure {
        self.failure
    }

    /// How it goes.
    #[must_use]
    pub fn progress(&self) -> RebuildProgress {
        RebuildProgress {
            session: self.contract.map_or(SessionId::NONE, |contract| contract.session),
            phase: self.phase,
            blocks_done: self.done,
            blocks_skipped: self.skipped,
            blocks_total: self.base().block_count,
            blocks_kept: self.kept,
            applied: self.applied,
            target: self.contract.map_or(Lsn::ZERO, |contract| contract.target),
        }
    }

    fn base(&self) -> BaseInfo {
        self.contract.map(|contract| contract.base).unwrap_or_default()
    }

    fn enter(&mut self, next: RebuildPhase) -> Result<()> {
        if !self.phase.may_become(next) {
            return Err(Error::invalid(format!(
                "a rebuild of shard {} cannot go from {} to {next}",
                self.shard, self.phase
            )));
        }
        self.phase = next;
        Ok(())
    }

    fn out_of_place(&self, what: &str) -> Error {
        Error::invalid(format!("{what} of shard {} has no place in a rebuild that is {}", self.shard, self.phase))
    }

    fn fail_on_error<T>(&mut self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.cancel(SessionFailure::LocalBaseCorrupt);
        }
        result
    }
}

impl Drop for RebuildSession {
    fn drop(&mut self) {
        self.cancel(SessionFailure::Cancelled);
    }
}

impl fmt::Debug for RebuildSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RebuildSession").field("shard", &self.shard).field("progress", &self.progress()).finish()
    }
}

#[cfg(test)]
mod tests;
