//! One shard of a fixed store: its file, its header, its marks, and reading from it.
//!
//! # Marks
//!
//! `header.applied <= applied`, and while the shard serves `consistent_from <= applied`.
//!
//! | mark | meaning | changed by |
//! |---|---|---|
//! | `header.applied` | applied and on stable storage | `sync` and the end of a rebuild, after the slots were synced |
//! | `applied` | in the slots | whoever holds the `writer` lock, after the slot was written (Release) |
//! | `consistent_from` | the newest effect that may be in the slots; at a lower `applied` they are no state that ever was | open, begin and end of a rebuild |
//!
//! # After a failed sync
//!
//! The kernel takes pages that it could not write for written, keeps them in its cache and tells of the error once.
//! Whoever opens the shard then, while the machine stays up, reads what the device may not have, and a sync of that
//! does nothing. So nothing that was read counts as durable unless a sync that did not fail is known to have covered
//! it. The rest is written again as it is, for the next sync to put on the device: the header, unless it carries the
//! mark of closing in order; slots newer than `header.applied`, by [`load`](Shard::load); and during a rebuild what
//! `base.rs` says.
//!
//! # Locks
//!
//! `writer` before `header`. `sync` takes `syncing` and, briefly, `header`: appliers go on while the disk works.
//! Readers take none of them.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::apply::Writer;
use super::format::{Header, Layout, SLOTS_OFFSET, Slot};
use super::held::Room;
use super::index::KeyIndex;
use super::slots_map::{SlotWriter, SlotsMap};
use super::{Entry, Visit};
use crate::allocate::allocate;
use crate::error::{Error, Result};
use crate::limits::PAGE_LEN;
use crate::types::{Lsn, ShardId};
use crate::wal::segment::{read_at, write_all_at, write_in_pages, zero_in_pieces};

/// Bytes of zeros that are written at once. The page cache keeps such a piece as one folio, and whoever writes a part
/// of that later goes through all its blocks: with 64 KiB puts of 4 KiB all over a store took a quarter longer than
/// with 16, with single pages not less.
const ZERO_PIECE: u64 = 16 << 10;

pub(super) struct Shard {
    pub(super) id: ShardId,
    pub(super) path: PathBuf,
    pub(super) layout: Layout,
    pub(super) map: SlotsMap,
    pub(super) index: KeyIndex,
    pub(super) writer: Mutex<Writer>,
    pub(super) applied: AtomicU64,
    pub(super) consistent_from: AtomicU64,
    pub(super) rebuilding: AtomicBool,
    /// Occupied slots. Exact while the shard serves.
    pub(super) occupied: AtomicU64,
    /// Slots that do not validate and have not been written again yet.
    pub(super) torn: AtomicU64,
    pub(super) file: File,
    header: Mutex<Header>,
    syncing: Mutex<()>,
    poisoned: OnceLock<String>,
    /// Memory for slots that a base has not reached.
    pub(super) room: Arc<Room>,
    /// Held for as long as anything of the store can write.
    _lock: Arc<File>,
}

impl Shard {
    /// Takes an existing file into use: maps its slots, checks each of them, and finds out where the keys are.
    pub(super) fn open(path: PathBuf, file: File, header: Header, room: Arc<Room>, lock: Arc<File>) -> Result<Shard> {
        let (map, mut slots) = SlotsMap::new(header.layout);
        let end = header.layout.slot_offset(header.slot_count);
        let file_len = file.metadata().map_err(Error::io("look at", &path))?.len();
        if file_len < end {
            let reason = format!("the file ends here, before its {} slots", header.slot_count);
            return Err(Error::corrupt(&path, file_len, None, reason));
        }
        map.extend(&mut slots, &file, header.slot_count).map_err(Error::io("map", &path))?;
        let shard = Shard {
            id: header.shard,
            path,
            layout: header.layout,
            map,
            index: KeyIndex::new(),
            writer: Mutex::new(Writer::new(slots, &header)),
            applied: AtomicU64::new(header.applied.0),
            consistent_from: AtomicU64::new(header.applied.0),
            rebuilding: AtomicBool::new(header.rebuilding),
            occupied: AtomicU64::new(0),
            torn: AtomicU64::new(0),
            file,
            header: Mutex::new(header),
            syncing: Mutex::new(()),
            poisoned: OnceLock::new(),
            room,
            _lock: lock,
        };
        // Closed in order, it says what a header before it said, and that one's sync did not fail. The one that the
        // file was made with must not stay the newest: it tells that nobody has had the store open.
        if !header.clean || header.generation == 0 {
            shard.rewrite_header()?;
        }
        if !header.rebuilding {
            shard.load(&mut shard.writer.lock(), false)?;
            shard.report_damage(&header);
        }
        Ok(shard)
    }

    fn report_damage(&self, header: &Header) {
        let torn = self.torn.load(Ordering::Relaxed);
        let path = self.path.display();
        if torn != 0 && header.clean {
            log::error!("{path} was closed in order, but {torn} slots are damaged");
        } else if torn != 0 {
            log::warn!("{path} has {torn} torn slots, to be written again from the log after LSN {}", header.applied);
        }
    }

    pub(super) fn applied(&self) -> Lsn {
        Lsn(self.applied.load(Ordering::Acquire))
    }

    pub(super) fn consistent_from(&self) -> Lsn {
        Lsn(self.consistent_from.load(Ordering::Acquire))
    }

    pub(super) fn is_rebuilding(&self) -> bool {
        self.rebuilding.load(Ordering::Acquire)
    }

    pub(super) fn durable_applied(&self) -> Lsn {
        self.header.lock().applied
    }

    /// Fails unless the slots are the state at `applied`.
    pub(super) fn check_serving(&self) -> Result<()> {
        if self.is_rebuilding() {
            return Err(Error::invalid(format!("shard {} in {} is being rebuilt", self.id, self.path.display())));
        }
        let (applied, needed) = (self.applied(), self.consistent_from());
        if applied < needed {
            return Err(Error::invalid(format!(
                "shard {} in {} is being recovered: the log was replayed up to LSN {applied} and is needed up to {needed}",
                self.id,
                self.path.display()
            )));
        }
        Ok(())
    }

    /// Fails if a slot is unreadable: any key may be in it.
    pub(super) fn check_whole(&self) -> Result<()> {
        if self.torn.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        let Some(slot) = self.writer.lock().first_torn() else { return Ok(()) };
        Err(self.damaged(slot, "the slot is torn, and the log has not written it again"))
    }

    pub(super) fn check_sound(&self) -> Result<()> {
        match self.poisoned.get() {
            None => Ok(()),
            Some(reason) => Err(Error::Poisoned { shard: self.id, reason: reason.clone() }),
        }
    }

    pub(super) fn damaged(&self, slot: u64, reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
        Error::corrupt(&self.path, self.layout.slot_offset(slot), None, reason)
    }

    /// Reads a whole slot into `bytes` and checks it.
    pub(super) fn read_slot<'a>(&self, slot: u64, bytes: &'a mut [u8]) -> Result<Slot<'a>> {
        self.map.read(slot, bytes);
        Slot::decode(&self.layout, slot, bytes).map_err(|reason| self.damaged(slot, reason))
    }

    /// The value of a key, in `value`, and the LSN that wrote it.
    pub(super) fn get_into(&self, key: &[u8], value: &mut Vec<u8>) -> Result<Option<Lsn>> {
        self.check_serving()?;
        loop {
            let Some(slot) = self.index.get(key) else {
                // A rebuild that has begun since empties the index, and a torn slot may hold the key.
                self.check_serving()?;
                self.check_whole()?;
                value.clear();
                return Ok(None);
            };
            value.resize(self.layout.slot_len(), 0);
            if let Slot::Occupied { lsn, key: found, value: bytes } = self.read_slot(slot, value)?
                && found == key
            {
                let (len, end) = (bytes.len(), self.layout.value_offset() + bytes.len());
                value.copy_within(end - len..end, 0);
                value.truncate(len);
                return Ok(Some(lsn));
            }
            // The key has left the slot since the look-up, and the index knew before the slot did.
        }
    }

    /// Shows every entry to `visit`.
    pub(super) fn scan(&self, visit: &mut Visit<'_>) -> Result<std::ops::ControlFlow<()>> {
        self.check_serving()?;
        self.check_whole()?;
        let mut bytes = vec![0; self.layout.slot_len()];
        for slot in 0..self.map.slot_count() {
            if let Slot::Occupied { lsn, key, value } = self.read_slot(slot, &mut bytes)? {
                // What was read before a rebuild began may be shown; what it wrote may not.
                self.check_serving()?;
                let entry = Entry { shard: self.id, slot, lsn, key, value };
                if visit(entry).is_break() {
                    return Ok(std::ops::ControlFlow::Break(()));
                }
            }
        }
        self.check_serving()?;
        Ok(std::ops::ControlFlow::Continue(()))
    }

    /// Replaces a mapped slot. A write that fails may have torn what was there: then nothing more is written, and
    /// opening the shard again finds it.
    pub(super) fn write_mapped(&self, slots: &mut SlotWriter, slot: u64, bytes: &[u8]) -> Result<()> {
        if !self.writes_through_file() {
            self.map.write(slots, slot, bytes);
            return Ok(());
        }
        self.map.write_by(slots, slot, || self.write_slots(slot, bytes)).map_err(|source| self.poison("write", source))
    }

    /// Whether slots are written through the file also where they are mapped, which shows in the mapping at once.
    ///
    /// That is better for long ones: to sync a page that was stored to, the kernel must make it read-only again where
    /// it is mapped, and tells the other processors so page by page; and then the next store takes a fault.
    fn writes_through_file(&self) -> bool {
        cfg!(target_os = "linux") && self.layout.slot_len() as u64 >= PAGE_LEN
    }

    /// Writes real zeros to the file: in larger pieces where nothing is stored to them through the mapping, for the
    /// reason that [`write_slots`](Self::write_slots) has.
    pub(super) fn write_zeros(&self, range: std::ops::Range<u64>) -> std::io::Result<()> {
        zero_in_pieces(&self.file, range, if self.writes_through_file() { ZERO_PIECE } else { PAGE_LEN })
    }

    /// Writes whole slots to the file.
    pub(super) fn write_slots(&self, first: u64, bytes: &[u8]) -> std::io::Result<()> {
        let at = self.layout.slot_offset(first);
        // In one piece they can become a large folio, which counts as dirty as a whole once it is stored to through a
        // mapping; writes through the file count by blocks (ext4; XFS since Linux 6.6).
        let write = if self.writes_through_file() { write_all_at } else { write_in_pages };
        write(&self.file, bytes, at)
    }

    /// Syncs the slots, then notes in the header how far they are applied.
    pub(super) fn sync(&self) -> Result<()> {
        self.check_sound()?;
        let _one = self.syncing.lock();
        let applied = self.applied();
        // While a rebuild stands the header keeps saying that nothing is applied.
        let is_done = |header: &Header| header.rebuilding || header.applied >= applied;
        let header = *self.header.lock();
        if is_done(&header) && !header.rebuilding {
            return Ok(());
        }
        self.sync_slots()?;
        self.update_header(|header| {
            if !is_done(header) {
                header.applied = applied;
            }
        })
    }

    /// Everything written to slots before the call is on stable storage after it.
    pub(super) fn sync_slots(&self) -> Result<()> {
        self.check_sound()?;
        let unmapped = || if self.is_rebuilding() { self.file.sync_data() } else { Ok(()) };
        self.map.sync().and_then(|()| unmapped()).map_err(|source| self.poison("sync", source))
    }

    /// Syncs, and leaves the mark of a shard closed in order, unless something is left to repair.
    pub(super) fn close(&self) -> Result<()> {
        self.sync()?;
        let mut writer = self.writer.lock();
        let is_whole = self.torn.load(Ordering::Acquire) == 0 && self.check_serving().is_ok();
        if !is_whole || writer.is_marked_clean() {
            return Ok(());
        }
        if self.durable_applied() == self.applied() {
            self.update_header(|header| header.clean = true)?;
            writer.set_marked_clean(true);
        }
        Ok(())
    }

    /// Changes the header on disk, over its older copy, and then in memory.
    pub(super) fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        self.check_sound()?;
        let mut header = self.header.lock();
        let mut next = *header;
        change(&mut next);
        if next == *header { Ok(()) } else { self.write_header(&mut header, next) }
    }

    /// Writes the header over its older copy again as it is: what it says is then on stable storage, also where an
    /// earlier process wrote it and its sync failed.
    pub(super) fn rewrite_header(&self) -> Result<()> {
        self.check_sound()?;
        let mut header = self.header.lock();
        let next = *header;
        self.write_header(&mut header, next)
    }

    fn write_header(&self, header: &mut Header, mut next: Header) -> Result<()> {
        next.generation = header.generation.wrapping_add(1);
        write_all_at(&self.file, &next.encode(), next.offset())
            .and_then(|()| self.file.sync_data())
            .map_err(|source| self.poison("sync", source))?;
        *header = next;
        Ok(())
    }

    /// Adds slots: real zeros in the file first, so that a full disk is an error here and never a fault later.
    pub(super) fn grow(&self, slots: &mut SlotWriter) -> Result<()> {
        let count = self.map.slot_count();
        let grown = self.layout.grown(count);
        if grown == count {
            return Err(Error::invalid(format!("shard {} has {count} slots and cannot have more", self.id)));
        }
        let range = self.layout.slot_offset(count)..self.layout.slot_offset(grown);
        allocate(&self.file, range.clone());
        self.write_zeros(range.clone()).map_err(|source| {
            // What there was room for would only keep it from others, the log among them.
            let _ = self.file.set_len(range.start);
            Error::io("extend", &self.path)(source)
        })?;
        self.file.sync_all().map_err(|source| self.poison("sync", source))?;
        self.update_header(|header| header.slot_count = grown)?;
        self.map.extend(slots, &self.file, grown).map_err(Error::io("map", &self.path))
    }

    /// After a failed sync nobody can know what is on disk, and after a failed write what is in a slot: nothing more is
    /// written or reported as durable.
    pub(super) fn poison(&self, action: &'static str, source: std::io::Error) -> Error {
        let _ = self.poisoned.set(format!("cannot {action} {}: {source}", self.path.display()));
        log::error!("shard {} is read-only: cannot {action} {}: {source}", self.id, self.path.display());
        Error::Io { action, path: self.path.clone(), source: source.into() }
    }
}

/// Reads and checks the header page of a shard file.
pub(super) fn read_header(path: &std::path::Path, file: &File) -> Result<Header> {
    let mut page = vec![0; usize::try_from(SLOTS_OFFSET).unwrap_or(4096)];
    let mut filled = 0;
    while filled < page.len() {
        match read_at(file, &mut page[filled..], filled as u64) {
            Ok(0) => break,
            Ok(len) => filled += len,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("read", path)(error)),
        }
    }
    Header::decode_page(&page[..filled]).map_err(|reason| Error::corrupt(path, 0, None, reason))
}
