//! One record into the mapped log: framing, copy, checksum, two stores. The segment is prepared and its pages are
//! written over again and again, so that no page fault and no disk is in it.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use towline::wal::{LogIdentity, SyncPolicy, Wal, WalOptions};
use towline::{ClusterId, Epoch, RegionId, ShardId};

const SEGMENT_SIZE: u64 = 256 << 20;

/// Appends `count` records, each log being given up before it is full. Only the appends are timed.
fn append(count: u64, record: &[u8]) -> towline::Result<Duration> {
    let per_log = SEGMENT_SIZE / 2 / (record.len() as u64 + 72);
    let mut timed = Duration::ZERO;
    let mut left = count;
    while left > 0 {
        let directory = tempfile::tempdir().map_err(|source| towline::Error::Io {
            action: "create",
            path: std::env::temp_dir(),
            source,
        })?;
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
        // The next spare is prepared, and behind it the pages of this segment are ready.
        wal.wait_for_spares();
        let began = Instant::now();
        for _ in 0..left.min(per_log) {
            black_box(writer.append(black_box(record))?);
        }
        timed += began.elapsed();
        left -= left.min(per_log);
    }
    Ok(timed)
}

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append");
    // Each sample opens logs and prepares segments, which takes longer than what is measured.
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(2));
    for size in [128_usize, 1024, 16 * 1024] {
        let record = vec![0x5a; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_with_input(BenchmarkId::from_parameter(size), &record, |bencher, record| {
            bencher.iter_custom(|count| match append(count, record) {
                Ok(timed) => timed,
                Err(error) => panic!("{error}"),
            });
        });
    }
    group.finish();
}

criterion_group!(append_group, benches);
criterion_main!(append_group);
