//! What nodes cost that have nothing to do: a leader and three followers with many shards, who only tell each other
//! that they are alive.
//!
//! Whatever makes a sleeping thread do anything wakes it up, so voluntary context switches count what an idle node
//! does, heartbeats included; the limit beside it is a program that has the same streams and does nothing but beat: on
//! each end of each, one thread that writes once a second and one that reads. Memory is what belongs to the process
//! alone, without the mapped log: heap and stacks.
//!
//! Either runs in a process of its own, the same program once more, and is asked for a measurement by a line on its
//! input.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use towline::wal::WalOptions;

use super::machine::{self, ThreadCounts};
use super::nodes::{Nodes, Settings};
use super::report::{Contest, Sample, Unit};
use super::{Bench, Result, streams};

const FOLLOWERS: u16 = 3;
/// Nothing that was begun is still under way after this: sessions, the checkpoint.
const SETTLE: Duration = Duration::from_millis(2500);
const BEAT: Duration = Duration::from_secs(1);
/// What a heartbeat frame takes, about.
const BEAT_LEN: usize = 32;
/// Names of the threads that count begin with this.
const THREADS: &str = "tl-";

const ENDED: &str = "the idle process ended";

/// The arguments that make this program one of the two.
pub(super) const NODES: &str = "idle-nodes";
pub(super) const HEARTBEATS: &str = "idle-heartbeats";

const BEATS: &str = "heartbeats and nothing else";
const MEMORY: &str = "memory, a shard and follower";
const BARE_MEMORY: &str = "memory of a stream's four threads";

pub(super) fn run(bench: &Bench) -> Result<()> {
    if !bench.wants("idle", names(bench), BEATS) && !bench.wants("idle", MEMORY, BARE_MEMORY) {
        return Ok(());
    }
    if ThreadCounts::now(THREADS).is_none() {
        log::warn!("idle: left out, for this system does not tell what threads do");
        return Ok(());
    }
    let mut both = [Idle::start(bench, HEARTBEATS)?, Idle::start(bench, NODES)?];
    // Both are looked at in the same second, by whoever comes first in a round: neither takes anything from the other.
    let awaited: RefCell<[Option<Measured>; 2]> = RefCell::default();
    // Memory is looked at in the same rounds, and shown below.
    let kept: RefCell<[Vec<Measured>; 2]> = RefCell::default();
    let mut measure = |which: usize| -> Result<Sample> {
        let mut awaited = awaited.borrow_mut();
        if awaited[which].is_none() {
            both.iter_mut().try_for_each(Idle::ask)?;
            for (process, measured) in both.iter_mut().zip(awaited.iter_mut()) {
                *measured = Some(process.answer()?);
            }
        }
        let measured = awaited[which].take().ok_or("nothing was measured")?;
        let sample = measured.activity();
        kept.borrow_mut()[which].push(measured);
        Ok(sample)
    };
    let measure = RefCell::new(&mut measure);
    Contest::new("idle", 0, Unit::WakeUpsPerSecond)
        .with_all_running()
        .bare(BEATS, || (measure.borrow_mut())(0))
        .ours(names(bench), &[BEATS], || (measure.borrow_mut())(1))
        .run(bench)?;
    let [of_heartbeats, of_nodes] = kept.take();
    let streams = f64::from(streams_of(bench));
    // All of it counts, the leader's part too: what a shard takes for one follower more is less.
    let kib =
        |measured: &Measured| Sample::new(measured.anonymous_kib / streams).with("threads", Some(measured.threads));
    let (mut of_nodes, mut of_heartbeats) = (of_nodes.iter().map(kib), of_heartbeats.iter().map(kib));
    let ended = || "a round more than there were";
    Contest::new("idle", 0, Unit::Kibibytes)
        .bare(BARE_MEMORY, || Ok(of_heartbeats.next().ok_or_else(ended)?))
        .ours(MEMORY, &[BARE_MEMORY], || Ok(of_nodes.next().ok_or_else(ended)?))
        .run(bench)
}

const fn shards(quick: bool) -> u16 {
    if quick { 16 } else { 64 }
}

fn names(bench: &Bench) -> &'static str {
    if bench.quick { "16 shards, 3 followers" } else { "64 shards, 3 followers" }
}

fn streams_of(bench: &Bench) -> u32 {
    u32::from(shards(bench.quick)) * u32::from(FOLLOWERS)
}

/// What one look at a process gave.
struct Measured {
    wakes_per_second: f64,
    io_calls_per_second: f64,
    cpu_ms_per_second: f64,
    threads: f64,
    anonymous_kib: f64,
}

impl Measured {
    fn activity(&self) -> Sample {
        Sample::new(self.wakes_per_second)
            .with("read_write_calls_per_second", Some(self.io_calls_per_second))
            .with("cpu_ms_per_second", Some(self.cpu_ms_per_second))
            .with("threads", Some(self.threads))
    }
}

/// A process that idles. It ends with its input.
struct Idle {
    child: Child,
    ask: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Idle {
    fn start(bench: &Bench, what: &str) -> Result<Idle> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", what]).args(bench.quick.then_some("--quick"));
        if let Some(directory) = &bench.dir {
            command.arg("--dir").arg(directory);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let missing = || "a child process without input and output";
        let ask = Some(child.stdin.take().ok_or_else(missing)?);
        let answers = BufReader::new(child.stdout.take().ok_or_else(missing)?);
        Ok(Idle { child, ask, answers })
    }

    /// Has it measure what it does from now on.
    fn ask(&mut self) -> Result<()> {
        Ok(self.ask.as_mut().ok_or(ENDED)?.write_all(b"measure\n")?)
    }

    /// What it measured.
    fn answer(&mut self) -> Result<Measured> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let numbers: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let &[wakes_per_second, io_calls_per_second, cpu_ms_per_second, threads, anonymous_kib] = &numbers[..] else {
            return Err(ENDED.into());
        };
        Ok(Measured { wakes_per_second, io_calls_per_second, cpu_ms_per_second, threads, anonymous_kib })
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        drop(self.ask.take());
        if let Err(error) = self.child.wait() {
            log::warn!("an idle process was not waited for: {error}");
        }
    }
}

/// Is the idle leader with its followers, until its input ends.
pub(super) fn run_nodes(bench: &Bench) -> Result<()> {
    let before = machine::anonymous_bytes();
    let wal = WalOptions { spare_segments: 1, ..WalOptions::default() };
    let settings = Settings { shards: shards(bench.quick), wal, ..Settings::with_segments_of(256 << 10) };
    let (nodes, writers) = Nodes::start_sharded(bench, FOLLOWERS, settings)?;
    std::thread::sleep(SETTLE);
    answer(bench, before)?;
    drop(writers);
    drop(nodes);
    Ok(())
}

/// Is the program that only beats, until its input ends.
pub(super) fn run_heartbeats(bench: &Bench) -> Result<()> {
    let before = machine::anonymous_bytes();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    for _ in 0..streams_of(bench) {
        let (near, far) = streams::connect_to(&listener)?;
        for end in [near, far] {
            let (mut reading, mut writing) = (end.try_clone()?, end);
            // Both end with the process.
            let thread = |name: &str| std::thread::Builder::new().name(format!("{THREADS}{name}")).stack_size(64 << 10);
            thread("read").spawn(move || while reading.read_exact(&mut [0; BEAT_LEN]).is_ok() {})?;
            thread("beat").spawn(move || {
                while writing.write_all(&[1; BEAT_LEN]).is_ok() {
                    std::thread::sleep(BEAT);
                }
            })?;
        }
    }
    std::thread::sleep(Duration::from_millis(100));
    answer(bench, before)
}

/// Measures once for each line of the input.
fn answer(bench: &Bench, anonymous_before: Option<u64>) -> Result<()> {
    // Whole beats, so that each stream counts alike.
    let window = BEAT * if bench.quick { 1 } else { 4 };
    for line in std::io::stdin().lock().lines() {
        line?;
        let (usage, seconds, before, after) = loop {
            let (usage, began, before) = (machine::Usage::now(), Instant::now(), ThreadCounts::now(THREADS));
            std::thread::sleep(window);
            let (seconds, after) = (began.elapsed().as_secs_f64(), ThreadCounts::now(THREADS));
            let (Some(before), Some(after)) = (before, after) else {
                return Err("threads cannot be counted here".into());
            };
            // What a thread did is gone with it: then this was no idle window yet.
            if after.threads >= before.threads {
                break (usage, seconds, before, after);
            }
        };
        let anonymous =
            machine::anonymous_bytes().zip(anonymous_before).map(|(now, before)| now.saturating_sub(before));
        say!(
            "{} {} {} {} {}",
            after.wakes.saturating_sub(before.wakes) as f64 / seconds,
            after.io_calls.saturating_sub(before.io_calls) as f64 / seconds,
            usage.cpu_seconds_since().unwrap_or(f64::NAN) * 1e3 / seconds,
            after.threads,
            anonymous.unwrap_or_default() as f64 / 1024.0
        );
    }
    Ok(())
}
