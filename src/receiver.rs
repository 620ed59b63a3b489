//! Stream to log: one receiver for each shard of a follower, on a thread of its own.
//!
//! The receiver reads from the socket straight into the mapped segment, at the offset where the leader has the same
//! bytes, checks every batch against the chain, publishes it, and acknowledges. It comes back by itself when the
//! stream fails, at the LSN where the log then ends, after a wait that doubles from 1 s to 30 s, shortened at random.
//!
//! Where the leader says that only a rebuild helps, the stream begins with one: see [`rebuild`](crate::rebuild). The
//! log lane is received as ever, into a log that begins with it, and the stream then goes on as any other.
//!
//! # Acknowledgements
//!
//! They go back by the [`AckLane`], from the receiver and from a second thread, the acknowledger, which is there while
//! anything moves without the receiver.
//!
//! While somebody at the leader waits for durability, the receiver syncs by itself before it acknowledges, if nothing
//! more has arrived: the acknowledgement then crosses no other thread. Otherwise the log's sync thread does it beside
//! the receiving.

use std::sync::Arc;
use std::thread::Scope;
use std::time::{Duration, Instant};

use crate::ack_lane::{AckLane, WakeReaders};
use crate::backoff::Backoff;
use crate::caught::caught;
use crate::epoch_fence::StreamUnder;
use crate::error::{Error, RefusalCode, Result};
use crate::follower_shard::FollowerShard;
use crate::limits::{LOG_PIECE_LEN, MAX_PATIENCE_MS};
use crate::node::running::NODE_THREAD_STACK;
use crate::on_demand::run_aside;
use crate::parting::{self, OwnHistory};
use crate::rebuild::intake::{Arrived, Completion, Intake};
use crate::shutdown::{ShutdownGuard, ShutdownSignal};
use crate::transport::{Connection, FrameReceiver, FrameSender, is_closed_by_peer};
use crate::types::{Chain, Lsn};
use crate::wire::{
    FLAG_ACK_DURABLE, FrameHeader, FrameKind, Message, PROTOCOL_VERSIONS, Purpose, SessionKind, SessionPhase,
    ShardInfo, SyncRequest, WalDataHeader,
};

/// Log bytes taken in before they are checked and published: small enough to be checked while they are in the cache.
const TAKE_IN: u64 = LOG_PIECE_LEN;
/// Of a frame with more than that, all that is taken in but the header page and the last bytes ends at a multiple of
/// this in its segment. Measured here, writing a new file in pieces of about 256 KiB: 3.7 GB/s with ends anywhere, 4.0
/// with ends at pages, 4.7 with these, and 5.0 where each is a multiple of its own length.
const TAKE_IN_TO: u64 = 64 * 1024;
/// Log bytes after which the receiver acknowledges although more has arrived.
const ACK_EVERY: u64 = 256 * 1024;
/// A stream that lasted this long made stable progress: the next failure is the first again.
const STABLE: Duration = Duration::from_secs(10);

/// A stream that has been agreed on.
struct Agreed {
    peer: String,
    receiver: Box<dyn FrameReceiver>,
    lane: Box<AckLane>,
    /// What takes in the base, and what completes the rebuild, if the stream begins with one.
    intake: Option<Box<Intake>>,
    completion: Option<Completion>,
    _close_at_stop: ShutdownGuard,
}

/// The receiver of one shard of a follower.
pub(crate) struct Receiver {
    pub(crate) own: FollowerShard,
}

impl Receiver {
    /// Follows the leader until the node stops, or until the leader refuses for good.
    ///
    /// # Errors
    ///
    /// A failure that trying again cannot mend.
    pub(crate) fn run(&mut self) -> Result<()> {
        let (node, shard) = (Arc::clone(&self.own.node), self.own.shard);
        let seed = node.manifest().node.0 ^ u64::from(shard.0) << 48 ^ u64::from(std::process::id());
        let mut backoff = Backoff::new(node.options.backoff_base, node.options.backoff_cap, seed);
        let stop = node.stop.clone();
        while !stop.is_shutdown() {
            let began = Instant::now();
            let head = self.own.writer()?.end().head;
            let result = self.follow_once();
            self.own.state.set_connected(false);
            if stop.is_shutdown() {
                break;
            }
            if let Some((_, writer)) = &mut self.own.open {
                writer.discard_partial();
            }
            let moved = self.own.open.as_ref().is_some_and(|(_, writer)| writer.end().head > head);
            if began.elapsed() >= STABLE && moved {
                backoff.succeeded();
            }
            let Err(error) = result else { continue };
            self.own.state.set_error(&error);
            if error.is_permanent() {
                return Err(error);
            }
            if matches!(error, Error::Refused { code: RefusalCode::NotReady, .. }) {
                // It may be ready at any time, and has let this node wait already where it knew no better.
                backoff.succeeded();
            }
            self.pause(&error, backoff.next());
        }
        Ok(())
    }

    /// Waits before it tries again.
    #[inline(never)]
    fn pause(&self, error: &Error, wait: Duration) {
        let level = if is_closed_by_peer(error) { log::Level::Info } else { log::Level::Warn };
        log::log!(level, "shard {}: {error}; trying again in {:.1} s", self.own.shard, wait.as_secs_f32());
        let _ = self.own.node.stop.wait_timeout(wait);
    }

    /// One stream, from connecting to its end.
    fn follow_once(&mut self) -> Result<()> {
        let over = self.own.node.stop.child();
        let stack = self.own.node.options.on_demand_stack;
        let mut agreed = run_aside(&format!("tl-agree-s{}", self.own.shard), stack, || self.agree(&over))?;
        let result = self.run_stream(&mut agreed, &over);
        let Some(intake) = &agreed.intake else { return result };
        let shard = self.own.shard;
        let own = &mut self.own;
        // The first failure is the one to tell: a target that has panicked may do so again when it is let go of.
        let ended = caught(format_args!("the target of shard {shard}"), || {
            intake.end(own);
            Ok(())
        });
        result.and(ended)
    }

    /// Connects, agrees with the leader on how this log goes on, and gets ready for that.
    fn agree(&mut self, over: &ShutdownSignal) -> Result<Box<Agreed>> {
        if !self.own.awaits_leader {
            self.own.ensure_applier()?;
        }
        let Connection { peer, mut sender, mut receiver, closer } = self.own.node.connect()?;
        let close_at_stop = over.on_shutdown(move || closer.close());
        let (info, under) = self.shake_hands(&peer, (sender.as_mut(), receiver.as_mut()), over)?;
        self.own.awaits_leader = false;
        self.own.server.shard(self.own.shard)?.host.set_upstream(info.node);
        if info.session_kind != SessionKind::Rebuild {
            self.own.ensure_applier()?;
        }
        self.own.state.begin_stream(info.head);
        self.own.catches_up_at = Some(info.target);
        self.own.state.set_connected(true);
        // A leader that beats more slowly than this node expects is not gone.
        let slowest = Duration::from_millis(u64::from(info.heartbeat_ms.saturating_mul(3).min(MAX_PATIENCE_MS)));
        receiver.set_timeout(Some(self.own.node.options.peer_timeout.max(slowest)))?;
        let intake = match info.session_kind {
            SessionKind::Rebuild => {
                let (own, both) = (&mut self.own, (over, &under));
                let taken = Intake::take_on(own, &info, (sender.as_mut(), receiver.as_mut()), both);
                Some(Box::new(taken?))
            }
            SessionKind::KeepUp => {
                // In bulk, segments are made without what is prepared for records that come one by one.
                self.own.writer()?.log().prepare_spares()?;
                None
            }
            _ => None,
        };
        let next = self.own.writer()?.end().head.next();
        log::info!(
            "shard {}: following {peer} from LSN {next} (leader has {} to {}, epoch {})",
            self.own.shard,
            info.tail,
            info.head,
            info.epoch
        );
        let lane = AckLane::new(&mut self.own, sender, &info, under);
        let completion = intake.as_ref().map(|_| Completion::of(&self.own)).transpose();
        match lane.and_then(|lane| Ok((lane, completion?))) {
            Ok((lane, completion)) => {
                Ok(Box::new(Agreed { peer, receiver, lane, intake, completion, _close_at_stop: close_at_stop }))
            }
            Err(error) => {
                intake.iter().for_each(|intake| intake.end(&mut self.own));
                Err(error)
            }
        }
    }

    /// The threads of a stream that has been agreed on.
    fn run_stream(&mut self, agreed: &mut Agreed, over: &ShutdownSignal) -> Result<()> {
        let Agreed { peer, receiver, lane, intake, completion, .. } = agreed;
        let (lane, intake) = (lane.as_ref(), intake.as_deref());
        let (shard, stack) = (self.own.shard, self.own.node.options.on_demand_stack);
        std::thread::scope(|scope| {
            let acknowledge = || {
                let run = || lane.run_acknowledger(over);
                lane.acknowledger_started(start_in(scope, format!("tl-ack-s{shard}"), stack, run));
            };
            let mut started = Ok(());
            if let (Some(intake), Some(completion)) = (intake, &*completion) {
                let run = move || intake.run_completer(completion, lane);
                started = start_in(scope, format!("tl-rebuild-s{shard}"), NODE_THREAD_STACK, run);
            }
            // The other threads of the stream end only when told to, and are waited for.
            let result = caught(format_args!("the receiver of shard {shard}"), || {
                started.and_then(|()| self.receive(peer, receiver.as_mut(), (lane, &acknowledge), intake))
            });
            end_stream(lane, intake, result, over)
        })
    }

    /// Says where this log ends, and checks that what the leader will send continues it. From then on the stream stands
    /// under the leader's epoch.
    fn shake_hands(
        &mut self,
        peer: &str,
        (sender, receiver): (&mut dyn FrameSender, &mut dyn FrameReceiver),
        over: &ShutdownSignal,
    ) -> Result<(ShardInfo, StreamUnder)> {
        let node = Arc::clone(&self.own.node);
        // What another stream has met may still be on its way to the disk, or may not have got there. What is asked
        // here tells what the log has, and a leader of an older epoch would count that.
        let met = node.fence.accepted();
        if met > node.manifest().epoch {
            node.accept_epoch(met).map_err(|error| stale_answer(peer, error))?;
        }
        let manifest = node.manifest();
        let is_incomplete = self.own.is_incomplete()?;
        let kept = self.own.find_interrupted()?.map_or(0, |_| SyncRequest::REBUILD_KEPT);
        let applied = if is_incomplete { Lsn::ZERO } else { self.own.applied.load() };
        let touched = if is_incomplete { Lsn::ZERO } else { self.own.touched()? };
        self.own.told_applied = applied;
        let shard = self.own.shard;
        let writer = self.own.writer()?;
        let end = writer.end();
        // A log whose beginning has not arrived yet has no history to tell.
        let (received, chain) = match writer.log().segments().is_empty() {
            true => (Lsn::ZERO, Chain::genesis(manifest.cluster, manifest.region, shard)),
            false => (end.head, end.chain),
        };
        let request = SyncRequest {
            versions: PROTOCOL_VERSIONS,
            purpose: Purpose::Follow,
            cluster: manifest.cluster,
            node: manifest.node,
            region: manifest.region,
            shard,
            shard_count: manifest.shard_count,
            segment_size: manifest.segment_size,
            epoch: manifest.epoch,
            received,
            durable: writer.log().synced().load().min(received),
            applied,
            chain,
            from: Lsn::ZERO,
            flags: kept
                | if is_incomplete { SyncRequest::BASE_INCOMPLETE } else { 0 }
                | if manifest.own_epoch { SyncRequest::HAS_LED } else { 0 },
        };
        let own = OwnHistory { log: writer.log().as_ref(), touched };
        let timeout = node.options.handshake_timeout;
        // For the whole exchange: one that comes byte by byte does not hold this side.
        receiver.set_deadline(Instant::now().checked_add(timeout))?;
        let (info, told) = parting::exchange((sender, receiver), request, timeout, &own)?;
        receiver.set_deadline(None)?;
        node.check_topology(peer, &info)?;
        // Persisted before anything is done under it.
        node.accept_epoch(info.epoch).map_err(|error| stale_answer(peer, error))?;
        // Another stream may have met a newer one since, and nothing is changed here on this leader's word then.
        let under = node.fence.enter(info.epoch, over);
        under.check()?;
        self.own.gives_way = told.is_some_and(|told| told.gives_way_to(info.epoch));
        if info.session_kind == SessionKind::Rebuild && info.start == Lsn::ZERO {
            return Ok((info, under));
        }
        if is_incomplete && (info.session_kind != SessionKind::Rebuild || kept == 0) {
            return Err(Error::protocol(peer, "it would go on with the log, but the target has no base to put it on"));
        }
        let due = self.own.writer()?.ingest_position();
        if let Some(told) = told
            && let Some(place) = told.cut_asked(peer, &info, (end.head, due))?
        {
            self.own.cut_log(&place)?;
        }
        let writer = self.own.writer()?;
        let end = writer.end();
        let due = writer.ingest_position();
        let again = (due.0, 0);
        let offered = (info.start_segment, info.start_offset);
        if offered != due && offered != again || info.start != end.head.next() {
            return Err(Error::protocol(
                peer,
                format!(
                    "it would send from offset {} of segment {}, but {} of {} is due",
                    offered.1, offered.0, due.1, due.0
                ),
            ));
        }
        Ok((info, under))
    }

    /// Takes in frames until the stream ends.
    fn receive(
        &mut self,
        peer: &str,
        receiver: &mut dyn FrameReceiver,
        (lane, acknowledge): (&AckLane, &dyn Fn()),
        intake: Option<&Intake>,
    ) -> Result<()> {
        let mut unacknowledged = 0;
        let mut arrived = Arrived::new();
        if lane.begins()? {
            acknowledge();
        }
        if let Some(intake) = intake {
            accept_rebuild(intake, lane)?;
        }
        loop {
            // What has been received is said while the next frame is waited for, should it begin and then not come.
            let waits_unsaid = unacknowledged > 0 && !receiver.has_whole();
            if waits_unsaid && lane.begins_long() {
                acknowledge();
            }
            let header = receiver.receive_header()?;
            self.own.state.heard_from_leader();
            // What was to be acknowledged with the next piece of log waits for nothing else, nor for a large piece.
            let goes_on = header.kind == FrameKind::WalData && u64::from(header.len) <= TAKE_IN;
            if unacknowledged > 0 && !goes_on && header.kind != FrameKind::Error {
                lane.send_if_moved()?;
                unacknowledged = 0;
                if lane.ends_frame(true) {
                    acknowledge();
                }
            }
            match header.kind {
                FrameKind::WalData => {
                    self.follow_log(peer, receiver, header, (lane, acknowledge), &mut unacknowledged)?;
                }
                FrameKind::Sync => self.take_sync(peer, receiver, header, (lane, acknowledge))?,
                FrameKind::Heartbeat => {
                    self.take_heartbeat(peer, receiver, header, lane)?;
                    lane.answer()?;
                    // Should it be missing because no thread could be started.
                    if lane.ends_frame(false) {
                        acknowledge();
                    }
                }
                FrameKind::CaughtUp => self.take_caught_up(peer, receiver, header, lane)?,
                FrameKind::Error => return Err(receive_refusal(peer, receiver, header)),
                _ => match intake {
                    Some(intake) => self.take_in_base(intake, receiver, header, &mut arrived, lane)?,
                    None => return Err(misplaced(peer, header)),
                },
            }
        }
    }

    /// One frame of log, and its acknowledgement unless more has arrived that can go with it. Of what is not
    /// acknowledged the caller keeps count, in bytes.
    #[inline(never)]
    fn follow_log(
        &mut self,
        peer: &str,
        receiver: &mut dyn FrameReceiver,
        header: FrameHeader,
        (lane, acknowledge): (&AckLane, &dyn Fn()),
        unacknowledged: &mut u64,
    ) -> Result<()> {
        let asks_durable = header.flags & FLAG_ACK_DURABLE != 0;
        lane.set_haste(header.flags);
        // However short the frame, its rest comes when the network lets it.
        let takes_long = asks_durable || u64::from(header.len) > TAKE_IN || !receiver.has_whole();
        if takes_long && lane.begins_long() {
            acknowledge();
        }
        {
            // The leader hears of it first, unless it waits for the applier.
            let _wake = (!lane.awaits_applier()).then(|| WakeReaders(lane));
            let bytes = self.take_in(peer, receiver, (lane, acknowledge))?;
            *unacknowledged += bytes;
            let drained = !receiver.has_buffered();
            if asks_durable {
                let writer = self.own.writer()?;
                let head = writer.end().head;
                if drained && bytes <= TAKE_IN {
                    writer.log().wait_synced_or_given_up(head, None)?;
                } else {
                    lane.sync_in_background(head);
                }
            }
            if drained || lane.is_due_at_once(header.flags) || *unacknowledged >= ACK_EVERY {
                lane.send_if_moved()?;
                *unacknowledged = 0;
            }
        }
        if lane.ends_frame(*unacknowledged == 0) {
            acknowledge();
        }
        Ok(())
    }

    /// Somebody at the leader waits for what it has sent before.
    #[inline(never)]
    fn take_sync(
        &mut self,
        peer: &str,
        receiver: &mut dyn FrameReceiver,
        header: FrameHeader,
        (lane, acknowledge): (&AckLane, &dyn Fn()),
    ) -> Result<()> {
        let message = expect_sync(peer, receiver.receive_message_body(header)?)?;
        lane.set_haste(header.flags);
        if header.flags & FLAG_ACK_DURABLE != 0 {
            if lane.begins_long() {
                acknowledge();
            }
            let log = self.own.writer()?.log();
            log.wait_synced_or_given_up(message.min(log.head()), None)?;
        }
        lane.send_if_moved()?;
        // The leader sends no heartbeats meanwhile.
        lane.answer()?;
        if lane.ends_frame(true) {
            acknowledge();
        }
        Ok(())
    }

    #[inline(never)]
    fn take_heartbeat(
        &mut self,
        peer: &str,
        receiver: &mut dyn FrameReceiver,
        header: FrameHeader,
        lane: &AckLane,
    ) -> Result<()> {
        if let Message::Heartbeat(beat) = receiver.receive_message_body(header)? {
            let head = self.own.writer()?.end().head;
            self.own.state.set_leader_head(beat.head);
            self.own.state.set_committed(beat.committed, head);
            lane.compare(peer, self.own.shard, &beat)?;
        }
        Ok(())
    }

    #[inline(never)]
    fn take_caught_up(
        &mut self,
        peer: &str,
        receiver: &mut dyn FrameReceiver,
        header: FrameHeader,
        lane: &AckLane,
    ) -> Result<()> {
        if let Message::CaughtUp(caught_up) = receiver.receive_message_body(header)? {
            self.own.state.set_leader_head(caught_up.head);
            self.own.writer()?.log().prepare_spares()?;
            log::info!("shard {}: caught up with {peer} at LSN {}", self.own.shard, caught_up.head);
            self.own.catches_up_at = None;
            self.own.feed(lane.leaders_epoch())?;
        }
        Ok(())
    }

    /// A frame of the base lane, or about the session.
    #[inline(never)]
    fn take_in_base(
        &mut self,
        intake: &Intake,
        receiver: &mut dyn FrameReceiver,
        header: FrameHeader,
        arrived: &mut Arrived,
        lane: &AckLane,
    ) -> Result<()> {
        let peer = receiver.peer().to_owned();
        if header.kind == FrameKind::BaseData {
            return intake.take_base(&self.own, receiver, arrived, lane);
        }
        match receiver.receive_message_body(header)? {
            Message::BaseComplete(end) => intake.take_end(&mut self.own, &peer, end, arrived),
            Message::SessionControl(control) => intake.take_control(&self.own, &peer, control),
            other => Err(Error::protocol(peer, format!("{:?} is not for a follower", other.kind()))),
        }
    }

    /// One `WalData` frame: its bytes go to where the leader has them. Returns how many there were.
    fn take_in(
        &mut self,
        peer: &str,
        receiver: &mut dyn FrameReceiver,
        (lane, acknowledge): (&AckLane, &dyn Fn()),
    ) -> Result<u64> {
        let mut fields = [0; WalDataHeader::LEN];
        receiver.receive_exact(&mut fields)?;
        let WalDataHeader { segment, mut offset } =
            WalDataHeader::decode(&fields).map_err(|error| error.from_peer(peer))?;
        // Room for a new segment may have to be waited for.
        if offset == 0 && lane.begins_long() {
            acknowledge();
        }
        let total = u64::from(receiver.remaining());
        let node = Arc::clone(&self.own.node);
        let mut newer = false;
        let writer = self.own.writer()?;
        while receiver.remaining() > 0 {
            let len = window_len(offset, u64::from(receiver.remaining()));
            let window = writer.ingest_window(segment, offset, len).map_err(blame(peer))?;
            receiver.receive_exact(window)?;
            let len = window.len() as u64;
            offset += len;
            lane.take_in(writer, len).map_err(blame(peer))?;
            if receiver.remaining() > 0 || lane.awaits_applier() {
                lane.wake_readers();
            }
            let epoch = writer.end().epoch;
            if epoch > node.manifest().epoch {
                // The leader goes on under a newer term. Should the node stop right here, the log says so too.
                lane.goes_on_under(epoch);
                node.accept_epoch(epoch).map_err(|error| stale_answer(peer, error))?;
                newer = true;
            }
        }
        // All that the leader had of older terms came before. Behind one that never rests, nothing else says that the
        // log has reached where the leader was.
        let head = writer.end().head;
        if newer || self.own.catches_up_at.is_some_and(|due| due <= head) {
            self.own.catches_up_at = None;
            self.own.feed(lane.leaders_epoch())?;
        }
        Ok(total)
    }
}

/// How many of a frame's remaining bytes to take in next, where the first of them stands at `offset` of its segment.
#[inline]
fn window_len(offset: u64, remaining: u64) -> u64 {
    let end = offset.saturating_add(TAKE_IN);
    // An offset that no segment has is refused with the window.
    if remaining <= TAKE_IN { remaining } else { (end - end % TAKE_IN_TO).saturating_sub(offset) }
}

/// Ends a stream that came to this. Says why it did.
#[inline(never)]
fn end_stream(lane: &AckLane, intake: Option<&Intake>, result: Result<()>, over: &ShutdownSignal) -> Result<()> {
    // A transport that has panicked may do so again, and threads wait here for the stream to be over.
    let said = caught("the transport", || {
        if let Err(error) = &result {
            lane.say_why(error, intake);
        }
        lane.say_last(over);
        Ok(())
    });
    over.shutdown();
    // What another thread met first is the cause: it closes the stream under the receiver.
    let elsewhere = intake.and_then(|intake| intake.failure.lock().take());
    elsewhere.or(lane.failure.lock().take()).map_or(result.and(said), Err)
}

/// Starts a thread of a stream.
#[inline(never)]
fn start_in<'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: String,
    stack: usize,
    run: impl FnOnce() + Send + 'scope,
) -> Result<()> {
    let thread = std::thread::Builder::new().name(name.clone()).stack_size(stack).spawn_scoped(scope, run);
    thread.map(|_| ()).map_err(Error::io("start thread", name))
}

/// A leader of an older epoch than another stream has met since: this stream ends, and asks again who leads.
fn stale_answer(peer: &str, error: Error) -> Error {
    match error {
        Error::StaleEpoch { offered, accepted } => Error::Refused {
            peer: "this node".to_owned(),
            code: RefusalCode::StaleEpoch,
            reason: format!("{peer} leads under epoch {offered}, and {accepted} has been accepted"),
        },
        other => other,
    }
}

/// What the log finds wrong with bytes from a peer is the peer's fault.
pub(crate) fn blame(peer: &str) -> impl Fn(Error) -> Error + '_ {
    move |error| match error {
        Error::Invalid { reason } => Error::Protocol { peer: peer.to_owned(), reason },
        other => other,
    }
}

/// Sends a request and takes the answer: `ShardInfo`, or a refusal.
pub(crate) fn exchange(
    peer: &str,
    sender: &mut dyn FrameSender,
    receiver: &mut dyn FrameReceiver,
    request: SyncRequest,
    timeout: Duration,
) -> Result<ShardInfo> {
    receiver.set_timeout(Some(timeout))?;
    // For the whole answer: one that comes byte by byte does not hold this side.
    receiver.set_deadline(Instant::now().checked_add(timeout))?;
    sender.send_message(&Message::SyncRequest(request))?;
    let header = receiver.receive_header()?;
    let answer = receiver.receive_message_body(header)?;
    receiver.set_deadline(None)?;
    match answer {
        Message::ShardInfo(info) => Ok(info),
        other => Err(refusal(peer, other)),
    }
}

/// The error for a message that is a refusal, or should not be here at all.
pub(crate) fn refusal(peer: &str, message: Message) -> Error {
    match message {
        Message::Error(error) => Error::Refused { peer: peer.to_owned(), code: error.code, reason: error.text },
        other => Error::protocol(peer, format!("{:?} came where it has no meaning", other.kind())),
    }
}

#[inline(never)]
fn receive_refusal(peer: &str, receiver: &mut dyn FrameReceiver, header: FrameHeader) -> Error {
    receiver.receive_message_body(header).map_or_else(|error| error, |message| refusal(peer, message))
}

#[inline(never)]
fn misplaced(peer: &str, header: FrameHeader) -> Error {
    Error::protocol(peer, format!("{:?} is not for a follower", header.kind))
}

#[inline(never)]
fn accept_rebuild(intake: &Intake, lane: &AckLane) -> Result<()> {
    lane.send_message(&intake.word(SessionPhase::Accepted, Lsn::ZERO))
}

fn expect_sync(peer: &str, message: Message) -> Result<Lsn> {
    match message {
        Message::Sync(sync) => Ok(sync.lsn),
        other => Err(refusal(peer, other)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::commit::Outcome;
    use crate::node::{Node, NodeBuilder};
    use crate::protocol::SessionKind;
    use crate::target::LogOnly;
    use crate::transport::InProcessTransport;
    use crate::types::{NodeId, ShardId};

    #[test]
    fn windows_of_a_long_frame_end_at_pieces() {
        let ends = |mut offset: u64, mut remaining: u64| {
            let mut ends = Vec::new();
            while remaining > 0 {
                let len = window_len(offset, remaining);
                assert!(len > 0 && len <= remaining.min(TAKE_IN), "{len} of {remaining} from {offset} on");
                (offset, remaining) = (offset + len, remaining - len);
                ends.push(offset);
            }
            ends
        };
        assert_eq!(ends(4096, TAKE_IN), [4096 + TAKE_IN], "a frame that is taken in at once is");
        assert_eq!(ends(0, 3 * TAKE_IN), [TAKE_IN, 2 * TAKE_IN, 3 * TAKE_IN]);
        assert_eq!(ends(4096, 2 * TAKE_IN), [TAKE_IN, 2 * TAKE_IN, 2 * TAKE_IN + 4096]);
        assert_eq!(ends(TAKE_IN_TO - 1, TAKE_IN + 2), [TAKE_IN, TAKE_IN + TAKE_IN_TO + 1]);
        assert_eq!(window_len(u64::MAX - 5, 2 * TAKE_IN), 0, "which is refused with the offset");
    }

    #[test]
    fn where_no_thread_can_be_started_the_receiver_does_without() {
        let transport = Arc::new(InProcessTransport::new());
        let node = |directory: &Path, stack: usize| -> NodeBuilder {
            let mut builder = Node::builder(directory).transport(transport.clone());
            builder.options.on_demand_stack = stack;
            builder.heartbeat(Duration::from_millis(50)).peer_timeout(Duration::from_secs(60))
        };
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let usual = crate::on_demand::ON_DEMAND_STACK;
        let leader = node(a.path(), usual).shards(1).segment_size(1 << 20).lead("leader").unwrap();
        // More than there are addresses.
        let follower = node(b.path(), crate::on_demand::TOO_MUCH_STACK).node_id(NodeId(2));
        let follower = follower.follow("leader", Arc::new(LogOnly)).unwrap();
        let mut writer = leader.writer(ShardId(0)).unwrap();
        let mut commit = |level: &str| {
            let lsn = writer.append(b"record").unwrap();
            let deadline = Instant::now().checked_add(Duration::from_secs(60));
            let outcome = leader.wait(ShardId(0), lsn, level.parse().unwrap(), deadline);
            assert_eq!(outcome.unwrap(), Outcome::Committed, "{level}");
        };
        // A session that catches up goes over into one that keeps up, which has another name.
        let session = || {
            let status = leader.status();
            let session = status.shards[0].followers.first().and_then(|follower| follower.session);
            session.filter(|session| session.kind == SessionKind::KeepUp).map(|session| session.id)
        };
        commit("received:1");
        let first = loop {
            match session() {
                Some(id) => break id,
                None => std::thread::yield_now(),
            }
        };
        ["durable:1", "applied:1", "received:1", "durable:1"].iter().for_each(|level| commit(level));
        assert_eq!(session(), Some(first), "more than one stream");
        follower.shutdown().unwrap();
    }
}
