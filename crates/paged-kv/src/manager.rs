//! [`BlockManager`]: tables on top of the pool and the prefix cache.

use crate::allocator::KvAllocator;
use crate::config::{Config, ConfigError};
use crate::events::CacheObserver;
use crate::hash::{random_key, random_u64};
use crate::ids::{BlockId, BlockSize, Salt, TokenId};
use crate::pool::BlockPool;
use crate::prefix::{Chain, Prefixes};
use crate::swap::HostPool;
use crate::table::{BlockTable, Private};
use crate::usage::{BlockState, Usage};

/// The memory manager: see the [crate's guide](crate) and [`KvAllocator`] for what it does.
///
/// `O` is told what the prefix cache gains and loses; by default nobody is.
pub struct BlockManager<O = ()> {
    /// Told apart from other managers by this number.
    pub(crate) id: u64,
    pub(crate) block_size: BlockSize,
    pub(crate) pool: BlockPool,
    pub(crate) prefixes: Option<Prefixes>,
    pub(crate) observer: O,
    pub(crate) host: HostPool,
    pub(crate) tables: usize,
    pub(crate) swapped: usize,
    /// Whether a table gave blocks back from its beginning: then children may outlive parents.
    pub(crate) reclaimed_any: bool,
    evictions: u64,
    pub(crate) queried_tokens: u64,
    pub(crate) hit_tokens: u64,
    /// Blocks found by the allocation in progress: kept for its memory.
    hits: Vec<BlockId>,
}

impl BlockManager {
    /// A manager of empty KV buffers.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        Self::with_observer(config, ())
    }
}

impl<O: CacheObserver> BlockManager<O> {
    /// A manager that tells `observer` what becomes findable and what is forgotten.
    pub fn with_observer(config: Config, observer: O) -> Result<Self, ConfigError> {
        let num_blocks = config.check()?;
        let key = config.hash_key.unwrap_or_else(random_key);
        Ok(Self {
            id: random_u64(),
            block_size: config.block_size,
            pool: BlockPool::new(num_blocks),
            prefixes: config
                .prefix_caching
                .then(|| Prefixes::new(config.num_blocks, config.block_size.get(), key)),
            observer,
            host: HostPool::new(config.host_blocks),
            tables: 0,
            swapped: 0,
            reclaimed_any: false,
            evictions: 0,
            queried_tokens: 0,
            hit_tokens: 0,
            hits: Vec::new(),
        })
    }

    /// The observer.
    pub fn observer(&self) -> &O {
        &self.observer
    }

    /// The observer, to drain what it has gathered.
    pub fn observer_mut(&mut self) -> &mut O {
        &mut self.observer
    }

    /// Figures of this moment, in constant time.
    pub fn usage(&self) -> Usage {
        let num_blocks = self.num_blocks();
        let (free, cached) = (self.pool.free, self.pool.cached);
        Usage {
            num_blocks,
            free,
            cached,
            referenced: num_blocks - free - cached,
            tables: self.tables,
            host_blocks: self.host.size,
            host_free: self.host.free.len(),
            swapped: self.swapped,
            evictions: self.evictions,
            queried_tokens: self.queried_tokens,
            hit_tokens: self.hit_tokens,
        }
    }

    /// The state of every block that sequences can have, in the order of their ids.
    pub fn block_map(&self) -> impl Iterator<Item = (BlockId, BlockState)> + '_ {
        (1..).zip(&self.pool.metas[1..]).map(|(id, meta)| {
            let state = match (meta.refs, meta.node != 0) {
                (0, false) => BlockState::Free,
                (0, true) => BlockState::Cached,
                (readers, published) => BlockState::Referenced { readers, published },
            };
            (BlockId(id), state)
        })
    }

    /// Forgets every prefix that no table reads: weights or adapters changed. Prefixes that are
    /// being read stay findable. Returns how many were forgotten.
    pub fn clear_cached(&mut self) -> usize {
        let mut forgotten = 0;
        while let Some(block) = self.pool.back().filter(|&b| self.pool.meta(b).node != 0) {
            self.evict(block);
            forgotten += 1;
        }
        forgotten
    }

    fn evict(&mut self, block: BlockId) {
        let prefixes = self
            .prefixes
            .as_mut()
            .expect("only a prefix cache makes nodes");
        prefixes.evict(&mut self.pool, &mut self.observer, block);
        self.evictions += 1;
    }

    /// The block at the front of the list; the caller has made sure that there is one.
    #[inline]
    pub(crate) fn take(&mut self) -> BlockId {
        let block = self.pool.front().expect("availability was checked");
        if self.pool.meta(block).node != 0 {
            self.evict(block);
        }
        self.pool.unlink(block);
        block
    }

    #[inline]
    pub(crate) fn release(&mut self, block: BlockId) {
        match &mut self.prefixes {
            Some(prefixes) => prefixes.release(&mut self.pool, block),
            None => {
                if self.pool.drop_reader(block) {
                    self.pool.push_free(block);
                }
            }
        }
    }

    #[inline]
    pub(crate) fn check_owner(&self, table: &BlockTable) {
        assert!(
            table.manager == self.id,
            "this block table belongs to another block manager"
        );
    }

    /// Searches the whole blocks of `tokens`; keeps the hits for [`Self::take_prefix`]. Returns how
    /// many there are and how many of them have no readers.
    pub(crate) fn find_prefix(&mut self, tokens: &[TokenId], salt: Salt) -> (usize, usize) {
        let (pool, hits) = (&self.pool, &mut self.hits);
        let mut evictable = 0;
        hits.clear();
        if let Some(prefixes) = &mut self.prefixes {
            prefixes.walk(pool, tokens, salt, |block| {
                evictable += usize::from(pool.meta(block).refs == 0);
                hits.push(block);
            });
        }
        (hits.len(), evictable)
    }

    /// Becomes a reader of the blocks that were found.
    pub(crate) fn take_prefix(&mut self, blocks: &mut Vec<BlockId>) {
        for &block in &self.hits {
            self.pool.retain(block);
        }
        blocks.extend_from_slice(&self.hits);
    }

    /// A table of blocks that are its own by now, the cached ones in front.
    pub(crate) fn new_table(&mut self, blocks: Vec<BlockId>, salt: Salt) -> BlockTable {
        self.tables += 1;
        BlockTable {
            blocks,
            manager: self.id,
            publish_at: 0,
            private: Private::default(),
            published: 0,
            reclaimed: 0,
            salt,
            chain: Chain::default(),
        }
    }

    /// Sets where a table stands in the tree of prefixes.
    pub(crate) fn stand(&self, table: &mut BlockTable, published: usize) {
        table.published = published;
        table.publish_at = (published + 1) * self.block_size.get();
        let Some(prefixes) = &self.prefixes else {
            table.publish_at = usize::MAX;
            return;
        };
        match published.checked_sub(1).map(|last| table.blocks[last]) {
            None => table.chain = prefixes.root(table.salt),
            Some(BlockId::NULL) => table.publish_at = usize::MAX,
            Some(last) => table.chain = Chain::end_of(&self.pool, last),
        }
    }
}
