//! Every command in the README is run, in order, in one directory. Its Rust examples are compiled as doc tests.
#![cfg(all(unix, feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::net::free_port;
use common::process::Beside;
use common::until;
use towline::tail::ask_status;
use towline::transport::TcpTransport;

/// Commands that are not run here, with the reason.
const NOT_RUN: [(&str, &str); 2] =
    [("cargo test", "this is it"), ("sleep 3", "the test waits until what it starts is ready")];

/// What stands in the README, and what is run in its place: the binary that was built, for a shorter time and with
/// smaller files.
const REPLACED: [(&str, &str); 3] = [
    ("cargo run --release -- demo", "towline demo --seconds 1 --max-mb 20 --shards 1"),
    ("cargo run --release --", "towline"),
    ("towline leader --dir", "towline leader --segment-size 1048576 --dir"),
];

/// The ports that the README uses: each is free when the test begins.
fn ports(text: &str) -> BTreeMap<String, String> {
    let after = text.split("127.0.0.1:").skip(1);
    let written = after.map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>());
    written.map(|port| (port, free_port().to_string())).collect()
}

/// The `sh` blocks, each a list of commands.
fn blocks(text: &str) -> Vec<Vec<String>> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while lines.by_ref().any(|line| line == "```sh") {
        blocks.push(lines.by_ref().take_while(|line| *line != "```").map(str::to_owned).collect());
    }
    blocks
}

struct Shell<'a> {
    directory: &'a Path,
    path: String,
}

impl Shell<'_> {
    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", line]).current_dir(self.directory).env("PATH", &self.path).env_remove("RUST_LOG");
        // A group of its own, so that a pipeline can be stopped as a whole.
        command.stdin(Stdio::null()).process_group(0);
        command
    }

    fn run(&self, line: &str) {
        let output = self.command(line).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{line}: {:?}\n{out}{err}", output.status.code());
        assert!(!out.is_empty(), "{line} says nothing\n{err}");
        // Else a command that fails in another way than it should would do.
        assert!(!line.contains("exit code") || out.ends_with("exit code 1\n"), "{line}: {out}{err}");
    }

    /// Starts a command that ends with `&`, and waits until it is ready.
    fn start(&self, line: &str) -> Beside {
        let process = Beside::start(&mut self.command(line));
        process.error_line(if line.contains("towline leader") { "leading " } else { "following " });
        process
    }
}

/// Lets those who follow a node catch up, as a reader does who takes a moment to type.
fn settle(upstream: &str, followers: usize) {
    until("the followers have everything", || {
        let Ok(status) = ask_status(&TcpTransport::default(), upstream, Duration::from_secs(10)) else { return false };
        status.shards.iter().all(|shard| {
            let durable = shard.followers.iter().filter(|follower| follower.durable == shard.head);
            shard.head.get() == 5000 && durable.count() == followers
        })
    });
}

#[test]
fn every_command_in_the_readme_works() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let binary = Path::new(env!("CARGO_BIN_EXE_towline")).parent().unwrap();
    let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
    let shell = Shell { directory: directory.path(), path };
    let ports = ports(&readme);
    let mut ran = 0;
    for block in blocks(&readme) {
        let mut beside = Vec::new();
        for line in &block {
            if line.is_empty() || NOT_RUN.iter().any(|(command, _)| command == line) {
                continue;
            }
            let mut line = line.clone();
            for (written, run) in REPLACED {
                line = line.replace(written, run);
            }
            for (written, free) in &ports {
                line = line.replace(&format!("127.0.0.1:{written}"), &format!("127.0.0.1:{free}"));
            }
            assert!(line.contains("towline "), "{line:?} is none of ours, and not on the list of what is not run");
            match line.strip_suffix(" &") {
                Some(line) => beside.push(shell.start(line)),
                None => shell.run(&line),
            }
            ran += 1;
        }
        for (written, free) in &ports {
            let follows = format!("--leader 127.0.0.1:{written} ");
            let is_follower = |line: &&String| line.starts_with("towline follower") && line.contains(&follows);
            let followers = block.iter().filter(is_follower).count();
            if followers > 0 {
                settle(&format!("127.0.0.1:{free}"), followers);
            }
        }
        for mut process in beside {
            let group = format!("-{}", process.id());
            assert!(Command::new("kill").args(["-TERM", "--", &group]).status().unwrap().success());
            process.wait_for_all();
        }
    }
    assert!(ran >= 10, "only {ran} commands were found");
}
