//! `towline tail`.

use std::io::Write;
use std::ops::ControlFlow;

use clap::Args;
use towline::{Lsn, ShardId, ShutdownSignal};

use super::{DONE, Outcome};

/// Print the records of a node's log to standard output, one a line.
///
/// Reads a leader, or a follower that listens. Without --shard, all shards are printed one after the other, each in
/// order; with --follow, as they come. A leader that restarts is waited for, and nothing is printed twice; one that
/// cannot be reached at first is tried for ten seconds, and for ever with --follow.
///
/// Example:  towline tail --leader 127.0.0.1:7400 --shard 0 --from 100 --follow
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Tail {
    /// The node's address
    #[arg(long, value_name = "ADDR")]
    leader: String,
    /// Only this shard
    #[arg(long)]
    shard: Option<u16>,
    /// First LSN to print [default: the oldest retained]
    #[arg(long, value_name = "LSN", default_value_t = 0)]
    from: u64,
    /// Go on with what is appended later
    #[arg(long)]
    follow: bool,
    /// Print shard and LSN before each record
    #[arg(long)]
    lsn: bool,
}

/// What kept a shard from being printed, as it was met: the exit code depends on it.
type Failure = Box<dyn std::error::Error + Send + Sync>;

impl Tail {
    pub(super) fn run(self) -> Outcome {
        let stop = super::stop_at_interrupt()?;
        let shards = match self.shard {
            Some(shard) => vec![ShardId(shard)],
            None => match super::ask_topology(&self.leader, super::FIRST_WAIT, &stop) {
                Err(error) if error.is_shutdown() && stop.is_shutdown() => return Ok(DONE),
                info => (0..info?.shard_count).map(ShardId).collect(),
            },
        };
        if !self.follow || shards.len() == 1 {
            for shard in shards {
                self.print(shard, &stop).map_err(|error| error as Box<dyn std::error::Error>)?;
            }
            return Ok(DONE);
        }
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> = shards
                .iter()
                .map(|&shard| {
                    let stop = stop.clone();
                    let this = &self;
                    scope.spawn(move || {
                        let result = this.print(shard, &stop);
                        if result.is_err() {
                            stop.shutdown();
                        }
                        result
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into())))
                .collect::<Vec<_>>()
        });
        for result in results {
            result.map_err(|error| error as Box<dyn std::error::Error>)?;
        }
        Ok(DONE)
    }

    fn print(&self, shard: ShardId, stop: &ShutdownSignal) -> Result<(), Failure> {
        let tail = towline::Tail { from: Lsn(self.from), follow: self.follow, ..towline::Tail::new(shard) };
        let mut failure = None;
        tail.read(super::tcp().as_ref(), &self.leader, stop, &mut |batch| {
            // One lock a batch: lines of several shards never mix within a line.
            let mut out = std::io::BufWriter::new(std::io::stdout().lock());
            let mut print = || -> std::io::Result<()> {
                for record in batch.records().filter(|record| record.lsn.get() >= self.from) {
                    if self.lsn {
                        write!(out, "{shard}\t{}\t", record.lsn)?;
                    }
                    out.write_all(record.bytes)?;
                    out.write_all(b"\n")?;
                }
                out.flush()
            };
            match print() {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        failure.map_or(Ok(()), |error| Err(error.into()))
    }
}
