//! Slots behind those that are mapped, while a base comes: they are reached through the file.
//!
//! A file grows by real zeros, which are synced before they are mapped. A base that came into such slots would be
//! written to the device twice, so while one comes nothing more is mapped: its blocks make the file longer as they
//! come. Nobody reads the shard meanwhile. What is blank gets its real zeros when blocks come behind it, or at the end;
//! then everything is synced once, and mapped.
//!
//! What a record of the log lane writes ahead of the base is [held](super::held) in memory until the base gets there,
//! so that the file is written from one end to the other. What finds no room there, and what is behind the base, goes
//! to where it belongs in the file; a hole reads as zeros, as a free slot does. In memory there is one bit for each
//! slot that a record has written to the file ahead of the base, so that nobody reads, and fills the page cache with,
//! what is known to be nothing.
//!
//! Where each key is, and which slots hold none, is found out on the way, aside from what readers look at: at the end
//! no slot needs to be read again. A key can be in two slots meanwhile, the one that it has left and the one that it
//! has moved to, as blocks differ in age; the one with the newer version counts.
//!
//! A full disk is an error of a write here, as elsewhere. A crash leaves a file that is longer than its slots; the next
//! rebuild keeps of the rest what is known to have been synced, and cuts off what is behind that.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::apply::Writer;
use super::format::Slot;
use super::held::Held;
use super::index::KeyIndex;
use super::reader::fill;
use super::shard::Shard;
use crate::allocate::allocate;
use crate::error::{Error, Result};
use crate::limits::{PAGE_LEN, index};
use crate::types::Lsn;
use crate::zeros::is_zero;

/// Bytes of the file that get their blocks together, once a block of the base comes there: no more of the disk than
/// that is taken for what then does not come.
const ALLOCATED_TOGETHER: u64 = 64 << 20;

/// Bytes looked at together where blanks are searched for.
const LOOK_LEN: usize = 256 * 1024;

/// How far the file is written behind the mapped slots.
pub(super) struct Arriving {
    /// Every slot below is on blocks that were written.
    filled: u64,
    /// Where the blocks end that the file was given.
    allocated: u64,
    /// Of the slots from there on, those that a record has written to the file.
    ahead: SlotSet,
    /// And those that one has written, but not to the file yet. All others are blank.
    pub(super) held: Held,
    /// No block comes below this slot any more, and nothing is held there. None as long as nobody has said so: then
    /// nothing is held at all.
    passed: Option<u64>,
    /// What the file has where blocks are to go.
    there: Vec<u8>,
    pub(super) found: Found,
}

/// What has come, of slots mapped or not.
pub(super) struct Found {
    pub(super) keys: KeyIndex,
    pub(super) occupied: SlotSet,
    pub(super) deleted: SlotSet,
    /// Of the slot that a key is in as well.
    other: Vec<u8>,
}

impl Found {
    fn new() -> Found {
        Found { keys: KeyIndex::new(), occupied: SlotSet::default(), deleted: SlotSet::default(), other: Vec::new() }
    }

    /// A slot held something that a block is put over. Where its key was put since, that is still to come.
    fn forget(&mut self, slot: u64, held: &Slot<'_>) {
        if let Slot::Occupied { key, .. } = held
            && self.keys.get(key) == Some(slot)
        {
            self.keys.remove(key);
        }
    }

    /// A slot holds something newer. What it held before is forgotten, or has the same key or none.
    pub(super) fn note(&mut self, shard: &Shard, held: &Held, slot: u64, holds: &Slot<'_>) -> Result<()> {
        match *holds {
            Slot::Free => {}
            Slot::Deleted { key, .. } => {
                self.occupied.remove(slot);
                self.deleted.insert(slot);
                if self.keys.get(key) == Some(slot) {
                    self.keys.remove(key);
                }
            }
            Slot::Occupied { lsn, key, .. } => {
                self.deleted.remove(slot);
                self.occupied.insert(slot);
                let Found { keys, other, .. } = self;
                keys.insert_unless(key, slot, |there| Ok(shard.front_there(held, there, other)?.lsn() > lsn))?;
            }
        }
        Ok(())
    }
}

impl Arriving {
    /// Whether nothing has been written to a slot behind those mapped.
    pub(super) fn is_blank(&self, slot: u64) -> bool {
        slot >= self.filled && !self.ahead.contains(slot) && self.held.get(slot).is_none()
    }

    /// The first slot from `filled` on, and before `end`, that is not blank.
    fn next_written(&self, end: u64) -> u64 {
        let held = self.held.first_of(self.filled..end).unwrap_or(end);
        (self.filled..held).find(|&slot| self.ahead.contains(slot)).unwrap_or(held)
    }
}

/// Slots of a [`SlotSet`] in one part.
const PART_SLOTS: u64 = 4096;
const WORD_BITS: u64 = u64::BITS as u64;

/// A set of slots. Its memory grows with those in it, however far apart a leader says they are. Ordered, as hashing a
/// part's number for each slot of a base would take longer than finding it.
#[derive(Default)]
pub(super) struct SlotSet {
    parts: BTreeMap<u64, Box<[u64; index(PART_SLOTS / WORD_BITS)]>>,
}

impl SlotSet {
    fn insert(&mut self, slot: u64) {
        let part = self.parts.entry(slot / PART_SLOTS).or_insert_with(|| Box::new([0; index(PART_SLOTS / WORD_BITS)]));
        part[index(slot % PART_SLOTS / WORD_BITS)] |= 1 << (slot % WORD_BITS);
    }

    fn remove(&mut self, slot: u64) {
        if let Some(part) = self.parts.get_mut(&(slot / PART_SLOTS)) {
            part[index(slot % PART_SLOTS / WORD_BITS)] &= !(1 << (slot % WORD_BITS));
        }
    }

    pub(super) fn contains(&self, slot: u64) -> bool {
        let word = self.parts.get(&(slot / PART_SLOTS)).map_or(0, |part| part[index(slot % PART_SLOTS / WORD_BITS)]);
        word & 1 << (slot % WORD_BITS) != 0
    }

    /// Forgets whole parts below a slot.
    fn forget_below(&mut self, slot: u64) {
        self.parts.retain(|part, _| *part >= slot / PART_SLOTS);
    }
}

impl Shard {
    /// Begins to take a base. Of the slots that are not mapped, those below `kept` stay, and all others are blank.
    pub(super) fn begin_arriving(&self, writer: &mut Writer, kept: u64) -> Result<()> {
        let mapped = self.map.slot_count();
        let filled = mapped.max(kept);
        let end = self.layout.slot_offset(filled);
        let len = self.file.metadata().map_err(Error::io("look at", &self.path))?.len();
        // Also of the same length: blocks that were given beforehand can be behind the end.
        if len >= end {
            // Where a file cannot be cut while it is mapped, zeros do as well.
            let cut = self.file.set_len(end).or_else(|_| self.write_zeros(end..len));
            cut.map_err(Error::io("cut", &self.path))?;
        }
        let ahead = SlotSet::default();
        let held = Held::new(Arc::clone(&self.room), self.layout.slot_len());
        let arriving =
            Arriving { filled, allocated: end, ahead, held, passed: None, there: Vec::new(), found: Found::new() };
        let arriving = writer.arriving.insert(arriving);
        self.fill_holes(arriving, mapped, kept)
    }

    /// Takes verified blocks from slot `first` on, none of which is mapped. Slots that a record has made newer stay.
    /// There are `limit` slots in all.
    pub(super) fn take_blocks(&self, arriving: &mut Arriving, limit: u64, first: u64, blocks: &[u8]) -> Result<()> {
        let slot_len = self.layout.slot_len();
        let count = blocks.len() / slot_len;
        self.allocate_through(arriving, first + count as u64, limit);
        self.fill_blanks(arriving, first)?;
        // Whoever keeps count of what records have written gives none of those.
        self.write_held(arriving, first..first + count as u64)?;
        // A write that fails leaves blank slots blank: whatever it left there is overwritten. Others it may have torn.
        let write = |found: &mut Found, held: &Held, from: usize, to: usize, replaces: bool| {
            let (run, first) = (&blocks[from * slot_len..to * slot_len], first + from as u64);
            self.write_slots(first, run).map_err(|source| match replaces {
                true => self.poison("write", source),
                false => Error::io("write", &self.path)(source),
            })?;
            (first..).zip(run.chunks_exact(slot_len)).try_for_each(|(slot, block)| {
                let holds = Slot::decode_prefix(&self.layout, block).map_err(|reason| self.damaged(slot, reason))?;
                found.note(self, held, slot, &holds)
            })
        };
        let (mut from, mut replaces) = (0, false);
        for (here, block) in blocks.chunks_exact(slot_len).enumerate() {
            let slot = first + here as u64;
            // None of them is held.
            if slot >= arriving.filled && !arriving.ahead.contains(slot) {
                continue;
            }
            arriving.there.resize(self.layout.prefix_len(), 0);
            self.read_unmapped(slot, &mut arriving.there)?;
            let front_of =
                |bytes| Slot::decode_prefix(&self.layout, bytes).map_err(|reason| self.damaged(slot, reason));
            let there = front_of(&arriving.there)?;
            if there.lsn() != Lsn::ZERO && there.lsn() >= front_of(block)?.lsn() {
                write(&mut arriving.found, &arriving.held, from, here, replaces)?;
                (from, replaces) = (here + 1, false);
            } else {
                arriving.found.forget(slot, &there);
                replaces = true;
            }
        }
        write(&mut arriving.found, &arriving.held, from.min(count), count, replaces)?;
        arriving.filled = arriving.filled.max(first + count as u64);
        arriving.ahead.forget_below(arriving.filled);
        Ok(())
    }

    /// Writes those of these slots to the file that are held.
    fn write_held(&self, arriving: &mut Arriving, slots: Range<u64>) -> Result<()> {
        while let Some(slot) = arriving.held.first_of(slots.clone())
            && let Some(bytes) = arriving.held.get(slot)
        {
            self.write_slots(slot, bytes).map_err(Error::io("write", &self.path))?;
            arriving.held.forget(slot);
            arriving.ahead.insert(slot);
        }
        Ok(())
    }

    /// Asks for blocks for slots below `end`, and for more behind them, of `limit` in all.
    fn allocate_through(&self, arriving: &mut Arriving, end: u64, limit: u64) {
        let (end, limit) = (self.layout.slot_offset(end), self.layout.slot_offset(limit));
        if arriving.allocated < end {
            // Not for what is blank, should the base be far behind it.
            let from = arriving.allocated.max(end.saturating_sub(ALLOCATED_TOGETHER));
            let to = end.saturating_add(ALLOCATED_TOGETHER).min(limit).max(end);
            allocate(&self.file, from..to);
            arriving.allocated = to;
        }
    }

    /// No more blocks of the base come below slot `end`.
    pub(super) fn pass(&self, arriving: &mut Arriving, end: u64) -> Result<()> {
        self.write_held(arriving, arriving.filled..end)?;
        arriving.passed = arriving.passed.max(Some(end));
        Ok(())
    }

    /// Writes the whole of a slot that is not mapped, or holds it until the base gets there. A write that fails leaves
    /// a blank slot blank: whatever it left there is overwritten, by this record, by its block or by zeros. Of another
    /// slot it may have torn what was there.
    pub(super) fn write_unmapped(&self, arriving: &mut Arriving, slot: u64, bytes: &[u8]) -> Result<()> {
        let comes = arriving.passed.is_some_and(|passed| slot >= passed.max(arriving.filled));
        if comes && !arriving.ahead.contains(slot) && arriving.held.put(slot, bytes) {
            return Ok(());
        }
        let is_blank = arriving.is_blank(slot);
        self.write_slots(slot, bytes).map_err(|source| match is_blank {
            true => Error::io("write", &self.path)(source),
            false => self.poison("write", source),
        })?;
        if is_blank {
            arriving.ahead.insert(slot);
        }
        Ok(())
    }

    /// Version, status and key of a slot, which may be held.
    pub(super) fn front_there<'a>(&self, held: &Held, slot: u64, front: &'a mut Vec<u8>) -> Result<Slot<'a>> {
        let Some(bytes) = held.get(slot) else { return self.front_of(slot, front) };
        front.clear();
        front.extend_from_slice(&bytes[..self.layout.prefix_len()]);
        Slot::decode_prefix(&self.layout, front).map_err(|reason| self.damaged(slot, reason))
    }

    /// Reads from the beginning of a slot that is not mapped on; what was never written is zeros.
    pub(super) fn read_unmapped(&self, slot: u64, to: &mut [u8]) -> Result<()> {
        fill(&self.file, to, self.layout.slot_offset(slot)).map_err(Error::io("read", &self.path))
    }

    /// Ends taking a base: as many slots as the leader has are written, synced and mapped. Their number is to be put
    /// into the header. Gives what is in them.
    pub(super) fn end_arriving(&self, writer: &mut Writer) -> Result<Found> {
        // By the steps that the leader has taken.
        let mut count = self.map.slot_count();
        while count < writer.slot_limit {
            let grown = self.layout.grown(count);
            if grown == count {
                return Err(Error::invalid(format!("shard {} has {count} slots and cannot have more", self.id)));
            }
            count = grown;
        }
        if let Some(arriving) = &mut writer.arriving {
            self.fill_blanks(arriving, count)?;
        }
        self.sync_slots()?;
        self.map.extend(&mut writer.slots, &self.file, count).map_err(Error::io("map", &self.path))?;
        let ended = writer.arriving.take().map(|arriving| arriving.found);
        ended.ok_or_else(|| Error::invalid(format!("no base of shard {} is coming", self.id)))
    }

    /// Writes what is held below slot `end`, and real zeros for every blank slot there.
    fn fill_blanks(&self, arriving: &mut Arriving, end: u64) -> Result<()> {
        while arriving.filled < end {
            let to = arriving.next_written(end);
            let blank = self.layout.slot_offset(arriving.filled)..self.layout.slot_offset(to);
            self.write_zeros(blank).map_err(Error::io("extend", &self.path))?;
            arriving.filled = to;
            if to < end {
                self.write_held(arriving, to..to + 1)?;
                arriving.filled += 1;
            }
        }
        Ok(())
    }

    /// Real zeros for what was not written of slots that a crash has left: whole slots, and after a power cut also
    /// single pages of slots that were written with zeros in them.
    fn fill_holes(&self, arriving: &mut Arriving, first: u64, end: u64) -> Result<()> {
        let slot_len = self.layout.slot_len();
        let mut slot = first;
        while slot < end {
            let most = (LOOK_LEN / slot_len).max(1);
            let count = usize::try_from(end - slot).unwrap_or(most).min(most);
            arriving.there.resize(count * slot_len, 0);
            self.read_unmapped(slot, &mut arriving.there)?;
            let (mut at, mut rest) = (self.layout.slot_offset(slot), arriving.there.as_slice());
            while !rest.is_empty() {
                let (page, behind) = rest.split_at(index(PAGE_LEN - at % PAGE_LEN).min(rest.len()));
                let to = at + page.len() as u64;
                if is_zero(page) {
                    self.write_zeros(at..to).map_err(Error::io("extend", &self.path))?;
                }
                (at, rest) = (to, behind);
            }
            slot += count as u64;
        }
        Ok(())
    }

    /// Checks blocks of a base, from slot `first` on. Returns the newest version among them.
    pub(super) fn check_base_slots(&self, first: u64, blocks: &[u8]) -> Result<Lsn> {
        let slot_len = self.layout.slot_len();
        let mut newest = Lsn::ZERO;
        for (slot, block) in (first..).zip(blocks.chunks(slot_len)) {
            let found = Slot::decode(&self.layout, slot, block)
                .map_err(|reason| Error::invalid(format!("block {slot} of the base is damaged: {reason}")))?;
            newest = newest.max(found.lsn());
        }
        Ok(newest)
    }

    /// Writes blocks that were checked, each if its slot is older. On an error some have been.
    pub(super) fn put_base_slots(&self, writer: &mut Writer, first: u64, blocks: &[u8]) -> Result<()> {
        let slot_len = self.layout.slot_len();
        let mapped = self.map.slot_count();
        let in_map = usize::try_from(mapped.saturating_sub(first)).unwrap_or(usize::MAX).min(blocks.len() / slot_len);
        let (here, behind) = blocks.split_at(in_map * slot_len);
        let limit = writer.slot_limit;
        let Some(arriving) = &mut writer.arriving else {
            return Err(Error::invalid(format!("no base of shard {} is coming", self.id)));
        };
        for (slot, block) in (first..).zip(here.chunks_exact(slot_len)) {
            let holds = Slot::decode_prefix(&self.layout, block).map_err(|reason| self.damaged(slot, reason))?;
            let there = self.front_of(slot, &mut writer.front)?;
            if there.lsn() < holds.lsn() {
                self.write_mapped(&mut writer.slots, slot, block)?;
                arriving.found.forget(slot, &there);
                arriving.found.note(self, &arriving.held, slot, &holds)?;
            }
        }
        if behind.is_empty() { Ok(()) } else { self.take_blocks(arriving, limit, first + in_map as u64, behind) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::tests::{Log, OPTIONS, contents};
    use super::super::{FixedStore, FixedStoreOptions, shard_path};
    use super::SlotSet;
    use crate::target::fixed_store::format::Operation;
    use crate::target::{BlockId, KeptBase, ReplicationTarget};
    use crate::types::ShardId;
    use crate::wal::Record;

    const SHARD: ShardId = ShardId(0);

    fn put(leader: &FixedStore, log: &Log, key: u64, value: &str) {
        leader.put(&key.to_be_bytes(), value.as_bytes(), |shard, record| log.append(shard, record)).unwrap();
    }

    /// The whole base, run by run.
    fn runs(leader: &FixedStore, blocks: usize) -> Vec<(BlockId, Vec<u8>)> {
        let mut source = leader.open_base(SHARD).unwrap();
        let mut buffer = vec![0; blocks * source.info().block_len as usize];
        let mut runs = Vec::new();
        while let Some(run) = source.next_run(&mut buffer).unwrap() {
            runs.push((run.first, buffer[..run.len].to_vec()));
        }
        runs
    }

    #[test]
    fn slots_far_apart_take_a_part_each_and_what_lies_below_is_forgotten() {
        let mut set = SlotSet::default();
        let slots = [0, 63, 64, 4_095, 4_096, 1 << 39];
        slots.into_iter().for_each(|slot| set.insert(slot));
        assert!(slots.into_iter().all(|slot| set.contains(slot)));
        assert!([1, 62, 65, 4_094, 4_097, 8_192, (1 << 39) - 1].into_iter().all(|slot| !set.contains(slot)));
        assert_eq!(set.parts.len(), 3);
        set.forget_below(4_097);
        assert!(!set.contains(4_095) && set.contains(4_096), "a part goes as a whole");
        assert_eq!(set.parts.len(), 2);
    }

    #[test]
    fn what_was_synced_of_a_base_stays_and_the_rest_is_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let (here, there) = (directory.path().join("leader"), directory.path().join("follower"));
        let (leader, log) = (FixedStore::open(&here, &OPTIONS).unwrap(), Log::default());
        (0..20_000).for_each(|key| put(&leader, &log, key, "base"));
        let info = leader.open_base(SHARD).unwrap().info();
        let block_len = info.block_len as usize;
        let runs = runs(&leader, 500);
        // Newer than the blocks above: one that is kept, one that comes later.
        put(&leader, &log, 3, "live");
        put(&leader, &log, 19_990, "live");
        let head = log.head(SHARD);

        let follower = FixedStore::open(&there, &OPTIONS).unwrap();
        let mut sink = follower.begin_base(SHARD, info).unwrap();
        let mut take = |runs: &[(BlockId, Vec<u8>)]| {
            runs.iter().for_each(|(first, blocks)| sink.put_blocks(*first, block_len, blocks).unwrap());
        };
        take(&runs[..20]);
        log.replay(&follower, SHARD, info.base_lsn, head).unwrap();
        follower.sync(SHARD).unwrap();
        let kept = KeptBase { blocks: runs[20].0.0, applied: head };
        take(&runs[20..25]);
        assert_eq!(follower.shards[0].map.slot_count(), 0, "nothing is mapped while it comes");
        drop((sink, follower));

        let follower = FixedStore::open(&there, &OPTIONS).unwrap();
        let mut sink = follower.resume_base(SHARD, info, kept).unwrap();
        let file_len = || fs::metadata(shard_path(&there, 0)).unwrap().len();
        assert_eq!(file_len(), follower.shards[0].layout.slot_offset(kept.blocks), "the rest is blank again");
        log.replay(&follower, SHARD, info.base_lsn, head).unwrap();
        sink.check_kept().unwrap();
        for (first, blocks) in &runs[20..] {
            sink.put_blocks(*first, block_len, blocks).unwrap();
        }
        sink.complete(head).unwrap();
        assert_eq!(contents(&follower), contents(&leader));
        leader.close().unwrap();
        follower.close().unwrap();
        assert!(fs::read(shard_path(&here, 0)).unwrap()[4096..] == fs::read(shard_path(&there, 0)).unwrap()[4096..]);
    }

    #[test]
    fn what_is_written_ahead_of_a_base_is_held_until_the_base_gets_there() {
        take_around_what_was_written(100, usize::MAX, [3, 3, 2, 1, 0]);
    }

    #[test]
    fn what_finds_no_room_is_written_to_the_file_ahead_of_the_base() {
        take_around_what_was_written(100, 0, [0; 5]);
        // The first of three: each takes a part of its own.
        take_around_what_was_written(300_000, 400_000, [1, 1, 0, 0, 0]);
    }

    /// Records reach slots that a base then gets to, with room for so much of what they write. Says how much is held at
    /// each of five moments.
    fn take_around_what_was_written(value_len: u32, room: usize, due: [usize; 5]) {
        let options = FixedStoreOptions { value_len, ..OPTIONS };
        let directory = tempfile::tempdir().unwrap();
        let (here, there) = (directory.path().join("leader"), directory.path().join("follower"));
        let (leader, log) = (FixedStore::open(&here, &options).unwrap(), Log::default());
        (0..100).for_each(|key| put(&leader, &log, key, "base"));
        let info = leader.open_base(SHARD).unwrap().info();
        let block_len = info.block_len as usize;
        let runs = runs(&leader, 10);
        [35, 55, 55, 100].into_iter().for_each(|key| put(&leader, &log, key, "live"));
        assert!(leader.delete(&60_u64.to_be_bytes(), |shard, record| log.append(shard, record)).unwrap().is_some());

        let follower = FixedStore::open(&there, &options).unwrap();
        follower.shards[0].room.shrink(room);
        let mut sink = follower.begin_base(SHARD, info).unwrap();
        let held = || follower.shards[0].writer.lock().arriving.as_ref().unwrap().held.len();
        log.replay(&follower, SHARD, info.base_lsn, info.base_lsn.next()).unwrap();
        assert_eq!(held(), 0, "nobody has said yet that it tells what comes no more");
        sink.pass(BlockId(0)).unwrap();
        log.replay(&follower, SHARD, info.base_lsn, log.head(SHARD)).unwrap();
        let [ahead, beside, around, compared, passed] = due;
        assert_eq!(held(), ahead);
        for (first, blocks) in &runs[..5] {
            sink.put_blocks(*first, block_len, blocks).unwrap();
        }
        assert_eq!(held(), beside);
        // Around the one that was written.
        let (before, after) = runs[5].1.split_at(5 * block_len);
        sink.put_blocks(BlockId(50), block_len, before).unwrap();
        sink.put_blocks(BlockId(56), block_len, &after[block_len..]).unwrap();
        assert_eq!(held(), around);
        // Who gives that one too has it compared.
        for (first, blocks) in &runs[6..] {
            sink.put_blocks(*first, block_len, blocks).unwrap();
        }
        assert_eq!(held(), compared);
        let file_len = || fs::metadata(shard_path(&there, 0)).unwrap().len();
        sink.pass(BlockId(info.block_count)).unwrap();
        assert_eq!(held(), passed);
        let layout = &follower.shards[0].layout;
        assert_eq!(file_len(), layout.slot_offset(101), "what is blank behind it is not written before the end");
        put(&leader, &log, 102, "live");
        log.replay(&follower, SHARD, info.base_lsn, log.head(SHARD)).unwrap();
        assert_eq!(held(), 0, "nothing comes there any more");
        sink.complete(log.head(SHARD)).unwrap();
        assert_eq!(contents(&follower), contents(&leader));
        leader.close().unwrap();
        follower.close().unwrap();
        assert!(fs::read(shard_path(&here, 0)).unwrap()[4096..] == fs::read(shard_path(&there, 0)).unwrap()[4096..]);
    }

    #[cfg(unix)]
    #[test]
    fn pages_of_zeros_within_slots_are_written_too() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().unwrap();
        let options = FixedStoreOptions { value_len: 60_000, ..OPTIONS };
        let (leader, log) = (FixedStore::open(directory.path().join("leader"), &options).unwrap(), Log::default());
        (0..20).for_each(|key| put(&leader, &log, key, "short"));
        let (info, runs) = (leader.open_base(SHARD).unwrap().info(), runs(&leader, 10));
        let there = directory.path().join("follower");
        let follower = FixedStore::open(&there, &options).unwrap();
        let mut sink = follower.begin_base(SHARD, info).unwrap();
        sink.put_blocks(runs[0].0, info.block_len as usize, &runs[0].1).unwrap();
        follower.sync(SHARD).unwrap();
        drop((sink, follower));
        // What a power cut can leave: only what is not zero has reached the device.
        let path = shard_path(&there, 0);
        let image = fs::read(&path).unwrap();
        let file = fs::File::create(&path).unwrap();
        file.set_len(image.len() as u64).unwrap();
        for (at, page) in image.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|&byte| byte != 0)) {
            crate::wal::segment::write_all_at(&file, page, at as u64 * 4096).unwrap();
        }
        assert!(file.metadata().unwrap().blocks() * 512 < image.len() as u64, "there are holes");

        let follower = FixedStore::open(&there, &options).unwrap();
        let kept = KeptBase { blocks: 10, applied: info.base_lsn };
        let mut sink = follower.resume_base(SHARD, info, kept).unwrap();
        sink.check_kept().unwrap();
        for (first, blocks) in &runs[1..] {
            sink.put_blocks(*first, info.block_len as usize, blocks).unwrap();
        }
        sink.complete(info.base_lsn).unwrap();
        let metadata = file.metadata().unwrap();
        assert!(metadata.blocks() * 512 >= metadata.len(), "a store to a mapped slot needs no room");
        assert_eq!(contents(&follower), contents(&leader));
    }

    #[test]
    fn a_key_is_found_where_it_is_also_if_a_newer_block_has_taken_its_old_slot() {
        let directory = tempfile::tempdir().unwrap();
        let (leader, log) = (FixedStore::open(directory.path().join("leader"), &OPTIONS).unwrap(), Log::default());
        let apply = |slot: u64, key: u64, value: Option<&[u8]>| {
            let mut record = Vec::new();
            Operation { slot, key: &key.to_le_bytes(), value }.encode(&mut record);
            let lsn = log.append(SHARD, &record).unwrap();
            leader.apply(SHARD, Record { lsn, bytes: &record }).unwrap();
        };
        apply(0, 70, Some(b"v"));
        let info = leader.open_base(SHARD).unwrap().info();
        apply(1, 71, Some(b"v"));
        let moved_from = log.head(SHARD);
        apply(1, 71, None);
        apply(2, 71, Some(b"v"));
        apply(1, 72, Some(b"v"));

        let follower = FixedStore::open(directory.path().join("follower"), &OPTIONS).unwrap();
        let mut sink = follower.begin_base(SHARD, info).unwrap();
        log.replay(&follower, SHARD, info.base_lsn, moved_from).unwrap();
        for (first, blocks) in runs(&leader, 1) {
            sink.put_blocks(first, info.block_len as usize, &blocks).unwrap();
        }
        log.replay(&follower, SHARD, moved_from, log.head(SHARD)).unwrap();
        sink.complete(log.head(SHARD)).unwrap();
        assert_eq!(contents(&follower), contents(&leader));
        for key in [70_u64, 71, 72] {
            assert_eq!(follower.get(&key.to_le_bytes()).unwrap().as_deref(), Some(&b"v"[..]), "key {key}");
        }
    }

    #[test]
    fn blank_blocks_become_zeros_around_those_that_records_have_written() {
        let directory = tempfile::tempdir().unwrap();
        let (here, there) = (directory.path().join("leader"), directory.path().join("follower"));
        let (leader, log) = (FixedStore::open(&here, &OPTIONS).unwrap(), Log::default());
        let apply = |slot: u64| {
            let mut record = Vec::new();
            Operation { slot, key: &slot.to_le_bytes(), value: Some(b"v") }.encode(&mut record);
            let lsn = log.append(SHARD, &record).unwrap();
            leader.apply(SHARD, Record { lsn, bytes: &record }).unwrap();
        };
        [1, 2, 7].into_iter().for_each(apply);
        let info = leader.open_base(SHARD).unwrap().info();
        let runs = runs(&leader, 10);
        assert_eq!(runs.len(), 2);
        // Between two runs, in front of the first, behind the last, and where the leader's shard has grown since.
        [4, 0, 5_000, info.block_count].into_iter().for_each(apply);

        let follower = FixedStore::open(&there, &OPTIONS).unwrap();
        let mut sink = follower.begin_base(SHARD, info).unwrap();
        log.replay(&follower, SHARD, info.base_lsn, log.head(SHARD)).unwrap();
        for (first, blocks) in &runs {
            sink.put_blocks(*first, info.block_len as usize, blocks).unwrap();
        }
        let past = sink.put_blocks(BlockId(info.block_count), info.block_len as usize, &runs[1].1);
        assert!(past.is_err() && sink.put_blocks(BlockId(u64::MAX), info.block_len as usize, &runs[1].1).is_err());
        sink.complete(log.head(SHARD)).unwrap();
        assert_eq!(contents(&follower).len(), 7);
        assert_eq!(contents(&follower), contents(&leader));
        assert_eq!(follower.shards[0].map.slot_count(), leader.shards[0].map.slot_count());
        leader.close().unwrap();
        follower.close().unwrap();
        assert!(fs::read(shard_path(&here, 0)).unwrap()[4096..] == fs::read(shard_path(&there, 0)).unwrap()[4096..]);
    }
}
