//! Giving and taking bases: a slot is a block.
//!
//! The image is read while records are applied. Each block is a whole slot, as one record left it, but blocks differ in
//! age: all are at least as new as the base LSN, some may be newer. The slots' versions sort that out on the other
//! side: of a block and what the log has put into its slot, the newer stays. Once the log has been applied up to the
//! newest block, the image is the leader's state at that LSN.
//!
//! # Going on with an interrupted rebuild
//!
//! Slots below the last one known to be on stable storage are kept as they are, whatever has been written to them
//! since; all others are emptied. Why that is right, where the log is applied again from the lower one of the kept LSN
//! and the new base LSN:
//!
//! - A kept slot with version *v* is what record *v* left there. Records up to *v* change it no more; each later one is
//!   in the log that follows, local or not.
//! - A kept slot can be newer than the local log, because blocks are. Its record comes with the log lane, and rule 1 of
//!   [`apply`](super::apply) keeps the slot until then; it is in the leader's history as long as the leader's term is
//!   the same.
//! - A kept slot that is torn was being written by a record when the crash came: the local log has that record, since
//!   records are applied only once they are durable. What is still torn after the local log has been applied is damage,
//!   and the rebuild begins anew.
//! - A slot that was emptied comes with the new base, or was never used before the new base LSN.
//!
//! # What the device may not have
//!
//! An earlier process may have written here, and its sync may have failed: see
//! [after a failed sync](super::shard). How far a rebuild has come is noted after a sync, which covers every kept slot
//! up to the LSN noted with it; of those that are newer nothing is known, so they are written again as they are. The
//! same sync covers what was emptied before. A rebuild that keeps nothing knows of no sync: if the mark was there when
//! the shard was opened, it also writes zeros to slots that read as zeros, as the device may still have what was in
//! them before.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::apply::Writer;
use super::format::{MAX_SLOTS, Slot};
use super::shard::Shard;
use crate::error::{Error, Result};
use crate::target::{BaseInfo, BaseSink, BaseSource, BlockId, BlockRun, KeptBase};
use crate::types::Lsn;
use crate::zeros::is_zero;

struct SlotSource {
    shard: Arc<Shard>,
    info: BaseInfo,
    next: u64,
}

/// Makes a flushed boundary and opens the image at it.
pub(super) fn open_base(shard: &Arc<Shard>) -> Result<Box<dyn BaseSource>> {
    if !shard.is_rebuilding()
        && let Err(error) = shard.check_serving()
    {
        // After a crash, until the log has been replayed: not for good, so whoever wants a base asks again.
        let source = std::io::Error::new(std::io::ErrorKind::WouldBlock, error.to_string());
        return Err(Error::io("give a base of", &shard.path)(source));
    }
    shard.check_serving()?;
    shard.check_whole()?;
    shard.sync()?;
    let info = BaseInfo {
        base_lsn: shard.durable_applied(),
        block_len: shard.layout.slot_size,
        block_count: shard.map.slot_count(),
    };
    Ok(Box::new(SlotSource { shard: Arc::clone(shard), info, next: 0 }))
}

impl BaseSource for SlotSource {
    fn info(&self) -> BaseInfo {
        self.info
    }

    fn next_run(&mut self, buffer: &mut [u8]) -> Result<Option<BlockRun>> {
        let slot_len = self.shard.layout.slot_len();
        if buffer.len() < slot_len {
            return Err(Error::invalid(format!("a buffer of {} bytes for blocks of {slot_len}", buffer.len())));
        }
        let mut run: Option<BlockRun> = None;
        for place in buffer.chunks_exact_mut(slot_len) {
            // Blank blocks end a run, or are passed over before it.
            let found = loop {
                if self.next >= self.info.block_count {
                    break false;
                }
                let is_free = matches!(self.shard.read_slot(self.next, place)?, Slot::Free);
                self.next += 1;
                if !is_free || run.is_some() {
                    break !is_free;
                }
            };
            if !found {
                break;
            }
            let run = run.get_or_insert(BlockRun { first: BlockId(self.next - 1), count: 0, len: 0 });
            run.count += 1;
            run.len += slot_len;
        }
        // A rebuild of this very store that has begun since leaves nothing to give.
        self.shard.check_serving()?;
        Ok(run)
    }

    fn skip_to(&mut self, first: BlockId) {
        self.next = first.0;
    }
}

struct SlotSink {
    shard: Arc<Shard>,
    session: u64,
    block_count: u64,
}

/// Sets the mark alone: no base is too old any more.
pub(super) fn give_up(shard: &Arc<Shard>) -> Result<()> {
    let mut writer = shard.writer.lock();
    shard.check_sound()?;
    set_mark(shard)?;
    writer.set_marked_clean(false);
    Ok(())
}

/// In both copies of the header, so that one of them can be damaged and the other still tells.
fn set_mark(shard: &Shard) -> Result<()> {
    shard.update_header(|header| {
        header.rebuilding = true;
        header.clean = false;
        header.applied = Lsn::ZERO;
    })?;
    shard.rewrite_header()?;
    // Readers look at the mark last, so they find it before they find anything gone.
    shard.rebuilding.store(true, Ordering::SeqCst);
    Ok(())
}

/// Sets the mark, empties the shard and opens it for blocks.
pub(super) fn begin_base(shard: &Arc<Shard>, info: BaseInfo) -> Result<Box<dyn BaseSink>> {
    let mut writer = shard.writer.lock();
    shard.check_sound()?;
    check_fits(shard, info)?;
    if !shard.is_rebuilding() && shard.applied() > info.base_lsn {
        return Err(Error::invalid(format!(
            "shard {} has applied LSN {}, which is newer than the offered base at LSN {}; nothing was changed",
            shard.id,
            shard.applied(),
            info.base_lsn
        )));
    }
    set_mark(shard)?;
    open_sink(shard, &mut writer, info, KeptBase { blocks: 0, applied: info.base_lsn })
}

/// Keeps what an interrupted rebuild has left, empties the rest of the shard and opens it for blocks.
pub(super) fn resume_base(shard: &Arc<Shard>, info: BaseInfo, kept: KeptBase) -> Result<Box<dyn BaseSink>> {
    let mut writer = shard.writer.lock();
    shard.check_sound()?;
    check_fits(shard, info)?;
    if !shard.is_rebuilding() || kept.blocks > info.block_count {
        return Err(Error::invalid(format!(
            "shard {} has no interrupted rebuild that a base of {} blocks can go on with at block {}",
            shard.id, info.block_count, kept.blocks
        )));
    }
    open_sink(shard, &mut writer, info, kept)
}

fn check_fits(shard: &Shard, info: BaseInfo) -> Result<()> {
    if info.block_len == shard.layout.slot_size && info.block_count <= MAX_SLOTS {
        return Ok(());
    }
    Err(Error::Mismatch {
        path: shard.path.clone(),
        reason: format!(
            "the base has {} blocks of {} bytes, but slots have {} bytes",
            info.block_count, info.block_len, shard.layout.slot_size
        )
        .into(),
    })
}

/// The shard carries its mark: empties every slot but those kept.
fn open_sink(shard: &Arc<Shard>, writer: &mut Writer, info: BaseInfo, kept: KeptBase) -> Result<Box<dyn BaseSink>> {
    // Whatever comes of it, an older sink is superseded.
    writer.rebuild_session = 0;
    shard.index.clear();
    writer.forget();
    writer.set_marked_clean(false);
    writer.slot_limit = info.block_count;
    shard.begin_arriving(writer, kept.blocks)?;
    let applied = info.base_lsn.min(kept.applied);
    let (mut torn, mut occupied, mut newest) = (0, 0, info.base_lsn.max(kept.applied));
    let blanks_too = kept.blocks == 0 && writer.blanks_unsure;
    let mut bytes = vec![0; shard.layout.slot_len()];
    let mapped = shard.map.slot_count();
    for slot in 0..mapped.max(kept.blocks) {
        if slot < mapped {
            shard.map.read(slot, &mut bytes);
        } else {
            shard.read_unmapped(slot, &mut bytes)?;
        }
        if slot < kept.blocks {
            match Slot::decode(&shard.layout, slot, &bytes) {
                Ok(found) => {
                    occupied += u64::from(matches!(found, Slot::Occupied { .. }));
                    newest = newest.max(found.lsn());
                    if let Some(arriving) = &mut writer.arriving {
                        arriving.found.note(shard, &arriving.held, slot, &found)?;
                    }
                    if found.lsn() > applied {
                        writer.image.clone_from(&bytes);
                        shard.write_image(writer, slot)?;
                    }
                }
                Err(_) => {
                    writer.note_torn(slot);
                    torn += 1;
                }
            }
        } else if blanks_too || !is_zero(&bytes) {
            bytes.fill(0);
            shard.write_mapped(&mut writer.slots, slot, &bytes)?;
        }
    }
    if kept.blocks == 0 {
        writer.blanks_unsure = false;
    }
    shard.torn.store(torn, Ordering::Release);
    shard.occupied.store(occupied, Ordering::Release);
    shard.applied.store(applied.0, Ordering::Release);
    shard.consistent_from.store(newest.0, Ordering::Release);
    writer.rebuilds += 1;
    writer.rebuild_session = writer.rebuilds;
    let session = writer.rebuild_session;
    Ok(Box::new(SlotSink { shard: Arc::clone(shard), session, block_count: info.block_count }))
}

impl SlotSink {
    fn superseded(&self) -> Error {
        Error::invalid(format!(
            "this rebuild of shard {} is over: it was completed, cancelled or replaced",
            self.shard.id
        ))
    }
}

impl BaseSink for SlotSink {
    fn put_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<()> {
        self.put_blocks(block, bytes.len(), bytes)
    }

    fn put_blocks(&mut self, first: BlockId, block_len: usize, bytes: &[u8]) -> Result<()> {
        let mut writer = self.shard.writer.lock();
        self.shard.check_sound()?;
        if writer.rebuild_session != self.session {
            return Err(self.superseded());
        }
        let count = bytes.len().checked_div(block_len).unwrap_or(0) as u64;
        if first.0.checked_add(count).is_none_or(|end| end > self.block_count) {
            return Err(Error::invalid(format!("{count} blocks from {first} on of a base of {}", self.block_count)));
        }
        if block_len != self.shard.layout.slot_len() {
            return Err(Error::invalid(format!("block {first} of the base has {block_len} bytes")));
        }
        let newest = self.shard.check_base_slots(first.0, bytes)?;
        // What is noted of slots that were written half is not to be relied on.
        self.shard.put_base_slots(&mut writer, first.0, bytes).inspect_err(|_| writer.end_rebuild())?;
        self.shard.consistent_from.fetch_max(newest.0, Ordering::AcqRel);
        Ok(())
    }

    fn pass(&mut self, next: BlockId) -> Result<()> {
        let mut writer = self.shard.writer.lock();
        self.shard.check_sound()?;
        if writer.rebuild_session != self.session {
            return Err(self.superseded());
        }
        let Some(arriving) = &mut writer.arriving else { return Ok(()) };
        self.shard.pass(arriving, next.0.min(self.block_count)).inspect_err(|_| writer.end_rebuild())
    }

    fn consistent_from(&self) -> Lsn {
        self.shard.consistent_from()
    }

    fn complete(&mut self, achieved: Lsn) -> Result<()> {
        let shard = &*self.shard;
        let mut writer = shard.writer.lock();
        shard.check_sound()?;
        if writer.rebuild_session != self.session {
            return Err(self.superseded());
        }
        let (applied, needed) = (shard.applied(), shard.consistent_from().max(achieved));
        if applied < needed {
            return Err(Error::invalid(format!(
                "the rebuild of shard {} needs the log up to LSN {needed}, and {applied} is applied",
                shard.id
            )));
        }
        if let Some(slot) = writer.first_torn() {
            return Err(shard.damaged(slot, "the slot was damaged before the rebuild, which has not written it again"));
        }
        // Blocks were checked when they came, kept ones when they were taken on, and the others were written here.
        let found = shard.end_arriving(&mut writer)?;
        shard.take_over(&mut writer, found)?;
        shard.update_header(|header| {
            header.rebuilding = false;
            header.slot_count = shard.map.slot_count();
            header.applied = applied;
        })?;
        writer.rebuild_session = 0;
        writer.slot_limit = 0;
        shard.rebuilding.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn check_kept(&mut self) -> Result<()> {
        match self.shard.writer.lock().first_torn() {
            Some(slot) => {
                Err(self.shard.damaged(slot, "the slot is damaged, and the local log has not written it again"))
            }
            None => Ok(()),
        }
    }

    fn cancel(&mut self) {
        let mut writer = self.shard.writer.lock();
        if writer.rebuild_session == self.session {
            writer.end_rebuild();
        }
    }
}

impl Drop for SlotSink {
    fn drop(&mut self) {
        self.cancel();
    }
}
