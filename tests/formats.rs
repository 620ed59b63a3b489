//! Golden files: bytes of the first version of each format, which every version to come must read as they are read
//! here. They are never written again. A new version of a format gets files of its own beside them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use towline::data_dir::Manifest;
use towline::repair::Repair;
use towline::wal::scan::{Relation, scan_segment, verify_log};
use towline::wal::segment::SegmentHeader;
use towline::wal::{BatchIter, Expected, KnownSynced, LogIdentity, Wal, WalOptions, batch};
use towline::wire::{BodyCheck, FrameHeader, Message, WalSegmentPayload};
use towline::{
    Chain, Checkpoint, CheckpointEntry, ClusterId, Epoch, HybridTimestamp, Lsn, NodeId, RegionId, SessionId, ShardId,
    WalSegmentId,
};

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

const CLUSTER: ClusterId = ClusterId(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
const SEGMENT_SIZE: u64 = 65536;

fn identity() -> LogIdentity {
    LogIdentity { cluster: CLUSTER, region: RegionId(2), shard: ShardId(3), segment_size: SEGMENT_SIZE }
}

fn manifest() -> Manifest {
    Manifest {
        cluster: CLUSTER,
        node: NodeId(0x0102_0304_0506_0708),
        region: RegionId(2),
        shard_count: 4,
        segment_size: SEGMENT_SIZE,
        epoch: Epoch(5),
        own_epoch: true,
    }
}

fn checkpoint() -> Checkpoint {
    let entry = |applied, synced| CheckpointEntry { applied: Lsn(applied), synced: Lsn(synced) };
    Checkpoint { entries: [(ShardId(0), entry(7, 9)), (ShardId(3), entry(4, 4))].into() }
}

/// The record of each LSN in the golden log.
const RECORDS: [&[u8]; 4] = [b"one", b"two", b"", b"four"];

/// A segment of two batches, and its sealing batch.
fn segment() -> Vec<u8> {
    let id = WalSegmentId { region: RegionId(2), shard: ShardId(3), first_lsn: Lsn(1) };
    let chain_before = Chain::genesis(CLUSTER, RegionId(2), ShardId(3));
    let (cluster, epoch, segment_size) = (CLUSTER, Epoch(5), SEGMENT_SIZE);
    let header = SegmentHeader { id, cluster, epoch, chain_before, segment_size, version: 2 };
    let mut bytes = header.encode().to_vec();
    let mut at = Expected { first_lsn: Lsn(1), chain: chain_before, epoch: Epoch(5) };
    for (number, records) in (1..).zip([&RECORDS[..1], &RECORDS[1..], &[]]) {
        let batch = batch::build(at, HybridTimestamp(number << 20), at.first_lsn.previous(), records);
        let built = batch::verify(&batch, SEGMENT_SIZE, at).unwrap();
        at.first_lsn = built.last_lsn().next();
        at.chain = built.crc;
        bytes.extend(batch);
    }
    bytes
}

/// The record of each LSN of the golden log with compact batches: the shortest, the longest, and what is between.
fn compact_records() -> [Vec<u8>; 5] {
    [b"one".to_vec(), b"two".to_vec(), Vec::new(), vec![4; 4095], b"five".to_vec()]
}

/// A segment of which all batches but the first and the sealing one are compact. They begin where the bits of an LSN
/// that they have go on with zeros, and with the highest timestamp that they can have.
fn compact_segment() -> Vec<u8> {
    let first_lsn = Lsn((7 << 26) - 2);
    let id = WalSegmentId { region: RegionId(2), shard: ShardId(3), first_lsn };
    let (cluster, epoch, chain_before, segment_size) = (CLUSTER, Epoch(5), Chain(0x0a0b_0c0d), SEGMENT_SIZE);
    let header = SegmentHeader { id, cluster, epoch, chain_before, segment_size, version: 3 };
    let mut bytes = header.encode().to_vec();
    let mut at = Expected { first_lsn, chain: chain_before, epoch };
    let records = compact_records();
    for (number, record) in (1..).zip(records.iter().map(Some).chain([None])) {
        let timestamp =
            if number == 3 { HybridTimestamp((1 << 58) - (1 << 16) + 0x7fff) } else { HybridTimestamp(number) };
        let batch = match record {
            Some(record) if number > 1 => batch::build_compact(at, timestamp, record).unwrap(),
            Some(record) => batch::build(at, timestamp, at.first_lsn.previous(), &[record]),
            None => batch::build(at, timestamp, at.first_lsn.previous(), &[]),
        };
        let built = batch::verify(&batch, SEGMENT_SIZE, at).unwrap();
        assert_eq!(built.timestamp, timestamp);
        at = Expected { first_lsn: built.last_lsn().next(), chain: built.crc, epoch };
        bytes.extend(batch);
    }
    bytes
}

/// Every message of the golden stream.
fn messages() -> Vec<Message> {
    use towline::wire::*;
    vec![
        Message::SyncRequest(SyncRequest {
            versions: VersionRange { min: 1, max: 1 },
            purpose: Purpose::Follow,
            cluster: CLUSTER,
            node: NodeId(7),
            region: RegionId(2),
            shard: ShardId(3),
            shard_count: 4,
            segment_size: SEGMENT_SIZE,
            epoch: Epoch(5),
            received: Lsn(4),
            durable: Lsn(3),
            applied: Lsn(2),
            chain: Chain(0x0a0b_0c0d),
            from: Lsn::ZERO,
            flags: 0,
        }),
        Message::CaughtUp(CaughtUp { head: Lsn(4) }),
        Message::Ack(Ack {
            received: Lsn(4),
            durable: Lsn(3),
            applied: Lsn(2),
            chain: Chain(0x0a0b_0c0d),
            epoch: Epoch(5),
            session: SessionId(6),
        }),
        Message::Sync(Sync { lsn: Lsn(4) }),
        Message::SyncAck(SyncAck { lsn: Lsn(4), session: SessionId(6), epoch: Epoch(5) }),
        Message::Heartbeat(Heartbeat {
            epoch: Epoch(5),
            head: Lsn(4),
            committed: Lsn(3),
            chain: Chain(0x0a0b_0c0d),
            sent_unix_ms: 1_700_000_000_000,
        }),
        Message::Error(ErrorMessage::new(towline::RefusalCode::Diverged, "no — not this history")),
        Message::StatusRequest,
    ]
}

/// Every message that came with version 2, and what it changed.
fn messages_since_2() -> Vec<Message> {
    use towline::wire::*;
    let end = |epoch, lsn, chain| EpochEnd { epoch: Epoch(epoch), lsn: Lsn(lsn), chain: Chain(chain) };
    vec![
        Message::EpochHistory(EpochHistory::new(2, vec![end(5, 9, 0x0a0b_0c0d), end(3, 4, 0x0102_0304), end(0, 0, 7)])),
        Message::CommonPoint(CommonPoint {
            tail_epoch: Epoch(4),
            lsn: Lsn(4),
            chain: Chain(0x0102_0304),
            flags: CommonPoint::FOUND | CommonPoint::CUT_POSSIBLE,
        }),
        Message::SessionAck(SessionAck {
            session: SessionId(6),
            epoch: Epoch(5),
            phase: SessionPhase::MakingDurable,
            achieved: Lsn(4),
            reason: SessionFailure::None,
            blocks: 8,
        }),
    ]
}

/// The messages of a stream, to its end.
fn decoded(stream: &[u8]) -> Vec<Message> {
    let mut rest = stream;
    let mut decoded = Vec::new();
    while let Some((header, behind)) = rest.split_first_chunk() {
        let header = FrameHeader::decode(header).unwrap();
        let (body, behind) = behind.split_at(header.len as usize);
        BodyCheck::new(header).take(body).unwrap();
        decoded.push(Message::decode(header.kind, body).unwrap());
        rest = behind;
    }
    assert!(rest.is_empty());
    decoded
}

fn stream(messages: Vec<Message>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        let body = message.to_vec();
        bytes.extend(FrameHeader::new(message.kind(), 0, &body, &[]).unwrap().encode());
        bytes.extend(body);
    }
    bytes
}

#[test]
fn a_manifest_of_version_1() {
    let bytes = golden("MANIFEST-v1");
    // Whose the epoch is was not kept then.
    let manifest = Manifest { own_epoch: false, ..manifest() };
    assert_eq!(Manifest::decode(&bytes, Path::new("MANIFEST-v1")).unwrap(), manifest);
}

#[test]
fn a_manifest_of_version_2() {
    let bytes = golden("MANIFEST-v2");
    assert_eq!(Manifest::decode(&bytes, Path::new("MANIFEST-v2")).unwrap(), manifest());
}

#[test]
fn a_directory_of_manifest_version_2_is_marked_by_whoever_writes_to_it_and_by_nobody_else() {
    let directory = || {
        let directory = tempfile::tempdir().unwrap();
        for shard in (0..4).map(ShardId) {
            std::fs::create_dir(directory.path().join(towline::types::shard_directory_name(shard))).unwrap();
        }
        std::fs::write(directory.path().join("MANIFEST"), golden("MANIFEST-v2")).unwrap();
        std::fs::write(directory.path().join("LOCK"), b"").unwrap();
        directory
    };
    let version = |directory: &tempfile::TempDir| std::fs::read(directory.path().join("MANIFEST")).unwrap()[8];
    let net = common::net::Net::in_process();
    // Nothing is damaged, so nobody is asked.
    let repaired = directory();
    let repair = |dry_run| Repair { dry_run, ..Repair::new(repaired.path()) };
    repair(true).run(net.transport.as_ref(), &net.address).unwrap();
    assert_eq!(version(&repaired), 2);
    repair(false).run(net.transport.as_ref(), &net.address).unwrap();
    assert_eq!(version(&repaired), 3);
    let led = directory();
    drop(towline::Node::builder(led.path()).transport(net.transport.clone()).lead(&net.address).unwrap());
    assert_eq!(version(&led), 3);
}

#[test]
fn a_manifest_of_version_3() {
    let bytes = golden("MANIFEST-v3");
    assert_eq!(Manifest::decode(&bytes, Path::new("MANIFEST-v3")).unwrap(), manifest());
    assert_eq!(manifest().encode(), bytes.as_slice());
}

#[test]
fn a_checkpoint_of_version_1() {
    let bytes = golden("checkpoint-v1");
    assert_eq!(Checkpoint::decode(&bytes), Ok(checkpoint()));
    assert_eq!(checkpoint().encode(), bytes);
}

#[test]
fn frames_of_protocol_version_1() {
    let bytes = golden("frames-v1");
    assert_eq!(decoded(&bytes), messages());
    assert_eq!(stream(messages()), bytes);
}

#[test]
fn frames_that_came_with_protocol_version_2() {
    let bytes = golden("frames-v2");
    assert_eq!((decoded(&bytes), stream(messages_since_2())), (messages_since_2(), bytes));
}

/// The golden segment as the log of a shard: the file as long as it was, which is zeros behind what is stored.
fn log_of_golden_segment() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let mut bytes = golden("segment-v2");
    bytes.resize(usize::try_from(SEGMENT_SIZE).unwrap(), 0);
    let path = directory.path().join(towline::types::shard_directory_name(ShardId(3)));
    std::fs::create_dir_all(&path).unwrap();
    std::fs::write(path.join("r0002-s0003-00000000000000000001.wal"), bytes).unwrap();
    (directory, path)
}

#[test]
fn a_segment_of_batch_version_2() {
    let bytes = golden("segment-v2");
    assert!(segment() == bytes, "what is encoded differs");
    let payload = WalSegmentPayload::from_bytes(bytes).unwrap();
    assert_eq!(payload.id().to_string(), "r0002-s0003-00000000000000000001.wal");
    assert_eq!(payload.event_count(), 4);
    let (directory, shard) = log_of_golden_segment();
    let report = verify_log(&shard, Some(&identity()), KnownSynced::default(), &mut ()).unwrap();
    assert_eq!((report.tail, report.head, report.batches, report.epoch), (Lsn(1), Lsn(4), 3, Epoch(5)));
    assert_eq!((report.problems.len(), report.segments[0].sealed), (0, true));
    let records: Vec<_> = common::records_of(directory.path(), ShardId(3)).into_values().collect();
    assert_eq!(records, RECORDS);
}

#[test]
fn a_segment_with_compact_batches() {
    let bytes = golden("segment-v3");
    assert!(compact_segment() == bytes, "what is encoded differs");
    let payload = WalSegmentPayload::from_bytes(bytes.clone()).unwrap();
    let first = (7 << 26) - 2;
    assert_eq!(payload.id().to_string(), format!("r0002-s0003-{first:020}.wal"));
    assert_eq!(payload.event_count(), 5);
    // As files are read, and as mappings are.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(payload.id().to_string());
    std::fs::write(&path, &bytes).unwrap();
    let report = scan_segment(&path, &mut ()).unwrap();
    assert_eq!((report.records, report.last_lsn, report.sealed), (5, Lsn(first + 4), true));
    let header = SegmentHeader::decode(bytes.first_chunk().unwrap()).unwrap();
    let batches: Vec<_> = BatchIter::within(&header, &bytes[4096..]).collect();
    assert_eq!(batches.iter().filter(|batch| batch.header.is_compact()).count(), 4);
    let records = batches.iter().flat_map(|batch| batch.records());
    assert!(records.map(|record| (record.lsn.0, record.bytes.to_vec())).eq((first..).zip(compact_records())));
    assert!(batches.windows(2).all(|pair| pair[1].header.prev_crc == pair[0].header.crc));
}

#[test]
fn a_log_of_golden_files_is_opened_and_goes_on() {
    let (directory, shard) = log_of_golden_segment();
    let (untouched, _) = log_of_golden_segment();
    let (wal, mut writer) = Wal::open(&shard, identity(), WalOptions::default()).unwrap();
    assert_eq!((writer.end().head, writer.end().epoch), (Lsn(4), Epoch(5)));
    assert_eq!(writer.append(b"five").unwrap(), Lsn(5));
    drop(writer);
    wal.close().unwrap();
    let comparison = common::compare(directory.path(), untouched.path(), ShardId(3));
    assert!(matches!(comparison.relation, Relation::Ahead { records: 1, .. }), "{comparison:?}");
}

/// Makes files that are not there yet, for a new version; an existing one is left alone.
#[test]
#[ignore = "only for those who add a version of a format"]
fn write_missing_golden_files() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::fs::create_dir_all(&directory).unwrap();
    let files = [
        ("MANIFEST-v3", manifest().encode().to_vec()),
        ("checkpoint-v1", checkpoint().encode()),
        ("frames-v1", stream(messages())),
        ("frames-v2", stream(messages_since_2())),
        ("segment-v2", segment()),
        ("segment-v3", compact_segment()),
    ];
    for (name, bytes) in files {
        let path = directory.join(name);
        if !path.exists() {
            std::fs::write(path, bytes).unwrap();
        }
    }
}

/// Reads the golden file of a name by its decoder.
fn is_read(name: &str, bytes: &[u8]) -> bool {
    match name {
        "MANIFEST-v1" | "MANIFEST-v3" => Manifest::decode(bytes, Path::new(name)).is_ok(),
        "checkpoint-v1" => Checkpoint::decode(bytes).is_ok(),
        "segment-v2" | "segment-v3" => WalSegmentPayload::from_bytes(bytes).is_ok(),
        other => panic!("{other}"),
    }
}

/// The first batch of the golden segment, what it continues, and the room that it has.
fn first_batch() -> (Vec<u8>, Expected, u64) {
    let bytes = segment().split_off(4096);
    let chain = Chain::genesis(CLUSTER, RegionId(2), ShardId(3));
    let at = Expected { first_lsn: Lsn(1), chain, epoch: Epoch(5) };
    let len = usize::try_from(batch::verify(&bytes, SEGMENT_SIZE - 4096, at).unwrap().total_len()).unwrap();
    (bytes[..len].to_vec(), at, SEGMENT_SIZE - 4096)
}

proptest! {
    #[test]
    fn any_flipped_byte_and_any_cut_of_a_file_is_found(at in any::<prop::sample::Index>(), mask in 1u8..) {
        for name in ["MANIFEST-v1", "MANIFEST-v3", "checkpoint-v1", "segment-v2", "segment-v3"] {
            let mut bytes = golden(name);
            prop_assert!(is_read(name, &bytes));
            let at = at.index(bytes.len());
            prop_assert!(!is_read(name, &bytes[..at]), "{name} cut to {at}");
            bytes[at] ^= mask;
            prop_assert!(!is_read(name, &bytes), "{name} at {at}");
        }
    }

    #[test]
    fn any_flipped_byte_of_a_header_page_or_a_batch_is_found(at in any::<prop::sample::Index>(), mask in 1u8..) {
        let mut page: [u8; 4096] = segment()[..4096].try_into().unwrap();
        page[at.index(4096)] ^= mask;
        prop_assert!(SegmentHeader::decode(&page).is_err());
        let (mut bytes, expected, room) = first_batch();
        let at = at.index(bytes.len());
        prop_assert!(batch::verify(&bytes[..at], room, expected).is_err());
        bytes[at] ^= mask;
        prop_assert!(batch::verify(&bytes, room, expected).is_err());
    }

    /// The frames before the one that is changed are read, and that one is refused.
    #[test]
    fn any_flipped_byte_of_a_stream_of_frames_is_found(at in any::<prop::sample::Index>(), mask in 1u8..) {
        for name in ["frames-v1", "frames-v2"] {
            let mut bytes = golden(name);
            let changed = at.index(bytes.len());
            bytes[changed] ^= mask;
            let (mut rest, mut offset) = (bytes.as_slice(), 0);
            let found = loop {
                let (header, behind) = rest.split_first_chunk::<16>().expect("the change is found before the end");
                let Ok(frame) = FrameHeader::decode(header) else { break offset..offset + 16 };
                let (body, behind) = behind.split_at(frame.len as usize);
                offset += 16;
                if BodyCheck::new(frame).take(body).is_err() {
                    break offset..offset + body.len();
                }
                offset += body.len();
                rest = behind;
            };
            prop_assert!(found.contains(&changed), "{name}: {changed} was found in {found:?}");
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
        for name in ["MANIFEST-v1", "checkpoint-v1", "segment-v2", "segment-v3"] {
            let _ = is_read(name, &bytes);
        }
        let (_, expected, room) = first_batch();
        let _ = batch::verify(&bytes, room, expected);
        let _ = bytes.first_chunk().map(SegmentHeader::decode);
        let _ = towline::status::Status::decode(&bytes);
    }
}
