//! Retention: which segments of a log are kept, for whom, and why they go.
//!
//! A sealed segment goes when nothing needs it any more, or when the shard's log has become too large:
//!
//! | who needs it | until | beyond `max_wal_bytes` |
//! |---|---|---|
//! | a known follower | it has applied a newer record, and has that on stable storage | loses its place, and is rebuilt |
//! | a [`Pin`] | it is dropped or moved on | is lost, and says so |
//! | a first follower, while none is known | it comes | has to be rebuilt |
//! | nobody, within `min_wal_bytes` | there is newer log | goes |
//! | this node's own target | it has applied it durably | holds it, and is asked to hurry |
//!
//! A known follower that has everything on stable storage and has applied nothing yet still needs everything: with its
//! first record, what it has applied decides where its log goes on. One that has all records of a segment still needs
//! the batch that seals it, until it is known to have a record of the next.
//!
//! So a follower that is slow, stopped or gone for ever neither fills the disk nor slows anybody: appends never wait
//! for retention.
//!
//! # What the bound includes
//!
//! All files of the shard's directory: sealed segments, the open one, the spares (as many as are kept ready, and at
//! most one more), files given up that wait to be spares again (one at the bound, more only where all files together
//! take less than half of where segments begin to go) and what is [set aside](crate::wal) of segments given up unsynced
//! (at most two files). Segments begin to go a reserve below the bound, an eighth of it or three segments if that is
//! more, so that the directory stays under it while they do. A bound that is smaller than all this together leaves the
//! open segment, its spares and little else.
//!
//! What nobody needs goes once it is synced. What goes because the log is too large goes at once, synced or not: a
//! writer that waits for no sync may be faster than the device, and its log is bounded all the same. Only the node's
//! own target can hold a log that is too large. It is asked to hurry when files take more than half of where
//! segments begin to go, and what it has not applied durably stays.
//!
//! One thread a node does this. It waits for a new segment, for a follower that leaves one behind, for a pin that
//! moves, and for the checkpoint; between those it does nothing, and it never waits for a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::error::{Error, Result};
use crate::host::Host;
use crate::limits::{DEFAULT_MAX_WAL_BYTES, DEFAULT_MIN_WAL_BYTES};
use crate::registry::Registry;
use crate::shutdown::ShutdownSignal;
use crate::types::{Lsn, NodeId, ShardId};
use crate::wal::{Log, LogWriter, Wal};
use crate::watermark::{Until, WaitStrategy, Watermark, wait_any};

/// How much log a shard keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RetentionOptions {
    /// The most bytes of files; `None` for no bound.
    pub(crate) max_wal_bytes: Option<u64>,
    /// Bytes of segments kept although nobody needs them.
    pub(crate) min_wal_bytes: u64,
}

impl Default for RetentionOptions {
    fn default() -> Self {
        RetentionOptions { max_wal_bytes: Some(DEFAULT_MAX_WAL_BYTES), min_wal_bytes: DEFAULT_MIN_WAL_BYTES }
    }
}

impl RetentionOptions {
    /// Above this many bytes segments go whoever needs them: the bound less a reserve of an eighth of it, or of three
    /// segments if that is more.
    fn limit(&self, segment_size: u64) -> Option<u64> {
        self.max_wal_bytes.map(|max| max.saturating_sub((max / 8).max(3 * segment_size)).max(segment_size))
    }

    /// Up to this many bytes of files, some may wait to be filled again: from here on the node's own target is asked to
    /// hurry.
    fn room(&self, segment_size: u64) -> u64 {
        self.limit(segment_size).map_or(u64::MAX, |limit| limit / 2)
    }

    /// What goes now. Pure: whoever asks has read the facts, and does what the plan says.
    pub(crate) fn plan(&self, facts: &RetentionFacts<'_>) -> Plan {
        let &RetentionFacts { sealed, unneeded, synced, applied, retained_bytes, segment_size, .. } = facts;
        let limit = self.limit(segment_size);
        let forced = limit.map_or(0, |limit| facts.over(limit));
        let spare = retained_bytes.saturating_sub(self.min_wal_bytes) / segment_size;
        let spare = usize::try_from(spare).unwrap_or(usize::MAX);
        let upto = |lsn: Lsn| sealed.partition_point(|last| *last <= lsn);
        let unneeded = upto(unneeded).min(spare);
        let synced = upto(synced);
        let applied = applied.map_or(sealed.len(), upto);
        // The target is asked to hurry in good time: for it appends go on, and the log grows.
        let urgent = limit.map_or(0, |limit| facts.over(limit / 2));
        let count = forced.max(unneeded.min(synced)).min(applied);
        let next = sealed.get(count).copied().filter(|_| count < forced.max(unneeded));
        let last_of = |count: usize| count.checked_sub(1).and_then(|index| sealed.get(index)).copied();
        Plan {
            through: last_of(count),
            forced: count > unneeded.min(synced),
            // The target has durably applied only what is synced.
            wants_sync: last_of(urgent).filter(|_| urgent > applied),
            reason: if count > unneeded {
                "the log is larger than it may be"
            } else {
                "no follower, pin or target needs it"
            },
            waits_for_sync: next.filter(|_| synced <= count),
            waits_for_target: next.filter(|_| applied == count),
            hurry: urgent > applied,
        }
    }
}

/// What decides about a shard's log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RetentionFacts<'a> {
    /// The last LSN of each sealed segment, oldest first.
    pub(crate) sealed: &'a [Lsn],
    /// Up to here nobody needs anything.
    pub(crate) unneeded: Lsn,
    /// Up to here the log is on stable storage.
    pub(crate) synced: Lsn,
    /// Up to here this node's own target has applied it durably; none without a target.
    pub(crate) applied: Option<Lsn>,
    /// Bytes of the segments that are the log.
    pub(crate) retained_bytes: u64,
    /// Bytes of all files of the log, those set aside too.
    pub(crate) file_bytes: u64,
    pub(crate) segment_size: u64,
}

impl RetentionFacts<'_> {
    /// How many of the sealed segments must go for the log's files to be within `limit` bytes.
    fn over(&self, limit: u64) -> usize {
        let over = self.file_bytes.saturating_sub(limit).div_ceil(self.segment_size);
        usize::try_from(over).unwrap_or(usize::MAX).min(self.sealed.len())
    }
}

/// Segments that end up to here are nothing any more to a follower that stands at `position`. Not so one that ends
/// there: a batch seals it, which may have come after the last record, and where the follower's log ends before that
/// batch it goes on with it.
fn left_behind(position: Lsn) -> Lsn {
    position.previous()
}

/// A hold on a shard's log: nothing from its LSN on is given up while it lives, unless the log grows past its bound.
/// Dropping it lets go.
#[must_use = "dropping a pin lets go of the log at once"]
pub struct Pin {
    held: Arc<Held>,
    retention: Arc<ShardRetention>,
}

/// What is kept of a pin.
#[derive(Debug)]
struct Held {
    owner: String,
    reason: String,
    lsn: AtomicU64,
    lost: AtomicBool,
}

/// A pin, for those who ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinStatus {
    /// Who holds it.
    pub owner: String,
    /// What for.
    pub reason: String,
    /// The oldest LSN that it holds.
    pub lsn: Lsn,
    /// The log grew past its bound, and what the pin held is gone.
    pub lost: bool,
}

impl Pin {
    /// The oldest LSN that it holds.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        Lsn(self.held.lsn.load(Ordering::Acquire))
    }

    /// Whether the log grew past its bound, so that what it held is gone.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.held.lost.load(Ordering::Acquire)
    }

    /// Lets go of everything before `lsn`. Never moves back.
    pub fn move_to(&self, lsn: Lsn) {
        let before = self.held.lsn.fetch_max(lsn.0, Ordering::AcqRel);
        self.retention.moved(Lsn(before).previous(), lsn.previous());
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.retention.pins.lock().retain(|held| !Arc::ptr_eq(held, &self.held));
        self.retention.poke();
    }
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Pin").field(&self.held).finish()
    }
}

/// What is kept of one shard's log, and for whom.
pub(crate) struct ShardRetention {
    /// The log, held while files are removed: a rebuild puts another one in its place.
    kept: RwLock<Kept>,
    options: RetentionOptions,
    registry: Arc<Registry>,
    /// Locked to take, drop and judge pins: never while files are touched.
    pins: Mutex<Vec<Arc<Held>>>,
    /// The oldest LSN that is not given up. Moved by the retaining thread under the lock of `pins`, before the files
    /// go.
    tail: AtomicU64,
    /// The newest LSN of the oldest segment that somebody holds: whoever moves past it wakes the retaining thread.
    awaited: AtomicU64,
    wake: Arc<Watermark>,
    /// What the next pins find given up since whoever takes them has looked, the last first.
    #[cfg(test)]
    pub(crate) given_up_before_pins: Mutex<Vec<Lsn>>,
}

/// A log, and what its own node needs of it.
#[derive(Clone)]
struct Kept {
    log: Arc<Log>,
    /// Up to where this node's own target has applied durably; none without a target.
    applied: Option<Arc<Watermark>>,
}

impl ShardRetention {
    pub(crate) fn new(
        log: Arc<Log>,
        options: RetentionOptions,
        registry: Arc<Registry>,
        applied: Option<Arc<Watermark>>,
        wake: Arc<Watermark>,
    ) -> ShardRetention {
        let tail = AtomicU64::new(log.tail().0);
        log.keep_used_files(options.room(log.identity().segment_size));
        ShardRetention {
            kept: RwLock::new(Kept { log, applied }),
            options,
            registry,
            pins: Mutex::default(),
            tail,
            awaited: AtomicU64::new(u64::MAX),
            wake,
            #[cfg(test)]
            given_up_before_pins: Mutex::default(),
        }
    }

    /// Puts another log in the place of the present one, whose files `open` removes: nothing is released meanwhile.
    /// Pins on the old one are lost, and no follower stands behind the end of the new one. `applied` is up to where the
    /// target has durably applied the new one.
    pub(crate) fn replace_log(
        &self,
        applied: &Arc<Watermark>,
        open: impl FnOnce() -> Result<(Wal, LogWriter)>,
    ) -> Result<(Wal, LogWriter)> {
        let opened = {
            let mut kept = self.kept.write();
            let opened = open()?;
            let log = opened.0.log();
            log.keep_used_files(self.options.room(log.identity().segment_size));
            *kept = Kept { log: Arc::clone(opened.0.log()), applied: Some(Arc::clone(applied)) };
            let pins = self.pins.lock();
            self.tail.store(kept.log.tail().0, Ordering::Release);
            self.registry.cut_behind(kept.log.shard(), kept.log.tail(), kept.log.head());
            pins.iter().for_each(|held| held.lost.store(true, Ordering::Release));
            opened
        };
        self.poke();
        Ok(opened)
    }

    fn kept(&self) -> Kept {
        self.kept.read().clone()
    }

    /// The bound on the log's bytes.
    pub(crate) fn max_wal_bytes(&self) -> Option<u64> {
        self.options.max_wal_bytes
    }

    /// The followers known.
    pub(crate) fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// The oldest LSN that is not given up. Wait-free; at or below [`Log::tail`] of a moment later.
    pub(crate) fn tail(&self) -> Lsn {
        Lsn(self.tail.load(Ordering::Acquire))
    }

    /// Holds the log from `lsn` on.
    ///
    /// # Errors
    ///
    /// [`Error::NotRetained`] if it has been given up already.
    pub(crate) fn pin(self: &Arc<Self>, owner: impl Into<String>, reason: impl Into<String>, lsn: Lsn) -> Result<Pin> {
        let held = Arc::new(Held {
            owner: owner.into(),
            reason: reason.into(),
            lsn: AtomicU64::new(lsn.0),
            lost: AtomicBool::new(false),
        });
        let log = self.kept().log;
        #[cfg(test)]
        self.given_up_before_pins.lock().pop().into_iter().for_each(|tail| self.give_up_before(tail));
        let mut pins = self.pins.lock();
        let tail = log.tail().max(self.tail());
        if lsn < tail {
            return Err(Error::NotRetained { shard: log.shard(), lsn, tail, head: log.head() });
        }
        pins.push(Arc::clone(&held));
        Ok(Pin { held, retention: Arc::clone(self) })
    }

    /// Holds the log from what the node's own target has applied durably on: no base that it opens from now on is
    /// older.
    ///
    /// # Errors
    ///
    /// [`Error::NotRetained`] if it has been given up, which it is not while the target lives.
    pub(crate) fn pin_for_base(self: &Arc<Self>, owner: String, reason: &str) -> Result<Pin> {
        let kept = self.kept();
        let durable = kept.applied.as_ref().map_or(Lsn::ZERO, |applied| applied.load());
        // The segment that holds what comes next stays as a whole.
        let first = kept.log.segment_start_for(durable.next().max(kept.log.tail()))?.segment;
        self.pin(owner, reason, first)
    }

    /// The pins, in the order in which they were taken.
    pub(crate) fn pins(&self) -> Vec<PinStatus> {
        let pins = self.pins.lock();
        pins.iter()
            .map(|held| PinStatus {
                owner: held.owner.clone(),
                reason: held.reason.clone(),
                lsn: Lsn(held.lsn.load(Ordering::Acquire)),
                lost: held.lost.load(Ordering::Acquire),
            })
            .collect()
    }

    /// What comes first when log is given up: no file has gone.
    #[cfg(test)]
    pub(crate) fn give_up_before(&self, tail: Lsn) {
        let _pins = self.pins.lock();
        self.tail.fetch_max(tail.0, Ordering::AcqRel);
    }

    /// Somebody who needed everything after `before` needs only what is after `now`.
    fn moved(&self, before: Lsn, now: Lsn) {
        let awaited = self.awaited.load(Ordering::SeqCst);
        if before.0 < awaited && awaited <= now.0 {
            self.poke();
        }
    }

    /// A known follower that stood at `before` stands at `now`.
    pub(crate) fn follower_moved(&self, before: Lsn, now: Lsn) {
        self.moved(left_behind(before), left_behind(now));
    }

    /// Has the retaining thread look again.
    pub(crate) fn poke(&self) {
        self.wake.advance(self.wake.load().next());
    }

    /// Gives up what is to go now, until nothing is. Says who lost their place, and what the rest waits for.
    fn release(&self) -> Released {
        let mut released = self.release_once();
        while released.again {
            let more = self.release_once();
            released.laggards.extend(more.laggards);
            released = Released { laggards: released.laggards, ..more };
        }
        released
    }

    fn release_once(&self) -> Released {
        let kept = self.kept.read();
        let log = &kept.log;
        // Whoever moves from here on looks at this first, and wakes the thread.
        let sealed: Vec<Lsn> = log.segments().iter().filter_map(|segment| segment.sealed_last_lsn()).collect();
        self.awaited.store(sealed.first().map_or(u64::MAX, |last| last.0), Ordering::SeqCst);
        let mut released = Released::default();
        log.shed_used_files(self.options.room(log.identity().segment_size));
        let plan = {
            let pins = self.pins.lock();
            let plan = self.plan(&kept, &sealed, &pins);
            if let Some(through) = plan.through {
                self.tail.fetch_max(through.next().0, Ordering::AcqRel);
                for held in pins.iter().filter(|held| held.lsn.load(Ordering::Acquire) <= through.0) {
                    if !held.lost.swap(true, Ordering::AcqRel) {
                        log::warn!("shard {}: {} loses its pin ({})", log.shard(), held.owner, held.reason);
                    }
                }
                released.laggards = self.take_places(log.shard(), through);
            }
            plan
        };
        released.waits_for_sync = plan.waits_for_sync;
        released.waits_for_target = plan.waits_for_target;
        released.hurry = plan.hurry;
        if let Some(through) = plan.through {
            // Whatever is too large goes at once: the device may be slower than whoever appends.
            let gone = if plan.forced {
                log.drop_through(through, plan.reason)
            } else {
                log.release_through(through, plan.reason)
            };
            match gone {
                // What is awaited then is another segment, and somebody may have left that one behind meanwhile.
                Ok(count) => released.again = count > 0,
                Err(error) => log::error!("shard {}: a segment was not released: {error}", log.shard()),
            }
        }
        if let Some(through) = plan.wants_sync {
            let log = Arc::clone(log);
            // Where there can be no thread to sync, this one does it: nobody is kept from replacing the log meanwhile.
            drop(kept);
            log.want_synced(through);
        }
        released
    }

    fn plan(&self, Kept { log, applied }: &Kept, sealed: &[Lsn], pins: &[Arc<Held>]) -> Plan {
        let shard = log.shard();
        let followers = self.registry.followers();
        let places = followers
            .iter()
            .filter(|known| !known.has_lost_place(shard))
            .map(|known| left_behind(known.position(shard)));
        let held = pins.iter().filter(|held| !held.lost.load(Ordering::Acquire));
        let held = held.map(|held| Lsn(held.lsn.load(Ordering::Acquire)).previous());
        // Up to here nobody needs anything. Where no follower is known, the first one may need everything.
        let unneeded = if followers.is_empty() { Lsn::ZERO } else { places.chain(held).min().unwrap_or(Lsn::MAX) };
        let facts = RetentionFacts {
            sealed,
            unneeded,
            synced: log.synced().load(),
            applied: applied.as_ref().map(|applied| applied.load()),
            retained_bytes: log.retained_bytes(),
            file_bytes: log.file_bytes(),
            segment_size: log.identity().segment_size,
        };
        self.options.plan(&facts)
    }

    /// Those who needed something up to `through` lose their place.
    fn take_places(&self, shard: ShardId, through: Lsn) -> Vec<NodeId> {
        let mut laggards = Vec::new();
        for known in self.registry.followers() {
            let position = known.position(shard);
            if position < through && known.set_lost_place(shard, true) {
                log::warn!(
                    "shard {shard}: node {} loses its place at LSN {position}: the log up to {through} is given up",
                    known.node()
                );
                laggards.push(known.node());
            }
        }
        laggards
    }
}

/// What goes now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) through: Option<Lsn>,
    /// Whether it is durable or not.
    forced: bool,
    /// Up to here it should be synced soon.
    wants_sync: Option<Lsn>,
    reason: &'static str,
    /// One more would go if it were synced up to here.
    waits_for_sync: Option<Lsn>,
    /// One more would go if the target had durably applied up to here.
    waits_for_target: Option<Lsn>,
    /// The log is becoming too large because of the target.
    hurry: bool,
}

/// What became of one look at a shard.
#[derive(Default)]
struct Released {
    again: bool,
    laggards: Vec<NodeId>,
    waits_for_sync: Option<Lsn>,
    waits_for_target: Option<Lsn>,
    hurry: bool,
}

/// The thread that gives up log. It waits for no device, so that a log that may not grow does not grow meanwhile.
pub(crate) struct Retainer {
    pub(crate) hosts: Vec<Arc<Host>>,
    pub(crate) wake: Arc<Watermark>,
    /// Has the checkpoint written now.
    pub(crate) hurry: Arc<Watermark>,
    pub(crate) stop: ShutdownSignal,
}

impl Retainer {
    pub(crate) fn run(&self) {
        while !self.stop.is_shutdown() {
            // Everything waited for is read before the look, so that nothing is missed that comes during it.
            let wake = self.wake.load().next();
            let mut awaited = Vec::new();
            for host in &self.hosts {
                let retention = host.retention();
                let kept = retention.kept();
                let opened = kept.log.opened().load().next();
                let released = retention.release();
                // Should the log be replaced meanwhile, `wake` says so.
                awaited.push((kept, [Some(opened), released.waits_for_sync, released.waits_for_target]));
                for node in released.laggards {
                    host.place_lost(node);
                }
                if released.hurry {
                    self.hurry.advance(self.hurry.load().next());
                }
            }
            self.wait(wake, &awaited);
        }
    }

    fn wait(&self, wake: Lsn, awaited: &[(Kept, [Option<Lsn>; 3])]) {
        let mut conditions = vec![self.stop.until(), self.wake.until(wake)];
        for (kept, awaited) in awaited {
            let marks = [Some(kept.log.opened()), Some(kept.log.synced()), kept.applied.as_deref()];
            let both = marks.into_iter().zip(awaited).filter_map(|(mark, at_least)| mark.zip(*at_least));
            conditions.extend(both.map(|(mark, at_least)| Until { mark, at_least }));
        }
        wait_any(&conditions, WaitStrategy::Park, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_an_eighth_or_three_segments_and_leaves_one() {
        let limit = |max, size| RetentionOptions { max_wal_bytes: max, min_wal_bytes: 0 }.limit(size);
        assert_eq!(limit(None, 16), None);
        assert_eq!(limit(Some(1600), 16), Some(1400));
        assert_eq!(limit(Some(160), 16), Some(112));
        assert_eq!(limit(Some(40), 16), Some(16));
        assert_eq!(limit(Some(1), 16), Some(16));
    }
}
