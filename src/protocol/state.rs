//! What the engine remembers of a shard, and what is always true of it.
//!
//! The invariants, checked by `verify` after every event in tests and debug builds:
//!
//! 1. Followers are in strictly ascending order of their ids, at most `MAX_FOLLOWERS`, and none is this node.
//! 2. Every session has the epoch in force and an id below the next one; no two sessions share an id.
//! 3. A session is never idle, has a failure reason exactly when it failed, and a deadline unless it keeps up;
//!    a keep-up is not completed. A catch-up starts at or below its target and at or above what it pins.
//! 4. A refused follower has no session.
//! 5. What is published as durable is at or below the head, and at or above what k followers have confirmed.
//! 6. The next check of the time is no later than any live session's.

use std::fmt;

use super::event::{FollowerFacts, ReplicaInfo};
use super::session::{Millis, Session, SessionLimits};
use super::words::{Phase, Refusal, Role, SessionKind};
use crate::limits::MAX_FOLLOWERS;
use crate::types::{Epoch, Lsn, NodeId, SessionId, ShardId};

/// How far the host has come with carrying out the assignment. All false after each change of epoch or role.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Readiness {
    pub role_applied: bool,
    pub receiver_ready: bool,
    /// Also false after each change of the followers.
    pub shipper_configured: bool,
    pub shipper_connected: bool,
}

/// One follower.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Replica {
    pub node: NodeId,
    /// As last reported; after a completed session, as the completion says.
    pub facts: FollowerFacts,
    /// What counts as durable on it for commit: `None` before anything is confirmed, while it is rebuilt, and while it
    /// is refused.
    pub counted: Option<Lsn>,
    pub session: Option<Session>,
    pub refusal: Option<Refusal>,
}

impl Replica {
    pub fn new(node: NodeId) -> Replica {
        Replica { node, facts: FollowerFacts::default(), counted: None, session: None, refusal: None }
    }

    pub fn phase(&self) -> Phase {
        self.session.as_ref().map_or(Phase::Idle, |session| session.phase)
    }

    /// Takes in what is durable on the follower, as far as it is known to be the leader's history. 0 confirms nothing,
    /// unless something was confirmed before.
    pub fn count(&mut self, durable: Lsn) {
        if let Some(session) = &self.session {
            self.counted = match session.kind {
                SessionKind::Rebuild => None,
                SessionKind::KeepUp | SessionKind::CatchUp => {
                    let shared = session.cut.map_or(durable, |cut| durable.min(cut));
                    if shared > Lsn::ZERO || self.counted.is_some() { Some(shared) } else { None }
                }
            };
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ShardState {
    pub shard: ShardId,
    /// This node.
    pub node: NodeId,
    pub epoch: Epoch,
    pub role: Option<Role>,
    pub commit_followers: u16,
    pub readiness: Readiness,
    /// The followers as assigned, in the order of `replicas`.
    pub assigned: Vec<ReplicaInfo>,
    /// In ascending order of `node`.
    pub replicas: Vec<Replica>,
    /// Of this node's log, as last heard of in this epoch; neither moves back.
    pub tail: Lsn,
    pub head: Lsn,
    /// Confirmed by the leader's own disk in this epoch.
    pub local_durable: Option<Lsn>,
    /// Published: what the k-th follower has confirmed in this epoch.
    pub durable: Option<Lsn>,
    /// The next session's id.
    pub next_session: SessionId,
    /// Nothing runs out of time before this.
    pub wake_at: Millis,
}

impl ShardState {
    pub fn new(shard: ShardId, node: NodeId, first_session: SessionId) -> ShardState {
        ShardState {
            shard,
            node,
            epoch: Epoch::ZERO,
            role: None,
            commit_followers: 0,
            readiness: Readiness::default(),
            assigned: Vec::new(),
            replicas: Vec::new(),
            tail: Lsn::ZERO,
            head: Lsn::ZERO,
            local_durable: None,
            durable: None,
            next_session: first_session.max(SessionId(1)),
            wake_at: Millis::MAX,
        }
    }

    /// A new term or role: everything learnt under the old one is forgotten.
    pub fn begin(&mut self, epoch: Epoch, role: Role) {
        let fresh = ShardState::new(self.shard, self.node, self.next_session);
        *self = ShardState { epoch, role: Some(role), ..fresh };
    }

    /// Where in `replicas` a follower stands.
    pub fn find(&self, node: NodeId) -> Option<usize> {
        self.replicas.binary_search_by_key(&node, |replica| replica.node).ok()
    }

    /// The newest LSN that at least k followers count as durable; the leader's own when k is 0. `None` when fewer
    /// have confirmed anything.
    fn kth_durable(&self) -> Option<Lsn> {
        let k = usize::from(self.commit_followers);
        if k == 0 {
            return self.local_durable;
        }
        let mut counted = [Lsn::ZERO; MAX_FOLLOWERS];
        let mut len = 0;
        for (slot, lsn) in counted.iter_mut().zip(self.replicas.iter().filter_map(|replica| replica.counted)) {
            *slot = lsn;
            len += 1;
        }
        let counted = counted.get_mut(..len)?;
        let index = len.checked_sub(k)?;
        Some(*counted.select_nth_unstable(index).1)
    }

    /// Moves what is published forward, if `counted` has. Returns whether this is the first confirmation.
    pub fn publish_durable(&mut self, counted: Option<Lsn>) -> bool {
        // The k-th follower cannot have moved past what is published unless this one has.
        if counted.is_none() || (self.durable.is_some() && counted <= self.durable) {
            return false;
        }
        let first = self.durable.is_none();
        self.durable = self.durable.max(self.kth_durable());
        self.head = self.head.max(self.durable.unwrap_or_default());
        first && self.durable.is_some()
    }

    /// Checks the [invariants](self).
    pub fn verify(&self, limits: &SessionLimits) -> Result<(), Violation> {
        let violated = |invariant| Err(Violation { shard: self.shard, invariant });
        let ascending = self.replicas.windows(2).all(|pair| pair[0].node < pair[1].node);
        if !ascending || self.replicas.len() > MAX_FOLLOWERS || self.find(self.node).is_some() {
            return violated("followers are ordered, few, and others");
        }
        if !self.assigned.iter().map(|info| info.node).eq(self.replicas.iter().map(|replica| replica.node)) {
            return violated("the followers are those assigned");
        }
        for (index, replica) in self.replicas.iter().enumerate() {
            let Some(session) = &replica.session else { continue };
            let earlier = self.replicas.iter().take(index).filter_map(|other| other.session.as_ref());
            if session.epoch != self.epoch || session.id >= self.next_session {
                return violated("a session belongs to the epoch and was issued here");
            }
            if earlier.into_iter().any(|other| other.id == session.id) {
                return violated("session ids are unique");
            }
            if !is_sound(session) {
                return violated("a session's fields agree with its kind and phase");
            }
            if replica.refusal.is_some() {
                return violated("a refused follower has no session");
            }
            if session.due(limits).is_some_and(|due| due < self.wake_at) {
                return violated("the time is checked before a session runs out of it");
            }
        }
        if self.durable.unwrap_or_default() > self.head || self.durable < self.kth_durable() {
            return violated("durable lies between what is confirmed and the head");
        }
        Ok(())
    }
}

fn is_sound(session: &Session) -> bool {
    let keeps_up = session.kind == SessionKind::KeepUp;
    session.phase != Phase::Idle
        && (session.phase == Phase::Failed) == session.reason.is_some()
        && session.deadline.is_none() == keeps_up
        && !(keeps_up && session.phase == Phase::Completed)
        && session.start <= session.target
        && session.start <= session.pin
        && session.cut.is_none_or(|cut| cut == session.start)
}

/// An invariant of the engine does not hold: a defect of the engine, never of its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The shard.
    pub shard: ShardId,
    /// What should be true.
    pub invariant: &'static str,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the state of shard {} is broken: it should hold that {}", self.shard, self.invariant)
    }
}

impl std::error::Error for Violation {}
