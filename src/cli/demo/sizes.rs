//! What is measured while a scenario runs: the size of a node's logs on disk, and the memory of this process.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use towline::ShutdownSignal;

/// How often the size is looked at.
const EVERY: Duration = Duration::from_millis(100);

/// Watches how much room a node's logs take, as `du` would.
pub(super) struct LogSize {
    stop: ShutdownSignal,
    thread: JoinHandle<u64>,
}

impl LogSize {
    /// Watches from now on.
    pub(super) fn watch(node: &Path, shards: u16) -> std::io::Result<LogSize> {
        let stop = ShutdownSignal::new();
        let directories: Vec<PathBuf> =
            (0..shards).map(|shard| node.join(towline::types::shard_directory_name(towline::ShardId(shard)))).collect();
        let over = stop.clone();
        let thread = std::thread::Builder::new().name("size".to_owned()).spawn(move || {
            let mut peak = 0;
            loop {
                peak = peak.max(directories.iter().map(|directory| used_bytes(directory)).sum());
                if over.wait_timeout(EVERY) {
                    return peak;
                }
            }
        })?;
        Ok(LogSize { stop, thread })
    }

    /// The most bytes seen.
    pub(super) fn peak_bytes(self) -> u64 {
        self.stop.shutdown();
        self.thread.join().unwrap_or(u64::MAX)
    }
}

/// Bytes that the files of a directory take on the disk. Files come and go meanwhile.
fn used_bytes(directory: &Path) -> u64 {
    let Ok(files) = directory.read_dir() else { return 0 };
    files.filter_map(|file| file.ok()?.metadata().ok()).map(|metadata| on_disk(&metadata)).sum()
}

#[cfg(unix)]
fn on_disk(metadata: &std::fs::Metadata) -> u64 {
    // Room of a new file may not have been chosen yet; it counts all the same.
    metadata.len().max(std::os::unix::fs::MetadataExt::blocks(metadata) * 512)
}

#[cfg(not(unix))]
fn on_disk(metadata: &std::fs::Metadata) -> u64 {
    metadata.len()
}

/// The most memory that this process has had for itself, in bytes: without pages of files. `None` where the system does
/// not say.
pub(super) fn anonymous_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}
