//! Streams with little to do: what is acknowledged without a thread of its own for it, and threads that end and come back.
//!
//! Whether a thread is there is told by its name, so the scenarios of this file run one after the other.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::net::Net;
use common::{append, deadline, until};
use parking_lot::{Mutex, MutexGuard};
use tempfile::tempdir;
use towline::status::FollowerStatus;
use towline::target::{LogOnly, ReplicationTarget};
use towline::wal::{Record, SyncPolicy, WalOptions};
use towline::{Commit, Follower, Leader, Lsn, NodeBuilder, NodeId, Outcome, ShardId};

const SHARD: ShardId = ShardId(0);

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock()
}

/// Threads of this process whose name begins so, as far as the system tells.
fn threads(name: &str) -> Option<usize> {
    let mut count = 0;
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        // One that has ended meanwhile has no name any more.
        let comm = std::fs::read_to_string(task.ok()?.path().join("comm")).unwrap_or_default();
        count += usize::from(comm.starts_with(name));
    }
    Some(count)
}

fn node(net: &Net, directory: &Path, heartbeat: Duration, sync: SyncPolicy) -> NodeBuilder {
    net.node(directory)
        .heartbeat(heartbeat)
        .peer_timeout(Duration::from_secs(60).max(heartbeat * 3))
        .wal(WalOptions { sync, ..WalOptions::default() })
}

fn lead(net: &Net, directory: &Path, heartbeat: Duration, sync: SyncPolicy) -> Leader {
    node(net, directory, heartbeat, sync).shards(1).segment_size(1 << 20).lead(&net.address).unwrap()
}

fn wait(leader: &Leader, lsn: Lsn, commit: &str) {
    let commit: Commit = commit.parse().unwrap();
    let outcome = leader.wait(SHARD, lsn, commit, Some(deadline())).unwrap();
    assert_eq!(outcome, Outcome::Committed, "LSN {lsn} to be {commit}");
}

/// The follower as its leader sees it, once it is connected.
fn follower_of(leader: &Leader) -> Option<FollowerStatus> {
    leader.status().shards[0].followers.iter().find(|follower| follower.connected).cloned()
}

/// Nothing moves at the follower but what is received, nobody beats, and behind the log comes the word that this was all:
/// the acknowledgement can come from nobody but the receiver, and for no other reason.
fn what_came_before_the_follower_is_acknowledged(net: &Net) {
    let _alone = alone();
    let never = Duration::from_secs(600);
    for commit in ["received:1", "applied:1"] {
        for records in [1, 5000] {
            let (a, b) = (tempdir().unwrap(), tempdir().unwrap());
            let leader = lead(net, a.path(), never, SyncPolicy::Never);
            let last = append(&mut leader.writer(SHARD).unwrap(), records);
            std::thread::scope(|scope| {
                scope.spawn(|| wait(&leader, last, commit));
                let followed = node(net, b.path(), never, SyncPolicy::Never)
                    .node_id(NodeId(2))
                    .follow(&net.address, Arc::new(LogOnly));
                wait(&leader, last, commit);
                drop(followed.unwrap());
            });
        }
    }
}

/// As long as nothing moves there is no acknowledger, and the leader hears from the follower all the same, on one stream.
fn a_quiet_stream_is_kept_alive_by_the_receiver(net: &Net) {
    let _alone = alone();
    let heartbeat = Duration::from_millis(50);
    let (a, b) = (tempdir().unwrap(), tempdir().unwrap());
    let leader = lead(net, a.path(), heartbeat, SyncPolicy::Group);
    let _follower: Follower = node(net, b.path(), heartbeat, SyncPolicy::Group)
        .node_id(NodeId(2))
        .follow(&net.address, Arc::new(LogOnly))
        .unwrap();
    let last = append(&mut leader.writer(SHARD).unwrap(), 10);
    wait(&leader, last, "durable:1");
    if threads("tl-recv").is_some() {
        until("the acknowledger ends", || threads("tl-ack") == Some(0));
    }
    let mut heard_at_ms = follower_of(&leader).unwrap().acked_at_ms;
    let session = follower_of(&leader).unwrap().session.map(|session| session.id);
    for _ in 0..5 {
        until("the follower is heard", || follower_of(&leader).unwrap().acked_at_ms > heard_at_ms);
        let follower = follower_of(&leader).unwrap();
        heard_at_ms = follower.acked_at_ms;
        assert_eq!(follower.session.map(|session| session.id), session, "the stream is another one");
        assert!(threads("tl-ack").is_none_or(|count| count == 0), "somebody else acknowledges");
    }
}

/// A target that holds up who applies as long as its gate is shut.
#[derive(Default)]
struct Gate(Mutex<()>);

impl ReplicationTarget for Gate {
    fn durable_applied(&self, _: ShardId) -> towline::Result<Option<Lsn>> {
        Ok(None)
    }

    fn apply(&self, _: ShardId, _: Record<'_>) -> towline::Result<()> {
        drop(self.0.lock());
        Ok(())
    }

    fn sync(&self, _: ShardId) -> towline::Result<()> {
        Ok(())
    }
}

/// What is received and not applied yet will be acknowledged without the receiver: as often as that happens there is an
/// acknowledger, and when all is said it ends.
fn the_acknowledger_ends_and_comes_back(net: &Net) {
    let _alone = alone();
    let heartbeat = Duration::from_millis(100);
    let (a, b) = (tempdir().unwrap(), tempdir().unwrap());
    let leader = lead(net, a.path(), heartbeat, SyncPolicy::Interval(Duration::from_millis(10)));
    let gate = Arc::new(Gate::default());
    let _follower: Follower = node(net, b.path(), heartbeat, SyncPolicy::Interval(Duration::from_millis(10)))
        .node_id(NodeId(2))
        .follow(&net.address, gate.clone())
        .unwrap();
    let mut writer = leader.writer(SHARD).unwrap();
    let told = threads("tl-recv").is_some();
    for _ in 0..3 {
        let shut = gate.0.lock();
        let last = append(&mut writer, 1);
        wait(&leader, last, "received:1");
        if told {
            until("an acknowledger is there", || threads("tl-ack") == Some(1));
        }
        assert_eq!(follower_of(&leader).unwrap().applied, last.previous());
        drop(shut);
        wait(&leader, last, "applied:1");
        if told {
            until("the acknowledger ends", || threads("tl-ack") == Some(0));
        }
    }
}

over_both!(
    what_came_before_the_follower_is_acknowledged,
    a_quiet_stream_is_kept_alive_by_the_receiver,
    the_acknowledger_ends_and_comes_back,
);
