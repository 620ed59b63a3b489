//! Who gets a place among a node's connections, so that one who asks for all of them does not keep the others out.
//!
//! | bound | beyond it |
//! |---|---|
//! | connections in all | a newcomer takes the place of one that has not said what it wants; if there is none, it is refused |
//! | connections from one address | the same, among those of that address |
//! | connections that have not said what they want | the oldest of those of the address that has most of them goes |
//!
//! A peer says what it wants in its first frame, a round trip after it has connected: whoever has been silent for long
//! while others wait is the one to go. So any number of silent connections costs no more than
//! [`MAX_HANDSHAKES`] of them, and keeps nobody out who speaks. Each of them also has its deadline.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::limits::MAX_HANDSHAKES;
use crate::transport::{Closer, Connection};

/// The places of a node.
pub(crate) struct Places {
    most: usize,
    most_of_address: usize,
    most_silent: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    next_id: u64,
    /// How many there are in all, by address.
    by_address: HashMap<Arc<str>, usize>,
    open: usize,
    /// Those that have not said what they want, oldest first.
    silent: VecDeque<Silent>,
}

struct Silent {
    id: u64,
    address: Arc<str>,
    closer: Closer,
}

/// One connection's place. It is free again when this is dropped.
pub(crate) struct Place {
    places: Arc<Places>,
    id: u64,
    address: Arc<str>,
    /// Whether it has said what it wants.
    has_spoken: bool,
}

impl Places {
    pub(crate) fn new(most: usize, most_of_address: usize) -> Arc<Places> {
        Arc::new(Places { most, most_of_address, most_silent: MAX_HANDSHAKES, taken: Mutex::default() })
    }

    /// A place for a new connection.
    ///
    /// # Errors
    ///
    /// Why there is none, as a sentence for the peer.
    pub(crate) fn take(self: &Arc<Places>, connection: &Connection) -> Result<Place, String> {
        let address = address_of(&connection.peer);
        let mut taken = self.taken.lock();
        let mut closed = None;
        let of_address = taken.by_address.get(address).copied().unwrap_or(0);
        let (is_full, too_many) = (taken.open >= self.most, of_address >= self.most_of_address);
        if is_full || too_many || taken.silent.len() >= self.most_silent {
            closed = taken.dismiss(too_many.then_some(address));
            if closed.is_none() {
                return Err(match is_full {
                    true => format!("{} connections are open, as many as allowed", taken.open),
                    false => format!("{of_address} connections from your address are open, as many as allowed"),
                });
            }
        }
        let address: Arc<str> = address.into();
        let id = taken.next_id;
        taken.next_id += 1;
        taken.open += 1;
        *taken.by_address.entry(Arc::clone(&address)).or_default() += 1;
        taken.silent.push_back(Silent { id, address: Arc::clone(&address), closer: connection.closer.clone() });
        drop(taken);
        if let Some(closer) = closed {
            closer.close();
        }
        Ok(Place { places: Arc::clone(self), id, address, has_spoken: false })
    }
}

impl Taken {
    /// Takes the place from the oldest silent connection of `address`, or of the address that has most of them. Gives
    /// what closes it; `None` if there is none.
    fn dismiss(&mut self, address: Option<&str>) -> Option<Closer> {
        let from = match address {
            Some(address) => address.into(),
            None => {
                let mut counts: HashMap<&Arc<str>, usize> = HashMap::new();
                for silent in &self.silent {
                    *counts.entry(&silent.address).or_default() += 1;
                }
                Arc::clone(counts.into_iter().max_by_key(|(_, count)| *count)?.0)
            }
        };
        let at = self.silent.iter().position(|silent| silent.address == from)?;
        let silent = self.silent.remove(at)?;
        self.leave(&silent.address);
        Some(silent.closer)
    }

    fn leave(&mut self, address: &str) {
        self.open = self.open.saturating_sub(1);
        if let Some(count) = self.by_address.get_mut(address) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.by_address.remove(address);
            }
        }
    }

    /// Whether a connection was silent until now; it no longer counts among those.
    fn take_silent(&mut self, id: u64) -> bool {
        let at = self.silent.iter().position(|silent| silent.id == id);
        at.and_then(|at| self.silent.remove(at)).is_some()
    }
}

impl Place {
    /// Which connection it is, for those who look at threads.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// It has said what it wants, and is served: from now on it keeps its place. `false` if that has been taken from it
    /// meanwhile, and it is closed.
    pub(crate) fn keep(&mut self) -> bool {
        self.has_spoken = self.has_spoken || self.places.taken.lock().take_silent(self.id);
        self.has_spoken
    }
}

impl Place {
    /// Whether another has it now.
    pub(crate) fn is_taken(&self) -> bool {
        !self.has_spoken && self.places.taken.lock().silent.iter().all(|silent| silent.id != self.id)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock();
        // Whoever was dismissed has left already.
        if self.has_spoken || taken.take_silent(self.id) {
            taken.leave(&self.address);
        }
    }
}

/// The machine behind `host:port`; a peer without a port is one of its own.
fn address_of(peer: &str) -> &str {
    peer.rsplit_once(':').map_or(peer, |(host, _)| host)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that meets an error has failed")]

    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::transport::{InProcessTransport, Transport};

    /// Connections that say when they are closed.
    struct Peers {
        transport: InProcessTransport,
        listener: Box<dyn crate::transport::Listener>,
        closed: Arc<Mutex<Vec<String>>>,
        count: AtomicUsize,
    }

    impl Peers {
        fn new() -> Peers {
            let transport = InProcessTransport::new();
            let listener = transport.listen("node").unwrap();
            Peers { transport, listener, closed: Arc::default(), count: AtomicUsize::new(0) }
        }

        fn from(&self, host: &str) -> Connection {
            let peer = format!("{host}:{}", self.count.fetch_add(1, Ordering::Relaxed));
            let (closed, name) = (Arc::clone(&self.closed), peer.clone());
            let connection = self.transport.connect("node", Duration::from_secs(1)).unwrap();
            drop(self.listener.accept().unwrap());
            Connection { peer, closer: Closer::new(move || closed.lock().push(name.clone())), ..connection }
        }

        fn take_closed(&self) -> Vec<String> {
            std::mem::take(&mut self.closed.lock())
        }
    }

    #[test]
    fn silent_ones_make_room_and_the_others_stay() {
        let (peers, places) = (Peers::new(), Places::new(3, 3));
        let mut served = places.take(&peers.from("a")).unwrap();
        assert!(served.keep() && served.keep());
        let mut silent = places.take(&peers.from("b")).unwrap();
        let mut other = places.take(&peers.from("b")).unwrap();
        assert_eq!(peers.take_closed(), [""; 0]);
        let mut newest = places.take(&peers.from("a")).unwrap();
        assert_eq!(peers.take_closed(), ["b:1"]);
        assert!(!silent.keep(), "its place is another's");
        drop(silent);
        assert!(other.keep() && newest.keep());
        let refusal = places.take(&peers.from("c")).map(drop).unwrap_err();
        assert_eq!(refusal, "3 connections are open, as many as allowed");
        drop(other);
        drop(places.take(&peers.from("c")).unwrap());
        assert_eq!((places.taken.lock().open, peers.take_closed().len()), (2, 0));
        drop((served, newest));
        assert!(places.taken.lock().open == 0 && places.taken.lock().by_address.is_empty());
    }

    #[test]
    fn one_address_cannot_have_all() {
        let (peers, places) = (Peers::new(), Places::new(10, 2));
        let mut first = places.take(&peers.from("a")).unwrap();
        let second = places.take(&peers.from("a")).unwrap();
        assert!(first.keep());
        let mut third = places.take(&peers.from("a")).unwrap();
        assert_eq!(peers.take_closed(), ["a:1"]);
        assert!(third.keep());
        let refusal = places.take(&peers.from("a")).map(drop).unwrap_err();
        assert_eq!(refusal, "2 connections from your address are open, as many as allowed");
        let elsewhere = places.take(&peers.from("b")).unwrap();
        drop((first, second, third, elsewhere));
        assert_eq!(places.taken.lock().open, 0);
    }

    #[test]
    fn of_the_silent_the_oldest_of_the_greediest_goes() {
        let (peers, places) = (Peers::new(), Places::new(MAX_HANDSHAKES * 4, MAX_HANDSHAKES * 4));
        let quiet = places.take(&peers.from("quiet")).unwrap();
        let greedy: Vec<_> = (0..MAX_HANDSHAKES * 2).map(|_| places.take(&peers.from("greedy")).unwrap()).collect();
        let closed = peers.take_closed();
        assert_eq!(closed.len(), MAX_HANDSHAKES + 1);
        assert!(closed.iter().zip(1..).all(|(name, at)| *name == format!("greedy:{at}")), "{closed:?}");
        assert_eq!(places.taken.lock().open, MAX_HANDSHAKES);
        drop((quiet, greedy));
        assert_eq!(places.taken.lock().open, 0);
    }
}
