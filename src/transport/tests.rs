//! One suite of behaviours, run over every transport.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::*;
use crate::error::RefusalCode;
use crate::limits::{FRAME_HEADER_LEN, MAX_SEGMENT_SIZE, MAX_WAL_DATA_LEN, MIN_SEGMENT_SIZE};
use crate::types::{Epoch, Lsn, SessionId};
use crate::wire::sample::{self, golden_messages, mapped, sealed_bytes};
use crate::wire::{ErrorMessage, FLAG_ACK_DURABLE, Purpose, SegmentPieceHeader, SyncAck, WalDataHeader};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(5);

fn connected(transport: &dyn Transport) -> (Connection, Connection) {
    let listener = transport.listen("127.0.0.1:0").unwrap();
    let here = transport.connect(&listener.local_address(), LONG).unwrap();
    let there = listener.accept().unwrap();
    (here, there)
}

/// Bytes that differ everywhere and by `seed`.
fn noise(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at * 31 + at / 251 + seed * 7) % 256).unwrap()).collect()
}

fn receive_whole(receiver: &mut dyn FrameReceiver) -> Result<(FrameHeader, Vec<u8>)> {
    let header = receiver.receive_header()?;
    let mut body = vec![0; header.len as usize];
    receiver.receive_exact(&mut body)?;
    Ok((header, body))
}

fn every_message_arrives(transport: &dyn Transport) {
    let (mut here, mut there) = connected(transport);
    for (message, _) in golden_messages() {
        here.sender.send_message(&message).unwrap();
        assert_eq!(there.receiver.receive_message().unwrap(), message);
        there.sender.send_message(&message).unwrap();
        let header = here.receiver.receive_header().unwrap();
        assert_eq!(here.receiver.receive_message_body(header).unwrap(), message);
    }
}

fn flags_arrive(transport: &dyn Transport) {
    let (mut here, mut there) = connected(transport);
    let sync = Message::Sync(crate::wire::Sync { lsn: Lsn(3) });
    here.sender.send_message_with_flags(&sync, FLAG_ACK_DURABLE).unwrap();
    let header = there.receiver.receive_header().unwrap();
    assert_eq!((header.kind, header.flags), (FrameKind::Sync, FLAG_ACK_DURABLE));
    assert_eq!(there.receiver.receive_message_body(header).unwrap(), sync);
}

fn what_is_sent_at_once_arrives(transport: &dyn Transport) {
    let (mut here, mut there) = connected(transport);
    let message = Message::Sync(crate::wire::Sync { lsn: Lsn(3) });
    for round in 0..100 {
        let body = message.to_message_bytes();
        let sent = here.sender.send_at_once(FrameKind::Sync, 0, body.as_slice(), Body::EMPTY).unwrap();
        if sent == SentAtOnce::Nothing && cfg!(windows) {
            // Where a socket cannot be asked not to wait, which is a transport's right.
            break;
        }
        assert_eq!(sent, SentAtOnce::Whole, "round {round}");
        here.sender.flush().unwrap();
        here.sender.send_message(&message).unwrap();
        assert_eq!(there.receiver.receive_message().unwrap(), message);
        assert_eq!(there.receiver.receive_message().unwrap(), message);
    }
    let too_long = noise(1 << 20, 1);
    let refused = here.sender.send_at_once(FrameKind::Sync, 0, &too_long, Body::EMPTY);
    assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
    here.closer.close();
    let over = here.sender.send_at_once(FrameKind::CaughtUp, 0, &[0; 8], Body::EMPTY);
    assert!(matches!(over, Err(Error::Network { .. })), "{over:?}");
}

/// Nobody reads, so at some point the stream takes no more: nothing blocks, and once somebody reads, every frame that
/// was taken arrives whole and in order, also the one of which only a part went at once.
fn what_the_stream_does_not_take_at_once_is_not_lost(transport: &dyn Transport) {
    let (mut here, mut there) = connected(transport);
    let mut taken = 0;
    loop {
        let body = noise(60_000, taken);
        match here.sender.send_at_once(FrameKind::BaseData, 0, &[0; 32], Body::Bytes(&body)).unwrap() {
            SentAtOnce::Whole => taken += 1,
            SentAtOnce::Part => {
                taken += 1;
                let more = here.sender.send_at_once(FrameKind::BaseData, 0, &[0; 32], Body::Bytes(&body)).unwrap();
                assert_eq!(more, SentAtOnce::Nothing, "a rest is to be sent first");
                break;
            }
            SentAtOnce::Nothing => break,
        }
        assert!(taken < 10_000, "a stream that takes everything");
    }
    thread::scope(|scope| {
        scope.spawn(move || {
            here.sender.flush().unwrap();
            here.sender.send(FrameKind::BaseData, 0, &[1; 32], Body::Bytes(&noise(10, taken))).unwrap();
            here.sender.finish().unwrap();
            // Both halves stay until the peer has everything.
            let _ = here.receiver.receive_header();
        });
        for number in 0..taken {
            let (header, body) = receive_whole(there.receiver.as_mut()).unwrap();
            assert_eq!((header.kind, &body[32..]), (FrameKind::BaseData, noise(60_000, number).as_slice()));
        }
        let (_, last) = receive_whole(there.receiver.as_mut()).unwrap();
        assert_eq!(last[32..], noise(10, taken));
        assert!(is_closed_by_peer(&there.receiver.receive_header().unwrap_err()));
        drop(there);
    });
}

fn the_largest_log_range_arrives_in_the_callers_memory(transport: &dyn Transport) {
    let (mut here, mut there) = connected(transport);
    let record = noise(MAX_WAL_DATA_LEN as usize, 1);
    let bytes = sealed_bytes(&[&[&record]], 2 * 1024 * 1024);
    let (segment, _dir) = mapped(&bytes, true);
    let range = LogRange::new(segment, 5..5 + u64::from(MAX_WAL_DATA_LEN)).unwrap();
    let prefix = WalDataHeader { segment: Lsn(100), offset: 5 };
    let expected = range.bytes().to_vec();
    let sending = thread::spawn(move || {
        here.sender.send(FrameKind::WalData, FLAG_ACK_DURABLE, &prefix.to_bytes(), Body::Log(&range)).unwrap();
        here
    });
    let header = there.receiver.receive_header().unwrap();
    assert_eq!((header.kind, header.flags, header.len), (FrameKind::WalData, 1, 16 + MAX_WAL_DATA_LEN));
    let mut start = [0; WalDataHeader::LEN];
    there.receiver.receive_exact(&mut start).unwrap();
    assert_eq!(WalDataHeader::decode(&start), Ok(prefix));
    assert_eq!(there.receiver.remaining(), MAX_WAL_DATA_LEN);
    let mut memory = vec![0; MAX_WAL_DATA_LEN as usize];
    let (first, second) = memory.split_at_mut(300_001);
    there.receiver.receive_exact(first).unwrap();
    assert_eq!(there.receiver.current(), Some(header));
    there.receiver.receive_exact(second).unwrap();
    assert!(memory == expected);
    assert_eq!((there.receiver.remaining(), there.receiver.current()), (0, None));
    drop(sending.join().unwrap());
}

fn frames_of_all_sizes_arrive_in_order(transport: &dyn Transport) {
    let (mut here, mut there) = connected(transport);
    let sizes = || (0..600).map(|at| at * at * 7919 % 40_000 / (1 + at % 7 * 60));
    let sending = thread::spawn(move || {
        for (at, size) in sizes().enumerate() {
            let body = noise(size, at);
            let (prefix, body) = body.split_at(size.min(at % 90));
            here.sender.send(FrameKind::Status, 0, prefix, Body::Bytes(body)).unwrap();
        }
        here
    });
    for (at, size) in sizes().enumerate() {
        let header = there.receiver.receive_header().unwrap();
        assert_eq!(header.len as usize, size);
        let mut body = vec![0; size];
        let (first, second) = body.split_at_mut(size / 3);
        there.receiver.receive_exact(first).unwrap();
        if second.len() <= 4096 {
            assert_eq!(there.receiver.receive_body().unwrap(), &noise(size, at)[size / 3..]);
        } else {
            there.receiver.receive_exact(second).unwrap();
            assert!(body == noise(size, at), "frame {at}");
        }
    }
    drop(sending.join().unwrap());
}

fn two_halves_work_on_two_threads(transport: &dyn Transport) {
    let (here, mut there) = connected(transport);
    let echo = thread::spawn(move || {
        while let Ok(message) = there.receiver.receive_message() {
            there.sender.send_message(&message).unwrap();
        }
    });
    let Connection { mut sender, mut receiver, closer, .. } = here;
    let message = |lsn| Message::CaughtUp(crate::wire::CaughtUp { head: Lsn(lsn) });
    let sending = thread::spawn(move || {
        for lsn in 0..2_000 {
            sender.send_message(&message(lsn)).unwrap();
        }
        sender
    });
    for lsn in 0..2_000 {
        assert_eq!(receiver.receive_message().unwrap(), message(lsn));
    }
    drop(sending.join().unwrap());
    closer.close();
    echo.join().unwrap();
}

fn misuse_is_refused_and_does_no_harm(transport: &dyn Transport) {
    let (mut here, mut there) = connected(transport);
    let huge = vec![0; FrameKind::Status.max_len() as usize + 1];
    let error = here.sender.send(FrameKind::Status, 0, &[], Body::Bytes(&huge)).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }) && error.to_string().contains("Status may have at most"), "{error}");
    assert!(here.sender.send(FrameKind::Ack, 1, &[], Body::EMPTY).is_err());
    here.sender.send(FrameKind::Status, 0, b"12345", Body::Bytes(b"678")).unwrap();
    here.sender.send_message(&Message::StatusRequest).unwrap();
    assert_eq!(there.receiver.receive_header().unwrap().len, 8);
    assert!(matches!(there.receiver.receive_header(), Err(Error::Invalid { .. })));
    assert!(matches!(there.receiver.receive_exact(&mut [0; 9]), Err(Error::Invalid { .. })));
    let mut body = [0; 8];
    there.receiver.receive_exact(&mut body).unwrap();
    assert_eq!(&body, b"12345678");
    assert_eq!(there.receiver.receive_message().unwrap(), Message::StatusRequest);
    assert!(matches!(there.receiver.set_timeout(Some(Duration::ZERO)), Err(Error::Invalid { .. })));
}

fn raw_bytes_are_not_a_message(transport: &dyn Transport) {
    let (mut here, mut there) = connected(transport);
    here.sender.send(FrameKind::Status, 0, b"x", Body::EMPTY).unwrap();
    here.sender.send(FrameKind::Ack, 0, b"too short", Body::EMPTY).unwrap();
    let error = there.receiver.receive_message().unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
    assert_eq!(there.receiver.receive_body().unwrap(), b"x");
    let error = there.receiver.receive_message().unwrap_err().to_string();
    assert!(error.contains("Ack of 9 bytes") && error.contains(&there.peer), "{error}");
}

fn a_timeout_is_no_end(transport: &dyn Transport) {
    let (mut here, mut there) = connected(transport);
    there.receiver.set_timeout(Some(SHORT)).unwrap();
    for _ in 0..3 {
        let error = there.receiver.receive_message().unwrap_err();
        assert!(error.is_timeout() && !is_closed_by_peer(&error), "{error}");
    }
    assert!(!there.receiver.has_buffered());
    there.receiver.set_timeout(None).unwrap();
    here.sender.send_message(&Message::StatusRequest).unwrap();
    here.sender.send_message(&Message::StatusRequest).unwrap();
    assert_eq!(there.receiver.receive_message().unwrap(), Message::StatusRequest);
    assert_eq!(there.receiver.receive_message().unwrap(), Message::StatusRequest);
    assert!(!there.receiver.has_buffered());
}

fn what_was_sent_arrives_before_the_end(transport: &dyn Transport) {
    let (mut here, mut there) = connected(transport);
    let refusal = Message::Error(ErrorMessage::new(RefusalCode::WrongRole, "ask the leader"));
    here.sender.send_message(&refusal).unwrap();
    // The closer does not keep the connection open.
    let closer = here.closer.clone();
    drop(here);
    assert_eq!(there.receiver.receive_message().unwrap(), refusal);
    for _ in 0..2 {
        let error = there.receiver.receive_header().unwrap_err();
        assert!(is_closed_by_peer(&error) && !error.is_timeout(), "{error}");
        assert!(error.to_string().contains("closed by peer"), "{error}");
    }
    assert!(!there.receiver.has_buffered());
    let error = (0..1_000).find_map(|_| there.sender.send_message(&refusal).err()).unwrap();
    assert!(matches!(error, Error::Network { .. }) && !error.is_timeout(), "{error}");
    closer.close();
}

fn closing_wakes_receivers_on_both_sides(transport: &dyn Transport) {
    let (mut here, mut there) = connected(transport);
    let closer = here.closer.clone();
    let (ready, waiting) = mpsc::channel();
    thread::scope(|scope| {
        let ready_too = ready.clone();
        let own = scope.spawn(move || {
            ready.send(()).unwrap();
            here.receiver.receive_header().unwrap_err()
        });
        let peers = scope.spawn(move || {
            ready_too.send(()).unwrap();
            there.receiver.receive_header().unwrap_err()
        });
        assert_eq!(waiting.iter().take(2).count(), 2);
        closer.close();
        closer.close();
        let own = own.join().unwrap();
        assert!(!is_closed_by_peer(&own) && own.to_string().contains("closed on this side"), "{own}");
        assert!(is_closed_by_peer(&peers.join().unwrap()));
    });
}

fn closing_wakes_a_sender_that_nobody_reads_from(transport: &dyn Transport) {
    let (mut here, there) = connected(transport);
    let closer = here.closer.clone();
    let (sent, seen) = mpsc::channel();
    let sending = thread::spawn(move || {
        let body = vec![7; 1024 * 1024];
        loop {
            match here.sender.send(FrameKind::Status, 0, &[], Body::Bytes(&body)) {
                Ok(()) => sent.send(()).unwrap(),
                Err(error) => return (error, here.sender.send_message(&Message::StatusRequest)),
            }
        }
    });
    // Wait until nothing is taken any more: the sender blocks then, as the peer reads nothing.
    while seen.recv_timeout(Duration::from_millis(200)).is_ok() {}
    closer.close();
    let (error, again) = sending.join().unwrap();
    assert!(error.to_string().contains("closed on this side"), "{error}");
    assert!(again.is_err());
    drop(there);
}

fn closing_a_listener_wakes_every_accept(transport: &dyn Transport) {
    let listener: Arc<dyn Listener> = Arc::from(transport.listen("127.0.0.1:0").unwrap());
    let address = listener.local_address();
    let (ready, waiting) = mpsc::channel();
    thread::scope(|scope| {
        let accepting: Vec<_> = (0..3)
            .map(|_| {
                let (listener, ready) = (Arc::clone(&listener), ready.clone());
                scope.spawn(move || {
                    ready.send(()).unwrap();
                    listener.accept().unwrap_err()
                })
            })
            .collect();
        assert_eq!(waiting.iter().take(3).count(), 3);
        listener.close();
        for thread in accepting {
            assert!(thread.join().unwrap().is_shutdown());
        }
    });
    listener.close();
    assert!(listener.accept().unwrap_err().is_shutdown());
    drop(listener);
    let error = transport.connect(&address, LONG).unwrap_err();
    assert!(matches!(error, Error::Network { .. }) && error.to_string().contains(&address), "{error}");
    // The address is free again.
    transport.listen(&address).unwrap();
}

fn an_address_is_taken_once(transport: &dyn Transport) {
    let listener = transport.listen("127.0.0.1:0").unwrap();
    let error = transport.listen(&listener.local_address()).err().unwrap();
    assert!(error.to_string().contains("cannot listen on"), "{error}");
}

fn whole_segments_travel_by_hand(transport: &dyn Transport) {
    let listener = transport.listen("127.0.0.1:0").unwrap();
    let address = listener.local_address();
    let record = noise(1_500_000, 3);
    let bytes = sealed_bytes(&[&[&record, b"x"], &[b"y"]], 4 * 1024 * 1024);
    let (segment, _dir) = mapped(&bytes, true);
    let payload = WalSegmentPayload::from_segment(&segment).unwrap();
    let taking = thread::spawn(move || {
        let mut summaries = Vec::new();
        for synced in [Lsn(102), Lsn(101)] {
            let mut stream = listener.accept().unwrap();
            let Message::SyncRequest(request) = stream.receiver.receive_message().unwrap() else {
                panic!("no request")
            };
            assert_eq!((request.purpose, request.received, request.epoch), (Purpose::Segment, Lsn(99), Epoch(3)));
            let answer = golden_messages().swap_remove(1).0;
            stream.sender.send_message(&answer).unwrap();
            let header = stream.receiver.receive_header().unwrap();
            let (payload, summary) = receive_segment(&mut *stream.receiver, header, 4 * 1024 * 1024).unwrap();
            assert!(payload.bytes() == bytes);
            summaries.push(summary);
            let ack = SyncAck { lsn: synced, session: SessionId::NONE, epoch: Epoch(3) };
            stream.sender.send_message(&ack.into()).unwrap();
        }
        let mut stream = listener.accept().unwrap();
        stream.receiver.receive_message().unwrap();
        stream.sender.send_message(&ErrorMessage::new(RefusalCode::StaleEpoch, "no").into()).unwrap();
        summaries
    });
    transport.send_segment(&address, &payload).unwrap();
    let error = transport.send_segment(&address, &payload).unwrap_err();
    assert!(error.to_string().contains("has synced LSN 101"), "{error}");
    let owned = WalSegmentPayload::from_bytes(payload.bytes()).unwrap();
    let error = transport.send_segment(&address, &owned).unwrap_err();
    assert!(matches!(error, Error::Refused { code: RefusalCode::StaleEpoch, .. }), "{error}");
    assert_eq!(taking.join().unwrap()[0], payload.verify().unwrap());
}

fn pieces_that_do_not_fit_together_are_refused(transport: &dyn Transport) {
    let bytes = sample::small_segment();
    let whole = SegmentPieceHeader { id: sample::SEGMENT_ID, event_count: 3, total_len: bytes.len() as u64, offset: 0 };
    let total_len = whole.total_len;
    let rest = SegmentPieceHeader { offset: 100, ..whole };
    // The header of a second piece behind the first 100 bytes, and its bytes.
    let seconds: [(SegmentPieceHeader, &[u8]); 6] = [
        (SegmentPieceHeader { offset: 99, ..rest }, &bytes[100..]),
        (SegmentPieceHeader { offset: 101, ..rest }, &bytes[101..]),
        (SegmentPieceHeader { total_len: total_len + 8, ..rest }, &bytes[100..]),
        (SegmentPieceHeader { event_count: 4, ..rest }, &bytes[100..]),
        (rest, &[]),
        (rest, &bytes[99..]),
    ];
    let receive_at_most = |max_len, first: SegmentPieceHeader, second: (SegmentPieceHeader, &[u8])| {
        let (mut here, mut there) = connected(transport);
        here.sender.send(FrameKind::Segment, 0, &first.to_bytes(), Body::Bytes(&bytes[..100])).unwrap();
        here.sender.send(FrameKind::Segment, 0, &second.0.to_bytes(), Body::Bytes(second.1)).unwrap();
        let header = there.receiver.receive_header().unwrap();
        receive_segment(&mut *there.receiver, header, max_len)
    };
    let receive = |first, second| receive_at_most(MAX_SEGMENT_SIZE, first, second);
    assert!(receive(whole, (rest, &bytes[100..])).is_ok());
    assert!(receive_at_most(total_len, whole, (rest, &bytes[100..])).is_ok());
    assert!(receive_at_most(total_len - 1, whole, (rest, &bytes[100..])).is_err());
    for second in seconds {
        assert!(matches!(receive(whole, second), Err(Error::Protocol { .. })), "{second:?}");
    }
    // A number that no segment has is refused with the first piece, before anything is allocated for it.
    for total_len in [0, SegmentPieceHeader::TOTAL_LEN.start() - 1, SegmentPieceHeader::TOTAL_LEN.end() + 1, u64::MAX] {
        let first = SegmentPieceHeader { total_len, ..whole };
        let second = SegmentPieceHeader { total_len, ..rest };
        assert!(matches!(receive(first, (second, &bytes[100..])), Err(Error::Protocol { .. })), "{total_len}");
    }
    assert!(total_len < MIN_SEGMENT_SIZE);
}

macro_rules! over_each_transport {
    ($($behaviour:ident,)*) => {
        mod tcp {
            $( #[test] fn $behaviour() { super::$behaviour(&crate::transport::TcpTransport::default()) } )*
        }
        mod tcp_spinning {
            use crate::transport::{TcpOptions, TcpTransport};
            $( #[test] fn $behaviour() {
                super::$behaviour(&TcpTransport::new(TcpOptions { spin_receive: true, ..TcpOptions::default() }))
            } )*
        }
        mod in_process {
            $( #[test] fn $behaviour() { super::$behaviour(&crate::transport::InProcessTransport::new()) } )*
        }
    };
}

over_each_transport! {
    every_message_arrives,
    what_is_sent_at_once_arrives,
    what_the_stream_does_not_take_at_once_is_not_lost,
    flags_arrive,
    the_largest_log_range_arrives_in_the_callers_memory,
    frames_of_all_sizes_arrive_in_order,
    two_halves_work_on_two_threads,
    misuse_is_refused_and_does_no_harm,
    raw_bytes_are_not_a_message,
    a_timeout_is_no_end,
    what_was_sent_arrives_before_the_end,
    closing_wakes_receivers_on_both_sides,
    closing_wakes_a_sender_that_nobody_reads_from,
    closing_a_listener_wakes_every_accept,
    an_address_is_taken_once,
    whole_segments_travel_by_hand,
    pieces_that_do_not_fit_together_are_refused,
}

/// What only a peer with a plain socket can do.
mod hostile {
    use std::io::Write;
    use std::net::TcpStream;

    use proptest::prelude::*;

    use super::*;

    fn raw() -> (TcpStream, Connection) {
        let listener = TcpTransport::default().listen("127.0.0.1:0").unwrap();
        let raw = TcpStream::connect(listener.local_address()).unwrap();
        raw.set_nodelay(true).unwrap();
        (raw, listener.accept().unwrap())
    }

    /// What breaks: whoever connects and says nothing. How: there is no time-out yet, only the deadline for the first
    /// frame. What prevents harm: it holds for a receiver that spins as for one that sleeps.
    #[test]
    fn a_deadline_ends_every_wait_however_long_the_timeout() {
        for spin_receive in [false, true] {
            let transport = TcpTransport::new(TcpOptions { spin_receive, ..TcpOptions::default() });
            let listener = transport.listen("127.0.0.1:0").unwrap();
            let _silent = TcpStream::connect(listener.local_address()).unwrap();
            let mut receiver = listener.accept().unwrap().receiver;
            for timeout in [None, Some(Duration::from_secs(3600))] {
                receiver.set_timeout(timeout).unwrap();
                receiver.set_deadline(Instant::now().checked_add(Duration::from_millis(20))).unwrap();
                let error = receiver.receive_header().unwrap_err();
                assert!(error.is_timeout() && error.to_string().contains("nothing arrived in time"), "{error}");
            }
        }
    }

    fn frame(kind: FrameKind, body: &[u8]) -> Vec<u8> {
        let mut bytes = FrameHeader::new(kind, 0, body, &[]).unwrap().encode().to_vec();
        bytes.extend_from_slice(body);
        bytes
    }

    /// Repeats a call until it gives something else than a time-out.
    fn patiently<T>(mut call: impl FnMut() -> Result<T>) -> T {
        loop {
            match call() {
                Ok(value) => return value,
                Err(error) => assert!(error.is_timeout(), "{error}"),
            }
        }
    }

    #[test]
    fn frames_that_come_byte_by_byte_are_received_across_timeouts() {
        let (mut raw, mut stream) = raw();
        stream.receiver.set_timeout(Some(Duration::from_millis(1))).unwrap();
        let body = noise(40, 0);
        let bytes = frame(FrameKind::Status, &body);
        let (head, tail) = bytes.split_at(FRAME_HEADER_LEN);
        for &byte in &head[..FRAME_HEADER_LEN - 1] {
            raw.write_all(&[byte]).unwrap();
            assert!(stream.receiver.receive_header().unwrap_err().is_timeout());
        }
        raw.write_all(&head[FRAME_HEADER_LEN - 1..]).unwrap();
        assert_eq!(patiently(|| stream.receiver.receive_header()).len, 40);
        let mut into = [0; 40];
        for &byte in &tail[..39] {
            raw.write_all(&[byte]).unwrap();
            assert!(stream.receiver.receive_exact(&mut into).unwrap_err().is_timeout());
        }
        // Half received: nothing but the same call makes sense.
        assert!(matches!(stream.receiver.receive_exact(&mut [0; 39]), Err(Error::Invalid { .. })));
        assert!(matches!(stream.receiver.receive_body(), Err(Error::Invalid { .. })));
        assert!(matches!(stream.receiver.receive_header(), Err(Error::Invalid { .. })));
        raw.write_all(&tail[39..]).unwrap();
        patiently(|| stream.receiver.receive_exact(&mut into));
        assert_eq!(into[..], body);

        let (message, _) = golden_messages().swap_remove(0);
        let bytes = frame(message.kind(), &message.to_vec());
        for &byte in &bytes[..bytes.len() - 1] {
            raw.write_all(&[byte]).unwrap();
            assert!(stream.receiver.receive_message().unwrap_err().is_timeout());
        }
        raw.write_all(&bytes[bytes.len() - 1..]).unwrap();
        assert_eq!(patiently(|| stream.receiver.receive_message()), message);
    }

    #[test]
    fn an_end_inside_a_frame_is_named() {
        let bytes = frame(FrameKind::Status, &[1; 100]);
        for (cut, text) in [(7, "in the middle of a frame header, after 7 bytes"), (46, "with 70 of 100 bytes still")] {
            let (mut raw, mut stream) = raw();
            raw.write_all(&bytes[..cut]).unwrap();
            drop(raw);
            let error = receive_whole(&mut *stream.receiver).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
            assert!(!is_closed_by_peer(&error) && !error.is_timeout());
        }
    }

    #[test]
    fn other_protocols_are_recognised() {
        let (mut raw, mut stream) = raw();
        raw.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        for _ in 0..2 {
            let error = stream.receiver.receive_header().unwrap_err();
            assert!(matches!(error, Error::Protocol { .. }) && error.to_string().contains("HTTP"), "{error}");
        }
    }

    /// What the caller is given of each frame that is covered has been checked: a prefix as well as a message.
    #[test]
    fn every_flipped_bit_that_the_frame_covers_ends_the_stream() {
        let mut frames: Vec<_> = golden_messages()
            .iter()
            .map(|(message, _)| (frame(message.kind(), &message.to_vec()), message.to_vec().len()))
            .collect();
        for kind in [FrameKind::WalData, FrameKind::BaseData, FrameKind::Segment] {
            frames.push((frame(kind, &noise(kind.prefix_len() as usize + 9, 1)), kind.prefix_len() as usize));
        }
        frames.push((frame(FrameKind::Status, &noise(300, 2)), 300));
        for (bytes, covered) in frames {
            for bit in 0..(FRAME_HEADER_LEN + covered) * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let (mut raw, mut stream) = raw();
                raw.write_all(&damaged).unwrap();
                let receiver = &mut *stream.receiver;
                let mut into = vec![0; covered];
                let found = receiver.receive_header().and_then(|header| match header.kind.is_message() {
                    true => receiver.receive_message_body(header).map(|_| ()),
                    false => receiver.receive_exact(&mut into),
                });
                assert!(matches!(found, Err(Error::Protocol { .. })), "bit {bit} of {bytes:?}: {found:?}");
            }
        }
    }

    #[test]
    fn a_frame_without_room_for_its_prefix_is_the_peers_fault() {
        let (mut raw, mut stream) = raw();
        raw.write_all(&FrameHeader { kind: FrameKind::WalData, flags: 0, len: 5, body_crc: 0 }.encode()).unwrap();
        let error = stream.receiver.receive_header().unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }) && error.to_string().contains("WalData of 5 bytes"), "{error}");
    }

    #[test]
    fn an_oversized_frame_is_refused_by_its_header() {
        let (mut raw, mut stream) = raw();
        let mut bytes = FrameHeader { kind: FrameKind::WalData, flags: 0, len: 5_000_000, body_crc: 0 }.encode();
        raw.write_all(&bytes).unwrap();
        let error = stream.receiver.receive_header().unwrap_err().to_string();
        assert!(error.contains("frame of 5000000 bytes; WalData may have at most 1048592"), "{error}");
        assert_eq!(stream.receiver.remaining(), 0);
        bytes[4] ^= 1;
        assert!(FrameHeader::decode(&bytes).is_err());
    }

    #[test]
    fn addresses_that_are_none_say_so() {
        let transport = TcpTransport::default();
        let error = transport.connect("db1", LONG).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }) && error.to_string().contains("use host:port"), "{error}");
        let error = transport.connect("name.invalid:1", LONG).unwrap_err();
        assert!(matches!(error, Error::Network { .. }) && error.to_string().contains("does not resolve"), "{error}");
        assert!(transport.connect("127.0.0.1:1", Duration::ZERO).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn arbitrary_streams_never_panic(start in any::<prop::sample::Index>(),
                                         flip in any::<prop::sample::Index>(),
                                         mask: u8,
                                         noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let golden = golden_messages();
            let (message, _) = &golden[start.index(golden.len())];
            let mut bytes = frame(message.kind(), &message.to_vec());
            let at = flip.index(bytes.len());
            bytes[at] ^= mask;
            bytes.extend_from_slice(&noise);
            let (mut raw, mut stream) = raw();
            raw.write_all(&bytes).unwrap();
            drop(raw);
            let error = loop {
                if let Err(error) = stream.receiver.receive_message() {
                    break error;
                }
            };
            prop_assert!(!error.is_timeout());
        }
    }
}
