//! armdb 0.15, its log (bitcask) replication. It tells nobody when a record has arrived: the follower is asked again
//! and again, which costs processor time but no latency of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use armdb::replication::{ReplicationClient, ReplicationRegistry, ReplicationServer};
use armdb::{Config, ShutdownSignal, VarTree};

use super::Peer;
use crate::{Result, load};

type Tree = VarTree<[u8; 8]>;

/// Nothing that arrives at all takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) const PEER: Peer = Peer {
    name: "armdb log",
    ship: |directory, record, count| {
        let pair = Pair::start(directory)?;
        load::megabytes(count * record.len() as u64, || {
            for number in 1..=count {
                pair.leader.put(&number.to_be_bytes(), record)?;
            }
            pair.wait_for(count)
        })
    },
    commit: |directory, record, count| {
        let pair = Pair::start(directory)?;
        let mut number = 0_u64;
        load::latencies(count, || {
            number += 1;
            pair.leader.put(&number.to_be_bytes(), record)?;
            pair.wait_for(number)
        })
    },
    missing: || None,
};

/// A leader and a follower that has its first record. The client and the server go before the trees.
struct Pair {
    stop: ShutdownSignal,
    _client: ReplicationClient,
    _server: ReplicationServer,
    follower: Arc<Tree>,
    leader: Tree,
}

impl Pair {
    fn start(directory: &Path) -> Result<Pair> {
        let open = |name: &str| Tree::open(directory.join(name), Config::balanced().shard_count(1).build());
        let (leader, follower) = (open("leader")?, Arc::new(open("follower")?));
        let address = ([127, 0, 0, 1], super::free_port()?).into();
        let stop = ShutdownSignal::new();
        let server = leader.start_replication_server(address, stop.clone())?;
        let registry = Arc::new(ReplicationRegistry::new(follower.as_replication_target()));
        let client = follower.start_replication_client(address, registry, stop.clone())?;
        let pair = Pair { stop, _client: client, _server: server, follower, leader };
        pair.leader.put(&0_u64.to_be_bytes(), b"the first")?;
        pair.wait_for(0)?;
        Ok(pair)
    }

    fn wait_for(&self, number: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.follower.contains(&number.to_be_bytes()) {
            if Instant::now() > deadline {
                return Err(format!("record {number} did not arrive: the stream was lost").into());
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop.shutdown();
    }
}
