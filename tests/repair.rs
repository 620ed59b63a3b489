//! Damage, found and repaired: over real nodes and their streams.
//!
//! What breaks: a disk forgets bytes of a sealed segment, a file system loses a file or the end of one. How it is
//! found: when a log is opened, by `verify`, and by the scrub of a running node. What mends it: a peer's copy, if it
//! fits.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::net::Net;
use common::{Checked, SEGMENT, append, assert_identical, catch_up, until};
use towline::repair::{Repair, RepairReport};
use towline::scrub::ScrubOptions;
use towline::types::shard_directory_name;
use towline::wal::LogWriter;
use towline::wal::scan::list_segments;
use towline::{Error, Follower, Leader, Lsn, NodeId, RefusalCode, ShardId};

const S0: ShardId = ShardId(0);
const RECORDS: u64 = 2000;

/// A leader and a follower with some segments, both running; the follower listens.
struct Pair {
    _parent: tempfile::TempDir,
    net: Net,
    leader_dir: PathBuf,
    follower_dir: PathBuf,
    follower_address: String,
    nodes: Option<(Leader, Follower)>,
    writer: Option<LogWriter>,
}

impl Pair {
    fn new(net: Net) -> Pair {
        let parent = tempfile::tempdir().unwrap();
        let (leader_dir, follower_dir) = (parent.path().join("leader"), parent.path().join("follower"));
        let leader = net.lead(&leader_dir, 1);
        let (node, address) = (net.node(&follower_dir).node_id(NodeId(2)), follower_address(&net));
        let follower = node.listen(&address).follow(&net.address, Checked::new(1)).unwrap();
        let mut writer = leader.writer(S0).unwrap();
        // Each batch says what was synced when it was written, so that damage before it is no torn tail.
        append(&mut writer, RECORDS / 2);
        leader.log(S0).unwrap().wait_synced(Lsn(RECORDS / 2), None).unwrap();
        append(&mut writer, RECORDS / 2);
        catch_up(&leader, &follower);
        leader.log(S0).unwrap().wait_synced(Lsn(RECORDS), None).unwrap();
        let writer = Some(writer);
        let follower_address = follower.local_address().unwrap().to_owned();
        let nodes = Some((leader, follower));
        Pair { _parent: parent, net, leader_dir, follower_dir, follower_address, nodes, writer }
    }

    fn stop_follower(&mut self) -> Leader {
        let (leader, follower) = self.nodes.take().unwrap();
        follower.shutdown().unwrap();
        leader
    }

    fn repair_follower(&self) -> towline::Result<RepairReport> {
        Repair::new(&self.follower_dir).run(self.net.transport.as_ref(), &self.net.address)
    }
}

fn follower_address(net: &Net) -> String {
    if net.address.contains(':') { "127.0.0.1:0".to_owned() } else { "follower".to_owned() }
}

fn segments(node: &Path) -> Vec<PathBuf> {
    let listed = list_segments(&node.join(shard_directory_name(S0))).unwrap();
    listed.into_iter().map(|(_, path)| path).collect()
}

/// Every segment's bytes.
fn image(node: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    segments(node).into_iter().map(|path| (path.file_name().unwrap().into(), std::fs::read(&path).unwrap())).collect()
}

/// Flips a bit in place: the file stays the one that a running node has mapped.
fn flip(path: &Path, offset: u64) {
    use std::io::{Seek, SeekFrom};
    let mut file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(&[byte[0] ^ 16]).unwrap();
}

/// A way to damage a log, given its segment files.
type Damage = fn(&[PathBuf]);

const DAMAGES: [(&str, Damage); 9] = [
    ("the header of the first segment", |files| flip(&files[0], 18)),
    ("the header of another segment", |files| flip(&files[2], 41)),
    ("the first batch of a segment", |files| flip(&files[1], 4096 + 70)),
    ("the middle of a segment", |files| flip(&files[1], SEGMENT / 2)),
    ("zeros for a page", |files| {
        let file = std::fs::File::options().write(true).open(&files[1]).unwrap();
        let mut file = std::io::BufWriter::new(file);
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(3 * 4096)).unwrap();
        file.write_all(&[0; 4096]).unwrap();
    }),
    ("a segment that is missing", |files| std::fs::remove_file(&files[2]).unwrap()),
    ("a segment cut short", |files| {
        std::fs::File::options().write(true).open(&files[0]).unwrap().set_len(SEGMENT / 3).unwrap();
    }),
    ("an empty file", |files| {
        std::fs::File::options().write(true).open(&files[1]).unwrap().set_len(0).unwrap();
    }),
    ("many places", |files| {
        for (file, path) in files.iter().enumerate().take(4) {
            (0..5).for_each(|place| flip(path, 4096 + 9_000 * place + 100 * file as u64));
        }
    }),
];

#[test]
fn a_follower_is_repaired_from_its_leader_byte_for_byte() {
    for net in [Net::tcp(), Net::in_process()] {
        let mut pair = Pair::new(net);
        let leader = pair.stop_follower();
        let whole = image(&pair.follower_dir);
        assert!(whole.len() >= 5, "{} segments", whole.len());
        for (what, damage) in DAMAGES {
            damage(&segments(&pair.follower_dir));
            let target = Checked::forgetful(1);
            let refused = pair.net.node(&pair.follower_dir).follow(&pair.net.address, target).unwrap_err();
            let text = refused.to_string();
            assert!(refused.is_corruption(), "{what}: {text}");
            for named in ["LSN ", "offset", "towline repair", "--shard 0", pair.follower_dir.to_str().unwrap()] {
                assert!(text.contains(named), "{what}: {named:?} is missing: {text}");
            }
            let report = pair.repair_follower().unwrap();
            assert!(report.is_sound() && report.ranges().count() > 0, "{what}: {report:?}");
            assert!(image(&pair.follower_dir) == whole, "{what}: byte for byte: {report:?}");
            let fetched: u64 = report.ranges().filter(|range| range.fetched).map(|range| range.len).sum();
            assert!(fetched < 3 * SEGMENT, "{what}: just what is damaged: {report:?}");
        }
        // It goes on where it was.
        let target = Checked::forgetful(1);
        let follower = pair.net.follow(&pair.follower_dir, 2, &target);
        append(pair.writer.as_mut().unwrap(), 10);
        catch_up(&leader, &follower);
        follower.shutdown().unwrap();
        leader.shutdown().unwrap();
        assert_identical(&pair.leader_dir, &pair.follower_dir, &[RECORDS + 10]);
    }
}

#[test]
fn a_leader_is_repaired_from_its_follower() {
    let mut pair = Pair::new(Net::tcp());
    let (leader, follower) = pair.nodes.take().unwrap();
    pair.writer = None;
    leader.shutdown().unwrap();
    let whole = image(&pair.leader_dir);
    for (what, damage) in DAMAGES {
        damage(&segments(&pair.leader_dir));
        let report = Repair::new(&pair.leader_dir).run(pair.net.transport.as_ref(), &pair.follower_address).unwrap();
        assert!(report.is_sound() && image(&pair.leader_dir) == whole, "{what}: {report:?}");
    }
    let leader = pair.net.lead(&pair.leader_dir, 1);
    assert_eq!(leader.log(S0).unwrap().head(), Lsn(RECORDS));
    drop((leader, follower));
}

/// Nothing of this changes a byte.
#[test]
fn what_cannot_be_repaired_is_left_as_it_is() {
    let mut pair = Pair::new(Net::tcp());
    let refused = |pair: &Pair, address: &str| {
        let before = image(&pair.follower_dir);
        let repair = Repair { timeout: Duration::from_secs(5), ..Repair::new(&pair.follower_dir) };
        let error = repair.run(pair.net.transport.as_ref(), address).unwrap_err();
        assert!(image(&pair.follower_dir) == before, "{error}");
        error
    };
    let error = refused(&pair, &pair.net.address);
    assert!(matches!(error, Error::InUse { .. }), "a running node: {error}");
    let leader = pair.stop_follower();
    let files = segments(&pair.follower_dir);
    // Without damage nobody is asked.
    let report = Repair::new(&pair.follower_dir).run(pair.net.transport.as_ref(), "127.0.0.1:1").unwrap();
    assert!(report.is_sound() && report.ranges().count() == 0);
    flip(&files[0], 4096 + 70);
    let error = refused(&pair, "127.0.0.1:1");
    assert!(matches!(error, Error::Network { .. }), "nobody there: {error}");
    let error = Repair { shard: Some(ShardId(1)), ..Repair::new(&pair.follower_dir) }
        .run(pair.net.transport.as_ref(), &pair.net.address)
        .unwrap_err();
    assert!(error.to_string().contains("no shard 1"), "{error}");

    let other = Net::tcp();
    let elsewhere = tempfile::tempdir().unwrap();
    let stranger = other.lead(elsewhere.path(), 1);
    let error = refused(&pair, &other.address);
    assert!(matches!(error, Error::Refused { code: RefusalCode::WrongCluster, .. }), "{error}");
    drop(stranger);

    // A peer whose own copy has the same damage does not hand it on.
    let leader_files = segments(&pair.leader_dir);
    flip(&leader_files[0], 4096 + 70);
    let error = refused(&pair, &pair.net.address);
    assert!(error.to_string().contains("its own copy"), "{error}");
    flip(&leader_files[0], 4096 + 70);

    // One that has given the range up.
    leader.log(S0).unwrap().release_through(Lsn(RECORDS / 2), "the test says so").unwrap();
    let error = refused(&pair, &pair.net.address);
    assert!(matches!(error, Error::Refused { code: RefusalCode::NotRetained, .. }), "{error}");
    assert!(error.to_string().contains("LSN 1;"), "{error}");
    leader.shutdown().unwrap();

    // One that talks nonsense, and one that says nothing.
    for answer in
        [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], &[0x54, 0x57, 3, 0, 255, 255, 255, 255, 0, 0, 0, 0, 1, 2, 3, 4]]
    {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(answer).unwrap();
                let _ = stream.read_to_end(&mut Vec::new());
            });
            let error = refused(&pair, &address);
            assert!(matches!(error, Error::Protocol { .. }), "{error}");
        });
    }
}

/// Two logs of one cluster that went apart: each refuses the other's bytes, and both chains are named.
#[test]
fn another_history_is_refused() {
    let mut pair = Pair::new(Net::tcp());
    let (leader, follower) = pair.nodes.take().unwrap();
    pair.writer = None;
    leader.shutdown().unwrap();
    follower.shutdown().unwrap();
    let whole = image(&pair.follower_dir);
    // As many records of the same length, but other ones: what a leader makes that has lost its log.
    for path in segments(&pair.leader_dir) {
        std::fs::remove_file(path).unwrap();
    }
    std::fs::remove_file(pair.leader_dir.join("replication.ckpt")).unwrap();
    let leader = pair.net.lead(&pair.leader_dir, 1);
    let mut writer = leader.writer(S0).unwrap();
    for lsn in 1..=RECORDS {
        writer.append(format!("another record {lsn:0200}").as_bytes()).unwrap();
    }
    let files = segments(&pair.follower_dir);
    for offset in [40, 4096 + 70, SEGMENT / 2] {
        flip(&files[1], offset);
        let damaged = image(&pair.follower_dir);
        let error = pair.repair_follower().unwrap_err();
        assert!(image(&pair.follower_dir) == damaged, "{error}");
        let text = error.to_string();
        let names_both = text.matches("chain ").count() >= 2 || text.contains("no segment of this node begins with");
        assert!(names_both, "{text}");
        flip(&files[1], offset);
    }
    flip(&files[0], 4096 + 70);
    let error = pair.repair_follower().unwrap_err();
    assert!(error.is_corruption() && error.to_string().contains("another history"), "{error}");
    flip(&files[0], 4096 + 70);
    assert!(image(&pair.follower_dir) == whole);
    drop(writer);
}

#[test]
fn a_running_node_finds_damage_by_itself_and_gives_it_to_nobody() {
    let parent = tempfile::tempdir().unwrap();
    let net = Net::tcp();
    let scrub = |every| ScrubOptions { bytes_per_second: 1 << 30, every };
    let often = Duration::from_millis(20);
    let leader =
        net.node(parent.path()).shards(1).segment_size(SEGMENT).scrub(scrub(often)).lead(&net.address).unwrap();
    let log = std::sync::Arc::clone(leader.log(S0).unwrap());
    append(&mut leader.writer(S0).unwrap(), RECORDS);
    log.wait_synced(Lsn(RECORDS), None).unwrap();
    let status = || leader.status().shards.remove(0).scrub;
    let sealed: u64 =
        log.segments().iter().filter(|segment| segment.is_sealed()).map(|segment| segment.published()).sum();
    until("a pass over all sealed segments", || status().bytes == sealed && status().passes > 1);
    assert_eq!(status().findings, []);

    let files = segments(parent.path());
    let (before, passes) = (log.segments()[1].id().first_lsn, status().passes);
    flip(&files[1], SEGMENT / 2);
    flip(&files[2], 4096 + 9);
    until("both are found", || status().findings.len() == 2);
    let findings = status().findings;
    assert!(status().passes >= passes && findings[0].path == files[1] && findings[1].path == files[2]);
    let first = &findings[0];
    assert!(first.offset <= SEGMENT / 2 && SEGMENT / 2 < first.end && first.end - first.offset < 4096, "{first:?}");
    assert!(first.lsn > before && findings[1].offset == 4096, "{findings:?}");

    // Up to the damage the log is read; the damage itself by nobody, and what is behind it again.
    let mut reader = log.reader_from(before).unwrap();
    assert_eq!(reader.next(u64::MAX).unwrap().unwrap().bytes().len() as u64, first.offset);
    let error = reader.next(u64::MAX).unwrap_err();
    assert!(matches!(&error, Error::Corrupt { offset, lsn, .. } if (*offset, *lsn) == (first.offset, Some(first.lsn))));
    assert!(log.reader_from(Lsn(RECORDS)).unwrap().next(u64::MAX).unwrap().is_some());
    // It is known once, however often it is read again, and stands in the JSON too.
    let seen = status().passes;
    until("another pass", || status().passes > seen + 1);
    assert_eq!(status().findings, findings);
    assert!(leader.status().to_json().contains("\"findings\":[{\"path\":"));
    leader.shutdown().unwrap();

    // Off means no thread and no pass.
    let off = ScrubOptions { bytes_per_second: 0, every: Duration::ZERO };
    flip(&files[1], SEGMENT / 2);
    flip(&files[2], 4096 + 9);
    let leader = net.node(parent.path()).scrub(off).lead(&net.address).unwrap();
    assert_eq!(leader.status().shards[0].scrub.passes, 0);
}

#[cfg(feature = "cli")]
mod command_line {
    use super::*;
    use common::json::Json;
    use common::process::{arg, outcome, run};

    #[test]
    fn the_command_says_what_it_does_and_ends_with_its_code() {
        let mut pair = Pair::new(Net::tcp());
        let leader = pair.stop_follower();
        let whole = image(&pair.follower_dir);
        let files = segments(&pair.follower_dir);
        let (directory, address) = (pair.follower_dir.clone(), pair.net.address.clone());
        let repair = |more: &[&str]| outcome(&run(&[&["repair", arg(&directory), "--from", &address], more].concat()));
        let (code, out, err) = repair(&[]);
        assert!(code == 0 && err.is_empty() && out.contains("nothing to repair"), "{code} {out} {err}");

        flip(&files[1], SEGMENT / 2);
        let (code, out, _) = outcome(&run(&["verify", arg(&directory)]));
        assert!(code == 3 && out.contains("corrupt: "), "{code} {out}");
        let damaged = image(&directory);
        let (code, out, err) = repair(&["--dry-run"]);
        assert!(code == 3 && err.is_empty() && out.contains("would be repaired"), "{code} {out} {err}");
        assert!(out.contains(files[1].to_str().unwrap()) && out.contains("LSN "), "{out}");
        assert!(image(&directory) == damaged, "a dry run changes nothing");
        let (code, out, err) = repair(&["--json", "--shard", "0"]);
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        let json = Json::parse(&out);
        assert_eq!((&json["sound"], &json["dry_run"]), (&Json::Bool(true), &Json::Bool(false)));
        assert_eq!(json["shards"].list().len(), 1);
        let ranges = json["shards"].list()[0]["ranges"].list();
        assert!(
            ranges.len() == 1 && ranges[0]["len"].number() > 0.0 && ranges[0]["fetched"] == Json::Bool(true),
            "{out}"
        );
        assert!(image(&directory) == whole);
        let (code, _, err) = repair(&["--shard", "7"]);
        assert!(code == 2 && err.contains("no shard 7"), "{code} {err}");
        leader.shutdown().unwrap();

        flip(&files[1], SEGMENT / 2);
        let (code, _, err) = repair(&["--timeout", "2"]);
        assert!(code == 1 && err.contains(&address), "{code} {err}");
        let (code, _, err) = outcome(&run(&["follower", "--dir", arg(&directory), "--leader", &address, "--log-only"]));
        assert!(code == 3 && err.contains("towline repair") && err.contains("--shard 0"), "{code} {err}");
    }
}
