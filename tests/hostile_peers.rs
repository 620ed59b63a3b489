//! What anybody may do to a node's port: bytes that are no request, connections that say nothing or too little, garbage
//! behind a valid handshake, acknowledgements that cannot be true, a leader that lies. It is named in the log, and
//! nobody else is disturbed.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::net::{Net, pair_with};
use common::raw::{ask, continuing, follow_request, read_to_end, refused};
use common::{Checked, PATIENCE, SEGMENT, append, assert_identical, assert_says, catch_up, directories, until};
use parking_lot::Mutex;
use tempfile::TempDir;
use towline::wire::{FrameHeader, FrameKind, Purpose};
use towline::{Chain, Follower, Leader, Lsn, NodeId, RefusalCode, ShardId};

const S0: ShardId = ShardId(0);

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
            session: towline::SessionId(session),
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
