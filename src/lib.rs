//! A sharded write-ahead log for storage engines, replicated to followers.
//!
//! Synchronous and thread-per-shard: each shard is one ordered log of memory-mapped segments; each follower and shard
//! has one blocking TCP stream; threads hand work to each other by moving atomic watermarks over the log itself. There
//! is no async runtime, and an idle node makes no system calls but heartbeats, and once a day those that read its log
//! again (see [`scrub`]).
//!
//! ```text
//!  caller ──append──▶ log writer ──▶ mapped segment ──written──┬──▶ shipper (follower A) ──▶ TCP
//!                                          │                   └──▶ shipper (follower B) ──▶ TCP
//!                                          └──synced── whoever waits for it, or the sync thread
//!
//!  TCP ──▶ receiver ──▶ mapped segment ──received──┬──▶ sync ─────durable──┐
//!                      (same bytes, same offsets)  └──▶ applier ──applied──┴──▶ ack ──TCP──▶ leader's marks
//! ```
//!
//! # The journey of one write
//!
//! | where | what happens |
//! |---|---|
//! | [`wal`] | a record becomes part of a batch in a mapped segment, and has an LSN; later it is on stable storage |
//! | [`watermark`] | `written` moves, and whoever waits for it wakes |
//! | `shipper` | the mapped bytes go to the socket, one shipper for each follower and shard |
//! | [`wire`], [`transport`] | frames over TCP, or within a process |
//! | `receiver` | the socket's bytes go into the follower's mapped segment, at the same offset, and are checked |
//! | [`target`] | the applier hands the records to the state machine, in order |
//! | [`commit`] | acknowledgements come back, and whoever waits for the record's commit wakes |
//!
//! Around it: a [`Node`] leads or follows; [`protocol`] decides how each follower recovers, and [`retention`] bounds
//! what each log keeps for whom; [`data_dir`] and [`replication`] keep what must survive a restart; [`rebuild`] brings
//! back followers that the log cannot; [`status`] and [`tail`] look in from outside; [`repair`] mends a damaged log
//! from a peer's copy; [`shutdown`] ends everything at once.
//!
//! An application needs what stands at the root, [`target`], [`wal`] to read a log, [`status`], [`tail`] with
//! [`transport::TcpTransport`], and for a few settings [`scrub`] and [`protocol`]. The rest is for tools, for
//! transports of one's own, and for those who read how it works: the document of a format is its specification.
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | shard, LSN | one ordered log; a record's number in it, from 1 |
//! | head, tail | of a log: the newest LSN written, and the oldest retained |
//! | written, synced | in the mapped log, safe from a crash of the process; on this node's stable storage |
//! | received, durable, applied | in a follower's log; on its stable storage; in its target |
//! | committed | acknowledged as widely as a [`Commit`] asks |
//! | epoch | a leadership term: one node alone leads under it |
//! | chain | the running checksum of a log: where it is equal, so is all that came before |
//! | target | the state machine that a log is applied to; its base is an image of its state |
//! | session | what brings a follower to the leader's log: keep-up, catch-up from the log, or rebuild from base and log |
//! | cascade, relay | followers that follow a follower; the one that feeds them |
//! | place, pin | where a known follower needs the log from; a hold on the log for anybody else. Either can be lost to the log's bound |
//!
//! # Example
//!
//! ```
//! use std::sync::Arc;
//! use towline::target::LogOnly;
//! use towline::{Node, Outcome, ShardId};
//!
//! # let directory = tempfile::tempdir()?;
//! # let (leader_dir, follower_dir) = (directory.path().join("a"), directory.path().join("b"));
//! let leader = Node::builder(leader_dir).segment_size(1 << 20).lead("127.0.0.1:0")?;
//! let follower = Node::builder(follower_dir).follow(leader.local_address(), Arc::new(LogOnly))?;
//!
//! let mut writer = leader.writer(ShardId(0))?;
//! let lsn = writer.append(b"a record")?;
//! let outcome = leader.wait(ShardId(0), lsn, "durable:1".parse()?, None)?;
//! assert_eq!(outcome, Outcome::Committed);
//! # drop(follower);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod ack_lane;
mod ack_reader;
mod admission;
mod allocate;
mod applier;
mod atomic_file;
mod backoff;
mod caught;
mod checkpointer;
pub mod commit;
pub mod data_dir;
mod directory_lock;
mod divergence;
mod epoch_fence;
pub mod error;
mod follower;
mod follower_shard;
mod host;
mod leader;
mod leading;
pub mod limits;
mod node;
mod on_demand;
mod parting;
pub mod protocol;
pub mod rebuild;
mod receiver;
mod registry;
pub mod repair;
pub mod replication;
pub mod retention;
pub mod scrub;
#[doc(hidden)]
pub mod seams;
mod server;
mod shipper;
pub mod shutdown;
mod small_file;
pub mod status;
mod sync;
pub mod tail;
pub mod target;
pub mod transport;
pub mod types;
pub mod wal;
pub mod watermark;
pub mod wire;
mod zeros;

pub use commit::{AckLevel, Commit, Commits, FollowerMarks, Outcome};
pub use data_dir::Manifest;
pub use error::{Error, RefusalCode, Result};
pub use follower::Follower;
pub use leader::Leader;
pub use node::{Node, NodeBuilder};
pub use replication::{Checkpoint, CheckpointEntry, CheckpointError, ReplicationState};
pub use retention::{Pin, PinStatus};
pub use shutdown::{ShutdownGuard, ShutdownSignal};
pub use tail::Tail;
pub use types::{
    Chain, ClusterId, Epoch, HybridTimestamp, Lsn, NodeId, ParseSegmentIdError, RegionId, SessionId, ShardId,
    WalSegmentId,
};
pub use watermark::{Until, WaitStrategy, Waited, Watermark, wait_any};

/// The examples of the README are compiled with the others.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
