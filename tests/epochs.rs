//! Epochs between leaders and followers: who has accepted one says nothing under an older one, a deposed leader lets go
//! of everybody, and neither ends a follower that can go on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::net::Net;
use common::raw::{ask, follow_request, refused};
use common::{append, catch_up, directories, until, writers};
use crossbeam_channel::Receiver;
use parking_lot::Mutex;
use towline::tail::ask_topology;
use towline::target::{FixedStore, FixedStoreOptions, LogOnly, ReplicationTarget};
use towline::transport::{Body, Closer, Connection, Listener, Transport};
use towline::wal::{Expected, Record, SegmentHeader, batch};
use towline::wire::{FrameKind, Message, ShardInfo, WalDataHeader};
use towline::{
    Chain, Epoch, Error, Follower, HybridTimestamp, Leader, Lsn, NodeId, Outcome, RefusalCode, Result, ShardId,
    ShutdownSignal, Tail, WalSegmentId,
};

const S0: ShardId = ShardId(0);

/// A transport whose connections go where somebody decides, one by one.
struct Switch {
    inner: Arc<dyn Transport>,
    /// Given how many there were before.
    to: Mutex<Box<dyn FnMut(usize) -> String + Send>>,
    count: AtomicUsize,
    closers: Mutex<Vec<Closer>>,
}

impl Switch {
    fn new(net: &Net, to: impl FnMut(usize) -> String + Send + 'static) -> Arc<Switch> {
        let inner = Arc::clone(&net.transport);
        Arc::new(Switch { inner, to: Mutex::new(Box::new(to)), count: AtomicUsize::new(0), closers: Mutex::default() })
    }

    fn goes_to(&self, address: &'static str) {
        *self.to.lock() = Box::new(move |_| address.to_owned());
    }

    fn follow(self: &Arc<Self>, directory: &Path, target: Arc<dyn ReplicationTarget>) -> Follower {
        // No time-out ends a stream in place of what should.
        let node = common::quick(towline::Node::builder(directory)).peer_timeout(common::PATIENCE * 10);
        node.transport(Arc::clone(self) as Arc<dyn Transport>)
            .node_id(NodeId(1))
            .follow("whoever leads", target)
            .unwrap()
    }
}

impl Transport for Switch {
    fn connect(&self, _: &str, timeout: Duration) -> Result<Connection> {
        let to = (self.to.lock())(self.count.fetch_add(1, Ordering::SeqCst));
        let connection = self.inner.connect(&to, timeout)?;
        self.closers.lock().push(connection.closer.clone());
        Ok(connection)
    }

    fn listen(&self, address: &str) -> Result<Box<dyn Listener>> {
        self.inner.listen(address)
    }
}

/// Two leaders of one log, "old" under epoch 1 and "new" under epoch 2, of two shards with five records each.
fn old_and_new(net: &Net, a: &Path, b: &Path) -> (Leader, Leader) {
    let old = net.node(a).shards(2).lead("old").unwrap();
    let copy = net.node(b).node_id(NodeId(2)).follow("old", Arc::new(LogOnly)).unwrap();
    for writer in &mut writers(&old) {
        append(writer, 5);
    }
    catch_up(&old, &copy);
    copy.shutdown().unwrap();
    let new = net.node(b).epoch(Epoch(2)).lead("new").unwrap();
    (old, new)
}

fn is_with(leader: &Leader, shard: u16) -> bool {
    let status = leader.status();
    status.shards[usize::from(shard)].followers.iter().any(|follower| follower.connected && follower.node == NodeId(1))
}

#[test]
fn who_has_accepted_an_epoch_acknowledges_nothing_under_an_older_one() {
    let net = Net::in_process();
    let (parent, a, b) = directories();
    let old = net.node(&a).shards(2).peer_timeout(common::PATIENCE * 10).lead("old").unwrap();
    let copy = net.node(&b).node_id(NodeId(2)).follow("old", Arc::new(LogOnly)).unwrap();
    let switch = Switch::new(&net, |_| "old".to_owned());
    let follower = switch.follow(&parent.path().join("c"), Arc::new(LogOnly));
    let mut writers = writers(&old);
    for writer in &mut writers {
        append(writer, 5);
    }
    catch_up(&old, &follower);
    catch_up(&old, &copy);
    copy.shutdown().unwrap();
    let new = net.node(&b).epoch(Epoch(2)).lead("new").unwrap();
    // One of its two streams breaks, and meets the new leader.
    switch.goes_to("new");
    switch.closers.lock().last().unwrap().close();
    until("the newer epoch is accepted", || follower.manifest().epoch == Epoch(2));
    let lsns: Vec<_> = writers.iter_mut().map(|writer| append(writer, 1)).collect();
    until("both streams go to the new leader", || is_with(&new, 0) && is_with(&new, 1));
    for (shard, lsn) in common::shards(2).zip(lsns) {
        let outcome = old.wait(shard, lsn, "durable:1".parse().unwrap(), Some(Instant::now())).unwrap();
        assert_eq!(outcome, Outcome::TimedOut, "shard {shard}");
    }
    follower.shutdown().unwrap();
}

/// What breaks: the disk, which does not take the newer epoch. What would be lost: a record that an old leader calls
/// committed because of what it is told by the request that begins the stream anew.
#[test]
fn who_cannot_write_an_epoch_down_asks_nobody_under_an_older_one() {
    let net = Net::in_process();
    let (parent, a, b) = directories();
    let (_old, new) = old_and_new(&net, &a, &b);
    let switch = Switch::new(&net, |_| "old".to_owned());
    let c = parent.path().join("c");
    let follower = switch.follow(&c, Arc::new(LogOnly));
    until("it follows the old leader", || switch.count.load(Ordering::SeqCst) >= 3);
    catch_up(&new, &follower);
    // The manifest cannot be replaced as long as this is there.
    let in_the_way = c.join("MANIFEST.tmp");
    std::fs::create_dir(&in_the_way).unwrap();
    // Whoever is met after the new leader hears no request.
    let elsewhere: Arc<dyn Listener> = Arc::from(net.transport.listen("elsewhere").unwrap());
    let (listener, asked) = (Arc::clone(&elsewhere), Arc::new(Mutex::new(Vec::new())));
    let requests = Arc::clone(&asked);
    let listens = std::thread::spawn(move || {
        while let Ok(mut connection) = listener.accept() {
            if let Ok(Message::SyncRequest(request)) = connection.receiver.receive_message() {
                requests.lock().push(request.epoch);
            }
        }
    });
    let met = switch.count.load(Ordering::SeqCst);
    *switch.to.lock() = Box::new(move |count| if count == met { "new" } else { "elsewhere" }.to_owned());
    switch.closers.lock().last().unwrap().close();
    until("it has tried again and again", || switch.count.load(Ordering::SeqCst) > met + 6);
    assert_eq!((asked.lock().as_slice(), follower.manifest().epoch), (&[][..], Epoch(1)));
    std::fs::remove_dir(&in_the_way).unwrap();
    until("the newer epoch is accepted", || follower.manifest().epoch == Epoch(2));
    switch.goes_to("new");
    until("both streams go to the new leader", || is_with(&new, 0) && is_with(&new, 1));
    assert!(asked.lock().iter().all(|epoch| *epoch == Epoch(2)));
    follower.shutdown().unwrap();
    elsewhere.close();
    listens.join().unwrap();
}

#[test]
fn a_rebuild_that_waits_for_its_turn_ends_when_another_stream_meets_a_newer_leader() {
    const STORE: FixedStoreOptions = FixedStoreOptions { key_len: 8, value_len: 1000, shard_count: 2, prefix_bits: 1 };
    let net = Net::in_process();
    let (parent, a, b) = directories();
    let store = |name: &str| Arc::new(FixedStore::open(parent.path().join(name), &STORE).unwrap());
    let of_old = store("store-a");
    let node = net.node(&a).shards(2).segment_size(common::SEGMENT).max_rebuilds(1).peer_timeout(common::PATIENCE * 10);
    let old = node.target(Arc::clone(&of_old) as Arc<dyn ReplicationTarget>).lead("old").unwrap();
    let copy = net.node(&b).node_id(NodeId(2)).follow("old", store("store-b")).unwrap();
    let mut writers = writers(&old);
    for key in 0..400_u64 {
        let key = key.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        of_old.propose_put(&key, &[7; 1000], |shard, record| writers[usize::from(shard.0)].append(record)).unwrap();
    }
    catch_up(&old, &copy);
    copy.shutdown().unwrap();
    for shard in common::shards(2) {
        let log = old.log(shard).unwrap();
        common::reach(old.applied(shard).unwrap().unwrap(), log.head(), "applying at the leader");
        log.wait_synced(log.head(), Some(common::deadline())).unwrap();
        of_old.sync(shard).unwrap();
        assert!(log.release_through(log.head(), "test").unwrap() > 0);
    }
    // Somebody has the one place, and does nothing with it.
    let mut idle = net.transport.connect("old", common::PATIENCE).unwrap();
    ask(&mut idle, follow_request(&old.manifest(), 77, S0)).unwrap();
    let new = net.node(&b).epoch(Epoch(2)).target(store("store-b")).lead("new").unwrap();

    let switch = Switch::new(&net, |_| "old".to_owned());
    let follower = switch.follow(&parent.path().join("c"), store("store-c"));
    until("both shards wait for a rebuild", || is_with(&old, 0) && is_with(&old, 1));
    switch.goes_to("new");
    switch.closers.lock().last().unwrap().close();
    until("both streams go to the new leader", || is_with(&new, 0) && is_with(&new, 1));
    catch_up(&new, &follower);
    assert_eq!(follower.manifest().epoch, Epoch(2));
    follower.shutdown().unwrap();
}

#[test]
fn an_answer_of_an_older_epoch_ends_the_stream_and_not_the_follower() {
    let net = Net::in_process();
    let (parent, a, b) = directories();
    let (_old, new) = old_and_new(&net, &a, &b);
    // The old leader's answer to one shard is on its way until the other has met the new one.
    let between = net.transport.listen("between").unwrap();
    let (asked, was_asked) = crossbeam_channel::bounded(1);
    let (let_go, may_go) = crossbeam_channel::bounded::<()>(1);
    let inner = Arc::clone(&net.transport);
    let forwards = std::thread::spawn(move || {
        let mut connection = between.accept().unwrap();
        let Message::SyncRequest(request) = connection.receiver.receive_message().unwrap() else {
            panic!("no request")
        };
        let info = ask(&mut inner.connect("old", common::PATIENCE).unwrap(), request).unwrap();
        asked.send(()).unwrap();
        may_go.recv_timeout(common::PATIENCE).unwrap();
        connection.sender.send_message(&Message::ShardInfo(info)).unwrap();
        // Until the follower hangs up.
        while connection.receiver.receive_message().is_ok() {}
    });
    let switch = Switch::new(&net, move |count| match count {
        0 => "old".to_owned(),
        1 => "between".to_owned(),
        _ => {
            let _ = was_asked.recv_timeout(common::PATIENCE);
            "new".to_owned()
        }
    });
    let follower = switch.follow(&parent.path().join("c"), Arc::new(LogOnly));
    until("the newer epoch is accepted", || follower.manifest().epoch == Epoch(2));
    switch.goes_to("new");
    let_go.send(()).unwrap();
    until("both streams go to the new leader", || is_with(&new, 0) && is_with(&new, 1));
    forwards.join().unwrap();
    catch_up(&new, &follower);
    follower.shutdown().unwrap();
}

/// Reads a log over streams that go where `switch` says, and gives each record as it comes.
fn read_on(switch: &Arc<Switch>, stop: &ShutdownSignal) -> (JoinHandle<Result<Lsn>>, Receiver<Lsn>) {
    let (to, read) = crossbeam_channel::unbounded();
    let (switch, stop) = (Arc::clone(switch), stop.clone());
    let reader = std::thread::spawn(move || {
        let tail = Tail { follow: true, ..Tail::new(S0) };
        tail.read(switch.as_ref(), "whoever leads", &stop, &mut |batch| {
            batch.records().for_each(|record| to.send(record.lsn).unwrap());
            ControlFlow::Continue(())
        })
    });
    (reader, read)
}

/// Takes records up to an LSN, which come in order.
fn take_until(read: &Receiver<Lsn>, mut due: Lsn, last: Lsn) {
    while due <= last {
        assert_eq!(read.recv_timeout(common::PATIENCE).unwrap(), due);
        due = due.next();
    }
}

#[test]
fn a_reader_goes_on_only_where_the_log_is_the_one_that_it_has_read() {
    let net = Net::in_process();
    let (_parent, a, b) = directories();
    let (old, new) = old_and_new(&net, &a, &b);
    old.shutdown().unwrap();
    let old = net.node(&a).lead("old").unwrap();
    let (mut of_old, mut of_new) = (old.writer(S0).unwrap(), new.writer(S0).unwrap());
    let (switch, stop) = (Switch::new(&net, |_| "old".to_owned()), ShutdownSignal::new());
    let (reader, read) = read_on(&switch, &stop);
    take_until(&read, Lsn(1), Lsn(5));
    let goes_to_new = || {
        switch.goes_to("new");
        switch.closers.lock().last().unwrap().close();
    };
    // The new leader's log goes on from what was read.
    goes_to_new();
    append(&mut of_new, 2);
    take_until(&read, Lsn(6), Lsn(7));
    stop.shutdown();
    assert_eq!(reader.join().unwrap().unwrap(), Lsn(7));

    // The old leader's last records are not in it.
    for _ in 0..2 {
        of_old.append(b"nobody else has this").unwrap();
    }
    append(&mut of_new, 5);
    switch.goes_to("old");
    let stop = ShutdownSignal::new();
    let (reader, read) = read_on(&switch, &stop);
    take_until(&read, Lsn(1), Lsn(7));
    goes_to_new();
    until("the reader has noticed", || reader.is_finished());
    let ended = reader.join().unwrap();
    assert!(matches!(ended, Err(Error::ChainMismatch { lsn: Lsn(7), .. })), "{ended:?}");
    assert_eq!(read.try_recv().ok(), None, "nothing of another history is handed out");
}

/// What is asked once more is behind the new leader's log, and that has grown beyond it when what follows is asked for.
#[test]
fn a_reader_takes_nothing_for_given_up_that_was_only_not_there_yet() {
    let net = Net::in_process();
    let (_parent, a, b) = directories();
    let (old, new) = old_and_new(&net, &a, &b);
    old.shutdown().unwrap();
    let old = net.node(&a).lead("old").unwrap();
    append(&mut old.writer(S0).unwrap(), 4);
    let mut of_new = new.writer(S0).unwrap();
    let switch = Switch::new(&net, move |before| match before {
        0 => "old".to_owned(),
        1 => "new".to_owned(),
        _ => {
            append(&mut of_new, 7);
            "new".to_owned()
        }
    });
    let stop = ShutdownSignal::new();
    let (reader, read) = read_on(&switch, &stop);
    take_until(&read, Lsn(1), Lsn(9));
    switch.closers.lock().last().unwrap().close();
    until("the reader has noticed", || reader.is_finished());
    let ended = reader.join().unwrap();
    assert!(matches!(ended, Err(Error::ChainMismatch { lsn: Lsn(9), .. })), "{ended:?}");
    assert_eq!(read.try_recv().ok(), None, "nothing of another history is handed out");
}

#[test]
fn a_reader_whose_last_record_is_given_up_meanwhile_goes_on_behind_it() {
    let net = Net::in_process();
    let (_parent, a, _) = directories();
    let leader = net.node(&a).segment_size(common::SEGMENT).min_wal_bytes(0).lead("old").unwrap();
    let (switch, stop) = (Switch::new(&net, |_| "old".to_owned()), ShutdownSignal::new());
    let (reader, read) = read_on(&switch, &stop);
    let (log, mut writer) = (leader.log(S0).unwrap(), leader.writer(S0).unwrap());
    // Each record fills a segment.
    let mut append_one = || writer.append(&[7; 60_000]).unwrap();
    let first = append_one();
    take_until(&read, Lsn(1), first);
    switch.goes_to("nobody");
    switch.closers.lock().last().unwrap().close();
    append_one();
    let last = append_one();
    log.wait_synced(last, Some(common::deadline())).unwrap();
    assert_eq!(log.release_through(first, "test").unwrap(), 1);
    switch.goes_to("old");
    take_until(&read, Lsn(2), last);
    stop.shutdown();
    assert_eq!(reader.join().unwrap().unwrap(), last);
}

/// A segment without batches is begun anew with the first record of the next epoch, under the eyes of a reader.
#[test]
fn a_reader_goes_on_where_an_empty_segment_is_begun_anew() {
    let net = Net::in_process();
    let (_parent, a, _) = directories();
    let leader = net.node(&a).segment_size(common::SEGMENT).lead("leader").unwrap();
    let info = ask_topology(net.transport.as_ref(), "leader", common::PATIENCE).unwrap();
    let listener = net.transport.listen("follower").unwrap();
    let manifest = leader.manifest();
    let serves = std::thread::spawn(move || {
        let mut connection = listener.accept().unwrap();
        connection.receiver.receive_message().unwrap();
        let info = ShardInfo { head: Lsn(1), start: Lsn(1), start_segment: Lsn(1), ..info };
        connection.sender.send_message(&info.into()).unwrap();
        let chain_before = Chain::genesis(manifest.cluster, manifest.region, S0);
        let id = WalSegmentId { region: manifest.region, shard: S0, first_lsn: Lsn(1) };
        let place = WalDataHeader { segment: Lsn(1), offset: 0 }.to_bytes();
        for (epoch, records) in [(Epoch(1), &[][..]), (Epoch(2), &[&b"a record"[..]][..])] {
            let (cluster, segment_size) = (manifest.cluster, manifest.segment_size);
            let header = SegmentHeader { id, cluster, epoch, chain_before, segment_size, version: 3 };
            let mut bytes = header.encode().to_vec();
            if !records.is_empty() {
                let at = Expected { first_lsn: Lsn(1), chain: chain_before, epoch };
                bytes.extend(batch::build(at, HybridTimestamp::default(), Lsn::ZERO, records));
            }
            connection.sender.send(FrameKind::WalData, 0, &place, Body::Bytes(&bytes)).unwrap();
        }
        // Until the reader hangs up.
        while connection.receiver.receive_message().is_ok() {}
    });
    let mut read = Vec::new();
    let last = Tail::new(S0).read(net.transport.as_ref(), "follower", &ShutdownSignal::new(), &mut |batch| {
        read.extend(batch.records().map(|record| (batch.header.epoch, record.bytes.to_vec())));
        ControlFlow::Continue(())
    });
    assert_eq!((last.unwrap(), read), (Lsn(1), vec![(Epoch(2), b"a record".to_vec())]));
    serves.join().unwrap();
}

#[test]
fn a_deposed_leader_lets_go_of_its_followers_and_takes_no_others() {
    let net = Net::in_process();
    let (_parent, a, b) = directories();
    let leader = net.lead(&a, 1);
    let follower = net.node(&b).node_id(NodeId(1)).follow(&net.address, Arc::new(LogOnly)).unwrap();
    append(&mut leader.writer(S0).unwrap(), 5);
    catch_up(&leader, &follower);
    let request = |node: u64, epoch| {
        let mut request = follow_request(&leader.manifest(), node, S0);
        request.epoch = epoch;
        request
    };
    let fresh = request(8, Epoch(1));
    let told = refused(&mut net.connect(), request(7, Epoch(9)));
    assert_eq!(told.0, RefusalCode::StaleEpoch);
    until("its stream has ended", || !is_with(&leader, 0));
    let told = refused(&mut net.connect(), fresh);
    assert_eq!(told.0, RefusalCode::StaleEpoch, "{}", told.1);
    let info = ask_topology(net.transport.as_ref(), &net.address, common::PATIENCE).unwrap();
    assert_eq!(info.epoch, Epoch(1), "under the other one somebody else leads");
    assert_eq!(follower.manifest().epoch, Epoch(1));
    assert!(!follower.stop_signal().is_shutdown(), "it waits for who leads now");
    follower.shutdown().unwrap();
    let status = leader.status();
    let read_only = status.shards[0].poison.as_deref().unwrap();
    common::assert_says(read_only, &["epoch 1 is over"]);
    assert!(matches!(leader.shutdown(), Err(Error::StaleEpoch { .. })));
}

#[test]
fn who_cannot_follow_deposes_nobody() {
    let net = Net::in_process();
    let (_parent, a, _) = directories();
    let leader = net.node(&a).shards(1).followers([NodeId(5)]).lead(&net.address).unwrap();
    let mut request = follow_request(&leader.manifest(), 7, S0);
    request.epoch = Epoch(9);
    assert_eq!(refused(&mut net.connect(), request).0, RefusalCode::WrongTopology, "no follower of it");
    let mut other = follow_request(&leader.manifest(), 5, S0);
    (other.epoch, other.shard_count) = (Epoch(9), 2);
    assert_eq!(refused(&mut net.connect(), other).0, RefusalCode::WrongTopology, "of another log");
    let mut last = follow_request(&leader.manifest(), 5, S0);
    last.epoch = Epoch(u64::MAX);
    assert_eq!(refused(&mut net.connect(), last).0, RefusalCode::ProtocolViolation, "nobody could lead after it");
    append(&mut leader.writer(S0).unwrap(), 1);
    assert_eq!(leader.manifest().epoch, Epoch(1));
}

#[test]
fn a_leader_that_is_told_of_a_newer_one_steps_down_at_once_and_for_good() {
    let net = Net::in_process();
    let (_parent, a, b) = directories();
    let old = net.node(&a).lead("old").unwrap();
    let mut writer = old.writer(S0).unwrap();
    let copy = net.node(&b).node_id(NodeId(2)).follow("old", Arc::new(LogOnly)).unwrap();
    append(&mut writer, 5);
    catch_up(&old, &copy);
    copy.shutdown().unwrap();
    let new = net.node(&b).epoch(Epoch(2)).lead("new").unwrap();
    let lsn = writer.append(b"nobody else has it").unwrap();
    for stale in [1, u64::MAX] {
        assert!(old.depose(Epoch(stale)).is_err(), "epoch {stale}");
    }
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| old.wait(S0, lsn, "durable:1".parse().unwrap(), None).unwrap());
        old.depose(Epoch(2)).unwrap();
        assert_eq!(waiting.join().unwrap(), Outcome::Deposed);
    });
    assert!(matches!(writer.append(b"record"), Err(Error::StaleEpoch { .. })));
    drop((writer, old));
    assert!(matches!(net.node(&a).lead("old"), Err(Error::Mismatch { .. })), "epoch 2 is another's");
    let back = net.node(&a).follow("new", Arc::new(LogOnly)).unwrap();
    until("what nobody else has is cut", || back.log(S0).unwrap().head() == new.log(S0).unwrap().head());
}

#[test]
fn nobody_leads_under_the_last_epoch_and_nobody_follows_under_it() {
    let net = Net::in_process();
    let (_parent, a, b) = directories();
    let last = Epoch(u64::MAX);
    let refused = net.node(&a).epoch(last).lead("leader").unwrap_err();
    assert!(matches!(refused, Error::Invalid { .. }), "{refused}");
    let leader = net.node(&a).shards(1).lead("leader").unwrap();
    assert_eq!(leader.manifest().epoch, Epoch(1), "nothing has come of that");
    // Whoever says so all the same is not believed.
    let between = net.transport.listen("between").unwrap();
    let inner = Arc::clone(&net.transport);
    let forwards = std::thread::spawn(move || {
        let mut connection = between.accept().unwrap();
        let Message::SyncRequest(request) = connection.receiver.receive_message().unwrap() else {
            panic!("no request")
        };
        let mut info = ask(&mut inner.connect("leader", common::PATIENCE).unwrap(), request).unwrap();
        info.epoch = last;
        connection.sender.send_message(&Message::ShardInfo(info)).unwrap();
        while connection.receiver.receive_message().is_ok() {}
    });
    // The first one asks for the topology.
    let switch = Switch::new(&net, |count| if count == 1 { "between" } else { "leader" }.to_owned());
    let follower = switch.follow(&b, Arc::new(LogOnly));
    append(&mut leader.writer(S0).unwrap(), 5);
    forwards.join().unwrap();
    catch_up(&leader, &follower);
    assert_eq!(follower.manifest().epoch, Epoch(1));
    follower.shutdown().unwrap();
}

/// A target that no leader can have: half rebuilt, or with records that the log has not.
struct Unfit {
    is_rebuilding: bool,
}

impl ReplicationTarget for Unfit {
    fn durable_applied(&self, _: ShardId) -> Result<Option<Lsn>> {
        Ok(Some(Lsn(9)))
    }

    fn apply(&self, _: ShardId, _: Record<'_>) -> Result<()> {
        Ok(())
    }

    fn sync(&self, _: ShardId) -> Result<()> {
        Ok(())
    }

    fn is_rebuilding(&self, _: ShardId) -> Result<bool> {
        Ok(self.is_rebuilding)
    }
}

/// What breaks: a power cut in the middle of a rebuild, and the node is chosen to lead. The one that then leads under
/// that epoch in its place must find it willing to follow.
#[test]
fn a_node_that_cannot_lead_takes_no_epoch() {
    let net = Net::in_process();
    let (_parent, a, b) = directories();
    let leader = net.node(&b).shards(1).lead("old").unwrap();
    let follower = net.node(&a).follow("old", Arc::new(LogOnly)).unwrap();
    append(&mut leader.writer(S0).unwrap(), 5);
    catch_up(&leader, &follower);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
    for is_rebuilding in [true, false] {
        let node = net.node(&a).epoch(Epoch(2)).target(Arc::new(Unfit { is_rebuilding }));
        let refused = node.lead("new").unwrap_err();
        assert!(matches!(refused, Error::Invalid { .. }), "{refused}");
    }
    let leader = net.node(&b).epoch(Epoch(2)).lead("new").unwrap();
    let follower = net.node(&a).follow("new", Arc::new(LogOnly)).unwrap();
    append(&mut leader.writer(S0).unwrap(), 5);
    catch_up(&leader, &follower);
    follower.shutdown().unwrap();
}

/// What breaks: whoever fails over takes a node for the newest that has accepted a newer epoch, and nothing of it yet.
#[test]
fn a_status_tells_the_epoch_of_the_newest_record() {
    let net = Net::in_process();
    let (_parent, a, b) = directories();
    let told = |leader: &Leader| (leader.status().epoch.0, leader.status().shards[0].head_epoch.0);
    let leader = net.lead(&a, 1);
    assert_eq!(told(&leader), (1, 0), "there is no record");
    append(&mut leader.writer(S0).unwrap(), 5);
    assert_eq!(told(&leader), (1, 1));
    leader.shutdown().unwrap();
    let leader = net.node(&a).epoch(Epoch(3)).lead(&net.address).unwrap();
    assert_eq!(told(&leader), (3, 1), "nothing was written under it");
    let follower = net.node(&b).follow(&net.address, Arc::new(LogOnly)).unwrap();
    catch_up(&leader, &follower);
    let shards = follower.status().shards;
    assert_eq!((follower.manifest().epoch, shards[0].head_epoch), (Epoch(3), Epoch(1)));
    assert!(shards[0].following.as_ref().is_some_and(|following| !following.rebuilding));
    append(&mut leader.writer(S0).unwrap(), 1);
    catch_up(&leader, &follower);
    assert_eq!((told(&leader), follower.status().shards[0].head_epoch), ((3, 3), Epoch(3)));
    follower.shutdown().unwrap();
}
