//! Where two logs part: asked by the leader of a follower whose log is no beginning of its own, since version 2.
//!
//! ```text
//! follower                                      leader
//!    │ SyncRequest ─────────────────────────────▶ │  its log does not hold the follower's newest record
//!    │ ◀── EpochHistory (where each epoch ends)   │
//!    │ CommonPoint (the newest point of both) ──▶ │  looks it up in its own log
//!    │ ◀── ShardInfo                              │  or Error
//! ```
//!
//! Only one node leads under an epoch, so what two logs hold of one epoch is the same as far as the shorter one goes,
//! and the chains at the end of it prove that. The answer is the first of the leader's ends, from the newest on, at
//! which either the follower's own records of that epoch end no later, or the follower has the leader's chain.

use crate::limits::MAX_EPOCH_ENDS;
use crate::types::{Chain, Epoch, Lsn};
use crate::wire::codec::{MAX_MESSAGE_LEN, Writer, message};
use crate::wire::{FrameKind, WireError};

message! {
    /// Where the records of one epoch end in a log.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `epoch` |
    /// | 8 | 8 | `lsn` |
    /// | 16 | 4 | `chain` |
    pub struct EpochEnd in EpochHistory {
        /// The epoch; 0 for the place where the log begins.
        pub epoch: Epoch,
        /// The newest LSN written under it.
        pub lsn: Lsn,
        /// The chain at it, before a batch that seals the segment.
        pub chain: Chain,
    }
}

message! {
    /// The follower's answer: the newest point of its log that the leader's history allows for.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `tail_epoch` |
    /// | 8 | 8 | `lsn` |
    /// | 16 | 4 | `chain` |
    /// | 20 | 1 | `flags`, see [`CommonPoint::FOUND`] and [`CommonPoint::CUT_POSSIBLE`] |
    pub struct CommonPoint in CommonPoint {
        /// The epoch of the newest record in its log; 0 if there is none.
        pub tail_epoch: Epoch,
        /// The point; 0 also if there is none.
        pub lsn: Lsn,
        /// The chain there.
        pub chain: Chain,
        /// What else is to be known. Flags that the leader does not know say nothing.
        pub flags: u8,
    }
}

impl CommonPoint {
    /// Flag: there is such a point.
    pub const FOUND: u8 = 1;
    /// Flag: nothing behind it can be in the follower's base, so that its log may be cut there.
    pub const CUT_POSSIBLE: u8 = 2;
}

/// Where the records of each epoch end in the leader's log.
///
/// | offset | size | field |
/// |---:|---:|---|
/// | 0 | 2 | `version` |
/// | 2 | 1 | how many ends, at most [`MAX_EPOCH_ENDS`] |
/// | 3 | 20 each | the ends: [`EpochEnd`]s |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EpochHistory {
    /// The protocol version of everything that follows.
    pub version: u16,
    /// The newest first; the last one is where the log begins.
    pub ends: Vec<EpochEnd>,
}

const PREFIX_LEN: usize = 3;

impl EpochHistory {
    /// Bytes of the longest.
    pub const MAX_LEN: usize = PREFIX_LEN + MAX_EPOCH_ENDS * EpochEnd::LEN;

    /// A history of these ends; where there are too many, of the newest and the last.
    #[must_use]
    pub fn new(version: u16, mut ends: Vec<EpochEnd>) -> EpochHistory {
        if let Some(beyond) = ends.len().checked_sub(MAX_EPOCH_ENDS).filter(|&beyond| beyond > 0) {
            ends.drain(MAX_EPOCH_ENDS - 1..MAX_EPOCH_ENDS - 1 + beyond);
        }
        EpochHistory { version, ends }
    }

    /// Reads it from exactly its bytes.
    ///
    /// # Errors
    ///
    /// [`WireError`] if there are more or fewer bytes than it says, or too many ends.
    pub fn decode(bytes: &[u8]) -> Result<EpochHistory, WireError> {
        let kind = FrameKind::EpochHistory;
        let wrong = |expected: usize| WireError::Length { kind, len: bytes.len() as u64, expected: expected as u64 };
        let Some((&[low, high, count], ends)) = bytes.split_first_chunk::<PREFIX_LEN>() else {
            return Err(wrong(PREFIX_LEN));
        };
        let count = usize::from(count);
        if count > MAX_EPOCH_ENDS {
            return Err(WireError::UnknownValue { kind, field: "number of ends", value: count as u64 });
        }
        if ends.len() != count * EpochEnd::LEN {
            return Err(wrong(PREFIX_LEN + count * EpochEnd::LEN));
        }
        let ends = ends.chunks_exact(EpochEnd::LEN).map(EpochEnd::decode).collect::<Result<_, _>>()?;
        Ok(EpochHistory { version: u16::from_le_bytes([low, high]), ends })
    }

    pub(in crate::wire) fn write(&self, to: &mut Writer<'_>) {
        let ends = self.ends.get(..MAX_EPOCH_ENDS).unwrap_or(&self.ends);
        to.put(&self.version.to_le_bytes());
        to.put(&[u8::try_from(ends.len()).unwrap_or(u8::MAX)]);
        ends.iter().for_each(|end| end.write(to));
    }
}

const _: () = assert!(EpochHistory::MAX_LEN <= MAX_MESSAGE_LEN, "a history fits in a message");
const _: () = assert!(MAX_EPOCH_ENDS <= u8::MAX as usize, "the number of ends takes a byte");
