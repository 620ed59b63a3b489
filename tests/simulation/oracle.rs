//! The oracle: knows everything that was ever written or acknowledged, and what must be true of it.
//!
//! Every batch that a leader writes is a node in a tree of histories, named by the LSN and the chain after it; with it
//! stands the state that a target has after it. What the nodes then do is compared with the tree.

use std::collections::{BTreeMap, HashMap};

use towline::{Chain, Epoch, Lsn};

use super::disk::Disk;
use super::log::{Log, Mark, genesis};
use super::target::{State, apply_to};

type Place = (Lsn, Chain);

struct Written {
    before: Place,
    /// Of the batch's bytes, by another function than the chain's.
    hash: u64,
    state: State,
}

/// What a node has shown of itself since it began, was cut or was rebuilt.
#[derive(Default, Clone, Copy)]
struct Shown {
    received: Lsn,
    durable: Lsn,
    applied: Lsn,
}

pub struct Oracle {
    written: HashMap<Place, Written>,
    /// The last LSN of each acknowledged batch, with the chain after it.
    acknowledged: BTreeMap<Lsn, Chain>,
    acknowledgers: BTreeMap<Epoch, u64>,
    /// Who has had each batch on stable storage, and could say so: a bit a node.
    kept: HashMap<Place, u64>,
    /// Up to where a node's log has been replaced by the state that it led to.
    based: BTreeMap<u64, Lsn>,
    shown: BTreeMap<u64, Shown>,
    /// The last record that each target was offered.
    offered: BTreeMap<u64, Lsn>,
    /// The first thing that was not as it must be.
    pub violation: Option<String>,
    pub acknowledged_count: u64,
    /// Compact batches that leaders wrote.
    pub compact: u64,
    pub rebuilds: u64,
    pub cuts: u64,
    pub elections: u64,
    pub crashes: u64,
}

impl Oracle {
    pub fn new() -> Oracle {
        let root = Written { before: (Lsn::ZERO, genesis()), hash: 0, state: State::default() };
        Oracle {
            written: HashMap::from([((Lsn::ZERO, genesis()), root)]),
            acknowledged: BTreeMap::new(),
            acknowledgers: BTreeMap::new(),
            kept: HashMap::new(),
            based: BTreeMap::new(),
            shown: BTreeMap::new(),
            offered: BTreeMap::new(),
            violation: None,
            acknowledged_count: 0,
            compact: 0,
            rebuilds: 0,
            cuts: 0,
            elections: 0,
            crashes: 0,
        }
    }

    pub fn violated(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// A leader wrote what stands behind `before` in its log.
    pub fn wrote(&mut self, node: u64, log: &Log, disk: &Disk, from: usize) {
        for (before, mark) in steps(log, from) {
            let bytes = log.batch_bytes(disk, &mark);
            let Some(mut state) = self.written.get(&before).map(|written| written.state) else {
                return self.violated(format!("node {node} writes behind {before:?}, where no log ever stood"));
            };
            self.compact += u64::from(mark.header.is_compact());
            for record in log.batch(disk, &mark).records() {
                apply_to(&mut state, record);
            }
            self.written.insert((mark.lsn(), mark.chain()), Written { before, hash: hash(bytes), state });
        }
    }

    /// A node has these batches in its log: somebody wrote them, there and so.
    pub fn has(&mut self, node: u64, log: &Log, disk: &Disk, from: usize) {
        for (before, mark) in steps(log, from) {
            let place = (mark.lsn(), mark.chain());
            let Some(written) = self.written.get(&place) else {
                return self.violated(format!("node {node} has a batch at {place:?} that nobody wrote"));
            };
            if written.before != before || written.hash != hash(log.batch_bytes(disk, &mark)) {
                return self
                    .violated(format!("node {node} has another log at {place:?} than its writer, behind {before:?}"));
            }
        }
    }

    /// A node that is not being rebuilt has all this on stable storage, and is about to say where it stands.
    pub fn keeps(&mut self, node: u64, log: &Log) {
        let based = self.based.entry(node).or_default();
        *based = (*based).max(log.origin().0);
        for mark in log.marks.iter().rev().filter(|mark| mark.lsn() <= log.synced) {
            let nodes = self.kept.entry((mark.lsn(), mark.chain())).or_default();
            if *nodes & (1 << node) != 0 {
                return;
            }
            *nodes |= 1 << node;
        }
    }

    /// How many others have had it on stable storage.
    fn keepers(&self, node: u64, mark: &Mark) -> usize {
        let nodes = self.kept.get(&(mark.lsn(), mark.chain())).copied().unwrap_or_default();
        let based = |other: u64| self.based.get(&other).is_some_and(|based| *based >= mark.lsn());
        (0..u64::from(u64::BITS)).filter(|&other| other != node && (nodes & (1 << other) != 0 || based(other))).count()
    }

    /// A node is told that these batches of its log are committed, durable on `k` others, and tells its client.
    pub fn acknowledge(&mut self, node: u64, epoch: Epoch, k: u16, marks: &[Mark]) {
        let other = *self.acknowledgers.entry(epoch).or_insert(node);
        if other != node {
            return self.violated(format!("nodes {other} and {node} both commit under epoch {epoch}"));
        }
        for mark in marks.iter().filter(|mark| mark.header.record_count > 0) {
            self.acknowledged_count += 1;
            let keepers = self.keepers(node, mark);
            if keepers < usize::from(k) {
                return self.violated(format!(
                    "LSN {} is acknowledged by node {node}, and {keepers} of {k} followers have it on stable storage",
                    mark.lsn()
                ));
            }
            let chain = *self.acknowledged.entry(mark.lsn()).or_insert(mark.chain());
            if chain != mark.chain() {
                return self.violated(format!(
                    "LSN {} was acknowledged with chain {:08x}, and node {node} has {:08x} there and acknowledges it",
                    mark.lsn(),
                    chain.0,
                    mark.chain().0
                ));
            }
        }
    }

    /// A node is about to cut its log behind an LSN: what was acknowledged is the log of every leader since, so no node
    /// gives that up.
    pub fn is_cut(&mut self, node: u64, log: &Log, behind: Lsn) {
        let mut given_up = self.acknowledged.range(behind.next()..);
        if let Some((lsn, _)) = given_up.find(|(lsn, chain)| log.place_after(**lsn, **chain).is_some()) {
            self.violated(format!("node {node} cuts its log behind LSN {behind}, and LSN {lsn} was acknowledged"));
        }
    }

    /// A node's rebuild is complete: it passes for one that has all that it ever acknowledged.
    pub fn is_rebuilt(&mut self, node: u64, achieved: Lsn) {
        let kept = |place: Place| self.kept.get(&place).is_some_and(|nodes| nodes & (1 << node) != 0);
        let mut missing = self.acknowledged.range(achieved.next()..);
        if let Some((lsn, _)) = missing.find(|(lsn, chain)| kept((**lsn, **chain))) {
            self.violated(format!(
                "node {node} is rebuilt at LSN {achieved}, and had LSN {lsn}, which was acknowledged"
            ));
        }
    }

    /// Nothing acknowledged is missing in a log that is to be the log.
    pub fn holds_acknowledged(&mut self, node: u64, log: &Log) {
        let (origin, _) = log.origin();
        let missing =
            self.acknowledged.range(origin.next()..).find(|(lsn, chain)| log.place_after(**lsn, **chain).is_none());
        if let Some((lsn, chain)) = missing {
            self.violated(format!(
                "LSN {lsn} (chain {:08x}) was acknowledged and is not in the log of node {node}, which ends at {}",
                chain.0,
                log.head()
            ));
        }
        let newest = self.acknowledged.last_key_value().map_or(Lsn::ZERO, |(lsn, _)| *lsn);
        if origin > Lsn::ZERO && newest > log.head() {
            self.violated(format!("LSN {newest} was acknowledged, and the log of node {node} ends at {}", log.head()));
        }
    }

    pub fn shows(&mut self, node: u64, received: Lsn, durable: Lsn, applied: Lsn) {
        let before = *self.shown.entry(node).or_default();
        if received < before.received || durable < before.durable || applied < before.applied {
            self.violated(format!(
                "marks of node {node} moved back: received {} to {received}, durable {} to {durable}, applied {} to {applied}",
                before.received, before.durable, before.applied
            ));
        }
        self.shown.insert(node, Shown { received, durable, applied });
    }

    /// A node begins anew with its marks: it was down, or cut, or is rebuilt. Its target goes on after `applied`.
    pub fn begins(&mut self, node: u64, applied: Lsn) {
        self.shown.remove(&node);
        self.offered.insert(node, applied);
    }

    pub fn offered(&mut self, node: u64, lsns: &[Lsn]) {
        for &lsn in lsns {
            let before = self.offered.insert(node, lsn).unwrap_or_default();
            if lsn != before.next() {
                return self.violated(format!("node {node} applies LSN {lsn} behind LSN {before}"));
            }
        }
    }

    /// A target that has applied its log up to there must be in the state of that log.
    pub fn stands(&mut self, node: u64, log: &Log, applied: Lsn, state: &State) {
        let mark = log.marks.iter().rev().find(|mark| mark.lsn() == applied);
        let place = mark.map_or(log.origin(), |mark| (mark.lsn(), mark.chain()));
        if place.0 != applied || state.iter().any(|(version, _)| *version > applied) {
            // Behind the log's beginning, or a crash left blocks that are newer: nothing that ever was, nor is it
            // served.
            return;
        }
        match self.written.get(&place) {
            Some(written) if written.state == *state => {}
            Some(_) => self.violated(format!("the target of node {node} is not in the state of its log at {place:?}")),
            None => self.violated(format!("node {node} stands at {place:?}, where no log ever stood")),
        }
    }
}

/// The batches of a log from an index on, each with the place before it.
fn steps(log: &Log, from: usize) -> Vec<(Place, Mark)> {
    let mut before = from.checked_sub(1).map_or(log.origin(), |at| (log.marks[at].lsn(), log.marks[at].chain()));
    let mut steps = Vec::new();
    for mark in &log.marks[from..] {
        steps.push((before, *mark));
        before = (mark.lsn(), mark.chain());
    }
    steps
}

fn hash(bytes: &[u8]) -> u64 {
    let words = bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    words.fold(bytes.len() as u64, |hash, word| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
}
