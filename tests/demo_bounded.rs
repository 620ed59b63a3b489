//! The demo at the bounds of a log, and how a leader is made to forget a follower.
#![cfg(all(unix, feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::time::Duration;

use common::process::{Beside, arg, outcome, run, towline};
use common::until;
use towline::status::Status;
use towline::tail::ask_status;
use towline::transport::TcpTransport;
use towline::{Lsn, NodeId};

fn status(address: &str) -> Option<Status> {
    ask_status(&TcpTransport::default(), address, Duration::from_secs(5)).ok()
}

/// A leader that listens at a free port, and its address.
fn lead(arguments: &[&str]) -> (Beside, String) {
    let leader = Beside::start(&mut towline(&[&["leader", "--listen", "127.0.0.1:0"], arguments].concat()));
    let address = leader.error_line("leading ").rsplit_once(" at ").unwrap().1.to_owned();
    (leader, address)
}

#[test]
fn frozen_followers_lose_their_places_and_are_rebuilt() {
    let directory = tempfile::tempdir().unwrap();
    let bounded = ["--followers", "3", "--shards", "1", "--record-size", "4096", "--max-wal-bytes", "16777216"];
    let common = ["demo", "--scenario", "slow-follower", "--seconds", "1", "--json", "--dir", arg(directory.path())];
    let (code, out, error) = outcome(&run(&[&common[..], &bounded].concat()));
    assert_eq!(code, 0, "{out}{error}");
    assert!(out.contains("\"places_lost\":3,"), "{out}");
    assert!(out.contains("\"log_peak_bytes\":"), "{out}");
    assert!(out.ends_with("\"verified\":true}\n") && out.matches("\"store_equal\":true").count() == 3, "{out}");
}

#[test]
fn a_follower_far_behind_catches_up_with_a_leader_that_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let behind = ["--followers", "1", "--shards", "2", "--behind-mb", "8", "--leader-mb-per-s", "1"];
    let common = ["demo", "--scenario", "catch-up", "--seconds", "1", "--json", "--dir", arg(directory.path())];
    let (code, out, error) = outcome(&run(&[&common[..], &behind].concat()));
    assert_eq!(code, 0, "{out}{error}");
    assert!(out.contains("\"kept_up_under_load\":true"), "{out}");
    assert!(out.ends_with("\"verified\":true}\n"), "{out}");
}

#[test]
fn a_leader_forgets_whom_it_is_told_to_forget() {
    let directory = tempfile::tempdir().unwrap();
    let (of_leader, of_follower) = (directory.path().join("leader"), directory.path().join("follower"));
    let leader_arguments = ["--dir", arg(&of_leader), "--segment-size", "1048576"];
    let known = |address: &str| -> Vec<NodeId> {
        let shards = status(address).map(|status| status.shards).unwrap_or_default();
        shards.iter().flat_map(|shard| &shard.followers).map(|follower| follower.node).collect()
    };
    let (mut leader, address) = lead(&leader_arguments);
    let mut follower =
        Beside::start(&mut towline(&["follower", "--dir", arg(&of_follower), "--leader", &address, "--node-id", "5"]));
    until("the follower is known", || known(&address) == [NodeId(5)]);
    assert!(follower.terminate().success());
    assert!(leader.terminate().success());
    let (mut leader, address) = lead(&leader_arguments);
    assert_eq!(known(&address), [NodeId(5)], "it is remembered");
    assert!(leader.terminate().success());
    let (mut leader, address) = lead(&[&leader_arguments[..], &["--forget", "5", "--min-wal-bytes", "0"]].concat());
    assert_eq!(known(&address), []);
    assert_eq!(status(&address).unwrap().shards[0].head, Lsn::ZERO);
    assert!(leader.terminate().success());
    let (_leader, address) = lead(&leader_arguments);
    assert_eq!(known(&address), [], "for good");
}
