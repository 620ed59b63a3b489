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
use crate::small_file::{load, seal, unseal};
use crate::types::{Epoch, Lsn, ShardId};

const MAGIC: [u8; 8] = *b"TOWLOWE\0";
const VERSION: u16 = 1;
/// Bytes of the fields behind the version.
const LEN: usize = 22;

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
        load(path, |bytes| decode(bytes, shard))
    }

    /// Writes the file at `path`, durably.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        atomic_file::replace(path, &self.encode())
    }

    fn encode(&self) -> Vec<u8> {
        let numbers = [self.epoch.0, self.lsn.0].map(u64::to_le_bytes);
        seal(MAGIC, VERSION, &[&self.shard.0.to_le_bytes(), &[0; 4], numbers.as_flattened()])
    }
}

fn decode(bytes: &[u8], shard: ShardId) -> Result<Owed, String> {
    let (version, mut fields) = unseal::<LEN>(MAGIC, bytes)?;
    let (of_shard, reserved) = (ShardId(fields.u16()), fields.u32());
    if (version, of_shard, reserved) != (VERSION, shard, 0) {
        return Err(format!(
            "version {version} of shard {of_shard} with reserved bytes {reserved:08x}, where version {VERSION} of shard \
             {shard} is due"
        ));
    }
    Ok(Owed { shard, epoch: Epoch(fields.u64()), lsn: Lsn(fields.u64()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::small_file::forget;
    use crate::small_file::tests::assert_damage_is_found;

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
        assert_damage_is_found(&SAMPLE.encode(), |bytes| decode(bytes, SHARD));
    }
}
