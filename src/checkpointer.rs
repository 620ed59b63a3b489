//! How far a node has come, in a file: `replication.ckpt`, written while marks move, and the thread that does it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::Result;
use crate::follower_shard::AppliedMark;
use crate::registry::Registry;
use crate::replication::{Checkpoint, CheckpointEntry};
use crate::shutdown::ShutdownSignal;
use crate::target::ReplicationTarget;
use crate::types::{Lsn, ShardId};
use crate::wal::Log;
use crate::watermark::{Until, WaitStrategy, Watermark, wait_any};

/// Writes `replication.ckpt` when marks have moved, at most once a second, on a thread of its own; and once more when
/// everything else has stopped.
pub(crate) struct Checkpointer {
    path: PathBuf,
    /// Moves when somebody waits for what the checkpoint would say.
    hurry: Arc<Watermark>,
    stop: ShutdownSignal,
    /// Where followers stand is written with it.
    registry: Arc<Registry>,
    state: Mutex<CheckpointState>,
    /// Counts shards forgotten and taken up again, so that the waiting thread looks at the new ones.
    changes: Watermark,
}

struct CheckpointState {
    /// By number; none for a shard that is being rebuilt: the checkpoint says nothing of it.
    shards: Vec<Option<CheckpointShard>>,
    /// What stands in the file meanwhile of a shard whose log is being cut.
    held: BTreeMap<ShardId, CheckpointEntry>,
    /// What stands in the file.
    saved: Checkpoint,
}

/// What the checkpoint says of one shard comes from here.
#[derive(Clone)]
pub(crate) struct CheckpointShard {
    pub(crate) log: Arc<Log>,
    /// Up to where the target has applied, and the target; none on a node without one.
    pub(crate) applied: Option<(Arc<AppliedMark>, Arc<dyn ReplicationTarget>)>,
    /// Up to where it has applied durably. Moved by the checkpointer.
    pub(crate) saved: Arc<Watermark>,
}

impl CheckpointShard {
    /// Applying begins where the target is durable.
    pub(crate) fn new(
        log: Arc<Log>,
        applied: Option<(Arc<AppliedMark>, Arc<dyn ReplicationTarget>)>,
    ) -> CheckpointShard {
        let saved = applied.as_ref().map_or(Lsn::ZERO, |(applied, _)| applied.load());
        CheckpointShard { log, applied, saved: Arc::new(Watermark::new(saved)) }
    }
}

const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(1);

impl Checkpointer {
    pub(crate) fn new(
        path: PathBuf,
        shards: Vec<Option<CheckpointShard>>,
        hurry: Arc<Watermark>,
        stop: ShutdownSignal,
        registry: Arc<Registry>,
        saved: Checkpoint,
    ) -> Arc<Checkpointer> {
        let state = Mutex::new(CheckpointState { shards, held: BTreeMap::new(), saved });
        Arc::new(Checkpointer { path, hurry, stop, registry, state, changes: Watermark::default() })
    }

    pub(crate) fn run(&self) {
        while !self.stop.is_shutdown() {
            let changes = self.changes.load();
            let hurry = self.hurry.load().next();
            let (shards, saved) = {
                let state = self.state.lock();
                (state.shards.clone(), state.saved.clone())
            };
            self.wait_for_movement(&shards, &saved, changes);
            drop(shards);
            let conditions = [self.stop.until(), self.hurry.until(hurry)];
            wait_any(&conditions, WaitStrategy::Park, Instant::now().checked_add(CHECKPOINT_INTERVAL));
            if !self.stop.is_shutdown() {
                self.save_or_say();
            }
        }
    }

    /// The last checkpoint: to be called when appliers have ended and logs are synced, as marks move until then.
    pub(crate) fn finish(&self) {
        self.save_or_say();
    }

    /// Says nothing about a shard any more; durable on return. Recovery takes what the checkpoint calls synced and the log
    /// lacks for damage, so this comes before a log is removed.
    pub(crate) fn forget(&self, shard: ShardId) -> Result<()> {
        let mut state = self.state.lock();
        if let Some(place) = state.shards.get_mut(usize::from(shard.0)) {
            *place = None;
        }
        state.held.remove(&shard);
        let mut checkpoint = state.saved.clone();
        if checkpoint.entries.remove(&shard).is_some() {
            checkpoint.save(&self.path)?;
            state.saved = checkpoint;
        }
        self.changes.advance(self.changes.load().next());
        Ok(())
    }

    /// Says no more about a shard than that `lsn` is synced and applied, and that until it is taken up again; durable on
    /// return. For a log that is about to be cut there.
    pub(crate) fn lower(&self, shard: ShardId, lsn: Lsn) -> Result<()> {
        let mut state = self.state.lock();
        if let Some(place) = state.shards.get_mut(usize::from(shard.0)) {
            *place = None;
        }
        let mut checkpoint = state.saved.clone();
        if let Some(entry) = checkpoint.entries.get_mut(&shard) {
            *entry = CheckpointEntry { applied: entry.applied.min(lsn), synced: entry.synced.min(lsn) };
            let lowered = *entry;
            checkpoint.save(&self.path)?;
            state.saved = checkpoint;
            state.held.insert(shard, lowered);
        }
        self.changes.advance(self.changes.load().next());
        Ok(())
    }

    /// Says something about a shard again.
    pub(crate) fn take_up(&self, shard: ShardId, with: CheckpointShard) {
        let mut state = self.state.lock();
        if let Some(place) = state.shards.get_mut(usize::from(shard.0)) {
            *place = Some(with);
        }
        state.held.remove(&shard);
        self.changes.advance(self.changes.load().next());
    }

    fn save_or_say(&self) {
        if let Err(error) = self.save(&mut self.state.lock()) {
            log::error!("the checkpoint was not written: {error}");
        }
        if let Err(error) = self.registry.save() {
            log::error!("where followers stand was not written: {error}");
        }
    }

    fn wait_for_movement(&self, shards: &[Option<CheckpointShard>], saved: &Checkpoint, changes: Lsn) {
        let mut conditions = vec![self.stop.until(), self.changes.until(changes.next())];
        for shard in shards.iter().flatten() {
            let entry = saved.entries.get(&shard.log.shard()).copied().unwrap_or_default();
            conditions.push(Until { mark: shard.log.synced(), at_least: entry.synced.next() });
            let Some((applied, _)) = &shard.applied else { continue };
            if applied.load().min(shard.log.synced().load()) > entry.applied {
                return;
            }
            // What is applied but not synced counts once it is synced.
            if applied.load() == entry.applied {
                conditions.push(Until { mark: applied.own(), at_least: entry.applied.next() });
            }
        }
        wait_any(&conditions, WaitStrategy::Park, None);
    }

    /// Makes what is applied durable in the target first, so that the checkpoint never says more than the target has.
    fn save(&self, state: &mut CheckpointState) -> Result<()> {
        let mut checkpoint = Checkpoint { entries: state.held.clone() };
        for shard in state.shards.iter().flatten() {
            let id = shard.log.shard();
            let synced = shard.log.synced().load();
            let before = state.saved.entries.get(&id).copied().unwrap_or_default();
            // A node without a target carries along what it once applied.
            let mut applied = before.applied;
            if let Some((mark, target)) = &shard.applied {
                applied = mark.load();
                if before.applied != applied
                    && let Err(error) = target.sync(id)
                {
                    // The other shards' checkpoints do not wait for this one's.
                    log::error!("shard {id}: the target did not sync: {error}");
                    applied = before.applied;
                }
                // A record that is applied here but not yet synced in the log would be ahead of it after a crash.
                applied = applied.min(synced);
            }
            checkpoint.entries.insert(id, CheckpointEntry { applied, synced });
        }
        if checkpoint != state.saved {
            checkpoint.save(&self.path)?;
            state.saved = checkpoint;
        }
        for shard in state.shards.iter().flatten() {
            let entry = state.saved.entries.get(&shard.log.shard()).copied().unwrap_or_default();
            shard.saved.advance(entry.applied);
        }
        Ok(())
    }
}
