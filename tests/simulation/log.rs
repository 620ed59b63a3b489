//! A node's log on the simulated disk: the crate's segments and batches, byte for byte, and its recovery; only the
//! writing is done here, since the crate's own writer stores into mapped files.

use towline::limits::{BATCH_HEADER_LEN, SEGMENT_HEADER_LEN};
use towline::seams::{History, KeptLog, give_up_through, survey_log};
use towline::wal::batch::{self, BatchIter};
use towline::wal::segment::SEGMENT_VERSION;
use towline::wal::{
    Batch, BatchError, BatchHeader, Expected, KnownSynced, LogIdentity, LogPosition, SegmentHeader, WrittenHere,
};
use towline::{Chain, ClusterId, Epoch, HybridTimestamp, Lsn, RegionId, ShardId, WalSegmentId};

use super::disk::{Disk, FileId, SEGMENT_SIZE};

pub const IDENTITY: LogIdentity =
    LogIdentity { cluster: ClusterId(7), region: RegionId(1), shard: ShardId(0), segment_size: SEGMENT_SIZE };
/// Past this a log gives up segments that somebody needs.
const MAX_WAL_BYTES: u64 = 7 * SEGMENT_SIZE;
/// Kept although nobody needs it.
const MIN_WAL_BYTES: u64 = 2 * SEGMENT_SIZE;

pub fn genesis() -> Chain {
    Chain::genesis(IDENTITY.cluster, IDENTITY.region, IDENTITY.shard)
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

#[derive(Clone, Debug)]
struct Segment {
    header: SegmentHeader,
    file: FileId,
    end: u64,
    sealed: bool,
    last: Lsn,
}

/// One batch, a sealing one included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    pub header: BatchHeader,
    /// The first LSN of its segment.
    pub segment: Lsn,
    pub start: u64,
}

impl Mark {
    pub fn lsn(&self) -> Lsn {
        self.header.last_lsn()
    }

    /// The chain after it.
    pub fn chain(&self) -> Chain {
        self.header.crc
    }

    fn end(&self) -> u64 {
        self.start + self.header.total_len()
    }
}

pub struct Log {
    segments: Vec<Segment>,
    /// Every batch, oldest first.
    pub marks: Vec<Mark>,
    pub next: Lsn,
    pub chain: Chain,
    /// Of the next batch.
    pub epoch: Epoch,
    timestamp: HybridTimestamp,
    pub synced: Lsn,
    /// What the last batch of this leader's that is not compact says was synced, and the page in which it begins;
    /// nothing if no compact one may follow it.
    stated: Option<(Lsn, u64)>,
    /// The newest epoch that the first header may have, while it has not arrived.
    trusted: Option<Epoch>,
    /// A header page, or the beginning of a batch, as far as it has arrived.
    arrived: Vec<u8>,
    header_due: bool,
    /// Planted: what arrives is taken for a continuation whatever it says.
    pub trusts_chain: bool,
}

impl History for Log {
    fn head(&self) -> Lsn {
        self.head()
    }

    fn tail(&self) -> Lsn {
        self.tail()
    }

    fn epoch_ends(&self) -> towline::Result<Vec<LogPosition>> {
        let mut ends: Vec<LogPosition> = Vec::new();
        for mark in self.marks.iter().rev().filter(|mark| !mark.header.is_sealing()) {
            if ends.last().is_none_or(|end| end.epoch != mark.header.epoch) {
                ends.push(self.position((mark.lsn(), mark.chain()), (mark.segment, mark.end())));
            }
        }
        ends.push(self.position(self.origin(), (self.origin().0.next(), 0)));
        Ok(ends)
    }

    fn position_after(&self, lsn: Lsn, chain: Chain) -> Option<LogPosition> {
        Some(self.position((lsn, chain), self.place_after(lsn, chain)?))
    }
}

/// The disk has no room for the next segment.
#[derive(Debug)]
pub struct Full;

impl Log {
    /// Recovers what the disk has. `stop_after` deeds the power goes again, and there is no log.
    pub fn open(disk: &mut Disk, known: KnownSynced, stop_after: usize) -> Result<Option<(Log, u64)>, String> {
        let listed = disk.list();
        let files = listed.iter().map(|(id, file)| (*id, disk.bytes(*file).to_vec())).collect();
        let verdict = survey_log(&IDENTITY, known, files).map_err(|error| error.to_string())?;
        let mut left = stop_after;
        let mut deed = || {
            left = left.saturating_sub(1);
            left > 0
        };
        for path in &verdict.dropped {
            if !deed() {
                return Ok(None);
            }
            disk.remove(path.to_str().and_then(|name| name.parse().ok()).unwrap());
        }
        if !deed() {
            return Ok(None);
        }
        disk.sync_now();
        for (path, range) in &verdict.zeroed {
            if !deed() {
                return Ok(None);
            }
            let id: WalSegmentId = path.to_str().and_then(|name| name.parse().ok()).unwrap();
            let file = listed.iter().find(|(listed, _)| *listed == id).map(|(_, file)| *file).unwrap();
            disk.zero(file, range.clone());
        }
        let mut log = Log { epoch: verdict.epoch, timestamp: verdict.timestamp, ..Log::empty(verdict.head.next()) };
        log.chain = verdict.chain;
        for segment in &verdict.segments {
            let id = segment.header.id;
            let file = listed.iter().find(|(listed, _)| *listed == id).map(|(_, file)| *file).unwrap();
            let mut at = SEGMENT_HEADER_LEN;
            for batch in BatchIter::within(&segment.header, &disk.bytes(file)[index(at)..index(segment.published)]) {
                log.marks.push(Mark { header: batch.header, segment: id.first_lsn, start: at });
                at += batch.header.total_len();
            }
            let last = log.marks.last().filter(|mark| mark.segment == id.first_lsn);
            let last = last.map_or(id.first_lsn.previous(), Mark::lsn);
            let (end, sealed) = (segment.published, segment.sealed);
            log.segments.push(Segment { header: segment.header, file, end, sealed, last });
        }
        // What is kept counts as synced only now.
        disk.sync_now();
        log.synced = log.head();
        Ok(Some((log, verdict.torn.map_or(0, |torn| torn.bytes))))
    }

    /// What is planted into this log, as into another.
    pub fn planted_as(mut self, other: &Log) -> Log {
        self.trusts_chain = other.trusts_chain;
        self
    }

    fn empty(next: Lsn) -> Log {
        Log {
            segments: Vec::new(),
            marks: Vec::new(),
            next,
            chain: genesis(),
            epoch: Epoch::ZERO,
            timestamp: HybridTimestamp::default(),
            synced: Lsn::ZERO,
            stated: None,
            trusted: None,
            arrived: Vec::new(),
            header_due: false,
            trusts_chain: false,
        }
    }

    /// In the place of this log, an empty one whose first header is believed.
    pub fn begin_at(disk: &mut Disk, next: Lsn, newest_epoch: Epoch) -> Log {
        for (id, _) in disk.list().into_iter().rev() {
            disk.remove(id);
        }
        disk.sync_now();
        let trusted = (next > Lsn::FIRST).then_some(newest_epoch);
        Log { trusted, synced: next.previous(), ..Log::empty(next) }
    }

    pub fn head(&self) -> Lsn {
        self.next.previous()
    }

    /// The oldest LSN that is there; one past the head if none is.
    pub fn tail(&self) -> Lsn {
        self.segments.first().map_or(self.next, |segment| segment.header.id.first_lsn)
    }

    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The epoch of the newest record, if there is one.
    pub fn record_epoch(&self) -> Option<Epoch> {
        self.marks.iter().rev().find(|mark| mark.header.record_count > 0).map(|mark| mark.header.epoch)
    }

    /// Where the log stood before its oldest batch.
    pub fn origin(&self) -> (Lsn, Chain) {
        let first =
            self.segments.first().map(|segment| (segment.header.id.first_lsn.previous(), segment.header.chain_before));
        first.unwrap_or((self.head(), self.chain))
    }

    pub fn batch_bytes<'d>(&self, disk: &'d Disk, mark: &Mark) -> &'d [u8] {
        let segment = self.segments.iter().find(|segment| segment.header.id.first_lsn == mark.segment).unwrap();
        &disk.bytes(segment.file)[index(mark.start)..index(mark.end())]
    }

    pub fn batch<'d>(&self, disk: &'d Disk, mark: &Mark) -> Batch<'d> {
        let segment = self.segments.iter().find(|segment| segment.header.id.first_lsn == mark.segment).unwrap();
        BatchIter::within(&segment.header, self.batch_bytes(disk, mark)).next().unwrap()
    }

    /// The first batch with a record after `lsn`.
    pub fn batch_after(&self, lsn: Lsn) -> Option<Mark> {
        let at = self.marks.partition_point(|mark| mark.lsn() <= lsn);
        self.marks.get(at).copied()
    }

    /// It is no leader's log any more: the epoch is that of its segments again.
    pub fn step_down(&mut self) {
        self.epoch = self.segments.last().map_or(Epoch::ZERO, |last| last.header.epoch);
    }

    // Writing ---------------------------------------------------------------------------------------------------------

    pub fn append(&mut self, disk: &mut Disk, now: u64, records: &[&[u8]]) -> Result<Mark, Full> {
        let at = |log: &Log| Expected { first_lsn: log.next, chain: log.chain, epoch: log.epoch };
        self.timestamp = self.timestamp.tick(1_000_000 + now);
        // As the crate's writer: compact where there is nothing more to say.
        let page = |log: &Log| log.segments.last().map_or(0, |last| last.end / 4096);
        let is_compact = records.len() == 1 && self.stated == Some((self.synced, page(self)));
        let compact = is_compact.then(|| batch::build_compact(at(self), self.timestamp, records[0])).flatten();
        let build = |log: &Log| batch::build(at(log), log.timestamp, log.synced, records);
        let mut bytes = compact.unwrap_or_else(|| build(self));
        let fits = |segment: &Segment| segment.end + bytes.len() as u64 + BATCH_HEADER_LEN <= SEGMENT_SIZE;
        let is_open =
            self.segments.last().is_some_and(|last| !last.sealed && last.header.epoch == self.epoch && fits(last));
        if !is_open {
            self.roll(disk)?;
            bytes = build(self);
        }
        self.stated = Some((self.synced, page(self)));
        Ok(self.put(disk, &bytes))
    }

    /// Writes a batch behind the last one.
    fn put(&mut self, disk: &mut Disk, bytes: &[u8]) -> Mark {
        let segment = self.segments.last().unwrap();
        disk.write(segment.file, segment.end, bytes);
        let at = Expected { first_lsn: self.next, chain: self.chain, epoch: segment.header.epoch };
        let header = batch::verify(bytes, SEGMENT_SIZE - segment.end, at).unwrap();
        self.take_in(header)
    }

    fn take_in(&mut self, header: BatchHeader) -> Mark {
        let segment = self.segments.last_mut().unwrap();
        let mark = Mark { header, segment: segment.header.id.first_lsn, start: segment.end };
        segment.end += header.total_len();
        segment.last = header.last_lsn();
        segment.sealed = header.is_sealing();
        self.next = header.last_lsn().next();
        self.chain = header.crc;
        self.marks.push(mark);
        mark
    }

    fn roll(&mut self, disk: &mut Disk) -> Result<(), Full> {
        if disk.full {
            return Err(Full);
        }
        self.drop_open_if_empty(disk);
        if let Some(open) = self.segments.last().filter(|last| !last.sealed) {
            let at = Expected { first_lsn: self.next, chain: self.chain, epoch: open.header.epoch };
            let bytes = batch::build(at, self.timestamp, self.synced, &[]);
            self.put(disk, &bytes);
        }
        let id = WalSegmentId { region: IDENTITY.region, shard: IDENTITY.shard, first_lsn: self.next };
        let header = SegmentHeader {
            id,
            cluster: IDENTITY.cluster,
            epoch: self.epoch,
            chain_before: self.chain,
            segment_size: SEGMENT_SIZE,
            version: SEGMENT_VERSION,
        };
        self.activate(disk, header)
    }

    fn drop_open_if_empty(&mut self, disk: &mut Disk) {
        if let Some(empty) = self.segments.pop_if(|last| last.end == SEGMENT_HEADER_LEN) {
            disk.remove(empty.header.id);
        }
    }

    fn activate(&mut self, disk: &mut Disk, header: SegmentHeader) -> Result<(), Full> {
        let begins_log = self.segments.is_empty() && header.id.first_lsn > Lsn::FIRST;
        let file = disk.create(header.id).ok_or(Full)?;
        disk.write(file, 0, &header.encode());
        if begins_log {
            disk.sync_file(file);
        }
        let last = header.id.first_lsn.previous();
        self.segments.push(Segment { header, file, end: SEGMENT_HEADER_LEN, sealed: false, last });
        Ok(())
    }

    // The leader's bytes ----------------------------------------------------------------------------------------------

    /// The segment and offset of the next byte due.
    pub fn ingest_position(&self) -> (Lsn, u64) {
        match self.segments.last() {
            Some(open) if !open.sealed => (open.header.id.first_lsn, open.end),
            _ => (self.next, 0),
        }
    }

    /// Takes in bytes of the leader's log; `taken` is called with each batch that is whole.
    pub fn ingest(
        &mut self,
        disk: &mut Disk,
        segment: Lsn,
        offset: u64,
        bytes: &[u8],
        taken: &mut Vec<Mark>,
    ) -> Result<(), String> {
        let (due, end) = self.ingest_position();
        let arrived = self.arrived.len() as u64;
        self.header_due |= end == 0 || (offset == 0 && arrived == 0 && (due, end) == (segment, SEGMENT_HEADER_LEN));
        let expected = (due, arrived + if self.header_due { 0 } else { end });
        if (segment, offset) != expected {
            return Err(format!("bytes from {offset} of segment {segment} arrived, due were {expected:?}"));
        }
        if !self.header_due && end + arrived + bytes.len() as u64 > SEGMENT_SIZE {
            return Err("the segment has no room for more".to_owned());
        }
        self.arrived.extend_from_slice(bytes);
        let result = self.ingest_arrived(disk, taken);
        if result.is_err() {
            self.discard_partial(disk);
        }
        result
    }

    fn ingest_arrived(&mut self, disk: &mut Disk, taken: &mut Vec<Mark>) -> Result<(), String> {
        if self.header_due {
            let Some(page) = self.arrived.first_chunk::<4096>() else { return Ok(()) };
            let header = SegmentHeader::decode(page)?;
            self.ingest_header(disk, header)?;
            self.header_due = false;
            self.arrived = self.arrived.split_off(4096);
        }
        while !self.arrived.is_empty() {
            let open = self.segments.last().unwrap();
            if open.sealed {
                return Err("bytes arrived behind the end of a sealed segment".to_owned());
            }
            let mut expected = Expected { first_lsn: self.next, chain: self.chain, epoch: open.header.epoch };
            // A compact batch does not say what it continues.
            let says_chain = self.arrived.get(7).is_some_and(|byte| byte >> 7 == 0);
            if let Some(first) = self.arrived.first_chunk().filter(|_| self.trusts_chain && says_chain) {
                expected.chain = BatchHeader::decode(first).prev_crc;
            }
            match batch::verify(&self.arrived, SEGMENT_SIZE - open.end, expected) {
                Ok(header) => {
                    let bytes: Vec<u8> = self.arrived.drain(..index(header.total_len())).collect();
                    disk.write(open.file, open.end, &bytes);
                    self.timestamp = self.timestamp.max(header.timestamp);
                    taken.push(self.take_in(header));
                }
                Err(BatchError::Incomplete { .. }) => {
                    // A beginning of a batch is on the disk as soon as it has arrived.
                    disk.write(open.file, open.end, &self.arrived);
                    break;
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(())
    }

    fn ingest_header(&mut self, disk: &mut Disk, header: SegmentHeader) -> Result<(), String> {
        if self.segments.last().is_some_and(|open| !open.sealed && open.header == header) {
            return Ok(());
        }
        let is_due = match self.trusted {
            Some(newest) => header.epoch <= newest,
            None => header.epoch >= self.written_epoch() && (header.chain_before == self.chain || self.trusts_chain),
        };
        if header.id.first_lsn != self.next || !is_due {
            return Err(format!("a segment arrived that does not continue the log: {header:?}"));
        }
        if disk.full {
            return Err("no room for the next segment".to_owned());
        }
        self.drop_open_if_empty(disk);
        self.activate(disk, header).map_err(|Full| "no room for the next segment".to_owned())?;
        (self.epoch, self.chain, self.trusted, self.stated) = (header.epoch, header.chain_before, None, None);
        Ok(())
    }

    /// The epoch of the newest segment with batches.
    fn written_epoch(&self) -> Epoch {
        let written = self.segments.iter().rev().find(|segment| segment.end > SEGMENT_HEADER_LEN);
        written.map_or(Epoch::ZERO, |segment| segment.header.epoch)
    }

    /// Forgets the beginning of a batch that will not come to its end, and leaves zeros.
    pub fn discard_partial(&mut self, disk: &mut Disk) {
        let arrived = std::mem::take(&mut self.arrived).len() as u64;
        if let Some(open) = self.segments.last().filter(|open| !self.header_due && !open.sealed) {
            disk.zero(open.file, open.end..open.end + arrived);
        }
        self.header_due = false;
    }

    /// Cuts everything from a place on, which is the end of a batch or the beginning of a segment.
    pub fn cut(&mut self, disk: &mut Disk, segment: Lsn, offset: u64) -> Result<(), String> {
        let keeps = |mark: &Mark| mark.segment < segment || (mark.segment == segment && mark.end() <= offset);
        let place = self.marks.iter().rev().find(|mark| keeps(mark)).map(|mark| (mark.lsn().next(), mark.chain()));
        let (next, chain) = place.unwrap_or((self.origin().0.next(), self.origin().1));
        let at_end = self.marks.iter().any(|mark| mark.segment == segment && mark.end() == offset);
        if !at_end && (offset > SEGMENT_HEADER_LEN || next != segment) {
            return Err(format!("offset {offset} of segment {segment} is not the end of a batch here"));
        }
        while let Some(last) = self
            .segments
            .pop_if(|last| last.header.id.first_lsn > segment || (last.header.id.first_lsn == segment && offset == 0))
        {
            disk.remove(last.header.id);
        }
        self.marks.retain(keeps);
        if let Some(open) =
            self.segments.last_mut().filter(|last| last.header.id.first_lsn == segment && last.end > offset)
        {
            disk.zero(open.file, offset..open.end);
            (open.end, open.sealed, open.last) = (offset, false, next.previous());
        }
        (self.next, self.chain, self.stated) = (next, chain, None);
        self.epoch = self.segments.last().map_or(Epoch::ZERO, |last| last.header.epoch);
        disk.sync_now();
        self.synced = self.head();
        Ok(())
    }

    // Reading ---------------------------------------------------------------------------------------------------------

    /// Where a log goes on that ends with `lsn` and `chain`, if this one was there too.
    pub fn place_after(&self, lsn: Lsn, chain: Chain) -> Option<(Lsn, u64)> {
        if (lsn, chain) == self.origin() {
            return Some((lsn.next(), 0));
        }
        let from = self.marks.partition_point(|mark| mark.lsn() < lsn);
        let mark = self.marks[from..].iter().take_while(|mark| mark.lsn() == lsn).find(|mark| mark.chain() == chain)?;
        Some(if mark.header.is_sealing() { (lsn.next(), 0) } else { (mark.segment, mark.end()) })
    }

    /// The chain after `lsn`, where a batch ends there: the one asked about if there are two.
    pub fn chain_at(&self, lsn: Lsn, asked: Chain) -> Option<Chain> {
        if self.place_after(lsn, asked).is_some() {
            return Some(asked);
        }
        let from = self.marks.partition_point(|mark| mark.lsn() < lsn);
        self.marks.get(from).filter(|mark| mark.lsn() == lsn).map(Mark::chain)
    }

    /// The first LSN of the segment that holds `lsn`; where that comes after the head, of the newest, even if it is
    /// sealed.
    pub fn segment_start_for(&self, lsn: Lsn) -> Lsn {
        let holding = self.segments.iter().rev().find(|segment| segment.header.id.first_lsn <= lsn);
        holding.map_or(self.next, |segment| segment.header.id.first_lsn)
    }

    /// The bytes to be sent from a place on, at most `most`, and where that place is; none if there are no more.
    pub fn read<'d>(&self, disk: &'d Disk, (segment, offset): (Lsn, u64), most: u64) -> Option<((Lsn, u64), &'d [u8])> {
        let found = self.segments.iter().find(|found| found.header.id.first_lsn == segment)?;
        if offset >= found.end {
            return if found.sealed { self.read(disk, (found.last.next(), 0), most) } else { None };
        }
        let to = found.end.min(offset + most);
        Some(((segment, offset), &disk.bytes(found.file)[index(offset)..index(to)]))
    }

    /// A place, with what stands before it.
    fn position(&self, (lsn, chain): (Lsn, Chain), (segment, offset): (Lsn, u64)) -> LogPosition {
        let holding = self.segments.iter().rev().find(|found| found.header.id.first_lsn <= segment);
        let epoch = holding.map_or(Epoch::ZERO, |found| found.header.epoch);
        LogPosition { lsn, chain, epoch, segment, offset }
    }

    // Retention -------------------------------------------------------------------------------------------------------

    /// Gives up what is to go, and says up to where.
    pub fn release(&mut self, disk: &mut Disk, unneeded: Lsn, applied: Lsn) -> Option<Lsn> {
        let sealed: Vec<Lsn> =
            self.segments.iter().filter(|segment| segment.sealed).map(|segment| segment.last).collect();
        let facts = KeptLog {
            sealed: &sealed,
            unneeded,
            synced: self.synced,
            applied: Some(applied),
            retained_bytes: self.segments.len() as u64 * SEGMENT_SIZE,
            segment_size: SEGMENT_SIZE,
            max_wal_bytes: Some(MAX_WAL_BYTES),
            min_wal_bytes: MIN_WAL_BYTES,
        };
        let through = give_up_through(&facts)?;
        // As the crate's log: never before its successor's header is durable, or a power cut takes where the log
        // stands.
        let next_is_durable =
            |log: &Log| log.segments.get(1).is_some_and(|next| next.header.id.first_lsn <= log.synced);
        while next_is_durable(self) && self.segments[0].sealed && self.segments[0].last <= through {
            disk.remove(self.segments.remove(0).header.id);
        }
        let tail = self.tail();
        self.marks.retain(|mark| mark.segment >= tail);
        Some(tail.previous())
    }

    /// A bit of a batch that is known to have been synced, for rot: a checkpoint says so, or a later batch that the
    /// node itself wrote.
    pub fn bit_to_rot(&self, known: KnownSynced, chance: &mut super::clock::Chance) -> Option<(WalSegmentId, u64)> {
        let own =
            |mark: &&Mark| WrittenHere::Epoch(mark.header.epoch) == known.written_here && mark.lsn() <= self.synced;
        let own = self.marks.iter().filter(|mark| mark.header.record_count > 0).filter(own);
        let stated = own.map(|mark| mark.header.synced_lsn).max().unwrap_or_default().max(known.lsn);
        let marks: Vec<&Mark> =
            self.marks.iter().filter(|mark| mark.header.record_count > 0 && mark.lsn() <= stated).collect();
        let mark = marks.get(chance.index(marks.len().max(1)))?;
        let segment = self.segments.iter().find(|segment| segment.header.id.first_lsn == mark.segment)?;
        let len = mark.header.header_len() + u64::from(mark.header.body_len);
        let byte = chance.between(mark.start, mark.start + len - 1);
        Some((segment.header.id, byte * 8 + chance.below(8)))
    }
}
