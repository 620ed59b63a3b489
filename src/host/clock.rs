//! The engine's time, and the thread that notices what runs out of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Host;
use crate::protocol::Millis;
use crate::shutdown::ShutdownSignal;
use crate::watermark::{WaitStrategy, Watermark, wait_any};

/// The engine's time, and when the earliest session of a node runs out of it.
pub(crate) struct Clock {
    began: Instant,
    /// Until when `tl-proto` waits; later than everything while it makes up its mind.
    armed: AtomicU64,
    /// Moves when something runs out of time before that.
    wake: Watermark,
}

impl Clock {
    pub(crate) fn new() -> Clock {
        Clock { began: Instant::now(), armed: AtomicU64::new(u64::MAX), wake: Watermark::default() }
    }

    pub(super) fn now(&self) -> Millis {
        Millis(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    fn moment(&self, at: Millis) -> Option<Instant> {
        self.began.checked_add(Duration::from_millis(at.0))
    }

    pub(super) fn arm(&self, deadline: Option<Millis>) {
        if deadline.is_some_and(|deadline| deadline.0 < self.armed.load(Ordering::SeqCst)) {
            self.wake.advance(self.wake.load().next());
        }
    }

    /// The thread `tl-proto`: fails what has run out of time. Waits for the earliest deadline of all hosts, or for an
    /// earlier one.
    pub(crate) fn run(&self, hosts: &[Arc<Host>], stop: &ShutdownSignal) {
        while !stop.is_shutdown() {
            let wake = self.wake.load().next();
            // Any deadline that is set from here on wakes this thread, until what it waits for is known.
            self.armed.store(u64::MAX, Ordering::SeqCst);
            let earliest = hosts.iter().filter_map(|host| host.next_deadline()).min();
            self.armed.store(earliest.map_or(u64::MAX, |at| at.0), Ordering::SeqCst);
            let conditions = [stop.until(), self.wake.until(wake)];
            wait_any(&conditions, WaitStrategy::Park, earliest.and_then(|at| self.moment(at)));
            for host in hosts {
                host.tick();
            }
        }
    }
}
