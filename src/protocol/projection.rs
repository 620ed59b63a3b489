//! The outward view of a shard, derived from its state and never the other way round.

use std::fmt;

use super::event::{FollowerFacts, Progress};
use super::session::Session;
use super::state::{Replica, ShardState};
use super::words::{FailureReason, Mode, Phase, Reason, Refusal, Role, SessionKind};
use crate::types::{Epoch, Lsn, NodeId, SessionId, ShardId};

/// How a shard stands, as seen by one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Projection {
    /// The shard.
    pub shard: ShardId,
    /// The epoch in force; 0 before the first assignment.
    pub epoch: Epoch,
    /// What this node is to the shard; `None` before the first assignment.
    pub role: Option<Role>,
    /// The shard's mode.
    pub mode: Mode,
    /// Why the mode is what it is, unless it says it all.
    pub reason: Option<Reason>,
    /// Whether the mode is [`Mode::PublishHealthy`].
    pub healthy: bool,
    /// What is durable as widely as the commit policy asks: on the k-th follower, not on the best one.
    pub durable: Lsn,
    /// The oldest LSN that this node's log retained when last heard of.
    pub tail: Lsn,
    /// The newest LSN of this node's log when last heard of.
    pub head: Lsn,
    /// Those who follow this node, in the order of their ids.
    pub replicas: Vec<ReplicaProjection>,
}

/// How one follower stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaProjection {
    /// The follower.
    pub node: NodeId,
    /// Its mode, in the words used for shards.
    pub mode: Mode,
    /// Why the mode is what it is, unless it says it all.
    pub reason: Option<Reason>,
    /// Where its session stands; [`Phase::Idle`] when it has none.
    pub phase: Phase,
    /// Its session, live or over.
    pub session: Option<SessionId>,
    /// What the session does.
    pub kind: Option<SessionKind>,
    /// The session's frozen target; 0 without a session.
    pub target: Lsn,
    /// How far the session is.
    pub progress: Progress,
    /// Why the session failed.
    pub failure: Option<FailureReason>,
    /// Why it gets no session.
    pub refusal: Option<Refusal>,
    /// What it last reported.
    pub facts: FollowerFacts,
    /// Records between its position and the newest head heard of.
    pub lag_records: u64,
}

impl Projection {
    /// Whether two projections differ in numbers at most: durable, tail, head, marks, progress, lag.
    #[must_use]
    pub fn differs_only_in_numbers(&self, other: &Projection) -> bool {
        (self.shard, self.epoch, self.role) == (other.shard, other.epoch, other.role)
            && (self.mode, self.reason, self.healthy) == (other.mode, other.reason, other.healthy)
            && self.replicas.len() == other.replicas.len()
            && self.replicas.iter().zip(&other.replicas).all(|(one, two)| one.words() == two.words())
    }
}

type Words = (NodeId, Mode, Option<Reason>, Phase, Option<SessionId>, Option<Refusal>);

impl ReplicaProjection {
    /// Everything that is not a number; kind, target and failure follow from session and reason.
    const fn words(&self) -> Words {
        (self.node, self.mode, self.reason, self.phase, self.session, self.refusal)
    }

    pub(super) fn of(replica: &Replica, head: Lsn) -> ReplicaProjection {
        let session = replica.session.as_ref();
        let (mode, reason) = mode_of_replica(replica);
        ReplicaProjection {
            node: replica.node,
            mode,
            reason,
            phase: replica.phase(),
            session: session.map(|session| session.id),
            kind: session.map(|session| session.kind),
            target: session.map_or(Lsn::ZERO, |session| session.target),
            progress: session.map_or(Progress::default(), |session| session.progress),
            failure: session.and_then(|session| session.reason),
            refusal: replica.refusal,
            facts: replica.facts,
            lag_records: head.records_since(replica.facts.position()),
        }
    }
}

/// Describes the state, with a mode that was derived from it.
pub(super) fn project(state: &ShardState, (mode, reason): (Mode, Option<Reason>)) -> Projection {
    Projection {
        shard: state.shard,
        epoch: state.epoch,
        role: state.role,
        mode,
        reason,
        healthy: mode == Mode::PublishHealthy,
        durable: state.durable.unwrap_or_default(),
        tail: state.tail,
        head: state.head,
        replicas: state.replicas.iter().map(|replica| ReplicaProjection::of(replica, state.head)).collect(),
    }
}

/// The mode of a shard, in this order: a rebuild under way, a failed or refused follower, a catch-up under way, what
/// the host has yet to do, followers not heard of, durability; then healthy.
pub(super) fn mode_of_shard(state: &ShardState) -> (Mode, Option<Reason>) {
    let pending = |reason| (Mode::BootstrapPending, Some(reason));
    let ready = &state.readiness;
    match state.role {
        None => (Mode::AllocatedOnly, None),
        Some(Role::Follower) if !ready.role_applied => pending(Reason::AwaitingRoleApply),
        Some(Role::Follower) if !ready.receiver_ready => pending(Reason::AwaitingReceiverReady),
        Some(Role::Follower) => (Mode::ReplicaReady, None),
        Some(Role::Leader) if state.replicas.is_empty() => (Mode::AllocatedOnly, None),
        Some(Role::Leader) => {
            if let Some(found) = first_replica(state, |mode, _| mode == Mode::NeedsRebuild) {
                found
            } else if let Some(found) = first_replica(state, |mode, _| mode == Mode::Degraded) {
                found
            } else if let Some(found) = first_replica(state, |_, reason| reason == Some(Reason::RecoveryInProgress)) {
                found
            } else if !ready.role_applied {
                pending(Reason::AwaitingRoleApply)
            } else if !ready.shipper_configured {
                pending(Reason::AwaitingShipperConfigured)
            } else if !ready.shipper_connected {
                pending(Reason::AwaitingShipperConnected)
            } else if let Some(found) = first_replica(state, |mode, _| mode == Mode::BootstrapPending) {
                found
            } else if state.durable.is_none() {
                pending(Reason::AwaitingBarrierDurability)
            } else {
                (Mode::PublishHealthy, None)
            }
        }
    }
}

/// Mode and reason of the first follower that is as wanted.
fn first_replica(state: &ShardState, wanted: impl Fn(Mode, Option<Reason>) -> bool) -> Option<(Mode, Option<Reason>)> {
    state.replicas.iter().map(mode_of_replica).find(|&(mode, reason)| wanted(mode, reason))
}

fn mode_of_replica(replica: &Replica) -> (Mode, Option<Reason>) {
    if let Some(refusal) = replica.refusal {
        return (Mode::Degraded, Some(Reason::Failed(refusal.failure_reason())));
    }
    match &replica.session {
        None => (Mode::BootstrapPending, Some(Reason::AwaitingShipperConnected)),
        Some(Session { reason: Some(reason), .. }) => (Mode::Degraded, Some(Reason::Failed(*reason))),
        Some(Session { kind: SessionKind::KeepUp, .. }) => (Mode::PublishHealthy, None),
        Some(Session { kind: SessionKind::Rebuild, phase: Phase::Issued | Phase::Running, .. }) => {
            (Mode::NeedsRebuild, Some(Reason::RecoveryInProgress))
        }
        Some(_) => (Mode::BootstrapPending, Some(Reason::RecoveryInProgress)),
    }
}

/// One line for the shard, then one in square brackets for each follower.
impl fmt::Display for Projection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shard={} epoch={}", self.shard, self.epoch)?;
        if let Some(role) = self.role {
            write!(f, " role={role}")?;
        }
        write!(f, " mode={}", self.mode)?;
        if let Some(reason) = self.reason {
            write!(f, " reason={reason}")?;
        }
        write!(f, " durable={} tail={} head={}", self.durable, self.tail, self.head)?;
        self.replicas.iter().try_for_each(|replica| write!(f, " [{replica}]"))
    }
}

/// One line: the node, its mode, its session, its lag.
impl fmt::Display for ReplicaProjection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node={} mode={}", self.node, self.mode)?;
        if let Some(reason) = self.reason {
            write!(f, " reason={reason}")?;
        }
        if let Some(refusal) = self.refusal {
            write!(f, " refusal={refusal}")?;
        }
        if let (Some(session), Some(kind)) = (self.session, self.kind) {
            write!(f, " session={session} kind={kind} phase={}", self.phase)?;
            if kind != SessionKind::KeepUp {
                write!(f, " achieved={} target={}", self.progress.achieved, self.target)?;
            }
            if kind == SessionKind::Rebuild {
                write!(f, " base_blocks={}", self.progress.base_blocks)?;
            }
        }
        write!(f, " lag_records={}", self.lag_records)
    }
}
