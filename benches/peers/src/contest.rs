//! Rounds, medians and how they are shown: as `towline bench` does it, with peers where that has bare programs.
//!
//! `--json` gives the same objects too: `ours` is Towline, `bare` is the peer, and `against` is `"peer"`.

use crate::{Options, Result};

/// Towline's name among its peers.
pub(crate) const OURS: &str = "towline";

/// What one round of one entrant gave: its value, and more by name.
pub(crate) struct Sample {
    pub(crate) value: f64,
    pub(crate) extra: Vec<(&'static str, f64)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    RecordsPerSecond,
    MegabytesPerSecond,
    Microseconds,
}

impl Unit {
    fn as_str(self) -> &'static str {
        match self {
            Unit::RecordsPerSecond => "records/s",
            Unit::MegabytesPerSecond => "MB/s",
            Unit::Microseconds => "us",
        }
    }

    /// 1 is as good as the peer, less is worse.
    fn share(self, ours: f64, peer: f64) -> f64 {
        if self == Unit::Microseconds { peer / ours } else { ours / peer }
    }
}

type Run<'a> = Box<dyn FnMut() -> Result<Sample> + 'a>;

struct Entrant<'a> {
    name: &'static str,
    run: Run<'a>,
    samples: Vec<Sample>,
}

/// Entrants that do the same work; every one is compared with Towline.
pub(crate) struct Contest<'a> {
    workload: &'static str,
    size: usize,
    unit: Unit,
    entrants: Vec<Entrant<'a>>,
}

impl<'a> Contest<'a> {
    pub(crate) fn new(workload: &'static str, size: usize, unit: Unit) -> Contest<'a> {
        Contest { workload, size, unit, entrants: Vec::new() }
    }

    pub(crate) fn add(&mut self, name: &'static str, run: impl FnMut() -> Result<Sample> + 'a) {
        self.entrants.push(Entrant { name, run: Box::new(run), samples: Vec::new() });
    }

    /// Runs the rounds and shows the results. A peer that fails is left out from there on, with the reason printed;
    /// where Towline fails the run ends.
    pub(crate) fn run(mut self, options: &Options) -> Result<()> {
        for round in 0..options.rounds {
            let mut order: Vec<usize> = (0..self.entrants.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            let mut failed = Vec::new();
            for at in order {
                let entrant = &mut self.entrants[at];
                match (entrant.run)() {
                    Ok(sample) => entrant.samples.push(sample),
                    Err(error) if entrant.name == OURS => return Err(error),
                    Err(error) => {
                        eprintln!("{} {}: {} left out: {error}", self.workload, self.size, entrant.name);
                        failed.push(entrant.name);
                    }
                }
            }
            self.entrants.retain(|entrant| !failed.contains(&entrant.name));
        }
        let Some(ours) = self.entrants.iter().find(|entrant| entrant.name == OURS) else { return Ok(()) };
        if self.entrants.len() == 1 && !options.json {
            println!("{:<8} {:>6} B  {}", self.workload, self.size, self.side(ours));
        }
        for peer in self.entrants.iter().filter(|entrant| entrant.name != OURS) {
            let rounds = ours.samples.iter().zip(&peer.samples);
            let (median, min, max) = spread(rounds.map(|(ours, peer)| self.unit.share(ours.value, peer.value)));
            if options.json {
                println!(
                    "{{\"workload\":\"{}\",\"size\":{},\"ours\":{},\"against\":\"peer\",\"bare\":{},\"ratio\":{},\
                     \"ratio_min\":{},\"ratio_max\":{},\"rounds\":{}}}",
                    self.workload,
                    self.size,
                    self.side_json(ours),
                    self.side_json(peer),
                    number(median),
                    number(min),
                    number(max),
                    ours.samples.len()
                );
            } else {
                println!(
                    "{:<8} {:>6} B  {} / {}\n{:17}ours  {}\n{:17}peer  {}\n{:17}ratio {median:.2} ({min:.2} to {max:.2})",
                    self.workload,
                    self.size,
                    OURS,
                    peer.name,
                    "",
                    self.side(ours),
                    "",
                    self.side(peer),
                    ""
                );
            }
        }
        Ok(())
    }

    fn side(&self, entrant: &Entrant<'_>) -> String {
        let (median, min, max) = spread(entrant.samples.iter().map(|sample| sample.value));
        let mut text = format!("{} {} ({} to {})", short(median), self.unit.as_str(), short(min), short(max));
        for (name, value) in entrant.extras() {
            text += &format!(", {name} {}", short(value));
        }
        text
    }

    fn side_json(&self, entrant: &Entrant<'_>) -> String {
        let (median, min, max) = spread(entrant.samples.iter().map(|sample| sample.value));
        let mut text = format!(
            "{{\"what\":\"{}\",\"median\":{},\"min\":{},\"max\":{},\"unit\":\"{}\"",
            entrant.name,
            number(median),
            number(min),
            number(max),
            self.unit.as_str()
        );
        for (name, value) in entrant.extras() {
            text += &format!(",\"{name}\":{}", number(value));
        }
        text + "}"
    }
}

impl Entrant<'_> {
    /// Medians of what else was measured.
    fn extras(&self) -> Vec<(&'static str, f64)> {
        let Some(first) = self.samples.first() else { return Vec::new() };
        let of = |name| {
            let all = self.samples.iter().flat_map(|sample| &sample.extra);
            spread(all.filter(move |extra| extra.0 == name).map(|extra| extra.1)).0
        };
        first.extra.iter().map(|extra| (extra.0, of(extra.0))).collect()
    }
}

/// Median, smallest and largest.
fn spread(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else { return (f64::NAN, f64::NAN, f64::NAN) };
    ((sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0, min, max)
}

fn number(value: f64) -> String {
    if value.is_finite() { format!("{value:.3}") } else { "null".to_owned() }
}

fn short(value: f64) -> String {
    match value.abs() {
        huge if huge >= 1e6 => format!("{:.2} M", value / 1e6),
        large if large >= 1e4 => format!("{:.1} k", value / 1e3),
        medium if medium >= 100.0 => format!("{value:.0}"),
        small if small >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}
