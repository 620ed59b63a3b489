//! Towline, default settings: `commit` waits for `received:1`, a follower that has the record in its log.

use std::path::Path;
use std::sync::Arc;

use towline::target::LogOnly;
use towline::wal::LogWriter;
use towline::{Commit, Follower, Leader, Lsn, Node, ShardId, Until, WaitStrategy, wait_any};

use super::Peer;
use crate::contest::OURS;
use crate::{Result, load};

const SHARD: ShardId = ShardId(0);

pub(super) const PEER: Peer = Peer {
    name: OURS,
    ship: |directory, record, count| {
        let (leader, follower, mut writer) = start(directory)?;
        let bytes = count * record.len() as u64;
        let sample = load::megabytes(bytes, || {
            let mut last = Lsn::ZERO;
            for _ in 0..count {
                last = writer.append(record)?;
            }
            let arrived = Until { mark: follower.applied(SHARD)?, at_least: last };
            wait_any(&[arrived], WaitStrategy::Park, None);
            Ok(())
        });
        drop((follower, leader));
        sample
    },
    commit: |directory, record, count| {
        let (leader, follower, mut writer) = start(directory)?;
        let commit: Commit = "received:1".parse()?;
        let commits = Arc::clone(leader.commits(SHARD)?);
        let sample = load::latencies(count, || {
            let outcome = commits.wait(writer.append(record)?, commit, None);
            if outcome.is_committed() { Ok(()) } else { Err(format!("not committed: {outcome:?}").into()) }
        });
        drop((follower, leader));
        sample
    },
    missing: || None,
};

fn start(directory: &Path) -> Result<(Leader, Follower, LogWriter)> {
    let build = |name: &str| Node::builder(directory.join(name)).max_wal_bytes(None);
    let leader = build("leader").segment_size(64 << 20).lead("127.0.0.1:0")?;
    let follower = build("follower").follow(leader.local_address(), Arc::new(LogOnly))?;
    let mut writer = leader.writer(SHARD)?;
    let first = writer.append(b"the first")?;
    let outcome = leader.wait(SHARD, first, "applied:1".parse()?, None)?;
    if !outcome.is_committed() {
        return Err(format!("the follower did not connect: {outcome:?}").into());
    }
    leader.log(SHARD)?.wait_for_spares(None)?;
    follower.log(SHARD)?.wait_for_spares(None)?;
    Ok((leader, follower, writer))
}
