//! A cascade: a follower that listens feeds further followers with the log that it receives.
//!
//! What breaks: the leader goes away, another leads with another history, the follower in the middle is behind those
//! whom it feeds, is rebuilt under them, or has never met anybody. What prevents harm: it feeds nobody before its log
//! is known to be a beginning of the leader's under the epoch in force, and decides then by the same rules.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::net::{Net, free_port};
use common::proxy::{Fate, Proxy};
use common::random::Random;
use common::{Checked, SEGMENT, append, assert_identical, catch_up, copy_directory, deadline, reach, shards, until};
use tempfile::TempDir;
use towline::protocol::{Mode, SessionKind};
use towline::status::FollowerStatus;
use towline::target::fixed_store::FixedStoreOptions;
use towline::target::{BaseInfo, BaseSink, BaseSource, BlockId, BlockRun, FixedStore, LogOnly, ReplicationTarget};
use towline::types::shard_directory_name;
use towline::wal::{LogWriter, Record};
use towline::{
    AckLevel, Commit, Epoch, Follower, Leader, Lsn, NodeBuilder, NodeId, Outcome, RefusalCode, ShardId, Watermark,
};

const S0: ShardId = ShardId(0);
const LEADER: u64 = 1;
const RELAY: u64 = 2;
const LAST: u64 = 3;
const NEXT_LEADER: u64 = 4;

over_both![
    records_go_through_every_link,
    who_comes_before_the_relay_has_met_its_leader_waits,
    a_relay_that_has_lost_its_leader_feeds_on,
    another_leader_has_everybody_cut,
    a_leader_that_comes_back_behind_a_relay_waits_for_the_next_leader,
    a_follower_that_has_more_than_the_relay_keeps_it,
    a_store_is_rebuilt_through_every_link,
    another_leader_has_every_store_rebuilt,
    no_rebuild_ends_short_of_what_an_interrupted_one_gave_up,
    a_relay_keeps_log_for_whom_it_feeds,
    a_relay_that_stops_hands_over_all_that_it_has,
    only_those_named_are_fed,
    two_that_follow_each_other_say_so,
    what_is_committed_is_told_behind_a_busy_writer_and_forgotten_with_the_log,
    a_relay_that_is_rebuilt_while_a_base_is_read_from_it_waits,
];

/// Where the nodes are, and where the relay listens.
struct Scene<'a> {
    net: &'a Net,
    parent: TempDir,
    relay: String,
}

impl Scene<'_> {
    fn new(net: &Net) -> Scene<'_> {
        let is_tcp = net.address.contains(':');
        let relay = if is_tcp { format!("127.0.0.1:{}", free_port()) } else { "relay".to_owned() };
        Scene { net, parent: tempfile::tempdir().unwrap(), relay }
    }

    fn directory(&self, node: u64) -> std::path::PathBuf {
        self.parent.path().join(format!("node-{node}"))
    }

    fn node(&self, node: u64) -> NodeBuilder {
        // Half of the handshake time-out is how long a relay has those wait whom it cannot feed yet.
        let builder = self.net.node(&self.directory(node)).node_id(NodeId(node)).segment_size(SEGMENT);
        builder.heartbeat(Duration::from_millis(50))
    }

    fn lead(&self, node: u64, count: u16) -> Leader {
        self.node(node).shards(count).lead(&self.net.address).unwrap()
    }

    /// A follower that feeds others.
    fn feed(&self, target: Arc<dyn ReplicationTarget>) -> Follower {
        self.node(RELAY).listen(&self.relay).follow(&self.net.address, target).unwrap()
    }

    /// A follower of the relay.
    fn last(&self, target: Arc<dyn ReplicationTarget>) -> Follower {
        self.node(LAST).follow(&self.relay, target).unwrap()
    }
}

/// What a node says of the one whom it feeds in a shard, if it does.
fn fed(relay: &Follower, node: u64) -> Option<FollowerStatus> {
    let status = relay.status();
    status.shards[0].followers.iter().find(|follower| follower.node == NodeId(node)).cloned()
}

fn error_of(follower: &Follower) -> String {
    follower.status().shards[0].following.as_ref().unwrap().error.clone().unwrap_or_default()
}

/// Waits until a follower's log is as long as that, applied and synced.
fn has(follower: &Follower, head: Lsn) {
    until("the log is as long", || follower.log(S0).unwrap().head() >= head);
    reach(follower.applied(S0).unwrap(), head, "applying");
    follower.log(S0).unwrap().wait_synced(head, Some(deadline())).unwrap();
}

fn records_go_through_every_link(net: &Net) {
    let scene = Scene::new(net);
    let leader = scene.lead(LEADER, 3);
    let mut writers = common::writers(&leader);
    for writer in &mut writers {
        append(writer, 300);
    }
    let (first, second) = (Checked::new(3), Checked::new(3));
    let relay = scene.feed(first.clone());
    let last = scene.last(second.clone());
    // One more link.
    let fourth_at = if net.address.contains(':') { "127.0.0.1:0" } else { "third" };
    drop(last);
    let last = scene.node(LAST).listen(fourth_at).follow(&scene.relay, second.clone()).unwrap();
    let address = last.local_address().unwrap().to_owned();
    let (third, end) = (Checked::new(3), 9);
    let fourth = scene.node(end).follow(&address, third.clone()).unwrap();
    for round in 0..20 {
        for writer in &mut writers {
            append(writer, 17 + round);
        }
        if round % 5 == 0 {
            catch_up(&leader, &fourth);
        }
    }
    for follower in [&relay, &last, &fourth] {
        catch_up(&leader, follower);
    }
    // What is behind the relay commits nothing: only nodes that the leader itself feeds are counted.
    let head = leader.log(S0).unwrap().head();
    let two = Commit::followers(AckLevel::Received, 2).unwrap();
    let soon = Some(std::time::Instant::now() + Duration::from_millis(20));
    assert_eq!(leader.wait(S0, head, two, soon).unwrap(), Outcome::TimedOut);
    assert!(leader.wait(S0, head, "durable:1".parse().unwrap(), Some(deadline())).unwrap().is_committed());
    until("the relay says how the one that it feeds is", || {
        fed(&relay, LAST).is_some_and(|last| last.applied == head && last.mode == Mode::PublishHealthy)
    });
    assert_eq!(relay.status().shards[0].mode, Mode::ReplicaReady);
    // What the leader has committed is told from link to link.
    for follower in [&relay, &last, &fourth] {
        until("it hears what is committed", || follower.status().shards[0].committed == head);
    }
    for follower in [fourth, last, relay] {
        follower.shutdown().unwrap();
    }
    leader.shutdown().unwrap();
    let heads: Vec<_> = shards(3).map(|_| head.get()).collect();
    for node in [RELAY, LAST, end] {
        assert_identical(&scene.directory(LEADER), &scene.directory(node), &heads);
    }
    [first, second, third].iter().for_each(|target| target.assert_saw(&heads));
}

fn who_comes_before_the_relay_has_met_its_leader_waits(net: &Net) {
    let scene = Scene::new(net);
    let leader = scene.lead(LEADER, 1);
    let relay = scene.feed(Arc::new(LogOnly));
    append(&mut leader.writer(S0).unwrap(), 100);
    catch_up(&leader, &relay);
    relay.shutdown().unwrap();
    leader.shutdown().unwrap();
    // Nobody leads: the relay has a log, and does not know whose it is now.
    let builder = scene.node(RELAY).listen(&scene.relay).handshake_timeout(Duration::from_millis(100));
    let relay = builder.follow(&net.address, Arc::new(LogOnly)).unwrap();
    let last = scene.last(Arc::new(LogOnly));
    until("it is told to ask again", || error_of(&last).contains("has yet to catch up with its own leader"));
    assert_eq!(last.log(S0).unwrap().head(), Lsn::ZERO);
    let leader = scene.lead(LEADER, 1);
    has(&last, Lsn(100));
    [last, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
    leader.shutdown().unwrap();
    assert_identical(&scene.directory(LEADER), &scene.directory(LAST), &[100]);
}

fn a_relay_that_has_lost_its_leader_feeds_on(net: &Net) {
    let scene = Scene::new(net);
    let leader = scene.lead(LEADER, 1);
    let relay = scene.feed(Arc::new(LogOnly));
    append(&mut leader.writer(S0).unwrap(), 100);
    catch_up(&leader, &relay);
    leader.shutdown().unwrap();
    until("it has no leader", || !relay.status().shards[0].following.as_ref().unwrap().connected);
    let last = scene.last(Arc::new(LogOnly));
    has(&last, Lsn(100));
    let keeps_up = || fed(&relay, LAST)?.session.filter(|session| session.kind == SessionKind::KeepUp);
    until("it keeps up", || keeps_up().is_some());
    let session = keeps_up().unwrap();
    // The same leader comes back under the same epoch: nobody's stream ends for that.
    let leader = scene.lead(LEADER, 1);
    append(&mut leader.writer(S0).unwrap(), 50);
    has(&last, Lsn(150));
    assert_eq!(fed(&relay, LAST).unwrap().session.unwrap().id, session.id, "the session goes on");
    [last, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
    leader.shutdown().unwrap();
    assert_identical(&scene.directory(LEADER), &scene.directory(LAST), &[150]);
}

/// Records that only this leader and those behind it have.
fn append_strays(writer: &mut LogWriter, count: u64) -> Lsn {
    let mut last = writer.end().head;
    for _ in 0..count {
        last = writer.append(format!("stray {}", last.next()).repeat(20).as_bytes()).unwrap();
    }
    last
}

/// A leader with so many records, a relay, its follower, and the log of the next leader, which has stopped: all of them
/// have everything.
fn before_a_failover(scene: &Scene<'_>, records: u64) -> (Leader, LogWriter, [Follower; 2]) {
    let leader = scene.lead(LEADER, 1);
    let relay = scene.feed(Arc::new(LogOnly));
    let last = scene.last(Arc::new(LogOnly));
    let next = scene.node(NEXT_LEADER).follow(&scene.net.address, Arc::new(LogOnly)).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, records);
    [&relay, &last, &next].into_iter().for_each(|follower| catch_up(&leader, follower));
    next.shutdown().unwrap();
    (leader, writer, [relay, last])
}

/// Everybody behind a relay has records that never reached the next leader. They run all along.
fn another_leader_has_everybody_cut(net: &Net) {
    for (strays, more) in [(7, 20), (900, 7), (5, 0), (0, 5)] {
        let scene = Scene::new(net);
        let (leader, mut writer, [relay, last]) = before_a_failover(&scene, 400);
        append_strays(&mut writer, strays);
        [&relay, &last].into_iter().for_each(|follower| catch_up(&leader, follower));
        drop(writer);
        leader.shutdown().unwrap();

        let leader = scene.node(NEXT_LEADER).epoch(Epoch(2)).lead(&net.address).unwrap();
        let mut writer = leader.writer(S0).unwrap();
        append(&mut writer, more);
        let head = Lsn(400 + more);
        for follower in [&relay, &last] {
            until("the log is the new leader's", || {
                follower.log(S0).unwrap().head() == head && follower.manifest().epoch == Epoch(2)
            });
        }
        append(&mut writer, 30);
        [&relay, &last].into_iter().for_each(|follower| has(follower, Lsn(430 + more)));
        [last, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
        drop(writer);
        leader.shutdown().unwrap();
        for node in [RELAY, LAST] {
            assert_identical(&scene.directory(NEXT_LEADER), &scene.directory(node), &[430 + more]);
        }
    }
}

/// The relay feeds on under the old leader's epoch when that one comes to it, as it has yet to meet the next.
fn a_leader_that_comes_back_behind_a_relay_waits_for_the_next_leader(net: &Net) {
    for strays in [0, 9] {
        let scene = Scene::new(net);
        let leader = scene.lead(LEADER, 1);
        let relay = scene.feed(Arc::new(LogOnly));
        let next = scene.node(NEXT_LEADER).follow(&net.address, Arc::new(LogOnly)).unwrap();
        let mut writer = leader.writer(S0).unwrap();
        append(&mut writer, 100);
        [&relay, &next].into_iter().for_each(|follower| catch_up(&leader, follower));
        next.shutdown().unwrap();
        append_strays(&mut writer, strays);
        drop(writer);
        leader.shutdown().unwrap();
        until("it has no leader", || !relay.status().shards[0].following.as_ref().unwrap().connected);
        let old = scene.node(LEADER).follow(&scene.relay, Arc::new(LogOnly)).unwrap();
        until("it is told to ask again", || error_of(&old).contains("you have led under epoch 1"));

        let leader = scene.node(NEXT_LEADER).epoch(Epoch(2)).lead(&net.address).unwrap();
        append(&mut leader.writer(S0).unwrap(), 20);
        [&relay, &old].into_iter().for_each(|follower| has(follower, Lsn(120)));
        until("the log is the new leader's", || old.log(S0).unwrap().head() == Lsn(120));
        [old, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
        leader.shutdown().unwrap();
        for node in [RELAY, LEADER] {
            assert_identical(&scene.directory(NEXT_LEADER), &scene.directory(node), &[120]);
        }
    }
}

/// One that was fed by the leader itself comes to a relay that is behind it under the same epoch.
fn a_follower_that_has_more_than_the_relay_keeps_it(net: &Net) {
    let scene = Scene::new(net);
    let leader = scene.lead(LEADER, 1);
    let relay = scene.feed(Arc::new(LogOnly));
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 100);
    catch_up(&leader, &relay);
    relay.shutdown().unwrap();
    drop(writer);
    leader.shutdown().unwrap();
    let before = scene.parent.path().join("before");
    copy_directory(&scene.directory(LEADER), &before);
    let leader = scene.lead(LEADER, 1);
    let direct = scene.node(LAST).follow(&net.address, Arc::new(LogOnly)).unwrap();
    append(&mut leader.writer(S0).unwrap(), 200);
    catch_up(&leader, &direct);
    direct.shutdown().unwrap();
    leader.shutdown().unwrap();
    // The relay meets a leader that has not come further than itself.
    let behind = net.node(&before).lead(&net.address).unwrap();
    let relay = scene.feed(Arc::new(LogOnly));
    let last = scene.last(Arc::new(LogOnly));
    until("it waits for the relay", || error_of(&last).contains("a follower itself, only up to 100 so far"));
    until("the relay says so", || {
        let refusal = fed(&relay, LAST).and_then(|last| last.refusal);
        refusal.is_some_and(|refusal| refusal.as_str() == "relay_behind")
    });
    assert_eq!(last.log(S0).unwrap().head(), Lsn(300), "it keeps what it has");
    behind.shutdown().unwrap();
    // The leader with everything is back.
    let leader = scene.lead(LEADER, 1);
    append(&mut leader.writer(S0).unwrap(), 50);
    [&relay, &last].into_iter().for_each(|follower| has(follower, Lsn(350)));
    [last, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
    leader.shutdown().unwrap();
    for node in [RELAY, LAST] {
        assert_identical(&scene.directory(LEADER), &scene.directory(node), &[350]);
    }
}

const STORE: FixedStoreOptions = FixedStoreOptions { key_len: 16, value_len: 100, shard_count: 1, prefix_bits: 0 };

fn store(scene: &Scene<'_>, node: u64) -> Arc<FixedStore> {
    Arc::new(FixedStore::open(scene.parent.path().join(format!("store-{node}")), &STORE).unwrap())
}

fn put(writer: &mut LogWriter, store: &FixedStore, key: u64, value: &str) -> Lsn {
    store.put(format!("key {key:08}").as_bytes(), value.as_bytes(), |_, record| writer.append(record)).unwrap()
}

fn value(store: &FixedStore, key: u64) -> Option<String> {
    store.get(format!("key {key:08}").as_bytes()).unwrap().map(|value| String::from_utf8(value).unwrap())
}

fn assert_same_stores(a: &FixedStore, b: &FixedStore, keys: u64) {
    for key in 0..keys {
        assert_eq!(value(a, key), value(b, key), "key {key}");
    }
}

/// Gives up all log of a leader but the newest segment.
fn trim(leader: &Leader) {
    let log = leader.log(S0).unwrap();
    let head = log.head();
    reach(leader.applied(S0).unwrap().unwrap(), head, "applying");
    log.wait_synced(head, Some(deadline())).unwrap();
    log.release_through(head, "the test says so").unwrap();
    assert!(log.tail() > Lsn(1), "something was released");
}

/// The leader's log no longer reaches back: the relay is rebuilt, and from it whom it feeds, while records come. Later
/// the relay falls behind again and is rebuilt once more, under a follower that it feeds.
fn a_store_is_rebuilt_through_every_link(net: &Net) {
    let scene = Scene::new(net);
    let [of_leader, of_relay, of_last] = [LEADER, RELAY, LAST].map(|node| store(&scene, node));
    let leader = || scene.node(LEADER).target(of_leader.clone()).lead(&net.address).unwrap();
    let first = leader();
    let mut writer = first.writer(S0).unwrap();
    for key in 0..2000 {
        put(&mut writer, &of_leader, key, "before");
    }
    trim(&first);
    let relay = scene.feed(of_relay.clone());
    let last = scene.last(of_last.clone());
    for round in 0..50 {
        for key in 0..20 {
            put(&mut writer, &of_leader, round * 40 + key, &format!("during {round}"));
        }
    }
    let head = first.log(S0).unwrap().head();
    has(&relay, head);
    has(&last, head);
    assert_eq!(relay.rebuild_progress(S0).unwrap().phase.as_str(), "completed");
    assert_eq!(last.rebuild_progress(S0).unwrap().phase.as_str(), "completed");
    assert_same_stores(&of_leader, &of_relay, 2100);
    assert_same_stores(&of_leader, &of_last, 2100);

    // The relay stops; the leader forgets it, and with it the log that it would need.
    relay.shutdown().unwrap();
    first.forget_follower(NodeId(RELAY)).unwrap();
    for key in 0..2000 {
        put(&mut writer, &of_leader, key, "after");
    }
    trim(&first);
    let relay = scene.feed(of_relay.clone());
    let head = put(&mut writer, &of_leader, 5, "last of all");
    has(&relay, head);
    assert_eq!(relay.rebuild_progress(S0).unwrap().phase.as_str(), "completed", "by a rebuild, again");
    has(&last, head);
    assert_same_stores(&of_leader, &of_last, 2100);
    assert_eq!(value(&of_last, 5).as_deref(), Some("last of all"));
    [last, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
    drop(writer);
    first.shutdown().unwrap();
}

/// What was applied behind a relay is not the next leader's: both stores are given up, first the relay's.
fn another_leader_has_every_store_rebuilt(net: &Net) {
    let scene = Scene::new(net);
    let [of_leader, of_relay, of_last, of_next] = [LEADER, RELAY, LAST, NEXT_LEADER].map(|node| store(&scene, node));
    let leader = scene.node(LEADER).target(of_leader.clone()).lead(&net.address).unwrap();
    let relay = scene.feed(of_relay.clone());
    let last = scene.last(of_last.clone());
    let next = scene.node(NEXT_LEADER).follow(&net.address, of_next.clone()).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    let mut head = Lsn::ZERO;
    for key in 0..600 {
        head = put(&mut writer, &of_leader, key, "shared");
    }
    [&relay, &last, &next].into_iter().for_each(|follower| has(follower, head));
    next.shutdown().unwrap();
    for key in 500..900 {
        head = put(&mut writer, &of_leader, key, "stray");
    }
    [&relay, &last].into_iter().for_each(|follower| has(follower, head));
    drop(writer);
    leader.shutdown().unwrap();

    let leader = scene.node(NEXT_LEADER).epoch(Epoch(2)).target(of_next.clone()).lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    for key in 550..650 {
        put(&mut writer, &of_next, key, "new");
    }
    // The relay was rebuilt and has a short log, that no longer tells where the other's parts from it.
    until("the relay cannot tell yet", || error_of(&last).contains("a follower itself, only up to"));
    for key in 200..700 {
        head = put(&mut writer, &of_next, key, "newer");
    }
    for (follower, store) in [(&relay, &of_relay), (&last, &of_last)] {
        until("it is rebuilt", || follower.log(S0).unwrap().head() == head && !store.is_rebuilding(S0).unwrap());
    }
    head = put(&mut writer, &of_next, 7, "newest");
    for (follower, store) in [(&relay, &of_relay), (&last, &of_last)] {
        until("it shows what is new", || value(store, 7).as_deref() == Some("newest"));
        follower.log(S0).unwrap().wait_synced(head, Some(deadline())).unwrap();
        assert_same_stores(&of_next, store, 1000);
        assert_eq!(value(store, 899), None, "nothing of the strays is left");
    }
    [last, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
    drop(writer);
    leader.shutdown().unwrap();
}

/// A store whose rebuild is interrupted at its first block: state and log of before are gone.
struct Interrupted(Arc<FixedStore>);

impl ReplicationTarget for Interrupted {
    fn durable_applied(&self, shard: ShardId) -> towline::Result<Option<Lsn>> {
        self.0.durable_applied(shard)
    }

    fn apply(&self, shard: ShardId, record: Record<'_>) -> towline::Result<()> {
        self.0.apply(shard, record)
    }

    fn sync(&self, shard: ShardId) -> towline::Result<()> {
        self.0.sync(shard)
    }

    fn is_rebuilding(&self, shard: ShardId) -> towline::Result<bool> {
        self.0.is_rebuilding(shard)
    }

    fn begin_base(&self, shard: ShardId, info: BaseInfo) -> towline::Result<Box<dyn BaseSink>> {
        Ok(Box::new(NoBlock(self.0.begin_base(shard, info)?)))
    }
}

struct NoBlock(Box<dyn BaseSink>);

impl BaseSink for NoBlock {
    fn put_block(&mut self, _: BlockId, _: &[u8]) -> towline::Result<()> {
        Err(towline::Error::target(S0, "interrupted"))
    }

    fn consistent_from(&self) -> Lsn {
        self.0.consistent_from()
    }

    fn complete(&mut self, achieved: Lsn) -> towline::Result<()> {
        self.0.complete(achieved)
    }

    fn cancel(&mut self) {
        self.0.cancel();
    }
}

/// A follower has acknowledged much, and its leader begins to rebuild it: what it had is gone. A relay that is behind
/// must not complete that with less, or the follower would pass for one that has what it acknowledged.
fn no_rebuild_ends_short_of_what_an_interrupted_one_gave_up(net: &Net) {
    let scene = Scene::new(net);
    let [of_leader, of_relay, of_last] = [LEADER, RELAY, LAST].map(|node| store(&scene, node));
    let lead = || scene.node(LEADER).target(of_leader.clone()).lead(&net.address).unwrap();
    let leader = lead();
    let relay = scene.feed(of_relay.clone());
    let mut writer = leader.writer(S0).unwrap();
    let mut head = Lsn::ZERO;
    for key in 0..100 {
        head = put(&mut writer, &of_leader, key, "before");
    }
    has(&relay, head);
    relay.shutdown().unwrap();
    drop(writer);
    leader.shutdown().unwrap();
    let short = scene.parent.path().join("short");
    copy_directory(&scene.directory(LEADER), &short);

    let leader = lead();
    let mut writer = leader.writer(S0).unwrap();
    let last = scene.node(LAST).follow(&net.address, of_last.clone()).unwrap();
    for key in 0..2000 {
        head = put(&mut writer, &of_leader, key, "after");
    }
    has(&last, head);
    last.shutdown().unwrap();
    leader.forget_follower(NodeId(LAST)).unwrap();
    for key in 0..1000 {
        head = put(&mut writer, &of_leader, key, "later");
    }
    trim(&leader);
    let last = scene.node(LAST).follow(&net.address, Arc::new(Interrupted(of_last.clone()))).unwrap();
    assert!(last.wait().unwrap_err().to_string().contains("interrupted"));
    let following = last.status().shards[0].following.clone().unwrap();
    assert!(following.rebuilding);
    let told = following.applied;
    assert!(told < head, "LSN {told} of a base that has not come");
    drop(last);
    assert!(of_last.is_rebuilding(S0).unwrap(), "it is nobody's state any more");
    // What had come of the log was not synced, and a power cut takes it.
    let log = scene.directory(LAST).join(shard_directory_name(S0));
    for entry in std::fs::read_dir(log).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    drop(writer);
    leader.shutdown().unwrap();

    // The relay is where it was long ago, under the same epoch, and does not know better.
    let behind = net.node(&short).lead(&net.address).unwrap();
    let relay = scene.feed(of_relay.clone());
    let last = scene.last(of_last.clone());
    until("it is not content", || error_of(&last).contains("whoever serves it must have come as far"));
    assert!(of_last.is_rebuilding(S0).unwrap());
    behind.shutdown().unwrap();
    let leader = lead();
    has(&last, head);
    assert_same_stores(&of_leader, &of_last, 2000);
    [last, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
    assert!(!scene.directory(LAST).join("owed-0000").exists(), "it owes nothing any more");
    leader.shutdown().unwrap();
}

/// The leader appends faster than the relay's link carries, all along: the relay never has all that there is.
#[test]
fn a_relay_feeds_although_its_leader_is_always_further() {
    let net = Net::tcp();
    let scene = Scene::new(&net);
    let leader = scene.lead(LEADER, 1);
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 2000);
    let proxy = Proxy::start(&net.address, Random::new());
    proxy.plan([Fate::Slow(Duration::from_millis(20)); 100]);
    let relay = scene.node(RELAY).listen(&scene.relay).follow(&proxy.address, Arc::new(LogOnly)).unwrap();
    let last = scene.last(Arc::new(LogOnly));
    until("it is fed while the relay lags", || {
        append(&mut writer, 300);
        last.log(S0).unwrap().head() > Lsn(2000)
    });
    assert!(relay.log(S0).unwrap().head() < leader.log(S0).unwrap().head(), "the relay kept up");
    proxy.cut();
    [last, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
    drop(writer);
    leader.shutdown().unwrap();
}

fn a_relay_keeps_log_for_whom_it_feeds(net: &Net) {
    let scene = Scene::new(net);
    let leader = scene.node(LEADER).min_wal_bytes(0).lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    let relay = scene.node(RELAY).listen(&scene.relay).min_wal_bytes(0);
    let relay = relay.follow(&net.address, Arc::new(LogOnly)).unwrap();
    let last = scene.last(Arc::new(LogOnly));
    append(&mut writer, 100);
    has(&last, Lsn(100));
    until("the relay knows", || fed(&relay, LAST).is_some_and(|last| last.durable == Lsn(100)));
    last.shutdown().unwrap();
    append(&mut writer, 3000);
    has(&relay, Lsn(3100));
    until("the leader gives up what nobody needs", || leader.log(S0).unwrap().tail() > Lsn(2000));
    assert_eq!(relay.log(S0).unwrap().tail(), Lsn(1), "it is kept where it is needed");
    let last = scene.last(Arc::new(LogOnly));
    has(&last, Lsn(3100));
    until("the relay gives it up too", || relay.log(S0).unwrap().tail() > Lsn(2000));
    last.shutdown().unwrap();
    // Nobody else is known then: log is kept for a first one.
    relay.forget_follower(NodeId(LAST)).unwrap();
    assert!(fed(&relay, LAST).is_none());
    relay.shutdown().unwrap();
    drop(writer);
    leader.shutdown().unwrap();
}

fn a_relay_that_stops_hands_over_all_that_it_has(net: &Net) {
    let scene = Scene::new(net);
    let leader = scene.lead(LEADER, 1);
    let relay = scene.feed(Arc::new(LogOnly));
    let last = scene.last(Arc::new(LogOnly));
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 10);
    has(&last, Lsn(10));
    let head = append(&mut writer, 5000);
    reach(relay.log(S0).unwrap().written(), head, "the relay has it");
    relay.shutdown().unwrap();
    until("it has been handed over", || last.log(S0).unwrap().head() == head);
    last.shutdown().unwrap();
    drop(writer);
    leader.shutdown().unwrap();
    assert_identical(&scene.directory(LEADER), &scene.directory(LAST), &[head.get()]);
}

fn only_those_named_are_fed(net: &Net) {
    let scene = Scene::new(net);
    let leader = scene.lead(LEADER, 1);
    append(&mut leader.writer(S0).unwrap(), 10);
    let builder = scene.node(RELAY).listen(&scene.relay).followers([NodeId(LAST)]);
    let relay = builder.follow(&net.address, Arc::new(LogOnly)).unwrap();
    let last = scene.last(Arc::new(LogOnly));
    has(&last, Lsn(10));
    let stranger = scene.node(77).follow(&scene.relay, Arc::new(LogOnly)).unwrap();
    let refused = std::thread::scope(|scope| scope.spawn(|| stranger.wait()).join().unwrap());
    let error = refused.unwrap_err();
    assert!(matches!(error, towline::Error::Refused { code: RefusalCode::WrongTopology, .. }), "{error}");
    common::assert_says(&error.to_string(), &["node 77 is not among the followers"]);
    stranger.shutdown().unwrap_err();
    // Nor is one that it has fed before, once it is named no more.
    [last, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
    let builder = scene.node(RELAY).listen(&scene.relay).followers([NodeId(77)]);
    let relay = builder.follow(&net.address, Arc::new(LogOnly)).unwrap();
    let last = scene.last(Arc::new(LogOnly));
    common::assert_says(&last.wait().unwrap_err().to_string(), &["node 3 is not among the followers"]);
    assert!(fed(&relay, LAST).is_none(), "no log is kept for it");
    last.shutdown().unwrap_err();
    relay.shutdown().unwrap();
    leader.shutdown().unwrap();
}

fn two_that_follow_each_other_say_so(net: &Net) {
    let scene = Scene::new(net);
    let leader = scene.lead(LEADER, 1);
    append(&mut leader.writer(S0).unwrap(), 10);
    let listens_at = if net.address.contains(':') { "127.0.0.1:0" } else { "first" };
    let first = scene.node(LAST).listen(listens_at).follow(&net.address, Arc::new(LogOnly)).unwrap();
    let relay = scene.node(RELAY).listen(&scene.relay);
    let relay = relay.follow(first.local_address().unwrap(), Arc::new(LogOnly)).unwrap();
    catch_up(&leader, &relay);
    // Somebody has the first one follow where the second listens, instead of the leader.
    first.shutdown().unwrap();
    let first = scene.node(LAST).follow(&scene.relay, Arc::new(LogOnly)).unwrap();
    until("it is told why", || error_of(&first).contains("is a follower of node 3 itself"));
    assert!(fed(&relay, LAST).is_none_or(|first| !first.connected));
    [first, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
    leader.shutdown().unwrap();
}

/// What a leader has committed comes with its signs of life, which a writer that never rests must not hold up. Under
/// another leader it may be less.
fn what_is_committed_is_told_behind_a_busy_writer_and_forgotten_with_the_log(net: &Net) {
    let scene = Scene::new(net);
    let (leader, mut writer, [relay, last]) = before_a_failover(&scene, 100);
    let committed = |follower: &Follower| follower.status().shards[0].committed;
    until("it is told meanwhile", || {
        append_strays(&mut writer, 20);
        committed(&last) > Lsn(100)
    });
    let head = leader.log(S0).unwrap().head();
    assert!(committed(&last) <= head);
    [&relay, &last].into_iter().for_each(|follower| has(follower, head));
    drop(writer);
    leader.shutdown().unwrap();

    let two = Commit::followers(AckLevel::Durable, 2).unwrap();
    let leader = scene.node(NEXT_LEADER).epoch(Epoch(2)).commit(two).lead(&net.address).unwrap();
    append(&mut leader.writer(S0).unwrap(), head.get());
    for follower in [&relay, &last] {
        until("it has the new leader's", || follower.manifest().epoch == Epoch(2));
        has(follower, leader.log(S0).unwrap().head());
        assert!(committed(follower) <= Lsn(100), "nobody but the relay follows, so nothing more is committed");
    }
    [last, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
    leader.shutdown().unwrap();
}

/// A relay's store, whose base is given when the gate is open.
struct Gated {
    store: Arc<FixedStore>,
    is_open: Arc<Watermark>,
    is_read: Arc<Watermark>,
}

struct GatedSource(Box<dyn BaseSource>, Arc<Watermark>, Arc<Watermark>);

impl ReplicationTarget for Gated {
    fn durable_applied(&self, shard: ShardId) -> towline::Result<Option<Lsn>> {
        self.store.durable_applied(shard)
    }

    fn apply(&self, shard: ShardId, record: Record<'_>) -> towline::Result<()> {
        self.store.apply(shard, record)
    }

    fn sync(&self, shard: ShardId) -> towline::Result<()> {
        self.store.sync(shard)
    }

    fn is_rebuilding(&self, shard: ShardId) -> towline::Result<bool> {
        self.store.is_rebuilding(shard)
    }

    fn open_base(&self, shard: ShardId) -> towline::Result<Box<dyn BaseSource>> {
        let source = self.store.open_base(shard)?;
        Ok(Box::new(GatedSource(source, Arc::clone(&self.is_open), Arc::clone(&self.is_read))))
    }

    fn begin_base(&self, shard: ShardId, info: BaseInfo) -> towline::Result<Box<dyn BaseSink>> {
        self.store.begin_base(shard, info)
    }
}

impl BaseSource for GatedSource {
    fn info(&self) -> BaseInfo {
        self.0.info()
    }

    fn next_run(&mut self, buffer: &mut [u8]) -> towline::Result<Option<BlockRun>> {
        self.2.advance(Lsn(1));
        reach(&self.1, Lsn(1), "the gate opens");
        self.0.next_run(buffer)
    }

    fn skip_to(&mut self, first: BlockId) {
        self.0.skip_to(first);
    }
}

/// The relay reads its store for one that it feeds when it has to be rebuilt itself: it empties nothing under the
/// reader.
fn a_relay_that_is_rebuilt_while_a_base_is_read_from_it_waits(net: &Net) {
    let scene = Scene::new(net);
    let [of_leader, of_relay, of_last] = [LEADER, RELAY, LAST].map(|node| store(&scene, node));
    let leader = scene.node(LEADER).target(of_leader.clone()).lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    for key in 0..1500 {
        put(&mut writer, &of_leader, key, "before");
    }
    trim(&leader);
    let [is_open, is_read] = [(); 2].map(|()| Arc::new(Watermark::default()));
    let target = Gated { store: of_relay.clone(), is_open: Arc::clone(&is_open), is_read: Arc::clone(&is_read) };
    let relay = scene.feed(Arc::new(target));
    let last = scene.last(of_last.clone());
    reach(&is_read, Lsn(1), "the relay's store is read");
    drop(writer);
    leader.shutdown().unwrap();
    // Where the relay does not see it, the leader goes on, and gives up what the relay needs next.
    let elsewhere = if net.address.contains(':') { "127.0.0.1:0" } else { "elsewhere" };
    let leader = scene.node(LEADER).target(of_leader.clone()).lead(elsewhere).unwrap();
    leader.forget_follower(NodeId(RELAY)).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    for key in 0..1500 {
        put(&mut writer, &of_leader, key, "after");
    }
    trim(&leader);
    drop(writer);
    leader.shutdown().unwrap();
    let leader = scene.node(LEADER).target(of_leader.clone()).lead(&net.address).unwrap();
    let head = leader.log(S0).unwrap().head();
    until("the relay is to be rebuilt", || {
        let status = leader.status();
        let relay = status.shards[0].followers.first().cloned();
        relay.and_then(|relay| relay.session).is_some_and(|session| session.kind == SessionKind::Rebuild)
    });
    until("whom it feeds has no stream any more", || !last.status().shards[0].following.as_ref().unwrap().connected);
    assert!(!of_relay.is_rebuilding(S0).unwrap(), "its store is as it was while somebody reads it");
    is_open.advance(Lsn(1));
    [&relay, &last].into_iter().for_each(|follower| has(follower, head));
    assert_same_stores(&of_leader, &of_relay, 1500);
    assert_same_stores(&of_leader, &of_last, 1500);
    [last, relay].into_iter().for_each(|follower| follower.shutdown().unwrap());
    leader.shutdown().unwrap();
}
