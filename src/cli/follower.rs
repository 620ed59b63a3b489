//! `towline follower`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use towline::target::LogOnly;
use towline::{Node, NodeId};

use super::{DONE, Outcome};

/// Follow a leader: keep a byte-identical copy of its log, and keep up with it.
///
/// The directory is made at the first contact with the leader, who says how many shards there are. A leader that
/// goes away is waited for; a refusal that waiting cannot mend ends the command.
///
/// Example:  towline follower --dir /var/lib/towline-copy --leader 127.0.0.1:7400
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Follower {
    /// Data directory; made if it is not there
    #[arg(long)]
    dir: PathBuf,
    /// The leader's address
    #[arg(long, value_name = "ADDR")]
    leader: String,
    /// This node's id [default: random, kept in the directory]
    #[arg(long)]
    node_id: Option<u64>,
    /// Most bytes of log that each shard keeps once they are applied; 0 for no bound [default: 1073741824]
    #[arg(long, value_name = "BYTES")]
    max_wal_bytes: Option<u64>,
    /// Address at which to answer `status` and `tail` [default: none]
    #[arg(long)]
    listen: Option<String>,
    /// Listen on an address that other machines reach, although nothing is encrypted
    #[arg(long)]
    allow_plaintext: bool,
}

impl Follower {
    pub(super) fn run(self) -> Outcome {
        let stop = super::stop_at_interrupt()?;
        let mut builder = Node::builder(&self.dir).allow_plaintext(self.allow_plaintext).stop_signal(stop.clone());
        if let Some(node) = self.node_id {
            builder = builder.node_id(NodeId(node));
        }
        if let Some(bytes) = self.max_wal_bytes {
            builder = builder.max_wal_bytes(bytes);
        }
        if let Some(address) = self.listen {
            builder = builder.listen(address);
        }
        let follower = match builder.follow(&self.leader, Arc::new(LogOnly)) {
            Err(error) if error.is_shutdown() && stop.is_shutdown() => return Ok(DONE),
            other => other?,
        };
        let manifest = follower.manifest();
        eprintln!(
            "following {} into {} with {} shards, node {}{}",
            self.leader,
            self.dir.display(),
            manifest.shard_count,
            manifest.node,
            follower.local_address().map(|address| format!(", listening at {address}")).unwrap_or_default()
        );
        follower.wait()?;
        follower.shutdown()?;
        Ok(DONE)
    }
}
