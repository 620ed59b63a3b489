//! What the protocol engine takes for each event of a leader with three followers that keep up: acknowledgements, which
//! come with every batch, progress of sessions, and a follower that leaves and comes back, which decides anew.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use towline::protocol::{
    Assignment, Command, Engine, Event, FailureReason, FollowerFacts, LeaderFacts, Millis, ReadinessObserved,
    ReplicaInfo, Role, SessionLimits, Settings, SyncAck, Verdict,
};
use towline::{Chain, Epoch, Lsn, NodeId, SessionId, ShardId};

const EPOCH: Epoch = Epoch(1);
const FOLLOWERS: [NodeId; 3] = [NodeId(2), NodeId(3), NodeId(4)];

/// A follower whose marks all stand where the leader's do.
fn ack(replica: NodeId, at: Lsn) -> Event {
    Event::SyncAckReceived(SyncAck {
        epoch: EPOCH,
        replica,
        follower: FollowerFacts {
            received: at,
            durable: at,
            applied: at,
            chain: Chain(7),
            tail_epoch: EPOCH,
            ..FollowerFacts::default()
        },
        leader: LeaderFacts { tail: Lsn(1), head: at, chain_at_received: Some(Chain(7)), ..LeaderFacts::default() },
    })
}

/// An engine whose followers all keep up at LSN 1.
fn steady() -> (Engine, Vec<Command>) {
    let settings =
        Settings { shard: ShardId(0), node: NodeId(1), first_session: SessionId(1), limits: SessionLimits::default() };
    let (mut engine, mut commands) = (Engine::new(settings), Vec::new());
    let replicas = FOLLOWERS.map(|node| ReplicaInfo { node, endpoint: String::new() }).to_vec();
    let assignment = Assignment { epoch: EPOCH, role: Role::Leader, replicas, commit_followers: 1 };
    let ready = ReadinessObserved {
        epoch: EPOCH,
        role_applied: Some(true),
        receiver_ready: None,
        shipper_configured: Some(true),
        shipper_connected: Some(true),
    };
    let events = [Event::AssignmentDelivered(assignment), Event::ReadinessObserved(ready)];
    for event in events.into_iter().chain(FOLLOWERS.map(|node| ack(node, Lsn(1)))) {
        assert_eq!(engine.apply(Millis(0), &event, &mut commands).verdict, Verdict::Applied);
    }
    commands.clear();
    (engine, commands)
}

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("engine");
    group.throughput(Throughput::Elements(1));
    group.bench_function("ack, steady", |bencher| {
        let (mut engine, mut commands) = steady();
        let (mut head, mut followers) = (Lsn(1), FOLLOWERS.into_iter().cycle());
        bencher.iter(|| {
            head = head.next();
            let event = ack(followers.next().unwrap_or_default(), head);
            engine.apply(Millis(1), black_box(&event), &mut commands)
        });
        assert!(commands.is_empty(), "a steady stream of acks gives no commands");
    });
    group.bench_function("event of another epoch, ignored", |bencher| {
        let (mut engine, mut commands) = steady();
        let session = SessionId(1);
        let reason = FailureReason::TransportLost;
        let event = Event::SessionFailed { epoch: Epoch(9), replica: FOLLOWERS[0], session, reason };
        bencher.iter(|| engine.apply(Millis(1), black_box(&event), &mut commands));
    });
    group.throughput(Throughput::Elements(2));
    group.bench_function("session lost, follower decided anew", |bencher| {
        let (mut engine, mut commands) = steady();
        let replica = FOLLOWERS[0];
        bencher.iter(|| {
            commands.clear();
            let session = engine.session(replica).map_or(SessionId(0), |session| session.id);
            let lost = Event::SessionFailed { epoch: EPOCH, replica, session, reason: FailureReason::TransportLost };
            let _ = engine.apply(Millis(1), black_box(&lost), &mut commands);
            engine.apply(Millis(1), black_box(&ack(replica, Lsn(1))), &mut commands)
        });
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("projection", |bencher| {
        let (engine, _) = steady();
        bencher.iter(|| black_box(&engine).projection());
    });
    group.finish();
}

criterion_group!(engine_group, benches);
criterion_main!(engine_group);
