//! Frames: what a stream is made of.
//!
//! # Format, for ever
//!
//! A frame is a header of 16 bytes and a body of `length` bytes. All numbers are little-endian.
//!
//! | offset | size | field | meaning |
//! |---:|---:|---|---|
//! | 0 | 2 | `magic` | the bytes `TW`: whatever else talks is told apart at once |
//! | 2 | 1 | `kind` | what the body is, see [`FrameKind`] |
//! | 3 | 1 | `flags` | only those that the kind has; others 0 |
//! | 4 | 4 | `length` | bytes of the body, at most what the kind may have |
//! | 8 | 4 | `reserved` | 0 |
//! | 12 | 4 | `crc` | CRC-32 (IEEE) of bytes 0 to 12 |
//!
//! A header is valid exactly if, checked in this order,
//!
//! 1. `magic` is right;
//! 2. `crc` matches;
//! 3. `kind` is known, and `flags` has no bit that the kind does not have;
//! 4. `reserved` is 0;
//! 5. `length` is at most [`FrameKind::max_len`].
//!
//! So a length is believed only from an undamaged header, and never beyond what its kind may have. Bodies have no
//! checksum of their own here: log bytes carry the log's, base blocks and segments carry theirs, and messages are
//! small and checked field by field.

use std::fmt;

use crate::limits::{
    FRAME_HEADER_LEN, MAX_BASE_DATA_LEN, MAX_CONTROL_LEN, MAX_SEGMENT_PIECE_LEN, MAX_STATUS_LEN, MAX_WAL_DATA_LEN,
};
use crate::wire::codec::MAX_MESSAGE_LEN;
use crate::wire::{
    Ack, BaseComplete, BaseDataHeader, CaughtUp, CommonPoint, EpochHistory, Heartbeat, SegmentPieceHeader,
    SegmentRange, SessionAck, SessionControl, ShardInfo, Sync, SyncAck, SyncRequest, WalDataHeader, WireError,
};

const MAGIC: [u8; 2] = *b"TW";

/// Somebody at the leader waits until the records so far are durable: the follower syncs now and acknowledges at
/// once. On `WalData`, `Sync` and `Heartbeat`.
pub const FLAG_ACK_DURABLE: u8 = 1;
/// Somebody at the leader waits until the records so far are applied: the follower acknowledges as soon as they are.
/// On `WalData`, `Sync` and `Heartbeat`.
pub const FLAG_ACK_APPLIED: u8 = 2;

macro_rules! kinds {
    ($( $(#[$doc:meta])* $kind:ident = $number:literal, at most $max:expr; )*) => {
        /// What the body of a frame is. The numbers never change their meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum FrameKind {
            $( $(#[$doc])* $kind = $number, )*
        }

        impl FrameKind {
            /// All kinds, in the order of their numbers.
            pub const ALL: &'static [FrameKind] = &[$( FrameKind::$kind ),*];

            /// The kind with this number; `None` if there is none.
            #[must_use]
            pub const fn from_wire(number: u8) -> Option<FrameKind> {
                match number {
                    $( $number => Some(FrameKind::$kind), )*
                    _ => None,
                }
            }

            /// The most bytes that the body of such a frame may have.
            #[must_use]
            pub const fn max_len(self) -> u32 {
                match self {
                    $( FrameKind::$kind => $max, )*
                }
            }
        }
    };
}

kinds! {
    /// Who asks, for which shard, and where its log stands: a [`SyncRequest`]. The first frame of every stream.
    SyncRequest = 1, at most len(SyncRequest::LEN);
    /// The answer: a [`ShardInfo`].
    ShardInfo = 2, at most len(ShardInfo::LEN);
    /// A [`WalDataHeader`] and bytes of a segment.
    WalData = 3, at most len(WalDataHeader::LEN) + MAX_WAL_DATA_LEN;
    /// A [`BaseDataHeader`] and the bytes of some blocks of the base.
    BaseData = 4, at most len(BaseDataHeader::LEN) + MAX_BASE_DATA_LEN;
    /// Every block of the base has been sent: a [`BaseComplete`].
    BaseComplete = 5, at most len(BaseComplete::LEN);
    /// Everything that the log had has been sent: a [`CaughtUp`].
    CaughtUp = 6, at most len(CaughtUp::LEN);
    /// The follower's marks: an [`Ack`].
    Ack = 7, at most len(Ack::LEN);
    /// A request to sync: a [`Sync`].
    Sync = 8, at most len(Sync::LEN);
    /// The answer to a `Sync`: a [`SyncAck`].
    SyncAck = 9, at most len(SyncAck::LEN);
    /// The leader's word about a session: a [`SessionControl`].
    SessionControl = 10, at most len(SessionControl::LEN);
    /// The follower's word about a session: a [`SessionAck`].
    SessionAck = 11, at most len(SessionAck::LEN);
    /// A sign of life: a [`Heartbeat`].
    Heartbeat = 12, at most len(Heartbeat::LEN);
    /// A refusal, after which the stream is closed: an [`ErrorMessage`](crate::wire::ErrorMessage).
    Error = 13, at most len(MAX_MESSAGE_LEN);
    /// Asks for a `Status`; without a body.
    StatusRequest = 14, at most 0;
    /// What a node says about itself, as bytes that mean nothing here.
    Status = 15, at most MAX_STATUS_LEN;
    /// A [`SegmentPieceHeader`] and bytes of a whole sealed segment.
    Segment = 16, at most len(SegmentPieceHeader::LEN) + MAX_SEGMENT_PIECE_LEN;
    /// Where each epoch of the leader's log ends: an [`EpochHistory`]. Since version 2.
    EpochHistory = 17, at most len(EpochHistory::MAX_LEN);
    /// Where the follower's log parts from it: a [`CommonPoint`]. Since version 2.
    CommonPoint = 18, at most len(CommonPoint::LEN);
    /// Asks for bytes of a segment, and begins the answer: a [`SegmentRange`].
    SegmentRange = 19, at most len(SegmentRange::LEN);
}

/// The length of a message as a frame length.
const fn len(bytes: usize) -> u32 {
    assert!(bytes <= MAX_CONTROL_LEN as usize, "messages and prefixes are small");
    #[allow(clippy::cast_possible_truncation, reason = "just compared")]
    let len = bytes as u32;
    len
}

impl FrameKind {
    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u8 {
        self as u8
    }

    /// The flags that frames of this kind may have.
    #[must_use]
    pub const fn allowed_flags(self) -> u8 {
        match self {
            FrameKind::WalData | FrameKind::Sync | FrameKind::Heartbeat => FLAG_ACK_DURABLE | FLAG_ACK_APPLIED,
            _ => 0,
        }
    }

    /// Whether the body is one small [`Message`](crate::wire::Message), rather than raw bytes behind a prefix.
    #[must_use]
    pub const fn is_message(self) -> bool {
        !matches!(self, FrameKind::WalData | FrameKind::BaseData | FrameKind::Status | FrameKind::Segment)
    }
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A decoded frame header. Field meanings stand in the [format](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the body is.
    pub kind: FrameKind,
    /// See [`FLAG_ACK_DURABLE`] and [`FLAG_ACK_APPLIED`].
    pub flags: u8,
    /// Bytes of the body.
    pub len: u32,
}

impl FrameHeader {
    /// The header for a body of `len` bytes.
    ///
    /// # Errors
    ///
    /// [`WireError::Oversized`] or [`WireError::UnknownFlags`]: the peer would refuse such a frame.
    pub fn new(kind: FrameKind, flags: u8, len: u64) -> Result<FrameHeader, WireError> {
        if flags & !kind.allowed_flags() != 0 {
            return Err(WireError::UnknownFlags { kind, flags });
        }
        match u32::try_from(len) {
            Ok(len) if len <= kind.max_len() => Ok(FrameHeader { kind, flags, len }),
            _ => Err(WireError::Oversized { kind, len, max: kind.max_len() }),
        }
    }

    /// Its bytes.
    ///
    /// ```
    /// use towline::wire::{FrameHeader, FrameKind};
    ///
    /// let header = FrameHeader::new(FrameKind::WalData, 0, 4096).unwrap();
    /// assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
    /// assert!(FrameHeader::decode(b"GET / HTTP/1.1\r\n").unwrap_err().to_string().contains("HTTP"));
    /// ```
    #[must_use]
    pub fn encode(&self) -> [u8; FRAME_HEADER_LEN] {
        let mut bytes = [0; FRAME_HEADER_LEN];
        bytes[0..2].copy_from_slice(&MAGIC);
        bytes[2] = self.kind.to_wire();
        bytes[3] = self.flags;
        bytes[4..8].copy_from_slice(&self.len.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..12]);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header and checks it by every rule of the [format](self).
    ///
    /// # Errors
    ///
    /// Which rule it breaks.
    pub fn decode(bytes: &[u8; FRAME_HEADER_LEN]) -> Result<FrameHeader, WireError> {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[0..2] != MAGIC {
            return Err(WireError::NotAFrame { first: [bytes[0], bytes[1]] });
        }
        let computed = crc32fast::hash(&bytes[..12]);
        if computed != u32_at(12) {
            return Err(WireError::HeaderChecksum { stored: u32_at(12), computed });
        }
        let kind = FrameKind::from_wire(bytes[2]).ok_or(WireError::UnknownKind { kind: bytes[2] })?;
        if u32_at(8) != 0 {
            return Err(WireError::Reserved { value: u32_at(8) });
        }
        FrameHeader::new(kind, bytes[3], u64::from(u32_at(4)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A header with any numbers in it and a checksum that fits.
    fn forged(kind: u8, flags: u8, len: u32, reserved: u32) -> [u8; FRAME_HEADER_LEN] {
        let mut bytes = [0; FRAME_HEADER_LEN];
        bytes[0..2].copy_from_slice(&MAGIC);
        bytes[2] = kind;
        bytes[3] = flags;
        bytes[4..8].copy_from_slice(&len.to_le_bytes());
        bytes[8..12].copy_from_slice(&reserved.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..12]);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn the_bytes_of_a_header() {
        let header = FrameHeader { kind: FrameKind::WalData, flags: 3, len: 0x0001_0203 };
        let bytes = header.encode();
        assert_eq!(bytes[..12], [b'T', b'W', 3, 3, 0x03, 0x02, 0x01, 0x00, 0, 0, 0, 0]);
        assert_eq!(bytes[12..], [18, 45, 219, 21]);
    }

    #[test]
    fn the_numbers_of_the_kinds() {
        let numbers: Vec<u8> = FrameKind::ALL.iter().map(|kind| kind.to_wire()).collect();
        assert_eq!(numbers, (1..=19).collect::<Vec<u8>>());
        for number in 0..=u8::MAX {
            assert_eq!(
                FrameKind::from_wire(number).map(FrameKind::to_wire),
                (1..=19).contains(&number).then_some(number)
            );
        }
    }

    #[test]
    fn each_broken_rule_has_its_name() {
        let wal_data = FrameKind::WalData.to_wire();
        let max = FrameKind::WalData.max_len();
        let refused = |bytes: [u8; FRAME_HEADER_LEN]| FrameHeader::decode(&bytes).unwrap_err();
        assert_eq!(refused(forged(77, 0, 0, 0)), WireError::UnknownKind { kind: 77 });
        assert_eq!(refused(forged(wal_data, 4, 0, 0)), WireError::UnknownFlags { kind: FrameKind::WalData, flags: 4 });
        assert_eq!(refused(forged(wal_data, 0, 0, 9)), WireError::Reserved { value: 9 });
        assert_eq!(
            refused(forged(wal_data, 0, max + 1, 0)),
            WireError::Oversized { kind: FrameKind::WalData, len: u64::from(max) + 1, max }
        );
        assert!(matches!(refused(*b"GET / HTTP/1.1\r\n"), WireError::NotAFrame { .. }));
        let mut damaged = forged(wal_data, 0, max, 0);
        assert!(FrameHeader::decode(&damaged).is_ok());
        damaged[15] ^= 1;
        assert!(matches!(refused(damaged), WireError::HeaderChecksum { .. }));
    }

    #[test]
    fn every_flipped_bit_of_every_kind_is_found() {
        for &kind in FrameKind::ALL {
            let bytes = FrameHeader { kind, flags: kind.allowed_flags(), len: kind.max_len() }.encode();
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes;
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(FrameHeader::decode(&damaged).is_err(), "{kind} bit {bit}");
            }
        }
    }

    proptest! {
        #[test]
        fn arbitrary_headers_never_panic_nor_exceed_their_kind(kind: u8, flags: u8, len: u32, reserved: u32, any: [u8; 16]) {
            let _ = FrameHeader::decode(&any);
            let bytes = forged(kind, flags, len, reserved);
            if let Ok(header) = FrameHeader::decode(&bytes) {
                prop_assert!(header.len <= header.kind.max_len());
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
