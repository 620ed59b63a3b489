//! One shard of a follower: its log, the log's writer and the applier, as one thing that can be replaced while the node
//! runs.
//!
//! The shard's receiver owns it. Other threads see its log and its marks through the server, the checkpoint and
//! [`ShardState`], and are given the new ones when a rebuild replaces the log.
//!
//! # Replacing the log
//!
//! | step | a crash after it leaves |
//! |---|---|
//! | it is written down up to where the rebuild must come | the old log; it says nothing of a target that is whole |
//! | the target has its mark | the old log, and a target that asks for a rebuild |
//! | the checkpoint forgets the shard | the same; recovery expects nothing of the log |
//! | the old segments are removed, newest first | a beginning of the old log |
//! | the first header page has arrived | a log that begins there |
//!
//! # Cutting the log
//!
//! Where the newest records are of an epoch that ended without them, and nothing of them can be in the target, the log
//! is [cut](crate::wal) and opened again. No stream carries anything meanwhile, and the applier has ended.
//!
//! | step | a crash after it leaves |
//! |---|---|
//! | the checkpoint says no more of the shard than is kept | the old log |
//! | the log is cut | a beginning of the old log, in the end as long as what is kept |
//!
//! Each of them is told to the leader again, which decides again.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;

use crate::applier::Applier;
use crate::caught::caught;
use crate::checkpointer::{CheckpointShard, Checkpointer};
use crate::error::{Error, RefusalCode, Result};
use crate::follower::{Following, ShardState};
use crate::node::running::NODE_THREAD_STACK;
use crate::rebuild::interrupted::Interrupted;
use crate::rebuild::owed::Owed;
use crate::rebuild::{RebuildContract, RebuildSession};
use crate::server::{Server, ServerShard};
use crate::shutdown::ShutdownSignal;
use crate::small_file;
use crate::target::ReplicationTarget;
use crate::types::{Epoch, Lsn, ShardId};
use crate::wal::{self, KnownSynced, Log, LogIdentity, LogPosition, LogWriter, Wal, WalOptions, WrittenHere};
use crate::watermark::Watermark;

/// One shard of a follower.
pub(crate) struct FollowerShard {
    pub(crate) shard: ShardId,
    pub(crate) node: Arc<Following>,
    pub(crate) state: Arc<ShardState>,
    pub(crate) server: Arc<Server>,
    pub(crate) checkpointer: Arc<Checkpointer>,
    /// None only after replacing it failed; following then ends.
    pub(crate) open: Option<(Wal, LogWriter)>,
    /// The head of the log when it was opened: up to there records may have been given to the target by whoever had the
    /// log open before.
    pub(crate) opened_with: Lsn,
    pub(crate) applied: Arc<AppliedMark>,
    /// Up to where that is durable. Moved by the checkpointer, and during a rebuild by whoever saves how far that has
    /// come.
    pub(crate) saved: Arc<Watermark>,
    pub(crate) applier: Option<RunningApplier>,
    /// This node has led, and its newest records may be nobody else's: nothing is applied before a leader has been met.
    pub(crate) awaits_leader: bool,
    /// The leader met last has shown that it may replace what this node has, however new that is.
    pub(crate) gives_way: bool,
    /// What the leader has been told that another rebuild can go on with.
    pub(crate) interrupted: Option<Interrupted>,
    /// Up to where the leader has been told that records are applied. The applier may have gone on since.
    pub(crate) told_applied: Lsn,
    /// Where the leader was when the stream began, until the log is there too.
    pub(crate) catches_up_at: Option<Lsn>,
}

/// Up to where a shard's target has applied its log.
#[derive(Debug)]
pub(crate) struct AppliedMark {
    /// Of the present log: a rebuild begins with another one. Moved by the shard's applier only, or by its receiver if
    /// it has none.
    own: Watermark,
    /// What the node tells: it lives as long as the node, never moves back, and stands still while the target is being
    /// rebuilt and serves nothing.
    told: Arc<Watermark>,
    is_told: AtomicBool,
    /// Why a sync of the target has failed, if one has.
    sync_failed: Mutex<Option<String>>,
}

impl AppliedMark {
    /// A mark at `applied`, told unless the target is being rebuilt.
    pub(crate) fn new(applied: Lsn, told: Arc<Watermark>, is_told: bool) -> Arc<AppliedMark> {
        let own = Watermark::new(applied);
        let mark = AppliedMark { own, told, is_told: AtomicBool::new(false), sync_failed: Mutex::default() };
        if is_told {
            mark.tell();
        }
        Arc::new(mark)
    }

    /// The mark of what is left of its log when that is cut behind `lsn`. A sync that has failed has failed for it too.
    pub(crate) fn cut_behind(&self, lsn: Lsn) -> Arc<AppliedMark> {
        let is_told = AtomicBool::new(self.is_told.load(Ordering::SeqCst));
        let sync_failed = Mutex::new(self.sync_failed.lock().clone());
        let own = Watermark::new(self.load().min(lsn));
        Arc::new(AppliedMark { own, told: Arc::clone(&self.told), is_told, sync_failed })
    }

    /// What the node tells.
    pub(crate) fn told(&self) -> &Arc<Watermark> {
        &self.told
    }

    pub(crate) fn own(&self) -> &Watermark {
        &self.own
    }

    pub(crate) fn load(&self) -> Lsn {
        self.own.load()
    }

    /// Has the target make durable what it has applied: for appliers that end, for rebuilds and for the checkpoint.
    /// Where a sync has failed none asks again, as another one may succeed although what has been applied is lost.
    ///
    /// # Errors
    ///
    /// The target's, and [`Error::Poisoned`] ever after.
    pub(crate) fn sync(&self, target: &dyn ReplicationTarget, shard: ShardId) -> Result<()> {
        let mut failed = self.sync_failed.lock();
        if let Some(reason) = &*failed {
            return Err(Error::Poisoned { shard, reason: reason.clone() });
        }
        let sync = || target.sync(shard).map_err(Error::of_target(shard));
        let synced = caught(format_args!("the target of shard {shard}"), sync);
        synced.inspect_err(|error| *failed = Some(error.to_string()))
    }

    /// Whether a [sync](Self::sync) has failed.
    pub(crate) fn has_failed_to_sync(&self) -> bool {
        self.sync_failed.lock().is_some()
    }

    /// Moves it. For the one who does.
    pub(crate) fn publish(&self, lsn: Lsn) {
        self.own.publish(lsn);
        if self.is_told.load(Ordering::SeqCst) {
            self.told.advance(lsn);
        }
    }

    /// [`publish`](Self::publish) without waking anybody: the caller calls [`wake`](Self::wake) after something more
    /// urgent.
    pub(crate) fn publish_quietly(&self, lsn: Lsn) {
        self.own.publish_quietly(lsn);
        if self.is_told.load(Ordering::SeqCst) {
            self.told.advance_quietly(lsn);
        }
    }

    /// Wakes those who wait for what it has reached.
    pub(crate) fn wake(&self) {
        self.own.wake();
        self.told.wake();
    }

    /// Tells it from now on. The flag is set before the mark is read, and an applier moves the mark before it reads the
    /// flag, all in one order: one of the two tells what the other does not.
    pub(crate) fn tell(&self) {
        self.is_told.store(true, Ordering::SeqCst);
        self.told.advance(self.own.load());
    }
}

/// An applier on its thread.
pub(crate) struct RunningApplier {
    stop: ShutdownSignal,
    thread: JoinHandle<()>,
}

/// The rebuild that an applier works for.
#[derive(Clone)]
pub(crate) struct RebuildOfApplier {
    pub(crate) session: Arc<Mutex<RebuildSession>>,
    /// What ended the session, if an error did.
    pub(crate) failure: Arc<Mutex<Option<Error>>>,
    /// Ends the stream that serves it.
    pub(crate) over: ShutdownSignal,
}

impl FollowerShard {
    /// The writer of its log.
    pub(crate) fn writer(&mut self) -> Result<&mut LogWriter> {
        self.open.as_mut().map(|(_, writer)| writer).ok_or(Error::ShutDown)
    }

    /// Its log.
    pub(crate) fn log(&self) -> Result<Arc<Log>> {
        self.open.as_ref().map(|(wal, _)| Arc::clone(wal.log())).ok_or(Error::ShutDown)
    }

    pub(crate) fn target(&self) -> &Arc<dyn ReplicationTarget> {
        self.node.target()
    }

    /// Up to where the target may hold effects of records; zero if they leave none.
    pub(crate) fn touched(&self) -> Result<Lsn> {
        if !self.target().keeps_state() {
            return Ok(Lsn::ZERO);
        }
        let beyond = self.target().touched(self.shard)?.unwrap_or(self.opened_with);
        Ok(beyond.max(self.applied.load()))
    }

    /// Whether the target waits for a rebuild, so that nothing else can be applied to it.
    pub(crate) fn is_incomplete(&self) -> Result<bool> {
        self.target().is_rebuilding(self.shard)
    }

    /// Finds out what an interrupted rebuild has left that another can go on with; where that is not enough, says why
    /// and forgets it. Notes it for the rebuild that begins on this stream.
    pub(crate) fn find_interrupted(&mut self) -> Result<Option<Interrupted>> {
        self.interrupted = None;
        if !self.is_incomplete()? || !self.target().resumes_bases() {
            return Ok(None);
        }
        let found = match Interrupted::load(&self.node.rebuild_path(self.shard)) {
            Ok(None) => return Ok(None),
            Ok(Some(found)) => found,
            Err(error) if error.is_corruption() => {
                self.forget_interrupted(&error.to_string())?;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if let Some(reason) = self.is_beyond(&found)? {
            self.forget_interrupted(&reason)?;
            return Ok(None);
        }
        self.interrupted = Some(found);
        Ok(self.interrupted)
    }

    /// Why an interrupted rebuild cannot go on with the local log, if it cannot.
    fn is_beyond(&self, found: &Interrupted) -> Result<Option<String>> {
        let (log, applied) = (self.log()?, found.kept.applied);
        let epoch = self.node.manifest().epoch;
        Ok(if found.shard != self.shard {
            Some(format!("it was of shard {}", found.shard))
        } else if found.epoch != epoch {
            // Blocks can be newer than the local log, and only the leader of that term is known to have their records.
            Some(format!("its blocks came under epoch {}, and this is epoch {epoch}", found.epoch))
        } else if log.segments().is_empty() || log.tail() > applied.next() {
            Some(format!(
                "its blocks stand at LSN {applied}, and the local log holds LSN {} to {}",
                log.tail(),
                log.head()
            ))
        } else {
            None
        })
    }

    /// Writes down up to where a rebuild must come that is about to give up what is here, or what an interrupted one
    /// has left. Durable on return.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if an interrupted one was to come further under the same epoch: whoever serves this one has
    /// yet to come as far.
    pub(crate) fn owe(&self, contract: &RebuildContract) -> Result<()> {
        let (shard, path) = (self.shard, self.node.owed_path(self.shard));
        let RebuildContract { epoch, target: lsn, .. } = *contract;
        let before = if self.is_incomplete()? { Owed::load(&path, shard)? } else { None };
        let owed = before.filter(|owed| owed.epoch == epoch).map_or(Lsn::ZERO, |owed| owed.lsn);
        if lsn < owed {
            let reason = format!(
                "a rebuild to LSN {lsn} was to begin, and an earlier one under this epoch gave up what may have been \
                 acknowledged up to LSN {owed}: whoever serves it must have come as far"
            );
            return Err(Error::Refused { peer: "this node".to_owned(), code: RefusalCode::Superseded, reason });
        }
        if lsn == owed { Ok(()) } else { Owed { shard, epoch, lsn }.save(&path) }
    }

    /// The next rebuild begins anew. Durable on return.
    pub(crate) fn forget_interrupted(&mut self, reason: &str) -> Result<()> {
        self.interrupted = None;
        log::info!("shard {}: the interrupted rebuild cannot go on, and another begins anew: {reason}", self.shard);
        small_file::forget(&self.node.rebuild_path(self.shard))
    }

    /// The target stands at `applied` again, in a rebuild that goes on with the local log.
    pub(crate) fn set_back_applied(&mut self, applied: Lsn) {
        self.applied = AppliedMark::new(applied, Arc::clone(&self.applied.told), false);
        self.state.set_applied(&self.applied);
    }

    /// Starts the applier unless it runs already, or the target waits for a rebuild. Where what is received
    /// [counts as applied](Self::applies_at_once), there is none, and all that is in the log counts from now on.
    pub(crate) fn ensure_applier(&mut self) -> Result<()> {
        if self.applier.is_some() || self.is_incomplete()? {
            return Ok(());
        }
        if self.applies_at_once() {
            self.applied.publish(self.applied.load().max(self.log()?.head()));
            return Ok(());
        }
        self.start_applier(None)
    }

    /// Whether what is received counts as applied, so that the receiver moves the applied mark with the log's: the
    /// target takes no records, and no applier works for a rebuild of it.
    pub(crate) fn applies_at_once(&self) -> bool {
        self.applier.is_none() && !self.target().takes_records() && !self.target().needs_durable_log()
    }

    /// Starts the applier. An error that it meets in a rebuild ends the rebuild; any other ends following.
    pub(crate) fn start_applier(&mut self, rebuild: Option<RebuildOfApplier>) -> Result<()> {
        let stop = ShutdownSignal::new();
        let applier = Applier {
            shard: self.shard,
            log: self.log()?,
            target: Arc::clone(self.target()),
            applied: Arc::clone(&self.applied),
            rebuild: rebuild.as_ref().map(|rebuild| Arc::clone(&rebuild.session)),
            stop: stop.clone(),
        };
        let (node, shard) = (Arc::clone(&self.node), self.shard);
        let run = move || {
            let Err(error) = caught(format_args!("the target of shard {shard}"), || applier.run()) else { return };
            match rebuild.filter(|rebuild| !rebuild.session.lock().is_completed()) {
                Some(rebuild) => {
                    rebuild.failure.lock().get_or_insert(error);
                    rebuild.over.shutdown();
                }
                None => node.fail(shard, error),
            }
        };
        let name = format!("tl-apply-s{shard}");
        let thread = std::thread::Builder::new().name(name.clone()).stack_size(NODE_THREAD_STACK).spawn(run);
        self.applier = Some(RunningApplier { stop, thread: thread.map_err(Error::io("start thread", name))? });
        Ok(())
    }

    /// Ends the applier. What is in the log is still applied, unless a rebuild is what ended.
    pub(crate) fn stop_applier(&mut self) {
        let Some(RunningApplier { stop, thread }) = self.applier.take() else { return };
        stop.shutdown();
        if thread.join().is_err() {
            log::error!("the applier of shard {} panicked", self.shard);
        }
    }

    /// Replaces the log by an empty one that begins with `first_lsn`, for a target that has applied `base_lsn` and
    /// tells nobody. The target has its mark and the applier has ended.
    ///
    /// # Errors
    ///
    /// [`Error::Poisoned`]: the shard has no log then, and following must end.
    pub(crate) fn replace_log(&mut self, first_lsn: Lsn, base_lsn: Lsn, newest_epoch: Epoch) -> Result<()> {
        let shard = self.shard;
        self.replace(first_lsn, base_lsn, newest_epoch).map_err(|error| match error {
            Error::Poisoned { .. } | Error::ShutDown => error,
            other => Error::Poisoned { shard, reason: other.to_string() },
        })
    }

    fn replace(&mut self, first_lsn: Lsn, base_lsn: Lsn, newest_epoch: Epoch) -> Result<()> {
        self.checkpointer.forget(self.shard)?;
        let (identity, options, path) = self.log_settings();
        self.applied = AppliedMark::new(base_lsn, Arc::clone(&self.applied.told), false);
        self.saved = Arc::new(Watermark::new(base_lsn));
        self.opened_with = base_lsn;
        self.reopen(|| Wal::open_at(&path, identity, options, first_lsn, newest_epoch))
    }

    /// Cuts the log at a place of it, behind which nothing has been applied. What was told of marks stays told: they
    /// stand still until the log has come that far again.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if something behind it has been applied after all, since the leader was told otherwise: it is
    /// to be told again. [`Error::Poisoned`]: the shard has no log then, and following must end.
    pub(crate) fn cut_log(&mut self, place: &LogPosition) -> Result<()> {
        let shard = self.shard;
        let (head, epoch) = self.writer().map(|writer| (writer.end().head, writer.end().epoch))?;
        log::warn!(
            "shard {shard}: cutting the log, which has LSN {head} of epoch {epoch}, behind LSN {}: what follows is not the \
             leader's, and was applied to nothing",
            place.lsn
        );
        self.stop_applier();
        let touched = if self.is_incomplete()? { Lsn::ZERO } else { self.touched()? };
        if touched > place.lsn {
            let reason =
                format!("the log was to be cut behind LSN {}, and LSN {touched} has been applied since", place.lsn);
            return Err(Error::Refused { peer: "this node".to_owned(), code: RefusalCode::Superseded, reason });
        }
        self.cut(place).map_err(|error| match error {
            Error::Poisoned { .. } | Error::ShutDown => error,
            other => Error::Poisoned { shard, reason: other.to_string() },
        })
    }

    fn cut(&mut self, place: &LogPosition) -> Result<()> {
        self.checkpointer.lower(self.shard, place.lsn)?;
        let (identity, options, path) = self.log_settings();
        self.applied = self.applied.cut_behind(place.lsn);
        self.saved = Arc::new(Watermark::new(self.saved.load().min(self.applied.load())));
        self.reopen(|| {
            wal::cut(&path, identity.segment_size, place)?;
            Wal::open(&path, identity, options)
        })?;
        self.opened_with = place.lsn;
        if !self.is_incomplete()? {
            self.checkpointer.take_up(self.shard, self.checkpoint_shard()?);
        }
        Ok(())
    }

    /// Feeds others from now on, if it can: the log has reached where the leader of this epoch was.
    pub(crate) fn feed(&self, epoch: Epoch) -> Result<()> {
        self.server.shard(self.shard)?.host.set_caught_up(epoch, !self.is_incomplete()?);
        Ok(())
    }

    /// Feeds no other node until this one has caught up again: its log or its target become others.
    pub(crate) fn withdraw(&self) -> Result<()> {
        self.server.shard(self.shard)?.host.withdraw();
        Ok(())
    }

    fn log_settings(&self) -> (LogIdentity, WalOptions, PathBuf) {
        let manifest = self.node.manifest();
        let identity = LogIdentity {
            cluster: manifest.cluster,
            region: manifest.region,
            shard: self.shard,
            segment_size: manifest.segment_size,
        };
        // Nothing needs to be known: all that the log keeps is synced before it is opened again, or it is empty.
        let known_synced = KnownSynced { lsn: Lsn::ZERO, written_here: WrittenHere::Nothing };
        let options = WalOptions { known_synced, ..self.node.options.wal };
        (identity, options, self.node.shard_path(self.shard))
    }

    /// Closes the log and puts the one that `open` gives in its place, everywhere.
    fn reopen(&mut self, open: impl FnOnce() -> Result<(Wal, LogWriter)>) -> Result<()> {
        let before = self.server.shard(self.shard)?;
        // Nothing is released meanwhile: a file of the old log may have the name of one of the new.
        let (wal, writer) = before.host.replace_log(&self.saved, || {
            // Writer and threads end before the files go, and with them what keeps others out of the directory.
            drop(self.open.take());
            open()
        })?;
        self.state.set_applied(&self.applied);
        let log = Arc::clone(wal.log());
        self.state.cut_committed(log.head());
        self.open = Some((wal, writer));
        self.server.replace_shard(
            self.shard,
            ServerShard {
                commits: self.state.commits(&log),
                log,
                host: Arc::clone(&before.host),
                following: Some(Arc::clone(&self.state)),
                target: Some(Arc::clone(self.target())),
            },
        )
    }

    /// What the checkpoint needs to know of the shard again, once its rebuild has completed.
    pub(crate) fn checkpoint_shard(&self) -> Result<CheckpointShard> {
        let applied = Some((Arc::clone(&self.applied), Arc::clone(self.target())));
        Ok(CheckpointShard { log: self.log()?, applied, saved: Arc::clone(&self.saved) })
    }

    /// Ends the applier and closes the log.
    ///
    /// # Errors
    ///
    /// [`Error::Poisoned`] if something in the log is not on stable storage; what the target says that has no applier.
    pub(crate) fn close(&mut self) -> Result<()> {
        let applied =
            if self.applies_at_once() { self.applied.sync(self.target().as_ref(), self.shard) } else { Ok(()) };
        self.stop_applier();
        let Some((wal, writer)) = self.open.take() else { return applied };
        drop(writer);
        wal.close().and(applied)
    }
}

impl Drop for FollowerShard {
    fn drop(&mut self) {
        self.stop_applier();
    }
}
