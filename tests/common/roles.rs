//! A leader and followers as processes of their own, which are killed without warning: the test binary, started again
//! to play a role, and what was acknowledged by them.
//!
//! A test binary that uses this has a test named `role`, which calls [`play`].

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use towline::target::{LogOnly, ReplicationTarget};
use towline::wal::Record;
use towline::{Lsn, Node, NodeBuilder, NodeId, ShardId};

use super::process::Beside;
use super::{readable_records_of, record, shards};

/// Tells the test binary, started again by a test, which role to play.
const ROLE: &str = "TOWLINE_TEST_ROLE";
const DIRECTORY: &str = "TOWLINE_TEST_DIRECTORY";
const ADDRESS: &str = "TOWLINE_TEST_ADDRESS";
const NODE: &str = "TOWLINE_TEST_NODE";
/// Bound on the log's bytes; none if it is not there.
const MAX_WAL_BYTES: &str = "TOWLINE_TEST_MAX_WAL_BYTES";

pub const SHARDS: u16 = 2;
/// A peer that says nothing for longer is given up.
pub const PEER_TIMEOUT: Duration = Duration::from_millis(800);

/// Plays the role that this process was started for, if any, until it is killed.
pub fn play() {
    let of = |name| std::env::var(name).unwrap();
    let Ok(role) = std::env::var(ROLE) else { return };
    let (directory, address) = (of(DIRECTORY), of(ADDRESS));
    let mut builder = Node::builder(&directory).heartbeat(PEER_TIMEOUT / 4).peer_timeout(PEER_TIMEOUT);
    if let Ok(bytes) = std::env::var(MAX_WAL_BYTES) {
        let bytes: u64 = bytes.parse().unwrap();
        builder = builder.max_wal_bytes(bytes).min_wal_bytes(bytes / 4);
    }
    match role.as_str() {
        "leader" => lead(builder, &address),
        "follower" => follow(builder, Path::new(&directory), &address),
        other => panic!("no role is named {other:?}"),
    }
}

/// A leader whose every shard appends, waits until a follower has it durably, and says so, until it is killed.
fn lead(builder: NodeBuilder, address: &str) {
    let leader = builder.shards(SHARDS).segment_size(256 * 1024).lead(address).unwrap();
    std::thread::scope(|scope| {
        for mut writer in super::writers(&leader) {
            let leader = &leader;
            scope.spawn(move || {
                let shard = writer.log().shard();
                for round in 0.. {
                    let lsn = super::append(&mut writer, 1 + round % 7);
                    let outcome = leader.wait(shard, lsn, "durable:1".parse().unwrap(), None).unwrap();
                    assert!(outcome.is_committed(), "{outcome:?}");
                    println!("acknowledged {shard} {lsn}");
                }
            });
        }
    });
}

fn follow(builder: NodeBuilder, directory: &Path, address: &str) {
    let node = std::env::var(NODE).unwrap().parse().unwrap();
    let target: Arc<dyn ReplicationTarget> =
        if std::env::var(MAX_WAL_BYTES).is_ok() { Arc::new(LogOnly) } else { Arc::new(Journal::open(directory)) };
    let follower = super::quick(builder).node_id(NodeId(node)).follow(address, target).unwrap();
    println!("following");
    follower.wait().unwrap();
}

/// A role to be started.
pub struct Role<'a> {
    pub role: &'a str,
    pub directory: &'a Path,
    pub address: &'a str,
    pub node: u64,
    pub max_wal_bytes: Option<u64>,
}

impl Role<'_> {
    pub fn start(&self) -> Beside {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "role", "--nocapture", "--test-threads=1"]).stdin(Stdio::null());
        command.env(ROLE, self.role).env(DIRECTORY, self.directory).env(ADDRESS, self.address);
        command.env(NODE, self.node.to_string());
        if let Some(bytes) = self.max_wal_bytes {
            command.env(MAX_WAL_BYTES, bytes.to_string());
        }
        Beside::start(&mut command)
    }
}

/// Starts a leader, or a follower of the one at `address`, with all of its log.
pub fn start(role: &str, directory: &Path, address: &str) -> Beside {
    Role { role, directory, address, node: 1, max_wal_bytes: None }.start()
}

/// A target that writes down every record it applies, in a file beside the node's, and refuses a gap. What it has
/// written down outlives the process.
struct Journal {
    shards: Vec<Mutex<(File, u64)>>,
}

/// LSN and checksum of a record.
const ENTRY_LEN: usize = 12;

fn journal_path(directory: &Path, shard: u16) -> std::path::PathBuf {
    directory.with_extension(format!("applied-{shard}"))
}

fn entry(lsn: u64, bytes: &[u8]) -> [u8; ENTRY_LEN] {
    let mut entry = [0; ENTRY_LEN];
    entry[..8].copy_from_slice(&lsn.to_le_bytes());
    entry[8..].copy_from_slice(&crc32fast::hash(bytes).to_le_bytes());
    entry
}

impl Journal {
    fn open(directory: &Path) -> Journal {
        let open = |shard| {
            let path = journal_path(directory, shard);
            let file = File::options().create(true).truncate(false).write(true).open(path).unwrap();
            let entries = file.metadata().unwrap().len() / ENTRY_LEN as u64;
            Mutex::new((file, entries))
        };
        Journal { shards: (0..SHARDS).map(open).collect() }
    }
}

impl ReplicationTarget for Journal {
    fn durable_applied(&self, shard: ShardId) -> towline::Result<Option<Lsn>> {
        Ok(Some(Lsn(self.shards[usize::from(shard.0)].lock().1)))
    }

    fn apply(&self, shard: ShardId, found: Record<'_>) -> towline::Result<()> {
        let mut journal = self.shards[usize::from(shard.0)].lock();
        let (file, entries) = &mut *journal;
        if found.lsn.get() <= *entries {
            return Ok(());
        }
        assert_eq!(found.lsn.get(), *entries + 1, "shard {shard}: a gap");
        file.write_all_at(&entry(found.lsn.get(), found.bytes), *entries * ENTRY_LEN as u64).unwrap();
        *entries += 1;
        Ok(())
    }

    fn sync(&self, _shard: ShardId) -> towline::Result<()> {
        Ok(())
    }

    fn needs_durable_log(&self) -> bool {
        true
    }
}

/// Fails unless a follower has applied each record once, in order, with its bytes, up to `heads`.
pub fn assert_applied_once(directory: &Path, heads: &[u64]) {
    for (shard, &head) in (0..).zip(heads) {
        let found = std::fs::read(journal_path(directory, shard)).unwrap();
        let due: Vec<u8> = (1..=head).flat_map(|lsn| entry(lsn, &record(ShardId(shard), Lsn(lsn)))).collect();
        assert_eq!(found.len(), due.len(), "bytes of journal {shard} of {}", directory.display());
        assert!(found == due, "journal {shard} of {}", directory.display());
    }
}

/// The newest LSN acknowledged to a client, by shard.
#[derive(Default)]
pub struct Acknowledged(pub BTreeMap<u16, u64>);

impl Acknowledged {
    pub fn take(&mut self, line: &str) -> bool {
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
    pub fn take_some(&mut self, leader: &Beside, count: u64) {
        let mut taken = 0;
        while taken < count {
            let line = leader.line().unwrap_or_else(|| panic!("the leader has ended: {:#?}", leader.rest_of_errors()));
            taken += u64::from(self.take(&line));
        }
    }

    /// Fails unless each acknowledged record is in the log of a node, whole and with its bytes.
    pub fn assert_in(&self, node: &Path) {
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

/// Starts everything again, waits until the follower has all that the leader has, and checks both.
pub fn assert_recovered(leader_dir: &Path, follower_dir: &Path, address: &str, acknowledged: &Acknowledged) {
    let leader = Node::builder(leader_dir).lead(address).unwrap();
    let follower =
        super::quick(Node::builder(follower_dir)).follow(address, Arc::new(Journal::open(follower_dir))).unwrap();
    super::catch_up(&leader, &follower);
    let heads: Vec<_> = shards(SHARDS).map(|shard| leader.log(shard).unwrap().head().get()).collect();
    assert!(heads.iter().zip(0..).all(|(head, shard)| acknowledged.0.get(&shard).is_none_or(|lsn| lsn <= head)));
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    super::assert_identical(leader_dir, follower_dir, &heads);
    acknowledged.assert_in(leader_dir);
    acknowledged.assert_in(follower_dir);
    assert_applied_once(follower_dir, &heads);
}

/// Runs a follower in this process until it has all that the leader has, and stops it in order.
pub fn catch_up_with(leader: &towline::Leader, directory: &Path, address: &str, node: u64) {
    let builder = super::quick(Node::builder(directory)).node_id(NodeId(node));
    let follower = builder.follow(address, Arc::new(Journal::open(directory))).unwrap();
    super::catch_up(leader, &follower);
    follower.shutdown().unwrap();
}
