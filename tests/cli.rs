//! The command line: exit codes, outputs for programs and for people, and that looking never writes.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::json::Json;
use common::process::{arg, leader_with_input, outcome, run, towline};
use common::{SEGMENT, append};
use towline::types::shard_directory_name;
use towline::{Lsn, Node, ShardId};

const COMMANDS: [&str; 11] =
    ["demo", "leader", "follower", "tail", "status", "get", "scan", "inspect", "verify", "repair", "bench"];

/// A stopped node's directory with two shards, some segments and everything synced.
fn node(parent: &Path, name: &str, records: u64) -> PathBuf {
    let directory = parent.join(name);
    let leader = Node::builder(&directory).shards(2).segment_size(SEGMENT).lead("127.0.0.1:0").unwrap();
    for writer in &mut common::writers(&leader) {
        // Each batch says what was synced when it was written, so that damage before it is no torn tail.
        append(writer, records / 2);
        writer.log().wait_synced(writer.end().head, None).unwrap();
        append(writer, records - records / 2);
    }
    leader.shutdown().unwrap();
    directory
}

/// Every file below a directory, with its bytes.
fn contents(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in directory.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else {
            let bytes = std::fs::read(&path).unwrap();
            found.insert(path, bytes);
        }
    }
    found
}

fn first_segment(directory: &Path, shard: ShardId) -> PathBuf {
    let shard = directory.join(shard_directory_name(shard));
    towline::wal::scan::list_segments(&shard).unwrap().remove(0).1
}

fn flip(path: &Path, offset: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[offset] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_check_ends_with_its_own_code_although_its_reader_has_left() {
    let parent = tempfile::tempdir().unwrap();
    let directory = node(parent.path(), "node", 4000);
    let leaves = |code: i32| {
        let mut child = towline(&["inspect", arg(&directory), "--records"]).stdout(Stdio::piped()).spawn().unwrap();
        // There is more to come than a pipe holds.
        let mut out = BufReader::new(child.stdout.take().unwrap());
        assert!(out.read_line(&mut String::new()).unwrap() > 0);
        drop(out);
        assert_eq!(child.wait().unwrap().code(), Some(code));
    };
    leaves(0);
    flip(&first_segment(&directory, ShardId(0)), 5000);
    leaves(3);
}

#[test]
fn every_command_explains_itself() {
    let (code, out, _) = outcome(&run(&["--help"]));
    assert_eq!(code, 0);
    assert!(out.contains("Exit codes: 0 done, 1 failed, 2 wrong usage, 3 damage"), "{out}");
    for command in COMMANDS {
        assert!(out.contains(command), "{command} is not listed: {out}");
        let (code, help, err) = outcome(&run(&[command, "--help"]));
        assert_eq!((code, err.as_str()), (0, ""), "{command}");
        assert!(help.contains(&format!("Usage: towline {command}")) && help.len() > 300, "{help}");
    }
    let (code, out, _) = outcome(&run(&["--version"]));
    assert_eq!((code, out), (0, format!("towline {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn wrong_usage_ends_with_2() {
    for wrong in [
        &[][..],
        &["sink"],
        &["leader"],
        &["leader", "--dir", "x", "--commit", "durable:0"],
        &["leader", "--dir", "x", "--shards", "many"],
        &["leader", "--dir", "x", "--exit-on-eof"],
        &["follower", "--dir", "x"],
        &["demo", "--shards", "0"],
        &["tail"],
        &["inspect"],
        &["verify", "--frobnicate"],
        &["repair", "x"],
    ] {
        let (code, out, err) = outcome(&run(wrong));
        assert_eq!((code, out.as_str()), (2, ""), "{wrong:?}: {err}");
        assert!(err.contains("--help"), "{wrong:?}: {err}");
    }
}

#[test]
fn failures_end_with_1_and_name_their_thing() {
    let parent = tempfile::tempdir().unwrap();
    let directory = node(parent.path(), "node", 10);
    let missing = parent.path().join("missing");
    let fresh = parent.path().join("fresh");
    let address = format!("127.0.0.1:{}", common::net::free_port());
    let cases: [(&[&str], &str); 6] = [
        (&["inspect", arg(&missing)], arg(&missing)),
        (&["verify", arg(&missing)], arg(&missing)),
        (&["inspect", arg(&directory), "--shard", "2"], "no shard 2: the node has 2"),
        (&["status", &address], &address),
        (&["leader", "--dir", arg(&directory), "--listen", "127.0.0.1:0", "--shards", "5"], "shard count 2, not 5"),
        (&["follower", "--dir", arg(&fresh), "--leader", "no-such-host.invalid:1"], "no-such-host.invalid:1"),
    ];
    for (arguments, named) in cases {
        let (code, out, err) = outcome(&run(arguments));
        assert_eq!((code, out.as_str()), (1, ""), "{arguments:?}: {err}");
        assert!(err.starts_with("towline: ") && err.contains(named), "{arguments:?}: {err}");
        assert_eq!(err.lines().count(), 1, "one plain sentence: {err}");
    }
    // What makes no sense whatever the disk and the network say is wrong usage.
    for (wrong, named) in [
        (vec!["leader", "--dir", arg(&missing), "--listen", "0.0.0.0:0"], "--allow-plaintext"),
        (vec!["leader", "--dir", arg(&missing), "--listen", "127.0.0.1:0", "--shards", "0"], "at least 1"),
        (vec!["status", "nonsense"], "host:port"),
        (vec!["demo", "--commit", "durable:9"], "--followers 2"),
    ] {
        let (code, _, err) = outcome(&run(&wrong));
        assert!(code == 2 && err.contains(named), "{wrong:?}: {code}: {err}");
    }
    let in_use = Node::builder(&directory).lead("127.0.0.1:0").unwrap();
    let (code, _, err) = outcome(&run(&["leader", "--dir", arg(&directory), "--listen", "127.0.0.1:0"]));
    assert!(code == 1 && err.contains("in use, by another process"), "{code}: {err}");
    drop(in_use);
}

#[test]
fn the_demo_proves_itself_in_json_and_in_words() {
    let small = ["demo", "--seconds", "1", "--max-mb", "20", "--shards", "1", "--followers", "2"];
    let (code, out, err) = outcome(&run(&[&small[..], &["--json"]].concat()));
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert_eq!(out.lines().count(), 1);
    let json = Json::parse(&out);
    let records = json["records"].number();
    assert_eq!(json["verified"], Json::Bool(true));
    assert!(records > 0.0 && json["bytes"].number() == records * 256.0 && json["seconds"].number() > 0.0, "{out}");
    let latency = &json["commit_latency_us"];
    assert!(latency["p50"].number() <= latency["p99"].number(), "{out}");
    assert!(latency["p99"].number() <= latency["p999"].number(), "{out}");
    assert_eq!(json["followers"].list().len(), 2);
    for follower in json["followers"].list() {
        assert_eq!(follower.keys(), ["applied", "durable", "identical", "received"]);
        assert_eq!(follower["identical"], Json::Bool(true));
        assert_eq!((follower["received"].number(), follower["applied"].number()), (records, records));
    }

    let parent = tempfile::tempdir().unwrap();
    let kept = parent.path().join("kept");
    let (code, out, err) = outcome(&run(&[&small[..], &["--dir", arg(&kept), "--commit", "durable:2"]].concat()));
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.ends_with("proven: every follower has exactly the leader's log\n"), "{out}");
    assert_eq!(out.matches("byte-identical; records each once and in order").count(), 2, "{out}");
    // Where nobody looks on, progress is plain lines.
    assert!(!err.is_empty() && !err.contains('\r') && !err.contains('\u{1b}'), "{err:?}");
    let nodes = ["leader", "follower-1", "follower-2"].map(|name| kept.join(name));
    let (code, out, _) = outcome(&run(&["verify", arg(&nodes[0]), arg(&nodes[1]), arg(&nodes[2])]));
    assert_eq!(code, 0, "{out}");
}

#[test]
fn status_tells_programs_and_people_the_same() {
    let parent = tempfile::tempdir().unwrap();
    let leader = Node::builder(parent.path().join("a")).shards(2).segment_size(SEGMENT).lead("127.0.0.1:0").unwrap();
    let builder = Node::builder(parent.path().join("b")).node_id(towline::NodeId(77)).listen("127.0.0.1:0");
    let follower = builder.follow(leader.local_address(), std::sync::Arc::new(towline::target::LogOnly)).unwrap();
    append(&mut leader.writer(ShardId(1)).unwrap(), 9);
    common::catch_up(&leader, &follower);
    let outcome_of = leader.wait(ShardId(1), Lsn(9), "applied:1".parse().unwrap(), Some(common::deadline())).unwrap();
    assert!(outcome_of.is_committed());
    common::until("both streams stand", || {
        leader.status().shards.iter().all(|shard| shard.followers.iter().any(|follower| follower.connected))
    });

    let (code, out, err) = outcome(&run(&["status", leader.local_address(), "--json"]));
    assert_eq!((code, err.as_str()), (0, ""));
    let json = Json::parse(&out);
    assert_eq!(json["role"].text(), "leader");
    assert_eq!(json["cluster"].text(), leader.manifest().cluster.to_string());
    let shard = &json["shards"].list()[1];
    assert_eq!((shard["shard"].number(), shard["head"].number(), shard["poison"].clone()), (1.0, 9.0, Json::Null));
    let seen = &shard["followers"].list()[0];
    assert_eq!((seen["node"].number(), seen["state"].text()), (77.0, "keep_up"));
    assert_eq!((seen["received"].number(), seen["applied"].number()), (9.0, 9.0));
    assert_eq!((seen["lag_records"].number(), seen["lag_bytes"].number()), (0.0, 0.0));

    let (code, out, _) = outcome(&run(&["status", follower.local_address().unwrap(), "--json"]));
    let json = Json::parse(&out);
    assert_eq!((code, json["role"].text(), json["node"].number()), (0, "follower", 77.0));
    assert_eq!(json["shards"].list()[1]["following"]["connected"], Json::Bool(true));

    let (code, out, _) = outcome(&run(&["status", leader.local_address()]));
    assert_eq!(code, 0);
    for part in ["leader ", "LSN 1 to 9", "follower 77  keep_up  received 9", "behind 0 records"] {
        assert!(out.contains(part), "{part:?} is missing: {out}");
    }
}

#[test]
fn inspecting_damage_names_it_and_never_writes() {
    let parent = tempfile::tempdir().unwrap();
    let directory = node(parent.path(), "node", 900);
    let (code, out, _) = outcome(&run(&["inspect", arg(&directory)]));
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("2 shards") && out.contains("shard 1: LSN 1 to 900, 900 records"), "{out}");
    let (_, out, _) = outcome(&run(&["inspect", arg(&directory), "--shard", "1", "--records", "--json"]));
    let lines: Vec<_> = out.lines().map(Json::parse).collect();
    assert_eq!(lines.len(), 901);
    for (line, lsn) in lines.iter().zip(1u32..=900) {
        let due = String::from_utf8(common::record(ShardId(1), Lsn(u64::from(lsn)))).unwrap();
        assert_eq!((line["lsn"].number(), line["text"].text()), (f64::from(lsn), due.as_str()));
    }
    assert_eq!(lines[900]["shards"].list()[0]["head"].number(), 900.0);

    // One byte of a record in the middle of the first segment of shard 1.
    let damaged = first_segment(&directory, ShardId(1));
    flip(&damaged, 20_000);
    let before = contents(&directory);
    let (code, out, err) = outcome(&run(&["inspect", arg(&directory)]));
    assert_eq!((code, err.as_str()), (3, ""), "{out}");
    let problem = out.lines().find(|line| line.contains("corrupt: ")).expect("the damage is listed");
    assert!(
        problem.contains(arg(&damaged)) && problem.contains("at offset ") && problem.contains("(LSN "),
        "{problem}"
    );
    let (code, json, _) = outcome(&run(&["inspect", arg(&directory), "--json"]));
    let json = Json::parse(&json);
    assert_eq!(code, 3);
    assert_eq!(json["shards"].list()[0]["problems"].list().len(), 0);
    assert!(json["shards"].list()[1]["problems"].list()[0].text().contains("corrupt: "));
    // What is behind the damage can still be read.
    let (code, out, _) = outcome(&run(&["inspect", arg(&directory), "--shard", "1", "--records"]));
    assert!(code == 3 && out.contains("shard 1 record 900 "), "{code}");
    let (code, out, _) = outcome(&run(&["verify", arg(&directory)]));
    assert!(code == 3 && out.contains(arg(&damaged)), "{out}");
    assert!(contents(&directory) == before, "something was written");
    // Leading from it is refused, with the same code, and nothing of the log changes; prepared files may go.
    let (code, _, err) = outcome(&run(&["leader", "--dir", arg(&directory), "--listen", "127.0.0.1:0"]));
    assert_eq!(code, 3, "{err}");
    assert!(err.contains(arg(&damaged)) && err.contains("damaged at offset"), "{err}");
    let after = contents(&directory);
    let prepared = |path: &Path| path.file_name().unwrap().to_string_lossy().starts_with("spare");
    for (path, bytes) in before.iter().filter(|(path, _)| !prepared(path)) {
        assert!(after.get(path) == Some(bytes), "{} changed", path.display());
    }
}

#[test]
fn verify_names_the_first_difference() {
    let parent = tempfile::tempdir().unwrap();
    let directory = node(parent.path(), "node", 300);
    let other = parent.path().join("other");
    for (path, bytes) in contents(&directory) {
        let to = other.join(path.strip_prefix(&directory).unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::write(to, bytes).unwrap();
    }
    let both = ["verify", arg(&directory), arg(&other)];
    let (code, out, _) = outcome(&run(&both));
    assert_eq!((code, out.matches(": identical, LSN 1 to 300").count()), (0, 2), "{out}");

    // A copy that is behind is no damage, but not the same either.
    let leader = Node::builder(&directory).lead("127.0.0.1:0").unwrap();
    append(&mut leader.writer(ShardId(0)).unwrap(), 7);
    leader.shutdown().unwrap();
    let (code, out, _) = outcome(&run(&both));
    assert_eq!(code, 1, "{out}");
    assert!(out.contains("the first has 7 records more (LSN 307 and 300)"), "{out}");

    // Another future from the same past.
    let leader = Node::builder(&other).lead("127.0.0.1:0").unwrap();
    leader.writer(ShardId(0)).unwrap().append(b"something else").unwrap();
    leader.shutdown().unwrap();
    let before = (contents(&directory), contents(&other));
    let (code, out, _) = outcome(&run(&both));
    assert_eq!(code, 3, "{out}");
    let named = out.lines().find(|line| line.contains("DIFFERENT")).expect("the difference is told");
    assert!(named.contains("from LSN 301 on, at offset ") && named.contains(arg(&other)), "{named}");
    assert!((contents(&directory), contents(&other)) == before, "something was written");

    let stranger = node(parent.path(), "stranger", 10);
    let (code, _, err) = outcome(&run(&["verify", arg(&directory), arg(&stranger)]));
    assert!(code == 1 && err.contains("cluster"), "{code}: {err}");
}

#[test]
fn a_reader_that_has_seen_enough_ends_tail_of_several_shards_quietly() {
    let parent = tempfile::tempdir().unwrap();
    let leader = Node::builder(parent.path().join("node")).shards(2).segment_size(1 << 20).lead("127.0.0.1:0").unwrap();
    for writer in &mut common::writers(&leader) {
        append(writer, 20_000);
    }
    let mut tail = towline(&["tail", "--follow", "--leader", leader.local_address()]);
    let mut tail = tail.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    BufReader::new(tail.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    assert_eq!(outcome(&tail.wait_with_output().unwrap()), (0, String::new(), String::new()));
}

#[cfg(unix)]
#[test]
fn tail_that_is_interrupted_while_nobody_answers_ends_with_0() {
    let address = format!("127.0.0.1:{}", common::net::free_port());
    let mut tail = common::process::Beside::start(&mut towline(&["tail", "--leader", &address]));
    tail.error_line("towline: ");
    assert_eq!(tail.terminate().code(), Some(0));
}

#[test]
fn a_reader_that_has_seen_enough_ends_tail_quietly() {
    let parent = tempfile::tempdir().unwrap();
    let leader = Node::builder(parent.path().join("node")).segment_size(1 << 20).lead("127.0.0.1:0").unwrap();
    let mut writer = leader.writer(ShardId(0)).unwrap();
    let head = append(&mut writer, 20_000);
    let mut tail = towline(&["tail", "--leader", leader.local_address()]);
    let mut tail = tail.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = String::new();
    BufReader::new(tail.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert_eq!(first.trim_end_matches('\n').as_bytes(), common::record(ShardId(0), Lsn(1)));
    let ended = tail.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), ended.stderr.as_slice()), (Some(0), &b""[..]));

    let from = head.get() - 2;
    let arguments = ["tail", "--leader", leader.local_address(), "--from", &from.to_string(), "--lsn"];
    let (code, out, _) = outcome(&run(&arguments));
    assert_eq!((code, out.lines().count()), (0, 3), "{out}");
    assert!(out.starts_with(&format!("0\t{from}\tshard 0 record {from} ")), "{out}");
    let (code, _, err) = outcome(&run(&["tail", "--leader", leader.local_address(), "--from", "999999"]));
    assert!(code == 1 && err.contains("LSN 999999"), "{code}: {err}");
    let (code, _, err) = outcome(&run(&["tail", "--leader", leader.local_address(), "--shard", "8"]));
    assert!(code == 1 && err.contains("no shard 8"), "{code}: {err}");
}

#[test]
fn a_leader_that_leaves_at_the_end_of_input_says_what_is_committed() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("node");
    let lead = |commit, timeout| {
        let more = ["--exit-on-eof", "--commit", commit, "--commit-timeout", timeout];
        let first = ["--dir", arg(&directory), "--segment-size", "65536"];
        let (mut leader, _) = leader_with_input(&[&first[..], &more].concat());
        leader.stdin().write_all(b"one\ntwo\n\nfour without an end").unwrap();
        (leader.wait().code(), leader.rest_of_output())
    };
    assert_eq!(lead("synced", "60"), (Some(0), vec!["4 of 4 records committed (synced)".to_owned()]));
    assert_eq!(lead("durable:1", "0"), (Some(1), vec!["0 of 4 records committed (durable:1)".to_owned()]));
    let longest = u64::MAX.to_string();
    assert_eq!(lead("synced", &longest), (Some(0), vec!["4 of 4 records committed (synced)".to_owned()]));
    let found: Vec<_> = common::records_of(&directory, ShardId(0)).into_values().collect();
    let text = [&b"one"[..], b"two", b"", b"four without an end"];
    assert!(found.iter().eq(text.iter().chain(&text).chain(&text)), "{found:?}");
}

#[test]
fn damage_that_only_the_checkpoint_vouches_for_is_no_torn_tail() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("node");
    let leader = Node::builder(&directory).segment_size(SEGMENT).lead("127.0.0.1:0").unwrap();
    // One batch, so that no later one says that it was synced.
    leader.writer(ShardId(0)).unwrap().append_batch(&vec![[7; 100]; 50]).unwrap();
    leader.shutdown().unwrap();
    let (code, out, _) = outcome(&run(&["verify", arg(&directory)]));
    assert!(code == 0 && out.contains("sound"), "{out}");
    let segment = std::fs::read_dir(directory.join("shard-0000"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "wal"))
        .unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&segment, &bytes).unwrap();
    for command in ["verify", "inspect"] {
        let (code, out, _) = outcome(&run(&[command, arg(&directory)]));
        assert!(code == 3 && out.contains("corrupt") && out.contains("LSN 1"), "{command}: {code}: {out}");
    }
}

/// The command with an output that nobody reads any more.
#[cfg(target_os = "linux")]
fn unread() -> Stdio {
    // The end that reads is closed at once.
    let (_, writes) = std::io::pipe().unwrap();
    writes.into()
}

#[cfg(target_os = "linux")]
#[test]
fn an_output_that_cannot_be_written_changes_no_exit_code_and_ends_no_leader() {
    let parent = tempfile::tempdir().unwrap();
    let directory = node(parent.path(), "node", 20);
    let full = || Stdio::from(std::fs::File::options().write(true).open("/dev/full").unwrap());
    let code = |arguments: &[&str], out: Stdio| {
        let ended = towline(arguments).stdout(out).stderr(Stdio::piped()).output().unwrap();
        (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
    };
    let repair = ["repair", arg(&directory), "--from", "127.0.0.1:1"];
    for arguments in [&["verify", arg(&directory)][..], &["inspect", arg(&directory)], &repair] {
        assert_eq!(code(arguments, unread()), (Some(0), String::new()), "{arguments:?}");
        let (ended, told) = code(arguments, full());
        assert!(ended == Some(1) && told.starts_with("towline: cannot write to standard output"), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
    flip(&first_segment(&directory, ShardId(1)), 4096 + 30);
    for command in ["verify", "inspect"] {
        for out in [unread(), full()] {
            assert_eq!(code(&[command, arg(&directory)], out).0, Some(3), "what {command} found is not lost");
        }
    }

    let address = format!("127.0.0.1:{}", common::net::free_port());
    let fresh = parent.path().join("fresh");
    let mut command = towline(&["leader", "--dir", arg(&fresh), "--listen", &address, "--stdin"]);
    let mut leader = command.stdin(Stdio::piped()).stdout(unread()).stderr(unread()).spawn().unwrap();
    writeln!(leader.stdin.take().unwrap(), "a record").unwrap();
    common::until("it serves", || outcome(&run(&["tail", "--leader", &address])).1 == "a record\n");
    // It has said by now how much it has committed.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let (code, out, err) = outcome(&run(&["status", &address]));
    leader.kill().unwrap();
    leader.wait().unwrap();
    assert!(code == 0 && out.contains("leader"), "{code}: {out}{err}");
}
