use super::*;
use crate::target::{BaseSource, FixedStore, FixedStoreOptions, LogOnly};
use crate::types::{Chain, HybridTimestamp};
use crate::wal::batch::{self, BatchIter, Expected};

const SHARD: ShardId = ShardId(0);

#[test]
fn every_pair_of_phases_is_legal_or_refused_by_name() {
    use RebuildPhase as P;
    let legal = [
        (P::Idle, P::Accepted),
        (P::Completed, P::Accepted),
        (P::Failed, P::Accepted),
        (P::Accepted, P::Running),
        (P::Accepted, P::BaseComplete),
        (P::Running, P::BaseComplete),
        (P::BaseComplete, P::Completed),
        (P::Accepted, P::Failed),
        (P::Running, P::Failed),
        (P::BaseComplete, P::Failed),
    ];
    for from in P::ALL {
        assert_eq!(from.is_active(), from.may_become(P::Failed), "{from}: exactly what is under way can fail");
        for next in P::ALL {
            assert_eq!(from.may_become(next), legal.contains(&(from, next)), "{from} to {next}");
            let mut session = RebuildSession::new(SHARD, Arc::new(LogOnly));
            session.phase = from;
            let entered = session.enter(next);
            assert_eq!(entered.is_ok(), from.may_become(next));
            if let Err(error) = entered {
                assert!(error.to_string().contains(from.as_str()) && error.to_string().contains(next.as_str()));
            }
        }
    }
}

/// A leader's store with two keys, its records, and a follower's empty store.
struct Pair {
    _directory: tempfile::TempDir,
    leader: FixedStore,
    records: Vec<Vec<u8>>,
    follower: Arc<FixedStore>,
    session: RebuildSession,
}

impl Pair {
    fn new() -> Pair {
        let directory = tempfile::tempdir().unwrap();
        let open = |name| FixedStore::open(directory.path().join(name), &FixedStoreOptions::default()).unwrap();
        let (leader, follower) = (open("leader"), Arc::new(open("follower")));
        let session = RebuildSession::new(SHARD, follower.clone());
        let mut pair = Pair { _directory: directory, leader, records: Vec::new(), follower, session };
        pair.put(b"one", b"1");
        pair.put(b"two", b"2");
        pair
    }

    fn put(&mut self, key: &[u8], value: &[u8]) {
        let records = &mut self.records;
        let append = |_, record: &[u8]| {
            records.push(record.to_vec());
            Ok(Lsn(records.len() as u64))
        };
        self.leader.put(key, value, append).unwrap();
    }

    fn delete(&mut self, key: &[u8]) {
        let records = &mut self.records;
        let append = |_, record: &[u8]| {
            records.push(record.to_vec());
            Ok(Lsn(records.len() as u64))
        };
        self.leader.delete(key, append).unwrap();
    }

    fn start(&mut self, session: u64) -> Box<dyn BaseSource> {
        let base = self.leader.open_base(SHARD).unwrap();
        let target = Lsn(self.records.len() as u64);
        let contract = RebuildContract { session: SessionId(session), epoch: Epoch(1), target, base: base.info() };
        self.session.start(contract).unwrap();
        base
    }

    /// The batch of the records `first..=last`, as the log would have it.
    fn log_entry(&mut self, first: u64, last: u64) -> Result<()> {
        let at = Expected { first_lsn: Lsn(first), chain: Chain(7), epoch: Epoch(1) };
        let range = usize::try_from(first - 1).unwrap()..usize::try_from(last).unwrap();
        let records: Vec<&[u8]> = self.records[range].iter().map(Vec::as_slice).collect();
        let bytes = batch::build(at, HybridTimestamp::default(), Lsn::ZERO, &records);
        self.session.apply_log_entry(&BatchIter::new(&bytes).next().unwrap())
    }

    fn copy(&mut self, base: &mut dyn BaseSource) -> u64 {
        let mut block = vec![0; usize::try_from(base.info().block_len).unwrap()];
        let mut sent = 0;
        while let Some(run) = base.next_run(&mut block).unwrap() {
            self.session.apply_base_block(run.first, &block).unwrap();
            sent += 1;
        }
        sent
    }
}

#[test]
fn the_log_wins_over_the_base_and_completion_waits_for_both() {
    let mut pair = Pair::new();
    let mut base = pair.start(1);
    assert_eq!(pair.session.phase(), RebuildPhase::Accepted);
    pair.put(b"one", b"newer");
    pair.put(b"three", b"3");
    pair.delete(b"two");
    // Records that the base has already come once more, and change nothing.
    pair.log_entry(1, 2).unwrap();
    assert_eq!((pair.session.phase(), pair.session.progress().applied), (RebuildPhase::Accepted, Lsn(2)));
    pair.log_entry(2, 3).unwrap();
    assert_eq!(pair.session.phase(), RebuildPhase::Running);
    let sent = pair.copy(base.as_mut());
    let progress = pair.session.progress();
    assert_eq!((progress.blocks_done, progress.blocks_skipped), (sent, 1), "the slot of one, and no other");
    assert_eq!(pair.session.try_complete().unwrap(), None, "the base is not complete");
    pair.session.mark_base_complete(sent).unwrap();
    assert_eq!(pair.session.needed(), Lsn(5), "the slot of two came with the base, deleted");
    assert_eq!(pair.session.try_complete().unwrap(), None, "the log is not there");
    assert!(pair.follower.get(b"one").is_err());
    pair.log_entry(4, 5).unwrap();
    assert_eq!(pair.session.try_complete().unwrap(), Some(Lsn(5)));
    assert_eq!(pair.follower.get(b"one").unwrap().as_deref(), Some(&b"newer"[..]));
    assert_eq!(pair.follower.get(b"two").unwrap(), None);
    assert!(!pair.session.active() && pair.session.is_completed());
}

#[test]
fn a_run_of_blocks_is_put_around_those_that_the_log_has_written() {
    let mut pair = Pair::new();
    pair.put(b"three", b"3");
    let mut base = pair.start(1);
    let block_len = usize::try_from(base.info().block_len).unwrap();
    let mut blocks = vec![0; 8 * block_len];
    let run = base.next_run(&mut blocks).unwrap().unwrap();
    assert_eq!((run.first, run.len), (BlockId(0), 3 * block_len));
    pair.put(b"two", b"newer");
    pair.log_entry(4, 4).unwrap();
    let count = base.info().block_count;
    for (first, len) in [(0, 0), (0, block_len + 1), (count - 1, 2 * block_len), (u64::MAX, block_len)] {
        assert!(pair.session.apply_base_blocks(BlockId(first), &blocks[..len]).is_err(), "{len} bytes from {first} on");
        assert!(pair.session.active(), "nothing has changed");
    }
    assert_eq!(pair.session.apply_base_blocks(run.first, &blocks[..run.len]).unwrap(), 2);
    let progress = pair.session.progress();
    assert_eq!((progress.blocks_done, progress.blocks_skipped, pair.session.kept().unwrap().blocks), (3, 1, 3));
    pair.session.mark_base_complete(3).unwrap();
    assert_eq!(pair.session.try_complete().unwrap(), Some(Lsn(4)));
    for (key, value) in [(&b"one"[..], &b"1"[..]), (b"two", b"newer"), (b"three", b"3")] {
        assert_eq!(pair.follower.get(key).unwrap().as_deref(), Some(value));
    }
    assert!(pair.session.apply_base_blocks(run.first, &blocks[..run.len]).is_err(), "completed");
}

#[test]
fn what_the_log_has_written_to_a_block_that_was_passed_over_is_kept() {
    let mut pair = Pair::new();
    pair.put(b"three", b"3");
    let mut base = pair.start(1);
    let mut blocks = vec![0; 8 * usize::try_from(base.info().block_len).unwrap()];
    let run = base.next_run(&mut blocks).unwrap().unwrap();
    pair.put(b"three", b"newer");
    pair.put(b"four", b"4");
    pair.log_entry(4, 5).unwrap();
    // The last block of the run is none that the target is given.
    assert_eq!(pair.session.apply_base_blocks(run.first, &blocks[..run.len]).unwrap(), 2);
    pair.follower.sync(SHARD).unwrap();
    let kept = pair.session.kept().unwrap();
    assert_eq!(kept, KeptBase { blocks: 3, applied: Lsn(5) });
    pair.session.cancel(SessionFailure::TransportLost);

    let mut base = pair.leader.open_base(SHARD).unwrap();
    let contract = RebuildContract { session: SessionId(2), epoch: Epoch(1), target: Lsn(5), base: base.info() };
    pair.session.resume(contract, kept).unwrap();
    base.skip_to(BlockId(kept.blocks));
    let sent = pair.copy(base.as_mut());
    assert_eq!(sent, 1, "what was only kept back comes with the base");
    pair.session.mark_base_complete(sent).unwrap();
    assert_eq!(pair.session.try_complete().unwrap(), Some(Lsn(5)));
    for (key, value) in [(&b"one"[..], &b"1"[..]), (b"two", b"2"), (b"three", b"newer"), (b"four", b"4")] {
        assert_eq!(pair.follower.get(key).unwrap().as_deref(), Some(value));
    }
}

#[test]
fn a_gap_in_the_log_lane_fails_the_session() {
    let mut pair = Pair::new();
    let _base = pair.start(1);
    pair.put(b"three", b"3");
    pair.put(b"four", b"4");
    let error = pair.log_entry(4, 4).unwrap_err();
    assert!(error.to_string().contains("LSN 3 is due"), "{error}");
    assert_eq!(pair.session.phase(), RebuildPhase::Failed);
    assert!(pair.follower.is_rebuilding(SHARD).unwrap());
    assert!(pair.log_entry(3, 3).is_err(), "a failed session takes nothing");
}

#[test]
fn a_base_that_lacks_blocks_fails_the_session() {
    let mut pair = Pair::new();
    let mut base = pair.start(1);
    let sent = pair.copy(base.as_mut());
    assert!(pair.session.mark_base_complete(sent + 1).is_err());
    assert_eq!(pair.session.phase(), RebuildPhase::Failed);
}

#[test]
fn a_new_session_supersedes_the_old_and_stale_ids_are_told_apart() {
    let mut pair = Pair::new();
    let mut old = pair.start(1);
    let mut block = vec![1; usize::try_from(old.info().block_len).unwrap()];
    assert!(pair.session.apply_base_blocks(BlockId(0), &block).is_err(), "it is no slot");
    assert_eq!(pair.session.kept(), None, "of a failed session nobody knows what is there");
    let mut base = pair.start(2);
    assert!(pair.session.is(SessionId(2), Epoch(1)));
    assert!(!pair.session.is(SessionId(1), Epoch(1)) && !pair.session.is(SessionId(2), Epoch(2)));
    let sent = pair.copy(base.as_mut());
    pair.session.mark_base_complete(sent).unwrap();
    assert_eq!(pair.session.try_complete().unwrap(), Some(Lsn(2)));
    let run = old.next_run(&mut block).unwrap().unwrap();
    assert!(pair.session.apply_base_block(run.first, &block).is_err(), "completed");
    assert!(pair.session.mark_base_complete(1).is_err());
}

#[test]
fn a_cancelled_session_leaves_the_mark_and_says_why() {
    let mut pair = Pair::new();
    let _base = pair.start(1);
    pair.session.cancel(SessionFailure::TransportLost);
    pair.session.cancel(SessionFailure::Cancelled);
    assert_eq!((pair.session.phase(), pair.session.failure()), (RebuildPhase::Failed, SessionFailure::TransportLost));
    assert!(pair.follower.is_rebuilding(SHARD).unwrap());
    let mut base = pair.start(2);
    assert_eq!(pair.session.failure(), SessionFailure::None);
    let sent = pair.copy(base.as_mut());
    pair.session.mark_base_complete(sent).unwrap();
    assert!(pair.session.try_complete().unwrap().is_some());
}

#[test]
fn a_session_goes_on_with_what_an_interrupted_one_kept_and_the_log_marks_blocks_again() {
    let mut pair = Pair::new();
    let mut base = pair.start(1);
    let mut block = vec![0; usize::try_from(base.info().block_len).unwrap()];
    let run = base.next_run(&mut block).unwrap().unwrap();
    pair.session.apply_base_block(run.first, &block).unwrap();
    pair.put(b"two", b"newer");
    pair.log_entry(3, 3).unwrap();
    let kept = pair.session.kept().unwrap();
    assert_eq!(kept, KeptBase { blocks: 1, applied: Lsn(3) });
    pair.session.cancel(SessionFailure::TransportLost);
    // The next base is older than what has been applied: the log after it marks the block of two again.
    let info = BaseInfo { base_lsn: Lsn(2), ..base.info() };
    let contract = RebuildContract { session: SessionId(2), epoch: Epoch(1), target: Lsn(3), base: info };
    pair.session.resume(contract, kept).unwrap();
    assert_eq!((pair.session.progress().applied, pair.session.progress().blocks_kept), (Lsn(2), 1));
    pair.log_entry(3, 3).unwrap();
    pair.session.check_kept().unwrap();
    base.skip_to(BlockId(kept.blocks));
    let sent = pair.copy(base.as_mut());
    assert_eq!(pair.session.progress().blocks_skipped, 1, "the log has written two since");
    pair.session.mark_base_complete(sent).unwrap();
    assert_eq!(pair.session.try_complete().unwrap(), Some(Lsn(3)));
    assert_eq!(pair.follower.get(b"one").unwrap().as_deref(), Some(&b"1"[..]));
    assert_eq!(pair.follower.get(b"two").unwrap().as_deref(), Some(&b"newer"[..]));
}

#[test]
fn a_target_that_takes_no_base_starts_nothing() {
    let mut session = RebuildSession::new(SHARD, Arc::new(LogOnly));
    let contract =
        RebuildContract { session: SessionId(1), epoch: Epoch(1), target: Lsn(1), base: BaseInfo::default() };
    assert!(session.start(contract).is_err());
    assert_eq!(session.phase(), RebuildPhase::Idle);
    assert!(session.mark_base_complete(0).is_err() && session.try_complete().unwrap().is_none());
}
