//! Threads that are there while there is something to do: how much stack they get, and how long they stay without.

use std::time::{Duration, Instant};

/// Stack of such a thread, in bytes. More than it needs: the C library keeps the stacks of threads that have ended,
/// with the pages they touched, up to a number of bytes, so of larger ones it keeps fewer; and it gives none of them to
/// a thread, perhaps one that stays, that asks for less than a quarter.
pub(crate) const ON_DEMAND_STACK: usize = if cfg!(target_pointer_width = "64") { 8 << 20 } else { 1 << 20 };

/// More stack than there are addresses for, also for a process of 32 bits that has all of them: no thread starts.
#[cfg(test)]
pub(crate) const TOO_MUCH_STACK: usize = usize::MAX / 16 * 15;

/// No such thread stays longer than this without anything to do: whoever comes less often has one started each time.
const MOST: Duration = Duration::from_secs(30);

/// How long such a thread stays without anything to do: twice as long as it took from one start to the next, so that
/// whoever comes now and then finds it there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stay {
    least: Duration,
    now: Duration,
    started: Option<Instant>,
}

impl Stay {
    /// At least that long.
    pub(crate) fn at_least(least: Duration) -> Stay {
        Stay { least, now: least, started: None }
    }

    /// A thread starts.
    pub(crate) fn begins(&mut self, now: Instant) {
        let before = self.started.replace(now);
        let between = before.map_or(Duration::ZERO, |before| now.saturating_duration_since(before));
        self.now = if between > MOST { self.least } else { (between * 2).min(MOST).max(self.least) };
    }

    /// How long the present one stays.
    pub(crate) fn duration(&self) -> Duration {
        self.now
    }
}

/// Runs what takes much stack on a thread that then ends, so that the one that waits for it, which stays, need not keep
/// it: a thread keeps every page of its stack that it once touched. Where there can be no such thread, it is run here.
pub(crate) fn run_aside<T: Send>(name: &str, stack: usize, mut run: impl FnMut() -> T + Send) -> T {
    let done = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(stack);
        match thread.spawn_scoped(scope, &mut run) {
            Ok(thread) => Some(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))),
            Err(error) => {
                log::warn!("no thread {name}, so who needs it does without: {error}");
                None
            }
        }
    });
    done.unwrap_or_else(run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_run_aside_has_another_stack_and_gives_what_it_gives() {
        let here = std::thread::current().id();
        assert_ne!(run_aside("aside", ON_DEMAND_STACK, || std::thread::current().id()), here);
        let panicked =
            std::panic::catch_unwind(|| run_aside("aside", ON_DEMAND_STACK, || -> () { panic!("on purpose") }));
        assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"on purpose"));
        assert_eq!(run_aside("aside", TOO_MUCH_STACK, || std::thread::current().id()), here);
    }

    #[test]
    fn whoever_comes_now_and_then_finds_the_thread_there() {
        let second = Duration::from_secs(1);
        let mut stay = Stay::at_least(2 * second);
        let mut now = Instant::now();
        let mut started_after = |seconds: u32| {
            now += seconds * second;
            stay.begins(now);
            stay.duration()
        };
        assert_eq!(started_after(0), 2 * second, "the first");
        assert_eq!(started_after(5), 10 * second);
        assert_eq!(started_after(12), 24 * second);
        assert_eq!(started_after(29), MOST, "never longer");
        assert_eq!(started_after(1), 2 * second, "never shorter");
        assert_eq!(started_after(31), 2 * second, "who comes that seldom would not find it");
        let mut patient = Stay::at_least(100 * second);
        patient.begins(now);
        patient.begins(now + second);
        assert_eq!(patient.duration(), 100 * second);
    }
}
