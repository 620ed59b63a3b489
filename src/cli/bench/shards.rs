//! What it costs to spread one load over many shards: the same records from one thread, round-robin, over 1, 4, 16 and
//! 64 shards, from the first append to the last record applied at one follower.
//!
//! Nothing is prepared while the clock runs. Each shard has one segment that takes its share of the records, at both
//! ends, with every page of it ready: as many bytes in all, whatever the number of shards. With segments and spares of
//! one size for all, some would begin to fill new spares before the end and others not, and that costs as much as the
//! records.
//!
//! There is no bare limit of that: each is compared with the best of them.

use std::time::Instant;

use towline::wal::{SyncPolicy, WalOptions};

use super::machine::{self, Usage};
use super::nodes::{Nodes, Settings};
use super::report::{Contest, Sample, Unit};
use super::{BATCH_OVERHEAD, Bench, Result};

const CASES: [(u16, &str); 4] = [(1, "1 shard"), (4, "4 shards"), (16, "16 shards"), (64, "64 shards")];

pub(super) fn run(bench: &Bench) -> Result<()> {
    for size in bench.record_sizes(&[1024]) {
        let record = super::record(size);
        // Of log, so that small records too fit in one segment. Two segments of it stand ready in each shard at both
        // ends.
        let count = bench.volume(256 << 20, 40 << 20) / (size + BATCH_OVERHEAD);
        let mut contest = Contest::new("shards", size, Unit::RecordsPerSecond)
            .against_the_best("the best number of shards")
            .with_memory_in_use(4 * count * (size + BATCH_OVERHEAD));
        for (shards, name) in CASES {
            let record = &record;
            contest = contest.ours(name, &[], move || ours(bench, shards, record, count));
        }
        contest.run(bench)?;
    }
    Ok(())
}

fn ours(bench: &Bench, shards: u16, record: &[u8], count: u64) -> Result<Sample> {
    let share = count.div_ceil(u64::from(shards)) * (record.len() as u64 + BATCH_OVERHEAD);
    let segment_size = (share + (64 << 10)).next_multiple_of(4096);
    let wal = WalOptions {
        sync: SyncPolicy::Never,
        spare_segments: 1,
        populate_ahead: segment_size,
        ..WalOptions::default()
    };
    let settings = Settings { shards, wal, ..Settings::with_segments_of(segment_size) };
    let (nodes, mut writers) = Nodes::start_sharded(bench, 1, settings)?;
    let (usage, began) = (Usage::now(), Instant::now());
    let mut left = count;
    while left > 0 {
        for writer in writers.iter_mut().take(usize::try_from(left)?) {
            writer.append(record)?;
            left -= 1;
        }
    }
    nodes.wait_all_applied()?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(Sample::new(count as f64 / seconds)
        .with("cpu_us_per_record", usage.cpu_us_per_record(count))
        .with("threads", machine::threads().map(|threads| threads as f64)))
}
