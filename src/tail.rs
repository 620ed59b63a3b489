//! Reading a node's log from afar, without keeping a copy.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::backoff::Backoff;
use crate::error::{Error, RefusalCode, Result};
use crate::limits::{MAX_PATIENCE_MS, SEGMENT_HEADER_LEN};
use crate::receiver::{exchange, refusal};
use crate::shutdown::ShutdownSignal;
use crate::status::Status;
use crate::transport::{Connection, FrameReceiver, Transport};
use crate::types::{Chain, ClusterId, Epoch, Lsn, NodeId, RegionId, ShardId};
use crate::wal::batch::{self, BatchError, BatchHeader};
use crate::wal::segment::{HEADER_PAGE, SegmentHeader};
use crate::wal::{Batch, Expected};
use crate::wire::{FrameKind, Message, PROTOCOL_VERSIONS, Purpose, ShardInfo, SyncRequest, WalDataHeader};

/// Which part of which log to read.
#[derive(Clone, Debug)]
pub struct Tail {
    /// The shard.
    pub shard: ShardId,
    /// The first LSN wanted; [`Lsn::ZERO`] for the oldest that is retained.
    pub from: Lsn,
    /// Whether to go on with what is appended later. Otherwise reading ends at the head that the log had when the
    /// first connection was made.
    pub follow: bool,
    /// How long connecting, and each answer, may take; and for how long a node is tried that has not been reached once,
    /// unless its log is [followed](Self::follow).
    pub timeout: Duration,
}

impl Tail {
    /// The whole retained log of a shard, as it is now.
    #[must_use]
    pub fn new(shard: ShardId) -> Tail {
        Tail { shard, from: Lsn::ZERO, follow: false, timeout: Duration::from_secs(10) }
    }

    /// Gives every batch from [`from`](Self::from) on to `on_batch`, in order, each verified against the chain. The
    /// first batch may begin before `from` if it holds it. Connections that fail are made again, with growing waits,
    /// and reading goes on where it was, in what must still be the same log there, unless what was read last has been
    /// given up meanwhile. Ends when everything asked for is read, when `on_batch` breaks, or when `stop` is given.
    /// Returns the last LSN read.
    ///
    /// # Errors
    ///
    /// What trying again cannot mend: a refusal, a name that does not resolve, a protocol violation;
    /// [`Error::ChainMismatch`] if the log has another history now than what was read of it, as where records that the
    /// next leader never had were cut. And what has kept the node from being reached at first, after
    /// [`timeout`](Self::timeout).
    pub fn read(
        &self,
        transport: &dyn Transport,
        address: &str,
        stop: &ShutdownSignal,
        on_batch: &mut dyn FnMut(&Batch<'_>) -> ControlFlow<()>,
    ) -> Result<Lsn> {
        let last = self.from.previous();
        let mut reading = Reading { tail: self, last, chain: None, is_given_up: false, target: None, done: false };
        let seed = u64::from(std::process::id());
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30), seed);
        let at_first = Instant::now();
        loop {
            let (began, before) = (Instant::now(), reading.last);
            let result = reading.read_once(transport, address, stop, on_batch);
            if reading.done || stop.is_shutdown() {
                return Ok(reading.last);
            }
            let Err(error) = result else { continue };
            if matches!(error, Error::Refused { code: RefusalCode::NotRetained, .. }) && reading.asks_again() {
                // What was read last may have been given up since, and what follows it not.
                reading.is_given_up = true;
                continue;
            }
            let has_no_name = error.is_unresolved() && reading.last == self.from.previous();
            let is_nowhere = !self.follow && reading.target.is_none() && at_first.elapsed() >= self.timeout;
            if error.is_permanent() || has_no_name || is_nowhere || matches!(error, Error::Protocol { .. }) {
                return Err(error);
            }
            if reading.last > before && began.elapsed() > Duration::from_secs(10) {
                backoff.succeeded();
            }
            let wait = backoff.next();
            log::warn!("shard {}: {error}; trying again in {:.1} s", self.shard, wait.as_secs_f32());
            let _ = stop.wait_timeout(wait);
        }
    }
}

/// Where reading stands.
struct Reading<'a> {
    tail: &'a Tail,
    last: Lsn,
    /// The chain there, if anything has been read that another stream can be compared with.
    chain: Option<Chain>,
    /// What has been read last was not to be had again, and is not asked for once more.
    is_given_up: bool,
    target: Option<Lsn>,
    done: bool,
}

/// The log bytes of one stream, gathered until they are whole batches.
struct Gathered {
    bytes: Vec<u8>,
    segment_size: u64,
    /// Where in its segment the first gathered byte stands.
    offset: u64,
    expected: Option<Expected>,
    /// The segment, where the stream has come to its beginning.
    segment: Option<SegmentHeader>,
}

impl Reading<'_> {
    fn read_once(
        &mut self,
        transport: &dyn Transport,
        address: &str,
        stop: &ShutdownSignal,
        on_batch: &mut dyn FnMut(&Batch<'_>) -> ControlFlow<()>,
    ) -> Result<()> {
        let Connection { peer, mut sender, mut receiver, closer } =
            transport.connect_until(address, self.tail.timeout, stop)?;
        let _close_at_stop = stop.on_shutdown(move || closer.close());
        let from = match self.last {
            // Once more, to see that it is still the same log.
            last if self.asks_again() => last,
            Lsn::ZERO => self.tail.from,
            last => last.next(),
        };
        let request = request_for(Purpose::Tail, self.tail.shard, from);
        let info = exchange(&peer, sender.as_mut(), receiver.as_mut(), request, self.tail.timeout)?;
        if self.is_given_up && info.tail <= self.last {
            // It was behind the end of the log, which has come that far since: it can be another one.
            self.is_given_up = false;
            let reason = format!("its log has come as far as LSN {} only now, and is to be compared there", self.last);
            return Err(Error::Refused { peer, code: RefusalCode::Superseded, reason });
        }
        if !crate::wal::segment::is_valid_size(info.segment_size) {
            return Err(Error::protocol(peer, format!("it has segments of {} bytes", info.segment_size)));
        }
        if !self.tail.follow {
            let target = *self.target.get_or_insert(info.head);
            // Of a log that has given up all its records, or was begun anew behind a base, nothing comes up to there.
            if target < info.start {
                self.done = true;
                return Ok(());
            }
        }
        // The other side beats; several beats may get lost before it counts as gone.
        receiver.set_timeout(Some(
            Duration::from_millis(u64::from(info.timeout_ms.min(MAX_PATIENCE_MS))).max(self.tail.timeout),
        ))?;
        self.read_stream(&peer, receiver.as_mut(), &info, on_batch)
    }

    fn read_stream(
        &mut self,
        peer: &str,
        receiver: &mut dyn FrameReceiver,
        info: &ShardInfo,
        on_batch: &mut dyn FnMut(&Batch<'_>) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut gathered = Gathered {
            bytes: Vec::new(),
            segment_size: info.segment_size,
            offset: info.start_offset,
            expected: None,
            segment: None,
        };
        while !self.reached_target() {
            let header = receiver.receive_header()?;
            match header.kind {
                FrameKind::WalData => {
                    gathered.take(peer, receiver)?;
                    if self.hand_out(peer, &mut gathered, on_batch)?.is_break() {
                        self.done = true;
                        return Ok(());
                    }
                }
                FrameKind::Heartbeat | FrameKind::CaughtUp | FrameKind::Sync => {
                    receiver.receive_message_body(header)?;
                }
                FrameKind::Error => return Err(refusal(peer, receiver.receive_message_body(header)?)),
                other => return Err(Error::protocol(peer, format!("{other:?} is not for a reader"))),
            }
        }
        self.done = true;
        Ok(())
    }

    fn reached_target(&self) -> bool {
        self.target.is_some_and(|target| self.last >= target)
    }

    /// Verifies what is whole and hands it out.
    fn hand_out(
        &mut self,
        peer: &str,
        gathered: &mut Gathered,
        on_batch: &mut dyn FnMut(&Batch<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let mut used = 0;
        let mut flow = ControlFlow::Continue(());
        while flow.is_continue() && !self.reached_target() {
            if gathered.offset == 0 && !gathered.take_header(peer)? {
                break;
            }
            let Some(header) = gathered.verify_next(peer, used)? else { break };
            let (len, sealing) = (usize::try_from(header.total_len()).unwrap_or(usize::MAX), header.is_sealing());
            let whole = gathered.bytes.get(used..used + len).unwrap_or_default();
            self.check_history(peer, &header)?;
            // What a stream begins with may be before what is wanted.
            if let Some((batch, _)) = Batch::split_off(header, whole).filter(|_| header.last_lsn() > self.last) {
                (self.last, self.chain, self.is_given_up) = (header.last_lsn(), Some(header.crc), false);
                flow = on_batch(&batch);
            }
            used += len;
            if sealing {
                gathered.offset = 0;
                gathered.bytes.drain(..used);
                used = 0;
            }
        }
        gathered.offset += used as u64;
        gathered.bytes.drain(..used);
        Ok(flow)
    }

    /// Whether the last record read is to be asked for once more.
    fn asks_again(&self) -> bool {
        self.chain.is_some() && !self.is_given_up
    }

    /// Whether a batch of another stream that holds the last record read is the one that it was read in.
    fn check_history(&self, peer: &str, header: &BatchHeader) -> Result<()> {
        let (last, theirs) = (self.last, header.crc);
        let holds_last = header.first_lsn <= last && last <= header.last_lsn();
        match self.chain.filter(|&own| holds_last && (own, last) != (theirs, header.last_lsn())) {
            Some(own) => {
                let (peer, shard) = (peer.to_owned(), self.tail.shard);
                Err(Error::ChainMismatch { peer, shard, lsn: last, own: Some(own), theirs })
            }
            None => Ok(()),
        }
    }
}

impl Gathered {
    /// Appends the bytes of one frame.
    fn take(&mut self, peer: &str, receiver: &mut dyn FrameReceiver) -> Result<()> {
        let mut fields = [0; WalDataHeader::LEN];
        receiver.receive_exact(&mut fields)?;
        let header = WalDataHeader::decode(&fields).map_err(|error| error.from_peer(peer))?;
        let have = self.bytes.len() as u64;
        let is_empty = self.offset == SEGMENT_HEADER_LEN && have == 0;
        let is_of_this = self.segment.is_none_or(|segment| segment.id.first_lsn == header.segment);
        if is_empty && is_of_this && header.offset == 0 {
            // A segment without batches gives way to one of a newer epoch that begins with the same LSN.
            self.offset = 0;
        }
        if header.offset != self.offset + have {
            let due = self.offset + have;
            return Err(Error::protocol(peer, format!("bytes from offset {} came where {due} is due", header.offset)));
        }
        let more = receiver.remaining() as usize;
        // A batch fits in its segment; what is gathered is never more than one batch and a frame.
        if have + more as u64 > self.segment_size.saturating_add(u64::from(crate::limits::MAX_WAL_DATA_LEN)) {
            return Err(Error::protocol(peer, "more bytes came than a segment holds, without a whole batch"));
        }
        let at = self.bytes.len();
        self.bytes.resize(at + more, 0);
        receiver.receive_exact(&mut self.bytes[at..])
    }

    /// Takes the header page off the front of a segment, once it is whole.
    fn take_header(&mut self, peer: &str) -> Result<bool> {
        let Some(page) = self.bytes.first_chunk::<HEADER_PAGE>() else { return Ok(false) };
        let header = SegmentHeader::decode(page).map_err(|reason| Error::protocol(peer, reason))?;
        let start = Expected { first_lsn: header.id.first_lsn, chain: header.chain_before, epoch: header.epoch };
        if self.expected.is_some_and(|due| (due.first_lsn, due.chain) != (start.first_lsn, start.chain)) {
            return Err(Error::protocol(peer, format!("segment {} does not continue what came before it", header.id)));
        }
        (self.expected, self.segment) = (Some(start), Some(header));
        self.offset = SEGMENT_HEADER_LEN;
        self.bytes.drain(..HEADER_PAGE);
        Ok(true)
    }

    /// The header of the batch `used` bytes behind the first gathered one, if that is there as a whole.
    fn verify_next(&mut self, peer: &str, used: usize) -> Result<Option<BatchHeader>> {
        let at = self.offset + used as u64;
        let rest = self.bytes.get(used..).unwrap_or_default();
        let expected = match (self.expected, rest.first_chunk()) {
            (Some(expected), _) => expected,
            // Nothing is known of what came before the first batch of a stream: its own word is taken for it.
            (None, Some(first)) => {
                let BatchHeader { first_lsn, prev_crc, epoch, .. } = BatchHeader::decode(first);
                Expected { first_lsn, chain: prev_crc, epoch }
            }
            (None, None) => return Ok(None),
        };
        match batch::verify(rest, self.segment_size.saturating_sub(at), expected) {
            Ok(header) => {
                if let Some(reason) = self.segment.and_then(|segment| segment.find_misplaced(at, &header)) {
                    let reason = format!("what came for LSN {} cannot stand there: {reason}", expected.first_lsn);
                    return Err(Error::protocol(peer, reason));
                }
                self.expected =
                    Some(Expected { first_lsn: header.last_lsn().next(), chain: header.crc, epoch: header.epoch });
                Ok(Some(header))
            }
            Err(BatchError::Incomplete { .. }) => Ok(None),
            Err(error) => {
                Err(Error::protocol(peer, format!("what came for LSN {} is not valid: {error}", expected.first_lsn)))
            }
        }
    }
}

/// What a node says about itself, asked from afar.
///
/// # Errors
///
/// As connecting may fail; [`Error::Protocol`] for an answer that is none.
pub fn ask_status(transport: &dyn Transport, address: &str, timeout: Duration) -> Result<Status> {
    let Connection { peer, mut sender, mut receiver, closer: _ } = transport.connect(address, timeout)?;
    receiver.set_timeout(Some(timeout))?;
    receiver.set_deadline(Instant::now().checked_add(timeout))?;
    sender.send_message(&Message::StatusRequest)?;
    let header = receiver.receive_header()?;
    if header.kind != FrameKind::Status {
        return Err(refusal(&peer, receiver.receive_message_body(header)?));
    }
    // Below the limit of its type, which the header was checked against.
    let mut body = vec![0; receiver.remaining() as usize];
    receiver.receive_exact(&mut body)?;
    Status::decode(&body).map_err(|reason| Error::protocol(peer, format!("its status cannot be read: {reason}")))
}

/// Asks the node at `address` how many shards it has, and of what size its segments are. What the
/// answer says of where a log begins and ends is about shard 0 alone.
///
/// # Errors
///
/// As [`ask_status`].
pub fn ask_topology(transport: &dyn Transport, address: &str, timeout: Duration) -> Result<ShardInfo> {
    ask_topology_until(transport, address, timeout, &ShutdownSignal::new())
}

/// [`ask_topology`], given up at once when `stop` is given.
///
/// # Errors
///
/// As [`ask_status`]; whatever was under way fails when `stop` is given.
pub fn ask_topology_until(
    transport: &dyn Transport,
    address: &str,
    timeout: Duration,
    stop: &ShutdownSignal,
) -> Result<ShardInfo> {
    let Connection { peer, mut sender, mut receiver, closer } = transport.connect_until(address, timeout, stop)?;
    let _close_at_stop = stop.on_shutdown(move || closer.close());
    let request = request_for(Purpose::Topology, ShardId(0), Lsn::ZERO);
    exchange(&peer, sender.as_mut(), receiver.as_mut(), request, timeout)
}

/// A request of somebody who is no follower.
fn request_for(purpose: Purpose, shard: ShardId, from: Lsn) -> SyncRequest {
    SyncRequest {
        versions: PROTOCOL_VERSIONS,
        purpose,
        cluster: ClusterId::UNKNOWN,
        node: NodeId(0),
        region: RegionId(0),
        shard,
        shard_count: 0,
        segment_size: 0,
        epoch: Epoch::ZERO,
        received: Lsn::ZERO,
        durable: Lsn::ZERO,
        applied: Lsn::ZERO,
        chain: Chain::default(),
        from,
        flags: 0,
    }
}
