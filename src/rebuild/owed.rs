//! What a follower owes that is being rebuilt: a small file a shard, `owed-0003` in the data directory.
//!
//! A rebuild gives up what is here, which may have been acknowledged. What it brings back reaches at least as far: its
//! target is the head of whoever serves it, and nobody is rebuilt by one that is behind under the same epoch. If it is
//! interrupted, though, what there was is forgotten, and another may be asked to go on: one that [feeds others as a
//! follower](crate::NodeBuilder::listen), and has not come as far under this epoch as the leader had. Completed at
//! that, the node would pass for one that has all that it ever acknowledged. So the target of the rebuild that gave it
//! up is written down first, and no later one of that epoch may have a lower target. Under a newer epoch whoever serves
//! it has everything that counted.
//!
//! The file is durable before the target carries its mark, and goes when the rebuild is complete. It says nothing of a
//! target that is whole: one that was left behind is overwritten by the next rebuild.
//!
//! # Format, version 1
//!
//! 36 bytes, little-endian.
//!
//! | offset | size | field | meaning |
//! |---:|---:|---|---|
//! | 0 | 8 | `magic` | the bytes `TOWLOWE` and a zero |
//! | 8 | 2 | `version` | 1 |
//! | 10 | 2 | `shard` | the shard |
//! | 12 | 4 | `reserved` | 0 |
//! | 16 | 8 | `epoch` | the epoch under which it was given up |
//! | 24 | 8 | `lsn` | the LSN to be reached |
//! | 32 | 4 | `crc` | CRC-32 (IEEE) of everything before it |
//!
//! It is valid exactly if its length, magic, CRC, version and shard are right and reserved bytes are 0. One that is not
//! valid is an error and never taken for none.

use std::path::Path;

use crate::atomic_file;
use crate::error::Result;
use crate::rebuild::interrupted;
use crate::types::{Epoch, Lsn, ShardId};

const MAGIC: [u8; 8] = *b"TOWLOWE\0";
const VERSION: u16 = 1;
const LEN: usize = 36;

/// Up to where a rebuild must come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owed {
    pub(crate) shard: ShardId,
    pub(crate) epoch: Epoch,
    pub(crate) lsn: Lsn,
}

impl Owed {
    /// Reads the file of a shard at `path`; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`](crate::Error::Corrupt), [`Error::Io`](crate::Error::Io).
    pub(crate) fn load(path: &Path, shard: ShardId) -> Result<Option<Owed>> {
        interrupted::load(path, |bytes| decode(bytes, shard))
    }

    /// Writes the file at `path`, durably.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        atomic_file::replace(path, &self.encode())
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(LEN);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.shard.0.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.epoch.0.to_le_bytes());
        bytes.extend_from_slice(&self.lsn.0.to_le_bytes());
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }
}

fn decode(bytes: &[u8], shard: ShardId) -> Result<Owed, String> {
    let Ok(bytes) = <&[u8; LEN]>::try_from(bytes) else {
        return Err(format!("{} bytes long, not {LEN}", bytes.len()));
    };
    let (content, crc) = bytes.split_at(LEN - 4);
    if content[..8] != MAGIC {
        return Err("it does not begin as one of these files does".to_owned());
    }
    let number =
        |at: usize, len: usize| content[at..at + len].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte));
    let computed = crc32fast::hash(content);
    if crc != computed.to_le_bytes() {
        return Err(format!("its checksum does not fit: its bytes give {computed:08x}"));
    }
    if number(8, 2) != u64::from(VERSION) || number(12, 4) != 0 || number(10, 2) != u64::from(shard.0) {
        return Err(format!(
            "version {} of shard {} with reserved bytes {:08x}, where version {VERSION} of shard {shard} is due",
            number(8, 2),
            number(10, 2),
            number(12, 4)
        ));
    }
    Ok(Owed { shard, epoch: Epoch(number(16, 8)), lsn: Lsn(number(24, 8)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rebuild::interrupted::forget;

    const SHARD: ShardId = ShardId(3);
    const SAMPLE: Owed = Owed { shard: SHARD, epoch: Epoch(5), lsn: Lsn(0x0102_0304_0506) };

    /// These bytes are on disks: they decode for ever.
    #[test]
    fn golden_bytes() {
        let bytes = SAMPLE.encode();
        let hex = bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(&hex[..64], "544f574c4f574500010003000000000005000000000000000605040302010000");
        assert_eq!(decode(&bytes, SHARD), Ok(SAMPLE));
        assert!(decode(&bytes, ShardId(4)).unwrap_err().contains("of shard 3"), "another shard's");
    }

    #[test]
    fn it_is_written_read_and_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("owed-0003");
        assert_eq!(Owed::load(&path, SHARD).unwrap(), None);
        SAMPLE.save(&path).unwrap();
        assert_eq!(Owed::load(&path, SHARD).unwrap(), Some(SAMPLE));
        forget(&path).unwrap();
        assert_eq!(Owed::load(&path, SHARD).unwrap(), None);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let bytes = SAMPLE.encode();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged, SHARD).is_err(), "bit {bit}");
        }
        assert!((0..bytes.len()).all(|len| decode(&bytes[..len], SHARD).is_err()));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("owed-0003");
        std::fs::write(&path, &bytes[1..]).unwrap();
        let error = Owed::load(&path, SHARD).unwrap_err();
        assert!(error.is_corruption() && error.to_string().contains("owed-0003"), "{error}");
    }
}
