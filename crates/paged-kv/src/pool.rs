//! The blocks: who is free, who is cached, who is referenced.
//!
//! One list, linked through the blocks' own metadata, holds every block without a reader. Blocks
//! without content of value stand in front, cached ones behind them in the order in which they
//! lost their last reader:
//!
//! ```text
//!   front                                                     back
//!   free ─ free ─ free ─ cached (oldest) ─ cached ─ cached (newest)
//!   └─ take() takes here                     release() puts here ─┘
//! ```
//!
//! Block 0 is nobody's and serves as the list's head, so no link is ever missing.

use crate::ids::BlockId;

/// What is known of a block. With the index's 8 bytes: 64 bytes a block.
#[derive(Clone, Default)]
pub(crate) struct Meta {
    /// Chained hash; meaningful while `node` is set.
    pub(crate) hash: [u64; 2],
    /// What the block hangs on: the salt at depth 0, else `[node of the parent, 0]`.
    pub(crate) parent: [u64; 2],
    /// Identity of the prefix that ends with this block, 0 while it is not findable. Never
    /// reused, and the same in all blocks that hold the same prefix.
    pub(crate) node: u64,
    /// Without readers: neighbours in the list. With readers: neighbours in the ring of blocks
    /// that hold the same prefix.
    pub(crate) prev: u32,
    pub(crate) next: u32,
    /// Number of tables that hold the block.
    pub(crate) refs: u32,
    /// Blocks before this one in its chain.
    pub(crate) depth: u32,
}

impl Meta {
    /// Whether one table alone has a claim on the block, so that it may write into it.
    #[inline]
    pub(crate) fn is_private(&self) -> bool {
        self.refs == 1 && self.node == 0
    }
}

/// The blocks' metadata, the list through them and the counts of both kinds in it.
pub(crate) struct BlockPool {
    pub(crate) metas: Vec<Meta>,
    pub(crate) free: usize,
    pub(crate) cached: usize,
}

const HEAD: u32 = 0;

impl BlockPool {
    /// A pool whose blocks `1..num_blocks` are free.
    pub(crate) fn new(num_blocks: u32) -> Self {
        let metas = (0..num_blocks)
            .map(|i| Meta {
                prev: i.checked_sub(1).unwrap_or(num_blocks - 1),
                next: (i + 1) % num_blocks,
                ..Meta::default()
            })
            .collect();
        Self {
            metas,
            free: num_blocks as usize - 1,
            cached: 0,
        }
    }

    #[inline]
    pub(crate) fn meta(&self, block: BlockId) -> &Meta {
        &self.metas[block.index()]
    }

    #[inline]
    pub(crate) fn available(&self) -> usize {
        self.free + self.cached
    }

    /// The block to hand out next.
    #[inline]
    pub(crate) fn front(&self) -> Option<BlockId> {
        let front = self.metas[HEAD as usize].next;
        (front != HEAD).then_some(BlockId(front))
    }

    /// The block to hand out last.
    pub(crate) fn back(&self) -> Option<BlockId> {
        let back = self.metas[HEAD as usize].prev;
        (back != HEAD).then_some(BlockId(back))
    }

    #[inline]
    pub(crate) fn is_private(&self, block: BlockId) -> bool {
        self.meta(block).is_private()
    }

    /// Takes a block off the list: its first reader is here.
    #[inline]
    pub(crate) fn unlink(&mut self, block: BlockId) {
        let meta = &mut self.metas[block.index()];
        debug_assert_eq!(meta.refs, 0);
        let (prev, next) = (meta.prev, meta.next);
        meta.prev = block.0;
        meta.next = block.0;
        meta.refs = 1;
        if meta.node == 0 {
            self.free -= 1;
        } else {
            self.cached -= 1;
        }
        self.metas[prev as usize].next = next;
        self.metas[next as usize].prev = prev;
    }

    /// One more reader.
    #[inline]
    pub(crate) fn retain(&mut self, block: BlockId) {
        match self.metas[block.index()].refs {
            0 => self.unlink(block),
            _ => self.metas[block.index()].refs += 1,
        }
    }

    /// One reader less; says whether it was the last. The caller then lists the block.
    #[inline]
    pub(crate) fn drop_reader(&mut self, block: BlockId) -> bool {
        let refs = &mut self.metas[block.index()].refs;
        *refs -= 1;
        *refs == 0
    }

    /// Moves a cached block of the list to the front, without content.
    pub(crate) fn uncache(&mut self, block: BlockId) {
        self.unlink(block);
        self.metas[block.index()].node = 0;
        self.push_free(block);
    }

    /// Lists a block without readers and without content, to be handed out first.
    #[inline]
    pub(crate) fn push_free(&mut self, block: BlockId) {
        debug_assert_eq!(self.meta(block).node, 0);
        self.free += 1;
        let first = self.metas[HEAD as usize].next;
        self.link(block.0, HEAD, first);
    }

    /// Lists a block without readers whose content can be found, to be handed out last.
    #[inline]
    pub(crate) fn push_cached(&mut self, block: BlockId) {
        debug_assert_ne!(self.meta(block).node, 0);
        self.cached += 1;
        let last = self.metas[HEAD as usize].prev;
        self.link(block.0, last, HEAD);
    }

    #[inline]
    fn link(&mut self, block: u32, prev: u32, next: u32) {
        let meta = &mut self.metas[block as usize];
        meta.refs = 0;
        meta.prev = prev;
        meta.next = next;
        self.metas[prev as usize].next = block;
        self.metas[next as usize].prev = block;
    }

    /// Puts a block with readers into the ring of `other`, which has readers too.
    pub(crate) fn join_ring(&mut self, block: BlockId, other: BlockId) {
        let next = self.meta(other).next;
        let meta = &mut self.metas[block.index()];
        meta.prev = other.0;
        meta.next = next;
        self.metas[other.index()].next = block.0;
        self.metas[next as usize].prev = block.0;
    }

    /// Takes a block with readers out of its ring and returns another member, if there is one.
    pub(crate) fn leave_ring(&mut self, block: BlockId) -> Option<BlockId> {
        let meta = &mut self.metas[block.index()];
        let (prev, next) = (meta.prev, meta.next);
        if next == block.0 {
            return None;
        }
        meta.prev = block.0;
        meta.next = block.0;
        self.metas[prev as usize].next = next;
        self.metas[next as usize].prev = prev;
        Some(BlockId(next))
    }

    /// The blocks of the list, in the order in which they will be handed out.
    pub(crate) fn list(&self) -> impl Iterator<Item = BlockId> + '_ {
        let after = |block: u32| Some(self.metas[block as usize].next).filter(|&next| next != HEAD);
        std::iter::successors(after(HEAD), move |&block| after(block)).map(BlockId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_costs_64_bytes_beside_its_tokens() {
        let index = 2 * size_of::<u32>();
        assert_eq!(size_of::<Meta>() + index, 64);
    }
}
