//! How far each shard has been applied and synced, and the checkpoint that remembers it.
//!
//! Now and then, and when it stops, a node writes a [`Checkpoint`], so that after a restart recovery knows which part
//! of the log was on stable storage, and the applier where to go on. [`ReplicationState`] holds the same marks while
//! they move, for programs that run logs and appliers of their own: whoever applies a shard moves its applied mark,
//! whoever syncs it its synced mark, and everyone else reads or waits.
//!
//! # Format of a checkpoint, version 1
//!
//! One file, replaced as a whole. All numbers are little-endian.
//!
//! | offset | size | field | meaning |
//! |---:|---:|---|---|
//! | 0 | 8 | `magic` | the bytes `TOWLCKPT` |
//! | 8 | 2 | `version` | 1 |
//! | 10 | 2 | `reserved` | 0 |
//! | 12 | 4 | `entry_count` | entries, *n* |
//! | 16 | 18 *n* | entries | for each shard: `shard` (2 bytes), `applied` (8 bytes), `synced` (8 bytes) |
//! | 16 + 18 *n* | 4 | `crc` | CRC-32 (IEEE) of everything before it |
//!
//! A checkpoint is valid exactly if
//!
//! 1. it begins with `magic` and has at least 20 bytes;
//! 2. its last four bytes are the CRC of those before, in this and every later version, so that damage is told apart
//!    from a newer version;
//! 3. `version` is 1;
//! 4. `reserved` is 0 and its length is exactly 20 + 18 *n*;
//! 5. the entries stand in ascending order of their shards, each shard once.
//!
//! Every flipped bit and every cut is therefore found, and the same state has the same bytes. Nothing is assumed
//! about `applied` and `synced` of an entry: a record may be applied before it is synced and the other way round.
//!
//! # Restoring
//!
//! A node restores the shards that it has been configured with:
//!
//! - shard in both: starts at what the checkpoint says;
//! - configured shard that the checkpoint lacks: starts at 0, as on a new node. A checkpoint of a [`ReplicationState`]
//!   has all its shards, so this is a shard that was added since;
//! - shard that the checkpoint has and the configuration lacks: [`Error::Mismatch`]. Its progress would be lost
//!   with the next checkpoint.
//!
//! A checkpoint that is damaged or of another version is an error, never a state of zeros. It is for the caller to say
//! what a missing file means: [`Checkpoint::load`] returns `None`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use crate::atomic_file;
use crate::error::{Error, Result};
use crate::types::{Lsn, ShardId};
use crate::watermark::Watermark;

const MAGIC: [u8; 8] = *b"TOWLCKPT";
/// Version of the checkpoint format.
pub const CHECKPOINT_VERSION: u16 = 1;
/// Name of the checkpoint in a data directory.
pub const CHECKPOINT_FILE_NAME: &str = "replication.ckpt";

const HEADER_LEN: usize = 16;
const ENTRY_LEN: usize = 18;
const CRC_LEN: usize = 4;

/// The marks of every shard of a node: what has been applied and what has been synced.
///
/// The set of shards is fixed when it is made. Marks are moved and read from any thread, without a lock.
///
/// ```
/// use towline::{Lsn, ReplicationState, ShardId};
///
/// # fn main() -> towline::Result<()> {
/// let shards = [ShardId(0), ShardId(1)];
/// let state = ReplicationState::new(&shards);
/// assert_eq!(state.advance(ShardId(1), Lsn(42)), Some(true));
/// assert_eq!(state.advance(ShardId(1), Lsn(41)), Some(false)); // never back
/// assert_eq!(state.advance(ShardId(7), Lsn(1)), None); // there is no such shard
///
/// let restored = ReplicationState::from_checkpoint_bytes(&state.to_checkpoint_bytes(), &shards)?;
/// assert_eq!(restored.applied(ShardId(1)), Some(Lsn(42)));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ReplicationState {
    /// In ascending order, each shard once.
    shards: Box<[ShardMarks]>,
}

/// The marks of one shard. On a follower both are at most its received mark, on a leader at most its written mark;
/// neither bounds the other.
#[derive(Debug)]
struct ShardMarks {
    shard: ShardId,
    /// Every record up to here has been given to the target. Moved by [`ReplicationState::advance`], read with
    /// `Acquire`: whoever sees it sees what the target did.
    applied: Watermark,
    /// Every record up to here is on stable storage. Moved by [`ReplicationState::advance_synced`] only after the sync
    /// has returned.
    synced: Watermark,
}

impl ReplicationState {
    /// The state of these shards, with every mark at [`Lsn::ZERO`]. A shard that is named twice counts once.
    #[must_use]
    pub fn new(shards: &[ShardId]) -> Self {
        Self::from_entries(shards, |_| CheckpointEntry::default())
    }

    /// The state of a node that has shard 0 only.
    #[must_use]
    pub fn single() -> Self {
        Self::new(&[ShardId(0)])
    }

    /// The shards, in ascending order.
    pub fn shards(&self) -> impl Iterator<Item = ShardId> + '_ {
        self.shards.iter().map(|marks| marks.shard)
    }

    /// Up to where the shard has been applied. `None` if there is no such shard.
    #[must_use]
    pub fn applied(&self, shard: ShardId) -> Option<Lsn> {
        self.mark(shard).map(Watermark::load)
    }

    /// Up to where the shard is known to be on stable storage. `None` if there is no such shard.
    #[must_use]
    pub fn synced(&self, shard: ShardId) -> Option<Lsn> {
        self.synced_mark(shard).map(Watermark::load)
    }

    /// The applied mark of the shard, to wait for. `None` if there is no such shard.
    #[must_use]
    pub fn mark(&self, shard: ShardId) -> Option<&Watermark> {
        self.find(shard).map(|marks| &marks.applied)
    }

    /// The synced mark of the shard, to wait for. `None` if there is no such shard.
    #[must_use]
    pub fn synced_mark(&self, shard: ShardId) -> Option<&Watermark> {
        self.find(shard).map(|marks| &marks.synced)
    }

    /// Moves the applied mark of the shard to `lsn` unless it is already there or beyond. Returns whether it moved;
    /// `None` if there is no such shard. From any thread, also concurrently.
    #[must_use = "nothing has moved if there is no such shard"]
    pub fn advance(&self, shard: ShardId, lsn: Lsn) -> Option<bool> {
        self.mark(shard).map(|mark| mark.advance(lsn))
    }

    /// Moves the synced mark of the shard, as [`advance`](ReplicationState::advance) does the applied one. To be called
    /// after the sync has succeeded: recovery takes damage below a synced mark for corruption, not for a torn tail.
    #[must_use = "nothing has moved if there is no such shard"]
    pub fn advance_synced(&self, shard: ShardId, lsn: Lsn) -> Option<bool> {
        self.synced_mark(shard).map(|mark| mark.advance(lsn))
    }

    /// Up to where each shard has been applied. Each number was true at some moment during the call, not all of them
    /// at the same one.
    #[must_use]
    pub fn snapshot(&self) -> BTreeMap<ShardId, Lsn> {
        self.shards.iter().map(|marks| (marks.shard, marks.applied.load())).collect()
    }

    /// Where all marks stand, as a checkpoint. Not one moment, as with [`snapshot`](ReplicationState::snapshot).
    #[must_use]
    pub fn checkpoint(&self) -> Checkpoint {
        let entry = |marks: &ShardMarks| CheckpointEntry { applied: marks.applied.load(), synced: marks.synced.load() };
        Checkpoint { entries: self.shards.iter().map(|marks| (marks.shard, entry(marks))).collect() }
    }

    /// The state of `shards` that a checkpoint describes, under the [rules of restoring](self#restoring).
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if the checkpoint has a shard that is not among `shards`.
    pub fn from_checkpoint(checkpoint: &Checkpoint, shards: &[ShardId]) -> Result<Self> {
        if let Some(unknown) = checkpoint.entries.keys().find(|shard| !shards.contains(shard)) {
            return Err(Error::Mismatch {
                path: CHECKPOINT_FILE_NAME.into(),
                reason: format!(
                    "it has progress of shard {unknown}, which this node is not configured with; \
                     configure the shards that the data was written with"
                )
                .into(),
            });
        }
        Ok(Self::from_entries(shards, |shard| checkpoint.entries.get(&shard).copied().unwrap_or_default()))
    }

    /// [`checkpoint`](ReplicationState::checkpoint), encoded.
    #[must_use]
    pub fn to_checkpoint_bytes(&self) -> Vec<u8> {
        self.checkpoint().encode()
    }

    /// Decodes a checkpoint and restores `shards` from it, under the [rules of restoring](self#restoring).
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] if the bytes are damaged, [`Error::Mismatch`] if their version is unknown or they have a
    /// shard that is not among `shards`. As bytes have no path, the errors name [`CHECKPOINT_FILE_NAME`].
    pub fn from_checkpoint_bytes(bytes: &[u8], shards: &[ShardId]) -> Result<Self> {
        let checkpoint = Checkpoint::decode(bytes).map_err(|error| error.of_file(Path::new(CHECKPOINT_FILE_NAME)))?;
        Self::from_checkpoint(&checkpoint, shards)
    }

    fn from_entries(shards: &[ShardId], entry: impl Fn(ShardId) -> CheckpointEntry) -> Self {
        let mut shards = shards.to_vec();
        shards.sort_unstable();
        shards.dedup();
        let marks = |shard| {
            let CheckpointEntry { applied, synced } = entry(shard);
            ShardMarks { shard, applied: Watermark::new(applied), synced: Watermark::new(synced) }
        };
        ReplicationState { shards: shards.into_iter().map(marks).collect() }
    }

    fn find(&self, shard: ShardId) -> Option<&ShardMarks> {
        // Nearly always the shards are 0 to n, and each stands at its own number.
        if let Some(marks) = self.shards.get(usize::from(shard.0))
            && marks.shard == shard
        {
            return Some(marks);
        }
        let at = self.shards.binary_search_by_key(&shard, |marks| marks.shard).ok()?;
        self.shards.get(at)
    }
}

/// What a checkpoint remembers. The format stands at the [module](self).
///
/// ```
/// use towline::{Checkpoint, CheckpointEntry, Lsn, ShardId};
///
/// let mut checkpoint = Checkpoint::default();
/// checkpoint.entries.insert(ShardId(3), CheckpointEntry { applied: Lsn(9), synced: Lsn(8) });
/// assert_eq!(Checkpoint::decode(&checkpoint.encode()), Ok(checkpoint));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// For each shard, where its marks stood.
    pub entries: BTreeMap<ShardId, CheckpointEntry>,
}

/// Where the marks of one shard stood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointEntry {
    /// Every record up to here had been given to the target.
    pub applied: Lsn,
    /// Every record up to here was on stable storage. What lies beyond may be, too.
    pub synced: Lsn,
}

impl Checkpoint {
    /// The bytes of the checkpoint.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.entries.len() * ENTRY_LEN + CRC_LEN);
        // A shard is 16 bits wide, so there are at most 65536 entries.
        let count = self.entries.keys().fold(0u32, |count, _| count.saturating_add(1));
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&CHECKPOINT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&count.to_le_bytes());
        for (shard, entry) in &self.entries {
            bytes.extend_from_slice(&shard.0.to_le_bytes());
            bytes.extend_from_slice(&entry.applied.0.to_le_bytes());
            bytes.extend_from_slice(&entry.synced.0.to_le_bytes());
        }
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Decodes and checks the bytes of a checkpoint.
    ///
    /// # Errors
    ///
    /// The first of the [rules](self) that the bytes break.
    pub fn decode(bytes: &[u8]) -> Result<Checkpoint, CheckpointError> {
        let body = verify_envelope(bytes)?;
        let (header, entries) = body.split_at(HEADER_LEN);
        if header[10..12] != [0; 2] {
            return Err(damaged(10, "reserved bytes are in use"));
        }
        let count = u32::from_le_bytes(array_at(header, 12));
        let fits = u64::from(count).checked_mul(ENTRY_LEN as u64);
        if fits != Some(entries.len() as u64) {
            return Err(damaged(12, format!("it claims {count} entries, but has {} bytes of them", entries.len())));
        }
        let mut decoded = BTreeMap::new();
        for (index, entry) in entries.chunks_exact(ENTRY_LEN).enumerate() {
            let shard = ShardId(u16::from_le_bytes(array_at(entry, 0)));
            let offset = HEADER_LEN + index * ENTRY_LEN;
            match decoded.last_key_value() {
                Some((&last, _)) if last == shard => {
                    return Err(damaged(offset, format!("shard {shard} stands in it twice")));
                }
                Some((&last, _)) if last > shard => {
                    return Err(damaged(offset, format!("shard {shard} stands behind shard {last}")));
                }
                _ => {}
            }
            let applied = Lsn(u64::from_le_bytes(array_at(entry, 2)));
            let synced = Lsn(u64::from_le_bytes(array_at(entry, 10)));
            decoded.insert(shard, CheckpointEntry { applied, synced });
        }
        Ok(Checkpoint { entries: decoded })
    }

    /// Writes the checkpoint to a file and makes it durable. A crash leaves either the old or the new one, whole.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        atomic_file::replace(path, &self.encode())
    }

    /// Reads a checkpoint from a file; `None` if there is no such file.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] with path and offset if it is damaged, [`Error::Mismatch`] if its version is unknown, and
    /// [`Error::Io`].
    pub fn load(path: &Path) -> Result<Option<Checkpoint>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        Checkpoint::decode(&bytes).map(Some).map_err(|error| error.of_file(path))
    }
}

/// Rules 1 to 3, which every version shares. Returns everything but the CRC: at least a header.
fn verify_envelope(bytes: &[u8]) -> Result<&[u8], CheckpointError> {
    if bytes.len() < HEADER_LEN + CRC_LEN {
        return Err(damaged(bytes.len(), "it ends within its header"));
    }
    if bytes[..MAGIC.len()] != MAGIC {
        return Err(damaged(0, "it does not begin like a checkpoint"));
    }
    let (body, crc) = bytes.split_at(bytes.len() - CRC_LEN);
    let stored = u32::from_le_bytes(array_at(crc, 0));
    let computed = crc32fast::hash(body);
    if stored != computed {
        return Err(damaged(body.len(), format!("its checksum is {stored:08x}, but its bytes give {computed:08x}")));
    }
    match u16::from_le_bytes(array_at(body, 8)) {
        CHECKPOINT_VERSION => Ok(body),
        found => Err(CheckpointError::UnknownVersion { found }),
    }
}

/// `N` bytes at `at`, which the caller has checked to be there.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes[at + index])
}

fn damaged(offset: usize, reason: impl Into<Cow<'static, str>>) -> CheckpointError {
    CheckpointError::Damaged { offset: offset as u64, reason: reason.into() }
}

/// Why bytes are not a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CheckpointError {
    /// They are damaged.
    Damaged {
        /// Where in the bytes the damage shows.
        offset: u64,
        /// What was found.
        reason: Cow<'static, str>,
    },
    /// They are intact, but of a version that this crate does not know.
    UnknownVersion {
        /// The version.
        found: u16,
    },
}

impl CheckpointError {
    /// The same of the content of a file.
    fn of_file(self, path: &Path) -> Error {
        match self {
            CheckpointError::Damaged { offset, reason } => Error::corrupt(path, offset, None, reason),
            version @ CheckpointError::UnknownVersion { .. } => {
                Error::Mismatch { path: path.to_owned(), reason: version.to_string().into() }
            }
        }
    }
}

impl fmt::Display for CheckpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CheckpointError::Damaged { offset, reason } => {
                write!(f, "the checkpoint is damaged at offset {offset}: {reason}")
            }
            CheckpointError::UnknownVersion { found } => write!(
                f,
                "checkpoint version {found} is not {CHECKPOINT_VERSION}; use the version of towline that wrote it"
            ),
        }
    }
}

impl std::error::Error for CheckpointError {}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Never to change: whatever comes later must still read this.
    const GOLDEN: &[u8] = b"TOWLCKPT\x01\x00\x00\x00\x02\x00\x00\x00\
        \x00\x00\x07\x00\x00\x00\x00\x00\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00\
        \x03\x02\xff\xff\xff\xff\xff\xff\xff\xff\x08\x07\x06\x05\x04\x03\x02\x01\
        \xdc\x35\x69\x3d";

    fn golden() -> Checkpoint {
        Checkpoint {
            entries: BTreeMap::from([
                (ShardId(0), CheckpointEntry { applied: Lsn(7), synced: Lsn(9) }),
                (ShardId(0x203), CheckpointEntry { applied: Lsn::MAX, synced: Lsn(0x0102_0304_0506_0708) }),
            ]),
        }
    }

    /// Replaces the CRC by one that fits, to get past it.
    fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let body = bytes.len() - CRC_LEN;
        let crc = crc32fast::hash(&bytes[..body]);
        bytes[body..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn reason(bytes: &[u8]) -> String {
        Checkpoint::decode(bytes).map_or_else(|error| error.to_string(), |_| "valid".to_owned())
    }

    #[test]
    fn the_golden_checkpoint_decodes_for_ever() {
        assert_eq!(Checkpoint::decode(GOLDEN), Ok(golden()));
        assert_eq!(golden().encode(), GOLDEN);
    }

    #[test]
    fn an_empty_checkpoint_is_one() {
        let empty = Checkpoint::default().encode();
        assert_eq!(empty.len(), HEADER_LEN + CRC_LEN);
        assert_eq!(Checkpoint::decode(&empty), Ok(Checkpoint::default()));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        for bit in 0..GOLDEN.len() * 8 {
            let mut damaged = GOLDEN.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(
                matches!(Checkpoint::decode(&damaged), Err(CheckpointError::Damaged { .. })),
                "bit {bit} went unnoticed"
            );
        }
    }

    #[test]
    fn what_is_wrong_is_named_even_under_a_fitting_checksum() {
        let change = |at: usize, byte: u8| {
            let mut bytes = GOLDEN.to_vec();
            bytes[at] = byte;
            resealed(bytes)
        };
        let version = change(8, 2);
        assert_eq!(Checkpoint::decode(&version), Err(CheckpointError::UnknownVersion { found: 2 }));
        assert!(reason(&version).contains("version 2"));
        assert!(reason(&change(11, 1)).contains("offset 10: reserved"));
        assert!(reason(&change(12, 3)).contains("offset 12: it claims 3 entries"));
        assert!(reason(&change(15, 0xff)).contains("offset 12"));
        let mut twice = GOLDEN.to_vec();
        twice[34..36].copy_from_slice(&[0, 0]);
        assert!(reason(&resealed(twice)).contains("offset 34: shard 0 stands in it twice"));
        let mut unordered = GOLDEN.to_vec();
        unordered[16..18].copy_from_slice(&[4, 2]);
        assert!(reason(&resealed(unordered)).contains("offset 34: shard 515 stands behind shard 516"));
        assert!(reason(&[0; 64]).contains("does not begin"));
        assert!(reason(b"").contains("offset 0: it ends"));
        let mut longer = GOLDEN.to_vec();
        longer.push(0);
        assert!(reason(&resealed(longer)).contains("offset 12"));
    }

    #[test]
    fn a_file_keeps_a_checkpoint_and_names_itself_when_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(CHECKPOINT_FILE_NAME);
        assert!(Checkpoint::load(&path).unwrap().is_none());
        Checkpoint::default().save(&path).unwrap();
        golden().save(&path).unwrap();
        assert_eq!(Checkpoint::load(&path).unwrap(), Some(golden()));

        fs::write(&path, &GOLDEN[..40]).unwrap();
        let error = Checkpoint::load(&path).unwrap_err();
        assert!(matches!(&error, Error::Corrupt { path: named, offset: 36, .. } if *named == path), "{error}");
        fs::write(&path, b"").unwrap();
        assert!(Checkpoint::load(&path).unwrap_err().is_corruption());

        let mut newer = GOLDEN.to_vec();
        newer[8] = 9;
        fs::write(&path, resealed(newer)).unwrap();
        assert!(matches!(Checkpoint::load(&path), Err(Error::Mismatch { path: named, .. }) if named == path));
        assert!(matches!(Checkpoint::load(directory.path()), Err(Error::Io { action: "read", .. })));
    }

    #[test]
    fn a_single_node_has_shard_0_only() {
        let state = ReplicationState::single();
        assert_eq!(state.applied(ShardId(0)), Some(Lsn::ZERO));
        assert_eq!(state.applied(ShardId(1)), None);
        assert_eq!(state.synced(ShardId(1)), None);
        assert!(state.mark(ShardId(1)).is_none() && state.synced_mark(ShardId(1)).is_none());
        assert_eq!(state.advance_synced(ShardId(1), Lsn(1)), None);
    }

    #[test]
    fn shards_need_not_be_dense_nor_sorted_nor_distinct() {
        let state = ReplicationState::new(&[ShardId(9), ShardId(1), ShardId(9), ShardId(0)]);
        assert!(state.shards().eq([ShardId(0), ShardId(1), ShardId(9)]));
        assert_eq!(state.advance(ShardId(9), Lsn(4)), Some(true));
        assert_eq!(state.advance(ShardId(2), Lsn(4)), None);
        let expected = BTreeMap::from([(ShardId(0), Lsn(0)), (ShardId(1), Lsn(0)), (ShardId(9), Lsn(4))]);
        assert_eq!(state.snapshot(), expected);
    }

    #[test]
    fn restoring_follows_its_rules() {
        let more = [ShardId(0), ShardId(1), ShardId(0x203)];
        let state = ReplicationState::from_checkpoint_bytes(GOLDEN, &more).unwrap();
        assert_eq!((state.applied(ShardId(0)), state.synced(ShardId(0))), (Some(Lsn(7)), Some(Lsn(9))));
        assert_eq!((state.applied(ShardId(1)), state.synced(ShardId(1))), (Some(Lsn::ZERO), Some(Lsn::ZERO)));
        let error = ReplicationState::from_checkpoint_bytes(GOLDEN, &more[..2]).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }) && error.to_string().contains("shard 515"));
        let error = ReplicationState::from_checkpoint_bytes(&GOLDEN[1..], &more).unwrap_err();
        assert!(error.is_corruption());
    }

    #[test]
    fn concurrent_advances_never_go_back() {
        const STEPS: u64 = 5_000;
        let state = ReplicationState::new(&[ShardId(0), ShardId(1)]);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let state = &state;
                scope.spawn(move || {
                    let mut last = BTreeMap::new();
                    for step in 0..STEPS {
                        let lsn = Lsn(step * 4 + thread + 1);
                        let shard = ShardId(u16::from(step % 2 == 1));
                        state.advance(shard, lsn).unwrap();
                        assert!(state.applied(shard).unwrap() >= lsn);
                        let now = state.snapshot();
                        assert!(last.iter().all(|(shard, lsn)| now[shard] >= *lsn), "{last:?} then {now:?}");
                        last = now;
                    }
                });
            }
        });
        let expected = BTreeMap::from([(ShardId(0), Lsn(STEPS * 4 - 4)), (ShardId(1), Lsn(STEPS * 4))]);
        assert_eq!(state.snapshot(), expected);
    }

    fn checkpoints() -> impl Strategy<Value = Checkpoint> {
        let entry = (any::<u64>(), any::<u64>())
            .prop_map(|(applied, synced)| CheckpointEntry { applied: Lsn(applied), synced: Lsn(synced) });
        prop::collection::btree_map(any::<u16>().prop_map(ShardId), entry, 0..20)
            .prop_map(|entries| Checkpoint { entries })
    }

    proptest! {
        #[test]
        fn checkpoints_survive_their_bytes(checkpoint in checkpoints()) {
            let bytes = checkpoint.encode();
            prop_assert_eq!(Checkpoint::decode(&bytes), Ok(checkpoint.clone()));
            let shards: Vec<ShardId> = checkpoint.entries.keys().copied().collect();
            let state = ReplicationState::from_checkpoint_bytes(&bytes, &shards).unwrap();
            prop_assert_eq!(state.to_checkpoint_bytes(), bytes);
        }

        #[test]
        fn any_flipped_bit_and_any_cut_is_found(checkpoint in checkpoints(), at in any::<prop::sample::Index>()) {
            let bytes = checkpoint.encode();
            let mut flipped = bytes.clone();
            let bit = at.index(bytes.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Checkpoint::decode(&flipped).is_err());
            prop_assert!(Checkpoint::decode(&bytes[..at.index(bytes.len())]).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(body in prop::collection::vec(any::<u8>(), 0..200), header in any::<bool>()) {
            let _ = Checkpoint::decode(&body);
            // Past magic, version and checksum as well.
            let mut bytes = if header { GOLDEN[..10].to_vec() } else { MAGIC.to_vec() };
            bytes.extend(body);
            bytes.extend([0; CRC_LEN]);
            let _ = Checkpoint::decode(&resealed(bytes));
        }
    }
}
