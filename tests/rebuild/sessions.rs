//! Sessions: what makes a follower count, and what ends one before that.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use towline::protocol::{FailureReason, Millis, Reason, SessionLimits};
use towline::rebuild::RebuildPhase;
use towline::target::{FixedStore, ReplicationTarget};
use towline::transport::{Connection, TcpOptions, TcpTransport};
use towline::wire::{
    Ack, FrameKind, Message, SessionAck, SessionAction, SessionControl, SessionFailure, SessionKind, SessionPhase,
    ShardInfo,
};
use towline::{AckLevel, Epoch, Lsn, NodeBuilder, Outcome, SessionId};

use crate::common::raw::{chain_at, follow_request, next_data, read_to_end};
use crate::gates::{Gate, Gated, Point};
use crate::scene::{Load, OPTIONS, PATIENCE, SHARD, Scene, Wire, deadline, over_both, reach};

/// The stream of a follower that has nothing, as node 77, and what the leader has told it: which session, and that it
/// starts.
fn asked_for_a_rebuild(scene: &Scene, wire: &Wire) -> (Connection, ShardInfo, SessionControl) {
    let transport = wire.transport.clone().unwrap_or_else(|| Arc::new(TcpTransport::new(TcpOptions::default())));
    let mut stream = transport.connect(scene.leader.local_address(), PATIENCE).unwrap();
    stream.sender.send_message(&Message::SyncRequest(follow_request(&scene.leader.manifest(), 77, SHARD))).unwrap();
    let Message::ShardInfo(info) = stream.receiver.receive_message().unwrap() else { panic!("a ShardInfo is due") };
    let Message::SessionControl(start) = stream.receiver.receive_message().unwrap() else { panic!("a start is due") };
    (stream, info, start)
}

#[test]
fn neither_acknowledgements_nor_stale_words_make_a_follower_count() {
    over_both(|wire| {
        let scene = Scene::filled(wire);
        let (mut stream, info, start) = asked_for_a_rebuild(&scene, wire);
        assert_eq!((info.session_kind, info.target), (SessionKind::Rebuild, scene.head()));
        assert_eq!((start.action, start.session, start.target), (SessionAction::Start, info.session, info.target));
        assert!(start.log_start <= start.base_lsn.next() && start.log_start > Lsn(1), "{start:?}");
        // What the log lane needs was pinned before the follower was told, and the status speaks of the same session.
        let status = || scene.leader.status().shards.remove(0);
        let pins = status().pins;
        assert_eq!(pins.len(), 1, "{pins:?}");
        assert_eq!((pins[0].owner.as_str(), pins[0].reason.as_str()), ("node 77", "rebuild"));
        assert_eq!((pins[0].lsn, pins[0].lost), (start.log_start, false));
        let session = status().followers[0].session.unwrap();
        assert_eq!((session.id.0, session.kind), (info.session.0, towline::protocol::SessionKind::Rebuild));
        assert_eq!((session.phase, session.target), (towline::protocol::Phase::Issued, info.target));
        let completed = |session, epoch| SessionAck {
            session,
            epoch,
            phase: SessionPhase::Completed,
            achieved: info.target,
            reason: SessionFailure::None,
            blocks: 0,
        };
        let stale = completed(SessionId(info.session.0 - 1), info.epoch);
        stream.sender.send_message(&Message::SessionAck(stale)).unwrap();
        let older = completed(info.session, Epoch(info.epoch.0 - 1));
        stream.sender.send_message(&Message::SessionAck(older)).unwrap();
        let marks = info.target;
        let ack = Ack {
            received: marks,
            durable: marks,
            applied: marks,
            chain: scene.leader.log(SHARD).unwrap().position_before(marks.next()).unwrap().chain,
            epoch: info.epoch,
            session: info.session,
        };
        stream.sender.send_message(&Message::Ack(ack)).unwrap();
        let commits = scene.leader.commits(SHARD).unwrap();
        let taken_in = || commits.followers().first().is_some_and(|marks| marks.at(AckLevel::Applied) == info.target);
        while !taken_in() {
            std::thread::yield_now();
        }
        assert!(!commits.followers()[0].counts());
        let outcome = commits.wait(Lsn(1), "received:1".parse().unwrap(), Some(Instant::now()));
        assert_eq!(outcome, Outcome::TimedOut);
        // A word about this very session, from a follower that cannot have reached what it says: the stream ends.
        let lie = SessionAck { achieved: Lsn(1), ..completed(info.session, info.epoch) };
        stream.sender.send_message(&Message::SessionAck(lie)).unwrap();
        while stream.receiver.receive_header().is_ok_and(|header| {
            let mut body = vec![0; usize::try_from(header.len).unwrap()];
            stream.receiver.receive_exact(&mut body).is_ok()
        }) {}
        assert!(!commits.followers()[0].counts());
        let deadline = Instant::now() + PATIENCE;
        while !status().pins.is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(status().pins, []);
        let session = status().followers[0].session.unwrap();
        assert_eq!(session.phase, towline::protocol::Phase::Failed);
    });
}

#[test]
fn a_follower_whose_acknowledgements_overtake_its_last_word_counts() {
    over_both(|wire| {
        let scene = Scene::filled(wire);
        let (mut stream, info, _) = asked_for_a_rebuild(&scene, wire);
        let word = |phase| {
            let (session, epoch, achieved) = (info.session, info.epoch, info.target);
            Message::SessionAck(SessionAck { session, epoch, phase, achieved, reason: SessionFailure::None, blocks: 0 })
        };
        stream.sender.send_message(&word(SessionPhase::Accepted)).unwrap();
        receive_until(&mut stream, FrameKind::BaseComplete);
        for key in 0..1500 {
            scene.put(key, &[b'b'; 90]);
        }
        let log = scene.leader.log(SHARD).unwrap();
        let applied = log.head();
        let chain = chain_at(log, applied);
        // What is sent is there before it is given up.
        let end = log.position_before(applied.next()).unwrap();
        while {
            let (place, bytes) = next_data(&mut stream).unwrap();
            (place.segment, place.offset + bytes.len() as u64) != (end.segment, end.offset)
        } {}
        let (epoch, session) = (info.epoch, info.session);
        let ack = Ack { received: applied, durable: applied, applied, chain, epoch, session };
        stream.sender.send_message(&Message::Ack(ack)).unwrap();
        let commits = scene.leader.commits(SHARD).unwrap();
        let taken_in = || commits.followers().first().is_some_and(|marks| marks.at(AckLevel::Applied) == applied);
        while !taken_in() {
            std::thread::yield_now();
        }
        scene.trim();
        assert!(log.tail() > info.target.next());
        stream.sender.send_message(&word(SessionPhase::Completed)).unwrap();
        receive_until(&mut stream, FrameKind::SessionControl);
        assert!(commits.followers()[0].counts());
        let session = scene.leader.status().shards.remove(0).followers[0].session.unwrap();
        assert_eq!((session.kind, session.target), (towline::protocol::SessionKind::KeepUp, applied));
    });
}

#[test]
fn a_leader_that_stops_leaves_whoever_has_not_taken_a_rebuild_on() {
    over_both(|wire| {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(FixedStore::open(directory.path().join("leader-store"), &OPTIONS).unwrap());
        // However long it may wait for what is pending, and for a word of the follower: nothing is pending.
        let patient = |builder: NodeBuilder| builder.drain_timeout(PATIENCE * 10).peer_timeout(PATIENCE * 10);
        let scene = Scene::with(wire, directory, store, patient);
        for key in 0..1500 {
            scene.put(key, &[b'a'; 90]);
        }
        scene.trim();
        let (mut stream, _, start) = asked_for_a_rebuild(&scene, wire);
        assert_eq!(start.action, SessionAction::Start);
        stream.receiver.set_timeout(Some(PATIENCE)).unwrap();
        let Scene { leader, writer, .. } = scene;
        drop(writer);
        std::thread::scope(|scope| {
            let stopping = scope.spawn(|| leader.shutdown());
            let end = read_to_end(&mut stream);
            // Nor does it wait for whoever makes room to leave.
            stopping.join().unwrap().unwrap();
            drop(stream);
            assert!(!matches!(end, towline::Error::Refused { .. }), "{end}");
        });
    });
}

/// Reads frames up to one of a kind.
fn receive_until(stream: &mut Connection, wanted: FrameKind) {
    loop {
        let header = stream.receiver.receive_header().unwrap();
        let mut body = vec![0; usize::try_from(header.len).unwrap()];
        stream.receiver.receive_exact(&mut body).unwrap();
        if header.kind == wanted {
            return;
        }
    }
}

/// A leader whose sessions may take so long and no longer, and what it has published about failures.
fn limited(
    wire: &Wire,
    deadline_ms: Millis,
    stall_ms: Millis,
) -> (Scene, Arc<towline::Watermark>, Receiver<FailureReason>) {
    let (publish, published) = channel();
    let limits =
        SessionLimits { catch_up_deadline_ms: NEVER, rebuild_deadline_ms: deadline_ms, stall_budget_ms: stall_ms };
    let (scene, allowed) = Scene::doled(wire, 1500, |builder| {
        builder.session_limits(limits).on_projection(move |projection| {
            for follower in &projection.replicas {
                if let Some(Reason::Failed(reason)) = follower.reason {
                    let _ = publish.send(reason);
                }
            }
        })
    });
    (scene, allowed, published)
}

const NEVER: Millis = Millis(1 << 40);

#[test]
fn a_rebuild_that_stalls_or_takes_too_long_fails_and_a_later_one_completes() {
    over_both(|wire| {
        let cases = [
            (Millis(100), NEVER, FailureReason::DeadlineExceeded),
            (NEVER, Millis(100), FailureReason::ProgressStalled),
        ];
        for (deadline_ms, stall_ms, reason) in cases {
            let (scene, allowed, published) = limited(wire, deadline_ms, stall_ms);
            let store = scene.open_store("follower");
            let follower = scene.follow("follower", store.clone());
            // The base never comes.
            assert_eq!(published.recv_timeout(PATIENCE), Ok(reason));
            // On a busy machine the first session may have failed before it was taken on.
            crate::common::until("it is taken on", || store.is_rebuilding(SHARD).unwrap());
            assert!(store.get(&1u64.to_be_bytes()).is_err());
            assert_eq!(follower.applied(SHARD).unwrap().load(), Lsn::ZERO);
            allowed.advance(Lsn::MAX);
            let scene = scene.restart(|builder| builder);
            reach(follower.applied(SHARD).unwrap(), scene.head());
            scene.stop_and_compare(vec![("follower", follower, store)]);
        }
    });
}

#[test]
fn a_rebuild_that_loses_its_pin_fails_and_the_facts_begin_another() {
    over_both(|wire| {
        let (publish, published) = channel();
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(FixedStore::open(directory.path().join("leader-store"), &OPTIONS).unwrap());
        let scene = Scene::with(wire, directory, store, |builder| {
            builder.max_wal_bytes(BOUND).min_wal_bytes(0).on_projection(move |projection| {
                for follower in &projection.replicas {
                    let _ = publish.send((follower.reason, follower.kind, follower.session));
                }
            })
        });
        let fill = |rounds: u64| {
            for key in 0..rounds * 1000 {
                scene.put(key % 3000, &[b'a'; 90]);
                if key % 500 == 499 {
                    scene.leader.log(SHARD).unwrap().wait_synced(scene.head(), deadline()).unwrap();
                }
            }
        };
        fill(3);
        scene.trim();
        let tail = scene.leader.log(SHARD).unwrap().tail();
        // It takes the session on, and then nothing of the log.
        let gate = Gate::at(Point::Record, 5);
        let inner = scene.open_store("follower");
        let target = Gated { inner: inner.clone(), gate: Arc::clone(&gate), tells: true };
        let load = Load::on(&scene);
        let follower = scene.follow("follower", Arc::new(target));
        reach(&gate.reached, Lsn(1));
        drop(load);
        fill(20);
        let lost = loop {
            let (reason, kind, session) = published.recv_timeout(PATIENCE).unwrap();
            if reason == Some(Reason::Failed(FailureReason::PinLost)) {
                assert_eq!(kind, Some(towline::protocol::SessionKind::Rebuild));
                break session.unwrap();
            }
        };
        assert!(inner.is_rebuilding(SHARD).unwrap());
        gate.open_for_good();
        reach(follower.applied(SHARD).unwrap(), scene.head());
        assert!(!inner.is_rebuilding(SHARD).unwrap());
        assert_eq!(follower.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Completed);
        assert!(follower.rebuild_progress(SHARD).unwrap().session.0 > lost.0, "it was another session");
        scene.stop_and_compare_from(tail, vec![("follower", follower, inner)]);
    });
}

/// Bytes of log that the leader keeps at most.
const BOUND: u64 = 12 * 64 * 1024;
