//! Records that nobody waits for.
//!
//! Ours, four ways: *pages ready* has one segment that holds everything, every page of it writable before the clock
//! starts, so that only the append path is measured; *spares ready* has the segments prepared and takes page faults as
//! it goes; *defaults* is what a user gets who appends without pause, preparing and background syncs included; *at its
//! bound* is the log of a leader that has reached the size that it may have, and gives up a segment for each that it
//! takes.

use std::cell::RefCell;
use std::path::Path;
use std::time::{Duration, Instant};

use towline::wal::{LogIdentity, LogWriter, SyncPolicy, Wal, WalOptions};
use towline::{ClusterId, Epoch, Leader, Node, RegionId, ShardId};

use super::limits::{self, MappedFile};
use super::machine::{self, Usage};
use super::report::{Contest, Sample, Unit};
use super::{BATCH_OVERHEAD, Bench, Result, Scratch};

pub(super) fn run(bench: &Bench) -> Result<()> {
    for size in bench.record_sizes(&[128, 1024, 16 * 1024]) {
        let count = bench.volume(256 << 20, 32 << 20) / size;
        let record = super::record(size);
        let scratch = bench.scratch("append")?;
        let len = limits::slot_len(record.len()) * usize::try_from(count)?;
        let mut mapped = MappedFile::zeroed_in_pages(&scratch.path().join("mapped"), len)?;
        let mut mapped_fresh = MappedFile::zeroed_in_pages(&scratch.path().join("fresh"), len)?;
        let file = limits::zeroed_file(&scratch.path().join("written"), len)?;
        let log_bytes = count * (size + BATCH_OVERHEAD);
        let bounded = if bench.quick { None } else { Some(Bounded::new(bench, &record)?) };
        let contest = Contest::new("append", size, Unit::RecordsPerSecond)
            // Segments, and the spares that replace them.
            .with_memory_in_use(2 * log_bytes)
            .bare("store to writable pages", || {
                mapped.make_fresh()?;
                mapped.make_writable();
                timed(count, || filled(limits::append(mapped.bytes_mut(), &record, count), len))
            })
            .ours("pages ready", &["store to writable pages"], || {
                let ready = Ready { segments: 1, populate: true, default: false };
                ours(bench, &record, count, log_bytes, ready)
            })
            .bare("store to fresh pages", || {
                mapped_fresh.make_fresh()?;
                timed(count, || filled(limits::append(mapped_fresh.bytes_mut(), &record, count), len))
            })
            .ours("spares ready", &["store to writable pages", "store to fresh pages"], || {
                let ready = Ready { segments: 4, populate: false, default: false };
                ours(bench, &record, count, log_bytes, ready)
            })
            .bare("pwrite", || {
                file.sync_data()?;
                timed(count, || Ok(limits::append_with_pwrite(&file, &record, count)?))
            })
            .ours("defaults", &["store to fresh pages", "pwrite"], || {
                let ready = Ready { segments: 6, populate: false, default: true };
                ours(bench, &record, count, log_bytes, ready)
            });
        match &bounded {
            // The file is written over as well.
            Some(bounded) => contest.ours("at its bound", &["pwrite"], || bounded.append(count)).run(bench)?,
            None => contest.run(bench)?,
        }
    }
    Ok(())
}

/// Whether a bare program did all its work.
fn filled(bytes: usize, len: usize) -> Result<()> {
    if bytes == len { Ok(()) } else { Err(format!("{bytes} of {len} bytes were filled").into()) }
}

/// Records per second of something that appends `count`.
pub(super) fn timed(count: u64, run: impl FnOnce() -> Result<()>) -> Result<Sample> {
    let usage = Usage::now();
    let began = Instant::now();
    run()?;
    let seconds = began.elapsed().as_secs_f64();
    Ok(Sample::new(count as f64 / seconds).with("cpu_us_per_record", usage.cpu_us_per_record(count)))
}

/// How much is prepared before the clock starts.
struct Ready {
    /// Segments that the records fill.
    segments: u64,
    /// Every page of the first is writable.
    populate: bool,
    /// Default settings but for the segments' size: two spares, background syncs.
    default: bool,
}

fn ours(bench: &Bench, record: &[u8], count: u64, log_bytes: u64, ready: Ready) -> Result<Sample> {
    let segment_size = (log_bytes / ready.segments + (1 << 20)).next_multiple_of(4096).min(1 << 30);
    let options = if ready.default {
        WalOptions::default()
    } else {
        WalOptions {
            sync: SyncPolicy::Never,
            spare_segments: usize::try_from(ready.segments)?,
            populate_ahead: segment_size,
            ..WalOptions::default()
        }
    };
    let scratch = bench.scratch("append-ours")?;
    let (wal, mut writer) = open(scratch.path(), segment_size, options)?;
    wal.log().wait_for_spares(None)?;
    if ready.populate {
        let before = machine::resident_bytes();
        writer.append(record)?;
        // The spare that replaces the one taken, so that preparing it does not run beside the clock.
        wal.log().wait_for_spares(None)?;
        wait_until_resident(before, segment_size);
    }
    timed(count, || {
        for _ in 0..count {
            writer.append(record)?;
        }
        Ok(())
    })
}

/// The most bytes of the log of [`Bounded`].
const BOUND: u64 = 512 << 20;

/// A leader, and the writer of its log, which has reached its bound.
struct Bounded<'a> {
    writer: RefCell<LogWriter>,
    record: &'a [u8],
    _leader: Leader,
    _scratch: Scratch,
}

impl<'a> Bounded<'a> {
    fn new(bench: &Bench, record: &'a [u8]) -> Result<Bounded<'a>> {
        let scratch = bench.scratch("append-bounded")?;
        let leader = Node::builder(scratch.path()).max_wal_bytes(BOUND).lead("127.0.0.1:0")?;
        let bounded =
            Bounded { writer: RefCell::new(leader.writer(ShardId(0))?), record, _leader: leader, _scratch: scratch };
        bounded.append(BOUND / record.len() as u64)?;
        Ok(bounded)
    }

    fn append(&self, count: u64) -> Result<Sample> {
        let mut writer = self.writer.borrow_mut();
        // After a pause, nothing waits to be filled again.
        for _ in 0..count / 4 {
            writer.append(self.record)?;
        }
        timed(count, || {
            for _ in 0..count {
                writer.append(self.record)?;
            }
            Ok(())
        })
    }
}

/// Opens a log of its own, for measuring.
pub(super) fn open(directory: &Path, segment_size: u64, options: WalOptions) -> towline::Result<(Wal, LogWriter)> {
    let identity = LogIdentity { cluster: ClusterId(1), region: RegionId(0), shard: ShardId(0), segment_size };
    let (wal, mut writer) = Wal::open(directory, identity, options)?;
    writer.set_epoch(Epoch::FIRST)?;
    Ok((wal, writer))
}

/// Waits until the pages that were asked for are there, as far as the system tells.
fn wait_until_resident(before: Option<u64>, bytes: u64) {
    let Some(before) = before else { return };
    let deadline = Instant::now() + Duration::from_secs(10);
    while machine::resident_bytes().is_some_and(|now| now < before + bytes / 100 * 98) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}
