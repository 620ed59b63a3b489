//! Admission: a follower asks to follow, the engine decides, and the answer is made.
//!
//! A follower's request tells where its log ends. Where the leader's log does not hold that point, the server first
//! finds out where the two part (see [`parting`](crate::parting)); the engine then decides by what both sides have
//! shown.

use std::sync::Arc;
use std::time::Duration;

use super::{Host, Member, Open, State, StreamKey};
use crate::error::{Error, RefusalCode};
use crate::parting::Parting;
use crate::protocol::{
    Event, FailureReason, FollowerFacts, LeaderFacts, Refusal, ReplicaInfo, Session, SessionKind, SyncAck,
};
use crate::registry::Known;
use crate::shutdown::ShutdownSignal;
use crate::types::{Epoch, Lsn, NodeId};
use crate::wal::{Log, LogPosition, unix_ms};
use crate::wire::SyncRequest;

/// How long a stream that a newer one replaces may take to tell its follower. Only a peer that reads nothing needs more
/// than a moment, and is then told nothing.
const FAREWELL: Duration = Duration::from_millis(250);

/// How often a follower is decided about that needs log which is given up while that is done.
const MOST_LOOKS: usize = 3;

/// A follower that is served from now on.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) stream: StreamKey,
    /// The session, as issued.
    pub(crate) session: Session,
    /// Where its log goes on in the leader's.
    pub(crate) place: Option<LogPosition>,
}

/// A follower that is not served: what it is told.
#[derive(Debug)]
pub(crate) struct Declined(pub(crate) RefusalCode, pub(crate) String);

/// What the leader's log had when a follower was decided about.
struct Looked {
    /// Where the follower's log goes on in it.
    place: Option<LogPosition>,
    tail: Lsn,
    head: Lsn,
}

/// The signals of one stream.
#[derive(Clone)]
pub(crate) struct StreamSignals {
    /// The stream is over; its socket is closed.
    pub(crate) over: ShutdownSignal,
    /// A newer stream of the same follower takes over: the shipper tells the follower and leaves.
    pub(crate) superseded: ShutdownSignal,
}

impl Host {
    /// Decides about a follower that asks to follow on a stream with these signals. `parting` is where its log parts
    /// from `log`, if that was found out; nobody is admitted whose log was compared with another than the present one.
    /// What is decided holds until [`stream_ended`](Self::stream_ended), which
    /// the caller owes.
    ///
    /// An older stream of the follower is over when this returns.
    pub(crate) fn admit(
        &self,
        request: &SyncRequest,
        (log, parting): (&Arc<Log>, Option<&Parting>),
        endpoint: &str,
        signals: &StreamSignals,
    ) -> Result<Admitted, Declined> {
        let mut state = self.state.lock();
        if !state.feeds() || !Arc::ptr_eq(log, &state.log) {
            return Err(self.feeds_nobody());
        }
        self.check_has_met(&state, request)?;
        self.check_ring(&state, request.node)?;
        let before = state.member(request.node).and_then(|member| member.stream.take());
        let admitted = self.admit_locked(&mut state, request, parting, endpoint, (signals, before.as_ref()));
        drop(state);
        self.settle();
        if let Some(before) = before
            && !before.signals.over.wait_timeout(FAREWELL)
        {
            before.signals.over.shutdown();
        }
        admitted
    }

    fn admit_locked(
        &self,
        state: &mut State,
        request: &SyncRequest,
        parting: Option<&Parting>,
        endpoint: &str,
        (signals, before): (&StreamSignals, Option<&Open>),
    ) -> Result<Admitted, Declined> {
        let node = request.node;
        self.end_stream_before(state, node, before);
        let known = self.make_member(state, node, endpoint)?;
        let mut looked = self.look(state, &known, request, parting);
        for _ in 1..MOST_LOOKS {
            if !state.has_lost_pin(node) {
                break;
            }
            // Retention, which waits for nobody, came between the look and the pin: what it has left decides.
            looked = self.look(state, &known, request, parting);
        }
        let Looked { place, tail, head } = looked;
        let refusal = state.engine.replica(node).and_then(|replica| replica.refusal);
        let session = state.engine.session(node).filter(|_| refusal.is_none());
        let Some(session) = session.filter(|session| session.phase.is_live()) else {
            if refusal.is_none() && state.has_lost_pin(node) {
                let text =
                    format!("the log of shard {} is given up faster than you can be admitted; ask again", self.shard);
                return Err(Declined(RefusalCode::Internal, text));
            }
            return Err(self.declined(refusal, request, parting, (tail, head)));
        };
        let common = parting.and_then(|parting| parting.common);
        let place = session.cut.map_or(place, |_| common);
        if session.kind == SessionKind::Rebuild {
            // Until it is known where its log begins, it needs none, unless it can go on with what it has.
            known.set_lost_place(self.shard, rebuild_goes_on(request, place).is_none());
        } else if place.is_none() {
            // An empty log that began with another chain than this one.
            self.fail_session(state, node, FailureReason::LocalWalCorrupt);
            return Err(self.declined(Some(Refusal::Diverged), request, parting, (tail, head)));
        }
        state.streams += 1;
        let stream = StreamKey { node, id: state.streams };
        if let Some(member) = state.member(node) {
            member.stream = Some(Open { id: stream.id, signals: signals.clone() });
        }
        self.report_connected(state);
        Ok(Admitted { stream, session, place })
    }

    /// Looks where the follower stands in the log, and has the engine decide by that.
    fn look(&self, state: &mut State, known: &Known, request: &SyncRequest, parting: Option<&Parting>) -> Looked {
        // Looked up before the tail is: where log is released meanwhile, a place that is not found is before the tail.
        let place = state.log.position_after(request.received, request.chain).ok().flatten();
        // Retention says what is given up before it removes the files of that, one after the other.
        let (tail, head) = (state.log.tail().max(self.retention.tail()), state.log.head());
        // A file that goes is no place to begin at.
        let place = place.filter(|place| place.segment >= tail);
        let common = parting.and_then(|parting| parting.common);
        let durable = request.durable.min(request.received);
        // What is behind the common point is no position in this log.
        let shared = common.map_or(Lsn::MAX, |place| place.lsn);
        let base_incomplete = request.flags & SyncRequest::BASE_INCOMPLETE != 0;
        // What half a base has applied is nobody's state. A rebuild that goes on with its log needs what follows in it.
        let applied = if base_incomplete { durable } else { request.applied };
        known.note(self.shard, durable.min(shared), applied.min(shared), unix_ms());
        known.set_lost_place(self.shard, known.position(self.shard).next() < tail);
        let facts = SyncAck {
            epoch: state.assignment.epoch,
            replica: request.node,
            follower: FollowerFacts {
                received: request.received,
                durable,
                applied: request.applied,
                committed: Lsn::ZERO,
                chain: request.chain,
                tail_epoch: match parting {
                    Some(parting) => parting.tail_epoch,
                    None if request.received == Lsn::ZERO => Epoch::ZERO,
                    // Nobody asked: the log is a beginning of this one, and its epoch decides nothing; or the follower
                    // speaks version 1. What it has accepted is at least the epoch of its newest record: with that
                    // bound it can be refused where it would have been rebuilt, and never loses anything.
                    None => request.epoch,
                },
                base_incomplete,
            },
            leader: LeaderFacts {
                tail,
                head,
                chain_at_received: place.map(|_| request.chain),
                common: common.map(|place| place.lsn),
                // Nor is one to cut a log for.
                cut_possible: parting.is_some_and(|parting| parting.cut_possible)
                    && common.is_some_and(|place| place.segment >= tail),
                is_relay: state.is_relay(),
            },
        };
        self.apply(state, &Event::SyncAckReceived(facts));
        Looked { place, tail, head }
    }

    /// The follower as a member of the assignment; one that is new is remembered first, for good.
    fn make_member(&self, state: &mut State, node: NodeId, endpoint: &str) -> Result<Arc<Known>, Declined> {
        if let Some(member) = state.member(node) {
            return Ok(Arc::clone(&member.known));
        }
        if self.settings.members.as_ref().is_some_and(|members| !members.contains(&node)) {
            return Err(Declined(
                RefusalCode::WrongTopology,
                format!("node {node} is not among the followers that this node was told to have"),
            ));
        }
        let full =
            |error: &Error| if error.is_permanent() { RefusalCode::TooManyConnections } else { RefusalCode::Internal };
        let known = self.retention.registry().add(node);
        let known = known.map_err(|error| Declined(full(&error), error.to_string()))?;
        state.assignment.replicas.push(ReplicaInfo { node, endpoint: endpoint.to_owned() });
        // Not looked up again: if it is forgotten meanwhile, it stays a member until that comes here, and its stream
        // ends then.
        state.members.push(Member { known: Arc::clone(&known), stream: None, pins: Vec::new() });
        self.deliver_assignment(state);
        Ok(known)
    }

    /// A newer stream takes over: the session of the one before fails, and its follower is told.
    fn end_stream_before(&self, state: &mut State, node: NodeId, before: Option<&Open>) {
        let reason = if before.is_some() { FailureReason::Superseded } else { FailureReason::TransportLost };
        self.fail_session(state, node, reason);
        if let Some(before) = before {
            log::info!("node {node}, shard {}: a newer stream takes over", self.shard);
            before.signals.superseded.shutdown();
        }
    }

    /// What a follower without a session is told.
    fn declined(
        &self,
        refusal: Option<Refusal>,
        request: &SyncRequest,
        parting: Option<&Parting>,
        (tail, head): (Lsn, Lsn),
    ) -> Declined {
        let shard = self.shard;
        match refusal {
            Some(Refusal::LeaderBehind) if head == Lsn::ZERO => Declined(
                RefusalCode::LeaderBehind,
                format!(
                    "shard {shard} of this node is empty, and you have it up to LSN {}: nothing proves that the two were \
                     one log, and nothing is overwritten. Make the node that has the records the leader; or, if nobody \
                     needs them, start yours with an empty directory, or again once this node has more records there",
                    request.received.max(request.applied)
                ),
            ),
            Some(Refusal::LeaderBehind) if request.received > head || request.durable.max(request.applied) > head => {
                Declined(
                    RefusalCode::LeaderBehind,
                    format!(
                        "you have shard {shard} up to LSN {}, but this node only up to {head} under the same epoch: \
                         it has lost data, and nothing is overwritten; make a node with the longer log the leader",
                        request.received.max(request.applied)
                    ),
                )
            }
            // All records are the same: what this log lacks is a batch without any, which seals a segment.
            Some(Refusal::LeaderBehind)
                if parting.and_then(|parting| parting.common).is_some_and(|common| common.lsn == request.received) =>
            {
                Declined(
                    RefusalCode::LeaderBehind,
                    format!(
                        "you have shard {shard} up to LSN {}, as this node has, and behind that the end of a segment, \
                         which this node has not under the same epoch: it has lost data, and nothing is overwritten; \
                         make a node with the longer log the leader",
                        request.received
                    ),
                )
            }
            Some(Refusal::LeaderBehind | Refusal::Diverged) => Declined(
                RefusalCode::Diverged,
                format!(
                    "at LSN {} of shard {shard} your history (chain {:08x}) is not this node's{}; nothing is \
                     overwritten",
                    request.received,
                    request.chain.0,
                    match parting.map(|parting| parting.common) {
                        Some(Some(common)) => format!(", which shares it up to LSN {}", common.lsn),
                        Some(None) => ", and no point is known up to which they are one".to_owned(),
                        None => String::new(),
                    }
                ),
            ),
            Some(Refusal::NewerEpoch) => Declined(
                RefusalCode::StaleEpoch,
                format!("epoch {} has been seen: this node is deposed", request.epoch),
            ),
            Some(Refusal::SessionIdsExhausted) => {
                Declined(RefusalCode::Internal, "this node has no session ids left".to_owned())
            }
            Some(Refusal::RelayBehind) if request.received.max(request.applied) <= head => Declined(
                RefusalCode::NotReady,
                format!(
                    "what you have of shard {shard}, up to LSN {}, cannot be compared with what this node has so far, which is \
                     a follower itself; ask again, or follow the leader",
                    request.received.max(request.applied)
                ),
            ),
            Some(Refusal::RelayBehind) => Declined(
                RefusalCode::NotReady,
                format!(
                    "you have shard {shard} up to LSN {}, and this node, which is a follower itself, only up to {head} so \
                     far; ask again, or follow the leader",
                    request.received.max(request.applied)
                ),
            ),
            None => self.not_retained(request, tail, head),
        }
    }

    /// What a follower is told whose next record is gone, where no base can be given either.
    pub(crate) fn not_retained(&self, request: &SyncRequest, tail: Lsn, head: Lsn) -> Declined {
        Declined(
            RefusalCode::NotRetained,
            format!(
                "LSN {} of shard {} is no longer retained (LSN {tail} to {head} are); start with a copy of a newer state",
                request.received.next(),
                self.shard
            ),
        )
    }
}

impl State {
    /// Whether a follower's session is over because what it needs is given up.
    fn has_lost_pin(&self, node: NodeId) -> bool {
        self.engine.session(node).is_some_and(|session| session.reason == Some(FailureReason::PinLost))
    }
}

/// Where the log of a follower's interrupted rebuild goes on in the leader's, if it is a beginning of that.
pub(crate) fn rebuild_goes_on(request: &SyncRequest, place: Option<LogPosition>) -> Option<LogPosition> {
    let both = SyncRequest::BASE_INCOMPLETE | SyncRequest::REBUILD_KEPT;
    place.filter(|_| request.flags & both == both && request.received > Lsn::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::Commit;
    use crate::host::{Clock, HostSettings};
    use crate::limits::MIN_SEGMENT_SIZE;
    use crate::protocol::{Role, SessionLimits};
    use crate::registry::Registry;
    use crate::retention::{RetentionOptions, ShardRetention};
    use crate::types::{Chain, ClusterId, RegionId, ShardId};
    use crate::wal::{LogIdentity, LogWriter, Wal, WalOptions};
    use crate::watermark::Watermark;
    use crate::wire::{PROTOCOL_VERSIONS, Purpose};

    const SHARD: ShardId = ShardId(0);
    const IDENTITY: LogIdentity =
        LogIdentity { cluster: ClusterId(7), region: RegionId(1), shard: SHARD, segment_size: MIN_SEGMENT_SIZE };
    const FOLLOWER: NodeId = NodeId(2);

    /// A leader's shard with a log of several segments, all of it there.
    struct Scene {
        _directory: tempfile::TempDir,
        wal: Wal,
        _writer: LogWriter,
        retention: Arc<ShardRetention>,
        host: Host,
    }

    impl Scene {
        fn new() -> Scene {
            Scene::of(Role::Leader)
        }

        fn of(role: Role) -> Scene {
            let directory = tempfile::tempdir().unwrap();
            let shard = directory.path().join("shard");
            std::fs::create_dir(&shard).unwrap();
            let (wal, mut writer) = Wal::open(&shard, IDENTITY, WalOptions::default()).unwrap();
            writer.set_epoch(Epoch(1)).unwrap();
            while wal.log().segments().len() < 5 {
                writer.append(&[7; 4096]).unwrap();
            }
            let registry = Arc::new(Registry::open(&directory.path().join("followers"), 1).unwrap());
            let (log, wake) = (Arc::clone(wal.log()), Arc::new(Watermark::default()));
            let options = RetentionOptions::default();
            let retention = Arc::new(ShardRetention::new(Arc::clone(&log), options, registry, None, wake));
            let settings = HostSettings {
                node: NodeId(1),
                limits: SessionLimits::default(),
                commit: Commit::SYNCED,
                members: None,
                first_session: 1,
                on_projection: None,
                clock: Arc::new(Clock::new()),
                is_followable: true,
            };
            let host = Host::new(settings, log, Arc::clone(&retention));
            host.assign(role, Epoch(3));
            Scene { _directory: directory, wal, _writer: writer, retention, host }
        }

        /// The first LSN of each segment but the oldest.
        fn later_segments(&self) -> Vec<Lsn> {
            self.wal.log().segments().iter().map(|segment| segment.id().first_lsn).skip(1).collect()
        }

        /// What a follower asks that has everything up to `lsn`.
        fn request(&self, lsn: Lsn) -> SyncRequest {
            SyncRequest {
                versions: PROTOCOL_VERSIONS,
                purpose: Purpose::Follow,
                cluster: IDENTITY.cluster,
                node: FOLLOWER,
                region: IDENTITY.region,
                shard: SHARD,
                shard_count: 1,
                segment_size: IDENTITY.segment_size,
                epoch: Epoch(1),
                received: lsn,
                durable: lsn,
                applied: lsn,
                chain: self.wal.log().position_before(lsn.next()).unwrap().chain,
                from: Lsn::ZERO,
                flags: 0,
            }
        }

        fn admit(&self, request: &SyncRequest) -> Result<Admitted, Declined> {
            let signals = StreamSignals { over: ShutdownSignal::new(), superseded: ShutdownSignal::new() };
            self.host.admit(request, (self.wal.log(), None), "somewhere", &signals)
        }
    }

    #[test]
    fn whoever_needs_log_whose_files_are_still_going_is_rebuilt() {
        let scene = Scene::new();
        let tail = scene.later_segments()[1];
        scene.retention.give_up_before(tail);
        assert_eq!(scene.wal.log().tail(), Lsn::FIRST, "no file has gone yet");
        let admitted = scene.admit(&scene.request(Lsn(3))).unwrap();
        assert_eq!(admitted.session.kind, SessionKind::Rebuild);
        assert!(scene.host.has_lost_place(FOLLOWER), "nothing is held for it");
        let admitted = scene.admit(&scene.request(tail.previous())).unwrap();
        assert_eq!(admitted.session.kind, SessionKind::CatchUp, "all that it needs stays");
        assert!(!scene.host.has_lost_place(FOLLOWER));
        assert_eq!(admitted.place.unwrap().segment, tail);
    }

    #[test]
    fn no_log_is_cut_to_go_on_in_a_file_that_goes() {
        let scene = Scene::new();
        let (log, tail) = (scene.wal.log(), scene.later_segments()[1]);
        // Before the batch that seals the segment before that.
        let last = log.reader_from(tail.previous()).unwrap().next(u64::MAX).unwrap().unwrap();
        let chain = last.batches().next().unwrap().header.crc;
        let common = log.position_after(tail.previous(), chain).unwrap();
        assert!(common.is_some_and(|place| place.segment < tail), "{common:?}");
        let request = SyncRequest {
            received: tail,
            durable: tail,
            applied: Lsn(1),
            chain: Chain(chain.0 ^ 1),
            ..scene.request(tail.next())
        };
        let parting = Parting { tail_epoch: Epoch(1), common, cut_possible: true };
        let admit = || {
            let signals = StreamSignals { over: ShutdownSignal::new(), superseded: ShutdownSignal::new() };
            scene.host.admit(&request, (scene.wal.log(), Some(&parting)), "somewhere", &signals).unwrap().session
        };
        assert_eq!(admit().cut, Some(tail.previous()), "it is there");
        scene.retention.give_up_before(tail);
        assert_eq!(admit().kind, SessionKind::Rebuild, "what comes next in its log does not");
    }

    /// What breaks: the power of a leader goes before it has synced the end of a segment, and it leads again.
    #[test]
    fn who_has_the_end_of_a_segment_that_the_leader_lost_is_told_so() {
        let scene = Scene::new();
        let (log, head) = (scene.wal.log(), scene.wal.log().head());
        let request = scene.request(head);
        let common = log.position_after(head, request.chain).unwrap();
        let sealed = SyncRequest { epoch: Epoch(3), chain: Chain(request.chain.0 ^ 1), ..request };
        let declined = |common| {
            let parting = Parting { tail_epoch: Epoch(3), common, cut_possible: true };
            let signals = StreamSignals { over: ShutdownSignal::new(), superseded: ShutdownSignal::new() };
            scene.host.admit(&sealed, (log, Some(&parting)), "somewhere", &signals).unwrap_err()
        };
        let Declined(code, text) = declined(common);
        assert_eq!(code, RefusalCode::LeaderBehind, "{text}");
        assert!(text.contains(&format!("up to LSN {head}, as this node has")), "{text}");
        let Declined(code, text) = declined(None);
        assert_eq!(code, RefusalCode::Diverged, "{text}");
    }

    /// What breaks: somebody has the leader forget a follower between its place in the list and its stream.
    #[test]
    fn who_is_forgotten_while_it_is_admitted_is_served_no_more() {
        let scene = Scene::new();
        let (request, registry) = (scene.request(Lsn(3)), scene.retention.registry());
        for round in 0..100 {
            let signals = StreamSignals { over: ShutdownSignal::new(), superseded: ShutdownSignal::new() };
            let admitted = std::thread::scope(|scope| {
                let forgets = scope.spawn(|| {
                    while registry.followers().is_empty() {
                        std::hint::spin_loop();
                    }
                    // Comes as soon as the list is saved.
                    registry.save().unwrap();
                    registry.retain(|_| false).unwrap();
                    scene.host.forget(FOLLOWER, || {});
                });
                let admitted = scene.host.admit(&request, (scene.wal.log(), None), "somewhere", &signals);
                forgets.join().unwrap();
                admitted
            });
            assert!(admitted.is_err() || signals.over.is_shutdown(), "round {round}");
            assert!(scene.host.streams().is_empty(), "round {round}");
        }
    }

    #[test]
    fn a_relay_feeds_while_it_has_caught_up_and_is_whole_under_the_epoch_in_force() {
        let scene = Scene::of(Role::Follower);
        let (host, request) = (&scene.host, scene.request(Lsn(3)));
        let feeds = || match scene.admit(&request) {
            Ok(admitted) => {
                assert_eq!(admitted.session.epoch, Epoch(3));
                true
            }
            Err(Declined(code, text)) => {
                assert_eq!(code, RefusalCode::NotReady, "{text}");
                false
            }
        };
        assert!(!feeds(), "it has met nobody yet");
        host.set_caught_up(Epoch(2), true);
        assert!(!feeds(), "under an epoch that is over");
        host.set_caught_up(Epoch(3), false);
        assert!(!feeds(), "its target is being rebuilt");
        host.set_whole();
        assert!(feeds());
        host.withdraw();
        assert!(!feeds());
        // Whoever completes the rebuild may come between the look at the target and the word about it.
        host.set_whole();
        host.set_caught_up(Epoch(3), false);
        assert!(feeds());
        host.assign(Role::Follower, Epoch(2));
        assert!(feeds(), "one that accepted an older epoch comes late");
        let has_led = |epoch| SyncRequest { epoch, flags: SyncRequest::HAS_LED, ..request };
        assert!(scene.admit(&has_led(Epoch(2))).is_ok());
        for newer in [has_led(Epoch(3)), SyncRequest { epoch: Epoch(4), ..request }] {
            let declined = scene.admit(&newer).unwrap_err();
            assert_eq!(declined.0, RefusalCode::NotReady, "the node has accepted what this shard has yet to hear of");
        }
        host.set_upstream(FOLLOWER);
        assert!(!feeds(), "the one that it follows itself");
        host.set_upstream(NodeId(9));
        let another = Scene::of(Role::Follower);
        let signals = StreamSignals { over: ShutdownSignal::new(), superseded: ShutdownSignal::new() };
        let compared_with_another = host.admit(&request, (another.wal.log(), None), "somewhere", &signals);
        assert!(compared_with_another.is_err_and(|declined| declined.0 == RefusalCode::NotReady));
        assert!(host.admit(&request, (scene.wal.log(), None), "somewhere", &signals).is_ok());
        host.assign(Role::Follower, Epoch(4));
        assert!(signals.over.is_shutdown() && !feeds(), "everybody comes again under a newer epoch");
    }

    #[test]
    fn who_withdraws_waits_until_nobody_reads_a_base() {
        let scene = Scene::of(Role::Follower);
        scene.host.set_caught_up(Epoch(3), true);
        let tail = scene.later_segments()[1];
        scene.retention.give_up_before(tail);
        let admitted = scene.admit(&scene.request(Lsn(3))).unwrap();
        assert_eq!(admitted.session.kind, SessionKind::Rebuild);
        let pin = || scene.host.pin_rebuild(admitted.stream, admitted.session.id.0, Some(tail));
        let (first, open) = pin().unwrap();
        assert_eq!(first, tail);
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                scene.host.withdraw();
                done.send(()).unwrap();
            });
            assert!(is_done.recv_timeout(Duration::from_millis(30)).is_err(), "somebody reads");
            while pin().is_ok() {
                std::thread::yield_now();
            }
            assert!(matches!(pin(), Err(Error::ShutDown)), "nobody begins to");
            drop(open);
            is_done.recv().unwrap();
        });
    }

    #[test]
    fn nobody_is_refused_for_good_because_log_goes_while_it_is_decided_about() {
        let scene = Scene::new();
        *scene.retention.given_up_before_pins.lock() = vec![Lsn(9)];
        let admitted = scene.admit(&scene.request(Lsn(3))).unwrap();
        assert_eq!(admitted.session.kind, SessionKind::Rebuild, "what is left decides");
        assert!(scene.host.has_lost_place(FOLLOWER));
    }
}
