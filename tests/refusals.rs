//! What nodes refuse: each refusal names its thing and says what to do, and nothing is lost by it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::net::{Net, pair_with};
use common::raw::{ask, continuing, follow_request, refused};
use common::{
    Checked, PATIENCE, SEGMENT, append, assert_identical, assert_says, catch_up, copy_directory, directories,
    records_of, shards, until,
};
use towline::scrub::ScrubOptions;
use towline::target::{LogOnly, ReplicationTarget};
use towline::transport::{Body, Connection, FrameSender, Listener, Transport};
use towline::types::{WalSegmentId, shard_directory_name};
use towline::wal::{LogIdentity, Record, SegmentHeader, SyncPolicy, Wal, WalOptions, segment};
use towline::wire::{FrameKind, Message, PROTOCOL_VERSIONS, Purpose, VersionRange};
use towline::{
    Chain, ClusterId, Epoch, Error, Follower, Leader, Lsn, Manifest, Node, NodeBuilder, NodeId, RefusalCode, RegionId,
    ShardId,
};

const S0: ShardId = ShardId(0);

/// Waits until a follower has given up, and tells why.
fn reason_of_end(follower: &Follower) -> Error {
    let (told_to, told) = crossbeam_channel::bounded(1);
    std::thread::scope(|scope| {
        scope.spawn(move || told_to.send(follower.wait()));
        let ended = told.recv_timeout(PATIENCE);
        follower.stop_signal().shutdown();
        ended.expect("the follower does not give up").expect_err("it was not stopped")
    })
}

#[test]
fn a_directory_stays_what_it_was_made_as() {
    let (_parent, directory, other) = directories();
    let make = || Node::builder(&directory).node_id(NodeId(5));
    let leader = make().shards(3).segment_size(SEGMENT).lead("127.0.0.1:0").unwrap();
    append(&mut leader.writer(S0).unwrap(), 10);

    let in_use = make().lead("127.0.0.1:0").unwrap_err();
    assert!(matches!(in_use, Error::InUse { .. }), "{in_use}");
    assert_says(
        &in_use.to_string(),
        &[directory.to_str().unwrap(), "in use, by another process or by a leader", "stop it"],
    );
    leader.shutdown().unwrap();

    let named = directory.to_str().unwrap();
    let refusal = |builder: towline::NodeBuilder| builder.lead("127.0.0.1:0").unwrap_err().to_string();
    assert_says(&refusal(make().shards(4)), &[named, "shard count 3, not 4", "leave the setting out"]);
    assert_says(&refusal(make().segment_size(2 * SEGMENT)), &[named, "segment size 65536, not 131072"]);
    assert_says(&refusal(Node::builder(&directory).node_id(NodeId(6))), &[named, "node id 5, not 6"]);
    assert_says(&refusal(make().region(RegionId(7))), &[named, "region 0, not 7"]);
    let leader = make().epoch(Epoch(3)).lead("127.0.0.1:0").unwrap();
    leader.shutdown().unwrap();
    assert_says(&refusal(make().epoch(Epoch(2))), &["epoch 2 is over", "epoch 3 has been accepted"]);
    for odd in [0, 1000, SEGMENT + 1, 1 << 40] {
        assert_says(&refusal(Node::builder(&other).segment_size(odd)), &[&odd.to_string(), "segment"]);
    }
    for odd in [0, 2000] {
        assert_says(&refusal(Node::builder(&other).shards(odd)), &[&format!("{odd} shards"), "1024"]);
    }
    let new = || Node::builder(&other);
    assert_says(&refusal(new().max_connections(0)), &["max_connections of 0"]);
    assert_says(&refusal(new().max_connections_per_address(0)), &["max_connections_per_address of 0"]);
    assert_says(&refusal(new().max_rebuilds(0)), &["max_rebuilds of 0"]);
    assert!(!other.exists());

    // Nothing of that has changed anything.
    let leader = make().shards(3).segment_size(SEGMENT).lead("127.0.0.1:0").unwrap();
    assert_eq!((leader.log(S0).unwrap().head(), leader.manifest().epoch), (Lsn(10), Epoch(3)));
    leader.shutdown().unwrap();
    assert_eq!(records_of(&directory, S0).len(), 10);
}

#[test]
fn identities_that_nobody_can_have_are_refused_before_anything_is_made() {
    let (_parent, directory, other) = directories();
    type Set = fn(NodeBuilder) -> NodeBuilder;
    let lead = |set: Set| set(Node::builder(&directory).node_id(NodeId(5))).lead("127.0.0.1:0").map(Leader::shutdown);
    let odd: [(Set, &str); 5] = [
        (|node| node.node_id(NodeId(0)), "node id 0"),
        (|node| node.epoch(Epoch::ZERO), "epoch 0"),
        (|node| node.epoch(Epoch(u64::MAX)), "epoch 18446744073709551615"),
        (|node| node.followers([NodeId(4), NodeId(5)]), "node 5 is no follower"),
        (|node| node.followers([NodeId(0)]), "node 0 is no follower"),
    ];
    for (set, named) in odd {
        let error = lead(set).map(drop).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        assert_says(&error.to_string(), &[named]);
        assert!(!directory.exists());
    }
    let follow = Node::builder(&other).node_id(NodeId(0)).follow("127.0.0.1:1", Arc::new(LogOnly));
    assert!(matches!(follow, Err(Error::Invalid { .. })) && !other.exists());

    // What the directory says of the node counts as well.
    lead(|node| node).unwrap().unwrap();
    let led = Node::builder(&directory).followers([NodeId(5)]).lead("127.0.0.1:0").map(drop);
    assert!(matches!(led, Err(Error::Invalid { .. })), "{led:?}");
    lead(|node| node.followers([NodeId(4)])).unwrap().unwrap();
}

#[test]
fn times_of_zero_are_refused() {
    let (_parent, directory, _) = directories();
    type Set = fn(NodeBuilder) -> NodeBuilder;
    let odd: [(Set, &str); 6] = [
        (|node| node.heartbeat(Duration::ZERO), "heartbeat"),
        (|node| node.peer_timeout(Duration::ZERO), "peer time-out"),
        (|node| node.handshake_timeout(Duration::ZERO), "handshake time-out"),
        (|node| node.reconnect(Duration::ZERO, PATIENCE), "wait before the next attempt"),
        (|node| node.reconnect(PATIENCE, Duration::ZERO), "wait before the next attempt"),
        (|node| node.scrub(ScrubOptions { every: Duration::ZERO, ..ScrubOptions::default() }), "scrubbing"),
    ];
    for (set, named) in odd {
        let led = set(Node::builder(&directory)).lead("127.0.0.1:0").map(drop).unwrap_err();
        let followed = set(Node::builder(&directory)).follow("127.0.0.1:1", Arc::new(LogOnly)).map(drop).unwrap_err();
        for error in [led, followed] {
            assert!(matches!(error, Error::Invalid { .. }), "{error}");
            assert_says(&error.to_string(), &[named, "of zero"]);
        }
        assert!(!directory.exists());
    }
}

#[test]
fn a_writer_is_handed_out_once_and_holds_its_directory_longer_than_the_leader() {
    let (_parent, directory, _) = directories();
    let make = || Node::builder(&directory).shards(2).segment_size(SEGMENT).lead("127.0.0.1:0");
    let leader = make().unwrap();
    drop(leader.writer(ShardId(1)).unwrap());
    assert_says(
        &leader.writer(ShardId(1)).unwrap_err().to_string(),
        &["shard 1", "handed out before", "behind a lock"],
    );

    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 10);
    leader.shutdown().unwrap();
    assert!(writer.append(b"too late").unwrap_err().is_shutdown());
    let error = make().unwrap_err();
    assert!(matches!(error, Error::InUse { .. }), "{error}");
    assert_says(&error.to_string(), &["shard-0000", "by another process or by a leader", "log writer", "of this one"]);

    drop(writer);
    let leader = make().unwrap();
    append(&mut leader.writer(S0).unwrap(), 20);
    append(&mut leader.writer(ShardId(1)).unwrap(), 10);
    leader.shutdown().unwrap();
}

#[test]
fn a_record_must_fit_in_a_segment() {
    let (_parent, directory, _) = directories();
    let leader = Node::builder(&directory).segment_size(SEGMENT).lead("127.0.0.1:0").unwrap();
    let mut writer = leader.writer(S0).unwrap();
    assert_says(&leader.writer(S0).unwrap_err().to_string(), &["writer of shard 0", "handed out before"]);
    let max = usize::try_from(writer.log().max_record_len()).unwrap();
    writer.append(b"before").unwrap();
    let error = writer.append(&vec![1; max + 1]).unwrap_err();
    let sizes = [(max + 1).to_string(), max.to_string()];
    assert_says(&error.to_string(), &[&sizes[0], &sizes[1], "split it or use larger segments"]);
    let error = writer.append_batch(&[vec![1; max / 2], vec![1; max / 2]]).unwrap_err();
    assert!(matches!(error, Error::RecordTooLarge { .. }), "{error}");
    assert_says(&writer.append_batch::<&[u8]>(&[]).unwrap_err().to_string(), &["at least one record"]);
    assert_eq!(writer.append(b"after").unwrap(), Lsn(2));
    leader.shutdown().unwrap();
    let records: Vec<_> = records_of(&directory, S0).into_values().collect();
    assert_eq!(records, [b"before".to_vec(), b"after".to_vec()]);
}

#[test]
fn a_follower_of_another_cluster_is_told_so_and_keeps_its_log() {
    let net = Net::tcp();
    let (parent, leader_dir, follower_dir) = directories();
    pair_with(&net, &leader_dir, &follower_dir, 40);
    let stranger = net.lead(&parent.path().join("stranger"), 1);
    append(&mut stranger.writer(S0).unwrap(), 100);
    let follower = net.follow(&follower_dir, 1, &Checked::forgetful(1));
    let error = reason_of_end(&follower);
    assert!(matches!(error, Error::Refused { code: RefusalCode::WrongCluster, .. }), "{error}");
    assert_says(&error.to_string(), &["cluster", "check the address, or start with an empty directory"]);
    drop((follower, stranger));
    assert_identical(&leader_dir, &follower_dir, &[40]);
}

#[test]
fn a_diverged_follower_is_refused_and_neither_log_changes() {
    let net = Net::in_process();
    let (parent, leader_dir, follower_dir) = directories();
    pair_with(&net, &leader_dir, &follower_dir, 40);
    // Two copies of one log that went on separately.
    let other_dir = parent.path().join("other");
    copy_directory(&leader_dir, &other_dir);
    for (directory, text) in [(&leader_dir, "one future"), (&other_dir, "another future")] {
        let leader = net.lead(directory, 1);
        assert_eq!(leader.writer(S0).unwrap().append(text.as_bytes()).unwrap(), Lsn(41));
        if directory == &leader_dir {
            let follower = net.follow(&follower_dir, 1, &Checked::forgetful(1));
            catch_up(&leader, &follower);
        }
    }
    let leader = net.lead(&other_dir, 1);
    let follower = net.follow(&follower_dir, 1, &Checked::forgetful(1));
    let error = reason_of_end(&follower);
    assert!(matches!(error, Error::Refused { code: RefusalCode::Diverged, .. }), "{error}");
    assert_says(&error.to_string(), &["LSN 41", "shard 0", "history", "nothing is overwritten"]);
    drop((leader, follower));
    assert_identical(&leader_dir, &follower_dir, &[41]);
    assert_eq!(records_of(&other_dir, S0)[&41], b"another future");
}

#[test]
fn a_leader_that_lost_records_never_wipes_a_follower() {
    let net = Net::tcp();
    let (parent, leader_dir, follower_dir) = directories();
    pair_with(&net, &leader_dir, &follower_dir, 40);
    let backup = parent.path().join("backup");
    copy_directory(&leader_dir, &backup);
    let leader = net.lead(&leader_dir, 1);
    let follower = net.follow(&follower_dir, 1, &Checked::forgetful(1));
    append(&mut leader.writer(S0).unwrap(), 60);
    catch_up(&leader, &follower);
    drop((leader, follower));
    // The leader comes back with an older copy of its directory.
    let leader = net.lead(&backup, 1);
    assert_eq!(leader.log(S0).unwrap().head(), Lsn(40));
    let follower = net.follow(&follower_dir, 1, &Checked::forgetful(1));
    let error = reason_of_end(&follower);
    assert!(matches!(error, Error::Refused { code: RefusalCode::LeaderBehind, .. }), "{error}");
    assert_says(&error.to_string(), &["LSN 100", "only up to 40", "lost data", "make a node with the longer log"]);
    drop((leader, follower));
    assert_identical(&leader_dir, &follower_dir, &[100]);
}

#[test]
fn a_leader_that_has_nothing_says_so_and_wipes_nobody() {
    let net = Net::in_process();
    let (parent, leader_dir, follower_dir) = directories();
    drop(net.lead(&leader_dir, 1));
    let backup = parent.path().join("backup");
    copy_directory(&leader_dir, &backup);
    pair_with(&net, &leader_dir, &follower_dir, 40);
    let leader = net.lead(&backup, 1);
    let follower = net.follow(&follower_dir, 1, &Checked::forgetful(1));
    let error = reason_of_end(&follower);
    assert!(matches!(error, Error::Refused { code: RefusalCode::LeaderBehind, .. }), "{error}");
    assert_says(&error.to_string(), &["shard 0 of this node is empty", "up to LSN 40", "nothing is overwritten"]);
    drop((leader, follower));
    assert_identical(&leader_dir, &follower_dir, &[40]);
}

#[test]
fn a_follower_whose_place_is_gone_is_told_what_is_left() {
    let net = Net::in_process();
    let (_parent, leader_dir, follower_dir) = directories();
    pair_with(&net, &leader_dir, &follower_dir, 40);
    let leader = net.lead(&leader_dir, 1);
    let mut writer = leader.writer(S0).unwrap();
    let head = append(&mut writer, 2000);
    let log = leader.log(S0).unwrap();
    log.wait_synced(head, None).unwrap();
    assert!(log.release_through(Lsn(1000), "a test makes room").unwrap() > 0);
    let tail = log.tail();
    assert!(Lsn(41) < tail && tail <= Lsn(1001), "{tail}");

    let follower = net.follow(&follower_dir, 1, &Checked::forgetful(1));
    let error = reason_of_end(&follower);
    assert!(matches!(error, Error::Refused { code: RefusalCode::NotRetained, .. }), "{error}");
    assert_says(&error.to_string(), &["LSN 41 of shard 0 is no longer retained", &format!("LSN {tail} to {head}")]);
    drop(follower);
    assert_eq!(records_of(&follower_dir, S0).len(), 40);
    // A reader that asks for what is gone is told the same.
    let tail_from = |from| towline::Tail { from: Lsn(from), ..towline::Tail::new(S0) };
    let stop = towline::ShutdownSignal::new();
    let read = |from, seen: &mut Vec<Lsn>| {
        tail_from(from).read(net.transport.as_ref(), &net.address, &stop, &mut |batch| {
            seen.extend(batch.records().map(|record| record.lsn));
            std::ops::ControlFlow::Continue(())
        })
    };
    let error = read(5, &mut Vec::new()).unwrap_err();
    assert_says(&error.to_string(), &["LSN 5", "shard 0", &format!("LSN {tail} to {head}")]);
    let mut seen = Vec::new();
    assert_eq!(read(0, &mut seen).unwrap(), head);
    assert_eq!((seen[0], seen.len() as u64), (tail, head.records_since(tail.previous())));
}

/// What a rebuild leaves that had only the base to bring: a log that begins behind all records.
#[test]
fn a_reader_of_a_log_that_holds_no_record_is_not_kept_waiting_for_one() {
    let net = Net::in_process();
    let (_parent, directory, _) = directories();
    let leader = net.lead(&directory, 1);
    let Manifest { cluster, region, segment_size, epoch, .. } = leader.manifest();
    leader.shutdown().unwrap();
    let identity = LogIdentity { cluster, region, shard: S0, segment_size };
    let path = directory.join(shard_directory_name(S0));
    let (wal, mut writer) = Wal::open_at(&path, identity, WalOptions::default(), Lsn(50), epoch).unwrap();
    let id = WalSegmentId { region, shard: S0, first_lsn: Lsn(50) };
    let header =
        SegmentHeader { id, cluster, epoch, chain_before: Chain(7), segment_size, version: segment::SEGMENT_VERSION };
    writer.ingest_window(Lsn(50), 0, 4096).unwrap().copy_from_slice(&header.encode());
    writer.ingest_filled(4096).unwrap();
    drop(writer);
    wal.close().unwrap();

    let leader = net.lead(&directory, 1);
    let log = leader.log(S0).unwrap();
    assert_eq!((log.tail(), log.head()), (Lsn(50), Lsn(49)));
    let stop = towline::ShutdownSignal::new();
    for from in [0, 50] {
        let tail = towline::Tail { from: Lsn(from), ..towline::Tail::new(S0) };
        let (told_to, told) = crossbeam_channel::bounded(1);
        std::thread::scope(|scope| {
            let read = || {
                let mut keep = |_: &towline::wal::Batch<'_>| std::ops::ControlFlow::Continue(());
                tail.read(net.transport.as_ref(), &net.address, &stop, &mut keep)
            };
            scope.spawn(move || told_to.send(read()));
            let ended = told.recv_timeout(PATIENCE);
            if ended.is_err() {
                stop.shutdown();
            }
            assert_eq!(ended.expect("it waits for a record").unwrap(), Lsn(from).previous());
        });
    }
}

/// The leader asks a follower with another history where the two part. One that does not answer is not waited for.
#[test]
fn a_follower_that_does_not_say_where_the_logs_part_is_not_waited_for() {
    let net = Net::tcp();
    let (_parent, leader_dir, _) = directories();
    let builder = net.node(&leader_dir).segment_size(SEGMENT).handshake_timeout(Duration::from_millis(300));
    let leader = builder.lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 20);
    let mut request = continuing(follow_request(&leader.manifest(), 7, S0), writer.end());
    request.chain = Chain(request.chain.get() ^ 1);
    let mut connection = net.connect();
    connection.sender.send_message(&Message::SyncRequest(request)).unwrap();
    assert!(matches!(connection.receiver.receive_message().unwrap(), Message::EpochHistory(_)));
    // Some refusal may come, and then the end, before this side loses its patience.
    let error = loop {
        if let Err(error) = connection.receiver.receive_message() {
            break error;
        }
    };
    assert!(!error.is_timeout(), "the leader still waits: {error}");
}

#[test]
fn requests_that_do_not_fit_are_refused_by_name() {
    let net = Net::tcp();
    let (_parent, leader_dir, _) = directories();
    let leader = net.lead(&leader_dir, 2);
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 20);
    let own = leader.manifest();
    let good = continuing(follow_request(&own, 7, S0), writer.end());
    let refused = |change: &dyn Fn(&mut towline::wire::SyncRequest)| {
        let mut request = good;
        change(&mut request);
        refused(&mut net.connect(), request)
    };
    let (code, text) = refused(&|request| request.versions = VersionRange { min: 7, max: 9 });
    assert_eq!(code, RefusalCode::UnsupportedVersion);
    let speaks = PROTOCOL_VERSIONS.min.to_string();
    assert_says(&text, &[&speaks, "7 to 9", "update the older side"]);
    let (code, text) = refused(&|request| request.cluster = ClusterId(1));
    assert_eq!(code, RefusalCode::WrongCluster);
    assert_says(&text, &[&own.cluster.to_string(), "check the address"]);
    let (code, text) = refused(&|request| request.shard = ShardId(2));
    assert_eq!(code, RefusalCode::UnknownShard);
    assert_says(&text, &["no shard 2", "has 2, numbered from 0"]);
    let (code, text) = refused(&|request| request.shard_count = 3);
    assert_eq!(code, RefusalCode::WrongTopology);
    assert_says(&text, &["2 shards", "you have 3", "empty directory"]);
    let (code, text) = refused(&|request| request.segment_size = 4 * SEGMENT);
    assert_eq!(code, RefusalCode::WrongTopology);
    assert_says(&text, &["65536 bytes", "262144"]);
    for node in [own.node, NodeId(0)] {
        let (code, text) = refused(&|request| request.node = node);
        assert_eq!(code, RefusalCode::WrongTopology);
        assert_says(&text, &[&format!("node id {node}"), "one of its own"]);
    }
    let (code, text) = refused(&|request| request.chain = Chain(request.chain.get() ^ 1));
    assert_eq!(code, RefusalCode::Diverged);
    assert_says(&text, &["LSN 20", "shard 0", "nothing is overwritten"]);
    // Whole segments, not ranges: those would be asked for from LSN 0.
    let (code, _) = refused(&|request| (request.purpose, request.from) = (Purpose::Segment, Lsn(1)));
    assert_eq!(code, RefusalCode::WrongRole);
    // After all that the right request is welcome.
    assert_eq!(ask(&mut net.connect(), good).unwrap().start, Lsn(21));
}

#[test]
fn a_follower_refuses_a_leader_of_an_older_epoch() {
    let net = Net::in_process();
    let (_parent, leader_dir, follower_dir) = directories();
    pair_with(&net, &leader_dir, &follower_dir, 10);
    towline::data_dir::DataDir::open(&follower_dir).unwrap().unwrap().accept_epoch(Epoch(6)).unwrap();
    let leader = net.lead(&leader_dir, 1);
    let mut writer = leader.writer(S0).unwrap();
    let follower = net.follow(&follower_dir, 1, &Checked::forgetful(1));
    until("the leader hears of the newer epoch", || leader.log(S0).unwrap().until_ended().holds());
    let error = writer.append(b"deposed").unwrap_err();
    assert_says(&error.to_string(), &["epoch 1 is over", "epoch 6 has been accepted"]);
    until("the follower knows why", || {
        let status = follower.status();
        let text = status.shards[0].following.as_ref().unwrap().error.clone().unwrap_or_default();
        text.contains("epoch 6 has been seen") && text.contains("deposed")
    });
    drop((leader, follower));
    assert_identical(&leader_dir, &follower_dir, &[10]);
}

#[test]
fn addresses_that_cannot_work_fail_at_once() {
    let (_parent, leader_dir, follower_dir) = directories();
    let open = Node::builder(&leader_dir).lead("0.0.0.0:0").unwrap_err();
    assert_says(&open.to_string(), &["0.0.0.0:0", "nothing is encrypted", "--allow-plaintext"]);
    let leader = Node::builder(&leader_dir).allow_plaintext(true).lead("0.0.0.0:0").unwrap();
    drop(leader);
    for wrong in ["no-such-host.invalid:7400", "127.0.0.1", "127.0.0.1:seven", ""] {
        let error = Node::builder(&follower_dir).follow(wrong, Arc::new(LogOnly)).unwrap_err();
        assert!(error.is_permanent() || error.is_unresolved(), "{wrong:?}: {error}");
        assert!(wrong.is_empty() || error.to_string().contains(wrong), "{wrong:?}: {error}");
        let error = Node::builder(&leader_dir).lead(wrong).unwrap_err();
        assert!(wrong.is_empty() || error.to_string().contains(wrong), "{wrong:?}: {error}");
    }
    assert!(!follower_dir.exists(), "nothing was made");
    let leader = Node::builder(&leader_dir).lead("127.0.0.1:0").unwrap();
    let listens = Node::builder(&follower_dir).listen(leader.local_address());
    let taken = listens.follow("127.0.0.1:1", Arc::new(LogOnly)).unwrap_err();
    assert_says(&taken.to_string(), &["listen on", leader.local_address()]);
    assert!(!follower_dir.exists(), "nor was the leader waited for");
    let taken = Node::builder(&follower_dir).lead(leader.local_address()).unwrap_err();
    assert_says(&taken.to_string(), &["listen on", leader.local_address()]);
}

/// Only who follows a log waits for the node to come up.
#[test]
fn a_reader_of_a_log_that_nobody_serves_is_told_so() {
    let net = Net::in_process();
    let tail = towline::Tail { timeout: Duration::ZERO, ..towline::Tail::new(S0) };
    let stop = towline::ShutdownSignal::new();
    let read = |tail: &towline::Tail, stop: &towline::ShutdownSignal| {
        tail.read(net.transport.as_ref(), "nowhere", stop, &mut |_| std::ops::ControlFlow::Continue(()))
    };
    let error = read(&tail, &stop).unwrap_err();
    assert_says(&error.to_string(), &["nowhere", "nobody listens"]);
    let follows = towline::Tail { follow: true, ..tail };
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| read(&follows, &stop));
        stop.shutdown();
        assert_eq!(reading.join().unwrap().unwrap(), Lsn::ZERO);
    });
}

#[test]
fn shards_that_do_not_exist_are_refused() {
    let (_parent, leader_dir, _) = directories();
    let leader: Leader = Node::builder(&leader_dir).shards(2).segment_size(SEGMENT).lead("127.0.0.1:0").unwrap();
    for shard in shards(2) {
        assert!(leader.log(shard).is_ok() && leader.commits(shard).is_ok());
    }
    for error in [
        leader.log(ShardId(2)).map(drop).unwrap_err(),
        leader.commits(ShardId(2)).map(drop).unwrap_err(),
        leader.writer(ShardId(2)).map(drop).unwrap_err(),
    ] {
        assert_says(&error.to_string(), &["no shard 2", "has 2, numbered from 0"]);
    }
}

/// A target on a device that keeps nothing.
struct Unsyncable;

impl ReplicationTarget for Unsyncable {
    fn durable_applied(&self, _: ShardId) -> towline::Result<Option<Lsn>> {
        Ok(None)
    }

    fn apply(&self, _: ShardId, _: Record<'_>) -> towline::Result<()> {
        Ok(())
    }

    fn sync(&self, shard: ShardId) -> towline::Result<()> {
        Err(Error::target(shard, "the device of the target keeps nothing"))
    }
}

#[test]
fn a_target_that_cannot_be_synced_ends_the_shard_as_one_that_refuses_records_does() {
    let (_parent, leader_dir, follower_dir) = directories();
    let leader = Node::builder(&leader_dir).target(Arc::new(Unsyncable)).segment_size(SEGMENT);
    let leader = leader.lead("127.0.0.1:0").unwrap();
    let follower = Node::builder(&follower_dir).follow(leader.local_address(), Arc::new(Unsyncable)).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 10);
    let error = reason_of_end(&follower);
    assert!(matches!(error, Error::Target { shard: S0, .. }) && error.is_permanent(), "{error}");
    let again = [follower.wait(), follower.wait(), follower.shutdown()].map(|ended| ended.unwrap_err().to_string());
    assert_eq!(again, [(); 3].map(|()| error.to_string()), "the failure stays");
    assert_says(&error.to_string(), &["the target of shard 0 failed", "the device of the target keeps nothing"]);
    until("the leader takes no more records", || writer.append(b"one more").is_err());
    let error = writer.append(b"one more").unwrap_err();
    assert!(matches!(error, Error::Poisoned { .. }), "{error}");
    assert_says(&error.to_string(), &["the device of the target keeps nothing"]);
}

/// A target that panics over a record, and whose lock of that shard is poisoned from then on.
#[derive(Default)]
struct Clumsy([std::sync::Mutex<Lsn>; 2]);

impl ReplicationTarget for Clumsy {
    fn durable_applied(&self, _: ShardId) -> towline::Result<Option<Lsn>> {
        Ok(None)
    }

    fn apply(&self, shard: ShardId, record: Record<'_>) -> towline::Result<()> {
        let mut last = self.0[usize::from(shard.0)].lock().unwrap();
        assert_ne!(record.bytes, b"a stone", "stumbled at LSN {}", record.lsn);
        *last = record.lsn;
        Ok(())
    }

    fn sync(&self, shard: ShardId) -> towline::Result<()> {
        let _last = self.0[usize::from(shard.0)].lock().unwrap();
        Ok(())
    }
}

#[test]
fn a_target_that_panics_over_a_record_ends_the_shard_as_one_that_refuses_it_does() {
    let (_parent, leader_dir, follower_dir) = directories();
    let leader = Node::builder(&leader_dir).shards(2).target(Arc::new(Clumsy::default())).segment_size(SEGMENT);
    let leader = leader.lead("127.0.0.1:0").unwrap();
    let target = Arc::new(Clumsy::default());
    let follower = Node::builder(&follower_dir).follow(leader.local_address(), target).unwrap();
    let mut writer = leader.writer(ShardId(1)).unwrap();
    writer.append(b"before").unwrap();
    writer.append(b"a stone").unwrap();

    let words = ["the target of shard 1 panicked", "stumbled at LSN 2"];
    let error = reason_of_end(&follower);
    assert!(matches!(error, Error::Panicked { .. }) && error.is_permanent(), "{error}");
    assert_says(&error.to_string(), &words);
    assert_says(&follower.shutdown().unwrap_err().to_string(), &words);

    until("the leader takes no more records", || leader.log(ShardId(1)).unwrap().poison().is_some());
    let error = writer.append(b"one more").unwrap_err();
    assert!(matches!(error, Error::Poisoned { .. }), "{error}");
    assert_says(&error.to_string(), &words);
    leader.writer(S0).unwrap().append(b"the other shard goes on").unwrap();
    drop(leader);
}

/// A transport whose senders have a lock that the first panic poisons.
struct Stumbles {
    inner: Arc<dyn Transport>,
    over: Arc<AtomicBool>,
}

struct Stumbling(std::sync::Mutex<Box<dyn FrameSender>>, Arc<AtomicBool>);

impl Transport for Stumbles {
    fn connect(&self, address: &str, timeout: Duration) -> towline::Result<Connection> {
        let connection = self.inner.connect(address, timeout)?;
        let sender = Box::new(Stumbling(std::sync::Mutex::new(connection.sender), Arc::clone(&self.over)));
        Ok(Connection { sender, ..connection })
    }

    fn listen(&self, address: &str) -> towline::Result<Box<dyn Listener>> {
        self.inner.listen(address)
    }
}

impl FrameSender for Stumbling {
    fn send(&mut self, kind: FrameKind, flags: u8, prefix: &[u8], body: Body<'_>) -> towline::Result<()> {
        let mut inner = self.0.lock().unwrap();
        assert!(!self.1.load(Ordering::SeqCst), "stumbled over {kind:?}");
        inner.send(kind, flags, prefix, body)
    }

    fn finish(&mut self) -> towline::Result<()> {
        self.0.lock().unwrap().finish()
    }

    fn peer(&self) -> &str {
        "the leader"
    }
}

/// The thread that acknowledges beside the receiver waits for the stream to be over, or for its next sign of life.
#[test]
fn a_transport_that_panics_and_panics_again_ends_following_at_once() {
    let (net, over) = (Net::in_process(), Arc::new(AtomicBool::new(false)));
    let (_parent, leader_dir, follower_dir) = directories();
    let leader = net.node(&leader_dir).commit("durable:1".parse().unwrap()).lead(&net.address).unwrap();
    let transport = Arc::new(Stumbles { inner: Arc::clone(&net.transport), over: Arc::clone(&over) });
    let follower = Node::builder(&follower_dir)
        .transport(transport)
        .heartbeat(PATIENCE * 10)
        .wal(WalOptions { sync: SyncPolicy::Never, ..WalOptions::default() })
        .follow(&net.address, Arc::new(LogOnly))
        .unwrap();
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 10);
    catch_up(&leader, &follower);
    over.store(true, Ordering::SeqCst);
    append(&mut writer, 1);
    let error = reason_of_end(&follower);
    assert!(matches!(error, Error::Panicked { .. }), "{error}");
    // Either of the two that acknowledge may be the first to stumble.
    assert_says(&error.to_string(), &["of shard 0 panicked", "stumbled over Ack"]);
}

/// A target whose sync panics.
struct SyncPanics;

impl ReplicationTarget for SyncPanics {
    fn durable_applied(&self, _: ShardId) -> towline::Result<Option<Lsn>> {
        Ok(None)
    }

    fn apply(&self, _: ShardId, _: Record<'_>) -> towline::Result<()> {
        Ok(())
    }

    fn sync(&self, _: ShardId) -> towline::Result<()> {
        panic!("there is no device")
    }
}

#[test]
fn a_target_whose_sync_panics_ends_the_shard_too() {
    let (_parent, leader_dir, follower_dir) = directories();
    let leader = Node::builder(&leader_dir).target(Arc::new(SyncPanics)).segment_size(SEGMENT);
    let leader = leader.lead("127.0.0.1:0").unwrap();
    let follower = Node::builder(&follower_dir).follow(leader.local_address(), Arc::new(SyncPanics)).unwrap();
    append(&mut leader.writer(S0).unwrap(), 10);
    let words = ["the target of shard 0 panicked", "there is no device"];
    assert_says(&reason_of_end(&follower).to_string(), &words);
    until("the leader takes no more records", || leader.log(S0).unwrap().poison().is_some());
    assert_says(leader.log(S0).unwrap().poison().unwrap(), &words);
}

#[test]
fn a_callback_that_panics_stops_nothing() {
    let (_parent, leader_dir, follower_dir) = directories();
    let leader = Node::builder(&leader_dir).segment_size(SEGMENT).on_projection(|_| panic!("over a projection"));
    let leader = leader.lead("127.0.0.1:0").unwrap();
    let follower = Node::builder(&follower_dir).on_projection(|_| panic!("over a projection"));
    let follower = follower.follow(leader.local_address(), Arc::new(LogOnly)).unwrap();
    append(&mut leader.writer(S0).unwrap(), 10);
    catch_up(&leader, &follower);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
}
