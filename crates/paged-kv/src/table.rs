//! The block table of one sequence.

use crate::ids::{BlockId, BlockSize, Salt};
use crate::prefix::Chain;

/// The blocks that hold one sequence's keys and values: position `p` is in slot
/// `p % block_size` of block `blocks()[p / block_size]`.
///
/// A table is the right to its blocks. It cannot be cloned or made by hand, and goes back with
/// [`KvAllocator::free`](crate::KvAllocator::free), once:
///
/// ```compile_fail
/// # use paged_kv::*;
/// # let mut kv = BlockManager::new(Config::new(8, BlockSize::default()))?;
/// let table = kv.allocate(&[1, 2, 3], Salt::NONE, true, 3).unwrap().table;
/// kv.free(table);
/// kv.free(table); // error: use of moved value
/// # Ok::<(), ConfigError>(())
/// ```
///
/// ```compile_fail
/// # fn f(table: paged_kv::BlockTable) {
/// let copy: paged_kv::BlockTable = table.clone(); // error: no method named `clone`
/// # }
/// ```
///
/// A table that is dropped keeps its blocks from everyone for good; [`Usage::tables`](crate::Usage)
/// counts the tables that are out, so that a test can tell.
#[derive(Debug)]
#[must_use = "a table that is dropped and not freed leaks its blocks"]
#[repr(C)] // What a decode step reads comes first, in the 64 bytes of one cache line.
pub struct BlockTable {
    pub(crate) blocks: Vec<BlockId>,
    /// Which manager the blocks are of.
    pub(crate) manager: u64,
    /// How many computed tokens make the next block full; `usize::MAX` once nothing more can be
    /// published because a block went back unpublished.
    pub(crate) publish_at: usize,
    /// Positions that may be written without asking the blocks; see [`Private`].
    pub(crate) private: Private,
    /// Leading blocks that are findable (or were, and have been reclaimed).
    pub(crate) published: usize,
    /// Leading blocks that were given back.
    pub(crate) reclaimed: usize,
    pub(crate) salt: Salt,
    pub(crate) chain: Chain,
}

/// Positions of whole blocks that are known to be one table's alone: one reader, not findable.
/// Nobody but the table itself can change that (by a fork, or by publishing), so it saves the look
/// at each block's metadata in every step. May cover less than what is private, never more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Private {
    start: u32,
    end: u32,
}

impl Private {
    /// That blocks `start..end` are private.
    #[inline]
    pub(crate) fn blocks(start: usize, end: usize, size: BlockSize) -> Self {
        let position = |block: usize| block.checked_mul(size.get())?.try_into().ok();
        match (position(start), position(end)) {
            (Some(start), Some(end)) => Self { start, end },
            // Positions that do not fit 32 bits are looked up every time.
            _ => Self::default(),
        }
    }

    /// Whether all of positions `start..end` are known to be private.
    #[inline]
    pub(crate) fn covers(self, start: usize, end: usize) -> bool {
        self.start as usize <= start && end <= self.end as usize
    }

    /// That the first `blocks` blocks are private no more.
    #[inline]
    pub(crate) fn leave(&mut self, blocks: usize, size: BlockSize) {
        let end = blocks.saturating_mul(size.get());
        self.start = self.start.max(end.try_into().unwrap_or(u32::MAX));
    }
}

impl BlockTable {
    /// The blocks in the order of the positions they hold. Blocks that
    /// [`reclaim_before`](crate::KvAllocator::reclaim_before) gave back are [`BlockId::NULL`].
    #[inline]
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many leading blocks the prefix cache knows.
    pub fn num_published(&self) -> usize {
        self.published
    }

    /// How many leading blocks were given back by `reclaim_before`.
    pub fn num_reclaimed(&self) -> usize {
        self.reclaimed
    }

    /// The salt under which the blocks are shared.
    pub fn salt(&self) -> Salt {
        self.salt
    }
}
