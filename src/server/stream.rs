//! One connection after its request has been answered: the shipper is started, and its acknowledgements are read.
//!
//! Reading them is where the connection's thread spends its life. What came before, agreeing on what to send from where
//! and starting the shipper, was done on another thread, which has ended: a thread keeps every page of its stack that
//! it once touched, and a node has one for each stream. For the same reason what is seldom done here is kept out of the
//! functions that stay.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::MutexGuard;

use super::{Lanes, Server, ServerShard};
use crate::ack_reader::{AckReader, AckStream, LENT_FOR, Lane};
use crate::admission;
use crate::caught::caught;
use crate::commit::{Commits, FollowerMarks};
use crate::divergence::HistoryCheck;
use crate::error::{Error, Result};
use crate::host::{StreamKey, StreamSignals, reason_of};
use crate::rebuild::base_lane::{Agreement, IssuedRebuild};
use crate::shipper::{LogLane, Shipper};
use crate::shutdown::ShutdownGuard;
use crate::target::BlockId;
use crate::transport::{FrameReceiver, FrameSender, segment};
use crate::types::ShardId;
use crate::wal::unix_ms;
use crate::watermark::{Waited, wait_any};
use crate::wire::{
    Ack, FrameHeader, FrameKind, Message, SessionAck, SessionKind, SessionPhase, ShardInfo, SyncRequest,
};

/// What a stream needs that has been agreed on. Dropped from top to bottom: the stream is over before the shard's host
/// hears of it.
pub(super) struct Agreed {
    pub(super) stream: Stream,
    pub(super) _leave: Option<LeaveStream>,
    pub(super) rest: Rest,
    pub(super) receiver: Box<dyn FrameReceiver>,
    /// Among those who may be connected.
    pub(super) _place: admission::Place,
    pub(super) _close_at_stop: ShutdownGuard,
}

/// What is left to be done for a stream that has been agreed on.
pub(super) enum Rest {
    /// A node that repairs its log asks for ranges.
    Ranges(Box<dyn FrameSender>),
    /// A reader is shipped to.
    Tail(Lanes, Box<dyn FrameSender>),
    /// A follower's shipper is at work, and what the follower says is to be read.
    Follower(StreamKey, Arc<FollowerMarks>, Arc<Shipper>),
}

impl Agreed {
    /// Serves it until it ends.
    pub(super) fn serve(mut self: Box<Self>) -> Result<()> {
        let stream = &self.stream;
        match self.rest {
            Rest::Ranges(sender) => stream.serve_ranges(sender, self.receiver.as_mut()),
            Rest::Tail(lanes, sender) => stream.serve_tail(lanes, sender, self.receiver.as_mut()),
            Rest::Follower(key, follower, shipper) => stream.serve_follower(key, follower, &shipper, self.receiver),
        }
    }
}

/// What a follower says.
enum Word {
    Acknowledged(Ack),
    OfSession(Box<SessionAck>),
    Lives,
}

/// A stream that has been agreed on.
pub(super) struct Stream {
    pub(super) server: Arc<Server>,
    pub(super) peer: String,
    pub(super) request: SyncRequest,
    pub(super) info: ShardInfo,
    pub(super) signals: StreamSignals,
    pub(super) of_shard: Arc<ServerShard>,
    /// How its history compares with this one.
    pub(super) history: Arc<HistoryCheck>,
    /// About the rebuild, if it is one.
    pub(super) agreement: Arc<Agreement>,
}

impl Stream {
    /// Begins what is to be done on `lanes`, for the follower whose stream has that key if it is one's. `None` if that
    /// was all.
    pub(super) fn begin(
        &self,
        key: Option<StreamKey>,
        lanes: Lanes,
        sender: Box<dyn FrameSender>,
    ) -> Result<Option<Rest>> {
        match (key, lanes) {
            (_, Lanes::None) => Ok(None),
            (_, Lanes::Ranges) => Ok(Some(Rest::Ranges(sender))),
            (None, lanes) => Ok(Some(Rest::Tail(lanes, sender))),
            (Some(key), lanes) => {
                let acknowledged = self.of_shard.commits.acknowledged();
                let follower = acknowledged.follower(self.request.node, &self.signals.over)?;
                let shipper = self.start_shipper(key, lanes, sender, &follower)?;
                Ok(Some(Rest::Follower(key, follower, shipper)))
            }
        }
    }

    /// Reads what the follower says until the stream ends.
    fn serve_follower(
        &self,
        stream: StreamKey,
        follower: Arc<FollowerMarks>,
        shipper: &Arc<Shipper>,
        receiver: Box<dyn FrameReceiver>,
    ) -> Result<()> {
        let reader = self.ack_reader(stream, follower, receiver);
        // However it ends, the shipper is to end with it.
        let result = caught(format_args!("the transport to {}", self.peer), || self.read_words(stream, &reader));
        let receiver = reader.close();
        if let (Err(error), Some(mut receiver)) = (&result, receiver) {
            self.end_history(error, reader.follower(), receiver.as_mut());
        }
        self.of_shard.commits.remove_reader(&reader);
        self.end_shipper(shipper);
        result
    }

    #[inline(never)]
    fn ack_reader(
        &self,
        stream: StreamKey,
        follower: Arc<FollowerMarks>,
        receiver: Box<dyn FrameReceiver>,
    ) -> Arc<AckReader> {
        let of = AckStream {
            peer: self.peer.clone(),
            session: self.info.session,
            epoch: self.info.epoch,
            number: stream.number(),
            follower,
            log: Arc::clone(&self.of_shard.log),
            commits: Arc::clone(&self.of_shard.commits),
            history: Arc::clone(&self.history),
            over: self.signals.over.clone(),
            superseded: self.signals.superseded.clone(),
            patience: self.server.options.handshake_timeout,
            timeout: self.server.options.peer_timeout,
            lent_for: LENT_FOR,
        };
        let reader = Arc::new(AckReader::new(of, receiver));
        self.of_shard.commits.add_reader(&reader);
        reader
    }

    #[inline(never)]
    fn end_history(&self, error: &Error, follower: &FollowerMarks, receiver: &mut dyn FrameReceiver) {
        let timeout = self.server.options.handshake_timeout;
        self.history.end_for(error, (self.request.shard, follower), &self.signals.over, receiver, timeout);
    }

    /// Starts the follower's shipper, once its marks say what its request did.
    fn start_shipper(
        &self,
        stream: StreamKey,
        lanes: Lanes,
        sender: Box<dyn FrameSender>,
        follower: &Arc<FollowerMarks>,
    ) -> Result<Arc<Shipper>> {
        let SyncRequest { node, shard, .. } = self.request;
        log::info!(
            "node {node}, shard {shard}: following from LSN {} of {} ({:?}, session {}, {})",
            self.info.start,
            self.info.head,
            self.info.session_kind,
            self.info.session,
            self.peer
        );
        let commits = &self.of_shard.commits;
        self.take_initial_marks(commits, stream, follower);
        let (shipper, rebuild) = self.shipper(lanes, sender, Some((stream, Arc::clone(follower))))?;
        let shipper = Arc::new(shipper);
        commits.add_shipper(&shipper);
        follower.stream_began();
        let over = self.signals.over.clone();
        let run = {
            let shipper = Arc::clone(&shipper);
            move || {
                if let Err(error) = caught(format_args!("the shipper of shard {shard}"), || shipper.run(rebuild))
                    && !over.is_shutdown()
                {
                    log::warn!("node {node}, shard {shard}: shipping ended: {error}");
                    over.shutdown();
                }
            }
        };
        if let Err(error) = self.server.threads.spawn(format!("tl-ship-s{shard}"), run) {
            self.end_shipper(&shipper);
            return Err(error);
        }
        Ok(shipper)
    }

    /// The follower's stream is over.
    #[inline(never)]
    fn end_shipper(&self, shipper: &Arc<Shipper>) {
        self.signals.over.shutdown();
        self.of_shard.commits.remove_shipper(shipper);
        shipper.follower.iter().for_each(|follower| follower.stream_ended());
    }

    /// What the follower has by its request.
    fn take_initial_marks(&self, commits: &Commits, stream: StreamKey, follower: &FollowerMarks) {
        let is_rebuild = self.info.session_kind == SessionKind::Rebuild;
        follower.set_divergence(None);
        let SyncRequest { received, durable, applied, .. } = self.request;
        let marks = [received, durable, applied];
        commits.acknowledged().stream_begins(follower, stream.number(), is_rebuild, marks, unix_ms());
    }

    fn shipper(
        &self,
        lanes: Lanes,
        sender: Box<dyn FrameSender>,
        follower: Option<(StreamKey, Arc<FollowerMarks>)>,
    ) -> Result<(Shipper, Option<IssuedRebuild>)> {
        let (stream, follower) = follower.unzip();
        let (reader, rebuild) = match (lanes, stream) {
            (Lanes::Log(place), _) => (self.of_shard.log.reader_at_known(place), None),
            (Lanes::Rebuild(reader, log_goes_on, store), Some(stream)) => (
                reader,
                Some(IssuedRebuild {
                    session: self.info.session,
                    epoch: self.info.epoch,
                    target: self.info.target,
                    shard: self.request.shard,
                    log_goes_on,
                    store,
                    places: Arc::clone(&self.server.rebuild_places),
                    agreement: Arc::clone(&self.agreement),
                    host: Arc::clone(&self.of_shard.host),
                    stream,
                }),
            ),
            (Lanes::None | Lanes::Ranges | Lanes::Rebuild(..), _) => {
                return Err(Error::invalid("a stream with nothing to ship to anybody"));
            }
        };
        let shipper = Shipper {
            log: Arc::clone(&self.of_shard.log),
            name: self.server.waiter_name(),
            lane: LogLane::new(reader, sender),
            commits: Arc::clone(&self.of_shard.commits),
            history: follower.is_some().then(|| Arc::clone(&self.history)),
            follower,
            epoch: self.info.epoch,
            heartbeat: self.server.options.heartbeat,
            stream_over: self.signals.over.clone(),
            superseded: self.signals.superseded.clone(),
            draining: self.server.draining.clone(),
            target: self.info.target,
        };
        Ok((shipper, rebuild))
    }

    fn read_words(&self, stream: StreamKey, reader: &AckReader) -> Result<()> {
        let mut lane = reader.lane();
        lane.receiver()?.set_timeout(Some(self.server.options.peer_timeout))?;
        loop {
            if let Some(ack) = lane.early.take() {
                lane = self.take_acknowledgement(stream, reader, lane, ack)?;
                continue;
            }
            let header = match lane.header() {
                Ok(header) => header,
                // The stream was ended from this side, or the follower left between two frames.
                Err(_) if self.signals.over.is_shutdown() || self.server.draining.is_shutdown() => return Ok(()),
                Err(error) => return Err(error),
            };
            match self.receive_word(lane.receiver()?, header)? {
                Word::Acknowledged(ack) => lane = self.take_acknowledgement(stream, reader, lane, ack)?,
                Word::OfSession(ack) => self.take_session_acknowledgement(stream, reader.follower(), *ack)?,
                Word::Lives => {}
            }
        }
    }

    /// What a frame says. Where any message could be, much stack is: it is gone before anything is done about the word.
    #[inline(never)]
    fn receive_word(&self, receiver: &mut dyn FrameReceiver, header: FrameHeader) -> Result<Word> {
        if !matches!(header.kind, FrameKind::Ack | FrameKind::SessionAck | FrameKind::Heartbeat | FrameKind::Error) {
            return Err(Error::protocol(&self.peer, format!("{:?} is not for a node that is followed", header.kind)));
        }
        match receiver.receive_message_body(header)? {
            Message::Ack(ack) => Ok(Word::Acknowledged(ack)),
            Message::SessionAck(ack) => Ok(Word::OfSession(Box::new(ack))),
            Message::Heartbeat(_) => Ok(Word::Lives),
            other => Err(crate::receiver::refusal(&self.peer, other)),
        }
    }

    #[inline(never)]
    fn take_acknowledgement<'a>(
        &self,
        stream: StreamKey,
        reader: &'a AckReader,
        mut lane: MutexGuard<'a, Lane>,
        ack: Ack,
    ) -> Result<MutexGuard<'a, Lane>> {
        let host = &self.of_shard.host;
        let tell = |ack: Ack| host.acknowledge(stream, ack.received, ack.durable, ack.applied, ack.chain);
        let lent = reader.lends_after(&mut lane, &ack);
        // Behind one that ends the stream, nobody takes in another.
        let may_have_woken = reader.take_in(&ack).inspect_err(|_| reader.lend_no_more())?;
        if let Some(lent) = lent {
            return Ok(reader.leave(lane, &lent, ack, tell));
        }
        if may_have_woken {
            // Whoever waited may have been woken on this processor, and what is left to do here is nothing to them: a
            // commit over loopback goes from 46.1 to 45.2 us.
            std::thread::yield_now();
        }
        tell(ack);
        Ok(lane)
    }

    /// What the follower says about its rebuild. About another session it changes nothing.
    #[inline(never)]
    fn take_session_acknowledgement(&self, stream: StreamKey, follower: &FollowerMarks, ack: SessionAck) -> Result<()> {
        let SyncRequest { node, shard, .. } = self.request;
        if self.info.session_kind != SessionKind::Rebuild
            || (ack.session, ack.epoch) != (self.info.session, self.info.epoch)
        {
            log::debug!("node {node}, shard {shard}: a word about session {}, which this is not", ack.session);
            return Ok(());
        }
        let (host, session) = (&self.of_shard.host, self.info.session.0);
        match ack.phase {
            SessionPhase::Accepted => {
                host.rebuild_progress(stream, session, 0);
                self.agreement.begin(BlockId(ack.blocks));
            }
            SessionPhase::Running | SessionPhase::BaseComplete => {
                let all = ack.phase == SessionPhase::BaseComplete;
                let blocks = self.agreement.take_run(all).ok_or_else(|| {
                    Error::protocol(&self.peer, format!("it has taken more of session {session} than was sent"))
                })?;
                host.rebuild_progress(stream, session, blocks);
            }
            SessionPhase::MakingDurable => host.rebuild_makes_durable(stream, session),
            SessionPhase::Failed => {
                log::warn!("node {node}, shard {shard}: it gave up session {session}: {:?}", ack.reason);
                host.rebuild_failed(stream, session, reason_of(ack.reason));
            }
            SessionPhase::Completed => self.complete_rebuild(stream, follower, ack)?,
        }
        Ok(())
    }

    /// The follower stands where it says: it counts from now on, and the stream goes on as any other.
    fn complete_rebuild(&self, stream: StreamKey, follower: &FollowerMarks, ack: SessionAck) -> Result<()> {
        let SyncRequest { node, shard, .. } = self.request;
        let log = &self.of_shard.log;
        let written = [log.written().until(ack.achieved), self.signals.over.until()];
        let deadline = Instant::now().checked_add(self.server.options.handshake_timeout);
        let is_written = wait_any(&written, log.options().wait, deadline) == Waited::Reached(0);
        if !self.agreement.is_base_sent() || !is_written || ack.achieved < self.info.target {
            return Err(Error::protocol(
                &self.peer,
                format!(
                    "it says that it completed a session at LSN {}, of a log that ends at {}, with {} to be reached",
                    ack.achieved,
                    log.head(),
                    self.info.target
                ),
            ));
        }
        if self.of_shard.host.rebuild_completed(stream, self.info.session.0, ack.achieved) {
            // It says no chain: what was not acknowledged with one counts with the next acknowledgement.
            let agreed = ack.achieved.min(self.history.agreed());
            self.of_shard.commits.acknowledged().rebuilt(follower, stream.number(), agreed, unix_ms());
            log::info!("node {node}, shard {shard}: rebuilt up to LSN {}", ack.achieved);
            self.agreement.accept();
        }
        Ok(())
    }

    /// Serves ranges of the log to a node that repairs its own.
    #[inline(never)]
    fn serve_ranges(&self, mut sender: Box<dyn FrameSender>, receiver: &mut dyn FrameReceiver) -> Result<()> {
        let idle = self.server.options.peer_timeout;
        segment::serve_ranges(&self.of_shard.log, sender.as_mut(), receiver, idle)
    }

    /// Ships to a reader that acknowledges nothing. Its side of the stream is read only to notice that it left.
    #[inline(never)]
    fn serve_tail(&self, lanes: Lanes, sender: Box<dyn FrameSender>, receiver: &mut dyn FrameReceiver) -> Result<()> {
        let (shipper, rebuild) = self.shipper(lanes, sender, None)?;
        let over = self.signals.over.clone();
        let shard = self.request.shard;
        self.server.threads.spawn(format!("tl-tail-s{shard}"), move || {
            if let Err(error) = caught(format_args!("the shipper of shard {shard}"), || shipper.run(rebuild)) {
                log::debug!("shard {shard}: a reader's stream ended: {error}");
            }
            over.shutdown();
        })?;
        receiver.set_timeout(None)?;
        let result = caught(format_args!("the transport to {}", self.peer), || receiver.receive_header());
        self.signals.over.shutdown();
        match result {
            Ok(header) => Err(Error::protocol(&self.peer, format!("{:?} is not for a reader to send", header.kind))),
            Err(_) => Ok(()),
        }
    }
}

/// Tells the shard's host that a stream is over when its thread ends, however it ends.
pub(super) struct LeaveStream {
    pub(super) server: Arc<Server>,
    pub(super) shard: ShardId,
    pub(super) stream: StreamKey,
}

impl Drop for LeaveStream {
    fn drop(&mut self) {
        if let Ok(shard) = self.server.shard(self.shard) {
            shard.host.stream_ended(self.stream);
        }
    }
}
