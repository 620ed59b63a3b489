//! Connections between nodes: bytes in order, late, in pieces, and not always to the end.
//!
//! A connection has a pipe each way. What is sent arrives after a delay, never overtaking what was sent before. Faults:
//! a *cut* lets a beginning of what is under way arrive, down to the byte, and then closes both ends; a connection that
//! is *half open* swallows what goes one way and tells nobody; a *stall* holds everything for a while; between nodes
//! that are *parted*, everything is held until they are joined again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::clock::{Chance, Time};

pub type ConnectionId = u64;

/// One of the two ends of a connection: the one who called, or the one who was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    Caller,
    Called,
}

impl End {
    pub fn other(self) -> End {
        match self {
            End::Caller => End::Called,
            End::Called => End::Caller,
        }
    }
}

/// What arrives at an end.
pub enum Arrival {
    Bytes(Vec<u8>),
    Closed,
}

#[derive(Default)]
struct Pipe {
    under_way: VecDeque<(Time, Arrival)>,
    bytes: usize,
    /// When the last of it arrives.
    last: Time,
    swallows: bool,
    /// Nothing more goes in.
    closed: bool,
}

struct Connection {
    caller: u64,
    called: u64,
    /// What arrives at the caller, and what at the called.
    to_caller: Pipe,
    to_called: Pipe,
}

impl Connection {
    fn to(&mut self, end: End) -> &mut Pipe {
        match end {
            End::Caller => &mut self.to_caller,
            End::Called => &mut self.to_called,
        }
    }
}

pub struct Network {
    connections: BTreeMap<ConnectionId, Connection>,
    next: ConnectionId,
    parted: BTreeSet<(u64, u64)>,
    /// The longest delay of ordinary traffic.
    pub delay: Time,
}

/// That something arrives at an end of a connection at a time.
pub type Due = (Time, ConnectionId, End);

impl Network {
    pub fn new() -> Network {
        Network { connections: BTreeMap::new(), next: 1, parted: BTreeSet::new(), delay: 5 }
    }

    pub fn connect(&mut self, caller: u64, called: u64) -> ConnectionId {
        let id = self.next;
        self.next += 1;
        let pipes = (Pipe::default(), Pipe::default());
        self.connections.insert(id, Connection { caller, called, to_caller: pipes.0, to_called: pipes.1 });
        id
    }

    /// Who stands at an end.
    pub fn node_at(&self, id: ConnectionId, end: End) -> Option<u64> {
        let connection = self.connections.get(&id)?;
        Some(if end == End::Caller { connection.caller } else { connection.called })
    }

    /// Those that neither end has closed.
    pub fn live(&self) -> Vec<ConnectionId> {
        let is_live = |connection: &&Connection| !connection.to_caller.closed && !connection.to_called.closed;
        let live = self.connections.iter().filter(|(_, connection)| is_live(connection));
        live.map(|(id, _)| *id).collect()
    }

    /// Where a node stands in connections.
    pub fn ends_of(&self, node: u64) -> Vec<(ConnectionId, End)> {
        let mut ends = Vec::new();
        for (&id, connection) in &self.connections {
            if connection.caller == node {
                ends.push((id, End::Caller));
            } else if connection.called == node {
                ends.push((id, End::Called));
            }
        }
        ends
    }

    /// Bytes on their way to an end.
    pub fn under_way(&self, id: ConnectionId, end: End) -> usize {
        let pipe = |connection: &Connection| match end {
            End::Caller => connection.to_caller.bytes,
            End::Called => connection.to_called.bytes,
        };
        self.connections.get(&id).map_or(0, pipe)
    }

    /// Sends to the other end, in one piece or two.
    pub fn send(
        &mut self,
        now: Time,
        chance: &mut Chance,
        id: ConnectionId,
        from: End,
        mut bytes: Vec<u8>,
    ) -> Vec<Due> {
        let delay = self.delay;
        let to = from.other();
        let Some(pipe) = self.connections.get_mut(&id).map(|connection| connection.to(to)) else { return Vec::new() };
        if pipe.swallows || pipe.closed {
            return Vec::new();
        }
        let rest =
            (bytes.len() > 1 && chance.per_mille(300)).then(|| bytes.split_off(1 + chance.index(bytes.len() - 1)));
        let mut due = Vec::new();
        for piece in std::iter::once(bytes).chain(rest) {
            let at = pipe.last.max(now + chance.between(1, delay));
            pipe.last = at;
            pipe.bytes += piece.len();
            pipe.under_way.push_back((at, Arrival::Bytes(piece)));
            due.push((at, id, to));
        }
        due
    }

    /// One end closes: what it has sent still arrives, then the other end learns of it. Nothing more arrives here.
    pub fn close(&mut self, now: Time, chance: &mut Chance, id: ConnectionId, from: End) -> Vec<Due> {
        let delay = self.delay;
        let Some(connection) = self.connections.get_mut(&id) else { return Vec::new() };
        let here = connection.to(from);
        here.closed = true;
        here.under_way.clear();
        here.bytes = 0;
        let to = from.other();
        let pipe = connection.to(to);
        if pipe.closed {
            self.connections.remove(&id);
            return Vec::new();
        }
        pipe.closed = true;
        if pipe.swallows {
            return Vec::new();
        }
        let at = pipe.last.max(now + chance.between(1, delay));
        pipe.under_way.push_back((at, Arrival::Closed));
        vec![(at, id, to)]
    }

    /// What arrives now, or when to look again.
    pub fn arrive(&mut self, now: Time, id: ConnectionId, end: End) -> Result<Option<Arrival>, Due> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(None) };
        let pair = (connection.caller.min(connection.called), connection.caller.max(connection.called));
        let pipe = connection.to(end);
        let Some(&(at, _)) = pipe.under_way.front() else { return Ok(None) };
        if self.parted.contains(&pair) {
            return Err((now + 500, id, end));
        }
        if at > now {
            return Err((at, id, end));
        }
        let arrival = pipe.under_way.pop_front().map(|(_, arrival)| arrival);
        if let Some(Arrival::Bytes(bytes)) = &arrival {
            pipe.bytes -= bytes.len();
        }
        let is_over = |pipe: &Pipe| pipe.closed && pipe.under_way.is_empty();
        if is_over(&connection.to_caller) && is_over(&connection.to_called) {
            self.connections.remove(&id);
        }
        Ok(arrival)
    }

    pub fn cut(&mut self, now: Time, chance: &mut Chance, id: ConnectionId) -> Vec<Due> {
        let mut due = Vec::new();
        let Some(connection) = self.connections.get_mut(&id) else { return due };
        for end in [End::Caller, End::Called] {
            let pipe = connection.to(end);
            if pipe.closed {
                continue;
            }
            let kept = chance.index(pipe.under_way.len() + 1);
            pipe.under_way.truncate(kept);
            if let Some((_, Arrival::Bytes(bytes))) = pipe.under_way.back_mut() {
                bytes.truncate(1 + chance.index(bytes.len()));
            }
            pipe.bytes = pipe
                .under_way
                .iter()
                .map(|(_, arrival)| if let Arrival::Bytes(bytes) = arrival { bytes.len() } else { 0 })
                .sum();
            pipe.closed = true;
            let at = pipe.last.max(now + 1);
            pipe.under_way.push_back((at, Arrival::Closed));
            due.push((at, id, end));
        }
        due
    }

    /// What goes to this end is lost from now on, and nobody is told.
    pub fn half_open(&mut self, id: ConnectionId, end: End) {
        if let Some(connection) = self.connections.get_mut(&id) {
            let pipe = connection.to(end);
            pipe.swallows = true;
            pipe.under_way.clear();
            pipe.bytes = 0;
        }
    }

    /// Everything to this end comes later.
    pub fn stall(&mut self, now: Time, id: ConnectionId, end: End, by: Time) {
        if let Some(connection) = self.connections.get_mut(&id) {
            let pipe = connection.to(end);
            pipe.last = pipe.last.max(now) + by;
            pipe.under_way.iter_mut().for_each(|(at, _)| *at += by);
        }
    }

    pub fn part(&mut self, one: u64, two: u64) {
        self.parted.insert((one.min(two), one.max(two)));
    }

    pub fn join_all(&mut self) {
        self.parted.clear();
    }
}
