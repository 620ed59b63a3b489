//! Streams with little to do: what is acknowledged without a thread of its own for it, and threads that end and come
//! back.
//!
//! Whether a thread is there is told by its name, so the scenarios of this file run one after the other.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::net::Net;
use common::proxy::{Fate, Proxy};
use common::random::Random;
use common::{append, deadline, until};
use parking_lot::{Condvar, Mutex, MutexGuard};
use tempfile::tempdir;
use towline::protocol::SessionKind;
use towline::status::FollowerStatus;
use towline::target::{LogOnly, ReplicationTarget};
use towline::transport::{Connection, FrameReceiver, Listener, Transport};
use towline::wal::{Record, SyncPolicy, WalOptions};
use towline::wire::{FrameHeader, FrameKind};
use towline::{Commit, Follower, Leader, Lsn, NodeBuilder, NodeId, Outcome, SessionId, ShardId};

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

/// The session of the follower, once it keeps up: one that catches up goes over into it on the same stream.
fn session_of(leader: &Leader) -> SessionId {
    let session = || follower_of(leader)?.session.filter(|session| session.kind == SessionKind::KeepUp);
    until("the follower keeps up", || session().is_some());
    session().unwrap().id
}

/// Nothing moves at the follower but what is received, nobody beats, and behind the log comes the word that this was
/// all: the acknowledgement can come from nobody but the receiver, and for no other reason.
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

/// As long as nothing moves there is no acknowledger, and the leader hears from the follower all the same, on one
/// stream.
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
    let session = session_of(&leader);
    for _ in 0..5 {
        until("the follower is heard", || follower_of(&leader).unwrap().acked_at_ms > heard_at_ms);
        let follower = follower_of(&leader).unwrap();
        heard_at_ms = follower.acked_at_ms;
        assert_eq!(follower.session.map(|session| session.id), Some(session), "the stream is another one");
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

/// A frame takes longer to come than the leader waits for a word: the follower says one meanwhile, on the same stream.
#[test]
fn a_frame_that_trickles_in_costs_no_stream() {
    let _alone = alone();
    let (heartbeat, peer_timeout) = (Duration::from_millis(100), Duration::from_secs(2));
    let net = Net::tcp();
    let (a, b) = (tempdir().unwrap(), tempdir().unwrap());
    let leader = node(&net, a.path(), heartbeat, SyncPolicy::Never).peer_timeout(peer_timeout).shards(1);
    let leader = leader.segment_size(1 << 20).lead(&net.address).unwrap();
    let record = vec![7; 200_000];
    // The proxy passes pieces of 8 KiB at most.
    let pieces = u32::try_from(record.len() / 8192).unwrap();
    let proxy = Proxy::start(&net.address, Random::new());
    // The connection that asks how many shards there are is the first.
    proxy.plan([Fate::Slow(peer_timeout * 5 / 4 / pieces); 4]);
    let _follower = node(&net, b.path(), heartbeat, SyncPolicy::Never)
        .peer_timeout(peer_timeout)
        .node_id(NodeId(2))
        .follow(&proxy.address, Arc::new(LogOnly))
        .unwrap();
    let mut writer = leader.writer(SHARD).unwrap();
    wait(&leader, append(&mut writer, 1), "received:1");
    if threads("tl-recv").is_some() {
        until("the acknowledger ends", || threads("tl-ack") == Some(0));
    }
    let session = session_of(&leader);
    wait(&leader, writer.append(&record).unwrap(), "received:1");
    assert_eq!(session_of(&leader), session, "the stream is another one");
}

/// A network that stalls in the middle of what comes behind a frame of log.
#[derive(Default)]
struct Stall {
    state: Mutex<Stalled>,
    changed: Condvar,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Stalled {
    #[default]
    No,
    BehindLog,
    Now,
}

impl Stall {
    fn set(&self, state: Stalled) {
        *self.state.lock() = state;
        self.changed.notify_all();
    }

    fn is_now(&self) -> bool {
        *self.state.lock() == Stalled::Now
    }
}

/// What a follower connects through; it begins to stall when it is told to.
struct Stalling(Arc<dyn Transport>, Arc<Stall>);

impl Transport for Stalling {
    fn connect(&self, address: &str, timeout: Duration) -> towline::Result<Connection> {
        let Connection { peer, sender, receiver, closer } = self.0.connect(address, timeout)?;
        let receiver = Box::new(StallingReceiver(receiver, Arc::clone(&self.1)));
        Ok(Connection { peer, sender, receiver, closer })
    }

    fn listen(&self, address: &str) -> towline::Result<Box<dyn Listener>> {
        self.0.listen(address)
    }
}

struct StallingReceiver(Box<dyn FrameReceiver>, Arc<Stall>);

impl FrameReceiver for StallingReceiver {
    fn receive_header(&mut self) -> towline::Result<FrameHeader> {
        let mut state = self.1.state.lock();
        while *state == Stalled::Now {
            self.1.changed.wait(&mut state);
        }
        drop(state);
        let header = self.0.receive_header()?;
        let mut state = self.1.state.lock();
        if *state == Stalled::BehindLog && header.kind == FrameKind::WalData {
            *state = Stalled::Now;
        }
        Ok(header)
    }

    fn receive_exact(&mut self, into: &mut [u8]) -> towline::Result<()> {
        self.0.receive_exact(into)
    }

    fn receive_body(&mut self) -> towline::Result<&[u8]> {
        self.0.receive_body()
    }

    fn remaining(&self) -> u32 {
        self.0.remaining()
    }

    fn current(&self) -> Option<FrameHeader> {
        self.0.current()
    }

    fn has_buffered(&self) -> bool {
        self.1.is_now() || self.0.has_buffered()
    }

    fn has_whole(&self) -> bool {
        if self.0.remaining() == 0 && self.1.is_now() { false } else { self.0.has_whole() }
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) -> towline::Result<()> {
        self.0.set_timeout(timeout)
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) -> towline::Result<()> {
        self.0.set_deadline(deadline)
    }

    fn peer(&self) -> &str {
        self.0.peer()
    }
}

/// A frame has been received, and of the next one only a beginning: what was received is acknowledged all the same, and
/// once the rest has come, nobody else acknowledges any more.
fn what_was_received_is_said_while_the_next_frame_stalls(net: &Net) {
    let _alone = alone();
    let heartbeat = Duration::from_millis(50);
    let (a, b) = (tempdir().unwrap(), tempdir().unwrap());
    let leader = lead(net, a.path(), heartbeat, SyncPolicy::Never);
    let stall = Arc::new(Stall::default());
    let _follower = node(net, b.path(), heartbeat, SyncPolicy::Never)
        .transport(Arc::new(Stalling(Arc::clone(&net.transport), Arc::clone(&stall))))
        .node_id(NodeId(2))
        .follow(&net.address, Arc::new(LogOnly))
        .unwrap();
    let mut writer = leader.writer(SHARD).unwrap();
    wait(&leader, append(&mut writer, 1), "received:1");
    let told = threads("tl-recv").is_some();
    for _ in 0..2 {
        if told {
            until("the acknowledger ends", || threads("tl-ack") == Some(0));
        }
        stall.set(Stalled::BehindLog);
        let last = append(&mut writer, 1);
        let commit: Commit = "received:1".parse().unwrap();
        let outcome = leader.wait(SHARD, last, commit, Some(deadline()));
        stall.set(Stalled::No);
        assert_eq!(outcome.unwrap(), Outcome::Committed);
    }
    if told {
        until("the acknowledger ends", || threads("tl-ack") == Some(0));
    }
}

over_both!(
    what_was_received_is_said_while_the_next_frame_stalls,
    what_came_before_the_follower_is_acknowledged,
    a_quiet_stream_is_kept_alive_by_the_receiver,
    the_acknowledger_ends_and_comes_back,
);

/// Who connects and says nothing holds one thread of the node, and leaves none behind.
#[test]
fn a_connection_that_says_nothing_holds_one_thread() {
    let _alone = alone();
    if threads("").is_none() {
        return;
    }
    let net = Net::tcp();
    let directory = tempdir().unwrap();
    let builder = net.node(directory.path()).shards(1).segment_size(1 << 20);
    let leader = builder.handshake_timeout(Duration::from_secs(600)).lead(&net.address).unwrap();
    until("the log's threads end", || threads("tl-prep") == Some(0) && threads("tl-sync") == Some(0));
    // A thread has its name a moment after it was started.
    let of_node = ["tl-accept", "tl-ckpt", "tl-proto", "tl-retain", "tl-scrub"];
    until("the node's threads are there", || of_node.iter().all(|name| threads(name) == Some(1)));
    let before = threads("tl-").unwrap();
    let silent: Vec<_> = (0..20).map(|_| net.connect()).collect();
    until("each has its thread", || threads("tl-agree") == Some(20));
    assert_eq!(threads("tl-"), Some(before + 20));
    drop(silent);
    until("they end", || threads("tl-") == Some(before));
    leader.shutdown().unwrap();
    assert_eq!(threads("tl-"), Some(0));
}
