//! Model checks of watermarks and of the shutdown signal: `loom` runs each scenario under every interleaving that
//! matters, and under every value that a load may return by the memory model. A lost wake-up is a deadlock of the
//! model, and fails.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release --no-default-features --test loom_watermark
//! ```
//!
//! That these checks can fail has been tried by planting faults, each of which at least one of them finds: parking
//! without looking again after registration; leaving out the total order between the writer's store and load, or
//! between the waiter's; a registration that does not lower `next_wake`; waking that forgets those not yet reached,
//! takes them off as well, or forgets to unpark; waking only strictly above the threshold; a waiter that leaves without
//! deregistering, on only one of its marks, or taking the others along; a relaxed `publish`; an `advance` that is a
//! load and a store; a closer registered, or a child made, without looking whether shutdown has begun.
//!
//! Where three threads wait and wake, only interleavings with up to three preemptions are searched, as the rest would
//! take minutes.
#![cfg(loom)]

use std::time::Instant;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use towline::watermark::{WaiterName, wait_any_as};
use towline::{Lsn, ShutdownSignal, Until, WaitStrategy, Waited, Watermark, wait_any};

fn until(mark: &Watermark, at_least: u64) -> Until<'_> {
    mark.until(Lsn(at_least))
}

fn wait(conditions: &[Until<'_>]) -> Waited {
    wait_any(conditions, WaitStrategy::Park, None)
}

fn spawn_on(mark: &Arc<Watermark>, deed: impl FnOnce(&Watermark) + 'static) -> thread::JoinHandle<()> {
    let mark = Arc::clone(mark);
    thread::spawn(move || deed(&mark))
}

#[test]
fn a_waiter_wakes_and_sees_what_was_published() {
    struct Log {
        mark: Watermark,
        record: UnsafeCell<u64>,
    }
    // SAFETY: the record is written before the mark moves and read after that was seen; loom checks that it is so.
    unsafe impl Sync for Log {}
    loom::model(|| {
        let log = Arc::new(Log { mark: Watermark::new(Lsn::ZERO), record: UnsafeCell::new(0) });
        let writer = {
            let log = Arc::clone(&log);
            thread::spawn(move || {
                // SAFETY: the mark has not moved yet, so nobody reads.
                log.record.with_mut(|record| unsafe { *record = 42 });
                log.mark.publish(Lsn(1));
            })
        };
        assert_eq!(wait(&[until(&log.mark, 1)]), Waited::Reached(0));
        // SAFETY: the mark has moved, so nobody writes any more.
        assert_eq!(log.record.with(|record| unsafe { *record }), 42);
        assert!(!log.mark.has_waiters());
        writer.join().unwrap();
    });
}

#[test]
fn a_waiter_that_spins_first_wakes() {
    loom::model(|| {
        let mark = Arc::new(Watermark::new(Lsn::ZERO));
        let writer = spawn_on(&mark, |mark| assert!(mark.advance(Lsn(1))));
        let strategy = WaitStrategy::SpinThenPark { spins: 1 };
        assert_eq!(wait_any(&[until(&mark, 1)], strategy, None), Waited::Reached(0));
        writer.join().unwrap();
    });
}

#[test]
fn a_waiter_that_only_spins_sees_the_mark() {
    loom::model(|| {
        let mark = Arc::new(Watermark::new(Lsn::ZERO));
        let writer = spawn_on(&mark, |mark| mark.publish(Lsn(1)));
        assert_eq!(wait_any(&[until(&mark, 1)], WaitStrategy::Spin, None), Waited::Reached(0));
        writer.join().unwrap();
    });
}

#[test]
fn two_waiters_with_two_thresholds_wake() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let mark = Arc::new(Watermark::new(Lsn::ZERO));
        let near = spawn_on(&mark, |mark| assert_eq!(wait(&[until(mark, 1)]), Waited::Reached(0)));
        let far = spawn_on(&mark, |mark| assert_eq!(wait(&[until(mark, 2)]), Waited::Reached(0)));
        mark.publish(Lsn(1));
        mark.publish(Lsn(2));
        near.join().unwrap();
        far.join().unwrap();
        assert!(!mark.has_waiters());
    });
}

#[test]
fn two_advancing_threads_never_move_it_back_and_wake_the_waiter() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let mark = Arc::new(Watermark::new(Lsn::ZERO));
        let low = spawn_on(&mark, |mark| {
            mark.advance(Lsn(1));
            assert!(mark.load() >= Lsn(1));
        });
        let high = spawn_on(&mark, |mark| assert!(mark.advance(Lsn(2))));
        assert_eq!(wait(&[until(&mark, 2)]), Waited::Reached(0));
        assert_eq!(mark.load(), Lsn(2));
        low.join().unwrap();
        high.join().unwrap();
        assert_eq!(mark.load(), Lsn(2));
        assert!(!mark.has_waiters());
    });
}

#[test]
fn loads_never_go_back() {
    loom::model(|| {
        let mark = Arc::new(Watermark::new(Lsn::ZERO));
        let one = spawn_on(&mark, |mark| {
            mark.advance(Lsn(1));
        });
        let two = spawn_on(&mark, |mark| {
            mark.advance(Lsn(2));
        });
        let first = mark.load();
        let second = mark.load();
        assert!(first <= second && second <= mark.load());
        one.join().unwrap();
        two.join().unwrap();
        assert_eq!(mark.load(), Lsn(2));
    });
}

#[test]
fn either_of_two_marks_wakes_and_neither_keeps_the_waiter() {
    for moved in 0..2 {
        loom::model(move || {
            let marks = Arc::new([Watermark::new(Lsn::ZERO), Watermark::new(Lsn::ZERO)]);
            let writer = {
                let marks = Arc::clone(&marks);
                thread::spawn(move || marks[moved].publish(Lsn(1)))
            };
            assert_eq!(wait(&[until(&marks[0], 1), until(&marks[1], 1)]), Waited::Reached(moved));
            assert!(!marks[0].has_waiters() && !marks[1].has_waiters());
            writer.join().unwrap();
        });
    }
}

#[test]
fn two_marks_moved_at_once_wake_once() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let marks = Arc::new([Watermark::new(Lsn::ZERO), Watermark::new(Lsn::ZERO)]);
        let writers = [0, 1].map(|index: usize| {
            let marks = Arc::clone(&marks);
            thread::spawn(move || marks[index].publish(Lsn(1)))
        });
        let Waited::Reached(index) = wait(&[until(&marks[0], 1), until(&marks[1], 1)]) else { panic!("no deadline") };
        assert_eq!(marks[index].load(), Lsn(1));
        assert!(!marks[0].has_waiters() && !marks[1].has_waiters());
        for writer in writers {
            writer.join().unwrap();
        }
    });
}

/// Giving up races with being woken; what is left of it must not disturb the next wait.
#[test]
fn a_waiter_that_times_out_leaves_no_trace_and_can_wait_again() {
    loom::model(|| {
        let mark = Arc::new(Watermark::new(Lsn::ZERO));
        let writer = spawn_on(&mark, |mark| mark.publish(Lsn(1)));
        let timed = wait_any(&[until(&mark, 1)], WaitStrategy::Park, Some(Instant::now()));
        assert!(!mark.has_waiters());
        if timed == Waited::TimedOut {
            assert_eq!(wait(&[until(&mark, 1)]), Waited::Reached(0));
        }
        writer.join().unwrap();
    });
}

#[test]
fn a_waiter_that_leaves_takes_nobody_along() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let mark = Arc::new(Watermark::new(Lsn::ZERO));
        let patient = spawn_on(&mark, |mark| assert_eq!(wait(&[until(mark, 1)]), Waited::Reached(0)));
        let writer = spawn_on(&mark, |mark| mark.publish(Lsn(1)));
        let _ = wait_any(&[until(&mark, 1)], WaitStrategy::Park, Some(Instant::now()));
        patient.join().unwrap();
        writer.join().unwrap();
        assert!(!mark.has_waiters());
    });
}

#[test]
fn a_mark_moved_quietly_is_seen_and_its_waiter_woken_later() {
    loom::model(|| {
        let mark = Arc::new(Watermark::new(Lsn::ZERO));
        let writer = spawn_on(&mark, |mark| {
            mark.publish_quietly(Lsn(1));
            assert_eq!(mark.load(), Lsn(1));
            mark.wake();
        });
        assert_eq!(wait(&[until(&mark, 1)]), Waited::Reached(0));
        writer.join().unwrap();
        assert!(!mark.has_waiters());
    });
}

/// One record is dealt with on behalf of the waiter, which may sleep on; the next one wakes it, and so it does a waiter
/// that nobody stood in for.
#[test]
fn a_postponed_waiter_wakes_for_what_comes_after() {
    const NAME: WaiterName = WaiterName(7);
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let mark = Arc::new(Watermark::new(Lsn::ZERO));
        let served = Arc::new(AtomicU64::new(0));
        let waiter = {
            let (mark, served) = (Arc::clone(&mark), Arc::clone(&served));
            thread::spawn(move || {
                // As a shipper does: until all is done, whoever did it.
                let mut seen = 0;
                while seen < 2 {
                    let next = served.load(Ordering::Acquire).max(seen) + 1;
                    if next <= 2 {
                        wait_any_as(NAME, &[until(&mark, next)], WaitStrategy::Park, None);
                    }
                    seen = mark.load().get();
                }
            })
        };
        let other = spawn_on(&mark, |mark| assert_eq!(wait(&[until(mark, 1)]), Waited::Reached(0)));
        mark.publish_quietly(Lsn(1));
        served.store(1, Ordering::Release);
        mark.postpone(NAME, Lsn(2));
        mark.wake();
        mark.publish(Lsn(2));
        waiter.join().unwrap();
        other.join().unwrap();
        assert!(!mark.has_waiters());
    });
}

#[test]
fn a_closer_registered_during_shutdown_runs_exactly_once() {
    loom::model(|| {
        let signal = ShutdownSignal::new();
        let runs = Arc::new(AtomicU64::new(0));
        let stopper = {
            let signal = signal.clone();
            thread::spawn(move || signal.shutdown())
        };
        let count = Arc::clone(&runs);
        let guard = signal.on_shutdown(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        signal.wait();
        stopper.join().unwrap();
        drop(guard);
        assert_eq!(runs.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn a_child_made_during_shutdown_is_shut_down() {
    loom::model(|| {
        let parent = ShutdownSignal::new();
        let stopper = {
            let parent = parent.clone();
            thread::spawn(move || parent.shutdown())
        };
        let child = parent.child();
        child.wait();
        stopper.join().unwrap();
    });
}
