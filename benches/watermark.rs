//! What a mark costs that nobody waits for, which is what every append and every load by a reader pays.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use towline::{Lsn, Watermark};

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("watermark");
    group.bench_function("load", |bencher| {
        let mark = Watermark::new(Lsn(7));
        bencher.iter(|| black_box(&mark).load());
    });
    group.bench_function("publish", |bencher| {
        let mark = Watermark::new(Lsn::ZERO);
        let mut lsn = Lsn::ZERO;
        bencher.iter(|| {
            lsn = lsn.next();
            black_box(&mark).publish(lsn);
        });
    });
    group.bench_function("advance", |bencher| {
        let mark = Watermark::new(Lsn::ZERO);
        let mut lsn = Lsn::ZERO;
        bencher.iter(|| {
            lsn = lsn.next();
            black_box(&mark).advance(lsn)
        });
    });
    group.bench_function("advance where it is already", |bencher| {
        let mark = Watermark::new(Lsn(7));
        bencher.iter(|| black_box(&mark).advance(Lsn(7)));
    });
    group.finish();
}

criterion_group!(watermark_group, benches);
criterion_main!(watermark_group);
