//! The lock by which a directory is one owner's at a time: of a node, of a log, of a store.
//!
//! It goes with its file, also when the process is killed. A process that another thread starts meanwhile holds all
//! locks of this one from when it is forked until it runs its program, which closes their files: so a lock that was let
//! go of here can be taken for a moment more, and whoever takes it has the patience for that.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Its file.
pub(crate) const LOCK_FILE: &str = "LOCK";

/// For so long a lock may be a process's that is about to run another program. Measured where it came up, with two busy
/// processors: in two of 25 runs of tests that start processes while others open logs.
const FORKED: Duration = Duration::from_millis(200);

/// Takes the lock of a directory, whose file is made if it is not there.
///
/// # Errors
///
/// [`Error::InUse`] if somebody else has it; [`Error::Io`].
pub(crate) fn lock_directory(directory: &Path) -> Result<File> {
    let path = directory.join(LOCK_FILE);
    let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
    let file = file.map_err(Error::io("open", &path))?;
    let until = Instant::now() + FORKED;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
            Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: directory.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(Error::io("lock", &path)(source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_has_one_owner_and_is_waited_for_a_moment() {
        let directory = tempfile::tempdir().unwrap();
        let lock = lock_directory(directory.path()).unwrap();
        let error = lock_directory(directory.path()).unwrap_err();
        assert!(matches!(&error, Error::InUse { path } if path == directory.path()), "{error}");
        // As a process does that was forked meanwhile.
        let inherited = lock.try_clone().unwrap();
        drop(lock);
        std::thread::scope(|scope| {
            let locking = scope.spawn(|| lock_directory(directory.path()));
            std::thread::sleep(Duration::from_millis(5));
            drop(inherited);
            locking.join().unwrap().unwrap();
        });
    }
}
