//! Log to stream: one shipper for each follower and shard, on a thread of its own.
//!
//! A shipper is a position in the log and a stream. It sends what is published behind its position, straight from the
//! mapping, and parks on the log's `written` mark when it has caught up. It knows nothing of other followers and waits
//! for none of them: a slow follower is a position that lags. A stream that fails ends the shipper; the next stream of
//! the same follower begins where the follower then is, so nothing is lost.
//!
//! Who waits for a commit need not wait for this thread to wake up: if the shipper is idle and its follower has
//! everything shipped before, the waiting thread ships the little that is new by itself ([`Shipper::ship_at_once`]).
//! What makes up the position and the stream is therefore behind a lock, which the shipper's thread holds while it
//! works and not while it is parked. Others only try it, and send only what the stream takes at once, so a slow
//! follower holds up nobody.
//!
//! During a rebuild the stream carries two lanes. The log has priority: before each run of the base what is published
//! is sent, up to a bound. So the log need not be held back for the length of the copy, and the follower's applier is
//! never far behind.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::commit::{AckLevel, Commits, FollowerMarks};
use crate::divergence::HistoryCheck;
use crate::error::{Error, RefusalCode, Result};
use crate::limits::{BASE_RUN_LEN, MAX_WAL_DATA_LEN};
use crate::protocol::FailureReason;
use crate::rebuild::base_lane::{BaseLane, IssuedRebuild};
use crate::rebuild::intake::while_beating;
use crate::shutdown::ShutdownSignal;
use crate::transport::{Body, FrameSender, SentAtOnce};
use crate::types::{Chain, Epoch, Lsn};
use crate::wal::{Log, LogReader, unix_ms};
use crate::watermark::{WaitStrategy, Waited, WaiterName, wait_any, wait_any_as};
use crate::wire::{
    CaughtUp, ErrorMessage, FLAG_ACK_APPLIED, FLAG_ACK_DURABLE, FrameKind, Heartbeat, Message, SessionAction, Sync,
    WalDataHeader,
};

/// Ships one shard's log over one stream.
pub(crate) struct Shipper {
    pub(crate) log: Arc<Log>,
    pub(crate) commits: Arc<Commits>,
    /// Whose stream it is; none for a reader that does not count as a follower.
    pub(crate) follower: Option<Arc<FollowerMarks>>,
    pub(crate) epoch: Epoch,
    /// After this long without sending anything, a heartbeat goes out.
    pub(crate) heartbeat: Duration,
    /// The stream is over: shipping stops at once.
    pub(crate) stream_over: ShutdownSignal,
    /// A newer stream of the same follower takes over: it is told, and shipping stops.
    pub(crate) superseded: ShutdownSignal,
    /// The node is stopping: what is pending is shipped, then shipping stops.
    pub(crate) draining: ShutdownSignal,
    /// The head when the stream began: reaching it is reported once.
    pub(crate) target: Lsn,
    /// How the follower's history compares; none for a reader, which says nothing of its log.
    pub(crate) history: Option<Arc<HistoryCheck>>,
    /// By what name its thread waits.
    pub(crate) name: WaiterName,
    /// Locked by the shipper's thread while it works, and tried by threads that wait for a commit.
    pub(crate) lane: Mutex<LogLane>,
}

/// Log bytes after which a run of the base is sent although more log has come: as many as a run has, so that behind a
/// writer that never rests either lane has half of the stream.
const LOG_BEFORE_BASE: u64 = BASE_RUN_LEN as u64;
/// The same where the base [goes first](Shares).
const LOG_BEHIND_BASE: u64 = LOG_BEFORE_BASE / 4;
/// Bytes sent between two looks at which of them it is.
const LOOK_EVERY: u64 = 64 << 20;
/// Log bytes that a thread ships at most before it waits for a commit. More is the shipper's own work: it takes long
/// enough for a wake-up not to matter.
const AT_ONCE: u64 = 64 * 1024;

/// Times that a woken shipper gives way at most.
const MOST_GIVEN_WAY: u32 = 8;

/// The stream, and how far a shipper has come with it.
pub(crate) struct LogLane {
    reader: LogReader,
    sender: Box<dyn FrameSender>,
    shipped: Lsn,
    /// The newest LSN for which the follower has been asked to hurry, by level.
    durable_asked: Lsn,
    applied_asked: Lsn,
    /// Flags of the newest data.
    flags: u8,
    last_sent: Instant,
    /// When the follower was told last how far the log is, and what is committed.
    last_beat: Instant,
    caught_up: bool,
}

impl LogLane {
    /// From the reader's position on.
    pub(crate) fn new(reader: LogReader, sender: Box<dyn FrameSender>) -> Mutex<LogLane> {
        Mutex::new(LogLane {
            reader,
            sender,
            shipped: Lsn::ZERO,
            durable_asked: Lsn::ZERO,
            applied_asked: Lsn::ZERO,
            flags: 0,
            last_sent: Instant::now(),
            last_beat: Instant::now(),
            caught_up: false,
        })
    }
}

/// How a base and the log beside it share a stream.
///
/// Of a log that grows by *L* while the stream carries *C*, a base of *R* bytes that has the part *s* of the stream
/// leaves *R* (1 + (*L* / *C* - 1) / *s*) behind, to be kept until it has been sent. Where the stream carries more than
/// is appended, that is less the more of it the log has. Where more is appended than all of the stream carries, it is
/// less the sooner the base is over: then the base goes first.
#[derive(Debug, Default)]
struct Shares {
    /// Bytes of either sent since the last look.
    base_bytes: u64,
    log_bytes: u64,
    /// Bytes of log that had not been sent then.
    backlog: u64,
    is_base_first: bool,
}

impl Shares {
    /// Log bytes to be sent before the next run of the base.
    fn log_budget(&self) -> u64 {
        if self.is_base_first { LOG_BEHIND_BASE } else { LOG_BEFORE_BASE }
    }

    /// So many bytes more of log have been sent, and a run of the base; `backlog` tells what is left of the log.
    fn has_sent(&mut self, log_bytes: u64, backlog: impl FnOnce() -> u64) {
        self.log_bytes += log_bytes;
        self.base_bytes += u64::from(BASE_RUN_LEN);
        let sent = self.log_bytes + self.base_bytes;
        if sent >= LOOK_EVERY {
            let backlog = backlog();
            let appended = (backlog + self.log_bytes).saturating_sub(self.backlog);
            *self = Shares { backlog, is_base_first: appended > sent, ..Shares::default() };
        }
    }
}

/// How a range of the log goes out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// However long it takes.
    Blocking,
    /// As far as the stream takes it without waiting.
    AtOnce,
}

impl Shipper {
    /// Ships until the stream is over, it fails, or the node stops and everything pending is sent. Begins with the
    /// rebuild, if there is one: the reader's position is set once it is known where the log lane begins.
    ///
    /// # Errors
    ///
    /// What ended the stream. [`Error::NotRetained`] if retention has overtaken it.
    pub(crate) fn run(&self, rebuild: Option<IssuedRebuild>) -> Result<()> {
        let log = &self.log;
        let mut base = match rebuild {
            None => None,
            Some(rebuild) => match self.start_rebuild(rebuild, &mut self.lane.lock())? {
                None => return Ok(()),
                started => started,
            },
        };
        let mut shares = Shares::default();
        loop {
            let mut lane = self.lane.lock();
            lane.sender.flush()?;
            // Priority is not everything: behind a writer that never rests, the base would never be sent.
            let budget = if base.is_some() { shares.log_budget() } else { u64::MAX };
            // A follower that is still making room for the rebuild reads nothing, however long that takes.
            let is_awaited = base.as_ref().is_some_and(|base| !base.until_begun().holds());
            let mut log_bytes = 0;
            if !is_awaited {
                log_bytes = self.ship_published(&mut lane, budget, Pace::Blocking)?;
                self.ask_for_haste(&mut lane)?;
            }
            if self.stream_over.is_shutdown() {
                return Ok(());
            }
            if self.tell_refusal(&mut lane) {
                return lane.sender.finish();
            }
            if self.superseded.is_shutdown() {
                return Self::say_superseded(&mut lane);
            }
            let draining = self.draining.is_shutdown();
            if draining && is_awaited {
                // Of a rebuild that nobody has taken on yet, nothing is pending, and what the follower says meanwhile
                // is that it lives.
                lane.sender.finish()?;
                self.stream_over.shutdown();
                return Ok(());
            }
            // A closed log grows no more: another has taken its place on this node. Nor does a deposed leader's.
            if (draining && log.written().load() <= lane.shipped) || log.is_closed() || log.is_deposed() {
                return lane.sender.finish();
            }
            if self.ship_base(&mut base, &mut lane)? {
                shares.has_sent(log_bytes, || lane.reader.backlog());
                continue;
            }
            let (shipped, durable_asked, applied_asked) = (lane.shipped, lane.durable_asked, lane.applied_asked);
            let deadline = lane.last_beat.checked_add(self.heartbeat);
            drop(lane);
            // After a failure the log has ended, and what is in it is shipped all the same.
            let ended = if log.poison().is_none() { log.until_ended() } else { self.stream_over.until() };
            let unless_awaited = |until| if is_awaited { self.stream_over.until() } else { until };
            let conditions = [
                unless_awaited(log.written().until(shipped.next())),
                unless_awaited(self.commits.durable_wanted().until(durable_asked.next())),
                unless_awaited(self.commits.applied_wanted().until(applied_asked.next())),
                self.stream_over.until(),
                self.draining.until(),
                base.as_ref().map_or(self.stream_over.until(), BaseLane::until_more),
                self.history.as_ref().map_or(self.stream_over.until(), |history| history.until_refused()),
                self.superseded.until(),
                ended,
            ];
            let waited = wait_any_as(self.name, &conditions, log.options().wait, deadline);
            if waited == Waited::Reached(0) {
                self.give_way();
            }
            if waited == Waited::TimedOut {
                let mut lane = self.lane.lock();
                lane.sender.flush()?;
                self.beat(&mut lane)?;
            }
        }
    }

    /// Lets whoever appends go on first where more threads are ready than there are processors, again and again as long
    /// as that brings more to ship: one frame then takes what several would have, each with its wake-ups on both sides.
    /// On a processor that nobody else wants this returns at once; who waits for a commit has shipped by itself.
    fn give_way(&self) {
        let mut written = self.log.written().load();
        for _ in 0..MOST_GIVEN_WAY {
            std::thread::yield_now();
            let now = self.log.written().load();
            if now == written {
                return;
            }
            written = now;
        }
    }

    /// Ships up to `lsn` on the calling thread, if that takes no waiting: the shipper is idle, its follower has
    /// received everything shipped before, and the stream takes what is new at once. Returns whether it did; then the
    /// shipper's thread sleeps on. If not, that thread does it: whoever calls this wakes those who wait for the log to
    /// grow afterwards, or has done so before.
    pub(crate) fn ship_at_once(&self, lsn: Lsn) -> bool {
        let Some(follower) = self.follower.as_ref().filter(|follower| follower.counts()) else { return false };
        let Some(mut lane) = self.lane.try_lock() else { return false };
        let idle = lane.caught_up && follower.at(AckLevel::Received) >= lane.shipped;
        // Who leaves says so with the stream's last frame.
        let leaves = self.draining.is_shutdown() || self.superseded.is_shutdown() || self.stream_over.is_shutdown();
        if !idle || leaves || self.is_refused() {
            return false;
        }
        if let Err(error) = self.ship_published(&mut lane, AT_ONCE, Pace::AtOnce) {
            log::warn!("node {}, shard {}: shipping ended: {error}", follower.node(), self.log.shard());
            self.stream_over.shutdown();
        }
        let shipped = lane.shipped >= lsn;
        if shipped {
            self.log.written().postpone(self.name, lane.shipped.next());
            self.commits.durable_wanted().postpone(self.name, lane.durable_asked.next());
            self.commits.applied_wanted().postpone(self.name, lane.applied_asked.next());
        }
        shipped
    }

    /// Waits for a place, opens the base, and tells the follower what is to come. `None` if the stream or the node ends
    /// first.
    #[inline(never)]
    fn start_rebuild(&self, rebuild: IssuedRebuild, lane: &mut LogLane) -> Result<Option<BaseLane>> {
        let place = rebuild.places.ask();
        if !place.is_granted() {
            log::info!("shard {}: the rebuild of session {} waits for its turn", rebuild.shard, rebuild.session);
            lane.sender.send_message(&Message::SessionControl(rebuild.control(SessionAction::Wait)))?;
        }
        while !place.is_granted() {
            let ends = [self.stream_over.until(), self.draining.until(), self.superseded.until()];
            let conditions = [place.until_granted(), ends[0], ends[1], ends[2]];
            let deadline = lane.last_sent.checked_add(self.heartbeat);
            match wait_any(&conditions, WaitStrategy::Park, deadline) {
                Waited::Reached(0) => {}
                Waited::Reached(3) => return Self::say_superseded(lane).map(|()| None),
                Waited::Reached(_) => return lane.sender.finish().map(|()| None),
                Waited::TimedOut => self.beat(lane)?,
            }
        }
        let shard = rebuild.shard;
        let (host, stream, session) = (Arc::clone(&rebuild.host), rebuild.stream, rebuild.session.0);
        let goes_on = rebuild.log_goes_on;
        // A target that makes its boundary durable first may take long over it.
        let opened = while_beating(lane.sender.as_mut(), self.heartbeat, self.epoch, &self.stream_over, || {
            let (held, open) = host.pin_rebuild(stream, session, goes_on.map(|place| place.lsn.next()))?;
            Ok((held, rebuild.open(place, open)?))
        });
        let opened = opened.and_then(|(held, base)| {
            let start = match goes_on.filter(|place| held == place.lsn.next()) {
                // The reader stands there.
                Some(_) => held,
                None => {
                    // The follower's log begins anew, wherever it stood.
                    self.history.iter().for_each(|history| history.begin_anew());
                    self.place_log(base.info().base_lsn, lane)?
                }
            };
            host.rebuild_starts(stream, session, start)?;
            Ok((base, start))
        });
        let (base, log_start) = opened.inspect_err(|error| {
            refuse_base(error, lane.sender.as_mut());
            host.rebuild_failed(stream, session, FailureReason::BaseUnavailable);
        })?;
        let info = base.info();
        log::info!(
            "shard {shard}: sending a base at LSN {} of {} blocks of {} bytes, and the log from LSN {log_start} on",
            info.base_lsn,
            info.block_count,
            info.block_len
        );
        lane.last_sent = Instant::now();
        lane.sender.send_message(&Message::SessionControl(base.start(log_start)))?;
        Ok(Some(base))
    }

    /// Sets the reader to the beginning of the log that a base at `base_lsn` needs, a segment's first LSN.
    fn place_log(&self, base_lsn: Lsn, lane: &mut LogLane) -> Result<Lsn> {
        let place = self.log.segment_start_for(base_lsn.next())?;
        lane.reader = self.log.reader_at_known(place);
        Ok(place.segment)
    }

    /// Sends the next run of the base, or the acceptance of what the follower made of it. Returns whether it sent
    /// anything.
    #[inline(never)]
    fn ship_base(&self, base: &mut Option<BaseLane>, lane: &mut LogLane) -> Result<bool> {
        let Some(open) = base else { return Ok(false) };
        if open.is_accepted() {
            lane.sender.send_message(&Message::SessionControl(open.accept()))?;
            *base = None;
        } else {
            let sent = open.send_next(lane.sender.as_mut());
            if !sent.inspect_err(|error| refuse_base(error, lane.sender.as_mut()))? {
                return Ok(false);
            }
        }
        lane.last_sent = Instant::now();
        Ok(true)
    }

    /// Sends everything published behind the position, or somewhat more than so many bytes of it. Returns how many.
    fn ship_published(&self, lane: &mut LogLane, budget: u64, pace: Pace) -> Result<u64> {
        let mut sent = 0;
        while sent < budget {
            // Read before the bytes: all records up to it are among what is published then.
            let written = self.log.written().load();
            let most = u64::from(MAX_WAL_DATA_LEN).min(budget - sent);
            let next = lane.reader.next_cut_anywhere(most);
            if pace == Pace::AtOnce && next.is_err() {
                // The shipper's thread meets it too, and has the time to tell the follower.
                return Ok(sent);
            }
            let Some(range) = next.inspect_err(|error| refuse_damaged(lane.sender.as_mut(), error))? else {
                lane.shipped = lane.shipped.max(written);
                // Asked for everything shipped, now that the last frame of it said so.
                if lane.flags & FLAG_ACK_DURABLE != 0 {
                    lane.durable_asked = lane.durable_asked.max(lane.shipped);
                }
                if lane.flags & FLAG_ACK_APPLIED != 0 {
                    lane.applied_asked = lane.applied_asked.max(lane.shipped);
                }
                if let Some(follower) = &self.follower {
                    follower.set_shipped(lane.shipped);
                }
                return self.report_caught_up(lane).map(|()| sent);
            };
            let header = WalDataHeader { segment: range.segment().id().first_lsn, offset: range.start() };
            lane.flags = self.haste(lane);
            let (prefix, body) = (header.to_bytes(), Body::Log(&range));
            if pace == Pace::Blocking {
                lane.sender.send(FrameKind::WalData, lane.flags, &prefix, body)?;
            } else {
                match lane.sender.send_at_once(FrameKind::WalData, lane.flags, &prefix, body)? {
                    SentAtOnce::Whole => {}
                    // Not shipped yet: the shipper's thread is left to wake, and sends the rest.
                    SentAtOnce::Part => return Ok(sent),
                    SentAtOnce::Nothing => {
                        lane.reader.put_back(&range);
                        return Ok(sent);
                    }
                }
            }
            lane.last_sent = Instant::now();
            sent += range.len();
            if pace == Pace::Blocking && lane.last_sent.duration_since(lane.last_beat) >= self.heartbeat {
                // Behind a writer that never rests, too, the follower hears what is committed.
                self.beat(lane)?;
            }
            if self.stream_over.is_shutdown() || self.superseded.is_shutdown() || self.is_refused() {
                return Ok(sent);
            }
        }
        Ok(sent)
    }

    /// Whether the follower's history was found to differ.
    fn is_refused(&self) -> bool {
        self.history.as_ref().is_some_and(|history| history.until_refused().holds())
    }

    /// Tells the follower that its history differs, as well as may be, if it does. Nothing more is shipped then.
    fn tell_refusal(&self, lane: &mut LogLane) -> bool {
        let Some(history) = &self.history else { return false };
        let Some(refusal) = history.refusal() else { return false };
        let _ = lane.sender.send_message(&refusal);
        history.set_told();
        true
    }

    /// Tells the follower that another of its streams has taken over: if it knows nothing of one, somebody else has its
    /// node id.
    fn say_superseded(lane: &mut LogLane) -> Result<()> {
        let text = "a newer stream of this node has taken over; if it has none, another node has the same id";
        lane.sender.send_message(&Message::Error(ErrorMessage::new(RefusalCode::Superseded, text)))?;
        lane.sender.finish()
    }

    /// Flags for data: which acknowledgements somebody waits for.
    fn haste(&self, lane: &LogLane) -> u8 {
        let policy = self.commits.policy().asked_of_followers().map(|(level, _)| level);
        let mut flags = 0;
        let durable = self.commits.durable_wanted().load();
        if policy == Some(AckLevel::Durable) || durable > lane.durable_asked {
            flags |= FLAG_ACK_DURABLE;
        }
        let applied = self.commits.applied_wanted().load();
        if policy == Some(AckLevel::Applied) || applied > lane.applied_asked {
            flags |= FLAG_ACK_APPLIED;
        }
        flags
    }

    /// Tells the follower that somebody waits for records that it has been sent without saying so.
    fn ask_for_haste(&self, lane: &mut LogLane) -> Result<()> {
        let durable = self.commits.durable_wanted().load();
        let applied = self.commits.applied_wanted().load();
        let mut flags = 0;
        if durable > lane.durable_asked {
            flags |= FLAG_ACK_DURABLE;
        }
        if applied > lane.applied_asked {
            flags |= FLAG_ACK_APPLIED;
        }
        if flags == 0 {
            return Ok(());
        }
        lane.durable_asked = lane.durable_asked.max(durable);
        lane.applied_asked = lane.applied_asked.max(applied);
        lane.last_sent = Instant::now();
        lane.sender.send_message_with_flags(&Message::Sync(Sync { lsn: durable.max(applied) }), flags)
    }

    fn report_caught_up(&self, lane: &mut LogLane) -> Result<()> {
        if lane.caught_up || lane.shipped < self.target {
            return Ok(());
        }
        lane.caught_up = true;
        lane.last_sent = Instant::now();
        lane.sender.send_message(&Message::CaughtUp(CaughtUp { head: lane.shipped }))
    }

    /// Shows the follower that the leader lives, and how far behind it is.
    fn beat(&self, lane: &mut LogLane) -> Result<()> {
        lane.last_sent = Instant::now();
        lane.last_beat = lane.last_sent;
        let head = self.log.head();
        lane.sender.send_message(&Message::Heartbeat(Heartbeat {
            epoch: self.epoch,
            head,
            committed: self.commits.committed(),
            chain: self.history.as_ref().map_or(Chain::default(), |history| history.chain_for_heartbeat(head)),
            sent_unix_ms: unix_ms(),
        }))
    }
}

/// Tells the follower, as well as may be, why it gets no base.
fn refuse_base(error: &Error, sender: &mut dyn FrameSender) {
    if !matches!(error, Error::Network { .. }) {
        // A target that gives no bases will give none tomorrow.
        let is_final = matches!(error, Error::Invalid { .. });
        let code = if is_final { RefusalCode::NotRetained } else { RefusalCode::Internal };
        let refusal = ErrorMessage::new(code, format!("there is no base: {error}"));
        let _ = sender.send_message(&Message::Error(refusal));
    }
}

/// Tells the follower why it gets no more, if that is damage found in the leader's own log.
fn refuse_damaged(sender: &mut dyn FrameSender, error: &Error) {
    if error.is_corruption() {
        let _ = sender.send_message(&Message::Error(ErrorMessage::new(RefusalCode::Internal, error.to_string())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends as much as is looked at once, while `appended` bytes come, and tells the budget after it.
    fn budget_after(shares: &mut Shares, backlog: &mut u64, appended: u64) -> u64 {
        let mut left = LOOK_EVERY;
        while left > 0 {
            let (log_bytes, run) = (shares.log_budget().min(*backlog), u64::from(BASE_RUN_LEN));
            *backlog -= log_bytes;
            let sent = log_bytes + run;
            let is_last = sent >= left;
            if is_last {
                *backlog += appended;
            }
            left = left.saturating_sub(sent);
            shares.has_sent(log_bytes, || {
                assert!(is_last, "looked too early");
                *backlog
            });
        }
        shares.log_budget()
    }

    #[test]
    fn the_base_goes_first_while_more_is_appended_than_the_stream_carries() {
        let (mut shares, mut backlog) = (Shares::default(), 0);
        assert_eq!(shares.log_budget(), LOG_BEFORE_BASE);
        assert_eq!(budget_after(&mut shares, &mut backlog, 0), LOG_BEFORE_BASE, "a quiet log");
        assert_eq!(budget_after(&mut shares, &mut backlog, LOOK_EVERY / 2), LOG_BEFORE_BASE);
        assert_eq!(budget_after(&mut shares, &mut backlog, LOOK_EVERY * 2), LOG_BEHIND_BASE);
        assert_eq!(budget_after(&mut shares, &mut backlog, LOOK_EVERY * 2), LOG_BEHIND_BASE, "it goes on");
        assert!(backlog > LOOK_EVERY);
        assert_eq!(budget_after(&mut shares, &mut backlog, LOOK_EVERY / 2), LOG_BEFORE_BASE, "however much is left");
    }
}
