//! Many nodes in one thread, with a clock, a network and disks that are made up, and decisions that are not.
//!
//! # What is real
//!
//! The protocol engine, the rebuild session with its bitmap, the wire codec, batches and segment headers, what recovery
//! makes of the bytes on a disk, what retention gives up, where two logs part, and the rule by which acknowledgements
//! make a record committed. They are called as the crate itself calls them; what sits behind files and threads comes
//! through `towline::seams`. Written for the simulation are the threads' part: moving bytes (`log`, `leader`,
//! `follower`), the disk, the network, and the authority that says who leads (`scenario`).
//!
//! In a third of the runs with three nodes or more, followers feed followers: each asks the leader or one with a lower
//! number, as it comes. Not modelled: several shards of a node, which share nothing but its manifest and its threads;
//! commits at the received and the applied level; a log that gives up what is not synced (`crash_images`
//! does that on real files).
//!
//! # What a run is
//!
//! One seed is one run, and always the same: two to five nodes, of which any number must have a record for it to count,
//! clients that write, and faults: power cuts that keep any unsynced 512-byte sectors, failing syncs, full disks, bit
//! rot, connections that are late, cut within a frame, half open, stalled or cut all at once, nodes parted from each
//! other or from the authority, another leader. After the faults everything must come together. All the time the
//! `oracle` looks whether
//!
//! - anything acknowledged is lost: from the log of a new leader, of any node at the end, by two acknowledgements of
//!   one LSN, or because a node cuts it or is rebuilt without it; or is not on as many disks as it is said to be;
//! - a batch in any log is the one that some leader wrote there, and what was synced outlives a power cut;
//! - marks move back; two leaders commit under one epoch; a record is applied twice or out of order;
//! - a target is in another state than its log's, after a rebuild too;
//! - a sound disk is refused, or damage is not noticed.
//!
//! # That it can fail
//!
//! Each [`Plant`] builds one defect in, and `every_planted_defect_is_found` expects the oracle to meet it. Three of
//! them are no inventions:
//!
//! - `BelieveSynced`: batches carry what their *leader* had synced. Where recovery takes that for what this disk had, a
//!   follower is refused its sound log after a power cut.
//! - `TakeAcceptedEpoch`: a follower's accepted epoch says nothing about its newest record. Taken for that, the tail of
//!   a deposed leader looks like data that the new one has lost, and it is refused for good.
//! - `CutBehindApplied`: a target that overwrites in place may hold more after a power cut than it knows to have
//!   applied. Where a diverged tail is cut by what it knows, effects of the tail stay.
//!
//! Acknowledged means: durable on as many followers as asked, and written by this leader in this epoch. What an earlier
//! epoch left is safe only once a record of the present one behind it is, however many followers have it.
//!
//! # How to run it
//!
//! `TOWLINE_SIM_SEEDS` runs (default 2000) of `TOWLINE_SIM_SECONDS` simulated seconds with faults (default 30), from
//! `TOWLINE_SIM_FIRST` on. A run that fails prints its seed and the end of its transcript, `TOWLINE_SIM_LINES` lines;
//! `TOWLINE_SIM_FIRST=seed TOWLINE_SIM_SEEDS=1` repeats it. The manifest has tests optimise the crate, without which
//! the default would take minutes.

// A test may panic, also in the functions that it is made of.
#![allow(clippy::unwrap_used)]

mod simulation {
    pub mod clock;
    pub mod disk;
    pub mod follower;
    pub mod leader;
    pub mod log;
    pub mod network;
    pub mod node;
    pub mod oracle;
    pub mod scenario;
    pub mod target;
    pub mod transcript;
    pub mod world;
}

use std::sync::atomic::{AtomicU64, Ordering};

use simulation::scenario::{Ended, run};
use simulation::world::Plant;

fn variable(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

/// Runs a seed again for its transcript.
fn explain(seed: u64, seconds: u64) -> String {
    let again = run(seed, seconds, None, true);
    let lines = usize::try_from(variable("TOWLINE_SIM_LINES", 200)).unwrap();
    let from = again.transcript.len().saturating_sub(lines);
    let violation = again.violation.unwrap_or("it went well the second time".to_owned());
    format!("{}\nseed {seed}: {violation}", again.transcript[from..].join("\n"))
}

/// What came of many seeds.
#[derive(Default)]
struct Sum {
    failed: Vec<u64>,
    counts: [u64; 7],
}

impl Sum {
    fn add(&mut self, seed: u64, ended: &Ended) {
        let Ended { simulated, acknowledged, compact, rebuilds, cuts, elections, crashes, .. } = ended;
        for (sum, count) in self.counts.iter_mut().zip([
            simulated / 1000,
            *acknowledged,
            *compact,
            *rebuilds,
            *cuts,
            *elections,
            *crashes,
        ]) {
            *sum += count;
        }
        if let Some(violation) = &ended.violation {
            println!("seed {seed}: {violation}");
            self.failed.push(seed);
        }
    }
}

#[test]
fn whatever_breaks_nothing_acknowledged_is_lost_and_everything_comes_together() {
    let (seeds, seconds) = (variable("TOWLINE_SIM_SEEDS", 2000), variable("TOWLINE_SIM_SECONDS", 30));
    let first = variable("TOWLINE_SIM_FIRST", 1);
    let next = AtomicU64::new(first);
    let work = || {
        let mut sum = Sum::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first.saturating_add(seeds) || sum.failed.len() >= 5 {
                return sum;
            }
            sum.add(seed, &run(seed, seconds, None, false));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let sums: Vec<Sum> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let [simulated, acknowledged, compact, rebuilds, cuts, elections, crashes] =
        std::array::from_fn(|at| sums.iter().map(|sum| sum.counts[at]).sum::<u64>());
    println!(
        "{simulated} simulated seconds: {acknowledged} batches acknowledged, {compact} compact ones written, {crashes} crashes, {elections} elections, \
         {rebuilds} rebuilds, {cuts} tails cut"
    );
    if let Some(seed) = sums.iter().flat_map(|sum| &sum.failed).min() {
        panic!("{}", explain(*seed, seconds));
    }
    let is_thorough = seeds >= 1000 && seconds >= 30;
    let nothing_happened = [acknowledged, compact, rebuilds, cuts, elections, crashes].contains(&0);
    assert!(!is_thorough || !nothing_happened, "runs in which nothing happens show nothing");
}

#[test]
fn a_seed_is_always_the_same_run() {
    for seed in [1, 7, 42] {
        let [one, two] = [(); 2].map(|()| run(seed, 30, None, true));
        assert!(one.transcript.len() > 50, "{} lines", one.transcript.len());
        assert_eq!(one.transcript, two.transcript, "seed {seed}");
    }
}

/// Seeds within which each defect must have been found, and a word of what the oracle says then.
const FOUND_WITHIN: u64 = 1500;

#[test]
fn every_planted_defect_is_found() {
    let words = |plant| match plant {
        Plant::AcknowledgeUnsynced | Plant::ElectLongest | Plant::CountRebuilding | Plant::CountCut => "acknowledged",
        Plant::FeedAtOnce => "was acknowledged",
        Plant::DiskLies => "on stable storage",
        Plant::TrustChain => "than its writer",
        Plant::ApplyTwice => "applies LSN",
        Plant::BaseWins | Plant::CutBehindApplied => "not in the state",
        Plant::ForgetEpoch => "accepted epoch",
        Plant::ForgetMark => "moved back",
        Plant::ReuseEpoch => "both commit under epoch",
        Plant::GiveUp | Plant::TakeAcceptedEpoch => "does not come together",
        Plant::BelieveSynced => "has a sound disk",
    };
    let look_for = |plant| {
        let found = (1..=FOUND_WITHIN).find_map(|seed| {
            let violation = run(seed, 30, Some(plant), false).violation?;
            violation.contains(words(plant)).then_some((seed, violation))
        });
        match found {
            Some((seed, violation)) => println!("{plant:?}, seed {seed}: {violation}"),
            None => panic!("{plant:?} was not found within {FOUND_WITHIN} seeds"),
        }
    };
    std::thread::scope(|scope| {
        for plant in Plant::ALL {
            scope.spawn(move || look_for(plant));
        }
    });
}
