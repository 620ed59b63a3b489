//! What a follower acknowledges, read from its stream: by the stream's own thread, or by the thread that waits for it.
//!
//! A thread that waits for a commit would sleep until it is woken by one that what arrived has woken: two switches of
//! threads, where whoever talks to the follower by itself has one. So, as who waits for a sync does it, and who waits
//! for a commit ships, who waits for an acknowledgement reads it, if it is the only one that waits.
//!
//! # Lending
//!
//! Whoever holds the lane reads. That is the stream's thread, mostly. When it is about to take in what somebody asked
//! for who waits alone, it *lends* the lane: it lets go of it, and sleeps. Who waits alone next borrows the lane: takes
//! it, reads until it has what it waits for, and lets go of it, for the next time. The stream's thread takes the lane
//! back when nobody has used it for a while, or when it is *recalled*: by whoever waits, finds it lent and cannot
//! borrow it, not being alone, say; and by a borrower that meets anything but an acknowledgement, one of more than the
//! log's mark says yet, or nothing for a while. What else a follower says, and how a stream ends, is the business of
//! the stream's thread.
//!
//! # Nobody waits while nobody reads
//!
//! Who waits counts itself (W1), and then looks whether the lane is lent (W2): if it is, it borrows it or recalls it.
//! The stream's thread says that it lends (L1), and then looks whether any wait has begun since the one that asked,
//! which was alone (L2): if so, it does not lend. W1, W2, L1 and L2 are in one order, so either W2 finds the lane lent,
//! or L2 finds the wait. While that thread takes the lane back, it says first that it is not lent: who finds that need
//! do nothing, for the thread is about to read. If all that were wrong, the lane would be back after
//! [a moment](LENT_FOR).
//!
//! What borrowers read moves marks, and no more: the stream's thread tells the shard's host of it when it next wakes
//! up. What the host does with it may call what users gave the node, and a thread that waits for a commit may hold
//! locks which that wants.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::caught::caught;
use crate::commit::{AckLevel, Commits, FollowerMarks};
use crate::divergence::HistoryCheck;
use crate::error::{Error, Result};
use crate::shutdown::ShutdownSignal;
use crate::transport::FrameReceiver;
use crate::types::{Epoch, Lsn, SessionId};
use crate::wal::{Log, unix_ms};
use crate::watermark::{WaitStrategy, Waited, Watermark, wait_any};
use crate::wire::{Ack, FrameHeader, FrameKind, Message};

/// A lane that nobody has used for so long is taken back, and what was read on it is told to the shard's host.
pub(crate) const LENT_FOR: Duration = Duration::from_millis(5);
/// Whoever has borrowed the lane and receives nothing for so long gives it back: what else it waits for, the end of the
/// log say, it does not notice in between. Systems count such times in ticks of some milliseconds.
const LONGEST_READ: Duration = Duration::from_millis(10);
/// Who has less time than this does not borrow.
const LEAST_TIME: Duration = Duration::from_millis(40);
/// A look at the stream takes as long as so many looks at a mark.
const LOOKS_AT_MARKS: u32 = 32;
/// Elsewhere a time-out of a socket comes half a second late.
const LENDS: bool = cfg!(unix);

/// Threads that wait for followers of a shard.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    /// How many of them have not ended, and in units of [`BEGUN`] how many have begun. In one, so that whoever begins
    /// after one that is alone has a higher number.
    counts: AtomicU64,
}

/// One wait that has begun. Above this the count starts again at zero some day, which compares as well.
const BEGUN: u64 = 1 << 20;

/// One of them, until it is dropped.
pub(crate) struct Wait<'a> {
    waits: &'a Waits,
    /// Its number.
    number: u64,
    /// Whether nobody else waited when it began.
    pub(crate) is_alone: bool,
}

impl Waits {
    /// Another wait begins.
    pub(crate) fn begin(&self) -> Wait<'_> {
        // W1.
        let counts = self.counts.fetch_add(BEGUN + 1, Ordering::SeqCst).wrapping_add(BEGUN + 1);
        fence(Ordering::SeqCst);
        Wait { waits: self, number: counts / BEGUN, is_alone: counts % BEGUN == 1 }
    }

    fn begun(&self) -> u64 {
        fence(Ordering::SeqCst);
        self.counts.load(Ordering::SeqCst) / BEGUN
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.waits.counts.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What somebody waits for who would read it.
#[derive(Clone, Copy, Debug)]
struct Asked {
    /// The number of the wait, the newest when it asked.
    wait: u64,
    level: AckLevel,
    lsn: Lsn,
}

/// A stream on which a follower acknowledges.
pub(crate) struct AckStream {
    pub(crate) peer: String,
    pub(crate) session: SessionId,
    pub(crate) epoch: Epoch,
    /// The stream's number.
    pub(crate) number: u64,
    pub(crate) follower: Arc<FollowerMarks>,
    pub(crate) log: Arc<Log>,
    pub(crate) commits: Arc<Commits>,
    pub(crate) history: Arc<HistoryCheck>,
    /// It is over.
    pub(crate) over: ShutdownSignal,
    /// A newer stream of the same follower takes over.
    pub(crate) superseded: ShutdownSignal,
    /// How long an acknowledgement may be ahead of the log's mark.
    pub(crate) patience: Duration,
    /// A follower of whom nothing is heard for so long is gone.
    pub(crate) timeout: Duration,
    /// [`LENT_FOR`], but in tests.
    pub(crate) lent_for: Duration,
}

/// A lane that is lent: where the mark of its recalls stood.
#[must_use = "a lane that is lent and not left is read by nobody else"]
pub(crate) struct Lent {
    recalled: Lsn,
}

/// Reads what one follower acknowledges on one stream.
pub(crate) struct AckReader {
    of: AckStream,
    /// Held by whoever reads.
    lane: Mutex<Lane>,
    /// The lane is there for who waits alone. Written by the stream's thread.
    is_lent: AtomicBool,
    /// A borrower has read since the stream's thread looked last. A hint.
    is_used: AtomicBool,
    /// Moves on whenever the stream's thread is to take the lane back.
    recalled: Watermark,
    /// Who waits alone, and for what. Written by who waits, taken by the stream's thread.
    asked: Mutex<Option<Asked>>,
    /// The newest of what borrowers have read and the shard's host has not been told.
    untold: Mutex<Option<Ack>>,
}

/// The receiving half of a stream. Gone once the stream's thread has left.
#[derive(Default)]
pub(crate) struct Lane {
    receiver: Option<Box<dyn FrameReceiver>>,
    /// The header of a frame that a borrower met and that is no acknowledgement.
    unread: Option<FrameHeader>,
    /// An acknowledgement that a borrower has read, of more than the log's mark says yet.
    pub(crate) early: Option<Ack>,
    /// What ended a borrower's reading.
    failure: Option<Error>,
}

impl Lane {
    /// The receiving half.
    ///
    /// # Errors
    ///
    /// What ended a borrower's reading; [`Error::ShutDown`] once the stream's thread has left.
    pub(crate) fn receiver(&mut self) -> Result<&mut (dyn FrameReceiver + 'static)> {
        match self.failure.take() {
            Some(error) => Err(error),
            None => self.receiver.as_deref_mut().ok_or(Error::ShutDown),
        }
    }

    /// The header of the next frame whose body has not been received.
    pub(crate) fn header(&mut self) -> Result<FrameHeader> {
        if let Some(unread) = self.unread.take() {
            return Ok(unread);
        }
        let receiver = self.receiver()?;
        receiver.current().map_or_else(|| receiver.receive_header(), Ok)
    }

    /// The next acknowledgement. `None` if nothing came in time, or something else.
    fn acknowledgement(&mut self) -> Result<Option<Ack>> {
        if self.early.is_some() {
            return Ok(self.early.take());
        }
        let header = match self.header() {
            Err(error) if error.is_timeout() => return Ok(None),
            header => header?,
        };
        if header.kind != FrameKind::Ack {
            self.unread = Some(header);
            return Ok(None);
        }
        match self.receiver()?.receive_message_body(header) {
            Err(error) if error.is_timeout() => Ok(None),
            Ok(Message::Ack(ack)) => Ok(Some(ack)),
            other => other.and_then(|other| Err(crate::receiver::refusal("a follower", other))),
        }
    }
}

impl AckReader {
    pub(crate) fn new(of: AckStream, receiver: Box<dyn FrameReceiver>) -> AckReader {
        AckReader {
            of,
            lane: Mutex::new(Lane { receiver: Some(receiver), ..Lane::default() }),
            is_lent: AtomicBool::new(false),
            is_used: AtomicBool::new(false),
            recalled: Watermark::default(),
            asked: Mutex::new(None),
            untold: Mutex::new(None),
        }
    }

    pub(crate) fn follower(&self) -> &FollowerMarks {
        &self.of.follower
    }

    /// For the stream's thread: the lane, before anybody can borrow it.
    pub(crate) fn lane(&self) -> MutexGuard<'_, Lane> {
        self.lane.lock()
    }

    /// For the stream's thread, which holds the lane and is about to take in `ack`: lends the lane if that is what
    /// somebody waits for who waits alone. Then it is to be [left](Self::leave) there.
    pub(crate) fn lends_after(&self, lane: &mut Lane, ack: &Ack) -> Option<Lent> {
        let is_there = |asked: &mut Asked| at(ack, asked.level) >= asked.lsn;
        let asked = self.asked.lock().take_if(is_there).filter(|_| self.lends())?;
        let lent = Lent { recalled: self.recalled.load() };
        // L1.
        self.is_lent.store(true, Ordering::SeqCst);
        // L2. Before anybody is woken by this acknowledgement, who then waits for the next.
        let is_alone = self.of.commits.waits().begun() == asked.wait;
        // Some systems take no time-out for a stream that the peer has ended, of which there may be more to read.
        let timeout = LONGEST_READ.min(self.of.timeout);
        let is_to_borrow = |receiver: &mut Box<dyn FrameReceiver>| receiver.set_timeout(Some(timeout)).is_ok();
        if is_alone && lane.receiver.as_mut().is_some_and(is_to_borrow) {
            return Some(lent);
        }
        self.lend_no_more();
        None
    }

    /// During a rebuild what is waited for comes with other words than acknowledgements.
    fn lends(&self) -> bool {
        LENDS && self.of.follower.counts()
    }

    /// For the stream's thread, which has taken in `ack`: leaves the lane to borrowers until nobody has used it for a
    /// while, or it is recalled, or the stream is over. `tell` tells the shard's host of that one, and of what they
    /// have read.
    pub(crate) fn leave<'a>(
        &'a self,
        lane: MutexGuard<'a, Lane>,
        lent: &Lent,
        ack: Ack,
        mut tell: impl FnMut(Ack),
    ) -> MutexGuard<'a, Lane> {
        drop(lane);
        // As where nothing is lent, and here who was woken reads next.
        std::thread::yield_now();
        tell(ack);
        let ends = [self.recalled.until(lent.recalled.next()), self.of.over.until()];
        loop {
            let waited = wait_any(&ends, WaitStrategy::Park, Instant::now().checked_add(self.of.lent_for));
            self.tell_untold(&mut tell);
            if waited != Waited::TimedOut || !self.is_used.swap(false, Ordering::Relaxed) {
                break;
            }
        }
        // Nobody borrows it from now on, and who has does not keep it.
        self.lend_no_more();
        let mut lane = self.lane.lock();
        self.tell_untold(&mut tell);
        // Whatever ended a borrower's reading is met by whoever reads next, and so is what is left to be read of a
        // stream that takes no time-out any more.
        if let Some(receiver) = &mut lane.receiver
            && let Err(error) = receiver.set_timeout(Some(self.of.timeout))
        {
            log::debug!("{error}");
        }
        lane
    }

    /// For the stream's thread, before it lets go of a lane that it has lent and that nobody is to read any more.
    pub(crate) fn lend_no_more(&self) {
        self.is_lent.store(false, Ordering::SeqCst);
    }

    /// Tells of what borrowers have read, if anything.
    fn tell_untold(&self, mut tell: impl FnMut(Ack)) {
        // Not under the lock, which borrowers take, for whom what is called may wait.
        let untold = self.untold.lock().take();
        untold.into_iter().for_each(&mut tell);
    }

    /// For the stream's thread, which has let go of the lane and leaves: nobody borrows it any more.
    pub(crate) fn close(&self) -> Option<Box<dyn FrameReceiver>> {
        self.lend_no_more();
        self.lane.lock().receiver.take()
    }

    /// Whether the follower has acknowledged that much.
    pub(crate) fn has(&self, level: AckLevel, lsn: Lsn) -> bool {
        self.of.follower.at(level) >= lsn
    }

    /// For who waits: what for, if it would read it. The stream's thread may lend the lane then.
    pub(crate) fn ask(&self, wait: &Wait<'_>, level: AckLevel, lsn: Lsn) {
        *self.asked.lock() = Some(Asked { wait: wait.number, level, lsn });
    }

    /// For who waits and reads nothing by itself.
    pub(crate) fn recall_if_lent(&self) {
        // W2.
        if self.is_lent.load(Ordering::SeqCst) {
            self.recall();
        }
    }

    fn recall(&self) {
        self.recalled.advance(self.recalled.load().next());
    }

    /// For who waits alone: reads, if the lane is lent, until `is_over`, and returns whether it is. If it is not, the
    /// stream's thread reads.
    pub(crate) fn borrow(&self, is_over: impl Fn() -> bool, strategy: WaitStrategy, deadline: Option<Instant>) -> bool {
        // W2.
        if !self.is_lent.load(Ordering::SeqCst) {
            return false;
        }
        let goes_on = || !is_over() && has_time(deadline);
        if let Some(mut lane) = self.lane.try_lock()
            && self.is_lent.load(Ordering::SeqCst)
        {
            while goes_on() {
                self.is_used.store(true, Ordering::Relaxed);
                if !self.read(&mut lane, goes_on, strategy) {
                    break;
                }
            }
        }
        let is_over = is_over();
        if !is_over {
            self.recall();
        }
        is_over
    }

    /// For a borrower: reads one acknowledgement. `false` if there is none for it.
    fn read(&self, lane: &mut Lane, goes_on: impl Fn() -> bool, strategy: WaitStrategy) -> bool {
        let whose = format_args!("the transport to {}", self.of.peer);
        let read = caught(whose, || if lane.look(goes_on, strategy)? { lane.acknowledgement() } else { Ok(None) });
        if let Ok(Some(ack)) = &read
            && ack.received > self.of.log.written().load()
        {
            // Not waited for by who has a deadline, and may be the one to append it.
            lane.early = Some(*ack);
            return false;
        }
        let taken_in = read.and_then(|ack| ack.map(|ack| self.take_in(&ack).map(|_| ack)).transpose());
        match taken_in {
            Ok(Some(ack)) => *self.untold.lock() = Some(ack),
            Ok(None) => return false,
            Err(error) => {
                lane.failure = Some(error);
                return false;
            }
        }
        true
    }

    /// For whoever has read `ack`, and holds the lane: moves the marks. Returns whether somebody may have been woken.
    ///
    /// # Errors
    ///
    /// What ends the stream.
    pub(crate) fn take_in(&self, ack: &Ack) -> Result<bool> {
        let AckStream { log, follower, over, .. } = &self.of;
        if self.of.superseded.is_shutdown() {
            // What the follower has now, its newer stream tells.
            return Ok(false);
        }
        let refuse = |text| Err(Error::protocol(&self.of.peer, text));
        if (ack.session, ack.epoch) != (self.of.session, self.of.epoch) {
            return refuse(format!(
                "it acknowledges session {} of epoch {}, which this is not",
                ack.session, ack.epoch
            ));
        }
        // Bytes are published just before the mark says so: an acknowledgement can be here first.
        let written = [log.written().until(ack.received), over.until()];
        let deadline = Instant::now().checked_add(self.of.patience);
        let is_written = wait_any(&written, log.options().wait, deadline) == Waited::Reached(0);
        if !is_written || ack.durable > ack.received || ack.applied > ack.received {
            return refuse(format!(
                "it acknowledges received {}, durable {}, applied {} of a log that ends at {}",
                ack.received,
                ack.durable,
                ack.applied,
                log.head()
            ));
        }
        self.of.history.compare((follower.node(), &self.of.peer, log.shard()), ack.received, ack.chain)?;
        let marks = [ack.received, ack.durable, ack.applied];
        Ok(self.of.commits.acknowledged().acknowledge(follower, self.of.number, marks, unix_ms()))
    }
}

impl Lane {
    /// Where borrowers spin: waits until there is something to receive, for no longer than they spin. `false` if there
    /// is nothing and they do not go on.
    fn look(&mut self, goes_on: impl Fn() -> bool, strategy: WaitStrategy) -> Result<bool> {
        let mut looks = match strategy {
            WaitStrategy::Park => return Ok(true),
            _ if self.early.is_some() => return Ok(true),
            WaitStrategy::SpinThenPark { spins } => spins.div_ceil(LOOKS_AT_MARKS),
            WaitStrategy::Spin => u32::MAX,
        };
        let receiver = self.receiver()?;
        // The end of the stream is nothing that can be seen here.
        let until = Instant::now() + LONGEST_READ;
        while looks > 0 && !receiver.has_buffered() && Instant::now() < until {
            if !goes_on() {
                return Ok(false);
            }
            looks -= 1;
            // Others may be spinning too, on no more processors than there are.
            std::thread::yield_now();
        }
        Ok(true)
    }
}

/// Whether somebody with that deadline has the time to borrow.
pub(crate) fn has_time(deadline: Option<Instant>) -> bool {
    deadline.is_none_or(|deadline| deadline.duration_since(Instant::now()) >= LEAST_TIME)
}

/// What `ack` says at a level.
fn at(ack: &Ack, level: AckLevel) -> Lsn {
    match level {
        AckLevel::Received => ack.received,
        AckLevel::Durable => ack.durable,
        AckLevel::Applied => ack.applied,
    }
}

#[cfg(test)]
mod tests;
