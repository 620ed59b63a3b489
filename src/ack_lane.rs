//! The way back of a follower's stream: acknowledgements, which the receiver and the acknowledger send.
//!
//! Three marks go back in one frame: received, durable, applied. The receiver sends one when nothing more has arrived,
//! when something else has arrived than the next little piece of log, or after a stretch of log while more keeps
//! arriving. A second thread, the acknowledger, sends what moves without it: the durable mark after a sync in the
//! background, the applied mark behind the applier, and a sign of life while the receiver is at something. Both use the
//! one sender behind a lock, held for one small frame.
//!
//! # When the acknowledger is there
//!
//! The receiver starts it before something that can take long, as waiting for the rest of a frame can, and otherwise
//! only once it has acknowledged, if more is to be said than that: but for what can take long, whoever waits at the
//! leader waits for no thread to start. It ends when nothing has moved for a while, a heartbeat at least, and all that
//! was received is durable, applied and acknowledged. On a quiet stream the receiver answers the leader's heartbeats
//! instead; a leader that beats more slowly than this node has the acknowledger stay.
//!
//! Where no thread can be started, the stream goes on without: the receiver acknowledges what it receives, what moves
//! besides goes with the answer to the next heartbeat, and with each frame it is tried again to start the acknowledger.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::caught::caught;
use crate::divergence::refusal_for;
use crate::epoch_fence::StreamUnder;
use crate::error::{Error, Result};
use crate::follower_shard::{AppliedMark, FollowerShard};
use crate::on_demand::Stay;
use crate::rebuild::intake::Intake;
use crate::shutdown::ShutdownSignal;
use crate::transport::FrameSender;
use crate::types::{Chain, Epoch, Lsn, SessionId, ShardId};
use crate::wal::{Log, LogWriter, SyncPolicy};
use crate::watermark::{WaitStrategy, Waited, Watermark, wait_any};
use crate::wire::{Ack, FLAG_ACK_APPLIED, FLAG_ACK_DURABLE, Heartbeat, Message, SessionKind, ShardInfo};

/// How long the acknowledger gathers what moved when nobody waits for it.
const ACK_LINGER: Duration = Duration::from_millis(20);

/// The way back of one stream.
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
    /// Whether anything may still be said to this leader.
    under: StreamUnder,
    /// What is received counts as applied: the target has no applier.
    applies: bool,
    /// The acknowledger is there whatever happens.
    stays: bool,
    /// The acknowledger is there. Set by the receiver before it starts it, and taken back by the acknowledger when it
    /// is about to end; it ends only if it has done so itself.
    is_acknowledging: AtomicBool,
    /// The receiver is at something that can take long. Written by it alone; it then looks whether there is an
    /// acknowledger, which in turn looks here after saying that there is none, all in one order: one of the two sees
    /// the other.
    is_busy: AtomicBool,
    /// The last attempt to start the acknowledger failed, which was said.
    was_not_started: AtomicBool,
    /// What ended the acknowledger.
    pub(crate) failure: Mutex<Option<Error>>,
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
    /// When an acknowledgement was sent that said anything new.
    moved_at: Instant,
    /// How long the acknowledger stays after that.
    stay: Stay,
}

impl AckLane {
    #[inline(never)]
    pub(crate) fn new(
        own: &mut FollowerShard,
        sender: Box<dyn FrameSender>,
        info: &ShardInfo,
        under: StreamUnder,
    ) -> Result<Box<AckLane>> {
        let ShardInfo { epoch, session, .. } = *info;
        let heartbeat = own.node.options.heartbeat;
        let is_rebuild = info.session_kind == SessionKind::Rebuild;
        let end = own.writer()?.end();
        let nothing =
            Ack { received: Lsn::ZERO, durable: Lsn::ZERO, applied: Lsn::ZERO, chain: end.chain, epoch, session };
        let now = Instant::now();
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
                sent_at: now,
                moved_at: now,
                stay: Stay::at_least(heartbeat),
            }),
            durable_in_haste: AtomicBool::new(false),
            applied_in_haste: AtomicBool::new(false),
            background: Watermark::new(Lsn::ZERO),
            under,
            applies: !is_rebuild && own.applies_at_once(),
            stays: is_rebuild || Duration::from_millis(u64::from(info.heartbeat_ms)) > heartbeat,
            is_acknowledging: AtomicBool::new(false),
            is_busy: AtomicBool::new(false),
            was_not_started: AtomicBool::new(false),
            failure: Mutex::new(None),
        }))
    }

    /// Sends something else than an acknowledgement.
    pub(crate) fn send_message(&self, message: &Message) -> Result<()> {
        let mut state = self.state.lock();
        self.under.check()?;
        state.sender.send_message(message)
    }

    /// The leader goes on under a newer epoch.
    pub(crate) fn goes_on_under(&self, epoch: Epoch) {
        self.under.goes_on_under(epoch);
    }

    /// The epoch that the leader goes on under.
    pub(crate) fn leaders_epoch(&self) -> Epoch {
        self.under.epoch()
    }

    /// Tells the leader why the stream ends, as well as may be.
    #[inline(never)]
    pub(crate) fn say_why(&self, error: &Error, intake: Option<&Intake>) {
        if let Some(word) = intake.and_then(|intake| intake.failure_word(error)) {
            let _ = self.send_message(&word);
        }
        if let Some(refusal) = refusal_for(error) {
            let _ = self.send_message(&Message::Error(refusal));
        }
    }

    /// Checks and publishes what has arrived; who waits for it is yet to be woken. Under the lock, so that no
    /// acknowledgement is made between the log's mark and what is known of it here.
    pub(crate) fn take_in(&self, writer: &mut LogWriter, len: u64) -> Result<()> {
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
    pub(crate) fn wake_readers(&self) {
        self.log.wake_readers();
        if self.applies {
            self.applied.wake();
        }
    }

    /// The first acknowledgement. Returns whether an acknowledger is to be started.
    pub(crate) fn begins(&self) -> Result<bool> {
        self.send_if_moved()?;
        Ok((self.stays || self.moves_by_itself(true)) && self.calls_acknowledger())
    }

    /// The receiver begins something that can take long. Returns whether an acknowledger is to be started.
    pub(crate) fn begins_long(&self) -> bool {
        self.is_busy.store(true, Ordering::SeqCst);
        self.calls_acknowledger()
    }

    /// The receiver is done with a frame, and has acknowledged it or waits for more to go with it. Returns whether an
    /// acknowledger is to be started.
    pub(crate) fn ends_frame(&self, is_acknowledged: bool) -> bool {
        if self.is_busy.load(Ordering::Relaxed) {
            self.is_busy.store(false, Ordering::SeqCst);
        }
        !self.is_acknowledging.load(Ordering::SeqCst)
            && (self.stays || self.moves_by_itself(is_acknowledged))
            && self.calls_acknowledger()
    }

    /// True if there is no acknowledger: the caller starts it.
    fn calls_acknowledger(&self) -> bool {
        let calls =
            !self.is_acknowledging.load(Ordering::SeqCst) && !self.is_acknowledging.swap(true, Ordering::SeqCst);
        if calls {
            self.state.lock().stay.begins(Instant::now());
        }
        calls
    }

    /// What became of starting the acknowledger. Where there can be none, the receiver goes on alone, and at the end of
    /// each frame it looks again whether one is to be started.
    #[inline(never)]
    pub(crate) fn acknowledger_started(&self, result: Result<()>) {
        let failed_before = self.was_not_started.swap(result.is_err(), Ordering::Relaxed);
        if let Err(error) = result {
            self.is_acknowledging.store(false, Ordering::SeqCst);
            if !failed_before {
                let shard = self.log.shard();
                log::warn!("shard {shard}: no thread to acknowledge, so the receiver alone does it: {error}");
            }
        }
    }

    /// Whether more is to be acknowledged although nothing more arrives: it will move, or has moved since the receiver
    /// acknowledged.
    fn moves_by_itself(&self, is_acknowledged: bool) -> bool {
        let state = self.state.lock();
        let ack = self.current(&state);
        self.is_behind(&ack) || is_acknowledged && ack != state.sent
    }

    fn is_behind(&self, ack: &Ack) -> bool {
        // What nobody asks for is not synced then, and who asks has the receiver do it, or leaves it to the background.
        let is_synced = self.log.options().sync == SyncPolicy::Never && self.background.load() <= ack.durable;
        ack.applied < ack.received || ack.durable < ack.received && !is_synced
    }

    /// Whether nothing moves without the receiver, and nothing has for a while.
    fn is_quiet(&self) -> bool {
        let state = self.state.lock();
        let ack = self.current(&state);
        ack == state.sent && !self.is_behind(&ack) && state.moved_at.elapsed() >= state.stay.duration()
    }

    /// Whether the acknowledger is to end now.
    fn ends_acknowledging(&self) -> bool {
        if self.stays || !self.is_quiet() {
            return false;
        }
        self.is_acknowledging.store(false, Ordering::SeqCst);
        // Else the receiver, which began something meanwhile or has published more, has started another one or finds
        // this one there.
        let is_needed = self.is_busy.load(Ordering::SeqCst) || !self.is_quiet();
        !is_needed || self.is_acknowledging.swap(true, Ordering::SeqCst)
    }

    /// Compares the leader's chain at its head with this log's, if this log ends there too. Behind it, only the leader
    /// can compare; that it does with every acknowledgement.
    pub(crate) fn compare(&self, peer: &str, shard: ShardId, beat: &Heartbeat) -> Result<()> {
        let state = self.state.lock();
        let is_told = beat.chain != Chain::default() && beat.head == state.received;
        if !is_told || beat.chain == state.chain || (beat.head, beat.chain) == state.before {
            return Ok(());
        }
        let (lsn, own, theirs) = (beat.head, Some(state.chain), beat.chain);
        Err(Error::ChainMismatch { peer: peer.to_owned(), shard, lsn, own, theirs })
    }

    pub(crate) fn set_haste(&self, flags: u8) {
        self.durable_in_haste.store(flags & FLAG_ACK_DURABLE != 0, Ordering::Relaxed);
        self.applied_in_haste.store(flags & FLAG_ACK_APPLIED != 0 && !self.applies, Ordering::Relaxed);
    }

    /// Whether the applied mark moves behind the receiver and somebody at the leader waits for it: then who applies is
    /// to be woken before anything is acknowledged.
    pub(crate) fn awaits_applier(&self) -> bool {
        self.applied_in_haste.load(Ordering::Relaxed)
    }

    /// Whether an acknowledgement that `flags` ask for is there as soon as the log is.
    pub(crate) fn is_due_at_once(&self, flags: u8) -> bool {
        self.applies && flags & FLAG_ACK_APPLIED != 0
    }

    /// Has the log's sync thread sync up to `head` while more is received, and the acknowledger say so.
    pub(crate) fn sync_in_background(&self, head: Lsn) {
        self.log.want_synced(head);
        self.background.advance(head);
    }

    pub(crate) fn send_if_moved(&self) -> Result<()> {
        let mut state = self.state.lock();
        let ack = self.current(&state);
        if ack == state.sent { Ok(()) } else { self.send(&mut state, ack) }
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
    pub(crate) fn run_acknowledger(&self, over: &ShutdownSignal) {
        let shard = self.log.shard();
        if let Err(error) = caught(format_args!("the sender of shard {shard}"), || self.acknowledge_until(over)) {
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
    pub(crate) fn answer(&self) -> Result<()> {
        self.beat(self.heartbeat / 2)
    }

    /// An acknowledgement although nothing moved, unless one was sent within `quiet`.
    fn beat(&self, quiet: Duration) -> Result<()> {
        let mut state = self.state.lock();
        if state.sent_at.elapsed() < quiet {
            return Ok(());
        }
        let ack = self.current(&state);
        self.send(&mut state, ack)
    }

    fn send(&self, state: &mut LaneState, ack: Ack) -> Result<()> {
        self.under.check()?;
        state.send(ack)
    }

    /// Sends the last acknowledgement, if the stream still stands.
    pub(crate) fn say_last(&self, over: &ShutdownSignal) {
        if !over.is_shutdown() {
            let _ = self.send_if_moved();
        }
    }
}

/// Wakes who waits for the log to grow when the receiver is done with a frame, however that ends: waking a thread takes
/// longer than acknowledging.
pub(crate) struct WakeReaders<'a>(pub(crate) &'a AckLane);

impl Drop for WakeReaders<'_> {
    fn drop(&mut self) {
        self.0.wake_readers();
    }
}

impl LaneState {
    fn send(&mut self, ack: Ack) -> Result<()> {
        self.sender.send_message(&Message::Ack(ack))?;
        self.sent_at = Instant::now();
        if ack != self.sent {
            self.sent = ack;
            self.moved_at = self.sent_at;
        }
        Ok(())
    }
}
