//! What a node says about itself: a snapshot of marks, cheap to take, for people, programs and the wire.
//!
//! # Format, version 3
//!
//! The body of a `Status` frame. All numbers are little-endian; a text is its length in bytes (4 bytes) and UTF-8.
//!
//! | field | size |
//! |---|---:|
//! | version, 3 | 2 |
//! | role: 1 leader, 2 follower | 1 |
//! | cluster, node, region, epoch | 16, 8, 2, 8 |
//! | uptime in milliseconds | 8 |
//! | number of shards | 2 |
//! | for each shard: shard, tail, head, synced, committed, retained bytes | 2, 8, 8, 8, 8, 8 |
//! | `max_wal_bytes`, 0 for no bound | 8 |
//! | mode, reason: texts, the reason empty if there is none | |
//! | number of pins | 2 |
//! | for each pin: LSN, lost (1 byte), owner and reason: texts | 8, 1 |
//! | poison: text, empty if sound | |
//! | following: 0 or 1; if 1: connected (1 byte), leader head, applied, heard at (milliseconds since 1970), error: text | 1, 1, 8, 8, 8 |
//! | number of followers | 2 |
//! | for each follower: node, connected (1 byte), shipped, received, durable, applied, acknowledged at, lag in bytes | 8, 1, 8, 8, 8, 8, 8, 8 |
//! | then its mode, reason and refusal: texts, empty if there is none | |
//! | then place lost (1 byte), session kind and phase: texts, the kind empty if there is none | 1 |
//! | then session, its target, achieved LSN and base blocks | 8, 8, 8, 8 |
//! | then how its history differs: text, empty if that is not known to be so | |
//! | then of scrubbing: passes, last completed (milliseconds since 1970), bytes, number of findings | 8, 8, 8, 2 |
//! | for each finding: segment, offset, end, LSN, path and reason: texts | 8, 8, 8, 8 |
//!
//! Modes, reasons, refusals, kinds and phases are the words of [`crate::protocol`].

use std::fmt::Write as _;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::commit::AckLevel;
use crate::data_dir::Manifest;
pub use crate::protocol::Role;
use crate::protocol::{Mode, Phase, Progress, Reason, Refusal, ReplicaProjection, SessionKind, UnknownWord};
use crate::retention::PinStatus;
use crate::server::ServerShard;
use crate::types::{ClusterId, Epoch, Lsn, NodeId, RegionId, SessionId, ShardId};
use crate::wal::{Finding, ScrubStatus, unix_ms};

const VERSION: u16 = 3;

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
    /// Newest LSN on stable storage.
    pub synced: Lsn,
    /// Newest LSN committed by the node's policy.
    pub committed: Lsn,
    /// Bytes of its segments.
    pub retained_bytes: u64,
    /// The bound on those bytes; `None` for no bound.
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
    /// On a leader: the followers known, in the order of their ids.
    pub followers: Vec<FollowerStatus>,
    /// What reading its sealed segments again has come to.
    pub scrub: ScrubStatus,
}

/// How a follower's shard follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FollowingStatus {
    /// Whether a stream from the leader stands.
    pub connected: bool,
    /// The leader's head as last heard; at least this node's own.
    pub leader_head: Lsn,
    /// Newest LSN applied.
    pub applied: Lsn,
    /// When the leader was last heard, in milliseconds since 1970; 0 for never.
    pub heard_at_ms: u64,
    /// What went wrong last, while not connected.
    pub error: Option<String>,
}

/// One follower of a leader's shard.
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
    /// Log bytes that it has not received yet; of which segments it needs, whole ones are counted whole.
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
    /// How its history was found to differ from the leader's, if it was: then nothing of it counts.
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

    /// As JSON, one object.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut json = String::new();
        let now_ms = unix_ms();
        let _ = write!(
            json,
            "{{\"role\":\"{}\",\"cluster\":\"{}\",\"node\":{},\"region\":{},\"epoch\":{},\"uptime_ms\":{},\"shards\":[",
            self.role.as_str(),
            self.cluster,
            self.node,
            self.region,
            self.epoch,
            self.uptime.as_millis()
        );
        for (index, shard) in self.shards.iter().enumerate() {
            json.push_str(if index == 0 { "" } else { "," });
            shard.write_json(&mut json, now_ms);
        }
        json.push_str("]}");
        json
    }

    /// The body of a `Status` frame.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.push(match self.role {
            Role::Leader => 1,
            Role::Follower => 2,
        });
        out.extend_from_slice(&self.cluster.0.to_le_bytes());
        out.extend_from_slice(&self.node.0.to_le_bytes());
        out.extend_from_slice(&self.region.0.to_le_bytes());
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        out.extend_from_slice(&u64::try_from(self.uptime.as_millis()).unwrap_or(u64::MAX).to_le_bytes());
        put_count(&mut out, self.shards.len());
        for shard in &self.shards {
            shard.encode(&mut out);
        }
        out
    }

    /// Reads the body of a `Status` frame.
    ///
    /// # Errors
    ///
    /// What is wrong with it, as half a sentence.
    pub fn decode(bytes: &[u8]) -> Result<Status, String> {
        let mut from = Fields(bytes);
        let version = from.u16()?;
        if version != VERSION {
            return Err(format!("status version {version} is not {VERSION}"));
        }
        let role = match from.u8()? {
            1 => Role::Leader,
            2 => Role::Follower,
            other => return Err(format!("role {other} is not known")),
        };
        let mut status = Status {
            role,
            cluster: ClusterId(u128::from(from.u64()?) | u128::from(from.u64()?) << 64),
            node: NodeId(from.u64()?),
            region: RegionId(from.u16()?),
            epoch: Epoch(from.u64()?),
            uptime: Duration::from_millis(from.u64()?),
            shards: Vec::new(),
        };
        for _ in 0..from.u16()? {
            status.shards.push(ShardStatus::decode(&mut from)?);
        }
        if from.0.is_empty() { Ok(status) } else { Err(format!("{} bytes too many", from.0.len())) }
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
                applied: state.applied(),
                heard_at_ms: state.heard_at_ms(),
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

    fn write_json(&self, json: &mut String, now_ms: u64) {
        let _ = write!(
            json,
            "{{\"shard\":{},\"tail\":{},\"head\":{},\"synced\":{},\"committed\":{},\"retained_bytes\":{},\
             \"max_wal_bytes\":{},\"mode\":{},\"reason\":{},\"poison\":{}",
            self.shard,
            self.tail,
            self.head,
            self.synced,
            self.committed,
            self.retained_bytes,
            self.max_wal_bytes.map_or_else(|| "null".to_owned(), |bytes| bytes.to_string()),
            json_text(self.mode.as_str()),
            json_option(self.reason.map(Reason::as_str)),
            json_option(self.poison.as_deref())
        );
        if let Some(following) = &self.following {
            let _ = write!(
                json,
                ",\"following\":{{\"connected\":{},\"leader_head\":{},\"applied\":{},\"lag_records\":{},\"heard_ms_ago\":{},\"error\":{}}}",
                following.connected,
                following.leader_head,
                following.applied,
                following.leader_head.records_since(self.head),
                json_ago(following.heard_at_ms, now_ms),
                json_option(following.error.as_deref())
            );
        }
        json.push_str(",\"pins\":[");
        for (index, pin) in self.pins.iter().enumerate() {
            let _ = write!(
                json,
                "{}{{\"owner\":{},\"reason\":{},\"lsn\":{},\"lost\":{}}}",
                if index == 0 { "" } else { "," },
                json_text(&pin.owner),
                json_text(&pin.reason),
                pin.lsn,
                pin.lost
            );
        }
        json.push_str("],\"followers\":[");
        for (index, follower) in self.followers.iter().enumerate() {
            let _ = write!(
                json,
                "{}{{\"node\":{},\"state\":\"{}\",\"shipped\":{},\"received\":{},\"durable\":{},\"applied\":{},\
                 \"lag_records\":{},\"lag_bytes\":{},\"acked_ms_ago\":{},\"mode\":{},\"reason\":{},\"refusal\":{},\
                 \"place_lost\":{},\"divergence\":{},\"session\":",
                if index == 0 { "" } else { "," },
                follower.node,
                follower.state(self.head),
                follower.shipped,
                follower.received,
                follower.durable,
                follower.applied,
                self.head.records_since(follower.received),
                follower.lag_bytes,
                json_ago(follower.acked_at_ms, now_ms),
                json_text(follower.mode.as_str()),
                json_option(follower.reason.map(Reason::as_str)),
                json_option(follower.refusal.map(Refusal::as_str)),
                follower.place_lost,
                json_option(follower.divergence.as_deref())
            );
            let _ = match &follower.session {
                None => write!(json, "null}}"),
                Some(session) => write!(
                    json,
                    "{{\"id\":{},\"kind\":\"{}\",\"phase\":\"{}\",\"target\":{},\"achieved\":{},\"base_blocks\":{}}}}}",
                    session.id,
                    session.kind,
                    session.phase,
                    session.target,
                    session.progress.achieved,
                    session.progress.base_blocks
                ),
            };
        }
        json.push(']');
        write_scrub_json(&self.scrub, json, now_ms);
        json.push('}');
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.shard.0.to_le_bytes());
        for number in [self.tail.0, self.head.0, self.synced.0, self.committed.0, self.retained_bytes] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.max_wal_bytes.unwrap_or(0).to_le_bytes());
        put_text(out, self.mode.as_str());
        put_text(out, self.reason.map_or("", Reason::as_str));
        put_count(out, self.pins.len());
        for pin in &self.pins {
            out.extend_from_slice(&pin.lsn.0.to_le_bytes());
            out.push(u8::from(pin.lost));
            put_text(out, &pin.owner);
            put_text(out, &pin.reason);
        }
        put_text(out, self.poison.as_deref().unwrap_or_default());
        out.push(u8::from(self.following.is_some()));
        if let Some(following) = &self.following {
            out.push(u8::from(following.connected));
            for number in [following.leader_head.0, following.applied.0, following.heard_at_ms] {
                out.extend_from_slice(&number.to_le_bytes());
            }
            put_text(out, following.error.as_deref().unwrap_or_default());
        }
        put_count(out, self.followers.len());
        for follower in &self.followers {
            out.extend_from_slice(&follower.node.0.to_le_bytes());
            out.push(u8::from(follower.connected));
            let marks = [follower.shipped, follower.received, follower.durable, follower.applied];
            for number in marks.map(Lsn::get).into_iter().chain([follower.acked_at_ms, follower.lag_bytes]) {
                out.extend_from_slice(&number.to_le_bytes());
            }
            follower.encode_recovery(out);
        }
        encode_scrub(&self.scrub, out);
    }

    fn decode(from: &mut Fields<'_>) -> Result<ShardStatus, String> {
        let mut status = ShardStatus {
            shard: ShardId(from.u16()?),
            tail: Lsn(from.u64()?),
            head: Lsn(from.u64()?),
            synced: Lsn(from.u64()?),
            committed: Lsn(from.u64()?),
            retained_bytes: from.u64()?,
            max_wal_bytes: Some(from.u64()?).filter(|&bytes| bytes > 0),
            mode: from.word()?.ok_or("a mode is missing")?,
            reason: from.word()?,
            pins: PinStatus::decode_all(from)?,
            poison: from.text()?,
            following: None,
            followers: Vec::new(),
            scrub: ScrubStatus::default(),
        };
        if from.bool()? {
            status.following = Some(FollowingStatus {
                connected: from.bool()?,
                leader_head: Lsn(from.u64()?),
                applied: Lsn(from.u64()?),
                heard_at_ms: from.u64()?,
                error: from.text()?,
            });
        }
        for _ in 0..from.u16()? {
            status.followers.push(FollowerStatus {
                node: NodeId(from.u64()?),
                connected: from.bool()?,
                shipped: Lsn(from.u64()?),
                received: Lsn(from.u64()?),
                durable: Lsn(from.u64()?),
                applied: Lsn(from.u64()?),
                acked_at_ms: from.u64()?,
                lag_bytes: from.u64()?,
                mode: from.word()?.ok_or("a mode is missing")?,
                reason: from.word()?,
                refusal: from.word()?,
                place_lost: from.bool()?,
                session: SessionStatus::decode(from)?,
                divergence: from.text()?,
            });
        }
        status.scrub = decode_scrub(from)?;
        Ok(status)
    }
}

impl FollowerStatus {
    fn encode_recovery(&self, out: &mut Vec<u8>) {
        put_text(out, self.mode.as_str());
        put_text(out, self.reason.map_or("", Reason::as_str));
        put_text(out, self.refusal.map_or("", Refusal::as_str));
        out.push(u8::from(self.place_lost));
        put_text(out, self.session.map_or("", |session| session.kind.as_str()));
        put_text(out, self.session.map_or(Phase::Idle, |session| session.phase).as_str());
        let numbers = self.session.map_or([0; 4], |session| {
            [session.id.0, session.target.0, session.progress.achieved.0, session.progress.base_blocks]
        });
        numbers.iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
        put_text(out, self.divergence.as_deref().unwrap_or_default());
    }
}

impl SessionStatus {
    fn decode(from: &mut Fields<'_>) -> Result<Option<SessionStatus>, String> {
        let kind = from.word()?;
        let phase = from.word()?.ok_or("a session's phase is missing")?;
        let (id, target) = (SessionId(from.u64()?), Lsn(from.u64()?));
        let progress = Progress { achieved: Lsn(from.u64()?), base_blocks: from.u64()? };
        Ok(kind.map(|kind| SessionStatus { id, kind, phase, target, progress }))
    }
}

impl PinStatus {
    fn decode_all(from: &mut Fields<'_>) -> Result<Vec<PinStatus>, String> {
        let mut pins = Vec::new();
        for _ in 0..from.u16()? {
            let (lsn, lost) = (Lsn(from.u64()?), from.bool()?);
            let (owner, reason) = (from.text()?.unwrap_or_default(), from.text()?.unwrap_or_default());
            pins.push(PinStatus { owner, reason, lsn, lost });
        }
        Ok(pins)
    }
}

fn write_scrub_json(scrub: &ScrubStatus, json: &mut String, now_ms: u64) {
    let _ = write!(
        json,
        ",\"scrub\":{{\"passes\":{},\"completed_ms_ago\":{},\"bytes\":{},\"findings\":[",
        scrub.passes,
        json_ago(scrub.completed_at_ms, now_ms),
        scrub.bytes
    );
    for (index, finding) in scrub.findings.iter().enumerate() {
        let _ = write!(
            json,
            "{}{{\"path\":{},\"offset\":{},\"end\":{},\"lsn\":{},\"reason\":{}}}",
            if index == 0 { "" } else { "," },
            json_text(&finding.path.display().to_string()),
            finding.offset,
            finding.end,
            finding.lsn,
            json_text(&finding.reason)
        );
    }
    json.push_str("]}");
}

fn encode_scrub(scrub: &ScrubStatus, out: &mut Vec<u8>) {
    for number in [scrub.passes, scrub.completed_at_ms, scrub.bytes] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    put_count(out, scrub.findings.len());
    for Finding { path, segment, offset, end, lsn, reason } in &scrub.findings {
        for number in [segment.0, *offset, *end, lsn.0] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        put_text(out, &path.display().to_string());
        put_text(out, reason);
    }
}

fn decode_scrub(from: &mut Fields<'_>) -> Result<ScrubStatus, String> {
    let (passes, completed_at_ms, bytes) = (from.u64()?, from.u64()?, from.u64()?);
    let mut scrub = ScrubStatus { passes, completed_at_ms, bytes, findings: Vec::new() };
    for _ in 0..from.u16()? {
        let (segment, offset, end, lsn) = (Lsn(from.u64()?), from.u64()?, from.u64()?, Lsn(from.u64()?));
        let (path, reason) = (from.text()?.unwrap_or_default().into(), from.text()?.unwrap_or_default());
        scrub.findings.push(Finding { path, segment, offset, end, lsn, reason });
    }
    Ok(scrub)
}

/// Reads fields off the front of bytes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (field, rest) = self.0.split_first_chunk().ok_or_else(|| "it ends too early".to_owned())?;
        self.0 = rest;
        Ok(*field)
    }

    fn u8(&mut self) -> Result<u8, String> {
        self.take().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, String> {
        self.take().map(u16::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.take().map(u64::from_le_bytes)
    }

    fn bool(&mut self) -> Result<bool, String> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(format!("{other} is neither 0 nor 1")),
        }
    }

    fn text(&mut self) -> Result<Option<String>, String> {
        let len = self.take().map(u32::from_le_bytes)? as usize;
        let (text, rest) = self.0.split_at_checked(len).ok_or_else(|| "a text ends too early".to_owned())?;
        self.0 = rest;
        Ok((!text.is_empty()).then(|| String::from_utf8_lossy(text).into_owned()))
    }
}

impl Fields<'_> {
    /// One of the words of the protocol; `None` where the text is empty.
    fn word<T: FromStr<Err = UnknownWord>>(&mut self) -> Result<Option<T>, String> {
        self.text()?.map(|text| text.parse().map_err(|error: UnknownWord| error.to_string())).transpose()
    }
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend_from_slice(&u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes());
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn json_ago(at_ms: u64, now_ms: u64) -> String {
    if at_ms == 0 { "null".to_owned() } else { now_ms.saturating_sub(at_ms).to_string() }
}

/// A JSON string, or `null`.
fn json_option(text: Option<&str>) -> String {
    text.map_or_else(|| "null".to_owned(), json_text)
}

/// A text as a JSON string, quotes included.
///
/// ```
/// assert_eq!(towline::status::json_text("a \"b\"\n"), r#""a \"b\"\u000a""#);
/// ```
#[must_use]
pub fn json_text(text: &str) -> String {
    let mut json = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => {
                json.push('\\');
                json.push(character);
            }
            control if control < ' ' => {
                let _ = write!(json, "\\u{:04x}", u32::from(control));
            }
            other => json.push(other),
        }
    }
    json.push('"');
    json
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
