//! One client, one record at a time, until it is acknowledged.

use towline::wal::{LogWriter, WalOptions};
use towline::{Commit, Outcome, WaitStrategy};

use super::limits::DurableWriter;
use super::load::{self, Limit, Pace};
use super::machine::{self, Usage};
use super::nodes::{Nodes, Settings};
use super::processors::Place;
use super::report::{Contest, Sample, Unit};
use super::streams::{PingPong, RelayedPingPong};
use super::{Bench, Result, Scratch};

/// Where the record must have been made durable, if anywhere.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Durable {
    Nowhere,
    AtFollower,
    AtBoth,
}

#[derive(Clone, Copy)]
struct Case {
    ours: &'static str,
    bare: &'static str,
    durable: Durable,
    wait: WaitStrategy,
    /// Receivers look for bytes again and again instead of sleeping.
    spin: bool,
    /// Records start at fixed times instead of one after the other.
    open_loop: bool,
    place: Place,
}

const PARKED: Case = Case {
    ours: "received:1",
    bare: "ping-pong",
    durable: Durable::Nowhere,
    wait: WaitStrategy::Park,
    spin: false,
    open_loop: false,
    place: Place::Apart,
};

const CASES: [Case; 11] = [
    PARKED,
    Case { ours: "received:1, one processor", bare: "ping-pong on one processor", place: Place::Together, ..PARKED },
    Case { ours: "received:1, anywhere", bare: "ping-pong anywhere", place: Place::Anywhere, ..PARKED },
    Case { ours: "durable:1", bare: "ping-pong, fdatasync at the follower", durable: Durable::AtFollower, ..PARKED },
    Case { ours: "synced+durable:1", bare: "ping-pong, fdatasync at both at once", durable: Durable::AtBoth, ..PARKED },
    Case { ours: "received:1, open loop", bare: "ping-pong, open loop", open_loop: true, ..PARKED },
    Case {
        ours: "durable:1, open loop",
        bare: "ping-pong, fdatasync at the follower, open loop",
        durable: Durable::AtFollower,
        open_loop: true,
        ..PARKED
    },
    Case {
        ours: "synced+durable:1, open loop",
        bare: "ping-pong, fdatasync at both at once, open loop",
        durable: Durable::AtBoth,
        open_loop: true,
        ..PARKED
    },
    Case {
        ours: "received:1, spin then park",
        bare: "ping-pong, spinning",
        wait: WaitStrategy::SpinThenPark { spins: 2000 },
        spin: true,
        place: Place::Anywhere,
        ..PARKED
    },
    Case {
        ours: "received:1, spin",
        bare: "ping-pong, spinning",
        wait: WaitStrategy::Spin,
        spin: true,
        place: Place::Anywhere,
        ..PARKED
    },
    Case {
        ours: "received:1, spin, open loop",
        bare: "ping-pong, spinning, open loop",
        wait: WaitStrategy::Spin,
        spin: true,
        place: Place::Anywhere,
        open_loop: true,
        ..PARKED
    },
];

/// As many threads as a leader has, so that as many wake-ups lie between the client and its answer.
const RELAYED: &str = "ping-pong through a shipper and a reader";

pub(super) fn run(bench: &Bench) -> Result<()> {
    let limit = bench.latency_limit();
    for size in bench.record_sizes(if bench.quick { &[1024] } else { &[128, 1024, 16 * 1024] }) {
        let record = super::record(size);
        let most_bytes = (limit.operations + 2) * (size + 128) + (1 << 20);
        // In a hurry, two kinds of commit at a fixed pace are enough.
        let in_time = |case: &Case| !(bench.quick && case.open_loop && (case.spin || case.durable == Durable::AtBoth));
        for case in CASES.into_iter().filter(in_time) {
            let contest = Contest::new("commit", size, Unit::Microseconds)
                .bare(case.bare, || case.place.here(|| bare(bench, case, &record, most_bytes)))
                .ours(case.ours, &[case.bare, RELAYED], || case.place.here(|| ours(bench, case, &record, most_bytes)));
            let relayed = || PARKED.place.here(|| relayed(bench, &record));
            if case.ours == PARKED.ours { contest.bare(RELAYED, relayed) } else { contest }.run(bench)?;
        }
    }
    Ok(())
}

fn bare(bench: &Bench, case: Case, record: &[u8], most_bytes: u64) -> Result<Sample> {
    let scratch = bench.scratch("commit")?;
    let writer = |scratch: &Scratch, name| {
        DurableWriter::new(&scratch.path().join(name), usize::try_from(most_bytes).unwrap_or(usize::MAX), record.len())
    };
    let there = if case.durable == Durable::Nowhere { None } else { Some(writer(&scratch, "there")?) };
    let mut ping = case.place.there(|| PingPong::start(record.len(), there, case.spin))?;
    if case.durable == Durable::AtBoth {
        let mut here = writer(&scratch, "here")?;
        return measure(bench, case, || {
            here.write(record)?;
            ping.send(record)?;
            here.sync()?;
            Ok(ping.await_answer()?)
        });
    }
    measure(bench, case, || Ok(ping.exchange(record)?))
}

fn relayed(bench: &Bench, record: &[u8]) -> Result<Sample> {
    let ping = RelayedPingPong::start(record, PARKED.place)?;
    measure(bench, PARKED, || Ok(ping.exchange()?))
}

fn ours(bench: &Bench, case: Case, record: &[u8], most_bytes: u64) -> Result<Sample> {
    let commit: Commit = match case.durable {
        Durable::Nowhere => "received:1",
        Durable::AtFollower => "durable:1",
        Durable::AtBoth => "synced+durable:1",
    }
    .parse()?;
    let wal = WalOptions { wait: case.wait, spare_segments: 1, ..WalOptions::default() };
    let settings = Settings {
        wal,
        commit,
        spin_receive: case.spin,
        place: case.place,
        ..Settings::with_segments_of(most_bytes.next_multiple_of(4096))
    };
    let (nodes, mut writer) = Nodes::start(bench, 1, settings)?;
    let commits = nodes.commits()?;
    let one = |writer: &mut LogWriter| -> Result<()> {
        let (lsn, outcome) = commits.append_and_wait(writer, &[record], commit, None)?;
        match outcome {
            Outcome::Committed => Ok(()),
            other => Err(format!("LSN {lsn} was not committed: {other:?}").into()),
        }
    };
    let sample = measure(bench, case, || one(&mut writer))?;
    Ok(sample.with("threads", machine::threads().map(|threads| threads as f64)))
}

fn measure(bench: &Bench, case: Case, mut operation: impl FnMut() -> Result<()>) -> Result<Sample> {
    let limit = bench.latency_limit();
    let warm_up = Limit { operations: limit.operations / 10, ..limit };
    load::closed_loop(warm_up, &mut operation)?;
    let limit = Limit { operations: limit.operations - warm_up.operations, ..limit };
    if case.open_loop {
        let sample = load::run(Pace::Open(bench.rate), limit, operation)?.sample();
        return Ok(sample.with("rate", Some(f64::from(bench.rate))));
    }
    let usage = Usage::now();
    let latencies = load::run(Pace::Closed, limit, operation)?;
    let cpu = usage.cpu_us_per_record(latencies.count());
    Ok(latencies.sample().with("cpu_us_per_record", cpu))
}
