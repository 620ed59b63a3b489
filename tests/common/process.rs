//! Processes of the `towline` command, or of the test binary itself in another role.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};

use super::PATIENCE;

/// The command, with quiet surroundings.
pub fn towline(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_towline"));
    command.args(arguments).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// Runs the command to its end.
pub fn run(arguments: &[&str]) -> Output {
    towline(arguments).output().unwrap()
}

/// The exit code and both outputs, as text.
pub fn outcome(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// A directory's path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Lines of a process's standard error that a failing test shows, at most.
const LAST_WORDS: usize = 40;

/// A process that runs beside the test. It is killed when the test forgets it. If that is because the test fails, the
/// test shows what the process said last.
pub struct Beside {
    child: Child,
    out: Receiver<String>,
    err: Receiver<String>,
}

impl Beside {
    /// Starts it; its outputs are read all the time, so that it never waits for the test.
    pub fn start(command: &mut Command) -> Beside {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let out = lines_of(child.stdout.take().unwrap());
        let err = lines_of(child.stderr.take().unwrap());
        Beside { child, out, err }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().unwrap()
    }

    /// The next line of standard output; `None` at its end.
    pub fn line(&self) -> Option<String> {
        next(&self.out, "standard output")
    }

    /// The lines of standard output that have come and not been taken.
    pub fn lines_so_far(&self) -> Vec<String> {
        self.out.try_iter().collect()
    }

    /// The next line of standard error that begins with `beginning`.
    pub fn error_line(&self, beginning: &str) -> String {
        let mut others = Vec::new();
        loop {
            match next(&self.err, "standard error") {
                Some(line) if line.starts_with(beginning) => return line,
                Some(line) => others.push(line),
                None => panic!("standard error ended without a line that begins with {beginning:?}: {others:#?}"),
            }
        }
    }

    /// Kills it without a chance to do anything, and waits until it is gone. Gives what it still had written.
    pub fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.out.iter().collect()
    }

    /// The same; gives how many lines of standard error that were not taken have `words` in them.
    pub fn kill_and_count(mut self, words: &str) -> usize {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.err.iter().filter(|line| line.contains(words)).count()
    }

    /// Asks it to stop, as a service manager would, and waits for its end.
    #[cfg(unix)]
    pub fn terminate(&mut self) -> ExitStatus {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        self.wait()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "process {} does not end", self.child.id());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until nobody can write to its standard error any more: a shell that is stopped ends before what it has
    /// started.
    pub fn wait_for_all(&mut self) -> ExitStatus {
        while next(&self.err, "standard error").is_some() {}
        self.wait()
    }

    /// Everything on standard output that has not been taken, after its end.
    pub fn rest_of_output(&self) -> Vec<String> {
        self.out.iter().collect()
    }

    /// Everything on standard error that has not been taken, after its end.
    pub fn rest_of_errors(&self) -> Vec<String> {
        self.err.iter().collect()
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let said: Vec<_> = self.err.try_iter().collect();
            let last = said.len().saturating_sub(LAST_WORDS);
            said.iter().skip(last).for_each(|line| eprintln!("process {}: {line}", self.child.id()));
        }
    }
}

fn next(lines: &Receiver<String>, what: &str) -> Option<String> {
    match lines.recv_timeout(PATIENCE) {
        Ok(line) => Some(line),
        Err(error) if error.is_timeout() => panic!("no line on {what} within {PATIENCE:?}"),
        Err(_) => None,
    }
}

fn lines_of(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (to, lines) = unbounded();
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines() {
            let Ok(line) = line else { return };
            if to.send(line).is_err() {
                // Nobody wants to know any more, but the process must not be stopped by a full pipe.
                continue;
            }
        }
    });
    lines
}

/// Starts a leader with arguments beside `leader` and `--listen 127.0.0.1:0`, and gives the address it chose.
pub fn leader(arguments: &[&str]) -> (Beside, String) {
    let mut command = towline(&["leader", "--listen", "127.0.0.1:0"]);
    started(command.args(arguments), " at ", "leading ")
}

/// The same with standard input to write to.
pub fn leader_with_input(arguments: &[&str]) -> (Beside, String) {
    let mut command = towline(&["leader", "--listen", "127.0.0.1:0", "--stdin"]);
    started(command.args(arguments).stdin(Stdio::piped()), " at ", "leading ")
}

/// Starts a follower that listens at a free port, and gives its address.
pub fn follower(arguments: &[&str]) -> (Beside, String) {
    let mut command = towline(&["follower", "--listen", "127.0.0.1:0"]);
    started(command.args(arguments), "listening at ", "following ")
}

fn started(command: &mut Command, before_address: &str, beginning: &str) -> (Beside, String) {
    let process = Beside::start(command);
    let line = process.error_line(beginning);
    let address = line.rsplit_once(before_address).unwrap_or_else(|| panic!("no address in {line:?}")).1;
    (process, address.to_owned())
}
