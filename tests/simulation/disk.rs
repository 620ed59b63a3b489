//! A disk that can lose power: segment files of sectors, names, and the few facts of the manifest.
//!
//! # What a power cut leaves
//!
//! - Of every 512-byte sector that was written and not synced, the old bytes or the new ones, each sector for itself.
//! - Of the names made and removed since the directory was last synced, a beginning of the changes, as a journal keeps
//!   them.
//! - The manifest as it was last replaced: replacing it is one step that is durable when it returns.
//!
//! A sync takes time. It saves what was written when it began; what is written meanwhile is for the next one.

use std::collections::BTreeMap;

use towline::limits::MIN_SEGMENT_SIZE;
use towline::{Epoch, Lsn, WalSegmentId};

use super::clock::Chance;

/// Bytes that are written as a whole or not at all.
const SECTOR: usize = 512;
pub const SEGMENT_SIZE: u64 = MIN_SEGMENT_SIZE;
/// One bit of a word a sector.
const LEN: usize = SECTOR * 128;
const _: () = assert!(LEN as u64 == SEGMENT_SIZE);

pub type FileId = u64;

struct File {
    current: Vec<u8>,
    durable: Vec<u8>,
    dirty: u128,
}

enum NameChange {
    Made(WalSegmentId, FileId),
    Removed(WalSegmentId),
}

struct Saving {
    sectors: Vec<(FileId, usize, Vec<u8>)>,
    names: usize,
}

/// What stands in the manifest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// The highest epoch accepted.
    pub epoch: Epoch,
    /// Whether the node itself leads, or has led, under it.
    pub own_epoch: bool,
    /// What was here was given up, or taken away, and is not all back yet: the node cannot speak for what it once had.
    pub recovering: bool,
    /// Up to where a rebuild must come under that epoch, because of what one gave up.
    pub owed: Option<(Epoch, Lsn)>,
}

pub struct Disk {
    files: BTreeMap<FileId, File>,
    names: BTreeMap<WalSegmentId, FileId>,
    durable_names: BTreeMap<WalSegmentId, FileId>,
    changes: Vec<NameChange>,
    saving: Option<Saving>,
    next_file: FileId,
    pub manifest: Manifest,
    /// No new file finds room.
    pub full: bool,
    /// Planted: a sync says that it worked and did nothing.
    pub lies: bool,
}

impl Disk {
    pub fn new() -> Disk {
        Disk {
            files: BTreeMap::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            changes: Vec::new(),
            saving: None,
            next_file: 1,
            manifest: Manifest::default(),
            full: false,
            lies: false,
        }
    }

    /// The segments by name, oldest first.
    pub fn list(&self) -> Vec<(WalSegmentId, FileId)> {
        self.names.iter().map(|(id, file)| (*id, *file)).collect()
    }

    pub fn bytes(&self, file: FileId) -> &[u8] {
        &self.files[&file].current
    }

    /// A new segment file of zeros, which are durable before it has a name; none if the disk is full.
    pub fn create(&mut self, id: WalSegmentId) -> Option<FileId> {
        if self.full {
            return None;
        }
        let file = self.next_file;
        self.next_file += 1;
        self.files.insert(file, File { current: vec![0; LEN], durable: vec![0; LEN], dirty: 0 });
        self.names.insert(id, file);
        self.changes.push(NameChange::Made(id, file));
        Some(file)
    }

    pub fn remove(&mut self, id: WalSegmentId) {
        self.names.remove(&id);
        self.changes.push(NameChange::Removed(id));
    }

    pub fn write(&mut self, file: FileId, offset: u64, bytes: &[u8]) {
        let Some(file) = self.files.get_mut(&file).filter(|_| !bytes.is_empty()) else { return };
        let start = usize::try_from(offset).unwrap();
        file.current[start..start + bytes.len()].copy_from_slice(bytes);
        for sector in start / SECTOR..=(start + bytes.len() - 1) / SECTOR {
            file.dirty |= 1 << sector;
        }
    }

    pub fn zero(&mut self, file: FileId, range: std::ops::Range<u64>) {
        let zeros = vec![0; usize::try_from(range.end - range.start).unwrap()];
        self.write(file, range.start, &zeros);
    }

    /// Writes what a file holds at once and before its name, which it does not have yet.
    pub fn sync_file(&mut self, file: FileId) {
        if let Some(file) = self.files.get_mut(&file) {
            file.durable.copy_from_slice(&file.current);
            file.dirty = 0;
        }
    }

    pub fn is_syncing(&self) -> bool {
        self.saving.is_some()
    }

    /// Begins to save everything written so far.
    pub fn begin_sync(&mut self) {
        let mut sectors = Vec::new();
        for (&id, file) in self.files.iter_mut().filter(|(_, file)| file.dirty != 0) {
            for sector in sectors_of(file.dirty) {
                sectors.push((id, sector, file.current[sector * SECTOR..(sector + 1) * SECTOR].to_vec()));
            }
            file.dirty = 0;
        }
        self.saving = Some(Saving { sectors, names: self.changes.len() });
    }

    pub fn end_sync(&mut self) {
        let Some(Saving { sectors, names }) = self.saving.take() else { return };
        if self.lies {
            return;
        }
        for (file, sector, bytes) in sectors {
            self.store(file, sector, &bytes);
        }
        self.keep_names(names);
        self.forget_unnamed();
    }

    /// Saves everything written so far at once.
    pub fn sync_now(&mut self) {
        self.end_sync();
        self.begin_sync();
        self.end_sync();
    }

    /// The power goes; `survives` of 1000 unsynced sectors were written all the same.
    pub fn lose_power(&mut self, chance: &mut Chance, survives: u64) {
        let saving = self.saving.take();
        for (file, sector, bytes) in saving.into_iter().flat_map(|saving| saving.sectors) {
            if chance.per_mille(survives) {
                self.store(file, sector, &bytes);
            }
        }
        for file in self.files.values_mut() {
            for sector in sectors_of(file.dirty) {
                if chance.per_mille(survives) {
                    let range = sector * SECTOR..(sector + 1) * SECTOR;
                    file.durable[range.clone()].copy_from_slice(&file.current[range]);
                }
            }
            file.current.copy_from_slice(&file.durable);
            file.dirty = 0;
        }
        let kept = chance.index(self.changes.len() + 1);
        self.keep_names(kept);
        self.changes.clear();
        self.names = self.durable_names.clone();
        self.forget_unnamed();
    }

    /// Flips one bit of what is on the disk, and of what is read from now on.
    pub fn rot(&mut self, id: WalSegmentId, bit: u64) {
        let Some(file) = self.names.get(&id).and_then(|file| self.files.get_mut(file)) else { return };
        let byte = usize::try_from(bit / 8).unwrap();
        file.durable[byte] ^= 1 << (bit % 8);
        file.current[byte] ^= 1 << (bit % 8);
    }

    /// Another disk in the place of this one; only who the node is and what it has promised is carried over.
    pub fn replace(&mut self) {
        let manifest = Manifest { recovering: true, owed: None, ..self.manifest };
        *self = Disk { manifest, next_file: self.next_file, lies: self.lies, ..Disk::new() };
    }

    fn store(&mut self, file: FileId, sector: usize, bytes: &[u8]) {
        if let Some(file) = self.files.get_mut(&file) {
            file.durable[sector * SECTOR..(sector + 1) * SECTOR].copy_from_slice(bytes);
        }
    }

    fn keep_names(&mut self, count: usize) {
        for change in self.changes.drain(..count) {
            match change {
                NameChange::Made(id, file) => self.durable_names.insert(id, file),
                NameChange::Removed(id) => self.durable_names.remove(&id),
            };
        }
    }

    fn forget_unnamed(&mut self) {
        let Disk { files, names, durable_names, changes, .. } = self;
        let pending =
            |id: &FileId| changes.iter().any(|change| matches!(change, NameChange::Made(_, file) if file == id));
        let named = |id: &FileId| names.values().chain(durable_names.values()).any(|file| file == id);
        files.retain(|id, _| named(id) || pending(id));
    }
}

fn sectors_of(mut dirty: u128) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let sector = dirty.trailing_zeros();
        if sector == u128::BITS {
            return None;
        }
        dirty &= dirty - 1;
        usize::try_from(sector).ok()
    })
}
