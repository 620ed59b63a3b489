//! Small files that are replaced as a whole: after a crash there is the old content or the new, never a mixture.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};
use crate::wal::segment::sync_directory;

/// Replaces the content of `path`, durably: writes `<path>.tmp`, syncs it, renames it and syncs the directory. A crash
/// may leave the temporary file behind, never a half-written `path`.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = OsString::from(path);
    temporary.push(".tmp");
    let temporary = Path::new(&temporary);
    let mut file = File::create(temporary).map_err(Error::io("create", temporary))?;
    file.write_all(bytes).map_err(Error::io("write", temporary))?;
    file.sync_all().map_err(Error::io("sync", temporary))?;
    drop(file);
    std::fs::rename(temporary, path).map_err(Error::io("replace", path))?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sync_directory(directory).map_err(Error::io("sync", directory))
}
