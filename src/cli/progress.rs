//! Progress on standard error: a bar where a person looks on, a plain line now and then where not.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How long work may go on silently where no person looks on.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Progress of work measured in bytes, or in records.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    what: &'static str,
    total: Option<u64>,
    human: fn(u64) -> String,
    last_line: Instant,
}

impl Progress {
    /// Begins to report on `what`; without a total where the end is not known.
    pub(super) fn new(what: &'static str, total: Option<u64>) -> Progress {
        let template = if total.is_some() {
            "{msg} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}"
        } else {
            "{spinner} {msg} {bytes} {binary_bytes_per_sec} {elapsed}"
        };
        Progress::with(what, total, template, super::human_bytes)
    }

    /// Begins to report on `what`, counted in records.
    pub(super) fn of_records(what: &'static str, total: u64) -> Progress {
        let template = "{msg} [{bar:30}] {pos}/{len} records {per_sec} {eta}";
        Progress::with(what, Some(total), template, |records| format!("{records} records"))
    }

    fn with(what: &'static str, total: Option<u64>, template: &str, human: fn(u64) -> String) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(what);
            bar
        });
        Progress { bar, what, total, human, last_line: Instant::now() }
    }

    /// Says how far it is.
    pub(super) fn set(&mut self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        } else if self.last_line.elapsed() >= PLAIN_EVERY {
            self.last_line = Instant::now();
            let human = self.human;
            match self.total {
                Some(total) => tell!("{}: {} of {}", self.what, human(done), human(total)),
                None => tell!("{}: {}", self.what, human(done)),
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
