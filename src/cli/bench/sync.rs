//! One writer that waits for stable storage after each record.

use std::path::Path;

use towline::wal::WalOptions;

use super::limits::DurableWriter;
use super::load::{self, Limit};
use super::machine;
use super::report::{Contest, Sample, Unit};
use super::{Bench, Result};

pub(super) fn run(bench: &Bench) -> Result<()> {
    let limit = bench.latency_limit();
    for size in bench.record_sizes(&[128, 1024, 16 * 1024]) {
        let record = super::record(size);
        let bytes = (limit.operations + 1) * (size + 128);
        let file_len = usize::try_from(bytes)?.next_multiple_of(4096);
        let contest = Contest::new("sync", size, Unit::Microseconds).bare("pwrite and fdatasync", || {
            let scratch = bench.scratch("sync")?;
            let mut writer = DurableWriter::new(&scratch.path().join("log"), file_len, record.len())?;
            measure(scratch.path(), limit, || Ok(writer.append(&record)?))
        });
        #[cfg(target_os = "linux")]
        let contest = contest.bare_if_able("O_DIRECT and fdatasync", || {
            let scratch = bench.scratch("sync")?;
            let path = scratch.path().join("log");
            let mut writer = super::limits::DirectWriter::new(&path, file_len + 8192, record.len())?;
            measure(scratch.path(), limit, || Ok(writer.append(&record)?))
        });
        contest
            .ours("append and wait_synced", &["pwrite and fdatasync", "O_DIRECT and fdatasync"], || {
                let scratch = bench.scratch("sync-ours")?;
                let segment_size = (bytes + (1 << 20)).next_multiple_of(4096);
                let (wal, mut writer) = super::append::open(scratch.path(), segment_size, WalOptions::default())?;
                wal.log().wait_synced(writer.append(&record)?, None)?;
                wal.wait_for_spares();
                measure(scratch.path(), limit, || {
                    let lsn = writer.append(&record)?;
                    Ok(wal.log().wait_synced(lsn, None)?)
                })
            })
            .run(bench)?;
    }
    Ok(())
}

/// Latencies, and what reached the device.
fn measure(directory: &Path, limit: Limit, operation: impl FnMut() -> Result<()>) -> Result<Sample> {
    let before = machine::device_bytes_written(directory);
    let latencies = load::closed_loop(limit, operation)?;
    let per_record = || {
        let written = machine::device_bytes_written(directory)? - before?;
        Some(written as f64 / latencies.count() as f64)
    };
    Ok(latencies.sample().with("device_bytes_per_record", per_record()))
}
