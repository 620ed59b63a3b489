//! How many rebuilds a node serves at a time: places, handed out in the order in which they were asked for.
//!
//! Nobody polls: who waits has a mark, and the place of whoever leaves goes to the longest waiting.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::types::Lsn;
use crate::watermark::{Until, Watermark};

const GRANTED: Lsn = Lsn(1);

/// The places of a node.
pub(crate) struct Places(Mutex<State>);

struct State {
    free: usize,
    waiting: VecDeque<Arc<Watermark>>,
}

/// A place, or the wait for one. Dropping it gives it up.
pub(crate) struct Place {
    places: Arc<Places>,
    /// 1 once it is granted. Moved under the lock of the places only.
    granted: Arc<Watermark>,
}

impl Places {
    /// As many places as that; at least one.
    pub(crate) fn new(count: usize) -> Arc<Places> {
        Arc::new(Places(Mutex::new(State { free: count.max(1), waiting: VecDeque::new() })))
    }

    /// Takes a place, or a number in the queue.
    pub(crate) fn ask(self: &Arc<Self>) -> Place {
        let mut state = self.0.lock();
        let place = Place { places: Arc::clone(self), granted: Arc::default() };
        if state.free > 0 {
            state.free -= 1;
            place.granted.advance(GRANTED);
        } else {
            state.waiting.push_back(Arc::clone(&place.granted));
        }
        place
    }
}

impl Place {
    pub(crate) fn is_granted(&self) -> bool {
        self.granted.load() >= GRANTED
    }

    /// The condition that it is granted.
    pub(crate) fn until_granted(&self) -> Until<'_> {
        self.granted.until(GRANTED)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.places.0.lock();
        if !self.is_granted() {
            state.waiting.retain(|waiting| !Arc::ptr_eq(waiting, &self.granted));
        } else if let Some(next) = state.waiting.pop_front() {
            next.advance(GRANTED);
        } else {
            state.free += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_go_to_the_longest_waiting_and_never_to_more_than_there_are() {
        let places = Places::new(2);
        let (a, b) = (places.ask(), places.ask());
        let (c, d, e) = (places.ask(), places.ask(), places.ask());
        assert!(a.is_granted() && b.is_granted());
        assert!(!c.is_granted() && !d.is_granted() && !e.is_granted());
        drop(c);
        assert!(!d.is_granted(), "whoever gives up waiting frees no place");
        drop(a);
        assert!(d.is_granted() && !e.is_granted());
        drop(b);
        assert!(e.is_granted());
        drop((d, e));
        let again = (places.ask(), places.ask(), places.ask());
        assert!(again.0.is_granted() && again.1.is_granted() && !again.2.is_granted());
    }

    #[test]
    fn a_waiting_thread_is_woken() {
        let places = Places::new(1);
        let held = places.ask();
        let waiting = places.ask();
        std::thread::scope(|scope| {
            scope.spawn(|| crate::watermark::wait_any(&[waiting.until_granted()], Default::default(), None));
            drop(held);
        });
        assert!(waiting.is_granted());
    }
}
