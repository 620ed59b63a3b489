//! What the host tells the engine: seven events.
//!
//! | event | who learns it | what it changes |
//! |---|---|---|
//! | [`AssignmentDelivered`](Event::AssignmentDelivered) | whoever assigns roles | role, epoch, followers; ends sessions |
//! | [`ReadinessObserved`](Event::ReadinessObserved) | the host's own threads | the mode |
//! | [`SyncAckReceived`](Event::SyncAckReceived) | whoever is followed | facts about a follower; with no session under way, the decision |
//! | [`SessionProgress`](Event::SessionProgress) | whoever is followed | issued becomes running; the stall budget starts anew |
//! | [`SessionCompleted`](Event::SessionCompleted) | whoever is followed | the session is over, keep-up follows |
//! | [`SessionFailed`](Event::SessionFailed) | whoever is followed | the session is over, the next facts decide |
//! | [`BarrierConfirmed`](Event::BarrierConfirmed) | leader | what is durable |
//!
//! Every event carries the epoch it belongs to, and every event about a session carries the session's id. One from
//! another epoch or session changes nothing.

use super::words::{FailureReason, Role};
use crate::types::{Chain, Epoch, Lsn, NodeId, SessionId};

/// One thing that happened. The engine borrows it and keeps nothing of it but copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Role, epoch and followers, from the authority outside. Refused when its epoch is older than the present one.
    AssignmentDelivered(Assignment),
    /// How far the host has come with carrying out the assignment.
    ReadinessObserved(ReadinessObserved),
    /// A follower reported where its log stands. The place where recovery is decided.
    SyncAckReceived(SyncAck),
    /// A follower accepted its session, or got further with it.
    SessionProgress {
        /// The session's epoch.
        epoch: Epoch,
        /// The follower.
        replica: NodeId,
        /// The session.
        session: SessionId,
        /// How far it is, counted from the session's beginning.
        progress: Progress,
        /// It has all that a rebuild needs and is putting it on stable storage: how long that takes is its device's
        /// business, so from here on the deadline alone counts.
        making_durable: bool,
    },
    /// A follower reported that its session is done.
    SessionCompleted {
        /// The session's epoch.
        epoch: Epoch,
        /// The follower.
        replica: NodeId,
        /// The session.
        session: SessionId,
        /// The LSN that the follower reached: accepted only from the session's target up to `head`.
        achieved: Lsn,
        /// What of it is on the follower's stable storage.
        durable: Lsn,
        /// The newest LSN of the leader's log, read after the report arrived.
        head: Lsn,
    },
    /// A session ended without success: the follower said so, the connection broke, a pin was lost.
    SessionFailed {
        /// The session's epoch.
        epoch: Epoch,
        /// The follower.
        replica: NodeId,
        /// The session.
        session: SessionId,
        /// Why.
        reason: FailureReason,
    },
    /// A sync that was asked for has been confirmed, by a follower or by the leader's own disk.
    BarrierConfirmed {
        /// The epoch under which it was asked for.
        epoch: Epoch,
        /// The follower, or the leader itself.
        node: NodeId,
        /// The follower's session at the time; `None` for the leader itself.
        session: Option<SessionId>,
        /// Everything up to here is on stable storage there. At most the LSN that the sync was asked for: the host's
        /// word, not the follower's.
        durable: Lsn,
    },
}

/// Who leads under which epoch, and who follows. Total: what is not in it is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The leadership term, from 1.
    pub epoch: Epoch,
    /// What this node is to the shard.
    pub role: Role,
    /// Those who follow this node, in any order, without the node itself, each once, at most
    /// [`MAX_FOLLOWERS`](crate::limits::MAX_FOLLOWERS): a leader's followers, or those that a follower feeds in its
    /// turn.
    pub replicas: Vec<ReplicaInfo>,
    /// How many followers must have a record on stable storage for it to count as durable; 0 means that the leader's
    /// own disk decides. More than there are followers means that nothing counts. Of no meaning to a follower, at which
    /// nothing is committed.
    pub commit_followers: u16,
}

/// One follower, and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaInfo {
    /// Its identity.
    pub node: NodeId,
    /// How the host reaches it. The engine hands it on and never looks into it.
    pub endpoint: String,
}

/// How far the host has come. Fields that are `None` stay as they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadinessObserved {
    /// The assignment's epoch.
    pub epoch: Epoch,
    /// The role has been taken on, and the epoch persisted.
    pub role_applied: Option<bool>,
    /// The receiver of a follower listens.
    pub receiver_ready: Option<bool>,
    /// The shippers know their followers.
    pub shipper_configured: Option<bool>,
    /// The shippers are connected.
    pub shipper_connected: Option<bool>,
}

/// A follower's facts beside the leader's, taken together: the follower's from its report, the leader's read after the
/// report arrived (so that a sound leader never looks shorter than its follower).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncAck {
    /// The leader's epoch under which the follower reported.
    pub epoch: Epoch,
    /// The follower.
    pub replica: NodeId,
    /// What the follower says.
    pub follower: FollowerFacts,
    /// What the leader sees.
    pub leader: LeaderFacts,
}

/// Where a follower's log stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FollowerFacts {
    /// Newest LSN in its log.
    pub received: Lsn,
    /// Newest LSN on its stable storage.
    pub durable: Lsn,
    /// Newest LSN given to its target.
    pub applied: Lsn,
    /// Newest LSN that it has been told is committed; 0 when it has not been told. No session ever takes a follower
    /// below this.
    pub committed: Lsn,
    /// The chain after `received`.
    pub chain: Chain,
    /// The epoch of its newest record; 0 when its log is empty.
    pub tail_epoch: Epoch,
    /// A rebuild was interrupted: its target holds part of a base, and only another rebuild makes it whole.
    pub base_incomplete: bool,
}

impl SyncAck {
    /// Whether the facts can be true together: the tail is at most one past the head, and the common point lies in both
    /// logs. Facts that cannot decide nothing.
    #[must_use]
    pub fn is_consistent(&self) -> bool {
        let shorter = self.leader.head.min(self.follower.received);
        self.leader.tail <= self.leader.head.next() && self.leader.common.is_none_or(|common| common <= shorter)
    }
}

impl FollowerFacts {
    /// Where the follower's state stands: applied, or durable when nothing has been applied.
    #[must_use]
    pub const fn position(&self) -> Lsn {
        if self.applied.0 == 0 { self.durable } else { self.applied }
    }

    /// Where the follower's log ends: the highest of its marks.
    #[must_use]
    pub const fn end(&self) -> Lsn {
        let mut end = self.received.0;
        if self.durable.0 > end {
            end = self.durable.0;
        }
        if self.applied.0 > end {
            end = self.applied.0;
        }
        Lsn(end)
    }
}

/// The leader's log beside one follower's; where a follower feeds another, its own stands for the leader's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaderFacts {
    /// Oldest retained LSN; one past the head when nothing is retained. 0 counts as 1.
    pub tail: Lsn,
    /// Newest LSN; 0 when the log is empty.
    pub head: Lsn,
    /// The leader's own chain after the follower's `received`, where a batch of its log (or what came before its
    /// oldest segment) ends there. `None` says that none does: the log no longer reaches back to it, does not reach up
    /// to it, or has another history. While a session is under way the host need not look it up, and `None` says
    /// nothing.
    pub chain_at_received: Option<Chain>,
    /// The newest LSN up to which both logs are known to be the same, looked for only when they differ at
    /// `received`. `None` when no such point was found, 0 when they were compared down to the first record and
    /// share none.
    pub common: Option<Lsn>,
    /// The follower has applied nothing above `common` to its target's base, so that its log may be cut there.
    pub cut_possible: bool,
    /// This node is a follower itself: its log has every record of older epochs that the leader's has, and of this
    /// epoch a beginning. More may be on its way.
    pub is_relay: bool,
}

/// How far a session is. Neither number moves back; growth of either is progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The LSN reached.
    pub achieved: Lsn,
    /// Blocks of the base image taken or skipped; 0 unless it is a rebuild.
    pub base_blocks: u64,
}

impl Event {
    /// The event's name in snake case.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Event::AssignmentDelivered(_) => "assignment_delivered",
            Event::ReadinessObserved(_) => "readiness_observed",
            Event::SyncAckReceived(_) => "sync_ack_received",
            Event::SessionProgress { .. } => "session_progress",
            Event::SessionCompleted { .. } => "session_completed",
            Event::SessionFailed { .. } => "session_failed",
            Event::BarrierConfirmed { .. } => "barrier_confirmed",
        }
    }

    /// The epoch that the event belongs to.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        match self {
            Event::AssignmentDelivered(assignment) => assignment.epoch,
            Event::ReadinessObserved(readiness) => readiness.epoch,
            Event::SyncAckReceived(ack) => ack.epoch,
            Event::SessionProgress { epoch, .. }
            | Event::SessionCompleted { epoch, .. }
            | Event::SessionFailed { epoch, .. }
            | Event::BarrierConfirmed { epoch, .. } => *epoch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_position_is_what_was_applied_or_else_durable() {
        let facts = |received, durable, applied| FollowerFacts {
            received: Lsn(received),
            durable: Lsn(durable),
            applied: Lsn(applied),
            ..FollowerFacts::default()
        };
        assert_eq!(facts(9, 7, 5).position(), Lsn(5));
        assert_eq!(facts(9, 7, 0).position(), Lsn(7));
        assert_eq!(facts(9, 0, 0).position(), Lsn(0));
        assert_eq!(facts(9, 7, 5).end(), Lsn(9));
        assert_eq!(facts(0, 7, 8).end(), Lsn(8), "marks out of order count as the highest");
    }
}
