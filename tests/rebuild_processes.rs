//! Rebuilds between whole processes that are killed without warning, under a load of writes.
//!
//! What breaks: the leader or the follower is killed at any moment of a rebuild, also of one that goes on with an
//! interrupted one, again and again. What prevents harm: the store's durable mark, the note of how far a rebuild has
//! come, which is written behind what it speaks of, and the log that both sides kept. Whenever the follower's store can
//! be read at all, every key that was ever written is in it; and in the end it is the leader's.
#![cfg(all(unix, feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{ChildStdin, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::PATIENCE;
use common::net::free_port;
use common::process::{Beside, arg, outcome, run, towline};
use parking_lot::{Condvar, Mutex};
use towline::target::ShardRouter;

/// How many rounds: a new follower each, killed or losing its leader up to three times.
const ROUNDS: &str = "TOWLINE_KILL_ROUNDS";
const SHARDS: u16 = 2;
/// Keys that are never deleted: a store that lacks one of them is half built.
const KEYS: u64 = 25_000;

/// How long the feeder rests after a hundred lines, in rounds of three kinds. Without a rest, the log outgrows its
/// bound in a fraction of a second, so that the follower loses its place before, in and after a rebuild.
const RESTS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(4), A_LONG_REST];
/// So long that the log's bound lasts for seconds: a rebuild can complete, on a slow machine too.
const A_LONG_REST: Duration = Duration::from_millis(20);

/// Looks again and again, each time with a process: so this does not spin. Longer than others are waited for, since
/// both sides wait a while before they connect again.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + 4 * PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {:?}: {what}", 4 * PATIENCE);
    }
}

fn rounds() -> u64 {
    std::env::var(ROUNDS).map_or(3, |rounds| rounds.parse().expect("a number of rounds"))
}

fn key(number: u64) -> String {
    format!("key-{number:06}")
}

/// Writes changes into whichever leader there is, from a thread of its own.
struct Feeder {
    shared: Arc<Fed>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Fed {
    leader: Mutex<Option<ChildStdin>>,
    changed: Condvar,
    paused: AtomicBool,
    /// How long to rest after a hundred lines, in microseconds.
    rest_us: AtomicU64,
    over: AtomicBool,
    written: AtomicU64,
}

impl Feeder {
    fn start() -> Feeder {
        let shared = Arc::new(Fed::default());
        let fed = Arc::clone(&shared);
        let thread = std::thread::spawn(move || fed.feed());
        Feeder { shared, thread: Some(thread) }
    }

    fn give(&self, stdin: ChildStdin) {
        *self.shared.leader.lock() = Some(stdin);
        self.shared.paused.store(false, Ordering::SeqCst);
        self.shared.changed.notify_all();
    }

    /// No more changes. Those written are on their way to the leader, and behind them the key `last`.
    fn pause(&self, last: &str) {
        self.shared.paused.store(true, Ordering::SeqCst);
        let mut leader = self.shared.leader.lock();
        let leader = leader.as_mut().expect("the leader is up");
        writeln!(leader, "{last}\tend").and_then(|()| leader.flush()).expect("the leader takes it");
    }

    /// From now on it rests for so long after a hundred lines.
    fn rest(&self, rest: Duration) {
        self.shared.rest_us.store(u64::try_from(rest.as_micros()).unwrap(), Ordering::SeqCst);
    }

    fn resume(&self) {
        let _leader = self.shared.leader.lock();
        self.shared.paused.store(false, Ordering::SeqCst);
        self.shared.changed.notify_all();
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        drop(self.shared.leader.lock().take());
        self.shared.changed.notify_all();
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

impl Fed {
    fn feed(&self) {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        while !self.over.load(Ordering::SeqCst) {
            let mut lines = Vec::new();
            let first = self.written.load(Ordering::SeqCst);
            for number in first..first + 100 {
                // Once through the keys in order, then all over the place.
                let at = if number < KEYS { number } else { random.below(KEYS) };
                writeln!(lines, "{}\tvalue {number:040}", key(at)).unwrap();
                let passing = random.below(500);
                match random.below(4) {
                    0 => writeln!(lines, "passing-{passing}\t{number}").unwrap(),
                    1 => writeln!(lines, "passing-{passing}").unwrap(),
                    _ => {}
                }
            }
            let mut leader = self.leader.lock();
            while (leader.is_none() || self.paused.load(Ordering::SeqCst)) && !self.over.load(Ordering::SeqCst) {
                self.changed.wait(&mut leader);
            }
            match leader.as_mut().map(|leader| leader.write_all(&lines)) {
                Some(Ok(())) => {
                    self.written.fetch_add(100, Ordering::SeqCst);
                }
                // It has been killed; what it had not taken is lost, and comes again only if it was among the first.
                _ => *leader = None,
            }
            drop(leader);
            std::thread::sleep(Duration::from_micros(self.rest_us.load(Ordering::SeqCst)));
        }
    }
}

/// Numbers that differ from run to run, so that kills hit at other moments each time; failures name the seed.
struct Random(u64);

impl Random {
    fn new() -> Random {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = u64::from(now.subsec_nanos()) << 20 | 1;
        println!("seed {seed}");
        Random(seed)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

fn lead(directory: &Path, address: &str, feeder: &Feeder) -> Beside {
    let options = ["leader", "--dir", arg(directory), "--listen", address, "--kv", "16:64", "--stdin", "--shards", "2"];
    let mut command = towline(&options);
    command.args(["--segment-size", "65536", "--max-wal-bytes", "524288"]).stdin(Stdio::piped());
    command.env("RUST_LOG", "info");
    let mut leader = Beside::start(&mut command);
    leader.error_line("leading ");
    feeder.give(leader.stdin());
    leader
}

fn follow(directory: &Path, address: &str) -> Beside {
    let mut command = towline(&["follower", "--dir", arg(directory), "--leader", address, "--node-id", "7"]);
    command.args(["--reconnect", "20"]);
    let follower = Beside::start(command.env("RUST_LOG", "info"));
    follower.error_line("following ");
    follower
}

/// Every key and value of a node's store, unless it refuses to be read, which only a store does that is not whole.
fn scan(directory: &Path) -> Option<BTreeMap<String, String>> {
    let (code, out, error) = outcome(&run(&["scan", "--dir", arg(directory)]));
    if code != 0 {
        let known = ["being rebuilt", "being recovered", "holds no store", "No such file", "torn", "cut off"];
        assert!(known.iter().any(|known| error.contains(known)), "exit code {code}: {error}");
        return None;
    }
    let pairs = out.lines().map(|line| line.split_once('\t').expect("a key and its value"));
    Some(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
}

/// Fails if a shard of the store can be read although it is half built. Says whether all of the store can be read, and
/// is not that of a new follower whose rebuild has not begun.
fn is_read_only_if_whole(directory: &Path) -> bool {
    let Some(store) = scan(directory) else { return false };
    let router = ShardRouter::new(SHARDS, 0).unwrap();
    let is_there = |shard| {
        let keys: Vec<_> = (0..KEYS).map(key).filter(|key| router.route(key.as_bytes()) == shard).collect();
        let missing = keys.iter().filter(|key| !store.contains_key(*key)).count();
        let is_empty = store.keys().all(|key| router.route(key.as_bytes()) != shard);
        assert!(missing == 0 || is_empty, "{missing} of {} keys of shard {shard} are missing", keys.len());
        missing == 0
    };
    common::shards(SHARDS).filter(|&shard| is_there(shard)).count() == usize::from(SHARDS)
}

#[test]
fn a_rebuild_that_is_killed_at_any_moment_ends_right_and_is_not_served_before() {
    let parent = tempfile::tempdir().unwrap();
    let (leader_dir, follower_dir) = (parent.path().join("leader"), parent.path().join("follower"));
    let address = format!("127.0.0.1:{}", free_port());
    let mut random = Random::new();
    let feeder = Feeder::start();
    let mut leader = lead(&leader_dir, &address, &feeder);
    until("every key is there", || {
        scan(&leader_dir).is_some_and(|store| (0..KEYS).all(|number| store.contains_key(&key(number))))
    });
    let (mut kills, mut in_rebuild, mut went_on) = (0, 0, 0);
    for round in 0..rounds() {
        feeder.rest(RESTS[usize::try_from(random.below(3)).unwrap()]);
        let mut follower = follow(&follower_dir, &address);
        for _ in 0..1 + random.below(3) {
            for _ in 0..random.below(4) {
                is_read_only_if_whole(&follower_dir);
            }
            std::thread::sleep(Duration::from_micros(random.below(150_000)));
            kills += 1;
            if random.below(2) == 0 {
                in_rebuild += u32::from(!is_read_only_if_whole(&follower_dir));
                leader.kill();
                leader = lead(&leader_dir, &address, &feeder);
            } else {
                went_on += follower.kill_and_count("going on with a rebuild");
                in_rebuild += u32::from(!is_read_only_if_whole(&follower_dir));
                follower = follow(&follower_dir, &address);
            }
        }
        feeder.rest(A_LONG_REST);
        let last = format!("end-{round}");
        until("the follower serves", || {
            assert!(!follower.has_ended(), "the follower has ended: {:?}", follower.rest_of_errors());
            is_read_only_if_whole(&follower_dir)
        });
        feeder.pause(&last);
        let is_equal = || {
            let (leaders, followers) = (scan(&leader_dir), scan(&follower_dir));
            leaders.as_ref().is_some_and(|store| store.contains_key(&last)) && leaders == followers
        };
        until("the stores are equal", is_equal);
        went_on += follower.kill_and_count("going on with a rebuild");
        std::fs::remove_dir_all(&follower_dir).unwrap();
        feeder.resume();
    }
    println!("{kills} kills, {in_rebuild} of them in a rebuild; {went_on} shards went on with an interrupted one");
}
