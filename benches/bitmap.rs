//! What a rebuild asks of its bitmap: a mark for each record, a question for each block of the base.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use towline::rebuild::BlockBitmap;
use towline::target::BlockId;

const BLOCKS: u64 = 10_000_000;

/// Block numbers all over the range, the same in every run.
fn next_block(block: &mut u64) -> BlockId {
    *block = (*block + 7_368_787) % BLOCKS;
    BlockId(*block)
}

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bitmap");
    let mut covered = BlockBitmap::new(BLOCKS);
    let mut block = 0;
    group.bench_function("mark_applied", |bencher| {
        bencher.iter(|| black_box(&mut covered).mark_applied(next_block(&mut block)).is_ok());
    });
    group.bench_function("should_apply_base", |bencher| {
        bencher.iter(|| black_box(&covered).should_apply_base(next_block(&mut block)));
    });
    group.finish();
}

criterion_group!(bitmap_group, benches);
criterion_main!(bitmap_group);
