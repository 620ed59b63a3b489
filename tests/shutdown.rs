//! Stopping ends every thread. Alone in its binary, because it counts the threads of the process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use common::net::Net;
use common::{Checked, append, catch_up, until};
use towline::{Error, Node, Outcome, ShardId, ShutdownSignal};

/// The crate's threads, by the names that they all have.
fn threads() -> BTreeSet<(u64, String)> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let named = tasks.filter_map(|task| {
        let task = task.ok()?;
        // A thread may end while it is looked at.
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?.trim_end().to_owned();
        Some((task.file_name().to_str()?.parse().ok()?, name))
    });
    named.filter(|(_, name)| name.starts_with("tl-")).collect()
}

/// In one test, one after the other: they would count each other's threads.
#[test]
fn every_thread_ends_with_its_node() {
    for net in [Net::tcp(), Net::in_process()] {
        let parent = tempfile::tempdir().unwrap();
        let at = |name: &str| parent.path().join(name);
        assert_eq!(threads(), BTreeSet::new());
        let leader = net.lead(&at("leader"), 3);
        // A thread gives itself its name once it runs.
        until("the leader's threads run", || threads().len() == 4 + 3 * 2);
        let followers = [net.follow(&at("a"), 1, &Checked::new(3)), net.follow(&at("b"), 2, &Checked::new(3))];
        let mut writers = common::writers(&leader);
        for writer in &mut writers {
            append(writer, 500);
        }
        followers.iter().for_each(|follower| catch_up(&leader, follower));
        let _silent = net.connect();
        let [a, b] = followers;
        a.shutdown().unwrap();
        let commits = Arc::clone(leader.commits(ShardId(0)).unwrap());
        let head = append(&mut writers[0], 1);
        let outcome = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| commits.wait(head, "durable:3".parse().unwrap(), None));
            leader.shutdown().unwrap();
            waiting.join().unwrap()
        });
        assert_eq!(outcome, Outcome::ShutDown);
        // The other one waits for its leader to come back; dropping it is enough.
        drop(b);
        // The system may list a thread for an instant after it was joined.
        until("no thread is left", || threads().is_empty());
    }
    a_follower_that_never_met_its_leader_stops();
}

fn a_follower_that_never_met_its_leader_stops() {
    let parent = tempfile::tempdir().unwrap();
    let net = Net::tcp();
    let stop = ShutdownSignal::new();
    let builder = net.node(parent.path()).reconnect(Duration::from_secs(600), Duration::from_secs(600));
    let builder = builder.stop_signal(stop.clone());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| builder.follow(&net.address, Checked::new(1)));
        stop.shutdown();
        assert!(matches!(waiting.join().unwrap(), Err(Error::ShutDown)));
    });
    assert_eq!(parent.path().read_dir().unwrap().count(), 0, "nothing was made");
    let leader = Node::builder(parent.path()).lead("127.0.0.1:0").unwrap();
    leader.shutdown().unwrap();
    until("no thread is left", || threads().is_empty());
}
