//! Rounds, medians and how they are shown.
//!
//! A [`Contest`] has entrants, ours and bare ones, that do the same work. Each round runs all of them once, one after
//! the other, and every second round in the opposite order, so that whatever slows the machine meets all alike. What is
//! compared is compared within a round; the median of those ratios is what is shown.

use super::{Bench, Error, Result};

/// What one round of one entrant gave.
pub(super) struct Sample {
    pub(super) value: f64,
    /// More to say about it, by name.
    pub(super) extra: Vec<(&'static str, f64)>,
}

impl Sample {
    pub(super) fn new(value: f64) -> Sample {
        Sample { value, extra: Vec::new() }
    }

    pub(super) fn with(mut self, name: &'static str, value: Option<f64>) -> Sample {
        self.extra.extend(value.map(|value| (name, value)));
        self
    }
}

/// What an entrant's value is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
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

    /// Ours as a share of the limit: 1 is as good as the limit, less is worse, in every unit.
    fn share(self, ours: f64, bare: f64) -> f64 {
        if self == Unit::Microseconds { bare / ours } else { ours / bare }
    }
}

type Run<'a> = Box<dyn FnMut() -> Result<Sample> + 'a>;

struct Entrant<'a> {
    name: &'static str,
    run: Run<'a>,
    samples: Vec<Sample>,
    /// Why it cannot take part, where only a round could tell.
    unable: Option<Error>,
}

/// Entrants that do the same work, and who is compared with whom.
pub(super) struct Contest<'a> {
    workload: &'static str,
    record_size: u64,
    unit: Unit,
    entrants: Vec<Entrant<'a>>,
    /// Ours, bare.
    pairs: Vec<(&'static str, &'static str)>,
    optional: Vec<&'static str>,
}

impl<'a> Contest<'a> {
    pub(super) fn new(workload: &'static str, record_size: u64, unit: Unit) -> Contest<'a> {
        Contest { workload, record_size, unit, entrants: Vec::new(), pairs: Vec::new(), optional: Vec::new() }
    }

    /// A bare limit.
    pub(super) fn bare(mut self, name: &'static str, run: impl FnMut() -> Result<Sample> + 'a) -> Contest<'a> {
        self.entrants.push(Entrant { name, run: Box::new(run), samples: Vec::new(), unable: None });
        self
    }

    /// A bare limit that not every system or file system has: left out where it fails.
    pub(super) fn bare_if_able(mut self, name: &'static str, run: impl FnMut() -> Result<Sample> + 'a) -> Contest<'a> {
        self.optional.push(name);
        self.bare(name, run)
    }

    /// One of ours, and the bare limits that it is compared with.
    pub(super) fn ours(
        mut self,
        name: &'static str,
        against: &[&'static str],
        run: impl FnMut() -> Result<Sample> + 'a,
    ) -> Contest<'a> {
        self.pairs.extend(against.iter().map(|bare| (name, *bare)));
        self.bare(name, run)
    }

    /// Runs the rounds and shows the results.
    pub(super) fn run(mut self, bench: &Bench) -> Result<()> {
        for round in 0..bench.rounds() {
            let count = self.entrants.len();
            for turn in 0..count {
                bench.check_interrupted()?;
                let at = if round % 2 == 0 { turn } else { count - 1 - turn };
                let entrant = &mut self.entrants[at];
                if entrant.unable.is_some() {
                    continue;
                }
                match (entrant.run)() {
                    Ok(sample) => entrant.samples.push(sample),
                    Err(error) if self.optional.contains(&entrant.name) => entrant.unable = Some(error),
                    Err(error) => return Err(format!("{}, {}: {error}", self.workload, entrant.name).into()),
                }
            }
        }
        for (ours, bare) in &self.pairs {
            let find = |name| self.entrants.iter().find(|entrant| entrant.name == name);
            let (Some(ours), Some(bare)) = (find(*ours), find(*bare)) else { continue };
            match &bare.unable {
                Some(error) => log::info!("{}: {} left out: {error}", self.workload, bare.name),
                None => self.show(bench, ours, bare),
            }
        }
        Ok(())
    }

    fn show(&self, bench: &Bench, ours: &Entrant<'_>, bare: &Entrant<'_>) {
        let share =
            spread(ours.samples.iter().zip(&bare.samples).map(|(ours, bare)| self.unit.share(ours.value, bare.value)));
        let values = |entrant: &Entrant<'_>| spread(entrant.samples.iter().map(|sample| sample.value));
        if bench.json {
            let side = |entrant: &Entrant<'_>| {
                let spread = values(entrant);
                let mut text = format!(
                    "{{\"what\":\"{}\",\"median\":{},\"min\":{},\"max\":{},\"unit\":\"{}\"",
                    entrant.name,
                    number(spread.median),
                    number(spread.min),
                    number(spread.max),
                    self.unit.as_str()
                );
                for (name, value) in extras(entrant) {
                    text += &format!(",\"{name}\":{}", number(value));
                }
                text + "}"
            };
            println!(
                "{{\"workload\":\"{}\",\"size\":{},\"ours\":{},\"bare\":{},\"ratio\":{},\"ratio_min\":{},\"ratio_max\":{},\"rounds\":{}}}",
                self.workload,
                self.record_size,
                side(ours),
                side(bare),
                number(share.median),
                number(share.min),
                number(share.max),
                ours.samples.len()
            );
        } else {
            let side = |entrant: &Entrant<'_>| {
                let spread = values(entrant);
                let mut text = format!(
                    "{} {} ({} to {})",
                    short(spread.median),
                    self.unit.as_str(),
                    short(spread.min),
                    short(spread.max)
                );
                for (name, value) in extras(entrant) {
                    text += &format!(", {name} {}", short(value));
                }
                text
            };
            println!(
                "{:<9} {:>6} B  {}\n{:20}{}\n{:20}{}\n{:20}ratio {:.2} ({:.2} to {:.2})",
                self.workload,
                self.record_size,
                format_args!("{} / {}", ours.name, bare.name),
                "",
                format_args!("ours  {}", side(ours)),
                "",
                format_args!("bare  {}", side(bare)),
                "",
                share.median,
                share.min,
                share.max
            );
        }
    }
}

/// Medians of what else was measured.
fn extras(entrant: &Entrant<'_>) -> Vec<(&'static str, f64)> {
    let Some(first) = entrant.samples.first() else { return Vec::new() };
    let of = |name| {
        let all = entrant.samples.iter().flat_map(|sample| &sample.extra);
        spread(all.filter(move |extra| extra.0 == name).map(|extra| extra.1)).median
    };
    first.extra.iter().map(|extra| (extra.0, of(extra.0))).collect()
}

pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

/// Median, smallest and largest; the median of an even number is the mean of the two in the middle.
pub(super) fn spread(values: impl Iterator<Item = f64>) -> Spread {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else {
        return Spread { median: f64::NAN, min: f64::NAN, max: f64::NAN };
    };
    let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
    Spread { median, min, max }
}

/// A number for JSON, which has no infinity.
fn number(value: f64) -> String {
    if value.is_finite() { format!("{value:.3}") } else { "null".to_owned() }
}

/// A number for people.
pub(super) fn short(value: f64) -> String {
    match value.abs() {
        huge if huge >= 1e6 => format!("{:.2} M", value / 1e6),
        large if large >= 1e4 => format!("{:.1} k", value / 1e3),
        medium if medium >= 100.0 => format!("{value:.0}"),
        small if small >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let odd = spread([3.0, 1.0, 2.0].into_iter());
        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 3.0));
        assert_eq!(spread([4.0, 1.0, 2.0, 3.0].into_iter()).median, 2.5);
        assert!(spread(std::iter::empty()).median.is_nan());
    }

    #[test]
    fn a_share_below_one_is_worse_in_every_unit() {
        assert_eq!(Unit::RecordsPerSecond.share(50.0, 100.0), 0.5);
        assert_eq!(Unit::MegabytesPerSecond.share(50.0, 100.0), 0.5);
        assert_eq!(Unit::Microseconds.share(100.0, 50.0), 0.5);
    }

    #[test]
    fn numbers_are_readable_and_json_has_no_infinity() {
        assert_eq!(short(40_200_000.0), "40.20 M");
        assert_eq!(short(64_000.0), "64.0 k");
        assert_eq!(short(1234.0), "1234");
        assert_eq!(short(56.0), "56.0");
        assert_eq!(short(0.25), "0.250");
        assert_eq!(number(f64::INFINITY), "null");
        assert_eq!(number(1.5), "1.500");
    }
}
