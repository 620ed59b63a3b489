//! Hostile input, kept: every case under `tests/corpus` is replayed through its decoder, whole, cut and changed, and so
//! is whatever a fuzzer finds and somebody adds there. The fuzz targets of the `fuzz` crate run the same decoders, and
//! each case is in a directory with the decoder's name. A decoder that panics, or that takes what it would write
//! differently, fails here.
//!
//! `TOWLINE_FUZZ_SECONDS=60 cargo test --release --test corpus -- --ignored` goes on with random changes for that long
//! for each decoder; `TOWLINE_FUZZ_DECODER` chooses one.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

#[path = "common/decoders.rs"]
mod decoders;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use decoders::Decoder;
use towline::data_dir::Manifest;
use towline::wal::segment::SegmentHeader;
use towline::wal::{Expected, batch};
use towline::wire::{FrameHeader, FrameKind};
use towline::{
    Chain, Checkpoint, CheckpointEntry, ClusterId, Epoch, HybridTimestamp, Lsn, NodeId, RegionId, ShardId, WalSegmentId,
};

fn directory_of(decoder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(decoder)
}

/// The cases of a decoder, by name.
fn cases(decoder: &str) -> Vec<(String, Vec<u8>)> {
    let directory = directory_of(decoder);
    let entries = directory.read_dir().unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut cases: Vec<_> = paths
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap()))
        .collect();
    cases.sort();
    cases
}

/// Names the input if the decoder panics.
fn feed((name, decode): Decoder, case: &str, input: &[u8]) {
    struct Named<'a>(&'a str, &'a str, &'a [u8]);
    impl Drop for Named<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let hex: String = self.2.iter().map(|byte| format!("{byte:02x}")).collect();
                eprintln!("{} fails on a change of {}: {hex}", self.0, self.1);
            }
        }
    }
    let _named = Named(name, case, input);
    decode(input);
}

/// A generator with a fixed seed: a failure comes again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % (end.max(1) as u64)).unwrap()
    }

    /// One of the numbers at which things end.
    fn edge(&mut self) -> u64 {
        let edges = [0, 1, 2, 0x7f, 0x80, 0xff, 0x100, 0xfff, 0x1000, 0xffff, 0x1_0000, u64::from(u32::MAX), u64::MAX];
        edges[self.below(edges.len())].wrapping_add(self.next() % 3).wrapping_sub(1)
    }

    /// Changes bytes in one of the ways in which lengths and numbers go wrong.
    fn change(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        let at = self.below(bytes.len() + 1);
        match self.below(8) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, self.next().to_le_bytes()[0]),
            2 => drop(bytes.splice(at..at, other.iter().copied().take(64))),
            3 if at < bytes.len() => drop(bytes.remove(at)),
            4 | 5 => {
                let width = [1, 2, 4, 8][self.below(4)];
                let number = self.edge().to_le_bytes();
                for (to, from) in bytes.iter_mut().skip(at).zip(&number[..width]) {
                    *to = *from;
                }
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
        }
    }
}

#[test]
fn every_kept_case_comes_back_whole_cut_and_changed() {
    for &decoder in decoders::ALL {
        let cases = cases(decoder.0);
        assert!(!cases.is_empty(), "{} has no case", decoder.0);
        let mut random = Random(0x2545_f491_4f6c_dd1d);
        for (name, bytes) in &cases {
            feed(decoder, name, bytes);
            // A log on disk takes a thousand times as long as the other decoders.
            let effort = if decoder.0 == "ingest" { 8 } else { 200 };
            let step = bytes.len() / effort + 1;
            for at in (0..bytes.len()).step_by(step) {
                feed(decoder, name, &bytes[..at]);
                let mut changed = bytes.clone();
                changed[at] ^= 1 << random.below(8);
                feed(decoder, name, &changed);
            }
            for _ in 0..effort {
                let mut changed = bytes.clone();
                let (_, other) = &cases[random.below(cases.len())];
                for _ in 0..=random.below(4) {
                    random.change(&mut changed, other);
                }
                feed(decoder, name, &changed);
            }
        }
    }
}

/// Random changes of the cases, and of what came of them, for a while.
#[test]
#[ignore = "runs for as long as TOWLINE_FUZZ_SECONDS says"]
fn random_changes_for_a_while() {
    let seconds = std::env::var("TOWLINE_FUZZ_SECONDS").map_or(1, |text| text.parse().expect("a number of seconds"));
    let chosen = std::env::var("TOWLINE_FUZZ_DECODER").ok();
    for &decoder in decoders::ALL.iter().filter(|decoder| chosen.as_deref().is_none_or(|name| name == decoder.0)) {
        let cases = cases(decoder.0);
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let (until, mut runs) = (Instant::now() + Duration::from_secs(seconds), 0_u64);
        while Instant::now() < until {
            let (name, bytes) = &cases[random.below(cases.len())];
            let mut changed = bytes.clone();
            for _ in 0..64 {
                let (_, other) = &cases[random.below(cases.len())];
                random.change(&mut changed, other);
                feed(decoder, name, &changed);
                runs += 1;
                if random.below(8) == 0 || changed.len() > 1 << 16 {
                    changed.clone_from(bytes);
                }
            }
        }
        println!("{}: {runs} inputs in {seconds} s", decoder.0);
    }
}

/// A segment of two batches, sealed; with compact ones in between, or without.
fn segment(version: u16) -> Vec<u8> {
    let id = WalSegmentId { region: RegionId(2), shard: ShardId(3), first_lsn: Lsn(100) };
    let (chain_before, epoch) = (Chain(0x1234_5678), Epoch(5));
    let header = SegmentHeader { id, cluster: ClusterId(9), epoch, chain_before, segment_size: 65536, version };
    let mut bytes = header.encode().to_vec();
    let mut at = Expected { first_lsn: id.first_lsn, chain: chain_before, epoch };
    let records: [&[&[u8]]; 5] = [&[b"one"], &[b"compact"], &[b""], &[b"two", b"", b"four"], &[]];
    for (index, records) in records.into_iter().enumerate() {
        let built = match index {
            1 | 2 if version < 3 => continue,
            1 | 2 => batch::build_compact(at, HybridTimestamp(1 << 20), records[0]).unwrap(),
            _ => batch::build(at, HybridTimestamp(1 << 20), Lsn(7), records),
        };
        let found = batch::verify(&built, 65536, at).unwrap();
        at = Expected { first_lsn: found.last_lsn().next(), chain: found.crc, ..at };
        bytes.extend(built);
    }
    bytes
}

/// Bytes that are right, for each decoder, behind the flags that it expects.
fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let behind = |flags: &[u8], bytes: &[u8]| [flags, bytes].concat();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let golden = |name: &str| std::fs::read(golden.join(name)).unwrap();
    let cluster = ClusterId(7);
    let manifest = Manifest {
        cluster,
        node: NodeId(1),
        region: RegionId(2),
        shard_count: 1024,
        segment_size: 1 << 30,
        epoch: Epoch(u64::MAX),
        own_epoch: true,
    };
    let entry = CheckpointEntry { applied: Lsn(u64::MAX), synced: Lsn(1) };
    let checkpoint = Checkpoint { entries: [(ShardId(0), entry), (ShardId(u16::MAX), entry)].into() };
    let (segment, with_compact, frames) = (segment(2), segment(3), golden("frames-v1"));
    let mut seeds = vec![
        ("frames", "golden", behind(&[0], &frames)),
        ("frames", "golden_sealed", behind(&[1], &frames)),
        ("segment_header", "right", behind(&[0], &segment[..4096])),
        ("segment_header", "sealed", behind(&[1], &segment[..64])),
        ("batches", "right", behind(&[0, 0, 1], &segment[4096..])),
        ("batches", "sealed", behind(&[1, 0, 1], &segment[4096..])),
        ("batches", "compact", behind(&[0, 0, 1], &with_compact[4096..])),
        ("batches", "compact_sealed", behind(&[1, 0, 1], &with_compact[4096..])),
        // The first 64 bytes are the batch before them.
        ("batches", "compact_first", behind(&[1, 0, 1], &with_compact[4096 + 64..])),
        ("batches", "too_little_room", behind(&[1, 5, 0], &segment[4096..])),
        ("segment_payload", "right", behind(&[0], &segment)),
        ("segment_payload", "sealed", behind(&[3], &[&segment[..64], &segment[4096..]].concat())),
        ("segment_header", "version_3", behind(&[0], &with_compact[..4096])),
        ("segment_payload", "compact", behind(&[0], &with_compact)),
        ("segment_payload", "compact_sealed", behind(&[3], &[&with_compact[..64], &with_compact[4096..]].concat())),
        ("manifest", "golden", behind(&[0], &golden("MANIFEST-v1"))),
        ("manifest", "extremes", behind(&[1], &manifest.encode())),
        ("checkpoint", "golden", behind(&[0], &golden("checkpoint-v1"))),
        ("checkpoint", "extremes", behind(&[1], &checkpoint.encode())),
        ("key_values", "lines", b"4:8\nkey\tvalue\nkey\n\tvalue\nlonger key\tv\nkey\t\t\n".to_vec()),
        ("key_values", "extremes", b"4294967295:4294967295\n\t\n\n".to_vec()),
        ("texts", "segment", b"r0002-s0003-00000000000000000001.wal".to_vec()),
        ("texts", "commit", b"synced+durable:2".to_vec()),
        ("texts", "number", b"18446744073709551615".to_vec()),
        ("texts", "cluster", b"00112233445566778899aabbccddeeff".to_vec()),
    ];
    // Raw bytes behind a prefix, which alone is covered.
    let raw = |kind: FrameKind| {
        let body: Vec<u8> = (1..=u8::MAX).take(kind.prefix_len() as usize + 8).collect();
        behind(&FrameHeader::new(kind, 0, &body, &[]).unwrap().encode(), &body)
    };
    let prefixes = [FrameKind::WalData, FrameKind::BaseData, FrameKind::Segment].map(raw).concat();
    seeds.push(("frames", "prefixes", behind(&[0], &prefixes)));
    seeds.push(("frames", "prefixes_sealed", behind(&[1], &prefixes)));
    let mut rest = frames.as_slice();
    for name in ["sync_request", "caught_up", "ack", "sync", "sync_ack", "heartbeat", "error", "status_request"] {
        let (header, body) = rest.split_at(16);
        let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        seeds.push(("messages", name, behind(&header[2..3], &body[..len])));
        rest = &body[len..];
    }
    // Two followers of one shard.
    let followers: Vec<u8> = [1_u64, 2].iter().flat_map(|&node| [node, 3, 4, 5]).flat_map(u64::to_le_bytes).collect();
    let list = [&b"TOWLFOL\0\x01\0\x01\0\x02\0\0\0"[..], &9_u64.to_le_bytes(), &followers, &[0; 4]].concat();
    seeds.push(("registry", "two", behind(&[3], &list)));
    seeds.push(("registry", "none", behind(&[3], &[&list[..12], &[0; 12], &[0; 4]].concat())));
    // A store for keys of 8 and values of 16 bytes.
    let mut header = b"TOWLFIX\0\x01\0\x01\0\x04\0\x02\x01".to_vec();
    header.extend([8_u32, 16, 48, 0].iter().flat_map(|number| number.to_le_bytes()));
    header.extend([9_u64, 7, 2].iter().flat_map(|number| number.to_le_bytes()));
    header.extend([0; 8]);
    seeds.push(("fixed_store", "header", behind(&[1], &header.repeat(2))));
    let record = [&b"\x01\x01\x03\0\x05\0\0\0"[..], &9_u64.to_le_bytes(), b"keyvalue"].concat();
    seeds.push(("fixed_store", "put", behind(&[2, 8, 16], &record)));
    seeds.push(("fixed_store", "delete", behind(&[2, 8, 16], b"\x01\x02\x03\0\0\0\0\0\x09\0\0\0\0\0\0\0key")));
    let mut slot = b"\0\0\0\0\x01\0\x03\0".to_vec();
    slot.extend(7_u64.to_le_bytes());
    slot.extend(b"\x05\0\0\0\0\0\0\0key\0\0\0\0\0value");
    slot.resize(48, 0);
    seeds.push(("fixed_store", "slot", behind(&[5, 8, 16], &[&9_u64.to_le_bytes()[..], &slot].concat())));
    seeds.push(("fixed_store", "free_slot", behind(&[4, 8, 16], &[0; 56])));
    seeds.push(("status", "leader", status()));
    let piece = |bytes: &[u8]| [&u16::try_from(bytes.len()).unwrap().to_le_bytes()[..], bytes].concat();
    let page = decoders::first_header();
    let chain = SegmentHeader::decode(&page).unwrap().chain_before;
    let log_of = |compact: usize| {
        let mut at = Expected { first_lsn: Lsn(1), chain, epoch: Epoch(1) };
        let mut log = Vec::new();
        const ONE: &[&[u8]] = &[b"one"];
        const COMPACT: &[&[u8]] = &[b"compact"];
        const REST: [&[&[u8]]; 2] = [&[b"two", b"three"], &[]];
        let compact = std::iter::repeat_n(COMPACT, compact);
        for records in std::iter::once(ONE).chain(compact).chain(REST) {
            let built = match records {
                [b"compact"] => batch::build_compact(at, HybridTimestamp(1 << 20), records[0]).unwrap(),
                _ => batch::build(at, HybridTimestamp(1 << 20), Lsn::ZERO, records),
            };
            let found = batch::verify(&built, 60000, at).unwrap();
            at = Expected { first_lsn: found.last_lsn().next(), chain: found.crc, ..at };
            log.extend(built);
        }
        log
    };
    let (log, with_compact, with_run) = (log_of(0), log_of(1), log_of(7));
    seeds.push(("ingest", "compact_run", behind(&[2], &piece(&with_run))));
    seeds.push(("ingest", "compact", behind(&[2], &with_compact.chunks(50).map(piece).collect::<Vec<_>>().concat())));
    seeds.push(("ingest", "compact_sealed", behind(&[3], &piece(&with_compact))));
    seeds.push(("ingest", "whole", behind(&[2], &piece(&log))));
    seeds.push(("ingest", "cut", behind(&[2], &log.chunks(50).map(piece).collect::<Vec<_>>().concat())));
    seeds.push(("ingest", "sealed", behind(&[3], &piece(&log))));
    seeds.push(("ingest", "header", behind(&[0], &[piece(&page), piece(&log)].concat())));
    let placed = [&1_u64.to_le_bytes()[..], &4096_u16.to_le_bytes(), &log].concat();
    seeds.push(("ingest", "placed", behind(&[6], &piece(&placed))));
    seeds
}

/// The status of a running leader with a follower that it knows.
fn status() -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let builder = towline::Node::builder(directory.path().join("node")).segment_size(65536).followers([NodeId(2)]);
    let leader = builder.node_id(NodeId(1)).lead("127.0.0.1:0").unwrap();
    leader.writer(ShardId(0)).unwrap().append(b"record").unwrap();
    leader.status().encode()
}

/// What is right must be taken, or the cases would test nothing behind the checksums.
#[test]
fn the_kept_cases_reach_what_is_behind_the_checksums() {
    let kept = |decoder: &str, name: &str| std::fs::read(directory_of(decoder).join(name)).unwrap();
    let sealed = |mut bytes: Vec<u8>| {
        let end = bytes.len() - 4;
        let crc = crc32fast::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(&crc.to_le_bytes());
        bytes
    };
    let list = sealed(kept("registry", "two")[1..].to_vec());
    assert_eq!(towline::seams::decode_registry(&list, 1).unwrap(), list);
    let header = sealed(kept("fixed_store", "header")[1..65].to_vec());
    let mut page = header.clone();
    page.resize(4096, 0);
    assert_eq!(towline::seams::decode_store_header(&page).unwrap(), header);
    let record = &kept("fixed_store", "put")[3..];
    assert_eq!(towline::seams::decode_store_record((8, 16), record).unwrap(), record);
    let slot = &kept("fixed_store", "slot")[3..];
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&slot[..8]);
    hasher.update(&slot[12..]);
    let slot = [&hasher.finalize().to_le_bytes()[..], &slot[12..]].concat();
    assert_eq!(towline::seams::decode_store_slot((8, 16), 9, &slot).unwrap(), slot);
    assert!(towline::seams::decode_store_slot((8, 16), 8, &slot).is_err(), "a slot that went astray");
    assert!(towline::status::Status::decode(&kept("status", "leader")).is_ok());
    for name in ["right", "compact"] {
        assert!(towline::wire::WalSegmentPayload::from_bytes(&kept("segment_payload", name)[1..]).is_ok(), "{name}");
    }
}

/// Makes the cases that are right, where they are not there yet; an existing one is left alone.
#[test]
#[ignore = "only for those who add a decoder or change a format"]
fn write_missing_cases() {
    for (decoder, name, bytes) in seeds() {
        let directory = directory_of(decoder);
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join(name);
        if !path.exists() {
            std::fs::write(path, bytes).unwrap();
        }
    }
}
