//! What runs of a node, in either role: its logs, what decides about its shards, its threads.

use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;

use super::{NodeBuilder, NodeOptions};
use crate::checkpointer::CheckpointShard;
use crate::data_dir::DataDir;
use crate::error::{Error, Result};
use crate::host::{Clock, Host, HostSettings};
use crate::registry::Registry;
use crate::replication::Checkpoint;
use crate::retention::{Retainer, ShardRetention};
use crate::scrub::Scrubber;
use crate::server::Server;
use crate::shutdown::ShutdownSignal;
use crate::status::Role;
use crate::types::{Lsn, ShardId};
use crate::wal::{KnownSynced, LogIdentity, LogWriter, Wal, WalOptions, WrittenHere};
use crate::watermark::Watermark;

/// What decides about the shards of a node, and what it keeps of their logs.
pub(crate) struct Hosting {
    /// By shard.
    pub(crate) hosts: Vec<Arc<Host>>,
    /// Only sessions of those who follow this node run out of time.
    clock: Option<Arc<Clock>>,
    registry: Arc<Registry>,
    retainer: Retainer,
}

impl Hosting {
    /// Hosts for these logs, in their role. `shards` says of each what its target has saved.
    pub(crate) fn new(
        builder: &NodeBuilder,
        directory: &DataDir,
        role: Role,
        shards: &[CheckpointShard],
        stop: &ShutdownSignal,
    ) -> Result<Hosting> {
        let manifest = directory.manifest();
        let registry = Arc::new(Registry::open(&directory.followers_path(), manifest.shard_count)?);
        let leads = role == Role::Leader;
        let is_followable = leads || builder.listen.is_some();
        if let Some(members) = builder.members.as_ref().filter(|_| is_followable) {
            registry.retain(|node| members.contains(&node))?;
            // A follower keeps log for those alone that have come.
            for &node in members.iter().filter(|_| leads) {
                registry.add(node)?;
            }
        }
        let clock = Arc::new(Clock::new());
        let settings = HostSettings {
            node: manifest.node,
            limits: builder.options.sessions,
            commit: builder.options.commit,
            members: builder.members.clone(),
            first_session: if is_followable { registry.first_session(manifest.epoch)? } else { 1 },
            on_projection: builder.on_projection.clone(),
            clock: Arc::clone(&clock),
            is_followable,
        };
        let wake = Arc::new(Watermark::default());
        let hosts: Vec<_> = shards
            .iter()
            .map(|shard| {
                let applied = shard.applied.as_ref().map(|_| Arc::clone(&shard.saved));
                let (log, options) = (Arc::clone(&shard.log), builder.options.retention);
                let retention = ShardRetention::new(log, options, Arc::clone(&registry), applied, Arc::clone(&wake));
                Arc::new(Host::new(settings.clone(), Arc::clone(&shard.log), Arc::new(retention)))
            })
            .collect();
        hosts.iter().for_each(|host| host.assign(role, manifest.epoch));
        let retainer =
            Retainer { hosts: hosts.clone(), wake, hurry: Arc::new(Watermark::default()), stop: stop.clone() };
        Ok(Hosting { hosts, clock: is_followable.then_some(clock), registry, retainer })
    }

    /// What has the checkpoint written at once when it moves.
    pub(crate) fn hurry(&self) -> Arc<Watermark> {
        Arc::clone(&self.retainer.hurry)
    }

    /// The followers known.
    pub(crate) fn registry(&self) -> Arc<Registry> {
        Arc::clone(&self.registry)
    }

    /// Starts the threads.
    pub(crate) fn start(self, threads: &Threads) -> Result<()> {
        let Hosting { hosts, clock, retainer, .. } = self;
        let stop = retainer.stop.clone();
        if let Some(clock) = clock {
            threads.spawn("tl-proto".to_owned(), move || clock.run(&hosts, &stop))?;
        }
        threads.spawn("tl-retain".to_owned(), move || retainer.run())
    }
}

/// The logs of a node, open, with what its checkpoint says.
pub(crate) struct OpenLogs {
    pub(crate) wals: Vec<Wal>,
    pub(crate) writers: Vec<LogWriter>,
    pub(crate) checkpoint: Checkpoint,
}

/// Opens every shard's log.
///
/// Before the node accepts any epoch: the manifest still says which batches the node itself wrote, whose word about
/// what was synced counts. Once they are open, everything in them is synced. A follower's logs have nothing prepared
/// before it knows how it will follow.
pub(crate) fn open_logs(directory: &DataDir, options: &NodeOptions, role: Role) -> Result<OpenLogs> {
    directory.raise_version()?;
    let manifest = directory.manifest();
    let written_here = WrittenHere::by(&manifest);
    let checkpoint = Checkpoint::load(&directory.checkpoint_path())?.unwrap_or_default();
    let mut wals = Vec::new();
    let mut writers = Vec::new();
    for shard in (0..manifest.shard_count).map(ShardId) {
        let identity = LogIdentity {
            cluster: manifest.cluster,
            region: manifest.region,
            shard,
            segment_size: manifest.segment_size,
        };
        let known_synced = checkpoint.entries.get(&shard).map_or(Lsn::ZERO, |entry| entry.synced);
        let wal = WalOptions { known_synced: KnownSynced { lsn: known_synced, written_here }, ..options.wal };
        let open = if role == Role::Follower { Wal::open_unprepared } else { Wal::open };
        let (wal, writer) = open(&directory.shard_path(shard), identity, wal)?;
        if known_synced > wal.log().head() {
            return Err(Error::corrupt(
                directory.shard_path(shard),
                0,
                Some(wal.log().head().next()),
                format!("the checkpoint says that LSN {known_synced} was synced, but the log ends before it"),
            ));
        }
        // A log may have seen a newer term than was written down before the node stopped.
        let epoch = writer.end().epoch;
        if epoch > directory.manifest().epoch {
            directory.accept_epoch_of_log(epoch)?;
        }
        wals.push(wal);
        writers.push(writer);
    }
    Ok(OpenLogs { wals, writers, checkpoint })
}

/// The threads of a node, joined at its end.
#[derive(Default)]
pub(crate) struct Threads(Mutex<Vec<JoinHandle<()>>>);

impl Threads {
    /// Starts a thread. Its name is for those who look at the process.
    pub(crate) fn spawn(&self, name: String, run: impl FnOnce() + Send + 'static) -> Result<()> {
        self.spawn_with(name, NODE_THREAD_STACK, run)
    }

    /// The same with a stack of so many bytes.
    pub(crate) fn spawn_with(&self, name: String, stack: usize, run: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name(name.clone()).stack_size(stack).spawn(run);
        let mut threads = self.0.lock();
        // Those that have ended need no joining; a leader with many short connections must not gather them.
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread.map_err(Error::io("start thread", name))?);
        Ok(())
    }

    /// Waits for every thread to end.
    pub(crate) fn join_all(&self) {
        loop {
            // Not under the lock: a thread that ends may be starting another one.
            let Some(thread) = self.0.lock().pop() else { return };
            if thread.join().is_err() {
                log::error!("a thread of the node panicked");
            }
        }
    }
}

/// Starts the thread that scrubs, if the node has one.
pub(crate) fn start_scrubbing(
    server: &Arc<Server>,
    options: &NodeOptions,
    stop: &ShutdownSignal,
    threads: &Threads,
) -> Result<()> {
    if options.scrub.bytes_per_second == 0 {
        return Ok(());
    }
    let scrubber = Scrubber { server: Arc::clone(server), options: options.scrub, stop: stop.clone() };
    threads.spawn("tl-scrub".to_owned(), move || scrubber.run())
}

/// Room for what a target does in the applier.
pub(crate) const NODE_THREAD_STACK: usize = 1 << 20;
