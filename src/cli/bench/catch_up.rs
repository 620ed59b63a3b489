//! A follower that joins late: from nothing to everything applied, its directory and segments made on the way.

use std::fs::File;
use std::time::Instant;

use super::limits::MappedFile;
use super::nodes::{Nodes, Settings};
use super::recover::rate;
use super::report::{Contest, Unit};
use super::{Bench, Result, streams};

const TO_MAPPING: &str = "stream into a written mapping with checksum";
const TO_FILE: &str = "stream into a new file with checksum";
/// As a follower's segments are.
#[cfg(target_os = "linux")]
const TO_ALLOCATED: &str = "stream into a new file given its blocks, with checksum";

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
        to.make_fresh()?;
        let to_file = |prepare: &dyn Fn(&File) -> Result<()>| {
            let mut file = File::create(path("new"))?;
            let began = Instant::now();
            prepare(&file)?;
            streams::stream_to_file(&from, &mut file)?;
            let sample = rate(bytes, began);
            std::fs::remove_file(path("new"))?;
            Ok(sample)
        };
        let contest = Contest::new("catch-up", size, Unit::MegabytesPerSecond)
            // What arrives, and the spares of who receives it.
            .with_memory_in_use(u64::try_from(len)? + 2 * segment_size)
            .bare(TO_MAPPING, || {
                let began = Instant::now();
                streams::stream_checked(&from, to.bytes_mut())?;
                let sample = rate(bytes, began);
                // Not only before the next round: as much more to be written back would have the system begin with
                // that while others write.
                to.make_fresh()?;
                Ok(sample)
            })
            .bare(TO_FILE, || to_file(&|_| Ok(())));
        #[cfg(target_os = "linux")]
        let contest = contest.bare_if_able(TO_ALLOCATED, || {
            to_file(&|file| {
                let flags = rustix::fs::FallocateFlags::KEEP_SIZE;
                Ok(rustix::fs::fallocate(file, flags, 0, u64::try_from(len)?)?)
            })
        });
        let against = [
            TO_MAPPING,
            TO_FILE,
            #[cfg(target_os = "linux")]
            TO_ALLOCATED,
        ];
        contest
            .ours("new follower", &against, || {
                let began = Instant::now();
                nodes.add_follower()?;
                nodes.wait_applied(last)?;
                let sample = rate(bytes, began);
                nodes.remove_follower()?;
                Ok(sample)
            })
            .run(bench)?;
    }
    Ok(())
}
