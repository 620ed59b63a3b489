//! Results as a picture: one file that needs nothing else, readable on light and on dark.
//!
//! First the ratios, as bars that begin at 1, the limit: to the right is better, to the left is worse, each doubling as
//! wide as each halving, with a thin line from the smallest to the largest round. Then, where latencies were recorded,
//! a curve for each entrant: the microseconds (upwards, each tenfold as high) within which so many of all operations
//! were done (to the right, each further nine alike).

use std::fmt::Write;
use std::path::Path;

use super::Result;
use super::report::{Row, Side, short};

const WIDTH: f64 = 980.0;
const MARGIN: f64 = 24.0;

/// What kind of file, by its name's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Svg,
    Html,
}

impl Format {
    pub(super) fn of(path: &Path) -> Result<Format> {
        match path.extension().and_then(|end| end.to_str()) {
            Some("svg") => Ok(Format::Svg),
            Some("html" | "htm") => Ok(Format::Html),
            _ => Err(format!("{}: a plot is a file that ends in .svg or .html", path.display()).into()),
        }
    }
}

/// Writes the picture of some results.
pub(super) fn write(path: &Path, machine: &str, rows: &[Row]) -> Result<()> {
    let text = render(Format::of(path)?, machine, rows);
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()).into())
}

const STYLE: &str = "\
:root{color-scheme:light dark}
.plot{--back:#ffffff;--text:#16181d;--soft:#5d6470;--grid:#dfe3e8;--ours:#0b66c3;--bare:#9a5b00;--third:#7a7f87}
@media (prefers-color-scheme:dark){.plot{--back:#15171b;--text:#eceef1;--soft:#a3aab5;--grid:#343a43;--ours:#6bb1ff;--bare:#f0b35a;--third:#969ca5}}
.plot{background:var(--back);color:var(--text);font-family:system-ui,sans-serif}
.plot text{fill:var(--text);font-size:12px}
.plot .title{font-size:20px;font-weight:600}
.plot .head{font-size:15px;font-weight:600}
.plot .soft{fill:var(--soft);font-size:11px}
.plot .back{fill:var(--back)}
.plot .grid{stroke:var(--grid);stroke-width:1}
.plot .limit{stroke:var(--text);stroke-width:1.5}
.plot .bar{fill:var(--ours);opacity:.75}
.plot .reach{stroke:var(--text);stroke-width:1.5}
.plot .curve{fill:none;stroke-width:2}
.plot .e0{stroke:var(--ours)}
.plot .e1{stroke:var(--bare);stroke-dasharray:6 3}
.plot .e2{stroke:var(--third);stroke-dasharray:2 3}
";

fn render(format: Format, machine: &str, rows: &[Row]) -> String {
    let mut page = Page { body: String::new(), y: MARGIN };
    page.y += 16.0;
    page.text(MARGIN, "title", "Towline beside the limits of this machine");
    page.y += 20.0;
    page.text(MARGIN, "soft", machine);
    page.y += 28.0;
    page.bars(rows);
    page.curves(rows);
    let Page { body, y } = page;
    let height = y + MARGIN;
    let svg = format!(
        "<svg class=\"plot\" xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" \
         height=\"{height:.0}\" role=\"img\">\n<style>\n{STYLE}</style>\n\
         <rect class=\"back\" width=\"100%\" height=\"100%\"/>\n{body}</svg>\n"
    );
    match format {
        Format::Svg => svg,
        Format::Html => format!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width\">\n<title>towline bench</title>\n\
             <style>:root{{color-scheme:light dark}}body{{margin:0;display:flex;justify-content:center;background:#fff}}\
             @media (prefers-color-scheme:dark){{body{{background:#15171b}}}}svg{{max-width:100%;height:auto}}</style>\n\
             <body>\n{svg}</body>\n</html>\n"
        ),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// What is drawn so far, and where the next thing goes.
struct Page {
    body: String,
    y: f64,
}

const BAR_LEFT: f64 = 430.0;
const BAR_RIGHT: f64 = WIDTH - MARGIN - 130.0;
const BAR_ROW: f64 = 20.0;

const CHART_WIDTH: f64 = 300.0;
const CHART_HEIGHT: f64 = 170.0;
const CHART_GAP: f64 = 16.0;
const CHARTS_ABREAST: usize = 3;
/// Room for the numbers of the upward axis.
const AXIS: f64 = 44.0;
/// Percent, and what stands below it. The last is drawn as far beyond the one before as that is beyond its own.
const TICKS: [(f64, &str); 6] =
    [(0.0, "0"), (90.0, "90"), (99.0, "99"), (99.9, "99.9"), (99.99, "99.99"), (100.0, "max")];

impl Page {
    fn push(&mut self, element: &str) {
        self.body.push_str(element);
        self.body.push('\n');
    }

    fn text(&mut self, x: f64, class: &str, text: &str) {
        self.text_at(x, self.y, class, "start", text);
    }

    fn text_at(&mut self, x: f64, y: f64, class: &str, anchor: &str, text: &str) {
        let text = escape(text);
        self.push(&format!("<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\" text-anchor=\"{anchor}\">{text}</text>"));
    }

    fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.push(&format!("<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"));
    }

    /// Every ratio.
    fn bars(&mut self, rows: &[Row]) {
        let rows: Vec<&Row> =
            rows.iter().filter(|row| row.ratio.median.is_finite() && row.ratio.median > 0.0).collect();
        let reach = rows.iter().flat_map(|row| [row.ratio.min, row.ratio.max]).filter(|ratio| *ratio > 0.0);
        let (low, high) = reach.fold((0.5_f64, 2.0_f64), |(low, high), ratio| (low.min(ratio), high.max(ratio)));
        let (low, high) = (low.log2().floor().max(-7.0), high.log2().ceil().min(7.0));
        let x = |ratio: f64| BAR_LEFT + (ratio.log2().clamp(low, high) - low) / (high - low) * (BAR_RIGHT - BAR_LEFT);
        self.text(MARGIN, "head", "Ours as a share of the limit");
        self.y += 16.0;
        self.text(
            MARGIN,
            "soft",
            "1 is as good as the bare program; longer to the right is better, to the left is worse",
        );
        self.y += 8.0;
        let mut of = ("", 0);
        for row in rows {
            if of != (row.workload, row.record_size) {
                of = (row.workload, row.record_size);
                self.y += 22.0;
                self.text(MARGIN, "head", &title(row));
                self.y += 4.0;
                for power in whole_numbers(low, high) {
                    let ratio = power.exp2();
                    self.text_at(x(ratio), self.y, "soft", "middle", &format!("{ratio}"));
                }
                self.y += 4.0;
            }
            let (top, bottom) = (self.y, self.y + BAR_ROW);
            let middle = (top + bottom) / 2.0;
            for power in whole_numbers(low, high) {
                let at = x(power.exp2());
                self.line("grid", (at, top), (at, bottom));
            }
            let (median, one) = (x(row.ratio.median), x(1.0));
            self.push(&format!(
                "<rect class=\"bar\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"2\"><title>{}</title></rect>",
                median.min(one),
                top + 4.0,
                (median - one).abs().max(1.0),
                BAR_ROW - 8.0,
                escape(&row.to_string())
            ));
            if row.ratio.min > 0.0 {
                self.line("reach", (x(row.ratio.min), middle), (x(row.ratio.max), middle));
            }
            self.line("limit", (one, top), (one, bottom));
            let label = format!("{} / {}", row.ours.what, row.bare.what);
            self.text_at(BAR_LEFT - 12.0, middle + 4.0, "", "end", &shortened(&label, 68));
            let value = format!("{:.2} ({:.2} to {:.2})", row.ratio.median, row.ratio.min, row.ratio.max);
            self.text_at(BAR_RIGHT + 12.0, middle + 4.0, "", "start", &value);
            self.y = bottom;
        }
        self.y += 40.0;
    }

    /// A chart for each of ours whose latencies were recorded, with all that it is compared with.
    fn curves(&mut self, rows: &[Row]) {
        let mut charts: Vec<(&Row, Vec<&Side>)> = Vec::new();
        for row in rows.iter().filter(|row| !row.ours.percentiles.is_empty()) {
            let is_its = |(other, _): &&mut (&Row, Vec<&Side>)| {
                (other.workload, other.record_size, other.ours.what) == (row.workload, row.record_size, row.ours.what)
            };
            match charts.iter_mut().find(is_its) {
                Some((_, sides)) => sides.push(&row.bare),
                None => charts.push((row, vec![&row.ours, &row.bare])),
            }
        }
        if charts.is_empty() {
            return;
        }
        self.text(MARGIN, "head", "Latencies: microseconds within which so many percent were done");
        self.y += 12.0;
        for abreast in charts.chunks(CHARTS_ABREAST) {
            let most = abreast.iter().map(|(_, sides)| sides.len()).max().unwrap_or(0);
            for (column, (row, sides)) in abreast.iter().enumerate() {
                self.chart(MARGIN + column as f64 * (CHART_WIDTH + CHART_GAP), self.y, row, sides);
            }
            self.y += CHART_HEIGHT + 70.0 + most as f64 * 14.0;
        }
    }

    fn chart(&mut self, left: f64, top: f64, row: &Row, sides: &[&Side]) {
        let points = || sides.iter().flat_map(|side| &side.percentiles).map(|point| point.1).filter(|us| *us > 0.0);
        let low = points().fold(f64::INFINITY, f64::min).log10().floor();
        let high = points().fold(f64::NEG_INFINITY, f64::max).log10().ceil().max(low + 1.0);
        if !low.is_finite() || !high.is_finite() {
            return;
        }
        self.text_at(left, top + 16.0, "", "start", &format!("{}: {}", title(row), row.ours.what));
        for (at, side) in sides.iter().enumerate() {
            let y = top + 30.0 + at as f64 * 14.0;
            self.line(&format!("curve e{}", at.min(2)), (left, y - 4.0), (left + 26.0, y - 4.0));
            self.text_at(left + 32.0, y, "soft", "start", &shortened(if at == 0 { "ours" } else { side.what }, 44));
        }
        let top = top + 26.0 + sides.len() as f64 * 14.0;
        let bottom = top + CHART_HEIGHT;
        let x = |percent: f64| left + AXIS + nines(percent) / nines(100.0) * (CHART_WIDTH - AXIS);
        let y = |us: f64| bottom - (us.log10().clamp(low, high) - low) / (high - low) * CHART_HEIGHT;
        for (percent, name) in TICKS {
            self.line("grid", (x(percent), top), (x(percent), bottom));
            self.text_at(x(percent), bottom + 14.0, "soft", "middle", name);
        }
        for power in whole_numbers(low, high) {
            let us = 10_f64.powf(power);
            self.line("grid", (left + AXIS, y(us)), (left + CHART_WIDTH, y(us)));
            self.text_at(left + AXIS - 6.0, y(us) + 4.0, "soft", "end", &short(us));
        }
        for (at, side) in sides.iter().enumerate() {
            let mut path = String::new();
            for (percent, us) in side.percentiles.iter().filter(|point| point.1 > 0.0) {
                let step = if path.is_empty() { 'M' } else { 'L' };
                let _ = write!(path, "{step}{:.1} {:.1}", x(*percent), y(*us));
            }
            self.push(&format!(
                "<path class=\"curve e{}\" d=\"{path}\"><title>{}</title></path>",
                at.min(2),
                escape(side.what)
            ));
        }
    }
}

/// How far to the right a percentage stands: 90 at 1, 99 at 2, and so on.
fn nines(percent: f64) -> f64 {
    if percent >= 100.0 { 5.0 } else { -(1.0 - percent / 100.0).log10() }
}

/// From one whole number to another, both included.
fn whole_numbers(low: f64, high: f64) -> impl Iterator<Item = f64> {
    std::iter::successors(Some(low), |number| Some(number + 1.0)).take_while(move |number| *number <= high)
}

fn title(row: &Row) -> String {
    match row.record_size {
        0 => row.workload.to_owned(),
        size => format!("{}, {size} B", row.workload),
    }
}

/// At most so many characters.
fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::report::{Spread, Unit};

    fn row(ratio: f64, percentiles: Vec<(f64, f64)>) -> Row {
        let value = Spread { median: ratio, min: ratio * 0.9, max: ratio * 1.1 };
        Row {
            workload: "sync",
            record_size: 1024,
            unit: Unit::Microseconds,
            ours: Side { what: "a & <b>", value, extra: Vec::new(), percentiles: percentiles.clone() },
            bare: Side { what: "bare", value, extra: Vec::new(), percentiles },
            among_ours: false,
            ratio: value,
            rounds: 5,
        }
    }

    #[test]
    fn a_plot_is_an_svg_or_a_page() {
        assert_eq!(Format::of(Path::new("a/b.svg")).unwrap(), Format::Svg);
        assert_eq!(Format::of(Path::new("b.html")).unwrap(), Format::Html);
        assert!(Format::of(Path::new("b.png")).is_err() && Format::of(Path::new("svg")).is_err());
    }

    #[test]
    fn every_row_is_a_bar_and_latencies_are_curves() {
        let rows = [row(0.5, vec![(50.0, 100.0), (99.0, 300.0), (100.0, 4000.0)]), row(3.0, Vec::new())];
        for format in [Format::Svg, Format::Html] {
            let text = render(format, "2 cores", &rows);
            assert_eq!(text.matches("<rect class=\"bar\"").count(), 2);
            assert_eq!(text.matches("<path class=\"curve").count(), 2);
            assert!(text.contains("a &amp; &lt;b&gt;") && !text.contains("<b>"));
            assert!(text.contains("prefers-color-scheme:dark"));
            // Nothing from elsewhere, and nothing that was not a number.
            assert!(!text.contains("<script") && !text.contains("href") && !text.contains("url("));
            assert!(!text.contains("NaN") && !text.contains("inf"));
            assert_eq!(text.matches("<svg").count(), text.matches("</svg>").count());
        }
    }

    #[test]
    fn odd_results_do_not_spoil_the_picture() {
        let rows = [row(f64::NAN, Vec::new()), row(0.0, Vec::new()), row(1e9, vec![(50.0, 0.0)])];
        let text = render(Format::Svg, "", &rows);
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        assert!(!render(Format::Html, "", &[]).is_empty());
    }
}
