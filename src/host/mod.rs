//! The host of the protocol engine: what a node observes of a shard becomes events, and commands become deeds.
//!
//! There is one [`Host`] a shard, on a leader and on a follower alike; that of a follower decides about those whom the
//! follower [feeds](relay) in its turn. Nothing else in the crate decides how a follower
//! recovers: its request is a report of facts, the engine decides, and the answer on the connection follows from the
//! session that the engine has then, or from its refusal.
//!
//! | observed | event |
//! |---|---|
//! | a follower asks to follow | its old session fails, if it is live (`superseded`, or `transport_lost`); `SyncAckReceived`, with where the logs part if they do |
//! | it was never seen before | first `AssignmentDelivered`, with it, under the same epoch |
//! | it acknowledges | `SyncAckReceived`; in a catch-up also `SessionProgress`, and `SessionCompleted` at the target |
//! | it says how its rebuild goes | `SessionProgress`, `SessionCompleted` or `SessionFailed` |
//! | its stream ends | `SessionFailed` (`transport_lost`) |
//! | retention gave up what it needs | `SessionFailed` (`pin_lost`) |
//! | the leader's own disk has more, and the policy counts it | `BarrierConfirmed` |
//! | time | a tick, by the thread `tl-proto` |
//!
//! | command | deed |
//! |---|---|
//! | `StartRecoveryTask` | the pin is taken, for a rebuild with its base; the stream's shipper executes the session |
//! | `StartCatchUp`, `StartRebuild` | the terms go out as the answer to the follower's request |
//! | `InvalidateSession` | noted as the reason for which the stream ends |
//! | `DrainRecoveryTask` | the pin goes; unless the session completed, its stream ends: shipper and reader leave |
//! | `ApplyRole`, `ConfigureShipper`, `StartReceiver` | done, and reported back as `ReadinessObserved` |
//! | `PublishProjection` | handed to the node's callback, in order, with no lock held |
//!
//! After a completed catch-up the engine keeps the follower up under a new session, on the stream that stands: the
//! stream goes on to carry the id that it was opened with, and is what the host knows it by.
//!
//! # Locking
//!
//! One lock a shard, held while an event is taken in and its commands are carried out. Under it a new follower is
//! written to the registry, pins are taken and streams are told to end; nothing else blocks, and nobody waits for the
//! end of a base under it. An acknowledgement in keep-up takes it once, uncontended unless the same shard has more to
//! say, and allocates nothing.

mod admission;
mod clock;
mod relay;

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::caught::caught;
use crate::commit::Commit;
use crate::error::{Error, Result};
use crate::limits::MAX_FOLLOWERS;
use crate::protocol::{
    Assignment, Command, Engine, Event, FailureReason, FollowerFacts, LeaderFacts, Millis, Progress, Projection,
    ReadinessObserved, ReplicaInfo, Role, Session, SessionKind, SessionLimits, Settings, SyncAck, Verdict,
};
use crate::registry::Known;
use crate::retention::{Pin, ShardRetention};
use crate::shutdown::ShutdownSignal;
use crate::types::{Chain, Epoch, Lsn, NodeId, SessionId, ShardId};
use crate::wal::{Log, LogWriter, Wal, unix_ms};
use crate::watermark::Watermark;
use crate::wire::SessionFailure;
use relay::Relay;

pub(crate) use admission::{Admitted, Declined, StreamSignals, rebuild_goes_on};
pub(crate) use clock::Clock;
pub(crate) use relay::OpenBase;

/// Called with each projection of each shard that changed in more than its numbers.
pub(crate) type OnProjection = Arc<dyn Fn(&Projection) + Send + Sync>;

/// What all hosts of a node are made with.
#[derive(Clone)]
pub(crate) struct HostSettings {
    pub(crate) node: NodeId,
    pub(crate) limits: SessionLimits,
    pub(crate) commit: Commit,
    /// The followers by name; none if whoever asks may follow.
    pub(crate) members: Option<Arc<[NodeId]>>,
    pub(crate) first_session: u64,
    pub(crate) on_projection: Option<OnProjection>,
    pub(crate) clock: Arc<Clock>,
    /// Whether it can be followed: it leads, or it listens.
    pub(crate) is_followable: bool,
}

/// One shard's engine, and what its commands have brought about.
pub(crate) struct Host {
    shard: ShardId,
    settings: HostSettings,
    retention: Arc<ShardRetention>,
    state: Mutex<State>,
    /// Held by whoever hands projections to the callback, so that they arrive in order.
    publishing: Mutex<()>,
    /// Moves each time that a follower begins to feed others. Moved under the lock of `state`.
    fed: Watermark,
}

struct State {
    /// On a follower a rebuild or a cut puts another one in its place.
    log: Arc<Log>,
    engine: Engine,
    /// The buffer that the engine fills; empty between events.
    commands: Vec<Command>,
    /// What carrying commands out has brought about.
    reports: VecDeque<Event>,
    assignment: Assignment,
    /// The followers assigned, in the order of their ids.
    members: Vec<Member>,
    streams: u64,
    /// What was last reported as the leader's own durable LSN.
    confirmed: Option<Lsn>,
    /// On a follower: whether its receiver has a stream.
    receiving: bool,
    /// On a follower: whether it feeds others.
    relay: Relay,
    /// The bases that are being read, each with the end of that.
    bases: Vec<ShutdownSignal>,
    /// Projections not handed out yet.
    outbox: VecDeque<Projection>,
}

struct Member {
    known: Arc<Known>,
    stream: Option<Open>,
    pins: Vec<(SessionId, Pin)>,
}

/// The stream that serves a follower.
struct Open {
    id: u64,
    signals: StreamSignals,
}

/// Names one stream of one follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StreamKey {
    node: NodeId,
    id: u64,
}

impl StreamKey {
    /// Its number among the streams of its shard: of two, the newer one has the higher.
    pub(crate) fn number(self) -> u64 {
        self.id
    }
}

impl Host {
    /// A host to which nothing has been assigned yet.
    pub(crate) fn new(settings: HostSettings, log: Arc<Log>, retention: Arc<ShardRetention>) -> Host {
        let shard = log.shard();
        let engine = Engine::new(Settings {
            shard,
            node: settings.node,
            first_session: SessionId(settings.first_session),
            limits: settings.limits,
        });
        let commit_followers = settings.commit.asked_of_followers().map_or(0, |(_, count)| count);
        let assignment = Assignment {
            epoch: Epoch::ZERO,
            role: Role::Follower,
            replicas: Vec::new(),
            commit_followers: u16::try_from(commit_followers).unwrap_or(u16::MAX),
        };
        let state = State {
            log,
            engine,
            commands: Vec::new(),
            reports: VecDeque::new(),
            assignment,
            members: Vec::new(),
            streams: 0,
            confirmed: None,
            receiving: false,
            relay: Relay::default(),
            bases: Vec::new(),
            outbox: VecDeque::new(),
        };
        let (state, publishing, fed) = (Mutex::new(state), Mutex::new(()), Watermark::default());
        Host { shard, settings, retention, state, publishing, fed }
    }

    /// Takes on a role under an epoch that is on stable storage. Its followers are those known, if it can have any.
    pub(crate) fn assign(&self, role: Role, epoch: Epoch) {
        let mut state = self.state.lock();
        // Of two that accept epochs at once, the one with the older may come here last.
        let before = (state.assignment.role, state.assignment.epoch);
        if before == (role, epoch) || epoch < before.1 {
            return;
        }
        self.stop_feeding(&mut state);
        state.assignment.role = role;
        state.assignment.epoch = epoch;
        let known = if self.settings.is_followable { self.retention.registry().followers() } else { Vec::new() };
        let named = |known: &Arc<Known>| ReplicaInfo { node: known.node(), endpoint: String::new() };
        state.assignment.replicas = known.iter().map(named).collect();
        state.confirmed = None;
        self.deliver_assignment(&mut state);
        self.confirm_local(&mut state);
        drop(state);
        self.settle();
    }

    /// Takes in what a follower acknowledges, whose marks the caller has found to be possible.
    pub(crate) fn acknowledge(&self, stream: StreamKey, received: Lsn, durable: Lsn, applied: Lsn, chain: Chain) {
        let mut state = self.state.lock();
        // A session that has run out of time ends first, and its stream with it: what it says is about that session,
        // and must not be taken for a new request. The follower may be in the middle of a rebuild.
        let now = self.settings.clock.now();
        self.expire(&mut state, now);
        let epoch = state.assignment.epoch;
        let serves = |member: &&mut Member| {
            let is_over = member.stream.as_ref().is_some_and(|open| open.signals.over.is_shutdown());
            member.is_served_by(stream) && !is_over
        };
        let Some(member) = state.member(stream.node).filter(serves) else {
            // What arrives on a stream that has been ended decides nothing any more.
            drop(state);
            return self.settle();
        };
        let (before, position) = member.known.note(self.shard, durable, applied, unix_ms());
        if member.known.has_lost_place(self.shard) && position.next() >= self.retention.tail() {
            // It had applied less than the log goes back to, had the rest by itself, and has applied that now.
            self.judge_place(&member.known);
        }
        if let Some((_, pin)) = member.pins.last() {
            // A session's pin follows its follower; what lies before is needed by nobody.
            pin.move_to(position.next());
        }
        let follower = FollowerFacts {
            received,
            durable,
            applied,
            chain,
            tail_epoch: if received == Lsn::ZERO { Epoch::ZERO } else { epoch },
            ..FollowerFacts::default()
        };
        let (tail, head, is_relay) = (self.retention.tail(), state.log.head(), state.is_relay());
        let leader = LeaderFacts { tail, head, is_relay, ..LeaderFacts::default() };
        let facts = SyncAck { epoch, replica: stream.node, follower, leader };
        self.apply_at(&mut state, now, &Event::SyncAckReceived(facts));
        let session = state.engine.session(stream.node);
        match session.filter(|session| session.phase.is_live()) {
            Some(session) if session.kind == SessionKind::CatchUp => {
                self.catch_up(&mut state, now, &session, &facts);
            }
            Some(session) if session.kind == SessionKind::Rebuild => {
                let Session { id: session, epoch, progress, .. } = session;
                let progress = Progress { achieved: facts.follower.position().min(facts.leader.head), ..progress };
                let replica = stream.node;
                self.apply_at(&mut state, now, &progress_of(epoch, replica, session, progress));
            }
            _ => {}
        }
        self.confirm_local(&mut state);
        let due = state.engine.next_deadline();
        let quiet = state.outbox.is_empty();
        drop(state);
        self.retention.follower_moved(before, position);
        self.settings.clock.arm(due);
        if !quiet {
            self.publish();
        }
    }

    /// Finds out whether log that a follower needs has been given up. Retention moves its tail before it takes places:
    /// what it takes from here on stays taken.
    fn judge_place(&self, known: &Known) {
        known.set_lost_place(self.shard, false);
        if known.position(self.shard).next() < self.retention.tail() {
            known.set_lost_place(self.shard, true);
        }
    }

    /// An acknowledgement during a catch-up: progress, and completion once the follower's state is at the target.
    /// All at one moment, so that the session does not run out of time in between.
    fn catch_up(&self, state: &mut State, now: Millis, session: &Session, facts: &SyncAck) {
        let (epoch, replica, head) = (session.epoch, facts.replica, facts.leader.head);
        let achieved = facts.follower.position().min(head);
        let progress = Progress { achieved, base_blocks: 0 };
        self.apply_at(state, now, &progress_of(epoch, replica, session.id, progress));
        if achieved >= session.target {
            let durable = facts.follower.durable;
            let completed = Event::SessionCompleted { epoch, replica, session: session.id, achieved, durable, head };
            self.apply_at(state, now, &completed);
            // A completion says that everything stands at what was achieved; the log itself may be further.
            self.apply_at(state, now, &Event::SyncAckReceived(*facts));
        }
    }

    /// Holds the log for a rebuild whose base is about to be opened: from `goes_on` if that is still there, else from
    /// what the leader's own target has applied durably on, which no base is older than. Gives from where.
    /// [`rebuild_starts`](Self::rebuild_starts) lets go of what is not needed of it.
    ///
    /// # Errors
    ///
    /// [`Error::NotRetained`] if it has been given up meanwhile; [`Error::ShutDown`] if the stream has ended.
    pub(crate) fn pin_rebuild(&self, stream: StreamKey, session: u64, goes_on: Option<Lsn>) -> Result<(Lsn, OpenBase)> {
        let mut state = self.state.lock();
        state.rebuild_of(stream, SessionId(session)).ok_or(Error::ShutDown)?;
        let (owner, reason) = (format!("node {}", stream.node), SessionKind::Rebuild.as_str());
        let kept = goes_on.and_then(|first| self.retention.pin(owner.clone(), reason, first).ok());
        let pin = kept.map_or_else(|| self.retention.pin_for_base(owner, reason), Ok)?;
        let first = pin.lsn();
        if let Some(member) = state.member(stream.node) {
            member.pins.push((SessionId(session), pin));
        }
        Ok((first, state.opens_base()))
    }

    /// A rebuild's log lane begins with `first`: from there on the follower has its place in the log again, and loses
    /// it like any other.
    ///
    /// # Errors
    ///
    /// [`Error::NotRetained`] if the log was given up all the same; [`Error::ShutDown`] if the stream has ended.
    pub(crate) fn rebuild_starts(&self, stream: StreamKey, session: u64, first: Lsn) -> Result<()> {
        let mut state = self.state.lock();
        state.rebuild_of(stream, SessionId(session)).ok_or(Error::ShutDown)?;
        let (tail, head) = (self.retention.tail(), state.log.head());
        if let Some(member) = state.member(stream.node) {
            member.known.note(self.shard, first.previous(), first.previous(), unix_ms());
            member.known.set_lost_place(self.shard, false);
            let pin = member.pins.iter().find(|(owner, _)| owner.0 == session).map(|(_, pin)| pin);
            if first < self.retention.tail() || pin.is_none_or(Pin::is_lost) {
                member.known.set_lost_place(self.shard, true);
                self.fail_session(&mut state, stream.node, FailureReason::PinLost);
                return Err(Error::NotRetained { shard: self.shard, lsn: first, tail, head });
            }
            pin.into_iter().for_each(|pin| pin.move_to(first));
        }
        Ok(())
    }

    /// A rebuild's follower has taken or skipped so many blocks of its base.
    pub(crate) fn rebuild_progress(&self, stream: StreamKey, session: u64, base_blocks: u64) {
        let mut state = self.state.lock();
        if let Some(Session { id: session, epoch, progress, .. }) = state.rebuild_of(stream, SessionId(session)) {
            let (replica, progress) = (stream.node, Progress { base_blocks, ..progress });
            self.apply(&mut state, &progress_of(epoch, replica, session, progress));
        }
        drop(state);
        self.settle();
    }

    /// A rebuild's follower has everything, and makes it durable.
    pub(crate) fn rebuild_makes_durable(&self, stream: StreamKey, session: u64) {
        let mut state = self.state.lock();
        if let Some(Session { id: session, epoch, progress, .. }) = state.rebuild_of(stream, SessionId(session)) {
            let replica = stream.node;
            let event = Event::SessionProgress { epoch, replica, session, progress, making_durable: true };
            self.apply(&mut state, &event);
        }
        drop(state);
        self.settle();
    }

    /// A rebuild's follower stands at `achieved`, which the caller has found to be possible, and has it on stable
    /// storage. Acknowledgements may have overtaken that word: log that they call needless may be given up already.
    /// Returns whether the follower counts from now on.
    pub(crate) fn rebuild_completed(&self, stream: StreamKey, session: u64, achieved: Lsn) -> bool {
        let mut state = self.state.lock();
        let rebuild = state.rebuild_of(stream, SessionId(session));
        if let Some(Session { id: session, epoch, .. }) = rebuild {
            let (replica, head) = (stream.node, state.log.head());
            let known = state.member(replica).map(|member| Arc::clone(&member.known));
            let achieved = known.as_ref().map_or(achieved, |known| known.position(self.shard).max(achieved));
            if let Some(known) = known {
                known.note(self.shard, achieved, achieved, unix_ms());
            }
            let completed = Event::SessionCompleted { epoch, replica, session, achieved, durable: achieved, head };
            self.apply(&mut state, &completed);
        }
        let session = state.engine.session(stream.node);
        let counts = session.is_some_and(|session| session.kind == SessionKind::KeepUp && session.phase.is_live());
        drop(state);
        self.settle();
        rebuild.is_some() && counts
    }

    /// A rebuild ends without success, as one of its two sides says; its stream ends with it.
    pub(crate) fn rebuild_failed(&self, stream: StreamKey, session: u64, reason: FailureReason) {
        let mut state = self.state.lock();
        if state.rebuild_of(stream, SessionId(session)).is_some() {
            self.fail_session(&mut state, stream.node, reason);
        }
        drop(state);
        self.settle();
    }

    /// On a follower: another log takes the place of the shard's, as `open` does. Nobody is fed with the one before any
    /// more.
    pub(crate) fn replace_log(
        &self,
        applied: &Arc<Watermark>,
        open: impl FnOnce() -> Result<(Wal, LogWriter)>,
    ) -> Result<(Wal, LogWriter)> {
        self.withdraw();
        let opened = self.retention.replace_log(applied, open)?;
        self.state.lock().log = Arc::clone(opened.0.log());
        Ok(opened)
    }

    /// Gives up what was decided for a follower before its stream began: the session fails, the connection stays, so
    /// that the follower can be told.
    pub(crate) fn decline(&self, stream: StreamKey, reason: FailureReason) {
        let mut state = self.state.lock();
        if let Some(member) = state.member(stream.node).filter(|member| member.is_served_by(stream)) {
            member.stream = None;
            self.fail_session(&mut state, stream.node, reason);
            self.report_connected(&mut state);
        }
        drop(state);
        self.settle();
    }

    /// A stream is over, whoever ended it. One that found the log gone which its session had pinned can end before
    /// retention, which is still removing files, says so.
    pub(crate) fn stream_ended(&self, stream: StreamKey) {
        let is_pin_lost = {
            let mut state = self.state.lock();
            let pin = state.member(stream.node).and_then(|member| member.pins.last());
            pin.is_some_and(|(_, pin)| pin.is_lost())
        };
        self.decline(stream, if is_pin_lost { FailureReason::PinLost } else { FailureReason::TransportLost });
    }

    /// Retention has given up log that a follower needs.
    pub(crate) fn place_lost(&self, node: NodeId) {
        let mut state = self.state.lock();
        self.fail_session(&mut state, node, FailureReason::PinLost);
        drop(state);
        self.settle();
    }

    /// A follower that is not waited for any longer: it leaves the assignment, its stream ends, and then `forget` has
    /// the rest go, before it can come again.
    pub(crate) fn forget(&self, node: NodeId, forget: impl FnOnce()) {
        let mut state = self.state.lock();
        let before = state.assignment.replicas.len();
        state.assignment.replicas.retain(|replica| replica.node != node);
        if state.assignment.replicas.len() != before {
            self.deliver_assignment(&mut state);
        }
        forget();
        drop(state);
        self.settle();
    }

    /// On a follower: its receiver has a stream, or has lost it.
    pub(crate) fn set_receiving(&self, receiving: bool) {
        let mut state = self.state.lock();
        state.receiving = receiving;
        self.report_receiver(&mut state);
        drop(state);
        self.settle();
    }

    /// The streams that stand.
    pub(crate) fn streams(&self) -> Vec<ShutdownSignal> {
        let state = self.state.lock();
        state.members.iter().filter_map(|member| Some(member.stream.as_ref()?.signals.over.clone())).collect()
    }

    /// Whether `node` is among the followers that this node was told to have, if it was told.
    pub(crate) fn may_follow(&self, node: NodeId) -> bool {
        self.settings.members.as_ref().is_none_or(|members| members.contains(&node))
    }

    /// How the shard stands.
    pub(crate) fn projection(&self) -> Projection {
        let mut state = self.state.lock();
        self.confirm_local(&mut state);
        let projection = state.engine.projection();
        drop(state);
        self.settle();
        projection
    }

    /// Whether retention has given up log that a follower needs, since it was last in touch.
    pub(crate) fn has_lost_place(&self, node: NodeId) -> bool {
        self.state.lock().member(node).is_some_and(|member| member.known.has_lost_place(self.shard))
    }

    /// What is kept of the log, and for whom.
    pub(crate) fn retention(&self) -> &Arc<ShardRetention> {
        &self.retention
    }

    fn next_deadline(&self) -> Option<Millis> {
        self.state.lock().engine.next_deadline()
    }

    fn tick(&self) {
        self.tick_at(self.settings.clock.now());
    }

    fn tick_at(&self, now: Millis) {
        let mut state = self.state.lock();
        self.expire(&mut state, now);
        drop(state);
        self.settle();
    }

    /// Sessions that have run out of time by `now` fail.
    fn expire(&self, state: &mut State, now: Millis) {
        let _ = state.engine.tick(now, &mut state.commands);
        if !state.commands.is_empty() {
            self.carry_out(state);
        }
    }

    // Events and commands ---------------------------------------------------------------------------------------------

    fn apply(&self, state: &mut State, event: &Event) {
        self.apply_at(state, self.settings.clock.now(), event);
    }

    fn apply_at(&self, state: &mut State, now: Millis, event: &Event) {
        let outcome = state.engine.apply(now, event, &mut state.commands);
        if let Verdict::Ignored(why) = outcome.verdict {
            log::debug!("shard {}: {} changed nothing: {why}", self.shard, event.name());
        }
        if !state.commands.is_empty() {
            self.carry_out(state);
        }
    }

    /// Carries out what the engine has asked for, and what comes of that.
    #[cold]
    fn carry_out(&self, state: &mut State) {
        loop {
            let mut commands = std::mem::take(&mut state.commands);
            for command in commands.drain(..) {
                log::debug!("{command}");
                self.carry_out_one(state, command);
            }
            state.commands = commands;
            let Some(event) = state.reports.pop_front() else { break };
            let outcome = state.engine.apply(self.settings.clock.now(), &event, &mut state.commands);
            if let Verdict::Ignored(why) = outcome.verdict {
                log::debug!("shard {}: {} changed nothing: {why}", self.shard, event.name());
            }
        }
        if self.settings.is_followable
            && let Err(error) = self.retention.registry().reserve_sessions(state.engine.next_session().0)
        {
            log::error!("shard {}: session ids were not reserved: {error}", self.shard);
        }
    }

    fn carry_out_one(&self, state: &mut State, command: Command) {
        match command {
            Command::ApplyRole { epoch, .. } => {
                state.report(ReadinessObserved { epoch, role_applied: Some(true), ..ReadinessObserved::default() })
            }
            Command::StartReceiver { .. } => {
                let report = state.receiver_report();
                state.report(report);
            }
            Command::ConfigureShipper { epoch, replicas, .. } => {
                self.set_members(state, &replicas);
                state.report(ReadinessObserved {
                    epoch,
                    shipper_configured: Some(true),
                    shipper_connected: Some(state.all_connected()),
                    ..ReadinessObserved::default()
                });
            }
            // Where its log begins is known once its base is open: what it needs is pinned then.
            Command::StartRecoveryTask { kind: SessionKind::Rebuild, .. } => {}
            Command::StartRecoveryTask { replica, session, epoch, kind, pin, .. } => {
                let taken = self.retention.pin(format!("node {replica}"), kind.as_str(), pin);
                match (taken, state.member(replica)) {
                    (Ok(pin), Some(member)) => member.pins.push((session, pin)),
                    (Ok(_), None) => {}
                    (Err(error), _) => {
                        log::warn!("node {replica}: session {session} has no pin: {error}");
                        let reason = FailureReason::PinLost;
                        state.reports.push_back(Event::SessionFailed { epoch, replica, session, reason });
                    }
                }
            }
            Command::InvalidateSession { shard, replica, session, reason, .. } => {
                log::warn!("node {replica}, shard {shard}: session {session} is void: {reason}");
            }
            Command::DrainRecoveryTask { replica, session, reason, .. } => {
                let Some(member) = state.member(replica) else { return };
                member.pins.retain(|(owner, _)| *owner != session);
                // A completed session is followed by keep-up on the same stream.
                if reason.is_some()
                    && let Some(stream) = &member.stream
                {
                    stream.signals.over.shutdown();
                }
            }
            // The terms are the answer to the follower's request, which is being decided about.
            Command::StartCatchUp { .. } | Command::StartRebuild { .. } => {}
            Command::PublishProjection { projection } => {
                if self.settings.on_projection.is_some() {
                    state.outbox.push_back(projection);
                }
            }
        }
    }

    /// Ships to these followers and no others; streams of the others end.
    fn set_members(&self, state: &mut State, replicas: &[ReplicaInfo]) {
        let mut before = std::mem::take(&mut state.members);
        let known = self.retention.registry().followers();
        for replica in replicas {
            let node = replica.node;
            if let Some(at) = before.iter().position(|member| member.known.node() == node) {
                state.members.push(before.swap_remove(at));
            } else if let Some(known) = known.iter().find(|known| known.node() == node) {
                state.members.push(Member { known: Arc::clone(known), stream: None, pins: Vec::new() });
            }
        }
        for left in before {
            if let Some(stream) = left.stream {
                stream.signals.over.shutdown();
            }
        }
    }

    fn deliver_assignment(&self, state: &mut State) {
        debug_assert!(state.assignment.replicas.len() <= MAX_FOLLOWERS);
        let event = Event::AssignmentDelivered(state.assignment.clone());
        self.apply(state, &event);
    }

    /// Fails a follower's session, if it is live.
    fn fail_session(&self, state: &mut State, replica: NodeId, reason: FailureReason) {
        let live = state.engine.session(replica).filter(|session| session.phase.is_live());
        if let Some(Session { id, epoch, .. }) = live {
            self.apply(state, &Event::SessionFailed { epoch, replica, session: id, reason });
        }
    }

    /// Where the leader's own disk counts: what it has.
    fn confirm_local(&self, state: &mut State) {
        let counts = state.assignment.role == Role::Leader && state.assignment.commit_followers == 0;
        let durable = state.log.synced().load();
        if counts && state.confirmed.is_none_or(|confirmed| confirmed < durable) {
            state.confirmed = Some(durable);
            let epoch = state.assignment.epoch;
            self.apply(state, &Event::BarrierConfirmed { epoch, node: self.settings.node, session: None, durable });
        }
    }

    fn report_connected(&self, state: &mut State) {
        let report = ReadinessObserved {
            epoch: state.assignment.epoch,
            shipper_connected: Some(state.all_connected()),
            ..ReadinessObserved::default()
        };
        self.apply(state, &Event::ReadinessObserved(report));
    }

    fn report_receiver(&self, state: &mut State) {
        let report = state.receiver_report();
        self.apply(state, &Event::ReadinessObserved(report));
    }

    // After every event, without the lock -----------------------------------------------------------------------------

    fn settle(&self) {
        self.settings.clock.arm(self.next_deadline());
        self.publish();
    }

    /// Hands out projections, in order. If another thread is at it, it goes on with these.
    fn publish(&self) {
        let Some(on_projection) = &self.settings.on_projection else { return };
        while !self.state.lock().outbox.is_empty() {
            let Some(_turn) = self.publishing.try_lock() else { return };
            loop {
                // The lock is not held while the callback runs, so that it may ask for the status.
                let next = self.state.lock().outbox.pop_front();
                let Some(projection) = next else { break };
                // Whichever thread this is, others wait for it, and the node does not depend on what is done here.
                let called = caught(format_args!("on_projection of shard {}", projection.shard), || {
                    on_projection(&projection);
                    Ok(())
                });
                if let Err(error) = called {
                    log::error!("{error}");
                }
            }
        }
    }
}

impl State {
    fn member(&mut self, node: NodeId) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.known.node() == node)
    }

    /// The rebuild that a stream serves, while it is live.
    fn rebuild_of(&mut self, stream: StreamKey, session: SessionId) -> Option<Session> {
        let open = self.member(stream.node)?.stream.as_ref()?;
        if open.id != stream.id || open.signals.over.is_shutdown() {
            return None;
        }
        let current = self.engine.session(stream.node)?;
        let is_it = current.id == session && current.kind == SessionKind::Rebuild && current.phase.is_live();
        is_it.then_some(current)
    }

    fn is_relay(&self) -> bool {
        self.assignment.role == Role::Follower
    }

    fn all_connected(&self) -> bool {
        self.members.iter().all(|member| member.stream.is_some())
    }

    fn report(&mut self, readiness: ReadinessObserved) {
        self.reports.push_back(Event::ReadinessObserved(readiness));
    }

    fn receiver_report(&self) -> ReadinessObserved {
        let epoch = self.assignment.epoch;
        ReadinessObserved { epoch, receiver_ready: Some(self.receiving), ..ReadinessObserved::default() }
    }
}

fn progress_of(epoch: Epoch, replica: NodeId, session: SessionId, progress: Progress) -> Event {
    Event::SessionProgress { epoch, replica, session, progress, making_durable: false }
}

impl Member {
    fn is_served_by(&self, stream: StreamKey) -> bool {
        self.stream.as_ref().is_some_and(|open| open.id == stream.id)
    }
}

/// The follower's word for why a session failed, as the engine says it.
pub(crate) fn reason_of(failure: SessionFailure) -> FailureReason {
    match failure {
        SessionFailure::EpochMismatch => FailureReason::EpochMismatch,
        SessionFailure::TransportLost => FailureReason::TransportLost,
        SessionFailure::ProgressStalled => FailureReason::ProgressStalled,
        SessionFailure::DeadlineExceeded => FailureReason::DeadlineExceeded,
        SessionFailure::PinLost => FailureReason::PinLost,
        SessionFailure::BaseUnavailable => FailureReason::BaseUnavailable,
        SessionFailure::LocalWalCorrupt => FailureReason::LocalWalCorrupt,
        SessionFailure::LocalBaseCorrupt => FailureReason::LocalBaseCorrupt,
        SessionFailure::Superseded => FailureReason::Superseded,
        SessionFailure::None | SessionFailure::Cancelled => FailureReason::Cancelled,
    }
}
