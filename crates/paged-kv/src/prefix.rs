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

/// Why a block cannot be published.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// It is published already, with other tokens.
    Contradiction,
    /// A block with readers has the same hash and another parent. Either that parent was
    /// reclaimed, evicted and computed anew, or two prefixes have one 128-bit hash.
    Occupied,
}

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
            parent: salt.0,
            depth: 0,
        }
    }

    #[inline]
    pub(crate) fn tokens_of(&self, block: BlockId) -> &[TokenId] {
        let start = block.index() * self.block_size;
        &self.tokens[start..start + self.block_size]
    }

    /// The hash of the block of `tokens` behind `chain`, and the block that is findable by it.
    #[inline]
    fn candidate(
        &mut self,
        pool: &BlockPool,
        chain: &Chain,
        tokens: &[TokenId],
    ) -> (BlockHash, Option<BlockId>) {
        let hash = self.hasher.next(BlockHash(chain.hash), tokens);
        let is_it = |block: u32| pool.metas[block as usize].hash == hash.0;
        (hash, self.index.find(hash.0, is_it).map(BlockId))
    }

    /// Whether a candidate is what the hash says.
    #[inline]
    fn is_hit(&self, pool: &BlockPool, block: BlockId, chain: &Chain, tokens: &[TokenId]) -> bool {
        let meta = pool.meta(block);
        meta.parent == chain.parent && meta.depth == chain.depth && self.tokens_of(block) == tokens
    }

    /// Calls `hit` with each block of the longest cached prefix of `tokens`, in order.
    #[inline]
    pub(crate) fn walk(
        &mut self,
        pool: &BlockPool,
        tokens: &[TokenId],
        salt: Salt,
        mut hit: impl FnMut(BlockId),
    ) {
        let mut chain = self.root(salt);
        for tokens in tokens.chunks_exact(self.block_size) {
            let (_, Some(block)) = self.candidate(pool, &chain, tokens) else {
                break;
            };
            if !self.is_hit(pool, block, &chain, tokens) {
                break;
            }
            hit(block);
            chain = Chain::end_of(pool, block);
        }
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
    ) -> Result<(), Refusal> {
        let (hash, found) = self.candidate(pool, chain, tokens);
        let (hit, other) = match found {
            Some(holder) if self.is_hit(pool, holder, chain, tokens) => (Some(holder), None),
            other => (None, other),
        };
        let meta = pool.meta(block);
        if meta.node != 0 {
            // Another table of the same fork published it.
            let same = hit.is_some_and(|holder| pool.meta(holder).node == meta.node);
            *chain = Chain::end_of(pool, block);
            return same.then_some(()).ok_or(Refusal::Contradiction);
        }
        match other {
            Some(other) if pool.meta(other).refs > 0 => return Err(Refusal::Occupied),
            Some(other) => self.evict(pool, observer, other),
            None => {}
        }
        let node = match hit {
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
        if hit.is_none() {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A pool whose block 1 is published as the first block `[5, 6]`.
    fn setup() -> (BlockPool, Prefixes, Chain) {
        let mut pool = BlockPool::new(4);
        let mut prefixes = Prefixes::new(4, 2, 1);
        let root = prefixes.root(Salt::NONE);
        pool.unlink(BlockId(1));
        let mut chain = root;
        prefixes
            .register(
                &mut pool,
                &mut (),
                BlockId(1),
                &mut chain,
                &[5, 6],
                Salt::NONE,
            )
            .unwrap();
        (pool, prefixes, root)
    }

    fn hits(pool: &BlockPool, prefixes: &mut Prefixes) -> usize {
        let mut hits = 0;
        prefixes.walk(pool, &[5, 6, 7], Salt::NONE, |_| hits += 1);
        hits
    }

    #[test]
    fn an_equal_hash_is_not_a_hit() {
        let (pool, mut prefixes, _) = setup();
        assert_eq!(hits(&pool, &mut prefixes), 1);
        // As if the prefix 4, 6 had the hash of 5, 6.
        prefixes.tokens[2] = 4;
        assert_eq!(hits(&pool, &mut prefixes), 0);

        let (mut pool, mut prefixes, _) = setup();
        pool.metas[1].parent = [9, 0];
        assert_eq!(hits(&pool, &mut prefixes), 0);

        let (mut pool, mut prefixes, _) = setup();
        pool.metas[1].depth = 1;
        assert_eq!(hits(&pool, &mut prefixes), 0);
    }

    #[test]
    fn a_block_whose_hash_is_taken_stays_unpublished_until_the_other_is_unread() {
        let (mut pool, mut prefixes, root) = setup();
        pool.unlink(BlockId(2));
        let mut other = Chain {
            parent: [9, 0],
            ..root
        };
        let mut publish = |pool: &mut BlockPool, prefixes: &mut Prefixes| {
            prefixes.register(pool, &mut (), BlockId(2), &mut other, &[5, 6], Salt::NONE)
        };
        assert!(matches!(
            publish(&mut pool, &mut prefixes),
            Err(Refusal::Occupied)
        ));
        assert_eq!(hits(&pool, &mut prefixes), 1);
        prefixes.release(&mut pool, BlockId(1));
        assert_eq!(pool.cached, 1);
        publish(&mut pool, &mut prefixes).unwrap();
        assert_eq!((pool.cached, pool.free), (0, 2));
        assert_eq!(hits(&pool, &mut prefixes), 0);
    }

    #[test]
    fn a_block_is_not_published_twice_with_different_tokens() {
        let (mut pool, mut prefixes, root) = setup();
        let mut publish = |tokens: &[TokenId]| {
            prefixes.register(
                &mut pool,
                &mut (),
                BlockId(1),
                &mut { root },
                tokens,
                Salt::NONE,
            )
        };
        publish(&[5, 6]).unwrap();
        assert!(matches!(publish(&[5, 7]), Err(Refusal::Contradiction)));
    }
}
