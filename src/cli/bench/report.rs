//! Rounds, medians and how they are shown.
//!
//! A [`Contest`] has entrants, ours and bare ones, that do the same work. Each round runs all of them once, one after
//! the other, and every second round in the opposite order, so that whatever slows the machine meets all alike. What is
//! compared is compared within a round; the median of those ratios is what is shown.
//!
//! # JSON
//!
//! With `--json` each comparison is one object on a line of its own. Fields keep their names and meanings; new ones may
//! come.
//!
//! | field | meaning |
//! |---|---|
//! | `workload`, `size` | what was measured, and the bytes of a record (of a block, for `rebuild`) |
//! | `ours` | an object, see below |
//! | `bare` | the same of what it is compared with |
//! | `against` | `"bare"` if that is a bare program, `"ours"` if it is Towline under other circumstances |
//! | `ratio`, `ratio_min`, `ratio_max` | median, smallest and largest of the rounds' ratios; 1 is as good, less is worse, in every unit |
//! | `rounds` | how many there were |
//!
//! `ours` and `bare` have `what`, its name; `median`, `min` and `max` of the rounds; their `unit`: `records/s`, `MB/s`,
//! `us`, `wake-ups/s` or `KiB`; and, where known, medians of `p99`, `p999` and `max_us` in microseconds,
//! `cpu_us_per_record`, `device_bytes_per_record`, `threads`, `rss_mb`, `anonymous_mb` and others. Latencies also have
//! `percentiles`: an object of microseconds by percent, from all rounds together. What is not known is left out or
//! `null`.

use std::fmt;

use hdrhistogram::Histogram;

use super::{Bench, Error, Result, machine};

/// What one round of one entrant gave.
pub(super) struct Sample {
    pub(super) value: f64,
    /// More to say about it, by name.
    pub(super) extra: Vec<(&'static str, f64)>,
    /// Nanoseconds, where they were recorded one by one.
    latencies: Option<Histogram<u64>>,
}

impl Sample {
    pub(super) fn new(value: f64) -> Sample {
        Sample { value, extra: Vec::new(), latencies: None }
    }

    pub(super) fn with(mut self, name: &'static str, value: Option<f64>) -> Sample {
        self.extra.extend(value.map(|value| (name, value)));
        self
    }

    pub(super) fn with_latencies(mut self, latencies: Histogram<u64>) -> Sample {
        self.latencies = Some(latencies);
        self
    }
}

/// What an entrant's value is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    RecordsPerSecond,
    MegabytesPerSecond,
    Microseconds,
    WakeUpsPerSecond,
    Kibibytes,
}

impl Unit {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Unit::RecordsPerSecond => "records/s",
            Unit::MegabytesPerSecond => "MB/s",
            Unit::Microseconds => "us",
            Unit::WakeUpsPerSecond => "wake-ups/s",
            Unit::Kibibytes => "KiB",
        }
    }

    /// Ours as a share of the limit: 1 is as good as the limit, less is worse, in every unit.
    fn share(self, ours: f64, bare: f64) -> f64 {
        if self.less_is_better() { bare / ours } else { ours / bare }
    }

    fn less_is_better(self) -> bool {
        matches!(self, Unit::Microseconds | Unit::WakeUpsPerSecond | Unit::Kibibytes)
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
    /// What ours is compared with is ours too.
    among_ours: bool,
    /// All run, whatever comparisons are asked for.
    all_run: bool,
    /// Each is compared with the one that is best of all, under this name.
    best: Option<&'static str>,
    /// Bytes of memory that the one that takes most takes anew in a round.
    memory: u64,
}

/// One comparison, done.
pub(super) struct Row {
    pub(super) workload: &'static str,
    pub(super) record_size: u64,
    pub(super) unit: Unit,
    pub(super) ours: Side,
    pub(super) bare: Side,
    pub(super) among_ours: bool,
    pub(super) ratio: Spread,
    pub(super) rounds: usize,
}

/// What one entrant's rounds came to.
pub(super) struct Side {
    pub(super) what: &'static str,
    pub(super) value: Spread,
    /// Medians of what else was measured.
    pub(super) extra: Vec<(&'static str, f64)>,
    /// Percent and microseconds, over all rounds; empty where latencies were not recorded.
    pub(super) percentiles: Vec<(f64, f64)>,
}

impl<'a> Contest<'a> {
    pub(super) fn new(workload: &'static str, record_size: u64, unit: Unit) -> Contest<'a> {
        Contest {
            workload,
            record_size,
            unit,
            entrants: Vec::new(),
            pairs: Vec::new(),
            optional: Vec::new(),
            among_ours: false,
            all_run: false,
            best: None,
            memory: 0,
        }
    }

    /// Has so many bytes of memory used just before each entrant's turn: what those that write new files take. See
    /// [`machine::use_memory`].
    pub(super) fn with_memory_in_use(mut self, bytes: u64) -> Contest<'a> {
        self.memory = bytes;
        self
    }

    /// Has everyone run, whatever is asked for: others look at what they find.
    pub(super) fn with_all_running(mut self) -> Contest<'a> {
        self.all_run = true;
        self
    }

    /// Says that what is given as bare is ours too, under other circumstances.
    pub(super) fn among_ours(mut self) -> Contest<'a> {
        self.among_ours = true;
        self
    }

    /// Compares each with the one that has the best median, round by round, under this name.
    pub(super) fn against_the_best(mut self, name: &'static str) -> Contest<'a> {
        self.best = Some(name);
        self.among_ours()
    }

    /// A bare limit.
    pub(super) fn bare(mut self, name: &'static str, run: impl FnMut() -> Result<Sample> + 'a) -> Contest<'a> {
        self.entrants.push(Entrant { name, run: Box::new(run), samples: Vec::new(), unable: None });
        self
    }

    /// A bare limit that not every system or file system has: left out where it fails.
    #[cfg(target_os = "linux")]
    pub(super) fn bare_if_able(mut self, name: &'static str, run: impl FnMut() -> Result<Sample> + 'a) -> Contest<'a> {
        self.optional.push(name);
        self.bare(name, run)
    }

    /// One of ours, and the bare limits that it is compared with.
    pub(super) fn ours(
        self,
        name: &'static str,
        against: &[&'static str],
        run: impl FnMut() -> Result<Sample> + 'a,
    ) -> Contest<'a> {
        self.also(name, against).bare(name, run)
    }

    /// More bare limits that one of ours is compared with.
    pub(super) fn also(mut self, name: &'static str, against: &[&'static str]) -> Contest<'a> {
        self.pairs.extend(against.iter().map(|bare| (name, *bare)));
        self
    }

    /// One of ours that not every system can run: left out where it fails.
    pub(super) fn ours_if_able(
        mut self,
        name: &'static str,
        against: &[&'static str],
        run: impl FnMut() -> Result<Sample> + 'a,
    ) -> Contest<'a> {
        self.optional.push(name);
        self.ours(name, against, run)
    }

    /// Runs the rounds and shows the results.
    pub(super) fn run(mut self, bench: &Bench) -> Result<()> {
        self.keep_wanted(bench);
        let memory = bench.scratch("memory")?;
        for round in 0..bench.rounds() {
            let count = self.entrants.len();
            for turn in 0..count {
                bench.check_interrupted()?;
                let at = if round % 2 == 0 { turn } else { count - 1 - turn };
                let entrant = &mut self.entrants[at];
                if entrant.unable.is_some() {
                    continue;
                }
                machine::use_memory(memory.path(), self.memory)?;
                match (entrant.run)() {
                    Ok(sample) => {
                        let (workload, unit) = (self.workload, self.unit.as_str());
                        log::debug!("{workload}, round {}, {}: {:.1} {unit}", round + 1, entrant.name, sample.value);
                        entrant.samples.push(sample);
                    }
                    Err(error) if self.optional.contains(&entrant.name) => entrant.unable = Some(error),
                    Err(error) => return Err(format!("{}, {}: {error}", self.workload, entrant.name).into()),
                }
            }
        }
        if let Some(best) = self.best {
            self.add_best(best);
            self.pairs.retain(|(ours, against)| bench.wants(self.workload, ours, against));
        }
        for (ours, bare) in &self.pairs {
            let find = |name| self.entrants.iter().find(|entrant| entrant.name == name);
            let (Some(ours), Some(bare)) = (find(*ours), find(*bare)) else { continue };
            if let Some(error) = bare.unable.as_ref().or(ours.unable.as_ref()) {
                log::info!("{}: {} beside {} left out: {error}", self.workload, ours.name, bare.name);
                continue;
            }
            let row = self.row(ours, bare);
            if bench.json {
                say!("{}", row.to_json())
            } else {
                say!("{row}")
            }
            bench.keep(row);
        }
        Ok(())
    }

    /// Leaves out what was not asked for. Who is to be the best can only be told among all.
    fn keep_wanted(&mut self, bench: &Bench) {
        if let Some(best) = self.best {
            if !self.entrants.iter().any(|entrant| bench.wants(self.workload, entrant.name, best)) {
                self.entrants.clear();
            }
            return;
        }
        self.pairs.retain(|(ours, against)| bench.wants(self.workload, ours, against));
        let Contest { entrants, pairs, all_run, .. } = self;
        entrants.retain(|entrant| {
            *all_run || pairs.iter().any(|(ours, bare)| entrant.name == *ours || entrant.name == *bare)
        });
    }

    /// One more entrant, whose samples are those of the one with the best median. Not the best of each round, which is
    /// the luckiest: where rounds vary by a tenth, each of four that are equally fast would have nine tenths of that.
    fn add_best(&mut self, name: &'static str) {
        let median = |entrant: &Entrant<'_>| spread(entrant.samples.iter().map(|sample| sample.value)).median;
        let entrants = self.entrants.iter().filter(|entrant| !entrant.samples.is_empty());
        let best = if self.unit.less_is_better() {
            entrants.min_by(|a, b| median(a).total_cmp(&median(b)))
        } else {
            entrants.max_by(|a, b| median(a).total_cmp(&median(b)))
        };
        let values = best.into_iter().flat_map(|best| &best.samples).map(|sample| sample.value);
        let samples = values.map(Sample::new).collect();
        self.pairs.extend(self.entrants.iter().map(|entrant| (entrant.name, name)));
        self.entrants.push(Entrant { name, run: Box::new(|| Ok(Sample::new(f64::NAN))), samples, unable: None });
    }

    fn row(&self, ours: &Entrant<'_>, bare: &Entrant<'_>) -> Row {
        let rounds = ours.samples.iter().zip(&bare.samples);
        Row {
            workload: self.workload,
            record_size: self.record_size,
            unit: self.unit,
            ours: ours.side(),
            bare: bare.side(),
            among_ours: self.among_ours,
            ratio: spread(rounds.map(|(ours, bare)| self.unit.share(ours.value, bare.value))),
            rounds: ours.samples.len(),
        }
    }
}

/// Percentiles that are kept of latencies, in percent.
const PERCENTILES: [f64; 16] =
    [1.0, 10.0, 25.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 98.0, 99.0, 99.5, 99.9, 99.95, 99.99, 100.0];

impl Entrant<'_> {
    fn side(&self) -> Side {
        let mut latencies: Option<Histogram<u64>> = None;
        for more in self.samples.iter().filter_map(|sample| sample.latencies.as_ref()) {
            match &mut latencies {
                // They resize themselves: nothing that was recorded is out of range.
                Some(all) => all.add(more).unwrap_or_default(),
                None => latencies = Some(more.clone()),
            }
        }
        let us = |all: &Histogram<u64>, percent: f64| all.value_at_percentile(percent) as f64 / 1e3;
        Side {
            what: self.name,
            value: spread(self.samples.iter().map(|sample| sample.value)),
            extra: self.extras(),
            percentiles: latencies.map_or(Vec::new(), |all| PERCENTILES.map(|p| (p, us(&all, p))).to_vec()),
        }
    }

    /// Medians of what else was measured.
    fn extras(&self) -> Vec<(&'static str, f64)> {
        let mut names: Vec<&'static str> = Vec::new();
        for (name, _) in self.samples.iter().flat_map(|sample| &sample.extra) {
            if !names.contains(name) {
                names.push(name);
            }
        }
        let of = |name| {
            let all = self.samples.iter().flat_map(|sample| &sample.extra);
            spread(all.filter(move |extra| extra.0 == name).map(|extra| extra.1)).median
        };
        names.into_iter().map(|name| (name, of(name))).collect()
    }
}

impl Row {
    fn to_json(&self) -> String {
        format!(
            "{{\"workload\":\"{}\",\"size\":{},\"ours\":{},\"against\":\"{}\",\"bare\":{},\"ratio\":{},\"ratio_min\":{},\"ratio_max\":{},\"rounds\":{}}}",
            self.workload,
            self.record_size,
            self.ours.to_json(self.unit),
            if self.among_ours { "ours" } else { "bare" },
            self.bare.to_json(self.unit),
            number(self.ratio.median),
            number(self.ratio.min),
            number(self.ratio.max),
            self.rounds
        )
    }
}

impl Side {
    fn to_json(&self, unit: Unit) -> String {
        let mut text = format!(
            "{{\"what\":\"{}\",\"median\":{},\"min\":{},\"max\":{},\"unit\":\"{}\"",
            self.what,
            number(self.value.median),
            number(self.value.min),
            number(self.value.max),
            unit.as_str()
        );
        for (name, value) in &self.extra {
            text += &format!(",\"{name}\":{}", number(*value));
        }
        if !self.percentiles.is_empty() {
            let points = self.percentiles.iter().map(|(percent, us)| format!("\"{percent}\":{}", number(*us)));
            text += &format!(",\"percentiles\":{{{}}}", points.collect::<Vec<_>>().join(","));
        }
        text + "}"
    }

    fn describe(&self, unit: Unit) -> String {
        let Spread { median, min, max } = self.value;
        let mut text = format!("{} {} ({} to {})", short(median), unit.as_str(), short(min), short(max));
        for (name, value) in &self.extra {
            text += &format!(", {name} {}", short(*value));
        }
        text
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<9} {:>6} B  {} / {}", self.workload, self.record_size, self.ours.what, self.bare.what)?;
        let other = if self.among_ours { "base" } else { "bare" };
        writeln!(f, "{:20}ours  {}", "", self.ours.describe(self.unit))?;
        writeln!(f, "{:20}{other}  {}", "", self.bare.describe(self.unit))?;
        let Spread { median, min, max } = self.ratio;
        write!(f, "{:20}ratio {median:.2} ({min:.2} to {max:.2})", "")
    }
}

#[derive(Clone, Copy)]
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
    fn all_are_compared_with_the_one_that_has_the_best_median() {
        let entrant = |name, values: [f64; 3]| {
            let samples = values.map(Sample::new).into_iter().collect();
            Entrant { name, run: Box::new(|| Ok(Sample::new(0.0))), samples, unable: None }
        };
        for (unit, best) in [(Unit::RecordsPerSecond, "a"), (Unit::Microseconds, "b")] {
            let mut contest = Contest::new("w", 1, unit).against_the_best("best");
            // Each is ahead in some round.
            contest.entrants = vec![entrant("a", [10.0, 40.0, 200.0]), entrant("b", [20.0, 20.0, 20.0])];
            contest.add_best("best");
            assert_eq!(contest.pairs, [("a", "best"), ("b", "best")]);
            for ours in &contest.entrants[..2] {
                let row = contest.row(ours, &contest.entrants[2]);
                let ratios = if ours.name == best { (1.0, 1.0) } else { (0.1, 2.0) };
                assert_eq!((row.ratio.min, row.ratio.max), ratios, "{} against {best}", ours.name);
            }
        }
    }

    #[test]
    fn a_row_is_one_line_of_json_with_percentiles_of_all_rounds() {
        let mut first = Histogram::new(3).unwrap();
        first.record(1_000).unwrap();
        let mut second = Histogram::new(3).unwrap();
        second.record(9_000_000).unwrap();
        let with = |value, latencies| Sample::new(value).with("p99", Some(2.0)).with_latencies(latencies);
        let samples = vec![with(1.0, first), with(3.0, second)];
        let ours = Entrant { name: "ours", run: Box::new(|| Ok(Sample::new(0.0))), samples, unable: None };
        let run: Run<'_> = Box::new(|| Ok(Sample::new(0.0)));
        let bare = Entrant { name: "bare", run, samples: vec![Sample::new(1.0), Sample::new(1.0)], unable: None };
        let row = Contest::new("sync", 128, Unit::Microseconds).row(&ours, &bare);
        let json = row.to_json();
        assert!(json.starts_with(
            "{\"workload\":\"sync\",\"size\":128,\"ours\":{\"what\":\"ours\",\"median\":2.000,\"min\":1.000,\"max\":3.000,\
             \"unit\":\"us\",\"p99\":2.000,\"percentiles\":{\"1\":1.000,"
        ));
        assert!(json.contains("\"100\":9003.007}},\"against\":\"bare\",\"bare\":{\"what\":\"bare\","), "{json}");
        assert!(json.ends_with("\"ratio\":0.667,\"ratio_min\":0.333,\"ratio_max\":1.000,\"rounds\":2}"), "{json}");
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
