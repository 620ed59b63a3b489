//! Files that can be filled again: which of them wait for that, and how many. Pure bookkeeping, under the lock of
//! whoever prepares spares: nothing here touches a file.
//!
//! One of a segment that was given up has its pages and blocks, and a log at its bound takes no memory and no room from
//! one segment to the next. One waits for it at the bound, and where that leaves room as many as the writer took from
//! one giving up to the next; once nothing has been wanted for a while, no more than what is missing of the spares.
//!
//! Zeros over such a file need not reach the device before the records do where nobody waits for syncs or no spare is
//! left: what a power cut brings back then is older than the segment. Its chain is no other batch's (but by a chance of
//! one in 2^32), and its LSNs are below those that recovery looks for behind the end, so the log is cut there. Nobody
//! knows that of files that were left over when the log was opened: their zeros go to the device first.

use std::path::PathBuf;

/// A log that may have so many segments in the room for used files lets one wait even where it is at its bound: then it
/// goes from segment to segment without a new file.
const ONE_SEGMENT_IN: u64 = 8;

/// Bytes of used files that wait because bursts take so many, at most: a follower that was far behind lets go of any
/// number of segments at once.
const MOST_USED: u64 = 512 << 20;

/// What a file that is to be prepared was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// There is none yet.
    New,
    /// It may hold anything.
    LeftOver,
    /// It holds records of this log, older than any that comes.
    Used,
}

/// The files of one log that can be filled again.
#[derive(Default)]
pub(super) struct OldFiles {
    /// Spares that are kept ready.
    keep: usize,
    /// Files that held anything before the log was opened.
    left_over: Vec<PathBuf>,
    /// Files of segments that were given up since, durable by their new names.
    used: Vec<PathBuf>,
    /// How many more are on their way there.
    returning: usize,
    /// Spares that had become segments when one was given up last.
    taken_before: u64,
    /// How many become segments from one giving up to the next. Falls slowly.
    burst: u64,
}

/// What decides about the file of a segment that is given up.
#[derive(Clone, Copy)]
pub(super) struct GivingUp {
    /// Spares that are ready or being prepared.
    pub(super) spares: usize,
    /// Spares that have become segments.
    pub(super) taken: u64,
    pub(super) segment_size: u64,
    /// Bytes of all other segments.
    pub(super) retained: u64,
    /// Bytes of files, all of the log's together, up to which more used files wait than spares are kept.
    pub(super) room: u64,
}

impl OldFiles {
    /// As many of those left over as spares are kept. Gives the others too, which are to be removed.
    pub(super) fn new(mut left_over: Vec<PathBuf>, keep: usize) -> (OldFiles, Vec<PathBuf>) {
        let surplus = left_over.split_off(keep.min(left_over.len()));
        (OldFiles { keep, left_over, ..OldFiles::default() }, surplus)
    }

    /// How many there are, those on their way included.
    pub(super) fn count(&self) -> usize {
        self.left_over.len() + self.used_count()
    }

    fn used_count(&self) -> usize {
        self.used.len() + self.returning
    }

    /// Takes in that a segment is given up. Gives the used files that are too many now, which are to be removed.
    pub(super) fn segment_given_up(&mut self, now: &GivingUp) -> Vec<PathBuf> {
        let since = now.taken - self.taken_before;
        if since > 0 {
            self.taken_before = now.taken;
            let most = MOST_USED / now.segment_size;
            self.burst = since.min(most).max(self.burst - self.burst.div_ceil(8));
        }
        self.used.split_off(self.worth_keeping().min(self.used.len()))
    }

    /// Whether the file of that segment is worth filling again.
    pub(super) fn is_wanted(&self, now: &GivingUp) -> bool {
        let &GivingUp { segment_size, retained, room, .. } = now;
        let files = now.spares + self.count();
        let has_room = retained.saturating_add((files as u64 + 1) * segment_size) <= room;
        let is_one = self.used_count() == 0 && segment_size <= room / ONE_SEGMENT_IN;
        files < self.keep || is_one || has_room && self.used_count() < self.worth_keeping()
    }

    fn worth_keeping(&self) -> usize {
        usize::try_from(self.burst).unwrap_or(usize::MAX).max(self.keep)
    }

    /// One more is on its way.
    pub(super) fn returns(&mut self) {
        self.returning += 1;
    }

    /// These were on their way, and can be filled now.
    pub(super) fn have_returned(&mut self, files: Vec<PathBuf>) {
        self.returning -= files.len();
        self.used.extend(files);
    }

    /// So many were on their way, and do not come.
    pub(super) fn are_lost(&mut self, count: usize) {
        self.returning -= count;
    }

    /// The log has grown into the room of used files. Gives those beyond what is missing of so many spares, or one.
    pub(super) fn shed(&mut self, spares: usize) -> Vec<PathBuf> {
        let kept = self.keep.saturating_sub(spares).max(1);
        self.used.split_off(kept.min(self.used.len()))
    }

    /// The log is closed. Gives used files beyond what is missing of so many spares.
    pub(super) fn close(&mut self, spares: usize) -> Vec<PathBuf> {
        let kept = self.keep.saturating_sub(spares);
        self.used.split_off(kept.min(self.used.len()))
    }

    /// Bursts are over, as far as anybody can know. Gives what is beyond what is missing of so many spares.
    pub(super) fn burst_ends(&mut self, spares: usize) -> Vec<PathBuf> {
        self.burst = 0;
        let wanted = self.keep.saturating_sub(spares);
        let kept = wanted.min(self.used.len());
        let mut surplus = self.used.split_off(kept);
        let kept = (wanted - kept).min(self.left_over.len());
        surplus.append(&mut self.left_over.split_off(kept));
        surplus
    }

    /// The one to be prepared next. What must be synced before it is taken is none for whoever is in a hurry: files
    /// left over always are, used ones where somebody waits for syncs.
    pub(super) fn next(&mut self, in_a_hurry: bool, used_are_synced: bool) -> Option<(PathBuf, Origin)> {
        let left_over = if in_a_hurry { None } else { self.left_over.pop() };
        left_over.map(|path| (path, Origin::LeftOver)).or_else(|| {
            let used = if in_a_hurry && used_are_synced { None } else { self.used.pop() };
            used.map(|path| (path, Origin::Used))
        })
    }

    /// Any, however long it takes until it is prepared: it has its room already.
    pub(super) fn any(&mut self) -> Option<(PathBuf, Origin)> {
        let used = self.used.pop().map(|path| (path, Origin::Used));
        used.or_else(|| self.left_over.pop().map(|path| (path, Origin::LeftOver)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;
    const KEEP: usize = 2;

    fn paths(count: usize) -> Vec<PathBuf> {
        (0..count).map(|number| PathBuf::from(number.to_string())).collect()
    }

    fn with_used(count: usize) -> OldFiles {
        OldFiles { used: paths(count), ..OldFiles::new(Vec::new(), KEEP).0 }
    }

    /// With one other segment, and as much room as there is need for.
    fn giving_up(taken: u64) -> GivingUp {
        GivingUp { spares: 0, taken, segment_size: SIZE, retained: SIZE, room: u64::MAX }
    }

    #[test]
    fn no_more_than_spares_is_kept_of_what_was_left_over() {
        let (old, surplus) = OldFiles::new(paths(9), KEEP);
        assert_eq!((old.count(), surplus.len()), (KEEP, 7));
    }

    #[test]
    fn as_many_wait_as_one_burst_takes() {
        let mut old = with_used(9);
        assert_eq!(old.segment_given_up(&giving_up(0)).len(), 9 - KEEP, "nothing has been taken");
        assert_eq!(old.segment_given_up(&giving_up(7)).len(), 0);
        assert!(old.is_wanted(&giving_up(7)));
        old.used = paths(7);
        assert!(!old.is_wanted(&giving_up(7)));
        assert_eq!(old.segment_given_up(&giving_up(8)).len(), 1, "it falls slowly");
        old.used = paths(600);
        assert_eq!(old.segment_given_up(&giving_up(10_000)).len(), 600 - 512, "no burst is worth more");
        assert_eq!(old.burst_ends(1).len(), 512 - 1, "one spare is missing");
        assert_eq!(old.segment_given_up(&giving_up(10_000)).len(), 0);
        assert!(old.is_wanted(&giving_up(10_000)), "the other spare");
        old.returns();
        assert!(!old.is_wanted(&giving_up(10_000)));
    }

    #[test]
    fn at_the_bound_one_waits_where_the_log_has_segments_enough() {
        let old = with_used(0);
        let at_bound = |room| GivingUp { spares: KEEP, retained: 100 * SIZE, room, ..giving_up(100) };
        assert!(!old.is_wanted(&at_bound(ONE_SEGMENT_IN * SIZE - 1)));
        assert!(old.is_wanted(&at_bound(ONE_SEGMENT_IN * SIZE)));
        assert!(!with_used(1).is_wanted(&at_bound(ONE_SEGMENT_IN * SIZE)));
    }

    #[test]
    fn where_the_log_grows_into_their_room_they_go_but_for_one_or_what_spares_lack() {
        assert_eq!(with_used(9).shed(0).len(), 9 - KEEP);
        assert_eq!(with_used(9).shed(KEEP).len(), 8);
        assert_eq!(with_used(9).close(KEEP).len(), 9);
        assert_eq!(with_used(1).shed(KEEP).len(), 0);
    }

    #[test]
    fn those_on_their_way_count_until_they_come_or_are_lost() {
        let mut old = with_used(0);
        (0..3).for_each(|_| old.returns());
        assert_eq!(old.count(), 3);
        assert_eq!(old.any(), None, "they are not here yet");
        old.have_returned(paths(2));
        old.are_lost(1);
        assert_eq!(old.count(), 2);
    }

    #[test]
    fn what_must_be_synced_first_is_not_for_whoever_is_in_a_hurry() {
        let both = || OldFiles { left_over: paths(1), ..with_used(1) };
        let origins = |in_a_hurry, used_are_synced| {
            let mut old = both();
            [(); 2].map(|()| old.next(in_a_hurry, used_are_synced).map(|(_, origin)| origin))
        };
        assert_eq!(origins(false, true), [Some(Origin::LeftOver), Some(Origin::Used)]);
        assert_eq!(origins(true, true), [None; 2]);
        assert_eq!(origins(true, false), [Some(Origin::Used), None]);
        let mut old = both();
        let any = [(); 3].map(|()| old.any().map(|(_, origin)| origin));
        assert_eq!(any, [Some(Origin::Used), Some(Origin::LeftOver), None], "for want of room");
    }
}
