//! Stream to log: one receiver for each shard of a follower, on a thread of its own.
//!
//! The receiver reads from the socket straight into the mapped segment, at the offset where the leader has the same
//! bytes, checks every batch against the chain, publishes it, and acknowledges. It comes back by itself when the
//! stream fails, at the LSN where the log then ends, after a wait that doubles from 1 s to 30 s, shortened at random.
//!
//! Where the leader says that only a rebuild helps, the stream begins with one: see [`rebuild`](crate::rebuild). The log
//! lane is received as ever, into a log that begins with it, and the stream then goes on as any other.
//!
//! # Acknowledgements
//!
//! Three marks go back in one frame: received, durable, applied. The receiver sends one when nothing more has arrived,
//! or after a stretch of log while more keeps arriving. A second thread, the acknowledger, sends what moves without
//! it: the durable mark after a sync in the background, the applied mark behind the applier, and a sign of life while the
//! receiver is at something. Both use the one sender behind a lock, held for one small frame.
//!
//! The acknowledger is there while log arrives, and until it has found, a heartbeat after the last acknowledgement, that
//! all that was received is durable, applied and acknowledged. On a quiet stream the receiver answers the leader's
//! heartbeats instead; a leader that beats more slowly than this node has the acknowledger stay.
//!
//! While somebody at the leader waits for durability, the receiver syncs by itself before it acknowledges, if nothing
//! more has arrived: the acknowledgement then crosses no other thread. Otherwise the log's sync thread does it beside
//! the receiving.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::backoff::Backoff;
use crate::divergence::refusal_for;
use crate::error::{Error, Result};
use crate::follower_shard::{AppliedMark, FollowerShard};
use crate::limits::MAX_PATIENCE_MS;
use crate::node::NODE_THREAD_STACK;
use crate::parting::{self, OwnHistory};
use crate::rebuild::intake::{Arrived, Completion, Intake};
use crate::shutdown::{ShutdownGuard, ShutdownSignal};
use crate::transport::{Connection, FrameReceiver, FrameSender, is_closed_by_peer};
use crate::types::{Chain, Epoch, Lsn, ShardId};
use crate::wal::{Log, LogWriter};
use crate::watermark::{WaitStrategy, Waited, Watermark, wait_any};
use crate::wire::{
    Ack, FLAG_ACK_APPLIED, FLAG_ACK_DURABLE, FrameHeader, FrameKind, Heartbeat, Message, PROTOCOL_VERSIONS, Purpose,
    SessionId, SessionKind, SessionPhase, ShardInfo, SyncRequest, WalDataHeader,
};

/// Log bytes taken in before they are checked and published: small enough to be checked while they are in the cache.
const TAKE_IN: u64 = 256 * 1024;
/// Log bytes after which the receiver acknowledges although more has arrived.
const ACK_EVERY: u64 = 256 * 1024;
/// How long the acknowledger gathers what moved when nobody waits for it.
const ACK_LINGER: Duration = Duration::from_millis(20);
/// A stream that lasted this long made stable progress: the next failure is the first again.
const STABLE: Duration = Duration::from_secs(10);

/// A stream that has been agreed on.
struct Agreed {
    peer: String,
    sender: Box<dyn FrameSender>,
    receiver: Box<dyn FrameReceiver>,
    info: ShardInfo,
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
            let wait = backoff.next();
            let level = if is_closed_by_peer(&error) { log::Level::Info } else { log::Level::Warn };
            log::log!(level, "shard {shard}: {error}; trying again in {:.1} s", wait.as_secs_f32());
            let _ = stop.wait_timeout(wait);
        }
        Ok(())
    }

    /// One stream, from connecting to its end.
    fn follow_once(&mut self) -> Result<()> {
        if !self.own.awaits_leader {
            self.own.ensure_applier()?;
        }
        let over = self.own.node.stop.child();
        let agreed = self.agree(&over)?;
        self.run_agreed(agreed, &over)
    }

    /// Connects, and agrees with the leader on how this log goes on. What that takes is gone from the stack before the long
    /// time of following begins: a thread keeps every page of its stack that it once touched.
    #[inline(never)]
    fn agree(&mut self, over: &ShutdownSignal) -> Result<Box<Agreed>> {
        let Connection { peer, mut sender, mut receiver, closer } = self.own.node.connect()?;
        let close_at_stop = over.on_shutdown(move || closer.close());
        let info = self.shake_hands(&peer, sender.as_mut(), receiver.as_mut())?;
        self.own.awaits_leader = false;
        if info.session_kind != SessionKind::Rebuild {
            self.own.ensure_applier()?;
        }
        self.own.state.set_connected(true);
        // A leader that beats more slowly than this node expects is not gone.
        let slowest = Duration::from_millis(u64::from(info.heartbeat_ms.saturating_mul(3).min(MAX_PATIENCE_MS)));
        receiver.set_timeout(Some(self.own.node.options.peer_timeout.max(slowest)))?;
        Ok(Box::new(Agreed { peer, sender, receiver, info, _close_at_stop: close_at_stop }))
    }

    /// Follows as agreed, until the stream ends.
    #[inline(never)]
    fn run_agreed(&mut self, agreed: Box<Agreed>, over: &ShutdownSignal) -> Result<()> {
        let Agreed { peer, mut sender, mut receiver, info, _close_at_stop } = *agreed;
        let intake = self.take_on_rebuild(&info, (sender.as_mut(), receiver.as_mut()), over)?;
        let next = self.own.writer()?.end().head.next();
        log::info!(
            "shard {}: following {peer} from LSN {next} (leader has {} to {}, epoch {})",
            self.own.shard,
            info.tail,
            info.head,
            info.epoch
        );
        let result = self.run_stream(&peer, (sender, receiver.as_mut()), &info, intake.as_deref(), over);
        if let Some(intake) = &intake {
            intake.end(&mut self.own);
        }
        result
    }

    /// What takes in the base, if the stream begins with a rebuild.
    #[inline(never)]
    fn take_on_rebuild(
        &mut self,
        info: &ShardInfo,
        stream: (&mut dyn FrameSender, &mut dyn FrameReceiver),
        over: &ShutdownSignal,
    ) -> Result<Option<Box<Intake>>> {
        match info.session_kind {
            SessionKind::Rebuild => Ok(Some(Box::new(Intake::take_on(&mut self.own, info, stream, over)?))),
            _ => Ok(None),
        }
    }

    /// The threads of a stream that has been agreed on.
    #[inline(never)]
    fn run_stream(
        &mut self,
        peer: &str,
        (sender, receiver): (Box<dyn FrameSender>, &mut dyn FrameReceiver),
        info: &ShardInfo,
        intake: Option<&Intake>,
        over: &ShutdownSignal,
    ) -> Result<()> {
        let lane = AckLane::new(&mut self.own, sender, info)?;
        let lane = lane.as_ref();
        let completion = intake.map(|_| Completion::of(&self.own)).transpose()?;
        let shard = self.own.shard;
        let thread =
            |name: &str| std::thread::Builder::new().name(format!("tl-{name}-s{shard}")).stack_size(NODE_THREAD_STACK);
        let failed = Error::io("start a thread for", format!("shard {shard}"));
        std::thread::scope(|scope| {
            let acknowledge = || {
                let started = thread("ack").spawn_scoped(scope, || lane.run_acknowledger(over));
                started.map(|_| ()).map_err(Error::io("start a thread for", format!("shard {shard}")))
            };
            let mut started = Ok(());
            if let (Some(intake), Some(completion)) = (intake, &completion) {
                let run = move || intake.run_completer(completion, lane);
                started = thread("rebuild").spawn_scoped(scope, run).map(|_| ()).map_err(failed);
            }
            let result = started.and_then(|()| self.receive(peer, receiver, (lane, &acknowledge), intake));
            if let Err(error) = &result {
                lane.say_why(error, intake);
            }
            lane.stop(over);
            // What another thread met first is the cause: it closes the stream under the receiver.
            let elsewhere = intake.and_then(|intake| intake.failure.lock().take());
            elsewhere.or(lane.failure.lock().take()).map_or(result, Err)
        })
    }

    /// Says where this log ends, and checks that what the leader will send continues it.
    fn shake_hands(
        &mut self,
        peer: &str,
        sender: &mut dyn FrameSender,
        receiver: &mut dyn FrameReceiver,
    ) -> Result<ShardInfo> {
        let node = Arc::clone(&self.own.node);
        let manifest = node.manifest();
        let is_incomplete = self.own.is_incomplete()?;
        let kept = self.own.find_interrupted()?.map_or(0, |_| SyncRequest::REBUILD_KEPT);
        let applied = if is_incomplete { Lsn::ZERO } else { self.own.applied.load() };
        let touched = if is_incomplete { Lsn::ZERO } else { self.own.touched()? };
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
            flags: kept | if is_incomplete { SyncRequest::BASE_INCOMPLETE } else { 0 },
        };
        let own = OwnHistory { log: writer.log().as_ref(), touched };
        let timeout = node.options.handshake_timeout;
        // For the whole exchange: one that comes byte by byte does not hold this side.
        receiver.set_deadline(Instant::now().checked_add(timeout))?;
        let (info, told) = parting::exchange((sender, receiver), request, timeout, &own)?;
        receiver.set_deadline(None)?;
        node.check_topology(peer, &info)?;
        // Persisted before anything is done under it.
        node.accept_epoch(info.epoch)?;
        self.own.gives_way = told.is_some_and(|told| told.gives_way_to(info.epoch));
        if info.session_kind == SessionKind::Rebuild && info.start == Lsn::ZERO {
            return Ok(info);
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
        Ok(info)
    }

    /// Takes in frames until the stream ends.
    fn receive(
        &mut self,
        peer: &str,
        receiver: &mut dyn FrameReceiver,
        (lane, acknowledge): (&AckLane, &dyn Fn() -> Result<()>),
        intake: Option<&Intake>,
    ) -> Result<()> {
        let mut unacknowledged = 0;
        let mut arrived = Arrived::new();
        if lane.begins_acknowledged()? {
            acknowledge()?;
        }
        if let Some(intake) = intake {
            lane.send_message(&intake.word(SessionPhase::Accepted, Lsn::ZERO))?;
        }
        loop {
            let header = receiver.receive_header()?;
            self.own.state.heard_from_leader();
            match header.kind {
                FrameKind::WalData => {
                    lane.set_haste(header.flags);
                    if lane.becomes_busy() {
                        acknowledge()?;
                    }
                    // The leader hears of it first, unless it waits for the applier.
                    let _wake = (!lane.applied_in_haste.load(Ordering::Relaxed)).then(|| WakeReaders(lane));
                    let bytes = self.take_in(peer, receiver, lane)?;
                    unacknowledged += bytes;
                    let drained = !receiver.has_buffered();
                    if header.flags & FLAG_ACK_DURABLE != 0 {
                        let writer = self.own.writer()?;
                        let head = writer.end().head;
                        if drained && bytes <= TAKE_IN {
                            writer.log().wait_synced(head, None)?;
                        } else {
                            lane.sync_in_background(head);
                        }
                    }
                    if drained || unacknowledged >= ACK_EVERY {
                        lane.send_if_moved()?;
                        unacknowledged = 0;
                    }
                    lane.is_busy.store(false, Ordering::SeqCst);
                }
                FrameKind::Sync => {
                    let message = expect_sync(peer, receiver.receive_message_body(header)?)?;
                    lane.set_haste(header.flags);
                    if lane.becomes_busy() {
                        acknowledge()?;
                    }
                    if header.flags & FLAG_ACK_DURABLE != 0 {
                        let log = self.own.writer()?.log();
                        log.wait_synced(message.min(log.head()), None)?;
                    }
                    lane.send_if_moved()?;
                    lane.is_busy.store(false, Ordering::SeqCst);
                }
                FrameKind::Heartbeat => {
                    self.take_heartbeat(peer, receiver, header, lane)?;
                    lane.answer()?;
                }
                FrameKind::CaughtUp => {
                    self.take_caught_up(peer, receiver, header)?;
                }
                FrameKind::Error => return Err(refusal(peer, receiver.receive_message_body(header)?)),
                kind => match intake {
                    Some(intake) => self.take_in_base(intake, receiver, header, &mut arrived, lane)?,
                    None => return Err(Error::protocol(peer, format!("{kind:?} is not for a follower"))),
                },
            }
        }
    }

    #[inline(never)]
    fn take_heartbeat(
        &self,
        peer: &str,
        receiver: &mut dyn FrameReceiver,
        header: FrameHeader,
        lane: &AckLane,
    ) -> Result<()> {
        if let Message::Heartbeat(beat) = receiver.receive_message_body(header)? {
            self.own.state.set_leader_head(beat.head);
            lane.compare(peer, self.own.shard, &beat)?;
        }
        Ok(())
    }

    #[inline(never)]
    fn take_caught_up(&self, peer: &str, receiver: &mut dyn FrameReceiver, header: FrameHeader) -> Result<()> {
        if let Message::CaughtUp(caught_up) = receiver.receive_message_body(header)? {
            self.own.state.set_leader_head(caught_up.head);
            log::info!("shard {}: caught up with {peer} at LSN {}", self.own.shard, caught_up.head);
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
    fn take_in(&mut self, peer: &str, receiver: &mut dyn FrameReceiver, lane: &AckLane) -> Result<u64> {
        let mut fields = [0; WalDataHeader::LEN];
        receiver.receive_exact(&mut fields)?;
        let WalDataHeader { segment, mut offset } =
            WalDataHeader::decode(&fields).map_err(|error| error.from_peer(peer))?;
        let total = u64::from(receiver.remaining());
        let node = Arc::clone(&self.own.node);
        let writer = self.own.writer()?;
        while receiver.remaining() > 0 {
            let len = u64::from(receiver.remaining()).min(TAKE_IN);
            let window = writer.ingest_window(segment, offset, len).map_err(blame(peer))?;
            receiver.receive_exact(window)?;
            let len = window.len() as u64;
            offset += len;
            lane.take_in(writer, len).map_err(blame(peer))?;
            if receiver.remaining() > 0 || lane.applied_in_haste.load(Ordering::Relaxed) {
                lane.wake_readers();
            }
            let epoch = writer.end().epoch;
            if epoch > node.manifest().epoch {
                // The leader goes on under a newer term. Should the node stop right here, the log says so too.
                node.accept_epoch(epoch)?;
            }
        }
        Ok(total)
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

fn expect_sync(peer: &str, message: Message) -> Result<Lsn> {
    match message {
        Message::Sync(sync) => Ok(sync.lsn),
        other => Err(refusal(peer, other)),
    }
}

/// The way back: acknowledgements of one stream, sent by the receiver and by the acknowledger.
pub(crate) struct AckLane {
    log: Arc<Log>,
    applied: Arc<AppliedMark>,
    epoch: Epoch,
    session: SessionId,
    heartbeat: Duration,
    state: Mutex<LaneState>,
    /// Somebody at the leader waits for this mark: it is acknowledged as soon as it moves. Set by the receiver.
    durable_in_haste: AtomicBool,
    applied_in_haste: AtomicBool,
    /// Up to where the receiver has left syncing to the log's sync thread. Moved by the receiver only.
    background: Watermark,
    /// What is received counts as applied: the target has no applier.
    applies: bool,
    /// The acknowledger is there whatever happens.
    stays: bool,
    /// The acknowledger is there. Set by the receiver before it starts it, and taken back by the acknowledger when it is
    /// about to end; it ends only if it has done so itself.
    is_acknowledging: AtomicBool,
    /// The receiver is taking in a frame that can take long. Written by it alone; it then looks whether there is an
    /// acknowledger, which in turn looks here after saying that there is none, all in one order: one of the two sees the
    /// other.
    is_busy: AtomicBool,
    /// What ended the acknowledger.
    failure: Mutex<Option<Error>>,
}

struct LaneState {
    sender: Box<dyn FrameSender>,
    /// Head and chain, set by the receiver.
    received: Lsn,
    chain: Chain,
    /// The chain before the last that arrived, and its LSN: the same LSN may have two, before and after a batch that
    /// seals a segment.
    before: (Lsn, Chain),
    sent: Ack,
    sent_at: Instant,
}

impl AckLane {
    #[inline(never)]
    fn new(own: &mut FollowerShard, sender: Box<dyn FrameSender>, info: &ShardInfo) -> Result<Box<AckLane>> {
        let ShardInfo { epoch, session, .. } = *info;
        let heartbeat = own.node.options.heartbeat;
        let is_rebuild = info.session_kind == SessionKind::Rebuild;
        let end = own.writer()?.end();
        let nothing =
            Ack { received: Lsn::ZERO, durable: Lsn::ZERO, applied: Lsn::ZERO, chain: end.chain, epoch, session };
        Ok(Box::new(AckLane {
            log: own.log()?,
            applied: Arc::clone(&own.applied),
            epoch,
            session,
            heartbeat,
            state: Mutex::new(LaneState {
                sender,
                received: end.head,
                chain: end.chain,
                before: (end.head, end.chain),
                sent: nothing,
                sent_at: Instant::now(),
            }),
            durable_in_haste: AtomicBool::new(false),
            applied_in_haste: AtomicBool::new(false),
            background: Watermark::new(Lsn::ZERO),
            applies: !is_rebuild && own.applies_at_once(),
            stays: is_rebuild || Duration::from_millis(u64::from(info.heartbeat_ms)) > heartbeat,
            is_acknowledging: AtomicBool::new(false),
            is_busy: AtomicBool::new(false),
            failure: Mutex::new(None),
        }))
    }

    /// Sends something else than an acknowledgement.
    pub(crate) fn send_message(&self, message: &Message) -> Result<()> {
        self.state.lock().sender.send_message(message)
    }

    /// Tells the leader why the stream ends, as well as may be.
    #[inline(never)]
    fn say_why(&self, error: &Error, intake: Option<&Intake>) {
        if let Some(word) = intake.and_then(|intake| intake.failure_word(error)) {
            let _ = self.send_message(&word);
        }
        if let Some(refusal) = refusal_for(error) {
            let _ = self.send_message(&Message::Error(refusal));
        }
    }

    /// Checks and publishes what has arrived; who waits for it is yet to be woken. Under the lock, so that no acknowledgement is made between the log's mark
    /// and what is known of it here.
    fn take_in(&self, writer: &mut LogWriter, len: u64) -> Result<()> {
        let mut state = self.state.lock();
        let before = (state.received, state.chain);
        state.received = writer.ingest_quietly(len)?;
        state.chain = writer.end().chain;
        if state.chain != before.1 {
            state.before = before;
        }
        if self.applies {
            self.applied.publish_quietly(state.received.max(self.applied.load()));
        }
        Ok(())
    }

    /// Wakes those who wait for what has been taken in.
    fn wake_readers(&self) {
        self.log.wake_readers();
        if self.applies {
            self.applied.wake();
        }
    }

    /// The first acknowledgement. Returns whether an acknowledger is to be started.
    fn begins_acknowledged(&self) -> Result<bool> {
        self.send_if_moved()?;
        let starts = self.stays || !self.is_settled(&self.state.lock());
        self.is_acknowledging.store(starts, Ordering::SeqCst);
        Ok(starts)
    }

    /// The receiver is at something that can take long. Returns whether an acknowledger is to be started.
    fn becomes_busy(&self) -> bool {
        self.is_busy.store(true, Ordering::SeqCst);
        !self.is_acknowledging.load(Ordering::SeqCst) && !self.is_acknowledging.swap(true, Ordering::SeqCst)
    }

    /// Whether nothing moves without the receiver.
    fn is_settled(&self, state: &LaneState) -> bool {
        let ack = self.current(state);
        ack == state.sent && ack.durable == ack.received && ack.applied == ack.received
    }

    /// Whether the acknowledger is to end now.
    fn ends_acknowledging(&self) -> bool {
        if self.stays || !self.is_settled(&self.state.lock()) {
            return false;
        }
        self.is_acknowledging.store(false, Ordering::SeqCst);
        // Else the receiver, which began something meanwhile, has started another one or finds this one there.
        let stays = (self.is_busy.load(Ordering::SeqCst) || !self.is_settled(&self.state.lock()))
            && !self.is_acknowledging.swap(true, Ordering::SeqCst);
        !stays
    }

    /// Compares the leader's chain at its head with this log's, if this log ends there too. Behind it, only the leader
    /// can compare; that it does with every acknowledgement.
    fn compare(&self, peer: &str, shard: ShardId, beat: &Heartbeat) -> Result<()> {
        let state = self.state.lock();
        let is_told = beat.chain != Chain::default() && beat.head == state.received;
        if !is_told || beat.chain == state.chain || (beat.head, beat.chain) == state.before {
            return Ok(());
        }
        let (lsn, own, theirs) = (beat.head, Some(state.chain), beat.chain);
        Err(Error::ChainMismatch { peer: peer.to_owned(), shard, lsn, own, theirs })
    }

    fn set_haste(&self, flags: u8) {
        self.durable_in_haste.store(flags & FLAG_ACK_DURABLE != 0, Ordering::Relaxed);
        self.applied_in_haste.store(flags & FLAG_ACK_APPLIED != 0 && !self.applies, Ordering::Relaxed);
    }

    /// Has the log's sync thread sync up to `head` while more is received, and the acknowledger say so.
    fn sync_in_background(&self, head: Lsn) {
        self.log.want_synced(head);
        self.background.advance(head);
    }

    fn send_if_moved(&self) -> Result<()> {
        let mut state = self.state.lock();
        let ack = self.current(&state);
        if ack == state.sent { Ok(()) } else { state.send(ack) }
    }

    /// What there is to acknowledge. The log may be ahead of what the receiver has said: then so may the other marks,
    /// and they wait for the next acknowledgement.
    fn current(&self, state: &LaneState) -> Ack {
        Ack {
            received: state.received,
            durable: self.log.synced().load().min(state.received),
            applied: self.applied.load().min(state.received),
            chain: state.chain,
            epoch: self.epoch,
            session: self.session,
        }
    }

    /// Acknowledges what moves without the receiver, and shows that this node lives.
    fn run_acknowledger(&self, over: &ShutdownSignal) {
        if let Err(error) = self.acknowledge_until(over) {
            *self.failure.lock() = Some(error);
            over.shutdown();
        }
    }

    fn acknowledge_until(&self, over: &ShutdownSignal) -> Result<()> {
        loop {
            let (sent, sent_at) = {
                let state = self.state.lock();
                (state.sent, state.sent_at)
            };
            // While the durable mark is in haste, the receiver syncs and acknowledges by itself, unless it says that it
            // has left it to others: to wait for that here would only take the processor away from it.
            let durable_in_haste = self.durable_in_haste.load(Ordering::Relaxed);
            let background = self.background.load() > sent.durable;
            let durable = match (durable_in_haste, background) {
                (true, false) => self.background.until(sent.durable.next()),
                _ => self.log.synced().until(sent.durable.next()),
            };
            // Where the receiver moves the applied mark, it acknowledges it too.
            let applied = if self.applies { over.until() } else { self.applied.own().until(sent.applied.next()) };
            let conditions = [over.until(), durable, applied];
            match wait_any(&conditions, WaitStrategy::Park, sent_at.checked_add(self.heartbeat)) {
                Waited::Reached(0) => return Ok(()),
                Waited::Reached(1) if durable_in_haste && !background => continue,
                Waited::Reached(mark) => {
                    let haste = if mark == 1 { &self.durable_in_haste } else { &self.applied_in_haste };
                    if !haste.load(Ordering::Relaxed) && self.linger(over, sent) {
                        return Ok(());
                    }
                    self.send_if_moved()?;
                }
                Waited::TimedOut => {
                    self.beat(self.heartbeat)?;
                    if self.ends_acknowledging() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Gathers what moves for a moment, unless a mark moves that somebody waits for. True if the stream is over.
    fn linger(&self, over: &ShutdownSignal, sent: Ack) -> bool {
        let hasty = if self.applied_in_haste.load(Ordering::Relaxed) {
            self.applied.own().until(sent.applied.next())
        } else {
            self.background.until(sent.durable.next().max(self.background.load().next()))
        };
        let deadline = Instant::now().checked_add(ACK_LINGER);
        wait_any(&[over.until(), hasty], WaitStrategy::Park, deadline) == Waited::Reached(0)
    }

    /// Answers a heartbeat of the leader, which need not hear from this node more often than it beats itself.
    fn answer(&self) -> Result<()> {
        self.beat(self.heartbeat / 2)
    }

    /// An acknowledgement although nothing moved, unless one was sent within `quiet`.
    fn beat(&self, quiet: Duration) -> Result<()> {
        let mut state = self.state.lock();
        if state.sent_at.elapsed() < quiet {
            return Ok(());
        }
        let ack = self.current(&state);
        state.send(ack)
    }

    /// Sends the last acknowledgement, if the stream still stands, and ends the acknowledger.
    fn stop(&self, over: &ShutdownSignal) {
        if !over.is_shutdown() {
            let _ = self.send_if_moved();
        }
        over.shutdown();
    }
}

/// Wakes who waits for the log to grow when the receiver is done with a frame, however that ends: waking a thread takes
/// longer than acknowledging.
struct WakeReaders<'a>(&'a AckLane);

impl Drop for WakeReaders<'_> {
    fn drop(&mut self) {
        self.0.wake_readers();
    }
}

impl LaneState {
    fn send(&mut self, ack: Ack) -> Result<()> {
        self.sender.send_message(&Message::Ack(ack))?;
        self.sent = ack;
        self.sent_at = Instant::now();
        Ok(())
    }
}
