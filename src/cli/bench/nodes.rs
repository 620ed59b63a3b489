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

use super::{Bench, Result, Scratch};

const SHARD: ShardId = ShardId(0);
/// After this long something is wrong, and the benchmark says so instead of waiting on.
const PATIENCE: Duration = Duration::from_secs(120);

/// How the nodes are set up.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) segment_size: u64,
    pub(super) wal: WalOptions,
    pub(super) commit: Commit,
    pub(super) spin_receive: bool,
}

impl Settings {
    /// Defaults, but for the segment size.
    pub(super) fn with_segments_of(segment_size: u64) -> Settings {
        Settings { segment_size, wal: WalOptions::default(), commit: Commit::SYNCED, spin_receive: false }
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
    /// A leader and its followers, connected, with one record in every log and every spare segment prepared.
    pub(super) fn start(bench: &Bench, followers: u16, settings: Settings) -> Result<(Nodes, LogWriter)> {
        let scratch = bench.scratch("nodes")?;
        let directory = scratch.path().join("leader");
        let leader = builder(&directory, &settings)
            .segment_size(settings.segment_size)
            .commit(settings.commit)
            .lead("127.0.0.1:0")?;
        let mut writer = leader.writer(SHARD)?;
        let mut nodes = Nodes { followers: Vec::new(), leader, settings, scratch };
        for _ in 0..followers {
            nodes.add_follower()?;
        }
        let lsn = writer.append(b"the first record opens the first segment")?;
        if followers > 0 {
            let everyone = Commit::followers(AckLevel::Applied, usize::from(followers))?;
            let outcome = nodes.commits()?.wait(lsn, everyone, Some(Instant::now() + PATIENCE));
            if !outcome.is_committed() {
                return Err(format!("the followers did not connect: {outcome:?}").into());
            }
        }
        let keep = nodes.settings.wal.spare_segments;
        wait_for_spares(&directory, nodes.settings.segment_size, keep)?;
        for (_, directory) in &nodes.followers {
            wait_for_spares(directory, nodes.settings.segment_size, keep)?;
        }
        Ok((nodes, writer))
    }

    /// One follower more, in a directory of its own.
    pub(super) fn add_follower(&mut self) -> Result<()> {
        let number = self.followers.len() + 1;
        let directory = self.scratch.path().join(format!("follower-{number}"));
        let follower = builder(&directory, &self.settings)
            .node_id(NodeId(number as u64))
            .reconnect(Duration::from_millis(10), Duration::from_secs(1))
            .follow(self.leader.local_address(), Arc::new(LogOnly))?;
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

    /// Waits until every follower has received and applied `lsn`.
    pub(super) fn wait_applied(&self, lsn: Lsn) -> Result<()> {
        for (follower, _) in &self.followers {
            let reached = [Until { mark: follower.applied(SHARD)?, at_least: lsn }];
            if towline::wait_any(&reached, WaitStrategy::Park, Some(Instant::now() + PATIENCE)) == Waited::TimedOut {
                return Err(format!("a follower did not apply LSN {lsn} in time: {:?}", self.leader.status()).into());
            }
        }
        Ok(())
    }
}

fn builder(directory: &Path, settings: &Settings) -> NodeBuilder {
    let options = TcpOptions { spin_receive: settings.spin_receive, ..TcpOptions::default() };
    let transport: Arc<dyn Transport> = Arc::new(TcpTransport::new(options));
    Node::builder(directory).wal(settings.wal).max_wal_bytes(None).transport(transport)
}

/// Waits until as many spares as are kept have their full length, and until they are on stable storage.
fn wait_for_spares(node: &Path, segment_size: u64, keep: usize) -> Result<()> {
    let shard = node.join("shard-0000");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut full = Vec::new();
        for entry in std::fs::read_dir(&shard)? {
            let path = entry?.path();
            let is_spare = path.to_string_lossy().ends_with(".wal.tmp");
            if is_spare && std::fs::metadata(&path).is_ok_and(|found| found.len() == segment_size) {
                full.push(path);
            }
        }
        if full.len() >= keep.max(1) {
            return Ok(full.iter().try_for_each(|path| std::fs::File::open(path)?.sync_all())?);
        }
        if Instant::now() > deadline {
            return Err(format!("{} has {} spares, not {keep}", shard.display(), full.len()).into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
