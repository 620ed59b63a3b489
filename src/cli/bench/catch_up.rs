//! A follower that joins late: from nothing to everything applied, its directory and segments made on the way.

use std::fs::File;
use std::time::Instant;

use super::limits::MappedFile;
use super::nodes::{Nodes, Settings};
use super::recover::rate;
use super::report::{Contest, Unit};
use super::{Bench, Result, streams};

pub(super) fn run(bench: &Bench) -> Result<()> {
    for size in bench.record_sizes(&[1024]) {
        let count = bench.volume(1 << 30, 64 << 20) / size;
        let record = super::record(size);
        let segment_size = if bench.quick { 16 << 20 } else { 64 << 20 };
        // Once a follower has everything, the leader would give up what the next one begins with.
        let settings = Settings { keeps_log: true, ..Settings::with_segments_of(segment_size) };
        let (mut nodes, mut writer) = Nodes::start(bench, 0, settings)?;
        let mut last = writer.end().head;
        for _ in 0..count {
            last = writer.append(&record)?;
        }
        nodes.leader_log()?.wait_synced(last, None)?;
        nodes.wait_for_spares()?;
        let bytes = count * size;
        let scratch = bench.scratch("catch-up")?;
        let path = |name| scratch.path().join(name);
        // The bare programs stream the same bytes from the same files.
        let segments = nodes.leader_log()?.segments();
        let from = segments.iter().map(|segment| segment.bytes(0..segment.published()));
        let from = from.collect::<towline::Result<Vec<_>>>()?;
        let len = from.iter().map(|part| part.len()).sum();
        let mut to = MappedFile::zeroed_in_pages(&path("to"), len)?;
        Contest::new("catch-up", size, Unit::MegabytesPerSecond)
            .bare("stream into a written mapping with checksum", || {
                to.make_fresh()?;
                let began = Instant::now();
                streams::stream_checked(&from, to.bytes_mut())?;
                Ok(rate(bytes, began))
            })
            .bare("stream into a new file with checksum", || {
                let mut file = File::create(path("new"))?;
                let began = Instant::now();
                streams::stream_to_file(&from, &mut file)?;
                let sample = rate(bytes, began);
                std::fs::remove_file(path("new"))?;
                Ok(sample)
            })
            .ours(
                "new follower",
                &["stream into a written mapping with checksum", "stream into a new file with checksum"],
                || {
                    let began = Instant::now();
                    nodes.add_follower()?;
                    nodes.wait_applied(last)?;
                    let sample = rate(bytes, began);
                    nodes.remove_follower()?;
                    Ok(sample)
                },
            )
            .run(bench)?;
    }
    Ok(())
}
