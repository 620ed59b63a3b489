//! The thread that syncs what nobody waits for, which is there while there is any.
//!
//! It starts when something is written to a log that was on stable storage to its end, parks between one sync and the
//! next, and ends when nothing more has been written for a while: an idle log has no such thread. While there is none, the
//! first write past the synced mark [calls](Watermark::call_at) for it; that costs other writes nothing. Under
//! [`SyncPolicy::Never`](crate::wal::SyncPolicy::Never) the same goes for whoever wants something synced, and writes start
//! nothing.
//!
//! Where there can be no thread, whoever called for it syncs.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::on_demand::{ON_DEMAND_STACK, Stay};
use crate::wal::Log;
use crate::watermark::{WaitStrategy, Waited, Watermark, wait_any};

/// How long the thread stays without anything to do, at the least.
const STAYS: std::time::Duration = std::time::Duration::from_secs(2);

/// The sync thread of a log, if it has one now.
#[derive(Debug)]
pub(super) struct Syncer {
    /// Locked while the thread is started, or ends.
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug)]
struct State {
    /// The thread is there.
    running: bool,
    stay: Stay,
    stack: usize,
    /// The last attempt to start it failed, which was said.
    failed: bool,
}

impl Default for Syncer {
    fn default() -> Self {
        let state = State { running: false, stay: Stay::at_least(STAYS), stack: ON_DEMAND_STACK, failed: false };
        Syncer { state: Mutex::new(state), ended: Condvar::new() }
    }
}

impl Syncer {
    /// Blocks until the thread has ended. It ends with the log, and is not started after that.
    pub(super) fn wait_ended(&self) {
        let mut state = self.state.lock();
        while state.running {
            self.ended.wait(&mut state);
        }
    }
}

/// Has the thread started as soon as there is something to sync. For whoever opens the log, and for the thread that ends.
pub(super) fn start_when_due(log: &Arc<Log>) {
    let of_log = Arc::downgrade(log);
    let start = move || of_log.upgrade().iter().for_each(start);
    awaited(log).call_at(log.synced().load().next(), Box::new(start));
}

/// The mark that has something to sync when it is past the synced one.
fn awaited(log: &Log) -> &Watermark {
    if log.sync_policy().background_delay().is_some() { log.written() } else { log.sync_wanted() }
}

fn start(log: &Arc<Log>) {
    let mut state = log.syncer().state.lock();
    // Whoever ends the log looks under this lock whether there is a thread, after ending it.
    if state.running || log.check_writable().is_err() {
        return;
    }
    let thread = std::thread::Builder::new().name(format!("tl-sync-s{}", log.shard())).stack_size(state.stack);
    state.stay.begins(Instant::now());
    let (syncing, stay) = (Arc::clone(log), state.stay);
    // Nobody joins it: until then the system would keep its stack. Who needs to know waits for `ended`.
    let result = thread.spawn(move || run(&syncing, stay));
    state.running = result.is_ok();
    let failed_before = std::mem::replace(&mut state.failed, result.is_err());
    drop(state);
    if let Err(error) = result {
        if !failed_before {
            ::log::warn!("shard {}: no thread to sync, so who writes does it: {error}", log.shard());
        }
        sync_now(log);
        start_when_due(log);
    }
}

/// The thread.
fn run(log: &Arc<Log>, stay: Stay) {
    let running = Running(log);
    sync_while_due(log, stay);
    drop(running);
    // Not before: who is called must not find a thread that is about to end. After a log's end, nobody starts one.
    start_when_due(log);
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

/// Says that the thread has ended, also when it panicked.
struct Running<'a>(&'a Log);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            ::log::error!("the sync thread of shard {} panicked", self.0.shard());
        }
        self.0.syncer().state.lock().running = false;
        self.0.syncer().ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::types::{Epoch, Lsn};
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
        for (sync, synced) in [(SyncPolicy::Group, 1), (SyncPolicy::Never, 0)] {
            let directory = tempfile::tempdir().unwrap();
            let (wal, mut writer) = open(directory.path(), sync);
            let log = wal.log();
            // More than there are addresses.
            log.syncer().state.lock().stack = usize::MAX / 2;
            writer.append(b"record").unwrap();
            assert_eq!(log.synced().load(), Lsn(synced), "{sync:?}");
            log.want_synced(Lsn(1));
            assert_eq!(log.synced().load(), Lsn(1), "{sync:?}");
            assert!(log.syncer().state.lock().failed, "{sync:?}");
            log.syncer().state.lock().stack = ON_DEMAND_STACK;
            let lsn = writer.append(b"record").unwrap();
            log.want_synced(lsn);
            reach_synced(log, lsn);
            assert!(!log.syncer().state.lock().failed, "{sync:?}");
            drop(writer);
            wal.close().unwrap();
        }
    }
}
