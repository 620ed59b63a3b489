//! The one place from which atomics, locks and parking come: `std` and `parking_lot` normally, `loom` when the crate
//! is built with `--cfg loom`, so that the model checker sees every step of the code above it.
//!
//! Code that is never model-checked (files, sockets) may use `std` and `parking_lot` directly.

#[cfg(not(loom))]
pub(crate) use real::*;

#[cfg(loom)]
pub(crate) use model::*;

#[cfg(not(loom))]
mod real {
    use std::time::Instant;

    pub(crate) use parking_lot::Mutex;
    pub(crate) use std::hint::spin_loop;
    pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
    pub(crate) use std::thread::{Thread, current as current_thread, yield_now};

    /// Parks `_this` thread until it is unparked, for no reason at all, or until the deadline. Returns whether the
    /// deadline has passed.
    pub(crate) fn park_until(_this: &Thread, deadline: Option<Instant>) -> bool {
        let Some(deadline) = deadline else {
            std::thread::park();
            return false;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            std::thread::park_timeout(left);
        }
        has_passed(Some(deadline))
    }

    /// Whether there is a deadline and it has passed.
    pub(crate) fn has_passed(deadline: Option<Instant>) -> bool {
        deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Nothing: `SeqCst` accesses are already in one total order. See the model's version.
    #[inline(always)]
    pub(crate) fn total_order_point() {}
}

#[cfg(loom)]
mod model {
    use std::sync::{Arc, PoisonError};
    use std::time::Instant;

    pub(crate) use loom::hint::spin_loop;
    pub(crate) use loom::sync::MutexGuard;
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};
    pub(crate) use loom::thread::yield_now;
    /// `loom`'s mutex with the interface of `parking_lot`'s.
    #[derive(Debug)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Mutex(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    /// What parks and is unparked. Not `loom`'s own, which in version 0.7 also runs on a thread that is blocked on a
    /// lock when it is unparked, and loses the token.
    #[derive(Clone)]
    pub(crate) struct Thread(Arc<Parker>);

    struct Parker {
        token: loom::sync::Mutex<bool>,
        changed: loom::sync::Condvar,
    }

    impl Thread {
        pub(crate) fn id(&self) -> usize {
            Arc::as_ptr(&self.0).addr()
        }

        pub(crate) fn unpark(&self) {
            *self.0.lock() = true;
            self.0.changed.notify_one();
        }
    }

    impl Parker {
        fn lock(&self) -> MutexGuard<'_, bool> {
            self.token.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    /// Something new to park on at each call, so left-over tokens of an earlier wait are not modelled. They could
    /// only make a park return early.
    pub(crate) fn current_thread() -> Thread {
        Thread(Arc::new(Parker { token: loom::sync::Mutex::new(false), changed: loom::sync::Condvar::new() }))
    }

    /// Parks until unparked. There is no clock in a model: a park with a deadline yields once and then expires, so
    /// that the checker tries the expiry at every point relative to the other threads.
    pub(crate) fn park_until(this: &Thread, deadline: Option<Instant>) -> bool {
        if deadline.is_some() {
            loom::thread::yield_now();
            return true;
        }
        let mut token = this.0.lock();
        while !*token {
            token = this.0.changed.wait(token).unwrap_or_else(PoisonError::into_inner);
        }
        *token = false;
        false
    }

    /// Time stands still, except in [`park_until`].
    pub(crate) fn has_passed(_deadline: Option<Instant>) -> bool {
        false
    }

    /// `loom` takes `SeqCst` accesses as acquire-release and knows a total order only of fences. Where the code
    /// relies on the total order between a `SeqCst` write and the `SeqCst` load after it, the model needs this fence
    /// between them to see what the language guarantees (and what every processor's code for the two accesses does).
    pub(crate) fn total_order_point() {
        loom::sync::atomic::fence(Ordering::SeqCst);
    }
}
