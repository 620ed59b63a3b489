//! Log to stream: one shipper for each follower and shard, on a thread of its own.
//!
//! A shipper is a position in the log and a stream. It sends what is published behind its position, straight from the
//! mapping, and parks on the log's `written` mark when it has caught up. It knows nothing of other followers and waits
//! for none of them: a slow follower is a position that lags. A stream that fails ends the shipper; the next stream of
//! the same follower begins where the follower then is, so nothing is lost.
//!
//! During a rebuild the stream carries two lanes. The log has priority: before each run of the base what is published
//! is sent, up to a bound. So the log need not be held back for the length of the copy, and the follower's applier is never far behind.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::commit::{AckLevel, Commits, FollowerMarks};
use crate::error::{Error, RefusalCode, Result};
use crate::limits::MAX_WAL_DATA_LEN;
use crate::protocol::FailureReason;
use crate::rebuild::base_lane::{BaseLane, IssuedRebuild};
use crate::shutdown::ShutdownSignal;
use crate::transport::{Body, FrameSender};
use crate::types::{Chain, Epoch, Lsn};
use crate::wal::{LogReader, unix_ms};
use crate::watermark::{Until, WaitStrategy, Waited, wait_any};
use crate::wire::{
    CaughtUp, ErrorMessage, FLAG_ACK_APPLIED, FLAG_ACK_DURABLE, FrameKind, Heartbeat, Message, SessionAction, Sync,
    WalDataHeader,
};

/// What a shipper works with.
pub(crate) struct Shipper {
    pub(crate) reader: LogReader,
    pub(crate) sender: Box<dyn FrameSender>,
    pub(crate) commits: Arc<Commits>,
    /// Whose stream it is; none for a reader that does not count as a follower.
    pub(crate) follower: Option<Arc<FollowerMarks>>,
    pub(crate) epoch: Epoch,
    /// After this long without sending anything, a heartbeat goes out.
    pub(crate) heartbeat: Duration,
    /// The stream is over: shipping stops at once.
    pub(crate) stream_over: ShutdownSignal,
    /// The node is stopping: what is pending is shipped, then shipping stops.
    pub(crate) draining: ShutdownSignal,
    /// The head when the stream began: reaching it is reported once.
    pub(crate) target: Lsn,
    /// A rebuild to begin with. The reader's position is set once it is known where the log lane begins.
    pub(crate) rebuild: Option<IssuedRebuild>,
}

/// Log bytes after which a run of the base is sent although more log has come.
const LOG_BEFORE_BASE: u64 = 1 << 20;

/// How far a shipper has come.
struct Progress {
    shipped: Lsn,
    /// The newest LSN for which the follower has been asked to hurry, by level.
    durable_asked: Lsn,
    applied_asked: Lsn,
    /// Flags of the newest data.
    flags: u8,
    last_sent: Instant,
    caught_up: bool,
}

impl Shipper {
    /// Ships until the stream is over, it fails, or the node stops and everything pending is sent.
    ///
    /// # Errors
    ///
    /// What ended the stream. [`Error::NotRetained`](crate::Error::NotRetained) if retention has overtaken it.
    pub(crate) fn run(mut self) -> Result<()> {
        let log = Arc::clone(self.reader.log());
        let mut progress = Progress {
            shipped: Lsn::ZERO,
            durable_asked: Lsn::ZERO,
            applied_asked: Lsn::ZERO,
            flags: 0,
            last_sent: Instant::now(),
            caught_up: false,
        };
        let mut base = match self.rebuild.take() {
            None => None,
            Some(rebuild) => match self.start_rebuild(rebuild, &mut progress)? {
                None => return Ok(()),
                started => started,
            },
        };
        loop {
            // Priority is not everything: behind a writer that never rests, the base would never be sent.
            let budget = if base.is_some() { LOG_BEFORE_BASE } else { u64::MAX };
            self.ship_published(&mut progress, budget)?;
            self.ask_for_haste(&mut progress)?;
            if self.stream_over.is_shutdown() {
                return Ok(());
            }
            let draining = self.draining.is_shutdown();
            // A closed log grows no more: another has taken its place on this node.
            if (draining && log.written().load() <= progress.shipped) || log.is_closed() {
                return self.sender.finish();
            }
            if self.ship_base(&mut base, &mut progress)? {
                continue;
            }
            // After a failure the log has ended, and what is in it is shipped all the same.
            let ended = if log.poison().is_none() { log.until_ended() } else { self.stream_over.until() };
            let conditions = [
                Until { mark: log.written(), at_least: progress.shipped.next() },
                Until { mark: self.commits.durable_wanted(), at_least: progress.durable_asked.next() },
                Until { mark: self.commits.applied_wanted(), at_least: progress.applied_asked.next() },
                self.stream_over.until(),
                self.draining.until(),
                base.as_ref().map_or(self.stream_over.until(), BaseLane::until_more),
                ended,
            ];
            let deadline = progress.last_sent.checked_add(self.heartbeat);
            if wait_any(&conditions, log.options().wait, deadline) == Waited::TimedOut {
                self.beat(&mut progress)?;
            }
        }
    }

    /// Waits for a place, opens the base, and tells the follower what is to come. `None` if the stream or the node ends
    /// first.
    fn start_rebuild(&mut self, rebuild: IssuedRebuild, progress: &mut Progress) -> Result<Option<BaseLane>> {
        let place = rebuild.places.ask();
        if !place.is_granted() {
            log::info!("shard {}: the rebuild of session {} waits for its turn", rebuild.shard, rebuild.session);
            self.sender.send_message(&Message::SessionControl(rebuild.control(SessionAction::Wait)))?;
        }
        while !place.is_granted() {
            let conditions = [place.until_granted(), self.stream_over.until(), self.draining.until()];
            let deadline = progress.last_sent.checked_add(self.heartbeat);
            match wait_any(&conditions, WaitStrategy::Park, deadline) {
                Waited::Reached(0) => {}
                Waited::Reached(_) => return self.sender.finish().map(|()| None),
                Waited::TimedOut => self.beat(progress)?,
            }
        }
        let shard = rebuild.shard;
        let (host, stream, session) = (Arc::clone(&rebuild.host), rebuild.stream, rebuild.session.0);
        let goes_on = rebuild.log_goes_on;
        let pinned = host.pin_rebuild(stream, session, goes_on.map(|place| place.lsn.next()));
        let opened = pinned.and_then(|held| Ok((held, rebuild.open(place)?))).and_then(|(held, lane)| {
            let start = match goes_on.filter(|place| held == place.lsn.next()) {
                // The reader stands there.
                Some(_) => held,
                None => self.place_log(lane.info().base_lsn)?,
            };
            host.rebuild_starts(stream, session, start)?;
            Ok((lane, start))
        });
        let (lane, log_start) = opened.inspect_err(|error| {
            self.refuse_base(error);
            host.rebuild_failed(stream, session, FailureReason::BaseUnavailable);
        })?;
        let info = lane.info();
        log::info!(
            "shard {shard}: sending a base at LSN {} of {} blocks of {} bytes, and the log from LSN {log_start} on",
            info.base_lsn,
            info.block_count,
            info.block_len
        );
        progress.last_sent = Instant::now();
        self.sender.send_message(&Message::SessionControl(lane.start(log_start)))?;
        Ok(Some(lane))
    }

    /// Sets the reader to the beginning of the log that a base at `base_lsn` needs, a segment's first LSN.
    fn place_log(&mut self, base_lsn: Lsn) -> Result<Lsn> {
        let log = Arc::clone(self.reader.log());
        let place = log.segment_start_for(base_lsn.next())?;
        self.reader = log.reader_at(place);
        Ok(place.segment)
    }

    /// Sends the next run of the base, or the acceptance of what the follower made of it. Returns whether it sent
    /// anything.
    fn ship_base(&mut self, base: &mut Option<BaseLane>, progress: &mut Progress) -> Result<bool> {
        let Some(lane) = base else { return Ok(false) };
        if lane.is_accepted() {
            self.sender.send_message(&Message::SessionControl(lane.accept()))?;
            *base = None;
        } else if !lane.send_next(self.sender.as_mut()).inspect_err(|error| self.refuse_base(error))? {
            return Ok(false);
        }
        progress.last_sent = Instant::now();
        Ok(true)
    }

    /// Tells the follower, as well as may be, why it gets no base.
    fn refuse_base(&mut self, error: &Error) {
        if !matches!(error, Error::Network { .. }) {
            // A target that gives no bases will give none tomorrow.
            let is_final = matches!(error, Error::Invalid { .. });
            let code = if is_final { RefusalCode::NotRetained } else { RefusalCode::Internal };
            let refusal = ErrorMessage::new(code, format!("there is no base: {error}"));
            let _ = self.sender.send_message(&Message::Error(refusal));
        }
    }

    /// Sends everything published behind the position.
    fn ship_published(&mut self, progress: &mut Progress, budget: u64) -> Result<()> {
        let mut sent = 0;
        while sent < budget {
            // Read before the bytes: all records up to it are among what is published then.
            let written = self.reader.log().written().load();
            let Some(range) = self.reader.next(u64::from(MAX_WAL_DATA_LEN) - WalDataHeader::LEN as u64)? else {
                progress.shipped = progress.shipped.max(written);
                // Asked for everything shipped, now that the last frame of it said so.
                if progress.flags & FLAG_ACK_DURABLE != 0 {
                    progress.durable_asked = progress.durable_asked.max(progress.shipped);
                }
                if progress.flags & FLAG_ACK_APPLIED != 0 {
                    progress.applied_asked = progress.applied_asked.max(progress.shipped);
                }
                if let Some(follower) = &self.follower {
                    follower.set_shipped(progress.shipped);
                }
                return self.report_caught_up(progress);
            };
            let header = WalDataHeader { segment: range.segment().id().first_lsn, offset: range.start() };
            progress.flags = self.haste(progress);
            self.sender.send(FrameKind::WalData, progress.flags, &header.to_bytes(), Body::Log(&range))?;
            progress.last_sent = Instant::now();
            sent += range.len();
            if self.stream_over.is_shutdown() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Flags for data: which acknowledgements somebody waits for.
    fn haste(&self, progress: &Progress) -> u8 {
        let policy = self.commits.policy().asked_of_followers().map(|(level, _)| level);
        let mut flags = 0;
        let durable = self.commits.durable_wanted().load();
        if policy == Some(AckLevel::Durable) || durable > progress.durable_asked {
            flags |= FLAG_ACK_DURABLE;
        }
        let applied = self.commits.applied_wanted().load();
        if policy == Some(AckLevel::Applied) || applied > progress.applied_asked {
            flags |= FLAG_ACK_APPLIED;
        }
        flags
    }

    /// Tells the follower that somebody waits for records that it has been sent without saying so.
    fn ask_for_haste(&mut self, progress: &mut Progress) -> Result<()> {
        let durable = self.commits.durable_wanted().load();
        let applied = self.commits.applied_wanted().load();
        let mut flags = 0;
        if durable > progress.durable_asked {
            flags |= FLAG_ACK_DURABLE;
        }
        if applied > progress.applied_asked {
            flags |= FLAG_ACK_APPLIED;
        }
        if flags == 0 {
            return Ok(());
        }
        progress.durable_asked = progress.durable_asked.max(durable);
        progress.applied_asked = progress.applied_asked.max(applied);
        progress.last_sent = Instant::now();
        self.sender.send_message_with_flags(&Message::Sync(Sync { lsn: durable.max(applied) }), flags)
    }

    fn report_caught_up(&mut self, progress: &mut Progress) -> Result<()> {
        if progress.caught_up || progress.shipped < self.target {
            return Ok(());
        }
        progress.caught_up = true;
        progress.last_sent = Instant::now();
        self.sender.send_message(&Message::CaughtUp(CaughtUp { head: progress.shipped }))
    }

    /// Shows the follower that the leader lives, and how far behind it is.
    fn beat(&mut self, progress: &mut Progress) -> Result<()> {
        progress.last_sent = Instant::now();
        self.sender.send_message(&Message::Heartbeat(Heartbeat {
            epoch: self.epoch,
            head: self.reader.log().head(),
            committed: self.commits.committed(),
            chain: Chain::default(),
            sent_unix_ms: unix_ms(),
        }))
    }
}
