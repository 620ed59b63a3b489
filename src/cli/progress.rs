//! Progress on standard error: a bar where a person looks on, a plain line now and then where not.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How long work may go on silently where no person looks on.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Progress of work measured in bytes.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    what: &'static str,
    total: Option<u64>,
    last_line: Instant,
}

impl Progress {
    /// Begins to report on `what`; without a total where the end is not known.
    pub(super) fn new(what: &'static str, total: Option<u64>) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
            let template = if total.is_some() {
                "{msg} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}"
            } else {
                "{spinner} {msg} {bytes} {binary_bytes_per_sec} {elapsed}"
            };
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(what);
            bar
        });
        Progress { bar, what, total, last_line: Instant::now() }
    }

    /// Says how far it is.
    pub(super) fn set(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        } else if self.last_line.elapsed() >= PLAIN_EVERY {
            self.last_line = Instant::now();
            match self.total {
                Some(total) => {
                    eprintln!("{}: {} of {}", self.what, super::human_bytes(bytes), super::human_bytes(total))
                }
                None => eprintln!("{}: {}", self.what, super::human_bytes(bytes)),
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
