//! Log to stream: one shipper for each follower and shard, on a thread of its own.
//!
//! A shipper is a position in the log and a stream. It sends what is published behind its position, straight from the
//! mapping, and parks on the log's `written` mark when it has caught up. It knows nothing of other followers and waits
//! for none of them: a slow follower is a position that lags. A stream that fails ends the shipper; the next stream of
//! the same follower begins where the follower then is, so nothing is lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::commit::{AckLevel, Commits, FollowerMarks};
use crate::error::Result;
use crate::limits::MAX_WAL_DATA_LEN;
use crate::shutdown::ShutdownSignal;
use crate::transport::{Body, FrameSender};
use crate::types::{Chain, Epoch, Lsn};
use crate::wal::{LogReader, unix_ms};
use crate::watermark::{Until, Waited, wait_any};
use crate::wire::{CaughtUp, FLAG_ACK_APPLIED, FLAG_ACK_DURABLE, FrameKind, Heartbeat, Message, Sync, WalDataHeader};

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
}

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
        loop {
            self.ship_published(&mut progress)?;
            self.ask_for_haste(&mut progress)?;
            if self.stream_over.is_shutdown() {
                return Ok(());
            }
            let draining = self.draining.is_shutdown();
            if draining && log.written().load() <= progress.shipped {
                return self.sender.finish();
            }
            let conditions = [
                Until { mark: log.written(), at_least: progress.shipped.next() },
                Until { mark: self.commits.durable_wanted(), at_least: progress.durable_asked.next() },
                Until { mark: self.commits.applied_wanted(), at_least: progress.applied_asked.next() },
                self.stream_over.until(),
                self.draining.until(),
            ];
            let deadline = progress.last_sent.checked_add(self.heartbeat);
            if wait_any(&conditions, log.options().wait, deadline) == Waited::TimedOut {
                self.beat(&mut progress)?;
            }
        }
    }

    /// Sends everything published behind the position.
    fn ship_published(&mut self, progress: &mut Progress) -> Result<()> {
        loop {
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
            if self.stream_over.is_shutdown() {
                return Ok(());
            }
        }
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
