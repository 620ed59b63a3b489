//! A bounded log: what is kept for whom, what goes, and what the node says about it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use common::raw::{self, follow_request};
use common::until;
use parking_lot::Mutex;
use towline::protocol::{FailureReason, Millis, Mode, Projection, Reason, SessionKind, SessionLimits};
use towline::status::{FollowerStatus, ShardStatus};
use towline::target::{LogOnly, ReplicationTarget};
use towline::transport::{Connection, TcpOptions, TcpTransport, Transport};
use towline::wal::Record;
use towline::wal::scan::Relation;
use towline::wire::{Ack, Message, SessionKind as WireKind, ShardInfo, SyncRequest, VersionRange};
use towline::{
    Chain, Commit, Epoch, Error, Follower, Leader, Lsn, Node, NodeBuilder, NodeId, Outcome, RefusalCode, ShardId,
    WaitStrategy, wait_any,
};

const SEGMENT: u64 = 64 * 1024;
const BOUND: u64 = 16 * SEGMENT;
const SHARD: ShardId = ShardId(0);
/// Fails a test that hangs; nothing is expected to take so long.
const PATIENCE: Duration = Duration::from_secs(60);

fn small(directory: &Path) -> NodeBuilder {
    Node::builder(directory).segment_size(SEGMENT).max_wal_bytes(BOUND).min_wal_bytes(0)
}

fn plain(directory: &Path) -> NodeBuilder {
    Node::builder(directory).max_wal_bytes(BOUND).min_wal_bytes(0)
}

fn soon() -> Option<Instant> {
    Instant::now().checked_add(PATIENCE)
}

fn shard_status(leader: &Leader) -> ShardStatus {
    leader.status().shards.swap_remove(0)
}

fn follower_status(leader: &Leader, node: u64) -> FollowerStatus {
    let followers = shard_status(leader).followers;
    followers.into_iter().find(|follower| follower.node == NodeId(node)).unwrap()
}

/// Bytes of everything in a shard's directory.
fn bytes_in(directory: &Path) -> u64 {
    let files = directory.join("shard-0000").read_dir().unwrap();
    // A file may be renamed or removed between listing and looking.
    files.filter_map(|file| file.ok()?.metadata().ok()).map(|metadata| metadata.len()).sum()
}

fn append_segments(leader: &Leader, writer: &mut towline::wal::LogWriter, segments: u64) -> Lsn {
    let record = vec![7; 4096];
    let mut last = leader.log(SHARD).unwrap().head();
    for _ in 0..segments * SEGMENT / 4096 {
        last = writer.append(&record).unwrap();
    }
    last
}

/// A target that stops taking records until it is let go.
struct Stuck(Mutex<Receiver<()>>);

impl Stuck {
    fn with_release() -> (Sender<()>, Arc<dyn ReplicationTarget>) {
        let (go, wait) = channel();
        (go, Arc::new(Stuck(Mutex::new(wait))))
    }
}

impl ReplicationTarget for Stuck {
    fn durable_applied(&self, _: ShardId) -> towline::Result<Option<Lsn>> {
        Ok(None)
    }

    fn apply(&self, _: ShardId, _: Record<'_>) -> towline::Result<()> {
        // Ends with an error once the sender is gone: from then on everything is taken.
        let _ = self.0.lock().recv();
        Ok(())
    }

    fn sync(&self, _: ShardId) -> towline::Result<()> {
        Ok(())
    }
}

/// A connection that has asked to follow, by hand.
struct ByHand {
    connection: Connection,
    info: ShardInfo,
}

fn request(leader: &Leader, node: u64) -> SyncRequest {
    follow_request(&leader.manifest(), node, SHARD)
}

fn ask(leader: &Leader, request: SyncRequest) -> Result<ByHand, (RefusalCode, String)> {
    let transport = TcpTransport::new(TcpOptions::default());
    let mut connection = transport.connect(leader.local_address(), PATIENCE).unwrap();
    connection.receiver.set_timeout(Some(PATIENCE)).unwrap();
    match raw::ask(&mut connection, request) {
        Ok(info) => Ok(ByHand { connection, info }),
        Err(Error::Refused { code, reason, .. }) => Err((code, reason)),
        Err(error) => panic!("{error}"),
    }
}

impl ByHand {
    /// Reads until the leader ends the stream.
    fn read_to_the_end(&mut self) -> Error {
        raw::read_to_end(&mut self.connection)
    }

    fn acknowledge(&mut self, (lsn, chain): (Lsn, Chain)) {
        raw::acknowledge(&mut self.connection, &self.info, lsn, chain).unwrap();
    }

    /// Has everything up to `lsn` on stable storage, and has applied less.
    fn acknowledge_applied(&mut self, (lsn, chain): (Lsn, Chain), applied: Lsn) {
        let ShardInfo { epoch, session, .. } = self.info;
        let ack = Ack { received: lsn, durable: lsn, applied, chain, epoch, session };
        self.connection.sender.send_message(&Message::Ack(ack)).unwrap();
    }
}

fn follow(leader: &Leader, directory: &Path, node: u64, target: Arc<dyn ReplicationTarget>) -> Follower {
    let builder = plain(directory).node_id(NodeId(node));
    let builder = builder.reconnect(Duration::from_millis(20), Duration::from_millis(200));
    builder.follow(leader.local_address(), target).unwrap()
}

fn wait_for(leader: &Leader, lsn: Lsn, commit: &str) {
    assert_eq!(leader.wait(SHARD, lsn, commit.parse().unwrap(), soon()).unwrap(), Outcome::Committed, "{commit}");
}

#[test]
fn the_answer_follows_from_the_facts() {
    let directory = tempfile::tempdir().unwrap();
    let leader = small(directory.path()).lead("127.0.0.1:0").unwrap();
    let mut writer = leader.writer(SHARD).unwrap();
    let empty = ask(&leader, request(&leader, 2)).ok().unwrap().info;
    assert_eq!((empty.session_kind, empty.target), (WireKind::KeepUp, Lsn::ZERO), "nothing to catch up with");
    for _ in 0..10 {
        writer.append(b"record").unwrap();
    }
    let at = |lsn: u64| {
        let place = leader.log(SHARD).unwrap().position_before(Lsn(lsn).next()).unwrap();
        let lsn = Lsn(lsn);
        SyncRequest { received: lsn, durable: lsn, applied: lsn, chain: place.chain, ..request(&leader, 3) }
    };
    let kinds = [(0, WireKind::CatchUp, 1), (4, WireKind::CatchUp, 5), (10, WireKind::KeepUp, 11)];
    let mut last = empty.session;
    for (lsn, kind, start) in kinds {
        let info = ask(&leader, at(lsn)).ok().unwrap().info;
        assert_eq!((info.session_kind, info.start, info.target), (kind, Lsn(start), Lsn(10)), "from LSN {lsn}");
        assert!(lsn == 0 || info.session > last, "session ids only grow");
        last = info.session;
    }
    let (code, text) = ask(&leader, SyncRequest { received: Lsn(11), ..at(10) }).err().unwrap();
    assert_eq!(code, RefusalCode::LeaderBehind, "{text}");
    assert!(text.contains("it has lost data"), "{text}");
    assert_eq!(follower_status(&leader, 3).mode, Mode::Degraded);
    let (code, text) = ask(&leader, SyncRequest { chain: Chain(1), ..at(4) }).err().unwrap();
    assert_eq!(code, RefusalCode::Diverged, "{text}");
    let older = SyncRequest { epoch: Epoch::ZERO, chain: Chain(1), ..at(4) };
    assert_eq!(ask(&leader, older).err().unwrap().0, RefusalCode::Diverged);
    // Whoever does not know what the log's segments hold gets none of it, and is asked nothing.
    let versions = VersionRange { min: 1, max: 2 };
    for request in [at(4), SyncRequest { chain: Chain(1), ..at(4) }, older] {
        let (code, text) = ask(&leader, SyncRequest { versions, ..request }).err().unwrap();
        assert_eq!(code, RefusalCode::UnsupportedVersion, "{text}");
        assert!(text.contains("segments of version 3") && text.contains("you speak up to 2"), "{text}");
    }
    assert!(ask(&leader, at(10)).is_ok(), "a refusal ends with the first facts that allow a session");
}

#[test]
fn a_newer_stream_of_the_same_follower_takes_over() {
    let directory = tempfile::tempdir().unwrap();
    let leader = small(directory.path()).lead("127.0.0.1:0").unwrap();
    let mut first = ask(&leader, request(&leader, 2)).ok().unwrap();
    let second = ask(&leader, request(&leader, 2)).ok().unwrap();
    assert!(!first.read_to_the_end().is_timeout());
    assert!(second.info.session > first.info.session);
    assert_eq!(follower_status(&leader, 2).mode, Mode::PublishHealthy, "the newer one is not touched");
    assert_eq!(shard_status(&leader).mode, Mode::PublishHealthy);
}

#[test]
fn only_the_followers_that_were_named_may_follow() {
    let directory = tempfile::tempdir().unwrap();
    let leader = small(directory.path()).followers([NodeId(2)]).lead("127.0.0.1:0").unwrap();
    let (code, text) = ask(&leader, request(&leader, 3)).err().unwrap();
    assert_eq!(code, RefusalCode::WrongTopology, "{text}");
    assert_eq!(follower_status(&leader, 2).reason, Some(Reason::AwaitingShipperConnected));
    assert!(ask(&leader, request(&leader, 2)).is_ok());
}

#[test]
fn laggards_neither_fill_the_disk_nor_stop_appends() {
    const SEGMENT: u64 = 1 << 20;
    const BOUND: u64 = 16 * SEGMENT;
    let directory = tempfile::tempdir().unwrap();
    let of = |name: &str| directory.path().join(name);
    let leader = small(&of("leader")).segment_size(SEGMENT).max_wal_bytes(BOUND).lead("127.0.0.1:0").unwrap();
    let mut writer = leader.writer(SHARD).unwrap();
    // One came and stopped; one is connected and reads nothing; one applies nothing after its first record.
    let stopped = follow(&leader, &of("stopped"), 2, Arc::new(LogOnly));
    let first = writer.append(b"first").unwrap();
    wait_for(&leader, first, "durable:1");
    // Or it might stop before it says so.
    wait_for(&leader, first, "applied:1");
    stopped.shutdown().unwrap();
    let mut silent = ask(&leader, request(&leader, 3)).ok().unwrap();
    let (go, stuck) = Stuck::with_release();
    let stuck = follow(&leader, &of("stuck"), 4, stuck);
    // Dropped before the follower, whose end waits for its target.
    let go = go;
    go.send(()).unwrap();
    wait_for(&leader, first, "applied:2");

    let spares = 2 + 1;
    let mut most = 0;
    for _ in 0..60 {
        let last = append_segments(&leader, &mut writer, 16);
        wait_for(&leader, last, "synced");
        most = most.max(bytes_in(&of("leader")));
    }
    assert!(most > BOUND / 2, "{most} bytes: the log was held on to");
    assert!(most <= BOUND + (1 + spares) * SEGMENT, "{most} bytes at most");
    for node in [2, 3, 4] {
        until("losing its place", || follower_status(&leader, node).place_lost);
    }
    let lost = Some(Reason::Failed(FailureReason::PinLost));
    assert_eq!(follower_status(&leader, 3).reason, lost);
    assert!(!silent.read_to_the_end().is_timeout(), "its stream was ended");
    assert_eq!(follower_status(&leader, 2).reason, Some(Reason::Failed(FailureReason::TransportLost)));
    // Whoever comes back is told, and why is there for all to see.
    let (code, text) = ask(&leader, request(&leader, 3)).err().unwrap();
    assert_eq!(code, RefusalCode::NotRetained, "{text}");
    let status = follower_status(&leader, 3);
    assert_eq!(status.reason, Some(Reason::Failed(FailureReason::BaseUnavailable)));
    assert_eq!(status.session.unwrap().kind, SessionKind::Rebuild);
    assert_eq!(shard_status(&leader).mode, Mode::Degraded);
    drop(go);
    drop(stuck);
}

#[test]
fn log_is_kept_for_the_followers_of_an_earlier_run() {
    let directory = tempfile::tempdir().unwrap();
    let of = |name: &str| directory.path().join(name);
    let last = {
        let leader = small(&of("leader")).lead("127.0.0.1:0").unwrap();
        let mut writer = leader.writer(SHARD).unwrap();
        let follower = follow(&leader, &of("follower"), 2, Arc::new(LogOnly));
        let last = append_segments(&leader, &mut writer, 3);
        wait_for(&leader, last, "durable:1");
        wait_for(&leader, last, "applied:1");
        follower.shutdown().unwrap();
        leader.shutdown().unwrap();
        last
    };
    let leader = small(&of("leader")).lead("127.0.0.1:0").unwrap();
    assert_eq!(follower_status(&leader, 2).reason, Some(Reason::AwaitingShipperConnected), "it is known");
    let mut writer = leader.writer(SHARD).unwrap();
    let head = append_segments(&leader, &mut writer, 5);
    assert!(leader.log(SHARD).unwrap().tail() <= last.next());
    let follower = follow(&leader, &of("follower"), 2, Arc::new(LogOnly));
    wait_for(&leader, head, "applied:1");
    wait_for(&leader, head, "durable:1");
    drop(follower);
    until("being given up", || leader.log(SHARD).unwrap().tail() > last);
    leader.forget_follower(NodeId(2)).unwrap();
    assert_eq!(shard_status(&leader).followers, []);
}

#[test]
fn a_follower_bounds_its_own_log_by_what_it_has_applied() {
    let directory = tempfile::tempdir().unwrap();
    let of = |name: &str| directory.path().join(name);
    let leader = small(&of("leader")).max_wal_bytes(None).lead("127.0.0.1:0").unwrap();
    let mut writer = leader.writer(SHARD).unwrap();
    let follower = follow(&leader, &of("follower"), 2, Arc::new(LogOnly));
    let last = append_segments(&leader, &mut writer, 3 * BOUND / SEGMENT);
    wait_for(&leader, last, "applied:1");
    wait_for(&leader, last, "durable:1");
    until("keeping within the bound", || follower.log(SHARD).unwrap().retained_bytes() <= BOUND);
    assert!(follower.log(SHARD).unwrap().retained_bytes() > BOUND / 2, "no more than needed");
    assert_eq!(shard_status(&leader).mode, Mode::PublishHealthy);
    assert_eq!(follower.status().shards[0].mode, Mode::ReplicaReady);
    leader.shutdown().unwrap();
    until("noticing", || follower.status().shards[0].reason == Some(Reason::AwaitingReceiverReady));
}

#[test]
fn a_damaged_list_of_followers_is_an_error_that_names_the_file() {
    let directory = tempfile::tempdir().unwrap();
    drop(small(directory.path()).lead("127.0.0.1:0").unwrap());
    let path = directory.path().join("followers");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[17] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = small(directory.path()).lead("127.0.0.1:0").unwrap_err();
    assert!(error.is_corruption() && error.to_string().contains("followers"), "{error}");
}

#[test]
fn a_pin_holds_the_log_and_says_for_whom() {
    let directory = tempfile::tempdir().unwrap();
    let of = |name: &str| directory.path().join(name);
    let leader = small(&of("leader")).lead("127.0.0.1:0").unwrap();
    let log = Arc::clone(leader.log(SHARD).unwrap());
    let mut writer = leader.writer(SHARD).unwrap();
    let _follower = follow(&leader, &of("follower"), 2, Arc::new(LogOnly));
    let first = writer.append(b"first").unwrap();
    let pin = leader.pin(SHARD, "archiver", "copying", first).unwrap();
    let middle = append_segments(&leader, &mut writer, 4);
    let last = append_segments(&leader, &mut writer, 4);
    wait_for(&leader, last, "synced+applied:1");
    wait_for(&leader, last, "durable:1");
    let pins = shard_status(&leader).pins;
    assert!(pins.iter().any(|pin| (pin.owner.as_str(), pin.lsn) == ("archiver", first)), "{pins:?}");
    assert_eq!(log.tail(), first);
    pin.move_to(middle);
    until("letting go up to the pin", || log.tail() > first);
    assert!(log.tail() <= middle);
    // The log outgrows its bound: then no pin holds it.
    let head = append_segments(&leader, &mut writer, 2 * BOUND / SEGMENT);
    until("losing the pin", || pin.is_lost());
    assert!(leader.pin(SHARD, "archiver", "copying", middle).is_err());
    drop(pin);
    wait_any(&[log.synced().until(head)], WaitStrategy::Park, soon());
    assert!(!shard_status(&leader).pins.iter().any(|pin| pin.owner == "archiver"));
}

#[test]
fn a_session_that_runs_out_of_time_ends_with_its_stream() {
    const NEVER: Millis = Millis(1 << 40);
    let directory = tempfile::tempdir().unwrap();
    let soon = Millis(50);
    let cases = [(soon, NEVER, FailureReason::DeadlineExceeded), (NEVER, soon, FailureReason::ProgressStalled)];
    for (deadline, stall, reason) in cases {
        let limits =
            SessionLimits { catch_up_deadline_ms: deadline, rebuild_deadline_ms: NEVER, stall_budget_ms: stall };
        let (publish, published) = channel::<Projection>();
        let leader = small(&directory.path().join(reason.as_str()))
            .session_limits(limits)
            .on_projection(move |projection| {
                let _ = publish.send(projection.clone());
            })
            .lead("127.0.0.1:0")
            .unwrap();
        leader.writer(SHARD).unwrap().append(b"record").unwrap();
        let mut stream = ask(&leader, request(&leader, 2)).ok().unwrap();
        assert_eq!(stream.info.session_kind, WireKind::CatchUp);
        assert!(!stream.read_to_the_end().is_timeout());
        let failed = Some(Reason::Failed(reason));
        assert_eq!(follower_status(&leader, 2).reason, failed);
        leader.shutdown().unwrap();
        let last = published.iter().last().unwrap();
        assert_eq!((last.mode, last.reason), (Mode::Degraded, failed));
    }
}

#[test]
fn a_catch_up_becomes_a_keep_up_on_the_same_stream() {
    let directory = tempfile::tempdir().unwrap();
    let leader = small(directory.path()).lead("127.0.0.1:0").unwrap();
    let mut writer = leader.writer(SHARD).unwrap();
    let last = writer.append(b"record").unwrap();
    let mut stream = ask(&leader, request(&leader, 2)).ok().unwrap();
    stream.acknowledge((last, writer.end().chain));
    until("keeping up", || {
        follower_status(&leader, 2).session.is_some_and(|session| session.kind == SessionKind::KeepUp)
    });
    assert_eq!(shard_status(&leader).mode, Mode::PublishHealthy);
    let last = writer.append(b"record").unwrap();
    stream.acknowledge((last, writer.end().chain));
    wait_for(&leader, last, "durable:1");
}

#[test]
fn what_a_follower_has_not_applied_is_kept_although_it_is_durable_there() {
    let directory = tempfile::tempdir().unwrap();
    let leader = small(directory.path()).lead("127.0.0.1:0").unwrap();
    let log = Arc::clone(leader.log(SHARD).unwrap());
    let mut writer = leader.writer(SHARD).unwrap();
    // It has everything on stable storage, and its target is still at the first record.
    let mut stream = ask(&leader, request(&leader, 2)).ok().unwrap();
    let head = append_segments(&leader, &mut writer, 4);
    let chain = writer.end().chain;
    stream.acknowledge_applied((head, chain), Lsn::ZERO);
    wait_for(&leader, head, "synced+durable:1");
    // Then somebody else has all of it, so that retention looks at what is needed.
    let mut other = ask(&leader, request(&leader, 3)).ok().unwrap();
    other.acknowledge((head, chain));
    wait_for(&leader, head, "applied:1");
    append_segments(&leader, &mut writer, 4);
    stream.acknowledge_applied((head, chain), Lsn(8));
    until("saying what is applied", || follower_status(&leader, 2).applied == Lsn(8));
    assert_eq!(log.tail(), Lsn(1));
    drop(stream);
    let again = SyncRequest { received: head, durable: head, applied: Lsn(8), chain, ..request(&leader, 2) };
    assert_eq!(ask(&leader, again).ok().unwrap().info.session_kind, WireKind::CatchUp);
}

#[test]
fn a_follower_that_says_late_what_it_has_applied_has_its_place_again() {
    let directory = tempfile::tempdir().unwrap();
    let leader = small(directory.path()).lead("127.0.0.1:0").unwrap();
    let log = Arc::clone(leader.log(SHARD).unwrap());
    let mut writer = leader.writer(SHARD).unwrap();
    let head = append_segments(&leader, &mut writer, 4);
    let chain = writer.end().chain;
    wait_for(&leader, head, "synced");
    let mut stream = ask(&leader, request(&leader, 2)).ok().unwrap();
    stream.acknowledge((head, chain));
    until("being given up", || log.tail() > Lsn(1));
    // As one that has led, and does not know yet how much of its log is the new leader's.
    let again = SyncRequest { received: head, durable: head, chain, ..request(&leader, 2) };
    let mut stream = ask(&leader, again).ok().unwrap();
    assert_eq!(stream.info.session_kind, WireKind::KeepUp);
    assert!(follower_status(&leader, 2).place_lost, "what it would have to apply is gone");
    stream.acknowledge((head, chain));
    until("having its place", || !follower_status(&leader, 2).place_lost);
    drop(stream);
    let newer = append_segments(&leader, &mut writer, 4);
    wait_for(&leader, newer, "synced");
    assert!(log.tail() <= head.next(), "it is kept for it");
    let behind = SyncRequest { applied: head, ..again };
    assert_eq!(ask(&leader, behind).ok().unwrap().info.session_kind, WireKind::CatchUp);
}

#[test]
fn forgotten_followers_and_refused_strangers_leave_room() {
    const MOST: u64 = 64;
    let directory = tempfile::tempdir().unwrap();
    let of = |name: &str| directory.path().join(name);
    let leader = small(&of("forgetful")).lead("127.0.0.1:0").unwrap();
    let commits = Arc::clone(leader.commits(SHARD).unwrap());
    let mut writer = leader.writer(SHARD).unwrap();
    let first = writer.append(b"first").unwrap();
    for node in 100..100 + MOST {
        let mut stream = ask(&leader, request(&leader, node)).ok().unwrap();
        stream.acknowledge((first, writer.end().chain));
        wait_for(&leader, first, &format!("durable:{}", node - 99));
    }
    assert_eq!(ask(&leader, request(&leader, 2)).err().unwrap().0, RefusalCode::TooManyConnections);
    for node in 100..100 + MOST {
        leader.forget_follower(NodeId(node)).unwrap();
    }
    assert!(commits.followers().is_empty());
    let mut stream = ask(&leader, request(&leader, 2)).ok().unwrap();
    stream.acknowledge((first, writer.end().chain));
    let second = writer.append(b"second").unwrap();
    stream.acknowledge((second, writer.end().chain));
    wait_for(&leader, second, "durable:1");
    assert_eq!(leader.wait(SHARD, first, "durable:2".parse().unwrap(), soon()).unwrap(), Outcome::Committed, "it was");
    let outcome = leader.wait(SHARD, second, "durable:2".parse().unwrap(), Some(Instant::now())).unwrap();
    assert_eq!(outcome, Outcome::TimedOut, "one follower exists");

    let leader = small(&of("told whom to have")).followers([NodeId(2)]).lead("127.0.0.1:0").unwrap();
    for node in 100..100 + MOST {
        assert_eq!(ask(&leader, request(&leader, node)).err().unwrap().0, RefusalCode::WrongTopology);
    }
    assert!(ask(&leader, request(&leader, 2)).is_ok());
}

/// What breaks: a segment goes while a follower that has all of its records is away. How: the batch that seals it came
/// only after that, so that the follower's log goes on with it. What prevents harm: the segment stays until the
/// follower has a record of the next one.
#[test]
fn a_segment_stays_for_who_may_not_have_the_batch_that_seals_it() {
    let (_parent, a, b) = common::directories();
    let leader = small(&a).lead("127.0.0.1:0").unwrap();
    let follow = || {
        let builder = common::quick(plain(&b)).node_id(NodeId(2));
        builder.follow(leader.local_address(), Arc::new(LogOnly)).unwrap()
    };
    let follower = follow();
    let mut writer = leader.writer(SHARD).unwrap();
    let mut last = Lsn::ZERO;
    while writer.end().offset + 4200 < SEGMENT {
        last = writer.append(&[7; 4096]).unwrap();
    }
    common::catch_up(&leader, &follower);
    common::until("it is known to have all", || {
        let known = follower_status(&leader, 2);
        (known.durable, known.applied) == (last, last)
    });
    follower.shutdown().unwrap();
    assert_eq!(writer.end().segment, Lsn(1), "the segment is full, and not sealed");
    let head = append_segments(&leader, &mut writer, 3);
    assert!(leader.wait(SHARD, head, Commit::SYNCED, soon()).unwrap().is_committed());

    let follower = follow();
    common::catch_up(&leader, &follower);
    common::until("the first segment goes", || leader.log(SHARD).unwrap().tail() > last);
    follower.shutdown().unwrap();
    drop(writer);
    leader.shutdown().unwrap();
    assert_eq!(common::compare(&a, &b, SHARD).relation, Relation::Identical);
}
