//! Commits that are waited for one at a time: the thread that waits reads the follower's acknowledgements by itself,
//! and whatever else a follower does meanwhile comes to those whose business it is.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::net::Net;
use common::raw::{acknowledge, ask, chain_at, follow_request, read_to_end};
use common::{append, assert_identical, catch_up, deadline, reach, until};
use parking_lot::Mutex;
use towline::target::LogOnly;
use towline::transport::Connection;
use towline::wal::{Log, LogWriter, WalOptions};
use towline::wire::{ErrorMessage, Message, ShardInfo};
use towline::{Commit, Epoch, Leader, Lsn, NodeId, Outcome, RefusalCode, ShardId, WaitStrategy};

const S0: ShardId = ShardId(0);

over_both![
    one_thread_and_several_commit_in_turn,
    two_followers_are_read_one_after_the_other,
    a_follower_that_says_something_else_is_heard,
    a_follower_that_leaves_is_missed_and_another_takes_its_place,
    an_acknowledgement_that_cannot_be_ends_the_stream,
    an_acknowledgement_of_what_is_not_there_holds_nobody_up,
    whoever_reads_is_told_when_the_leader_ends,
    whoever_reads_is_told_in_time,
];

fn received(count: usize) -> Commit {
    format!("received:{count}").parse().unwrap()
}

/// Appends records one after the other, each once the one before is committed.
fn commit_some(leader: &Leader, writer: &mut LogWriter, count: u64, commit: Commit) {
    for _ in 0..count {
        let (_, outcome) = leader.append_and_wait(writer, &[b"a record"], commit, Some(deadline())).unwrap();
        assert_eq!(outcome, Outcome::Committed);
    }
}

fn one_thread_and_several_commit_in_turn(net: &Net) {
    for wait in [WaitStrategy::Park, WaitStrategy::SpinThenPark { spins: 200 }, WaitStrategy::Spin] {
        let parent = tempfile::tempdir().unwrap();
        let at = |node: u64| parent.path().join(node.to_string());
        let builder = net.node(&at(0)).wal(WalOptions { wait, ..WalOptions::default() });
        let leader = builder.segment_size(1 << 20).lead(&net.address).unwrap();
        let follower = net.node(&at(1)).node_id(NodeId(1)).follow(&net.address, Arc::new(LogOnly)).unwrap();
        let writer = Mutex::new(leader.writer(S0).unwrap());
        let levels = ["received:1", "durable:1", "applied:1", "synced+durable:1"].map(|level| level.parse().unwrap());
        for round in 0..3 {
            levels.iter().for_each(|&level| commit_some(&leader, &mut writer.lock(), 30, level));
            std::thread::scope(|scope| {
                for thread in 0..3 {
                    let (leader, writer, level) = (&leader, &writer, levels[(round + thread) % levels.len()]);
                    scope.spawn(move || {
                        for _ in 0..20 {
                            // Others append while this one waits.
                            let lsn = writer.lock().append(b"a record").unwrap();
                            let outcome = leader.wait(S0, lsn, level, Some(deadline())).unwrap();
                            assert_eq!(outcome, Outcome::Committed, "{wait:?}, {level}");
                        }
                    });
                }
            });
        }
        let head = writer.lock().end().head;
        catch_up(&leader, &follower);
        drop(writer);
        leader.shutdown().unwrap();
        follower.shutdown().unwrap();
        assert_identical(&at(0), &at(1), &[head.0]);
    }
}

fn two_followers_are_read_one_after_the_other(net: &Net) {
    let parent = tempfile::tempdir().unwrap();
    let at = |node: u64| parent.path().join(node.to_string());
    let leader = net.lead(&at(0), 1);
    let mut writer = leader.writer(S0).unwrap();
    let follow = |node| net.node(&at(node)).node_id(NodeId(node)).follow(&net.address, Arc::new(LogOnly)).unwrap();
    let followers = [follow(1), follow(2)];
    commit_some(&leader, &mut writer, 50, received(2));
    commit_some(&leader, &mut writer, 50, received(1));
    commit_some(&leader, &mut writer, 50, "durable:2".parse().unwrap());
    // One of them is all there is, and then there are two again.
    let [first, second] = followers;
    second.shutdown().unwrap();
    commit_some(&leader, &mut writer, 50, received(1));
    let second = follow(2);
    commit_some(&leader, &mut writer, 50, received(2));
    for follower in [first, second] {
        follower.shutdown().unwrap();
    }
}

/// A leader, and a follower made by hand whose acknowledgements the waiting thread has begun to read.
struct Scene {
    /// Dropped first: a leader that stops does not wait for it then.
    stream: Connection,
    info: ShardInfo,
    leader: Leader,
    writer: LogWriter,
    _parent: tempfile::TempDir,
}

impl Scene {
    fn new(net: &Net) -> Scene {
        let parent = tempfile::tempdir().unwrap();
        let leader = net.node(&parent.path().join("leader")).lead(&net.address).unwrap();
        let mut writer = leader.writer(S0).unwrap();
        append(&mut writer, 1);
        let mut stream = net.connect();
        let info = ask(&mut stream, follow_request(&leader.manifest(), 7, S0)).unwrap();
        let mut scene = Scene { leader, writer, stream, info, _parent: parent };
        for _ in 0..5 {
            let (outcome, ()) = scene.commit(Some(deadline()), Scene::acknowledge_all);
            assert_eq!(outcome, Outcome::Committed);
        }
        scene
    }

    /// Appends a record and waits until the follower has it, while the follower, which need not read what it is sent,
    /// does something.
    fn commit<T>(
        &mut self,
        deadline: Option<Instant>,
        meanwhile: impl FnOnce(&mut Connection, &ShardInfo, &Arc<Log>) -> T,
    ) -> (Outcome, T) {
        let Scene { leader, writer, stream, info, .. } = self;
        let log = leader.log(S0).unwrap();
        let before = log.head();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| leader.append_and_wait(writer, &[b"a record"], received(1), deadline));
            reach(log.written(), before.next(), "the record");
            let done = meanwhile(stream, info, log);
            (waiting.join().unwrap().unwrap().1, done)
        })
    }

    fn acknowledge_all(stream: &mut Connection, info: &ShardInfo, log: &Arc<Log>) {
        acknowledge(stream, info, log.head(), chain_at(log, log.head())).unwrap();
    }

    fn follower_is_connected(&self) -> bool {
        self.leader.commits(S0).unwrap().followers()[0].is_connected()
    }
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_millis(200))
}

fn a_follower_that_says_something_else_is_heard(net: &Net) {
    let mut scene = Scene::new(net);
    let (outcome, ()) = scene.commit(soon(), |stream, _, _| {
        let text = "the logs differ".to_owned();
        let refusal = ErrorMessage { code: RefusalCode::ChainMismatch, text };
        stream.sender.send_message(&Message::Error(refusal)).unwrap();
    });
    assert_eq!(outcome, Outcome::TimedOut);
    let divergence = || scene.leader.status().shards[0].followers[0].divergence.clone();
    until("the leader has heard it", || divergence().is_some_and(|text| text.contains("the logs differ")));
}

fn a_follower_that_leaves_is_missed_and_another_takes_its_place(net: &Net) {
    let mut scene = Scene::new(net);
    let (outcome, ()) = scene.commit(soon(), |stream, _, _| stream.closer.close());
    assert_eq!(outcome, Outcome::TimedOut);
    until("the leader has noticed", || !scene.follower_is_connected());
    let request = follow_request(&scene.leader.manifest(), 7, S0);
    scene.stream = net.connect();
    scene.info = ask(&mut scene.stream, request).unwrap();
    for _ in 0..5 {
        assert_eq!(scene.commit(Some(deadline()), Scene::acknowledge_all).0, Outcome::Committed);
    }
    assert!(scene.follower_is_connected());
}

fn an_acknowledgement_that_cannot_be_ends_the_stream(net: &Net) {
    let mut scene = Scene::new(net);
    let (outcome, ended) = scene.commit(soon(), |stream, info, log| {
        Scene::acknowledge_all(stream, &ShardInfo { epoch: Epoch(info.epoch.0 + 1), ..*info }, log);
        read_to_end(stream)
    });
    assert_eq!(outcome, Outcome::TimedOut);
    assert!(!ended.is_timeout(), "{ended}");
    until("the stream is over", || !scene.follower_is_connected());
}

fn an_acknowledgement_of_what_is_not_there_holds_nobody_up(net: &Net) {
    let mut scene = Scene::new(net);
    let began = Instant::now();
    let (outcome, ()) = scene.commit(soon(), |stream, info, log| {
        acknowledge(stream, info, log.head().next(), chain_at(log, log.head())).unwrap();
    });
    assert_eq!(outcome, Outcome::TimedOut);
    // The stream's thread gives the log some seconds to get there.
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    until("the stream is over", || !scene.follower_is_connected());
}

fn whoever_reads_is_told_when_the_leader_ends(net: &Net) {
    let Scene { leader, mut writer, stream, info, _parent } = Scene::new(net);
    let mut wait_until = |end: &dyn Fn()| {
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| leader.append_and_wait(&mut writer, &[b"a record"], received(1), None));
            reach(leader.log(S0).unwrap().written(), Lsn(7), "the record");
            end();
            waiting.join().unwrap().unwrap().1
        })
    };
    assert_eq!(wait_until(&|| leader.depose(Epoch(info.epoch.0 + 1)).unwrap()), Outcome::Deposed);
    drop((stream, leader, _parent));
    let Scene { leader, mut writer, stream: _stream, _parent, .. } = Scene::new(net);
    let commits = Arc::clone(leader.commits(S0).unwrap());
    let lsn = writer.append(b"a record").unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| commits.wait(lsn, received(1), None));
        leader.shutdown().unwrap();
        assert_eq!(waiting.join().unwrap(), Outcome::ShutDown);
    });
}

fn whoever_reads_is_told_in_time(net: &Net) {
    let mut scene = Scene::new(net);
    for milliseconds in [0, 1, 50, 100] {
        let deadline = Instant::now() + Duration::from_millis(milliseconds);
        let (outcome, ()) = scene.commit(Some(deadline), |_, _, _| ());
        assert!(outcome == Outcome::TimedOut && Instant::now() >= deadline, "{outcome:?}");
    }
    // What came too late is there the next time.
    let (outcome, ()) = scene.commit(Some(common::deadline()), Scene::acknowledge_all);
    assert_eq!(outcome, Outcome::Committed);
    assert!(scene.leader.commits(S0).unwrap().followers()[0].at(towline::AckLevel::Received) > Lsn(5));
}
