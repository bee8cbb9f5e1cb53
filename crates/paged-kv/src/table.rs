//! The block table of one sequence.

use crate::ids::{BlockId, Salt};
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
pub struct BlockTable {
    pub(crate) blocks: Vec<BlockId>,
    /// Which manager the blocks are of.
    pub(crate) manager: u64,
    pub(crate) salt: Salt,
    /// Leading blocks that are findable (or were, and have been reclaimed).
    pub(crate) published: usize,
    /// How many computed tokens make the next block full; `usize::MAX` once nothing more can be
    /// published because a block went back unpublished.
    pub(crate) publish_at: usize,
    pub(crate) chain: Chain,
    /// Leading blocks that were given back.
    pub(crate) reclaimed: usize,
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
