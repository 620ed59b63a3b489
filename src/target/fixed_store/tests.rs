//! Scenarios on whole stores.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::target::BlockRun;

pub(super) const OPTIONS: FixedStoreOptions =
    FixedStoreOptions { key_len: 16, value_len: 100, shard_count: 1, prefix_bits: 0 };
const SHARD: ShardId = ShardId(0);

/// The records of each shard, in memory.
#[derive(Default)]
pub(super) struct Log(pub(super) RefCell<BTreeMap<ShardId, Vec<Vec<u8>>>>);

impl Log {
    pub(super) fn append(&self, shard: ShardId, record: &[u8]) -> Result<Lsn> {
        let mut shards = self.0.borrow_mut();
        let log = shards.entry(shard).or_default();
        log.push(record.to_vec());
        Ok(Lsn(log.len() as u64))
    }

    pub(super) fn head(&self, shard: ShardId) -> Lsn {
        Lsn(self.0.borrow().get(&shard).map_or(0, |log| log.len() as u64))
    }

    /// Applies what comes after `after`, up to `to`.
    pub(super) fn replay(&self, store: &FixedStore, shard: ShardId, after: Lsn, to: Lsn) -> Result<()> {
        let shards = self.0.borrow();
        let records = shards.get(&shard).map(Vec::as_slice).unwrap_or_default();
        for (lsn, bytes) in (1..).zip(records).filter(|(lsn, _)| after.0 < *lsn && *lsn <= to.0) {
            store.apply(shard, Record { lsn: Lsn(lsn), bytes })?;
        }
        Ok(())
    }
}

fn store() -> (FixedStore, Log, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (FixedStore::open(dir.path(), &OPTIONS).unwrap(), Log::default(), dir)
}

fn put(store: &FixedStore, log: &Log, key: &str, value: &str) -> Lsn {
    store.put(key.as_bytes(), value.as_bytes(), |shard, record| log.append(shard, record)).unwrap()
}

fn delete(store: &FixedStore, log: &Log, key: &str) -> Option<Lsn> {
    store.delete(key.as_bytes(), |shard, record| log.append(shard, record)).unwrap()
}

fn get(store: &FixedStore, key: &str) -> Option<String> {
    store.get(key.as_bytes()).unwrap().map(|value| String::from_utf8(value).unwrap())
}

pub(super) fn contents(store: &FixedStore) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut found = BTreeMap::new();
    let scanned = store.scan(|entry| {
        assert_eq!(store.get(entry.key).unwrap().as_deref(), Some(entry.value), "index and slots disagree");
        assert!(found.insert(entry.key.to_vec(), entry.value.to_vec()).is_none(), "a key in two slots");
        ControlFlow::Continue(())
    });
    scanned.unwrap();
    assert_eq!(store.count().unwrap(), found.len() as u64);
    found
}

/// All slots of a shard, as bytes; only what was synced or written through the mapping, which is the same to a reader.
fn slot_bytes(dir: &Path, shard: u16) -> Vec<u8> {
    fs::read(shard_path(dir, shard)).unwrap().split_off(4096)
}

/// Changes bytes of a closed store's file.
fn damage(dir: &Path, offset: u64, change: impl FnOnce(&mut Vec<u8>, usize)) {
    let path = shard_path(dir, 0);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes, usize::try_from(offset).unwrap());
    fs::write(path, bytes).unwrap();
}

#[test]
fn what_is_put_can_be_got_until_it_is_deleted() {
    let (store, log, _dir) = store();
    assert_eq!(get(&store, "a"), None);
    assert_eq!(put(&store, &log, "a", "one"), Lsn(1));
    assert_eq!(put(&store, &log, "b", ""), Lsn(2));
    assert_eq!(put(&store, &log, "a", "two"), Lsn(3));
    assert_eq!((get(&store, "a").as_deref(), get(&store, "b").as_deref()), (Some("two"), Some("")));
    let mut value = vec![9; 5];
    assert_eq!(store.get_into(b"a", &mut value).unwrap(), Some(Lsn(3)));
    assert_eq!(value, b"two");
    assert_eq!(delete(&store, &log, "a"), Some(Lsn(4)));
    assert_eq!(delete(&store, &log, "a"), None, "no record for a key that is not there");
    assert_eq!((get(&store, "a"), store.count().unwrap(), log.head(SHARD)), (None, 1, Lsn(4)));
}

#[test]
fn deleted_slots_are_used_again_lowest_first() {
    let (store, log, dir) = store();
    for key in ["a", "b", "c", "d"] {
        put(&store, &log, key, key);
    }
    delete(&store, &log, "c");
    delete(&store, &log, "b");
    put(&store, &log, "e", "e");
    drop(store);
    let store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
    put(&store, &log, "f", "f");
    put(&store, &log, "g", "g");
    let mut slots = Vec::new();
    store
        .scan(|entry| {
            slots.push((entry.slot, entry.key.to_vec()));
            ControlFlow::Continue(())
        })
        .unwrap();
    let expected = ["a", "e", "f", "d", "g"].map(|key| key.as_bytes().to_vec());
    assert_eq!(slots, (0..).zip(expected).collect::<Vec<_>>());
}

#[test]
fn wrong_sizes_are_refused_before_anything_is_appended() {
    let (store, log, _dir) = store();
    let append = |shard, record: &[u8]| log.append(shard, record);
    assert!(store.put(&[], b"", append).is_err());
    assert!(store.put(&[1; 17], b"", append).is_err());
    assert!(store.put(b"k", &[0; 101], append).is_err());
    assert!(store.get(&[1; 17]).is_err());
    assert_eq!(log.head(SHARD), Lsn::ZERO);
    assert!(store.put(&[1; 16], &[0; 100], append).is_ok());
}

#[test]
fn a_failed_append_changes_nothing() {
    let (store, log, _dir) = store();
    let failed = store.put(b"a", b"x", |_, _| Err(Error::ShutDown));
    assert!(failed.unwrap_err().is_shutdown());
    assert_eq!(contents(&store).len(), 0);
    put(&store, &log, "b", "y");
    store
        .scan(|entry| {
            assert_eq!(entry.slot, 0);
            ControlFlow::Continue(())
        })
        .unwrap();
}

#[test]
fn a_store_grows_and_a_follower_grows_alike() {
    let (leader, log, dir) = store();
    let other = tempfile::tempdir().unwrap();
    let follower = FixedStore::open(other.path(), &OPTIONS).unwrap();
    let first = leader.shards[0].layout.grown(0);
    for number in 0..=first + 10 {
        put(&leader, &log, &format!("{number}"), "v");
    }
    delete(&leader, &log, "5");
    put(&leader, &log, "5 again", "w");
    log.replay(&follower, SHARD, Lsn::ZERO, Lsn::MAX).unwrap();
    assert!(leader.shards[0].map.slot_count() > first);
    assert_eq!(contents(&leader), contents(&follower));
    assert_eq!(contents(&leader).len() as u64, first + 11);
    leader.close().unwrap();
    follower.close().unwrap();
    assert!(slot_bytes(dir.path(), 0) == slot_bytes(other.path(), 0), "leader and follower differ");
}

#[test]
fn applying_again_is_nothing_and_gaps_are_refused() {
    let (leader, log, _dir) = store();
    put(&leader, &log, "a", "1");
    put(&leader, &log, "a", "2");
    put(&leader, &log, "a", "3");
    log.replay(&leader, SHARD, Lsn::ZERO, Lsn::MAX).unwrap();
    assert_eq!(get(&leader, "a").as_deref(), Some("3"));
    let bytes = log.0.borrow()[&SHARD][0].clone();
    let error = leader.apply(SHARD, Record { lsn: Lsn(5), bytes: &bytes }).unwrap_err();
    assert!(error.to_string().contains("LSN 3 and cannot apply 5"), "{error}");
    assert!(leader.apply(ShardId(1), Record { lsn: Lsn(1), bytes: &bytes }).is_err());
}

#[test]
fn records_that_contradict_the_slots_are_refused() {
    let (store, log, _dir) = store();
    put(&store, &log, "a", "1");
    let next = |operation: Operation<'_>| {
        let mut bytes = Vec::new();
        operation.encode(&mut bytes);
        store.apply(SHARD, Record { lsn: Lsn(2), bytes: &bytes }).unwrap_err()
    };
    let far = store.shards[0].layout.grown(store.shards[0].map.slot_count());
    for operation in [
        Operation { slot: 0, key: b"b", value: Some(b"") },
        Operation { slot: 1, key: b"a", value: Some(b"") },
        Operation { slot: 0, key: b"b", value: None },
        Operation { slot: 1, key: b"a", value: None },
        Operation { slot: far, key: b"b", value: Some(b"") },
        Operation { slot: MAX_SLOTS - 1, key: b"b", value: Some(b"") },
    ] {
        let error = next(operation);
        assert!(matches!(error, Error::Corrupt { lsn: Some(Lsn(2)), .. }), "{operation:?}: {error}");
    }
    assert_eq!(store.applied(SHARD), Some(Lsn(1)));
    put(&store, &log, "b", "fine");
}

#[test]
fn proposals_are_invisible_until_applied_and_take_each_other_into_account() {
    let (store, log, _dir) = store();
    let append = |shard, record: &[u8]| log.append(shard, record);
    put(&store, &log, "a", "old");
    assert_eq!(store.propose_put(b"b", b"1", append).unwrap(), Lsn(2));
    assert_eq!(store.propose_put(b"b", b"2", append).unwrap(), Lsn(3));
    assert_eq!(store.propose_delete(b"a", append).unwrap(), Some(Lsn(4)));
    assert_eq!(store.propose_delete(b"a", append).unwrap(), None, "will be gone by then");
    assert_eq!(store.propose_put(b"a", b"new", append).unwrap(), Lsn(5));
    assert_eq!((get(&store, "a").as_deref(), get(&store, "b")), (Some("old"), None));
    assert!(store.put(b"c", b"", append).unwrap_err().to_string().contains("LSN 2 of shard 0 is proposed"));
    log.replay(&store, SHARD, Lsn(1), Lsn(4)).unwrap();
    assert_eq!((get(&store, "a"), get(&store, "b").as_deref()), (None, Some("2")));
    log.replay(&store, SHARD, Lsn(4), Lsn(5)).unwrap();
    assert_eq!(get(&store, "a").as_deref(), Some("new"));
    put(&store, &log, "c", "");
    assert_eq!(contents(&store).len(), 3);
}

#[test]
fn abandoned_proposals_leave_their_slots_free() {
    let (store, log, _dir) = store();
    let append = |shard, record: &[u8]| log.append(shard, record);
    put(&store, &log, "a", "1");
    store.propose_put(b"lost", b"", append).unwrap();
    store.propose_put(b"lost too", b"", append).unwrap();
    // The log is cut after LSN 1, and another leader's record takes LSN 2 and the slot of the first proposal.
    log.0.borrow_mut().get_mut(&SHARD).unwrap().truncate(1);
    store.abandon_proposals().unwrap();
    let mut record = Vec::new();
    Operation { slot: 1, key: b"theirs", value: Some(b"") }.encode(&mut record);
    store.apply(SHARD, Record { lsn: log.append(SHARD, &record).unwrap(), bytes: &record }).unwrap();
    put(&store, &log, "ours", "");
    let mut slots = Vec::new();
    store
        .scan(|entry| {
            slots.push(entry.slot);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(slots, [0, 1, 2]);
}

#[test]
fn other_options_are_refused_by_name() {
    let (store, _, dir) = store();
    drop(store);
    for (options, expected) in [
        (FixedStoreOptions { key_len: 17, ..OPTIONS }, "key_len 16, not 17"),
        (FixedStoreOptions { value_len: 99, ..OPTIONS }, "value_len 100, not 99"),
        (FixedStoreOptions { shard_count: 2, ..OPTIONS }, "shard_count 1, not 2"),
        (FixedStoreOptions { shard_count: 2, prefix_bits: 1, ..OPTIONS }, "shard_count 1, not 2"),
    ] {
        let error = FixedStore::open(dir.path(), &options).unwrap_err();
        assert!(error.to_string().ends_with(expected) && matches!(error, Error::Mismatch { .. }), "{error}");
    }
}

#[test]
fn a_store_is_opened_once() {
    let (store, _, dir) = store();
    assert!(matches!(FixedStore::open(dir.path(), &OPTIONS), Err(Error::InUse { .. })));
    drop(store);
    FixedStore::open(dir.path(), &OPTIONS).unwrap();
}

#[test]
fn shards_have_their_own_logs_and_files() {
    let dir = tempfile::tempdir().unwrap();
    let options = FixedStoreOptions { shard_count: 4, prefix_bits: 2, ..OPTIONS };
    let store = FixedStore::open(dir.path(), &options).unwrap();
    let log = Log::default();
    for byte in 0..=255_u8 {
        store.put(&[byte], &[byte], |shard, record| log.append(shard, record)).unwrap();
    }
    assert!((0..4).all(|shard| log.head(ShardId(shard)) == Lsn(64)));
    store.close().unwrap();
    fs::remove_file(shard_path(dir.path(), 2)).unwrap();
    let error = FixedStore::open(dir.path(), &options).unwrap_err();
    assert!(error.to_string().contains("slots-0002.tfs"), "{error}");
}

#[test]
fn a_flipped_byte_is_never_served() {
    let (store, log, dir) = store();
    for key in ["a", "b", "c"] {
        put(&store, &log, key, "value");
    }
    let slot_size = store.shards[0].layout.slot_size;
    store.close().unwrap();
    for at in 0..slot_size {
        let offset = 4096 + u64::from(slot_size + at);
        damage(dir.path(), offset, |bytes, at| bytes[at] ^= 0x40);
        let store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
        assert_eq!((store.torn_slots(SHARD).unwrap(), get(&store, "a").as_deref()), (1, Some("value")));
        for error in [store.get(b"b").unwrap_err(), store.get(b"z").unwrap_err(), store.count().unwrap_err()] {
            assert!(error.is_corruption(), "byte {at}: {error}");
        }
        assert!(store.scan(|_| ControlFlow::Continue(())).unwrap_err().is_corruption());
        assert!(store.open_base(SHARD).err().unwrap().is_corruption());
        assert!(store.put(b"z", b"", |_, _| panic!("appended")).unwrap_err().is_corruption());
        drop(store);
        let reader = FixedStore::open_read_only(dir.path()).unwrap();
        assert!(reader.get(b"b").unwrap_err().is_corruption());
        assert_eq!(reader.get(b"c").unwrap().as_deref(), Some(&b"value"[..]));
        damage(dir.path(), offset, |bytes, at| bytes[at] ^= 0x40);
    }
    assert_eq!(contents(&FixedStore::open(dir.path(), &OPTIONS).unwrap()).len(), 3);
}

#[test]
fn damage_under_an_open_store_is_found_by_the_read() {
    let (store, log, dir) = store();
    put(&store, &log, "a", "value");
    let file = File::options().write(true).open(shard_path(dir.path(), 0)).unwrap();
    write_all_at(&file, b"x", 4096 + 24 + 16).unwrap();
    let error = store.get(b"a").unwrap_err();
    assert!(matches!(error, Error::Corrupt { offset: 4096, .. }), "{error}");
}

#[test]
fn a_file_that_is_cut_off_is_refused() {
    let (store, log, dir) = store();
    put(&store, &log, "a", "value");
    store.close().unwrap();
    let path = shard_path(dir.path(), 0);
    let len = fs::metadata(&path).unwrap().len();
    for cut in [0, 63, 4096, len - 1] {
        let other = tempfile::tempdir().unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::write(shard_path(other.path(), 0), &bytes[..usize::try_from(cut).unwrap()]).unwrap();
        assert!(FixedStore::open(other.path(), &OPTIONS).unwrap_err().is_corruption(), "cut at {cut}");
    }
}

#[test]
fn a_reader_sees_a_store_that_is_open() {
    let (store, log, dir) = store();
    put(&store, &log, "a", "1");
    let reader = FixedStore::open_read_only(dir.path()).unwrap();
    put(&store, &log, "a", "2");
    put(&store, &log, "b", "3");
    assert_eq!(reader.get(b"a").unwrap().as_deref(), Some(&b"2"[..]));
    assert_eq!((reader.count().unwrap(), reader.get(b"none").unwrap()), (2, None));
    assert_eq!(reader.durable_applied(SHARD).unwrap(), Lsn::ZERO);
    store.sync(SHARD).unwrap();
    assert_eq!(reader.durable_applied(SHARD).unwrap(), Lsn(3));
    assert_eq!(reader.topology(), store.topology());
}

#[test]
fn after_a_failed_sync_nothing_is_written_or_reported_as_durable() {
    let (store, log, dir) = store();
    put(&store, &log, "a", "1");
    store.sync(SHARD).unwrap();
    put(&store, &log, "b", "2");
    let failed = store.shards[0].poison("sync", std::io::Error::other("the disk is gone"));
    assert!(failed.to_string().ends_with("the disk is gone"));
    for error in [
        store.sync(SHARD).unwrap_err(),
        store.put(b"c", b"", |_, _| panic!("appended")).unwrap_err(),
        store.begin_base(SHARD, BaseInfo { base_lsn: Lsn(9), block_len: 144, block_count: 0 }).err().unwrap(),
    ] {
        assert!(matches!(error, Error::Poisoned { shard: SHARD, .. }), "{error}");
    }
    assert_eq!(store.durable_applied(SHARD).unwrap(), Some(Lsn(1)));
    assert_eq!(get(&store, "b").as_deref(), Some("2"), "reading goes on");
    drop(store);
    let header = read_header(&shard_path(dir.path(), 0), &File::open(shard_path(dir.path(), 0)).unwrap()).unwrap();
    assert!(!header.clean && header.applied == Lsn(1));
}

/// A crash between extending the file and noting it in the header leaves a tail that counts for nothing.
#[test]
fn what_lies_behind_the_last_slot_is_zeroed_before_use() {
    let (store, log, dir) = store();
    store.close().unwrap();
    let path = shard_path(dir.path(), 0);
    let mut bytes = fs::read(&path).unwrap();
    bytes.resize(bytes.len() + 100_000, 0x55);
    fs::write(&path, bytes).unwrap();
    let store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
    put(&store, &log, "a", "1");
    assert_eq!((contents(&store).len(), store.torn_slots(SHARD).unwrap()), (1, 0));
    store.close().unwrap();
    assert_eq!(FixedStore::open(dir.path(), &OPTIONS).unwrap().torn_slots(SHARD).unwrap(), 0);
}

#[test]
fn an_interrupted_making_of_a_store_is_made_again() {
    let options = FixedStoreOptions { shard_count: 3, ..OPTIONS };
    let layout = Layout::new(options.key_len, options.value_len).unwrap();
    // Killed before this shard had its name; and opened with fewer shards than that was to have.
    for (shard, shard_count) in [(0, 3), (1, 3), (2, 3), (0, 1), (1, 2)] {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), &options, layout).unwrap();
        (0..=shard).for_each(|number| fs::remove_file(shard_path(dir.path(), number)).unwrap());
        for half in [&b""[..], b"half"] {
            fs::write(shard_path(dir.path(), shard).with_extension("new"), half).unwrap();
        }
        let options = FixedStoreOptions { shard_count, ..options };
        let store = FixedStore::open(dir.path(), &options).unwrap();
        let log = Log::default();
        for key in 0..50 {
            put(&store, &log, &key.to_string(), "value");
        }
        store.close().unwrap();
        assert_eq!(contents(&FixedStore::open(dir.path(), &options).unwrap()).len(), 50);
    }
}

#[test]
fn a_store_that_has_lost_its_first_file_is_not_made_again() {
    let options = FixedStoreOptions { shard_count: 4, prefix_bits: 2, ..OPTIONS };
    // In use: none, the first, the last. An open that was cut short before it came to the others tells too.
    for used in [&[][..], &[0x00], &[0xff]] {
        let dir = tempfile::tempdir().unwrap();
        let store = FixedStore::open(dir.path(), &options).unwrap();
        let log = Log::default();
        for byte in used {
            store.put(&[*byte], b"value", |shard, record| log.append(shard, record)).unwrap();
        }
        store.close().unwrap();
        let first = fs::read(shard_path(dir.path(), 0)).unwrap();
        fs::remove_file(shard_path(dir.path(), 0)).unwrap();
        let files = || (1..4).map(|shard| fs::read(shard_path(dir.path(), shard)).unwrap()).collect::<Vec<_>>();
        let before = files();
        for options in [options, FixedStoreOptions { shard_count: 1, prefix_bits: 0, ..options }] {
            let error = FixedStore::open(dir.path(), &options).unwrap_err();
            let text = error.to_string();
            assert!(error.is_corruption() && text.contains("slots-0000.tfs") && text.contains("missing"), "{text}");
            assert_eq!(FixedStore::open_read_only(dir.path()).unwrap_err().to_string(), text);
        }
        assert!(files() == before && !shard_path(dir.path(), 0).exists());
        fs::write(shard_path(dir.path(), 0), first).unwrap();
        assert_eq!(contents(&FixedStore::open(dir.path(), &options).unwrap()).len(), used.len());
    }
}

#[test]
fn a_store_that_has_lost_another_file_is_damaged_and_not_gone() {
    let options = FixedStoreOptions { shard_count: 3, ..OPTIONS };
    let dir = tempfile::tempdir().unwrap();
    FixedStore::open(dir.path(), &options).unwrap().close().unwrap();
    fs::remove_file(shard_path(dir.path(), 1)).unwrap();
    let errors = [
        FixedStore::open(dir.path(), &options).map(drop).unwrap_err(),
        FixedStore::open_read_only(dir.path()).map(drop).unwrap_err(),
    ];
    for error in errors {
        let text = error.to_string();
        assert!(error.is_corruption() && text.contains("slots-0001.tfs") && text.contains("missing"), "{text}");
    }
    // Where there is none, or none was ever used, there is nothing to look at.
    let none = [dir.path().join("nowhere"), dir.path().join("empty"), dir.path().join("half")];
    none[1..].iter().for_each(|path| fs::create_dir(path).unwrap());
    create(&none[2], &options, Layout::new(options.key_len, options.value_len).unwrap()).unwrap();
    fs::remove_file(shard_path(&none[2], 0)).unwrap();
    for path in none {
        let error = FixedStore::open_read_only(&path).map(drop).unwrap_err();
        assert!(matches!(&error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound), "{error}");
    }
}

#[test]
fn a_damaged_file_beside_a_missing_first_one_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    for bytes in [&b""[..], b"anything", &[0; 5_000]] {
        let path = shard_path(dir.path(), 1);
        fs::write(&path, bytes).unwrap();
        let error = FixedStore::open(dir.path(), &FixedStoreOptions { shard_count: 2, ..OPTIONS }).unwrap_err();
        assert!(error.is_corruption() && error.to_string().contains("slots-0000.tfs"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
}

/// It may be there: a link that leads to itself stands for whatever keeps the system from looking.
#[cfg(unix)]
#[test]
fn a_first_file_that_cannot_be_looked_for_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = shard_path(dir.path(), 0);
    std::os::unix::fs::symlink(&path, &path).unwrap();
    let error = FixedStore::open(dir.path(), &OPTIONS).unwrap_err();
    assert!(matches!(error, Error::Io { action: "look for", .. }), "{error}");
    assert!(fs::symlink_metadata(&path).unwrap().is_symlink(), "it was replaced");
}

/// Values are one repeated byte, so half a slot would show.
#[test]
fn concurrent_readers_never_see_half_a_slot() {
    let (store, log, dir) = store();
    for key in 0..8_u8 {
        put(&store, &log, &key.to_string(), &"0".repeat(100));
    }
    let done = AtomicBool::new(false);
    let whole = |value: &[u8]| assert!(value.len() == 100 && value.iter().all(|&byte| byte == value[0]), "{value:?}");
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for key in 0..8_u8 {
                        if let Some(value) = store.get(key.to_string().as_bytes()).unwrap() {
                            whole(&value);
                        }
                    }
                    store
                        .scan(|entry| {
                            whole(entry.value);
                            ControlFlow::Continue(())
                        })
                        .unwrap();
                }
            });
        }
        scope.spawn(|| {
            let reader = FixedStore::open_read_only(dir.path()).unwrap();
            while !done.load(Ordering::Relaxed) {
                reader
                    .scan(|entry| {
                        whole(entry.value);
                        ControlFlow::Continue(())
                    })
                    .unwrap();
            }
        });
        for round in 0..4_000_u32 {
            let key = (round % 8).to_string();
            if round % 5 == 4 {
                delete(&store, &log, &key);
            } else {
                let digit = round % 10;
                put(&store, &log, &key, &digit.to_string().repeat(100));
            }
            if round % 500 == 0 {
                store.sync(SHARD).unwrap();
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// Copies a base while the leader goes on writing, with the log lane running ahead of the copy.
#[test]
fn a_rebuild_under_writes_ends_with_the_same_slots() {
    let (leader, log, dir) = store();
    for number in 0..3_000 {
        put(&leader, &log, &format!("{number}"), "base");
    }
    let other = tempfile::tempdir().unwrap();
    let follower = FixedStore::open(other.path(), &OPTIONS).unwrap();
    log.replay(&follower, SHARD, Lsn::ZERO, Lsn(10)).unwrap();

    let mut source = leader.open_base(SHARD).unwrap();
    let info = source.info();
    assert_eq!(info.base_lsn, Lsn(3_000));
    let mut sink = follower.begin_base(SHARD, info).unwrap();
    assert!(follower.is_rebuilding(SHARD).unwrap());
    assert!(follower.get(b"1").unwrap_err().to_string().contains("being rebuilt"));
    assert!(FixedStore::open_read_only(other.path()).unwrap().get(b"1").is_err());
    assert_eq!(follower.durable_applied(SHARD).unwrap(), Some(Lsn::ZERO));

    let mut buffer = vec![0; 50 * info.block_len as usize];
    let (mut round, mut applied, mut blocks) = (0, info.base_lsn, 0);
    while let Some(run) = source.next_run(&mut buffer).unwrap() {
        delete(&leader, &log, &format!("{}", round * 7));
        put(&leader, &log, &format!("{}", 2_999 - round), "live");
        put(&leader, &log, &format!("new {round}"), "live");
        if round % 2 == 0 {
            // Ahead of the copy in some slots, behind it in others.
            log.replay(&follower, SHARD, applied, log.head(SHARD)).unwrap();
            applied = log.head(SHARD);
        }
        for (block, bytes) in (run.first.0..).zip(buffer[..run.len].chunks(info.block_len as usize)) {
            sink.put_block(BlockId(block), bytes).unwrap();
            blocks += 1;
        }
        round += 1;
    }
    assert!(blocks >= 2_900, "{blocks}");
    put(&leader, &log, "last", "live");
    let error = sink.complete(log.head(SHARD)).unwrap_err();
    assert!(error.to_string().contains("needs the log up to"), "{error}");
    log.replay(&follower, SHARD, applied, log.head(SHARD)).unwrap();
    sink.complete(log.head(SHARD)).unwrap();
    assert!(sink.complete(log.head(SHARD)).is_err(), "it is over");
    assert_eq!(follower.durable_applied(SHARD).unwrap(), Some(log.head(SHARD)));
    assert_eq!(contents(&follower), contents(&leader));
    put(&leader, &log, "after", "live");
    log.replay(&follower, SHARD, Lsn::ZERO, Lsn::MAX).unwrap();
    leader.close().unwrap();
    follower.close().unwrap();
    assert!(slot_bytes(dir.path(), 0) == slot_bytes(other.path(), 0), "leader and follower differ");
}

#[test]
fn blank_blocks_are_left_out_of_a_base() {
    let (store, log, _dir) = store();
    for slot in [1_u64, 2, 5] {
        let mut record = Vec::new();
        Operation { slot, key: &slot.to_le_bytes(), value: Some(b"v") }.encode(&mut record);
        let lsn = log.append(SHARD, &record).unwrap();
        store.apply(SHARD, Record { lsn, bytes: &record }).unwrap();
    }
    let mut source = store.open_base(SHARD).unwrap();
    let len = source.info().block_len as usize;
    let mut buffer = vec![0; 10 * len + 7];
    let mut next = || source.next_run(&mut buffer).unwrap();
    assert_eq!(next(), Some(BlockRun { first: BlockId(1), count: 2, len: 2 * len }));
    assert_eq!(next(), Some(BlockRun { first: BlockId(5), count: 1, len }));
    assert_eq!((next(), next()), (None, None));
}

#[test]
fn an_image_newer_than_the_log_is_not_complete() {
    let (leader, log, _dir) = store();
    put(&leader, &log, "a", "1");
    put(&leader, &log, "b", "1");
    let mut source = leader.open_base(SHARD).unwrap();
    put(&leader, &log, "a", "2");
    let other = tempfile::tempdir().unwrap();
    let follower = FixedStore::open(other.path(), &OPTIONS).unwrap();
    let mut sink = follower.begin_base(SHARD, source.info()).unwrap();
    let mut buffer = vec![0; 1024];
    let run = source.next_run(&mut buffer).unwrap().unwrap();
    assert_eq!((run.first, run.count), (BlockId(0), 2));
    for (block, bytes) in (0..).zip(buffer[..run.len].chunks(run.len / 2)) {
        sink.put_block(BlockId(block), bytes).unwrap();
    }
    assert_eq!(sink.consistent_from(), Lsn(3));
    assert!(sink.complete(Lsn(2)).is_err());
    log.replay(&follower, SHARD, Lsn(2), Lsn(3)).unwrap();
    sink.complete(Lsn(3)).unwrap();
    assert_eq!(contents(&follower), contents(&leader));
}

#[test]
fn an_interrupted_rebuild_leaves_its_mark() {
    let (leader, log, _dir) = store();
    put(&leader, &log, "a", "1");
    let other = tempfile::tempdir().unwrap();
    let follower = FixedStore::open(other.path(), &OPTIONS).unwrap();
    log.replay(&follower, SHARD, Lsn::ZERO, Lsn::MAX).unwrap();
    let mut source = leader.open_base(SHARD).unwrap();
    let sink = follower.begin_base(SHARD, source.info()).unwrap();
    drop((sink, follower));

    let follower = FixedStore::open(other.path(), &OPTIONS).unwrap();
    assert!(follower.is_rebuilding(SHARD).unwrap());
    for error in [
        follower.get(b"a").unwrap_err(),
        follower.count().unwrap_err(),
        follower.open_base(SHARD).err().unwrap(),
        log.replay(&follower, SHARD, Lsn::ZERO, Lsn::MAX).unwrap_err(),
        follower.put(b"b", b"", |_, _| panic!("appended")).unwrap_err(),
    ] {
        assert!(error.to_string().contains("shard 0") && error.to_string().contains("being rebuilt"), "{error}");
    }
    let mut old = follower.begin_base(SHARD, source.info()).unwrap();
    let mut sink = follower.begin_base(SHARD, source.info()).unwrap();
    let mut buffer = vec![0; 1024];
    let run = source.next_run(&mut buffer).unwrap().unwrap();
    assert!(old.put_block(run.first, &buffer[..run.len]).is_err(), "superseded");
    drop(old);
    sink.put_block(run.first, &buffer[..run.len]).unwrap();
    assert_eq!(source.next_run(&mut buffer).unwrap(), None);
    sink.complete(Lsn(1)).unwrap();
    assert_eq!(get(&follower, "a").as_deref(), Some("1"));
}

#[test]
fn a_base_that_is_older_or_does_not_fit_changes_nothing() {
    let (store, log, _dir) = store();
    put(&store, &log, "a", "1");
    put(&store, &log, "b", "1");
    let info = store.open_base(SHARD).unwrap().info();
    for wrong in [
        BaseInfo { base_lsn: Lsn(1), ..info },
        BaseInfo { block_len: info.block_len + 8, ..info },
        BaseInfo { block_count: u64::MAX, ..info },
        BaseInfo { block_len: 0, ..info },
    ] {
        assert!(store.begin_base(SHARD, wrong).is_err(), "{wrong:?}");
        assert_eq!(contents(&store).len(), 2);
    }
}

#[test]
fn hostile_blocks_are_refused() {
    let (store, log, _dir) = store();
    put(&store, &log, "a", "1");
    let mut source = store.open_base(SHARD).unwrap();
    let mut block = vec![0; source.info().block_len as usize];
    assert!(source.next_run(&mut [0; 8]).is_err());
    source.next_run(&mut block).unwrap().unwrap();
    let mut sink = store.begin_base(SHARD, source.info()).unwrap();
    assert!(sink.put_block(BlockId(1), &block).is_err(), "a block of another number");
    assert!(sink.put_block(BlockId(0), &block[1..]).is_err());
    assert!(sink.put_block(BlockId(u64::MAX), &block).is_err());
    block[30] ^= 1;
    assert!(sink.put_block(BlockId(0), &block).is_err());
}

#[test]
fn records_name_the_block_that_they_touch() {
    let (store, log, _dir) = store();
    put(&store, &log, "a", "1");
    put(&store, &log, "b", "1");
    delete(&store, &log, "a");
    let mut blocks = Vec::new();
    for (lsn, bytes) in (1..).zip(&log.0.borrow()[&SHARD]) {
        assert!(store.blocks_of(SHARD, Record { lsn: Lsn(lsn), bytes }, &mut blocks).unwrap());
    }
    assert_eq!(blocks, [BlockId(0), BlockId(1), BlockId(0)]);
    assert!(store.blocks_of(SHARD, Record { lsn: Lsn(1), bytes: b"?" }, &mut blocks).is_err());
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8, Vec<u8>),
    Delete(u8),
    Sync,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..30_u8, prop::collection::vec(any::<u8>(), 0..=100)).prop_map(|(key, value)| Step::Put(key, value)),
        4 => (0..30_u8).prop_map(Step::Delete),
        1 => Just(Step::Sync),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_store_is_a_map(steps in steps()) {
        let (mut store, log, dir) = store();
        let mut model = BTreeMap::new();
        for step in steps {
            let append = |shard, record: &[u8]| log.append(shard, record);
            match step {
                Step::Put(key, value) => {
                    store.put(&[key], &value, append).unwrap();
                    model.insert(vec![key], value);
                }
                Step::Delete(key) => {
                    let deleted = store.delete(&[key], append).unwrap().is_some();
                    prop_assert_eq!(deleted, model.remove(&vec![key]).is_some());
                }
                Step::Sync => store.sync(SHARD).unwrap(),
                Step::Reopen => {
                    store.close().unwrap();
                    store = FixedStore::open(dir.path(), &OPTIONS).unwrap();
                    prop_assert_eq!(store.durable_applied(SHARD).unwrap(), Some(log.head(SHARD)));
                }
            }
            prop_assert_eq!(store.applied(SHARD), Some(log.head(SHARD)));
        }
        prop_assert_eq!(contents(&store), model.clone());
        let follower_dir = tempfile::tempdir().unwrap();
        let follower = FixedStore::open(follower_dir.path(), &OPTIONS).unwrap();
        log.replay(&follower, SHARD, Lsn::ZERO, Lsn::MAX).unwrap();
        prop_assert_eq!(contents(&follower), model);
        prop_assert_eq!(slot_bytes(dir.path(), 0), slot_bytes(follower_dir.path(), 0));
    }
}
