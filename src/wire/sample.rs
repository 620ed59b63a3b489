//! What the tests of this module and of the transports send: messages with the bytes they must have, and segments.

use std::fs::File;
use std::sync::Arc;

use crate::error::RefusalCode;
use crate::limits::MIN_SEGMENT_SIZE;
use crate::types::{Chain, ClusterId, Epoch, HybridTimestamp, Lsn, NodeId, RegionId, SessionId, ShardId, WalSegmentId};
use crate::wal::segment::{HEADER_PAGE, SEGMENT_VERSION};
use crate::wal::{Expected, Mapping, Segment, SegmentHeader, batch};
use crate::wire::*;

/// The bytes of hexadecimal digits; blanks are for the eye.
pub(crate) fn bytes_of_hex(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16).unwrap()).unwrap();
    assert!(digits.len().is_multiple_of(2));
    digits.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

pub(crate) fn sync_request() -> SyncRequest {
    SyncRequest {
        versions: VersionRange { min: 1, max: 2 },
        purpose: Purpose::Tail,
        cluster: ClusterId(0x100f_0e0d_0c0b_0a09_0807_0605_0403_0201),
        node: NodeId(0x11),
        region: RegionId(0x22),
        shard: ShardId(0x33),
        shard_count: 0x44,
        segment_size: 0x0400_0000,
        epoch: Epoch(5),
        received: Lsn(0x0807_0605_0403_0201),
        durable: Lsn(7),
        applied: Lsn(8),
        chain: Chain(0xaabb_ccdd),
        from: Lsn(9),
        flags: SyncRequest::BASE_INCOMPLETE,
    }
}

fn shard_info() -> ShardInfo {
    ShardInfo {
        version: 1,
        cluster: ClusterId(0x100f_0e0d_0c0b_0a09_0807_0605_0403_0201),
        node: NodeId(0x11),
        region: RegionId(0x22),
        shard: ShardId(0x33),
        shard_count: 0x44,
        segment_size: 0x0400_0000,
        epoch: Epoch(5),
        tail: Lsn(6),
        head: Lsn(0x0807_0605_0403_0201),
        session: SessionId(7),
        session_kind: SessionKind::Rebuild,
        start: Lsn(8),
        target: Lsn(9),
        start_segment: Lsn(10),
        start_offset: 4096,
        heartbeat_ms: 1000,
        timeout_ms: 5000,
        key_len: 16,
        value_len: 64,
        prefix_bits: 4,
    }
}

/// One message of every kind, and its bytes, field by field.
pub(crate) fn golden_messages() -> Vec<(Message, &'static str)> {
    let (session, epoch) = (SessionId(7), Epoch(5));
    vec![
        (
            sync_request().into(),
            "0100 0200 03 0102030405060708090a0b0c0d0e0f10 1100000000000000 2200 3300 4400 0000000400000000
             0500000000000000 0102030405060708 0700000000000000 0800000000000000 ddccbbaa 0900000000000000 01",
        ),
        (
            shard_info().into(),
            "0100 0102030405060708090a0b0c0d0e0f10 1100000000000000 2200 3300 4400 0000000400000000
             0500000000000000 0600000000000000 0102030405060708 0700000000000000 03 0800000000000000
             0900000000000000 0a00000000000000 0010000000000000 e8030000 88130000 10000000 40000000 04",
        ),
        (
            BaseComplete { session, epoch, base_lsn: Lsn(8), blocks: 9, checksum: 0xaabb_ccdd }.into(),
            "0700000000000000 0500000000000000 0800000000000000 0900000000000000 ddccbbaa",
        ),
        (CaughtUp { head: Lsn(0x0807_0605_0403_0201) }.into(), "0102030405060708"),
        (
            Ack { received: Lsn(3), durable: Lsn(2), applied: Lsn(1), chain: Chain(0xaabb_ccdd), epoch, session }
                .into(),
            "0300000000000000 0200000000000000 0100000000000000 ddccbbaa 0500000000000000 0700000000000000",
        ),
        (Sync { lsn: Lsn(0x0807_0605_0403_0201) }.into(), "0102030405060708"),
        (
            SyncAck { lsn: Lsn(0x0807_0605_0403_0201), session, epoch }.into(),
            "0102030405060708 0700000000000000 0500000000000000",
        ),
        (
            SessionControl {
                session,
                epoch,
                action: SessionAction::Accept,
                kind: SessionKind::CatchUp,
                base_lsn: Lsn(8),
                target: Lsn(9),
                log_start: Lsn(10),
                block_len: 11,
                block_count: 12,
            }
            .into(),
            "0700000000000000 0500000000000000 03 02 0800000000000000 0900000000000000
             0a00000000000000 0b000000 0c00000000000000",
        ),
        (
            SessionAck {
                session,
                epoch,
                phase: SessionPhase::Failed,
                achieved: Lsn(8),
                reason: SessionFailure::Cancelled,
                blocks: 9,
            }
            .into(),
            "0700000000000000 0500000000000000 05 0800000000000000 0a 0900000000000000",
        ),
        (
            Heartbeat {
                epoch,
                head: Lsn(8),
                committed: Lsn(7),
                chain: Chain(0xaabb_ccdd),
                sent_unix_ms: 0x0000_0198_0000_0001,
            }
            .into(),
            "0500000000000000 0800000000000000 0700000000000000 ddccbbaa 0100000098010000",
        ),
        (
            SegmentRange { segment: Lsn(0x0807_0605_0403_0201), offset: 9, len: 10 }.into(),
            "0102030405060708 0900000000000000 0a00000000000000",
        ),
        (ErrorMessage::new(RefusalCode::NotRetained, "no é").into(), "0600 6e6f20c3a9"),
        (
            EpochHistory::new(
                2,
                vec![
                    EpochEnd { epoch: Epoch(5), lsn: Lsn(0x0807_0605_0403_0201), chain: Chain(0xaabb_ccdd) },
                    EpochEnd { epoch: Epoch::ZERO, lsn: Lsn(6), chain: Chain(7) },
                ],
            )
            .into(),
            "0200 02 0500000000000000 0102030405060708 ddccbbaa 0000000000000000 0600000000000000 07000000",
        ),
        (
            CommonPoint { tail_epoch: Epoch(5), lsn: Lsn(6), chain: Chain(0xaabb_ccdd), flags: CommonPoint::FOUND }
                .into(),
            "0500000000000000 0600000000000000 ddccbbaa 01",
        ),
        (Message::StatusRequest, ""),
    ]
}

pub(crate) const SEGMENT_ID: WalSegmentId =
    WalSegmentId { region: RegionId(1), shard: ShardId(2), first_lsn: Lsn(100) };

/// The bytes of a sealed segment with one batch for each list of records.
pub(crate) fn sealed_bytes(batches: &[&[&[u8]]], segment_size: u64) -> Vec<u8> {
    let header = SegmentHeader {
        id: SEGMENT_ID,
        cluster: ClusterId(9),
        epoch: Epoch(3),
        chain_before: Chain(0x1234_5678),
        segment_size,
        version: SEGMENT_VERSION,
    };
    let mut bytes = header.encode().to_vec();
    let mut at = Expected { first_lsn: SEGMENT_ID.first_lsn, chain: header.chain_before, epoch: header.epoch };
    for records in batches.iter().copied().chain([&[][..]]) {
        let built = batch::build(at, HybridTimestamp(1), Lsn::ZERO, records);
        let header = batch::verify(&built, segment_size, at).unwrap();
        at = Expected { first_lsn: header.last_lsn().next(), chain: header.crc, ..at };
        bytes.extend_from_slice(&built);
    }
    bytes
}

/// A mapped segment with these published bytes.
pub(crate) fn mapped(bytes: &[u8], sealed: bool) -> (Arc<Segment>, tempfile::TempDir) {
    let header = SegmentHeader::decode(bytes[..HEADER_PAGE].try_into().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(header.id.to_string());
    let mut whole = bytes.to_vec();
    whole.resize(usize::try_from(header.segment_size).unwrap(), 0);
    std::fs::write(&path, whole).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mapping = Mapping::new(&file, header.segment_size).unwrap();
    let records = crate::wal::BatchIter::new(&bytes[HEADER_PAGE..]).last().map(|batch| batch.header.last_lsn());
    let sealed = records.filter(|_| sealed);
    let (segment, _writer) = Segment::new(header, path, file, mapping, bytes.len() as u64, sealed);
    (segment, dir)
}

/// A small sealed segment: two batches, three records.
pub(crate) fn small_segment() -> Vec<u8> {
    sealed_bytes(&[&[b"one", b"two"], &[b"three"]], MIN_SEGMENT_SIZE)
}
