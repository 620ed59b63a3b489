//! A follower's store takes a base while records are applied to it, the power goes, and another rebuild goes on with
//! what was saved: once, or again after a second crash.
//!
//! What a node does around it is done here in its place: how far the base has come is noted after each sync, and counts
//! from then on; records are applied only where a local log has them for good, so after a crash all that were applied
//! are there to be applied again.

use std::collections::BTreeSet;
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

/// Whoever takes a base, as a node does or with less care.
struct Intake {
    sink: Box<dyn BaseSink>,
    /// Blocks that records have written, if it keeps count of them: then it gives none of those, and says how far the
    /// base has come.
    covered: Option<BTreeSet<u64>>,
}

impl Intake {
    fn new(sink: Box<dyn BaseSink>, random: &mut Random) -> Intake {
        Intake { sink, covered: random.percent(50).then(BTreeSet::new) }
    }

    fn note(&mut self, follower: &FixedStore, record: Record<'_>) {
        let Some(covered) = &mut self.covered else { return };
        let mut blocks = Vec::new();
        assert!(follower.blocks_of(SHARD, record, &mut blocks).unwrap());
        covered.extend(blocks.iter().map(|block| block.0));
    }

    /// Takes a run of blocks.
    fn put(&mut self, first: BlockId, block_len: usize, blocks: &[u8]) {
        let Some(covered) = &self.covered else { return self.sink.put_blocks(first, block_len, blocks).unwrap() };
        for (block, bytes) in (first.0..).zip(blocks.chunks(block_len)) {
            if !covered.contains(&block) {
                self.sink.put_blocks(BlockId(block), block_len, bytes).unwrap();
            }
        }
        self.pass(first.0 + (blocks.len() / block_len) as u64);
    }

    fn pass(&mut self, next: u64) {
        if self.covered.is_some() {
            self.sink.pass(BlockId(next)).unwrap();
        }
    }
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
    let intake = Intake::new(sink, &mut random);
    let mut crashes = leading.rebuild(&follower, &observed, base, intake, None, &mut random);
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
    fn apply(&self, follower: &FixedStore, intake: &mut Intake, to: Lsn) {
        let mut next = follower.applied(SHARD).unwrap().next();
        while next <= to {
            let bytes = &self.records[usize::try_from(next.get()).unwrap() - 1];
            let record = Record { lsn: next, bytes };
            follower.apply(SHARD, record).unwrap();
            intake.note(follower, record);
            next = next.next();
        }
    }

    /// Takes the base behind what was `kept`, with the log beside it, until the follower serves the leader's state.
    /// Gives the crashes on the way.
    fn rebuild(
        &mut self,
        follower: &FixedStore,
        observed: &Observed,
        mut base: Box<dyn BaseSource>,
        mut intake: Intake,
        kept: Option<KeptBase>,
        random: &mut Random,
    ) -> Vec<Crash> {
        let info = base.info();
        let block_len = info.block_len as usize;
        base.skip_to(BlockId(kept.map_or(0, |kept| kept.blocks)));
        let (mut crashes, mut kept) = (Vec::new(), kept);
        let mut next_block = kept.map_or(0, |kept| kept.blocks);
        intake.pass(next_block);
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
                        self.apply(follower, &mut intake, self.head());
                    }
                    intake.put(first, block_len, &blocks);
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
                60..75 => self.apply(follower, &mut intake, applied.next().min(self.head())),
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
        self.apply(follower, &mut intake, self.head());
        intake.pass(info.block_count);
        intake.sink.complete(self.head()).unwrap();
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
        let intake = match crash.kept {
            None => Intake::new(follower.begin_base(SHARD, info).unwrap(), random),
            Some(kept) => {
                let mut intake = Intake::new(follower.resume_base(SHARD, info, kept).unwrap(), random);
                intake.pass(kept.blocks);
                // The local log first: what is torn after it is damaged.
                self.apply(&follower, &mut intake, crash.local_head);
                intake.sink.check_kept().unwrap();
                intake
            }
        };
        let crashes = self.rebuild(&follower, &left, base, intake, crash.kept, random);
        follower.close().unwrap();
        let again = FixedStore::open(left.path().join(STORE), &self.options).unwrap();
        assert!(contents(&again) == *self.models.last().unwrap(), "rebuilt, closed and opened");
        crashes
    }
}

/// The same while syncs fail and writes find no room: whenever something goes wrong the store is opened again, on the
/// same disk or after a power cut, and goes on with what was saved.
pub fn fail(seed: u64, count: &Count) {
    let mut random = Random(seed);
    let value_len = random.pick(&[100, 50_000]);
    let options = FixedStoreOptions { key_len: 16, value_len, shard_count: 1, prefix_bits: 0 };
    let (home, mut observed) = (Observed::new(), Observed::new());
    let store = FixedStore::open(home.path().join(STORE), &options).unwrap();
    let mut leading = Leading { store, options, records: Vec::new(), models: vec![Model::new()] };
    (0..20 + random.below(100)).for_each(|_| leading.write(&mut random));
    if value_len > 4_096 && random.percent(60) {
        // Slots that are mapped, and through the file all the same: there the model sees what is written again as it
        // is.
        let follower = FixedStore::open(observed.path().join(STORE), &options).unwrap();
        for (lsn, bytes) in (1..).zip(&leading.records).take(10) {
            follower.apply(SHARD, Record { lsn: Lsn(lsn), bytes }).unwrap();
        }
        follower.close().unwrap();
    }
    let mut saved = Saved { has_begun: false, kept: None, local_head: Lsn::ZERO };
    for _ in 0..12 {
        if random.percent(70) {
            observed.disk.fail_sync(random.below(12));
        }
        if random.percent(50) {
            let after = random.pick(&[3, 30, 300]);
            observed.disk.fill_up(random.below(after));
        }
        let open = || FixedStore::open(observed.path().join(STORE), &options);
        let follower = open().or_else(|_| open()).or_else(|_| open()).unwrap();
        if saved.has_begun && !follower.is_rebuilding(SHARD).unwrap() {
            // Its end was the last that was done.
            assert!(leading.models.contains(&contents(&follower)));
            return;
        }
        let result = leading.try_rebuild(&follower, &mut saved, &mut random);
        assert!(!result.is_err_and(|error| error.is_corruption()), "what was saved is damaged");
        if random.percent(50) {
            count.one(true);
            observed = Observed::with(&observed.disk.moment().image(&mut random));
        }
    }
}

/// What is on stable storage beside the store, of which nothing is lost.
struct Saved {
    has_begun: bool,
    kept: Option<KeptBase>,
    /// The newest record in the local log.
    local_head: Lsn,
}

impl Leading {
    fn try_rebuild(&mut self, follower: &FixedStore, saved: &mut Saved, random: &mut Random) -> towline::Result<()> {
        let mut base = self.store.open_base(SHARD)?;
        let info = base.info();
        let block_len = info.block_len as usize;
        let mut intake = match saved.kept.filter(|_| random.percent(90)) {
            Some(kept) => {
                let mut intake = Intake::new(follower.resume_base(SHARD, info, kept)?, random);
                self.try_apply(follower, &mut intake, saved.local_head, saved)?;
                intake.sink.check_kept()?;
                base.skip_to(BlockId(kept.blocks));
                intake
            }
            None => {
                saved.kept = None;
                let sink = follower.begin_base(SHARD, info)?;
                saved.has_begun = true;
                Intake::new(sink, random)
            }
        };
        let mut next_block = saved.kept.map_or(0, |kept| kept.blocks);
        loop {
            match random.below(100) {
                0..50 => {
                    let mut blocks = vec![0; (1 + random.index(8)) * block_len];
                    let Some(run) = base.next_run(&mut blocks)? else { break };
                    intake.try_put(run.first, block_len, &blocks[..run.len])?;
                    next_block = run.first.0 + u64::from(run.count);
                }
                50..65 => self.write(random),
                65..85 => {
                    let next = follower.applied(SHARD).unwrap().next().min(self.head());
                    self.try_apply(follower, &mut intake, next, saved)?;
                }
                _ => {
                    let kept = KeptBase { blocks: next_block, applied: follower.applied(SHARD).unwrap() };
                    follower.sync(SHARD)?;
                    saved.kept = Some(kept);
                }
            }
        }
        self.try_apply(follower, &mut intake, self.head(), saved)?;
        if intake.covered.is_some() {
            intake.sink.pass(BlockId(info.block_count))?;
        }
        intake.sink.complete(self.head())?;
        assert!(contents(follower) == *self.models.last().unwrap(), "rebuilt");
        Ok(())
    }

    fn try_apply(&self, follower: &FixedStore, intake: &mut Intake, to: Lsn, saved: &mut Saved) -> towline::Result<()> {
        let mut next = follower.applied(SHARD).unwrap().next();
        while next <= to {
            saved.local_head = saved.local_head.max(next);
            let record = Record { lsn: next, bytes: &self.records[usize::try_from(next.get()).unwrap() - 1] };
            follower.apply(SHARD, record)?;
            intake.note(follower, record);
            next = next.next();
        }
        Ok(())
    }
}

impl Intake {
    fn try_put(&mut self, first: BlockId, block_len: usize, blocks: &[u8]) -> towline::Result<()> {
        let Some(covered) = &self.covered else { return self.sink.put_blocks(first, block_len, blocks) };
        for (block, bytes) in (first.0..).zip(blocks.chunks(block_len)) {
            if !covered.contains(&block) {
                self.sink.put_blocks(BlockId(block), block_len, bytes)?;
            }
        }
        self.sink.pass(BlockId(first.0 + (blocks.len() / block_len) as u64))
    }
}
