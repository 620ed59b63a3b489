//! What nodes refuse: each refusal names its thing and says what to do, and nothing is lost by it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::net::Net;
use common::raw::{ask, continuing, follow_request, read_to_end, refused};
use common::{Checked, PATIENCE, SEGMENT, append, assert_identical, catch_up, records_of, shards, until};
use parking_lot::Mutex;
use tempfile::TempDir;
use towline::target::LogOnly;
use towline::wire::{FrameHeader, FrameKind, Message, PROTOCOL_VERSIONS, Purpose, VersionRange};
use towline::{Chain, ClusterId, Epoch, Error, Follower, Leader, Lsn, Node, NodeId, RefusalCode, ShardId};

const S0: ShardId = ShardId(0);

/// Fails unless a sentence has every one of the words.
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is missing: {text}");
    }
}

fn directories() -> (TempDir, PathBuf, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let (leader, follower) = (parent.path().join("leader"), parent.path().join("follower"));
    (parent, leader, follower)
}

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

/// A leader with `records` records and a follower that has them, both stopped.
fn pair_with(net: &Net, leader_dir: &Path, follower_dir: &Path, records: u64) {
    let leader = net.lead(leader_dir, 1);
    let follower = net.follow(follower_dir, 1, &Checked::new(1));
    append(&mut leader.writer(S0).unwrap(), records);
    catch_up(&leader, &follower);
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    assert_identical(leader_dir, follower_dir, &[records]);
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to)
        } else {
            drop(std::fs::copy(entry.path(), to))
        }
    }
}

#[test]
fn a_directory_stays_what_it_was_made_as() {
    let (_parent, directory, other) = directories();
    let make = || Node::builder(&directory).node_id(NodeId(5));
    let leader = make().shards(3).segment_size(SEGMENT).lead("127.0.0.1:0").unwrap();
    append(&mut leader.writer(S0).unwrap(), 10);

    let in_use = make().lead("127.0.0.1:0").unwrap_err();
    assert!(matches!(in_use, Error::InUse { .. }), "{in_use}");
    assert_says(&in_use.to_string(), &[directory.to_str().unwrap(), "in use by another process", "stop it"]);
    leader.shutdown().unwrap();

    let named = directory.to_str().unwrap();
    let refusal = |builder: towline::NodeBuilder| builder.lead("127.0.0.1:0").unwrap_err().to_string();
    assert_says(&refusal(make().shards(4)), &[named, "shard count 3, not 4", "leave the setting out"]);
    assert_says(&refusal(make().segment_size(2 * SEGMENT)), &[named, "segment size 65536, not 131072"]);
    assert_says(&refusal(Node::builder(&directory).node_id(NodeId(6))), &[named, "node id 5, not 6"]);
    let leader = make().epoch(Epoch(3)).lead("127.0.0.1:0").unwrap();
    leader.shutdown().unwrap();
    assert_says(&refusal(make().epoch(Epoch(2))), &["epoch 2 is over", "epoch 3 has been accepted"]);
    for odd in [0, 1000, SEGMENT + 1, 1 << 40] {
        assert_says(&refusal(Node::builder(&other).segment_size(odd)), &[&odd.to_string(), "segment"]);
    }
    for odd in [0, 2000] {
        assert_says(&refusal(Node::builder(&other).shards(odd)), &[&format!("{odd} shards"), "1024"]);
    }

    // Nothing of that has changed anything.
    let leader = make().shards(3).segment_size(SEGMENT).lead("127.0.0.1:0").unwrap();
    assert_eq!((leader.log(S0).unwrap().head(), leader.manifest().epoch), (Lsn(10), Epoch(3)));
    leader.shutdown().unwrap();
    assert_eq!(records_of(&directory, S0).len(), 10);
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
    copy(&leader_dir, &other_dir);
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
    copy(&leader_dir, &backup);
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
fn a_follower_is_not_followed() {
    let net = Net::in_process();
    let (parent, leader_dir, follower_dir) = directories();
    let leader = net.lead(&leader_dir, 1);
    let builder = net.node(&follower_dir).listen("second");
    let second = builder.follow(&net.address, Arc::new(LogOnly)).unwrap();
    let third = net.node(&parent.path().join("third")).follow("second", Arc::new(LogOnly)).unwrap();
    let error = reason_of_end(&third);
    assert!(matches!(error, Error::Refused { code: RefusalCode::WrongRole, .. }), "{error}");
    assert_says(&error.to_string(), &["second", "is a follower itself; follow its leader"]);
    append(&mut leader.writer(S0).unwrap(), 3);
    catch_up(&leader, &second);
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
    let taken = Node::builder(&follower_dir).lead(leader.local_address()).unwrap_err();
    assert_says(&taken.to_string(), &["listen on", leader.local_address()]);
}

#[test]
fn connections_beyond_the_allowed_number_are_refused() {
    let net = Net::tcp();
    let (_parent, leader_dir, _) = directories();
    let leader = net.node(&leader_dir).max_connections(3).lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    let request = |node| follow_request(&leader.manifest(), node, S0);
    let mut admitted: Vec<_> = (1..=3)
        .map(|node| {
            let mut connection = net.connect();
            ask(&mut connection, request(node)).unwrap();
            connection
        })
        .collect();
    for _ in 0..20 {
        let (code, text) = refused(&mut net.connect(), request(9));
        assert_eq!(code, RefusalCode::TooManyConnections);
        assert_says(&text, &["3 connections are open"]);
    }
    // Those admitted are not disturbed, and a place that becomes free is given again.
    append(&mut writer, 1);
    admitted.iter_mut().for_each(|connection| drop(common::raw::next_data(connection).unwrap()));
    admitted.pop();
    until("the place is free", || ask(&mut net.connect(), request(9)).is_ok());
}

/// Gathers what the crate logs.
struct Gathering(Mutex<Vec<String>>);

static GATHERED: Gathering = Gathering(Mutex::new(Vec::new()));

impl log::Log for Gathering {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().push(record.args().to_string());
    }

    fn flush(&self) {}
}

fn logged(words: &[&str]) -> bool {
    GATHERED.0.lock().iter().any(|line| words.iter().all(|word| line.contains(word)))
}

/// Says something that is no request, and reads until the node hangs up.
fn talk(address: &str, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let own = stream.local_addr().unwrap().to_string();
    // The node may hang up before it has read everything.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert!(!matches!(error.kind(), std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock), "{error}");
    }
    own
}

#[test]
fn garbage_on_the_port_disturbs_nobody_and_is_named() {
    let _ = log::set_logger(&GATHERED).map(|()| log::set_max_level(log::LevelFilter::Warn));
    let net = Net::tcp();
    let (_parent, leader_dir, follower_dir) = directories();
    let leader = net.lead(&leader_dir, 2);
    let target = Checked::new(2);
    let follower = net.follow(&follower_dir, 1, &target);
    let mut writers = common::writers(&leader);
    let checked = |writers: &mut Vec<towline::wal::LogWriter>| {
        for writer in writers.iter_mut() {
            append(writer, 50);
        }
        catch_up(&leader, &follower);
    };
    checked(&mut writers);

    let peer = talk(&net.address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    until("the HTTP request is named", || logged(&[&peer, "HTTP"]));
    checked(&mut writers);

    let oversized = FrameHeader { kind: FrameKind::WalData, flags: 0, len: u32::MAX, body_crc: 0 }.encode();
    let peer = talk(&net.address, &oversized);
    until("the oversized frame is named", || logged(&[&peer, "WalData", &u32::MAX.to_string()]));
    checked(&mut writers);

    let peer = talk(&net.address, &frame(FrameKind::CaughtUp, &[0; 8]));
    until("a frame out of place is named", || logged(&[&peer, "begins with SyncRequest", "CaughtUp"]));
    checked(&mut writers);

    // Bytes from a generator with a fixed seed, some behind a valid beginning; and streams that end early.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..60 {
        let mut bytes = Vec::new();
        for _ in 0..round * 7 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.push(state.to_le_bytes()[0]);
        }
        if round % 2 == 0 {
            let len = towline::wire::SyncRequest::LEN;
            let whole = bytes.get(..len).map_or(vec![0; len], <[u8]>::to_vec);
            bytes.splice(0..0, FrameHeader::new(FrameKind::SyncRequest, 0, &whole, &[]).unwrap().encode());
        }
        if round % 3 == 0 {
            drop(TcpStream::connect(&net.address).unwrap().write_all(&bytes));
        } else {
            let mut stream = TcpStream::connect(&net.address).unwrap();
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
    checked(&mut writers);
    assert_eq!(follower.status().shards.len(), 2);
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    assert_identical(&leader_dir, &follower_dir, &[250, 250]);
    target.assert_saw(&[250, 250]);
    assert_eq!(target.again(), 0);
}

#[test]
fn acknowledgements_that_cannot_be_true_end_the_stream() {
    let net = Net::in_process();
    let (_parent, leader_dir, _) = directories();
    let leader = net.node(&leader_dir).handshake_timeout(Duration::from_millis(50)).lead(&net.address).unwrap();
    append(&mut leader.writer(S0).unwrap(), 5);
    let stream = || {
        let mut connection = net.connect();
        let info = ask(&mut connection, follow_request(&leader.manifest(), 7, S0)).unwrap();
        (connection, info)
    };
    let right = common::raw::chain_at(leader.log(S0).unwrap(), Lsn(5));
    // More than there is; a session that is not this one.
    let (mut connection, info) = stream();
    common::raw::acknowledge(&mut connection, &info, Lsn(6), right).unwrap();
    read_to_end(&mut connection);
    let (mut connection, mut info) = stream();
    info.session.0 += 1;
    common::raw::acknowledge(&mut connection, &info, Lsn(5), right).unwrap();
    read_to_end(&mut connection);
    // Another history: it is told so.
    let (mut connection, info) = stream();
    common::raw::acknowledge(&mut connection, &info, Lsn(5), Chain(right.get() ^ 1)).unwrap();
    let told = loop {
        let header = connection.receiver.receive_header().unwrap();
        if header.kind == FrameKind::Error {
            break connection.receiver.receive_message_body(header).unwrap();
        }
        let mut body = vec![0; header.len as usize];
        connection.receiver.receive_exact(&mut body).unwrap();
    };
    let towline::wire::Message::Error(told) = told else { panic!("{told:?}") };
    assert_eq!(told.code, RefusalCode::ChainMismatch);
    assert_says(&told.text, &["node 7", "shard 0", "LSN 5"]);
    let outcome = leader.wait(S0, Lsn(5), "received:1".parse().unwrap(), Some(std::time::Instant::now())).unwrap();
    assert_eq!(outcome, towline::Outcome::TimedOut, "neither counted");
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

/// A leader, and a follower that keeps up with it while others do what they like.
struct Busy {
    net: Net,
    leader: Leader,
    follower: Follower,
    target: Arc<Checked>,
    writer: towline::wal::LogWriter,
    directories: (TempDir, PathBuf, PathBuf),
}

impl Busy {
    fn new(settings: impl Fn(towline::NodeBuilder) -> towline::NodeBuilder) -> Busy {
        let net = Net::tcp();
        let directories = directories();
        let leader = settings(net.node(&directories.1)).segment_size(SEGMENT).lead(&net.address).unwrap();
        let target = Checked::new(1);
        let follower = net.follow(&directories.2, 1, &target);
        let writer = leader.writer(S0).unwrap();
        let mut busy = Busy { net, leader, follower, target, writer, directories };
        busy.check();
        busy
    }

    /// Appends something that must be committed by the follower.
    fn check(&mut self) {
        let head = append(&mut self.writer, 20);
        let outcome = self.leader.wait(S0, head, "durable:1".parse().unwrap(), Some(common::deadline())).unwrap();
        assert_eq!(outcome, towline::Outcome::Committed);
    }

    /// A new follower is served too. The log is as it was written, and both logs are the same.
    fn finish(mut self) {
        let newcomer = self.net.follow(&self.directories.0.path().join("newcomer"), 2, &Checked::new(1));
        self.check();
        catch_up(&self.leader, &newcomer);
        drop(newcomer);
        catch_up(&self.leader, &self.follower);
        let head = self.writer.end().head.get();
        self.leader.shutdown().unwrap();
        self.follower.shutdown().unwrap();
        assert_identical(&self.directories.1, &self.directories.2, &[head]);
        self.target.assert_saw(&[head]);
    }
}

/// The bytes of a frame.
fn frame_of(message: &towline::wire::Message) -> Vec<u8> {
    frame(message.kind(), &message.to_vec())
}

/// The bytes of a frame with any body, and checksums that fit.
fn frame(kind: FrameKind, body: &[u8]) -> Vec<u8> {
    [&FrameHeader::new(kind, 0, body, &[]).unwrap().encode()[..], body].concat()
}

/// Bytes from a generator with a fixed seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(step).take(len).collect()
}

#[test]
fn thousands_of_silent_connections_keep_nobody_out() {
    // No deadline helps: only room is made.
    let mut busy = Busy::new(|node| node.handshake_timeout(Duration::from_secs(600)).max_connections(400));
    let mut silent = std::collections::VecDeque::new();
    for count in 0..3000 {
        let mut stream = TcpStream::connect(&busy.net.address).unwrap();
        if count % 3 == 0 {
            // Half a header.
            let _ = stream.write_all(b"TW\x01\0");
        }
        silent.push_back(stream);
        if silent.len() > 600 {
            silent.pop_front();
        }
        if count % 500 == 0 {
            busy.check();
            let status = towline::tail::ask_status(busy.net.transport.as_ref(), &busy.net.address, PATIENCE).unwrap();
            assert!(status.shards[0].followers[0].connected);
        }
    }
    // The oldest have been closed, although their deadline is far away.
    let oldest = silent.front_mut().unwrap();
    oldest.set_read_timeout(Some(PATIENCE)).unwrap();
    let ended = oldest.read(&mut [0; 16]);
    assert!(!matches!(&ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock), "{ended:?}");
    busy.finish();
    drop(silent);
}

#[test]
fn one_address_cannot_take_every_place() {
    let mut busy = Busy::new(|node| node.max_connections(64).max_connections_per_address(8));
    let request = |busy: &Busy| towline::wire::SyncRequest {
        purpose: Purpose::Tail,
        node: NodeId(0),
        ..follow_request(&busy.leader.manifest(), 0, S0)
    };
    let mut readers = Vec::new();
    // All of this machine are one address, the follower among them: seven places are left.
    for _ in 0..7 {
        let mut connection = busy.net.connect();
        ask(&mut connection, request(&busy)).unwrap();
        readers.push(connection);
    }
    let (code, text) = refused(&mut busy.net.connect(), request(&busy));
    assert_eq!(code, RefusalCode::TooManyConnections);
    assert_says(&text, &["8 connections from your address"]);
    busy.check();
    readers.clear();
    until("the places are free", || ask(&mut busy.net.connect(), request(&busy)).is_ok());
    busy.finish();
}

#[test]
fn a_handshake_that_trickles_ends_at_its_deadline() {
    let mut busy = Busy::new(|node| node.handshake_timeout(Duration::from_millis(300)));
    let request = frame_of(&follow_request(&busy.leader.manifest(), 9, S0).into());
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| {
                let mut stream = TcpStream::connect(&busy.net.address).unwrap();
                stream.set_read_timeout(Some(Duration::from_millis(40))).unwrap();
                let deadline = common::deadline();
                // Each byte is a sign of life, and there are enough of them to go on for several deadlines.
                for byte in &request {
                    assert!(std::time::Instant::now() < deadline);
                    if stream.write_all(&[*byte]).is_err() {
                        return;
                    }
                    match stream.read(&mut [0; 256]) {
                        Ok(0) => return,
                        Ok(_) => panic!("it was answered"),
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                        Err(_) => return,
                    }
                }
                panic!("the handshake was taken, byte by byte");
            });
        }
    });
    busy.check();
    busy.finish();
}

#[test]
fn garbage_behind_a_valid_handshake_ends_that_stream_only() {
    let mut busy = Busy::new(|node| node);
    let manifest = busy.leader.manifest();
    for round in 0..40_u64 {
        let mut stream = TcpStream::connect(&busy.net.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = frame_of(&follow_request(&manifest, 50 + round % 4, S0).into());
        let info = |session| towline::wire::Ack {
            received: Lsn(round),
            durable: Lsn(u64::MAX),
            applied: Lsn(round),
            chain: Chain(7),
            epoch: manifest.epoch,
            session: towline::wire::SessionId(session),
        };
        bytes.extend(match round % 5 {
            0 => noise(round, 4096),
            // The kinds of a leader, with nothing in them that is right.
            1 => frame(FrameKind::WalData, &noise(round, 4096)),
            2 => frame_of(&info(round).into()),
            3 => frame(FrameKind::SessionAck, &noise(round, towline::wire::SessionAck::LEN)),
            // A second request on the same stream.
            _ => frame_of(&follow_request(&manifest, 60, S0).into()),
        });
        stream.write_all(&bytes).unwrap();
        let mut answer = Vec::new();
        if let Err(error) = stream.read_to_end(&mut answer) {
            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "round {round}: the stream stayed open");
        }
    }
    busy.check();
    let marks = busy.leader.commits(S0).unwrap().followers();
    let strangers = marks.iter().filter(|marks| marks.node().0 >= 50);
    assert!(strangers.clone().count() > 0);
    for marks in strangers {
        assert_eq!(marks.at(towline::AckLevel::Received), Lsn::ZERO, "nothing of node {} counts", marks.node());
    }
    busy.finish();
}

/// What a leader that is none says to one connection, or how it keeps it waiting.
fn play_leader(stream: TcpStream, round: u64, info: &towline::wire::ShardInfo, head: Lsn) {
    let mut stream = stream;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut request = vec![0; 16 + towline::wire::SyncRequest::LEN];
    if stream.read_exact(&mut request).is_err() {
        return;
    }
    let info = frame_of(&(*info).into());
    let wal = |segment, offset: u64, bytes: Vec<u8>| {
        let prefix = towline::wire::WalDataHeader { segment, offset }.to_bytes();
        let header = FrameHeader::new(FrameKind::WalData, 3, &prefix, &bytes).unwrap();
        [&header.encode()[..], &prefix, &bytes].concat()
    };
    let say = match round % 10 {
        0 => noise(round, 2000),
        1 => [info, noise(round, 2000)].concat(),
        2 => [info, wal(Lsn(u64::MAX), u64::MAX, noise(round, 300))].concat(),
        3 => [info, wal(Lsn(1), 0, noise(round, 5000))].concat(),
        4 => [info, frame(FrameKind::BaseData, &noise(round, 100))].concat(),
        5 => [info, frame(FrameKind::SessionControl, &noise(round, 54))].concat(),
        // A frame that never ends, and an answer that comes byte by byte, for as long as the other side lets it.
        6 => {
            let endless = FrameHeader { kind: FrameKind::WalData, flags: 0, len: 1 << 20, body_crc: 0 };
            [&info[..], &endless.encode()].concat()
        }
        7 => {
            let trickled = info.iter().all(|byte| {
                std::thread::sleep(Duration::from_millis(20));
                stream.write_all(&[*byte]).is_ok()
            });
            assert!(!trickled, "the follower took an answer that came byte by byte");
            return;
        }
        8 => {
            // Longer than it may be, and shorter than its prefix.
            let len = if (round / 10).is_multiple_of(2) { u32::MAX } else { 5 };
            let other = FrameHeader { kind: FrameKind::WalData, flags: 0, len, body_crc: 0 }.encode();
            [&info[..], &other, &[0; 5]].concat()
        }
        _ => {
            let wants = towline::wire::Sync { lsn: Lsn(u64::MAX) };
            let caught_up = towline::wire::CaughtUp { head: Lsn(head.get() + 1_000_000) };
            [info, frame_of(&caught_up.into()), frame_of(&wants.into()), noise(round, 64)].concat()
        }
    };
    let _ = stream.write_all(&say);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    // Until the follower has had enough.
    let _ = stream.read_to_end(&mut Vec::new());
}

#[test]
fn a_hostile_leader_changes_nothing_on_a_follower() {
    let net = Net::tcp();
    let (_parent, leader_dir, follower_dir) = directories();
    pair_with(&net, &leader_dir, &follower_dir, 40);
    // What a real leader answers to this follower.
    let real = net.lead(&leader_dir, 1);
    let head = real.log(S0).unwrap().head();
    let request = continuing(follow_request(&real.manifest(), 1, S0), real.writer(S0).unwrap().end());
    let info = ask(&mut net.connect(), request).unwrap();
    drop(real);

    let listener = std::net::TcpListener::bind(&net.address).unwrap();
    let builder = net.node(&follower_dir).node_id(NodeId(1)).handshake_timeout(Duration::from_millis(400));
    let target = Checked::forgetful(1);
    let follower = builder.follow(&net.address, target).unwrap();
    std::thread::scope(|scope| {
        for round in 0..30 {
            let (stream, _) = listener.accept().unwrap();
            // One at a time: the follower comes again when it has given this one up.
            scope.spawn(move || play_leader(stream, round, &info, head));
        }
    });
    drop(listener);
    assert_eq!(follower.log(S0).unwrap().head(), head);
    let leader = net.lead(&leader_dir, 1);
    append(&mut leader.writer(S0).unwrap(), 10);
    catch_up(&leader, &follower);
    drop((leader, follower));
    assert_identical(&leader_dir, &follower_dir, &[50]);
}
