//! Looking at a store without writing to it, also while its owner does.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::format::{Header, Slot};
use super::shard::read_header;
use super::{Entry, Visit, check_key, check_options, open_shard, refuse_orphaned_shards, shard_path};
use crate::data_dir::exists;
use crate::error::{Error, Result};
use crate::target::fixed_store::FixedStoreOptions;
use crate::target::{ShardRouter, TargetTopology};
use crate::types::{Lsn, ShardId};
use crate::wal::segment::read_at;

/// Bytes read at a time.
const CHUNK_LEN: usize = 256 * 1024;
/// How often a slot that does not validate is read again before it counts as damaged. Its owner may be writing it.
const READS: u32 = 1000;

/// A store opened for looking only: by a tool, beside a running node or on what a stopped one left.
///
/// It takes no lock, maps nothing and writes nothing. Slots are read from the file and shown only if their checksum is
/// right; one that is just being written is read again. There is no index: every look-up reads the shard.
///
/// What it shows of a store that is being written to was true, entry by entry, at some moment during the look; a key
/// that moves to another slot meanwhile may be missed. On a store that crashed it shows what reached the disk, which
/// may be newer than [`durable_applied`](Self::durable_applied) here and older there, until its owner replays the log.
///
/// ```
/// use towline::target::{FixedStore, FixedStoreOptions};
/// use towline::Lsn;
///
/// # let dir = tempfile::tempdir().unwrap();
/// let store = FixedStore::open(dir.path(), &FixedStoreOptions::default())?;
/// store.put(b"boat", b"red", |_, _| Ok(Lsn(1)))?;
///
/// let reader = FixedStore::open_read_only(dir.path())?;
/// assert_eq!(reader.get(b"boat")?.as_deref(), Some(&b"red"[..]));
/// # Ok::<(), towline::Error>(())
/// ```
#[derive(Debug)]
pub struct FixedStoreReader {
    shards: Vec<(PathBuf, File)>,
    router: ShardRouter,
    topology: TargetTopology,
}

impl FixedStoreReader {
    pub(super) fn open(directory: &Path) -> Result<FixedStoreReader> {
        let is_made = || exists(&shard_path(directory, 0));
        // There is no store, or one is being made, or this is what is left of one: whoever took that for none would go
        // on without it.
        if exists(directory)?
            && !is_made()?
            && let Err(error) = refuse_orphaned_shards(directory)
            && !is_made()?
        {
            return Err(error);
        }
        let (path, file, first) = open_shard(directory, 0, false)?;
        let options = FixedStoreOptions {
            key_len: first.layout.key_len,
            value_len: first.layout.value_len,
            shard_count: first.shard_count,
            prefix_bits: first.prefix_bits,
        };
        let mut shards = vec![(path, file)];
        for number in 1..first.shard_count {
            let (path, file, header) = open_shard(directory, number, false)?;
            check_options(&path, &header, ShardId(number), &options)?;
            shards.push((path, file));
        }
        let router = ShardRouter::new(first.shard_count, first.prefix_bits)?;
        Ok(FixedStoreReader { shards, router, topology: first.topology() })
    }

    /// Which shard a key belongs to.
    #[must_use]
    pub const fn router(&self) -> ShardRouter {
        self.router
    }

    /// What the store was made for.
    #[must_use]
    pub const fn topology(&self) -> TargetTopology {
        self.topology
    }

    /// LSN up to which the shard's slots are on stable storage, as of now.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no such shard or it is being rebuilt, [`Error::Corrupt`] for a damaged header.
    pub fn durable_applied(&self, shard: ShardId) -> Result<Lsn> {
        Ok(self.header(shard)?.applied)
    }

    /// The value of a key; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] if the key was not found and a slot of its shard is damaged, [`Error::Invalid`] while the
    /// shard is being rebuilt, I/O errors.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        check_key(key, self.topology.key_len)?;
        let mut best: Option<(Lsn, Vec<u8>)> = None;
        // After a crash a key can be in the slot it left as well as in the one it moved to: the newer version counts.
        let result = self.scan_shard(self.router.route(key), &mut |entry| {
            if entry.key == key && best.as_ref().is_none_or(|(lsn, _)| *lsn < entry.lsn) {
                best = Some((entry.lsn, entry.value.to_vec()));
            }
            ControlFlow::Continue(())
        });
        match (best, result) {
            (Some((_, value)), Ok(_) | Err(Error::Corrupt { .. })) => Ok(Some(value)),
            (None, Ok(_)) => Ok(None),
            (_, Err(error)) => Err(error),
        }
    }

    /// Shows every entry of every shard to `visit`, shard by shard in slot order, until that breaks.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get). Damage is reported after all entries of its shard have been shown.
    pub fn scan(&self, mut visit: impl FnMut(Entry<'_>) -> ControlFlow<()>) -> Result<()> {
        for number in 0..self.router.shard_count() {
            if self.scan_shard(ShardId(number), &mut visit)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// How many keys there are.
    ///
    /// # Errors
    ///
    /// As [`scan`](Self::scan).
    pub fn count(&self) -> Result<u64> {
        let mut count = 0;
        self.scan(|_| {
            count += 1;
            ControlFlow::Continue(())
        })?;
        Ok(count)
    }

    fn scan_shard(&self, id: ShardId, visit: &mut Visit<'_>) -> Result<ControlFlow<()>> {
        let (header, (path, file)) = (self.header(id)?, self.shard(id)?);
        let slot_len = header.layout.slot_len();
        let mut chunk = vec![0; (CHUNK_LEN / slot_len).max(1) * slot_len];
        let (mut slot, mut damage) = (0, None);
        while slot < header.slot_count {
            fill(file, &mut chunk, header.layout.slot_offset(slot)).map_err(Error::io("read", path))?;
            for (slot, bytes) in (slot..header.slot_count).zip(chunk.chunks_exact_mut(slot_len)) {
                match read_again(path, file, &header, slot, bytes)? {
                    Ok(Slot::Occupied { lsn, key, value }) => {
                        if visit(Entry { shard: id, slot, lsn, key, value }).is_break() {
                            return Ok(ControlFlow::Break(()));
                        }
                    }
                    Ok(_) => {}
                    Err(error) => damage = damage.or(Some(error)),
                }
            }
            slot += (chunk.len() / slot_len) as u64;
        }
        // Entries vanish when a rebuild begins: what was shown may be half of a store.
        self.header(id)?;
        damage.map_or(Ok(ControlFlow::Continue(())), Err)
    }

    fn shard(&self, shard: ShardId) -> Result<&(PathBuf, File)> {
        let missing = || Error::invalid(format!("there is no shard {shard}; the store has {}", self.shards.len()));
        self.shards.get(usize::from(shard.0)).ok_or_else(missing)
    }

    /// The header as it is now. One copy is whole at any time, but while both are being looked at the owner may write
    /// one after the other, so an invalid page is read again.
    fn header(&self, id: ShardId) -> Result<Header> {
        let (path, file) = self.shard(id)?;
        let mut result = read_header(path, file);
        for _ in 1..READS {
            if !matches!(result, Err(Error::Corrupt { .. })) {
                break;
            }
            std::thread::yield_now();
            result = read_header(path, file);
        }
        let header = result?;
        if header.rebuilding {
            return Err(Error::invalid(format!("shard {id} in {} is being rebuilt", path.display())));
        }
        Ok(header)
    }
}

/// Decodes a slot from `bytes`, reading it again a bounded number of times while it does not validate.
fn read_again<'a>(
    path: &Path,
    file: &File,
    header: &Header,
    slot: u64,
    bytes: &'a mut [u8],
) -> Result<std::result::Result<Slot<'a>, Error>> {
    let offset = header.layout.slot_offset(slot);
    for _ in 1..READS {
        if Slot::decode(&header.layout, slot, bytes).is_ok() {
            break;
        }
        std::thread::yield_now();
        fill(file, bytes, offset).map_err(Error::io("read", path))?;
    }
    Ok(Slot::decode(&header.layout, slot, bytes).map_err(|reason| Error::corrupt(path, offset, None, reason)))
}

/// Fills the buffer from an offset; what lies past the end of the file is zeros.
pub(super) fn fill(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match read_at(file, bytes, offset) {
            Ok(0) => {
                bytes.fill(0);
                break;
            }
            Ok(len) => {
                bytes = &mut bytes[len..];
                offset += len as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
