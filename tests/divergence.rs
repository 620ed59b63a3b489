//! Logs that became different while a stream stood, as by memory or a middle that changes bytes: the follower's newest
//! batch is another one than the leader's, sound by itself and with a chain of its own. Whichever side can see it
//! stops, tells the other, and says so in its status. Seen to fail where the leader does not compare acknowledgements,
//! and where the follower does not compare heartbeats.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::net::Net;
use common::{Checked, PATIENCE, SEGMENT, append, catch_up, until};
use parking_lot::Mutex;
use towline::transport::{Body, Connection, FrameReceiver, FrameSender, Listener, Transport};
use towline::wal::batch::{self, BatchHeader};
use towline::wal::scan::Relation;
use towline::wal::{BatchIter, Expected};
use towline::wire::{Ack, FrameHeader, FrameKind};
use towline::{Chain, Error, Follower, Leader, Lsn, NodeId, Outcome, RefusalCode, ShardId};

const S0: ShardId = ShardId(0);

/// What stands between a leader and its follower and changes what passes.
#[derive(Default)]
struct Middle {
    /// The next batch that comes whole is replaced by another.
    replaces: AtomicBool,
    /// Acknowledgements of what was replaced are replaced too, so that the leader sees nothing.
    hides: bool,
    /// What was replaced: its last LSN, and the leader's chain there.
    replaced: Mutex<Option<(Lsn, Chain)>>,
}

impl Middle {
    /// Another batch of the same length in the place of the one that `bytes` is.
    fn replace(&self, bytes: &mut [u8]) {
        let Some(header) = bytes.first_chunk::<56>().map(BatchHeader::decode) else { return };
        if header.total_len() != bytes.len() as u64 || !self.replaces.swap(false, Ordering::SeqCst) {
            return;
        }
        let records: Vec<Vec<u8>> = BatchIter::new(bytes)
            .flat_map(|batch| batch.records().map(|record| record.bytes.iter().map(|byte| !byte).collect()))
            .collect();
        let at = Expected { first_lsn: header.first_lsn, chain: header.prev_crc, epoch: header.epoch };
        let records: Vec<&[u8]> = records.iter().map(Vec::as_slice).collect();
        let other = batch::build(at, header.timestamp, header.synced_lsn, &records);
        assert!(other.len() == bytes.len() && other != bytes);
        bytes.copy_from_slice(&other);
        *self.replaced.lock() = Some((header.last_lsn(), header.crc));
    }
}

/// A transport with a [`Middle`] in it, for the side that connects.
struct Through {
    inner: Arc<dyn Transport>,
    middle: Arc<Middle>,
}

struct Sender(Box<dyn FrameSender>, Arc<Middle>);

struct Receiver(Box<dyn FrameReceiver>, Arc<Middle>);

impl Transport for Through {
    fn connect(&self, address: &str, timeout: Duration) -> towline::Result<Connection> {
        let Connection { peer, sender, receiver, closer } = self.inner.connect(address, timeout)?;
        let sender = Box::new(Sender(sender, Arc::clone(&self.middle)));
        let receiver = Box::new(Receiver(receiver, Arc::clone(&self.middle)));
        Ok(Connection { peer, sender, receiver, closer })
    }

    fn listen(&self, address: &str) -> towline::Result<Box<dyn Listener>> {
        self.inner.listen(address)
    }
}

impl FrameSender for Sender {
    fn send(&mut self, kind: FrameKind, flags: u8, prefix: &[u8], body: Body<'_>) -> towline::Result<()> {
        if let (FrameKind::Ack, true, Some((lsn, chain))) = (kind, self.1.hides, *self.1.replaced.lock()) {
            let ack = Ack::decode(prefix).unwrap();
            let chain = if ack.received == lsn { chain } else { ack.chain };
            return self.0.send(kind, flags, &Ack { chain, ..ack }.to_bytes(), body);
        }
        self.0.send(kind, flags, prefix, body)
    }

    fn finish(&mut self) -> towline::Result<()> {
        self.0.finish()
    }

    fn peer(&self) -> &str {
        self.0.peer()
    }
}

impl FrameReceiver for Receiver {
    fn receive_header(&mut self) -> towline::Result<FrameHeader> {
        self.0.receive_header()
    }

    fn receive_exact(&mut self, into: &mut [u8]) -> towline::Result<()> {
        let is_log = self.0.current().is_some_and(|frame| frame.kind == FrameKind::WalData);
        self.0.receive_exact(into)?;
        if is_log {
            self.1.replace(into);
        }
        Ok(())
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
        self.0.has_buffered()
    }

    fn has_whole(&self) -> bool {
        self.0.has_whole()
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

struct Scene {
    leader: Leader,
    follower: Follower,
    head: Lsn,
    directory: tempfile::TempDir,
}

/// A follower that has 40 records of its leader's, and then another 41st.
fn diverge(net: &Net, hides: bool, heartbeat: Duration) -> Scene {
    let directory = tempfile::tempdir().unwrap();
    let at = |name| directory.path().join(name);
    let leader = net.node(&at("leader")).segment_size(SEGMENT).heartbeat(heartbeat).lead(&net.address).unwrap();
    let middle = Arc::new(Middle { hides, ..Middle::default() });
    let through = Through { inner: Arc::clone(&net.transport), middle: Arc::clone(&middle) };
    let builder = net.node(&at("follower")).node_id(NodeId(7)).transport(Arc::new(through));
    let follower = builder.follow(&net.address, Checked::new(1)).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 40);
    catch_up(&leader, &follower);
    let commits = leader.commits(S0).unwrap();
    assert_eq!(commits.wait(Lsn(40), "applied:1".parse().unwrap(), Some(common::deadline())), Outcome::Committed);
    assert_eq!(leader.status().shards[0].followers[0].divergence, None);
    // So that the next batch says what it continues, which the middle needs to know: it is the first behind a sync.
    let synced = leader.commits(S0).unwrap().wait(Lsn(40), "synced".parse().unwrap(), Some(common::deadline()));
    assert_eq!(synced, Outcome::Committed);
    middle.replaces.store(true, Ordering::SeqCst);
    let head = writer.append(b"the record of the leader").unwrap();
    until("a batch is replaced", || middle.replaced.lock().is_some());
    Scene { leader, follower, head, directory }
}

impl Scene {
    /// Waits until the follower has given up for good, and tells why.
    fn reason_of_end(&self) -> Error {
        let (told_to, told) = crossbeam_channel::bounded(1);
        std::thread::scope(|scope| {
            scope.spawn(|| told_to.send(self.follower.wait()));
            let ended = told.recv_timeout(PATIENCE);
            self.follower.stop_signal().shutdown();
            ended.expect("the follower does not give up").expect_err("it was not stopped")
        })
    }

    /// What the leader's status says of the follower, as text and within JSON.
    fn assert_leader_says(&self, words: &[&str]) {
        let divergence = || self.leader.status().shards[0].followers[0].divergence.clone();
        until("the leader's status shows it", || divergence().is_some());
        let (text, json) = (divergence().unwrap(), self.leader.status().to_json());
        assert!(json.contains(&format!("\"divergence\":{}", towline::status::json_text(&text))), "{json}");
        let lsn = format!("LSN {}", self.head);
        for word in words.iter().chain(&[lsn.as_str(), "shard 0"]) {
            assert!(text.contains(word), "{word:?} is missing: {text}");
        }
    }

    /// The logs are different, and a follower that comes again with this one is not taken.
    fn assert_remembered(self, net: &Net) {
        let Scene { leader, follower, head, directory } = self;
        let _ = follower.shutdown();
        let directory_of = |name| directory.path().join(name);
        let follower = net.node(&directory_of("follower")).node_id(NodeId(7));
        let follower = follower.follow(&net.address, Checked::forgetful(1)).unwrap();
        let mut scene = Scene { leader, follower, head, directory };
        let error = scene.reason_of_end();
        assert!(error.is_permanent() && error.to_string().contains(&format!("LSN {head}")), "{error}");
        let directory = std::mem::replace(&mut scene.directory, tempfile::tempdir().unwrap());
        drop(scene);
        let comparison = common::compare(&directory.path().join("leader"), &directory.path().join("follower"), S0);
        assert!(matches!(comparison.relation, Relation::Diverged(_)), "{comparison:?}");
    }
}

fn the_leader_notices_by_an_acknowledgement(net: &Net) {
    // No heartbeat helps.
    let scene = diverge(net, false, Duration::from_secs(600));
    let error = scene.reason_of_end();
    assert!(matches!(error, Error::Refused { code: RefusalCode::ChainMismatch, .. }), "{error}");
    let status = scene.follower.status().shards[0].following.clone().unwrap();
    assert!(status.error.as_ref().is_some_and(|text| text.contains("node 7")), "{status:?}");
    scene.assert_leader_says(&["node 7", "the chain there is", "verify both"]);
    // Nothing of the record counts, at no level, and nothing counts from now on.
    for commit in ["received:1", "durable:1", "applied:1"] {
        let outcome = scene.leader.wait(S0, scene.head, commit.parse().unwrap(), Some(Instant::now())).unwrap();
        assert_eq!(outcome, Outcome::TimedOut, "{commit}");
    }
    let marks = scene.leader.commits(S0).unwrap().followers();
    assert!(marks[0].at(towline::AckLevel::Received) < scene.head && !marks[0].counts());
    scene.assert_remembered(net);
}

fn the_follower_notices_by_a_heartbeat(net: &Net) {
    let scene = diverge(net, true, Duration::from_millis(20));
    let error = scene.reason_of_end();
    let Error::ChainMismatch { lsn, own, theirs, .. } = &error else { panic!("{error}") };
    assert!(*lsn == scene.head && *own != Some(*theirs), "{error}");
    let status = scene.follower.status().shards[0].following.clone().unwrap();
    assert_eq!(status.error, Some(error.to_string()));
    scene.assert_leader_says(&["refused", "the history of shard 0"]);
    assert!(!scene.leader.commits(S0).unwrap().followers()[0].counts());
    scene.assert_remembered(net);
}

over_both!(the_leader_notices_by_an_acknowledgement, the_follower_notices_by_a_heartbeat);
