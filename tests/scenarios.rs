//! A leader and followers, over TCP and within a process: each scenario runs over both.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::net::Net;
use common::raw::{acknowledge, ask, chain_at, continuing, follow_request, next_data, read_to_end};
use common::{
    Checked, append, assert_identical, catch_up, deadline, reach, record, records_of, shards, until, writers,
};
use tempfile::TempDir;
use towline::target::ReplicationTarget;
use towline::transport::{is_closed_by_peer, receive_segment};
use towline::types::shard_directory_name;
use towline::wal::scan::{Relation, verify_log};
use towline::wal::{KnownSynced, LogIdentity, LogWriter, Record, Wal, WalOptions};
use towline::wire::{
    FrameKind, Message, PROTOCOL_VERSIONS, Purpose, SessionKind, ShardInfo, SyncAck, WalSegmentPayload,
};
use towline::{AckLevel, Commit, Epoch, Error, Leader, Lsn, NodeId, Outcome, SessionId, ShardId};

const S0: ShardId = ShardId(0);

over_both![
    one_follower_streams_live,
    two_followers_stream_live,
    four_followers_stream_live,
    a_follower_that_joins_late_catches_up_while_writes_go_on,
    a_restarted_follower_goes_on_where_it_stopped,
    a_stream_begins_exactly_where_the_follower_ends,
    a_follower_without_memory_is_given_nothing_twice_after_a_clean_stop,
    a_target_that_overwrites_in_place_keeps_up,
    a_target_that_takes_no_records_is_given_none,
    followers_come_back_to_a_restarted_leader,
    a_follower_that_does_not_read_delays_nobody,
    a_newer_stream_of_the_same_node_takes_over,
    waiting_for_a_commit_has_typed_ends,
    committed_follows_the_policy,
    whoever_waits_ships,
    whoever_ships_waits_for_nobody_else,
    what_does_not_fit_into_the_stream_at_once_is_sent_without_a_heartbeat,
    haste_reaches_an_idle_follower,
    a_newer_epoch_deposes_the_leader,
    an_epoch_change_starts_a_new_segment_everywhere,
    a_restart_under_a_newer_epoch_goes_on,
    a_clean_stop_ships_what_is_pending,
    a_stop_does_not_wait_for_a_follower_that_does_not_read,
    a_segment_sent_by_hand_becomes_part_of_a_log,
    every_size_of_record_arrives,
];

/// Directories of a leader and of followers by number.
fn directories() -> (TempDir, impl Fn(u64) -> std::path::PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().to_owned();
    (parent, move |node| path.join(if node == 0 { "leader".to_owned() } else { format!("follower-{node}") }))
}

fn one_follower_streams_live(net: &Net) {
    stream_live(net, 1);
}

fn two_followers_stream_live(net: &Net) {
    stream_live(net, 2);
}

fn four_followers_stream_live(net: &Net) {
    stream_live(net, 4);
}

fn stream_live(net: &Net, count: u64) {
    const SHARDS: u16 = 3;
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), SHARDS);
    let targets: Vec<_> = (1..=count).map(|_| Checked::new(SHARDS)).collect();
    let followers: Vec<_> =
        (1..=count).zip(&targets).map(|(node, target)| net.follow(&at(node), node, target)).collect();

    let heads: Vec<_> = std::thread::scope(|scope| {
        let appending = |mut writer: LogWriter| {
            let count = 1500 + u64::from(writer.log().shard().0) * 100;
            scope.spawn(move || append(&mut writer, count).get())
        };
        let threads: Vec<_> = writers(&leader).into_iter().map(appending).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(heads, [1500, 1600, 1700]);
    followers.iter().for_each(|follower| catch_up(&leader, follower));

    // The leader hears of it, too.
    for (shard, &head) in shards(SHARDS).zip(&heads) {
        let commit = Commit::followers(AckLevel::Applied, usize::try_from(count).unwrap()).unwrap().and_synced();
        assert_eq!(leader.wait(shard, Lsn(head), commit, Some(deadline())).unwrap(), Outcome::Committed);
        let commit = Commit::followers(AckLevel::Durable, usize::try_from(count).unwrap()).unwrap();
        assert_eq!(leader.wait(shard, Lsn(head), commit, Some(deadline())).unwrap(), Outcome::Committed);
    }
    leader.shutdown().unwrap();
    for (follower, (node, target)) in followers.into_iter().zip((1..).zip(&targets)) {
        follower.shutdown().unwrap();
        assert_identical(&at(0), &at(node), &heads);
        target.assert_saw(&heads);
        assert_eq!(target.again(), 0);
    }
}

fn a_follower_that_joins_late_catches_up_while_writes_go_on(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 1);
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 2000);
    let enough = AtomicBool::new(false);
    let target = Checked::new(1);
    let (head, follower) = std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            while !enough.load(Ordering::Relaxed) {
                append(&mut writer, 10);
                std::thread::yield_now();
            }
            writer.end().head
        });
        let follower = net.follow(&at(1), 1, &target);
        // Past what was there before it joined, and then past what came while it caught up.
        reach(follower.applied(S0).unwrap(), Lsn(2001), "catching up");
        let meanwhile = leader.log(S0).unwrap().head();
        reach(follower.applied(S0).unwrap(), meanwhile.next(), "keeping up");
        enough.store(true, Ordering::Relaxed);
        (writing.join().unwrap(), follower)
    });
    catch_up(&leader, &follower);
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    assert_identical(&at(0), &at(1), &[head.get()]);
    target.assert_saw(&[head.get()]);
    assert_eq!(target.again(), 0);
}

fn a_restarted_follower_goes_on_where_it_stopped(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 2);
    let mut writers = writers(&leader);
    let target = Checked::new(2);
    for round in 1..=4 {
        let follower = net.follow(&at(1), 1, &target);
        for writer in writers.iter_mut() {
            append(writer, 300);
        }
        catch_up(&leader, &follower);
        follower.shutdown().unwrap();
        // What is appended while it is away comes in the next round.
        for writer in writers.iter_mut() {
            append(writer, 100);
        }
        assert_eq!(target.last(S0), Lsn(round * 400 - 100));
    }
    let follower = net.follow(&at(1), 1, &target);
    catch_up(&leader, &follower);
    let known = leader.status().shards[0].followers.len();
    assert_eq!(known, 1, "it is the same node each time");
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    assert_identical(&at(0), &at(1), &[1600, 1600]);
    target.assert_saw(&[1600, 1600]);
    assert_eq!(target.again(), 0);
}

fn a_stream_begins_exactly_where_the_follower_ends(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 1);
    let mut writer = leader.writer(S0).unwrap();
    for count in [0, 1, 699, 800] {
        append(&mut writer, count);
        let end = writer.end();
        let mut connection = net.connect();
        let info = ask(&mut connection, continuing(follow_request(&leader.manifest(), 7, S0), end)).unwrap();
        assert_eq!((info.start, info.head, info.target), (end.head.next(), end.head, end.head));
        assert_eq!((info.start_segment, info.start_offset), (end.segment, end.offset));
        assert_eq!(info.session_kind, SessionKind::KeepUp, "also of an empty log");
        append(&mut writer, 1);
        let (header, mut bytes) = next_data(&mut connection).unwrap();
        assert_eq!((header.segment, header.offset), (end.segment, end.offset));
        let text = record(S0, end.head.next());
        // The header of a new segment can come by itself.
        while !bytes.windows(text.len()).any(|window| window == text) {
            bytes.extend(next_data(&mut connection).unwrap().1);
        }
    }
}

fn a_follower_without_memory_is_given_nothing_twice_after_a_clean_stop(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 1);
    let mut writer = leader.writer(S0).unwrap();
    let target = Checked::forgetful(1);
    for _ in 0..3 {
        let follower = net.follow(&at(1), 1, &target);
        let head = append(&mut writer, 200);
        reach(follower.applied(S0).unwrap(), head, "applying");
        follower.shutdown().unwrap();
        assert_eq!(target.again(), 0, "the checkpoint says how far it came");
    }
    let follower = net.follow(&at(1), 1, &target);
    let head = append(&mut writer, 1);
    reach(follower.applied(S0).unwrap(), head, "applying");
    assert_eq!(target.again(), 0);
    target.assert_saw(&[601]);
}

/// Such a target's applier waits for syncs of what it has read a moment ago, again and again.
fn a_target_that_overwrites_in_place_keeps_up(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 2);
    let target = Checked::in_place(2);
    let follower = net.follow(&at(1), 1, &target);
    let mut writers = writers(&leader);
    for _ in 0..30 {
        for writer in writers.iter_mut() {
            append(writer, 100);
        }
        for (shard, writer) in shards(2).zip(&writers) {
            reach(follower.applied(shard).unwrap(), writer.end().head, "applying");
            let log = follower.log(shard).unwrap();
            assert!(log.synced().load() >= writer.end().head && log.written().load() >= writer.end().head);
        }
    }
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    assert_identical(&at(0), &at(1), &[3000, 3000]);
    target.assert_saw(&[3000, 3000]);
}

/// Takes no records, and fails if it is given one.
struct Indifferent {
    keeps_state: bool,
}

impl ReplicationTarget for Indifferent {
    fn durable_applied(&self, _: ShardId) -> towline::Result<Option<Lsn>> {
        Ok(None)
    }

    fn apply(&self, _: ShardId, _: Record<'_>) -> towline::Result<()> {
        Err(Error::Invalid { reason: "it takes no records".into() })
    }

    fn sync(&self, _: ShardId) -> towline::Result<()> {
        Ok(())
    }

    fn takes_records(&self) -> bool {
        false
    }

    fn keeps_state(&self) -> bool {
        self.keeps_state
    }
}

fn a_target_that_takes_no_records_is_given_none(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 1);
    let mut writer = leader.writer(S0).unwrap();
    for (round, keeps_state) in [(1, false), (2, true)] {
        let target = Arc::new(Indifferent { keeps_state });
        let follower = net.node(&at(1)).node_id(NodeId(1)).follow(&net.address, target).unwrap();
        let head = append(&mut writer, 300);
        let commit = Commit::followers(AckLevel::Applied, 1).unwrap();
        assert_eq!(leader.wait(S0, head, commit, Some(deadline())).unwrap(), Outcome::Committed);
        assert_eq!((head, follower.applied(S0).unwrap().load()), (Lsn(round * 300), head));
        follower.shutdown().unwrap();
    }
    leader.shutdown().unwrap();
    assert_identical(&at(0), &at(1), &[600]);
}

fn followers_come_back_to_a_restarted_leader(net: &Net) {
    let (_parent, at) = directories();
    let targets = [Checked::new(2), Checked::new(2)];
    let mut leader = net.lead(&at(0), 2);
    let followers: Vec<_> = (1..).zip(&targets).map(|(node, target)| net.follow(&at(node), node, target)).collect();
    let cluster = leader.manifest();
    for round in 1..=3 {
        writers(&leader).iter_mut().for_each(|writer| assert_eq!(append(writer, 250), Lsn(round * 250)));
        followers.iter().for_each(|follower| catch_up(&leader, follower));
        leader.shutdown().unwrap();
        leader = net.lead(&at(0), 2);
        assert_eq!(leader.manifest(), cluster);
    }
    for writer in &mut writers(&leader) {
        append(writer, 50);
    }
    followers.iter().for_each(|follower| catch_up(&leader, follower));
    leader.shutdown().unwrap();
    for (follower, (node, target)) in followers.into_iter().zip((1..).zip(&targets)) {
        follower.shutdown().unwrap();
        assert_identical(&at(0), &at(node), &[800, 800]);
        target.assert_saw(&[800, 800]);
        assert_eq!(target.again(), 0);
    }
}

fn a_follower_that_does_not_read_delays_nobody(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.node(&at(0)).segment_size(1 << 20).drain_timeout(Duration::ZERO).lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    let mut stalled = net.connect();
    ask(&mut stalled, follow_request(&leader.manifest(), 66, S0)).unwrap();

    let follower = net.node(&at(1)).follow(&net.address, Arc::new(towline::target::LogOnly)).unwrap();
    // Each round goes to the healthy follower before the next one begins, until more is pending for the other than any
    // buffer between takes.
    let most = 64 << 20;
    let mut appended = 0;
    let lag = |leader: &Leader| {
        let status = leader.status();
        let node = status.shards[0].followers.iter().find(|follower| follower.node == NodeId(66)).cloned();
        node.map_or(0, |follower| status.shards[0].head.records_since(follower.shipped))
    };
    while lag(&leader) < 32 {
        let mut head = Lsn::ZERO;
        for _ in 0..4 {
            head = writer.append(&[7; 64 * 1024]).unwrap();
        }
        appended += 4 * 64 * 1024;
        assert!(appended < most, "a stream that nobody reads goes on taking bytes");
        reach(follower.applied(S0).unwrap(), head, "the healthy follower");
    }
    assert!(
        leader.wait(S0, writer.end().head, "received:1".parse().unwrap(), Some(deadline())).unwrap().is_committed()
    );
    let outcome = leader.wait(S0, writer.end().head, "received:2".parse().unwrap(), Some(Instant::now())).unwrap();
    assert_eq!(outcome, Outcome::TimedOut);
    drop(stalled);
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    assert_eq!(common::compare(&at(0), &at(1), S0).relation, Relation::Identical);
}

fn a_newer_stream_of_the_same_node_takes_over(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 2);
    let mut writers = writers(&leader);
    let request = |shard| follow_request(&leader.manifest(), 7, shard);
    let mut older = net.connect();
    ask(&mut older, request(S0)).unwrap();
    let mut of_other_shard = net.connect();
    ask(&mut of_other_shard, request(ShardId(1))).unwrap();
    let mut of_other_node = net.connect();
    ask(&mut of_other_node, follow_request(&leader.manifest(), 8, S0)).unwrap();
    append(&mut writers[0], 5);
    next_data(&mut older).unwrap();

    let mut newer = net.connect();
    let info = ask(&mut newer, request(S0)).unwrap();
    let told = read_to_end(&mut older);
    assert!(matches!(told, Error::Refused { code: towline::RefusalCode::Superseded, .. }), "{told}");
    let head = append(&mut writers[0], 5);
    next_data(&mut newer).unwrap();
    acknowledge(&mut newer, &info, head, writers[0].end().chain).unwrap();
    let commits = leader.commits(S0).unwrap();
    assert_eq!(commits.wait(head, "durable:1".parse().unwrap(), Some(deadline())), Outcome::Committed);
    // Still one follower, though it has connected twice; the streams of others go on.
    assert_eq!(commits.wait(head, "durable:2".parse().unwrap(), Some(Instant::now())), Outcome::TimedOut);
    assert_eq!(commits.followers().len(), 2);
    append(&mut writers[1], 1);
    next_data(&mut of_other_shard).unwrap();
    next_data(&mut of_other_node).unwrap();
}

fn waiting_for_a_commit_has_typed_ends(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 2);
    let mut writer = leader.writer(S0).unwrap();
    let wait =
        |leader: &Leader, lsn, commit: &str, deadline| leader.wait(S0, lsn, commit.parse().unwrap(), deadline).unwrap();
    for commit in ["synced", "received:1", "durable:1", "applied:1", "synced+durable:2"] {
        assert_eq!(wait(&leader, Lsn(1), commit, None), Outcome::NotWritten, "{commit}");
    }
    let head = append(&mut writer, 10);
    assert_eq!(wait(&leader, head, "synced", None), Outcome::Committed);
    assert_eq!(wait(&leader, head.next(), "synced", None), Outcome::NotWritten);
    // Nobody follows: no number of followers can have it.
    for commit in ["received:1", "durable:1", "applied:1", "synced+received:1"] {
        assert_eq!(wait(&leader, head, commit, Some(Instant::now())), Outcome::TimedOut, "{commit}");
    }
    assert!(leader.wait(ShardId(2), head, Commit::SYNCED, None).unwrap_err().to_string().contains("no shard 2"));

    // Whoever waits already gets what a follower brings that comes later.
    let follower = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| wait(&leader, head, "synced+applied:1", Some(deadline())));
        let follower = net.follow(&at(1), 1, &Checked::new(2));
        assert_eq!(waiting.join().unwrap(), Outcome::Committed);
        follower
    });
    for commit in ["received:1", "durable:1", "applied:1", "synced+durable:1"] {
        assert_eq!(wait(&leader, head, commit, Some(deadline())), Outcome::Committed, "{commit}");
    }
    // One is not two, and what one shard has says nothing of another.
    assert_eq!(wait(&leader, head, "received:2", Some(Instant::now())), Outcome::TimedOut);
    assert_eq!(leader.wait(ShardId(1), Lsn(1), "received:1".parse().unwrap(), None).unwrap(), Outcome::NotWritten);
    // The follower leaves; what it has acknowledged stays acknowledged, what comes is not.
    follower.shutdown().unwrap();
    let later = append(&mut writer, 1);
    assert_eq!(wait(&leader, head, "durable:1", Some(Instant::now())), Outcome::Committed);
    assert_eq!(wait(&leader, later, "durable:1", Some(Instant::now())), Outcome::TimedOut);

    let commits = Arc::clone(leader.commits(S0).unwrap());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| commits.wait(later, "durable:1".parse().unwrap(), None));
        leader.shutdown().unwrap();
        assert_eq!(waiting.join().unwrap(), Outcome::ShutDown);
    });
    assert_eq!(commits.wait(later, Commit::SYNCED, None), Outcome::Committed, "stopping has synced it");
    assert!(writer.append(b"late").unwrap_err().is_shutdown());
    assert!(commits.append_and_wait(&mut writer, &[b"late"], Commit::SYNCED, None).unwrap_err().is_shutdown());
}

fn committed_follows_the_policy(net: &Net) {
    let (_parent, at) = directories();
    let builder = net.node(&at(0)).commit("synced+durable:2".parse().unwrap());
    let leader = builder.lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    let commits = Arc::clone(leader.commits(S0).unwrap());
    append(&mut writer, 10);
    let request = |node| follow_request(&leader.manifest(), node, S0);
    let (mut a, mut b) = (net.connect(), net.connect());
    let (info_a, info_b) = (ask(&mut a, request(1)).unwrap(), ask(&mut b, request(2)).unwrap());
    let wait = |lsn, commit: &str| commits.wait(lsn, commit.parse().unwrap(), Some(deadline()));
    let log = leader.log(S0).unwrap();
    let acknowledge = |stream: &mut _, info, lsn| acknowledge(stream, info, Lsn(lsn), chain_at(log, Lsn(lsn))).unwrap();
    acknowledge(&mut a, &info_a, 8);
    assert_eq!(wait(Lsn(8), "synced+durable:1"), Outcome::Committed);
    assert_eq!(commits.committed(), Lsn::ZERO, "one of two has something");
    acknowledge(&mut b, &info_b, 7);
    assert_eq!(wait(Lsn(7), "durable:2"), Outcome::Committed);
    assert_eq!(commits.committed(), Lsn(7), "what both have");
    acknowledge(&mut b, &info_b, 10);
    assert_eq!(wait(Lsn(8), "durable:2"), Outcome::Committed);
    assert_eq!(commits.committed(), Lsn(8));
    let status = leader.status();
    assert_eq!((status.shards[0].committed, status.shards[0].head), (Lsn(8), Lsn(10)));
    // A follower that says less than it did is believed, but what is committed stays so.
    acknowledge(&mut a, &info_a, 2);
    until("the smaller mark is taken in", || commits.followers()[0].at(AckLevel::Durable) == Lsn(2));
    assert_eq!(commits.committed(), Lsn(8));
}

/// With no automatic syncs and no more data, only the leader's word makes a follower sync and say so.
/// Threads that append and wait in one call, beside one that only appends, ship from several threads: every record
/// arrives once, in order, and is committed as asked.
fn whoever_waits_ships(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 2);
    let targets = [Checked::new(2), Checked::new(2)];
    let followers = [net.follow(&at(1), 1, &targets[0]), net.follow(&at(2), 2, &targets[1])];
    let heads: Vec<u64> = std::thread::scope(|scope| {
        let committing = |mut writer: LogWriter| {
            let leader = &leader;
            scope.spawn(move || {
                let shard = writer.log().shard();
                for (number, commit) in
                    (1..=300u64).zip(["durable:1", "applied:2", "synced", "received:2"].into_iter().cycle())
                {
                    let commit: Commit = commit.parse().unwrap();
                    let next = record(shard, Lsn(number));
                    let (lsn, outcome) =
                        leader.append_and_wait(&mut writer, &[next], commit, Some(deadline())).unwrap();
                    assert_eq!((lsn, outcome), (Lsn(number), Outcome::Committed), "shard {shard}, {commit}");
                }
                append(&mut writer, 50).get()
            })
        };
        let threads: Vec<_> = writers(&leader).into_iter().map(committing).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(heads, [350, 350]);
    followers.iter().for_each(|follower| catch_up(&leader, follower));
    leader.shutdown().unwrap();
    for (follower, (node, target)) in followers.into_iter().zip((1..).zip(&targets)) {
        follower.shutdown().unwrap();
        assert_identical(&at(0), &at(node), &heads);
        target.assert_saw(&heads);
    }
}

/// A follower that acknowledges but reads no more takes what fits in the stream. Whoever appends and waits is then not
/// held up past the deadline, and the other follower has everything that was asked of one.
fn whoever_ships_waits_for_nobody_else(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.node(&at(0)).segment_size(1 << 20).drain_timeout(Duration::ZERO).lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    let mut stalled = net.connect();
    let info = ask(&mut stalled, follow_request(&leader.manifest(), 66, S0)).unwrap();
    let follower = net.node(&at(1)).follow(&net.address, Arc::new(towline::target::LogOnly)).unwrap();
    let one: Commit = "received:1".parse().unwrap();
    let two: Commit = "received:2".parse().unwrap();
    let lag = || {
        let known = leader.commits(S0).unwrap().followers();
        known.iter().find(|known| known.node() == NodeId(66)).map_or(0, |known| known.shipped().get())
    };
    let mut appended = 0;
    let mut last = Lsn::ZERO;
    while last.records_since(Lsn(lag())) < 32 {
        let (lsn, outcome) = leader.append_and_wait(&mut writer, &[[7; 48 * 1024]], one, Some(deadline())).unwrap();
        assert_eq!(outcome, Outcome::Committed);
        // Says that it has what it never read, so that threads that wait keep shipping to it.
        let _ = acknowledge(&mut stalled, &info, lsn, writer.end().chain);
        last = lsn;
        appended += 48 * 1024;
        assert!(appended < 64 << 20, "a stream that nobody reads goes on taking bytes");
    }
    let soon = Some(Instant::now());
    let (lsn, outcome) = leader.append_and_wait(&mut writer, &[b"the last"], two, soon).unwrap();
    assert_eq!(outcome, Outcome::TimedOut);
    reach(follower.applied(S0).unwrap(), lsn, "the healthy follower");
    drop(stalled);
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    assert_eq!(common::compare(&at(0), &at(1), S0).relation, Relation::Identical);
}

/// Records that the socket does not take whole: what is left of a frame goes out at once, and not with a heartbeat,
/// which comes long after the test has lost its patience.
fn what_does_not_fit_into_the_stream_at_once_is_sent_without_a_heartbeat(net: &Net) {
    let (_parent, at) = directories();
    let rare = |node| net.node(&at(node)).heartbeat(Duration::from_secs(600)).peer_timeout(Duration::from_secs(3600));
    let leader = rare(0).segment_size(1 << 20).lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    let follower = rare(1).follow(&net.address, Arc::new(towline::target::LogOnly)).unwrap();
    for len in [100, 20_000, 40_000, 60_000, 64_000, 200_000].into_iter().cycle().take(36) {
        let commit: Commit = "received:1".parse().unwrap();
        let (_, outcome) = leader.append_and_wait(&mut writer, &[vec![5; len]], commit, Some(deadline())).unwrap();
        assert_eq!(outcome, Outcome::Committed, "{len} bytes");
    }
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    assert_eq!(common::compare(&at(0), &at(1), S0).relation, Relation::Identical);
}

fn haste_reaches_an_idle_follower(net: &Net) {
    let (_parent, at) = directories();
    let lazy = WalOptions { sync: towline::wal::SyncPolicy::Never, ..WalOptions::default() };
    let leader = net.node(&at(0)).wal(lazy).heartbeat(Duration::from_secs(600)).lead(&net.address).unwrap();
    let follower = net.node(&at(1)).wal(lazy).heartbeat(Duration::from_secs(600));
    let follower = follower.follow(&net.address, Checked::new(1)).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    for _ in 0..20 {
        let head = append(&mut writer, 1);
        reach(follower.applied(S0).unwrap(), head, "applying");
        let outcome = leader.wait(S0, head, "durable:1".parse().unwrap(), Some(deadline())).unwrap();
        assert_eq!(outcome, Outcome::Committed);
        assert_eq!(follower.log(S0).unwrap().synced().load(), head);
        assert_eq!(leader.log(S0).unwrap().synced().load(), Lsn::ZERO, "nobody asked the leader to sync");
    }
}

fn a_newer_epoch_deposes_the_leader(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 2);
    let mut writers = writers(&leader);
    let head = append(&mut writers[1], 3);
    let commits = Arc::clone(leader.commits(ShardId(1)).unwrap());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| commits.wait(head, "durable:1".parse().unwrap(), None));
        let mut newer = follow_request(&leader.manifest(), 7, S0);
        newer.epoch = Epoch(9);
        let (code, text) = common::raw::refused(&mut net.connect(), newer);
        assert_eq!(code, towline::RefusalCode::StaleEpoch);
        assert!(text.contains("epoch 9") && text.contains("epoch 1") || text.contains("under 1"), "{text}");
        assert_eq!(waiting.join().unwrap(), Outcome::Deposed);
    });
    for writer in &mut writers {
        let error = writer.append(b"too late").unwrap_err();
        assert!(matches!(error, Error::StaleEpoch { offered: Epoch(1), accepted: Epoch(9) }), "{error}");
    }
}

/// Epoch, first and last LSN of each segment.
fn epochs(node: &Path, shard: ShardId) -> Vec<(u64, u64, u64)> {
    let report = verify_log(&node.join(shard_directory_name(shard)), None, KnownSynced::default(), &mut ()).unwrap();
    let segment = |segment: &towline::wal::scan::SegmentReport| {
        let header = segment.header.as_ref().unwrap();
        (header.epoch.get(), header.id.first_lsn.get(), segment.last_lsn.get())
    };
    report.segments.iter().map(segment).collect()
}

fn an_epoch_change_starts_a_new_segment_everywhere(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 1);
    let target = Checked::new(1);
    let follower = net.follow(&at(1), 1, &target);
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 20);
    let refused = writer.set_epoch(Epoch(4)).unwrap_err().to_string();
    assert!(refused.contains("leads under epoch 1"), "its followers know it by that: {refused}");
    drop(writer);
    leader.shutdown().unwrap();
    for (epoch, records) in [(4, 25), (5, 5)] {
        let leader = net.node(&at(0)).epoch(Epoch(epoch)).lead(&net.address).unwrap();
        append(&mut leader.writer(S0).unwrap(), records);
        catch_up(&leader, &follower);
        leader.shutdown().unwrap();
    }
    follower.shutdown().unwrap();
    assert_eq!(epochs(&at(0), S0), [(1, 1, 20), (4, 21, 45), (5, 46, 50)]);
    assert_eq!(epochs(&at(1), S0), epochs(&at(0), S0));
    assert_identical(&at(0), &at(1), &[50]);
    target.assert_saw(&[50]);
}

fn a_restart_under_a_newer_epoch_goes_on(net: &Net) {
    let (_parent, at) = directories();
    let target = Checked::new(1);
    let leader = net.lead(&at(0), 1);
    let follower = net.follow(&at(1), 1, &target);
    append(&mut leader.writer(S0).unwrap(), 30);
    catch_up(&leader, &follower);
    leader.shutdown().unwrap();

    let leader = net.node(&at(0)).epoch(Epoch(2)).lead(&net.address).unwrap();
    append(&mut leader.writer(S0).unwrap(), 30);
    catch_up(&leader, &follower);
    assert_eq!(follower.manifest().epoch, Epoch(2), "kept before anything was done under it");
    // A follower that was told of the new epoch, and comes back.
    follower.shutdown().unwrap();
    let follower = net.follow(&at(1), 1, &target);
    catch_up(&leader, &follower);
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    assert_eq!(epochs(&at(0), S0), [(1, 1, 30), (2, 31, 60)]);
    assert_identical(&at(0), &at(1), &[60]);
    target.assert_saw(&[60]);
}

fn a_clean_stop_ships_what_is_pending(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 2);
    let targets = [Checked::new(2), Checked::new(2)];
    let followers: Vec<_> = (1..).zip(&targets).map(|(node, target)| net.follow(&at(node), node, target)).collect();
    let connected = |leader: &Leader| {
        let status = leader.status();
        status.shards.iter().all(|shard| shard.followers.iter().filter(|follower| follower.connected).count() == 2)
    };
    until("both followers are connected", || connected(&leader));
    let mut writers = writers(&leader);
    let heads: Vec<_> = writers.iter_mut().map(|writer| append(writer, 8000).get()).collect();
    leader.shutdown().unwrap();
    for (follower, (node, target)) in followers.into_iter().zip((1..).zip(&targets)) {
        follower.shutdown().unwrap();
        assert_identical(&at(0), &at(node), &heads);
        target.assert_saw(&heads);
    }
}

fn a_stop_does_not_wait_for_a_follower_that_does_not_read(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.node(&at(0)).drain_timeout(Duration::from_millis(50)).lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    let mut stalled = net.connect();
    ask(&mut stalled, follow_request(&leader.manifest(), 66, S0)).unwrap();
    for _ in 0..100 {
        append(&mut writer, 100);
    }
    let mut silent = net.connect();
    let mut tail = net.connect();
    let mut request = follow_request(&leader.manifest(), 0, S0);
    request.purpose = Purpose::Tail;
    ask(&mut tail, request).unwrap();
    // It must end although one connection does not read, one never said anything, and one only reads.
    leader.shutdown().unwrap();
    for connection in [&mut silent, &mut tail, &mut stalled] {
        read_to_end(connection);
    }
}

/// The receiving end of [`Transport::send_segment`](towline::transport::Transport::send_segment), as an archive or a
/// follower that is fed by hand would have it.
fn take_segment(mut connection: towline::transport::Connection, writer: &mut LogWriter) -> WalSegmentPayload {
    let Message::SyncRequest(request) = connection.receiver.receive_message().unwrap() else { panic!("no request") };
    assert_eq!(request.purpose, Purpose::Segment);
    assert_eq!((request.received, request.chain), (writer.end().head, writer.end().chain), "it continues this log");
    connection
        .sender
        .send_message(&Message::ShardInfo(ShardInfo {
            version: PROTOCOL_VERSIONS.max,
            cluster: request.cluster,
            node: NodeId(9),
            region: request.region,
            shard: request.shard,
            shard_count: 1,
            segment_size: request.segment_size,
            epoch: request.epoch,
            tail: Lsn::FIRST,
            head: request.received,
            session: SessionId::NONE,
            session_kind: SessionKind::None,
            start: request.from,
            target: Lsn::ZERO,
            start_segment: request.from,
            start_offset: 0,
            heartbeat_ms: 1000,
            timeout_ms: 10_000,
            key_len: 0,
            value_len: 0,
            prefix_bits: 0,
        }))
        .unwrap();
    let first = connection.receiver.receive_header().unwrap();
    assert_eq!(first.kind, FrameKind::Segment);
    let (payload, summary) = receive_segment(connection.receiver.as_mut(), first, request.segment_size).unwrap();
    let mut offset = 0;
    while offset < payload.bytes().len() {
        let rest = &payload.bytes()[offset..];
        let window = writer.ingest_window(summary.header.id.first_lsn, offset as u64, rest.len() as u64).unwrap();
        let len = window.len();
        window.copy_from_slice(&rest[..len]);
        writer.ingest_filled(len as u64).unwrap();
        offset += len;
    }
    assert_eq!((writer.end().head, writer.end().chain), (summary.last_lsn, summary.chain_after));
    writer.log().wait_synced(summary.last_lsn, None).unwrap();
    let ack = SyncAck { lsn: summary.last_lsn, session: SessionId::NONE, epoch: request.epoch };
    connection.sender.send_message(&Message::SyncAck(ack)).unwrap();
    // The sender closes when it has the answer.
    assert!(is_closed_by_peer(&connection.receiver.receive_header().unwrap_err()));
    payload
}

fn a_segment_sent_by_hand_becomes_part_of_a_log(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 1);
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 1500);
    let sealed = leader.log(S0).unwrap().sealed_segments_since(Lsn::ZERO);
    assert!(sealed.len() >= 3, "{} segments", sealed.len());
    let open = leader.log(S0).unwrap().segments().pop().unwrap();
    assert!(WalSegmentPayload::from_segment(&open).unwrap_err().to_string().contains("still open"));

    let manifest = leader.manifest();
    let identity = LogIdentity {
        cluster: manifest.cluster,
        region: manifest.region,
        shard: S0,
        segment_size: manifest.segment_size,
    };
    let directory = at(1).join(shard_directory_name(S0));
    std::fs::create_dir_all(&directory).unwrap();
    let (wal, mut copy) = Wal::open(&directory, identity, WalOptions::default()).unwrap();
    let archive = if net.address.contains(':') { "127.0.0.1:0" } else { "archive" };
    let listener = net.transport.listen(archive).unwrap();
    let address = listener.local_address();
    std::thread::scope(|scope| {
        let taking = scope
            .spawn(|| sealed.iter().map(|_| take_segment(listener.accept().unwrap(), &mut copy)).collect::<Vec<_>>());
        for segment in &sealed {
            net.transport.send_segment(&address, &WalSegmentPayload::from_segment(segment).unwrap()).unwrap();
        }
        for (payload, segment) in taking.join().unwrap().iter().zip(&sealed) {
            assert_eq!(payload.id(), segment.id());
            assert_eq!(payload.bytes(), segment.bytes(0..segment.published()).unwrap());
        }
    });
    let last = sealed.last().unwrap().sealed_last_lsn().unwrap();
    drop(copy);
    wal.close().unwrap();
    leader.shutdown().unwrap();
    let comparison = common::compare(&at(0), &at(1), S0);
    assert_eq!(comparison.common, Some((Lsn(1), last)));
    assert!(matches!(comparison.relation, Relation::Ahead { side: towline::wal::scan::Side::A, .. }), "{comparison:?}");
    let records = records_of(&at(1), S0);
    assert_eq!(records.len() as u64, last.get());
    assert!(records.iter().all(|(&lsn, bytes)| *bytes == record(S0, Lsn(lsn))));
}

fn every_size_of_record_arrives(net: &Net) {
    let (_parent, at) = directories();
    let leader = net.lead(&at(0), 1);
    let follower = net.node(&at(1)).follow(&net.address, Arc::new(towline::target::LogOnly)).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    let max = usize::try_from(leader.log(S0).unwrap().max_record_len()).unwrap();
    let sizes = [0, 1, 7, 8, 9, 4095, 4096, max / 2, max - 1, max, 0, max, 3];
    for (size, byte) in sizes.iter().zip(1..) {
        writer.append(&vec![byte; *size]).unwrap();
    }
    catch_up(&leader, &follower);
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    assert_identical(&at(0), &at(1), &[sizes.len() as u64]);
    let found: Vec<_> = records_of(&at(1), S0).into_values().collect();
    let due: Vec<_> = sizes.iter().zip(1..).map(|(size, byte)| vec![byte; *size]).collect();
    assert!(found == due, "bytes differ");
}
