//! Scripts for the protocol engine, with the transcript that each must give.
//!
//! A script in `tests/protocol/` is made of blocks: one input line, a line of four dashes, and the expected output up
//! to the next empty line. Output is the outcome, then the commands in order, indented. Lines that begin with `#` are
//! comments.
//!
//! ```text
//! engine shard=0 node=1 first_session=1      (first; also deadlines: catch_up_ms, rebuild_ms, stall_ms)
//! 0 assign epoch=1 role=leader k=1 replicas=2@b,3@c
//! 1 ready epoch=1 role_applied=true
//! 2 ack epoch=1 node=2 all=7 tail=1 head=10  (all: received, durable, applied, with one chain on both sides)
//! 3 progress epoch=1 node=2 session=1 achieved=8 blocks=0
//! 4 completed epoch=1 node=2 session=1 achieved=10 durable=10 head=12
//! 5 failed epoch=1 node=2 session=1 reason=transport_lost
//! 6 barrier epoch=1 node=2 session=2 durable=10
//! 7 tick
//! 8 show                                     (the projection and the next deadline)
//! ```
//!
//! The number in front is the time in milliseconds. With `UPDATE_TRANSCRIPTS=1` in the environment, what the engine
//! gives is written into the scripts instead of being compared; review the difference before committing it.

// A test may panic, also in the functions that it is made of.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use towline::protocol::{
    Assignment, Command, Engine, Event, FollowerFacts, LeaderFacts, Millis, Progress, ReadinessObserved, ReplicaInfo,
    Role, SessionLimits, Settings, SyncAck,
};
use towline::{Chain, Epoch, Lsn, NodeId, SessionId, ShardId};

const DASHES: &str = "----";

#[test]
fn scripts_give_their_transcripts() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/protocol");
    let mut scripts: Vec<PathBuf> = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    scripts.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    scripts.sort();
    assert!(!scripts.is_empty(), "no scripts in {}", directory.display());
    let rewrite = std::env::var_os("UPDATE_TRANSCRIPTS").is_some();
    let mut differences = String::new();
    for path in scripts {
        let expected = std::fs::read_to_string(&path).unwrap();
        let actual = run(&expected).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if rewrite {
            std::fs::write(&path, actual).unwrap();
        } else if actual != expected {
            differences += &format!("{}:\n{}", path.display(), difference(&expected, &actual));
        }
    }
    assert!(differences.is_empty(), "transcripts differ (-expected +actual):\n{differences}");
}

#[test]
fn a_wrong_transcript_is_noticed() {
    let script = "engine shard=0 node=1 first_session=1\n\n0 tick\n----\napplied mode=degraded durable=0\n";
    let actual = run(script).unwrap();
    assert_ne!(actual, script);
    assert!(difference(script, &actual).contains("-applied mode=degraded"));
}

#[test]
fn a_script_that_cannot_be_read_is_an_error() {
    for script in
        ["0 tick\n----\n", "engine node=x\n", "engine\n0 dance\n----\n", "engine\n0 failed reason=bored\n----\n"]
    {
        assert!(run(script).is_err(), "{script}");
    }
}

/// The script with the output that the engine really gives.
fn run(script: &str) -> Result<String, String> {
    let mut engine = None;
    let mut transcript = String::new();
    let mut lines = script.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        transcript.push_str(line);
        transcript.push('\n');
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let at = |error: String| format!("line {}: {error}", number + 1);
        if let Some(arguments) = line.strip_prefix("engine") {
            engine = Some(Engine::new(settings(&Arguments::parse(arguments).map_err(at)?).map_err(at)?));
            continue;
        }
        let engine = engine.as_mut().ok_or_else(|| at("no engine yet".to_owned()))?;
        transcript.push_str(DASHES);
        transcript.push('\n');
        transcript += &step(engine, line).map_err(at)?;
        // What was expected here ends with the block.
        lines.by_ref().take_while(|(_, line)| !line.is_empty()).for_each(drop);
        transcript.push('\n');
    }
    let trimmed = transcript.trim_end().len();
    transcript.truncate(trimmed);
    transcript.push('\n');
    Ok(transcript)
}

/// One input line: what the engine answers.
fn step(engine: &mut Engine, line: &str) -> Result<String, String> {
    let (time, rest) = line.split_once(' ').ok_or("expected a time and an event")?;
    let now = Millis(time.parse().map_err(|_| format!("{time:?} is not a time"))?);
    let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut commands = Vec::new();
    let mut output = String::new();
    if name == "show" {
        let deadline = engine.next_deadline().map_or("none".to_owned(), |deadline| deadline.to_string());
        return Ok(format!("{}\nnext_deadline={deadline}\n", engine.projection()).replace(" [", "\n  ["));
    }
    let outcome = if name == "tick" {
        engine.tick(now, &mut commands)
    } else {
        engine.apply(now, &event(name, &Arguments::parse(rest)?)?, &mut commands)
    };
    engine.verify().map_err(|violation| violation.to_string())?;
    writeln!(output, "{outcome}").unwrap();
    for command in &commands {
        let text = command.to_string();
        let text =
            if matches!(command, Command::PublishProjection { .. }) { text.replace(" [", "\n    [") } else { text };
        writeln!(output, "  {text}").unwrap();
    }
    Ok(output)
}

/// `name=value` pairs; what is missing has its default.
struct Arguments<'a>(BTreeMap<&'a str, &'a str>);

impl<'a> Arguments<'a> {
    fn parse(text: &'a str) -> Result<Self, String> {
        text.split_whitespace()
            .map(|pair| pair.split_once('=').ok_or_else(|| format!("{pair:?} is not name=value")))
            .collect::<Result<_, _>>()
            .map(Arguments)
    }

    fn optional<T: FromStr>(&self, name: &str) -> Result<Option<T>, String> {
        let parse = |text: &&str| text.parse().map_err(|_| format!("{name}={text} cannot be read"));
        self.0.get(name).map(parse).transpose()
    }

    fn or<T: FromStr>(&self, name: &str, default: T) -> Result<T, String> {
        Ok(self.optional(name)?.unwrap_or(default))
    }

    fn get<T: FromStr>(&self, name: &str) -> Result<T, String> {
        self.optional(name)?.ok_or_else(|| format!("{name} is missing"))
    }
}

fn settings(arguments: &Arguments<'_>) -> Result<Settings, String> {
    let limits = SessionLimits::default();
    Ok(Settings {
        shard: arguments.or("shard", ShardId(0))?,
        node: arguments.or("node", NodeId(1))?,
        first_session: arguments.or("first_session", SessionId(1))?,
        limits: SessionLimits {
            catch_up_deadline_ms: arguments.or("catch_up_ms", limits.catch_up_deadline_ms)?,
            rebuild_deadline_ms: arguments.or("rebuild_ms", limits.rebuild_deadline_ms)?,
            stall_budget_ms: arguments.or("stall_ms", limits.stall_budget_ms)?,
        },
    })
}

fn event(name: &str, arguments: &Arguments<'_>) -> Result<Event, String> {
    let epoch: Epoch = arguments.or("epoch", Epoch(1))?;
    let replica: NodeId = arguments.or("node", NodeId(2))?;
    let session = || arguments.get::<SessionId>("session");
    Ok(match name {
        "assign" => Event::AssignmentDelivered(Assignment {
            epoch,
            role: arguments.or("role", Role::Leader)?,
            replicas: replicas(arguments)?,
            commit_followers: arguments.or("k", 1)?,
        }),
        "ready" => Event::ReadinessObserved(ReadinessObserved {
            epoch,
            role_applied: arguments.optional("role_applied")?,
            receiver_ready: arguments.optional("receiver_ready")?,
            shipper_configured: arguments.optional("shipper_configured")?,
            shipper_connected: arguments.optional("shipper_connected")?,
        }),
        "ack" => Event::SyncAckReceived(ack(epoch, replica, arguments)?),
        "progress" => Event::SessionProgress {
            epoch,
            replica,
            session: session()?,
            progress: Progress {
                achieved: arguments.or("achieved", Lsn::ZERO)?,
                base_blocks: arguments.or("blocks", 0)?,
            },
            making_durable: arguments.or("making_durable", false)?,
        },
        "completed" => Event::SessionCompleted {
            epoch,
            replica,
            session: session()?,
            achieved: arguments.get("achieved")?,
            durable: arguments.get("durable")?,
            head: arguments.get("head")?,
        },
        "failed" => Event::SessionFailed { epoch, replica, session: session()?, reason: arguments.get("reason")? },
        "barrier" => Event::BarrierConfirmed {
            epoch,
            node: replica,
            session: arguments.optional("session")?,
            durable: arguments.get("durable")?,
        },
        other => return Err(format!("{other:?} is not an event")),
    })
}

fn replicas(arguments: &Arguments<'_>) -> Result<Vec<ReplicaInfo>, String> {
    let list: String = arguments.or("replicas", String::new())?;
    list.split(',')
        .filter(|item| !item.is_empty())
        .map(|item| {
            let (node, endpoint) = item.split_once('@').ok_or_else(|| format!("{item:?} is not node@endpoint"))?;
            let node = node.parse().map_err(|_| format!("{node:?} is not a node"))?;
            Ok(ReplicaInfo { node, endpoint: endpoint.to_owned() })
        })
        .collect()
}

fn ack(epoch: Epoch, replica: NodeId, arguments: &Arguments<'_>) -> Result<SyncAck, String> {
    let all: Lsn = arguments.or("all", Lsn::ZERO)?;
    let tail_epoch = if all == Lsn::ZERO { Epoch::ZERO } else { epoch };
    let (tail, head) = (arguments.or("tail", Lsn::FIRST)?, arguments.get("head")?);
    let chain = arguments.or("chain", Chain(7))?;
    let same_history = all <= head && all.next() >= tail;
    Ok(SyncAck {
        epoch,
        replica,
        follower: FollowerFacts {
            received: arguments.or("received", all)?,
            durable: arguments.or("durable", all)?,
            applied: arguments.or("applied", all)?,
            committed: arguments.or("committed", Lsn::ZERO)?,
            chain,
            tail_epoch: arguments.or("tail_epoch", tail_epoch)?,
            base_incomplete: arguments.or("base_incomplete", false)?,
        },
        leader: LeaderFacts {
            tail,
            head,
            chain_at_received: arguments.optional("leader_chain")?.or(same_history.then_some(chain)),
            common: arguments.optional("common")?,
            cut_possible: arguments.or("cut_possible", false)?,
            is_relay: arguments.or("relay", false)?,
        },
    })
}

/// The lines of both in order, those of one only marked. Blocks are matched by their input lines, which never differ.
fn difference(expected: &str, actual: &str) -> String {
    let (mut old, mut new) = (expected.split("\n\n"), actual.split("\n\n"));
    let mut text = String::new();
    loop {
        let (old, new) = match (old.next(), new.next()) {
            (None, None) => return text,
            (old, new) => (old.unwrap_or(""), new.unwrap_or("")),
        };
        if old.trim_end() == new.trim_end() {
            continue;
        }
        let shared = old.lines().zip(new.lines()).take_while(|(old, new)| old == new).count();
        old.lines().take(shared).for_each(|line| writeln!(text, "   {line}").unwrap());
        old.lines().skip(shared).for_each(|line| writeln!(text, "  -{line}").unwrap());
        new.lines().skip(shared).for_each(|line| writeln!(text, "  +{line}").unwrap());
        text.push('\n');
    }
}
