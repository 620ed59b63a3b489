//! A leader and followers in this process, over loopback TCP, for measuring.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use towline::target::LogOnly;
use towline::transport::{TcpOptions, TcpTransport, Transport};
use towline::wal::{Log, LogWriter, WalOptions};
use towline::{
    AckLevel, Commit, Commits, Follower, Leader, Lsn, Node, NodeBuilder, NodeId, ShardId, Until, WaitStrategy, Waited,
};

use super::processors::Place;
use super::{Bench, Result, Scratch};

const SHARD: ShardId = ShardId(0);
/// After this long something is wrong, and the benchmark says so instead of waiting on.
const PATIENCE: Duration = Duration::from_secs(120);

/// How the nodes are set up.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) shards: u16,
    pub(super) segment_size: u64,
    pub(super) wal: WalOptions,
    pub(super) commit: Commit,
    /// Whether the leader keeps its whole log although no follower needs it.
    pub(super) keeps_log: bool,
    /// Whether followers spin for what the leader sends.
    pub(super) spin_receive: bool,
    /// Whether each follower follows the one before it, instead of the leader.
    pub(super) in_a_chain: bool,
    /// On which processors the leader and its followers run.
    pub(super) place: Place,
}

impl Settings {
    /// Defaults, but for the segment size.
    pub(super) fn with_segments_of(segment_size: u64) -> Settings {
        Settings {
            shards: 1,
            segment_size,
            wal: WalOptions::default(),
            commit: Commit::SYNCED,
            keeps_log: false,
            spin_receive: false,
            in_a_chain: false,
            place: Place::Anywhere,
        }
    }
}

/// Running nodes. Followers go first when it is dropped, their files last.
pub(super) struct Nodes {
    followers: Vec<(Follower, PathBuf)>,
    leader: Leader,
    settings: Settings,
    scratch: Scratch,
}

impl Nodes {
    /// A leader of one shard and its followers, connected, with one record in every log and every spare segment
    /// prepared.
    pub(super) fn start(bench: &Bench, followers: u16, settings: Settings) -> Result<(Nodes, LogWriter)> {
        let (nodes, mut writers) = Nodes::start_sharded(bench, followers, Settings { shards: 1, ..settings })?;
        let writer = writers.pop().ok_or("a leader without a shard")?;
        Ok((nodes, writer))
    }

    /// The same with as many shards as the settings say; a writer for each.
    pub(super) fn start_sharded(bench: &Bench, followers: u16, settings: Settings) -> Result<(Nodes, Vec<LogWriter>)> {
        let scratch = bench.scratch("nodes")?;
        // A leader's thread that reads acknowledgements sleeps, also where others spin: on two processors it would take
        // turns with the thread that waits for them.
        let mut leader = builder(&scratch.path().join("leader"), &settings, TcpOptions::default());
        if settings.keeps_log {
            leader = leader.min_wal_bytes(u64::MAX);
        }
        let leader = leader
            .shards(settings.shards)
            .segment_size(settings.segment_size)
            .commit(settings.commit)
            .lead("127.0.0.1:0")?;
        let shards = 0..settings.shards;
        let mut writers = shards.map(|shard| leader.writer(ShardId(shard))).collect::<towline::Result<Vec<_>>>()?;
        let mut nodes = Nodes { followers: Vec::new(), leader, settings, scratch };
        for _ in 0..followers {
            nodes.add_follower()?;
        }
        for writer in &mut writers {
            writer.append(b"the first record opens the first segment")?;
        }
        // A leader hears of those that it feeds itself.
        nodes.wait_connected(if nodes.settings.in_a_chain { followers.min(1) } else { followers })?;
        nodes.wait_all_applied()?;
        nodes.wait_for_spares()?;
        Ok((nodes, writers))
    }

    /// Waits until so many followers, of this process or others, have applied what is in every shard's log.
    pub(super) fn wait_connected(&self, followers: u16) -> Result<()> {
        if followers == 0 {
            return Ok(());
        }
        let everyone = Commit::followers(AckLevel::Applied, usize::from(followers))?;
        for shard in (0..self.settings.shards).map(ShardId) {
            let head = self.leader.log(shard)?.head();
            let outcome = self.leader.wait(shard, head, everyone, Some(Instant::now() + PATIENCE))?;
            if !outcome.is_committed() {
                return Err(format!("the followers of shard {shard} did not connect: {outcome:?}").into());
            }
        }
        Ok(())
    }

    /// Where followers that are not of this process find the leader, and where they may put their files.
    pub(super) fn place_for_others(&self) -> (&str, &Path) {
        (self.leader.local_address(), self.scratch.path())
    }

    /// One follower more, in a directory of its own: of the leader, or of the newest follower where they are in a
    /// chain.
    pub(super) fn add_follower(&mut self) -> Result<()> {
        let number = self.followers.len() + 1;
        let directory = self.scratch.path().join(format!("follower-{number}"));
        let options = TcpOptions { spin_receive: self.settings.spin_receive, ..TcpOptions::default() };
        let follower = builder(&directory, &self.settings, options)
            .node_id(NodeId(number as u64))
            .reconnect(Duration::from_millis(10), Duration::from_secs(1));
        let (follower, upstream) = if self.settings.in_a_chain {
            let before = self.followers.last().and_then(|(before, _)| before.local_address());
            (follower.listen("127.0.0.1:0"), before.unwrap_or(self.leader.local_address()))
        } else {
            (follower, self.leader.local_address())
        };
        let start = || follower.follow(upstream, Arc::new(LogOnly));
        let follower = self.settings.place.there(start)?;
        self.followers.push((follower, directory));
        Ok(())
    }

    /// Ends the newest follower and removes its files.
    pub(super) fn remove_follower(&mut self) -> Result<()> {
        if let Some((follower, directory)) = self.followers.pop() {
            follower.shutdown()?;
            std::fs::remove_dir_all(directory)?;
        }
        Ok(())
    }

    pub(super) fn leader_log(&self) -> Result<&Arc<Log>> {
        Ok(self.leader.log(SHARD)?)
    }

    pub(super) fn commits(&self) -> Result<&Arc<Commits>> {
        Ok(self.leader.commits(SHARD)?)
    }

    /// Waits until every node has as many spare segments as it keeps, so that none is made beside the clock.
    pub(super) fn wait_for_spares(&self) -> Result<()> {
        let deadline = Some(Instant::now() + PATIENCE);
        for shard in (0..self.settings.shards).map(ShardId) {
            self.leader.log(shard)?.wait_for_spares(deadline)?;
            for (follower, _) in &self.followers {
                follower.log(shard)?.wait_for_spares(deadline)?;
            }
        }
        Ok(())
    }

    /// Waits until every follower of this process has received and applied `lsn`.
    pub(super) fn wait_applied(&self, lsn: Lsn) -> Result<()> {
        self.wait_applied_of(SHARD, lsn)
    }

    /// Waits until they have everything that is in the leader's logs.
    pub(super) fn wait_all_applied(&self) -> Result<()> {
        let mut shards = (0..self.settings.shards).map(ShardId);
        shards.try_for_each(|shard| self.wait_applied_of(shard, self.leader.log(shard)?.head()))
    }

    fn wait_applied_of(&self, shard: ShardId, lsn: Lsn) -> Result<()> {
        for (follower, _) in &self.followers {
            let reached = [Until { mark: follower.applied(shard)?, at_least: lsn }];
            if towline::wait_any(&reached, WaitStrategy::Park, Some(Instant::now() + PATIENCE)) == Waited::TimedOut {
                let status = self.leader.status();
                return Err(format!("a follower did not apply LSN {lsn} of shard {shard} in time: {status:?}").into());
            }
        }
        Ok(())
    }
}

impl Drop for Nodes {
    /// The newest follower first: nobody is left behind that looks for whom it followed.
    fn drop(&mut self) {
        while self.followers.pop().is_some() {}
    }
}

fn builder(directory: &Path, settings: &Settings, options: TcpOptions) -> NodeBuilder {
    let transport: Arc<dyn Transport> = Arc::new(TcpTransport::new(options));
    Node::builder(directory).wal(settings.wal).max_wal_bytes(None).transport(transport)
}
