//! `towline repair`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use towline::ShardId;
use towline::repair::{MendedRange, Repair as Repairing, RepairReport, ShardRepair};
use towline::status::json_text as text;
use towline::wal::scan::Problem;

use super::{DONE, FOUND_DAMAGE, Outcome};

/// Repair the damaged log of a stopped node with the bytes that another node still has.
///
/// The other node is its leader, or any follower that was started with --listen; a leader's log is repaired from a
/// follower. Just the damaged ranges are fetched. They are put in place only if they fit the log's running checksum
/// before and behind the damage, whole segments at a time: a crash on the way leaves old segments or repaired ones. If
/// the other node has another history, or not enough of it any more, nothing is changed.
///
/// A torn tail, which a crash leaves, is not damage: the node cuts it when it starts. `towline verify` shows what is
/// damaged without asking anybody.
///
/// Ends with 0 if the log is sound now, with 3 if it is damaged and this peer could not help, or if --dry-run found
/// something to repair, with 1 if the peer could not be reached or refused, with 2 for wrong usage.
///
/// Example:  towline repair /var/lib/towline --from 10.0.0.2:7400 --dry-run
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Repair {
    /// Data directory of the stopped node
    dir: PathBuf,
    /// Address of a running node that holds the same log
    #[arg(long, value_name = "ADDR")]
    from: String,
    /// The one shard to repair [default: all]
    #[arg(long, value_name = "SHARD")]
    shard: Option<u16>,
    /// Fetch and check everything, and put nothing in place
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Seconds to wait for the peer, each time
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
}

impl Repair {
    pub(super) fn run(self) -> Outcome {
        let repairing = Repairing {
            shard: self.shard.map(ShardId),
            dry_run: self.dry_run,
            timeout: Duration::from_secs(self.timeout),
            ..Repairing::new(&self.dir)
        };
        let report = repairing.run(super::tcp().as_ref(), &self.from)?;
        if self.json {
            say!("{}", to_json(&report, self.dry_run));
        } else {
            report.shards.iter().for_each(|shard| self.print(shard));
        }
        Ok(if report.is_sound() { DONE } else { FOUND_DAMAGE })
    }

    fn print(&self, shard: &ShardRepair) {
        let done = if self.dry_run { "would be repaired" } else { "repaired" };
        let number = shard.shard;
        for MendedRange { path, offset, len, lsn, reason, fetched } in &shard.ranges {
            let how = if *fetched { format!("{len} bytes from {}", self.from) } else { format!("{len} bytes zeroed") };
            say!("shard {number}: {} at offset {offset} (LSN {lsn}) {done}, {how}: {reason}", path.display());
        }
        if shard.ranges.is_empty() || !self.dry_run {
            for problem in &shard.remaining {
                say!("shard {number}: {problem}");
            }
        }
        let bytes: u64 = shard.ranges.iter().filter(|range| range.fetched).map(|range| range.len).sum();
        let what = match shard.ranges.len() {
            0 => "nothing to repair".to_owned(),
            1 => format!("1 range {done}, {} fetched", super::human_bytes(bytes)),
            count => format!("{count} ranges {done}, {} fetched", super::human_bytes(bytes)),
        };
        say!("shard {number}: {what}; the log reads up to LSN {}", shard.head);
    }
}

fn to_json(report: &RepairReport, dry_run: bool) -> String {
    let shards: Vec<_> = report.shards.iter().map(shard_json).collect();
    format!("{{\"sound\":{},\"dry_run\":{dry_run},\"shards\":[{}]}}", report.is_sound(), shards.join(","))
}

fn shard_json(shard: &ShardRepair) -> String {
    let ranges: Vec<_> = shard
        .ranges
        .iter()
        .map(|range| {
            format!(
                "{{\"path\":{},\"offset\":{},\"len\":{},\"lsn\":{},\"fetched\":{},\"reason\":{}}}",
                text(&range.path.display().to_string()),
                range.offset,
                range.len,
                range.lsn,
                range.fetched,
                text(&range.reason)
            )
        })
        .collect();
    let list = |problems: &[Problem]| {
        let problems: Vec<_> = problems.iter().map(|problem| text(&problem.to_string())).collect();
        problems.join(",")
    };
    format!(
        "{{\"shard\":{},\"head\":{},\"problems\":[{}],\"ranges\":[{}],\"remaining\":[{}]}}",
        shard.shard,
        shard.head,
        list(&shard.problems),
        ranges.join(","),
        list(&shard.remaining)
    )
}
