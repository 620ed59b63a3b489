//! Scenarios at the bounds: a log that may not grow, and a follower that comes back far behind a leader that goes on.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use towline::protocol::{Mode, SessionKind};
use towline::status::{FollowerStatus, Status};
use towline::{Lsn, NodeId, ShardId};

use super::frozen::FrozenFollower;
use super::scenario::{Figure, Following, Stage, Step, Told};
use super::sizes::{LogSize, anonymous_bytes};

/// How long the followers may take to lose their places, to be rebuilt, or to catch up.
const PATIENCE: Duration = Duration::from_secs(180);
/// Who keeps up is not further behind the head, in records of a shard.
const NEAR: u64 = 16 * 1024;
/// How often the leader is asked how its followers are.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// How long the leader goes on at most while the followers return.
const RETURN: Duration = Duration::from_secs(5);

impl Stage<'_> {
    /// Freezes every follower, writes until all of them have lost their places, and lets them be rebuilt.
    pub(super) fn play_bounded(&mut self, bound: u64) -> Step<Told> {
        let (demo, time) = (self.demo, Duration::from_secs(self.demo.seconds));
        let mut followers = Vec::new();
        for number in 1..=demo.followers {
            let directory = self.directory.join(format!("follower-{number}"));
            followers.push(FrozenFollower::start(&directory, number, self.leader.local_address(), Some(bound))?);
        }
        self.introduce();
        let size = LogSize::watch(&self.directory.join("leader"), demo.shards)?;
        let mut records = self
            .write_while("all followers are there", None, |_, passed| Ok(passed < time.min(Duration::from_secs(1))))?;
        self.await_followers(&mut followers, |_| {})?;
        followers.iter_mut().try_for_each(FrozenFollower::freeze)?;
        let began = Instant::now();
        let mut asked = Asked::default();
        let frozen_for = self.write_while("all followers are frozen", None, |stage, passed| {
            let lost = asked.now_and_then(stage, |status| stage.all(status, |follower| follower.place_lost));
            Ok(passed < time || (!lost && passed < PATIENCE))
        })?;
        let mb_per_s = per_second(frozen_for, demo.record_size, began.elapsed());
        records += frozen_for;
        let lost =
            self.leader.status().shards.iter().flat_map(|shard| &shard.followers).filter(|f| f.place_lost).count();
        followers.iter_mut().try_for_each(FrozenFollower::thaw)?;
        let behind = self.head()?.saturating_sub(self.applied_by_followers().into_iter().min().unwrap_or(0));
        let returned = Instant::now();
        let mut rebuilt = BTreeSet::new();
        let mut asked = Asked::default();
        records += self.write_while("the followers return, and the leader goes on", None, |stage, passed| {
            asked.now_and_then(stage, |status| {
                note_rebuilds(&mut rebuilt, status);
                false
            });
            Ok(passed < time.min(RETURN))
        })?;
        self.say("the leader rests, and the followers get what is left");
        self.await_followers(&mut followers, |status| note_rebuilds(&mut rebuilt, status))?;
        let seconds = returned.elapsed().as_secs_f64();
        let peak = size.peak_bytes();
        self.await_own_store()?;
        followers.into_iter().try_for_each(FrozenFollower::stop)?;
        let segment = self.leader.manifest().segment_size;
        let most = (bound + segment) * u64::from(demo.shards);
        let figures = vec![
            Figure::new("leader_mb_per_s_while_frozen", mb_per_s),
            Figure::new("log_peak_bytes", peak),
            Figure::new("log_bound_and_a_segment_bytes", most),
            Figure::new("log_within_bound", peak <= most),
            Figure::new("places_lost", lost),
            Figure::new("places_rebuilt", rebuilt.len()),
            Figure::new("longest_append_ms", self.writer.longest_append.as_millis()),
            Figure::new("longest_wait_for_own_store_ms", self.writer.longest_wait.as_millis()),
        ];
        Ok(Told { records, behind, seconds, figures })
    }

    /// Writes so much while the last follower is away.
    pub(super) fn write_behind(&mut self, megabytes: u64) -> Step<u64> {
        let records = megabytes.saturating_mul(1_000_000) / u64::from(self.demo.record_size);
        let before = self.head()?;
        self.write_while("the last follower is away", None, |stage, _| Ok(stage.head()? - before < records))
    }

    /// Goes on writing until the last follower keeps up.
    pub(super) fn write_until_kept_up(&mut self, last: &Following, figures: &mut Vec<Figure>) -> Step<u64> {
        let demo = self.demo;
        let node = NodeId(u64::from(demo.followers));
        let (began, applied) = (Instant::now(), last.applied()?);
        let behind = self.head()?.saturating_sub(applied);
        let shards = (0..demo.shards).map(ShardId);
        let heads = shards.map(|shard| Ok(self.leader.log(shard)?.head())).collect::<Step<Vec<_>>>()?;
        let rate = demo.leader_mb_per_s.map(|mb| (mb.saturating_mul(1_000_000) / u64::from(demo.record_size)).max(1));
        let (mut asked, mut kept_up, mut memory) = (Asked::default(), false, 0);
        let written =
            self.write_while("the last follower is back, and the leader goes on", rate, |stage, passed| {
                kept_up |= asked.now_and_then(stage, |status| {
                    memory = memory.max(anonymous_bytes().unwrap_or(0));
                    keeps_up(status, node, &heads)
                });
                Ok(!kept_up && passed < PATIENCE)
            })?;
        let (took, caught) = (began.elapsed(), last.applied()?.saturating_sub(applied));
        figures.extend([
            Figure::new("behind_on_return_records", behind),
            Figure::new("kept_up_under_load", kept_up),
            Figure::new("keep_up_seconds", format!("{:.1}", took.as_secs_f64())),
            Figure::new("leader_mb_per_s", per_second(written, demo.record_size, took)),
            Figure::new("follower_mb_per_s", per_second(caught, demo.record_size, took)),
            Figure::new("memory_peak_bytes", memory),
            Figure::new("longest_append_ms", self.writer.longest_append.as_millis()),
            Figure::new("longest_wait_for_own_store_ms", self.writer.longest_wait.as_millis()),
        ]);
        Ok(written)
    }

    /// Whether all followers are known in all shards, and of all of them `holds` is true.
    fn all(&self, status: &Status, holds: impl Fn(&FollowerStatus) -> bool) -> bool {
        let count = usize::from(self.demo.followers);
        status.shards.iter().all(|shard| shard.followers.len() == count && shard.followers.iter().all(&holds))
    }

    /// Records applied by each follower, as far as the leader knows.
    fn applied_by_followers(&self) -> Vec<u64> {
        let status = self.leader.status();
        let of = |node: NodeId| {
            let places = status.shards.iter().flat_map(|shard| &shard.followers);
            places.filter(|follower| follower.node == node).map(|follower| follower.applied.get()).sum()
        };
        (1..=self.demo.followers).map(|number| of(NodeId(u64::from(number)))).collect()
    }

    /// Waits until every follower has applied all of the leader's log and has it on stable storage. Gives up after a
    /// long time: the proof then says what is missing.
    fn await_followers(&self, followers: &mut [FrozenFollower], mut look: impl FnMut(&Status)) -> Step<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.leader.status();
            look(&status);
            let caught_up = status.shards.iter().all(|shard| {
                shard.followers.len() == followers.len()
                    && shard.followers.iter().all(|follower| {
                        // A rebuild is over when the leader has accepted it.
                        let reached = follower.applied.min(follower.durable) >= shard.head;
                        reached && follower.mode == Mode::PublishHealthy
                    })
            });
            if caught_up || Instant::now() >= deadline || self.stop.wait_timeout(ASK_EVERY) {
                return Ok(());
            }
            for follower in &mut *followers {
                if follower.has_ended()? {
                    return Err("a follower has ended; see what `towline follower` says in its directory".into());
                }
            }
        }
    }
}

/// Whether a follower has come as far as the leader's `heads` once were, keeps up in every shard, and is near the head.
fn keeps_up(status: &Status, node: NodeId, heads: &[Lsn]) -> bool {
    status.shards.iter().zip(heads).all(|(shard, head)| {
        let found = shard.followers.iter().find(|follower| follower.node == node);
        // Not the session of its former life.
        let found = found.filter(|follower| {
            follower.connected && follower.applied >= *head && shard.head.records_since(follower.applied) <= NEAR
        });
        found.and_then(|f| f.session).is_some_and(|session| session.kind == SessionKind::KeepUp)
    })
}

/// Shards of followers that are seen in a rebuild.
fn note_rebuilds(rebuilt: &mut BTreeSet<(NodeId, ShardId)>, status: &Status) {
    for shard in &status.shards {
        let rebuilding = shard
            .followers
            .iter()
            .filter(|follower| follower.session.is_some_and(|session| session.kind == SessionKind::Rebuild));
        rebuilt.extend(rebuilding.map(|follower| (follower.node, shard.shard)));
    }
}

/// Asks a leader how it is, not more often than needed.
#[derive(Default)]
struct Asked {
    at: Option<Instant>,
}

impl Asked {
    /// The answer of `look`, or false if it is too early to ask again.
    fn now_and_then(&mut self, stage: &Stage<'_>, look: impl FnOnce(&Status) -> bool) -> bool {
        if self.at.is_some_and(|at| at.elapsed() < ASK_EVERY) {
            return false;
        }
        self.at = Some(Instant::now());
        look(&stage.leader.status())
    }
}

/// Megabytes of values a second.
fn per_second(records: u64, record_size: u32, time: Duration) -> String {
    #[allow(clippy::cast_precision_loss, reason = "for people to read")]
    let rate = (records * u64::from(record_size)) as f64 / 1e6 / time.as_secs_f64().max(1e-9);
    format!("{rate:.1}")
}
