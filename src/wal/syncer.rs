//! The thread that syncs what nobody waits for, which is there while there is any.
//!
//! It starts when something is written to a log that was on stable storage to its end, parks between one sync and the
//! next, and ends when nothing more has been written for a while: an idle log has no such thread. While there is none, the
//! first write past the synced mark [calls](Watermark::call_at) for it; that costs other writes nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::wal::{Log, ON_DEMAND_STACK};
#[cfg(doc)]
use crate::watermark::Watermark;
use crate::watermark::{WaitStrategy, Waited, wait_any};

/// How long the thread stays without anything to do.
const STAYS: Duration = Duration::from_secs(2);
/// Whether a log has its sync thread now.
#[derive(Debug, Default)]
pub(super) struct Syncer {
    /// The thread is there. Locked while it is started, or ends.
    running: Mutex<bool>,
    ended: Condvar,
}

impl Syncer {
    /// Blocks until the thread has ended. It ends with the log, and is not started after that.
    pub(super) fn wait_ended(&self) {
        let mut running = self.running.lock();
        while *running {
            self.ended.wait(&mut running);
        }
    }
}

/// Has the thread started as soon as anything is written that is not synced. For whoever opens the log, and for the thread
/// that ends.
pub(super) fn start_when_dirty(log: &Arc<Log>) {
    let of_log = Arc::downgrade(log);
    let start = move || of_log.upgrade().iter().for_each(start);
    log.written().call_at(log.synced().load().next(), Box::new(start));
}

fn start(log: &Arc<Log>) {
    let mut running = log.syncer().running.lock();
    // Whoever ends the log looks under this lock whether there is a thread, after ending it.
    if *running || log.check_writable().is_err() {
        return;
    }
    let thread = std::thread::Builder::new().name(format!("tl-sync-s{}", log.shard())).stack_size(ON_DEMAND_STACK);
    let syncing = Arc::clone(log);
    // Nobody joins it: until then the system would keep its stack. Who needs to know waits for `ended`.
    match thread.spawn(move || run(&syncing)) {
        Ok(_) => *running = true,
        Err(error) => {
            drop(running);
            ::log::warn!("shard {}: cannot start a thread to sync, so who writes does it: {error}", log.shard());
            sync_now(log);
            start_when_dirty(log);
        }
    }
}

/// The thread.
fn run(log: &Arc<Log>) {
    let running = Running(log);
    sync_while_dirty(log);
    drop(running);
    // Not before: who is called must not find a thread that is about to end. After a log's end, nobody starts one.
    start_when_dirty(log);
}

/// Syncs by the policy, until nothing is written for a while, or the log ends.
fn sync_while_dirty(log: &Log) {
    let Some(delay) = log.sync_policy().background_delay() else { return };
    while log.check_writable().is_ok() {
        let dirty = log.written().until(log.synced().load().next());
        let stays = Instant::now().checked_add(STAYS);
        if wait_any(&[dirty, log.until_ended()], WaitStrategy::Park, stays) == Waited::TimedOut {
            return;
        }
        let wanted = log.sync_wanted().until(log.synced().load().next());
        wait_any(&[wanted, log.until_ended()], WaitStrategy::Park, Instant::now().checked_add(delay));
        if log.check_writable().is_ok() {
            sync_now(log);
        }
    }
}

fn sync_now(log: &Log) {
    if let Err(error) = log.sync_all() {
        ::log::debug!("shard {}: background sync ended: {error}", log.shard());
    }
}

/// Says that the thread has ended, also when it panicked.
struct Running<'a>(&'a Log);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            ::log::error!("the sync thread of shard {} panicked", self.0.shard());
        }
        *self.0.syncer().running.lock() = false;
        self.0.syncer().ended.notify_all();
    }
}
