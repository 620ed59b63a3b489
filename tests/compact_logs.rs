//! Logs of small records, whose batches say only what is new: a node that begins anywhere in such a log must not miss
//! what the batches before would have told it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that meets an error has failed")]

mod common;

use std::ops::ControlFlow;

use common::net::Net;
use common::{Checked, SEGMENT, catch_up, compare, record};
use towline::wal::LogWriter;
use towline::wal::scan::Relation;
use towline::{Leader, Lsn, NodeId, ShardId, ShutdownSignal, Tail};

const S0: ShardId = ShardId(0);

/// Appends single records, which become compact batches where nobody syncs in between.
fn append_singly(writer: &mut LogWriter, count: u64) -> Lsn {
    let mut last = writer.end().head;
    for _ in 0..count {
        last = writer.append(&record(S0, last.next())).unwrap();
    }
    last
}

/// How many batches of a log are compact, and how many are not.
fn kinds(leader: &Leader) -> (usize, usize) {
    let ranges = leader.log(S0).unwrap().ranges_from(Lsn::FIRST).unwrap();
    let batches = ranges.iter().flat_map(towline::wal::LogRange::batches);
    let (compact, plain): (Vec<bool>, Vec<bool>) = batches.map(|batch| batch.header.is_compact()).partition(|is| *is);
    (compact.len(), plain.len())
}

fn a_reader_from_afar_begins_anywhere(net: &Net) {
    let directory = tempfile::tempdir().unwrap();
    let leader = net.node(&directory.path().join("leader")).segment_size(SEGMENT).lead(&net.address).unwrap();
    let head = append_singly(&mut leader.writer(S0).unwrap(), 900);
    let (compact, plain) = kinds(&leader);
    assert!(compact > 4 * plain, "{compact} compact and {plain} others");
    let stop = ShutdownSignal::new();
    for from in (1..=60).chain([337, 338, 339, 899, 900, 901]) {
        let mut due = Lsn(from);
        let read =
            Tail { from: due, ..Tail::new(S0) }.read(net.transport.as_ref(), &net.address, &stop, &mut |batch| {
                for read in batch.records() {
                    assert_eq!((read.lsn, read.bytes), (due, record(S0, due).as_slice()), "from {from}");
                    due = due.next();
                }
                ControlFlow::Continue(())
            });
        assert_eq!((read.unwrap(), due), (head, head.next()), "from {from}");
    }
}

fn a_follower_goes_on_where_it_stopped(net: &Net) {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let leader = net.node(&at("leader")).segment_size(SEGMENT).lead(&net.address).unwrap();
    let mut writer = leader.writer(S0).unwrap();
    for round in 1..=12_u64 {
        append_singly(&mut writer, round * 7);
        let builder = net.node(&at("follower")).node_id(NodeId(7));
        let follower = builder.follow(&net.address, Checked::forgetful(1)).unwrap();
        catch_up(&leader, &follower);
        append_singly(&mut writer, 5);
        catch_up(&leader, &follower);
        follower.shutdown().unwrap();
    }
    assert!(kinds(&leader).0 > 300, "{:?}", kinds(&leader));
    drop(writer);
    leader.shutdown().unwrap();
    let comparison = compare(&at("leader"), &at("follower"), S0);
    assert!(matches!(comparison.relation, Relation::Identical), "{comparison:?}");
}

over_both!(a_reader_from_afar_begins_anywhere, a_follower_goes_on_where_it_stopped);
