//! The world of one run: nodes, network, clock, and what happens next.

use towline::wire::FrameHeader;

use super::clock::{Chance, Queue, Time};
use super::network::{Arrival, ConnectionId, Due, End, Network};
use super::node::Node;
use super::oracle::Oracle;
use super::scenario::Authority;
use super::transcript::Transcript;

pub const HEARTBEAT: Time = 1000;
pub const PEER_TIMEOUT: Time = 4000;
const TICK: Time = 200;

/// One thing that happens at a time.
pub enum Happening {
    /// Something reaches an end of a connection.
    Arrive(ConnectionId, End),
    /// A node looks at its clock.
    Tick { node: u64, life: u64 },
    /// A sync has done what it could.
    Synced { node: u64, life: u64 },
    /// A node comes back.
    Restart { node: u64 },
    /// Clients write.
    Write,
    /// Whoever assigns roles looks at the nodes.
    Authority,
    /// Something breaks.
    Fault,
    /// A disk has room again.
    Room { node: u64 },
    /// Parted nodes, and nodes that the authority could not reach, are joined again.
    Join,
}

/// A defect built into a run on purpose, one for each thing that the oracle looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// A follower says that it has on stable storage what it has only received.
    AcknowledgeUnsynced,
    /// A sync is reported and nothing was saved.
    DiskLies,
    /// The leader goes on behind an LSN whatever the chain there, and the follower takes it.
    TrustChain,
    /// A record is given to the target a second time.
    ApplyTwice,
    /// A block of a base overwrites what the log has written since.
    BaseWins,
    /// An accepted epoch does not outlive the process.
    ForgetEpoch,
    /// A follower's durable mark moves back.
    ForgetMark,
    /// The longest log leads, whatever the epochs in it.
    ElectLongest,
    /// A second leader under the same epoch.
    ReuseEpoch,
    /// A follower that lost its leader asks no more.
    GiveUp,
    /// Recovery takes what a leader says it had synced for what a follower had.
    BelieveSynced,
    /// The leader takes the epoch that a follower has accepted for that of its newest record.
    TakeAcceptedEpoch,
    /// A follower's log is cut behind what it knows to be applied, though more had been when it went down.
    CutBehindApplied,
    /// What a follower acknowledges while it is being rebuilt counts.
    CountRebuilding,
    /// What a follower is about to cut counts.
    CountCut,
    /// A follower feeds others before it has caught up with its leader.
    FeedAtOnce,
}

impl Plant {
    pub const ALL: [Plant; 16] = [
        Plant::AcknowledgeUnsynced,
        Plant::DiskLies,
        Plant::TrustChain,
        Plant::ApplyTwice,
        Plant::BaseWins,
        Plant::ForgetEpoch,
        Plant::ForgetMark,
        Plant::ElectLongest,
        Plant::ReuseEpoch,
        Plant::GiveUp,
        Plant::BelieveSynced,
        Plant::TakeAcceptedEpoch,
        Plant::CutBehindApplied,
        Plant::CountRebuilding,
        Plant::CountCut,
        Plant::FeedAtOnce,
    ];
}

pub struct World {
    pub queue: Queue<Happening>,
    pub chance: Chance,
    pub network: Network,
    pub nodes: Vec<Node>,
    pub oracle: Oracle,
    pub transcript: Transcript,
    pub authority: Authority,
    pub plant: Option<Plant>,
    /// How many followers must have a record on stable storage.
    pub k: u16,
    /// Of 1000 chances to apply, how many a node lets pass.
    pub apply_lag: u64,
    /// How much longer a slow sync takes, at most.
    pub slow_disk: Time,
    /// The mean time between faults, and between writes.
    pub fault_every: Time,
    pub write_every: Time,
    /// Followers feed followers.
    pub cascades: bool,
    /// Leaders change all the time.
    pub is_restless: bool,
    /// When the last fault comes.
    pub faults_end: Time,
    /// Records written so far.
    pub written: u64,
    /// Lives begun so far, of all nodes.
    pub lives: u64,
}

impl World {
    pub fn schedule(&mut self, due: Vec<Due>) {
        for (at, connection, end) in due {
            self.queue.at(at, Happening::Arrive(connection, end));
        }
    }

    pub fn send(&mut self, connection: ConnectionId, from: End, bytes: Vec<u8>) {
        let due = self.network.send(self.queue.now, &mut self.chance, connection, from, bytes);
        self.schedule(due);
    }

    pub fn close(&mut self, connection: ConnectionId, from: End) {
        if let Some(node) = self.network.node_at(connection, from) {
            self.node(node).arrived.remove(&(connection, from));
        }
        let due = self.network.close(self.queue.now, &mut self.chance, connection, from);
        self.schedule(due);
    }

    /// Lets one thing happen. False when there is nothing left, which is never.
    pub fn step(&mut self) -> bool {
        let Some(happening) = self.queue.pop() else { return false };
        match happening {
            Happening::Arrive(connection, end) => self.arrive(connection, end),
            Happening::Tick { node, life } => {
                if self.node(node).life == life && self.node(node).up {
                    self.queue.after(TICK, Happening::Tick { node, life });
                    self.tick(node);
                }
            }
            Happening::Synced { node, life } => {
                if self.node(node).life == life && self.node(node).up {
                    self.synced(node);
                }
            }
            Happening::Restart { node } => self.restart(node),
            Happening::Write => self.write(),
            Happening::Authority => self.assign_roles(),
            Happening::Fault => self.fault(),
            Happening::Room { node } => self.node(node).disk.full = false,
            Happening::Join => {
                self.line(0, format_args!("everybody reaches everybody"));
                self.network.join_all();
                self.nodes.iter_mut().for_each(|node| node.is_cut_off = false);
            }
        }
        true
    }

    fn write(&mut self) {
        let pause = self.chance.between(1, 2 * self.write_every);
        self.queue.after(pause, Happening::Write);
        if self.queue.now > self.faults_end + 20_000 {
            return;
        }
        let leaders: Vec<u64> = self.nodes.iter().filter(|node| node.leads()).map(|node| node.id).collect();
        for leader in leaders {
            self.append(leader);
        }
    }

    fn arrive(&mut self, connection: ConnectionId, end: End) {
        let Some(id) = self.network.node_at(connection, end) else { return };
        match self.network.arrive(self.queue.now, connection, end) {
            Err(due) => self.schedule(vec![due]),
            Ok(Some(Arrival::Bytes(bytes))) if self.node(id).up => {
                self.node(id).arrived.entry((connection, end)).or_default().extend_from_slice(&bytes);
                if let Err(reason) = self.take_frames(id, connection, end) {
                    self.line(id, format_args!("ends connection {connection}: {reason}"));
                    self.end(id, connection, end);
                }
            }
            Ok(Some(Arrival::Closed)) if self.node(id).up => {
                let rest = self.node(id).arrived.remove(&(connection, end)).unwrap_or_default();
                self.line(
                    id,
                    format_args!("connection {connection} was closed, {} bytes of a frame are left", rest.len()),
                );
                match end {
                    End::Caller => self.following_gone(id, connection, &rest),
                    End::Called => self.stream_gone(id, connection),
                }
            }
            Ok(_) => {}
        }
    }

    fn end(&mut self, id: u64, connection: ConnectionId, end: End) {
        match end {
            End::Caller if self.node(id).following.connection() == Some(connection) => self.end_following(id, 500),
            End::Caller => self.close(connection, end),
            End::Called => {
                self.close(connection, end);
                self.stream_gone(id, connection);
            }
        }
    }

    /// Every frame that is whole.
    fn take_frames(&mut self, id: u64, connection: ConnectionId, end: End) -> Result<(), String> {
        loop {
            let Some(bytes) = self.node(id).arrived.get_mut(&(connection, end)) else { return Ok(()) };
            let Some(first) = bytes.first_chunk() else { return Ok(()) };
            let header = FrameHeader::decode(first).map_err(|error| error.to_string())?;
            let len = first.len() + usize::try_from(header.len).unwrap();
            if bytes.len() < len {
                return Ok(());
            }
            let rest = bytes.split_off(len);
            let frame = std::mem::replace(bytes, rest);
            match end {
                End::Caller => self.answered_with(id, connection, header.kind, &frame[16..])?,
                End::Called => self.called_with(id, connection, header.kind, &frame[16..])?,
            }
        }
    }
}
