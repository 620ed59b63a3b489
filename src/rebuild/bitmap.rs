//! Which blocks the log lane has covered during a rebuild.
//!
//! A rebuild copies a base image while new records arrive. A block that a record has touched is newer than any copy of
//! it in the base, so the copy must be dropped: the log always wins. One bit says so for each block.
//!
//! # Rules
//!
//! 1. A bit is set when a record that touches the block is in the local log and applied, never when it has merely
//!    arrived; records that delete or trim count like any other.
//! 2. Bits are never cleared one at a time: [`clear`](BlockBitmap::clear) begins another rebuild.
//! 3. Memory grows to the highest block marked, never past the limit given at the start, and asking grows nothing: a
//!    peer that names absurd blocks costs an error, not memory.

use crate::error::{Error, Result};
use crate::target::BlockId;

const BITS: u64 = u64::BITS as u64;
/// Words that the bitmap grows by at least: 4 KiB, or 32,768 blocks.
const MIN_GROWTH_WORDS: usize = 512;

/// A dense set of block numbers, owned by one rebuild session. Ten million blocks take 1.25 MB.
///
/// ```
/// use towline::rebuild::BlockBitmap;
/// use towline::target::BlockId;
///
/// let mut covered = BlockBitmap::new(1_000_000);
/// covered.mark_applied(BlockId(7))?;
/// assert!(!covered.should_apply_base(BlockId(7)), "the log has written block 7 since");
/// assert!(covered.should_apply_base(BlockId(8)));
/// assert_eq!(covered.covered(), 1);
/// # Ok::<(), towline::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct BlockBitmap {
    words: Vec<u64>,
    limit_blocks: u64,
    covered: u64,
}

impl BlockBitmap {
    /// An empty set of the blocks below `limit_blocks`. Allocates nothing yet.
    #[must_use]
    pub const fn new(limit_blocks: u64) -> BlockBitmap {
        BlockBitmap { words: Vec::new(), limit_blocks, covered: 0 }
    }

    /// Notes that an applied record has touched the block. Returns whether it is the first one to do so.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the block is not below the limit, or if there is no memory for its bit. Nothing has
    /// changed then.
    pub fn mark_applied(&mut self, block: BlockId) -> Result<bool> {
        if block.0 >= self.limit_blocks {
            return Err(Error::invalid(format!(
                "block {block} is not below the limit of {} blocks",
                self.limit_blocks
            )));
        }
        let (word, bit) = locate(block).ok_or_else(|| no_memory(block))?;
        if word >= self.words.len() {
            self.grow_to(word, block)?;
        }
        let is_new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.covered += u64::from(is_new);
        Ok(is_new)
    }

    /// Whether the base's copy of the block is still wanted: no applied record has touched the block. Also true for
    /// blocks that were never marked because they lie past the limit.
    #[must_use]
    #[inline]
    pub fn should_apply_base(&self, block: BlockId) -> bool {
        let word = locate(block).and_then(|(word, bit)| Some(self.words.get(word)? & bit));
        word.unwrap_or(0) == 0
    }

    /// How many blocks have been marked.
    #[must_use]
    pub const fn covered(&self) -> u64 {
        self.covered
    }

    /// Blocks that can be marked: those below this number.
    #[must_use]
    pub const fn limit_blocks(&self) -> u64 {
        self.limit_blocks
    }

    /// Forgets every mark, for another rebuild. Keeps the memory.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.covered = 0;
    }

    /// Makes room for `word`, and half as much again as there is, so that marking block after block copies each word a
    /// bounded number of times; never more than the limit needs.
    fn grow_to(&mut self, word: usize, block: BlockId) -> Result<()> {
        let len = self.words.len();
        let roomy = (word + 1).max(len + len / 2).max(len + MIN_GROWTH_WORDS);
        let limit_words = usize::try_from(self.limit_blocks.div_ceil(BITS)).unwrap_or(usize::MAX);
        let target = roomy.min(limit_words);
        self.words.try_reserve_exact(target - len).map_err(|_| no_memory(block))?;
        self.words.resize(target, 0);
        Ok(())
    }
}

#[inline]
fn locate(block: BlockId) -> Option<(usize, u64)> {
    Some((usize::try_from(block.0 / BITS).ok()?, 1 << (block.0 % BITS)))
}

fn no_memory(block: BlockId) -> Error {
    Error::invalid(format!("there is no memory to mark block {block}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_bitmap_wants_every_block_and_owns_no_memory() {
        let bitmap = BlockBitmap::new(u64::MAX);
        assert!(bitmap.should_apply_base(BlockId(0)) && bitmap.should_apply_base(BlockId(u64::MAX)));
        assert_eq!((bitmap.covered(), bitmap.words.capacity()), (0, 0));
    }

    #[test]
    fn marking_twice_covers_once() {
        let mut bitmap = BlockBitmap::new(100);
        assert!(bitmap.mark_applied(BlockId(63)).unwrap());
        assert!(!bitmap.mark_applied(BlockId(63)).unwrap());
        assert_eq!(bitmap.covered(), 1);
        assert!(bitmap.should_apply_base(BlockId(62)) && bitmap.should_apply_base(BlockId(64)));
    }

    #[test]
    fn the_limit_holds_and_refusals_change_nothing() {
        let mut bitmap = BlockBitmap::new(65);
        assert!(bitmap.mark_applied(BlockId(64)).unwrap());
        for beyond in [65, 66, 1 << 40, u64::MAX] {
            let error = bitmap.mark_applied(BlockId(beyond)).unwrap_err();
            assert!(error.to_string().contains(&beyond.to_string()), "{error}");
            assert!(bitmap.should_apply_base(BlockId(beyond)));
        }
        assert_eq!((bitmap.covered(), bitmap.words.len()), (1, 2));
    }

    #[test]
    fn a_bit_that_no_memory_can_hold_is_an_error() {
        let mut bitmap = BlockBitmap::new(u64::MAX);
        assert!(bitmap.mark_applied(BlockId(u64::MAX - 1)).is_err());
        assert_eq!(bitmap.covered(), 0);
    }

    #[test]
    fn clearing_forgets_and_keeps_the_memory() {
        let mut bitmap = BlockBitmap::new(1_000);
        bitmap.mark_applied(BlockId(999)).unwrap();
        let words = bitmap.words.len();
        bitmap.clear();
        assert!(bitmap.should_apply_base(BlockId(999)));
        assert_eq!((bitmap.covered(), bitmap.words.len()), (0, words));
    }

    #[test]
    fn tens_of_millions_of_blocks_take_a_bit_each() {
        let blocks = 20_000_000;
        let mut bitmap = BlockBitmap::new(blocks);
        for block in (0..blocks).step_by(1_000) {
            bitmap.mark_applied(BlockId(block)).unwrap();
        }
        assert_eq!(bitmap.covered(), blocks / 1_000);
        assert!(bitmap.words.capacity() as u64 * 8 <= blocks / 8);
    }

    proptest! {
        #[test]
        fn it_is_a_set(limit in 1u64..5_000, blocks in prop::collection::vec(0u64..6_000, 0..200)) {
            let mut bitmap = BlockBitmap::new(limit);
            let mut model = BTreeSet::new();
            for &block in &blocks {
                match bitmap.mark_applied(BlockId(block)) {
                    Ok(is_new) => prop_assert_eq!(is_new, model.insert(block)),
                    Err(_) => prop_assert!(block >= limit),
                }
            }
            for block in 0..6_100 {
                prop_assert_eq!(bitmap.should_apply_base(BlockId(block)), !model.contains(&block));
            }
            prop_assert_eq!(bitmap.covered(), model.len() as u64);
        }
    }
}
