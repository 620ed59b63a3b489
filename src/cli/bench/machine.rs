//! What the machine and this process tell about themselves. Linux has most of it in `/proc` and `/sys`; elsewhere these
//! are `None` and what depends on them is left out.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Puts so many bytes of memory in use as a file of `directory` has it, and gives them back, so that files that are
/// written next find memory that was in use just before.
///
/// Bare programs mostly write to files that they have written before, while Towline makes new ones. On a virtual machine
/// whose host gives memory page by page, and is given free memory back, the first use of a page is the host's work and
/// costs many times what is measured: writing 1 GiB took 0.2 seconds where it was measured into memory used just before,
/// and 0.8 to 2 into other.
pub(super) fn use_memory(directory: &Path, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let path = directory.join("memory");
    let mut file = File::create(&path)?;
    // The system keeps free memory in pieces too, and takes the small ones first. Of pieces of 4 or 64 KiB some of what
    // is written next was not in use before.
    let piece = vec![0; 256 << 10];
    for _ in 0..bytes.div_ceil(piece.len() as u64) {
        file.write_all(&piece)?;
    }
    drop(file);
    std::fs::remove_file(path)
}

/// What the process has used so far.
#[derive(Clone, Copy, Default)]
pub(super) struct Usage {
    /// User and system time of all threads, also of those that have ended, in seconds.
    cpu_seconds: Option<f64>,
}

impl Usage {
    pub(super) fn now() -> Usage {
        Usage { cpu_seconds: cpu_seconds() }
    }

    /// Seconds of processor time since then.
    pub(super) fn cpu_seconds_since(self) -> Option<f64> {
        Some(cpu_seconds()? - self.cpu_seconds?)
    }

    /// Microseconds of processor time for each of `records` since then. The clock ticks 100 times a second: a result
    /// from fewer than five ticks would be noise, and is none.
    pub(super) fn cpu_us_per_record(self, records: u64) -> Option<f64> {
        let used = self.cpu_seconds_since()?;
        (records > 0 && used >= 5.0 / TICKS_PER_SECOND).then_some(used * 1e6 / records as f64)
    }
}

const TICKS_PER_SECOND: f64 = 100.0;

fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in parentheses may hold anything, blanks and parentheses included.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some((ticks(11)? + ticks(12)?) as f64 / TICKS_PER_SECOND)
}

/// A field of `/proc/self/status` that is a number.
fn status_field(name: &str) -> Option<u64> {
    field(&std::fs::read_to_string("/proc/self/status").ok()?, name)
}

/// The number behind a name and a colon, on a line of its own.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Threads of this process.
pub(super) fn threads() -> Option<u64> {
    status_field("Threads")
}

/// Bytes of this process in memory, mapped files included.
pub(super) fn resident_bytes() -> Option<u64> {
    Some(status_field("VmRSS")? * 1024)
}

/// The most bytes of this process in memory so far, mapped files included.
pub(super) fn peak_resident_bytes() -> Option<u64> {
    Some(status_field("VmHWM")? * 1024)
}

/// Bytes in memory that belong to this process alone: heap and stacks, no files.
pub(super) fn anonymous_bytes() -> Option<u64> {
    Some(status_field("RssAnon")? * 1024)
}

/// What the threads have done so far whose names begin alike.
#[derive(Clone, Copy, Debug)]
pub(super) struct ThreadCounts {
    pub(super) threads: u64,
    /// Times that one of them went to sleep of its own accord: as many as it woke up.
    pub(super) wakes: u64,
    /// Calls of `read` and `write` and their like; those made for sockets alone, as `send` and `recv`, do not count.
    pub(super) io_calls: u64,
}

impl ThreadCounts {
    /// `None` where the system does not tell.
    pub(super) fn now(name: &str) -> Option<ThreadCounts> {
        let mut counts = ThreadCounts { threads: 0, wakes: 0, io_calls: 0 };
        for task in std::fs::read_dir("/proc/self/task").ok()?.flatten() {
            // One that has ended meanwhile has no files.
            let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
            if !read("comm").starts_with(name) {
                continue;
            }
            counts.threads += 1;
            counts.wakes += field(&read("status"), "voluntary_ctxt_switches").unwrap_or(0);
            let io = read("io");
            counts.io_calls += field(&io, "syscr").unwrap_or(0) + field(&io, "syscw").unwrap_or(0);
        }
        Some(counts)
    }
}

/// Bytes written so far to the device that holds `path`, by anyone. `None` where the file system is on no one device.
pub(super) fn device_bytes_written(path: &Path) -> Option<u64> {
    let (major, minor) = device_of(path)?;
    let stat = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    let sectors: u64 = stat.split_whitespace().nth(6)?.parse().ok()?;
    Some(sectors * 512)
}

#[cfg(target_os = "linux")]
fn device_of(path: &Path) -> Option<(u64, u64)> {
    use std::os::linux::fs::MetadataExt;
    let device = std::fs::metadata(path).ok()?.st_dev();
    let major = (device >> 8 & 0xfff) | (device >> 32 & !0xfff);
    let minor = (device & 0xff) | (device >> 12 & !0xff);
    Some((major, minor))
}

#[cfg(not(target_os = "linux"))]
fn device_of(_: &Path) -> Option<(u64, u64)> {
    None
}

/// The kind of file system that holds `path`.
fn file_system(path: &Path) -> Option<String> {
    let path = path.canonicalize().ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let fields = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let holding = fields.filter(|(mount, _)| path.starts_with(mount)).max_by_key(|(mount, _)| mount.len());
    Some(holding?.1.to_owned())
}

/// One line about where the figures come from.
pub(super) fn describe(directory: &Path) -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let system = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let file_system = file_system(directory).unwrap_or_else(|| "an unknown file system".to_owned());
    format!("{cores} cores, {} {} {}, {file_system}", std::env::consts::OS, system.trim_end(), std::env::consts::ARCH)
}

/// Whether files there live in memory only, so that syncing them measures nothing.
pub(super) fn is_in_memory(directory: &Path) -> bool {
    file_system(directory).is_some_and(|kind| kind == "tmpfs" || kind == "ramfs")
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_there() {
        assert!(threads().unwrap() >= 1);
        assert!(resident_bytes().unwrap() > anonymous_bytes().unwrap());
        assert!(cpu_seconds().unwrap() >= 0.0);
        let wakes = std::thread::Builder::new().name("sleeper".to_owned()).spawn(|| {
            let before = ThreadCounts::now("sleeper").unwrap();
            (0..5).for_each(|_| std::thread::sleep(std::time::Duration::from_millis(1)));
            let after = ThreadCounts::now("sleeper").unwrap();
            assert_eq!((before.threads, after.threads), (1, 1));
            after.wakes - before.wakes
        });
        assert!(wakes.unwrap().join().unwrap() >= 5);
        assert!(file_system(Path::new("/proc/self")).is_some_and(|kind| kind == "proc"));
    }
}
