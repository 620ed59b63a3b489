//! Stopping everything at once: threads that wait for marks and threads that block in sockets.
//!
//! A [`ShutdownSignal`] is passed to every thread. Who waits for a mark also waits for [`ShutdownSignal::until`]; who
//! blocks in a system call registers what interrupts it with [`ShutdownSignal::on_shutdown`]. So stopping takes
//! milliseconds, and nobody needs to wake up now and then to look.
//!
//! Scopes nest: a [child](ShutdownSignal::child) is stopped with its parent or on its own.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::caught::message_of;
use crate::sync::Mutex;
use crate::types::Lsn;
use crate::watermark::{Until, WaitStrategy, Waited, Watermark, wait_any};

/// The mark of a signal that has been given.
const GIVEN: Lsn = Lsn(1);

/// A signal that is given once, wakes every waiter and closes what was registered. Clones are the same signal.
/// Dropping it, even the last clone, does not give it.
///
/// ```
/// use std::net::{Shutdown, TcpListener, TcpStream};
/// use std::io::Read;
/// use towline::ShutdownSignal;
///
/// # fn main() -> std::io::Result<()> {
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// let mut stream = TcpStream::connect(listener.local_addr()?)?;
/// let shutdown = ShutdownSignal::new();
///
/// let socket = stream.try_clone()?;
/// let _guard = shutdown.on_shutdown(move || {
///     let _ = socket.shutdown(Shutdown::Both);
/// });
/// let reader = std::thread::spawn(move || stream.read(&mut [0; 16])); // nobody ever sends anything
/// shutdown.shutdown();
/// assert_eq!(reader.join().unwrap()?, 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ShutdownSignal(Arc<Scope>);

struct Scope {
    /// 0, then [`GIVEN`] for ever. Moved by [`Scope::shutdown`] before it takes the closers; read by
    /// [`ShutdownSignal::on_shutdown`] under their lock. So a closer that comes late sees the mark moved, and one that
    /// comes early is taken: none is missed, none runs twice.
    given: Watermark,
    closers: Mutex<Closers>,
    /// The registration with the parent. It keeps the parent in being, and through it the way from the root to here.
    _parent: Option<ShutdownGuard>,
}

#[derive(Default)]
struct Closers {
    next_id: u64,
    by_id: BTreeMap<u64, Closer>,
}

type Closer = Box<dyn Fn() + Send + Sync>;

/// A registration made by [`ShutdownSignal::on_shutdown`]. Dropping it deregisters.
///
/// Dropping does not wait: a closer that another thread has already begun to run may still be running afterwards.
#[must_use = "dropping the guard deregisters the closer at once"]
pub struct ShutdownGuard {
    scope: Arc<Scope>,
    id: Option<u64>,
}

impl ShutdownSignal {
    /// A signal that has not been given.
    #[must_use]
    pub fn new() -> Self {
        ShutdownSignal(Arc::new(Scope::new(None)))
    }

    /// Gives the signal: wakes every waiter, then runs what was registered, in the order of registration, on this
    /// thread. Only the first call does anything; later ones return at once, even while the first is still closing.
    ///
    /// A closer that panics is reported in the log and does not keep the others from running.
    pub fn shutdown(&self) {
        self.0.shutdown();
    }

    /// Whether the signal has been given. Wait-free.
    #[must_use]
    pub fn is_shutdown(&self) -> bool {
        self.until().holds()
    }

    /// The condition that the signal has been given, for [`wait_any`].
    #[must_use]
    pub fn until(&self) -> Until<'_> {
        self.0.given.until(GIVEN)
    }

    /// Blocks until the signal is given.
    pub fn wait(&self) {
        wait_any(&[self.until()], WaitStrategy::Park, None);
    }

    /// Blocks until the signal is given, but no longer than `timeout`. Returns whether it has been given: a sleep that
    /// a shutdown cuts short. A time-out too long to be a moment in time is none.
    #[must_use]
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        wait_any(&[self.until()], WaitStrategy::Park, deadline) == Waited::Reached(0)
    }

    /// Registers what interrupts a blocking call, such as shutting a socket down. It runs once, when the signal is
    /// given; if that has happened already, before this returns.
    ///
    /// No lock is held while it runs, so it may use this signal as it likes. It should not block, since those
    /// registered after it wait for it.
    pub fn on_shutdown(&self, close: impl Fn() + Send + Sync + 'static) -> ShutdownGuard {
        let closer: Closer = Box::new(close);
        let id = match self.0.register(closer) {
            Ok(id) => Some(id),
            Err(closer) => {
                run(closer);
                None
            }
        };
        ShutdownGuard { scope: Arc::clone(&self.0), id }
    }

    /// A signal for part of what this one stops: given with this one, or on its own without touching this one.
    ///
    /// When the last clone of the child and the last guard from it are dropped, nothing of it stays behind here.
    #[must_use]
    pub fn child(&self) -> ShutdownSignal {
        let child = ShutdownSignal(Arc::new_cyclic(|child: &std::sync::Weak<Scope>| {
            let child = child.clone();
            Scope::new(Some(self.on_shutdown(move || {
                if let Some(child) = child.upgrade() {
                    child.shutdown();
                }
            })))
        }));
        // The parent may have looked for the child between its registration and its completion.
        if self.is_shutdown() {
            child.shutdown();
        }
        child
    }
}

impl Scope {
    fn new(parent: Option<ShutdownGuard>) -> Self {
        Scope { given: Watermark::new(Lsn::ZERO), closers: Mutex::new(Closers::default()), _parent: parent }
    }

    fn shutdown(&self) {
        if !self.given.advance(GIVEN) {
            return;
        }
        let closers = std::mem::take(&mut self.closers.lock().by_id);
        closers.into_values().for_each(run);
    }

    /// Gives the closer back if it is too late for it.
    fn register(&self, closer: Closer) -> Result<u64, Closer> {
        let mut closers = self.closers.lock();
        if self.given.load() >= GIVEN {
            return Err(closer);
        }
        let id = closers.next_id;
        closers.next_id += 1;
        closers.by_id.insert(id, closer);
        Ok(id)
    }
}

/// Runs a closer and drops it, both within the catch: what it owns may panic when dropped.
fn run(closer: Closer) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(closer)) {
        log::error!("something registered to be closed at shutdown panicked: {}", message_of(panic.as_ref()));
    }
}

impl Drop for ShutdownGuard {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            // Dropped after the lock is released: what the closer owns may use the signal when it is dropped.
            let closer = self.scope.closers.lock().by_id.remove(&id);
            drop(closer);
        }
    }
}

impl Default for ShutdownSignal {
    fn default() -> Self {
        ShutdownSignal::new()
    }
}

impl fmt::Debug for ShutdownSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShutdownSignal").field("is_shutdown", &self.is_shutdown()).finish_non_exhaustive()
    }
}

impl fmt::Debug for ShutdownGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShutdownGuard").finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Weak;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    impl ShutdownSignal {
        fn registered(&self) -> usize {
            self.0.closers.lock().by_id.len()
        }
    }

    /// A counter and a closer that counts its runs.
    fn counter() -> (Arc<AtomicU32>, impl Fn() + Send + Sync + 'static) {
        let runs = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&runs);
        (runs, move || {
            count.fetch_add(1, Ordering::SeqCst);
        })
    }

    #[test]
    fn closers_run_once() {
        let signal = ShutdownSignal::new();
        let (before, close_before) = counter();
        let (after, close_after) = counter();
        let _before = signal.on_shutdown(close_before);
        assert!(!signal.is_shutdown() && !signal.until().holds());
        signal.shutdown();
        signal.clone().shutdown();
        let _after = signal.on_shutdown(close_after);
        signal.shutdown();
        assert_eq!((before.load(Ordering::SeqCst), after.load(Ordering::SeqCst)), (1, 1));
        assert!(signal.is_shutdown());
    }

    #[test]
    fn a_dropped_guard_deregisters() {
        let signal = ShutdownSignal::new();
        let (runs, close) = counter();
        drop(signal.on_shutdown(close));
        assert_eq!(signal.registered(), 0);
        signal.shutdown();
        assert_eq!(runs.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn every_waiter_wakes() {
        let signal = ShutdownSignal::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| signal.wait());
                scope.spawn(|| assert!(signal.wait_timeout(Duration::MAX)));
            }
            signal.shutdown();
        });
        signal.wait();
        assert!(signal.wait_timeout(Duration::ZERO));
        assert!(!ShutdownSignal::default().wait_timeout(Duration::ZERO));
    }

    #[test]
    fn a_panicking_closer_stops_nobody() {
        let signal = ShutdownSignal::new();
        let (runs, close) = counter();
        let _first = signal.on_shutdown(|| panic!("cannot close"));
        let _second = signal.on_shutdown(close);
        signal.shutdown();
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        let _late = signal.on_shutdown(|| panic!("{} close", "cannot"));
    }

    #[test]
    fn closers_may_use_the_signal() {
        let signal = ShutdownSignal::new();
        let (runs, close) = counter();
        let close = Arc::new(close);
        let inner = signal.clone();
        let guard = Arc::new(Mutex::new(None));
        let own_guard = Arc::downgrade(&guard);
        *guard.lock() = Some(signal.on_shutdown(move || {
            inner.shutdown();
            let close = Arc::clone(&close);
            let _nested = inner.on_shutdown(move || close());
            let own: Weak<Mutex<Option<ShutdownGuard>>> = own_guard.clone();
            drop(own.upgrade().and_then(|guard| guard.lock().take()));
        }));
        signal.shutdown();
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        assert!(guard.lock().is_none());
    }

    #[test]
    fn a_closer_that_owns_a_guard_is_dropped_without_deadlock() {
        let signal = ShutdownSignal::new();
        let inner = signal.on_shutdown(|| ());
        let outer = signal.on_shutdown(move || {
            let _ = &inner;
        });
        drop(outer);
        assert_eq!(signal.registered(), 0);
    }

    #[test]
    fn shutdown_goes_down_and_not_up() {
        let root = ShutdownSignal::new();
        let (child, sibling) = (root.child(), root.child());
        child.shutdown();
        assert!(child.is_shutdown() && !root.is_shutdown() && !sibling.is_shutdown());
        // The scope between them lives on in the grandchild.
        let grandchild = sibling.child();
        drop(sibling);
        std::thread::scope(|scope| {
            scope.spawn(|| grandchild.wait());
            root.shutdown();
        });
        assert!(grandchild.is_shutdown() && root.child().is_shutdown());
    }

    #[test]
    fn a_guard_of_a_dropped_child_still_closes() {
        let root = ShutdownSignal::new();
        let (runs, close) = counter();
        let _guard = root.child().on_shutdown(close);
        root.shutdown();
        assert_eq!(runs.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn dropped_children_leave_nothing_behind() {
        let root = ShutdownSignal::new();
        for _ in 0..10 {
            drop(root.child().child());
        }
        assert_eq!(root.registered(), 0);
        let kept = root.child();
        let weak = Arc::downgrade(&kept.0);
        assert_eq!(root.registered(), 1);
        drop(kept);
        assert_eq!(root.registered(), 0);
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn children_made_while_the_parent_stops_stop() {
        for _ in 0..200 {
            let root = ShutdownSignal::new();
            let child = std::thread::scope(|scope| {
                let child = scope.spawn(|| root.child());
                root.shutdown();
                child.join().unwrap()
            });
            assert!(child.is_shutdown());
        }
    }
}
