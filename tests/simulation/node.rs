//! A node: what it has on disk, what it does by itself, and how it goes down and comes back.

use std::collections::BTreeMap;

use towline::protocol::{
    Assignment, Engine, Event, Millis, ReadinessObserved, ReplicaInfo, Role, SessionLimits, Settings,
};
use towline::target::ReplicationTarget;
use towline::wal::{KnownSynced, WrittenHere};
use towline::{Epoch, Lsn, NodeId, SessionId, ShardId};

use super::clock::Time;
use super::disk::{Disk, Manifest};
use super::follower::Following;
use super::leader::Leading;
use super::log::Log;
use super::network::{ConnectionId, End};
use super::target::Blocks;
use super::world::{Happening, Plant, World};

pub const SHARD: ShardId = ShardId(0);

pub const LIMITS: SessionLimits = SessionLimits {
    catch_up_deadline_ms: Millis(40_000),
    rebuild_deadline_ms: Millis(60_000),
    stall_budget_ms: Millis(8_000),
};

pub struct Node {
    pub id: u64,
    pub up: bool,
    /// Counts its lives: what was meant for an earlier one is void.
    pub life: u64,
    pub disk: Disk,
    pub blocks: Blocks,
    /// What it worked with when it went down, while it is down.
    pub log: Log,
    pub engine: Engine,
    /// The highest epoch accepted, as it knows; the manifest has it too.
    pub accepted: Epoch,
    pub leading: Option<Leading>,
    pub following: Following,
    /// Whom it was last told to follow, or itself: it goes on with that when it comes back.
    pub leader: Option<u64>,
    /// Bytes that are no whole frame yet.
    pub arrived: BTreeMap<(ConnectionId, End), Vec<u8>>,
    /// The head of its log when it was opened: up to there records may have been given to the target before the node
    /// last went down, and what of that had reached the disk is not known.
    pub opened_with: Lsn,
    /// Up to where the sync that runs will have saved.
    syncing: Lsn,
    /// The next sync fails.
    pub sync_fails: bool,
    /// Its disk is damaged where it was sound: recovery must say so.
    pub is_rotten: bool,
    /// When its leader last refused it for good.
    pub refused_since: Option<Time>,
    /// Whom the authority cannot reach.
    pub is_cut_off: bool,
}

impl Node {
    pub fn new(id: u64, plant: Option<Plant>) -> Node {
        let mut disk = Disk::new();
        disk.lies = plant == Some(Plant::DiskLies);
        let mut log = Log::begin_at(&mut disk, Lsn::FIRST, Epoch::ZERO);
        log.trusts_chain = plant == Some(Plant::TrustChain);
        Node {
            id,
            up: true,
            life: 0,
            disk,
            blocks: Blocks::new(plant == Some(Plant::BaseWins), id.is_multiple_of(2)),
            log,
            engine: engine(id, 0),
            accepted: Epoch::ZERO,
            leading: None,
            following: Following::default(),
            leader: None,
            arrived: BTreeMap::new(),
            opened_with: Lsn::ZERO,
            syncing: Lsn::ZERO,
            sync_fails: false,
            is_rotten: false,
            refused_since: None,
            is_cut_off: false,
        }
    }

    /// What it knows to be on stable storage when it comes back.
    pub fn known_synced(&self) -> KnownSynced {
        let lsn = if self.blocks.is_incomplete() { Lsn::ZERO } else { self.blocks.saved() };
        let Manifest { epoch, own_epoch, .. } = self.disk.manifest;
        KnownSynced { lsn, written_here: if own_epoch { WrittenHere::Epoch(epoch) } else { WrittenHere::Nothing } }
    }

    pub fn leads(&self) -> bool {
        self.leading.as_ref().is_some_and(|leading| !leading.is_relay)
    }

    /// Whether it can speak for everything that it ever acknowledged.
    pub fn is_whole(&self) -> bool {
        let state_without_log = self.log.record_epoch().is_none() && self.blocks.applied() > Lsn::ZERO;
        !self.disk.manifest.recovering && !self.blocks.is_incomplete() && !state_without_log
    }
}

fn engine(node: u64, lives: u64) -> Engine {
    let first_session = SessionId(1 + (lives << 24));
    Engine::new(Settings { shard: SHARD, node: NodeId(node), first_session, limits: LIMITS })
}

impl World {
    pub fn node(&mut self, id: u64) -> &mut Node {
        &mut self.nodes[usize::try_from(id - 1).unwrap()]
    }

    pub fn line(&mut self, node: u64, text: std::fmt::Arguments<'_>) {
        self.transcript.line(self.queue.now, node, text);
    }

    /// An epoch is accepted for good before anything is done under it.
    pub fn accept_epoch(&mut self, id: u64, epoch: Epoch) {
        let forgets = self.plant == Some(Plant::ForgetEpoch);
        let node = self.node(id);
        node.accepted = node.accepted.max(epoch);
        if !forgets && node.disk.manifest.epoch < node.accepted {
            (node.disk.manifest.epoch, node.disk.manifest.own_epoch) = (node.accepted, false);
        }
    }

    /// What the authority says, once the epoch is accepted: who leads, and whether this node is it.
    pub fn assign(&mut self, id: u64, epoch: Epoch, leader: Option<u64>) {
        let others: Vec<u64> = self.nodes.iter().map(|node| node.id).filter(|other| *other != id).collect();
        self.end_following(id, 0);
        if self.node(id).leading.is_some() {
            self.end_all_streams(id);
        }
        let node = self.node(id);
        node.leader = leader;
        node.leading = None;
        node.refused_since = None;
        let leads = leader == Some(id);
        node.log.step_down();
        if leads {
            // Its own log is safe before it is the log of an epoch.
            node.disk.sync_now();
            node.log.synced = node.log.head();
            node.log.epoch = epoch;
            node.disk.manifest.own_epoch = node.disk.manifest.epoch == epoch;
            node.leading = Some(Leading::new(epoch, node.log.head(), &others));
        }
        self.line(id, format_args!("assigned epoch={epoch} leader={leader:?}"));
        if leads || !self.cascades {
            let replicas = if leads { others } else { Vec::new() };
            self.take_role(id, epoch, if leads { Role::Leader } else { Role::Follower }, &replicas);
        } else {
            self.relay_under(id, epoch);
        }
    }

    /// A follower that others may follow takes on an epoch: what it serves begins anew.
    pub fn relay_under(&mut self, id: u64, epoch: Epoch) {
        let others: Vec<u64> = self.nodes.iter().map(|node| node.id).filter(|other| *other != id).collect();
        self.end_all_streams(id);
        let mut relay = Leading::relay(epoch);
        relay.caught_up = self.plant == Some(Plant::FeedAtOnce);
        self.node(id).leading = Some(relay);
        self.take_role(id, epoch, Role::Follower, &others);
    }

    fn take_role(&mut self, id: u64, epoch: Epoch, role: Role, replicas: &[u64]) {
        let (k, leads) = (self.k, role == Role::Leader);
        let replicas =
            replicas.iter().map(|other| ReplicaInfo { node: NodeId(*other), endpoint: String::new() }).collect();
        let assignment = Assignment { epoch, role, replicas, commit_followers: k };
        self.apply(id, Event::AssignmentDelivered(assignment));
        let ready = ReadinessObserved {
            epoch,
            role_applied: Some(true),
            receiver_ready: Some(!leads),
            shipper_configured: Some(leads),
            shipper_connected: Some(false),
        };
        self.apply(id, Event::ReadinessObserved(ready));
    }

    // What it does by itself ------------------------------------------------------------------------------------------

    pub fn tick(&mut self, id: u64) {
        self.apply_log(id);
        if self.chance.per_mille(150) {
            let _ = self.node(id).blocks.sync(SHARD);
        }
        if self.chance.per_mille(200) {
            self.retain(id);
        }
        self.tick_leading(id);
        self.tick_following(id);
        self.start_sync(id);
    }

    /// Offers the target what is durable and not applied, batch by batch.
    pub fn apply_log(&mut self, id: u64) {
        // Not for ever: of many seeds, one would have its target lag at each of a thousand looks.
        let lags = self.chance.below(1000) < self.apply_lag && self.queue.now < self.faults_end + 60_000;
        let twice = self.plant == Some(Plant::ApplyTwice) && self.chance.per_mille(10);
        let World { nodes, oracle, .. } = self;
        let node = &mut nodes[usize::try_from(id - 1).unwrap()];
        if !node.up || lags {
            return;
        }
        let mut failure = None;
        loop {
            let mut applied = node.blocks.applied();
            if let Some(session) = &node.following.rebuild() {
                if !session.takes_log() {
                    break;
                }
                applied = session.progress().applied;
            } else if node.blocks.is_incomplete() {
                break;
            }
            let Some(mark) = node.log.batch_after(applied).filter(|mark| mark.lsn() <= node.log.synced) else { break };
            let batch = node.log.batch(&node.disk, &mark);
            let result = match node.following.rebuild_mut() {
                Some(session) => session.apply_log_entry(&batch),
                None => node.blocks.apply_batch(SHARD, &batch),
            };
            if twice {
                let _ = node.blocks.apply_batch(SHARD, &batch);
            }
            oracle.offered(id, &node.blocks.take_offered());
            if let Err(error) = result {
                failure = Some(error.to_string());
                break;
            }
        }
        if !node.blocks.is_incomplete() {
            oracle.stands(id, &node.log, node.blocks.applied(), &node.blocks.state());
        }
        if let Some(failure) = failure {
            self.line(id, format_args!("applying failed: {failure}"));
            self.end_following(id, 1000);
        }
    }

    fn retain(&mut self, id: u64) {
        let node = self.node(id);
        let unneeded = node.leading.as_ref().map_or(Lsn::ZERO, Leading::unneeded);
        let applied = if node.blocks.is_incomplete() { Lsn::ZERO } else { node.blocks.saved() };
        let released = node.log.release(&mut node.disk, unneeded, applied);
        if let Some(through) = released {
            self.line(id, format_args!("gave up its log through {through}"));
            self.places_lost(id, through);
        }
    }

    pub fn start_sync(&mut self, id: u64) {
        let slow = self.slow_disk;
        let takes =
            if self.chance.per_mille(20) { self.chance.between(100, 100 + slow) } else { self.chance.between(1, 20) };
        let node = self.node(id);
        if node.disk.is_syncing() || node.log.synced >= node.log.head() {
            return;
        }
        node.disk.begin_sync();
        node.syncing = node.log.head();
        let life = node.life;
        self.queue.after(takes, Happening::Synced { node: id, life });
    }

    pub fn synced(&mut self, id: u64) {
        let node = self.node(id);
        if !node.disk.is_syncing() {
            return;
        }
        if std::mem::take(&mut node.sync_fails) {
            self.line(id, format_args!("a sync fails: the node stops"));
            self.queue.after(2000, Happening::Restart { node: id });
            return self.crash(id, 500);
        }
        node.disk.end_sync();
        node.log.synced = node.log.synced.max(node.syncing.min(node.log.head()));
        self.apply_log(id);
        self.acknowledge(id);
        self.pump_all(id);
    }

    // Down and up -----------------------------------------------------------------------------------------------------

    /// The node goes down; of 1000 unsynced sectors `survives` are on the disk all the same.
    pub fn crash(&mut self, id: u64, survives: u64) {
        self.line(id, format_args!("goes down, {survives} of 1000 unsynced sectors survive"));
        self.oracle.crashes += 1;
        let silent = self.chance.per_mille(300);
        let ends = self.network.ends_of(id);
        for (connection, end) in ends {
            if silent {
                // A host that vanished tells nobody.
                self.network.half_open(connection, end.other());
            }
            self.close(connection, end);
        }
        let mut chance = self.chance.clone();
        self.chance.next();
        let node = self.node(id);
        node.up = false;
        node.life += 1;
        node.leading = None;
        node.following = Following::default();
        node.arrived.clear();
        node.sync_fails = false;
        node.disk.lose_power(&mut chance, survives);
        node.blocks.lose_power(&mut chance);
    }

    pub fn restart(&mut self, id: u64) {
        let stop_after = if self.chance.per_mille(100) { self.chance.index(4) + 1 } else { usize::MAX };
        self.lives += 1;
        let lives = self.lives;
        let mut chance = self.chance.clone();
        self.chance.next();
        let World { nodes, oracle, plant, .. } = self;
        let node = &mut nodes[usize::try_from(id - 1).unwrap()];
        let synced = node.log.synced;
        let mut known = node.known_synced();
        if *plant == Some(Plant::BelieveSynced) {
            known.written_here = WrittenHere::Everything;
        }
        // A log that a rebuild began anew may have been lost as a whole: its target knows.
        let incomplete = node.blocks.is_incomplete();
        let text = match Log::open(&mut node.disk, known, stop_after) {
            Ok(None) => {
                node.disk.lose_power(&mut chance, 500);
                self.queue.after(1000, Happening::Restart { node: id });
                return self.line(id, format_args!("goes down again in the middle of recovery"));
            }
            Ok(Some((log, cut))) => {
                if log.head() < synced && !incomplete {
                    oracle.violated(format!(
                        "node {id} had LSN {synced} on stable storage, and its log ends at {}",
                        log.head()
                    ));
                }
                node.log = log.planted_as(&node.log);
                oracle.has(id, &node.log, &node.disk, 0);
                format!("comes back with {} to {}, {cut} bytes cut", node.log.tail(), node.log.head())
            }
            Err(reason) => {
                if !node.is_rotten {
                    oracle.violated(format!("node {id} has a sound disk, and its log is refused: {reason}"));
                }
                wipe(node, *plant);
                format!("is damaged, and gets an empty disk: {reason}")
            }
        };
        node.is_rotten = false;
        node.up = true;
        // Only what was on stable storage in the log was given to the target.
        node.opened_with = node.log.head();
        if node.disk.manifest.epoch < node.accepted {
            oracle.violated(format!(
                "node {id} accepted epoch {}, and comes back with {}",
                node.accepted, node.disk.manifest.epoch
            ));
        }
        node.accepted = node.disk.manifest.epoch;
        node.engine = engine(id, lives);
        node.refused_since = None;
        let (accepted, follows) = (node.accepted, node.leader.is_some_and(|leader| leader != id));
        oracle.begins(id, node.blocks.applied());
        self.line(id, format_args!("{text}"));
        if self.cascades && follows && accepted > Epoch::ZERO {
            self.relay_under(id, accepted);
        }
        let life = self.node(id).life;
        let first = self.chance.between(1, 200);
        self.queue.after(first, Happening::Tick { node: id, life });
    }

    /// An operator gives the node an empty disk: what it had is nowhere needed.
    pub fn replace_disk(&mut self, id: u64) {
        self.line(id, format_args!("gets an empty disk"));
        self.crash(id, 1000);
        let plant = self.plant;
        wipe(self.node(id), plant);
        self.queue.after(1000, Happening::Restart { node: id });
    }
}

fn wipe(node: &mut Node, plant: Option<Plant>) {
    node.disk.replace();
    node.blocks = Blocks::new(plant == Some(Plant::BaseWins), node.id.is_multiple_of(2));
    node.log = Log::begin_at(&mut node.disk, Lsn::FIRST, Epoch::ZERO).planted_as(&node.log);
}
