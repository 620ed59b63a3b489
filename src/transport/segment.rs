//! Segments over a connection: whole ones, piece by piece, and ranges of them for who repairs a log.
//!
//! The pieces are specified in [`payload`](crate::wire::payload), ranges at
//! [`SegmentRange`]. Whoever serves ranges serves sound bytes only, and whoever asks
//! for them checks them against its own log: see `wal/mend.rs`.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::data_dir::Manifest;
use crate::error::{Error, RefusalCode, Result};
use crate::limits::{MAX_SEGMENT_PIECE_LEN, MAX_WAL_DATA_LEN, SEGMENT_HEADER_LEN};
use crate::transport::{Body, Connection, FrameReceiver, FrameSender, Transport, is_closed_by_peer};
use crate::types::{Chain, Lsn, NodeId, ShardId};
use crate::wal::mend::Source;
use crate::wal::segment::{HEADER_PAGE, SegmentHeader};
use crate::wal::{Expected, Log, LogRange, Segment, batch};
use crate::wire::{
    ErrorMessage, FrameHeader, FrameKind, Message, PROTOCOL_VERSIONS, Purpose, SegmentPieceHeader, SegmentRange,
    SegmentSummary, ShardInfo, SyncAck, SyncRequest, WalDataHeader, WalSegmentPayload, WireError,
};

/// Bytes taken from a stream before memory for more is made.
const STEP_LEN: usize = 64 * 1024;

/// Sends a whole segment as `Segment` frames, with a reference to the log for each piece where the payload is mapped.
///
/// # Errors
///
/// As with [`FrameSender::send`].
pub fn send_segment_pieces(sender: &mut dyn FrameSender, payload: &WalSegmentPayload) -> Result<()> {
    let total_len = payload.bytes().len() as u64;
    let mut header = SegmentPieceHeader { id: payload.id(), event_count: payload.event_count(), total_len, offset: 0 };
    for piece in payload.bytes().chunks(MAX_SEGMENT_PIECE_LEN as usize) {
        let len = piece.len() as u64;
        let start = header.offset;
        let prefix = header.to_bytes();
        match payload.log_range() {
            Some(range) => {
                let start = range.start() + start;
                let range = LogRange::new(range.segment().clone(), start..start + len)?;
                sender.send(FrameKind::Segment, 0, &prefix, Body::Log(&range))?;
            }
            None => sender.send(FrameKind::Segment, 0, &prefix, Body::Bytes(piece))?,
        }
        header.offset += len;
    }
    Ok(())
}

/// Receives a whole segment whose first frame has the header `first`, and verifies it. Memory grows with the bytes that
/// arrive, up to `max_len`: the size of the receiver's own segments, say. A time-out ends the segment.
///
/// # Errors
///
/// [`Error::Protocol`] if pieces are missing or out of order, or if the bytes are not the segment that they are
/// announced as; else as with [`FrameReceiver::receive_header`].
pub fn receive_segment(
    receiver: &mut dyn FrameReceiver,
    first: FrameHeader,
    max_len: u64,
) -> Result<(WalSegmentPayload, SegmentSummary)> {
    let mut frame = first;
    let mut bytes = Vec::new();
    let mut whole: Option<SegmentPieceHeader> = None;
    loop {
        let piece = receive_piece_header(receiver, frame)?;
        let whole = *whole.get_or_insert(piece);
        let len = u64::from(receiver.remaining());
        let end = piece.offset.saturating_add(len);
        let reason = if piece.id != whole.id || !same_whole(&piece, &whole) {
            "a piece of another segment"
        } else if !SegmentPieceHeader::TOTAL_LEN.contains(&whole.total_len) {
            "a length that no segment has"
        } else if whole.total_len > max_len {
            "a segment larger than this node takes"
        } else if piece.offset != bytes.len() as u64 {
            "a piece that does not continue the one before"
        } else if len == 0 || end > whole.total_len {
            "a piece without bytes, or with more than the segment has"
        } else {
            ""
        };
        if !reason.is_empty() {
            return Err(WireError::Segment { offset: piece.offset, reason: reason.into() }.from_peer(receiver.peer()));
        }
        receive_growing(receiver, &mut bytes)?;
        if end == whole.total_len {
            let payload = WalSegmentPayload::unverified(whole.id, whole.event_count, bytes);
            let summary = payload.verify().map_err(|error| error.from_peer(receiver.peer()))?;
            return Ok((payload, summary));
        }
        frame = receiver.receive_header()?;
    }
}

fn same_whole(a: &SegmentPieceHeader, b: &SegmentPieceHeader) -> bool {
    (a.event_count, a.total_len) == (b.event_count, b.total_len)
}

fn receive_piece_header(receiver: &mut dyn FrameReceiver, frame: FrameHeader) -> Result<SegmentPieceHeader> {
    let unexpected = |reason: &'static str| WireError::Unexpected { kind: frame.kind, reason: reason.into() };
    if frame.kind != FrameKind::Segment {
        return Err(unexpected("a Segment is due").from_peer(receiver.peer()));
    }
    let mut prefix = [0; SegmentPieceHeader::LEN];
    if (frame.len as usize) < prefix.len() {
        return Err(unexpected("it is too short for a piece").from_peer(receiver.peer()));
    }
    receiver.receive_exact(&mut prefix)?;
    SegmentPieceHeader::decode(&prefix).map_err(|error| error.from_peer(receiver.peer()))
}

/// The rest of the current body, behind what `bytes` holds.
fn receive_growing(receiver: &mut dyn FrameReceiver, bytes: &mut Vec<u8>) -> Result<()> {
    while receiver.remaining() > 0 {
        let start = bytes.len();
        bytes.resize(start + STEP_LEN.min(receiver.remaining() as usize), 0);
        receiver.receive_exact(&mut bytes[start..])?;
    }
    Ok(())
}

/// The whole exchange of [`Transport::send_segment`].
pub(super) fn ship(mut connection: Connection, payload: &WalSegmentPayload, timeout: Duration) -> Result<()> {
    let summary = payload.verify().map_err(|error| Error::invalid(format!("cannot send {}: {error}", payload.id())))?;
    let header = summary.header;
    debug_assert!(payload.bytes().len() as u64 > SEGMENT_HEADER_LEN);
    connection.receiver.set_timeout(Some(timeout))?;
    connection.sender.send_message(&Message::SyncRequest(SyncRequest {
        versions: PROTOCOL_VERSIONS,
        purpose: Purpose::Segment,
        cluster: header.cluster,
        node: NodeId(0),
        region: header.id.region,
        shard: header.id.shard,
        shard_count: 0,
        segment_size: header.segment_size,
        epoch: header.epoch,
        received: header.id.first_lsn.previous(),
        durable: header.id.first_lsn.previous(),
        applied: header.id.first_lsn.previous(),
        chain: header.chain_before,
        from: header.id.first_lsn,
        flags: 0,
    }))?;
    match await_answer(&mut *connection.receiver)? {
        Message::ShardInfo(ShardInfo { version, .. }) if PROTOCOL_VERSIONS.contains(version) => {}
        Message::ShardInfo(ShardInfo { version, .. }) => {
            let reason = format!("it answers in version {version} and was offered {PROTOCOL_VERSIONS}");
            return Err(Error::protocol(connection.peer, reason));
        }
        other => return Err(unexpected(&other, "a ShardInfo is due", connection.peer)),
    }
    send_segment_pieces(&mut *connection.sender, payload)?;
    match await_answer(&mut *connection.receiver)? {
        Message::SyncAck(SyncAck { lsn, .. }) if lsn >= summary.last_lsn => Ok(()),
        Message::SyncAck(SyncAck { lsn, .. }) => {
            let reason = format!("it has synced LSN {lsn}, but the segment ends with {}", summary.last_lsn);
            Err(Error::protocol(connection.peer, reason))
        }
        other => Err(unexpected(&other, "a SyncAck is due", connection.peer)),
    }
}

/// The next message that is not a mere sign of life; a refusal becomes an error.
fn await_answer(receiver: &mut dyn FrameReceiver) -> Result<Message> {
    loop {
        match receiver.receive_message()? {
            Message::Heartbeat(_) => {}
            Message::Error(refusal) => return Err(refusal.from_peer(receiver.peer())),
            message => return Ok(message),
        }
    }
}

fn unexpected(message: &Message, reason: &'static str, peer: String) -> Error {
    WireError::Unexpected { kind: message.kind(), reason: reason.into() }.from_peer(peer)
}

/// Serves ranges of a log until the peer leaves, is silent for `idle`, or asks for something that is not there.
///
/// # Errors
///
/// What ended the stream, if it was not the peer's leaving or a refusal.
pub(crate) fn serve_ranges(
    log: &Log,
    sender: &mut dyn FrameSender,
    receiver: &mut dyn FrameReceiver,
    idle: Duration,
) -> Result<()> {
    receiver.set_timeout(Some(idle))?;
    loop {
        let asked = match receiver.receive_message() {
            Ok(Message::SegmentRange(asked)) => asked,
            Ok(other) => {
                let error = unexpected(&other, "a SegmentRange is due", receiver.peer().to_owned());
                refuse(sender, ErrorMessage::new(RefusalCode::ProtocolViolation, error.to_string()));
                return Err(error);
            }
            Err(error) if is_closed_by_peer(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        let (segment, range) = match sound_range(log, asked) {
            Ok(found) => found,
            Err(refusal) => {
                log::warn!("shard {}: {} gets no range: {}", log.shard(), receiver.peer(), refusal.text);
                refuse(sender, refusal);
                return Ok(());
            }
        };
        sender.send_message(&Message::SegmentRange(SegmentRange { len: range.end - range.start, ..asked }))?;
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + u64::from(MAX_WAL_DATA_LEN));
            let prefix = WalDataHeader { segment: asked.segment, offset: at }.to_bytes();
            let bytes = LogRange::new(Arc::clone(&segment), at..end)?;
            sender.send(FrameKind::WalData, 0, &prefix, Body::Log(&bytes))?;
            at = end;
        }
    }
}

/// The published bytes of what is asked for. They are read from the mapping and verified again from the segment's
/// header on: a node may have the same damage as its peer, and must not hand on what is damaged.
fn sound_range(log: &Log, asked: SegmentRange) -> Result<(Arc<Segment>, Range<u64>), ErrorMessage> {
    let (tail, head) = (log.tail(), log.head());
    let Some(segment) = log.segment_beginning(asked.segment) else {
        let text = format!("no segment of this node begins with LSN {}; it holds LSN {tail} to {head}", asked.segment);
        return Err(ErrorMessage::new(RefusalCode::NotRetained, text));
    };
    let published = segment.published();
    let end = asked.offset.saturating_add(asked.len).min(published);
    let range = asked.offset.min(end)..end;
    let internal = |error: Error| ErrorMessage::new(RefusalCode::Internal, error.to_string());
    let readable = log.health().readable(&segment, range.clone()).map_err(internal)?;
    let sound = sound_end(&segment, end).map_err(internal)?.min(readable);
    if sound < end {
        let text = format!("its own copy of {} is damaged at offset {sound}; ask another node", segment.id());
        return Err(ErrorMessage::new(RefusalCode::Internal, text));
    }
    Ok((segment, range))
}

/// How far the bytes of a segment are valid: to the end of the batch in which `upto` lies, or to where damage begins.
fn sound_end(segment: &Segment, upto: u64) -> Result<u64> {
    let published = segment.published();
    let bytes = segment.bytes(0..published)?;
    let Some((page, mut rest)) = bytes.split_first_chunk::<HEADER_PAGE>() else { return Ok(0) };
    if SegmentHeader::decode(page).as_ref() != Ok(segment.header()) {
        return Ok(0);
    }
    let header = segment.header();
    let mut due = Expected { first_lsn: header.id.first_lsn, chain: header.chain_before, epoch: header.epoch };
    let mut at = SEGMENT_HEADER_LEN;
    while at < upto {
        let Ok(found) = batch::verify(rest, header.segment_size.saturating_sub(at), due) else { return Ok(at) };
        if header.find_misplaced(at, &found).is_some() {
            return Ok(at);
        }
        due = Expected { first_lsn: found.last_lsn().next(), chain: found.crc, ..due };
        at += found.total_len();
        // Verified, so the batch is within the bytes.
        rest = usize::try_from(found.total_len()).ok().and_then(|len| rest.get(len..)).unwrap_or_default();
    }
    Ok(at)
}

fn refuse(sender: &mut dyn FrameSender, refusal: ErrorMessage) {
    // As well as may be: the peer may be gone.
    let _ = sender.send_message(&Message::Error(refusal));
    let _ = sender.finish();
}

/// A node's copy of a shard's log, over a connection.
pub(crate) struct PeerLog {
    peer: String,
    sender: Box<dyn FrameSender>,
    receiver: Box<dyn FrameReceiver>,
    shard: ShardId,
}

impl PeerLog {
    /// Connects to a node that must hold a copy of the same log as the data directory at `path`. The time-out holds for
    /// the connection and then for each answer.
    ///
    /// # Errors
    ///
    /// [`Error::Network`], [`Error::Refused`], [`Error::Protocol`]; [`Error::Mismatch`] if it is another log.
    pub(crate) fn connect(
        transport: &dyn Transport,
        address: &str,
        timeout: Duration,
        (path, manifest, shard): (&Path, &Manifest, ShardId),
    ) -> Result<PeerLog> {
        let Connection { peer, mut sender, mut receiver, .. } = transport.connect(address, timeout)?;
        receiver.set_timeout(Some(timeout))?;
        sender.send_message(&Message::SyncRequest(SyncRequest {
            versions: PROTOCOL_VERSIONS,
            purpose: Purpose::Segment,
            cluster: manifest.cluster,
            node: manifest.node,
            region: manifest.region,
            shard,
            shard_count: manifest.shard_count,
            segment_size: manifest.segment_size,
            epoch: manifest.epoch,
            received: Lsn::ZERO,
            durable: Lsn::ZERO,
            applied: Lsn::ZERO,
            chain: Chain::default(),
            from: Lsn::ZERO,
            flags: 0,
        }))?;
        let info = match await_answer(&mut *receiver)? {
            Message::ShardInfo(info) if PROTOCOL_VERSIONS.contains(info.version) => info,
            Message::ShardInfo(ShardInfo { version, .. }) => {
                let reason = format!("it answers in version {version} and was offered {PROTOCOL_VERSIONS}");
                return Err(Error::protocol(peer, reason));
            }
            other => return Err(unexpected(&other, "a ShardInfo is due", peer)),
        };
        let own = (manifest.cluster, manifest.region, shard, manifest.segment_size);
        let theirs = (info.cluster, info.region, info.shard, info.segment_size);
        if own != theirs {
            return Err(Error::Mismatch {
                path: path.to_owned(),
                reason: format!(
                    "its log is of cluster {}, region {}, shard {}, segments of {} bytes, but {peer} holds cluster {}, \
                     region {}, shard {}, {} bytes; check the address",
                    own.0, own.1, own.2, own.3, theirs.0, theirs.1, theirs.2, theirs.3
                )
                .into(),
            });
        }
        Ok(PeerLog { peer, sender, receiver, shard })
    }
}

impl Source for PeerLog {
    fn fetch(&mut self, segment: Lsn, range: Range<u64>, put: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<u64> {
        let asked = SegmentRange { segment, offset: range.start, len: range.end - range.start };
        log::info!("shard {}: asking {} for {} bytes at {}", self.shard, self.peer, asked.len, asked.offset);
        self.sender.send_message(&Message::SegmentRange(asked))?;
        let end = match await_answer(&mut *self.receiver)? {
            Message::SegmentRange(answer)
                if (answer.segment, answer.offset) == (segment, range.start) && answer.len <= asked.len =>
            {
                range.start + answer.len
            }
            Message::SegmentRange(answer) => {
                let reason = format!("it was asked for {asked:?} and answers with {answer:?}");
                return Err(Error::protocol(self.peer.clone(), reason));
            }
            other => return Err(unexpected(&other, "a SegmentRange is due", self.peer.clone())),
        };
        let mut at = range.start;
        let mut step = vec![0; STEP_LEN];
        while at < end {
            let frame = self.receiver.receive_header()?;
            if frame.kind != FrameKind::WalData {
                let message = self.receiver.receive_message_body(frame)?;
                return Err(unexpected(&message, "a WalData is due", self.peer.clone()));
            }
            let mut prefix = [0; WalDataHeader::LEN];
            let is_long_enough = frame.len as usize > prefix.len();
            if is_long_enough {
                self.receiver.receive_exact(&mut prefix)?;
            }
            let header = WalDataHeader::decode(&prefix).map_err(|error| error.from_peer(&*self.peer))?;
            let fits =
                (header.segment, header.offset) == (segment, at) && u64::from(self.receiver.remaining()) <= end - at;
            if !is_long_enough || !fits {
                let reason = format!("it sends a range that does not continue the one before, at offset {at}");
                return Err(Error::protocol(self.peer.clone(), reason));
            }
            while self.receiver.remaining() > 0 {
                let len = STEP_LEN.min(self.receiver.remaining() as usize);
                self.receiver.receive_exact(&mut step[..len])?;
                put(at, &step[..len])?;
                at += len as u64;
            }
        }
        Ok(end)
    }

    fn name(&self) -> &str {
        &self.peer
    }
}
