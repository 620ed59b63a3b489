//! A status as bytes.
//!
//! # Format, version 4
//!
//! The body of a `Status` frame. All numbers are little-endian; a text is its length in bytes (4 bytes) and UTF-8.
//!
//! | field | size |
//! |---|---:|
//! | version, 4 | 2 |
//! | role: 1 leader, 2 follower | 1 |
//! | cluster, node, region, epoch | 16, 8, 2, 8 |
//! | uptime in milliseconds | 8 |
//! | number of shards | 2 |
//! | for each shard, all that follows: shard, tail, head, its epoch, synced, committed, retained bytes | 2, 8, 8, 8, 8, 8, 8 |
//! | `max_wal_bytes`, 0 for no bound | 8 |
//! | mode, reason: texts, the reason empty if there is none | |
//! | number of pins | 2 |
//! | for each pin: LSN, lost (1 byte), owner and reason: texts | 8, 1 |
//! | poison: text, empty if sound | |
//! | following: 0 or 1; if 1: connected (1 byte), leader head, applied, heard at (milliseconds since 1970), rebuilding (1 byte), error: text | 1, 1, 8, 8, 8, 1 |
//! | number of followers | 2 |
//! | for each follower: node, connected (1 byte), shipped, received, durable, applied, acknowledged at, lag in bytes | 8, 1, 8, 8, 8, 8, 8, 8 |
//! | then its mode, reason and refusal: texts, the last two empty if there is none | |
//! | then place lost (1 byte), session kind and phase: texts, the kind empty if there is none | 1 |
//! | then session, its target, achieved LSN and base blocks | 8, 8, 8, 8 |
//! | then how its history differs: text, empty if that is not known to be so | |
//! | after its followers, of the shard's scrubbing: passes, last completed (milliseconds since 1970), bytes, number of findings | 8, 8, 8, 2 |
//! | for each finding: segment, offset, end, LSN, path and reason: texts | 8, 8, 8, 8 |
//!
//! Modes, reasons, refusals, kinds and phases are the words of [`crate::protocol`].

use std::str::FromStr;
use std::time::Duration;

use super::{FollowerStatus, FollowingStatus, Role, SessionStatus, ShardStatus, Status};
use crate::protocol::{Phase, Progress, Reason, Refusal, UnknownWord};
use crate::retention::PinStatus;
use crate::types::{ClusterId, Epoch, Lsn, NodeId, RegionId, SessionId, ShardId};
use crate::wal::{Finding, ScrubStatus};

const VERSION: u16 = 4;

impl Status {
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
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.shard.0.to_le_bytes());
        let ShardStatus { tail, head, head_epoch, synced, committed, retained_bytes, .. } = self;
        for number in [tail.0, head.0, head_epoch.0, synced.0, committed.0, *retained_bytes] {
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
            out.push(u8::from(following.rebuilding));
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
            head_epoch: Epoch(from.u64()?),
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
                rebuilding: from.bool()?,
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
