//! `towline verify`.

use std::path::{Path, PathBuf};

use clap::Args;
use towline::ShardId;
use towline::data_dir::{DataDir, Manifest};
use towline::types::shard_directory_name;
use towline::wal::LogIdentity;
use towline::wal::scan::{Comparison, ProblemKind, Relation, Side, Visit, compare_logs, verify_log};

use super::progress::Progress;
use super::{DONE, FAILED, FOUND_DAMAGE, Outcome};

/// Check every chain of a stopped node's log; with other directories, compare their logs with it, byte by byte.
///
/// Ends with 0 if everything is sound (and identical), with 1 if a log is sound and the same but shorter, and with 3
/// if there is damage or a difference; the first one is named by file, offset and LSN. Never writes: `towline repair`
/// mends what this finds.
///
/// Example:  towline verify /var/lib/towline /var/lib/towline-copy
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Verify {
    /// Data directory of a node
    dir: PathBuf,
    /// Data directories of other nodes, to be compared with the first
    others: Vec<PathBuf>,
}

impl Verify {
    pub(super) fn run(self) -> Outcome {
        let manifest = DataDir::read_manifest(&self.dir)?;
        let mut code = DONE;
        for directory in std::iter::once(&self.dir).chain(&self.others) {
            let own = DataDir::read_manifest(directory)?;
            if (own.cluster, own.shard_count) != (manifest.cluster, manifest.shard_count) {
                return Err(format!(
                    "{} has cluster {} with {} shards, {} has cluster {} with {}",
                    directory.display(),
                    own.cluster,
                    own.shard_count,
                    self.dir.display(),
                    manifest.cluster,
                    manifest.shard_count
                )
                .into());
            }
            for shard in (0..own.shard_count).map(ShardId) {
                let identity =
                    LogIdentity { cluster: own.cluster, region: own.region, shard, segment_size: own.segment_size };
                code = code.max(verify_shard(directory, &own, &identity)?);
            }
        }
        for other in &self.others {
            for shard in (0..manifest.shard_count).map(ShardId) {
                code = code.max(self.compare_shard(other, shard)?);
            }
        }
        Ok(code)
    }

    fn compare_shard(&self, other: &Path, shard: ShardId) -> Result<u8, towline::Error> {
        let of = |directory: &Path| directory.join(shard_directory_name(shard));
        let comparison = compare_logs(&of(&self.dir), &of(other))?;
        say!("{} shard {shard}: {}", other.display(), describe(&comparison));
        Ok(match comparison.relation {
            Relation::Identical => DONE,
            Relation::Ahead { .. } | Relation::Apart => FAILED,
            Relation::Diverged(_) => FOUND_DAMAGE,
        })
    }
}

/// How two logs stand to each other, in a sentence.
pub(super) fn describe(comparison: &Comparison) -> String {
    let bytes = super::human_bytes(comparison.equal_bytes);
    match &comparison.relation {
        Relation::Identical => format!("identical, LSN {} to {}, {bytes}", comparison.a.tail, comparison.a.head),
        Relation::Ahead { side, records } => format!(
            "the same for {bytes}, then {} has {records} records more (LSN {} and {})",
            if *side == Side::A { "the first" } else { "this one" },
            comparison.a.head,
            comparison.b.head
        ),
        Relation::Diverged(difference) => format!(
            "DIFFERENT from LSN {} on, at offset {} of {} and {}: {}",
            difference.lsn,
            difference.offset,
            difference.a.display(),
            difference.b.display(),
            difference.reason
        ),
        Relation::Apart => "no segment in common: nothing to compare".to_owned(),
    }
}

/// Passes progress on.
struct Watch(Progress);

impl Visit for Watch {
    fn progress(&mut self, done_bytes: u64, _total_bytes: u64) {
        self.0.set(done_bytes);
    }
}

/// Verifies one shard's chain and prints what was found.
fn verify_shard(directory: &Path, manifest: &Manifest, identity: &LogIdentity) -> Result<u8, towline::Error> {
    let path = directory.join(shard_directory_name(identity.shard));
    let bytes = towline::wal::scan::list_segments(&path)?.len() as u64 * identity.segment_size;
    let known = super::known_synced(directory, manifest, identity.shard)?;
    let report = verify_log(&path, Some(identity), known, &mut Watch(Progress::new("verifying", Some(bytes))))?;
    say!(
        "{} shard {}: LSN {} to {}, {} records in {} batches, {} segments, chain {:08x}{}",
        directory.display(),
        identity.shard,
        report.tail,
        report.head,
        report.records,
        report.batches,
        report.segments.len(),
        report.chain.get(),
        if report.problems.is_empty() { ": sound" } else { "" }
    );
    for problem in &report.problems {
        say!("  {problem}");
    }
    let harmless = |kind| matches!(kind, ProblemKind::TornTail | ProblemKind::Stray);
    Ok(if report.problems.iter().all(|problem| harmless(problem.kind)) { DONE } else { FOUND_DAMAGE })
}
