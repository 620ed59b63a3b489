//! Batches as they are built, checked and walked.

use proptest::prelude::*;

use super::*;

const AT: Expected = Expected { first_lsn: Lsn(42), chain: Chain(0xfeed_beef), epoch: Epoch(3) };

fn sample(records: &[&[u8]]) -> Vec<u8> {
    build(AT, HybridTimestamp(77), Lsn(41), records)
}

#[test]
fn a_batch_decodes_to_what_was_built() {
    let bytes = sample(&[b"one", b"", b"three"]);
    let header = verify(&bytes, bytes.len() as u64, AT).unwrap();
    assert_eq!((header.last_lsn(), header.record_count, header.synced_lsn), (Lsn(44), 3, Lsn(41)));
    let batch = BatchIter::new(&bytes).next().unwrap();
    let records: Vec<_> = batch.records().map(|record| (record.lsn.0, record.bytes.to_vec())).collect();
    assert_eq!(records, [(42, b"one".to_vec()), (43, b"".to_vec()), (44, b"three".to_vec())]);
}

#[test]
fn a_sealing_batch_has_no_records_and_moves_no_lsn() {
    let bytes = sample(&[]);
    let header = verify(&bytes, 56, AT).unwrap();
    assert!(header.is_sealing());
    assert_eq!((bytes.len(), header.last_lsn()), (56, Lsn(41)));
}

#[test]
fn zeros_are_blank_and_not_a_batch() {
    assert_eq!(verify(&[0; 64], 64, AT), Err(BatchError::Blank));
}

#[test]
fn every_flipped_bit_is_found() {
    let bytes = sample(&[b"some", b"records"]);
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(verify(&damaged, damaged.len() as u64, AT).is_err(), "bit {bit}");
    }
}

#[test]
fn a_compact_batch_decodes_to_what_was_built() {
    let record = [7; 4095];
    for (first_lsn, timestamp, len) in [
        (1, 1, 0),
        (1 << 26, 0x7fff, 1),
        ((5 << 26) - 1, (1_800_000_000_000 << 16) + 0x1234, 128),
        (u64::MAX - 9, (1 << 58) - (1 << 16) + 0x7fff, 4095),
    ] {
        let at = Expected { first_lsn: Lsn(first_lsn), ..AT };
        let bytes = build_compact(at, HybridTimestamp(timestamp), &record[..len]).unwrap();
        assert_eq!(bytes.len(), (16 + len).next_multiple_of(8));
        let header = verify(&bytes, bytes.len() as u64, at).unwrap();
        assert_eq!((header.first_lsn, header.last_lsn(), header.record_count), (at.first_lsn, at.first_lsn, 1));
        assert_eq!((header.timestamp, header.epoch, header.prev_crc), (HybridTimestamp(timestamp), AT.epoch, AT.chain));
        assert_eq!(
            (header.total_len(), header.synced_lsn, header.is_sealing()),
            (bytes.len() as u64, Lsn::ZERO, false)
        );
        let records: Vec<_> = Batch::split_off(header, &bytes).unwrap().0.records().collect();
        assert_eq!(records, [Record { lsn: at.first_lsn, bytes: &record[..len] }]);
    }
}

#[test]
fn what_does_not_fit_in_a_compact_batch_makes_none() {
    let compact = |timestamp, len| build_compact(AT, HybridTimestamp(timestamp), &vec![7; len]);
    assert!(compact(0x7fff, 4095).is_some());
    assert_eq!(compact(0x8000, 1), None, "more than 32,768 in a millisecond");
    assert_eq!(compact(1 << 58, 1), None, "2109");
    assert_eq!(compact(1, 4096), None);
}

#[test]
fn compact_batches_are_walked_behind_one_that_says_everything() {
    let mut bytes = sample(&[b"one", b"two"]);
    let mut at = Expected { first_lsn: Lsn(44), chain: verify(&bytes, 1 << 16, AT).unwrap().crc, ..AT };
    let begins_at = bytes.len();
    for record in [&b"three"[..], b"", b"five"] {
        let compact = build_compact(at, HybridTimestamp(at.first_lsn.0), record).unwrap();
        at = Expected { first_lsn: at.first_lsn.next(), chain: verify(&compact, 1 << 16, at).unwrap().crc, ..at };
        bytes.extend(compact);
    }
    let walked: Vec<_> = BatchIter::new(&bytes).flat_map(|batch| batch.records()).map(|record| record.lsn.0).collect();
    assert_eq!(walked, [42, 43, 44, 45, 46]);
    let headers: Vec<_> = BatchIter::new(&bytes).map(|batch| batch.header).collect();
    assert!(headers.iter().all(|header| header.epoch == AT.epoch) && headers[3].prev_crc == headers[2].crc);
    // What begins with a compact one needs its segment.
    assert_eq!(BatchIter::new(&bytes[begins_at..]).count(), 0);
}

#[test]
fn every_flipped_bit_of_a_compact_batch_is_found() {
    let bytes = build_compact(AT, HybridTimestamp(1_800_000_000_000 << 16), b"a record").unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(verify(&damaged, damaged.len() as u64, AT).is_err(), "bit {bit}");
    }
}

/// Compact batches one behind the other, where each begins, and what the first continues.
fn run_of(lens: &[usize], before: Expected) -> (Vec<u8>, Vec<usize>) {
    let (mut bytes, mut starts, mut at) = (Vec::new(), Vec::new(), before);
    for (index, len) in lens.iter().enumerate() {
        let record: Vec<u8> = (0..*len).map(|byte| (byte * 31 + index * 7).to_le_bytes()[0]).collect();
        let batch = build_compact(at, HybridTimestamp(index as u64), &record).unwrap();
        let crc = verify(&batch, 1 << 20, at).unwrap().crc;
        at = Expected { first_lsn: at.first_lsn.next(), chain: crc, ..at };
        starts.push(bytes.len());
        bytes.extend(batch);
    }
    (bytes, starts)
}

#[test]
fn a_run_is_what_its_batches_are_one_by_one() {
    let (run, starts) = run_of(&[8; 100], AT);
    let mut bytes = run.clone();
    let (len, last) = verify_compact_run(&mut bytes, 1 << 20, AT).unwrap();
    assert_eq!((len, last.first_lsn), (starts[RUN], Lsn(AT.first_lsn.0 + RUN as u64 - 1)), "as many as there may be");
    let at = Expected { first_lsn: last.first_lsn.next(), chain: last.crc, ..AT };
    let (rest, last) = verify_compact_run(&mut bytes[len..], 1 << 20, at).unwrap();
    assert_eq!((len + rest, last.first_lsn, bytes), (run.len(), Lsn(141), run));
    // One alone is none, and neither is one that is followed by something else.
    let (mut one, _) = run_of(&[8], AT);
    assert_eq!(verify_compact_run(&mut one, 100, AT), None);
    one.extend(sample(&[b"plain"]));
    assert_eq!(verify_compact_run(&mut one, 1000, AT), None);
    assert_eq!(verify_compact_run(&mut sample(&[b"plain"]), 1000, AT), None);
}

#[test]
fn a_batch_of_another_history_is_refused() {
    let compact = build_compact(AT, HybridTimestamp(77), b"x").unwrap();
    for other in [Expected { first_lsn: Lsn(43), ..AT }, Expected { chain: Chain(1), ..AT }] {
        assert!(matches!(verify(&compact, 100, other), Err(BatchError::Invalid(_))));
    }
    assert!(matches!(verify(&compact, 23, AT), Err(BatchError::Invalid(_))), "there is no room for it");
    let bytes = sample(&[b"x"]);
    let room = bytes.len() as u64;
    for other in
        [Expected { first_lsn: Lsn(43), ..AT }, Expected { chain: Chain(1), ..AT }, Expected { epoch: Epoch(4), ..AT }]
    {
        assert!(matches!(verify(&bytes, room, other), Err(BatchError::Invalid(_))));
    }
}

proptest! {
    #[test]
    fn a_checksum_that_begins_with_its_own_field_is_the_same(before: u32, bytes in prop::collection::vec(any::<u8>(), 4..400)) {
        let before = Chain(before);
        prop_assert_eq!(chain_after_batch(before, &bytes), chain_after(before, &bytes[4..]));
    }

    #[test]
    fn runs_end_before_what_is_wrong(lens in prop::collection::vec(0usize..300, 2..90), first_lsn in 1u64.., chain: u32,
                                     hits in prop::collection::vec((any::<prop::sample::Index>(), 0u32..8), 0..4),
                                     cut in prop::option::of(any::<prop::sample::Index>()), room in prop::option::of(0u64..30_000)) {
        let before = Expected { first_lsn: Lsn(first_lsn.min(u64::MAX - 100)), chain: Chain(chain), ..AT };
        let (mut bytes, starts) = run_of(&lens, before);
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        for (at, bit) in &hits {
            if !bytes.is_empty() {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
        }
        let room = room.unwrap_or(1 << 20);
        // One by one: how far all is right.
        let (mut right, mut count, mut at) = (0, 0, before);
        while let Ok(header) = verify(&bytes[right..], room.saturating_sub(right as u64), at) {
            right += usize::try_from(header.total_len()).unwrap();
            count += 1;
            at = Expected { first_lsn: header.last_lsn().next(), chain: header.crc, ..at };
            if count == RUN {
                break;
            }
        }
        let came = bytes.clone();
        let found = verify_compact_run(&mut bytes, room, before);
        prop_assert!(bytes == came, "the fields are put back");
        match found {
            Some((len, last)) => {
                prop_assert!(len <= right && starts.contains(&len) || len == right, "{} of {}", len, right);
                prop_assert!(len < right || (last.crc, last.first_lsn.next()) == (at.chain, at.first_lsn));
            }
            // Where something is wrong, or there is nothing behind the first.
            None => prop_assert!(!hits.is_empty() || count < 2),
        }
    }

    #[test]
    fn every_cut_is_incomplete(records in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..8),
                               cut in any::<prop::sample::Index>()) {
        let slices: Vec<&[u8]> = records.iter().map(Vec::as_slice).collect();
        let bytes = sample(&slices);
        let cut = cut.index(bytes.len());
        let result = verify(&bytes[..cut], bytes.len() as u64, AT);
        prop_assert!(matches!(result, Err(BatchError::Incomplete { .. })), "{result:?}");
        let bytes = build_compact(AT, HybridTimestamp(77), &records[0]).unwrap();
        let cut = cut.min(bytes.len() - 1);
        let result = verify(&bytes[..cut], bytes.len() as u64, AT);
        prop_assert!(matches!(result, Err(BatchError::Incomplete { .. })), "{result:?}");
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), room in 0u64..400) {
        let _ = verify(&bytes, room, AT);
        let _ = BatchIter::new(&bytes).map(|batch| batch.records().count()).sum::<usize>();
    }
}
