//! Streams within one process: for tests, simulations and engines that keep a follower beside the leader.
//!
//! A frame travels through a bounded channel as it is: log bytes as a reference to their mapped segment, copied once,
//! by the receiver, to where they belong. Two channels make a connection, and a third, which never carries anything,
//! tells everyone who waits that it is closed.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, TrySendError, bounded, select};
use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::limits::{MAX_CONTROL_LEN, MAX_IN_PROCESS_FRAMES, MAX_PENDING_CONNECTIONS};
use crate::transport::{
    Body, Closer, Connection, FrameReceiver, FrameSender, Listener, SentAtOnce, Transport, closed_by_peer, closed_here,
    misused, outgoing_header, receive_timed_out, refuse_zero_timeout,
};
use crate::wal::LogRange;
use crate::wire::{BodyCheck, FrameHeader, FrameKind};

/// Connects listeners and connections within one process, by any names. Clones share the names; two transports made
/// separately know nothing of each other.
///
/// The [example](crate::transport) of the module uses one.
#[derive(Clone, Debug, Default)]
pub struct InProcessTransport {
    registry: Arc<Registry>,
}

#[derive(Debug, Default)]
struct Registry {
    /// Who listens, by name.
    listeners: Mutex<HashMap<String, Listening>>,
    /// Gives listeners and connections their numbers.
    counter: AtomicU64,
}

/// The way to one listener.
#[derive(Clone, Debug)]
struct Listening {
    /// Tells this listener from later ones of the same name.
    number: u64,
    queue: Sender<Connection>,
    /// Notices when it is closed.
    closed: Receiver<Infallible>,
}

impl Registry {
    fn next_number(&self) -> u64 {
        self.counter.fetch_add(1, Ordering::Relaxed) + 1
    }
}

impl InProcessTransport {
    /// A transport with no listeners.
    #[must_use]
    pub fn new() -> InProcessTransport {
        InProcessTransport::default()
    }
}

impl Transport for InProcessTransport {
    fn connect(&self, address: &str, timeout: Duration) -> Result<Connection> {
        let failed = |kind, text: &'static str| Error::Network {
            action: "connect to",
            peer: address.to_owned(),
            source: io::Error::new(kind, text).into(),
        };
        let refused = || failed(io::ErrorKind::ConnectionRefused, "nobody listens under this name");
        let listening = self.registry.listeners.lock().get(address).cloned().ok_or_else(refused)?;
        let client = format!("{address} (connection {})", self.registry.next_number());
        let (here, there) = pair(address.to_owned(), client);
        select! {
            send(listening.queue, there) -> sent => sent.map_err(|_| refused())?,
            recv(listening.closed) -> _ => return Err(refused()),
            default(timeout) => return Err(failed(io::ErrorKind::TimedOut, "nobody accepted in time")),
        }
        // If it was closed meanwhile, it may have emptied its queue before this connection got there.
        if is_over(&listening.closed) { Err(refused()) } else { Ok(here) }
    }

    fn listen(&self, address: &str) -> Result<Box<dyn Listener>> {
        let number = self.registry.next_number();
        let name = match address.strip_suffix(":0") {
            Some(host) => format!("{host}:{number}"),
            None => address.to_owned(),
        };
        let (sender, queue) = bounded(usize::from(MAX_PENDING_CONNECTIONS));
        let end = End::new();
        match self.registry.listeners.lock().entry(name.clone()) {
            Entry::Occupied(_) => {
                let source = io::Error::new(io::ErrorKind::AddrInUse, "somebody listens under this name");
                return Err(Error::Network { action: "listen on", peer: name, source: source.into() });
            }
            Entry::Vacant(entry) => entry.insert(Listening { number, queue: sender, closed: end.signal.clone() }),
        };
        let listener = InProcessListener { registry: Arc::clone(&self.registry), name, number, queue, end };
        Ok(Box::new(listener))
    }
}

struct InProcessListener {
    registry: Arc<Registry>,
    name: String,
    number: u64,
    queue: Receiver<Connection>,
    end: End,
}

impl Listener for InProcessListener {
    fn accept(&self) -> Result<Connection> {
        if self.end.has_come() {
            return Err(Error::ShutDown);
        }
        select! {
            recv(self.queue) -> connection => connection.map_err(|_| Error::ShutDown),
            recv(self.end.signal) -> _ => Err(Error::ShutDown),
        }
    }

    fn local_address(&self) -> String {
        self.name.clone()
    }

    fn close(&self) {
        // The name may have been taken again since an earlier close.
        let mut listeners = self.registry.listeners.lock();
        if listeners.get(&self.name).is_some_and(|listening| listening.number == self.number) {
            listeners.remove(&self.name);
        }
        drop(listeners);
        self.end.come();
        // Whoever waited to be accepted is told by the end of the stream.
        self.queue.try_iter().for_each(drop);
    }
}

impl Drop for InProcessListener {
    fn drop(&mut self) {
        self.close();
    }
}

/// Something that ends once, and that any number of threads can wait for together with other channels.
struct End {
    /// Dropped at the end, which every receiver of `signal` notices.
    source: Mutex<Option<Sender<Infallible>>>,
    signal: Receiver<Infallible>,
}

impl End {
    fn new() -> End {
        let (source, signal) = bounded(0);
        End { source: Mutex::new(Some(source)), signal }
    }

    fn come(&self) {
        drop(self.source.lock().take());
    }

    fn has_come(&self) -> bool {
        is_over(&self.signal)
    }
}

fn is_over(signal: &Receiver<Infallible>) -> bool {
    matches!(signal.try_recv(), Err(TryRecvError::Disconnected))
}

/// One frame on its way.
struct Frame {
    /// Its header, and how far the body has been checked: memory is trusted no more than a wire.
    check: BodyCheck,
    prefix: Prefix,
    body: FrameBody,
}

/// The small part of a frame: kept in place unless it is unusually long.
enum Prefix {
    Inline { len: u8, bytes: [u8; Prefix::INLINE_LEN] },
    Boxed(Box<[u8]>),
}

impl Prefix {
    /// Room for every prefix and for the messages that are sent often.
    const INLINE_LEN: usize = 64;

    fn new(from: &[u8]) -> Prefix {
        let mut bytes = [0; Prefix::INLINE_LEN];
        match (u8::try_from(from.len()), bytes.get_mut(..from.len())) {
            (Ok(len), Some(to)) => {
                to.copy_from_slice(from);
                Prefix::Inline { len, bytes }
            }
            _ => Prefix::Boxed(from.into()),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Prefix::Inline { len, bytes } => &bytes[..usize::from(*len)],
            Prefix::Boxed(bytes) => bytes,
        }
    }
}

enum FrameBody {
    Owned(Box<[u8]>),
    Log(LogRange),
}

impl Frame {
    /// The bytes of the body from `at` on that lie together.
    fn run(&self, at: usize) -> &[u8] {
        let prefix = self.prefix.bytes();
        let body = match &self.body {
            FrameBody::Owned(bytes) => bytes,
            FrameBody::Log(range) => range.bytes(),
        };
        match prefix.get(at..) {
            Some(run) if !run.is_empty() => run,
            _ => body.get(at - prefix.len()..).unwrap_or_default(),
        }
    }
}

/// What both halves of one side share. When it goes, the connection closes.
struct Side {
    peer: String,
    /// None once sending has been finished.
    outgoing: Mutex<Option<Sender<Frame>>>,
    incoming: Receiver<Frame>,
    /// Ended by this side's closer, or by its halves being gone.
    own_end: Arc<End>,
    peer_end: Arc<End>,
}

impl Drop for Side {
    fn drop(&mut self) {
        self.own_end.come();
    }
}

/// Both sides of a new connection; each is told the name of the other.
fn pair(listener: String, client: String) -> (Connection, Connection) {
    let (to_listener, from_client) = bounded(MAX_IN_PROCESS_FRAMES);
    let (to_client, from_listener) = bounded(MAX_IN_PROCESS_FRAMES);
    let (client_end, listener_end) = (Arc::new(End::new()), Arc::new(End::new()));
    let here = side(listener, to_listener, from_listener, Arc::clone(&client_end), Arc::clone(&listener_end));
    let there = side(client, to_client, from_client, listener_end, client_end);
    (here, there)
}

fn side(
    peer: String,
    outgoing: Sender<Frame>,
    incoming: Receiver<Frame>,
    own_end: Arc<End>,
    peer_end: Arc<End>,
) -> Connection {
    let end = Arc::clone(&own_end);
    let side = Arc::new(Side { peer: peer.clone(), outgoing: Mutex::new(Some(outgoing)), incoming, own_end, peer_end });
    Connection {
        peer,
        sender: Box::new(InProcessSender { side: Arc::clone(&side) }),
        receiver: Box::new(InProcessReceiver { side, frame: None, at: 0, scratch: Vec::new(), timeout: None }),
        closer: Closer::new(move || end.come()),
    }
}

struct InProcessSender {
    side: Arc<Side>,
}

impl InProcessSender {
    fn peer_gone(&self) -> Error {
        let source = io::Error::new(io::ErrorKind::BrokenPipe, "closed by peer");
        Error::Network { action: "send to", peer: self.side.peer.clone(), source: source.into() }
    }

    /// The frame to send, if both sides still stand.
    fn frame(&self, kind: FrameKind, flags: u8, prefix: &[u8], body: Body<'_>) -> Result<Frame> {
        let header = outgoing_header(kind, flags, prefix, body.bytes())?;
        if self.side.own_end.has_come() {
            return Err(closed_here("send to", &self.side.peer));
        }
        if self.side.peer_end.has_come() {
            return Err(self.peer_gone());
        }
        let body = match body {
            Body::Bytes(bytes) => FrameBody::Owned(bytes.into()),
            Body::Log(range) => FrameBody::Log(range.clone()),
        };
        Ok(Frame { check: BodyCheck::new(header), prefix: Prefix::new(prefix), body })
    }
}

impl FrameSender for InProcessSender {
    fn send(&mut self, kind: FrameKind, flags: u8, prefix: &[u8], body: Body<'_>) -> Result<()> {
        let frame = self.frame(kind, flags, prefix, body)?;
        let side = &*self.side;
        // Only this sender locks it.
        let outgoing = side.outgoing.lock();
        let Some(outgoing) = outgoing.as_ref() else { return Err(closed_here("send to", &side.peer)) };
        select! {
            send(outgoing, frame) -> sent => sent.map_err(|_| self.peer_gone()),
            recv(side.own_end.signal) -> _ => Err(closed_here("send to", &side.peer)),
            recv(side.peer_end.signal) -> _ => Err(self.peer_gone()),
        }
    }

    fn send_at_once(&mut self, kind: FrameKind, flags: u8, prefix: &[u8], body: Body<'_>) -> Result<SentAtOnce> {
        let frame = self.frame(kind, flags, prefix, body)?;
        let outgoing = self.side.outgoing.lock();
        let Some(outgoing) = outgoing.as_ref() else { return Err(closed_here("send to", &self.side.peer)) };
        match outgoing.try_send(frame) {
            Ok(()) => Ok(SentAtOnce::Whole),
            Err(TrySendError::Full(_)) => Ok(SentAtOnce::Nothing),
            Err(TrySendError::Disconnected(_)) => Err(self.peer_gone()),
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.side.outgoing.lock().take();
        Ok(())
    }

    fn peer(&self) -> &str {
        &self.side.peer
    }
}

struct InProcessReceiver {
    side: Arc<Side>,
    /// The current frame, and how many bytes of its body have been received.
    frame: Option<Frame>,
    at: usize,
    /// For small bodies that do not lie together.
    scratch: Vec<u8>,
    timeout: Option<Duration>,
}

impl InProcessReceiver {
    /// The next frame, waiting for it.
    fn next_frame(&self) -> Result<Frame> {
        let side = &*self.side;
        let here = || closed_here("receive from", &side.peer);
        if side.own_end.has_come() {
            return Err(here());
        }
        if let Ok(frame) = side.incoming.try_recv() {
            return Ok(frame);
        }
        let next = match self.timeout {
            Some(timeout) => select! {
                recv(side.incoming) -> frame => frame.map_err(|_| RecvTimeoutError::Disconnected),
                recv(side.own_end.signal) -> _ => return Err(here()),
                recv(side.peer_end.signal) -> _ => Err(RecvTimeoutError::Disconnected),
                default(timeout) => Err(RecvTimeoutError::Timeout),
            },
            None => select! {
                recv(side.incoming) -> frame => frame.map_err(|_| RecvTimeoutError::Disconnected),
                recv(side.own_end.signal) -> _ => return Err(here()),
                recv(side.peer_end.signal) -> _ => Err(RecvTimeoutError::Disconnected),
            },
        };
        match next {
            Ok(frame) => Ok(frame),
            Err(RecvTimeoutError::Timeout) => Err(receive_timed_out(&side.peer)),
            // Frames that were sent before the end are still received.
            Err(RecvTimeoutError::Disconnected) => side.incoming.try_recv().map_err(|_| closed_by_peer(&side.peer)),
        }
    }

    fn left(&self) -> usize {
        self.frame.as_ref().map_or(0, |frame| frame.check.header().len as usize - self.at)
    }

    fn misused(&self, asked: &str) -> Error {
        misused(self.current().map(|header| header.kind), self.remaining(), asked)
    }
}

impl FrameReceiver for InProcessReceiver {
    fn receive_header(&mut self) -> Result<FrameHeader> {
        if self.left() > 0 {
            return Err(self.misused("receive the next frame"));
        }
        // The frame before goes now, and with it its hold on the log.
        self.frame = None;
        let frame = self.next_frame()?;
        let header = frame.check.header();
        self.frame = Some(frame);
        self.at = 0;
        Ok(header)
    }

    fn receive_exact(&mut self, into: &mut [u8]) -> Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        let asked = into.len();
        if asked > self.left() {
            return Err(self.misused(&format!("receive {asked} bytes")));
        }
        if self.side.own_end.has_come() {
            return Err(closed_here("receive from", &self.side.peer));
        }
        let Some(frame) = &mut self.frame else { return Ok(()) };
        let mut filled = 0;
        while filled < asked {
            let run = frame.run(self.at);
            let len = run.len().min(asked - filled);
            into[filled..filled + len].copy_from_slice(&run[..len]);
            filled += len;
            self.at += len;
        }
        let checked = frame.check.take(into);
        if self.left() == 0 {
            self.frame = None;
        }
        checked.map_err(|error| error.from_peer(&self.side.peer))
    }

    fn receive_body(&mut self) -> Result<&[u8]> {
        if self.left() > MAX_CONTROL_LEN as usize {
            return Err(self.misused("receive a body as a message"));
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(self.left(), 0);
        let received = self.receive_exact(&mut scratch);
        self.scratch = scratch;
        received.map(|()| &self.scratch[..])
    }

    #[allow(clippy::cast_possible_truncation, reason = "at most the length in the header, which is a u32")]
    fn remaining(&self) -> u32 {
        self.left() as u32
    }

    fn current(&self) -> Option<FrameHeader> {
        self.frame.as_ref().map(|frame| frame.check.header()).filter(|_| self.left() > 0)
    }

    fn has_buffered(&self) -> bool {
        self.left() > 0 || !self.side.incoming.is_empty()
    }

    fn has_whole(&self) -> bool {
        self.has_buffered()
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<()> {
        refuse_zero_timeout(timeout)?;
        self.timeout = timeout;
        Ok(())
    }

    fn peer(&self) -> &str {
        &self.side.peer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::sample;

    #[test]
    fn log_ranges_travel_as_references() {
        let transport = InProcessTransport::new();
        let listener = transport.listen("leader").unwrap();
        let mut follower = transport.clone().connect("leader", Duration::from_secs(60)).unwrap();
        let mut leader = listener.accept().unwrap();
        let (segment, _dir) = sample::mapped(&sample::small_segment(), true);
        let range = LogRange::new(Arc::clone(&segment), 0..4096).unwrap();
        leader.sender.send(FrameKind::WalData, 0, &[0; 16], Body::Log(&range)).unwrap();
        drop(range);
        assert_eq!(Arc::strong_count(&segment), 2);
        follower.receiver.receive_header().unwrap();
        let mut body = vec![0; 16 + 4096];
        follower.receiver.receive_exact(&mut body).unwrap();
        assert_eq!(&body[16..], segment.bytes(0..4096).unwrap());
        // Received to its end, the frame no longer holds the log.
        assert_eq!(Arc::strong_count(&segment), 1);
    }

    #[test]
    fn a_full_stream_holds_its_sender_back() {
        let (mut here, mut there) = pair("listener".to_owned(), "client".to_owned());
        std::thread::scope(|scope| {
            let (sent, seen) = std::sync::mpsc::channel();
            scope.spawn(move || {
                for number in 0..2 * MAX_IN_PROCESS_FRAMES {
                    here.sender.send(FrameKind::StatusRequest, 0, &[], Body::EMPTY).unwrap();
                    // Nobody looks any more once the last frame has been received.
                    let _ = sent.send(number);
                }
            });
            assert_eq!(seen.recv().unwrap(), 0);
            for received in 0..2 * MAX_IN_PROCESS_FRAMES {
                there.receiver.receive_header().unwrap();
                let ahead = seen.try_iter().last().unwrap_or(0).saturating_sub(received);
                assert!(ahead <= MAX_IN_PROCESS_FRAMES + 1, "{ahead} frames ahead");
            }
        });
    }

    #[test]
    fn whoever_waits_to_be_accepted_is_told_that_nobody_will() {
        let transport = InProcessTransport::new();
        let listener = transport.listen("leader").unwrap();
        let mut waiting = transport.connect("leader", Duration::from_secs(60)).unwrap();
        listener.close();
        assert!(crate::transport::is_closed_by_peer(&waiting.receiver.receive_header().unwrap_err()));
    }
}
