//! `towline demo`.

mod bounded;
mod frozen;
mod load;
mod proof;
mod scenario;
mod sizes;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use towline::target::ReplicationTarget;
use towline::{Commit, Follower, Leader, Node, NodeId, ShardId, ShutdownSignal};

use self::load::Load;
use self::proof::{Checking, Proof, prove};
use self::scenario::Scenario;
use super::{DONE, FOUND_DAMAGE, Outcome, WRONG_USAGE, human_bytes};

/// Watch replication work: a leader and followers on loopback TCP and real files, and proof at the end.
///
/// Each shard's writer appends as fast as it can, with a bounded number of records not yet committed; every
/// thousandth record's commit is timed. Then the load stops, the followers catch up, and the demo proves that every
/// log is byte for byte the leader's and that every record was applied exactly once and in order.
///
/// With --scenario the nodes keep stores of keys and values, one follower is brought into trouble and out of it, and
/// the demo proves that logs and stores are equal at the end.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Demo {
    /// Show this instead of steady replication
    #[arg(long)]
    scenario: Option<Scenario>,
    /// Shards of the log
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    shards: u16,
    /// Followers
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    followers: u16,
    /// How long to append
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Bytes of a record
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..=1_048_576))]
    record_size: u32,
    /// What committed means: synced, received:K, durable:K, applied:K, or synced+ and one of them
    #[arg(long, default_value = "received:1", value_name = "LEVEL")]
    commit: Commit,
    /// Stop early when the records appended have this many megabytes, for each node keeps them all
    #[arg(long, default_value_t = 2048)]
    max_mb: u64,
    /// Bound the leader's log at this many bytes for each shard; with --scenario slow-follower the followers are
    /// processes of their own, all of them are frozen until they have lost their places, and then they are rebuilt
    #[arg(long, value_name = "BYTES", requires = "scenario", value_parser = clap::value_parser!(u64).range(1..))]
    max_wal_bytes: Option<u64>,
    /// With --scenario catch-up: how many megabytes of values the last follower is behind when it comes back, while the
    /// leader goes on
    #[arg(long, value_name = "MEGABYTES", requires = "scenario")]
    behind_mb: Option<u64>,
    /// With --behind-mb: the most megabytes of values a second that the leader goes on with [default: all it can]
    #[arg(long, value_name = "MEGABYTES", requires = "behind_mb", value_parser = clap::value_parser!(u64).range(1..))]
    leader_mb_per_s: Option<u64>,
    /// Directory for the nodes' data, kept afterwards [default: a temporary one, removed afterwards]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print one JSON object instead of sentences
    #[arg(long)]
    json: bool,
}

/// How long followers may take to catch up when the load is over.
const SETTLE: Duration = Duration::from_secs(60);

impl Demo {
    pub(super) fn run(self) -> Outcome {
        if let Some((_, count)) = self.commit.asked_of_followers()
            && count > usize::from(self.followers)
        {
            tell!("error: --commit {} can never be with --followers {}", self.commit, self.followers);
            return Ok(WRONG_USAGE);
        }
        let stop = super::stop_at_interrupt()?;
        let directory = self.directory()?;
        let outcome = self.run_in(&directory, &stop);
        if self.dir.is_none() {
            let _ = std::fs::remove_dir_all(&directory);
        }
        outcome
    }

    fn directory(&self) -> std::io::Result<PathBuf> {
        let directory = match &self.dir {
            Some(directory) => directory.clone(),
            None => std::env::temp_dir().join(format!("towline-demo-{}", std::process::id())),
        };
        std::fs::create_dir_all(&directory)?;
        Ok(directory)
    }

    fn run_in(&self, directory: &Path, stop: &ShutdownSignal) -> Outcome {
        if let Some(scenario) = self.scenario {
            return scenario.run(self, directory, stop);
        }
        let leader = Node::builder(directory.join("leader"))
            .shards(self.shards)
            .commit(self.commit)
            .max_wal_bytes(None)
            .lead("127.0.0.1:0")?;
        let mut followers = Vec::new();
        for number in 1..=self.followers {
            let target = Arc::new(Checking::new(self.shards));
            let follower = Node::builder(directory.join(format!("follower-{number}")))
                .max_wal_bytes(None)
                .node_id(NodeId(u64::from(number)))
                .follow(leader.local_address(), Arc::clone(&target) as Arc<dyn ReplicationTarget>)?;
            followers.push((follower, target));
        }
        if !self.json {
            tell!(
                "one leader at {}, {} followers, {} shards, records of {} bytes, commit at {}, in {}",
                leader.local_address(),
                self.followers,
                self.shards,
                self.record_size,
                self.commit,
                directory.display()
            );
        }
        let load = self.load(&leader, stop)?;
        self.settle(&leader, &followers);
        let followers = stop_all(leader, followers)?;
        let proofs: Vec<_> = followers.iter().map(|stopped| prove(directory, stopped, self.shards)).collect();
        Ok(self.report(&load, &proofs))
    }

    /// Waits until every follower has applied and synced everything.
    fn settle(&self, leader: &Leader, followers: &[(Follower, Arc<Checking>)]) {
        let deadline = Instant::now() + SETTLE;
        for shard in (0..self.shards).map(ShardId) {
            let Ok(head) = leader.log(shard).map(|log| log.head()) else { return };
            for (follower, _) in followers {
                let (Ok(log), Ok(applied)) = (follower.log(shard), follower.applied(shard)) else { return };
                towline::wait_any(
                    &[towline::Until { mark: applied, at_least: head }],
                    towline::WaitStrategy::Park,
                    Some(deadline),
                );
                let _ = log.wait_synced(head.min(log.head()), Some(deadline));
            }
        }
    }

    fn report(&self, load: &Load, proofs: &[Proof]) -> u8 {
        let verified = load.records > 0
            && proofs.iter().all(|proof| proof.identical && proof.in_order && proof.applied == load.records);
        let bytes = load.records * u64::from(self.record_size);
        #[allow(clippy::cast_precision_loss, reason = "for people to read")]
        let mb_per_s = bytes as f64 / 1e6 / load.seconds;
        let quantile = |q| load.latency_us.value_at_quantile(q);
        if self.json {
            let followers: Vec<_> = proofs
                .iter()
                .map(|proof| {
                    format!(
                        "{{\"received\":{},\"durable\":{},\"applied\":{},\"identical\":{}}}",
                        proof.received, proof.durable, proof.applied, proof.identical
                    )
                })
                .collect();
            say!(
                "{{\"records\":{},\"bytes\":{bytes},\"seconds\":{:.3},\"mb_per_s\":{mb_per_s:.1},\
                 \"commit_latency_us\":{{\"p50\":{},\"p99\":{},\"p999\":{}}},\"followers\":[{}],\"verified\":{verified}}}",
                load.records,
                load.seconds,
                quantile(0.5),
                quantile(0.99),
                quantile(0.999),
                followers.join(",")
            );
        } else {
            say!(
                "{} records, {} in {:.1} s: {mb_per_s:.0} MB/s; commit ({}) under this load p50 {} us, p99 {} us, p99.9 {} us",
                load.records,
                human_bytes(bytes),
                load.seconds,
                self.commit,
                quantile(0.5),
                quantile(0.99),
                quantile(0.999)
            );
            for (number, proof) in proofs.iter().enumerate() {
                say!(
                    "follower {}: received {}, durable {}, applied {}; log {}; records {}",
                    number + 1,
                    proof.received,
                    proof.durable,
                    proof.applied,
                    if proof.identical { "byte-identical" } else { "DIFFERENT" },
                    if proof.in_order { "each once and in order" } else { "NOT each once and in order" },
                );
                if let Some(problem) = &proof.problem {
                    say!("  {problem}");
                }
            }
            say!("{}", if verified { "proven: every follower has exactly the leader's log" } else { "NOT proven" });
        }
        if verified { DONE } else { FOUND_DAMAGE }
    }
}

/// A follower that has stopped: its directory's number and what its target saw.
struct Stopped {
    number: usize,
    target: Arc<Checking>,
    received: u64,
    durable: u64,
}

fn stop_all(leader: Leader, followers: Vec<(Follower, Arc<Checking>)>) -> towline::Result<Vec<Stopped>> {
    leader.shutdown()?;
    let mut stopped = Vec::new();
    for (index, (follower, target)) in followers.into_iter().enumerate() {
        let status = follower.status();
        follower.shutdown()?;
        stopped.push(Stopped {
            number: index + 1,
            target,
            received: status.shards.iter().map(|shard| shard.head.get()).sum(),
            durable: status.shards.iter().map(|shard| shard.synced.get()).sum(),
        });
    }
    Ok(stopped)
}
