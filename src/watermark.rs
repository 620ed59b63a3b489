//! High-water marks: LSNs that only move forward, and waiting for them.
//!
//! A [`Watermark`] is how threads hand work to each other: the writer of a log moves a mark over bytes that are
//! complete, and whoever reads below the mark sees them. Reading a mark is one load. Moving it is one atomic write
//! plus one load and compare, as long as nobody waits for what has been reached.
//!
//! # Why no wake-up is lost
//!
//! Every mark has a value, the lowest threshold that anyone waits for (`next_wake`), and a locked list of waiters.
//!
//! | writer | waiter |
//! |---|---|
//! | W1: write `value` | R1: under the lock, enter the list and lower `next_wake` to the threshold |
//! | W2: load `next_wake` | R2: load `value` |
//! | W3: if `value >= next_wake`: lock, take those reached off the list, unlock, unpark them | R3: if below the threshold: park |
//!
//! 1. W1, W2, R1 and R2 are `SeqCst`, so they have one order that all threads agree on. Either R1 is before W2, and
//!    the writer sees a `next_wake` not above the threshold; or W2, and W1 before it, is before R1 and R2, and the
//!    waiter sees the value. Both may be the case, never neither.
//! 2. While a waiter is on the list, `next_wake` is not above its threshold: under the lock it is always the minimum
//!    of the list, and each change of the list goes from the minimum of one list to that of another, both of which
//!    contain the waiter.
//! 3. A waiter is only taken off by a thread that then unparks it, or by itself. Unparking before parking makes the
//!    next park return at once, so the gap between R2 and R3 is harmless.
//!
//! Waiters re-check after each return from parking, so unparks meant for something else cost time only. In turn a
//! thread that has left [`wait_any`] may find its own next `std::thread::park` returning at once, which `park`
//! allows for any reason.
//!
//! `tests/loom_watermark.rs` checks these claims against every interleaving.

use std::fmt;
use std::time::Instant;

use crate::sync::{
    AtomicU64, Mutex, Ordering, Thread, current_thread, has_passed, park_until, spin_loop, total_order_point, yield_now,
};
use crate::types::Lsn;

/// `next_wake` of a mark that nobody waits for.
const NOBODY: u64 = u64::MAX;
/// Threads woken for one taking of the lock. They are unparked after it is released, so that none of them wakes up
/// only to wait for it.
const WAKE_AT_ONCE: usize = 16;
/// How often a spinning waiter looks before it lets others have its processor, if any want it.
const SPINS_PER_YIELD: u32 = 16;
/// How often it does that between two looks at the clock.
const YIELDS_PER_CLOCK_READ: u32 = 8;

/// An LSN that only moves forward and can be waited for.
///
/// Any number of threads read it and wait for it. Either any number of threads move it with
/// [`advance`](Watermark::advance), or exactly one with [`publish`](Watermark::publish).
///
/// What a thread wrote before it moved the mark is visible to every thread that has seen the mark moved.
///
/// ```
/// use towline::{Lsn, Until, Waited, WaitStrategy, Watermark, wait_any};
///
/// let synced = Watermark::new(Lsn::ZERO);
/// std::thread::scope(|scope| {
///     scope.spawn(|| synced.advance(Lsn(7)));
///     let waited = wait_any(&[Until { mark: &synced, at_least: Lsn(5) }], WaitStrategy::Park, None);
///     assert_eq!(waited, Waited::Reached(0));
///     assert_eq!(synced.load(), Lsn(7));
/// });
/// assert!(!synced.advance(Lsn(6))); // never back
/// ```
// The writer touches `value` and `next_wake` on each move, so they share a line, which readers of `value` share with
// it. The list has the next line for itself: its lock is not taken at the writer's expense. The whole fills two
// lines, which processors like to fetch in pairs, so marks side by side do not disturb each other.
#[repr(C, align(128))]
pub struct Watermark {
    /// The mark. Written with `SeqCst` by `advance` and `publish` alone, never to something smaller. Loads are
    /// `Acquire` and pair with those writes; the waiter's load after registering is `SeqCst` (R2).
    value: AtomicU64,
    /// The lowest threshold on the list, or [`NOBODY`]. Written only under the lock of `waiters`, with `SeqCst` (R1).
    /// Loaded without it by writers, with `SeqCst` (W2).
    next_wake: AtomicU64,
    /// Who is to be unparked, at what value. Locked by threads that begin or end waiting, and by writers that have
    /// reached `next_wake`. Nothing is called meanwhile and no other lock is taken while it is held.
    waiters: OwnLine<Mutex<Waiters>>,
}

#[repr(align(64))]
struct OwnLine<T>(T);

#[derive(Default)]
struct Waiters {
    /// The list.
    parked: Vec<Waiter>,
    /// What is to be called, at what value.
    call: Option<(u64, Call)>,
}

/// What a mark has called: see [`Watermark::call_at`].
pub(crate) type Call = Box<dyn FnOnce() + Send>;

struct Waiter {
    threshold: u64,
    thread: Thread,
    name: WaiterName,
}

/// By what others know a waiter, if they have to: see [`Watermark::postpone`].
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaiterName(pub u64);

impl WaiterName {
    /// Whoever nobody has to know.
    pub(crate) const NOBODY: WaiterName = WaiterName(0);
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Watermark>() == 128, "a mark fills a pair of cache lines");

impl Watermark {
    /// A mark that stands at `initial`.
    #[cfg(not(loom))]
    #[must_use]
    pub const fn new(initial: Lsn) -> Self {
        Watermark {
            value: AtomicU64::new(initial.0),
            next_wake: AtomicU64::new(NOBODY),
            waiters: OwnLine(Mutex::new(Waiters { parked: Vec::new(), call: None })),
        }
    }

    /// A mark that stands at `initial`. Not `const`, as the model's atomics have no constants.
    #[cfg(loom)]
    #[must_use]
    pub fn new(initial: Lsn) -> Self {
        Watermark {
            value: AtomicU64::new(initial.0),
            next_wake: AtomicU64::new(NOBODY),
            waiters: OwnLine(Mutex::new(Waiters::default())),
        }
    }

    /// Where the mark stands. Wait-free; `Acquire`.
    #[inline]
    #[must_use]
    pub fn load(&self) -> Lsn {
        Lsn(self.value.load(Ordering::Acquire))
    }

    /// Moves the mark to `to` unless it is already there or beyond, and wakes those who waited for that. Returns
    /// whether it moved. From any thread, also concurrently.
    pub fn advance(&self, to: Lsn) -> bool {
        // Whoever moved the mark this far wakes for it, so there is nothing left to do. Acquire, so that `false` is as
        // good as having loaded the mark.
        if self.value.load(Ordering::Acquire) >= to.0 {
            return false;
        }
        let moved = self.value.fetch_max(to.0, Ordering::SeqCst) < to.0;
        if moved {
            self.wake_if_reached(to.0);
        }
        moved
    }

    /// [`advance`](Watermark::advance) without waking anybody, as [`publish_quietly`](Watermark::publish_quietly) is
    /// [`publish`](Watermark::publish).
    #[doc(hidden)]
    pub fn advance_quietly(&self, to: Lsn) {
        self.value.fetch_max(to.0, Ordering::SeqCst);
    }

    /// Moves the mark to `to` and wakes those who waited for that: [`advance`](Watermark::advance) for a mark with a
    /// single writer, without a compare-and-swap.
    ///
    /// The caller is the only one to move this mark, and `to` is not below where it stands; that is asserted in
    /// debug builds only.
    #[inline]
    pub fn publish(&self, to: Lsn) {
        // Relaxed: this thread was the last to write it.
        debug_assert!(self.value.load(Ordering::Relaxed) <= to.0, "a published mark goes back to {to}");
        // A SeqCst store and not a swap: the same instruction on x86, where either is the only full barrier here, and
        // the cheaper one where acquire and release are instructions.
        self.value.store(to.0, Ordering::SeqCst);
        self.wake_if_reached(to.0);
    }

    /// [`publish`](Watermark::publish) without waking anybody: the caller has something more urgent to do, and calls
    /// [`wake`](Watermark::wake) after it, whatever happens meanwhile. Those who look see the mark moved at once.
    #[doc(hidden)]
    #[inline]
    pub fn publish_quietly(&self, to: Lsn) {
        debug_assert!(self.value.load(Ordering::Relaxed) <= to.0, "a published mark goes back to {to}");
        // W1. The wake that follows does W2 and W3, later than usual but in the same order.
        self.value.store(to.0, Ordering::SeqCst);
    }

    /// Wakes those who wait for what the mark has reached.
    #[doc(hidden)]
    #[inline]
    pub fn wake(&self) {
        self.wake_if_reached(self.value.load(Ordering::Relaxed));
    }

    /// Lets the waiter of that name sleep on until the mark reaches `at_least`, because the caller has done what it
    /// would have been woken for below. Does nothing if it is awake: then it looks for itself.
    ///
    /// Only thresholds rise, and `next_wake` follows them under the lock: at every moment it is not above the old or
    /// the new threshold, so claims 1 to 3 hold for the new one as they did for the old.
    #[doc(hidden)]
    pub fn postpone(&self, name: WaiterName, at_least: Lsn) {
        let mut waiters = self.waiters.0.lock();
        for waiter in waiters.parked.iter_mut().filter(|waiter| waiter.name == name) {
            waiter.threshold = waiter.threshold.max(at_least.0);
        }
        self.set_next_wake(&waiters);
    }

    /// Has `call` made once the mark stands at `at_least` or beyond: by the thread that moves it there, once it has
    /// woken those who wait. If it stands there already, gives the call back, unless another thread has just taken it.
    /// A mark has one such call; another takes its place.
    ///
    /// It stands in for a waiter that is not there yet: claims 1 and 2 hold for it, and instead of the third, it is
    /// only taken out by a thread that then makes it.
    #[must_use = "what is given back is to be called"]
    pub(crate) fn call_at(&self, at_least: Lsn, call: Call) -> Option<Call> {
        let before = {
            let mut waiters = self.waiters.0.lock();
            let before = waiters.call.replace((at_least.0, call));
            self.set_next_wake(&waiters);
            before
        };
        // Not under the lock: nobody knows what it owns.
        drop(before);
        total_order_point();
        // R2.
        let value = self.value.load(Ordering::SeqCst);
        if value < at_least.0 {
            return None;
        }
        let mut waiters = self.waiters.0.lock();
        let reached = waiters.call.take_if(|(threshold, _)| *threshold <= value);
        self.set_next_wake(&waiters);
        reached.map(|(_, call)| call)
    }

    /// Whether anyone waits for this mark to reach something. A hint: it may be outdated before it is returned.
    /// Those who wait for [`Lsn::MAX`], which no log reaches, do not count.
    #[must_use]
    pub fn has_waiters(&self) -> bool {
        self.next_wake.load(Ordering::Relaxed) != NOBODY
    }

    /// The condition that this mark stands at `at_least` or beyond.
    #[must_use]
    pub const fn until(&self, at_least: Lsn) -> Until<'_> {
        Until { mark: self, at_least }
    }

    #[inline]
    fn wake_if_reached(&self, value: u64) {
        total_order_point();
        if value >= self.next_wake.load(Ordering::SeqCst) {
            self.wake_reached();
        }
    }

    /// Takes every waiter whose threshold has been reached off the list and unparks it.
    #[cold]
    fn wake_reached(&self) {
        loop {
            let mut woken = [const { None }; WAKE_AT_ONCE];
            let mut count = 0;
            let call;
            {
                let mut waiters = self.waiters.0.lock();
                // At least what this thread wrote. What others add after this load they check themselves.
                let value = self.value.load(Ordering::Acquire);
                let mut at = 0;
                while at < waiters.parked.len() && count < WAKE_AT_ONCE {
                    if waiters.parked[at].threshold <= value {
                        woken[count] = Some(waiters.parked.swap_remove(at).thread);
                        count += 1;
                    } else {
                        at += 1;
                    }
                }
                call = waiters.call.take_if(|(threshold, _)| *threshold <= value);
                self.set_next_wake(&waiters);
            }
            woken.iter().flatten().for_each(Thread::unpark);
            if let Some((_, call)) = call {
                call();
            }
            if count < WAKE_AT_ONCE {
                return;
            }
        }
    }

    fn register(&self, threshold: u64, thread: Thread, name: WaiterName) {
        let mut waiters = self.waiters.0.lock();
        waiters.parked.push(Waiter { threshold, thread, name });
        // Not `set_next_wake`, which looks at the whole list. Relaxed: the lock orders it.
        if threshold < self.next_wake.load(Ordering::Relaxed) {
            self.next_wake.store(threshold, Ordering::SeqCst);
        }
    }

    fn deregister(&self, thread: &Thread) {
        let mut waiters = self.waiters.0.lock();
        let before = waiters.parked.len();
        waiters.parked.retain(|waiter| waiter.thread.id() != thread.id());
        if waiters.parked.len() != before {
            self.set_next_wake(&waiters);
        }
    }

    /// Called with the lock held, hence the argument.
    fn set_next_wake(&self, waiters: &Waiters) {
        let parked = waiters.parked.iter().map(|waiter| waiter.threshold).min().unwrap_or(NOBODY);
        let call = waiters.call.as_ref().map_or(NOBODY, |(threshold, _)| *threshold);
        self.next_wake.store(parked.min(call), Ordering::SeqCst);
    }
}

impl Default for Watermark {
    /// A mark at [`Lsn::ZERO`].
    fn default() -> Self {
        Watermark::new(Lsn::ZERO)
    }
}

impl fmt::Debug for Watermark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watermark").field(&self.load().0).finish()
    }
}

/// How a thread waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WaitStrategy {
    /// Park at once. Costs no processor time; waking up takes a system call and a switch of threads, some
    /// microseconds to some tens of them.
    #[default]
    Park,
    /// Look `spins` times with a spin-loop hint in between, then park; every sixteenth time, let others have the
    /// processor if they want it. A look takes some nanoseconds to some tens, depending on the processor; 1000 covers a
    /// wait of several microseconds. Counted and not timed, so that no clock is read.
    SpinThenPark {
        /// Looks before parking.
        spins: u32,
    },
    /// Never park. The lowest latency, for a thread that has a processor for itself; with fewer processors than
    /// spinning threads it is the worst of all.
    Spin,
}

/// One thing to wait for: `mark` at or above `at_least`.
#[derive(Clone, Copy, Debug)]
pub struct Until<'a> {
    /// The mark.
    pub mark: &'a Watermark,
    /// The lowest value that will do.
    pub at_least: Lsn,
}

impl Until<'_> {
    /// Whether the condition holds. Once it does, it does for ever.
    #[inline]
    #[must_use]
    pub fn holds(&self) -> bool {
        self.mark.load() >= self.at_least
    }
}

/// Why [`wait_any`] returned.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Waited {
    /// A condition holds: the index of the first one, in the order given, that does.
    Reached(usize),
    /// The deadline passed, and after that none of the conditions held.
    TimedOut,
}

/// Waits until one of the conditions holds or the deadline passes, as the strategy says.
///
/// If a condition holds already, that is the result, even if the deadline has passed. Put what must not be overlooked
/// first, such as a shutdown. Conditions may name the same mark more than once. Without any condition it waits
/// for the deadline, and without a deadline for ever.
///
/// Allocates nothing once the lists of the marks have grown to the number of their waiters.
///
/// ```
/// use std::time::Instant;
/// use towline::{Lsn, ShutdownSignal, WaitStrategy, Waited, Watermark, wait_any};
///
/// let written = Watermark::new(Lsn(41));
/// let shutdown = ShutdownSignal::new();
/// let conditions = [shutdown.until(), written.until(Lsn(42))];
/// assert_eq!(wait_any(&conditions, WaitStrategy::Park, Some(Instant::now())), Waited::TimedOut);
/// written.publish(Lsn(50));
/// assert_eq!(wait_any(&conditions, WaitStrategy::Park, None), Waited::Reached(1));
/// ```
pub fn wait_any(conditions: &[Until<'_>], strategy: WaitStrategy, deadline: Option<Instant>) -> Waited {
    wait_any_as(WaiterName::NOBODY, conditions, strategy, deadline)
}

/// [`wait_any`] under a name by which others can [postpone](Watermark::postpone) the waking.
#[doc(hidden)]
pub fn wait_any_as(
    name: WaiterName,
    conditions: &[Until<'_>],
    strategy: WaitStrategy,
    deadline: Option<Instant>,
) -> Waited {
    if let Some(first) = first_that_holds(conditions) {
        return Waited::Reached(first);
    }
    let spins = match strategy {
        WaitStrategy::Park => 0,
        WaitStrategy::SpinThenPark { spins } => spins,
        WaitStrategy::Spin => return spin(conditions, deadline),
    };
    for look in 1..=spins {
        // As in `spin`: whoever is waited for may want this processor.
        if look % SPINS_PER_YIELD == 0 {
            yield_now()
        } else {
            spin_loop()
        }
        if let Some(first) = first_that_holds(conditions) {
            return Waited::Reached(first);
        }
    }
    if has_passed(deadline) {
        return Waited::TimedOut;
    }
    park(name, conditions, deadline)
}

fn spin(conditions: &[Until<'_>], deadline: Option<Instant>) -> Waited {
    loop {
        let expired = has_passed(deadline);
        for _ in 0..YIELDS_PER_CLOCK_READ {
            for _ in 0..SPINS_PER_YIELD {
                if let Some(first) = first_that_holds(conditions) {
                    return Waited::Reached(first);
                }
                if expired {
                    return Waited::TimedOut;
                }
                spin_loop();
            }
            // Where more threads spin than there are processors, the one waited for gets its turn now, and not when the
            // scheduler thinks of it, milliseconds later.
            yield_now();
        }
    }
}

fn park(name: WaiterName, conditions: &[Until<'_>], deadline: Option<Instant>) -> Waited {
    let this = current_thread();
    for condition in conditions {
        condition.mark.register(condition.at_least.0, this.clone(), name);
    }
    total_order_point();
    let mut expired = false;
    let waited = loop {
        // In the first round this is R2, and must see every value that its writer moved without seeing us.
        if let Some(first) = first_that_holds_seq_cst(conditions) {
            break Waited::Reached(first);
        }
        if expired {
            break Waited::TimedOut;
        }
        expired = park_until(&this, deadline);
    };
    for condition in conditions {
        condition.mark.deregister(&this);
    }
    waited
}

fn first_that_holds(conditions: &[Until<'_>]) -> Option<usize> {
    conditions.iter().position(Until::holds)
}

fn first_that_holds_seq_cst(conditions: &[Until<'_>]) -> Option<usize> {
    conditions.iter().position(|condition| condition.mark.value.load(Ordering::SeqCst) >= condition.at_least.0)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_mark_never_goes_back() {
        let mark = Watermark::new(Lsn(5));
        assert!(!mark.advance(Lsn(4)));
        assert!(!mark.advance(Lsn(5)));
        assert_eq!(mark.load(), Lsn(5));
        assert!(mark.advance(Lsn(6)));
        mark.publish(Lsn(6));
        mark.publish(Lsn(9));
        assert_eq!(mark.load(), Lsn(9));
        assert_eq!(format!("{mark:?}"), "Watermark(9)");
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "goes back to 4")]
    fn publishing_backwards_is_a_bug() {
        Watermark::new(Lsn(5)).publish(Lsn(4));
    }

    #[test]
    fn the_first_condition_that_holds_wins() {
        let (a, b) = (Watermark::new(Lsn(1)), Watermark::new(Lsn(1)));
        let passed = Some(Instant::now());
        for strategy in [WaitStrategy::Park, WaitStrategy::SpinThenPark { spins: 3 }, WaitStrategy::Spin] {
            let wait = |conditions: &[Until<'_>]| wait_any(conditions, strategy, passed);
            assert_eq!(wait(&[a.until(Lsn(2)), b.until(Lsn(1)), a.until(Lsn(1))]), Waited::Reached(1));
            assert_eq!(wait(&[a.until(Lsn(2)), b.until(Lsn(2))]), Waited::TimedOut);
            assert_eq!(wait(&[]), Waited::TimedOut);
        }
        assert!(!a.has_waiters() && !b.has_waiters());
    }

    #[test]
    fn a_waiter_that_gives_up_leaves_no_trace() {
        let mark = Watermark::default();
        let soon = Some(Instant::now() + Duration::from_millis(2));
        assert_eq!(wait_any(&[mark.until(Lsn(1)), mark.until(Lsn(2))], WaitStrategy::Park, soon), Waited::TimedOut);
        assert!(!mark.has_waiters());
        assert!(mark.waiters.0.lock().parked.is_empty());
    }

    /// Waits until `count` threads stand on the list, which is how a test knows that they are about to park.
    fn until_listed(mark: &Watermark, count: usize) {
        while mark.waiters.0.lock().parked.len() != count {
            std::thread::yield_now();
        }
    }

    #[test]
    fn only_those_reached_are_taken_off_the_list() {
        // More than are woken for one taking of the lock, twice over.
        const EACH: usize = 2 * WAKE_AT_ONCE + 3;
        let mark = Watermark::default();
        let other = Watermark::default();
        std::thread::scope(|scope| {
            for waiter in 0..2 * EACH {
                let conditions = [other.until(Lsn(1)), mark.until(Lsn(if waiter % 2 == 0 { 10 } else { 20 }))];
                scope.spawn(move || assert_eq!(wait_any(&conditions, WaitStrategy::Park, None), Waited::Reached(1)));
            }
            until_listed(&mark, 2 * EACH);
            assert_eq!(mark.next_wake.load(Ordering::Relaxed), 10);
            mark.publish(Lsn(9));
            assert_eq!(mark.waiters.0.lock().parked.len(), 2 * EACH);
            mark.publish(Lsn(10));
            assert_eq!(mark.waiters.0.lock().parked.len(), EACH);
            assert_eq!(mark.next_wake.load(Ordering::Relaxed), 20);
            // Those woken also leave the other mark, on which they were not reached.
            until_listed(&other, EACH);
            mark.advance(Lsn(25));
            assert!(!mark.has_waiters());
            until_listed(&other, 0);
        });
        assert!(!other.has_waiters());
    }

    #[test]
    fn a_call_is_made_once_by_who_reaches_it_or_at_once() {
        let mark = Arc::new(Watermark::default());
        let calls = Arc::new(AtomicU64::new(0));
        let call = || {
            let calls = Arc::clone(&calls);
            Box::new(move || _ = calls.fetch_add(1, Ordering::SeqCst)) as Call
        };
        assert!(mark.call_at(Lsn(5), call()).is_none());
        mark.publish(Lsn(4));
        // Who waits for less leaves the call where it is.
        let soon = Some(Instant::now() + Duration::from_millis(1));
        assert_eq!(wait_any(&[mark.until(Lsn(5))], WaitStrategy::Park, soon), Waited::TimedOut);
        assert!(mark.has_waiters());
        assert_eq!(calls.load(Ordering::SeqCst), 0);
        mark.publish(Lsn(6));
        mark.publish(Lsn(7));
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        assert!(!mark.has_waiters());
        mark.call_at(Lsn(7), call()).unwrap()();
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        assert!(!mark.has_waiters());
        // A call may ask for the next.
        let again = Arc::clone(&mark);
        let next = call();
        let asks = Box::new(move || assert!(again.call_at(Lsn(9), next).is_none()));
        assert!(mark.call_at(Lsn(8), asks).is_none());
        mark.advance(Lsn(8));
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        mark.advance(Lsn(9));
        assert_eq!(calls.load(Ordering::SeqCst), 3);
    }

    /// Looks at the mark when it goes.
    struct Looks(Arc<Watermark>);

    impl Drop for Looks {
        fn drop(&mut self) {
            assert!(self.0.waiters.0.try_lock().is_some(), "dropped under the lock");
        }
    }

    #[test]
    fn a_call_that_is_replaced_is_dropped_without_the_lock() {
        let mark = Arc::new(Watermark::default());
        let looks = Looks(Arc::clone(&mark));
        assert!(mark.call_at(Lsn(1), Box::new(move || drop(looks))).is_none());
        assert!(mark.call_at(Lsn(2), Box::new(|| ())).is_none());
    }

    #[test]
    fn lists_keep_their_room() {
        let mark = Watermark::default();
        std::thread::scope(|scope| {
            scope.spawn(|| wait_any(&[mark.until(Lsn(1))], WaitStrategy::Park, None));
            until_listed(&mark, 1);
            mark.publish(Lsn(1));
        });
        assert!(mark.waiters.0.lock().parked.capacity() > 0);
    }

    #[test]
    fn unparks_for_other_reasons_do_not_count() {
        let mark = Watermark::default();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                wait_any(&[mark.until(Lsn(1))], WaitStrategy::Park, None);
                done.store(true, Ordering::SeqCst);
            });
            until_listed(&mark, 1);
            for _ in 0..100 {
                waiter.thread().unpark();
                std::thread::yield_now();
            }
            assert!(!done.load(Ordering::SeqCst));
            mark.publish(Lsn(1));
        });
        assert!(done.load(Ordering::SeqCst));
    }

    #[test]
    fn two_threads_play_ping_pong_with_every_strategy() {
        for strategy in [WaitStrategy::Park, WaitStrategy::SpinThenPark { spins: 50 }] {
            let (ping, pong) = (Watermark::default(), Watermark::default());
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for round in 1..=2_000 {
                        wait_any(&[ping.until(Lsn(round))], strategy, None);
                        pong.publish(Lsn(round));
                    }
                });
                for round in 1..=2_000 {
                    ping.publish(Lsn(round));
                    wait_any(&[pong.until(Lsn(round))], strategy, None);
                }
            });
            assert_eq!((ping.load(), pong.load()), (Lsn(2_000), Lsn(2_000)));
        }
    }

    #[test]
    fn concurrent_advances_end_at_the_highest() {
        let mark = Watermark::default();
        let moved: u64 = std::thread::scope(|scope| {
            let advancers = [0, 1, 2, 3].map(|thread: u64| {
                let mark = &mark;
                scope.spawn(move || {
                    let mut seen = Lsn::ZERO;
                    let mut moved = 0;
                    for step in 0..5_000 {
                        moved += u64::from(mark.advance(Lsn(step * 4 + thread + 1)));
                        assert!(mark.load() >= seen);
                        seen = mark.load();
                    }
                    moved
                })
            });
            advancers.into_iter().map(|advancer| advancer.join().unwrap()).sum()
        });
        assert_eq!(mark.load(), Lsn(20_000));
        assert!((1..=20_000).contains(&moved));
    }
}
