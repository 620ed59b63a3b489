//! Messages: the bodies of small frames.
//!
//! The table at each message is its layout in all versions so far. A message is exactly as long as its table says: more
//! bytes are an error as fewer are. [`SyncRequest`] and [`ErrorMessage`] keep their layout in all versions to come,
//! because they are read before a version is agreed on; of [`ShardInfo`] that holds for the first two bytes, which say
//! by what version to read the rest.

use crate::error::{Error, RefusalCode};
use crate::limits::MAX_ERROR_TEXT_LEN;
use crate::types::{Chain, ClusterId, Epoch, Lsn, NodeId, RegionId, SessionId, ShardId};
use crate::wire::codec::{MAX_MESSAGE_LEN, MessageBytes, Writer, choice, message};
use crate::wire::{
    BaseComplete, CommonPoint, EpochHistory, FrameKind, SessionAck, SessionControl, SessionKind, VersionRange,
    WireError,
};

choice! {
    /// What a stream is opened for.
    pub enum Purpose as "purpose" {
        /// To learn the [`ShardInfo`], and nothing more.
        Topology = 1,
        /// To follow the shard.
        Follow = 2,
        /// To read the log from [`SyncRequest::from`] on without counting as a follower.
        Tail = 3,
        /// To ask for the status of the node.
        Status = 4,
        /// To be given bytes of segments, each range asked for with a [`SegmentRange`]; or to hand over whole segments.
        Segment = 5,
    }
}

message! {
    /// Who asks, for which shard, and where its log stands. The first frame of every stream.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 2 | `versions.min` |
    /// | 2 | 2 | `versions.max` |
    /// | 4 | 1 | `purpose`, see [`Purpose`] |
    /// | 5 | 16 | `cluster` |
    /// | 21 | 8 | `node` |
    /// | 29 | 2 | `region` |
    /// | 31 | 2 | `shard` |
    /// | 33 | 2 | `shard_count` |
    /// | 35 | 8 | `segment_size` |
    /// | 43 | 8 | `epoch` |
    /// | 51 | 8 | `received` |
    /// | 59 | 8 | `durable` |
    /// | 67 | 8 | `applied` |
    /// | 75 | 4 | `chain` |
    /// | 79 | 8 | `from` |
    /// | 87 | 1 | `flags`, see [`SyncRequest::BASE_INCOMPLETE`] |
    pub struct SyncRequest in SyncRequest {
        /// The versions that the asker speaks.
        pub versions: VersionRange,
        /// What it wants.
        pub purpose: Purpose,
        /// Its cluster; [`ClusterId::UNKNOWN`] if it has none yet.
        pub cluster: ClusterId,
        /// Who it is.
        pub node: NodeId,
        /// The region whose log it wants.
        pub region: RegionId,
        /// The shard.
        pub shard: ShardId,
        /// How many shards it has; 0 if it does not know yet.
        pub shard_count: u16,
        /// The size of its segments in bytes; 0 if it does not know yet.
        pub segment_size: u64,
        /// The highest epoch that it has accepted.
        pub epoch: Epoch,
        /// The newest LSN in its log.
        pub received: Lsn,
        /// The newest LSN that it has synced.
        pub durable: Lsn,
        /// The newest LSN that its target has applied.
        pub applied: Lsn,
        /// The chain at `received`.
        pub chain: Chain,
        /// With [`Purpose::Tail`], the first LSN wanted; with [`Purpose::Segment`], the first LSN of the segment that
        /// is handed over, 0 from who wants to be given ranges; else 0.
        pub from: Lsn,
        /// What else is to be known of the asker. Flags that the answerer does not know say nothing.
        pub flags: u8,
    }
}

impl SyncRequest {
    /// Flag: a rebuild of the asker's target was begun and not completed, so neither its marks nor its log tell what it
    /// has. Only another rebuild helps.
    pub const BASE_INCOMPLETE: u8 = 1;
    /// Flag, beside [`BASE_INCOMPLETE`](Self::BASE_INCOMPLETE): the log up to `received` and part of the base are those
    /// of an interrupted rebuild, which another one can go on with.
    pub const REBUILD_KEPT: u8 = 2;
    /// Flag: `epoch` is one that the asker has led under itself, so only a newer leader's log can be followed. A relay
    /// has the asker wait until it has met that one.
    pub const HAS_LED: u8 = 4;
}

message! {
    /// The answer to a [`SyncRequest`]: what the shard is, and what the stream will carry.
    ///
    /// Where a rebuild's log begins is not known yet: `start`, `start_segment` and `start_offset` are 0, and
    /// [`SessionControl`] says it. They are not 0 where a rebuild can go on with the log of an interrupted one.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 2 | `version` |
    /// | 2 | 16 | `cluster` |
    /// | 18 | 8 | `node` |
    /// | 26 | 2 | `region` |
    /// | 28 | 2 | `shard` |
    /// | 30 | 2 | `shard_count` |
    /// | 32 | 8 | `segment_size` |
    /// | 40 | 8 | `epoch` |
    /// | 48 | 8 | `tail` |
    /// | 56 | 8 | `head` |
    /// | 64 | 8 | `session` |
    /// | 72 | 1 | `session_kind`, see [`SessionKind`] |
    /// | 73 | 8 | `start` |
    /// | 81 | 8 | `target` |
    /// | 89 | 8 | `start_segment` |
    /// | 97 | 8 | `start_offset` |
    /// | 105 | 4 | `heartbeat_ms` |
    /// | 109 | 4 | `timeout_ms` |
    /// | 113 | 4 | `key_len` |
    /// | 117 | 4 | `value_len` |
    /// | 121 | 1 | `prefix_bits` |
    pub struct ShardInfo in ShardInfo {
        /// The protocol version of everything that follows.
        pub version: u16,
        /// The cluster.
        pub cluster: ClusterId,
        /// Who answers.
        pub node: NodeId,
        /// The region whose log it is.
        pub region: RegionId,
        /// The shard.
        pub shard: ShardId,
        /// How many shards the node has.
        pub shard_count: u16,
        /// The size of the segments in bytes.
        pub segment_size: u64,
        /// The term under which the stream is served.
        pub epoch: Epoch,
        /// The oldest LSN that is retained.
        pub tail: Lsn,
        /// The newest LSN of the log.
        pub head: Lsn,
        /// The session issued with this stream; [`SessionId::NONE`] if none is.
        pub session: SessionId,
        /// What the session is for.
        pub session_kind: SessionKind,
        /// The first LSN that will be sent. In a catch-up it may stand at or below the asker's newest one, behind the
        /// [`CommonPoint`] that it has named: it cuts its log there first.
        pub start: Lsn,
        /// The LSN that the session must reach.
        pub target: Lsn,
        /// The first LSN of the segment that the first `WalData` is for.
        pub start_segment: Lsn,
        /// Where in that segment the first `WalData` begins, in bytes.
        pub start_offset: u64,
        /// How often a quiet stream carries a heartbeat, in milliseconds.
        pub heartbeat_ms: u32,
        /// After how long without a byte the stream is given up, in milliseconds.
        pub timeout_ms: u32,
        /// Bytes of a key, where the target is a key-value store of fixed sizes; else 0.
        pub key_len: u32,
        /// Bytes of a value, where the target is a key-value store of fixed sizes; else 0.
        pub value_len: u32,
        /// Bits of a key that choose its shard, where the target routes by prefix; else 0.
        pub prefix_bits: u8,
    }
}

message! {
    /// The prefix of a `WalData` body. Behind it stand bytes of the segment, cut anywhere: from `offset` on they are
    /// what the segment's file holds, the header page of a new segment included.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `segment` |
    /// | 8 | 8 | `offset` |
    pub struct WalDataHeader in WalData {
        /// The first LSN of the segment.
        pub segment: Lsn,
        /// Where in the segment the bytes belong.
        pub offset: u64,
    }
}

message! {
    /// Everything that the log had has been sent, once per session.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `head` |
    pub struct CaughtUp in CaughtUp {
        /// The newest LSN at that moment.
        pub head: Lsn,
    }
}

message! {
    /// The follower's marks, all at once: applied and durable are at most received.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `received` |
    /// | 8 | 8 | `durable` |
    /// | 16 | 8 | `applied` |
    /// | 24 | 4 | `chain` |
    /// | 28 | 8 | `epoch` |
    /// | 36 | 8 | `session` |
    pub struct Ack in Ack {
        /// The newest LSN in its log.
        pub received: Lsn,
        /// The newest LSN that it has synced.
        pub durable: Lsn,
        /// The newest LSN that its target has applied.
        pub applied: Lsn,
        /// The chain at `received`.
        pub chain: Chain,
        /// The term under which it received.
        pub epoch: Epoch,
        /// The session under which it received.
        pub session: SessionId,
    }
}

message! {
    /// Asks the follower to sync up to `lsn` and to say so with a [`SyncAck`].
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `lsn` |
    pub struct Sync in Sync {
        /// What must be durable.
        pub lsn: Lsn,
    }
}

message! {
    /// The follower has synced up to `lsn`. Also the answer to a whole segment.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `lsn` |
    /// | 8 | 8 | `session` |
    /// | 16 | 8 | `epoch` |
    pub struct SyncAck in SyncAck {
        /// What is durable.
        pub lsn: Lsn,
        /// The session under which it was received.
        pub session: SessionId,
        /// The term under which it was received.
        pub epoch: Epoch,
    }
}

message! {
    /// Under [`Purpose::Segment`]: asks for bytes of one segment as they stand in its file, header page included. The
    /// answer begins with another one, which says what comes: as many bytes as there are valid ones from `offset` on,
    /// at most `len`. They follow as `WalData`, and after them the next range can be asked for.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `segment` |
    /// | 8 | 8 | `offset` |
    /// | 16 | 8 | `len` |
    pub struct SegmentRange in SegmentRange {
        /// The first LSN of the segment.
        pub segment: Lsn,
        /// Where in the segment the bytes stand.
        pub offset: u64,
        /// How many bytes.
        pub len: u64,
    }
}

message! {
    /// A sign of life, and where the log of whoever is followed stands.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `epoch` |
    /// | 8 | 8 | `head` |
    /// | 16 | 8 | `committed` |
    /// | 24 | 4 | `chain` |
    /// | 28 | 8 | `sent_unix_ms` |
    pub struct Heartbeat in Heartbeat {
        /// The sender's term.
        pub epoch: Epoch,
        /// The newest LSN of its log.
        pub head: Lsn,
        /// The newest LSN that is committed; of a follower that feeds others, by its leader's word.
        pub committed: Lsn,
        /// The chain at `head`; 0 where the sender does not know it at hand, which says nothing.
        pub chain: Chain,
        /// The sender's wall clock, in milliseconds since the Unix epoch.
        pub sent_unix_ms: u64,
    }
}

/// A refusal. The sender closes the stream behind it.
///
/// | offset | size | field |
/// |---:|---:|---|
/// | 0 | 2 | `code`, see [`RefusalCode`] |
/// | 2 | 0 to 1024 | `text`, UTF-8, to the end of the frame |
///
/// A code that this version does not know is read as [`RefusalCode::Internal`], with its number in the text; bytes of
/// the text that are not UTF-8 are replaced: a refusal is worth reading whatever its form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorMessage {
    /// Why, for programs.
    pub code: RefusalCode,
    /// Why, as a sentence that says what to do. At most [`MAX_ERROR_TEXT_LEN`] bytes of it are sent.
    pub text: String,
}

impl ErrorMessage {
    /// A refusal.
    #[must_use]
    pub fn new(code: RefusalCode, text: impl Into<String>) -> ErrorMessage {
        let mut text = text.into();
        text.truncate(cut_between_characters(&text));
        ErrorMessage { code, text }
    }

    /// Appends its bytes.
    pub fn encode(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(MessageBytes::long(|to| self.write(to)).as_slice());
    }

    /// Its bytes in a vector of their own.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.encode(&mut bytes);
        bytes
    }

    /// Reads it from exactly its bytes.
    ///
    /// # Errors
    ///
    /// [`WireError`] if there are too few or too many bytes.
    pub fn decode(bytes: &[u8]) -> Result<ErrorMessage, WireError> {
        let kind = FrameKind::Error;
        let len = bytes.len() as u64;
        if bytes.len() > MAX_MESSAGE_LEN {
            return Err(WireError::Oversized { kind, len, max: kind.max_len() });
        }
        let Some((number, text)) = bytes.split_first_chunk() else {
            return Err(WireError::Length { kind, len, expected: 2 });
        };
        let number = u16::from_le_bytes(*number);
        let text = String::from_utf8_lossy(text);
        Ok(match RefusalCode::from_wire(number) {
            Some(code) => ErrorMessage::new(code, text),
            None => ErrorMessage::new(RefusalCode::Internal, format!("(code {number}) {text}")),
        })
    }

    /// The crate's error for a peer that refused with this.
    #[must_use]
    pub fn from_peer(self, peer: impl Into<String>) -> Error {
        Error::Refused { peer: peer.into(), code: self.code, reason: self.text }
    }

    fn write(&self, to: &mut Writer<'_>) {
        to.put(&self.code.to_wire().to_le_bytes());
        to.put(&self.text.as_bytes()[..cut_between_characters(&self.text)]);
    }
}

/// How many bytes of a refusal are sent: all, or as many whole characters as there is room for.
fn cut_between_characters(text: &str) -> usize {
    let mut len = text.len().min(MAX_ERROR_TEXT_LEN);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    len
}

macro_rules! messages {
    ($( $(#[$doc:meta])* $name:ident, )*) => {
        /// Any message: the body of every frame that is not raw bytes.
        ///
        /// ```
        /// use towline::Lsn;
        /// use towline::wire::{CaughtUp, FrameKind, Message};
        ///
        /// let message = Message::CaughtUp(CaughtUp { head: Lsn(7) });
        /// assert_eq!(message.kind(), FrameKind::CaughtUp);
        /// assert_eq!(Message::decode(FrameKind::CaughtUp, &message.to_vec()), Ok(message));
        /// ```
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Message {
            $( $(#[$doc])* $name($name), )*
            /// A refusal.
            Error(ErrorMessage),
            /// Asks for a `Status`.
            StatusRequest,
        }

        impl Message {
            /// The kind of its frame.
            #[must_use]
            pub const fn kind(&self) -> FrameKind {
                match self {
                    $( Message::$name(_) => FrameKind::$name, )*
                    Message::Error(_) => FrameKind::Error,
                    Message::StatusRequest => FrameKind::StatusRequest,
                }
            }

            /// Reads the body of a frame.
            ///
            /// # Errors
            ///
            /// [`WireError`] if the body is not exactly such a message, or if frames of this kind carry raw bytes.
            pub fn decode(kind: FrameKind, body: &[u8]) -> Result<Message, WireError> {
                match kind {
                    $( FrameKind::$name => $name::decode(body).map(Message::$name), )*
                    FrameKind::Error => ErrorMessage::decode(body).map(Message::Error),
                    FrameKind::StatusRequest if body.is_empty() => Ok(Message::StatusRequest),
                    FrameKind::StatusRequest => Err(WireError::Length { kind, len: body.len() as u64, expected: 0 }),
                    FrameKind::WalData | FrameKind::BaseData | FrameKind::Status | FrameKind::Segment => {
                        Err(WireError::NotAMessage { kind })
                    }
                }
            }

            fn write(&self, to: &mut Writer<'_>) {
                match self {
                    $( Message::$name(message) => message.write(to), )*
                    Message::Error(message) => message.write(to),
                    Message::StatusRequest => {}
                }
            }
        }

        $(
            impl From<$name> for Message {
                fn from(message: $name) -> Message {
                    Message::$name(message)
                }
            }
        )*
    };
}

messages! {
    /// Who asks, and for what.
    SyncRequest,
    /// The answer.
    ShardInfo,
    /// Every block of the base has been sent.
    BaseComplete,
    /// Everything that the log had has been sent.
    CaughtUp,
    /// The follower's marks.
    Ack,
    /// A request to sync.
    Sync,
    /// The answer to a `Sync` or a `Segment`.
    SyncAck,
    /// The leader's word about a session.
    SessionControl,
    /// The follower's word about a session.
    SessionAck,
    /// A sign of life.
    Heartbeat,
    /// Where each epoch of the leader's log ends.
    EpochHistory,
    /// Where the follower's log parts from it.
    CommonPoint,
    /// Asks for bytes of a segment, and begins the answer.
    SegmentRange,
}

impl From<ErrorMessage> for Message {
    fn from(message: ErrorMessage) -> Message {
        Message::Error(message)
    }
}

impl Message {
    /// Its bytes, on the stack unless it may be long: what a stream sends.
    pub(crate) fn to_message_bytes(&self) -> MessageBytes {
        match self {
            Message::Error(_) | Message::EpochHistory(_) => MessageBytes::long(|to| self.write(to)),
            _ => MessageBytes::fixed(|to| self.write(to)),
        }
    }

    /// Appends its bytes.
    pub fn encode(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(self.to_message_bytes().as_slice());
    }

    /// Its bytes in a vector of their own.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.to_message_bytes().as_slice().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::sample::{self, bytes_of_hex};
    use crate::wire::{BaseDataHeader, SessionAction, SessionFailure, SessionPhase};

    /// The one place where the bytes of every message are written down: a format that drifts fails here.
    #[test]
    fn the_bytes_of_every_message() {
        for (message, hex) in sample::golden_messages() {
            let bytes = bytes_of_hex(hex);
            assert_eq!(message.to_vec(), bytes, "{message:?}");
            assert_eq!(Message::decode(message.kind(), &bytes), Ok(message));
        }
        let kinds: Vec<_> = sample::golden_messages().iter().map(|(message, _)| message.kind()).collect();
        for &kind in FrameKind::ALL {
            assert_eq!(kinds.contains(&kind), kind.is_message(), "{kind}");
        }
    }

    #[test]
    fn the_bytes_of_the_prefixes() {
        let wal = WalDataHeader { segment: Lsn(0x0807_0605_0403_0201), offset: 0x1817_1615_1413_1211 };
        assert_eq!(wal.to_vec(), bytes_of_hex("0102030405060708 1112131415161718"));
        assert_eq!(WalDataHeader::decode(&wal.to_bytes()), Ok(wal));
        let base = BaseDataHeader {
            session: SessionId(1),
            epoch: Epoch(2),
            block: 0x0807_0605_0403_0201,
            length: 4,
            checksum: 0xaabb_ccdd,
        };
        assert_eq!(base.to_vec(), bytes_of_hex("0100000000000000 0200000000000000 0102030405060708 04000000 ddccbbaa"));
        assert_eq!(BaseDataHeader::decode(&base.to_bytes()), Ok(base));
    }

    #[test]
    fn a_message_has_exactly_its_length() {
        for (message, _) in sample::golden_messages() {
            let mut bytes = message.to_vec();
            bytes.push(0);
            let longer = Message::decode(message.kind(), &bytes);
            if message.kind() == FrameKind::Error {
                assert_ne!(longer, Ok(message));
                continue;
            }
            assert!(matches!(longer, Err(WireError::Length { .. })), "{message:?}");
            for cut in 0..bytes.len() - 1 {
                assert!(Message::decode(message.kind(), &bytes[..cut]).is_err(), "{message:?} cut to {cut}");
            }
        }
    }

    #[test]
    fn choices_outside_their_lists_are_refused_by_name() {
        let mut bytes = sample::sync_request().to_vec();
        bytes[4] = 77;
        let error = SyncRequest::decode(&bytes).unwrap_err();
        assert_eq!(error.to_string(), "SyncRequest with unknown purpose 77");
        for number in 0..=u8::MAX {
            assert!(Purpose::from_wire(number).is_none_or(|value| value.to_wire() == number));
            assert!(SessionKind::from_wire(number).is_none_or(|value| value.to_wire() == number));
            assert!(SessionAction::from_wire(number).is_none_or(|value| value.to_wire() == number));
            assert!(SessionPhase::from_wire(number).is_none_or(|value| value.to_wire() == number));
            assert!(SessionFailure::from_wire(number).is_none_or(|value| value.to_wire() == number));
        }
        assert_eq!(SessionFailure::ALL.len(), 11);
    }

    #[test]
    fn an_unknown_refusal_is_still_read() {
        let message = ErrorMessage::decode(&[0x0f, 0x27, b'n', 0xff, b'o']).unwrap();
        assert_eq!(message, ErrorMessage::new(RefusalCode::Internal, "(code 9999) n\u{fffd}o"));
        let error = message.from_peer("leader:1");
        assert!(matches!(error, Error::Refused { code: RefusalCode::Internal, .. }));
    }

    #[test]
    fn a_long_refusal_is_cut_between_characters() {
        // "é" takes two bytes, so that the bound falls into the middle of one.
        let text = format!("x{}", "é".repeat(MAX_ERROR_TEXT_LEN));
        let long = ErrorMessage { code: RefusalCode::Internal, text };
        let bytes = long.to_vec();
        assert_eq!(bytes.len(), 2 + MAX_ERROR_TEXT_LEN - 1);
        let read = ErrorMessage::decode(&bytes).unwrap();
        assert!(long.text.starts_with(&read.text) && !read.text.contains('\u{fffd}'));
        assert!(ErrorMessage::decode(&[0; MAX_MESSAGE_LEN + 1]).is_err());
        // Replacing bytes makes a text longer: it is cut again.
        assert!(ErrorMessage::decode(&[0xff; MAX_MESSAGE_LEN]).unwrap().text.len() <= MAX_ERROR_TEXT_LEN);
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(kind in 0u8..20, body in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(kind) = FrameKind::from_wire(kind) && let Ok(message) = Message::decode(kind, &body) {
                prop_assert_eq!(message.kind(), kind);
                if kind != FrameKind::Error {
                    prop_assert_eq!(message.to_vec(), body);
                }
            }
        }

        #[test]
        fn bodies_of_the_right_length_survive_the_round_trip(at in any::<prop::sample::Index>(),
                                                             flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..40)) {
            let golden = sample::golden_messages();
            let (message, _) = &golden[at.index(golden.len())];
            let mut body = message.to_vec();
            for (at, mask) in flips {
                if !body.is_empty() {
                    let at = at.index(body.len());
                    body[at] ^= mask;
                }
            }
            if let Ok(read) = Message::decode(message.kind(), &body) && message.kind() != FrameKind::Error {
                prop_assert_eq!(read.to_vec(), body);
            }
        }
    }
}
