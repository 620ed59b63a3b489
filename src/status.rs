//! What a node says about itself: a snapshot of marks, cheap to take, for people, programs and the wire, which has it
//! in the format of [`codec`].

pub mod codec;
mod json;

use std::sync::Arc;
use std::time::Duration;

use crate::commit::AckLevel;
use crate::data_dir::Manifest;
pub use crate::protocol::Role;
use crate::protocol::{Mode, Phase, Progress, Reason, Refusal, ReplicaProjection, SessionKind};
use crate::retention::PinStatus;
use crate::server::ServerShard;
use crate::types::{ClusterId, Epoch, Lsn, NodeId, RegionId, SessionId, ShardId};
use crate::wal::ScrubStatus;

pub use json::json_text;

/// A node, as it was when it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// What it does.
    pub role: Role,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Who it is.
    pub node: NodeId,
    /// Where its log originates.
    pub region: RegionId,
    /// The highest epoch it has accepted.
    pub epoch: Epoch,
    /// How long it has been running.
    pub uptime: Duration,
    /// Its shards, by number.
    pub shards: Vec<ShardStatus>,
}

/// One shard of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardStatus {
    /// Which.
    pub shard: ShardId,
    /// Oldest LSN retained.
    pub tail: Lsn,
    /// Newest LSN written.
    pub head: Lsn,
    /// The epoch of the newest record; see [`Log::head_epoch`](crate::wal::Log::head_epoch).
    pub head_epoch: Epoch,
    /// Newest LSN on stable storage.
    pub synced: Lsn,
    /// Newest LSN committed by the node's policy; on a follower, by its leader's word.
    pub committed: Lsn,
    /// Bytes of its segments.
    pub retained_bytes: u64,
    /// The bound on the bytes of all its files, spares too; `None` for no bound.
    pub max_wal_bytes: Option<u64>,
    /// How the shard is, in a word.
    pub mode: Mode,
    /// Why the mode is what it is, unless it says it all.
    pub reason: Option<Reason>,
    /// Holds on its log, in the order in which they were taken.
    pub pins: Vec<PinStatus>,
    /// The failure that made it read-only, if any; of a deposed leader, that another leads.
    pub poison: Option<String>,
    /// On a follower: how following goes.
    pub following: Option<FollowingStatus>,
    /// Those known to follow this node, in the order of their ids.
    pub followers: Vec<FollowerStatus>,
    /// What reading its sealed segments again has come to.
    pub scrub: ScrubStatus,
}

/// How a follower's shard follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FollowingStatus {
    /// Whether a stream from the leader stands, or from the follower that feeds this one.
    pub connected: bool,
    /// The head of whom it follows as last heard, which behind a relay is not the leader's; at least this node's own.
    pub leader_head: Lsn,
    /// Newest LSN that the target has applied and serves: it stands still during a rebuild.
    pub applied: Lsn,
    /// When the leader was last heard, in milliseconds since 1970; 0 for never.
    pub heard_at_ms: u64,
    /// The target is being rebuilt, or waits for it: the node cannot lead.
    pub rebuilding: bool,
    /// What went wrong last, while not connected.
    pub error: Option<String>,
}

/// One follower of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FollowerStatus {
    /// Who.
    pub node: NodeId,
    /// Whether a stream to it stands.
    pub connected: bool,
    /// Newest LSN handed to its stream.
    pub shipped: Lsn,
    /// Newest LSN in its log.
    pub received: Lsn,
    /// Newest LSN on its stable storage.
    pub durable: Lsn,
    /// Newest LSN applied by its target.
    pub applied: Lsn,
    /// When it last acknowledged, in milliseconds since 1970; 0 for never.
    pub acked_at_ms: u64,
    /// Log bytes that it has not received yet, or somewhat more: of the segment that it is in, all of it counts.
    pub lag_bytes: u64,
    /// How it is, in a word.
    pub mode: Mode,
    /// Why the mode is what it is, unless it says it all.
    pub reason: Option<Reason>,
    /// Why it gets no session, if it is refused one.
    pub refusal: Option<Refusal>,
    /// Log that it needs was given up because the shard's log had grown to its bound: it has to be rebuilt.
    pub place_lost: bool,
    /// Its session, live or over.
    pub session: Option<SessionStatus>,
    /// How its history was found to differ from this node's, if it was: then nothing of it counts.
    pub divergence: Option<String>,
}

/// A follower's session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionStatus {
    /// Its name.
    pub id: SessionId,
    /// What it does.
    pub kind: SessionKind,
    /// Where it stands.
    pub phase: Phase,
    /// The LSN that it is to reach.
    pub target: Lsn,
    /// How far it is.
    pub progress: Progress,
}

impl SessionStatus {
    fn of(replica: &ReplicaProjection) -> Option<SessionStatus> {
        let (id, kind) = replica.session.zip(replica.kind)?;
        Some(SessionStatus { id, kind, phase: replica.phase, target: replica.target, progress: replica.progress })
    }
}

impl FollowerStatus {
    /// Where it stands, in a word.
    #[must_use]
    pub fn state(&self, head: Lsn) -> &'static str {
        match (self.connected, self.received >= head) {
            (false, _) => "disconnected",
            (true, true) => "keep_up",
            (true, false) => "catch_up",
        }
    }
}

impl Status {
    pub(crate) fn collect(
        role: Role,
        manifest: Manifest,
        uptime: Duration,
        shards: impl Iterator<Item = Arc<ServerShard>>,
    ) -> Status {
        Status {
            role,
            cluster: manifest.cluster,
            node: manifest.node,
            region: manifest.region,
            epoch: manifest.epoch,
            uptime,
            shards: shards.map(|shard| ShardStatus::collect(&shard)).collect(),
        }
    }
}

impl ShardStatus {
    fn collect(shard: &ServerShard) -> ShardStatus {
        let log = &shard.log;
        let head = log.head();
        let projection = shard.host.projection();
        let marks = shard.commits.followers();
        let retention = shard.host.retention();
        ShardStatus {
            shard: log.shard(),
            tail: log.tail(),
            head,
            head_epoch: log.head_epoch(),
            synced: log.synced().load(),
            committed: shard.commits.committed().min(head),
            retained_bytes: log.retained_bytes(),
            max_wal_bytes: retention.max_wal_bytes(),
            mode: projection.mode,
            reason: projection.reason,
            pins: retention.pins(),
            poison: log.read_only_reason(),
            scrub: log.scrub_status(),
            following: shard.following.as_ref().map(|state| FollowingStatus {
                connected: state.is_connected(),
                leader_head: state.leader_head().max(head),
                applied: state.served(),
                heard_at_ms: state.heard_at_ms(),
                rebuilding: shard.is_rebuilding(),
                error: state.error(),
            }),
            followers: projection
                .replicas
                .iter()
                .map(|replica| {
                    // None since this node started: then all that is known is where it stood when it was last seen.
                    let marks = marks.iter().find(|marks| marks.node() == replica.node);
                    let at = |level| marks.map_or(Lsn::ZERO, |marks| marks.at(level));
                    FollowerStatus {
                        node: replica.node,
                        connected: marks.is_some_and(|marks| marks.is_connected()),
                        // The mark moves when all has been handed over, which behind a busy writer may take long.
                        shipped: marks.map_or(Lsn::ZERO, |marks| marks.shipped()).max(at(AckLevel::Received)),
                        received: at(AckLevel::Received),
                        durable: at(AckLevel::Durable),
                        applied: at(AckLevel::Applied),
                        acked_at_ms: marks.map_or(0, |marks| marks.acked_at_ms()),
                        lag_bytes: log.bytes_after(at(AckLevel::Received)),
                        mode: replica.mode,
                        reason: replica.reason,
                        refusal: replica.refusal,
                        place_lost: shard.host.has_lost_place(replica.node),
                        session: SessionStatus::of(replica),
                        divergence: marks.and_then(|marks| marks.divergence()),
                    }
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wal::Finding;

    fn sample() -> Status {
        Status {
            role: Role::Leader,
            cluster: ClusterId(7),
            node: NodeId(1),
            region: RegionId(0),
            epoch: Epoch(2),
            uptime: Duration::from_millis(1500),
            shards: vec![ShardStatus {
                shard: ShardId(0),
                tail: Lsn(1),
                head: Lsn(10),
                head_epoch: Epoch(1),
                synced: Lsn(9),
                committed: Lsn(8),
                retained_bytes: 65536,
                max_wal_bytes: Some(1 << 30),
                mode: Mode::Degraded,
                reason: Some(Reason::Failed(crate::protocol::FailureReason::PinLost)),
                pins: vec![PinStatus {
                    owner: "node 2".to_owned(),
                    reason: "catch_up".to_owned(),
                    lsn: Lsn(4),
                    lost: true,
                }],
                poison: Some("disk \"a\" failed\n".to_owned()),
                scrub: ScrubStatus {
                    passes: 3,
                    completed_at_ms: 9,
                    bytes: 4711,
                    findings: vec![Finding {
                        path: "a/b.wal".into(),
                        segment: Lsn(1),
                        offset: 4096,
                        end: 5000,
                        lsn: Lsn(2),
                        reason: "checksum".to_owned(),
                    }],
                },
                following: Some(FollowingStatus {
                    connected: true,
                    leader_head: Lsn(12),
                    applied: Lsn(7),
                    heard_at_ms: 5,
                    rebuilding: true,
                    error: None,
                }),
                followers: vec![FollowerStatus {
                    node: NodeId(2),
                    connected: true,
                    shipped: Lsn(10),
                    received: Lsn(8),
                    durable: Lsn(7),
                    applied: Lsn(6),
                    acked_at_ms: 0,
                    lag_bytes: 128,
                    mode: Mode::BootstrapPending,
                    reason: Some(Reason::RecoveryInProgress),
                    refusal: Some(Refusal::Diverged),
                    place_lost: true,
                    session: Some(SessionStatus {
                        id: SessionId(77),
                        kind: SessionKind::CatchUp,
                        phase: Phase::Running,
                        target: Lsn(10),
                        progress: Progress { achieved: Lsn(8), base_blocks: 3 },
                    }),
                    divergence: Some("at LSN 8".to_owned()),
                }],
            }],
        }
    }

    #[test]
    fn a_status_survives_the_wire() {
        assert_eq!(Status::decode(&sample().encode()), Ok(sample()));
    }

    #[test]
    fn json_names_states_and_escapes_texts() {
        let json = sample().to_json();
        assert!(json.contains(r#""state":"catch_up""#), "{json}");
        assert!(json.contains(r#""poison":"disk \"a\" failed\u000a""#), "{json}");
        assert!(json.contains(r#""kind":"catch_up","phase":"running","target":10,"achieved":8"#), "{json}");
        assert!(json.contains(r#""owner":"node 2","reason":"catch_up","lsn":4,"lost":true"#), "{json}");
        assert!(json.contains(r#""mode":"degraded","reason":"pin_lost""#), "{json}");
        assert!(json.contains(r#""divergence":"at LSN 8""#), "{json}");
        assert!(json.contains(r#""head":10,"head_epoch":1"#) && json.contains(r#""rebuilding":true"#), "{json}");
        assert!(json.contains(r#""lag_records":2"#) && json.contains(r#""acked_ms_ago":null"#), "{json}");
    }

    proptest! {
        #[test]
        fn every_cut_and_any_bytes_are_refused_without_panic(cut in any::<prop::sample::Index>(),
                                                             bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let encoded = sample().encode();
            prop_assert!(Status::decode(&encoded[..cut.index(encoded.len())]).is_err());
            let _ = Status::decode(&bytes);
        }
    }
}
