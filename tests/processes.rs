//! Whole processes that are killed without warning: what was acknowledged is there when they come back.
#![cfg(all(unix, feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use common::net::free_port;
use common::process::{Beside, arg, follower, leader_with_input, outcome, run, towline};
use common::random::Random;
use common::roles::{self, Acknowledged, SHARDS, assert_recovered, start};
use common::{readable_records_of, until};
use towline::tail::ask_status;
use towline::transport::TcpTransport;
use towline::{Lsn, ShardId};

/// How many times the tests kill something.
const ROUNDS: &str = "TOWLINE_KILL_ROUNDS";

fn rounds() -> u64 {
    std::env::var(ROUNDS).map_or(10, |rounds| rounds.parse().expect("a number of rounds"))
}

/// Does nothing unless a test below has started this binary again to be a leader or a follower.
#[test]
fn role() {
    roles::play();
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

/// A leader, a follower that feeds another, and that other: the two are killed again and again while text comes in.
#[test]
fn links_of_a_cascade_killed_at_any_moment_end_with_the_leaders_log() {
    let parent = tempfile::tempdir().unwrap();
    let at = |name: &str| parent.path().join(name);
    let (leader_dir, relay_dir, last_dir) = (at("leader"), at("relay"), at("last"));
    let relay_at = format!("127.0.0.1:{}", free_port());
    let (text, mut random) = (text(), Random::new());
    let lines = text.lines().count();
    let options = ["--dir", arg(&leader_dir), "--segment-size", "65536", "--commit", "durable:1"];
    let (mut leader, address) = leader_with_input(&options);
    let mut input = leader.stdin();
    let follow = |dir: &Path, upstream: &str, listens_at: &str| {
        let arguments =
            ["follower", "--dir", arg(dir), "--leader", upstream, "--listen", listens_at, "--reconnect", "20"];
        let process = Beside::start(&mut towline(&arguments));
        process.error_line("following ");
        process
    };
    let relay = || follow(&relay_dir, &address, &relay_at);
    let last = || follow(&last_dir, &relay_at, "127.0.0.1:0");
    let (mut first, mut second) = (relay(), last());
    let mut pieces = text.as_bytes().chunks(text.len() / usize::try_from(rounds()).unwrap() + 1);
    for _ in 0..rounds() {
        input.write_all(pieces.next().unwrap_or_default()).unwrap();
        random.moment();
        if random.percent(60) {
            first.kill();
            first = relay();
        }
        if random.percent(60) {
            second.kill();
            second = last();
        }
    }
    drop(input);
    until("the relay's follower has everything", || {
        let status = ask_status(&TcpTransport::default(), &relay_at, Duration::from_secs(10));
        let due = Lsn(lines as u64);
        status.is_ok_and(|status| {
            let shard = &status.shards[0];
            shard.head == due && shard.followers.first().is_some_and(|last| last.connected && last.durable == due)
        })
    });
    for process in [&mut second, &mut first, &mut leader] {
        assert_eq!(process.terminate().code(), Some(0), "{:?}", process.rest_of_errors());
    }
    let (code, out, err) = outcome(&run(&["verify", arg(&leader_dir), arg(&relay_dir), arg(&last_dir)]));
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(out.matches(": identical, LSN 1 to ").count(), 2, "{out}");
}
