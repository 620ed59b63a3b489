//! What a follower that stands still, or is gone, costs the writer: append rates with two followers, one of which is
//! healthy, stopped or dead. The followers are processes of their own, so that one can be stopped as a whole and
//! killed.

use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use towline::wal::{SyncPolicy, WalOptions};

use super::nodes::{Nodes, Settings};
use super::report::{Contest, Sample, Unit};
use super::{BATCH_OVERHEAD, Bench, Result};

/// What befalls the second follower before the clock starts.
#[derive(Clone, Copy)]
enum Fate {
    Healthy,
    Stopped,
    Dead,
}

const HEALTHY: &str = "both followers healthy";

pub(super) fn run(bench: &Bench) -> Result<()> {
    for size in bench.record_sizes(&[1024]) {
        let record = super::record(size);
        let count = bench.volume(256 << 20, 32 << 20) / size;
        Contest::new("stalled", size, Unit::RecordsPerSecond)
            .among_ours()
            .with_memory_in_use(4 * count * (size + BATCH_OVERHEAD))
            .ours(HEALTHY, &[], || append(bench, &record, count, Fate::Healthy))
            .ours_if_able("one of two followers stopped", &[HEALTHY], || append(bench, &record, count, Fate::Stopped))
            .ours("one of two followers dead", &[HEALTHY], || append(bench, &record, count, Fate::Dead))
            .run(bench)?;
    }
    Ok(())
}

fn append(bench: &Bench, record: &[u8], count: u64, fate: Fate) -> Result<Sample> {
    let segment_size = if bench.quick { 16 << 20 } else { 64 << 20 };
    let log_bytes = count * (record.len() as u64 + BATCH_OVERHEAD);
    let wal = WalOptions {
        sync: SyncPolicy::Never,
        spare_segments: usize::try_from(log_bytes / segment_size)? + 1,
        populate_ahead: segment_size,
        ..WalOptions::default()
    };
    let settings = Settings { wal, ..Settings::with_segments_of(segment_size) };
    let (nodes, mut writer) = Nodes::start(bench, 0, settings)?;
    let (address, directory) = nodes.place_for_others();
    let healthy = Process::start(address, &directory.join("follower-1"), 1)?;
    let mut other = Process::start(address, &directory.join("follower-2"), 2)?;
    nodes.wait_connected(2)?;
    match fate {
        Fate::Healthy => {}
        Fate::Stopped => other.stop()?,
        Fate::Dead => other.kill()?,
    }
    let sample = super::append::timed(count, || {
        for _ in 0..count {
            writer.append(record)?;
        }
        Ok(())
    });
    drop((healthy, other));
    sample
}

/// A follower. Killed when it is dropped.
struct Process(Child);

impl Process {
    fn start(leader: &str, directory: &Path, node: u64) -> Result<Process> {
        let child = Command::new(std::env::current_exe()?)
            .args(["follower", "--log-only", "--max-wal-bytes", "0", "--leader", leader])
            .args(["--node-id", &node.to_string(), "--dir"])
            .arg(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Process(child))
    }

    /// Stops it where it is; it keeps its sockets, and reads nothing.
    fn stop(&self) -> Result<()> {
        let stopped = Command::new("kill").args(["-STOP", &self.0.id().to_string()]).status()?;
        if stopped.success() { Ok(()) } else { Err(format!("the follower was not stopped: {stopped}").into()) }
    }

    fn kill(&mut self) -> io::Result<()> {
        self.0.kill()?;
        self.0.wait().map(drop)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            log::warn!("a follower was not ended: {error}");
        }
    }
}
