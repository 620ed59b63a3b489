//! What came of one event: taken in, or ignored and why; and how the shard stands after it.

use std::fmt;

use super::session::IllegalTransition;
use super::words::{Mode, Reason};
use crate::types::{Epoch, Lsn, NodeId, SessionId};

/// The answer to one event, or to the passing of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an ignored event is worth a line in the log"]
pub struct Outcome {
    /// Whether the event was taken in.
    pub verdict: Verdict,
    /// The shard's mode after it.
    pub mode: Mode,
    /// Why the mode is what it is, unless it says it all.
    pub reason: Option<Reason>,
    /// Whether the mode is [`Mode::PublishHealthy`].
    pub healthy: bool,
    /// What is durable as widely as the commit policy asks. Never moves back within an epoch.
    pub durable: Lsn,
}

/// Whether an event was taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was.
    Applied,
    /// It changed nothing.
    Ignored(Ignored),
}

/// Why an event changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ignored {
    /// Its epoch is over.
    StaleEpoch {
        /// The event's epoch.
        offered: Epoch,
        /// The epoch in force.
        current: Epoch,
    },
    /// Its epoch has not been assigned here yet.
    FutureEpoch {
        /// The event's epoch.
        offered: Epoch,
        /// The epoch in force.
        current: Epoch,
    },
    /// Nothing has been assigned yet.
    NotAssigned,
    /// Only a leader does something with a barrier of its own.
    NotLeader,
    /// The node is not among the followers assigned.
    UnknownReplica {
        /// The node.
        node: NodeId,
    },
    /// It is about another session than the follower's present one.
    StaleSession {
        /// The event's session.
        offered: Option<SessionId>,
        /// The follower's session.
        current: Option<SessionId>,
    },
    /// The session cannot make this move.
    IllegalTransition(IllegalTransition),
    /// A completion short of the session's target.
    TargetNotReached {
        /// What was reached.
        achieved: Lsn,
        /// What was to be reached.
        target: Lsn,
    },
    /// A completion past the end of the log.
    BeyondHead {
        /// What was reported.
        achieved: Lsn,
        /// The leader's head.
        head: Lsn,
    },
    /// Facts that cannot be true together: a tail more than one past the head, or a common point past either log.
    InconsistentFacts,
    /// A follower's barrier while it does not count: it has no session under way, or is being rebuilt.
    NotCounted {
        /// The follower.
        node: NodeId,
    },
    /// An assignment without meaning.
    InvalidAssignment {
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl From<IllegalTransition> for Ignored {
    fn from(error: IllegalTransition) -> Self {
        Ignored::IllegalTransition(error)
    }
}

impl fmt::Display for Ignored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |session: Option<SessionId>| session.map_or("none".to_owned(), |id| id.to_string());
        match self {
            Ignored::StaleEpoch { offered, current } => {
                write!(f, "epoch {offered} is over: epoch {current} is in force")
            }
            Ignored::FutureEpoch { offered, current } => {
                write!(f, "epoch {offered} has not been assigned: epoch {current} is in force")
            }
            Ignored::NotAssigned => f.write_str("nothing has been assigned yet"),
            Ignored::NotLeader => f.write_str("this node does not lead the shard"),
            Ignored::UnknownReplica { node } => write!(f, "node {node} is not a follower of this shard"),
            Ignored::StaleSession { offered, current } => {
                write!(f, "session {} is not the follower's session, which is {}", name(*offered), name(*current))
            }
            Ignored::IllegalTransition(error) => error.fmt(f),
            Ignored::TargetNotReached { achieved, target } => {
                write!(f, "LSN {achieved} is short of the session's target {target}")
            }
            Ignored::BeyondHead { achieved, head } => write!(f, "LSN {achieved} is past the head {head}"),
            Ignored::InconsistentFacts => f.write_str("the facts reported cannot be true together"),
            Ignored::NotCounted { node } => write!(f, "node {node} does not count for durability at present"),
            Ignored::InvalidAssignment { reason } => write!(f, "the assignment has no meaning: {reason}"),
        }
    }
}

/// One line: `applied` or `ignored (why)`, the mode, its reason, what is durable.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.verdict {
            Verdict::Applied => f.write_str("applied")?,
            Verdict::Ignored(why) => write!(f, "ignored ({why})")?,
        }
        write!(f, " mode={}", self.mode)?;
        if let Some(reason) = self.reason {
            write!(f, " reason={reason}")?;
        }
        write!(f, " durable={}", self.durable)
    }
}
