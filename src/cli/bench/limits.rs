//! The bare limits on files: small honest programs that do as little as the work needs, and nothing else.
//!
//! A mapping needs the only unsafe code of the command line, in [`map`].

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::MmapMut;

/// Bytes of a page.
const PAGE: usize = 4096;
/// What a bare log puts before each record: a checksum and a length.
const BARE_HEADER: usize = 8;

/// A file that was filled before, and is mapped.
pub(super) struct MappedFile {
    file: File,
    map: MmapMut,
}

impl MappedFile {
    /// Makes a file of zeros, written one page at a time and synced, and maps it.
    pub(super) fn zeroed_in_pages(path: &Path, len: usize) -> io::Result<MappedFile> {
        let file = zeroed_file(path, len)?;
        let map = map(&file)?;
        Ok(MappedFile { file, map })
    }

    /// Maps a file as it is, to be read from its beginning to its end.
    pub(super) fn open_to_read(path: &Path) -> io::Result<MappedFile> {
        let file = File::options().read(true).write(true).open(path)?;
        let map = map(&file)?;
        #[cfg(unix)]
        let _ = map.advise(memmap2::Advice::Sequential);
        Ok(MappedFile { file, map })
    }

    /// Makes every page clean and unmapped: the next store to each takes a fault.
    pub(super) fn make_fresh(&mut self) -> io::Result<()> {
        self.map.flush()?;
        self.file.sync_data()?;
        self.map = map(&self.file)?;
        Ok(())
    }

    /// Stores to every page, so that the next store takes no fault.
    pub(super) fn make_writable(&mut self) {
        for page in self.map.chunks_mut(PAGE) {
            page[0] = std::hint::black_box(page[0]);
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
}

/// Maps a whole file, without read-ahead: that would bring pages in as large folios.
fn map(file: &File) -> io::Result<MmapMut> {
    // SAFETY: the file was made by this process, in a directory that it made for itself; nothing else opens, writes or
    // shortens it while it is mapped, and all its blocks are written, so that no access faults.
    let map = unsafe { MmapMut::map_mut(file)? };
    #[cfg(unix)]
    let _ = map.advise(memmap2::Advice::Random);
    Ok(map)
}

/// A file of real zeros, written one page at a time and synced.
pub(super) fn zeroed_file(path: &Path, len: usize) -> io::Result<File> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    for at in (0..len).step_by(PAGE) {
        write_at(&file, &[0; PAGE][..PAGE.min(len - at)], at as u64)?;
    }
    file.sync_all()?;
    Ok(file)
}

#[cfg(unix)]
pub(super) fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
pub(super) fn write_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = std::os::windows::fs::FileExt::seek_write(file, bytes, offset)?;
        bytes = &bytes[written..];
        offset += written as u64;
    }
    Ok(())
}

#[cfg(unix)]
pub(super) fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
pub(super) fn read_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let read = std::os::windows::fs::FileExt::seek_read(file, bytes, offset)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[read..];
        offset += read as u64;
    }
    Ok(())
}

/// Bytes that a record takes in a bare log.
pub(super) fn slot_len(record_len: usize) -> usize {
    (BARE_HEADER + record_len).next_multiple_of(8)
}

/// Puts one record into its slot: copy, length, checksum.
#[inline]
fn fill_slot(slot: &mut [u8], record: &[u8]) {
    let end = BARE_HEADER + record.len();
    slot[BARE_HEADER..end].copy_from_slice(record);
    let len = u32::try_from(record.len()).unwrap_or(u32::MAX);
    slot[4..BARE_HEADER].copy_from_slice(&len.to_le_bytes());
    let crc = crc32fast::hash(&slot[4..end]);
    slot[..4].copy_from_slice(&crc.to_le_bytes());
}

/// The record that a slot holds.
pub(super) fn record_in(slot: &[u8], len: usize) -> &[u8] {
    &slot[BARE_HEADER..BARE_HEADER + len]
}

/// Appends `record` until `count` are there or `to` is full. Returns the bytes filled.
pub(super) fn append(to: &mut [u8], record: &[u8], count: u64) -> usize {
    let slot_len = slot_len(record.len());
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    let mut filled = 0;
    for slot in to.chunks_exact_mut(slot_len).take(most) {
        fill_slot(slot, record);
        filled += slot_len;
    }
    filled
}

/// Appends `count` records with one `pwrite` each.
pub(super) fn append_with_pwrite(file: &File, record: &[u8], count: u64) -> io::Result<()> {
    let mut slot = vec![0; slot_len(record.len())];
    for number in 0..count {
        fill_slot(&mut slot, record);
        write_at(file, &slot, number * slot.len() as u64)?;
    }
    Ok(())
}

/// A writer that makes each record durable by itself, onto blocks that were written before.
pub(super) struct DurableWriter {
    file: File,
    slot: Vec<u8>,
    at: u64,
}

impl DurableWriter {
    pub(super) fn new(path: &Path, len: usize, record_len: usize) -> io::Result<DurableWriter> {
        Ok(DurableWriter { file: zeroed_file(path, len)?, slot: vec![0; slot_len(record_len)], at: 0 })
    }

    /// One durable record.
    pub(super) fn append(&mut self, record: &[u8]) -> io::Result<()> {
        self.write(record)?;
        self.sync()
    }

    /// The first half of it.
    pub(super) fn write(&mut self, record: &[u8]) -> io::Result<()> {
        fill_slot(&mut self.slot, record);
        write_at(&self.file, &self.slot, self.at)?;
        self.at += self.slot.len() as u64;
        Ok(())
    }

    /// The second.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// The same past the page cache: whole blocks from an aligned buffer, the last block again and again until it is full.
#[cfg(target_os = "linux")]
pub(super) struct DirectWriter {
    file: File,
    /// Room for the blocks of one record, behind `aligned` bytes that make it begin at a multiple of a page.
    buffer: Vec<u8>,
    aligned: usize,
    slot: Vec<u8>,
    /// Where the next record goes: a block's number, and bytes of it that are in use.
    block: u64,
    used: usize,
}

#[cfg(target_os = "linux")]
impl DirectWriter {
    pub(super) fn new(path: &Path, len: usize, record_len: usize) -> io::Result<DirectWriter> {
        use std::os::unix::fs::OpenOptionsExt;
        drop(zeroed_file(path, len)?);
        let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let file = File::options().read(true).write(true).custom_flags(direct).open(path)?;
        let slot = vec![0; slot_len(record_len)];
        let buffer = vec![0; (slot.len() + PAGE).next_multiple_of(PAGE) + PAGE];
        let aligned = buffer.as_ptr().align_offset(PAGE);
        Ok(DirectWriter { file, buffer, aligned, slot, block: 0, used: 0 })
    }

    pub(super) fn append(&mut self, record: &[u8]) -> io::Result<()> {
        fill_slot(&mut self.slot, record);
        let blocks = &mut self.buffer[self.aligned..];
        let end = self.used + self.slot.len();
        blocks[self.used..end].copy_from_slice(&self.slot);
        let whole = end.next_multiple_of(PAGE);
        blocks[end..whole].fill(0);
        write_at(&self.file, &blocks[..whole], self.block * PAGE as u64)?;
        let kept = end - end % PAGE;
        blocks.copy_within(kept..whole, 0);
        self.block += (kept / PAGE) as u64;
        self.used = end % PAGE;
        self.file.sync_data()
    }
}

/// Checksums a log of records of one size as recovery has to: record by record, the chain seeding each. Returns the
/// last.
pub(super) fn checksum(bytes: &[u8], record_len: usize) -> u32 {
    bytes.chunks(record_len).fold(0, |chain, record| {
        let mut hasher = crc32fast::Hasher::new_with_initial(chain);
        hasher.update(record);
        hasher.finalize()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bare_log(record: &[u8], count: usize) -> Vec<u8> {
        let mut bytes = vec![0; slot_len(record.len()) * count];
        assert_eq!(append(&mut bytes, record, count as u64), bytes.len());
        bytes
    }

    #[test]
    fn every_way_of_appending_gives_the_same_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        for len in [1, 128, 1024, 5000] {
            let record = vec![7; len];
            let expected = bare_log(&record, 9);
            let file = zeroed_file(&path, expected.len()).unwrap();
            append_with_pwrite(&file, &record, 9).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), expected);
            let mut durable = DurableWriter::new(&path, expected.len(), len).unwrap();
            (0..9).for_each(|_| durable.append(&record).unwrap());
            assert_eq!(std::fs::read(&path).unwrap(), expected);
            let mut mapped = MappedFile::zeroed_in_pages(&path, expected.len()).unwrap();
            append(mapped.bytes_mut(), &record, 9);
            mapped.make_fresh().unwrap();
            mapped.make_writable();
            assert_eq!(mapped.bytes(), expected);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn direct_writes_give_the_same_bytes_in_whole_blocks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        for len in [1, 1024, 4088, 5000] {
            // Not every file system can.
            let Ok(mut direct) = DirectWriter::new(&path, 1 << 16, len) else { return };
            let record = vec![7; len];
            let expected = bare_log(&record, 9);
            (0..9).for_each(|_| direct.append(&record).unwrap());
            let found = std::fs::read(&path).unwrap();
            assert_eq!(found[..expected.len()], expected);
            assert!(found[expected.len()..].iter().all(|&byte| byte == 0));
        }
    }
}
