//! Lines on standard output and standard error, whatever becomes of those.
//!
//! The standard library's macros panic where a line cannot be written. A leader must not end because whoever read its
//! output has left, and a check must end with its own exit code although nobody listens any more.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write, stderr, stdout};
use std::sync::atomic::{AtomicBool, Ordering};

/// A line on standard output.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::output::say(format_args!($($text)*)) };
}

/// A line on standard error.
macro_rules! tell {
    ($($text:tt)*) => { $crate::cli::output::tell(format_args!($($text)*)) };
}

/// Whether something that belongs on standard output could not be written.
static FAILED: AtomicBool = AtomicBool::new(false);

/// Writes a line to standard output. Whoever hangs up has seen enough, as `head` does; any other failure is told once,
/// and the command ends with it if with nothing worse.
pub(super) fn say(line: Arguments<'_>) {
    if let Err(error) = writeln!(stdout(), "{line}")
        && error.kind() != ErrorKind::BrokenPipe
        && !FAILED.swap(true, Ordering::Relaxed)
    {
        tell!("towline: cannot write to standard output: {error}");
    }
}

/// Writes a line to standard error, as well as may be.
pub(super) fn tell(line: Arguments<'_>) {
    let _ = writeln!(stderr(), "{line}");
}

/// Whether a line was lost that somebody might have read.
pub(super) fn has_failed() -> bool {
    FAILED.load(Ordering::Relaxed)
}
