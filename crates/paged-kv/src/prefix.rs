//! The prefix cache: full blocks that can be found by what they hold.
//!
//! A *node* is a prefix of whole blocks under a salt: (parent node or salt, tokens of the last
//! block). The chained hash finds a node's candidates; a hit needs the same parent node, the same
//! depth and the same tokens, so by induction the whole prefix is the same, however the hash
//! behaves. All blocks with readers that hold one node form a ring, one of them in the index. When
//! it loses its last reader another takes its place, so a node lives as long as any table holds a
//! block of it and a child never outlives its parent; the last one stays, cached, until evicted.

use crate::events::{CacheObserver, Stored};
use crate::hash::ChainHasher;
use crate::ids::{BlockHash, BlockId, Salt, TokenId};
use crate::index::Index;
use crate::pool::BlockPool;

/// Where a sequence stands in the tree of prefixes: the end of its last published block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) hash: [u64; 2],
    /// What the next block hangs on, as in [`Meta::parent`](crate::pool::Meta::parent).
    pub(crate) parent: [u64; 2],
    pub(crate) depth: u32,
}

impl Chain {
    /// The end of a block that is findable.
    pub(crate) fn end_of(pool: &BlockPool, block: BlockId) -> Self {
        let meta = pool.meta(block);
        Self {
            hash: meta.hash,
            parent: [meta.node, 0],
            depth: meta.depth + 1,
        }
    }
}

/// The claim that a block which holds some tokens under an existing node already, holds others.
#[derive(Debug)]
pub(crate) struct Contradiction;

pub(crate) struct Prefixes {
    block_size: usize,
    hasher: ChainHasher,
    pub(crate) index: Index,
    /// The tokens of every findable block, `block_size` of them a block.
    tokens: Vec<TokenId>,
    next_node: u64,
}

impl Prefixes {
    pub(crate) fn new(num_blocks: usize, block_size: usize, key: u128) -> Self {
        Self {
            block_size,
            hasher: ChainHasher::new(key, block_size),
            index: Index::new(num_blocks),
            tokens: vec![0; num_blocks * block_size],
            next_node: 1,
        }
    }

    /// The beginning of every sequence under a salt.
    pub(crate) fn root(&self, salt: Salt) -> Chain {
        Chain {
            hash: self.hasher.root(salt).0,
            parent: [salt.0 as u64, (salt.0 >> 64) as u64],
            depth: 0,
        }
    }

    #[inline]
    pub(crate) fn tokens_of(&self, block: BlockId) -> &[TokenId] {
        let start = block.index() * self.block_size;
        &self.tokens[start..start + self.block_size]
    }

    /// The hash of the block of `tokens` behind `chain`, and a block that holds it.
    #[inline]
    pub(crate) fn find(
        &mut self,
        pool: &BlockPool,
        chain: &Chain,
        tokens: &[TokenId],
    ) -> (BlockHash, Option<BlockId>) {
        let hash = self.hasher.next(BlockHash(chain.hash), tokens);
        let found = self.index.find(hash.0, |block| {
            let meta = &pool.metas[block as usize];
            meta.hash == hash.0
                && meta.parent == chain.parent
                && meta.depth == chain.depth
                && self.tokens_of(BlockId(block)) == tokens
        });
        (hash, found.map(BlockId))
    }

    /// Calls `hit` with each cached block of the prefix of `tokens`, in order, and returns the
    /// chain's end. At least one token is left over.
    #[inline]
    pub(crate) fn walk(
        &mut self,
        pool: &BlockPool,
        tokens: &[TokenId],
        salt: Salt,
        mut hit: impl FnMut(BlockId),
    ) -> Chain {
        let mut chain = self.root(salt);
        let whole_blocks = &tokens[..tokens.len().saturating_sub(1)];
        for tokens in whole_blocks.chunks_exact(self.block_size) {
            let (_, Some(block)) = self.find(pool, &chain, tokens) else {
                break;
            };
            hit(block);
            chain = Chain::end_of(pool, block);
        }
        chain
    }

    /// Whether the node behind which `chain` stands can still be found.
    pub(crate) fn is_alive(&self, pool: &BlockPool, chain: &Chain) -> bool {
        chain.depth == 0 || {
            let node = chain.parent[0];
            let is_it = |block: u32| pool.metas[block as usize].node == node;
            self.index.find(chain.hash, is_it).is_some()
        }
    }

    /// Makes a full block with readers findable as the one behind `chain`, and moves `chain` on.
    pub(crate) fn register(
        &mut self,
        pool: &mut BlockPool,
        observer: &mut impl CacheObserver,
        block: BlockId,
        chain: &mut Chain,
        tokens: &[TokenId],
        salt: Salt,
    ) -> Result<(), Contradiction> {
        let (hash, found) = self.find(pool, chain, tokens);
        let meta = pool.meta(block);
        if meta.node != 0 {
            // Another table of the same fork published it.
            let same = found.is_some_and(|found| pool.meta(found).node == meta.node);
            *chain = Chain::end_of(pool, block);
            return same.then_some(()).ok_or(Contradiction);
        }
        let node = match found {
            Some(holder) => {
                let node = pool.meta(holder).node;
                if pool.meta(holder).refs == 0 {
                    self.index.replace(hash.0, holder.0, block.0);
                    pool.uncache(holder);
                } else {
                    pool.join_ring(block, holder);
                }
                node
            }
            None => {
                self.index.insert(hash.0, block.0);
                self.next_node += 1;
                self.next_node - 1
            }
        };
        let start = block.index() * self.block_size;
        self.tokens[start..start + self.block_size].copy_from_slice(tokens);
        let meta = &mut pool.metas[block.index()];
        meta.hash = hash.0;
        meta.parent = chain.parent;
        meta.depth = chain.depth;
        meta.node = node;
        if found.is_none() {
            observer.stored(Stored {
                block,
                hash,
                parent: (chain.depth > 0).then_some(BlockHash(chain.hash)),
                depth: chain.depth as usize,
                salt,
                tokens,
            });
        }
        *chain = Chain::end_of(pool, block);
        Ok(())
    }

    /// Forgets a cached block without readers, which stays in the list: its content is given up.
    pub(crate) fn evict(
        &mut self,
        pool: &mut BlockPool,
        observer: &mut impl CacheObserver,
        block: BlockId,
    ) {
        let hash = pool.meta(block).hash;
        self.index.remove(hash, block.0, &pool.metas);
        pool.uncache(block);
        observer.removed(BlockHash(hash));
    }

    /// One reader less. A block without readers is listed: behind all others if it is the only
    /// holder of its node, else in front.
    #[inline]
    pub(crate) fn release(&mut self, pool: &mut BlockPool, block: BlockId) {
        if !pool.drop_reader(block) {
            return;
        }
        let meta = pool.meta(block);
        if meta.node == 0 {
            pool.push_free(block);
        } else {
            let hash = meta.hash;
            match pool.leave_ring(block) {
                None => pool.push_cached(block),
                Some(heir) => {
                    self.index.replace(hash, block.0, heir.0);
                    pool.metas[block.index()].node = 0;
                    pool.push_free(block);
                }
            }
        }
    }
}
