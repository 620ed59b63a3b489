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
//! | 8 | 4 | `body_crc` | CRC-32 (IEEE) of the bytes of the body that it covers; 0 if there are none |
//! | 12 | 4 | `crc` | CRC-32 (IEEE) of bytes 0 to 12 |
//!
//! A header is valid exactly if, checked in this order,
//!
//! 1. `magic` is right;
//! 2. `crc` matches;
//! 3. `kind` is known, and `flags` has no bit that the kind does not have;
//! 4. `length` is at least [`FrameKind::prefix_len`] and at most [`FrameKind::max_len`];
//! 5. `body_crc` is 0 if it covers nothing.
//!
//! So a length is believed only from an undamaged header, and never beyond what its kind may have.
//!
//! `body_crc` covers the whole body of messages and of `Status`, and of all others the prefix: whatever says who,
//! where, how far and under which epoch. The raw bytes behind a prefix carry checksums of their own, batch by batch or
//! block by block, which are checked where the bytes are used, and are not summed a second time here. Whoever receives
//! a body gives nothing of what is covered to anybody before it has been checked: see [`BodyCheck`].

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

    /// Bytes of the fixed prefix before the raw bytes of the body; 0 where the body is not made of these two.
    #[must_use]
    pub const fn prefix_len(self) -> u32 {
        match self {
            FrameKind::WalData => len(WalDataHeader::LEN),
            FrameKind::BaseData => len(BaseDataHeader::LEN),
            FrameKind::Segment => len(SegmentPieceHeader::LEN),
            _ => 0,
        }
    }

    /// How many bytes at the beginning of a body of `len` bytes `body_crc` covers: the prefix, or all.
    #[must_use]
    pub const fn covered_len(self, len: u32) -> u32 {
        match self.prefix_len() {
            0 => len,
            prefix => prefix,
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
    /// The checksum of the first [`covered_len`](FrameKind::covered_len) bytes of the body.
    pub body_crc: u32,
}

impl FrameHeader {
    /// The header for a body of two parts, either of which may be empty: what is copied, and what is sent from where it
    /// lies. Reads no more of them than is covered.
    ///
    /// # Errors
    ///
    /// [`WireError::Oversized`], [`WireError::Length`] or [`WireError::UnknownFlags`]: the peer would refuse such a
    /// frame.
    pub fn new(kind: FrameKind, flags: u8, prefix: &[u8], rest: &[u8]) -> Result<FrameHeader, WireError> {
        let len = checked_len(kind, flags, prefix.len() as u64 + rest.len() as u64)?;
        let header = FrameHeader { kind, flags, len, body_crc: 0 };
        let mut check = BodyCheck::new(header);
        check.update(prefix);
        check.update(rest);
        Ok(FrameHeader { body_crc: check.crc.finalize(), ..header })
    }

    /// Its bytes.
    ///
    /// ```
    /// use towline::Lsn;
    /// use towline::wire::{FrameHeader, FrameKind, WalDataHeader};
    ///
    /// let prefix = WalDataHeader { segment: Lsn(1), offset: 4096 }.to_bytes();
    /// let header = FrameHeader::new(FrameKind::WalData, 0, &prefix, b"log bytes").unwrap();
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
        bytes[8..12].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..12]);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header and checks it by every rule of the [format](self). Its body is checked by a [`BodyCheck`].
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
        let (flags, body_crc) = (bytes[3], u32_at(8));
        let len = checked_len(kind, flags, u64::from(u32_at(4)))?;
        if kind.covered_len(len) == 0 && body_crc != 0 {
            return Err(WireError::BodyChecksum { kind, stored: body_crc, computed: 0 });
        }
        Ok(FrameHeader { kind, flags, len, body_crc })
    }
}

/// The length of a body, if a frame of this kind may have that and `flags`.
fn checked_len(kind: FrameKind, flags: u8, len: u64) -> Result<u32, WireError> {
    if flags & !kind.allowed_flags() != 0 {
        return Err(WireError::UnknownFlags { kind, flags });
    }
    match u32::try_from(len) {
        Ok(len) if len < kind.prefix_len() => {
            Err(WireError::Length { kind, len: u64::from(len), expected: u64::from(kind.prefix_len()) })
        }
        Ok(len) if len <= kind.max_len() => Ok(len),
        _ => Err(WireError::Oversized { kind, len, max: kind.max_len() }),
    }
}

/// Checks a body against its header's `body_crc` while it arrives, however many pieces it comes in.
///
/// ```
/// use towline::wire::{BodyCheck, FrameHeader, FrameKind};
///
/// let header = FrameHeader::new(FrameKind::CaughtUp, 0, &[7; 8], &[]).unwrap();
/// let mut check = BodyCheck::new(header);
/// assert_eq!(check.take(&[7; 5]), Ok(()));
/// assert!(check.take(&[7, 7, 6]).is_err());
/// ```
#[derive(Clone, Debug)]
pub struct BodyCheck {
    header: FrameHeader,
    /// Bytes that are covered and have not come.
    left: u32,
    crc: crc32fast::Hasher,
}

impl BodyCheck {
    /// Nothing of the body has come.
    #[must_use]
    pub fn new(header: FrameHeader) -> BodyCheck {
        BodyCheck { header, left: header.kind.covered_len(header.len), crc: crc32fast::Hasher::new() }
    }

    /// The frame's header.
    #[must_use]
    pub fn header(&self) -> FrameHeader {
        self.header
    }

    /// Takes the next bytes of the body; they are sound once the last byte that is covered has come with `Ok`.
    ///
    /// # Errors
    ///
    /// [`WireError::BodyChecksum`], with the last byte that is covered.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        if self.left == 0 {
            return Ok(());
        }
        self.update(bytes);
        if self.left > 0 {
            return Ok(());
        }
        let FrameHeader { kind, body_crc: stored, .. } = self.header;
        let computed = self.crc.clone().finalize();
        if computed == stored { Ok(()) } else { Err(WireError::BodyChecksum { kind, stored, computed }) }
    }

    fn update(&mut self, bytes: &[u8]) {
        let covered = bytes.get(..self.left as usize).unwrap_or(bytes);
        self.crc.update(covered);
        self.left -= u32::try_from(covered.len()).unwrap_or(self.left);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A header with any numbers in it and a checksum that fits.
    fn forged(kind: u8, flags: u8, len: u32, body_crc: u32) -> [u8; FRAME_HEADER_LEN] {
        let mut bytes = [0; FRAME_HEADER_LEN];
        bytes[0..2].copy_from_slice(&MAGIC);
        bytes[2] = kind;
        bytes[3] = flags;
        bytes[4..8].copy_from_slice(&len.to_le_bytes());
        bytes[8..12].copy_from_slice(&body_crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..12]);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn the_bytes_of_a_header() {
        let header = FrameHeader { kind: FrameKind::WalData, flags: 3, len: 0x0001_0203, body_crc: 0x0706_0504 };
        let bytes = header.encode();
        assert_eq!(bytes[..12], [b'T', b'W', 3, 3, 0x03, 0x02, 0x01, 0x00, 4, 5, 6, 7]);
        assert_eq!(bytes[12..], crc32fast::hash(&bytes[..12]).to_le_bytes());
    }

    #[test]
    fn what_the_checksum_of_a_body_covers() {
        for &kind in FrameKind::ALL {
            // As long as it may be, but not as long as log bytes come.
            let body: Vec<u8> = (0..kind.max_len().min(200)).map(|at| (at % 251) as u8).collect();
            let covered = kind.covered_len(kind.max_len()).min(200) as usize;
            let due = match kind {
                FrameKind::WalData => WalDataHeader::LEN,
                FrameKind::BaseData => BaseDataHeader::LEN,
                FrameKind::Segment => SegmentPieceHeader::LEN,
                _ => body.len(),
            };
            assert_eq!(covered, due, "{kind}");
            let header = FrameHeader::new(kind, 0, &body, &[]).unwrap();
            assert_eq!(header.body_crc, crc32fast::hash(&body[..covered]), "{kind}");
            for cut in 0..=body.len() {
                let (prefix, rest) = body.split_at(cut);
                assert_eq!(FrameHeader::new(kind, 0, prefix, rest), Ok(header), "{kind} in two parts at {cut}");
                let mut check = BodyCheck::new(header);
                assert_eq!((check.take(prefix), check.take(rest)), (Ok(()), Ok(())), "{kind} at {cut}");
            }
            for bit in 0..body.len() * 8 {
                let mut damaged = body.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let found = BodyCheck::new(header).take(&damaged);
                let is_found =
                    matches!(found, Err(WireError::BodyChecksum { stored, .. }) if stored == header.body_crc);
                assert_eq!(is_found, bit / 8 < covered, "{kind} bit {bit}: {found:?}");
            }
        }
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
        assert_eq!(refused(forged(wal_data, 4, 16, 0)), WireError::UnknownFlags { kind: FrameKind::WalData, flags: 4 });
        assert_eq!(
            refused(forged(wal_data, 0, 15, 0)),
            WireError::Length { kind: FrameKind::WalData, len: 15, expected: 16 }
        );
        for kind in [FrameKind::StatusRequest, FrameKind::Status, FrameKind::Ack] {
            let refusal = WireError::BodyChecksum { kind, stored: 9, computed: 0 };
            assert_eq!(refused(forged(kind.to_wire(), 0, 0, 9)), refusal);
        }
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
            let bytes = FrameHeader { kind, flags: kind.allowed_flags(), len: kind.max_len(), body_crc: 0 }.encode();
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes;
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(FrameHeader::decode(&damaged).is_err(), "{kind} bit {bit}");
            }
        }
    }

    proptest! {
        #[test]
        fn arbitrary_headers_never_panic_nor_exceed_their_kind(kind: u8, flags: u8, len: u32, body_crc: u32, any: [u8; 16]) {
            let _ = FrameHeader::decode(&any);
            let bytes = forged(kind, flags, len, body_crc);
            if let Ok(header) = FrameHeader::decode(&bytes) {
                prop_assert!(header.len <= header.kind.max_len());
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
