//! Connecting, given up at once when the node stops: an address that never answers must not hold up an end that takes
//! milliseconds otherwise.

use std::io;
#[cfg(any(target_os = "linux", target_os = "android"))]
use std::io::Write;
#[cfg(any(target_os = "linux", target_os = "android"))]
use std::net::Shutdown;
use std::net::{SocketAddr, TcpStream};
#[cfg(any(target_os = "linux", target_os = "android"))]
use std::sync::Arc;
use std::time::Duration;

use socket2::Socket;

use crate::shutdown::ShutdownSignal;

/// Connects, and gives up at once when `stop` is given: shutting down a socket that is connecting makes it fail.
///
/// The connection is under way before the signal can shut the socket down, so none of it is missed. An empty write
/// waits for it, no longer than the time-out for writes.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn connect_unless_stopped(
    socket: Socket,
    address: SocketAddr,
    timeout: Duration,
    stop: &ShutdownSignal,
) -> io::Result<TcpStream> {
    socket.set_nonblocking(true)?;
    let begun = socket.connect(&address.into());
    socket.set_nonblocking(false)?;
    let stream = Arc::new(TcpStream::from(socket));
    if let Err(error) = begun {
        if error.raw_os_error() != Some(EINPROGRESS) {
            return Err(error);
        }
        stream.set_write_timeout(Some(timeout))?;
        let closing = Arc::downgrade(&stream);
        let guard = stop.on_shutdown(move || {
            if let Some(stream) = closing.upgrade() {
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        let connected = loop {
            match (&*stream).write(&[]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Err(io::ErrorKind::TimedOut.into()),
                other => break other,
            }
        };
        drop(guard);
        connected?;
    }
    // A closer that is still running holds it for a moment longer; a second handle does not mind.
    Arc::try_unwrap(stream).or_else(|shared| shared.try_clone())
}

/// "Operation now in progress".
#[cfg(any(target_os = "linux", target_os = "android"))]
const EINPROGRESS: i32 = if cfg!(any(target_arch = "mips", target_arch = "mips64")) {
    150
} else if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) {
    36
} else {
    115
};

/// Connects. Here a connection that is under way ends with its time-out.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn connect_unless_stopped(
    socket: Socket,
    address: SocketAddr,
    timeout: Duration,
    _stop: &ShutdownSignal,
) -> io::Result<TcpStream> {
    socket.connect_timeout(&address.into(), timeout)?;
    Ok(socket.into())
}

#[cfg(test)]
#[cfg(any(target_os = "linux", target_os = "android"))]
mod tests {
    use socket2::{Domain, Type};

    use super::*;

    const FOREVER: Duration = Duration::from_secs(600);

    fn socket() -> Socket {
        Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()
    }

    /// A listener that takes nobody: its queue is full, so that whoever asks gets no answer at all.
    fn silent() -> (Vec<Socket>, SocketAddr) {
        let listener = socket();
        listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let mut sockets = vec![listener];
        // As many as its queue holds, and some more that wait to be let in.
        for _ in 0..4 {
            let asking = socket();
            asking.set_nonblocking(true).unwrap();
            let _ = asking.connect(&address.into());
            sockets.push(asking);
        }
        (sockets, address)
    }

    #[test]
    fn what_never_answers_is_given_up_at_the_signal_however_long_the_timeout() {
        let (_sockets, address) = silent();
        let stop = ShutdownSignal::new();
        let connecting = std::thread::spawn({
            let stop = stop.clone();
            move || connect_unless_stopped(socket(), address, FOREVER, &stop)
        });
        // Whether this comes before, while or after it begins: it ends.
        std::thread::sleep(Duration::from_millis(50));
        stop.shutdown();
        let error = connecting.join().unwrap().unwrap_err();
        assert_ne!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        // A signal given before counts too.
        assert!(connect_unless_stopped(socket(), address, FOREVER, &stop).is_err());
    }

    #[test]
    fn what_never_answers_is_given_up_after_the_timeout() {
        let (_sockets, address) = silent();
        let error =
            connect_unless_stopped(socket(), address, Duration::from_millis(30), &ShutdownSignal::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn who_answers_is_connected_and_who_refuses_is_told() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = ShutdownSignal::new();
        let stream = connect_unless_stopped(socket(), address, FOREVER, &stop).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert_eq!(accepted.peer_addr().unwrap(), stream.local_addr().unwrap());
        drop((listener, accepted));
        let error = connect_unless_stopped(socket(), address, FOREVER, &stop).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
