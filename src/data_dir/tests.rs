//! Data directories as they are made, opened and damaged.

use proptest::prelude::*;

use super::*;

const MANIFEST_OF_TWO: Manifest = Manifest {
    cluster: ClusterId(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
    node: NodeId(9),
    region: RegionId(3),
    shard_count: 2,
    segment_size: 65536,
    epoch: Epoch(5),
    own_epoch: true,
};

fn decode(bytes: &[u8]) -> Result<Manifest> {
    Manifest::decode(bytes, Path::new("MANIFEST"))
}

/// Bytes with a CRC that fits, so that only the other rules can refuse them.
fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn a_target_may_keep_its_state_there_before_the_directory_is_made() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("node");
    std::fs::create_dir_all(path.join(STORE)).unwrap();
    std::fs::write(path.join(STORE).join("anything"), b"x").unwrap();
    assert!(DataDir::open(&path).unwrap().is_none());
    drop(DataDir::create(&path, MANIFEST_OF_TWO).unwrap());
    assert!(DataDir::open(&path).unwrap().is_some());
    assert_eq!(std::fs::read(path.join(STORE).join("anything")).unwrap(), b"x");
}

#[test]
fn a_manifest_survives_its_file_and_every_flipped_bit_and_cut_is_found() {
    let bytes = MANIFEST_OF_TWO.encode();
    assert_eq!(decode(&bytes).unwrap(), MANIFEST_OF_TWO);
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes;
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&damaged).unwrap_err().is_corruption(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(decode(&bytes[..len]).unwrap_err().is_corruption(), "{len} bytes");
    }
}

#[test]
fn the_format_is_what_the_table_says() {
    let mut golden = b"TOWLMAN\0\x03\0\x03\0\x02\0\x01\0".to_vec();
    golden.extend([9, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend([0, 0, 1, 0, 0, 0, 0, 0]);
    golden.extend([5, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend([0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01].repeat(2));
    golden.extend([0; 8]);
    assert_eq!(resealed(golden), MANIFEST_OF_TWO.encode());
}

#[test]
fn a_newer_version_is_told_from_damage() {
    let mut newer = MANIFEST_OF_TWO.encode().to_vec();
    newer[8] = 4;
    newer.extend([1; 40]);
    let error = decode(&resealed(newer)).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }) && error.to_string().contains("newer towline"), "{error}");
}

#[test]
fn numbers_that_no_directory_has_are_refused() {
    let parent = tempfile::tempdir().unwrap();
    for wrong in [
        Manifest { shard_count: 0, ..MANIFEST_OF_TWO },
        Manifest { shard_count: MAX_SHARDS + 1, ..MANIFEST_OF_TWO },
        Manifest { segment_size: 65537, ..MANIFEST_OF_TWO },
    ] {
        assert!(decode(&wrong.encode()).unwrap_err().is_corruption());
        let error = DataDir::create(&parent.path().join("d"), wrong).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    }
    assert!(names(parent.path()).unwrap().is_empty(), "nothing is made of it");
}

#[test]
fn one_directory_has_one_user_at_a_time() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("a/b");
    let directory = DataDir::create(&path, MANIFEST_OF_TWO).unwrap();
    assert!(matches!(DataDir::open(&path), Err(Error::InUse { path: named }) if named == path));
    assert_eq!(DataDir::read_manifest(&path).unwrap(), MANIFEST_OF_TWO);
    drop(directory);
    let directory = DataDir::open(&path).unwrap().unwrap();
    assert_eq!((directory.path(), directory.manifest()), (path.as_path(), MANIFEST_OF_TWO));
    assert_eq!(directory.checkpoint_path(), path.join("replication.ckpt"));
}

#[test]
fn epochs_only_grow_and_are_kept() {
    let parent = tempfile::tempdir().unwrap();
    let directory = DataDir::create(parent.path(), MANIFEST_OF_TWO).unwrap();
    directory.accept_epoch(Epoch(5)).unwrap();
    directory.accept_epoch(Epoch(8)).unwrap();
    assert_eq!(DataDir::read_manifest(parent.path()).unwrap().epoch, Epoch(8));
    let error = directory.accept_epoch(Epoch(7)).unwrap_err();
    assert!(matches!(error, Error::StaleEpoch { offered: Epoch(7), accepted: Epoch(8) }));
    drop(directory);
    let manifest = DataDir::open(parent.path()).unwrap().unwrap().manifest();
    assert_eq!(manifest, Manifest { epoch: Epoch(8), own_epoch: false, ..MANIFEST_OF_TWO });
}

#[test]
fn an_epoch_is_led_under_by_its_owner_alone() {
    let parent = tempfile::tempdir().unwrap();
    let directory = DataDir::create(parent.path(), MANIFEST_OF_TWO).unwrap();
    assert_eq!(directory.lead_under(None).unwrap(), Epoch(5));
    assert!(matches!(directory.lead_under(Some(Epoch(4))), Err(Error::StaleEpoch { .. })));
    let two_leaders = directory.follow_under(Epoch(5)).unwrap_err().to_string();
    assert!(two_leaders.contains("has itself led under epoch 5") && two_leaders.contains("6 at least"));
    directory.follow_under(Epoch(6)).unwrap();
    directory.follow_under(Epoch(6)).unwrap();
    for asked in [None, Some(Epoch(6))] {
        let error = directory.lead_under(asked).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }) && error.to_string().contains("(--epoch 7)"), "{error}");
    }
    assert_eq!(directory.manifest(), Manifest { epoch: Epoch(6), own_epoch: false, ..MANIFEST_OF_TWO });
    assert_eq!(directory.lead_under(Some(Epoch(9))).unwrap(), Epoch(9));
    drop(directory);
    let directory = DataDir::open(parent.path()).unwrap().unwrap();
    assert_eq!(directory.lead_under(None).unwrap(), Epoch(9));
    directory.accept_epoch_of_log(Epoch(11)).unwrap();
    assert_eq!(directory.lead_under(None).unwrap(), Epoch(11), "its own log says so");
}

#[test]
fn of_the_first_version_the_epoch_is_nobodys() {
    let mut first = MANIFEST_OF_TWO.encode().to_vec();
    (first[8], first[14]) = (1, 0);
    assert_eq!(decode(&resealed(first.clone())).unwrap(), Manifest { own_epoch: false, ..MANIFEST_OF_TWO });
    first[14] = 1;
    assert!(decode(&resealed(first)).unwrap_err().is_corruption());
}

#[test]
fn what_an_older_version_made_is_marked_when_asked_and_not_by_looking() {
    let parent = tempfile::tempdir().unwrap();
    drop(DataDir::create(parent.path(), MANIFEST_OF_TWO).unwrap());
    let path = parent.path().join(MANIFEST);
    for version in [1, 2] {
        let mut older = MANIFEST_OF_TWO.encode().to_vec();
        older[8] = version;
        older[14] *= version - 1;
        std::fs::write(&path, resealed(older)).unwrap();
        let due = Manifest { own_epoch: version == 2, ..MANIFEST_OF_TWO };
        assert_eq!(DataDir::read_manifest(parent.path()).unwrap(), due);
        let directory = DataDir::open(parent.path()).unwrap().unwrap();
        assert_eq!(directory.manifest(), due);
        assert_eq!(std::fs::read(&path).unwrap()[8], version, "looking changes nothing");
        directory.raise_version().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), due.encode());
    }
}

#[test]
fn a_node_joins_one_cluster_and_stays() {
    let parent = tempfile::tempdir().unwrap();
    let alone = Manifest { cluster: ClusterId::UNKNOWN, ..MANIFEST_OF_TWO };
    let directory = DataDir::create(parent.path(), alone).unwrap();
    directory.join_cluster(ClusterId(4)).unwrap();
    directory.join_cluster(ClusterId(4)).unwrap();
    assert!(matches!(directory.join_cluster(ClusterId(5)), Err(Error::Mismatch { .. })));
    assert_eq!(DataDir::read_manifest(parent.path()).unwrap(), Manifest { cluster: ClusterId(4), ..alone });
}

#[test]
fn an_epoch_that_could_not_be_kept_is_not_in_force() {
    let parent = tempfile::tempdir().unwrap();
    let directory = DataDir::create(parent.path(), MANIFEST_OF_TWO).unwrap();
    std::fs::create_dir(parent.path().join("MANIFEST.tmp")).unwrap();
    assert!(directory.accept_epoch(Epoch(9)).is_err());
    assert_eq!(directory.manifest().epoch, Epoch(5));
}

#[test]
fn nothing_is_touched_where_there_is_no_data_directory() {
    let parent = tempfile::tempdir().unwrap();
    assert!(DataDir::open(&parent.path().join("missing")).unwrap().is_none());
    assert!(DataDir::open(parent.path()).unwrap().is_none());
    assert!(names(parent.path()).unwrap().is_empty());
    let file = parent.path().join("file");
    std::fs::write(&file, b"x").unwrap();
    assert!(matches!(DataDir::open(&file), Err(Error::Io { .. })));
}

#[test]
fn a_log_without_manifest_is_never_taken_for_nothing() {
    let parent = tempfile::tempdir().unwrap();
    drop(DataDir::create(parent.path(), MANIFEST_OF_TWO).unwrap());
    std::fs::write(parent.path().join("shard-0001/r0003-s0001-00000000000000000001.wal"), b"x").unwrap();
    std::fs::remove_file(parent.path().join(MANIFEST)).unwrap();
    for lock_too in [false, true] {
        if lock_too {
            std::fs::remove_file(parent.path().join(LOCK_FILE)).unwrap();
        }
        let error = DataDir::open(parent.path()).unwrap_err();
        assert!(error.is_corruption() && error.to_string().contains("shard-0001 holds data"), "{error}");
        assert!(DataDir::create(parent.path(), MANIFEST_OF_TWO).unwrap_err().is_corruption());
        assert!(!parent.path().join(MANIFEST).exists());
    }
}

#[test]
fn an_interrupted_creation_is_as_good_as_none() {
    let parent = tempfile::tempdir().unwrap();
    drop(DataDir::create(parent.path(), MANIFEST_OF_TWO).unwrap());
    std::fs::rename(parent.path().join(MANIFEST), parent.path().join("MANIFEST.tmp")).unwrap();
    assert!(DataDir::open(parent.path()).unwrap().is_none());
    drop(DataDir::create(parent.path(), MANIFEST_OF_TWO).unwrap());
    assert!(!parent.path().join("MANIFEST.tmp").exists());
}

#[test]
fn a_directory_is_made_only_where_there_is_none() {
    let parent = tempfile::tempdir().unwrap();
    std::fs::write(parent.path().join(".hidden"), b"x").unwrap();
    std::fs::create_dir(parent.path().join("lost+found")).unwrap();
    drop(DataDir::create(parent.path(), MANIFEST_OF_TWO).unwrap());
    let error = DataDir::create(parent.path(), MANIFEST_OF_TWO).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }) && error.to_string().contains("already"), "{error}");
    let other = tempfile::tempdir().unwrap();
    std::fs::write(other.path().join("thesis.tex"), b"x").unwrap();
    let error = DataDir::create(other.path(), MANIFEST_OF_TWO).unwrap_err();
    assert!(error.to_string().contains("thesis.tex"), "{error}");
    assert_eq!(names(other.path()).unwrap(), ["thesis.tex"], "not even a lock is left there");
}

/// What cannot be synced here is what a squashed root is: file systems that nobody writes to say that this cannot be.
#[cfg(target_os = "linux")]
#[test]
fn a_directory_is_made_below_one_whose_name_cannot_be_synced() {
    use std::os::fd::AsRawFd;
    let parent = tempfile::tempdir().unwrap();
    let mounted = std::fs::File::open(parent.path()).unwrap();
    let path = Path::new("/proc/self/fd").join(mounted.as_raw_fd().to_string());
    assert!(sync_directory(Path::new("/proc/self/fd")).is_err());
    create_directory(&path.join("store").join("below")).unwrap();
    drop(DataDir::create(&path.join("node"), MANIFEST_OF_TWO).unwrap());
    assert!(DataDir::open(&parent.path().join("node")).unwrap().is_some());
}

#[test]
fn left_over_temporary_files_are_removed_and_a_missing_shard_is_noticed() {
    let parent = tempfile::tempdir().unwrap();
    drop(DataDir::create(parent.path(), MANIFEST_OF_TWO).unwrap());
    for name in ["MANIFEST.tmp", "replication.ckpt.tmp", "mine.tmp"] {
        std::fs::write(parent.path().join(name), b"half").unwrap();
    }
    drop(DataDir::open(parent.path()).unwrap().unwrap());
    assert!(!parent.path().join("MANIFEST.tmp").exists());
    assert!(!parent.path().join("replication.ckpt.tmp").exists());
    assert!(parent.path().join("mine.tmp").exists());
    std::fs::remove_dir(parent.path().join("shard-0001")).unwrap();
    let error = DataDir::open(parent.path()).unwrap_err();
    assert!(error.is_corruption() && error.to_string().contains("shard 1"), "{error}");
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80), sealed in any::<bool>()) {
        let mut bytes = [MAGIC.as_slice(), &bytes].concat();
        if sealed && bytes.len() >= 12 {
            bytes = resealed(bytes);
        }
        let _ = decode(&bytes);
    }
}
