//! `towline scan`.

use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::Args;
use towline::status::json_text;
use towline::target::Entry;

use super::{DONE, Outcome, kv};

/// Print every key and its value, from the store of a leader or a follower, running or stopped.
///
/// Each line is a key, a tab and its value, in no order that means anything. Of a store that is being written to, each
/// line was true at some moment during the look.
///
/// Example:  towline scan --dir /var/lib/towline-copy --limit 10
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Scan {
    /// Data directory of a node
    #[arg(long)]
    dir: PathBuf,
    /// Stop after this many
    #[arg(long, value_name = "KEYS")]
    limit: Option<u64>,
    /// Print one JSON object a line: shard, slot, LSN, key and value (bytes that are no UTF-8 are replaced)
    #[arg(long)]
    json: bool,
}

impl Scan {
    pub(super) fn run(self) -> Outcome {
        let store = kv::look_at_store(&self.dir)?.ok_or_else(|| kv::no_store(&self.dir))?;
        let mut out = BufWriter::new(std::io::stdout().lock());
        let mut left = self.limit.unwrap_or(u64::MAX);
        let mut failure = None;
        store.scan(|entry| {
            if left == 0 {
                return ControlFlow::Break(());
            }
            left -= 1;
            match self.print(&mut out, entry) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        failure.map_or(Ok(()), Err)?;
        out.flush()?;
        Ok(DONE)
    }

    fn print(&self, out: &mut impl Write, entry: Entry<'_>) -> std::io::Result<()> {
        if self.json {
            let text = |bytes| json_text(&String::from_utf8_lossy(bytes));
            return writeln!(
                out,
                "{{\"shard\":{},\"slot\":{},\"lsn\":{},\"key\":{},\"value\":{}}}",
                entry.shard,
                entry.slot,
                entry.lsn,
                text(entry.key),
                text(entry.value)
            );
        }
        out.write_all(entry.key)?;
        out.write_all(b"\t")?;
        out.write_all(entry.value)?;
        out.write_all(b"\n")
    }
}
