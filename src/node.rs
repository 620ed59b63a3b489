//! A node: a data directory, its shards' logs, and a role.
//!
//! [`Node::builder`] takes the settings; [`NodeBuilder::lead`] and [`NodeBuilder::follow`] open the directory and
//! start the role's threads. What both roles share while they run is in [`running`].

pub(crate) mod running;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::commit::Commit;
use crate::data_dir::{DataDir, Manifest};
use crate::error::{Error, Result};
use crate::follower::Follower;
use crate::follower_shard::AppliedMark;
use crate::host::OnProjection;
use crate::leader::Leader;
use crate::limits::{DEFAULT_REBUILDS, DEFAULT_SEGMENT_SIZE, MAX_CONNECTIONS, MAX_SHARDS};
use crate::on_demand::ON_DEMAND_STACK;
use crate::protocol::{Projection, SessionLimits};
use crate::replication::Checkpoint;
use crate::retention::RetentionOptions;
use crate::scrub::ScrubOptions;
use crate::shutdown::ShutdownSignal;
use crate::target::ReplicationTarget;
use crate::transport::{TcpOptions, TcpTransport, Transport};
use crate::types::{ClusterId, Epoch, Lsn, NodeId, RegionId};
use crate::wal::{Log, WalOptions, unix_ms};
use crate::watermark::Watermark;

/// Where everything begins.
#[derive(Debug)]
pub struct Node;

impl Node {
    /// Settings for a node whose data is, or will be, in `directory`.
    pub fn builder(directory: impl AsRef<Path>) -> NodeBuilder {
        NodeBuilder {
            directory: directory.as_ref().to_owned(),
            node: None,
            region: None,
            shards: None,
            segment_size: None,
            epoch: None,
            options: NodeOptions::default(),
            transport: None,
            allow_plaintext: false,
            listen: None,
            target: None,
            members: None,
            on_projection: None,
            stop: ShutdownSignal::new(),
        }
    }
}

/// Settings that both roles use while they run.
#[derive(Clone, Debug)]
pub(crate) struct NodeOptions {
    pub(crate) wal: WalOptions,
    pub(crate) commit: Commit,
    pub(crate) heartbeat: Duration,
    pub(crate) peer_timeout: Duration,
    pub(crate) handshake_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) backoff_base: Duration,
    pub(crate) backoff_cap: Duration,
    pub(crate) max_connections: usize,
    pub(crate) max_connections_per_address: Option<usize>,
    pub(crate) retention: RetentionOptions,
    pub(crate) sessions: SessionLimits,
    pub(crate) max_rebuilds: usize,
    pub(crate) scrub: ScrubOptions,
    /// Stack of the threads that come and go with what a stream does, in bytes.
    pub(crate) on_demand_stack: usize,
}

impl Default for NodeOptions {
    fn default() -> Self {
        NodeOptions {
            wal: WalOptions::default(),
            commit: Commit::SYNCED,
            heartbeat: Duration::from_secs(1),
            peer_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(5),
            backoff_base: Duration::from_secs(1),
            backoff_cap: Duration::from_secs(30),
            max_connections: MAX_CONNECTIONS,
            max_connections_per_address: None,
            retention: RetentionOptions::default(),
            sessions: SessionLimits::default(),
            max_rebuilds: DEFAULT_REBUILDS,
            scrub: ScrubOptions::default(),
            on_demand_stack: ON_DEMAND_STACK,
        }
    }
}

impl NodeOptions {
    /// Connections that one address may have open: some are always left for others, where there are more than a few.
    pub(crate) fn most_connections_of_address(&self) -> usize {
        self.max_connections_per_address.unwrap_or(self.max_connections - self.max_connections / 8)
    }
}

/// Settings of a node, each with a default that suits a first try.
///
/// | setting | default | for |
/// |---|---|---|
/// | [`node_id`](Self::node_id) | the directory's, at first a random one | both; fixed with the directory |
/// | [`shards`](Self::shards), [`segment_size`](Self::segment_size), [`region`](Self::region) | the directory's, at first 1, 16 MiB and 0 | leaders; fixed with the directory |
/// | [`epoch`](Self::epoch) | the one that the directory has led under, at first 1 | leaders |
/// | [`commit`](Self::commit) | `synced` | leaders |
/// | [`target`](Self::target) | none | leaders; a follower's is given to [`follow`](Self::follow) |
/// | [`followers`](Self::followers) | whoever of the cluster asks | whoever is followed |
/// | [`wal`](Self::wal) | [`WalOptions::default`] | both |
/// | [`max_wal_bytes`](Self::max_wal_bytes), [`min_wal_bytes`](Self::min_wal_bytes) | 1 GiB and 128 MiB for each shard | both |
/// | [`heartbeat`](Self::heartbeat), [`peer_timeout`](Self::peer_timeout), [`handshake_timeout`](Self::handshake_timeout) | 1 s, 10 s, 5 s | both |
/// | [`reconnect`](Self::reconnect) | 1 s, doubling to 30 s | followers |
/// | [`drain_timeout`](Self::drain_timeout) | 5 s | whoever is followed |
/// | [`session_limits`](Self::session_limits) | [`SessionLimits::default`] | whoever is followed |
/// | [`max_rebuilds`](Self::max_rebuilds) | 2 | whoever is followed |
/// | [`max_connections`](Self::max_connections), [`max_connections_per_address`](Self::max_connections_per_address) | 4096, seven eighths of all | whoever listens |
/// | [`scrub`](Self::scrub) | [`ScrubOptions::default`]: once a day | both |
/// | [`transport`](Self::transport), [`allow_plaintext`](Self::allow_plaintext) | TCP, on this machine only | both |
/// | [`listen`](Self::listen) | does not | followers |
/// | [`on_projection`](Self::on_projection), [`stop_signal`](Self::stop_signal) | none | both |
///
/// ```
/// use std::time::Duration;
/// use towline::wal::{SyncPolicy, WalOptions};
/// use towline::{Commit, Node};
///
/// # let directory = tempfile::tempdir()?;
/// let leader = Node::builder(directory.path())
///     .shards(4)
///     .commit("durable:1".parse()?)
///     .max_wal_bytes(4 << 30)
///     .wal(WalOptions { sync: SyncPolicy::Interval(Duration::from_millis(100)), ..WalOptions::default() })
///     .lead("127.0.0.1:0")?;
/// assert_eq!(leader.commits(towline::ShardId(3))?.policy(), "durable:1".parse::<Commit>()?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct NodeBuilder {
    pub(crate) directory: PathBuf,
    node: Option<NodeId>,
    region: Option<RegionId>,
    shards: Option<u16>,
    segment_size: Option<u64>,
    pub(crate) epoch: Option<Epoch>,
    pub(crate) options: NodeOptions,
    transport: Option<Arc<dyn Transport>>,
    allow_plaintext: bool,
    pub(crate) listen: Option<String>,
    pub(crate) target: Option<Arc<dyn ReplicationTarget>>,
    members: Option<Arc<[NodeId]>>,
    on_projection: Option<OnProjection>,
    stop: ShutdownSignal,
}

impl std::fmt::Debug for NodeBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeBuilder")
            .field("directory", &self.directory)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl NodeBuilder {
    /// Who this node is. Default: what the directory says, else a random number.
    #[must_use]
    pub fn node_id(mut self, node: NodeId) -> Self {
        self.node = Some(node);
        self
    }

    /// Where the log originates. Fixed when the directory is made: opening it with another region is refused. Default:
    /// what the directory says, else region 0. A follower takes its leader's.
    #[must_use]
    pub fn region(mut self, region: RegionId) -> Self {
        self.region = Some(region);
        self
    }

    /// How many shards the log has. Fixed when the directory is made: opening it with another number is refused.
    /// Default: what the directory says, else 1. A follower takes its leader's number.
    #[must_use]
    pub fn shards(mut self, shards: u16) -> Self {
        self.shards = Some(shards);
        self
    }

    /// Bytes of a segment: whole pages of 4096 bytes, from 64 KiB to 1 GiB; a record must fit in one. Fixed when the
    /// directory is made. Default: what the directory says, else 16 MiB. A follower takes its leader's.
    #[must_use]
    pub fn segment_size(mut self, bytes: u64) -> Self {
        self.segment_size = Some(bytes);
        self
    }

    /// The leadership term. Default: the one under which the directory has led before, 1 for a new one; an older one is
    /// refused.
    ///
    /// One node alone leads under an epoch. So a directory whose newest epoch came from another leader, because it has
    /// followed one or was deposed by one, leads only under a higher epoch, which must be given. Who gives it makes
    /// sure that no other node is given the same. The same goes for a leader with followers that was not stopped in
    /// order before the system went down: its log may have lost what they have.
    #[must_use]
    pub fn epoch(mut self, epoch: Epoch) -> Self {
        self.epoch = Some(epoch);
        self
    }

    /// What committed means on this node. Followers acknowledge at its level at once, and at others when it suits them,
    /// unless somebody waits. Default: [`Commit::SYNCED`].
    #[must_use]
    pub fn commit(mut self, commit: Commit) -> Self {
        self.options.commit = commit;
        self
    }

    /// Settings of each shard's log.
    #[must_use]
    pub fn wal(mut self, options: WalOptions) -> Self {
        self.options.wal = options;
        self
    }

    /// A sign of life goes out when nothing was sent for this long. Default: 1 s.
    #[must_use]
    pub fn heartbeat(mut self, every: Duration) -> Self {
        self.options.heartbeat = every;
        self
    }

    /// A peer from which no byte came for this long is gone: several of its heartbeats. Default: 10 s; a follower gives
    /// a leader that beats more slowly three of its heartbeats at least.
    #[must_use]
    pub fn peer_timeout(mut self, timeout: Duration) -> Self {
        self.options.peer_timeout = timeout;
        self
    }

    /// How long a new connection may take to say who it is. Default: 5 s.
    #[must_use]
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.options.handshake_timeout = timeout;
        self
    }

    /// How long a node that stops goes on sending what is pending to its followers. Default: 5 s.
    #[must_use]
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.options.drain_timeout = timeout;
        self
    }

    /// How long a follower waits before it tries again: first `base`, then twice as long each time, at most `cap`, and
    /// each time less by a random part of up to a half. Default: 1 s and 30 s.
    #[must_use]
    pub fn reconnect(mut self, base: Duration, cap: Duration) -> Self {
        self.options.backoff_base = base;
        self.options.backoff_cap = cap;
        self
    }

    /// The most bytes of files that each shard's log takes; `None` or 0 for no bound. Default: 1 GiB
    /// ([`DEFAULT_MAX_WAL_BYTES`](crate::limits::DEFAULT_MAX_WAL_BYTES)).
    ///
    /// Beyond it the oldest segments go although a follower still needs them: it loses its place, and has to be
    /// rebuilt. The bound includes the open segment, the spares and files that wait to be spares again. Segments begin
    /// to go a reserve below it, an eighth of it or three segments if that is more, so that all files together stay
    /// under it; they go unsynced if need be, for the device may be slower than whoever appends. What this node's own
    /// target has not applied durably is kept in any case.
    #[must_use]
    pub fn max_wal_bytes(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.options.retention.max_wal_bytes = bytes.into().filter(|&bytes| bytes > 0);
        self
    }

    /// Bytes of segments that each shard keeps although nobody needs them, within the bound above: a follower that
    /// comes back from a crash may have forgotten some of what it had applied. Default: 128 MiB
    /// ([`DEFAULT_MIN_WAL_BYTES`](crate::limits::DEFAULT_MIN_WAL_BYTES)).
    #[must_use]
    pub fn min_wal_bytes(mut self, bytes: u64) -> Self {
        self.options.retention.min_wal_bytes = bytes;
        self
    }

    /// How long a follower's recovery may take, and how long it may stand still. Default: see [`SessionLimits`].
    #[must_use]
    pub fn session_limits(mut self, limits: SessionLimits) -> Self {
        self.options.sessions = limits;
        self
    }

    /// The followers that a leader has, and no others; not the leader itself. Log is kept for them from the beginning,
    /// and the others that the directory remembers are forgotten. A follower that [listens](Self::listen) feeds no
    /// others than these, and keeps log for those of them that have come. Default: whoever of the same cluster asks may
    /// follow, and is remembered.
    #[must_use]
    pub fn followers(mut self, nodes: impl IntoIterator<Item = NodeId>) -> Self {
        self.members = Some(nodes.into_iter().collect());
        self
    }

    /// Called with how a shard stands whenever that changes in more than its numbers: mode, reason, sessions. Calls
    /// come in order for each shard, from threads of the node, and should be short. The callback may ask the node for
    /// its status. If it panics, that is logged, and the node goes on.
    #[must_use]
    pub fn on_projection(mut self, callback: impl Fn(&Projection) + Send + Sync + 'static) -> Self {
        self.on_projection = Some(Arc::new(callback));
        self
    }

    /// Connections open at a time; more are refused. Default: 4096.
    #[must_use]
    pub fn max_connections(mut self, connections: usize) -> Self {
        self.options.max_connections = connections;
        self
    }

    /// Connections open at a time from one address; more are refused. A follower needs one for each shard. Default:
    /// seven eighths of all.
    #[must_use]
    pub fn max_connections_per_address(mut self, connections: usize) -> Self {
        self.options.max_connections_per_address = Some(connections);
        self
    }

    /// How many rebuilds a node serves at once, each of one follower's shard; more wait for their turn. At least 1.
    /// Default: 2.
    #[must_use]
    pub fn max_rebuilds(mut self, rebuilds: usize) -> Self {
        self.options.max_rebuilds = rebuilds;
        self
    }

    /// How the sealed segments are read again in the background, to find what a disk has forgotten. Default: see
    /// [`ScrubOptions`].
    #[must_use]
    pub fn scrub(mut self, options: ScrubOptions) -> Self {
        self.options.scrub = options;
        self
    }

    /// How streams are made. Default: TCP.
    #[must_use]
    pub fn transport(mut self, transport: Arc<dyn Transport>) -> Self {
        self.transport = Some(transport);
        self
    }

    /// Lets the TCP transport listen on addresses that other machines reach, although nothing is encrypted.
    #[must_use]
    pub fn allow_plaintext(mut self, allow: bool) -> Self {
        self.allow_plaintext = allow;
        self
    }

    /// Makes a follower listen at this address. There it answers requests for its status and its log, also those of a
    /// node that repairs its own log, and feeds further followers (a cascade). Default: it does not listen.
    ///
    /// Those whom it feeds follow it as they would the leader: they catch up from its log, and are rebuilt from its
    /// target where that gives images of its state. What they acknowledge counts for no commit of the leader's: that is
    /// for nodes which the leader feeds itself. Log is kept for them here, within
    /// [`max_wal_bytes`](Self::max_wal_bytes), and [`Follower::forget_follower`] ends that for one that will not come
    /// back.
    ///
    /// It feeds them while its log is known to be a beginning of its leader's: once it has caught up under the epoch in
    /// force, and then also while the leader is away. Before that, and while it is rebuilt, they are told to ask again.
    /// A ring of followers has no leader, and gets no records.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use towline::target::LogOnly;
    /// use towline::{Lsn, Node, ShardId};
    ///
    /// # let parent = tempfile::tempdir()?;
    /// # let directory = |name: &str| parent.path().join(name);
    /// let leader = Node::builder(directory("a")).segment_size(1 << 20).lead("127.0.0.1:0")?;
    /// let relay = Node::builder(directory("b")).listen("127.0.0.1:0");
    /// let relay = relay.follow(leader.local_address(), Arc::new(LogOnly))?;
    /// let address = relay.local_address().ok_or("it listens")?;
    /// let last = Node::builder(directory("c")).follow(address, Arc::new(LogOnly))?;
    ///
    /// let lsn = leader.writer(ShardId(0))?.append(b"a record")?;
    /// while last.applied(ShardId(0))?.load() < lsn {
    ///     std::thread::yield_now();
    /// }
    /// let status = relay.status();
    /// assert_eq!(status.shards[0].followers[0].node, last.manifest().node);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn listen(mut self, address: impl Into<String>) -> Self {
        self.listen = Some(address.into());
        self
    }

    /// Makes a leader apply its own log to a target too, on one thread a shard. Default: it keeps the log only.
    ///
    /// The target is given records once they are written, or once they are synced here where it [needs
    /// that](ReplicationTarget::needs_durable_log): not once they are committed. So it can show what a failover takes
    /// back. What it has not applied yet when the node starts is applied after [`lead`](Self::lead) has returned: it is
    /// up to date once [`Leader::applied`] has reached the head of the log.
    #[must_use]
    pub fn target(mut self, target: Arc<dyn ReplicationTarget>) -> Self {
        self.target = Some(target);
        self
    }

    /// Gives a signal that stops a follower, also while it still waits for a leader to come up. On a leader it ends
    /// listener and streams, once what is pending was sent; its writers write on until [`Leader::shutdown`],
    /// and [`drain_timeout`](Self::drain_timeout) counts from there.
    #[must_use]
    pub fn stop_signal(mut self, stop: ShutdownSignal) -> Self {
        self.stop = stop;
        self
    }

    pub(crate) fn abort_signal(&self) -> &ShutdownSignal {
        &self.stop
    }

    /// Opens the directory as the leader of its log and listens for followers at `address`.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`], [`Error::Mismatch`] (also where [`epoch`](Self::epoch) must be given), [`Error::Corrupt`],
    /// [`Error::StaleEpoch`], [`Error::Network`] for the address, [`Error::Io`]. [`Error::Invalid`] for settings that
    /// have no meaning, and for a target that does not belong to this log or whose rebuild was interrupted.
    pub fn lead(self, address: &str) -> Result<Leader> {
        self.check_meaning()?;
        Leader::start(self, address)
    }

    /// Opens the directory as a follower of the leader at `address`, or of a follower that [listens](Self::listen)
    /// there, and applies what arrives to `target`. Waits until the leader has been reached once if the directory is
    /// new, for it is the leader who knows the shards.
    ///
    /// # Errors
    ///
    /// As [`lead`](Self::lead); [`Error::Refused`] if the leader will not have it; [`Error::ShutDown`] if it was
    /// stopped before the leader was reached.
    pub fn follow(self, address: &str, target: Arc<dyn ReplicationTarget>) -> Result<Follower> {
        self.check_meaning()?;
        Follower::start(self, address, target)
    }

    pub(crate) fn make_transport(&self) -> Arc<dyn Transport> {
        self.transport.clone().unwrap_or_else(|| {
            Arc::new(TcpTransport::new(TcpOptions { allow_plaintext: self.allow_plaintext, ..TcpOptions::default() }))
        })
    }

    /// Refuses settings that have no meaning, before anything is made with them: an identity that nobody can have,
    /// numbers of nothing, and times of zero that would have threads go round without end, or nobody ever be in time.
    fn check_meaning(&self) -> Result<()> {
        let options = &self.options;
        if self.node == Some(NodeId(0)) {
            let reason = "node id 0 means that none is assigned; give the node another, or leave it out";
            return Err(Error::invalid(reason));
        }
        let counts = [
            ("max_connections", options.max_connections),
            ("max_connections_per_address", options.max_connections_per_address.unwrap_or(1)),
            ("max_rebuilds", options.max_rebuilds),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return Err(Error::invalid(format!("{name} of 0: a node needs more than none")));
        }
        let scrubs_every = if options.scrub.bytes_per_second > 0 { options.scrub.every } else { Duration::MAX };
        let times = [
            ("a heartbeat", options.heartbeat),
            ("a peer time-out", options.peer_timeout),
            ("a handshake time-out", options.handshake_timeout),
            ("a wait before the next attempt", options.backoff_base.min(options.backoff_cap)),
            ("a scrubbing interval", scrubs_every),
        ];
        match times.iter().find(|(_, time)| time.is_zero()) {
            Some((what, _)) => Err(Error::invalid(format!("{what} of zero has no meaning; give it a length"))),
            None => Ok(()),
        }
    }

    /// The same of an epoch and of followers, for whoever is to lead as this node.
    fn check_leadership(&self, node: Option<NodeId>) -> Result<()> {
        if let Some(epoch) = self.epoch.filter(|&epoch| epoch == Epoch::ZERO || !epoch.has_successor()) {
            let reason = format!("nobody can lead under epoch {epoch}: the first is 1, and each must have a successor");
            return Err(Error::invalid(reason));
        }
        match self.members.iter().flat_map(|members| members.iter()).find(|&&id| id == NodeId(0) || Some(id) == node) {
            Some(id) => Err(Error::invalid(format!(
                "node {id} is no follower of this leader: it is the leader itself, or nobody; leave it out"
            ))),
            None => Ok(()),
        }
    }

    /// Opens the directory, or makes it as a new leader's. It does not lead under any epoch yet.
    pub(crate) fn open_as_leader(&self) -> Result<DataDir> {
        check_shard_count(self.shards.unwrap_or(1))?;
        self.check_leadership(self.node)?;
        let directory = match DataDir::open(&self.directory)? {
            Some(directory) => directory,
            None => DataDir::create(
                &self.directory,
                Manifest {
                    cluster: ClusterId((u128::from(random()) << 64 | u128::from(random())).max(1)),
                    node: self.node_id_or_random(),
                    region: self.region.unwrap_or(RegionId(0)),
                    shard_count: self.shards.unwrap_or(1),
                    segment_size: self.segment_size.unwrap_or(DEFAULT_SEGMENT_SIZE),
                    epoch: self.epoch.unwrap_or(Epoch::FIRST),
                    own_epoch: true,
                },
            )?,
        };
        self.check_settings(&directory)?;
        self.check_leadership(Some(directory.manifest().node))?;
        Ok(directory)
    }

    /// What is asked for must be what the directory was made with.
    pub(crate) fn check_settings(&self, directory: &DataDir) -> Result<()> {
        let manifest = directory.manifest();
        let differs = |what: &str, asked: String, found: String| Error::Mismatch {
            path: directory.path().to_owned(),
            reason: format!(
                "it was made with {what} {found}, not {asked}; leave the setting out or use another directory"
            )
            .into(),
        };
        let fixed = [
            ("shard count", self.shards.map(u64::from), u64::from(manifest.shard_count)),
            ("segment size", self.segment_size, manifest.segment_size),
            ("node id", self.node.map(|node| node.0), manifest.node.0),
            ("region", self.region.map(|region| u64::from(region.0)), u64::from(manifest.region.0)),
        ];
        let other =
            fixed.into_iter().find_map(|(what, asked, found)| Some((what, asked.filter(|&it| it != found)?, found)));
        other.map_or(Ok(()), |(what, asked, found)| Err(differs(what, asked.to_string(), found.to_string())))
    }

    /// Where applying begins: what the target knows of itself, else what the checkpoint says. A target whose rebuild
    /// was interrupted has applied nothing.
    pub(crate) fn applied_of(
        target: &dyn ReplicationTarget,
        log: &Log,
        checkpoint: &Checkpoint,
    ) -> Result<Arc<AppliedMark>> {
        if target.is_rebuilding(log.shard())? {
            return Ok(AppliedMark::new(Lsn::ZERO, Arc::default(), false));
        }
        let applied = match target.durable_applied(log.shard())? {
            Some(applied) => applied,
            None => checkpoint.entries.get(&log.shard()).map_or(Lsn::ZERO, |entry| entry.applied),
        };
        // One that keeps nothing has nothing to continue.
        let applied = match target.keeps_state() {
            true => applied,
            false => applied.max(log.tail().previous()).min(log.head()),
        };
        // A target that is ahead of its log, or further back than the log reaches, cannot be continued from it.
        if applied > log.head() || applied.next() < log.tail() {
            return Err(Error::invalid(format!(
                "the target of shard {} has applied LSN {applied}, but the log holds LSN {} to {}; directory and target do \
                 not belong together, or a power cut took from the log what the target was given before it was durable",
                log.shard(),
                log.tail(),
                log.head()
            )));
        }
        Ok(AppliedMark::new(applied, Arc::new(Watermark::new(applied)), true))
    }

    pub(crate) fn node_id_or_random(&self) -> NodeId {
        self.node.unwrap_or_else(|| NodeId(random().max(1)))
    }
}

/// Refuses a number of shards that no node can have.
pub(crate) fn check_shard_count(shards: u16) -> Result<()> {
    if (1..=MAX_SHARDS).contains(&shards) {
        Ok(())
    } else {
        Err(Error::invalid(format!("{shards} shards: a node has at least 1 and at most {MAX_SHARDS}")))
    }
}

/// Random bits from the standard library's per-process hash keys, time and a counter: for identities, not for secrets.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u64(unix_ms());
    hasher.write_u32(std::process::id());
    hasher.finish()
}
