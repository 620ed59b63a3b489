//! `towline demo`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use crossbeam_channel::{Receiver, Sender};
use hdrhistogram::Histogram;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use towline::status::Status;
use towline::target::ReplicationTarget;
use towline::wal::scan::{Relation, compare_logs};
use towline::wal::{LogWriter, Record};
use towline::{Commit, Follower, Leader, Lsn, Node, NodeId, ShardId, ShutdownSignal};

use super::{DONE, FOUND_DAMAGE, Outcome, human_bytes};

/// Watch replication work: a leader and followers on loopback TCP and real files, and proof at the end.
///
/// Each shard's writer appends as fast as it can, with a bounded number of records not yet committed; every
/// thousandth record's commit is timed. Then the load stops, the followers catch up, and the demo proves that every
/// log is byte for byte the leader's and that every record was applied exactly once and in order.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Demo {
    /// Shards of the log
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    shards: u16,
    /// Followers
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    followers: u16,
    /// How long to append
    #[arg(long, default_value_t = 5)]
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
    /// Directory for the nodes' data, kept afterwards [default: a temporary one, removed afterwards]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print one JSON object instead of sentences
    #[arg(long)]
    json: bool,
}

/// Records a writer may have appended and not yet seen committed.
const WINDOW: u64 = 16 * 1024;
/// One record in this many is timed.
const TIMED: u64 = 1000;
/// How long followers may take to catch up when the load is over.
const SETTLE: Duration = Duration::from_secs(60);

/// What the load came to.
struct Load {
    records: u64,
    seconds: f64,
    latency_us: Histogram<u64>,
}

/// What the proof found of one follower.
struct Proof {
    received: u64,
    durable: u64,
    applied: u64,
    identical: bool,
    in_order: bool,
    problem: Option<String>,
}

impl Demo {
    pub(super) fn run(self) -> Outcome {
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
        // Every byte is kept, so that all of it can be compared at the end.
        let leader = Node::builder(directory.join("leader"))
            .shards(self.shards)
            .commit(self.commit)
            .max_wal_bytes(None)
            .lead("127.0.0.1:0")?;
        let mut followers = Vec::new();
        for number in 1..=self.followers {
            let target = Arc::new(Checking::new(self.shards));
            let follower = Node::builder(directory.join(format!("follower-{number}")))
                .node_id(NodeId(u64::from(number)))
                .max_wal_bytes(None)
                .follow(leader.local_address(), Arc::clone(&target) as Arc<dyn ReplicationTarget>)?;
            followers.push((follower, target));
        }
        if !self.json {
            eprintln!(
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

    /// Appends until the time, the bytes or the user's patience is over.
    fn load(&self, leader: &Leader, stop: &ShutdownSignal) -> Result<Load, Box<dyn std::error::Error>> {
        let over = stop.child();
        let began = Instant::now();
        let most = self.max_mb.saturating_mul(1_000_000) / u64::from(self.record_size) / u64::from(self.shards);
        let mut writers = Vec::new();
        for shard in (0..self.shards).map(ShardId) {
            writers.push((leader.writer(shard)?, Arc::clone(leader.commits(shard)?)));
        }
        let results = std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (writer, commits) in writers {
                let (timed_to, timed) = crossbeam_channel::bounded(64);
                let (over, commits_too) = (over.clone(), Arc::clone(&commits));
                let appending = scope.spawn(move || self.append(writer, &commits, most, &timed_to, &over));
                threads.push((appending, scope.spawn(move || self.time_commits(&commits_too, &timed))));
            }
            self.watch(leader, &over, began, |over| {
                threads.iter().all(|pair| pair.0.is_finished()) || over.is_shutdown()
            });
            over.shutdown();
            threads.into_iter().map(|(append, time)| (append.join(), time.join())).collect::<Vec<_>>()
        });
        let seconds = began.elapsed().as_secs_f64();
        let mut load = Load { records: 0, seconds, latency_us: Histogram::new(3)? };
        for (appended, timed) in results {
            load.records += appended.map_err(|_| "a writer panicked")??;
            load.latency_us.add(timed.map_err(|_| "a timer panicked")?)?;
        }
        Ok(load)
    }

    /// One shard's writer: appends with at most [`WINDOW`] records not committed, then waits for the last.
    fn append(
        &self,
        mut writer: LogWriter,
        commits: &towline::Commits,
        most: u64,
        timed: &Sender<(Lsn, Instant)>,
        over: &ShutdownSignal,
    ) -> towline::Result<u64> {
        let shard = writer.log().shard();
        let before = writer.end().head;
        let mut record = vec![0; self.record_size as usize];
        let mut lsn = before;
        while lsn.records_since(before) < most && !over.is_shutdown() {
            Checking::fill(&mut record, shard, lsn.next());
            let began = Instant::now();
            lsn = writer.append(&record)?;
            if lsn.get().is_multiple_of(TIMED) {
                let _ = timed.try_send((lsn, began));
            }
            if lsn.records_since(commits.committed()) >= WINDOW {
                let half = Lsn(lsn.get() - WINDOW / 2);
                let _ = commits.wait(half, self.commit, Some(Instant::now() + Duration::from_secs(1)));
            }
        }
        let outcome = commits.wait(lsn, self.commit, Some(Instant::now() + SETTLE));
        if lsn > before && !outcome.is_committed() {
            log::warn!("shard {shard}: the last record was not committed: {outcome:?}");
        }
        Ok(lsn.records_since(before))
    }

    /// Waits for each timed record's commit: the time from before its append until this thread knows.
    fn time_commits(&self, commits: &towline::Commits, timed: &Receiver<(Lsn, Instant)>) -> Histogram<u64> {
        // Bounds and precision that cannot be refused.
        let mut latency_us = Histogram::new(3).unwrap_or_else(|_| unreachable!("3 digits are allowed"));
        while let Ok((lsn, began)) = timed.recv() {
            if commits.wait(lsn, self.commit, Some(began + SETTLE)).is_committed() {
                let _ = latency_us.record(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX));
            }
        }
        latency_us
    }

    /// Shows marks while the load runs.
    fn watch(
        &self,
        leader: &Leader,
        over: &ShutdownSignal,
        began: Instant,
        finished: impl Fn(&ShutdownSignal) -> bool,
    ) {
        let table = Table::new(self.followers, self.json);
        let end = began + Duration::from_secs(self.seconds);
        let mut last = (began, 0);
        while !finished(over) && Instant::now() < end {
            let left = end.saturating_duration_since(Instant::now());
            let _ = over.wait_timeout(left.min(table.interval()));
            let status = leader.status();
            let now = Instant::now();
            let records: u64 = status.shards.iter().map(|shard| shard.head.get()).sum();
            #[allow(clippy::cast_precision_loss, reason = "for people to read")]
            let rate = (records - last.1) as f64 / now.duration_since(last.0).as_secs_f64().max(1e-9);
            last = (now, records);
            table.show(&status, rate, u64::from(self.record_size));
        }
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
            println!(
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
            println!(
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
                println!(
                    "follower {}: received {}, durable {}, applied {}; log {}; records {}",
                    number + 1,
                    proof.received,
                    proof.durable,
                    proof.applied,
                    if proof.identical { "byte-identical" } else { "DIFFERENT" },
                    if proof.in_order { "each once and in order" } else { "NOT each once and in order" },
                );
                if let Some(problem) = &proof.problem {
                    println!("  {problem}");
                }
            }
            println!("{}", if verified { "proven: every follower has exactly the leader's log" } else { "NOT proven" });
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

/// Compares a follower's files with the leader's, and asks its target what it saw.
fn prove(directory: &Path, stopped: &Stopped, shards: u16) -> Proof {
    let mut problem = stopped.target.problem();
    let mut identical = true;
    for shard in (0..shards).map(ShardId) {
        let of = |node: &str| directory.join(node).join(towline::types::shard_directory_name(shard));
        let compared = compare_logs(&of("leader"), &of(&format!("follower-{}", stopped.number)));
        match compared {
            Ok(comparison) if comparison.relation == Relation::Identical => {}
            Ok(comparison) => {
                identical = false;
                problem.get_or_insert_with(|| super::verify::describe(&comparison));
            }
            Err(error) => {
                identical = false;
                problem.get_or_insert_with(|| error.to_string());
            }
        }
    }
    Proof {
        received: stopped.received,
        durable: stopped.durable,
        applied: stopped.target.applied(),
        identical,
        in_order: stopped.target.problem().is_none(),
        problem,
    }
}

/// A target that applies by checking: each shard's records must come once, in order, and with the bytes that their
/// number says.
struct Checking {
    /// The LSN applied last, by shard. Written by that shard's applier only.
    applied: Vec<AtomicU64>,
    wrong: parking_lot::Mutex<Option<String>>,
}

impl Checking {
    fn new(shards: u16) -> Checking {
        Checking { applied: (0..shards).map(|_| AtomicU64::new(0)).collect(), wrong: parking_lot::Mutex::default() }
    }

    /// The record that `lsn` of `shard` must be: both numbers, then bytes that follow from them.
    fn fill(record: &mut [u8], shard: ShardId, lsn: Lsn) {
        for (chunk, word) in record.chunks_mut(8).zip(Checking::words(shard, lsn)) {
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    fn is_filled(record: &[u8], shard: ShardId, lsn: Lsn) -> bool {
        record.chunks(8).zip(Checking::words(shard, lsn)).all(|(chunk, word)| *chunk == word[..chunk.len()])
    }

    fn words(shard: ShardId, lsn: Lsn) -> impl Iterator<Item = [u8; 8]> {
        let first = lsn.get() << 16 | u64::from(shard.get());
        std::iter::successors(Some(first), |word| Some(word.rotate_left(9).wrapping_add(0x9e37_79b9)))
            .map(u64::to_le_bytes)
    }

    fn applied(&self) -> u64 {
        self.applied.iter().map(|applied| applied.load(Ordering::Acquire)).sum()
    }

    fn problem(&self) -> Option<String> {
        self.wrong.lock().clone()
    }
}

impl ReplicationTarget for Checking {
    fn durable_applied(&self, _shard: ShardId) -> towline::Result<Option<Lsn>> {
        Ok(None)
    }

    fn apply(&self, shard: ShardId, record: Record<'_>) -> towline::Result<()> {
        let applied = &self.applied[usize::from(shard.get())];
        let last = applied.load(Ordering::Relaxed);
        if record.lsn != Lsn(last).next() || !Checking::is_filled(record.bytes, shard, record.lsn) {
            let found = format!("shard {shard}: LSN {} came after {last}, or with the wrong bytes", record.lsn);
            self.wrong.lock().get_or_insert(found);
        }
        applied.store(record.lsn.get(), Ordering::Release);
        Ok(())
    }

    fn sync(&self, _shard: ShardId) -> towline::Result<()> {
        Ok(())
    }
}

/// The live table: a line for the leader and one for each follower.
struct Table {
    lines: Option<(MultiProgress, Vec<ProgressBar>)>,
    silent: bool,
}

impl Table {
    fn new(followers: u16, silent: bool) -> Table {
        let lines = (std::io::stderr().is_terminal() && !silent).then(|| {
            let table = MultiProgress::new();
            let style = ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
            let lines = (0..=followers).map(|_| table.add(ProgressBar::new(1).with_style(style.clone()))).collect();
            (table, lines)
        });
        Table { lines, silent }
    }

    fn interval(&self) -> Duration {
        if self.lines.is_some() { Duration::from_millis(200) } else { Duration::from_secs(1) }
    }

    fn show(&self, status: &Status, rate: f64, record_size: u64) {
        if self.silent {
            return;
        }
        #[allow(clippy::cast_precision_loss, reason = "for people to read")]
        let leader = format!(
            "leader       written {:>12}  {:>10.0} records/s  {:>7.1} MB/s",
            status.shards.iter().map(|shard| shard.head.get()).sum::<u64>(),
            rate,
            rate * record_size as f64 / 1e6
        );
        let mut lines = vec![leader];
        let nodes = status.shards.first().map(|shard| shard.followers.len()).unwrap_or_default();
        for index in 0..nodes {
            let of = |mark: fn(&towline::status::FollowerStatus) -> Lsn| -> u64 {
                status
                    .shards
                    .iter()
                    .filter_map(|shard| shard.followers.get(index))
                    .map(|follower| mark(follower).get())
                    .sum()
            };
            lines.push(format!(
                "follower {:<3} received {:>11}  durable {:>11}  applied {:>11}  behind {:>8} records",
                index + 1,
                of(|follower| follower.received),
                of(|follower| follower.durable),
                of(|follower| follower.applied),
                status
                    .shards
                    .iter()
                    .map(|shard| shard.head.get())
                    .sum::<u64>()
                    .saturating_sub(of(|follower| follower.received)),
            ));
        }
        match &self.lines {
            Some((_, bars)) => bars.iter().zip(lines).for_each(|(bar, line)| bar.set_message(line)),
            None => lines.iter().for_each(|line| eprintln!("{line}")),
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if let Some((_, bars)) = &self.lines {
            bars.iter().for_each(ProgressBar::abandon);
        }
    }
}
