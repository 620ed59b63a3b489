//! The followers that a node knows, and where each of them stands: kept in the data directory, so that a node that
//! starts again holds on to the log that its followers will ask for.
//!
//! A follower is known from its first contact on, which is on stable storage before it is answered. Positions are
//! written now and then, and at the end: one that is too old only keeps more log than needed.
//!
//! # Session ids
//!
//! No session id is used twice by one node, however often it starts: the file holds a bound, ids are only used below
//! it, and a node begins at the bound that it finds, or where ids of its epoch begin if that is higher: the epoch
//! stands in their upper 32 bits. So ids of a newer leader are above those of every older one. Those of a follower that
//! feeds others say nothing of a leader's.
//!
//! # Format of `followers`, version 1
//!
//! One file, replaced as a whole. All numbers are little-endian; *n* followers, *s* shards.
//!
//! | offset | size | field | meaning |
//! |---:|---:|---|---|
//! | 0 | 8 | `magic` | the bytes `TOWLFOL` and a zero |
//! | 8 | 2 | `version` | 1 |
//! | 10 | 2 | `shard_count` | shards, *s* |
//! | 12 | 4 | `count` | followers, *n*, at most [`MAX_FOLLOWERS`] |
//! | 16 | 8 | `session_bound` | no session id from here on has been used |
//! | 24 | (16 + 16 *s*) *n* | followers | each: `node` (8), `seen_at_ms` since 1970 (8), then for each shard `durable` (8) and `applied` (8) |
//! | 24 + (16 + 16 *s*) *n* | 4 | `crc` | CRC-32 (IEEE) of everything before it |
//!
//! It is valid exactly if magic, CRC and version are right, its length is the one that `count` and `shard_count` ask
//! for, the shards are as many as the node's, and followers stand in strictly ascending order of their nodes, of which
//! none is 0. The CRC is looked at before the version, in this and every later version. A file that is not valid is an
//! error and never taken for an empty one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::atomic_file;
use crate::error::{Error, Result};
use crate::limits::MAX_FOLLOWERS;
use crate::types::{Epoch, Lsn, NodeId, ShardId};

const MAGIC: [u8; 8] = *b"TOWLFOL\0";
const VERSION: u16 = 1;
const HEADER_LEN: usize = 24;
/// Session ids reserved at a time: one write of the file for so many sessions.
const SESSIONS_AT_A_TIME: u64 = 1 << 16;

/// One follower that is known.
#[derive(Debug)]
pub(crate) struct Known {
    node: NodeId,
    /// When it was last heard of, in milliseconds since 1970.
    seen_at_ms: AtomicU64,
    /// By shard.
    places: Box<[Place]>,
}

/// Where a follower stands in one shard. Written by the thread that reads its stream of that shard.
#[derive(Debug, Default)]
struct Place {
    durable: AtomicU64,
    applied: AtomicU64,
    /// Log that it needs has been given up. Written by retention and, on contact, by the shard's host.
    lost: AtomicBool,
}

impl Known {
    fn new(node: NodeId, shards: u16) -> Known {
        Known {
            node,
            seen_at_ms: AtomicU64::new(0),
            places: (0..shards).map(|_| Place::default()).collect::<Vec<_>>().into(),
        }
    }

    /// Who it is.
    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    /// Up to where it needs nothing any more: what it has applied and has on stable storage. Before it has applied
    /// anything it needs everything, although the engine lets what is durable decide then: with its first record that
    /// falls back to what is applied, and what lies between must still be there.
    pub(crate) fn position(&self, shard: ShardId) -> Lsn {
        self.places.get(usize::from(shard.0)).map_or(Lsn::ZERO, |place| {
            Lsn(place.durable.load(Ordering::Acquire).min(place.applied.load(Ordering::Acquire)))
        })
    }

    /// Takes in where it says it stands. Gives its position before and after.
    pub(crate) fn note(&self, shard: ShardId, durable: Lsn, applied: Lsn, now_ms: u64) -> (Lsn, Lsn) {
        let before = self.position(shard);
        self.seen_at_ms.store(now_ms, Ordering::Relaxed);
        if let Some(place) = self.places.get(usize::from(shard.0)) {
            place.durable.store(durable.0, Ordering::Release);
            place.applied.store(applied.0, Ordering::Release);
        }
        (before, self.position(shard))
    }

    /// Whether log that it needs has been given up since it was last in touch.
    pub(crate) fn has_lost_place(&self, shard: ShardId) -> bool {
        self.places.get(usize::from(shard.0)).is_some_and(|place| place.lost.load(Ordering::Acquire))
    }

    /// Says whether log that it needs has been given up. Returns whether that is news.
    pub(crate) fn set_lost_place(&self, shard: ShardId, lost: bool) -> bool {
        self.places.get(usize::from(shard.0)).is_some_and(|place| place.lost.swap(lost, Ordering::AcqRel) != lost)
    }
}

/// The followers known to a node, and their file.
#[derive(Debug)]
pub(crate) struct Registry {
    path: PathBuf,
    shards: u16,
    /// In ascending order of their nodes.
    followers: RwLock<Vec<Arc<Known>>>,
    /// No session id from here on has been used. Moves on under the lock of `saving`, after the file says so.
    session_bound: AtomicU64,
    /// The file's content; held while it is replaced.
    saving: Mutex<Vec<u8>>,
}

impl Registry {
    /// Reads the file at `path`; where there is none, nobody is known.
    ///
    /// # Errors
    ///
    /// [`Error::Corrupt`], [`Error::Mismatch`] for a newer version, [`Error::Io`].
    pub(crate) fn open(path: &Path, shards: u16) -> Result<Registry> {
        let (bytes, decoded) = match std::fs::read(path) {
            Ok(bytes) => {
                let decoded = decode(&bytes, path, shards)?;
                (bytes, decoded)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => (Vec::new(), (0, Vec::new())),
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        Ok(Registry {
            path: path.to_owned(),
            shards,
            followers: RwLock::new(decoded.1.into_iter().map(Arc::new).collect()),
            session_bound: AtomicU64::new(decoded.0),
            saving: Mutex::new(bytes),
        })
    }

    /// Every follower known, in ascending order.
    pub(crate) fn followers(&self) -> Vec<Arc<Known>> {
        self.followers.read().clone()
    }

    /// The shard's log has become another one, with these LSNs: what followers had behind its end is not of it, and who
    /// needs what comes before it has lost its place.
    pub(crate) fn cut_behind(&self, shard: ShardId, tail: Lsn, head: Lsn) {
        for known in self.followers() {
            if let Some(place) = known.places.get(usize::from(shard.0)) {
                place.durable.fetch_min(head.0, Ordering::AcqRel);
                place.applied.fetch_min(head.0, Ordering::AcqRel);
            }
            if known.position(shard).next() < tail {
                known.set_lost_place(shard, true);
            }
        }
    }

    /// The follower, which is known from now on. New ones are on stable storage on return.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if as many are known as can be; [`Error::Io`].
    pub(crate) fn add(&self, node: NodeId) -> Result<Arc<Known>> {
        // Held all along: whoever finds it known already, for another shard, finds it on stable storage too.
        let mut saved = self.saving.lock();
        {
            let mut followers = self.followers.write();
            match followers.binary_search_by_key(&node, |known| known.node) {
                Ok(at) => return Ok(Arc::clone(&followers[at])),
                Err(_) if followers.len() >= MAX_FOLLOWERS => {
                    return Err(Error::invalid(format!(
                        "{MAX_FOLLOWERS} followers are known, as many as a node can have; have it forget one that will \
                         not come back: `--forget ID`, `Leader::forget_follower` or `Follower::forget_follower`"
                    )));
                }
                Err(at) => followers.insert(at, Arc::new(Known::new(node, self.shards))),
            }
        }
        let result = self.replace(&mut saved, self.session_bound.load(Ordering::Acquire));
        let mut followers = self.followers.write();
        let at = followers.binary_search_by_key(&node, |known| known.node);
        let at = at.map_err(|_| Error::invalid(format!("node {node} has been forgotten meanwhile")))?;
        match result {
            Ok(()) => Ok(Arc::clone(&followers[at])),
            Err(error) => {
                followers.remove(at);
                Err(error)
            }
        }
    }

    /// Keeps those that `keep` says, and forgets the others for good.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]. They are forgotten then too, until the node starts again.
    pub(crate) fn retain(&self, keep: impl Fn(NodeId) -> bool) -> Result<()> {
        self.followers.write().retain(|known| keep(known.node));
        self.save()
    }

    /// The first session id that a node may use that leads under `epoch`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub(crate) fn first_session(&self, epoch: Epoch) -> Result<u64> {
        // An epoch that large is no epoch that anybody counted to; ids then go on from the bound alone.
        let of_epoch = if epoch.0 <= u64::from(u32::MAX) { epoch.0 << 32 } else { 0 };
        let first = self.session_bound.load(Ordering::Acquire).max(of_epoch).max(1);
        self.reserve_sessions(first)?;
        Ok(first)
    }

    /// Makes sure that the id `next` and many after it are below the bound.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub(crate) fn reserve_sessions(&self, next: u64) -> Result<()> {
        let bound = self.session_bound.load(Ordering::Acquire);
        if next.saturating_add(SESSIONS_AT_A_TIME / 2) < bound {
            return Ok(());
        }
        let wanted = next.saturating_add(SESSIONS_AT_A_TIME).max(bound);
        let mut saved = self.saving.lock();
        self.replace(&mut saved, wanted.max(self.session_bound.load(Ordering::Acquire)))
    }

    /// Writes the file unless it says all this already.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub(crate) fn save(&self) -> Result<()> {
        let mut saved = self.saving.lock();
        self.replace(&mut saved, self.session_bound.load(Ordering::Acquire))
    }

    fn replace(&self, saved: &mut Vec<u8>, bound: u64) -> Result<()> {
        let bytes = self.encode(bound);
        if bytes != *saved {
            atomic_file::replace(&self.path, &bytes)?;
            *saved = bytes;
        }
        self.session_bound.fetch_max(bound, Ordering::AcqRel);
        Ok(())
    }

    fn encode(&self, bound: u64) -> Vec<u8> {
        let followers = self.followers.read();
        let mut bytes = Vec::with_capacity(HEADER_LEN + followers.len() * entry_len(self.shards) + 4);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.shards.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(followers.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&bound.to_le_bytes());
        for known in followers.iter() {
            bytes.extend_from_slice(&known.node.0.to_le_bytes());
            bytes.extend_from_slice(&known.seen_at_ms.load(Ordering::Relaxed).to_le_bytes());
            for place in &known.places {
                bytes.extend_from_slice(&place.durable.load(Ordering::Relaxed).to_le_bytes());
                bytes.extend_from_slice(&place.applied.load(Ordering::Relaxed).to_le_bytes());
            }
        }
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }
}

const fn entry_len(shards: u16) -> usize {
    16 + 16 * shards as usize
}

/// Reads the content of the file at `path`: the bound of session ids, and the followers.
fn decode(bytes: &[u8], path: &Path, shards: u16) -> Result<(u64, Vec<Known>)> {
    let corrupt = |offset: u64, reason: String| Err(Error::corrupt(path, offset, None, reason));
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if !bytes.starts_with(&MAGIC) {
        return corrupt(0, "it does not begin like a list of followers".to_owned());
    }
    if bytes.len() < HEADER_LEN + 4 {
        return corrupt(0, format!("its {} bytes are too few", bytes.len()));
    }
    let end = bytes.len() - 4;
    let (crc, computed) = (u32_at(end), crc32fast::hash(&bytes[..end]));
    if crc != computed {
        return corrupt(0, format!("its checksum is {crc:08x}, but its bytes give {computed:08x}"));
    }
    if u16_at(8) > VERSION {
        let reason = format!("written by a newer towline (version {}; this one knows {VERSION})", u16_at(8));
        return Err(Error::Mismatch { path: path.to_owned(), reason: reason.into() });
    }
    if u16_at(8) != VERSION {
        return corrupt(8, format!("version {} is not {VERSION}", u16_at(8)));
    }
    if u16_at(10) != shards {
        return corrupt(10, format!("it counts {} shards where the node has {shards}", u16_at(10)));
    }
    let count = usize::try_from(u32_at(12)).unwrap_or(usize::MAX);
    if count > MAX_FOLLOWERS || end != HEADER_LEN + count * entry_len(shards) {
        return corrupt(12, format!("its length is not that of {count} followers"));
    }
    let mut followers: Vec<Known> = Vec::with_capacity(count);
    for at in (HEADER_LEN..end).step_by(entry_len(shards)) {
        let known = Known::new(NodeId(u64_at(at)), shards);
        if known.node.0 == 0 || followers.last().is_some_and(|last| last.node >= known.node) {
            return corrupt(at as u64, format!("node {} is out of order", known.node));
        }
        known.seen_at_ms.store(u64_at(at + 8), Ordering::Relaxed);
        for (index, place) in known.places.iter().enumerate() {
            place.durable.store(u64_at(at + 16 + 16 * index), Ordering::Relaxed);
            place.applied.store(u64_at(at + 24 + 16 * index), Ordering::Relaxed);
        }
        followers.push(known);
    }
    Ok((u64_at(16), followers))
}

/// For [`crate::seams`]: what is read, written again.
pub(crate) fn decode_and_encode(bytes: &[u8], path: &Path, shards: u16) -> Result<Vec<u8>> {
    let (bound, followers) = decode(bytes, path, shards)?;
    let registry = Registry {
        path: path.to_owned(),
        shards,
        followers: RwLock::new(followers.into_iter().map(Arc::new).collect()),
        session_bound: AtomicU64::new(bound),
        saving: Mutex::default(),
    };
    Ok(registry.encode(bound))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(path: &Path) -> Registry {
        let registry = Registry::open(path, 2).unwrap();
        registry.add(NodeId(9)).unwrap().note(ShardId(1), Lsn(7), Lsn(5), 1234);
        registry.add(NodeId(3)).unwrap();
        registry.save().unwrap();
        registry
    }

    #[test]
    fn followers_survive_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("followers");
        assert!(Registry::open(&path, 2).unwrap().followers().is_empty());
        drop(sample(&path));
        let followers = Registry::open(&path, 2).unwrap().followers();
        assert_eq!(followers.iter().map(|known| known.node()).collect::<Vec<_>>(), [NodeId(3), NodeId(9)]);
        assert_eq!(followers[1].position(ShardId(1)), Lsn(5));
        assert_eq!(followers[1].seen_at_ms.load(Ordering::Relaxed), 1234);
        assert_eq!(followers[0].position(ShardId(0)), Lsn::ZERO);
    }

    #[test]
    fn a_position_is_what_is_durable_and_applied() {
        let known = Known::new(NodeId(1), 1);
        let nothing_applied = known.note(ShardId(0), Lsn(5), Lsn(0), 0);
        assert_eq!(nothing_applied, (Lsn(0), Lsn(0)), "its first record is still to be applied");
        assert_eq!(known.note(ShardId(0), Lsn(6), Lsn(3), 0), (Lsn(0), Lsn(3)));
        assert_eq!(known.note(ShardId(0), Lsn(6), Lsn(8), 0), (Lsn(3), Lsn(6)));
        assert_eq!(known.position(ShardId(7)), Lsn::ZERO);
    }

    #[test]
    fn whoever_is_told_of_a_follower_finds_it_on_stable_storage() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("followers");
        let registry = Registry::open(&path, 4).unwrap();
        for node in (1..=16).map(NodeId) {
            let shards = std::sync::Barrier::new(4);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        shards.wait();
                        registry.add(node).unwrap();
                        let saved = Registry::open(&path, 4).unwrap().followers();
                        assert!(saved.iter().any(|known| known.node() == node), "node {node}");
                    });
                }
            });
        }
    }

    #[test]
    fn session_ids_are_never_used_twice() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("followers");
        let mut last = 0;
        for epoch in [1, 1, 2, 2, 1] {
            let registry = Registry::open(&path, 1).unwrap();
            let first = registry.first_session(Epoch(epoch)).unwrap();
            assert!(first > last, "{first} after {last}");
            last = first + SESSIONS_AT_A_TIME;
            registry.reserve_sessions(last).unwrap();
        }
    }

    #[test]
    fn what_is_forgotten_stays_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("followers");
        sample(&path).retain(|node| node == NodeId(3)).unwrap();
        assert_eq!(Registry::open(&path, 2).unwrap().followers().len(), 1);
    }

    #[test]
    fn there_is_a_most() {
        let directory = tempfile::tempdir().unwrap();
        let registry = Registry::open(&directory.path().join("followers"), 1).unwrap();
        for node in 1..=MAX_FOLLOWERS as u64 {
            registry.add(NodeId(node)).unwrap();
        }
        registry.add(NodeId(1)).unwrap();
        assert!(registry.add(NodeId(1000)).unwrap_err().to_string().contains("`--forget ID`"));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found_and_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("followers");
        drop(sample(&path));
        let bytes = std::fs::read(&path).unwrap();
        assert!(decode(&bytes, &path, 2).is_ok());
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let error = decode(&damaged, &path, 2).unwrap_err();
            assert!(error.is_corruption() && error.to_string().contains("followers"), "bit {bit}: {error}");
        }
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len], &path, 2).unwrap_err().is_corruption(), "{len}");
        }
        assert!(decode(&bytes, &path, 3).is_err(), "another number of shards");
        std::fs::write(&path, &bytes[1..]).unwrap();
        assert!(Registry::open(&path, 2).unwrap_err().is_corruption());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), sealed in any::<bool>()) {
            let mut bytes = [MAGIC.as_slice(), &bytes].concat();
            if sealed {
                let crc = crc32fast::hash(&bytes);
                bytes.extend_from_slice(&crc.to_le_bytes());
            }
            let _ = decode(&bytes, Path::new("followers"), 1);
        }
    }
}
