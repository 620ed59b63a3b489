//! A node's files: manifest, log and a fixed store that the log is applied to, with puts, deletes, growth, syncs and
//! closing in order, and crashes at any moment; and a store that is being rebuilt.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use towline::data_dir::{DataDir, Manifest, STORE};
use towline::target::{BaseSink, FixedStore, FixedStoreOptions, ReplicationTarget};
use towline::wal::{Log, LogWriter, Record, SyncPolicy, Wal, WalOptions};
use towline::{Epoch, Lsn, NodeId, ShardId};

use super::disk::{Disk, Moment, Observed};
use super::log::IDENTITY;
use super::random::Random;
use super::{Count, records_of};

const SHARD: ShardId = ShardId(0);
const SLOTS: &str = "slots-0000.tfs";
const KEYS: u64 = 40;

pub type Model = BTreeMap<Vec<u8>, Vec<u8>>;

/// What is known at the moment of a crash.
#[derive(Clone)]
struct Known {
    /// The state after each LSN, the empty one first.
    models: Vec<Rc<Model>>,
    /// Log: said to be synced.
    synced: u64,
    /// Store: said to be applied and synced.
    applied: u64,
    options: FixedStoreOptions,
}

struct Crash {
    moment: Moment,
    known: Known,
    /// The store was growing: what is left of the file's length counts as well.
    is_growing: bool,
}

struct Node<'a> {
    random: Random,
    observed: &'a Observed,
    wal: Wal,
    writer: LogWriter,
    /// None only while it is closed and opened again.
    store: Option<FixedStore>,
    known: Known,
    /// Writes are proposed, and applied from the log once they are synced.
    proposes: bool,
    /// What was known when the trap was set.
    trapped: Option<(u64, u64)>,
    /// The trap waits for the store to grow.
    is_growing: bool,
}

fn home(observed: &Observed) -> PathBuf {
    observed.path().join("node")
}

fn log_options() -> WalOptions {
    WalOptions { sync: SyncPolicy::Never, spare_segments: 1, ..WalOptions::default() }
}

fn open_log(home: &Path) -> towline::Result<(Wal, LogWriter)> {
    let directory = DataDir::open(home)?.expect("the node was made");
    let identity = towline::wal::LogIdentity { shard: SHARD, ..IDENTITY };
    Wal::open(&directory.shard_path(SHARD), identity, log_options())
}

pub fn key(random: &mut Random) -> Vec<u8> {
    format!("key {}", random.below(KEYS)).into_bytes()
}

pub fn value(random: &mut Random, options: &FixedStoreOptions) -> Vec<u8> {
    // A record fits in a segment.
    let len = random.index(options.value_len.min(50_000) as usize + 1);
    let byte = random.next().to_le_bytes()[0];
    vec![byte; len]
}

pub fn contents(store: &FixedStore) -> Model {
    let mut contents = Model::new();
    store
        .scan(|entry| {
            let before = contents.insert(entry.key.to_vec(), entry.value.to_vec());
            assert_eq!(before, None, "{:?} stands twice", entry.key);
            ControlFlow::Continue(())
        })
        .unwrap();
    contents
}

/// Crashes one node and what becomes of it.
pub fn run(seed: u64, count: &Count) {
    let mut random = Random(seed);
    let observed = Observed::new();
    let home = home(&observed);
    let manifest = Manifest {
        cluster: IDENTITY.cluster,
        node: NodeId(1),
        region: IDENTITY.region,
        shard_count: 1,
        segment_size: IDENTITY.segment_size,
        epoch: Epoch(1),
        own_epoch: true,
    };
    drop(DataDir::create(&home, manifest).unwrap());
    let (wal, mut writer) = open_log(&home).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    // The longest make the store grow every few keys.
    let value_len = random.pick(&[100, 3_000, 100_000]);
    let options = FixedStoreOptions { key_len: 16, value_len, shard_count: 1, prefix_bits: 0 };
    let store = Some(FixedStore::open(home.join(STORE), &options).unwrap());
    let known = Known { models: vec![Rc::default()], synced: 0, applied: 0, options };
    let proposes = random.percent(50);
    let mut node =
        Node { random, observed: &observed, wal, writer, store, known, proposes, trapped: None, is_growing: false };
    if node.random.percent(60) {
        // An empty store has no slots: it grows with the first write.
        node.trap_growth();
    }
    let crashes = node.live(80, 4);
    let mut random = node.random.split();
    drop(node);
    for crash in crashes {
        let images = if crash.is_growing { 8 } else { 3 };
        for _ in 0..images {
            check(&crash, &mut random.split(), 2, count);
        }
    }
}

impl Node<'_> {
    fn disk(&self) -> &Arc<Disk> {
        &self.observed.disk
    }

    fn log(&self) -> &Arc<Log> {
        self.wal.log()
    }

    fn store(&self) -> &FixedStore {
        self.store.as_ref().unwrap()
    }

    fn live(&mut self, steps: u64, crashes: usize) -> Vec<Crash> {
        let mut found = Vec::new();
        for step in 0..steps {
            self.step();
            if let Some(moment) = self.disk().caught() {
                let (synced, applied) = self.trapped.take().unwrap();
                let (known, is_growing) = (Known { synced, applied, ..self.known.clone() }, self.is_growing);
                found.push(Crash { moment, known, is_growing });
            }
            let left = (crashes - found.len().min(crashes)) as u64;
            if self.random.below(steps - step) < left {
                self.note();
                if self.random.percent(50) {
                    let (moment, known) = (self.disk().moment(), self.known.clone());
                    found.push(Crash { moment, known, is_growing: false });
                } else if self.trapped.is_none() && self.random.percent(30) {
                    self.trap_growth();
                } else if self.trapped.is_none() {
                    self.trapped = Some((self.known.synced, self.known.applied));
                    self.is_growing = false;
                    let events = self.random.below(6);
                    self.disk().trap(events);
                }
            }
        }
        found
    }

    /// The power is to go while the store grows next: between the new slots and the header that tells of them, too.
    fn trap_growth(&mut self) {
        self.note();
        self.trapped = Some((self.known.synced, self.known.applied));
        self.is_growing = true;
        let events = self.random.below(2);
        self.disk().trap_growth(events);
    }

    fn note(&mut self) {
        self.known.synced = self.log().synced().load().get();
        self.known.applied = self.store().durable_applied(SHARD).unwrap().unwrap().get();
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..70 => self.write(),
            70..78 => self.store().sync(SHARD).unwrap(),
            78..90 => self.disk().look(),
            90..95 => {
                self.note();
                let lsn = Lsn(self.known.applied);
                self.log().release_through(lsn, "it is applied").unwrap();
            }
            _ => {
                self.apply();
                let options = self.known.options;
                let closed = self.store.take().unwrap();
                closed.close().unwrap();
                self.store = Some(FixedStore::open(home(self.observed).join(STORE), &options).unwrap());
            }
        }
    }

    fn write(&mut self) {
        let mut model = Model::clone(self.known.models.last().unwrap());
        let key = key(&mut self.random);
        // First, because a crash may come within the call.
        let value = if self.random.percent(75) {
            let value = value(&mut self.random, &self.known.options);
            model.insert(key.clone(), value.clone());
            Some(value)
        } else {
            if model.remove(&key).is_none() {
                return;
            }
            None
        };
        self.known.models.push(Rc::new(model));
        let store = self.store.as_ref().unwrap();
        let (proposes, writer) = (self.proposes, &mut self.writer);
        let append = |_, record: &[u8]| {
            let lsn = writer.append(record)?;
            if !proposes {
                writer.log().wait_synced(lsn, None)?;
            }
            Ok(lsn)
        };
        let lsn = match (value, proposes) {
            (Some(value), true) => store.propose_put(&key, &value, append),
            (Some(value), false) => store.put(&key, &value, append),
            (None, true) => store.propose_delete(&key, append).map(Option::unwrap),
            (None, false) => store.delete(&key, append).map(Option::unwrap),
        };
        assert_eq!(lsn.unwrap().get(), self.known.models.len() as u64 - 1);
        if proposes && self.random.percent(30) {
            self.apply();
        }
    }

    /// Applies what is in the log, once it is synced.
    fn apply(&mut self) {
        let store = self.store.as_ref().unwrap();
        let log = self.wal.log();
        log.wait_synced(log.head(), None).unwrap();
        let applied = store.applied(SHARD).unwrap();
        for (lsn, bytes) in records_of(log, applied.next()) {
            if Lsn(lsn) > applied {
                store.apply(SHARD, Record { lsn: Lsn(lsn), bytes: &bytes }).unwrap();
            }
        }
    }
}

/// Whether the newer copy of a store's header says that it was closed in order. See `format.rs` for the bytes.
fn is_marked_clean(slots: &[u8]) -> bool {
    let copies = [0, 2048].map(|at| &slots[at..at + 64]);
    let u64_at = |copy: &[u8], at: usize| u64::from_le_bytes(copy[at..at + 8].try_into().unwrap());
    let valid = copies
        .into_iter()
        .filter(|copy| copy[..7] == *b"TOWLFIX" && crc32fast::hash(&copy[..60]).to_le_bytes() == copy[60..64]);
    valid.max_by_key(|copy| u64_at(copy, 48)).is_some_and(|copy| copy[15] & 1 != 0)
}

fn check(crash: &Crash, random: &mut Random, depth: u32, count: &Count) {
    if count.is_reached() {
        return;
    }
    let known = &crash.known;
    let image = crash.moment.image(random);
    let observed = Observed::with(&image);
    count.one(known.models.len() as u64 - 1 > known.applied);
    let home = home(&observed);
    let trapped = depth > 0 && random.percent(30);
    if trapped {
        observed.disk.trap(random.below(12));
    }
    let (wal, mut writer) = open_log(&home).unwrap();
    let log = Arc::clone(wal.log());
    let head = log.head().get();
    assert!(
        known.synced <= head && head < known.models.len() as u64,
        "log up to {head}, synced up to {}",
        known.synced
    );

    let clean = image.file(Path::new("node").join(STORE).join(SLOTS)).is_some_and(is_marked_clean);
    let store = FixedStore::open(home.join(STORE), &known.options).unwrap();
    let applied = store.durable_applied(SHARD).unwrap().unwrap();
    let context =
        format!("applied up to {applied}, known {}, log {} to {head}, clean {clean}", known.applied, log.tail());
    assert!(known.applied <= applied.get() && applied.get() <= head, "{context}");
    assert!(log.tail() <= applied.next(), "{context}");
    if clean {
        assert_eq!(store.torn_slots(SHARD).unwrap(), 0, "{context}");
        assert!(store.consistent_from(SHARD).unwrap() <= applied, "{context}");
    }
    check_reads(&store, known, &context);
    for (lsn, bytes) in records_of(&log, applied.next()) {
        store.apply(SHARD, Record { lsn: Lsn(lsn), bytes: &bytes }).unwrap();
        check_reads(&store, known, &context);
    }
    assert_eq!(store.torn_slots(SHARD).unwrap(), 0, "{context}");
    let due = &known.models[usize::try_from(head).unwrap()];
    assert!(contents(&store) == **due, "{context}");

    if let Some(moment) = observed.disk.caught() {
        let again = Crash { moment, known: known.clone(), is_growing: false };
        check(&again, random, depth - 1, count);
    }
    observed.disk.trap(u64::MAX);
    if random.percent(30) {
        let mut known = known.clone();
        known.models.truncate(usize::try_from(head).unwrap() + 1);
        writer.set_epoch(Epoch(writer.end().epoch.0 + 1)).unwrap();
        let (random, proposes) = (random.split(), random.percent(50));
        let mut node = Node {
            random,
            observed: &observed,
            wal,
            writer,
            store: Some(store),
            known,
            proposes,
            trapped: None,
            is_growing: false,
        };
        node.note();
        let found = if depth > 0 { node.live(20, 1) } else { node.live(5, 0) };
        node.apply();
        let Node { wal, writer, store, known, mut random, .. } = node;
        store.unwrap().close().unwrap();
        drop((wal, writer));
        let store = FixedStore::open(home.join(STORE), &known.options).unwrap();
        assert_eq!(store.durable_applied(SHARD).unwrap(), Some(Lsn(known.models.len() as u64 - 1)));
        assert!(contents(&store) == **known.models.last().unwrap(), "after closing in order");
        assert!(is_marked_clean(&std::fs::read(home.join(STORE).join(SLOTS)).unwrap()));
        drop(store);
        for crash in &found {
            for _ in 0..2 {
                check(crash, &mut random, depth - 1, count);
            }
        }
    }
}

/// What may be read of a store that is being recovered: nothing, or the state after what is applied.
fn check_reads(store: &FixedStore, known: &Known, context: &str) {
    let applied = store.applied(SHARD).unwrap();
    let model = &known.models[usize::try_from(applied.get()).unwrap()];
    for number in 0..KEYS {
        let key = format!("key {number}").into_bytes();
        if let Ok(value) = store.get(&key) {
            assert!(value.as_ref() == model.get(&key), "key {number} at LSN {applied}: {context}");
        }
    }
}

/// Where a rebuild stands.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// Asked to begin: not yet, or under way.
    Beginning,
    UnderWay,
    /// Asked to complete: under way, or done.
    Completing,
    Done,
}

/// A follower's store is rebuilt from a leader's, and the power goes: the mark is there for as long as what is in the
/// slots is neither the old state nor the new one.
pub fn rebuild(seed: u64, count: &Count) {
    let mut random = Random(seed);
    let value_len = random.pick(&[100, 3_000, 50_000]);
    let options = FixedStoreOptions { key_len: 16, value_len, shard_count: 1, prefix_bits: 0 };
    let (leader_home, observed) = (Observed::new(), Observed::new());
    let leader = FixedStore::open(leader_home.path().join(STORE), &options).unwrap();
    let follower = FixedStore::open(observed.path().join(STORE), &options).unwrap();
    let (mut records, mut models) = (Vec::new(), vec![Model::new()]);
    for _ in 0..20 + random.below(100) {
        let (key, value) = (key(&mut random), value(&mut random, &options));
        let mut model = models.last().unwrap().clone();
        let append = |_, record: &[u8]| {
            records.push(record.to_vec());
            Ok(Lsn(records.len() as u64))
        };
        if random.percent(75) {
            leader.put(&key, &value, append).unwrap();
            model.insert(key, value);
        } else if leader.delete(&key, append).unwrap().is_some() {
            model.remove(&key);
        }
        if records.len() == models.len() {
            models.push(model);
        }
    }
    let behind = random.index(records.len());
    for (lsn, bytes) in (1..).zip(&records[..behind]) {
        follower.apply(SHARD, Record { lsn: Lsn(lsn), bytes }).unwrap();
        if random.percent(5) {
            follower.sync(SHARD).unwrap();
        }
        if random.percent(10) {
            observed.disk.look();
        }
    }
    // As a node does: what it gives up is durable.
    follower.sync(SHARD).unwrap();

    let mut moments: Vec<(Phase, Moment)> = Vec::new();
    let mut at = |phase, disk: &Disk, call: &mut dyn FnMut()| {
        let events = random.below(4);
        disk.trap(events);
        call();
        moments.extend(disk.caught().map(|moment| (phase, moment)));
        disk.trap(u64::MAX);
    };
    let mut source = leader.open_base(SHARD).unwrap();
    let mut sink: Option<Box<dyn BaseSink>> = None;
    at(Phase::Beginning, &observed.disk, &mut || sink = Some(follower.begin_base(SHARD, source.info()).unwrap()));
    let mut sink = sink.unwrap();
    let mut block = vec![0; source.info().block_len as usize];
    moments.push((Phase::UnderWay, observed.disk.moment()));
    while let Some(run) = source.next_run(&mut block).unwrap() {
        sink.put_block(run.first, &block).unwrap();
    }
    moments.push((Phase::UnderWay, observed.disk.moment()));
    let head = Lsn(records.len() as u64);
    let mut random = random.split();
    {
        let events = random.below(3);
        observed.disk.trap(events);
        sink.complete(head).unwrap();
        moments.extend(observed.disk.caught().map(|moment| (Phase::Completing, moment)));
        observed.disk.trap(u64::MAX);
    }
    moments.push((Phase::Done, observed.disk.moment()));

    for (phase, moment) in moments {
        for _ in 0..2 {
            if count.is_reached() {
                return;
            }
            let left = Observed::with(&moment.image(&mut random));
            count.one(phase != Phase::Done);
            let store = FixedStore::open(left.path().join(STORE), &options).unwrap();
            let is_marked = store.is_rebuilding(SHARD).unwrap();
            match phase {
                Phase::UnderWay => assert!(is_marked),
                Phase::Done => assert!(!is_marked),
                Phase::Beginning | Phase::Completing => {}
            }
            if is_marked {
                assert!(store.get(b"key 1").is_err() && store.count().is_err(), "{phase:?}: a half-built store serves");
                continue;
            }
            let due = if phase == Phase::Beginning { behind } else { records.len() };
            assert_eq!(store.durable_applied(SHARD).unwrap(), Some(Lsn(due as u64)), "{phase:?}");
            assert!(contents(&store) == models[due], "{phase:?}");
        }
    }
}

/// A store whose syncs fail now and then: it is opened again, and finds in the page cache what is not on the device.
/// Now and then the power goes. Its log loses nothing.
pub fn fail(seed: u64, count: &Count) {
    let mut random = Random(seed);
    let observed = Observed::new();
    // Written through the file, where the model sees what is written again as it is.
    let options = FixedStoreOptions { key_len: 16, value_len: 5_000, shard_count: 1, prefix_bits: 0 };
    let (mut records, mut models) = (Vec::new(), vec![Model::new()]);
    for _ in 0..4 {
        observed.disk.fail_sync(random.below(16));
        let open = || FixedStore::open(observed.path().join(STORE), &options);
        if random.percent(60) {
            let after = random.pick(&[3, 30, 300]);
            observed.disk.fill_up(random.below(after));
        }
        let store = open().or_else(|_| open()).or_else(|_| open()).unwrap();
        lose_power(&observed, &options, &store, (&records, &models), &mut random, count);
        let mut is_whole = replay(&store, &records).is_ok();
        if is_whole {
            assert!(contents(&store) == models[records.len()], "opened and replayed");
        }
        for _ in 0..random.below(60) {
            if !is_whole {
                break;
            }
            if random.percent(20) {
                is_whole = store.sync(SHARD).is_ok();
                continue;
            }
            let (key, mut model) = (key(&mut random), models[records.len()].clone());
            let append = |_, record: &[u8]| {
                records.push(record.to_vec());
                Ok(Lsn(records.len() as u64))
            };
            is_whole = if random.percent(75) {
                let value = value(&mut random, &options);
                model.insert(key.clone(), value.clone());
                store.put(&key, &value, append).is_ok()
            } else {
                model.remove(&key);
                store.delete(&key, append).is_ok()
            };
            // The log may have it although it was not applied.
            if records.len() == models.len() {
                models.push(model);
            }
        }
        lose_power(&observed, &options, &store, (&records, &models), &mut random, count);
    }
}

fn replay(store: &FixedStore, records: &[Vec<u8>]) -> towline::Result<()> {
    let applied = store.durable_applied(SHARD)?.unwrap().get();
    let mut rest = (1..).zip(records).filter(|(lsn, _)| *lsn > applied);
    rest.try_for_each(|(lsn, bytes)| store.apply(SHARD, Record { lsn: Lsn(lsn), bytes }))
}

/// What a power cut could leave now is opened, and the log replayed.
fn lose_power(
    observed: &Observed,
    options: &FixedStoreOptions,
    store: &FixedStore,
    (records, models): (&[Vec<u8>], &[Model]),
    random: &mut Random,
    count: &Count,
) {
    let durable = store.durable_applied(SHARD).unwrap().unwrap();
    let moment = observed.disk.moment();
    for _ in 0..3 {
        let left = Observed::with(&moment.image(random));
        count.one(records.len() as u64 > durable.get());
        let store = FixedStore::open(left.path().join(STORE), options).unwrap();
        assert!(store.durable_applied(SHARD).unwrap().unwrap() >= durable, "what was applied durably is not");
        replay(&store, records).unwrap();
        assert_eq!(store.torn_slots(SHARD).unwrap(), 0);
        assert!(contents(&store) == models[records.len()], "replayed after a power cut");
    }
}
