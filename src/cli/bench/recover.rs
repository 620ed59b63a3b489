//! Opening a log: every batch is checked.

use std::time::Instant;

use towline::wal::{SyncPolicy, WalOptions};

use super::limits::{self, MappedFile};
use super::report::{Contest, Sample, Unit};
use super::{Bench, Result};

const SEGMENT_SIZE: u64 = 64 << 20;

pub(super) fn run(bench: &Bench) -> Result<()> {
    for size in bench.record_sizes(&[1024]) {
        let count = bench.volume(1 << 30, 128 << 20) / size;
        let scratch = bench.scratch("recover")?;
        let options = WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() };
        let (wal, mut writer) = super::append::open(scratch.path(), SEGMENT_SIZE, options)?;
        let record = super::record(size);
        for _ in 0..count {
            writer.append(&record)?;
        }
        let paths: Vec<_> = wal.log().segments().iter().map(|segment| segment.path().to_owned()).collect();
        let per_record = wal.log().segments().iter().map(|segment| segment.published()).sum::<u64>() / count;
        let head = wal.log().head();
        drop(writer);
        wal.close()?;
        let bytes = count * size;
        // As a node opens it after a clean stop: its checkpoint says that everything was synced. Without that, what no
        // batch says was synced would be written once more.
        let options = WalOptions { known_synced: head.into(), ..options };
        Contest::new("recover", size, Unit::MegabytesPerSecond)
            .bare("map and checksum", || {
                let began = Instant::now();
                for path in &paths {
                    let mapped = MappedFile::open_to_read(path)?;
                    std::hint::black_box(limits::checksum(mapped.bytes(), usize::try_from(per_record)?));
                }
                Ok(rate(bytes, began))
            })
            .ours("Wal::open", &["map and checksum"], || {
                let began = Instant::now();
                let (wal, writer) = super::append::open(scratch.path(), SEGMENT_SIZE, options)?;
                let sample = rate(bytes, began);
                if wal.log().head() != head {
                    return Err(format!("{} records came back of {head}", wal.log().head()).into());
                }
                drop(writer);
                wal.close()?;
                Ok(sample)
            })
            .run(bench)?;
    }
    Ok(())
}

/// Megabytes per second since then.
pub(super) fn rate(bytes: u64, began: Instant) -> Sample {
    Sample::new(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}
