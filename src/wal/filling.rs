//! A file that gets its zeros: from the preparing thread, and from a writer that would otherwise wait for it.
//!
//! Whoever fills claims the next step, so that two threads fill different parts of the file at the same time. Where
//! appends come faster than one thread can make zeros for them, the writer would otherwise sleep until that has filled
//! a segment, with a processor free.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::allocate::allocate;
use crate::error::{Error, Result};
use crate::limits::PAGE_LEN;
use crate::wal::mapping::Mapping;
use crate::wal::segment::{MAX_ZERO_PIECE, zero_in_pieces};

/// Bytes that are claimed at once.
const STEP: u64 = 1 << 20;

/// How a part of it is filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Manner {
    /// Bytes of zeros that are written at once.
    pub(super) piece_len: u64,
    /// Whether the pages of a new file are made ready for stores too.
    pub(super) touches: bool,
}

/// The file.
pub(super) struct Filling {
    path: PathBuf,
    file: File,
    mapping: Mapping,
    len: u64,
    is_new: bool,
    /// Whether a part was filled in a manner that leaves pages alone.
    is_untouched: AtomicBool,
    /// Held by whoever writes zeros. The file system lets one thread write to a file, and whoever waits for that spins:
    /// this has the threads take turns, one writing while the other makes pages ready.
    zeroing: Mutex<()>,
    /// The first byte that nobody has claimed. Moved by whoever fills. Relaxed: it gives out each step once, and who
    /// wants to know that all is filled learns it under a lock from those who did.
    next: AtomicU64,
    /// Parts that were claimed and are not filled: none in the end, unless somebody panicked.
    claimed: AtomicUsize,
    /// Why a step failed first.
    failure: Mutex<Option<Error>>,
}

impl Filling {
    /// Makes or opens the file at `path`, with a length of `len` bytes, to be filled. That it has this name is on
    /// stable storage if it is not new: after a power cut, no file may have an old name and other bytes.
    pub(super) fn new(path: &Path, len: u64) -> Result<Filling> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(Error::io("create", path))?;
        let is_new = file.metadata().map_err(Error::io("look at", path))?.len() != len;
        if is_new {
            file.set_len(0).and_then(|()| file.set_len(len)).map_err(Error::io("resize", path))?;
            allocate(&file, 0..len);
        }
        let mapping = Mapping::new(&file, len).map_err(Error::io("map", path))?;
        Ok(Filling {
            path: path.to_owned(),
            file,
            mapping,
            len,
            is_new,
            is_untouched: AtomicBool::new(false),
            zeroing: Mutex::default(),
            next: AtomicU64::new(0),
            claimed: AtomicUsize::new(0),
            failure: Mutex::default(),
        })
    }

    /// Whether it held nothing before.
    pub(super) fn is_new(&self) -> bool {
        self.is_new
    }

    /// Whether there is a part that nobody has claimed.
    pub(super) fn is_left(&self) -> bool {
        self.next.load(Ordering::Relaxed) < self.len
    }

    /// Fills a part that nobody else fills. False if there is none left, or what is left is not worth filling, because
    /// a part could not be filled.
    pub(super) fn step(&self, manner: Manner) -> bool {
        let at = self.next.fetch_add(STEP, Ordering::Relaxed);
        if at >= self.len {
            return false;
        }
        self.claimed.fetch_add(1, Ordering::Relaxed);
        let filled = self.fill(at..(at + STEP).min(self.len), manner);
        self.claimed.fetch_sub(1, Ordering::Relaxed);
        if let Err(error) = filled {
            self.next.fetch_max(self.len, Ordering::Relaxed);
            self.failure.lock().get_or_insert(error);
            return false;
        }
        true
    }

    fn fill(&self, range: Range<u64>, Manner { piece_len, touches }: Manner) -> Result<()> {
        if !touches {
            self.is_untouched.store(true, Ordering::Relaxed);
        }
        let touches = self.is_new && touches;
        // Page by page, a new file gets its zeros by having its pages touched: one pass, and they are ready for stores
        // after it. Where that is not possible, for want of room say, writing zeros tells why. Where nothing is stored,
        // a write makes no more of a piece dirty than it writes, however long that is: a sync of 16 KiB takes a tenth
        // less where its pages are one folio. What is stored all the same, a short batch among long ones say, has the
        // next sync write its whole piece.
        let piece_len = if self.is_new && !touches { MAX_ZERO_PIECE } else { piece_len };
        let in_pieces = piece_len > PAGE_LEN;
        if in_pieces || !touches || !self.mapping.populate(range.clone()) {
            let _turn = self.zeroing.lock();
            zero_in_pieces(&self.file, range.clone(), piece_len).map_err(Error::io("fill", &self.path))?;
        }
        if in_pieces && touches {
            self.mapping.populate(range);
        }
        Ok(())
    }

    /// What has been made, once all who filled it have ended.
    ///
    /// # Errors
    ///
    /// Why a part of it was not filled.
    pub(super) fn finish(self: Arc<Self>) -> Result<Filled> {
        let (path, claimed) = (self.path.clone(), self.claimed.load(Ordering::Relaxed));
        let refused = |reason| Error::io("take into use", path)(std::io::Error::other(reason));
        let Some(this) = Arc::into_inner(self) else { return Err(refused("somebody still fills it")) };
        match this.failure.into_inner() {
            Some(error) => Err(error),
            None if claimed > 0 => Err(refused("who was to fill a part of it has not")),
            None => Ok(Filled { file: this.file, mapping: this.mapping, is_touched: !this.is_untouched.into_inner() }),
        }
    }
}

/// A file that is full of zeros, unless nobody needed them.
pub(super) struct Filled {
    pub(super) file: File,
    pub(super) mapping: Mapping,
    /// Whether all of it was filled in a manner for stores. The pages of a new file are ready for them then, where that
    /// is possible.
    pub(super) is_touched: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits;

    const LEN: u64 = 5 * STEP + 3 * PAGE_LEN;
    const MANNERS: [Manner; 4] = [
        Manner { piece_len: PAGE_LEN, touches: true },
        Manner { piece_len: PAGE_LEN, touches: false },
        Manner { piece_len: 64 << 10, touches: true },
        Manner { piece_len: 64 << 10, touches: false },
    ];

    #[test]
    fn several_fill_a_file_and_nothing_of_what_it_held_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for (manner, held) in MANNERS.into_iter().flat_map(|manner| [(manner, 0), (manner, LEN), (manner, LEN + 1)]) {
            std::fs::write(&path, vec![7; limits::index(held)]).unwrap();
            let filling = Arc::new(Filling::new(&path, LEN).unwrap());
            assert_eq!(filling.is_new(), held != LEN);
            let steps = std::thread::scope(|scope| {
                let fill = || (0..).take_while(|_| filling.step(manner)).count();
                let others = [scope.spawn(fill), scope.spawn(fill)];
                fill() + others.map(|other| other.join().unwrap()).iter().sum::<usize>()
            });
            assert_eq!(steps as u64, LEN.div_ceil(STEP), "each part is filled by one of them");
            assert!(!filling.is_left());
            assert_eq!(filling.finish().unwrap().is_touched, manner.touches);
            assert!(std::fs::read(&path).unwrap() == vec![0; limits::index(LEN)], "{manner:?} over {held} bytes");
        }
    }

    #[test]
    fn after_a_failure_nobody_fills_what_is_left_and_the_reason_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, vec![7; limits::index(LEN)]).unwrap();
        let mut filling = Filling::new(&path, LEN).unwrap();
        filling.file = File::open(&path).unwrap();
        let filling = Arc::new(filling);
        assert!(!filling.step(MANNERS[1]), "it cannot be written");
        assert!(!filling.is_left() && !filling.step(MANNERS[0]));
        assert!(matches!(filling.finish(), Err(Error::Io { path, .. }) if path.ends_with("file")));
    }

    #[test]
    fn a_part_that_was_claimed_and_never_filled_is_found_out() {
        let directory = tempfile::tempdir().unwrap();
        let filling = Arc::new(Filling::new(&directory.path().join("file"), LEN).unwrap());
        assert!(filling.step(MANNERS[0]));
        // As after a panic.
        filling.claimed.fetch_add(1, Ordering::Relaxed);
        while filling.step(MANNERS[0]) {}
        assert!(filling.finish().is_err());
    }

    #[test]
    fn nobody_takes_a_file_into_use_that_another_still_fills() {
        let directory = tempfile::tempdir().unwrap();
        let filling = Arc::new(Filling::new(&directory.path().join("file"), LEN).unwrap());
        let another = Arc::clone(&filling);
        assert!(filling.finish().is_err());
        assert!(another.finish().is_ok());
    }
}
