//! One writer that waits for stable storage after each record: as fast as it can, and at a pace given from outside,
//! where a slow record shows in those that it delays.
//!
//! All of them on the one processor on which a bare sync takes least. A disk with one queue interrupts one processor: a
//! thread that waits for it elsewhere is woken from there, which made 137 us of 74 where it was measured, and a
//! scheduler leaves a thread where it has once put it for hundreds of syncs.
//!
//! That processor falls asleep whenever the thread waits, and waking it up is part of a sync: on a virtual machine that
//! can be a third of it, and come and go with what its host expects of it. So both are measured with a processor that
//! stays awake, too (on Linux).

use std::path::Path;
use std::time::Instant;

use towline::wal::{LogWriter, Wal, WalOptions};

use super::limits::DurableWriter;
use super::load::{self, Limit, Pace};
use super::machine::{self, Usage};
use super::processors;
use super::report::{Contest, Sample, Unit};
use super::{Bench, Result};

/// Ours, `pwrite` and `O_DIRECT` at one pace.
#[derive(Clone, Copy)]
struct Names {
    ours: &'static str,
    written: &'static str,
    #[cfg(target_os = "linux")]
    direct: &'static str,
    /// What keeps the processor awake takes all the time that is left: what the process has used says nothing then.
    counts_cpu: bool,
}

impl Names {
    /// What ours is compared with.
    fn against(&self) -> Vec<&'static str> {
        vec![
            self.written,
            #[cfg(target_os = "linux")]
            self.direct,
        ]
    }
}

const CLOSED: Names = Names {
    ours: "append and wait_synced",
    written: "pwrite and fdatasync",
    #[cfg(target_os = "linux")]
    direct: "O_DIRECT and fdatasync",
    counts_cpu: true,
};
const OPEN: Names = Names {
    ours: "append and wait_synced, open loop",
    written: "pwrite and fdatasync, open loop",
    #[cfg(target_os = "linux")]
    direct: "O_DIRECT and fdatasync, open loop",
    counts_cpu: true,
};

/// On a processor that stays awake.
#[cfg(target_os = "linux")]
const AWAKE: Names = Names {
    ours: "append and wait_synced, processor awake",
    written: "pwrite and fdatasync, processor awake",
    direct: "O_DIRECT and fdatasync, processor awake",
    counts_cpu: false,
};

const ALL: &[Names] = &[
    CLOSED,
    OPEN,
    #[cfg(target_os = "linux")]
    AWAKE,
];

/// Bytes from one sync to the next while the first segments are filled.
const SYNC_EVERY: usize = 64 << 10;

/// Syncs by which a processor is judged.
const PROBES: usize = 40;

pub(super) fn run(bench: &Bench) -> Result<()> {
    if !ALL.iter().any(|names| names.against().iter().any(|bare| bench.wants("sync", names.ours, bare))) {
        return Ok(());
    }
    let scratch = bench.scratch("sync-where")?;
    let record = super::record(128);
    let mut writer = DurableWriter::new(&scratch.path().join("log"), 1 << 20, record.len())?;
    let (processor, medians) = processors::fastest(PROBES, || {
        let began = Instant::now();
        writer.append(&record)?;
        Ok(began.elapsed())
    })?;
    if !bench.json {
        let each: Vec<_> = medians.iter().map(|took| format!("{:.0}", took.as_secs_f64() * 1e6)).collect();
        say!("{:<9} where a bare sync takes least: {} us, by processor", "sync", each.join(", "));
    }
    processors::on_processor(processor, || compare(bench))
}

fn compare(bench: &Bench) -> Result<()> {
    for size in bench.record_sizes(&[128, 1024, 16 * 1024]) {
        contest(bench, size, CLOSED, Pace::Closed)?;
        if !bench.quick || size == 1024 {
            contest(bench, size, OPEN, Pace::Open(bench.rate))?;
        }
        #[cfg(target_os = "linux")]
        processors::awake(|| contest(bench, size, AWAKE, Pace::Closed))??;
    }
    Ok(())
}

fn contest(bench: &Bench, size: u64, names: Names, pace: Pace) -> Result<()> {
    let limit = bench.latency_limit();
    let record = super::record(size);
    let bytes = (limit.operations + 1) * (size + 128);
    let file_len = usize::try_from(bytes)?.next_multiple_of(4096);
    let contest = Contest::new("sync", size, Unit::Microseconds).bare(names.written, || {
        let scratch = bench.scratch("sync")?;
        let mut writer = DurableWriter::new(&scratch.path().join("log"), file_len, record.len())?;
        measure(scratch.path(), limit, pace, names.counts_cpu, || Ok(writer.append(&record)?))
    });
    #[cfg(target_os = "linux")]
    let contest = contest.bare_if_able(names.direct, || {
        let scratch = bench.scratch("sync")?;
        let path = scratch.path().join("log");
        let mut writer = super::limits::DirectWriter::new(&path, file_len + 8192, record.len())?;
        measure(scratch.path(), limit, pace, names.counts_cpu, || Ok(writer.append(&record)?))
    });
    contest
        .ours(names.ours, &names.against(), || {
            let scratch = bench.scratch("sync-ours")?;
            let segment_size = (bytes + (1 << 20)).next_multiple_of(4096);
            let (wal, mut writer) = super::append::open(scratch.path(), segment_size, WalOptions::default())?;
            fill_first_segments(&wal, &mut writer, &record)?;
            measure(scratch.path(), limit, pace, names.counts_cpu, || {
                let lsn = writer.append(&record)?;
                Ok(wal.log().wait_synced(lsn, None)?)
            })
        })
        .run(bench)
}

/// Appends, with a sync now and then that is waited for, until the newest segment is one that was prepared when the log
/// knew what its writer does. The first one and the spares beside it were not, and of a log that lives they are the
/// least part.
fn fill_first_segments(wal: &Wal, writer: &mut LogWriter, record: &[u8]) -> Result<()> {
    let log = wal.log();
    let first = 1 + log.options().spare_segments;
    let mut unsynced = SYNC_EVERY;
    while log.segments().len() <= first {
        let lsn = writer.append(record)?;
        unsynced += record.len();
        if unsynced >= SYNC_EVERY {
            log.wait_synced(lsn, None)?;
            // Preparing keeps up with a writer that waits for each record; it has to with this one.
            log.wait_for_spares(None)?;
            unsynced = 0;
        }
    }
    log.wait_synced(log.head(), None)?;
    Ok(log.wait_for_spares(None)?)
}

/// Latencies, and what reached the device.
fn measure(
    directory: &Path,
    limit: Limit,
    pace: Pace,
    counts_cpu: bool,
    operation: impl FnMut() -> Result<()>,
) -> Result<Sample> {
    let (before, usage) = (machine::device_bytes_written(directory), Usage::now());
    let latencies = load::run(pace, limit, operation)?;
    let count = latencies.count();
    let cpu = if counts_cpu { usage.cpu_us_per_record(count) } else { None };
    let written = machine::device_bytes_written(directory).zip(before);
    let sample = latencies.sample();
    Ok(match pace {
        Pace::Closed => sample.with("cpu_us_per_record", cpu),
        // Waiting for the next start takes processor time too.
        Pace::Open(rate) => sample.with("rate", Some(f64::from(rate))),
    }
    .with("device_bytes_per_record", written.map(|(after, before)| (after - before) as f64 / count as f64)))
}
