//! Which shard a key belongs to. Part of every store's format: the answer for a key never changes.
//!
//! # By prefix
//!
//! With `prefix_bits` of 1 to 10, the shard is the number made of the key's first `prefix_bits` bits, the most
//! significant bit of the first byte leading. A key that is too short goes on with zeros. There are exactly
//! 2^`prefix_bits` shards, so keys that sort together live together, and every shard has an equal range.
//!
//! # By hash
//!
//! With `prefix_bits` of 0, the shard is `(hash × shard_count) >> 64`, for any number of shards, where `hash` is 64-bit
//! FNV-1a over the key's bytes (offset basis `cbf29ce484222325`, prime `100000001b3`), finished with
//!
//! ```text
//! h ^= h >> 33;  h *= ff51afd7ed558ccd;  h ^= h >> 33;  h *= c4ceb9fe1a85ec53;  h ^= h >> 33
//! ```
//!
//! because the upper bits of FNV alone hardly depend on the last bytes.

use crate::error::{Error, Result};
use crate::limits::MAX_SHARDS;
use crate::types::ShardId;

/// Most leading bits that can choose a shard.
pub const MAX_PREFIX_BITS: u8 = 10;

const _: () = assert!(1 << MAX_PREFIX_BITS == MAX_SHARDS, "prefixes reach every shard that a node can have");

/// Routes keys to shards, by prefix or by [hash](self#by-hash).
///
/// ```
/// use towline::target::ShardRouter;
/// use towline::ShardId;
///
/// let by_prefix = ShardRouter::new(4, 2)?;
/// assert_eq!(by_prefix.route(&[0b1100_0000]), ShardId(3));
/// let by_hash = ShardRouter::new(3, 0)?;
/// assert!(by_hash.route(b"a key").get() < 3);
/// # Ok::<(), towline::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardRouter {
    shard_count: u16,
    prefix_bits: u8,
}

impl ShardRouter {
    /// A router onto `shard_count` shards: by the first `prefix_bits` bits, or by hash if that is 0.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there are no shards or more than [`MAX_SHARDS`], or if `prefix_bits` is not 0 and
    /// `shard_count` is not 2^`prefix_bits`.
    pub fn new(shard_count: u16, prefix_bits: u8) -> Result<ShardRouter> {
        if shard_count == 0 || shard_count > MAX_SHARDS {
            return Err(Error::invalid(format!("{shard_count} shards; there can be 1 to {MAX_SHARDS}")));
        }
        if prefix_bits > MAX_PREFIX_BITS {
            return Err(Error::invalid(format!("{prefix_bits} prefix bits; there can be up to {MAX_PREFIX_BITS}")));
        }
        if prefix_bits != 0 && 1 << prefix_bits != shard_count {
            return Err(Error::invalid(format!(
                "{prefix_bits} prefix bits make {} shards, not {shard_count}",
                1 << prefix_bits
            )));
        }
        Ok(ShardRouter { shard_count, prefix_bits })
    }

    /// The shard of a key.
    #[must_use]
    #[inline]
    pub fn route(&self, key: &[u8]) -> ShardId {
        if self.prefix_bits == 0 {
            let scaled = u128::from(hash(key)) * u128::from(self.shard_count);
            #[allow(clippy::cast_possible_truncation, reason = "below the shard count")]
            return ShardId((scaled >> 64) as u16);
        }
        let lead = u16::from_be_bytes([byte_at(key, 0), byte_at(key, 1)]);
        ShardId(lead >> (16 - self.prefix_bits))
    }

    /// How many shards there are.
    #[must_use]
    pub const fn shard_count(&self) -> u16 {
        self.shard_count
    }

    /// How many leading bits of a key choose its shard; 0 if its hash does.
    #[must_use]
    pub const fn prefix_bits(&self) -> u8 {
        self.prefix_bits
    }
}

#[inline]
fn byte_at(key: &[u8], at: usize) -> u8 {
    key.get(at).copied().unwrap_or(0)
}

/// The [hash](self#by-hash) that routing is made of.
#[must_use]
#[inline]
pub fn hash(key: &[u8]) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325_u64;
    for &byte in key {
        h = (h ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn prefixes_count_from_the_most_significant_bit() {
        for (bits, key, shard) in [
            (1, &[0x80][..], 1),
            (1, &[0x7f, 0xff], 0),
            (3, &[0b1010_0000], 0b101),
            (8, &[0x5a, 0xff], 0x5a),
            (10, &[0xff, 0xc0], 1023),
            (10, &[0x00, 0x40], 1),
            (10, &[0x01], 4),
            (10, &[], 0),
        ] {
            assert_eq!(ShardRouter::new(1 << bits, bits).unwrap().route(key), ShardId(shard), "{bits} bits of {key:?}");
        }
    }

    /// Computed apart from this code; a change here strands every store that routes by hash.
    #[test]
    fn hashes_never_change() {
        for (key, expected) in HASH_VECTORS {
            assert_eq!(hash(key), expected, "{:?}", String::from_utf8_lossy(key));
        }
        let router = ShardRouter::new(7, 0).unwrap();
        let shards: Vec<u16> = HASH_VECTORS.iter().map(|(key, _)| router.route(key).get()).collect();
        assert_eq!(shards, SHARDS_OF_SEVEN);
    }

    #[test]
    fn shard_counts_must_fit_the_prefix() {
        for (shards, bits) in [(0, 0), (1025, 0), (3, 2), (1, 1), (8, 2), (2, 11), (4, 255)] {
            assert!(ShardRouter::new(shards, bits).is_err(), "{shards} shards, {bits} bits");
        }
        assert_eq!(ShardRouter::new(1, 0).unwrap().route(b"anything"), ShardId(0));
    }

    #[test]
    fn hashing_spreads_similar_keys() {
        let router = ShardRouter::new(16, 0).unwrap();
        let mut counts = [0u32; 16];
        for number in 0..16_000 {
            counts[usize::from(router.route(format!("user:{number:08}").as_bytes()).get())] += 1;
        }
        assert!(counts.iter().all(|&count| (800..1200).contains(&count)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn every_key_has_a_shard(key in prop::collection::vec(any::<u8>(), 0..40), shards in 1u16..=1024, bits in 1u8..=10) {
            prop_assert!(ShardRouter::new(shards, 0).unwrap().route(&key).get() < shards);
            prop_assert!(ShardRouter::new(1 << bits, bits).unwrap().route(&key).get() < 1 << bits);
        }
    }

    const HASH_VECTORS: [(&[u8], u64); 6] = [
        (b"", 0xefd0_1f60_ba99_2926),
        (b"a", 0x82a2_a958_a9be_ce5b),
        (b"key", 0xcf8c_7983_8f3b_3030),
        (b"user:00000001", 0x88b9_87d1_a53c_fa05),
        (b"user:00000002", 0xed5e_5525_bb4b_5359),
        (&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], 0xf110_b958_da43_f7e6),
    ];
    const SHARDS_OF_SEVEN: [u16; 6] = [6, 3, 5, 3, 6, 6];
}
