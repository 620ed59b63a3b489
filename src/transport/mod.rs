//! Streams between nodes: how frames get from one to the other.
//!
//! A [`Transport`] gives [`Connection`]s. A connection has two halves for two threads, one that sends frames and one
//! that receives them, and a [`Closer`] that ends both from any thread. There are two transports with the same
//! behaviour: [`TcpTransport`] over blocking sockets, and [`InProcessTransport`] over bounded channels that carry
//! references to the mapped log.
//!
//! # Rules for both halves
//!
//! - A frame is received in two steps: its header, then its body, into memory that the caller chooses. So log bytes go
//!   from the socket to the mapped segment, and nothing is allocated by a number that a peer chose.
//! - A receiver checks what the frame's checksum [covers](crate::wire::frame): a call that gives the last byte of it
//!   has found it sound, and no message or prefix is believed before. So a transport of one's own must, with a
//!   [`BodyCheck`](crate::wire::BodyCheck).
//! - A time-out in the middle of a frame loses nothing: the call that timed out is made again, with the same memory,
//!   and goes on where it stopped. Every other error of a receiver is final.
//! - A sender that fails is finished: part of a frame may be on its way. It does not send again.
//! - A connection closes when its closer says so or when both halves are gone. The peer then receives what was sent
//!   before, and after that "closed by peer" ([`is_closed_by_peer`]).
//!
//! ```
//! use towline::Lsn;
//! use towline::transport::{InProcessTransport, Transport};
//! use towline::wire::{Message, Sync};
//!
//! # fn main() -> towline::Result<()> {
//! let transport = InProcessTransport::new();
//! let listener = transport.listen("leader")?;
//! let mut follower = transport.connect("leader", std::time::Duration::from_secs(1))?;
//! let mut leader = listener.accept()?;
//!
//! leader.sender.send_message(&Message::Sync(Sync { lsn: Lsn(7) }))?;
//! assert_eq!(follower.receiver.receive_message()?, Message::Sync(Sync { lsn: Lsn(7) }));
//! # Ok(())
//! # }
//! ```

mod connecting;
mod in_process;
pub(crate) mod segment;
mod tcp;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::shutdown::ShutdownSignal;
use crate::wal::LogRange;
use crate::wire::{FrameHeader, FrameKind, Message, WalSegmentPayload, WireError};

pub use in_process::InProcessTransport;
pub use segment::{receive_segment, send_segment_pieces};
pub use tcp::{TcpOptions, TcpTransport};

/// Opens streams to other nodes, and takes theirs.
pub trait Transport: Send + Sync {
    /// Connects to a listener.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if `address` is not one; [`Error::Network`] if it does not resolve, if nobody listens there,
    /// or if `timeout` passes first.
    fn connect(&self, address: &str, timeout: Duration) -> Result<Connection>;

    /// As [`connect`](Self::connect), but given up at once when `stop` is given, as far as the transport can. Looking
    /// up a name takes as long as the system lets it.
    ///
    /// # Errors
    ///
    /// As connecting; [`Error::ShutDown`] after `stop`.
    fn connect_until(&self, address: &str, timeout: Duration, stop: &ShutdownSignal) -> Result<Connection> {
        if stop.is_shutdown() {
            return Err(Error::ShutDown);
        }
        self.connect(address, timeout)
    }

    /// Begins to take connections at `address`. Where the address ends in `:0`, a free one is chosen; see
    /// [`Listener::local_address`].
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if `address` is not one; [`Error::Network`] if it cannot be listened on.
    fn listen(&self, address: &str) -> Result<Box<dyn Listener>>;

    /// Ships one whole sealed segment to `follower` by hand: connects, introduces itself with
    /// [`Purpose::Segment`](crate::wire::Purpose::Segment), sends the segment and waits until the follower has synced
    /// it.
    ///
    /// # Errors
    ///
    /// What [`connect`](Self::connect) gives; [`Error::Refused`] if the follower does not want the segment;
    /// [`Error::Network`] if the stream breaks or nothing is heard for
    /// [`SEGMENT_TIMEOUT_MS`](crate::limits::SEGMENT_TIMEOUT_MS).
    fn send_segment(&self, follower: &str, payload: &WalSegmentPayload) -> Result<()> {
        let timeout = Duration::from_millis(crate::limits::SEGMENT_TIMEOUT_MS);
        segment::ship(self.connect(follower, timeout)?, payload, timeout)
    }
}

/// Takes connections. Shared between the thread that accepts and whoever stops it.
pub trait Listener: Send + Sync {
    /// Waits for the next connection.
    ///
    /// # Errors
    ///
    /// [`Error::ShutDown`] after [`close`](Self::close). [`Error::Network`] if the system cannot give a connection now,
    /// as for want of file descriptors: the listener stays usable, and trying again at once would spin.
    fn accept(&self) -> Result<Connection>;

    /// The address that a peer on this machine can connect to.
    fn local_address(&self) -> String;

    /// Takes no more connections and wakes every blocked [`accept`](Self::accept) at once. Calling it again does
    /// nothing.
    fn close(&self);
}

/// One stream to a peer: two halves for two threads.
pub struct Connection {
    /// The peer's address or name, for messages.
    pub peer: String,
    /// The half that sends.
    pub sender: Box<dyn FrameSender>,
    /// The half that receives.
    pub receiver: Box<dyn FrameReceiver>,
    /// Ends both halves from any thread.
    pub closer: Closer,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// Closes both directions of a connection, from any thread and any number of times: blocked calls of both halves, here
/// and at the peer, return at once. It does not keep the connection open.
#[derive(Clone)]
pub struct Closer(Arc<dyn Fn() + Send + Sync>);

impl Closer {
    /// A closer that does `close`, which must be safe to do again.
    pub fn new(close: impl Fn() + Send + Sync + 'static) -> Closer {
        Closer(Arc::new(close))
    }

    /// Closes the connection.
    pub fn close(&self) {
        (self.0)();
    }
}

impl std::fmt::Debug for Closer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Closer")
    }
}

/// The part of a frame's body that is not copied together with its prefix.
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
    /// Borrowed bytes.
    Bytes(&'a [u8]),
    /// A range of the mapped log, which can also travel as a reference.
    Log(&'a LogRange),
}

impl<'a> Body<'a> {
    /// No bytes.
    pub const EMPTY: Body<'static> = Body::Bytes(&[]);

    /// The bytes.
    #[must_use]
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Body::Bytes(bytes) => bytes,
            Body::Log(range) => range.bytes(),
        }
    }
}

/// How much of a frame went out without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SentAtOnce {
    /// All of it.
    Whole,
    /// A part. The rest goes out before anything else that is sent, and nothing more can be sent at once before that.
    Part,
    /// Nothing: the frame has to be sent in the ordinary way.
    Nothing,
}

/// The half of a connection that sends.
pub trait FrameSender: Send {
    /// Sends one frame: its header, `prefix` and `body`, in one system call where the system has one for that. Blocks
    /// while the peer does not take what was sent before.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the frame is longer than its kind may be or has flags that its kind does not have: nothing
    /// was sent, and the sender stays usable. [`Error::Network`] otherwise, a time-out included, and then for ever.
    fn send(&mut self, kind: FrameKind, flags: u8, prefix: &[u8], body: Body<'_>) -> Result<()>;

    /// Sends one frame as far as that takes no waiting: for threads that must not be held up by a peer. A transport
    /// that cannot tell sends nothing.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn send_at_once(&mut self, kind: FrameKind, flags: u8, prefix: &[u8], body: Body<'_>) -> Result<SentAtOnce> {
        let _ = (kind, flags, prefix, body);
        Ok(SentAtOnce::Nothing)
    }

    /// Sends the rest of a frame of which [`send_at_once`](Self::send_at_once) sent a part. Blocks as
    /// [`send`](Self::send), which does this first, does.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    /// Ends this direction in good order: the peer receives what was sent before, and then "closed by peer", while this
    /// side can still receive. Nothing can be sent afterwards.
    ///
    /// # Errors
    ///
    /// [`Error::Network`] if the stream is over already.
    fn finish(&mut self) -> Result<()>;

    /// The peer's address or name.
    fn peer(&self) -> &str;

    /// Sends a message. Allocates nothing for it here.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn send_message(&mut self, message: &Message) -> Result<()> {
        self.send_message_with_flags(message, 0)
    }

    /// Sends a message in a frame with flags.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    fn send_message_with_flags(&mut self, message: &Message, flags: u8) -> Result<()> {
        let bytes = message.to_message_bytes();
        self.send(message.kind(), flags, bytes.as_slice(), Body::EMPTY)
    }
}

/// The half of a connection that receives. A call that gives a time-out is made again, with the same arguments.
pub trait FrameReceiver: Send {
    /// Waits for the next frame and gives its header.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the body before has not been read to its end; [`Error::Protocol`] if what came is no
    /// frame; [`Error::Network`] if the stream ended ([`is_closed_by_peer`]), broke or timed out
    /// ([`Error::is_timeout`]).
    fn receive_header(&mut self) -> Result<FrameHeader>;

    /// Fills `into` with the next bytes of the current body.
    ///
    /// After a time-out a first part of `into` may be filled. The call is then made again with the same memory, whose
    /// first part has not been touched, and goes on behind it; until it has succeeded no other receiving call makes
    /// sense, and all of them are refused.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the body has fewer bytes left, or if a call that timed out is not made again with as many
    /// bytes; [`Error::Protocol`] if what the frame's checksum covers came damaged; [`Error::Network`] as with
    /// [`receive_header`](Self::receive_header).
    fn receive_exact(&mut self, into: &mut [u8]) -> Result<()>;

    /// The rest of the current body in the receiver's own memory, for bodies as small as messages.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if more than [`MAX_CONTROL_LEN`](crate::limits::MAX_CONTROL_LEN) bytes are left;
    /// [`Error::Protocol`] if they came damaged; [`Error::Network`] as with [`receive_header`](Self::receive_header).
    fn receive_body(&mut self) -> Result<&[u8]>;

    /// Bytes of the current body that have not been received yet.
    fn remaining(&self) -> u32;

    /// The header of the frame whose body has not been received to its end.
    fn current(&self) -> Option<FrameHeader>;

    /// Whether more bytes are here already, as far as that can be told without blocking. `false` at the end of the
    /// stream.
    fn has_buffered(&self) -> bool;

    /// Whether what comes next is here as a whole, so that receiving it waits for nothing: the rest of the current body
    /// or, between two frames, the next header. Asks the system nothing, so it may be here although this is `false`,
    /// which is what a transport that cannot tell says.
    fn has_whole(&self) -> bool {
        false
    }

    /// From now on a call gives a time-out ([`Error::is_timeout`]) when no byte arrives for `timeout`; `None` waits
    /// for as long as the stream lives, which is how a receiver begins.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if `timeout` is zero; [`Error::Network`] if the system refuses.
    fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<()>;

    /// From now on every call gives a time-out at `deadline` at the latest, however steadily bytes trickle in: for
    /// handshakes. `None` takes it away. Transports whose frames arrive whole need none.
    ///
    /// # Errors
    ///
    /// [`Error::Network`] if the system refuses.
    fn set_deadline(&mut self, deadline: Option<Instant>) -> Result<()> {
        let _ = deadline;
        Ok(())
    }

    /// The peer's address or name.
    fn peer(&self) -> &str;

    /// Receives a whole frame that must carry a message. Goes on with a frame whose body is not complete yet, so it can
    /// simply be called again after a time-out. Flags are not told: who wants them receives the header first.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] if the frame carries raw bytes (log, base, segment, status) or is not a valid message; else
    /// as with [`receive_header`](Self::receive_header).
    fn receive_message(&mut self) -> Result<Message> {
        let header = match self.current() {
            Some(header) => header,
            None => self.receive_header()?,
        };
        self.receive_message_body(header)
    }

    /// Receives the body behind `header`, which must be a message.
    ///
    /// # Errors
    ///
    /// As with [`receive_message`](Self::receive_message).
    fn receive_message_body(&mut self, header: FrameHeader) -> Result<Message> {
        let decoded = if header.kind.is_message() {
            // Checked by whoever receives it.
            Message::decode(header.kind, self.receive_body()?)
        } else {
            Err(WireError::NotAMessage { kind: header.kind })
        };
        decoded.map_err(|error| error.from_peer(self.peer()))
    }
}

/// Whether the peer closed the stream in good order, between two frames. A stream that ends anywhere else is broken.
#[must_use]
pub fn is_closed_by_peer(error: &Error) -> bool {
    matches!(error, Error::Network { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof)
}

/// The header for a frame that is about to be sent.
fn outgoing_header(kind: FrameKind, flags: u8, prefix: &[u8], body: &[u8]) -> Result<FrameHeader> {
    FrameHeader::new(kind, flags, prefix, body).map_err(|error| Error::invalid(format!("cannot send: {error}")))
}

/// The stream ended between two frames.
fn closed_by_peer(peer: &str) -> Error {
    receive_error(peer, io::Error::new(io::ErrorKind::UnexpectedEof, "closed by peer"))
}

/// The stream was closed with its [`Closer`].
fn closed_here(action: &'static str, peer: &str) -> Error {
    let source = io::Error::new(io::ErrorKind::ConnectionAborted, "closed on this side");
    Error::Network { action, peer: peer.to_owned(), source: source.into() }
}

fn receive_error(peer: &str, source: io::Error) -> Error {
    Error::Network { action: "receive from", peer: peer.to_owned(), source: source.into() }
}

fn receive_timed_out(peer: &str) -> Error {
    receive_error(peer, io::Error::new(io::ErrorKind::TimedOut, "nothing arrived in time"))
}

fn refuse_zero_timeout(timeout: Option<Duration>) -> Result<()> {
    match timeout {
        Some(Duration::ZERO) => Err(Error::invalid("a time-out of zero would never wait; use none or a longer one")),
        _ => Ok(()),
    }
}

/// What a call that a receiver cannot serve now is told.
fn misused(kind: Option<FrameKind>, left: u32, asked: &str) -> Error {
    match kind {
        Some(kind) => Error::invalid(format!("cannot {asked}: {left} bytes of a {kind} body are left to be received")),
        None => Error::invalid(format!("cannot {asked}: no body is being received")),
    }
}
