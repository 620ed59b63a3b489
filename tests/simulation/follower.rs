//! A node that follows: it asks, takes in log and base as they come, and says how far it is.

use towline::rebuild::{RebuildContract, RebuildSession};
use towline::seams::{Told, tell_where_logs_part};
use towline::target::{BaseInfo, BlockId, ReplicationTarget};
use towline::wire::{
    Ack, BaseDataHeader, FrameHeader, FrameKind, Message, PROTOCOL_VERSIONS, Purpose, SessionAck, SessionAction,
    SessionControl, SessionFailure, SessionKind, SessionPhase, ShardInfo, SyncRequest, WalDataHeader,
};
use towline::{Epoch, Lsn, NodeId, RefusalCode};

use std::sync::Arc;

use super::clock::Time;
use super::disk::SEGMENT_SIZE;
use super::leader::frame;
use super::log::{IDENTITY, Log, genesis};
use super::network::{ConnectionId, End};
use super::node::SHARD;
use super::world::{HEARTBEAT, PEER_TIMEOUT, Plant, World};

#[derive(Default)]
pub struct Following {
    stream: Option<Stream>,
    /// When it may ask again.
    retry_at: Time,
    failures: u32,
}

struct Stream {
    connection: ConnectionId,
    /// The leader's answer.
    info: Option<ShardInfo>,
    /// What the leader has been told about where the logs part.
    told: Option<Told>,
    rebuild: Option<Rebuild>,
    sent: Option<Ack>,
    sent_at: Time,
    heard_at: Time,
}

struct Rebuild {
    session: RebuildSession,
    epoch: Epoch,
    checksum: crc32fast::Hasher,
}

impl Following {
    /// The rebuild under way.
    pub fn rebuild(&self) -> Option<&RebuildSession> {
        let rebuild = self.stream.as_ref()?.rebuild.as_ref()?;
        rebuild.session.active().then_some(&rebuild.session)
    }

    pub fn rebuild_mut(&mut self) -> Option<&mut RebuildSession> {
        let rebuild = self.stream.as_mut()?.rebuild.as_mut()?;
        if rebuild.session.active() { Some(&mut rebuild.session) } else { None }
    }

    pub fn connection(&self) -> Option<ConnectionId> {
        self.stream.as_ref().map(|stream| stream.connection)
    }
}

impl World {
    /// Ends the stream to the leader; another is opened after `wait` and longer, the more often it failed.
    pub fn end_following(&mut self, id: u64, wait: Time) {
        let now = self.queue.now;
        let jitter = self.chance.below(300);
        let forever = self.plant == Some(Plant::GiveUp) && self.chance.per_mille(100);
        let node = self.node(id);
        let following = &mut node.following;
        let backoff = wait << following.failures.min(3);
        following.failures += 1;
        following.retry_at = if forever { Time::MAX } else { now + backoff + jitter };
        let Some(stream) = following.stream.take() else { return };
        if let Some(mut rebuild) = stream.rebuild {
            rebuild.session.cancel(SessionFailure::TransportLost);
        }
        node.log.discard_partial(&mut node.disk);
        self.close(stream.connection, End::Caller);
    }

    pub fn tick_following(&mut self, id: u64) {
        let now = self.queue.now;
        let node = self.node(id);
        let leader = node.leader.filter(|leader| *leader != id);
        // Whoever gives it an empty disk has it follow the leader first.
        let asks_relays = !node.disk.manifest.recovering || node.blocks.is_incomplete();
        match (&node.following.stream, leader) {
            (None, Some(leader)) if node.following.retry_at <= now && !node.leads() => {
                // Addresses are learnt late: now and then it asks one who leads no more, or not yet. In a cascade often
                // one that follows too, with a lower number, so that nobody feeds itself.
                let other = 1 + self.chance.below(self.nodes.len() as u64);
                let asks_other = match self.cascades {
                    true => other < id && asks_relays && self.chance.per_mille(700),
                    false => other != id && self.chance.per_mille(150),
                };
                self.ask(id, if asks_other { other } else { leader });
            }
            (Some(stream), _) if stream.heard_at + PEER_TIMEOUT < now => {
                self.line(id, format_args!("its leader is silent"));
                self.end_following(id, 500);
            }
            (Some(stream), _) if stream.info.is_some() && stream.sent_at + HEARTBEAT <= now => {
                self.complete_rebuild(id);
                if let Some(stream) = &mut self.node(id).following.stream {
                    stream.sent = None;
                }
                self.acknowledge(id);
            }
            _ => {
                self.complete_rebuild(id);
                self.acknowledge(id);
            }
        }
    }

    fn ask(&mut self, id: u64, leader: u64) {
        let now = self.queue.now;
        let connection = self.network.connect(id, leader);
        let World { nodes, oracle, .. } = &mut *self;
        let node = &mut nodes[usize::try_from(id - 1).unwrap()];
        let incomplete = node.blocks.is_incomplete();
        if !incomplete {
            oracle.keeps(id, &node.log);
        }
        let (received, chain) =
            if node.log.is_empty() { (Lsn::ZERO, genesis()) } else { (node.log.head(), node.log.chain) };
        let request = SyncRequest {
            versions: PROTOCOL_VERSIONS,
            purpose: Purpose::Follow,
            cluster: IDENTITY.cluster,
            node: NodeId(id),
            region: IDENTITY.region,
            shard: SHARD,
            shard_count: 1,
            segment_size: SEGMENT_SIZE,
            epoch: node.accepted,
            received,
            durable: node.log.synced.min(received),
            applied: if incomplete { Lsn::ZERO } else { node.blocks.applied() },
            chain,
            from: Lsn::ZERO,
            flags: if incomplete { SyncRequest::BASE_INCOMPLETE } else { 0 },
        };
        node.following.stream =
            Some(Stream { connection, info: None, told: None, rebuild: None, sent: None, sent_at: now, heard_at: now });
        self.line(id, format_args!("asks node {leader} (connection {connection}): received {received} chain {:08x} applied {} incomplete {incomplete}", chain.0, request.applied));
        self.send(connection, End::Caller, frame(&Message::SyncRequest(request)));
    }

    /// A frame at the end that called.
    pub fn answered_with(
        &mut self,
        id: u64,
        connection: ConnectionId,
        kind: FrameKind,
        body: &[u8],
    ) -> Result<(), String> {
        let now = self.queue.now;
        let forgets_touched = self.plant == Some(Plant::CutBehindApplied);
        let node = self.node(id);
        let Some(stream) = node.following.stream.as_mut().filter(|stream| stream.connection == connection) else {
            return Ok(());
        };
        stream.heard_at = now;
        match (kind, &stream.info) {
            (FrameKind::WalData, Some(_)) => self.take_log(id, body),
            (FrameKind::BaseData, Some(_)) => self.take_base(id, body),
            _ => match (Message::decode(kind, body).map_err(|error| error.to_string())?, stream.info) {
                (Message::ShardInfo(info), None) => self.agree(id, info),
                (Message::EpochHistory(history), None) if stream.told.is_none() => {
                    let applied = if node.blocks.is_incomplete() { Lsn::ZERO } else { node.blocks.applied() };
                    let beyond = node.blocks.touched(SHARD).unwrap().unwrap_or(node.opened_with);
                    let touched =
                        if forgets_touched || node.blocks.is_incomplete() { applied } else { beyond.max(applied) };
                    let told = tell_where_logs_part(&node.log, touched, &history).map_err(|error| error.to_string())?;
                    let (answer, told) = told;
                    stream.told = Some(told);
                    self.send(connection, End::Caller, frame(&Message::CommonPoint(answer)));
                    Ok(())
                }
                (Message::Error(error), _) => {
                    let for_good = error.code == RefusalCode::Diverged;
                    node.refused_since = node.refused_since.or(Some(now)).filter(|_| for_good);
                    Err(format!("refused: {:?} {}", error.code, error.text))
                }
                (Message::Heartbeat(beat), Some(info)) if beat.epoch == info.epoch => Ok(()),
                (Message::CaughtUp(_), Some(info)) => {
                    let relay = node.leading.as_mut().filter(|leading| leading.epoch == info.epoch);
                    relay.into_iter().for_each(|leading| leading.caught_up = true);
                    Ok(())
                }
                (Message::SessionControl(control), Some(info)) => self.take_control(id, &info, control),
                (Message::BaseComplete(end), Some(_)) => {
                    let Some(rebuild) = &mut stream.rebuild else { return Err("no base is due".to_owned()) };
                    if end.checksum != rebuild.checksum.clone().finalize() {
                        return Err("the base came damaged".to_owned());
                    }
                    rebuild.session.mark_base_complete(end.blocks).map_err(|error| error.to_string())?;
                    let word = word(rebuild, SessionPhase::BaseComplete, Lsn::ZERO);
                    self.send(connection, End::Caller, word);
                    self.complete_rebuild(id);
                    Ok(())
                }
                (other, _) => Err(format!("{:?} is not due", other.kind())),
            },
        }
    }

    /// The leader's answer: where the log goes on, and what is to be cut of it first.
    fn agree(&mut self, id: u64, info: ShardInfo) -> Result<(), String> {
        if info.epoch < self.node(id).accepted {
            return Err(format!("epoch {} is over", info.epoch));
        }
        self.accept_epoch(id, info.epoch);
        let accepted = self.node(id).accepted;
        if self.cascades && self.node(id).leading.as_ref().is_some_and(|leading| leading.epoch < accepted) {
            self.relay_under(id, accepted);
        }
        let node = self.node(id);
        if info.session_kind != SessionKind::Rebuild {
            node.refused_since = None;
        }
        let Some(stream) = &mut node.following.stream else { return Ok(()) };
        stream.info = Some(info);
        let told = stream.told;
        if info.session_kind == SessionKind::Rebuild {
            return Ok(());
        }
        if node.blocks.is_incomplete() {
            return Err("it would go on with the log, and there is no base to put it on".to_owned());
        }
        let offered = (info.start_segment, info.start_offset);
        let due = node.log.ingest_position();
        let asked = told.map(|told| told.cut_asked("its leader", &info, (node.log.head(), due))).transpose();
        if let Some(place) = asked.map_err(|error| error.to_string())?.flatten() {
            let shared = place.lsn;
            if node.blocks.applied() > shared {
                return Err(format!("{} has been applied since, and {shared} is where to cut", node.blocks.applied()));
            }
            self.withdraw(id);
            let World { nodes, oracle, .. } = &mut *self;
            let node = &mut nodes[usize::try_from(id - 1).unwrap()];
            oracle.is_cut(id, &node.log, shared);
            node.log.cut(&mut node.disk, offered.0, offered.1)?;
            node.opened_with = shared;
            self.cut_places(id);
            let node = self.node(id);
            let (head, applied) = (node.log.head(), node.blocks.applied());
            self.oracle.cuts += 1;
            self.oracle.begins(id, applied);
            self.line(id, format_args!("cut at offset {} of segment {}, behind LSN {head}", offered.1, offered.0));
        }
        let node = self.node(id);
        let due = node.log.ingest_position();
        if info.start != node.log.head().next() || (offered != due && offered != (due.0, 0)) {
            return Err(format!("it would send from {offered:?}, and {due:?} is due"));
        }
        Ok(())
    }

    fn take_log(&mut self, id: u64, body: &[u8]) -> Result<(), String> {
        let (prefix, bytes) = body.split_at_checked(WalDataHeader::LEN).ok_or("a short frame")?;
        let WalDataHeader { segment, offset } = WalDataHeader::decode(prefix).map_err(|error| error.to_string())?;
        let World { nodes, oracle, .. } = self;
        let node = &mut nodes[usize::try_from(id - 1).unwrap()];
        let (before, mut taken) = (node.log.marks.len(), Vec::new());
        let result = node.log.ingest(&mut node.disk, segment, offset, bytes, &mut taken);
        oracle.has(id, &node.log, &node.disk, before);
        if !taken.is_empty() {
            let (head, chain) = (node.log.head(), node.log.chain);
            self.line(id, format_args!("received up to LSN {head} chain {:08x}", chain.0));
            self.acknowledge(id);
        }
        result
    }

    fn take_base(&mut self, id: u64, body: &[u8]) -> Result<(), String> {
        let (prefix, bytes) = body.split_at_checked(BaseDataHeader::LEN).ok_or("a short frame")?;
        let header = BaseDataHeader::decode(prefix).map_err(|error| error.to_string())?;
        if header.checksum != crc32fast::hash(bytes) {
            return Err("blocks came damaged".to_owned());
        }
        let Some(stream) = &mut self.node(id).following.stream else { return Ok(()) };
        let connection = stream.connection;
        let Some(rebuild) = &mut stream.rebuild else { return Err("no base is due".to_owned()) };
        rebuild.checksum.update(bytes);
        rebuild.session.apply_base_block(BlockId(header.block), bytes).map_err(|error| error.to_string())?;
        let word = word(rebuild, SessionPhase::Running, rebuild.session.progress().applied);
        self.send(connection, End::Caller, word);
        Ok(())
    }

    /// A rebuild starts: the target gets its mark, then the log is begun anew.
    fn take_control(&mut self, id: u64, info: &ShardInfo, control: SessionControl) -> Result<(), String> {
        if (control.session, control.epoch) != (info.session, info.epoch) || control.action == SessionAction::Accept {
            return Ok(());
        }
        let now = self.queue.now;
        let node = self.node(id);
        let applied = if node.blocks.is_incomplete() { Lsn::ZERO } else { node.blocks.applied() };
        if control.action != SessionAction::Start || control.log_start > control.base_lsn.next() {
            return Err("a session that cannot be".to_owned());
        }
        if applied > control.base_lsn {
            let text = format!("what is here ({applied}) is newer than the base ({})", control.base_lsn);
            node.refused_since = node.refused_since.or(Some(now));
            return Err(text);
        }
        let owed = node.disk.manifest.owed.filter(|(epoch, _)| node.blocks.is_incomplete() && *epoch == control.epoch);
        let owed = owed.map_or(Lsn::ZERO, |(_, lsn)| lsn);
        if control.target < owed {
            return Err(format!("what was given up may have been acknowledged up to {owed}"));
        }
        node.disk.manifest.owed = Some((control.epoch, control.target));
        self.withdraw(id);
        let node = self.node(id);
        let base =
            BaseInfo { base_lsn: control.base_lsn, block_len: control.block_len, block_count: control.block_count };
        let contract = RebuildContract { session: control.session, epoch: control.epoch, target: control.target, base };
        let mut session = RebuildSession::new(SHARD, Arc::new(node.blocks.clone()));
        session.start(contract).map_err(|error| error.to_string())?;
        node.refused_since = None;
        node.disk.manifest.recovering = true;
        node.opened_with = control.base_lsn;
        node.log = Log::begin_at(&mut node.disk, control.log_start, control.epoch).planted_as(&node.log);
        self.cut_places(id);
        let node = self.node(id);
        let rebuild = Rebuild { session, epoch: control.epoch, checksum: crc32fast::Hasher::new() };
        let accepted = word(&rebuild, SessionPhase::Accepted, Lsn::ZERO);
        let Some(stream) = &mut node.following.stream else { return Ok(()) };
        let connection = stream.connection;
        stream.rebuild = Some(rebuild);
        self.oracle.begins(id, control.base_lsn);
        self.line(
            id,
            format_args!("is rebuilt from a base at {} and the log from {}", control.base_lsn, control.log_start),
        );
        self.send(connection, End::Caller, accepted);
        Ok(())
    }

    /// Completes the rebuild if base and log are there, and both are on stable storage.
    fn complete_rebuild(&mut self, id: u64) {
        let World { nodes, oracle, .. } = self;
        let node = &mut nodes[usize::try_from(id - 1).unwrap()];
        let Some(stream) = &mut node.following.stream else { return };
        let Some(rebuild) = stream.rebuild.as_mut().filter(|rebuild| rebuild.session.active()) else { return };
        let needed = rebuild.session.needed();
        if node.log.is_empty() || node.log.synced < needed {
            return;
        }
        // As the crate does, also for the name of a segment in which nothing is written yet.
        node.disk.sync_now();
        let achieved = match rebuild.session.try_complete() {
            Ok(None) => return,
            Ok(Some(achieved)) => achieved,
            Err(error) => {
                self.line(id, format_args!("the rebuild did not complete: {error}"));
                return self.end_following(id, 1000);
            }
        };
        let (connection, word) = (stream.connection, word(rebuild, SessionPhase::Completed, achieved));
        oracle.stands(id, &node.log, achieved, &node.blocks.state());
        oracle.is_rebuilt(id, achieved);
        oracle.keeps(id, &node.log);
        if node.log.record_epoch().is_some() {
            // The leader counts on it from its word on, and the next acknowledgement may not come any more.
            node.disk.manifest.recovering = false;
        }
        self.line(id, format_args!("is rebuilt at LSN {achieved}"));
        self.send(connection, End::Caller, word);
    }

    /// Says where it stands, if that is news.
    pub fn acknowledge(&mut self, id: u64) {
        let now = self.queue.now;
        let plant = self.plant;
        let forgets_mark = plant == Some(Plant::ForgetMark) && self.chance.per_mille(5);
        let World { nodes, oracle, .. } = self;
        let node = &mut nodes[usize::try_from(id - 1).unwrap()];
        let Some(stream) = &mut node.following.stream else { return };
        let Some(info) = stream.info else { return };
        let is_rebuilding = stream.rebuild.as_ref().is_some_and(|rebuild| rebuild.session.active());
        if (info.session_kind == SessionKind::Rebuild && stream.rebuild.is_none()) || node.log.is_empty() {
            return;
        }
        let received = node.log.head();
        let mut durable = node.log.synced.min(received);
        if plant == Some(Plant::AcknowledgeUnsynced) {
            durable = received;
        }
        if forgets_mark {
            durable = durable.previous();
        }
        let applied = node.blocks.applied().min(received);
        let ack = Ack { received, durable, applied, chain: node.log.chain, epoch: info.epoch, session: info.session };
        if !is_rebuilding && durable >= info.target && node.log.record_epoch().is_some() {
            // Everything is there again that the log held when the epoch's session began.
            node.disk.manifest.recovering = false;
            node.following.failures = 0;
        }
        if stream.sent == Some(ack) {
            return;
        }
        (stream.sent, stream.sent_at) = (Some(ack), now);
        let connection = stream.connection;
        oracle.shows(id, received, durable, applied);
        if !is_rebuilding {
            oracle.keeps(id, &node.log);
        }
        self.send(connection, End::Caller, frame(&Message::Ack(ack)));
    }

    /// The connection is gone: what had come of a frame that is not whole is taken in as far as it goes, as a stream's
    /// is.
    pub fn following_gone(&mut self, id: u64, connection: ConnectionId, rest: &[u8]) {
        if self.node(id).following.connection() != Some(connection) {
            return;
        }
        let header = rest.first_chunk().and_then(|first| FrameHeader::decode(first).ok());
        let has_info = self.node(id).following.stream.as_ref().is_some_and(|stream| stream.info.is_some());
        if header.is_some_and(|header| header.kind == FrameKind::WalData) && has_info {
            let _ = self.take_log(id, &rest[16..]);
        }
        self.end_following(id, 300);
    }
}

/// What the follower says about its rebuild.
fn word(rebuild: &Rebuild, phase: SessionPhase, achieved: Lsn) -> Vec<u8> {
    let (session, epoch, reason) = (rebuild.session.progress().session, rebuild.epoch, SessionFailure::None);
    frame(&Message::SessionAck(SessionAck { session, epoch, phase, achieved, reason, blocks: 0 }))
}
