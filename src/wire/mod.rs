//! What nodes say to each other: frames, the messages in them, and the versions of both.
//!
//! A stream is a sequence of [frames](frame): a fixed header and a body. Most bodies are [messages](message); log, base
//! and segment bodies are a fixed prefix and raw bytes. All numbers are little-endian, nothing is padded, and the
//! module that encodes a format holds its only specification. A checksum covers every byte, from the first exchange on:
//! the frame's covers its header, its message or its prefix, and raw bytes carry their own.
//!
//! ```text
//! follower                                         leader
//!    │ SyncRequest (who, shard, marks, versions) ──▶ │
//!    │ ◀── EpochHistory, CommonPoint ──▶             │   only where their logs differ: see [`history`]
//!    │ ◀── ShardInfo (version, topology, session)    │   or Error, and the stream closes
//!    │ ◀── WalData, Sync, Heartbeat, CaughtUp        │
//!    │ Ack, SyncAck, SessionAck, Heartbeat ────────▶ │
//!    │ ◀── SessionControl, BaseData, BaseComplete    │
//! ```
//!
//! # Versions
//!
//! The first exchange agrees on a [version](ProtocolVersion): the asker says what it speaks, the answerer picks the
//! highest that both do ([`VersionRange::negotiate`]) and names it in the first field of `ShardInfo`, or of the
//! [`EpochHistory`] before it. Three things keep
//! their layout for ever, because they are read before a version is agreed on: the frame header, `SyncRequest` and
//! `Error`. Everything else has exactly one layout, and one length, per version: a message that is longer or shorter
//! is an error and never a guess.
//!
//! # Hostile bytes
//!
//! Decoders take any bytes and give a value or a [`WireError`]. They never panic, never read past what they are given
//! and never allocate by a number that a peer chose.

mod codec;
pub mod frame;
pub mod history;
pub mod message;
pub mod payload;
#[cfg(test)]
pub(crate) mod sample;
pub mod session;

use std::borrow::Cow;
use std::fmt;

use crate::error::Error;

pub use frame::{BodyCheck, FLAG_ACK_APPLIED, FLAG_ACK_DURABLE, FrameHeader, FrameKind};
pub use history::{CommonPoint, EpochEnd, EpochHistory};
pub use message::{
    Ack, CaughtUp, ErrorMessage, Heartbeat, Message, Purpose, SegmentRange, ShardInfo, Sync, SyncAck, SyncRequest,
    WalDataHeader,
};
pub use payload::{SegmentPieceHeader, SegmentSummary, WalSegmentPayload};
pub use session::{
    BaseComplete, BaseDataHeader, SessionAck, SessionAction, SessionControl, SessionFailure, SessionKind, SessionPhase,
};

/// The versions of the protocol, newest first, each with what it brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
#[repr(u16)]
pub enum ProtocolVersion {
    /// Segments have version 3, with [compact batches](crate::wal::batch): who takes a log in, or reads it, knows them.
    /// Nothing else has changed.
    V3 = 3,
    /// A follower whose log is no beginning of the leader's is asked where they part ([`EpochHistory`]), and one that
    /// makes a rebuild durable says so ([`SessionPhase::MakingDurable`]). Nothing else has changed.
    V2 = 2,
    /// The first.
    V1 = 1,
}

impl ProtocolVersion {
    /// The newest.
    pub const NEWEST: ProtocolVersion = ProtocolVersion::V3;
    /// The oldest that is still spoken.
    pub const OLDEST: ProtocolVersion = ProtocolVersion::V1;

    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        self as u16
    }
}

/// The versions that this build speaks.
pub const PROTOCOL_VERSIONS: VersionRange =
    VersionRange { min: ProtocolVersion::OLDEST.to_wire(), max: ProtocolVersion::NEWEST.to_wire() };

/// The versions that a node speaks, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VersionRange {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl VersionRange {
    /// The newest version that both speak; `None` if there is none, as with a range that ends before it begins.
    ///
    /// ```
    /// use towline::wire::VersionRange;
    ///
    /// let ours = VersionRange { min: 2, max: 4 };
    /// assert_eq!(ours.negotiate(VersionRange { min: 1, max: 3 }), Some(3));
    /// assert_eq!(ours.negotiate(VersionRange { min: 5, max: 9 }), None);
    /// ```
    #[must_use]
    pub const fn negotiate(self, peer: VersionRange) -> Option<u16> {
        let min = if self.min > peer.min { self.min } else { peer.min };
        let max = if self.max < peer.max { self.max } else { peer.max };
        if min <= max { Some(max) } else { None }
    }

    /// Whether it contains `version`.
    #[must_use]
    pub const fn contains(self, version: u16) -> bool {
        self.min <= version && version <= self.max
    }
}

impl fmt::Display for VersionRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max { write!(f, "{}", self.min) } else { write!(f, "{} to {}", self.min, self.max) }
    }
}

/// What is wrong with bytes from a peer. Prints as what the peer did, to follow "broke the protocol: ".
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WireError {
    /// Two bytes that do not begin a frame: something other than a Towline peer is talking.
    NotAFrame {
        /// The bytes.
        first: [u8; 2],
    },
    /// A frame header is damaged.
    HeaderChecksum {
        /// The checksum that it carries.
        stored: u32,
        /// The checksum that its bytes give.
        computed: u32,
    },
    /// A frame of a kind that is not known.
    UnknownKind {
        /// Its number.
        kind: u8,
    },
    /// A frame with flags that its kind does not have.
    UnknownFlags {
        /// The frame's kind.
        kind: FrameKind,
        /// All its flags.
        flags: u8,
    },
    /// The body of a frame is damaged, in the part that the header's checksum covers.
    BodyChecksum {
        /// The frame's kind.
        kind: FrameKind,
        /// The checksum in the header.
        stored: u32,
        /// The checksum that the bytes give.
        computed: u32,
    },
    /// A frame is longer than its kind may be.
    Oversized {
        /// The frame's kind.
        kind: FrameKind,
        /// Its length in bytes, without header.
        len: u64,
        /// The most that its kind may have.
        max: u32,
    },
    /// A message has the wrong length.
    Length {
        /// The frame's kind.
        kind: FrameKind,
        /// Bytes that came.
        len: u64,
        /// Bytes that the message has.
        expected: u64,
    },
    /// A field holds a number that means nothing.
    UnknownValue {
        /// The frame's kind.
        kind: FrameKind,
        /// What the field tells.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A frame that carries raw bytes where a message is due.
    NotAMessage {
        /// The frame's kind.
        kind: FrameKind,
    },
    /// A frame that is well formed but not allowed where it stands.
    Unexpected {
        /// The frame's kind.
        kind: FrameKind,
        /// What is due instead, or what is wrong.
        reason: Cow<'static, str>,
    },
    /// The bytes of a segment are not that segment.
    Segment {
        /// Where in the segment, in bytes.
        offset: u64,
        /// What is wrong.
        reason: Cow<'static, str>,
    },
}

impl WireError {
    /// The crate's error for a peer that sent this.
    #[must_use]
    pub fn from_peer(self, peer: impl Into<String>) -> Error {
        Error::protocol(peer, self.to_string())
    }
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WireError::NotAFrame { first } => {
                write!(f, "the bytes {:02x} {:02x} do not begin a frame; ", first[0], first[1])?;
                f.write_str(match first {
                    b"GE" | b"PO" | b"PU" | b"HE" | b"DE" | b"OP" | b"PR" | b"HT" | b"CO" => {
                        "something that speaks HTTP is talking, not a Towline peer"
                    }
                    [0x14..=0x17, 0x03] => "something that speaks TLS is talking, not a Towline peer",
                    _ => "something other than a Towline peer is talking",
                })
            }
            WireError::HeaderChecksum { stored, computed } => {
                write!(f, "a frame header's checksum is {stored:08x}, but its bytes give {computed:08x}")
            }
            WireError::UnknownKind { kind } => write!(f, "frame kind {kind} is unknown"),
            WireError::UnknownFlags { kind, flags } => write!(f, "{kind} has no flags {flags:#04x}"),
            WireError::BodyChecksum { kind, stored, computed } => {
                write!(f, "{kind} whose body's checksum is {stored:08x}, but its bytes give {computed:08x}")
            }
            WireError::Oversized { kind, len, max } => {
                write!(f, "frame of {len} bytes; {kind} may have at most {max}")
            }
            WireError::Length { kind, len, expected } => write!(f, "{kind} of {len} bytes; it has {expected}"),
            WireError::UnknownValue { kind, field, value } => write!(f, "{kind} with unknown {field} {value}"),
            WireError::NotAMessage { kind } => write!(f, "{kind} where a message is due"),
            WireError::Unexpected { kind, reason } => write!(f, "unexpected {kind}: {reason}"),
            WireError::Segment { offset, reason } => write!(f, "the segment is wrong at offset {offset}: {reason}"),
        }
    }
}

impl std::error::Error for WireError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negotiation_takes_the_newest_that_both_speak() {
        let range = |min, max| VersionRange { min, max };
        for (ours, theirs, expected) in [
            (range(1, 1), range(1, 1), Some(1)),
            (range(1, 3), range(2, 9), Some(3)),
            (range(2, 9), range(1, 3), Some(3)),
            (range(1, 1), range(2, 2), None),
            (range(1, 9), range(5, 4), None),
            (range(0, u16::MAX), range(0, u16::MAX), Some(u16::MAX)),
        ] {
            assert_eq!(ours.negotiate(theirs), expected, "{ours:?} {theirs:?}");
            assert_eq!(theirs.negotiate(ours), expected, "{ours:?} {theirs:?}");
        }
        assert_eq!(PROTOCOL_VERSIONS, range(1, 3));
    }

    #[test]
    fn errors_name_themselves() {
        let text = |error: WireError| error.to_string();
        assert_eq!(
            text(WireError::Oversized { kind: FrameKind::WalData, len: 5_000_000, max: 1_048_592 }),
            "frame of 5000000 bytes; WalData may have at most 1048592"
        );
        assert!(text(WireError::NotAFrame { first: *b"GE" }).contains("HTTP"));
        assert!(text(WireError::NotAFrame { first: [0x16, 0x03] }).contains("TLS"));
        assert!(text(WireError::NotAFrame { first: [0, 0] }).contains("other than a Towline peer"));
        let error = WireError::UnknownKind { kind: 99 }.from_peer("10.0.0.7:4000");
        assert_eq!(error.to_string(), "10.0.0.7:4000 broke the protocol: frame kind 99 is unknown");
    }
}
