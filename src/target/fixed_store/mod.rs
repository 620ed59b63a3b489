//! The built-in target: a sharded store of fixed-size slots in mapped files.
//!
//! # What is where
//!
//! A store is a directory with a lock file, `LOCK`, and one file per shard, `slots-0000.tfs` and so on, whose bytes
//! [`mod@format`] specifies: a header page, then slots of one size. A slot is free, or holds a key and its value, or
//! remembers that its key was deleted. A [`ShardRouter`] says which shard a key belongs to; an index in memory, rebuilt
//! when the store is opened, says in which slot it is. Files grow by an eighth at a time, filled with real zeros before
//! they are mapped, so a full disk is an error and never a fault; during a rebuild they grow by the blocks of the base,
//! which are mapped at its end.
//!
//! # Writing
//!
//! Every change goes through the log first. The leader chooses the slot and puts it into the record, so the slots of
//! leader and followers are the same, byte for byte. There are two ways:
//!
//! - [`put`](FixedStore::put) and [`delete`](FixedStore::delete) append the record through a closure and apply it at
//!   once: the change can be read when they return.
//! - [`propose_put`](FixedStore::propose_put) and [`propose_delete`](FixedStore::propose_delete) only append it. The
//!   log's applier applies it, as on a follower: once it is durable. This is the way of a node, because a crash can
//!   then not leave a slot whose record the log has lost, and many writes share one sync.
//!
//! # Reading
//!
//! Readers take no lock that is held for longer than one look-up, and never see half a slot. Every read checks the
//! slot's checksum: damage is an [`Error::Corrupt`] that names file and offset, never a value. A key that is not found
//! while the shard has torn slots is such an error as well, because it may be in one of them.
//!
//! # Durability
//!
//! Changed slots reach the disk at any time, in any subset, until [`sync`](ReplicationTarget::sync) makes sure of all
//! of them and then moves [`durable_applied`](ReplicationTarget::durable_applied) forward. After a crash the log is
//! replayed from there; until the replay has passed the newest slot that reached the disk, the shard refuses to be
//! read. How that works stands in `apply.rs`, and what is done after a sync that failed in `shard.rs`. Slots are
//! verified at every open, also after a clean shutdown: the clean mark only tells damage from a crash in what is
//! reported, and that the header need not be written again.

mod apply;
mod arriving;
mod base;
pub mod format;
mod held;
mod index;
mod reader;
mod shard;
mod slots_map;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use format::{MAX_KEY_LEN, MAX_SLOTS, MAX_VALUE_LEN};
pub use reader::FixedStoreReader;

use self::format::{Header, Layout, Operation, SLOTS_OFFSET, Slot};
use self::held::Room;
use self::shard::{Shard, read_header};
use crate::data_dir::{create_directory, exists, sync_parent};
use crate::directory_lock::lock_directory;
use crate::error::{Error, Result};
use crate::target::{
    BaseInfo, BaseSink, BaseSource, BlockId, KeptBase, ReplicationTarget, ShardRouter, TargetTopology,
};
use crate::types::{Lsn, ShardId};
use crate::wal::segment::{sync_directory, write_all_at, zero_in_pages};
use crate::wal::{Batch, Record};

/// What a store is made for. Fixed when its directory is made, and the same on every node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedStoreOptions {
    /// The longest key, in bytes: 1 to [`MAX_KEY_LEN`]. Every slot has room for it.
    pub key_len: u32,
    /// The longest value, in bytes: up to [`MAX_VALUE_LEN`]. Every slot has room for it.
    pub value_len: u32,
    /// How many shards.
    pub shard_count: u16,
    /// Leading bits of a key that choose its shard; 0 to route by hash. See [`ShardRouter`].
    pub prefix_bits: u8,
}

impl Default for FixedStoreOptions {
    /// Keys of up to 32 bytes, values of up to 200 (slots of 256), one shard.
    fn default() -> Self {
        FixedStoreOptions { key_len: 32, value_len: 200, shard_count: 1, prefix_bits: 0 }
    }
}

/// One key and its value, as shown by a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The shard that it is in.
    pub shard: ShardId,
    /// The slot that it is in.
    pub slot: u64,
    /// LSN of the record that wrote it.
    pub lsn: Lsn,
    /// The key.
    pub key: &'a [u8],
    /// The value.
    pub value: &'a [u8],
}

/// What a scan calls for each entry.
type Visit<'a> = dyn FnMut(Entry<'_>) -> ControlFlow<()> + 'a;

/// A sharded store of fixed-size slots; see the [module](self) for how it works.
///
/// Shared by reference or `Arc` between any number of threads. Dropping it syncs it and marks it as closed in order, as
/// [`close`](Self::close) does.
///
/// ```
/// use towline::target::{FixedStore, FixedStoreOptions, ReplicationTarget};
/// use towline::wal::Record;
/// use towline::Lsn;
///
/// # let dir = tempfile::tempdir().unwrap();
/// let leader = FixedStore::open(dir.path().join("leader"), &FixedStoreOptions::default())?;
/// let follower = FixedStore::open(dir.path().join("follower"), &FixedStoreOptions::default())?;
///
/// // A log of records in memory, for the example.
/// let mut log: Vec<Vec<u8>> = Vec::new();
/// let lsn = leader.put(b"boat", b"red", |_shard, record| {
///     log.push(record.to_vec());
///     Ok(Lsn(log.len() as u64))
/// })?;
/// assert_eq!(leader.get(b"boat")?.as_deref(), Some(&b"red"[..]));
///
/// let shard = follower.router().route(b"boat");
/// follower.apply(shard, Record { lsn, bytes: &log[0] })?;
/// assert_eq!(follower.get(b"boat")?.as_deref(), Some(&b"red"[..]));
/// follower.sync(shard)?;
/// assert_eq!(follower.durable_applied(shard)?, Some(lsn));
/// # Ok::<(), towline::Error>(())
/// ```
///
/// As the target of a node, which applies what was proposed:
///
/// ```
/// use std::sync::Arc;
/// use towline::target::{FixedStore, FixedStoreOptions};
/// use towline::{Commit, Node, ShardId, WaitStrategy, wait_any};
///
/// # let dir = tempfile::tempdir().unwrap();
/// let store = Arc::new(FixedStore::open(dir.path().join("store"), &FixedStoreOptions::default())?);
/// let leader = Node::builder(dir.path().join("node")).target(store.clone()).lead("127.0.0.1:0")?;
/// let mut writer = leader.writer(ShardId(0))?;
/// let lsn = store.propose_put(b"boat", b"red", |_shard, record| writer.append(record))?;
/// assert!(leader.wait(ShardId(0), lsn, Commit::SYNCED, None)?.is_committed());
///
/// let applied = leader.applied(ShardId(0))?.expect("it has a target");
/// wait_any(&[applied.until(lsn)], WaitStrategy::Park, None);
/// assert_eq!(store.get(b"boat")?.as_deref(), Some(&b"red"[..]));
/// # Ok::<(), towline::Error>(())
/// ```
pub struct FixedStore {
    directory: PathBuf,
    router: ShardRouter,
    topology: TargetTopology,
    shards: Vec<Arc<Shard>>,
}

impl FixedStore {
    /// Opens the store in `directory`, which is made if it is not there. Reads and checks every slot.
    ///
    /// Torn slots do not prevent it: the log is about to be replayed over them. See
    /// [`torn_slots`](Self::torn_slots).
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if another process has it open, [`Error::Mismatch`] (which names the field and both values) if
    /// it was made with other options, [`Error::Corrupt`] for a damaged header, a file that is cut off, or one that is
    /// missing: that of shard 0 where another shard's was in use, or another shard's where that of shard 0 is there;
    /// I/O errors.
    pub fn open(directory: impl AsRef<Path>, options: &FixedStoreOptions) -> Result<FixedStore> {
        let directory = directory.as_ref();
        let layout = Layout::new(options.key_len, options.value_len).map_err(Error::invalid)?;
        let router = ShardRouter::new(options.shard_count, options.prefix_bits)?;
        create_directory(directory)?;
        let lock = Arc::new(lock_directory(directory)?);
        if !exists(&shard_path(directory, 0))? {
            refuse_orphaned_shards(directory)?;
            create(directory, options, layout)?;
        }
        // Also where another process made it and was killed before this.
        sync_directory(directory).map_err(Error::io("sync", directory))?;
        let room = Room::new();
        let mut shards = Vec::new();
        for number in 0..options.shard_count {
            let (path, file, header) = open_shard(directory, number, true)?;
            check_options(&path, &header, ShardId(number), options)?;
            shards.push(Arc::new(Shard::open(path, file, header, Arc::clone(&room), Arc::clone(&lock))?));
        }
        let topology =
            TargetTopology { key_len: options.key_len, value_len: options.value_len, prefix_bits: options.prefix_bits };
        Ok(FixedStore { directory: directory.to_owned(), router, topology, shards })
    }

    /// Opens a store for looking at it, also while another process writes to it; see [`FixedStoreReader`].
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open), without [`Error::InUse`]; [`Error::Io`] of a file that was not found where there is no
    /// store.
    pub fn open_read_only(directory: impl AsRef<Path>) -> Result<FixedStoreReader> {
        FixedStoreReader::open(directory.as_ref())
    }

    /// The directory that it is in.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Which shard a key belongs to.
    #[must_use]
    pub const fn router(&self) -> ShardRouter {
        self.router
    }

    /// LSN up to which everything is in the shard's slots, synced or not; `None` if there is no such shard.
    #[must_use]
    pub fn applied(&self, shard: ShardId) -> Option<Lsn> {
        self.shards.get(usize::from(shard.0)).map(|shard| shard.applied())
    }

    /// The newest effect that reached the shard's slots: reads are refused until this has been applied. Above
    /// [`applied`](Self::applied) only after a crash, and during a rebuild.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard.
    pub fn consistent_from(&self, shard: ShardId) -> Result<Lsn> {
        Ok(self.shard(shard)?.consistent_from())
    }

    /// How many slots of the shard cannot be read, because a crash tore them or the disk damaged them. Replaying the
    /// log mends the former.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard.
    pub fn torn_slots(&self, shard: ShardId) -> Result<u64> {
        Ok(self.shard(shard)?.torn.load(Ordering::Acquire))
    }

    /// The value of a key; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] if the slot is damaged, or the key may be in a torn one; [`Error::Invalid`] while the shard
    /// is being rebuilt, or recovered after a crash.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut value = Vec::new();
        Ok(self.get_into(key, &mut value)?.map(|_| value))
    }

    /// The value of a key in a buffer of the caller's, without allocating once that has room for a slot. Returns the
    /// LSN of the record that wrote the value; `None` if there is none. The buffer's old contents are lost either way.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get).
    pub fn get_into(&self, key: &[u8], value: &mut Vec<u8>) -> Result<Option<Lsn>> {
        self.shard_of(key)?.get_into(key, value)
    }

    /// Shows every entry of every shard to `visit`, shard by shard in slot order, until that breaks. Entries that
    /// change meanwhile are shown as they were or as they are; one that moves may be shown twice or not at all.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get).
    pub fn scan(&self, mut visit: impl FnMut(Entry<'_>) -> ControlFlow<()>) -> Result<()> {
        for shard in &self.shards {
            if shard.scan(&mut visit)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// How many keys there are.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] while a shard is being rebuilt or recovered, [`Error::Corrupt`] if one has torn slots.
    pub fn count(&self) -> Result<u64> {
        let mut count = 0;
        for shard in &self.shards {
            shard.check_serving()?;
            shard.check_whole()?;
            count += shard.occupied.load(Ordering::Acquire);
        }
        Ok(count)
    }

    /// Sets the value of a key, through the log: `append` is given the shard and the record, appends it to that shard's
    /// log and returns its LSN. The record is then applied. Returns its LSN.
    ///
    /// `append` runs while other writes to the shard wait, so that records are applied in order. Where losing power
    /// must not lose the log's record and keep the slot, `append` returns only after the record is durable; see
    /// [Writing](self#writing) for the faster way.
    ///
    /// # Errors
    ///
    /// What `append` returns, and then nothing has changed. [`Error::Invalid`] if key or value are too long, the shard
    /// cannot be read, or proposed records are not applied yet. If applying fails after the record was appended, it is
    /// in the log all the same, and is applied when the log is replayed.
    pub fn put(&self, key: &[u8], value: &[u8], append: impl FnOnce(ShardId, &[u8]) -> Result<Lsn>) -> Result<Lsn> {
        self.check_value(value)?;
        let written = self.shard_of(key)?.write(key, Some(value), append)?;
        Ok(written.unwrap_or(Lsn::ZERO))
    }

    /// Deletes a key, through the log as [`put`](Self::put) does. `None`, without a record, if there is no such key.
    ///
    /// # Errors
    ///
    /// As [`put`](Self::put).
    pub fn delete(&self, key: &[u8], append: impl FnOnce(ShardId, &[u8]) -> Result<Lsn>) -> Result<Option<Lsn>> {
        self.shard_of(key)?.write(key, None, append)
    }

    /// Appends the record that sets the value of a key, and leaves applying it to the log's applier. Later proposals
    /// take this one into account, readers do not. `append` is as for [`put`](Self::put), and need not wait for
    /// anything.
    ///
    /// # Errors
    ///
    /// As [`put`](Self::put).
    pub fn propose_put(
        &self,
        key: &[u8],
        value: &[u8],
        append: impl FnOnce(ShardId, &[u8]) -> Result<Lsn>,
    ) -> Result<Lsn> {
        self.check_value(value)?;
        let proposed = self.shard_of(key)?.propose(key, Some(value), append)?;
        Ok(proposed.unwrap_or(Lsn::ZERO))
    }

    /// Appends the record that deletes a key, as [`propose_put`](Self::propose_put) does. `None`, without a record, if
    /// there will be no such key by then.
    ///
    /// # Errors
    ///
    /// As [`put`](Self::put).
    pub fn propose_delete(
        &self,
        key: &[u8],
        append: impl FnOnce(ShardId, &[u8]) -> Result<Lsn>,
    ) -> Result<Option<Lsn>> {
        self.shard_of(key)?.propose(key, None, append)
    }

    /// Forgets what was proposed and not applied. For whoever stops being the leader, before the log is cut; and for
    /// whoever becomes it, after all of the log has been applied.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] if a slot is damaged.
    pub fn abandon_proposals(&self) -> Result<()> {
        self.shards.iter().try_for_each(|shard| shard.abandon())
    }

    /// Syncs every shard and marks it as closed in order. Dropping the store does the same, and can only log an error.
    ///
    /// # Errors
    ///
    /// If a shard cannot be synced; the others are closed all the same.
    pub fn close(self) -> Result<()> {
        let results: Vec<Result<()>> = self.shards.iter().map(|shard| shard.close()).collect();
        results.into_iter().collect()
    }

    fn shard(&self, shard: ShardId) -> Result<&Arc<Shard>> {
        self.shards.get(usize::from(shard.0)).ok_or_else(|| {
            Error::invalid(format!("there is no shard {shard}; {} has {}", self.directory.display(), self.shards.len()))
        })
    }

    fn shard_of(&self, key: &[u8]) -> Result<&Arc<Shard>> {
        check_key(key, self.topology.key_len)?;
        self.shard(self.router.route(key))
    }

    fn check_value(&self, value: &[u8]) -> Result<()> {
        if value.len() as u64 > u64::from(self.topology.value_len) {
            return Err(Error::invalid(format!(
                "a value of {} bytes; this store takes up to {}",
                value.len(),
                self.topology.value_len
            )));
        }
        Ok(())
    }
}

impl Drop for FixedStore {
    fn drop(&mut self) {
        for shard in &self.shards {
            if let Err(error) = shard.close() {
                log::error!("{} was not closed in order: {error}", shard.path.display());
            }
        }
    }
}

impl std::fmt::Debug for FixedStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FixedStore")
            .field("directory", &self.directory)
            .field("topology", &self.topology)
            .field("shards", &self.shards.len())
            .finish_non_exhaustive()
    }
}

impl ReplicationTarget for FixedStore {
    fn durable_applied(&self, shard: ShardId) -> Result<Option<Lsn>> {
        Ok(Some(self.shard(shard)?.durable_applied()))
    }

    fn apply(&self, shard: ShardId, record: Record<'_>) -> Result<()> {
        let shard = self.shard(shard)?;
        shard.apply(&mut shard.writer.lock(), record.lsn, record.bytes)
    }

    fn apply_batch(&self, shard: ShardId, batch: &Batch<'_>) -> Result<()> {
        let shard = self.shard(shard)?;
        let mut writer = shard.writer.lock();
        batch.records().try_for_each(|record| shard.apply(&mut writer, record.lsn, record.bytes))
    }

    fn sync(&self, shard: ShardId) -> Result<()> {
        self.shard(shard)?.sync()
    }

    fn topology(&self) -> TargetTopology {
        self.topology
    }

    fn needs_durable_log(&self) -> bool {
        true
    }

    /// The newest version in the slots, unless one of them is torn or could not be written: whatever was being written
    /// there is not known then.
    fn touched(&self, shard: ShardId) -> Result<Option<Lsn>> {
        let shard = self.shard(shard)?;
        let is_whole = shard.torn.load(Ordering::Acquire) == 0 && shard.check_sound().is_ok();
        Ok(is_whole.then(|| shard.consistent_from().max(shard.applied())))
    }

    fn is_rebuilding(&self, shard: ShardId) -> Result<bool> {
        Ok(self.shard(shard)?.is_rebuilding())
    }

    fn open_base(&self, shard: ShardId) -> Result<Box<dyn BaseSource>> {
        base::open_base(self.shard(shard)?)
    }

    fn give_up(&self, shard: ShardId) -> Result<()> {
        base::give_up(self.shard(shard)?)
    }

    fn begin_base(&self, shard: ShardId, info: BaseInfo) -> Result<Box<dyn BaseSink>> {
        base::begin_base(self.shard(shard)?, info)
    }

    fn resumes_bases(&self) -> bool {
        true
    }

    fn resume_base(&self, shard: ShardId, info: BaseInfo, kept: KeptBase) -> Result<Box<dyn BaseSink>> {
        base::resume_base(self.shard(shard)?, info, kept)
    }

    fn blocks_of(&self, shard: ShardId, record: Record<'_>, blocks: &mut Vec<BlockId>) -> Result<bool> {
        let shard = self.shard(shard)?;
        let operation =
            Operation::decode(&shard.layout, record.bytes).map_err(|reason| shard.foreign(record.lsn, &reason))?;
        blocks.push(BlockId(operation.slot));
        Ok(true)
    }
}

fn check_key(key: &[u8], key_len: u32) -> Result<()> {
    if key.is_empty() || key.len() as u64 > u64::from(key_len) {
        return Err(Error::invalid(format!("a key of {} bytes; this store takes 1 to {key_len}", key.len())));
    }
    Ok(())
}

fn shard_path(directory: &Path, number: u16) -> PathBuf {
    directory.join(format!("slots-{number:04}.tfs"))
}

/// In a directory without a file of shard 0: fails if another shard's file was ever in use, or cannot be told not to
/// have been. Whoever is killed while [making](create) a store leaves whole files without a slot and with the header
/// that they were made with, which the first open writes again. Any others are what is left of a store that has lost a
/// file.
fn refuse_orphaned_shards(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(Error::io("read", directory))? {
        let path = entry.map_err(Error::io("read", directory))?.path();
        if path.extension().is_some_and(|extension| extension == "tfs") && !is_as_made(&path)? {
            let reason = format!("it is missing, though {} is there; restore it", path.display());
            return Err(Error::corrupt(shard_path(directory, 0), 0, None, reason));
        }
    }
    Ok(())
}

fn is_as_made(path: &Path) -> Result<bool> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    let len = file.metadata().map_err(Error::io("look at", path))?.len();
    match read_header(path, &file) {
        Ok(header) => Ok(len == SLOTS_OFFSET && header.slot_count == 0 && header.generation == 0),
        Err(Error::Corrupt { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes the file of every shard. Shard 0 gets its name last, so where it is there all are. Files that get their names
/// are whole and synced, so that what an interruption leaves can be [told](refuse_orphaned_shards) from a store.
fn create(directory: &Path, options: &FixedStoreOptions, layout: Layout) -> Result<()> {
    // Whoever made the directory may have been killed before its name was durable.
    sync_parent(directory)?;
    for number in (0..options.shard_count).rev() {
        let path = shard_path(directory, number);
        let made = path.with_extension("new");
        let header = Header {
            shard: ShardId(number),
            shard_count: options.shard_count,
            prefix_bits: options.prefix_bits,
            clean: true,
            rebuilding: false,
            layout,
            slot_count: 0,
            applied: Lsn::ZERO,
            generation: 0,
        };
        File::create(&made)
            .and_then(|file| {
                zero_in_pages(&file, 0..SLOTS_OFFSET)?;
                write_all_at(&file, &header.encode(), header.offset())?;
                file.sync_all()
            })
            .map_err(Error::io("make", &made))?;
        fs::rename(&made, &path).map_err(Error::io("rename", &made))?;
        sync_directory(directory).map_err(Error::io("sync", directory))?;
    }
    Ok(())
}

fn open_shard(directory: &Path, number: u16, write: bool) -> Result<(PathBuf, File, Header)> {
    let path = shard_path(directory, number);
    let file = File::options().read(true).write(write).open(&path).map_err(|error| {
        if number > 0 && error.kind() == std::io::ErrorKind::NotFound {
            // Once that of shard 0 is there, all are.
            let first = shard_path(directory, 0);
            return Error::corrupt(
                &path,
                0,
                None,
                format!("it is missing, though {} is there; restore it", first.display()),
            );
        }
        Error::io("open", &path)(error)
    })?;
    let header = read_header(&path, &file)?;
    Ok((path, file, header))
}

fn check_options(path: &Path, header: &Header, shard: ShardId, options: &FixedStoreOptions) -> Result<()> {
    let mismatch = |name: &str, found: u32, asked: u32| Error::Mismatch {
        path: path.to_owned(),
        reason: format!("the store was made with {name} {found}, not {asked}").into(),
    };
    for (name, found, asked) in [
        ("shard_count", u32::from(header.shard_count), u32::from(options.shard_count)),
        ("key_len", header.layout.key_len, options.key_len),
        ("value_len", header.layout.value_len, options.value_len),
        ("prefix_bits", u32::from(header.prefix_bits), u32::from(options.prefix_bits)),
        ("shard", u32::from(header.shard.0), u32::from(shard.0)),
    ] {
        if found != asked {
            return Err(mismatch(name, found, asked));
        }
    }
    Ok(())
}

/// For [`crate::seams`]: what is read, written again.
pub(crate) fn decode_header(page: &[u8]) -> Result<Vec<u8>, String> {
    Header::decode_page(page).map(|header| header.encode().to_vec())
}

/// For [`crate::seams`]: what is read, written again.
pub(crate) fn decode_slot((key_len, value_len): (u32, u32), slot: u64, bytes: &[u8]) -> Result<Vec<u8>, String> {
    let layout = Layout::new(key_len, value_len)?;
    let mut again = Vec::new();
    Slot::decode(&layout, slot, bytes)?.encode(&layout, slot, &mut again);
    Ok(again)
}

/// For [`crate::seams`]: what is read, written again.
pub(crate) fn decode_record((key_len, value_len): (u32, u32), bytes: &[u8]) -> Result<Vec<u8>, String> {
    let layout = Layout::new(key_len, value_len)?;
    let mut again = Vec::new();
    Operation::decode(&layout, bytes)?.encode(&mut again);
    Ok(again)
}
