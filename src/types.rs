//! The words of the crate as types: numbers that cannot be mixed up.
//!
//! Each is a newtype over a fixed-width integer, so that it has one size on disk, on the wire and in memory, on
//! every platform. Arithmetic that could wrap is checked or saturating; nothing here panics.

use std::fmt;
use std::str::FromStr;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The number inside.
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }

        impl FromStr for $name {
            type Err = std::num::ParseIntError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

number! {
    /// Log sequence number: counts the records of one shard from 1. [`Lsn::ZERO`] means "nothing yet".
    Lsn(u64)
}
number! {
    /// One leadership term. Only grows; everything older is refused. The first term is 1.
    Epoch(u64)
}
number! {
    /// One ordered log, with its own directory, threads, streams and watermarks. Numbered from 0.
    ShardId(u16)
}
number! {
    /// Where a log originates; part of every segment's identity.
    RegionId(u16)
}
number! {
    /// A node's identity. Never derived from an address; 0 is "not assigned".
    NodeId(u64)
}
number! {
    /// One recovery contract between a leader, or a follower that feeds others, and a follower of one shard. Whoever
    /// issues them numbers them: its ids of a shard only grow, and none is used twice. [`SessionId::NONE`] names none.
    SessionId(u64)
}
number! {
    /// Running checksum of a log: two logs with the same (LSN, chain) have the same history, but by a chance of one in
    /// 2^32. It finds accidents, not forgery.
    ///
    /// It is the CRC of the newest batch, and each batch's CRC is seeded with the one before it. The value before
    /// the first batch of a log is [`Chain::genesis`].
    Chain(u32)
}

impl Lsn {
    /// Nothing yet: the position before the first record.
    pub const ZERO: Lsn = Lsn(0);
    /// The first record of a log.
    pub const FIRST: Lsn = Lsn(1);
    /// Past every record that a log can hold; useful as "no bound".
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// The LSN after this one. Stays at [`Lsn::MAX`], which no log reaches.
    ///
    /// ```
    /// # use towline::Lsn;
    /// assert_eq!(Lsn::ZERO.next(), Lsn::FIRST);
    /// ```
    #[must_use]
    pub const fn next(self) -> Lsn {
        Lsn(self.0.saturating_add(1))
    }

    /// The LSN before this one; [`Lsn::ZERO`] stays where it is.
    #[must_use]
    pub const fn previous(self) -> Lsn {
        Lsn(self.0.saturating_sub(1))
    }

    /// This LSN moved forward by `records`, saturating.
    #[must_use]
    pub const fn plus(self, records: u64) -> Lsn {
        Lsn(self.0.saturating_add(records))
    }

    /// How many records lie after `earlier` up to and including `self`; 0 if `earlier` is not earlier.
    ///
    /// ```
    /// # use towline::Lsn;
    /// assert_eq!(Lsn(10).records_since(Lsn(7)), 3);
    /// assert_eq!(Lsn(7).records_since(Lsn(10)), 0);
    /// ```
    #[must_use]
    pub const fn records_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl SessionId {
    /// No session.
    pub const NONE: SessionId = SessionId(0);
}

impl From<ShardId> for usize {
    fn from(shard: ShardId) -> usize {
        usize::from(shard.0)
    }
}

impl Epoch {
    /// Before any term.
    pub const ZERO: Epoch = Epoch(0);
    /// The first term of a cluster.
    pub const FIRST: Epoch = Epoch(1);

    /// The epoch after this one, saturating.
    #[must_use]
    pub const fn next(self) -> Epoch {
        Epoch(self.0.saturating_add(1))
    }

    /// Whether there is a later one: from a leader under the last one nobody could ever take over.
    pub(crate) const fn has_successor(self) -> bool {
        self.0 < u64::MAX
    }
}

impl Chain {
    /// The chain before the first batch of a shard's log: a checksum of what makes this log this log, so that the
    /// logs of two clusters, regions or shards are not taken for each other, but by a chance of one in 2^32.
    ///
    /// ```
    /// # use towline::{Chain, ClusterId, RegionId, ShardId};
    /// let cluster = ClusterId(7);
    /// assert_ne!(
    ///     Chain::genesis(cluster, RegionId(0), ShardId(0)),
    ///     Chain::genesis(cluster, RegionId(0), ShardId(1)),
    /// );
    /// ```
    #[must_use]
    pub fn genesis(cluster: ClusterId, region: RegionId, shard: ShardId) -> Chain {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(b"towline genesis");
        hasher.update(&cluster.0.to_le_bytes());
        hasher.update(&region.0.to_le_bytes());
        hasher.update(&shard.0.to_le_bytes());
        Chain(hasher.finalize())
    }
}

/// Which cluster a node belongs to: 128 random bits chosen when the first leader's directory is made. 0 means "not
/// known yet", as on a follower that has never met its leader. Printed and parsed as 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct ClusterId(pub u128);

impl ClusterId {
    /// Not known yet.
    pub const UNKNOWN: ClusterId = ClusterId(0);
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for ClusterId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u128::from_str_radix(text, 16).map(Self)
    }
}

/// Hybrid-clock timestamp of a batch: milliseconds since the Unix epoch in the upper 48 bits, a counter below.
///
/// Grows strictly within one log even when the wall clock does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct HybridTimestamp(pub u64);

impl HybridTimestamp {
    /// The timestamp after this one, given the wall clock: the clock if it has moved on, else one more than before.
    ///
    /// ```
    /// # use towline::HybridTimestamp;
    /// let first = HybridTimestamp::default().tick(1_000);
    /// assert_eq!(first.unix_ms(), 1_000);
    /// let second = first.tick(999); // the wall clock went back
    /// assert!(second > first);
    /// ```
    #[must_use]
    pub const fn tick(self, unix_ms: u64) -> HybridTimestamp {
        let clock = (unix_ms & 0xffff_ffff_ffff) << 16;
        if clock > self.0 { HybridTimestamp(clock) } else { HybridTimestamp(self.0.saturating_add(1)) }
    }

    /// The wall-clock part, in milliseconds since the Unix epoch.
    #[must_use]
    pub const fn unix_ms(self) -> u64 {
        self.0 >> 16
    }
}

/// Names one segment: region, shard and the first LSN in it. It prints and parses as the file name
/// `r0000-s0003-00000000000000000001.wal`, so a file copied out of its directory still says what it is.
///
/// ```
/// # use towline::{Lsn, RegionId, ShardId, WalSegmentId};
/// let id = WalSegmentId { region: RegionId(0), shard: ShardId(3), first_lsn: Lsn(1) };
/// assert_eq!(id.to_string(), "r0000-s0003-00000000000000000001.wal");
/// assert_eq!(id.to_string().parse(), Ok(id));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalSegmentId {
    /// Where the log originates.
    pub region: RegionId,
    /// Which of its shards.
    pub shard: ShardId,
    /// The first LSN that the segment holds or will hold.
    pub first_lsn: Lsn,
}

impl fmt::Display for WalSegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{:04}-s{:04}-{:020}.wal", self.region.0, self.shard.0, self.first_lsn.0)
    }
}

/// A text is not the name of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseSegmentIdError(String);

impl fmt::Display for ParseSegmentIdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not a segment name (expected r<region>-s<shard>-<first lsn>.wal)", self.0)
    }
}

impl std::error::Error for ParseSegmentIdError {}

impl FromStr for WalSegmentId {
    type Err = ParseSegmentIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let stem = text.strip_suffix(".wal")?;
            let mut parts = stem.split('-');
            let region = parts.next()?.strip_prefix('r')?.parse().ok()?;
            let shard = parts.next()?.strip_prefix('s')?.parse().ok()?;
            let first_lsn = parts.next()?.parse().ok()?;
            let id = WalSegmentId { region: RegionId(region), shard: ShardId(shard), first_lsn: Lsn(first_lsn) };
            // Only the one printed form is a name: "+1", missing zeros and trailing parts are not.
            (parts.next().is_none() && id.to_string() == text).then_some(id)
        };
        parse().ok_or_else(|| ParseSegmentIdError(text.to_owned()))
    }
}

/// The directory of a shard inside a data directory: `shard-0003`.
#[must_use]
pub fn shard_directory_name(shard: ShardId) -> String {
    format!("shard-{:04}", shard.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_names_sort_like_their_lsns() {
        let name = |lsn| WalSegmentId { region: RegionId(0), shard: ShardId(0), first_lsn: Lsn(lsn) }.to_string();
        assert!(name(9) < name(10));
        assert!(name(u64::MAX - 1) < name(u64::MAX));
    }

    #[test]
    fn only_the_printed_form_parses() {
        for text in [
            "",
            "r0000-s0000-1.wal",
            "r0000-s0000-00000000000000000001",
            "r0000-s0000-+0000000000000000001.wal",
            "r0000-s0000-00000000000000000001-x.wal",
            "R0000-s0000-00000000000000000001.wal",
            "r00000-s0000-00000000000000000001.wal",
            "r0000-s0000-99999999999999999999.wal",
        ] {
            assert!(text.parse::<WalSegmentId>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn hybrid_timestamps_never_go_back() {
        let mut last = HybridTimestamp::default();
        for clock in [5, 5, 4, 6, 0, 6, 7] {
            let next = last.tick(clock);
            assert!(next > last);
            last = next;
        }
        assert_eq!(last.unix_ms(), 7);
    }
}
