//! `towline get`.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::{DONE, FAILED, Outcome, kv};

/// Print a key and its value, from the store of a leader or a follower, running or stopped.
///
/// The output is key, tab, value and a line break. Ends with 1 if there is no such key. What a follower shows is what
/// it has applied.
///
/// Example:  towline get --dir /var/lib/towline-copy boat
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Get {
    /// Data directory of a node
    #[arg(long)]
    dir: PathBuf,
    /// Print the value without the key
    #[arg(long)]
    value: bool,
    /// The key, exactly these bytes
    key: OsString,
}

impl Get {
    pub(super) fn run(self) -> Outcome {
        let store = kv::look_at_store(&self.dir)?.ok_or_else(|| kv::no_store(&self.dir))?;
        // On Unix these are the bytes given.
        let key = self.key.into_encoded_bytes();
        let Some(value) = store.get(&key)? else {
            tell!("towline: there is no key {:?} in {}", String::from_utf8_lossy(&key), self.dir.display());
            return Ok(FAILED);
        };
        let mut out = std::io::stdout().lock();
        if !self.value {
            out.write_all(&key)?;
            out.write_all(b"\t")?;
        }
        out.write_all(&value)?;
        out.write_all(b"\n")?;
        Ok(DONE)
    }
}
