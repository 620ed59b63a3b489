//! `towline leader`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use towline::scrub::ScrubOptions;
use towline::target::{FixedStore, ReplicationTarget};
use towline::{Commit, Epoch, Lsn, Node, NodeBuilder, NodeId, ShardId, ShutdownSignal, Until, WaitStrategy};

use super::input::{RecordLines, Taken, append_stdin};
use super::kv::{self, KvWriter, Shape};
use super::{DONE, FAILED, Outcome};

/// Lead: append records and ship them to every follower that connects.
///
/// With --stdin each line of standard input is a record (without its line break); lines go to the shards in turn.
/// Without it the leader serves the log that its directory holds.
///
/// With --kv the leader keeps a store of keys and values beside its log, and so does every follower. Each line is then
/// a key, a tab and the value; a key alone deletes it. A directory that has a store is always opened with it.
///
/// Examples:
///   journalctl -f | towline leader --dir /var/lib/towline --shards 4 --stdin --commit durable:1
///   printf 'boat\tred\n' | towline leader --dir /var/lib/towline --kv 32:200 --stdin --exit-on-eof
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Leader {
    /// Data directory; made if it is not there
    #[arg(long)]
    dir: PathBuf,
    /// Address to listen at for followers; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:7400")]
    listen: String,
    /// Shards of a new directory [default: 1]; of an existing one it must be what it was made with
    #[arg(long)]
    shards: Option<u16>,
    /// Bytes of a segment of a new directory [default: 16777216]
    #[arg(long)]
    segment_size: Option<u64>,
    /// Keep a store for keys and values of up to these many bytes, beside the log
    #[arg(long, value_name = "KEYLEN:VALUELEN")]
    kv: Option<Shape>,
    /// Leading bits of a key that choose its shard, of which there are then 2^N [default: a hash of the key chooses]
    #[arg(long, value_name = "N", requires = "kv", default_value_t = 0, hide_default_value = true)]
    prefix_bits: u8,
    /// This node's id [default: random, kept in the directory]
    #[arg(long)]
    node_id: Option<u64>,
    /// Leadership term; needed, and higher than any before, where the newest was another leader's, or the system went
    /// down while this node led and others followed [default: as last led]
    #[arg(long)]
    epoch: Option<u64>,
    /// Most bytes of log that each shard keeps, the open segment and spares included, whoever still needs them; 0 for
    /// no bound [default: 1073741824]
    #[arg(long, value_name = "BYTES")]
    max_wal_bytes: Option<u64>,
    /// Bytes of log that each shard keeps although nobody needs them, within the bound [default: 134217728]
    #[arg(long, value_name = "BYTES")]
    min_wal_bytes: Option<u64>,
    /// Forget this follower, which will not come back: no log is kept for it, and another one can take its place among
    /// the 64 that a leader remembers. May be given several times
    #[arg(long, value_name = "ID")]
    forget: Vec<u64>,
    /// Bytes a second of old log that are read again to find damage; 0 for none [default: 8388608]
    #[arg(long, value_name = "BYTES")]
    scrub: Option<u64>,
    /// Read records from standard input, one a line; with a store, keys and values
    #[arg(long)]
    stdin: bool,
    /// What committed means: synced, received:K, durable:K, applied:K, or synced+ and one of them
    #[arg(long, default_value = "synced", value_name = "LEVEL")]
    commit: Commit,
    /// With --stdin: leave at the end of the input once every record is committed, instead of going on serving
    #[arg(long, requires = "stdin")]
    exit_on_eof: bool,
    /// When about to leave: give up waiting for the last commits after this many seconds
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    commit_timeout: u64,
    /// Listen on an address that other machines reach, although nothing is encrypted
    #[arg(long)]
    allow_plaintext: bool,
}

/// What became of standard input.
struct Ingested {
    records: u64,
    committed: u64,
    problem: Option<String>,
}

impl Leader {
    pub(super) fn run(self) -> Outcome {
        let stop = super::stop_at_interrupt()?;
        let store = kv::open_as_leader(&self.dir, self.kv, self.prefix_bits, self.shards)?;
        let leader = self.builder(store.as_ref()).lead(&self.listen)?;
        let manifest = leader.manifest();
        for &node in &self.forget {
            leader.forget_follower(NodeId(node))?;
            tell!("follower {node} is forgotten");
        }
        tell!(
            "leading {} with {} shards{}, node {}, epoch {}, at {}",
            self.dir.display(),
            manifest.shard_count,
            kv::describe(store.as_deref()),
            manifest.node,
            manifest.epoch,
            leader.local_address()
        );
        let ingested = if self.stdin { Some(self.ingest(&leader, store.as_ref(), &stop)?) } else { None };
        let problem = ingested.as_ref().and_then(|ingested| ingested.problem.clone());
        if !self.exit_on_eof && problem.is_none() {
            stop.wait();
        }
        leader.shutdown()?;
        kv::close(store)?;
        if let Some(problem) = problem {
            return Err(problem.into());
        }
        let missing = ingested.is_some_and(|ingested| ingested.committed < ingested.records);
        Ok(if missing && (self.exit_on_eof || !stop.is_shutdown()) { FAILED } else { DONE })
    }

    fn builder(&self, store: Option<&Arc<FixedStore>>) -> NodeBuilder {
        let mut builder = Node::builder(&self.dir).commit(self.commit).allow_plaintext(self.allow_plaintext);
        if let Some(store) = store {
            builder =
                builder.target(Arc::clone(store) as Arc<dyn ReplicationTarget>).shards(store.router().shard_count());
        }
        if let Some(shards) = self.shards {
            builder = builder.shards(shards);
        }
        if let Some(bytes) = self.segment_size {
            builder = builder.segment_size(bytes);
        }
        if let Some(node) = self.node_id {
            builder = builder.node_id(NodeId(node));
        }
        if let Some(bytes) = self.max_wal_bytes {
            builder = builder.max_wal_bytes(bytes);
        }
        if let Some(bytes) = self.min_wal_bytes {
            builder = builder.min_wal_bytes(bytes);
        }
        if let Some(bytes_per_second) = self.scrub {
            builder = builder.scrub(ScrubOptions { bytes_per_second, ..ScrubOptions::default() });
        }
        if let Some(epoch) = self.epoch {
            builder = builder.epoch(Epoch(epoch));
        }
        builder
    }

    /// Appends standard input, waits until it is committed, and says how much of it is.
    fn ingest(
        &self,
        leader: &towline::Leader,
        store: Option<&Arc<FixedStore>>,
        stop: &ShutdownSignal,
    ) -> Result<Ingested, Box<dyn std::error::Error>> {
        let shards: Vec<_> = (0..leader.shard_count()).map(ShardId).collect();
        let before: Vec<_> =
            shards.iter().map(|&shard| leader.log(shard).map(|log| log.head())).collect::<towline::Result<_>>()?;
        let (taken, idle_deletes) = match store {
            Some(store) => match KvWriter::new(leader, Arc::clone(store), stop) {
                Err(error) if error.is_shutdown() && stop.is_shutdown() => (Taken::default(), 0),
                writer => {
                    let mut writer = writer?;
                    (append_stdin(&mut writer, stop)?, writer.idle_deletes)
                }
            },
            None => {
                let writers = shards.iter().map(|&shard| leader.writer(shard)).collect::<towline::Result<_>>()?;
                (append_stdin(&mut RecordLines::new(writers), stop)?, 0)
            }
        };
        // Who goes on serving has time.
        let leaves = self.exit_on_eof || taken.problem.is_some();
        // More seconds than there can be is no bound.
        let timeout = leaves.then(|| Duration::from_secs(self.commit_timeout));
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let heads: Vec<_> = shards
            .iter()
            .map(|&shard| leader.log(shard).map(|log| (shard, log.head())))
            .collect::<towline::Result<_>>()?;
        self.wait_for_commits(leader, &heads, deadline, stop)?;
        let mut ingested = Ingested { records: 0, committed: 0, problem: taken.problem };
        for (&(shard, head), &before) in heads.iter().zip(&before) {
            let commits = leader.commits(shard)?;
            let committed = match commits.wait(head, self.commit, Some(Instant::now())) {
                towline::Outcome::Committed => head,
                _ => commits.committed().min(head),
            };
            ingested.records += head.records_since(before);
            ingested.committed += committed.records_since(before);
        }
        let idle = if idle_deletes == 0 { String::new() } else { format!("; {idle_deletes} deletes found no key") };
        say!("{} of {} records committed ({}){idle}", ingested.committed, ingested.records, self.commit);
        Ok(ingested)
    }

    /// Waits until the heads of all shards are committed and the leader's own store shows them, or `stop` is given.
    fn wait_for_commits(
        &self,
        leader: &towline::Leader,
        heads: &[(ShardId, Lsn)],
        deadline: Option<Instant>,
        stop: &ShutdownSignal,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let mut waits = Vec::new();
        for &(shard, head) in heads {
            waits.push((Arc::clone(leader.commits(shard)?), head));
        }
        let (commit, done) = (self.commit, ShutdownSignal::new());
        let all = done.clone();
        // On a thread of its own, which ends with the leader at the latest: an interrupt need not wait for it.
        std::thread::Builder::new().name("tl-commits".to_owned()).spawn(move || {
            for (commits, head) in waits {
                let _ = commits.wait(head, commit, deadline);
            }
            all.shutdown();
        })?;
        towline::wait_any(&[done.until(), stop.until()], WaitStrategy::Park, None);
        for &(shard, head) in heads {
            let Some(applied) = leader.applied(shard)? else { continue };
            let shown = Until { mark: applied, at_least: head };
            let ends = [shown, leader.log(shard)?.until_ended(), stop.until()];
            towline::wait_any(&ends, WaitStrategy::Park, deadline);
        }
        Ok(())
    }
}
