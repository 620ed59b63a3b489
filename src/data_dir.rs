//! A node's data directory: who may use it, and what it is.
//!
//! | name | what |
//! |---|---|
//! | `LOCK` | empty; locked by the process that uses the directory, for as long as it does |
//! | `MANIFEST` | what the directory is: see below; replaced as a whole |
//! | `replication.ckpt` | applied marks; replaced as a whole |
//! | `followers` | the followers known to the node; replaced as a whole |
//! | `leading` | a node leads here, or has not stopped in order since it did; replaced as a whole |
//! | `rebuild-0003` | on a follower, how far the rebuild of shard 3 has come; replaced as a whole |
//! | `owed-0003` | on a follower, up to where that rebuild must come at least; replaced as a whole |
//! | `shard-0003/` | the log of shard 3 |
//! | `store/` | the state of the node's own target, if it keeps it here; nothing in it is looked at |
//!
//! `MANIFEST` is made last: a directory without one, in which nothing has been written yet, is as good as empty. A
//! directory that has a log but no `MANIFEST` is damaged, and is never taken for a new one.
//!
//! # Format of `MANIFEST`, version 3
//!
//! 64 bytes, little-endian.
//!
//! | offset | size | field | meaning |
//! |---:|---:|---|---|
//! | 0 | 8 | `magic` | the bytes `TOWLMAN` and a zero |
//! | 8 | 2 | `version` | 3 |
//! | 10 | 2 | `region` | where the node's own logs originate |
//! | 12 | 2 | `shard_count` | shards, from 1 to [`MAX_SHARDS`] |
//! | 14 | 2 | `flags` | bit 0: *own epoch*, the node itself leads or led under `epoch`; others 0 |
//! | 16 | 8 | `node` | the node's id |
//! | 24 | 8 | `segment_size` | bytes of each segment file |
//! | 32 | 8 | `epoch` | the highest epoch that the node has accepted |
//! | 40 | 16 | `cluster` | the cluster's id; 0 is "not known yet" |
//! | 56 | 4 | `reserved` | 0 |
//! | 60 | 4 | `crc` | CRC-32 (IEEE) of all bytes before it |
//!
//! Version 1 has no flags: whose its epoch is, is not known, and so it counts as another's. Version 2 is the same as
//! version 3, which says that the logs may have segments of version 3, so that programs that do not know those leave
//! them alone: they would take one for a torn tail. It is written before a node opens its logs, and so before there is
//! any such segment.
//!
//! Every version begins with magic and version and ends with the CRC of all bytes before it, so that a newer version
//! can be told from damage.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use crate::atomic_file;
use crate::directory_lock::{LOCK_FILE, lock_directory};
use crate::error::{Error, Result};
use crate::limits::MAX_SHARDS;
use crate::types::{ClusterId, Epoch, NodeId, RegionId, ShardId, shard_directory_name};
use crate::wal::segment::{is_valid_size, sync_directory};

const MANIFEST: &str = "MANIFEST";
const CHECKPOINT: &str = "replication.ckpt";
/// The directory within a data directory where a node's target may keep its state, before and after the data directory
/// is made. Whose it is, and that it fits the log, is the target's to check.
pub const STORE: &str = "store";
const FOLLOWERS: &str = "followers";
const LEADING: &str = "leading";

const MAGIC: [u8; 8] = *b"TOWLMAN\0";
/// Version of the format of `MANIFEST`.
pub const MANIFEST_VERSION: u16 = 3;
const MANIFEST_LEN: usize = 64;
const FLAG_OWN_EPOCH: u16 = 1;

/// What a data directory is. Fixed when it is made, but for `epoch`, which only grows, whose it is, and `cluster`,
/// which becomes known once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The cluster that the node belongs to.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// Where the node's own logs originate.
    pub region: RegionId,
    /// How many shards it has, from 1 to [`MAX_SHARDS`].
    pub shard_count: u16,
    /// Bytes of each segment file.
    pub segment_size: u64,
    /// The highest epoch that the node has accepted.
    pub epoch: Epoch,
    /// Whether that is the node's own: it leads, or has led, under it. Otherwise it came from another leader.
    pub own_epoch: bool,
}

impl Manifest {
    /// The content of the file.
    #[must_use]
    pub fn encode(&self) -> [u8; MANIFEST_LEN] {
        let mut bytes = [0; MANIFEST_LEN];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&MANIFEST_VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.region.0.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.shard_count.to_le_bytes());
        bytes[14..16].copy_from_slice(&(u16::from(self.own_epoch) * FLAG_OWN_EPOCH).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.node.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.segment_size.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[40..56].copy_from_slice(&self.cluster.0.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads and checks the content of the file at `path`, which is only for errors to name.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`] for damage, [`Error::Mismatch`] for a version that is newer than this program.
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Manifest> {
        let corrupt = |offset: u64, reason: String| Err(Error::corrupt(path, offset, None, reason));
        if !bytes.starts_with(&MAGIC) {
            return corrupt(0, "it does not begin like a manifest".to_owned());
        }
        let Some((covered, crc)) = bytes.split_last_chunk::<4>() else {
            return corrupt(0, "it is cut short".to_owned());
        };
        let Some(&[low, high]) = covered.get(8..10).and_then(|version| version.first_chunk::<2>()) else {
            return corrupt(8, "it is cut short".to_owned());
        };
        let (crc, computed) = (u32::from_le_bytes(*crc), crc32fast::hash(covered));
        if crc != computed {
            return corrupt(0, format!("its checksum is {crc:08x}, but its bytes give {computed:08x}"));
        }
        let version = u16::from_le_bytes([low, high]);
        if version > MANIFEST_VERSION {
            let reason = format!(
                "written by a newer towline (manifest version {version}; this one knows {MANIFEST_VERSION}); upgrade this one"
            );
            return Err(Error::Mismatch { path: path.to_owned(), reason: reason.into() });
        }
        let Ok(bytes) = <&[u8; MANIFEST_LEN]>::try_from(bytes) else {
            return corrupt(0, format!("it has {} bytes where {MANIFEST_LEN} are due", bytes.len()));
        };
        Manifest::decode_fields(bytes, version).or_else(|reason| corrupt(8, reason))
    }

    fn decode_fields(bytes: &[u8; MANIFEST_LEN], version: u16) -> Result<Manifest, String> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let known_flags = match version {
            1 => 0,
            2 | MANIFEST_VERSION => FLAG_OWN_EPOCH,
            _ => return Err(format!("there is no manifest version {version}")),
        };
        if u16_at(14) & !known_flags != 0 || u32_at(56) != 0 {
            return Err("reserved bytes are in use".to_owned());
        }
        let manifest = Manifest {
            cluster: ClusterId(u128::from(u64_at(40)) | u128::from(u64_at(48)) << 64),
            node: NodeId(u64_at(16)),
            region: RegionId(u16_at(10)),
            shard_count: u16_at(12),
            segment_size: u64_at(24),
            epoch: Epoch(u64_at(32)),
            own_epoch: u16_at(14) & FLAG_OWN_EPOCH != 0,
        };
        manifest.check().map(|()| manifest)
    }

    /// Whether the numbers are ones that a directory can have.
    fn check(&self) -> Result<(), String> {
        if self.shard_count == 0 || self.shard_count > MAX_SHARDS {
            return Err(format!("{} shards are not between 1 and {MAX_SHARDS}", self.shard_count));
        }
        if !is_valid_size(self.segment_size) {
            return Err(format!("{} bytes is not a size that a segment can have", self.segment_size));
        }
        Ok(())
    }
}

/// A data directory in use. Holds its lock until dropped; share it by reference or in an `Arc`.
///
/// ```
/// use towline::data_dir::{DataDir, Manifest};
/// use towline::{ClusterId, Epoch, NodeId, RegionId, ShardId};
///
/// # let parent = tempfile::tempdir()?;
/// # let path = parent.path().join("data");
/// assert!(DataDir::open(&path)?.is_none());
/// let manifest = Manifest {
///     cluster: ClusterId(7),
///     node: NodeId(1),
///     region: RegionId(0),
///     shard_count: 2,
///     segment_size: 1024 * 1024,
///     epoch: Epoch::ZERO,
///     own_epoch: false,
/// };
/// let directory = DataDir::create(&path, manifest)?;
/// assert!(DataDir::open(&path).is_err(), "one at a time");
/// directory.accept_epoch(Epoch(3))?;
/// drop(directory);
/// let directory = DataDir::open(&path)?.expect("it has a manifest now");
/// assert_eq!(directory.manifest(), Manifest { epoch: Epoch(3), ..manifest });
/// assert!(directory.shard_path(ShardId(1)).is_dir());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    /// As on disk. Locked while it is replaced, so that the two never differ for anyone who looks.
    manifest: Mutex<Manifest>,
    /// Locked by the operating system for as long as it is open.
    _lock: File,
}

impl DataDir {
    /// Opens the directory, or says `None` where there is nothing to open: `path` does not exist, or nothing has been
    /// made in it. Changes nothing then. Otherwise removes temporary files that a crash has left.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] if another process (or another `DataDir` of this one) has it open; [`Error::Corrupt`] if
    /// `MANIFEST` is damaged or missing beside logs, or the directory of a shard is missing; [`Error::Mismatch`] if a
    /// newer version wrote it; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Option<DataDir>> {
        match path.read_dir() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            result => result.map_err(Error::io("read", path))?,
        };
        if !exists(&path.join(LOCK_FILE))? && !exists(&path.join(MANIFEST))? {
            return refuse_orphaned_logs(path).map(|()| None);
        }
        let lock = lock_directory(path)?;
        // Only now: before, another process may have been making it.
        if !exists(&path.join(MANIFEST))? {
            return refuse_orphaned_logs(path).map(|()| None);
        }
        let manifest = DataDir::read_manifest(path)?;
        // Whoever put what is found here in its place may have been killed before that was durable, and what is there
        // already is not written again.
        sync_directory(path).map_err(Error::io("sync", path))?;
        remove_temporary_files(path)?;
        let directory = DataDir { path: path.to_owned(), manifest: Mutex::new(manifest), _lock: lock };
        for shard in (0..manifest.shard_count).map(ShardId) {
            let path = directory.shard_path(shard);
            if !path.is_dir() {
                let reason = format!("shard {shard} has no directory, though the manifest counts it; restore it");
                return Err(Error::corrupt(path, 0, None, reason));
            }
        }
        Ok(Some(directory))
    }

    /// Makes a directory: parents, lock, the directories of shards and, last, `MANIFEST`. All of it is durable on
    /// return. Hidden files, `lost+found` and what an interrupted `create` left do not disturb.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a manifest whose numbers a directory cannot have; [`Error::Mismatch`] if there is a
    /// `MANIFEST` already or the directory holds anything else; [`Error::Corrupt`] if it holds logs without a
    /// `MANIFEST`; [`Error::InUse`]; [`Error::Io`].
    pub fn create(path: &Path, manifest: Manifest) -> Result<DataDir> {
        manifest.check().map_err(Error::invalid)?;
        create_directory(path)?;
        sync_own_name(path)?;
        if !exists(&path.join(LOCK_FILE))? {
            refuse_foreign_content(path)?;
        }
        let lock = lock_directory(path)?;
        refuse_foreign_content(path)?;
        refuse_orphaned_logs(path)?;
        remove_temporary_files(path)?;
        let directory = DataDir { path: path.to_owned(), manifest: Mutex::new(manifest), _lock: lock };
        for shard in (0..manifest.shard_count).map(ShardId) {
            make_directory(&directory.shard_path(shard))?;
        }
        sync_directory(path).map_err(Error::io("sync", path))?;
        atomic_file::replace(&path.join(MANIFEST), &manifest.encode())?;
        Ok(directory)
    }

    /// Has older programs leave the directory alone, whose logs will be written as they do not know them: what they
    /// made is marked with this version. For whoever is about to write; looking changes nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub(crate) fn raise_version(&self) -> Result<()> {
        let file = self.path.join(MANIFEST);
        let manifest = self.manifest.lock();
        let bytes = std::fs::read(&file).map_err(Error::io("read", &file))?;
        if bytes == manifest.encode() { Ok(()) } else { atomic_file::replace(&file, &manifest.encode()) }
    }

    /// Reads `MANIFEST` without taking the lock: for tools that only look, also while a node runs.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it cannot be read (it may not exist), and those of [`Manifest::decode`].
    pub fn read_manifest(path: &Path) -> Result<Manifest> {
        let path = path.join(MANIFEST);
        let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
        Manifest::decode(&bytes, &path)
    }

    /// What `MANIFEST` says.
    #[must_use]
    pub fn manifest(&self) -> Manifest {
        *self.manifest.lock()
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of a shard's log.
    #[must_use]
    pub fn shard_path(&self, shard: ShardId) -> PathBuf {
        self.path.join(shard_directory_name(shard))
    }

    /// The file of the applied marks.
    #[must_use]
    pub fn checkpoint_path(&self) -> PathBuf {
        self.path.join(CHECKPOINT)
    }

    /// Where the list of known followers is kept.
    pub(crate) fn followers_path(&self) -> PathBuf {
        self.path.join(FOLLOWERS)
    }

    /// Where the mark of a node that leads stands.
    pub(crate) fn leading_path(&self) -> PathBuf {
        self.path.join(LEADING)
    }

    /// Where it is kept up to where the rebuild of a shard must come.
    pub(crate) fn owed_path(&self, shard: ShardId) -> PathBuf {
        self.path.join(format!("owed-{shard:04}", shard = shard.0))
    }

    /// Where it is kept how far the rebuild of a shard has come.
    pub(crate) fn rebuild_path(&self, shard: ShardId) -> PathBuf {
        self.path.join(format!("rebuild-{shard:04}", shard = shard.0))
    }

    /// Accepts the epoch of another leader: it is on stable storage on return, and nothing older will be accepted
    /// again. Accepting the present one changes nothing. On an error the present one stays in force.
    ///
    /// # Errors
    ///
    /// [`Error::StaleEpoch`] for one that is older than the present one; [`Error::Io`].
    pub fn accept_epoch(&self, epoch: Epoch) -> Result<()> {
        self.replace_manifest(|manifest| {
            if epoch < manifest.epoch {
                return Err(Error::StaleEpoch { offered: epoch, accepted: manifest.epoch });
            }
            manifest.own_epoch &= epoch == manifest.epoch;
            manifest.epoch = epoch;
            Ok(())
        })
    }

    /// Follows a leader under its epoch: as [`accept_epoch`](Self::accept_epoch), but not under one of this node's own.
    ///
    /// # Errors
    ///
    /// As accepting it; [`Error::Mismatch`] if this node leads, or has led, under that epoch itself: there would be two
    /// logs of one epoch.
    pub(crate) fn follow_under(&self, epoch: Epoch) -> Result<()> {
        let manifest = self.manifest();
        if manifest.own_epoch && epoch == manifest.epoch {
            let reason = format!(
                "this node has itself led under epoch {epoch}, under which the other one leads: lead that one under a \
                 higher epoch, {} at least",
                epoch.next()
            );
            return Err(Error::Mismatch { path: self.path.clone(), reason: reason.into() });
        }
        self.accept_epoch(epoch)
    }

    /// Accepts an epoch that stands in the node's own log, under which it was written by whoever the present one is of.
    pub(crate) fn accept_epoch_of_log(&self, epoch: Epoch) -> Result<()> {
        self.replace_manifest(|manifest| {
            manifest.epoch = manifest.epoch.max(epoch);
            Ok(())
        })
    }

    /// Takes an epoch for this node to lead under, the present one if none is given: it is on stable storage on return,
    /// as the node's own.
    ///
    /// # Errors
    ///
    /// [`Error::StaleEpoch`] for one that is older than the present one; [`Error::Mismatch`] for the present one, given
    /// or not, if that is another leader's: two would lead under it; [`Error::Io`].
    pub fn lead_under(&self, epoch: Option<Epoch>) -> Result<Epoch> {
        self.replace_manifest(|manifest| {
            let (accepted, epoch) = (manifest.epoch, epoch.unwrap_or(manifest.epoch));
            if epoch < accepted {
                return Err(Error::StaleEpoch { offered: epoch, accepted });
            }
            if epoch == accepted && !manifest.own_epoch {
                let reason = format!(
                    "epoch {accepted} is another leader's, which this node has followed or was deposed by; to lead, give \
                     an epoch that nobody has led under, {} at least (--epoch {}), and have the others follow",
                    accepted.next(),
                    accepted.next()
                );
                return Err(Error::Mismatch { path: self.path.clone(), reason: reason.into() });
            }
            (manifest.epoch, manifest.own_epoch) = (epoch, true);
            Ok(())
        })?;
        Ok(self.manifest().epoch)
    }

    /// Joins a cluster: durable on return. A node that has never met its leader does not know its cluster yet; one
    /// that knows it stays in it. Joining the present one changes nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if the node belongs to another cluster; [`Error::Io`].
    pub fn join_cluster(&self, cluster: ClusterId) -> Result<()> {
        self.replace_manifest(|manifest| {
            if manifest.cluster != ClusterId::UNKNOWN && manifest.cluster != cluster {
                let reason = format!("the node belongs to cluster {}, not to {cluster}", manifest.cluster);
                return Err(Error::Mismatch { path: self.path.join(MANIFEST), reason: reason.into() });
            }
            manifest.cluster = cluster;
            Ok(())
        })
    }

    /// Changes the manifest on disk, then in memory.
    fn replace_manifest(&self, change: impl FnOnce(&mut Manifest) -> Result<()>) -> Result<()> {
        let mut manifest = self.manifest.lock();
        let mut changed = *manifest;
        change(&mut changed)?;
        if changed != *manifest {
            atomic_file::replace(&self.path.join(MANIFEST), &changed.encode())?;
            *manifest = changed;
        }
        Ok(())
    }
}

/// Unlike [`Path::exists`], an error is an error and not a "no".
pub(crate) fn exists(path: &Path) -> Result<bool> {
    path.try_exists().map_err(Error::io("look for", path))
}

/// Makes a directory and its missing parents, durably, and before that the name of the one in which they are made: each
/// is durable before the next is made, so of what an earlier run has left that may be the one that is not.
pub(crate) fn create_directory(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        create_directory(parent)?;
        sync_own_name(parent)?;
    }
    make_directory(path)
}

/// Makes a directory in one that is there, durably.
fn make_directory(path: &Path) -> Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        result => result.map_err(Error::io("create", path))?,
    }
    sync_parent(path)
}

/// Makes the name of a directory durable that was there: whoever made it may have been killed before it was. Where this
/// node may not do that, or nobody can, others have made it: it may be where a file system is mounted on one that
/// nobody writes to.
fn sync_own_name(path: &Path) -> Result<()> {
    use io::ErrorKind::{InvalidInput, PermissionDenied, ReadOnlyFilesystem, Unsupported};
    match sync_parent(path) {
        Err(Error::Io { source, .. })
            if matches!(source.kind(), PermissionDenied | InvalidInput | ReadOnlyFilesystem | Unsupported) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// Makes the name of a file or directory durable.
pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sync_directory(parent).map_err(Error::io("sync", parent))
}

/// The names in a directory. One that is not Unicode comes back changed, which only matters to whoever opens it.
fn names(directory: &Path) -> Result<Vec<String>> {
    let entries = directory.read_dir().map_err(Error::io("read", directory))?;
    entries
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()
        .map_err(Error::io("read", directory))
}

/// In a directory without `MANIFEST`: fails if it has served before.
fn refuse_orphaned_logs(directory: &Path) -> Result<()> {
    let manifest = directory.join(MANIFEST);
    for name in names(directory)? {
        let is_data = name == CHECKPOINT
            || name == FOLLOWERS
            || (is_shard_directory(&name) && !is_empty_directory(&directory.join(&name))?);
        if is_data {
            let reason = format!("it is missing, though {name} holds data; restore it, or choose another directory");
            return Err(Error::corrupt(manifest, 0, None, reason));
        }
    }
    Ok(())
}

/// Before a directory is made: fails if it is one already, or somebody else's.
fn refuse_foreign_content(directory: &Path) -> Result<()> {
    for name in names(directory)? {
        let reason = if name == MANIFEST {
            "it exists already: this is the data directory of a node; open it instead".to_owned()
        } else if name.starts_with('.')
            || name == "lost+found"
            || name == LOCK_FILE
            || name == CHECKPOINT
            || name == STORE
            || name == FOLLOWERS
            || is_temporary(&name)
            || is_shard_directory(&name)
        {
            continue;
        } else {
            "it is no part of a data directory; choose an empty one".to_owned()
        };
        return Err(Error::Mismatch { path: directory.join(name), reason: reason.into() });
    }
    Ok(())
}

fn is_shard_directory(name: &str) -> bool {
    let number = name.strip_prefix("shard-").and_then(|number| number.parse().ok());
    number.is_some_and(|number| shard_directory_name(ShardId(number)) == name)
}

fn is_empty_directory(path: &Path) -> Result<bool> {
    Ok(path.is_dir() && names(path)?.is_empty())
}

/// Whether it is what a crash leaves of a file that was being replaced.
fn is_temporary(name: &str) -> bool {
    name.ends_with(".tmp") && [MANIFEST, CHECKPOINT, FOLLOWERS].iter().any(|file| name.starts_with(file))
}

fn remove_temporary_files(directory: &Path) -> Result<()> {
    for name in names(directory)? {
        if is_temporary(&name) {
            let path = directory.join(name);
            log::info!("removing {}, left by an interrupted write", path.display());
            std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
