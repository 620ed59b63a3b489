//! The bytes of a fixed store: file header, slots, and the records that change them.
//!
//! All numbers are little-endian. Every CRC is CRC-32 (IEEE).
//!
//! # Shard file, version 1
//!
//! One file for each shard, `slots-0003.tfs`: a header page of 4096 bytes, then `slot_count` slots of `slot_size` bytes
//! without gaps. The file may be longer; what is behind the last slot was never used, or belongs to a rebuild that has
//! not been completed.
//!
//! The header page holds two copies of the header, at offsets 0 and 2048, zeros elsewhere. A header is written over the
//! *older* copy and synced, so one whole copy is there whatever a crash cuts off. The valid copy with the larger
//! `generation` counts. The mark of a rebuild is in both copies before any slot is emptied, so that damage to one of
//! them never hides it.
//!
//! | offset | size | field | meaning |
//! |---:|---:|---|---|
//! | 0 | 8 | `magic` | the bytes `TOWLFIX` and a zero |
//! | 8 | 2 | `version` | 1 |
//! | 10 | 2 | `shard` | which shard |
//! | 12 | 2 | `shard_count` | of how many |
//! | 14 | 1 | `prefix_bits` | leading bits of a key that choose its shard; 0: its hash does |
//! | 15 | 1 | `flags` | bit 0: *clean*, closed in order; bit 1: *rebuilding*; others 0 |
//! | 16 | 4 | `key_len` | longest key, K: 1 to 4096 |
//! | 20 | 4 | `value_len` | longest value, V: up to 1 MiB |
//! | 24 | 4 | `slot_size` | bytes of a slot: follows from K and V, see below |
//! | 28 | 4 | `reserved` | 0 |
//! | 32 | 8 | `slot_count` | slots in the file, all of them backed by blocks |
//! | 40 | 8 | `applied_lsn` | every record up to here is in the slots and on stable storage; 0 while rebuilding |
//! | 48 | 8 | `generation` | one more than in the other copy; 0: nobody has had the store open yet |
//! | 56 | 4 | `reserved` | 0 |
//! | 60 | 4 | `crc` | CRC of bytes 0 to 60 |
//!
//! # Slot, version 1
//!
//! | offset | size | field | meaning |
//! |---:|---:|---|---|
//! | 0 | 4 | `crc` | CRC of the slot number (8 bytes) and bytes 4 to the slot's end |
//! | 4 | 1 | `status` | 0 free, 1 occupied, 2 deleted |
//! | 5 | 1 | `reserved` | 0 |
//! | 6 | 2 | `key_len` | bytes of the key, at least 1 |
//! | 8 | 8 | `version` | LSN of the record that wrote the slot, at least 1 |
//! | 16 | 4 | `value_len` | bytes of the value; 0 where deleted |
//! | 20 | 4 | `reserved` | 0 |
//! | 24 | K | key | and zeros |
//! | 24 + K | V | value | and zeros, up to the slot's end |
//!
//! `slot_size` is 24 + K + V rounded up to a multiple of 8, or of 512 where that exceeds 4096 bytes. A slot is valid
//! exactly if all its bytes are 0 (free: never written), or the status is 1 or 2, the lengths are within K and V, the
//! unused bytes are 0 and the CRC matches. The slot number in the CRC tells a slot from a copy that went astray.
//!
//! # Record, version 1
//!
//! | offset | size | field | meaning |
//! |---:|---:|---|---|
//! | 0 | 1 | `version` | 1 |
//! | 1 | 1 | `operation` | 1 put, 2 delete |
//! | 2 | 2 | `key_len` | bytes of the key, at least 1 |
//! | 4 | 4 | `value_len` | bytes of the value; 0 for a delete |
//! | 8 | 8 | `slot` | the slot that is written |
//! | 16 | | key, value | to the record's end exactly |
//!
//! The leader chooses the slot, so that a follower writes the same one. The slot's version is not in the record: it is
//! the record's LSN, which grows with every record of the shard and is the same on every node.

use crate::limits::{MAX_SHARDS, PAGE_LEN};
use crate::target::TargetTopology;
use crate::target::router::ShardRouter;
use crate::types::{Lsn, ShardId};
use crate::zeros::is_zero;

const MAGIC: [u8; 8] = *b"TOWLFIX\0";
const FORMAT_VERSION: u16 = 1;
const RECORD_VERSION: u8 = 1;
const FLAG_CLEAN: u8 = 1;
const FLAG_REBUILDING: u8 = 2;

/// Longest key that a store can be made for, in bytes.
pub const MAX_KEY_LEN: u32 = 4096;
/// Longest value that a store can be made for, in bytes.
pub const MAX_VALUE_LEN: u32 = 1024 * 1024;
/// Most slots of one shard.
pub const MAX_SLOTS: u64 = 1 << 36;
/// Bytes before the first slot.
pub(super) const SLOTS_OFFSET: u64 = PAGE_LEN;
/// Bytes of a slot before the key.
pub(super) const SLOT_HEADER_LEN: usize = 24;
/// Bytes of a record before the key.
pub(super) const RECORD_FIXED_LEN: usize = 16;
/// Bytes of one copy of the header.
pub(super) const HEADER_LEN: usize = 64;
const HEADER_COPY_STRIDE: u64 = PAGE_LEN / 2;

const STATUS_OCCUPIED: u8 = 1;
const STATUS_DELETED: u8 = 2;
const OPERATION_PUT: u8 = 1;
const OPERATION_DELETE: u8 = 2;

const _: () = assert!(MAX_KEY_LEN <= u16::MAX as u32, "key lengths fit their field");
const _: () = assert!(MAX_SLOTS <= i64::MAX as u64 / (MAX_KEY_LEN + MAX_VALUE_LEN + 4096) as u64, "offsets fit");

/// Everything that follows from the longest key and value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) key_len: u32,
    pub(super) value_len: u32,
    pub(super) slot_size: u32,
}

impl Layout {
    /// The layout for keys and values of up to these lengths, or half a sentence that says which one is impossible.
    pub(super) fn new(key_len: u32, value_len: u32) -> Result<Layout, String> {
        if key_len == 0 || key_len > MAX_KEY_LEN {
            return Err(format!("key_len is {key_len}; it can be 1 to {MAX_KEY_LEN}"));
        }
        if value_len > MAX_VALUE_LEN {
            return Err(format!("value_len is {value_len}; it can be up to {MAX_VALUE_LEN}"));
        }
        let raw = 24 + key_len + value_len;
        let slot_size = if raw > 4096 { raw.next_multiple_of(512) } else { raw.next_multiple_of(8) };
        Ok(Layout { key_len, value_len, slot_size })
    }

    pub(super) const fn slot_len(&self) -> usize {
        self.slot_size as usize
    }

    /// Where a slot begins in its file.
    pub(super) const fn slot_offset(&self, slot: u64) -> u64 {
        SLOTS_OFFSET + slot * self.slot_size as u64
    }

    /// Bytes of a slot up to the end of its key, in whole words.
    pub(super) const fn prefix_len(&self) -> usize {
        (SLOT_HEADER_LEN + self.key_len as usize).next_multiple_of(8)
    }

    /// How many slots a store of `slots` has after growing once: by an eighth, by 1 MiB at least, and so that the
    /// slots fill whole pages. A function of the number alone, so that leader and follower grow alike.
    pub(super) fn grown(&self, slots: u64) -> u64 {
        let size = u64::from(self.slot_size);
        let unit = (1..=512).find(|unit| (unit * size).is_multiple_of(PAGE_LEN)).unwrap_or(512);
        let step = (slots / 8).max((1024 * 1024) / size).max(1).next_multiple_of(unit);
        slots.saturating_add(step).min(MAX_SLOTS)
    }

    pub(super) const fn value_offset(&self) -> usize {
        SLOT_HEADER_LEN + self.key_len as usize
    }
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) shard: ShardId,
    pub(super) shard_count: u16,
    pub(super) prefix_bits: u8,
    pub(super) clean: bool,
    pub(super) rebuilding: bool,
    pub(super) layout: Layout,
    pub(super) slot_count: u64,
    pub(super) applied: Lsn,
    pub(super) generation: u64,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.shard.0.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.shard_count.to_le_bytes());
        bytes[14] = self.prefix_bits;
        bytes[15] = (u8::from(self.clean) * FLAG_CLEAN) | (u8::from(self.rebuilding) * FLAG_REBUILDING);
        bytes[16..20].copy_from_slice(&self.layout.key_len.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.layout.value_len.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.layout.slot_size.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.slot_count.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.applied.0.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.generation.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads and checks one copy.
    pub(super) fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Header, String> {
        if bytes[0..8] != MAGIC {
            return Err("it does not begin like a shard of a fixed store".to_owned());
        }
        let crc = crc32fast::hash(&bytes[..60]);
        if crc != u32_at(bytes, 60) {
            return Err(format!("the header's checksum is {:08x}, but its bytes give {crc:08x}", u32_at(bytes, 60)));
        }
        let version = u16_at(bytes, 8);
        if version != FORMAT_VERSION {
            return Err(format!("fixed store version {version} is not {FORMAT_VERSION}"));
        }
        let flags = bytes[15];
        if flags & !(FLAG_CLEAN | FLAG_REBUILDING) != 0 || u32_at(bytes, 28) != 0 || u32_at(bytes, 56) != 0 {
            return Err("unknown flags or reserved bytes of the header are in use".to_owned());
        }
        let header = Header {
            shard: ShardId(u16_at(bytes, 10)),
            shard_count: u16_at(bytes, 12),
            prefix_bits: bytes[14],
            clean: flags & FLAG_CLEAN != 0,
            rebuilding: flags & FLAG_REBUILDING != 0,
            layout: Layout::new(u32_at(bytes, 16), u32_at(bytes, 20))?,
            slot_count: u64_at(bytes, 32),
            applied: Lsn(u64_at(bytes, 40)),
            generation: u64_at(bytes, 48),
        };
        let slot_size = u32_at(bytes, 24);
        if slot_size != header.layout.slot_size {
            return Err(format!("slots of {slot_size} bytes, not {}", header.layout.slot_size));
        }
        ShardRouter::new(header.shard_count, header.prefix_bits).map_err(|error| error.to_string())?;
        if header.shard.0 >= header.shard_count || header.shard_count > MAX_SHARDS {
            return Err(format!("shard {} of {}", header.shard, header.shard_count));
        }
        if header.slot_count > MAX_SLOTS {
            return Err(format!("{} slots, more than a shard can have", header.slot_count));
        }
        Ok(header)
    }

    /// The newer valid copy of a header page; the reason why the first copy is invalid if neither is valid.
    pub(super) fn decode_page(page: &[u8]) -> Result<Header, String> {
        let copy = |at: u64| {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            let bytes = page.get(at..).and_then(|rest| rest.first_chunk()).ok_or("the header is cut off")?;
            Header::decode(bytes)
        };
        match (copy(0), copy(HEADER_COPY_STRIDE)) {
            (Ok(first), Ok(second)) => Ok(if first.generation >= second.generation { first } else { second }),
            (Ok(header), Err(_)) | (Err(_), Ok(header)) => Ok(header),
            (Err(reason), Err(_)) => Err(reason),
        }
    }

    /// Where in the file this copy goes: even generations first, odd ones second.
    pub(super) const fn offset(&self) -> u64 {
        (self.generation % 2) * HEADER_COPY_STRIDE
    }

    pub(super) const fn topology(&self) -> TargetTopology {
        TargetTopology { key_len: self.layout.key_len, value_len: self.layout.value_len, prefix_bits: self.prefix_bits }
    }
}

/// What is in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot<'a> {
    /// Never written.
    Free,
    Occupied {
        lsn: Lsn,
        key: &'a [u8],
        value: &'a [u8],
    },
    /// The key is what was deleted.
    Deleted {
        lsn: Lsn,
        key: &'a [u8],
    },
}

impl<'a> Slot<'a> {
    /// Reads and checks the bytes of slot number `slot`.
    pub(super) fn decode(layout: &Layout, slot: u64, bytes: &'a [u8]) -> Result<Slot<'a>, String> {
        if bytes.len() != layout.slot_len() {
            return Err(format!("a slot has {} bytes, not {}", layout.slot_len(), bytes.len()));
        }
        if bytes[4] == 0 && is_zero(bytes) {
            return Ok(Slot::Free);
        }
        let crc = slot_crc(slot, bytes);
        if crc != u32_at(bytes, 0) {
            return Err(format!("the slot's checksum is {:08x}, but its bytes give {crc:08x}", u32_at(bytes, 0)));
        }
        if bytes[5] != 0 || u32_at(bytes, 20) != 0 {
            return Err("reserved bytes of the slot are in use".to_owned());
        }
        let parsed = Slot::decode_prefix(layout, bytes)?;
        let value_len = u32_at(bytes, 16);
        let (key_len, value_end) = (usize::from(u16_at(bytes, 6)), layout.value_offset() + value_len as usize);
        let key_end = SLOT_HEADER_LEN + key_len;
        if value_len > layout.value_len
            || !is_zero(&bytes[key_end..layout.value_offset()])
            || !is_zero(&bytes[value_end..])
        {
            return Err("unused bytes of the slot are in use".to_owned());
        }
        match parsed {
            Slot::Occupied { lsn, key, .. } => {
                Ok(Slot::Occupied { lsn, key, value: &bytes[layout.value_offset()..value_end] })
            }
            Slot::Deleted { .. } if value_len != 0 => Err("a deleted slot has a value".to_owned()),
            Slot::Free => Err("a free slot has a checksum".to_owned()),
            other => Ok(other),
        }
    }

    /// Reads status, version and key from the [front](Layout::prefix_len) of a slot whose checksum was right before.
    /// The value is left empty.
    pub(super) fn decode_prefix(layout: &Layout, bytes: &'a [u8]) -> Result<Slot<'a>, String> {
        let (status, key_len, lsn) = (bytes[4], u16_at(bytes, 6), Lsn(u64_at(bytes, 8)));
        if status == 0 && lsn == Lsn::ZERO && key_len == 0 {
            return Ok(Slot::Free);
        }
        if key_len == 0 || u32::from(key_len) > layout.key_len || lsn == Lsn::ZERO {
            return Err(format!("a key of {key_len} bytes and version {lsn}"));
        }
        let key = &bytes[SLOT_HEADER_LEN..SLOT_HEADER_LEN + usize::from(key_len)];
        match status {
            STATUS_OCCUPIED => Ok(Slot::Occupied { lsn, key, value: &[] }),
            STATUS_DELETED => Ok(Slot::Deleted { lsn, key }),
            other => Err(format!("slot status {other} is unknown")),
        }
    }

    /// Writes all bytes of slot number `slot`. The key and value were checked against the layout.
    pub(super) fn encode(&self, layout: &Layout, slot: u64, to: &mut Vec<u8>) {
        to.clear();
        to.resize(layout.slot_len(), 0);
        let (status, lsn, key, value) = match *self {
            Slot::Free => return,
            Slot::Occupied { lsn, key, value } => (STATUS_OCCUPIED, lsn, key, value),
            Slot::Deleted { lsn, key } => (STATUS_DELETED, lsn, key, &[][..]),
        };
        to[4] = status;
        to[6..8].copy_from_slice(&u16::try_from(key.len()).unwrap_or(u16::MAX).to_le_bytes());
        to[8..16].copy_from_slice(&lsn.0.to_le_bytes());
        to[16..20].copy_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_le_bytes());
        to[SLOT_HEADER_LEN..SLOT_HEADER_LEN + key.len()].copy_from_slice(key);
        to[layout.value_offset()..layout.value_offset() + value.len()].copy_from_slice(value);
        let crc = slot_crc(slot, to);
        to[0..4].copy_from_slice(&crc.to_le_bytes());
    }

    /// LSN of the record that wrote it; 0 if none did.
    pub(super) const fn lsn(&self) -> Lsn {
        match self {
            Slot::Free => Lsn::ZERO,
            Slot::Occupied { lsn, .. } | Slot::Deleted { lsn, .. } => *lsn,
        }
    }
}

fn slot_crc(slot: u64, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&slot.to_le_bytes());
    hasher.update(&bytes[4..]);
    hasher.finalize()
}

/// What a record does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operation<'a> {
    pub(super) slot: u64,
    pub(super) key: &'a [u8],
    /// `None` deletes.
    pub(super) value: Option<&'a [u8]>,
}

impl<'a> Operation<'a> {
    pub(super) fn encode(&self, to: &mut Vec<u8>) {
        let value = self.value.unwrap_or_default();
        to.clear();
        to.push(RECORD_VERSION);
        to.push(if self.value.is_some() { OPERATION_PUT } else { OPERATION_DELETE });
        to.extend_from_slice(&u16::try_from(self.key.len()).unwrap_or(u16::MAX).to_le_bytes());
        to.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_le_bytes());
        to.extend_from_slice(&self.slot.to_le_bytes());
        to.extend_from_slice(self.key);
        to.extend_from_slice(value);
    }

    pub(super) fn decode(layout: &Layout, bytes: &'a [u8]) -> Result<Operation<'a>, String> {
        let Some((fixed, rest)) = bytes.split_first_chunk::<RECORD_FIXED_LEN>() else {
            return Err(format!("{} bytes are too few", bytes.len()));
        };
        if fixed[0] != RECORD_VERSION {
            return Err(format!("record version {} is not {RECORD_VERSION}", fixed[0]));
        }
        let (key_len, value_len, slot) = (u16_at(fixed, 2), u32_at(fixed, 4), u64_at(fixed, 8));
        if key_len == 0 || u32::from(key_len) > layout.key_len || value_len > layout.value_len {
            return Err(format!(
                "a key of {key_len} and a value of {value_len} bytes do not fit (at most {} and {})",
                layout.key_len, layout.value_len
            ));
        }
        if rest.len() != usize::from(key_len) + value_len as usize {
            return Err(format!("a record of {} bytes with a key of {key_len}, a value of {value_len}", bytes.len()));
        }
        if slot >= MAX_SLOTS {
            return Err(format!("slot {slot} is more than a shard can have"));
        }
        let (key, value) = rest.split_at(usize::from(key_len));
        match fixed[1] {
            OPERATION_PUT => Ok(Operation { slot, key, value: Some(value) }),
            OPERATION_DELETE if value.is_empty() => Ok(Operation { slot, key, value: None }),
            OPERATION_DELETE => Err("a delete with a value".to_owned()),
            other => Err(format!("operation {other} is unknown")),
        }
    }

    /// What the slot holds after a record with this LSN.
    pub(super) fn result(&self, lsn: Lsn) -> Slot<'a> {
        match self.value {
            Some(value) => Slot::Occupied { lsn, key: self.key, value },
            None => Slot::Deleted { lsn, key: self.key },
        }
    }
}

// Callers pass slices that were checked to be long enough.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout() -> Layout {
        Layout::new(8, 20).unwrap()
    }

    fn header() -> Header {
        Header {
            shard: ShardId(3),
            shard_count: 4,
            prefix_bits: 2,
            clean: true,
            rebuilding: false,
            layout: layout(),
            slot_count: 1024,
            applied: Lsn(0x0102_0304),
            generation: 5,
        }
    }

    fn slot_bytes(slot: Slot<'_>, number: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        slot.encode(&layout(), number, &mut bytes);
        bytes
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// These bytes are on disks: they decode for ever.
    #[test]
    fn golden_bytes() {
        assert_eq!(hex(&header().encode()), GOLDEN_HEADER);
        let occupied = Slot::Occupied { lsn: Lsn(9), key: b"key", value: b"value" };
        assert_eq!(hex(&slot_bytes(occupied, 7)), GOLDEN_SLOT);
        assert_eq!(hex(&slot_bytes(Slot::Deleted { lsn: Lsn(9), key: b"key" }, 7)), GOLDEN_TOMBSTONE);
        let mut record = Vec::new();
        Operation { slot: 7, key: b"key", value: Some(b"value") }.encode(&mut record);
        assert_eq!(hex(&record), "0101030005000000".to_owned() + "0700000000000000" + "6b6579" + "76616c7565");
        Operation { slot: 7, key: b"key", value: None }.encode(&mut record);
        assert_eq!(hex(&record), "0102030000000000".to_owned() + "0700000000000000" + "6b6579");
    }

    const GOLDEN_HEADER: &str = "\
        544f574c4649580001000300040002010800000014000000380000000000000000040000000000000403020100000000\
        050000000000000000000000eafc6a20";
    const GOLDEN_SLOT: &str = "\
        09d25f0f01000300090000000000000005000000000000006b6579000000000076616c75650000000000000000000000\
        0000000000000000";
    const GOLDEN_TOMBSTONE: &str = "\
        be089c4702000300090000000000000000000000000000006b6579000000000000000000000000000000000000000000\
        0000000000000000";

    #[test]
    fn a_header_survives_its_page_and_the_newer_copy_counts() {
        let old = header();
        let new = Header { generation: 6, applied: Lsn(u64::MAX), clean: false, rebuilding: true, ..old };
        let mut page = vec![0; 4096];
        for copy in [old, new] {
            let at = usize::try_from(copy.offset()).unwrap();
            page[at..at + HEADER_LEN].copy_from_slice(&copy.encode());
        }
        assert_eq!(Header::decode_page(&page), Ok(new));
        page[40] ^= 1; // the newer copy, which stands first
        assert_eq!(Header::decode_page(&page), Ok(old));
        page[2048] ^= 1;
        assert!(Header::decode_page(&page).is_err());
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_found() {
        let bytes = header().encode();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_flipped_bit_of_a_slot_is_found() {
        for slot in [
            Slot::Occupied { lsn: Lsn(1), key: b"k", value: b"" },
            Slot::Deleted { lsn: Lsn(u64::MAX), key: b"12345678" },
        ] {
            let bytes = slot_bytes(slot, 3);
            assert_eq!(Slot::decode(&layout(), 3, &bytes), Ok(slot));
            assert!(Slot::decode(&layout(), 4, &bytes).is_err(), "a slot of another number");
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(Slot::decode(&layout(), 3, &damaged).is_err(), "bit {bit}");
            }
        }
    }

    #[test]
    fn a_free_slot_is_all_zeros_and_nothing_else() {
        assert_eq!(Slot::decode(&layout(), 0, &[0; 56]), Ok(Slot::Free));
        let mut bytes = [0; 56];
        bytes[55] = 1;
        assert!(Slot::decode(&layout(), 0, &bytes).is_err());
    }

    #[test]
    fn stores_grow_in_whole_pages_by_an_eighth_and_at_least_a_mebibyte() {
        for (key_len, value_len) in [(1, 0), (8, 20), (16, 100), (16, 2000), (16, 5000), (4096, 1024 * 1024)] {
            let layout = Layout::new(key_len, value_len).unwrap();
            let mut slots = 0;
            for _ in 0..60 {
                let grown = layout.grown(slots);
                let added = (grown - slots) * u64::from(layout.slot_size);
                assert!(added.is_multiple_of(PAGE_LEN) && added > 0);
                assert!(added < 3 * 1024 * 1024 || grown - slots <= slots / 8 + 512, "{layout:?} {slots} {grown}");
                slots = grown;
            }
        }
    }

    proptest! {
        #[test]
        fn slots_and_records_survive(number in 0..MAX_SLOTS, lsn in 1u64.., key in prop::collection::vec(any::<u8>(), 1..=8),
                                     value in prop::option::of(prop::collection::vec(any::<u8>(), 0..=20))) {
            let operation = Operation { slot: number, key: &key, value: value.as_deref() };
            let mut record = Vec::new();
            operation.encode(&mut record);
            prop_assert_eq!(Operation::decode(&layout(), &record), Ok(operation));
            for cut in 0..record.len() {
                prop_assert!(Operation::decode(&layout(), &record[..cut]).is_err());
            }
            let bytes = slot_bytes(operation.result(Lsn(lsn)), number);
            prop_assert_eq!(Slot::decode(&layout(), number, &bytes), Ok(operation.result(Lsn(lsn))));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80), fix_crc in any::<bool>()) {
            let _ = Operation::decode(&layout(), &bytes);
            let _ = Header::decode_page(&bytes);
            let mut slot = bytes;
            slot.resize(layout().slot_len(), 0);
            if fix_crc {
                let crc = slot_crc(1, &slot);
                slot[..4].copy_from_slice(&crc.to_le_bytes());
            }
            let _ = Slot::decode(&layout(), 1, &slot);
            let _ = Slot::decode_prefix(&layout(), &slot);
            slot.resize(HEADER_LEN, 0);
            if fix_crc {
                slot[..10].copy_from_slice(&header().encode()[..10]);
                let crc = crc32fast::hash(&slot[..60]);
                slot[60..].copy_from_slice(&crc.to_le_bytes());
            }
            let _ = Header::decode_page(&slot);
        }
    }
}
