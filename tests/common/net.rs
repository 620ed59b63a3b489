//! The two transports, so that each scenario runs over both.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use towline::transport::{InProcessTransport, TcpOptions, TcpTransport, Transport};
use towline::{Follower, Leader, Node, NodeBuilder, NodeId, ShardId};

use super::{Checked, SEGMENT, append, assert_identical, catch_up, quick};

/// A transport and an address that a restarted leader can listen at again.
pub struct Net {
    pub transport: Arc<dyn Transport>,
    pub address: String,
}

impl Net {
    pub fn tcp() -> Net {
        // Small buffers, so that a peer that does not read is soon noticed to be behind.
        let options =
            TcpOptions { send_buffer: Some(32 * 1024), receive_buffer: Some(32 * 1024), ..TcpOptions::default() };
        Net { transport: Arc::new(TcpTransport::new(options)), address: format!("127.0.0.1:{}", free_port()) }
    }

    pub fn in_process() -> Net {
        Net { transport: Arc::new(InProcessTransport::new()), address: "leader".to_owned() }
    }

    /// Settings for a node on this net.
    pub fn node(&self, directory: &Path) -> NodeBuilder {
        quick(Node::builder(directory)).transport(Arc::clone(&self.transport))
    }

    /// A leader with small segments.
    pub fn lead(&self, directory: &Path, shards: u16) -> Leader {
        self.node(directory).shards(shards).segment_size(SEGMENT).lead(&self.address).unwrap()
    }

    /// A follower of the leader on this net.
    pub fn follow(&self, directory: &Path, node: u64, target: &Arc<Checked>) -> Follower {
        let target = Arc::clone(target);
        self.node(directory).node_id(NodeId(node)).follow(&self.address, target).unwrap()
    }

    /// A bare connection to the leader.
    pub fn connect(&self) -> towline::transport::Connection {
        let mut connection = self.transport.connect(&self.address, Duration::from_secs(10)).unwrap();
        connection.receiver.set_timeout(Some(super::PATIENCE)).unwrap();
        connection
    }
}

/// A leader with `records` records and a follower that has them, both stopped.
pub fn pair_with(net: &Net, leader_dir: &Path, follower_dir: &Path, records: u64) {
    let leader = net.lead(leader_dir, 1);
    let follower = net.follow(follower_dir, 1, &Checked::new(1));
    append(&mut leader.writer(ShardId(0)).unwrap(), records);
    catch_up(&leader, &follower);
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    assert_identical(leader_dir, follower_dir, &[records]);
}

/// A TCP port that is free now, and that the system does not give to anyone who asks for any port: those come from a
/// range above. So nobody takes it while a leader restarts.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let of_process = u16::try_from(std::process::id() % 200).unwrap() * 100;
    loop {
        let port = 10_000 + (of_process + NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Runs each scenario, a function of a [`Net`], over both transports.
#[macro_export]
macro_rules! over_both {
    ($($scenario:ident),* $(,)?) => {
        mod tcp {
            $(#[test] fn $scenario() { super::$scenario(&super::common::net::Net::tcp()); })*
        }
        mod in_process {
            $(#[test] fn $scenario() { super::$scenario(&super::common::net::Net::in_process()); })*
        }
    };
}
