//! A log that is written, synced, sealed, released and recycled, and crashes at any moment, also while it is being
//! recovered.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use towline::seams::give_up_unsynced;
use towline::wal::{KnownSynced, LogIdentity, LogWriter, SyncPolicy, Wal, WalOptions, WrittenHere, scan};
use towline::{ClusterId, Epoch, Error, Lsn, RegionId, ShardId};

use super::disk::{Image, Moment, Observed};
use super::random::Random;
use super::{Count, records_of};

const SIZE: u64 = 64 * 1024;
/// Crashes of what a crash left, and so on.
const DEPTH: u32 = 3;

pub const IDENTITY: LogIdentity =
    LogIdentity { cluster: ClusterId(77), region: RegionId(1), shard: ShardId(2), segment_size: SIZE };

type Records = Vec<Rc<[u8]>>;

/// What is known of a log at the moment of a crash.
#[derive(Clone)]
struct Known {
    /// The record of each LSN, as far as any was written.
    written: Records,
    /// Up to here it was said to be synced.
    synced: u64,
    /// Up to here it was asked to be released.
    released: u64,
    epoch: Epoch,
}

struct Crash {
    moment: Moment,
    known: Known,
}

/// One log, from one crash to the next.
struct Life<'a> {
    random: Random,
    disk: &'a Observed,
    wal: Wal,
    writer: LogWriter,
    known: Known,
    /// The log that this one follows; none if it is written to directly.
    leader: Option<Rc<RefCell<Leader>>>,
    /// What had been synced when the trap was set.
    trapped: Option<u64>,
    /// Waits for spares now and then.
    is_orderly: bool,
    /// Steps in which nobody waits for a sync.
    careless: u64,
    /// It has a bound on its size: what is beyond goes, synced or not.
    is_bounded: bool,
}

/// Where a follower's bytes come from.
struct Leader {
    observed: Observed,
    wal: Wal,
    writer: LogWriter,
    written: Records,
    /// It syncs every batch.
    is_diligent: bool,
}

fn options(random: &mut Random) -> WalOptions {
    WalOptions {
        sync: random.pick(&[
            SyncPolicy::Group,
            SyncPolicy::Never,
            SyncPolicy::Never,
            SyncPolicy::EveryBatch,
            SyncPolicy::Interval(Duration::from_millis(1)),
        ]),
        spare_segments: 1 + random.index(5),
        populate_ahead: random.pick(&[0, 16 * 1024, 1 << 20]),
        ..WalOptions::default()
    }
}

/// A record like no other: what another life wrote at the same LSN differs, whatever the length.
fn record(random: &mut Random) -> Rc<[u8]> {
    let len = match random.below(20) {
        0 => 5000 + random.index(15_000),
        1..=4 => 500 + random.index(3000),
        _ => 1 + random.index(400),
    };
    let mut bytes = random.split();
    (0..len.div_ceil(8)).flat_map(|_| bytes.next().to_le_bytes()).take(len).collect()
}

/// Crashes one log and what becomes of it. Returns how many images that took.
pub fn run(seed: u64, count: &Count) {
    let mut random = Random(seed);
    let observed = Observed::new();
    let (wal, mut writer) = Wal::open(observed.path(), IDENTITY, options(&mut random)).unwrap();
    let leader = random.percent(30).then(|| Rc::new(RefCell::new(Leader::new(&mut random))));
    let is_orderly = random.percent(60);
    if leader.is_none() {
        writer.set_epoch(Epoch(1)).unwrap();
    }
    let known = Known { written: Vec::new(), synced: 0, released: 0, epoch: Epoch(1) };
    let is_bounded = random.percent(30);
    if is_bounded {
        // Such a log relies on the order of removals.
        observed.disk.keep_names_in_order();
    }
    let steps = 30 + random.below(90);
    let careless = if random.percent(30) { steps * 2 / 3 } else { 0 };
    let mut life = Life {
        random,
        disk: &observed,
        wal,
        writer,
        known,
        leader: leader.clone(),
        trapped: None,
        is_orderly,
        careless,
        is_bounded,
    };
    let crashes = life.live(steps, 5);
    let mut random = life.random.split();
    drop(life);
    for crash in crashes {
        for _ in 0..4 {
            check(&crash, &mut random.split(), leader.clone(), is_bounded, DEPTH, count);
        }
    }
}

impl Leader {
    fn new(random: &mut Random) -> Leader {
        let observed = Observed::new();
        let options = WalOptions { sync: SyncPolicy::Never, ..options(random) };
        let (wal, mut writer) = Wal::open(observed.path(), IDENTITY, options).unwrap();
        writer.set_epoch(Epoch(1)).unwrap();
        Leader { observed, wal, writer, written: Vec::new(), is_diligent: random.percent(60) }
    }

    fn append(&mut self, random: &mut Random) {
        if random.percent(4) {
            self.writer.set_epoch(Epoch(self.writer.end().epoch.0 + 1)).unwrap();
        }
        append(&mut self.writer, random, &mut self.written);
        if self.is_diligent {
            // What the batches to come say was synced was synced here, and not where they go.
            self.wal.log().wait_synced(self.wal.log().head(), None).unwrap();
        }
        self.observed.disk.events();
    }
}

/// Appends one batch.
fn append(writer: &mut LogWriter, random: &mut Random, written: &mut Records) {
    if random.percent(70) {
        let record = record(random);
        // First, because a crash may come within the call.
        written.push(Rc::clone(&record));
        assert_eq!(writer.append(&record).unwrap().get(), written.len() as u64);
    } else {
        let batch: Records = (0..1 + random.below(6)).map(|_| record(random)).collect();
        written.extend(batch.iter().cloned());
        assert_eq!(writer.append_batch(&batch).unwrap().get(), written.len() as u64);
    }
}

impl Life<'_> {
    /// Takes so many steps, and gives some crashes on the way.
    fn live(&mut self, steps: u64, crashes: usize) -> Vec<Crash> {
        let mut found = Vec::new();
        for step in 0..steps {
            self.step();
            // With all spares ready, a released segment's file is removed; else it becomes one of them.
            if self.is_orderly && self.random.percent(30) {
                self.wal.log().wait_for_spares(None).unwrap();
            }
            if let Some(moment) = self.disk.disk.caught() {
                let synced = self.trapped.take().unwrap_or(0);
                found.push(Crash { moment, known: Known { synced, ..self.known.clone() } });
            }
            let left = (crashes - found.len().min(crashes)) as u64;
            if self.random.below(steps - step) < left {
                if self.random.percent(60) {
                    let known = Known { synced: self.synced(), ..self.known.clone() };
                    found.push(Crash { moment: self.disk.disk.moment(), known });
                } else if self.trapped.is_none() {
                    self.trapped = Some(self.synced());
                    let events = self.random.below(5);
                    self.disk.disk.trap(events);
                }
            }
        }
        found
    }

    fn synced(&self) -> u64 {
        self.known.synced.max(self.wal.log().synced().load().get())
    }

    fn step(&mut self) {
        if self.is_bounded && self.random.percent(8) {
            return self.drop_unsynced();
        }
        if self.careless > 0 {
            self.careless -= 1;
            self.write();
            return;
        }
        match self.random.below(100) {
            0..60 => self.write(),
            60..75 => {
                let head = self.wal.log().head();
                let lsn = Lsn(self.known.synced + self.random.below(head.get() - self.known.synced + 1));
                match self.wal.log().wait_synced(lsn, None) {
                    Ok(()) => self.known.synced = self.known.synced.max(lsn.get()),
                    // Given up unsynced: nothing is said of it.
                    Err(Error::NotRetained { tail, .. }) if lsn < tail => {}
                    Err(error) => panic!("{error}"),
                }
            }
            75..87 => self.disk.disk.look(),
            87..92 => {
                if self.leader.is_none() {
                    self.known.epoch = Epoch(self.known.epoch.0 + 1);
                    self.writer.set_epoch(self.known.epoch).unwrap();
                }
            }
            _ => self.release(),
        }
    }

    fn release(&mut self) {
        // What is applied durably: at most what is synced.
        self.known.synced = self.synced();
        let lsn = self.random.below(self.known.synced + 1);
        self.known.released = self.known.released.max(lsn);
        self.wal.log().release_through(Lsn(lsn), "the test does not need it").unwrap();
    }

    /// As when the log has outgrown its bound: nobody waits for a sync.
    fn drop_unsynced(&mut self) {
        self.known.synced = self.synced();
        let lsn = self.random.below(self.wal.log().head().get() + 1);
        self.known.released = self.known.released.max(lsn);
        give_up_unsynced(self.wal.log(), Lsn(lsn)).unwrap();
    }

    fn write(&mut self) {
        let Some(leader) = self.leader.clone() else {
            append(&mut self.writer, &mut self.random, &mut self.known.written);
            return;
        };
        let mut leader = leader.borrow_mut();
        leader.append(&mut self.random);
        self.known.written = leader.written.clone();
        let end = self.writer.end();
        let place = leader.wal.log().position_after(end.head, end.chain).unwrap().unwrap();
        let mut reader = leader.wal.log().reader_at(place).unwrap();
        // What was not whole comes again, as after a reconnect.
        self.writer.discard_partial();
        while let Some(range) = reader.next(u64::MAX).unwrap() {
            let (segment, mut offset) = (range.segment().id().first_lsn, range.start());
            // A frame ends anywhere, also within a batch.
            let mut rest = range.bytes();
            while !rest.is_empty() {
                let frame = rest.len().min(1 + usize::try_from(self.random.below(30_000)).unwrap());
                let mut bytes = rest.split_off(..frame).unwrap();
                while !bytes.is_empty() {
                    let window = self.writer.ingest_window(segment, offset, bytes.len() as u64).unwrap();
                    let len = window.len();
                    window.copy_from_slice(&bytes[..len]);
                    if self.random.percent(10) {
                        self.disk.disk.look();
                    }
                    self.writer.ingest_filled(len as u64).unwrap();
                    (bytes, offset) = (&bytes[len..], offset + len as u64);
                }
                if self.random.percent(20) {
                    return;
                }
            }
        }
    }
}

/// Opens one image of a crash and says whether it is what it should be; then goes on with it, and crashes it again.
fn check(
    crash: &Crash,
    random: &mut Random,
    leader: Option<Rc<RefCell<Leader>>>,
    is_bounded: bool,
    depth: u32,
    count: &Count,
) {
    if count.is_reached() {
        return;
    }
    let image = crash.moment.image(random);
    let observed = Observed::with(&image);
    if is_bounded {
        observed.disk.keep_names_in_order();
    }
    count.one(crash.known.written.len() as u64 > crash.known.synced);
    if depth > 0 && random.percent(30) {
        observed.disk.trap(random.below(8));
    }
    let lsn = if random.percent(30) { Lsn(crash.known.synced) } else { Lsn::ZERO };
    let written_here = if leader.is_some() { WrittenHere::Nothing } else { WrittenHere::Everything };
    let known_synced = KnownSynced { lsn, written_here };
    let opened = Wal::open(observed.path(), IDENTITY, WalOptions { known_synced, ..options(random) });
    let (wal, mut writer) = opened.unwrap_or_else(|error| {
        let known = &crash.known;
        panic!("synced up to {}, written up to {}, {}: {error}", known.synced, known.written.len(), names(&image))
    });
    let during_recovery = observed.disk.caught();
    observed.disk.trap(u64::MAX);
    let head = check_recovered(&crash.known, &image, observed.path(), &wal, &writer);

    if let Some(moment) = during_recovery {
        let again = Crash { moment, known: crash.known.clone() };
        check(&again, random, leader.clone(), is_bounded, depth - 1, count);
    }
    if random.percent(if depth > 0 { 40 } else { 10 }) {
        let mut known = crash.known.clone();
        if leader.is_none() {
            known.written.truncate(usize::try_from(head).unwrap());
            // A leader always begins a new epoch; under the same one it takes more to tell stale bytes.
            known.epoch = Epoch(writer.end().epoch.0.max(1) + random.below(2));
            writer.set_epoch(known.epoch).unwrap();
        }
        known.synced = head;
        let random = random.split();
        let mut life = Life {
            random,
            disk: &observed,
            wal,
            writer,
            known,
            leader: leader.clone(),
            trapped: None,
            is_orderly: true,
            careless: 0,
            is_bounded,
        };
        life.write();
        life.write();
        let (steps, crashes) = if depth > 0 { (2 + life.random.below(30), 2) } else { (2, 0) };
        let found = life.live(steps, crashes);
        let Life { wal, writer, known, mut random, .. } = life;
        let end = writer.end();
        drop(writer);
        wal.close().unwrap();
        let (wal, writer) = Wal::open(observed.path(), IDENTITY, options(&mut random)).unwrap();
        assert_eq!((writer.end().head, writer.end().chain, writer.torn_tail()), (end.head, end.chain, None));
        check_records(&known, &wal, end.head.get());
        drop((wal, writer));
        for crash in &found {
            for _ in 0..2 {
                check(crash, &mut random, leader.clone(), is_bounded, depth - 1, count);
            }
        }
    }
}

fn check_recovered(known: &Known, image: &Image, path: &Path, wal: &Wal, writer: &LogWriter) -> u64 {
    let log = wal.log();
    let end = writer.end();
    let head = end.head.get();
    let context = || format!("{}, opened with head {head}, cut {:?}", names(image), writer.torn_tail());
    assert!(known.synced <= head, "synced up to {}: {}", known.synced, context());
    assert!(head <= known.written.len() as u64, "written up to {}: {}", known.written.len(), context());
    assert_eq!(log.synced().load(), end.head, "{}", context());
    check_records(known, wal, head);

    // What was cut is gone for good, and was told.
    let mut stray = 0;
    for (id, file) in scan::list_segments(path).unwrap() {
        let bytes = std::fs::read(&file).unwrap();
        assert_eq!(bytes.len() as u64, SIZE, "{}", file.display());
        if id.first_lsn == end.segment {
            let rest = &bytes[usize::try_from(end.offset).unwrap()..];
            assert!(rest.iter().all(|&byte| byte == 0), "{id} has bytes behind {}: {}", end.offset, context());
        }
    }
    for (name, bytes) in &image.0 {
        let name = name.to_str().unwrap();
        let Ok(id) = name.trim_start_matches("aside-").parse::<towline::WalSegmentId>() else { continue };
        let from = match id.first_lsn.cmp(&end.segment) {
            std::cmp::Ordering::Less => continue,
            std::cmp::Ordering::Equal => end.offset.max(4096),
            std::cmp::Ordering::Greater => 4096,
        };
        let bytes = bytes.as_deref().unwrap();
        let rest = bytes.get(usize::try_from(from).unwrap()..).unwrap_or_default();
        stray += rest.iter().filter(|&&byte| byte != 0).count();
    }
    match writer.torn_tail() {
        Some(torn) => assert!(stray > 0 && torn.bytes > 0 && torn.after == end.head, "{torn:?}: {}", context()),
        None => assert_eq!(stray, 0, "nothing was reported: {}", context()),
    }
    head
}

/// Every record from the tail to the head, byte for byte.
fn check_records(known: &Known, wal: &Wal, head: u64) {
    let tail = wal.log().tail();
    assert!(tail.get() <= known.released + 1, "the log begins with {tail}, released up to {}", known.released);
    let found = records_of(wal.log(), tail);
    assert_eq!(found.len() as u64, head + 1 - tail.get(), "records from {tail} to {head}");
    for (lsn, bytes) in found {
        let due = &known.written[usize::try_from(lsn - 1).unwrap()];
        assert!(*bytes == **due, "LSN {lsn} has {} bytes, {} were written, or others", bytes.len(), due.len());
    }
}

fn names(image: &Image) -> String {
    let names: Vec<_> = image
        .0
        .iter()
        .map(|(name, bytes)| format!("{} ({})", name.display(), bytes.as_ref().map_or(0, Vec::len)))
        .collect();
    format!("image of {}", names.join(", "))
}

/// A log is replaced by an empty one, as when a follower's shard is rebuilt, and the power goes meanwhile: what is left
/// is a beginning of the old log, or the new one.
pub fn replace(seed: u64, count: &Count) {
    let mut random = Random(seed);
    let observed = Observed::new();
    let (wal, mut writer) = Wal::open(observed.path(), IDENTITY, options(&mut random)).unwrap();
    writer.set_epoch(Epoch(1)).unwrap();
    let mut written = Vec::new();
    while written.len() < 150 {
        append(&mut writer, &mut random, &mut written);
    }
    drop(writer);
    wal.close().unwrap();
    observed.disk.trap(random.below(12));
    let next = Lsn(1000);
    drop(Wal::open_at(observed.path(), IDENTITY, options(&mut random), next, Epoch(5)).unwrap());
    let Some(moment) = observed.disk.caught() else { return };
    for _ in 0..8 {
        if count.is_reached() {
            return;
        }
        let image = moment.image(&mut random);
        let left = Observed::with(&image);
        count.one(true);
        let opened = Wal::open(left.path(), IDENTITY, options(&mut random));
        let (wal, writer) = opened.unwrap_or_else(|error| panic!("{}: {error}", names(&image)));
        let known = Known { written: written.clone(), synced: 0, released: 0, epoch: Epoch(1) };
        check_records(&known, &wal, writer.end().head.get());
    }
}

/// A log whose syncs fail now and then, so that the process ends and is started again, and finds in the page cache what
/// is not on the device. Now and then the power goes.
pub fn fail(seed: u64, count: &Count) {
    let mut random = Random(seed);
    let observed = Observed::new();
    let mut known = Known { written: Vec::new(), synced: 0, released: 0, epoch: Epoch(1) };
    let is_bounded = random.percent(50);
    if is_bounded {
        observed.disk.keep_names_in_order();
    }
    for _ in 0..4 {
        let sync = random.pick(&[SyncPolicy::Never, SyncPolicy::Never, SyncPolicy::Group]);
        let lsn = if random.percent(30) { Lsn(known.synced) } else { Lsn::ZERO };
        let known_synced = KnownSynced { lsn, written_here: WrittenHere::Everything };
        let options = WalOptions { sync, known_synced, ..options(&mut random) };
        observed.disk.fail_sync(random.below(12));
        let open = || Wal::open(observed.path(), IDENTITY, options);
        if random.percent(60) {
            let after = random.pick(&[3, 30, 300]);
            observed.disk.fill_up(random.below(after));
        }
        let (wal, mut writer) = open().or_else(|_| open()).or_else(|_| open()).unwrap();
        assert_eq!(writer.end().head.get(), known.written.len() as u64, "the page cache has all of it");
        known.epoch = Epoch(writer.end().epoch.0.max(known.epoch.0) + random.below(2));
        writer.set_epoch(known.epoch).unwrap();
        known.synced = wal.log().synced().load().get();
        lose_power(&observed, &known, is_bounded, &mut random, count);
        for _ in 0..random.below(60) {
            if !live_on(&wal, &mut writer, &mut known, is_bounded, &mut random) {
                break;
            }
        }
        known.synced = known.synced.max(wal.log().synced().load().get());
        lose_power(&observed, &known, is_bounded, &mut random, count);
    }
}

/// One step. False once a sync has failed.
fn live_on(wal: &Wal, writer: &mut LogWriter, known: &mut Known, is_bounded: bool, random: &mut Random) -> bool {
    if is_bounded && random.percent(8) {
        let lsn = random.below(wal.log().head().get() + 1);
        known.released = known.released.max(lsn);
        return give_up_unsynced(wal.log(), Lsn(lsn)).is_ok();
    }
    match random.below(100) {
        0..60 => {
            let record = record(random);
            let is_appended = writer.append(&record).is_ok();
            if is_appended {
                known.written.push(record);
            }
            // For want of room it can be tried again.
            wal.log().poison().is_none()
        }
        60..90 => {
            let lsn = Lsn(random.below(wal.log().head().get() + 1));
            matches!(wal.log().wait_synced(lsn, None), Ok(()) | Err(Error::NotRetained { .. }))
        }
        90..95 => {
            known.epoch = Epoch(known.epoch.0 + 1);
            writer.set_epoch(known.epoch).is_ok()
        }
        _ => {
            let lsn = random.below(wal.log().synced().load().get() + 1);
            known.released = known.released.max(lsn);
            wal.log().release_through(Lsn(lsn), "the test does not need it").is_ok()
        }
    }
}

/// What a power cut could leave now is opened.
fn lose_power(observed: &Observed, known: &Known, is_bounded: bool, random: &mut Random, count: &Count) {
    let moment = observed.disk.moment();
    for _ in 0..3 {
        let image = moment.image(random);
        let left = Observed::with(&image);
        if is_bounded {
            left.disk.keep_names_in_order();
        }
        count.one(known.written.len() as u64 > known.synced);
        let (wal, writer) = Wal::open(left.path(), IDENTITY, options(random))
            .unwrap_or_else(|error| panic!("synced up to {}, {}: {error}", known.synced, names(&image)));
        check_recovered(known, &image, left.path(), &wal, &writer);
    }
}
