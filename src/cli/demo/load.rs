//! The load of the demo, and the table that shows what it does.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use hdrhistogram::Histogram;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use towline::status::Status;
use towline::wal::LogWriter;
use towline::{Leader, Lsn, ShardId, ShutdownSignal};

use super::Demo;
use super::proof::Checking;

/// How long the last records of the load, and those timed, may take to be committed.
const LAST_COMMIT: Duration = Duration::from_secs(5);

/// Records a writer may have appended and not yet seen committed.
const WINDOW: u64 = 16 * 1024;
/// One record in this many is timed.
const TIMED: u64 = 1000;

/// What the load came to.
pub(super) struct Load {
    pub(super) records: u64,
    pub(super) seconds: f64,
    pub(super) latency_us: Histogram<u64>,
}

impl Demo {
    /// Appends until the time, the bytes or the user's patience is over.
    pub(super) fn load(&self, leader: &Leader, stop: &ShutdownSignal) -> Result<Load, Box<dyn std::error::Error>> {
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
                let _ = commits.wait(half, self.commit, Some(Instant::now() + Duration::from_millis(100)));
            }
        }
        // What cannot be committed in a while of this load will not be.
        let outcome = commits.wait(lsn, self.commit, Some(Instant::now() + LAST_COMMIT));
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
            if commits.wait(lsn, self.commit, Some(began + LAST_COMMIT)).is_committed() {
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
}

/// The live table: a line for the leader and one for each follower.
pub(super) struct Table {
    lines: Option<(MultiProgress, Vec<ProgressBar>)>,
    silent: bool,
}

impl Table {
    pub(super) fn new(followers: u16, silent: bool) -> Table {
        let lines = (std::io::stderr().is_terminal() && !silent).then(|| {
            let table = MultiProgress::new();
            let style = ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
            let lines = (0..=followers).map(|_| table.add(ProgressBar::new(1).with_style(style.clone()))).collect();
            (table, lines)
        });
        Table { lines, silent }
    }

    pub(super) fn interval(&self) -> Duration {
        if self.lines.is_some() { Duration::from_millis(200) } else { Duration::from_secs(1) }
    }

    pub(super) fn show(&self, status: &Status, rate: f64, record_size: u64) {
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
            None => lines.iter().for_each(|line| tell!("{line}")),
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
