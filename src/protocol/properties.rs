//! Tests: whatever happens, in whatever order, the engine's promises hold.

use std::fmt::Write;

use proptest::prelude::*;

use super::*;
use crate::types::{Chain, Epoch, Lsn, NodeId, SessionId, ShardId};

fn settings() -> Settings {
    Settings {
        shard: ShardId(5),
        node: NodeId(1),
        first_session: SessionId(1),
        limits: SessionLimits {
            catch_up_deadline_ms: Millis(40),
            rebuild_deadline_ms: Millis(60),
            stall_budget_ms: Millis(15),
        },
    }
}

/// Small numbers, so that events meet the present epoch, session and followers often, and miss them often enough.
fn any_event() -> impl Strategy<Value = Event> {
    let lsn = || (0u64..12).prop_map(Lsn);
    let node = || (1u64..5).prop_map(NodeId);
    let epoch = || prop_oneof![8 => Just(Epoch(1)), 6 => Just(Epoch(2)), 1 => (0u64..5).prop_map(Epoch)];
    let session = || (0u64..14).prop_map(SessionId);
    let role = prop_oneof![3 => Just(Role::Leader), 1 => Just(Role::Follower)];
    let replicas = proptest::collection::vec(
        (2u64..5).prop_map(|node| ReplicaInfo { node: NodeId(node), endpoint: String::new() }),
        0..4,
    );
    let assignment = (epoch(), role, replicas, 0u16..3).prop_map(|(epoch, role, replicas, commit_followers)| {
        Event::AssignmentDelivered(Assignment { epoch, role, replicas, commit_followers })
    });
    let flag = || proptest::option::of(proptest::bool::weighted(0.8));
    let readiness = (epoch(), flag(), flag(), flag(), flag()).prop_map(|(epoch, a, b, c, d)| {
        Event::ReadinessObserved(ReadinessObserved {
            epoch,
            role_applied: a,
            receiver_ready: b,
            shipper_configured: c,
            shipper_connected: d,
        })
    });
    let progress = (epoch(), node(), session(), lsn(), 0u64..3, any::<bool>()).prop_map(
        |(epoch, replica, session, achieved, base_blocks, making_durable)| {
            let progress = Progress { achieved, base_blocks };
            Event::SessionProgress { epoch, replica, session, progress, making_durable }
        },
    );
    let completed = (epoch(), node(), session(), lsn(), lsn(), lsn()).prop_map(
        |(epoch, replica, session, achieved, durable, head)| Event::SessionCompleted {
            epoch,
            replica,
            session,
            achieved,
            durable,
            head,
        },
    );
    let failed = (epoch(), node(), session(), proptest::sample::select(FailureReason::ALL))
        .prop_map(|(epoch, replica, session, reason)| Event::SessionFailed { epoch, replica, session, reason });
    let barrier = (epoch(), node(), proptest::option::of(session()), lsn())
        .prop_map(|(epoch, node, session, durable)| Event::BarrierConfirmed { epoch, node, session, durable });
    let ack = (epoch(), node(), any_facts()).prop_map(|(epoch, replica, (follower, leader))| {
        Event::SyncAckReceived(SyncAck { epoch, replica, follower, leader })
    });
    prop_oneof![1 => assignment, 1 => readiness, 8 => ack, 4 => progress, 4 => completed, 2 => failed, 2 => barrier]
}

fn any_facts() -> impl Strategy<Value = (FollowerFacts, LeaderFacts)> {
    let lsn = || (0u64..12).prop_map(Lsn);
    let chain = || prop_oneof![5 => Just(Chain(7)), 1 => Just(Chain(8))];
    let rarely = || proptest::bool::weighted(0.05);
    let marks = (lsn(), lsn(), lsn(), 0u64..3, chain(), 0u64..3, rarely(), rarely());
    let chain_and_common = (proptest::option::weighted(0.9, chain()), proptest::option::of(lsn()));
    let log = (0u64..14, lsn(), chain_and_common, any::<bool>(), proptest::bool::weighted(0.2));
    (marks, log).prop_map(|(marks, log)| {
        let (received, durable, applied, committed, chain, tail_epoch, base_incomplete, hostile) = marks;
        let (tail, head, (chain_at_received, common), cut_possible, is_relay) = log;
        let follower = FollowerFacts {
            received: if hostile { Lsn::MAX } else { received },
            durable,
            applied,
            committed: Lsn(committed),
            chain,
            tail_epoch: Epoch(tail_epoch),
            base_incomplete,
        };
        (follower, LeaderFacts { tail: Lsn(tail), head, chain_at_received, common, cut_possible, is_relay })
    })
}

fn any_history() -> impl Strategy<Value = Vec<(Millis, Event)>> {
    let begin = |role| {
        Event::AssignmentDelivered(Assignment {
            epoch: Epoch(1),
            role,
            replicas: [2, 3, 4].map(|node| ReplicaInfo { node: NodeId(node), endpoint: String::new() }).to_vec(),
            commit_followers: 1,
        })
    };
    proptest::collection::vec((0u64..6, any_event()), 0..120).prop_map(move |steps| {
        let mut now = 0;
        let mut history = vec![(Millis(0), begin(Role::Leader))];
        for (pause, event) in steps {
            now += pause;
            history.push((Millis(now), event));
        }
        history
    })
}

/// What a careful host keeps an eye on.
#[derive(Default)]
struct Watcher {
    newest_session: SessionId,
    epoch: Epoch,
    durable: Lsn,
    /// Sessions whose task was started and not drained.
    open: Vec<(NodeId, SessionId)>,
}

impl Watcher {
    fn watch(&mut self, before: &Engine, engine: &Engine, event: &Event, commands: &[Command]) {
        assert_eq!(engine.verify(), Ok(()));
        assert!(engine.epoch() >= self.epoch, "epochs only grow");
        let same_term = engine.epoch() == self.epoch && engine.role() == before.role();
        assert!(!same_term || engine.durable() >= self.durable, "durable never moves back within a term");
        (self.epoch, self.durable) = (engine.epoch(), engine.durable());
        for (index, command) in commands.iter().enumerate() {
            self.watch_command(before, engine, event, command);
            if matches!(command, Command::StartCatchUp { .. } | Command::StartRebuild { .. }) {
                let pinned = &commands[index - 1];
                assert!(matches!(pinned, Command::StartRecoveryTask { .. }), "the pin comes first");
                assert_eq!(pinned.session(), command.session());
            }
        }
        let mut live: Vec<_> = engine.projection().replicas.iter().filter_map(live_session).collect();
        live.sort();
        self.open.sort();
        assert_eq!(self.open, live, "a task is open exactly as long as its session is live");
    }

    fn watch_command(&mut self, before: &Engine, engine: &Engine, event: &Event, command: &Command) {
        assert_eq!(command.shard(), ShardId(5));
        let Some((node, session)) = command.session() else { return };
        let leaving = matches!(event, Event::AssignmentDelivered(_)) && before.replica(node).is_some();
        assert!(engine.replica(node).is_some() || leaving, "no command for a follower that has left: {command}");
        match command {
            Command::StartRecoveryTask { .. } => {
                assert!(session > self.newest_session, "session ids are never used twice");
                self.newest_session = session;
                self.open.push((node, session));
            }
            Command::DrainRecoveryTask { .. } => {
                let open = self.open.iter().position(|&open| open == (node, session));
                assert!(open.is_some(), "only what was started is drained, once: {command}");
                self.open.retain(|&open| open != (node, session));
            }
            _ => assert!(self.open.contains(&(node, session)), "not under way: {command}"),
        }
    }
}

fn live_session(replica: &ReplicaProjection) -> Option<(NodeId, SessionId)> {
    replica.session.filter(|_| replica.phase.is_live()).map(|session| (replica.node, session))
}

fn transcript(history: &[(Millis, Event)]) -> (String, Engine) {
    let mut engine = Engine::new(settings());
    let mut text = String::new();
    for (now, event) in history {
        let mut commands = Vec::new();
        writeln!(text, "{}", engine.apply(*now, event, &mut commands)).unwrap();
        commands.iter().for_each(|command| writeln!(text, "{command}").unwrap());
    }
    (text, engine)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn promises_hold_in_every_history(history in any_history()) {
        let mut engine = Engine::new(settings());
        let mut watcher = Watcher::default();
        for (now, event) in &history {
            let before = engine.clone();
            let mut commands = Vec::new();
            let outcome = engine.apply(*now, event, &mut commands);
            prop_assert_eq!(outcome.durable, engine.durable());
            prop_assert_eq!(outcome.healthy, outcome.mode == Mode::PublishHealthy);
            watcher.watch(&before, &engine, event, &commands);
            if let Verdict::Ignored(_) = outcome.verdict {
                let mut only_time = before.clone();
                let mut timed_out = Vec::new();
                let _ = only_time.tick(*now, &mut timed_out);
                prop_assert_eq!(&engine, &only_time, "an ignored event changes nothing");
                prop_assert_eq!(&commands, &timed_out, "an ignored event gives no commands");
            }
            prop_assert!(engine.next_deadline().is_none_or(|due| due > *now), "nothing is overdue after an event");
        }
    }

    #[test]
    fn another_epoch_changes_nothing(history in any_history(), event in any_event()) {
        let (_, mut engine) = transcript(&history);
        let now = history.last().map_or(Millis(0), |(now, _)| *now);
        let before = engine.clone();
        let is_assignment = matches!(event, Event::AssignmentDelivered(_));
        if event.epoch() < before.epoch() || (event.epoch() > before.epoch() && !is_assignment) {
            let mut commands = Vec::new();
            let outcome = engine.apply(now, &event, &mut commands);
            prop_assert!(matches!(outcome.verdict, Verdict::Ignored(_)), "{}", outcome);
            prop_assert_eq!((&engine, &commands), (&before, &vec![]));
        }
    }

    #[test]
    fn the_same_history_gives_the_same_transcript(history in any_history()) {
        prop_assert_eq!(transcript(&history), transcript(&history));
    }

    #[test]
    fn a_clock_that_jumps_breaks_nothing(history in any_history(), jumps in proptest::collection::vec(any::<u64>(), 121)) {
        let mut engine = Engine::new(settings());
        let mut watcher = Watcher::default();
        for ((now, event), jump) in history.iter().zip(&jumps) {
            let before = engine.clone();
            let mut commands = Vec::new();
            let now = if jump % 3 == 0 { Millis(*jump) } else { Millis(now.get() + jump % 50) };
            let _ = engine.apply(now, event, &mut commands);
            watcher.watch(&before, &engine, event, &commands);
        }
    }

    #[test]
    fn every_session_ends_by_itself_unless_it_keeps_up(history in any_history()) {
        let (_, mut engine) = transcript(&history);
        while let Some(due) = engine.next_deadline() {
            let _ = engine.tick(due, &mut Vec::new());
        }
        for replica in engine.projection().replicas {
            prop_assert!(!replica.phase.is_live() || replica.kind == Some(SessionKind::KeepUp));
        }
    }
}
