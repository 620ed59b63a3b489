//! The half of a TCP connection that receives.
//!
//! Receiving goes through a buffer that takes headers and small frames, many at a time; what of a larger body is not in
//! the buffer yet is read straight into the caller's memory, and the same system call takes what is behind it into the
//! buffer.
//!
//! A stream on which nothing but signs of life comes has a small buffer. It gets a large one when some reads in a row
//! have found more than that takes, and loses it when so little came for a number of reads that the small one would
//! have done. One large frame now and then needs none: most of it does not go through the buffer.

use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::{MSG_DONTWAIT, Shared};
use crate::error::{Error, Result};
use crate::limits::{FRAME_HEADER_LEN, MAX_CONTROL_LEN, QUIET_RECEIVE_BUFFER_LEN, RECEIVE_BUFFER_LEN};
use crate::transport::{
    FrameReceiver, closed_by_peer, closed_here, misused, receive_error, receive_timed_out, refuse_zero_timeout,
};
use crate::wire::{BodyCheck, FrameHeader};

/// Reads in a row that took the small buffer to its end, after which there is a large one.
const FULL_READS: u32 = 4;
/// Reads in a row that the small buffer would have taken whole, after which it is enough again.
const QUIET_READS: u32 = 8;
/// How often a receiver that waits looks whether its stream was closed here: on Windows, where shutting a socket down
/// wakes nobody who waits for its bytes already.
const LOOK_EVERY: Option<Duration> = if cfg!(windows) { Some(Duration::from_millis(100)) } else { None };

pub(super) struct TcpReceiver {
    socket: Arc<Shared>,
    /// Bytes `start..end` have been read and not been received.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Reads in a row that the small buffer would have taken.
    quiet_reads: u32,
    /// Reads in a row that took the buffer to its end.
    full_reads: u32,
    /// The current frame, and how many bytes of its body have not been received.
    frame: Option<BodyCheck>,
    left: u32,
    /// A `receive_exact` that timed out: the length asked for, and how much of it is filled.
    unfinished: Option<(usize, usize)>,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    spin: bool,
    /// [`LOOK_EVERY`], but in tests.
    look_every: Option<Duration>,
}

impl TcpReceiver {
    pub(super) fn new(socket: Arc<Shared>, spin: bool) -> TcpReceiver {
        TcpReceiver {
            socket,
            buffer: buffer_of(QUIET_RECEIVE_BUFFER_LEN),
            start: 0,
            end: 0,
            quiet_reads: 0,
            full_reads: 0,
            frame: None,
            left: 0,
            unfinished: None,
            timeout: None,
            deadline: None,
            spin: spin && MSG_DONTWAIT.is_some(),
            look_every: LOOK_EVERY,
        }
    }

    fn buffered(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Waits until at least `len` bytes, no more than the buffer holds, are buffered.
    fn buffer_at_least(&mut self, len: usize) -> Result<()> {
        if len > self.buffer.len() {
            self.resize_buffer(RECEIVE_BUFFER_LEN);
        } else if self.start == self.end && self.quiet_reads >= QUIET_READS && len <= QUIET_RECEIVE_BUFFER_LEN {
            self.resize_buffer(QUIET_RECEIVE_BUFFER_LEN);
        } else if self.start + len > self.buffer.len() || self.start == self.end {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        while self.end - self.start < len {
            self.arm()?;
            self.wait_readable()?;
            match (&self.socket.stream).read(&mut self.buffer[self.end..]) {
                Ok(0) => return Err(self.ended(0)),
                Ok(read) => {
                    self.end += read;
                    self.fit_buffer(read);
                }
                Err(error) => self.judge(error)?,
            }
        }
        Ok(())
    }

    /// After a read that put so many bytes into the buffer: one that it took to its end left more behind, most likely.
    fn fit_buffer(&mut self, read: usize) {
        self.quiet_reads = if read < QUIET_RECEIVE_BUFFER_LEN { self.quiet_reads.saturating_add(1) } else { 0 };
        self.full_reads = if self.end == self.buffer.len() { self.full_reads.saturating_add(1) } else { 0 };
        if self.full_reads >= FULL_READS && self.buffer.len() < RECEIVE_BUFFER_LEN {
            self.resize_buffer(RECEIVE_BUFFER_LEN);
        }
    }

    /// Moves what is buffered into a buffer of another length, in which it has room.
    #[cold]
    fn resize_buffer(&mut self, len: usize) {
        let buffered = self.start..self.end;
        (self.quiet_reads, self.full_reads) = (0, 0);
        if self.buffer.len() == len {
            self.buffer.copy_within(buffered.clone(), 0);
        } else {
            let mut other = buffer_of(len);
            other[..buffered.len()].copy_from_slice(&self.buffer[buffered.clone()]);
            self.buffer = other;
        }
        (self.start, self.end) = (0, buffered.len());
    }

    /// Lets the next read wait no longer than until the deadline, if there is one.
    fn arm(&self) -> Result<()> {
        let Some(deadline) = self.deadline else { return Ok(()) };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(receive_timed_out(&self.socket.peer));
        }
        let wait = self.timeout.map_or(left, |timeout| timeout.min(left));
        let set = self.socket.stream.set_read_timeout(Some(wait));
        set.map_err(Error::network("set the time-out for", &self.socket.peer))
    }

    /// Fills `into` behind its first `filled` bytes, keeping count in `filled`.
    fn fill(&mut self, into: &mut [u8], filled: &mut usize) -> Result<()> {
        let take = (self.end - self.start).min(into.len() - *filled);
        into[*filled..*filled + take].copy_from_slice(&self.buffer[self.start..self.start + take]);
        self.start += take;
        *filled += take;
        while *filled < into.len() {
            // Here the buffer is empty: what arrives behind the bytes asked for goes there, with the same call.
            self.arm()?;
            self.wait_readable()?;
            let room = into.len() - *filled;
            let mut parts = [IoSliceMut::new(&mut into[*filled..]), IoSliceMut::new(&mut self.buffer[..])];
            match (&self.socket.stream).read_vectored(&mut parts) {
                Ok(0) => return Err(self.ended(*filled)),
                Ok(read) => {
                    *filled += read.min(room);
                    (self.start, self.end) = (0, read.saturating_sub(room));
                    self.fit_buffer(self.end);
                }
                Err(error) => self.judge(error)?,
            }
        }
        Ok(())
    }

    /// What a failed read means; interruptions mean nothing.
    fn judge(&self, error: io::Error) -> Result<()> {
        match error.kind() {
            io::ErrorKind::Interrupted => Ok(()),
            _ if self.socket.is_closed_here() => Err(closed_here("receive from", &self.socket.peer)),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                if self.timeout.is_some() || self.deadline.is_some() =>
            {
                Err(receive_timed_out(&self.socket.peer))
            }
            _ => Err(receive_error(&self.socket.peer, error)),
        }
    }

    /// The stream has ended: by whom, and where, with `filled` bytes in the caller's memory already.
    fn ended(&self, filled: usize) -> Error {
        let peer = &self.socket.peer;
        if self.socket.is_closed_here() {
            return closed_here("receive from", peer);
        }
        let buffered = self.end - self.start + filled;
        let text = match self.frame.as_ref().map(BodyCheck::header) {
            Some(frame) if self.left > 0 => {
                format!(
                    "closed by peer in the middle of a {} frame, with {} of {} bytes still to come",
                    frame.kind,
                    (self.left as usize).saturating_sub(buffered),
                    frame.len
                )
            }
            _ if buffered > 0 => format!("closed by peer in the middle of a frame header, after {buffered} bytes"),
            _ => return closed_by_peer(peer),
        };
        receive_error(peer, io::Error::new(io::ErrorKind::ConnectionAborted, text))
    }

    /// Where spinning was asked for, or nothing wakes a read that blocks: returns when a read will not block. Elsewhere
    /// at once.
    fn wait_readable(&self) -> Result<()> {
        match self.look_every {
            _ if self.spin => self.wait_spinning(),
            Some(every) => self.wait_looking(every),
            None => Ok(()),
        }
    }

    /// By looking at the bytes and not by reading them: they are still there after a call that was given up.
    fn wait_looking(&self, every: Duration) -> Result<()> {
        let timed_out = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let until = timed_out.into_iter().chain(self.deadline).min();
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(receive_timed_out(&self.socket.peer));
            }
            let set = self.socket.stream.set_read_timeout(Some(left.map_or(every, |left| left.min(every))));
            set.map_err(Error::network("set the time-out for", &self.socket.peer))?;
            match self.socket.stream.peek(&mut [0]) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                // Bytes, the end, or an error that the read will tell.
                _ => return Ok(()),
            }
            if self.socket.is_closed_here() {
                return Err(closed_here("receive from", &self.socket.peer));
            }
        }
    }

    fn wait_spinning(&self) -> Result<()> {
        let timed_out = self.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let until = timed_out.into_iter().chain(self.deadline).min();
        loop {
            match peek(&self.socket.stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Bytes, the end, or an error that the read will tell.
                _ => return Ok(()),
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err(receive_timed_out(&self.socket.peer));
            }
            // Others may be spinning too, on no more processors than there are.
            std::thread::yield_now();
        }
    }

    fn misused(&self, asked: &str) -> Error {
        misused(self.frame.as_ref().map(|frame| frame.header().kind), self.left, asked)
    }
}

/// Not by way of the stack, whose pages a receiver that waits would then keep.
fn buffer_of(len: usize) -> Box<[u8]> {
    vec![0; len].into_boxed_slice()
}

/// Whether a byte is there (1), or the end of the stream (0), without blocking and without taking it.
fn peek(stream: &TcpStream) -> io::Result<usize> {
    const MSG_PEEK: i32 = 2;
    match MSG_DONTWAIT {
        Some(flag) => SockRef::from(stream).recv_with_flags(&mut [MaybeUninit::uninit()], MSG_PEEK | flag),
        None => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Checks the next bytes of a body, as far as the frame's checksum covers them.
fn check(frame: Option<&mut BodyCheck>, bytes: &[u8], peer: &str) -> Result<()> {
    frame.map_or(Ok(()), |frame| frame.take(bytes)).map_err(|error| error.from_peer(peer))
}

impl FrameReceiver for TcpReceiver {
    fn receive_header(&mut self) -> Result<FrameHeader> {
        if self.left > 0 {
            return Err(self.misused("receive the next frame"));
        }
        self.buffer_at_least(FRAME_HEADER_LEN)?;
        let Some(bytes) = self.buffered().first_chunk() else { return Err(self.misused("receive a header")) };
        let header = FrameHeader::decode(bytes).map_err(|error| error.from_peer(&self.socket.peer))?;
        self.start += FRAME_HEADER_LEN;
        self.frame = Some(BodyCheck::new(header));
        self.left = header.len;
        Ok(header)
    }

    fn receive_exact(&mut self, into: &mut [u8]) -> Result<()> {
        let (asked, mut filled) = self.unfinished.unwrap_or((into.len(), 0));
        let Some(left) = u32::try_from(asked).ok().and_then(|asked| self.left.checked_sub(asked)) else {
            return Err(self.misused(&format!("receive {asked} bytes")));
        };
        if asked != into.len() {
            return Err(self.misused(&format!("receive {} bytes while {asked} are half received", into.len())));
        }
        let result = self.fill(into, &mut filled);
        if result.is_err() {
            self.unfinished = Some((asked, filled));
            return result;
        }
        self.unfinished = None;
        self.left = left;
        check(self.frame.as_mut(), into, &self.socket.peer)
    }

    fn receive_body(&mut self) -> Result<&[u8]> {
        let len = self.left as usize;
        if self.left > MAX_CONTROL_LEN || self.unfinished.is_some() {
            return Err(self.misused("receive a body as a message"));
        }
        if len == 0 {
            return Ok(&[]);
        }
        self.buffer_at_least(len)?;
        let start = self.start;
        self.start += len;
        self.left = 0;
        let body = &self.buffer[start..start + len];
        check(self.frame.as_mut(), body, &self.socket.peer)?;
        Ok(body)
    }

    fn remaining(&self) -> u32 {
        self.left
    }

    fn current(&self) -> Option<FrameHeader> {
        self.frame.as_ref().map(BodyCheck::header).filter(|_| self.left > 0)
    }

    fn has_buffered(&self) -> bool {
        self.start < self.end || peek(&self.socket.stream).is_ok_and(|bytes| bytes > 0)
    }

    fn has_whole(&self) -> bool {
        let len = if self.left > 0 { self.left as usize } else { FRAME_HEADER_LEN };
        self.end - self.start >= len
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<()> {
        refuse_zero_timeout(timeout)?;
        if timeout != self.timeout {
            // Spinning looks at the time itself, and its reads never block.
            let set = self.socket.stream.set_read_timeout(timeout);
            set.map_err(Error::network("set the time-out for", &self.socket.peer))?;
            self.timeout = timeout;
        }
        Ok(())
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) -> Result<()> {
        self.deadline = deadline;
        if deadline.is_none() {
            // Each wait was cut short to what was left; now the whole time-out counts again.
            let set = self.socket.stream.set_read_timeout(self.timeout);
            set.map_err(Error::network("set the time-out for", &self.socket.peer))?;
        }
        Ok(())
    }

    fn peer(&self) -> &str {
        &self.socket.peer
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::error::RefusalCode;
    use crate::transport::TcpTransport;
    use crate::types::Lsn;
    use crate::wire::{ErrorMessage, Message, Sync};

    #[test]
    fn the_buffer_is_large_only_while_much_arrives() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, peer) = listener.accept().unwrap();
        let mut sending = TcpTransport::default().connection(near, "there".to_owned());
        let shared = Shared { stream, peer: peer.to_string(), closed: AtomicBool::new(false) };
        let mut receiver = TcpReceiver::new(Arc::new(shared), false);
        let mut exchange = |receiver: &mut TcpReceiver, message: &Message| {
            sending.sender.send_message(message).unwrap();
            assert_eq!(receiver.receive_message().unwrap(), *message);
        };
        let little = Message::Sync(Sync { lsn: Lsn(7) });
        let much = Message::Error(ErrorMessage::new(RefusalCode::Internal, "x".repeat(2 * QUIET_RECEIVE_BUFFER_LEN)));
        for _ in 0..3 {
            exchange(&mut receiver, &little);
            assert_eq!(receiver.buffer.len(), QUIET_RECEIVE_BUFFER_LEN);
            exchange(&mut receiver, &much);
            assert_eq!(receiver.buffer.len(), RECEIVE_BUFFER_LEN);
            // Each takes one read at least, and the buffer changes before the read that follows.
            (0..=QUIET_READS).for_each(|_| exchange(&mut receiver, &little));
            exchange(&mut receiver, &little);
        }
    }

    #[test]
    fn what_is_buffered_survives_a_change_of_buffers() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, peer) = listener.accept().unwrap();
        let mut sending = TcpTransport::default().connection(near, "there".to_owned());
        let shared = Shared { stream, peer: peer.to_string(), closed: AtomicBool::new(false) };
        let mut receiver = TcpReceiver::new(Arc::new(shared), false);
        // So many at once that the small buffer ends within a frame, again and again.
        let messages: Vec<_> = (1..200).map(|lsn| Message::Sync(Sync { lsn: Lsn(lsn) })).collect();
        for _ in 0..5 {
            messages.iter().for_each(|message| sending.sender.send_message(message).unwrap());
            for message in &messages {
                assert_eq!(receiver.receive_message().unwrap(), *message);
            }
        }
    }

    /// What breaks: a stream is closed, and who waits for its bytes is not woken, as on Windows. How: the socket is not
    /// shut down here. What prevents harm: whoever waits looks now and then.
    #[test]
    fn a_receiver_that_nothing_wakes_sees_that_its_stream_was_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, peer) = listener.accept().unwrap();
        let mut sending = TcpTransport::default().connection(near, "there".to_owned());
        let shared = Arc::new(Shared { stream, peer: peer.to_string(), closed: AtomicBool::new(false) });
        let mut receiver = TcpReceiver::new(Arc::clone(&shared), false);
        receiver.look_every = Some(Duration::from_millis(2));
        let message = Message::Sync(Sync { lsn: Lsn(7) });
        std::thread::scope(|scope| {
            let receiving = scope.spawn(|| {
                receiver.set_timeout(Some(Duration::from_millis(10))).unwrap();
                let error = receiver.receive_header().unwrap_err();
                assert!(error.is_timeout(), "{error}");
                receiver.set_timeout(None).unwrap();
                assert_eq!(receiver.receive_message().unwrap(), message);
                receiver.receive_header().unwrap_err()
            });
            std::thread::sleep(Duration::from_millis(50));
            sending.sender.send_message(&message).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            shared.closed.store(true, std::sync::atomic::Ordering::SeqCst);
            let error = receiving.join().unwrap();
            assert!(error.to_string().contains("closed on this side"), "{error}");
        });
    }
}
