//! What a node answers to those who connect: followers, readers of the log, and who asks how it is.
//!
//! Each connection has a thread. It reads the request, within the handshake time-out, and checks that it can be served
//! at all; how a follower recovers is decided by the shard's [`Host`] alone. For a follower it then starts the shipper
//! and, in its own place, the thread that reads acknowledgements. Nothing that a peer sends makes a node do more than
//! its limits allow: frames have a maximum length by type, connections a maximum number, in all and from one address
//! ([`admission`]). What happens on a connection once its request has been answered is in [`stream`].

mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use crate::admission;
use crate::caught::caught;
use crate::commit::Commits;
use crate::data_dir::DataDir;
use crate::divergence::HistoryCheck;
use crate::error::{Error, RefusalCode, Result};
use crate::follower::ShardState;
use crate::host::{Admitted, Declined as Refusal, Host, StreamKey, StreamSignals, rebuild_goes_on};
use crate::limits::MAX_STATUS_LEN;
use crate::node::NodeOptions;
use crate::node::running::Threads;
use crate::parting::ask_where_logs_part;
use crate::protocol::{FailureReason, SessionKind as Recovery};
use crate::rebuild::places::Places;
use crate::shutdown::ShutdownSignal;
use crate::status::{Role, Status};
use crate::target::ReplicationTarget;
use crate::transport::{Body, Connection, FrameReceiver, FrameSender, Listener, is_closed_by_peer};
use crate::types::{Epoch, Lsn, NodeId, SessionId, ShardId};
use crate::wal::segment::SEGMENT_VERSION;
use crate::wal::{ChainCursor, Log, LogPosition, LogReader};
use crate::watermark::WaiterName;
use crate::wire::{
    ErrorMessage, FrameKind, Message, PROTOCOL_VERSIONS, ProtocolVersion, Purpose, SessionKind, ShardInfo, SyncRequest,
};
use stream::{Agreed, LeaveStream, Stream};

/// How long whoever asks a relay is kept waiting that is not ready: as long as it would wait before it asks again.
const MOST_WAITED_FOR: Duration = Duration::from_secs(1);

/// One shard as the server sees it.
pub(crate) struct ServerShard {
    pub(crate) log: Arc<Log>,
    pub(crate) commits: Arc<Commits>,
    /// Who decides about its followers.
    pub(crate) host: Arc<Host>,
    /// On a follower: how following goes.
    pub(crate) following: Option<Arc<ShardState>>,
    /// What the log is applied to on this node, if anything.
    pub(crate) target: Option<Arc<dyn ReplicationTarget>>,
}

impl ServerShard {
    /// Whether the target waits for a rebuild, or is being rebuilt. What cannot be asked is not.
    pub(crate) fn is_rebuilding(&self) -> bool {
        let asked = self.target.as_ref().map(|target| caught("the target", || target.is_rebuilding(self.log.shard())));
        matches!(asked, Some(Ok(true)))
    }
}

/// The listening side of a node.
pub(crate) struct Server {
    role: Role,
    directory: Arc<DataDir>,
    /// Under which a leader leads, whatever it accepts once it is deposed.
    led: Epoch,
    /// Replaced as a whole where a rebuild gives a shard another log.
    shards: Vec<RwLock<Arc<ServerShard>>>,
    options: NodeOptions,
    started: Instant,
    /// The node stops; what is pending is still shipped.
    draining: ShutdownSignal,
    /// Everything stops; sockets are closed.
    stop: ShutdownSignal,
    threads: Arc<Threads>,
    /// Shippers so far, each of which waits under its number.
    shippers: AtomicU64,
    /// Who may be connected.
    places: Arc<admission::Places>,
    /// Rebuilds served at a time.
    rebuild_places: Arc<Places>,
}

/// What a request gets: the answer, and what is then shipped to whom.
struct Answer {
    info: ShardInfo,
    lanes: Lanes,
    stream: Option<StreamKey>,
    of_shard: Arc<ServerShard>,
}

/// What a stream carries.
enum Lanes {
    /// Nothing more.
    None,
    /// The log from a place on.
    Log(LogPosition),
    /// A base of this target and the log beside it: from where an interrupted rebuild's goes on, or from where the
    /// rebuild will say.
    Rebuild(LogReader, Option<LogPosition>, Arc<dyn ReplicationTarget>),
    /// Ranges of segments, as they are asked for.
    Ranges,
}

/// A connection that has its place.
type Accepted = (Connection, admission::Place);

impl Server {
    #[allow(clippy::too_many_arguments, reason = "each is a different thing that both roles have")]
    pub(crate) fn new(
        role: Role,
        directory: Arc<DataDir>,
        shards: Vec<ServerShard>,
        options: NodeOptions,
        draining: ShutdownSignal,
        stop: ShutdownSignal,
        threads: Arc<Threads>,
    ) -> Server {
        Server {
            role,
            led: directory.manifest().epoch,
            directory,
            rebuild_places: Places::new(options.max_rebuilds),
            shards: shards.into_iter().map(|shard| RwLock::new(Arc::new(shard))).collect(),
            places: admission::Places::new(options.max_connections, options.most_connections_of_address()),
            options,
            started: Instant::now(),
            draining,
            stop,
            threads,
            shippers: AtomicU64::new(0),
        }
    }

    pub(crate) fn shard(&self, shard: ShardId) -> Result<Arc<ServerShard>> {
        Ok(Arc::clone(&self.shard_cell(shard)?.read()))
    }

    /// All of them, as they are now.
    pub(crate) fn all_shards(&self) -> impl Iterator<Item = Arc<ServerShard>> + '_ {
        self.shards.iter().map(|shard| Arc::clone(&shard.read()))
    }

    /// Another log has taken the place of a shard's.
    pub(crate) fn replace_shard(&self, shard: ShardId, with: ServerShard) -> Result<()> {
        *self.shard_cell(shard)?.write() = Arc::new(with);
        Ok(())
    }

    fn shard_cell(&self, shard: ShardId) -> Result<&RwLock<Arc<ServerShard>>> {
        let count = self.shards.len();
        self.shards
            .get(usize::from(shard.0))
            .ok_or_else(|| Error::invalid(format!("there is no shard {shard}: the node has {count}, numbered from 0")))
    }

    /// Starts accepting.
    pub(crate) fn listen(server: &Arc<Server>, listener: Box<dyn Listener>) -> Result<()> {
        let listener: Arc<dyn Listener> = Arc::from(listener);
        let this = Arc::clone(server);
        server.threads.spawn("tl-accept".to_owned(), move || {
            let closing = Arc::clone(&listener);
            let _close_at_stop = this.draining.on_shutdown(move || closing.close());
            Server::accept(&this, listener.as_ref());
        })
    }

    fn accept(server: &Arc<Server>, listener: &dyn Listener) {
        while !server.draining.is_shutdown() {
            match caught("the listener", || listener.accept()) {
                Ok(connection) => Server::serve_on_thread(server, connection),
                Err(error) if error.is_shutdown() => return,
                Err(error) => {
                    log::warn!("a connection was not accepted: {error}");
                    // As when file descriptors run out: accepting again at once would only spin.
                    let _ = server.draining.wait_timeout(Duration::from_millis(100));
                }
            }
        }
    }

    fn serve_on_thread(server: &Arc<Server>, mut connection: Connection) {
        let place = match server.places.take(&connection) {
            Ok(place) => place,
            Err(reason) => {
                refuse(connection.sender.as_mut(), Refusal(RefusalCode::TooManyConnections, reason));
                return;
            }
        };
        let this = Arc::clone(server);
        let id = place.id();
        let spawned = server.threads.spawn_with(format!("tl-agree-{id}"), server.options.on_demand_stack, move || {
            let peer = connection.peer.clone();
            match Server::agree(&this, &peer, (connection, place)) {
                Ok(Some(agreed)) => Server::serve_on_another_thread(agreed, format!("tl-peer-{id}")),
                Ok(None) => say_how_it_ended(&this, &peer, &Ok(())),
                Err(error) => say_how_it_ended(&this, &peer, &Err(error)),
            }
        });
        if let Err(error) = spawned {
            log::warn!("a connection was dropped: {error}");
        }
    }

    /// Serves what has been agreed on: on a thread that has none of the stack that agreeing touched, and whose
    /// beginning is the end of this one; where there can be none, on this one.
    fn serve_on_another_thread(agreed: Box<Agreed>, name: String) {
        let (server, peer) = (Arc::clone(&agreed.stream.server), agreed.stream.peer.clone());
        let handed_over = Arc::new(Mutex::new(Some(agreed)));
        let serve = move || {
            let agreed = handed_over.lock().take();
            if let Some(agreed) = agreed {
                let (server, peer) = (Arc::clone(&agreed.stream.server), agreed.stream.peer.clone());
                say_how_it_ended(&server, &peer, &agreed.serve());
            }
        };
        if let Err(error) = server.threads.spawn(name, serve.clone()) {
            log::warn!("{peer}: no thread to serve it, so the one that answered it does: {error}");
            serve();
        }
    }

    /// Reads the request and answers it. `None` if that was all.
    fn agree(server: &Arc<Server>, peer: &str, accepted: Accepted) -> Result<Option<Box<Agreed>>> {
        let (Connection { mut sender, mut receiver, closer, .. }, mut place) = accepted;
        let over = server.stop.child();
        let close_at_stop = over.on_shutdown(move || closer.close());
        let Some(mut request) = Server::read_request(server, peer, (sender.as_mut(), receiver.as_mut()), &mut place)?
        else {
            return Ok(None);
        };
        let signals = StreamSignals { over, superseded: ShutdownSignal::new() };
        let answer = server.check(&request).and_then(|version| match request.purpose {
            Purpose::Topology => server.answer_without_log(&request, version, Lanes::None),
            Purpose::Follow => {
                server.start_following(&mut request, version, (sender.as_mut(), receiver.as_mut()), peer, &signals)
            }
            Purpose::Tail => server.start_tail(&request, version),
            Purpose::Segment if request.from == Lsn::ZERO => {
                takes_log(version).and_then(|()| server.answer_without_log(&request, version, Lanes::Ranges))
            }
            other => Err(Refusal(RefusalCode::WrongRole, format!("this node does not serve {other:?} here"))),
        });
        let Answer { info, lanes, stream: key, of_shard } = match answer {
            Ok(answer) => answer,
            Err(refusal) => {
                log::warn!("{peer} (node {}, shard {}) was refused: {}", request.node, request.shard, refusal.1);
                refuse(sender.as_mut(), refusal);
                return Ok(None);
            }
        };
        let leave = key.map(|stream| LeaveStream { server: Arc::clone(server), shard: request.shard, stream });
        receiver.set_deadline(None)?;
        sender.send_message(&Message::ShardInfo(info))?;
        let cursor = match &lanes {
            Lanes::Log(place) | Lanes::Rebuild(_, Some(place), _) => ChainCursor::at(Arc::clone(&of_shard.log), *place),
            _ => ChainCursor::unplaced(Arc::clone(&of_shard.log)),
        };
        let (history, agreement) = (Arc::new(HistoryCheck::new(cursor)), Arc::default());
        let (server, peer) = (Arc::clone(server), peer.to_owned());
        let stream = Stream { server, peer, request, info, signals, of_shard, history, agreement };
        let Some(rest) = stream.begin(key, lanes, sender)? else { return Ok(None) };
        Ok(Some(Box::new(Agreed {
            stream,
            _leave: leave,
            rest,
            receiver,
            _place: place,
            _close_at_stop: close_at_stop,
        })))
    }

    /// Reads the request. `None` if that was all: it was answered, or its sender had to make room.
    #[inline(never)]
    fn read_request(
        server: &Server,
        peer: &str,
        (sender, receiver): (&mut dyn FrameSender, &mut dyn FrameReceiver),
        place: &mut admission::Place,
    ) -> Result<Option<SyncRequest>> {
        receiver.set_deadline(Instant::now().checked_add(server.options.handshake_timeout))?;
        let header = match receiver.receive_header() {
            Ok(header) => header,
            // Whoever has not spoken yet makes room for others without a word.
            Err(_) if place.is_taken() => return Ok(None),
            Err(error) => return Err(error),
        };
        if header.kind == FrameKind::StatusRequest {
            receiver.receive_message_body(header)?;
            return server.answer_status(sender).map(|()| None);
        }
        let request = match receiver.receive_message_body(header) {
            Ok(Message::SyncRequest(request)) => request,
            Ok(other) => {
                let text = format!("a connection begins with SyncRequest or StatusRequest, not {:?}", other.kind());
                refuse(sender, Refusal(RefusalCode::ProtocolViolation, text.clone()));
                return Err(Error::protocol(peer, text));
            }
            Err(error) => {
                refuse(sender, Refusal(RefusalCode::ProtocolViolation, error.to_string()));
                return Err(error);
            }
        };
        Ok(place.keep().then_some(request))
    }

    /// What every request must have right. Gives the protocol version to speak.
    fn check(&self, request: &SyncRequest) -> Result<u16, Refusal> {
        let manifest = self.directory.manifest();
        let Some(version) = PROTOCOL_VERSIONS.negotiate(request.versions) else {
            return Err(Refusal(
                RefusalCode::UnsupportedVersion,
                format!(
                    "this node speaks protocol versions {} to {}, you speak {} to {}; update the older side",
                    PROTOCOL_VERSIONS.min, PROTOCOL_VERSIONS.max, request.versions.min, request.versions.max
                ),
            ));
        };
        let anonymous = matches!(request.purpose, Purpose::Topology | Purpose::Tail);
        if request.cluster != manifest.cluster && !(anonymous && request.cluster.0 == 0) {
            return Err(Refusal(
                RefusalCode::WrongCluster,
                format!(
                    "this node belongs to cluster {}, you to {}; check the address, or start with an empty directory",
                    manifest.cluster, request.cluster
                ),
            ));
        }
        if usize::from(request.shard.0) >= self.shards.len() {
            return Err(Refusal(
                RefusalCode::UnknownShard,
                format!("there is no shard {}: this node has {}, numbered from 0", request.shard, manifest.shard_count),
            ));
        }
        if self.draining.is_shutdown() {
            return Err(Refusal(RefusalCode::ShuttingDown, "this node is shutting down".to_owned()));
        }
        Ok(version)
    }

    /// The answer to somebody who is shipped nothing.
    fn answer_without_log(&self, request: &SyncRequest, version: u16, lanes: Lanes) -> Result<Answer, Refusal> {
        let of_shard = self.shard(request.shard).map_err(internal)?;
        Ok(Answer { info: self.describe(&of_shard, request, version), lanes, stream: None, of_shard })
    }

    /// What the node tells about a shard.
    fn describe(&self, shard: &ServerShard, request: &SyncRequest, version: u16) -> ShardInfo {
        let manifest = self.directory.manifest();
        let topology = shard.target.as_ref().map(|target| target.topology()).unwrap_or_default();
        ShardInfo {
            version,
            cluster: manifest.cluster,
            node: manifest.node,
            region: manifest.region,
            shard: request.shard,
            shard_count: manifest.shard_count,
            segment_size: manifest.segment_size,
            epoch: if self.role == Role::Leader { self.led } else { manifest.epoch },
            tail: shard.log.tail(),
            head: shard.log.head(),
            session: SessionId::NONE,
            session_kind: SessionKind::None,
            start: Lsn::ZERO,
            target: Lsn::ZERO,
            start_segment: Lsn::ZERO,
            start_offset: 0,
            heartbeat_ms: millis(self.options.heartbeat),
            timeout_ms: millis(self.options.peer_timeout),
            key_len: topology.key_len,
            value_len: topology.value_len,
            prefix_bits: topology.prefix_bits,
        }
    }

    /// Checks that the follower is one of this log at all, asks it where the logs part if they do, and has the shard's
    /// host decide how it goes on. A follower that is to cut its log stands where it will then stand: `request` is
    /// changed to that.
    fn start_following(
        &self,
        request: &mut SyncRequest,
        version: u16,
        (sender, receiver): (&mut dyn FrameSender, &mut dyn FrameReceiver),
        peer: &str,
        signals: &StreamSignals,
    ) -> Result<Answer, Refusal> {
        self.check_follower(request, version)?;
        self.wait_until_feeding(request.shard, signals)?;
        let shard = self.shard(request.shard).map_err(internal)?;
        let parting = ask_where_logs_part(&shard.log, request, version, sender, receiver).map_err(|error| {
            let violates = matches!(error, Error::Protocol { .. });
            Refusal(if violates { RefusalCode::ProtocolViolation } else { RefusalCode::Internal }, error.to_string())
        })?;
        let admitted = shard.host.admit(request, (&shard.log, parting.as_ref()), peer, signals)?;
        if let (Some(cut), Some(place)) = (admitted.session.cut, admitted.place) {
            request.received = cut;
            request.durable = request.durable.min(cut);
            request.applied = request.applied.min(cut);
            request.chain = place.chain;
        }
        let request = &*request;
        let answer = match (admitted.session.kind, admitted.place) {
            (Recovery::Rebuild, _) | (_, None) => self.start_rebuild(&shard, &admitted, request, version),
            (kind, Some(place)) => Ok(Answer {
                info: ShardInfo {
                    epoch: admitted.session.epoch,
                    session: admitted.session.id,
                    session_kind: if kind == Recovery::KeepUp { SessionKind::KeepUp } else { SessionKind::CatchUp },
                    start: request.received.next(),
                    target: admitted.session.target,
                    start_segment: place.segment,
                    start_offset: place.offset,
                    ..self.describe(&shard, request, version)
                },
                lanes: Lanes::Log(place),
                stream: Some(admitted.stream),
                of_shard: Arc::clone(&shard),
            }),
        };
        // Before it is answered: whoever has the answer is a follower.
        let marks = || shard.commits.acknowledged().follower(request.node, &signals.over).map_err(internal);
        let answer = answer.and_then(|answer| marks().map(|_| answer));
        answer.inspect_err(|_| shard.host.stream_ended(admitted.stream))
    }

    /// Begins a rebuild that the shard's host has issued: the follower gets a base and the log after it. Without a base
    /// to give, the session fails and the follower is told what is retained.
    fn start_rebuild(
        &self,
        shard: &Arc<ServerShard>,
        admitted: &Admitted,
        request: &SyncRequest,
        version: u16,
    ) -> Result<Answer, Refusal> {
        let Some(store) = shard.target.clone() else {
            shard.host.decline(admitted.stream, FailureReason::BaseUnavailable);
            return Err(shard.host.not_retained(request, shard.log.tail(), shard.log.head()));
        };
        let goes_on = rebuild_goes_on(request, admitted.place);
        // Otherwise the reader gets its place when the base is open.
        let anew = || shard.log.segment_start_for(shard.log.head().next()).map_err(internal);
        let place = goes_on.map_or_else(anew, Ok)?;
        Ok(Answer {
            info: ShardInfo {
                epoch: admitted.session.epoch,
                session: admitted.session.id,
                session_kind: SessionKind::Rebuild,
                target: admitted.session.target,
                start: goes_on.map_or(Lsn::ZERO, |place| place.lsn.next()),
                start_segment: goes_on.map_or(Lsn::ZERO, |place| place.segment),
                start_offset: goes_on.map_or(0, |place| place.offset),
                ..self.describe(shard, request, version)
            },
            lanes: Lanes::Rebuild(shard.log.reader_at_known(place), goes_on, store),
            stream: Some(admitted.stream),
            of_shard: Arc::clone(shard),
        })
    }

    /// Whether the follower can follow this node and this log, wherever it stands.
    fn check_follower(&self, request: &SyncRequest, version: u16) -> Result<(), Refusal> {
        let manifest = self.directory.manifest();
        let asked = (request.shard_count, request.segment_size, request.region);
        let own = (manifest.shard_count, manifest.segment_size, manifest.region);
        if asked != own {
            return Err(Refusal(
                RefusalCode::WrongTopology,
                format!(
                    "this node has {} shards, segments of {} bytes, region {}; you have {}, {} and {}; \
                     start with an empty directory",
                    own.0, own.1, own.2, asked.0, asked.1, asked.2
                ),
            ));
        }
        if request.node == manifest.node || request.node.0 == 0 {
            return Err(Refusal(
                RefusalCode::WrongTopology,
                format!(
                    "node id {} is this node's own or not assigned; give the follower one of its own",
                    request.node
                ),
            ));
        }
        takes_log(version)?;
        // Who cannot follow this node deposes nobody.
        if self.shard(request.shard).map_err(internal)?.host.may_follow(request.node) {
            self.check_epoch(request.epoch)?;
        }
        Ok(())
    }

    /// A follower has agreed with its own leader before it feeds others.
    fn wait_until_feeding(&self, shard: ShardId, signals: &StreamSignals) -> Result<(), Refusal> {
        // The one that asks waits no longer than a handshake may take. It may be gone by then, which nothing tells
        // here.
        let deadline = Instant::now().checked_add((self.options.handshake_timeout / 2).min(MOST_WAITED_FOR));
        let host = Arc::clone(&self.shard(shard).map_err(internal)?.host);
        host.wait_until_feeding(deadline, [signals.over.until(), self.draining.until()])
    }

    /// A leader that learns of a newer epoch is deposed: nothing is appended any more, and its streams end. What a
    /// follower makes of one is for the shard's host to say.
    fn check_epoch(&self, epoch: Epoch) -> Result<(), Refusal> {
        if !epoch.has_successor() {
            return Err(Refusal(RefusalCode::ProtocolViolation, format!("epoch {epoch} has no successor")));
        }
        if self.role == Role::Follower {
            return Ok(());
        }
        if epoch > self.led {
            self.depose(epoch).map_err(internal)?;
        }
        self.check_deposed()
    }

    /// A leader steps down before a newer epoch than it leads under.
    pub(crate) fn depose(&self, epoch: Epoch) -> Result<()> {
        // So that it does not lead again under its old epoch after a restart. One that is older than another seen is
        // nothing new.
        match self.directory.accept_epoch(epoch) {
            Ok(()) | Err(Error::StaleEpoch { .. }) => {}
            Err(error) => return Err(error),
        }
        for shard in self.all_shards() {
            shard.log.depose(self.led, epoch);
            // Shippers to those who only read the log notice by themselves.
            shard.host.streams().iter().for_each(ShutdownSignal::shutdown);
        }
        Ok(())
    }

    /// The epoch that it leads under.
    pub(crate) fn led(&self) -> Epoch {
        self.led
    }

    fn check_deposed(&self) -> Result<(), Refusal> {
        let newest = self.directory.manifest().epoch;
        if self.role != Role::Leader || newest == self.led {
            return Ok(());
        }
        let led = self.led;
        let reason = format!("epoch {newest} has been seen, and this node leads under {led}: it is deposed");
        Err(Refusal(RefusalCode::StaleEpoch, reason))
    }

    fn start_tail(&self, request: &SyncRequest, version: u16) -> Result<Answer, Refusal> {
        self.check_deposed()?;
        let shard = self.shard(request.shard).map_err(internal)?;
        let log = &shard.log;
        takes_log(version)?;
        let from = if request.from == Lsn::ZERO { log.tail() } else { request.from };
        // A reader has nothing of the log that a compact batch could lean on.
        let place = log.plain_position_before(from);
        let place = place.map_err(|error| Refusal(RefusalCode::NotRetained, error.to_string()))?;
        let info = self.describe(&shard, request, version);
        let info = ShardInfo {
            start: place.lsn.next(),
            target: info.head,
            start_segment: place.segment,
            start_offset: place.offset,
            ..info
        };
        Ok(Answer { info, lanes: Lanes::Log(place), stream: None, of_shard: shard })
    }

    fn answer_status(&self, sender: &mut dyn FrameSender) -> Result<()> {
        let bytes = self.status().encode();
        if bytes.len() as u64 > u64::from(MAX_STATUS_LEN) {
            refuse(sender, Refusal(RefusalCode::Internal, "the status does not fit in a frame".to_owned()));
            return Ok(());
        }
        sender.send(FrameKind::Status, 0, &[], Body::Bytes(&bytes))
    }

    /// The node's own target took no more: nothing is applied behind it, and whoever appends must know.
    pub(crate) fn applying_failed(&self, shard: ShardId, error: &Error) {
        if let Ok(shard) = self.shard(shard) {
            shard.log.stop_for(error);
        }
    }

    /// Takes a follower out of every shard, and what is known of it out of the directory.
    pub(crate) fn forget_follower(&self, node: NodeId) -> Result<()> {
        let Some(shard) = self.all_shards().next() else { return Ok(()) };
        // First, so that one that asks again from here on is a new one, on stable storage like any other.
        let forgotten = shard.host.retention().registry().retain(|known| known != node);
        for shard in self.all_shards() {
            // Its stream is over before its marks go: then it cannot bring them back.
            shard.host.forget(node, || shard.commits.acknowledged().forget(node));
            shard.host.retention().poke();
        }
        forgotten
    }

    /// A name that no other shipper waits under.
    fn waiter_name(&self) -> WaiterName {
        WaiterName(self.shippers.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// What the node says about itself now.
    pub(crate) fn status(&self) -> Status {
        Status::collect(self.role, self.directory.manifest(), self.started.elapsed(), self.all_shards())
    }

    /// Stops in two steps: shippers send what is pending and their followers acknowledge it, for no longer than the
    /// drain time-out; then every socket is closed.
    pub(crate) fn drain(&self) {
        let deadline = Instant::now().checked_add(self.options.drain_timeout);
        self.draining.shutdown();
        for over in self.all_shards().flat_map(|shard| shard.host.streams()) {
            let _ =
                over.wait_timeout(deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now())));
        }
        self.stop.shutdown();
    }
}

/// Says how a connection ended.
#[inline(never)]
fn say_how_it_ended(server: &Server, peer: &str, result: &Result<()>) {
    let (level, how) = match result {
        Ok(()) => (log::Level::Debug, &"it left" as &dyn std::fmt::Display),
        Err(error) if server.stop.is_shutdown() => (log::Level::Debug, error as _),
        Err(error) if is_closed_by_peer(error) => (log::Level::Info, error as _),
        Err(error) => (log::Level::Warn, error as _),
    };
    log::log!(level, "{peer}: {how}");
}

/// Whoever takes in or reads a log of this node must know what its segments hold.
fn takes_log(version: u16) -> Result<(), Refusal> {
    if version >= ProtocolVersion::V3.to_wire() {
        return Ok(());
    }
    Err(Refusal(
        RefusalCode::UnsupportedVersion,
        format!(
            "this node's log has segments of version {SEGMENT_VERSION}, which came with protocol version {}; you speak up to \
             {version}; update that side first",
            ProtocolVersion::V3.to_wire()
        ),
    ))
}

fn internal(error: Error) -> Refusal {
    Refusal(RefusalCode::Internal, error.to_string())
}

/// Tells the peer why, as well as may be: it may be gone.
fn refuse(sender: &mut dyn FrameSender, Refusal(code, text): Refusal) {
    let _ = sender.send_message(&Message::Error(ErrorMessage { code, text }));
    let _ = sender.finish();
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
