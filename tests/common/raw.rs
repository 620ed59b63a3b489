//! A follower made of frames, for what a real one would not do.

use std::sync::Arc;

use towline::transport::Connection;
use towline::wal::{Log, LogEnd};
use towline::wire::{
    Ack, CommonPoint, FrameKind, Message, PROTOCOL_VERSIONS, Purpose, ShardInfo, SyncRequest, WalDataHeader,
};
use towline::{Chain, Error, Lsn, Manifest, NodeId, RefusalCode, ShardId};

/// The request of a follower of the node with `manifest`, whose log is empty. Change what should be different.
pub fn follow_request(manifest: &Manifest, node: u64, shard: ShardId) -> SyncRequest {
    SyncRequest {
        versions: PROTOCOL_VERSIONS,
        purpose: Purpose::Follow,
        cluster: manifest.cluster,
        node: NodeId(node),
        region: manifest.region,
        shard,
        shard_count: manifest.shard_count,
        segment_size: manifest.segment_size,
        epoch: manifest.epoch,
        received: Lsn::ZERO,
        durable: Lsn::ZERO,
        applied: Lsn::ZERO,
        chain: Chain::genesis(manifest.cluster, manifest.region, shard),
        from: Lsn::ZERO,
        flags: 0,
    }
}

/// The same with a log that ends like another.
pub fn continuing(request: SyncRequest, end: LogEnd) -> SyncRequest {
    SyncRequest { received: end.head, durable: end.head, applied: end.head, chain: end.chain, ..request }
}

/// The answer of a follower that knows of no point that its log shares with the leader's, to the question where they
/// part. Its newest record is of the epoch in its request.
pub fn nothing_shared(request: &SyncRequest) -> CommonPoint {
    CommonPoint { tail_epoch: request.epoch, lsn: Lsn::ZERO, chain: Chain(0), flags: 0 }
}

/// Sends a request and takes the answer.
pub fn ask(connection: &mut Connection, request: SyncRequest) -> towline::Result<ShardInfo> {
    ask_parting(connection, request, nothing_shared(&request).into())
}

/// Sends a request and takes the answer; if it is asked where the logs part, it says `parting`.
pub fn ask_parting(connection: &mut Connection, request: SyncRequest, parting: Message) -> towline::Result<ShardInfo> {
    connection.sender.send_message(&Message::SyncRequest(request))?;
    let mut answer = connection.receiver.receive_message()?;
    if let Message::EpochHistory(_) = answer {
        connection.sender.send_message(&parting)?;
        answer = connection.receiver.receive_message()?;
    }
    match answer {
        Message::ShardInfo(info) => Ok(info),
        Message::Error(refusal) => Err(refusal.from_peer(connection.peer.clone())),
        other => panic!("{other:?} answers a request"),
    }
}

/// A request that must be refused: the code and the sentence.
pub fn refused(connection: &mut Connection, request: SyncRequest) -> (RefusalCode, String) {
    match ask(connection, request) {
        Err(Error::Refused { code, reason, .. }) => (code, reason),
        other => panic!("not refused: {other:?}"),
    }
}

/// The next log bytes of a stream: where they belong, and what they are.
pub fn next_data(connection: &mut Connection) -> towline::Result<(WalDataHeader, Vec<u8>)> {
    loop {
        let header = connection.receiver.receive_header()?;
        if header.kind != FrameKind::WalData {
            if let Message::Error(refusal) = connection.receiver.receive_message_body(header)? {
                return Err(refusal.from_peer(connection.peer.clone()));
            }
            continue;
        }
        let mut fields = [0; WalDataHeader::LEN];
        connection.receiver.receive_exact(&mut fields)?;
        let mut bytes = vec![0; connection.receiver.remaining() as usize];
        connection.receiver.receive_exact(&mut bytes)?;
        return Ok((WalDataHeader::decode(&fields).unwrap(), bytes));
    }
}

/// The chain at the end of a batch of a log.
pub fn chain_at(log: &Arc<Log>, lsn: Lsn) -> Chain {
    let place = log.position_before(lsn.next()).unwrap();
    assert_eq!(place.lsn, lsn, "no batch ends there");
    place.chain
}

/// Acknowledges everything up to `lsn` on a stream of a log with this chain there.
pub fn acknowledge(connection: &mut Connection, info: &ShardInfo, lsn: Lsn, chain: Chain) -> towline::Result<()> {
    connection.sender.send_message(&Message::Ack(Ack {
        received: lsn,
        durable: lsn,
        applied: lsn,
        chain,
        epoch: info.epoch,
        session: info.session,
    }))
}

/// Reads a stream to its end, which must come, and tells what ended it.
pub fn read_to_end(connection: &mut Connection) -> Error {
    loop {
        if let Err(error) = next_data(connection) {
            assert!(!error.is_timeout(), "the stream stayed open: {error}");
            return error;
        }
    }
}
