//! `towline bench`: what Towline does, beside what the machine can do, measured in the same run.
//!
//! One file a workload. Each sets up a [contest](report::Contest) between Towline and small programs that do as little
//! as the work needs ([`limits`] on files, [`streams`] on sockets), and the ratio is what counts: absolute figures
//! change with the machine and with the day. What they mean as JSON stands in [`report`]. A new workload is a file with
//! a `run`, and a line in [`Workload`] and in [`Workload::parts`].

mod append;
mod catch_up;
mod commit;
mod fan_out;
mod group;
mod idle;
mod limits;
mod load;
mod log_lane;
mod machine;
mod nodes;
mod plot;
mod processors;
mod rebuild;
mod recover;
mod report;
mod shards;
mod ship;
mod stalled;
mod streams;
mod sync;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use towline::ShutdownSignal;

use super::{DONE, Outcome};
use load::Limit;
use report::Row;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T, E = Error> = std::result::Result<T, E>;

/// Measure Towline beside the bare limits of this machine, in interleaved rounds.
///
/// Each result names ours and the bare program that it is compared with, both as median, smallest and largest of the
/// rounds, and their ratio: 1 is as good as the bare program, less is worse, for rates and for latencies alike. Only
/// ratios mean much, and only on a machine that does nothing else.
///
/// With --json each comparison is an object on a line of its own: workload, size, ours, against ("bare", or "ours"
/// where Towline is compared with itself under other circumstances), bare, ratio, ratio_min, ratio_max, rounds. ours
/// and bare have what, median, min, max, unit, and more where it is known, such as percentiles: microseconds by
/// percent.
///
/// Example:  towline bench all --quick --plot result.html
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Bench {
    /// What to measure
    workload: Workload,
    /// Print one JSON object a line instead of text
    #[arg(long)]
    json: bool,
    /// Less data and fewer rounds: everything in about a minute, with more noise
    #[arg(long)]
    quick: bool,
    /// Bytes of a record, one or several sizes [default: what suits the workload]
    #[arg(long, num_args = 1.., value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    record_size: Vec<u32>,
    /// Rounds [default: 5, or 3 with --quick]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Only comparisons with this in their names, such as "defaults / pwrite" or "rebuild idle leader", and what they
    /// need
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Write a picture of the results: a file that ends in .svg or .html and needs no other
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Records a second that open-loop loads start
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,
    /// Directory for the files, on the disk to measure; what is put there is removed [default: the temporary directory]
    #[arg(long)]
    dir: Option<PathBuf>,
    #[arg(skip)]
    stop: Option<ShutdownSignal>,
    #[arg(skip)]
    scratches: AtomicU64,
    /// What has been measured.
    #[arg(skip)]
    rows: Mutex<Vec<Row>>,
}

/// A workload's name and what runs it.
type Part = (&'static str, fn(&Bench) -> Result<()>);

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Workload {
    /// Records that nobody waits for
    Append,
    /// One writer that waits for stable storage
    Sync,
    /// 4 and 32 threads that wait for stable storage
    Group,
    /// Live replication to one follower
    Ship,
    /// One record at a time until a follower acknowledges it
    Commit,
    /// A follower that joins late
    CatchUp,
    /// A follower that has lost its place, idle and under load
    Rebuild,
    /// Opening a log
    Recover,
    /// What 0, 1, 2 and 4 followers cost the writer
    FanOut,
    /// What a stopped and a dead follower cost the writer
    Stalled,
    /// One load over 1, 4, 16 and 64 shards
    Shards,
    /// What nodes do and take that have nothing to do
    Idle,
    /// All of them
    All,
    #[value(hide = true)]
    IdleNodes,
    #[value(hide = true)]
    IdleHeartbeats,
}

impl Workload {
    /// The workloads that it stands for.
    fn parts(self) -> &'static [Part] {
        match self {
            Workload::Append => &[("append", append::run)],
            Workload::Sync => &[("sync", sync::run)],
            Workload::Group => &[("group", group::run)],
            Workload::Ship => &[("ship", ship::run)],
            Workload::Commit => &[("commit", commit::run)],
            Workload::CatchUp => &[("catch-up", catch_up::run)],
            Workload::Rebuild => &[("rebuild", rebuild::run)],
            Workload::Recover => &[("recover", recover::run)],
            Workload::FanOut => &[("fan-out", fan_out::run)],
            Workload::Stalled => &[("stalled", stalled::run)],
            Workload::Shards => &[("shards", shards::run)],
            Workload::Idle => &[("idle", idle::run)],
            Workload::All => &[
                ("append", append::run),
                ("sync", sync::run),
                ("group", group::run),
                ("ship", ship::run),
                ("commit", commit::run),
                ("catch-up", catch_up::run),
                ("rebuild", rebuild::run),
                ("recover", recover::run),
                ("fan-out", fan_out::run),
                ("stalled", stalled::run),
                ("shards", shards::run),
                ("idle", idle::run),
            ],
            Workload::IdleNodes => &[(idle::NODES, idle::run_nodes)],
            Workload::IdleHeartbeats => &[(idle::HEARTBEATS, idle::run_heartbeats)],
        }
    }

    /// One half of another workload, in a process of its own.
    fn is_part(self) -> bool {
        matches!(self, Workload::IdleNodes | Workload::IdleHeartbeats)
    }
}

impl Bench {
    pub(super) fn run(mut self) -> Outcome {
        self.stop = Some(super::stop_at_interrupt()?);
        match self.measure() {
            Ok(()) => Ok(DONE),
            Err(error) => Err(error),
        }
    }

    fn measure(&self) -> Result<()> {
        // Before anything is measured: a mistyped name should not cost a run.
        self.plot.as_deref().map(plot::Format::of).transpose()?;
        // All files stand below it, so that nothing is left behind.
        let root = self.scratch("")?;
        if self.workload.is_part() {
            return self.workload.parts().iter().try_for_each(|(_, run)| run(self));
        }
        if machine::is_in_memory(root.path()) {
            log::warn!("{} is in memory: syncs cost nothing there; use --dir", root.path().display());
        }
        if !self.json {
            say!("{}; median (smallest to largest) of {} rounds", machine::describe(root.path()), self.rounds());
        }
        for (name, run) in self.workload.parts() {
            let (usage, began) = (machine::Usage::now(), Instant::now());
            run(self)?;
            self.show_resources(name, usage, began);
        }
        if !self.only.is_empty() && self.rows.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            return Err(format!("no comparison has any of {:?} in its names", self.only).into());
        }
        if let Some(path) = &self.plot {
            let about = format!("{}; {} rounds", machine::describe(root.path()), self.rounds());
            plot::write(path, &about, &self.rows.lock().unwrap_or_else(PoisonError::into_inner))?;
        }
        Ok(())
    }

    /// Keeps a result for the picture.
    fn keep(&self, row: Row) {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).push(row);
    }

    /// What the workload took in all, bare programs and preparations included.
    fn show_resources(&self, workload: &str, usage: machine::Usage, began: Instant) {
        let (seconds, cpu) = (began.elapsed().as_secs_f64(), usage.cpu_seconds_since().unwrap_or(f64::NAN));
        let peak = machine::peak_resident_bytes().map_or(f64::NAN, |bytes| bytes as f64 / 1e6);
        if !self.json {
            say!(
                "{workload:<9} took {seconds:.1} s and {cpu:.1} s of processor time; at most {peak:.0} MB in memory so far\n"
            );
        }
    }

    /// Whether a comparison was asked for.
    fn wants(&self, workload: &str, ours: &str, against: &str) -> bool {
        let line = format!("{workload} {ours} / {against}");
        self.only.is_empty() || self.only.iter().any(|only| line.contains(only))
    }

    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 3 } else { 5 })
    }

    fn record_sizes(&self, default: &[u64]) -> Vec<u64> {
        if self.record_size.is_empty() {
            return default.to_vec();
        }
        self.record_size.iter().copied().map(u64::from).collect()
    }

    /// Bytes of records in a round.
    fn volume(&self, full: u64, quick: u64) -> u64 {
        if self.quick { quick } else { full }
    }

    /// Operations of a round in which latencies are recorded.
    fn latency_limit(&self) -> Limit {
        if self.quick {
            Limit { operations: 400, time: Duration::from_millis(200) }
        } else {
            Limit { operations: 4000, time: Duration::from_secs(2) }
        }
    }

    fn check_interrupted(&self) -> Result<()> {
        match &self.stop {
            Some(stop) if stop.is_shutdown() => Err("interrupted".into()),
            _ => Ok(()),
        }
    }

    /// A directory that is removed when it is dropped.
    fn scratch(&self, name: &str) -> Result<Scratch> {
        let parent = self.dir.clone().unwrap_or_else(std::env::temp_dir);
        let number = self.scratches.fetch_add(1, Ordering::Relaxed);
        let root = parent.join(format!("towline-bench-{}", std::process::id()));
        let path = if name.is_empty() { root } else { root.join(format!("{name}-{number}")) };
        std::fs::create_dir_all(&path)?;
        Ok(Scratch(path))
    }
}

/// Bytes that a batch of one record takes beside the record, with room to spare.
const BATCH_OVERHEAD: u64 = 72;

struct Scratch(PathBuf);

impl Scratch {
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            log::warn!("{} was not removed: {error}", self.0.display());
        }
    }
}

/// A record that does not compress and is not all zeros.
fn record(size: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    });
    bytes.take(usize::try_from(size).unwrap_or(usize::MAX)).collect()
}
