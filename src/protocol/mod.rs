//! The protocol engine: events in, commands and a projection out. Deterministic and free of side effects.
//!
//! ```text
//!  assignment ─┐                                            ┌─▶ roles, receivers, shippers
//!  facts ──────┼─▶ Event ──▶ Engine::apply ──▶ Command ─────┼─▶ sessions to followers, their executors and pins
//!  sessions ───┤                  │                         └─▶ projection
//!  barriers ───┘     now ─────────┘
//! ```
//!
//! It has no clock, no I/O, no threads, no randomness and no hidden order, and uses nothing of the crate but its types
//! and limits. The same settings, events and times give the same commands, so that the same decisions run in a node, in
//! a simulation, and in anybody else's system.
//!
//! # Three authorities
//!
//! - The *assignment* comes from outside: role, epoch, followers. The engine obeys it, and refuses an older one.
//! - *Sessions* are those of whoever is followed, a leader or a follower that feeds others: one contract with each
//!   follower, keep-up, catch-up or rebuild. Followers report facts and execute contracts; they never choose their own
//!   recovery.
//! - The *projection* is derived from both and published outward. Nothing reads it back in.
//!
//! # How to host it
//!
//! One [`Engine`] per shard and node. The host routes every event to the shard's engine, one at a time, in the order in
//! which it learnt of them, and carries out the commands in the order given:
//!
//! 1. observe: turn an assignment, a follower's report or an executor's end into an [`Event`];
//! 2. [`Engine::apply`] it, with the time and a buffer for commands that is kept and cleared;
//! 3. carry out the commands; what comes of them is a later event;
//! 4. sleep until the next observation or [`Engine::next_deadline`], and then [`Engine::tick`].
//!
//! Time has two ways in and no other. It is an argument of `apply`, and `tick` is for when nothing happens. Either way,
//! sessions whose deadline or stall budget is over fail before anything else is looked at. Time is [`Millis`] on any
//! clock that does not move back.
//!
//! ```
//! use towline::protocol::*;
//! use towline::{Chain, Epoch, Lsn, NodeId, SessionId, ShardId};
//!
//! let mut engine = Engine::new(Settings {
//!     shard: ShardId(0),
//!     node: NodeId(1),
//!     first_session: SessionId(1),
//!     limits: SessionLimits::default(),
//! });
//! let mut commands = Vec::new();
//! let outcome = engine.apply(
//!     Millis(0),
//!     &Event::AssignmentDelivered(Assignment {
//!         epoch: Epoch(1),
//!         role: Role::Leader,
//!         replicas: vec![ReplicaInfo { node: NodeId(2), endpoint: "follower:7000".to_owned() }],
//!         commit_followers: 1,
//!     }),
//!     &mut commands,
//! );
//! assert_eq!(outcome.reason, Some(Reason::AwaitingRoleApply));
//! assert!(matches!(commands[0], Command::ApplyRole { role: Role::Leader, .. }));
//!
//! // A follower reports in, three records behind.
//! commands.clear();
//! let facts = SyncAck {
//!     epoch: Epoch(1),
//!     replica: NodeId(2),
//!     follower: FollowerFacts {
//!         received: Lsn(7), durable: Lsn(7), applied: Lsn(7),
//!         chain: Chain(70), tail_epoch: Epoch(1), ..FollowerFacts::default()
//!     },
//!     leader: LeaderFacts {
//!         tail: Lsn(1), head: Lsn(10), chain_at_received: Some(Chain(70)), ..LeaderFacts::default()
//!     },
//! };
//! let _ = engine.apply(Millis(5), &Event::SyncAckReceived(facts), &mut commands);
//! assert!(matches!(commands[0], Command::StartRecoveryTask { pin: Lsn(8), .. }));
//! assert!(matches!(commands[1], Command::StartCatchUp { start: Lsn(7), target: Lsn(10), .. }));
//! ```
//!
//! # The life of a session
//!
//! - With no session under way, a follower's facts decide; the table is that of [`decision`]. A follower that would
//!   lose what may be the only copy gets a [`Refusal`] instead of a session: fail closed, visible in the projection.
//! - The target is the head at that moment and never moves. The pin is taken before the session goes out.
//! - While a session is under way, facts are noted and decide nothing. The one exception ends a session and starts
//!   none: a keep-up whose follower can no longer be shipped to fails.
//! - A completed session is followed by keep-up at once, whose pin is taken before the old one is released.
//! - A failed session stays failed until the follower's next facts; then the leader decides anew. Failure never
//!   escalates by itself.
//! - Catch-up and rebuild have a deadline; each kind has a stall budget, which for a keep-up runs only while its
//!   follower is behind. So none runs for ever without getting anywhere.
//! - A change of epoch or role ends every session; a follower that leaves the assignment takes its session with it.
//!   Both are told to followers by `InvalidateSession` under the session's own epoch.
//! - An event with another epoch or session id than the present one changes nothing, and its [`Outcome`] says so.
//!
//! # What counts as durable
//!
//! [`Outcome::durable`] is what the k-th follower has on stable storage, k being the assignment's `commit_followers`;
//! with k = 0 it is what the leader's own disk has confirmed. A follower counts while its log is known to be the
//! leader's: not while it is rebuilt or refused, and not beyond the cut while a divergent tail is being cut. Within an
//! epoch the number never moves back, whatever becomes of followers; a new epoch starts from nothing confirmed.
//!
//! A follower of an empty log is kept up; the shard is healthy once a barrier confirms even that (durable 0).
//!
//! # What changes when
//!
//! [`Command::PublishProjection`] is given when the projection changed in more than its numbers. Numbers change with
//! every ack; they stand in each [`Outcome`] and in [`Engine::projection`], so that a steady stream of acks gives no
//! commands and allocates nothing.

pub mod command;
pub mod decision;
mod engine;
pub mod event;
pub mod outcome;
pub mod projection;
pub mod session;
mod state;
pub mod words;

pub use command::Command;
pub use decision::{Decision, decide};
pub use engine::{Engine, Settings};
pub use event::{Assignment, Event, FollowerFacts, LeaderFacts, Progress, ReadinessObserved, ReplicaInfo, SyncAck};
pub use outcome::{Ignored, Outcome, Verdict};
pub use projection::{Projection, ReplicaProjection};
pub use session::{IllegalTransition, Millis, Session, SessionLimits, transition};
pub use state::Violation;
pub use words::{FailureReason, Mode, Phase, Reason, Refusal, Role, SessionKind, UnknownWord};

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
