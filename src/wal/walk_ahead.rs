//! Walking several segments of a log at the same time, where there are processors for it.
//!
//! The header of a segment says the chain before its first batch, so its batches can be checked without those before
//! it. Whether the log so far really ends with that chain, and everything else that decides about a log, is for
//! [recovery](super::recovery), which still looks at the segments one after the other, oldest first: what is found here
//! only spares it the walk. A segment about which anything is unusual, or cannot be read, gets no answer here, and
//! recovery finds out by itself.

use std::num::NonZero;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::limits::{MAX_WALKING_THREADS, SEGMENT_HEADER_LEN};
use crate::types::WalSegmentId;
use crate::wal::batch::Expected;
use crate::wal::identity::LogIdentity;
use crate::wal::segment::SegmentHeader;
use crate::wal::walk::{self, Listing, SegmentFile, Walked};

/// Bytes of a batch that each thread takes into memory. A segment with a larger one is left to recovery, so that
/// opening a log takes no more memory than the largest batch, and this for each thread.
const MOST_AT_A_TIME: usize = 4 << 20;

/// What stands in a segment, taken its header for true.
#[derive(Clone, Debug)]
pub(super) struct WalkedAhead {
    /// What its first batch had to continue.
    pub(super) first: Expected,
    pub(super) walked: Walked,
    /// The end of the last byte behind the walk that is not zero; where that ended if it seals the segment.
    pub(super) extent: u64,
}

impl WalkedAhead {
    /// Walks a segment with this header.
    pub(super) fn of(file: &mut SegmentFile, header: &SegmentHeader) -> crate::error::Result<WalkedAhead> {
        let size = header.segment_size;
        let first = Expected { first_lsn: header.id.first_lsn, chain: header.chain_before, epoch: header.epoch };
        let walked = walk::walk(file, Some(header), (SEGMENT_HEADER_LEN, size, size), first, |_, _| {})?;
        let extent = if walked.sealed { walked.end } else { file.extent(walked.end)? };
        Ok(WalkedAhead { first, walked, extent })
    }
}

/// Walks the segments, as many at a time as there are processors; one answer for each, in the same order.
pub(super) fn walk_all(listed: &Listing, identity: &LogIdentity) -> Vec<Option<WalkedAhead>> {
    let can_share = listed.len() > 1;
    let processors = if can_share { std::thread::available_parallelism().map_or(1, NonZero::get) } else { 1 };
    walk_with(processors.min(MAX_WALKING_THREADS), listed, identity)
}

fn walk_with(threads: usize, listed: &Listing, identity: &LogIdentity) -> Vec<Option<WalkedAhead>> {
    let threads = threads.min(listed.len());
    let answers = Mutex::new(vec![None; listed.len()]);
    if threads > 1 {
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some((index, (id, path))) = take(&next, listed) {
                let answer = walk_one(*id, path, identity);
                if let Some(place) = answers.lock().get_mut(index) {
                    *place = answer;
                }
            }
        };
        std::thread::scope(|scope| {
            for number in 1..threads {
                let thread = std::thread::Builder::new().name(format!("tl-walk{number}-s{}", identity.shard));
                // Where there can be no more threads, those that there are do the work.
                if thread.stack_size(super::THREAD_STACK).spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            work();
        });
    }
    answers.into_inner()
}

/// The next segment that nobody has taken, and its place in the list.
fn take<'a>(next: &AtomicUsize, listed: &'a Listing) -> Option<(usize, &'a (WalSegmentId, std::path::PathBuf))> {
    let index = next.fetch_add(1, Ordering::Relaxed);
    Some((index, listed.get(index)?))
}

fn walk_one(id: WalSegmentId, path: &Path, identity: &LogIdentity) -> Option<WalkedAhead> {
    let mut file = SegmentFile::open(path).ok()?;
    file.most = MOST_AT_A_TIME;
    let header = file.header().ok()?.ok()?;
    let is_usual = header.id == id && identity.check(&header).is_ok() && file.len <= header.segment_size;
    if is_usual { WalkedAhead::of(&mut file, &header).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::log_fixture::{IDENTITY, LogFixture};

    #[test]
    fn each_segment_is_found_as_it_would_be_alone_and_no_other() {
        let log = LogFixture::synced_all_along();
        let (listed, _) = walk::list(log.path()).unwrap();
        assert!(listed.len() > 2, "a log of several segments");
        let damaged = &listed[1].1;
        let mut bytes = std::fs::read(damaged).unwrap();
        bytes[17] ^= 1;
        std::fs::write(damaged, bytes).unwrap();
        assert!(walk_with(1, &listed, &IDENTITY).iter().all(Option::is_none), "alone there is nothing to be gained");
        for threads in [2, 3, 100] {
            let answers = walk_with(threads, &listed, &IDENTITY);
            assert_eq!(answers.len(), listed.len());
            for (index, ((_, path), answer)) in listed.iter().zip(answers).enumerate() {
                if index == 1 {
                    assert!(answer.is_none(), "its header is damaged");
                    continue;
                }
                let mut file = SegmentFile::open(path).unwrap();
                let header = file.header().unwrap().unwrap();
                let alone = WalkedAhead::of(&mut file, &header).unwrap();
                let answer = answer.unwrap();
                assert_eq!((answer.first, answer.extent), (alone.first, alone.extent));
                assert_eq!(
                    (answer.walked.end, answer.walked.next, answer.walked.sealed, answer.walked.records),
                    (alone.walked.end, alone.walked.next, alone.walked.sealed, alone.walked.records)
                );
                assert!(answer.walked.records > 0);
            }
        }
    }
}
