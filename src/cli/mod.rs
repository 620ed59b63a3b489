//! The command line: one file a command.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 3 damage or a difference found.

// First, for its macros.
#[macro_use]
mod output;

mod bench;
mod demo;
mod follower;
mod get;
mod input;
mod inspect;
mod kv;
mod leader;
mod lines;
mod progress;
mod repair;
mod scan;
mod status;
mod tail;
mod verify;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand};
use towline::ShutdownSignal;
use towline::transport::{TcpOptions, TcpTransport};
use towline::wire::ShardInfo;

/// Done.
const DONE: u8 = 0;
/// Failed.
const FAILED: u8 = 1;
/// Wrong usage, which the parser of the command line could not see.
const WRONG_USAGE: u8 = 2;
/// Damage or a difference found.
const FOUND_DAMAGE: u8 = 3;

/// What a command ends with: an exit code, or a failure to report.
type Outcome = Result<u8, Box<dyn std::error::Error>>;

/// A sharded write-ahead log, towed to its followers.
#[derive(Parser)]
#[command(name = "towline", version, about, long_about = None, arg_required_else_help = true)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 damage or a difference found.\n\
    Set RUST_LOG=info (or debug) to see what the threads do.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Demo),
    Leader(leader::Leader),
    Follower(follower::Follower),
    Tail(tail::Tail),
    Get(get::Get),
    Scan(scan::Scan),
    Status(status::Status),
    Inspect(inspect::Inspect),
    Verify(verify::Verify),
    Repair(repair::Repair),
    Bench(bench::Bench),
}

/// Reads the command line and does what it says.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    // What is measured includes nodes that are killed: what their leader says of that is nothing to look into.
    let filter = if matches!(cli.command, Command::Bench(_)) { "warn,towline::server=error" } else { "warn" };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(filter)).init();
    let outcome = match cli.command {
        Command::Demo(command) => command.run(),
        Command::Leader(command) => command.run(),
        Command::Follower(command) => command.run(),
        Command::Tail(command) => command.run(),
        Command::Get(command) => command.run(),
        Command::Scan(command) => command.run(),
        Command::Status(command) => command.run(),
        Command::Inspect(command) => command.run(),
        Command::Verify(command) => command.run(),
        Command::Repair(command) => command.run(),
        Command::Bench(command) => command.run(),
    };
    match outcome {
        Ok(code) => ExitCode::from(if output::has_failed() { code.max(FAILED) } else { code }),
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::from(DONE),
        Err(error) => {
            tell!("towline: {error}");
            ExitCode::from(match error.downcast_ref::<towline::Error>() {
                Some(error) if error.is_corruption() => FOUND_DAMAGE,
                // What was asked for makes no sense, whatever the disk or the network say.
                Some(towline::Error::Invalid { .. }) => WRONG_USAGE,
                _ => FAILED,
            })
        }
    }
}

/// Whoever reads our output has seen enough, as `head` does.
fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// A signal that Ctrl-C and a polite kill give.
fn stop_at_interrupt() -> Result<ShutdownSignal, ctrlc::Error> {
    let stop = ShutdownSignal::new();
    let signal = stop.clone();
    ctrlc::set_handler(move || signal.shutdown())?;
    Ok(stop)
}

/// What the checkpoint and the manifest of a node's directory say about what was synced of a shard.
fn known_synced(
    directory: &std::path::Path,
    manifest: &towline::data_dir::Manifest,
    shard: towline::ShardId,
) -> towline::Result<towline::wal::KnownSynced> {
    let path = directory.join(towline::replication::CHECKPOINT_FILE_NAME);
    let checkpoint = towline::Checkpoint::load(&path)?.unwrap_or_default();
    let lsn = checkpoint.entries.get(&shard).map(|entry| entry.synced).unwrap_or_default();
    Ok(towline::wal::KnownSynced { lsn, written_here: towline::wal::WrittenHere::by(manifest) })
}

/// Plain TCP with the usual settings.
fn tcp() -> Arc<TcpTransport> {
    Arc::new(TcpTransport::new(TcpOptions::default()))
}

/// How long to wait before a node is asked again, unless it is said otherwise.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Waits double, up to the first times this.
const LONGEST_WAIT: u32 = 30;

/// Asks what a node's log is made of, until the node answers.
fn ask_topology(address: &str, first_wait: Duration, stop: &ShutdownSignal) -> towline::Result<ShardInfo> {
    let mut wait = first_wait;
    loop {
        match towline::tail::ask_topology_until(tcp().as_ref(), address, Duration::from_secs(10), stop) {
            Ok(info) => return Ok(info),
            Err(_) if stop.is_shutdown() => return Err(towline::Error::ShutDown),
            Err(error) if error.is_permanent() || error.is_unresolved() => return Err(error),
            Err(error) => tell!("towline: {error}; trying again in {:.1} s", wait.as_secs_f32()),
        }
        if stop.wait_timeout(wait) {
            return Err(towline::Error::ShutDown);
        }
        wait = (wait * 2).min(first_wait * LONGEST_WAIT);
    }
}

/// Bytes for people.
fn human_bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
