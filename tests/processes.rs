//! Whole processes that are killed without warning: what was acknowledged is there when they come back.
#![cfg(all(unix, feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::net::free_port;
use common::process::{Beside, arg, follower, leader_with_input, outcome, run};
use common::{readable_records_of, record, shards, until};
use towline::tail::ask_status;
use towline::target::LogOnly;
use towline::transport::TcpTransport;
use towline::{Lsn, Node, NodeId, ShardId};

/// Tells the test binary, started again by a test, which role to play.
const ROLE: &str = "TOWLINE_TEST_ROLE";
const DIRECTORY: &str = "TOWLINE_TEST_DIRECTORY";
const ADDRESS: &str = "TOWLINE_TEST_ADDRESS";
/// How many times the tests kill something.
const ROUNDS: &str = "TOWLINE_KILL_ROUNDS";

const SHARDS: u16 = 2;

fn rounds() -> u64 {
    std::env::var(ROUNDS).map_or(10, |rounds| rounds.parse().expect("a number of rounds"))
}

/// Does nothing unless a test below has started this binary again to be a leader or a follower.
#[test]
fn role() {
    let of = |name| std::env::var(name).unwrap();
    match std::env::var(ROLE).as_deref() {
        Ok("leader") => lead(Path::new(&of(DIRECTORY)), &of(ADDRESS)),
        Ok("follower") => follow(Path::new(&of(DIRECTORY)), &of(ADDRESS)),
        _ => {}
    }
}

/// A leader whose every shard appends, waits until a follower has it durably, and says so, until it is killed.
fn lead(directory: &Path, address: &str) {
    let leader = Node::builder(directory).shards(SHARDS).segment_size(256 * 1024).lead(address).unwrap();
    std::thread::scope(|scope| {
        for mut writer in common::writers(&leader) {
            let leader = &leader;
            scope.spawn(move || {
                let shard = writer.log().shard();
                for round in 0.. {
                    let lsn = common::append(&mut writer, 1 + round % 7);
                    let outcome = leader.wait(shard, lsn, "durable:1".parse().unwrap(), None).unwrap();
                    assert!(outcome.is_committed(), "{outcome:?}");
                    println!("acknowledged {shard} {lsn}");
                }
            });
        }
    });
}

fn follow(directory: &Path, address: &str) {
    let builder = common::quick(Node::builder(directory)).node_id(NodeId(1));
    let follower = builder.follow(address, Arc::new(LogOnly)).unwrap();
    println!("following");
    follower.wait().unwrap();
}

fn start(role: &str, directory: &Path, address: &str) -> Beside {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "role", "--nocapture", "--test-threads=1"]).stdin(Stdio::null());
    command.env(ROLE, role).env(DIRECTORY, directory).env(ADDRESS, address);
    Beside::start(&mut command)
}

/// The newest LSN acknowledged to a client, by shard.
#[derive(Default)]
struct Acknowledged(BTreeMap<u16, u64>);

impl Acknowledged {
    fn take(&mut self, line: &str) -> bool {
        // The last line of a killed process may be cut; the harness says things of its own.
        let mut words = line.split(' ');
        let (Some("acknowledged"), Some(Ok(shard)), Some(Ok(lsn)), None) =
            (words.next(), words.next().map(str::parse::<u16>), words.next().map(str::parse::<u64>), words.next())
        else {
            return false;
        };
        let newest = self.0.entry(shard).or_default();
        *newest = (*newest).max(lsn);
        true
    }

    /// Takes acknowledgements until there are `count` more.
    fn take_some(&mut self, leader: &Beside, count: u64) {
        let mut taken = 0;
        while taken < count {
            let line = leader.line().expect("the leader does not end by itself");
            taken += u64::from(self.take(&line));
        }
    }

    /// Fails unless each acknowledged record is in the log of a node, whole and with its bytes.
    fn assert_in(&self, node: &Path) {
        for shard in shards(SHARDS) {
            let newest = self.0.get(&shard.0).copied().unwrap_or(0);
            let (records, report) = readable_records_of(node, shard);
            assert!(report.is_sound(), "{:?}", report.problems);
            for lsn in 1..=newest {
                let found = records.get(&lsn);
                assert!(
                    found.is_some_and(|found| *found == record(shard, Lsn(lsn))),
                    "LSN {lsn} of shard {shard} was acknowledged (up to {newest}), and {} has {found:?}",
                    node.display()
                );
            }
        }
    }
}

/// Numbers that differ from run to run, so that kills hit at other moments each time; failures name the seed.
struct Random(u64);

impl Random {
    fn new() -> Random {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = now.as_nanos().to_le_bytes()[..8].try_into().map(u64::from_le_bytes).unwrap() | 1;
        println!("seed {seed}");
        Random(seed)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    /// Lets a moment pass that nothing else decides: where in its work the other process is afterwards is chance.
    fn moment(&mut self) {
        std::thread::sleep(Duration::from_micros(self.below(20_000)));
    }
}

/// Starts everything again, waits until the follower has all that the leader has, and checks both.
fn assert_recovered(leader_dir: &Path, follower_dir: &Path, address: &str, acknowledged: &Acknowledged) {
    let leader = Node::builder(leader_dir).lead(address).unwrap();
    let follower = common::quick(Node::builder(follower_dir)).follow(address, Arc::new(LogOnly)).unwrap();
    common::catch_up(&leader, &follower);
    let heads: Vec<_> = shards(SHARDS).map(|shard| leader.log(shard).unwrap().head().get()).collect();
    assert!(heads.iter().zip(0..).all(|(head, shard)| acknowledged.0.get(&shard).is_none_or(|lsn| lsn <= head)));
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    common::assert_identical(leader_dir, follower_dir, &heads);
    acknowledged.assert_in(leader_dir);
    acknowledged.assert_in(follower_dir);
}

#[test]
fn a_leader_killed_at_any_moment_loses_nothing_acknowledged() {
    let parent = tempfile::tempdir().unwrap();
    let (leader_dir, follower_dir) = (parent.path().join("leader"), parent.path().join("follower"));
    let address = format!("127.0.0.1:{}", free_port());
    let mut random = Random::new();
    let mut acknowledged = Acknowledged::default();
    let mut leader = start("leader", &leader_dir, &address);
    let follower = start("follower", &follower_dir, &address);
    for _ in 0..rounds() {
        acknowledged.take_some(&leader, 1 + random.below(150));
        random.moment();
        for line in leader.kill() {
            acknowledged.take(&line);
        }
        acknowledged.assert_in(&leader_dir);
        leader = start("leader", &leader_dir, &address);
    }
    acknowledged.take_some(&leader, 1);
    for line in leader.kill() {
        acknowledged.take(&line);
    }
    follower.kill();
    assert!(acknowledged.0.len() == usize::from(SHARDS), "{:?}", acknowledged.0);
    assert_recovered(&leader_dir, &follower_dir, &address, &acknowledged);
}

#[test]
fn a_follower_killed_at_any_moment_keeps_what_it_acknowledged() {
    let parent = tempfile::tempdir().unwrap();
    let (leader_dir, follower_dir) = (parent.path().join("leader"), parent.path().join("follower"));
    let address = format!("127.0.0.1:{}", free_port());
    let mut random = Random::new();
    let mut acknowledged = Acknowledged::default();
    let leader = start("leader", &leader_dir, &address);
    for _ in 0..rounds() {
        let follower = start("follower", &follower_dir, &address);
        acknowledged.take_some(&leader, 1 + random.below(150));
        random.moment();
        follower.kill();
        // What the leader still says was acknowledged before the follower died.
        for line in leader.lines_so_far() {
            acknowledged.take(&line);
        }
        acknowledged.assert_in(&follower_dir);
    }
    for line in leader.kill() {
        acknowledged.take(&line);
    }
    assert!(acknowledged.0.len() == usize::from(SHARDS), "{:?}", acknowledged.0);
    assert_recovered(&leader_dir, &follower_dir, &address, &acknowledged);
}

/// Real text: this repository's own sources, a few times over.
fn text() -> String {
    let mut text = String::new();
    let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(directory) = directories.pop() {
        for entry in directory.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                text.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    assert!(!text.is_empty());
    text.repeat(3_000_000 / text.len() + 1)
}

/// Newest LSN of each shard of a running node, and the least that any of its followers has durably.
fn marks(address: &str) -> Option<(Vec<Lsn>, Vec<Lsn>)> {
    let status = ask_status(&TcpTransport::default(), address, Duration::from_secs(10)).ok()?;
    Some((
        status.shards.iter().map(|shard| shard.head).collect(),
        status.shards.iter().map(|shard| shard.synced).collect(),
    ))
}

#[test]
fn text_goes_in_by_standard_input_and_comes_back_from_every_node() {
    let parent = tempfile::tempdir().unwrap();
    let at = |name: &str| parent.path().join(name);
    let (leader_dir, a_dir, b_dir) = (at("leader"), at("a"), at("b"));
    let text = text();
    let lines: Vec<&str> = text.lines().collect();
    let options = ["--dir", arg(&leader_dir), "--shards", "3", "--segment-size", "1048576", "--commit", "durable:1"];
    let (mut leader, address) = leader_with_input(&options);
    let mut input = leader.stdin();
    let follow = |dir: &Path| follower(&["--dir", arg(dir), "--leader", &address]);
    let (mut a, at_a) = follow(&a_dir);
    let (b, at_b) = follow(&b_dir);

    let half = text[..text.len() / 2].rfind('\n').unwrap() + 1;
    input.write_all(&text.as_bytes()[..half]).unwrap();
    until("the second follower has something", || marks(&at_b).is_some_and(|marks| marks.0[0] > Lsn(100)));
    b.kill();
    let (mut b, at_b) = follow(&b_dir);
    input.write_all(&text.as_bytes()[half..]).unwrap();
    drop(input);
    let of_shard = |shard: usize| -> Vec<&str> { lines.iter().skip(shard).step_by(3).copied().collect() };
    let due: Vec<_> = (0..3).map(|shard| Lsn(of_shard(shard).len() as u64)).collect();
    for address in [&address, &at_a, &at_b] {
        until("every node has every line", || marks(address) == Some((due.clone(), due.clone())));
    }

    for (shard, node) in [(0, &address), (1, &at_a), (2, &at_b), (0, &at_b)] {
        let (code, out, err) = outcome(&run(&["tail", "--leader", node, "--shard", &shard.to_string()]));
        assert_eq!((code, err.as_str()), (0, ""));
        let found: Vec<_> = out.split_terminator('\n').collect();
        assert!(found == of_shard(shard), "shard {shard} of {node} differs");
    }
    let (code, out, _) = outcome(&run(&["tail", "--leader", &at_a]));
    assert_eq!((code, out.lines().count()), (0, lines.len()));

    for process in [&mut a, &mut b] {
        assert_eq!(process.terminate().code(), Some(0), "{:?}", process.rest_of_errors());
    }
    assert_eq!(leader.terminate().code(), Some(0), "{:?}", leader.rest_of_errors());
    let (code, out, err) = outcome(&run(&["verify", arg(&leader_dir), arg(&a_dir), arg(&b_dir)]));
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(out.matches(": sound").count(), 9, "{out}");
    assert_eq!(out.matches(": identical, LSN 1 to ").count(), 6, "{out}");
    assert_eq!(readable_records_of(&b_dir, ShardId(1)).0.len() as u64, due[1].get());
}
