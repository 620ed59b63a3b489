//! Segments whose files have been removed and whose mappings are to go, on a thread that is there while there are any.
//!
//! A removed file keeps its room until its last mapping goes, and that takes its time: pages that are being written are
//! waited for, and a file system that tells its device of every block it frees waits for that as well. When a follower that
//! was far behind lets go of the log, hundreds of segments go at once. So neither retention waits for it nor the thread
//! that prepares segments, behind which whoever appends may wait. Only where a segment cannot be prepared for want of
//! room does that thread wait for the room that is on its way back.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::on_demand::ON_DEMAND_STACK;
use crate::types::ShardId;
use crate::wal::mapping::Segment;

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

    /// Has the mapping of a segment go whose file has been removed. Where there can be no thread for it, it goes here.
    pub(super) fn add(self: &Arc<Self>, segment: Segment) {
        let mut state = self.state.lock();
        if state.stopped {
            drop(state);
            return drop(segment);
        }
        state.segments.push(segment);
        if !state.running {
            state.running = self.start();
        }
        let left = if state.running { Vec::new() } else { std::mem::take(&mut state.segments) };
        drop(state);
        drop(left);
    }

    fn start(self: &Arc<Self>) -> bool {
        let thread = std::thread::Builder::new().name(format!("tl-unmap-s{}", self.shard)).stack_size(ON_DEMAND_STACK);
        let this = Arc::clone(self);
        // Nobody joins it: until then the system would keep its stack. Who needs to know waits for `changed`.
        match thread.spawn(move || this.run()) {
            Ok(_) => true,
            Err(error) => {
                log::warn!(
                    "shard {}: no thread to let go of a removed segment, so retention does: {error}",
                    self.shard
                );
                false
            }
        }
    }

    fn run(&self) {
        loop {
            let mut state = self.state.lock();
            let next = if state.stopped { None } else { state.segments.pop() };
            let Some(segment) = next else {
                state.running = false;
                self.changed.notify_all();
                return;
            };
            drop(state);
            drop(segment);
            self.state.lock().gone += 1;
            self.changed.notify_all();
        }
    }

    /// Blocks until one more mapping has gone. False at once if there is none to wait for, or at the end.
    pub(super) fn wait_for_room(&self) -> bool {
        let mut state = self.state.lock();
        let before = state.gone;
        while state.running && state.gone == before {
            self.changed.wait(&mut state);
        }
        state.gone > before && !state.stopped
    }

    /// Ends the thread when the mapping that it is at has gone. What is left goes with the last owner of this.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::log_fixture::given_up;

    #[test]
    fn mappings_go_and_then_the_thread() {
        let directory = tempfile::tempdir().unwrap();
        let removed = Removed::new(ShardId(0));
        assert!(!removed.wait_for_room(), "there is nothing to wait for");
        (1..=20).for_each(|number| removed.add(given_up(directory.path(), number).1));
        removed.wait_ended();
        let state = removed.state.lock();
        assert!(state.gone == 20 && state.segments.is_empty() && !state.running);
        drop(state);
        removed.stop();
        removed.add(given_up(directory.path(), 21).1);
        let state = removed.state.lock();
        assert!(state.segments.is_empty() && !state.running, "at the end nobody else lets go of it");
    }

    #[test]
    fn who_waits_for_room_goes_on_when_a_mapping_has_gone() {
        let directory = tempfile::tempdir().unwrap();
        let removed = Removed::new(ShardId(0));
        // As if the thread were at another one: it has what the first of these waits for.
        removed.state.lock().running = true;
        removed.add(given_up(directory.path(), 1).1);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| removed.wait_for_room());
            let thread = scope.spawn(|| removed.run());
            thread.join().unwrap();
            // It may have begun to wait after the mapping had gone, and the thread with it.
            waiting.join().unwrap();
        });
        assert_eq!(removed.state.lock().gone, 1);
        removed.state.lock().running = true;
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| removed.wait_for_room());
            removed.stop();
            removed.run();
            assert!(!waiting.join().unwrap(), "nobody prepares segments at the end");
        });
    }
}
