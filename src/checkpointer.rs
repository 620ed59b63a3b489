//! How far a node has come, in a file: `replication.ckpt`, written while marks move, and the thread that does it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::{Error, Result};
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
    /// Told of the first error that a shard's target meets in a sync. Called while `state` is locked.
    sync_failed: SyncFailed,
    state: Mutex<CheckpointState>,
    /// Counts shards forgotten and taken up again, so that the waiting thread looks at the new ones.
    changes: Watermark,
}

/// Ends what goes on in a shard whose target takes nothing more.
pub(crate) type SyncFailed = Box<dyn Fn(ShardId, Error) + Send + Sync>;

struct CheckpointState {
    /// By number; none for a shard that is being rebuilt: the checkpoint says nothing of it.
    shards: Vec<Option<CheckpointShard>>,
    /// What stands in the file meanwhile of a shard whose log is being cut.
    held: BTreeMap<ShardId, CheckpointEntry>,
    /// What stands in the file.
    saved: Checkpoint,
    /// What could not be written to it at the last attempt: the next one comes when something has moved beyond that.
    unsaved: Option<Checkpoint>,
}

/// What the checkpoint says of one shard comes from here.
#[derive(Clone)]
pub(crate) struct CheckpointShard {
    pub(crate) log: Arc<Log>,
    /// Up to where the target has applied, and the target; none on a node without one, and once its sync has failed.
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
        sync_failed: SyncFailed,
    ) -> Arc<Checkpointer> {
        let state = Mutex::new(CheckpointState { shards, held: BTreeMap::new(), saved, unsaved: None });
        Arc::new(Checkpointer { path, hurry, stop, registry, sync_failed, state, changes: Watermark::default() })
    }

    pub(crate) fn run(&self) {
        while !self.stop.is_shutdown() {
            let hurry = self.hurry.load().next();
            self.wait_for_movement(hurry);
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

    /// Says nothing about a shard any more; durable on return. Recovery takes what the checkpoint calls synced and the
    /// log lacks for damage, so this comes before a log is removed.
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
        self.look_again(&mut state);
        Ok(())
    }

    /// Says no more about a shard than that `lsn` is synced and applied, and that until it is taken up again; durable
    /// on return. For a log that is about to be cut there.
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
        self.look_again(&mut state);
        Ok(())
    }

    /// Says something about a shard again.
    pub(crate) fn take_up(&self, shard: ShardId, with: CheckpointShard) {
        let mut state = self.state.lock();
        if let Some(place) = state.shards.get_mut(usize::from(shard.0)) {
            *place = Some(with);
        }
        state.held.remove(&shard);
        self.look_again(&mut state);
    }

    /// Has the waiting thread look at the shards as they are now.
    fn look_again(&self, state: &mut CheckpointState) {
        state.unsaved = None;
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

    /// Waits until there is more to say than at the last attempt, or, where that failed, for whoever is in a hurry.
    fn wait_for_movement(&self, hurry: Lsn) {
        let changes = self.changes.load();
        let (shards, saved, unsaved) = {
            let state = self.state.lock();
            (state.shards.clone(), state.saved.clone(), state.unsaved.clone())
        };
        let mut conditions = vec![self.stop.until(), self.changes.until(changes.next())];
        conditions.extend(unsaved.as_ref().map(|_| self.hurry.until(hurry)));
        let said = unsaved.as_ref().unwrap_or(&saved);
        for shard in shards.iter().flatten() {
            let entry = said.entries.get(&shard.log.shard()).copied().unwrap_or_default();
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
    ///
    /// A target whose sync fails is not asked again: another sync may succeed although what it has applied is lost. It
    /// has no more to say here, and whoever uses the shard is told.
    fn save(&self, state: &mut CheckpointState) -> Result<()> {
        let mut checkpoint = Checkpoint { entries: state.held.clone() };
        for shard in state.shards.iter_mut().flatten() {
            let id = shard.log.shard();
            let synced = shard.log.synced().load();
            let before = state.saved.entries.get(&id).copied().unwrap_or_default();
            // A node without a target carries along what it once applied.
            let mut applied = before.applied;
            if let Some((mark, target)) = &shard.applied {
                let reached = mark.load();
                let result = if reached == before.applied { Ok(()) } else { mark.sync(target.as_ref(), id) };
                match result {
                    // A record that is applied here but not yet synced in the log would be ahead of it after a crash.
                    Ok(()) => applied = reached.min(synced),
                    // The other shards' checkpoints do not wait for this one's.
                    Err(error) => {
                        log::error!("syncing for the checkpoint: {error}");
                        (self.sync_failed)(id, error);
                        shard.applied = None;
                    }
                }
            }
            checkpoint.entries.insert(id, CheckpointEntry { applied, synced });
        }
        state.unsaved = None;
        if checkpoint != state.saved {
            let saved = checkpoint.save(&self.path);
            state.unsaved = saved.is_err().then(|| checkpoint.clone());
            saved?;
            state.saved = checkpoint;
        }
        for shard in state.shards.iter().flatten() {
            let entry = state.saved.entries.get(&shard.log.shard()).copied().unwrap_or_default();
            shard.saved.advance(entry.applied);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::applier::Applier;
    use crate::types::{ClusterId, Epoch, RegionId};
    use crate::wal::{LogIdentity, LogWriter, Record, Wal, WalOptions};

    /// Counts syncs, and fails every one, or the first.
    #[derive(Default)]
    struct Failing {
        syncs: AtomicUsize,
        once: bool,
    }

    impl ReplicationTarget for Failing {
        fn durable_applied(&self, _: ShardId) -> Result<Option<Lsn>> {
            Ok(None)
        }
        fn apply(&self, _: ShardId, _: Record<'_>) -> Result<()> {
            Ok(())
        }
        fn sync(&self, _: ShardId) -> Result<()> {
            match self.syncs.fetch_add(1, Ordering::Relaxed) {
                1.. if self.once => Ok(()),
                _ => Err(Error::invalid("the device took it back")),
            }
        }
    }

    fn open(directory: &Path) -> (Wal, LogWriter) {
        let identity =
            LogIdentity { cluster: ClusterId(1), region: RegionId(0), shard: ShardId(0), segment_size: 64 * 1024 };
        let (wal, mut writer) = Wal::open(&directory.join("log"), identity, WalOptions::default()).unwrap();
        writer.set_epoch(Epoch(1)).unwrap();
        (wal, writer)
    }

    /// Appends a record, and has it synced and applied.
    fn go_on(writer: &mut LogWriter, applied: &AppliedMark) -> Lsn {
        let lsn = writer.append(b"record").unwrap();
        writer.log().wait_synced(lsn, None).unwrap();
        applied.publish(lsn);
        lsn
    }

    /// One shard, kept in `path`, and what was told of syncs that failed.
    fn checkpointer(path: PathBuf, shard: CheckpointShard) -> (Arc<Checkpointer>, Arc<Mutex<Vec<ShardId>>>) {
        let registry = Registry::open(&path.with_file_name("followers"), 1).unwrap();
        let told = Arc::new(Mutex::new(Vec::new()));
        let failures = Arc::clone(&told);
        let sync_failed: SyncFailed = Box::new(move |shard, _| failures.lock().push(shard));
        let (shards, hurry, stop) = (vec![Some(shard)], Arc::default(), ShutdownSignal::new());
        (Checkpointer::new(path, shards, hurry, stop, Arc::new(registry), Checkpoint::default(), sync_failed), told)
    }

    /// Whether there is nothing to do until `moves` has moved something.
    fn waits_for(checkpointer: &Checkpointer, moves: impl FnOnce()) -> bool {
        let hurry = checkpointer.hurry.load().next();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| checkpointer.wait_for_movement(hurry));
            std::thread::sleep(Duration::from_millis(20));
            let waits = !waiting.is_finished();
            moves();
            waits
        })
    }

    #[test]
    fn the_first_sync_of_a_target_that_fails_is_told_and_is_the_last() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("log")).unwrap();
        let (wal, mut writer) = open(directory.path());
        let (target, applied) = (Arc::new(Failing::default()), AppliedMark::new(Lsn::ZERO, Arc::default(), true));
        let shard = CheckpointShard::new(Arc::clone(wal.log()), Some((Arc::clone(&applied), Arc::clone(&target) as _)));
        let saved = Arc::clone(&shard.saved);
        let path = directory.path().join("checkpoint");
        let (checkpointer, told) = checkpointer(path.clone(), shard);
        go_on(&mut writer, &applied);
        checkpointer.save_or_say();
        assert_eq!(*told.lock(), [ShardId(0)]);
        // What else there is to say of the shard is still said, and when there is.
        let mut lsn = Lsn::ZERO;
        assert!(waits_for(&checkpointer, || lsn = go_on(&mut writer, &applied)));
        checkpointer.finish();
        let entry = Checkpoint::load(&path).unwrap().unwrap().entries[&ShardId(0)];
        assert_eq!(entry, CheckpointEntry { applied: Lsn::ZERO, synced: lsn });
        assert_eq!((target.syncs.load(Ordering::Relaxed), told.lock().len(), saved.load()), (1, 1, Lsn::ZERO));
    }

    /// What breaks: the device, when an applier has its target sync for the last time. What would be lost: what is
    /// applied, were the checkpoint to have it synced once more.
    #[test]
    fn what_an_applier_could_not_have_synced_is_not_said() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("log")).unwrap();
        let (wal, mut writer) = open(directory.path());
        let target = Arc::new(Failing { once: true, ..Failing::default() });
        let applied = AppliedMark::new(Lsn::ZERO, Arc::default(), true);
        let shard = CheckpointShard::new(Arc::clone(wal.log()), Some((Arc::clone(&applied), Arc::clone(&target) as _)));
        let path = directory.path().join("checkpoint");
        let (checkpointer, told) = checkpointer(path.clone(), shard);
        let lsn = go_on(&mut writer, &applied);
        let stop = ShutdownSignal::new();
        stop.shutdown();
        let (log, marks) = (Arc::clone(wal.log()), Arc::clone(&applied));
        let applier =
            Applier { shard: ShardId(0), log, target: Arc::clone(&target) as _, applied: marks, rebuild: None, stop };
        assert!(applier.run().is_err());
        checkpointer.finish();
        // Nor of a log that is cut before following ends for that.
        let cut = Some((applied.cut_behind(lsn), Arc::clone(&target) as _));
        checkpointer.take_up(ShardId(0), CheckpointShard::new(Arc::clone(wal.log()), cut));
        checkpointer.finish();
        let entry = Checkpoint::load(&path).unwrap().unwrap().entries[&ShardId(0)];
        assert_eq!(entry, CheckpointEntry { applied: Lsn::ZERO, synced: lsn });
        assert_eq!((target.syncs.load(Ordering::Relaxed), told.lock().len()), (1, 2));
    }

    #[test]
    fn a_checkpoint_that_cannot_be_written_waits_for_the_next_movement_or_for_whoever_hurries() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("log")).unwrap();
        let (wal, mut writer) = open(directory.path());
        let applied = AppliedMark::new(Lsn::ZERO, Arc::default(), true);
        let shard = CheckpointShard::new(Arc::clone(wal.log()), None);
        let path = directory.path().join("checkpoint");
        let (checkpointer, _) = checkpointer(path.clone(), shard);
        std::fs::create_dir(&path).unwrap();
        go_on(&mut writer, &applied);
        checkpointer.save_or_say();
        assert!(waits_for(&checkpointer, || assert!(checkpointer.hurry.advance(Lsn(1)))));
        let mut lsn = Lsn::ZERO;
        assert!(waits_for(&checkpointer, || lsn = go_on(&mut writer, &applied)));
        std::fs::remove_dir(&path).unwrap();
        checkpointer.save_or_say();
        assert_eq!(Checkpoint::load(&path).unwrap().unwrap().entries[&ShardId(0)].synced, lsn);
        assert!(checkpointer.state.lock().unsaved.is_none());
    }
}
