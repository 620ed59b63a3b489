//! Simulation
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

use simulation::scenario::{Ended, run};
use simulation::world::Plant;

fn variable(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

fn explain(seed: u64, seconds: u64, plant: Option<Plant>) -> String {
    let again = run(seed, seconds, plant, true);
    let from = again.transcript.len().saturating_sub(usize::try_from(variable("TOWLINE_SIM_LINES", 200)).unwrap());
    format!("{}\nseed {seed}: {}", again.transcript[from..].join("\n"), again.violation.unwrap_or_default())
}

#[test]
fn seeds() {
    let (seeds, seconds) = (variable("TOWLINE_SIM_SEEDS", 2000), variable("TOWLINE_SIM_SECONDS", 30));
    let first = variable("TOWLINE_SIM_FIRST", 1);
    let mut total = [0u64; 6];
    let mut failed = Vec::new();
    for seed in first..first + seeds {
        let Ended { violation, simulated, acknowledged, rebuilds, cuts, elections, crashes, .. } = run(seed, seconds, None, false);
        for (sum, count) in total.iter_mut().zip([simulated / 1000, acknowledged, rebuilds, cuts, elections, crashes]) {
            *sum += count;
        }
        if let Some(violation) = violation {
            println!("seed {seed}: {violation}");
            failed.push(seed);
            if failed.len() >= 10 { break; }
        }
    }
    println!("simulated seconds, acknowledged, rebuilds, cuts, elections, crashes: {total:?}");
    if let Some(seed) = failed.first() {
        panic!("{}", explain(*seed, seconds, None));
    }
}
