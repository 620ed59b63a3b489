//! One leader and one follower on loopback: live shipping, from the first write to the last record at the follower, and
//! one record at a time until the follower has it.
//!
//! Not all mean the same by that; README.md has what each acknowledges.

mod armdb;
mod postgres;
mod redis;
mod towline;

use std::path::Path;

use crate::contest::{Contest, Sample, Unit};
use crate::logs::scratch;
use crate::{Options, Result, record};

/// `count` records from a leader to a follower, in megabytes a second.
type Ship = fn(&Path, &[u8], u64) -> Result<Sample>;
/// `count` records, each until the follower has it, in microseconds.
type Commit = fn(&Path, &[u8], u64) -> Result<Sample>;

struct Peer {
    name: &'static str,
    ship: Ship,
    commit: Commit,
    /// Why it cannot take part here.
    missing: fn() -> Option<String>,
}

const PEERS: [Peer; 4] = [towline::PEER, armdb::PEER, redis::PEER, postgres::PEER];

/// Those that take part; of the others, why not.
fn peers(options: &Options) -> Vec<&'static Peer> {
    let mut peers = Vec::new();
    for peer in PEERS.iter().filter(|peer| options.takes_part(peer.name)) {
        match (peer.missing)() {
            Some(reason) => eprintln!("{} skipped: {reason}", peer.name),
            None => peers.push(peer),
        }
    }
    peers
}

pub(crate) fn ship(options: &Options, root: &Path) -> Result<()> {
    let peers = peers(options);
    for size in options.record_sizes() {
        let (record, count) = (record(size), options.count(256 << 20, 8 << 20, size));
        let mut contest = Contest::new("ship", size, Unit::MegabytesPerSecond);
        for peer in &peers {
            let record = &record;
            contest.add(peer.name, move || (peer.ship)(scratch(root)?.path(), record, count));
        }
        contest.run(options)?;
    }
    Ok(())
}

pub(crate) fn commit(options: &Options, root: &Path) -> Result<()> {
    let peers = peers(options);
    for size in options.record_sizes() {
        let (record, count) = (record(size), if options.quick { 200 } else { 4000 });
        let mut contest = Contest::new("commit", size, Unit::Microseconds);
        for peer in &peers {
            let record = &record;
            contest.add(peer.name, move || (peer.commit)(scratch(root)?.path(), record, count));
        }
        contest.run(options)?;
    }
    Ok(())
}

/// Whether a program can be started.
fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// A port on loopback that nobody listens at, for servers that must be told one.
fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A server, ended when it is dropped.
struct Server(std::process::Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Tries until it works, for at most half a minute: for servers that say nowhere when they are ready.
fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    loop {
        if let Some(done) = attempt() {
            return Ok(done);
        }
        if std::time::Instant::now() > deadline {
            return Err(format!("{what}: nothing within 30 s").into());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
