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

use std::io;
use std::path::Path;

use crate::atomic_file;
use crate::error::{Error, Result};
use crate::target::KeptBase;
use crate::types::{Epoch, Lsn, ShardId};
use crate::wal::segment::sync_directory;

const MAGIC: [u8; 8] = *b"TOWLREB\0";
const VERSION: u16 = 2;
/// The oldest version that is read.
const OLDEST_VERSION: u16 = 1;
const LEN: usize = 48;

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
    /// [`Error::Corrupt`], [`Error::Io`].
    pub(crate) fn load(path: &Path) -> Result<Option<Interrupted>> {
        load(path, decode)
    }

    /// Writes the file at `path`, durably. Everything that it speaks of is durable before.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        atomic_file::replace(path, &self.encode())
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(LEN);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.shard.0.to_le_bytes());
        bytes.extend_from_slice(&self.block_len.to_le_bytes());
        bytes.extend_from_slice(&self.epoch.0.to_le_bytes());
        bytes.extend_from_slice(&self.kept.blocks.to_le_bytes());
        bytes.extend_from_slice(&self.kept.applied.0.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }
}

/// Reads the file at `path` and has `decode` make something of it; `None` if there is none.
pub(super) fn load<T>(path: &Path, decode: impl FnOnce(&[u8]) -> Result<T, String>) -> Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => decode(&bytes).map(Some).map_err(|reason| Error::corrupt(path, 0, None, reason)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// Removes the file at `path`, durably; there need not be one.
pub(crate) fn forget(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", path)(error)),
        _ => {}
    }
    // Also where it is gone already: whoever removed it may not have come to this, or failed here.
    let directory = path.parent().unwrap_or(Path::new("."));
    sync_directory(directory).map_err(Error::io("sync", directory))
}

fn decode(bytes: &[u8]) -> Result<Interrupted, String> {
    let Ok(bytes) = <&[u8; LEN]>::try_from(bytes) else {
        return Err(format!("{} bytes long, not {LEN}", bytes.len()));
    };
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if bytes[..8] != MAGIC {
        return Err("it does not begin as one of these files does".to_owned());
    }
    let (crc, computed) = (u32_at(44), crc32fast::hash(&bytes[..44]));
    if crc != computed {
        return Err(format!("its checksum is {crc:08x}, but its bytes give {computed:08x}"));
    }
    if !(OLDEST_VERSION..=VERSION).contains(&u16_at(8)) || u32_at(40) != 0 {
        return Err(format!("version {} with reserved bytes {:08x}", u16_at(8), u32_at(40)));
    }
    Ok(Interrupted {
        shard: ShardId(u16_at(10)),
        block_len: u32_at(12),
        epoch: Epoch(u64_at(16)),
        kept: KeptBase { blocks: u64_at(24), applied: Lsn(u64_at(32)) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: Interrupted = Interrupted {
        shard: ShardId(3),
        block_len: 104,
        epoch: Epoch(5),
        kept: KeptBase { blocks: 0x0102_0304_0506, applied: Lsn(9) },
    };

    fn with_version(version: u16) -> Vec<u8> {
        let mut bytes = SAMPLE.encode();
        bytes[8..10].copy_from_slice(&version.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..44]);
        bytes[44..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// These bytes are on disks: they decode for ever.
    #[test]
    fn golden_bytes() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        for (version, bytes, golden) in [
            (
                1,
                with_version(1),
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
            let reason = decode(&with_version(version)).unwrap_err();
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
        forget(&path).unwrap();
        assert_eq!(Interrupted::load(&path).unwrap(), None);
    }

    #[test]
    fn what_is_gone_already_is_forgotten_only_once_that_is_durable() {
        let directory = tempfile::tempdir().unwrap();
        // This cannot be synced.
        let path = directory.path().join("gone").join("rebuild-0003");
        assert_eq!(matches!(forget(&path), Err(Error::Io { action: "sync", .. })), cfg!(unix));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let bytes = SAMPLE.encode();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged).is_err(), "bit {bit}");
        }
        assert!((0..bytes.len()).all(|len| decode(&bytes[..len]).is_err()));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rebuild-0003");
        std::fs::write(&path, &bytes[1..]).unwrap();
        let error = Interrupted::load(&path).unwrap_err();
        assert!(error.is_corruption() && error.to_string().contains("rebuild-0003"), "{error}");
    }
}
