//! Small files of a data directory that come and go: a magic, a version, some fields, and a CRC-32 (IEEE) of all that.
//! Little-endian. Each has its module, which says what the fields are.

use std::io;
use std::path::Path;

use crate::error::{Error, Result};
use crate::wal::segment::sync_directory;

/// Bytes around the fields.
const AROUND: usize = 8 + 2 + 4;

/// The content of a file with these fields.
pub(crate) fn seal(magic: [u8; 8], version: u16, fields: &[&[u8]]) -> Vec<u8> {
    let mut bytes = [&magic[..], &version.to_le_bytes()].concat();
    fields.iter().for_each(|field| bytes.extend_from_slice(field));
    let crc = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

/// The version of a file that has this magic, and its fields, which take `LEN` bytes. What else it can be is an error
/// and never taken for none.
pub(crate) fn unseal<const LEN: usize>(magic: [u8; 8], bytes: &[u8]) -> Result<(u16, Fields<'_>), String> {
    if bytes.len() != LEN + AROUND {
        return Err(format!("{} bytes long, not {}", bytes.len(), LEN + AROUND));
    }
    let (content, crc) = bytes.split_at(bytes.len() - 4);
    let mut fields = Fields(content);
    if fields.take() != magic {
        return Err("it does not begin as one of these files does".to_owned());
    }
    let computed = crc32fast::hash(content);
    let crc = Fields(crc).u32();
    if crc != computed {
        return Err(format!("its checksum is {crc:08x}, but its bytes give {computed:08x}"));
    }
    Ok((fields.u16(), fields))
}

/// Fields in their order. Behind the last of them there are zeros.
pub(crate) struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().map_or(([0; N], &[][..]), |(field, rest)| (*field, rest));
        self.0 = rest;
        field
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    pub(crate) fn u128(&mut self) -> u128 {
        u128::from_le_bytes(self.take())
    }
}

/// Reads the file at `path` and has `decode` make something of it; `None` if there is none.
///
/// # Errors
///
/// [`Error::Corrupt`] with the words of `decode`; [`Error::Io`].
pub(crate) fn load<T>(path: &Path, decode: impl FnOnce(&[u8]) -> Result<T, String>) -> Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => decode(&bytes).map(Some).map_err(|reason| Error::corrupt(path, 0, None, reason)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// Removes the file at `path`, durably; there need not be one.
///
/// # Errors
///
/// [`Error::Io`].
pub(crate) fn forget(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", path)(error)),
        _ => {}
    }
    // Also where it is gone already: whoever removed it may not have come to this, or failed here.
    let directory = path.parent().unwrap_or(Path::new("."));
    sync_directory(directory).map_err(Error::io("sync", directory))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// That each file that differs from `bytes` by a bit, or is shorter, is refused and named.
    pub(crate) fn assert_damage_is_found<T>(bytes: &[u8], decode: impl Fn(&[u8]) -> Result<T, String>) {
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged).is_err(), "bit {bit}");
        }
        assert!((0..bytes.len()).all(|len| decode(&bytes[..len]).is_err()));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("the-file");
        std::fs::write(&path, &bytes[1..]).unwrap();
        let error = load(&path, &decode).map(drop).unwrap_err();
        assert!(error.is_corruption() && error.to_string().contains("the-file"), "{error}");
    }

    #[test]
    fn fields_come_back_in_their_order() {
        let fields: [&[u8]; 4] = [&1u16.to_le_bytes(), &2u32.to_le_bytes(), &3u64.to_le_bytes(), &4u128.to_le_bytes()];
        let bytes = seal(*b"TOWLxxx\0", 7, &fields);
        let decode = |bytes: &[u8]| {
            let (version, mut fields) = unseal::<30>(*b"TOWLxxx\0", bytes)?;
            Ok((version, fields.u16(), fields.u32(), fields.u64(), fields.u128(), fields.u64()))
        };
        assert_eq!(decode(&bytes), Ok((7, 1, 2, 3, 4, 0)));
        assert_damage_is_found(&bytes, decode);
        assert!(unseal::<30>(*b"TOWLyyy\0", &bytes).is_err_and(|reason| reason.contains("does not begin")));
    }

    #[test]
    fn what_is_gone_already_is_forgotten_only_once_that_is_durable() {
        let directory = tempfile::tempdir().unwrap();
        forget(&directory.path().join("rebuild-0003")).unwrap();
        // This cannot be synced.
        let path = directory.path().join("gone").join("rebuild-0003");
        assert_eq!(matches!(forget(&path), Err(Error::Io { action: "sync", .. })), cfg!(unix));
    }
}
