//! Keys and values from the command line: a leader's store, its followers' stores, and looking at them.
#![cfg(all(unix, feature = "cli"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};

use common::net::free_port;
use common::until;
use towline::target::{FixedStore, FixedStoreOptions};

type Model = BTreeMap<String, String>;

fn towline(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_towline"));
    command.args(arguments).env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a command with standard input to its end: code, standard output, standard error.
fn run(arguments: &[&str], input: &[u8]) -> (i32, String, String) {
    let mut child = towline(arguments).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A command that stops reading breaks the pipe: that is its right.
    let feeding = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    feeding.join().unwrap();
    (status.code().unwrap_or(-1), String::from_utf8_lossy(&stdout).into(), String::from_utf8_lossy(&stderr).into())
}

/// A node that runs beside the test; killed when the test forgets it.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Running {
        Running(command.spawn().unwrap())
    }

    /// The next line on standard error that begins so.
    fn says(&mut self, beginning: &str) -> String {
        let mut line = String::new();
        // Byte by byte: what comes later belongs to the next call.
        for byte in BufReader::with_capacity(1, self.0.stderr.as_mut().unwrap()).bytes() {
            match byte.unwrap() {
                b'\n' if line.starts_with(beginning) => return line,
                b'\n' => line.clear(),
                byte => line.push(char::from(byte)),
            }
        }
        panic!("it ended without saying {beginning:?}, last {line:?}")
    }

    /// The next line on standard output.
    fn prints(&mut self) -> String {
        let mut line = String::new();
        BufReader::with_capacity(1, self.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() {
            let mut error = String::new();
            self.0.stderr.take().unwrap().read_to_string(&mut error).unwrap();
            panic!("it ends and prints nothing: {error}");
        }
        line.trim_end().to_owned()
    }

    /// Ctrl-C; gives the exit code.
    fn interrupt(mut self) -> i32 {
        assert!(Command::new("kill").args(["-INT", &self.0.id().to_string()]).status().unwrap().success());
        self.0.wait().unwrap().code().unwrap_or(-1)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a leader in `directory` and feeds it from a pipe: the leader, its address, and the pipe.
fn lead(directory: &Path, more: &[&str]) -> (Running, String, ChildStdin) {
    let mut arguments = vec!["leader", "--dir", text(directory), "--listen", "127.0.0.1:0", "--stdin"];
    arguments.extend(more);
    let mut leader = Running::start(towline(&arguments).stdin(Stdio::piped()));
    let address = leader.says("leading ").rsplit_once(" at ").unwrap().1.to_owned();
    let stdin = leader.0.stdin.take().unwrap();
    (leader, address, stdin)
}

fn follow(directory: &Path, address: &str) -> Running {
    let mut follower = Running::start(&mut towline(&["follower", "--dir", text(directory), "--leader", address]));
    follower.says("following ");
    follower
}

/// Puts, overwrites and deletes, some of keys that are not there; the model follows.
fn changes(seed: u64, count: u64, model: &mut Model) -> Vec<u8> {
    let mut lines = Vec::new();
    let mut state = seed;
    for number in 0..count {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let key = format!("key-{}", (state >> 33) % 1500);
        if (state >> 20).is_multiple_of(5) {
            model.remove(&key);
            writeln!(lines, "{key}").unwrap();
        } else {
            let value = format!("value {seed}-{number}");
            writeln!(lines, "{key}\t{value}").unwrap();
            model.insert(key, value);
        }
    }
    lines
}

fn scan(directory: &Path) -> Model {
    let (code, out, error) = run(&["scan", "--dir", text(directory)], b"");
    assert_eq!(code, 0, "{error}");
    let pairs: Vec<_> = out.lines().map(|line| line.split_once('\t').unwrap()).collect();
    let model: Model = pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
    assert_eq!(model.len(), pairs.len(), "a key was shown twice");
    model
}

fn get(directory: &Path, key: &str) -> Option<String> {
    let (code, out, error) = run(&["get", "--dir", text(directory), key], b"");
    match code {
        0 => Some(out.trim_end_matches('\n').strip_prefix(&format!("{key}\t")).unwrap().to_owned()),
        _ => {
            assert!(code == 1 && out.is_empty() && error.contains("there is no key"), "{code} {out} {error}");
            None
        }
    }
}

fn assert_committed(line: &str, level: &str) {
    let words: Vec<_> = line.split(' ').collect();
    assert_eq!((words[0], words[1], words[3], words[4]), (words[2], "of", "records", "committed"), "{line}");
    assert!(line.contains(level), "{line}");
}

#[test]
fn stores_of_leader_and_followers_hold_what_was_written_and_do_so_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let nodes: Vec<PathBuf> = ["l", "f1", "f2"].map(|name| directory.path().join(name)).into();
    let mut model = Model::new();
    let options = ["--kv", "16:32", "--shards", "3", "--commit", "applied:2"];

    let (mut leader, address, mut stdin) = lead(&nodes[0], &options);
    let followers = [follow(&nodes[1], &address), follow(&nodes[2], &address)];
    stdin.write_all(&changes(1, 6000, &mut model)).unwrap();
    drop(stdin);
    assert_committed(&leader.prints(), "applied:2");
    assert!(model.len() > 500);
    // All three run.
    for node in &nodes {
        assert_eq!(scan(node), model, "{}", node.display());
        let (held, gone) = (model.keys().next().unwrap(), "key-none");
        assert_eq!((get(node, held).as_ref(), get(node, gone)), (model.get(held), None));
    }
    for node in followers {
        assert_eq!(node.interrupt(), 0);
    }
    assert_eq!(leader.interrupt(), 0);
    for node in &nodes {
        assert_eq!(scan(node), model, "{}", node.display());
    }

    // The stores know what they were made for, and a follower starts before its leader can be reached.
    let port = format!("127.0.0.1:{}", free_port());
    let followers = [follow(&nodes[1], &port), follow(&nodes[2], &port)];
    let mut leader = Running::start(
        towline(&["leader", "--dir", text(&nodes[0]), "--listen", &port, "--stdin", "--commit", "applied:2"])
            .stdin(Stdio::piped()),
    );
    leader.0.stdin.take().unwrap().write_all(&changes(2, 3000, &mut model)).unwrap();
    assert_committed(&leader.prints(), "applied:2");
    for node in &nodes {
        assert_eq!(scan(node), model, "{}", node.display());
    }
    for node in followers {
        assert_eq!(node.interrupt(), 0);
    }
    assert_eq!(leader.interrupt(), 0);
    let (code, out, _) = run(&["verify", text(&nodes[0]), text(&nodes[1]), text(&nodes[2])], b"");
    assert_eq!(code, 0, "{out}");
}

#[test]
fn looking_at_running_nodes_shows_only_what_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let nodes = ["l", "f"].map(|name| directory.path().join(name));
    let (mut leader, address, mut stdin) = lead(&nodes[0], &["--kv", "16:32", "--commit", "applied:1"]);
    let follower = follow(&nodes[1], &address);
    let mut written: HashMap<String, HashSet<String>> = HashMap::new();
    let mut model = Model::new();
    for seed in 0..20 {
        let lines = changes(seed, 2000, &mut model);
        for (key, value) in String::from_utf8_lossy(&lines).lines().filter_map(|line| line.split_once('\t')) {
            written.entry(key.to_owned()).or_default().insert(value.to_owned());
        }
        stdin.write_all(&lines).unwrap();
        let node = &nodes[usize::try_from(seed % 2).unwrap()];
        let (code, out, error) = run(&["scan", "--dir", text(node)], b"");
        assert_eq!(code, 0, "{error}");
        for (key, value) in out.lines().map(|line| line.split_once('\t').unwrap()) {
            assert!(written[key].contains(value), "{key} never was {value:?}");
        }
        if let Some(value) = get(node, "key-7") {
            assert!(written["key-7"].contains(&value), "key-7 never was {value:?}");
        }
    }
    drop(stdin);
    assert_committed(&leader.prints(), "applied:1");
    assert_eq!((scan(&nodes[0]), scan(&nodes[1])), (model.clone(), model));
    assert_eq!((follower.interrupt(), leader.interrupt()), (0, 0));
}

#[test]
fn nodes_killed_under_load_agree_again_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let nodes = ["l", "f"].map(|name| directory.path().join(name));
    let shape = ["--kv", "16:32", "--shards", "2", "--commit", "applied:1"];
    let (mut leader, address, mut stdin) = lead(&nodes[0], &shape);
    let mut follower = follow(&nodes[1], &address);
    let mut written = HashSet::new();
    // More than is read before the end: the pipe breaks, and that is the point.
    let lines = changes(9, 400_000, &mut Model::new());
    written.extend(String::from_utf8_lossy(&lines).lines().map(str::to_owned));
    let feeding = std::thread::spawn(move || drop(stdin.write_all(&lines)));
    // Beside a node that changes it, a key that moves from one slot to another can be seen in both.
    until("it shows", || !run(&["scan", "--dir", text(&nodes[1])], b"").1.is_empty());
    follower.0.kill().unwrap();
    leader.0.kill().unwrap();
    feeding.join().unwrap();
    drop((leader, follower));

    let (mut leader, address, mut stdin) = lead(&nodes[0], &shape);
    let follower = follow(&nodes[1], &address);
    stdin.write_all(b"after\tthe crash\n").unwrap();
    drop(stdin);
    assert_committed(&leader.prints(), "applied:1");
    assert_eq!((follower.interrupt(), leader.interrupt()), (0, 0));
    let (here, there) = (scan(&nodes[0]), scan(&nodes[1]));
    assert_eq!(here, there);
    assert_eq!(get(&nodes[1], "after").as_deref(), Some("the crash"));
    for (key, value) in here.iter().filter(|(key, _)| *key != "after") {
        assert!(written.contains(&format!("{key}\t{value}")), "{key} never was {value:?}");
    }
    let (code, out, _) = run(&["verify", text(&nodes[0]), text(&nodes[1])], b"");
    assert_eq!(code, 0, "{out}");
}

#[test]
fn scenarios_of_the_demo_are_proven() {
    for scenario in ["catch-up", "rebuild", "slow-follower"] {
        let directory = tempfile::tempdir().unwrap();
        let common = ["demo", "--seconds", "1", "--max-mb", "3", "--shards", "2", "--dir", text(directory.path())];
        let (code, out, error) = run(&[&common[..], &["--scenario", scenario, "--json"]].concat(), b"");
        assert_eq!(code, 0, "{out}{error}");
        assert!(out.starts_with(&format!("{{\"scenario\":\"{scenario}\",\"records\":")), "{out}");
        assert!(out.ends_with("\"verified\":true}\n") && out.matches("\"store_equal\":true").count() == 2, "{out}");
        // Kept, and equal for others who look; the values are bytes, so lines would not do.
        let shown = |node: &str| run(&["scan", "--json", "--dir", text(&directory.path().join(node))], b"");
        let (code, out, _) = shown("leader");
        assert!(code == 0 && !out.is_empty());
        assert_eq!(shown("follower-2").1, out);
    }
    let (code, _, error) = run(&["demo", "--scenario", "none-such"], b"");
    assert!(code == 2 && error.contains("catch-up"), "{error}");
}

#[test]
fn an_interrupt_loses_nothing_committed() {
    let directory = tempfile::tempdir().unwrap();
    let (mut leader, address, mut stdin) = lead(directory.path(), &["--kv", "16:32"]);
    let follower_directory = directory.path().with_extension("f");
    let follower = follow(&follower_directory, &address);
    stdin.write_all(b"first\tx\n").unwrap();
    until("it shows", || get(&follower_directory, "first").is_some());
    let mut model = Model::from([("first".to_owned(), "x".to_owned())]);
    let lines = changes(3, 5000, &mut model);
    stdin.write_all(&lines).unwrap();
    // The pipe stays open, so only the interrupt ends it; what the leader had not read by then was not taken.
    until("it shows", || scan(directory.path()) == model);
    assert!(Command::new("kill").args(["-INT", &leader.0.id().to_string()]).status().unwrap().success());
    assert_committed(&leader.prints(), "synced");
    assert_eq!(leader.0.wait().unwrap().code(), Some(0));
    assert_eq!(scan(directory.path()), model);
    assert_eq!(follower.interrupt(), 0);
    assert_eq!(scan(&follower_directory), model, "a leader that stops sends what is pending");
    std::fs::remove_dir_all(follower_directory).unwrap();
}

#[test]
fn interrupts_end_every_kind_of_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let nodes = ["f", "l", "f2"].map(|name| directory.path().join(name));
    // A follower that has never met its leader.
    let port = format!("127.0.0.1:{}", free_port());
    let mut follower = Running::start(&mut towline(&["follower", "--dir", text(&nodes[0]), "--leader", &port]));
    follower.says("towline: cannot connect");
    assert_eq!(follower.interrupt(), 0);
    assert!(!nodes[0].exists(), "nothing is made before the leader was met");
    // A leader whose records cannot be committed, at the end of its input.
    let (leader, _, mut stdin) = lead(&nodes[1], &["--kv", "16:32", "--commit", "applied:1", "--exit-on-eof"]);
    stdin.write_all(b"a\tb\n").unwrap();
    drop(stdin);
    until("it shows", || get(&nodes[1], "a").is_some());
    assert_eq!(leader.interrupt(), 1, "it was to leave when everything is committed, and it is not");
    // A leader that only serves.
    let mut leader =
        Running::start(&mut towline(&["leader", "--dir", text(&nodes[1]), "--listen", "127.0.0.1:0", "--kv", "16:32"]));
    leader.says("leading ");
    assert_eq!(leader.interrupt(), 0);
    assert_eq!(get(&nodes[1], "a").as_deref(), Some("b"));
}

#[test]
fn a_store_of_another_shape_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let nodes = ["l", "f"].map(|name| directory.path().join(name));
    let (leader, address, _stdin) = lead(&nodes[0], &["--kv", "16:32"]);
    let other = FixedStoreOptions { key_len: 8, value_len: 32, ..FixedStoreOptions::default() };
    FixedStore::open(nodes[1].join("store"), &other).unwrap().close().unwrap();
    let (code, _, error) = run(&["follower", "--dir", text(&nodes[1]), "--leader", &address], b"");
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("key_len is 8 here and 16 there"), "{error}");
    assert_eq!(leader.interrupt(), 0);
    let again = ["leader", "--dir", text(&nodes[0]), "--listen", "127.0.0.1:0", "--kv", "16:33"];
    let (code, _, error) = run(&again, b"");
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("value_len 32, not 33"), "{error}");
}

#[test]
fn a_wrong_line_is_named_and_what_came_before_it_is_committed() {
    let long = format!("ab\tcd\n{}\n", "k".repeat(5_000_000));
    for (input, named) in [
        ("a\tb\nc\td\n\ne\tf\n", "line 3: its key is empty"),
        ("a\tb\nc\td\n\tvalue\n", "line 3: its key is empty"),
        ("a\tb\n123456789\tx\n", "line 2: its key has 9 bytes or more, and may have 8"),
        ("a\tb\na\n123456789\n", "line 3: its key has 9 bytes or more, and may have 8"),
        ("a\tb\nc\t12345\nc\td", "line 2: its value has 5 bytes or more, and may have 4"),
        (&long, "line 2: its key has "),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let arguments =
            ["leader", "--dir", text(directory.path()), "--listen", "127.0.0.1:0", "--stdin", "--kv", "8:4"];
        let (code, out, error) = run(&arguments, input.as_bytes());
        assert_eq!(code, 1, "{error}");
        assert!(error.contains(named), "{error}");
        assert_committed(out.trim_end(), "synced");
        let number: usize = named["line ".len()..].split(':').next().unwrap().parse().unwrap();
        let mut model = Model::new();
        for line in input.lines().take(number - 1) {
            match line.split_once('\t') {
                Some((key, value)) => drop(model.insert(key.to_owned(), value.to_owned())),
                None => drop(model.remove(line)),
            }
        }
        assert_eq!(scan(directory.path()), model, "{named}");
    }
}

#[test]
fn bytes_come_out_as_they_went_in() {
    use std::os::unix::ffi::OsStrExt;
    let directory = tempfile::tempdir().unwrap();
    let path = text(directory.path());
    let common = ["leader", "--dir", path, "--listen", "127.0.0.1:0", "--stdin", "--exit-on-eof"];
    let kv = ["--kv", "8:8", "--prefix-bits", "2"];
    let (code, _, error) = run(&[&common[..], &kv[..]].concat(), b"\xff\xfe\t\x80\tx\r\nempty\t\n");
    assert_eq!(code, 0, "{error}");
    let mut get = towline(&["get", "--dir", path]);
    assert_eq!(get.arg(std::ffi::OsStr::from_bytes(b"\xff\xfe")).output().unwrap().stdout, b"\xff\xfe\t\x80\tx\r\n");
    assert_eq!(run(&["get", "--dir", path, "empty"], b""), (0, "empty\t\n".to_owned(), String::new()));
    assert_eq!(run(&["get", "--dir", path, "--value", "empty"], b"").1, "\n");
    let (_, out, _) = run(&["scan", "--dir", path, "--json", "--limit", "1"], b"");
    assert_eq!(out, "{\"shard\":1,\"slot\":0,\"lsn\":1,\"key\":\"empty\",\"value\":\"\"}\n");
}

#[test]
fn a_log_without_a_store_has_none_to_look_at() {
    let directory = tempfile::tempdir().unwrap();
    let nodes = ["plain", "f"].map(|name| directory.path().join(name));
    let (mut leader, address, mut stdin) = lead(&nodes[0], &["--commit", "durable:1"]);
    let follower = follow(&nodes[1], &address);
    stdin.write_all(b"a\tline\n").unwrap();
    drop(stdin);
    assert_committed(&leader.prints(), "durable:1");
    assert_eq!((follower.interrupt(), leader.interrupt()), (0, 0));
    for node in &nodes {
        let (code, _, error) = run(&["get", "--dir", text(node), "a"], b"");
        assert!(code == 1 && error.contains("holds no store"), "{error}");
    }
    // Its records are none of a store's.
    let (code, _, error) =
        run(&["leader", "--dir", text(&nodes[0]), "--listen", "127.0.0.1:0", "--stdin", "--kv", "8:8"], b"a\tb\n");
    assert!(code == 1 && error.contains("none of a fixed store's"), "{error}");
}

#[test]
fn a_node_whose_store_has_lost_a_file_does_not_go_on_without_it() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("leader");
    let leads = ["leader", "--dir", text(&directory), "--listen", "127.0.0.1:0", "--stdin", "--exit-on-eof"];
    let (code, _, errors) = run(&[&leads[..], &["--kv", "8:8", "--shards", "2"]].concat(), b"a\t1\nb\t2\nc\t3\n");
    assert_eq!(code, 0, "{errors}");
    let followed = ["follower", "--dir", text(&directory), "--leader", "127.0.0.1:1"];
    for file in ["slots-0000.tfs", "slots-0001.tfs"] {
        let (path, aside) = (directory.join("store").join(file), parent.path().join(file));
        std::fs::rename(&path, &aside).unwrap();
        for arguments in [&leads[..], &followed, &["get", "--dir", text(&directory), "a"]] {
            let (code, _, errors) = run(arguments, b"no change of a key\n");
            assert!(code == 3 && errors.contains(file) && errors.contains("missing"), "{arguments:?}: {errors}");
        }
        std::fs::rename(&aside, &path).unwrap();
    }
    assert_eq!(scan(&directory).len(), 3);
}
