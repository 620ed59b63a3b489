//! `towline status`.

use std::time::{Duration, SystemTime};

use clap::Args;
use towline::protocol::{Mode, Reason, SessionKind};
use towline::status::{FollowerStatus, ShardStatus};
use towline::tail::ask_status;

use super::{DONE, Outcome};

/// Ask a running node how it is: marks of every shard, and how far each follower lags in records, bytes and time.
///
/// Example:  towline status 127.0.0.1:7400
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Status {
    /// The node's address
    address: String,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(super) fn run(self) -> Outcome {
        let status = ask_status(super::tcp().as_ref(), &self.address, Duration::from_secs(5))?;
        if self.json {
            say!("{}", status.to_json());
            return Ok(DONE);
        }
        say!(
            "{} {} of cluster {}, epoch {}, up {} s",
            status.role.as_str(),
            status.node,
            status.cluster,
            status.epoch,
            status.uptime.as_secs()
        );
        for shard in &status.shards {
            print_shard(shard);
        }
        Ok(DONE)
    }
}

fn print_shard(shard: &ShardStatus) {
    say!(
        "shard {:>4}  LSN {} to {} of epoch {}  synced {}  committed {}  {} retained{}  {}",
        shard.shard,
        shard.tail,
        shard.head,
        shard.head_epoch,
        shard.synced,
        shard.committed,
        super::human_bytes(shard.retained_bytes),
        shard.max_wal_bytes.map(|bytes| format!(" of {}", super::human_bytes(bytes))).unwrap_or_default(),
        why(shard.mode, shard.reason)
    );
    for finding in &shard.scrub.findings {
        say!(
            "  damaged: {} at offset {} (LSN {}): {}",
            finding.path.display(),
            finding.offset,
            finding.lsn,
            finding.reason
        );
    }
    if let Some(poison) = &shard.poison {
        say!("  read-only: {poison}");
    }
    if let Some(following) = &shard.following {
        say!(
            "  {}  leader at {}  behind {}  applied {}  heard {}{}{}",
            if following.connected { "connected" } else { "disconnected" },
            following.leader_head,
            following.leader_head.records_since(shard.head),
            following.applied,
            ago(following.heard_at_ms),
            if following.rebuilding { "  being rebuilt" } else { "" },
            following.error.as_ref().map(|error| format!("  ({error})")).unwrap_or_default()
        );
    }
    for pin in &shard.pins {
        let lost = if pin.lost { "  LOST" } else { "" };
        say!("  pin at LSN {}  {} ({}){lost}", pin.lsn, pin.owner, pin.reason);
    }
    for follower in &shard.followers {
        print_follower(follower, shard);
    }
}

fn print_follower(follower: &FollowerStatus, shard: &ShardStatus) {
    say!(
        "  follower {}  {}  received {}  durable {}  applied {}  behind {} records, {}, last heard {}",
        follower.node,
        follower.state(shard.head),
        follower.received,
        follower.durable,
        follower.applied,
        shard.head.records_since(follower.received),
        super::human_bytes(follower.lag_bytes),
        ago(follower.acked_at_ms)
    );
    let session = follower.session.map_or_else(
        || "no session".to_owned(),
        |session| match session.kind {
            SessionKind::KeepUp => format!("session {} {} {}", session.id, session.kind, session.phase),
            _ => format!(
                "session {} {} {} at LSN {} of {}, {} base blocks",
                session.id,
                session.kind,
                session.phase,
                session.progress.achieved,
                session.target,
                session.progress.base_blocks
            ),
        },
    );
    let refusal = follower.refusal.map(|refusal| format!("  refused: {refusal}")).unwrap_or_default();
    let lost = if follower.place_lost { "  its place in the log is lost" } else { "" };
    say!("    {}  {session}{refusal}{lost}", why(follower.mode, follower.reason));
    if let Some(divergence) = &follower.divergence {
        say!("    DIVERGED: {divergence}");
    }
}

/// A mode and why it is that.
fn why(mode: Mode, reason: Option<Reason>) -> String {
    reason.map_or_else(|| mode.to_string(), |reason| format!("{mode} ({reason})"))
}

/// How long ago a moment was, by this machine's clock.
fn ago(at_ms: u64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    match now.checked_sub(Duration::from_millis(at_ms)) {
        _ if at_ms == 0 => "never".to_owned(),
        Some(ago) => format!("{:.1} s ago", ago.as_secs_f32()),
        None => "just now".to_owned(),
    }
}
