//! The small files of a data directory, which are replaced as a whole: the manifest and the checkpoint.

use towline::data_dir::{DataDir, Manifest};
use towline::replication::{Checkpoint, ReplicationState};
use towline::{Epoch, Lsn, NodeId, ShardId};

use super::Count;
use super::disk::{Moment, Observed};
use super::log::IDENTITY;
use super::random::Random;

const SHARDS: u16 = 2;

/// What was said to be durable, and what may be.
#[derive(Clone, Copy)]
struct Known {
    made: bool,
    epoch: [u64; 2],
    applied: [u64; 2],
}

const MANIFEST: Manifest = Manifest {
    cluster: IDENTITY.cluster,
    node: NodeId(1),
    region: IDENTITY.region,
    shard_count: SHARDS,
    segment_size: IDENTITY.segment_size,
    epoch: Epoch(1),
    own_epoch: true,
};

/// Makes a directory where another run was killed after it had made the name, or that of the one above, and before that
/// was durable.
pub fn make_again() {
    let mut random = Random::new();
    for (made, node) in [("node", "node"), ("above", "above/node"), ("above", "above/more/node")] {
        let observed = Observed::new();
        std::fs::create_dir(observed.path().join(made)).unwrap();
        drop(DataDir::create(&observed.path().join(node), MANIFEST).unwrap());
        let moment = observed.disk.moment();
        for _ in 0..20 {
            let left = Observed::with(&moment.image(&mut random));
            assert!(DataDir::open(&left.path().join(node)).unwrap().is_some(), "{node} was made, and is gone");
        }
    }
}

/// Accepts an epoch that another run had put into the manifest, and that run was killed before the new file's name was
/// durable.
pub fn accept_again() {
    let mut random = Random::new();
    let observed = Observed::new();
    let path = observed.path().join("node");
    drop(DataDir::create(&path, MANIFEST).unwrap());
    let newer = Manifest { epoch: Epoch(2), own_epoch: false, ..MANIFEST };
    std::fs::write(path.join("MANIFEST.tmp"), newer.encode()).unwrap();
    std::fs::File::open(path.join("MANIFEST.tmp")).unwrap().sync_all().unwrap();
    std::fs::rename(path.join("MANIFEST.tmp"), path.join("MANIFEST")).unwrap();
    DataDir::open(&path).unwrap().unwrap().accept_epoch(newer.epoch).unwrap();
    let moment = observed.disk.moment();
    for _ in 0..20 {
        let left = Observed::with(&moment.image(&mut random));
        let manifest = DataDir::open(&left.path().join("node")).unwrap().unwrap().manifest();
        assert_eq!(manifest, newer, "it was accepted, and is forgotten");
    }
}

/// Crashes a directory while it is made, and while its epoch and its checkpoint move.
pub fn run(seed: u64, count: &Count) {
    let mut random = Random(seed);
    let observed = Observed::new();
    let path = observed.path().join("above").join("node");
    let manifest = MANIFEST;
    let mut crashes: Vec<(Moment, Known)> = Vec::new();
    let mut known = Known { made: false, epoch: [1, 1], applied: [0, 0] };
    observed.disk.trap(random.below(8));
    let directory = DataDir::create(&path, manifest).unwrap();
    crashes.extend(observed.disk.caught().map(|moment| (moment, known)));
    known.made = true;
    let state = ReplicationState::new(&[ShardId(0), ShardId(1)]);
    for _ in 0..1 + random.below(6) {
        observed.disk.trap(random.below(5));
        let moves_epoch = random.percent(50);
        if moves_epoch {
            known.epoch[1] += 1;
            directory.accept_epoch(Epoch(known.epoch[1])).unwrap();
        } else {
            known.applied[1] += 1 + random.below(9);
            assert_eq!(state.advance(ShardId(1), Lsn(known.applied[1])), Some(true));
            state.checkpoint().save(&directory.checkpoint_path()).unwrap();
        }
        crashes.extend(observed.disk.caught().map(|moment| (moment, known)));
        (known.epoch[0], known.applied[0]) = (known.epoch[1], known.applied[1]);
        crashes.push((observed.disk.moment(), known));
    }
    for (moment, known) in crashes {
        for _ in 0..3 {
            if count.is_reached() {
                return;
            }
            let image = moment.image(&mut random);
            let left = Observed::with(&image);
            count.one(!known.made || known.epoch[0] < known.epoch[1] || known.applied[0] < known.applied[1]);
            let path = left.path().join("above").join("node");
            let Some(directory) = DataDir::open(&path).unwrap() else {
                assert!(!known.made, "it was made, and is as good as empty");
                assert_eq!(DataDir::create(&path, manifest).unwrap().manifest(), manifest);
                continue;
            };
            let epoch = directory.manifest().epoch;
            assert!((known.epoch[0]..=known.epoch[1]).contains(&epoch.0), "epoch {epoch} of {:?}", known.epoch);
            let own_epoch = epoch == manifest.epoch;
            assert_eq!(directory.manifest(), Manifest { epoch, own_epoch, ..manifest });
            let checkpoint = Checkpoint::load(&directory.checkpoint_path()).unwrap();
            let applied = checkpoint.map_or(Lsn::ZERO, |checkpoint| {
                ReplicationState::from_checkpoint(&checkpoint, &[ShardId(0), ShardId(1)])
                    .unwrap()
                    .applied(ShardId(1))
                    .unwrap()
            });
            let is_one = [known.applied[0], known.applied[1]].contains(&applied.0);
            assert!(is_one, "applied up to {applied} of {:?}", known.applied);
            directory.accept_epoch(Epoch(epoch.0 + 1)).unwrap();
        }
    }
}
