//! What a crash leaves of a store, and that replaying the log makes it whole again.
//!
//! **What breaks.** Until a sync, the device holds any mixture of what the file has held since the sync before, in
//! pieces of 512 bytes: some slots new, some old, some half of each, whatever the order in which they were written.
//!
//! **How the image is made.** The file is copied after each sync, and at random moments since. Each piece of the image
//! comes from one of these copies, chosen at random. The header page is always the newest: it is written outside the
//! mapping and synced at once.
//!
//! **What prevents harm.** The header says how far a sync got, slots say which record wrote them, and a checksum tells
//! a torn one. Replaying the log from the header's LSN must give exactly the model, with no slot left torn, and on the
//! way there nothing may be read that is neither.
//!
//! **What else breaks.** A sync fails, and the kernel takes the pages for written: the cache has what the device has
//! not, and no later sync tells. The process starts again on the same machine and reads the cache. What is not known to
//! be on the device must then be written again before the next sync: tests of that look at the header and at which
//! slots are written.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;

use proptest::prelude::*;

use super::tests::{Log, OPTIONS, contents};
use super::*;

const SHARD: ShardId = ShardId(0);
const PIECE: usize = 512;
const PAGE: usize = 4096;

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

/// What the file has held since the last sync.
struct Disk {
    path: PathBuf,
    copies: Vec<Vec<u8>>,
}

impl Disk {
    fn new(dir: &Path) -> Disk {
        let mut disk = Disk { path: shard_path(dir, 0), copies: Vec::new() };
        disk.look();
        disk
    }

    /// One more state that pieces may come from.
    fn look(&mut self) {
        self.copies.push(fs::read(&self.path).unwrap());
    }

    /// What is there now is there for good.
    fn synced(&mut self) {
        self.copies.clear();
        self.look();
    }

    /// A mixture. Copies that are shorter than the file end in the zeros that it grew by.
    fn image(&self, mut choose: impl FnMut(usize) -> usize) -> Vec<u8> {
        let newest = self.copies.last().unwrap();
        let mut image = newest.clone();
        for at in (PAGE..newest.len()).step_by(PIECE) {
            let copy = &self.copies[choose(self.copies.len())];
            let piece = &mut image[at..newest.len().min(at + PIECE)];
            let there = copy.get(at..copy.len().min(at + piece.len())).unwrap_or_default();
            piece.fill(0);
            piece[..there.len()].copy_from_slice(there);
        }
        image
    }
}

fn crash(image: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(shard_path(dir.path(), 0), image).unwrap();
    dir
}

/// Small and quick: a linear congruential generator, so that a failing case is one number.
fn dice(mut state: u64) -> impl FnMut(usize) -> usize {
    move |sides| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((state >> 33) % sides as u64).unwrap()
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8, u8, usize),
    Delete(u8),
    Look,
    Sync,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        10 => (0..24_u8, any::<u8>(), 0..=100_usize).prop_map(|(key, byte, len)| Step::Put(key, byte, len)),
        5 => (0..24_u8).prop_map(Step::Delete),
        3 => Just(Step::Look),
        1 => Just(Step::Sync),
    ];
    prop::collection::vec(step, 1..150)
}

/// Runs the steps and returns the model after every LSN.
fn run(steps: &[Step], store: &FixedStore, log: &Log, disk: &mut Disk) -> Vec<Model> {
    let mut models = vec![Model::new()];
    for step in steps {
        let append = |shard, record: &[u8]| log.append(shard, record);
        let mut model = models.last().unwrap().clone();
        let slots = store.shards[0].map.slot_count();
        match step {
            Step::Put(key, byte, len) => {
                store.put(&[*key], &vec![*byte; *len], append).unwrap();
                model.insert(vec![*key], vec![*byte; *len]);
                models.push(model);
            }
            Step::Delete(key) => {
                if store.delete(&[*key], append).unwrap().is_some() {
                    model.remove(&vec![*key]);
                    models.push(model);
                }
            }
            Step::Look => disk.look(),
            Step::Sync => {
                store.sync(SHARD).unwrap();
                disk.synced();
            }
        }
        if store.shards[0].map.slot_count() != slots {
            disk.look();
        }
    }
    disk.look();
    models
}

/// What may be read from a store that has not been recovered yet: nothing, or the truth as of what is applied.
fn check_reads(store: &FixedStore, models: &[Model]) {
    let model = &models[usize::try_from(store.applied(SHARD).unwrap().0).unwrap()];
    for key in 0..24_u8 {
        if let Ok(value) = store.get(&[key]) {
            assert_eq!(value.as_ref(), model.get(&vec![key]), "key {key}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn replay_mends_whatever_a_crash_leaves(steps in steps(), seed in any::<u64>()) {
        let dir = tempfile::tempdir().unwrap();
        let store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
        let (log, mut disk) = (Log::default(), Disk::new(dir.path()));
        let models = run(&steps, &store, &log, &mut disk);
        let synced = store.durable_applied(SHARD).unwrap().unwrap();
        let mut dice = dice(seed);

        let crashed = crash(&disk.image(&mut dice));
        let store = FixedStore::open(crashed.path(), &OPTIONS).unwrap();
        prop_assert_eq!(store.durable_applied(SHARD).unwrap(), Some(synced));
        for lsn in synced.0..=log.head(SHARD).0 {
            log.replay(&store, SHARD, Lsn(lsn).previous(), Lsn(lsn)).unwrap();
            check_reads(&store, &models);
        }
        prop_assert_eq!(store.torn_slots(SHARD).unwrap(), 0);
        prop_assert_eq!(&contents(&store), models.last().unwrap());
        store.put(b"and on", b"", |shard, record| log.append(shard, record)).unwrap();
    }

    #[test]
    fn a_crash_during_the_replay_is_like_any_other(steps in steps(), seed in any::<u64>()) {
        let dir = tempfile::tempdir().unwrap();
        let store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
        let (log, mut disk) = (Log::default(), Disk::new(dir.path()));
        let models = run(&steps, &store, &log, &mut disk);
        let mut dice = dice(seed);

        let first = crash(&disk.image(&mut dice));
        let store = FixedStore::open(first.path(), &OPTIONS).unwrap();
        let mut disk = Disk::new(first.path());
        let synced = store.durable_applied(SHARD).unwrap().unwrap();
        let mut middle = synced;
        for _ in 0..3 {
            let ahead = usize::try_from(log.head(SHARD).records_since(middle)).unwrap();
            let next = middle.plus(dice(ahead + 1) as u64);
            log.replay(&store, SHARD, middle, next).unwrap();
            middle = next;
            disk.look();
            if dice(3) == 0 {
                store.sync(SHARD).unwrap();
                disk.synced();
            }
        }

        let second = crash(&disk.image(&mut dice));
        let store = FixedStore::open(second.path(), &OPTIONS).unwrap();
        let synced = store.durable_applied(SHARD).unwrap().unwrap();
        log.replay(&store, SHARD, synced, Lsn::MAX).unwrap();
        prop_assert_eq!(&contents(&store), models.last().unwrap());
    }

    #[test]
    fn a_crash_during_a_rebuild_leaves_the_mark(steps in steps(), seed in any::<u64>(), cut in 0..30_usize) {
        let dir = tempfile::tempdir().unwrap();
        let leader = FixedStore::open(dir.path(), &OPTIONS).unwrap();
        let (log, mut disk) = (Log::default(), Disk::new(dir.path()));
        let models = run(&steps, &leader, &log, &mut disk);
        let mut dice = dice(seed);

        let other = tempfile::tempdir().unwrap();
        let follower = FixedStore::open(other.path(), &OPTIONS).unwrap();
        log.replay(&follower, SHARD, Lsn::ZERO, Lsn(log.head(SHARD).0 / 2)).unwrap();
        let mut disk = Disk::new(other.path());
        let base = |follower: &FixedStore, at_most: usize| {
            let mut source = leader.open_base(SHARD).unwrap();
            let mut sink = follower.begin_base(SHARD, source.info()).unwrap();
            let mut block = vec![0; source.info().block_len as usize];
            for _ in 0..at_most {
                let Some(run) = source.next_run(&mut block).unwrap() else { break };
                sink.put_block(run.first, &block).unwrap();
            }
            sink
        };
        drop(base(&follower, cut));
        disk.look();
        let crashed = crash(&disk.image(&mut dice));
        let follower = FixedStore::open(crashed.path(), &OPTIONS).unwrap();
        prop_assert!(follower.is_rebuilding(SHARD).unwrap() && follower.get(b"k").is_err());
        base(&follower, usize::MAX).complete(log.head(SHARD)).unwrap();
        prop_assert_eq!(&contents(&follower), models.last().unwrap());
    }
}

/// A slot reached the disk, the log's record did not, and another one took its LSN.
#[test]
fn the_effect_of_a_record_that_the_log_lost_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
    let log = Log::default();
    let put = |store: &FixedStore, key: &[u8]| store.put(key, b"", |shard, record| log.append(shard, record)).unwrap();
    put(&store, b"a");
    store.sync(SHARD).unwrap();
    put(&store, b"lost");
    let crashed = crash(&fs::read(shard_path(dir.path(), 0)).unwrap());

    log.0.borrow_mut().get_mut(&SHARD).unwrap().truncate(1);
    let store = FixedStore::open(crashed.path(), &OPTIONS).unwrap();
    let error = store.get(b"a").unwrap_err();
    assert!(error.to_string().contains("is being recovered: the log was replayed up to LSN 1 and is needed up to 2"));
    let mut record = Vec::new();
    Operation { slot: 1, key: b"other", value: Some(b"") }.encode(&mut record);
    for _ in 0..2 {
        let error = store.apply(SHARD, Record { lsn: Lsn(2), bytes: &record }).unwrap_err();
        assert!(error.is_corruption() && error.to_string().contains("the log has lost"), "{error}");
    }
    assert!(store.get(b"a").is_err());
    drop(store);

    // Nor does closing hide it; a rebuild mends it.
    let store = FixedStore::open(crashed.path(), &OPTIONS).unwrap();
    assert!(store.get(b"a").is_err());
    let leader_dir = tempfile::tempdir().unwrap();
    let leader = FixedStore::open(leader_dir.path(), &OPTIONS).unwrap();
    log.replay(&leader, SHARD, Lsn::ZERO, Lsn::MAX).unwrap();
    leader.apply(SHARD, Record { lsn: Lsn(2), bytes: &record }).unwrap();
    let mut source = leader.open_base(SHARD).unwrap();
    let mut sink = store.begin_base(SHARD, source.info()).unwrap();
    let mut block = vec![0; source.info().block_len as usize];
    while let Some(run) = source.next_run(&mut block).unwrap() {
        sink.put_block(run.first, &block).unwrap();
    }
    sink.complete(Lsn(2)).unwrap();
    assert_eq!(contents(&store), contents(&leader));
}

/// The file has grown since the last sync: the new slots are there, what is in them is as uncertain as anywhere.
#[test]
fn a_crash_after_growing_is_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
    let log = Log::default();
    let put = |key: u64| store.put(&key.to_le_bytes(), &[7; 90], |shard, record| log.append(shard, record)).unwrap();
    let first = store.shards[0].layout.grown(0);
    for key in 0..first - 10 {
        put(key);
    }
    store.sync(SHARD).unwrap();
    let mut disk = Disk::new(dir.path());
    for key in first - 10..first + 20 {
        put(key);
        if key % 7 == 0 {
            disk.look();
        }
    }
    disk.look();
    let mut torn = 0;
    for seed in 0..8 {
        let crashed = crash(&disk.image(dice(seed)));
        let again = FixedStore::open(crashed.path(), &OPTIONS).unwrap();
        torn += again.torn_slots(SHARD).unwrap();
        log.replay(&again, SHARD, again.durable_applied(SHARD).unwrap().unwrap(), Lsn::MAX).unwrap();
        assert_eq!(contents(&again), contents(&store));
    }
    assert!(torn > 0, "no slot was ever torn: the test shows nothing");
}

/// One slot of three is torn, before the replay and after.
#[test]
fn a_torn_slot_is_mended_by_the_replay_and_by_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
    let log = Log::default();
    for key in [b"a", b"b", b"c"] {
        store.put(key, &[1; 100], |shard, record| log.append(shard, record)).unwrap();
    }
    store.sync(SHARD).unwrap();
    store.put(b"b", &[2; 100], |shard, record| log.append(shard, record)).unwrap();
    let mut image = fs::read(shard_path(dir.path(), 0)).unwrap();
    let slot_len = store.shards[0].layout.slot_len();
    image[PAGE + 2 * slot_len - 20..][..4].fill(1); // a few bytes of the old value
    let crashed = crash(&image);

    let store = FixedStore::open(crashed.path(), &OPTIONS).unwrap();
    assert_eq!(store.torn_slots(SHARD).unwrap(), 1);
    assert!(store.get(b"b").unwrap_err().is_corruption(), "not found is no answer while a slot is torn");
    assert_eq!(store.get(b"a").unwrap().as_deref(), Some(&[1; 100][..]));
    assert!(store.scan(|_| ControlFlow::Continue(())).unwrap_err().is_corruption());
    log.replay(&store, SHARD, Lsn(3), Lsn(4)).unwrap();
    assert_eq!(store.get(b"b").unwrap().as_deref(), Some(&[2; 100][..]));
    assert_eq!(contents(&store).len(), 3);
}

/// A sync that fails, as the shard learns of it. The file goes on showing what was written.
fn fail_sync(store: &FixedStore) {
    let error = store.shards[0].poison("sync", std::io::Error::other("the device failed"));
    assert!(store.sync(SHARD).is_err(), "{error}");
}

/// The two copies of the header.
fn header_copies(dir: &Path) -> [Header; 2] {
    let bytes = fs::read(shard_path(dir, 0)).unwrap();
    [0, 2048].map(|at| Header::decode(bytes[at..].first_chunk().unwrap()).unwrap())
}

/// The slots written since the store was opened.
fn written(store: &FixedStore) -> Vec<u64> {
    let map = &store.shards[0].map;
    (0..map.slot_count().min(100)).filter(|&slot| map.was_written(slot)).collect()
}

#[test]
fn what_a_failed_sync_may_have_left_out_is_written_again() {
    // Through the mapping and through the file.
    for value_len in [100, 5_000] {
        let options = FixedStoreOptions { value_len, ..OPTIONS };
        let dir = tempfile::tempdir().unwrap();
        let store = FixedStore::open(dir.path(), &options).unwrap();
        let log = Log::default();
        let append = |shard, record: &[u8]| log.append(shard, record);
        for key in [b"a", b"b", b"c", b"d"] {
            store.put(key, b"old", append).unwrap();
        }
        store.sync(SHARD).unwrap();
        let synced = log.head(SHARD);
        store.put(b"b", b"new", append).unwrap();
        store.delete(b"d", append).unwrap();
        fail_sync(&store);
        drop(store);
        let before = header_copies(dir.path()).map(|header| header.generation);

        let store = FixedStore::open(dir.path(), &options).unwrap();
        assert_eq!(written(&store), [1, 3], "those newer than what is known to be synced, and no others");
        let after = header_copies(dir.path());
        assert_eq!(after.map(|header| header.generation).into_iter().max(), before.into_iter().max().map(|g| g + 1));
        assert!(after.iter().all(|header| header.applied == synced && !header.clean), "{after:?}");
        log.replay(&store, SHARD, synced, log.head(SHARD)).unwrap();
        store.close().unwrap();

        let closed = header_copies(dir.path());
        let store = FixedStore::open(dir.path(), &options).unwrap();
        assert_eq!(store.get(b"b").unwrap().as_deref(), Some(&b"new"[..]));
        assert_eq!((written(&store), header_copies(dir.path())), (vec![], closed), "all of that was synced");
    }
}

/// Bytes that this thread writes through files meanwhile, as the kernel counts them.
#[cfg(target_os = "linux")]
fn bytes_written<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let count = || {
        let account = fs::read_to_string("/proc/thread-self/io").unwrap();
        account.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().parse::<usize>().unwrap()
    };
    let before = count();
    let result = run();
    (result, count() - before)
}

#[cfg(target_os = "linux")]
#[test]
fn looking_at_a_store_after_a_failed_sync_writes_nothing() {
    // Through the file, so that the kernel would count it.
    let options = FixedStoreOptions { value_len: 5_000, ..OPTIONS };
    let dir = tempfile::tempdir().unwrap();
    let store = FixedStore::open(dir.path(), &options).unwrap();
    let log = Log::default();
    store.put(b"a", b"new", |shard, record| log.append(shard, record)).unwrap();
    fail_sync(&store);
    drop(store);
    let look = || FixedStore::open_read_only(dir.path()).unwrap().count().unwrap();
    assert_eq!(bytes_written(look), (1, 0));
    let (store, written) = bytes_written(|| FixedStore::open(dir.path(), &options).unwrap());
    assert_eq!(written, store.shards[0].layout.slot_len() + format::HEADER_LEN, "its owner writes both");
    log.replay(&store, SHARD, Lsn::ZERO, Lsn::MAX).unwrap();
    store.close().unwrap();
    let (_store, written) = bytes_written(|| FixedStore::open(dir.path(), &options).unwrap());
    assert_eq!(written, 0, "closed in order");
}

#[cfg(target_os = "linux")]
#[test]
fn kept_slots_that_a_failed_sync_may_have_left_out_are_written_again() {
    let directory = tempfile::tempdir().unwrap();
    let (leader, log) = (FixedStore::open(directory.path().join("leader"), &OPTIONS).unwrap(), Log::default());
    let put = |key: u64| leader.put(&key.to_le_bytes(), b"v", |shard, record| log.append(shard, record)).unwrap();
    let base_lsn = (0..6).map(put).last().unwrap();
    let mut source = leader.open_base(SHARD).unwrap();
    let (info, slot_len) = (source.info(), source.info().block_len as usize);
    let mut blocks = vec![0; 6 * slot_len];
    let first = source.next_run(&mut blocks).unwrap().unwrap().first;
    let kept = KeptBase { blocks: 4, applied: base_lsn };
    let newest = [1, 3].map(put)[1];

    // Slots that were in use before the rebuild are mapped; others are not.
    for is_mapped in [true, false] {
        let there = tempfile::tempdir().unwrap();
        let follower = FixedStore::open(there.path(), &OPTIONS).unwrap();
        if is_mapped {
            log.replay(&follower, SHARD, Lsn::ZERO, Lsn(1)).unwrap();
        }
        let mut sink = follower.begin_base(SHARD, info).unwrap();
        sink.put_blocks(first, slot_len, &blocks[..4 * slot_len]).unwrap();
        follower.sync(SHARD).unwrap();
        log.replay(&follower, SHARD, base_lsn, newest).unwrap();
        fail_sync(&follower);
        drop((sink, follower));

        let follower = FixedStore::open(there.path(), &OPTIONS).unwrap();
        let (_sink, by_file) = bytes_written(|| follower.resume_base(SHARD, info, kept).unwrap());
        let (by_map, expected) = (written(&follower), if is_mapped { (&[1, 3][..], 0) } else { (&[][..], 2) });
        assert_eq!((&by_map[..], by_file), (expected.0, expected.1 * slot_len));
    }
}

#[test]
fn a_rebuild_that_begins_anew_empties_again_what_a_failed_sync_may_have_left() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (leader, log) = (FixedStore::open(other.path(), &OPTIONS).unwrap(), Log::default());
    for key in [b"a", b"b"] {
        leader.put(key, b"v", |shard, record| log.append(shard, record)).unwrap();
    }
    let info = leader.open_base(SHARD).unwrap().info();
    let store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
    log.replay(&store, SHARD, Lsn::ZERO, Lsn::MAX).unwrap();
    store.sync(SHARD).unwrap();
    drop(store.begin_base(SHARD, info).unwrap());
    fail_sync(&store);
    drop(store);

    let store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
    assert!(written(&store).is_empty());
    drop(store.begin_base(SHARD, info).unwrap());
    assert_eq!(written(&store), (0..100).collect::<Vec<_>>(), "the device may still have two keys there");
}

#[test]
fn damage_to_one_copy_of_the_header_does_not_hide_the_mark_of_a_rebuild() {
    let log = Log::default();
    for is_given_up in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
        store.put(b"k", b"v", |shard, record| log.append(shard, record)).unwrap();
        store.sync(SHARD).unwrap();
        let info = store.open_base(SHARD).unwrap().info();
        let old = fs::read(shard_path(dir.path(), 0)).unwrap();
        match is_given_up {
            true => store.give_up(SHARD).unwrap(),
            false => drop(store.begin_base(SHARD, info).unwrap()),
        }
        assert!(header_copies(dir.path()).iter().all(|header| header.rebuilding && header.applied == Lsn::ZERO));
        drop(store);
        let mut image = fs::read(shard_path(dir.path(), 0)).unwrap();
        for copy in [0, 2048] {
            image[copy + 50] ^= 1;
            let damaged = crash(&image);
            image[copy + 50] ^= 1;
            let store = FixedStore::open(damaged.path(), &OPTIONS).unwrap();
            assert!(store.is_rebuilding(SHARD).unwrap() && store.get(b"k").is_err());
            assert!(header_copies(damaged.path()).iter().all(|header| header.rebuilding), "and it is in both again");
        }

        // Killed between the two.
        let newest = Header::decode_page(&image).unwrap();
        let at = usize::try_from(newest.offset()).unwrap();
        image[at..at + 64].copy_from_slice(&old[at..at + 64]);
        assert!(!Header::decode(image[at..].first_chunk().unwrap()).unwrap().rebuilding);
        let crashed = crash(&image);
        let store = FixedStore::open(crashed.path(), &OPTIONS).unwrap();
        assert!(store.is_rebuilding(SHARD).unwrap());
        assert!(header_copies(crashed.path()).iter().all(|header| header.rebuilding));
        log.0.borrow_mut().clear();
    }
}
