//! Repairing the log of a stopped node with what a peer still has.
//!
//! Damage to what was synced keeps a node from opening its log. [`Repair`] fetches just the damaged ranges from another
//! node that holds the same log, a leader or a follower that listens, and puts them in place so that a crash leaves
//! either the old or the repaired segments. What is believed of the peer's bytes, and what is not, stands in the
//! sources at `wal/mend.rs`: they must fit the chain of the log before and behind the damage.
//!
//! A log is damaged here in the sense of [`verify_log`]: a torn tail is none, recovery cuts it.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::data_dir::{DataDir, Manifest};
use crate::directory_lock::lock_directory;
use crate::error::{Error, Result};
use crate::replication::{CHECKPOINT_FILE_NAME, Checkpoint};
use crate::transport::Transport;
use crate::transport::segment::PeerLog;
use crate::types::{Lsn, ShardId, shard_directory_name};
use crate::wal::mend::{Mending, Source};
use crate::wal::scan::{LogReport, Problem, ProblemKind, verify_log};
use crate::wal::{KnownSynced, LogIdentity, WrittenHere};

pub use crate::wal::mend::MendedRange;

/// What to repair, and from where.
///
/// ```
/// use towline::{Node, ShardId};
/// use towline::repair::Repair;
/// use towline::transport::TcpTransport;
///
/// # let directory = tempfile::tempdir()?;
/// # let (leader_dir, copy) = (directory.path().join("a"), directory.path().join("b"));
/// let leader = Node::builder(&leader_dir).segment_size(1 << 20).lead("127.0.0.1:0")?;
/// # let target = std::sync::Arc::new(towline::target::LogOnly);
/// # Node::builder(&copy).follow(leader.local_address(), target)?.shutdown()?;
/// let report = Repair::new(&copy).run(&TcpTransport::default(), leader.local_address())?;
/// assert!(report.is_sound() && report.ranges().next().is_none(), "nothing was damaged");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Repair {
    /// The data directory of the node, which must be stopped.
    pub directory: PathBuf,
    /// The one shard to repair; all of them if there is none.
    pub shard: Option<ShardId>,
    /// Whether to fetch and check everything and then put nothing in place. What is fetched is kept in the directory of
    /// the operating system for temporary files meanwhile.
    pub dry_run: bool,
    /// How long connecting, and each answer, may take. Default: 30 s.
    pub timeout: Duration,
}

/// What became of a repair.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// Each shard that was looked at, by number.
    pub shards: Vec<ShardRepair>,
}

/// What became of one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardRepair {
    /// Which.
    pub shard: ShardId,
    /// What was wrong with its log before.
    pub problems: Vec<Problem>,
    /// The ranges that were put in place, in the order of the log; that would be, in a dry run.
    pub ranges: Vec<MendedRange>,
    /// What is wrong with its log now.
    pub remaining: Vec<Problem>,
    /// The last LSN of the log before anything is missing, now.
    pub head: Lsn,
}

impl RepairReport {
    /// Whether recovery would now open every log that was looked at.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.shards.iter().all(|shard| shard.remaining.iter().all(|problem| !needs_mending(problem)))
    }

    /// All ranges.
    pub fn ranges(&self) -> impl Iterator<Item = &MendedRange> {
        self.shards.iter().flat_map(|shard| &shard.ranges)
    }
}

impl Repair {
    /// Repairs every shard of the node in `directory`.
    #[must_use]
    pub fn new(directory: impl AsRef<Path>) -> Repair {
        let directory = directory.as_ref().to_owned();
        Repair { directory, shard: None, dry_run: false, timeout: Duration::from_secs(30) }
    }

    /// Repairs, with what the node at `address` has. It is asked only if something is damaged.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if the node runs, [`Error::Invalid`] if it has no such shard; [`Error::Corrupt`] where the
    /// damage cannot be repaired from this peer, which has another history or not enough of it; [`Error::Refused`] if
    /// the peer is of another cluster, or does not have the range any more; [`Error::Mismatch`], [`Error::Protocol`],
    /// [`Error::Network`], [`Error::Io`]. The shard at which it failed is as it was; those before it are repaired.
    pub fn run(&self, transport: &dyn Transport, address: &str) -> Result<RepairReport> {
        let missing = || Error::invalid(format!("there is no node's data in {}", self.directory.display()));
        // A dry run only looks; so that nothing moves meanwhile, the node must be stopped all the same.
        let data = DataDir::open(&self.directory)?.ok_or_else(missing)?;
        if !self.dry_run {
            data.raise_version()?;
        }
        let manifest = data.manifest();
        let shards = match self.shard {
            Some(shard) if shard.0 >= manifest.shard_count => {
                return Err(Error::invalid(format!(
                    "there is no shard {shard}: the node has {}, numbered from 0",
                    manifest.shard_count
                )));
            }
            Some(shard) => shard.0..shard.0 + 1,
            None => 0..manifest.shard_count,
        };
        let checkpoint = Checkpoint::load(&self.directory.join(CHECKPOINT_FILE_NAME))?.unwrap_or_default();
        let mut report = RepairReport::default();
        for shard in shards.map(ShardId) {
            let lsn = checkpoint.entries.get(&shard).map_or(Lsn::ZERO, |entry| entry.synced);
            let known = KnownSynced { lsn, written_here: WrittenHere::by(&manifest) };
            let mut source = LazyPeer { repair: self, transport, address, manifest, shard, peer: None };
            report.shards.push(self.repair_shard(&manifest, shard, known, &mut source)?);
        }
        Ok(report)
    }

    fn repair_shard(
        &self,
        manifest: &Manifest,
        shard: ShardId,
        known: KnownSynced,
        source: &mut dyn Source,
    ) -> Result<ShardRepair> {
        let directory = self.directory.join(shard_directory_name(shard));
        let _lock = lock_directory(&directory)?;
        let identity = LogIdentity {
            cluster: manifest.cluster,
            region: manifest.region,
            shard,
            segment_size: manifest.segment_size,
        };
        let verify = || verify_log(&directory, Some(&identity), known, &mut ());
        let LogReport { problems, synced, head, .. } = verify()?;
        if !problems.iter().any(needs_mending) {
            return Ok(ShardRepair { shard, remaining: problems.clone(), problems, ranges: Vec::new(), head });
        }
        let staging = if self.dry_run { temporary_directory(shard)? } else { directory.clone() };
        let known = KnownSynced { lsn: synced, ..known };
        let mending = Mending { directory: &directory, identity: &identity, known, staging: &staging };
        let mended = mending.run(source);
        if self.dry_run {
            // Empty by now.
            let _ = std::fs::remove_dir(&staging);
        }
        let ranges = mended?;
        let LogReport { problems: remaining, head, .. } = verify()?;
        Ok(ShardRepair { shard, problems, ranges, remaining, head })
    }
}

/// What a repair is for. A torn tail is left to recovery.
fn needs_mending(problem: &Problem) -> bool {
    problem.kind != ProblemKind::TornTail
}

/// A directory of this process's own.
fn temporary_directory(shard: ShardId) -> Result<PathBuf> {
    let path = std::env::temp_dir().join(format!("towline-repair-{}-{shard}", std::process::id()));
    std::fs::create_dir(&path).map_err(Error::io("create", &path))?;
    Ok(path)
}

/// The peer, connected to when it is first needed.
struct LazyPeer<'a> {
    repair: &'a Repair,
    transport: &'a dyn Transport,
    address: &'a str,
    manifest: Manifest,
    shard: ShardId,
    peer: Option<PeerLog>,
}

impl Source for LazyPeer<'_> {
    fn fetch(&mut self, segment: Lsn, range: Range<u64>, put: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<u64> {
        let peer = match &mut self.peer {
            Some(peer) => peer,
            None => {
                let of = (self.repair.directory.as_path(), &self.manifest, self.shard);
                self.peer.insert(PeerLog::connect(self.transport, self.address, self.repair.timeout, of)?)
            }
        };
        peer.fetch(segment, range, put)
    }

    fn name(&self) -> &str {
        self.address
    }
}
