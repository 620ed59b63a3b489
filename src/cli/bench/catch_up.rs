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
        let (mut nodes, mut writer) = Nodes::start(bench, 0, Settings::with_segments_of(segment_size))?;
        let mut last = writer.end().head;
        for _ in 0..count {
            last = writer.append(&record)?;
        }
        nodes.leader_log()?.wait_synced(last, None)?;
        let bytes = count * size;
        let scratch = bench.scratch("catch-up")?;
        let path = |name| scratch.path().join(name);
        let len = usize::try_from(bytes)?;
        let mut from = MappedFile::zeroed_in_pages(&path("from"), len)?;
        from.make_writable();
        let mut to = MappedFile::zeroed_in_pages(&path("to"), len)?;
        Contest::new("catch-up", size, Unit::MegabytesPerSecond)
            .bare("stream into a written mapping with checksum", || {
                to.make_fresh()?;
                let began = Instant::now();
                streams::stream_checked(from.bytes(), to.bytes_mut())?;
                Ok(rate(bytes, began))
            })
            .bare("stream into a new file with checksum", || {
                let mut file = File::create(path("new"))?;
                let began = Instant::now();
                streams::stream_to_file(from.bytes(), &mut file)?;
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
