//! Segments given up whose mappings are to go, on a thread that is there while there are any.
//!
//! A removed file keeps its room until its last mapping goes, and that takes its time: pages that are being written are
//! waited for, and a file system that tells its device of every block it frees waits for that as well. When a follower
//! that was far behind lets go of the log, hundreds of segments go at once. So retention does not wait for it. The
//! thread that prepares segments, behind which whoever appends may wait, waits for one of them where many are left, so
//! that a log does not take room faster than it gives room back; and where there is no room, for what is on its way
//! back.
//!
//! A file that is to be filled again has a new name instead, which must be on stable storage before anything of it is
//! overwritten: after a power cut, no file may have the old name and other bytes. Nobody waits for that either.
//!
//! Where there can be no thread for it, that thread does it itself, and what it leaves goes with the log's last owner.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::error::{Error, Result};
use crate::on_demand::ON_DEMAND_STACK;
use crate::types::ShardId;
use crate::wal::mapping::Segment;
use crate::wal::segment::sync_directory;

/// Removed segments that may be left while segments are prepared as if there were none.
const FEW: usize = 2;

/// Takes files whose new names are durable.
pub(super) trait TakeBack: Send + Sync {
    /// These can be filled again, unless their names could not be made durable.
    fn take_back(&self, files: Vec<PathBuf>, result: Result<()>);
}

/// The segments of one log that were given up. Retention adds to them, and their thread lets go of their mappings.
pub(super) struct Removed {
    shard: ShardId,
    directory: PathBuf,
    owner: Weak<dyn TakeBack>,
    state: Mutex<State>,
    /// A mapping has gone, files have been given back, or the thread has ended.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    segments: Vec<Segment>,
    /// What is to be filled again, under its new name.
    renamed: Vec<(Segment, PathBuf)>,
    /// Files that are to be removed after all.
    surplus: Vec<PathBuf>,
    /// The thread is there: it ends when it finds nothing to do.
    running: bool,
    /// Mappings that have gone, those of files given back included.
    gone: u64,
    stopped: bool,
}

enum Work {
    LetGo(Segment),
    Remove(Vec<PathBuf>),
    GiveBack(Vec<(Segment, PathBuf)>),
}

impl Removed {
    /// None yet, of the log in `directory`.
    pub(super) fn new(shard: ShardId, directory: &Path, owner: Weak<dyn TakeBack>) -> Arc<Removed> {
        let directory = directory.to_owned();
        Arc::new(Removed { shard, directory, owner, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Has the mapping of a segment go whose file has been removed. Waits for nothing.
    pub(super) fn add(self: &Arc<Self>, segment: Segment) {
        let mut state = self.state.lock();
        state.segments.push(segment);
        if !state.running && !state.stopped {
            state.running = self.start();
        }
    }

    /// Gives the file of a segment back once its new name is on stable storage. Waits for nothing. False if there can
    /// be no thread for it: the file is the caller's then.
    pub(super) fn give_back(self: &Arc<Self>, segment: Segment, renamed: PathBuf) -> bool {
        let mut state = self.state.lock();
        if !state.running && !state.stopped {
            state.running = self.start();
        }
        if state.running {
            state.renamed.push((segment, renamed));
        } else {
            state.segments.push(segment);
        }
        state.running
    }

    /// Has files removed that nobody has mapped. Waits for nothing, unless there can be no thread for it.
    pub(super) fn remove(self: &Arc<Self>, files: Vec<PathBuf>) {
        if files.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        if !state.running && !state.stopped {
            state.running = self.start();
        }
        if state.running {
            state.surplus.extend(files);
        } else {
            drop(state);
            remove_files(self.shard, &files);
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
        while let Some(work) = state.next() {
            state = match work {
                Work::LetGo(segment) => self.let_go(state, segment),
                Work::Remove(files) => self.remove_all(state, &files),
                Work::GiveBack(renamed) => self.give_all_back(state, renamed),
            };
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

    fn remove_all<'a>(&'a self, state: MutexGuard<'a, State>, files: &[PathBuf]) -> MutexGuard<'a, State> {
        drop(state);
        remove_files(self.shard, files);
        let mut state = self.state.lock();
        state.gone += files.len() as u64;
        self.changed.notify_all();
        state
    }

    /// One sync for all that were renamed by now.
    fn give_all_back<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        renamed: Vec<(Segment, PathBuf)>,
    ) -> MutexGuard<'a, State> {
        drop(state);
        let files: Vec<PathBuf> = renamed.into_iter().map(|(_segment, path)| path).collect();
        let (count, synced) = (files.len() as u64, sync_directory(&self.directory));
        if let Some(owner) = self.owner.upgrade() {
            owner.take_back(files, synced.map_err(Error::io("sync directory", &self.directory)));
        }
        let mut state = self.state.lock();
        state.gone += count;
        self.changed.notify_all();
        state
    }

    /// How many mappings have gone or files been given back so far; blocks until it is one more where many are left.
    pub(super) fn wait_while_many(&self) -> u64 {
        let state = self.state.lock();
        let (before, many) = (state.gone, state.segments.len() > FEW);
        if many { self.wait_for_one(state, before).gone } else { before }
    }

    /// Blocks until more than `before` have. False if there is none to wait for, or at the end.
    pub(super) fn wait_for_room(&self, before: u64) -> bool {
        let state = self.wait_for_one(self.state.lock(), before);
        state.gone > before && !state.stopped
    }

    fn wait_for_one<'a>(&'a self, mut state: MutexGuard<'a, State>, before: u64) -> MutexGuard<'a, State> {
        while state.gone == before {
            if state.running {
                self.changed.wait(&mut state);
            } else {
                // What is to be given back has a thread.
                let Some(segment) = state.next_removed() else { break };
                state = self.let_go(state, segment);
            }
        }
        state
    }

    /// Ends the thread, and every wait, when the mapping that it is at has gone. What is left goes with the last owner
    /// of this.
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
    fn next_removed(&mut self) -> Option<Segment> {
        if self.stopped { None } else { self.segments.pop() }
    }

    /// Files that somebody may wait for come before room that somebody may wait for.
    fn next(&mut self) -> Option<Work> {
        if self.stopped {
            None
        } else if !self.renamed.is_empty() {
            Some(Work::GiveBack(std::mem::take(&mut self.renamed)))
        } else if !self.surplus.is_empty() {
            Some(Work::Remove(std::mem::take(&mut self.surplus)))
        } else {
            self.next_removed().map(Work::LetGo)
        }
    }
}

/// Removes files. One that stays behind is left over when the log is opened next.
pub(super) fn remove_files(shard: ShardId, files: &[PathBuf]) {
    for path in files {
        if let Err(error) = std::fs::remove_file(path).map_err(Error::io("remove", path)) {
            log::warn!("shard {shard}: {error}");
        }
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

    /// What has been given back.
    #[derive(Default)]
    struct Owner(Mutex<Vec<(PathBuf, bool)>>);

    impl TakeBack for Owner {
        fn take_back(&self, files: Vec<PathBuf>, result: Result<()>) {
            self.0.lock().extend(files.into_iter().map(|path| (path, result.is_ok())));
        }
    }

    fn removed(directory: &Path) -> (Arc<Removed>, Arc<Owner>) {
        let owner = Arc::new(Owner::default());
        let weak = Arc::downgrade(&owner);
        (Removed::new(ShardId(0), directory, weak), owner)
    }

    #[test]
    fn mappings_go_and_then_the_thread() {
        let directory = tempfile::tempdir().unwrap();
        let (removed, _owner) = removed(directory.path());
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
    fn files_come_back_once_their_names_are_durable() {
        let directory = tempfile::tempdir().unwrap();
        let (removed, owner) = removed(directory.path());
        // As if the thread were there: nothing comes back before it runs.
        removed.state.lock().running = true;
        for number in 1..=3 {
            let (path, segment) = given_up(directory.path(), number);
            assert!(removed.give_back(segment, path));
        }
        removed.add(given_up(directory.path(), 4).1);
        assert!(owner.0.lock().is_empty());
        removed.run();
        let back = std::mem::take(&mut *owner.0.lock());
        assert!(back.len() == 3 && back.iter().all(|(path, durable)| *durable && path.exists()));
        assert!(removed.wait_for_room(3), "who waits for room looks again at what came back as well");
        // A directory that cannot be synced.
        let gone = directory.path().join("gone");
        let (removed, owner) = self::removed(&gone);
        let (path, segment) = given_up(directory.path(), 5);
        assert!(removed.give_back(segment, path.clone()));
        removed.wait_ended();
        assert_eq!(*owner.0.lock(), [(path, cfg!(not(unix)))]);
        removed.stop();
        let (path, segment) = given_up(directory.path(), 6);
        assert!(!removed.give_back(segment, path), "nobody will fill it again");
    }

    #[test]
    fn who_waits_for_room_goes_on_when_one_mapping_has_gone() {
        let directory = tempfile::tempdir().unwrap();
        let (removed, _owner) = removed(directory.path());
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
        let (removed, _owner) = removed(directory.path());
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
