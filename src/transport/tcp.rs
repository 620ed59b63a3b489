//! Streams over TCP: blocking sockets, configured through `socket2`.
//!
//! Both halves use one socket, which closes when both are gone; a closer holds it only weakly. Sending is one vectored
//! system call for header, prefix and body; how the other half reads is told in [`receiver`].

mod receiver;

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use crate::error::{Error, Result};
use crate::limits::MAX_PENDING_CONNECTIONS;
use crate::shutdown::ShutdownSignal;
use crate::transport::connecting::connect_unless_stopped;
use crate::transport::{
    Body, Closer, Connection, FrameSender, Listener, SentAtOnce, Transport, closed_here, outgoing_header,
    refuse_zero_timeout,
};
use crate::wire::FrameKind;
use receiver::TcpReceiver;

/// How sockets are set up. [`Default`] is right for replication within and between data centres.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    /// Send small frames at once (`TCP_NODELAY`). On unless turned off.
    pub no_delay: bool,
    /// Probe a peer that has been quiet for this long, one second at least. 30 seconds unless changed; `None` never
    /// probes.
    pub keep_alive: Option<Duration>,
    /// Give up when the peer's system has not acknowledged data for this long (`TCP_USER_TIMEOUT`, Linux only). 30
    /// seconds unless changed; `None` leaves it to the system.
    pub user_timeout: Option<Duration>,
    /// Bytes of the socket's send buffer; `None` lets the system choose and adapt.
    pub send_buffer: Option<usize>,
    /// Bytes of the socket's receive buffer; `None` lets the system choose and adapt.
    pub receive_buffer: Option<usize>,
    /// A send fails when the peer takes no byte for this long. 30 seconds unless changed; `None` waits for as long as
    /// the stream lives.
    pub write_timeout: Option<Duration>,
    /// Spin for bytes to arrive instead of sleeping: saves a wake-up per frame and costs a core per receiver. For
    /// followers; the thread of a leader that reads acknowledgements would take turns with the one that waits for them,
    /// and on two processors a commit takes four times as long then. Where the system cannot ask for bytes without
    /// blocking (neither Linux, Android, macOS nor a BSD) it has no effect.
    pub spin_receive: bool,
    /// Listen on addresses that other machines reach, although nothing is encrypted. Off unless turned on: then only
    /// loopback addresses are listened on, and others are refused.
    pub allow_plaintext: bool,
}

impl Default for TcpOptions {
    fn default() -> TcpOptions {
        TcpOptions {
            no_delay: true,
            keep_alive: Some(Duration::from_secs(30)),
            user_timeout: Some(Duration::from_secs(30)),
            send_buffer: None,
            receive_buffer: None,
            write_timeout: Some(Duration::from_secs(30)),
            spin_receive: false,
            allow_plaintext: false,
        }
    }
}

impl TcpOptions {
    /// What must be set before a socket connects or listens.
    fn apply_before(&self, socket: &Socket) -> io::Result<()> {
        if let Some(bytes) = self.send_buffer {
            socket.set_send_buffer_size(bytes)?;
        }
        if let Some(bytes) = self.receive_buffer {
            socket.set_recv_buffer_size(bytes)?;
        }
        Ok(())
    }

    /// What is set on a connected socket.
    fn apply(&self, stream: &TcpStream) -> io::Result<()> {
        let socket = SockRef::from(stream);
        stream.set_nodelay(self.no_delay)?;
        if let Some(quiet) = self.keep_alive.map(|quiet| quiet.max(Duration::from_secs(1))) {
            let keep_alive = TcpKeepalive::new().with_time(quiet);
            #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple", windows))]
            let keep_alive = keep_alive.with_interval((quiet / 3).max(Duration::from_secs(1)));
            socket.set_tcp_keepalive(&keep_alive)?;
        }
        #[cfg(any(target_os = "linux", target_os = "android"))]
        socket.set_tcp_user_timeout(self.user_timeout)?;
        stream.set_write_timeout(self.write_timeout)
    }
}

/// TCP. An address is `host:port`; names resolve, IPv6 addresses stand in brackets.
///
/// ```
/// use std::time::Duration;
/// use towline::transport::{TcpTransport, Transport};
///
/// # fn main() -> towline::Result<()> {
/// let transport = TcpTransport::default();
/// let listener = transport.listen("127.0.0.1:0")?;
/// let connection = transport.connect(&listener.local_address(), Duration::from_secs(1))?;
/// let accepted = listener.accept()?;
/// connection.closer.close();
/// # drop(accepted);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct TcpTransport {
    options: TcpOptions,
}

impl TcpTransport {
    /// With options of one's own.
    #[must_use]
    pub fn new(options: TcpOptions) -> TcpTransport {
        TcpTransport { options }
    }

    fn connect_to(&self, address: SocketAddr, timeout: Duration, stop: &ShutdownSignal) -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        self.options.apply_before(&socket)?;
        let stream = connect_unless_stopped(socket, address, timeout, stop)?;
        // A port that nobody listens on can be chosen as our own end, and TCP then connects a socket to itself.
        if stream.local_addr()? == stream.peer_addr()? {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        self.options.apply(&stream)?;
        Ok(stream)
    }

    fn listen_at(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        // Without it a restarted node would wait minutes for its own port. On Windows it means something else.
        #[cfg(not(windows))]
        socket.set_reuse_address(true)?;
        self.options.apply_before(&socket)?;
        socket.bind(&address.into())?;
        socket.listen(i32::from(MAX_PENDING_CONNECTIONS.min(i16::MAX.unsigned_abs())))?;
        Ok(socket.into())
    }

    fn connection(&self, stream: TcpStream, peer: String) -> Connection {
        let socket = Arc::new(Shared { stream, peer: peer.clone(), closed: AtomicBool::new(false) });
        let weak = Arc::downgrade(&socket);
        let closer = Closer::new(move || {
            if let Some(socket) = weak.upgrade() {
                socket.closed.store(true, Ordering::SeqCst);
                // Fails only if the stream is over already.
                let _ = socket.stream.shutdown(Shutdown::Both);
            }
        });
        Connection {
            peer,
            sender: Box::new(TcpSender { socket: Arc::clone(&socket), failed: false, unsent: Vec::new() }),
            receiver: Box::new(TcpReceiver::new(socket, self.options.spin_receive)),
            closer,
        }
    }
}

impl Transport for TcpTransport {
    fn connect(&self, address: &str, timeout: Duration) -> Result<Connection> {
        self.connect_until(address, timeout, &ShutdownSignal::new())
    }

    fn connect_until(&self, address: &str, timeout: Duration, stop: &ShutdownSignal) -> Result<Connection> {
        refuse_zero_timeout(Some(timeout))?;
        refuse_zero_timeout(self.options.write_timeout)?;
        let deadline = Instant::now().checked_add(timeout);
        let addresses = resolve(address)?;
        let mut failure = io::Error::from(io::ErrorKind::TimedOut);
        for (tried, &candidate) in addresses.iter().enumerate() {
            let left = deadline.map_or(timeout, |deadline| deadline.saturating_duration_since(Instant::now()));
            // An address that does not answer leaves time for the others.
            let share = left / u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
            if share.is_zero() {
                break;
            }
            if stop.is_shutdown() {
                return Err(Error::ShutDown);
            }
            match self.connect_to(candidate, share, stop) {
                Ok(stream) => return Ok(self.connection(stream, address.to_owned())),
                Err(_) if stop.is_shutdown() => return Err(Error::ShutDown),
                Err(error) => failure = error,
            }
        }
        Err(Error::network("connect to", address)(failure))
    }

    fn listen(&self, address: &str) -> Result<Box<dyn Listener>> {
        Ok(Box::new(self.listener(address)?))
    }
}

impl TcpTransport {
    fn listener(&self, address: &str) -> Result<TcpNodeListener> {
        refuse_zero_timeout(self.options.write_timeout)?;
        let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for candidate in resolve(address)? {
            if !self.options.allow_plaintext && !candidate.ip().is_loopback() {
                return Err(Error::invalid(format!(
                    "{address} can be reached from other machines, and nothing is encrypted; \
                     listen on 127.0.0.1, or allow plaintext (--allow-plaintext) on a network that is trusted"
                )));
            }
            match self.listen_at(candidate).and_then(|listener| Ok((listener.local_addr()?, listener))) {
                Ok((local, listener)) => {
                    let (closed, waiting) = (AtomicBool::new(false), AtomicUsize::new(0));
                    return Ok(TcpNodeListener { transport: self.clone(), listener, local, closed, waiting });
                }
                Err(error) => failure = error,
            }
        }
        Err(Error::network("listen on", address)(failure))
    }
}

/// The addresses that a name stands for, at least one.
fn resolve(address: &str) -> Result<Vec<SocketAddr>> {
    // Without the system's resolver, which takes many times the stack that anything else here does.
    if let Ok(numeric) = address.parse() {
        return Ok(vec![numeric]);
    }
    // A host with a colon of its own is numeric and needs brackets, without which nobody knows where its port begins.
    let is_usual = |(host, port): (&str, &str)| !host.contains(':') && port.parse::<u16>().is_ok();
    if !address.rsplit_once(':').is_some_and(is_usual) {
        return Err(Error::invalid(format!("{address:?} is not an address; use host:port, as in db1.example:7400")));
    }
    let failed = |why: String| Error::Network {
        action: "use the address",
        peer: address.to_owned(),
        source: io::Error::new(io::ErrorKind::NotFound, why).into(),
    };
    match address.to_socket_addrs() {
        Ok(addresses) => {
            let addresses: Vec<SocketAddr> = addresses.collect();
            if addresses.is_empty() { Err(failed("it does not resolve; use host:port".into())) } else { Ok(addresses) }
        }
        Err(error) => Err(failed(format!("it does not resolve ({error}); use host:port"))),
    }
}

struct TcpNodeListener {
    transport: TcpTransport,
    listener: TcpListener,
    local: SocketAddr,
    closed: AtomicBool,
    /// Threads in `accept`, each of which needs a connection to be woken where a shutdown does not do it.
    waiting: AtomicUsize,
}

impl TcpNodeListener {
    fn accept_open(&self) -> Result<Connection> {
        loop {
            // Looked at after this thread has been counted: either this sees that the listener is closed, or `close`
            // sees this thread and wakes it.
            if self.closed.load(Ordering::SeqCst) {
                return Err(Error::ShutDown);
            }
            let accepted = self.listener.accept();
            if self.closed.load(Ordering::SeqCst) {
                return Err(Error::ShutDown);
            }
            match accepted {
                Ok((stream, peer)) => match self.transport.options.apply(&stream) {
                    Ok(()) => return Ok(self.transport.connection(stream, peer.to_string())),
                    // A peer that has gone again: some systems no longer take options for its socket.
                    Err(error) => log::debug!("dropped the connection of {peer}: {error}"),
                },
                // The same, noticed earlier. Not this side's trouble.
                Err(error) if is_gone(error.kind()) => {}
                Err(error) => return Err(Error::network("accept a connection on", self.local.to_string())(error)),
            }
        }
    }

    /// Makes blocked `accept` calls return.
    fn wake(&self) {
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let woken = SockRef::from(&self.listener).shutdown(Shutdown::Both).is_ok();
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        let woken = false;
        if !woken {
            self.wake_by_connecting();
        }
    }

    /// The same for systems where a listening socket cannot be shut down: a connection for each of the calls.
    fn wake_by_connecting(&self) {
        for _ in 0..self.waiting.load(Ordering::SeqCst) {
            // Fails where the queue is full: then there is something to accept already.
            let _ = TcpStream::connect_timeout(&self.reachable(), Duration::from_secs(1));
        }
    }

    /// The address by which this machine reaches the listener.
    fn reachable(&self) -> SocketAddr {
        let mut address = self.local;
        match address {
            SocketAddr::V4(v4) if v4.ip().is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
            SocketAddr::V6(v6) if v6.ip().is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
            _ => {}
        }
        address
    }
}

fn is_gone(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}

impl Listener for TcpNodeListener {
    fn accept(&self) -> Result<Connection> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let accepted = self.accept_open();
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        accepted
    }

    fn local_address(&self) -> String {
        self.reachable().to_string()
    }

    fn close(&self) {
        if !self.closed.swap(true, Ordering::SeqCst) {
            self.wake();
        }
    }
}

/// The socket of a connection, shared by its halves.
struct Shared {
    stream: TcpStream,
    peer: String,
    /// Set by the closer before it shuts the socket down, so that the halves can tell who ended the stream.
    closed: AtomicBool,
}

impl Shared {
    fn is_closed_here(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }
}

struct TcpSender {
    socket: Arc<Shared>,
    /// Part of a frame may have been sent: nothing that follows would be understood.
    failed: bool,
    /// The rest of a frame of which a part was sent at once. Empty but when the peer was slower than it seemed.
    unsent: Vec<u8>,
}

impl TcpSender {
    /// Refuses once the stream is over.
    fn check_open(&self) -> Result<()> {
        let peer = &self.socket.peer;
        if self.socket.is_closed_here() {
            return Err(closed_here("send to", peer));
        }
        if self.failed {
            let source = io::Error::new(io::ErrorKind::BrokenPipe, "an earlier frame was not sent to its end");
            return Err(Error::Network { action: "send to", peer: peer.clone(), source: source.into() });
        }
        Ok(())
    }

    /// A write has failed, and nothing can follow.
    fn fail(&mut self, error: io::Error) -> Error {
        self.failed = true;
        let peer = &self.socket.peer;
        if self.socket.is_closed_here() { closed_here("send to", peer) } else { Error::network("send to", peer)(error) }
    }
}

/// Calls `write` until it has taken all bytes, however few at a time.
fn write_all(
    mut slices: &mut [IoSlice<'_>],
    mut write: impl FnMut(&[IoSlice<'_>]) -> io::Result<usize>,
) -> io::Result<()> {
    // Empty parts at the beginning would be taken for a stream that takes no more bytes.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match write(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => IoSlice::advance_slices(&mut slices, sent),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer took no byte in time"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// One vectored write. On Linux without a signal when the peer is gone, whatever the host program does with signals.
fn write_vectored(stream: &TcpStream, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        SockRef::from(stream).send_vectored_with_flags(slices, MSG_NOSIGNAL)
    }
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    {
        let mut stream = stream;
        io::Write::write_vectored(&mut stream, slices)
    }
}

/// One vectored write of as much as the system takes without waiting; `WouldBlock` if that is nothing, or if it cannot
/// be asked for.
fn write_at_once(stream: &TcpStream, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    match MSG_DONTWAIT {
        Some(flag) => SockRef::from(stream).send_vectored_with_flags(slices, flag | MSG_NOSIGNAL),
        None => Err(io::ErrorKind::WouldBlock.into()),
    }
}

impl FrameSender for TcpSender {
    fn send(&mut self, kind: FrameKind, flags: u8, prefix: &[u8], body: Body<'_>) -> Result<()> {
        let body = body.bytes();
        let header = outgoing_header(kind, flags, prefix, body)?.encode();
        self.flush()?;
        let mut parts = [IoSlice::new(&header), IoSlice::new(prefix), IoSlice::new(body)];
        let written = write_all(&mut parts, |parts| write_vectored(&self.socket.stream, parts));
        written.map_err(|error| self.fail(error))
    }

    fn send_at_once(&mut self, kind: FrameKind, flags: u8, prefix: &[u8], body: Body<'_>) -> Result<SentAtOnce> {
        let body = body.bytes();
        let header = outgoing_header(kind, flags, prefix, body)?.encode();
        self.check_open()?;
        if !self.unsent.is_empty() {
            return Ok(SentAtOnce::Nothing);
        }
        let parts = [IoSlice::new(&header), IoSlice::new(prefix), IoSlice::new(body)];
        let sent = match write_at_once(&self.socket.stream, &parts) {
            Ok(sent) => sent,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(SentAtOnce::Nothing);
            }
            Err(error) => return Err(self.fail(error)),
        };
        let mut before = 0;
        for part in parts {
            self.unsent.extend_from_slice(part.get(sent.saturating_sub(before)..).unwrap_or_default());
            before += part.len();
        }
        Ok(if self.unsent.is_empty() { SentAtOnce::Whole } else { SentAtOnce::Part })
    }

    fn flush(&mut self) -> Result<()> {
        self.check_open()?;
        if self.unsent.is_empty() {
            return Ok(());
        }
        let unsent = std::mem::take(&mut self.unsent);
        let written = write_all(&mut [IoSlice::new(&unsent)], |parts| write_vectored(&self.socket.stream, parts));
        written.map_err(|error| self.fail(error))
    }

    fn finish(&mut self) -> Result<()> {
        self.flush()?;
        self.failed = true;
        self.socket.stream.shutdown(Shutdown::Write).map_err(Error::network("finish sending to", &self.socket.peer))
    }

    fn peer(&self) -> &str {
        &self.socket.peer
    }
}

/// The flag by which one call raises no signal when the peer is gone, where it takes a flag for that.
const MSG_NOSIGNAL: i32 = if cfg!(any(target_os = "linux", target_os = "android")) { 0x4000 } else { 0 };

/// The flag by which one call does not block on a blocking socket, where there is one.
const MSG_DONTWAIT: Option<i32> = if cfg!(any(target_os = "linux", target_os = "android")) {
    Some(0x40)
} else if cfg!(any(
    target_vendor = "apple",
    target_os = "freebsd",
    target_os = "netbsd",
    target_os = "openbsd",
    target_os = "dragonfly"
)) {
    Some(0x80)
} else {
    None
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_other_machines_reach_need_permission() {
        let refused = TcpTransport::default().listen("0.0.0.0:0").err().unwrap();
        assert!(refused.to_string().contains("--allow-plaintext"), "{refused}");
    }

    #[test]
    fn a_connection_of_its_own_wakes_each_accept() {
        let transport = TcpTransport::new(TcpOptions { allow_plaintext: true, ..TcpOptions::default() });
        let listener = transport.listener("0.0.0.0:0").unwrap();
        std::thread::scope(|scope| {
            let accepting: Vec<_> = (0..3).map(|_| scope.spawn(|| listener.accept().unwrap_err())).collect();
            while listener.waiting.load(Ordering::SeqCst) < accepting.len() {
                std::thread::yield_now();
            }
            listener.closed.store(true, Ordering::SeqCst);
            listener.wake_by_connecting();
            for thread in accepting {
                assert!(thread.join().unwrap().is_shutdown());
            }
        });
    }

    #[test]
    fn numeric_addresses_need_no_names() {
        let numeric = ["127.0.0.1:7400", "[::1]:7400"];
        for address in numeric {
            assert_eq!(resolve(address).unwrap(), [address.parse().unwrap()]);
        }
        for wrong in ["127.0.0.1", "127.0.0.1:", "127.0.0.1:70000", "::1"] {
            assert!(matches!(resolve(wrong), Err(Error::Invalid { .. })), "{wrong}");
        }
    }

    #[test]
    fn a_frame_is_sent_whole_however_little_is_taken_at_a_time() {
        let (mut taken, mut calls) = (Vec::new(), 0);
        let mut parts = [IoSlice::new(b""), IoSlice::new(b"header"), IoSlice::new(b""), IoSlice::new(b"body")];
        write_all(&mut parts, |parts| {
            calls += 1;
            if calls % 2 == 0 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).take(3).collect();
            taken.extend_from_slice(&bytes);
            Ok(bytes.len())
        })
        .unwrap();
        assert_eq!(taken, b"headerbody");
        let stuck = write_all(&mut [IoSlice::new(b"x")], |_| Ok(0)).unwrap_err();
        assert_eq!(stuck.kind(), io::ErrorKind::WriteZero);
    }

    #[test]
    fn options_reach_the_sockets() {
        let options = TcpOptions {
            receive_buffer: Some(32 * 1024),
            send_buffer: Some(32 * 1024),
            keep_alive: Some(Duration::from_millis(1)),
            write_timeout: Some(Duration::from_secs(7)),
            ..TcpOptions::default()
        };
        let transport = TcpTransport::new(options);
        let listener = transport.listener("127.0.0.1:0").unwrap();
        let stream = transport.connect_to(listener.local, Duration::from_secs(60), &ShutdownSignal::new()).unwrap();
        assert!(stream.nodelay().unwrap());
        assert_eq!(stream.write_timeout().unwrap(), Some(Duration::from_secs(7)));
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        // Systems round buffer sizes up, and none defaults to as little.
        assert!((32 * 1024..=128 * 1024).contains(&socket.recv_buffer_size().unwrap()));
        let zero = TcpOptions { write_timeout: Some(Duration::ZERO), ..TcpOptions::default() };
        assert!(matches!(TcpTransport::new(zero).listen("127.0.0.1:0"), Err(Error::Invalid { .. })));
    }

    #[test]
    fn a_send_that_nobody_takes_times_out_and_ends_the_sender() {
        let transport =
            TcpTransport::new(TcpOptions { write_timeout: Some(Duration::from_millis(5)), ..TcpOptions::default() });
        let listener = transport.listener("127.0.0.1:0").unwrap();
        let mut stream = transport.connect(&listener.local_address(), Duration::from_secs(60)).unwrap();
        let body = vec![0; 1024 * 1024];
        let error = loop {
            if let Err(error) = stream.sender.send(FrameKind::Status, 0, &[], Body::Bytes(&body)) {
                break error;
            }
        };
        assert!(error.is_timeout(), "{error}");
        let again = stream.sender.send(FrameKind::Status, 0, &[], Body::EMPTY).unwrap_err();
        assert!(!again.is_timeout() && again.to_string().contains("earlier frame"), "{again}");
    }
}
