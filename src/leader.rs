//! The leading role: the logs' writers, the listener, and a shipper for each follower and shard.
//!
//! # Threads
//!
//! | thread | how many | blocks in |
//! |---|---|---|
//! | `tl-accept` | one | accepting |
//! | `tl-peer-…` | one a connection once it has its answer | reading acknowledgements |
//! | `tl-agree-…` | one a connection until it has its answer | reading the request, deciding on it |
//! | `tl-ship-…` | one a follower and shard | waiting for `written`, or writing to its socket |
//! | `tl-tail-…` | one a reader of the log | waiting for `written`, or writing to its socket |
//! | `tl-beat` | one while a base is opened | waiting for that to be over |
//! | `tl-ckpt` | one | waiting for marks |
//! | `tl-proto` | one | waiting for the earliest deadline of a session |
//! | `tl-retain` | one | waiting for a new segment, or for a follower that leaves one behind |
//! | `tl-scrub` | one, unless it is off | waiting for the next pass, or reading a segment |
//! | `tl-apply-s…` | one a shard, if the leader has a target | waiting for `written`, or in the target |
//! | `tl-prep-s…`, `tl-sync-s…` | one a shard while it writes | see [`crate::wal`] |
//! | `tl-unmap-s…` | one a shard while removed segments go | see [`crate::wal`] |
//!
//! The caller's threads append and wait; no thread of the node stands between them and the log.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::applier::Applier;
use crate::caught::caught;
use crate::checkpointer::{CheckpointShard, Checkpointer};
use crate::commit::{Commit, Commits, Outcome};
use crate::data_dir::{DataDir, Manifest};
use crate::error::{Error, Result};
use crate::leading;
use crate::node::NodeBuilder;
use crate::node::running::{Hosting, OpenLogs, Threads, open_logs, start_scrubbing};
use crate::registry::Registry;
use crate::retention::Pin;
use crate::server::{Server, ServerShard};
use crate::shutdown::ShutdownSignal;
use crate::status::{Role, Status};
use crate::types::{Epoch, Lsn, NodeId, ShardId};
use crate::wal::{Log, LogWriter, Wal};
use crate::watermark::Watermark;

/// A running leader. Dropping it, or [`shutdown`](Self::shutdown), ends its threads, once what is pending was sent:
/// that takes up to [`drain_timeout`](crate::NodeBuilder::drain_timeout).
///
/// ```
/// use std::time::{Duration, Instant};
/// use towline::{Node, ShardId};
///
/// let directory = tempfile::tempdir()?;
/// let leader = Node::builder(directory.path()).shards(2).segment_size(1 << 20).lead("127.0.0.1:0")?;
/// let mut writer = leader.writer(ShardId(1))?;
/// let lsn = writer.append(b"hello")?;
/// let deadline = Instant::now() + Duration::from_secs(10);
/// assert!(leader.wait(ShardId(1), lsn, "synced".parse()?, Some(deadline))?.is_committed());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Leader {
    server: Arc<Server>,
    address: String,
    writers: Mutex<Vec<Option<LogWriter>>>,
    wals: Vec<Wal>,
    commits: Vec<Arc<Commits>>,
    directory: Arc<DataDir>,
    checkpointer: Arc<Checkpointer>,
    threads: Arc<Threads>,
    /// By shard: up to where the node's own target has applied; none without a target.
    applied: Vec<Option<Arc<Watermark>>>,
}

impl Leader {
    pub(crate) fn start(builder: NodeBuilder, address: &str) -> Result<Leader> {
        // Before anything is made: a mistyped address should leave no directory behind.
        let listener = builder.make_transport().listen(address)?;
        let address = listener.local_address();
        let directory = Arc::new(builder.open_as_leader()?);
        let OpenLogs { wals, mut writers, checkpoint } = open_logs(&directory, &builder.options, Role::Leader)?;
        // What cannot lead takes no epoch: another node may be asked to lead under it then.
        let mut applied = Vec::new();
        for wal in &wals {
            let shard = wal.log().shard();
            if builder.target.as_ref().is_some_and(|target| target.is_rebuilding(shard).unwrap_or(false)) {
                return Err(Error::invalid(format!(
                    "the rebuild of shard {shard} of the target was interrupted: a node with it can only follow"
                )));
            }
            let target = builder.target.as_ref();
            applied.push(target.map(|t| NodeBuilder::applied_of(t.as_ref(), wal.log(), &checkpoint)).transpose()?);
        }
        let followers = Registry::open(&directory.followers_path(), directory.manifest().shard_count)?.followers();
        leading::check(&directory, builder.epoch, !followers.is_empty())?;
        directory.lead_under(builder.epoch)?;
        let manifest = directory.manifest();
        for writer in &mut writers {
            writer.set_epoch(manifest.epoch)?;
            writer.set_led();
        }
        let stop = ShutdownSignal::new();
        let kept = wals.iter().zip(&applied).map(|(wal, applied)| {
            CheckpointShard::new(Arc::clone(wal.log()), applied.clone().zip(builder.target.clone()))
        });
        let kept: Vec<_> = kept.collect();
        let hosting = Hosting::new(&builder, &directory, Role::Leader, &kept, &stop)?;
        let (hurry, scrub_until) = (hosting.hurry(), stop.clone());
        let shards: Vec<_> = (wals.iter().zip(&hosting.hosts))
            .map(|(wal, host)| ServerShard {
                log: Arc::clone(wal.log()),
                commits: Arc::new(Commits::new(Arc::clone(wal.log()), builder.options.commit)),
                host: Arc::clone(host),
                following: None,
                target: builder.target.clone(),
            })
            .collect();
        let commits = shards.iter().map(|shard| Arc::clone(&shard.commits)).collect();
        let appliers: Vec<_> = (wals.iter().zip(&applied))
            .filter_map(|(wal, applied)| {
                let (target, applied) = builder.target.clone().zip(applied.clone())?;
                let log = Arc::clone(wal.log());
                Some(Applier { shard: log.shard(), log, target, applied, rebuild: None, stop: stop.clone() })
            })
            .collect();
        let threads = Arc::new(Threads::default());
        let server = Arc::new(Server::new(
            Role::Leader,
            Arc::clone(&directory),
            shards,
            builder.options.clone(),
            builder.abort_signal().child(),
            stop.clone(),
            Arc::clone(&threads),
        ));
        let kept = kept.into_iter().map(Some).collect();
        let (path, registry, told) = (directory.checkpoint_path(), hosting.registry(), Arc::clone(&server));
        let sync_failed = Box::new(move |shard, error| told.applying_failed(shard, &error));
        let checkpointer = Checkpointer::new(path, kept, hurry, stop, registry, checkpoint, sync_failed);
        let leader = Leader {
            server: Arc::clone(&server),
            address,
            writers: Mutex::new(writers.into_iter().map(Some).collect()),
            wals,
            commits,
            directory,
            checkpointer: Arc::clone(&checkpointer),
            threads,
            applied: applied.into_iter().map(|applied| Some(Arc::clone(applied?.told()))).collect(),
        };
        leader.threads.spawn("tl-ckpt".to_owned(), move || checkpointer.run())?;
        hosting.start(&leader.threads)?;
        for applier in appliers {
            let server = Arc::clone(&server);
            leader.threads.spawn(format!("tl-apply-s{}", applier.shard), move || {
                if let Err(error) = caught(format_args!("the target of shard {}", applier.shard), || applier.run()) {
                    log::error!("shard {}: applying ends: {error}", applier.shard);
                    server.applying_failed(applier.shard, &error);
                }
            })?;
        }
        start_scrubbing(&server, &builder.options, &scrub_until, &leader.threads)?;
        leading::begin(&leader.directory)?;
        Server::listen(&server, listener)?;
        Ok(leader)
    }

    /// Where it listens; with the port that was chosen if 0 was asked for.
    #[must_use]
    pub fn local_address(&self) -> &str {
        &self.address
    }

    /// Who it is and what its directory was made with.
    #[must_use]
    pub fn manifest(&self) -> Manifest {
        self.directory.manifest()
    }

    /// This node's id.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        self.manifest().node
    }

    /// How many shards it has.
    #[must_use]
    pub fn shard_count(&self) -> u16 {
        self.manifest().shard_count
    }

    /// The one writer of a shard. It is handed out once, and dropping it does not give it back: from then on nobody can
    /// append to the shard until the node is started again. So keep it as long as the leader; whoever wants several
    /// threads to append to one shard puts it behind a lock.
    ///
    /// A writer that outlives the leader appends nothing any more ([`Error::ShutDown`]), and keeps the shard's
    /// directory in use until it is dropped: opening that gives [`Error::InUse`], in this process too.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard, or its writer was handed out before.
    pub fn writer(&self, shard: ShardId) -> Result<LogWriter> {
        self.server.shard(shard)?;
        let taken = || {
            Error::invalid(format!(
                "the writer of shard {shard} has been handed out before, and there is one until the node is started again; \
                 keep it, and share it behind a lock"
            ))
        };
        self.writers.lock().get_mut(usize::from(shard.0)).and_then(Option::take).ok_or_else(taken)
    }

    /// The log of a shard: marks, readers, retention.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard.
    pub fn log(&self, shard: ShardId) -> Result<&Arc<Log>> {
        self.server.shard(shard)?;
        self.wals.get(usize::from(shard.0)).map(Wal::log).ok_or(Error::ShutDown)
    }

    /// The newest LSN of a shard that this node's own target has applied; `None` without a target.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard.
    pub fn applied(&self, shard: ShardId) -> Result<Option<&Watermark>> {
        self.server.shard(shard)?;
        Ok(self.applied.get(usize::from(shard.0)).and_then(Option::as_deref))
    }

    /// What the followers of a shard have acknowledged. Keep it at hand to wait without looking the shard up.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard.
    pub fn commits(&self, shard: ShardId) -> Result<&Arc<Commits>> {
        self.server.shard(shard)?;
        self.commits.get(usize::from(shard.0)).ok_or(Error::ShutDown)
    }

    /// Waits until a record is committed as `commit` says. `k` followers are `k` different nodes that have
    /// acknowledged it; where fewer exist, this waits for them.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard. How the waiting ended is the [`Outcome`].
    pub fn wait(&self, shard: ShardId, lsn: Lsn, commit: Commit, deadline: Option<Instant>) -> Result<Outcome> {
        Ok(self.commits(shard)?.wait(lsn, commit, deadline))
    }

    /// Appends records as one batch and waits until they are committed as `commit` says: the quickest way from a record
    /// to its acknowledgement, see [`Commits::append_and_wait`]. Returns the LSN of the last record, and how waiting
    /// for it ended.
    ///
    /// ```no_run
    /// # use towline::{Leader, Outcome, Result, ShardId};
    /// # fn put(leader: &Leader) -> Result<()> {
    /// let mut writer = leader.writer(ShardId(0))?;
    /// let (lsn, outcome) = leader.append_and_wait(&mut writer, &[b"a record"], "received:1".parse()?, None)?;
    /// assert_eq!(outcome, Outcome::Committed, "LSN {lsn}");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Where nothing was appended: as [`LogWriter::append_batch`].
    pub fn append_and_wait<R: AsRef<[u8]>>(
        &self,
        writer: &mut LogWriter,
        records: &[R],
        commit: Commit,
        deadline: Option<Instant>,
    ) -> Result<(Lsn, Outcome)> {
        self.commits(writer.log().shard())?.append_and_wait(writer, records, commit, deadline)
    }

    /// Keeps a shard's log from `lsn` on for as long as the pin lives, within the shard's bound. Owner and reason are
    /// for those who look at the status.
    ///
    /// A pin lives no longer than its node. Between the start of the next one and its first pins, what is kept for
    /// nobody ([`min_wal_bytes`](crate::NodeBuilder::min_wal_bytes)) is all that is sure to be there; what must not be
    /// lost needs a [target](crate::NodeBuilder::target).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard; [`Error::NotRetained`] if `lsn` has been given up already.
    pub fn pin(&self, shard: ShardId, owner: impl Into<String>, reason: impl Into<String>, lsn: Lsn) -> Result<Pin> {
        self.server.shard(shard)?.host.retention().pin(owner, reason, lsn)
    }

    /// Forgets a follower that will not come back: no log is kept for it, and it ends its streams. It is remembered
    /// anew if it asks to follow again.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if that could not be written down: it is then remembered when the node starts again.
    pub fn forget_follower(&self, node: NodeId) -> Result<()> {
        self.server.forget_follower(node)
    }

    /// Steps down because another node leads under `newer`, or is about to: nothing is appended any more, whoever waits
    /// is told [`Outcome::Deposed`], followers' streams end, and this directory leads again only under a higher epoch
    /// that it is given. Records that no follower has may be cut when it comes back as a follower.
    ///
    /// A leader that is not told, because it is cut off say, goes on until a node that has accepted `newer` connects to
    /// it: what it answers as [synced](Commit::SYNCED) meanwhile is on its own disk alone.
    ///
    /// ```
    /// # use towline::{Epoch, Node, Outcome, ShardId};
    /// # let directory = tempfile::tempdir()?;
    /// let leader = Node::builder(directory.path()).segment_size(1 << 20).lead("127.0.0.1:0")?;
    /// let mut writer = leader.writer(ShardId(0))?;
    /// let lsn = writer.append(b"record")?;
    /// leader.depose(Epoch(2))?;
    /// assert!(writer.append(b"another").is_err());
    /// assert_eq!(leader.wait(ShardId(0), lsn, "durable:1".parse()?, None)?, Outcome::Deposed);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::StaleEpoch`] unless `newer` is higher than the epoch that it leads under; [`Error::Invalid`] for the
    /// last epoch there is; [`Error::Io`] if it could not be written down: then it leads on.
    pub fn depose(&self, newer: Epoch) -> Result<()> {
        let led = self.server.led();
        if newer <= led {
            return Err(Error::StaleEpoch { offered: newer, accepted: led });
        }
        if !newer.has_successor() {
            return Err(Error::invalid(format!("epoch {newer} has no successor")));
        }
        self.server.depose(newer)
    }

    /// What the node says about itself now.
    #[must_use]
    pub fn status(&self) -> Status {
        self.server.status()
    }

    /// Stops: sends followers what is pending (for no longer than the drain time-out), syncs, ends every thread.
    ///
    /// # Errors
    ///
    /// [`Error::Poisoned`] if something written is not on stable storage; [`Error::StaleEpoch`] if that is because the
    /// node was deposed.
    pub fn shutdown(mut self) -> Result<()> {
        self.stop()
    }

    fn stop(&mut self) -> Result<()> {
        self.server.drain();
        self.threads.join_all();
        self.writers.lock().clear();
        // A leader has a log at least, until it has stopped; dropped after that, it stops once more.
        let is_first = !self.wals.is_empty();
        let mut result = Ok(());
        for wal in self.wals.drain(..) {
            result = result.and(wal.close());
        }
        self.checkpointer.finish();
        if is_first { result.and_then(|()| leading::end(&self.directory)) } else { result }
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::error!("the leader did not stop cleanly: {error}");
        }
    }
}

impl std::fmt::Debug for Leader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Leader")
            .field("address", &self.address)
            .field("manifest", &self.manifest())
            .finish_non_exhaustive()
    }
}
