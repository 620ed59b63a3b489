//! What it costs to spread one load over many shards: the same records from one thread, round-robin, over 1, 4, 16 and 64
//! shards, from the first append to the last record applied at one follower.
//!
//! There is no bare limit of that: each is compared with the best of them.

use std::time::Instant;

use towline::wal::WalOptions;

use super::machine::{self, Usage};
use super::nodes::{Nodes, Settings};
use super::report::{Contest, Sample, Unit};
use super::{BATCH_OVERHEAD, Bench, Result};

const CASES: [(u16, &str); 4] = [(1, "1 shard"), (4, "4 shards"), (16, "16 shards"), (64, "64 shards")];

pub(super) fn run(bench: &Bench) -> Result<()> {
    let most_shards = u64::from(CASES[CASES.len() - 1].0);
    for size in bench.record_sizes(&[1024]) {
        let record = super::record(size);
        let count = bench.volume(256 << 20, 16 << 20) / size;
        // The same for all, so that as many segments are filled in each case; in the last, one in each shard.
        let segment_size = (count * (size + BATCH_OVERHEAD) / most_shards * 5 / 4 + (64 << 10)).next_multiple_of(4096);
        let mut contest =
            Contest::new("shards", size, Unit::RecordsPerSecond).against_the_best("the best number of shards");
        for (shards, name) in CASES {
            let record = &record;
            contest = contest.ours(name, &[], move || ours(bench, shards, segment_size, record, count));
        }
        contest.run(bench)?;
    }
    Ok(())
}

fn ours(bench: &Bench, shards: u16, segment_size: u64, record: &[u8], count: u64) -> Result<Sample> {
    // As many spares in all, whatever the number of shards.
    let spare_segments = usize::from(CASES[CASES.len() - 1].0 / shards).max(1);
    let wal = WalOptions { spare_segments, ..WalOptions::default() };
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
