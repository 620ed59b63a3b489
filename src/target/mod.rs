//! Targets: the state machines that a log is applied to, on followers and on the leader alike.
//!
//! [`ReplicationTarget`] has two halves. The *apply half* takes records in order and says how far they are durable. The
//! *base half* gives and takes images of the state, for followers that the log cannot bring back. [`FixedStore`] is the
//! built-in target; `tests/redb_target.rs` puts a log into another crate's database, both halves in two hundred lines.
//!
//! | so that a node can … | its target has |
//! |---|---|
//! | follow, and go on after a restart | [`durable_applied`](ReplicationTarget::durable_applied), [`apply`](ReplicationTarget::apply), [`sync`](ReplicationTarget::sync) |
//! | give its state to others | also [`open_base`](ReplicationTarget::open_base) |
//! | be rebuilt where the log that it needs is gone, or where it has applied what no leader has any more, as one that was deposed may have | also [`begin_base`](ReplicationTarget::begin_base), [`give_up`](ReplicationTarget::give_up), [`is_rebuilding`](ReplicationTarget::is_rebuilding) |
//! | apply the log while a base comes | also [`blocks_of`](ReplicationTarget::blocks_of), and bases with a [`block_len`](BaseInfo::block_len): without either, neither, and the base is a snapshot with the log applied after it |
//! | go on with a rebuild that was interrupted | also [`resumes_bases`](ReplicationTarget::resumes_bases), [`resume_base`](ReplicationTarget::resume_base) |
//!
//! The target of whoever is followed gives, the follower's takes. Where either does not, the follower is told so, and
//! has to start with an empty directory.

pub mod fixed_store;
mod log_only;
pub mod router;

use std::fmt;

pub use fixed_store::{Entry, FixedStore, FixedStoreOptions, FixedStoreReader};
pub use log_only::LogOnly;
pub use router::ShardRouter;

use crate::error::{Error, Result};
use crate::types::{Lsn, ShardId};
use crate::wal::{Batch, Record};

/// The state machine that a log is applied to.
///
/// # Threads
///
/// `apply`, `apply_batch` and the blocks of a base sink change a shard; `apply` and `apply_batch` are called from one
/// thread per shard. Everything else may be called from any thread at any time.
///
/// # The write-ahead rule
///
/// What has been applied may reach the disk at any moment: where a target overwrites in place, and where it makes state
/// and position durable in one step. So it must not be given a record that a power cut could still take out of the
/// local log: the target would then be ahead of its log, and the node would refuse to start, or another record would
/// come under the same LSN. Therefore targets are fed what is durable, not what is received, unless they say that they
/// [do not need that](ReplicationTarget::needs_durable_log), because what they keep is gone with the process, say.
///
/// # Panics
///
/// A panic on a thread of the node counts as an error of the call that panicked, and [`Error::Panicked`] says what it
/// said: in [`apply`](Self::apply) and [`sync`](Self::sync) it ends following, or makes the leader's shard read-only;
/// in a base that is given it ends the stream, and in one that is taken, following. The target may be called again
/// after that, to sync another shard or to cancel a base: a lock that the panic has poisoned is its own to see to.
/// Where panics abort, the process ends.
///
/// ```
/// use std::collections::BTreeMap;
/// use std::sync::Mutex;
/// use towline::target::ReplicationTarget;
/// use towline::wal::Record;
/// use towline::{Error, Lsn, Result, ShardId};
///
/// /// Counts bytes, in memory: the smallest possible target.
/// #[derive(Default)]
/// struct ByteCount(Mutex<(BTreeMap<ShardId, Lsn>, usize)>);
///
/// impl ReplicationTarget for ByteCount {
///     fn durable_applied(&self, _: ShardId) -> Result<Option<Lsn>> {
///         Ok(None)
///     }
///     fn apply(&self, shard: ShardId, record: Record<'_>) -> Result<()> {
///         let (applied, count) = &mut *self.0.lock().unwrap();
///         let applied = applied.entry(shard).or_default();
///         if record.lsn > *applied {
///             let sum = count.checked_add(record.bytes.len());
///             *count = sum.ok_or_else(|| Error::target(shard, "there are more bytes than can be counted"))?;
///             *applied = record.lsn;
///         }
///         Ok(())
///     }
///     fn sync(&self, _: ShardId) -> Result<()> {
///         Ok(())
///     }
/// }
///
/// let target = ByteCount::default();
/// target.apply(ShardId(0), Record { lsn: Lsn(1), bytes: b"hello" })?;
/// target.apply(ShardId(0), Record { lsn: Lsn(1), bytes: b"hello" })?; // again: changes nothing
/// assert_eq!(target.0.lock().unwrap().1, 5);
/// # Ok::<(), towline::Error>(())
/// ```
pub trait ReplicationTarget: Send + Sync {
    /// LSN up to which everything is applied *and on stable storage* for the shard; the log is replayed from the record
    /// after it. `None` if the target keeps no position: the node's own checkpoint is then used. [`Lsn::ZERO`] while
    /// the target [is being rebuilt](Self::is_rebuilding).
    ///
    /// # Errors
    ///
    /// If the shard does not exist, or its position cannot be read.
    fn durable_applied(&self, shard: ShardId) -> Result<Option<Lsn>>;

    /// Applies one record. Called in LSN order; an LSN at or below what is applied already is a no-op.
    ///
    /// # Errors
    ///
    /// Whatever prevents it: [`Error::target`] makes an error of it that names the shard. There is no second attempt
    /// while the node runs. A follower ends following, for all of its shards, and
    /// [`Follower::wait`](crate::Follower::wait) and [`Follower::shutdown`](crate::Follower::shutdown) tell the error.
    /// A leader's shard becomes read-only ([`Error::Poisoned`]), and its other shards go on. During a rebuild it is the
    /// rebuild that ends, and following with it if the error [is permanent](Error::is_permanent).
    ///
    /// Nothing of the batch counts as applied. It is offered again, from its first record on and behind whatever else
    /// is not known durable, when the node is next started, or the rebuild next begun.
    fn apply(&self, shard: ShardId, record: Record<'_>) -> Result<()>;

    /// Applies the records of a batch, in order: one by one, unless a target knows better.
    ///
    /// # Errors
    ///
    /// As [`apply`](Self::apply). Records before the failing one are applied.
    fn apply_batch(&self, shard: ShardId, batch: &Batch<'_>) -> Result<()> {
        batch.records().try_for_each(|record| self.apply(shard, record))
    }

    /// Makes everything durable that was applied before the call, during a rebuild also the blocks that were put, but
    /// for what need not be yet ([`BaseSink::pass`]). Runs beside appliers without stopping them for long.
    ///
    /// # Errors
    ///
    /// If the disk did not take it; nothing more is then reported as durable, and the shard ends as it does where a
    /// record is refused.
    fn sync(&self, shard: ShardId) -> Result<()>;

    /// Fixed properties that both ends must share; compared at the handshake, by name. The same for every shard.
    fn topology(&self) -> TargetTopology {
        TargetTopology::default()
    }

    /// Whether this target must only be given records that are durable in the local log (the [write-ahead
    /// rule](#the-write-ahead-rule)): unless told otherwise, if it [keeps state](Self::keeps_state) and [takes
    /// records](Self::takes_records). A target in memory may say `false`, and is given records as soon as they are
    /// received.
    fn needs_durable_log(&self) -> bool {
        self.keeps_state() && self.takes_records()
    }

    /// Whether records have to be handed to this target. Where not, and where it does not [need a durable
    /// log](Self::needs_durable_log) either, what is received counts as applied at once, and nobody reads the log for
    /// it, but during a rebuild.
    fn takes_records(&self) -> bool {
        true
    }

    /// Whether records that were applied leave anything behind here. Where they do, a log is never cut below what was
    /// applied, or [may have been](Self::touched): the target is rebuilt instead.
    fn keeps_state(&self) -> bool {
        true
    }

    /// The newest LSN of which the shard's state may hold anything, where that can be more than what is applied: a
    /// target that overwrites in place may be left with effects of later records by a power cut. `None` if the target
    /// cannot tell: anything that stood in the log when it was opened is then taken to be in the state, until that has
    /// been applied again. A log is never cut below this.
    ///
    /// A target that makes effects and position durable in one step gives the latter.
    ///
    /// # Errors
    ///
    /// If the shard does not exist.
    fn touched(&self, shard: ShardId) -> Result<Option<Lsn>> {
        let _ = shard;
        Ok(None)
    }

    /// Whether a rebuild was begun and has not been completed, in this process or before a crash. Such a target serves
    /// nothing, and applies nothing unless a base sink is open.
    ///
    /// # Errors
    ///
    /// If the shard does not exist.
    fn is_rebuilding(&self, shard: ShardId) -> Result<bool> {
        let _ = shard;
        Ok(false)
    }

    /// Leader side: opens an image of the shard's state for copying. It makes a flushed boundary first: everything up
    /// to [`BaseInfo::base_lsn`] is in the image and on stable storage here. Appliers go on meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the target gives no bases, or is being rebuilt itself.
    fn open_base(&self, shard: ShardId) -> Result<Box<dyn BaseSource>> {
        Err(Error::invalid(format!("the target of this node gives no base of shard {shard}: it has no `open_base`")))
    }

    /// Follower side: begins to replace the shard's state. A durable mark is set first; until
    /// [`BaseSink::complete`] takes it away the target refuses to serve, also after a crash. The old state is gone
    /// from here on. An open sink of an earlier call is superseded, and fails from now on.
    ///
    /// The shard's applied position becomes [`BaseInfo::base_lsn`]: records after it may be applied at once.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the target takes no bases, or if its own state is newer than the offered base, in which
    /// case nothing has changed. [`Error::Mismatch`] if the image does not fit.
    fn begin_base(&self, shard: ShardId, info: BaseInfo) -> Result<Box<dyn BaseSink>> {
        let _ = info;
        Err(Error::invalid(format!("the target takes no base of shard {shard}: it has no `begin_base`")))
    }

    /// Follower side: the shard's state is of a history that is over, and gives way to a base whatever its LSN. Sets
    /// the durable mark of [a rebuild](Self::begin_base), which follows at once: the target refuses to serve from here
    /// on.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the target takes no bases; [`Error::Io`].
    fn give_up(&self, shard: ShardId) -> Result<()> {
        Err(Error::invalid(format!(
            "the target cannot give up its state of shard {shard}, which no leader has any more"
        )))
    }

    /// Whether an interrupted rebuild can go on with what is in this target: see [`resume_base`](Self::resume_base).
    fn resumes_bases(&self) -> bool {
        false
    }

    /// Follower side: goes on with a rebuild that was interrupted, in this process or before a crash. The mark stands
    /// and stays. Blocks below [`KeptBase::blocks`] are kept, all others are blank again; the shard's applied position
    /// becomes the lower one of [`KeptBase::applied`] and [`BaseInfo::base_lsn`], and the log is applied again from
    /// there. For that a record must not change a kept block that is newer.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the target does not do this, or no rebuild was interrupted; [`Error::Mismatch`] if the
    /// image does not fit. The rebuild then begins anew.
    fn resume_base(&self, shard: ShardId, info: BaseInfo, kept: KeptBase) -> Result<Box<dyn BaseSink>> {
        let _ = (info, kept);
        Err(Error::invalid(format!("the target cannot go on with a base of shard {shard}")))
    }

    /// Appends the numbers of the blocks that a record touches to `blocks`, deletes and trims included. Returns false
    /// if this target cannot number its blocks: its bases have a [`block_len`](BaseInfo::block_len) of 0 then, and are
    /// consistent snapshots, with the log applied after them. Asked on the follower, and of numbered bases only.
    ///
    /// # Errors
    ///
    /// If the record cannot be understood.
    fn blocks_of(&self, shard: ShardId, record: Record<'_>, blocks: &mut Vec<BlockId>) -> Result<bool> {
        let _ = (shard, record, blocks);
        Ok(false)
    }
}

/// The number of one block of a target's state, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct BlockId(pub u64);

impl BlockId {
    /// The number inside.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// What a base is, before any of its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BaseInfo {
    /// A flushed boundary: every record up to here is in the image. Single blocks may be newer.
    pub base_lsn: Lsn,
    /// Bytes of each block; 0 for an image without numbered blocks, which is a consistent snapshot at `base_lsn` sent
    /// as chunks of any size.
    pub block_len: u32,
    /// Blocks of the image, of which those that are blank need not be sent; 0 where blocks have no numbers.
    pub block_count: u64,
}

impl BaseInfo {
    /// Whether the blocks of the image have numbers, so that base and log can be applied at the same time.
    #[must_use]
    pub const fn is_numbered(&self) -> bool {
        self.block_len != 0
    }
}

/// What an interrupted rebuild has left in a target on stable storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeptBase {
    /// Blocks below this number have come, and are at least as new as `applied`.
    pub blocks: u64,
    /// Up to here the log is in these blocks.
    pub applied: Lsn,
}

/// Consecutive blocks of a base, as put into a buffer by [`BaseSource::next_run`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRun {
    /// The first block; for an image without numbered blocks, the number of the chunk, counted from 0.
    pub first: BlockId,
    /// How many blocks; 1 for a chunk.
    pub count: u32,
    /// Bytes in the buffer: `count` times the block length, or the length of the chunk.
    pub len: usize,
}

/// An image of a target's state that is being read.
pub trait BaseSource: Send {
    /// What the image is. Never changes.
    fn info(&self) -> BaseInfo;

    /// Puts the next consecutive blocks into the front of `buffer`, as many as fit, ascending; blank blocks are left
    /// out. `None` at the end.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] for a damaged block, [`Error::Invalid`] if not even one block fits in the buffer. The source
    /// is of no use after an error.
    fn next_run(&mut self, buffer: &mut [u8]) -> Result<Option<BlockRun>>;

    /// Blocks before `first` need not be given: the follower has them. Before the first run only. A source that gives
    /// them all the same wastes time and does no harm.
    fn skip_to(&mut self, first: BlockId) {
        let _ = first;
    }
}

/// A target's state that is being replaced. Dropping it is the same as [`cancel`](Self::cancel).
pub trait BaseSink: Send {
    /// Takes one block, or one chunk of an image without numbered blocks (in order). A block that an applied record has
    /// made newer stays as it is. May be called while records are applied.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the bytes are no such block, or the sink has been superseded; I/O errors.
    fn put_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<()>;

    /// Takes consecutive numbered blocks, each of `block_len` bytes: one by one, unless a target knows better.
    ///
    /// # Errors
    ///
    /// As [`put_block`](Self::put_block). Blocks before the failing one may have been taken.
    fn put_blocks(&mut self, first: BlockId, block_len: usize, bytes: &[u8]) -> Result<()> {
        let mut blocks = bytes.chunks(block_len.max(1)).zip(0..);
        blocks.try_for_each(|(block, index)| self.put_block(BlockId(first.0.saturating_add(index)), block))
    }

    /// No more blocks with numbers below `next` come: those that did not are blank in the image, or a record has
    /// written them since. What records have written to blocks from there on a target may keep back, in memory say, as
    /// nothing of it counts if the rebuild is interrupted; below `next` it is part of what [`ReplicationTarget::sync`]
    /// makes durable.
    ///
    /// For numbered blocks only. Called before the first block, and then with the same number or a larger one after
    /// each run. A target that is never told must keep nothing back: whoever wraps a sink passes this on.
    ///
    /// # Errors
    ///
    /// As [`put_block`](Self::put_block).
    fn pass(&mut self, next: BlockId) -> Result<()> {
        let _ = next;
        Ok(())
    }

    /// The LSN that must be applied before the image is a state that ever was: the newest record whose effect came
    /// with a block, and at least the base LSN. Grows with every block; final once all blocks are in.
    fn consistent_from(&self) -> Lsn;

    /// Ends the rebuild: makes everything durable, then takes the mark away. `achieved` is the LSN that the log lane
    /// has reached. May be tried again after an [`Error::Invalid`].
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if less than `achieved` or [`consistent_from`](Self::consistent_from) has been applied, or
    /// the sink has been superseded; damage and I/O errors. The mark then stands.
    fn complete(&mut self, achieved: Lsn) -> Result<()>;

    /// Fails if a block that a [resumed](ReplicationTarget::resume_base) rebuild has kept is damaged, now that the
    /// local log has been applied over it.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`]: the rebuild has to begin anew.
    fn check_kept(&mut self) -> Result<()> {
        Ok(())
    }

    /// Gives up. The mark stands: the target serves nothing until another rebuild completes.
    fn cancel(&mut self);
}

/// Fixed properties of a target; zeros where it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TargetTopology {
    /// The longest key, in bytes.
    pub key_len: u32,
    /// The longest value, in bytes.
    pub value_len: u32,
    /// How many leading bits of a key choose its shard; 0 if a hash does.
    pub prefix_bits: u8,
}

impl TargetTopology {
    /// The first property that differs from another's, as half a sentence that names it and both values; `None` if
    /// they agree.
    ///
    /// ```
    /// # use towline::target::TargetTopology;
    /// let here = TargetTopology { key_len: 16, ..TargetTopology::default() };
    /// let there = TargetTopology { key_len: 32, ..here };
    /// assert_eq!(here.difference(&there).as_deref(), Some("key_len is 16 here and 32 there"));
    /// assert_eq!(here.difference(&here), None);
    /// ```
    #[must_use]
    pub fn difference(&self, there: &TargetTopology) -> Option<String> {
        let fields = [
            ("key_len", self.key_len, there.key_len),
            ("value_len", self.value_len, there.value_len),
            ("prefix_bits", u32::from(self.prefix_bits), u32::from(there.prefix_bits)),
        ];
        let (name, here, there) = fields.into_iter().find(|(_, here, there)| here != there)?;
        Some(format!("{name} is {here} here and {there} there"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::types::{Chain, Epoch, HybridTimestamp};
    use crate::wal::batch::{self, BatchIter, Expected};

    #[derive(Default)]
    struct Plain(Mutex<Vec<(u64, Vec<u8>)>>);

    impl ReplicationTarget for Plain {
        fn durable_applied(&self, _: ShardId) -> Result<Option<Lsn>> {
            Ok(None)
        }
        fn apply(&self, _: ShardId, record: Record<'_>) -> Result<()> {
            if record.bytes == b"bad" {
                return Err(Error::invalid("bad"));
            }
            self.0.lock().unwrap().push((record.lsn.0, record.bytes.to_vec()));
            Ok(())
        }
        fn sync(&self, _: ShardId) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_batch_is_applied_record_by_record_up_to_the_first_error() {
        let at = Expected { first_lsn: Lsn(5), chain: Chain(0), epoch: Epoch(1) };
        let bytes = batch::build(at, HybridTimestamp::default(), Lsn::ZERO, &[b"a", b"bad", b"c"]);
        let target = Plain::default();
        let batch = BatchIter::new(&bytes).next().unwrap();
        assert!(target.apply_batch(ShardId(0), &batch).is_err());
        assert_eq!(*target.0.lock().unwrap(), [(5, b"a".to_vec())]);
    }

    #[test]
    fn a_target_without_bases_says_so() {
        let target = Plain::default();
        assert!(target.open_base(ShardId(3)).err().unwrap().to_string().contains("shard 3"));
        assert!(target.begin_base(ShardId(3), BaseInfo::default()).is_err());
        let record = Record { lsn: Lsn(1), bytes: b"" };
        assert!(!target.blocks_of(ShardId(0), record, &mut Vec::new()).unwrap());
    }

    #[test]
    fn every_difference_is_named() {
        let here = TargetTopology { key_len: 1, value_len: 2, prefix_bits: 3 };
        let text = |there| here.difference(&there).unwrap();
        assert_eq!(text(TargetTopology { value_len: 9, ..here }), "value_len is 2 here and 9 there");
        assert_eq!(text(TargetTopology { prefix_bits: 0, ..here }), "prefix_bits is 3 here and 0 there");
    }
}
