//! `towline follower`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use towline::data_dir::DataDir;
use towline::scrub::ScrubOptions;
use towline::target::{FixedStore, FixedStoreOptions, LogOnly, ReplicationTarget};
use towline::{Error, Node, NodeId, ShutdownSignal};

use super::{DONE, Outcome, kv};

/// Follow a leader: keep a byte-identical copy of its log, and keep up with it.
///
/// The directory is made at the first contact with the leader, who says how many shards there are. A leader that
/// goes away is waited for; a refusal that waiting cannot mend ends the command.
///
/// Of a leader that keeps a store, the follower keeps the store too: `get` and `scan` read it at any time.
///
/// Example:  towline follower --dir /var/lib/towline-copy --leader 127.0.0.1:7400
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Follower {
    /// Data directory; made if it is not there
    #[arg(long)]
    dir: PathBuf,
    /// The leader's address, or that of a follower that listens. A new directory keeps a store if that one does
    #[arg(long, value_name = "ADDR")]
    leader: String,
    /// This node's id [default: random, kept in the directory]
    #[arg(long)]
    node_id: Option<u64>,
    /// Keep no store, even if the leader has one
    #[arg(long)]
    log_only: bool,
    /// Most bytes of log that each shard keeps once they are applied; 0 for no bound [default: 1073741824]
    #[arg(long, value_name = "BYTES")]
    max_wal_bytes: Option<u64>,
    /// Bytes a second of old log that are read again to find damage; 0 for none [default: 8388608]
    #[arg(long, value_name = "BYTES")]
    scrub: Option<u64>,
    /// Milliseconds to wait before the first new attempt to reach the leader; each further one waits twice as long, up
    /// to thirty times this
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    reconnect: u64,
    /// Address at which to answer `status` and `tail`, and who repairs a log, and to feed further followers
    /// [default: none]
    #[arg(long)]
    listen: Option<String>,
    /// Forget this node, which this one has fed and which will not come back. May be given several times
    #[arg(long, value_name = "ID")]
    forget: Vec<u64>,
    /// Listen on an address that other machines reach, although nothing is encrypted
    #[arg(long)]
    allow_plaintext: bool,
}

impl Follower {
    pub(super) fn run(self) -> Outcome {
        let stop = super::stop_at_interrupt()?;
        let wait = self.reconnect();
        let mut builder = Node::builder(&self.dir)
            .allow_plaintext(self.allow_plaintext)
            .reconnect(wait, wait * super::LONGEST_WAIT)
            .stop_signal(stop.clone());
        if let Some(node) = self.node_id {
            builder = builder.node_id(NodeId(node));
        }
        if let Some(bytes) = self.max_wal_bytes {
            builder = builder.max_wal_bytes(bytes);
        }
        if let Some(bytes_per_second) = self.scrub {
            builder = builder.scrub(ScrubOptions { bytes_per_second, ..ScrubOptions::default() });
        }
        if let Some(address) = &self.listen {
            builder = builder.listen(address);
        }
        let followed = self.store(&stop).and_then(|store| {
            let target =
                store.clone().map_or_else(|| Arc::new(LogOnly) as Arc<dyn ReplicationTarget>, |store| store as _);
            Ok((builder.follow(&self.leader, target)?, store))
        });
        let (follower, store) = match followed {
            Err(error) if error.is_shutdown() && stop.is_shutdown() => return Ok(DONE),
            other => other?,
        };
        let manifest = follower.manifest();
        for &node in &self.forget {
            follower.forget_follower(NodeId(node))?;
            tell!("follower {node} is forgotten");
        }
        tell!(
            "following {} into {} with {} shards{}, node {}{}",
            self.leader,
            self.dir.display(),
            manifest.shard_count,
            kv::describe(store.as_deref()),
            manifest.node,
            follower.local_address().map(|address| format!(", listening at {address}")).unwrap_or_default()
        );
        follower.wait()?;
        follower.shutdown()?;
        kv::close(store)?;
        Ok(DONE)
    }

    fn reconnect(&self) -> Duration {
        Duration::from_millis(self.reconnect)
    }

    /// The node's store: the one that is there, or, in a directory that is yet to be made, one like the leader's. The
    /// choice is made once: a directory that was made without a store keeps the log only.
    fn store(&self, stop: &ShutdownSignal) -> towline::Result<Option<Arc<FixedStore>>> {
        if self.log_only {
            return Ok(None);
        }
        if let Some(store) = kv::open_existing(&self.dir)? {
            return Ok(Some(store));
        }
        match DataDir::read_manifest(&self.dir) {
            Ok(_) => return Ok(None),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let info = super::ask_topology(&self.leader, self.reconnect(), stop)?;
        let options = FixedStoreOptions {
            key_len: info.key_len,
            value_len: info.value_len,
            shard_count: info.shard_count,
            prefix_bits: info.prefix_bits,
        };
        // A store has keys: a leader that tells no length keeps the log only, or another kind of target.
        if options.key_len == 0 {
            return Ok(None);
        }
        Ok(Some(Arc::new(FixedStore::open(kv::store_path(&self.dir), &options)?)))
    }
}
