//! Slots behind those that are mapped, while a base comes: they are reached through the file.
//!
//! A file grows by real zeros, which are synced before they are mapped. A base that came into such slots would be written
//! to the device twice, so while one comes nothing more is mapped: its blocks make the file longer as they come, and
//! records of the log lane go to where they belong in the file as well. Nobody reads the shard meanwhile. At the end
//! what is blank gets its real zeros, everything is synced once, and then mapped.
//!
//! What a slot has before its block comes stands in the file too: what a record left there, or nothing, which reads as
//! zeros, as a free slot does. So nothing is kept in memory for each slot.
//!
//! A full disk is an error of a write here, as elsewhere. A crash leaves a file that is longer than its slots; the next
//! rebuild keeps of the rest what is known to have been synced, and cuts off what is behind that.

use super::apply::Writer;
use super::format::Slot;
use super::reader::fill;
use super::shard::Shard;
use crate::error::{Error, Result};
use crate::types::Lsn;
use crate::wal::segment::{write_in_pages, zero_in_pages};

/// Bytes looked at together where blanks are searched for.
const LOOK_LEN: usize = 256 * 1024;

/// How far the file is written behind the mapped slots.
pub(super) struct Arriving {
    /// Every slot below is on blocks that were written.
    filled: u64,
    /// No slot from here on was written.
    touched: u64,
    /// What the file has where blocks are to go.
    there: Vec<u8>,
}

impl Shard {
    /// Begins to take a base. Of the slots that are not mapped, those below `kept` stay, and all others are blank.
    pub(super) fn begin_arriving(&self, writer: &mut Writer, kept: u64) -> Result<()> {
        let mapped = self.map.slot_count();
        let touched = mapped.max(kept);
        let end = self.layout.slot_offset(touched);
        let len = self.file.metadata().map_err(Error::io("look at", &self.path))?.len();
        if len > end {
            self.file.set_len(end).map_err(Error::io("cut", &self.path))?;
        }
        let arriving = writer.arriving.insert(Arriving { filled: mapped, touched, there: Vec::new() });
        self.fill_blanks(arriving, kept)
    }

    /// Takes verified blocks from slot `first` on, none of which is mapped. Slots that a record has made newer stay.
    pub(super) fn take_blocks(&self, arriving: &mut Arriving, first: u64, blocks: &[u8]) -> Result<()> {
        self.fill_blanks(arriving, first)?;
        let slot_len = self.layout.slot_len();
        let count = blocks.len() / slot_len;
        let write = |from: usize, to: usize| {
            let at = self.layout.slot_offset(first + from as u64);
            write_in_pages(&self.file, &blocks[from * slot_len..to * slot_len], at).map_err(Error::io("write", &self.path))
        };
        if first >= arriving.touched {
            write(0, count)?;
        } else {
            arriving.there.resize(blocks.len(), 0);
            self.read_unmapped(first, &mut arriving.there)?;
            let mut from = 0;
            let pairs = blocks.chunks_exact(slot_len).zip(arriving.there.chunks_exact(slot_len));
            for ((block, there), slot) in pairs.zip(first..) {
                let version = |bytes| Slot::decode_prefix(&self.layout, bytes).map(|slot| slot.lsn());
                let damaged = |reason| self.damaged(slot, reason);
                if version(there).map_err(damaged)? >= version(block).map_err(damaged)? {
                    let here = usize::try_from(slot - first).unwrap_or(count);
                    write(from, here)?;
                    from = here + 1;
                }
            }
            write(from.min(count), count)?;
        }
        let end = first + count as u64;
        arriving.filled = arriving.filled.max(end);
        arriving.touched = arriving.touched.max(end);
        Ok(())
    }

    /// Writes the whole of a slot that is not mapped.
    pub(super) fn write_unmapped(&self, arriving: &mut Arriving, slot: u64, bytes: &[u8]) -> Result<()> {
        write_in_pages(&self.file, bytes, self.layout.slot_offset(slot)).map_err(Error::io("write", &self.path))?;
        arriving.touched = arriving.touched.max(slot + 1);
        Ok(())
    }

    /// Reads from the beginning of a slot that is not mapped on; what was never written is zeros.
    pub(super) fn read_unmapped(&self, slot: u64, to: &mut [u8]) -> Result<()> {
        fill(&self.file, to, self.layout.slot_offset(slot)).map_err(Error::io("read", &self.path))
    }

    /// Ends taking a base: as many slots as the leader has are written, synced and mapped. Their number is to be put into
    /// the header.
    pub(super) fn end_arriving(&self, writer: &mut Writer) -> Result<()> {
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
        writer.arriving = None;
        Ok(())
    }

    /// Real zeros for every slot below `end` that was not written.
    fn fill_blanks(&self, arriving: &mut Arriving, end: u64) -> Result<()> {
        let slot_len = self.layout.slot_len();
        let zero = |from: u64, to: u64| {
            let range = self.layout.slot_offset(from)..self.layout.slot_offset(to);
            zero_in_pages(&self.file, range).map_err(Error::io("extend", &self.path))
        };
        let written_to = end.min(arriving.touched);
        while arriving.filled < written_to {
            let most = (LOOK_LEN / slot_len).max(1);
            let count = usize::try_from(written_to - arriving.filled).unwrap_or(most).min(most);
            arriving.there.resize(count * slot_len, 0);
            self.read_unmapped(arriving.filled, &mut arriving.there)?;
            for (slot, bytes) in (arriving.filled..).zip(arriving.there.chunks_exact(slot_len)) {
                if bytes.iter().all(|&byte| byte == 0) {
                    zero(slot, slot + 1)?;
                }
            }
            arriving.filled += count as u64;
        }
        if arriving.filled < end {
            zero(arriving.filled, end)?;
            arriving.filled = end;
        }
        arriving.touched = arriving.touched.max(arriving.filled);
        Ok(())
    }

    /// Blocks of a base, from slot `first` on: each is checked, and written if its slot is older. The index waits for the
    /// end of the rebuild. Returns the newest version among them.
    pub(super) fn put_base_slots(&self, writer: &mut Writer, first: u64, blocks: &[u8]) -> Result<Lsn> {
        self.check_sound()?;
        let slot_len = self.layout.slot_len();
        let mut newest = Lsn::ZERO;
        for (slot, block) in (first..).zip(blocks.chunks(slot_len)) {
            let found = Slot::decode(&self.layout, slot, block)
                .map_err(|reason| Error::invalid(format!("block {slot} of the base is damaged: {reason}")))?;
            newest = newest.max(found.lsn());
        }
        let mapped = self.map.slot_count();
        let in_map = usize::try_from(mapped.saturating_sub(first)).unwrap_or(usize::MAX).min(blocks.len() / slot_len);
        let (here, behind) = blocks.split_at(in_map * slot_len);
        for (slot, block) in (first..).zip(here.chunks_exact(slot_len)) {
            let version = Slot::decode_prefix(&self.layout, block).map_err(|reason| self.damaged(slot, reason))?.lsn();
            if self.front_of(slot, &mut writer.front)?.lsn() < version {
                self.map.write(&mut writer.slots, slot, block);
            }
        }
        if behind.is_empty() {
            return Ok(newest);
        }
        match &mut writer.arriving {
            Some(arriving) => self.take_blocks(arriving, first + in_map as u64, behind).map(|()| newest),
            None => Err(Error::invalid(format!("no base of shard {} is coming", self.id))),
        }
    }
}
