//! One record into the mapped log: framing, clock, copy, checksum, two stores. Segments are prepared and their pages
//! made writable before the clock runs, so that no page fault and no disk is in it.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use towline::wal::{LogIdentity, LogWriter, SyncPolicy, Wal, WalOptions};
use towline::{ClusterId, Epoch, RegionId, ShardId};

const SEGMENT_SIZE: u64 = 256 << 20;
/// Bytes that a batch of one record takes beside the record, with room to spare.
const OVERHEAD: u64 = 72;

/// A log with room, and the next one when it is full. Fields drop in this order.
struct Appender {
    writer: LogWriter,
    _wal: Wal,
    _directory: tempfile::TempDir,
    left: u64,
}

impl Appender {
    fn new(record: &[u8]) -> Result<Appender, Box<dyn std::error::Error>> {
        let directory = tempfile::tempdir()?;
        let identity =
            LogIdentity { cluster: ClusterId(1), region: RegionId(0), shard: ShardId(0), segment_size: SEGMENT_SIZE };
        let options = WalOptions {
            sync: SyncPolicy::Never,
            spare_segments: 1,
            populate_ahead: SEGMENT_SIZE,
            ..WalOptions::default()
        };
        let (wal, mut writer) = Wal::open(directory.path(), identity, options)?;
        writer.set_epoch(Epoch::FIRST)?;
        writer.append(record)?;
        // The thread that prepares the next spare has made this segment's pages ready before.
        wal.log().wait_for_spares(None)?;
        let left = SEGMENT_SIZE / (record.len() as u64 + OVERHEAD) - 1000;
        Ok(Appender { writer, _wal: wal, _directory: directory, left })
    }

    /// Appends `count` times. Only that is timed, not the opening of logs.
    fn append(&mut self, count: u64, record: &[u8]) -> Result<Duration, Box<dyn std::error::Error>> {
        let mut timed = Duration::ZERO;
        let mut to_do = count;
        while to_do > 0 {
            if self.left == 0 {
                *self = Appender::new(record)?;
            }
            let now = to_do.min(self.left);
            let began = Instant::now();
            for _ in 0..now {
                black_box(self.writer.append(black_box(record))?);
            }
            timed += began.elapsed();
            self.left -= now;
            to_do -= now;
        }
        Ok(timed)
    }
}

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append");
    // Every second of it fills gigabytes of log.
    group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(400));
    for size in [128_usize, 1024, 16 * 1024] {
        let record = vec![0x5a; size];
        let mut appender = match Appender::new(&record) {
            Ok(appender) => appender,
            Err(error) => panic!("{error}"),
        };
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_with_input(BenchmarkId::from_parameter(size), &record, |bencher, record| {
            bencher.iter_custom(|count| match appender.append(count, record) {
                Ok(timed) => timed,
                Err(error) => panic!("{error}"),
            });
        });
    }
    group.finish();
}

criterion_group!(append_group, benches);
criterion_main!(append_group);
