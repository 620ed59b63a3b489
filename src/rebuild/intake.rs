//! The follower's side of one rebuild's stream: what to do with its frames, and completing it.
//!
//! | thread | does |
//! |---|---|
//! | receiver | takes on the session, puts blocks |
//! | applier | applies the log lane through the session |
//! | completer | saves how far the base has come; waits until base and log are there, completes, reports |
//!
//! They share the [`RebuildSession`] behind a lock. The completer has a thread of its own because the receiver waits in
//! the socket, where a quiet leader may send nothing for long, and because making a large base durable takes time,
//! during which signs of life must go on.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::ack_lane::AckLane;
use crate::caught::caught;
use crate::checkpointer::{CheckpointShard, Checkpointer};
use crate::epoch_fence::StreamUnder;
use crate::error::{Error, RefusalCode, Result};
use crate::follower::ShardState;
use crate::follower_shard::{AppliedMark, FollowerShard, RebuildOfApplier};
use crate::host::Host;
use crate::limits::MAX_BASE_DATA_LEN;
use crate::rebuild::interrupted::Interrupted;
use crate::rebuild::{RebuildContract, RebuildSession};
use crate::receiver::{blame, refusal};
use crate::shutdown::ShutdownSignal;
use crate::small_file;
use crate::target::{BaseInfo, BlockId, ReplicationTarget};
use crate::transport::{FrameReceiver, FrameSender};
use crate::types::{Epoch, Lsn, SessionId};
use crate::wal::{Log, unix_ms};
use crate::watermark::{Until, WaitStrategy, Waited, Watermark, wait_any};
use crate::wire::{
    BaseComplete, BaseDataHeader, Heartbeat, Message, ProtocolVersion, SessionAck, SessionAction, SessionControl,
    SessionFailure, SessionKind, SessionPhase, ShardInfo,
};

/// A rebuild that this stream serves.
pub(crate) struct Intake {
    contract: RebuildContract,
    session: Arc<Mutex<RebuildSession>>,
    /// What ended it on another thread.
    pub(crate) failure: Arc<Mutex<Option<Error>>>,
    over: ShutdownSignal,
    /// Bytes of the base that have come. Moved by the receiver.
    base_bytes: Watermark,
    /// 1 once the base is complete. Moved by the receiver.
    base_complete: Watermark,
    /// The leader's version knows that making it all durable takes its time.
    tells_making_durable: bool,
}

/// Bytes of the base after which it is saved how far it has come, at most, unless saving is slow: what an interruption
/// costs. Small bases are saved whenever they have doubled.
const SAVE_EVERY: u64 = 64 << 20;

/// Saving takes its time where records write blocks all over the target meanwhile, and a rebuild does not complete
/// while it goes on. After one that took longer than this, the next one waits.
const SLOW_SAVE: Duration = Duration::from_millis(100);

/// For so many times what came during it, so that saving takes a third of the time at most.
const REST: u64 = 2;

/// But for no more bytes than this.
const LONGEST_REST: u64 = 8 * SAVE_EVERY;

/// What of the base has arrived. The receiver's own.
pub(crate) struct Arrived {
    bytes: Vec<u8>,
    checksum: crc32fast::Hasher,
    /// Of an image without numbered blocks.
    chunks: u64,
}

impl Arrived {
    pub(crate) fn new() -> Arrived {
        Arrived { bytes: Vec::new(), checksum: crc32fast::Hasher::new(), chunks: 0 }
    }
}

impl Intake {
    /// Waits until the leader starts the session, then takes it on: the target gets its mark and the shard an empty
    /// log, or both go on from where an interrupted rebuild left them. Signs of life go out meanwhile. A refusal is
    /// told to the leader.
    ///
    /// # Errors
    ///
    /// What ended the stream; [`Error::Invalid`] if what is here is newer than the base, and then nothing has changed.
    /// [`Error::Refused`] if it only became so since the leader was told what is here: it is to be told again.
    pub(crate) fn take_on(
        own: &mut FollowerShard,
        info: &ShardInfo,
        (sender, receiver): (&mut dyn FrameSender, &mut dyn FrameReceiver),
        (over, under): (&ShutdownSignal, &StreamUnder),
    ) -> Result<Intake> {
        let start = await_start(info, sender, receiver)?;
        // Its turn may have been long in coming: what is here is not given up for a leader that has been succeeded.
        under.check()?;
        let base = BaseInfo { base_lsn: start.base_lsn, block_len: start.block_len, block_count: start.block_count };
        let contract = RebuildContract { session: info.session, epoch: info.epoch, target: info.target, base };
        let goes_on = info.start != Lsn::ZERO && start.log_start == info.start;
        let is_gap = !goes_on && start.log_start > base.base_lsn.next();
        if start.log_start == Lsn::ZERO || is_gap || base.block_len > MAX_BASE_DATA_LEN {
            return Err(Error::protocol(
                receiver.peer(),
                format!(
                    "it starts a rebuild with blocks of {} bytes at LSN {} and a log from LSN {} on",
                    base.block_len, base.base_lsn, start.log_start
                ),
            ));
        }
        let failure_of = |reason| failed(&contract, reason);
        let heartbeat = own.node.options.heartbeat;
        let mut taken = while_beating(sender, heartbeat, info.epoch, over, || {
            own.owe(&contract)?;
            match own.interrupted.take() {
                Some(interrupted) if goes_on => Self::resume(own, contract, &interrupted, over).map_err(begin_anew),
                interrupted => {
                    if interrupted.is_some() {
                        let head = own.log()?.head();
                        own.forget_interrupted(&format!("the leader's log no longer has what comes after LSN {head}"))?;
                    }
                    Self::prepare(own, contract, &start, over)
                }
            }
        });
        if let Ok(intake) = &mut taken {
            intake.tells_making_durable = info.version >= ProtocolVersion::V2.to_wire();
        }
        if let Err(error) = &taken {
            let reason = match error {
                Error::Refused { code: RefusalCode::Superseded, .. } => SessionFailure::Superseded,
                error if error.is_corruption() => SessionFailure::LocalBaseCorrupt,
                _ => SessionFailure::BaseUnavailable,
            };
            let _ = sender.send_message(&failure_of(reason));
        }
        taken
    }

    fn prepare(
        own: &mut FollowerShard,
        contract: RebuildContract,
        start: &SessionControl,
        over: &ShutdownSignal,
    ) -> Result<Intake> {
        own.stop_applier();
        let (shard, base) = (own.shard, contract.base);
        let durable = own.target().durable_applied(shard)?.unwrap_or(Lsn::ZERO);
        let here = durable.max(own.applied.load());
        let is_newer = !own.is_incomplete()? && here > base.base_lsn;
        if is_newer && own.gives_way {
            log::warn!("shard {shard}: what was applied up to LSN {here} is not the leader's, and is given up");
            own.withdraw()?;
            own.target().give_up(shard)?;
        } else if is_newer && here > own.told_applied {
            // It was decided by less than is here now: as long as its log lasted, the applier went on. With this much
            // the log may do.
            let (told, base_lsn) = (own.told_applied, base.base_lsn);
            let reason = format!(
                "a rebuild from LSN {base_lsn} was to begin, and LSN {here} has been applied since the leader was told of \
                 LSN {told}"
            );
            return Err(Error::Refused { peer: "this node".to_owned(), code: RefusalCode::Superseded, reason });
        } else if is_newer && here <= contract.target {
            // The leader's log has come further, and its target will.
            let (base_lsn, target) = (base.base_lsn, contract.target);
            let reason = format!(
                "a rebuild from LSN {base_lsn} was to begin, of a log that goes on to LSN {target}, and LSN {here} has been \
                 applied here: a newer base will do"
            );
            return Err(Error::Refused { peer: "this node".to_owned(), code: RefusalCode::Superseded, reason });
        } else if is_newer {
            return Err(Error::invalid(format!(
                "shard {shard} has applied LSN {here}, which is newer than the offered base at LSN {}; nothing was \
                 changed; make the node with the newer state the leader, or start with an empty directory",
                base.base_lsn
            )));
        }
        own.withdraw()?;
        // Before the target is emptied: what the file says would not be true any more.
        small_file::forget(&own.node.rebuild_path(shard))?;
        let mut session = RebuildSession::new(shard, Arc::clone(own.target()));
        session.start(contract)?;
        own.replace_log(start.log_start, base.base_lsn, contract.epoch)?;
        log::info!(
            "shard {shard}: rebuilding from a base at LSN {} of {} blocks, and the log from LSN {} to at least {}",
            base.base_lsn,
            base.block_count,
            start.log_start,
            contract.target
        );
        let intake = Intake::new(own, contract, session, over);
        if base.is_numbered() {
            own.start_applier(Some(intake.of_applier()))?;
        }
        Ok(intake)
    }

    /// Goes on with an interrupted rebuild: keeps its blocks, and applies the local log over them, which marks the
    /// blocks that are ahead of the base. On an error the next rebuild begins anew, unless the node is stopping.
    fn resume(
        own: &mut FollowerShard,
        contract: RebuildContract,
        interrupted: &Interrupted,
        over: &ShutdownSignal,
    ) -> Result<Intake> {
        let shard = own.shard;
        let resumed = caught(format_args!("the target of shard {shard}"), || {
            let session = Self::keep(own, contract, interrupted)?;
            let intake = Intake::new(own, contract, session, over);
            intake.rehydrate(own).map(|()| intake)
        });
        resumed.inspect_err(|error| {
            own.stop_applier();
            if !own.node.stop.is_shutdown()
                && let Err(error) = own.forget_interrupted(&error.to_string())
            {
                log::error!("{error}");
            }
        })
    }

    fn keep(own: &mut FollowerShard, contract: RebuildContract, interrupted: &Interrupted) -> Result<RebuildSession> {
        own.withdraw()?;
        own.stop_applier();
        let (shard, base, kept) = (own.shard, contract.base, interrupted.kept);
        let log = own.log()?;
        // Blocks that are sent from now on stand at the new base LSN: the log after that is needed too.
        if log.tail() > base.base_lsn.next() {
            return Err(Error::invalid(format!(
                "the base stands at LSN {}, and the local log begins with LSN {}",
                base.base_lsn,
                log.tail()
            )));
        }
        if (contract.epoch, base.block_len) != (interrupted.epoch, interrupted.block_len) {
            return Err(Error::invalid(format!(
                "its blocks have {} bytes and came under epoch {}; these have {} bytes under epoch {}",
                interrupted.block_len, interrupted.epoch, base.block_len, contract.epoch
            )));
        }
        // What is applied from the local log must be there after a crash.
        log.sync_all()?;
        let mut session = RebuildSession::new(shard, Arc::clone(own.target()));
        session.resume(contract, kept)?;
        own.set_back_applied(session.progress().applied);
        log::info!(
            "shard {shard}: going on with a rebuild: {} of {} blocks are here, the base is at LSN {}, the local log has LSN \
             {} to {} and goes on to at least {}",
            kept.blocks,
            base.block_count,
            base.base_lsn,
            log.tail(),
            log.head(),
            contract.target
        );
        Ok(session)
    }

    /// Applies the local log, before the first block comes.
    fn rehydrate(&self, own: &mut FollowerShard) -> Result<()> {
        let head = own.log()?.head();
        own.start_applier(Some(self.of_applier()))?;
        let conditions = [own.applied.own().until(head), self.over.until()];
        if wait_any(&conditions, WaitStrategy::Park, None) != Waited::Reached(0) {
            return Err(self.failure.lock().take().unwrap_or(Error::ShutDown));
        }
        self.session.lock().check_kept()
    }

    fn new(own: &FollowerShard, contract: RebuildContract, session: RebuildSession, over: &ShutdownSignal) -> Intake {
        own.state.set_rebuild(session.progress());
        Intake {
            contract,
            session: Arc::new(Mutex::new(session)),
            failure: Arc::default(),
            over: over.clone(),
            base_bytes: Watermark::default(),
            base_complete: Watermark::default(),
            tells_making_durable: false,
        }
    }

    fn of_applier(&self) -> RebuildOfApplier {
        RebuildOfApplier {
            session: Arc::clone(&self.session),
            failure: Arc::clone(&self.failure),
            over: self.over.clone(),
        }
    }

    /// The follower's word about the session.
    pub(crate) fn word(&self, phase: SessionPhase, achieved: Lsn) -> Message {
        let RebuildContract { session, epoch, .. } = self.contract;
        let blocks = if phase == SessionPhase::Accepted { self.session.lock().progress().blocks_kept } else { 0 };
        Message::SessionAck(SessionAck { session, epoch, phase, achieved, reason: SessionFailure::None, blocks })
    }

    /// One `BaseData` frame: its blocks are put, unless the log has written them since, and the leader is told.
    pub(crate) fn take_base(
        &self,
        own: &FollowerShard,
        receiver: &mut dyn FrameReceiver,
        arrived: &mut Arrived,
        lane: &AckLane,
    ) -> Result<()> {
        let mut fields = [0; BaseDataHeader::LEN];
        receiver.receive_exact(&mut fields)?;
        let peer = receiver.peer().to_owned();
        let header = BaseDataHeader::decode(&fields).map_err(|error| error.from_peer(&peer))?;
        let left = receiver.remaining();
        // No more than a frame can have.
        arrived.bytes.resize(usize::try_from(left).unwrap_or_default(), 0);
        receiver.receive_exact(&mut arrived.bytes)?;
        if !self.is_about(header.session, header.epoch) {
            return Ok(());
        }
        let mut of_run = crc32fast::Hasher::new();
        of_run.update(&arrived.bytes);
        let checksum = of_run.clone().finalize();
        if header.length != left || left == 0 || header.checksum != checksum {
            return Err(Error::protocol(
                peer,
                format!(
                    "blocks from {} on came damaged: {left} bytes with checksum {checksum:08x}, announced were {} with {:08x}",
                    header.block, header.length, header.checksum
                ),
            ));
        }
        arrived.checksum.combine(&of_run);
        self.put_blocks(&peer, header.block, arrived)?;
        self.base_bytes.advance(Lsn(self.base_bytes.load().0.saturating_add(u64::from(left))));
        let progress = self.session.lock().progress();
        own.state.set_rebuild(progress);
        lane.send_message(&self.word(SessionPhase::Running, progress.applied))
    }

    fn put_blocks(&self, peer: &str, first: u64, arrived: &mut Arrived) -> Result<()> {
        let block_len = usize::try_from(self.contract.base.block_len).unwrap_or(usize::MAX);
        let is_chunk = block_len == 0;
        let bytes = &arrived.bytes;
        if !is_chunk && !bytes.len().is_multiple_of(block_len) || is_chunk && first != arrived.chunks {
            return Err(Error::protocol(peer, format!("block {first} has {} bytes or the wrong place", bytes.len())));
        }
        // The applier comes in between one frame and the next.
        let mut session = self.session.lock();
        if is_chunk {
            session.apply_base_block(BlockId(first), bytes).map_err(blame(peer))?;
            arrived.chunks += 1;
        } else {
            session.apply_base_blocks(BlockId(first), bytes).map_err(blame(peer))?;
        }
        Ok(())
    }

    /// The end of the base.
    pub(crate) fn take_end(
        &self,
        own: &mut FollowerShard,
        peer: &str,
        end: BaseComplete,
        arrived: &Arrived,
    ) -> Result<()> {
        if !self.is_about(end.session, end.epoch) {
            return Ok(());
        }
        let checksum = arrived.checksum.clone().finalize();
        if end.checksum != checksum || end.base_lsn != self.contract.base.base_lsn {
            return Err(Error::protocol(peer, format!("the base at LSN {} came damaged", self.contract.base.base_lsn)));
        }
        let progress = {
            let mut session = self.session.lock();
            session.mark_base_complete(end.blocks).map_err(blame(peer))?;
            session.progress()
        };
        own.state.set_rebuild(progress);
        // A snapshot is there as a whole now: the log that has waited follows it.
        if !self.contract.base.is_numbered() {
            own.start_applier(Some(self.of_applier()))?;
        }
        self.base_complete.advance(Lsn(1));
        Ok(())
    }

    /// The leader's word about the session.
    pub(crate) fn take_control(&self, own: &FollowerShard, peer: &str, control: SessionControl) -> Result<()> {
        if !self.is_about(control.session, control.epoch) {
            return Ok(());
        }
        match control.action {
            SessionAction::Accept => {
                log::info!("shard {}: rebuilt, and {peer} counts on it", own.shard);
                Ok(())
            }
            SessionAction::Cancel => {
                self.session.lock().cancel(SessionFailure::Cancelled);
                own.state.set_rebuild(self.session.lock().progress());
                Err(cancelled(peer))
            }
            other => Err(Error::protocol(peer, format!("it says {other:?} in the middle of a session"))),
        }
    }

    /// Waits until the rebuild can be completed, completes it, and reports that. For a thread of its own. What goes
    /// wrong ends the stream.
    pub(crate) fn run_completer(&self, own: &Completion, lane: &AckLane) {
        let shard = own.log.shard();
        if let Err(error) = caught(format_args!("the target of shard {shard}"), || self.complete_when_ready(own, lane))
        {
            self.failure.lock().get_or_insert(error);
            self.over.shutdown();
        }
    }

    fn complete_when_ready(&self, own: &Completion, lane: &AckLane) -> Result<()> {
        let over = self.over.until();
        let is_reached =
            |condition: Until<'_>| wait_any(&[condition, over], WaitStrategy::Park, None) == Waited::Reached(0);
        if !self.save_until_complete(own)? {
            return Ok(());
        }
        lane.send_message(&self.word(SessionPhase::BaseComplete, own.applied.load()))?;
        let needed = self.session.lock().needed();
        let log = &own.log;
        if !is_reached(own.applied.own().until(needed)) || !is_reached(log.written().until(needed)) {
            return Ok(());
        }
        if self.tells_making_durable {
            lane.send_message(&self.word(SessionPhase::MakingDurable, needed))?;
        }
        let achieved = {
            // The applier waits here, so nothing is applied that the log does not have on stable storage.
            // What has come since can be much, and takes its own time.
            let mut session = self.session.lock();
            log.sync_up_to(session.progress().applied)?;
            let achieved = session.try_complete()?;
            own.state.set_rebuild(session.progress());
            achieved
        };
        let Some(achieved) = achieved else { return Ok(()) };
        // What stays does no harm: the target is whole, and before a rebuild begins anew the one must go, and the other
        // is overwritten.
        for path in [&own.path, &own.owed_path] {
            if let Err(error) = small_file::forget(path) {
                log::warn!("shard {}: {error}", log.shard());
            }
        }
        own.checkpointer.take_up(log.shard(), own.taken_up.clone());
        own.applied.tell();
        own.host.set_whole();
        log::info!("shard {}: the rebuild is complete at LSN {achieved}", log.shard());
        lane.send_message(&self.word(SessionPhase::Completed, achieved))
    }

    /// Saves how far the base has come, again and again, until it is complete. False if the stream ends first. What is
    /// left then becomes durable when the rebuild completes: to save it now would have the target written twice where
    /// records write to it all the time.
    fn save_until_complete(&self, own: &Completion) -> Result<bool> {
        let mut due = Lsn(1);
        loop {
            let conditions = [self.base_complete.until(Lsn(1)), self.over.until(), self.base_bytes.until(due)];
            match wait_any(&conditions, WaitStrategy::Park, None) {
                Waited::Reached(0) => return Ok(true),
                Waited::Reached(2) => {
                    let (begun, since) = (self.base_bytes.load().0, Instant::now());
                    self.save(own)?;
                    due = Lsn(next_save(begun..self.base_bytes.load().0, since.elapsed()));
                }
                _ => return Ok(false),
            }
        }
    }

    /// Makes durable what has come and been applied, then notes it for a rebuild that goes on with it.
    fn save(&self, own: &Completion) -> Result<()> {
        if !own.target.resumes_bases() {
            return Ok(());
        }
        // One that has failed, in the middle of a run perhaps, leaves nothing to go on with.
        let Some(kept) = self.session.lock().kept() else { return Ok(()) };
        let shard = own.log.shard();
        own.applied.sync(own.target.as_ref(), shard)?;
        let RebuildContract { epoch, base, .. } = self.contract;
        Interrupted { shard, block_len: base.block_len, epoch, kept }.save(&own.path)?;
        // Log before that is not needed here any more.
        own.taken_up.saved.advance(kept.applied);
        Ok(())
    }

    /// Ends the session if it is still active: the stream is over. If what is here is at fault, the next begins anew.
    pub(crate) fn end(&self, own: &mut FollowerShard) {
        self.session.lock().cancel(SessionFailure::TransportLost);
        let (is_completed, failure, progress) = {
            let session = self.session.lock();
            (session.is_completed(), session.failure(), session.progress())
        };
        own.state.set_rebuild(progress);
        if !is_completed {
            own.stop_applier();
        }
        // Of what could not be synced, blocks that are kept may have had a part: it would not be written to them again.
        let is_lost = !is_completed && own.applied.has_failed_to_sync();
        if (failure == SessionFailure::LocalBaseCorrupt || is_lost)
            && let Err(error) = own.forget_interrupted("it has failed here")
        {
            log::error!("{error}");
        }
    }

    /// What the leader is told if the session ends here and now.
    pub(crate) fn failure_word(&self, error: &Error) -> Option<Message> {
        let session = self.session.lock();
        let reason = match error.cause() {
            Error::Corrupt { .. } => SessionFailure::LocalBaseCorrupt,
            Error::Poisoned { .. } => SessionFailure::LocalWalCorrupt,
            Error::Network { .. } => return None,
            _ => SessionFailure::Cancelled,
        };
        session.active().then(|| failed(&self.contract, reason))
    }

    fn is_about(&self, session: SessionId, epoch: Epoch) -> bool {
        (session, epoch) == (self.contract.session, self.contract.epoch)
    }
}

/// What the completer works with.
pub(crate) struct Completion {
    log: Arc<Log>,
    applied: Arc<AppliedMark>,
    state: Arc<ShardState>,
    checkpointer: Arc<Checkpointer>,
    /// Who decides about those whom this node feeds.
    host: Arc<Host>,
    taken_up: CheckpointShard,
    target: Arc<dyn ReplicationTarget>,
    /// Where it is kept how far the rebuild has come, and up to where it must.
    path: PathBuf,
    owed_path: PathBuf,
}

impl Completion {
    pub(crate) fn of(own: &FollowerShard) -> Result<Completion> {
        Ok(Completion {
            log: own.log()?,
            applied: Arc::clone(&own.applied),
            state: Arc::clone(&own.state),
            checkpointer: Arc::clone(&own.checkpointer),
            host: Arc::clone(&own.server.shard(own.shard)?.host),
            taken_up: own.checkpoint_shard()?,
            target: Arc::clone(own.target()),
            path: own.node.rebuild_path(own.shard),
            owed_path: own.node.owed_path(own.shard),
        })
    }
}

/// The bytes of the base with which it is saved next how far it has come, after a save during which `come` bytes came.
fn next_save(come: Range<u64>, took: Duration) -> u64 {
    let due = come.start.saturating_add(come.start.min(SAVE_EVERY));
    let during = come.end.saturating_sub(come.start);
    let rest = if took > SLOW_SAVE { during.saturating_mul(REST).min(LONGEST_REST) } else { 0 };
    due.max(come.end.saturating_add(rest))
}

fn failed(contract: &RebuildContract, reason: SessionFailure) -> Message {
    let RebuildContract { session, epoch, .. } = *contract;
    let phase = SessionPhase::Failed;
    Message::SessionAck(SessionAck { session, epoch, phase, achieved: Lsn::ZERO, reason, blocks: 0 })
}

/// What an interrupted rebuild has left cannot be used: the next stream begins anew, so nothing is lost for good.
fn begin_anew(error: Error) -> Error {
    match error.cause() {
        Error::Corrupt { .. } | Error::Mismatch { .. } | Error::Invalid { .. } => Error::Refused {
            peer: "this node".to_owned(),
            code: crate::error::RefusalCode::Superseded,
            reason: format!("an interrupted rebuild cannot go on: {error}"),
        },
        _ => error,
    }
}

fn cancelled(peer: &str) -> Error {
    Error::Refused {
        peer: peer.to_owned(),
        code: crate::error::RefusalCode::Superseded,
        reason: "it called the rebuild off".to_owned(),
    }
}

/// Waits for its turn, answering each sign of life.
fn await_start(
    info: &ShardInfo,
    sender: &mut dyn FrameSender,
    receiver: &mut dyn FrameReceiver,
) -> Result<SessionControl> {
    loop {
        let peer = receiver.peer().to_owned();
        match receiver.receive_message()? {
            Message::Heartbeat(_) => sender.send_message(&sign_of_life(info.epoch))?,
            Message::SessionControl(control) if (control.session, control.epoch) != (info.session, info.epoch) => {}
            Message::SessionControl(control) => match control.action {
                SessionAction::Start if control.kind == SessionKind::Rebuild && control.target == info.target => {
                    return Ok(control);
                }
                SessionAction::Wait => {
                    log::info!("shard {}: {peer} serves others first", info.shard);
                    sender.send_message(&sign_of_life(info.epoch))?;
                }
                SessionAction::Cancel => return Err(cancelled(&peer)),
                _ => return Err(Error::protocol(peer, format!("a rebuild is to start, and it says {control:?}"))),
            },
            other => return Err(refusal(&peer, other)),
        }
    }
}

fn sign_of_life(epoch: Epoch) -> Message {
    Message::Heartbeat(Heartbeat {
        epoch,
        head: Lsn::ZERO,
        committed: Lsn::ZERO,
        chain: crate::types::Chain::default(),
        sent_unix_ms: unix_ms(),
    })
}

/// Does `work`, which may take long, while signs of life go out.
pub(crate) fn while_beating<T>(
    sender: &mut dyn FrameSender,
    heartbeat: std::time::Duration,
    epoch: Epoch,
    over: &ShutdownSignal,
    work: impl FnOnce() -> T,
) -> T {
    let done = over.child();
    std::thread::scope(|scope| {
        let beats = std::thread::Builder::new().name("tl-beat".to_owned()).stack_size(crate::wal::THREAD_STACK);
        let beat = || while !done.wait_timeout(heartbeat) && sender.send_message(&sign_of_life(epoch)).is_ok() {};
        if let Err(error) = beats.spawn_scoped(scope, beat) {
            log::warn!("no signs of life for now: {error}");
        }
        let _over_with_it = EndsBeats(&done);
        work()
    })
}

/// Ends signs of life when the work is over, also by a panic: their thread is waited for.
struct EndsBeats<'a>(&'a ShutdownSignal);

impl Drop for EndsBeats<'_> {
    fn drop(&mut self) {
        self.0.shutdown();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_target_that_cannot_go_on_says_is_no_reason_to_end_following() {
        let reason = || "the blocks have another size".into();
        for said in [
            Error::Mismatch { path: PathBuf::new(), reason: reason() },
            Error::corrupt("", 0, None, "damaged"),
            Error::invalid("nothing was interrupted"),
        ] {
            assert!(said.is_permanent() && !begin_anew(said.clone()).is_permanent(), "{said}");
        }
    }

    #[test]
    fn small_bases_are_saved_often_and_slow_saves_are_far_apart() {
        const MIB: u64 = 1 << 20;
        let quick = SLOW_SAVE / 2;
        let slow = SLOW_SAVE * 2;
        assert_eq!(next_save(1..1, quick), 2);
        assert_eq!(next_save(3 * MIB..4 * MIB, quick), 6 * MIB, "whenever it has doubled");
        assert_eq!(next_save(100 * MIB..110 * MIB, quick), 164 * MIB);
        assert_eq!(next_save(100 * MIB..200 * MIB, quick), 200 * MIB, "at once, where as much has come meanwhile");
        assert_eq!(next_save(100 * MIB..110 * MIB, slow), 164 * MIB);
        assert_eq!(next_save(100 * MIB..200 * MIB, slow), 400 * MIB);
        assert_eq!(next_save(0..1024 * MIB, slow), 1024 * MIB + LONGEST_REST);
        assert_eq!(next_save(u64::MAX - 1..u64::MAX, slow), u64::MAX);
    }
}
