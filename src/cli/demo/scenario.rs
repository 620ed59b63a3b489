//! What can befall a follower, shown on nodes that keep stores of keys and values.
//!
//! A scenario is a few steps on a [`Stage`], about the last of the followers. At its end, whatever happened, every log
//! and every store must be the leader's.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use parking_lot::Mutex;
use towline::target::{
    BaseInfo, BaseSink, BaseSource, BlockId, FixedStore, FixedStoreOptions, ReplicationTarget, TargetTopology,
};
use towline::wal::{Batch, Record};
use towline::{Follower, Leader, Lsn, Node, NodeId, ShardId, ShutdownSignal, Until, WaitStrategy, wait_any};

use super::load::Table;
use super::proof::{compare_all_logs, compare_stores};
use super::{Demo, SETTLE};
use crate::cli::kv::{self, KvWriter};
use crate::cli::progress::Progress;
use crate::cli::{DONE, FOUND_DAMAGE, Outcome};

/// A step that may fail.
pub(super) type Step<T> = Result<T, Box<dyn std::error::Error>>;

/// What befalls the last follower.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Scenario {
    /// It is away while the leader appends, comes back, and replays the log that it has missed
    CatchUp,
    /// It is away while the leader appends and gives up the log that it would need: it comes back, and gets a base and
    /// the log beside it while the leader goes on
    Rebuild,
    /// It applies slowly for a while: the leader and the others go on, and nothing is lost
    SlowFollower,
}

impl Scenario {
    pub(super) fn run(self, demo: &Demo, directory: &Path, stop: &ShutdownSignal) -> Outcome {
        let store = open_store(demo, &directory.join("leader"))?;
        // Unless asked otherwise every byte is kept, so that all of it can be compared at the end.
        let leader = Node::builder(directory.join("leader"))
            .max_wal_bytes(demo.max_wal_bytes)
            .segment_size(demo.segment_size())
            .shards(demo.shards)
            .commit(demo.commit)
            .target(Arc::clone(&store) as Arc<dyn ReplicationTarget>)
            .lead("127.0.0.1:0")?;
        let writer = KvWriter::new(&leader, Arc::clone(&store), stop)?;
        let mut stage = Stage { demo, directory, stop, leader: &leader, writer, random: 1 };
        let played = self.play(&mut stage);
        drop(stage);
        let (told, followers) = played?;
        leader.shutdown()?;
        kv::close(Some(store))?;
        followers.into_iter().try_for_each(Following::stop)?;
        let proofs: Vec<_> = (1..=usize::from(demo.followers))
            .map(|number| {
                let logs = compare_all_logs(directory, number, demo.shards);
                (logs, compare_stores(directory, number, demo.shards))
            })
            .collect();
        Ok(self.report(demo, &told, &proofs))
    }

    /// The steps, up to where every follower has everything.
    fn play(self, stage: &mut Stage<'_>) -> Step<(Told, Vec<Following>)> {
        if let (Scenario::SlowFollower, Some(bound)) = (self, stage.demo.max_wal_bytes) {
            return Ok((stage.play_bounded(bound)?, Vec::new()));
        }
        let (demo, time) = (stage.demo, Duration::from_secs(stage.demo.seconds));
        let others = (1..demo.followers).map(|number| stage.start_follower(number)).collect::<Step<Vec<_>>>()?;
        let mut last = stage.start_follower(demo.followers)?;
        stage.introduce();
        let mut figures = Vec::new();
        let mut records = stage.write("all followers are there", time.min(Duration::from_secs(1)))?;
        stage.await_applied("keeping up", &last)?;
        match self {
            Scenario::CatchUp => {
                last.stop()?;
                match demo.behind_mb {
                    None => {
                        records += stage.write("the last follower is away", time)?;
                        last = stage.start_follower(demo.followers)?;
                    }
                    Some(megabytes) => {
                        records += stage.write_behind(megabytes)?;
                        last = stage.start_follower(demo.followers)?;
                        records += stage.write_until_kept_up(&last, &mut figures)?;
                    }
                }
            }
            Scenario::Rebuild => {
                last.stop()?;
                records += stage.write("the last follower is away", time)?;
                for other in &others {
                    stage.await_applied("the other followers", other)?;
                }
                stage.give_up_log()?;
                last = stage.start_follower(demo.followers)?;
                records += stage.write("the last follower is rebuilt, and the leader goes on", time)?;
            }
            Scenario::SlowFollower => {
                let slow = ShutdownSignal::new();
                last.target.slow_down_until(slow.clone());
                let written = stage.write("the last follower applies slowly", time);
                // In any case: a follower applies what it has received before it stops.
                slow.shutdown();
                records += written?;
            }
        }
        let behind = stage.head()?.saturating_sub(last.applied()?);
        stage.say(&format!("the last follower is {behind} records behind, and catches up"));
        let began = Instant::now();
        stage.await_applied("catching up", &last)?;
        let told = Told { records, behind, seconds: began.elapsed().as_secs_f64(), figures };
        let followers: Vec<_> = others.into_iter().chain([last]).collect();
        for follower in &followers {
            stage.await_applied("the other followers", follower)?;
        }
        stage.await_own_store()?;
        Ok((told, followers))
    }

    fn report(self, demo: &Demo, told: &Told, proofs: &[Proven]) -> u8 {
        let verified = told.records > 0 && proofs.iter().all(|(logs, stores)| logs.is_ok() && stores.is_ok());
        let Told { records, behind, seconds, figures } = told;
        let name = self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        if demo.json {
            let followers: Vec<_> = proofs
                .iter()
                .map(|(logs, stores)| {
                    let keys = stores.as_ref().copied().unwrap_or_default();
                    let (identical, equal) = (logs.is_ok(), stores.is_ok());
                    format!("{{\"identical\":{identical},\"store_equal\":{equal},\"keys\":{keys}}}")
                })
                .collect();
            say!(
                "{{\"scenario\":\"{name}\",\"records\":{records},\"behind\":{behind},\"catch_up_seconds\":{seconds:.3},{}\
                 \"followers\":[{}],\"verified\":{verified}}}",
                figures.iter().map(Figure::to_json).collect::<String>(),
                followers.join(",")
            );
            return if verified { DONE } else { FOUND_DAMAGE };
        }
        say!("{name}: {records} records; {behind} behind, caught up in {seconds:.2} s");
        figures.iter().for_each(|figure| say!("{}: {}", figure.name.replace('_', " "), figure.value));
        for (number, (logs, stores)) in proofs.iter().enumerate() {
            let log =
                logs.as_ref().map_or_else(|problem| format!("DIFFERENT: {problem}"), |()| "byte-identical".into());
            let store = stores.as_ref().map_or_else(
                |problem| format!("DIFFERENT: {problem}"),
                |keys| format!("equal, {keys} keys with the same values, LSNs and slots"),
            );
            say!("follower {}: log {log}; store {store}", number + 1);
        }
        say!(
            "{}",
            if verified { "proven: every follower has exactly the leader's log and store" } else { "NOT proven" }
        );
        if verified { DONE } else { FOUND_DAMAGE }
    }
}

/// What was found of one follower: its logs are the leader's, and so is its store, with so many keys; or why not.
type Proven = (Result<(), String>, Result<u64, String>);

/// What a scenario came to.
pub(super) struct Told {
    pub(super) records: u64,
    /// Records that the last follower had to catch up with, and how long that took.
    pub(super) behind: u64,
    pub(super) seconds: f64,
    /// What else was measured.
    pub(super) figures: Vec<Figure>,
}

/// Something measured: its name ends with its unit.
pub(super) struct Figure {
    pub(super) name: &'static str,
    /// As a number or word of JSON.
    pub(super) value: String,
}

impl Figure {
    pub(super) fn new(name: &'static str, value: impl ToString) -> Figure {
        Figure { name, value: value.to_string() }
    }

    fn to_json(&self) -> String {
        format!("\"{}\":{},", self.name, self.value)
    }
}

fn open_store(demo: &Demo, node: &Path) -> towline::Result<Arc<FixedStore>> {
    let options = FixedStoreOptions {
        key_len: 16,
        value_len: demo.record_size,
        shard_count: demo.shards,
        ..FixedStoreOptions::default()
    };
    Ok(Arc::new(FixedStore::open(kv::store_path(node), &options)?))
}

/// The leader of a scenario, and what is done to it.
pub(super) struct Stage<'a> {
    pub(super) demo: &'a Demo,
    pub(super) directory: &'a Path,
    pub(super) stop: &'a ShutdownSignal,
    pub(super) leader: &'a Leader,
    pub(super) writer: KvWriter<'a>,
    /// State of the generator of keys and values.
    random: u64,
}

/// Small segments, so that there is something to give up.
const SEGMENT_SIZE: u64 = 1 << 20;
/// Of a bound, or of what a follower is behind, a segment is one of so many parts, up to the usual size.
const SEGMENTS: u64 = 16;

impl Demo {
    /// A segment that holds a good many records.
    fn segment_size(&self) -> u64 {
        let parts =
            self.max_wal_bytes.unwrap_or(0).max(self.behind_mb.unwrap_or(0).saturating_mul(1_000_000)) / SEGMENTS;
        let usual = parts.clamp(SEGMENT_SIZE, towline::limits::DEFAULT_SEGMENT_SIZE);
        let records = u64::from(self.record_size) * 16;
        usual.max(records).next_multiple_of(4096).min(towline::limits::MAX_SEGMENT_SIZE)
    }
}

/// Changes appended together.
const TOGETHER: usize = 512;

impl Stage<'_> {
    pub(super) fn say(&self, text: &str) {
        if !self.demo.json {
            tell!("{text}");
        }
    }

    fn start_follower(&self, number: u16) -> Step<Following> {
        let directory = self.directory.join(format!("follower-{number}"));
        let store = open_store(self.demo, &directory)?;
        let target = Arc::new(Slow { store, until: Mutex::default() });
        let follower = Node::builder(directory)
            .max_wal_bytes(None)
            .node_id(NodeId(u64::from(number)))
            .follow(self.leader.local_address(), Arc::clone(&target) as Arc<dyn ReplicationTarget>)?;
        Ok(Following { follower, target, shards: self.demo.shards })
    }

    /// Says who there is.
    pub(super) fn introduce(&self) {
        self.say(&format!(
            "one leader at {}, {} followers, {} shards, keys of 16 and values of {} bytes, in {}",
            self.leader.local_address(),
            self.demo.followers,
            self.demo.shards,
            self.demo.record_size,
            self.directory.display()
        ));
    }

    /// Puts and deletes for a while, as fast as the leader takes them. Gives the number of records.
    fn write(&mut self, what: &str, time: Duration) -> Step<u64> {
        let most = self.demo.max_mb.saturating_mul(1_000_000) / u64::from(self.demo.record_size);
        let before = self.head()?;
        self.write_while(what, None, |stage, passed| Ok(passed < time && stage.head()? - before < most))
    }

    /// Puts and deletes while `goes_on` says so, which is asked often, with the time that has passed. As fast as the
    /// leader takes them, or at most so many records a second.
    pub(super) fn write_while(
        &mut self,
        what: &str,
        most_per_second: Option<u64>,
        mut goes_on: impl FnMut(&Self, Duration) -> Step<bool>,
    ) -> Step<u64> {
        self.say(what);
        let demo = self.demo;
        let table = Table::new(demo.followers, demo.json);
        let keys = (64_000_000 / u64::from(demo.record_size)).clamp(16, 20_000);
        let mut value = vec![0; demo.record_size as usize];
        let (began, before) = (Instant::now(), self.head()?);
        let (mut shown, mut last) = (began, before);
        while !self.stop.is_shutdown() && goes_on(self, began.elapsed())? {
            for _ in 0..TOGETHER {
                self.change(keys, &mut value)?;
            }
            self.writer.flush()?;
            if let Some(rate) = most_per_second {
                #[allow(clippy::cast_precision_loss, reason = "a pace for people")]
                let due = Duration::from_secs_f64((self.head()? - before) as f64 / rate as f64);
                let _ = self.stop.wait_timeout(due.saturating_sub(began.elapsed()));
            }
            let passed = shown.elapsed();
            if passed >= table.interval() {
                let head = self.head()?;
                #[allow(clippy::cast_precision_loss, reason = "for people to read")]
                let rate = (head - last) as f64 / passed.as_secs_f64();
                table.show(&self.leader.status(), rate, u64::from(demo.record_size));
                (shown, last) = (Instant::now(), head);
            }
        }
        Ok(self.head()? - before)
    }

    /// One change of a key out of `keys`: most are puts, some deletes, and some of these find nothing.
    fn change(&mut self, keys: u64, value: &mut [u8]) -> towline::Result<()> {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let key = format!("key-{:012}", self.random % keys);
        if (self.random >> 32).is_multiple_of(8) {
            return self.writer.propose(key.as_bytes(), None);
        }
        for (chunk, number) in value.chunks_mut(8).zip(0..) {
            chunk.copy_from_slice(&self.random.wrapping_add(number).to_le_bytes()[..chunk.len()]);
        }
        self.writer.propose(key.as_bytes(), Some(value))
    }

    /// Records in the leader's log, over all shards.
    pub(super) fn head(&self) -> Step<u64> {
        let heads = (0..self.demo.shards).map(|shard| Ok(self.leader.log(ShardId(shard))?.head().get()));
        Ok(heads.sum::<towline::Result<u64>>()?)
    }

    /// Waits until a follower has applied all that is in the leader's log, and shows how far it is. Gives up when
    /// following fails or after a long time: the proof then says what is missing.
    fn await_applied(&self, what: &'static str, following: &Following) -> Step<()> {
        let (from, to) = (following.applied()?, self.head()?);
        let mut progress = (!self.demo.json && to > from).then(|| Progress::of_records(what, to - from));
        let ended = following.follower.stop_signal();
        let deadline = Instant::now() + SETTLE;
        for shard in (0..self.demo.shards).map(ShardId) {
            let all = Until { mark: following.follower.applied(shard)?, at_least: self.leader.log(shard)?.head() };
            while !all.holds() && !ended.is_shutdown() && Instant::now() < deadline {
                wait_any(&[all, ended.until()], WaitStrategy::Park, Some(Instant::now() + SHOW_EVERY));
                if let Some(progress) = &mut progress {
                    progress.set(following.applied()?.saturating_sub(from));
                }
            }
        }
        Ok(())
    }

    /// Makes the leader give up all of its log that it may.
    fn give_up_log(&self) -> Step<()> {
        for shard in (0..self.demo.shards).map(ShardId) {
            let log = self.leader.log(shard)?;
            log.wait_synced(log.head(), None)?;
            log.release_through(log.head(), "the demo says so")?;
        }
        Ok(())
    }

    /// Waits until the leader's own store has everything.
    pub(super) fn await_own_store(&self) -> Step<()> {
        for shard in (0..self.demo.shards).map(ShardId) {
            let log = self.leader.log(shard)?;
            let Some(applied) = self.leader.applied(shard)? else { continue };
            let all = Until { mark: applied, at_least: log.head() };
            wait_any(&[all, log.until_ended()], WaitStrategy::Park, Some(Instant::now() + SETTLE));
        }
        Ok(())
    }
}

/// How often progress is shown.
const SHOW_EVERY: Duration = Duration::from_millis(100);

/// A follower and what it applies to.
pub(super) struct Following {
    follower: Follower,
    target: Arc<Slow>,
    shards: u16,
}

impl Following {
    /// Records applied, over all shards.
    pub(super) fn applied(&self) -> towline::Result<u64> {
        (0..self.shards).map(|shard| Ok(self.follower.applied(ShardId(shard))?.load().get())).sum()
    }

    fn stop(self) -> towline::Result<()> {
        self.follower.shutdown()?;
        kv::close(Arc::into_inner(self.target).map(|target| target.store))
    }
}

/// A store that can be made slow.
struct Slow {
    store: Arc<FixedStore>,
    /// Each batch waits a little until this is given.
    until: Mutex<Option<ShutdownSignal>>,
}

/// How long each batch waits while a store is slow.
const SLOWNESS: Duration = Duration::from_millis(50);

impl Slow {
    fn slow_down_until(&self, until: ShutdownSignal) {
        *self.until.lock() = Some(until);
    }

    fn wait_a_little(&self) {
        let until = self.until.lock().clone();
        if let Some(until) = until {
            let _ = until.wait_timeout(SLOWNESS);
        }
    }
}

impl ReplicationTarget for Slow {
    fn durable_applied(&self, shard: ShardId) -> towline::Result<Option<Lsn>> {
        self.store.durable_applied(shard)
    }

    fn apply(&self, shard: ShardId, record: Record<'_>) -> towline::Result<()> {
        self.wait_a_little();
        self.store.apply(shard, record)
    }

    fn apply_batch(&self, shard: ShardId, batch: &Batch<'_>) -> towline::Result<()> {
        self.wait_a_little();
        self.store.apply_batch(shard, batch)
    }

    fn sync(&self, shard: ShardId) -> towline::Result<()> {
        self.store.sync(shard)
    }

    fn topology(&self) -> TargetTopology {
        self.store.topology()
    }

    fn needs_durable_log(&self) -> bool {
        self.store.needs_durable_log()
    }

    fn is_rebuilding(&self, shard: ShardId) -> towline::Result<bool> {
        self.store.is_rebuilding(shard)
    }

    fn open_base(&self, shard: ShardId) -> towline::Result<Box<dyn BaseSource>> {
        self.store.open_base(shard)
    }

    fn begin_base(&self, shard: ShardId, info: BaseInfo) -> towline::Result<Box<dyn BaseSink>> {
        self.store.begin_base(shard, info)
    }

    fn blocks_of(&self, shard: ShardId, record: Record<'_>, blocks: &mut Vec<BlockId>) -> towline::Result<bool> {
        self.store.blocks_of(shard, record, blocks)
    }
}
