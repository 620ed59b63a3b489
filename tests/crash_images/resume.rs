//! A follower's store takes a base while records are applied to it, the power goes, and another rebuild goes on with what
//! was saved: once, or again after a second crash.
//!
//! What a node does around it is done here in its place: how far the base has come is noted after each sync, and counts
//! from then on; records are applied only where a local log has them for good, so after a crash all that were applied are
//! there to be applied again.

use std::path::Path;

use towline::target::{BaseSink, BaseSource, BlockId, FixedStore, FixedStoreOptions, KeptBase, ReplicationTarget};
use towline::wal::Record;
use towline::{Lsn, ShardId};

use super::Count;
use super::disk::{Moment, Observed};
use super::random::Random;
use super::store::{Model, contents, key, value};

const SHARD: ShardId = ShardId(0);
const STORE: &str = "store";

/// The leader, whose store goes on changing.
struct Leading {
    store: FixedStore,
    options: FixedStoreOptions,
    /// The log, from LSN 1 on.
    records: Vec<Vec<u8>>,
    /// The state after each LSN, the empty one first.
    models: Vec<Model>,
}

/// What a crash leaves, and what is known of it.
struct Crash {
    moment: Moment,
    /// What was saved last.
    kept: Option<KeptBase>,
    /// The newest record in the local log.
    local_head: Lsn,
}

pub fn run(seed: u64, count: &Count) {
    let mut random = Random(seed);
    let value_len = random.pick(&[100, 3_000, 50_000]);
    let options = FixedStoreOptions { key_len: 16, value_len, shard_count: 1, prefix_bits: 0 };
    let (home, observed) = (Observed::new(), Observed::new());
    let store = FixedStore::open(home.path().join(STORE), &options).unwrap();
    let mut leading = Leading { store, options, records: Vec::new(), models: vec![Model::new()] };
    (0..20 + random.below(100)).for_each(|_| leading.write(&mut random));

    let follower = FixedStore::open(observed.path().join(STORE), &options).unwrap();
    let base = leading.store.open_base(SHARD).unwrap();
    let sink = follower.begin_base(SHARD, base.info()).unwrap();
    let mut crashes = leading.rebuild(&follower, &observed, base, sink, None, &mut random);
    drop(follower);
    for depth in [1, 0] {
        let mut found = Vec::new();
        for crash in crashes {
            for _ in 0..2 {
                if count.is_reached() {
                    return;
                }
                found.extend(leading.go_on(&crash, &mut random, count));
            }
        }
        if depth > 0 && found.len() > 4 {
            found.truncate(4);
        }
        crashes = found;
    }
}

impl Leading {
    fn head(&self) -> Lsn {
        Lsn(self.records.len() as u64)
    }

    /// One change, most of the time.
    fn write(&mut self, random: &mut Random) {
        let (key, value) = (key(random), value(random, &self.options));
        let mut model = self.models.last().unwrap().clone();
        let records = &mut self.records;
        let append = |_, record: &[u8]| {
            records.push(record.to_vec());
            Ok(Lsn(records.len() as u64))
        };
        if random.percent(75) {
            self.store.put(&key, &value, append).unwrap();
            model.insert(key, value);
        } else if self.store.delete(&key, append).unwrap().is_some() {
            model.remove(&key);
        }
        if self.records.len() == self.models.len() {
            self.models.push(model);
        }
    }

    /// Applies the log to a follower up to `to`.
    fn apply(&self, follower: &FixedStore, to: Lsn) {
        let mut next = follower.applied(SHARD).unwrap().next();
        while next <= to {
            let bytes = &self.records[usize::try_from(next.get()).unwrap() - 1];
            follower.apply(SHARD, Record { lsn: next, bytes }).unwrap();
            next = next.next();
        }
    }

    /// Takes the base behind what was `kept`, with the log beside it, until the follower serves the leader's state. Gives
    /// the crashes on the way.
    fn rebuild(
        &mut self,
        follower: &FixedStore,
        observed: &Observed,
        mut base: Box<dyn BaseSource>,
        mut sink: Box<dyn BaseSink>,
        kept: Option<KeptBase>,
        random: &mut Random,
    ) -> Vec<Crash> {
        let info = base.info();
        let block_len = info.block_len as usize;
        base.skip_to(BlockId(kept.map_or(0, |kept| kept.blocks)));
        let (mut crashes, mut kept) = (Vec::new(), kept);
        let mut next_block = kept.map_or(0, |kept| kept.blocks);
        let mut is_over = false;
        let mut in_flight = None;
        while !is_over {
            let applied = follower.applied(SHARD).unwrap();
            if random.percent(10) {
                observed.disk.trap(random.below(3));
            }
            let mut saved = kept;
            match random.below(100) {
                0..40 if in_flight.is_some() => {
                    let (first, count, blocks): (BlockId, u32, Vec<u8>) = in_flight.take().unwrap();
                    // Records may be applied between the read of a run and its arrival: then they are newer.
                    if random.percent(30) {
                        (0..5).for_each(|_| self.write(random));
                        self.apply(follower, self.head());
                    }
                    sink.put_blocks(first, block_len, &blocks).unwrap();
                    next_block = first.0 + u64::from(count);
                }
                0..40 => {
                    let mut blocks = vec![0; (1 + random.index(4)) * block_len];
                    match base.next_run(&mut blocks).unwrap() {
                        Some(run) => {
                            blocks.truncate(run.len);
                            in_flight = Some((run.first, run.count, blocks));
                        }
                        None => is_over = true,
                    }
                }
                40..60 => self.write(random),
                60..75 => self.apply(follower, applied.next().min(self.head())),
                75..85 => observed.disk.look(),
                85..95 => {
                    saved = Some(KeptBase { blocks: next_block, applied });
                    follower.sync(SHARD).unwrap();
                }
                _ => {
                    crashes.push(Crash { moment: observed.disk.moment(), kept, local_head: applied });
                }
            }
            let local_head = follower.applied(SHARD).unwrap();
            // In the middle of a sync, nothing of it is saved yet.
            crashes.extend(observed.disk.caught().map(|moment| Crash { moment, kept, local_head }));
            kept = saved;
        }
        observed.disk.trap(u64::MAX);
        crashes.push(Crash { moment: observed.disk.moment(), kept, local_head: follower.applied(SHARD).unwrap() });
        self.apply(follower, self.head());
        sink.complete(self.head()).unwrap();
        assert!(contents(follower) == *self.models.last().unwrap(), "rebuilt");
        crashes
    }

    /// Opens what a crash has left, and rebuilds it.
    fn go_on(&mut self, crash: &Crash, random: &mut Random, count: &Count) -> Vec<Crash> {
        let left = Observed::with(&crash.moment.image(random));
        count.one(true);
        let follower = FixedStore::open(left.path().join(Path::new(STORE)), &self.options).unwrap();
        assert!(follower.is_rebuilding(SHARD).unwrap() && follower.get(b"key 1").is_err(), "a half-built store serves");
        (0..random.below(10)).for_each(|_| self.write(random));
        let base = self.store.open_base(SHARD).unwrap();
        let info = base.info();
        if random.percent(30) {
            left.disk.trap(random.below(3));
        }
        let sink = match crash.kept {
            None => follower.begin_base(SHARD, info).unwrap(),
            Some(kept) => {
                let mut sink = follower.resume_base(SHARD, info, kept).unwrap();
                // The local log first: what is torn after it is damaged.
                self.apply(&follower, crash.local_head);
                sink.check_kept().unwrap();
                sink
            }
        };
        let crashes = self.rebuild(&follower, &left, base, sink, crash.kept, random);
        follower.close().unwrap();
        let again = FixedStore::open(left.path().join(STORE), &self.options).unwrap();
        assert!(contents(&again) == *self.models.last().unwrap(), "rebuilt, closed and opened");
        crashes
    }
}
