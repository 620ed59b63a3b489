//! Mapped slots: the only unsafe code of the fixed store.
//!
//! # Invariants
//!
//! 1. **Length.** A mapped extent lies within its file, on blocks that were written, with real zeros or with slots, and
//!    synced before it was mapped. Nobody shortens the file: the store's lock keeps other writers out. So no access can
//!    fault, not even on a full disk.
//! 2. **Alignment.** Extents begin at whole pages of the file and slots are whole words of 8 bytes, so every word
//!    accessed is aligned.
//! 3. **Only atomics.** The mapping is read and written through relaxed loads and stores of whole words, nothing else:
//!    no reference to plain bytes of it is ever made. The system may write to the same pages through the file. Threads
//!    may therefore meet in a slot without undefined behaviour; whether what they read belongs together is for the
//!    sequence numbers to say.
//! 4. **Extents stay.** An extent, once in the list, stays mapped and in its place until the whole map is dropped.
//!
//! # Whole slots
//!
//! Each slot shares a sequence number, in memory, with a few others. The writer of a slot makes it odd, writes, and
//! makes it even again; a reader that sees an odd or changed number reads again. There is one [`SlotWriter`], so no two
//! writers meet. Readers take no lock and never delay the writer; a reader waits for as long as one slot is being
//! written.
//!
//! The numbers are not in the file, so the files of two nodes are the same and a crash leaves no odd number behind.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};

use super::format::Layout;

const WORD: usize = 8;
/// Extents of one map. A store grows by an eighth at least, so this takes an empty one to the most slots there can be:
/// 1.125 to the power of 240 is above 2^40.
const MAX_EXTENTS: usize = 256;
/// Sequence numbers of one map.
const SEQUENCES: usize = 1024;
/// How often a reader looks again before it lets other threads run.
const SPINS: u32 = 100;

/// A part of the file in memory.
struct Extent {
    raw: MmapRaw,
    first_slot: u64,
    end_slot: u64,
}

/// The slots of one shard in memory: a list of extents that grows.
pub(super) struct SlotsMap {
    layout: Layout,
    extents: Box<[OnceLock<Extent>]>,
    /// Slots that are mapped. Written by the one [`SlotWriter`] (Release) after their extent is in the list; whoever
    /// sees a value of it (Acquire) finds the extents of all slots below.
    slot_count: AtomicU64,
    sequences: Box<[AtomicU64]>,
}

/// The only way to change slots: one for each map.
pub(super) struct SlotWriter {
    extent_count: usize,
}

impl SlotsMap {
    /// A map without slots, and its one writer.
    pub(super) fn new(layout: Layout) -> (SlotsMap, SlotWriter) {
        let map = SlotsMap {
            layout,
            extents: (0..MAX_EXTENTS).map(|_| OnceLock::new()).collect(),
            slot_count: AtomicU64::new(0),
            sequences: (0..SEQUENCES).map(|_| AtomicU64::new(0)).collect(),
        };
        (map, SlotWriter { extent_count: 0 })
    }

    /// How many slots can be read.
    #[inline]
    pub(super) fn slot_count(&self) -> u64 {
        self.slot_count.load(Ordering::Acquire)
    }

    /// Maps further slots, up to `slot_count` in all. The file has them, written and synced (invariant 1).
    pub(super) fn extend(&self, writer: &mut SlotWriter, file: &File, slot_count: u64) -> io::Result<()> {
        let first_slot = self.slot_count();
        if slot_count <= first_slot {
            return Ok(());
        }
        let range = self.layout.slot_offset(first_slot)..self.layout.slot_offset(slot_count);
        if file.metadata()?.len() < range.end {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than its slots"));
        }
        let too_many = || io::Error::new(io::ErrorKind::OutOfMemory, "the slots do not fit in the address space");
        let place = self.extents.get(writer.extent_count).ok_or_else(too_many)?;
        let len = usize::try_from(range.end - range.start).map_err(|_| too_many())?;
        let raw = MmapOptions::new().offset(range.start).len(len).map_raw(file)?;
        // Read-ahead would bring pages in as large folios, and then one dirtied slot costs a whole folio at the next
        // sync.
        #[cfg(unix)]
        let _ = raw.advise(memmap2::Advice::Random);
        if place.set(Extent { raw, first_slot, end_slot: slot_count }).is_err() {
            return Err(io::Error::other("an extent was mapped twice"));
        }
        writer.extent_count += 1;
        self.slot_count.store(slot_count, Ordering::Release);
        Ok(())
    }

    /// Reads the front of a slot, or all of it, as one writer left it. `to` is whole words, at most a slot.
    #[inline]
    pub(super) fn read(&self, slot: u64, to: &mut [u8]) {
        let sequence = self.sequence(slot);
        let mut spins = 0;
        loop {
            let before = sequence.load(Ordering::Acquire);
            if before.is_multiple_of(2) {
                self.load(slot, to);
                // The loads above come before the load below: if they saw a word of a later write, its odd number is
                // seen here.
                fence(Ordering::Acquire);
                if sequence.load(Ordering::Relaxed) == before {
                    return;
                }
            }
            spins += 1;
            if spins % SPINS == 0 {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// Replaces a slot by `bytes`, which are as long as a slot.
    #[inline]
    pub(super) fn write(&self, writer: &mut SlotWriter, slot: u64, bytes: &[u8]) {
        self.write_by(writer, slot, || self.store(slot, bytes));
    }

    /// Lets `put` replace a slot through the file, where that shows in the mapping at once.
    #[inline]
    pub(super) fn write_by<T>(&self, _writer: &mut SlotWriter, slot: u64, put: impl FnOnce() -> T) -> T {
        let sequence = self.sequence(slot);
        let before = sequence.load(Ordering::Relaxed);
        sequence.store(before.wrapping_add(1), Ordering::Relaxed);
        // The odd number comes before every word that `put` writes.
        fence(Ordering::Release);
        let result = put();
        sequence.store(before.wrapping_add(2), Ordering::Release);
        result
    }

    /// Whether the slot, or one that shares its sequence number, was written since the map was made.
    #[cfg(test)]
    pub(super) fn was_written(&self, slot: u64) -> bool {
        self.sequence(slot).load(Ordering::Acquire) != 0
    }

    /// Writes every changed page back and waits until the device has it.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.extents.iter().map_while(OnceLock::get).try_for_each(|extent| extent.raw.flush())
    }

    #[inline]
    fn sequence(&self, slot: u64) -> &AtomicU64 {
        #[allow(clippy::cast_possible_truncation, reason = "the remainder is all that counts")]
        &self.sequences[slot as usize % SEQUENCES]
    }

    #[inline]
    fn load(&self, slot: u64, to: &mut [u8]) {
        let (words, rest) = to.as_chunks_mut::<WORD>();
        assert!(rest.is_empty(), "slots are read in whole words");
        for (word, bytes) in self.words(slot, words.len()).zip(words) {
            *bytes = word.load(Ordering::Relaxed).to_ne_bytes();
        }
    }

    #[inline]
    fn store(&self, slot: u64, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<WORD>();
        assert!(rest.is_empty() && bytes.len() == self.layout.slot_len(), "slots are written as a whole");
        for (word, bytes) in self.words(slot, words.len()).zip(words) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
    }

    /// The first words of a slot.
    #[inline]
    fn words(&self, slot: u64, count: usize) -> impl Iterator<Item = &AtomicU64> {
        let extent = self.extent(slot);
        let Range { start, end } = self.locate(extent, slot, count);
        (start..end).step_by(WORD).map(|at| {
            // SAFETY: inside the extent (checked by `locate`), which cannot fault (invariant 1) and stays mapped for as
            // long as `self` (invariant 4); aligned (invariant 2); nothing but atomics ever accesses it (invariant 3).
            unsafe { AtomicU64::from_ptr(extent.raw.as_mut_ptr().add(at).cast()) }
        })
    }

    #[inline]
    fn extent(&self, slot: u64) -> &Extent {
        let found = self.extents.partition_point(|extent| extent.get().is_some_and(|extent| extent.end_slot <= slot));
        match self.extents.get(found).and_then(OnceLock::get) {
            Some(extent) => extent,
            None => panic!("slot {slot} of {}", self.slot_count()),
        }
    }

    /// Bytes of an extent that the first `words` words of a slot take, checked against both.
    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "inside the extent, whose length fitted in a usize")]
    fn locate(&self, extent: &Extent, slot: u64, words: usize) -> Range<usize> {
        let slot_len = self.layout.slot_len();
        assert!(extent.first_slot <= slot && slot < extent.end_slot && words * WORD <= slot_len);
        let start = (slot - extent.first_slot) as usize * slot_len;
        assert!(start + slot_len <= extent.raw.len() && (extent.raw.as_ptr() as usize).is_multiple_of(WORD));
        start..start + words * WORD
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::wal::segment::zero_in_pages;

    fn map(slots: u64) -> (SlotsMap, SlotWriter, File) {
        let layout = Layout::new(8, 224).unwrap();
        assert_eq!(layout.slot_len(), 256);
        let file = tempfile::tempfile().unwrap();
        zero_in_pages(&file, 0..layout.slot_offset(slots)).unwrap();
        let (map, mut writer) = SlotsMap::new(layout);
        map.extend(&mut writer, &file, slots).unwrap();
        (map, writer, file)
    }

    #[test]
    fn slots_keep_what_is_written_across_growth() {
        let (map, mut writer, file) = map(16);
        map.write(&mut writer, 15, &[7; 256]);
        zero_in_pages(&file, map.layout.slot_offset(16)..map.layout.slot_offset(48)).unwrap();
        for slots in [32, 48] {
            map.extend(&mut writer, &file, slots).unwrap();
            map.write(&mut writer, slots - 1, &[9; 256]);
        }
        let mut bytes = [0; 256];
        for (slot, byte) in [(14, 0), (15, 7), (16, 0), (31, 9), (32, 0), (47, 9)] {
            map.read(slot, &mut bytes);
            assert_eq!(bytes, [byte; 256], "slot {slot}");
        }
        map.sync().unwrap();
    }

    #[test]
    fn a_file_without_the_slots_is_refused() {
        let (map, mut writer, file) = map(16);
        assert!(map.extend(&mut writer, &file, 32).is_err());
        assert_eq!(map.slot_count(), 16);
    }

    #[test]
    #[should_panic = "slot 16 of 16"]
    fn no_access_past_the_end() {
        map(16).0.read(16, &mut [0; 8]);
    }

    #[test]
    fn readers_never_see_half_a_slot() {
        let (map, mut writer, _file) = map(16);
        read_while(&map, |byte| map.write(&mut writer, 3, &[byte; 256]));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn readers_never_see_half_a_slot_that_is_written_through_the_file() {
        let (map, mut writer, file) = map(16);
        let at = map.layout.slot_offset(3);
        read_while(&map, |byte| {
            map.write_by(&mut writer, 3, || crate::wal::segment::write_all_at(&file, &[byte; 256], at)).unwrap();
            let mut bytes = [0; 256];
            map.read(3, &mut bytes);
            assert_eq!(bytes, [byte; 256], "it shows at once");
        });
    }

    /// Writes slot 3 again and again while others read it.
    fn read_while(map: &SlotsMap, mut write: impl FnMut(u8)) {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut bytes = [0; 256];
                    while !done.load(Ordering::Relaxed) {
                        map.read(3, &mut bytes);
                        assert!(bytes.iter().all(|&byte| byte == bytes[0]), "{bytes:?}");
                    }
                });
            }
            (0..20_000_u32).for_each(|round| write(round.to_le_bytes()[0]));
            done.store(true, Ordering::Relaxed);
        });
    }
}
