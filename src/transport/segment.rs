//! Whole segments over a connection, piece by piece. The pieces are specified in [`payload`](crate::wire::payload).

use std::time::Duration;

use crate::error::{Error, Result};
use crate::limits::{MAX_SEGMENT_PIECE_LEN, SEGMENT_HEADER_LEN};
use crate::transport::{Body, Connection, FrameReceiver, FrameSender};
use crate::types::NodeId;
use crate::wal::LogRange;
use crate::wire::{
    FrameHeader, FrameKind, Message, PROTOCOL_VERSIONS, Purpose, SegmentPieceHeader, SegmentSummary, ShardInfo,
    SyncAck, SyncRequest, WalSegmentPayload, WireError,
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

/// The whole exchange of [`Transport::send_segment`](super::Transport::send_segment).
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
