//! What is encoded on the way out, and checked and decoded on the way in: batches by the receiver and by recovery,
//! frames by every stream.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use towline::wal::{BatchIter, Expected, batch};
use towline::wire::{Ack, FrameHeader, FrameKind, Message};
use towline::{Chain, Epoch, HybridTimestamp, Lsn, SessionId};

const AT: Expected = Expected { first_lsn: Lsn(1), chain: Chain(0), epoch: Epoch(1) };

fn batches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("batch");
    for (records, size) in [(1_usize, 128_usize), (1, 1024), (1, 16 * 1024), (256, 128)] {
        let record = vec![0x5a; size];
        let bytes = batch::build(AT, HybridTimestamp::default(), Lsn::ZERO, &vec![&record[..]; records]);
        let name = format!("{records} of {size}");
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        let records = vec![&record[..]; records];
        group.bench_with_input(BenchmarkId::new("encode", &name), &records, |bencher, records| {
            bencher.iter(|| batch::build(AT, HybridTimestamp::default(), Lsn::ZERO, black_box(records)));
        });
        group.bench_with_input(BenchmarkId::new("verify", &name), &bytes, |bencher, bytes| {
            bencher.iter(|| batch::verify(black_box(bytes), bytes.len() as u64, AT));
        });
        group.bench_with_input(BenchmarkId::new("walk", &name), &bytes, |bencher, bytes| {
            // As an applier does it.
            bencher.iter(|| {
                let mut len = 0;
                for batch in BatchIter::new(black_box(bytes)) {
                    for record in batch.records() {
                        len += record.bytes.len();
                    }
                }
                len
            });
        });
    }
    for size in [128_usize, 1024] {
        let record = vec![0x5a; size];
        let build = |record: &[u8]| batch::build_compact(AT, HybridTimestamp::default(), record).unwrap_or_default();
        let bytes = build(&record);
        let name = format!("compact of {size}");
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_with_input(BenchmarkId::new("encode", &name), &record, |bencher, record| {
            bencher.iter(|| build(black_box(record)));
        });
        group.bench_with_input(BenchmarkId::new("verify", &name), &bytes, |bencher, bytes| {
            bencher.iter(|| batch::verify(black_box(bytes), bytes.len() as u64, AT));
        });
    }
    group.finish();
}

fn frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame header");
    let header = FrameHeader { kind: FrameKind::WalData, flags: 0, len: 65_536, body_crc: 7 };
    let bytes = header.encode();
    group.bench_function("encode", |bencher| bencher.iter(|| black_box(&header).encode()));
    group.bench_function("decode", |bencher| bencher.iter(|| FrameHeader::decode(black_box(&bytes))));
    group.finish();
    // The frame that comes back for every piece of log, header and body.
    let mut group = criterion.benchmark_group("ack frame");
    let ack = Message::Ack(Ack {
        received: Lsn(300),
        durable: Lsn(200),
        applied: Lsn(100),
        chain: Chain(7),
        epoch: Epoch(1),
        session: SessionId(1),
    });
    let mut body = Vec::new();
    ack.encode(&mut body);
    group.bench_function("encode", |bencher| {
        bencher.iter(|| {
            body.clear();
            black_box(&ack).encode(&mut body);
        });
    });
    group.bench_function("decode", |bencher| bencher.iter(|| Message::decode(FrameKind::Ack, black_box(&body))));
    group.finish();
}

criterion_group!(formats_group, batches, frames);
criterion_main!(formats_group);
