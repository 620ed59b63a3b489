//! What a rebuild that was interrupted leaves for the next one: a small file a shard, `rebuild-0003` in the data
//! directory.
//!
//! The target carries the mark that it is being rebuilt; this file says how much of it can be kept. It is written after
//! everything that it speaks of has been made durable, and removed, durably, before a rebuild begins anew and empties
//! the target. It never makes a rebuild possible that would not be otherwise: where it is missing or damaged, another
//! begins.
//!
//! # Format, version 2
//!
//! 48 bytes, little-endian.
//!
//! | offset | size | field | meaning |
//! |---:|---:|---|---|
//! | 0 | 8 | `magic` | the bytes `TOWLREB` and a zero |
//! | 8 | 2 | `version` | 2; 1 is read too |
//! | 10 | 2 | `shard` | the shard |
//! | 12 | 4 | `block_len` | bytes of each block |
//! | 16 | 8 | `epoch` | the leader's term under which every block came |
//! | 24 | 8 | `blocks` | blocks below this number have come |
//! | 32 | 8 | `applied` | up to here the log has been applied to them |
//! | 40 | 4 | `reserved` | 0 |
//! | 44 | 4 | `crc` | CRC-32 (IEEE) of everything before it |
//!
//! It is valid exactly if its length, magic, CRC and version are right and reserved bytes are 0.
//!
//! Version 1 is the same but for its number. Programs that wrote it kept blocks only in slots that the header of the
//! store's file counts. Since version 2 a file reaches past those while a base comes; a program that knows version 1
//! alone would write zeros over such blocks and believe that it has them, so it must find this file invalid and begin
//! anew.

use std::path::Path;

use crate::atomic_file;
use crate::error::Result;
use crate::small_file::{load, seal, unseal};
use crate::target::KeptBase;
use crate::types::{Epoch, Lsn, ShardId};

const MAGIC: [u8; 8] = *b"TOWLREB\0";
const VERSION: u16 = 2;
/// The oldest version that is read.
const OLDEST_VERSION: u16 = 1;
/// Bytes of the fields behind the version.
const LEN: usize = 34;

/// How far an interrupted rebuild had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interrupted {
    pub(crate) shard: ShardId,
    pub(crate) block_len: u32,
    pub(crate) epoch: Epoch,
    pub(crate) kept: KeptBase,
}

impl Interrupted {
    /// Reads the file at `path`; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`](crate::Error::Corrupt), [`Error::Io`](crate::Error::Io).
    pub(crate) fn load(path: &Path) -> Result<Option<Interrupted>> {
        load(path, decode)
    }

    /// Writes the file at `path`, durably. Everything that it speaks of is durable before.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        atomic_file::replace(path, &self.encode())
    }

    fn encode(&self) -> Vec<u8> {
        self.encode_version(VERSION)
    }

    fn encode_version(&self, version: u16) -> Vec<u8> {
        let numbers = [self.epoch.0, self.kept.blocks, self.kept.applied.0].map(u64::to_le_bytes);
        let fields: [&[u8]; 4] =
            [&self.shard.0.to_le_bytes(), &self.block_len.to_le_bytes(), numbers.as_flattened(), &[0; 4]];
        seal(MAGIC, version, &fields)
    }
}

fn decode(bytes: &[u8]) -> Result<Interrupted, String> {
    let (version, mut fields) = unseal::<LEN>(MAGIC, bytes)?;
    let found = Interrupted {
        shard: ShardId(fields.u16()),
        block_len: fields.u32(),
        epoch: Epoch(fields.u64()),
        kept: KeptBase { blocks: fields.u64(), applied: Lsn(fields.u64()) },
    };
    let reserved = fields.u32();
    if !(OLDEST_VERSION..=VERSION).contains(&version) || reserved != 0 {
        return Err(format!("version {version} with reserved bytes {reserved:08x}"));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::small_file::forget;
    use crate::small_file::tests::assert_damage_is_found;

    const SAMPLE: Interrupted = Interrupted {
        shard: ShardId(3),
        block_len: 104,
        epoch: Epoch(5),
        kept: KeptBase { blocks: 0x0102_0304_0506, applied: Lsn(9) },
    };

    /// These bytes are on disks: they decode for ever.
    #[test]
    fn golden_bytes() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        for (version, bytes, golden) in [
            (
                1,
                SAMPLE.encode_version(1),
                "544f574c52454200010003006800000005000000000000000605040302010000090000000000000000000000",
            ),
            (
                2,
                SAMPLE.encode(),
                "544f574c52454200020003006800000005000000000000000605040302010000090000000000000000000000",
            ),
        ] {
            assert_eq!(&hex(&bytes)[..88], golden, "version {version}");
            assert_eq!(decode(&bytes), Ok(SAMPLE), "version {version}");
        }
    }

    #[test]
    fn versions_that_are_not_known_are_refused() {
        for version in [0, 3, u16::MAX] {
            let reason = decode(&SAMPLE.encode_version(version)).unwrap_err();
            assert!(reason.contains(&format!("version {version}")), "{reason}");
        }
    }

    #[test]
    fn it_is_written_read_and_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rebuild-0003");
        assert_eq!(Interrupted::load(&path).unwrap(), None);
        SAMPLE.save(&path).unwrap();
        assert_eq!(Interrupted::load(&path).unwrap(), Some(SAMPLE));
        forget(&path).unwrap();
        assert_eq!(Interrupted::load(&path).unwrap(), None);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        assert_damage_is_found(&SAMPLE.encode(), decode);
    }
}
