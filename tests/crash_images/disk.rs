//! A model of what is on stable storage below one directory, and the images that a power cut could leave of it.
//!
//! # What is durable
//!
//! - Of a file: what it held, and how long it was, when it was last synced; of a range that was synced by itself, what
//!   that range held. A file that was never synced is empty.
//! - Of a directory: the names it had when it was last synced. Syncing a file says nothing about its name.
//!
//! # What else may be there
//!
//! Each piece of a file, of 512 bytes or of 4 KiB, may be what it is now, or what it was at any moment since it was
//! last synced; those moments are the [looks](Disk::look) taken. The length may be any that the file had, or one in
//! between. Of the changes of names since a directory was synced, any subset may be there, a rename as a whole; on a
//! disk that [keeps them in order](Disk::keep_names_in_order), a beginning of them.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::random::Random;

const PAGE: usize = 4096;
const SECTOR: usize = 512;
/// Looks kept of a file.
const MAX_LOOKS: usize = 4;

/// Whether a sync has failed anywhere, so that writes are to be looked at.
static HAS_FAILED: AtomicBool = AtomicBool::new(false);

static DISKS: Mutex<Vec<Arc<Disk>>> = Mutex::new(Vec::new());

/// Whether a sync has failed on any disk.
pub fn has_any_failed() -> bool {
    HAS_FAILED.load(Ordering::Relaxed)
}

/// The disk that a path is on.
pub fn disk_of(path: &Path) -> Option<Arc<Disk>> {
    let disks = DISKS.lock().unwrap();
    disks.iter().find(|disk| path.starts_with(&disk.root)).cloned()
}

/// A directory whose syncs and names are observed for as long as this lives. Removed afterwards.
pub struct Observed {
    pub disk: Arc<Disk>,
    directory: Option<tempfile::TempDir>,
}

impl Observed {
    /// An empty directory.
    pub fn new() -> Observed {
        Observed::with(&Image::default())
    }

    /// A directory in which an image is all there is, all of it durable.
    pub fn with(image: &Image) -> Observed {
        let directory = tempfile::tempdir().unwrap();
        // As the kernel says it, without links.
        let root = directory.path().canonicalize().unwrap();
        image.write(&root);
        let mut state = State { names: 1, ..State::default() };
        state.nodes.insert(0, Node { path: root.clone(), content: Content::Directory(Directory::default()) });
        state.refresh();
        for node in state.nodes.values_mut() {
            match &mut node.content {
                Content::File(file) => file.durable = Arc::new(fs::read(&node.path).unwrap()),
                Content::Directory(directory) => directory.make_durable(),
            }
        }
        let disk = Arc::new(Disk { root, state: Mutex::new(state) });
        DISKS.lock().unwrap().push(Arc::clone(&disk));
        Observed { disk, directory: Some(directory) }
    }

    pub fn path(&self) -> &Path {
        &self.disk.root
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        DISKS.lock().unwrap().retain(|disk| !Arc::ptr_eq(disk, &self.disk));
        if std::thread::panicking()
            && let Some(directory) = self.directory.take()
        {
            eprintln!("what was opened is kept in {}", directory.keep().display());
        }
    }
}

pub struct Disk {
    root: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Everything that has a name, or may have one after a power cut. The root is 0.
    nodes: BTreeMap<u64, Node>,
    /// Those that have a name now, by inode.
    named: BTreeMap<u64, u64>,
    names: u64,
    events: u64,
    trap: Option<u64>,
    names_in_order: bool,
    /// A trap that waits for a file to grow.
    growth_trap: Option<u64>,
    caught: Option<Moment>,
    /// So many more syncs succeed before one fails.
    failing: Option<u64>,
    /// So many more writes to files succeed before one finds no room.
    full: Option<u64>,
}

#[derive(Clone)]
struct Node {
    path: PathBuf,
    content: Content,
}

#[derive(Clone)]
enum Content {
    File(FileState),
    Directory(Directory),
}

#[derive(Clone, Default)]
struct FileState {
    durable: Arc<Vec<u8>>,
    looks: Vec<Arc<Vec<u8>>>,
    /// Pages that the kernel takes for written although they are not, with what they hold: a sync of them failed, and
    /// they were not written since.
    lost: BTreeMap<usize, Vec<u8>>,
}

#[derive(Clone, Default)]
struct Directory {
    durable: BTreeMap<OsString, u64>,
    current: BTreeMap<OsString, u64>,
    changes: Vec<Change>,
}

#[derive(Clone, Debug)]
enum Change {
    Linked(OsString, u64),
    Removed(u64),
    Renamed(OsString, u64),
}

impl Directory {
    fn make_durable(&mut self) {
        self.durable = self.current.clone();
        self.changes.clear();
    }
}

impl FileState {
    /// Takes what a page holds now for durable, unless it is lost.
    fn is_written_back(&mut self, page: usize, bytes: &[u8]) -> bool {
        if self.lost.get(&page).is_some_and(|lost| lost == bytes) {
            return false;
        }
        self.lost.remove(&page);
        true
    }

    fn look(&mut self, bytes: Vec<u8>) {
        let newest = self.looks.last().unwrap_or(&self.durable);
        if **newest != bytes {
            if self.looks.len() == MAX_LOOKS {
                self.looks.remove(0);
            }
            self.looks.push(Arc::new(bytes));
        }
    }
}

impl State {
    /// Finds out about names that came or went without a call that passes here.
    fn refresh(&mut self) {
        let mut directories = vec![0];
        while let Some(id) = directories.pop() {
            let Some(Node { path, content: Content::Directory(directory) }) = self.nodes.get(&id).cloned() else {
                continue;
            };
            let mut found = BTreeMap::new();
            for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
                // Gone again since it was listed.
                let Ok(metadata) = entry.metadata() else { continue };
                found.insert(entry.file_name(), metadata);
            }
            for (name, node) in &directory.current {
                let is_same = |metadata: &fs::Metadata| self.named.get(&metadata.ino()) == Some(node);
                if !found.get(name).is_some_and(is_same) {
                    self.forget(id, name);
                }
            }
            for (name, metadata) in found {
                let node = match self.named.get(&metadata.ino()) {
                    Some(&node) => node,
                    None => self.adopt(id, &path, name, &metadata),
                };
                if metadata.is_dir() {
                    directories.push(node);
                }
            }
        }
    }

    fn adopt(&mut self, parent: u64, path: &Path, name: OsString, metadata: &fs::Metadata) -> u64 {
        let id = self.names;
        self.names += 1;
        self.named.insert(metadata.ino(), id);
        let content = if metadata.is_dir() {
            Content::Directory(Directory::default())
        } else {
            Content::File(FileState::default())
        };
        self.nodes.insert(id, Node { path: path.join(&name), content });
        let directory = self.directory(parent);
        directory.current.insert(name.clone(), id);
        directory.changes.push(Change::Linked(name, id));
        id
    }

    /// A name is gone.
    fn forget(&mut self, parent: u64, name: &OsString) {
        let directory = self.directory(parent);
        if let Some(node) = directory.current.remove(name) {
            directory.changes.push(Change::Removed(node));
            self.named.retain(|_, named| *named != node);
        }
    }

    fn directory(&mut self, id: u64) -> &mut Directory {
        match &mut self.nodes.get_mut(&id).unwrap().content {
            Content::Directory(directory) => directory,
            Content::File(_) => panic!("a file is no directory"),
        }
    }

    /// What has this path now.
    fn at(&self, path: &Path) -> Option<u64> {
        self.named.values().copied().chain([0]).find(|id| self.nodes[id].path == path)
    }

    fn look(&mut self) {
        self.refresh();
        for id in self.named.values() {
            let Some(node) = self.nodes.get_mut(id) else { continue };
            if let Content::File(file) = &mut node.content
                && let Ok(bytes) = fs::read(&node.path)
            {
                file.look(bytes);
            }
        }
    }

    fn moment(&mut self) -> Moment {
        self.look();
        Moment { nodes: self.nodes.clone(), names_in_order: self.names_in_order }
    }

    /// Whether a file is longer than what is durable of it. A new one is not: nothing of it is durable.
    fn has_grown(&self) -> bool {
        self.named.values().any(|id| {
            let Some(Node { path, content: Content::File(file) }) = self.nodes.get(id) else { return false };
            !file.durable.is_empty() && fs::metadata(path).is_ok_and(|found| found.len() > file.durable.len() as u64)
        })
    }

    /// One more call that changes what a power cut leaves.
    fn event(&mut self) {
        self.events += 1;
        if self.growth_trap.is_some() && self.has_grown() {
            self.trap = self.growth_trap.take();
        }
        if let Some(left) = self.trap {
            self.trap = left.checked_sub(1);
            if left == 0 {
                self.caught = Some(self.moment());
            }
        }
    }

    fn parent_of(&self, path: &Path) -> Option<(u64, OsString)> {
        Some((self.at(path.parent()?)?, path.file_name()?.to_owned()))
    }

    /// Drops files that can have no name any more.
    fn tidy(&mut self) {
        let mut kept: BTreeSet<u64> = self.named.values().copied().chain([0]).collect();
        for node in self.nodes.values() {
            if let Content::Directory(directory) = &node.content {
                kept.extend(directory.durable.values());
                for change in &directory.changes {
                    let (Change::Linked(_, id) | Change::Renamed(_, id) | Change::Removed(id)) = change;
                    kept.insert(*id);
                }
            }
        }
        self.nodes.retain(|id, _| kept.contains(id));
    }
}

impl Disk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// From now on changes of names reach the disk in their order.
    pub fn keep_names_in_order(&self) {
        self.state().names_in_order = true;
    }

    /// Everything as it is now may reach the disk, whatever is written later.
    pub fn look(&self) {
        self.state().look();
    }

    /// What a power cut could leave now.
    pub fn moment(&self) -> Moment {
        self.state().moment()
    }

    /// Keeps what a power cut could leave just before the sync, rename or removal that comes after `events` others.
    pub fn trap(&self, events: u64) {
        let mut state = self.state();
        (state.trap, state.growth_trap, state.caught) = (Some(events), None, None);
    }

    /// The same, counted from the next sync, rename or removal that finds a file longer than what is durable of it.
    pub fn trap_growth(&self, events: u64) {
        let mut state = self.state();
        (state.trap, state.growth_trap, state.caught) = (None, Some(events), None);
    }

    pub fn caught(&self) -> Option<Moment> {
        self.state().caught.take()
    }

    /// Syncs, renames and removals so far.
    pub fn events(&self) -> u64 {
        self.state().events
    }

    /// The file or directory with this inode was synced.
    pub fn synced(&self, inode: u64) {
        let mut state = self.state();
        state.event();
        state.refresh();
        let Some(id) = self.with_inode(&state, inode) else { return };
        let node = state.nodes.get_mut(&id).unwrap();
        match &mut node.content {
            Content::File(file) => {
                if let Ok(mut bytes) = fs::read(&node.path) {
                    for (page, now) in bytes.chunks_mut(PAGE).enumerate() {
                        if !file.is_written_back(page, now) {
                            let before = file.durable.get(page * PAGE..).unwrap_or_default();
                            let before = &before[..before.len().min(now.len())];
                            now.fill(0);
                            now[..before.len()].copy_from_slice(before);
                        }
                    }
                    (file.durable, file.looks) = (Arc::new(bytes), Vec::new());
                }
            }
            Content::Directory(directory) => {
                directory.make_durable();
                state.tidy();
            }
        }
    }

    /// What has this inode, and a name.
    fn with_inode(&self, state: &State, inode: u64) -> Option<u64> {
        let is_root = || fs::metadata(&self.root).is_ok_and(|root| root.ino() == inode);
        state.named.get(&inode).copied().or_else(|| is_root().then_some(0))
    }

    /// Whole pages of the file with this inode were synced, and its length.
    pub fn range_synced(&self, inode: u64, range: Range<u64>) {
        let mut state = self.state();
        state.event();
        state.refresh();
        let Some(id) = self.with_inode(&state, inode) else { return };
        let node = state.nodes.get_mut(&id).unwrap();
        let Content::File(file) = &mut node.content else { return };
        let Ok(live) = fs::File::open(&node.path) else { return };
        let len = usize::try_from(live.metadata().unwrap().len()).unwrap();
        let start = usize::try_from(range.start).unwrap() / PAGE * PAGE;
        let end = usize::try_from(range.end).unwrap().next_multiple_of(PAGE).min(len);
        let mut bytes = vec![0; end - start];
        live.read_exact_at(&mut bytes, start as u64).unwrap();
        for copy in file.looks.iter_mut().chain([&mut file.durable]) {
            Arc::make_mut(copy).resize(len, 0);
        }
        for (page, bytes) in (start / PAGE..).zip(bytes.chunks(PAGE)) {
            if !file.is_written_back(page, bytes) {
                continue;
            }
            for copy in file.looks.iter_mut().chain([&mut file.durable]) {
                Arc::make_mut(copy)[page * PAGE..][..bytes.len()].copy_from_slice(bytes);
            }
        }
    }

    /// After so many syncs, one of a file fails.
    pub fn fail_sync(&self, after: u64) {
        self.state().failing = Some(after);
    }

    /// Whether this sync of a range fails. Then what is in the range and not durable is lost, if it is not written
    /// again.
    pub fn sync_fails(&self, inode: u64, range: Range<u64>) -> bool {
        let mut state = self.state();
        let Some(left) = state.failing else { return false };
        state.failing = left.checked_sub(1);
        if left > 0 {
            return false;
        }
        state.refresh();
        let Some(id) = self.with_inode(&state, inode) else { return false };
        let node = state.nodes.get_mut(&id).unwrap();
        let Content::File(file) = &mut node.content else { return false };
        let Ok(bytes) = fs::read(&node.path) else { return false };
        let (start, end) = (usize::try_from(range.start).unwrap() / PAGE, usize::try_from(range.end).unwrap());
        for (page, bytes) in bytes.chunks(PAGE).enumerate().take(end.div_ceil(PAGE)).skip(start) {
            let durable = file.durable.get(page * PAGE..).unwrap_or_default();
            if !durable.starts_with(bytes) {
                file.lost.insert(page, bytes.to_vec());
            }
        }
        // Some of it may have been written.
        file.look(bytes);
        HAS_FAILED.store(true, Ordering::Relaxed);
        true
    }

    /// After so many writes, one finds no room for all of its bytes.
    pub fn fill_up(&self, after: u64) {
        self.state().full = Some(after);
        HAS_FAILED.store(true, Ordering::Relaxed);
    }

    /// Whether this write is that one.
    pub fn is_full(&self) -> bool {
        let mut state = self.state();
        let Some(left) = state.full else { return false };
        state.full = left.checked_sub(1);
        left == 0
    }

    /// A range of the file with this inode was written.
    pub fn written(&self, inode: u64, range: Range<u64>) {
        let mut state = self.state();
        let Some(id) = self.with_inode(&state, inode) else { return };
        let node = state.nodes.get_mut(&id).unwrap();
        let Content::File(file) = &mut node.content else { return };
        let (start, end) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
        file.lost.retain(|page, _| !(start / PAGE..end.div_ceil(PAGE)).contains(page));
    }

    pub fn rename(&self, from: &Path, to: &Path, call: impl FnOnce() -> i32) -> i32 {
        let mut state = self.state();
        state.event();
        state.look();
        let Some((parent, old)) = state.parent_of(from) else { return call() };
        let Some((to_parent, new)) = state.parent_of(to) else { return call() };
        assert_eq!(parent, to_parent, "renames between directories are not modelled");
        let answer = call();
        if answer == 0 {
            if state.directory(parent).current.contains_key(&new) {
                let replaced = state.directory(parent).current.remove(&new).unwrap();
                state.named.retain(|_, named| *named != replaced);
            }
            let directory = state.directory(parent);
            let node = directory.current.remove(&old).unwrap();
            directory.current.insert(new.clone(), node);
            directory.changes.push(Change::Renamed(new, node));
            state.nodes.get_mut(&node).unwrap().path = to.to_owned();
        }
        answer
    }

    pub fn unlink(&self, path: &Path, call: impl FnOnce() -> i32) -> i32 {
        let mut state = self.state();
        state.event();
        state.look();
        let place = state.parent_of(path);
        let answer = call();
        if answer == 0
            && let Some((parent, name)) = place
        {
            state.forget(parent, &name);
        }
        answer
    }
}

/// What a power cut could leave at one moment.
pub struct Moment {
    nodes: BTreeMap<u64, Node>,
    names_in_order: bool,
}

/// How much of what is not durable an image has.
#[derive(Clone, Copy)]
enum Luck {
    Nothing,
    Everything,
    /// So many in a hundred.
    Some(u64),
}

impl Luck {
    fn new(random: &mut Random) -> Luck {
        match random.below(8) {
            0 => Luck::Nothing,
            1 => Luck::Everything,
            2 | 3 => Luck::Some(8),
            4 | 5 => Luck::Some(92),
            _ => Luck::Some(50),
        }
    }

    fn has(self, random: &mut Random) -> bool {
        match self {
            Luck::Nothing => false,
            Luck::Everything => true,
            Luck::Some(percent) => random.percent(percent),
        }
    }
}

impl Moment {
    /// One of the images.
    pub fn image(&self, random: &mut Random) -> Image {
        let mut image = Image::default();
        self.add_directory(0, Path::new(""), random, &mut image);
        image
    }

    fn add_directory(&self, id: u64, at: &Path, random: &mut Random, image: &mut Image) {
        let Content::Directory(directory) = &self.nodes[&id].content else { return };
        for (name, node) in names(directory, self.names_in_order, random) {
            let path = at.join(name);
            match &self.nodes[&node].content {
                Content::Directory(_) => {
                    image.0.insert(path.clone(), None);
                    self.add_directory(node, &path, random, image);
                }
                Content::File(file) => {
                    image.0.insert(path, Some(bytes(file, random)));
                }
            }
        }
    }
}

/// A subset of the changes, or a beginning. No file has two names, so a change finds its file wherever it is.
fn names(directory: &Directory, in_order: bool, random: &mut Random) -> BTreeMap<OsString, u64> {
    let mut names = directory.durable.clone();
    let luck = Luck::new(random);
    for change in &directory.changes {
        if !luck.has(random) {
            if in_order {
                break;
            }
            continue;
        }
        match change {
            Change::Linked(name, node) => {
                names.entry(name.clone()).or_insert(*node);
            }
            Change::Removed(node) => names.retain(|_, named| named != node),
            Change::Renamed(name, node) => {
                names.retain(|_, named| named != node);
                names.insert(name.clone(), *node);
            }
        }
    }
    names
}

/// A mixture of what a file was since it was synced.
fn bytes(file: &FileState, random: &mut Random) -> Vec<u8> {
    let Some(newest) = file.looks.last() else { return file.durable.to_vec() };
    let shortest = file.looks.iter().map(|look| look.len()).chain([file.durable.len()]).min().unwrap_or(0);
    let longest = file.looks.iter().map(|look| look.len()).chain([file.durable.len()]).max().unwrap_or(0);
    let len = match random.below(8) {
        0 => shortest,
        1 => file.durable.len(),
        2 => shortest + random.index((longest - shortest) / SECTOR + 1) * SECTOR,
        3 => file.looks[random.index(file.looks.len())].len(),
        _ => newest.len(),
    };
    let piece = random.pick(&[SECTOR, PAGE]);
    let (is_reached, is_newest) = (Luck::new(random), Luck::new(random));
    let mut bytes = vec![0; len];
    for start in (0..len).step_by(piece) {
        let end = (start + piece).min(len);
        let from = if !is_reached.has(random) {
            &file.durable
        } else if is_newest.has(random) {
            newest
        } else {
            &file.looks[random.index(file.looks.len())]
        };
        if start < from.len() {
            let end = end.min(from.len());
            bytes[start..end].copy_from_slice(&from[start..end]);
        }
    }
    bytes
}

/// Files, with their bytes, and directories, by path.
#[derive(Clone, Default)]
pub struct Image(pub BTreeMap<PathBuf, Option<Vec<u8>>>);

impl Image {
    fn write(&self, root: &Path) {
        for (path, bytes) in &self.0 {
            match bytes {
                None => fs::create_dir(root.join(path)).unwrap(),
                Some(bytes) => fs::write(root.join(path), bytes).unwrap(),
            }
        }
    }

    /// The bytes of a file, if it is there.
    pub fn file(&self, path: impl AsRef<Path>) -> Option<&[u8]> {
        self.0.get(path.as_ref())?.as_deref()
    }
}
