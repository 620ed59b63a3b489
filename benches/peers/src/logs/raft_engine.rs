//! raft-engine 0.4: one log for many Raft groups, without compression here. Entries are protobuf messages; one of
//! protobuf's own with a number and bytes stands for them.

use std::path::Path;

use protobuf::descriptor::UninterpretedOption;
use raft_engine::{Config, Engine, LogBatch, MessageExt, ReadableSize};

use super::Peer;
use crate::{Result, load};

pub(super) const PEER: Peer = Peer {
    name: "raft-engine",
    append: Some(|directory, record, count| {
        let engine = open(directory)?;
        let mut group = Group::new(1, record);
        load::rate(count, || (0..count).try_for_each(|_| group.write(&engine, false)))
    }),
    sync: Some(|directory, record, count| {
        let engine = open(directory)?;
        let mut group = Group::new(1, record);
        load::latencies(count, || group.write(&engine, true))
    }),
    group: Some(|directory, record, threads, each| {
        let engine = open(directory)?;
        // Each thread is a group of its own, as entries of one are numbered without gaps.
        let groups: Vec<_> = (0..threads).map(|thread| Group::new(thread + 1, record).into()).collect::<Vec<Shared>>();
        load::threads(threads, each, |thread| {
            let group = groups.get(usize::try_from(thread)?).ok_or("no such thread")?;
            group.lock().map_err(|_| "a writer panicked")?.write(&engine, true)
        })
    }),
    recover: Some((
        |directory, record, count| {
            let engine = open(directory)?;
            let mut group = Group::new(1, record);
            (0..count).try_for_each(|_| group.write(&engine, false))?;
            Ok(engine.sync()?)
        },
        // Checks the last block of each file only; the rest is checked when it is read.
        |directory, _| Ok(open(directory)?.last_index(1).unwrap_or(0)),
    )),
};

type Shared = std::sync::Mutex<Group>;
type Log = Engine;

#[derive(Clone)]
struct Entries;

impl MessageExt for Entries {
    type Entry = UninterpretedOption;

    fn index(entry: &UninterpretedOption) -> u64 {
        entry.get_positive_int_value()
    }
}

/// The entries of one group.
struct Group {
    id: u64,
    entry: UninterpretedOption,
    batch: LogBatch,
}

impl Group {
    fn new(id: u64, record: &[u8]) -> Group {
        let mut entry = UninterpretedOption::new();
        entry.set_string_value(record.to_vec());
        Group { id, entry, batch: LogBatch::default() }
    }

    fn write(&mut self, engine: &Log, sync: bool) -> Result<()> {
        self.entry.set_positive_int_value(self.entry.get_positive_int_value() + 1);
        self.batch.add_entries::<Entries>(self.id, std::slice::from_ref(&self.entry))?;
        engine.write(&mut self.batch, sync)?;
        Ok(())
    }
}

fn open(directory: &Path) -> Result<Log> {
    let config = Config {
        dir: directory.join("log").display().to_string(),
        batch_compression_threshold: ReadableSize::kb(0),
        ..Config::default()
    };
    Ok(Engine::open(config)?)
}
