//! PostgreSQL with one streaming standby, driven by its own programs: messages in its log, which change no table.
//! `ship` writes them in one statement and waits until the standby has them on disk and replayed; `commit` is a
//! transaction of one message with `synchronous_commit = remote_write` (leader synced, and the standby's memory), timed
//! by `pgbench`.
//!
//! It refuses to run as root: there its programs run as the user `postgres`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use super::{Peer, free_port, is_installed};
use crate::Result;
use crate::contest::Sample;

const PROGRAMS: [&str; 5] = ["initdb", "pg_ctl", "pg_basebackup", "psql", "pgbench"];

pub(super) const PEER: Peer = Peer {
    name: "postgresql",
    ship: |directory, record, count| {
        let pair = Pair::start(directory, "off")?;
        let statement = format!(
            "SELECT count(pg_logical_emit_message(false, 'b', repeat('x', {}))) FROM generate_series(1, {count})",
            record.len()
        );
        let began = Instant::now();
        pair.ask(&statement)?;
        // Another one, that waits until the standby has replayed all before it.
        pair.ask("SET synchronous_commit = remote_apply; SELECT pg_logical_emit_message(true, 'b', 'the last')")?;
        let megabytes = (count * record.len() as u64) as f64 / 1e6;
        Ok(Sample { value: megabytes / began.elapsed().as_secs_f64(), extra: Vec::new() })
    },
    commit: |directory, record, count| {
        let pair = Pair::start(directory, "remote_write")?;
        let script = pair.place.join("one.sql");
        std::fs::write(
            &script,
            format!("SELECT pg_logical_emit_message(true, 'b', repeat('x', {}));\n", record.len()),
        )?;
        let log = pair.place.join("latencies");
        let mut bench = pair.command("pgbench");
        bench.args(["--no-vacuum", "--client", "1", "--protocol", "prepared", "--log"]);
        bench.arg("--log-prefix").arg(&log).arg("--transactions").arg((count + count / 10).to_string());
        bench.arg("--file").arg(&script).arg("postgres");
        run(bench)?;
        let mut microseconds = Vec::new();
        for entry in std::fs::read_dir(&pair.place)? {
            let path = entry?.path();
            if !path.to_string_lossy().contains("latencies") {
                continue;
            }
            // Client, transaction, microseconds, and more.
            for line in std::fs::read_to_string(path)?.lines().skip(usize::try_from(count / 10)?) {
                microseconds.push(line.split(' ').nth(2).ok_or("a line without a latency")?.parse::<f64>()?);
            }
        }
        microseconds.sort_by(f64::total_cmp);
        let at = |share: f64| microseconds.get(((microseconds.len() as f64 - 1.0) * share) as usize).copied();
        let value = at(0.5).ok_or("pgbench wrote no latencies")?;
        let extra = [("p99", at(0.99)), ("p999", at(0.999)), ("max_us", at(1.0))];
        Ok(Sample { value, extra: extra.into_iter().filter_map(|(name, us)| Some((name, us?))).collect() })
    },
    missing: || {
        if let Some(program) = PROGRAMS.iter().find(|program| !is_installed(program)) {
            return Some(format!("there is no {program}"));
        }
        (is_root() && !is_installed("runuser")).then(|| "it does not run as root, and there is no runuser".to_owned())
    },
};

/// Running servers, ended when it is dropped.
struct Pair {
    place: PathBuf,
    port: u16,
    started: Vec<PathBuf>,
}

impl Pair {
    fn start(directory: &Path, synchronous_commit: &str) -> Result<Pair> {
        let place = directory.join("postgres");
        std::fs::create_dir_all(&place)?;
        if is_root() {
            // The way there must be open too: temporary directories are their owner's alone.
            for above in directory.ancestors().take(2) {
                let mut open = Command::new("chmod");
                open.arg("a+rx").arg(above);
                run(open)?;
            }
            let mut give = Command::new("chown");
            give.arg("postgres").arg(&place);
            run(give)?;
        }
        let port = free_port()?;
        let (leader, follower) = (place.join("leader"), place.join("follower"));
        let mut pair = Pair { place, port, started: Vec::new() };
        let mut make = as_user("initdb", &pair.place);
        make.args(["--auth", "trust", "--username", "postgres", "--pgdata"]).arg(&leader);
        run(make)?;
        let common = format!(
            "listen_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\nwal_level = replica\nmax_wal_senders = 4\n\
             max_wal_size = 8GB\nwal_keep_size = 4GB\n",
            pair.place.display()
        );
        let own =
            format!("port = {port}\nsynchronous_standby_names = '*'\nsynchronous_commit = {synchronous_commit}\n");
        append(&leader.join("postgresql.conf"), &(common.clone() + &own))?;
        pair.start_server(leader)?;
        let mut copy = pair.command("pg_basebackup");
        copy.args(["--checkpoint", "fast", "--write-recovery-conf", "--pgdata"]).arg(&follower);
        run(copy)?;
        append(
            &follower.join("postgresql.conf"),
            &format!("port = {}\nsynchronous_standby_names = ''\n", free_port()?),
        )?;
        pair.start_server(follower)?;
        pair.ask("SET synchronous_commit = remote_apply; SELECT pg_logical_emit_message(true, 'b', 'the first')")?;
        Ok(pair)
    }

    fn start_server(&mut self, data: PathBuf) -> Result<()> {
        let mut start = as_user("pg_ctl", &self.place);
        start.args(["start", "--wait", "--silent", "--log"]).arg(data.with_extension("log")).arg("--pgdata").arg(&data);
        // Before it is known to be up: what is half up must be ended too.
        self.started.push(data);
        run(start)
    }

    /// One of its programs, told which server to talk to.
    fn command(&self, program: &str) -> Command {
        let mut command = as_user(program, &self.place);
        command.args(["--host", "127.0.0.1", "--port", &self.port.to_string(), "--username", "postgres"]);
        command
    }

    fn ask(&self, statement: &str) -> Result<()> {
        let mut psql = self.command("psql");
        psql.args(["--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", "--command", statement, "postgres"]);
        run(psql)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for data in self.started.iter().rev() {
            let mut stop = as_user("pg_ctl", &self.place);
            stop.args(["stop", "--mode", "immediate", "--silent", "--pgdata"]).arg(data);
            if let Err(error) = run(stop) {
                eprintln!("postgresql was not stopped: {error}");
            }
        }
    }
}

fn is_root() -> bool {
    let uid = Command::new("id").arg("-u").output();
    uid.is_ok_and(|uid| uid.stdout.trim_ascii() == b"0")
}

fn as_user(program: &str, place: &Path) -> Command {
    let mut command = if is_root() {
        let mut command = Command::new("runuser");
        command.args(["-u", "postgres", "--", program]);
        command
    } else {
        Command::new(program)
    };
    command.current_dir(place);
    command
}

fn append(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    Ok(std::fs::File::options().append(true).open(path)?.write_all(text.as_bytes())?)
}

/// Runs it to its end. What it writes to standard error goes to a file: a server that it leaves behind would hold a
/// pipe open for ever.
fn run(mut command: Command) -> Result<()> {
    use std::io::{Read, Seek};
    let mut complaints = tempfile::tempfile()?;
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(complaints.try_clone()?).status()?;
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    complaints.rewind()?;
    complaints.read_to_string(&mut text)?;
    Err(format!("{}: {status}: {}", command.get_program().to_string_lossy(), text.trim_end()).into())
}
