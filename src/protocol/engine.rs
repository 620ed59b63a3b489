//! The engine: one event in, state change, commands and outcome out.

use super::command::Command;
use super::decision::{Decision, decide};
use super::event::{Assignment, Event, FollowerFacts, Progress, ReadinessObserved, ReplicaInfo, SyncAck};
use super::outcome::{Ignored, Outcome, Verdict};
use super::projection::{Projection, ReplicaProjection, mode_of_shard, project};
use super::session::{Millis, Session, SessionLimits, transition};
use super::state::{Replica, ShardState, Violation};
use super::words::{FailureReason, Mode, Phase, Reason, Refusal, Role, SessionKind};
use crate::limits::MAX_FOLLOWERS;
use crate::types::{Epoch, Lsn, NodeId, SessionId, ShardId};

/// What an engine is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The shard that it decides about.
    pub shard: ShardId,
    /// The node that it runs on.
    pub node: NodeId,
    /// The first session's id. Above every id that this node has used for the shard before, and any leader under an
    /// older epoch; the host persists a bound, or derives it from something that only grows. 0 counts as 1.
    pub first_session: SessionId,
    /// How long sessions may take.
    pub limits: SessionLimits,
}

/// The protocol engine of one shard on one node. See the [module](super) for what it decides and how to host it.
///
/// It holds no handle to anything: cloning it clones its state, and two engines that were given the same settings,
/// events and times are equal and have given the same commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engine {
    state: ShardState,
    limits: SessionLimits,
    /// Derived from `state`; up to date unless `dirty`.
    mode: (Mode, Option<Reason>),
    /// Something other than a number changed, so that the mode is to be derived anew.
    dirty: bool,
    /// As last published.
    published: Option<Projection>,
}

/// A session about to be issued.
struct Plan {
    kind: SessionKind,
    start: Lsn,
    target: Lsn,
    pin: Lsn,
    cut: Option<Lsn>,
}

impl Engine {
    /// An engine to which nothing has been assigned yet.
    #[must_use]
    pub fn new(settings: Settings) -> Engine {
        let state = ShardState::new(settings.shard, settings.node, settings.first_session);
        let mode = mode_of_shard(&state);
        Engine { state, limits: settings.limits, mode, dirty: false, published: None }
    }

    /// The one entry for everything that happens. Sessions that have run out of time by `now` fail first; then the
    /// event is taken in, or ignored. Commands are appended to `commands`, to be carried out in that order.
    ///
    /// An event that is ignored changes nothing and gives no commands of its own.
    pub fn apply(&mut self, now: Millis, event: &Event, commands: &mut Vec<Command>) -> Outcome {
        self.expire(now, commands);
        let taken_in = match event {
            Event::SyncAckReceived(ack) => self.sync_ack(now, ack, commands),
            Event::AssignmentDelivered(assignment) => self.assignment(assignment, commands),
            Event::ReadinessObserved(readiness) => self.readiness(readiness),
            Event::SessionProgress { epoch, replica, session, progress, making_durable } => {
                self.progress(now, (*epoch, *replica, *session), *progress, *making_durable)
            }
            Event::SessionCompleted { epoch, replica, session, achieved, durable, head } => {
                let reached = Reached { achieved: *achieved, durable: *durable, head: *head };
                self.completed(now, *epoch, *replica, *session, reached, commands)
            }
            Event::SessionFailed { epoch, replica, session, reason } => self
                .current_session(*epoch, *replica, *session)
                .and_then(|index| self.fail(index, *reason, Told::ByHost, commands)),
            Event::BarrierConfirmed { epoch, node, session, durable } => {
                self.barrier(*epoch, *node, *session, *durable)
            }
        };
        self.settle(taken_in.map_or_else(Verdict::Ignored, |()| Verdict::Applied), commands)
    }

    /// The other entry: time has passed and nothing happened. Sessions that have run out of time by `now` fail.
    /// To be called at [`next_deadline`](Engine::next_deadline); calling it more often does no harm.
    pub fn tick(&mut self, now: Millis, commands: &mut Vec<Command>) -> Outcome {
        self.expire(now, commands);
        self.settle(Verdict::Applied, commands)
    }

    /// When the next session runs out of time unless something happens; `None` when none can.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Millis> {
        self.state.replicas.iter().filter_map(|replica| replica.session.as_ref()?.due(&self.limits)).min()
    }

    /// How the shard stands, with up-to-date numbers.
    #[must_use]
    pub fn projection(&self) -> Projection {
        project(&self.state, self.mode)
    }

    /// How one follower stands; `None` for a node that is not a follower of the shard.
    #[must_use]
    pub fn replica(&self, node: NodeId) -> Option<ReplicaProjection> {
        let replica = self.state.replicas.get(self.state.find(node)?)?;
        Some(ReplicaProjection::of(replica, self.state.head))
    }

    /// A follower's session, live or over.
    #[must_use]
    pub fn session(&self, node: NodeId) -> Option<Session> {
        self.state.replicas.get(self.state.find(node)?)?.session
    }

    /// The shard that it decides about.
    #[must_use]
    pub const fn shard(&self) -> ShardId {
        self.state.shard
    }

    /// The node that it runs on.
    #[must_use]
    pub const fn node(&self) -> NodeId {
        self.state.node
    }

    /// The epoch in force; 0 before the first assignment.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.state.epoch
    }

    /// What the node is to the shard; `None` before the first assignment.
    #[must_use]
    pub const fn role(&self) -> Option<Role> {
        self.state.role
    }

    /// What is durable as widely as the commit policy asks. Never moves back within an epoch.
    #[must_use]
    pub fn durable(&self) -> Lsn {
        self.state.durable.unwrap_or_default()
    }

    /// The id that the next session will have: what a host persists as its bound.
    #[must_use]
    pub const fn next_session(&self) -> SessionId {
        self.state.next_session
    }

    /// Checks everything that is always true of an engine, whatever it was given. Cheap; debug builds do it after every
    /// event.
    ///
    /// # Errors
    ///
    /// [`Violation`], which is a defect of the engine.
    pub fn verify(&self) -> Result<(), Violation> {
        self.state.verify(&self.limits)?;
        if !self.dirty && self.mode != mode_of_shard(&self.state) {
            return Err(Violation { shard: self.state.shard, invariant: "the mode is derived from the state" });
        }
        Ok(())
    }

    // Followers' facts ------------------------------------------------------------------------------------------------

    /// The hot path: in keep-up it is a search among at most `MAX_FOLLOWERS`, comparisons and stores.
    fn sync_ack(&mut self, now: Millis, ack: &SyncAck, commands: &mut Vec<Command>) -> Result<(), Ignored> {
        let index = self.follower(ack.epoch, ack.replica)?;
        if !ack.is_consistent() {
            return Err(Ignored::InconsistentFacts);
        }
        self.state.tail = self.state.tail.max(ack.leader.tail);
        self.state.head = self.state.head.max(ack.leader.head);
        let replica = &mut self.state.replicas[index];
        let before = std::mem::replace(&mut replica.facts, ack.follower);
        let Some(session) = replica.session.as_mut().filter(|session| session.phase.is_live()) else {
            self.decide(now, index, ack, commands);
            return Ok(());
        };
        if session.kind == SessionKind::KeepUp {
            if let Some(reason) = place_lost(ack, &before) {
                return self.fail(index, reason, Told::ByEngine, commands);
            }
            watch_keep_up(session, now, ack, &before);
            self.state.wake_at = self.state.wake_at.min(session.due(&self.limits).unwrap_or(Millis::MAX));
        }
        replica.count(ack.follower.durable.min(ack.leader.head));
        let counted = replica.counted;
        self.dirty |= self.state.publish_durable(counted);
        Ok(())
    }

    /// With no session under way: this node decides by the facts.
    fn decide(&mut self, now: Millis, index: usize, ack: &SyncAck, commands: &mut Vec<Command>) {
        let head = ack.leader.head;
        let plan = match decide(ack) {
            Decision::Refuse(refusal) => return self.refuse(index, refusal),
            Decision::KeepUp => {
                Plan { kind: SessionKind::KeepUp, start: head, target: head, pin: head.next(), cut: None }
            }
            Decision::CatchUp { start, cut } => {
                Plan { kind: SessionKind::CatchUp, start, target: head, pin: start.next(), cut }
            }
            // The base covers the log up to the target; the log lane begins after it.
            Decision::Rebuild => {
                Plan { kind: SessionKind::Rebuild, start: Lsn::ZERO, target: head, pin: head.next(), cut: None }
            }
        };
        match self.issue(now, index, &plan, commands) {
            Ok(()) => {
                let replica = &mut self.state.replicas[index];
                replica.count(ack.follower.durable);
                let counted = replica.counted;
                self.dirty |= self.state.publish_durable(counted);
            }
            Err(refusal) => self.refuse(index, refusal),
        }
    }

    /// Gives a follower its next session: the pin and the executor first, then what goes out to the follower.
    fn issue(&mut self, now: Millis, index: usize, plan: &Plan, commands: &mut Vec<Command>) -> Result<(), Refusal> {
        let (shard, epoch, session) = (self.state.shard, self.state.epoch, self.state.next_session);
        let Some(following) = session.0.checked_add(1) else { return Err(Refusal::SessionIdsExhausted) };
        self.state.next_session = SessionId(following);
        let Plan { kind, start, target, pin, cut } = *plan;
        let deadline = match kind {
            SessionKind::KeepUp => None,
            SessionKind::CatchUp => Some(now.plus(self.limits.catch_up_deadline_ms)),
            SessionKind::Rebuild => Some(now.plus(self.limits.rebuild_deadline_ms)),
        };
        let issued = Session {
            id: session,
            epoch,
            kind,
            // Shipping live needs nobody's consent: a keep-up is under way as soon as it is issued.
            phase: if kind == SessionKind::KeepUp { Phase::Running } else { Phase::Issued },
            start,
            target,
            pin,
            cut,
            progress: Progress { achieved: start, base_blocks: 0 },
            deadline,
            last_progress: now,
            // A rebuild may have to wait for its turn: its budget begins when the follower has taken it on.
            awaiting: kind == SessionKind::CatchUp,
            making_durable: false,
            reason: None,
        };
        self.state.wake_at = self.state.wake_at.min(issued.due(&self.limits).unwrap_or(Millis::MAX));
        let replica = &mut self.state.replicas[index];
        let replica_id = replica.node;
        debug_assert!(transition(replica.phase(), Phase::Issued).is_ok(), "a live session is ended first");
        replica.session = Some(issued);
        replica.refusal = None;
        self.dirty = true;
        commands.push(Command::StartRecoveryTask { shard, replica: replica_id, session, epoch, kind, pin });
        match kind {
            SessionKind::KeepUp => {}
            SessionKind::CatchUp => {
                let replica = replica_id;
                commands.push(Command::StartCatchUp { shard, replica, session, epoch, start, target, pin, cut });
            }
            SessionKind::Rebuild => {
                commands.push(Command::StartRebuild { shard, replica: replica_id, session, epoch, target });
            }
        }
        Ok(())
    }

    /// No session for this follower until its facts or the leader's change. What it last had is over already.
    fn refuse(&mut self, index: usize, refusal: Refusal) {
        let replica = &mut self.state.replicas[index];
        self.dirty |= replica.refusal != Some(refusal) || replica.session.is_some();
        replica.refusal = Some(refusal);
        replica.session = None;
        replica.counted = None;
    }

    // Sessions --------------------------------------------------------------------------------------------------------

    fn progress(
        &mut self,
        now: Millis,
        (epoch, replica, session): (Epoch, NodeId, SessionId),
        progress: Progress,
        making_durable: bool,
    ) -> Result<(), Ignored> {
        let index = self.current_session(epoch, replica, session)?;
        if let Some(session) = &mut self.state.replicas[index].session {
            self.dirty |= session.phase != Phase::Running;
            session.enter(Phase::Running)?;
            if !session.awaiting && session.kind == SessionKind::Rebuild {
                session.awaiting = true;
                session.touch(now);
            }
            session.advance(now, progress);
            session.making_durable |= making_durable && session.kind == SessionKind::Rebuild;
            self.state.wake_at = self.state.wake_at.min(session.due(&self.limits).unwrap_or(Millis::MAX));
        }
        Ok(())
    }

    /// The follower reached its target: it counts again, and keep-up follows at once, so that a quiet leader completes
    /// a recovery too. The new pin is taken before the old one is released.
    fn completed(
        &mut self,
        now: Millis,
        epoch: Epoch,
        replica: NodeId,
        session: SessionId,
        reached: Reached,
        commands: &mut Vec<Command>,
    ) -> Result<(), Ignored> {
        let Reached { achieved, durable, head } = reached;
        let index = self.current_session(epoch, replica, session)?;
        let member = &mut self.state.replicas[index];
        let Some(finished) = &mut member.session else { return Ok(()) };
        finished.check(Phase::Completed)?;
        if achieved < finished.target {
            return Err(Ignored::TargetNotReached { achieved, target: finished.target });
        }
        if achieved > head {
            return Err(Ignored::BeyondHead { achieved, head });
        }
        finished.enter(Phase::Completed)?;
        finished.advance(now, Progress { achieved, base_blocks: 0 });
        let durable = durable.min(achieved);
        member.facts =
            FollowerFacts { received: achieved, durable, applied: achieved, base_incomplete: false, ..member.facts };
        self.state.head = self.state.head.max(head);
        self.dirty = true;
        let plan =
            Plan { kind: SessionKind::KeepUp, start: achieved, target: achieved, pin: achieved.next(), cut: None };
        // Without an id left the session stays completed, and the next facts will refuse the follower.
        if self.issue(now, index, &plan, commands).is_ok() {
            let member = &mut self.state.replicas[index];
            member.count(durable);
            let counted = member.counted;
            self.state.publish_durable(counted);
        }
        commands.push(Command::DrainRecoveryTask { shard: self.state.shard, replica, session, epoch, reason: None });
        Ok(())
    }

    /// Ends a live session without success. It stays failed until the follower's next facts.
    fn fail(
        &mut self,
        index: usize,
        reason: FailureReason,
        told: Told,
        commands: &mut Vec<Command>,
    ) -> Result<(), Ignored> {
        let replica = &mut self.state.replicas[index];
        if let Some(session) = &mut replica.session {
            session.enter(Phase::Failed)?;
            session.reason = Some(reason);
            self.dirty = true;
            give_back(self.state.shard, replica.node, session, reason, told, commands);
        }
        Ok(())
    }

    /// Fails what has run out of time, in the order of the followers' ids.
    fn expire(&mut self, now: Millis, commands: &mut Vec<Command>) {
        if now < self.state.wake_at {
            return;
        }
        for index in 0..self.state.replicas.len() {
            let session = self.state.replicas[index].session.as_ref();
            if let Some(reason) = session.and_then(|session| session.overdue(now, &self.limits)) {
                // Only live sessions run out of time, and those can fail.
                let _: Result<(), Ignored> = self.fail(index, reason, Told::ByEngine, commands);
            }
        }
        self.state.wake_at = self.next_deadline().unwrap_or(Millis::MAX);
    }

    fn barrier(&mut self, epoch: Epoch, node: NodeId, session: Option<SessionId>, durable: Lsn) -> Result<(), Ignored> {
        if node == self.state.node {
            self.leading(epoch)?;
            let confirmed = self.state.local_durable.max(Some(durable));
            self.state.local_durable = confirmed;
            if self.state.commit_followers == 0 {
                self.dirty |= self.state.publish_durable(confirmed);
            }
            return Ok(());
        }
        let index = self.follower(epoch, node)?;
        let head = self.state.head;
        let replica = &mut self.state.replicas[index];
        let current = replica.session.as_ref().map(|session| session.id);
        if session != current {
            return Err(Ignored::StaleSession { offered: session, current });
        }
        match &replica.session {
            Some(session) if session.phase.is_live() && session.kind != SessionKind::Rebuild => {
                // An empty log is durable as soon as anybody says so.
                if durable == Lsn::ZERO && head == Lsn::ZERO {
                    replica.counted = replica.counted.max(Some(Lsn::ZERO));
                }
                replica.count(durable.max(replica.counted.unwrap_or_default()));
                let counted = replica.counted;
                self.dirty |= self.state.publish_durable(counted);
                Ok(())
            }
            _ => Err(Ignored::NotCounted { node }),
        }
    }

    // Assignment ------------------------------------------------------------------------------------------------------

    fn assignment(&mut self, assignment: &Assignment, commands: &mut Vec<Command>) -> Result<(), Ignored> {
        let Assignment { epoch, role, .. } = *assignment;
        if epoch < self.state.epoch {
            return Err(Ignored::StaleEpoch { offered: epoch, current: self.state.epoch });
        }
        let assigned = check_assignment(assignment, self.state.node)?;
        let (shard, anew) = (self.state.shard, (epoch, Some(role)) != (self.state.epoch, self.state.role));
        // A follower mostly has none of its own, and nothing to be told then.
        let regrouped = (anew || assigned != self.state.assigned)
            && (role == Role::Leader || !assigned.is_empty() || !self.state.assigned.is_empty());
        let stays = |node: NodeId| !anew && assigned.binary_search_by_key(&node, |info| info.node).is_ok();
        let reason = if epoch == self.state.epoch { FailureReason::Cancelled } else { FailureReason::EpochMismatch };
        for replica in self.state.replicas.iter().filter(|replica| !stays(replica.node)) {
            if let Some(session) = replica.session.as_ref().filter(|session| session.phase.is_live()) {
                give_back(shard, replica.node, session, reason, Told::ByEngine, commands);
            }
        }
        if anew {
            self.state.begin(epoch, role);
            commands.push(Command::ApplyRole { shard, epoch, role });
            if role == Role::Follower {
                commands.push(Command::StartReceiver { shard, epoch });
            }
        }
        if regrouped {
            self.state.readiness.shipper_configured = false;
            commands.push(Command::ConfigureShipper { shard, epoch, replicas: assigned.clone() });
        }
        self.regroup(assigned);
        self.state.commit_followers = if role == Role::Leader { assignment.commit_followers } else { 0 };
        let best = self.state.replicas.iter().filter_map(|replica| replica.counted).max();
        self.state.publish_durable(best.max(self.state.local_durable));
        self.dirty = true;
        Ok(())
    }

    /// Keeps what is known of followers that stay, forgets the others, and begins anew with those that come.
    fn regroup(&mut self, assigned: Vec<ReplicaInfo>) {
        let mut known = std::mem::take(&mut self.state.replicas).into_iter().peekable();
        self.state.replicas = assigned
            .iter()
            .map(|info| {
                while known.next_if(|replica| replica.node < info.node).is_some() {}
                known.next_if(|replica| replica.node == info.node).unwrap_or_else(|| Replica::new(info.node))
            })
            .collect();
        self.state.assigned = assigned;
    }

    fn readiness(&mut self, observed: &ReadinessObserved) -> Result<(), Ignored> {
        self.check_epoch(observed.epoch)?;
        let ready = &mut self.state.readiness;
        let before = *ready;
        ready.role_applied = observed.role_applied.unwrap_or(ready.role_applied);
        ready.receiver_ready = observed.receiver_ready.unwrap_or(ready.receiver_ready);
        ready.shipper_configured = observed.shipper_configured.unwrap_or(ready.shipper_configured);
        ready.shipper_connected = observed.shipper_connected.unwrap_or(ready.shipper_connected);
        self.dirty |= *ready != before;
        Ok(())
    }

    // Guards and the end of every event -------------------------------------------------------------------------------

    fn check_epoch(&self, offered: Epoch) -> Result<(), Ignored> {
        let current = self.state.epoch;
        if self.state.role.is_none() {
            Err(Ignored::NotAssigned)
        } else if offered < current {
            Err(Ignored::StaleEpoch { offered, current })
        } else if offered > current {
            Err(Ignored::FutureEpoch { offered, current })
        } else {
            Ok(())
        }
    }

    fn leading(&self, epoch: Epoch) -> Result<(), Ignored> {
        self.check_epoch(epoch)?;
        if self.state.role == Some(Role::Leader) { Ok(()) } else { Err(Ignored::NotLeader) }
    }

    /// Where a follower stands in the state, if it follows this node under this epoch.
    fn follower(&self, epoch: Epoch, node: NodeId) -> Result<usize, Ignored> {
        self.check_epoch(epoch)?;
        self.state.find(node).ok_or(Ignored::UnknownReplica { node })
    }

    /// Where the follower stands whose present session, live or over, is this one.
    fn current_session(&self, epoch: Epoch, node: NodeId, offered: SessionId) -> Result<usize, Ignored> {
        let index = self.follower(epoch, node)?;
        let current = self.state.replicas[index].session.as_ref().map(|session| session.id);
        if current == Some(offered) {
            Ok(index)
        } else {
            Err(Ignored::StaleSession { offered: Some(offered), current })
        }
    }

    /// Derives the mode if it may have changed, and publishes the projection if more than its numbers changed.
    fn settle(&mut self, verdict: Verdict, commands: &mut Vec<Command>) -> Outcome {
        if self.dirty {
            self.dirty = false;
            self.mode = mode_of_shard(&self.state);
            let projection = self.projection();
            if !self.published.as_ref().is_some_and(|published| published.differs_only_in_numbers(&projection)) {
                self.published = Some(projection.clone());
                commands.push(Command::PublishProjection { projection });
            }
        }
        debug_assert_eq!(self.verify(), Ok(()));
        let (mode, reason) = self.mode;
        Outcome { verdict, mode, reason, healthy: mode == Mode::PublishHealthy, durable: self.durable() }
    }
}

/// What a completion reports.
struct Reached {
    achieved: Lsn,
    durable: Lsn,
    head: Lsn,
}

/// Who knows already that a session is over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    /// The host reported it.
    ByHost,
    /// The engine found out, so that the follower has to be told.
    ByEngine,
}

/// The commands that end a live session: what the follower does under it is void, the executor and its pin go back.
fn give_back(
    shard: ShardId,
    replica: NodeId,
    session: &Session,
    reason: FailureReason,
    told: Told,
    commands: &mut Vec<Command>,
) {
    let (session, epoch) = (session.id, session.epoch);
    if told == Told::ByEngine {
        commands.push(Command::InvalidateSession { shard, replica, session, epoch, reason });
    }
    commands.push(Command::DrainRecoveryTask { shard, replica, session, epoch, reason: Some(reason) });
}

/// Why a follower that kept up cannot be shipped to any longer, if it cannot. The session fails; the next facts decide.
fn place_lost(ack: &SyncAck, before: &FollowerFacts) -> Option<FailureReason> {
    let (follower, leader) = (&ack.follower, &ack.leader);
    let end = follower.end();
    let leader_lacks = end > leader.head || follower.committed > leader.head;
    let differs =
        follower.received > Lsn::ZERO && leader.chain_at_received.is_some_and(|chain| chain != follower.chain);
    if follower.tail_epoch > ack.epoch {
        Some(FailureReason::EpochMismatch)
    } else if leader_lacks || differs {
        Some(FailureReason::LocalWalCorrupt)
    } else if follower.base_incomplete {
        Some(FailureReason::LocalBaseCorrupt)
    } else if end.next() < leader.tail {
        Some(FailureReason::PinLost)
    } else if follower.received < before.received {
        Some(FailureReason::TransportLost)
    } else {
        None
    }
}

/// Starts the stall budget of a keep-up when its follower falls behind, renews it when the follower moves, and stops it
/// when the follower has everything.
fn watch_keep_up(session: &mut Session, now: Millis, ack: &SyncAck, before: &FollowerFacts) {
    let after = &ack.follower;
    session.progress.achieved = session.progress.achieved.max(after.position());
    if after.position() >= ack.leader.head {
        session.awaiting = false;
        return;
    }
    let moved = after.received > before.received || after.durable > before.durable || after.applied > before.applied;
    if moved || !session.awaiting {
        session.touch(now);
    }
    session.awaiting = true;
}

/// The followers of an assignment in the order of their ids.
fn check_assignment(assignment: &Assignment, own: NodeId) -> Result<Vec<ReplicaInfo>, Ignored> {
    let invalid = |reason| Err(Ignored::InvalidAssignment { reason });
    if assignment.epoch == Epoch::ZERO {
        return invalid("the first epoch is 1");
    }
    if assignment.replicas.len() > MAX_FOLLOWERS {
        return invalid("more followers than a shard can have");
    }
    let mut replicas = assignment.replicas.clone();
    replicas.sort_by_key(|info| info.node);
    if replicas.windows(2).any(|pair| pair[0].node == pair[1].node) {
        return invalid("a follower stands in it twice");
    }
    if replicas.iter().any(|info| info.node == own) {
        return invalid("the node stands among its own followers");
    }
    if replicas.iter().any(|info| info.node == NodeId(0)) {
        return invalid("node 0 is nobody");
    }
    Ok(replicas)
}
