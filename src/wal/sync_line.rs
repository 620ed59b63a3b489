//! Those who found somebody else syncing, in the order in which they came, so that whoever has synced calls one of
//! them.
//!
//! A sync covers most of those who wait for it, and they wait on the synced mark. Of the others one is enough: the next
//! sync is done by it, for all. Calling every one of them would have each wake up, find the first one syncing, and
//! sleep again.
//!
//! # Why nobody is forgotten
//!
//! 1. Who finds the sync lock taken [enters](SyncLine::enter), and looks at the lock once more. If it is still taken
//!    then, its holder lets go after that, and [calls](SyncLine::call_next) after letting go: it finds whoever has
//!    entered.
//! 2. Whoever is called is out of the line, and gets the lock, and calls after letting go; or finds it taken, and
//!    enters anew; or finds that a sync has covered it; or waits no longer for want of time, and calls the next one in
//!    its place. Where a sync has covered it, those behind it in the line have seen a holder of the lock after they had
//!    entered, and each holder calls after letting go.
//! 3. Whoever a sync has covered is taken out without being called, and wakes up by the synced mark, which was moved
//!    before.
//! 4. Once the log has ended all wake up by that mark, and nobody syncs any more.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::types::Lsn;
use crate::watermark::{Until, Watermark};

/// The line of one log. Its lock is taken for a few steps, and no other meanwhile.
#[derive(Debug, Default)]
pub(super) struct SyncLine {
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    /// Not called yet, first come first.
    standing: VecDeque<Standing>,
    /// Bells that nobody uses now: as many as ever stood in the line at once, less those in use.
    bells: Vec<Arc<Watermark>>,
    /// How many have entered so far.
    entered: u64,
}

#[derive(Debug)]
struct Standing {
    number: u64,
    /// What is to be synced for it.
    lsn: Lsn,
    bell: Arc<Watermark>,
}

/// A place in the line, to be given back with [`SyncLine::leave`].
#[derive(Debug)]
pub(super) struct Place {
    number: u64,
    /// Moves by one when the place is called.
    bell: Arc<Watermark>,
    called_at: Lsn,
}

impl Place {
    /// Condition that holds once it is called.
    pub(super) fn until_called(&self) -> Until<'_> {
        self.bell.until(self.called_at)
    }
}

impl SyncLine {
    /// A place at the end of the line, for whoever wants `lsn` synced.
    pub(super) fn enter(&self, lsn: Lsn) -> Place {
        let mut line = self.line.lock();
        let bell = line.bells.pop().unwrap_or_default();
        line.entered += 1;
        let number = line.entered;
        line.standing.push_back(Standing { number, lsn, bell: Arc::clone(&bell) });
        let called_at = bell.load().next();
        Place { number, bell, called_at }
    }

    /// Gives a place back. Returns whether it had been called: whoever will not sync then calls the next one.
    pub(super) fn leave(&self, place: Place) -> bool {
        let mut line = self.line.lock();
        // Under the lock a bell has moved if its place was called.
        let is_called = place.until_called().holds();
        if !is_called && let Ok(at) = line.standing.binary_search_by_key(&place.number, |standing| standing.number) {
            line.standing.remove(at);
        }
        line.bells.push(place.bell);
        is_called
    }

    /// Calls the first one that is not covered by what is synced.
    pub(super) fn call_next(&self, synced: Lsn) {
        let called = {
            let mut line = self.line.lock();
            loop {
                match line.standing.pop_front() {
                    Some(first) if first.lsn <= synced => {}
                    first => break first,
                }
            }
            .inspect(|first| first.bell.advance_quietly(first.bell.load().next()))
        };
        // Not under the lock, which is the first thing that the called one takes.
        if let Some(called) = called {
            called.bell.wake();
        }
    }

    /// How many stand in the line.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.line.lock().standing.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_called(place: &Place) -> bool {
        place.until_called().holds()
    }

    #[test]
    fn the_first_that_is_not_covered_is_called_and_nobody_else() {
        let line = SyncLine::default();
        let places: Vec<_> = [3, 5, 9, 7, 8].map(|lsn| line.enter(Lsn(lsn))).into();
        line.call_next(Lsn(5));
        assert_eq!(places.iter().map(is_called).collect::<Vec<_>>(), [false, false, true, false, false]);
        line.call_next(Lsn(7));
        assert_eq!(places.iter().map(is_called).collect::<Vec<_>>(), [false, false, true, false, true]);
        assert_eq!(line.len(), 0, "who is covered stands there no more");
        line.call_next(Lsn(7));
    }

    #[test]
    fn who_leaves_is_not_called_and_knows_if_it_was() {
        let line = SyncLine::default();
        let [first, second, third] = [1, 2, 3].map(|lsn| line.enter(Lsn(lsn)));
        assert!(!line.leave(first));
        line.call_next(Lsn::ZERO);
        assert!(is_called(&second) && !is_called(&third));
        assert!(line.leave(second), "somebody else must be called");
        line.call_next(Lsn::ZERO);
        assert!(is_called(&third));
        assert!(line.leave(third));
        assert_eq!(line.len(), 0);
    }

    #[test]
    fn a_bell_that_rang_for_one_is_silent_for_the_next() {
        let line = SyncLine::default();
        for lsn in 1..4 {
            let place = line.enter(Lsn(lsn));
            assert!(!is_called(&place));
            line.call_next(Lsn::ZERO);
            assert!(is_called(&place));
            assert!(line.leave(place));
        }
        assert_eq!(line.line.lock().bells.len(), 1);
    }
}
