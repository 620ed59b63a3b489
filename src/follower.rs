//! The following role: a receiver, an acknowledger and an applier for each shard.
//!
//! # Threads
//!
//! | thread | how many | blocks in |
//! |---|---|---|
//! | `tl-recv-s…` | one a shard | reading its socket, or waiting to connect again |
//! | `tl-agree-s…` | one a shard while it connects | connecting, and agreeing with the leader on how the log goes on |
//! | `tl-ack-s…` | one a shard while log arrives | waiting for the synced or the applied mark |
//! | `tl-apply-s…` | one a shard, if the target takes records | waiting for the written mark, or in the target |
//! | `tl-rebuild-s…`, `tl-beat` | one a shard while it is rebuilt, or made ready for that | completing the rebuild; waiting for that to be over |
//! | `tl-ckpt` | one | waiting for marks |
//! | `tl-retain` | one | waiting for a new segment, or for the checkpoint |
//! | `tl-scrub` | one, unless it is off | waiting for the next pass, or reading a segment |
//! | `tl-sync-s…` | one a shard while it receives | see [`crate::wal`] |
//! | `tl-prep-s…` | one a shard while it receives | see [`crate::wal`] |
//! | `tl-unmap-s…` | one a shard while removed segments go | see [`crate::wal`] |
//! | `tl-accept`, `tl-proto` | as on a leader, if it listens | |
//! | `tl-agree-…`, `tl-peer-…`, `tl-ship-…`, `tl-tail-…` | as on a leader, for those whom it feeds | |

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::backoff::Backoff;
use crate::caught::caught;
use crate::checkpointer::{CheckpointShard, Checkpointer};
use crate::commit::Commits;
use crate::data_dir::{DataDir, Manifest};
use crate::epoch_fence::EpochFence;
use crate::error::{Error, Result};
use crate::follower_shard::{AppliedMark, FollowerShard};
use crate::host::Host;
use crate::limits::MAX_SHARDS;
use crate::node::running::{Hosting, OpenLogs, Threads, open_logs, start_scrubbing};
use crate::node::{NodeBuilder, NodeOptions, check_shard_count};
use crate::rebuild::RebuildProgress;
use crate::receiver::Receiver;
use crate::server::{Server, ServerShard};
use crate::shutdown::ShutdownSignal;
use crate::status::{Role, Status};
use crate::target::{ReplicationTarget, TargetTopology};
use crate::transport::{Connection, Transport};
use crate::types::{ClusterId, Epoch, Lsn, NodeId, ShardId};
use crate::wal::{Log, LogWriter, Wal, segment, unix_ms};
use crate::watermark::Watermark;
use crate::wire::ShardInfo;

/// What the threads of a follower share.
pub(crate) struct Following {
    pub(crate) options: NodeOptions,
    pub(crate) stop: ShutdownSignal,
    directory: Arc<DataDir>,
    transport: Arc<dyn Transport>,
    leader: String,
    target: Arc<dyn ReplicationTarget>,
    /// By shard: told of each epoch that is accepted.
    hosts: Vec<Arc<Host>>,
    pub(crate) fence: Arc<EpochFence>,
    /// What ended following for good, if anything did: the first failure that trying again cannot mend.
    failure: Mutex<Option<Error>>,
    /// What went wrong when a log was closed.
    unclean: Mutex<Option<Error>>,
}

impl Following {
    pub(crate) fn manifest(&self) -> Manifest {
        self.directory.manifest()
    }

    pub(crate) fn target(&self) -> &Arc<dyn ReplicationTarget> {
        &self.target
    }

    pub(crate) fn shard_path(&self, shard: ShardId) -> std::path::PathBuf {
        self.directory.shard_path(shard)
    }

    pub(crate) fn rebuild_path(&self, shard: ShardId) -> std::path::PathBuf {
        self.directory.rebuild_path(shard)
    }

    pub(crate) fn owed_path(&self, shard: ShardId) -> std::path::PathBuf {
        self.directory.owed_path(shard)
    }

    pub(crate) fn connect(&self) -> Result<Connection> {
        self.transport.connect_until(&self.leader, self.options.handshake_timeout, &self.stop)
    }

    pub(crate) fn accept_epoch(&self, epoch: Epoch) -> Result<()> {
        self.fence.accept(epoch, || self.directory.follow_under(epoch))?;
        self.hosts.iter().for_each(|host| host.assign(Role::Follower, epoch));
        Ok(())
    }

    /// The leader must still be the one that the directory was made for, and lead under an epoch that can be followed.
    pub(crate) fn check_topology(&self, peer: &str, info: &ShardInfo) -> Result<()> {
        if !info.epoch.has_successor() {
            return Err(Error::protocol(peer, format!("it leads under epoch {}, which has no successor", info.epoch)));
        }
        let manifest = self.manifest();
        let own = (manifest.cluster, manifest.region, manifest.shard_count, manifest.segment_size);
        let offered = (info.cluster, info.region, info.shard_count, info.segment_size);
        if own == offered {
            return self.check_target(peer, info);
        }
        Err(Error::Mismatch {
            path: self.directory.path().to_owned(),
            reason: format!(
                "it holds cluster {}, region {}, {} shards, segments of {} bytes, but {peer} leads cluster {}, region {}, \
                 {} shards, {} bytes; check the address, or start with an empty directory",
                own.0, own.1, own.2, own.3, offered.0, offered.1, offered.2, offered.3
            )
            .into(),
        })
    }

    /// Both ends' targets must have the same shape, where the leader has a target at all.
    fn check_target(&self, peer: &str, info: &ShardInfo) -> Result<()> {
        let leaders =
            TargetTopology { key_len: info.key_len, value_len: info.value_len, prefix_bits: info.prefix_bits };
        let own = self.target.topology();
        match own.difference(&leaders) {
            Some(difference) if own != TargetTopology::default() && leaders != TargetTopology::default() => {
                Err(Error::Mismatch {
                    path: self.directory.path().to_owned(),
                    reason: format!("the target does not fit that of {peer}: {difference}").into(),
                })
            }
            _ => Ok(()),
        }
    }

    /// What ended following for good.
    fn failure(&self) -> Result<()> {
        self.failure.lock().clone().map_or(Ok(()), Err)
    }

    /// Ends following for good.
    pub(crate) fn fail(&self, shard: ShardId, error: Error) {
        log::error!("shard {shard}: following ends: {error}");
        self.failure.lock().get_or_insert(error);
        self.stop.shutdown();
    }
}

/// How following goes for one shard, for those who ask.
#[derive(Default)]
pub(crate) struct ShardState {
    connected: AtomicBool,
    leader_head: AtomicU64,
    /// What the leader has said to be committed.
    committed: Arc<AtomicU64>,
    heard_at_ms: AtomicU64,
    applied: Mutex<Option<Arc<AppliedMark>>>,
    rebuild: Mutex<RebuildProgress>,
    error: Mutex<Option<String>>,
    host: OnceLock<Arc<Host>>,
}

impl ShardState {
    pub(crate) fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
        if let Some(host) = self.host.get() {
            host.set_receiving(connected);
        }
        if connected {
            *self.error.lock() = None;
        }
    }

    pub(crate) fn heard_from_leader(&self) {
        self.heard_at_ms.store(unix_ms(), Ordering::Relaxed);
    }

    pub(crate) fn set_applied(&self, mark: &Arc<AppliedMark>) {
        *self.applied.lock() = Some(Arc::clone(mark));
    }

    pub(crate) fn set_rebuild(&self, progress: RebuildProgress) {
        *self.rebuild.lock() = progress;
    }

    /// The newest rebuild since the node started; idle if there was none. Blocks are told as they come; what is applied
    /// also moves while none do.
    pub(crate) fn rebuild(&self) -> RebuildProgress {
        let mut progress = *self.rebuild.lock();
        if progress.phase.is_active() {
            progress.applied = progress.applied.max(self.applied());
        }
        progress
    }

    /// A stream begins, and with it the leader of now tells where it stands: an earlier one may have been further.
    pub(crate) fn begin_stream(&self, leader_head: Lsn) {
        self.leader_head.store(leader_head.0, Ordering::Relaxed);
    }

    pub(crate) fn set_leader_head(&self, head: Lsn) {
        self.leader_head.fetch_max(head.0, Ordering::Relaxed);
    }

    /// The leader says that so much is committed, of which `head` is here. What comes later it may say of other
    /// records.
    pub(crate) fn set_committed(&self, lsn: Lsn, head: Lsn) {
        self.committed.fetch_max(lsn.min(head).0, Ordering::Relaxed);
    }

    /// The log ends there now.
    pub(crate) fn cut_committed(&self, head: Lsn) {
        self.committed.fetch_min(head.0, Ordering::Relaxed);
    }

    /// What the shard's followers have acknowledged, and the leader has committed.
    pub(crate) fn commits(&self, log: &Arc<Log>) -> Arc<Commits> {
        Arc::new(Commits::of_follower(Arc::clone(log), Arc::clone(&self.committed)))
    }

    pub(crate) fn set_error(&self, error: &Error) {
        *self.error.lock() = Some(error.to_string());
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    pub(crate) fn leader_head(&self) -> Lsn {
        Lsn(self.leader_head.load(Ordering::Relaxed))
    }

    pub(crate) fn heard_at_ms(&self) -> u64 {
        self.heard_at_ms.load(Ordering::Relaxed)
    }

    pub(crate) fn applied(&self) -> Lsn {
        self.applied.lock().as_ref().map_or(Lsn::ZERO, |mark| mark.load())
    }

    /// The same, of what the target serves: a rebuild begins with the mark of a base that has yet to come, and after a
    /// cut what was told once is more than there is.
    pub(crate) fn served(&self) -> Lsn {
        self.applied.lock().as_ref().map_or(Lsn::ZERO, |mark| mark.load().min(mark.told().load()))
    }

    pub(crate) fn error(&self) -> Option<String> {
        self.error.lock().clone()
    }
}

/// A running follower. Dropping it, or [`shutdown`](Self::shutdown), ends its threads, once what is pending was sent to
/// those whom it feeds, if it does: that takes up to [`drain_timeout`](crate::NodeBuilder::drain_timeout).
pub struct Follower {
    following: Arc<Following>,
    server: Arc<Server>,
    address: Option<String>,
    applied: Vec<Arc<Watermark>>,
    states: Vec<Arc<ShardState>>,
    checkpointer: Arc<Checkpointer>,
    threads: Arc<Threads>,
}

impl Follower {
    pub(crate) fn start(builder: NodeBuilder, leader: &str, target: Arc<dyn ReplicationTarget>) -> Result<Follower> {
        let transport = builder.make_transport();
        let stop = builder.abort_signal().child();
        // Before anything is made, and before the leader is waited for: an address that is taken is a mistake.
        let listener = builder.listen.as_ref().map(|address| transport.listen(address)).transpose()?;
        let directory = match crate::data_dir::DataDir::open(&builder.directory)? {
            Some(directory) => directory,
            None => DataDir::create(&builder.directory, meet_leader(&builder, transport.as_ref(), leader)?)?,
        };
        builder.check_settings(&directory)?;
        let directory = Arc::new(directory);
        let OpenLogs { wals, writers, checkpoint } = open_logs(&directory, &builder.options, Role::Follower)?;
        let threads = Arc::new(Threads::default());
        let (mut applied_marks, mut states) = (Vec::new(), Vec::new());
        for wal in &wals {
            let applied = NodeBuilder::applied_of(target.as_ref(), wal.log(), &checkpoint)?;
            let state = Arc::new(ShardState::default());
            state.set_applied(&applied);
            applied_marks.push(applied);
            states.push(state);
        }
        let kept = wals.iter().zip(&applied_marks).map(|(wal, applied)| {
            CheckpointShard::new(Arc::clone(wal.log()), Some((Arc::clone(applied), Arc::clone(&target))))
        });
        let kept: Vec<_> = kept.collect();
        let hosting = Hosting::new(&builder, &directory, Role::Follower, &kept, &stop)?;
        for (state, host) in states.iter().zip(&hosting.hosts) {
            let _ = state.host.set(Arc::clone(host));
        }
        let saved: Vec<_> = kept.iter().map(|shard| Arc::clone(&shard.saved)).collect();
        let whole = kept.into_iter().map(|shard| Ok((!target.is_rebuilding(shard.log.shard())?).then_some(shard)));
        let kept = whole.collect::<Result<_>>()?;
        let following = Arc::new(Following {
            options: builder.options.clone(),
            stop: stop.clone(),
            directory: Arc::clone(&directory),
            transport: Arc::clone(&transport),
            leader: leader.to_owned(),
            target: Arc::clone(&target),
            hosts: hosting.hosts.clone(),
            fence: EpochFence::new(directory.manifest().epoch),
            failure: Mutex::default(),
            unclean: Mutex::default(),
        });
        let shards = wals.iter().zip(&states).zip(&hosting.hosts).map(|((wal, state), host)| ServerShard {
            log: Arc::clone(wal.log()),
            commits: state.commits(wal.log()),
            host: Arc::clone(host),
            following: Some(Arc::clone(state)),
            target: Some(Arc::clone(&target)),
        });
        let server = Arc::new(Server::new(
            Role::Follower,
            Arc::clone(&directory),
            shards.collect(),
            builder.options.clone(),
            // Once following ends, for whatever reason, those who are fed get what is here and no more.
            stop.child(),
            ShutdownSignal::new(),
            Arc::clone(&threads),
        ));
        let (path, hurry, registry) = (directory.checkpoint_path(), hosting.hurry(), hosting.registry());
        let told = Arc::clone(&following);
        let sync_failed = Box::new(move |shard, error| told.fail(shard, error));
        let checkpointer = Checkpointer::new(path, kept, hurry, stop, registry, checkpoint, sync_failed);
        let mut follower = Follower {
            following,
            server,
            address: None,
            applied: applied_marks.iter().map(|mark| Arc::clone(mark.told())).collect(),
            states,
            checkpointer: Arc::clone(&checkpointer),
            threads,
        };
        for (((open, applied), saved), index) in wals.into_iter().zip(writers).zip(applied_marks).zip(saved).zip(0..) {
            follower.start_shard(ShardId(index), open, applied, saved)?;
        }
        follower.threads.spawn("tl-ckpt".to_owned(), move || checkpointer.run())?;
        hosting.start(&follower.threads)?;
        start_scrubbing(&follower.server, &builder.options, &follower.following.stop, &follower.threads)?;
        if let Some(listener) = listener {
            follower.address = Some(listener.local_address());
            Server::listen(&follower.server, listener)?;
        }
        Ok(follower)
    }

    /// Starts the threads of a shard: its receiver, which owns everything, and behind it the applier.
    fn start_shard(
        &self,
        shard: ShardId,
        open: (Wal, LogWriter),
        applied: Arc<AppliedMark>,
        saved: Arc<Watermark>,
    ) -> Result<()> {
        let state = self.states.get(usize::from(shard.0)).cloned().unwrap_or_default();
        let manifest = self.following.manifest();
        let end = open.1.end();
        // Records of an older term than the accepted one: a newer leader may never have had them, whether this node
        // wrote them or was to cut them when it stopped.
        let is_of_older_term = end.head > Lsn::ZERO && end.epoch < manifest.epoch;
        let mut own = FollowerShard {
            shard,
            node: Arc::clone(&self.following),
            state,
            server: Arc::clone(&self.server),
            checkpointer: Arc::clone(&self.checkpointer),
            opened_with: open.1.end().head,
            open: Some(open),
            applied,
            saved,
            applier: None,
            awaits_leader: manifest.own_epoch || is_of_older_term,
            gives_way: false,
            interrupted: None,
            told_applied: Lsn::ZERO,
            catches_up_at: None,
        };
        if !own.awaits_leader {
            own.ensure_applier()?;
        }
        let following = Arc::clone(&self.following);
        let mut receiver = Box::new(Receiver { own });
        self.threads.spawn(format!("tl-recv-s{shard}"), move || {
            if let Err(error) = caught(format_args!("the receiver of shard {shard}"), || receiver.run()) {
                following.fail(shard, error);
            }
            if let Err(error) = caught(format_args!("the target of shard {shard}"), || receiver.own.close()) {
                following.unclean.lock().get_or_insert(error);
            }
        })
    }

    /// Who it is and what its directory was made with.
    #[must_use]
    pub fn manifest(&self) -> Manifest {
        self.following.manifest()
    }

    /// Where it listens, if it does.
    #[must_use]
    pub fn local_address(&self) -> Option<&str> {
        self.address.as_deref()
    }

    /// The log of a shard, as it is now: a rebuild closes it and begins another.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard.
    pub fn log(&self, shard: ShardId) -> Result<Arc<Log>> {
        Ok(Arc::clone(&self.server.shard(shard)?.log))
    }

    /// The newest LSN of a shard that the target has applied, and serves. It stands still during a rebuild, and where
    /// records were given up that no leader has any more, until as many others have been applied.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard.
    pub fn applied(&self, shard: ShardId) -> Result<&Watermark> {
        let mark = self.applied.get(usize::from(shard.0));
        mark.map(AsRef::as_ref).ok_or_else(|| Error::invalid(format!("there is no shard {shard}")))
    }

    /// How the newest rebuild of a shard goes, or went; idle if there was none since the node started.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard.
    pub fn rebuild_progress(&self, shard: ShardId) -> Result<RebuildProgress> {
        let state = self.states.get(usize::from(shard.0));
        state.map(|state| state.rebuild()).ok_or_else(|| Error::invalid(format!("there is no shard {shard}")))
    }

    /// Forgets a follower that this node has [fed](crate::NodeBuilder::listen) and that will not come back: as
    /// [`Leader::forget_follower`](crate::Leader::forget_follower).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if that could not be written down: it is then remembered when the node starts again.
    pub fn forget_follower(&self, node: NodeId) -> Result<()> {
        self.server.forget_follower(node)
    }

    /// What the node says about itself now.
    #[must_use]
    pub fn status(&self) -> Status {
        self.server.status()
    }

    /// Blocks until following has ended: after [`stop_signal`](Self::stop_signal) is given, or because of a failure
    /// that trying again cannot mend.
    ///
    /// # Errors
    ///
    /// That failure: the same each time, also from [`shutdown`](Self::shutdown).
    pub fn wait(&self) -> Result<()> {
        self.following.stop.wait();
        self.following.failure()
    }

    /// The signal that ends this follower, for a handler of Ctrl-C, say.
    #[must_use]
    pub fn stop_signal(&self) -> ShutdownSignal {
        self.following.stop.clone()
    }

    /// Stops: saves how far applying has come, ends every thread.
    ///
    /// # Errors
    ///
    /// [`Error::Poisoned`] if something in the log is not on stable storage; else what ended following for good, also
    /// where [`wait`](Self::wait) has told it already.
    pub fn shutdown(mut self) -> Result<()> {
        self.stop()?;
        self.following.failure()
    }

    fn stop(&mut self) -> Result<()> {
        self.following.stop.shutdown();
        self.server.drain();
        self.threads.join_all();
        self.checkpointer.finish();
        self.following.unclean.lock().take().map_or(Ok(()), Err)
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::error!("the follower did not stop cleanly: {error}");
        }
    }
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower").field("manifest", &self.manifest()).finish_non_exhaustive()
    }
}

/// Asks the leader what a new follower's directory must be made with; tries until it can be reached.
fn meet_leader(builder: &NodeBuilder, transport: &dyn Transport, address: &str) -> Result<Manifest> {
    let node = builder.node_id_or_random();
    let options = &builder.options;
    let mut backoff = Backoff::new(options.backoff_base, options.backoff_cap, node.0);
    loop {
        let error = match crate::tail::ask_topology_until(
            transport,
            address,
            options.handshake_timeout,
            builder.abort_signal(),
        ) {
            Ok(info) => return manifest_for(address, &info, node),
            Err(error) => error,
        };
        // A name that does not resolve is a mistake; an address where nobody listens yet is not.
        if error.is_permanent() || error.is_unresolved() {
            return Err(error);
        }
        let wait = backoff.next();
        log::warn!("{error}; trying again in {:.1} s", wait.as_secs_f32());
        let _ = builder.abort_signal().wait_timeout(wait);
        if builder.abort_signal().is_shutdown() {
            return Err(Error::ShutDown);
        }
    }
}

/// A follower's manifest by what its leader said, which is checked: it decides how much is allocated here.
fn manifest_for(peer: &str, info: &ShardInfo, node: crate::types::NodeId) -> Result<Manifest> {
    check_shard_count(info.shard_count).map_err(|error| Error::protocol(peer, error.to_string()))?;
    let is_epoch = info.epoch != Epoch::ZERO && info.epoch.has_successor();
    if !segment::is_valid_size(info.segment_size) || info.cluster == ClusterId::UNKNOWN || !is_epoch {
        return Err(Error::protocol(
            peer,
            format!(
                "it offers segments of {} bytes in cluster {}, epoch {}",
                info.segment_size, info.cluster, info.epoch
            ),
        ));
    }
    const { assert!(MAX_SHARDS > 0) };
    Ok(Manifest {
        cluster: info.cluster,
        node,
        region: info.region,
        shard_count: info.shard_count,
        segment_size: info.segment_size,
        epoch: info.epoch,
        own_epoch: false,
    })
}
