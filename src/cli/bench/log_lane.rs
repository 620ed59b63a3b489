//! A bare log lane, to run beside a bare base: records are appended at one end and streamed to the other, and where the
//! log is to be worth as much as Towline's, synced and then applied at both.
//!
//! Each end has a log file that is written over again and again, and waits where its applier has not made room. That is
//! the least that can be done; but who appends waits for the slowest of all then. Where the logs are *kept*, they grow,
//! nobody who appends waits for anybody, and a thread of its own sends what is there: as where a follower may be far
//! behind. Everything goes through files, a piece at a time, so that the threads of an end share nothing but two
//! numbers.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::limits;
use super::streams::connect;

/// Pieces that a log file has room for which is not kept.
const ROOM: u64 = 256;

/// When the groups of a load are due.
pub(super) struct Pace {
    every: Option<Duration>,
    due: Instant,
}

impl Pace {
    /// From now on a group of so many whenever `per_second` say so; one behind the other where there is no such number.
    pub(super) fn new(group: u64, per_second: Option<u64>) -> Pace {
        let every = per_second.map(|rate| Duration::from_secs_f64(group as f64 / rate.max(1) as f64));
        Pace { every, due: Instant::now() }
    }

    /// Sleeps until the next one is due.
    pub(super) fn wait(&mut self) {
        if let Some(every) = self.every {
            self.due += every;
            std::thread::sleep(self.due.saturating_duration_since(Instant::now()));
        }
    }
}

/// The log's two ends.
pub(super) struct LogLane {
    directory: PathBuf,
    near: File,
    far: File,
    /// One record of it.
    record: Vec<u8>,
    /// Records of a piece.
    together: u64,
    /// Records that the stores have room for.
    slots: u64,
}

/// What runs beside something else.
#[derive(Clone, Copy, Default)]
pub(super) struct Load<'a> {
    /// Records; as many as it can where there is no such number.
    pub(super) per_second: Option<u64>,
    pub(super) stores: Option<Stores<'a>>,
    /// The logs grow.
    pub(super) is_kept: bool,
}

/// Where both ends apply what they have synced.
#[derive(Clone, Copy)]
pub(super) struct Stores<'a> {
    pub(super) near: &'a File,
    pub(super) far: &'a File,
}

/// What went on while something ran beside the log lane.
#[derive(Debug)]
pub(super) struct Beside {
    /// How long that took. What the lane had left to do then is not in it.
    pub(super) took: Duration,
    /// Records appended.
    pub(super) appended: u64,
    /// Records appended when it ended that the other end had not received, or applied where there are stores.
    pub(super) behind: u64,
}

impl LogLane {
    pub(super) fn new(directory: &Path, record: Vec<u8>, together: u64, slots: u64) -> io::Result<LogLane> {
        let piece_len = limits::slot_len(record.len()) * usize::try_from(together).unwrap_or_default();
        let len = piece_len * usize::try_from(ROOM).unwrap_or_default();
        let near = limits::zeroed_file(&directory.join("near-log"), len)?;
        let far = limits::zeroed_file(&directory.join("far-log"), len)?;
        Ok(LogLane { directory: directory.to_owned(), near, far, record, together, slots })
    }

    /// Appends and streams while `work` runs. Returns when what was appended until then is at the other end, and
    /// applied at both if there are `stores`; with logs that are kept, at once.
    pub(super) fn beside(&self, load: Load<'_>, work: impl FnOnce() -> io::Result<()>) -> io::Result<Beside> {
        let kept = ["kept-near", "kept-far"].map(|name| self.directory.join(name));
        let kept_files = match load.is_kept {
            true => Some((new_file(&kept[0])?, new_file(&kept[1])?)),
            false => None,
        };
        let (near_log, far_log) = kept_files.as_ref().map_or((&self.near, &self.far), |(near, far)| (near, far));
        let room = if load.is_kept { u64::MAX } else { ROOM };
        let near_store = load.stores.map(|stores| stores.near);
        let near = End { log: near_log, room, store: near_store, progress: Progress::default() };
        let far_store = load.stores.map(|stores| stores.far);
        let far = End { log: far_log, room, store: far_store, progress: Progress::default() };
        let (near_stream, far_stream) = connect()?;
        let over = AtomicBool::new(false);
        let is_over = || load.is_kept && over.load(Ordering::Relaxed);
        let beside = std::thread::scope(|scope| {
            let appending = scope.spawn(|| {
                let appended = self.append_until(&over, load, &near, &near_stream);
                near.progress.end();
                // Also after a failure, so that the other end hears of it. Kept logs have a thread that sends.
                let ended = if load.is_kept { Ok(()) } else { near_stream.shutdown(Shutdown::Write) };
                ended.and(appended)
            });
            let sending = load.is_kept.then(|| {
                scope.spawn(|| self.send(is_over, &near, &near_stream).and(near_stream.shutdown(Shutdown::Write)))
            });
            let receiving = scope.spawn(|| {
                let received = self.receive(&far, &far_stream);
                far.progress.end();
                // Also after a failure, so that the other end does not wait for it.
                received.and(far_stream.shutdown(Shutdown::Both))
            });
            let applying = [&near, &far].map(|end| {
                scope.spawn(|| {
                    let applied = self.apply(is_over, end);
                    end.progress.end();
                    applied
                })
            });
            let began = Instant::now();
            let done = work();
            let took = began.elapsed();
            let behind = near.progress.written().saturating_sub(far.arrived()) * self.together;
            over.store(true, Ordering::Relaxed);
            let panicked = |_| io::Error::other("a thread of a bare log panicked");
            let appended = appending.join().map_err(panicked)?;
            for ended in [sending, Some(receiving)].into_iter().flatten().chain(applying) {
                ended.join().map_err(panicked)??;
            }
            done?;
            Ok(Beside { took, appended: appended?, behind })
        });
        drop(kept_files);
        if load.is_kept {
            kept.iter().try_for_each(std::fs::remove_file)?;
        }
        beside
    }

    fn piece(&self) -> Vec<u8> {
        vec![0; limits::slot_len(self.record.len()) * usize::try_from(self.together).unwrap_or_default()]
    }

    fn append_until(
        &self,
        over: &AtomicBool,
        load: Load<'_>,
        end: &End<'_>,
        mut stream: &TcpStream,
    ) -> io::Result<u64> {
        let mut piece = self.piece();
        let mut pace = Pace::new(self.together, load.per_second);
        let mut appended = 0;
        while !over.load(Ordering::Relaxed) {
            limits::append(&mut piece, &self.record, self.together);
            end.write(&piece)?;
            if !load.is_kept {
                stream.write_all(&piece)?;
            }
            appended += self.together;
            pace.wait();
        }
        Ok(appended)
    }

    /// Sends what is in the log.
    fn send(&self, is_over: impl Fn() -> bool, end: &End<'_>, mut stream: &TcpStream) -> io::Result<()> {
        let mut piece = self.piece();
        let mut sent = 0;
        while let Some(written) = end.progress.wait_for_more(sent) {
            while sent < written && !is_over() {
                end.read(&mut piece, sent)?;
                stream.write_all(&piece)?;
                sent += 1;
            }
            if is_over() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn receive(&self, end: &End<'_>, mut stream: &TcpStream) -> io::Result<()> {
        let mut piece = self.piece();
        loop {
            match stream.read_exact(&mut piece) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            }
            std::hint::black_box(crc32fast::hash(&piece));
            end.write(&piece)?;
        }
    }

    /// Syncs what has been written since the last time, and then puts each record into its slot, all over the store.
    fn apply(&self, is_over: impl Fn() -> bool, end: &End<'_>) -> io::Result<()> {
        let Some(store) = end.store else { return Ok(()) };
        let mut piece = self.piece();
        let mut applied = 0;
        while let Some(written) = end.progress.wait_for_more(applied) {
            end.log.sync_data()?;
            for number in applied..written {
                if is_over() {
                    return Ok(());
                }
                end.read(&mut piece, number)?;
                let records = piece.chunks_exact(limits::slot_len(self.record.len()));
                for (count, record) in (number * self.together..).zip(records) {
                    let slot = super::rebuild::scattered(count, self.slots);
                    let record = limits::record_in(record, self.record.len());
                    limits::write_at(store, record, slot * record.len() as u64)?;
                }
                end.progress.set_applied(number + 1);
            }
            applied = written;
        }
        Ok(())
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(true).open(path)
}

struct End<'a> {
    log: &'a File,
    /// Pieces after which the log begins anew.
    room: u64,
    store: Option<&'a File>,
    progress: Progress,
}

impl End<'_> {
    /// Pieces that are where they are to be.
    fn arrived(&self) -> u64 {
        let marks = self.progress.marks.lock();
        if self.store.is_some() { marks.applied } else { marks.written }
    }

    /// Writes one more piece, once there is room for it.
    fn write(&self, piece: &[u8]) -> io::Result<()> {
        let waits = self.store.is_some();
        let number = if waits { self.progress.wait_for_room(self.room)? } else { self.progress.written() };
        limits::write_at(self.log, piece, number % self.room * piece.len() as u64)?;
        self.progress.set_written(number + 1);
        Ok(())
    }

    fn read(&self, piece: &mut [u8], number: u64) -> io::Result<()> {
        let place = number % self.room * piece.len() as u64;
        limits::read_at(self.log, piece, place)
    }
}

/// How many pieces an end has written, and how many of them it has applied.
#[derive(Default)]
struct Progress {
    marks: Mutex<Marks>,
    changed: Condvar,
}

#[derive(Default)]
struct Marks {
    written: u64,
    applied: u64,
    /// One of the end's threads has ended.
    is_over: bool,
}

impl Progress {
    fn written(&self) -> u64 {
        self.marks.lock().written
    }

    fn set_written(&self, written: u64) {
        self.marks.lock().written = written;
        self.changed.notify_all();
    }

    fn set_applied(&self, applied: u64) {
        self.marks.lock().applied = applied;
        self.changed.notify_all();
    }

    fn end(&self) {
        self.marks.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Waits until a piece can be written over. Gives the number of the next one.
    fn wait_for_room(&self, room: u64) -> io::Result<u64> {
        let mut marks = self.marks.lock();
        while marks.written - marks.applied >= room {
            if marks.is_over {
                return Err(io::Error::other("nothing is applied any more"));
            }
            self.changed.wait(&mut marks);
        }
        Ok(marks.written)
    }

    /// Waits until more than `applied` is written. Gives how much; none once that is all.
    fn wait_for_more(&self, applied: u64) -> Option<u64> {
        let mut marks = self.marks.lock();
        while marks.written <= applied && !marks.is_over {
            self.changed.wait(&mut marks);
        }
        (marks.written > applied).then_some(marks.written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_is_at_both_ends_and_applied_there() {
        let directory = tempfile::tempdir().unwrap();
        let record = vec![3; 100];
        let lane = LogLane::new(directory.path(), record.clone(), 4, 10).unwrap();
        let store = || tempfile::tempfile().unwrap();
        let (near, far) = (store(), store());
        for stores in [None, Some(Stores { near: &near, far: &far })] {
            let load = Load { per_second: Some(40_000), stores, is_kept: false };
            // However long it takes here to append so many.
            let has_appended = |millis: u64| {
                let mut begun = 0;
                let beside = lane.beside(load, || {
                    begun += 1;
                    std::thread::sleep(Duration::from_millis(millis));
                    Ok(())
                });
                let Beside { took, appended, behind } = beside.unwrap();
                assert!(behind <= appended && begun == 1 && took >= Duration::from_millis(millis));
                appended >= 4
            };
            assert!([20, 500, 10_000].into_iter().any(has_appended));
        }
        let logs = ["near-log", "far-log"].map(|name| std::fs::read(directory.path().join(name)).unwrap());
        assert!(logs[0] == logs[1] && logs[0].contains(&3));
        for mut applied in [&near, &far] {
            let mut bytes = Vec::new();
            std::io::Seek::rewind(&mut applied).unwrap();
            applied.read_to_end(&mut bytes).unwrap();
            assert!(bytes.chunks(100).any(|slot| slot == record));
        }
        let stores = Some(Stores { near: &near, far: &far });
        let kept = Load { stores, is_kept: true, ..Load::default() };
        // However long it takes here to append more than there would be room for.
        let goes_past_its_room = |millis: u64| {
            let beside = lane.beside(kept, || {
                std::thread::sleep(Duration::from_millis(millis));
                Ok(())
            });
            let Beside { appended, behind, .. } = beside.unwrap();
            assert!(behind <= appended);
            appended > ROOM * 4
        };
        assert!([20, 500, 10_000].into_iter().any(goes_past_its_room), "nobody waits for room");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2, "kept no longer than it takes");
        let failed = lane.beside(Load::default(), || Err(io::Error::other("the base")));
        assert_eq!(failed.unwrap_err().to_string(), "the base");
    }
}
