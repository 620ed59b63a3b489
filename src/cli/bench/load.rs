//! Loads whose latencies are recorded one by one.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::Result;
use super::report::Sample;

/// When a load is over: at the first of the two.
#[derive(Clone, Copy)]
pub(super) struct Limit {
    pub(super) operations: u64,
    pub(super) time: Duration,
}

/// Latencies in nanoseconds.
pub(super) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(super) fn new() -> Result<Latencies> {
        Ok(Latencies(Histogram::new(3)?))
    }

    pub(super) fn record(&mut self, latency: Duration) -> Result<()> {
        Ok(self.0.record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX))?)
    }

    pub(super) fn count(&self) -> u64 {
        self.0.len()
    }

    /// Microseconds below which a share of the latencies is.
    fn us(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1e3
    }

    /// The median, the slow ones beside it, and all of them.
    pub(super) fn sample(self) -> Sample {
        Sample::new(self.us(0.5))
            .with("p99", Some(self.us(0.99)))
            .with("p999", Some(self.us(0.999)))
            .with("max_us", Some(self.us(1.0)))
            .with_latencies(self.0)
    }
}

/// How operations follow each other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// See [`closed_loop`].
    Closed,
    /// See [`open_loop`]: so many a second.
    Open(u32),
}

/// Runs operations at a pace.
pub(super) fn run(pace: Pace, limit: Limit, operation: impl FnMut() -> Result<()>) -> Result<Latencies> {
    match pace {
        Pace::Closed => closed_loop(limit, operation),
        Pace::Open(rate) => open_loop(rate, limit, operation),
    }
}

/// One operation after the other. What is slow delays those behind it, whose delay nobody counts: a load to compare
/// latencies of single operations with, not to learn about stalls from.
pub(super) fn closed_loop(limit: Limit, mut operation: impl FnMut() -> Result<()>) -> Result<Latencies> {
    let mut latencies = Latencies::new()?;
    let end = Instant::now() + limit.time;
    let mut now = Instant::now();
    while latencies.count() < limit.operations && now < end {
        operation()?;
        let done = Instant::now();
        latencies.record(done - now)?;
        now = done;
    }
    Ok(latencies)
}

/// How long before an intended start the thread wakes up, to be there in time.
const EARLY: Duration = Duration::from_micros(200);

/// Operations that are meant to start at fixed times, each counted from its intended start, whether it could start then
/// or not: a stall shows in every operation that it delays.
pub(super) fn open_loop(
    rate_per_second: u32,
    limit: Limit,
    mut operation: impl FnMut() -> Result<()>,
) -> Result<Latencies> {
    let mut latencies = Latencies::new()?;
    let every = Duration::from_secs(1) / rate_per_second.max(1);
    let began = Instant::now();
    let mut intended = began;
    while latencies.count() < limit.operations && intended - began < limit.time {
        intended += every;
        wait_until(intended);
        operation()?;
        latencies.record(intended.elapsed())?;
    }
    Ok(latencies)
}

fn wait_until(time: Instant) {
    let left = time.saturating_duration_since(Instant::now());
    if left > EARLY {
        std::thread::sleep(left - EARLY);
    }
    while Instant::now() < time {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_loop_ends_at_its_count() {
        let limit = Limit { operations: 7, time: Duration::from_secs(3600) };
        let mut done = 0;
        let latencies = closed_loop(limit, || {
            done += 1;
            Ok(())
        });
        assert_eq!((latencies.unwrap().count(), done), (7, 7));
    }

    #[test]
    fn an_open_loop_counts_the_wait_behind_a_stall() {
        let limit = Limit { operations: 20, time: Duration::from_secs(3600) };
        let mut first = true;
        let latencies = open_loop(1000, limit, || {
            if std::mem::take(&mut first) {
                std::thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        });
        // Twenty operations were due within 20 ms, and none of them could be over before 100 ms had passed.
        assert!(latencies.unwrap().us(0.1) >= 75_000.0);
    }
}
