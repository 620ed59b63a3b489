//! Sessions: one leader-issued recovery contract with one follower, and the table of its legal moves.
//!
//! | from \ to | idle | issued | running | completed | failed |
//! |---|---|---|---|---|---|
//! | idle | cleared | decided | | | |
//! | issued | cleared | | accepted | done at once | failed |
//! | running | cleared | | progress | done | failed |
//! | completed | cleared | decided | | | |
//! | failed | cleared | decided | | | |
//!
//! An empty cell is an illegal move. A live session is never replaced directly: it is failed or cleared first, so that
//! its executor and its pin are always given back. Keep-up never completes.

use std::fmt;
use std::str::FromStr;

use super::event::Progress;
use super::words::{FailureReason, Phase, SessionKind};
use crate::types::{Epoch, Lsn, SessionId};

/// Milliseconds: either a point on a clock of the host's choosing that does not move back (the engine only compares
/// and adds), or a length of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Millis(pub u64);

impl Millis {
    /// The number inside.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl From<u64> for Millis {
    fn from(value: u64) -> Self {
        Self(value)
    }
}

impl FromStr for Millis {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl Millis {
    /// Never: later than every point in time.
    pub const MAX: Millis = Millis(u64::MAX);

    /// This much later, saturating.
    #[must_use]
    pub const fn plus(self, length: Millis) -> Millis {
        Millis(self.0.saturating_add(length.0))
    }
}

/// A session cannot make this move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IllegalTransition {
    /// Where it stands.
    pub from: Phase,
    /// Where it was to go.
    pub to: Phase,
}

impl fmt::Display for IllegalTransition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a session that is {} cannot become {}", self.from, self.to)
    }
}

impl std::error::Error for IllegalTransition {}

/// The legal moves of a session, all of them. Gives the new phase.
///
/// # Errors
///
/// [`IllegalTransition`], which names both phases.
///
/// ```
/// # use towline::protocol::{Phase, transition};
/// assert_eq!(transition(Phase::Issued, Phase::Running), Ok(Phase::Running));
/// let refused = transition(Phase::Failed, Phase::Running).unwrap_err();
/// assert_eq!(refused.to_string(), "a session that is failed cannot become running");
/// ```
pub const fn transition(from: Phase, to: Phase) -> Result<Phase, IllegalTransition> {
    use Phase::{Completed, Failed, Idle, Issued, Running};
    match (from, to) {
        (Idle | Completed | Failed, Issued)
        | (Issued | Running, Running | Completed | Failed)
        | (Idle | Issued | Running | Completed | Failed, Idle) => Ok(to),
        (Idle | Completed | Failed, Running | Completed | Failed) | (Issued | Running, Issued) => {
            Err(IllegalTransition { from, to })
        }
    }
}

/// How long sessions may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// A catch-up fails this long after it was issued.
    pub catch_up_deadline_ms: Millis,
    /// A rebuild fails this long after it was issued.
    pub rebuild_deadline_ms: Millis,
    /// Any session fails after this long without progress; a keep-up only counts the time in which the follower is
    /// known to be behind, a rebuild the time since its follower has taken it on and until that makes it durable.
    pub stall_budget_ms: Millis,
}

impl Default for SessionLimits {
    /// One hour for a catch-up, one day for a rebuild, 30 seconds without progress.
    fn default() -> Self {
        SessionLimits {
            catch_up_deadline_ms: Millis(60 * 60 * 1000),
            rebuild_deadline_ms: Millis(24 * 60 * 60 * 1000),
            stall_budget_ms: Millis(30 * 1000),
        }
    }
}

/// One session, live or over. Its id, kind, epoch, bounds, pin and deadline are frozen when it is issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// Its name.
    pub id: SessionId,
    /// The epoch under which it was issued.
    pub epoch: Epoch,
    /// What it does.
    pub kind: SessionKind,
    /// Where it stands; never [`Phase::Idle`], which is the absence of a session.
    pub phase: Phase,
    /// The follower's position when it was issued; for a rebuild 0.
    pub start: Lsn,
    /// The leader's head when it was issued.
    pub target: Lsn,
    /// The oldest LSN that the leader's log keeps for it. A keep-up's moves on in the host, as the follower does.
    pub pin: Lsn,
    /// The follower cuts its log after this LSN before it begins.
    pub cut: Option<Lsn>,
    /// How far it is.
    pub progress: Progress,
    /// When it fails unless completed. `None` for a keep-up, which is to last.
    pub deadline: Option<Millis>,
    /// When it last got further, or was issued.
    pub last_progress: Millis,
    /// The stall budget is running: always, except for a keep-up whose follower has everything and for a rebuild that
    /// its follower has not taken on yet.
    pub awaiting: bool,
    /// The follower of a rebuild has all that it needs and is putting it on stable storage: the stall budget stands
    /// still.
    pub making_durable: bool,
    /// Why it failed; `Some` exactly when it did.
    pub reason: Option<FailureReason>,
}

impl Session {
    /// Moves to another phase, if that is legal.
    pub(super) fn enter(&mut self, to: Phase) -> Result<(), IllegalTransition> {
        self.phase = self.check(to)?;
        Ok(())
    }

    /// Whether it could move to another phase.
    pub(super) fn check(&self, to: Phase) -> Result<Phase, IllegalTransition> {
        if matches!((self.kind, to), (SessionKind::KeepUp, Phase::Completed)) {
            return Err(IllegalTransition { from: self.phase, to });
        }
        transition(self.phase, to)
    }

    /// When it runs out of time, if nothing happens: the earlier of deadline and stall budget. `None` when it never
    /// does, or is over.
    pub(super) fn due(&self, limits: &SessionLimits) -> Option<Millis> {
        if !self.phase.is_live() {
            return None;
        }
        let stalled = (self.awaiting && !self.making_durable).then(|| self.last_progress.plus(limits.stall_budget_ms));
        match (self.deadline, stalled) {
            (Some(deadline), Some(stalled)) => Some(deadline.min(stalled)),
            (due, None) | (None, due) => due,
        }
    }

    /// Why it is out of time at `now`, if it is.
    pub(super) fn overdue(&self, now: Millis, limits: &SessionLimits) -> Option<FailureReason> {
        if self.due(limits)? > now {
            None
        } else if self.deadline.is_some_and(|deadline| deadline <= now) {
            Some(FailureReason::DeadlineExceeded)
        } else {
            Some(FailureReason::ProgressStalled)
        }
    }

    /// Starts the stall budget anew; a clock that moves back does not shorten it.
    pub(super) fn touch(&mut self, now: Millis) {
        self.last_progress = self.last_progress.max(now);
    }

    /// Takes in a report of progress; numbers that would move back stay.
    pub(super) fn advance(&mut self, now: Millis, to: Progress) {
        let further = to.achieved > self.progress.achieved || to.base_blocks > self.progress.base_blocks;
        if further {
            self.progress.achieved = self.progress.achieved.max(to.achieved);
            self.progress.base_blocks = self.progress.base_blocks.max(to.base_blocks);
            self.touch(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_moves_is_the_documented_one() {
        // Rows and columns as in the head of this file: idle, issued, running, completed, failed.
        let table = ["xx...", "x.xxx", "x.xxx", "xx...", "xx..."];
        for (&from, row) in Phase::ALL.iter().zip(table) {
            for (&to, cell) in Phase::ALL.iter().zip(row.chars()) {
                let expected = if cell == 'x' { Ok(to) } else { Err(IllegalTransition { from, to }) };
                assert_eq!(transition(from, to), expected, "{from} to {to}");
            }
        }
    }

    #[test]
    fn an_illegal_move_names_both_phases() {
        for &from in Phase::ALL {
            for &to in Phase::ALL {
                if let Err(error) = transition(from, to) {
                    let text = error.to_string();
                    assert!(text.contains(from.as_str()) && text.contains(to.as_str()), "{text}");
                }
            }
        }
    }

    fn session(kind: SessionKind) -> Session {
        Session {
            id: SessionId(1),
            epoch: Epoch(1),
            kind,
            phase: Phase::Running,
            start: Lsn(5),
            target: Lsn(10),
            pin: Lsn(6),
            cut: None,
            progress: Progress { achieved: Lsn(5), base_blocks: 0 },
            deadline: (kind != SessionKind::KeepUp).then_some(Millis(100)),
            last_progress: Millis(10),
            awaiting: kind != SessionKind::KeepUp,
            making_durable: false,
            reason: None,
        }
    }

    const LIMITS: SessionLimits = SessionLimits {
        catch_up_deadline_ms: Millis(100),
        rebuild_deadline_ms: Millis(100),
        stall_budget_ms: Millis(20),
    };

    #[test]
    fn time_runs_out_by_stall_or_by_deadline() {
        let mut catch_up = session(SessionKind::CatchUp);
        assert_eq!(catch_up.overdue(Millis(29), &LIMITS), None);
        assert_eq!(catch_up.overdue(Millis(30), &LIMITS), Some(FailureReason::ProgressStalled));
        catch_up.last_progress = Millis(95);
        assert_eq!(catch_up.overdue(Millis(99), &LIMITS), None);
        assert_eq!(catch_up.overdue(Millis(100), &LIMITS), Some(FailureReason::DeadlineExceeded));
        catch_up.phase = Phase::Failed;
        assert_eq!(catch_up.overdue(Millis::MAX, &LIMITS), None);
    }

    #[test]
    fn a_keep_up_stalls_only_while_its_follower_is_behind_and_never_completes() {
        let mut keep_up = session(SessionKind::KeepUp);
        assert_eq!(keep_up.overdue(Millis::MAX, &LIMITS), None);
        keep_up.awaiting = true;
        assert_eq!(keep_up.overdue(Millis(30), &LIMITS), Some(FailureReason::ProgressStalled));
        assert_eq!(
            keep_up.enter(Phase::Completed),
            Err(IllegalTransition { from: Phase::Running, to: Phase::Completed })
        );
    }

    #[test]
    fn making_a_rebuild_durable_may_take_until_the_deadline() {
        let mut rebuild = session(SessionKind::Rebuild);
        rebuild.making_durable = true;
        assert_eq!(rebuild.overdue(Millis(99), &LIMITS), None);
        assert_eq!(rebuild.overdue(Millis(100), &LIMITS), Some(FailureReason::DeadlineExceeded));
    }

    #[test]
    fn only_growth_is_progress() {
        let mut rebuild = session(SessionKind::Rebuild);
        rebuild.advance(Millis(15), Progress { achieved: Lsn(4), base_blocks: 0 });
        assert_eq!((rebuild.last_progress, rebuild.progress.achieved), (Millis(10), Lsn(5)));
        rebuild.advance(Millis(16), Progress { achieved: Lsn(4), base_blocks: 1 });
        assert_eq!(rebuild.last_progress, Millis(16));
        assert_eq!(rebuild.progress, Progress { achieved: Lsn(5), base_blocks: 1 });
    }
}
