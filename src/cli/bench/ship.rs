//! Leader to follower, live: from the first append to the last record applied at the follower, or at one that follows
//! that one.

use std::cell::RefCell;
use std::fs::File;
use std::time::Instant;

use towline::wal::{SyncPolicy, WalOptions};

use super::limits::{self, MappedFile};
use super::machine::{self, Usage};
use super::nodes::{Nodes, Settings};
use super::recover::rate;
use super::report::{Contest, Sample, Unit};
use super::{BATCH_OVERHEAD, Bench, Result, streams};

const READY: &str = "append, stream, receive with checksum, pages writable";
const FRESH: &str = "append, stream, receive with checksum, fresh pages at both ends";
const PASSED_ON: &str = "append, stream, receive with checksum and pass on, receive with checksum, pages writable";
const WRITE: &str = "append to fresh pages, stream, receive with checksum and write to a file";

pub(super) fn run(bench: &Bench) -> Result<()> {
    for size in bench.record_sizes(if bench.quick { &[1024] } else { &[128, 1024, 16 * 1024] }) {
        // With pages ready ahead at both ends this is dirty four times over: more, and the system begins to write it
        // back while the clock runs.
        let count = bench.volume(96 << 20, 32 << 20) / size;
        let record = super::record(size);
        let bytes = count * size;
        let scratch = bench.scratch("ship")?;
        let len = limits::slot_len(record.len()) * usize::try_from(count)?;
        let mapped = |name| MappedFile::zeroed_in_pages(&scratch.path().join(name), len);
        let (log, copy) = (RefCell::new(mapped("log")?), RefCell::new(mapped("copy")?));
        let (mut from, mut to) = (mapped("from")?, mapped("to")?);
        let segment_size = ((count * (size + BATCH_OVERHEAD)) / 4 + (1 << 20)).next_multiple_of(4096).min(64 << 20);
        // Twice as many as are used: replenishing begins when half are gone.
        let spare_segments = 2 * (usize::try_from(count * (size + BATCH_OVERHEAD) / segment_size)? + 2);
        // Segments and spares of a leader, and of each follower.
        let log_bytes = |nodes: u64| 2 * nodes * count * (size + BATCH_OVERHEAD);
        let ready = |followers| {
            let wal = WalOptions {
                sync: SyncPolicy::Never,
                spare_segments,
                populate_ahead: segment_size,
                ..WalOptions::default()
            };
            let in_a_chain = followers > 1;
            let settings = Settings { wal, in_a_chain, ..Settings::with_segments_of(segment_size) };
            ours(bench, followers, settings, &record, count)
        };
        Contest::new("ship", size, Unit::MegabytesPerSecond)
            .with_memory_in_use(log_bytes(2))
            .bare(READY, || {
                let (mut log, mut copy) = (log.borrow_mut(), copy.borrow_mut());
                log.make_writable();
                copy.make_writable();
                let (usage, began) = (Usage::now(), Instant::now());
                streams::append_and_stream(log.bytes_mut(), copy.bytes_mut(), &record)?;
                Ok(rate(bytes, began).with("cpu_us_per_record", usage.cpu_us_per_record(count)))
            })
            .bare("stream only, pages writable", || {
                from.make_writable();
                to.make_writable();
                let began = Instant::now();
                streams::stream(from.bytes(), to.bytes_mut())?;
                Ok(rate(bytes, began))
            })
            .bare(FRESH, || {
                let (mut log, mut copy) = (log.borrow_mut(), copy.borrow_mut());
                log.make_fresh()?;
                copy.make_fresh()?;
                let began = Instant::now();
                streams::append_and_stream(log.bytes_mut(), copy.bytes_mut(), &record)?;
                Ok(rate(bytes, began))
            })
            .bare(WRITE, || {
                let mut log = log.borrow_mut();
                log.make_fresh()?;
                let mut file = File::create(scratch.path().join("received"))?;
                let began = Instant::now();
                streams::append_and_stream_to_file(log.bytes_mut(), &mut file, &record)?;
                Ok(rate(bytes, began))
            })
            .ours("spares ready", &[READY, "stream only, pages writable", FRESH], || ready(1))
            .ours("defaults", &[FRESH, WRITE], || {
                ours(bench, 1, Settings::with_segments_of(segment_size), &record, count)
            })
            .run(bench)?;
        if bench.quick {
            continue;
        }
        let mut passed_on = mapped("passed-on")?;
        Contest::new("ship", size, Unit::MegabytesPerSecond)
            .with_memory_in_use(log_bytes(3))
            .bare(PASSED_ON, || {
                let (mut log, mut copy) = (log.borrow_mut(), copy.borrow_mut());
                log.make_writable();
                copy.make_writable();
                passed_on.make_writable();
                let began = Instant::now();
                streams::append_and_pass_on(log.bytes_mut(), copy.bytes_mut(), passed_on.bytes_mut(), &record)?;
                Ok(rate(bytes, began))
            })
            .ours("through a follower, spares ready", &[PASSED_ON], || ready(2))
            .run(bench)?;
    }
    Ok(())
}

fn ours(bench: &Bench, followers: u16, settings: Settings, record: &[u8], count: u64) -> Result<Sample> {
    let (nodes, mut writer) = Nodes::start(bench, followers, settings)?;
    let (usage, began) = (Usage::now(), Instant::now());
    let mut last = writer.end().head;
    for _ in 0..count {
        last = writer.append(record)?;
    }
    let appended = began.elapsed();
    nodes.wait_applied(last)?;
    let megabyte = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64 / 1e6);
    Ok(rate(count * record.len() as u64, began)
        .with("append_share", Some(appended.as_secs_f64() / began.elapsed().as_secs_f64()))
        .with("cpu_us_per_record", usage.cpu_us_per_record(count))
        .with("threads", machine::threads().map(|threads| threads as f64))
        .with("rss_mb", megabyte(machine::resident_bytes()))
        .with("anonymous_mb", megabyte(machine::anonymous_bytes())))
}
