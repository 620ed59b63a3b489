//! Replicating an embedded database: redb as the target of a leader and of its follower, in some 100 lines, and in 80
//! more the images that rebuilds are made of.
//!
//! Records are puts and deletes; the position stands in the same transaction as what it counts; a read transaction is
//! the image for a rebuild.
#![allow(clippy::unwrap_used)]

use std::ops::Bound;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use redb::{Database, ReadTransaction, ReadableDatabase, TableDefinition, WriteTransaction};
use towline::target::{BaseInfo, BaseSink, BaseSource, BlockId, BlockRun, ReplicationTarget};
use towline::wal::{Batch, Record};
use towline::{Error, Lsn, Result, ShardId};

const DATA: TableDefinition<&[u8], &[u8]> = TableDefinition::new("data");
const MARKS: TableDefinition<&str, u64> = TableDefinition::new("marks");

/// One database for each shard, and the token of the rebuild that may change it, if any.
struct RedbTarget(Vec<Arc<(Database, Mutex<Weak<()>>)>>);

impl RedbTarget {
    fn open(directory: &Path, shards: u16) -> Result<RedbTarget> {
        std::fs::create_dir_all(directory).map_err(redb_error)?;
        let open = |shard| -> Result<_> {
            let database = Database::create(directory.join(format!("shard-{shard}.redb"))).map_err(redb_error)?;
            write(&database, |txn| txn.open_table(DATA).and(txn.open_table(MARKS).map(drop)).map_err(Into::into))?;
            Ok(Arc::new((database, Mutex::default())))
        };
        Ok(RedbTarget((0..shards).map(open).collect::<Result<_>>()?))
    }

    /// What the application reads.
    fn get(&self, shard: ShardId, key: &[u8]) -> Result<Option<Vec<u8>>> {
        check(!self.is_rebuilding(shard)?, "the shard is being rebuilt")?;
        let txn = self.0[usize::from(shard.get())].0.begin_read().map_err(redb_error)?;
        let value = || Ok(txn.open_table(DATA)?.get(key)?.map(|value| value.value().to_vec()));
        value().map_err(|error: redb::Error| redb_error(error))
    }

    fn apply_all<'a>(&self, shard: ShardId, records: impl Iterator<Item = Record<'a>>) -> Result<()> {
        let (database, sink) = &*self.0[usize::from(shard.get())];
        let may_apply = !self.is_rebuilding(shard)? || sink.lock().unwrap().strong_count() > 0;
        check(may_apply, "the shard waits for a rebuild")?;
        let applied = mark(database, "applied")?;
        let new: Vec<_> = records.filter(|record| record.lsn.get() > applied).collect();
        let Some(last) = new.last() else { return Ok(()) };
        let changes: Option<Vec<_>> = new.iter().map(|record| decode(record.bytes)).collect();
        let Some(changes) = changes else { return check(false, "a record is no put and no delete") };
        write(database, |txn| {
            let mut data = txn.open_table(DATA)?;
            for (key, value) in changes {
                let _ = if let Some(value) = value { data.insert(key, value)? } else { data.remove(key)? };
            }
            txn.open_table(MARKS)?.insert("applied", last.lsn.get())?;
            Ok(())
        })
    }
}

impl ReplicationTarget for RedbTarget {
    fn durable_applied(&self, shard: ShardId) -> Result<Option<Lsn>> {
        let applied = mark(&self.0[usize::from(shard.get())].0, "applied")?;
        Ok(Some(Lsn(if self.is_rebuilding(shard)? { 0 } else { applied })))
    }
    fn apply(&self, shard: ShardId, record: Record<'_>) -> Result<()> {
        self.apply_all(shard, std::iter::once(record))
    }
    fn apply_batch(&self, shard: ShardId, batch: &Batch<'_>) -> Result<()> {
        self.apply_all(shard, batch.records())
    }
    fn sync(&self, _: ShardId) -> Result<()> {
        Ok(()) // Every transaction is durable.
    }
    fn needs_durable_log(&self) -> bool {
        true // Else a crash could leave the database ahead of the log.
    }
    fn is_rebuilding(&self, shard: ShardId) -> Result<bool> {
        Ok(mark(&self.0[usize::from(shard.get())].0, "rebuilding")? != 0)
    }

    fn open_base(&self, shard: ShardId) -> Result<Box<dyn BaseSource>> {
        check(!self.is_rebuilding(shard)?, "the shard is being rebuilt")?;
        let image = self.0[usize::from(shard.get())].0.begin_read().map_err(redb_error)?;
        let info = BaseInfo { base_lsn: Lsn(mark_in(&image, "applied").map_err(redb_error)?), ..BaseInfo::default() };
        Ok(Box::new(Image { image, info, last: None, chunks: 0 }))
    }

    fn begin_base(&self, shard: ShardId, info: BaseInfo) -> Result<Box<dyn BaseSink>> {
        let own = &self.0[usize::from(shard.get())];
        let is_older = !self.is_rebuilding(shard)? && mark(&own.0, "applied")? > info.base_lsn.get();
        check(!info.is_numbered() && !is_older, "the base does not fit, or is older than what is here")?;
        let token = Arc::new(());
        *own.1.lock().unwrap() = Arc::downgrade(&token);
        write(&own.0, |txn| {
            txn.delete_table(DATA)?;
            drop(txn.open_table(DATA)?);
            let mut marks = txn.open_table(MARKS)?;
            marks.insert("rebuilding", 1)?;
            marks.insert("applied", info.base_lsn.get())?;
            Ok(())
        })?;
        Ok(Box::new(Rebuild { shard: Arc::clone(own), token, base_lsn: info.base_lsn, chunks: 0 }))
    }
}

/// A read transaction, given in chunks of puts, each with its length in 4 bytes before it.
struct Image {
    image: ReadTransaction,
    info: BaseInfo,
    last: Option<Vec<u8>>,
    chunks: u64,
}

impl BaseSource for Image {
    fn info(&self) -> BaseInfo {
        self.info
    }
    fn next_run(&mut self, buffer: &mut [u8]) -> Result<Option<BlockRun>> {
        let (mut len, last) = (0, self.last.clone());
        let from = last.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        let data = self.image.open_table(DATA).map_err(redb_error)?;
        for entry in data.range::<&[u8]>((from, Bound::Unbounded)).map_err(redb_error)? {
            let (key, value) = entry.map_err(redb_error)?;
            let bytes = put(key.value(), value.value());
            let Some(place) = buffer[len..].get_mut(..4 + bytes.len()) else {
                check(len > 0, "the buffer is too small for an entry")?;
                break;
            };
            place[..4].copy_from_slice(&u32::try_from(bytes.len()).unwrap().to_le_bytes());
            place[4..].copy_from_slice(&bytes);
            (len, self.last) = (len + place.len(), Some(key.value().to_vec()));
        }
        self.chunks += 1;
        Ok((len > 0).then_some(BlockRun { first: BlockId(self.chunks - 1), count: 1, len }))
    }
}

struct Rebuild {
    shard: Arc<(Database, Mutex<Weak<()>>)>,
    token: Arc<()>,
    base_lsn: Lsn,
    chunks: u64,
}

impl BaseSink for Rebuild {
    fn put_block(&mut self, block: BlockId, mut bytes: &[u8]) -> Result<()> {
        check(self.shard.1.lock().unwrap().as_ptr() == Arc::as_ptr(&self.token), "this rebuild is over")?;
        check(block.get() == self.chunks, "chunks come in order")?;
        let mut puts = Vec::new();
        while let Some((len, rest)) = bytes.split_first_chunk() {
            let (record, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize).unwrap_or_default();
            let Some((key, Some(value))) = decode(record) else { return check(false, "a chunk is damaged") };
            puts.push((key, value));
            bytes = rest;
        }
        self.chunks += 1;
        write(&self.shard.0, |txn| {
            let mut data = txn.open_table(DATA)?;
            for (key, value) in puts {
                data.insert(key, value)?;
            }
            Ok(())
        })
    }
    fn consistent_from(&self) -> Lsn {
        self.base_lsn
    }
    fn complete(&mut self, achieved: Lsn) -> Result<()> {
        check(self.shard.1.lock().unwrap().as_ptr() == Arc::as_ptr(&self.token), "this rebuild is over")?;
        let applied = mark(&self.shard.0, "applied")?;
        check(applied >= achieved.max(self.base_lsn).get(), "the log is not applied up to the end of the rebuild")?;
        write(&self.shard.0, |txn| {
            txn.open_table(MARKS)?.remove("rebuilding")?;
            Ok(())
        })?;
        self.cancel();
        Ok(())
    }
    fn cancel(&mut self) {
        self.token = Arc::new(()); // The shard knows no such token, and the one it knows is gone.
    }
}

/// The key's length in 2 bytes, the key, then 1 and the value, or 0 to delete.
fn put(key: &[u8], value: &[u8]) -> Vec<u8> {
    [&u16::try_from(key.len()).unwrap().to_le_bytes(), key, &[1], value].concat()
}

fn decode(bytes: &[u8]) -> Option<(&[u8], Option<&[u8]>)> {
    let (len, rest) = bytes.split_first_chunk()?;
    let (key, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
    let (is_put, value) = rest.split_first()?;
    Some((key, (*is_put == 1).then_some(value)))
}

fn write(database: &Database, change: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>) -> Result<()> {
    let txn = database.begin_write().map_err(redb_error)?;
    change(&txn).map_err(redb_error)?;
    txn.commit().map_err(redb_error)
}

fn mark(database: &Database, name: &str) -> Result<u64> {
    mark_in(&database.begin_read().map_err(redb_error)?, name).map_err(redb_error)
}

fn mark_in(txn: &ReadTransaction, name: &str) -> Result<u64, redb::Error> {
    Ok(txn.open_table(MARKS)?.get(name)?.map_or(0, |mark| mark.value()))
}

fn check(holds: bool, reason: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Invalid { reason: reason.into() }) }
}

fn redb_error(error: impl Into<redb::Error>) -> Error {
    Error::Io { action: "use", path: "redb".into(), source: Arc::new(std::io::Error::other(error.into())) }
}

mod tests {
    use std::path::PathBuf;
    use std::time::{Duration, Instant};

    use towline::{Follower, Leader, Node, Outcome, Until, WaitStrategy, wait_any};

    use super::*;

    const SHARDS: u16 = 2;

    /// The value that `number` of a shard must have once everything is applied: some are overwritten, some deleted.
    fn expected(shard: ShardId, number: u64) -> Option<Vec<u8>> {
        (number % 5 != 3)
            .then(|| format!("{shard}:{number}:{}", if number.is_multiple_of(3) { "new" } else { "old" }).into_bytes())
    }

    fn append(leader: &Leader, numbers: std::ops::Range<u64>) {
        for shard in (0..SHARDS).map(ShardId) {
            let mut writer = leader.writer(shard).unwrap();
            for number in numbers.clone() {
                let key = number.to_be_bytes();
                writer.append(&put(&key, format!("{shard}:{number}:old").as_bytes())).unwrap();
                match expected(shard, number) {
                    Some(value) => writer.append(&put(&key, &value)).unwrap(),
                    None => writer.append(&[&8_u16.to_le_bytes()[..], &key, &[0]].concat()).unwrap(),
                };
            }
            let deadline = Some(Instant::now() + Duration::from_secs(60));
            let head = writer.end().head;
            assert_eq!(leader.wait(shard, head, "applied:1".parse().unwrap(), deadline).unwrap(), Outcome::Committed);
            let own = Until { mark: leader.applied(shard).unwrap().unwrap(), at_least: head };
            wait_any(&[own], WaitStrategy::Park, deadline);
        }
    }

    fn assert_holds(target: &RedbTarget, count: u64) {
        for shard in (0..SHARDS).map(ShardId) {
            for number in 0..count {
                let found = target.get(shard, &number.to_be_bytes()).unwrap();
                assert_eq!(found, expected(shard, number), "shard {shard}, key {number}");
            }
            assert_eq!(target.get(shard, &count.to_be_bytes()).unwrap(), None);
        }
    }

    fn follow(directory: &Path, leader: &Leader, target: &Arc<RedbTarget>) -> Follower {
        let target = Arc::clone(target) as Arc<dyn ReplicationTarget>;
        Node::builder(directory).follow(leader.local_address(), target).unwrap()
    }

    #[test]
    fn a_follower_reads_what_the_leader_wrote_and_goes_on_from_its_own_position_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let [leader_dir, follower_dir] = ["leader", "follower"].map(|name| directory.path().join(name));
        let databases: [PathBuf; 2] = ["a", "b"].map(|name| directory.path().join(name));
        let mine = Arc::new(RedbTarget::open(&databases[0], SHARDS).unwrap());
        let lead = || {
            let target = Arc::clone(&mine) as Arc<dyn ReplicationTarget>;
            let builder = Node::builder(&leader_dir).shards(SHARDS).segment_size(1 << 20).target(target);
            builder.lead("127.0.0.1:0").unwrap()
        };
        let leader = lead();
        let theirs = Arc::new(RedbTarget::open(&databases[1], SHARDS).unwrap());
        let follower = follow(&follower_dir, &leader, &theirs);
        append(&leader, 0..200);
        assert_holds(&mine, 200);
        assert_holds(&theirs, 200);

        // Only the database remembers how far it has come.
        follower.shutdown().unwrap();
        drop(theirs);
        let _ = std::fs::remove_file(follower_dir.join("replication.ckpt"));
        leader.shutdown().unwrap();
        let leader = lead();
        let theirs = Arc::new(RedbTarget::open(&databases[1], SHARDS).unwrap());
        for shard in (0..SHARDS).map(ShardId) {
            assert_eq!(theirs.durable_applied(shard).unwrap(), Some(Lsn(400)));
        }
        let follower = follow(&follower_dir, &leader, &theirs);
        for shard in (0..SHARDS).map(ShardId) {
            assert!(follower.applied(shard).unwrap().load() >= Lsn(400), "it goes on where redb is");
        }
        append(&leader, 200..300);
        assert_holds(&mine, 300);
        assert_holds(&theirs, 300);
    }

    /// A target with `count` keys and LSNs in shard 0.
    fn filled(directory: &Path, count: u64) -> RedbTarget {
        let target = RedbTarget::open(directory, 1).unwrap();
        for number in 1..=count {
            let bytes = put(&number.to_be_bytes(), format!("value {number}").as_bytes());
            target.apply(ShardId(0), Record { lsn: Lsn(number), bytes: &bytes }).unwrap();
        }
        target
    }

    fn value(target: &RedbTarget, number: u64) -> Option<String> {
        target.get(ShardId(0), &number.to_be_bytes()).unwrap().map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn an_image_of_one_becomes_the_state_of_another() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (filled(&directory.path().join("a"), 40), filled(&directory.path().join("b"), 9));
        let mut source = from.open_base(ShardId(0)).unwrap();
        let info = source.info();
        assert_eq!((info.base_lsn, info.is_numbered()), (Lsn(40), false));
        // What comes later is not in the image, but in the log.
        let later = put(&7_u64.to_be_bytes(), b"later");
        let later = Record { lsn: Lsn(41), bytes: &later };
        from.apply(ShardId(0), later).unwrap();

        let mut sink = to.begin_base(ShardId(0), info).unwrap();
        assert!(to.get(ShardId(0), b"any").is_err(), "half an image is not served");
        assert_eq!(to.durable_applied(ShardId(0)).unwrap(), Some(Lsn::ZERO));
        let (mut buffer, mut chunks) = ([0; 100], 0);
        while let Some(run) = source.next_run(&mut buffer).unwrap() {
            sink.put_block(run.first, &buffer[..run.len]).unwrap();
            chunks += 1;
        }
        assert!(chunks > 5, "{chunks}");
        assert!(sink.complete(Lsn(41)).is_err(), "the log is still to come");
        to.apply(ShardId(0), later).unwrap();
        assert!(sink.consistent_from() <= Lsn(41));
        sink.complete(Lsn(41)).unwrap();
        assert!(!to.is_rebuilding(ShardId(0)).unwrap());
        assert_eq!(to.durable_applied(ShardId(0)).unwrap(), Some(Lsn(41)));
        for number in 1..=41 {
            assert_eq!(value(&to, number), value(&from, number), "key {number}");
        }
        assert_eq!(value(&to, 7).as_deref(), Some("later"));
        assert!(
            source.next_run(&mut [0; 8]).unwrap().is_none()
                && from.open_base(ShardId(0)).unwrap().next_run(&mut [0; 8]).is_err()
        );
    }

    #[test]
    fn a_rebuild_that_was_cut_off_serves_nothing_until_another_completes() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (filled(&directory.path().join("a"), 20), directory.path().join("b"));
        let target = filled(&to, 9);
        let info = from.open_base(ShardId(0)).unwrap().info();
        let older = BaseInfo { base_lsn: Lsn(8), ..info };
        assert!(target.begin_base(ShardId(0), older).is_err(), "an older base is refused");
        assert_eq!(value(&target, 9).as_deref(), Some("value 9"), "and changes nothing");
        let mut old = target.begin_base(ShardId(0), info).unwrap();
        let current = target.begin_base(ShardId(0), info).unwrap();
        assert!(old.put_block(BlockId(0), &[]).is_err(), "it was superseded");
        drop((old, current, target));

        let target = RedbTarget::open(&to, 1).unwrap();
        assert!(target.is_rebuilding(ShardId(0)).unwrap() && target.get(ShardId(0), b"any").is_err());
        let next = put(b"key", b"value");
        assert!(target.apply(ShardId(0), Record { lsn: Lsn(21), bytes: &next }).is_err());
        let (mut source, mut buffer) = (from.open_base(ShardId(0)).unwrap(), [0; 4096]);
        let mut sink = target.begin_base(ShardId(0), info).unwrap();
        while let Some(run) = source.next_run(&mut buffer).unwrap() {
            sink.put_block(run.first, &buffer[..run.len]).unwrap();
        }
        sink.complete(Lsn(20)).unwrap();
        assert_eq!(value(&target, 20).as_deref(), Some("value 20"));
    }
}
