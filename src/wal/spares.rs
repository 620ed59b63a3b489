//! Segments prepared ahead of need, on a thread of their own that is there while there is something to prepare.
//!
//! A spare is a file of the right size full of real zeros, mapped and mostly synced: taking one into use is a rename.
//! The thread also takes page faults a little ahead of the writer, because the first store to a page costs more than
//! copying a record into it. For a follower that receives large pieces it does neither: those go in through the file,
//! which fills pages in one step, and a full disk is then an error of that write. Nor does it then keep what is given
//! up, to be filled again. New files are [given their blocks](crate::allocate) in either case.
//!
//! A writer that would wait for the spare that is being made [fills a part of it](super::filling) instead. If almost
//! all its batches are long, what is filled from then on is not made ready for stores: it goes in through the file,
//! into pages that are there. Nor is anything made ready for one whose long batches are waited for.
//!
//! Files of segments that were given up [are filled again](old_files).
//!
//! The thread starts when something is wanted, parks on a condition variable between one thing and the next, and ends
//! when nothing has been wanted for a while: an idle log has no such thread.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, Result};
use crate::limits::PAGE_LEN;
use crate::on_demand::ON_DEMAND_STACK;
use crate::types::{Lsn, ShardId};
use crate::wal::filling::{Filled, Filling, Manner};
use crate::wal::mapping::{Mapping, Segment};
use crate::wal::removed::{Removed, TakeBack, remove_files};
use crate::wal::segment::{MAX_ZERO_PIECE, sync_directory};
use crate::wal::{LogIdentity, WalOptions};
use old_files::{GivingUp, OldFiles, Origin};

mod old_files;

/// Bytes of zeros written at once, at most, where nobody waits for syncs that stores come between: the page cache keeps
/// such a piece as one folio, which takes one fault where its pages would take sixteen, and is written back as one. So
/// where a sync ends in the middle of a piece that is stored to, the next one writes that whole piece again.
const LONGEST_PIECE: u64 = MAX_ZERO_PIECE;

/// What all syncs of a segment together may write again for that reason: one part in so many of it.
const WRITTEN_AGAIN: u64 = 16;

/// Bytes from one sync to the next of a writer that waits for its long batches, or for groups of them. One that waits
/// now and then, and appends much in between, is better off with pages made ready.
const SYNCED_OFTEN: u64 = 1 << 20;

/// How long the preparing thread stays without anything to do.
const STAYS: Duration = Duration::from_secs(1);

/// A file that can become a segment: allocated, zero, mapped.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) mapping: Mapping,
    /// Whether it has its zeros. If not, it has its length, and blocks if the system gave it any, and nothing may be
    /// stored to the mapping: it was made for a writer that goes through the file.
    pub(super) filled: bool,
    /// Its zeros and blocks are on stable storage.
    settled: bool,
    /// Its pages were not made ready for stores: it is for a writer that puts long batches in through the file.
    pub(super) through_file: bool,
}

/// The spares of one log. The log writer takes (and may wait, for want of a spare); retention gives back; the shard's
/// preparing thread makes.
pub(super) struct Spares {
    /// For the thread, which keeps them.
    this: Weak<Spares>,
    removed: Arc<Removed>,
    directory: PathBuf,
    shard: ShardId,
    segment_size: u64,
    keep: usize,
    populate_ahead: u64,
    state: Mutex<State>,
    /// Somebody has waited for a sync since the last spare was made. A hint: set by waiters, taken by the preparing
    /// thread.
    sync_waited: AtomicBool,
    /// Syncs since the last spare was taken, whether anybody waited for them or not. Counted by whoever syncs.
    syncs: AtomicU64,
    /// The writer puts large pieces in through the file now, and would overwrite zeros that nobody needs. A hint: set
    /// by the writer.
    in_bulk: AtomicBool,
    /// The writer's batches are long. A hint: set by the writer.
    in_long: AtomicBool,
    /// Bytes of files, all of the log's together, up to which more used files wait than spares are kept. Set by
    /// retention.
    room: AtomicU64,
    /// Something for the preparing thread to do.
    wanted: Condvar,
    /// A spare, an error, the end, or something to help with.
    made: Condvar,
    /// A helper has ended.
    helped: Condvar,
    /// The preparing thread has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    ready: VecDeque<Prepared>,
    /// More are being made until as many are ready as are kept.
    refilling: bool,
    old: OldFiles,
    /// One more file is being made ready.
    preparing: bool,
    /// It, while it gets its zeros and whoever waits for it may help.
    filling: Option<Arc<Filling>>,
    /// How many do.
    helpers: usize,
    /// The writer waits for a spare, so an earlier failure is to be tried again.
    waiting: bool,
    /// How many wait until as many are ready as are kept.
    awaited: usize,
    /// Why the last attempt failed; whoever waits reports it.
    failure: Option<Error>,
    failed: bool,
    /// The writer had to wait for the last spare that it took.
    outrun: bool,
    populate: Option<(Arc<Segment>, std::ops::Range<u64>)>,
    /// Up to where which segment (by its first LSN) has been asked to be made ready.
    populated: (Lsn, u64),
    /// Spares that have become segments.
    taken: u64,
    /// Syncs while the segment before the newest was filled.
    syncs: u64,
    next_name: u64,
    /// The preparing thread is there.
    running: bool,
    /// It could not be started when it was wanted last.
    start_failed: bool,
    stopped: bool,
}

impl State {
    /// Spares that are ready or being prepared.
    fn spares(&self) -> usize {
        self.ready.len() + usize::from(self.preparing)
    }
}

enum Work {
    Prepare(PathBuf, Origin),
    Settle(Prepared),
    Remove(Vec<PathBuf>),
    Populate(Arc<Segment>, std::ops::Range<u64>),
    Stop,
}

impl Spares {
    /// Spares in `directory`; `left_over` are files there that may be filled again: as many as spares are kept, the
    /// others are removed here and now.
    pub(super) fn new(
        directory: &Path,
        identity: &LogIdentity,
        options: &WalOptions,
        left_over: Vec<PathBuf>,
    ) -> Arc<Spares> {
        // New names must not be those of left-over files.
        let next_name = left_over.iter().filter_map(|path| spare_number(path)).max().unwrap_or(0);
        let keep = options.spare_segments.max(1);
        let (old, surplus) = OldFiles::new(left_over, keep);
        remove_files(identity.shard, &surplus);
        Arc::new_cyclic(|this: &Weak<Spares>| Spares {
            this: Weak::clone(this),
            removed: Removed::new(identity.shard, directory, Weak::clone(this) as Weak<dyn TakeBack>),
            directory: directory.to_owned(),
            shard: identity.shard,
            segment_size: identity.segment_size,
            keep,
            populate_ahead: options.populate_ahead,
            state: Mutex::new(State { old, next_name, ..State::default() }),
            sync_waited: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
            in_bulk: AtomicBool::new(false),
            in_long: AtomicBool::new(false),
            room: AtomicU64::new(0),
            wanted: Condvar::new(),
            made: Condvar::new(),
            helped: Condvar::new(),
            ended: Condvar::new(),
        })
    }

    /// Begins to prepare the first spares.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if there can be no thread for it.
    pub(super) fn begin(&self) -> Result<()> {
        self.start(&mut self.state.lock())
    }

    /// Has the preparing thread look at what is wanted; starts it if it has ended. Where it cannot be started, only
    /// those who wait are told: for the others it was a help, and they ask again.
    fn want(&self, state: &mut State) {
        let result = self.start(state);
        if let Err(error) = &result
            && !state.start_failed
        {
            log::warn!("shard {}: no segments are prepared: {error}", self.shard);
        }
        state.start_failed = result.is_err();
        if let Err(error) = result {
            // It would keep its segment from being used again.
            state.populate = None;
            if state.waiting || state.awaited > 0 {
                state.failure = Some(error);
                self.made.notify_all();
            }
        }
    }

    fn start(&self, state: &mut State) -> Result<()> {
        if state.running {
            self.wanted.notify_one();
            return Ok(());
        }
        self.start_thread(state)
    }

    /// Apart, for what it takes on the stack: whoever only finds the thread there may be a thread that stays.
    #[inline(never)]
    fn start_thread(&self, state: &mut State) -> Result<()> {
        let Some(this) = self.this.upgrade().filter(|_| !state.stopped) else { return Ok(()) };
        let thread = std::thread::Builder::new().name(format!("tl-prep-s{}", self.shard)).stack_size(ON_DEMAND_STACK);
        // Nobody joins it: until then the system would keep its stack. Who needs to know waits for `ended`.
        thread.spawn(move || this.run()).map_err(Error::io("start a thread for", &self.directory))?;
        state.running = true;
        Ok(())
    }

    /// Takes a spare, waiting for one if need be.
    ///
    /// # Errors
    ///
    /// Why none can be made (a full disk, say), or [`Error::ShutDown`].
    pub(super) fn take(&self) -> Result<Prepared> {
        let mut state = self.state.lock();
        // Only what goes wrong from now on is this caller's news.
        state.failure = None;
        loop {
            if let Some(prepared) = state.ready.pop_front() {
                state.outrun = std::mem::take(&mut state.waiting);
                state.taken += 1;
                state.syncs = self.syncs.swap(0, Ordering::Relaxed);
                self.want(&mut state);
                return Ok(prepared);
            }
            if state.stopped {
                return Err(Error::ShutDown);
            }
            if let Some(failure) = state.failure.take() {
                state.waiting = false;
                return Err(failure);
            }
            state.waiting = true;
            self.want(&mut state);
            if state.failure.is_some() {
                continue;
            }
            match state.filling.take_if(|filling| filling.is_left()) {
                Some(filling) => {
                    state.helpers += 1;
                    drop(state);
                    self.help(filling);
                    state = self.state.lock();
                }
                None => self.made.wait(&mut state),
            }
        }
    }

    /// Says that somebody waits for a sync: segments to come should be settled on the device beforehand.
    pub(super) fn syncs_are_waited_for(&self) {
        if !self.sync_waited.load(Ordering::Relaxed) {
            self.sync_waited.store(true, Ordering::Relaxed);
        }
    }

    /// Says whether the batches of a full segment were so long that they may go in through the file.
    pub(super) fn set_long(&self, is_long: bool) {
        self.in_long.store(is_long, Ordering::Relaxed);
    }

    /// Says that something was synced.
    pub(super) fn has_synced(&self) {
        self.syncs.fetch_add(1, Ordering::Relaxed);
    }

    /// Says whether the writer puts large pieces in through the file.
    pub(super) fn set_bulk(&self, in_bulk: bool) {
        self.in_bulk.store(in_bulk, Ordering::Relaxed);
    }

    /// What the writer has said last.
    #[cfg(test)]
    pub(super) fn is_in_bulk(&self) -> bool {
        self.in_bulk.load(Ordering::Relaxed)
    }

    /// Blocks until as many spares are ready as are kept, all of them on stable storage.
    ///
    /// # Errors
    ///
    /// Why one cannot be made, [`Error::ShutDown`], or [`Error::TimedOut`] at the deadline.
    pub(super) fn wait_ready(&self, deadline: Option<Instant>) -> Result<()> {
        let mut state = self.state.lock();
        // Only what goes wrong from now on is this caller's news.
        state.failure = None;
        state.awaited += 1;
        let mut expired = false;
        let result = loop {
            if state.ready.len() >= self.keep && state.ready.iter().all(|spare| spare.settled) {
                break Ok(());
            }
            if state.stopped {
                break Err(Error::ShutDown);
            }
            if let Some(failure) = state.failure.take() {
                break Err(failure);
            }
            if expired {
                let what = format!("{} of {} spare segments of shard {}", state.ready.len(), self.keep, self.shard);
                break Err(Error::TimedOut { what: what.into() });
            }
            state.refilling = true;
            self.want(&mut state);
            if state.failure.is_some() {
                continue;
            }
            match deadline {
                Some(deadline) => expired = self.made.wait_until(&mut state, deadline).timed_out(),
                None => self.made.wait(&mut state),
            }
        };
        state.awaited -= 1;
        result
    }

    /// Has up to `ahead` bytes behind `end` made ready; returns the end at which to ask again.
    pub(super) fn populate(&self, segment: &Arc<Segment>, end: u64, ahead: u64) -> u64 {
        let to = end.saturating_add(ahead).min(self.segment_size);
        let first_lsn = segment.id().first_lsn;
        let mut state = self.state.lock();
        // What an earlier request covered need not be made ready again.
        let ready = if state.populated.0 == first_lsn { state.populated.1 } else { ahead };
        let from = ready.max(end);
        if from < to {
            state.populated = (first_lsn, to);
            state.populate = Some((Arc::clone(segment), from..to));
            self.want(&mut state);
        }
        end.saturating_add(ahead / 2)
    }

    /// Bytes of the files that stand ready or are on their way there.
    pub(super) fn file_bytes(&self) -> u64 {
        let state = self.state.lock();
        (state.spares() + state.old.count()) as u64 * self.segment_size
    }

    /// Says up to how many bytes of files, all of the log's together, more used files may wait than spares are kept.
    pub(super) fn set_room(&self, bytes: u64) {
        self.room.store(bytes, Ordering::Relaxed);
    }

    /// Takes back the file at `path` of a segment that nobody reads any more; surplus files are removed. All other
    /// segments take `retained` bytes. Does not wait for the device: that is left to [`Removed`].
    pub(super) fn recycle(&self, path: PathBuf, segment: Segment, retained: u64) -> Result<()> {
        let (renamed, surplus) = {
            let mut state = self.state.lock();
            let now = GivingUp {
                spares: state.spares(),
                taken: state.taken,
                segment_size: self.segment_size,
                retained,
                room: self.room.load(Ordering::Relaxed),
            };
            let surplus = state.old.segment_given_up(&now);
            // In bulk nothing is filled ahead; filling a used file would only hold up what is received.
            let is_kept = state.old.is_wanted(&now) && !state.stopped && !self.in_bulk.load(Ordering::Relaxed);
            if is_kept {
                state.next_name += 1;
                state.old.returns();
            }
            (is_kept.then(|| spare_path(&self.directory, state.next_name)), surplus)
        };
        self.removed.remove(surplus);
        let Some(renamed) = renamed else { return self.discard(&path, segment) };
        let result = std::fs::rename(&path, &renamed).map_err(Error::io("rename", &path));
        if result.is_ok() && self.removed.give_back(segment, renamed.clone()) {
            return Ok(());
        }
        self.state.lock().old.are_lost(1);
        result?;
        std::fs::remove_file(&renamed).map_err(Error::io("remove", &renamed))
    }

    /// Removes the file at `path` of a segment that nobody here reads any more. Does not wait for its mapping to go.
    pub(super) fn discard(&self, path: &Path, segment: Segment) -> Result<()> {
        std::fs::remove_file(path).map_err(Error::io("remove", path))?;
        self.removed.add(segment);
        Ok(())
    }

    /// Gives up used files beyond what is missing of the spares, or one: the log has grown into the room that they had.
    pub(super) fn shed_used(&self) {
        let surplus = {
            let mut state = self.state.lock();
            let spares = state.spares();
            state.old.shed(spares)
        };
        self.removed.remove(surplus);
    }

    /// Ends every wait, and the thread when it has done what it is at. Of used files no more than spares stays, but for
    /// those that are on their way.
    pub(super) fn stop(&self) {
        let mut state = self.state.lock();
        state.stopped = true;
        state.populate = None;
        let ready = state.ready.len();
        let surplus = state.old.close(ready);
        self.wanted.notify_all();
        self.made.notify_all();
        drop(state);
        self.removed.stop();
        remove_files(self.shard, &surplus);
    }

    /// Blocks until the threads have ended, after [`stop`](Self::stop) or by themselves.
    pub(super) fn wait_ended(&self) {
        let mut state = self.state.lock();
        while state.running {
            self.ended.wait(&mut state);
        }
        drop(state);
        self.removed.wait_ended();
    }

    /// The preparing thread.
    fn run(&self) {
        let _running = Running(self);
        loop {
            match self.next_work() {
                Work::Stop => return,
                Work::Populate(segment, range) => segment.populate(range),
                Work::Prepare(path, origin) => {
                    let (path, result) = self.prepare_when_there_is_room(path, origin);
                    self.made(&path, result);
                }
                Work::Remove(files) => remove_files(self.shard, &files),
                Work::Settle(mut spare) => {
                    let path = spare.path.clone();
                    self.made(&path, self.settle(&mut spare).map(|()| spare));
                }
            }
        }
    }

    /// Tells whoever waits what has become of a spare.
    fn made(&self, path: &Path, result: Result<Prepared>) {
        let mut state = self.state.lock();
        state.preparing = false;
        match result {
            Ok(prepared) => {
                state.ready.push_back(prepared);
                state.failed = false;
            }
            Err(error) => {
                if !state.stopped {
                    log::warn!("shard {}: cannot prepare a segment: {error}", self.shard);
                }
                // A half-filled file would only hold on to room.
                let _ = std::fs::remove_file(path);
                state.failure = Some(error);
                state.failed = true;
            }
        }
        drop(state);
        self.made.notify_all();
    }

    fn next_work(&self) -> Work {
        let mut state = self.state.lock();
        let mut idle = false;
        loop {
            if state.stopped {
                self.is_over(&mut state);
                return Work::Stop;
            }
            if let Some((segment, range)) = state.populate.take() {
                return Work::Populate(segment, range);
            }
            // Filled up from half on, so that a burst is not slowed by its own replenishment.
            let ready = state.ready.len();
            state.refilling = ready < self.keep && (state.refilling || ready <= self.keep / 2);
            // After a failure nothing is tried until somebody asks again.
            let asked = state.waiting || state.awaited > 0;
            if state.awaited > 0
                && let Some(at) = state.ready.iter().position(|spare| !spare.settled)
                && let Some(spare) = state.ready.remove(at)
            {
                state.preparing = true;
                return Work::Settle(spare);
            }
            if state.refilling && (!state.failed || (asked && state.failure.is_none())) {
                let (path, origin) = self.next_file(&mut state);
                state.preparing = true;
                return Work::Prepare(path, origin);
            }
            if idle {
                let surplus = state.old.burst_ends(ready);
                if !surplus.is_empty() {
                    return Work::Remove(surplus);
                }
                // Looked at once more after the wait. Whoever wants something from here on starts another thread.
                self.is_over(&mut state);
                return Work::Stop;
            }
            idle = self.wanted.wait_for(&mut state, STAYS).timed_out();
        }
    }

    /// The file to be prepared next.
    fn next_file(&self, state: &mut State) -> (PathBuf, Origin) {
        // The writer is about to run out.
        let in_a_hurry = state.taken > 0 && state.ready.is_empty() && !state.failed;
        let used_are_synced = state.awaited > 0 || self.sync_waited.load(Ordering::Relaxed);
        state.old.next(in_a_hurry, used_are_synced).unwrap_or_else(|| {
            state.next_name += 1;
            (spare_path(&self.directory, state.next_name), Origin::New)
        })
    }

    /// A file that has its room already, whatever must go to the device before it is taken.
    fn file_at_hand(&self) -> Option<(PathBuf, Origin)> {
        self.state.lock().old.any()
    }

    fn is_over(&self, state: &mut State) {
        state.running = false;
        self.ended.notify_all();
    }

    /// Prepares a file, and where many that were removed still take room, not before one of them has given it back. For
    /// want of room it is tried again whenever some has come back that is on its way. Gives which file it was.
    fn prepare_when_there_is_room(&self, mut path: PathBuf, mut origin: Origin) -> (PathBuf, Result<Prepared>) {
        loop {
            let gone = self.removed.wait_while_many();
            let result = self.prepare(&path, origin);
            if !matches!(&result, Err(Error::Io { source, .. }) if is_no_room(source)) {
                return (path, result);
            }
            // What has been filled of it would only hold on to room.
            let _ = std::fs::remove_file(&path);
            let mut at_hand = self.file_at_hand();
            if at_hand.is_none() {
                if !self.removed.wait_for_room(gone) {
                    return (path, result);
                }
                // What has come back may be a file.
                at_hand = self.file_at_hand();
            }
            (path, origin) = at_hand.unwrap_or((path, origin));
        }
    }

    /// Fills a file with zeros, new or not, and maps it; makes that durable unless it is better done later.
    fn prepare(&self, path: &Path, origin: Origin) -> Result<Prepared> {
        if origin == Origin::LeftOver {
            // Others have been under their new names on stable storage before they came here.
            sync_directory(&self.directory).map_err(Error::io("sync directory", &self.directory))?;
        }
        let filling = Arc::new(Filling::new(path, self.segment_size)?);
        let is_new = filling.is_new();
        self.offer(&filling);
        let filled = self.fill_beside_others(&filling);
        self.withdraw();
        let Filled { file, mapping, is_touched } = filling.finish()?;
        let (path, filled) = (path.to_owned(), filled?);
        // If it was not filled, there is nothing in it to be settled, and what has been filled so far is overwritten.
        let through_file = filled && !is_touched;
        let mut prepared = Prepared { path, file, mapping, filled, settled: !filled, through_file };
        if !filled {
            return Ok(prepared);
        }
        // Where nobody waits for syncs, or the writer is about to run out of spares, a file is as good without: its
        // blocks are reserved, so nothing can fail for want of room, its first syncs note which of them were written,
        // and nothing comes back that could be taken for what is written now. Its zeros then need not go to the device
        // before the records do.
        let (taken, none_left) = {
            let state = self.state.lock();
            // Whoever waits for spares wants to find nothing left to be done.
            (state.taken > 0 && state.awaited == 0, state.ready.is_empty())
        };
        let nobody_waits = !self.sync_waited.swap(false, Ordering::Relaxed);
        let in_bulk = self.in_bulk.load(Ordering::Relaxed);
        let is_known = is_new || origin == Origin::Used;
        if is_known && (in_bulk || taken && (none_left || nobody_waits)) {
            if !is_new {
                prepared.mapping.set_holds_old_bytes(true);
            }
            self.populate_start(&prepared);
        } else {
            self.settle(&mut prepared)?;
        }
        Ok(prepared)
    }

    /// Lets a writer that waits for a spare fill the file too.
    fn offer(&self, filling: &Arc<Filling>) {
        let mut state = self.state.lock();
        state.filling = Some(Arc::clone(filling));
        if state.waiting {
            self.made.notify_all();
        }
    }

    /// From here on nobody else has the file: whoever was filling it has ended.
    fn withdraw(&self) {
        let mut state = self.state.lock();
        state.filling = None;
        while state.helpers > 0 {
            self.helped.wait(&mut state);
        }
    }

    /// Fills what nobody else does, and sees to what the writer needs meanwhile. False if nobody needs it filled.
    fn fill_beside_others(&self, filling: &Filling) -> Result<bool> {
        while !self.needs_no_zeros(filling) {
            if !filling.step(self.manner()) {
                return Ok(true);
            }
            // The writer's needs come first: it runs into these pages now, and into this segment later.
            let populate = self.state.lock().populate.take();
            if let Some((segment, range)) = populate {
                segment.populate(range);
            }
            if self.state.lock().stopped {
                return Err(Error::ShutDown);
            }
        }
        Ok(false)
    }

    /// For the writer, which waits for a spare: fills a part of it instead.
    fn help(&self, filling: Arc<Filling>) {
        // Dropped last: the file is given back before this helper says that it has ended.
        let _helper = Helper(self);
        let filling = filling;
        // Who stops waits for this to end.
        while !self.state.lock().stopped && !self.needs_no_zeros(&filling) && filling.step(self.manner()) {}
    }

    fn needs_no_zeros(&self, filling: &Filling) -> bool {
        filling.is_new() && self.in_bulk.load(Ordering::Relaxed)
    }

    /// How a file is filled that is being prepared, as far as is known now.
    ///
    /// Zeros are written in pages where somebody waits for syncs, and else in pieces as long as what the syncs of a
    /// segment write again for them stays within its bound. Only once the writer has filled a segment is that known.
    ///
    /// Pages are not made ready for stores where batches are long and the writer is ahead of whoever makes them ready
    /// all the same, or frequent syncs are waited for: it writes through the file then, which is less work in all. What
    /// a [`Filling`] leaves alone of a new file has long pieces, whatever this says of others.
    fn manner(&self) -> Manner {
        let (taken, before, is_ahead) = {
            let state = self.state.lock();
            // A writer that waits has filled all that it took, or begins a new epoch, which is rare.
            (state.taken + u64::from(state.waiting), state.syncs, state.waiting || state.outrun)
        };
        let syncs = before.max(self.syncs.load(Ordering::Relaxed)).max(1);
        let is_waited_for = self.sync_waited.load(Ordering::Relaxed);
        let is_synced_often = is_waited_for && self.segment_size / syncs <= SYNCED_OFTEN;
        let goes_through_file =
            cfg!(target_os = "linux") && (is_ahead || is_synced_often) && self.in_long.load(Ordering::Relaxed);
        let piece_len = if taken < 2 || is_waited_for {
            PAGE_LEN
        } else {
            let most = (self.segment_size / WRITTEN_AGAIN / syncs).clamp(PAGE_LEN, LONGEST_PIECE);
            1 << most.ilog2()
        };
        Manner { piece_len, touches: !goes_through_file }
    }

    /// Makes a spare durable, so that later syncs find every block allocated, and nothing of what a used file held
    /// comes back after a power cut.
    fn settle(&self, spare: &mut Prepared) -> Result<()> {
        spare.mapping.unmap_pages(&(0..self.segment_size));
        spare.file.sync_all().map_err(Error::io("sync", &spare.path))?;
        spare.mapping.set_holds_old_bytes(false);
        self.populate_start(spare);
        spare.settled = true;
        Ok(())
    }

    /// Makes the first pages ready for stores.
    fn populate_start(&self, spare: &Prepared) {
        if !spare.through_file {
            spare.mapping.populate(0..self.populate_ahead.min(self.segment_size));
        }
    }
}

/// Whoever fills a file that the preparing thread has: that waits until it has ended, however it does.
struct Helper<'a>(&'a Spares);

impl Drop for Helper<'_> {
    fn drop(&mut self) {
        self.0.state.lock().helpers -= 1;
        self.0.helped.notify_all();
    }
}

/// The preparing thread while it runs: should it panic, those who wait for a spare or for its end do not wait for ever.
struct Running<'a>(&'a Spares);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let panicked = std::io::Error::other("the preparing thread panicked");
            let error = Error::io("prepare a segment in", &self.0.directory)(panicked);
            log::error!("shard {}: {error}", self.0.shard);
            let mut state = self.0.state.lock();
            state.preparing = false;
            state.filling = None;
            state.failure = Some(error);
            self.0.made.notify_all();
            self.0.is_over(&mut state);
        }
    }
}

impl TakeBack for Spares {
    fn take_back(&self, files: Vec<PathBuf>, result: Result<()>) {
        let mut state = self.state.lock();
        match result {
            Ok(()) => {
                state.old.have_returned(files);
                self.want(&mut state);
            }
            Err(error) => {
                state.old.are_lost(files.len());
                drop(state);
                log::warn!("shard {}: {error}", self.shard);
                remove_files(self.shard, &files);
            }
        }
    }
}

fn is_no_room(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

/// The number in the name of a spare file.
fn spare_number(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("spare-")?.strip_suffix(".wal.tmp")?.parse().ok()
}

fn spare_path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("spare-{number}.wal.tmp"))
}

#[cfg(test)]
mod tests;
