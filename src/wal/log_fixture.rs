//! Logs on disk for tests, written batch by batch with what a crash or a bad disk makes of them.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::limits::{self, MIN_SEGMENT_SIZE, PAGE_LEN, SEGMENT_HEADER_LEN};
use crate::types::{Chain, ClusterId, Epoch, HybridTimestamp, Lsn, RegionId, ShardId, WalSegmentId};
use crate::wal::batch::{self, Expected};
use crate::wal::identity::LogIdentity;
use crate::wal::mapping::{Mapping, Segment};
use crate::wal::segment::{SEGMENT_VERSION, SegmentHeader, write_all_at};

pub(super) const SIZE: u64 = MIN_SEGMENT_SIZE;
pub(super) const IDENTITY: LogIdentity =
    LogIdentity { cluster: ClusterId(7), region: RegionId(1), shard: ShardId(2), segment_size: SIZE };

/// Where a batch was written.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) first_lsn: Lsn,
    pub(super) last_lsn: Lsn,
    /// The chain after it.
    pub(super) chain: Chain,
    /// What it says was synced, unless it is compact.
    pub(super) stated: Option<Lsn>,
}

impl Place {
    /// Where it stands in its file.
    pub(super) fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

/// Writes a log.
pub(super) struct LogFixture {
    pub(super) directory: tempfile::TempDir,
    pub(super) places: Vec<Place>,
    pub(super) next: Expected,
    /// What the batches to come say was synced.
    pub(super) synced: Lsn,
    /// What the last batch says that is not compact, and the page in which it begins.
    stated: (Lsn, u64),
    path: PathBuf,
    end: u64,
    timestamp: HybridTimestamp,
}

impl LogFixture {
    /// An empty log that begins with LSN 1.
    pub(super) fn new() -> LogFixture {
        LogFixture::beginning_at(Lsn::FIRST, IDENTITY.genesis())
    }

    /// An empty log that begins anywhere.
    pub(super) fn beginning_at(first_lsn: Lsn, chain: Chain) -> LogFixture {
        let mut log = LogFixture {
            directory: tempfile::tempdir().unwrap(),
            places: Vec::new(),
            next: Expected { first_lsn, chain, epoch: Epoch(3) },
            synced: Lsn::ZERO,
            stated: (Lsn::ZERO, 0),
            path: PathBuf::new(),
            end: 0,
            timestamp: HybridTimestamp::default().tick(1_000),
        };
        log.begin_segment(Epoch(3));
        log
    }

    /// Three segments of several batches, each batch saying that all before it was synced: LSN 1 to 36.
    pub(super) fn synced_all_along() -> LogFixture {
        let mut log = LogFixture::new();
        for segment in 0..3 {
            for batch in 0..4 {
                log.synced = log.head();
                log.append(&[&[segment; 100], &[batch; 33], b""]);
            }
            log.synced = log.head();
            if segment < 2 {
                log.roll(Epoch(3 + u64::from(segment)));
            }
        }
        log
    }

    /// Three segments of some pages of small records, each in a batch of its own, most of which are compact; the
    /// records of the last say that all but a few hundred bytes of it was synced. From LSN `differs_from` on, other
    /// bytes.
    pub(super) fn of_small_records(differs_from: Lsn) -> LogFixture {
        let mut log = LogFixture::new();
        for segment in 0..3_u64 {
            while log.end() < SEGMENT_HEADER_LEN + 14_000 {
                let lsn = log.next.first_lsn;
                if lsn.0.is_multiple_of(50) {
                    log.synced = log.head();
                }
                let filler = if lsn < differs_from { 7 } else { 8 };
                log.append(&[&vec![filler; limits::index(lsn.0 * 37 % 190)]]);
            }
            if segment < 2 {
                log.synced = log.head();
                log.roll(Epoch(3 + segment));
            }
        }
        assert!(log.places.iter().filter(|place| place.stated.is_none()).count() > 300);
        log
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(super) fn head(&self) -> Lsn {
        self.next.first_lsn.previous()
    }

    /// The file of the present segment.
    pub(super) fn segment_path(&self) -> PathBuf {
        self.path.clone()
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// A batch of its own for the records.
    pub(super) fn append(&mut self, records: &[&[u8]]) {
        self.timestamp = self.timestamp.tick(0);
        let synced = self.synced.min(self.head());
        // As the log's writer does it: neither first in a page, nor where there is something to say.
        let says = (synced, self.end / PAGE_LEN);
        let is_compact = records.len() == 1 && self.end > SEGMENT_HEADER_LEN && says == self.stated;
        let compact = is_compact.then(|| batch::build_compact(self.next, self.timestamp, records[0])).flatten();
        self.stated = says;
        let stated = compact.is_none().then_some(synced);
        let bytes = compact.unwrap_or_else(|| batch::build(self.next, self.timestamp, synced, records));
        assert!(self.end + bytes.len() as u64 <= SIZE);
        write(&self.path, &bytes, self.end);
        let header = batch::verify(&bytes, SIZE - self.end, self.next).unwrap();
        self.places.push(Place {
            path: self.path.clone(),
            offset: self.end,
            len: bytes.len() as u64,
            first_lsn: header.first_lsn,
            last_lsn: header.last_lsn(),
            chain: header.crc,
            stated,
        });
        self.end += bytes.len() as u64;
        self.next = Expected { first_lsn: header.last_lsn().next(), chain: header.crc, ..self.next };
    }

    /// Seals the segment and begins the next.
    pub(super) fn roll(&mut self, epoch: Epoch) {
        self.append(&[]);
        self.begin_segment(epoch);
    }

    /// Begins a segment without sealing the one before.
    pub(super) fn begin_segment(&mut self, epoch: Epoch) {
        self.next.epoch = epoch;
        let header = SegmentHeader {
            id: WalSegmentId { region: IDENTITY.region, shard: IDENTITY.shard, first_lsn: self.next.first_lsn },
            cluster: IDENTITY.cluster,
            epoch,
            chain_before: self.next.chain,
            segment_size: SIZE,
            version: SEGMENT_VERSION,
        };
        self.path = self.directory.path().join(header.id.to_string());
        self.end = SEGMENT_HEADER_LEN;
        let mut bytes = header.encode().to_vec();
        bytes.resize(usize::try_from(SIZE).unwrap(), 0);
        std::fs::write(&self.path, bytes).unwrap();
    }
}

/// Overwrites bytes of a file.
pub(super) fn write(path: &Path, bytes: &[u8], offset: u64) {
    write_all_at(&std::fs::File::options().write(true).open(path).unwrap(), bytes, offset).unwrap();
}

/// Flips one bit of a file.
pub(super) fn flip(path: &Path, offset: u64, bit: u32) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[usize::try_from(offset).unwrap()] ^= 1 << bit;
    std::fs::write(path, bytes).unwrap();
}

/// All files of a directory: name and content.
pub(super) fn image(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

/// A segment that nobody reads any more, and where its file is.
pub(super) fn given_up(directory: &Path, first_lsn: u64) -> (PathBuf, Segment) {
    let id = WalSegmentId { region: IDENTITY.region, shard: IDENTITY.shard, first_lsn: Lsn(first_lsn) };
    let path = directory.join(id.to_string());
    std::fs::write(&path, vec![7; usize::try_from(SIZE).unwrap()]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mapping = Mapping::new(&file, SIZE).unwrap();
    let (cluster, epoch, chain_before) = (IDENTITY.cluster, Epoch(1), Chain(1));
    let header = SegmentHeader { id, cluster, epoch, chain_before, segment_size: SIZE, version: SEGMENT_VERSION };
    let (segment, writer) = Segment::new(header, path.clone(), file, mapping, SIZE, Some(Lsn(first_lsn)));
    drop(writer);
    (path, Arc::into_inner(segment).unwrap())
}
