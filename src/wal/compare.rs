//! Comparing the logs of two nodes: `cmp` that knows what an LSN is.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::limits::SEGMENT_HEADER_LEN;
use crate::types::{Chain, Lsn};
use crate::wal::batch::Batch;
use crate::wal::given_up::segment_of;
use crate::wal::known_synced::KnownSynced;
use crate::wal::scan::{LogReport, SegmentReport, Visit, scan_segment, verify_log};
use crate::wal::walk::SegmentFile;

/// Bytes compared at a time.
const STEP: u64 = 256 * 1024;

/// What one of two logs holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogExtent {
    /// The first LSN; [`Lsn::ZERO`] where there is no segment.
    pub tail: Lsn,
    /// The last LSN before anything is missing.
    pub head: Lsn,
    /// The chain there.
    pub chain: Chain,
    /// How many things are wrong with the log; [`verify_log`] says which.
    pub problems: usize,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first.
    A,
    /// The second.
    B,
}

/// The first byte in which two logs differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The file of the first log; of the last segment before it where it has none.
    pub a: PathBuf,
    /// The file of the second log, likewise.
    pub b: PathBuf,
    /// Where in both files, in bytes.
    pub offset: u64,
    /// The LSN that the byte belongs to: that of the first record in its batch, or the one due next.
    pub lsn: Lsn,
    /// What differs.
    pub reason: String,
}

/// How two logs stand to each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Relation {
    /// The same bytes, as far as either goes.
    Identical,
    /// The same bytes as far as the other goes, and more.
    Ahead {
        /// Which has more.
        side: Side,
        /// How many records more. 0 if it only has a segment sealed, or more that is no valid batch.
        records: u64,
    },
    /// Different bytes for the same LSN.
    Diverged(Difference),
    /// No segment that both hold: nothing could be compared.
    Apart,
}

/// The outcome of a comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// The first log.
    pub a: LogExtent,
    /// The second log.
    pub b: LogExtent,
    /// First and last LSN that both hold in segments that both hold; `None` if there is none.
    pub common: Option<(Lsn, Lsn)>,
    /// Bytes found equal, headers of segments included.
    pub equal_bytes: u64,
    /// How they stand to each other.
    pub relation: Relation,
}

/// Compares two directories of a shard's log, byte by byte, segment by segment, over the range that both hold.
///
/// A follower's log is byte for byte its leader's from some segment on, so segments must begin with the same LSNs;
/// they are matched by that. Older segments of the log that begins earlier are left out. Bytes behind the last batch
/// that is valid count as well, up to the last that is not zero, so that damage shows as a difference.
///
/// # Errors
///
/// [`Error::Io`](crate::Error::Io); [`Error::Mismatch`](crate::Error::Mismatch) for a segment of a later version.
pub fn compare_logs(a: &Path, b: &Path) -> Result<Comparison> {
    let (a, b) =
        (verify_log(a, None, KnownSynced::default(), &mut ())?, verify_log(b, None, KnownSynced::default(), &mut ())?);
    let tail = a.tail.max(b.tail);
    let head = a.last_readable.min(b.last_readable);
    let both_hold = a.tail > Lsn::ZERO && b.tail > Lsn::ZERO;
    let from_tail =
        |log: &LogReport| log.segments.iter().filter(|segment| first_lsn(segment) >= tail).cloned().collect::<Vec<_>>();
    let (segments_a, segments_b) = (from_tail(&a), from_tail(&b));
    let mut equal_bytes = 0;
    let relation =
        if !both_hold { one_is_empty(&a, &b) } else { relate((&a, &segments_a), (&b, &segments_b), &mut equal_bytes)? };
    Ok(Comparison {
        a: extent(&a),
        b: extent(&b),
        common: (both_hold && tail <= head && relation != Relation::Apart).then_some((tail, head)),
        equal_bytes,
        relation,
    })
}

fn extent(log: &LogReport) -> LogExtent {
    LogExtent { tail: log.tail, head: log.head, chain: log.chain, problems: log.problems.len() }
}

/// By its name, which stands even where the header does not.
fn first_lsn(segment: &SegmentReport) -> Lsn {
    segment_of(&segment.path).map_or(Lsn::ZERO, |id| id.first_lsn)
}

/// Where a segment's bytes end.
fn end(segment: &SegmentReport) -> u64 {
    (segment.end + segment.trailing_bytes).min(segment.file_len)
}

/// An empty log is a prefix of every log that begins with LSN 1.
fn one_is_empty(a: &LogReport, b: &LogReport) -> Relation {
    match (a.tail, b.tail) {
        (Lsn::ZERO, Lsn::ZERO) => Relation::Identical,
        (Lsn::ZERO, Lsn::FIRST) => Relation::Ahead { side: Side::B, records: b.last_readable.get() },
        (Lsn::FIRST, Lsn::ZERO) => Relation::Ahead { side: Side::A, records: a.last_readable.get() },
        _ => Relation::Apart,
    }
}

/// Which side has more, where all that both have is the same. `extra` is what the bytes say.
fn ahead(a: &LogReport, b: &LogReport, extra: Option<Side>) -> Relation {
    let (head_a, head_b) = (a.last_readable, b.last_readable);
    let side = match head_a.cmp(&head_b) {
        std::cmp::Ordering::Greater => Some(Side::A),
        std::cmp::Ordering::Less => Some(Side::B),
        std::cmp::Ordering::Equal => extra,
    };
    let records = head_a.records_since(head_b).max(head_b.records_since(head_a));
    side.map_or(Relation::Identical, |side| Relation::Ahead { side, records })
}

/// Compares segment with segment, in order, until one log ends or they differ.
fn relate(
    (log_a, segments_a): (&LogReport, &[SegmentReport]),
    (log_b, segments_b): (&LogReport, &[SegmentReport]),
    equal_bytes: &mut u64,
) -> Result<Relation> {
    let mut previous: Option<(&SegmentReport, &SegmentReport)> = None;
    for index in 0.. {
        let (a, b) = match (segments_a.get(index), segments_b.get(index)) {
            (Some(a), Some(b)) => (a, b),
            (None, None) => break,
            (more_a, _) => {
                let extra = if more_a.is_some() { Side::A } else { Side::B };
                let more = if more_a.is_some() { segments_a } else { segments_b };
                return Ok(match previous {
                    // The other log goes on inside the segment before: then the two disagree about where it ends.
                    Some((a, b)) if end(a) != end(b) && more.get(index).is_some_and(has_batches) => {
                        if ends_first(a, b) == extra { at_end_of(a, b) } else { ahead(log_a, log_b, Some(extra)) }
                    }
                    Some(_) => ahead(log_a, log_b, Some(extra)),
                    None => Relation::Apart,
                });
            }
        };
        if let Some((a, b)) = previous.filter(|(a, b)| end(a) != end(b)) {
            return Ok(at_end_of(a, b));
        }
        if first_lsn(a) != first_lsn(b) {
            if previous.is_none() {
                return Ok(Relation::Apart);
            }
            let reason = format!(
                "one log has a segment that begins with LSN {}, the other with LSN {}",
                first_lsn(a),
                first_lsn(b)
            );
            let lsn = first_lsn(a).min(first_lsn(b));
            return Ok(Relation::Diverged(difference(a, b, 0, lsn, reason)));
        }
        if let Some(offset) = first_difference(a, b)? {
            *equal_bytes += offset;
            let lsn = lsn_at(a, offset)?.or(lsn_at(b, offset)?);
            let due = a.last_lsn.max(b.last_lsn).next();
            let reason =
                if offset < SEGMENT_HEADER_LEN { "the segments' headers differ" } else { "the batches differ" };
            return Ok(Relation::Diverged(difference(a, b, offset, lsn.unwrap_or(due), reason.to_owned())));
        }
        *equal_bytes += end(a).min(end(b));
        previous = Some((a, b));
    }
    let Some((a, b)) = previous else { return Ok(Relation::Apart) };
    Ok(ahead(log_a, log_b, (end(a) != end(b)).then(|| ends_last(a, b))))
}

fn has_batches(segment: &SegmentReport) -> bool {
    segment.batches > 0
}

/// The side whose segment has fewer bytes.
fn ends_first(a: &SegmentReport, b: &SegmentReport) -> Side {
    if end(a) < end(b) { Side::A } else { Side::B }
}

/// The side whose segment has more bytes.
fn ends_last(a: &SegmentReport, b: &SegmentReport) -> Side {
    if end(a) < end(b) { Side::B } else { Side::A }
}

/// One segment ends while the other goes on, and yet its log has another segment.
fn at_end_of(a: &SegmentReport, b: &SegmentReport) -> Relation {
    let shorter = if end(a) < end(b) { a } else { b };
    let reason = "one segment ends here, and its log goes on in another; the other segment goes on".to_owned();
    Relation::Diverged(difference(a, b, end(shorter), shorter.last_lsn.next(), reason))
}

fn difference(a: &SegmentReport, b: &SegmentReport, offset: u64, lsn: Lsn, reason: String) -> Difference {
    Difference { a: a.path.clone(), b: b.path.clone(), offset, lsn, reason }
}

/// The first offset at which two segments differ, as far as both go.
fn first_difference(a: &SegmentReport, b: &SegmentReport) -> Result<Option<u64>> {
    let (mut file_a, mut file_b) = (SegmentFile::open(&a.path)?, SegmentFile::open(&b.path)?);
    let (mut at, end) = (0, end(a).min(end(b)));
    while at < end {
        let len = STEP.min(end - at);
        let (bytes_a, bytes_b) = (file_a.bytes(at, len)?, file_b.bytes(at, len)?);
        let len = bytes_a.len().min(bytes_b.len()).min(usize::try_from(len).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(Some(at)); // A file has become shorter since it was scanned.
        }
        let (bytes_a, bytes_b) = (&bytes_a[..len], &bytes_b[..len]);
        if bytes_a != bytes_b {
            return Ok(bytes_a.iter().zip(bytes_b).position(|(a, b)| a != b).map(|index| at + index as u64));
        }
        at += len as u64;
    }
    Ok(None)
}

/// The first LSN of the valid batch that an offset is in; of the segment, for an offset in its header.
fn lsn_at(segment: &SegmentReport, offset: u64) -> Result<Option<Lsn>> {
    struct Find {
        offset: u64,
        lsn: Option<Lsn>,
    }
    impl Visit for Find {
        fn batch(&mut self, _: &Path, at: u64, batch: Batch<'_>) {
            if (at..at + batch.header.total_len()).contains(&self.offset) {
                self.lsn = Some(batch.header.first_lsn);
            }
        }
    }
    if offset < SEGMENT_HEADER_LEN {
        return Ok(Some(first_lsn(segment)));
    }
    let mut find = Find { offset, lsn: None };
    scan_segment(&segment.path, &mut find)?;
    Ok(find.lsn)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::types::Epoch;
    use crate::wal::log_fixture::{LogFixture, flip};

    fn compare(a: &LogFixture, b: &LogFixture) -> Comparison {
        let forth = compare_logs(a.path(), b.path()).unwrap();
        let back = compare_logs(b.path(), a.path()).unwrap();
        assert_eq!(
            (forth.a, forth.b, forth.common, forth.equal_bytes),
            (back.b, back.a, back.common, back.equal_bytes)
        );
        match (&forth.relation, back.relation) {
            (Relation::Ahead { side, records }, Relation::Ahead { side: other, records: same }) => {
                assert!(*side != other && *records == same);
            }
            (Relation::Diverged(one), Relation::Diverged(other)) => {
                assert_eq!((&one.a, one.offset, one.lsn), (&other.b, other.offset, other.lsn));
            }
            (one, other) => assert_eq!(*one, other),
        }
        forth
    }

    #[test]
    fn equal_logs_are_identical() {
        let (a, b) = (LogFixture::synced_all_along(), LogFixture::synced_all_along());
        let comparison = compare(&a, &b);
        assert_eq!(comparison.relation, Relation::Identical);
        assert_eq!((comparison.common, comparison.a), (Some((Lsn(1), Lsn(36))), comparison.b));
        let batches: u64 = a.places.iter().map(|place| place.len).sum();
        assert_eq!(comparison.equal_bytes, 3 * SEGMENT_HEADER_LEN + batches);
    }

    #[test]
    fn a_log_that_goes_on_is_ahead() {
        let b = LogFixture::synced_all_along();
        let mut a = LogFixture::synced_all_along();
        a.append(&[b"one more", b"and another"]);
        let ahead_by = |records| Relation::Ahead { side: Side::A, records };
        assert_eq!(compare(&a, &b).relation, ahead_by(2));
        a.roll(Epoch(9));
        assert_eq!(compare(&a, &b).relation, ahead_by(2));
        a.append(&[b"in another segment"]);
        assert_eq!(compare(&a, &b).relation, ahead_by(3));
        let mut a = LogFixture::synced_all_along();
        a.append(&[]);
        assert_eq!(compare(&a, &b).relation, ahead_by(0), "sealed");
        let empty = LogFixture::new();
        assert_eq!(compare(&b, &empty).relation, ahead_by(36));
        fs::remove_file(empty.segment_path()).unwrap();
        assert_eq!(compare(&b, &empty).relation, ahead_by(36));
    }

    #[test]
    fn retention_does_not_make_logs_different() {
        let (a, b) = (LogFixture::synced_all_along(), LogFixture::synced_all_along());
        fs::remove_file(&a.places[0].path).unwrap();
        let comparison = compare(&a, &b);
        assert_eq!((comparison.relation, comparison.common), (Relation::Identical, Some((Lsn(13), Lsn(36)))));
        fs::remove_file(&b.places[5].path).unwrap();
        fs::remove_file(&b.places[10].path).unwrap();
        assert_eq!(compare(&a, &b).relation, Relation::Apart);
    }

    #[test]
    fn the_first_difference_is_named() {
        let (a, b) = (LogFixture::synced_all_along(), LogFixture::synced_all_along());
        let place = &a.places[6];
        for offset in [place.offset, place.offset + 60, place.offset + place.len - 1] {
            flip(&place.path, offset, 5);
            let Relation::Diverged(difference) = compare(&a, &b).relation else { panic!("not found") };
            assert_eq!((difference.offset, difference.lsn), (offset, place.first_lsn));
            assert_eq!((&difference.a, &difference.b), (&place.path, &b.places[6].path));
            flip(&place.path, offset, 5);
        }
        flip(&place.path, 57, 0);
        let Relation::Diverged(difference) = compare(&a, &b).relation else { panic!("not found") };
        assert_eq!((difference.offset, difference.lsn), (57, Lsn(13)));
    }

    #[test]
    fn histories_that_part_are_diverged_where_they_part() {
        let (mut a, mut b) = (LogFixture::synced_all_along(), LogFixture::synced_all_along());
        let end = a.end();
        a.append(&[b"left"]);
        b.append(&[b"right, and longer"]);
        let Relation::Diverged(difference) = compare(&a, &b).relation else { panic!("not found") };
        assert_eq!((difference.offset, difference.lsn), (end, Lsn(37)));
        // One rolls where the other goes on.
        let (mut a, mut b) = (LogFixture::synced_all_along(), LogFixture::synced_all_along());
        let end = a.end();
        a.roll(Epoch(8));
        a.append(&[b"left"]);
        b.append(&[b"right"]);
        let Relation::Diverged(difference) = compare(&a, &b).relation else { panic!("not found") };
        assert_eq!((difference.offset, difference.lsn), (end, Lsn(37)));
    }
}
