//! `towline inspect`.

use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use towline::data_dir::DataDir;
use towline::types::shard_directory_name;
use towline::wal::scan::{LogReport, SegmentReport, Visit, verify_log};
use towline::wal::{Batch, LogIdentity};
use towline::{Manifest, ShardId};

use super::{DONE, FOUND_DAMAGE, Outcome, human_bytes};

/// Show what a node's directory holds: manifest, segments, marks, and with --records every record.
///
/// Never writes, and decodes as much as it can of a damaged log: behind damage it goes on at the next batch that is
/// whole. Ends with 3 if there is damage.
///
/// Example:  towline inspect /var/lib/towline --shard 0 --records
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Inspect {
    /// Data directory of a node
    dir: PathBuf,
    /// Only this shard
    #[arg(long)]
    shard: Option<u16>,
    /// Print every batch and record
    #[arg(long)]
    records: bool,
    /// Print JSON: one object a line for each record (with --records) and one for the summary
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub(super) fn run(self) -> Outcome {
        let manifest = DataDir::read_manifest(&self.dir)?;
        let shards = match self.shard {
            Some(shard) if shard >= manifest.shard_count => {
                return Err(format!(
                    "there is no shard {shard}: the node has {}, numbered from 0",
                    manifest.shard_count
                )
                .into());
            }
            Some(shard) => vec![ShardId(shard)],
            None => (0..manifest.shard_count).map(ShardId).collect(),
        };
        if !self.json {
            print_manifest(&self.dir, &manifest);
        }
        let mut reports = Vec::new();
        for shard in shards {
            let identity = LogIdentity {
                cluster: manifest.cluster,
                region: manifest.region,
                shard,
                segment_size: manifest.segment_size,
            };
            let mut printer = Printer::new(&self, shard);
            let report = verify_log(
                &self.dir.join(shard_directory_name(shard)),
                Some(&identity),
                super::known_synced(&self.dir, &manifest, shard)?,
                &mut printer,
            )?;
            printer.finish()?;
            if !self.json {
                print_report(shard, &report);
            }
            reports.push((shard, report));
        }
        if self.json {
            say!("{}", to_json(&manifest, &reports));
        }
        let damaged = reports.iter().any(|(_, report)| !report.is_sound());
        Ok(if damaged { FOUND_DAMAGE } else { DONE })
    }
}

/// Prints batches and records as they are come across.
struct Printer {
    shard: ShardId,
    records: bool,
    json: bool,
    out: std::io::BufWriter<std::io::Stdout>,
    failure: Option<std::io::Error>,
}

impl Printer {
    fn new(command: &Inspect, shard: ShardId) -> Printer {
        let out = std::io::BufWriter::new(std::io::stdout());
        Printer { shard, records: command.records, json: command.json, out, failure: None }
    }

    fn print(&mut self, offset: u64, batch: Batch<'_>) -> std::io::Result<()> {
        let header = batch.header;
        if !self.json {
            let says = if header.is_compact() { "compact".to_owned() } else { format!("synced {}", header.synced_lsn) };
            writeln!(
                self.out,
                "batch at {offset}: LSN {} to {}, epoch {}, {} bytes, chain {:08x} to {:08x}, {says}, {} ms{}",
                header.first_lsn,
                header.last_lsn(),
                header.epoch,
                header.body_len,
                header.prev_crc.get(),
                header.crc.get(),
                header.timestamp.unix_ms(),
                if header.is_sealing() { ", sealing" } else { "" }
            )?;
        }
        for record in batch.records() {
            let text = String::from_utf8_lossy(record.bytes);
            if self.json {
                writeln!(
                    self.out,
                    "{{\"shard\":{},\"lsn\":{},\"bytes\":{},\"text\":{}}}",
                    self.shard,
                    record.lsn,
                    record.bytes.len(),
                    json_text(&text)
                )?;
            } else {
                writeln!(self.out, "  {} {:?}", record.lsn, text)?;
            }
        }
        Ok(())
    }

    fn finish(mut self) -> std::io::Result<()> {
        let flushed = if self.records { self.out.flush() } else { Ok(()) };
        match self.failure.map_or(flushed, Err) {
            // Whoever hangs up has seen enough, but damage is damage although nobody reads of it.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }
}

impl Visit for Printer {
    fn batch(&mut self, _path: &Path, offset: u64, batch: Batch<'_>) {
        if self.records && self.failure.is_none() {
            self.failure = self.print(offset, batch).err();
        }
    }
}

fn print_manifest(directory: &Path, manifest: &Manifest) {
    say!(
        "{}: cluster {}, node {}, region {}, epoch {}, {} shards, segments of {}",
        directory.display(),
        manifest.cluster,
        manifest.node,
        manifest.region,
        manifest.epoch,
        manifest.shard_count,
        human_bytes(manifest.segment_size)
    );
}

fn print_report(shard: ShardId, report: &LogReport) {
    say!(
        "shard {shard}: LSN {} to {}, {} records in {} batches, at least LSN {} synced, chain {:08x}",
        report.tail,
        report.head,
        report.records,
        report.batches,
        report.synced,
        report.chain.get()
    );
    for segment in &report.segments {
        say!("  {}", describe_segment(segment));
    }
    for problem in &report.problems {
        say!("  {problem}");
    }
}

fn describe_segment(segment: &SegmentReport) -> String {
    let name = segment.path.file_name().unwrap_or_default().to_string_lossy();
    match &segment.header {
        Ok(header) => format!(
            "{name}: epoch {}, {} records to LSN {}, {} of {} bytes used, {}",
            header.epoch,
            segment.records,
            segment.last_lsn,
            segment.end,
            segment.file_len,
            if segment.sealed { "sealed" } else { "open" }
        ),
        Err(reason) => format!("{name}: {reason}"),
    }
}

fn to_json(manifest: &Manifest, reports: &[(ShardId, LogReport)]) -> String {
    let mut json = format!(
        "{{\"cluster\":\"{}\",\"node\":{},\"region\":{},\"epoch\":{},\"shard_count\":{},\"segment_size\":{},\"shards\":[",
        manifest.cluster, manifest.node, manifest.region, manifest.epoch, manifest.shard_count, manifest.segment_size
    );
    for (index, (shard, report)) in reports.iter().enumerate() {
        let _ = write!(
            json,
            "{}{{\"shard\":{shard},\"tail\":{},\"head\":{},\"records\":{},\"batches\":{},\"synced\":{},\"chain\":\"{:08x}\",\"segments\":[",
            if index == 0 { "" } else { "," },
            report.tail,
            report.head,
            report.records,
            report.batches,
            report.synced,
            report.chain.get()
        );
        for (index, segment) in report.segments.iter().enumerate() {
            let _ = write!(
                json,
                "{}{{\"file\":{},\"records\":{},\"last_lsn\":{},\"end\":{},\"sealed\":{}}}",
                if index == 0 { "" } else { "," },
                json_text(&segment.path.file_name().unwrap_or_default().to_string_lossy()),
                segment.records,
                segment.last_lsn,
                segment.end,
                segment.sealed
            );
        }
        json.push_str("],\"problems\":[");
        for (index, problem) in report.problems.iter().enumerate() {
            let _ = write!(json, "{}{}", if index == 0 { "" } else { "," }, json_text(&problem.to_string()));
        }
        json.push_str("]}");
    }
    json.push_str("]}");
    json
}

fn json_text(text: &str) -> String {
    towline::status::json_text(text)
}
