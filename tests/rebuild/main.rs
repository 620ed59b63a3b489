//! Followers that the log cannot bring back: rebuilt from a base and the log beside it, over both transports.
//!
//! What breaks: either side goes away at any moment of a rebuild, records and blocks overtake each other, the leader is
//! quiet, empty or busy. What prevents harm: the target's durable mark, one order of applying and marking, and that
//! nothing counts before the leader has accepted it. Nothing here is timed: tests wait for marks.

// A test may panic, also in the functions that it is made of.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use towline::rebuild::RebuildPhase;
use towline::target::{
    BaseInfo, BaseSink, BaseSource, BlockId, BlockRun, FixedStore, FixedStoreOptions, ReplicationTarget, TargetTopology,
};
use towline::transport::{InProcessTransport, TcpOptions, TcpTransport, Transport};
use towline::types::shard_directory_name;
use towline::wal::scan::{Relation, compare_logs};
use towline::wal::{LogWriter, Record};
use towline::wire::{
    Ack, Message, PROTOCOL_VERSIONS, Purpose, SessionAck, SessionAction, SessionFailure, SessionId, SessionKind,
    SessionPhase, SyncRequest,
};
use towline::{
    AckLevel, Chain, Epoch, Error, Follower, Leader, Lsn, Node, NodeBuilder, NodeId, Outcome, Result, ShardId, Until,
    WaitStrategy, Waited, Watermark, wait_any,
};

const SHARD: ShardId = ShardId(0);
const PATIENCE: Duration = Duration::from_secs(60);
const OPTIONS: FixedStoreOptions = FixedStoreOptions { key_len: 16, value_len: 100, shard_count: 1, prefix_bits: 0 };

fn deadline() -> Option<Instant> {
    Some(Instant::now() + PATIENCE)
}

fn reach(mark: &Watermark, at_least: Lsn) {
    let waited = wait_any(&[Until { mark, at_least }], WaitStrategy::Park, deadline());
    assert_eq!(waited, Waited::Reached(0), "at {}, due {at_least}", mark.load());
}

/// A transport that nothing else uses, and an address on it.
#[derive(Clone)]
struct Wire {
    transport: Option<Arc<dyn Transport>>,
    address: &'static str,
}

fn over_both(scenario: impl Fn(&Wire)) {
    scenario(&Wire { transport: None, address: "127.0.0.1:0" });
    scenario(&Wire { transport: Some(Arc::new(InProcessTransport::new())), address: "leader" });
}

/// A leader with a store, and the directory that everything is in.
struct Scene {
    wire: Wire,
    directory: tempfile::TempDir,
    store: Arc<FixedStore>,
    leader: Leader,
    writer: Arc<Mutex<LogWriter>>,
}

impl Wire {
    fn node(&self, directory: &Path) -> NodeBuilder {
        let builder = Node::builder(directory)
            .segment_size(64 * 1024)
            .heartbeat(Duration::from_millis(50))
            .drain_timeout(Duration::from_millis(200))
            .reconnect(Duration::from_millis(2), Duration::from_millis(20));
        match &self.transport {
            Some(transport) => builder.transport(Arc::clone(transport)),
            None => builder,
        }
    }
}

impl Scene {
    fn new(wire: &Wire) -> Scene {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(FixedStore::open(directory.path().join("leader-store"), &OPTIONS).unwrap());
        Scene::with(wire, directory, store, |builder| builder)
    }

    fn with(
        wire: &Wire,
        directory: tempfile::TempDir,
        store: Arc<FixedStore>,
        settings: impl FnOnce(NodeBuilder) -> NodeBuilder,
    ) -> Scene {
        let builder = wire.node(&directory.path().join("leader")).target(store.clone());
        let leader = settings(builder).lead(wire.address).unwrap();
        let writer = Arc::new(Mutex::new(leader.writer(SHARD).unwrap()));
        Scene { wire: wire.clone(), directory, store, leader, writer }
    }

    fn put(&self, key: u64, value: &[u8]) -> Lsn {
        let append = |_: ShardId, record: &[u8]| self.writer.lock().append(record);
        self.store.propose_put(&key.to_be_bytes(), value, append).unwrap()
    }

    fn delete(&self, key: u64) -> Option<Lsn> {
        let append = |_: ShardId, record: &[u8]| self.writer.lock().append(record);
        self.store.propose_delete(&key.to_be_bytes(), append).unwrap()
    }

    fn head(&self) -> Lsn {
        self.leader.log(SHARD).unwrap().head()
    }

    /// Everything applied and synced, and only the newest segment left.
    fn trim(&self) -> Lsn {
        let log = self.leader.log(SHARD).unwrap();
        let head = log.head();
        reach(self.leader.applied(SHARD).unwrap().unwrap(), head);
        log.wait_synced(head, deadline()).unwrap();
        log.release_through(head, "the test says so").unwrap();
        assert!(log.tail() > Lsn(1), "something was released");
        head
    }

    /// Some hundred keys, several segments, trimmed.
    fn filled(wire: &Wire) -> Scene {
        let scene = Scene::new(wire);
        for key in 0..1500 {
            scene.put(key, &[b'a'; 90]);
        }
        for key in (0..1500).step_by(7) {
            scene.delete(key);
        }
        scene.trim();
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn open_store(&self, name: &str) -> Arc<FixedStore> {
        Arc::new(FixedStore::open(self.path(&format!("{name}-store")), &OPTIONS).unwrap())
    }

    fn follow(&self, name: &str, target: Arc<dyn ReplicationTarget>) -> Follower {
        self.wire.node(&self.path(name)).follow(self.leader.local_address(), target).unwrap()
    }

    /// Waits until a follower has applied everything, and both sides count it.
    fn catch_up(&self, follower: &Follower) {
        let head = self.head();
        reach(self.leader.applied(SHARD).unwrap().unwrap(), head);
        reach(follower.applied(SHARD).unwrap(), head);
        let outcome = self.leader.wait(SHARD, head, "applied:1".parse().unwrap(), deadline()).unwrap();
        assert_eq!(outcome, Outcome::Committed);
    }

    /// Stops everything and compares: slot by slot, and byte by byte from where the follower's log begins.
    fn stop_and_compare(self, followers: Vec<(&str, Follower, Arc<FixedStore>)>) {
        for (name, follower, store) in followers {
            self.catch_up(&follower);
            assert_same(&self.store, &store);
            follower.shutdown().unwrap();
            self.assert_same_logs(name);
        }
        let Scene { leader, writer, .. } = self;
        drop(writer);
        leader.shutdown().unwrap();
    }

    fn assert_same_logs(&self, name: &str) {
        let of = |node: &str| self.path(node).join(shard_directory_name(SHARD));
        let comparison = compare_logs(&of("leader"), &of(name)).unwrap();
        assert_eq!(comparison.relation, Relation::Identical, "{comparison:?}");
        assert_eq!(comparison.b.problems, 0, "{comparison:?}");
        assert!(comparison.b.tail >= comparison.a.tail && comparison.equal_bytes > 4096, "{comparison:?}");
    }
}

/// Slot, LSN, key and value of every entry.
fn entries(store: &FixedStore) -> Vec<(u64, Lsn, Vec<u8>, Vec<u8>)> {
    let mut entries = Vec::new();
    let scanned = store.scan(|entry| {
        entries.push((entry.slot, entry.lsn, entry.key.to_vec(), entry.value.to_vec()));
        ControlFlow::Continue(())
    });
    scanned.unwrap();
    entries
}

fn assert_same(leader: &FixedStore, follower: &FixedStore) {
    let (leaders, followers) = (entries(leader), entries(follower));
    assert!(leaders == followers, "{} and {} entries", leaders.len(), followers.len());
    assert_eq!(leader.count().unwrap(), follower.count().unwrap());
}

/// Puts and deletes without end on a thread of its own, until dropped. It waits for the disk now and then, so that the
/// leader's own applier keeps up.
struct Load(Option<std::thread::JoinHandle<()>>, Arc<AtomicBool>);

impl Load {
    fn on(scene: &Scene) -> Load {
        let (store, writer) = (Arc::clone(&scene.store), Arc::clone(&scene.writer));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut random = 0x9e37_79b9_7f4a_7c15u64;
            while !stopped.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let key = (random % 2500).to_be_bytes();
                let append = |_: ShardId, record: &[u8]| writer.lock().append(record);
                if random.is_multiple_of(3) {
                    store.propose_delete(&key, append).unwrap();
                } else {
                    store.propose_put(&key, &random.to_le_bytes(), append).unwrap();
                }
                if random.is_multiple_of(256) {
                    let log = Arc::clone(writer.lock().log());
                    log.wait_synced(log.head(), deadline()).unwrap();
                }
            }
        });
        Load(Some(thread), stop)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.1.store(true, Ordering::Relaxed);
        self.0.take().unwrap().join().unwrap();
    }
}

#[test]
fn a_quiet_leader_rebuilds_a_fresh_follower_that_then_goes_on_live_and_by_catch_up() {
    over_both(|wire| {
        let scene = Scene::filled(wire);
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        reach(follower.applied(SHARD).unwrap(), scene.head());
        assert_same(&scene.store, &store);
        let progress = follower.rebuild_progress(SHARD).unwrap();
        assert_eq!((progress.phase, progress.applied), (RebuildPhase::Completed, scene.head()));
        assert!(progress.blocks_done > 1000 && progress.blocks_total >= progress.blocks_done, "{progress:?}");
        // Live.
        scene.put(9999, b"live");
        scene.catch_up(&follower);
        assert_eq!(store.get(&9999u64.to_be_bytes()).unwrap().as_deref(), Some(&b"live"[..]));
        // After a restart of its own: no rebuild.
        follower.shutdown().unwrap();
        drop(store);
        for key in 0..100 {
            scene.put(key, b"while it was away");
        }
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        scene.catch_up(&follower);
        assert_eq!(follower.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Idle);
        scene.stop_and_compare(vec![("follower", follower, store)]);
    });
}

#[test]
fn a_follower_is_rebuilt_while_its_leader_puts_and_deletes_at_full_speed() {
    over_both(|wire| {
        let scene = Scene::filled(wire);
        let load = Load::on(&scene);
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        reach(follower.applied(SHARD).unwrap(), Lsn(1));
        let before = scene.head();
        reach(follower.applied(SHARD).unwrap(), before);
        drop(load);
        assert_eq!(follower.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Completed);
        scene.stop_and_compare(vec![("follower", follower, store)]);
    });
}

#[test]
fn a_follower_that_fell_behind_is_rebuilt_and_its_old_log_replaced() {
    over_both(|wire| {
        let scene = Scene::new(wire);
        for key in 0..10 {
            scene.put(key, b"early");
        }
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        scene.catch_up(&follower);
        follower.shutdown().unwrap();
        drop(store);
        for key in 0..2000 {
            scene.put(key, &[b'b'; 90]);
        }
        scene.trim();
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        scene.catch_up(&follower);
        assert_eq!(follower.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Completed);
        assert!(follower.log(SHARD).unwrap().tail() > Lsn(1));
        scene.stop_and_compare(vec![("follower", follower, store)]);
    });
}

#[test]
fn an_empty_store_is_rebuilt() {
    over_both(|wire| {
        let scene = Scene::new(wire);
        for key in 0..1000 {
            scene.put(key, &[b'a'; 90]);
        }
        for key in 0..1000 {
            scene.delete(key);
        }
        scene.trim();
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        reach(follower.applied(SHARD).unwrap(), scene.head());
        assert_eq!(store.count().unwrap(), 0);
        let session = || scene.leader.status().shards[0].followers[0].session.unwrap();
        let deadline = Instant::now() + PATIENCE;
        while session().kind != towline::protocol::SessionKind::KeepUp && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(session().kind, towline::protocol::SessionKind::KeepUp, "keep-up follows on the same stream");
        scene.stop_and_compare(vec![("follower", follower, store)]);
    });
}

#[test]
fn several_followers_are_rebuilt_one_after_the_other_where_only_one_may_be() {
    over_both(|wire| {
        let filled = Scene::filled(wire);
        let Scene { directory, store, leader, writer, .. } = filled;
        drop(writer);
        leader.shutdown().unwrap();
        let scene = Scene::with(wire, directory, store, |builder| builder.max_rebuilds(1));
        let load = Load::on(&scene);
        let names = ["one", "two", "three"];
        let stores = names.map(|name| scene.open_store(name));
        let followers: Vec<_> =
            names.iter().zip(&stores).map(|(name, store)| scene.follow(name, store.clone())).collect();
        for follower in &followers {
            reach(follower.applied(SHARD).unwrap(), Lsn(1));
        }
        drop(load);
        let followers = names.into_iter().zip(followers).zip(stores);
        scene.stop_and_compare(followers.map(|((name, follower), store)| (name, follower, store)).collect());
    });
}

/// A target that stops at a gate after so many calls of one kind, so that a rebuild can be met in the middle.
struct Gated {
    inner: Arc<FixedStore>,
    gate: Arc<Gate>,
    /// What it says to have applied; none to leave it to the checkpoint.
    tells: bool,
}

#[derive(Default)]
struct Gate {
    /// Blocks, records or completions that pass; `u64::MAX` for all.
    left: AtomicU64,
    at: Mutex<Point>,
    reached: Watermark,
    opened: Mutex<bool>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Point {
    #[default]
    Begun,
    Block,
    Record,
    Complete,
}

impl Gate {
    fn at(point: Point, after: u64) -> Arc<Gate> {
        Arc::new(Gate { left: AtomicU64::new(after), at: Mutex::new(point), ..Gate::default() })
    }

    /// Blocks at the gate once enough have passed, until it is opened.
    fn pass(&self, point: Point) -> Result<()> {
        if *self.at.lock() != point
            || self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
        {
            return Ok(());
        }
        self.reached.advance(Lsn(1));
        let mut opened = self.opened.lock();
        while !*opened {
            self.changed.wait(&mut opened);
        }
        Err(Error::Io { action: "go on behind", path: "the gate".into(), source: std::io::ErrorKind::Other.into() })
    }

    fn open(&self) {
        *self.opened.lock() = true;
        self.changed.notify_all();
    }
}

struct GatedSink(Box<dyn BaseSink>, Arc<Gate>);

impl BaseSink for GatedSink {
    fn put_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<()> {
        self.1.pass(Point::Block)?;
        self.0.put_block(block, bytes)
    }
    fn consistent_from(&self) -> Lsn {
        self.0.consistent_from()
    }
    fn complete(&mut self, achieved: Lsn) -> Result<()> {
        self.1.pass(Point::Complete)?;
        self.0.complete(achieved)
    }
    fn cancel(&mut self) {
        self.0.cancel();
    }
}

impl ReplicationTarget for Gated {
    fn durable_applied(&self, shard: ShardId) -> Result<Option<Lsn>> {
        if self.tells { self.inner.durable_applied(shard) } else { Ok(None) }
    }
    fn apply(&self, shard: ShardId, record: Record<'_>) -> Result<()> {
        self.gate.pass(Point::Record)?;
        self.inner.apply(shard, record)
    }
    fn sync(&self, shard: ShardId) -> Result<()> {
        self.inner.sync(shard)
    }
    fn topology(&self) -> TargetTopology {
        self.inner.topology()
    }
    fn needs_durable_log(&self) -> bool {
        true
    }
    fn is_rebuilding(&self, shard: ShardId) -> Result<bool> {
        self.inner.is_rebuilding(shard)
    }
    fn begin_base(&self, shard: ShardId, info: BaseInfo) -> Result<Box<dyn BaseSink>> {
        let sink = self.inner.begin_base(shard, info)?;
        self.gate.pass(Point::Begun)?;
        Ok(Box::new(GatedSink(sink, Arc::clone(&self.gate))))
    }
    fn blocks_of(&self, shard: ShardId, record: Record<'_>, blocks: &mut Vec<BlockId>) -> Result<bool> {
        self.inner.blocks_of(shard, record, blocks)
    }
}

/// Starts a follower that stops at the gate.
fn start_gated(scene: &Scene, gate: &Arc<Gate>) -> Follower {
    let target = Gated { inner: scene.open_store("follower"), gate: Arc::clone(gate), tells: true };
    let follower = scene.follow("follower", Arc::new(target));
    reach(&gate.reached, Lsn(1));
    follower
}

#[test]
fn a_follower_that_goes_down_in_a_rebuild_serves_nothing_until_another_completes() {
    over_both(|wire| {
        for (point, after) in
            [(Point::Begun, 0), (Point::Block, 0), (Point::Block, 300), (Point::Record, 5), (Point::Complete, 0)]
        {
            let scene = Scene::filled(wire);
            let load = Load::on(&scene);
            let gate = Gate::at(point, after);
            let follower = start_gated(&scene, &gate);
            assert_eq!(follower.applied(SHARD).unwrap().load(), Lsn::ZERO, "{point:?}: nothing counts yet");
            let commits = scene.leader.commits(SHARD).unwrap();
            assert!(commits.followers().iter().all(|marks| !marks.counts()), "{point:?}");
            follower.stop_signal().shutdown();
            gate.open();
            drop(follower);
            // As after a crash: the mark stands.
            let store = scene.open_store("follower");
            assert!(store.is_rebuilding(SHARD).unwrap(), "{point:?}");
            assert!(store.get(&1u64.to_be_bytes()).is_err(), "{point:?}");
            let follower = scene.follow("follower", store.clone());
            reach(follower.applied(SHARD).unwrap(), Lsn(1));
            drop(load);
            assert_eq!(follower.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Completed, "{point:?}");
            scene.stop_and_compare(vec![("follower", follower, store)]);
        }
    });
}

#[test]
fn a_leader_that_goes_down_in_a_rebuild_begins_another_when_it_is_back() {
    over_both(|wire| {
        for (point, after) in [(Point::Block, 200), (Point::Complete, 0)] {
            let scene = Scene::filled(wire);
            let gate = Gate::at(point, after);
            let inner = scene.open_store("follower");
            let target = Gated { inner: inner.clone(), gate: Arc::clone(&gate), tells: true };
            let follower = scene.follow("follower", Arc::new(target));
            reach(&gate.reached, Lsn(1));
            let address = scene.leader.local_address().to_owned();
            let Scene { directory, store, leader, writer, .. } = scene;
            drop(writer);
            drop(leader);
            assert!(inner.is_rebuilding(SHARD).unwrap());
            *gate.at.lock() = Point::Record;
            gate.left.store(u64::MAX, Ordering::SeqCst);
            gate.open();
            let at = Wire { address: Box::leak(address.into_boxed_str()), ..wire.clone() };
            let scene = Scene::with(&at, directory, store, |builder| builder);
            scene.put(7, b"after the restart");
            reach(follower.applied(SHARD).unwrap(), scene.head());
            assert!(!inner.is_rebuilding(SHARD).unwrap());
            scene.stop_and_compare(vec![("follower", follower, inner)]);
        }
    });
}

#[test]
fn a_newer_local_base_is_refused_and_nothing_of_it_changed() {
    over_both(|wire| {
        let scene = Scene::filled(wire);
        let inner = scene.open_store("follower");
        let mut lsn = 0;
        for _ in 0..scene.head().get() + 10 {
            let append = |_: ShardId, _: &[u8]| {
                lsn += 1;
                Ok(Lsn(lsn))
            };
            inner.put(b"mine", b"newer", append).unwrap();
        }
        let gate = Gate::at(Point::Block, u64::MAX);
        let follower = scene.follow("follower", Arc::new(Gated { inner: inner.clone(), gate, tells: false }));
        let error = follower.wait().unwrap_err();
        assert!(error.to_string().contains("newer than the offered base"), "{error}");
        assert!(!inner.is_rebuilding(SHARD).unwrap());
        assert_eq!(inner.get(b"mine").unwrap().as_deref(), Some(&b"newer"[..]));
    });
}

#[test]
fn a_leader_without_a_state_of_its_own_refuses() {
    let directory = tempfile::tempdir().unwrap();
    let wire = Wire { transport: Some(Arc::new(InProcessTransport::new())), address: "leader" };
    let leader = wire.node(&directory.path().join("leader")).lead(wire.address).unwrap();
    let mut writer = leader.writer(SHARD).unwrap();
    for _ in 0..100 {
        writer.append(&[7; 2000]).unwrap();
    }
    leader.log(SHARD).unwrap().wait_synced(Lsn(100), deadline()).unwrap();
    assert!(leader.log(SHARD).unwrap().release_through(Lsn(100), "the test says so").unwrap() > 0);
    let store = Arc::new(FixedStore::open(directory.path().join("store"), &OPTIONS).unwrap());
    let follower = wire.node(&directory.path().join("follower")).follow("leader", store).unwrap();
    let error = follower.wait().unwrap_err();
    assert!(error.to_string().contains("no longer retained"), "{error}");
}

/// A target that cannot number its blocks: a map in memory, given as one snapshot in chunks. It outlives its follower, as
/// a state on disk would.
#[derive(Default)]
struct Snapshot(Arc<Mutex<State>>);

#[derive(Clone, Default)]
struct State {
    applied: Lsn,
    rebuilding: bool,
    sums: BTreeMap<u8, u64>,
    chunks: Vec<u8>,
}

impl State {
    fn apply(&mut self, record: Record<'_>) {
        assert_eq!(record.lsn, self.applied.next(), "in order, and nothing before the base is complete");
        *self.sums.entry(record.bytes[0]).or_default() += record.lsn.get();
        self.applied = record.lsn;
    }
}

struct SnapshotSource(BaseInfo, Vec<Vec<u8>>, u64);

impl BaseSource for SnapshotSource {
    fn info(&self) -> BaseInfo {
        self.0
    }
    fn next_run(&mut self, buffer: &mut [u8]) -> Result<Option<BlockRun>> {
        let Some(chunk) = self.1.pop() else { return Ok(None) };
        buffer[..chunk.len()].copy_from_slice(&chunk);
        self.2 += 1;
        Ok(Some(BlockRun { first: BlockId(self.2 - 1), count: 1, len: chunk.len() }))
    }
}

struct SnapshotSink(Arc<Mutex<State>>, Lsn);

impl BaseSink for SnapshotSink {
    fn put_block(&mut self, _: BlockId, bytes: &[u8]) -> Result<()> {
        self.0.lock().chunks.extend_from_slice(bytes);
        let mut state = self.0.lock();
        let chunks = state.chunks.clone();
        state.sums = chunks
            .chunks_exact(9)
            .map(|entry| (entry[0], u64::from_le_bytes(entry[1..].try_into().unwrap())))
            .collect();
        Ok(())
    }
    fn consistent_from(&self) -> Lsn {
        self.1
    }
    fn complete(&mut self, achieved: Lsn) -> Result<()> {
        let mut state = self.0.lock();
        assert!(state.applied >= achieved);
        state.rebuilding = false;
        Ok(())
    }
    fn cancel(&mut self) {}
}

impl ReplicationTarget for Snapshot {
    fn durable_applied(&self, _: ShardId) -> Result<Option<Lsn>> {
        let state = self.0.lock();
        Ok(Some(if state.rebuilding { Lsn::ZERO } else { state.applied }))
    }
    fn apply(&self, _: ShardId, record: Record<'_>) -> Result<()> {
        let mut state = self.0.lock();
        if record.lsn > state.applied {
            state.apply(record);
        }
        Ok(())
    }
    fn sync(&self, _: ShardId) -> Result<()> {
        Ok(())
    }
    fn needs_durable_log(&self) -> bool {
        true
    }
    fn is_rebuilding(&self, _: ShardId) -> Result<bool> {
        Ok(self.0.lock().rebuilding)
    }
    fn open_base(&self, _: ShardId) -> Result<Box<dyn BaseSource>> {
        let state = self.0.lock().clone();
        let chunks = state.sums.iter().map(|(key, sum)| [&[*key][..], &sum.to_le_bytes()].concat()).collect();
        let info = BaseInfo { base_lsn: state.applied, block_len: 0, block_count: 0 };
        Ok(Box::new(SnapshotSource(info, chunks, 0)))
    }
    fn begin_base(&self, _: ShardId, info: BaseInfo) -> Result<Box<dyn BaseSink>> {
        *self.0.lock() = State { applied: info.base_lsn, rebuilding: true, ..State::default() };
        Ok(Box::new(SnapshotSink(Arc::clone(&self.0), info.base_lsn)))
    }
}

#[test]
fn a_target_without_numbered_blocks_gets_the_base_first_and_the_log_after_it() {
    over_both(|wire| {
        let directory = tempfile::tempdir().unwrap();
        let (leaders, followers) = (Arc::new(Snapshot::default()), Arc::new(Snapshot::default()));
        let leader = wire.node(&directory.path().join("leader")).target(leaders.clone()).lead(wire.address).unwrap();
        let writer = Mutex::new(leader.writer(SHARD).unwrap());
        let append = || {
            let mut writer = writer.lock();
            let key = u8::try_from(writer.end().head.get() * 31 % 251).unwrap();
            writer.append(&[key; 500]).unwrap()
        };
        for _ in 0..600 {
            append();
        }
        let head = leader.log(SHARD).unwrap().head();
        reach(leader.applied(SHARD).unwrap().unwrap(), head);
        leader.log(SHARD).unwrap().wait_synced(head, deadline()).unwrap();
        assert!(leader.log(SHARD).unwrap().release_through(head, "the test says so").unwrap() > 0);
        let stop = AtomicBool::new(false);
        let follower = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    append();
                }
            });
            let follower = wire
                .node(&directory.path().join("follower"))
                .follow(leader.local_address(), followers.clone())
                .unwrap();
            reach(follower.applied(SHARD).unwrap(), Lsn(1));
            stop.store(true, Ordering::Relaxed);
            follower
        });
        assert_eq!(follower.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Completed);
        let head = leader.log(SHARD).unwrap().head();
        reach(follower.applied(SHARD).unwrap(), head);
        reach(leader.applied(SHARD).unwrap().unwrap(), head);
        assert_eq!(leaders.0.lock().sums, followers.0.lock().sums);
        follower.shutdown().unwrap();
        let again =
            wire.node(&directory.path().join("follower")).follow(leader.local_address(), followers.clone()).unwrap();
        let last = append();
        reach(again.applied(SHARD).unwrap(), last);
        assert_eq!(again.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Idle);
    });
}

/// What a follower that has nothing says.
fn follow_request(leader: &Leader) -> SyncRequest {
    let manifest = leader.manifest();
    SyncRequest {
        versions: PROTOCOL_VERSIONS,
        purpose: Purpose::Follow,
        cluster: manifest.cluster,
        node: NodeId(77),
        region: manifest.region,
        shard: SHARD,
        shard_count: manifest.shard_count,
        segment_size: manifest.segment_size,
        epoch: manifest.epoch,
        received: Lsn::ZERO,
        durable: Lsn::ZERO,
        applied: Lsn::ZERO,
        chain: Chain::genesis(manifest.cluster, manifest.region, SHARD),
        from: Lsn::ZERO,
        flags: 0,
    }
}

#[test]
fn neither_acknowledgements_nor_stale_words_make_a_follower_count() {
    over_both(|wire| {
        let scene = Scene::filled(wire);
        let transport = wire.transport.clone().unwrap_or_else(|| Arc::new(TcpTransport::new(TcpOptions::default())));
        let mut stream = transport.connect(scene.leader.local_address(), PATIENCE).unwrap();
        stream.sender.send_message(&Message::SyncRequest(follow_request(&scene.leader))).unwrap();
        let Message::ShardInfo(info) = stream.receiver.receive_message().unwrap() else { panic!("a ShardInfo is due") };
        assert_eq!((info.session_kind, info.target), (SessionKind::Rebuild, scene.head()));
        let Message::SessionControl(start) = stream.receiver.receive_message().unwrap() else {
            panic!("a start is due")
        };
        assert_eq!((start.action, start.session, start.target), (SessionAction::Start, info.session, info.target));
        assert!(start.log_start <= start.base_lsn.next() && start.log_start > Lsn(1), "{start:?}");
        // What the log lane needs was pinned before the follower was told, and the status speaks of the same session.
        let status = || scene.leader.status().shards.remove(0);
        let pins = status().pins;
        assert_eq!(pins.len(), 1, "{pins:?}");
        assert_eq!((pins[0].owner.as_str(), pins[0].reason.as_str()), ("node 77", "rebuild"));
        assert_eq!((pins[0].lsn, pins[0].lost), (start.log_start, false));
        let session = status().followers[0].session.unwrap();
        assert_eq!((session.id.0, session.kind), (info.session.0, towline::protocol::SessionKind::Rebuild));
        assert_eq!((session.phase, session.target), (towline::protocol::Phase::Issued, info.target));
        let completed = |session, epoch| SessionAck {
            session,
            epoch,
            phase: SessionPhase::Completed,
            achieved: info.target,
            reason: SessionFailure::None,
        };
        let stale = completed(SessionId(info.session.0 - 1), info.epoch);
        stream.sender.send_message(&Message::SessionAck(stale)).unwrap();
        let older = completed(info.session, Epoch(info.epoch.0 - 1));
        stream.sender.send_message(&Message::SessionAck(older)).unwrap();
        let marks = info.target;
        let ack = Ack {
            received: marks,
            durable: marks,
            applied: marks,
            chain: Chain::default(),
            epoch: info.epoch,
            session: info.session,
        };
        stream.sender.send_message(&Message::Ack(ack)).unwrap();
        let commits = scene.leader.commits(SHARD).unwrap();
        let taken_in = || commits.followers().first().is_some_and(|marks| marks.at(AckLevel::Applied) == info.target);
        while !taken_in() {
            std::thread::yield_now();
        }
        assert!(!commits.followers()[0].counts());
        let outcome = commits.wait(Lsn(1), "received:1".parse().unwrap(), Some(Instant::now()));
        assert_eq!(outcome, Outcome::TimedOut);
        // A word about this very session, from a follower that cannot have reached what it says: the stream ends.
        let lie = SessionAck { achieved: Lsn(1), ..completed(info.session, info.epoch) };
        stream.sender.send_message(&Message::SessionAck(lie)).unwrap();
        while stream.receiver.receive_header().is_ok_and(|header| {
            let mut body = vec![0; usize::try_from(header.len).unwrap()];
            stream.receiver.receive_exact(&mut body).is_ok()
        }) {}
        assert!(!commits.followers()[0].counts());
        let deadline = Instant::now() + PATIENCE;
        while !status().pins.is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(status().pins, []);
        let session = status().followers[0].session.unwrap();
        assert_eq!(session.phase, towline::protocol::Phase::Failed);
    });
}
