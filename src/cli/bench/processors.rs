//! Which processors the two sides of an exchange run on. Waking a thread on another, sleeping processor takes ten times
//! as long as on the same one, and a scheduler does now one and now the other: who wants to compare has to say which.
//! The same goes for a thread that waits for a disk: where the disk interrupts another processor, that one has to wake
//! it.

use std::time::Duration;

use super::Result;

/// Where the two sides run. Threads that a side starts stay where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Wherever the system puts each thread.
    Anywhere,
    /// Each side on a processor of its own, as two machines would be.
    Apart,
    /// Both sides on one processor.
    Together,
}

impl Place {
    /// Runs `deed` as this side: what it starts stays here.
    pub(super) fn here<T>(self, deed: impl FnOnce() -> T) -> T {
        match self {
            Place::Anywhere => deed(),
            Place::Apart | Place::Together => on_processor(0, deed),
        }
    }

    /// Runs `deed` as the other side.
    pub(super) fn there<T>(self, deed: impl FnOnce() -> T) -> T {
        match self {
            Place::Anywhere => deed(),
            Place::Apart => on_processor(1, deed),
            Place::Together => on_processor(0, deed),
        }
    }
}

/// On which of the processors `probe` takes the least time, by the median of `times`, and how long on each.
pub(super) fn fastest(times: usize, mut probe: impl FnMut() -> Result<Duration>) -> Result<(usize, Vec<Duration>)> {
    let mut medians = Vec::new();
    for number in 0..count() {
        let took: Result<Vec<_>> = on_processor(number, || (0..times.max(1)).map(|_| probe()).collect());
        let mut took = took?;
        took.sort_unstable();
        medians.push(took[took.len() / 2]);
    }
    let fastest = (0..medians.len()).min_by_key(|&number| medians[number]).unwrap_or_default();
    Ok((fastest, medians))
}

/// Processors that this process may use.
#[cfg(target_os = "linux")]
fn count() -> usize {
    rustix::thread::sched_getaffinity(None).map_or(1, |now| all_processors(&now).len())
}

#[cfg(not(target_os = "linux"))]
fn count() -> usize {
    1
}

/// Runs `deed`, and threads that it starts, on one of the processors that this thread may use. Where the system does
/// not do that, or has no such processor, anywhere.
#[cfg(target_os = "linux")]
pub(super) fn on_processor<T>(number: usize, deed: impl FnOnce() -> T) -> T {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(before) = sched_getaffinity(None) else { return deed() };
    let allowed = (0..CpuSet::MAX_CPU).filter(|&processor| before.is_set(processor));
    // Counted from the whole machine, and not from what an outer call has left.
    let all = all_processors(&before);
    let Some(processor) = all.into_iter().nth(number).or_else(|| allowed.into_iter().next()) else { return deed() };
    let mut one = CpuSet::new();
    one.set(processor);
    let _ = sched_setaffinity(None, &one);
    let result = deed();
    let _ = sched_setaffinity(None, &before);
    result
}

#[cfg(not(target_os = "linux"))]
pub(super) fn on_processor<T>(_number: usize, deed: impl FnOnce() -> T) -> T {
    deed()
}

/// Runs `deed` while a thread of the least urgency keeps the processor of this one busy, so that it never falls asleep.
/// For a thread that runs on one processor.
#[cfg(target_os = "linux")]
pub(super) fn awake<T>(deed: impl FnOnce() -> T) -> Result<T> {
    use std::sync::atomic::{AtomicBool, Ordering};
    /// Ends the thread, also when `deed` panics.
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let done = AtomicBool::new(false);
    let (began, has_begun) = crossbeam_channel::bounded(1);
    std::thread::scope(|scope| {
        let _done = Done(&done);
        let keep_busy = || {
            // Without that it would take turns with what is measured, and spoil it.
            let set = rustix::process::setpriority_process(None, LEAST_URGENT);
            let _ = began.send(set);
            while set.is_ok() && !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        std::thread::Builder::new().name(AWAKE.to_owned()).spawn_scoped(scope, keep_busy)?;
        has_begun.recv()??;
        Ok(deed())
    })
}

#[cfg(target_os = "linux")]
const AWAKE: &str = "awake";

/// The highest of the nice values, for this thread alone on Linux.
#[cfg(target_os = "linux")]
const LEAST_URGENT: i32 = 19;

/// The processors that this process may use, as it found them when it was first asked.
#[cfg(target_os = "linux")]
fn all_processors(now: &rustix::thread::CpuSet) -> Vec<usize> {
    use std::sync::OnceLock;
    static ALL: OnceLock<Vec<usize>> = OnceLock::new();
    let found = || (0..rustix::thread::CpuSet::MAX_CPU).filter(|&processor| now.is_set(processor)).collect();
    ALL.get_or_init(found).clone()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::time::Instant;

    use rustix::thread::sched_getaffinity;

    use super::*;

    #[test]
    fn what_a_side_starts_stays_on_its_processor_and_the_caller_does_not() {
        let before = sched_getaffinity(None).unwrap();
        let there = || std::thread::spawn(|| sched_getaffinity(None).unwrap().count()).join().unwrap();
        assert_eq!(Place::Apart.here(|| Place::Apart.there(there)), 1);
        assert_eq!(Place::Anywhere.there(there), before.count());
        assert!(sched_getaffinity(None).unwrap() == before);
    }

    #[test]
    fn a_processor_is_kept_awake_by_a_thread_that_gives_way_and_ends() {
        // How urgent such threads are: field 19 of their line.
        let niceness = || -> Vec<String> {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap();
            let lines =
                tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default());
            let of_those = lines.filter_map(|line| Some(line.split_once("(awake) ")?.1.to_owned()));
            of_those.map(|fields| fields.split(' ').nth(16).unwrap().to_owned()).collect()
        };
        let own = || rustix::process::getpriority_process(None).unwrap();
        let before = own();
        assert_eq!(on_processor(0, || awake(|| (niceness(), own()))).unwrap(), (vec!["19".to_owned()], before));
        assert!(std::panic::catch_unwind(|| awake(|| panic!("it fails"))).is_err(), "and did not wait for ever");
        // The system has it for a little while after it has been joined.
        let deadline = Instant::now() + Duration::from_secs(60);
        while !niceness().is_empty() {
            assert!(Instant::now() < deadline, "it is still there");
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_fastest_processor_is_the_one_with_the_least_median() {
        let before = sched_getaffinity(None).unwrap();
        let mut took = [9, 1, 8, 3, 4, 5].into_iter().cycle().map(Duration::from_millis);
        let (fastest, medians) = fastest(3, || took.next().ok_or_else(|| "no more".into())).unwrap();
        assert_eq!(medians.len(), count());
        assert_eq!(medians[0], Duration::from_millis(8));
        assert_eq!(fastest, usize::from(medians.len() > 1));
        assert!(super::fastest(3, || Err("it cannot".into())).is_err());
        assert!(sched_getaffinity(None).unwrap() == before);
    }
}
