//! Followers in processes of their own, which can be frozen: what a machine does that hangs, not one that goes away.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::scenario::Step;

/// A follower process. Killed when dropped.
pub(super) struct FrozenFollower {
    command: Command,
    child: Child,
}

impl FrozenFollower {
    /// Starts `towline follower`.
    pub(super) fn start(directory: &Path, node: u16, leader: &str, max_wal_bytes: Option<u64>) -> Step<FrozenFollower> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("follower").arg("--dir").arg(directory).args(["--leader", leader]);
        command.args(["--node-id", &node.to_string(), "--max-wal-bytes", &max_wal_bytes.unwrap_or(0).to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn()?;
        Ok(FrozenFollower { command, child })
    }

    /// Stops it in the middle of whatever it does; where there is no such thing, kills it.
    pub(super) fn freeze(&mut self) -> Step<()> {
        if cfg!(unix) {
            return self.signal("-STOP");
        }
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Lets it go on.
    pub(super) fn thaw(&mut self) -> Step<()> {
        if cfg!(unix) {
            return self.signal("-CONT");
        }
        self.child = self.command.spawn()?;
        Ok(())
    }

    /// Asks it to stop, and waits until it has.
    pub(super) fn stop(mut self) -> Step<()> {
        if cfg!(unix) {
            self.signal("-TERM")?;
        } else {
            self.child.kill()?;
        }
        self.child.wait()?;
        Ok(())
    }

    /// Whether it has ended by itself.
    pub(super) fn has_ended(&mut self) -> Step<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    fn signal(&self, signal: &str) -> Step<()> {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status()?;
        if status.success() { Ok(()) } else { Err(format!("kill {signal} {}: {status}", self.child.id()).into()) }
    }
}

impl Drop for FrozenFollower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
