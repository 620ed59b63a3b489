//! A node that leads: it hosts the engine as the crate's own host does, and ships log and base to its followers.
//!
//! A follower whose log is no beginning of the leader's is asked where the two part, as the crate does; all of it goes
//! over the wire.

use std::collections::{BTreeMap, VecDeque};

use towline::protocol::{
    Command, Event, FailureReason, FollowerFacts, LeaderFacts, Millis, Progress, Session, SessionKind, SyncAck,
};
use towline::seams::{CommitRule, Parting, ask_where_logs_part, check_where_logs_part, is_beginning_of};
use towline::target::{BaseInfo, BaseSource, ReplicationTarget};
use towline::wire::{
    Ack, BaseComplete, BaseDataHeader, CaughtUp, ErrorMessage, FrameHeader, FrameKind, Heartbeat, Message,
    PROTOCOL_VERSIONS, SessionAck, SessionAction, SessionControl, SessionKind as WireKind, SessionPhase, ShardInfo,
    SyncRequest, WalDataHeader,
};
use towline::{AckLevel, Epoch, Lsn, NodeId, RefusalCode, SessionId};

use super::clock::Time;
use super::disk::SEGMENT_SIZE;
use super::log::{IDENTITY, Mark};
use super::network::{ConnectionId, End};
use super::node::SHARD;
use super::target::record_of;
use super::world::{HEARTBEAT, PEER_TIMEOUT, Plant, World};

/// Bytes on their way to one follower, at most.
const WINDOW: usize = 96 * 1024;

pub struct Leading {
    pub epoch: Epoch,
    /// It follows itself, and feeds others.
    pub is_relay: bool,
    /// Then: its log has been agreed on with a leader of this epoch, and has come as far as that one was.
    pub caught_up: bool,
    /// Up to where it has acknowledged; at first what its log held when the epoch began, which is not its to
    /// acknowledge.
    acknowledged: Lsn,
    streams: BTreeMap<u64, Stream>,
    followers: BTreeMap<u64, Known>,
    /// What counts as acknowledged widely enough, by the crate's own rule.
    pub commits: CommitRule,
    /// Who has been asked where the logs part.
    asked: BTreeMap<ConnectionId, SyncRequest>,
}

/// What retention knows of a follower.
#[derive(Default)]
struct Known {
    position: Lsn,
    lost_place: bool,
    /// By session, the oldest LSN held.
    pins: Vec<(u64, Lsn)>,
}

struct Stream {
    connection: ConnectionId,
    /// As told in the answer to the request; the engine may have moved on to another.
    session: u64,
    target: Lsn,
    cursor: (Lsn, u64),
    caught_up: bool,
    base: Option<Base>,
    /// Up to where the follower's log was found to be the leader's.
    agreed: Lsn,
    heard_at: Time,
    sent_at: Time,
}

struct Base {
    source: Box<dyn BaseSource>,
    info: BaseInfo,
    sent: VecDeque<u32>,
    taken: u64,
    blocks: u64,
    checksum: crc32fast::Hasher,
    is_sent: bool,
}

impl Leading {
    pub fn new(epoch: Epoch, began: Lsn, others: &[u64]) -> Leading {
        let followers = others.iter().map(|other| (*other, Known::default())).collect();
        let (streams, commits, asked) = (BTreeMap::new(), CommitRule::default(), BTreeMap::new());
        let (is_relay, caught_up) = (false, true);
        Leading { epoch, is_relay, caught_up, acknowledged: began, streams, followers, commits, asked }
    }

    /// A follower that feeds whoever comes.
    pub fn relay(epoch: Epoch) -> Leading {
        Leading { is_relay: true, caught_up: false, ..Leading::new(epoch, Lsn::ZERO, &[]) }
    }

    /// Up to here nobody needs anything.
    pub fn unneeded(&self) -> Lsn {
        if self.followers.is_empty() {
            return Lsn::ZERO;
        }
        let placed = self.followers.values().filter(|known| !known.lost_place);
        let pins = self.followers.values().flat_map(|known| known.pins.iter().map(|(_, lsn)| lsn.previous()));
        placed.map(|known| known.position).chain(pins).min().unwrap_or(Lsn::MAX)
    }
}

/// The bytes of a frame.
pub fn frame(message: &Message) -> Vec<u8> {
    framed(message.kind(), &[], &message.to_vec())
}

fn framed(kind: FrameKind, prefix: &[u8], body: &[u8]) -> Vec<u8> {
    let header = FrameHeader::new(kind, 0, prefix, body).unwrap();
    [&header.encode()[..], prefix, body].concat()
}

impl World {
    fn leading(&mut self, id: u64) -> Option<&mut Leading> {
        self.node(id).leading.as_mut()
    }

    /// Has the engine take in an event, and carries out what it asks for.
    pub fn apply(&mut self, id: u64, event: Event) {
        let now = Millis(self.queue.now);
        let mut commands = Vec::new();
        let outcome = self.node(id).engine.apply(now, &event, &mut commands);
        if !matches!(event, Event::SyncAckReceived(_) | Event::SessionProgress { .. }) || !commands.is_empty() {
            self.line(id, format_args!("{}: {outcome}", event.name()));
        }
        self.carry_out(id, commands);
        self.take_committed(id, outcome.durable);
    }

    fn carry_out(&mut self, id: u64, commands: Vec<Command>) {
        for command in commands {
            self.line(id, format_args!("  {command}"));
            match command {
                Command::StartRecoveryTask { kind: SessionKind::Rebuild, .. } => {}
                Command::StartRecoveryTask { replica, session, epoch, pin, .. } => {
                    let node = self.node(id);
                    let is_there = pin >= node.log.tail();
                    let known = node.leading.as_mut().and_then(|leading| leading.followers.get_mut(&replica.0));
                    match known.filter(|_| is_there) {
                        Some(known) => known.pins.push((session.0, pin)),
                        None => {
                            let reason = FailureReason::PinLost;
                            self.apply(id, Event::SessionFailed { epoch, replica, session, reason });
                        }
                    }
                }
                Command::DrainRecoveryTask { replica, session, reason, .. } => {
                    let Some(leading) = self.leading(id) else { continue };
                    if let Some(known) = leading.followers.get_mut(&replica.0) {
                        known.pins.retain(|(owner, _)| *owner != session.0);
                    }
                    if reason.is_some()
                        && let Some(stream) = leading.streams.remove(&replica.0)
                    {
                        self.close(stream.connection, End::Called);
                    }
                }
                _ => {}
            }
        }
    }

    /// What waiting for a commit would count as durable, or what the engine publishes as such, whichever is more: the
    /// records of this epoch among it are acknowledged to those who wrote them. An older epoch's are as safe as the
    /// first of this one behind them, and no safer.
    fn take_committed(&mut self, id: u64, durable: Lsn) {
        let World { nodes, oracle, k, .. } = self;
        let node = &mut nodes[usize::try_from(id - 1).unwrap()];
        let Some(leading) = node.leading.as_mut().filter(|leading| !leading.is_relay) else { return };
        let durable = leading.commits.reached(AckLevel::Durable, usize::from(*k)).max(durable);
        if durable <= leading.acknowledged {
            return;
        }
        let within = |mark: &&Mark| mark.lsn() > leading.acknowledged && mark.lsn() <= durable;
        let marks: Vec<Mark> = node.log.marks.iter().filter(within).copied().collect();
        oracle.acknowledge(id, leading.epoch, *k, &marks);
        leading.acknowledged = durable;
    }

    /// A client writes.
    pub fn append(&mut self, id: u64) {
        let count = self.chance.between(1, 3);
        let long = self.chance.per_mille(500);
        let records: Vec<Vec<u8>> = (0..count)
            .map(|_| {
                self.written += 1;
                let len = if long { self.chance.between(1000, 6000) } else { self.chance.between(16, 300) };
                record_of(self.written, self.chance.next(), usize::try_from(len).unwrap())
            })
            .collect();
        let slices: Vec<&[u8]> = records.iter().map(Vec::as_slice).collect();
        let now = self.queue.now;
        let World { nodes, oracle, .. } = self;
        let node = &mut nodes[usize::try_from(id - 1).unwrap()];
        let before = node.log.marks.len();
        // A segment without batches makes room for its successor, with the same name.
        match node.log.append(&mut node.disk, now, &slices) {
            Ok(mark) => {
                oracle.wrote(id, &node.log, &node.disk, before);
                self.line(id, format_args!("writes up to LSN {} chain {:08x}", mark.lsn(), mark.chain().0));
                self.pump_all(id);
            }
            Err(full) => {
                oracle.wrote(id, &node.log, &node.disk, before);
                self.line(id, format_args!("writes nothing: {full:?}"));
            }
        }
    }

    // Streams ---------------------------------------------------------------------------------------------------------

    fn fail_session(&mut self, id: u64, follower: u64, reason: FailureReason) {
        let live = self.node(id).engine.session(NodeId(follower)).filter(|session| session.phase.is_live());
        if let Some(Session { id: session, epoch, .. }) = live {
            self.apply(id, Event::SessionFailed { epoch, replica: NodeId(follower), session, reason });
        }
    }

    pub fn end_all_streams(&mut self, id: u64) {
        let streams = self.leading(id).map(|leading| std::mem::take(&mut leading.streams)).unwrap_or_default();
        for stream in streams.into_values() {
            self.close(stream.connection, End::Called);
        }
    }

    /// Its log or its target become others: whom it feeds comes again, once it has caught up.
    pub fn withdraw(&mut self, id: u64) {
        let others: Vec<u64> = self.leading(id).map(|it| it.streams.keys().copied().collect()).unwrap_or_default();
        for other in others {
            self.fail_session(id, other, FailureReason::Cancelled);
        }
        self.end_all_streams(id);
        let keeps_feeding = self.plant == Some(Plant::FeedAtOnce);
        self.leading(id).into_iter().for_each(|leading| leading.caught_up = keeps_feeding);
    }

    /// Its log ends there now: nobody stands behind that.
    pub fn cut_places(&mut self, id: u64) {
        let node = self.node(id);
        let (tail, head) = (node.log.tail(), node.log.head());
        for known in node.leading.iter_mut().flat_map(|leading| leading.followers.values_mut()) {
            known.position = known.position.min(head);
            known.lost_place |= known.position.next() < tail;
        }
    }

    /// The connection of a stream is gone.
    pub fn stream_gone(&mut self, id: u64, connection: ConnectionId) {
        let Some(leading) = self.leading(id) else { return };
        let found =
            leading.streams.iter().find(|(_, stream)| stream.connection == connection).map(|(follower, _)| *follower);
        if let Some(follower) = found {
            leading.streams.remove(&follower);
            self.fail_session(id, follower, FailureReason::TransportLost);
        }
    }

    pub fn places_lost(&mut self, id: u64, through: Lsn) {
        let Some(leading) = self.leading(id) else { return };
        let mut lost = Vec::new();
        for (follower, known) in &mut leading.followers {
            if known.position < through && !known.lost_place {
                known.lost_place = true;
                lost.push(*follower);
            }
        }
        for follower in lost {
            self.line(id, format_args!("node {follower} loses its place"));
            self.fail_session(id, follower, FailureReason::PinLost);
        }
    }

    /// Sessions that have run out of time fail.
    fn expire(&mut self, id: u64) {
        let (now, mut commands) = (Millis(self.queue.now), Vec::new());
        let _ = self.node(id).engine.tick(now, &mut commands);
        self.carry_out(id, commands);
    }

    pub fn tick_leading(&mut self, id: u64) {
        let now = self.queue.now;
        if self.node(id).leading.is_none() {
            return;
        }
        self.expire(id);
        let Some(leading) = self.leading(id) else { return };
        let silent: Vec<ConnectionId> = leading
            .streams
            .values()
            .filter(|stream| stream.heard_at + PEER_TIMEOUT < now)
            .map(|stream| stream.connection)
            .collect();
        for connection in silent {
            self.line(id, format_args!("connection {connection} is silent"));
            self.close(connection, End::Called);
            self.stream_gone(id, connection);
        }
        self.pump_all(id);
        let followers: Vec<u64> =
            self.leading(id).map(|leading| leading.streams.keys().copied().collect()).unwrap_or_default();
        for follower in followers {
            let node = self.node(id);
            let (head, chain, committed, epoch) =
                (node.log.head(), node.log.chain, node.engine.durable(), node.accepted);
            let Some(stream) = node.leading.as_mut().and_then(|leading| leading.streams.get_mut(&follower)) else {
                continue;
            };
            if stream.sent_at + HEARTBEAT <= now {
                stream.sent_at = now;
                let connection = stream.connection;
                let beat = Heartbeat { epoch, head, committed, chain, sent_unix_ms: now };
                self.send(connection, End::Called, frame(&Message::Heartbeat(beat)));
            }
        }
    }

    pub fn pump_all(&mut self, id: u64) {
        let followers: Vec<u64> =
            self.leading(id).map(|leading| leading.streams.keys().copied().collect()).unwrap_or_default();
        for follower in followers {
            self.pump(id, follower);
        }
    }

    /// Ships what there is: first the log, then a piece of the base.
    fn pump(&mut self, id: u64, follower: u64) {
        let now = self.queue.now;
        loop {
            let most = self.chance.between(1, 20_000);
            let World { nodes, network, .. } = &mut *self;
            let node = &mut nodes[usize::try_from(id - 1).unwrap()];
            let Some(stream) = node.leading.as_mut().and_then(|leading| leading.streams.get_mut(&follower)) else {
                return;
            };
            if network.under_way(stream.connection, End::Caller) >= WINDOW {
                return;
            }
            let Some(((segment, offset), bytes)) = node.log.read(&node.disk, stream.cursor, most) else { break };
            let header = WalDataHeader { segment, offset };
            stream.cursor = (segment, offset + bytes.len() as u64);
            stream.sent_at = now;
            let (connection, bytes) = (stream.connection, framed(FrameKind::WalData, &header.to_bytes(), bytes));
            self.send(connection, End::Called, bytes);
        }
        let node = self.node(id);
        let (head, epoch) = (node.log.head(), node.accepted);
        let Some(stream) = node.leading.as_mut().and_then(|leading| leading.streams.get_mut(&follower)) else { return };
        let connection = stream.connection;
        if !std::mem::replace(&mut stream.caught_up, true) {
            self.send(connection, End::Called, frame(&Message::CaughtUp(CaughtUp { head })));
        } else if let Some(base) = &mut stream.base
            && !base.is_sent
        {
            let mut buffer = [0; 64];
            let session = SessionId(stream.session);
            let bytes = match base.source.next_run(&mut buffer).unwrap() {
                Some(run) => {
                    let bytes = &buffer[..run.len];
                    base.checksum.update(bytes);
                    base.blocks += u64::from(run.count);
                    base.sent.push_back(run.count);
                    let (length, checksum) = (u32::try_from(run.len).unwrap(), crc32fast::hash(bytes));
                    let header = BaseDataHeader { session, epoch, block: run.first.0, length, checksum };
                    framed(FrameKind::BaseData, &header.to_bytes(), bytes)
                }
                None => {
                    base.is_sent = true;
                    let checksum = base.checksum.clone().finalize();
                    let base_lsn = base.info.base_lsn;
                    frame(&Message::BaseComplete(BaseComplete {
                        session,
                        epoch,
                        base_lsn,
                        blocks: base.blocks,
                        checksum,
                    }))
                }
            };
            self.send(connection, End::Called, bytes);
        }
    }

    // What followers say ----------------------------------------------------------------------------------------------

    /// A frame at the end that was called.
    pub fn called_with(
        &mut self,
        id: u64,
        connection: ConnectionId,
        kind: FrameKind,
        body: &[u8],
    ) -> Result<(), String> {
        let now = self.queue.now;
        let message = Message::decode(kind, body).map_err(|error| error.to_string())?;
        if let Message::SyncRequest(request) = message {
            return self.ask_or_admit(id, connection, request);
        }
        let Some(leading) = self.leading(id) else { return Err("it does not lead".to_owned()) };
        if let Message::CommonPoint(answer) = message {
            let Some(request) = leading.asked.remove(&connection) else { return Err("it was not asked".to_owned()) };
            let parting = check_where_logs_part(&self.node(id).log, &request, &answer);
            return self.admit(id, connection, &request, Some(parting));
        }
        let found = leading.streams.iter_mut().find(|(_, stream)| stream.connection == connection);
        let Some((&follower, stream)) = found else { return Err("no stream was agreed on".to_owned()) };
        stream.heard_at = now;
        match message {
            Message::Ack(ack) => self.acknowledged(id, follower, ack),
            Message::SessionAck(ack) => self.session_acknowledged(id, follower, ack),
            Message::Heartbeat(_) => Ok(()),
            other => Err(format!("{:?} is not for a leader", other.kind())),
        }
    }

    fn decline(&mut self, connection: ConnectionId, code: RefusalCode, text: &str) -> Result<(), String> {
        self.send(connection, End::Called, frame(&Message::Error(ErrorMessage::new(code, text))));
        Err(format!("refused: {code:?}"))
    }

    fn ask_or_admit(&mut self, id: u64, connection: ConnectionId, request: SyncRequest) -> Result<(), String> {
        let forgets_chain = self.plant == Some(Plant::TrustChain);
        let node = self.node(id);
        let Some(leading) = node.leading.as_mut().filter(|_| !forgets_chain && !is_beginning_of(&node.log, &request))
        else {
            return self.admit(id, connection, &request, None);
        };
        leading.asked.insert(connection, request);
        let question = ask_where_logs_part(&node.log).map_err(|error| error.to_string())?;
        self.send(connection, End::Called, frame(&Message::EpochHistory(question)));
        Ok(())
    }

    fn admit(
        &mut self,
        id: u64,
        connection: ConnectionId,
        request: &SyncRequest,
        parting: Option<Parting>,
    ) -> Result<(), String> {
        let (now, follower) = (self.queue.now, request.node.0);
        if PROTOCOL_VERSIONS.negotiate(request.versions).is_none() || request.cluster != IDENTITY.cluster {
            return self.decline(connection, RefusalCode::WrongCluster, "another cluster");
        }
        let Some(leading) = self.leading(id) else {
            return self.decline(connection, RefusalCode::WrongRole, "it does not lead");
        };
        let (epoch, is_relay, caught_up) = (leading.epoch, leading.is_relay, leading.caught_up);
        let node = self.node(id);
        if is_relay && request.epoch > epoch {
            return self.decline(connection, RefusalCode::StaleEpoch, "it has not met that epoch's leader");
        }
        if !caught_up || is_relay && (node.blocks.is_incomplete() || epoch != node.accepted) {
            return self.decline(connection, RefusalCode::NotReady, "it has yet to catch up with its leader");
        }
        let Some(leading) = self.leading(id) else { return Ok(()) };
        if leading.is_relay {
            leading.followers.entry(follower).or_default();
        }
        let before = leading.streams.remove(&follower);
        let reason = if before.is_some() { FailureReason::Superseded } else { FailureReason::TransportLost };
        self.fail_session(id, follower, reason);
        if let Some(before) = before {
            self.close(before.connection, End::Called);
        }
        let takes_accepted = self.plant == Some(Plant::TakeAcceptedEpoch);
        let forgets_chain = self.plant == Some(Plant::TrustChain);
        let node = self.node(id);
        let (tail, head) = (node.log.tail(), node.log.head());
        let place = if forgets_chain {
            let mark = node.log.marks.iter().rev().find(|mark| mark.lsn() == request.received);
            mark.and_then(|mark| node.log.place_after(mark.lsn(), mark.chain()))
                .or(node.log.place_after(request.received, request.chain))
        } else {
            node.log.place_after(request.received, request.chain)
        };
        let shared = parting.and_then(|parting| parting.common);
        let (common, cut_place) = (shared.map(|place| place.lsn), shared.map(|place| (place.segment, place.offset)));
        let durable = request.durable.min(request.received);
        let Some(known) = node.leading.as_mut().and_then(|leading| leading.followers.get_mut(&follower)) else {
            return self.decline(connection, RefusalCode::WrongTopology, "no member");
        };
        known.position = common.unwrap_or(durable).min(durable.min(request.applied));
        known.lost_place = known.position.next() < tail;
        let facts = SyncAck {
            epoch,
            replica: request.node,
            follower: FollowerFacts {
                received: request.received,
                durable,
                applied: request.applied,
                committed: Lsn::ZERO,
                chain: request.chain,
                tail_epoch: match parting {
                    Some(parting) if !takes_accepted => parting.tail_epoch,
                    None if request.received == Lsn::ZERO => Epoch::ZERO,
                    _ => request.epoch,
                },
                base_incomplete: request.flags & SyncRequest::BASE_INCOMPLETE != 0,
            },
            leader: LeaderFacts {
                tail,
                head,
                chain_at_received: place.map(|_| request.chain),
                common,
                cut_possible: parting.is_some_and(|parting| parting.cut_possible),
                is_relay,
            },
        };
        self.apply(id, Event::SyncAckReceived(facts));
        let replica = self.node(id).engine.replica(request.node);
        let refusal = replica.and_then(|replica| replica.refusal);
        let session =
            self.node(id).engine.session(request.node).filter(|session| refusal.is_none() && session.phase.is_live());
        let Some(session) = session else {
            let code = match refusal {
                Some(towline::protocol::Refusal::NewerEpoch) => RefusalCode::StaleEpoch,
                Some(towline::protocol::Refusal::LeaderBehind) => RefusalCode::LeaderBehind,
                Some(towline::protocol::Refusal::RelayBehind) => RefusalCode::NotReady,
                _ => RefusalCode::Diverged,
            };
            return self.decline(connection, code, &format!("{refusal:?}"));
        };
        let (kind, start) = match session.kind {
            SessionKind::Rebuild => (WireKind::Rebuild, Lsn::ZERO),
            SessionKind::KeepUp => (WireKind::KeepUp, request.received.next()),
            SessionKind::CatchUp => (WireKind::CatchUp, session.cut.unwrap_or(request.received).next()),
        };
        let place = if session.cut.is_some() { cut_place } else { place };
        let (start_segment, start_offset) =
            if kind == WireKind::Rebuild { (Lsn::ZERO, 0) } else { place.unwrap_or_default() };
        if kind != WireKind::Rebuild && place.is_none() {
            self.fail_session(id, follower, FailureReason::LocalWalCorrupt);
            return self.decline(connection, RefusalCode::Diverged, "it began with another chain");
        }
        let info = ShardInfo {
            version: PROTOCOL_VERSIONS.max,
            cluster: IDENTITY.cluster,
            node: NodeId(id),
            region: IDENTITY.region,
            shard: SHARD,
            shard_count: 1,
            segment_size: SEGMENT_SIZE,
            epoch,
            tail,
            head,
            session: session.id,
            session_kind: kind,
            start,
            target: session.target,
            start_segment,
            start_offset,
            heartbeat_ms: u32::try_from(HEARTBEAT).unwrap(),
            timeout_ms: u32::try_from(PEER_TIMEOUT).unwrap(),
            key_len: 0,
            value_len: 0,
            prefix_bits: 0,
        };
        self.send(connection, End::Called, frame(&Message::ShardInfo(info)));
        let (counts_rebuilding, counts_cut) =
            (self.plant == Some(Plant::CountRebuilding), self.plant == Some(Plant::CountCut));
        // A follower that is to cut its log stands where it will then stand.
        let stays = session.cut.filter(|_| !counts_cut).unwrap_or(Lsn::MAX);
        let marks = [request.received, request.durable, request.applied].map(|mark| mark.min(stays));
        let stream = Stream {
            connection,
            session: session.id.0,
            target: session.target,
            cursor: (start_segment, start_offset),
            caught_up: false,
            base: None,
            agreed: Lsn::ZERO,
            heard_at: now,
            sent_at: now,
        };
        if let Some(leading) = self.leading(id) {
            leading.streams.insert(follower, stream);
            let is_rebuild = kind == WireKind::Rebuild && !counts_rebuilding;
            leading.commits.stream_begins(request.node, session.id.0, is_rebuild, marks).unwrap();
        }
        let durable = self.node(id).engine.durable();
        self.take_committed(id, durable);
        if kind == WireKind::Rebuild { self.start_rebuild(id, follower, connection) } else { Ok(()) }
    }

    /// Opens the base and starts the session. What a follower gives up for it must not be its only copy: the leader's
    /// own log is on stable storage first.
    fn start_rebuild(&mut self, id: u64, follower: u64, connection: ConnectionId) -> Result<(), String> {
        self.node(id).disk.sync_now();
        let head = self.node(id).log.head();
        self.node(id).log.synced = head;
        let lag = std::mem::take(&mut self.apply_lag);
        self.apply_log(id);
        self.apply_lag = lag;
        let World { nodes, oracle, .. } = &mut *self;
        let node = &mut nodes[usize::try_from(id - 1).unwrap()];
        let source = node.blocks.open_base(SHARD).map_err(|error| error.to_string())?;
        let info = source.info();
        let first = node.log.segment_start_for(info.base_lsn.next());
        let Some(leading) = &mut node.leading else { return Ok(()) };
        let (Some(stream), Some(known)) = (leading.streams.get_mut(&follower), leading.followers.get_mut(&follower))
        else {
            return Ok(());
        };
        oracle.rebuilds += 1;
        known.pins.push((stream.session, first));
        (known.position, known.lost_place) = (first.previous(), false);
        stream.cursor = (first, 0);
        stream.base = Some(Base {
            source,
            info,
            sent: VecDeque::new(),
            taken: 0,
            blocks: 0,
            checksum: crc32fast::Hasher::new(),
            is_sent: false,
        });
        let control = SessionControl {
            session: SessionId(stream.session),
            epoch: leading.epoch,
            action: SessionAction::Start,
            kind: WireKind::Rebuild,
            base_lsn: info.base_lsn,
            target: stream.target,
            log_start: first,
            block_len: info.block_len,
            block_count: info.block_count,
        };
        self.send(connection, End::Called, frame(&Message::SessionControl(control)));
        Ok(())
    }

    fn acknowledged(&mut self, id: u64, follower: u64, ack: Ack) -> Result<(), String> {
        // As the crate's host does: a session that has run out of time ends first, and its stream with it.
        self.expire(id);
        if !self.leading(id).is_some_and(|leading| leading.streams.contains_key(&follower)) {
            return Ok(());
        }
        let node = self.node(id);
        let Some(leading) = &mut node.leading else { return Ok(()) };
        let epoch = leading.epoch;
        let session = leading.streams.get(&follower).map(|stream| stream.session);
        if (Some(ack.session.0), ack.epoch) != (session, epoch) {
            return Err("it acknowledges another session".to_owned());
        }
        if ack.received > node.log.head() || ack.durable > ack.received || ack.applied > ack.received {
            return Err("it acknowledges what cannot be".to_owned());
        }
        if let Some(known) = leading.followers.get_mut(&follower) {
            known.position = known.position.max(ack.durable.min(ack.applied));
            known.lost_place &= known.position.next() < node.log.tail();
            if let Some((_, pin)) = known.pins.last_mut() {
                *pin = (*pin).max(known.position.next());
            }
        }
        let facts = SyncAck {
            epoch,
            replica: NodeId(follower),
            follower: FollowerFacts {
                received: ack.received,
                durable: ack.durable,
                applied: ack.applied,
                chain: ack.chain,
                tail_epoch: if ack.received == Lsn::ZERO { Epoch::ZERO } else { epoch },
                ..FollowerFacts::default()
            },
            leader: LeaderFacts {
                tail: node.log.tail(),
                head: node.log.head(),
                chain_at_received: node.log.chain_at(ack.received, ack.chain),
                is_relay: leading.is_relay,
                ..LeaderFacts::default()
            },
        };
        // What has another chain counts for nothing, as far as there is something to compare.
        if facts.leader.chain_at_received.is_none_or(|chain| chain == ack.chain) {
            if let Some(stream) = leading.streams.get_mut(&follower)
                && facts.leader.chain_at_received.is_some()
            {
                stream.agreed = ack.received;
            }
            leading
                .commits
                .acknowledge(NodeId(follower), ack.session.0, [ack.received, ack.durable, ack.applied])
                .unwrap();
        }
        self.apply(id, Event::SyncAckReceived(facts));
        let session = self.node(id).engine.session(NodeId(follower)).filter(|session| session.phase.is_live());
        let Some(Session { id: session, epoch, kind, target, progress, .. }) = session else { return Ok(()) };
        let replica = NodeId(follower);
        let achieved = facts.follower.position().min(facts.leader.head);
        match kind {
            SessionKind::KeepUp => {}
            SessionKind::CatchUp => {
                let progress = Progress { achieved, base_blocks: 0 };
                self.apply(id, Event::SessionProgress { epoch, replica, session, progress, making_durable: false });
                if achieved >= target {
                    let (durable, head) = (facts.follower.durable, facts.leader.head);
                    self.apply(id, Event::SessionCompleted { epoch, replica, session, achieved, durable, head });
                    self.apply(id, Event::SyncAckReceived(facts));
                }
            }
            SessionKind::Rebuild => {
                let progress = Progress { achieved, ..progress };
                self.apply(id, Event::SessionProgress { epoch, replica, session, progress, making_durable: false });
            }
        }
        self.pump(id, follower);
        Ok(())
    }

    fn session_acknowledged(&mut self, id: u64, follower: u64, ack: SessionAck) -> Result<(), String> {
        let replica = NodeId(follower);
        let node = self.node(id);
        let head = node.log.head();
        let current = node.engine.session(replica).filter(|session| {
            session.phase.is_live()
                && session.kind == SessionKind::Rebuild
                && (session.id.0, session.epoch) == (ack.session.0, ack.epoch)
        });
        let Some(Session { id: session, epoch, progress, target, .. }) = current else { return Ok(()) };
        let base = node.leading.as_mut().and_then(|leading| leading.streams.get_mut(&follower)?.base.as_mut());
        let Some(base) = base else { return Err("a word about a base that was not opened".to_owned()) };
        match ack.phase {
            SessionPhase::Accepted => {
                self.apply(id, Event::SessionProgress { epoch, replica, session, progress, making_durable: false })
            }
            SessionPhase::MakingDurable => {
                self.apply(id, Event::SessionProgress { epoch, replica, session, progress, making_durable: true });
            }
            SessionPhase::Running | SessionPhase::BaseComplete => {
                let count = if ack.phase == SessionPhase::Running { 1 } else { base.sent.len() };
                let Some(taken) = (0..count).map(|_| base.sent.pop_front().map(u64::from)).sum::<Option<u64>>() else {
                    return Err("it has taken more than was sent".to_owned());
                };
                base.taken += taken;
                let progress = Progress { base_blocks: base.taken, ..progress };
                self.apply(id, Event::SessionProgress { epoch, replica, session, progress, making_durable: false });
                self.pump(id, follower);
            }
            SessionPhase::Failed => self.fail_session(id, follower, FailureReason::Cancelled),
            SessionPhase::Completed => {
                if !base.is_sent || ack.achieved > head || ack.achieved < target {
                    return Err("it completed what it cannot have".to_owned());
                }
                let (achieved, info) = (ack.achieved, base.info);
                self.apply(id, Event::SessionCompleted { epoch, replica, session, achieved, durable: achieved, head });
                let Some(leading) = self.leading(id) else { return Ok(()) };
                let Some(stream) = leading.streams.get(&follower) else { return Ok(()) };
                leading.commits.rebuilt(replica, ack.session.0, achieved.min(stream.agreed)).unwrap();
                let control = SessionControl {
                    session: ack.session,
                    epoch,
                    action: SessionAction::Accept,
                    kind: WireKind::Rebuild,
                    base_lsn: info.base_lsn,
                    target,
                    log_start: Lsn::ZERO,
                    block_len: 0,
                    block_count: 0,
                };
                let connection = stream.connection;
                self.send(connection, End::Called, frame(&Message::SessionControl(control)));
                let durable = self.node(id).engine.durable();
                self.take_committed(id, durable);
            }
        }
        Ok(())
    }
}
