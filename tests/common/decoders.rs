//! Every decoder of Towline as a function of arbitrary bytes. Each must come back whatever it is given, and what it
//! takes for valid must be written as it was read. The functions know of no engine: `tests/corpus.rs` calls them with
//! the cases that are kept and with mutations of them, and the fuzz targets of the `fuzz` crate do.
//!
//! Where a checksum would refuse nearly every input, a bit of the input's first byte has it put right first, so that
//! the rules behind it are reached.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use towline::data_dir::Manifest;
use towline::status::Status;
use towline::wal::batch::{self, BatchHeader};
use towline::wal::segment::SegmentHeader;
use towline::wal::{BatchIter, Expected, LogIdentity, LogWriter, SyncPolicy, Wal, WalOptions};
use towline::wire::{
    BaseDataHeader, BodyCheck, ErrorMessage, FrameHeader, FrameKind, Message, SegmentPieceHeader, WalDataHeader,
    WalSegmentPayload,
};
use towline::{
    Chain, Checkpoint, ClusterId, Commit, Epoch, Lsn, NodeId, RegionId, ReplicationState, ShardId, WalSegmentId, seams,
};

#[path = "../../src/cli/lines.rs"]
#[allow(dead_code, missing_docs, reason = "the module belongs to the command line tool")]
mod lines;

/// A decoder by name.
pub type Decoder = (&'static str, fn(&[u8]));

/// All of them.
pub const ALL: &[Decoder] = &[
    ("frames", frames),
    ("messages", messages),
    ("segment_header", segment_header),
    ("batches", batches),
    ("segment_payload", segment_payload),
    ("manifest", manifest),
    ("checkpoint", checkpoint),
    ("registry", registry),
    ("fixed_store", fixed_store),
    ("status", status),
    ("key_values", key_values),
    ("texts", texts),
    ("ingest", ingest),
];

/// Bytes of a header page.
const PAGE: usize = 4096;
/// Bytes of a batch header.
const BATCH: usize = 56;
/// Bytes of the header of a compact batch.
const COMPACT: usize = 16;

/// Puts the CRC of everything before it into the last four bytes.
fn seal(bytes: &mut [u8]) {
    if let Some((covered, crc)) = bytes.split_last_chunk_mut::<4>() {
        *crc = crc32fast::hash(covered).to_le_bytes();
    }
}

/// The first byte as flags, and the rest.
fn flags(data: &[u8]) -> (u8, &[u8]) {
    data.split_first().map_or((0, data), |(&flags, rest)| (flags, rest))
}

fn number(bytes: &[u8], at: usize) -> u64 {
    (0..8).fold(0, |number, index| number | u64::from(bytes.get(at + index).copied().unwrap_or(0)) << (8 * index))
}

/// A stream of frames, each with its body.
pub fn frames(data: &[u8]) {
    let (flags, mut rest) = flags(data);
    while let Some((header, behind)) = rest.split_first_chunk::<16>() {
        let mut header = *header;
        if flags & 1 != 0 {
            seal_frame(&mut header, behind);
        }
        let Ok(frame) = FrameHeader::decode(&header) else { return };
        assert_eq!(frame.encode(), header);
        assert!(frame.kind.prefix_len() <= frame.len && frame.len <= frame.kind.max_len());
        let (body, behind) = behind.split_at(behind.len().min(frame.len as usize));
        let is_whole = body.len() >= frame.kind.covered_len(frame.len) as usize;
        let checked = BodyCheck::new(frame).take(body);
        if flags & 1 != 0 || !is_whole {
            assert_eq!(checked, Ok(()));
        }
        if let Err(error) = checked {
            drop(error.from_peer("peer").to_string());
        } else if is_whole {
            assert!(
                FrameHeader::new(frame.kind, frame.flags, body, &[]).is_ok_and(|made| made.body_crc == frame.body_crc)
            );
        }
        decode_body(frame.kind, body);
        rest = behind;
    }
}

/// Puts both checksums of a header right, as far as its length makes sense.
fn seal_frame(header: &mut [u8; 16], behind: &[u8]) {
    if let Some(kind) = FrameKind::from_wire(header[2]) {
        let covered = kind.covered_len(u32::from_le_bytes([header[4], header[5], header[6], header[7]])) as usize;
        let crc = behind.get(..covered).map_or(0, crc32fast::hash);
        header[8..12].copy_from_slice(&crc.to_le_bytes());
    }
    seal(header);
}

/// One body: the first byte is its kind.
pub fn messages(data: &[u8]) {
    let (kind, body) = flags(data);
    if let Some(kind) = FrameKind::from_wire(kind) {
        decode_body(kind, body);
    }
}

fn decode_body(kind: FrameKind, body: &[u8]) {
    match Message::decode(kind, body) {
        Ok(Message::Error(message)) => {
            // Bytes that are no text are replaced; once that is done, it stays as it is.
            assert_eq!(ErrorMessage::decode(&message.to_vec()), Ok(message));
        }
        Ok(message) => assert!(message.kind() == kind && message.to_vec() == body, "{message:?}"),
        Err(error) => drop(error.from_peer("peer").to_string()),
    }
    let same = |read: Option<Vec<u8>>, len: usize| assert!(read.is_none_or(|read| read == body[..len]));
    let prefix = |len: usize| body.get(..len).unwrap_or_default();
    same(WalDataHeader::decode(prefix(WalDataHeader::LEN)).ok().map(|read| read.to_vec()), WalDataHeader::LEN);
    same(BaseDataHeader::decode(prefix(BaseDataHeader::LEN)).ok().map(|read| read.to_vec()), BaseDataHeader::LEN);
    let piece = SegmentPieceHeader::decode(prefix(SegmentPieceHeader::LEN));
    same(piece.ok().map(|read| read.to_vec()), SegmentPieceHeader::LEN);
}

/// The header page of a segment.
pub fn segment_header(data: &[u8]) {
    let (flags, data) = flags(data);
    let mut page = [0; PAGE];
    let len = data.len().min(PAGE);
    page[..len].copy_from_slice(&data[..len]);
    if flags & 1 != 0 {
        seal(&mut page[..64]);
    }
    if let Ok(header) = SegmentHeader::decode(&page) {
        assert_eq!(header.encode(), page);
        assert_eq!(header.id.to_string().parse(), Ok(header.id));
    }
}

/// Puts the checksum and the chain of each batch right, as far as the lengths make sense. `chain` is that before it.
fn seal_batches(bytes: &mut [u8], mut chain: u32) {
    let mut rest = bytes;
    while let Some(first) = rest.first_chunk::<COMPACT>() {
        let detail = u32::from_le_bytes([first[4], first[5], first[6], first[7]]);
        let is_compact = detail >> 31 != 0;
        let total = match rest.first_chunk::<BATCH>() {
            _ if is_compact => (COMPACT as u64 + u64::from(detail >> 19 & 0xfff)).next_multiple_of(8),
            Some(first) => BatchHeader::decode(first).total_len(),
            None => return,
        };
        let Some(total) = usize::try_from(total).ok().filter(|&total| total <= rest.len()) else { return };
        let (this, behind) = rest.split_at_mut(total);
        if !is_compact {
            this[20..24].copy_from_slice(&chain.to_le_bytes());
        }
        let mut hasher = crc32fast::Hasher::new_with_initial(chain);
        hasher.update(&this[4..]);
        chain = hasher.finalize();
        this[..4].copy_from_slice(&chain.to_le_bytes());
        rest = behind;
    }
}

/// Batches: behind the flags the room in their segment (2 bytes, times 16), and then the bytes.
pub fn batches(data: &[u8]) {
    let (flags, data) = flags(data);
    let Some((room, data)) = data.split_first_chunk::<2>() else { return };
    let room = u64::from(u16::from_le_bytes(*room)) * 16;
    let mut bytes = data.to_vec();
    let Some(first) = bytes.first_chunk::<BATCH>() else {
        let at = Expected { first_lsn: Lsn(1), chain: Chain(0), epoch: Epoch(1) };
        let found = batch::verify(&bytes, room, at);
        assert!(found.is_err() || found.is_ok_and(|header| header.is_compact()));
        return;
    };
    // Where the first one is compact, this is what its bytes would say if it were not; any LSN but 0 will do.
    let mut first = BatchHeader::decode(first);
    first.first_lsn.0 = first.first_lsn.0.max(1);
    if flags & 1 != 0 {
        seal_batches(&mut bytes, first.prev_crc.0);
    }
    let mut at = Expected { first_lsn: first.first_lsn, chain: first.prev_crc, epoch: first.epoch };
    let (mut offset, mut count) = (0, 0);
    while let Ok(found) = batch::verify(&bytes[offset..], room.saturating_sub(offset as u64), at) {
        offset += usize::try_from(found.total_len()).expect("it was verified");
        at = Expected { first_lsn: found.last_lsn().next(), chain: found.crc, epoch: found.epoch };
        count += u64::from(found.record_count);
    }
    // What was verified is walked with the same result; what was not is walked without harm.
    let segment = SegmentHeader { epoch: first.epoch, ..header_beginning_with(first.first_lsn) };
    let walked: usize = BatchIter::within(&segment, &bytes[..offset]).map(|batch| batch.records().count()).sum();
    assert_eq!(walked as u64, count);
    for found in BatchIter::new(&bytes).chain(BatchIter::within(&segment, &bytes)) {
        assert!(found.records().map(|record| record.bytes.len()).sum::<usize>() <= bytes.len());
    }
}

/// A whole segment.
pub fn segment_payload(data: &[u8]) {
    let (flags, data) = flags(data);
    let mut bytes = data.to_vec();
    if flags & 2 != 0 {
        // The zeros of a header page need not be in the input.
        let head = bytes.len().min(64);
        bytes.splice(head..head, std::iter::repeat_n(0, PAGE - 64));
    }
    if flags & 1 != 0 && bytes.len() >= PAGE {
        seal(&mut bytes[..64]);
        let chain = u32::from_le_bytes([bytes[56], bytes[57], bytes[58], bytes[59]]);
        seal_batches(&mut bytes[PAGE..], chain);
    }
    let unverified = |id, count| WalSegmentPayload::unverified(id, count, bytes.clone()).verify();
    match WalSegmentPayload::from_bytes(bytes.clone()) {
        Ok(payload) => {
            let summary = payload.verify().expect("it was verified");
            assert_eq!(unverified(payload.id(), payload.event_count()), Ok(summary));
            assert!(unverified(payload.id(), payload.event_count() + 1).is_err());
        }
        Err(error) => {
            drop(error.to_string());
            let id = WalSegmentId { region: RegionId(0), shard: ShardId(0), first_lsn: Lsn(1) };
            assert!(unverified(id, 1).is_err());
        }
    }
}

/// The file that says what a data directory is.
pub fn manifest(data: &[u8]) {
    let (flags, data) = flags(data);
    let mut bytes = data.to_vec();
    if flags & 1 != 0 {
        seal(&mut bytes);
    }
    match Manifest::decode(&bytes, Path::new("MANIFEST")) {
        // A file of the version before is written in that of today.
        Ok(manifest) if matches!(bytes.get(8..10), Some([1 | 2, 0])) => {
            assert_eq!(Manifest::decode(&manifest.encode(), Path::new("MANIFEST")).unwrap(), manifest);
        }
        Ok(manifest) => assert_eq!(manifest.encode().as_slice(), bytes),
        Err(error) => assert!(error.to_string().contains("MANIFEST")),
    }
}

/// How far applying had come.
pub fn checkpoint(data: &[u8]) {
    let (flags, data) = flags(data);
    let mut bytes = data.to_vec();
    if flags & 1 != 0 {
        seal(&mut bytes);
    }
    match Checkpoint::decode(&bytes) {
        Ok(checkpoint) => {
            assert_eq!(checkpoint.encode(), bytes);
            let shards: Vec<ShardId> = checkpoint.entries.keys().copied().collect();
            let state = ReplicationState::from_checkpoint_bytes(&bytes, &shards);
            drop(state.map(|state| state.to_checkpoint_bytes()));
        }
        Err(error) => drop(error.to_string()),
    }
}

/// The list of followers: behind the flags the number of shards.
pub fn registry(data: &[u8]) {
    let (flags, data) = flags(data);
    let mut bytes = data.to_vec();
    if flags & 1 != 0 {
        seal(&mut bytes);
    }
    match seams::decode_registry(&bytes, u16::from(flags >> 1)) {
        Ok(again) => assert_eq!(again, bytes),
        Err(error) => assert!(error.to_string().contains("followers")),
    }
}

/// The three formats of the fixed store: by the flags a header page, a slot, or a record. Behind them the lengths of
/// keys and values and a slot number, where that matters.
pub fn fixed_store(data: &[u8]) {
    let (flags, data) = flags(data);
    if flags & 6 == 0 {
        let mut page = [0; PAGE];
        for (copy, bytes) in data.chunks(64).take(2).enumerate() {
            let header = &mut page[copy * 2048..][..64];
            header[..bytes.len()].copy_from_slice(bytes);
            if flags & 1 != 0 {
                seal(header);
            }
        }
        if let Ok(again) = seams::decode_store_header(&page) {
            assert!([0, 2048].iter().any(|&at| page[at..at + 64] == again));
        }
        drop(seams::decode_store_header(data));
        return;
    }
    let Some((lengths, data)) = data.split_first_chunk::<2>() else { return };
    let shape = (u32::from(lengths[0]), u32::from(lengths[1]));
    if flags & 2 != 0 {
        if let Ok(again) = seams::decode_store_record(shape, data) {
            assert_eq!(again, data);
        }
        return;
    }
    let (slot, mut bytes) = (number(data, 0), data.get(8..).unwrap_or_default().to_vec());
    if flags & 1 != 0 && bytes.len() >= 4 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&slot.to_le_bytes());
        hasher.update(&bytes[4..]);
        let crc = hasher.finalize();
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
    }
    if let Ok(again) = seams::decode_store_slot(shape, slot, &bytes) {
        assert_eq!(again, bytes);
    }
}

/// What a node says about itself.
pub fn status(data: &[u8]) {
    if let Ok(status) = Status::decode(data) {
        assert_eq!(Status::decode(&status.encode()).as_ref(), Ok(&status));
        assert!(status.to_json().starts_with('{'));
    }
}

/// A shape and lines of keys and values, as the command line tool takes them.
pub fn key_values(data: &[u8]) {
    let mut all = data.split(|&byte| byte == b'\n');
    let shape = std::str::from_utf8(all.next().unwrap_or_default()).unwrap_or_default();
    let Ok(shape) = shape.parse::<lines::Shape>() else { return };
    for line in all {
        let (key, value) = lines::split(line);
        let again = value.map_or_else(|| key.to_vec(), |value| [key, b"\t", value].concat());
        assert!(again == line && !key.contains(&b'\t'));
        if shape.check(line).is_ok() {
            assert!(line.len() <= shape.longest() && key.len() as u64 <= u64::from(shape.key_len));
        }
    }
}

/// Words and names: whatever parses prints as something that means the same.
pub fn texts(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(id) = text.parse::<WalSegmentId>() {
        assert_eq!(id.to_string(), text);
    }
    if let Ok(commit) = text.parse::<Commit>() {
        assert_eq!(commit.to_string().parse::<Commit>().expect("it was printed"), commit);
    }
    if let Ok(node) = text.parse::<NodeId>() {
        assert_eq!(node.to_string().parse(), Ok(node));
    }
    if let Ok(cluster) = text.parse::<ClusterId>() {
        assert_eq!(cluster.to_string().parse(), Ok(cluster));
    }
}

/// A log that takes in what its leader sends, thrown away once anything has been written to it.
struct Intake {
    writer: LogWriter,
    wal: Wal,
    directory: PathBuf,
}

impl Intake {
    fn new() -> Intake {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("towline-ingest-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("there is room for temporary files");
        let options = WalOptions { sync: SyncPolicy::Never, populate_ahead: 0, ..WalOptions::default() };
        let (wal, writer) = Wal::open(&directory, IDENTITY, options).expect("an empty log opens");
        Intake { writer, wal, directory }
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// What the log of [`ingest`] is.
pub const IDENTITY: LogIdentity =
    LogIdentity { cluster: ClusterId(1), region: RegionId(0), shard: ShardId(0), segment_size: 65536 };

/// The first header page of that log.
pub fn first_header() -> [u8; PAGE] {
    header_beginning_with(Lsn(1)).encode()
}

fn header_beginning_with(first_lsn: Lsn) -> SegmentHeader {
    let id = WalSegmentId { region: IDENTITY.region, shard: IDENTITY.shard, first_lsn };
    let chain_before = Chain::genesis(IDENTITY.cluster, IDENTITY.region, IDENTITY.shard);
    let (cluster, segment_size) = (IDENTITY.cluster, IDENTITY.segment_size);
    SegmentHeader { id, cluster, epoch: Epoch(1), chain_before, segment_size, version: 3 }
}

/// What a leader sends, on its way into a follower's log: pieces with their length (2 bytes). By the flags, a header
/// page comes first (2), checksums and chains are put right (1), and pieces say where they belong (4) in 10 bytes,
/// instead of going where the next ones are due. What does not continue the log must leave it as it was.
pub fn ingest(data: &[u8]) {
    thread_local! {
        static INTAKE: RefCell<Option<Intake>> = const { RefCell::new(None) };
    }
    let (flags, mut data) = flags(data);
    INTAKE.with_borrow_mut(|intake| {
        let log = intake.get_or_insert_with(Intake::new);
        let before = log.writer.end();
        if flags & 2 != 0 {
            take_in(&mut log.writer, (Lsn(1), 0), &mut first_header());
        }
        while let Some((len, rest)) = data.split_first_chunk::<2>() {
            let (piece, behind) = rest.split_at(rest.len().min(usize::from(u16::from_le_bytes(*len))));
            data = behind;
            let mut place = log.writer.ingest_position();
            let mut piece = piece.to_vec();
            if flags & 4 != 0 && piece.len() >= 10 {
                place = (Lsn(number(&piece, 0)), number(&piece, 8) & 0xffff);
                piece.drain(..10);
            }
            if flags & 1 != 0 {
                seal_batches(&mut piece, log.writer.end().chain.0);
            }
            take_in(&mut log.writer, place, &mut piece);
        }
        log.writer.discard_partial();
        let end = log.writer.end();
        assert_eq!(log.wal.log().head(), end.head);
        if end != before {
            // What was published is sound, and the next input gets an empty log again.
            let published: usize = log
                .wal
                .log()
                .ranges_from(Lsn(1))
                .map_or(0, |ranges| ranges.iter().map(|range| range.records().count()).sum());
            assert!(published as u64 <= end.head.0);
            *intake = None;
        }
    });
}

/// One frame's worth of bytes, as the receiver takes them in.
fn take_in(writer: &mut LogWriter, (segment, mut offset): (Lsn, u64), bytes: &mut [u8]) {
    let mut rest = &*bytes;
    while !rest.is_empty() {
        let before = writer.end();
        let taken = writer.ingest_window(segment, offset, rest.len() as u64).map(|window| {
            let len = window.len().min(rest.len());
            window[..len].copy_from_slice(&rest[..len]);
            len
        });
        let result = taken.and_then(|len| writer.ingest_filled(len as u64).map(|_| len));
        match result {
            Ok(len) => {
                rest = &rest[len..];
                offset += len as u64;
            }
            Err(error) => {
                drop(error.to_string());
                assert_eq!(writer.end(), before, "what was refused has left something");
                return;
            }
        }
    }
}
