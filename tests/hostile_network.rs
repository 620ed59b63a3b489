//! Whole processes on a network that delays, stalls, cuts, doubles and falsifies, while some of them are killed: what
//! was acknowledged is there at the end, applied once, and the logs are identical.
//!
//! Any bit of a stream is falsified, in either direction: a checksum covers every one, and nobody ends by it.
//!
//! Where bodies are received without a look at their checksum, both tests of falsified streams fail within a few
//! connections: a mark that has grown by one bit has a follower told, for good, that the leader has lost data, and an
//! epoch deposes the leader. Where the checksum leaves out the prefixes of raw bytes, they pass: the log takes bytes
//! only at the place that is due, and a store's blocks name their place. That fault is found by
//! `every_flipped_bit_that_the_frame_covers_ends_the_stream` of the transports, and by the kept cases of the decoders.
#![cfg(all(unix, feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use common::net::free_port;
use common::process::{Beside, arg, outcome, run};
use common::proxy::{Direction, Fate, Proxy};
use common::random::Random;
use common::roles::{self, Acknowledged, Role, SHARDS, assert_applied_once};
use common::{SEGMENT, readable_records_of, shards, until};
use towline::target::{FixedStore, FixedStoreOptions, LogOnly};
use towline::{Lsn, Node, NodeId, ShardId};

/// How many times something is killed, or left to the weather.
const ROUNDS: &str = "TOWLINE_HOSTILE_ROUNDS";
/// How long the soak runs.
#[cfg(target_os = "linux")]
const SOAK: &str = "TOWLINE_SOAK_SECONDS";
const FOLLOWERS: u64 = 2;

/// Does nothing unless a test below has started this binary again to be a leader or a follower.
#[test]
fn role() {
    roles::play();
}

/// A leader, and followers that reach it through a proxy each.
struct Cluster {
    parent: tempfile::TempDir,
    address: String,
    proxies: Vec<Proxy>,
    leader: Option<Beside>,
    followers: Vec<Option<Beside>>,
    max_wal_bytes: Option<u64>,
}

impl Cluster {
    fn start(random: &mut Random, max_wal_bytes: Option<u64>) -> Cluster {
        let address = format!("127.0.0.1:{}", free_port());
        let proxies = (0..FOLLOWERS).map(|_| Proxy::start(&address, random.split())).collect();
        let followers = (0..FOLLOWERS).map(|_| None).collect();
        let parent = tempfile::tempdir().unwrap();
        let mut cluster = Cluster { parent, address, proxies, leader: None, followers, max_wal_bytes };
        cluster.start_leader();
        (0..FOLLOWERS).for_each(|node| cluster.start_follower(node));
        cluster
    }

    fn leader_dir(&self) -> PathBuf {
        self.parent.path().join("leader")
    }

    fn follower_dir(&self, node: u64) -> PathBuf {
        self.parent.path().join(format!("follower-{node}"))
    }

    fn start_leader(&mut self) {
        let directory = self.leader_dir();
        let (address, max_wal_bytes) = (self.address.as_str(), self.max_wal_bytes);
        let role = Role { role: "leader", directory: &directory, address, node: 0, max_wal_bytes };
        self.leader = Some(role.start());
    }

    fn start_follower(&mut self, node: u64) {
        let index = usize::try_from(node).unwrap();
        let directory = self.follower_dir(node);
        let (address, max_wal_bytes) = (self.proxies[index].address.as_str(), self.max_wal_bytes);
        let role = Role { role: "follower", directory: &directory, address, node: 1 + node, max_wal_bytes };
        self.followers[index] = Some(role.start());
    }

    fn leader(&self) -> &Beside {
        self.leader.as_ref().unwrap()
    }

    /// Kills the leader and takes what it has still said.
    fn kill_leader(&mut self, acknowledged: &mut Acknowledged) {
        let mut process = self.leader.take().unwrap();
        assert_runs(&mut process, "the leader");
        for line in process.kill() {
            acknowledged.take(&line);
        }
    }

    fn kill_follower(&mut self, node: u64) {
        let mut process = self.followers[usize::try_from(node).unwrap()].take().unwrap();
        assert_runs(&mut process, "a follower");
        process.kill();
    }

    /// Ends the bad weather and the writing, waits until every follower has everything, and stops it all in order.
    fn settle(&mut self) -> Vec<u64> {
        (0..FOLLOWERS).for_each(|node| self.kill_follower(node));
        let leader = Node::builder(self.leader_dir()).lead(&self.address).unwrap();
        for (proxy, node) in self.proxies.iter().zip(0..) {
            proxy.set_calm(true);
            roles::catch_up_with(&leader, &self.follower_dir(node), &proxy.address, 1 + node);
        }
        let heads = shards(SHARDS).map(|shard| leader.log(shard).unwrap().head().get()).collect();
        leader.shutdown().unwrap();
        heads
    }

    /// `towline verify` of all nodes.
    fn assert_identical(&self) {
        let directories: Vec<_> = (0..FOLLOWERS).map(|node| self.follower_dir(node)).collect();
        let leader_dir = self.leader_dir();
        let mut arguments = vec!["verify", arg(&leader_dir)];
        arguments.extend(directories.iter().map(|directory| arg(directory)));
        let (code, out, err) = outcome(&run(&arguments));
        assert_eq!(code, 0, "{out}{err}");
        let due = usize::from(SHARDS) * directories.len();
        assert_eq!(out.matches(": identical, LSN 1 to ").count(), due, "{out}");
    }
}

/// No weather ends a node for good: neither a leader that is deposed nor a follower that is refused for ever.
fn assert_runs(process: &mut Beside, who: &str) {
    assert!(!process.has_ended(), "{who} ended by itself: {:#?}", process.rest_of_errors());
}

#[test]
fn what_was_acknowledged_survives_a_bad_network_and_kills() {
    let mut random = Random::new();
    let rounds: u64 = std::env::var(ROUNDS).map_or(8, |rounds| rounds.parse().expect("a number of rounds"));
    let mut acknowledged = Acknowledged::default();
    let mut cluster = Cluster::start(&mut random, None);
    for _ in 0..rounds {
        acknowledged.take_some(cluster.leader(), 1 + random.below(60));
        random.moment();
        match random.below(4) {
            0 => {
                cluster.kill_leader(&mut acknowledged);
                acknowledged.assert_in(&cluster.leader_dir());
                cluster.start_leader();
            }
            1 => {
                let node = random.below(FOLLOWERS);
                cluster.kill_follower(node);
                cluster.start_follower(node);
            }
            2 => {
                // What was acknowledged is durable at one of the followers at least.
                cluster.kill_leader(&mut acknowledged);
                (0..FOLLOWERS).for_each(|node| cluster.kill_follower(node));
                assert_each_held(&acknowledged, &[cluster.follower_dir(0), cluster.follower_dir(1)]);
                cluster.start_leader();
                (0..FOLLOWERS).for_each(|node| cluster.start_follower(node));
            }
            _ => cluster.proxies[random.index(2)].cut(),
        }
    }
    cluster.kill_leader(&mut acknowledged);
    assert!(acknowledged.0.len() == usize::from(SHARDS), "{:?}", acknowledged.0);
    let heads = cluster.settle();
    cluster.assert_identical();
    acknowledged.assert_in(&cluster.leader_dir());
    for node in 0..FOLLOWERS {
        acknowledged.assert_in(&cluster.follower_dir(node));
        assert_applied_once(&cluster.follower_dir(node), &heads);
    }
    let fates: Vec<_> = cluster.proxies.iter().map(Proxy::fates).collect();
    println!(
        "acknowledged up to {:?}; connections calm, slow, cut, stalled, falsified, doubled: {fates:?}",
        acknowledged.0
    );
}

/// One bit of each connection, along the first exchange, the first blocks and the log behind them, and along what the
/// follower answers: every time the stream ends, the follower comes back, and in the end its store is the leader's.
#[test]
fn a_rebuild_whose_every_stream_is_falsified_ends_right() {
    let parent = tempfile::tempdir().unwrap();
    let options = FixedStoreOptions { key_len: 16, value_len: 100, shard_count: 1, prefix_bits: 0 };
    let open = |name: &str| Arc::new(FixedStore::open(parent.path().join(name), &options).unwrap());
    let (store, rebuilt) = (open("leader-store"), open("follower-store"));
    let builder = Node::builder(parent.path().join("leader")).segment_size(SEGMENT).target(store.clone());
    let leader = builder.drain_timeout(Duration::from_millis(200)).lead("127.0.0.1:0").unwrap();
    let mut writer = leader.writer(ShardId(0)).unwrap();
    for key in 0..1500_u64 {
        store.propose_put(&key.to_be_bytes(), &[b'a'; 90], |_, record| writer.append(record)).unwrap();
    }
    let log = leader.log(ShardId(0)).unwrap();
    let head = log.head();
    until("the leader has applied everything", || leader.applied(ShardId(0)).unwrap().unwrap().load() >= head);
    log.wait_synced(head, Some(common::deadline())).unwrap();
    log.release_through(head, "the test says so").unwrap();
    assert!(log.tail() > Lsn(1));

    let mut random = Random::new();
    let proxy = Proxy::start(leader.local_address(), random.split());
    proxy.set_calm(true);
    let builder = common::quick(Node::builder(parent.path().join("follower"))).node_id(NodeId(1));
    let mut flip = |byte: u64, direction| Fate::Flip(byte * 8 + random.below(8), direction);
    let mut flips: Vec<_> = (0..300).step_by(2).map(|byte| flip(byte, Direction::FromLeader)).collect();
    flips.extend((300..150_000).step_by(5000).map(|byte| flip(byte, Direction::FromLeader)));
    flips.extend((0..150).step_by(3).map(|byte| flip(byte, Direction::ToLeader)));
    // The first connection asks for the topology, and whoever starts a follower is told if that fails.
    proxy.plan([Fate::Calm].into_iter().chain(flips));
    let follower = builder.follow(&proxy.address, rebuilt.clone()).unwrap();
    // A stream that has passed its flip, or is not as long, goes on: it is cut.
    until("every falsified stream has been tried", || {
        std::thread::sleep(Duration::from_millis(100));
        proxy.cut();
        proxy.planned() == 0
    });
    common::catch_up(&leader, &follower);
    let entries = |store: &FixedStore| {
        let mut entries = Vec::new();
        let each = |entry: towline::target::Entry<'_>| {
            entries.push((entry.slot, entry.lsn, entry.key.to_vec(), entry.value.to_vec()));
            std::ops::ControlFlow::Continue(())
        };
        store.scan(each).unwrap();
        entries
    };
    assert!(entries(&store) == entries(&rebuilt), "the stores differ");
    drop(writer);
    follower.shutdown().unwrap();
    leader.shutdown().unwrap();
}

/// Each acknowledged record is in the log of one follower at least.
fn assert_each_held(acknowledged: &Acknowledged, followers: &[PathBuf]) {
    for (&shard, &lsn) in &acknowledged.0 {
        let newest = |node: &PathBuf| {
            let is_there = node.join(towline::types::shard_directory_name(ShardId(shard))).is_dir();
            if !is_there {
                return 0;
            }
            let (records, report) = readable_records_of(node, ShardId(shard));
            assert!(report.is_sound(), "{:?}", report.problems);
            records.last_key_value().map_or(0, |(&lsn, _)| lsn)
        };
        let held: Vec<_> = followers.iter().map(newest).collect();
        assert!(
            held.iter().any(|&head| head >= lsn),
            "LSN {lsn} of shard {shard} was acknowledged; followers: {held:?}"
        );
    }
}

/// A file system of its own with little room, as long as this lives.
struct SmallFileSystem(tempfile::TempDir);

impl SmallFileSystem {
    /// None, and the reason on standard output, where the system does not let the test mount one.
    fn mount(kib: u64) -> Option<SmallFileSystem> {
        if !cfg!(target_os = "linux") {
            println!("skipped: only known how to be done on Linux");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let size = format!("size={kib}k");
        match Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs", arg(directory.path())]).output() {
            Ok(output) if output.status.success() => Some(SmallFileSystem(directory)),
            Ok(output) => {
                println!("skipped: no mount: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                println!("skipped: no mount: {error}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn resize(&self, kib: u64) {
        let size = format!("remount,size={kib}k");
        assert!(Command::new("mount").args(["-o", &size, arg(self.path())]).status().unwrap().success());
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", arg(self.path())]).status();
    }
}

#[test]
fn a_full_disk_of_the_leader_is_an_error_and_loses_nothing() {
    let Some(small) = SmallFileSystem::mount(1024) else { return };
    let directory = small.path().join("leader");
    let leader = Node::builder(&directory).segment_size(SEGMENT).lead("127.0.0.1:0").unwrap();
    let mut writer = leader.writer(ShardId(0)).unwrap();
    let error = loop {
        let head = writer.end().head.next();
        match writer.append(&common::record(ShardId(0), head)) {
            Ok(lsn) => assert_eq!(lsn, head),
            Err(error) => break error,
        }
        assert!(head < Lsn(20_000), "the disk does not fill up");
    };
    assert!(error.to_string().contains("spare"), "{error}");
    let head = writer.end().head;
    leader.log(ShardId(0)).unwrap().wait_synced(head, Some(common::deadline())).unwrap();

    small.resize(16 * 1024);
    let last = common::append(&mut writer, 1000);
    assert_eq!(last.get(), head.get() + 1000);
    drop(writer);
    leader.shutdown().unwrap();
    assert_eq!(common::records_of(&directory, ShardId(0)).len() as u64, last.get());
}

#[test]
fn a_full_disk_of_a_follower_holds_up_nobody_else_and_mends() {
    let Some(small) = SmallFileSystem::mount(1024) else { return };
    let parent = tempfile::tempdir().unwrap();
    let (leader_dir, follower_dir) = (parent.path().join("leader"), small.path().join("follower"));
    let leader = Node::builder(&leader_dir).segment_size(SEGMENT).lead("127.0.0.1:0").unwrap();
    let follow = || {
        let builder = common::quick(Node::builder(&follower_dir)).node_id(NodeId(1));
        builder.follow(leader.local_address(), Arc::new(LogOnly)).unwrap()
    };
    let follower = follow();
    let mut writer = leader.writer(ShardId(0)).unwrap();
    let head = common::append(&mut writer, 10_000);
    leader.log(ShardId(0)).unwrap().wait_synced(head, Some(common::deadline())).unwrap();
    until("the follower's disk is full", || {
        let log = follower.log(ShardId(0)).unwrap();
        log.head() > Lsn(1000) && log.retained_bytes() > 700 * 1024
    });
    assert!(follower.log(ShardId(0)).unwrap().head() < head);

    small.resize(64 * 1024);
    common::catch_up(&leader, &follower);
    drop(writer);
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    common::assert_identical(&leader_dir, &follower_dir, &[head.get()]);
}

/// What breaks: the disk is full when a store is to grow. What would be lost: the room that is left, for whatever else
/// is on that disk, and the growing is a failure all the same.
#[test]
fn a_store_that_cannot_grow_keeps_no_room_from_others() {
    let Some(small) = SmallFileSystem::mount(3 * 1024 + 512) else { return };
    let store = FixedStore::open(small.path().join("store"), &FixedStoreOptions::default()).unwrap();
    let mut lsn = Lsn::ZERO;
    let mut put = || {
        store.put(&lsn.get().to_le_bytes(), &[7; 200], |_, _| {
            lsn = lsn.next();
            Ok(lsn)
        })
    };
    // By a mebibyte at a time.
    let error = loop {
        if let Err(error) = put() {
            break error;
        }
    };
    assert!(error.is_out_of_space(), "{error}");
    let beside = small.path().join("beside");
    std::fs::write(&beside, vec![1; 400 * 1024]).unwrap();
    std::fs::remove_file(beside).unwrap();
    small.resize(64 * 1024);
    assert!((0..10_000).all(|_| put().is_ok()), "there is room now");
    store.close().unwrap();
}

/// Resident memory that is not a mapped file, in KiB, and open descriptors.
#[cfg(target_os = "linux")]
fn usage(process: &Beside) -> Option<(u64, u64)> {
    let home = PathBuf::from(format!("/proc/{}", process.id()));
    let status = std::fs::read_to_string(home.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    let memory = line.split_whitespace().next()?.parse().ok()?;
    Some((memory, home.join("fd").read_dir().ok()?.count() as u64))
}

/// Off unless asked for. Bad weather all the time, a bounded log, and nobody is killed: the same processes at the end
/// as at the beginning, which hold no more than after the first quarter.
#[test]
#[cfg(target_os = "linux")]
fn memory_and_descriptors_stay_flat() {
    use std::collections::BTreeMap;
    use std::time::Instant;
    let Ok(seconds) = std::env::var(SOAK) else {
        println!("skipped: {SOAK} says for how long");
        return;
    };
    let seconds = Duration::from_secs(seconds.parse().expect("seconds"));
    let mut random = Random::new();
    let mut acknowledged = Acknowledged::default();
    let cluster = Cluster::start(&mut random, Some(8 << 20));
    let started = Instant::now();
    // The most that each process held, in the quarter that is to warm up and after it.
    let mut most: BTreeMap<(&str, bool), (u64, u64)> = BTreeMap::new();
    let mut says = 0;
    while started.elapsed() < seconds {
        std::thread::sleep(Duration::from_millis(200));
        for line in cluster.leader().lines_so_far() {
            acknowledged.take(&line);
        }
        let is_warm = started.elapsed() > seconds / 4;
        let names = ["leader", "first follower", "second follower"];
        for (name, process) in names.iter().zip(cluster.leader.iter().chain(cluster.followers.iter().flatten())) {
            let (memory, descriptors) = usage(process).expect("the process runs");
            let most = most.entry((name, is_warm)).or_default();
            *most = (most.0.max(memory), most.1.max(descriptors));
        }
        if started.elapsed().as_secs() / 60 > says {
            says += 1;
            println!("after {says} minutes: {most:?}, acknowledged up to {:?}", acknowledged.0);
        }
    }
    println!("acknowledged up to {:?}; most KiB and descriptors by process, warm or not: {most:?}", acknowledged.0);
    assert!(acknowledged.0.values().all(|&lsn| lsn > 100), "{:?}", acknowledged.0);
    for (&(name, _), &(memory, descriptors)) in most.iter().filter(|((_, is_warm), _)| *is_warm) {
        let before = most[&(name, false)];
        assert!(memory <= before.0 + before.0 / 4 + 4096, "{name}: {memory} KiB after {} KiB", before.0);
        assert!(descriptors <= before.1 + 16, "{name}: {descriptors} descriptors after {}", before.1);
    }
}
