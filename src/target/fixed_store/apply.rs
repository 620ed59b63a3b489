//! Changing a shard: applying records, choosing slots for new ones, and loading what a file holds.
//!
//! # Applying
//!
//! A record writes exactly one slot. The slot's version is the LSN of the record that wrote it, so
//!
//! 1. a record at or below `applied` is a no-op, and a gap above it is refused;
//! 2. a record at or below its slot's version changes nothing: the slot is newer already, because it reached the disk
//!    before a crash or came with a base;
//! 3. otherwise the slot is exactly what the record before left there (or torn, or not yet come with the base), so a
//!    put into a slot of another key, or a delete of a key that is not there, contradicts the log, and is refused.
//!
//! # After a crash
//!
//! Any subset of the slots written since the last sync may be on disk, some of them torn. The log is replayed from
//! `applied`. Torn slots are written again by the replay, or stay unreadable. Slots that are newer than `applied` are
//! written again as they are (see [after a failed sync](super::shard)) and remembered, and when the replay reaches the
//! record of that LSN, it must be the one that the slot holds. If it is another one, the log has lost a record whose
//! effect the slot still has: that is damage which only a rebuild mends, and it can only happen where records were
//! applied before they were durable in the log.
//!
//! # Proposing
//!
//! The leader chooses the slot when it writes the record, which may be long before the record is applied. What has
//! been proposed and not yet applied is kept as a plan beside the index.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::atomic::Ordering;

use super::arriving::{Arriving, Found};
use super::format::{Header, Operation, Slot};
use super::shard::Shard;
use super::slots_map::SlotWriter;
use crate::error::{Error, Result};
use crate::types::{Lsn, ShardId};

/// What changing a shard takes. There is one, behind the shard's lock.
pub(super) struct Writer {
    pub(super) slots: SlotWriter,
    /// Which rebuild may put blocks; 0 if none.
    pub(super) rebuild_session: u64,
    /// Counts rebuilds begun.
    pub(super) rebuilds: u64,
    /// Slots that the leader's shard has, as far as known, while rebuilding.
    pub(super) slot_limit: u64,
    /// Whether slots that read as blank while rebuilding may be others on the device: an earlier process emptied them.
    pub(super) blanks_unsure: bool,
    /// The slots behind those mapped, while rebuilding.
    pub(super) arriving: Option<Arriving>,
    /// Slots below `fresh` that hold no key and belong to no plan.
    free: BTreeSet<u64>,
    /// Slots from here on were never used.
    fresh: u64,
    torn: BTreeSet<u64>,
    /// Slots newer than `applied` when the store was opened, by version.
    ahead: HashMap<Lsn, u64>,
    plans: Plans,
    marked_clean: bool,
    /// What a slot is to hold.
    pub(super) image: Vec<u8>,
    /// What a proposed record is put together in.
    record: Vec<u8>,
    pub(super) front: Vec<u8>,
}

/// Proposed and not yet applied.
#[derive(Default)]
struct Plans {
    /// Where each key will be; `None` if it will be deleted.
    by_key: HashMap<Box<[u8]>, (Lsn, Option<u64>)>,
    queue: VecDeque<Plan>,
}

struct Plan {
    lsn: Lsn,
    key: Box<[u8]>,
    slot: u64,
    /// Whether the slot was taken from the free ones.
    is_new: bool,
}

impl Writer {
    pub(super) fn new(slots: SlotWriter, header: &Header) -> Writer {
        Writer {
            slots,
            blanks_unsure: header.rebuilding,
            rebuild_session: 0,
            rebuilds: 0,
            slot_limit: 0,
            arriving: None,
            free: BTreeSet::new(),
            fresh: 0,
            torn: BTreeSet::new(),
            ahead: HashMap::new(),
            plans: Plans::default(),
            marked_clean: header.clean,
            image: Vec::new(),
            record: Vec::new(),
            front: Vec::new(),
        }
    }

    pub(super) fn first_torn(&self) -> Option<u64> {
        self.torn.first().copied()
    }

    /// A slot that does not validate, and may be written again.
    pub(super) fn note_torn(&mut self, slot: u64) {
        self.torn.insert(slot);
    }

    pub(super) fn is_marked_clean(&self) -> bool {
        self.marked_clean
    }

    pub(super) fn set_marked_clean(&mut self, marked: bool) {
        self.marked_clean = marked;
    }

    /// Forgets everything about slots and plans.
    pub(super) fn forget(&mut self) {
        self.free.clear();
        self.fresh = 0;
        self.torn.clear();
        self.ahead.clear();
        self.plans = Plans::default();
    }

    /// Neither blocks nor records are taken until another rebuild begins.
    pub(super) fn end_rebuild(&mut self) {
        self.rebuild_session = 0;
        self.arriving = None;
    }

    /// The slot holds something, or is about to. During a rebuild nobody asks, and its end goes through every slot.
    fn take(&mut self, slot: u64) {
        if self.arriving.is_some() {
            return;
        }
        if slot < self.fresh {
            self.free.remove(&slot);
        } else {
            self.free.extend(self.fresh..slot);
            self.fresh = slot + 1;
        }
    }
}

impl Shard {
    /// Reads every slot: finds keys, free slots, torn ones, and those ahead of `applied`, which are written again for
    /// the next sync. Slots that `are_checked` by this process already are only read up to the end of their keys, and
    /// none of them is written.
    pub(super) fn load(&self, writer: &mut Writer, are_checked: bool) -> Result<()> {
        writer.forget();
        self.index.clear();
        let (mut occupied, mut newest) = (0, Lsn::ZERO);
        let mut bytes = vec![0; if are_checked { self.layout.prefix_len() } else { self.layout.slot_len() }];
        for slot in 0..self.map.slot_count() {
            self.map.read(slot, &mut bytes);
            let found = match are_checked {
                true => Slot::decode_prefix(&self.layout, &bytes),
                false => Slot::decode(&self.layout, slot, &bytes),
            };
            let Ok(found) = found else {
                writer.take(slot);
                writer.torn.insert(slot);
                continue;
            };
            if found.lsn() > self.applied() {
                writer.ahead.insert(found.lsn(), slot);
                // The replay leaves it alone, and the device may not have it.
                if !are_checked {
                    self.write_mapped(&mut writer.slots, slot, &bytes)?;
                }
            }
            newest = newest.max(found.lsn());
            match found {
                Slot::Free => {}
                Slot::Deleted { .. } => {
                    writer.take(slot);
                    writer.free.insert(slot);
                }
                Slot::Occupied { lsn, key, .. } => {
                    writer.take(slot);
                    occupied += 1;
                    if !self.is_elsewhere_since(key, slot, lsn, &mut writer.front)? {
                        self.index.insert(key, slot);
                    }
                }
            }
        }
        self.occupied.store(occupied, Ordering::Release);
        self.torn.store(writer.torn.len() as u64, Ordering::Release);
        self.consistent_from.store(newest.max(self.applied()).0, Ordering::Release);
        Ok(())
    }

    /// Takes what has been found while a base came for what the slots hold, as a [`load`](Self::load) would find it.
    pub(super) fn take_over(&self, writer: &mut Writer, found: Found) -> Result<()> {
        writer.forget();
        let mut occupied = 0;
        for slot in 0..self.map.slot_count() {
            if found.occupied.contains(slot) {
                writer.take(slot);
                occupied += 1;
            } else if found.deleted.contains(slot) {
                writer.take(slot);
                writer.free.insert(slot);
            }
        }
        self.index.replace_by(found.keys);
        self.occupied.store(occupied, Ordering::Release);
        self.torn.store(0, Ordering::Release);
        self.consistent_from.store(self.applied().0, Ordering::Release);
        if cfg!(debug_assertions) {
            let all = |writer: &Writer| (self.index.entries(), writer.free.clone(), writer.fresh);
            let before = all(writer);
            self.load(writer, true)?;
            debug_assert_eq!(before, all(writer));
            debug_assert_eq!(occupied, self.occupied.load(Ordering::Acquire));
            debug_assert!(writer.ahead.is_empty() && writer.torn.is_empty());
        }
        Ok(())
    }

    /// Whether another slot holds the key with a newer version: before all of the log is replayed, a key can be both in
    /// the slot it left and in the one it moved to.
    fn is_elsewhere_since(&self, key: &[u8], slot: u64, lsn: Lsn, front: &mut Vec<u8>) -> Result<bool> {
        match self.index.get(key) {
            Some(other) if other != slot => Ok(self.front_of(other, front)?.lsn() > lsn),
            _ => Ok(false),
        }
    }

    /// Version, status and key of a slot that validated before.
    pub(super) fn front_of<'a>(&self, slot: u64, front: &'a mut Vec<u8>) -> Result<Slot<'a>> {
        front.resize(self.layout.prefix_len(), 0);
        if slot < self.map.slot_count() {
            self.map.read(slot, front);
        } else {
            self.read_unmapped(slot, front)?;
        }
        Slot::decode_prefix(&self.layout, front).map_err(|reason| self.damaged(slot, reason))
    }

    /// Applies one record; see [the rules](self).
    pub(super) fn apply(&self, writer: &mut Writer, lsn: Lsn, record: &[u8]) -> Result<()> {
        let applied = self.applied();
        if lsn <= applied {
            return Ok(());
        }
        self.check_writable(writer)?;
        if lsn != applied.next() {
            return Err(Error::invalid(format!(
                "shard {} has applied LSN {applied} and cannot apply {lsn} next",
                self.id
            )));
        }
        let operation = Operation::decode(&self.layout, record).map_err(|reason| self.foreign(lsn, &reason))?;
        self.ensure_slot(writer, operation.slot, lsn)?;
        operation.result(lsn).encode(&self.layout, operation.slot, &mut writer.image);
        self.check_history(writer, lsn, operation.slot)?;
        self.write_slot(writer, lsn, &operation)?;
        self.applied.store(lsn.0, Ordering::Release);
        self.settle(writer, lsn, operation.slot)
    }

    /// Sound, not waiting for a rebuild to begin, and not marked as closed in order any more.
    fn check_writable(&self, writer: &mut Writer) -> Result<()> {
        self.check_sound()?;
        if self.is_rebuilding() && writer.rebuild_session == 0 {
            self.check_serving()?;
        }
        if writer.marked_clean {
            self.update_header(|header| header.clean = false)?;
            writer.marked_clean = false;
        }
        Ok(())
    }

    /// A slot that was ahead of the log must hold what the log says now.
    fn check_history(&self, writer: &mut Writer, lsn: Lsn, slot: u64) -> Result<()> {
        let Some(&ahead) = writer.ahead.get(&lsn) else { return Ok(()) };
        let mut bytes = vec![0; self.layout.slot_len()];
        self.map.read(ahead, &mut bytes);
        if ahead != slot || bytes != writer.image {
            let reason = "the slot holds the effect of a record that the log has lost; rebuild the shard";
            return Err(self.contradicts(ahead, lsn, reason));
        }
        writer.ahead.remove(&lsn);
        Ok(())
    }

    /// Writes `writer.image`, the operation's result, unless the slot is newer; keeps index and free slots in step.
    fn write_slot(&self, writer: &mut Writer, lsn: Lsn, operation: &Operation<'_>) -> Result<()> {
        let slot = operation.slot;
        let was_torn = writer.torn.contains(&slot);
        let is_blank = was_torn || writer.arriving.as_ref().is_some_and(|arriving| arriving.is_blank(slot));
        let before = match &writer.arriving {
            _ if is_blank => Slot::Free,
            Some(arriving) => self.front_there(&arriving.held, slot, &mut writer.front)?,
            None => self.front_of(slot, &mut writer.front)?,
        };
        if before.lsn() >= lsn {
            return Ok(());
        }
        if !was_torn && !self.follows(&before, operation) {
            return Err(self.contradicts(slot, lsn, "the record does not follow from what is in its slot"));
        }
        let was_occupied = matches!(before, Slot::Occupied { .. });
        if operation.value.is_some() {
            // While the shard serves, the index names the slot of a key that is in one.
            let is_named = was_occupied && lsn > self.consistent_from() && !self.is_rebuilding();
            self.put_slot(writer, lsn, operation, was_occupied, is_named)?;
        } else {
            self.delete_slot(writer, operation, was_occupied)?;
        }
        if let Some(arriving) = &mut writer.arriving
            && let Err(error) = arriving.found.note(self, &arriving.held, slot, &operation.result(lsn))
        {
            writer.end_rebuild();
            return Err(error);
        }
        if was_torn {
            writer.torn.remove(&slot);
            self.torn.fetch_sub(1, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Whether a record can be the next one after what its slot holds (rule 3).
    fn follows(&self, before: &Slot<'_>, operation: &Operation<'_>) -> bool {
        match before {
            Slot::Occupied { key, .. } => *key == operation.key,
            Slot::Deleted { .. } => operation.value.is_some(),
            Slot::Free => operation.value.is_some() || self.is_rebuilding(),
        }
    }

    /// Puts a slot whose key the index may be known to name there.
    fn put_slot(
        &self,
        writer: &mut Writer,
        lsn: Lsn,
        put: &Operation<'_>,
        was_occupied: bool,
        is_named: bool,
    ) -> Result<()> {
        let (slot, key) = (put.slot, put.key);
        let elsewhere = !is_named && self.index.get(key).is_some_and(|other| other != slot);
        if elsewhere && !self.is_elsewhere_since(key, slot, lsn, &mut writer.front)? {
            return Err(self.contradicts(slot, lsn, "the record puts a key that is in another slot already"));
        }
        // The slot first: what the index names must be there.
        self.write_image(writer, slot)?;
        writer.take(slot);
        if !was_occupied && !elsewhere && !self.is_rebuilding() {
            self.index.insert(key, slot);
        }
        self.occupied.fetch_add(u64::from(!was_occupied), Ordering::AcqRel);
        Ok(())
    }

    fn delete_slot(&self, writer: &mut Writer, delete: &Operation<'_>, was_occupied: bool) -> Result<()> {
        let slot = delete.slot;
        // The index first: what it names must be there.
        let is_named = self.index.get(delete.key) == Some(slot);
        if is_named {
            self.index.remove(delete.key);
        }
        self.write_image(writer, slot).inspect_err(|_| {
            // What could not be deleted is not missing: reading it says what is wrong.
            if is_named {
                self.index.insert(delete.key, slot);
            }
        })?;
        writer.take(slot);
        writer.free.insert(slot);
        self.occupied.fetch_sub(u64::from(was_occupied), Ordering::AcqRel);
        Ok(())
    }

    /// Replaces a slot by `writer.image`.
    pub(super) fn write_image(&self, writer: &mut Writer, slot: u64) -> Result<()> {
        match &mut writer.arriving {
            Some(arriving) if slot >= self.map.slot_count() => self.write_unmapped(arriving, slot, &writer.image),
            _ => self.write_mapped(&mut writer.slots, slot, &writer.image),
        }
    }

    /// Grows until the slot exists; during a rebuild, so far as the leader's shard has grown. Slots are taken one after
    /// the other, so one far beyond the end makes no sense.
    fn ensure_slot(&self, writer: &mut Writer, slot: u64, lsn: Lsn) -> Result<()> {
        let end = self.map.slot_count().max(writer.slot_limit);
        if slot < end {
            return Ok(());
        }
        let limit = self.layout.grown(end);
        if slot >= limit {
            return Err(self.contradicts(slot, lsn, format!("slot {slot} is far beyond the end of the shard")));
        }
        if writer.arriving.is_some() {
            writer.slot_limit = limit;
            return Ok(());
        }
        while self.map.slot_count() <= slot {
            self.grow(&mut writer.slots)?;
        }
        Ok(())
    }

    /// A record that another kind of target wrote, or a newer version.
    pub(super) fn foreign(&self, lsn: Lsn, reason: &str) -> Error {
        Error::invalid(format!("the record at LSN {lsn} of shard {} is none of a fixed store's: {reason}", self.id))
    }

    fn contradicts(&self, slot: u64, lsn: Lsn, reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
        Error::corrupt(&self.path, self.layout.slot_offset(slot), Some(lsn), reason)
    }

    /// Writes through the log and then into the slots.
    pub(super) fn write(
        &self,
        key: &[u8],
        value: Option<&[u8]>,
        append: impl FnOnce(ShardId, &[u8]) -> Result<Lsn>,
    ) -> Result<Option<Lsn>> {
        let mut writer = self.writer.lock();
        if let Some(plan) = writer.plans.queue.front() {
            return Err(Error::invalid(format!(
                "LSN {} of shard {} is proposed and not applied yet; propose this write too, or apply the log first",
                plan.lsn, self.id
            )));
        }
        let Some(lsn) = self.propose_locked(&mut writer, key, value, append)? else { return Ok(None) };
        let record = std::mem::take(&mut writer.record);
        let applied = self.apply(&mut writer, lsn, &record);
        writer.record = record;
        applied.map(|()| Some(lsn))
    }

    /// Writes to the log only: the log's applier does the rest.
    pub(super) fn propose(
        &self,
        key: &[u8],
        value: Option<&[u8]>,
        append: impl FnOnce(ShardId, &[u8]) -> Result<Lsn>,
    ) -> Result<Option<Lsn>> {
        self.propose_locked(&mut self.writer.lock(), key, value, append)
    }

    /// Leaves the record in `writer.record`.
    fn propose_locked(
        &self,
        writer: &mut Writer,
        key: &[u8],
        value: Option<&[u8]>,
        append: impl FnOnce(ShardId, &[u8]) -> Result<Lsn>,
    ) -> Result<Option<Lsn>> {
        self.check_serving()?;
        self.check_writable(writer)?;
        if let Some(slot) = writer.first_torn() {
            return Err(self.damaged(slot, "the slot is torn, and the log has not written it again"));
        }
        let place = match writer.plans.by_key.get(key) {
            Some((_, place)) => *place,
            None => self.index.get(key),
        };
        let (slot, is_new) = match place {
            Some(slot) => (slot, false),
            None if value.is_some() => (self.allocate(writer)?, true),
            None => return Ok(None),
        };
        Operation { slot, key, value }.encode(&mut writer.record);
        let last = writer.plans.queue.back().map_or(self.applied(), |plan| plan.lsn);
        let lsn = append(self.id, &writer.record).inspect_err(|_| {
            if is_new {
                writer.free.insert(slot);
            }
        })?;
        if lsn <= last {
            return Err(Error::invalid(format!("shard {} was given LSN {lsn} after LSN {last}", self.id)));
        }
        writer.plans.by_key.insert(key.into(), (lsn, value.map(|_| slot)));
        writer.plans.queue.push_back(Plan { lsn, key: key.into(), slot, is_new });
        Ok(Some(lsn))
    }

    /// A slot for a new key: the lowest free one, so that shards stay dense.
    fn allocate(&self, writer: &mut Writer) -> Result<u64> {
        if let Some(slot) = writer.free.pop_first() {
            return Ok(slot);
        }
        if writer.fresh >= self.map.slot_count() {
            self.grow(&mut writer.slots)?;
        }
        writer.fresh += 1;
        Ok(writer.fresh - 1)
    }

    /// Drops plans that have been applied. Where another record took a plan's LSN, its slot is free again.
    fn settle(&self, writer: &mut Writer, lsn: Lsn, slot: u64) -> Result<()> {
        while writer.plans.queue.front().is_some_and(|plan| plan.lsn <= lsn) {
            let Some(plan) = writer.plans.queue.pop_front() else { break };
            if writer.plans.by_key.get(&plan.key).is_some_and(|(at, _)| *at == plan.lsn) {
                writer.plans.by_key.remove(&plan.key);
            }
            if plan.lsn != lsn || plan.slot != slot {
                self.release(writer, &plan)?;
            }
        }
        Ok(())
    }

    /// Forgets every plan.
    pub(super) fn abandon(&self) -> Result<()> {
        let mut writer = self.writer.lock();
        let plans = std::mem::take(&mut writer.plans);
        plans.queue.iter().try_for_each(|plan| self.release(&mut writer, plan))
    }

    fn release(&self, writer: &mut Writer, plan: &Plan) -> Result<()> {
        if plan.is_new && !matches!(self.front_of(plan.slot, &mut writer.front)?, Slot::Occupied { .. }) {
            writer.free.insert(plan.slot);
        }
        Ok(())
    }
}
