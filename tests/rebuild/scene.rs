//! A leader with a store, its followers, and how they are compared.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use towline::target::{FixedStore, FixedStoreOptions, ReplicationTarget};
use towline::transport::{InProcessTransport, Transport};
use towline::types::shard_directory_name;
use towline::wal::LogWriter;
use towline::wal::scan::{Relation, compare_logs};
use towline::{
    Follower, Leader, Lsn, Node, NodeBuilder, Outcome, ShardId, Until, WaitStrategy, Waited, Watermark, wait_any,
};

use crate::gates::Doled;

pub const SHARD: ShardId = ShardId(0);
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const OPTIONS: FixedStoreOptions =
    FixedStoreOptions { key_len: 16, value_len: 100, shard_count: 1, prefix_bits: 0 };

pub fn deadline() -> Option<Instant> {
    Some(Instant::now() + PATIENCE)
}

pub fn reach(mark: &Watermark, at_least: Lsn) {
    let waited = wait_any(&[Until { mark, at_least }], WaitStrategy::Park, deadline());
    assert_eq!(waited, Waited::Reached(0), "at {}, due {at_least}", mark.load());
}

/// A transport that nothing else uses, and an address on it.
#[derive(Clone)]
pub struct Wire {
    pub transport: Option<Arc<dyn Transport>>,
    pub address: &'static str,
}

pub fn over_both(scenario: impl Fn(&Wire)) {
    scenario(&Wire { transport: None, address: "127.0.0.1:0" });
    scenario(&Wire { transport: Some(Arc::new(InProcessTransport::new())), address: "leader" });
}

/// A leader with a store, and the directory that everything is in.
pub struct Scene {
    pub wire: Wire,
    pub directory: tempfile::TempDir,
    pub store: Arc<FixedStore>,
    pub leader: Leader,
    pub writer: Arc<Mutex<LogWriter>>,
}

impl Wire {
    pub fn node(&self, directory: &Path) -> NodeBuilder {
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
    pub fn new(wire: &Wire) -> Scene {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(FixedStore::open(directory.path().join("leader-store"), &OPTIONS).unwrap());
        Scene::with(wire, directory, store, |builder| builder)
    }

    pub fn with(
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

    /// Everything applied, and the base of whoever is rebuilt given run by run as `allowed` says.
    pub fn doled(wire: &Wire, keys: u64, settings: impl FnOnce(NodeBuilder) -> NodeBuilder) -> (Scene, Arc<Watermark>) {
        let directory = tempfile::tempdir().unwrap();
        let inner = Arc::new(FixedStore::open(directory.path().join("leader-store"), &OPTIONS).unwrap());
        let allowed = Arc::new(Watermark::default());
        let target = Arc::new(Doled { inner: inner.clone(), allowed: Arc::clone(&allowed) });
        let scene = Scene::with(wire, directory, inner, |builder| settings(builder.target(target)));
        for key in 0..keys {
            scene.put(key, &[b'a'; 90]);
        }
        scene.trim();
        (scene, allowed)
    }

    /// The leader stops and leads again, at the same address; who follows sees a stream end.
    pub fn restart(self, settings: impl FnOnce(NodeBuilder) -> NodeBuilder) -> Scene {
        let address = self.leader.local_address().to_owned();
        let Scene { wire, directory, store, leader, writer } = self;
        drop(writer);
        drop(leader);
        let at = Wire { address: Box::leak(address.into_boxed_str()), ..wire };
        Scene::with(&at, directory, store, settings)
    }

    pub fn put(&self, key: u64, value: &[u8]) -> Lsn {
        let append = |_: ShardId, record: &[u8]| self.writer.lock().append(record);
        self.store.propose_put(&key.to_be_bytes(), value, append).unwrap()
    }

    pub fn delete(&self, key: u64) -> Option<Lsn> {
        let append = |_: ShardId, record: &[u8]| self.writer.lock().append(record);
        self.store.propose_delete(&key.to_be_bytes(), append).unwrap()
    }

    pub fn head(&self) -> Lsn {
        self.leader.log(SHARD).unwrap().head()
    }

    /// Everything applied and synced, and only the newest segment left.
    pub fn trim(&self) -> Lsn {
        let log = self.leader.log(SHARD).unwrap();
        let head = log.head();
        reach(self.leader.applied(SHARD).unwrap().unwrap(), head);
        log.wait_synced(head, deadline()).unwrap();
        log.release_through(head, "the test says so").unwrap();
        assert!(log.tail() > Lsn(1), "something was released");
        head
    }

    /// Some hundred keys, several segments, trimmed.
    pub fn filled(wire: &Wire) -> Scene {
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

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn open_store(&self, name: &str) -> Arc<FixedStore> {
        Arc::new(FixedStore::open(self.path(&format!("{name}-store")), &OPTIONS).unwrap())
    }

    pub fn follow(&self, name: &str, target: Arc<dyn ReplicationTarget>) -> Follower {
        self.wire.node(&self.path(name)).follow(self.leader.local_address(), target).unwrap()
    }

    /// Waits until a follower has applied everything, and both sides count it.
    pub fn catch_up(&self, follower: &Follower) {
        let head = self.head();
        reach(self.leader.applied(SHARD).unwrap().unwrap(), head);
        reach(follower.applied(SHARD).unwrap(), head);
        let outcome = self.leader.wait(SHARD, head, "applied:1".parse().unwrap(), deadline()).unwrap();
        assert_eq!(outcome, Outcome::Committed);
    }

    /// Stops everything and compares: slot by slot, and byte by byte from where the follower's log begins.
    pub fn stop_and_compare(self, followers: Vec<(&str, Follower, Arc<FixedStore>)>) {
        let tail = self.leader.log(SHARD).unwrap().tail();
        self.stop_and_compare_from(tail, followers);
    }

    /// The same where the leader's log may have been released further than `tail` since the followers were rebuilt.
    pub fn stop_and_compare_from(self, tail: Lsn, followers: Vec<(&str, Follower, Arc<FixedStore>)>) {
        for (name, follower, store) in followers {
            self.catch_up(&follower);
            assert_same(&self.store, &store);
            follower.shutdown().unwrap();
            self.assert_same_logs(name, tail);
        }
        let Scene { leader, writer, .. } = self;
        drop(writer);
        leader.shutdown().unwrap();
    }

    fn assert_same_logs(&self, name: &str, tail: Lsn) {
        let of = |node: &str| self.path(node).join(shard_directory_name(SHARD));
        let comparison = compare_logs(&of("leader"), &of(name)).unwrap();
        assert_eq!(comparison.relation, Relation::Identical, "{comparison:?}");
        assert_eq!(comparison.b.problems, 0, "{comparison:?}");
        assert!(comparison.b.tail >= tail && comparison.equal_bytes > 4096, "{comparison:?}");
    }
}

/// Slot, LSN, key and value of every entry.
pub fn entries(store: &FixedStore) -> Vec<(u64, Lsn, Vec<u8>, Vec<u8>)> {
    let mut entries = Vec::new();
    let scanned = store.scan(|entry| {
        entries.push((entry.slot, entry.lsn, entry.key.to_vec(), entry.value.to_vec()));
        ControlFlow::Continue(())
    });
    scanned.unwrap();
    entries
}

pub fn assert_same(leader: &FixedStore, follower: &FixedStore) {
    let (leaders, followers) = (entries(leader), entries(follower));
    assert!(leaders == followers, "{} and {} entries", leaders.len(), followers.len());
    assert_eq!(leader.count().unwrap(), follower.count().unwrap());
}

/// Puts and deletes without end on a thread of its own, until dropped. It waits for the disk now and then, so that the
/// leader's own applier keeps up.
pub struct Load(Option<std::thread::JoinHandle<()>>, Arc<AtomicBool>);

impl Load {
    pub fn on(scene: &Scene) -> Load {
        let (store, writer) = (Arc::clone(&scene.store), Arc::clone(&scene.writer));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut random = 0x9e37_79b9_7f4a_7c15u64;
            while !stopped.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                // Most of the first keys stay as they are: however fast this is, it leaves blocks for the base to
                // bring.
                let key = (1000 + random % 1500).to_be_bytes();
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
