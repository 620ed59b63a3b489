//! What a seed makes of a run: how many nodes, how slow, what breaks when; and the authority that says who leads.
//!
//! # The authority
//!
//! It stands for whoever operates the nodes, and does what such a one must do for nothing acknowledged to be lost. With
//! n nodes, of which k followers must have a record for it to be acknowledged:
//!
//! 1. it has every node that it reaches accept the next epoch for good, save what it has, and say where it stands;
//! 2. it goes on when n - k + 1 nodes did that which can speak for all they ever acknowledged (a node that is being
//!    rebuilt cannot), or when all n did and one of them can;
//! 3. the one with the newest epoch in its newest record leads, and among those the one with the longest log.
//!
//! It gives an empty disk to a follower that its leader refuses for good, once everything is on the leader's disk.

use std::panic::AssertUnwindSafe;

use towline::protocol::{Phase, SessionKind};
use towline::{AckLevel, Epoch};

use super::clock::{Chance, Queue, Time};
use super::network::{End, Network};
use super::node::Node;
use super::oracle::Oracle;
use super::transcript::Transcript;
use super::world::{Happening, Plant, World};

/// How long everything may take to come together when nothing breaks any more.
const CALM: Time = 300_000;

#[derive(Default)]
pub struct Authority {
    epoch: Epoch,
    leader: Option<u64>,
    /// The life of the leader that was made one: it does not lead in another.
    life: u64,
    missed_since: Option<Time>,
    wants_another: bool,
}

/// How a run ended.
pub struct Ended {
    pub violation: Option<String>,
    pub transcript: Vec<String>,
    pub simulated: Time,
    pub acknowledged: u64,
    pub compact: u64,
    pub rebuilds: u64,
    pub cuts: u64,
    pub elections: u64,
    pub crashes: u64,
}

/// Runs one seed: `seconds` with faults, then until everything has come together.
pub fn run(seed: u64, seconds: u64, plant: Option<Plant>, keep_transcript: bool) -> Ended {
    let mut world = World::new(seed, seconds, plant, keep_transcript);
    let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| world.run())).err();
    if let Some(panic) = panicked {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default();
        world.oracle.violated(format!("it panicked: {text}"));
    }
    let World { oracle, transcript, queue, .. } = world;
    Ended {
        violation: oracle.violation,
        transcript: transcript.lines,
        simulated: queue.now,
        acknowledged: oracle.acknowledged_count,
        compact: oracle.compact,
        rebuilds: oracle.rebuilds,
        cuts: oracle.cuts,
        elections: oracle.elections,
        crashes: oracle.crashes,
    }
}

impl World {
    fn new(seed: u64, seconds: u64, plant: Option<Plant>, keep_transcript: bool) -> World {
        let mut chance = Chance::new(seed);
        let count = chance.between(2, 5);
        let mut network = Network::new();
        network.delay = [2, 10, 50, 400][chance.index(4)];
        let mut world = World {
            queue: Queue::new(),
            network,
            nodes: (1..=count).map(|id| Node::new(id, plant)).collect(),
            oracle: Oracle::new(),
            transcript: Transcript::new(keep_transcript),
            authority: Authority::default(),
            plant,
            k: u16::try_from(chance.between(1, count - 1)).unwrap(),
            apply_lag: [0, 300, 900, 990][chance.index(4)],
            slow_disk: [100, 1000, 5000][chance.index(3)],
            fault_every: [500, 2000, 6000, 15_000][chance.index(4)],
            write_every: [100, 300, 1000][chance.index(3)],
            cascades: false,
            is_restless: chance.per_mille(200),
            faults_end: seconds * 1000,
            written: 0,
            lives: 0,
            chance,
        };
        // Drawn by itself, so that all other runs stay what they were.
        let drawn = Chance::new(seed ^ 0xca5c_ade0).per_mille(350);
        world.cascades = count >= 3 && (drawn && plant.is_none() || plant == Some(Plant::FeedAtOnce));
        match plant {
            Some(Plant::ElectLongest) if count >= 4 => {
                // It takes several leaders in the wrong order to do harm.
                (world.k, world.is_restless) = (u16::try_from(count - 2).unwrap(), true);
                (world.fault_every, world.write_every) = (700, 1500);
            }
            Some(Plant::TakeAcceptedEpoch | Plant::FeedAtOnce) => world.is_restless = true,
            _ => {}
        }
        let (k, delay) = (world.k, world.network.delay);
        let cascades = world.cascades;
        world.line(
            0,
            format_args!(
                "seed {seed}: {count} nodes, durable on {k}, delay {delay} ms, cascades {cascades}, plant {plant:?}"
            ),
        );
        for id in 1..=count {
            world.queue.after(id, Happening::Tick { node: id, life: 0 });
        }
        world.queue.after(0, Happening::Authority);
        world.queue.after(10, Happening::Write);
        world.queue.after(2000, Happening::Fault);
        world
    }

    fn run(&mut self) {
        let mut look_at = self.faults_end + 21_000;
        while self.oracle.violation.is_none() && self.step() {
            if self.queue.now < look_at {
                continue;
            }
            look_at = self.queue.now + 1000;
            match self.differs() {
                None if self.cascades => self.end_cascades(),
                None => return self.check_end(),
                Some(what) if self.queue.now > self.faults_end + CALM => {
                    self.oracle.violated(format!("nothing breaks any more, and it does not come together: {what}"));
                }
                Some(_) => {}
            }
        }
    }

    /// What is still missing for everything to be well.
    fn differs(&mut self) -> Option<String> {
        let down = self.nodes.iter().find(|node| !node.up).map(|node| format!("node {} is down", node.id));
        let leading = |node: &&Node| node.leads() && node.accepted == self.authority.epoch;
        let leader = self.nodes.iter().find(leading);
        let (None, Some(leader)) = (&down, leader) else { return Some(down.unwrap_or("nobody leads".to_owned())) };
        let (head, chain) = (leader.log.head(), leader.log.chain);
        for node in &self.nodes {
            let (received, applied) = (node.log.head(), node.blocks.applied());
            if (received, node.log.chain) != (head, chain) || applied != head || !node.is_whole() {
                return Some(format!(
                    "node {} stands at {received} ({:08x}), applied {applied}, whole {}; its leader at {head} ({:08x})",
                    node.id,
                    node.log.chain.0,
                    node.is_whole(),
                    chain.0
                ));
            }
        }
        if self.cascades {
            // Whom others feed, the leader does not see.
            return None;
        }
        let projection = leader.engine.projection();
        let keeps_up = projection.replicas.iter().all(|replica| {
            (replica.kind, replica.phase) == (Some(SessionKind::KeepUp), Phase::Running)
                && replica.facts.durable == head
        });
        if !keeps_up || leader.engine.durable() != head {
            return Some(format!("the leader sees {projection}"));
        }
        let count = usize::from(self.k);
        let reached = leader.leading.as_ref().map(|leading| leading.commits.reached(AckLevel::Durable, count));
        (reached != Some(head)).then(|| format!("{reached:?} is committed, of a log up to {head}"))
    }

    /// Everything has come through every link; now everybody is to be seen by the leader.
    fn end_cascades(&mut self) {
        self.cascades = false;
        self.line(0, format_args!("everybody follows the leader"));
        for id in 1..=self.nodes.len() as u64 {
            if !self.node(id).leads() {
                self.end_all_streams(id);
                self.node(id).leading = None;
                self.end_following(id, 100);
            }
        }
    }

    fn check_end(&mut self) {
        let World { nodes, oracle, .. } = self;
        for node in nodes {
            oracle.has(node.id, &node.log, &node.disk, 0);
            oracle.holds_acknowledged(node.id, &node.log);
            oracle.stands(node.id, &node.log, node.blocks.applied(), &node.blocks.state());
        }
        self.line(0, format_args!("everything has come together"));
    }

    // Who leads -------------------------------------------------------------------------------------------------------

    pub fn assign_roles(&mut self) {
        self.queue.after(1000, Happening::Authority);
        let now = self.queue.now;
        let Authority { epoch, leader, life, .. } = self.authority;
        let reached: Vec<u64> =
            self.nodes.iter().filter(|node| node.up && !node.is_cut_off).map(|node| node.id).collect();
        let stands = leader.is_some_and(|leader| reached.contains(&leader) && self.node(leader).life == life);
        let missed_since = if stands { None } else { self.authority.missed_since.or(Some(now)) };
        self.authority.missed_since = missed_since;
        let is_missed = missed_since.is_some_and(|since| leader.is_none() || since + 3000 <= now);
        if (is_missed || self.authority.wants_another) && self.elect(&reached) {
            return;
        }
        for id in reached {
            let node = self.node(id);
            if Some(id) != leader
                && leader.is_some()
                && (node.leader != leader || node.accepted < epoch || node.leads())
            {
                self.accept_epoch(id, epoch);
                self.assign(id, epoch, leader);
            }
        }
        if let (true, Some(leader)) = (stands, leader) {
            self.replace_refused(leader);
        }
    }

    fn elect(&mut self, reached: &[u64]) -> bool {
        let (count, k) = (self.nodes.len(), usize::from(self.k));
        let whole: Vec<u64> = reached.iter().copied().filter(|id| self.node(*id).is_whole()).collect();
        if whole.len() < count - k + 1 && (reached.len() < count || whole.is_empty()) {
            return false;
        }
        let Authority { epoch, leader: before, .. } = self.authority;
        let is_reused = self.plant == Some(Plant::ReuseEpoch) && self.chance.per_mille(500) && epoch > Epoch::ZERO;
        let epoch = if is_reused { epoch } else { Epoch(epoch.0 + 1) };
        for id in reached.iter().copied() {
            self.accept_epoch(id, epoch);
            let node = self.node(id);
            node.disk.sync_now();
            node.log.synced = node.log.head();
        }
        let by_length = self.plant == Some(Plant::ElectLongest);
        let standing = |world: &mut World, id: u64| {
            let node = world.node(id);
            let newest = if by_length { None } else { node.log.record_epoch() };
            (newest, node.log.head())
        };
        let Some(best) = whole.iter().map(|id| standing(self, *id)).max() else { return false };
        let best: Vec<u64> = whole.into_iter().filter(|id| standing(self, *id) == best).collect();
        let others: Vec<u64> = best.iter().copied().filter(|id| Some(*id) != before).collect();
        let from = if others.is_empty() { &best } else { &others };
        let leader = from[self.chance.index(from.len())];
        let life = self.node(leader).life;
        self.line(0, format_args!("node {leader} is to lead under epoch {epoch}"));
        self.oracle.elections += 1;
        self.authority = Authority { epoch, leader: Some(leader), life, missed_since: None, wants_another: false };
        for id in reached.iter().copied() {
            self.assign(id, epoch, Some(leader));
        }
        let World { nodes, oracle, .. } = self;
        oracle.holds_acknowledged(leader, &nodes[usize::try_from(leader - 1).unwrap()].log);
        true
    }

    fn replace_refused(&mut self, leader: u64) {
        let now = self.queue.now;
        let is_refused = |node: &&Node| {
            node.up && node.leader == Some(leader) && node.refused_since.is_some_and(|since| since + 12_000 < now)
        };
        let Some(refused) = self.nodes.iter().find(is_refused).map(|node| node.id) else { return };
        let node = self.node(leader);
        node.disk.sync_now();
        node.log.synced = node.log.head();
        self.replace_disk(refused);
    }

    // What breaks -----------------------------------------------------------------------------------------------------

    pub fn fault(&mut self) {
        if self.queue.now > self.faults_end {
            self.queue.after(0, Happening::Join);
            for id in 1..=self.nodes.len() as u64 {
                self.queue.after(0, Happening::Room { node: id });
            }
            return;
        }
        let pause = self.chance.between(1, 2 * self.fault_every);
        self.queue.after(pause, Happening::Fault);
        let count = self.nodes.len();
        let id = 1 + self.chance.below(count as u64);
        let lasts = self.chance.between(500, 15_000);
        let kind =
            if self.is_restless { [0, 0, 0, 8, 9, 9, 10, 10, 12][self.chance.index(9)] } else { self.chance.below(16) };
        match kind {
            0..4 if self.node(id).up => {
                let survives = [0, 300, 500, 900, 1000][self.chance.index(5)];
                let rots = self.may_rot(id) && self.chance.per_mille(300);
                let mut chance = self.chance.clone();
                let node = self.node(id);
                let bit = node.log.bit_to_rot(node.known_synced(), &mut chance).filter(|_| rots);
                self.crash(id, survives);
                if let Some((segment, bit)) = bit {
                    self.line(id, format_args!("bit {bit} of {segment} rots"));
                    self.node(id).disk.rot(segment, bit);
                    self.node(id).is_rotten = true;
                }
                let away = if self.chance.per_mille(700) { self.chance.between(100, 4000) } else { lasts };
                self.queue.after(away, Happening::Restart { node: id });
            }
            4 if self.node(id).up => self.node(id).sync_fails = true,
            5 => {
                self.line(id, format_args!("the disk is full"));
                self.node(id).disk.full = true;
                self.queue.after(lasts, Happening::Room { node: id });
            }
            6..8 => {
                let other = 1 + self.chance.below(count as u64);
                self.line(0, format_args!("nodes {id} and {other} are parted"));
                self.network.part(id, other);
                self.queue.after(lasts, Happening::Join);
            }
            8 => {
                self.line(0, format_args!("node {id} is parted from all"));
                (1..=count as u64).filter(|other| *other != id).for_each(|other| self.network.part(id, other));
                self.node(id).is_cut_off = true;
                self.queue.after(lasts, Happening::Join);
            }
            9 => {
                self.line(0, format_args!("the authority does not reach node {id}"));
                self.node(id).is_cut_off = true;
                self.queue.after(lasts, Happening::Join);
            }
            10 => {
                self.line(0, format_args!("another node is to lead"));
                self.authority.wants_another = true;
            }
            11 => {
                self.line(0, format_args!("every connection is cut"));
                for connection in self.network.live() {
                    let due = self.network.cut(self.queue.now, &mut self.chance, connection);
                    self.schedule(due);
                }
            }
            _ => self.break_connection(),
        }
    }

    /// What rots must not be the last copy: others have what the node has, and it is not the one from whom they are
    /// about to be rebuilt.
    fn may_rot(&mut self, id: u64) -> bool {
        let all_are_whole = self.nodes.iter().all(|node| node.is_whole() && !node.is_rotten);
        let leads = self.node(id).leads() || self.authority.leader == Some(id);
        self.k >= 2 && all_are_whole && !leads
    }

    fn break_connection(&mut self) {
        let live = self.network.live();
        let Some(&connection) = live.get(self.chance.index(live.len().max(1))) else { return };
        let end = if self.chance.per_mille(500) { End::Caller } else { End::Called };
        match self.chance.below(4) {
            0 => {
                self.line(0, format_args!("connection {connection} is half open"));
                self.network.half_open(connection, end);
            }
            1 => {
                let by = self.chance.between(100, 10_000);
                self.line(0, format_args!("connection {connection} stalls for {by} ms"));
                self.network.stall(self.queue.now, connection, end, by);
            }
            _ => {
                self.line(0, format_args!("connection {connection} is cut"));
                let due = self.network.cut(self.queue.now, &mut self.chance, connection);
                self.schedule(due);
            }
        }
    }
}
