//! Lines of standard input on their way into the log.
//!
//! A thread of its own reads, so that Ctrl-C need not wait for the next line; the thread that appends owns the writers,
//! so that an interrupt finds nothing half done. As many lines as have arrived are appended together.

use std::io::Read;

use crossbeam_channel::{Receiver, Sender, bounded, select};
use towline::ShutdownSignal;
use towline::wal::LogWriter;

use super::progress::Progress;

/// Bytes read at a time.
const CHUNK: usize = 256 * 1024;

/// Where lines go.
pub(super) trait Appender {
    /// Bytes of the longest line that can be right.
    fn longest(&self) -> usize;

    /// What is wrong with a line, if anything.
    fn check(&self, line: &[u8]) -> Result<(), String>;

    /// Appends lines that were checked, in order, in few batches.
    fn append(&mut self, lines: &[&[u8]]) -> towline::Result<()>;
}

/// What became of the input.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// Lines appended.
    pub(super) lines: u64,
    /// Why reading ended early: a line that is wrong, by number, or a failure. What came before it is appended.
    pub(super) problem: Option<String>,
}

/// Appends the lines of standard input until it ends, a line is wrong, or `stop` is given.
pub(super) fn append_stdin(appender: &mut dyn Appender, stop: &ShutdownSignal) -> std::io::Result<Taken> {
    let (chunks_to, chunks) = bounded(1);
    let longest = appender.longest();
    std::thread::Builder::new()
        .name("tl-stdin".to_owned())
        .spawn(move || read_chunks(&mut std::io::stdin().lock(), longest, &chunks_to))?;
    Ok(append_chunks(appender, &chunks, stop))
}

/// Reads until the end and hands over whole lines, as many as have arrived, without the last line break. A line that
/// grows beyond `longest` is handed over as it is, and nothing after it.
fn read_chunks(input: &mut impl Read, longest: usize, chunks: &Sender<std::io::Result<Vec<u8>>>) {
    let mut buffer = vec![0; CHUNK];
    let mut filled = 0;
    loop {
        if filled == buffer.len() {
            buffer.resize(buffer.len() * 2, 0);
        }
        let read = match input.read(&mut buffer[filled..]) {
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let _ = chunks.send(Err(error));
                return;
            }
        };
        let newest = filled;
        filled += read;
        let last_break = buffer[newest..filled].iter().rposition(|&byte| byte == b'\n').map(|at| newest + at);
        if let Some(end) = last_break {
            let rest = buffer[end + 1..filled].to_vec();
            buffer.truncate(end);
            if chunks.send(Ok(buffer)).is_err() {
                return;
            }
            filled = rest.len();
            buffer = rest;
            buffer.resize(CHUNK.max(filled * 2), 0);
        }
        if read == 0 || filled > longest {
            if filled > 0 {
                buffer.truncate(filled);
                let _ = chunks.send(Ok(buffer));
            }
            return;
        }
    }
}

fn append_chunks(
    appender: &mut dyn Appender,
    chunks: &Receiver<std::io::Result<Vec<u8>>>,
    stop: &ShutdownSignal,
) -> Taken {
    let (stop_to, stopped) = bounded(1);
    let _wake_at_stop = stop.on_shutdown(move || {
        let _ = stop_to.try_send(());
    });
    let mut taken = Taken::default();
    let mut progress = Progress::new("appending", None);
    let mut bytes = 0;
    while taken.problem.is_none() && !stop.is_shutdown() {
        let chunk = select! {
            recv(stopped) -> _ => break,
            recv(chunks) -> chunk => chunk,
        };
        match chunk {
            Ok(Ok(text)) => {
                bytes += text.len() as u64 + 1;
                append_text(appender, &text, &mut taken);
                progress.set(bytes);
            }
            Ok(Err(error)) => taken.problem = Some(format!("cannot read standard input: {error}")),
            Err(_) => break,
        }
    }
    taken
}

/// Appends the lines of a text up to the first that is wrong.
fn append_text(appender: &mut dyn Appender, text: &[u8], taken: &mut Taken) {
    let mut lines = Vec::new();
    for line in text.split(|&byte| byte == b'\n') {
        if let Err(reason) = appender.check(line) {
            taken.problem = Some(format!("line {}: {reason}", taken.lines + lines.len() as u64 + 1));
            break;
        }
        lines.push(line);
    }
    if lines.is_empty() {
        return;
    }
    match appender.append(&lines) {
        Ok(()) => taken.lines += lines.len() as u64,
        Err(error) => taken.problem = Some(error.to_string()),
    }
}

/// Each line is a record; lines go to the shards in turn.
pub(super) struct RecordLines {
    writers: Vec<LogWriter>,
    next: usize,
}

impl RecordLines {
    pub(super) fn new(writers: Vec<LogWriter>) -> RecordLines {
        RecordLines { writers, next: 0 }
    }
}

impl Appender for RecordLines {
    fn longest(&self) -> usize {
        let longest = self.writers.first().map_or(0, |writer| writer.log().max_record_len());
        usize::try_from(longest).unwrap_or(usize::MAX)
    }

    fn check(&self, line: &[u8]) -> Result<(), String> {
        let (len, max) = (line.len(), self.longest());
        if len > max { Err(format!("it has {len} bytes or more, and a record up to {max}")) } else { Ok(()) }
    }

    fn append(&mut self, lines: &[&[u8]]) -> towline::Result<()> {
        let shards = self.writers.len();
        let mut batches = vec![Vec::new(); shards];
        for (at, line) in lines.iter().enumerate() {
            batches[(self.next + at) % shards].push(*line);
        }
        self.next = (self.next + lines.len()) % shards;
        self.writers.iter_mut().zip(&batches).try_for_each(|(writer, batch)| append_in_batches(writer, batch))
    }
}

/// Appends records as few batches, each small enough to leave room in its segment.
pub(super) fn append_in_batches<R: AsRef<[u8]>>(writer: &mut LogWriter, records: &[R]) -> towline::Result<()> {
    let most = writer.log().max_record_len() / 4;
    let mut rest = records;
    while !rest.is_empty() {
        let mut bytes = 0;
        let count = rest.iter().take_while(|record| {
            bytes += record.as_ref().len() as u64 + 4;
            bytes <= most
        });
        let (batch, later) = rest.split_at(count.count().max(1));
        writer.append_batch(batch)?;
        rest = later;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Gives its bytes a few at a time.
    struct Drip<'a>(&'a [u8], usize);

    impl Read for Drip<'_> {
        fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
            let len = self.1.min(self.0.len()).min(to.len());
            to[..len].copy_from_slice(&self.0[..len]);
            self.0 = &self.0[len..];
            Ok(len)
        }
    }

    /// Keeps lines of up to 8 bytes without an `x`.
    #[derive(Default)]
    struct Keep(Vec<Vec<u8>>);

    impl Appender for Keep {
        fn longest(&self) -> usize {
            8
        }
        fn check(&self, line: &[u8]) -> Result<(), String> {
            if line.len() > 8 || line.contains(&b'x') { Err("bad".to_owned()) } else { Ok(()) }
        }
        fn append(&mut self, lines: &[&[u8]]) -> towline::Result<()> {
            self.0.extend(lines.iter().map(|line| line.to_vec()));
            Ok(())
        }
    }

    fn take(text: &[u8], at_a_time: usize) -> (Vec<Vec<u8>>, Taken) {
        let (to, chunks) = crossbeam_channel::unbounded();
        read_chunks(&mut Drip(text, at_a_time), 8, &to);
        drop(to);
        let mut keep = Keep::default();
        let taken = append_chunks(&mut keep, &chunks, &ShutdownSignal::new());
        (keep.0, taken)
    }

    #[test]
    fn lines_come_whole_however_they_arrive() {
        for at_a_time in 1..12 {
            for (text, lines) in [
                (&b""[..], &[][..]),
                (b"\n", &[&b""[..]]),
                (b"a", &[b"a"]),
                (b"a\n", &[b"a"]),
                (b"a\n\nbcd\n", &[b"a", b"", b"bcd"]),
                (b"12345678\n12345678\nrest", &[b"12345678", b"12345678", b"rest"]),
            ] {
                let (kept, taken) = take(text, at_a_time);
                assert_eq!(kept, lines, "{text:?}, {at_a_time} at a time");
                assert_eq!((taken.lines, taken.problem), (lines.len() as u64, None));
            }
        }
    }

    #[test]
    fn a_wrong_line_is_named_and_what_came_before_it_is_kept() {
        for at_a_time in 1..40 {
            let (kept, taken) = take(b"a\nb\nbox\nc\n", at_a_time);
            assert_eq!(kept, [b"a", b"b"]);
            assert_eq!(taken.problem.unwrap(), "line 3: bad");
            let (kept, taken) = take(b"a\n1234567890 and more\nb\n", at_a_time);
            assert_eq!(kept, [b"a"]);
            assert_eq!(taken.problem.unwrap(), "line 2: bad");
        }
    }

    #[test]
    fn a_stop_ends_it() {
        let (_to, chunks) = bounded(1);
        let stop = ShutdownSignal::new();
        stop.shutdown();
        assert_eq!(append_chunks(&mut Keep::default(), &chunks, &stop).lines, 0);
    }
}
