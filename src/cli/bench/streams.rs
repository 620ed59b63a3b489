//! The bare limits on loopback TCP: blocking sockets, large writes, no protocol.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};

use super::limits::{self, DurableWriter};
use super::processors::Place;

/// Bytes of one write to a socket and of one read from it, where there are as many.
const PIECE: usize = 256 * 1024;
/// Bytes of a bare acknowledgement.
const ACK: usize = 32;

/// Two ends of one connection.
pub(super) fn connect() -> io::Result<(TcpStream, TcpStream)> {
    connect_to(&TcpListener::bind("127.0.0.1:0")?)
}

/// The same through a listener that is there.
pub(super) fn connect_to(listener: &TcpListener) -> io::Result<(TcpStream, TcpStream)> {
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    Ok((near, far))
}

/// Receives until `to` is full, and checksums what arrives, piece by piece, while it is in the cache.
fn receive(mut from: &TcpStream, to: &mut [u8], checked: bool) -> io::Result<()> {
    let mut chain = 0;
    for piece in to.chunks_mut(PIECE) {
        from.read_exact(piece)?;
        if checked {
            chain ^= crc32fast::hash(piece);
        }
    }
    std::hint::black_box(chain);
    Ok(())
}

/// Runs `send` with one end of a connection on this thread, and `receive` with the other end on another.
fn both_ends(
    send: impl FnOnce(&TcpStream) -> io::Result<()>,
    receive: impl FnOnce(&TcpStream) -> io::Result<()> + Send,
) -> io::Result<()> {
    let (near, far) = connect()?;
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || receive(&far));
        let sent = send(&near).and_then(|()| near.shutdown(Shutdown::Write));
        let received = receiving.join().map_err(|_| io::Error::other("the receiver panicked"))?;
        sent.and(received)
    })
}

/// Sends `from` as it is, one part after the other.
fn send<'a>(from: &'a [&'a [u8]]) -> impl FnOnce(&TcpStream) -> io::Result<()> + 'a {
    |mut near| from.iter().flat_map(|part| part.chunks(PIECE)).try_for_each(|piece| near.write_all(piece))
}

/// Memory to socket to memory.
pub(super) fn stream(from: &[u8], to: &mut [u8]) -> io::Result<()> {
    both_ends(send(&[from]), |far| receive(far, to, false))
}

/// The same with a checksum on arrival, and from several places in memory.
pub(super) fn stream_checked(from: &[&[u8]], to: &mut [u8]) -> io::Result<()> {
    both_ends(send(from), |far| receive(far, to, true))
}

/// The same into a file that grows with each `write`.
pub(super) fn stream_to_file(from: &[&[u8]], to: &mut File) -> io::Result<()> {
    let len = from.iter().map(|part| part.len()).sum();
    both_ends(send(from), |far| receive_to_file(far, to, len))
}

/// Three steps: append records to `log`, a piece at a time; send each piece; receive into `to` with a checksum on
/// arrival.
pub(super) fn append_and_stream(log: &mut [u8], to: &mut [u8], record: &[u8]) -> io::Result<()> {
    let whole = whole_records(log.len(), record);
    both_ends(append_and_send(&mut log[..whole], record), |far| receive(far, &mut to[..whole], true))
}

/// The same three steps, but the bytes are received into a file that grows with each `write`.
pub(super) fn append_and_stream_to_file(log: &mut [u8], to: &mut File, record: &[u8]) -> io::Result<()> {
    let whole = whole_records(log.len(), record);
    both_ends(append_and_send(&mut log[..whole], record), |far| receive_to_file(far, to, whole))
}

/// The same three steps, and whoever receives sends each piece on to another, who does as it does.
pub(super) fn append_and_pass_on(log: &mut [u8], to: &mut [u8], on: &mut [u8], record: &[u8]) -> io::Result<()> {
    let whole = whole_records(log.len(), record);
    let (to, on) = (&mut to[..whole], &mut on[..whole]);
    both_ends(append_and_send(&mut log[..whole], record), |far| {
        let pass_on = |mut near: &TcpStream| {
            to.chunks_mut(PIECE).try_for_each(|piece| {
                receive(far, piece, true)?;
                near.write_all(piece)
            })
        };
        both_ends(pass_on, |far| receive(far, on, true))
    })
}

/// As many bytes of so many as hold whole records.
fn whole_records(len: usize, record: &[u8]) -> usize {
    let slot = limits::slot_len(record.len());
    len / slot * slot
}

/// Appends records to `log`, a piece at a time, and sends each piece.
fn append_and_send<'a>(log: &'a mut [u8], record: &'a [u8]) -> impl FnOnce(&TcpStream) -> io::Result<()> + 'a {
    move |mut near| {
        log.chunks_mut(whole_records(PIECE, record).max(limits::slot_len(record.len()))).try_for_each(|piece| {
            limits::append(piece, record, u64::MAX);
            near.write_all(piece)
        })
    }
}

/// Receives so many bytes, checksums them and writes them to a file.
fn receive_to_file(mut from: &TcpStream, to: &mut File, mut left: usize) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    while left > 0 {
        let piece = &mut buffer[..left.min(PIECE)];
        from.read_exact(piece)?;
        std::hint::black_box(crc32fast::hash(piece));
        to.write_all(piece)?;
        left -= piece.len();
    }
    Ok(())
}

/// Runs `work` while `from` is streamed into each of `sinks`, again and again, each over its own connection.
pub(super) fn beside_streams<T>(from: &[u8], sinks: &mut [&mut [u8]], work: impl FnOnce() -> T) -> io::Result<T> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for sink in sinks {
            let (mut near, far) = connect()?;
            let over = &over;
            threads.push(scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    from.chunks(PIECE)
                        .take_while(|_| !over.load(Ordering::Relaxed))
                        .try_for_each(|piece| near.write_all(piece))?;
                }
                near.shutdown(Shutdown::Write)
            }));
            threads.push(scope.spawn(move || {
                loop {
                    match receive(&far, sink, true) {
                        Ok(()) => {}
                        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                        Err(error) => return Err(error),
                    }
                }
            }));
        }
        let result = work();
        over.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().map_err(|_| io::Error::other("a stream panicked"))??;
        }
        Ok(result)
    })
}

/// A client and a server that answers each record with 32 bytes.
pub(super) struct PingPong {
    client: TcpStream,
    server: Option<JoinHandle<io::Result<()>>>,
    spin: bool,
}

impl PingPong {
    /// Records of `record_len` bytes. The server makes each durable first if it is given a writer. Both ends wait
    /// asleep, or look again and again.
    pub(super) fn start(record_len: usize, durable: Option<DurableWriter>, spin: bool) -> io::Result<PingPong> {
        let (client, server) = connect()?;
        client.set_nonblocking(spin)?;
        server.set_nonblocking(spin)?;
        let server = std::thread::spawn(move || serve(&server, record_len, durable, spin));
        Ok(PingPong { client, server: Some(server), spin })
    }

    pub(super) fn send(&mut self, record: &[u8]) -> io::Result<()> {
        write_all(&self.client, record, self.spin)
    }

    pub(super) fn await_answer(&mut self) -> io::Result<()> {
        read_exact(&self.client, &mut [0; ACK], self.spin)
    }

    pub(super) fn exchange(&mut self, record: &[u8]) -> io::Result<()> {
        self.send(record)?;
        self.await_answer()
    }
}

impl Drop for PingPong {
    fn drop(&mut self) {
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.take().map(JoinHandle::join);
    }
}

/// The same with the threads that a leader has: one appends and waits, asleep, one ships, one reads acknowledgements.
pub(super) struct RelayedPingPong {
    shipper: Option<Sender<()>>,
    acknowledged: Receiver<()>,
    /// The shipper and the reader.
    threads: Vec<JoinHandle<io::Result<()>>>,
    server: Option<JoinHandle<io::Result<()>>>,
}

impl RelayedPingPong {
    pub(super) fn start(record: &[u8], place: Place) -> io::Result<RelayedPingPong> {
        let (near, far) = connect()?;
        let record_len = record.len();
        let server = place.there(|| std::thread::spawn(move || serve(&far, record_len, None, false)));
        let (shipper, to_ship) = crossbeam_channel::bounded::<()>(1);
        let (answers, acknowledged) = crossbeam_channel::bounded(1);
        let (record, mut sending, mut receiving) = (record.to_vec(), near.try_clone()?, near);
        let ship = std::thread::spawn(move || {
            to_ship.iter().try_for_each(|()| sending.write_all(&record))?;
            sending.shutdown(Shutdown::Write)
        });
        let read = std::thread::spawn(move || {
            let mut answer = [0; ACK];
            while receiving.read_exact(&mut answer).is_ok() && answers.send(()).is_ok() {}
            Ok(())
        });
        Ok(RelayedPingPong { shipper: Some(shipper), acknowledged, threads: vec![ship, read], server: Some(server) })
    }

    pub(super) fn exchange(&self) -> io::Result<()> {
        let ended = || io::Error::other("the relayed ping-pong ended");
        self.shipper.as_ref().ok_or_else(ended)?.send(()).map_err(|_| ended())?;
        self.acknowledged.recv().map_err(|_| ended())
    }
}

impl Drop for RelayedPingPong {
    fn drop(&mut self) {
        self.shipper = None;
        for thread in self.threads.drain(..).chain(self.server.take()) {
            let _ = thread.join();
        }
    }
}

/// A server that makes durable whatever it is sent in one piece, and then answers with 32 bytes.
pub(super) struct DurableStream {
    client: TcpStream,
    server: Option<JoinHandle<io::Result<()>>>,
}

impl DurableStream {
    /// Into a new file with room for `len` bytes.
    pub(super) fn start(path: &Path, len: usize) -> io::Result<DurableStream> {
        let (client, far) = connect()?;
        let file = limits::zeroed_file(path, len)?;
        let server = std::thread::spawn(move || serve_pieces(&far, &file));
        Ok(DurableStream { client, server: Some(server) })
    }

    /// One at a time.
    pub(super) fn exchange(&self, bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?.to_le_bytes();
        let mut stream = &self.client;
        let sent = stream.write_vectored(&[IoSlice::new(&len), IoSlice::new(bytes)])?;
        if let Some(rest) = bytes.get(sent.saturating_sub(len.len())..) {
            stream.write_all(rest)?;
        }
        stream.read_exact(&mut [0; ACK])
    }
}

impl Drop for DurableStream {
    fn drop(&mut self) {
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.take().map(JoinHandle::join);
    }
}

fn serve_pieces(mut stream: &TcpStream, file: &File) -> io::Result<()> {
    let (mut len, mut piece, mut end) = ([0; 4], Vec::new(), 0);
    loop {
        match stream.read_exact(&mut len) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        piece.resize(u32::from_le_bytes(len) as usize, 0);
        stream.read_exact(&mut piece)?;
        limits::write_at(file, &piece, end)?;
        file.sync_data()?;
        end += piece.len() as u64;
        stream.write_all(&[1; ACK])?;
    }
}

fn serve(stream: &TcpStream, record_len: usize, mut durable: Option<DurableWriter>, spin: bool) -> io::Result<()> {
    let mut record = vec![0; record_len];
    loop {
        match read_exact(stream, &mut record, spin) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        if let Some(writer) = &mut durable {
            writer.append(&record)?;
        }
        write_all(stream, &[1; ACK], spin)?;
    }
}

fn read_exact(mut stream: &TcpStream, mut into: &mut [u8], spin: bool) -> io::Result<()> {
    if !spin {
        return stream.read_exact(into);
    }
    while !into.is_empty() {
        match stream.read(into) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => into = &mut into[read..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_all(mut stream: &TcpStream, mut bytes: &[u8], spin: bool) -> io::Result<()> {
    if !spin {
        return stream.write_all(bytes);
    }
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_streamed_arrives() {
        let record = vec![3; 1000];
        let mut log = vec![0; 3 * PIECE];
        let mut copy = vec![0; log.len()];
        append_and_stream(&mut log, &mut copy, &record).unwrap();
        assert_eq!(copy, log);
        assert!(log.contains(&3));
        let mut again = vec![0; log.len()];
        append_and_pass_on(&mut log, &mut copy, &mut again, &record).unwrap();
        assert!(copy == log && again == log);
        again.fill(0);
        stream(&log, &mut again).unwrap();
        assert_eq!(again, log);
        again.fill(0);
        let (first, second) = log.split_at(PIECE + 1);
        stream_checked(&[first, second], &mut again).unwrap();
        assert_eq!(again, log);
        let mut file = tempfile::tempfile().unwrap();
        stream_to_file(&[first, second], &mut file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), log.len() as u64);
    }

    #[test]
    fn every_record_is_answered() {
        for spin in [false, true] {
            let mut ping = PingPong::start(128, None, spin).unwrap();
            (0..10).for_each(|_| ping.exchange(&[0; 128]).unwrap());
        }
        let relayed = RelayedPingPong::start(&[0; 128], Place::Anywhere).unwrap();
        (0..10).for_each(|_| relayed.exchange().unwrap());
    }

    #[test]
    fn streams_end_with_the_work_beside_them() {
        let from = vec![1; PIECE + 7];
        let (mut first, mut second) = (vec![0; PIECE], vec![0; PIECE]);
        assert_eq!(beside_streams(&from, &mut [&mut first, &mut second], || 7).unwrap(), 7);
    }
}
