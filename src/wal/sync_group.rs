//! Those who wait for the syncs of a log together: how they come to share one, and how each waits for it.
//!
//! # Coming back together
//!
//! Writers that a sync has released come back within a fraction of the time that it took, but just after whoever is
//! first has begun the next sync: they would form two groups in turn, and each record would wait for one sync and a
//! half. So whoever syncs [waits](SyncGroup::gather) a moment for those of the last group that are missing.
//!
//! # Giving way instead of sleeping
//!
//! To put a thread to sleep and wake it up takes some microseconds of processor time. Where dozens wait for each sync,
//! that fills the processors: a group of 32 is put to sleep and woken up for longer than the device works for it.
//! Threads that stay awake and [give way](SyncWaits::give_way) to each other until the sync is done are on their way at
//! once, at a quarter more processor time for each record. So that is what they do where all processors would be busy
//! with putting them to sleep and waking them up for as long as the last sync took, and until somebody else is found to
//! keep a processor from them.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// After waiting in vain for a larger group, so many syncs do not wait. With 16, two groups that take turns, and each
/// of which comes back a little late for the other, stayed apart for seconds.
const HASTY_SYNCS: u32 = 4;
/// A sync waits for the rest of its group for as long as one more comes within this part of the time that the last one
/// took.
const GROUP_SILENCE: u32 = 4;
/// Nor for longer than this, however slow the device: whoever waits keeps its processor unless others want it. Where it
/// was measured a quarter of a sync was 30 us.
const MOST_SILENCE: Duration = Duration::from_micros(100);
/// In all it waits for no longer than the last sync took, which many who come back one by one may need, nor for longer
/// than this. 32 threads came back within 80 us of a sync of 130 where it was measured: waiting for all of them made
/// 130 thousand records a second of 100, waiting for half of that time 120, and for a quarter nothing.
const MOST_PATIENCE: Duration = Duration::from_micros(500);
/// Processor time to put a thread to sleep and wake it up: 7 to 10 us where it was measured, by records and seconds of
/// groups of 16 to 32. There, on two processors and with syncs of 100 to 120 us, giving way brought groups of 32 from
/// 118 and 157 thousand records a second to 144 and 203, for 1.06 to 1.28 of the processor time each, 24 from 104 to
/// 122 for 1.5, and 16 nothing for twice as much.
const SLEEP_COSTS: Duration = Duration::from_micros(10);
/// Whoever gets its processor back only after so long has most likely given way to others than its group: those take a
/// turn of some microseconds each, others a time slice of milliseconds. A group whose turns alone take so long sleeps
/// too.
const HELD_UP: Duration = Duration::from_micros(500);
/// For so many syncs after that all sleep. With a busy thread beside 32 of a group, neither has less done than if they
/// always did.
const SLEEPING_SYNCS: u32 = 64;

/// What those who wait for syncs tell whoever syncs, and it them. All of it is hints, so relaxed.
#[derive(Debug, Default)]
pub(super) struct SyncWaits {
    /// How often somebody came to wait. Counted by those who wait.
    arrived: AtomicU64,
    /// For how many nanoseconds of a sync those who wait give way before they sleep. Written by whoever syncs.
    gives_way: AtomicU64,
    /// Somebody was held up: set by who was, taken by whoever syncs.
    held_up: AtomicBool,
}

impl SyncWaits {
    /// One more waits.
    pub(super) fn arrive(&self) {
        self.arrived.fetch_add(1, Ordering::Relaxed);
    }

    /// Lets others have the processor until it is done, if that is the better way to wait. Returns whether it is done.
    pub(super) fn give_way(&self, deadline: Option<Instant>, is_done: impl Fn() -> bool) -> bool {
        let most = Duration::from_nanos(self.gives_way.load(Ordering::Relaxed));
        if most.is_zero() {
            return false;
        }
        let mut now = Instant::now();
        let until = deadline.map_or(now + most, |deadline| deadline.min(now + most));
        while now < until {
            std::thread::yield_now();
            let is_done = is_done();
            let before = std::mem::replace(&mut now, Instant::now());
            let is_held_up = now - before > HELD_UP;
            if is_held_up {
                self.held_up.store(true, Ordering::Relaxed);
            }
            if is_done || is_held_up {
                return is_done;
            }
        }
        false
    }

    /// Has those who wait give way for so long.
    #[cfg(test)]
    pub(super) fn give_way_for(&self, most: Duration) {
        self.gives_way.store(most.as_nanos().try_into().unwrap(), Ordering::Relaxed);
    }

    fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }
}

/// For whom the last sync was done, and how many may be back for the next. Only whoever syncs has it.
#[derive(Debug)]
pub(super) struct SyncGroup {
    /// How often somebody had come to wait when the last sync began.
    waits: u64,
    /// Those that it was done for, and those that came while it ran.
    expected: u64,
    /// How long it took.
    took: Duration,
    /// Syncs that wait for nobody, because the last one that did so waited in vain.
    hasty: u32,
    /// Syncs for which all sleep, because somebody was held up.
    sleeping: u32,
    /// Processors that threads which give way could keep busy.
    processors: u32,
}

impl SyncGroup {
    /// Of a log that has not been synced yet.
    pub(super) fn new() -> SyncGroup {
        SyncGroup { waits: 0, expected: 0, took: Duration::ZERO, hasty: 0, sleeping: 0, processors: processors() }
    }

    /// Lets those who were released together come back together: before a sync, for a moment, if some are missing. One
    /// writer alone is its whole group, and waits for nobody.
    pub(super) fn gather(&mut self, shared: &SyncWaits) {
        let due = self.waits + self.expected;
        let missing = due.saturating_sub(shared.arrived());
        if missing > 0 && self.hasty > 0 {
            self.hasty -= 1;
        } else if missing > 0 {
            wait_while_more_come(|| shared.arrived(), due, self.took, Instant::now);
            // Where fewer than half of those missing have come, it is not for having been released together.
            if due.saturating_sub(shared.arrived()) * 2 > missing {
                self.hasty = HASTY_SYNCS;
            }
        }
        let waits = shared.arrived();
        self.expected = waits - self.waits;
        self.waits = waits;
    }

    /// The sync is done, or has failed, and took so long.
    pub(super) fn has_synced(&mut self, took: Duration, shared: &SyncWaits) {
        self.took = took;
        self.expected += shared.arrived().saturating_sub(self.waits);
        // Looked at first, each of them: whoever syncs alone, one sync after the other, writes nothing here.
        if shared.held_up.load(Ordering::Relaxed) {
            shared.held_up.store(false, Ordering::Relaxed);
            self.sleeping = SLEEPING_SYNCS;
        }
        let gives_way = if self.sleeping > 0 {
            self.sleeping -= 1;
            Duration::ZERO
        } else {
            most_to_give_way(self.expected, took, self.processors)
        };
        let nanoseconds = gives_way.as_nanos().try_into().unwrap_or(u64::MAX);
        if shared.gives_way.load(Ordering::Relaxed) != nanoseconds {
            shared.gives_way.store(nanoseconds, Ordering::Relaxed);
        }
    }
}

/// For how long so many threads give way during a sync like the last one. Where it is cheaper to put them to sleep, not
/// at all: while they stay awake, they keep the processors busy for as long as it takes.
fn most_to_give_way(waiting: u64, last_took: Duration, processors: u32) -> Duration {
    let sleeping = SLEEP_COSTS.saturating_mul(waiting.try_into().unwrap_or(u32::MAX));
    let awake = last_took.saturating_mul(processors);
    // The next one may take longer. One alone syncs, and waits for nobody.
    if waiting > 1 && sleeping >= awake { last_took.saturating_mul(2) } else { Duration::ZERO }
}

/// Processors of this machine; where it does not tell, more than any has, so that all sleep. Not those that this thread
/// may use: its group may use more. Nor what a quota of time comes to: any number of processors uses that up.
fn processors() -> u32 {
    static PROCESSORS: OnceLock<u32> = OnceLock::new();
    *PROCESSORS.get_or_init(|| online_processors().filter(|&count| count > 0).unwrap_or(u32::MAX))
}

#[cfg(target_os = "linux")]
fn online_processors() -> Option<u32> {
    count_in_ranges(std::fs::read_to_string("/sys/devices/system/cpu/online").ok()?.trim())
}

#[cfg(not(target_os = "linux"))]
fn online_processors() -> Option<u32> {
    std::thread::available_parallelism().ok()?.get().try_into().ok()
}

/// How many numbers there are in a list as `0-3,8`.
#[cfg(any(target_os = "linux", test))]
fn count_in_ranges(list: &str) -> Option<u32> {
    list.split(',').try_fold(0u32, |count, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        count.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// Waits until so many have arrived as are due, or no more come. `clock` tells the time.
fn wait_while_more_come(arrived: impl Fn() -> u64, due: u64, last_took: Duration, clock: impl Fn() -> Instant) {
    let silence = MOST_SILENCE.min(last_took / GROUP_SILENCE);
    let mut now = clock();
    let until = now + MOST_PATIENCE.min(last_took);
    let (mut seen, mut silent_at) = (arrived(), now + silence);
    while seen < due && now < until.min(silent_at) {
        std::thread::yield_now();
        now = clock();
        let here = arrived();
        if here > seen {
            (seen, silent_at) = (here, now + silence);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const SYNC: Duration = Duration::from_micros(100);

    /// One sync, for those who have come and for `more` who come while it runs.
    fn sync(group: &mut SyncGroup, shared: &SyncWaits, more: u64) -> (u64, u32) {
        group.gather(shared);
        (0..more).for_each(|_| shared.arrive());
        group.has_synced(SYNC, shared);
        (group.expected, group.hasty)
    }

    #[test]
    fn a_writer_alone_is_its_whole_group_and_who_does_not_come_is_waited_for_once() {
        let (shared, mut group) = (SyncWaits::default(), SyncGroup::new());
        let commit = |group: &mut SyncGroup| {
            shared.arrive();
            sync(group, &shared, 0)
        };
        for _ in 0..3 {
            assert_eq!(commit(&mut group), (1, 0));
        }
        // As after a sync for four.
        group.expected = 4;
        assert_eq!(commit(&mut group), (1, HASTY_SYNCS), "three did not come");
        group.expected = 4;
        assert_eq!(commit(&mut group), (1, HASTY_SYNCS - 1), "this one waited for nobody");
        assert_eq!(commit(&mut group), (1, HASTY_SYNCS - 1), "nobody was missing");
        // Two that came on their own are not those that were released.
        (group.expected, group.hasty) = (5, 0);
        shared.arrive();
        shared.arrive();
        assert_eq!(commit(&mut group), (3, HASTY_SYNCS), "two more did not come");
        assert_eq!(sync(&mut group, &shared, 7), (7, HASTY_SYNCS - 1), "who comes during a sync is due for the next");
    }

    #[test]
    fn a_group_is_waited_for_as_long_as_one_after_the_other_comes() {
        // How many are there after waiting for 32 of which one comes at each look, where a look takes so long.
        let come = |look: Duration| {
            let (came, now) = (Cell::new(0), Cell::new(Instant::now()));
            let clock = || now.replace(now.get() + look);
            wait_while_more_come(|| came.replace(came.get() + 1), 32, Duration::from_secs(3600), clock);
            came.get() - 1
        };
        assert_eq!(come(Duration::from_micros(5)), 32, "it is looked until all are there");
        assert_eq!(come(MOST_PATIENCE / 10), 10, "or for as long as is patient");
        let looks = Cell::new(0);
        let nobody_comes = || {
            looks.set(looks.get() + 1);
            0
        };
        wait_while_more_come(nobody_comes, 32, Duration::ZERO, Instant::now);
        assert_eq!(looks.get(), 1, "a sync that took no time is not worth waiting");
        let (silent, now) = (Cell::new(0), Cell::new(Instant::now()));
        let clock = || now.replace(now.get() + MOST_SILENCE / 4);
        wait_while_more_come(|| silent.replace(silent.get() + 1).min(1), 32, Duration::from_secs(3600), clock);
        assert_eq!(silent.get(), 6, "or until nobody has come for a while");
    }

    #[test]
    fn threads_give_way_where_that_is_cheaper_than_to_sleep() {
        assert_eq!(most_to_give_way(32, SYNC, 2), SYNC * 2);
        assert_eq!(most_to_give_way(4, SYNC, 2), Duration::ZERO, "too few: they sleep for little");
        assert_eq!(most_to_give_way(32, SYNC, 16), Duration::ZERO, "too many processors that would be busy");
        assert_eq!(most_to_give_way(32, Duration::from_millis(10), 2), Duration::ZERO, "too slow a device");
        assert_eq!(most_to_give_way(1, Duration::from_micros(1), 2), Duration::ZERO, "nobody to give way to");
        assert_eq!(most_to_give_way(u64::MAX, Duration::MAX, u32::MAX), Duration::ZERO, "no overflow");
    }

    #[test]
    fn processors_are_counted() {
        assert_eq!(count_in_ranges("0"), Some(1));
        assert_eq!(count_in_ranges("0-1"), Some(2));
        assert_eq!(count_in_ranges("0-3,8,10-11"), Some(7));
        for wrong in ["", "3-1", "a", "0-", "0,", "0-4294967295"] {
            assert_eq!(count_in_ranges(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn nobody_gives_way_for_some_syncs_after_one_was_held_up() {
        let (shared, mut group) = (SyncWaits::default(), SyncGroup::new());
        group.processors = 2;
        shared.arrived.store(32, Ordering::Relaxed);
        let mut gives_way_after_sync = || {
            group.expected = 0;
            group.has_synced(SYNC, &shared);
            shared.gives_way.load(Ordering::Relaxed) > 0
        };
        assert!(gives_way_after_sync());
        shared.held_up.store(true, Ordering::Relaxed);
        for sync in 0..SLEEPING_SYNCS {
            assert!(!gives_way_after_sync(), "after {sync}");
        }
        assert!(gives_way_after_sync());
    }

    #[test]
    fn whoever_gives_way_stops_when_it_is_done_or_the_deadline_has_passed_or_others_are_busy() {
        let shared = SyncWaits::default();
        assert!(!shared.give_way(None, || panic!("nobody gives way yet")));
        shared.give_way_for(Duration::from_secs(3600));
        assert!(!shared.give_way(Some(Instant::now()), || panic!("there is no time")));
        // Not always: others that are busy may be there now and then.
        let is_not_held_up = || {
            shared.held_up.store(false, Ordering::Relaxed);
            shared.give_way(None, || true) && !shared.held_up.load(Ordering::Relaxed)
        };
        assert!((0..1000).any(|_| is_not_held_up()));
        shared.held_up.store(false, Ordering::Relaxed);
        // Taking turns with somebody who is busy.
        let is_held_up = || {
            std::thread::sleep(HELD_UP + Duration::from_micros(1));
            false
        };
        assert!(!shared.give_way(None, is_held_up));
        assert!(shared.held_up.load(Ordering::Relaxed));
    }
}
