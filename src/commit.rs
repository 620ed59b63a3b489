//! From acknowledgements to "committed".
//!
//! Each shard of a node has one [`Commits`]: the marks of its followers, what is acknowledged as widely as somebody
//! asks, and the waiting for it. Acknowledgements come in on the threads that read them (`ack_reader`); who waits parks
//! on watermarks, or is such a thread.
//!
//! `applied <= received` and `durable <= received <= written` hold for every follower; an acknowledgement that breaks
//! that is refused where it is read.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard, RwLock};

use crate::ack_reader::{AckReader, Wait, Waits, has_time};
use crate::error::{Error, Result};
use crate::limits::MAX_FOLLOWERS;
use crate::shipper::Shipper;
use crate::shutdown::ShutdownSignal;
use crate::types::{Lsn, NodeId};
use crate::wal::{Log, LogWriter, SyncPolicy};
use crate::watermark::{Until, Waited, Watermark, wait_any};

/// What a follower has done with a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AckLevel {
    /// It is in the follower's log: safe from a crash of either process.
    Received,
    /// It is on the follower's stable storage: safe from a power cut. A follower whose log outgrows its bound gives old
    /// records up, and says the same of them.
    Durable,
    /// The follower's target has applied it: readers there see it.
    Applied,
}

impl AckLevel {
    /// The word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            AckLevel::Received => "received",
            AckLevel::Durable => "durable",
            AckLevel::Applied => "applied",
        }
    }
}

impl fmt::Display for AckLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for AckLevel {
    type Err = Error;

    fn from_str(text: &str) -> Result<AckLevel> {
        let known = [AckLevel::Received, AckLevel::Durable, AckLevel::Applied];
        known
            .into_iter()
            .find(|level| level.as_str() == text)
            .ok_or_else(|| Error::invalid(format!("{text:?} is not a level: use received, durable or applied")))
    }
}

/// How widely a record must be acknowledged to count as committed.
///
/// Written as `synced` (on this node's stable storage), `received:1`, `durable:2`, `applied:1` (by that many followers
/// that exist), or both with a plus: `synced+durable:1`.
///
/// ```
/// use towline::{AckLevel, Commit};
///
/// let commit: Commit = "synced+durable:2".parse()?;
/// assert_eq!(commit, Commit::followers(AckLevel::Durable, 2)?.and_synced());
/// assert!("durable:0".parse::<Commit>().is_err());
/// # Ok::<(), towline::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Commit {
    synced: bool,
    followers: Option<(AckLevel, usize)>,
}

impl Commit {
    /// On this node's stable storage.
    pub const SYNCED: Commit = Commit { synced: true, followers: None };

    /// Acknowledged by `count` followers at `level`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for no followers at all, which would mean nothing, or for more than a node can have.
    pub fn followers(level: AckLevel, count: usize) -> Result<Commit> {
        if (1..=MAX_FOLLOWERS).contains(&count) {
            Ok(Commit { synced: false, followers: Some((level, count)) })
        } else {
            Err(Error::invalid(format!("{}:{count}: between 1 and {MAX_FOLLOWERS} followers", level.as_str())))
        }
    }

    /// The same, and on this node's stable storage too. The syncs of both run at the same time.
    #[must_use]
    pub const fn and_synced(self) -> Commit {
        Commit { synced: true, followers: self.followers }
    }

    /// Whether this node's stable storage is asked for.
    #[must_use]
    pub const fn is_synced(self) -> bool {
        self.synced
    }

    /// At which level how many followers are asked for.
    #[must_use]
    pub const fn asked_of_followers(self) -> Option<(AckLevel, usize)> {
        self.followers
    }
}

impl fmt::Display for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.synced, self.followers) {
            (true, None) | (false, None) => f.write_str("synced"),
            (true, Some((level, count))) => write!(f, "synced+{}:{count}", level.as_str()),
            (false, Some((level, count))) => write!(f, "{}:{count}", level.as_str()),
        }
    }
}

impl FromStr for Commit {
    type Err = Error;

    fn from_str(text: &str) -> Result<Commit> {
        let unknown = || {
            Error::invalid(format!(
                "{text:?} is not a commit level: use synced, received:K, durable:K, applied:K, or synced+durable:K"
            ))
        };
        let (synced, rest) = match text.strip_prefix("synced") {
            Some("") => return Ok(Commit::SYNCED),
            Some(rest) => (true, rest.strip_prefix('+').ok_or_else(unknown)?),
            None => (false, text),
        };
        let (level, count) = rest.split_once(':').ok_or_else(unknown)?;
        let level = level.parse::<AckLevel>().map_err(|_| unknown())?;
        let commit = Commit::followers(level, count.parse().map_err(|_| unknown())?)?;
        Ok(if synced { commit.and_synced() } else { commit })
    }
}

/// How waiting for a commit ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a record that is not committed may be lost"]
pub enum Outcome {
    /// Acknowledged as widely as asked.
    Committed,
    /// Not so by the deadline. It may still come.
    TimedOut,
    /// A newer epoch has been seen: another node leads, and this record may be cut.
    Deposed,
    /// The node is shutting down.
    ShutDown,
    /// The shard is read-only since a failure, of a sync mostly, or of this node's own target. What it holds may be
    /// lost in a power cut. The text says what failed.
    Poisoned(String),
    /// No record has this LSN yet.
    NotWritten,
    /// This node gave it up before it was on stable storage, as a log does that outgrows its bound faster than it is
    /// synced.
    GivenUp,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Committed => f.write_str("committed"),
            Outcome::TimedOut => f.write_str("timed out"),
            Outcome::Deposed => f.write_str("deposed: another node leads"),
            Outcome::ShutDown => f.write_str("shut down"),
            Outcome::Poisoned(reason) => write!(f, "read-only: {reason}"),
            Outcome::NotWritten => f.write_str("not written"),
            Outcome::GivenUp => f.write_str("given up before it was synced"),
        }
    }
}

impl Outcome {
    /// Whether it is [`Outcome::Committed`].
    #[must_use]
    pub fn is_committed(&self) -> bool {
        *self == Outcome::Committed
    }
}

/// What one follower has acknowledged. Written only by the thread that reads this follower's stream for this shard.
#[derive(Debug)]
pub struct FollowerMarks {
    node: NodeId,
    received: AtomicU64,
    durable: AtomicU64,
    applied: AtomicU64,
    /// When the last acknowledgement came, in milliseconds since the Unix epoch; 0 for never.
    acked_at_ms: AtomicU64,
    /// Newest LSN handed to the stream, each time that everything has been. Written by the shipper, and when a stream
    /// begins.
    shipped: AtomicU64,
    /// The stream whose word these marks are, the newest. Written under the lock of whoever computes what is reached.
    stream: AtomicU64,
    /// How many streams serve this follower now: 0 or 1, for an instant 2 while a new one takes over.
    streams: AtomicU64,
    /// Whether what it acknowledges counts for commits: not while it is being rebuilt.
    counts: AtomicBool,
    /// How its history was found to differ from the leader's; none since its newest stream began.
    divergence: Mutex<Option<String>>,
}

impl FollowerMarks {
    fn new(node: NodeId) -> FollowerMarks {
        FollowerMarks {
            node,
            received: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            applied: AtomicU64::new(0),
            acked_at_ms: AtomicU64::new(0),
            shipped: AtomicU64::new(0),
            stream: AtomicU64::new(0),
            streams: AtomicU64::new(0),
            counts: AtomicBool::new(true),
            divergence: Mutex::default(),
        }
    }

    /// Whose marks these are.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// What it has acknowledged at a level.
    #[must_use]
    pub fn at(&self, level: AckLevel) -> Lsn {
        let mark = match level {
            AckLevel::Received => &self.received,
            AckLevel::Durable => &self.durable,
            AckLevel::Applied => &self.applied,
        };
        Lsn(mark.load(Ordering::Acquire))
    }

    /// Newest LSN handed to its stream, as of when all that there was had been handed to it last.
    #[must_use]
    pub fn shipped(&self) -> Lsn {
        Lsn(self.shipped.load(Ordering::Relaxed))
    }

    /// When it last acknowledged anything, in milliseconds since the Unix epoch; 0 for never.
    #[must_use]
    pub fn acked_at_ms(&self) -> u64 {
        self.acked_at_ms.load(Ordering::Relaxed)
    }

    /// Whether a stream serves it now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.streams.load(Ordering::Relaxed) > 0
    }

    /// Whether what it acknowledges counts for commits. It does not while the follower is being rebuilt: what it has
    /// then is of no use until the rebuild completes.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.counts.load(Ordering::Acquire)
    }

    fn set_marks(&self, received: Lsn, durable: Lsn, applied: Lsn, now_ms: u64) {
        self.received.store(received.0, Ordering::Release);
        self.durable.store(durable.0, Ordering::Release);
        self.applied.store(applied.0, Ordering::Release);
        self.acked_at_ms.store(now_ms, Ordering::Relaxed);
    }

    pub(crate) fn set_counts(&self, counts: bool) {
        self.counts.store(counts, Ordering::Release);
    }

    /// How its history was found to differ from the leader's, if it was: then nothing of it counts.
    #[must_use]
    pub fn divergence(&self) -> Option<String> {
        self.divergence.lock().clone()
    }

    pub(crate) fn set_divergence(&self, divergence: Option<String>) {
        *self.divergence.lock() = divergence;
    }

    pub(crate) fn set_shipped(&self, lsn: Lsn) {
        self.shipped.store(lsn.0, Ordering::Relaxed);
    }

    pub(crate) fn stream_began(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn stream_ended(&self) {
        self.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The followers of one shard and what they have acknowledged together.
pub struct Commits {
    log: Arc<Log>,
    policy: Commit,
    /// The mark that the policy asks for, at hand without a lock.
    policy_reached: Option<Arc<Watermark>>,
    acknowledged: Acknowledged,
    /// The streams to followers that stand now. Changed when one begins or ends.
    shippers: RwLock<Vec<Arc<Shipper>>>,
    /// What reads what followers acknowledge on them. Changed as those.
    readers: RwLock<Vec<Arc<AckReader>>>,
    /// Threads that wait for followers.
    waits: Waits,
    /// On a follower: the newest LSN that its leader has said to be committed. Moved by the shard's receiver.
    told: Option<Arc<AtomicU64>>,
    /// The newest LSN that somebody waits for at the durable or the applied level. Moved by waiters; shippers wait on
    /// it to ask followers for haste.
    durable_wanted: Watermark,
    applied_wanted: Watermark,
}

impl Commits {
    /// On a follower: nothing is committed here, and `told` is what its leader says.
    pub(crate) fn of_follower(log: Arc<Log>, told: Arc<AtomicU64>) -> Commits {
        Commits { told: Some(told), ..Commits::new(log, Commit::SYNCED) }
    }

    pub(crate) fn new(log: Arc<Log>, policy: Commit) -> Commits {
        let mut commits = Commits {
            log,
            policy,
            policy_reached: None,
            acknowledged: Acknowledged::default(),
            shippers: RwLock::default(),
            readers: RwLock::default(),
            waits: Waits::default(),
            told: None,
            durable_wanted: Watermark::new(Lsn::ZERO),
            applied_wanted: Watermark::new(Lsn::ZERO),
        };
        commits.policy_reached = policy.followers.map(|(level, count)| commits.acknowledged.reached(level, count));
        commits
    }

    /// The commit policy of the node.
    #[must_use]
    pub fn policy(&self) -> Commit {
        self.policy
    }

    /// The newest LSN that is committed by the node's policy; so is everything before it that the log has not given up.
    /// On a follower, by its leader's word, as far as its log goes. Wait-free.
    #[must_use]
    pub fn committed(&self) -> Lsn {
        if let Some(told) = &self.told {
            return Lsn(told.load(Ordering::Relaxed)).min(self.log.head());
        }
        let synced = if self.policy.synced { self.log.synced().load() } else { Lsn::MAX };
        let followers = self.policy_reached.as_ref().map_or(Lsn::MAX, |mark| mark.load());
        synced.min(followers)
    }

    /// The marks of every follower seen so far.
    #[must_use]
    pub fn followers(&self) -> Vec<Arc<FollowerMarks>> {
        self.acknowledged.followers.read().clone()
    }

    /// Appends records as one batch and waits until they are committed as `commit` says, or the deadline passes: what
    /// [`LogWriter::append_batch`] and [`wait`](Self::wait) do, in less time. The calling thread ships the records
    /// itself where a follower's stream is idle, instead of waking a thread for it, and where it is the only one that
    /// waits, it soon reads what the follower answers by itself too. Returns the LSN of the last record and how waiting
    /// for it ended.
    ///
    /// # Errors
    ///
    /// As [`LogWriter::append_batch`]: then nothing was appended. [`Error::Invalid`] if the writer is not this shard's.
    pub fn append_and_wait<R: AsRef<[u8]>>(
        &self,
        writer: &mut LogWriter,
        records: &[R],
        commit: Commit,
        deadline: Option<Instant>,
    ) -> Result<(Lsn, Outcome)> {
        if !Arc::ptr_eq(writer.log(), &self.log) {
            return Err(Error::invalid(format!("the writer is not that of shard {}", self.log.shard())));
        }
        let lsn = writer.append_batch_quietly(records)?;
        self.want_shipped(lsn, commit);
        let every_batch = self.log.options().sync == SyncPolicy::EveryBatch;
        if every_batch {
            self.log.sync_will_be_waited_for(lsn);
        }
        // Those who have it by now sleep on.
        self.log.wake_readers();
        let outcome = self.wait_shipped(lsn, if every_batch { commit.and_synced() } else { commit }, deadline);
        if every_batch && self.log.synced().load() < lsn {
            self.log.leave_sync();
        }
        Ok((lsn, outcome))
    }

    /// Waits until `lsn` is committed as `commit` says, or the deadline passes.
    pub fn wait(&self, lsn: Lsn, commit: Commit, deadline: Option<Instant>) -> Outcome {
        if lsn > self.log.head() {
            return Outcome::NotWritten;
        }
        self.want_shipped(lsn, commit);
        self.wait_shipped(lsn, commit, deadline)
    }

    /// Has followers hurry with `lsn`, and ships it where no other thread has done so yet.
    fn want_shipped(&self, lsn: Lsn, commit: Commit) {
        let Some((level, count)) = commit.followers else { return };
        let wanted = match level {
            AckLevel::Received => None,
            AckLevel::Durable => Some(&self.durable_wanted),
            AckLevel::Applied => Some(&self.applied_wanted),
        };
        wanted.inspect(|wanted| wanted.advance_quietly(lsn));
        self.ship_at_once(lsn, count);
        wanted.inspect(|wanted| wanted.wake());
    }

    /// Waits for what followers have been told already, so that their syncs run while this thread does the local one.
    fn wait_shipped(&self, lsn: Lsn, commit: Commit, deadline: Option<Instant>) -> Outcome {
        if commit.synced
            && let Err(error) = self.log.wait_synced(lsn, deadline)
        {
            return outcome_of(error);
        }
        let Some((level, count)) = commit.followers else { return Outcome::Committed };
        let reached = self.acknowledged.reached(level, count);
        let conditions = [Until { mark: &reached, at_least: lsn }, self.log.until_ended()];
        let wait = (!conditions[0].holds()).then(|| self.waits.begin());
        wait.iter().for_each(|wait| self.have_read(wait, &conditions, (level, count, lsn), deadline));
        match wait_any(&conditions, self.log.options().wait, deadline) {
            Waited::Reached(0) => Outcome::Committed,
            Waited::Reached(_) => outcome_of(self.log.end_reason()),
            Waited::TimedOut => Outcome::TimedOut,
        }
    }

    /// Ships up to `lsn` to as many followers as are waited for, where their shippers are idle. The others are left to
    /// their shippers.
    fn ship_at_once(&self, lsn: Lsn, count: usize) {
        let shippers = self.shippers.read();
        shippers.iter().filter(|shipper| shipper.ship_at_once(lsn)).take(count).for_each(drop);
    }

    /// Has what followers acknowledge read until one of `conditions` holds, by this thread where it can be: where
    /// nobody else waits, and for all followers that there are.
    fn have_read(
        &self,
        wait: &Wait<'_>,
        conditions: &[Until<'_>],
        (level, count, lsn): (AckLevel, usize, Lsn),
        deadline: Option<Instant>,
    ) {
        let is_over = |reader: &AckReader| reader.has(level, lsn) || conditions.iter().any(Until::holds);
        let readers = self.readers.read();
        if !wait.is_alone || readers.len() != count || !has_time(deadline) {
            readers.iter().for_each(|reader| reader.recall_if_lent());
            return;
        }
        drop(readers);
        let reader = |index: usize| self.readers.read().get(index).cloned();
        let mut index = 0;
        while let Some(reader) = reader(index) {
            if !reader.borrow(|| is_over(&reader), self.log.options().wait, deadline) {
                reader.ask(wait, level, lsn);
            }
            index += 1;
        }
    }

    /// A stream to a follower begins, and what it acknowledges is read.
    pub(crate) fn add_reader(&self, reader: &Arc<AckReader>) {
        self.readers.write().push(Arc::clone(reader));
    }

    /// It is over.
    pub(crate) fn remove_reader(&self, reader: &Arc<AckReader>) {
        self.readers.write().retain(|known| !Arc::ptr_eq(known, reader));
    }

    pub(crate) fn waits(&self) -> &Waits {
        &self.waits
    }

    /// A stream to a follower begins.
    pub(crate) fn add_shipper(&self, shipper: &Arc<Shipper>) {
        self.shippers.write().push(Arc::clone(shipper));
    }

    /// It is over.
    pub(crate) fn remove_shipper(&self, shipper: &Arc<Shipper>) {
        self.shippers.write().retain(|known| !Arc::ptr_eq(known, shipper));
    }

    pub(crate) fn durable_wanted(&self) -> &Watermark {
        &self.durable_wanted
    }

    pub(crate) fn applied_wanted(&self) -> &Watermark {
        &self.applied_wanted
    }

    /// What the followers have acknowledged.
    pub(crate) fn acknowledged(&self) -> &Acknowledged {
        &self.acknowledged
    }
}

/// What the followers of one shard have acknowledged, and what follows from that: the rule alone, without log and
/// streams.
#[derive(Default)]
pub(crate) struct Acknowledged {
    followers: RwLock<Vec<Arc<FollowerMarks>>>,
    /// For each (level, count) that somebody has asked for: up to where at least that many have acknowledged. Moved
    /// by the threads that read acknowledgements. Never moves back, not even when a follower goes.
    reached: RwLock<Vec<(AckLevel, usize, Arc<Watermark>)>>,
    /// One at a time computes what is reached, so that each computation sees all marks moved before it.
    computing: Mutex<()>,
}

impl Acknowledged {
    /// The marks of a follower for a stream that serves it, made with the first one.
    ///
    /// # Errors
    ///
    /// [`Error::ShutDown`] if the stream is over: its follower may be [forgotten](Self::forget). [`Error::Invalid`] if
    /// as many are known as can be.
    pub(crate) fn follower(&self, node: NodeId, stream_over: &ShutdownSignal) -> Result<Arc<FollowerMarks>> {
        let mut followers = self.followers.write();
        if stream_over.is_shutdown() {
            return Err(Error::ShutDown);
        }
        if let Some(known) = followers.iter().find(|known| known.node == node) {
            return Ok(Arc::clone(known));
        }
        if followers.len() >= MAX_FOLLOWERS {
            return Err(Error::invalid(format!(
                "{MAX_FOLLOWERS} followers are known already, and node {node} is not one"
            )));
        }
        let marks = Arc::new(FollowerMarks::new(node));
        followers.push(Arc::clone(&marks));
        Ok(marks)
    }

    /// A follower that is not waited for any longer, whose stream is over: it does not count for what comes. What was
    /// reached with it stays reached. What its stream still says while it ends is about marks that nobody looks at.
    pub(crate) fn forget(&self, node: NodeId) {
        let _one_at_a_time = self.computing.lock();
        self.followers.write().retain(|known| known.node != node);
    }

    /// A stream to a follower begins, which has what it said when it asked for it. During a rebuild that is nothing,
    /// and it does not count. What it had acknowledged on an earlier stream is void before it counts again, and what
    /// still arrives on one is: of the numbers of streams, newer ones are higher.
    pub(crate) fn stream_begins(
        &self,
        follower: &FollowerMarks,
        stream: u64,
        is_rebuild: bool,
        [received, durable, applied]: [Lsn; 3],
        now_ms: u64,
    ) {
        let received = if is_rebuild { Lsn::ZERO } else { received };
        let one_at_a_time = self.computing.lock();
        if stream < follower.stream.load(Ordering::Relaxed) {
            return;
        }
        follower.stream.store(stream, Ordering::Relaxed);
        follower.set_counts(false);
        follower.set_marks(received, durable.min(received), applied.min(received), now_ms);
        // What an earlier stream was handed, this one was not.
        follower.set_shipped(received);
        follower.set_counts(!is_rebuild);
        self.compute(&one_at_a_time);
    }

    /// A follower has completed its rebuild and counts from now on: with what it has acknowledged meanwhile, or up to
    /// `agreed` if that is more.
    pub(crate) fn rebuilt(&self, follower: &FollowerMarks, stream: u64, agreed: Lsn, now_ms: u64) {
        let one_at_a_time = self.computing.lock();
        if stream != follower.stream.load(Ordering::Relaxed) {
            return;
        }
        let at_least = |level| follower.at(level).max(agreed);
        let [received, durable, applied] = [AckLevel::Received, AckLevel::Durable, AckLevel::Applied].map(at_least);
        follower.set_marks(received, durable, applied, now_ms);
        follower.set_counts(true);
        self.compute(&one_at_a_time);
    }

    /// Takes in what a follower says of itself, and wakes those whose commit it completes. Returns whether it may have
    /// woken somebody.
    pub(crate) fn acknowledge(
        &self,
        follower: &FollowerMarks,
        stream: u64,
        [received, durable, applied]: [Lsn; 3],
        now_ms: u64,
    ) -> bool {
        let one_at_a_time = self.computing.lock();
        // The reader of an earlier stream may have been held up on its way here.
        if stream != follower.stream.load(Ordering::Relaxed) {
            return false;
        }
        follower.set_marks(received, durable, applied, now_ms);
        self.compute(&one_at_a_time)
    }

    /// Moves the marks to where the followers are. Returns whether one moved that somebody waits for.
    fn compute(&self, _one_at_a_time: &MutexGuard<'_, ()>) -> bool {
        let mut may_wake = false;
        for (level, count, mark) in self.reached.read().iter() {
            let is_waited_for = mark.has_waiters();
            may_wake |= mark.advance(self.count_th(*level, *count)) && is_waited_for;
        }
        may_wake
    }

    /// The mark for (level, count), made when it is first asked for.
    pub(crate) fn reached(&self, level: AckLevel, count: usize) -> Arc<Watermark> {
        let find = |marks: &[(AckLevel, usize, Arc<Watermark>)]| {
            marks.iter().find(|mark| (mark.0, mark.1) == (level, count)).map(|mark| Arc::clone(&mark.2))
        };
        if let Some(mark) = find(&self.reached.read()) {
            return mark;
        }
        let _one_at_a_time = self.computing.lock();
        let mut marks = self.reached.write();
        if let Some(mark) = find(&marks) {
            return mark;
        }
        let mark = Arc::new(Watermark::new(self.count_th(level, count)));
        marks.push((level, count, Arc::clone(&mark)));
        mark
    }

    /// Up to where at least `count` followers have acknowledged at `level`: the `count`-th highest mark.
    fn count_th(&self, level: AckLevel, count: usize) -> Lsn {
        let followers = self.followers.read();
        let mut marks = [Lsn::ZERO; MAX_FOLLOWERS];
        for (mark, follower) in marks.iter_mut().zip(followers.iter()) {
            *mark = if follower.counts() { follower.at(level) } else { Lsn::ZERO };
        }
        let Some(known) = marks.get_mut(..followers.len()).filter(|known| known.len() >= count) else {
            return Lsn::ZERO;
        };
        known.sort_unstable_by(|a, b| b.cmp(a));
        count.checked_sub(1).and_then(|index| known.get(index)).copied().unwrap_or(Lsn::ZERO)
    }
}

impl fmt::Debug for Commits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Commits")
            .field("policy", &self.policy)
            .field("committed", &self.committed())
            .finish_non_exhaustive()
    }
}

fn outcome_of(error: Error) -> Outcome {
    match error {
        Error::TimedOut { .. } => Outcome::TimedOut,
        Error::StaleEpoch { .. } => Outcome::Deposed,
        Error::ShutDown => Outcome::ShutDown,
        Error::NotRetained { .. } => Outcome::GivenUp,
        other => Outcome::Poisoned(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watermark::WaitStrategy;

    fn follower(acknowledged: &Acknowledged, node: u64) -> Arc<FollowerMarks> {
        acknowledged.follower(NodeId(node), &ShutdownSignal::new()).unwrap()
    }

    fn reached(acknowledged: &Acknowledged) -> Lsn {
        acknowledged.reached(AckLevel::Durable, 1).load()
    }

    #[test]
    fn the_count_th_highest_mark_is_reached_and_never_moves_back() {
        let acknowledged = Acknowledged::default();
        let [a, b] = [1, 2].map(|node| follower(&acknowledged, node));
        acknowledged.stream_begins(&a, 1, false, [Lsn::ZERO; 3], 0);
        acknowledged.stream_begins(&b, 2, false, [Lsn::ZERO; 3], 0);
        let two = acknowledged.reached(AckLevel::Durable, 2);
        acknowledged.acknowledge(&a, 1, [9, 7, 0].map(Lsn), 0);
        assert_eq!((reached(&acknowledged), two.load()), (Lsn(7), Lsn::ZERO), "one follower is not two");
        acknowledged.acknowledge(&b, 2, [5; 3].map(Lsn), 0);
        assert_eq!((reached(&acknowledged), two.load()), (Lsn(7), Lsn(5)));
        assert_eq!(acknowledged.reached(AckLevel::Received, 1).load(), Lsn(9));
        acknowledged.stream_begins(&a, 3, false, [2; 3].map(Lsn), 0);
        assert_eq!((reached(&acknowledged), two.load()), (Lsn(7), Lsn(5)));
    }

    #[test]
    fn a_forgotten_follower_counts_for_nothing_that_comes_and_leaves_its_place() {
        let acknowledged = Acknowledged::default();
        let [a, b] = [1, 2].map(|node| follower(&acknowledged, node));
        acknowledged.stream_begins(&a, 1, false, [5; 3].map(Lsn), 0);
        acknowledged.stream_begins(&b, 2, false, [9; 3].map(Lsn), 0);
        let two = acknowledged.reached(AckLevel::Durable, 2);
        assert_eq!(two.load(), Lsn(5));
        acknowledged.forget(NodeId(2));
        assert_eq!(two.load(), Lsn(5), "what was committed stays");
        assert_eq!(acknowledged.reached(AckLevel::Received, 2).load(), Lsn::ZERO, "of two, one exists");
        acknowledged.acknowledge(&a, 1, [7; 3].map(Lsn), 0);
        // The reader of its stream has not noticed yet.
        acknowledged.acknowledge(&b, 2, [12; 3].map(Lsn), 0);
        acknowledged.rebuilt(&b, 2, Lsn(12), 0);
        assert_eq!((two.load(), reached(&acknowledged)), (Lsn(5), Lsn(7)));
        let over = ShutdownSignal::new();
        over.shutdown();
        assert!(acknowledged.follower(NodeId(2), &over).unwrap_err().is_shutdown(), "nor does it bring it back");
        // As many as can be, again and again.
        for node in 10..10 + 2 * MAX_FOLLOWERS as u64 {
            follower(&acknowledged, node);
            acknowledged.forget(NodeId(node));
        }
        for node in 3..=MAX_FOLLOWERS as u64 + 1 {
            follower(&acknowledged, node);
        }
        assert!(acknowledged.follower(NodeId(2), &ShutdownSignal::new()).is_err(), "there is a most all the same");
    }

    #[test]
    fn it_is_told_when_somebody_may_have_been_woken() {
        let acknowledged = Acknowledged::default();
        let follower = follower(&acknowledged, 1);
        acknowledged.stream_begins(&follower, 1, false, [Lsn::ZERO; 3], 0);
        let mark = acknowledged.reached(AckLevel::Durable, 1);
        assert!(!acknowledged.acknowledge(&follower, 1, [5, 4, 3].map(Lsn), 0), "nobody waits");
        std::thread::scope(|scope| {
            scope.spawn(|| wait_any(&[mark.until(Lsn(6))], WaitStrategy::Park, None));
            while !mark.has_waiters() {
                std::thread::yield_now();
            }
            assert!(!acknowledged.acknowledge(&follower, 1, [9, 4, 3].map(Lsn), 0), "durable is where it was");
            assert!(!acknowledged.acknowledge(&follower, 2, [9; 3].map(Lsn), 0), "another stream");
            assert!(acknowledged.acknowledge(&follower, 1, [9, 6, 3].map(Lsn), 0));
        });
    }

    #[test]
    fn what_a_rebuild_acknowledges_counts_once_it_is_complete_and_not_on_the_next_stream() {
        let acknowledged = Acknowledged::default();
        let follower = follower(&acknowledged, 1);
        acknowledged.stream_begins(&follower, 1, true, [4; 3].map(Lsn), 0);
        acknowledged.acknowledge(&follower, 1, [9, 8, 8].map(Lsn), 0);
        assert_eq!(reached(&acknowledged), Lsn::ZERO);
        // It was given another disk, and all of the log is still there for it.
        acknowledged.stream_begins(&follower, 2, false, [1; 3].map(Lsn), 0);
        assert_eq!(reached(&acknowledged), Lsn(1));
        acknowledged.stream_begins(&follower, 3, true, [1; 3].map(Lsn), 0);
        acknowledged.acknowledge(&follower, 3, [12, 11, 10].map(Lsn), 0);
        acknowledged.rebuilt(&follower, 3, Lsn(10), 0);
        assert_eq!(reached(&acknowledged), Lsn(11));
    }

    #[test]
    fn what_was_shipped_is_of_the_present_stream() {
        let acknowledged = Acknowledged::default();
        let follower = follower(&acknowledged, 1);
        acknowledged.stream_begins(&follower, 1, false, [4; 3].map(Lsn), 0);
        assert_eq!(follower.shipped(), Lsn(4));
        follower.set_shipped(Lsn(12));
        acknowledged.acknowledge(&follower, 1, [9; 3].map(Lsn), 0);
        assert_eq!(follower.shipped(), Lsn(12));
        acknowledged.stream_begins(&follower, 2, false, [9; 3].map(Lsn), 0);
        assert_eq!(follower.shipped(), Lsn(9));
        acknowledged.stream_begins(&follower, 3, true, [9; 3].map(Lsn), 0);
        assert_eq!(follower.shipped(), Lsn::ZERO);
    }

    #[test]
    fn what_an_earlier_stream_still_says_changes_nothing() {
        let acknowledged = Acknowledged::default();
        let follower = follower(&acknowledged, 1);
        acknowledged.stream_begins(&follower, 1, false, [9, 0, 0].map(Lsn), 0);
        // It lost its disk, and comes back with nothing before the reader of its old stream has noticed.
        acknowledged.stream_begins(&follower, 2, false, [Lsn::ZERO; 3], 0);
        acknowledged.acknowledge(&follower, 1, [9; 3].map(Lsn), 0);
        acknowledged.rebuilt(&follower, 1, Lsn(9), 0);
        acknowledged.stream_begins(&follower, 1, false, [9; 3].map(Lsn), 0);
        assert_eq!((follower.at(AckLevel::Durable), reached(&acknowledged)), (Lsn::ZERO, Lsn::ZERO));
        acknowledged.acknowledge(&follower, 2, [5, 4, 3].map(Lsn), 0);
        assert_eq!(reached(&acknowledged), Lsn(4));
    }
}
