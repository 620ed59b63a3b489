//! The thread that syncs what nobody waits for, which is there while there is any.
//!
//! It starts when something is written to a log that was on stable storage to its end, parks between one sync and the
//! next, and ends when nothing more has been written for a while: an idle log has no such thread. While there is none,
//! the first write past the synced mark [calls](Watermark::call_at) for it; that costs other writes nothing. Under
//! [`SyncPolicy::Never`](crate::wal::SyncPolicy::Never) the same goes for whoever wants something synced, and writes
//! start nothing.
//!
//! Under [`SyncPolicy::EveryBatch`](crate::wal::SyncPolicy::EveryBatch) whoever appends waits for the sync at once, and
//! starts nothing either; a follower's log, which nobody appends to, is synced as under any other policy.
//!
//! Where there can be no thread, whoever called for it syncs: who writes does so no more often than the policy lets
//! records stay unsynced, and what is written between two such syncs waits for the next write, or for somebody who
//! wants it synced.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::on_demand::{ON_DEMAND_STACK, Stay};
use crate::types::Lsn;
use crate::wal::Log;
use crate::watermark::{Call, WaitStrategy, Waited, Watermark, wait_any};

/// How long the thread stays without anything to do, at the least.
const STAYS: std::time::Duration = std::time::Duration::from_secs(2);

/// The sync thread of a log, if it has one now.
#[derive(Debug)]
pub(super) struct Syncer {
    /// Locked while the thread is started, or ends.
    state: Mutex<State>,
    ended: Condvar,
    /// Up to here whoever appended waits for the sync. Written by the log's writer, before what is written is seen.
    waited_for: AtomicU64,
}

#[derive(Debug)]
struct State {
    /// The thread is there, and syncs.
    running: bool,
    /// Threads that still hold the log: the present one, and those that are about to be gone.
    holding: usize,
    stay: Stay,
    stack: usize,
    /// When the last attempt to start it failed, which was said.
    failed: Option<Instant>,
}

impl Default for Syncer {
    fn default() -> Self {
        let stay = Stay::at_least(STAYS);
        let state = State { running: false, holding: 0, stay, stack: ON_DEMAND_STACK, failed: None };
        Syncer { state: Mutex::new(state), ended: Condvar::new(), waited_for: AtomicU64::new(0) }
    }
}

impl Syncer {
    /// Blocks until the thread has ended and holds the log no more. It ends with the log, and is not started after
    /// that.
    pub(super) fn wait_ended(&self) {
        let mut state = self.state.lock();
        while state.holding > 0 {
            self.ended.wait(&mut state);
        }
    }

    /// Whoever appends up to `last` waits for the sync: that takes no thread. For the log's writer, before it
    /// publishes.
    pub(super) fn will_be_waited_for(&self, last: Lsn) {
        // Relaxed: whoever sees what is then published sees this.
        self.waited_for.store(last.0, Ordering::Relaxed);
    }
}

/// Has the thread started as soon as there is something to sync. For whoever opens the log, and for the thread that
/// ends.
pub(super) fn start_when_due(log: &Arc<Log>) {
    if !is_called_at(log, log.synced().load().next()) {
        start(log);
    }
}

/// Has the thread started once the awaited mark stands at `at_least`. False if it does already.
fn is_called_at(log: &Arc<Log>, at_least: Lsn) -> bool {
    awaited(log).call_at(at_least, call(log)).is_none()
}

/// Starts the thread, if the log is still there.
fn call(log: &Arc<Log>) -> Call {
    let of_log = Arc::downgrade(log);
    Box::new(move || of_log.upgrade().iter().for_each(start))
}

/// The mark that has something to sync when it is past the synced one.
fn awaited(log: &Log) -> &Watermark {
    if log.sync_policy().background_delay().is_some() { log.written() } else { log.sync_wanted() }
}

/// The same for whoever wants something synced, where writes may have to wait for that. True also if there is nothing
/// to sync: then what is written next calls.
fn is_called_when_wanted(log: &Arc<Log>) -> bool {
    let at_least = log.synced().load().next();
    log.sync_wanted().call_at(at_least, call(log)).is_none() || log.written().load() < at_least
}

fn start(log: &Arc<Log>) {
    // Once, unless others write meanwhile.
    while let Some(Again { written, or_wanted }) = start_or_sync(log) {
        if is_called_at(log, written) && (!or_wanted || is_called_when_wanted(log)) {
            return;
        }
    }
}

/// When to try again.
struct Again {
    /// Once the awaited mark stands here.
    written: Lsn,
    /// Or once somebody wants a sync: there is no thread that would see it.
    or_wanted: bool,
}

/// Starts the thread, or does what it would do. Returns when to do so again, unless a thread is there or the log has
/// ended.
fn start_or_sync(log: &Arc<Log>) -> Option<Again> {
    let mut state = log.syncer().state.lock();
    // Whoever ends the log looks under this lock whether there is a thread, after ending it.
    if state.running || log.check_writable().is_err() {
        return None;
    }
    if let Some(delay) = log.sync_policy().background_delay() {
        let written = log.written().load();
        if log.syncer().waited_for.load(Ordering::Relaxed) >= written.0 {
            return Some(Again { written: written.next(), or_wanted: false });
        }
        let is_wanted = log.sync_wanted().load() > log.synced().load();
        if !is_wanted && state.failed.is_some_and(|failed| failed.elapsed() < delay) {
            return Some(Again { written: written.next(), or_wanted: true });
        }
    }
    let thread = std::thread::Builder::new().name(format!("tl-sync-s{}", log.shard())).stack_size(state.stack);
    state.stay.begins(Instant::now());
    let (syncer, syncing, stay) = (Arc::clone(log.syncer()), Arc::clone(log), state.stay);
    // Nobody joins it: until then the system would keep its stack. Who needs to know waits for `ended`.
    let result = thread.spawn(move || run(syncer, syncing, stay));
    state.running = result.is_ok();
    state.holding += usize::from(result.is_ok());
    let failed_before = state.failed.take().is_some();
    if result.is_err() {
        state.failed = Some(Instant::now());
    }
    drop(state);
    if let Err(error) = result {
        if !failed_before {
            ::log::warn!("shard {}: no thread to sync, so who writes does it: {error}", log.shard());
        }
        sync_now(log);
        let or_wanted = log.sync_policy().background_delay().is_some();
        return Some(Again { written: log.synced().load().next(), or_wanted });
    }
    None
}

/// The thread.
fn run(syncer: Arc<Syncer>, log: Arc<Log>, stay: Stay) {
    // The last to go, also when it panics: who waits for the end finds that nobody here holds the log.
    let _held = Held(syncer);
    let log = log;
    let running = Running(&log);
    sync_while_due(&log, stay);
    drop(running);
    // Not before: who is called must not find a thread that is about to end. After a log's end, nobody starts one.
    start_when_due(&log);
}

/// Counts a thread for as long as it holds the log.
struct Held(Arc<Syncer>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.state.lock().holding -= 1;
        self.0.ended.notify_all();
    }
}

/// Syncs by the policy, until nothing is to be synced for a while, or the log ends.
fn sync_while_due(log: &Log, stay: Stay) {
    while log.check_writable().is_ok() {
        let due = awaited(log).until(log.synced().load().next());
        let leaves = Instant::now().checked_add(stay.duration());
        if wait_any(&[due, log.until_ended()], WaitStrategy::Park, leaves) == Waited::TimedOut {
            return;
        }
        if let Some(delay) = log.sync_policy().background_delay() {
            let wanted = log.sync_wanted().until(log.synced().load().next());
            wait_any(&[wanted, log.until_ended()], WaitStrategy::Park, Instant::now().checked_add(delay));
        }
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

/// Says that the thread syncs no more, also when it panicked.
struct Running<'a>(&'a Log);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            ::log::error!("the sync thread of shard {} panicked", self.0.shard());
        }
        self.0.syncer().state.lock().running = false;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::types::Epoch;
    use crate::wal::log_fixture::IDENTITY;
    use crate::wal::{LogWriter, SyncPolicy, Wal, WalOptions};

    fn open(directory: &Path, sync: SyncPolicy) -> (Wal, LogWriter) {
        let options = WalOptions { sync, ..WalOptions::default() };
        let (wal, mut writer) = Wal::open(directory, IDENTITY, options).unwrap();
        writer.set_epoch(Epoch(1)).unwrap();
        (wal, writer)
    }

    fn reach_synced(log: &Log, lsn: Lsn) {
        let deadline = Instant::now().checked_add(Duration::from_secs(60));
        let waited = wait_any(&[log.synced().until(lsn)], WaitStrategy::Park, deadline);
        assert_eq!(waited, Waited::Reached(0), "nobody synced LSN {lsn}");
    }

    #[test]
    fn the_thread_ends_and_another_one_syncs_what_comes_then() {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = open(directory.path(), SyncPolicy::Interval(Duration::from_millis(1)));
        assert!(!wal.log().syncer().state.lock().running, "nothing is to be synced yet");
        for _ in 0..2 {
            let lsn = writer.append(b"record").unwrap();
            reach_synced(wal.log(), lsn);
            wal.log().syncer().wait_ended();
        }
        drop(writer);
        wal.close().unwrap();
    }

    #[test]
    fn without_a_policy_only_who_wants_a_sync_starts_the_thread() {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = open(directory.path(), SyncPolicy::Never);
        let lsn = writer.append(b"record").unwrap();
        assert!(!wal.log().syncer().state.lock().running);
        wal.log().want_synced(lsn);
        reach_synced(wal.log(), lsn);
        drop(writer);
        wal.close().unwrap();
    }

    #[test]
    fn where_no_thread_can_be_started_whoever_calls_for_it_syncs() {
        for (sync, synced) in [(SyncPolicy::Interval(Duration::ZERO), 1), (SyncPolicy::Never, 0)] {
            let directory = tempfile::tempdir().unwrap();
            let (wal, mut writer) = open(directory.path(), sync);
            let log = wal.log();
            // More than there are addresses.
            log.syncer().state.lock().stack = crate::on_demand::TOO_MUCH_STACK;
            writer.append(b"record").unwrap();
            assert_eq!(log.synced().load(), Lsn(synced), "{sync:?}");
            log.want_synced(Lsn(1));
            assert_eq!(log.synced().load(), Lsn(1), "{sync:?}");
            assert!(log.syncer().state.lock().failed.is_some(), "{sync:?}");
            log.syncer().state.lock().stack = ON_DEMAND_STACK;
            let lsn = writer.append(b"record").unwrap();
            log.want_synced(lsn);
            reach_synced(log, lsn);
            assert!(log.syncer().state.lock().failed.is_none(), "{sync:?}");
            drop(writer);
            wal.close().unwrap();
        }
    }

    #[test]
    fn where_no_thread_can_be_started_not_every_append_syncs() {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = open(directory.path(), SyncPolicy::Interval(Duration::from_secs(3600)));
        let log = wal.log();
        log.syncer().state.lock().stack = crate::on_demand::TOO_MUCH_STACK;
        for _ in 0..5 {
            writer.append(b"record").unwrap();
            assert_eq!(log.synced().load(), Lsn(1));
        }
        // As if so much time had passed.
        log.syncer().state.lock().failed = None;
        for _ in 0..5 {
            writer.append(b"record").unwrap();
            assert_eq!(log.synced().load(), Lsn(6));
        }
        log.syncer().state.lock().failed = None;
        log.syncer().state.lock().stack = ON_DEMAND_STACK;
        let lsn = writer.append(b"record").unwrap();
        log.want_synced(lsn);
        reach_synced(log, lsn);
        drop(writer);
        wal.close().unwrap();
    }

    #[test]
    fn where_no_thread_can_be_started_what_is_wanted_is_synced_at_once() {
        for sync in [SyncPolicy::Group, SyncPolicy::Interval(Duration::from_secs(3600)), SyncPolicy::EveryBatch] {
            let directory = tempfile::tempdir().unwrap();
            let (wal, mut writer) = open(directory.path(), sync);
            let log = wal.log();
            log.syncer().state.lock().stack = crate::on_demand::TOO_MUCH_STACK;
            for lsn in [1, 2, 3] {
                // As what a follower receives, which nobody waits for.
                assert_eq!(writer.append_batch_quietly(&[b"record"]).unwrap(), Lsn(lsn));
                log.wake_readers();
                log.want_synced(Lsn(lsn));
                assert_eq!(log.synced().load(), Lsn(lsn), "{sync:?}");
            }
            log.want_synced(Lsn(9));
            assert_eq!(log.synced().load(), Lsn(3), "{sync:?}: there is no more");
            log.syncer().state.lock().stack = ON_DEMAND_STACK;
            let lsn = writer.append_batch_quietly(&[b"record"]).unwrap();
            log.wake_readers();
            reach_synced(log, lsn);
            drop(writer);
            wal.close().unwrap();
        }
    }

    #[test]
    fn where_every_append_waits_only_what_nobody_waits_for_starts_the_thread() {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = open(directory.path(), SyncPolicy::EveryBatch);
        for lsn in 1..4 {
            assert_eq!(writer.append(b"record").unwrap(), Lsn(lsn));
            assert_eq!(wal.log().synced().load(), Lsn(lsn));
            assert_eq!(wal.log().syncer().state.lock().holding, 0, "there was nothing left to sync");
        }
        let lsn = writer.append_batch_quietly(&[b"record"]).unwrap();
        wal.log().sync_will_be_waited_for(lsn);
        wal.log().wake_readers();
        assert_eq!(wal.log().syncer().state.lock().holding, 0, "somebody is about to do it");
        wal.log().leave_sync();
        reach_synced(wal.log(), lsn);
        let lsn = writer.append_batch_quietly(&[b"record"]).unwrap();
        wal.log().wake_readers();
        reach_synced(wal.log(), lsn);
        drop(writer);
        wal.close().unwrap();
    }

    #[test]
    fn a_log_that_was_closed_is_held_by_no_thread() {
        for _ in 0..20 {
            let directory = tempfile::tempdir().unwrap();
            let (wal, mut writer) = open(directory.path(), SyncPolicy::Group);
            writer.append(b"record").unwrap();
            let log = Arc::clone(wal.log());
            drop(writer);
            wal.close().unwrap();
            assert_eq!(Arc::strong_count(&log), 1);
        }
    }
}
