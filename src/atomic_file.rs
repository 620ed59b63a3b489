//! Replacing a small file so that a crash leaves either the old or the new one, whole.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::wal::segment::sync_directory;

/// The temporary file has a fixed name, so that a crash leaves at most one behind, which the next call overwrites.
/// So one call at a time; they are few and short.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Makes `bytes` the content of the file at `path`, which need not exist: writes `<path>.tmp`, syncs it, renames it and
/// syncs the directory.
///
/// # Errors
///
/// [`Error::Io`]. The old content is then still there, except if the directory could not be synced: then the new
/// content is there, but may be gone after a power failure.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let _turn = ONE_AT_A_TIME.lock();
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = Path::new(&temporary);
    let written = write_synced(temporary, bytes)
        .and_then(|()| fs::rename(temporary, path).map_err(Error::io("put the new content in the place of", path)));
    if written.is_err() {
        // What matters is the error above.
        let _ = fs::remove_file(temporary);
        return written;
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    sync_directory(directory).map_err(Error::io("sync", directory))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io("create", path))?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_replaced_and_nothing_is_left_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(directory.path().join("file.tmp"), b"left behind by a crash, and longer").unwrap();
        for content in [&b"first"[..], b"", b"third"] {
            replace(&path, content).unwrap();
            assert_eq!(fs::read(&path).unwrap(), content);
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_keeps_the_old_content_and_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        // A directory with something in it cannot be renamed over.
        let path = directory.path().join("taken");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("old"), b"old").unwrap();
        let error = replace(&path, b"new").unwrap_err();
        assert!(error.to_string().contains("taken"), "{error}");
        assert_eq!(fs::read(path.join("old")).unwrap(), b"old");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(matches!(replace(&directory.path().join("no/such"), b""), Err(Error::Io { action: "create", .. })));
    }

    #[test]
    fn concurrent_replacements_do_not_mix() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::thread::scope(|scope| {
            for byte in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..10 {
                        replace(path, &vec![byte; 1000 + usize::from(byte)]).unwrap();
                    }
                });
            }
        });
        let content = fs::read(&path).unwrap();
        assert_eq!(content, vec![content[0]; 1000 + usize::from(content[0])]);
    }
}
