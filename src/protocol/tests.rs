//! Tests of the engine: every event in every state of a follower, and what a host relies on.

use super::*;
use crate::limits::MAX_FOLLOWERS;
use crate::types::{Chain, Epoch, Lsn, NodeId, SessionId, ShardId};

const LEADER: NodeId = NodeId(1);
const FOLLOWER: NodeId = NodeId(2);
const EPOCH: Epoch = Epoch(1);

fn engine(first_session: u64) -> Engine {
    Engine::new(Settings {
        shard: ShardId(0),
        node: LEADER,
        first_session: SessionId(first_session),
        limits: SessionLimits::default(),
    })
}

fn assign(epoch: u64, role: Role, nodes: &[u64]) -> Event {
    let replicas = nodes.iter().map(|&node| ReplicaInfo { node: NodeId(node), endpoint: format!("host-{node}") });
    Event::AssignmentDelivered(Assignment {
        epoch: Epoch(epoch),
        role,
        replicas: replicas.collect(),
        commit_followers: 1,
    })
}

/// A follower whose marks all stand at `position`, with the leader's history as far as both have it.
fn ack(position: u64, tail: u64, head: u64) -> Event {
    let lsn = Lsn(position);
    Event::SyncAckReceived(SyncAck {
        epoch: EPOCH,
        replica: FOLLOWER,
        follower: FollowerFacts {
            received: lsn,
            durable: lsn,
            applied: lsn,
            chain: Chain(7),
            tail_epoch: EPOCH,
            ..FollowerFacts::default()
        },
        leader: LeaderFacts {
            tail: Lsn(tail),
            head: Lsn(head),
            chain_at_received: (position <= head && position + 1 >= tail).then_some(Chain(7)),
            ..LeaderFacts::default()
        },
    })
}

fn progress(session: SessionId) -> Event {
    Event::SessionProgress {
        epoch: EPOCH,
        replica: FOLLOWER,
        session,
        progress: Progress::default(),
        making_durable: false,
    }
}

fn completed(session: SessionId) -> Event {
    let lsn = Lsn(20);
    Event::SessionCompleted { epoch: EPOCH, replica: FOLLOWER, session, achieved: lsn, durable: lsn, head: lsn }
}

fn failed(session: SessionId) -> Event {
    Event::SessionFailed { epoch: EPOCH, replica: FOLLOWER, session, reason: FailureReason::TransportLost }
}

fn barrier(session: Option<SessionId>) -> Event {
    Event::BarrierConfirmed { epoch: EPOCH, node: FOLLOWER, session, durable: Lsn(10) }
}

fn of_another_epoch(mut event: Event, other: Epoch) -> Event {
    match &mut event {
        Event::AssignmentDelivered(assignment) => assignment.epoch = other,
        Event::ReadinessObserved(readiness) => readiness.epoch = other,
        Event::SyncAckReceived(ack) => ack.epoch = other,
        Event::SessionProgress { epoch, .. }
        | Event::SessionCompleted { epoch, .. }
        | Event::SessionFailed { epoch, .. }
        | Event::BarrierConfirmed { epoch, .. } => *epoch = other,
    }
    event
}

/// An engine after these events, all at time 0.
fn after(first_session: u64, events: &[Event]) -> Engine {
    let mut engine = engine(first_session);
    for event in events {
        let outcome = engine.apply(Millis(0), event, &mut Vec::new());
        assert_eq!(outcome.verdict, Verdict::Applied, "{event:?}");
    }
    engine
}

/// A follower's state in one letter; see the table below.
fn letter(engine: &Engine) -> char {
    let Some(replica) = engine.replica(FOLLOWER) else { return '-' };
    match (replica.refusal, replica.kind, replica.phase) {
        (Some(_), None, Phase::Idle) => 'x',
        (None, None, Phase::Idle) => 'I',
        (None, Some(SessionKind::KeepUp), Phase::Running) => 'K',
        (None, Some(SessionKind::CatchUp), Phase::Issued) => 'c',
        (None, Some(SessionKind::CatchUp), Phase::Running) => 'C',
        (None, Some(SessionKind::Rebuild), Phase::Issued) => 'r',
        (None, Some(SessionKind::Rebuild), Phase::Running) => 'R',
        (None, Some(_), Phase::Failed) => 'f',
        (None, Some(_), Phase::Completed) => 'd',
        other => panic!("{other:?} is no state of a follower"),
    }
}

/// Rows: states of the follower. Columns: events. Cells: the state after, or `.` when the event is ignored and nothing
/// at all changes.
///
/// `-` not a follower, `I` idle, `K` keep-up, `c`/`C` catch-up issued/running, `r`/`R` rebuild issued/running,
/// `f` failed, `x` refused, `d` completed.
#[test]
fn every_event_in_every_state() {
    let last = u64::MAX - 1;
    let leader = assign(1, Role::Leader, &[2, 3]);
    let first = SessionId(1);
    let states = [
        ("not assigned", 1, vec![], "............I-"),
        ("not leading", 1, vec![assign(1, Role::Follower, &[])], "............I-"),
        ("feeding as a follower", 1, vec![assign(1, Role::Follower, &[2, 3])], "Kcrx........I-"),
        ("idle", 1, vec![leader.clone()], "Kcrx........I-"),
        ("keeping up", 1, vec![leader.clone(), ack(10, 1, 10)], "KKffK.fK....I-"),
        ("catch-up issued", 1, vec![leader.clone(), ack(10, 1, 12)], "ccccCKfc....I-"),
        ("catch-up running", 1, vec![leader.clone(), ack(10, 1, 12), progress(first)], "CCCCCKfC....I-"),
        ("rebuild issued", 1, vec![leader.clone(), ack(10, 12, 20)], "rrrrRKf.....I-"),
        ("rebuild running", 1, vec![leader.clone(), ack(10, 12, 20), progress(first)], "RRRRRKf.....I-"),
        ("failed", 1, vec![leader.clone(), ack(10, 1, 12), failed(first)], "Kcrx........I-"),
        ("refused", 1, vec![leader.clone(), ack(30, 1, 20)], "Kcrx........I-"),
        ("completed", last, vec![leader.clone(), ack(10, 1, 12), completed(SessionId(last))], "xxxx........I-"),
    ];
    for (name, first_session, events, cells) in states {
        let before = after(first_session, &events);
        let own = before.session(FOLLOWER).map(|session| session.id);
        let session = own.unwrap_or(SessionId(first_session));
        let columns = [
            ack(10, 1, 10),
            ack(10, 1, 12),
            ack(10, 12, 20),
            ack(30, 1, 20),
            progress(session),
            completed(session),
            failed(session),
            barrier(Some(session)),
            progress(SessionId(999)),
            of_another_epoch(ack(10, 1, 12), Epoch(0)),
            of_another_epoch(failed(session), Epoch(2)),
            barrier(None),
            assign(2, Role::Leader, &[2]),
            assign(1, Role::Leader, &[3]),
        ];
        assert_eq!(cells.len(), columns.len());
        for (event, cell) in columns.iter().zip(cells.chars()) {
            let mut engine = before.clone();
            let mut commands = Vec::new();
            let outcome = engine.apply(Millis(0), event, &mut commands);
            assert_eq!(engine.verify(), Ok(()), "{name}, {event:?}");
            if cell == '.' {
                assert!(matches!(outcome.verdict, Verdict::Ignored(_)), "{name}, {event:?}: {outcome}");
                assert_eq!((&engine, &commands), (&before, &vec![]), "{name}, {event:?}");
            } else {
                assert_eq!(outcome.verdict, Verdict::Applied, "{name}, {event:?}");
                assert_eq!(letter(&engine), cell, "{name}, {event:?}");
            }
        }
    }
}

#[test]
fn an_older_assignment_is_refused_in_every_state() {
    for events in [vec![], vec![ack(10, 1, 10)], vec![ack(10, 1, 12)], vec![ack(30, 1, 20)]] {
        let mut engine = after(1, &[assign(1, Role::Leader, &[2])]);
        for event in &events {
            let _ = engine.apply(Millis(0), event, &mut Vec::new());
        }
        let _ = engine.apply(Millis(0), &assign(5, Role::Leader, &[2]), &mut Vec::new());
        let before = engine.clone();
        let mut commands = Vec::new();
        let outcome = engine.apply(Millis(0), &assign(4, Role::Follower, &[]), &mut commands);
        let stale = Ignored::StaleEpoch { offered: Epoch(4), current: Epoch(5) };
        assert_eq!(outcome.verdict, Verdict::Ignored(stale));
        assert_eq!((engine, commands), (before, vec![]));
    }
}

#[test]
fn a_steady_stream_of_acks_gives_no_commands() {
    let mut engine = after(1, &[assign(1, Role::Leader, &[2, 3]), ack(10, 1, 10)]);
    let mut commands = Vec::new();
    for lsn in 10..1000 {
        let outcome = engine.apply(Millis(lsn), &ack(lsn, 1, lsn + 5), &mut commands);
        assert_eq!(outcome.verdict, Verdict::Applied);
        assert_eq!(outcome.durable, Lsn(lsn));
    }
    assert_eq!(commands, []);
    assert_eq!(commands.capacity(), 0, "nothing was ever pushed");
}

#[test]
fn the_kth_follower_decides_what_is_durable() {
    let nodes: Vec<u64> = (2..2 + u64::try_from(MAX_FOLLOWERS).unwrap()).collect();
    for k in [1u16, 2, 33, 64, 65] {
        let Event::AssignmentDelivered(mut assignment) = assign(1, Role::Leader, &nodes) else { unreachable!() };
        assignment.commit_followers = k;
        let mut engine = engine(1);
        let mut commands = Vec::new();
        let _ = engine.apply(Millis(0), &Event::AssignmentDelivered(assignment), &mut commands);
        for &node in &nodes {
            let Event::SyncAckReceived(mut facts) = ack(node, 1, 100) else { unreachable!() };
            facts.replica = NodeId(node);
            let outcome = engine.apply(Millis(0), &Event::SyncAckReceived(facts), &mut commands);
            assert_eq!(outcome.verdict, Verdict::Applied);
        }
        // The followers' durable LSNs are 2 to 65: the best is 65, the k-th best 66 - k.
        let expected = if k <= 64 { Lsn(66 - u64::from(k)) } else { Lsn::ZERO };
        assert_eq!(engine.durable(), expected, "k = {k}");
    }
}

#[test]
fn a_follower_counts_for_commit_only_when_its_rebuild_is_done() {
    let rebuild = SessionId(1);
    let mut engine = after(1, &[assign(1, Role::Leader, &[2]), ack(10, 12, 20), progress(rebuild), ack(20, 12, 20)]);
    assert_eq!(engine.durable(), Lsn::ZERO);
    let short = Event::SessionCompleted {
        epoch: EPOCH,
        replica: FOLLOWER,
        session: rebuild,
        achieved: Lsn(19),
        durable: Lsn(19),
        head: Lsn(30),
    };
    let outcome = engine.apply(Millis(0), &short, &mut Vec::new());
    let refused = Ignored::TargetNotReached { achieved: Lsn(19), target: Lsn(20) };
    assert_eq!((outcome.verdict, outcome.durable), (Verdict::Ignored(refused), Lsn::ZERO));
    let outcome = engine.apply(Millis(0), &completed(rebuild), &mut Vec::new());
    assert_eq!((outcome.verdict, outcome.durable), (Verdict::Applied, Lsn(20)));
}

#[test]
fn the_pin_is_taken_before_the_session_goes_out() {
    for facts in [ack(10, 1, 12), ack(10, 12, 20)] {
        let mut engine = after(1, &[assign(1, Role::Leader, &[2])]);
        let mut commands = Vec::new();
        let _ = engine.apply(Millis(0), &facts, &mut commands);
        let names: Vec<_> = commands.iter().map(Command::name).collect();
        assert_eq!(names[0], "start_recovery_task");
        assert!(names[1] == "start_catch_up" || names[1] == "start_rebuild", "{names:?}");
        assert_eq!(commands[0].session(), commands[1].session());
    }
}

#[test]
fn the_next_deadline_is_when_something_fails() {
    let mut engine = after(1, &[assign(1, Role::Leader, &[2]), ack(10, 1, 12)]);
    let due = engine.next_deadline().unwrap();
    let mut commands = Vec::new();
    let _ = engine.tick(Millis(due.get() - 1), &mut commands);
    assert_eq!((letter(&engine), commands.len()), ('c', 0));
    let _ = engine.tick(due, &mut commands);
    assert_eq!((letter(&engine), commands.len()), ('f', 3));
    assert_eq!(engine.next_deadline(), None);
}

#[test]
fn an_engine_can_move_to_the_thread_that_hosts_it() {
    fn assert_send<T: Send>(_: &T) {}
    assert_send(&engine(1));
}

#[test]
fn too_many_followers_are_refused() {
    let nodes: Vec<u64> = (2..3 + u64::try_from(MAX_FOLLOWERS).unwrap()).collect();
    let mut engine = engine(1);
    let outcome = engine.apply(Millis(0), &assign(1, Role::Leader, &nodes), &mut Vec::new());
    assert!(matches!(outcome.verdict, Verdict::Ignored(Ignored::InvalidAssignment { .. })), "{outcome}");
}
