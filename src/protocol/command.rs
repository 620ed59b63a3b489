//! What the engine tells the host: nine commands.
//!
//! | command | what the host does |
//! |---|---|
//! | [`ApplyRole`](Command::ApplyRole) | persists the epoch, then takes on the role; reports `role_applied` |
//! | [`StartReceiver`](Command::StartReceiver) | listens as a follower; reports `receiver_ready` |
//! | [`ConfigureShipper`](Command::ConfigureShipper) | ships to these followers and no others; reports `shipper_configured` |
//! | [`StartRecoveryTask`](Command::StartRecoveryTask) | takes the pin and starts what executes the session |
//! | [`StartCatchUp`](Command::StartCatchUp) | sends the follower its catch-up session |
//! | [`StartRebuild`](Command::StartRebuild) | sends the follower its rebuild session |
//! | [`InvalidateSession`](Command::InvalidateSession) | tells the follower that its session is void |
//! | [`DrainRecoveryTask`](Command::DrainRecoveryTask) | stops what executes the session, then releases the pin |
//! | [`PublishProjection`](Command::PublishProjection) | shows the projection to whoever looks |
//!
//! Commands are carried out in the order given. Those of different followers may overlap; nothing overtakes an
//! `ApplyRole`, so that the epoch is persisted before anything is done under it. Each `StartRecoveryTask` is followed
//! by exactly one `DrainRecoveryTask` of the same session, sooner or later; together they bracket the life of the
//! executor and of its pin.
//!
//! Pin first, then issue: `StartRecoveryTask` always stands before the `StartCatchUp` or `StartRebuild` of its session.
//! A host that cannot take the pin, or loses it later, skips the session's further commands up to its drain, sends the
//! follower nothing, and reports [`SessionFailed`](super::Event::SessionFailed) with `pin_lost`.

use std::fmt;

use super::event::ReplicaInfo;
use super::projection::Projection;
use super::words::{FailureReason, Role, SessionKind};
use crate::types::{Epoch, Lsn, NodeId, SessionId, ShardId};

/// One thing that the host is to do. The engine only decides; whether and how it worked comes back as an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Persist the epoch, then take on the role.
    ApplyRole {
        /// The shard.
        shard: ShardId,
        /// The new epoch.
        epoch: Epoch,
        /// The new role.
        role: Role,
    },
    /// Listen for the leader of this epoch, and refuse older ones.
    StartReceiver {
        /// The shard.
        shard: ShardId,
        /// The epoch.
        epoch: Epoch,
    },
    /// Ship to exactly these followers, in the order of their ids.
    ConfigureShipper {
        /// The shard.
        shard: ShardId,
        /// The epoch.
        epoch: Epoch,
        /// Every follower. Empty means: ship to nobody.
        replicas: Vec<ReplicaInfo>,
    },
    /// Take the pin, then start what executes the session. For keep-up this is all: live shipping begins after
    /// the follower's log end, and the pin moves on with it.
    StartRecoveryTask {
        /// The shard.
        shard: ShardId,
        /// The follower.
        replica: NodeId,
        /// The session.
        session: SessionId,
        /// The session's epoch.
        epoch: Epoch,
        /// What it executes.
        kind: SessionKind,
        /// The oldest LSN that this node's log has to keep from now on.
        pin: Lsn,
    },
    /// Stop what executes the session and release its pin. Nothing to do where it has already stopped by itself.
    DrainRecoveryTask {
        /// The shard.
        shard: ShardId,
        /// The follower.
        replica: NodeId,
        /// The session.
        session: SessionId,
        /// The session's epoch.
        epoch: Epoch,
        /// Why it failed; `None` when it completed.
        reason: Option<FailureReason>,
    },
    /// Bring the follower's state from `start` to `target` by retained log.
    StartCatchUp {
        /// The shard.
        shard: ShardId,
        /// The follower.
        replica: NodeId,
        /// The session.
        session: SessionId,
        /// The session's epoch.
        epoch: Epoch,
        /// The follower's position: what lies after it is needed. (The bytes that its log lacks may be fewer.)
        start: Lsn,
        /// This node's head when the session was issued. Does not move.
        target: Lsn,
        /// The oldest LSN that this node's log keeps for it: the one after `start`. Taken by the task before.
        pin: Lsn,
        /// The follower first cuts its log after this LSN, which is the last that both logs share.
        cut: Option<Lsn>,
    },
    /// Give the follower a base image, and the log after it up to `target` and on.
    StartRebuild {
        /// The shard.
        shard: ShardId,
        /// The follower.
        replica: NodeId,
        /// The session.
        session: SessionId,
        /// The session's epoch.
        epoch: Epoch,
        /// This node's head when the session was issued. Does not move.
        target: Lsn,
    },
    /// The session is void: whatever the follower still does under it is refused.
    InvalidateSession {
        /// The shard.
        shard: ShardId,
        /// The follower.
        replica: NodeId,
        /// The session.
        session: SessionId,
        /// The session's epoch.
        epoch: Epoch,
        /// Why.
        reason: FailureReason,
    },
    /// The projection changed in more than its numbers.
    PublishProjection {
        /// What it is now.
        projection: Projection,
    },
}

impl Command {
    /// The command's name in snake case.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Command::ApplyRole { .. } => "apply_role",
            Command::StartReceiver { .. } => "start_receiver",
            Command::ConfigureShipper { .. } => "configure_shipper",
            Command::StartRecoveryTask { .. } => "start_recovery_task",
            Command::DrainRecoveryTask { .. } => "drain_recovery_task",
            Command::StartCatchUp { .. } => "start_catch_up",
            Command::StartRebuild { .. } => "start_rebuild",
            Command::InvalidateSession { .. } => "invalidate_session",
            Command::PublishProjection { .. } => "publish_projection",
        }
    }

    /// The shard that it is about.
    #[must_use]
    pub const fn shard(&self) -> ShardId {
        match self {
            Command::ApplyRole { shard, .. }
            | Command::StartReceiver { shard, .. }
            | Command::ConfigureShipper { shard, .. }
            | Command::StartRecoveryTask { shard, .. }
            | Command::DrainRecoveryTask { shard, .. }
            | Command::StartCatchUp { shard, .. }
            | Command::StartRebuild { shard, .. }
            | Command::InvalidateSession { shard, .. } => *shard,
            Command::PublishProjection { projection } => projection.shard,
        }
    }

    /// The follower and the session that it is about, if it is about one.
    #[must_use]
    pub const fn session(&self) -> Option<(NodeId, SessionId)> {
        match self {
            Command::StartRecoveryTask { replica, session, .. }
            | Command::DrainRecoveryTask { replica, session, .. }
            | Command::StartCatchUp { replica, session, .. }
            | Command::StartRebuild { replica, session, .. }
            | Command::InvalidateSession { replica, session, .. } => Some((*replica, *session)),
            Command::ApplyRole { .. }
            | Command::StartReceiver { .. }
            | Command::ConfigureShipper { .. }
            | Command::PublishProjection { .. } => None,
        }
    }
}

/// One line: the name, then what it is about as `name=value`.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Command::ApplyRole { shard, epoch, role } => write!(f, " shard={shard} epoch={epoch} role={role}"),
            Command::StartReceiver { shard, epoch } => write!(f, " shard={shard} epoch={epoch}"),
            Command::ConfigureShipper { shard, epoch, replicas } => {
                write!(f, " shard={shard} epoch={epoch} replicas=[")?;
                for (index, replica) in replicas.iter().enumerate() {
                    let comma = if index == 0 { "" } else { "," };
                    write!(f, "{comma}{}@{}", replica.node, replica.endpoint)?;
                }
                f.write_str("]")
            }
            Command::StartRecoveryTask { shard, replica, session, epoch, kind, pin } => {
                write!(f, " shard={shard} replica={replica} session={session} epoch={epoch} kind={kind} pin={pin}")
            }
            Command::DrainRecoveryTask { shard, replica, session, epoch, reason } => {
                write!(f, " shard={shard} replica={replica} session={session} epoch={epoch}")?;
                reason.map_or(Ok(()), |reason| write!(f, " reason={reason}"))
            }
            Command::StartCatchUp { shard, replica, session, epoch, start, target, pin, cut } => {
                write!(f, " shard={shard} replica={replica} session={session} epoch={epoch}")?;
                write!(f, " start={start} target={target} pin={pin}")?;
                cut.map_or(Ok(()), |cut| write!(f, " cut={cut}"))
            }
            Command::StartRebuild { shard, replica, session, epoch, target } => {
                write!(f, " shard={shard} replica={replica} session={session} epoch={epoch} target={target}")
            }
            Command::InvalidateSession { shard, replica, session, epoch, reason } => {
                write!(f, " shard={shard} replica={replica} session={session} epoch={epoch} reason={reason}")
            }
            Command::PublishProjection { projection } => write!(f, " {projection}"),
        }
    }
}
