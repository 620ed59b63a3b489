//! Segments whose files have been removed and whose mappings are to go, on a thread that is there while there are any.
//!
//! A removed file keeps its room until its last mapping goes, and that takes its time: pages that are being written are
//! waited for, and a file system that tells its device of every block it frees waits for that as well. When a follower that
//! was far behind lets go of the log, hundreds of segments go at once. So retention does not wait for it. The thread that
//! prepares segments, behind which whoever appends may wait, waits for one of them where many are left, so that a log does
//! not take room faster than it gives room back; and where there is no room, for what is on its way back.
//!
//! Where there can be no thread for it, that thread does it itself, and what it leaves goes with the log's last owner.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::on_demand::ON_DEMAND_STACK;
use crate::types::ShardId;
use crate::wal::mapping::Segment;

/// Removed segments that may be left while segments are prepared as if there were none.
const FEW: usize = 2;

/// The removed segments of one log. Retention adds to them, and their thread lets go of their mappings.
pub(super) struct Removed {
    shard: ShardId,
    state: Mutex<State>,
    /// A mapping has gone, or the thread has ended.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    segments: Vec<Segment>,
    /// The thread is there: it ends when it finds no segment.
    running: bool,
    /// Mappings that have gone.
    gone: u64,
    stopped: bool,
}

impl Removed {
    pub(super) fn new(shard: ShardId) -> Arc<Removed> {
        Arc::new(Removed { shard, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Has the mapping of a segment go whose file has been removed. Waits for nothing.
    pub(super) fn add(self: &Arc<Self>, segment: Segment) {
        let mut state = self.state.lock();
        state.segments.push(segment);
        if !state.running && !state.stopped {
            state.running = self.start();
        }
    }

    fn start(self: &Arc<Self>) -> bool {
        let thread = std::thread::Builder::new().name(format!("tl-unmap-s{}", self.shard)).stack_size(ON_DEMAND_STACK);
        let this = Arc::clone(self);
        // Nobody joins it: until then the system would keep its stack. Who needs to know waits for `changed`.
        match thread.spawn(move || this.run()) {
            Ok(_) => true,
            Err(error) => {
                log::warn!("shard {}: no thread to let go of removed segments for now: {error}", self.shard);
                false
            }
        }
    }

    fn run(&self) {
        let _running = Running(self);
        let mut state = self.state.lock();
        while let Some(segment) = state.next() {
            state = self.let_go(state, segment);
        }
        // Before the lock is let go: whoever adds one from here on starts another thread.
        state.running = false;
    }

    fn let_go<'a>(&'a self, state: MutexGuard<'a, State>, segment: Segment) -> MutexGuard<'a, State> {
        drop(state);
        drop(segment);
        let mut state = self.state.lock();
        state.gone += 1;
        self.changed.notify_all();
        state
    }

    /// How many mappings have gone so far; blocks until it is one more where many are left.
    pub(super) fn wait_while_many(&self) -> u64 {
        let state = self.state.lock();
        let (before, many) = (state.gone, state.segments.len() > FEW);
        if many { self.wait_for_one(state, before).gone } else { before }
    }

    /// Blocks until more than `before` mappings have gone. False if there is none to wait for, or at the end.
    pub(super) fn wait_for_room(&self, before: u64) -> bool {
        let state = self.wait_for_one(self.state.lock(), before);
        state.gone > before && !state.stopped
    }

    fn wait_for_one<'a>(&'a self, mut state: MutexGuard<'a, State>, before: u64) -> MutexGuard<'a, State> {
        while state.gone == before {
            if state.running {
                self.changed.wait(&mut state);
            } else {
                let Some(segment) = state.next() else { break };
                state = self.let_go(state, segment);
            }
        }
        state
    }

    /// Ends the thread, and every wait, when the mapping that it is at has gone. What is left goes with the last owner of
    /// this.
    pub(super) fn stop(&self) {
        self.state.lock().stopped = true;
    }

    /// Blocks until the thread has ended, after [`stop`](Self::stop) or by itself.
    pub(super) fn wait_ended(&self) {
        let mut state = self.state.lock();
        while state.running {
            self.changed.wait(&mut state);
        }
    }
}

impl State {
    fn next(&mut self) -> Option<Segment> {
        if self.stopped { None } else { self.segments.pop() }
    }
}

/// The thread while it runs: should it panic, nobody waits for it for ever.
struct Running<'a>(&'a Removed);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.state.lock().running = false;
        }
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::log_fixture::given_up;

    #[test]
    fn mappings_go_and_then_the_thread() {
        let directory = tempfile::tempdir().unwrap();
        let removed = Removed::new(ShardId(0));
        assert!(!removed.wait_for_room(0), "there is nothing to wait for");
        (1..=20).for_each(|number| removed.add(given_up(directory.path(), number).1));
        removed.wait_ended();
        let state = removed.state.lock();
        assert!(state.gone == 20 && state.segments.is_empty() && !state.running);
        drop(state);
        removed.stop();
        removed.add(given_up(directory.path(), 21).1);
        let state = removed.state.lock();
        assert!(state.segments.len() == 1 && !state.running, "it goes with the last owner");
    }

    #[test]
    fn who_waits_for_room_goes_on_when_one_mapping_has_gone() {
        let directory = tempfile::tempdir().unwrap();
        let removed = Removed::new(ShardId(0));
        // As if the thread were there: nothing goes before it runs.
        removed.state.lock().running = true;
        (1..=4).for_each(|number| removed.add(given_up(directory.path(), number).1));
        std::thread::scope(|scope| {
            let many = scope.spawn(|| removed.wait_while_many());
            let room = scope.spawn(|| removed.wait_for_room(0));
            removed.run();
            // They may have begun to wait after it was over.
            assert!((1..=4).contains(&many.join().unwrap()));
            assert!(room.join().unwrap());
        });
        assert!(removed.wait_for_room(3), "what has gone before the call counts");
        assert!(!removed.wait_for_room(4));
    }

    #[test]
    fn without_a_thread_who_waits_does_it() {
        let directory = tempfile::tempdir().unwrap();
        let removed = Removed::new(ShardId(0));
        let add = |number| removed.state.lock().segments.push(given_up(directory.path(), number).1);
        (1..=2).for_each(add);
        assert_eq!(removed.wait_while_many(), 0, "few may be left");
        add(3);
        assert_eq!(removed.wait_while_many(), 1);
        assert!(removed.wait_for_room(1));
        assert_eq!(removed.state.lock().segments.len(), 1);
        removed.stop();
        assert!(!removed.wait_for_room(2), "nobody prepares segments at the end");
    }
}
