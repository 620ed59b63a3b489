//! What followers cost the writer: append rates with none, one, two and four of them, and with two of which the second
//! follows the first.
//!
//! The limit beside it appends to writable pages while as many bare streams run at full speed, so that what the cores
//! and the memory have to share is the same on both sides.
//!
//! At full speed the followers of this machine compete with the writer for its processors, so there it is a matter of
//! how many there are. A steady load, as much as well-known databases manage at all, shows what is left of that where
//! the writer has something to spare: ours with followers against ours without.

use std::time::{Duration, Instant};

use towline::wal::{LogWriter, SyncPolicy, WalOptions};

use super::limits::{self, MappedFile};
use super::nodes::{Nodes, Settings};
use super::report::{Contest, Sample, Unit};
use super::{Bench, Result, streams};

struct Case {
    followers: u16,
    /// Each follows the one before it.
    in_a_chain: bool,
    ours: &'static str,
    steady: &'static str,
    bare: &'static str,
    in_quick: Quick,
}

/// What of a case is measured also in a hurry: many logs take long to prepare for each round.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Quick {
    Nothing,
    Steady,
    All,
}

const ALONE: Case = Case {
    followers: 0,
    in_a_chain: false,
    ours: "no followers",
    steady: "steady load, no followers",
    bare: "append alone",
    in_quick: Quick::All,
};
const CASES: [Case; 5] = [
    ALONE,
    Case {
        followers: 1,
        ours: "1 follower",
        steady: "steady load, 1 follower",
        bare: "append beside 1 stream",
        ..ALONE
    },
    Case {
        followers: 2,
        ours: "2 followers",
        steady: "steady load, 2 followers",
        bare: "append beside 2 streams",
        ..ALONE
    },
    Case {
        followers: 2,
        in_a_chain: true,
        ours: "2 followers in a chain",
        steady: "steady load, 2 followers in a chain",
        bare: "append beside 2 streams",
        in_quick: Quick::Steady,
    },
    Case {
        followers: 4,
        ours: "4 followers",
        steady: "steady load, 4 followers",
        bare: "append beside 4 streams",
        in_quick: Quick::Nothing,
        ..ALONE
    },
];
/// Records a second of the steady load.
const STEADY_RATE: u128 = 300_000;
/// Bytes of what bare streams send and where they go to, again and again.
const STREAM_LEN: usize = 32 << 20;

pub(super) fn run(bench: &Bench) -> Result<()> {
    let for_at_least = Duration::from_millis(if bench.quick { 50 } else { 300 });
    for size in bench.record_sizes(&[1024]) {
        let record = super::record(size);
        let count = bench.volume(256 << 20, 32 << 20) / size;
        let scratch = bench.scratch("fan-out")?;
        let log = |name: String, len| MappedFile::zeroed_in_pages(&scratch.path().join(name), len);
        let log_len = limits::slot_len(record.len()) * usize::try_from(count)?;
        let mut bare_log = log("log".to_owned(), log_len)?;
        let from = log("from".to_owned(), STREAM_LEN)?;
        let mut sinks = (0..4).map(|sink| log(format!("to-{sink}"), STREAM_LEN)).collect::<Result<Vec<_>, _>>()?;
        // Segments and spares of the leader and its followers.
        let log_bytes =
            |case: &Case, count| 2 * (1 + u64::from(case.followers)) * count * (size + super::BATCH_OVERHEAD);
        let cases = |least| CASES.iter().filter(move |case| case.in_quick >= least || !bench.quick);
        for case in cases(Quick::All) {
            Contest::new("fan-out", size, Unit::RecordsPerSecond)
                .with_memory_in_use(log_bytes(case, count))
                .bare(case.bare, || {
                    bare_log.make_writable();
                    let mut sinks: Vec<&mut [u8]> =
                        sinks.iter_mut().take(usize::from(case.followers)).map(MappedFile::bytes_mut).collect();
                    streams::beside_streams(from.bytes(), &mut sinks, || {
                        append_for(bare_log.bytes_mut(), &record, for_at_least)
                    })
                    .map_err(Into::into)
                })
                .ours(case.ours, &[case.bare], || {
                    append_to_nodes(bench, case, size, count, |writer| {
                        for _ in 0..count {
                            writer.append(&record)?;
                        }
                        Ok(())
                    })
                })
                .run(bench)?;
        }
        let count = bench.volume(256 << 20, 16 << 20) / size;
        let steady = |case: &'static Case| {
            let record = &record;
            move || append_to_nodes(bench, case, size, count, |writer| append_steadily(writer, record, count))
        };
        let mut contest = Contest::new("fan-out", size, Unit::RecordsPerSecond).among_ours();
        for case in cases(Quick::Steady) {
            let against: &[&str] = if case.followers == 0 { &[] } else { &[ALONE.steady] };
            contest = contest.ours(case.steady, against, steady(case));
        }
        contest.run(bench)?;
    }
    Ok(())
}

/// Times appends to a leader with such followers, and sees to it that all of them arrive.
fn append_to_nodes(
    bench: &Bench,
    case: &Case,
    size: u64,
    count: u64,
    append: impl FnOnce(&mut LogWriter) -> Result<()>,
) -> Result<Sample> {
    let segment_size = if bench.quick { 16 << 20 } else { 64 << 20 };
    let wal = WalOptions {
        sync: SyncPolicy::Never,
        spare_segments: usize::try_from(count * (size + super::BATCH_OVERHEAD) / segment_size)? + 1,
        populate_ahead: segment_size,
        ..WalOptions::default()
    };
    let settings = Settings { wal, in_a_chain: case.in_a_chain, ..Settings::with_segments_of(segment_size) };
    let (nodes, mut writer) = Nodes::start(bench, case.followers, settings)?;
    let sample = super::append::timed(count, || append(&mut writer))?;
    nodes.wait_applied(writer.end().head)?;
    Ok(sample)
}

/// Appends what is due, and sleeps for a millisecond, until all is written.
fn append_steadily(writer: &mut LogWriter, record: &[u8], count: u64) -> Result<()> {
    let began = Instant::now();
    let mut written = 0;
    while written < count {
        let due = began.elapsed().as_micros() * STEADY_RATE / 1_000_000;
        while u128::from(written) < due && written < count {
            writer.append(record)?;
            written += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Fills `log` again and again. Returns records per second.
fn append_for(log: &mut [u8], record: &[u8], at_least: Duration) -> Sample {
    let began = Instant::now();
    let mut records = 0;
    while began.elapsed() < at_least {
        records += limits::append(log, record, u64::MAX) / limits::slot_len(record.len());
    }
    Sample::new(records as f64 / began.elapsed().as_secs_f64())
}
