//! The words that the engine uses outward: each an enum with one fixed spelling, for logs, JSON and tests.
//!
//! `as_str`, `Display` and `FromStr` of one type always agree. The spellings are part of the interface and never
//! change.

use std::fmt;
use std::str::FromStr;

/// A text is not one of the words of a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownWord {
    /// What kind of word was wanted, as in "mode".
    pub wanted: &'static str,
    /// The text that is none.
    pub text: String,
}

impl fmt::Display for UnknownWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not a {}", self.text, self.wanted)
    }
}

impl std::error::Error for UnknownWord {}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $wanted:literal: $($(#[$word_doc:meta])* $word:ident = $text:literal,)+) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$word_doc])* $word,)+
        }

        impl $name {
            /// Every word, in the order of the declaration.
            pub const ALL: &[$name] = &[$($name::$word,)+];

            /// The one spelling.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $($name::$word => $text,)+
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                match text {
                    $($text => Ok($name::$word),)+
                    _ => Err(UnknownWord { wanted: $wanted, text: text.to_owned() }),
                }
            }
        }
    };
}

words! {
    /// What a node is to a shard, as assigned from outside.
    Role, "role":
    /// Takes appends, ships them, and decides how each follower recovers.
    Leader = "leader",
    /// Receives, reports facts and executes contracts; may feed others in its turn.
    Follower = "follower",
}

words! {
    /// How a session brings a follower to the leader's log.
    SessionKind, "session kind":
    /// Live shipping: the follower has everything, and gets what comes.
    KeepUp = "keep_up",
    /// Replay of retained log.
    CatchUp = "catch_up",
    /// Base image plus log.
    Rebuild = "rebuild",
}

words! {
    /// Where a session stands. The legal moves between phases are those of [`transition`](super::transition).
    Phase, "session phase":
    /// There is no session.
    Idle = "idle",
    /// Sent to the follower, which has not answered yet.
    Issued = "issued",
    /// The follower is at work.
    Running = "running",
    /// The leader accepted what the follower reached.
    Completed = "completed",
    /// Over without success. Stays so until fresh facts arrive.
    Failed = "failed",
}

impl Phase {
    /// Whether a session in this phase is under way: issued or running.
    #[must_use]
    pub const fn is_live(self) -> bool {
        matches!(self, Phase::Issued | Phase::Running)
    }
}

words! {
    /// The state of a shard, or of one follower of it, in one word.
    Mode, "mode":
    /// Nothing is assigned, or the leader has no followers.
    AllocatedOnly = "allocated_only",
    /// On the way to healthy; the [`Reason`] says what is awaited.
    BootstrapPending = "bootstrap_pending",
    /// A follower that receives.
    ReplicaReady = "replica_ready",
    /// A leader whose followers all keep up, with durability confirmed as widely as the commit policy asks.
    PublishHealthy = "publish_healthy",
    /// A session failed, or a follower had to be refused; the [`Reason`] says why.
    Degraded = "degraded",
    /// A follower is being rebuilt.
    NeedsRebuild = "needs_rebuild",
}

words! {
    /// Why a session failed.
    FailureReason, "failure reason":
    /// It belongs to an epoch that is over, or the histories of two epochs conflict.
    EpochMismatch = "epoch_mismatch",
    /// The connection went away, or the follower restarted.
    TransportLost = "transport_lost",
    /// No progress within the stall budget.
    ProgressStalled = "progress_stalled",
    /// Not done by its deadline.
    DeadlineExceeded = "deadline_exceeded",
    /// The log that it needs could not be kept.
    PinLost = "pin_lost",
    /// The leader has no base image to give.
    BaseUnavailable = "base_unavailable",
    /// The log of one side is damaged or has lost records.
    LocalWalCorrupt = "local_wal_corrupt",
    /// The base of one side is damaged.
    LocalBaseCorrupt = "local_base_corrupt",
    /// A newer session took its place.
    Superseded = "superseded",
    /// Somebody called it off: the role changed, or the follower left the assignment.
    Cancelled = "cancelled",
}

words! {
    /// Why a follower gets no session, although it is assigned: every session would destroy data that may be the only
    /// copy, or has to wait. The refusal ends with the first facts that allow a session.
    Refusal, "refusal":
    /// The follower, or what it knows to be committed, is ahead of the leader: the leader has lost data.
    LeaderBehind = "leader_behind",
    /// The follower has more of the epoch than this node, which is a follower itself and may still receive that, or a
    /// history that this node cannot compare any more.
    RelayBehind = "relay_behind",
    /// The logs have no proven point in common to return to, or only one below what is known to be committed.
    Diverged = "diverged",
    /// The follower's log holds records of a newer epoch than the leader's: this leader is deposed.
    NewerEpoch = "newer_epoch",
    /// The engine has used up its session ids. No shard lives that long; its first id was chosen too high.
    SessionIdsExhausted = "session_ids_exhausted",
}

impl Refusal {
    /// The reason that a degraded shard gives for it.
    #[must_use]
    pub const fn failure_reason(self) -> FailureReason {
        match self {
            Refusal::LeaderBehind => FailureReason::LocalWalCorrupt,
            Refusal::Diverged | Refusal::NewerEpoch => FailureReason::EpochMismatch,
            Refusal::SessionIdsExhausted | Refusal::RelayBehind => FailureReason::Cancelled,
        }
    }
}

/// Why a mode is what it is. Modes that say it all have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The host has not yet taken on the assigned role.
    AwaitingRoleApply,
    /// A follower's receiver does not listen yet.
    AwaitingReceiverReady,
    /// The leader's shippers do not know their followers yet.
    AwaitingShipperConfigured,
    /// Not every follower is connected and has reported its facts.
    AwaitingShipperConnected,
    /// Fewer followers than the commit policy asks have confirmed that anything is durable.
    AwaitingBarrierDurability,
    /// A catch-up or rebuild is under way.
    RecoveryInProgress,
    /// A session failed, or was refused.
    Failed(FailureReason),
}

impl Reason {
    const PLAIN: &[Reason] = &[
        Reason::AwaitingRoleApply,
        Reason::AwaitingReceiverReady,
        Reason::AwaitingShipperConfigured,
        Reason::AwaitingShipperConnected,
        Reason::AwaitingBarrierDurability,
        Reason::RecoveryInProgress,
    ];

    /// The one spelling; that of a failure is the failure's own.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Reason::AwaitingRoleApply => "awaiting_role_apply",
            Reason::AwaitingReceiverReady => "awaiting_receiver_ready",
            Reason::AwaitingShipperConfigured => "awaiting_shipper_configured",
            Reason::AwaitingShipperConnected => "awaiting_shipper_connected",
            Reason::AwaitingBarrierDurability => "awaiting_barrier_durability",
            Reason::RecoveryInProgress => "recovery_in_progress",
            Reason::Failed(reason) => reason.as_str(),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Reason {
    type Err = UnknownWord;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(&reason) = Reason::PLAIN.iter().find(|reason| reason.as_str() == text) {
            return Ok(reason);
        }
        text.parse().map(Reason::Failed).map_err(|_| UnknownWord { wanted: "reason", text: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelled<T: Copy + fmt::Display + FromStr + PartialEq + fmt::Debug>(all: &[T]) -> Vec<String>
    where
        T::Err: fmt::Debug,
    {
        for word in all {
            assert_eq!(word.to_string().parse::<T>().unwrap(), *word);
        }
        all.iter().map(T::to_string).collect()
    }

    #[test]
    fn every_word_has_its_one_spelling() {
        assert_eq!(spelled(Role::ALL), ["leader", "follower"]);
        assert_eq!(spelled(SessionKind::ALL), ["keep_up", "catch_up", "rebuild"]);
        assert_eq!(spelled(Phase::ALL), ["idle", "issued", "running", "completed", "failed"]);
        assert_eq!(
            spelled(Mode::ALL),
            ["allocated_only", "bootstrap_pending", "replica_ready", "publish_healthy", "degraded", "needs_rebuild"]
        );
        assert_eq!(
            spelled(FailureReason::ALL),
            [
                "epoch_mismatch",
                "transport_lost",
                "progress_stalled",
                "deadline_exceeded",
                "pin_lost",
                "base_unavailable",
                "local_wal_corrupt",
                "local_base_corrupt",
                "superseded",
                "cancelled"
            ]
        );
        assert_eq!(
            spelled(Refusal::ALL),
            ["leader_behind", "relay_behind", "diverged", "newer_epoch", "session_ids_exhausted"]
        );
        assert_eq!(
            spelled(Reason::PLAIN),
            [
                "awaiting_role_apply",
                "awaiting_receiver_ready",
                "awaiting_shipper_configured",
                "awaiting_shipper_connected",
                "awaiting_barrier_durability",
                "recovery_in_progress"
            ]
        );
    }

    #[test]
    fn a_reason_may_be_a_failure() {
        for &failure in FailureReason::ALL {
            assert_eq!(failure.as_str().parse(), Ok(Reason::Failed(failure)));
        }
    }

    #[test]
    fn other_texts_are_not_words() {
        let error = "Leader".parse::<Role>().unwrap_err();
        assert_eq!(error.to_string(), "\"Leader\" is not a role");
        assert_eq!("".parse::<Reason>().unwrap_err().to_string(), "\"\" is not a reason");
    }
}
