//! Loads, and what is measured of them.

use std::time::Instant;

use hdrhistogram::Histogram;

use crate::Result;
use crate::contest::Sample;

/// Records a second of something that appends `count`.
pub(crate) fn rate(count: u64, run: impl FnOnce() -> Result<()>) -> Result<Sample> {
    let began = Instant::now();
    run()?;
    Ok(Sample { value: count as f64 / began.elapsed().as_secs_f64(), extra: Vec::new() })
}

/// Megabytes a second of something that moves so many bytes.
pub(crate) fn megabytes(bytes: u64, run: impl FnOnce() -> Result<()>) -> Result<Sample> {
    let began = Instant::now();
    run()?;
    Ok(Sample { value: bytes as f64 / 1e6 / began.elapsed().as_secs_f64(), extra: Vec::new() })
}

/// `count` operations, one after the other: the median in microseconds, with the slow ones beside it.
pub(crate) fn latencies(count: u64, mut operation: impl FnMut() -> Result<()>) -> Result<Sample> {
    let mut all = Histogram::<u64>::new(3)?;
    for number in 0..count + count / 10 {
        let began = Instant::now();
        operation()?;
        // The first ones warm up.
        if number >= count / 10 {
            all.record(u64::try_from(began.elapsed().as_nanos())?)?;
        }
    }
    let us = |quantile| all.value_at_quantile(quantile) as f64 / 1e3;
    Ok(Sample { value: us(0.5), extra: vec![("p99", us(0.99)), ("p999", us(0.999)), ("max_us", us(1.0))] })
}

/// Records a second of so many threads, each doing `each` operations. The operation is told its thread.
pub(crate) fn threads(threads: u64, each: u64, operation: impl Fn(u64) -> Result<()> + Sync) -> Result<Sample> {
    rate(threads * each, || {
        std::thread::scope(|scope| {
            let operation = &operation;
            let run = move |thread| (0..each).try_for_each(|_| operation(thread));
            let workers: Vec<_> = (0..threads).map(|thread| scope.spawn(move || run(thread))).collect();
            workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a writer panicked")?)
        })
    })
}
