//! Towline beside other logs: the same work, on the same disk, in interleaved rounds of one run.
//!
//! ```text
//! cargo run --release -- all --quick
//! cargo run --release -- sync --record-size 128 1024 --rounds 9 --json --dir /data
//! ```
//!
//! Workloads: `append` (nobody waits), `sync` (one writer that waits for stable storage), `group` (4 and 32 threads
//! that do), `recover` (opening and counting what is there), `ship` (to one follower), `commit` (one record at a time
//! until a follower has it), `all`. What each peer is, what it promises and what was found wrong with it stands in
//! README.md.

mod contest;
mod load;
mod logs;
mod replication;

use std::path::PathBuf;
use std::process::ExitCode;

/// Whatever went wrong.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

const WORKLOADS: [&str; 7] = ["append", "sync", "group", "recover", "ship", "commit", "all"];
const USAGE: &str = "usage: towline-peers append|sync|group|recover|ship|commit|all \
[--quick] [--json] [--rounds N] [--record-size BYTES...] [--dir DIR] [--only NAME...]";

/// What was asked for.
pub(crate) struct Options {
    workload: String,
    pub(crate) quick: bool,
    pub(crate) json: bool,
    pub(crate) rounds: u32,
    record_sizes: Vec<usize>,
    /// Peers to run; all if empty.
    only: Vec<String>,
    pub(crate) directory: PathBuf,
}

impl Options {
    fn parse(arguments: impl Iterator<Item = String>) -> Result<Options> {
        let mut arguments = arguments.peekable();
        let workload = arguments.next().filter(|name| WORKLOADS.contains(&name.as_str())).ok_or(USAGE)?;
        let mut options = Options {
            workload,
            quick: false,
            json: false,
            rounds: 0,
            record_sizes: Vec::new(),
            only: Vec::new(),
            directory: std::env::temp_dir(),
        };
        while let Some(argument) = arguments.next() {
            let mut values = || {
                let mut values = Vec::new();
                while let Some(value) = arguments.next_if(|next| !next.starts_with("--")) {
                    values.push(value);
                }
                values
            };
            match argument.as_str() {
                "--quick" => options.quick = true,
                "--json" => options.json = true,
                "--rounds" => options.rounds = values().first().ok_or(USAGE)?.parse()?,
                "--record-size" => {
                    options.record_sizes = values().iter().map(|size| size.parse()).collect::<Result<_, _>>()?;
                }
                "--only" => options.only = values(),
                "--dir" => options.directory = values().first().ok_or(USAGE)?.into(),
                _ => return Err(USAGE.into()),
            }
        }
        if options.rounds == 0 {
            options.rounds = if options.quick { 3 } else { 5 };
        }
        Ok(options)
    }

    fn wants(&self, workload: &str) -> bool {
        self.workload == workload || self.workload == "all"
    }

    pub(crate) fn takes_part(&self, name: &str) -> bool {
        name == contest::OURS || self.only.is_empty() || self.only.iter().any(|only| name.starts_with(only.as_str()))
    }

    pub(crate) fn record_sizes(&self) -> Vec<usize> {
        match (&self.record_sizes[..], self.quick) {
            ([], true) => vec![1024],
            ([], false) => vec![128, 1024, 16 * 1024],
            (sizes, _) => sizes.to_vec(),
        }
    }

    /// Records of a round.
    pub(crate) fn count(&self, full_bytes: usize, quick_bytes: usize, size: usize) -> u64 {
        ((if self.quick { quick_bytes } else { full_bytes }) / size).max(1) as u64
    }
}

/// A record that does not compress and is not all zeros.
pub(crate) fn record(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    });
    bytes.take(size).collect()
}

fn main() -> ExitCode {
    let run = || -> Result<()> {
        let options = Options::parse(std::env::args().skip(1))?;
        let root = tempfile::Builder::new().prefix("towline-peers-").tempdir_in(&options.directory)?;
        logs::walrus::keep_quiet_in(root.path());
        if options.wants("append") {
            logs::append(&options, root.path())?;
        }
        if options.wants("sync") {
            logs::sync(&options, root.path())?;
        }
        if options.wants("group") {
            logs::group(&options, root.path())?;
        }
        if options.wants("recover") {
            logs::recover(&options, root.path())?;
        }
        if options.wants("ship") {
            replication::ship(&options, root.path())?;
        }
        if options.wants("commit") {
            replication::commit(&options, root.path())?;
        }
        Ok(())
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
