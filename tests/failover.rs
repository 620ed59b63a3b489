//! Failover: a deposed leader with records that never reached the next one comes back as a follower. Its log is cut at
//! the common point if what is cut was applied to nothing, otherwise it is rebuilt; whatever is less sure is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::net::Net;
use common::raw::{ask_parting, follow_request, nothing_shared};
use common::{
    Checked, append, assert_identical, catch_up, copy_directory, deadline, directories, record, records_of, until,
};
use parking_lot::Mutex;
use towline::target::fixed_store::FixedStoreOptions;
use towline::target::{FixedStore, LogOnly, ReplicationTarget};
use towline::transport::{Connection, Listener};
use towline::types::shard_directory_name;
use towline::wal::scan::{Relation, compare_logs, list_segments, scan_segment};
use towline::wal::{Expected, LogPosition, LogWriter, Record, batch};
use towline::wire::{
    CommonPoint, EpochEnd, EpochHistory, Message, SessionAction, SessionControl, SessionKind, ShardInfo, Sync,
    SyncRequest, VersionRange,
};
use towline::{
    Chain, Commit, Epoch, Error, Follower, Leader, Lsn, Manifest, NodeId, Outcome, RefusalCode, SessionId, ShardId,
};

const S0: ShardId = ShardId(0);
const A: u64 = 1;
const B: u64 = 2;

over_both![
    a_deposed_leader_is_cut_and_follows,
    a_longer_tail_over_several_segments_is_cut,
    several_shards_part_at_different_points,
    a_follower_of_the_old_leader_is_cut_while_it_runs,
    what_was_applied_to_a_store_is_rebuilt,
    a_store_that_applied_nothing_of_it_is_kept,
    a_store_that_a_power_cut_left_ahead_of_what_it_knows_is_rebuilt,
    a_target_that_cannot_tell_what_it_holds_is_rebuilt,
    another_batch_sealing_the_same_segment_is_cut,
    a_follower_that_is_ahead_under_the_same_epoch_is_refused,
    logs_without_a_common_point_are_refused,
    an_interrupted_cut_is_finished,
    a_cut_follower_counts_only_for_what_it_has,
    an_epoch_has_one_leader,
    two_leaders_under_one_epoch_do_not_follow_each_other,
    a_follower_that_names_a_wrong_point_gains_nothing,
    a_follower_tells_how_far_the_leader_of_now_is,
    a_follower_that_went_on_applying_before_its_rebuild_asks_again,
    a_leader_cannot_have_cut_what_was_not_agreed_on,
    a_diverged_follower_of_an_older_version_is_refused,
];

fn lead(net: &Net, directory: &Path, node: u64, shards: u16) -> Leader {
    let builder = net.node(directory).node_id(NodeId(node)).shards(shards).segment_size(common::SEGMENT);
    builder.lead(&net.address).unwrap()
}

fn follow(net: &Net, directory: &Path, node: u64) -> Follower {
    net.node(directory).node_id(NodeId(node)).follow(&net.address, Arc::new(LogOnly)).unwrap()
}

/// Records that only the node that wrote them has: other bytes than the next leader puts at the same LSNs.
fn append_strays(writer: &mut LogWriter, count: u64) -> Lsn {
    let mut last = writer.end().head;
    for _ in 0..count {
        last = writer.append(format!("stray {}", last.next()).repeat(20).as_bytes()).unwrap();
    }
    last
}

/// Node A leads and B follows up to `shared` in each shard. Then A goes on alone by `strays` in each, and B leads under
/// epoch 2 and appends `more`. Gives B, with the writers of its shards.
fn fail_over(net: &Net, a: &Path, b: &Path, shared: &[u64], strays: &[u64], more: u64) -> (Leader, Vec<LogWriter>) {
    let shards = u16::try_from(shared.len()).unwrap();
    let leader = lead(net, a, A, shards);
    let follower = follow(net, b, B);
    for (shard, &count) in common::shards(shards).zip(shared) {
        append(&mut leader.writer(shard).unwrap(), count);
    }
    catch_up(&leader, &follower);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();

    let leader = lead(net, a, A, shards);
    for (shard, &count) in common::shards(shards).zip(strays) {
        append_strays(&mut leader.writer(shard).unwrap(), count);
    }
    leader.shutdown().unwrap();

    let leader = net.node(b).epoch(Epoch(2)).lead(&net.address).unwrap();
    let mut writers = common::writers(&leader);
    for writer in &mut writers {
        append(writer, more);
    }
    (leader, writers)
}

/// The records of a log are those that each LSN should have, none of them a stray.
fn assert_records(directory: &Path, shard: ShardId, head: u64) {
    let records = records_of(directory, shard);
    assert_eq!(records.len() as u64, head);
    for (lsn, bytes) in records {
        assert_eq!(bytes, record(shard, Lsn(lsn)), "LSN {lsn}");
    }
}

fn a_deposed_leader_is_cut_and_follows(net: &Net) {
    for (strays, more) in [(7, 20), (20, 7), (5, 0), (0, 5)] {
        let (_parent, a, b) = directories();
        let (leader, mut writers) = fail_over(net, &a, &b, &[50], &[strays], more);
        let follower = follow(net, &a, A);
        until("the log is the leader's", || follower.log(S0).unwrap().head() == Lsn(50 + more));
        catch_up(&leader, &follower);
        append(&mut writers[0], 30);
        catch_up(&leader, &follower);
        assert_eq!(follower.manifest().epoch, Epoch(2));
        follower.shutdown().unwrap();
        leader.shutdown().unwrap();
        assert_identical(&a, &b, &[80 + more]);
        assert_records(&a, S0, 80 + more);
    }
}

fn a_longer_tail_over_several_segments_is_cut(net: &Net) {
    let (_parent, a, b) = directories();
    // What is shared fills some segments, what is not fills others.
    let (leader, _) = fail_over(net, &a, &b, &[700], &[1500], 900);
    let follower = follow(net, &a, A);
    until("the log is the leader's", || follower.log(S0).unwrap().head() == Lsn(1600));
    catch_up(&leader, &follower);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
    assert_identical(&a, &b, &[1600]);
    assert_records(&a, S0, 1600);
    // And it opens again, as it was.
    let again = follow_without_leader(&a);
    assert_eq!(again, Lsn(1600));
}

/// The head of a stopped node's log, as recovery finds it.
fn follow_without_leader(directory: &Path) -> Lsn {
    let net = Net::in_process();
    let leader = net.node(directory).epoch(Epoch(90)).lead(&net.address).unwrap();
    let head = leader.log(S0).unwrap().head();
    leader.shutdown().unwrap();
    head
}

fn several_shards_part_at_different_points(net: &Net) {
    let (_parent, a, b) = directories();
    let (leader, _) = fail_over(net, &a, &b, &[10, 0, 333, 40], &[3, 4, 0, 900], 11);
    let follower = follow(net, &a, A);
    let heads = [21, 11, 344, 51];
    for (shard, head) in common::shards(4).zip(heads) {
        until("the log is the leader's", || follower.log(shard).unwrap().head() == Lsn(head));
    }
    catch_up(&leader, &follower);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
    assert_identical(&a, &b, &heads);
    for (shard, head) in common::shards(4).zip(heads) {
        assert_records(&a, shard, head);
    }
}

/// A third node received the strays of the old leader live and never stops: it is cut in the running process.
fn a_follower_of_the_old_leader_is_cut_while_it_runs(net: &Net) {
    let (parent, a, b) = directories();
    let c = parent.path().join("c");
    let leader = lead(net, &a, A, 1);
    let (behind, third) = (follow(net, &b, B), follow(net, &c, 3));
    let mut writer = leader.writer(S0).unwrap();
    append(&mut writer, 400);
    catch_up(&leader, &behind);
    behind.shutdown().unwrap();
    append_strays(&mut writer, 600);
    catch_up(&leader, &third);
    // A reader that holds the old log keeps what it has mapped.
    let old = third.log(S0).unwrap();
    let ranges = old.ranges_from(Lsn(1)).unwrap();
    let sum = |ranges: &[towline::wal::LogRange]| {
        ranges.iter().map(|range| crc32fast::hash(range.bytes())).collect::<Vec<_>>()
    };
    let before = sum(&ranges);
    drop(writer);
    leader.shutdown().unwrap();

    let leader = net.node(&b).epoch(Epoch(2)).lead(&net.address).unwrap();
    append(&mut leader.writer(S0).unwrap(), 100);
    until("the log is the leader's", || third.log(S0).unwrap().head() == Lsn(500));
    third.log(S0).unwrap().wait_synced(Lsn(500), Some(deadline())).unwrap();
    assert_eq!(sum(&ranges), before, "mapped bytes never change");
    assert!(old.is_closed());
    third.shutdown().unwrap();
    leader.shutdown().unwrap();
    assert_identical(&b, &c, &[500]);
    assert_records(&c, S0, 500);
}

const STORE: FixedStoreOptions = FixedStoreOptions { key_len: 16, value_len: 32, shard_count: 1, prefix_bits: 0 };

fn store(directory: &Path) -> Arc<FixedStore> {
    Arc::new(FixedStore::open(directory.join("store"), &STORE).unwrap())
}

fn put(writer: &mut LogWriter, store: &FixedStore, key: &str, value: &str) -> Lsn {
    store.put(key.as_bytes(), value.as_bytes(), |_, operation| writer.append(operation)).unwrap()
}

/// A leader with a store.
fn lead_store(net: &Net, directory: &Path, node: u64, epoch: Option<u64>, store: &Arc<FixedStore>) -> Leader {
    let mut builder = net.node(directory).node_id(NodeId(node)).target(Arc::clone(store) as Arc<dyn ReplicationTarget>);
    if let Some(epoch) = epoch {
        builder = builder.epoch(Epoch(epoch));
    } else {
        builder = builder.segment_size(common::SEGMENT);
    }
    builder.lead(&net.address).unwrap()
}

fn value(store: &FixedStore, key: &str) -> Option<String> {
    store.get(key.as_bytes()).unwrap().map(|value| String::from_utf8(value).unwrap())
}

fn what_was_applied_to_a_store_is_rebuilt(net: &Net) {
    // The new leader is behind the old one's store, or ahead of it.
    for more in [2u64, 40] {
        let (_parent, a, b) = directories();
        let (store_a, store_b) = (store(&a), store(&b));
        let leader = lead_store(net, &a, A, None, &store_a);
        let follower = net.node(&b).node_id(NodeId(B)).follow(&net.address, Arc::clone(&store_b) as _).unwrap();
        let mut writer = leader.writer(S0).unwrap();
        for key in 0..20 {
            put(&mut writer, &store_a, &format!("key {key}"), "shared");
        }
        catch_up(&leader, &follower);
        follower.shutdown().unwrap();
        for key in 15..30 {
            put(&mut writer, &store_a, &format!("key {key}"), "stray");
        }
        common::reach(leader.applied(S0).unwrap().unwrap(), Lsn(35), "applying the strays");
        drop(writer);
        leader.shutdown().unwrap();
        assert_eq!(value(&store_a, "key 29").as_deref(), Some("stray"));

        let leader = lead_store(net, &b, B, Some(2), &store_b);
        let mut writer = leader.writer(S0).unwrap();
        for key in 0..more {
            put(&mut writer, &store_b, &format!("new {key}"), "new");
        }
        let follower = net.node(&a).node_id(NodeId(A)).follow(&net.address, Arc::clone(&store_a) as _).unwrap();
        until("it is rebuilt", || {
            follower.log(S0).unwrap().head() == Lsn(20 + more) && !store_a.is_rebuilding(S0).unwrap()
        });
        let head = put(&mut writer, &store_b, "last", "of all");
        until("the store shows it", || value(&store_a, "last").is_some());
        follower.log(S0).unwrap().wait_synced(head, Some(deadline())).unwrap();
        for key in 0..30 {
            let key = format!("key {key}");
            assert_eq!(value(&store_a, &key), value(&store_b, &key), "{key}");
        }
        assert_eq!(value(&store_a, "key 29"), None, "nothing of the strays is left");
        assert_eq!(value(&store_a, "key 15").as_deref(), Some("shared"));
        assert_eq!(value(&store_a, "new 1").as_deref(), Some("new"));
        follower.shutdown().unwrap();
        leader.shutdown().unwrap();
        assert_same_log(&a, &b);
    }
}

/// The old leader wrote strays and died before its store had them: the log is cut, and the store stays what it is.
fn a_store_that_applied_nothing_of_it_is_kept(net: &Net) {
    let (_parent, a, b) = directories();
    let (store_a, store_b) = (store(&a), store(&b));
    let leader = lead_store(net, &a, A, None, &store_a);
    let follower = net.node(&b).node_id(NodeId(B)).follow(&net.address, Arc::clone(&store_b) as _).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    for key in 0..20 {
        put(&mut writer, &store_a, &format!("key {key}"), "shared");
    }
    catch_up(&leader, &follower);
    common::reach(leader.applied(S0).unwrap().unwrap(), Lsn(20), "applying");
    follower.shutdown().unwrap();
    drop(writer);
    leader.shutdown().unwrap();
    // Without its store the leader applies nothing.
    let leader = lead(net, &a, A, 1);
    let mut writer = leader.writer(S0).unwrap();
    append_strays(&mut writer, 15);
    drop(writer);
    leader.shutdown().unwrap();

    let leader = lead_store(net, &b, B, Some(2), &store_b);
    let mut writer = leader.writer(S0).unwrap();
    put(&mut writer, &store_b, "new", "new");
    let follower = net.node(&a).node_id(NodeId(A)).follow(&net.address, Arc::clone(&store_a) as _).unwrap();
    until("the store shows what is new", || value(&store_a, "new").is_some());
    assert_eq!(follower.rebuild_progress(S0).unwrap(), Default::default(), "nothing was rebuilt");
    assert_eq!(value(&store_a, "key 15").as_deref(), Some("shared"));
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
    assert_identical(&a, &b, &[21]);
}

/// What breaks: the power goes while the old leader's store has applied strays and not synced them. How: slots reach
/// the disk as they please, so the newest of them are there, and the header still says that nothing of them was
/// applied. What prevents harm: the store knows the newest version in its slots, and the log is not cut below that.
fn a_store_that_a_power_cut_left_ahead_of_what_it_knows_is_rebuilt(net: &Net) {
    let (_parent, a, b) = directories();
    let (store_a, store_b) = (store(&a), store(&b));
    let leader = lead_store(net, &a, A, None, &store_a);
    let follower = net.node(&b).node_id(NodeId(B)).follow(&net.address, Arc::clone(&store_b) as _).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    for key in 0..20 {
        put(&mut writer, &store_a, &format!("key {key}"), "shared");
    }
    catch_up(&leader, &follower);
    common::reach(leader.applied(S0).unwrap().unwrap(), Lsn(20), "applying");
    follower.shutdown().unwrap();
    drop(writer);
    leader.shutdown().unwrap();
    let slots = a.join("store").join("slots-0000.tfs");
    let before = std::fs::read(&slots).unwrap();
    let leader = lead_store(net, &a, A, None, &store_a);
    let mut writer = leader.writer(S0).unwrap();
    for key in 15..25 {
        put(&mut writer, &store_a, &format!("key {key}"), "stray");
    }
    common::reach(leader.applied(S0).unwrap().unwrap(), Lsn(30), "applying the strays");
    drop(writer);
    leader.shutdown().unwrap();
    drop(store_a);
    // The slots are the new ones; the header, one page, is the one from before.
    let mut left = std::fs::read(&slots).unwrap();
    left[..4096].copy_from_slice(&before[..4096]);
    std::fs::write(&slots, left).unwrap();
    std::fs::remove_file(a.join("replication.ckpt")).unwrap();
    let store_a = store(&a);
    assert_eq!(store_a.durable_applied(S0).unwrap(), Some(Lsn(20)));
    assert_eq!(store_a.touched(S0).unwrap(), Some(Lsn(30)));

    let leader = lead_store(net, &b, B, Some(2), &store_b);
    let mut writer = leader.writer(S0).unwrap();
    for key in 0..12 {
        put(&mut writer, &store_b, &format!("new {key}"), "new");
    }
    let follower = net.node(&a).node_id(NodeId(A)).follow(&net.address, Arc::clone(&store_a) as _).unwrap();
    until("the store shows what is new", || value_if_served(&store_a, "new 11").is_some());
    assert_eq!(value(&store_a, "key 15").as_deref(), Some("shared"));
    assert_eq!(value(&store_a, "key 24"), None, "nothing of the strays is left");
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
    assert_same_log(&a, &b);
}

/// A target that says of itself only what it has applied durably, as one may that knows nothing of divergence.
struct Plain(Arc<FixedStore>);

impl ReplicationTarget for Plain {
    fn durable_applied(&self, shard: ShardId) -> towline::Result<Option<Lsn>> {
        self.0.durable_applied(shard)
    }

    fn apply(&self, shard: ShardId, record: towline::wal::Record<'_>) -> towline::Result<()> {
        self.0.apply(shard, record)
    }

    fn sync(&self, shard: ShardId) -> towline::Result<()> {
        self.0.sync(shard)
    }

    fn topology(&self) -> towline::target::TargetTopology {
        self.0.topology()
    }

    fn needs_durable_log(&self) -> bool {
        true
    }

    fn is_rebuilding(&self, shard: ShardId) -> towline::Result<bool> {
        self.0.is_rebuilding(shard)
    }

    fn begin_base(
        &self,
        shard: ShardId,
        info: towline::target::BaseInfo,
    ) -> towline::Result<Box<dyn towline::target::BaseSink>> {
        self.0.begin_base(shard, info)
    }

    fn blocks_of(
        &self,
        shard: ShardId,
        record: towline::wal::Record<'_>,
        blocks: &mut Vec<towline::target::BlockId>,
    ) -> towline::Result<bool> {
        self.0.blocks_of(shard, record, blocks)
    }
}

fn a_target_that_cannot_tell_what_it_holds_is_rebuilt(net: &Net) {
    let (_parent, a, b) = directories();
    let (store_a, store_b) = (store(&a), store(&b));
    let leader = lead_store(net, &a, A, None, &store_a);
    let follower = net.node(&b).node_id(NodeId(B)).follow(&net.address, Arc::clone(&store_b) as _).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    for key in 0..20 {
        put(&mut writer, &store_a, &format!("key {key}"), "shared");
    }
    catch_up(&leader, &follower);
    common::reach(leader.applied(S0).unwrap().unwrap(), Lsn(20), "applying");
    follower.shutdown().unwrap();
    drop(writer);
    leader.shutdown().unwrap();
    let leader = lead(net, &a, A, 1);
    append_strays(&mut leader.writer(S0).unwrap(), 15);
    leader.shutdown().unwrap();

    let leader = lead_store(net, &b, B, Some(2), &store_b);
    let mut writer = leader.writer(S0).unwrap();
    put(&mut writer, &store_b, "new", "new");
    let target = Arc::new(Plain(Arc::clone(&store_a)));
    let follower = net.node(&a).node_id(NodeId(A)).follow(&net.address, target).unwrap();
    until("the store shows what is new", || value_if_served(&store_a, "new").is_some());
    assert_ne!(follower.rebuild_progress(S0).unwrap(), Default::default(), "it was rebuilt");
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
    assert_same_log(&a, &b);
}

/// Both logs hold the same records, but each of the two leaders has sealed the segment behind them, each in its own
/// way.
fn another_batch_sealing_the_same_segment_is_cut(net: &Net) {
    let (_parent, a, b) = directories();
    let (leader, _) = fail_over(net, &a, &b, &[50], &[0], 5);
    // The old leader had begun a new segment, and a crash left only the end of the one before.
    let node = a.join(shard_directory_name(S0));
    let (id, path) = list_segments(&node).unwrap().pop().unwrap();
    let report = scan_segment(&path, &mut ()).unwrap();
    assert!(!report.sealed && report.last_lsn == Lsn(50) && id.first_lsn == Lsn(1), "{report:?}");
    let at = Expected { first_lsn: Lsn(51), chain: report.chain, epoch: Epoch(1) };
    let seal = batch::build(at, report.timestamp.tick(1), Lsn(50), &[]);
    let mut bytes = std::fs::read(&path).unwrap();
    let end = usize::try_from(report.end).unwrap();
    bytes[end..end + seal.len()].copy_from_slice(&seal);
    std::fs::write(&path, bytes).unwrap();
    assert!(scan_segment(&path, &mut ()).unwrap().sealed);

    let follower = follow(net, &a, A);
    until("the log is the leader's", || follower.log(S0).unwrap().head() == Lsn(55));
    catch_up(&leader, &follower);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
    assert_identical(&a, &b, &[55]);
    assert_records(&a, S0, 55);
}

fn value_if_served(store: &FixedStore, key: &str) -> Option<Vec<u8>> {
    store.get(key.as_bytes()).ok().flatten()
}

/// As far as both reach back.
fn assert_same_log(a: &Path, b: &Path) {
    let of = |node: &Path| node.join(shard_directory_name(S0));
    assert_eq!(compare_logs(&of(a), &of(b)).unwrap().relation, Relation::Identical);
}

/// Why a follower ended for good.
fn reason_of_end(follower: &Follower) -> Error {
    until("following ends", || follower.stop_signal().is_shutdown());
    follower.wait().unwrap_err()
}

fn a_follower_that_is_ahead_under_the_same_epoch_is_refused(net: &Net) {
    let (parent, a, b) = directories();
    let old = parent.path().join("old");
    let leader = lead(net, &a, A, 1);
    append(&mut leader.writer(S0).unwrap(), 30);
    leader.shutdown().unwrap();
    copy_directory(&a, &old);
    let leader = lead(net, &a, A, 1);
    let follower = follow(net, &b, B);
    append(&mut leader.writer(S0).unwrap(), 30);
    catch_up(&leader, &follower);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();

    // The leader comes back as it was before.
    let leader = lead(net, &old, A, 1);
    append_strays(&mut leader.writer(S0).unwrap(), 10);
    let error = reason_of_end(&follow(net, &b, B));
    assert!(matches!(error, Error::Refused { code: RefusalCode::LeaderBehind, .. }), "{error}");
    assert!(error.to_string().contains("up to LSN 60, but this node only up to 40 under the same epoch"), "{error}");
    leader.shutdown().unwrap();
    assert_records(&b, S0, 60);
}

/// Two logs of one cluster that never had anything in common: neither is given up for the other.
fn logs_without_a_common_point_are_refused(net: &Net) {
    let (parent, a, b) = directories();
    let empty = parent.path().join("empty");
    lead(net, &a, A, 1).shutdown().unwrap();
    copy_directory(&a, &empty);
    let leader = lead(net, &a, A, 1);
    let follower = follow(net, &b, B);
    append(&mut leader.writer(S0).unwrap(), 30);
    catch_up(&leader, &follower);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
    // Under a newer epoch, but from nothing, and shorter than the follower.
    let leader = net.node(&empty).epoch(Epoch(5)).lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    append_strays(&mut writer, 4);
    let error = reason_of_end(&follow(net, &b, B));
    assert!(matches!(error, Error::Refused { code: RefusalCode::Diverged, .. }), "{error}");
    assert!(error.to_string().contains("nothing is overwritten"), "{error}");
    drop(writer);
    leader.shutdown().unwrap();
    assert_records(&b, S0, 30);
}

/// What breaks: the node dies between two steps of the cut. How: its directory is put into each of the states that the
/// steps leave. What prevents harm: each is a beginning of the old log, which is shown to the leader and cut again.
fn an_interrupted_cut_is_finished(net: &Net) {
    let (parent, a, b) = directories();
    let (leader, _) = fail_over(net, &a, &b, &[700], &[1500], 100);
    let shard = |node: &Path| node.join(shard_directory_name(S0));
    let segments = |node: &Path| {
        let mut names: Vec<_> = shard(node).read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
        names.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with('r'));
        names.sort();
        names
    };
    let count = segments(&a).len();
    assert!(count > 6, "{count}");
    // Up to the segment in which they part, 700 records in.
    for removed in 0..count - 4 {
        let node = parent.path().join(format!("crashed-{removed}"));
        copy_directory(&a, &node);
        // The checkpoint comes first; then segments go, the newest first; a copy of a part may be lying about.
        std::fs::remove_file(node.join("replication.ckpt")).unwrap();
        for path in segments(&node).iter().rev().take(removed) {
            std::fs::remove_file(path).unwrap();
        }
        let half = std::fs::read(&segments(&node)[0]).unwrap();
        let cut = if removed % 2 == 0 { half.len() } else { half.len() / 2 };
        std::fs::write(shard(&node).join("spare-0.wal.tmp"), &half[..cut]).unwrap();
        let follower = follow(net, &node, A);
        until("the log is the leader's", || follower.log(S0).unwrap().head() == Lsn(800));
        catch_up(&leader, &follower);
        follower.shutdown().unwrap();
        assert_records(&node, S0, 800);
        let relation = common::compare(&node, &b, S0).relation;
        assert!(matches!(relation, Relation::Identical), "{removed} removed: {relation:?}");
    }
    leader.shutdown().unwrap();
}

/// A follower that is cut has acknowledged nothing of what the leader has at the LSNs of its strays.
fn a_cut_follower_counts_only_for_what_it_has(net: &Net) {
    let (_parent, a, b) = directories();
    let (leader, mut writers) = fail_over(net, &a, &b, &[50], &[500], 0);
    let follower = follow(net, &a, A);
    until("it is cut", || follower.log(S0).unwrap().head() == Lsn(50));
    until("it is connected", || leader.status().shards[0].followers.iter().any(|follower| follower.connected));
    let durable: Commit = "durable:1".parse().unwrap();
    follower.shutdown().unwrap();
    let head = append(&mut writers[0], 5);
    let waited = leader.wait(S0, head, durable, Some(std::time::Instant::now())).unwrap();
    assert_eq!(waited, Outcome::TimedOut, "nobody has it");
    let follower = follow(net, &a, A);
    assert_eq!(leader.wait(S0, head, durable, Some(deadline())).unwrap(), Outcome::Committed);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
    assert_identical(&a, &b, &[55]);
}

fn an_epoch_has_one_leader(net: &Net) {
    let (_parent, a, b) = directories();
    let leader = lead(net, &a, A, 1);
    let follower = follow(net, &b, B);
    append(&mut leader.writer(S0).unwrap(), 10);
    catch_up(&leader, &follower);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
    // Who has followed needs an epoch of its own, and is told which.
    for asked in [None, Some(1)] {
        let builder = net.node(&b);
        let builder = asked.map_or(builder.clone(), |epoch| builder.epoch(Epoch(epoch)));
        let error = builder.lead(&net.address).unwrap_err().to_string();
        assert!(error.contains("epoch 1 is another leader's") && error.contains("(--epoch 2)"), "{error}");
        assert!(error.contains(b.to_str().unwrap()), "{error}");
    }
    // Who has led goes on under its own.
    let leader = lead(net, &a, A, 1);
    assert_eq!(leader.manifest().epoch, Epoch(1));
    leader.shutdown().unwrap();
    let leader = net.node(&b).epoch(Epoch(2)).lead(&net.address).unwrap();
    leader.shutdown().unwrap();
    let leader = net.node(&b).lead(&net.address).unwrap();
    assert_eq!(leader.manifest().epoch, Epoch(2), "now it is its own");
    // The other one follows, and must not lead again under either.
    let follower = follow(net, &a, A);
    catch_up(&leader, &follower);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
    let error = net.node(&a).lead(&net.address).unwrap_err().to_string();
    assert!(error.contains("epoch 2 is another leader's") && error.contains("(--epoch 3)"), "{error}");
    let error = net.node(&a).epoch(Epoch(1)).lead(&net.address).unwrap_err();
    assert!(matches!(error, Error::StaleEpoch { offered: Epoch(1), accepted: Epoch(2) }), "{error}");
}

fn two_leaders_under_one_epoch_do_not_follow_each_other(net: &Net) {
    let (_parent, a, b) = directories();
    fail_over(net, &a, &b, &[20], &[0], 0).0.shutdown().unwrap();
    let leader = net.node(&a).epoch(Epoch(2)).lead(&net.address).unwrap();
    append_strays(&mut leader.writer(S0).unwrap(), 9);
    let error = reason_of_end(&follow(net, &b, B));
    assert!(error.to_string().contains("has itself led under epoch 2"), "{error}");
    leader.shutdown().unwrap();
    assert_records(&b, S0, 20);
    // The same where both have written under it: there is no telling which is right.
    let leader = net.node(&b).lead(&net.address).unwrap();
    append(&mut leader.writer(S0).unwrap(), 4);
    leader.shutdown().unwrap();
    let leader = net.node(&a).lead(&net.address).unwrap();
    let error = reason_of_end(&follow(net, &b, B));
    assert!(matches!(error, Error::Refused { code: RefusalCode::Diverged, .. }), "{error}");
    leader.shutdown().unwrap();
    assert_records(&b, S0, 24);
}

/// A follower by hand, with a log that is not the leader's and some answer to where they part.
fn a_follower_that_names_a_wrong_point_gains_nothing(net: &Net) {
    let (_parent, a, b) = directories();
    let (leader, _writers) = fail_over(net, &a, &b, &[50], &[0], 30);
    let log = leader.log(S0).unwrap();
    let place = log.position_before(Lsn(51)).unwrap();
    let request = SyncRequest {
        epoch: Epoch(1),
        received: Lsn(60),
        durable: Lsn(60),
        applied: Lsn(0),
        chain: Chain(1),
        ..follow_request(&leader.manifest(), A, S0)
    };
    let both = CommonPoint::FOUND | CommonPoint::CUT_POSSIBLE;
    let said = |lsn, chain, flags| CommonPoint { tail_epoch: Epoch(1), lsn: Lsn(lsn), chain, flags };
    let ask = |parting: Message| ask_parting(&mut net.connect(), request, parting);
    let refused = |parting: Message| match ask(parting) {
        Err(Error::Refused { code, reason, .. }) => (code, reason),
        other => panic!("not refused: {other:?}"),
    };
    for wrong in [
        nothing_shared(&request),
        said(50, place.chain, 0),
        said(50, Chain(place.chain.get() ^ 1), both),
        said(49, place.chain, both),
        said(70, place.chain, both),
        said(u64::MAX, place.chain, both),
    ] {
        let (code, reason) = refused(wrong.into());
        assert_eq!(code, RefusalCode::Diverged, "{wrong:?}: {reason}");
        assert!(reason.contains("no point is known"), "{reason}");
    }
    // Under the epoch of the leader it has what that one should have.
    let same_epoch = CommonPoint { tail_epoch: Epoch(2), ..said(50, place.chain, both) };
    assert_eq!(refused(same_epoch.into()).0, RefusalCode::Diverged);
    // Of a newer one, the leader is deposed; something else than an answer is none.
    let newer = CommonPoint { tail_epoch: Epoch(3), ..said(50, place.chain, both) };
    assert_eq!(refused(newer.into()).0, RefusalCode::StaleEpoch);
    let (code, reason) = refused(Sync { lsn: Lsn(1) }.into());
    assert_eq!(code, RefusalCode::ProtocolViolation, "{reason}");
    // This leader keeps no state: where the point is right but the cut not possible, there is nothing to rebuild from.
    assert_eq!(refused(said(50, place.chain, CommonPoint::FOUND).into()).0, RefusalCode::NotRetained);
    let info = ask(said(50, place.chain, both).into()).unwrap();
    assert_eq!((info.session_kind, info.start), (SessionKind::CatchUp, Lsn(51)));
    assert_eq!((info.start_segment, info.start_offset), (place.segment, place.offset));
    leader.shutdown().unwrap();
}

/// It would not know what it is given, and is asked nothing, so it loses nothing; whatever epoch it has accepted.
fn a_diverged_follower_of_an_older_version_is_refused(net: &Net) {
    let (_parent, a, b) = directories();
    let (leader, _writers) = fail_over(net, &a, &b, &[50], &[0], 30);
    for (max, epoch, received) in [(1, 1, 60), (2, 2, 60), (1, 1, 90), (2, 2, 90)] {
        let request = SyncRequest {
            versions: VersionRange { min: 1, max },
            epoch: Epoch(epoch),
            received: Lsn(received),
            durable: Lsn(received),
            applied: Lsn(0),
            chain: Chain(1),
            ..follow_request(&leader.manifest(), A, S0)
        };
        let mut connection = net.connect();
        connection.sender.send_message(&request.into()).unwrap();
        let Message::Error(refusal) = connection.receiver.receive_message().unwrap() else { panic!("not refused") };
        assert_eq!(refusal.code, RefusalCode::UnsupportedVersion, "{}", refusal.text);
        assert!(refusal.text.contains("update that side first"), "{}", refusal.text);
    }
    leader.shutdown().unwrap();
}

/// A leader by hand that would have records cut: without asking where the logs part, at another point than was named,
/// or under an epoch that is not newer.
/// What a leader with this head answers a follower whose log is to go on at a place.
fn catch_up_from(manifest: &Manifest, epoch: Epoch, head: Lsn, place: LogPosition) -> ShardInfo {
    ShardInfo {
        version: 2,
        cluster: manifest.cluster,
        node: manifest.node,
        region: manifest.region,
        shard: S0,
        shard_count: 1,
        segment_size: manifest.segment_size,
        epoch,
        tail: Lsn(1),
        head,
        session: SessionId(1),
        session_kind: SessionKind::CatchUp,
        start: place.lsn.next(),
        target: head,
        start_segment: place.segment,
        start_offset: place.offset,
        heartbeat_ms: 1000,
        timeout_ms: 5000,
        key_len: 0,
        value_len: 0,
        prefix_bits: 0,
    }
}

fn a_follower_tells_how_far_the_leader_of_now_is(net: &Net) {
    let (_parent, a, b) = directories();
    let leader = lead(net, &a, A, 1);
    let follower = follow(net, &b, B);
    append(&mut leader.writer(S0).unwrap(), 40);
    catch_up(&leader, &follower);
    let (manifest, end) = (leader.manifest(), leader.log(S0).unwrap().position_before(Lsn(41)).unwrap());
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();

    let listener = net.transport.listen(&net.address).unwrap();
    let follower = net.node(&b).node_id(NodeId(B)).follow(&net.address, Arc::new(LogOnly)).unwrap();
    // The first is lost with what it alone had, before it has sent any of that.
    for (epoch, head) in [(1, Lsn(99)), (2, Lsn(40)), (2, Lsn(70))] {
        let mut connection = listener.accept().unwrap();
        connection.receiver.set_timeout(Some(common::PATIENCE)).unwrap();
        assert!(matches!(connection.receiver.receive_message().unwrap(), Message::SyncRequest(_)));
        let info = catch_up_from(&manifest, Epoch(epoch), head, end);
        connection.sender.send_message(&info.into()).unwrap();
        let following = || follower.status().shards[0].following.clone().unwrap();
        until("the stream stands", || following().connected);
        assert_eq!(following().leader_head, head);
        connection.closer.close();
    }
}

/// Applies nothing while its gate is shut.
struct Gated {
    inner: Arc<Checked>,
    gate: Mutex<()>,
}

impl ReplicationTarget for Gated {
    fn durable_applied(&self, shard: ShardId) -> towline::Result<Option<Lsn>> {
        self.inner.durable_applied(shard)
    }

    fn apply(&self, shard: ShardId, record: Record<'_>) -> towline::Result<()> {
        let _open = self.gate.lock();
        self.inner.apply(shard, record)
    }

    fn sync(&self, shard: ShardId) -> towline::Result<()> {
        self.inner.sync(shard)
    }
}

/// A log that outgrows its bound leaves a follower behind whose log has what its target is still to apply. By the time
/// that its rebuild begins, that has been applied, and is more than the base has.
fn a_follower_that_went_on_applying_before_its_rebuild_asks_again(net: &Net) {
    let (_parent, a, b) = directories();
    let leader = lead(net, &a, A, 1);
    let target = Arc::new(Gated { inner: Checked::new(1), gate: Mutex::new(()) });
    let shut = target.gate.lock();
    let follow = || net.node(&b).node_id(NodeId(B)).follow(&net.address, Arc::clone(&target) as _).unwrap();
    let follower = follow();
    append(&mut leader.writer(S0).unwrap(), 40);
    common::reach(follower.log(S0).unwrap().written(), Lsn(40), "receiving");
    let (manifest, end) = (leader.manifest(), leader.log(S0).unwrap().position_before(Lsn(41)).unwrap());
    leader.shutdown().unwrap();

    let listener: Arc<dyn Listener> = Arc::from(net.transport.listen(&net.address).unwrap());
    let closing = Arc::clone(&listener);
    let _nobody_is_waited_for = follower.stop_signal().on_shutdown(move || closing.close());
    let accept = || {
        let mut connection = listener.accept().unwrap();
        connection.receiver.set_timeout(Some(common::PATIENCE)).unwrap();
        let Message::SyncRequest(request) = connection.receiver.receive_message().unwrap() else {
            panic!("no request")
        };
        assert_eq!(request.received, Lsn(40));
        (connection, request.applied)
    };
    let rebuild = |connection: &mut Connection, target: Lsn| {
        let info = catch_up_from(&manifest, Epoch(1), Lsn(50), end);
        let info = ShardInfo { session_kind: SessionKind::Rebuild, start: Lsn::ZERO, target, ..info };
        connection.sender.send_message(&info.into()).unwrap();
        let start = SessionControl {
            session: info.session,
            epoch: info.epoch,
            action: SessionAction::Start,
            kind: SessionKind::Rebuild,
            base_lsn: Lsn(20),
            target: info.target,
            log_start: Lsn(1),
            block_len: 0,
            block_count: 0,
        };
        connection.sender.send_message(&start.into()).unwrap();
        common::raw::read_to_end(connection);
    };
    let (mut connection, applied) = accept();
    assert_eq!(applied, Lsn::ZERO);
    drop(shut);
    common::reach(follower.applied(S0).unwrap(), Lsn(40), "applying");
    rebuild(&mut connection, Lsn(50));
    // Told of all that is here, a leader whose base has less cannot have it replaced. Where its log has more, a later
    // base will have it.
    let (mut connection, applied) = accept();
    assert_eq!(applied, Lsn(40));
    rebuild(&mut connection, Lsn(50));
    let (mut connection, _) = accept();
    rebuild(&mut connection, Lsn(30));
    until("it has ended", || follower.stop_signal().is_shutdown());
    let ended = follower.wait();
    assert!(matches!(ended, Err(Error::Invalid { .. })), "{ended:?}");
    // Whoever asks again is told again.
    assert!(matches!(follower.shutdown(), Err(Error::Invalid { .. })));
    assert_records(&b, S0, 40);
}

fn a_leader_cannot_have_cut_what_was_not_agreed_on(net: &Net) {
    let (_parent, a, b) = directories();
    let leader = lead(net, &a, A, 1);
    let follower = follow(net, &b, B);
    append(&mut leader.writer(S0).unwrap(), 40);
    catch_up(&leader, &follower);
    let manifest = leader.manifest();
    let log = leader.log(S0).unwrap();
    let places: Vec<_> = [10u64, 20].map(|lsn| log.position_before(Lsn(lsn + 1)).unwrap()).into();
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();

    let listener = net.transport.listen(&net.address).unwrap();
    let follower = net.node(&b).node_id(NodeId(B)).follow(&net.address, Arc::new(LogOnly)).unwrap();
    for (epoch, history, cut) in [(1, Some(0), 0), (2, None, 0), (2, Some(1), 0), (2, Some(0), 1)] {
        let mut connection = listener.accept().unwrap();
        connection.receiver.set_timeout(Some(common::PATIENCE)).unwrap();
        assert!(matches!(connection.receiver.receive_message().unwrap(), Message::SyncRequest(_)));
        if let Some(point) = history {
            let end = EpochEnd { epoch: Epoch(1), lsn: places[point].lsn, chain: places[point].chain };
            let history = EpochHistory::new(2, vec![end]);
            connection.sender.send_message(&history.into()).unwrap();
            let Message::CommonPoint(common) = connection.receiver.receive_message().unwrap() else {
                panic!("no answer")
            };
            assert_eq!((common.lsn, common.chain), (places[point].lsn, places[point].chain));
            assert_eq!((common.tail_epoch, common.flags), (Epoch(1), 3));
        }
        let info = catch_up_from(&manifest, Epoch(epoch), Lsn(99), places[cut]);
        connection.sender.send_message(&info.into()).unwrap();
        common::raw::read_to_end(&mut connection);
    }
    drop(follower);
    assert_records(&b, S0, 40);
}
